"""A run's own record: one JSON line per happening, a callback, and what governance cost.

The lines go to ``run_directory/steps.jsonl`` as they happen; they are for people and reports, nothing is decided
by them. Time is counted in two buckets, by the training thread's wall clock and by the whole process's
processor time: *training* (from a batch to its ``learn``, backward, clipping, optimizer) and *governance*
(everything the run adds: sampling, copies, snapshots, checks, events, waiting for a digest). Waiting for a grant or
for finality is *paused*. Training that was in vain or done again is governance too: steps undone, steps
replayed. Hashing and delivery run in threads of their own beside training; their processor time is counted apart, and
as governance in the comparison by processor time. Routing is inside the backward pass and cannot be told from
it in a run; ``benchmarks/bench_trainer.py`` measures it.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Self


@dataclass(frozen=True, slots=True)
class Progress:
    """One happening: ``campaign`` or ``resumed``, ``closed`` (to all examples), ``grant``, ``refusal``, ``step``,
    ``skipped``, ``momentum``, ``rollback``, ``memorization``, ``recovery``, ``evaluation``, ``finding``, ``release``.

    ``loss`` is the mean over admitted examples in nats, ``refused`` counts examples, ``memorization_permille``
    the largest signal; a field that does not apply is None or 0.
    """

    event: str
    step: int
    of: int
    attempt: int = 0
    loss: float | None = None
    presented: int = 0
    refused: int = 0
    memorization_permille: int | None = None
    milliseconds: float | None = None
    detail: str = ""
    id: str = ""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Moment:
    """Now, by both clocks."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Self:
        """The clocks as they stand."""
        return cls(time.perf_counter(), time.process_time())


@dataclass(slots=True)
class Costs:
    """Seconds by wall clock, and of processor time by all threads of the process."""

    training_seconds: float = 0.0
    governance_seconds: float = 0.0
    memorization_seconds: float = 0.0
    paused_seconds: float = 0.0
    training_cpu_seconds: float = 0.0
    governance_cpu_seconds: float = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """What runs inside is training."""
        begun = Moment.now()
        try:
            yield
        finally:
            self.add_training(begun)

    def add_training(self, begun: "Moment") -> None:
        """From then until now was training."""
        now = Moment.now()
        self.training_seconds += now.seconds - begun.seconds
        self.training_cpu_seconds += now.cpu_seconds - begun.cpu_seconds

    @contextmanager
    def governance(self) -> Iterator[None]:
        """What runs inside is governance."""
        begun = Moment.now()
        try:
            yield
        finally:
            now = Moment.now()
            self.governance_seconds += now.seconds - begun.seconds
            self.governance_cpu_seconds += now.cpu_seconds - begun.cpu_seconds

    @contextmanager
    def memorization(self) -> Iterator[None]:
        """What runs inside ``governance`` is the memorization check."""
        wall = time.perf_counter()
        try:
            yield
        finally:
            self.memorization_seconds += time.perf_counter() - wall

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is waiting: for a grant, or for finality."""
        wall = time.perf_counter()
        try:
            yield
        finally:
            self.paused_seconds += time.perf_counter() - wall


@dataclass(frozen=True, slots=True)
class MemorizationPass:
    """What the memorization check says as a pass over the manifest ends with ``step``.

    ``recited`` examples were found so far and stay out; of ``reserve_assessed`` ones that no step trained on it takes
    ``reserve_flagged`` for recited: false positives, or copies of what was trained on.
    """

    step: int
    recited: int
    reserve_flagged: int
    reserve_assessed: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A run so far. ``step_overhead_percent`` is governance over training, by wall clock, pauses apart.

    ``governance_seconds`` includes ``memorization_seconds`` and ``repeated_seconds``; ``training_seconds`` is
    that of the steps that stand. ``memorization_overhead_percent`` and ``repeated_overhead_percent`` are parts of
    ``step_overhead_percent``. ``cpu_overhead_percent`` compares processor time, threads in the background included:
    what a machine pays that has no idle core.
    """

    steps: int
    attempt: int
    presented_examples: int
    admitted_examples: int
    refused_examples: dict[str, int]
    rollbacks: int
    recoveries: int
    grants: int
    losses: list[float]
    parameter_root: str
    training_seconds: float
    governance_seconds: float
    memorization_seconds: float
    repeated_seconds: float
    paused_seconds: float
    background_cpu_seconds: float
    step_overhead_percent: float
    memorization_overhead_percent: float
    repeated_overhead_percent: float
    cpu_overhead_percent: float
    memorization_passes: tuple[MemorizationPass, ...]


@dataclass(slots=True)
class RunRecord:
    """Writes the lines, calls the callback, keeps the totals."""

    lines: IO[str]
    on_progress: OnProgress | None
    costs: Costs = field(default_factory=Costs)
    losses: dict[int, float] = field(default_factory=dict)
    refused: dict[int, dict[str, int]] = field(default_factory=dict)
    presented: dict[int, int] = field(default_factory=dict)
    memorization_passes: dict[int, MemorizationPass] = field(default_factory=dict)
    rollbacks: int = 0
    recoveries: int = 0
    grants: int = 0
    _trained: dict[int, Moment] = field(default_factory=dict)
    _repeated: Moment = Moment(0.0, 0.0)
    _trained_in_all: Moment = Moment(0.0, 0.0)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def opened(cls, run_directory: Path, on_progress: OnProgress | None) -> "RunRecord":
        """A record that appends to ``run_directory/steps.jsonl``."""
        return cls((run_directory / "steps.jsonl").open("a", encoding="utf-8"), on_progress)

    def note(self, progress: Progress) -> None:
        """One happening; may be called from any thread, the callback one call at a time."""
        line = json.dumps({"unix_ms": time.time_ns() // 1_000_000, **asdict(progress)})
        with self._writing:
            self.lines.write(line + "\n")
            self.lines.flush()
            if self.on_progress is not None:
                self.on_progress(progress)

    def note_step(self, step: int, loss: float | None, presented: int, refused: dict[str, int]) -> None:
        """Totals of a step; a later attempt at it replaces them."""
        self.forget_after(step - 1)
        if loss is not None:
            self.losses[step] = loss
        self.presented[step] = presented
        self.refused[step] = refused

    def trained(self, step: int, *, replayed: bool) -> None:
        """All training since the step before was this step's."""
        seconds = self.costs.training_seconds - self._trained_in_all.seconds
        cpu_seconds = self.costs.training_cpu_seconds - self._trained_in_all.cpu_seconds
        self._trained_in_all = Moment(self.costs.training_seconds, self.costs.training_cpu_seconds)
        if replayed:
            self._repeat(Moment(seconds, cpu_seconds))
        else:
            self._trained[step] = Moment(seconds, cpu_seconds)

    def undone_after(self, step: int) -> None:
        """Steps after this one were undone; their training was in vain."""
        self.forget_after(step)
        for undone in [index for index in self.memorization_passes if index > step]:
            del self.memorization_passes[undone]
        for undone in [index for index in self._trained if index > step]:
            self._repeat(self._trained.pop(undone))

    def _repeat(self, spent: Moment) -> None:
        earlier = self._repeated
        self._repeated = Moment(earlier.seconds + spent.seconds, earlier.cpu_seconds + spent.cpu_seconds)

    def forget_after(self, step: int) -> None:
        """What was noted of steps after this one no longer holds."""
        for kept in (self.losses, self.refused, self.presented):
            for undone in [index for index in kept if index > step]:
                del kept[undone]

    def summary(self, steps: int, attempt: int, root: str, background_cpu_seconds: float) -> Summary:
        """Everything so far."""
        refused: dict[str, int] = {}
        for counts in self.refused.values():
            for reason, count in counts.items():
                refused[reason] = refused.get(reason, 0) + count
        presented = sum(self.presented.values())
        costs, repeated = self.costs, self._repeated
        training = costs.training_seconds - repeated.seconds
        governance = costs.governance_seconds + repeated.seconds
        percent = 100 / training if training else 0.0
        plain_cpu = costs.training_cpu_seconds - repeated.cpu_seconds - background_cpu_seconds
        added_cpu = costs.governance_cpu_seconds + repeated.cpu_seconds + background_cpu_seconds
        return Summary(
            steps=steps,
            attempt=attempt,
            presented_examples=presented,
            admitted_examples=presented - sum(refused.values()),
            refused_examples=dict(sorted(refused.items())),
            rollbacks=self.rollbacks,
            recoveries=self.recoveries,
            grants=self.grants,
            losses=[self.losses[step] for step in sorted(self.losses)],
            parameter_root=root,
            training_seconds=round(training, 4),
            governance_seconds=round(governance, 4),
            memorization_seconds=round(costs.memorization_seconds, 4),
            repeated_seconds=round(repeated.seconds, 4),
            paused_seconds=round(costs.paused_seconds, 4),
            background_cpu_seconds=round(background_cpu_seconds, 4),
            step_overhead_percent=round(percent * governance, 2),
            memorization_overhead_percent=round(percent * costs.memorization_seconds, 2),
            repeated_overhead_percent=round(percent * repeated.seconds, 2),
            cpu_overhead_percent=round(100 * added_cpu / plain_cpu, 2) if plain_cpu > 0 else 0.0,
            memorization_passes=tuple(held for _, held in sorted(self.memorization_passes.items())),
        )

    def close(self) -> None:
        """Close the file."""
        self.lines.close()
