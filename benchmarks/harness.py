"""What every benchmark shares: figures with floors, quantiles, the machine, and who else was using it.

A figure says what was measured, in which unit, how often, and whether it keeps its floor (the bound below which
the project does not want to fall). Beside each figure stands the *outside load*: how many cores' worth of time
other programs used meanwhile, from ``/proc/stat`` minus this process and its descendants. One busy neighbour
nearly doubles a latency, so a figure taken with outside load above ``QUIET_CORES`` is marked as disturbed and
does not speak against its floor.

A benchmark prints one JSON document on standard output and its progress on standard error. As a program, this
file runs them all and prints one document: ``python benchmarks/harness.py [--quick]``. It exits 1 when a figure
misses its floor on a quiet machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

QUIET_CORES = 0.15
"""Outside load up to which a figure counts."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Bound:
    """The figure's floor: at least or at most this."""

    limit: float
    at_least: bool

    def holds(self, value: float) -> bool:
        """Whether a value keeps it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


def at_least(limit: float) -> Bound:
    """A floor of a rate."""
    return Bound(limit, True)


def at_most(limit: float) -> Bound:
    """A ceiling of a cost."""
    return Bound(limit, False)


@dataclass(slots=True)
class Load:
    """Core-seconds over a stretch of time."""

    wall_seconds: float = 0.0
    own_seconds: float = 0.0
    outside_seconds: float = 0.0

    @property
    def outside_cores(self) -> float:
        """Cores' worth of time that other programs used."""
        return self.outside_seconds / self.wall_seconds if self.wall_seconds else 0.0


def machine_ticks(stat: str) -> int:
    """Ticks all cores were busy, from the text of ``/proc/stat``; waiting for the disk is not busy, time stolen is."""
    fields = [int(value) for value in stat.splitlines()[0].split()[1:]]
    user, nice, system, _, _, interrupt, soft_interrupt, stolen = fields[:8]
    return user + nice + system + interrupt + soft_interrupt + stolen


def process_ticks(stat: str) -> tuple[int, int]:
    """Parent's process id and ticks used (its finished children's included), from ``/proc/PID/stat``."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[1]), sum(int(value) for value in fields[11:15])


def own_ticks(root: int) -> int:
    """Ticks used by a process and all its descendants."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)], ticks[int(entry.name)] = process_ticks((entry / "stat").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sum(used for process, used in ticks.items() if _descends(process, root, parents))


def _descends(process: int, root: int, parents: dict[int, int]) -> bool:
    while process and process != root:
        process = parents.get(process, 0)
    return process == root


@contextmanager
def watch_load() -> Iterator[Load]:
    """Measure the load while the block runs; filled in when it ends."""
    load = Load()
    started, own, machine = time.monotonic(), own_ticks(os.getpid()), _machine_now()
    try:
        yield load
    finally:
        load.wall_seconds = time.monotonic() - started
        load.own_seconds = (own_ticks(os.getpid()) - own) / TICKS_PER_SECOND
        busy_seconds = (_machine_now() - machine) / TICKS_PER_SECOND
        load.outside_seconds = max(0.0, busy_seconds - load.own_seconds)


def _machine_now() -> int:
    return machine_ticks(Path("/proc/stat").read_text())


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The sample at ``fraction`` of an ascending sequence, by nearest rank."""
    if not ordered:
        raise ValueError("no samples")
    return ordered[min(len(ordered) - 1, max(0, -(-round(fraction * len(ordered) * 1e6) // 1_000_000) - 1))]


@dataclass(slots=True)
class Report:
    """A benchmark's document."""

    benchmark: str
    quick: bool
    figures: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rate(self, name: str, value: float, unit: str, bound: Bound | None = None, load: Load | None = None) -> None:
        """A single value."""
        self._add({"name": name, "unit": unit, "value": rounded(value)}, value, bound, load)

    def samples(
        self,
        name: str,
        values: Sequence[float],
        unit: str,
        bounds: dict[float, Bound] | None = None,
        load: Load | None = None,
    ) -> None:
        """A distribution; ``bounds`` by quantile. One figure for each bound, the distribution at the first."""
        ordered = sorted(values)
        shape = {f"p{100 * fraction:g}": rounded(quantile(ordered, fraction)) for fraction in QUANTILES}
        figure: dict[str, object] = {"name": name, "unit": unit, "count": len(ordered), **shape}
        if not bounds:
            self._add(figure, 0.0, None, load)
        for fraction, bound in (bounds or {}).items():
            value = quantile(ordered, fraction)
            self._add({**figure, "of": f"p{100 * fraction:g}", "value": rounded(value)}, value, bound, load)

    def time_calls(
        self, name: str, call: Callable[[], object], repeats: int, calls: int = 1, bound: Bound | None = None
    ) -> None:
        """CPU microseconds of one call, over ``repeats`` samples of ``calls`` calls each."""
        call()
        samples = []
        with watch_load() as load:
            for _ in range(repeats):
                started = time.process_time_ns()
                for _ in range(calls):
                    call()
                samples.append((time.process_time_ns() - started) / 1_000 / calls)
        self.samples(name, samples, "us CPU", {0.5: bound} if bound else None, load)

    def note(self, text: str) -> None:
        """A sentence a reader of the figures needs."""
        self.notes.append(text)

    def document(self) -> dict[str, object]:
        """The whole report."""
        return {
            "benchmark": self.benchmark,
            "mode": "quick" if self.quick else "full",
            "machine": machine_facts(),
            "figures": self.figures,
            "notes": self.notes,
        }

    def _add(self, figure: dict[str, object], value: float, bound: Bound | None, load: Load | None) -> None:
        if load is not None:
            figure["outside_cores"] = round(load.outside_cores, 2)
        if bound is not None:
            figure["floor"] = str(bound)
            figure["holds"] = bound.holds(value)
            if load is not None and load.outside_cores > QUIET_CORES:
                figure["disturbed"] = True
        self.figures.append(figure)
        shown = {key: shown for key, shown in figure.items() if key not in ("name", "unit")}
        progress(f"{figure['name']} [{figure['unit']}] {shown}")


def missed(figures: Sequence[dict[str, object]]) -> list[str]:
    """Names of the figures that miss their floor without the excuse of a busy machine."""
    return [str(figure["name"]) for figure in figures if figure.get("holds") is False and not figure.get("disturbed")]


def rounded(value: float) -> float:
    """Four significant digits, or whole from 1,000 on."""
    return float(round(value)) if abs(value) >= 1_000 else float(f"{value:.4g}")


def machine_facts() -> dict[str, object]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "memory_mib": int(memory) // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def resident_megabytes(process_id: int) -> float:
    """Resident memory of a process, in millions of bytes."""
    line = next(line for line in _lines(f"/proc/{process_id}/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1_024 / 1e6


def cpu_seconds(process_id: int) -> float:
    """CPU time a process has used."""
    return process_ticks(Path(f"/proc/{process_id}/stat").read_text())[1] / TICKS_PER_SECOND


def progress(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def run_benchmark(
    name: str, measure: Callable[[Report, argparse.Namespace], None], parser: argparse.ArgumentParser
) -> int:
    """Parse the command line, measure, print the document; the exit code."""
    parser.add_argument("--quick", action="store_true", help="sizes for continuous integration")
    arguments = parser.parse_args()
    report = Report(name, arguments.quick)
    measure(report, arguments)
    print(json.dumps(report.document(), indent=1))
    return 1 if missed(report.figures) else 0


def main() -> int:
    """Run every benchmark, one after the other, and print one document."""
    parser = argparse.ArgumentParser(description="Run every benchmark and print one JSON document.")
    parser.add_argument("--quick", action="store_true", help="sizes for continuous integration")
    arguments = parser.parse_args()
    documents = []
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        progress(f"== {path.name}")
        command = [sys.executable, str(path), *(["--quick"] if arguments.quick else [])]
        finished = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if finished.returncode not in (0, 1):
            progress(f"{path.name} failed with exit code {finished.returncode}")
            return 2
        documents.append(json.loads(finished.stdout))
    missing = [name for document in documents for name in missed(document["figures"])]
    figures = {
        document["benchmark"]: {"figures": document["figures"], "notes": document["notes"]} for document in documents
    }
    mode = "quick" if arguments.quick else "full"
    print(json.dumps({"mode": mode, "machine": machine_facts(), "missed": missing, "benchmarks": figures}, indent=1))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
