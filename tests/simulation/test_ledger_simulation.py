"""Hosts with real logs take what is admissible, nothing else, and each the same; catching up believes nobody."""

from collections import Counter

import pytest
from simulation.failures import Inadmissible
from simulation.hash_seeds import printed_under_two_hash_seeds
from simulation.ledger_host import LedgerNode
from simulation.ledger_outcomes import ledger_outcome
from simulation.ledgers import LedgerSimulation
from simulation.outcomes import BOUND_IN_DELAYS, CHAOS, enough_seeds, outcomes, seeds, seeds_of_role
from simulation.plan import DELAY_MS, LedgerPlan, turned

from consensus.engine import Engine, Timing
from consensus.identifiers import VOTING_ROLES
from consensus.membership import SCHEME_NEEDS
from consensus.rejection import Rejected
from consensus.transition import Built, LedgerState
from node.ledger import Ledger

HASTY = Timing(timeout_ms=100, max_timeout_ms=400, heartbeat_ms=1_000)
"""Where traitors that do not vote cost most of the time."""

LIVE = {
    "2/1/1": (LedgerPlan(censorship_ms=2_000, **CHAOS, end_ms=9_000), 5),
    "2/1/1, and three lose their ledgers": (
        LedgerPlan(unlucky=(2, 1, 0), censorship_ms=2_000, loss=0.05, crash=0.008, heal_ms=4_000, end_ms=9_000),
        5,
    ),
    "4/1/1, one traitor": (
        LedgerPlan(counts=(4, 1, 1), traitors=(1, 0, 0), pushed=0.3, censorship_ms=2_000, **CHAOS, end_ms=9_000),
        8,
    ),
    "5/1/1 with t=3, one censor, one sender of garbage": (
        LedgerPlan(
            counts=(5, 1, 1),
            thresholds=(3, 1, 1),
            censors=(1, 0, 0),
            garbage=(1, 0, 0),
            censorship_ms=2_000,
            **CHAOS,
            end_ms=16_000,
        ),
        6,
    ),
    "5/1/1 with t=3, all that one who was away asks lie but one": (
        LedgerPlan(
            counts=(5, 1, 1),
            thresholds=(3, 1, 1),
            liars=(3, 1, 1),
            away=(1, 0, 0),
            away_ms=5_000,
            **CHAOS,
            end_ms=9_000,
        ),
        20,
    ),
}

SAFE = {
    "one role alone is honest": (
        LedgerPlan(counts=(1, 1, 1), traitors=(1, 1, 0), timing=HASTY, heal_ms=8_000, end_ms=8_000),
        20,
    ),
    "one honest of two in one role": (
        LedgerPlan(
            counts=(2, 2, 2),
            traitors=(2, 2, 1),
            pushed=0.3,
            loss=0.1,
            crash=0.002,
            timing=HASTY,
            heal_ms=8_000,
            end_ms=8_000,
        ),
        12,
    ),
}
"""The last role is the honest one. Each is run with every role as the last, a third of the seeds each."""


@pytest.mark.parametrize("name", LIVE)
def test_every_admissible_event_is_on_every_log_within_the_bound_after_healing(name: str) -> None:
    plan, count = LIVE[name]
    spoiled, kinds, distrusted = Counter[str](), Counter[str](), Counter[str]()
    refused, refused_events = Counter[str](), Counter[str]()
    for run in outcomes(plan, seeds(count), ledger_outcome):
        assert run.gap_ms <= BOUND_IN_DELAYS * DELAY_MS, f"seed {run.seed}: {run.gap_ms} ms without finalization"
        assert run.behind == 0, f"seed {run.seed}: {run.behind} members did not catch up"
        spoiled += run.spoiled
        kinds += run.kinds
        distrusted += run.distrusted
        refused += run.refused
        refused_events += run.refused_events
    if not enough_seeds(count):
        return
    assert {"source", "revocation", "policy", "delegation"} <= set(kinds)
    if any(plan.traitors):
        broken = {"bad-block", "bad-timestamp", "duplicate", "log-root-mismatch", "state-root-mismatch"}
        assert broken <= set(spoiled), "traitors proposed nothing worth refusing"
    if any(plan.garbage):
        assert {"garbage: bad-signature", "garbage: wrong-chain", "garbage: wrong-epoch"} <= set(refused)
        assert {"bad-signature", "malformed", "portion-mismatch"} <= set(refused_events)
    if any(plan.liars):
        named = {"bad-block", "bad-certificate", "malformed", "not-found", "wrong-chain"}
        assert named <= set(distrusted), "nobody was lied to"


@pytest.mark.parametrize("name", SAFE)
def test_traitors_put_nothing_inadmissible_on_an_honest_members_log(name: str) -> None:
    """Often they let nothing be final: three runs of five end at height 0 under the second plan."""
    plan, count = SAFE[name]
    runs = []
    for honest in VOTING_ROLES:
        runs += outcomes(turned(plan, honest), seeds_of_role(count, honest), ledger_outcome)
    assert [run.seed for run in sorted(runs, key=lambda run: run.seed)] == list(seeds(count))
    if enough_seeds(count):
        assert any(max(run.heights) > 0 for run in runs), "the traitors let nothing be final at all"
        assert {"duplicate", "unknown-source", "state-root-mismatch"} <= set().union(*(run.spoiled for run in runs))


class CredulousLedger(Ledger):
    """Takes a ledger block's word for its log and state."""

    def verify(self, parent, header, body, events):
        try:
            return super().verify(parent, header, body, events)
        except Rejected:
            state = LedgerState(header, header.digest, parent.frontier.append(body.leaf_hashes), parent.state)
            self.overlays[header.digest] = Built(state, body, tuple(events), {}, (), ())
            return state


class CredulousNode(LedgerNode):
    """Votes for what admission refuses."""

    def new_engine(self) -> Engine:
        engine = super().new_engine()
        self.log.__class__ = CredulousLedger
        return engine


def test_hosts_that_do_not_judge_ledger_blocks_are_found_out() -> None:
    plan = SAFE["one role alone is honest"][0]

    def run_until_found() -> None:
        for seed in range(30):
            LedgerSimulation(seed, plan, host=CredulousNode).run()

    with pytest.raises(Inadmissible):
        run_until_found()


@pytest.mark.parametrize("seed", seeds(5))
def test_event_takes_one_ledger_block_and_no_empty_one_after_it(seed: int) -> None:
    """An empty one would cost everybody as much as the event did. Later some events wait that are not admissible."""
    run = LedgerSimulation(seed, LedgerPlan(event_every_ms=1_000, end_ms=8_000)).run()
    for node in run.nodes.values():
        assert [header.event_count for header in node.ledger[1:3]] == [1, 1]


@pytest.mark.parametrize("scheme", SCHEME_NEEDS)
def test_ledgers_agree_under_every_certificate_scheme(scheme: str) -> None:
    plan = LedgerPlan(scheme=scheme, loss=0.1, crash=0.003, heal_ms=1_500, end_ms=4_000)
    run = ledger_outcome(1, plan)
    assert run.behind == 0
    assert min(run.heights) > 3


TRACED = {
    "traitors, liars and epochs": (
        "counts=(4, 1, 1), traitors=(1, 0, 0), liars=(1, 0, 0), away=(0, 0, 1), away_ms=2_000, loss=0.15, crash=0.002,"
        " partition_every_ms=400, heal_ms=2_500, end_ms=5_000,"
        " changes=(Change(500, add=(('late', 'operator'),)), Change(2_600, rotate=('data-source-1',)))"
    ),
    "a ceremony with a last dealer": (
        "counts=(4, 1, 1), scheme='bls-threshold', over_network=True, last_dealers=('data-source-3', 'data-source-4'),"
        " loss=0.15, crash=0.002, heal_ms=1_500, end_ms=4_500, changes=(Change(300),)"
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_same_seed_gives_the_same_trace_with_ledgers_whatever_the_hash_seed(name: str) -> None:
    program = (
        "from simulation.ledgers import LedgerSimulation;"
        "from simulation.plan import Change, LedgerPlan;"
        f"simulation = LedgerSimulation(7, LedgerPlan({TRACED[name]})).run();"
        "print(simulation.epoch, simulation.trace)"
    )
    first, second = printed_under_two_hash_seeds(program)
    assert first == second
    assert int(first.split()[0]) > 0, "no epoch has begun"
