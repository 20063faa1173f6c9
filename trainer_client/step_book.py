"""The step book: takes what a step did and writes it down while the next one runs.

Hashing happens in threads: parameters on copies (``commitment.CommitmentWorker``), the optimizer's state in place,
which nobody changes before the next ``optimizer.step()``; ``settle_optimizer`` waits for that. At most one step is
open. ``resolve`` gives its events to the ledger's side and its lines to the run's record.

Where several ranks train, the first one's book records; the others' follow it.
"""

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor

from consensus import portions as p
from consensus.identifiers import ZERO_DIGEST, Digest, Tag, tagged_hash
from consensus.rejection import InvariantBroken
from consensus.reserve import RESERVED
from trainer_client.commitment import CommitmentWorker, StepCommitment, optimizer_state_digest
from trainer_client.grants import OpenGrant
from trainer_client.ledger_side import LedgerSide
from trainer_client.progress import Progress, RunRecord
from trainer_client.ranks import Ranks
from trainer_client.record import Example, RecordedEvent, StepOutcome, StepUse, refused_by_event
from trainer_client.rollback import RandomState, Snapshot, StepBeginning
from trainer_client.scaling import Scaled
from trainer_client.tensor_digests import TensorDigests

MICRO = 1_000_000
NANO = 1_000_000_000


@dataclass(slots=True)
class Step:
    """A step while it is being taken. ``before`` is a snapshot to undo it by, where it may have to be undone.

    ``profiles`` are the depth profiles of its admitted examples.
    ``started`` is in seconds of ``time.perf_counter``. ``batches`` are this rank's micro-batches, as many as every rank
    has: where there are several ranks, one of them may be empty. ``learned`` of them are done. ``flushed`` and
    ``carried`` are ``portions.StepOperation``'s; ``scaled`` is what became of its gradients, once they are whole, and
    ``stepped`` whether the run took the optimizer's step, or skipped it.
    """

    index: int
    grant: OpenGrant
    admitted: tuple[Example, ...]
    refused: dict[Example, str]
    replayed: bool
    rng_digest: Digest
    beginning: StepBeginning
    started: float
    before: Snapshot | None
    profiles: Mapping[Example, p.ClassProfile]
    batches: tuple[tuple[Example, ...], ...] = ()
    loss_sum: float = 0.0
    learned: int = 0
    flushed: tuple[bytes, ...] = ()
    carried: tuple[p.CarriedMomentum, ...] = ()
    scaled: Scaled | None = None
    stepped: bool = False

    @property
    def applied(self) -> tuple[p.ClassProfile, ...]:
        """Its depth profiles, in order of class and entropy band."""
        held = {(profile.content_class, profile.band): profile for profile in self.profiles.values()}
        return tuple(held[key] for key in sorted(held))

    def weights_permille(self, example: Example) -> tuple[int, ...]:
        """The depth profile of an admitted example, over the campaign's parameter blocks."""
        return self.profiles[example].weights_permille

    def weights_by_source(self) -> dict[bytes, tuple[int, ...]]:
        """Of each source with admitted examples, the most that one of them has in each parameter block."""
        held = {(source, profile.band): profile for (source, _), profile in self.profiles.items()}
        deepest: dict[bytes, tuple[int, ...]] = {}
        for (source, _), profile in held.items():
            weights = profile.weights_permille
            deepest[source] = tuple(map(max, deepest.get(source, weights), weights))
        return deepest


@dataclass(frozen=True, slots=True)
class _Open:
    """A step taken, whose digests are being computed."""

    step: Step
    commitment: Future[StepCommitment]
    learning_rate_nano: int
    signals: tuple[p.MemorizationSignal, ...]
    accumulator_root: Future[Digest] | None
    microseconds: int


class StepBook:
    """Writes steps of one run, in order."""

    def __init__(
        self,
        ledger: LedgerSide,
        record: RunRecord,
        blocks: Mapping[str, tuple[str, ...]],
        planned_steps: int,
        digests: "OptimizerDigests",
        tensor_digests: TensorDigests,
    ) -> None:
        self._tensor_digests = tensor_digests
        self._ledger = ledger
        self._record = record
        self._planned_steps = planned_steps
        self._worker = CommitmentWorker(blocks)
        self._digests = digests
        self._open: _Open | None = None

    @property
    def background_cpu_seconds(self) -> float:
        """Processor time of hashing."""
        return self._worker.cpu_seconds + self._digests.cpu_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.close()
        self._digests.close()

    def write(
        self,
        step: Step,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        signals: tuple[p.MemorizationSignal, ...],
        accumulator_root: Future[Digest] | None = None,
    ) -> None:
        """A step was taken: begin its digests. ``before`` and ``after`` are copies nobody changes.

        ``accumulator_root`` is that of the window which the step ends, once its blobs are on disk.

        Raises:
            InvariantBroken: the step before is not resolved.
        """
        if self._open is not None:
            raise InvariantBroken(f"step {self._open.step.index} is not resolved yet")
        commitment = self._worker.submit(before, after)
        self._digests.begin(optimizer)
        self._open = _Open(
            step=step,
            commitment=commitment,
            learning_rate_nano=round(learning_rate * NANO),
            signals=signals,
            accumulator_root=accumulator_root,
            microseconds=round((time.perf_counter() - step.started) * MICRO),
        )

    def settle_optimizer(self) -> None:
        """Wait until the optimizer's state may change again."""
        self._digests.settle()

    def drop(self) -> None:
        """Forget the open step, which is not to be recorded."""
        if self._open is not None:
            self._open.commitment.result()
            self._digests.settle()
            self._open = None

    def resolve(self) -> RecordedEvent | None:
        """The event of the open step, on disk, with its refusals before it; None where no step is open."""
        taken, self._open = self._open, None
        if taken is None:
            return None
        step = taken.step
        commitment = taken.commitment.result()
        self._tensor_digests.append(step.index, commitment.tensors_after)
        loss = step.loss_sum / len(step.admitted) if step.admitted else None
        outcome = StepOutcome(
            root_before=commitment.root_before,
            root_after=commitment.root_after,
            deltas=commitment.deltas,
            optimizer_digest=self._digests.finish(),
            learning_rate_nano=taken.learning_rate_nano,
            loss_micro=round(max(loss or 0.0, 0.0) * MICRO),
            rng_digest=step.rng_digest,
            memorization=taken.signals,
            accumulator_root=b"" if taken.accumulator_root is None else taken.accumulator_root.result(),
            flushed=step.flushed,
            carried=step.carried,
            step_microseconds=taken.microseconds,
            global_clip_nano=0 if step.scaled is None else step.scaled.global_clip_nano,
            skipped=step.scaled is not None and step.scaled.skipped,
        )
        use = StepUse(frozenset(step.admitted), step.refused)
        events = self._ledger.record_step(step.grant, use, step.applied, outcome)
        self._note_step(taken, loss, events)
        return events[-1]

    def note(self, event: str, step: int, **fields: Any) -> None:
        """One line of the run's record; ``fields`` are ``Progress``'s."""
        attempt = self._ledger.place.attempt
        self._record.note(Progress(event=event, step=step, of=self._planned_steps, attempt=attempt, **fields))

    def note_grant(self, grant: OpenGrant) -> None:
        """A grant is on the log."""
        self._record.grants += 1
        detail = f"steps {grant.first_step} to {grant.last_step}, {len(grant.refused)} sources left out"
        self.note("grant", grant.first_step, id=grant.permission.grant.hex(), detail=detail)

    def _note_step(self, taken: _Open, loss: float | None, events: tuple[RecordedEvent, ...]) -> None:
        step = taken.step
        reasons = list(step.refused.values())
        counts = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        presented = len(step.admitted) + len(step.refused)
        self._record.note_step(step.index, loss, presented, counts)
        if refused := refused_by_event(step.refused):
            detail = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != RESERVED)
            self.note("refusal", step.index, id=events[0].id.hex(), refused=len(refused), detail=detail)
        settled = [f"{source.hex()} flushed" for source in step.flushed]
        settled += [f"{held.source.hex()} carried, at most {held.residual_nano / NANO:.9f}" for held in step.carried]
        if settled:
            self.note("momentum", step.index, id=events[-1].id.hex(), detail="; ".join(settled))
        if step.scaled is not None and step.scaled.skipped:
            self.note("skipped", step.index, id=events[-1].id.hex(), detail="a gradient overflowed")
        self.note(
            "step",
            step.index,
            id=events[-1].id.hex(),
            loss=None if loss is None or math.isnan(loss) else loss,
            presented=presented,
            refused=len(step.refused),
            memorization_permille=max((each.signal_permille for each in taken.signals), default=None),
            milliseconds=taken.microseconds / 1_000,
        )


class FollowingBook:
    """The book of a rank that records nothing: it has its part in the digest of a sharded optimizer."""

    def __init__(self, digests: "OptimizerDigests") -> None:
        self._digests = digests
        self._open = False

    @property
    def background_cpu_seconds(self) -> float:
        return self._digests.cpu_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._digests.close()

    def write(
        self,
        step: Step,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        signals: tuple[p.MemorizationSignal, ...],
        accumulator_root: Future[Digest] | None = None,
    ) -> None:
        self._open = True
        self._digests.begin(optimizer)

    def settle_optimizer(self) -> None:
        self._digests.settle()

    def drop(self) -> None:
        self._open = False
        self._digests.settle()

    def resolve(self) -> None:
        if self._open:
            self._open = False
            self._digests.finish()

    def note(self, event: str, step: int, **fields: Any) -> None:
        return

    def note_grant(self, grant: OpenGrant) -> None:
        return


class OptimizerDigests:
    """The digest of an optimizer's state after a step, made in a thread while the next one runs.

    Of a sharded optimizer each rank hashes its part, and the digest is over theirs in order of rank. Otherwise all
    ranks hold the same, and the first hashes it.
    """

    def __init__(self, ranks: Ranks, *, is_sharded: bool) -> None:
        self._ranks = ranks
        self._is_sharded = is_sharded
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="optimizer-digest")
        self._own: Future[Digest] | None = None
        self.cpu_seconds = 0.0

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Hash the state as it is now; its tensors must not change before ``settle``."""
        if self._is_sharded or self._ranks.is_first:
            self._own = self._executor.submit(self._captured_digest, optimizer.state_dict())

    def settle(self) -> None:
        """Wait until the state may change again."""
        if self._own is not None:
            self._own.result()

    def finish(self) -> Digest:
        """The digest begun last, on the first rank."""
        own = ZERO_DIGEST if self._own is None else self._own.result()
        return optimizer_digest_of_all(own, self._ranks) if self._is_sharded else own

    def close(self) -> None:
        """Wait, and end the thread."""
        self._executor.shutdown(wait=True)

    def _captured_digest(self, state: dict[str, Any]) -> Digest:
        try:
            return optimizer_state_digest(cast(torch.optim.Optimizer, _CapturedState(state)))
        finally:
            self.cpu_seconds = time.thread_time()


def random_digest(state: RandomState) -> Digest:
    """A digest of every global random state, exactly."""
    numpy_state = state.numpy
    keys = numpy_state["state"]
    settings = (keys["pos"], numpy_state["has_gauss"], numpy_state["gauss"])
    return tagged_hash(
        Tag.RANDOM_STATE,
        state.torch_cpu.numpy().tobytes(),
        *(each.cpu().numpy().tobytes() for each in state.torch_cuda),
        repr(state.python).encode(),
        keys["key"].tobytes() + repr(settings).encode(),
    )


def random_digest_of_all(own: Digest, ranks: Ranks) -> Digest:
    """The digest of this process's random states; of several ranks', over theirs in order."""
    return own if ranks.size == 1 else tagged_hash(Tag.RANDOM_STATE, *ranks.gathered(own))


def optimizer_digest_of_all(own: Digest, ranks: Ranks) -> Digest:
    """The digest of an optimizer's state, of which each rank holds a part: of several, over theirs in order."""
    return own if ranks.size == 1 else tagged_hash(Tag.OPTIMIZER, *ranks.gathered(own))


class _CapturedState:
    """An optimizer's ``state_dict`` as it was: settings copied, tensors the live ones."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state
