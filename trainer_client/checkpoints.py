"""Checkpoints: a run's last final snapshot on disk, to take the run up from after its process died.

A checkpoint is a ``rollback.Snapshot`` whose parameter root is final on the log, with the examples refused for good by
then: whatever the log refuses or undoes later, it never has to go back behind it. The first one is written before
the campaign is on the log.

* **Written beside training**, by one thread, from a snapshot that nobody changes. While one is being written others
  pass; a disk that is full costs a warning and the older checkpoint stays.
* **Whole or not there.** Written, hashed, fsynced, renamed to a name that holds the SHA-256, fsync of the folder. The
  two newest are kept: should the newest turn out damaged, the one before serves.
* **Data, not code.** Read with ``torch.load(weights_only=True)``.
* **Several ranks** each keep their own, of the same steps: none begins one before all have the last. What they are
  taken up from is the newest that every one of them can read.
"""

import hashlib
import logging
import pickle
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consensus.identifiers import Digest
from consensus.rejection import ConfigError
from trainer_client.durable import make_durable
from trainer_client.ranks import ALONE, Ranks
from trainer_client.record import Example
from trainer_client.rollback import RandomState, Snapshot

VERSION = 1
KEPT = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A snapshot and the examples that stay refused after it.

    ``others`` are the random states of the ranks but the first, in order, where the snapshot is of all of them.
    """

    snapshot: Snapshot
    recited: frozenset[Example]
    others: tuple[RandomState, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, in ``directory``."""

    def __init__(self, directory: Path, campaign: bytes, every_steps: int, ranks: Ranks = ALONE) -> None:
        """``every_steps``: least distance between two checkpoints; 0 keeps none."""
        self._ranks = ranks
        self._directory = directory
        self._campaign = campaign
        self._every_steps = every_steps
        self._writing: Future[None] | None = None
        self._written_step: int | None = None
        self._offered_step: int | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")

    def begin(self, snapshot: Snapshot) -> None:
        """Write the first one, of step 0, and return when it is on disk; an earlier one of this campaign goes.

        Where it cannot be written or read again (a full disk, a part of the job whose state is not plain data) there
        are no checkpoints, and a warning: training does not depend on them.
        """
        if not self._every_steps:
            return
        for path in self._paths():
            path.unlink()
        problem = ""
        try:
            self._write(Checkpoint(snapshot, frozenset()))
            self.newest()
        except (OSError, RuntimeError, ConfigError) as error:
            problem = str(error)
        problem = next(filter(None, self._ranks.gathered(problem)), "")
        if problem:
            self._every_steps = 0
            for path in self._paths():
                path.unlink()
            _log.warning("no checkpoints: %s; should the process die, this run cannot be taken up again", problem)

    def offer(self, snapshot: Snapshot, recited: Iterable[Example]) -> None:
        """A snapshot whose root is final: written if it is far enough from the last one and none is being written.

        Several ranks wait for each other's last one instead, so that all write the same.
        """
        if not self._every_steps:
            return
        several = self._ranks.size > 1
        last = self._offered_step if several else self._written_step
        if last is not None and snapshot.step - last < self._every_steps:
            return
        if several:
            self.settle()
            self._ranks.gathered(None)
            self._offered_step = snapshot.step
        elif self._writing is not None and not self._writing.done():
            return
        self._writing = self._executor.submit(self._write_or_warn, Checkpoint(snapshot, frozenset(recited)))

    def newest(self) -> Checkpoint | None:
        """The newest that can be read; None where there is none at all.

        Raises:
            ConfigError: there are some, all damaged or another campaign's.
        """
        problem: ConfigError | None = None
        for path in reversed(self._paths()):
            try:
                found = read_checkpoint(path, self._campaign)
            except ConfigError as error:
                _log.warning("%s", error)
                problem = problem or error
                continue
            return self._taken(found)
        if problem is not None:
            raise problem
        return None

    def newest_of_all(self) -> Checkpoint | None:
        """As ``newest``, of the steps of which every rank has one; every rank must ask.

        Raises:
            ConfigError: there are some, and none that all ranks can read.
        """
        if self._ranks.size == 1:
            return self.newest()
        own = {step_of(path) or 0: path for path in self._paths() if _sha256(path) == _digest_of(path)}
        steps = self._ranks.gathered(sorted(own))
        common = set(steps[0]).intersection(*steps[1:])
        if common:
            return self._taken(self._ranks.together(lambda: read_checkpoint(own[max(common)], self._campaign)))
        if any(self._ranks.gathered(bool(self._paths()))):
            raise ConfigError(f"{self._directory}: no checkpoint of a step that all ranks have whole: {steps}")
        return None

    def _taken(self, checkpoint: Checkpoint) -> Checkpoint:
        self._written_step = self._offered_step = checkpoint.snapshot.step
        return checkpoint

    def settle(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Wait for what is being written."""
        self._executor.shutdown(wait=True)

    def _paths(self) -> list[Path]:
        return checkpoint_files(self._directory)

    def _write_or_warn(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except (OSError, RuntimeError) as error:  # torch's writer reports a disk as either
            _log.warning("no checkpoint of step %d: %s", checkpoint.snapshot.step, error)

    def _write(self, checkpoint: Checkpoint) -> None:
        write_checkpoint(self._directory, checkpoint, self._campaign)
        self._written_step = checkpoint.snapshot.step
        for old in self._paths()[:-KEPT]:
            old.unlink()


def checkpoint_files(directory: Path, step: int | None = None) -> list[Path]:
    """The files of a folder that are called as checkpoints are, of one step or all, by step."""
    return sorted(directory.glob("step-*.checkpoint" if step is None else f"step-{step:09}-*.checkpoint"))


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's file is called after; None for another file's name."""
    _, _, step = path.name.partition("-")
    number, _, _ = step.partition("-")
    return int(number) if number.isascii() and number.isdigit() else None


def write_checkpoint(directory: Path, checkpoint: Checkpoint, campaign: bytes) -> Path:
    """Write a checkpoint's file and return it once it is on disk, whole.

    Raises:
        OSError, RuntimeError: it could not be written; nothing is left of it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / "checkpoint.unfinished"
    try:
        torch.save(_plain(checkpoint, campaign), unfinished)
        path = directory / f"step-{checkpoint.snapshot.step:09}-{_sha256(unfinished)}.checkpoint"
        make_durable(unfinished, path)
    except (OSError, RuntimeError):
        unfinished.unlink(missing_ok=True)
        raise
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(path: Path) -> str:
    """The SHA-256 that a checkpoint's name holds."""
    return path.stem.rpartition("-")[2]


def _plain(checkpoint: Checkpoint, campaign: bytes) -> dict[str, Any]:
    snapshot = checkpoint.snapshot
    return {
        "version": VERSION,
        "campaign": campaign,
        "step": snapshot.step,
        "root": bytes(snapshot.root),
        "tensors": dict(snapshot.tensors),
        "optimizer_state": {index: dict(held) for index, held in snapshot.optimizer_state.items()},
        "optimizer_settings": [dict(held) for held in snapshot.optimizer_settings],
        "stateful": {name: dict(held) for name, held in snapshot.stateful.items()},
        "generators": dict(snapshot.generators),
        **_plain_random(snapshot.random),
        "others": [_plain_random(random) for random in checkpoint.others],
        "recited": sorted(checkpoint.recited),
    }


def _plain_random(random: RandomState) -> dict[str, Any]:
    state = random.numpy["state"]
    return {
        "torch_cpu": random.torch_cpu,
        "torch_cuda": list(random.torch_cuda),
        "python": random.python,
        "numpy": {**random.numpy, "state": {**state, "key": torch.from_numpy(state["key"])}},
    }


def read_checkpoint(path: Path, campaign: bytes) -> Checkpoint:
    """A checkpoint's file. Whole is not true: that it is what the log says of its step is for its reader to check.

    Raises:
        ConfigError: it is damaged, of another version or campaign, holds more than data, or is no checkpoint.
    """
    try:
        digest = _sha256(path)
    except OSError as error:
        raise ConfigError(f"{path}: expected a checkpoint, found: {error.strerror}") from error
    if digest != _digest_of(path):
        raise ConfigError(f"{path}: the checkpoint is damaged: it has SHA-256 {digest}")
    try:
        plain = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: the checkpoint cannot be read as plain data: {error}") from error
    try:
        return _checkpoint(plain, path, campaign)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected a checkpoint, found other data: {error!r:.200}") from error


def _checkpoint(plain: dict[str, Any], path: Path, campaign: bytes) -> Checkpoint:
    if plain["version"] != VERSION:
        raise ConfigError(f"{path}: expected a checkpoint of version {VERSION}, found {plain['version']}")
    if plain["campaign"] != campaign:
        raise ConfigError(f"{path}: expected a checkpoint of campaign {campaign.hex()}, not {plain['campaign'].hex()}")
    snapshot = Snapshot(
        step=plain["step"],
        root=Digest(plain["root"]),
        tensors=plain["tensors"],
        optimizer_state=plain["optimizer_state"],
        optimizer_settings=tuple(plain["optimizer_settings"]),
        stateful=plain["stateful"],
        generators=plain["generators"],
        random=_random(plain),
    )
    recited = frozenset((source, index) for source, index in plain["recited"])
    return Checkpoint(snapshot, recited, tuple(map(_random, plain.get("others", ()))))


def _random(plain: dict[str, Any]) -> RandomState:
    numpy = plain["numpy"]
    numpy["state"]["key"] = numpy["state"]["key"].numpy()
    return RandomState(plain["torch_cpu"], tuple(plain["torch_cuda"]), plain["python"], numpy)
