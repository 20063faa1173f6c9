"""Momentum of revoked sources: which step must settle it, and what a job gets by saying otherwise."""

import pytest
from ledger_fixtures import HOSPITAL, CampaignRun, Story
from rules_fixtures import assert_admitted, assert_refused, opened, remake, tell, usage_of

from consensus import portions as p
from consensus.event import CheckedEvent
from consensus.rejection import Reason
from consensus.state import Usage


def revoked(momentum: str) -> Story:
    """``records`` had its part in two steps, was revoked, and the grant in force is without it."""
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum=momentum))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    for _ in range(2):
        told.ledger.seal(*told.run.step())
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    told.ledger.seal(told.run.grant([told.books], 1, 100))
    return told


def operation_of(event: CheckedEvent) -> p.StepOperation:
    assert isinstance(event.operation, p.StepOperation)
    return event.operation


def used(told: Story) -> Usage:
    usage = usage_of(told.run, told.records)
    assert usage is not None
    return usage


def settled(told: Story) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """What the next step flushes and carries; it is admitted, and on the log afterwards."""
    events = told.run.step()
    told.ledger.seal(*events)
    operation = operation_of(events[-1])
    return operation.flushed, tuple(carried.source for carried in operation.carried)


def assert_unaccounted(run: CampaignRun, **says: object) -> str:
    """The next step is refused where it says this; the job has not written it."""
    *before, step = run.step(**says)  # type: ignore[arg-type]
    detail = assert_refused(run.ledger, step, Reason.MOMENTUM_UNACCOUNTED, before=before)
    run.sequence -= 1 + len(before)
    run.snapshots.pop()
    return detail


def assert_nothing_is_due(told: Story) -> None:
    refusal, step = told.run.step(flushed=(), carried=())
    assert_admitted(told.ledger, step, before=[refusal])


def test_step_that_should_have_flushed_and_says_that_it_did_not_is_refused() -> None:
    told = revoked("flush")
    detail = assert_unaccounted(told.run, flushed=())
    assert told.records.hex() in detail


def test_step_that_carries_under_a_policy_that_says_flush_is_refused() -> None:
    told = revoked("flush")
    carried = (p.CarriedMomentum(told.records, 0),)
    assert_unaccounted(told.run, flushed=(), carried=carried)
    assert_unaccounted(told.run, carried=carried)


def test_first_step_without_a_revoked_source_flushes_and_those_after_it_must_not() -> None:
    told = revoked("flush")
    assert settled(told) == ((told.records,), ())
    assert used(told).momentum == "flush"
    assert_unaccounted(told.run, flushed=(told.records,))
    assert_nothing_is_due(told)


def test_carried_momentum_is_named_once_with_its_residual_and_cannot_be_passed_over() -> None:
    told = revoked("carry")
    assert_unaccounted(told.run, carried=())
    assert_unaccounted(told.run, flushed=(told.records,), carried=())
    assert settled(told) == ((), (told.records,))
    assert used(told).momentum == "carry"
    assert_nothing_is_due(told)


def test_two_sources_are_flushed_both_and_in_order() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    more = told.ledger.source(HOSPITAL, "more")
    told.ledger.seal(more)
    ranges = tuple(p.ManifestRange(source, 0, 8) for source in (told.books, told.records, more.id))
    run = CampaignRun(told.ledger, ranges, name="of three")
    told.ledger.seal(*run.open())
    told.ledger.seal(run.grant([told.books, told.records, more.id], 1, 100))
    told.ledger.seal(*run.step())
    told.ledger.seal(*(told.ledger.revocation(HOSPITAL, source) for source in (told.records, more.id)))
    told.ledger.seal(run.grant([told.books], 1, 100))
    first, second = sorted((told.records, more.id))
    for wrong in ((first,), (second,), (second, first), (first, second, second)):
        assert_unaccounted(run, flushed=wrong)
    refusal, step = run.step(flushed=(first, second))
    assert_admitted(told.ledger, step, before=[refusal])


def test_nothing_is_due_while_an_open_grant_drains() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    assert_nothing_is_due(told)


def test_nothing_is_due_of_a_source_that_was_never_admitted() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 1))
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.archive))
    told.ledger.seal(told.run.grant([told.books, told.records], 2, 100))
    assert_nothing_is_due(told)


def test_source_left_out_before_it_was_revoked_is_still_due_under_the_first_grant_after_it() -> None:
    """A grant asked for without it cannot be the way around a flush."""
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.run.grant([told.books], 1, 100))
    assert settled(told) == ((), ())
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    assert settled(told) == ((), ()), "the grant opened before the revocation"
    told.ledger.seal(told.run.grant([told.books], 1, 100))
    assert_unaccounted(told.run, flushed=())
    assert settled(told) == ((told.records,), ())


@pytest.mark.parametrize("momentum", ["flush", "carry"])
def test_rollback_of_the_step_that_settled_it_leaves_it_due(momentum: str) -> None:
    told = revoked(momentum)
    before = used(told)
    first = settled(told)
    told.ledger.seal(told.run.rollback("operator-decision"))
    assert used(told).momentum == before.momentum == ""
    assert_unaccounted(told.run, flushed=(), carried=())
    assert settled(told) == first


def test_rollback_of_a_later_step_leaves_it_settled() -> None:
    told = revoked("flush")
    settled(told)
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.run.rollback("operator-decision"))
    assert used(told).momentum == "flush"
    assert_nothing_is_due(told)


def test_what_was_carried_is_flushed_once_a_policy_says_so_and_not_the_other_way_round() -> None:
    told = revoked("carry")
    settled(told)
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    told.ledger.seal(told.run.grant([told.books], 1, 100))
    assert settled(told) == ((told.records,), ())
    told.ledger.seal(told.ledger.policy(momentum="carry"))
    told.ledger.seal(told.run.grant([told.books], 1, 100))
    assert_nothing_is_due(told)


def test_source_admitted_again_under_an_older_grant_is_due_again() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    wide = told.run.grant_id
    told.ledger.seal(*told.run.step())
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    told.ledger.seal(told.run.grant([told.books], 1, 100))
    narrow = told.run.grant_id
    assert settled(told) == ((told.records,), ())
    told.run.grant_id = wide
    assert settled(told) == ((), ())
    assert used(told).momentum == ""
    told.run.grant_id = narrow
    assert settled(told) == ((told.records,), ())


def test_step_that_admits_nothing_settles_nothing_and_the_next_one_does() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(momentum="flush"))
    run = CampaignRun(told.ledger, told.run.manifest, name="one by one", batch_size=1)
    told.ledger.seal(*run.open())
    told.ledger.seal(run.grant([told.books, told.records], 1, 100))

    def admitted(event: CheckedEvent) -> int:
        assert isinstance(event.governance, p.StepGovernance)
        return event.governance.admitted

    while (usage := usage_of(run, told.records)) is None or not usage.admitted:
        told.ledger.seal(*run.step())
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    told.ledger.seal(run.grant([told.books], 1, 100))
    seen = []
    while not seen or not seen[-1][0]:
        *before, step = run.step()
        if not admitted(step):
            run.snapshots.pop()
            step = remake(run, step, operation=tell(step.operation, root_after=run.root()))
        told.ledger.seal(*before, step)
        seen.append((admitted(step), operation_of(step).flushed))
    assert len(seen) > 1, "the sampler's first example is not admitted"
    assert seen == [(0, ())] * (len(seen) - 1) + [(1, (told.records,))]
