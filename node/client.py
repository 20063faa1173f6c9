"""A small HTTP client of a node, for the command line.

Answers come back typed; a node's refusal comes back as the ``Rejected`` it is, with the node's own reason and
detail. What a node says is believed only where a command says so: proofs are checked by ``consensus``.

A node that does not answer, is not ready or has too much to do raises ``Unavailable``. Answers are asked for uncoded
and read to a bound, of size and of time. Proxies of the environment are not used: a token is for the node alone.
"""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Annotated, TypeVar

import httpx
import msgspec
from msgspec import Meta, Raw, Struct

from consensus.accumulators import MAX_WINDOW_BYTES
from consensus.bundle import MAX_BUNDLE_BYTES
from consensus.portions import Natural
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable

DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_JSON_BYTES = 64 << 20
LONGEST_BODY_SECONDS = 600.0
PAGE_EVENTS = 500

UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""What the decoder raises for a body that is not the JSON asked for: nested without end, it is a ``RecursionError``."""

A = TypeVar("A")


class ErrorAnswer(Struct, frozen=True):
    """Every refusal's body."""

    error: str
    detail: str = ""


class EventAnswer(Struct, frozen=True):
    """What became of an event."""

    id: str
    status: str
    leaf_hash: str | None = None
    index: int | None = None
    height: int | None = None
    error: str | None = None
    detail: str | None = None


class EventRow(Struct, frozen=True):
    """One event of the log's listing."""

    index: int
    id: str
    kind: str
    author: str
    author_name: str = ""
    campaign: str = ""
    sequence: int = 0
    attempt: int = 0
    size_bytes: int = 0


class EventPage(Struct, frozen=True):
    """Part of the listing; ``next`` is where it goes on, None at its end."""

    events: tuple[EventRow, ...]
    next: int | None = None


class SourceRow(Struct, frozen=True):
    """One registered source."""

    id: str
    name: str
    author: str
    author_name: str
    licence: str
    purposes: tuple[str, ...]
    content_class: str = msgspec.field(name="class")
    example_count: Natural = 0
    content_root: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] = "0" * 64
    reserve_below: Natural = 0
    revoked_at_ms: int = 0


class SourceList(Struct, frozen=True):
    """All registered sources."""

    sources: tuple[SourceRow, ...]


class PolicyAnswer(Struct, frozen=True):
    """The policy in force; ``policy`` is its content as JSON."""

    id: str
    since_ms: int
    policy: Raw


class GrantRefusalRow(Struct, frozen=True):
    """Why one member will not countersign."""

    member: str
    error: str
    detail: str = ""


class GrantAnswer(Struct, frozen=True):
    """How far a grant has come, by member names."""

    id: str
    status: str
    campaign: str | None = None
    signers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    refusals: tuple[GrantRefusalRow, ...] = ()


class GrantList(Struct, frozen=True):
    """Grants that are gathered, wait for a hand, or are open."""

    grants: tuple[GrantAnswer, ...]


class CampaignAnswer(Struct, frozen=True):
    """Where a campaign stands, as far as a replacement of its job key needs it."""

    last_event: str
    job_key: str
    steps: int = 0
    closed: str = ""
    next_audit: int = 1


class BeaconAnswer(Struct, frozen=True):
    """The beacon of an audit challenge, in hexadecimal."""

    number: int
    epoch: int
    beacon: str


class CustodyFileRow(Struct, frozen=True):
    """A file that a window's list names, and how much of it a custodian has."""

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    size_bytes: int
    held_bytes: int


class CustodyWindowRow(Struct, frozen=True):
    """A window of accumulators that stands on the log, and what a custodian has of it."""

    first_step: int
    last_step: int
    root: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    listed: bool
    files: tuple[CustodyFileRow, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return self.listed and all(file.held_bytes == file.size_bytes for file in self.files)


class CustodyAnswer(Struct, frozen=True):
    """What a custodian keeps of a campaign, and how much room it has for all of them."""

    maximum_bytes: int
    set_aside_bytes: int
    windows: tuple[CustodyWindowRow, ...]


class ConsistencyAnswer(Struct, frozen=True):
    """An RFC 9162 consistency proof, hashes in hexadecimal."""

    proof: Annotated[tuple[Annotated[str, Meta(pattern="^[0-9a-f]{64}$")], ...], Meta(max_length=64)]

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """32 bytes each."""
        return tuple(bytes.fromhex(held) for held in self.proof)


class HandedIn(Struct, frozen=True):
    """How much of a file is there after a part of it was handed in."""

    held_bytes: int


class NodeClient:
    """One node's HTTP interface. Use it in a ``with`` block."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        """Nothing is sent yet.

        Raises:
            ConfigError: ``url`` is no http or https address; no header can hold ``token``.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"expected a node's address like http://127.0.0.1:7480, found {url}")
        if token is not None and not (token and all("!" <= character <= "~" for character in token)):
            raise ConfigError("expected one API token, of visible ASCII characters alone, found something else")
        self.url = url.rstrip("/")
        headers = {"Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._client = httpx.Client(headers=headers, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> "NodeClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    # Events

    def submit(self, event: bytes, wait_seconds: float = 0.0) -> EventAnswer:
        """Hand in a signed event; with ``wait_seconds`` wait that long for its finality.

        Raises:
            Rejected: the node's reason. Unavailable: no answer, or not now.
        """
        answer = self._request("POST", "/v1/events", _wait(wait_seconds), event, wait_seconds)
        return _refused_if_rejected(_decoded(answer, EventAnswer))

    def event(self, event_id: str, wait_seconds: float = 0.0) -> EventAnswer:
        """What became of an event.

        Raises:
            Rejected: ``NOT_FOUND``. Unavailable: no answer.
        """
        path = f"/v1/events/{event_id}"
        return _decoded(self._request("GET", path, _wait(wait_seconds), None, wait_seconds), EventAnswer)

    def event_bytes(self, event_id: str) -> bytes:
        """The signed event as it is on the log."""
        return self._request("GET", f"/v1/events/{event_id}/raw")

    def events(self, filters: dict[str, str], start: int, limit: int) -> EventPage:
        """Part of the log's listing; ``filters`` are ``kind``, ``campaign``, ``source``."""
        parameters = {**filters, "start": str(start), "limit": str(limit)}
        page = _decoded(self._request("GET", "/v1/events", parameters), EventPage)
        if page.next is not None and page.next <= start:
            raise Unavailable(f"the node's answer is not understood: the page after {start} begins at {page.next}")
        return page

    def every_event(self, filters: dict[str, str]) -> Iterator[EventRow]:
        """The log's listing to its end, a page at a time; ``filters`` as ``events``."""
        start: int | None = 0
        while start is not None:
            page = self.events(filters, start, PAGE_EVENTS)
            yield from page.events
            start = page.next

    # State

    def sources(self) -> SourceList:
        """All registered sources."""
        return _decoded(self._request("GET", "/v1/sources"), SourceList)

    def policy(self) -> PolicyAnswer:
        """The policy in force."""
        return _decoded(self._request("GET", "/v1/policy"), PolicyAnswer)

    def campaign(self, campaign: str) -> CampaignAnswer:
        """Where a campaign stands."""
        return _decoded(self._request("GET", f"/v1/campaigns/{campaign}"), CampaignAnswer)

    def beacon(self, campaign: str, challenge: str) -> BeaconAnswer:
        """The beacon of a final audit challenge, not yet verified.

        Raises:
            Rejected: ``NOT_FOUND``: it is not final. Unavailable: too few members gave their shares.
        """
        return _decoded(self._request("GET", f"/v1/audits/{campaign}/{challenge}/beacon"), BeaconAnswer)

    # Grants

    def grants(self) -> GrantList:
        """Grants being gathered, waiting for a hand, or open."""
        return _decoded(self._request("GET", "/v1/grants"), GrantList)

    def grant(self, grant_id: str) -> GrantAnswer:
        """How far a grant has come."""
        return _decoded(self._request("GET", f"/v1/grants/{grant_id}"), GrantAnswer)

    def sign_grant(self, grant_id: str) -> GrantAnswer:
        """Countersign a grant with the node's member key."""
        return _decoded(self._request("POST", f"/v1/grants/{grant_id}/sign", content=b""), GrantAnswer)

    # Custody

    def custody(self, campaign: str) -> CustodyAnswer:
        """What the node keeps of a campaign's windows.

        Raises:
            Rejected: ``NOT_FOUND``: it is no custodian; ``UNKNOWN_CAMPAIGN``.
        """
        return _decoded(self._request("GET", f"/v1/custody/{campaign}"), CustodyAnswer)

    def hand_in_window(self, campaign: str, root: str, content: bytes) -> None:
        """Hand in a window's list."""
        self._request("PUT", f"/v1/custody/{campaign}/windows/{root}", content=content)

    def hand_in_part(self, campaign: str, sha256: str, offset: int, content: bytes) -> HandedIn:
        """Hand in the next part of a file."""
        path = f"/v1/custody/{campaign}/blobs/{sha256}"
        return _decoded(self._request("PUT", path, {"offset": str(offset)}, content), HandedIn)

    def custody_window(self, campaign: str, root: str) -> bytes:
        """A window's list as the custodian has it, not yet held to its root."""
        return self._request("GET", f"/v1/custody/{campaign}/windows/{root}", max_bytes=MAX_WINDOW_BYTES)

    def custody_part(self, campaign: str, sha256: str, offset: int) -> bytes:
        """Part of a file as the custodian has it, from ``offset`` on, not yet held to its SHA-256."""
        return self._request("GET", f"/v1/custody/{campaign}/blobs/{sha256}", {"offset": str(offset)})

    # Proofs

    def receipt(self, event_id: str, wait_seconds: float = 0.0) -> bytes:
        """An event's receipt, not yet verified."""
        return self._request("GET", f"/v1/receipts/{event_id}", _wait(wait_seconds), None, wait_seconds)

    def bundle(self, predicate: str, subject: dict[str, str]) -> bytes:
        """The bundle of a predicate about ``subject``, not yet verified."""
        return self._request("GET", f"/v1/bundles/{predicate}", subject, max_bytes=MAX_BUNDLE_BYTES)

    def state_receipt(self, key: bytes) -> bytes:
        """The proof of what the state holds under a key, not yet verified."""
        return self._request("GET", f"/v1/state/{key.hex()}", {"proof": "1"}, max_bytes=MAX_BUNDLE_BYTES)

    def consistency(self, first: int, second: int) -> tuple[bytes, ...]:
        """Proof that the log of ``second`` entries begins with that of ``first``, not yet verified."""
        sizes = {"first": str(first), "second": str(second)}
        return _decoded(self._request("GET", "/v1/log/consistency", sizes), ConsistencyAnswer).hashes

    def checkpoint(self) -> bytes:
        """The newest signed checkpoint, not yet verified."""
        return self._request("GET", "/v1/checkpoint")

    def status(self) -> dict[str, object]:
        """The node's own account of itself."""
        return _decoded(self._request("GET", "/v1/status"), dict[str, object])

    # Inside

    def _request(
        self,
        method: str,
        path: str,
        parameters: dict[str, str] | None = None,
        content: bytes | None = None,
        wait_seconds: float = 0.0,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> bytes:
        headers = {} if content is None else {"Content-Type": "application/octet-stream"}
        timeout = self._client.timeout.read or DEFAULT_TIMEOUT_SECONDS
        try:
            with self._client.stream(
                method,
                self.url + path,
                params=parameters,
                content=content,
                headers=headers,
                timeout=timeout + wait_seconds,
            ) as response:
                body = bytearray()
                ends = time.monotonic() + LONGEST_BODY_SECONDS
                for chunk in response.iter_raw():
                    body += chunk
                    if time.monotonic() > ends:
                        raise Unavailable(f"the node at {self.url} took more than {LONGEST_BODY_SECONDS} s for {path}")
                    if len(body) > max_bytes:
                        raise Unavailable(f"the node at {self.url} sent more than {max_bytes} bytes for {path}")
        except httpx.InvalidURL as error:
            raise ConfigError(f"expected a node's address, found {self.url}: {error}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the node at {self.url} does not answer: {error}") from error
        if response.status_code >= 400:
            raise _failure(self.url, response.status_code, bytes(body))
        return bytes(body)


def _wait(seconds: float) -> dict[str, str]:
    return {"wait": f"{seconds:g}"} if seconds else {}


def _decoded(body: bytes, kind: type[A]) -> A:
    try:
        return msgspec.json.decode(body, type=kind)
    except UNREADABLE as error:
        raise Unavailable(f"the node's answer is not understood: {error}") from error


def _refused_if_rejected(answer: EventAnswer) -> EventAnswer:
    """An event that was taken and then refused by the state it met is a refusal all the same."""
    if answer.status == "rejected":
        raise Rejected(_reason(answer.error) or Reason.MALFORMED, answer.detail or f"event {answer.id}")
    return answer


def _failure(url: str, status: int, body: bytes) -> Rejected | Unavailable:
    try:
        answer = msgspec.json.decode(body, type=ErrorAnswer)
    except UNREADABLE:
        return Unavailable(f"{url} answered with status {status} and no reason: is it a Countersign node?")
    reason = _reason(answer.error)
    if status in (429, 503) or reason is None:
        return Unavailable(f"the node at {url} answered {status} {answer.error}: {answer.detail}")
    return Rejected(reason, answer.detail)


def _reason(value: str | None) -> Reason | None:
    return Reason(value) if value in set(Reason) else None
