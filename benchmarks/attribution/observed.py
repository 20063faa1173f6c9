"""The fine-tune with everything: the accumulators that a governed job keeps of it, and what a trace scores by them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from setting import CAMPAIGN, LOWER, Setting, source_id, train
from torch import Tensor

from attribution.trace import window_scores
from attribution.weights import WindowFile, find_windows
from consensus.predicates.accumulators import Window
from trainer_client.accumulators import SourceAccumulators
from trainer_client.demo.model import ByteModel, parameter_blocks

LOWER_RANKS = {6: 16}
"""Under depth profiles, of the blocks that every other source may not move: what they leave free pays for it."""


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
    ranks = lower_ranks(setting, sketch_rank)
    with SourceAccumulators(directory, CAMPAIGN, steps, steps, sketch_rank, ranks) as accumulators:
        tuned, roots = train(setting, kept, accumulators, apart=apart)
    windows = tuple(Window(1, last, root, None) for last, root in roots)  # type: ignore[arg-type]
    found = find_windows(directory, CAMPAIGN, windows)
    assert not found.missing
    return Run(tuned, found.found, stored_bytes(directory))


def lower_ranks(setting: Setting, sketch_rank: int) -> dict[str, int]:
    """Of parameters that are sketched at another rank."""
    if not setting.profiled or sketch_rank not in LOWER_RANKS:
        return {}
    table = parameter_blocks(setting.base)
    return {name: LOWER_RANKS[sketch_rank] for block in LOWER for name in table[block]}


def stored_bytes(directory: Path) -> int:
    """Of all files below it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def accumulator_scores(run: Run, queries: Mapping[str, Tensor], count: int) -> np.ndarray:
    """What ``countersign trace`` scores, ``[Q, count]``: of sources, or of examples kept apart."""
    places = {source_id(place): place for place in range(count)}
    scores = np.zeros((len(next(iter(queries.values()))), count))
    for file in run.windows:
        for entry, _, parts in window_scores(queries, file):
            scores[:, places[entry.source]] += parts
    return scores
