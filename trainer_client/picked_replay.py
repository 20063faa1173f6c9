"""Replays of some steps only, each from the nearest snapshot before it instead of from the base model.

For every picked step the job is put where the newest snapshot before it stands (``audit_snapshots.py``: checked against
the log), and every step from there up to the picked one is taken again and held against the log as in ``replay.py``. So
the first step that differs is found, between two snapshots, and said, also where it is none of the picked ones; picks
behind it that no later snapshot leads to differ with it.

* **Tensors, not only blocks.** The log has one digest for each parameter block's change. Which tensors differ is told
  by those the operator kept of each tensor, if they give the step's parameter root (``tensor_digests.py``).
* **Windows.** The accumulators of a window are compared if all its steps were taken again; the rest is counted.
  Snapshots at the ends of windows make them whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from consensus.accumulators import ends_window, window_bounds
from consensus.identifiers import ZERO_DIGEST, Digest
from consensus.rejection import Reason, Rejected
from trainer_client.audit_snapshots import Restoration, SnapshotFolder
from trainer_client.ranks import ALONE, Ranks
from trainer_client.replay import Bench, Difference, LoggedCampaign, OnStep, ReplayJob, bench, check_job
from trainer_client.tensor_digests import differing_tensors

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class PickedStep:
    """What came of a picked step; ``differing`` is empty where it, and all that led to it, came out as recorded."""

    step: int
    differing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PickedReplay:
    """How the picked steps came out, rising; ``difference`` is the first step that did not come out as recorded.

    ``executed`` steps were taken again and compared; ``windows`` of accumulators were whole among them and compared,
    ``windows_cut`` ended there and began before. ``end_root`` is the root after the last picked step that came out.
    ``tolerance`` is empty where bits were compared.
    """

    picked: tuple[PickedStep, ...]
    difference: Difference | None
    executed: int
    windows: int
    windows_cut: int
    end_root: Digest
    tolerance: str = ""

    @property
    def matched(self) -> int:
        """How many of the picked steps came out as recorded."""
        return sum(not each.differing for each in self.picked)


@dataclass(slots=True)
class _Position:
    """Where the job stands: after ``step``; ``broken`` at a difference."""

    step: int = 0
    broken: Difference | None = None


def replay_picked(
    logged: LoggedCampaign,
    job: ReplayJob[E],
    picked: Sequence[int],
    snapshots: SnapshotFolder | None = None,
    on_step: OnStep = lambda done, of: None,
    ranks: Ranks = ALONE,
) -> PickedReplay:
    """Take the picked steps of a campaign again, from snapshots where there are any. All of the job's ranks call it.

    ``snapshots`` are of the same ranks.

    Raises:
        Rejected: ``STEP_CHAIN_BROKEN`` for steps that are not on the log, or not rising; ``DIGEST_MISMATCH`` for a
            snapshot that is not the log's; as ``replay``.
        ConfigError: a snapshot cannot be read. RankFailed: another process could not.
    """
    check_picked(logged, picked)
    check_job(logged, job, ranks=ranks)
    starts = (0, *(snapshots.steps if snapshots is not None else ()))
    with bench(logged, job, ranks, accumulated=True) as run:
        restoration = Restoration(run.parallel, job.optimizer, job.scheduler, run.scaling.scaler, ranks)
        walk = _Walk(logged, run, snapshots, restoration)
        found = []
        for number, step in enumerate(picked, 1):
            found.append(PickedStep(step, walk.reach(step, max(start for start in starts if start < step))))
            on_step(number, len(picked))
    matching = [each.step for each in found if not each.differing]
    end_root = logged.steps[matching[-1] - 1].operation.root_after if matching else ZERO_DIGEST
    return PickedReplay(tuple(found), walk.first, walk.executed, walk.windows.whole, walk.windows.cut, Digest(end_root))


def check_picked(logged: LoggedCampaign, picked: Sequence[int]) -> None:
    """The picked steps rise and are on the log.

    Raises:
        Rejected: ``STEP_CHAIN_BROKEN``.
    """
    if not picked or list(picked) != sorted(set(picked)) or not 1 <= picked[0] <= picked[-1] <= len(logged.steps):
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN,
            f"expected rising steps of 1 to {len(logged.steps)}, found {', '.join(map(str, picked[:20])) or 'none'}",
        )


class WindowTally:
    """Which windows of accumulators a replay takes again from their first step."""

    def __init__(self, logged: LoggedCampaign, run: Bench[E]) -> None:
        self._terms = logged.terms
        self._accumulators = run.accumulators
        self._empty = None if run.accumulators is None else run.accumulators.state_dict()
        self._begun = 0
        self.whole = self.cut = 0

    def begin_at(self, step: int) -> None:
        """The job was put after ``step``, not led there: what was summed before is dropped."""
        self._begun = step
        if self._accumulators is not None:
            assert self._empty is not None
            self._accumulators.load_state_dict(self._empty)

    def ends_whole(self, step: int) -> bool:
        """Whether a window ends at this step, just taken, that was taken from its first one on; counts it."""
        window_steps, planned_steps = self._terms.accumulator_window_steps, self._terms.planned_steps
        if not window_steps or not ends_window(window_steps, planned_steps, step):
            return False
        first, _ = window_bounds(window_steps, planned_steps, step)
        is_whole = first > self._begun
        self.whole += is_whole
        self.cut += not is_whole
        return is_whole


class _Walk:
    """Leads a job from picked step to picked step."""

    def __init__(
        self, logged: LoggedCampaign, run: Bench[E], snapshots: SnapshotFolder | None, restoration: Restoration
    ) -> None:
        self._logged = logged
        self._run = run
        self._snapshots = snapshots
        self._restoration = restoration
        self.windows = WindowTally(logged, run)
        self._at = _Position()
        self._before = run.copied()
        self.first: Difference | None = None
        self.executed = 0

    def reach(self, step: int, start: int) -> tuple[str, ...]:
        """Take the steps up to ``step``, from the snapshot after ``start`` if that is further on; what differs."""
        if start > self._at.step or (self._at.broken is not None and start == self._at.step):
            self._begin_at(start)
        while self._at.broken is None and self._at.step < step:
            self._take(self._at.step + 1)
        broken = self._at.broken
        if broken is None:
            return ()
        return broken.what if broken.step == step else (f"step {broken.step}", *broken.what)

    def _begin_at(self, start: int) -> None:
        assert self._snapshots is not None
        self._restoration.restore(self._snapshots.read(start), self._logged.steps)
        self.windows.begin_at(start)
        self._at = _Position(start)
        self._before = self._run.copied()

    def _take(self, index: int) -> None:
        run, step = self._run, self._logged.steps[index - 1]
        accumulator_root = run.take(step, run.admitted(step))
        self.executed += 1
        after = run.copied()
        compared = accumulator_root if self.windows.ends_whole(index) else None
        what = run.differences(step, self._before, after, compared)
        if what:
            what += run.ranks.by_first(lambda: self._tensors(index, after))
        self._at.step, self._before = index, after
        if what:
            self._at.broken = Difference(index, what)
            self.first = self.first or self._at.broken

    def _tensors(self, index: int, after: dict[str, Tensor]) -> tuple[str, ...]:
        if self._snapshots is None:
            return ()
        root = self._logged.steps[index - 1].operation.root_after
        return tuple(f"tensor {name}" for name in differing_tensors(self._snapshots.directory, index, root, after))
