"""The ledger's side of a run: outbox, delivery, recorder and grants, behind what the training side needs.

Opens the campaign, takes steps as they happened and writes their events to the outbox, says what has become final,
and, where the log refuses an event, works out where the campaign stands and records the rollback to there.
Training itself (model, optimizer, snapshots) is ``governed.py``'s.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from consensus import portions as p
from consensus.event import Kind
from consensus.identifiers import Digest
from consensus.job_key import job_key_id
from consensus.keys import Signer
from consensus.rejection import CountersignError, Reason, Rejected, Unavailable
from consensus.review import DataSlice, Evaluation, Metric, examination_digest
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    EVALUATION_TABLE,
    CampaignHead,
    EvaluationRecord,
    Standing,
    Usage,
    review_key,
    usage_key,
)
from trainer_client.calls import CampaignStatus, UnexpectedAnswer
from trainer_client.delivery import Delivery
from trainer_client.grants import GrantKeeper, OpenGrant
from trainer_client.outbox import Fate, Outbox, OutboxFull, State
from trainer_client.plan import CampaignPlan, RunSettings
from trainer_client.record import (
    Permission,
    Place,
    RecordedEvent,
    Recorder,
    StepOutcome,
    StepUse,
)
from trainer_client.resumption import (
    RecordedPast,
    RecordedStep,
    past_since,
    read_opening,
    recorded,
    recorded_evaluation,
)
from trainer_client.submit import Client

MAX_DISCARDED = 1_024
WAIT_SECONDS = 0.2
EXIT_WAIT_SECONDS = 5.0
LOG_AFTER_SECONDS = 5.0
DECISION_POLL_SECONDS = 0.5
MAXIMUM_RECOVERIES = 3

R = TypeVar("R", bound=p.Wire)
T = TypeVar("T")

GRANT_FAULTS = frozenset(
    reason.value
    for reason in (
        Reason.GRANT_CLOSED,
        Reason.OUTSIDE_GRANT,
        Reason.POLICY_NOT_IN_FORCE,
        Reason.SOURCE_NOT_GRANTED,
        Reason.SOURCE_REVOKED,
        Reason.UNKNOWN_GRANT,
    )
)
"""Reasons after which a step's grant is not used again."""

_log = logging.getLogger(__name__)


class StepNotAdmitted(CountersignError):
    """The log refused what the job recorded and there is no way on; says what and why."""


@dataclass(frozen=True, slots=True)
class News:
    """What the log said meanwhile."""

    candidate_is_final: bool
    failure: Fate | None


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step on its way to finality."""

    event: Digest
    index: int
    permission: Permission


class LedgerSide:
    """What a run says to its ledger and hears from it.

    Args:
        classes: content class of every source of the manifest.
    """

    def __init__(
        self,
        plan: CampaignPlan,
        settings: RunSettings,
        client: Client,
        job_key: Signer,
        outbox_path: Path,
        classes: Mapping[bytes, str],
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._client = client
        self._job_key = job_key
        self._classes = classes
        self._recorder = Recorder(plan.chain_id, plan.operator, plan.campaign, job_key, lambda: secrets.token_bytes(32))
        self._stack = ExitStack()
        self._outbox = self._stack.enter_context(Outbox(outbox_path, settings.outbox_maximum_bytes))
        self._delivery = Delivery(self._outbox, client)
        self._stack.callback(self._delivery.stop)
        self._grants: GrantKeeper | None = None
        self._sent: deque[SentStep] = deque()
        self._last_event: RecordedEvent | None = None
        self._last_permission: Permission | None = None
        self._evaluations: dict[Digest, tuple[bytes, Digest]] = {}
        """What was tested on which weights, by event."""
        self._recoveries_at: tuple[int, int] = (0, 0)

    @property
    def place(self) -> Place:
        """Where the campaign stands as the job sees it."""
        return self._recorder.place

    @property
    def background_cpu_seconds(self) -> float:
        """Processor time of delivery and grants."""
        grants = self._grants.cpu_seconds if self._grants is not None else 0.0
        return self._delivery.cpu_seconds + grants

    def deliver_left(self) -> CampaignStatus | None:
        """Deliver what an earlier process left; then where the campaign stands, None before it is opened.

        Steps that the log refuses meanwhile are its ``failure``, as if this process had recorded them.

        Raises:
            Unavailable: the pause limit is over.
        """
        left = self._outbox.unsettled()
        for fate in left:
            event = recorded(self._outbox.event(fate.id), fate.id)
            if isinstance(event, RecordedStep):
                self._sent.append(SentStep(event.id, event.index, event.permission))
                self._last_permission = event.permission
        self._delivery.start()
        for fate in left:
            self._wait_settled(fate.id)
        return self._find_head()

    def take_up(self, head: CampaignStatus) -> None:
        """Continue a campaign from where it stands on the log.

        Raises:
            Rejected: as ``resumption.recorded_evaluation``. Unavailable: the node does not answer.
        """
        self._recorder.move_to(_place(head))
        for row in self._client.campaign_events(self._plan.campaign):
            if row.kind == Kind.EVALUATION:
                identifier = Digest(bytes.fromhex(row.id))
                evaluation = recorded_evaluation(self._client.raw_event(identifier), identifier)
                self._evaluations[identifier] = _tested(evaluation)

    def past_since(self, step: int, head: CampaignStatus) -> RecordedPast:
        """What the log has of the campaign after a step.

        Raises:
            Rejected: as ``resumption.past_since``. Unavailable: the node does not answer.
        """
        return past_since(step, head, self._client.campaign_events(self._plan.campaign), self._client.raw_event)

    def admitted_sources(self, manifest: Sequence[p.ManifestRange]) -> frozenset[bytes]:
        """The sources of which the campaign has admitted an example, as the log counts.

        Raises:
            Unavailable: the node does not answer.
        """
        usages = {
            held.source: self._client.state_record(usage_key(self._plan.campaign, held.source), Usage)
            for held in manifest
        }
        return frozenset(source for source, usage in usages.items() if usage is not None and usage.admitted)

    def opening(self) -> p.Campaign:
        """The terms that the campaign was opened with.

        Raises:
            Rejected: ``NOT_FOUND``; ``MALFORMED``.
        """
        return read_opening(self._client, self._plan.campaign)[1]

    def open_campaign(self, terms: p.Campaign, manifest: Sequence[p.ManifestRange]) -> RecordedEvent:
        """Open the campaign, and wait until it is on the log.

        Raises:
            Rejected: the log refuses it. Unavailable: the pause limit is over.
        """
        self._delivery.resume()
        event = self._recorder.open_campaign(terms, manifest)
        self._put([event])
        self._require_final(event)
        return event

    def start_grants(
        self,
        blocks: tuple[str, ...],
        measured: Collection[bytes],
        on_grant: Callable[[OpenGrant], None],
        past: Sequence[RecordedStep] = (),
    ) -> dict[bytes, OpenGrant]:
        """Begin to ask for grants; those of ``past`` steps, of which the last one's is used while it is open.

        Raises:
            Rejected, Unavailable: as ``GrantKeeper.opened``.
        """
        keeper = GrantKeeper(
            self._client,
            self._recorder,
            campaign=self._plan.campaign,
            job_key=job_key_id(self._job_key),
            purpose=self._plan.purpose,
            planned_steps=self._plan.planned_steps,
            blocks=blocks,
            sources=tuple(sorted(self._classes)),
            measured=measured,
            settings=self._settings,
            on_grant=on_grant,
        )
        grants = {step.permission.grant: keeper.opened(step.permission.grant) for step in past}
        if past:
            keeper.hold(past[-1].permission.grant)
        self._grants = keeper
        self._stack.callback(keeper.stop)
        keeper.start()
        return grants

    def permission_for(self, step: int) -> OpenGrant:
        """The grant for a step; waits without one."""
        assert self._grants is not None
        return self._grants.permission_for(step)

    def record_step(
        self, grant: OpenGrant, use: StepUse, profiles: Sequence[p.ClassProfile], outcome: StepOutcome
    ) -> tuple[RecordedEvent, ...]:
        """The step's events, on disk: its refusals first, then itself."""
        events = self._recorder.step(grant.permission, use, self._classes, profiles, outcome)
        self._sent.append(SentStep(events[-1].id, self.place.steps, grant.permission))
        self._last_permission = grant.permission
        self._put(events)
        return events

    def record_memorization_rollback(
        self, permission: Permission, step: Digest, signals: tuple[p.MemorizationSignal, ...]
    ) -> RecordedEvent:
        """The step just recorded is undone for its memorization signals."""
        reason = Reason.MEMORIZATION_ABOVE_THRESHOLD.value
        event = self._recorder.rollback(permission, [step], reason, signals)
        self._put([event])
        return event

    def record_evaluation(
        self, name: str, metrics: Sequence[Metric], data: DataSlice, script: tuple[str, bytes]
    ) -> RecordedEvent | None:
        """Metrics of the weights where the campaign stands; does not wait for the log. None for a test recorded before.

        Raises:
            Rejected: as ``Recorder.evaluation``.
        """
        evaluation = self._recorder.evaluation(name, metrics, data, script)
        tested = _tested(evaluation)
        if tested in self._evaluations.values():
            return None
        event = self._recorder.record_evaluation(evaluation)
        self._evaluations[event.id] = tested
        self._put([event])
        return event

    def wait_for_decisions(self, limit_seconds: float) -> tuple[bytes, ...]:
        """Wait until no finding bars the release; the evaluations and audits that still do after so long.

        Raises:
            Rejected: ``FINDING_OPEN``: governance rejected one. Unavailable: the pause limit is over.
        """
        deadline = time.monotonic() + limit_seconds
        while True:
            findings = self.open_findings()
            left_seconds = deadline - time.monotonic()
            if not findings or left_seconds <= 0:
                return findings
            for finding in findings:
                key = review_key(EVALUATION_TABLE, self._plan.campaign, finding)
                record = self._state_record(key, EvaluationRecord)
                if record is not None and record.standing == Standing.REJECTED:
                    raise Rejected(Reason.FINDING_OPEN, f"governance rejected evaluation {finding.hex()}")
            time.sleep(min(DECISION_POLL_SECONDS, left_seconds))

    def open_findings(self) -> tuple[bytes, ...]:
        """The evaluations and audits that bar the campaign's release, as the log stands.

        Raises:
            Unavailable: the pause limit is over.
        """
        head = self._state_record(CAMPAIGN_HEAD_TABLE + self._plan.campaign, CampaignHead)
        return () if head is None else head.open_findings

    def record_release(self, file_name: str, file_sha256: bytes) -> RecordedEvent:
        """Release these weights and wait until that is on the log."""
        return self._record_end(lambda: self._recorder.release(file_name, file_sha256))

    def record_abandon(self, reason: str) -> RecordedEvent:
        """End the campaign without a release and wait until that is on the log."""
        return self._record_end(lambda: self._recorder.abandon(reason))

    def _record_end(self, record: Callable[[], RecordedEvent]) -> RecordedEvent:
        """What closes the campaign, on the log; where the log refuses it the campaign stands as it stood."""
        stands = self.place
        event = record()
        self._put([event])
        try:
            self._require_final(event)
        except Rejected:
            self._recorder.move_to(stands)
            self._last_event = None
            raise
        return event

    def news(self, candidate: RecordedEvent | None) -> News:
        """Whether the candidate, an event put, is on the log; and the first refused event, if not dealt with."""
        return News(candidate is not None and self._is_final(candidate.id), self.failure)

    def _is_final(self, identifier: bytes) -> bool:
        fate = self._outbox.fate(identifier)
        return fate is not None and fate.state is State.FINAL

    def forget_through(self, index: int) -> None:
        """Steps up to this one are final and will never be discarded."""
        self._sent = deque(sent for sent in self._sent if sent.index > index)

    @property
    def failure(self) -> Fate | None:
        """The first event the log refused, if one is not dealt with.

        Raises:
            InvariantBroken: as ``Delivery.failure``.
        """
        return self._delivery.failure

    def wait_all_settled(self) -> Fate | None:
        """Wait until everything put is final (None) or something was refused (its fate)."""
        if self._last_event is None:
            return None
        started = time.monotonic()
        while True:
            failure = self.failure
            if failure is not None:
                return failure
            if self._outbox.wait_settled(self._last_event.id, WAIT_SECONDS).state is State.FINAL:
                return None
            self._check_limit(started, "finality")

    def roll_back_to_log(self, failure: Fate) -> tuple[Place, Permission]:
        """After a refusal: where the campaign stood on the log, with a rollback to there put and final.

        A refused evaluation with no step after it is dropped, and undoes nothing.

        Raises:
            StepNotAdmitted: what was refused cannot be rolled back, or it keeps happening.
        """
        head = self._head()
        steps, count = self._recoveries_at
        self._recoveries_at = (head.steps, count + 1 if steps == head.steps else 1)
        refused = {sent.event: sent for sent in self._sent}
        discarded = [sent for sent in reversed(self._sent) if not self._is_final(sent.event)]
        what = f"event {failure.id.hex()}: {failure.reason}: {failure.detail}"
        only_evaluation = not discarded and Digest(failure.id) in self._evaluations
        if not (discarded or only_evaluation) or head.closed or head.rollback_required or self._last_permission is None:
            raise StepNotAdmitted(f"nothing to roll back to; {what}")
        if self._recoveries_at[1] > MAXIMUM_RECOVERIES:
            raise StepNotAdmitted(f"step {head.steps + 1} was refused {self._recoveries_at[1]} times; {what}")
        if failure.reason in GRANT_FAULTS and self._grants is not None:
            blamed = refused.get(Digest(failure.id), discarded[-1]).permission
            self._grants.discard(blamed.grant)
        unsettled = [fate.id for fate in self._outbox.unsettled()]
        self._discard(unsettled, f"it follows {what}")
        for identifier in [each for each in self._evaluations if not self._is_final(each)]:
            del self._evaluations[identifier]
        stands = _place(head)
        self._recorder.move_to(stands)
        closed = failure.reason == Reason.GRANT_CLOSED.value
        reason = Reason.GRANT_CLOSED.value if closed else "step-not-admitted"
        permission = self._last_permission
        events = []
        for first in range(0, len(discarded), MAX_DISCARDED):
            chunk = [sent.event for sent in discarded[first : first + MAX_DISCARDED]]
            events.append(self._recorder.rollback(permission, chunk, reason))
        self._delivery.resume()
        if only_evaluation:
            self._last_event = None
            return stands, permission
        self._put(events)
        try:
            self._require_final(events[-1])
        except Rejected as refusal:
            raise StepNotAdmitted(f"the rollback was refused: {refusal}; it followed {what}") from refusal
        self._sent.clear()
        return stands, permission

    def close(self, *, wait: bool) -> None:
        """Stop the threads; with ``wait``, give what is queued a few seconds to be delivered."""
        if wait and self._last_event is not None:
            self._outbox.wait_settled(self._last_event.id, EXIT_WAIT_SECONDS)
        left = self._outbox.unsettled()
        if left:
            _log.warning("%d events stay in the outbox, to be delivered by the next run", len(left))
        self._stack.close()

    def _put(self, events: Sequence[RecordedEvent]) -> None:
        """Put events; waits while the outbox is full, unless something was refused: they are discarded then."""
        while True:
            try:
                self._outbox.put([(event.id, event.encoded) for event in events], WAIT_SECONDS)
            except OutboxFull:
                if self.failure is not None:
                    return
                continue
            self._last_event = events[-1]
            return

    def _discard(self, identifiers: Sequence[bytes], why: str) -> None:
        """Events that are not sent any more; waits while the disk is full, as ``_put`` does."""
        started = time.monotonic()
        while True:
            try:
                return self._outbox.reject(identifiers, "discarded", why)
            except OutboxFull as problem:
                self._check_limit(started, f"room to go on ({problem})")
                time.sleep(WAIT_SECONDS)

    def _find_head(self) -> CampaignStatus | None:
        try:
            return self._head()
        except Rejected as refusal:
            if refusal.reason is Reason.NOT_FOUND:
                return None
            raise

    def _head(self) -> CampaignStatus:
        return self._asked(lambda: self._client.campaign(self._plan.campaign))

    def _state_record(self, key: bytes, record: type[R]) -> R | None:
        return self._asked(lambda: self._client.state_record(key, record))

    def _asked(self, ask: Callable[[], T]) -> T:
        """An answer of the node about the campaign, once it gives one."""
        started = time.monotonic()
        while True:
            try:
                return ask()
            except (Unavailable, UnexpectedAnswer) as problem:
                _log.warning("waiting to learn where the campaign stands: %s", problem)
                self._check_limit(started, "the campaign's head")
                time.sleep(WAIT_SECONDS)

    def _require_final(self, event: RecordedEvent) -> None:
        fate = self._wait_settled(event.id)
        if fate.state is State.REJECTED:
            self._delivery.resume()
            reason = Reason(fate.reason) if fate.reason in frozenset(Reason) else Reason.BAD_FIELD
            raise Rejected(reason, f"{event.kind.value}: {fate.detail}")

    def _wait_settled(self, identifier: bytes) -> Fate:
        started = time.monotonic()
        logged = False
        while True:
            fate = self._outbox.wait_settled(identifier, WAIT_SECONDS)
            if fate.state in (State.FINAL, State.REJECTED):
                return fate
            earlier = self.failure
            if earlier is not None:
                return earlier
            if not logged and time.monotonic() - started > LOG_AFTER_SECONDS:
                _log.warning("waiting for event %s, which is %s", identifier.hex(), fate.state.value)
                logged = True
            self._check_limit(started, "finality")

    def _check_limit(self, started: float, what: str) -> None:
        limit_seconds = self._settings.pause_limit_seconds
        if limit_seconds is not None and time.monotonic() - started > limit_seconds:
            raise Unavailable(f"no {what} after {limit_seconds:.0f} s")


def _tested(evaluation: Evaluation) -> tuple[bytes, Digest]:
    return evaluation.parameter_root, examination_digest(evaluation)


def _place(head: CampaignStatus) -> Place:
    return Place(
        next_sequence=head.next_sequence,
        attempt=head.attempt,
        steps=head.steps,
        root=Digest(bytes.fromhex(head.root)),
        last_event=Digest(bytes.fromhex(head.last_event)),
        undo_root=Digest(bytes.fromhex(head.undo_root)) if head.undo_root else None,
    )
