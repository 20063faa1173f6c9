"""Replays of some steps on another build than the job's, where last bits differ: numbers within a tolerance.

The log has digests, which say nothing of numbers that are almost the same. Numbers are in the snapshots, and which ones
is bound by the log (``audit_snapshots.py``). So for a picked step the job is put at the newest snapshot before it,
takes the steps up to the first snapshot at or after it, and each tensor is held against that one's:

    ‖mine − recorded‖ <= tolerance · ‖recorded − as it was at the snapshot before‖        (2-norms)

**Relative to the change, not to the weights** ◆: a few steps move weights by less than any useful tolerance of theirs,
and who trained nothing would pass. A tensor that the record did not change must not have changed at all. The
optimizer's state is compared in the same way. At the snapshot the job goes on from the recorded numbers, so differences
do not pile up.

What is told is the stretch between two snapshots, not a step: within it nothing is compared. Random numbers must be the
same ones, so dropout on a GPU is compared with dropout on a GPU. Accumulators are compared where their files are at
hand (``window_comparison.py``), of windows that were taken again from their first step, and with them the sketches of
their examples.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from consensus.accumulators import window_bounds
from consensus.identifiers import ZERO_DIGEST, Digest
from consensus.rejection import ConfigError, Reason, Rejected
from trainer_client.audit_snapshots import Restoration, SnapshotFolder
from trainer_client.picked_replay import PickedReplay, PickedStep, WindowTally, check_picked
from trainer_client.ranks import ALONE, Ranks
from trainer_client.replay import PROFILES, Bench, Difference, LoggedCampaign, OnStep, ReplayJob, bench, check_job
from trainer_client.sharding import whole
from trainer_client.sketch_witness import SketchWitness
from trainer_client.sketches import Place
from trainer_client.window_comparison import differing_sketches, differing_sums, recorded_sketches

E = TypeVar("E")

Numbers = Mapping[str, Tensor]
"""Tensors of a job by what they are called: parameters, buffers, optimizer state."""


def replay_within(
    logged: LoggedCampaign,
    job: ReplayJob[E],
    picked: Sequence[int],
    snapshots: SnapshotFolder,
    tolerance: float,
    on_step: OnStep = lambda done, of: None,
    recorded_windows: Path | None = None,
    ranks: Ranks = ALONE,
) -> PickedReplay:
    """Take the stretches with the picked steps again and compare their ends within ``tolerance``, above 0 and below 1.

    Args:
        snapshots: of the same ranks, all of which call this; the first compares.
        recorded_windows: the run's folder of accumulators, or what a custodian gave out of it; None compares none.

    Raises:
        Rejected: ``NOT_FOUND`` for a picked step with no snapshot at or after it; as ``replay_picked`` and, of windows,
            as ``window_comparison.differing_sums``.
        ConfigError: a snapshot cannot be read, or a window's file is not there.
    """
    check_picked(logged, picked)
    check_job(logged, job, ranks=ranks)
    if recorded_windows is not None and not logged.terms.accumulator_window_steps:
        raise ConfigError(f"{recorded_windows}: the campaign keeps no accumulators, there is nothing to compare")
    stretches = sorted({_stretch(step, snapshots.steps) for step in picked})
    differing: dict[tuple[int, int], tuple[str, ...]] = {}
    executed = at = 0
    summed = recorded_windows is not None
    with bench(logged, job, ranks, accumulated=summed, tolerance=tolerance, witnessed=summed) as run:
        restoration = Restoration(run.parallel, job.optimizer, job.scheduler, run.scaling.scaler, ranks)
        windows, witness = WindowTally(logged, run), _Witness(logged, run, recorded_windows, stretches)
        for number, (start, end) in enumerate(stretches, 1):
            if start > at:
                restoration.restore(snapshots.read(start), logged.steps)
                windows.begin_at(start)
            before = _numbers(run)
            apart: tuple[str, ...] = ()
            for recorded in logged.steps[start:end]:
                if not run.states_profiles(recorded):
                    apart += (f"{PROFILES} of step {recorded.index}",)
                witness.begin(recorded.index)
                root = run.take(recorded, run.admitted(recorded))
                apart += tuple(f"{what} in step {recorded.index}" for what in run.scaled_otherwise(recorded, tolerance))
                executed += 1
                if recorded_windows is None or run.accumulators is None or not windows.ends_whole(recorded.index):
                    continue
                windows_at = run.accumulators.directory, root, recorded_windows, recorded.operation.accumulator_root
                apart += ranks.by_first(partial(differing_sums, *windows_at, tolerance))
                apart += witness.differing(run.accumulators.directory, root, tolerance)
            reached = _numbers(run)
            restoration.restore(snapshots.read(end), logged.steps)
            numbers = before, reached, _numbers(run)
            differing[start, end] = ranks.by_first(partial(_apart, *numbers, tolerance)) + apart
            at = end
            on_step(number, len(stretches))
    found = []
    for step in picked:
        start, end = _stretch(step, snapshots.steps)
        what = differing[start, end]
        found.append(PickedStep(step, (f"steps {start + 1} to {end}", *what) if what else ()))
    first = next(((stretch, what) for stretch, what in sorted(differing.items()) if what), None)
    difference = None if first is None else Difference(first[0][0] + 1, (f"by step {first[0][1]}", *first[1]))
    matching = [each.step for each in found if not each.differing]
    end_root = logged.steps[matching[-1] - 1].operation.root_after if matching else ZERO_DIGEST
    compared = (windows.whole, windows.cut) if recorded_windows is not None else (0, 0)
    return PickedReplay(tuple(found), difference, executed, *compared, Digest(end_root), tolerance_text(tolerance))


class _Witness:
    """Where the files of recorded sketches are at hand: which hold too little of the gradients formed again."""

    def __init__(
        self, logged: LoggedCampaign, run: Bench[E], recorded: Path | None, stretches: Sequence[tuple[int, int]]
    ) -> None:
        self._logged = logged
        self._ranks = run.ranks
        sketches = None if run.accumulators is None or recorded is None else run.accumulators.sketches
        self._book = sketches if isinstance(sketches, SketchWitness) else None
        self._folder = recorded
        self._taken = {step for start, end in stretches for step in range(start + 1, end + 1)}
        self._recorded: dict[tuple[bytes, bytes], dict[str, Tensor]] = {}

    def begin(self, step: int) -> None:
        """A step is to be taken: where it begins a window that is taken whole, what was recorded is watched."""
        terms = self._logged.terms
        if self._book is None:
            return
        first, last = window_bounds(terms.accumulator_window_steps, terms.planned_steps, step)
        if step == first:
            whole = self._taken.issuperset(range(first, last + 1))
            self._recorded = self._read(self._logged.steps[last - 1].operation.accumulator_root) if whole else {}
            self._book.hold(self._recorded)

    def differing(self, own: Path, root: bytes, tolerance: float) -> tuple[str, ...]:
        """What of the window just ended is not as recorded, told to all of the ranks."""
        if self._book is None:
            return ()
        shared: dict[Place, float] = {}
        for part in self._ranks.gathered(self._book.shared):
            for place, product in part.items():
                shared[place] = shared.get(place, 0.0) + product
        recorded = self._recorded
        return self._ranks.by_first(lambda: differing_sketches(own, root, recorded, shared, tolerance))

    def _read(self, root: bytes) -> dict[tuple[bytes, bytes], dict[str, Tensor]]:
        folder = self._folder
        assert folder is not None
        return self._ranks.together(lambda: recorded_sketches(folder, root))


def tolerance_text(tolerance: float) -> str:
    """What an audit result says of how it compared."""
    return f"{tolerance:g} of each tensor's change, parameters and optimizer state, at the next snapshot"


def _stretch(step: int, snapshots: Sequence[int]) -> tuple[int, int]:
    """The snapshots, or the base model, between which a step lies."""
    ends = [held for held in snapshots if held >= step]
    if not ends:
        raise Rejected(
            Reason.NOT_FOUND, f"no snapshot at or after step {step}: nothing to compare with, within a tolerance"
        )
    return max((held for held in snapshots if held < step), default=0), ends[0]


def _numbers(run: Bench[E]) -> dict[str, Tensor]:
    """Whole, on the first of the ranks; nothing elsewhere. All must ask."""
    numbers = {f"tensor {name}": tensor for name, tensor in run.copied().items()}
    optimizer = run.job.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                held = whole(value)
                if run.ranks.is_first:
                    numbers[f"optimizer state {index} {name}"] = held.detach().to("cpu", copy=True)
    return numbers


def _apart(before: Numbers, mine: Numbers, recorded: Numbers, tolerance: float) -> tuple[str, ...]:
    """What is not within the tolerance of the recorded change."""
    what = []
    for name in sorted(mine.keys() | recorded.keys()):
        here, there = mine.get(name), recorded.get(name)
        if here is None or there is None or here.shape != there.shape:
            what.append(name)
            continue
        was = before.get(name)
        there_wide = there.to(torch.float64)
        change = there_wide if was is None else there_wide - was.to(torch.float64)
        apart = torch.linalg.vector_norm(here.to(torch.float64) - there_wide)
        if not bool(apart <= tolerance * torch.linalg.vector_norm(change)):
            what.append(name)
    return tuple(what)
