"""Where a run stands in its campaign, and how it goes back: the one path for every step that must not stand.

A *course* knows how many steps are done, what is needed to take those again that the log has beyond the last final
snapshot, and who stays out for being recited. Three things send it back:

* **a recital**: the snapshot from before the step is restored bit for bit, and the step is repeated without those;
* **the log refused something**: the ring's last final snapshot is restored, and the steps that stand are replayed;
* **the process died**: the checkpoint was restored already (``opening.py``), and the steps since are replayed.

A replay must end at the log's parameter root, or the campaign is abandoned.

Left to others: taking steps (``governed.py``), what is final and what a refusal leaves (``ledger_side.py``).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from consensus import portions as p
from consensus.identifiers import ZERO_DIGEST, Digest
from consensus.rejection import CountersignError, InvariantBroken, Reason
from trainer_client.audit_snapshots import AuditSnapshots
from trainer_client.commitment import root_of_tensors
from trainer_client.data_parallel import ParallelModel
from trainer_client.grants import OpenGrant
from trainer_client.opening import OpenedRun, TakenUp
from trainer_client.outbox import Fate
from trainer_client.ranks import Ranks
from trainer_client.record import Example, RecordedEvent
from trainer_client.resumption import RecordedStep
from trainer_client.rollback import Snapshot, TrainingState, restore_snapshot, take_snapshot
from trainer_client.step_book import Step

StepAgain = Callable[[RecordedStep, OpenGrant], Step]
"""A step on the log, as it is to be taken again."""


class ReplayFailed(CountersignError):
    """Replaying the steps on the log ended at another parameter root; the campaign was abandoned."""


class Course:
    """The course of one run, over what ``open_run`` opened.

    Args:
        snapshot_every_steps: least distance between snapshots to return to.
        audits: the snapshots kept for good.
    """

    def __init__(
        self,
        opened: OpenedRun,
        state: TrainingState,
        model: ParallelModel,
        ranks: Ranks,
        snapshot_every_steps: int,
        audits: AuditSnapshots,
    ) -> None:
        self._ring, self._checkpoints = opened.ring, opened.checkpoints
        self._ledger, self._book, self._record = opened.ledger, opened.book, opened.record
        self._state = state
        self._model = model
        self._ranks = ranks
        self._snapshot_every_steps = max(1, snapshot_every_steps)
        self._audits = audits
        self._candidate: RecordedEvent | None = None
        self._last_event: RecordedEvent | None = None
        self._history: dict[int, Step] = {}
        self._replay_to: tuple[int, Digest] | None = None
        self.done = 0
        self.parameters: Mapping[str, Tensor] = opened.parameters
        self.recited: set[Example] = set()
        """Examples that stay out."""

    @property
    def is_replaying(self) -> bool:
        """Whether the next step is on the log already."""
        return self._replay_to is not None

    def next_again(self) -> Step | None:
        """The next step as it was taken before, where it is to be replayed."""
        if not self.is_replaying:
            return None
        return replace(self._history[self.done + 1], replayed=True, before=None, loss_sum=0.0, learned=0, stepped=False)

    def resolve(self) -> RecordedEvent | None:
        """The event of the step last taken, on disk; None where it is already, and on other ranks than the first."""
        event = self._book.resolve()
        self._last_event = event or self._last_event
        return event

    def snapshot_if_due(self) -> Snapshot | None:
        """A snapshot where the ring wants a candidate."""
        if self._ring.candidate is not None or self.done - self._ring.final.step < self._snapshot_every_steps:
            return None
        self.resolve()
        snapshot = take_snapshot(self._state, self.done, self._ledger.place.root)
        self._ring.offer(snapshot)
        self._candidate = self._last_event
        return snapshot

    def keep_for_audits(self, *, last: bool = False) -> None:
        """A snapshot of the job as the step that begins finds it, where one is due; every rank must ask."""
        if self._audits.due(self.done, last=last):
            self._audits.keep(self.done, self._state.model, self._state.optimizer, self.recited)

    def took(self, step: Step, parameters: Mapping[str, Tensor]) -> None:
        """A step was taken and left these parameters."""
        self.done = step.index
        self.parameters = parameters
        self._history[step.index] = replace(step, before=None)

    def took_again(self, step: Step) -> None:
        """A step was replayed.

        Raises:
            ReplayFailed: it was the last one and the parameters are not the log's.
        """
        self.done = step.index
        self._end_replay_if_due()

    def undo(
        self,
        step: Step,
        event: RecordedEvent | None,
        before: Mapping[str, Tensor],
        recited: tuple[p.MemorizationSignal, ...],
    ) -> None:
        """Back to before the step just taken and resolved as ``event``, whose examples were recited.

        ``before`` are the parameters it began with.

        Raises:
            InvariantBroken: there is no snapshot of then, or it does not restore what it was.
        """
        if step.before is None:
            raise InvariantBroken(f"step {step.index} was checked without a snapshot to return to")
        taken = ZERO_DIGEST if event is None else event.id
        restore_snapshot(step.before, self._state)
        rollback = self._ledger.record_memorization_rollback(step.grant.permission, taken, recited)
        root = self._model.root()
        if root != self._ledger.place.root:
            raise InvariantBroken(f"restored to root {root.hex()}, expected {self._ledger.place.root.hex()}")
        self.parameters = before
        self.done = step.index - 1
        del self._history[step.index]
        self.recited.update((signal.source, signal.example) for signal in recited)
        self._record.rollbacks += 1
        self._record.undone_after(self.done)
        worst = max(signal.signal_permille for signal in recited)
        reason = Reason.MEMORIZATION_ABOVE_THRESHOLD.value
        self._book.note("rollback", step.index, id=rollback.id.hex(), detail=reason, memorization_permille=worst)

    def take_up(self, taken_up: TakenUp, again: StepAgain) -> None:
        """Go on from the restored checkpoint: the steps since then are to be replayed.

        Raises:
            ReplayFailed: there are none and the parameters are not the log's.
        """
        steps = taken_up.past.steps
        self.recited.update(taken_up.past.recited)
        if taken_up.undo and steps:
            last, steps = steps[-1], steps[:-1]
            threshold_permille = taken_up.grants[last.permission.grant].policy.memorization_threshold_permille
            recited = tuple(
                signal for signal in last.operation.memorization if signal.signal_permille > threshold_permille
            )
            rollback = self._ledger.record_memorization_rollback(last.permission, last.id, recited)
            self.recited.update((signal.source, signal.example) for signal in recited)
            reason = Reason.MEMORIZATION_ABOVE_THRESHOLD.value
            self._book.note("rollback", last.index, id=rollback.id.hex(), detail=reason)
        self.done = self._ring.final.step
        self._history = {step.index: again(step, taken_up.grants[step.permission.grant]) for step in steps}
        self._replay_to = (self._ledger.place.steps, self._ledger.place.root)
        self._end_replay_if_due()

    def follow_finality(self) -> None:
        """Hear what the log said meanwhile: a candidate that is final, or a refusal to go back from.

        Raises:
            As ``go_back``.
        """
        candidate, news = self._ring.candidate, self._ledger.news(self._candidate)
        if candidate is not None and news.candidate_is_final:
            self._ring.finalized(candidate.step, candidate.root)
            self._checkpoints.offer(self._ring.final, self.recited)
            self._candidate = None
            self._ledger.forget_through(candidate.step)
            for index in [index for index in self._history if index <= candidate.step]:
                del self._history[index]
        if news.failure is not None:
            self.go_back(news.failure)

    def go_back(self, failure: Fate) -> None:
        """Back to where the log stands: restore the last final snapshot, then replay up to there.

        Raises:
            StepNotAdmitted: as ``LedgerSide.roll_back_to_log``. ReplayFailed: nothing is to be replayed and the
            parameters are not the log's.
        """
        self._book.drop()
        with self._record.costs.paused():
            stands, _ = self._ledger.roll_back_to_log(failure)
        restored = self._ring.roll_back(self._state)
        self._candidate = None
        self._last_event = None
        self.done = restored.step
        self._replay_to = (stands.steps, stands.root)
        self._record.recoveries += 1
        self._record.rollbacks += 1
        self._record.undone_after(stands.steps)
        for index in [index for index in self._history if index > stands.steps]:
            del self._history[index]
        self._book.note("recovery", stands.steps + 1, id=failure.id.hex(), detail=failure.reason)
        self._end_replay_if_due()

    def _end_replay_if_due(self) -> None:
        if self._replay_to is None or self.done < self._replay_to[0]:
            return
        expected = self._replay_to[1]
        self._replay_to = None
        copies = self._model.copied()
        self.parameters = copies
        root = self._ranks.by_first(lambda: root_of_tensors(copies))
        if root != expected:
            reason = f"replay to step {self.done} ended at {root.hex()}, the log stands at {expected.hex()}"
            self._ledger.record_abandon(reason)
            raise ReplayFailed(reason)
        if self.done > self._ring.final.step:
            self._ring.offer(take_snapshot(self._state, self.done, root))
            self._ring.finalized(self.done, root)
            self._checkpoints.offer(self._ring.final, self.recited)
        self._history.clear()
