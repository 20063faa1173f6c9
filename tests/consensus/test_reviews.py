"""Evaluations, decisions and audit results: what is admitted, what bars a release, and what a bundle proves of it."""

import msgspec
import pytest
from ledger_fixtures import GOVERNANCE, HOSPITAL, LIBRARIAN, OPERATOR, Story, digest, story
from rules_fixtures import SEVERAL, assert_admitted, assert_refused, granted, head_of, remake

from consensus import portions as p
from consensus.bundle import MAGIC, MAX_BUNDLE_BYTES, Bundle, encode_bundle, open_bundle
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent, Entry, Kind
from consensus.predicates import Answer, Predicate, Status, Verdict, verify
from consensus.predicates.reviews import Audit, replayed_steps
from consensus.rejection import Reason, Rejected
from consensus.review import (
    ACCEPT,
    AT_LEAST,
    AT_MOST,
    NOTE,
    REJECT,
    AuditResult,
    Evaluation,
    Metric,
    Threshold,
    examination_digest,
    is_met,
)
from consensus.review_rules import MAX_OPEN_EVALUATIONS, MAX_OPEN_FINDINGS
from consensus.state import (
    AUDIT_TABLE,
    CAMPAIGN_HEAD_TABLE,
    EVALUATION_TABLE,
    AuditRecord,
    EvaluationRecord,
    read_record,
    review_key,
)
from node.bundles import export_bundle


def begun(steps: int = 1, counts: dict[str, int] | None = None) -> Story:
    """A campaign that took some steps."""
    told = granted(counts)
    for _ in range(steps):
        told.ledger.seal(*told.run.step())
    return told


def standing(told: Story, event: CheckedEvent) -> str:
    value = told.ledger.state.get(review_key(EVALUATION_TABLE, told.run.id, event.id))
    assert value is not None
    return read_record(value, EvaluationRecord).standing


def sealed(told: Story, event: CheckedEvent) -> CheckedEvent:
    told.ledger.seal(event)
    return event


# Thresholds


@pytest.mark.parametrize(
    ("side", "low", "high", "met"),
    [
        (AT_MOST, 10, 20, True),
        (AT_MOST, 10, 21, False),
        (AT_LEAST, 20, 30, True),
        (AT_LEAST, 19, 30, False),
        (AT_MOST, -30, -10, True),
    ],
)
def test_threshold_is_met_by_the_whole_interval(side: str, low: int, high: int, met: bool) -> None:
    assert is_met(Metric("m", low, low, high, 950, "wilson", Threshold(side, 20))) == met
    assert is_met(Metric("m", low, low, high, 950, "wilson", None))


def test_two_evaluations_of_one_test_differ_in_weights_and_values_only() -> None:
    told = begun()
    evaluation = told.run.evaluation().operation
    assert isinstance(evaluation, Evaluation)
    metric = evaluation.metrics[0]
    same = msgspec.structs.replace(
        evaluation, steps=9, parameter_root=digest("w"), metrics=(msgspec.structs.replace(metric, value_micro=1),)
    )
    assert examination_digest(same) == examination_digest(evaluation)
    others = [
        msgspec.structs.replace(evaluation, name="other"),
        msgspec.structs.replace(evaluation, script_sha256=digest("other")),
        msgspec.structs.replace(evaluation, data=msgspec.structs.replace(evaluation.data, examples=65)),
        msgspec.structs.replace(
            evaluation, metrics=(msgspec.structs.replace(metric, threshold=Threshold(AT_MOST, 9_000_000)),)
        ),
        msgspec.structs.replace(evaluation, metrics=(msgspec.structs.replace(metric, threshold=None),)),
    ]
    assert len({examination_digest(evaluation), *map(examination_digest, others)}) == 6


# Evaluations


def test_met_evaluation_bars_nothing() -> None:
    told = begun()
    event = sealed(told, told.run.evaluation())
    assert standing(told, event) == "met"
    assert head_of(told.run).open_findings == ()
    told.ledger.seal(told.run.release())


def test_missed_threshold_bars_the_release_until_the_same_test_is_met() -> None:
    told = begun()
    missed = sealed(told, told.run.evaluation(high_micro=1_600_000))
    assert standing(told, missed) == "unmet"
    assert head_of(told.run).open_findings == (missed.id,)
    assert_refused(told.ledger, told.run.release(), Reason.FINDING_OPEN)
    told.run.sequence -= 1
    told.ledger.seal(*told.run.step())
    weaker = Threshold(AT_MOST, 9_000_000)
    metric = msgspec.structs.replace(missed.operation.metrics[0], threshold=weaker)  # type: ignore[union-attr]
    told.ledger.seal(told.run.evaluation(metrics=(metric,)))
    assert head_of(told.run).open_findings == (missed.id,), "a weaker threshold is another test"
    again = sealed(told, told.run.evaluation())
    assert (standing(told, missed), standing(told, again)) == ("superseded", "met")
    told.ledger.seal(told.run.release())


def test_second_miss_of_a_test_takes_the_place_of_the_first() -> None:
    told = begun()
    first = sealed(told, told.run.evaluation(high_micro=1_600_000))
    second = sealed(told, told.run.evaluation(high_micro=1_700_000))
    assert head_of(told.run).open_findings == (second.id,)
    assert standing(told, first) == "superseded"


def test_open_findings_are_bounded() -> None:
    told = begun()
    for number in range(MAX_OPEN_EVALUATIONS):
        told.ledger.seal(told.run.evaluation(high_micro=1_600_000, name=f"test {number}"))
    assert_refused(told.ledger, told.run.evaluation(high_micro=1_600_000, name="one more"), Reason.OVERSIZED)
    told.run.sequence -= 1
    for number in range(MAX_OPEN_FINDINGS - MAX_OPEN_EVALUATIONS):
        met = sealed(told, told.run.evaluation(name=f"met {number}"))
        told.ledger.seal(told.ledger.decision(told.run.id, met.id, REJECT))
    met = sealed(told, told.run.evaluation(name="met at last"))
    assert_refused(told.ledger, told.ledger.decision(told.run.id, met.id, REJECT), Reason.OVERSIZED)
    told.ledger.seal(told.run.evaluation(name="test 0"))
    told.ledger.seal(told.ledger.decision(told.run.id, met.id, REJECT))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 2}, Reason.ROOT_NOT_FINAL),
        ({"parameter_root": digest("other weights")}, Reason.ROOT_NOT_FINAL),
        ({"metrics": (Metric("m", 5, 6, 7, 950, "x", None),)}, Reason.BAD_FIELD),
        ({"metrics": (Metric("m", 6, 5, 5, 950, "x", None),)}, Reason.BAD_FIELD),
        ({"metrics": (Metric("m", 6, 6, 6, 950, "x", Threshold("about", 6)),)}, Reason.BAD_FIELD),
        ({"metrics": (Metric("b", 1, 1, 1, 950, "x", None), Metric("a", 1, 1, 1, 950, "x", None))}, Reason.BAD_FIELD),
        ({"metrics": (Metric("a", 1, 1, 1, 950, "x", None),) * 2}, Reason.BAD_FIELD),
    ],
)
def test_evaluation_that_breaks_a_rule_is_refused(change: dict[str, object], reason: Reason) -> None:
    told = begun()
    assert_refused(told.ledger, told.run.evaluation(**change), reason)


def test_evaluation_of_a_step_that_must_be_undone_or_after_the_end_is_refused() -> None:
    told = begun()
    told.ledger.seal(*told.run.step(flagged=told.books))
    assert_refused(told.ledger, told.run.evaluation(), Reason.ROLLBACK_REQUIRED)
    told = begun()
    told.ledger.seal(told.run.release())
    assert_refused(told.ledger, told.run.evaluation(), Reason.CAMPAIGN_CLOSED)


def test_step_goes_on_and_back_across_an_evaluation() -> None:
    told = begun(2)
    told.ledger.seal(told.run.evaluation())
    told.ledger.seal(*told.run.step())
    assert head_of(told.run).steps == 3


# Decisions


def test_governance_accepts_a_miss_and_rejects_what_was_met() -> None:
    told = begun()
    missed = sealed(told, told.run.evaluation(high_micro=1_600_000))
    told.ledger.seal(told.ledger.decision(told.run.id, missed.id, ACCEPT))
    assert standing(told, missed) == "accepted"
    met = sealed(told, told.run.evaluation())
    told.ledger.seal(told.ledger.decision(told.run.id, met.id, REJECT))
    assert head_of(told.run).open_findings == (met.id,)
    assert_refused(told.ledger, told.run.release(), Reason.FINDING_OPEN)
    told.run.sequence -= 1
    told.ledger.seal(told.run.evaluation())
    assert head_of(told.run).open_findings == (met.id,), "what governance rejected, only governance accepts"
    told.ledger.seal(told.ledger.decision(told.run.id, met.id, ACCEPT, rationale="looked at again"))
    told.ledger.seal(told.run.release())


def test_decision_needs_the_quorum_of_governance() -> None:
    told = begun(counts=SEVERAL)
    missed = sealed(told, told.run.evaluation(high_micro=1_600_000))
    with pytest.raises(Rejected) as caught:
        told.ledger.decision(told.run.id, missed.id, ACCEPT, [GOVERNANCE, "governance-2"])
    assert caught.value.reason is Reason.MISSING_SIGNATURE
    told.ledger.seal(told.ledger.decision(told.run.id, missed.id, ACCEPT, [f"governance-{n}" for n in (1, 2, 3)]))


@pytest.mark.parametrize("author", [OPERATOR, HOSPITAL])
def test_others_may_note_and_not_decide(author: str) -> None:
    told = begun()
    missed = sealed(told, told.run.evaluation(high_micro=1_600_000))
    for outcome in (ACCEPT, REJECT):
        assert_refused(told.ledger, told.ledger.decision(told.run.id, missed.id, outcome, [author]), Reason.WRONG_ROLE)
    assert_admitted(told.ledger, told.ledger.decision(told.run.id, missed.id, NOTE, [author]))


def test_note_of_a_member_lends_itself_no_others_name() -> None:
    told = begun()
    for other in (GOVERNANCE, LIBRARIAN, OPERATOR):
        with pytest.raises(Rejected) as caught:
            told.ledger.decision(told.run.id, told.run.id, NOTE, [HOSPITAL, other])
        assert caught.value.reason is Reason.SURPLUS_SIGNATURE


def test_decision_that_breaks_a_rule_is_refused() -> None:
    told = begun()
    ledger, run = told.ledger, told.run
    noted = sealed(told, ledger.decision(run.id, run.id, NOTE))
    assert_refused(ledger, noted, Reason.DUPLICATE)
    assert_refused(ledger, ledger.decision(run.id, run.id, "perhaps"), Reason.BAD_FIELD)
    assert_refused(ledger, ledger.decision(run.id, digest("nothing"), NOTE), Reason.NOT_FOUND)
    assert_refused(ledger, ledger.decision(run.id, run.id, ACCEPT), Reason.BAD_FIELD)
    assert_refused(ledger, ledger.decision(digest("elsewhere"), run.id, NOTE), Reason.UNKNOWN_CAMPAIGN)
    missed = sealed(told, run.evaluation(high_micro=1_600_000))
    assert_refused(ledger, ledger.decision(run.id, missed.id[:16] + bytes(16), ACCEPT), Reason.NOT_FOUND)
    numbered = remake(run, ledger.decision(run.id, run.id, NOTE), sequence=1)
    assert_refused(ledger, numbered, Reason.BAD_FIELD)


def test_release_and_audit_can_be_noted_after_the_end() -> None:
    told = begun()
    release = sealed(told, told.run.release())
    audit = sealed(told, told.ledger.audit_result(HOSPITAL, told.run.id, end_root=told.run.root()))
    for subject in (release.id, audit.id, told.run.id):
        told.ledger.seal(told.ledger.decision(told.run.id, subject, NOTE, [HOSPITAL]))


# Audit results


def test_audit_result_is_kept_with_its_auditor() -> None:
    told = begun(2)
    event = sealed(told, told.ledger.audit_result(HOSPITAL, told.run.id))
    value = told.ledger.state.get(review_key(AUDIT_TABLE, told.run.id, event.id))
    assert value is not None
    record = read_record(value, AuditRecord)
    assert (record.auditor, record.first_step, record.last_step, record.differing_step) == (
        told.ledger.ids[HOSPITAL],
        1,
        1,
        None,
    )
    assert_refused(told.ledger, event, Reason.DUPLICATE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"last_step": 3, "matched": 3}, Reason.STEP_CHAIN_BROKEN),
        ({"first_step": 2, "last_step": 1, "matched": 0}, Reason.BAD_FIELD),
        ({"matched": 2}, Reason.BAD_FIELD),
        ({"matched": 0}, Reason.BAD_FIELD),
        ({"differing": ("optimizer state",)}, Reason.BAD_FIELD),
        ({"last_step": 2, "matched": 2}, Reason.PARAMETER_ROOT_BROKEN),
    ],
)
def test_audit_result_that_breaks_a_rule_is_refused(change: dict[str, object], reason: Reason) -> None:
    told = begun(2)
    assert_refused(told.ledger, told.ledger.audit_result(HOSPITAL, told.run.id, **change), reason)


def test_operator_does_not_audit_itself() -> None:
    told = begun()
    with pytest.raises(Rejected) as caught:
        told.ledger.audit_result(OPERATOR, told.run.id)
    assert caught.value.reason is Reason.WRONG_ROLE


def test_verifier_audits() -> None:
    told = begun(2, counts=SEVERAL)
    told.ledger.seal(told.ledger.audit_result("verifier-1", told.run.id))


def test_replayed_steps_are_counted_once() -> None:
    def audit(first: int, last: int, matched: int) -> Audit:
        return Audit(AuditRecord(bytes(32), bytes(32), bytes(32), first, last, matched, b"", (), (), 0), "somebody")

    assert replayed_steps([]) == 0
    assert replayed_steps([audit(1, 5, 5), audit(3, 8, 6)]) == 8
    assert replayed_steps([audit(1, 2, 2), audit(5, 9, 2), audit(1, 1, 0)]) == 4
    assert replayed_steps([audit(1, 2**53 - 1, 2**53 - 1)]) == 2**53 - 1


# The predicate


def judged(told: Story, bundle: bytes | None = None) -> Verdict:
    encoded = bundle or export_bundle(told.ledger, Predicate.EVALUATED, campaign=told.run.id)
    opened = open_bundle(anchor(told.ledger.genesis, told.ledger.chain_id), encoded)
    return verify(opened, Predicate.EVALUATED)


def texts(verdict: Verdict, status: Status) -> str:
    return "\n".join(step.text for step in verdict.steps if step.status is status)


def test_accepted_miss_and_audit_are_told() -> None:
    verdict = judged(story())
    assert verdict.answer is Answer.YES
    assert "'loss' is 1.2, 1.1 to 1.6 at 95 % ('bootstrap'); at most 1.5: MISSED" in texts(verdict, Status.ATTESTED)
    assert "stands: accepted" in texts(verdict, Status.CHECKED)
    assert "accept " in texts(verdict, Status.CHECKED)
    assert "'as agreed'" in texts(verdict, Status.CHECKED)
    assert "replay: 1 of 6 steps were re-executed and came out as recorded: data-source-2" in texts(
        verdict, Status.ATTESTED
    )


def test_weights_nobody_evaluated_are_no() -> None:
    told = begun()
    told.ledger.seal(told.run.evaluation())
    told.ledger.seal(*told.run.step())
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert "0 of these weights" in texts(verdict, Status.FAILED)
    assert "the campaign is open" in texts(verdict, Status.NOT_COVERED)


def test_open_finding_is_no_also_after_release() -> None:
    told = begun()
    met = sealed(told, told.run.evaluation())
    told.ledger.seal(told.run.release())
    assert judged(told).answer is Answer.YES
    told.ledger.seal(told.ledger.decision(told.run.id, met.id, REJECT, rationale="wrong data"))
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert met.id.hex() in texts(verdict, Status.FAILED)


def test_evaluation_that_was_rejected_and_accepted_again_is_yes() -> None:
    told = begun()
    met = sealed(told, told.run.evaluation())
    for outcome, answer in ((REJECT, Answer.NO), (ACCEPT, Answer.YES), (REJECT, Answer.NO), (ACCEPT, Answer.YES)):
        told.ledger.seal(told.ledger.decision(told.run.id, met.id, outcome, rationale=f"now {outcome}"))
        assert judged(told).answer is answer
    assert "stands: accepted" in texts(judged(told), Status.CHECKED)


def test_quorum_of_liars_cannot_drop_a_finding_from_the_open_ones() -> None:
    told = begun()
    missed = sealed(told, told.run.evaluation(high_micro=1_600_000))
    told.ledger.seal(told.run.evaluation(name="other"))
    head = msgspec.structs.replace(head_of(told.run), open_findings=())
    told.ledger.collude([], {CAMPAIGN_HEAD_TABLE + told.run.id: encode(head)})
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert "open findings say otherwise" in texts(verdict, Status.FAILED)
    assert standing(told, missed) == "unmet"


def test_differing_audit_is_told_in_its_auditors_name() -> None:
    told = begun(3)
    told.ledger.seal(told.run.evaluation())
    told.ledger.seal(
        told.ledger.audit_result(LIBRARIAN, told.run.id, last_step=3, matched=1, differing=("optimizer state",))
    )
    verdict = judged(told)
    assert "step 2 did NOT come out as recorded: data-source-1" in texts(verdict, Status.ATTESTED)
    assert "'optimizer state' differed" in texts(verdict, Status.CHECKED)


def bundle_of(told: Story) -> Bundle:
    encoded = export_bundle(told.ledger, Predicate.EVALUATED, campaign=told.run.id)
    return decode(encoded[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)


def kind_of(event: object) -> Kind:
    return decode(event.entry, Entry, 1 << 16).kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Kind.EVALUATION, Kind.DECISION, Kind.AUDIT_RESULT])
def test_hidden_review_makes_the_bundle_incomplete_and_its_portion_the_answer_unknown(kind: Kind) -> None:
    told = story()
    bundle = bundle_of(told)
    left = msgspec.structs.replace(bundle, events=tuple(e for e in bundle.events if kind_of(e) is not kind))
    with pytest.raises(Rejected) as caught:
        judged(told, encode_bundle(left))
    assert caught.value.reason is Reason.BUNDLE_INCOMPLETE
    closed = msgspec.structs.replace(
        bundle,
        events=tuple(
            msgspec.structs.replace(e, governance=None, operation=None) if kind_of(e) is kind else e
            for e in bundle.events
        ),
    )
    assert judged(told, encode_bundle(closed)).answer is (Answer.NO if kind is Kind.DECISION else Answer.UNKNOWN)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_hidden_range_makes_the_bundle_incomplete(which: int) -> None:
    told = story()
    bundle = bundle_of(told)
    left = msgspec.structs.replace(bundle, ranges=bundle.ranges[:which] + bundle.ranges[which + 1 :])
    with pytest.raises(Rejected) as caught:
        judged(told, encode_bundle(left))
    assert caught.value.reason is Reason.BUNDLE_INCOMPLETE


@pytest.mark.parametrize(
    ("standing", "problem"),
    [("met", "1 of its thresholds are missed"), ("accepted", "no decision of governance accepts it")],
)
def test_quorum_of_liars_cannot_have_a_miss_stand_otherwise(standing: str, problem: str) -> None:
    told = begun()
    missed = told.run.evaluation(high_micro=1_600_000)
    record = EvaluationRecord(told.run.id, missed.id, digest("test"), 1, told.run.root(), standing, 0)
    head = msgspec.structs.replace(head_of(told.run), next_sequence=told.run.sequence)
    lies = {
        review_key(EVALUATION_TABLE, told.run.id, missed.id): encode(record),
        CAMPAIGN_HEAD_TABLE + told.run.id: encode(head),
    }
    told.ledger.collude([missed], lies)
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert problem in texts(verdict, Status.FAILED)


def test_audit_result_names_what_it_ran_on() -> None:
    told = begun()
    event = told.ledger.audit_result(HOSPITAL, told.run.id)
    assert isinstance(event.governance, AuditResult)
    assert event.governance.environment == (p.Setting("torch", "2.13.0"),)
