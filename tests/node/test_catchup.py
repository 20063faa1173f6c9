"""Catching up from servers that tell the truth and help nobody."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import trio
import trio.testing
from epoch_fixtures import carrier_of, change_event, next_membership
from ledger_fixtures import MemoryLedger
from snapshot_fixtures import Answer, honest, served, write, written

from consensus.block import Body, decode_header
from consensus.certificate import decode_certificate
from consensus.codec import decode, encode
from consensus.event import CheckedEvent, pack_parts
from consensus.identifiers import Digest
from consensus.membership import ED25519_LIST
from consensus.rejection import Reason, Rejected, Unavailable
from node.catchup import CatchUp, serve_blocks
from node.chunk import Chunk, Pending
from node.ledger import Ledger
from node.messages import MAX_ANSWER_BLOCKS, MAX_ANSWER_BYTES, BlockRecord, Blocks, GetBlocks, Request
from node.store import Store
from node.turns import DISAPPOINTED_SECONDS

HEIGHT = 24


@cache
def told() -> MemoryLedger:
    ledger = MemoryLedger()
    for number in range(HEIGHT):
        ledger.seal(ledger.source("data-source-1", f"source {number}"))
    return ledger


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Ledger]:
    ledger = written(told(), tmp_path / "full")
    yield ledger
    ledger.store.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(Store.open(tmp_path / "empty", told().chain_id, create=True), told().genesis)
    yield ledger
    ledger.store.close()


class Server:
    """Serves true ledger blocks, all of them or one at a time."""

    def __init__(self, ledger: Ledger, promises_more: bool) -> None:
        self._truth = honest(ledger)
        self._promises_more = promises_more
        self.drips = False
        self.asked = 0

    async def answer(self, request: Request) -> bytes:
        self.asked += 1
        encoded = await self._truth(request)
        if not self.drips or not isinstance(request, GetBlocks):
            return encoded
        blocks = decode(encoded, Blocks, MAX_ANSWER_BYTES).blocks[:1]
        head_height = HEIGHT if self._promises_more else request.from_height
        certificate = told().certified[request.from_height - 1][1]
        return encode(Blocks(blocks, (), certificate, head_height))


@pytest.mark.trio
@pytest.mark.parametrize("promises_more", [True, False])
async def test_server_that_drips_true_ledger_blocks_sets_no_pace(
    full: Ledger, empty: Ledger, promises_more: bool
) -> None:
    servers = [Server(full, promises_more) for _ in range(2)]
    answers: list[Answer] = [server.answer for server in servers]
    async with served(answers) as network:
        first = network.in_own_order(network.connected)[0]
        dripping = servers[first[0] - 1]
        dripping.drips = True
        catch_up = CatchUp(empty, network, lambda appended: None)
        with trio.fail_after(60):
            await catch_up.from_peer(first)
            await catch_up.reach(HEIGHT)
    assert empty.final.digest == full.final.digest
    assert dripping.asked <= 2


def dripping(ledger: Ledger, asked: list[int]) -> Answer:
    """Serves true ledger blocks one at a time, and claims a log without end."""
    truth = honest(ledger)

    async def answer(request: Request) -> bytes:
        assert isinstance(request, GetBlocks)
        asked.append(request.from_height)
        blocks = decode(await truth(request), Blocks, MAX_ANSWER_BYTES).blocks[:1]
        if not blocks:
            return encode(Blocks((), (), b"", 2**53 - 1))
        return encode(Blocks(blocks, (), told().certified[request.from_height - 1][1], 2**53 - 1))

    return answer


@pytest.mark.trio
async def test_height_that_nobody_has_is_no_goal_by_the_word_of_one_that_drips(
    full: Ledger, empty: Ledger, tmp_path: Path
) -> None:
    """Nobody else has more: for as long as it drips, others would wait who fetch what they need."""
    write(empty, told(), 4)
    behind = written(told(), tmp_path / "behind", 4)
    asked: list[int] = []
    async with served([dripping(full, asked), honest(behind)]) as network:
        liar = next(peer for peer in network.connected if peer[0] == 1)
        assert await CatchUp(empty, network, lambda appended: None).from_peer(liar)
    assert asked == [5]
    behind.store.close()


@pytest.mark.trio
async def test_server_with_nothing_new_for_a_moment_is_asked_again_once_the_log_grew(
    full: Ledger, empty: Ledger
) -> None:
    write(empty, told(), 4)
    truth = honest(full)
    asked: list[int] = []

    async def behind_at_first(request: Request) -> bytes:
        return await truth(request) if asked else encode(Blocks((), (), b"", 4))

    async with served([behind_at_first, dripping(full, asked)]) as network:
        catch_up = CatchUp(empty, network, lambda appended: None)
        liar = next(peer for peer in network.connected if peer[0] == 2)
        catch_up._turns.disappointed(liar)  # the other one is asked first
        await catch_up.reach(HEIGHT)
    assert asked == [5]


@pytest.mark.trio
async def test_what_the_round_appends_during_a_turn_is_no_growth_by_the_peer_asked(full: Ledger, empty: Ledger) -> None:
    write(empty, told(), 4)
    asked = 0

    async def nothing(request: Request) -> bytes:
        nonlocal asked
        asked += 1
        write(empty, told(), 4 + asked)
        return encode(Blocks((), (), b"", 4))

    async with served([nothing]) as network:
        with pytest.raises(Unavailable, match="no peer serves"):
            await CatchUp(empty, network, lambda appended: None).reach(HEIGHT)
    assert asked == 1


@pytest.mark.trio
async def test_whoever_has_a_near_goal_does_not_wait_for_others_with_a_far_one(full: Ledger, empty: Ledger) -> None:
    async with served([dripping(full, [])]) as network, trio.open_nursery() as nursery:
        catch_up = CatchUp(empty, network, lambda appended: None)
        nursery.start_soon(catch_up.reach, HEIGHT)
        await trio.testing.wait_all_tasks_blocked()
        await catch_up.reach(3)
        assert 3 <= empty.final.header.height < HEIGHT
    assert empty.final.header.height == HEIGHT


@pytest.mark.trio
async def test_server_with_one_large_answer_after_another_is_followed_to_its_end(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.catchup.ANSWER_TARGET_BYTES", 4_000)
    server = Server(full, True)
    async with served([server.answer]) as network:
        assert await CatchUp(empty, network, lambda appended: None).from_peer(
            network.in_own_order(network.connected)[0]
        )
    assert empty.final.digest == full.final.digest
    assert server.asked > 3


@pytest.mark.trio
async def test_servers_share_the_time_and_the_whole_log_comes_from_no_slow_one(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them serve true and ample answers; the one that is asked first takes a hundred times as long for each."""
    monkeypatch.setattr("node.catchup.ANSWER_TARGET_BYTES", 1_000)
    monkeypatch.setattr("node.catchup.TURN_SECONDS", 0.05)
    servers = [Server(full, True) for _ in range(3)]

    async def slowly(request: Request) -> bytes:
        await trio.sleep(1)
        return await servers[0].answer(request)

    answers: list[Answer] = [slowly, servers[1].answer, servers[2].answer]
    async with served(answers) as network:
        slow = next(peer for peer in network.connected if peer[0] == 1)
        with trio.fail_after(60):
            assert await CatchUp(empty, network, lambda appended: None).from_peer(slow)
    assert empty.final.digest == full.final.digest
    assert servers[0].asked <= 3
    assert sum(server.asked for server in servers) > 10


@pytest.mark.trio
async def test_link_on_which_every_answer_is_late_catches_up_all_the_same(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.catchup.REQUEST_SECONDS", 0.1)
    truth = honest(full)

    async def slowly(request: Request) -> bytes:
        await trio.sleep(0.5)
        return await truth(request)

    async with served([slowly, slowly]) as network:
        catch_up = CatchUp(empty, network, lambda appended: None)
        for _ in range(3):
            with pytest.raises(Unavailable, match="no peer serves"):
                await catch_up.reach(1)
        await catch_up.reach(HEIGHT)
    assert empty.final.digest == full.final.digest


@pytest.mark.trio
async def test_whoever_waits_for_what_is_being_applied_finds_it_on_the_log(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    applying = trio.Event()

    class Seen(Chunk):
        def check_events(self, record: BlockRecord) -> Iterator[list[CheckedEvent]]:
            applying.set()
            return super().check_events(record)

    monkeypatch.setattr("node.catchup.Chunk", Seen)
    async with served([Server(full, True).answer]) as network, trio.open_nursery() as nursery:
        catch_up = CatchUp(empty, network, lambda appended: None)
        await catch_up.applied()
        nursery.start_soon(catch_up.from_peer, network.in_own_order(network.connected)[0])
        await applying.wait()
        assert empty.final.header.height == 0
        await catch_up.applied()
        assert empty.final.header.height > 0


@pytest.mark.trio
async def test_certificate_that_was_promised_is_kept_though_each_answer_leads_up_to_a_later_one(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By later ones alone nothing would be final for long, and the log so made could not be served to anybody."""
    monkeypatch.setattr("node.catchup.MAX_RECORDS_BYTES", 1)
    monkeypatch.setattr("node.catchup.MAX_ONWARD_HEADERS", 3)

    async def answer(request: Request) -> bytes:
        assert isinstance(request, GetBlocks)
        if request.from_height > HEIGHT:
            return encode(Blocks((), (), b"", HEIGHT))
        blocks = serve_blocks(full, request).blocks
        ahead = told().certified[request.from_height - 1 :][:4]
        return encode(Blocks(blocks, tuple(header for header, _ in ahead[1:]), ahead[-1][1], HEIGHT))

    async with served([answer]) as network:
        assert await CatchUp(empty, network, lambda appended: None).from_peer(min(network.connected))
    assert empty.final.digest == full.final.digest
    assert empty.store.certificate(4)
    for height in range(1, HEIGHT + 1):
        assert serve_blocks(empty, GetBlocks(height)).blocks


def test_more_ledger_blocks_than_one_would_serve_are_refused(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [BlockRecord(header, body, tuple(events)) for header, body, events in map(full.block, range(1, 5))]
    for kept, refused in ((4, False), (3, True), (1, True)):
        limit = sum(record.size_bytes for record in records[:kept])
        monkeypatch.setattr("node.chunk.MAX_RECORDS_BYTES", limit)
        monkeypatch.setattr("node.catchup.MAX_RECORDS_BYTES", limit)
        assert len(serve_blocks(full, GetBlocks(1), 1 << 30).blocks) == kept
        Chunk(empty, serve_blocks(full, GetBlocks(1)), 1, Pending())
        onward = tuple(header for header, _ in told().certified[4:])
        blocks = Blocks(tuple(records), onward, told().certified[-1][1], HEIGHT)
        if refused:
            with pytest.raises(Rejected) as refusal:
                Chunk(empty, blocks, 1, Pending())
            assert refusal.value.reason is Reason.OVERSIZED
    monkeypatch.setattr("node.chunk.MAX_RECORDS_BYTES", 1)
    Chunk(empty, Blocks(tuple(records[:1]), (), told().certified[0][1], HEIGHT), 1, Pending())  # one is always served


def apply_all(chunk: Chunk) -> None:
    for header, record in chunk.lacking():
        chunk.apply(header, record, [event for turn in chunk.check_events(record) for event in turn])


def test_what_lies_applied_under_one_certificate_is_bounded(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.chunk.MAX_PENDING_BYTES", 1_000)
    pending = Pending()
    for first_height, reason in ((1, None), (3, None), (5, Reason.OVERSIZED)):
        header, body, events = full.block(first_height)
        next_header, next_body, next_events = full.block(first_height + 1)
        records = (BlockRecord(header, body, tuple(events)), BlockRecord(next_header, next_body, tuple(next_events)))
        onward = tuple(full.store.header(height) or b"" for height in range(first_height + 2, HEIGHT + 1))
        blocks = Blocks(records, onward, told().certified[-1][1], HEIGHT)
        if reason is not None:
            with pytest.raises(Rejected) as refusal:
                Chunk(empty, blocks, first_height, pending)
            assert refusal.value.reason is reason
            return
        chunk = Chunk(empty, blocks, first_height, pending)
        apply_all(chunk)
        assert chunk.commit() == ()


def test_answer_holds_no_more_ledger_blocks_than_one_is_read_with(tmp_path: Path) -> None:
    """Half a day without events is more empty ledger blocks than one answer may have, in a tenth of its bytes."""
    idle = MemoryLedger({"data-source": 1, "governance": 1, "operator": 1}, certificate_scheme=ED25519_LIST)
    for _ in range(MAX_ANSWER_BLOCKS + 4):
        idle.seal()
    full = written(idle, tmp_path / "idle")
    answer = serve_blocks(full, GetBlocks(1))
    assert decode(encode(answer), Blocks, MAX_ANSWER_BYTES) == answer
    assert len(answer.blocks) == MAX_ANSWER_BLOCKS
    assert len(serve_blocks(full, GetBlocks(MAX_ANSWER_BLOCKS + 1)).blocks) == 4
    full.store.close()


def test_carrier_as_a_ledger_block_is_refused_and_halts_no_node_whose_round_ends_the_epoch_meanwhile(
    tmp_path: Path,
) -> None:
    memory = MemoryLedger()
    membership, _ = next_membership(memory.genesis, memory.committee, memory.secrets, add={"operator-9": "operator"})
    memory.seal(memory.source("data-source-1", "source"))
    event = change_event(memory, membership)
    memory.seal(event)
    carrier = carrier_of(memory)
    (end, _), height = memory.certified[-1], len(memory.certified)
    ending, bodies = (end, carrier[0]), (Body((event.leaf_hash,)), Body(()))
    parts = zip(ending, bodies, ((pack_parts(event.entry_bytes, event.portions_bytes),), ()), strict=True)
    blocks = Blocks(
        tuple(BlockRecord(header, encode(body), events) for header, body, events in parts), (), carrier[1], 9
    )
    headers = [decode_header(header, memory.chain_id) for header in ending]
    for overtaken in (False, True):
        ledger = written(memory, tmp_path / str(overtaken), height - 1)
        chunk = Chunk(ledger, blocks, height, Pending())
        chunk.check_certificate()
        if overtaken:
            for header, body, events in zip(headers, bodies, ((event,), ()), strict=True):
                ledger.verify(ledger.state_of(Digest(header.parent)) or ledger.final, header, body, events)
            ledger.commit(headers, decode_certificate(carrier[1]), ())
        with pytest.raises(Rejected) as refusal:
            apply_all(chunk)
        assert refusal.value.reason is Reason.WRONG_EPOCH
        ledger.store.close()


def promising(full: Ledger, keeps_it: bool) -> Answer:
    """Serves a few ledger blocks at a time, under the certificate of the last one; or the first few and no more."""
    truth = honest(full)

    async def answer(request: Request) -> bytes:
        encoded = await truth(request)
        if not isinstance(request, GetBlocks):
            return encoded
        if request.from_height > 1 and not keeps_it:
            return encode(Blocks((), (), b"", request.from_height - 1))
        held = decode(encoded, Blocks, MAX_ANSWER_BYTES)
        onward = [header for header, _ in told().certified[request.from_height - 1 + len(held.blocks) :]]
        return encode(Blocks(held.blocks, tuple(onward), told().certified[-1][1], HEIGHT))

    return answer


@pytest.mark.trio
@pytest.mark.parametrize("patience_seconds", [60.0, 0.0])
async def test_slow_server_is_asked_for_all_that_one_certificate_makes_final_and_not_without_end(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch, patience_seconds: float
) -> None:
    monkeypatch.setattr("node.catchup.ANSWER_TARGET_BYTES", 4_000)
    monkeypatch.setattr("node.catchup.TURN_SECONDS", 0.0)
    monkeypatch.setattr("node.catchup.PROMISE_SECONDS", patience_seconds)
    async with served([promising(full, True)]) as network:
        peer = network.in_own_order(network.connected)[0]
        grown = await CatchUp(empty, network, lambda appended: None).from_peer(peer)
    assert grown == (patience_seconds > 0)
    assert empty.final.header.height == (HEIGHT if grown else 0)


@pytest.mark.trio
async def test_server_that_goes_back_on_its_promise_is_passed_over_for_some_time(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.catchup.ANSWER_TARGET_BYTES", 4_000)
    async with served([promising(full, False)]) as network:
        peer = network.in_own_order(network.connected)[0]
        catch_up = CatchUp(empty, network, lambda appended: None)
        assert not await catch_up.from_peer(peer)
    assert catch_up._turns.seconds(peer) > DISAPPOINTED_SECONDS


@pytest.mark.trio
async def test_server_that_drips_what_it_promised_is_not_followed_without_end(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.catchup.PROMISE_SECONDS", 0.0)
    asked: list[int] = []

    async def answer(request: Request) -> bytes:
        encoded = await promising(full, True)(request)
        if not isinstance(request, GetBlocks):
            return encoded
        asked.append(request.from_height)
        blocks = decode(encoded, Blocks, MAX_ANSWER_BYTES).blocks[:1]
        onward = tuple(header for header, _ in told().certified[request.from_height :])
        return encode(Blocks(blocks, onward, told().certified[-1][1], HEIGHT))

    async with served([answer]) as network:
        peer = network.in_own_order(network.connected)[0]
        catch_up = CatchUp(empty, network, lambda appended: None)
        assert not await catch_up.from_peer(peer)
    assert len(asked) <= 2  # the second is asked for while the first is applied
    assert catch_up._turns.seconds(peer) > DISAPPOINTED_SECONDS
