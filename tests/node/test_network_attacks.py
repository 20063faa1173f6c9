"""What strangers and misbehaving members can do to a node over the network: nothing that lasts.

Each way to kill, fill or fool a node built on libp2p's stock host that was found has its test here.
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trio.testing
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils import encode_delim
from network_fixtures import (
    CHAIN,
    FAST,
    LOST,
    Party,
    connected_networks,
    frame,
    make_parties,
    network_of,
    until,
)

from consensus.identifiers import MemberId
from consensus.rejection import Unavailable
from node.lanes import Inbox, Lane, Outbox, Received
from node.link import FRAME_HEADER, FRAMES_A_TURN, FrameKind, Link, LinkKind, Misbehaved, NetworkCounters
from node.network import Network, NetworkLimits
from node.transport import (
    HANDSHAKE_BYTES,
    NEGOTIATION_UNREAD_BYTES,
    Connection,
    HandshakeFailed,
    Identity,
    RosterNoise,
    StrangerRefused,
    TcpConnection,
    _secure,
    connect,
    peer_id_of,
)

VOTES, BULK = f"/countersign/1/{CHAIN}/votes", f"/countersign/1/{CHAIN}/bulk"
WATCHFUL = replace(FAST, silence_seconds=1.0)
STRANGER = Identity.from_seed(b"s" * 32)


@asynccontextmanager
async def attacker(identity: Identity, victim: Party, protocol: str = VOTES) -> AsyncIterator[Connection]:
    """A connection made outside any ``Network``: its owner follows no rule from here on."""
    stream = await trio.open_tcp_stream(*victim.address)
    peer_id = peer_id_of(victim.peer.transport_key)
    noise = RosterNoise(identity, lambda _: True)
    async with connect(
        stream, noise, peer_id, [protocol], window_bytes=1024 * 1024, handshake_seconds=30
    ) as connection:
        yield connection


@asynccontextmanager
async def victim_and_member(limits: NetworkLimits = FAST) -> AsyncIterator[tuple[Network, Party, Identity]]:
    """A node, and the identity of a member that may dial it and whose own node is not running."""
    member, victim = make_parties(2)
    network = network_of(victim, [member, victim], limits=limits)
    async with network.open():
        yield network, victim, Identity.from_seed(member.seed)


async def ended(connection: Connection) -> None:
    """Wait until the other side has closed the connection."""
    with trio.fail_after(30), contextlib.suppress(*LOST):
        while True:
            await connection.receive()


async def flood(connection: Connection, frames: bytes, limit_bytes: int) -> None:
    """Send ``frames`` again and again until the other side closes the connection. Fails at the limit."""
    sent_bytes = 0
    with contextlib.suppress(*LOST):
        while sent_bytes < limit_bytes:
            await connection.send(frames)
            sent_bytes += len(frames)
    assert sent_bytes < limit_bytes


@asynccontextmanager
async def tcp_to(victim: Party) -> AsyncIterator[trio.SocketStream]:
    """A plain TCP connection, closed at the end."""
    async with await trio.open_tcp_stream(*victim.address) as stream:
        yield stream


async def assert_alive(network: Network, victim: Party, member: Identity) -> None:
    """The node still takes a connection and a vote from a member."""
    while True:
        try:
            network.incoming.receive_nowait()
        except trio.WouldBlock:
            break
    await trio.sleep(FAST.penalty_seconds)
    async with attacker(member, victim) as connection:
        await connection.send(frame(FrameKind.VOTES, b"alive"))
        with trio.fail_after(30):
            assert (await network.incoming.receive()).frame == b"alive"


# Identity


@pytest.mark.trio
async def test_stranger_is_refused_by_noise_and_counted() -> None:
    async with victim_and_member() as (network, victim, member):
        with pytest.raises(HandshakeFailed):
            async with attacker(STRANGER, victim):
                raise AssertionError("a stranger was connected")
        await until(lambda: network.counters.refused_strangers == 1)
        assert network.counters.connections == 0
        await assert_alive(network, victim, member)


@pytest.mark.trio
async def test_stranger_that_listens_at_a_members_address_is_refused_by_the_dialler() -> None:
    dialler, absent = make_parties(2)
    impostor = Network(b"i" * 32, absent.peer.address, [dialler.peer], protocol_suffix=CHAIN, limits=FAST)
    network = network_of(dialler, [dialler, absent])
    async with impostor.open(), network.open():
        network.broadcast(Lane.VOTES, b"secret")
        await until(lambda: network.counters.dials_failed >= 2)
        assert not network.connected
        assert not impostor.connected
        assert impostor.counters.frames_received == 0


@pytest.mark.trio
async def test_member_that_should_wait_to_be_dialled_is_refused() -> None:
    victim, later = make_parties(2)
    network = network_of(victim, [victim, later])
    async with network.open():
        with pytest.raises(HandshakeFailed):
            async with attacker(Identity.from_seed(later.seed), victim):
                raise AssertionError("a member in the wrong direction was connected")
        await until(lambda: network.counters.refused_strangers == 1)


@pytest.mark.trio
@pytest.mark.parametrize("protocol", ["/plaintext/2.0.0", "/secio/1.0.0", "/tls/1.0.0"])
async def test_security_without_the_roster_is_not_offered(protocol: str) -> None:
    async with victim_and_member() as (network, victim, member):
        stream = await trio.open_tcp_stream(*victim.address)
        tcp = TcpConnection(stream, is_initiator=True)
        with pytest.raises(Exception, match="not supported"):
            await MultiselectClient().select_one_of([protocol], MultiselectCommunicator(tcp), 2)
        tcp.abort()
        await assert_alive(network, victim, member)


@pytest.mark.trio
async def test_muxer_other_than_yamux_is_not_offered() -> None:
    async with victim_and_member() as (network, victim, member):
        stream = await trio.open_tcp_stream(*victim.address)
        tcp = TcpConnection(stream, is_initiator=True)
        await MultiselectClient().select_one_of(["/noise"], MultiselectCommunicator(tcp), 2)
        noise = RosterNoise(member, lambda _: True)
        session = await noise.secure_outbound(tcp, peer_id_of(victim.peer.transport_key))
        with pytest.raises(Exception, match="not supported"):
            await MultiselectClient().select_one_of(["/mplex/6.7.0"], MultiselectCommunicator(session), 2)
        tcp.abort()
        await assert_alive(network, victim, member)


# Remote kill


@pytest.mark.trio
@pytest.mark.parametrize(
    "first_bytes",
    [
        b"\x03\xff\xfe\n",
        encode_delim(b"/multistream/1.0.0") + b"\x03\xff\xfe\n",
        encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise") + b"\x00\x20" + b"\xff" * 32,
        encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise") + b"\x00\x00" * 50,
        b"\xff" * 20,
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
    ids=["not-utf8", "not-utf8-later", "small-order-key", "empty-noise", "long-varint", "http", "nothing"],
)
async def test_bytes_that_raise_inside_the_handshake_kill_nothing(first_bytes: bytes) -> None:
    async with victim_and_member() as (network, victim, member):
        async with tcp_to(victim) as stream:
            await stream.send_all(first_bytes)
            await stream.send_eof()
            with trio.fail_after(30):
                while await _receive_or_end(stream):
                    pass
        await until(lambda: network.counters.refused_handshakes == 1)
        await assert_alive(network, victim, member)


async def _receive_or_end(stream: trio.SocketStream) -> bytes:
    try:
        return bytes(await stream.receive_some())
    except trio.BrokenResourceError:
        return b""


@pytest.mark.trio
async def test_bytes_that_raise_inside_stream_negotiation_kill_neither_node_nor_connection() -> None:
    async with victim_and_member() as (network, victim, member), attacker(member, victim) as connection:
        for first_bytes in (b"\x03\xff\xfe\n", b"\xff" * 20, encode_delim(b"/multistream/1.0.0") + b"\x00"):
            stream = await connection._stream.conn.open_stream()
            await stream.write(first_bytes)
        await connection.send(frame(FrameKind.VOTES, b"same connection"))
        with trio.fail_after(30):
            assert (await network.incoming.receive()).frame == b"same connection"


@pytest.mark.trio
async def test_stream_that_the_accepting_side_opens_is_reset_and_the_diallers_goes_on() -> None:
    async with victim_and_member() as (network, victim, member), attacker(member, victim) as connection:
        (state,) = network._members.values()
        await until(lambda: LinkKind.URGENT in state.links)
        muxer = state.links[LinkKind.URGENT]._connection._stream.conn
        stream = await muxer.open_stream()
        with trio.fail_after(30), pytest.raises(LOST):
            await muxer.read_stream(stream.stream_id, 1)
        await connection.send(frame(FrameKind.VOTES, b"same connection"))
        with trio.fail_after(30):
            assert (await network.incoming.receive()).frame == b"same connection"


@pytest.mark.trio
async def test_bytes_that_raise_in_the_first_stream_of_a_connection_kill_nothing() -> None:
    async with victim_and_member(replace(FAST, handshake_seconds=3.0)) as (network, victim, member):
        tcp, muxer, nursery_scope = await _muxed(victim, member)
        for _ in range(3):
            stream = await muxer.open_stream()
            await stream.write(b"\x03\xff\xfe\n")
        await until(lambda: network.counters.refused_handshakes == 1)
        tcp.abort()
        nursery_scope.cancel()
        await assert_alive(network, victim, member)


async def _muxed(victim: Party, member: Identity) -> tuple[TcpConnection, object, trio.CancelScope]:
    """A member's yamux connection without any stream yet; its task runs as a system task."""
    stream = await trio.open_tcp_stream(*victim.address)
    tcp = TcpConnection(stream, is_initiator=True)
    peer_id = peer_id_of(victim.peer.transport_key)
    session = await _secure(tcp, RosterNoise(member, lambda _: True), peer_id, 30)
    muxer = Yamux(session, peer_id, is_initiator=True)
    scope = trio.CancelScope()

    async def run() -> None:
        with scope:
            await muxer.start()

    trio.lowlevel.spawn_system_task(run)
    with trio.fail_after(30):
        await muxer.event_started.wait()
    return tcp, muxer, scope


# Exhaustion


@pytest.mark.trio
async def test_more_than_three_hundred_inbound_connections_in_a_lifetime_are_accepted() -> None:
    async with victim_and_member() as (network, victim, member):
        for number in range(250):
            stream = await trio.open_tcp_stream(*victim.address)
            if number % 2:
                await stream.send_all(b"\x03\xff\xfe\n")
            stream.socket.close()
        for _ in range(60):
            async with attacker(member, victim) as connection:
                await connection.send(frame(FrameKind.HEARTBEAT, b""))
        await until(lambda: network.counters.connections == 60)
        await assert_alive(network, victim, member)


@pytest.mark.trio
async def test_silent_strangers_hold_a_bounded_number_of_handshakes() -> None:
    member, victim = make_parties(2)
    network = network_of(victim, [member, victim], limits=replace(FAST, max_handshakes=3))
    async with network.open():
        async with contextlib.AsyncExitStack() as stack:
            silent = [await stack.enter_async_context(tcp_to(victim)) for _ in range(4)]
            while await _receive_or_end(silent[0]):
                pass
            await until(lambda: network.counters.refused_overload == 1)
            await assert_alive(network, victim, Identity.from_seed(member.seed))
            assert network.counters.refused_overload >= 2
        await until(lambda: network.counters.refused_handshakes + network.counters.refused_overload == 4)


@pytest.mark.trio
async def test_strangers_in_every_handshake_keep_no_member_out() -> None:
    member, victim = make_parties(2)
    network = network_of(victim, [member, victim], limits=replace(FAST, max_handshakes=4))

    async def again_and_again() -> None:
        host, port = victim.address
        while True:
            with contextlib.suppress(OSError):
                async with await trio.open_tcp_stream(host, port, local_address="127.0.0.2") as stream:
                    while await _receive_or_end(stream):
                        pass

    async with network.open(), trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(again_and_again)
        await until(lambda: network.counters.refused_overload >= 8)
        await assert_alive(network, victim, Identity.from_seed(member.seed))
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_silent_stranger_holds_a_handshake_for_a_bounded_time() -> None:
    _, victim = parties = make_parties(2)
    network = network_of(victim, parties, limits=replace(FAST, handshake_seconds=0.3))
    async with network.open(), tcp_to(victim):
        await until(lambda: network.counters.refused_handshakes == 1)


@pytest.mark.trio
async def test_endless_handshake_is_cut_off() -> None:
    async with victim_and_member() as (network, victim, member):
        for opening, more in (
            (b"\xff\xff\xff\xff\x0f", bytes(HANDSHAKE_BYTES)),
            (b"", encode_delim(b"/unknown/1.0.0") * 100),
        ):
            async with tcp_to(victim) as stream:
                await stream.send_all(encode_delim(b"/multistream/1.0.0") + opening)
                with trio.fail_after(FAST.handshake_seconds / 2), contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await stream.send_all(more)
        await until(lambda: network.counters.refused_handshakes == 2)
        await assert_alive(network, victim, member)


@pytest.mark.trio
async def test_member_that_announces_an_oversize_frame_is_disconnected() -> None:
    async with victim_and_member() as (network, victim, member):
        for protocol, kind in ((VOTES, FrameKind.VOTES), (BULK, FrameKind.EVENTS), (BULK, FrameKind.REQUEST)):
            async with attacker(member, victim, protocol) as connection:
                await connection.send(FRAME_HEADER.pack(kind, FAST.max_frame_bytes + 9))
                await ended(connection)
            await trio.sleep(FAST.penalty_seconds)
        assert network.counters.closed_oversized == 3
        await assert_alive(network, victim, member)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("protocol", "kind", "payload"),
    [
        (VOTES, FrameKind.EVENTS, b"bulk among votes"),
        (BULK, FrameKind.VOTES, b"vote among bulk"),
        (VOTES, FrameKind.REQUEST, struct.pack(">Q", 1)),
        (BULK, FrameKind.REQUEST, b"short"),
        (BULK, FrameKind.REFUSAL, bytes(100)),
        (BULK, 17, bytes(10)),
        (VOTES, FrameKind.HEARTBEAT, b"not empty"),
    ],
    ids=["event-as-vote", "vote-as-event", "request-as-vote", "no-number", "long-refusal", "unknown", "heartbeat"],
)
async def test_member_that_sends_a_malformed_frame_is_disconnected(protocol: str, kind: int, payload: bytes) -> None:
    async with victim_and_member() as (network, victim, member):
        async with attacker(member, victim, protocol) as connection:
            await connection.send(frame(kind, payload))
            await ended(connection)
        assert network.counters.closed_malformed == 1
        await assert_alive(network, victim, member)


class Wire:
    """A connection on which ``received`` arrive one after the other, then nothing; bytes sent are taken or not."""

    sent_bytes = received_bytes = 0
    window_exceeded = False

    def __init__(
        self, received: Iterable[bytes] = (), *, takes: bool = False, on_abort: Callable[[], None] = lambda: None
    ) -> None:
        self._received = iter(received)
        self._takes = takes
        self.abort = on_abort
        self.sent: list[bytes] = []

    async def receive(self) -> bytes:
        for received in self._received:
            return received
        await trio.sleep_forever()
        return b""

    async def send(self, frames: bytes) -> None:
        self.sent.append(frames)
        await trio.sleep(0)
        if not self._takes:
            await trio.sleep_forever()


def link_over(connection: Wire, kind: LinkKind = LinkKind.URGENT, limits: NetworkLimits = FAST) -> Link:
    return Link(
        member=MemberId(bytes(32)),
        kind=kind,
        connection=connection,  # type: ignore[arg-type]
        outbox=Outbox(kind.lane, 1_000),
        inbox=Inbox([], {kind.lane: 1_000}),
        serve=lambda *_: None,
        limits=limits,
        counters=NetworkCounters(),
    )


@pytest.mark.trio
async def test_heartbeats_that_arrive_together_hold_up_nobody() -> None:
    turns: list[int] = []
    read = 0

    def arriving() -> Iterator[bytes]:
        nonlocal read
        for read in range(1, 101):  # noqa: B007 (read by the other task)
            yield FRAME_HEADER.pack(FrameKind.HEARTBEAT, 0) * (FRAMES_A_TURN // 4)

    async def other() -> None:
        while read < 100:
            turns.append(read)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        nursery.start_soon(link_over(Wire(arriving())).run)
        await until(lambda: read == 100)
        nursery.cancel_scope.cancel()
    assert len(turns) >= 5
    assert max(after - before for before, after in pairwise([*turns, 100])) <= 12


@pytest.mark.trio
async def test_requests_to_a_member_that_takes_no_bytes_do_not_pile_up() -> None:
    link = link_over(wire := Wire(), LinkKind.BULK)

    async def ask() -> None:
        with pytest.raises(Unavailable):
            await link.request(bytes(1_000), 0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        for _ in range(5):
            async with trio.open_nursery() as asking:
                for _ in range(40):
                    asking.start_soon(ask)
        waiting, _ = link._next_batch()
        nursery.cancel_scope.cancel()
    assert len(wire.sent) == 1
    assert waiting == []


@pytest.mark.trio
async def test_request_that_was_sent_counts_until_it_is_answered_though_nobody_waits_any_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Else an honest node could have more requests in service at the member than that lets it."""
    limits = replace(FAST, max_outstanding_requests=3)
    answers, answered = trio.open_memory_channel[bytes](10)

    class Answering(Wire):
        async def receive(self) -> bytes:
            return await answered.receive()

    async with trio.open_nursery() as nursery:
        link = link_over(Answering(takes=True), LinkKind.BULK, limits)
        nursery.start_soon(link.run)
        for _ in range(3):
            with pytest.raises(Unavailable, match="no response"):
                await link.request(b"slow", 0.05)
        with pytest.raises(Unavailable, match="3 requests outstanding"):
            await link.request(b"one more", 0.05)
        await answers.send(frame(FrameKind.RESPONSE, struct.pack(">Q", 2) + b"late"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Unavailable, match="no response"):
            await link.request(b"one more", 0.05)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_penalty_that_begins_while_the_other_connection_is_made_holds_for_that_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    victim, member = make_parties(2)  # the first dials
    network = network_of(victim, [victim, member], limits=replace(FAST, penalty_seconds=60.0))
    greeted = trio.Event()

    @asynccontextmanager
    async def connecting(
        stream: trio.SocketStream, noise: object, peer_id: object, protocols: list[str]
    ) -> AsyncIterator[Wire]:
        async with stream:
            if protocols[0].endswith("bulk"):
                await greeted.wait()
                yield Wire()
            else:
                yield Wire([FRAME_HEADER.pack(17, 0)])

    monkeypatch.setattr(network, "_connect", connecting)
    listeners = await trio.open_tcp_listeners(member.address[1], host=member.address[0])
    async with network.open():
        await until(lambda: network.counters.closed_malformed == 1)
        greeted.set()
        await trio.sleep(0.1)
        assert network.counters.connections == 1
        assert not network.connected
    for listener in listeners:
        await listener.aclose()


@pytest.mark.trio
async def test_member_whose_penalty_begins_while_it_is_greeted_is_counted_and_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with victim_and_member() as (network, victim, member):
        real = network._connect

        @asynccontextmanager
        async def connecting(*arguments: object) -> AsyncIterator[Connection]:
            async with real(*arguments) as connection:  # type: ignore[arg-type]
                monkeypatch.setattr(network, "_may_dial_us", lambda peer_id: False)
                yield connection

        monkeypatch.setattr(network, "_connect", connecting)
        async with attacker(member, victim) as connection:
            await ended(connection)
        await until(lambda: network.counters.refused_strangers == 1)
        assert network.counters.connections == 0


@pytest.mark.trio
async def test_fault_is_told_where_the_end_of_the_connection_cancels_the_link() -> None:
    with trio.CancelScope() as scope:
        link = link_over(Wire([FRAME_HEADER.pack(17, 0)], on_abort=scope.cancel))
        with pytest.raises(Misbehaved, match="kind 17"):
            await link.run()
        return
    raise AssertionError("the fault was lost")  # with what the scope has taken up


@pytest.mark.trio
async def test_member_that_sent_a_malformed_frame_is_not_readmitted_before_its_penalty_is_over() -> None:
    async with victim_and_member(replace(FAST, penalty_seconds=60.0)) as (_, victim, member):
        async with attacker(member, victim) as connection:
            await connection.send(frame(FrameKind.EVENTS, b"bulk among votes"))
            await ended(connection)
        with pytest.raises(HandshakeFailed):
            async with attacker(member, victim):
                raise AssertionError("readmitted without penalty")


@pytest.mark.trio
async def test_answer_to_nothing_that_was_asked_is_ignored() -> None:
    async with victim_and_member() as (network, victim, member), attacker(member, victim, BULK) as connection:
        for kind in (FrameKind.RESPONSE, FrameKind.REFUSAL):
            await connection.send(frame(kind, struct.pack(">Q", 1) + b"unasked"))
        await connection.send(frame(FrameKind.EVENTS, b"event"))
        with trio.fail_after(30):
            assert (await network.incoming.receive()).frame == b"event"


@pytest.mark.trio
@pytest.mark.parametrize("payload", [b"", bytes(100_000)], ids=["empty", "large"])
async def test_member_that_floods_an_unread_inbox_is_cut_off_at_its_budget(payload: bytes) -> None:
    member, victim = make_parties(2)
    budget_bytes = 2_000_000
    limits = replace(FAST, votes_inbox_bytes=budget_bytes, events_inbox_bytes=budget_bytes)
    network = network_of(victim, [member, victim], limits=limits)
    identity = Identity.from_seed(member.seed)
    async with network.open():
        async with attacker(identity, victim) as connection:
            frames = frame(FrameKind.VOTES, payload) * max(1, 100_000 // (len(payload) + 5))
            await flood(connection, frames, 40_000_000)
        assert network.counters.closed_over_budget == 1
        assert 0 < len(network.incoming) * (len(payload) + 128) <= budget_bytes
        await assert_alive(network, victim, identity)


@pytest.mark.trio
async def test_member_that_ignores_flow_control_on_an_unread_stream_is_cut_off() -> None:
    member, victim = make_parties(2)
    window_bytes = 1024 * 1024
    exceeded = []

    async def never_read(stream: trio.SocketStream) -> None:
        noise = RosterNoise(Identity.from_seed(victim.seed), lambda _: True)
        async with connect(stream, noise, None, [VOTES], window_bytes=window_bytes, handshake_seconds=30) as connection:
            await trio.sleep_forever()
        exceeded.append(connection.window_exceeded)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, never_read, victim.address[1])
        async with attacker(Identity.from_seed(member.seed), victim) as connection:
            muxer, stream_id = connection._stream.conn, connection._stream.stream_id
            data_frame = struct.pack("!BBHII", 0, 0, 0, stream_id, 65_000) + bytes(65_000)
            sent_bytes = 0
            with contextlib.suppress(*LOST):
                while sent_bytes < 20 * window_bytes:
                    await muxer._write_frame(data_frame)
                    sent_bytes += 65_000
            assert window_bytes < sent_bytes < 20 * window_bytes
        await until(lambda: exceeded == [True])
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_member_that_opens_streams_without_end_keeps_or_loses_its_own_connection_only() -> None:
    async with victim_and_member() as (network, victim, member):
        async with attacker(member, victim) as connection:
            for _ in range(300):
                await connection._stream.conn._write_frame(
                    struct.pack("!BBHII", 0, 1, 1, connection._stream.conn.next_stream_id, 0)
                )
                connection._stream.conn.next_stream_id += 2
            await connection.send(frame(FrameKind.VOTES, b"after"))
            with trio.fail_after(30):
                assert (await network.incoming.receive()).frame == b"after"
        await assert_alive(network, victim, member)


@pytest.mark.trio
async def test_refused_streams_that_hold_unread_bytes_are_forgotten() -> None:
    """Yamux keeps each for a minute and more, and looks through all of them for every frame."""
    member, victim = make_parties(2)
    muxers = []

    async def hold(stream: trio.SocketStream) -> None:
        noise = RosterNoise(Identity.from_seed(victim.seed), lambda _: True)
        async with connect(stream, noise, None, [VOTES], window_bytes=1024 * 1024, handshake_seconds=30) as connection:
            muxers.append(connection._stream.conn)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, hold, victim.address[1])
        async with attacker(Identity.from_seed(member.seed), victim) as connection:
            last_id = 0
            for number in range(100):
                last_id = 2 * number + 101
                for kind, flags, payload in ((1, 1, b""), (0, 0, b"x")):
                    header = struct.pack("!BBHII", 0, kind, flags, last_id, len(payload))
                    await connection._stream.conn._write_frame(header + payload)
            await connection._stream.conn._write_frame(struct.pack("!BBHII", 0, 2, 1, 0, 7))
            await until(lambda: muxers and len(muxers[0].streams) == 1)
            with trio.fail_after(30):
                await connection._stream.write(b"still there")
                assert await muxers[0].read_stream(connection._stream.stream_id, 100) == b"still there"
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_member_that_agrees_on_no_stream_can_have_little_unread() -> None:
    async with victim_and_member() as (network, victim, member):
        tcp, muxer, scope = await _muxed(victim, member)
        stream = await muxer.open_stream()  # type: ignore[attr-defined]
        announced = struct.pack("!BBHII", 0, 0, 0, stream.stream_id, NEGOTIATION_UNREAD_BYTES + 1)
        await muxer._write_frame(announced)  # type: ignore[attr-defined]
        await until(lambda: network.counters.refused_handshakes == 1, FAST.handshake_seconds / 2)
        tcp.abort()
        scope.cancel()
        await assert_alive(network, victim, member)


@pytest.mark.trio
async def test_member_that_asks_without_end_and_reads_nothing_is_cut_off() -> None:
    member, victim = make_parties(2)
    network = network_of(victim, [member, victim])

    async def large(member: object, payload: bytes) -> bytes:
        return bytes(FAST.max_frame_bytes)

    async with network.open(large):
        identity = Identity.from_seed(member.seed)
        async with attacker(identity, victim, BULK) as connection:
            await flood(connection, frame(FrameKind.REQUEST, struct.pack(">Q", 1)), 1000 * 13)
        assert network.counters.closed_over_budget == 1
        await assert_alive(network, victim, identity)


@pytest.mark.trio
async def test_node_shuts_down_while_a_member_takes_none_of_its_bytes() -> None:
    member, victim = make_parties(2)
    network = network_of(victim, [member, victim])
    with trio.fail_after(30):
        async with network.open():
            tcp, muxer, scope = await _muxed(victim, Identity.from_seed(member.seed))
            stream = await muxer.open_stream()  # type: ignore[attr-defined]
            communicator = MultiselectCommunicator(stream)
            await MultiselectClient().select_one_of([BULK], communicator, 2)
            stream.send_window = 1 << 30
            await stream.send_window_update(1 << 30)
            scope.cancel()  # from here on nobody reads from the socket
            await until(lambda: network.counters.connections == 1)
            for _ in range(60):
                network.broadcast(Lane.EVENTS, bytes(512 * 1024))
            await trio.sleep(0.2)
            assert network.counters.frames_sent < 60
            assert network.counters.events_dropped == 0
            network.broadcast(Lane.EVENTS, bytes(4 * 1024 * 1024))
            for _ in range(10):
                network.broadcast(Lane.EVENTS, bytes(4 * 1024 * 1024))
            assert network.counters.events_dropped > 0
        tcp.abort()


# Presence


@pytest.mark.trio
async def test_member_that_falls_silent_is_disconnected() -> None:
    async with victim_and_member(WATCHFUL) as (network, victim, member):
        async with attacker(member, victim) as connection:
            await until(lambda: network.counters.connections == 1)
            start_time = trio.current_time()
            await ended(connection)
        assert trio.current_time() - start_time + 0.1 >= WATCHFUL.silence_seconds
        assert network.counters.closed_silent == 1


@pytest.mark.trio
async def test_newer_connection_of_a_member_replaces_the_older() -> None:
    async with victim_and_member() as (network, victim, member), trio.open_nursery() as nursery:

        async def hold_first(task_status: trio.TaskStatus[None]) -> None:
            async with attacker(member, victim) as first:
                task_status.started()
                await ended(first)
            replaced.set()

        replaced = trio.Event()
        await nursery.start(hold_first)
        await until(lambda: network.counters.connections == 1)
        async with attacker(member, victim) as second:
            with trio.fail_after(FAST.silence_seconds / 2):
                await replaced.wait()
            await second.send(frame(FrameKind.VOTES, b"second"))
            with trio.fail_after(30):
                assert (await network.incoming.receive()).frame == b"second"


@pytest.mark.trio
async def test_connection_that_trickles_bytes_still_carries_a_full_noise_message() -> None:
    """The stock exact read gives up after a hundred short reads."""
    first, second = make_parties(2)
    network = network_of(second, [first, second])

    async def trickle(inbound: trio.SocketStream) -> None:
        async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
            while received := await _receive_or_end(source):
                for start in range(0, len(received), 250):
                    await target.send_all(received[start : start + 250])
                    await trio.sleep(0)

        async with tcp_to(second) as outbound, trio.open_nursery() as nursery:
            nursery.start_soon(copy, inbound, outbound)
            await copy(outbound, inbound)
            nursery.cancel_scope.cancel()

    async with network.open(), trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, trickle, 0)
        port = listeners[0].socket.getsockname()[1]
        through_proxy = replace(second.peer, address=f"127.0.0.1:{port}")
        dialler = Network(first.seed, first.peer.address, [through_proxy], protocol_suffix=CHAIN, limits=FAST)
        async with dialler.open():
            with trio.fail_after(30):
                while not dialler.connected:
                    await trio.sleep(0.01)
                dialler.broadcast(Lane.EVENTS, bytes(200_000))
                assert (await network.incoming.receive()).frame == bytes(200_000)
        nursery.cancel_scope.cancel()


STOPPABLE = """
import sys, trio
sys.path[:0] = sys.argv[1].split(":")
from network_fixtures import Party, make_parties, network_of
from node.network import Peer
async def main():
    seeds, ports = sys.argv[2].split(","), sys.argv[3].split(",")
    parties = [
        Party(party.seed, Peer(party.member, party.peer.transport_key, "127.0.0.1:" + port))
        for party, port in zip(make_parties(2), ports)
    ]
    async with network_of(parties[0], parties).open():
        print("open", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.trio
@pytest.mark.processes
async def test_stopped_process_is_detected_and_connected_again_when_it_continues() -> None:
    parties = make_parties(2)
    network = network_of(parties[1], parties, limits=WATCHFUL)
    ports = ",".join(str(party.address[1]) for party in parties)
    here = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", STOPPABLE, ":".join([here, *filter(None, sys.path)]), "", ports]
    async with network.open():
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                await until(lambda: network.connected)
                os.kill(process.pid, signal.SIGSTOP)
                await until(lambda: not network.connected)
                assert network.counters.closed_silent >= 1
                os.kill(process.pid, signal.SIGCONT)
                await until(lambda: network.connected)
            finally:
                process.kill()
        await until(lambda: not network.connected)


@pytest.mark.trio
async def test_attacks_leave_the_connection_of_honest_members_untouched() -> None:
    parties = make_parties(2)
    async with connected_networks(parties) as (first, second):
        for _ in range(5):
            with pytest.raises((HandshakeFailed, StrangerRefused)):
                async with attacker(STRANGER, parties[1]):
                    raise AssertionError
            async with tcp_to(parties[1]) as stream:
                await stream.send_all(b"\x03\xff\xfe\n")
                first.send(parties[1].member, Lane.VOTES, b"vote")
                with trio.fail_after(30):
                    assert (await second.incoming.receive()).frame == b"vote"
        assert first.counters.reconnects == second.counters.reconnects == 0


# Others' implementations

STOCK_HOST = """
import sys, trio
from libp2p import new_host
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE, Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX, Yamux
from multiaddr import Multiaddr
from node.transport import Identity, peer_id_of
seed, victim_key, port, protocol = sys.argv[1:]
async def main():
    keys = Identity.from_seed(bytes.fromhex(seed)).key_pair
    noise = Transport(keys, create_new_key_pair().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux})
    victim = peer_id_of(bytes.fromhex(victim_key))
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.connect(PeerInfo(victim, [Multiaddr("/ip4/127.0.0.1/tcp/" + port)]))
        stream = await host.new_stream(victim, [protocol])
        await stream.write(bytes.fromhex("0100000004") + b"ping")
        print((await stream.read(9)).hex())
trio.run(main)
"""


@pytest.mark.trio
@pytest.mark.processes
async def test_stock_libp2p_host_of_a_member_exchanges_votes() -> None:
    member, victim = make_parties(2)
    network = network_of(victim, [member, victim])
    arguments = [member.seed.hex(), victim.peer.transport_key.hex(), str(victim.address[1]), VOTES]
    async with network.open(), trio.open_nursery() as nursery:

        async def answer() -> None:
            received = await network.incoming.receive()
            assert received == Received(member.member, Lane.VOTES, b"ping")
            network.broadcast(Lane.VOTES, b"pong")

        nursery.start_soon(answer)
        with trio.fail_after(60):
            done = await trio.run_process(
                [sys.executable, "-c", STOCK_HOST, *arguments],
                capture_stdout=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert bytes.fromhex(done.stdout.decode()) == frame(FrameKind.VOTES, b"pong")
