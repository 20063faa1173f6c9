"""The node's HTTP clients: ``Client`` blocks (training loops), ``AsyncClient`` awaits (tools, notebooks).

Both drive the calls of ``calls.py``, where requests, answers and retries are defined; nothing is said
twice. Every method raises as described there: ``Rejected`` with the node's reason, ``Unavailable`` after the
last retry, ``UnexpectedAnswer``.

An answer has a size limit and a request a time limit, however slowly something comes, and bodies are asked for
uncoded. A blocking client is closed from any thread: what it asks or waits for ends at once.

Nothing of the environment is used: a proxy from there would be sent the node's token and all that the job records, and
a ``.netrc`` could say who asks.
"""

import asyncio
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakSet

import httpx

from consensus.identifiers import ChainId
from consensus.membership import Genesis
from consensus.portions import Wire
from consensus.rejection import Unavailable
from consensus.state import GrantRecord, SourceRecord
from trainer_client import calls
from trainer_client.calls import (
    CampaignStatus,
    EventStatus,
    GrantStatus,
    ListedEvent,
    PolicyInForce,
    Reply,
    Request,
    Retries,
    SourceSummary,
    UnexpectedAnswer,
)

CONNECT_SECONDS = 5.0
DEFAULT_RETRIES = Retries()

T = TypeVar("T")
R = TypeVar("R", bound=Wire)


class Client:
    """A blocking client of one node. May be used from several threads.

    Args:
        url: the node's HTTP address, without a path.
        token: what the node's configuration lists; None where it lists none.
    """

    def __init__(self, url: str, token: str | None = None, retries: Retries = DEFAULT_RETRIES) -> None:
        self._url = url
        self._token = token
        self._retries = retries
        self._http = httpx.Client(base_url=url, headers=_headers(token), trust_env=False)
        self._connections = _Connections()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections. What another thread asks meanwhile, or asks later, is ``Unavailable`` at once."""
        self._connections.end()
        self._http.close()

    def again(self) -> "Client":
        """A client of the same node with connections of its own: to close it closes nothing of this one's."""
        return Client(self._url, self._token, self._retries)

    def submit(self, event: bytes, wait_seconds: float = 0.0) -> EventStatus:
        """Submit one signed event."""
        return self._drive(calls.submit(event, wait_seconds, self._retries))

    def submit_batch(self, events: Sequence[bytes]) -> tuple[EventStatus, ...]:
        """Submit events in order; a rejected one is a result, not an exception."""
        return self._drive(calls.submit_batch(events, self._retries))

    def status(self, event_id: bytes, wait_seconds: float = 0.0) -> EventStatus:
        """Where an event stands."""
        return self._drive(calls.status(event_id, wait_seconds, self._retries))

    def wait_final(self, event_id: bytes, limit_seconds: float = 60.0) -> EventStatus:
        """Wait until an event is final."""
        return self._drive(calls.wait_final(event_id, limit_seconds, self._retries))

    def raw_event(self, event_id: bytes) -> bytes:
        """The wire form of an event."""
        return self._drive(calls.raw_event(event_id, self._retries))

    def receipt(self, event_id: bytes, wait_seconds: float = 0.0) -> bytes:
        """Canonical bytes of an event's receipt."""
        return self._drive(calls.receipt(event_id, wait_seconds, self._retries))

    def state_record(self, key: bytes, record: type[R]) -> R | None:
        """A decoded state record, or None."""
        return self._drive(calls.state_record(key, record, self._retries))

    def policy_in_force(self) -> PolicyInForce:
        """The policy in force, decoded."""
        return self._drive(calls.policy_in_force(self._retries))

    def source_record(self, source: bytes) -> SourceRecord:
        """A registered source."""
        return self._drive(calls.source_record(source, self._retries))

    def grant_record(self, grant: bytes) -> GrantRecord:
        """A grant on the log."""
        return self._drive(calls.grant_record(grant, self._retries))

    def campaign(self, identifier: bytes) -> CampaignStatus:
        """A campaign's head."""
        return self._drive(calls.campaign(identifier, self._retries))

    def campaign_events(self, identifier: bytes) -> tuple[ListedEvent, ...]:
        """All of a campaign's events, in the log's order."""
        return self._drive(calls.campaign_events(identifier, self._retries))

    def sources(self) -> tuple[SourceSummary, ...]:
        """Every registered source."""
        return self._drive(calls.sources(self._retries))

    def request_grant(self, unsigned: bytes) -> GrantStatus:
        """Ask for a grant."""
        return self._drive(calls.request_grant(unsigned, self._retries))

    def grant_status(self, grant: bytes) -> GrantStatus:
        """Where a grant request stands."""
        return self._drive(calls.grant_status(grant, self._retries))

    def genesis(self, chain_id: ChainId) -> Genesis:
        """The node's genesis, checked against the pinned chain id."""
        return self._drive(calls.genesis(chain_id, self._retries))

    def checkpoint(self) -> str:
        """The newest checkpoint."""
        return self._drive(calls.checkpoint(self._retries))

    def log_size(self) -> int:
        """How many events are on the log."""
        return self._drive(calls.log_size(self._retries))

    def _drive(self, call: calls.Call[T]) -> T:
        reply: Reply | None = None
        while True:
            try:
                wanted = call.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            cuts = self._connections.cuts  # read first: what ends the client after the look below is a later one
            if self._connections.ended.is_set():
                raise Unavailable("the client is closed")
            reply = None
            if isinstance(wanted, Request):
                reply = self._ask(wanted, cuts)
            else:
                self._connections.ended.wait(wanted.seconds)

    def _ask(self, wanted: Request, cuts: int) -> Reply | None:
        connections = self._connections
        request = _http_request(self._http, wanted, {"trace": partial(connections.note, cuts)})
        limit = threading.Timer(wanted.limit_seconds, connections.cut)
        limit.daemon = True
        limit.start()
        try:
            response = self._http.send(request, stream=True)
            try:
                answer = _Answer(wanted)
                for part in response.iter_raw():
                    answer.add(part)
            finally:
                response.close()
        except (httpx.RequestError, httpx.StreamError):
            return None
        except RuntimeError:  # httpx's word for a client that was closed since
            if connections.ended.is_set():
                return None
            raise
        finally:
            limit.cancel()
        # The end of a connection that was cut looks like the end of an answer without a length.
        return answer.reply(response) if connections.cuts == cuts else None


class AsyncClient:
    """The same client for asyncio: every method of ``Client``, awaited."""

    def __init__(self, url: str, token: str | None = None, retries: Retries = DEFAULT_RETRIES) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(token), trust_env=False)
        self._retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def submit(self, event: bytes, wait_seconds: float = 0.0) -> EventStatus:
        """Submit one signed event."""
        return await self._drive(calls.submit(event, wait_seconds, self._retries))

    async def submit_batch(self, events: Sequence[bytes]) -> tuple[EventStatus, ...]:
        """Submit events in order; a rejected one is a result, not an exception."""
        return await self._drive(calls.submit_batch(events, self._retries))

    async def status(self, event_id: bytes, wait_seconds: float = 0.0) -> EventStatus:
        """Where an event stands."""
        return await self._drive(calls.status(event_id, wait_seconds, self._retries))

    async def wait_final(self, event_id: bytes, limit_seconds: float = 60.0) -> EventStatus:
        """Wait until an event is final."""
        return await self._drive(calls.wait_final(event_id, limit_seconds, self._retries))

    async def raw_event(self, event_id: bytes) -> bytes:
        """The wire form of an event."""
        return await self._drive(calls.raw_event(event_id, self._retries))

    async def receipt(self, event_id: bytes, wait_seconds: float = 0.0) -> bytes:
        """Canonical bytes of an event's receipt."""
        return await self._drive(calls.receipt(event_id, wait_seconds, self._retries))

    async def state_record(self, key: bytes, record: type[R]) -> R | None:
        """A decoded state record, or None."""
        return await self._drive(calls.state_record(key, record, self._retries))

    async def policy_in_force(self) -> PolicyInForce:
        """The policy in force, decoded."""
        return await self._drive(calls.policy_in_force(self._retries))

    async def source_record(self, source: bytes) -> SourceRecord:
        """A registered source."""
        return await self._drive(calls.source_record(source, self._retries))

    async def grant_record(self, grant: bytes) -> GrantRecord:
        """A grant on the log."""
        return await self._drive(calls.grant_record(grant, self._retries))

    async def campaign(self, identifier: bytes) -> CampaignStatus:
        """A campaign's head."""
        return await self._drive(calls.campaign(identifier, self._retries))

    async def campaign_events(self, identifier: bytes) -> tuple[ListedEvent, ...]:
        """All of a campaign's events, in the log's order."""
        return await self._drive(calls.campaign_events(identifier, self._retries))

    async def sources(self) -> tuple[SourceSummary, ...]:
        """Every registered source."""
        return await self._drive(calls.sources(self._retries))

    async def request_grant(self, unsigned: bytes) -> GrantStatus:
        """Ask for a grant."""
        return await self._drive(calls.request_grant(unsigned, self._retries))

    async def grant_status(self, grant: bytes) -> GrantStatus:
        """Where a grant request stands."""
        return await self._drive(calls.grant_status(grant, self._retries))

    async def genesis(self, chain_id: ChainId) -> Genesis:
        """The node's genesis, checked against the pinned chain id."""
        return await self._drive(calls.genesis(chain_id, self._retries))

    async def checkpoint(self) -> str:
        """The newest checkpoint."""
        return await self._drive(calls.checkpoint(self._retries))

    async def log_size(self) -> int:
        """How many events are on the log."""
        return await self._drive(calls.log_size(self._retries))

    async def _drive(self, call: calls.Call[T]) -> T:
        reply: Reply | None = None
        while True:
            try:
                wanted = call.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            reply = None
            if isinstance(wanted, Request):
                try:
                    async with asyncio.timeout(wanted.limit_seconds):
                        reply = await self._ask(wanted)
                except (httpx.RequestError, TimeoutError):
                    continue
            else:
                await asyncio.sleep(wanted.seconds)

    async def _ask(self, wanted: Request) -> Reply:
        response = await self._http.send(_http_request(self._http, wanted), stream=True)
        try:
            answer = _Answer(wanted)
            async for part in response.aiter_raw():
                answer.add(part)
        finally:
            await response.aclose()
        return answer.reply(response)


class _Connections:
    """A client's connections, to be cut from another thread: to close a socket does not wake who reads from it.

    ``cuts`` counts. What was asked before the last one has no answer, and a connection made for it is cut, too.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.cuts = 0
        self._lock = threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def note(self, cuts: int, event: str, info: Mapping[str, Any]) -> None:
        """What httpx tells of a request that was begun after so many cuts."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            made = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(made)
                if self.cuts != cuts:
                    _shut(made)

    def cut(self) -> None:
        """End all that is asked."""
        with self._lock:
            self.cuts += 1
            for made in self._sockets:
                _shut(made)

    def end(self) -> None:
        """End all that is asked, and all pauses, for good."""
        self.ended.set()
        self.cut()


def _shut(made: socket.socket) -> None:
    with suppress(OSError):  # closed already
        socket.socket.shutdown(made, socket.SHUT_RDWR)  # an encrypted one's own does more, while another thread reads


class _Answer:
    """A body as it comes, up to the size limit."""

    def __init__(self, wanted: Request) -> None:
        self._wanted = wanted
        self._parts: list[bytes] = []
        self._size_bytes = 0

    def add(self, part: bytes) -> None:
        self._size_bytes += len(part)
        if self._size_bytes > calls.MAX_ANSWER_BYTES:
            where = f"{self._wanted.method} {self._wanted.path}"
            raise UnexpectedAnswer(f"{where}: more than {calls.MAX_ANSWER_BYTES} bytes")
        self._parts.append(part)

    def reply(self, response: httpx.Response) -> Reply:
        return Reply(response.status_code, b"".join(self._parts), response.headers.get("Retry-After", ""))


def _headers(token: str | None) -> dict[str, str]:
    uncoded = {"Accept-Encoding": "identity"}
    return uncoded if token is None else {**uncoded, "Authorization": f"Bearer {token}"}


def _http_request(
    http: httpx.Client | httpx.AsyncClient, wanted: Request, extensions: dict[str, Any] | None = None
) -> httpx.Request:
    return http.build_request(
        wanted.method,
        wanted.path,
        params=list(wanted.query),
        content=wanted.body,
        headers={"Content-Type": calls.OCTETS} if wanted.body is not None else {},
        timeout=httpx.Timeout(wanted.timeout_seconds, connect=CONNECT_SECONDS),
        extensions=extensions,
    )
