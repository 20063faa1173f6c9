"""Many runs of one plan, on all cores, and what is asked of each."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from simulation.host import Node
from simulation.plan import Plan
from simulation.simulator import Simulation

from consensus.identifiers import VOTING_ROLES, Role

P = TypeVar("P", bound=Plan)
J = TypeVar("J", bound="Outcome")


CORES = len(os.sched_getaffinity(0))

SEEDS = os.environ.get("COUNTERSIGN_SIMULATION_SEEDS")

CHAOS: dict[str, Any] = {"loss": 0.15, "duplication": 0.1, "crash": 0.002, "partition_every_ms": 400, "heal_ms": 4_000}

BOUND_IN_DELAYS = 60
"""What a correct member may wait for the next finalization after healing, in Δ.

The timeout starts at 4 Δ and may have grown to its cap of 32 Δ; the first timeout of a view nullifies it,
the second makes the voter ask what it lacks, and the leader after it may be silent: below two caps.
"""


def seeds(count: int) -> range:
    """``COUNTERSIGN_SIMULATION_SEEDS`` replaces a plan's count, for long runs."""
    return range(count if SEEDS is None else int(SEEDS))


def seeds_of_slow_runs(count: int) -> range:
    """A tenth of what ``seeds`` gives in long runs, for plans of which one run takes seconds."""
    return range(count if SEEDS is None else max(1, int(SEEDS) // 10))


def enough_seeds(count: int) -> bool:
    """Whether no fewer are run than ``count``: only then must what happens in some runs have happened in one."""
    return SEEDS is None or int(SEEDS) >= count


def seeds_of_role(count: int, role: Role) -> range:
    """One third of ``seeds(count)``, another for each role: for plans that are run with each role as their last."""
    return seeds(count)[VOTING_ROLES.index(role) :: len(VOTING_ROLES)]


def worst_gap_ms(simulation: Simulation) -> int:
    """The longest any correct node waited between two finalizations after healing, up to the end."""
    return longest_wait_ms(simulation, simulation.correct, simulation.plan.heal_ms)


def longest_wait_ms(simulation: Simulation, nodes: Iterable[Node], from_ms: int) -> int:
    """The longest any of ``nodes`` waited between two finalizations from ``from_ms`` up to the end."""
    gaps = [0]
    for node in nodes:
        times = [time for time in node.finalized_at if time >= from_ms]
        marks = [from_ms, *times, simulation.plan.end_ms]
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
    behind = sum(node.head.height <= node.height_at_heal for node in simulation.correct)
    return Outcome(seed, worst_gap_ms(simulation), behind)


def outcomes(plan: P, seeds: Sequence[int], judged: Callable[[int, P], J] = outcome) -> Iterator[J]:  # type: ignore[assignment]
    """Every run of a plan, on all cores, in the order of seeds; raises what the first broken one raises."""
    yield from _workers().map(judged, seeds, [plan] * len(seeds), chunksize=max(1, len(seeds) // (8 * CORES)))


@cache
def _workers() -> concurrent.futures.Executor:
    """One for each core, for all tests of this process: they take longer to start than many a run."""
    return concurrent.futures.ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn"))
