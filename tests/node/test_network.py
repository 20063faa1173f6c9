"""What the network does between honest members: frames in order, requests, reconnection, shutdown."""

import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import trio
import trio.testing
from network_fixtures import CHAIN, FAST, connected_networks, make_parties, network_of, until

from consensus.identifiers import MemberId
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected, Unavailable
from node.lanes import FRAME_OVERHEAD_BYTES, VOTES_IN_A_ROW, Inbox, Lane, Outbox, OverBudget, Received
from node.network import Network, Peer

ALICE, BOB = MemberId(b"a" * 32), MemberId(b"b" * 32)


async def doubling(member: MemberId, payload: bytes) -> bytes:
    return payload * 2


# Frames


@pytest.mark.trio
@pytest.mark.parametrize("lane", list(Lane))
async def test_frames_arrive_in_order_and_name_their_sender(lane: Lane) -> None:
    parties = make_parties(2)
    async with connected_networks(parties) as networks:
        frames = [bytes([i % 256]) * (i % 700) for i in range(1000)]
        for sender, receiver in ((0, 1), (1, 0)):
            for frame in frames:
                networks[sender].send(parties[receiver].member, lane, frame)
            with trio.fail_after(30):
                received = [await networks[receiver].incoming.receive() for _ in frames]
            assert received == [Received(parties[sender].member, lane, frame) for frame in frames]
        assert networks[0].counters.frames_sent == networks[0].counters.frames_received == 1000


@pytest.mark.trio
async def test_broadcast_of_four_reaches_every_other_once() -> None:
    parties = make_parties(4)
    async with connected_networks(parties) as networks:
        for network, party in zip(networks, parties, strict=True):
            network.broadcast(Lane.VOTES, b"vote of " + party.member)
        for network, party in zip(networks, parties, strict=True):
            with trio.fail_after(30):
                received = Counter([(await network.incoming.receive()).frame for _ in range(3)])
            assert received == Counter(b"vote of " + each.member for each in parties if each is not party)
            with pytest.raises(trio.WouldBlock):
                network.incoming.receive_nowait()


@pytest.mark.trio
async def test_largest_frame_arrives_and_larger_is_our_own_fault() -> None:
    parties = make_parties(2)
    async with connected_networks(parties) as (first, second):
        largest = bytes(FAST.max_frame_bytes)
        first.send(parties[1].member, Lane.EVENTS, largest)
        with trio.fail_after(30):
            assert (await second.incoming.receive()).frame == largest
        with pytest.raises(InvariantBroken, match="at most"):
            first.send(parties[1].member, Lane.EVENTS, largest + b"!")
        with pytest.raises(InvariantBroken, match="no peer"):
            first.send(parties[0].member, Lane.EVENTS, b"to myself")


@pytest.mark.trio
async def test_vote_overtakes_bulk_that_was_sent_before_it() -> None:
    parties = make_parties(2)
    async with connected_networks(parties) as (first, second):
        for _ in range(24):
            first.send(parties[1].member, Lane.EVENTS, bytes(1024 * 1024))
        first.send(parties[1].member, Lane.VOTES, b"vote")
        events_before = 0
        with trio.fail_after(30):
            while (await second.incoming.receive()).lane is Lane.EVENTS:
                events_before += 1
        assert events_before < 12


@pytest.mark.trio
async def test_frames_sent_before_the_peer_is_there_arrive_when_it_comes() -> None:
    parties = make_parties(2)
    first, second = (network_of(party, parties) for party in parties)
    async with first.open():
        first.broadcast(Lane.VOTES, b"early")
        await until(lambda: first.counters.dials_failed > 0)
        async with second.open():
            with trio.fail_after(30):
                assert (await second.incoming.receive()).frame == b"early"


# Requests


@pytest.mark.trio
async def test_concurrent_requests_get_each_its_own_response() -> None:
    async def later_first(member: MemberId, payload: bytes) -> bytes:
        await trio.sleep(0.02 * (10 - payload[0]) / 10)
        return payload * 1000

    parties = make_parties(2)
    async with connected_networks(parties, later_first) as networks:
        responses: dict[tuple[int, int], bytes] = {}

        async def ask(asker: int, number: int) -> None:
            payload = bytes([number])
            responses[asker, number] = await networks[asker].request(parties[1 - asker].member, payload, 30)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, 0, number)
                nursery.start_soon(ask, 1, number)
        assert responses == {(asker, n): bytes([n]) * 1000 for asker in (0, 1) for n in range(10)}
        assert networks[0].counters.requests_sent == networks[0].counters.requests_served == 10


@pytest.mark.trio
async def test_request_without_response_in_time_is_unavailable_and_harms_nothing() -> None:
    release = trio.Event()

    async def slow_once(member: MemberId, payload: bytes) -> bytes:
        if payload == b"slow":
            await release.wait()
        return payload

    parties = make_parties(2)
    async with connected_networks(parties, slow_once) as (first, second):
        with pytest.raises(Unavailable, match="no response within"):
            await first.request(parties[1].member, b"slow", 0.05)
        release.set()
        await until(lambda: second.counters.requests_served == 1)
        assert await first.request(parties[1].member, b"quick", 30) == b"quick"
        assert first.counters.requests_failed == 1
        assert first.counters.reconnects == 0


@pytest.mark.trio
async def test_handler_that_raises_refuses_the_request_and_serves_the_next() -> None:
    async def failing(member: MemberId, payload: bytes) -> bytes:
        match payload:
            case b"bug":
                raise KeyError("no such height")
            case b"large":
                return bytes(FAST.max_frame_bytes + 1)
            case b"unknown":
                raise Rejected(Reason.NOT_FOUND, "no such block")
        return b"ok"

    parties = make_parties(2)
    async with connected_networks(parties, failing) as (first, second):
        for payload, why in ((b"bug", "KeyError"), (b"large", "oversized"), (b"unknown", "not-found")):
            with pytest.raises(Unavailable, match=f"refused: {why}"):
                await first.request(parties[1].member, payload, 30)
        assert await first.request(parties[1].member, b"", 30) == b"ok"
        assert (second.counters.requests_refused, second.counters.requests_served) == (3, 1)


@pytest.mark.trio
@pytest.mark.parametrize("in_a_task", [False, True])
async def test_broken_invariant_in_a_handler_stops_the_node(in_a_task: bool) -> None:
    async def breaking() -> None:
        raise InvariantBroken("the ledger does not match its head")

    async def broken(member: MemberId, payload: bytes) -> bytes:
        if not in_a_task:
            await breaking()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(breaking)
        return b""

    parties = make_parties(2)
    first, second = (network_of(party, parties) for party in parties)
    with pytest.RaisesGroup(pytest.RaisesExc(InvariantBroken, match="the ledger"), flatten_subgroups=True):
        async with second.open(broken), trio.open_nursery() as nursery:

            async def ask() -> None:
                async with first.open():
                    await until(lambda: first.connected)
                    with pytest.raises(Unavailable):
                        await first.request(parties[1].member, b"", 30)

            nursery.start_soon(ask)
            await trio.sleep(60)


@pytest.mark.trio
async def test_requests_beyond_the_limit_are_refused_as_overloaded() -> None:
    release = trio.Event()

    async def waiting(member: MemberId, payload: bytes) -> bytes:
        await release.wait()
        return b"done"

    parties = make_parties(2)
    limits = replace(FAST, max_requests_in_service=2, max_outstanding_requests=3)
    async with connected_networks(parties, waiting, limits) as (first, _), trio.open_nursery() as nursery:
        done: list[bytes] = []

        async def ask() -> None:
            done.append(await first.request(parties[1].member, b"", 30))

        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await trio.sleep(0.05)
        with pytest.raises(Unavailable, match="refused: overloaded"):
            await first.request(parties[1].member, b"", 30)
        release.set()
        await until(lambda: len(done) == 2)
        assert await first.request(parties[1].member, b"", 30) == b"done"


@pytest.mark.trio
async def test_request_fails_at_once_without_connection_and_when_it_breaks() -> None:
    async def hanging(member: MemberId, payload: bytes) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    parties = make_parties(2)
    first, second = (network_of(party, parties) for party in parties)
    async with first.open():
        with pytest.raises(Unavailable, match="not connected"):
            await first.request(parties[1].member, b"", 60)
        async with trio.open_nursery() as nursery:
            closed = trio.Event()

            async def serve_briefly() -> None:
                async with second.open(hanging):
                    await closed.wait()

            nursery.start_soon(serve_briefly)
            await until(lambda: first.connected)
            nursery.start_soon(lambda: _close_after(closed, 0.05))
            with trio.fail_after(30), pytest.raises(Unavailable, match="connection lost"):
                await first.request(parties[1].member, b"", 60)


async def _close_after(event: trio.Event, seconds: float) -> None:
    await trio.sleep(seconds)
    event.set()


# Coming and going


@pytest.mark.trio
@pytest.mark.parametrize("restarted", [0, 1], ids=["dialler", "listener"])
async def test_restarted_peer_is_connected_again(restarted: int) -> None:
    parties = make_parties(2)
    survivor = network_of(parties[1 - restarted], parties)
    async with survivor.open():
        for round_number in range(2):
            other = network_of(parties[restarted], parties)
            async with other.open():
                await until(lambda other=other: other.connected and survivor.connected)
                survivor.broadcast(Lane.VOTES, b"round %d" % round_number)
                with trio.fail_after(30):
                    assert (await other.incoming.receive()).frame == b"round %d" % round_number
            await until(lambda: not survivor.connected)
        assert survivor.counters.reconnects == 2


@pytest.mark.trio
async def test_leaving_frees_the_port_and_ends_the_incoming_frames() -> None:
    parties = make_parties(2)
    for _ in range(3):
        async with connected_networks(parties) as networks:
            networks[0].broadcast(Lane.EVENTS, bytes(100_000))
        async for received in networks[1].incoming:
            assert received.frame == bytes(100_000)
    with pytest.raises(InvariantBroken, match="opened once"):
        await networks[0].open().__aenter__()


@pytest.mark.trio
async def test_cancellation_in_the_middle_of_traffic_ends_everything_promptly() -> None:
    parties = make_parties(3)
    for _ in range(3):
        with trio.move_on_after(0.3) as scope:
            async with connected_networks(parties, doubling) as networks:
                while True:
                    for network in networks:
                        network.broadcast(Lane.EVENTS, bytes(300_000))
                        network.broadcast(Lane.VOTES, b"vote")
                    await trio.sleep(0.001)
        assert scope.cancelled_caught
        assert trio.current_time() - scope.deadline < FAST.silence_seconds / 2
    async with connected_networks(parties):
        pass


@pytest.mark.trio
async def test_request_cancelled_while_bulk_is_written_does_not_wedge_the_connection() -> None:
    parties = make_parties(2)
    async with connected_networks(parties, doubling) as (first, second), trio.open_nursery() as nursery:

        async def drain() -> None:
            async for _ in second.incoming:
                pass

        nursery.start_soon(drain)
        for turn in range(30):
            first.broadcast(Lane.EVENTS, bytes(512 * 1024))
            with trio.move_on_after(0.0005 * turn):
                await first.request(parties[1].member, bytes(100_000), 30)
        assert await first.request(parties[1].member, b"still there", 30) == b"still there" * 2
        assert first.counters.reconnects == 0
        nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.parametrize("shares_port", [False, True], ids=["plain", "SO_REUSEPORT"])
async def test_port_in_use_is_a_config_error_that_names_the_address(shares_port: bool) -> None:
    party = make_parties(1)[0]
    with socket.socket() as other:
        if shares_port:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(party.address)
        other.listen()
        with pytest.raises(ConfigError, match=party.peer.address):
            async with network_of(party, []).open():
                pass


@pytest.mark.trio
async def test_nodes_of_different_chains_do_not_talk() -> None:
    parties = make_parties(2)
    ours = network_of(parties[0], parties)
    theirs = network_of(parties[1], parties, chain="d1" * 32)
    async with ours.open(), theirs.open():
        ours.broadcast(Lane.VOTES, b"vote")
        await until(lambda: ours.counters.dials_failed >= 2)
        assert not ours.connected
        assert not theirs.connected
        assert theirs.counters.frames_received == 0
        await until(lambda: theirs.counters.refused_handshakes >= 1)


@pytest.mark.trio
async def test_port_zero_takes_a_free_port_and_tells_it() -> None:
    network = Network(bytes(31) + b"x", "127.0.0.1:0", [], protocol_suffix=CHAIN)
    async with network.open():
        assert network.listen_port > 0
        with socket.create_connection(("127.0.0.1", network.listen_port), timeout=30):
            pass


# Configuration


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:70000", "host:+1", "host:٣"])
def test_address_that_cannot_be_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        Network(bytes(31) + b"x", address, [], protocol_suffix=CHAIN)
    peer = replace(make_parties(1)[0].peer, address=address)
    with pytest.raises(ConfigError, match="host:port"):
        Network(bytes(31) + b"x", "[::1]:0", [peer], protocol_suffix=CHAIN)


def test_roster_with_a_key_twice_or_our_own_or_short_is_a_config_error() -> None:
    first, second = make_parties(2)
    same_key = Peer(second.member, first.peer.transport_key, "127.0.0.1:1")
    for peers, match in (
        ([first.peer, same_key], "twice"),
        ([first.peer, first.peer], "twice"),
        ([second.peer], "our own"),
        ([replace(first.peer, transport_key=bytes(31))], "32 bytes"),
    ):
        with pytest.raises(ConfigError, match=match):
            Network(second.seed, "127.0.0.1:0", peers, protocol_suffix=CHAIN)


def test_import_writes_no_log_file_and_leaves_the_root_logger_alone(tmp_path: object) -> None:
    script = (
        "import logging, node.network\n"
        "assert logging.getLogger().handlers == [], logging.getLogger().handlers\n"
        "assert logging.getLogger().level == logging.WARNING\n"
        "assert logging.getLogger('libp2p').handlers == []\n"
        "logging.getLogger('libp2p.stream_muxer.yamux.yamux').error('what a peer did')\n"
    )
    environment = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=str(tmp_path),
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]


# Queues


def test_full_votes_outbox_drops_the_oldest_and_full_events_outbox_refuses_the_newest() -> None:
    capacity_bytes = 3 * (10 + FRAME_OVERHEAD_BYTES)
    frames = [bytes([i]) * 10 for i in range(5)]
    for lane, kept in ((Lane.VOTES, frames[2:]), (Lane.EVENTS, frames[:3])):
        outbox = Outbox(lane, capacity_bytes)
        assert [outbox.put(frame, 0.0) for frame in frames] == [0, 0, 0, 1, 1]
        assert [outbox.take() for _ in range(4)] == [*kept, None]
        assert outbox.put(bytes(capacity_bytes), 0.0) == 1


def test_outbox_drops_what_waited_too_long() -> None:
    outbox = Outbox(Lane.VOTES, 10_000)
    for time in (1.0, 2.0, 3.0):
        outbox.put(b"%d" % time, time)
    assert outbox.drop_before(2.5) == 2
    assert (outbox.take(), len(outbox)) == (b"3", 0)


def test_empty_frames_count_against_the_inbox_budget() -> None:
    inbox = Inbox([ALICE], dict.fromkeys(Lane, 10 * FRAME_OVERHEAD_BYTES))
    for _ in range(10):
        inbox.put(Received(ALICE, Lane.VOTES, b""))
    with pytest.raises(OverBudget):
        inbox.put(Received(ALICE, Lane.VOTES, b""))
    inbox.receive_nowait()
    inbox.put(Received(ALICE, Lane.VOTES, b""))
    assert len(inbox) == 10


def test_inbox_forgets_what_waits_of_one_member_and_nothing_else() -> None:
    inbox = Inbox([MemberId(bytes([number]) * 32) for number in range(2)], dict.fromkeys(Lane, 1_000))
    bad, good = (MemberId(bytes([number]) * 32) for number in range(2))
    for lane in Lane:
        inbox.put(Received(bad, lane, bytes(600)))
        inbox.put(Received(good, lane, b"good"))
    inbox.forget(bad)
    assert [inbox.receive_nowait().member for _ in Lane] == [good, good]
    inbox.put(Received(bad, Lane.VOTES, bytes(600)))
    assert inbox.receive_nowait().member == bad


def test_frames_of_a_member_that_left_the_roster_are_not_received_any_more() -> None:
    """Nobody could answer them: who is no peer can be sent nothing."""
    parties = make_parties(3)
    network = network_of(parties[0], parties)
    for party in parties[1:]:
        network.incoming.put(Received(party.member, Lane.VOTES, b"stalled"))
    network.change_roster(parties[0].seed, [parties[2].peer])
    assert network.incoming.receive_nowait().member == parties[2].member
    with pytest.raises(trio.WouldBlock):
        network.incoming.receive_nowait()


def test_inbox_serves_members_in_turn_so_that_a_flooding_one_starves_nobody() -> None:
    inbox = Inbox([ALICE, BOB], dict.fromkeys(Lane, 1_000_000))
    for number in range(100):
        inbox.put(Received(ALICE, Lane.VOTES, b"%d" % number))
    inbox.put(Received(ALICE, Lane.EVENTS, b"event"))
    inbox.put(Received(BOB, Lane.VOTES, b"bob"))
    order = [inbox.receive_nowait() for _ in range(102)]
    assert order[1] == Received(BOB, Lane.VOTES, b"bob")
    assert order[VOTES_IN_A_ROW].lane is Lane.EVENTS
    alice_votes = [each.frame for each in order if each.member == ALICE and each.lane is Lane.VOTES]
    assert alice_votes == [b"%d" % number for number in range(100)]


@pytest.mark.trio
async def test_inbox_wakes_one_receiver_for_each_frame_and_all_at_the_end() -> None:
    inbox = Inbox([ALICE], dict.fromkeys(Lane, 1_000_000))
    received: list[bytes] = []

    async def receive() -> None:
        async for each in inbox:
            received.append(each.frame)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(5):
            inbox.put(Received(ALICE, Lane.EVENTS, b"%d" % number))
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(received) == [b"%d" % number for number in range(5)]
        await inbox.aclose()


def test_each_node_asks_its_peers_in_an_order_of_its_own() -> None:
    parties = make_parties(8)
    peers = [party.peer.member for party in parties]
    orders = [network_of(party, parties).in_own_order(peers) for party in parties]
    assert all(sorted(order) == sorted(peers) for order in orders)
    assert orders[0] == network_of(parties[0], parties).in_own_order(reversed(peers))
    assert len({order[0] for order in orders}) > 2
