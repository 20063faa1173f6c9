"""A run's own record: one JSON line per happening, a callback, and what governance cost.

The lines go to ``run_directory/steps.jsonl`` as they happen; they are for people and reports, nothing is decided
by them. Time is counted on the training thread in two buckets: *training* (forward, backward, clipping,
optimizer) and *governance* (everything the run adds: sampling, hashing, checks, events, waiting for a grant
apart). What the training script itself does between batches is in neither.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Progress:
    """One happening: ``step``, ``refusal``, ``rollback``, ``grant``, ``recovery`` or ``release``.

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


@dataclass(slots=True)
class Costs:
    """Seconds on the training thread, by wall clock and by the thread's own processor time."""

    training_seconds: float = 0.0
    governance_seconds: float = 0.0
    memorization_seconds: float = 0.0
    paused_seconds: float = 0.0
    training_cpu_seconds: float = 0.0
    governance_cpu_seconds: float = 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """What runs inside is training."""
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.training_seconds += time.perf_counter() - wall
            self.training_cpu_seconds += time.thread_time() - cpu

    @contextmanager
    def governance(self) -> Iterator[None]:
        """What runs inside is governance."""
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.governance_seconds += time.perf_counter() - wall
            self.governance_cpu_seconds += time.thread_time() - cpu

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
class Summary:
    """A run so far. ``step_overhead_percent`` is governance over training, by wall clock, pauses apart.

    ``memorization_overhead_percent`` is the part of it that the memorization check takes.
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
    paused_seconds: float
    background_cpu_seconds: float
    step_overhead_percent: float
    memorization_overhead_percent: float


@dataclass(slots=True)
class RunRecord:
    """Writes the lines, calls the callback, keeps the totals."""

    lines: IO[str]
    on_progress: OnProgress | None
    costs: Costs = field(default_factory=Costs)
    losses: dict[int, float] = field(default_factory=dict)
    refused: dict[int, dict[str, int]] = field(default_factory=dict)
    presented: dict[int, int] = field(default_factory=dict)
    rollbacks: int = 0
    recoveries: int = 0
    grants: int = 0
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

    def forget_after(self, step: int) -> None:
        """Steps after this one were undone."""
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
        costs = self.costs
        percent = 100 / costs.training_seconds if costs.training_seconds else 0.0
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
            training_seconds=round(costs.training_seconds, 4),
            governance_seconds=round(costs.governance_seconds, 4),
            memorization_seconds=round(costs.memorization_seconds, 4),
            paused_seconds=round(costs.paused_seconds, 4),
            background_cpu_seconds=round(background_cpu_seconds, 4),
            step_overhead_percent=round(percent * costs.governance_seconds, 2),
            memorization_overhead_percent=round(percent * costs.memorization_seconds, 2),
        )

    def close(self) -> None:
        """Close the file."""
        self.lines.close()
