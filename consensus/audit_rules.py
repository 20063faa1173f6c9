"""Admission of audits: challenges, whose steps are picked by lot, and results (``review.py``, ``beacon.py``).

* *audit challenge*: by a member that is not an operator, and if the policy in force names auditors by one of them. Of
  steps that can no longer be undone: one that could be would be undone as soon as it is picked ◆.
* *audit result*: by a member that is not an operator, of steps on the log. As the *answer* to a challenge by whoever
  asked, in time, with the beacon and about exactly the steps that it picks.

What an auditor named by the policy asks for bars a release until it passed, or governance accepts it; no answer in time
is no pass. Naming auditors is governance's consent to that. What others ask for, or find, bars nothing: any member
could stop every release.
"""

import msgspec

from consensus import bls
from consensus.beacon import beacon_key, beacon_message, picked_steps
from consensus.campaign_rules import changed, check_sequence
from consensus.event import CheckedEvent
from consensus.identifiers import ZERO_DIGEST, ChainId
from consensus.membership import Committee
from consensus.membership_change import holder
from consensus.rejection import Reason, Rejected
from consensus.review import AuditAnswer, AuditChallenge, AuditResult, check_audit
from consensus.review_rules import reviewed_campaign, with_finding
from consensus.state import (
    AUDIT_TABLE,
    CAMPAIGN_HEAD_TABLE,
    CHALLENGE_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    AuditRecord,
    CampaignHead,
    ChallengeRecord,
    ChallengeStanding,
    PolicyHead,
    PolicyRecord,
    StateView,
    review_key,
)

LEAST_ANSWER_MS = 10 * 60_000
MOST_ANSWER_MS = 90 * 86_400_000
"""How long an answer may take, from the challenge's ledger block on."""


def admit_audit_challenge(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check a challenge; one by an auditor that the policy names becomes an open finding.

    Raises:
        Rejected: with the rule it breaks.
    """
    challenge = event.governance
    assert isinstance(challenge, AuditChallenge)
    campaign = event.entry.campaign
    _, head, key = reviewed_campaign(view, event, CHALLENGE_TABLE, ChallengeRecord)
    verifies = beacon_key(committee)
    check_sequence(challenge.number, head.next_audit, "audit")
    count = challenge.last_step - challenge.first_step + 1
    if challenge.picks > count:
        raise Rejected(
            Reason.BAD_FIELD, f"{challenge.picks} of the steps {challenge.first_step} to {challenge.last_step}"
        )
    settled = settled_steps(head)
    if challenge.last_step > settled:
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN,
            f"audits steps to {challenge.last_step}, only those to {settled} can no longer be undone",
        )
    if not timestamp_ms + LEAST_ANSWER_MS <= challenge.answer_by_ms <= timestamp_ms + MOST_ANSWER_MS:
        raise Rejected(
            Reason.BAD_FIELD,
            f"to be answered by {challenge.answer_by_ms} ms, it is {timestamp_ms} ms: expected {LEAST_ANSWER_MS} to "
            f"{MOST_ANSWER_MS} ms from now",
        )
    in_force = view.get(POLICY_HEAD_KEY, PolicyHead, Reason.UNKNOWN_POLICY, "policy").policy
    policy = view.get(POLICY_TABLE + in_force, PolicyRecord, Reason.UNKNOWN_POLICY, "policy").policy
    barring = bool(policy.auditors)
    if barring and event.entry.author not in {holder(view, auditor) for auditor in policy.auditors}:
        raise Rejected(Reason.WRONG_AUTHOR, f"policy {in_force.hex()} names who audits, and not this member")
    record = ChallengeRecord(
        campaign=campaign,
        event=event.id,
        auditor=event.entry.author,
        number=challenge.number,
        first_step=challenge.first_step,
        last_step=challenge.last_step,
        picks=challenge.picks,
        answer_by_ms=challenge.answer_by_ms,
        epoch=committee.epoch,
        beacon_key=verifies,
        barring=barring,
        answer=b"",
        standing=ChallengeStanding.OPEN.value,
        recorded_at_ms=timestamp_ms,
    )
    view.put(key, record)
    counted = changed(head, next_audit=head.next_audit + 1)
    view.put(CAMPAIGN_HEAD_TABLE + campaign, with_finding(counted, event.id, stands_open=record.stands_open))


def settled_steps(head: CampaignHead) -> int:
    """How many steps of a campaign no rollback can take back any more."""
    return head.steps - 1 if head.undo_root and not head.closed else head.steps


def admit_audit_result(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check that an audit result is about steps on the log, and of an answer that it is one.

    Raises:
        Rejected: with the rule it breaks.
    """
    result = event.governance
    assert isinstance(result, AuditResult)
    campaign, answer = event.entry.campaign, result.answer
    _, head, key = reviewed_campaign(view, event, AUDIT_TABLE, AuditRecord)
    check_audit(result)
    if result.last_step > head.steps:
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN, f"audits steps to {result.last_step}, the campaign stands at {head.steps}"
        )
    if answer is not None:
        _admit_answer(view, event, result, answer, timestamp_ms, committee.chain_id)
    last_taken = result.last_step if answer is None else answer.picked[-1].step
    ends_at_head = last_taken == head.steps and not result.differs
    if ends_at_head and result.end_root != head.root:
        raise Rejected(
            Reason.PARAMETER_ROOT_BROKEN,
            f"all steps came out as recorded and ended at {result.end_root.hex()}, the log stands at {head.root.hex()}",
        )
    record = AuditRecord(
        campaign=campaign,
        event=event.id,
        auditor=event.entry.author,
        first_step=result.first_step,
        last_step=result.last_step,
        matched=result.matched,
        challenge=b"" if answer is None else answer.challenge,
        matching=() if answer is None else answer.matching,
        differing=() if answer is None else answer.differing,
        recorded_at_ms=timestamp_ms,
    )
    view.put(key, record)


def _admit_answer(
    view: StateView, event: CheckedEvent, result: AuditResult, answer: AuditAnswer, timestamp_ms: int, chain: ChainId
) -> None:
    campaign = event.entry.campaign
    key = review_key(CHALLENGE_TABLE, campaign, answer.challenge)
    record = view.find(key, ChallengeRecord)
    if record is None or record.event != answer.challenge:
        raise Rejected(Reason.NOT_FOUND, f"{answer.challenge.hex()} is no audit challenge of this campaign")
    if record.answer:
        raise Rejected(Reason.DUPLICATE, f"audit {record.number} is answered by {record.answer.hex()}")
    if holder(view, record.auditor) != event.entry.author:
        raise Rejected(Reason.WRONG_AUTHOR, f"audit {record.number} is answered by whoever asked for it")
    if timestamp_ms > record.answer_by_ms:
        raise Rejected(
            Reason.AUDIT_LATE,
            f"audit {record.number} was to be answered by {record.answer_by_ms} ms, it is {timestamp_ms} ms",
        )
    if (result.first_step, result.last_step) != (record.first_step, record.last_step):
        raise Rejected(
            Reason.BAD_FIELD,
            f"answers for steps {result.first_step} to {result.last_step}, asked was about {record.first_step} to "
            f"{record.last_step}",
        )
    if not answer.matching and result.end_root != ZERO_DIGEST:
        raise Rejected(Reason.BAD_FIELD, "no picked step came out as recorded, so none has a root at its end")
    try:
        message = beacon_message(chain, record.epoch, campaign, record.number)
        bls.verify(record.beacon_key, message, answer.beacon)
    except Rejected as error:
        raise Rejected(
            Reason.BAD_SIGNATURE, f"not the beacon of audit {record.number} in epoch {record.epoch}: {error.detail}"
        ) from error
    expected = picked_steps(answer.beacon, record.first_step, record.last_step, record.picks)
    found = tuple(each.step for each in answer.picked)
    if found != expected:
        raise Rejected(
            Reason.NOT_PICKED,
            f"the beacon picks steps {', '.join(map(str, expected[:8]))} …, the answer is about "
            f"{', '.join(map(str, found[:8]))} …",
        )
    settled = record.standing not in (ChallengeStanding.ACCEPTED, ChallengeStanding.REJECTED)
    outcome = ChallengeStanding.DIFFERED if result.differs else ChallengeStanding.PASSED
    answered = msgspec.structs.replace(record, answer=event.id, standing=outcome.value if settled else record.standing)
    view.put(key, answered)
    head = view.get(CAMPAIGN_HEAD_TABLE + campaign, CampaignHead, Reason.UNKNOWN_CAMPAIGN, "campaign")
    view.put(CAMPAIGN_HEAD_TABLE + campaign, with_finding(head, record.event, stands_open=answered.stands_open))
