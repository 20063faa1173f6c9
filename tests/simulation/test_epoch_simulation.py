"""Members join, leave and change keys in mid-run, and no history forks: nor across epochs, nor by who has left."""

from collections import Counter

import pytest
from simulation.ledger_outcomes import LedgerOutcome, ledger_outcome
from simulation.ledgers import LedgerSimulation
from simulation.outcomes import BOUND_IN_DELAYS, CHAOS, enough_seeds, outcomes, seeds, seeds_of_role
from simulation.plan import DELAY_MS, Change, LedgerPlan, turned

from consensus.engine import Timing
from consensus.identifiers import VOTING_ROLES
from consensus.membership import SCHEME_NEEDS

HASTY = Timing(timeout_ms=100, max_timeout_ms=400, heartbeat_ms=1_000)

JOIN, ROTATE, LEAVE = (
    Change(500, add=(("late", "operator"),)),
    Change(2_000, rotate=("data-source-1", "operator-1")),
    Change(4_500, remove=("data-source-3",)),
)

LIVE = {
    "join, rotate and leave": (
        LedgerPlan(
            counts=(3, 1, 1),
            thresholds=(2, 1, 1),
            event_every_ms=300,
            censorship_ms=2_000,
            **CHAOS,
            end_ms=11_000,
            changes=(JOIN, ROTATE, LEAVE),
        ),
        8,
    ),
    "a traitor is removed": (
        LedgerPlan(
            counts=(4, 1, 1),
            traitors=(1, 0, 0),
            event_every_ms=300,
            **CHAOS,
            end_ms=10_000,
            changes=(Change(500, add=(("late", "data-source"),)), Change(3_000, remove=("data-source-4",))),
        ),
        5,
    ),
    "join, rotate and leave, and four lose their ledgers": (
        LedgerPlan(
            counts=(3, 1, 1),
            thresholds=(2, 1, 1),
            unlucky=(3, 1, 0),
            event_every_ms=300,
            loss=0.05,
            crash=0.004,
            heal_ms=6_000,
            end_ms=11_000,
            changes=(JOIN, ROTATE, LEAVE),
        ),
        4,
    ),
    "a member replays what was said in epochs that have ended": (
        LedgerPlan(
            counts=(4, 1, 1),
            replayers=(1, 0, 0),
            event_every_ms=300,
            **CHAOS,
            end_ms=9_000,
            changes=(Change(500, rotate=("data-source-1", "operator-1")), Change(2_000, rotate=("data-source-2",))),
        ),
        4,
    ),
}

SAFE = LedgerPlan(
    counts=(1, 1, 1),
    traitors=(1, 1, 0),
    event_every_ms=300,
    timing=HASTY,
    heal_ms=8_000,
    end_ms=8_000,
    changes=(Change(500, add=(("late", "data-source"),)), Change(2_000, rotate=("governance-1", "operator-1"))),
)

SAFE_SEEDS = 12


def lived_through(name: str) -> list[LedgerOutcome]:
    plan, count = LIVE[name]
    runs = list(outcomes(plan, seeds(count), ledger_outcome))
    for run in runs:
        assert run.epoch == len(plan.changes), f"seed {run.seed}: epoch {run.epoch}"
        assert run.gap_ms <= BOUND_IN_DELAYS * DELAY_MS, f"seed {run.seed}: {run.gap_ms} ms without finalization"
        assert run.behind == 0, f"seed {run.seed}: {run.behind} members did not come along"
    return runs


def test_members_join_rotate_and_leave_in_chaos_and_every_log_goes_on() -> None:
    name = "join, rotate and leave"
    runs = lived_through(name)
    assert all(run.kinds["membership"] == 3 for run in runs)
    if enough_seeds(LIVE[name][1]):
        assert sum(run.carried for run in runs) > 0, "no epoch ended through a carrier"


def test_members_that_lose_their_ledgers_go_through_all_epochs_again_and_vote_in_the_newest() -> None:
    lived_through("join, rotate and leave, and four lose their ledgers")


def test_removed_traitor_votes_on_in_old_and_new_epoch_and_is_refused_by_name() -> None:
    name = "a traitor is removed"
    refused = sum((run.refused for run in lived_through(name)), Counter[str]())
    if enough_seeds(LIVE[name][1]):
        assert {"traitor: wrong-epoch", "traitor: unknown-member"} <= set(refused)


def test_true_votes_certificates_and_proposals_of_ended_epochs_are_refused_from_who_replays_them() -> None:
    name = "a member replays what was said in epochs that have ended"
    runs = lived_through(name)
    replayed = sum((run.replayed for run in runs), Counter[str]())
    refused = sum((run.refused for run in runs), Counter[str]())
    assert {reason for reason in refused if reason.startswith("replayer")} == {"replayer: wrong-epoch"}
    if enough_seeds(LIVE[name][1]):
        assert {"Vote", "Proposal", "Certificate", "Notarization", "Nullification", "Stalled"} <= set(replayed)


def test_two_roles_of_traitors_fork_no_history_across_epochs() -> None:
    runs = [
        run
        for honest in VOTING_ROLES
        for run in outcomes(turned(SAFE, honest), seeds_of_role(SAFE_SEEDS, honest), ledger_outcome)
    ]
    assert not enough_seeds(SAFE_SEEDS) or max(run.epoch for run in runs) == 2


@pytest.mark.parametrize("scheme", SCHEME_NEEDS)
def test_epoch_begins_under_every_certificate_scheme(scheme: str) -> None:
    plan = LedgerPlan(counts=(3, 1, 1), scheme=scheme, loss=0.1, heal_ms=1_000, end_ms=4_000, changes=(JOIN,))
    run = ledger_outcome(1, plan)
    assert (run.epoch, run.behind, len(run.heights)) == (1, 0, 6)


def test_member_that_left_holds_the_log_of_its_time_and_no_more() -> None:
    plan = LedgerPlan(counts=(3, 1, 1), end_ms=3_500, changes=(Change(500, remove=("data-source-3",)),))
    simulation = LedgerSimulation(1, plan).run()
    nodes = {node.name: node for node in simulation.nodes.values()}
    left = nodes.pop("data-source-3")
    assert (left.head.epoch, left.log.final.is_terminal) == (0, True)
    assert left.engine is not None
    assert left.engine.own is None
    assert all(node.head.epoch == 1 and node.head.height > left.head.height for node in nodes.values())


class CutOff(LedgerSimulation):
    """One member hears nothing for a while, from when it has begun the first new epoch."""

    def run(self) -> LedgerSimulation:
        self.at(1_000, self._cut_off)
        return super().run()

    def _cut_off(self) -> None:
        member = next(node for node in self.nodes.values() if node.name == "data-source-4")
        if member.engine is None or member.committee.epoch == 0:
            self.at(1, self._cut_off)
            return
        self.side = {member.own: 1}
        self.at(1_500, self.side.clear)


def test_member_cut_off_when_an_epoch_begins_catches_up_though_its_views_are_lower_than_before() -> None:
    """Views count anew: the last one of the epoch before says nothing about how far the log has come in this."""
    plan = LedgerPlan(
        counts=(4, 1, 1),
        heal_ms=8_000,
        end_ms=7_500,
        changes=(Change(4_000, rotate=("operator-1",)),),
    )
    simulation = CutOff(1, plan).run()
    terminal = next(header for header in reversed(simulation.history) if header.header.epoch == 0).header
    heights = {node.name: node.head.height for node in simulation.nodes.values()}
    assert terminal.view > max(node.head.view for node in simulation.nodes.values()), "the new epoch has as many views"
    assert heights["data-source-4"] > terminal.height + 5
    assert max(heights.values()) - heights["data-source-4"] <= 1
