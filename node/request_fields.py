"""Strict readers for what stands in a request's path and query: one spelling for each value.

No percent-encoding, no sign, no underscore, no upper-case hex, nothing repeated, nothing unknown: a misspelt
parameter that is silently ignored answers another question than the one asked.
"""

import re
from collections.abc import Mapping, Sequence

from consensus.identifiers import Digest
from consensus.rejection import Reason, Rejected

MAX_WAIT_SECONDS = 60.0
MAX_INDEX = 2**53 - 1

_PAIR = re.compile(r"(?P<name>[a-z_]{1,32})=(?P<value>[A-Za-z0-9._-]{1,128})")
_DIGITS = re.compile(r"0|[1-9][0-9]{0,15}")
_SECONDS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?")
_HEX = re.compile(r"(?:[0-9a-f]{2})+")


def read_query(query: str, known: Sequence[str]) -> dict[str, str]:
    """The parameters of a query, each one of ``known`` and there once.

    Raises:
        Rejected: ``MALFORMED``.
    """
    found: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        matched = _PAIR.fullmatch(pair)
        if matched is None:
            raise Rejected(Reason.MALFORMED, f"query {pair[:80]!r}, expected name=value without percent-encoding")
        name = matched["name"]
        if name not in known:
            expected = f"expected one of: {', '.join(known)}" if known else "none is known here"
            raise Rejected(Reason.MALFORMED, f"unknown query parameter '{name}'; {expected}")
        if name in found:
            raise Rejected(Reason.MALFORMED, f"query parameter '{name}' stands twice")
        found[name] = matched["value"]
    return found


def whole_number(name: str, text: str, least: int = 0, most: int = MAX_INDEX) -> int:
    """A decimal number without sign or leading zero.

    Raises:
        Rejected: ``MALFORMED``.
    """
    if not _DIGITS.fullmatch(text) or not least <= int(text) <= most:
        raise Rejected(Reason.MALFORMED, f"{name} {text[:40]!r}, expected a number from {least} to {most}")
    return int(text)


def optional_number(query: Mapping[str, str], name: str, default: int, most: int = MAX_INDEX) -> int:
    """The whole number of a query parameter, ``default`` without it.

    Raises:
        Rejected: ``MALFORMED``.
    """
    return whole_number(name, query[name], most=most) if name in query else default


def needed_number(query: Mapping[str, str], name: str) -> int:
    """The whole number of a query parameter that must be there.

    Raises:
        Rejected: ``MALFORMED``.
    """
    if name not in query:
        raise Rejected(Reason.MALFORMED, f"query parameter '{name}' is missing")
    return whole_number(name, query[name])


def wait_seconds(query: Mapping[str, str]) -> float:
    """How long ``wait`` asks to wait, at most ``MAX_WAIT_SECONDS``; 0 without it.

    Raises:
        Rejected: ``MALFORMED``.
    """
    text = query.get("wait", "0")
    if not _SECONDS.fullmatch(text) or float(text) > MAX_WAIT_SECONDS:
        raise Rejected(Reason.MALFORMED, f"wait {text[:40]!r}, expected seconds from 0 to {MAX_WAIT_SECONDS:g}")
    return float(text)


def hex_bytes(name: str, text: str, length: int = 32) -> bytes:
    """Exactly ``length`` bytes as lower-case hex.

    Raises:
        Rejected: ``MALFORMED``.
    """
    if len(text) != 2 * length or not _HEX.fullmatch(text):
        raise Rejected(Reason.MALFORMED, f"{name} {text[:80]!r}, expected {2 * length} lower-case hex digits")
    return bytes.fromhex(text)


def digest(name: str, text: str) -> Digest:
    """A digest as lower-case hex.

    Raises:
        Rejected: ``MALFORMED``.
    """
    return Digest(hex_bytes(name, text))


def optional_digest(query: Mapping[str, str], name: str) -> bytes:
    """The digest of a query parameter, empty without it.

    Raises:
        Rejected: ``MALFORMED``.
    """
    return digest(name, query[name]) if name in query else b""
