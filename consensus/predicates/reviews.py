"""``evaluated``: what was measured on a campaign's weights, what was decided about it, who took its steps again.

The campaign's certified head names its weights; the records under the campaign's prefixes are all evaluations,
decisions and audit results there are. The answer is yes if the weights were evaluated, every threshold set for them was
met by the whole confidence interval or governance accepted the miss, and nothing else stands against a release. That a
value was measured as said is the operator's word.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from consensus import bls
from consensus.beacon import beacon_key, beacon_message, picked_steps
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import Kind
from consensus.predicates.history import check_delegated, member_name
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.review import ACCEPT, NOTE, AuditChallenge, AuditResult, Decision, Evaluation, metric_text, unmet
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
        return self.record.differing_step


@dataclass(frozen=True, slots=True)
class Challenge:
    """An audit by lot on the log, its auditor's name, and whether nobody answered in time."""

    record: ChallengeRecord
    auditor: str
    failed: bool


def audits_of(bundle: OpenBundle) -> tuple[Audit, ...]:
    """All audit results about the bundle's campaign, by time.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` without the range that holds them.
    """
    records = bundle.range(review_prefix(AUDIT_TABLE, bundle.campaign), AuditRecord).values()
    own = [record for record in records if record.campaign == bundle.campaign]
    ordered = sorted(own, key=lambda record: (record.recorded_at_ms, record.event))
    return tuple(Audit(record, member_name(bundle, record.auditor)) for record in ordered)


def challenges_of(bundle: OpenBundle) -> tuple[Challenge, ...]:
    """All audits by lot of the bundle's campaign, by number; as of the bundle's header.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` without the range that holds them.
    """
    records = bundle.range(review_prefix(CHALLENGE_TABLE, bundle.campaign), ChallengeRecord).values()
    own = sorted((record for record in records if record.campaign == bundle.campaign), key=lambda each: each.number)
    now_ms = bundle.header.timestamp_ms
    return tuple(Challenge(record, member_name(bundle, record.auditor), record.failed(now_ms)) for record in own)


def replayed_steps(audits: Iterable[Audit]) -> int:
    """How many different steps came out as recorded in some audit."""
    ranges: list[tuple[int, int]] = []
    for audit in audits:
        record = audit.record
        if record.challenge:
            ranges.extend((step, step) for step in record.matching)
        else:
            ranges.append((record.first_step, record.first_step + record.matched - 1))
    total = counted_to = 0
    for first, last in sorted(ranges):
        total += max(0, last - max(first - 1, counted_to))
        counted_to = max(counted_to, last)
    return total


def tell_replays(steps: Steps, audits: Sequence[Audit], of: int, challenges: Sequence[Challenge] = ()) -> None:
    """Say how many of a campaign's steps others took again, with what result, and which audits nobody answered."""
    for challenge in challenges:
        record = challenge.record
        asked = f"audit {record.number} by {challenge.auditor}: {record.picks} of the steps {record.first_step} to "
        asked += f"{record.last_step}, by lot"
        if challenge.failed:
            steps.checked(f"{asked}, has FAILED: no answer came by {record.answer_by_ms} ms (log time)")
        elif not record.answer:
            steps.not_covered(f"{asked}, to be answered by {record.answer_by_ms} ms (log time)")
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
    steps.check("no finding is open", [f"finding {finding} stands against a release" for finding in open_ones])
    challenges = challenges_of(bundle)
    for challenge in challenges:
        _tell_challenge(bundle, steps, challenge, accepted, head.open_findings)
    tell_replays(steps, audits_of(bundle), head.steps, challenges)
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
    same = (result.first_step, result.last_step, result.matched, _answered(result))
    picks = (record.challenge, record.matching, record.differing)
    kept = (record.first_step, record.last_step, record.matched, picks)
    problems = [] if same == kept else ["its record differs"]
    compared = "bit for bit" if not result.tolerance else f"within {result.tolerance!a}"
    differing = f"; then {', '.join(f'{each!a}' for each in result.differing)} differed" if result.differing else ""
    picked = f"{len(result.answer.picked)} picked by lot, " if result.answer is not None else ""
    steps.check(f"{where}: {picked}{result.matched} came out as recorded, {compared}{differing}", problems)


def _answered(result: AuditResult) -> tuple[bytes, tuple[int, ...], tuple[int, ...]]:
    answer = result.answer
    return (b"", (), ()) if answer is None else (answer.challenge, answer.matching, answer.differing)


def _tell_challenge(
    bundle: OpenBundle,
    steps: Steps,
    challenge: Challenge,
    accepted: frozenset[bytes],
    open_findings: Sequence[bytes],
) -> None:
    """What was asked, that the beacon picked the steps that the answer is about, and how it stands."""
    record = challenge.record
    event = bundle.event_of(record.event, "audit challenge")
    if event.kind is not Kind.AUDIT_CHALLENGE or event.entry.author != record.auditor:
        raise Rejected(Reason.BAD_FIELD, f"event {event.id.hex()} is no audit challenge of {challenge.auditor}")
    where = f"audit {record.number} by {challenge.auditor}, entry {event.index}, stands: {record.standing}"
    problems = []
    asked = event.governance
    if isinstance(asked, AuditChallenge):
        said = (asked.number, asked.first_step, asked.last_step, asked.picks, asked.answer_by_ms)
        kept = (record.number, record.first_step, record.last_step, record.picks, record.answer_by_ms)
        problems += [] if said == kept else ["its record differs"]
    if record.stands_open != (record.event in open_findings):
        problems.append("the campaign's open findings say otherwise")
    if record.standing == ChallengeStanding.ACCEPTED and record.event not in accepted:
        problems.append("no decision of governance accepts it")
    answered_as = (ChallengeStanding.PASSED, ChallengeStanding.DIFFERED)
    if record.standing in answered_as and not record.answer:
        problems.append("there is no answer")
    steps.check(where, problems, asked is None)
    if record.answer:
        _tell_beacon(bundle, steps, record)


def _tell_beacon(bundle: OpenBundle, steps: Steps, record: ChallengeRecord) -> None:
    event = bundle.event_of(record.answer, "audit result")
    result = event.governance
    if not isinstance(result, AuditResult) or result.answer is None:
        steps.unknown(f"audit {record.number}: which steps the answer, entry {event.index}, is about is not disclosed")
        return
    beacon = result.answer.beacon
    keys = bundle.trusted.of(record.epoch)
    message = beacon_message(bundle.trusted.chain_id, record.epoch, record.campaign, record.number)
    problems = []
    try:
        bls.verify(beacon_key(keys.committee), message, beacon)
    except Rejected as error:
        problems.append(error.detail)
    picked = picked_steps(beacon, record.first_step, record.last_step, record.picks)
    if tuple(each.step for each in result.answer.picked) != picked:
        problems.append("the answer is about other steps")
    if event.kind is not Kind.AUDIT_RESULT or result.answer.challenge != record.event:
        problems.append("the answer is another audit's")
    expected = ChallengeStanding.DIFFERED if result.differs else ChallengeStanding.PASSED
    if record.standing in (ChallengeStanding.PASSED, ChallengeStanding.DIFFERED) and record.standing != expected:
        problems.append(f"by its answer it {expected}")
    steps.check(
        f"audit {record.number}: the unique signature of every role in epoch {record.epoch} picks steps "
        f"{', '.join(map(str, picked))}, and the answer is about them",
        problems,
    )


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
