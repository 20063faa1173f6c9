"""Admission of evaluations and decisions (``review.py``).

* *evaluation*: by the campaign's job key, on the root where the campaign stands. One that misses a threshold is an
  *open finding*: the campaign cannot be released until the same test is met on later weights, or governance accepts it.
* *decision*: about something of the campaign, also after its end. To accept or reject an evaluation, or an audit by
  lot, is governance's.

Each has a record of its own under the campaign's prefix of its table, so that all of a campaign's are provable at once.
"""

import msgspec

from consensus.campaign_rules import changed, job_event
from consensus.event import CheckedEvent
from consensus.identifiers import MemberId, Role
from consensus.membership import Committee
from consensus.rejection import Reason, Rejected
from consensus.review import (
    ACCEPT,
    NOTE,
    OUTCOMES,
    Decision,
    Evaluation,
    check_evaluation,
    examination_digest,
    unmet,
)
from consensus.state import (
    AUDIT_TABLE,
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    CHALLENGE_TABLE,
    DECISION_TABLE,
    EVALUATION_TABLE,
    AuditRecord,
    CampaignHead,
    CampaignRecord,
    ChallengeRecord,
    ChallengeStanding,
    DecisionRecord,
    EvaluationRecord,
    Standing,
    StateView,
    review_key,
)

MAX_OPEN_FINDINGS = 64
MAX_OPEN_EVALUATIONS = 32
"""Of evaluations, which are the operator's, no more are open: with all places taken no audit could bar the release, and
the same tests, met, would free them in the ledger block of the release."""


def admit_evaluation(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check an evaluation against where the campaign stands; a missed threshold becomes an open finding.

    Raises:
        Rejected: with the rule it breaks.
    """
    evaluation = event.operation
    assert isinstance(evaluation, Evaluation)
    campaign = event.entry.campaign
    _, head = job_event(view, event, timestamp_ms)
    if head.rollback_required:
        raise Rejected(Reason.ROLLBACK_REQUIRED, "the last step's memorization signal is above the threshold")
    if (evaluation.parameter_root, evaluation.steps) != (head.root, head.steps):
        raise Rejected(
            Reason.ROOT_NOT_FINAL,
            f"evaluates {evaluation.parameter_root.hex()} after {evaluation.steps} steps, the log stands at "
            f"{head.root.hex()} after {head.steps}",
        )
    check_evaluation(evaluation)
    test = examination_digest(evaluation)
    missed = bool(unmet(evaluation))
    findings, evaluations = [], 0
    for finding in head.open_findings:
        key = review_key(EVALUATION_TABLE, campaign, finding)
        held = view.find(key, EvaluationRecord)
        if held is not None and held.test == test and held.standing == Standing.UNMET:
            view.put(key, _standing(held, Standing.SUPERSEDED))
        else:
            findings.append(finding)
            evaluations += held is not None
    moved = changed(head, next_sequence=head.next_sequence + 1, open_findings=tuple(findings))
    if missed:
        if evaluations >= MAX_OPEN_EVALUATIONS:
            raise Rejected(
                Reason.OVERSIZED,
                f"more than {MAX_OPEN_EVALUATIONS} evaluations as open findings: governance must decide first",
            )
        moved = with_finding(moved, event.id, stands_open=True)
    standing = Standing.UNMET if missed else Standing.MET
    record = EvaluationRecord(
        campaign, event.id, test, evaluation.steps, evaluation.parameter_root, standing.value, timestamp_ms
    )
    view.put(review_key(EVALUATION_TABLE, campaign, event.id), record)
    view.put(CAMPAIGN_HEAD_TABLE + campaign, moved)


def admit_decision(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check a decision; accepting or rejecting an evaluation moves the bar to release.

    Raises:
        Rejected: with the rule it breaks.
    """
    decision = event.governance
    assert isinstance(decision, Decision)
    campaign = event.entry.campaign
    record, head, key = reviewed_campaign(view, event, DECISION_TABLE, DecisionRecord)
    if decision.outcome not in OUTCOMES:
        raise Rejected(Reason.BAD_FIELD, f"outcome {decision.outcome!a:.60}, expected {', '.join(sorted(OUTCOMES))}")
    evaluated = review_key(EVALUATION_TABLE, campaign, decision.subject)
    evaluation = view.find(evaluated, EvaluationRecord)
    audit = view.find(review_key(AUDIT_TABLE, campaign, decision.subject), AuditRecord)
    challenged = review_key(CHALLENGE_TABLE, campaign, decision.subject)
    challenge = view.find(challenged, ChallengeRecord)
    held = (evaluation, audit, challenge)
    known = {campaign, record.event, head.release, *(each.event for each in held if each is not None)}
    if decision.subject not in known:
        raise Rejected(
            Reason.NOT_FOUND,
            f"{decision.subject.hex()} is neither the campaign nor an evaluation, audit or release of it",
        )
    if decision.outcome != NOTE:
        if committee.member(MemberId(event.entry.author)).role != Role.GOVERNANCE:
            raise Rejected(Reason.WRONG_ROLE, f"to {decision.outcome} an evaluation or audit is governance's")
        accepted = decision.outcome == ACCEPT
        if evaluation is not None:
            view.put(evaluated, _standing(evaluation, Standing.ACCEPTED if accepted else Standing.REJECTED))
        elif challenge is not None:
            standing = ChallengeStanding.ACCEPTED if accepted else ChallengeStanding.REJECTED
            view.put(challenged, msgspec.structs.replace(challenge, standing=standing.value))
        else:
            raise Rejected(
                Reason.BAD_FIELD,
                f"only an evaluation or audit challenge is {decision.outcome}ed; other subjects are noted",
            )
        view.put(CAMPAIGN_HEAD_TABLE + campaign, with_finding(head, decision.subject, stands_open=not accepted))
    view.put(
        key,
        DecisionRecord(campaign, event.id, event.entry.author, decision.subject, decision.outcome, timestamp_ms),
    )


def reviewed_campaign(
    view: StateView, event: CheckedEvent, table: bytes, kept_as: type[DecisionRecord | AuditRecord | ChallengeRecord]
) -> tuple[CampaignRecord, CampaignHead, bytes]:
    """Record and head of a member's review's campaign, open or closed, and the key to keep the review under.

    Raises:
        Rejected: ``BAD_FIELD``, ``UNKNOWN_CAMPAIGN``, ``DUPLICATE``.
    """
    identifier = event.entry.campaign
    if event.entry.sequence or event.entry.attempt:
        raise Rejected(Reason.BAD_FIELD, f"{event.entry.kind.phrase} has sequence and attempt 0")
    record = view.get(CAMPAIGN_TABLE + identifier, CampaignRecord, Reason.UNKNOWN_CAMPAIGN, "campaign")
    head = view.get(CAMPAIGN_HEAD_TABLE + identifier, CampaignHead, Reason.UNKNOWN_CAMPAIGN, "campaign")
    key = review_key(table, identifier, event.id)
    if view.find(key, kept_as) is not None:
        raise Rejected(Reason.DUPLICATE, f"{event.entry.kind.value} {event.id.hex()} is on the log")
    return record, head, key


def with_finding(head: CampaignHead, subject: bytes, *, stands_open: bool) -> CampaignHead:
    """The head with ``subject`` as its last open finding, or as none.

    Raises:
        Rejected: ``OVERSIZED`` for more than ``MAX_OPEN_FINDINGS``.
    """
    findings = [finding for finding in head.open_findings if finding != subject]
    if stands_open:
        findings.append(subject)
    if len(findings) > MAX_OPEN_FINDINGS:
        raise Rejected(Reason.OVERSIZED, f"more than {MAX_OPEN_FINDINGS} open findings: governance must decide first")
    return changed(head, open_findings=tuple(findings))


def _standing(record: EvaluationRecord, standing: Standing) -> EvaluationRecord:
    return msgspec.structs.replace(record, standing=standing.value)
