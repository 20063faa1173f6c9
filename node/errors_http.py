"""Replies, and how a refusal becomes one: status code plus ``{"error", "detail"}``, never a traceback.

``error`` is a ``Reason``; what only HTTP can say has the four names in ``HttpFault``. Statuses: 400 the bytes
are wrong whatever the log says, 401, 404, 413, 429 with ``Retry-After``, 409 for every rule that depends on the
log, 503 with ``Retry-After`` for what may work in a moment.
"""

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from consensus.rejection import CountersignError, Reason, Rejected, Unavailable

JSON = "application/json"
OCTETS = "application/octet-stream"
NOTE = "text/plain; charset=utf-8"
RETRY_AFTER_SECONDS = 1
CLOSING = ("connection", "close")

_WRONG_BYTES = frozenset(
    {
        Reason.MALFORMED,
        Reason.NON_CANONICAL,
        Reason.UNSUPPORTED_VERSION,
        Reason.WRONG_CHAIN,
        Reason.BAD_KEY,
        Reason.BAD_SIGNATURE,
        Reason.BAD_PROOF_OF_POSSESSION,
        Reason.BAD_SHARE,
        Reason.BAD_DEALING,
        Reason.MISSING_SIGNATURE,
        Reason.SURPLUS_SIGNATURE,
        Reason.UNKNOWN_MEMBER,
        Reason.WRONG_ROLE,
        Reason.BAD_FIELD,
        Reason.PORTION_MISMATCH,
        Reason.COUNTS_NOT_CONSERVED,
        Reason.BAD_BLOCK,
        Reason.BAD_TIMESTAMP,
        Reason.BAD_VOTE,
        Reason.BAD_CERTIFICATE,
        Reason.BAD_PROOF,
        Reason.BAD_CHECKPOINT,
        Reason.BAD_MEMBERSHIP,
        Reason.UNKNOWN_PREDICATE,
        Reason.DIGEST_MISMATCH,
    }
)
_OWN_STATUS = {
    Reason.UNAUTHORIZED: 401,
    Reason.NOT_FOUND: 404,
    Reason.OVERSIZED: 413,
    Reason.OVERLOADED: 429,
}


class HttpFault(StrEnum):
    """Values of ``error`` that are no ``Reason``."""

    METHOD_NOT_ALLOWED = "method-not-allowed"
    TOO_SLOW = "too-slow"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class SlowClient(CountersignError):
    """A request did not arrive in its time."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A whole reply."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


def json_reply(content: object, status: int = 200) -> HttpReply:
    """``content`` as JSON."""
    return HttpReply(status, msgspec.json.encode(content))


def error_reply(status: int, error: str, detail: str, *headers: tuple[str, str]) -> HttpReply:
    """A refusal."""
    return HttpReply(status, msgspec.json.encode({"error": error, "detail": detail}), JSON, headers)


def status_of_reason(reason: Reason) -> int:
    """The HTTP status of a refusal."""
    return _OWN_STATUS.get(reason) or (400 if reason in _WRONG_BYTES else 409)


def reply_to(error: Rejected | Unavailable | SlowClient) -> HttpReply:
    """The reply to a request that ended in ``error``."""
    retry = ("retry-after", str(RETRY_AFTER_SECONDS))
    if isinstance(error, Unavailable):
        return error_reply(503, HttpFault.UNAVAILABLE, str(error), retry)
    if isinstance(error, SlowClient):
        return error_reply(408, HttpFault.TOO_SLOW, str(error))
    status = status_of_reason(error.reason)
    # Who has no token may not have requests without end refused on one connection.
    extra = {401: (("www-authenticate", "Bearer"), CLOSING), 429: (retry,)}.get(status, ())
    return error_reply(status, error.reason.value, error.detail, *extra)
