"""Ledger blocks on their parents: what is built is what applies, and anything else is refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from ledger_fixtures import HOSPITAL, LIBRARIAN, MemoryLedger, Story, digest, story
from rules_fixtures import granted, remake

from consensus.block import Body, Header
from consensus.event import CheckedEvent
from consensus.identifiers import View
from consensus.membership import ED25519_LIST
from consensus.merkle import root_of
from consensus.rejection import Reason, Rejected
from consensus.transition import Built, LedgerState, apply, build, genesis_state, is_final


def built(
    ledger: MemoryLedger, *events: CheckedEvent, parent: LedgerState | None = None, after_ms: int = 1_000, **caps: int
) -> Built:
    parent = parent or ledger.ledger
    view = parent.header.view + 1
    return build(
        parent,
        events,
        view=view,
        leader=ledger.committee.leader(View(view)).id,
        timestamp_ms=parent.header.timestamp_ms + after_ms,
        committee=ledger.committee,
        max_events=caps.get("max_events", 100),
        max_bytes=caps.get("max_bytes", 1 << 24),
    )


def stepped() -> tuple[Story, Built]:
    told = granted()
    return told, built(told.ledger, *told.run.step(), told.ledger.source(LIBRARIAN, "later"))


def refusal_of(told: Story, header: Header, body: Body, events: tuple[CheckedEvent, ...]) -> Reason:
    root = told.ledger.state.root
    with pytest.raises(Rejected) as caught:
        apply(told.ledger.ledger, header, body, events, told.ledger.committee)
    assert told.ledger.state.root == root
    return caught.value.reason


def test_block_as_built_applies_to_the_same_state() -> None:
    told, made = stepped()
    applied = apply(told.ledger.ledger, made.state.header, made.body, made.events, told.ledger.committee)
    assert (applied.state.digest, applied.state.frontier) == (made.state.digest, made.state.frontier)
    assert (applied.events, applied.body, applied.changes) == (made.events, made.body, made.changes)
    assert (applied.nodes, applied.refused) == (made.nodes, ())
    assert applied.state.state.root == made.state.header.state_root
    leaves = [event.leaf_hash for event in (*told.ledger.events, *made.events)]
    assert made.state.header.log_root == root_of(leaves)
    assert made.state.header.log_size == len(leaves)
    assert [node[2] for node in made.nodes if node[0] == 0] == [event.leaf_hash for event in made.events]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"chain_id": digest("elsewhere")}, Reason.WRONG_CHAIN),
        ({"epoch": 1}, Reason.WRONG_EPOCH),
        ({"parent": digest("another")}, Reason.BAD_BLOCK),
        ({"parent_view": 0}, Reason.BAD_BLOCK),
        ({"height": 9}, Reason.BAD_BLOCK),
        ({"view": 1}, Reason.BAD_BLOCK),
        ({"leader": digest("nobody")}, Reason.BAD_BLOCK),
        ({"timestamp_ms": 1_699_999_999_999}, Reason.BAD_TIMESTAMP),
        ({"event_count": 2}, Reason.BAD_BLOCK),
        ({"body_root": digest("another")}, Reason.BAD_BLOCK),
        ({"log_root": digest("another")}, Reason.LOG_ROOT_MISMATCH),
        ({"log_size": 0}, Reason.LOG_ROOT_MISMATCH),
        ({"state_root": digest("another")}, Reason.STATE_ROOT_MISMATCH),
    ],
)
def test_header_that_tells_otherwise_is_refused(fields: dict[str, object], reason: Reason) -> None:
    told, made = stepped()
    forged = msgspec.structs.replace(made.state.header, **fields)
    assert refusal_of(told, forged, made.body, made.events) == reason


def test_block_by_the_leader_of_another_view_is_refused() -> None:
    told, made = stepped()
    later = msgspec.structs.replace(made.state.header, view=made.state.header.view + 1)
    assert refusal_of(told, later, made.body, made.events) == Reason.BAD_BLOCK


def test_events_that_are_not_the_bodys_are_refused() -> None:
    told, made = stepped()
    for events in (made.events[:-1], made.events[::-1], ()):
        assert refusal_of(told, made.state.header, made.body, events) == Reason.BAD_BLOCK


def test_block_with_an_inadmissible_event_is_refused_for_the_rule_it_breaks() -> None:
    told, made = stepped()
    for events, reason in (
        (made.events[1:], Reason.SEQUENCE_GAP),
        ((*made.events, told.ledger.revocation(LIBRARIAN, told.records)), Reason.WRONG_AUTHOR),
    ):
        body = Body(tuple(event.leaf_hash for event in events))
        header = msgspec.structs.replace(made.state.header, body_root=body.root, event_count=len(events))
        assert refusal_of(told, header, body, events) == reason


def test_same_events_at_another_time_are_another_state() -> None:
    """Time is the ledger block's: a source registered later has another record."""
    told, made = stepped()
    later = msgspec.structs.replace(made.state.header, timestamp_ms=made.state.header.timestamp_ms + 1)
    assert refusal_of(told, later, made.body, made.events) == Reason.STATE_ROOT_MISMATCH


def test_time_may_stand_still_but_build_never_goes_back() -> None:
    told, _ = stepped()
    still = built(told.ledger, after_ms=0)
    apply(told.ledger.ledger, still.state.header, still.body, (), told.ledger.committee)
    back = built(told.ledger, after_ms=-5_000)
    assert back.state.header.timestamp_ms == told.ledger.ledger.header.timestamp_ms


def test_build_leaves_out_what_is_not_admissible_and_says_why() -> None:
    told = granted()
    refusal, step = told.run.step()
    bad = told.ledger.revocation(LIBRARIAN, told.records)
    made = built(told.ledger, step, bad, refusal, refusal)
    assert made.events == (refusal,)
    assert [(event.id, error.reason) for event, error in made.refused] == [
        (step.id, Reason.SEQUENCE_GAP),
        (bad.id, Reason.WRONG_AUTHOR),
        (refusal.id, Reason.DUPLICATE),
    ]
    assert [is_final(error) for _, error in made.refused] == [False, True, True]
    clean = built(told.ledger, refusal)
    assert made.state.header == clean.state.header


def test_build_keeps_to_its_caps() -> None:
    told = granted()
    sources = [told.ledger.source(LIBRARIAN, f"s{number}") for number in range(5)]
    assert len(built(told.ledger, *sources, max_events=3).events) == 3
    size_bytes = len(sources[0].entry_bytes) + len(sources[0].portions_bytes)
    assert len(built(told.ledger, *sources, max_bytes=2 * size_bytes).events) == 2
    large = told.ledger.source(LIBRARIAN, "large", statement="x" * 4_000)
    assert list(built(told.ledger, large, *sources, max_bytes=3 * size_bytes).events) == sources[:3], (
        "what no ledger block has room for stands in nobody's way"
    )
    assert built(told.ledger, *sources, max_events=0).events == ()


def test_empty_block_changes_place_and_time_only() -> None:
    told, _ = stepped()
    made = built(told.ledger)
    before = told.ledger.ledger.header
    assert (made.state.header.state_root, made.state.header.log_root) == (before.state_root, before.log_root)
    assert made.state.state is told.ledger.state
    assert made.changes == {}


def test_branches_of_one_parent_do_not_touch_each_other() -> None:
    told = granted()
    root = told.ledger.state.root
    left = built(told.ledger, told.ledger.revocation(HOSPITAL, told.records))
    right = built(told.ledger, *told.run.step())
    assert told.ledger.state.root == root
    assert len({root, left.state.state.root, right.state.state.root}) == 3
    both = built(told.ledger, told.ledger.source(LIBRARIAN, "x"), parent=left.state)
    assert both.state.header.parent == left.state.digest
    with pytest.raises(Rejected, match="bad-block"):
        apply(right.state, both.state.header, both.body, both.events, told.ledger.committee)


def test_event_too_large_for_the_state_is_left_out_and_the_others_are_built() -> None:
    """One data source must not be able to stop every node: no value may reach the state map above its bound."""
    told = granted()
    wide = "\N{MATHEMATICAL BOLD SCRIPT CAPITAL A}"
    huge = told.ledger.source(
        LIBRARIAN,
        wide * 128,
        licence=wide * 128,
        purposes=tuple(f"{n:02d}{wide * 126}" for n in range(64)),
        statement=wide * 8_192,
    )
    good = told.ledger.source(LIBRARIAN, "good")
    made = built(told.ledger, huge, good)
    assert made.events == (good,)
    assert [error.reason for _, error in made.refused] == [Reason.OVERSIZED]
    body = Body((huge.leaf_hash,))
    header = msgspec.structs.replace(made.state.header, body_root=body.root, event_count=1)
    assert refusal_of(told, header, body, (huge,)) == Reason.OVERSIZED


def test_whole_story_applies_block_by_block_from_genesis() -> None:
    told = story(certificate_scheme=ED25519_LIST)
    ledger = told.ledger
    state = genesis_state(ledger.chain_id, ledger.genesis.created_ms)
    position = 0
    for encoded, _ in ledger.certified:
        header = msgspec.msgpack.decode(encoded, type=Header)
        events = tuple(ledger.events[position : position + header.event_count])
        position += header.event_count
        body = Body(tuple(event.leaf_hash for event in events))
        state = apply(state, header, body, events, ledger.committee).state
    assert state.digest == ledger.ledger.digest


def test_story_is_the_same_under_every_hash_seed() -> None:
    program = (
        "from ledger_fixtures import story; from consensus.membership import ED25519_LIST;"
        "told = story(certificate_scheme=ED25519_LIST); print(told.ledger.ledger.digest.hex())"
    )
    tests = Path(__file__).parents[1]
    digests = set()
    for seed in ("0", "77"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert digests == {story(certificate_scheme=ED25519_LIST).ledger.ledger.digest.hex()}


def test_step_replayed_from_an_earlier_block_is_refused() -> None:
    told = granted()
    events = told.run.step()
    told.ledger.seal(*events)
    made = built(told.ledger, *events)
    assert made.events == ()
    assert {error.reason for _, error in made.refused} == {Reason.DUPLICATE}
    assert remake(told.run, events[0]).id == events[0].id
