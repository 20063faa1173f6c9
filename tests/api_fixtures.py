"""One node's HTTP interface over a real store, for tests: real events, real certificates, a real socket.

``InstantNode`` seals every event it can admit into a ledger block of its own, certified with the keys of all
members of the fixture. What waits for finality elsewhere is final here before the answer leaves.
"""

import copy
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import trio
from ledger_fixtures import GOVERNANCE, LIBRARIAN, OPERATOR, MemoryLedger, Story
from ledger_fixtures import story as tell

from consensus.block import Body, decode_header
from consensus.certificate import decode_certificate
from consensus.checkpoint import assemble_note, checkpoint_text, sign_note
from consensus.codec import encode
from consensus.event import CheckedEvent, check_unsigned, pack_parts, sign_entry, unpack
from consensus.identifiers import VOTING_ROLES, Digest, MemberId, Role
from consensus.keys import Ed25519SigningKey
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.transition import is_final
from node.api import Api
from node.beacons import BeaconDesk
from node.config import Address, ApiSection
from node.custody import CustodyDesk
from node.errors_http import HttpReply
from node.http_server import HttpLimits, HttpRequest, serve_http
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import GetBeaconShare, decode_request
from node.metrics import Metrics
from node.service import EventState, EventStatus, GrantState, GrantStatus, NodeStatus, RoleReach
from node.store import Store
from node.voter import VotingKeys

TOKEN = "a-token-of-enough-letters"
ZEROS = "00" * 32
SIGNERS = (LIBRARIAN, GOVERNANCE, OPERATOR)
PATIENCE_SECONDS = 0.3


@functools.cache
def told() -> Story:
    """The story, told once; ``node_of`` copies what would change."""
    return tell(released=False)


def wire(event: CheckedEvent) -> bytes:
    """An event as a client sends it."""
    return pack_parts(event.entry_bytes, event.portions_bytes)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and named reason of a refusal, which always has just these two fields."""
    body = answer.json()
    assert set(body) == {"error", "detail"}
    assert "Traceback" not in body["detail"]
    return answer.status_code, body["error"]


class Desk:
    """Signs a grant over the librarian's sources with all keys it needs, once asked by hand."""

    def __init__(self, node: "InstantNode") -> None:
        self._node = node
        self._grants: dict[Digest, CheckedEvent] = {}

    async def request(self, encoded_unsigned: bytes) -> Digest:
        wire = unpack(encoded_unsigned)
        event = check_unsigned(wire.entry, wire.portions, self._node.ledger.committee)
        self._grants[event.id] = event
        return event.id

    def status(self, event_id: Digest) -> GrantStatus:
        grant = self._grants.get(event_id)
        if grant is None:
            raise Rejected(Reason.NOT_FOUND, f"no grant {event_id.hex()} was asked for")
        final = self._node.status_of(event_id).state is EventState.FINAL
        state = GrantState.FINAL if final else GrantState.GATHERING
        missing = () if final else tuple(self._node.memory.ids)
        return GrantStatus(event_id, Digest(grant.entry.campaign), state, (), missing, ())

    def list(self) -> tuple[GrantStatus, ...]:
        return tuple(self.status(event_id) for event_id in self._grants)

    async def sign(self, event_id: Digest) -> GrantStatus:
        self.status(event_id)
        event = self._grants[event_id]
        entry = event.entry
        for member in self._node.ledger.committee.members:
            if member.name in SIGNERS:
                entry = sign_entry(entry, member.id, member.role, self._node.memory.secrets[member.name].identity)
        self._node.submit(pack_parts(encode(entry), event.portions_bytes))
        return self.status(event_id)


class OtherMembers:
    """The other voters, each with a desk of its own over the same log. ``silent`` ones do not answer; ``late`` ones
    refuse so many times first."""

    def __init__(self, memory: MemoryLedger, ledger: Ledger, own: str, directory: Path) -> None:
        self.silent: set[str] = set()
        self.late: dict[str, int] = {}
        self.spoil: Callable[[str, bytes], bytes] = lambda name, answer: answer
        self._desks: dict[MemberId, tuple[str, BeaconDesk]] = {}
        for voter in memory.committee.voters:
            if voter.name != own:
                desk = BeaconDesk(ledger, directory / voter.name, self, PATIENCE_SECONDS)
                desk.begin_epoch(voting_keys(memory, voter.name), "")
                self._desks[voter.id] = (voter.name, desk)

    @property
    def connected(self) -> frozenset[MemberId]:
        return frozenset(self._desks)

    async def request(self, member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
        name, desk = self._desks[member]
        request = decode_request(payload)
        assert isinstance(request, GetBeaconShare)
        if name in self.silent:
            raise Unavailable("not connected")
        if self.late.get(name):
            self.late[name] -= 1
            raise Unavailable("not-found: the challenge is not final")
        try:
            return self.spoil(name, await desk.answer(request))
        except Rejected as refusal:
            raise Unavailable(str(refusal)) from refusal


def voting_keys(memory: MemoryLedger, name: str) -> VotingKeys:
    """What a voter of the ledger signs with."""
    held = memory.secrets[name]
    return VotingKeys(memory.ids[name], held.identity, held.key_share or held.identity)


def beacon_desk(memory: MemoryLedger, ledger: Ledger, name: str, directory: Path) -> BeaconDesk:
    """The desk of a voter, with all others at hand."""
    desk = BeaconDesk(ledger, directory, OtherMembers(memory, ledger, name, directory), PATIENCE_SECONDS)
    desk.begin_epoch(voting_keys(memory, name), "")
    return desk


class InstantNode:
    """A ``Service`` of one process that finalizes at once. ``held`` keeps events pending instead."""

    def __init__(self, memory: MemoryLedger, store: Store, max_events: int = 1_000, custody_bytes: int = 0) -> None:
        self.memory = memory
        self.ledger = Ledger(store, memory.genesis)
        self.mempool = Mempool(max_events, 1 << 24)
        self.grants = Desk(self)
        self.beacons = beacon_desk(memory, self.ledger, "operator-1", store._directory / "beacon-shares")
        self.custody = CustodyDesk(store._directory / "custody", custody_bytes)
        self.name, self.role = "operator-1", Role.OPERATOR.value
        self.halted = ""
        self.held = False
        self.changed = trio.Event()
        for height in range(1, len(memory.certified) + 1):
            self._append(height)

    def _append(self, height: int) -> None:
        encoded_header, encoded_certificate = self.memory.certified[height - 1]
        header = decode_header(encoded_header, self.memory.chain_id)
        events = self.memory.events[header.log_size - header.event_count : header.log_size]
        body = Body(tuple(event.leaf_hash for event in events))
        self.ledger.verify(self.ledger.final, header, body, events)
        self.ledger.commit([header], decode_certificate(encoded_certificate), ())

    def submit(self, encoded: bytes) -> CheckedEvent:
        if self.halted:
            raise Unavailable(self.halted)
        event = self.ledger.check(encoded)
        if self.ledger.store.index_of_event(event.id) is None and self.mempool.add(event, 0) and not self.held:
            self.seal(event)
        return event

    def submit_each(self, encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
        answers: list[CheckedEvent | Rejected] = []
        for one in encoded:
            try:
                answers.append(self.submit(one))
            except Rejected as error:
                answers.append(error.anew())
        return answers

    def seal(self, event: CheckedEvent) -> None:
        """Append a pending event, or refuse it."""
        try:
            self.memory.seal(event)
        except Rejected as why:
            if is_final(why):
                self.mempool.reject(event, why)
        else:
            self._append(len(self.memory.certified))
            self.mempool.remove(event.leaf_hash)
        self.changed.set()

    def status_of(self, event_id: Digest) -> EventStatus:
        index = self.ledger.store.index_of_event(event_id)
        if index is not None:
            return EventStatus(EventState.FINAL, index, self.ledger.store.height_of_index(index))
        if self.mempool.find(event_id) is not None:
            return EventStatus(EventState.PENDING)
        why = self.mempool.rejection(event_id)
        if why is not None:
            return EventStatus(EventState.REJECTED, reason=why.reason, detail=why.detail)
        return EventStatus(EventState.UNKNOWN)

    async def wait_final(self, event_id: Digest, timeout_seconds: float) -> EventStatus:
        with trio.move_on_after(timeout_seconds):
            while self.status_of(event_id).state in (EventState.PENDING, EventState.UNKNOWN):
                await self.changed.wait()
        return self.status_of(event_id)

    def snapshot(self) -> NodeStatus:
        header = self.ledger.final.header
        return NodeStatus(
            epoch=0,
            view=header.view,
            height=header.height,
            log_size=header.log_size,
            log_root=Digest(header.log_root),
            state_root=Digest(header.state_root),
            head=self.ledger.final.digest,
            timestamp_ms=header.timestamp_ms,
            peers_connected=("governance-1",),
            peers_total=3,
            mempool_events=len(self.mempool),
            mempool_bytes=self.mempool.held_bytes,
            voting=True,
            halted=self.halted,
            roles=tuple(RoleReach(role, 1, self.ledger.committee.threshold(role)) for role in VOTING_ROLES),
            clocks_ahead_ms=(("governance-1", -250),),
        )

    def checkpoint_note(self) -> bytes:
        header, origin = self.ledger.final.header, self.ledger.genesis.name
        if header.log_size == 0:
            raise Rejected(Reason.NOT_FOUND, "the log is empty")
        text = checkpoint_text(origin, header.log_size, header.log_root)
        return assemble_note(text, [sign_note(text, origin, self.log_key)])

    @property
    def log_key(self) -> Ed25519SigningKey:
        """The librarian's, whose node this is."""
        seed = self.memory.secrets[LIBRARIAN].log_seed
        assert seed is not None
        return Ed25519SigningKey(seed)

    def member(self, name: str) -> MemberId:
        return self.memory.ids[name]


def node_of(
    story: Story, directory: Path, max_events: int = 1_000, custody_bytes: int = 0
) -> tuple[InstantNode, Store]:
    """A node that stands where the story ends."""
    memory = copy.copy(story.ledger)
    memory.events = list(memory.events)
    memory.certified = list(memory.certified)
    memory.states = list(memory.states)
    memory._nodes = dict(memory._nodes)
    store = Store.open(directory, memory.chain_id, create=True)
    return InstantNode(memory, store, max_events, custody_bytes), store


class Served:
    """A served node and a client of it."""

    def __init__(self, node: InstantNode, api: Api, address: Address, client: httpx.AsyncClient) -> None:
        self.node = node
        self.api = api
        self.address = address
        self.client = client

    async def raw(self, request: bytes, seconds: float = 5.0) -> bytes:
        """What comes back for these bytes until the server closes or falls silent."""
        answer = b""
        async with await trio.open_tcp_stream("127.0.0.1", self.address.port) as stream:
            try:
                await stream.send_all(request)
                with trio.move_on_after(seconds):
                    while chunk := await stream.receive_some():
                        answer += chunk
            except trio.BrokenResourceError:
                pass
        return answer


@asynccontextmanager
async def served(
    directory: Path,
    *,
    tokens: tuple[str, ...] = (),
    max_body_bytes: int = 1 << 20,
    limits: HttpLimits | None = None,
    headers: Mapping[str, str] | None = None,
    max_events: int = 1_000,
    story: Story | None = None,
    custody_bytes: int = 0,
) -> AsyncIterator[Served]:
    """A node on a free port, at the end of the story."""
    node, store = node_of(story or told(), directory, max_events, custody_bytes)
    with store:
        config = ApiSection(listen=Address("127.0.0.1", 0), tokens=tokens, max_body_bytes=max_body_bytes)
        api = Api(node, config, tokens, Metrics(node))

        async def handler(request: HttpRequest) -> HttpReply:
            return await api(request)

        async with trio.open_nursery() as nursery:
            start = functools.partial(serve_http, handler, config.listen, "api.listen", limits)
            address: Address = await nursery.start(start)
            async with httpx.AsyncClient(base_url=f"http://{address}", headers=headers, trust_env=False) as client:
                yield Served(node, api, address, client)
            nursery.cancel_scope.cancel()
