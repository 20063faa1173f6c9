"""No history forks and every history goes on, whatever the network, the hosts and the traitors do.

``COUNTERSIGN_SIMULATION_SEEDS`` sets the seeds per plan for long runs.
"""

import os

import pytest
from consensus_fixtures import make_genesis
from simulation.simulator import DELAY_MS, Fork, Keys, Plan, Simulation, worst_gap_ms

from consensus.evidence import EvidenceReport, convicted
from consensus.membership import SCHEME_NEEDS

SEEDS = os.environ.get("COUNTERSIGN_SIMULATION_SEEDS")

CHAOS = {"loss": 0.15, "duplication": 0.1, "crash": 0.002, "partition_every_ms": 400, "heal_ms": 4_000}

BOUND_IN_DELAYS = 60
"""What a correct member may wait for the next finalization after healing, in Δ.

The timeout starts at 4 Δ and may have grown to its cap of 32 Δ; the first timeout of a view nullifies it,
the second makes the voter ask what it lacks, and the leader after it may be silent: below two caps.
"""


def seeds(count: int) -> range:
    return range(count if SEEDS is None else int(SEEDS))


LIVE = {
    "one member per role": (Plan(counts=(1, 1, 1), **CHAOS, end_ms=11_000), 40),
    "2/2/1, all needed": (Plan(counts=(2, 2, 1), **CHAOS, end_ms=11_000), 40),
    "4/4/4": (Plan(**CHAOS, end_ms=10_000), 15),
    "4/4/4, one silent per role": (Plan(silent=(1, 1, 1), **CHAOS, end_ms=11_000), 40),
    "3/3/3 with t=2, one silent per role": (
        Plan(counts=(3, 3, 3), thresholds=(2, 2, 2), silent=(1, 1, 1), **CHAOS, end_ms=11_000),
        40,
    ),
    "4/4/4, one selective per role": (Plan(selective=(1, 1, 1), **CHAOS, end_ms=11_000), 30),
    "4/4/4, one traitor per role": (Plan(traitors=(1, 1, 1), **CHAOS, end_ms=11_000), 30),
    "idle with work once a second": (Plan(counts=(2, 1, 1), idle=True, **CHAOS, end_ms=12_000), 40),
}

SAFE = {
    "the operator alone is honest": (Plan(counts=(1, 1, 1), traitors=(1, 1, 0), end_ms=20_000), 80),
    "the operator alone is honest and crashes": (
        Plan(counts=(1, 1, 1), traitors=(1, 1, 0), crash=0.01, heal_ms=20_000, end_ms=20_000),
        80,
    ),
    "one honest of two in one role": (
        Plan(counts=(2, 2, 2), traitors=(2, 2, 1), loss=0.1, heal_ms=10_000, end_ms=10_000),
        60,
    ),
    "two roles of traitors and one in the third": (
        Plan(traitors=(4, 4, 1), loss=0.1, crash=0.002, heal_ms=8_000, end_ms=8_000),
        40,
    ),
    "a traitor in every role, for ever in chaos": (
        Plan(traitors=(1, 1, 1), **{**CHAOS, "heal_ms": 8_000}, end_ms=8_000),
        20,
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_no_fork_and_progress_within_the_bound_after_healing(name: str) -> None:
    plan, count = LIVE[name]
    for seed in seeds(count):
        simulation = Simulation(seed, plan).run()
        gap_ms = worst_gap_ms(simulation)
        assert gap_ms <= BOUND_IN_DELAYS * DELAY_MS, f"seed {seed}: {gap_ms} ms without finalization"
        for node in simulation.nodes.values():
            assert node.head.height > node.height_at_heal, f"seed {seed}: a member did not catch up"


@pytest.mark.parametrize("name", SAFE)
def test_traitors_below_the_agreement_bound_cannot_fork_history(name: str) -> None:
    plan, count = SAFE[name]
    for seed in seeds(count):
        Simulation(seed, plan).run()


def test_traitors_at_the_agreement_bound_fork_history() -> None:
    """The bound is tight (``2t - n`` traitors in every role suffice) and the simulation can see a fork."""
    plan = Plan(
        counts=(3, 3, 3),
        thresholds=(2, 2, 2),
        traitors=(1, 1, 1),
        partition_every_ms=500,
        loss=0.1,
        heal_ms=20_000,
        end_ms=20_000,
    )
    assert any(_forks(seed, plan) for seed in range(200))


def test_equivocating_voters_and_leaders_are_named_by_evidence() -> None:
    simulation = Simulation(3, Plan(traitors=(1, 1, 1), end_ms=4_000)).run()
    reports = [EvidenceReport(effect.evidence) for effect in simulation.evidence]
    culprits = {convicted(report, simulation.committee).member for report in reports}
    assert culprits == simulation.traitors


@pytest.mark.parametrize("seed", [45, 108])
def test_member_that_missed_a_finalization_asks_for_it_though_views_keep_ending(seed: int) -> None:
    plan = Plan(counts=(1, 1, 1), idle=True, **CHAOS, end_ms=12_000)
    assert worst_gap_ms(Simulation(seed, plan).run()) <= BOUND_IN_DELAYS * DELAY_MS


def test_same_seed_gives_the_same_trace() -> None:
    plan = Plan(counts=(4, 4, 4), traitors=(1, 0, 1), **CHAOS, end_ms=5_000)
    assert Simulation(7, plan).run().trace == Simulation(7, plan).run().trace
    assert Simulation(7, plan).run().trace != Simulation(8, plan).run().trace


def test_network_without_faults_finalizes_in_three_hops_and_one_view_per_block() -> None:
    simulation = Simulation(1, Plan(end_ms=5_000)).run()
    assert worst_gap_ms(simulation) <= 4 * DELAY_MS
    for node in simulation.nodes.values():
        assert [header.view for header in node.ledger] == list(range(len(node.ledger)))


def test_idle_network_makes_heartbeats_only() -> None:
    simulation = Simulation(1, Plan(counts=(2, 1, 1), idle=True, end_ms=499)).run()
    assert {node.head.height for node in simulation.nodes.values()} == {0}
    assert simulation.steps < 40


@pytest.mark.parametrize("scheme", SCHEME_NEEDS)
def test_real_signatures_and_certificates_carry_the_round(scheme: str) -> None:
    counts = {"data-source": 2, "governance": 1, "operator": 1}
    cryptography = Keys(*make_genesis(counts, certificate_scheme=scheme))
    plan = Plan(counts=(2, 1, 1), loss=0.1, crash=0.003, heal_ms=1_500, end_ms=3_500)
    for seed in range(2):
        simulation = Simulation(seed, plan, cryptography=cryptography, voters=cryptography.committee).run()
        assert all(node.head.height > node.height_at_heal for node in simulation.nodes.values())


def _forks(seed: int, plan: Plan) -> bool:
    try:
        Simulation(seed, plan, judge_votes=False).run()
    except Fork:
        return True
    return False
