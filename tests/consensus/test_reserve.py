"""A source's reserve: who is in it, and that no step trains on it."""

import msgspec
import pytest
from ledger_fixtures import Story, begin, digest
from rules_fixtures import assert_admitted, assert_refused, head_of, listed, remake, tell, usage_of

from consensus import portions as p
from consensus.bundle import open_bundle
from consensus.codec import encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent
from consensus.predicates import Answer, Predicate, Status, Verdict, verify
from consensus.rejection import Reason
from consensus.reserve import LOT_BITS, RESERVED, bound_of, lot, reserve_count, reserved_among
from consensus.sampler import presented_examples
from consensus.state import SOURCE_TABLE, SourceRecord, read_record
from node.bundles import export_bundle

ROOT = digest("content", "books")
HALF = 1 << (LOT_BITS - 1)


def claim(reserve_below: int, root: bytes = ROOT) -> p.SourceClaim:
    return p.SourceClaim(
        "books", root, 8, 800, "CC0-1.0", "own", ("research",), "text", 100, 200, "", b"", reserve_below
    )


def reserving() -> Story:
    """A campaign with ``books`` and ``records`` granted, in which ``books`` and ``archive`` keep a half in reserve."""
    told = begin(reserve_below=HALF)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    return told


def record_of(told: Story, source: bytes) -> SourceRecord:
    value = told.ledger.state.get(SOURCE_TABLE + source)
    assert value is not None
    return read_record(value, SourceRecord)


def judged(told: Story, predicate: Predicate, source: bytes = b"") -> Verdict:
    bundle = export_bundle(told.ledger, predicate, campaign=told.run.id, source=source)
    return verify(open_bundle(anchor(told.ledger.genesis, told.ledger.chain_id), bundle), predicate)


def reserve_in(told: Story, source: bytes, step: int = 1) -> list[int]:
    """Which examples of a source's reserve a step is presented with."""
    presented = presented_examples(told.run.manifest, digest("sampler", told.run.name), told.run.batch_size, step)
    claimed = record_of(told, source).claim
    return sorted(reserved_among(claimed, [example for of, example in presented if of == source]))


def use_of(step: CheckedEvent, source: bytes) -> tuple[int, p.SourceUse, tuple[int, ...]]:
    for number, (use, examples) in enumerate(listed(step)):
        assert isinstance(use, p.SourceUse)
        if use.source == source:
            return number, use, examples
    raise AssertionError("the step does not present the source")


def with_use(told: Story, step: CheckedEvent, number: int, use: p.Wire, examples: tuple[int, ...]) -> CheckedEvent:
    """The step with another item, and totals that are the sums."""
    items = listed(step)
    items[number] = (use, examples)
    uses = [item for item, _ in items if isinstance(item, p.SourceUse)]
    counts: dict[str, int] = {}
    for each in uses:
        for count in each.refused:
            counts[count.reason] = counts.get(count.reason, 0) + count.count
    governance = tell(
        step.governance,
        admitted=sum(each.admitted for each in uses),
        presented=sum(each.presented for each in uses),
        refused=tuple(p.Count(reason, count) for reason, count in sorted(counts.items())),
    )
    return remake(told.run, step, items=items, governance=governance)


# Who is in it


def test_reserve_is_of_the_lowest_lots_and_as_many_as_asked_for() -> None:
    for reserve in (1, 5, 40, 100):
        bound = bound_of(ROOT, 100, reserve)
        lowest = sorted(range(100), key=lambda example: lot(ROOT, example))[:reserve]
        assert reserved_among(claim(bound), range(100)) == sorted(lowest)
        assert reserve_count(ROOT, 100, bound) == reserve


def test_no_bound_reserves_nothing() -> None:
    assert bound_of(ROOT, 100, 0) == 0
    assert reserved_among(claim(0), range(100)) == []


def test_larger_reserve_holds_the_smaller_one() -> None:
    smaller, larger = (reserved_among(claim(bound_of(ROOT, 300, reserve)), range(300)) for reserve in (20, 60))
    assert set(smaller) < set(larger)


def test_reserve_is_the_contents_and_no_claims_to_choose() -> None:
    bound = bound_of(ROOT, 300, 30)
    again = msgspec.structs.replace(claim(bound), name="renewed", licence="CC-BY-4.0", valid_until_ms=900)
    assert reserved_among(again, range(300)) == reserved_among(claim(bound), range(300))
    other = reserved_among(claim(bound, digest("other content")), range(300))
    assert other != reserved_among(claim(bound), range(300))


def test_lots_are_spread_evenly() -> None:
    drawn = [lot(ROOT, example) for example in range(4_000)]
    assert max(drawn) < 1 << LOT_BITS
    assert 1_900 < sum(number < HALF for number in drawn) < 2_100
    assert len(reserved_among(claim(HALF), range(4_000))) == sum(number < HALF for number in drawn)


# Steps


def test_reserved_examples_are_counted_by_the_step_and_refused_by_no_event() -> None:
    told = reserving()
    refusal, step = told.run.step()
    own, of_archive = reserve_in(told, told.books), reserve_in(told, told.archive)
    assert own
    assert of_archive
    _, use, admitted = use_of(step, told.books)
    assert p.Count(RESERVED, len(own)) in use.refused
    assert not set(own) & set(admitted)
    assert RESERVED not in {item.reason for item, _ in listed(refusal) if isinstance(item, p.SourceRefusal)}
    told.ledger.seal(refusal, step)
    usage, head = usage_of(told.run, told.books), head_of(told.run)
    assert usage is not None
    assert usage.refused == (p.Count(RESERVED, len(own)),)
    assert head.presented == head.admitted + head.refused == told.run.batch_size


def test_step_that_admits_a_reserved_example_is_refused_by_name() -> None:
    told = reserving()
    refusal, step = told.run.step()
    own = reserve_in(told, told.books)
    number, use, admitted = use_of(step, told.books)
    greedy = tell(use, admitted=use.presented, refused=())
    forged = with_use(told, step, number, greedy, tuple(sorted((*admitted, *own))))
    detail = assert_refused(told.ledger, forged, Reason.RESERVED_FOR_CALIBRATION, before=[refusal])
    assert detail == f"example {own[0]} of 'books' is of its reserve"
    assert_admitted(told.ledger, step, before=[refusal])


@pytest.mark.parametrize("counted", [0, 2])
def test_step_that_miscounts_the_reserve_is_refused(counted: int) -> None:
    told = reserving()
    refusal, step = told.run.step()
    number, use, admitted = use_of(step, told.books)
    assert len(reserve_in(told, told.books)) != counted
    refused = (p.Count(RESERVED, counted),) if counted else ()
    forged = with_use(told, step, number, tell(use, presented=use.admitted + counted, refused=refused), admitted)
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_step_that_calls_an_ordinary_example_reserved_is_refused() -> None:
    told = reserving()
    refusal, step = told.run.step()
    number, use, admitted = use_of(step, told.books)
    more = (p.Count(RESERVED, len(reserve_in(told, told.books)) + 1),)
    forged = with_use(told, step, number, tell(use, admitted=use.admitted - 1, refused=more), admitted[1:])
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_source_without_a_reserve_has_nothing_reserved() -> None:
    told = reserving()
    refusal, step = told.run.step()
    number, use, admitted = use_of(step, told.records)
    assert use.refused == ()
    idle = tell(use, admitted=use.admitted - 1, refused=(p.Count(RESERVED, 1),))
    forged = with_use(told, step, number, idle, admitted[1:])
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_refusal_of_a_reserved_example_is_refused() -> None:
    told = reserving()
    refusal, _ = told.run.step()
    items = listed(refusal)
    (at,) = (
        number
        for number, (item, _) in enumerate(items)
        if isinstance(item, p.SourceRefusal) and item.source == told.archive
    )
    item, examples = items[at]
    assert isinstance(item, p.SourceRefusal)
    reserved = reserve_in(told, told.archive)[0]
    items[at] = (tell(item, count=item.count + 1), tuple(sorted((*examples, reserved))))
    totals = (p.Count(item.reason, item.count + 1),)
    forged = remake(told.run, refusal, items=items, governance=tell(refusal.governance, refused=totals))
    detail = assert_refused(told.ledger, forged, Reason.RESERVED_FOR_CALIBRATION)
    assert detail == f"example {reserved} of 'archive' is of its reserve"


def test_rollback_takes_the_count_of_the_reserve_back() -> None:
    told = reserving()
    told.ledger.seal(*told.run.step())
    before = usage_of(told.run, told.books)
    told.ledger.seal(*told.run.step(flagged=told.records))
    told.ledger.seal(told.run.rollback())
    after = usage_of(told.run, told.books)
    assert before is not None
    assert after is not None
    assert (after.presented, after.refused) == (before.presented, before.refused)


# Predicates


def test_campaign_with_a_reserve_is_complete_and_honored() -> None:
    told = reserving()
    for _ in range(2):
        told.ledger.seal(*told.run.step())
    verdict = judged(told, Predicate.REFUSALS_COMPLETE)
    assert verdict.answer is Answer.YES
    kept = sum(len(reserve_in(told, source, step)) for source in (told.books, told.archive) for step in (1, 2))
    expected = f"{kept} of those refused are of their owners' reserves, of which no step admitted any"
    assert expected in [step.text for step in verdict.steps if step.status is Status.CHECKED]
    honored = judged(told, Predicate.SOURCE_HONORED, told.books)
    assert honored.answer is Answer.YES
    own = len(reserve_in(told, told.books, 1)) + len(reserve_in(told, told.books, 2))
    assert any(f"that the {own} examples counted as of its reserve" in step.text for step in honored.steps)


def test_reserve_that_members_let_a_step_train_on_is_found() -> None:
    told = reserving()
    key, record = SOURCE_TABLE + told.books, record_of(told, told.books)
    lie = msgspec.structs.replace(record, claim=msgspec.structs.replace(record.claim, reserve_below=0))
    told.ledger.collude([], {key: encode(lie)})
    told.ledger.seal(*told.run.step())
    told.ledger.collude([], {key: encode(record)})
    verdict = judged(told, Predicate.REFUSALS_COMPLETE)
    assert verdict.answer is Answer.NO
    failed = [step.text for step in verdict.steps if step.status is Status.FAILED]
    assert any("examples of the reserve of 'books' were admitted" in text for text in failed)
