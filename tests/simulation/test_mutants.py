"""Engines with one safety rule taken out must fork under the same simulation that the real engine survives.

Each mutant breaks one rule of ``engine`` (the ones marked ◆); what merely halts on seeing the damage is
taken out with it, so that the rule alone is on trial. The seeds were found by search; the real engine is run
on the same ones.
"""

from collections.abc import Iterable

import pytest
from simulation.failures import DoubleVote, Fork, Halted
from simulation.plan import Plan, turned
from simulation.simulator import Simulation

from consensus.effect import Message
from consensus.engine import Engine
from consensus.identifiers import VOTING_ROLES, MemberId, Role, View
from consensus.membership import Committee
from consensus.vote import Notarization, Proposal, Vote

ONE_HONEST = Plan(counts=(1, 1, 1), traitors=(1, 1, 0), end_ms=20_000)
"""Two whole roles are traitors; the operator alone is honest."""

ONE_HONEST_CRASHING = Plan(counts=(1, 1, 1), traitors=(1, 1, 0), crash=0.01, heal_ms=20_000, end_ms=20_000)

ALL_UNLUCKY = Plan(counts=(1, 1, 1), unlucky=(1, 1, 1), idle=True, crash=0.01, heal_ms=8_000, end_ms=8_000)
"""Often all that was voted last is final, forgotten by the journal, and lost."""

CRASHING = Plan(counts=(2, 1, 1), crash=0.005, heal_ms=6_000, end_ms=6_000)

TRAITOR_IN_EVERY_ROLE = Plan(counts=(4, 4, 4), traitors=(1, 1, 1), loss=0.1, heal_ms=8_000, end_ms=8_000)


class NullifyAndFinalize(Engine):
    """Votes to nullify and to finalize the same view."""

    def _may_nullify(self, state):
        return self.own is not None and not state.nullified

    def _may_finalize(self, state):
        return self.own is not None and state.finalized is None

    def _set_finalized(self, header, certificate):
        state = self._rounds.get(View(header.view))
        if state is not None:
            state.nullification = None
        super()._set_finalized(header, certificate)


class NoGapCheck(Engine):
    """Follows a proposal whatever was notarized since its parent."""

    def _gap_nullified(self, parent_view, view):
        return True


class NaiveAboutNotarizations(Engine):
    """Believes the newest notarization of a view and does not know its own votes: halts at nothing."""

    def _adopt_notarization(self, notarization: Notarization) -> None:
        state = self._round(View(notarization.view))
        if state.notarization is not None and state.notarization.block != notarization.block:
            state.notarization = notarization
            self._unsettled.add(View(notarization.view))
        super()._adopt_notarization(notarization)

    def _decided_to_cast(self, state, vote: Vote) -> bool:
        return True

    def wants(self, message: Message) -> bool:
        return True


class DoubleNotarize(NaiveAboutNotarizations):
    """Notarizes every proposal of the leader."""

    def _may_notarize(self, state):
        return (
            self.own is not None
            and not state.nullified
            and (state.proposal is None or state.notarized != state.proposal.digest)
        )

    def _on_proposal(self, proposal: Proposal) -> None:
        super()._on_proposal(proposal)
        for state in self._rounds.values():
            if state.proposal is not None and self.branches.get(proposal.digest) is not None:
                header = self.branches.get(proposal.digest).header
                if header.view == self.view:
                    self._round(self.view).proposal = proposal


class NoJournal(NaiveAboutNotarizations):
    """Comes back from a crash without its votes."""

    def restore(self, votes: Iterable[Vote], proposals: Iterable[Proposal], first_view: View) -> None:
        super().restore((), (), first_view)


class VotesWhatItForgot(NaiveAboutNotarizations):
    """Takes what a compacted journal does not say for what was never voted."""

    def restore(self, votes: Iterable[Vote], proposals: Iterable[Proposal], first_view: View) -> None:
        super().restore(votes, proposals, View(0))


MUTANTS = [
    (NullifyAndFinalize, ONE_HONEST),
    (NoGapCheck, ONE_HONEST),
    (DoubleNotarize, ONE_HONEST),
    (NoJournal, ONE_HONEST_CRASHING),
    (NullifyAndFinalize, TRAITOR_IN_EVERY_ROLE),
    (NoGapCheck, TRAITOR_IN_EVERY_ROLE),
]

SEARCHED_SEEDS = 150


def fork_seed(mutant: type[Engine], plan: Plan, seeds: Iterable[int] = range(SEARCHED_SEEDS)) -> int | None:
    """The first seed under which the mutant's history forks."""
    for seed in seeds:
        try:
            Simulation(seed, plan, mutant, judge_votes=False).run()
        except Fork:
            return seed
    return None


def run_all_seeds(plan: Plan, mutant: type[Engine]) -> None:
    for seed in range(SEARCHED_SEEDS):
        Simulation(seed, plan, mutant).run()


@pytest.mark.parametrize(("mutant", "plan"), MUTANTS)
def test_engine_without_one_rule_forks_where_the_real_one_does_not(mutant: type[Engine], plan: Plan) -> None:
    seed = fork_seed(mutant, plan)
    assert seed is not None, f"{mutant.__name__} survived {SEARCHED_SEEDS} seeds"
    Simulation(seed, plan).run()


@pytest.mark.parametrize(
    ("mutant", "plan"),
    [(NullifyAndFinalize, ONE_HONEST), (DoubleNotarize, ONE_HONEST), (VotesWhatItForgot, ALL_UNLUCKY)],
)
def test_broken_voting_rule_is_seen_on_the_vote_itself(mutant: type[Engine], plan: Plan) -> None:
    with pytest.raises(DoubleVote) as seen:
        run_all_seeds(plan, mutant)
    seed = int(str(seen.value).split(":")[0].removeprefix("seed "))
    Simulation(seed, plan).run()


@pytest.mark.parametrize("counted", VOTING_ROLES)
def test_quorum_of_one_role_forks_where_another_one_alone_is_honest(
    counted: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is enough where that role itself is the honest one: hence every plan is run with each as the honest one."""

    def of_one_role(self: Committee, identifiers: Iterable[MemberId]) -> bool:
        needed = {member.id for member in self.role_members(counted)}
        return len(needed & set(identifiers)) >= self.threshold(counted)

    with monkeypatch.context() as mutated:
        mutated.setattr(Committee, "has_quorum", of_one_role)
        for honest in VOTING_ROLES:
            seed = fork_seed(Engine, turned(ONE_HONEST, honest), range(30))
            assert (seed is None) == (honest is counted), seed


def test_voter_with_a_lost_journal_is_stopped_by_its_own_old_votes() -> None:
    class ForgetfulButAttentive(Engine):
        def restore(self, votes: Iterable[Vote], proposals: Iterable[Proposal], first_view: View) -> None:
            super().restore((), (), first_view)

    with pytest.raises(Halted, match="our journal lacks"):
        run_all_seeds(CRASHING, ForgetfulButAttentive)
