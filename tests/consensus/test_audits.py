"""Audits by lot: who may ask, what picks the steps, what an answer must be, and what a bundle proves of them."""

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
from epoch_fixtures import begin_epoch
from ledger_fixtures import HOSPITAL, LIBRARIAN, OPERATOR, Story, begin, digest
from rules_fixtures import SEVERAL, assert_admitted, assert_refused, head_of, remake

from consensus import bls
from consensus.beacon import beacon_key, beacon_message, make_beacon, picked_steps
from consensus.bundle import MAGIC, MAX_BUNDLE_BYTES, Bundle, encode_bundle, open_bundle
from consensus.certificate import BadCertificateShares, certificate_message
from consensus.certificate_schemes import scheme_for
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent, Entry, Kind
from consensus.identifiers import VOTING_ROLES, Digest, View
from consensus.membership import BLS_MULTISIG
from consensus.predicates import Answer, Predicate, Status, Verdict, verify
from consensus.predicates.reviews import Audit, replayed_steps
from consensus.rejection import Reason, Rejected
from consensus.review import ACCEPT, NOTE, REJECT, AuditAnswer, AuditChallenge, AuditResult, PickedStep
from consensus.review_rules import MAX_OPEN_EVALUATIONS
from consensus.state import (
    AUDIT_TABLE,
    CAMPAIGN_HEAD_TABLE,
    CHALLENGE_TABLE,
    AuditRecord,
    ChallengeRecord,
    read_record,
    review_key,
)
from node.bundles import export_bundle

HOUR_MS = 3_600_000
FOUR = {"data-source": 4, "governance": 4, "operator": 4, "verifier": 1}
"""Three of four sign for each role: most shares are left over."""


def taken(steps: int = 5, counts: dict[str, int] | None = None, auditors: tuple[str, ...] = ()) -> Story:
    """A campaign that took some steps, under a policy that names auditors, or none."""
    told = begin(counts=counts)
    if auditors:
        told.ledger.seal(told.ledger.policy(auditors=tuple(told.ledger.ids[name] for name in auditors)))
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    for _ in range(steps):
        told.ledger.seal(*told.run.step())
    return told


def sealed(told: Story, event: CheckedEvent) -> CheckedEvent:
    told.ledger.seal(event)
    return event


def challenged(told: Story, auditor: str = HOSPITAL, **fields: object) -> CheckedEvent:
    return sealed(told, told.ledger.audit_challenge(auditor, told.run.id, **fields))  # type: ignore[arg-type]


def record_of(told: Story, challenge: CheckedEvent) -> ChallengeRecord:
    value = told.ledger.state.get(review_key(CHALLENGE_TABLE, told.run.id, challenge.id))
    assert value is not None
    return read_record(value, ChallengeRecord)


def picks_of(answer: CheckedEvent) -> tuple[int, ...]:
    assert isinstance(answer.governance, AuditResult)
    assert answer.governance.answer is not None
    return tuple(each.step for each in answer.governance.answer.picked)


# What picks


def test_picked_steps_are_different_steps_of_the_range_rising() -> None:
    beacon = bytes(96)
    for first, last, picks in ((1, 1, 1), (3, 9, 7), (10, 1_000, 256), (1, 2**53 - 1, 5)):
        found = picked_steps(beacon, first, last, picks)
        assert len(set(found)) == picks
        assert list(found) == sorted(found)
        assert first <= found[0] <= found[-1] <= last
    assert picked_steps(beacon, 3, 9, 7) == tuple(range(3, 10))


def test_every_step_is_picked_as_often_as_any_other() -> None:
    counts = Counter(step for number in range(2_000) for step in picked_steps(digest(number), 1, 10, 3))
    assert len(counts) == 10
    assert all(500 < count < 700 for count in counts.values()), counts


def test_beacon_is_one_value_whichever_members_give_their_shares() -> None:
    told = taken(1, FOUR)
    ledger = told.ledger
    message = beacon_message(ledger.chain_id, 0, told.run.id, 1)
    shares = ledger._shares(message)
    whole = make_beacon(ledger.scheme, message, shares)
    for left_out in range(4):
        names = [ledger.committee.role_members(role)[left_out].id for role in VOTING_ROLES]
        assert make_beacon(ledger.scheme, message, {m: s for m, s in shares.items() if m not in names}) == whole
    bls.verify(beacon_key(ledger.committee), message, whole)


@pytest.mark.parametrize("role", VOTING_ROLES)
def test_without_a_quorum_of_any_one_role_there_is_no_beacon(role: str) -> None:
    ledger = taken(1, FOUR).ledger
    message = beacon_message(ledger.chain_id, 0, digest("campaign"), 1)
    few = {member.id for member in ledger.committee.role_members(role)[:2]}  # type: ignore[arg-type]
    shares = {member: share for member, share in ledger._shares(message).items() if member not in few}
    with pytest.raises(Rejected) as caught:
        make_beacon(ledger.scheme, message, shares)
    assert caught.value.reason is Reason.QUORUM_NOT_REACHED


def test_bad_share_is_laid_at_its_members_door() -> None:
    ledger = taken(1).ledger
    message = beacon_message(ledger.chain_id, 0, digest("campaign"), 1)
    culprit = ledger.ids[LIBRARIAN]
    shares = {**ledger._shares(message), culprit: ledger._shares(b"other")[culprit]}
    with pytest.raises(BadCertificateShares) as caught:
        make_beacon(ledger.scheme, message, shares)
    assert caught.value.culprits == (culprit,)


def test_share_of_a_certificate_serves_no_beacon_and_of_a_beacon_no_certificate() -> None:
    ledger = taken(1).ledger
    campaign = digest("campaign")
    beacon = beacon_message(ledger.chain_id, 0, campaign, 1)
    certificate = certificate_message(ledger.chain_id, 0, View(1), Digest(campaign))
    for given, asked in ((certificate, beacon), (beacon, certificate)):
        with pytest.raises(BadCertificateShares):
            make_beacon(ledger.scheme, asked, ledger._shares(given))


@pytest.mark.parametrize("scheme", [BLS_MULTISIG, "ed25519"])
def test_challenge_where_certificates_have_no_unique_signature_is_refused(scheme: str) -> None:
    told = begin(certificate_scheme=scheme)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    for _ in range(5):
        told.ledger.seal(*told.run.step())
    assert_refused(told.ledger, told.ledger.audit_challenge(HOSPITAL, told.run.id), Reason.NO_BEACON)
    with pytest.raises(Rejected) as caught:
        make_beacon(scheme_for(told.ledger.genesis), b"", {})
    assert caught.value.reason is Reason.NO_BEACON


# Challenges


def test_challenge_is_kept_with_the_key_of_its_epoch() -> None:
    told = taken()
    challenge = challenged(told)
    record = record_of(told, challenge)
    assert (record.number, record.picks, record.standing, record.barring) == (1, 2, "open", False)
    assert (record.epoch, record.beacon_key) == (0, beacon_key(told.ledger.committee))
    assert head_of(told.run).next_audit == 2
    assert_refused(told.ledger, challenge, Reason.DUPLICATE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"number": 2}, Reason.SEQUENCE_GAP),
        ({"first_step": 4, "last_step": 3, "picks": 1}, Reason.BAD_FIELD),
        ({"picks": 5}, Reason.BAD_FIELD),
        ({"last_step": 6}, Reason.STEP_CHAIN_BROKEN),
        ({"answer_by_ms": 0}, Reason.BAD_FIELD),
        ({"answer_by_ms": 2**53 - 1}, Reason.BAD_FIELD),
    ],
)
def test_challenge_that_breaks_a_rule_is_refused(change: dict[str, object], reason: Reason) -> None:
    told = taken()
    assert_refused(told.ledger, told.ledger.audit_challenge(HOSPITAL, told.run.id, **change), reason)  # type: ignore[arg-type]


def test_time_to_answer_is_bounded_on_both_sides() -> None:
    told = taken()
    now = told.ledger.now_ms
    for answer_by, admitted in (
        (600_000, True),
        (599_999, False),
        (90 * 86_400_000, True),
        (90 * 86_400_000 + 1, False),
    ):
        event = told.ledger.audit_challenge(HOSPITAL, told.run.id, answer_by_ms=now + answer_by)
        if admitted:
            assert_admitted(told.ledger, event)
        else:
            assert_refused(told.ledger, event, Reason.BAD_FIELD)


def test_number_is_used_once() -> None:
    told = taken()
    challenged(told)
    assert_refused(told.ledger, told.ledger.audit_challenge(LIBRARIAN, told.run.id), Reason.DUPLICATE)
    challenged(told, LIBRARIAN, number=2)


def test_step_that_can_still_be_undone_is_not_audited() -> None:
    """Else its operator, seeing it picked, would take it back and take it again."""
    told = taken(4)
    event = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    assert "only those to 3 can no longer be undone" in assert_refused(told.ledger, event, Reason.STEP_CHAIN_BROKEN)
    told.ledger.seal(*told.run.step())
    assert_admitted(told.ledger, event)
    told.ledger.seal(told.run.rollback("operator-decision"))
    assert_admitted(told.ledger, event)


def test_last_step_of_a_closed_campaign_is_audited() -> None:
    told = taken(4)
    told.ledger.seal(told.run.release())
    challenge = challenged(told)
    answer = told.ledger.audit_answer(challenge)
    last = picks_of(answer)[-1] == 4
    root = told.run.root() if last else digest("root")
    told.ledger.seal(told.ledger.audit_answer(challenge, end_root=root))


def test_end_root_of_an_answer_about_the_last_step_is_the_heads() -> None:
    told = taken(2)
    told.ledger.seal(told.run.release())
    challenge = challenged(told, last_step=2)
    lie = told.ledger.audit_answer(challenge, end_root=digest("other"))
    assert_refused(told.ledger, lie, Reason.PARAMETER_ROOT_BROKEN)
    told.ledger.seal(told.ledger.audit_answer(challenge, end_root=told.run.root()))


def test_operator_challenges_and_answers_nobody() -> None:
    told = taken()
    with pytest.raises(Rejected) as caught:
        told.ledger.audit_challenge(OPERATOR, told.run.id)
    assert caught.value.reason is Reason.WRONG_ROLE
    challenge = challenged(told)
    with pytest.raises(Rejected) as caught:
        told.ledger.audit_answer(challenge, auditor=OPERATOR)
    assert caught.value.reason is Reason.WRONG_ROLE


def test_policy_that_names_auditors_lets_nobody_else_ask() -> None:
    told = taken(counts=SEVERAL, auditors=("verifier-1",))
    other = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    assert_refused(told.ledger, other, Reason.WRONG_AUTHOR)
    with pytest.raises(Rejected):
        told.ledger.seal(other)


def test_policy_names_members_that_are_no_operators_once_each() -> None:
    told = begin()
    ledger = told.ledger
    assert_refused(ledger, ledger.policy(auditors=(ledger.ids[OPERATOR],)), Reason.WRONG_ROLE)
    assert_refused(ledger, ledger.policy(auditors=(digest("nobody"),)), Reason.UNKNOWN_MEMBER)
    assert_refused(ledger, ledger.policy(auditors=(ledger.ids[HOSPITAL],) * 2), Reason.BAD_FIELD)


# Answers


def test_answer_that_passed_settles_the_audit() -> None:
    told = taken()
    challenge = challenged(told)
    answer = sealed(told, told.ledger.audit_answer(challenge))
    record = record_of(told, challenge)
    assert (record.standing, record.answer) == ("passed", answer.id)
    assert_refused(told.ledger, told.ledger.audit_answer(challenge, statement="again"), Reason.DUPLICATE)


def test_answer_with_a_difference_stands_as_such() -> None:
    told = taken()
    challenge = challenged(told)
    step = picks_of(told.ledger.audit_answer(challenge))[1]
    told.ledger.seal(told.ledger.audit_answer(challenge, differing_at={step: ("tensor head.bias",)}))
    assert record_of(told, challenge).standing == "differed"


def spoiled(answer: CheckedEvent, change: Callable[[AuditAnswer], AuditAnswer]) -> AuditAnswer:
    assert isinstance(answer.governance, AuditResult)
    assert answer.governance.answer is not None
    return change(answer.governance.answer)


def replaced(**fields: object) -> Callable[[AuditAnswer], AuditAnswer]:
    return lambda answer: msgspec.structs.replace(answer, **fields)


def other_steps(answer: AuditAnswer) -> AuditAnswer:
    left_out = ({1, 2, 3, 4} - {each.step for each in answer.picked}).pop()
    steps = sorted([left_out, answer.picked[0].step])
    return msgspec.structs.replace(answer, picked=tuple(PickedStep(step, ()) for step in steps))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced(challenge=digest("no challenge")), Reason.NOT_FOUND),
        (replaced(beacon=bls.sign(bls.Secret(7), b"forged")), Reason.BAD_SIGNATURE),
        (replaced(beacon=bytes(96)), Reason.BAD_SIGNATURE),
        (other_steps, Reason.NOT_PICKED),
        (lambda answer: replaced(picked=answer.picked[::-1])(answer), Reason.NOT_PICKED),
    ],
)
def test_forged_answer_is_refused(change: Callable[[AuditAnswer], AuditAnswer], reason: Reason) -> None:
    told = taken()
    challenge = challenged(told)
    honest = told.ledger.audit_answer(challenge)
    assert_refused(told.ledger, told.ledger.audit_answer(challenge, answer=spoiled(honest, change)), reason)


def test_answer_about_fewer_steps_than_picked_is_refused() -> None:
    told = taken()
    challenge = challenged(told)
    honest = told.ledger.audit_answer(challenge)
    answer = spoiled(honest, lambda answer: replaced(picked=answer.picked[:1])(answer))
    assert_refused(told.ledger, told.ledger.audit_answer(challenge, answer=answer, matched=1), Reason.NOT_PICKED)


def test_beacon_of_another_audit_or_campaign_is_refused() -> None:
    told = taken()
    challenge = challenged(told)
    for beacon in (told.ledger.beacon(told.run.id, 2), told.ledger.beacon(digest("other"), 1)):
        assert_refused(told.ledger, told.ledger.audit_answer(challenge, beacon=beacon), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"first_step": 2}, Reason.BAD_FIELD),
        ({"matched": 1}, Reason.BAD_FIELD),
        ({"differing": ("a tensor",)}, Reason.BAD_FIELD),
    ],
)
def test_result_that_does_not_fit_its_answer_is_refused(change: dict[str, object], reason: Reason) -> None:
    told = taken()
    challenge = challenged(told)
    assert_refused(told.ledger, told.ledger.audit_answer(challenge, **change), reason)  # type: ignore[arg-type]


def test_answer_of_which_nothing_came_out_has_no_root() -> None:
    told = taken()
    challenge = challenged(told)
    differing = dict.fromkeys(picks_of(told.ledger.audit_answer(challenge)), ("parameters",))
    lie = told.ledger.audit_answer(challenge, differing_at=differing, end_root=digest("root"))
    assert_refused(told.ledger, lie, Reason.BAD_FIELD)
    assert_admitted(told.ledger, told.ledger.audit_answer(challenge, differing_at=differing))


def test_answer_is_given_by_whoever_asked() -> None:
    told = taken()
    challenge = challenged(told)
    assert_refused(told.ledger, told.ledger.audit_answer(challenge, auditor=LIBRARIAN), Reason.WRONG_AUTHOR)


def test_late_answer_is_refused() -> None:
    told = taken()
    challenge = challenged(told)
    answer = told.ledger.audit_answer(challenge)
    answer_by = record_of(told, challenge).answer_by_ms
    assert_admitted(told.ledger, answer, at_ms=answer_by)
    assert_refused(told.ledger, answer, Reason.AUDIT_LATE, at_ms=answer_by + 1)


def test_beacon_is_of_the_epoch_in_which_the_challenge_became_final() -> None:
    told = taken(counts=FOUR)
    challenge = challenged(told)
    old = told.ledger.beacon(told.run.id)
    begin_epoch(told.ledger, remove=["governance-4"])
    new = told.ledger.beacon(told.run.id)
    assert new != old
    assert_refused(told.ledger, told.ledger.audit_answer(challenge, beacon=new), Reason.BAD_SIGNATURE)
    told.ledger.seal(told.ledger.audit_answer(challenge, beacon=old))
    assert record_of(told, challenge).standing == "passed"
    assert "in epoch 0 picks steps" in texts(judged(told), Status.CHECKED)


def test_auditor_that_changed_its_key_answers_for_what_it_asked() -> None:
    told = taken(counts=FOUR, auditors=("verifier-1",))
    challenge = challenged(told, "verifier-1")
    beacon = told.ledger.beacon(told.run.id)
    begin_epoch(told.ledger, rotate=["verifier-1"])
    told.ledger.seal(told.ledger.audit_answer(challenge, beacon=beacon, auditor="verifier-1"))
    challenged(told, "verifier-1", number=2)


# What bars a release


def test_what_a_named_auditor_asks_for_bars_the_release_until_it_passed() -> None:
    told = taken(auditors=(HOSPITAL,))
    challenge = challenged(told)
    assert head_of(told.run).open_findings == (challenge.id,)
    assert_refused(told.ledger, told.run.release(), Reason.FINDING_OPEN)
    told.run.sequence -= 1
    told.ledger.seal(told.run.evaluation())
    assert head_of(told.run).open_findings == (challenge.id,), "an evaluation closes no audit"
    told.ledger.seal(told.ledger.audit_answer(challenge))
    told.ledger.seal(told.run.release())


def test_missed_thresholds_of_the_operators_own_making_leave_room_for_what_an_auditor_asks() -> None:
    told = taken(auditors=(HOSPITAL,))
    names = [f"test {number}" for number in range(MAX_OPEN_EVALUATIONS)]
    for name in names:
        told.ledger.seal(told.run.evaluation(high_micro=1_600_000, name=name))
    assert_refused(told.ledger, told.run.evaluation(high_micro=1_600_000, name="another"), Reason.OVERSIZED)
    told.run.sequence -= 1
    challenge = challenged(told)
    told.ledger.seal(*(told.run.evaluation(name=name) for name in names))
    assert head_of(told.run).open_findings == (challenge.id,)
    assert_refused(told.ledger, told.run.release(), Reason.FINDING_OPEN)


def test_audit_that_nobody_answers_bars_the_release_until_governance_accepts() -> None:
    told = taken(auditors=(HOSPITAL,))
    challenge = challenged(told)
    told.ledger.seal(after_ms=2 * HOUR_MS)
    assert_refused(told.ledger, told.ledger.audit_answer(challenge), Reason.AUDIT_LATE)
    told.ledger.seal(told.ledger.decision(told.run.id, challenge.id, ACCEPT, rationale="the auditor was ill"))
    assert record_of(told, challenge).standing == "accepted"
    told.ledger.seal(told.run.release())


def test_audit_that_differed_bars_the_release_until_governance_accepts() -> None:
    told = taken(auditors=(HOSPITAL,))
    challenge = challenged(told)
    step = picks_of(told.ledger.audit_answer(challenge))[0]
    told.ledger.seal(told.ledger.audit_answer(challenge, differing_at={step: ("optimizer state",)}))
    assert_refused(told.ledger, told.run.release(), Reason.FINDING_OPEN)
    told.run.sequence -= 1
    told.ledger.seal(told.ledger.decision(told.run.id, challenge.id, ACCEPT, rationale="another build of torch"))
    told.ledger.seal(told.run.release())


def test_what_anybody_asks_for_bars_nothing() -> None:
    told = taken()
    challenge = challenged(told)
    step = picks_of(told.ledger.audit_answer(challenge))[0]
    told.ledger.seal(told.ledger.audit_answer(challenge, differing_at={step: ("optimizer state",)}))
    assert head_of(told.run).open_findings == ()
    told.ledger.seal(told.run.release())


def test_what_governance_rejected_or_accepted_an_answer_leaves_as_it_is() -> None:
    for outcome, standing in ((REJECT, "rejected"), (ACCEPT, "accepted")):
        told = taken()
        challenge = challenged(told)
        told.ledger.seal(told.ledger.decision(told.run.id, challenge.id, outcome))
        told.ledger.seal(told.ledger.audit_answer(challenge))
        assert record_of(told, challenge).standing == standing
        assert head_of(told.run).open_findings == ((challenge.id,) if outcome == REJECT else ())


def test_others_note_an_audit_and_do_not_accept_it() -> None:
    told = taken()
    challenge = challenged(told)
    for author in (HOSPITAL, OPERATOR):
        event = told.ledger.decision(told.run.id, challenge.id, ACCEPT, [author])
        assert_refused(told.ledger, event, Reason.WRONG_ROLE)
        assert_admitted(told.ledger, told.ledger.decision(told.run.id, challenge.id, NOTE, [author]))


def test_named_auditors_open_findings_are_bounded() -> None:
    told = taken(auditors=(HOSPITAL,))
    for number in range(1, 65):
        challenged(told, number=number)
    event = told.ledger.audit_challenge(HOSPITAL, told.run.id, 65)
    assert_refused(told.ledger, event, Reason.OVERSIZED)


# Predicates


def texts(verdict: Verdict, status: Status) -> str:
    return "\n".join(step.text for step in verdict.steps if step.status is status)


def bundle_of(told: Story, predicate: Predicate = Predicate.EVALUATED) -> Bundle:
    encoded = export_bundle(told.ledger, predicate, campaign=told.run.id)
    return decode(encoded[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)


def judged(told: Story, bundle: Bundle | None = None, predicate: Predicate = Predicate.EVALUATED) -> Verdict:
    encoded = encode_bundle(bundle or bundle_of(told, predicate))
    return verify(open_bundle(anchor(told.ledger.genesis, told.ledger.chain_id), encoded), predicate)


def evaluated(steps: int = 5, auditors: tuple[str, ...] = ()) -> Story:
    told = taken(steps, auditors=auditors)
    told.ledger.seal(told.run.evaluation())
    return told


def test_audit_that_passed_is_told_with_the_steps_its_beacon_picked() -> None:
    told = evaluated()
    challenge = challenged(told)
    answer = sealed(told, told.ledger.audit_answer(challenge))
    verdict = judged(told)
    assert verdict.answer is Answer.YES
    first, second = picks_of(answer)
    checked = texts(verdict, Status.CHECKED)
    assert "audit 1 by data-source-2, entry" in checked
    assert "stands: passed" in checked
    assert f"the unique signature of every role in epoch 0 picks steps {first}, {second}, and the answer" in checked
    assert "of steps 1 to 4: 2 picked by lot, 2 came out as recorded, bit for bit" in checked
    for predicate in (Predicate.EVALUATED, Predicate.DELTA_EXACT):
        told_of = texts(judged(told, predicate=predicate), Status.ATTESTED)
        assert "replay: 2 of 5 steps were re-executed and came out as recorded: data-source-2" in told_of


def test_audit_that_nobody_answered_is_told_as_failed_once_its_time_is_over() -> None:
    told = evaluated()
    challenged(told)
    for predicate in (Predicate.EVALUATED, Predicate.DELTA_EXACT):
        assert "audit 1 by data-source-2: 2 of the steps 1 to 4, by lot, to be answered by" in texts(
            judged(told, predicate=predicate), Status.NOT_COVERED
        )
    told.ledger.seal(after_ms=2 * HOUR_MS)
    for predicate in (Predicate.EVALUATED, Predicate.DELTA_EXACT):
        assert "by lot, has FAILED: no answer came by" in texts(judged(told, predicate=predicate), Status.CHECKED)
    assert judged(told).answer is Answer.YES


def test_failed_audit_of_a_named_auditor_is_no_until_governance_accepts_it() -> None:
    told = evaluated(auditors=(HOSPITAL,))
    challenge = challenged(told)
    told.ledger.seal(after_ms=2 * HOUR_MS)
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert challenge.id.hex() in texts(verdict, Status.FAILED)
    told.ledger.seal(told.ledger.decision(told.run.id, challenge.id, ACCEPT))
    assert judged(told).answer is Answer.YES


def test_differing_step_of_an_audit_is_told() -> None:
    told = evaluated()
    challenge = challenged(told)
    step = picks_of(told.ledger.audit_answer(challenge))[1]
    told.ledger.seal(told.ledger.audit_answer(challenge, differing_at={step: ("tensor head.bias",)}))
    verdict = judged(told)
    assert f"step {step} did NOT come out as recorded: data-source-2" in texts(verdict, Status.ATTESTED)
    assert "'tensor head.bias' differed" in texts(verdict, Status.CHECKED)
    assert "replay: 1 of 5 steps" in texts(verdict, Status.ATTESTED)


def kind_of(event: object) -> Kind:
    return decode(event.entry, Entry, 1 << 16).kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Kind.AUDIT_CHALLENGE, Kind.AUDIT_RESULT])
def test_hidden_audit_makes_the_bundle_incomplete_and_its_portion_the_answer_unknown(kind: Kind) -> None:
    told = evaluated()
    challenge = challenged(told)
    told.ledger.seal(told.ledger.audit_answer(challenge))
    bundle = bundle_of(told)
    left = msgspec.structs.replace(bundle, events=tuple(e for e in bundle.events if kind_of(e) is not kind))
    with pytest.raises(Rejected) as caught:
        judged(told, left)
    assert caught.value.reason is Reason.BUNDLE_INCOMPLETE
    closed = tuple(msgspec.structs.replace(e, governance=None) if kind_of(e) is kind else e for e in bundle.events)
    assert judged(told, msgspec.structs.replace(bundle, events=closed)).answer is Answer.UNKNOWN


Lie = Callable[[Story, ChallengeRecord], tuple[ChallengeRecord, tuple[bytes, ...]]]


def says(**fields: object) -> Lie:
    return lambda told, record: (msgspec.structs.replace(record, **fields), ())


def barring(told: Story, record: ChallengeRecord) -> tuple[ChallengeRecord, tuple[bytes, ...]]:
    return msgspec.structs.replace(record, barring=True, standing="differed"), ()


@pytest.mark.parametrize(
    ("lie", "problem"),
    [
        (says(picks=3), "its record differs"),
        (barring, "the campaign's open findings say otherwise"),
        (says(standing="accepted"), "no decision of governance accepts it"),
        (says(answer=b""), "there is no answer"),
        (says(standing="differed"), "by its answer it passed"),
    ],
)
def test_quorum_of_liars_cannot_have_an_audit_stand_otherwise(lie: Lie, problem: str) -> None:
    told = evaluated()
    challenge = challenged(told)
    told.ledger.seal(told.ledger.audit_answer(challenge))
    record, findings = lie(told, record_of(told, challenge))
    head = msgspec.structs.replace(head_of(told.run), open_findings=findings)
    lies = {
        review_key(CHALLENGE_TABLE, told.run.id, challenge.id): encode(record),
        CAMPAIGN_HEAD_TABLE + told.run.id: encode(head),
    }
    told.ledger.collude([], lies)
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert problem in texts(verdict, Status.FAILED)


def test_quorum_of_liars_cannot_have_a_forged_beacon_pick() -> None:
    told = evaluated()
    challenge = challenged(told)
    secret = bls.Secret(7)
    record = msgspec.structs.replace(record_of(told, challenge), beacon_key=bls.public_key(secret))
    message = beacon_message(told.ledger.chain_id, 0, told.run.id, 1)
    forged = told.ledger.audit_answer(challenge, beacon=bls.sign(secret, message))
    told.ledger.seal_lying(forged, lies={review_key(CHALLENGE_TABLE, told.run.id, challenge.id): record})
    verdict = judged(told)
    assert verdict.answer is Answer.NO
    assert "no BLS signature by" in texts(verdict, Status.FAILED)


def test_quorum_of_liars_cannot_have_an_answer_about_other_steps_or_another_audit() -> None:
    told = evaluated()
    challenge = challenged(told)
    honest = told.ledger.audit_answer(challenge)
    for change, problem in (
        (other_steps, "the answer is about other steps"),
        (replaced(challenge=digest("another")), "the answer is another audit's"),
    ):
        lie = told.ledger.audit_answer(challenge, answer=spoiled(honest, change))
        assert isinstance(lie.governance, AuditResult)
        answer = lie.governance.answer
        assert answer is not None
        record = msgspec.structs.replace(record_of(told, challenge), answer=lie.id, standing="passed")
        kept = AuditRecord(
            told.run.id, lie.id, lie.entry.author, 1, 4, 2, answer.challenge, answer.matching, answer.differing, 0
        )
        told.ledger.collude(
            [lie],
            {
                review_key(CHALLENGE_TABLE, told.run.id, challenge.id): encode(record),
                review_key(AUDIT_TABLE, told.run.id, lie.id): encode(kept),
            },
        )
        assert problem in texts(judged(told), Status.FAILED)


def test_record_of_an_audit_names_its_challenges_event() -> None:
    told = evaluated()
    challenge = challenged(told)
    record = msgspec.structs.replace(record_of(told, challenge), auditor=told.ledger.ids[LIBRARIAN])
    told.ledger.collude([], {review_key(CHALLENGE_TABLE, told.run.id, challenge.id): encode(record)})
    with pytest.raises(Rejected, match="is no audit challenge of data-source-1"):
        judged(told)


def test_steps_picked_and_steps_taken_in_a_row_are_counted_once() -> None:
    def whole(first: int, last: int) -> Audit:
        return Audit(AuditRecord(bytes(32), bytes(32), bytes(32), first, last, last - first + 1, b"", (), (), 0), "a")

    def by_lot(*steps: int) -> Audit:
        return Audit(AuditRecord(bytes(32), bytes(32), bytes(32), 1, 99, 0, bytes(32), steps, (), 0), "b")

    assert replayed_steps([by_lot(2, 7, 50)]) == 3
    assert replayed_steps([whole(1, 10), by_lot(2, 7, 50), by_lot(50, 51)]) == 12


def test_challenge_of_an_unknown_campaign_or_with_a_sequence_is_refused() -> None:
    told = taken()
    assert_refused(told.ledger, told.ledger.audit_challenge(HOSPITAL, digest("other")), Reason.UNKNOWN_CAMPAIGN)
    event = told.ledger.audit_challenge(HOSPITAL, told.run.id)
    assert isinstance(event.governance, AuditChallenge)
    assert_refused(told.ledger, remake(told.run, event, sequence=1), Reason.BAD_FIELD)
