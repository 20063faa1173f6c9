"""What really comes out without some of the sources or examples: fine-tunes repeated, and how well scores predict them.

The *LDS* (Park et al., *TRAK*, arXiv 2303.14186, §4) of one output is the Spearman correlation, over subsets of the
sources (or of single examples), of what an attribution predicts (the sum of its scores of what was kept) with what
comes out when the fine-tune is really repeated without the others; the figure is the mean over outputs.

* *Single-run*: repeated runs share order and seed with the first, which no luck of other seeds blurs.
* *Average-run*: each subset is taken several times, each time in an order of its own, and outcomes are averaged. It
  asks what a subset does on the whole; the scores are of the one run there was.
"""

import multiprocessing
import random
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from harness import progress
from setting import Setting, Sizes, Tuning, log_odds, make, order_of, train

LARGER, SMALLER = 2, {"sources": 8, "examples": 10}
"""One of so many is left out."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """Of one kind of subset: which sources or examples were kept, and every output's log-odds then."""

    kind: str
    of_sources: bool
    kept_KN: np.ndarray
    """0 or 1."""
    single_KQ: np.ndarray
    averaged_KQ: np.ndarray | None
    """Over several orders; of the larger subsets alone."""


class LeftOut(StrEnum):
    """Which subsets are taken."""

    HALF = "half"
    FEW = "few"
    """An eighth of the sources, a tenth of the examples."""


@dataclass(frozen=True, slots=True)
class _Asked:
    kind: str
    left_out: LeftOut
    of_sources: bool
    total: int
    kept: tuple[frozenset[int], ...]
    orders: int


_Run = tuple[tuple[int, ...], str]
"""Rows, and the seed of their order; empty: the setting's."""

_setting: Setting | None = None


def _begin_worker(sizes: Sizes, profiled: bool, tuning: Tuning, seed: int) -> None:
    global _setting  # noqa: PLW0603 (a worker's own)
    torch.set_num_threads(1)
    _setting = make(sizes, profiled=profiled, tuning=tuning, seed=seed)


def _outcome(run: _Run) -> list[float]:
    assert _setting is not None
    rows, order_seed = run
    order = order_of(len(_setting.examples_NT), order_seed) if order_seed else ()
    model, _ = train(_setting, frozenset(rows), order=order)
    return log_odds(model, _setting.queries)


def repeat(setting: Setting, seed: int, processes: int, left_out: Collection[LeftOut]) -> list[Repeats]:
    """All the fine-tunes without some of it."""
    every = [asked for asked in _asked(setting, seed) if asked.left_out in left_out]
    runs = [run for asked in every for run in _runs(setting, asked, seed)]
    found: list[list[float]] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _begin_worker, (setting.sizes, setting.profiled, setting.tuning, seed)) as pool:
        for outcome in pool.imap(_outcome, runs):
            found.append(outcome)
            if len(found) % 20 == 0:
                progress(f"{len(found)} of {len(runs)} fine-tunes repeated")
    repeats = []
    for asked in every:
        count = len(asked.kept)
        single, found = np.array(found[:count]), found[count:]
        averaged = None
        if asked.orders:
            averaged = np.array(found[: count * asked.orders]).reshape(count, asked.orders, -1).mean(axis=1)
            found = found[count * asked.orders :]
        kept_KN = np.array([[place in kept for place in range(asked.total)] for kept in asked.kept], float)
        repeats.append(Repeats(asked.kind, asked.of_sources, kept_KN, single, averaged))
    return repeats


def _asked(setting: Setting, seed: int) -> list[_Asked]:
    every = []
    for what, total in (("sources", setting.sizes.sources), ("examples", len(setting.examples_NT))):
        draw = random.Random(f"subsets of {what} {seed}")
        for part in (LARGER, SMALLER[what]):
            left = total - total // part
            kept = tuple(frozenset(draw.sample(range(total), left)) for _ in range(setting.sizes.subsets))
            orders = setting.sizes.orders if part == LARGER else 0
            left_out = LeftOut.HALF if part == LARGER else LeftOut.FEW
            every.append(_Asked(f"{total // part} of {total} {what}", left_out, what == "sources", total, kept, orders))
    return every


def _runs(setting: Setting, asked: _Asked, seed: int) -> list[_Run]:
    """First each subset in the setting's order, then each in orders of its own."""
    rows = [tuple(sorted(setting.rows_of(kept) if asked.of_sources else kept)) for kept in asked.kept]
    return [(each, "") for each in rows] + [
        (each, f"{seed} {asked.kind} {subset} {number}")
        for subset, each in enumerate(rows)
        for number in range(asked.orders)
    ]


def linear_datamodeling_score(scores_QS: np.ndarray, kept_KS: np.ndarray, outcomes_KQ: np.ndarray) -> float:
    """Mean over outputs of Spearman's correlation of predicted with real outcomes."""
    predicted_KQ = kept_KS @ scores_QS.T
    return float(
        np.mean(
            [
                rank_correlation(predicted_K, real_K)
                for predicted_K, real_K in zip(predicted_KQ.T, outcomes_KQ.T, strict=True)
            ]
        )
    )


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, of two sequences."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def by_source(scores_QN: np.ndarray, sources: int) -> np.ndarray:
    """Scores of examples, summed by source: ``[Q, S]``."""
    return scores_QN.reshape(len(scores_QN), sources, -1).sum(axis=2)
