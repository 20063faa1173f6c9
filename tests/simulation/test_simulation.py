"""No history forks and every history goes on, whatever the network, the hosts and the traitors do."""

import dataclasses

import pytest
from consensus_fixtures import make_genesis
from simulation.cryptography import Keys
from simulation.failures import Fork
from simulation.hash_seeds import printed_under_two_hash_seeds
from simulation.outcomes import BOUND_IN_DELAYS, CHAOS, outcomes, seeds, seeds_of_role, seeds_of_slow_runs, worst_gap_ms
from simulation.plan import DELAY_MS, Plan, turned
from simulation.simulator import Simulation

from consensus.engine import LOOKAHEAD_VIEWS
from consensus.evidence import EvidenceReport, convicted
from consensus.identifiers import VOTING_ROLES, Role
from consensus.membership import SCHEME_NEEDS

LIVE = {
    "one member per role": (Plan(counts=(1, 1, 1), **CHAOS, end_ms=11_000), 200),
    "2/2/1, all needed": (Plan(counts=(2, 2, 1), **CHAOS, end_ms=11_000), 55),
    "2/2/1, all needed, and four lose their ledgers": (
        Plan(counts=(2, 2, 1), unlucky=(2, 2, 0), loss=0.05, crash=0.004, heal_ms=4_000, end_ms=10_000),
        55,
    ),
    "4/4/4": (Plan(**CHAOS, end_ms=10_000), 15),
    "4/4/4, one silent per role": (Plan(silent=(1, 1, 1), **CHAOS, end_ms=11_000), 40),
    "3/3/3 with t=2, one silent per role": (
        Plan(counts=(3, 3, 3), thresholds=(2, 2, 2), silent=(1, 1, 1), **CHAOS, end_ms=11_000),
        60,
    ),
    "4/4/4, one selective per role": (Plan(selective=(1, 1, 1), **CHAOS, end_ms=11_000), 25),
    "4/4/4, one slow per role": (Plan(slow=(1, 1, 1), **CHAOS, end_ms=14_000), 15),
    "4/4/4, one forger of shares per role": (Plan(forgers=(1, 1, 1), **CHAOS, end_ms=11_000), 15),
    "4/4/4, one sender of garbage per role": (Plan(garbage=(1, 1, 1), **CHAOS, end_ms=11_000), 15),
    "4/4/4, one per role that votes again after each crash": (Plan(forgetful=(1, 1, 1), **CHAOS, end_ms=11_000), 10),
    "4/4/4, one traitor per role": (Plan(traitors=(1, 1, 1), **CHAOS, end_ms=11_000), 25),
    "4/4/4, one traitor per role that pushes timestamps": (
        Plan(traitors=(1, 1, 1), pushed=0.5, **CHAOS, end_ms=11_000),
        15,
    ),
    "3/3/3 with t=2, one censor per role": (
        Plan(
            counts=(3, 3, 3),
            thresholds=(2, 2, 2),
            censors=(1, 1, 1),
            urgent_ms=4_500,
            censorship_ms=1_000,
            **CHAOS,
            end_ms=11_000,
        ),
        30,
    ),
    "idle with work once a second": (Plan(counts=(2, 1, 1), idle=True, **CHAOS, end_ms=12_000), 200),
    "idle with work once a second, and three lose their ledgers": (
        Plan(counts=(2, 1, 1), unlucky=(2, 1, 0), idle=True, loss=0.05, crash=0.004, heal_ms=4_000, end_ms=10_000),
        100,
    ),
}

SAFE = {
    "one role alone is honest": (Plan(counts=(1, 1, 1), traitors=(1, 1, 0), end_ms=20_000), 350),
    "one role alone is honest and crashes": (
        Plan(counts=(1, 1, 1), traitors=(1, 1, 0), crash=0.01, heal_ms=20_000, end_ms=20_000),
        400,
    ),
    "one role alone is honest and loses its ledger": (
        Plan(counts=(1, 1, 1), traitors=(1, 1, 0), unlucky=(0, 0, 1), crash=0.01, heal_ms=20_000, end_ms=20_000),
        90,
    ),
    "one honest of two in one role": (
        Plan(counts=(2, 2, 2), traitors=(2, 2, 1), loss=0.1, heal_ms=10_000, end_ms=10_000),
        300,
    ),
    "two roles of traitors and one in the third": (
        Plan(traitors=(4, 4, 1), loss=0.1, crash=0.002, heal_ms=8_000, end_ms=8_000),
        60,
    ),
    "two roles of traitors and one in the third that votes again after each crash": (
        Plan(traitors=(4, 4, 0), forgetful=(0, 0, 1), loss=0.1, crash=0.01, heal_ms=8_000, end_ms=8_000),
        20,
    ),
    "a traitor in every role, for ever in chaos": (
        Plan(traitors=(1, 1, 1), **{**CHAOS, "heal_ms": 8_000}, end_ms=8_000),
        40,
    ),
}
"""The last role is the honest one. Each is run with every role as the last, a third of the seeds each."""


def test_at_least_two_thousand_seeds_are_run() -> None:
    assert sum(count for _, count in (*LIVE.values(), *SAFE.values())) >= 2_000


@pytest.mark.parametrize("name", LIVE)
def test_no_fork_and_progress_within_the_bound_after_healing(name: str) -> None:
    plan, count = LIVE[name]
    bound_ms = BOUND_IN_DELAYS * DELAY_MS * (2 if any(plan.slow) else 1)
    for run in outcomes(plan, seeds(count)):
        assert run.gap_ms <= bound_ms, f"seed {run.seed}: {run.gap_ms} ms without finalization"
        assert run.behind == 0, f"seed {run.seed}: {run.behind} members did not catch up"


@pytest.mark.parametrize("counts", [(1, 1, 1), (4, 4, 4)])
@pytest.mark.parametrize("steady_ms", [150, 200, 210, 300, 390, 400, 410, 600, 1_000])
def test_history_goes_on_where_every_message_takes_half_a_timeout_and_more(
    counts: tuple[int, int, int], steady_ms: int
) -> None:
    """Notarizations then come when timers have fired: nobody who has nullified a view finalizes it."""
    end_ms = 40 * steady_ms
    for run in outcomes(Plan(counts=counts, steady_ms=steady_ms, end_ms=end_ms), seeds_of_slow_runs(1)):
        assert run.gap_ms <= end_ms // 2, f"{run.gap_ms} ms without finalization"
        assert run.behind == 0


@pytest.mark.parametrize("honest", VOTING_ROLES)
@pytest.mark.parametrize("name", SAFE)
def test_traitors_below_the_agreement_bound_cannot_fork_history(name: str, honest: Role) -> None:
    """Whichever role is the one that two quorums share an honest member in."""
    plan, count = SAFE[name]
    chosen = seeds_of_role(count, honest)
    assert [run.seed for run in outcomes(turned(plan, honest), chosen)] == list(chosen)


EDGE = {
    "4/4/4": Plan(traitors=(4, 4, 1), loss=0.1, partition_every_ms=500, heal_ms=8_000, end_ms=8_000),
    "3/3/3 with t=2": Plan(
        counts=(3, 3, 3),
        thresholds=(2, 2, 2),
        traitors=(3, 3, 0),
        loss=0.1,
        partition_every_ms=500,
        heal_ms=8_000,
        end_ms=8_000,
    ),
}
"""As many traitors as there may be for a fork to be impossible: ``2t - n - 1`` in the last role, all of the others."""


@pytest.mark.parametrize("last", VOTING_ROLES)
@pytest.mark.parametrize("name", EDGE)
def test_same_committee_forks_with_one_traitor_more_and_not_without(name: str, last: Role) -> None:
    first, second, third = EDGE[name].traitors
    more = turned(dataclasses.replace(EDGE[name], traitors=(first, second, third + 1)), last)
    seed = next((seed for seed in range(100) if _forks(seed, more)), None)
    assert seed is not None, "one more than the bound found no fork"
    for spared in range(seed + 1):
        Simulation(spared, turned(EDGE[name], last)).run()


def test_traitors_at_the_agreement_bound_in_every_role_fork_history() -> None:
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


def test_members_at_the_agreement_bound_that_vote_again_after_a_crash_fork_history_without_any_traitor() -> None:
    plan = Plan(
        counts=(3, 3, 3),
        thresholds=(2, 2, 2),
        forgetful=(1, 1, 1),
        loss=0.1,
        crash=0.005,
        heal_ms=6_000,
        end_ms=6_500,
    )
    assert any(_forks(seed, plan) for seed in range(40))
    honest = dataclasses.replace(plan, forgetful=(0, 0, 0))
    assert not any(_forks(seed, honest) for seed in range(10))


def test_members_that_vote_again_after_a_crash_are_named_where_they_contradict_themselves() -> None:
    plan = Plan(forgetful=(1, 1, 1), loss=0.4, crash=0.005, heal_ms=6_000, end_ms=6_500)
    named = set()
    for seed in range(10):
        simulation = Simulation(seed, plan).run()
        reports = [EvidenceReport(effect.evidence) for effect in simulation.evidence]
        named |= {convicted(report, simulation.committee).member for report in reports}
    assert named == simulation.forgetful


@pytest.mark.parametrize("seed", [45, 108])
def test_member_that_missed_a_finalization_asks_for_it_though_views_keep_ending(seed: int) -> None:
    plan = Plan(counts=(1, 1, 1), idle=True, **CHAOS, end_ms=12_000)
    assert worst_gap_ms(Simulation(seed, plan).run()) <= BOUND_IN_DELAYS * DELAY_MS


def test_same_seed_gives_the_same_trace() -> None:
    plan = Plan(counts=(4, 4, 4), traitors=(1, 0, 1), **CHAOS, end_ms=5_000)
    assert Simulation(7, plan).run().trace == Simulation(7, plan).run().trace
    assert Simulation(7, plan).run().trace != Simulation(8, plan).run().trace


def test_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    program = (
        "from simulation.plan import Plan;"
        "from simulation.simulator import Simulation;"
        "plan = Plan(traitors=(1, 0, 1), slow=(0, 1, 0), loss=0.15, crash=0.002, heal_ms=3_000, end_ms=4_000);"
        "print(Simulation(7, plan).run().trace)"
    )
    first, second = printed_under_two_hash_seeds(program)
    assert first == second != ""


CENSORED = Plan(counts=(1, 1, 4), thresholds=(1, 1, 3), censors=(0, 0, 2), urgent_ms=1_000, end_ms=12_000)
"""Two of four operators, of whom three are needed, keep an urgent event out."""


def test_two_censoring_operators_of_four_keep_an_event_out_for_ever_without_the_rule() -> None:
    simulation = Simulation(1, CENSORED).run()
    heads = [node.head for node in simulation.nodes.values()]
    assert min(head.height for head in heads) > 5
    assert not any(head.digest in simulation.with_urgent for head in heads)


def test_censors_win_nothing_under_the_rule_but_a_log_that_waits() -> None:
    """Nothing more becomes final without the event; with one censor less, it is in and the log goes on."""
    for seed in seeds(5):
        simulation = Simulation(seed, dataclasses.replace(CENSORED, censorship_ms=2_000)).run()
        late = [header.timestamp_ms for node in simulation.nodes.values() for header in node.ledger]
        assert max(late) <= 3_000 + 2 * DELAY_MS
        alone = dataclasses.replace(CENSORED, censorship_ms=2_000, censors=(0, 0, 1))
        simulation = Simulation(seed, alone).run()
        assert all(node.head.digest in simulation.with_urgent for node in simulation.nodes.values())
        assert worst_gap_ms(simulation) <= BOUND_IN_DELAYS * DELAY_MS


@pytest.mark.parametrize("real", [False, True])
def test_garbage_is_refused_by_name_and_fills_no_engine(real: bool) -> None:
    plan = Plan(counts=(3, 3, 3), thresholds=(2, 2, 2), garbage=(1, 1, 1), end_ms=1_500 if real else 6_000)
    cryptography = None
    if real:
        counts = {"data-source": 3, "governance": 3, "operator": 3}
        thresholds = dict.fromkeys(counts, 2)
        cryptography = Keys(*make_genesis(counts, certificate_scheme="ed25519", thresholds=thresholds))
    voters = None if cryptography is None else cryptography.committee
    simulation = Simulation(2, plan, cryptography=cryptography, voters=voters).run()
    assert {"wrong-chain", "wrong-epoch", "bad-signature"} <= set(simulation.refused)
    for node in simulation.nodes.values():
        assert node.head.height > 3
        assert node.engine is not None
        assert len(node.engine._rounds) <= LOOKAHEAD_VIEWS + 2


@pytest.mark.parametrize("scheme", SCHEME_NEEDS)
def test_forged_shares_under_valid_signatures_delay_no_certificate(scheme: str) -> None:
    counts = {"data-source": 3, "governance": 1, "operator": 1}
    cryptography = Keys(*make_genesis(counts, certificate_scheme=scheme, thresholds={"data-source": 2}))
    plan = Plan(counts=(3, 1, 1), forgers=(1, 0, 0), end_ms=1_500)
    simulation = Simulation(1, plan, cryptography=cryptography, voters=cryptography.committee).run()
    assert all(node.head.height > 3 for node in simulation.nodes.values())
    assert simulation.evidence == []


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
    for seed in seeds_of_slow_runs(2):
        simulation = Simulation(seed, plan, cryptography=cryptography, voters=cryptography.committee).run()
        assert all(node.head.height > node.height_at_heal for node in simulation.nodes.values())


def _forks(seed: int, plan: Plan) -> bool:
    try:
        Simulation(seed, plan, judge_votes=False).run()
    except Fork:
        return True
    return False
