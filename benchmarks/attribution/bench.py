"""How well traces predict what leaving sources out does: the linear datamodeling score, beside other methods.

The *LDS* (Park et al., *TRAK*, arXiv 2303.14186, §4) of one output is the Spearman correlation, over subsets of the
sources, of what an attribution predicts (the sum of its scores of the kept sources) with what comes out when the
fine-tune is really repeated without the others; the figure is the mean over outputs. Repeated runs share order and
seed with the first: a *single-run* LDS, which no luck of other seeds blurs.

Countersign gets what a rights-holder gets: base and tuned weights, the committed accumulators, public text. The others
get the corpus.

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Report, at_least, missed, progress, watch_load
from peers import Kronfluence, dot_scores, trak_scores
from setting import CAMPAIGN, FULL, QUICK, Setting, Sizes, log_odds, make, source_id, train

from attribution.commands import FACTOR_SEQUENCES, fit_on_text
from attribution.query import log_odds_gradients
from attribution.trace import preconditioned, window_scores
from attribution.weights import WindowFile, find_windows
from consensus.predicates.accumulators import Window
from trainer_client.accumulators import SourceAccumulators
from trainer_client.demo.model import ByteModel

WINDOW_STEPS = 24
LEAST_SHARE = 0.97
"""Of the best EK-FAC's LDS."""
KRONFLUENCE_DAMPINGS = (1e-8, None)

Outcomes = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Kind of subset to kept sources ``[K, S]`` (0 or 1) and log-odds ``[K, Q]``."""


@dataclass(frozen=True, slots=True)
class Run:
    """The fine-tune with everything, and what it left."""

    tuned: ByteModel
    windows: tuple[WindowFile, ...]
    stored_bytes: int


def observed_run(setting: Setting, directory: Path) -> Run:
    """Train with every source and keep accumulators, as a governed job does."""
    kept = setting.rows_of(range(setting.sizes.sources))
    with SourceAccumulators(directory, CAMPAIGN, WINDOW_STEPS, len(setting.order)) as accumulators:
        tuned, roots = train(setting, kept, accumulators)
    windows = tuple(
        Window(last - (last - 1) % WINDOW_STEPS, last, root, None)  # type: ignore[arg-type]
        for last, root in roots
    )
    found = find_windows(directory, CAMPAIGN, windows)
    assert not found.missing
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Run(tuned, found.found, stored)


def accumulator_scores(setting: Setting, run: Run) -> np.ndarray:
    """What ``countersign trace`` scores: ``[Q, S]``."""
    factors = fit_on_text(run.tuned, setting.public, FACTOR_SEQUENCES)
    queries = [preconditioned(factors, log_odds_gradients(run.tuned, query))[0] for query in setting.queries]
    places = {source_id(source): source for source in range(setting.sizes.sources)}
    scores = np.zeros((len(queries), len(places)))
    for file in run.windows:
        for entry, _, parts in window_scores(queries, file):
            scores[:, places[entry.source]] += parts
    return scores


def by_source(setting: Setting, scores_QN: np.ndarray) -> np.ndarray:
    """Scores of examples, summed by source: ``[Q, S]``."""
    return scores_QN.reshape(len(scores_QN), setting.sizes.sources, -1).sum(axis=2)


_setting: Setting | None = None


def _begin_worker(sizes: Sizes, profiled: bool, seed: int) -> None:
    global _setting  # noqa: PLW0603 (a worker's own)
    torch.set_num_threads(1)
    _setting = make(sizes, profiled=profiled, seed=seed)


def _outcome(kept: tuple[int, ...]) -> list[float]:
    assert _setting is not None
    model, _ = train(_setting, _setting.rows_of(kept))
    return log_odds(model, _setting.queries)


def outcomes(setting: Setting, seed: int, processes: int) -> Outcomes:
    """What really comes out without some of the sources."""
    sizes = setting.sizes
    draw = random.Random(f"subsets {seed}")
    everything = range(sizes.sources)
    subsets = {
        f"{left_out} of {sizes.sources} sources": [
            tuple(sorted(draw.sample(everything, sizes.sources - left_out))) for _ in range(sizes.subsets)
        ]
        for left_out in (sizes.sources // 2, sizes.sources // 8)
    }
    asked = [kept for kind in subsets.values() for kept in kind]
    found: list[list[float]] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin_worker, (sizes, setting.profiled, seed)) as pool:
        for outcome in pool.imap(_outcome, asked):
            found.append(outcome)
            if len(found) % 20 == 0:
                progress(f"{len(found)} of {len(asked)} fine-tunes repeated")
    taken = iter(found)
    return {
        kind: (
            np.array([[source in kept for source in everything] for kept in chosen], dtype=np.float64),
            np.array([next(taken) for _ in chosen]),
        )
        for kind, chosen in subsets.items()
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


def measure(report: Report, sizes: Sizes, seed: int, processes: int) -> None:
    """With and without depth profiles."""
    for profiled in (False, True):
        where = "depth profiles" if profiled else "all blocks open"
        setting = make(sizes, profiled=profiled, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            run = observed_run(setting, Path(folder))
            gained = np.mean(log_odds(run.tuned, setting.queries)) - np.mean(log_odds(setting.base, setting.queries))
            report.rate(f"{where}: gain of the outputs asked about", float(gained), "log-odds", None)
            scores, seconds = scores_of_all(setting, run)
        with watch_load() as load:
            real = outcomes(setting, seed, processes)
        for kind, (kept_KS, outcomes_KQ) in real.items():
            found = {name: linear_datamodeling_score(each, kept_KS, outcomes_KQ) for name, each in scores.items()}
            for name, value in found.items():
                report.rate(f"{where}, {kind} left out: LDS by source, {name}", value, "1", None, load)
            best = max(value for name, value in found.items() if name.startswith("kronfluence"))
            ratio = found["countersign"] / best
            report.rate(f"{where}, {kind} left out: countersign / best EK-FAC", ratio, "1", at_least(LEAST_SHARE))
        for name, taken in seconds.items():
            report.rate(f"{where}: {name}, all outputs", taken, "s", None)
        report.rate(f"{where}: accumulators stored", run.stored_bytes / 1e3, "kB", None)


def scores_of_all(setting: Setting, run: Run) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores ``[Q, S]`` by method, and the seconds each took."""
    scores: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    begun = time.perf_counter()

    def took(name: str, found: np.ndarray) -> None:
        nonlocal begun
        scores[name], seconds[name] = found, time.perf_counter() - begun
        begun = time.perf_counter()

    took("countersign", accumulator_scores(setting, run))
    took("gradient dot product", by_source(setting, dot_scores(run.tuned, setting.examples_NT, setting.queries)))
    took("TRAK", by_source(setting, trak_scores(run.tuned, setting.examples_NT, setting.queries)))
    peer = Kronfluence(run.tuned, setting.examples_NT)
    fitted = time.perf_counter() - begun
    for damping in KRONFLUENCE_DAMPINGS:
        begun = time.perf_counter()
        name = f"kronfluence EK-FAC, damping {'default' if damping else 'by eigenvalues'}"
        took(name, by_source(setting, peer.scores(setting.queries, damping)))
        seconds[name] += fitted
    peer.close()
    return scores, seconds


def main() -> int:
    """Measure, print one JSON document; 1 when a figure misses its floor."""
    parser = argparse.ArgumentParser(description="Linear datamodeling scores of traces and of other methods.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs: figures mean little")
    parser.add_argument("--seed", type=int, default=0, help="of topics, base model, order and subsets")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that repeat fine-tunes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = Report("attribution", arguments.quick)
    measure(report, QUICK if arguments.quick else FULL, arguments.seed, arguments.processes)
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
