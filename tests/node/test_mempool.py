"""The pool of waiting events: bounded, shared fairly, settled in turn."""

from collections.abc import Iterator

import pytest
from ledger_fixtures import MemoryLedger

from consensus import portions as p
from consensus.event import CheckedEvent
from consensus.identifiers import MemberId
from consensus.membership import ED25519_LIST
from consensus.rejection import Reason, Rejected
from node.mempool import MAX_WAIT_MS, Mempool


def checked_sources(memory: MemoryLedger, count: int) -> list[CheckedEvent]:
    return [memory.source("data-source-1", f"source {number}") for number in range(count)]


def fill(pool: Mempool, events: Iterator[CheckedEvent], sender: MemberId | None) -> int:
    """Add events until the pool takes no more of this sender; how many it took."""
    for count, event in enumerate(events):
        try:
            pool.add(event, 0, sender)
        except Rejected:
            return count
    raise AssertionError("the pool took them all")


def test_one_flooding_peer_holds_half_of_the_pool_and_there_is_always_room_for_another() -> None:
    pool = Mempool(64, 1 << 20)
    events = iter(checked_sources(MemoryLedger(), 100))
    held = []
    for peer in (MemberId(bytes([number]) * 32) for number in range(4)):
        held.append(fill(pool, events, peer))
    assert held == [32, 16, 8, 4]
    assert fill(pool, events, None) == 4


def test_peers_bytes_are_shared_like_their_events() -> None:
    events = checked_sources(MemoryLedger(), 10)
    size = len(events[0].entry_bytes) + len(events[0].portions_bytes)
    pool = Mempool(1_000, 8 * size + 100)
    for event in events[:4]:
        pool.add(event, 0, MemberId(bytes(32)))
    with pytest.raises(Rejected, match="overloaded"):
        pool.add(events[4], 0, MemberId(bytes(32)))
    assert pool.add(events[4], 0, MemberId(b"2" * 32))
    for event in events[:5]:
        pool.remove(event.leaf_hash)
    assert (len(pool), pool.held_bytes, list(pool.candidates())) == (0, 0, [])


def test_event_that_unfolds_to_many_times_its_bytes_counts_more_once_much_waits() -> None:
    memory = MemoryLedger(certificate_scheme=ED25519_LIST)
    blocks = tuple(p.BlockWeight(f"{block:04}", 0) for block in range(1_000))
    policies = [
        memory.policy(classes=tuple(p.ClassRule(f"{number}-{rule}", 0, blocks) for rule in range(4)))
        for number in range(12)
    ]
    size = len(policies[0].entry_bytes) + len(policies[0].portions_bytes)
    pool = Mempool(1_000, 8 * size)
    pool.add(policies[0], 0)
    assert pool.held_bytes < 1.01 * size
    taken = fill(pool, iter(policies[1:]), None)
    assert 1 <= taken <= 4, "each counts as two and more"
    ordinary = checked_sources(memory, 20)
    roomy = Mempool(1_000, 1 << 20)
    for event in ordinary:
        roomy.add(event, 0)
    assert roomy.held_bytes == sum(len(event.entry_bytes) + len(event.portions_bytes) for event in ordinary)


def test_refusal_that_is_remembered_holds_nothing_of_the_event() -> None:
    (event,) = checked_sources(MemoryLedger(certificate_scheme=ED25519_LIST), 1)
    pool = Mempool(10, 1 << 20)
    pool.add(event, 0)
    try:
        raise Rejected(Reason.DUPLICATE, "judged")
    except Rejected as error:
        pool.reject(event, error)
    remembered = pool.rejection(event.id)
    assert remembered is not None
    assert (remembered.reason, remembered.detail) == (Reason.DUPLICATE, "judged")
    assert remembered.__traceback__ is None


def test_candidates_come_from_each_sender_in_turn_urgent_ones_first() -> None:
    memory = MemoryLedger()
    sources = checked_sources(memory, 5)
    urgent = memory.revocation("data-source-1", sources[0].id)
    flooder, other = MemberId(bytes(32)), MemberId(b"2" * 32)
    pool = Mempool(100, 1 << 20)
    for event in sources[:3]:
        pool.add(event, 0, flooder)
    for event in (sources[3], urgent):
        pool.add(event, 0, other)
    pool.add(sources[4], 0)
    expected = [sources[0], urgent, sources[4], sources[1], sources[3], sources[2]]
    assert [event.leaf_hash for event in pool.candidates()] == [event.leaf_hash for event in expected]


def test_events_that_were_refused_take_every_other_place_those_tried_longest_ago_first() -> None:
    events = checked_sources(MemoryLedger(), 7)
    pool = Mempool(100, 1 << 20)
    for event in events:
        pool.add(event, 0)
    for number in (0, 2, 3, 0):
        pool.refused(events[number].leaf_hash)
    assert list(pool.candidates()) == [events[number] for number in (1, 2, 4, 3, 5, 0, 6)]
    for number in (1, 3, 4, 5):
        pool.remove(events[number].leaf_hash)
    pool.refused(events[1].leaf_hash)
    assert list(pool.candidates()) == [events[number] for number in (6, 2, 0)]
    for number in (6, 2, 0):
        pool.remove(events[number].leaf_hash)
    assert (len(pool), list(pool.candidates())) == (0, [])


def test_events_by_unknown_job_keys_take_a_tenth_of_the_pool_a_peers_a_fifth() -> None:
    events = iter(checked_sources(MemoryLedger(), 60))
    pool, peer = Mempool(40, 1 << 20), MemberId(bytes(32))

    def fill_with_orphans(sender: MemberId | None) -> list[CheckedEvent]:
        taken: list[CheckedEvent] = []
        for event in events:
            try:
                pool.add(event, 0, sender, b"a key" if len(taken) % 2 else b"another")
            except Rejected:
                return taken
            taken.append(event)
        raise AssertionError("the pool took them all")

    ours, theirs = fill_with_orphans(None), fill_with_orphans(peer)
    assert (len(ours), len(theirs)) == (4, 8)
    assert pool.add(next(events), 0), "one that is no orphan"
    for event in (ours[0], ours[1], theirs[0], theirs[1], theirs[3]):
        pool.remove(event.leaf_hash)
    assert (len(fill_with_orphans(None)), len(fill_with_orphans(peer))) == (2, 3)
    pool.delegated(b"a key")
    pool.remove(ours[3].leaf_hash)
    pool.delegated(b"a key")
    assert (len(fill_with_orphans(None)), len(fill_with_orphans(peer))) == (2, 3)


def test_bytes_of_events_by_unknown_job_keys_are_bounded_like_their_number() -> None:
    events = checked_sources(MemoryLedger(), 4)
    size = len(events[0].entry_bytes) + len(events[0].portions_bytes)
    pool = Mempool(1_000, 10 * (2 * size + 50))
    for event in events[:2]:
        pool.add(event, 0, None, b"a key")
    with pytest.raises(Rejected, match="overloaded"):
        pool.add(events[2], 0, None, b"another")
    pool.delegated(b"a key")
    assert pool.add(events[2], 0, None, b"another")


def test_events_that_wait_for_others_hide_no_later_one_from_being_settled() -> None:
    events = checked_sources(MemoryLedger(), 6)
    pool = Mempool(100, 1 << 20)
    for event in events[:5]:
        pool.add(event, 0)
    assert pool.to_settle(1, 100, 2) == events[:2]
    assert pool.to_settle(1, 100, 2) == events[2:4]
    pool.add(events[5], 50)
    assert pool.to_settle(60, 160, 3) == events[4:]
    assert pool.to_settle(60, 160, 3) == []
    assert pool.to_settle(101, 200, 9) == events[:4]
    pool.remove(events[0].leaf_hash)
    assert pool.to_settle(300, 300, 9) == [*events[4:], *events[1:4]]


def test_events_are_too_old_once_the_log_grew_for_long_while_they_waited() -> None:
    events = checked_sources(MemoryLedger(), 4)
    pool = Mempool(100, 1 << 20)
    for event in events:
        pool.add(event, 0)
        pool.log_grew(1)
    pool.log_grew(MAX_WAIT_MS - 5)
    assert pool.too_old() == []
    pool.log_grew(2)
    assert pool.too_old() == events[:2]
    pool.remove(events[0].leaf_hash)
    pool.log_grew(2)
    assert pool.too_old() == events[1:]
