"""What a node's process holds of clients and members that flood it: bounded, by the figures of docs/operator.md."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio
from network_fixtures import LOST, frame
from process_fixtures import MEMBERS, Processes, processes

from consensus import portions as p
from consensus.codec import decode, encode
from consensus.event import MAX_ENTRY_BYTES, Entry, Kind, event_id, make_entry, pack, sign_entry, unpack
from consensus.identifiers import MemberId, Role
from consensus.keys import Ed25519SigningKey, Signer
from node.config import load_config
from node.http_server import HttpLimits
from node.link import REQUEST_NUMBER, FrameKind
from node.messages import GetEvents, in_turns, pack_gossip
from node.transport import Connection, Identity, RosterNoise, connect, peer_id_of

pytestmark = pytest.mark.processes

MIB = 1 << 20


@dataclass(frozen=True)
class Victim:
    """One node of a consortium whose other members' keys the attacker has."""

    consortium: Processes
    name: str

    @property
    def process(self) -> Path:
        return Path("/proc") / str(self.consortium.running[self.name].pid)

    @property
    def api(self) -> tuple[str, int]:
        parts = urlsplit(self.consortium.provisioned.members[self.name].api_url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def peak_bytes(self) -> int:
        """The most that was resident since ``forget_peak``."""
        return self._status_bytes("VmHWM")

    def resident_bytes(self) -> int:
        """What is resident now."""
        return self._status_bytes("VmRSS")

    def _status_bytes(self, field: str) -> int:
        (line,) = (line for line in (self.process / "status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10

    def forget_peak(self) -> None:
        (self.process / "clear_refs").write_text("5")

    @contextmanager
    def grows_at_most(self, limit_bytes: int) -> Iterator[None]:
        """The process's resident memory meanwhile, at its highest, and it still answers."""
        self.forget_peak()
        before = self.peak_bytes()
        yield
        grown = self.peak_bytes() - before
        assert grown < limit_bytes, f"{grown / MIB:.1f} MiB more than the {before / MIB:.1f} MiB before"
        assert self.consortium.get(self.name, "/v1/health") is not None, self.consortium.log(self.name)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """The node that all others dial, alone: nothing becomes final, and what waits goes on waiting."""
    with processes(tmp_path_factory.mktemp("memory") / "consortium") as held:
        *_, last = sorted((transport_identity(held, one.name).peer_id.to_bytes(), one.name) for one in MEMBERS)
        held.start(last[1])
        yield Victim(held, last[1])


def transport_identity(consortium: Processes, name: str) -> Identity:
    return Identity.from_seed(consortium.secrets(name).transport_seed)


@asynccontextmanager
async def bulk_connection(victim: Victim) -> AsyncIterator[Connection]:
    """A connection of another member, whose owner follows no rule from here on."""
    consortium = victim.consortium
    identity = transport_identity(consortium, next(one.name for one in MEMBERS if one.name != victim.name))
    section = load_config(consortium.provisioned.members[victim.name].config).network
    stream = await trio.open_tcp_stream(section.listen.host, section.listen.port)
    protocol = f"/countersign/1/{consortium.provisioned.chain_id.hex()[:32]}/bulk"
    peer_id = peer_id_of(consortium.member(victim.name).transport_key)
    noise = RosterNoise(identity, lambda _: True)
    async with connect(stream, noise, peer_id, [protocol], window_bytes=MIB, handshake_seconds=30) as connection:
        yield connection


def large_event(consortium: Processes, number: int) -> bytes:
    """A signed policy of nearly 1 MiB."""
    rules = tuple(
        p.ClassRule(f"class {number}-{rule}", 0, tuple(p.BlockWeight(f"{block:04}", 0) for block in range(4_000)))
        for rule in range(32)
    )
    policy = p.Policy(
        name="large", licences=(), purposes=(), classes=rules, entropy_edges_milli=(),
        memorization_threshold_permille=0, routing_granularities=(), event_granularities=(), author_schemes=(),
        required_metadata=(), least_sketch_rank=0, auditors=(), custody=(), maximum_grant_steps=1,
        maximum_grant_duration_ms=1, global_clipping=False, revocation="drain", momentum="carry", rationale="",
    )  # fmt: skip
    return consortium.sign("council", Kind.POLICY, p.Portions(None, p.SaltedPortion(bytes(32), encode(policy)), None))


def refused_for_good(consortium: Processes, signer: Signer, number: int) -> bytes:
    """A source that is valid at no time, with as long a statement as there may be."""
    claim = p.SourceClaim(
        name="never", content_root=bytes(32), example_count=1, size_bytes=1, licence="CC0-1.0", rights_basis="owner",
        purposes=("research",), content_class="text", valid_from_ms=1, valid_until_ms=1, statement="x" * 8_192,
        overlap_sha256=b"", reserve_below=0,
    )  # fmt: skip
    portions = p.Portions(p.DataPortion(number.to_bytes(32, "big"), (p.DataItem(encode(claim)),)), None, None)
    owner = MemberId(consortium.member("press").id)
    entry = make_entry(consortium.provisioned.chain_id, Kind.SOURCE, owner, portions)
    return pack(sign_entry(entry, owner, Role.DATA_SOURCE, signer), portions)


def is_refused(victim: Victim, event: bytes) -> bool:
    """Whether the node says so."""
    identifier = event_id(decode(unpack(event).entry, Entry, MAX_ENTRY_BYTES)).hex()
    found = victim.consortium.get(victim.name, f"/v1/events/{identifier}")
    return found is not None and found["status"] == "rejected"


def head(method: str, path: str, length: int = 0) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n".encode()


async def ask_and_read_nothing(victim: Victim, request: bytes, seconds: float) -> None:
    """A client that takes no byte of the reply."""
    with trio.socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        await client.connect(victim.api)
        with trio.move_on_after(seconds), suppress(trio.BrokenResourceError):
            await trio.SocketStream(client).send_all(request)
            await trio.sleep_forever()


async def many(victim: Victim, number: int, request: bytes, seconds: float) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(number):
            nursery.start_soon(ask_and_read_nothing, victim, request, seconds)


@pytest.mark.trio
async def test_clients_that_wait_for_an_event_hold_none_of_it(victim: Victim) -> None:
    event = large_event(victim.consortium, 1)
    with victim.grows_at_most(160 * MIB):
        await many(victim, 40, head("POST", "/v1/events?wait=30", len(event)) + event, 4)


@pytest.mark.trio
async def test_clients_that_take_no_reply_hold_a_part_of_what_replies_may(victim: Victim) -> None:
    answer = victim.consortium.post(victim.name, large_event(victim.consortium, 2))
    assert answer.status_code == 202, answer.text
    with victim.grows_at_most(96 * MIB):
        await many(victim, 300, head("GET", f"/v1/events/{answer.json()['id']}/raw"), 2)


@pytest.mark.trio
async def test_member_that_floods_events_that_unfold_holds_its_share_of_the_pool(victim: Victim) -> None:
    events = [large_event(victim.consortium, 10 + number) for number in range(20)]
    with victim.grows_at_most(400 * MIB):
        async with bulk_connection(victim) as connection:
            for event in events:
                payload = pack_gossip([event])
                await connection.send(frame(FrameKind.EVENTS, payload))
            await connection.send(frame(FrameKind.HEARTBEAT, b""))
            await trio.sleep(2)


@pytest.mark.trio
async def test_events_that_were_refused_for_good_hold_their_reasons_alone(victim: Victim) -> None:
    """Ten thousand refusals are remembered: with the events and what these were judged against, 3,000 took 85 MiB."""
    signer = Ed25519SigningKey(victim.consortium.secrets("press").identity_seed)
    before = victim.resident_bytes()
    async with bulk_connection(victim) as connection:
        for start in range(0, 3_000, 500):
            events = [refused_for_good(victim.consortium, signer, number) for number in range(start, start + 500)]
            for payload in map(pack_gossip, in_turns(events)):
                await connection.send(frame(FrameKind.EVENTS, payload))
            with trio.fail_after(60):
                while not await trio.to_thread.run_sync(is_refused, victim, events[-1]):
                    await connection.send(frame(FrameKind.HEARTBEAT, b""))
                    await trio.sleep(0.1)
    assert victim.resident_bytes() - before < 48 * MIB


@pytest.mark.trio
async def test_member_that_asks_without_end_and_reads_nothing_holds_what_it_may(victim: Victim) -> None:
    asked = encode(GetEvents(tuple(number.to_bytes(32, "big") for number in range(4_096))))
    with victim.grows_at_most(64 * MIB):
        for _ in range(3):
            async with bulk_connection(victim) as connection:
                with suppress(*LOST):
                    for number in range(200):
                        payload = REQUEST_NUMBER.pack(number) + asked
                        await connection.send(frame(FrameKind.REQUEST, payload))
            await trio.sleep(1.5)


@pytest.mark.trio
async def test_requests_that_are_never_finished_hold_what_bodies_and_heads_may(victim: Victim) -> None:
    """Bodies that lack their last byte, and heads without an end, on more connections than there are places."""
    limits = HttpLimits()
    body = head("POST", "/v1/events/batch", 8 * MIB) + bytes(8 * MIB - 1)
    unended = b"GET /v1/status HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 15_000
    with victim.grows_at_most(limits.bodies_bytes + limits.connections * 3 * 32 * 1_024 + 32 * MIB):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(many, victim, 30, body, 4)
            nursery.start_soon(many, victim, limits.connections + 50, unended, 4)
