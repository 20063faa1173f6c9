"""Attacks on a campaign by its own job: each refused for its rule, each without a trace in the state."""

import msgspec
import pytest
from ledger_fixtures import BLOCKS, GOVERNANCE, HOSPITAL, LIBRARIAN, CampaignRun, Story, digest
from rules_fixtures import (
    assert_admitted,
    assert_malformed,
    assert_refused,
    granted,
    head_of,
    listed,
    opened,
    remake,
    tell,
    usage_of,
)

from consensus import portions as p
from consensus.admission import admit
from consensus.codec import encode
from consensus.event import CheckedEvent, Kind
from consensus.identifiers import ZERO_DIGEST
from consensus.keys import Ed25519SigningKey
from consensus.rejection import Reason
from consensus.state import CAMPAIGN_HEAD_TABLE, StateView

STOLEN = Ed25519SigningKey(digest("a key nobody delegated"))


def step_of(told: Story) -> tuple[CheckedEvent, CheckedEvent]:
    """The next step's refusal and the step itself; ``archive`` is always presented and never granted."""
    refusal, step = told.run.step()
    return refusal, step


def operation_of(event: CheckedEvent) -> p.StepOperation:
    assert isinstance(event.operation, p.StepOperation)
    return event.operation


def two_steps() -> Story:
    told = granted()
    for _ in range(2):
        told.ledger.seal(*told.run.step())
    return told


# Place: sequence, attempt, key, author


def test_honest_refusal_and_step_are_admitted() -> None:
    told = granted()
    refusal, step = step_of(told)
    assert_admitted(told.ledger, refusal)
    assert_admitted(told.ledger, step, before=[refusal])


@pytest.mark.parametrize(
    ("offset", "reason"), [(1, Reason.SEQUENCE_GAP), (-1, Reason.DUPLICATE), (1_000_000, Reason.SEQUENCE_GAP)]
)
def test_step_out_of_sequence_is_refused(offset: int, reason: Reason) -> None:
    told = granted()
    refusal, step = step_of(told)
    forged = remake(told.run, step, sequence=step.entry.sequence + offset)
    assert_refused(told.ledger, forged, reason, before=[refusal])


def test_same_step_twice_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    assert_refused(told.ledger, step, Reason.DUPLICATE, before=[refusal, step])


def test_refusal_twice_is_refused() -> None:
    told = granted()
    refusal, _ = step_of(told)
    assert_refused(told.ledger, refusal, Reason.DUPLICATE, before=[refusal])


@pytest.mark.parametrize("attempt", [1, 7])
def test_step_of_another_attempt_is_refused(attempt: int) -> None:
    told = granted()
    refusal, step = step_of(told)
    forged = remake(told.run, step, attempt=attempt)
    assert_refused(told.ledger, forged, Reason.STEP_CHAIN_BROKEN, before=[refusal])


def test_step_by_a_key_nobody_delegated_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    assert_refused(told.ledger, remake(told.run, step, job=STOLEN), Reason.UNKNOWN_JOB_KEY, before=[refusal])


def test_step_by_the_key_of_another_campaign_is_refused() -> None:
    told = granted()
    other = CampaignRun(told.ledger, told.run.manifest, name="other")
    told.ledger.seal(*other.open())
    refusal, step = step_of(told)
    assert_refused(told.ledger, remake(told.run, step, job=other.job), Reason.UNKNOWN_JOB_KEY, before=[refusal])


def test_step_written_into_another_campaign_is_refused() -> None:
    told = granted()
    other = CampaignRun(told.ledger, told.run.manifest, name="other")
    told.ledger.seal(*other.open())
    refusal, _ = step_of(told)
    assert_refused(told.ledger, remake(told.run, refusal, campaign=other.id), Reason.UNKNOWN_JOB_KEY)


def test_step_after_the_job_key_expired_is_refused() -> None:
    told = granted()
    refusal, _ = step_of(told)
    expires_ms = told.ledger.genesis.created_ms + 365 * 86_400_000
    assert_refused(told.ledger, refusal, Reason.JOB_KEY_EXPIRED, at_ms=expires_ms)


@pytest.mark.parametrize("kind", [Kind.REFUSAL, Kind.STEP, Kind.ROLLBACK, Kind.ABANDON, Kind.RELEASE])
def test_nothing_is_written_into_an_unknown_campaign(kind: Kind) -> None:
    told = two_steps()
    event = one_of(told, kind)
    assert_refused(told.ledger, remake(told.run, event, campaign=digest("nowhere")), Reason.UNKNOWN_CAMPAIGN)


@pytest.mark.parametrize("kind", [Kind.REFUSAL, Kind.STEP, Kind.ROLLBACK, Kind.ABANDON, Kind.RELEASE])
@pytest.mark.parametrize("end", [Kind.ABANDON, Kind.RELEASE])
def test_nothing_is_written_into_a_closed_campaign(kind: Kind, end: Kind) -> None:
    told = two_steps()
    closing = one_of(told, end)
    told.run.sequence = closing.entry.sequence + 1
    event = one_of(told, kind)
    assert_refused(told.ledger, event, Reason.CAMPAIGN_CLOSED, before=[closing])


def one_of(told: Story, kind: Kind) -> CheckedEvent:
    """The campaign's next event, of this kind, honest."""
    run = told.run
    if kind is Kind.REFUSAL:
        return run.step()[0]
    if kind is Kind.STEP:
        return run.step()[1]
    if kind is Kind.ROLLBACK:
        return run.rollback("operator-decision")
    if kind is Kind.RELEASE:
        return run.release()
    return run.written(Kind.ABANDON, p.Portions(None, None, told.ledger.salted(p.Abandon("no longer needed"))))


def test_grant_for_a_closed_campaign_is_refused() -> None:
    told = two_steps()
    abandon = one_of(told, Kind.ABANDON)
    grant = told.run.grant([told.books], 3, 4)
    assert_refused(told.ledger, grant, Reason.CAMPAIGN_CLOSED, before=[abandon])


# Grant


def test_step_outside_its_grant_is_refused() -> None:
    told = granted(steps=1)
    told.ledger.seal(*told.run.step())
    refusal, _ = step_of(told)
    assert_refused(told.ledger, refusal, Reason.OUTSIDE_GRANT)


def test_step_before_its_grant_starts_is_refused() -> None:
    told = opened()
    told.ledger.seal(told.run.grant([told.books, told.records], 2, 4))
    refusal, _ = step_of(told)
    assert_refused(told.ledger, refusal, Reason.OUTSIDE_GRANT)


def test_step_beyond_the_planned_steps_is_refused() -> None:
    told = opened()
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    head = head_of(told.run)
    # The 101st step of a campaign that plans 100, from a state that stands at 100.
    state = told.ledger.state.set(CAMPAIGN_HEAD_TABLE + told.run.id, encode(msgspec.structs.replace(head, steps=100)))
    object.__setattr__(told.ledger.ledger, "state", state)
    told.ledger.seal(told.run.grant([told.books, told.records], 101, 102))
    refusal, step = step_of(told)
    assert_refused(told.ledger, step, Reason.OUTSIDE_GRANT, before=[refusal])


def test_step_at_closing_time_is_admitted_and_a_millisecond_later_refused() -> None:
    told = opened()
    grant = told.run.grant([told.books, told.records], 1, 4)
    told.ledger.seal(grant)
    assert isinstance(grant.governance, p.GrantTerms)
    refusal, step = step_of(told)
    closes_ms = grant.governance.closes_at_ms
    assert_admitted(told.ledger, step, before=[refusal], at_ms=closes_ms)
    assert_refused(told.ledger, refusal, Reason.GRANT_CLOSED, at_ms=closes_ms + 1)


def test_step_under_a_grant_that_is_not_on_the_log_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    forged = remake(told.run, step, governance=tell(step.governance, grant=digest("no grant")))
    assert_refused(told.ledger, forged, Reason.UNKNOWN_GRANT, before=[refusal])


def test_step_under_another_campaigns_grant_is_refused() -> None:
    told = granted()
    other = CampaignRun(told.ledger, told.run.manifest, name="other")
    told.ledger.seal(*other.open())
    told.ledger.seal(other.grant([told.books], 1, 4))
    refusal, step = step_of(told)
    forged = remake(told.run, step, governance=tell(step.governance, grant=other.grant_id))
    assert_refused(told.ledger, forged, Reason.OUTSIDE_GRANT, before=[refusal])


def test_step_that_names_another_policy_than_its_grant_is_refused() -> None:
    told = granted()
    laxer = told.ledger.policy(name="laxer")
    told.ledger.seal(laxer)
    refusal, step = step_of(told)
    forged = remake(told.run, step, governance=tell(step.governance, policy=laxer.id))
    assert_refused(told.ledger, forged, Reason.POLICY_NOT_IN_FORCE, before=[refusal])


def test_stricter_policy_after_the_grant_does_not_stop_its_steps() -> None:
    told = granted()
    told.ledger.seal(told.ledger.policy(licences=("CC0-1.0",)))
    refusal, step = step_of(told)
    assert_admitted(told.ledger, step, before=[refusal])


def test_step_admitting_a_source_that_its_grant_does_not_name_is_refused() -> None:
    told = opened()
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    wide = told.run.grant_id
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    narrow, told.run.grant_id = told.run.grant_id, wide
    refusal, step = step_of(told)
    forged = remake(told.run, step, governance=tell(step.governance, grant=narrow))
    assert_refused(told.ledger, forged, Reason.SOURCE_NOT_GRANTED, before=[refusal])


def test_refusals_under_one_grant_do_not_count_for_a_step_under_another() -> None:
    """Two grants overlap: refuse ``records`` under the one without it, train under the one that demands it."""
    told = opened()
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    wide = told.run.grant_id
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    refusal, step = step_of(told)
    assert_admitted(told.ledger, step, before=[refusal])
    forged = remake(told.run, step, governance=tell(step.governance, grant=wide))
    detail = assert_refused(told.ledger, forged, Reason.BAD_FIELD, before=[refusal])
    assert "records" in detail


def test_revocation_drains_open_grants_by_default() -> None:
    told = granted()
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    refusal, step = step_of(told)
    assert_admitted(told.ledger, step, before=[refusal])


def test_revocation_voids_open_grants_where_the_policy_says_so() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(revocation="void"))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    refusal, step = step_of(told)
    revocation = told.ledger.revocation(HOSPITAL, told.records)
    assert_admitted(told.ledger, step, before=[refusal])
    assert_refused(told.ledger, refusal, Reason.SOURCE_REVOKED, before=[revocation])
    assert_refused(told.ledger, step, Reason.SOURCE_REVOKED, before=[refusal, revocation])


def test_revocation_of_a_source_not_granted_voids_nothing() -> None:
    told = opened()
    told.ledger.seal(told.ledger.policy(revocation="void"))
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    refusal, _ = step_of(told)
    assert_admitted(told.ledger, refusal, before=[told.ledger.revocation(HOSPITAL, told.records)])


# Chain


def test_steps_are_chained() -> None:
    told = two_steps()
    assert head_of(told.run).steps == 2


@pytest.mark.parametrize(
    ("field", "told_value", "reason"),
    [
        ("index", 4, Reason.STEP_CHAIN_BROKEN),
        ("index", 2, Reason.STEP_CHAIN_BROKEN),
        ("previous", digest("another past"), Reason.STEP_CHAIN_BROKEN),
        ("root_before", digest("trained off the log"), Reason.PARAMETER_ROOT_BROKEN),
    ],
)
def test_step_off_the_chain_is_refused(field: str, told_value: object, reason: Reason) -> None:
    told = two_steps()
    refusal, step = step_of(told)
    forged = remake(told.run, step, operation=tell(step.operation, **{field: told_value}))
    assert_refused(told.ledger, forged, reason, before=[refusal])


def test_step_that_names_the_step_before_the_last_as_previous_is_refused() -> None:
    told = granted()
    told.ledger.seal(*told.run.step())
    first = head_of(told.run).last_event
    told.ledger.seal(*told.run.step())
    refusal, step = step_of(told)
    forged = remake(told.run, step, operation=tell(step.operation, previous=first))
    assert_refused(told.ledger, forged, Reason.STEP_CHAIN_BROKEN, before=[refusal])


# Counts


def counted(step: CheckedEvent, source: bytes) -> tuple[int, p.SourceUse, tuple[int, ...]]:
    for number, (use, examples) in enumerate(listed(step)):
        assert isinstance(use, p.SourceUse)
        if use.source == source:
            return number, use, examples
    raise AssertionError("the step does not present the source")


def with_use(
    step: CheckedEvent, number: int, use: p.Wire, examples: tuple[int, ...]
) -> list[tuple[p.Wire, tuple[int, ...]]]:
    items = listed(step)
    items[number] = (use, examples)
    return items


def adjusted(step: CheckedEvent, presented: int, admitted: int) -> p.Wire:
    """The governance portion with its totals moved, so that they stay the sums."""
    assert isinstance(step.governance, p.StepGovernance)
    return tell(
        step.governance,
        presented=step.governance.presented + presented,
        admitted=step.governance.admitted + admitted,
    )


def test_step_that_leaves_out_an_example_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.books)
    fewer = tell(use, presented=use.presented - 1, admitted=use.admitted - 1)
    forged = remake(
        told.run, step, items=with_use(step, number, fewer, examples[1:]), governance=adjusted(step, -1, -1)
    )
    detail = assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])
    assert "0 too many, 1 missing" in detail


def test_step_that_sneaks_in_an_example_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.books)
    more = tell(use, presented=use.presented + 1, admitted=use.admitted + 1)
    sneaked = (*examples, 2**52)
    forged = remake(told.run, step, items=with_use(step, number, more, sneaked), governance=adjusted(step, 1, 1))
    detail = assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])
    assert "1 too many, 0 missing" in detail


def test_step_that_swaps_an_example_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.books)
    forged = remake(told.run, step, items=with_use(step, number, use, (*examples[:-1], 2**52)))
    detail = assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])
    assert "1 too many, 1 missing" in detail


def test_example_both_refused_and_admitted_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    _, _, examples = counted(step, told.books)
    recited = p.SourceRefusal(told.books, Reason.MEMORIZATION_ABOVE_THRESHOLD.value, 1, ZERO_DIGEST)
    items = sorted([*listed(refusal), (recited, examples[:1])], key=lambda held: held[0].source)  # type: ignore[attr-defined]
    both = refused_as(told, refusal, items)
    assert isinstance(both.governance, p.RefusalGovernance)
    totals = both.governance.refused
    number, use, _ = counted(step, told.books)
    refused = (p.Count(recited.reason, 1),)
    twice = tell(use, presented=use.presented + 1, refused=refused)
    governance = tell(adjusted(step, 1, 0), refused=totals)
    forged = remake(told.run, step, items=with_use(step, number, twice, examples), governance=governance)
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[both])
    fewer = tell(use, admitted=use.admitted - 1, refused=refused)
    honest = remake(
        told.run,
        step,
        items=with_use(step, number, fewer, examples[1:]),
        governance=tell(adjusted(step, 0, -1), refused=totals),
    )
    assert_admitted(told.ledger, honest, before=[both])


def test_step_that_omits_a_recorded_refusal_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    items = [held for held in listed(step) if held[0].source != told.archive]  # type: ignore[attr-defined]
    _, use, _ = counted(step, told.archive)
    governance = tell(adjusted(step, -use.presented, 0), refused=())
    forged = remake(told.run, step, items=items, governance=governance)
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_step_whose_refusal_was_not_recorded_before_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    forged = remake(told.run, step, sequence=refusal.entry.sequence)
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED)


def test_step_that_names_another_reason_than_its_refusal_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.archive)
    other = (p.Count(Reason.SOURCE_NOT_GRANTED.value, use.presented),)
    forged = remake(
        told.run,
        step,
        items=with_use(step, number, tell(use, refused=other), examples),
        governance=tell(step.governance, refused=other),
    )
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_presented_that_is_not_admitted_and_refused_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.books)
    forged = remake(
        told.run,
        step,
        items=with_use(step, number, tell(use, presented=use.presented + 1), examples),
        governance=adjusted(step, 1, 0),
    )
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


@pytest.mark.parametrize("field", ["presented", "admitted"])
@pytest.mark.parametrize("by", [-1, 1])
def test_step_totals_that_are_not_the_sums_are_refused(field: str, by: int) -> None:
    told = granted()
    refusal, step = step_of(told)
    governance = tell(step.governance, **{field: getattr(step.governance, field) + by})
    assert_refused(
        told.ledger, remake(told.run, step, governance=governance), Reason.COUNTS_NOT_CONSERVED, before=[refusal]
    )


def test_step_total_of_refusals_that_is_not_the_sum_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    forged = remake(told.run, step, governance=tell(step.governance, refused=()))
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_step_whose_sources_are_out_of_order_or_repeated_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    items = listed(step)
    for wrong in (items[::-1], [items[0], *items]):
        assert_refused(told.ledger, remake(told.run, step, items=wrong), Reason.BAD_FIELD, before=[refusal])


def test_step_over_an_unknown_source_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.books)
    items = with_use(step, number, tell(use, source=digest("unknown")), examples)
    items.sort(key=lambda held: held[0].source)  # type: ignore[attr-defined]
    assert_refused(told.ledger, remake(told.run, step, items=items), Reason.UNKNOWN_SOURCE, before=[refusal])


def test_step_with_a_source_outside_the_manifest_is_refused() -> None:
    told = opened()
    extra = told.ledger.source(LIBRARIAN, "extra")
    told.ledger.seal(extra)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 4))
    refusal, step = step_of(told)
    use = p.SourceUse(extra.id, "text", 1, 1, (), ZERO_DIGEST)
    items = sorted([*listed(step), (use, (0,))], key=lambda held: held[0].source)  # type: ignore[attr-defined]
    forged = remake(told.run, step, items=items, governance=adjusted(step, 1, 1))
    assert_refused(told.ledger, forged, Reason.SOURCE_NOT_GRANTED, before=[refusal])


# Depth profiles and blocks


def test_step_that_calls_a_class_by_another_name_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    number, use, examples = counted(step, told.records)
    forged = remake(told.run, step, items=with_use(step, number, tell(use, content_class="text"), examples))
    assert_refused(told.ledger, forged, Reason.BAD_FIELD, before=[refusal])


def profiles_of(step: CheckedEvent) -> dict[str, p.ClassProfile]:
    assert isinstance(step.governance, p.StepGovernance)
    return {profile.content_class: profile for profile in step.governance.profiles}


def test_profile_above_the_maximum_is_refused_in_each_block() -> None:
    told = granted()
    refusal, step = step_of(told)
    profiles = profiles_of(step)
    for number in range(len(BLOCKS)):
        weights = list(profiles["medical"].weights_permille)
        weights[number] += 1
        deeper = p.ClassProfile("medical", 0, tuple(weights))
        governance = tell(step.governance, profiles=(deeper, profiles["text"]))
        forged = remake(told.run, step, governance=governance)
        assert_refused(told.ledger, forged, Reason.DEPTH_ABOVE_MAXIMUM, before=[refusal])


def test_profile_below_the_maximum_is_admitted() -> None:
    told = granted()
    refusal, step = step_of(told)
    gentle = p.ClassProfile("medical", 0, (0, 1, 0))
    governance = tell(step.governance, profiles=(gentle, profiles_of(step)["text"]))
    assert_admitted(told.ledger, remake(told.run, step, governance=governance), before=[refusal])


def test_profiles_missing_surplus_repeated_or_out_of_order_are_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    profiles = profiles_of(step)
    medical, text = profiles["medical"], profiles["text"]
    other = p.ClassProfile("secret", 0, (0, 0, 0))
    for wrong in ((), (text,), (medical,), (text, medical), (medical, medical, text), (medical, other, text)):
        forged = remake(told.run, step, governance=tell(step.governance, profiles=wrong))
        assert_refused(told.ledger, forged, Reason.BAD_FIELD, before=[refusal])


@pytest.mark.parametrize("weights", [(0,), (0, 0), (0, 0, 0, 0)])
def test_profile_of_another_number_of_blocks_is_refused(weights: tuple[int, ...]) -> None:
    told = granted()
    refusal, step = step_of(told)
    governance = tell(step.governance, profiles=(p.ClassProfile("medical", 0, weights), profiles_of(step)["text"]))
    assert_refused(told.ledger, remake(told.run, step, governance=governance), Reason.BAD_FIELD, before=[refusal])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_step_with_deltas_of_another_number_of_blocks_is_refused(count: int) -> None:
    told = granted()
    refusal, step = step_of(told)
    deltas = tuple(p.BlockDelta(0, digest(number)) for number in range(count))
    forged = remake(told.run, step, operation=tell(step.operation, deltas=deltas))
    assert_refused(told.ledger, forged, Reason.BAD_FIELD, before=[refusal])


def medical_only() -> Story:
    """Only ``records``, of class medical, is granted: nothing may move the embedding."""
    told = opened()
    told.ledger.seal(told.run.grant([told.records], 1, 100))
    return told


def test_blocked_block_that_moved_is_refused() -> None:
    told = medical_only()
    refusal, step = step_of(told)
    operation = operation_of(step)
    assert operation.deltas[0].norm_micro == 0
    assert_admitted(told.ledger, step, before=[refusal])
    moved = (p.BlockDelta(1, digest("moved")), *operation.deltas[1:])
    forged = remake(told.run, step, operation=tell(operation, deltas=moved))
    assert_refused(told.ledger, forged, Reason.DEPTH_ABOVE_MAXIMUM, before=[refusal])


def still(step: CheckedEvent, **fields: object) -> p.Wire:
    """The operation of a step that moved nothing."""
    operation = operation_of(step)
    deltas = tuple(p.BlockDelta(0, delta.digest) for delta in operation.deltas)
    return tell(operation, deltas=deltas, **({"root_after": operation.root_before} | fields))


def test_root_that_changes_in_a_step_where_nothing_may_move_is_refused() -> None:
    """All deltas are said to be zero, yet the root is another: training off the log, made up for in one step."""
    told = medical_only()
    refusal, step = step_of(told)
    governance = tell(step.governance, profiles=(p.ClassProfile("medical", 0, (0, 0, 0)),))
    honest = remake(told.run, step, governance=governance, operation=still(step))
    assert_admitted(told.ledger, honest, before=[refusal])
    forged = remake(told.run, step, governance=governance, operation=still(step, root_after=digest("other weights")))
    assert_refused(told.ledger, forged, Reason.PARAMETER_ROOT_BROKEN, before=[refusal])


def test_one_factor_over_all_blocks_is_refused_unless_the_policy_admits_it() -> None:
    told = granted()
    refusal, step = step_of(told)
    for factor_nano in (1, p.NANO // 2, p.NANO):
        scaled = remake(told.run, step, governance=tell(step.governance, global_clip_nano=factor_nano))
        assert_refused(told.ledger, scaled, Reason.GLOBAL_CLIPPING_NOT_ADMITTED, before=[refusal])
    told = opened()
    told.ledger.seal(told.ledger.policy(global_clipping=True))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    refusal, step = step_of(told)
    assert_admitted(told.ledger, step, before=[refusal])
    for factor_nano in (1, p.NANO):
        scaled = remake(told.run, step, governance=tell(step.governance, global_clip_nano=factor_nano))
        assert_admitted(told.ledger, scaled, before=[refusal])


def test_factor_above_one_is_no_factor() -> None:
    told = granted()
    _, step = step_of(told)
    enlarged = tell(step.governance, global_clip_nano=p.NANO + 1)
    assert_malformed(lambda: remake(told.run, step, governance=enlarged), Reason.MALFORMED)


def test_skipped_step_moves_nothing() -> None:
    told = granted()
    refusal, step = step_of(told)
    governance = tell(step.governance, skipped=True)
    honest = remake(told.run, step, governance=governance, operation=still(step))
    assert_admitted(told.ledger, honest, before=[refusal])
    moved = remake(told.run, step, governance=governance)
    assert_refused(told.ledger, moved, Reason.PARAMETER_ROOT_BROKEN, before=[refusal])
    other_root = still(step, root_after=digest("other weights"))
    forged = remake(told.run, step, governance=governance, operation=other_root)
    assert_refused(told.ledger, forged, Reason.PARAMETER_ROOT_BROKEN, before=[refusal])
    operation = operation_of(step)
    moved_back = tell(operation, root_after=operation.root_before)
    forged = remake(told.run, step, governance=governance, operation=moved_back)
    assert_refused(told.ledger, forged, Reason.PARAMETER_ROOT_BROKEN, before=[refusal])


def test_step_that_admits_nothing_leaves_the_root_as_it_is() -> None:
    told = opened()
    extra = told.ledger.source(LIBRARIAN, "extra")
    told.ledger.seal(extra)
    run = CampaignRun(
        told.ledger, (p.ManifestRange(extra.id, 0, 2), p.ManifestRange(told.books, 0, 2)), "tiny", batch_size=1
    )
    told.ledger.seal(*run.open())
    told.ledger.seal(run.grant([extra.id], 1, 100))
    for _ in range(8):
        events = run.step()
        step = events[-1]
        assert isinstance(step.governance, p.StepGovernance)
        if not step.governance.admitted:
            assert not step.governance.profiles
            assert_refused(told.ledger, step, Reason.PARAMETER_ROOT_BROKEN, before=events[:-1])
            honest = remake(run, step, operation=still(step))
            assert_admitted(told.ledger, honest, before=events[:-1])
            skipped = remake(run, step, governance=tell(step.governance, skipped=True), operation=still(step))
            assert_refused(told.ledger, skipped, Reason.BAD_FIELD, before=events[:-1])
            return
        told.ledger.seal(*events)
    raise AssertionError("no step without an admitted example")


# Memorization and rollback


def flagged() -> Story:
    """Step 2 memorized ``records``: only a rollback may follow."""
    told = granted()
    told.ledger.seal(*told.run.step())
    told.ledger.seal(*told.run.step(flagged=told.records))
    return told


def signals(told: Story, step: CheckedEvent, permille: int) -> CheckedEvent:
    _, _, examples = counted(step, told.records)
    signal = p.MemorizationSignal(told.records, examples[0], permille)
    return remake(told.run, step, operation=tell(step.operation, memorization=(signal,)))


def test_signal_at_the_threshold_lets_the_job_go_on() -> None:
    told = granted()
    refusal, step = step_of(told)
    told.ledger.seal(refusal, signals(told, step, 800))
    assert not head_of(told.run).rollback_required


def test_signal_above_the_threshold_demands_a_rollback() -> None:
    told = granted()
    refusal, step = step_of(told)
    told.ledger.seal(refusal, signals(told, step, 801))
    assert head_of(told.run).rollback_required


@pytest.mark.parametrize("kind", [Kind.REFUSAL, Kind.STEP, Kind.RELEASE])
def test_only_a_rollback_may_follow_a_step_above_the_threshold(kind: Kind) -> None:
    told = flagged()
    event = one_of(told, kind)
    event = remake(told.run, event, sequence=head_of(told.run).next_sequence)
    assert_refused(told.ledger, event, Reason.ROLLBACK_REQUIRED)


def test_campaign_may_be_abandoned_after_a_step_above_the_threshold() -> None:
    told = flagged()
    assert_admitted(told.ledger, one_of(told, Kind.ABANDON))


def test_signal_of_an_example_that_is_not_in_the_step_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    _, _, examples = counted(step, told.books)
    for source, example in ((told.archive, 0), (told.books, 2**40), (digest("unknown"), examples[0])):
        signal = p.MemorizationSignal(source, example, 1)
        forged = remake(told.run, step, operation=tell(step.operation, memorization=(signal,)))
        assert_refused(told.ledger, forged, Reason.BAD_FIELD, before=[refusal])


def test_rollback_puts_the_campaign_back_exactly() -> None:
    told = granted()
    told.ledger.seal(*told.run.step())
    before = head_of(told.run)
    usages = {source: usage_of(told.run, source) for source in (told.books, told.records, told.archive)}
    told.ledger.seal(*told.run.step(flagged=told.records))
    step = told.ledger.events[-1]
    told.ledger.seal(told.run.rollback())
    after = head_of(told.run)
    for field in ("steps", "root", "presented", "admitted", "refused", "pending", "job_key", "closed"):
        assert getattr(after, field) == getattr(before, field), field
    assert (after.attempt, after.rollbacks, after.discarded_steps) == (1, 1, 1)
    assert not after.rollback_required
    assert (after.undo_root, after.undo_counts) == (b"", ())
    for source, usage in usages.items():
        restored = usage_of(told.run, source)
        assert usage is not None
        assert restored is not None
        number = counted(step, source)[1].admitted
        assert restored == msgspec.structs.replace(usage, discarded=number, last_step=2)
    refusal, again = step_of(told)
    assert again.entry.attempt == 1
    assert_admitted(told.ledger, again, before=[refusal])


def rollback_of(event: CheckedEvent) -> p.Rollback:
    assert isinstance(event.operation, p.Rollback)
    return event.operation


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"restored_root": digest("other weights")}, Reason.PARAMETER_ROOT_BROKEN),
        ({"next_attempt": 2}, Reason.STEP_CHAIN_BROKEN),
        ({"next_index": 1}, Reason.STEP_CHAIN_BROKEN),
        ({"next_index": 3}, Reason.STEP_CHAIN_BROKEN),
        ({"reason": "because"}, Reason.BAD_FIELD),
        ({"discarded": (digest("another step"),)}, Reason.ROLLBACK_REQUIRED),
    ],
)
def test_false_rollback_is_refused(fields: dict[str, object], reason: Reason) -> None:
    told = flagged()
    honest = told.run.rollback()
    assert_admitted(told.ledger, honest)
    forged = remake(told.run, honest, operation=tell(honest.operation, **fields))
    assert_refused(told.ledger, forged, reason)


def test_rollback_to_the_root_that_was_memorized_is_refused() -> None:
    told = flagged()
    honest = told.run.rollback()
    forged = remake(told.run, honest, operation=tell(honest.operation, restored_root=head_of(told.run).root))
    assert_refused(told.ledger, forged, Reason.PARAMETER_ROOT_BROKEN)


def test_rollback_that_names_a_step_twice_is_refused() -> None:
    """Each name counts as a discarded step in the campaign's totals."""
    told = flagged()
    honest = told.run.rollback()
    twice = rollback_of(honest).discarded * 2
    forged = remake(told.run, honest, operation=tell(honest.operation, discarded=twice))
    assert_refused(told.ledger, forged, Reason.DUPLICATE)


def test_rollback_that_names_a_step_older_than_the_last_is_refused() -> None:
    """Only the last step is undone: an older one named after it would stay in the totals."""
    told = flagged()
    honest = told.run.rollback()
    first = next(event for event in told.ledger.events if event.entry.kind is Kind.STEP)
    older = (*rollback_of(honest).discarded, first.id)
    forged = remake(told.run, honest, operation=tell(honest.operation, discarded=older))
    assert_refused(told.ledger, forged, Reason.BAD_FIELD)
    newer = (digest("never admitted"), *rollback_of(honest).discarded)
    assert_admitted(told.ledger, remake(told.run, honest, operation=tell(honest.operation, discarded=newer)))


def test_second_rollback_of_the_same_step_is_refused() -> None:
    told = flagged()
    honest = told.run.rollback()
    told.ledger.seal(honest)
    assert_refused(told.ledger, honest, Reason.DUPLICATE)
    place = {"sequence": head_of(told.run).next_sequence, "attempt": 1}
    again = remake(told.run, honest, operation=tell(honest.operation, next_attempt=2), **place)
    assert_refused(told.ledger, again, Reason.NOTHING_TO_ROLL_BACK)
    decided = tell(honest.operation, next_attempt=2, reason="operator-decision")
    # The step is off the log's head by now: naming it undoes nothing more.
    wrong = remake(told.run, honest, operation=tell(decided, restored_root=digest("further back")), **place)
    assert_refused(told.ledger, wrong, Reason.PARAMETER_ROOT_BROKEN)


@pytest.mark.parametrize("at", ["opening", "rollback"])
def test_rollback_of_an_event_that_is_no_step_is_refused(at: str) -> None:
    told = granted() if at == "opening" else flagged()
    if at == "rollback":
        told.ledger.seal(told.run.rollback())
    head = head_of(told.run)
    rollback = p.Rollback((head.last_event,), "operator-decision", head.root, 1, head.attempt + 1, ())
    event = rolled_back(told, rollback)
    assert_refused(told.ledger, event, Reason.NOTHING_TO_ROLL_BACK)


def rolled_back(told: Story, rollback: p.Rollback) -> CheckedEvent:
    ledger = told.ledger
    governance = p.RollbackGovernance(told.run.grant_id, told.run.policy_id)
    return told.run.written(Kind.ROLLBACK, p.Portions(None, ledger.salted(governance), ledger.salted(rollback)))


def test_rollback_for_memorization_that_is_not_on_the_log_is_refused() -> None:
    told = two_steps()
    assert_refused(told.ledger, told.run.rollback(), Reason.NOTHING_TO_ROLL_BACK)


def test_rollback_of_steps_that_never_came_onto_the_log_is_admitted_and_undoes_nothing() -> None:
    told = two_steps()
    before = head_of(told.run)
    refusal, step = step_of(told)
    told.ledger.seal(refusal)
    assert head_of(told.run).pending
    told.run.sequence = refusal.entry.sequence + 1
    told.ledger.seal(rolled_back(told, p.Rollback((step.id,), "step-not-admitted", before.root, 3, 1, ())))
    after = head_of(told.run)
    assert (after.steps, after.root, after.presented) == (before.steps, before.root, before.presented)
    assert (after.attempt, after.discarded_steps, after.pending) == (1, 1, ())


def test_rollback_under_a_grant_of_another_campaign_or_policy_is_refused() -> None:
    told = flagged()
    honest = told.run.rollback()
    other = CampaignRun(told.ledger, told.run.manifest, name="other")
    told.ledger.seal(*other.open())
    told.ledger.seal(other.grant([told.books], 1, 4))
    for fields in ({"grant": other.grant_id}, {"policy": digest("no policy")}, {"grant": digest("no grant")}):
        forged = remake(told.run, honest, governance=tell(honest.governance, **fields))
        assert_refused(told.ledger, forged, Reason.UNKNOWN_GRANT)


def test_step_of_the_attempt_before_the_rollback_is_refused() -> None:
    told = flagged()
    told.ledger.seal(told.run.rollback())
    refusal, _ = step_of(told)
    for attempt in (0, 2):
        forged = remake(told.run, refusal, attempt=attempt)
        assert_refused(told.ledger, forged, Reason.STEP_CHAIN_BROKEN)


def test_step_replayed_after_its_rollback_is_refused() -> None:
    told = flagged()
    step = told.ledger.events[-1]
    told.ledger.seal(told.run.rollback())
    assert_refused(told.ledger, step, Reason.DUPLICATE)
    moved = remake(told.run, step, sequence=head_of(told.run).next_sequence, attempt=1)
    assert_refused(told.ledger, moved, Reason.STEP_CHAIN_BROKEN)


# Refusals


def refused_as(told: Story, refusal: CheckedEvent, items: list[tuple[p.Wire, tuple[int, ...]]]) -> CheckedEvent:
    """The refusal with other items and the totals they sum to."""
    totals: dict[str, int] = {}
    for item, _ in items:
        assert isinstance(item, p.SourceRefusal)
        totals[item.reason] = totals.get(item.reason, 0) + item.count
    counts = tuple(p.Count(reason, count) for reason, count in sorted(totals.items()))
    return remake(told.run, refusal, items=items, governance=tell(refusal.governance, refused=counts))


@pytest.mark.parametrize(
    "reason",
    [
        Reason.SOURCE_NOT_GRANTED,
        Reason.SOURCE_REVOKED,
        Reason.SOURCE_EXPIRED,
        Reason.PURPOSE_NOT_ADMITTED,
        Reason.MEMORIZATION_ABOVE_THRESHOLD,
    ],
)
def test_refusal_for_a_false_reason_is_refused(reason: Reason) -> None:
    told = granted()
    refusal, _ = step_of(told)
    (item, examples) = listed(refusal)[0]
    assert isinstance(item, p.SourceRefusal)
    assert item.reason == Reason.LICENCE_NOT_ADMITTED
    forged = refused_as(told, refusal, [(tell(item, reason=reason.value), examples)])
    assert_refused(told.ledger, forged, Reason.BAD_FIELD)


@pytest.mark.parametrize("reason", [Reason.SOURCE_NOT_GRANTED, Reason.SOURCE_REVOKED, Reason.LICENCE_NOT_ADMITTED])
def test_granted_source_is_refused_only_at_the_jobs_discretion(reason: Reason) -> None:
    told = granted()
    refusal, step = step_of(told)
    _, _, examples = counted(step, told.books)
    item = p.SourceRefusal(told.books, reason.value, 1, ZERO_DIGEST)
    forged = refused_as(told, refusal, [(item, examples[:1])])
    assert_refused(told.ledger, forged, Reason.BAD_FIELD)
    recited = tell(item, reason=Reason.MEMORIZATION_ABOVE_THRESHOLD.value)
    assert_admitted(told.ledger, refused_as(told, refusal, [(recited, examples[:1])]))


def test_revoked_source_left_out_of_a_grant_is_refused_as_revoked() -> None:
    told = opened()
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    refusal, _ = step_of(told)
    named = {item.source: item.reason for item in refusal.items if isinstance(item, p.SourceRefusal)}
    assert named[told.records] == Reason.SOURCE_REVOKED
    assert_admitted(told.ledger, refusal)


def test_admissible_source_left_out_of_a_grant_is_refused_as_not_granted() -> None:
    told = opened()
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    refusal, _ = step_of(told)
    named = {item.source: item.reason for item in refusal.items if isinstance(item, p.SourceRefusal)}
    assert named[told.records] == Reason.SOURCE_NOT_GRANTED
    assert_admitted(told.ledger, refusal)


def test_source_revoked_after_the_grant_is_not_refused_as_revoked() -> None:
    told = opened()
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    told.ledger.seal(told.ledger.revocation(HOSPITAL, told.records))
    refusal, _ = told.run.step(reason=Reason.SOURCE_REVOKED.value)
    assert_refused(told.ledger, refusal, Reason.BAD_FIELD)


def test_refusal_of_an_example_that_was_not_presented_is_refused() -> None:
    told = granted()
    refusal, _ = step_of(told)
    (item, examples) = listed(refusal)[0]
    forged = refused_as(told, refusal, [(item, (*examples[:-1], 2**50))])
    assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED)


def test_refusal_of_an_example_refused_before_is_refused() -> None:
    told = granted()
    refusal, _ = step_of(told)
    again = remake(told.run, refusal, sequence=refusal.entry.sequence + 1)
    assert_refused(told.ledger, again, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_refusals_told_in_two_events_add_up() -> None:
    told = granted()
    refusal, step = step_of(told)
    (item, examples) = listed(refusal)[0]
    assert len(examples) > 1
    first = refused_as(told, refusal, [(tell(item, count=1), examples[1:2])])
    rest = (*examples[:1], *examples[2:])
    sequence = refusal.entry.sequence + 1
    second = remake(told.run, refused_as(told, refusal, [(tell(item, count=len(rest)), rest)]), sequence=sequence)
    step = remake(told.run, step, sequence=sequence + 1)
    assert_admitted(told.ledger, step, before=[first, second])
    assert_refused(told.ledger, remake(told.run, step, sequence=sequence), Reason.COUNTS_NOT_CONSERVED, before=[first])


def test_refusals_out_of_order_are_refused() -> None:
    told = opened()
    told.ledger.seal(told.run.grant([told.books], 1, 4))
    refusal, _ = step_of(told)
    items = listed(refusal)
    assert len(items) == 2
    for wrong in (items[::-1], [items[0], items[0]]):
        assert_refused(told.ledger, remake(told.run, refusal, items=wrong), Reason.BAD_FIELD)


def test_refusal_whose_totals_are_not_the_sums_is_refused() -> None:
    told = granted()
    refusal, _ = step_of(told)
    assert isinstance(refusal.governance, p.RefusalGovernance)
    count = refusal.governance.refused[0]
    for wrong in (
        (p.Count(count.reason, count.count + 1),),
        (p.Count("other", count.count),),
        (count, p.Count("zzz", 1)),
        (count, count),
    ):
        forged = remake(told.run, refusal, governance=tell(refusal.governance, refused=wrong))
        assert_refused(told.ledger, forged, Reason.COUNTS_NOT_CONSERVED)


@pytest.mark.parametrize("index", [1, 3, 50])
def test_refusal_for_another_step_than_the_next_is_refused(index: int) -> None:
    told = granted()
    told.ledger.seal(*told.run.step())
    refusal, _ = step_of(told)
    forged = remake(told.run, refusal, operation=p.RefusalOperation(index))
    assert_refused(told.ledger, forged, Reason.STEP_CHAIN_BROKEN)


def test_refusal_of_an_unknown_source_is_refused() -> None:
    told = granted()
    refusal, _ = step_of(told)
    (item, examples) = listed(refusal)[0]
    forged = refused_as(told, refusal, [(tell(item, source=digest("unknown")), examples)])
    assert_refused(told.ledger, forged, Reason.UNKNOWN_SOURCE)


# Release and abandon


def test_release_of_the_root_on_the_log_is_admitted() -> None:
    told = two_steps()
    release = told.run.release()
    told.ledger.seal(release)
    head = head_of(told.run)
    assert (head.closed, head.release) == ("released", release.id)


@pytest.mark.parametrize("fields", [{"parameter_root": digest("trained on")}, {"steps": 1}, {"steps": 3}])
def test_release_of_anything_but_the_root_on_the_log_is_refused(fields: dict[str, object]) -> None:
    told = two_steps()
    release = told.run.release()
    forged = remake(told.run, release, operation=tell(release.operation, **fields))
    assert_refused(told.ledger, forged, Reason.ROOT_NOT_FINAL)


def test_release_of_a_discarded_root_is_refused() -> None:
    told = flagged()
    memorized = head_of(told.run).root
    told.ledger.seal(told.run.rollback())
    release = told.run.release()
    forged = remake(told.run, release, operation=tell(release.operation, parameter_root=memorized))
    assert_refused(told.ledger, forged, Reason.ROOT_NOT_FINAL)
    assert_admitted(told.ledger, release)


def test_release_with_refusals_for_a_step_not_on_the_log_is_refused() -> None:
    told = two_steps()
    refusal, _ = step_of(told)
    told.run.snapshots.pop()
    release = remake(told.run, told.run.release(), sequence=refusal.entry.sequence + 1)
    assert_refused(told.ledger, release, Reason.COUNTS_NOT_CONSERVED, before=[refusal])


def test_release_twice_is_refused() -> None:
    told = two_steps()
    told.ledger.seal(told.run.release())
    assert_refused(told.ledger, told.run.release(), Reason.CAMPAIGN_CLOSED)


def test_abandon_closes_the_campaign() -> None:
    told = granted()
    told.ledger.seal(one_of(told, Kind.ABANDON))
    assert head_of(told.run).closed == "abandoned"


# Sizes


def test_step_or_refusal_that_lists_more_examples_than_any_batch_is_refused_before_they_are_hashed() -> None:
    told = granted()
    _, step = step_of(told)
    number, use, _ = counted(step, told.books)
    many = tuple(range(p.MAX_EVENT_EXAMPLES + 1))
    items = with_use(step, number, tell(use, admitted=len(many), presented=len(many)), many)
    assert_malformed(lambda: remake(told.run, step, items=items), Reason.OVERSIZED)


def test_events_of_one_block_are_judged_in_order_and_the_refused_leave_no_trace() -> None:
    told = granted()
    refusal, step = step_of(told)
    view = StateView(told.ledger.state)
    stranger = told.ledger.source(LIBRARIAN, "later")
    for event in (refusal, step, stranger):
        admit(view, event, told.ledger.now_ms, told.ledger.committee)
    both = view.changes()
    bad = remake(told.run, step, operation=tell(step.operation, root_before=digest("no")), sequence=99)
    assert_refused(told.ledger, bad, Reason.SEQUENCE_GAP, before=(refusal, step, stranger))
    assert view.changes() == both


def test_other_operators_member_is_not_the_campaigns_author() -> None:
    told = granted(counts={"data-source": 2, "governance": 1, "operator": 2, "verifier": 1})
    refusal, _ = step_of(told)
    forged = remake(told.run, refusal, author=told.ledger.ids["operator-2"])
    assert_refused(told.ledger, forged, Reason.WRONG_AUTHOR)
    assert GOVERNANCE in told.ledger.ids


def test_step_numbered_otherwise_in_its_governance_portion_is_refused() -> None:
    told = granted()
    refusal, step = step_of(told)
    assert isinstance(step.governance, p.StepGovernance)
    governance = msgspec.structs.replace(step.governance, index=step.governance.index + 1)
    forged = remake(told.run, step, governance=governance)
    assert_refused(told.ledger, forged, Reason.BAD_FIELD, before=[refusal])
