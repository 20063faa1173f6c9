"""Beginning at a snapshot: what a quorum certified is taken from whoever has it, and nothing else from anybody."""

import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import msgspec
import pytest
import trio
from epoch_fixtures import begin_epoch, carrier_of, change_event, next_membership
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import HOSPITAL, MemoryLedger, digest, story
from node_fixtures import Consortium, running
from node_fixtures import until as until_nodes
from rocksdict import AccessType
from snapshot_fixtures import Answer, honest, served, write, written

from consensus.block import Body, Header, decode_header
from consensus.certificate import decode_certificate
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent
from consensus.identifiers import MemberId
from consensus.merkle import Frontier
from consensus.receipt import verify_receipt
from consensus.rejection import InvariantBroken, Reason, Rejected, Unavailable
from consensus.state import SOURCE_TABLE
from consensus.state_map import KEY_BYTES, StateMap
from node import catchup, history, snapshot
from node.catchup import CatchUp, serve_blocks, serve_former
from node.epoch_end import Certified
from node.fsck import Damage, Report, check_data_directory
from node.history import HistoryFill
from node.ledger import Ledger
from node.messages import (
    MAX_ANSWER_BYTES,
    BlockRecord,
    Blocks,
    GetBlocks,
    GetSnapshot,
    GetState,
    Request,
    Snapshot,
    StatePart,
)
from node.network import Network
from node.pace import Pace
from node.repair import set_aside
from node.roster import why_removed
from node.runner import Node
from node.service import EventState
from node.snapshot import Joining, SnapshotDesk, state_part, verified_part
from node.store import Store
from node.store_layout import BY_BLOCK, HEAD_KEY, HISTORY_KEY, History, open_database, u64

FAST = 1 << 30
AT_LEAST = 4


@pytest.fixture(autouse=True)
def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "LEAST_EVENTS", AT_LEAST)
    monkeypatch.setattr(snapshot, "REQUEST_SECONDS", 30.0)
    monkeypatch.setattr(history, "REQUEST_SECONDS", 30.0)
    monkeypatch.setattr(history, "ASKED_AGAIN_SECONDS", 0.05)


@cache
def told_and_carrier() -> tuple[MemoryLedger, tuple[bytes, bytes]]:
    """``told``, and header and certificate of a carrier of the first epoch's last ledger block."""
    ledger = story().ledger
    membership, secrets = next_membership(
        ledger.genesis, ledger.committee, ledger.secrets, add={"operator-9": "operator"}, rotate=[HOSPITAL]
    )
    ledger.seal(change_event(ledger, membership))
    carrier = carrier_of(ledger)
    ledger.enter_epoch(membership, secrets)
    for number in range(4):
        ledger.seal(ledger.source(HOSPITAL, f"later {number}"))
    return ledger, carrier


def told() -> MemoryLedger:
    """A campaign's whole story, then a second epoch with sources of its own."""
    return told_and_carrier()[0]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Ledger]:
    ledger = written(told(), tmp_path / "full")
    yield ledger
    ledger.store.close()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Ledger]:
    ledger = opened(tmp_path)
    yield ledger
    ledger.store.close()


def opened(tmp_path: Path) -> Ledger:
    return Ledger(Store.open(tmp_path / "empty", told().chain_id, create=True), told().genesis)


def catch_up(ledger: Ledger, network: Network) -> CatchUp:
    return CatchUp(ledger, network, lambda appended: None, Joining(ledger, network, lambda: None))


async def join(ledger: Ledger, network: Network) -> None:
    for peer in sorted(network.connected):
        await catch_up(ledger, network).from_peer(peer)


async def fill(ledger: Ledger, network: Network) -> None:
    with trio.fail_after(60):
        await HistoryFill(ledger, network, Pace(FAST)).run()


async def cancel_after(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def rows(directory: Path) -> dict[str, dict[bytes, bytes]]:
    """Everything on disk, by column family."""
    store = Store.open(directory, told().chain_id, create=False)
    try:
        families = ("entries", "portions", "nodes", "headers", "bodies", "state", "lookup", "index")
        return {family: dict(store._page(family, b"", b"", 1 << 20)) for family in families}
    finally:
        store.close()


def checked(directory: Path) -> Report:
    return check_data_directory(directory, told().genesis, lambda stage, done, total: None)


# The state in parts


@settings(max_examples=60, deadline=None)
@given(
    keys=st.sets(st.one_of(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.integers(0, 300).map(
        lambda number: b"\x03" + number.to_bytes(32, "big"))), max_size=40),
    target_bytes=st.integers(100, 4_000),
)  # fmt: skip
def test_parts_cover_the_state_whatever_their_size(keys: set[bytes], target_bytes: int) -> None:
    state = StateMap().set_many({key: key[:5] * 7 for key in keys})
    collected: dict[bytes, bytes] = {}
    start: bytes | None = bytes(KEY_BYTES)
    while start is not None:
        part = decode(encode(state_part(state, start, target_bytes)), StatePart, MAX_ANSWER_BYTES)
        found, start = verified_part(state.root, start, part)
        assert collected.keys().isdisjoint(found)
        collected.update(found)
    assert collected == dict(state.items())


def part_of(ledger: Ledger) -> StatePart:
    return state_part(ledger.final.state, bytes(KEY_BYTES), 2_000)


def without_an_entry(part: StatePart) -> StatePart:
    (prefix, proof), *rest = reversed(part.proofs)
    shorter = msgspec.structs.replace(proof, entries=proof.entries[:-1])
    return StatePart((*reversed(rest), (prefix, shorter)))


def with_another_value(part: StatePart) -> StatePart:
    (prefix, proof), *rest = part.proofs
    key, value = proof.entries[0]
    return StatePart(
        ((prefix, msgspec.structs.replace(proof, entries=((key, value + b"\x00"), *proof.entries[1:]))), *rest)
    )


def with_a_gap(part: StatePart) -> StatePart:
    return StatePart(part.proofs[:1] + part.proofs[2:])


def begun_later(part: StatePart) -> StatePart:
    return StatePart(part.proofs[1:])


def twice_the_same(part: StatePart) -> StatePart:
    return StatePart((part.proofs[0], *part.proofs))


def of_a_shorter_prefix(part: StatePart) -> StatePart:
    (prefix, proof), *rest = part.proofs
    return StatePart(((prefix[:-1], proof), *rest))


LIES_ABOUT_PARTS = [
    without_an_entry,
    with_another_value,
    with_a_gap,
    begun_later,
    twice_the_same,
    of_a_shorter_prefix,
]


@pytest.mark.parametrize("lie", LIES_ABOUT_PARTS)
def test_part_that_is_not_all_there_is_is_refused(full: Ledger, lie: Callable[[StatePart], StatePart]) -> None:
    part = part_of(full)
    assert len(part.proofs) > 2
    verified_part(full.final.state.root, bytes(KEY_BYTES), part)
    with pytest.raises(Rejected) as refusal:
        verified_part(full.final.state.root, bytes(KEY_BYTES), lie(part))
    assert refusal.value.reason is Reason.BAD_PROOF


# Joining and filling up


@pytest.mark.trio
async def test_log_begun_at_a_snapshot_ends_as_the_replayed_one_byte_for_byte(
    full: Ledger, empty: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PART_TARGET_BYTES", 1_000)
    monkeypatch.setattr(catchup, "ANSWER_TARGET_BYTES", 6_000)
    async with served([honest(full), honest(full)]) as network:
        await join(empty, network)
        assert empty.final.digest == full.final.digest
        assert empty.committee.epoch == 1
        assert empty.missing_blocks == full.final.header.height
        await fill(empty, network)
    assert empty.missing_blocks == 0
    empty.store.close()
    full.store.close()
    assert rows(tmp_path / "empty") == rows(tmp_path / "full")
    assert checked(tmp_path / "empty").damages == []
    again = opened(tmp_path)
    assert again.final.digest == full.final.digest
    again.store.close()


@pytest.mark.trio
async def test_joined_log_goes_on_and_proves_new_events_while_it_is_filled_up(
    full: Ledger, empty: Ledger, tmp_path: Path
) -> None:
    behind = written(told(), tmp_path / "behind", len(told().certified) - 2)
    async with served([honest(behind)]) as network:
        await join(empty, network)
    behind.store.close()
    assert empty.final.header.height == len(told().certified) - 2
    async with served([honest(full)]) as network:
        await catch_up(empty, network).reach(len(told().certified))
    assert empty.final.digest == full.final.digest
    trusted = anchor(told().genesis, told().chain_id)
    newest, oldest = told().events[-1], told().events[0]
    assert verify_receipt(trusted, encode(empty.receipt(newest.id))).index == len(told().events) - 1
    for asked in (
        lambda: empty.receipt(oldest.id),
        lambda: empty.event(0),
        lambda: empty.block(1),
        lambda: empty.node(0, 0),
        lambda: empty.index_of(digest("an event that nobody wrote")),
        empty.require_whole,
    ):
        with pytest.raises(Unavailable, match="still fetches the log below ledger block"):
            asked()
    async with served([honest(full)]) as network:
        await fill(empty, network)
    assert verify_receipt(trusted, encode(empty.receipt(oldest.id))).index == 0
    with pytest.raises(Rejected, match="not on the log"):
        empty.index_of(digest("an event that nobody wrote"))


@dataclass(frozen=True)
class Left:
    """A log that a member left at the end of the second epoch, at height ``end``; its ledger blocks went on."""

    memory: MemoryLedger
    former: MemberId
    end: int


@cache
def told_of_a_leaver() -> Left:
    memory = MemoryLedger()
    begin_epoch(memory, add={"operator-9": "operator"})
    former = memory.ids["operator-9"]
    memory.seal(memory.source("data-source-1", "of its time"))
    begin_epoch(memory, remove=["operator-9"])
    end = memory.ledger.header.height
    for number in range(4):
        memory.seal(memory.source("data-source-1", f"after it left {number}"))
    return Left(memory, former, end)


@pytest.mark.trio
async def test_former_member_is_served_nothing_of_later_epochs_while_the_end_of_its_own_is_missing(
    tmp_path: Path,
) -> None:
    left, end = told_of_a_leaver(), told_of_a_leaver().end
    behind = written(left.memory, tmp_path / "behind", end + 2)
    joined = written(left.memory, tmp_path / "joined", 0)
    joined.begin_at(behind.final, behind.links, behind.certificate)  # type: ignore[arg-type]
    write(joined, left.memory)
    size = behind.final.header.log_size
    assert [joined.store.height_of_index(index) for index in range(size + 1)] == [None] * size + [end + 3]
    for asked in (lambda: joined.end_of(1), lambda: serve_former(joined, left.former, GetBlocks(end + 3))):
        with pytest.raises(Unavailable, match="still fetches the log below ledger block"):
            asked()
    assert why_removed(joined, left.former) == "it was removed at the end of epoch 1"
    async with served([honest(behind)]) as network:
        await fill(joined, network)
    assert joined.end_of(1) == end
    assert serve_former(joined, left.former, GetBlocks(end + 3)) == Blocks((), (), b"", end)
    assert why_removed(joined, left.former) == f"it was removed at ledger block {end}, which ended epoch 1"
    for ledger in (behind, joined):
        ledger.store.close()


def test_former_member_is_told_nothing_of_later_epochs_where_the_certificate_of_its_last_ledger_block_is_lost(
    tmp_path: Path,
) -> None:
    left, end = told_of_a_leaver(), told_of_a_leaver().end
    ledger = written(left.memory, tmp_path)
    told_it = serve_former(ledger, left.former, GetBlocks(end))
    assert (len(told_it.blocks), told_it.onward, told_it.head_height) == (1, (), end)
    ledger.store._family("certificates").delete(u64(end))
    assert serve_former(ledger, left.former, GetBlocks(end)) == Blocks((), (), b"", end)
    ledger.store.close()


@pytest.mark.trio
async def test_filling_goes_on_where_a_stopped_node_left_it(
    full: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catchup, "ANSWER_TARGET_BYTES", 2_000)
    truth = honest(full)

    def answering(times: int, enough: trio.Event) -> Answer:
        async def answer(request: Request) -> bytes:
            nonlocal times
            if isinstance(request, GetBlocks):
                times -= 1
                if times < 0:
                    enough.set()
                    raise Unavailable("enough")
            return await truth(request)

        return answer

    missing: list[int] = []
    while not missing or missing[-1]:
        ledger = opened(tmp_path)
        enough = trio.Event()
        async with served([answering(0 if not missing else 2, enough)]) as network:
            await join(ledger, network)
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, enough, nursery.cancel_scope)
                    await HistoryFill(ledger, network, Pace(FAST)).run()
                    nursery.cancel_scope.cancel()
        missing.append(ledger.missing_blocks)
        ledger.store.close()
        assert len(missing) < 20
        report = checked(tmp_path / "empty")
        assert (report.damages, report.missing_blocks) == ([], missing[-1])
    assert missing[0] == full.final.header.height
    assert missing == sorted(set(missing), reverse=True)
    assert len(missing) > 3
    full.store.close()
    assert rows(tmp_path / "empty") == rows(tmp_path / "full")


@pytest.mark.trio
async def test_certificate_that_was_promised_is_kept_below_a_snapshot_too(
    full: Ledger, empty: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ledger block at a time, each under a later certificate: by these alone the log could be served to nobody."""
    truth = honest(full)
    heights = {decode_header(header, told().chain_id).height: header for header, _ in told().certified}
    epochs = {height: decode_header(header, told().chain_id).epoch for height, header in heights.items()}

    async def answer(request: Request) -> bytes:
        if not isinstance(request, GetBlocks):
            return await truth(request)
        held, first = decode(await truth(request), Blocks, MAX_ANSWER_BYTES), request.from_height
        ahead = [height for height in range(first, first + 4) if epochs.get(height) == epochs[first]]
        certificate = told().certified[ahead[-1] - 1][1]
        return encode(
            Blocks(held.blocks[:1], tuple(map(heights.__getitem__, ahead[1:])), certificate, held.head_height)
        )

    async with served([answer]) as network:
        await join(empty, network)
        await fill(empty, network)
    assert empty.missing_blocks == 0
    monkeypatch.setattr(catchup, "MAX_RECORDS_BYTES", 1)
    monkeypatch.setattr(catchup, "MAX_ONWARD_HEADERS", 3)
    for height in heights:
        assert serve_blocks(empty, GetBlocks(height)).blocks, height
    empty.store.close()
    assert checked(tmp_path / "empty").damages == []


@pytest.mark.trio
@pytest.mark.parametrize("memory_bytes", [1 << 20, 1])
async def test_peers_keep_each_others_promises_below_a_snapshot(
    full: Ledger, empty: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    """What one leads up to, others go beyond with certificates of their own; what takes too much memory is dropped."""
    monkeypatch.setattr(history, "MAX_PENDING_BYTES", memory_bytes)
    truth = honest(full)
    headers = [decode_header(header, told().chain_id) for header, _ in told().certified]

    def promising(ahead: int, blocks: int) -> Answer:
        async def answer(request: Request) -> bytes:
            if not isinstance(request, GetBlocks):
                return await truth(request)
            first = request.from_height
            held = decode(await truth(request), Blocks, MAX_ANSWER_BYTES)
            last = first + min(blocks, len(held.blocks)) - 1
            end = max(
                height
                for height in range(last, last + ahead + 1)
                if height <= len(headers) and headers[height - 1].epoch == headers[first - 1].epoch
            )
            onward = tuple(header for header, _ in told().certified[last:end])
            records = held.blocks[: last - first + 1]
            return encode(Blocks(records, onward, told().certified[end - 1][1], held.head_height))

        return answer

    others = [promising(1, 2), promising(3, 5)] if memory_bytes > 1 else [truth]
    async with served([promising(7, 1), *others]) as network:
        await join(empty, network)
        await fill(empty, network)
    assert empty.missing_blocks == 0
    empty.store.close()
    assert checked(tmp_path / "empty").damages == []


@pytest.mark.trio
async def test_short_log_is_replayed_and_so_is_any_without_that_wish(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "LEAST_EVENTS", 10_000)
    async with served([honest(full)]) as network:
        await join(empty, network)
    assert empty.final.digest == full.final.digest
    assert empty.store.history() is None


@pytest.mark.trio
async def test_state_that_nobody_keeps_any_more_leaves_the_log_as_it_was(full: Ledger, empty: Ledger) -> None:
    truth = honest(full)

    async def forgetful(request: Request) -> bytes:
        if isinstance(request, GetState):
            raise Rejected(Reason.NOT_FOUND, "no longer")
        return await truth(request)

    async with served([forgetful]) as network:
        with pytest.raises(Unavailable, match="no peer gives the whole state"):
            await catch_up(empty, network).reach(1)
    assert empty.final.header.height == 0


@pytest.mark.trio
async def test_log_that_begins_while_a_snapshot_is_fetched_is_replayed(full: Ledger, empty: Ledger) -> None:
    """The round goes on meanwhile, and may finalize the first ledger block here."""
    truth = honest(full)

    async def slow(request: Request) -> bytes:
        if isinstance(request, GetState) and empty.final.header.height == 0:
            encoded, certificate = told().certified[0]
            header = decode_header(encoded, told().chain_id)
            events = tuple(told().events[: header.log_size])
            empty.verify(empty.final, header, Body(tuple(event.leaf_hash for event in events)), events)
            empty.commit([header], decode_certificate(certificate), ())
        return await truth(request)

    async with served([slow]) as network:
        await join(empty, network)
    assert empty.final.digest == full.final.digest
    assert empty.store.history() is None


@pytest.mark.trio
async def test_peer_that_fails_for_a_moment_costs_no_snapshot(full: Ledger, empty: Ledger) -> None:
    truth = honest(full)
    failures = 1

    async def flaky(request: Request) -> bytes:
        nonlocal failures
        if isinstance(request, GetSnapshot) and failures:
            failures -= 1
            raise Unavailable("in a moment")
        return await truth(request)

    async with served([flaky]) as network:
        await join(empty, network)
        assert empty.final.header.height == 0
        await join(empty, network)
    assert empty.store.history() is not None


def says_nothing(full: Ledger) -> Answer:
    truth = honest(full)

    async def offers_nothing(request: Request) -> bytes:
        return encode(Snapshot((), b"", b"", b"")) if isinstance(request, GetSnapshot) else await truth(request)

    return offers_nothing


@pytest.mark.trio
async def test_one_peer_that_offers_nothing_does_not_decide_while_more_are_awaited(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served([says_nothing(full)], away=2) as network:
        (peer,) = network.connected
        fetching = catch_up(empty, network)
        assert not await fetching.from_peer(peer)
        assert empty.final.header.height == 0
        assert fetching.undecided
        monkeypatch.setattr(snapshot, "SETTLE_SECONDS", 0.0)
        assert await fetching.from_peer(peer)
        assert not fetching.undecided
    assert empty.final.digest == full.final.digest
    assert empty.store.history() is None


@pytest.mark.trio
async def test_half_of_the_peers_that_offer_nothing_decide_at_once(full: Ledger, empty: Ledger) -> None:
    async with served([says_nothing(full), says_nothing(full)], away=2) as network:
        assert await catch_up(empty, network).from_peer(min(network.connected))
    assert empty.final.digest == full.final.digest
    assert empty.store.history() is None


@pytest.mark.trio
async def test_node_whose_peers_cannot_be_reached_does_not_take_them_to_offer_nothing(
    full: Ledger, empty: Ledger
) -> None:
    async with served([honest(full)]) as network:
        fetching = catch_up(empty, network)
        (peer,) = network.connected
    for _ in range(snapshot.PATIENCE + 1):
        assert not await fetching.from_peer(peer)
    assert fetching.undecided


@pytest.mark.trio
async def test_server_that_never_says_what_it_offers_does_not_keep_a_short_log_from_being_replayed(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "LEAST_EVENTS", 10_000)
    truth = honest(full)

    async def mute(request: Request) -> bytes:
        raise Unavailable("never")

    async with served([mute, truth]) as network:
        fetching = catch_up(empty, network)
        for _ in range(snapshot.PATIENCE):
            for peer in sorted(network.connected):
                await fetching.from_peer(peer)
    assert empty.final.digest == full.final.digest
    assert empty.store.history() is None


@pytest.mark.trio
async def test_server_that_offers_the_most_and_withholds_its_state_is_passed_over(
    full: Ledger, empty: Ledger, tmp_path: Path
) -> None:
    truth = honest(full)
    behind = written(told(), tmp_path / "behind", len(told().certified) - 2)

    async def withholding(request: Request) -> bytes:
        if isinstance(request, GetState):
            raise Rejected(Reason.NOT_FOUND, "no")
        return await truth(request)

    async with served([withholding, honest(behind)]) as network:
        await catch_up(empty, network).reach(1)
    assert empty.final.header.height >= behind.final.header.height
    assert empty.store.history() is not None
    behind.store.close()


@pytest.mark.trio
async def test_slow_server_is_asked_for_its_share_of_the_time_and_no_more(
    full: Ledger, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """True, full answers, each a hundred times as late as the other server's: for the state, and for the log below."""
    monkeypatch.setattr(snapshot, "PART_TARGET_BYTES", 1_000)
    monkeypatch.setattr(catchup, "ANSWER_TARGET_BYTES", 2_000)
    truth = honest(full)
    asked = {"slow": 0, "quick": 0}

    async def slowly(request: Request) -> bytes:
        if isinstance(request, GetState | GetBlocks):
            asked["slow"] += 1
            await trio.sleep(2)
        return await truth(request)

    async def quickly(request: Request) -> bytes:
        asked["quick"] += isinstance(request, GetState | GetBlocks)
        return await truth(request)

    async with served([slowly, quickly]) as network:
        with trio.fail_after(60):
            await catch_up(empty, network).reach(1)
            assert asked["slow"] <= 3
            assert asked["quick"] > 10
            await fill(empty, network)
    assert empty.missing_blocks == 0
    assert asked["slow"] <= 6


def one_key_at_a_time(state: StateMap) -> Callable[[GetState], bytes]:
    """True parts that bring a node from one key to its neighbour."""
    return lambda request: encode(StatePart(((request.start, state.prove_prefix(request.start)),)))


@pytest.mark.trio
async def test_server_of_one_key_at_a_time_makes_an_honest_one_beside_it_serve_no_more(
    full: Ledger, empty: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PART_TARGET_BYTES", 1_000)
    truth, narrow = honest(full), one_key_at_a_time(full.final.state)
    asked = {"narrow": 0, "honest": 0}

    async def narrowing(request: Request) -> bytes:
        if not isinstance(request, GetState):
            return await truth(request)
        asked["narrow"] += 1
        return narrow(request)

    async def counting(request: Request) -> bytes:
        asked["honest"] += isinstance(request, GetState)
        return await truth(request)

    async with served([counting]) as network:
        await catch_up(empty, network).reach(1)
    alone, asked["honest"] = asked["honest"], 0
    assert alone > 10
    empty.store.close()
    shutil.rmtree(tmp_path / "empty")
    again = opened(tmp_path)
    async with served([narrowing, counting]) as network:
        with trio.fail_after(60):
            await catch_up(again, network).reach(1)
    assert again.store.history() is not None
    assert asked["honest"] <= alone + 1
    assert asked["narrow"] > 0
    again.store.close()


@pytest.mark.trio
async def test_server_that_alone_has_a_state_and_gives_one_key_at_a_time_is_passed_over(
    full: Ledger, empty: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PATIENCE_SECONDS", 3.0)
    truth, narrow = honest(full), one_key_at_a_time(full.final.state)
    behind = written(told(), tmp_path / "behind", len(told().certified) - 2)

    async def narrowing(request: Request) -> bytes:
        return narrow(request) if isinstance(request, GetState) else await truth(request)

    async with served([narrowing, honest(behind)]) as network:
        with trio.fail_after(60):
            await catch_up(empty, network).reach(1)
    assert empty.store.history() is not None
    assert empty.final.header.height >= behind.final.header.height
    behind.store.close()


@pytest.mark.trio
async def test_server_that_is_overloaded_for_a_moment_is_asked_again(full: Ledger, empty: Ledger) -> None:
    truth = honest(full)
    asked = 0

    async def busy(request: Request) -> bytes:
        nonlocal asked
        asked += isinstance(request, GetState)
        if asked == 1 and isinstance(request, GetState):
            raise Rejected(Reason.OVERLOADED, "later")
        return await truth(request)

    async with served([busy]) as network:
        assert await Joining(empty, network, lambda: None).run()
    assert asked > 1


@settings(max_examples=40, deadline=None)
@given(
    keys=st.sets(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=60),
    start=st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
)
def test_part_that_begins_between_any_two_keys_goes_on_as_widely_as_any(keys: set[bytes], start: bytes) -> None:
    state = StateMap().set_many({key: key[:5] * 7 for key in keys})
    found, after = verified_part(state.root, start, state_part(state, start))
    assert after is None
    assert found == dict(state.items())


def ending_height(memory: MemoryLedger) -> int:
    """The ledger block that ends the first epoch."""
    terminal = next(number for number, event in enumerate(memory.events) if event.entry.kind.value == "membership")
    return next(
        number
        for number, (header, _) in enumerate(memory.certified, start=1)
        if decode_header(header, memory.chain_id).log_size > terminal
    )


@pytest.mark.trio
async def test_server_that_offers_the_end_of_an_epoch_all_the_same_stalls_nobody(empty: Ledger, tmp_path: Path) -> None:
    height = ending_height(told())
    ending, behind = written(told(), tmp_path / "ending", height), written(told(), tmp_path / "behind", height - 2)
    header, certificate = told().certified[height - 1]
    truth = honest(ending)

    async def crooked(request: Request) -> bytes:
        if isinstance(request, GetSnapshot):
            return encode(Snapshot((), header, certificate, ending.final.frontier.to_bytes()))
        if isinstance(request, GetState) and request.state_root == ending.final.state.root:
            return encode(state_part(ending.final.state, request.start))
        return await truth(request)

    async with served([crooked, honest(behind)]) as network:
        await catch_up(empty, network).reach(1)
    assert empty.store.history() is not None
    for ledger in (ending, behind):
        ledger.store.close()


def test_last_ledger_block_of_an_epoch_is_not_offered(tmp_path: Path) -> None:
    ledger = written(told(), tmp_path / "ending", ending_height(told()))
    assert ledger.final.is_terminal
    assert SnapshotDesk(ledger).offer(GetSnapshot(0)) == Snapshot((), b"", b"", b"")
    ledger.store.close()


# Lies

Lie = Callable[[bytes, Request], Awaitable[bytes]]


def about_snapshots(change: Callable[[Snapshot], Snapshot]) -> Lie:
    async def lie(answer: bytes, request: Request) -> bytes:
        return (
            encode(change(decode(answer, Snapshot, MAX_ANSWER_BYTES))) if isinstance(request, GetSnapshot) else answer
        )

    return lie


def about_states(change: Callable[[StatePart], StatePart]) -> Lie:
    async def lie(answer: bytes, request: Request) -> bytes:
        return encode(change(decode(answer, StatePart, MAX_ANSWER_BYTES))) if isinstance(request, GetState) else answer

    return lie


def about_blocks(change: Callable[[Blocks], Blocks]) -> Lie:
    async def lie(answer: bytes, request: Request) -> bytes:
        return encode(change(decode(answer, Blocks, MAX_ANSWER_BYTES))) if isinstance(request, GetBlocks) else answer

    return lie


async def noise(answer: bytes, request: Request) -> bytes:
    return b"\x00" * 1_000


def of_another_chain(held: Snapshot) -> Snapshot:
    other = story(seed=9).ledger
    return Snapshot((), other.header, other.certificate, other.ledger.frontier.to_bytes())


def with_other_portions(held: Blocks) -> Blocks:
    """A ledger block's events with their portions of one another: hashes of entries hold, commitments do not."""
    records = []
    for record in held.blocks:
        events = tuple(event[:-1] + bytes([event[-1] ^ 1]) for event in record.events)
        records.append(msgspec.structs.replace(record, events=events))
    return msgspec.structs.replace(held, blocks=tuple(records))


def certified_in_the_next_epoch(held: Blocks) -> Blocks:
    """The end of an epoch, shown to be final by the members of the next one: so it is, and no link says it."""
    end = ending_height(told())
    terminal, (onward, certificate) = told().certified[end - 1][0], told().certified[end]
    if not held.blocks or terminal not in [record.header for record in held.blocks]:
        return held
    return msgspec.structs.replace(held, onward=(onward,), certificate=certificate)


def with_a_carrier(held: Blocks) -> Blocks:
    """The end of an epoch and, as the ledger block after it, what only shows that end to be final."""
    header, certificate = told_and_carrier()[1]
    height = decode_header(header, told().chain_id).height
    if not held.blocks or decode_header(held.blocks[-1].header, told().chain_id).height != height - 1:
        return held
    record = BlockRecord(header, encode(Body(())), ())
    return msgspec.structs.replace(held, blocks=(*held.blocks, record), certificate=certificate)


LIES: dict[str, Lie] = {
    "noise": noise,
    "no links": about_snapshots(lambda held: msgspec.structs.replace(held, links=())),
    "links twice": about_snapshots(lambda held: msgspec.structs.replace(held, links=held.links * 2)),
    "links without end": about_snapshots(lambda held: Snapshot(held.links, b"", b"", b"")),
    "no certificate": about_snapshots(lambda held: msgspec.structs.replace(held, certificate=b"")),
    "header without its certificate": about_snapshots(
        lambda held: msgspec.structs.replace(held, header=told().certified[-3][0])
    ),
    "another frontier": about_snapshots(
        lambda held: msgspec.structs.replace(held, frontier=Frontier().append([digest("leaf")]).to_bytes())
    ),
    "broken frontier": about_snapshots(lambda held: msgspec.structs.replace(held, frontier=held.frontier[:-1])),
    "another chain": about_snapshots(of_another_chain),
    **{lie.__name__: about_states(lie) for lie in LIES_ABOUT_PARTS},
    "no blocks": about_blocks(lambda held: Blocks((), (), b"", held.head_height)),
    "blocks of another height": about_blocks(lambda held: msgspec.structs.replace(held, blocks=held.blocks[1:])),
    "blocks with a gap": about_blocks(
        lambda held: msgspec.structs.replace(held, blocks=held.blocks[:1] + held.blocks[2:])
    ),
    "blocks cut short": about_blocks(lambda held: msgspec.structs.replace(held, blocks=held.blocks[:-1])),
    "no events": about_blocks(
        lambda held: msgspec.structs.replace(
            held, blocks=tuple(msgspec.structs.replace(record, events=()) for record in held.blocks)
        )
    ),
    "other portions": about_blocks(with_other_portions),
    "onward into the next epoch": about_blocks(certified_in_the_next_epoch),
    "carrier as a ledger block": about_blocks(with_a_carrier),
    "onward to nowhere": about_blocks(
        lambda held: msgspec.structs.replace(held, onward=(held.blocks[0].header,) * 3) if held.blocks else held
    ),
}


@pytest.mark.trio
@pytest.mark.parametrize("name", LIES)
async def test_lying_server_beside_an_honest_one_changes_nothing(
    full: Ledger, empty: Ledger, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PART_TARGET_BYTES", 1_000)
    monkeypatch.setattr(catchup, "ANSWER_TARGET_BYTES", 6_000)
    truth = honest(full)

    async def liar(request: Request) -> bytes:
        return await LIES[name](await truth(request), request)

    async with served([liar, truth]) as network:
        await join(empty, network)
        await fill(empty, network)
    empty.store.close()
    full.store.close()
    assert rows(tmp_path / "empty") == rows(tmp_path / "full")


@pytest.mark.trio
@pytest.mark.parametrize("name", LIES)
async def test_lying_server_alone_gets_nothing_onto_the_disk_that_a_quorum_did_not_certify(
    full: Ledger, empty: Ledger, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "PART_TARGET_BYTES", 1_000)
    truth = honest(full)

    async def liar(request: Request) -> bytes:
        return await LIES[name](await truth(request), request)

    async with served([liar]) as network:
        await join(empty, network)
        with trio.move_on_after(0.3):
            await HistoryFill(empty, network, Pace(FAST)).run()
    known = {0: None} | {height: header for height, (header, _) in enumerate(told().certified, start=1)}
    for height in range(1, len(told().certified) + 1):
        assert empty.store.header(height) in (None, known[height])
        held = empty.store.certificate(height)
        if held is not None:  # by the members of its own epoch, or it proves nothing
            epoch = decode_header(known[height] or b"", told().chain_id).epoch
            assert Certified.decode(held).certificate.epoch == epoch
    for index, event in enumerate(told().events):
        assert empty.store.entry(index) in (None, event.entry_bytes)
        assert empty.store.portions(index) in (None, event.portions_bytes)
    assert empty.final.state.root == empty.final.header.state_root


# Whole nodes


@pytest.mark.trio
async def test_verifying_node_begins_at_a_snapshot_among_running_voters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "REQUEST_SECONDS", 10.0)
    consortium = Consortium(tmp_path)
    names = ("data-source-1", "data-source-2", "governance-1", "operator-1")
    voters = [consortium.node(name) for name in names]
    async with running(voters):
        for number in range(3 * AT_LEAST):
            event = voters[0].submit(consortium.source_event("data-source-1", number))
            assert (await voters[0].wait_final(event.id, 20)).state is EventState.FINAL
    # Begun anew, they no longer hold for it all that they voted on: a log so short would be replayed from that alone.
    voters = [consortium.node(name) for name in names]
    async with running(voters):
        joining = consortium.node("verifier-1", sync="snapshot")
        async with running([joining]):
            await until_nodes(
                lambda: joining.snapshot().log_size == 3 * AT_LEAST and not joining.snapshot().log_missing
            )
            late = voters[0].submit(consortium.source_event("data-source-1", 1_000))
            await until_nodes(lambda: joining.status_of(late.id).state is EventState.FINAL)
            await until_nodes(lambda: joining.snapshot().head == voters[0].snapshot().head)
    assert joined_at_snapshot(tmp_path / "verifier-1", joining)


def joined_at_snapshot(directory: Path, node: Node) -> bool:
    """Whether the log's early ledger blocks have no votes kept: none come with a snapshot's history."""
    with Store.open(directory, node.ledger.genesis.chain_id, create=False) as store:
        return not any(store.votes(height) for height in range(1, AT_LEAST))


@pytest.mark.trio
async def test_voter_with_an_empty_disk_begins_at_a_snapshot_and_votes(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    others = [consortium.node(f"{name}-1") for name in ("data-source", "governance")] + [
        consortium.node("data-source-2")
    ]
    operator = consortium.node("operator-1")
    async with running(others):
        async with running([operator]):
            for number in range(3 * AT_LEAST):
                event = others[0].submit(consortium.source_event("data-source-1", number))
                assert (await others[0].wait_final(event.id, 20)).state is EventState.FINAL
        shutil.rmtree(tmp_path / "operator-1" / "rocksdb")
        again = consortium.node("operator-1", sync="snapshot")
        async with running([again]):
            needed = others[0].submit(consortium.source_event("data-source-1", 1_000))
            assert (await others[0].wait_final(needed.id, 20)).state is EventState.FINAL
            assert again.snapshot().voting


# What can be checked while the log is filled up


ONLY_PEER = MemberId(bytes(32))


def only_peer(ledger: Ledger, target_bytes: int | None = None) -> Network:
    """A network with one peer that serves this log."""

    class Peer:
        connected = frozenset({ONLY_PEER})

        async def request(self, member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
            return encode(serve_blocks(ledger, decode(payload, GetBlocks, MAX_ANSWER_BYTES), target_bytes))

    return cast(Network, Peer())


@pytest.mark.trio
async def test_filling_up_with_empty_ledger_blocks_lets_others_run_after_each_and_counts_the_checking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, checking_seconds = MemoryLedger(), 0.2
    for _ in range(100):
        idle.seal()
    full = written(idle, tmp_path / "idle")
    ledger = Ledger(Store.open(tmp_path / "empty", idle.chain_id, create=True), idle.genesis)
    ledger.begin_at(full.final, full.links, decode_certificate(idle.certificate))
    filling = HistoryFill(ledger, only_peer(full), Pace(FAST))
    checked_chain = filling._checked_chain

    def slowly(answer: Blocks, history: History) -> tuple[list[Header], Certified]:
        time.sleep(checking_seconds)
        return checked_chain(answer, history)

    turns, begun = 0, False
    checked_events = filling._checked_events

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += begun

    async def checks(header: Header, record: BlockRecord) -> tuple[Body, list[CheckedEvent]]:
        nonlocal begun
        begun = True
        return await checked_events(header, record)

    monkeypatch.setattr(filling, "_checked_chain", slowly)
    monkeypatch.setattr(filling, "_checked_events", checks)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await filling.run()
        nursery.cancel_scope.cancel()
    assert turns > 90
    assert filling._turns.seconds(ONLY_PEER) > checking_seconds
    for held in (full, ledger):
        held.store.close()


@dataclass(frozen=True)
class Partial:
    """A log that began at a snapshot two ledger blocks before its head, and is filled up in part."""

    directory: Path
    base: Header
    history: History

    def change(self, family: str, key: bytes, changed: Callable[[bytes], bytes]) -> None:
        """Change a value under the store, or put one."""
        database = open_database(self.directory / "rocksdb", False, AccessType.read_write())
        values = database.families[family]
        values.put(key, changed(values.get(key) or b""))
        del values
        database.families.clear()
        database.handles.clear()
        database.root.close()


@pytest.fixture(scope="module")
def partly_filled(tmp_path_factory: pytest.TempPathFactory) -> Partial:
    folder = tmp_path_factory.mktemp("partial")
    behind, ledger = written(told(), folder / "behind", len(told().certified) - 2), opened(folder)
    ledger.begin_at(behind.final, behind.links, behind.certificate)
    write(ledger, told())

    async def fill_once() -> None:
        history = ledger.store.history()
        assert history is not None
        await HistoryFill(ledger, only_peer(behind, 4_000), Pace(FAST))._fill_from(ONLY_PEER, history)

    trio.run(fill_once)
    left = ledger.store.history()
    assert left is not None
    assert 3 < left.next_height < left.base_height - 3
    ledger.store.close()
    behind.store.close()
    return Partial(folder / "empty", behind.final.header, left)


@pytest.fixture
def partial(partly_filled: Partial, tmp_path: Path) -> Partial:
    """A copy, to be damaged."""
    shutil.copytree(partly_filled.directory, tmp_path / "copy")
    return replace(partly_filled, directory=tmp_path / "copy")


def test_log_that_is_not_whole_is_sound_and_what_it_lacks_is_counted(partial: Partial) -> None:
    report = checked(partial.directory)
    missing = partial.history.base_height - partial.history.next_height + 1
    assert (report.damages, report.missing_blocks) == ([], missing)
    assert report.height == len(told().certified)


def flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


def strange(_: bytes) -> bytes:
    return b"strange"


@pytest.mark.trio
@pytest.mark.parametrize("damage", [strange, flipped, lambda value: value[:-1]])
async def test_damaged_tree_below_a_snapshot_stops_the_node_and_is_no_peers_fault(
    partial: Partial, full: Ledger, damage: Callable[[bytes], bytes]
) -> None:
    damaged = replace(partial.history, frontier=damage(partial.history.frontier))
    ledger = Ledger(Store.open(partial.directory, told().chain_id, create=False), told().genesis)
    with pytest.raises(InvariantBroken, match="the data directory is damaged"):
        await HistoryFill(ledger, only_peer(full), Pace(FAST))._fill_from(ONLY_PEER, damaged)
    ledger.store.close()
    partial.change("meta", HISTORY_KEY, lambda _: damaged.encode())
    with (
        Store.open(partial.directory, told().chain_id, create=False) as store,
        pytest.raises(InvariantBroken, match="the data directory is damaged"),
    ):
        Ledger(store, told().genesis)


def filled_size(partial: Partial) -> int:
    return Frontier.from_bytes(partial.history.frontier).size


def node_at(partial: Partial, size: int, number: int) -> bytes:
    """The key of one of the peaks of a tree of that size."""
    level, index, _ = Frontier(size, (digest("peak"),) * size.bit_count()).nodes()[number]
    return bytes([level]) + u64(index)


DAMAGES: dict[str, tuple[Callable[[Partial], tuple[str, bytes]], Callable[[bytes], bytes], str]] = {
    "header below": (lambda _: ("headers", u64(2)), flipped, "height 2"),
    "event below": (lambda _: ("entries", u64(1)), flipped, "index 1"),
    "header of the snapshot": (lambda partial: ("headers", u64(partial.base.height)), flipped, "height "),
    "certificate of the snapshot": (lambda partial: ("certificates", u64(partial.base.height)), flipped, "height "),
    "peak": (lambda partial: ("nodes", node_at(partial, partial.base.log_size, -1)), flipped, "peaks at height "),
    "lookup of the snapshot": (lambda partial: ("lookup", BY_BLOCK + partial.base.digest), flipped, "ledger block "),
    "event above": (lambda partial: ("entries", u64(partial.base.log_size)), flipped, "index "),
    "state": (lambda _: ("state", SOURCE_TABLE + told().events[0].id), strange, "all"),
    "head": (lambda _: ("meta", HEAD_KEY), flipped, "head"),
    "frontier below": (lambda _: ("meta", HISTORY_KEY), flipped, "history"),
    "frontier below cut off": (lambda _: ("meta", HISTORY_KEY), lambda value: value[:-1], "history"),
    "how far": (lambda _: ("meta", HISTORY_KEY), lambda value: u64(1 << 40) + value[8:], "history"),
    "size": (lambda _: ("meta", HISTORY_KEY), lambda value: value[:16] + u64(9) + value[24:], "history"),
    "header amid": (lambda partial: ("headers", u64(partial.history.next_height)), strange, "key "),
    "body of the snapshot": (lambda partial: ("bodies", u64(partial.base.height)), strange, "key "),
    "event amid": (lambda partial: ("entries", u64(filled_size(partial))), strange, "key "),
    "node amid": (lambda partial: ("nodes", b"\x00" + u64(filled_size(partial))), strange, "key "),
    "node beyond": (lambda _: ("nodes", b"\x00" + u64(10_000)), strange, "key "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_log_that_is_not_whole_is_found(partial: Partial, damage: str) -> None:
    place, change, found = DAMAGES[damage]
    family, key = place(partial)
    partial.change(family, key, change)
    damages = checked(partial.directory).damages
    assert any(held.family == family and held.key.startswith(found) for held in damages), damages


def test_damaged_log_that_is_not_whole_is_set_aside(partial: Partial) -> None:
    for table in (partial.directory / "rocksdb").glob("*.sst"):
        table.write_bytes(flipped(table.read_bytes()))
    assert not checked(partial.directory).sound
    set_aside(partial.directory, told().chain_id)
    report = checked(partial.directory)
    assert (report.damages, report.height, report.missing_blocks) == ([], 0, 0)


def filled_with_a_carrier(tmp_path: Path) -> tuple[MemoryLedger, int, Path]:
    """A log whose first epoch ends at the height given, and of it a data directory, begun at a snapshot of the second,
    in which what was certified in the first epoch after its end was taken for the ledger block that follows."""
    memory = MemoryLedger()
    memory.seal(memory.source(HOSPITAL, "source"))
    membership, secrets = next_membership(
        memory.genesis, memory.committee, memory.secrets, add={"operator-9": "operator"}
    )
    memory.seal(change_event(memory, membership))
    terminal = memory.ledger
    carrier = memory.seal()
    certificate, memory.ledger = memory.certified.pop()[1], terminal
    memory.enter_epoch(membership, secrets)
    for number in range(6):
        memory.seal(memory.source(HOSPITAL, f"later {number}"))
    behind, joined = written(memory, tmp_path / "behind", 6), written(memory, tmp_path / "joined", 0)
    joined.begin_at(behind.final, behind.links, behind.certificate)  # type: ignore[arg-type]
    write(joined, memory)
    held = [
        (behind.store.header(height) or b"", behind.store.certificate(height) or b"")
        for height in range(1, terminal.header.height + 1)
    ]
    for encoded, certified in (*held, (encode(carrier), certificate)):
        header = decode_header(encoded, memory.chain_id)
        events = memory.events[header.log_size - header.event_count : header.log_size]
        body = Body(tuple(event.leaf_hash for event in events))
        before = Frontier.from_bytes(joined.store.history().frontier)  # type: ignore[union-attr]
        after, interior = before.append_with_nodes(body.leaf_hashes)
        record = BlockRecord(encoded, encode(body), ())
        write_of = history._block_write(header, record, body, events, after, interior, certified)
        joined.store.fill([write_of])
    for ledger in (behind, joined):
        ledger.store.close()
    return memory, terminal.header.height, tmp_path / "joined"


@pytest.mark.trio
async def test_what_was_certified_after_the_end_of_an_epoch_is_found_on_the_log_and_repaired(tmp_path: Path) -> None:
    memory, end, directory = filled_with_a_carrier(tmp_path)
    report = check_data_directory(directory, memory.genesis, lambda stage, done, total: None)
    assert [(held.family, held.key) for held in report.damages] == [("headers", f"height {end + 1}")]
    assert "of epoch 0, which reaches from index 0 to before 2" in report.damages[0].detail
    set_aside(directory, memory.chain_id)
    full, repaired = written(memory, tmp_path / "full"), written(memory, directory, 0)
    async with served([honest(full)]) as network:
        await CatchUp(repaired, network, lambda appended: None).reach(full.final.header.height)
    assert repaired.final.digest == full.final.digest
    for ledger in (full, repaired):
        ledger.store.close()
    assert check_data_directory(directory, memory.genesis, lambda stage, done, total: None).damages == []


def test_lost_certificate_at_the_end_of_an_epoch_is_found(tmp_path: Path) -> None:
    """Nobody who catches up could be served across it, though the head and all else is there."""
    ledger, end = written(told(), tmp_path), ending_height(told())
    ledger.store._family("certificates").delete(u64(end - 1))
    ledger.store.close()
    assert checked(tmp_path).damages == []
    with Store.open(tmp_path, told().chain_id, create=False) as store:
        store._family("certificates").delete(u64(end))
    assert checked(tmp_path).damages == [Damage("certificates", f"height {end}", "missing")]
