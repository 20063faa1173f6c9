"""How well traces predict what leaving sources or examples out does: the linear datamodeling score, beside others.

The *LDS* (Park et al., *TRAK*, arXiv 2303.14186, §4) of one output is the Spearman correlation, over subsets of the
sources (or of single examples), of what an attribution predicts (the sum of its scores of what was kept) with what
comes out when the fine-tune is really repeated without the others; the figure is the mean over outputs. Repeated runs
share order and seed with the first: a *single-run* LDS, which no luck of other seeds blurs.

Countersign gets what a rights-holder gets: base and tuned weights, committed accumulators and sketches, public text.
"Full rank" are accumulators kept for each example as if it were a source: what sketches would be without loss. The
others get the corpus.

    .venv/bin/python benchmarks/attribution/bench.py [--quick] [--seed 0]
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Report, at_least, missed, progress, watch_load
from peers import Kronfluence, dot_scores, trak_scores
from setting import CAMPAIGN, EPOCHS, FULL, QUICK, Setting, Sizes, log_odds, make, source_id, train

from attribution.asking import FACTOR_SEQUENCES, fit_on_text
from attribution.sketches import RunFolder, SketchQuery, open_sketches
from attribution.trace import preconditioned_queries, window_scores
from attribution.weights import WindowFile, find_windows
from consensus.predicates.accumulators import Window
from trainer_client.accumulators import SourceAccumulators
from trainer_client.demo.model import ByteModel

SKETCH_RANKS = (3, 6)
LEAST_SHARE = 0.97
"""Of the best EK-FAC's LDS."""
KRONFLUENCE_DAMPINGS = (1e-8, None)

Outcomes = Mapping[str, tuple[bool, np.ndarray, np.ndarray]]
"""Kind of subset to: whether of sources; what is kept ``[K, S]`` or ``[K, N]`` (0 or 1); log-odds ``[K, Q]``."""


@dataclass(frozen=True, slots=True)
class Run:
    """The fine-tune with everything, and what it left."""

    tuned: ByteModel
    windows: tuple[WindowFile, ...]
    stored_bytes: int


def observed_run(setting: Setting, directory: Path, *, apart: bool = False, sketch_rank: int = 0) -> Run:
    """Train with everything and keep accumulators, as a governed job does, in one window; ``apart``: by example."""
    kept = setting.rows_of(range(setting.sizes.sources))
    steps = len(setting.order)
    with SourceAccumulators(directory, CAMPAIGN, steps, steps, sketch_rank) as accumulators:
        tuned, roots = train(setting, kept, accumulators, apart=apart)
    windows = tuple(Window(1, last, root, None) for last, root in roots)  # type: ignore[arg-type]
    found = find_windows(directory, CAMPAIGN, windows)
    assert not found.missing
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Run(tuned, found.found, stored)


def queries_of(setting: Setting, tuned: ByteModel) -> list[dict[str, torch.Tensor]]:
    """The outputs' preconditioned gradients, as ``countersign trace`` forms them."""
    factors = fit_on_text(tuned, setting.public, FACTOR_SEQUENCES)
    together, _ = preconditioned_queries(tuned, factors, setting.queries)
    count = len(setting.queries)
    return [{name: queries_KPQ[number] for name, queries_KPQ in together.items()} for number in range(count)]


def accumulator_scores(run: Run, queries: Sequence[Mapping[str, torch.Tensor]], count: int) -> np.ndarray:
    """What ``countersign trace`` scores: ``[Q, count]``, of sources, or of examples kept apart."""
    places = {source_id(place): place for place in range(count)}
    scores = np.zeros((len(queries), count))
    together = {name: torch.stack([query[name] for query in queries]) for name in queries[0]}
    for file in run.windows:
        for entry, _, parts in window_scores(together, file):
            scores[:, places[entry.source]] += parts
    return scores


def sketch_scores(
    setting: Setting, run: Run, queries: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[np.ndarray, float]:
    """What a trace makes of each example by its sketches, ``[Q, N]``, and the bytes of an example."""
    scores = np.zeros((len(queries), len(setting.examples_NT)))
    stored = 0
    asked = [SketchQuery(query) for query in queries]
    for file in run.windows:
        for entry in file.listed.of_sources:
            held = open_sketches(RunFolder(), file, entry).check(file, entry, asked[0].shapes)
            stored += entry.sketches_bytes
            for number, query in enumerate(asked):
                scores[number, held.examples.numpy()] += held.scores(query).numpy()
    return scores, stored / len(setting.examples_NT)


def by_source(setting: Setting, scores_QN: np.ndarray) -> np.ndarray:
    """Scores of examples, summed by source: ``[Q, S]``."""
    return scores_QN.reshape(len(scores_QN), setting.sizes.sources, -1).sum(axis=2)


_setting: Setting | None = None


def _begin_worker(sizes: Sizes, profiled: bool, seed: int) -> None:
    global _setting  # noqa: PLW0603 (a worker's own)
    torch.set_num_threads(1)
    _setting = make(sizes, profiled=profiled, seed=seed)


def _outcome(rows: tuple[int, ...]) -> list[float]:
    assert _setting is not None
    model, _ = train(_setting, frozenset(rows))
    return log_odds(model, _setting.queries)


def outcomes(setting: Setting, seed: int, processes: int) -> Outcomes:
    """What really comes out without some of the sources, or of the examples."""
    sizes, count = setting.sizes, len(setting.examples_NT)
    kinds: dict[str, tuple[bool, list[frozenset[int]]]] = {}
    for what, total, parts in (("sources", sizes.sources, (2, 8)), ("examples", count, (2, 10))):
        draw = random.Random(f"subsets of {what} {seed}")
        for part in parts:
            left = total - total // part
            kept = [frozenset(draw.sample(range(total), left)) for _ in range(sizes.subsets)]
            kinds[f"{total // part} of {total} {what}"] = (what == "sources", kept)
    asked = [setting.rows_of(kept) if whole else kept for whole, chosen in kinds.values() for kept in chosen]
    found: list[list[float]] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin_worker, (sizes, setting.profiled, seed)) as pool:
        for outcome in pool.imap(_outcome, [tuple(sorted(rows)) for rows in asked]):
            found.append(outcome)
            if len(found) % 20 == 0:
                progress(f"{len(found)} of {len(asked)} fine-tunes repeated")
    taken = iter(found)
    return {
        kind: (
            whole,
            np.array([[place in kept for place in range(sizes.sources if whole else count)] for kept in chosen], float),
            np.array([next(taken) for _ in chosen]),
        )
        for kind, (whole, chosen) in kinds.items()
    }


def linear_datamodeling_score(scores_QS: np.ndarray, kept_KS: np.ndarray, outcomes_KQ: np.ndarray) -> float:
    """Mean over outputs of Spearman's correlation of predicted with real outcomes."""
    predicted_KQ = kept_KS @ scores_QS.T
    return float(
        np.mean(
            [
                np.corrcoef(_ranks(predicted_K), _ranks(real_K))[0, 1]
                for predicted_K, real_K in zip(predicted_KQ.T, outcomes_KQ.T, strict=True)
            ]
        )
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def measure(report: Report, sizes: Sizes, seed: int, processes: int, profiles: Sequence[bool]) -> None:
    """All figures, with every parameter block open to all sources, or under depth profiles."""
    for profiled in profiles:
        where = "depth profiles" if profiled else "all blocks open"
        setting = make(sizes, profiled=profiled, seed=seed)
        scores, seconds = scores_of_all(setting, report, where)
        with watch_load() as load:
            real = outcomes(setting, seed, processes)
        for kind, (whole, kept_KN, outcomes_KQ) in real.items():
            level = "source" if whole else "example"
            asked = {
                name: by_source(setting, each) if whole and each.shape[1] != kept_KN.shape[1] else each
                for name, each in scores.items()
                if whole or each.shape[1] == kept_KN.shape[1]
            }
            found = {name: linear_datamodeling_score(each, kept_KN, outcomes_KQ) for name, each in asked.items()}
            for name, value in found.items():
                report.rate(f"{where}, {kind} left out: LDS by {level}, {name}", value, "1", None, load)
            best = max(value for name, value in found.items() if name.startswith("kronfluence"))
            own = "countersign" if whole else "countersign, full rank"
            ratio = found[own] / best
            report.rate(f"{where}, {kind} left out: {own} / best EK-FAC", ratio, "1", at_least(LEAST_SHARE))
            for rank in () if whole else SKETCH_RANKS:
                ratio = found[f"countersign, sketches of rank {rank}"] / found[own]
                report.rate(f"{where}, {kind} left out: sketches of rank {rank} / full rank", ratio, "1", None)
        for name, taken in seconds.items():
            report.rate(f"{where}: {name}, all outputs", taken, "s", None)


def scores_of_all(setting: Setting, report: Report, where: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores ``[Q, S]`` or ``[Q, N]`` by method, and the seconds each took."""
    scores: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    sources, count = setting.sizes.sources, len(setting.examples_NT)
    with tempfile.TemporaryDirectory() as folder:
        run = observed_run(setting, Path(folder))
        gained = np.mean(log_odds(run.tuned, setting.queries)) - np.mean(log_odds(setting.base, setting.queries))
        report.rate(f"{where}: gain of the outputs asked about", float(gained), "log-odds", None)
        report.rate(f"{where}: accumulators stored", run.stored_bytes / 1e3, "kB", None)
        begun = time.perf_counter()
        queries = queries_of(setting, run.tuned)
        scores["countersign"] = accumulator_scores(run, queries, sources)
        seconds["countersign"] = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        scores["countersign, full rank"] = accumulator_scores(
            observed_run(setting, Path(folder), apart=True), queries, count
        )
    for rank in SKETCH_RANKS:
        with tempfile.TemporaryDirectory() as folder:
            sketched = observed_run(setting, Path(folder), sketch_rank=rank)
            begun = time.perf_counter()
            name = f"countersign, sketches of rank {rank}"
            scores[name], stored_bytes = sketch_scores(setting, sketched, queries)
            seconds[name] = time.perf_counter() - begun
            report.rate(f"{where}: sketches of rank {rank}, an example of {EPOCHS} visits", stored_bytes, "B", None)
    begun = time.perf_counter()

    def took(name: str, found: np.ndarray) -> None:
        nonlocal begun
        scores[name], seconds[name] = found, time.perf_counter() - begun
        begun = time.perf_counter()

    took("gradient dot product", dot_scores(run.tuned, setting.examples_NT, setting.queries))
    took("TRAK", trak_scores(run.tuned, setting.examples_NT, setting.queries))
    peer = Kronfluence(run.tuned, setting.examples_NT)
    fitted = time.perf_counter() - begun
    for damping in KRONFLUENCE_DAMPINGS:
        begun = time.perf_counter()
        name = f"kronfluence EK-FAC, damping {'default' if damping else 'by eigenvalues'}"
        took(name, peer.scores(setting.queries, damping))
        seconds[name] += fitted
    peer.close()
    return scores, seconds


def main() -> int:
    """Measure, print one JSON document; 1 when a figure misses its floor."""
    parser = argparse.ArgumentParser(description="Linear datamodeling scores of traces and of other methods.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs: figures mean little")
    parser.add_argument("--seed", type=int, default=0, help="of topics, base model, order and subsets")
    parser.add_argument("--profiles", choices=("open", "depth", "both"), default="both", help="of the sources")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that repeat fine-tunes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = Report("attribution", arguments.quick)
    profiles = {"open": (False,), "depth": (True,), "both": (False, True)}[arguments.profiles]
    measure(report, QUICK if arguments.quick else FULL, arguments.seed, arguments.processes, profiles)
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
