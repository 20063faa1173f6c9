"""Many runs of one plan, on all cores, and what is asked of each."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from simulation.simulator import Plan, Simulation


def worst_gap_ms(simulation: Simulation) -> int:
    """The longest any correct node waited between two finalizations after healing, up to the end."""
    gaps = [0]
    for node in simulation.nodes.values():
        times = [time for time in node.finalized_at if time >= simulation.plan.heal_ms]
        marks = [simulation.plan.heal_ms, *times, simulation.plan.end_ms]
        gaps.extend(after - before for before, after in pairwise(marks))
    return max(gaps)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is asked of a finished run."""

    seed: int
    gap_ms: int
    """``worst_gap_ms``."""
    behind: int
    """Correct members that finalized nothing after healing."""


def outcome(seed: int, plan: Plan) -> Outcome:
    """One run, judged."""
    simulation = Simulation(seed, plan).run()
    behind = sum(node.head.height <= node.height_at_heal for node in simulation.nodes.values())
    return Outcome(seed, worst_gap_ms(simulation), behind)


def outcomes(plan: Plan, seeds: Sequence[int]) -> Iterator[Outcome]:
    """Every run of a plan, on all cores, in the order of seeds; raises what the first broken one raises."""
    workers = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(outcome, seeds, [plan] * len(seeds), chunksize=max(1, len(seeds) // (8 * workers)))
