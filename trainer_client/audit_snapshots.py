"""Snapshots kept for audits: where a replay of some steps can begin instead of at the base model.

A run keeps one after every ``audit_snapshot_every_steps`` steps, and at its end, for good: parameters, optimizer state
and random states as the next step found them. They are checkpoints' files (``checkpoints.py``), in a folder of their
own.

**Several ranks** keep one file, the first one's: tensors whole, also of a sharded job, and the random states of all.
Every rank takes part in gathering them, at the same steps; writing is the first one's thread's. As many ranks begin
from it, each with its part, all from the file that the first one names.

Who replays has them from the operator and believes none of it. **Nothing of a snapshot is used that the log does not
bind** ◆: parameters and persistent buffers by the parameter root of its step, the optimizer's state and settings by
that step's optimizer digest, random states by the digest in the step *after* it. The schedule is stepped anew from the
job's own, and so is the scale of losses: which steps were skipped the log says. Buffers that no root covers (a mask,
say) stay the job's own: in a snapshot they could be what the operator trained with and its code does not show.

Whether the steps that start from one come out as recorded is for ``picked_replay.py``.
"""

import copy
import logging
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from consensus.identifiers import ZERO_DIGEST, Digest
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected
from trainer_client.checkpoints import Checkpoint, checkpoint_files, read_checkpoint, step_of, write_checkpoint
from trainer_client.commitment import committed_tensors, optimizer_state_digest, root_of_tensors
from trainer_client.data_parallel import ParallelModel
from trainer_client.ranks import ALONE, Ranks
from trainer_client.record import Example
from trainer_client.resumption import RecordedStep
from trainer_client.rollback import (
    Stateful,
    TrainingState,
    own_copy,
    own_part_of,
    random_state,
    restore_snapshot,
    take_snapshot,
)
from trainer_client.scaling import ScalerState, scale_after
from trainer_client.sharding import is_sharded, whole
from trainer_client.step_book import optimizer_digest_of_all, random_digest, random_digest_of_all

_log = logging.getLogger(__name__)


def snapshot_directory(run_directory: Path, campaign: bytes) -> Path:
    """Where a run keeps what it hands out for audits of a campaign."""
    return run_directory / "snapshots" / campaign.hex()


class AuditSnapshots:
    """Writes the snapshots of one run, in ``directory``; every one, however slow the disk."""

    def __init__(self, directory: Path, campaign: bytes, every_steps: int, ranks: Ranks = ALONE) -> None:
        """``every_steps``: 0 keeps none."""
        self._directory = directory
        self._campaign = campaign
        self._every_steps = every_steps
        self._ranks = ranks
        self._writing: Future[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit-snapshots")

    def due(self, step: int, *, last: bool) -> bool:
        """Whether one is to be kept after ``step`` steps; after the ``last`` at any rate, of the base model never."""
        return bool(self._every_steps) and step > 0 and (last or step % self._every_steps == 0)

    def keep(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, recited: Iterable[Example]) -> None:
        """Write one after ``step`` beside training, once the one before is written; every rank must ask.

        It takes the place of an undone attempt's. Where memory or disk is short, it costs the snapshot and a warning.
        """
        copies = _CopiesOfFirst(self._ranks)
        snapshot = take_snapshot(TrainingState(model, optimizer), step, ZERO_DIGEST, copied=copies.copied)
        committed = tuple(committed_tensors(model))
        others = tuple(self._ranks.gathered_by_first(snapshot.random)[1:])

        def begin() -> None:
            if copies.problem is not None:
                _log.warning("no snapshot of step %d for audits: %s", step, copies.problem)
                return
            if self._writing is not None:
                self._writing.result()
            checkpoint = Checkpoint(snapshot, frozenset(recited), others)
            self._writing = self._executor.submit(self._write, checkpoint, committed)

        self._ranks.by_first(begin)

    def close(self) -> None:
        """Wait for what is being written."""
        self._executor.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint, committed: Iterable[str]) -> None:
        """``committed`` are the tensors that the parameter root is of."""
        snapshot, step = checkpoint.snapshot, checkpoint.snapshot.step
        try:
            root = root_of_tensors({name: snapshot.tensors[name] for name in committed})
            rooted = replace(checkpoint, snapshot=replace(snapshot, root=root))
            written = write_checkpoint(self._directory, rooted, self._campaign)
        except (OSError, RuntimeError) as error:  # torch's writer reports a disk as either
            _log.warning("no snapshot of step %d for audits: %s", step, error)
            return
        for path in checkpoint_files(self._directory, step):
            if path != written:
                path.unlink()


class _CopiesOfFirst:
    """Makes whole copies of tensors on the first rank, and nothing of them elsewhere.

    A copy for which memory is short there is a ``problem`` and no error: the others would wait for the next tensor.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.problem: RuntimeError | None = None

    def copied(self, tensor: Tensor) -> Tensor:
        """Of each tensor in turn, on every rank; of sharded ones in main memory, a device may not hold all of them."""
        held = whole(tensor)
        if not self._ranks.is_first or self.problem is not None:
            return held.new_empty(0)
        try:
            return held.detach().to("cpu", copy=True) if is_sharded(tensor) else own_copy(held)
        except RuntimeError as error:
            self.problem = error
            return held.new_empty(0)


class SnapshotFolder:
    """A folder of snapshots from an operator, for a job that replays; each of its ranks makes one, and reads alike."""

    def __init__(self, directory: Path, campaign: bytes, ranks: Ranks = ALONE) -> None:
        """Raises ``ConfigError`` where there is no snapshot at all."""
        self.directory = directory
        self._campaign = campaign
        self._ranks = ranks
        self._names = ranks.by_first(self._found)

    @property
    def steps(self) -> tuple[int, ...]:
        """After how many steps there are snapshots, rising."""
        return tuple(sorted(self._names))

    def read(self, step: int) -> Checkpoint:
        """The snapshot after ``step`` steps, unchecked; on every rank of the one file that the first has found.

        Raises:
            ConfigError: as ``checkpoints.read_checkpoint``, or the file holds another step's. RankFailed: elsewhere.
        """
        return self._ranks.together(lambda: self._read(step))

    def _read(self, step: int) -> Checkpoint:
        path = self.directory / self._names[step]
        kept = read_checkpoint(path, self._campaign)  # held to the SHA-256 in its name
        if kept.snapshot.step != step:
            raise ConfigError(f"{path}: expected a snapshot of step {step}, found step {kept.snapshot.step}")
        return kept

    def _found(self) -> dict[int, str]:
        names = {step: path.name for path in checkpoint_files(self.directory) if (step := step_of(path)) is not None}
        if not names:
            raise ConfigError(f"--snapshots {self.directory}: expected files called step-….checkpoint, found none")
        return names


class Restoration:
    """Puts a job where the log says that it stood, by snapshots and the job's own schedule, scaler and buffers."""

    def __init__(
        self,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        scheduler: Stateful | None,
        scaler: torch.amp.GradScaler | None,
        ranks: Ranks = ALONE,
    ) -> None:
        """The job as it stood before its first step, on each of its ranks."""
        self._model = model
        self._ranks = ranks
        self._state = TrainingState(model.module, optimizer)
        self._scheduler = scheduler
        self._scaler = scaler
        self._put_after = 0
        self._schedule = {} if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._scale: ScalerState = {} if scaler is None else scaler.state_dict()
        committed = committed_tensors(model.module)
        self._own = {name: held.clone() for name, held in model.module.named_buffers() if name not in committed}

    def restore(self, kept: Checkpoint, steps: Sequence[RecordedStep]) -> None:
        """Put the job there; ``steps`` are the campaign's, all that stand, from the first. Every rank must ask.

        Raises:
            Rejected: ``DIGEST_MISMATCH`` naming what is not as logged, with both digests; ``STEP_CHAIN_BROKEN`` for a
                snapshot of a step that the log has not, or of before where the job was put last. RankFailed: elsewhere.
        """
        after = kept.snapshot.step
        if not max(1, self._put_after) <= after <= len(steps):
            raise Rejected(
                Reason.STEP_CHAIN_BROKEN,
                f"a snapshot of step {after}, the job was put at {self._put_after}, the log stands at {len(steps)}",
            )
        own_optimizer, own_random = self._ranks.together(lambda: self._put(kept, steps))
        optimizer = own_optimizer
        if self._model.is_sharded:
            optimizer = optimizer_digest_of_all(own_optimizer, self._ranks)
        at = steps[after - 1].operation
        found = {
            "parameter root": (self._model.root(), at.root_after),
            "optimizer digest": (optimizer, at.optimizer_digest),
        }
        if after < len(steps):  # nothing follows the last step: no random number is drawn from what stands there
            random = random_digest_of_all(own_random, self._ranks)
            found["random states' digest"] = (random, steps[after].operation.rng_digest)
        for what, (here, logged) in found.items():
            if here != logged:
                raise Rejected(
                    Reason.DIGEST_MISMATCH,
                    f"the snapshot of step {after} is not the log's: its {what} is {here.hex()}, "
                    f"the log has {logged.hex()}",
                )

    def _put(self, kept: Checkpoint, steps: Sequence[RecordedStep]) -> tuple[Digest, Digest]:
        """This rank's part; the digests of its optimizer and of its random states."""
        after = kept.snapshot.step
        states = (kept.snapshot.random, *kept.others)
        if len(states) != self._ranks.size:
            raise Rejected(
                Reason.DIGEST_MISMATCH,
                f"the snapshot of step {after} is of {len(states)} processes, the job of {self._ranks.size}",
            )
        self._step_schedule(steps[self._put_after : after])
        self._put_after = after
        try:
            part = own_part_of(kept.snapshot, self._state)
            tensors, random = {**part.tensors, **self._own}, states[self._ranks.rank]
            restore_snapshot(replace(part, tensors=tensors, stateful={}, generators={}, random=random), self._state)
            return optimizer_state_digest(self._state.optimizer), random_digest(random_state())
        except (InvariantBroken, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            # What a stranger's file makes of a live job: each is a snapshot that does not fit.
            raise Rejected(
                Reason.DIGEST_MISMATCH, f"the snapshot of step {after} is none of this job: {error!r:.300}"
            ) from error

    def _step_schedule(self, passed: Sequence[RecordedStep]) -> None:
        """Schedule and scaler on from where the last snapshot put them, whatever steps of the job's own came after."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(copy.deepcopy(self._schedule))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "scheduler before optimizer": its steps are in the snapshot
                for step in passed:
                    if step.admitted and not step.governance.skipped:
                        self._scheduler.step()  # type: ignore[attr-defined]
            self._schedule = copy.deepcopy(self._scheduler.state_dict())
        if self._scaler is not None:
            for step in passed:
                if step.admitted and any(any(profile.weights_permille) for profile in step.governance.profiles):
                    self._scale = scale_after(self._scale, skipped=step.governance.skipped)
            self._scaler.load_state_dict(dict(self._scale))
