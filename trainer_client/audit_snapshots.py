"""Snapshots kept for audits: where a replay of some steps can begin instead of at the base model.

A run keeps one after every ``audit_snapshot_every_steps`` steps, and at its end, for good: parameters, optimizer state
and random states as the next step found them. They are checkpoints' files (``checkpoints.py``), in a folder of their
own.

Who replays has them from the operator and believes none of it. **Nothing of a snapshot is used that the log does not
bind** ◆: parameters and persistent buffers by the parameter root of its step, the optimizer's state and settings by
that step's optimizer digest, random states by the digest in the step *after* it. The schedule is stepped anew from the
job's own, and buffers that no root covers (a mask, say) stay the job's own: in a snapshot they could be what the
operator trained with and its code does not show.

Whether the steps that start from one come out as recorded is for ``picked_replay.py``.
"""

import logging
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected
from trainer_client.checkpoints import Checkpoint, checkpoint_files, read_checkpoint, step_of, write_checkpoint
from trainer_client.commitment import committed_tensors, optimizer_state_digest, parameter_root_of
from trainer_client.record import Example
from trainer_client.resumption import RecordedStep
from trainer_client.rollback import Snapshot, Stateful, TrainingState, random_state, restore_snapshot
from trainer_client.step_book import random_digest

_log = logging.getLogger(__name__)


def snapshot_directory(run_directory: Path, campaign: bytes) -> Path:
    """Where a run keeps what it hands out for audits of a campaign."""
    return run_directory / "snapshots" / campaign.hex()


class AuditSnapshots:
    """Writes the snapshots of one run, in ``directory``; every one, however slow the disk."""

    def __init__(self, directory: Path, campaign: bytes, every_steps: int) -> None:
        """``every_steps``: 0 keeps none."""
        self._directory = directory
        self._campaign = campaign
        self._every_steps = every_steps
        self._writing: Future[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit-snapshots")

    def due(self, step: int, *, last: bool) -> bool:
        """Whether one is to be kept after ``step`` steps; after the ``last`` at any rate, of the base model never."""
        return bool(self._every_steps) and step > 0 and (last or step % self._every_steps == 0)

    def keep(self, snapshot: Snapshot, recited: Iterable[Example]) -> None:
        """Write it beside training, once the one before is written. It takes the place of an undone attempt's."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._executor.submit(self._write, Checkpoint(snapshot, frozenset(recited)))

    def close(self) -> None:
        """Wait for what is being written."""
        self._executor.shutdown(wait=True)

    def _write(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.snapshot.step
        try:
            written = write_checkpoint(self._directory, checkpoint, self._campaign)
        except (OSError, RuntimeError) as error:  # torch's writer reports a disk as either
            _log.warning("no snapshot of step %d for audits: %s", step, error)
            return
        for path in checkpoint_files(self._directory, step):
            if path != written:
                path.unlink()


class SnapshotFolder:
    """A folder of snapshots from an operator, for a job that replays."""

    def __init__(self, directory: Path, campaign: bytes) -> None:
        """Raises ``ConfigError`` where there is no snapshot at all."""
        self.directory = directory
        self._campaign = campaign
        self._files: dict[int, Path] = {}
        for path in checkpoint_files(directory):
            step = step_of(path)
            if step is not None:
                self._files[step] = path
        if not self._files:
            raise ConfigError(f"--snapshots {directory}: expected files called step-….checkpoint, found none")

    @property
    def steps(self) -> tuple[int, ...]:
        """After how many steps there are snapshots, rising."""
        return tuple(sorted(self._files))

    def read(self, step: int) -> Snapshot:
        """The snapshot after ``step`` steps, unchecked.

        Raises:
            ConfigError: as ``checkpoints.read_checkpoint``, or the file holds another step's.
        """
        path = self._files[step]
        snapshot = read_checkpoint(path, self._campaign).snapshot
        if snapshot.step != step:
            raise ConfigError(f"{path}: expected a snapshot of step {step}, found step {snapshot.step}")
        return snapshot


class Restoration:
    """Puts a job where the log says that it stood, by snapshots and the job's own schedule and buffers."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Stateful | None) -> None:
        """The job as it stood before its first step."""
        self._state = TrainingState(model, optimizer)
        self._scheduler = scheduler
        self._scheduled_to = 0
        committed = committed_tensors(model)
        self._own = {name: held.clone() for name, held in model.named_buffers() if name not in committed}

    def stepped(self, step: int) -> None:
        """The job took this step, and its schedule with it."""
        self._scheduled_to = step

    def restore(self, snapshot: Snapshot, steps: Sequence[RecordedStep]) -> None:
        """Put the job there; ``steps`` are the campaign's, all that stand, from the first.

        Raises:
            Rejected: ``DIGEST_MISMATCH`` naming what is not as logged, with both digests; ``STEP_CHAIN_BROKEN`` for a
                snapshot of a step that the log has not, or of before where the job's schedule stands.
        """
        after = snapshot.step
        if not self._scheduled_to <= after <= len(steps) or after < 1:
            raise Rejected(
                Reason.STEP_CHAIN_BROKEN,
                f"a snapshot of step {after}, the job stands at {self._scheduled_to}, the log at {len(steps)}",
            )
        self._step_schedule(steps[self._scheduled_to : after])
        self._scheduled_to = after
        tensors = {**snapshot.tensors, **self._own}
        try:
            restore_snapshot(replace(snapshot, tensors=tensors, stateful={}, generators={}), self._state)
            found = {
                "parameter root": (parameter_root_of(self._state.model), steps[after - 1].operation.root_after),
                "optimizer digest": (
                    optimizer_state_digest(self._state.optimizer),
                    steps[after - 1].operation.optimizer_digest,
                ),
            }
            if after < len(steps):  # nothing follows the last step: no random number is drawn from what stands there
                found["random states' digest"] = (random_digest(random_state()), steps[after].operation.rng_digest)
        except (InvariantBroken, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            # What a stranger's file makes of a live job: each is a snapshot that does not fit.
            raise Rejected(
                Reason.DIGEST_MISMATCH, f"the snapshot of step {after} is none of this job: {error!r:.300}"
            ) from error
        for what, (here, logged) in found.items():
            if here != logged:
                raise Rejected(
                    Reason.DIGEST_MISMATCH,
                    f"the snapshot of step {after} is not the log's: its {what} is {here.hex()}, "
                    f"the log has {logged.hex()}",
                )

    def _step_schedule(self, passed: Sequence[RecordedStep]) -> None:
        """A step of which nothing was admitted took no step of optimizer and schedule."""
        if self._scheduler is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "scheduler before optimizer": the optimizer's steps are in the snapshot
            for step in passed:
                if step.admitted:
                    self._scheduler.step()  # type: ignore[attr-defined]
