"""How far the score of an output stands from those of control outputs, which no source is known to have shaped.

Each score is divided by its query's length in the factors' metric before it is compared: an unlikely output has a long
gradient whoever wrote it (docs/adr/018).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Queries:
    """The output asked about, then its controls: ``[K, P, Q]`` by parameter, and each one's length."""

    gradients: Mapping[str, Tensor]
    lengths: Sequence[float]


def deviations(scores: Sequence[float], lengths: Sequence[float]) -> float:
    """How many deviations the first score stands above the others, each divided by its query's length."""
    first, *controls = (score / length for score, length in zip(scores, lengths, strict=True))
    deviation = statistics.stdev(controls)
    if deviation == 0.0:
        return 0.0 if first == controls[0] else math.copysign(math.inf, first - controls[0])
    return (first - statistics.fmean(controls)) / deviation
