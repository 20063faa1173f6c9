"""The node's HTTP clients: ``Client`` blocks (training loops), ``AsyncClient`` awaits (tools, notebooks).

Both drive the calls of ``calls.py``, where requests, answers and retries are defined; nothing is said
twice. Every method raises as described there: ``Rejected`` with the node's reason, ``Unavailable`` after the
last retry, ``UnexpectedAnswer``.

Nothing of the environment is used: a proxy from there would be sent the node's token and all that the job records, and
a ``.netrc`` could say who asks.
"""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

import httpx

from consensus.identifiers import ChainId
from consensus.membership import Genesis
from consensus.portions import Wire
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
        self._http = httpx.Client(base_url=url, headers=_headers(token), trust_env=False)
        self._retries = retries

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

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
            reply = None
            if isinstance(wanted, Request):
                try:
                    reply = _reply(self._http.send(_http_request(self._http, wanted)))
                except httpx.RequestError:
                    continue
            else:
                time.sleep(wanted.seconds)


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
                    reply = _reply(await self._http.send(_http_request(self._http, wanted)))
                except httpx.RequestError:
                    continue
            else:
                await asyncio.sleep(wanted.seconds)


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _http_request(http: httpx.Client | httpx.AsyncClient, wanted: Request) -> httpx.Request:
    return http.build_request(
        wanted.method,
        wanted.path,
        params=list(wanted.query),
        content=wanted.body,
        headers={"Content-Type": calls.OCTETS} if wanted.body is not None else {},
        timeout=httpx.Timeout(wanted.timeout_seconds, connect=CONNECT_SECONDS),
    )


def _reply(response: httpx.Response) -> Reply:
    return Reply(response.status_code, response.content, response.headers.get("Retry-After", ""))
