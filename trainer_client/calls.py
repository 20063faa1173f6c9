"""What to ask a node and how to read its answers: no socket, no thread, no event loop.

A call is a generator: it yields a ``Request`` and is sent the ``Reply`` (or None where no connection was
made), yields a ``Pause`` and is resumed after it, and returns its typed result. ``submit.py`` drives the
same generators with a blocking and with an asyncio client, so both do exactly the same.

Retries: no connection, 408, 429, 500, 502, 503 and 504 are tried again with growing pauses, or after what
``Retry-After`` says, up to a minute: they tell of the node's state or the network's, none of what was asked, and every
request may be repeated. A named rejection never is: it is raised as ``Rejected`` with the node's reason.

Exceptions::

    Rejected              the node names a rule
    Unavailable           no usable answer before the retries were over
    UnexpectedAnswer      the node answered something the contract does not know
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from consensus.genesis import genesis_from_json
from consensus.identifiers import ChainId
from consensus.membership import Genesis
from consensus.portions import Policy, Wire
from consensus.rejection import CountersignError, Reason, Rejected, Unavailable
from consensus.state import (
    GRANT_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    GrantRecord,
    PolicyHead,
    PolicyRecord,
    SourceRecord,
    read_record,
)

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
OVERSIZED_STATUS = 413
MAXIMUM_WAIT_SECONDS = 30.0
LONGEST_WISH_SECONDS = 60.0
"""No ``Retry-After`` is granted more."""
MAXIMUM_DIGITS = 9
TRANSFER_SECONDS = 60.0
MAX_ANSWER_BYTES = 64 << 20
"""Room for the largest honest answer: the list of all sources, or a receipt with the way from a genesis."""
OCTETS = "application/octet-stream"

UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""What the decoder raises for a body that is not the JSON asked for: nested without end, it is a ``RecursionError``."""

HexDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

T = TypeVar("T")
R = TypeVar("R", bound=Wire)
J = TypeVar("J")


class UnexpectedAnswer(CountersignError):
    """The node's answer is not one the contract knows; says which request and what came back."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. It may see nothing come for ``timeout_seconds``, and take ``limit_seconds`` in all."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    timeout_seconds: float = 30.0

    @property
    def limit_seconds(self) -> float:
        """To connect, to send, to wait and to read the answer to its end."""
        return self.timeout_seconds + TRANSFER_SECONDS


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. ``retry_after`` is the header's text, empty without one."""

    status: int
    body: bytes
    retry_after: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """Resume after so many seconds."""

    seconds: float


Call = Generator[Request | Pause, Reply | None, T]


LISTING_EVENTS = 500
"""Events on a page of a listing."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How long to keep trying: pauses double from ``first_seconds`` to ``longest_seconds``."""

    attempts: int = 6
    first_seconds: float = 0.1
    longest_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class EventStatus:
    """Where an event stands: ``pending``, ``final`` or ``rejected``; index and height once final."""

    id: str
    status: str
    index: int | None = None
    height: int | None = None
    error: str = ""
    detail: str = ""
    leaf_hash: str = ""

    @property
    def rejection(self) -> Rejected:
        """The node's reason as an exception."""
        return Rejected(_reason(self.error, f"event {self.id}"), self.detail)


@dataclass(frozen=True, slots=True)
class GrantRefusal:
    """A member that would not sign a grant, and why."""

    member: str
    error: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class GrantStatus:
    """Where a grant request stands: ``gathering``, ``submitted``, ``final`` or ``refused``."""

    id: str
    status: str
    signers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    refusals: tuple[GrantRefusal, ...] = ()


@dataclass(frozen=True, slots=True)
class CampaignStatus:
    """A campaign's head on the log; digests in hex, ``closed`` is empty while it is open."""

    steps: int
    root: HexDigest
    next_sequence: int
    next_grant: int
    attempt: int
    last_event: HexDigest
    rollback_required: bool
    closed: str
    presented: int
    admitted: int
    refused: int
    discarded_steps: int
    rollbacks: int
    job_key: str
    undo_root: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""


@dataclass(frozen=True, slots=True)
class ListedEvent:
    """A row of the log's listing."""

    index: int
    id: HexDigest
    kind: str


class SourceSummary(msgspec.Struct, frozen=True):
    """One registered source as the node lists it; ``revoked_at_ms`` is 0 while it stands."""

    id: str
    name: str
    author: str
    author_name: str
    licence: str
    purposes: tuple[str, ...]
    content_class: str = msgspec.field(name="class")
    example_count: int
    revoked_at_ms: int | None = 0


@dataclass(frozen=True, slots=True)
class PolicyInForce:
    """The policy the next grant is judged by."""

    id: bytes
    since_ms: int
    policy: Policy


def submit(event: bytes, wait_seconds: float, retries: Retries) -> Call[EventStatus]:
    """POST one event; with ``wait_seconds`` the answer may already say ``final``."""
    request = Request("POST", "/v1/events", _wait(wait_seconds), event, 30.0 + wait_seconds)
    return (yield from _json(request, EventStatus, retries))


def submit_batch(events: Sequence[bytes], retries: Retries) -> Call[tuple[EventStatus, ...]]:
    """POST events as frames, in order; one result for each, in order. A rejection is a result, not raised."""
    body = b"".join(len(event).to_bytes(4, "big") + event for event in events)
    request = Request("POST", "/v1/events/batch", body=body, timeout_seconds=60.0)
    results = (yield from _json(request, _BatchAnswer, retries)).results
    if len(results) != len(events):
        raise UnexpectedAnswer(f"{request.path}: {len(results)} results for {len(events)} events")
    return results


def status(event_id: bytes, wait_seconds: float, retries: Retries) -> Call[EventStatus]:
    """Where an event stands. ``Rejected`` with ``NOT_FOUND`` for one the node has never seen."""
    request = Request("GET", f"/v1/events/{event_id.hex()}", _wait(wait_seconds), None, 30.0 + wait_seconds)
    return (yield from _json(request, EventStatus, retries))


def wait_final(
    event_id: bytes, limit_seconds: float, retries: Retries, monotonic: Callable[[], float] = time.monotonic
) -> Call[EventStatus]:
    """Wait until an event is final.

    Raises:
        Rejected: it was rejected. Unavailable: it is still pending after ``limit_seconds``.
    """
    deadline = monotonic() + limit_seconds
    while True:
        left_seconds = max(0.0, deadline - monotonic())
        found = yield from status(event_id, min(left_seconds, MAXIMUM_WAIT_SECONDS), retries)
        if found.status == "final":
            return found
        if found.status == "rejected":
            raise found.rejection
        if monotonic() >= deadline:
            raise Unavailable(f"event {event_id.hex()} is {found.status} after {limit_seconds} s")
        yield Pause(0.05)


def raw_event(event_id: bytes, retries: Retries) -> Call[bytes]:
    """The wire form of an event on the log."""
    return (yield from _bytes(Request("GET", f"/v1/events/{event_id.hex()}/raw"), retries))


def receipt(event_id: bytes, wait_seconds: float, retries: Retries) -> Call[bytes]:
    """Canonical bytes of an event's receipt."""
    path = f"/v1/receipts/{event_id.hex()}"
    return (yield from _bytes(Request("GET", path, _wait(wait_seconds), None, 30.0 + wait_seconds), retries))


def state_record(key: bytes, record: type[R], retries: Retries) -> Call[R | None]:
    """The decoded state record under a 33-byte key, or None where there is none."""
    request = Request("GET", f"/v1/state/{key.hex()}")
    try:
        encoded = yield from _bytes(request, retries)
    except Rejected as refusal:
        if refusal.reason is Reason.NOT_FOUND:
            return None
        raise
    try:
        return read_record(encoded, record)
    except ValueError as error:
        raise _unexpected(request, error) from error


def policy_in_force(retries: Retries) -> Call[PolicyInForce]:
    """The policy in force, from the authenticated state. ``Rejected`` with ``UNKNOWN_POLICY`` without one."""
    head = yield from state_record(POLICY_HEAD_KEY, PolicyHead, retries)
    if head is None:
        raise Rejected(Reason.UNKNOWN_POLICY, "no policy is on the log")
    record = yield from state_record(POLICY_TABLE + head.policy, PolicyRecord, retries)
    if record is None:
        raise UnexpectedAnswer(f"policy {head.policy.hex()} is in force but has no record")
    return PolicyInForce(head.policy, record.since_ms, record.policy)


def source_record(source: bytes, retries: Retries) -> Call[SourceRecord]:
    """A source as registered. ``Rejected`` with ``UNKNOWN_SOURCE``."""
    record = yield from state_record(SOURCE_TABLE + source, SourceRecord, retries)
    if record is None:
        raise Rejected(Reason.UNKNOWN_SOURCE, f"source {source.hex()} is not on the log")
    return record


def grant_record(grant: bytes, retries: Retries) -> Call[GrantRecord]:
    """A grant on the log. ``Rejected`` with ``UNKNOWN_GRANT``."""
    record = yield from state_record(GRANT_TABLE + grant, GrantRecord, retries)
    if record is None:
        raise Rejected(Reason.UNKNOWN_GRANT, f"grant {grant.hex()} is not on the log")
    return record


def campaign(identifier: bytes, retries: Retries) -> Call[CampaignStatus]:
    """A campaign's head. ``Rejected`` with ``NOT_FOUND`` before it is opened."""
    return (yield from _json(Request("GET", f"/v1/campaigns/{identifier.hex()}"), CampaignStatus, retries))


def campaign_events(identifier: bytes, retries: Retries) -> Call[tuple[ListedEvent, ...]]:
    """All of a campaign's events on the log, in its order."""
    listed: list[ListedEvent] = []
    start: int | None = 0
    while start is not None:
        query = (("campaign", identifier.hex()), ("start", str(start)), ("limit", str(LISTING_EVENTS)))
        page = yield from _json(Request("GET", "/v1/events", query), _EventPage, retries)
        listed += page.events
        if page.next is not None and page.next <= start:
            raise UnexpectedAnswer(f"/v1/events: the page after {start} begins at {page.next}")
        start = page.next
    return tuple(listed)


def sources(retries: Retries) -> Call[tuple[SourceSummary, ...]]:
    """Every registered source."""
    return (yield from _json(Request("GET", "/v1/sources"), _SourcesAnswer, retries)).sources


def request_grant(unsigned: bytes, retries: Retries) -> Call[GrantStatus]:
    """Ask the operator's node to sign a grant and gather the signatures of the named authorities."""
    return (yield from _json(Request("POST", "/v1/grants", body=unsigned), GrantStatus, retries))


def grant_status(grant: bytes, retries: Retries) -> Call[GrantStatus]:
    """Where a grant request stands."""
    return (yield from _json(Request("GET", f"/v1/grants/{grant.hex()}"), GrantStatus, retries))


def genesis(chain_id: ChainId, retries: Retries) -> Call[Genesis]:
    """The node's genesis, which must be the pinned chain's. ``Rejected`` with ``WRONG_CHAIN``."""
    found = genesis_from_json((yield from _bytes(Request("GET", "/v1/genesis"), retries)))
    if found.chain_id != chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"the node's chain is {found.chain_id.hex()}, pinned: {chain_id.hex()}")
    return found


def checkpoint(retries: Retries) -> Call[str]:
    """The newest checkpoint: a C2SP signed note."""
    request = Request("GET", "/v1/checkpoint")
    try:
        return (yield from _bytes(request, retries)).decode()
    except UnicodeDecodeError as error:
        raise _unexpected(request, error) from error


def log_size(retries: Retries) -> Call[int]:
    """How many events are on the log, as far as the node has it."""
    return (yield from _json(Request("GET", "/v1/status"), _StatusAnswer, retries)).log_size


@dataclass(frozen=True, slots=True)
class _BatchAnswer:
    results: tuple[EventStatus, ...]


@dataclass(frozen=True, slots=True)
class _StatusAnswer:
    log_size: int


@dataclass(frozen=True, slots=True)
class _EventPage:
    events: tuple[ListedEvent, ...]
    next: int | None = None


@dataclass(frozen=True, slots=True)
class _SourcesAnswer:
    sources: tuple[SourceSummary, ...]


@dataclass(frozen=True, slots=True)
class _ErrorAnswer:
    error: str
    detail: str = ""


def _reliably(request: Request, retries: Retries) -> Call[Reply]:
    """A reply of status 2xx, after as many tries as it takes.

    Raises:
        Rejected: the node names a reason. Unavailable: the tries are over. UnexpectedAnswer.
    """
    pause_seconds = retries.first_seconds
    problem = "no connection"
    for attempt in range(retries.attempts):
        reply = yield request
        if reply is not None and 200 <= reply.status < 300:
            return reply
        if reply is not None and reply.status not in RETRIED_STATUSES:
            raise _refusal(request, reply)
        wanted_seconds = pause_seconds
        if reply is not None:
            problem = f"HTTP {reply.status}{_said(reply)}"
            wanted_seconds = max(pause_seconds, _retry_after_seconds(reply.retry_after))
        if attempt + 1 < retries.attempts:
            yield Pause(wanted_seconds)
        pause_seconds = min(2 * pause_seconds, retries.longest_seconds)
    raise Unavailable(f"{request.method} {request.path}: {problem} after {retries.attempts} attempts")


def _bytes(request: Request, retries: Retries) -> Call[bytes]:
    return (yield from _reliably(request, retries)).body


def _json(request: Request, answer: type[J], retries: Retries) -> Call[J]:
    reply = yield from _reliably(request, retries)
    try:
        return msgspec.json.decode(reply.body, type=answer)  # Unknown names are ignored: a newer node may say more.
    except UNREADABLE as error:
        raise _unexpected(request, error) from error


def _unexpected(request: Request, error: Exception) -> UnexpectedAnswer:
    return UnexpectedAnswer(f"{request.method} {request.path}: {error}")


def _refusal(request: Request, reply: Reply) -> CountersignError:
    where = f"{request.method} {request.path}: HTTP {reply.status}"
    try:
        said = msgspec.json.decode(reply.body, type=_ErrorAnswer)
        return Rejected(_reason(said.error, where), said.detail)
    except UNREADABLE:
        unknown = UnexpectedAnswer(f"{where}: {reply.body[:200]!r}")
    except UnexpectedAnswer as error:
        unknown = error
    # A proxy before the node says what is too large in words of its own.
    return Rejected(Reason.OVERSIZED, str(unknown)) if reply.status == OVERSIZED_STATUS else unknown


def _said(reply: Reply) -> str:
    """The node's words about a passing trouble, empty where there are none of its own."""
    try:
        said = msgspec.json.decode(reply.body, type=_ErrorAnswer)
    except UNREADABLE:
        return ""
    return f" ({said.error}: {said.detail})" if said.detail else f" ({said.error})"


def _reason(name: str, where: str) -> Reason:
    if name not in frozenset(Reason):
        raise UnexpectedAnswer(f"{where}: unknown reason '{name}'")
    return Reason(name)


def _retry_after_seconds(header: str) -> float:
    """The delay form of RFC 9110 §10.2.3, as far as it is granted; its date form counts as no wish."""
    if not (header.isascii() and header.isdigit()):
        return 0.0
    return min(float(header[:MAXIMUM_DIGITS]), LONGEST_WISH_SECONDS)


def _wait(wait_seconds: float) -> tuple[tuple[str, str], ...]:
    return (("wait", f"{wait_seconds:.3f}"),) if wait_seconds else ()
