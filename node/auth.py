"""Who may use the HTTP interface.

- With tokens in the configuration every request carries one: ``Authorization: Bearer TOKEN`` (RFC 6750 §2.1),
  once. Comparison takes the same time whichever token, and whichever letter, is wrong.
- Without tokens the configuration admits only a loopback address. Every page a browser shows can also reach
  that, so a request that a foreign page may have caused is refused: one with an ``Origin``, or whose ``Host``
  is not the loopback (DNS rebinding).

An event's own signatures decide what it may do; this decides who may talk to the node, sign grants by hand
and read the portions it holds.
"""

import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from hashlib import sha256

from consensus.rejection import Reason, Rejected

_SCHEME = "bearer"


class Gate:
    """Admits requests by their headers (lower-case names)."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """``tokens``: those of ``config.api_tokens``; none means loopback only."""
        self._digests = tuple(sha256(token.encode()).digest() for token in tokens)

    def admit(self, headers: Mapping[str, str]) -> None:
        """The request may be answered.

        Raises:
            Rejected: ``UNAUTHORIZED``; never says what was presented.
        """
        if self._digests:
            self._check_token(headers.get("authorization"))
        else:
            _check_local(headers)

    def _check_token(self, header: str | None) -> None:
        if header is None:
            raise Rejected(Reason.UNAUTHORIZED, "this node asks for 'Authorization: Bearer TOKEN'")
        scheme, _, token = header.partition(" ")
        presented = sha256(token.strip(" ").encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(presented, known) for known in self._digests]
        if scheme.lower() != _SCHEME or not any(matches):
            raise Rejected(Reason.UNAUTHORIZED, "the token is not one of this node's")


def _check_local(headers: Mapping[str, str]) -> None:
    if "origin" in headers:
        raise Rejected(Reason.UNAUTHORIZED, "a web page may not use this node without a token")
    host = headers.get("host", "")
    name, _, port = host.rpartition(":")
    if not (port.isascii() and port.isdigit()):
        name = host
    if name.lower() != "localhost" and not _is_loopback(name.removeprefix("[").removesuffix("]")):
        raise Rejected(Reason.UNAUTHORIZED, "without a token, ask for a loopback address by its name or number")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
