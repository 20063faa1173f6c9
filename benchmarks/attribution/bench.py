"""How well traces predict what leaving sources or examples out does: the linear datamodeling score, beside others.

What the score is and which fine-tunes it takes, says ``repeats.py``.

Countersign gets what a rights-holder gets: base and tuned weights, committed accumulators and sketches, public text.
"Full rank" are accumulators kept for each example as if it were a source: what sketches would be without loss. The
others get the corpus.

    .venv-peers/bin/python benchmarks/attribution/bench.py [--quick] [--seed 0] [--tuning lora] [--profiles open] \
        [--left-out few]
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Bound, Report, at_least, at_most, missed
from observed import Run, accumulator_scores, observed_run, stored_bytes
from peers import Kronfluence, dot_scores, trak_scores
from repeats import LeftOut, Repeats, by_source, linear_datamodeling_score, repeat
from setting import EPOCHS, FULL, QUICK, Setting, Sizes, Tuning, log_odds, make

from attribution.asking import FACTOR_SEQUENCES, fit_on_text
from attribution.sketches import RunFolder, SketchQuery, open_sketches
from attribution.trace import preconditioned_queries
from trainer_client.demo.model import ByteModel

LEAST_SHARE = 0.97
"""Of the best EK-FAC's LDS."""
KRONFLUENCE_DAMPINGS = (1e-8, None)
OWN, FULL_RANK = "countersign", "countersign, full rank"


SKETCH_RANKS = (3, 6, 10)


@dataclass(frozen=True, slots=True)
class Budget:
    """What sketches of a rank may take, and the LDS by example that they are to reach where half is left out."""

    rank: int
    visits: int
    """The bytes are of so many visits to an example."""
    most_bytes: float
    least_score: float


BUDGETS = (Budget(10, 1, 2_300, 0.55), Budget(6, EPOCHS, 9_000, 0.60))


@dataclass(frozen=True, slots=True)
class Found:
    """By method: scores ``[Q, S]`` or ``[Q, N]``, the seconds they took, and the bytes that were kept for them."""

    scores: dict[str, np.ndarray]
    seconds: dict[str, float]
    stored_bytes: dict[str, int]


def queries_of(setting: Setting, tuned: ByteModel) -> dict[str, torch.Tensor]:
    """The outputs' preconditioned gradients, ``[Q, …]`` by weight, as ``countersign trace`` forms them."""
    factors = fit_on_text(tuned, setting.public, FACTOR_SEQUENCES)
    return preconditioned_queries(tuned, factors, setting.queries)[0]


def sketch_scores(setting: Setting, run: Run, queries: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, int]:
    """What a trace makes of each example by its sketches, ``[Q, N]``, and the bytes of all of them."""
    scores = np.zeros((len(setting.queries), len(setting.examples_NT)))
    stored = 0
    asked = [
        SketchQuery({name: queries_KPQ[number] for name, queries_KPQ in queries.items()})
        for number in range(len(setting.queries))
    ]
    for file in run.windows:
        for entry in file.listed.of_sources:
            held = open_sketches(RunFolder(), file, entry).check(file, entry, asked[0].shapes)
            stored += entry.sketches_bytes
            for number, query in enumerate(asked):
                scores[number, held.examples.numpy()] += held.scores(query).numpy()
    return scores, stored


def measure(report: Report, setting: Setting, seed: int, processes: int, left_out: Collection[LeftOut]) -> None:
    """All figures of one setting."""
    tuning = {Tuning.FULL: "all weights", Tuning.LORA: "LoRA"}[setting.tuning]
    where = f"{tuning}, {'depth profiles' if setting.profiled else 'all blocks open'}"
    found = scores_of_all(setting, report, where)
    for repeats in repeat(setting, seed, processes, left_out):
        compare(report, where, found.scores, repeats)
    for name, taken in found.seconds.items():
        report.rate(f"{where}: {name}, all outputs", taken, "s", None)
    for name, stored in found.stored_bytes.items():
        report.rate(f"{where}: {name}, stored", stored / 1e3, "kB", None)
    for budget in BUDGETS:
        name = sketches_of(budget.rank)
        each = found.stored_bytes[name] * budget.visits / EPOCHS / len(setting.examples_NT)
        counted = f"{budget.visits} of {EPOCHS} visits to an example"
        report.rate(f"{where}: {name}, {counted}", each, "B", at_most(budget.most_bytes))


def compare(report: Report, where: str, scores: Mapping[str, np.ndarray], repeats: Repeats) -> None:
    """The LDS of every method for one kind of subset, and what it comes to beside the best EK-FAC's."""
    level, count = "source" if repeats.of_sources else "example", repeats.kept_KN.shape[1]
    asked = {
        name: by_source(each, count) if repeats.of_sources and each.shape[1] != count else each
        for name, each in scores.items()
        if repeats.of_sources or each.shape[1] == count
    }
    floors = {} if repeats.of_sources or repeats.averaged_KQ is None else floors_of_sketches()
    single = {}
    for name, each in asked.items():
        single[name] = linear_datamodeling_score(each, repeats.kept_KN, repeats.single_KQ)
        what = f"{where}, {repeats.kind} left out: LDS by {level}, {name}"
        report.rate(what, single[name], "1", floors.get(name))
        if repeats.averaged_KQ is not None:
            average = linear_datamodeling_score(each, repeats.kept_KN, repeats.averaged_KQ)
            report.rate(f"{what}, average run", average, "1", None)
    best = max(value for name, value in single.items() if "EK-FAC" in name)
    own = OWN if repeats.of_sources else FULL_RANK
    report.rate(
        f"{where}, {repeats.kind} left out: {own} / best EK-FAC", single[own] / best, "1", at_least(LEAST_SHARE)
    )


def sketches_of(rank: int) -> str:
    """As a method."""
    return f"countersign, sketches of rank {rank}"


def floors_of_sketches() -> dict[str, Bound]:
    """By method."""
    return {sketches_of(budget.rank): at_least(budget.least_score) for budget in BUDGETS}


def scores_of_all(setting: Setting, report: Report, where: str) -> Found:
    """What every method makes of the outputs."""
    found = Found({}, {}, {})
    sources, count = setting.sizes.sources, len(setting.examples_NT)
    with tempfile.TemporaryDirectory() as folder:
        run = observed_run(setting, Path(folder))
        gained = np.mean(log_odds(run.tuned, setting.queries)) - np.mean(log_odds(setting.base, setting.queries))
        report.rate(f"{where}: gain of the outputs asked about", float(gained), "log-odds", None)
        begun = time.perf_counter()
        queries = queries_of(setting, run.tuned)
        found.scores[OWN] = accumulator_scores(run, queries, sources)
        found.seconds[OWN] = time.perf_counter() - begun
        found.stored_bytes[OWN] = run.stored_bytes
    with tempfile.TemporaryDirectory() as folder:
        found.scores[FULL_RANK] = accumulator_scores(observed_run(setting, Path(folder), apart=True), queries, count)
    for rank in SKETCH_RANKS:
        name = sketches_of(rank)
        with tempfile.TemporaryDirectory() as folder:
            sketched = observed_run(setting, Path(folder), sketch_rank=rank)
            begun = time.perf_counter()
            found.scores[name], found.stored_bytes[name] = sketch_scores(setting, sketched, queries)
            found.seconds[name] = time.perf_counter() - begun
    ask_peers(setting, run.tuned, found)
    return found


def ask_peers(setting: Setting, tuned: ByteModel, found: Found) -> None:
    """What the others make of it."""
    for unused in ("torchvision", "torchaudio"):
        # Found, they are imported by transformers, and fail where they were built beside another torch.
        sys.modules.setdefault(unused, None)  # type: ignore[arg-type]
    with redirect_stdout(sys.stderr):  # what it brings along warns on standard output, where the document goes
        from bergson_peer import Bergson  # noqa: PLC0415 (not in the processes that repeat fine-tunes)

    begun = time.perf_counter()

    def took(name: str, scores: np.ndarray, before: float = 0.0) -> None:
        nonlocal begun
        found.scores[name], found.seconds[name] = scores, time.perf_counter() - begun + before
        begun = time.perf_counter()

    took("gradient dot product", dot_scores(tuned, setting.examples_NT, setting.queries))
    took("TRAK", trak_scores(tuned, setting.examples_NT, setting.queries))
    with tempfile.TemporaryDirectory() as folder:
        peer = Kronfluence(tuned, setting.examples_NT, Path(folder))
        fitted = time.perf_counter() - begun
        kept_bytes = stored_bytes(Path(folder))
        for damping in KRONFLUENCE_DAMPINGS:
            begun = time.perf_counter()
            name = f"kronfluence EK-FAC, damping {'default' if damping else 'by eigenvalues'}"
            took(name, peer.scores(setting.queries, damping), fitted)
            found.stored_bytes[name] = kept_bytes
    with tempfile.TemporaryDirectory() as folder:
        bergson = Bergson(tuned, setting.examples_NT, Path(folder))
        took("bergson EK-FAC", bergson.scores(setting.queries))
        found.stored_bytes["bergson EK-FAC"] = stored_bytes(Path(folder))
        name = "bergson, index of projected gradients"
        took(name, bergson.projected_scores(setting.queries))
        found.stored_bytes[name] = bergson.index_bytes


def main() -> int:
    """Measure, print one JSON document; 1 when a figure misses its floor."""
    parser = argparse.ArgumentParser(description="Linear datamodeling scores of traces and of other methods.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs: figures mean little")
    parser.add_argument("--seed", type=int, default=0, help="of topics, base model, order and subsets")
    parser.add_argument("--tuning", choices=(*Tuning, "both"), default="both", help="all weights, or LoRA")
    parser.add_argument("--profiles", choices=("open", "depth", "both"), default="both", help="of the sources")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that repeat fine-tunes")
    parser.add_argument(
        "--left-out", choices=(*LeftOut, "both"), default="both", help="half of sources and examples, or a few"
    )
    arguments = parser.parse_args()
    left_out = tuple(LeftOut) if arguments.left_out == "both" else (LeftOut(arguments.left_out),)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = Report("attribution", arguments.quick)
    sizes: Sizes = QUICK if arguments.quick else FULL
    for tuning in Tuning if arguments.tuning == "both" else (Tuning(arguments.tuning),):
        for profiled in {"open": (False,), "depth": (True,), "both": (False, True)}[arguments.profiles]:
            setting = make(sizes, profiled=profiled, tuning=tuning, seed=arguments.seed)
            measure(report, setting, arguments.seed, arguments.processes, left_out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024 / 1e6
    report.rate("peak resident memory, all methods in one process", peak, "MB", None)
    report.note("countersign has no corpus: committed accumulators and public text; the others take gradients of it")
    report.note("the peers know nothing of depth profiles: there they are asked beyond what they were made for")
    if arguments.quick:
        report.figures = [{key: held for key, held in figure.items() if key != "holds"} for figure in report.figures]
    print(json.dumps({**report.document(), "seed": arguments.seed}, indent=1))
    return 1 if missed(report.figures) else 0


if __name__ == "__main__":
    sys.exit(main())
