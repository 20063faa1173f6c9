"""``evaluated``: what was measured on a campaign's weights, what was decided about it, who took its steps again.

The campaign's certified head names its weights; the records under the campaign's prefixes are all evaluations,
decisions and audit results there are. The answer is yes if the weights were evaluated, every threshold set for them was
met by the whole confidence interval or governance accepted the miss, and nothing else stands against a release. That a
value was measured as said is the operator's word.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import Kind
from consensus.predicates.history import check_delegated, member_name
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.review import ACCEPT, NOTE, AuditResult, Decision, Evaluation, metric_text, unmet
from consensus.state import (
    AUDIT_TABLE,
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    DECISION_TABLE,
    EVALUATION_TABLE,
    AuditRecord,
    CampaignHead,
    CampaignRecord,
    DecisionRecord,
    EvaluationRecord,
    Standing,
    review_prefix,
)

R = TypeVar("R", EvaluationRecord, DecisionRecord)


STANDINGS_OF_A_MISS = frozenset({Standing.UNMET, Standing.SUPERSEDED, Standing.ACCEPTED, Standing.REJECTED})
STANDINGS_OTHERWISE = frozenset({Standing.MET, Standing.ACCEPTED, Standing.REJECTED})
BARRING = frozenset({Standing.UNMET, Standing.REJECTED})


@dataclass(frozen=True, slots=True)
class Audit:
    """An audit result on the log, and its auditor's name."""

    record: AuditRecord
    auditor: str

    @property
    def differing_step(self) -> int | None:
        """The first step that did not come out as recorded, if any."""
        return self.record.first_step + self.record.matched if self.record.differs else None


def audits_of(bundle: OpenBundle) -> tuple[Audit, ...]:
    """All audit results about the bundle's campaign, by time.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` without the range that holds them.
    """
    records = bundle.range(review_prefix(AUDIT_TABLE, bundle.campaign), AuditRecord).values()
    own = [record for record in records if record.campaign == bundle.campaign]
    ordered = sorted(own, key=lambda record: (record.recorded_at_ms, record.event))
    return tuple(Audit(record, member_name(bundle, record.auditor)) for record in ordered)


def replayed_steps(audits: Iterable[Audit]) -> int:
    """How many different steps came out as recorded in some audit."""
    total = counted_to = 0
    for first, matched in sorted((audit.record.first_step, audit.record.matched) for audit in audits):
        last = first + matched - 1
        total += max(0, last - max(first - 1, counted_to))
        counted_to = max(counted_to, last)
    return total


def tell_replays(steps: Steps, audits: Sequence[Audit], of: int) -> None:
    """Say how many of a campaign's steps others took again, and with what result."""
    if not audits:
        steps.not_covered(f"replay: 0 of {of} steps were re-executed by another party")
        return
    matching = [audit for audit in audits if audit.record.matched]
    if matching:
        names = ", ".join(sorted({audit.auditor for audit in matching}))
        steps.attested(
            f"replay: {replayed_steps(matching)} of {of} steps were re-executed and came out as recorded: {names}"
        )
    for audit in audits:
        if audit.differing_step is not None:
            steps.attested(f"replay: step {audit.differing_step} did NOT come out as recorded: {audit.auditor}")


def evaluated(bundle: OpenBundle, steps: Steps) -> None:
    """The campaign's weights were evaluated, and no finding about them stands open.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``, ``NOT_FOUND``; ``WRONG_AUTHOR``, ``UNKNOWN_JOB_KEY`` for another's evaluation.
    """
    campaign = bundle.record(CAMPAIGN_TABLE + bundle.campaign, CampaignRecord)
    head = bundle.record(CAMPAIGN_HEAD_TABLE + bundle.campaign, CampaignHead)
    operator = member_name(bundle, campaign.operator)
    weights = "released" if head.closed == "released" else "has"
    steps.checked(f"the campaign of {operator} {weights} parameter root {head.root.hex()} after {head.steps} steps")
    if not head.closed:
        steps.not_covered("what comes later: the campaign is open")
    evaluations = _of(bundle, EVALUATION_TABLE, EvaluationRecord)
    decisions = _of(bundle, DECISION_TABLE, DecisionRecord)
    here = [record for record in evaluations if record.parameter_root == head.root]
    steps.check(
        f"{len(evaluations)} evaluations are on the log, {len(here)} of these weights",
        [] if here else ["none names this parameter root"],
    )
    check_delegated(bundle, [bundle.event_of(record.event, "evaluation") for record in evaluations], campaign.operator)
    accepted = _accepted(bundle, decisions)
    for record in evaluations:
        _tell_evaluation(bundle, steps, record, operator, accepted, head.open_findings)
    for decision in decisions:
        _tell_decision(bundle, steps, decision)
    open_ones = [finding.hex() for finding in head.open_findings]
    steps.check("no finding is open", [f"evaluation {finding} stands against a release" for finding in open_ones])
    tell_replays(steps, audits_of(bundle), head.steps)
    for audit in audits_of(bundle):
        _tell_audit(bundle, steps, audit)
    steps.attested(f"that values were measured as said, on the data named: {operator}")


def _tell_evaluation(
    bundle: OpenBundle,
    steps: Steps,
    record: EvaluationRecord,
    operator: str,
    accepted: frozenset[bytes],
    open_findings: Sequence[bytes],
) -> None:
    event = bundle.event_of(record.event, "evaluation")
    where = f"evaluation of step {record.steps}, entry {event.index}"
    found = event.operation
    if found is None:
        steps.unknown(f"{where}: the portion that holds its metrics is not disclosed")
        return
    if not isinstance(found, Evaluation):
        raise Rejected(Reason.BAD_FIELD, f"event {event.id.hex()} is a {event.kind.value}, no evaluation")
    steps.attested(
        f"{where}: {found.name!a} on {found.data.examples} examples of {found.data.name!a} (SHA-256 "
        f"{found.data.sha256.hex()}) by {found.script_name!a} (SHA-256 {found.script_sha256.hex()}): {operator}"
    )
    for metric in found.metrics:
        steps.attested(f"{metric_text(metric)}: {operator}")
    missed = unmet(found)
    standing = f"{where}, stands: {record.standing}"
    problems = []
    if (found.parameter_root, found.steps) != (record.parameter_root, record.steps):
        problems.append("its record is of other weights")
    if record.standing not in (STANDINGS_OF_A_MISS if missed else STANDINGS_OTHERWISE):
        problems.append(f"{len(missed)} of its thresholds are missed")
    if (record.standing in BARRING) != (record.event in open_findings):
        problems.append("the campaign's open findings say otherwise")
    if record.standing == Standing.ACCEPTED and record.event not in accepted:
        problems.append("no decision of governance accepts it")
    steps.check(standing, problems)


def _tell_decision(bundle: OpenBundle, steps: Steps, record: DecisionRecord) -> None:
    event = _decision_event(bundle, record)
    signers = ", ".join(sorted(member_name(bundle, held.signer) for held in event.entry.signatures))
    text = f"decision of {signers}, entry {event.index}: {record.outcome} {record.subject.hex()}"
    if event.governance is None:
        steps.unknown(f"{text}: the portion that holds its reasons is not disclosed")
        return
    assert isinstance(event.governance, Decision)
    decided = event.governance
    problems = [] if (decided.subject, decided.outcome) == (record.subject, record.outcome) else ["its record differs"]
    steps.check(f"{text}: {decided.rationale!a}", problems)


def _tell_audit(bundle: OpenBundle, steps: Steps, audit: Audit) -> None:
    event = bundle.event_of(audit.record.event, "audit result")
    result = event.governance
    if event.kind is not Kind.AUDIT_RESULT or event.entry.author != audit.record.auditor:
        raise Rejected(Reason.BAD_FIELD, f"event {event.id.hex()} is no audit result of {audit.auditor}")
    where = f"audit by {audit.auditor}, entry {event.index}, of steps {audit.record.first_step} to "
    where += f"{audit.record.last_step}"
    if result is None:
        steps.unknown(f"{where}: the portion that holds it is not disclosed")
        return
    assert isinstance(result, AuditResult)
    record = audit.record
    same = (result.first_step, result.last_step, result.matched)
    problems = [] if same == (record.first_step, record.last_step, record.matched) else ["its record differs"]
    compared = "bit for bit" if not result.tolerance else f"within {result.tolerance!a}"
    differing = f"; then {', '.join(f'{each!a}' for each in result.differing)} differed" if result.differing else ""
    steps.check(f"{where}: {result.matched} came out as recorded, {compared}{differing}", problems)


def _accepted(bundle: OpenBundle, decisions: Iterable[DecisionRecord]) -> frozenset[bytes]:
    """Evaluations whose newest decision other than a note accepts them, with the event to show for it."""
    newest: dict[bytes, str] = {}
    for record in decisions:
        event = _decision_event(bundle, record)
        if isinstance(event.governance, Decision) and event.governance.outcome != NOTE:
            newest[event.governance.subject] = event.governance.outcome
    return frozenset(subject for subject, outcome in newest.items() if outcome == ACCEPT)


def _decision_event(bundle: OpenBundle, record: DecisionRecord) -> OpenEvent:
    event = bundle.event_of(record.event, "decision")
    if event.kind is not Kind.DECISION or event.entry.campaign != bundle.campaign:
        raise Rejected(Reason.BAD_FIELD, f"event {event.id.hex()} is no decision about the campaign")
    return event


def _of(bundle: OpenBundle, table: bytes, record: type[R]) -> list[R]:
    """The campaign's records of a table, in the log's order."""
    held = bundle.range(review_prefix(table, bundle.campaign), record).values()
    return sorted(
        (each for each in held if each.campaign == bundle.campaign),
        key=lambda each: bundle.event_of(each.event, "review").index,
    )
