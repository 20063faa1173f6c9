"""The keys of an epoch to come are made over a bad network; who cheats is named, and without the rules would not be."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from simulation.ceremonies import LastDealers, Seat
from simulation.ledger_outcomes import ledger_outcome
from simulation.ledgers import LedgerSimulation
from simulation.outcomes import outcomes, seeds_of_slow_runs
from simulation.plan import Change, LedgerPlan

from consensus import bls
from consensus import key_generation as dkg
from consensus.certificate import certificate_message
from consensus.identifiers import Digest, Role, View
from consensus.membership import BLS_THRESHOLD, Membership, check_membership
from consensus.participant import MemberSecrets
from consensus.rejection import Rejected

HONEST = LedgerPlan(
    counts=(4, 1, 1),
    scheme=BLS_THRESHOLD,
    over_network=True,
    event_every_ms=400,
    loss=0.15,
    duplication=0.1,
    crash=0.002,
    partition_every_ms=400,
    heal_ms=2_500,
    end_ms=7_000,
    changes=(Change(300, add=(("late", "operator"),)),),
)
HELPER, LAST = "data-source-3", "data-source-4"


def plan_with(**cheats: Any) -> LedgerPlan:
    return dataclasses.replace(HONEST, **cheats)


def test_members_make_the_next_epochs_keys_over_a_bad_network_and_begin_it() -> None:
    for run in outcomes(HONEST, seeds_of_slow_runs(2), ledger_outcome):
        assert (run.epoch, run.behind, len(run.heights)) == (1, 0, 7), f"seed {run.seed}"


@pytest.mark.parametrize(
    ("cheats", "culprit"),
    [({"last_dealers": (HELPER, LAST)}, LAST), ({"bad_dealers": ("data-source-2",)}, "data-source-2")],
    ids=["last dealer", "bad value"],
)
def test_dealer_that_cheats_is_named_and_the_epoch_begins_without_it(cheats: dict[str, Any], culprit: str) -> None:
    simulation = LedgerSimulation(1, plan_with(**cheats)).run()
    assert [named for _, named in simulation.named] == [culprit]
    assert simulation.epoch == 1
    assert culprit not in {member.name for member in simulation.committee_of(1).members}


class Ended(Exception):
    """The ceremony is over."""

    def __init__(self, outcome: Membership | dkg.BadDealing) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


class OneCeremony(LedgerSimulation):
    """A run up to the first ceremony's end."""

    def _settle_members(self, membership: Membership, after: dict[str, MemberSecrets]) -> None:
        raise Ended(membership)

    def _begin_anew(self, epoch: int, change: Change, seat: Seat, refusal: Rejected) -> None:
        assert isinstance(refusal, dkg.BadDealing)
        raise Ended(refusal)


def held(plan: LedgerPlan) -> Membership | dkg.BadDealing:
    """What a plan's first ceremony ends in."""
    with pytest.raises(Ended) as ended:
        OneCeremony(1, plan).run()
    return ended.value.outcome


def _feldman_reveal(ceremony: dkg.Ceremony, commitment: dkg.Commitment, reveal: dkg.Reveal) -> None:
    """Plain Feldman: neither what was committed to nor knowledge of the constant term is asked for."""
    for point in reveal.coefficients:
        bls.check_public_key(point)


def test_without_commitments_and_proofs_two_of_four_own_the_key_that_takes_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every honest check passes: values fit, all confirm, the membership is sound. One then signs for the role."""
    monkeypatch.setattr(dkg, "_check_reveal", _feldman_reveal)
    membership = held(plan_with(last_dealers=(HELPER, LAST)))
    assert isinstance(membership, Membership)
    simulation = OneCeremony(1, HONEST)
    check_membership(membership, BLS_THRESHOLD, simulation.genesis_file.nonce)
    group = next(group for group in membership.groups if group.role == Role.DATA_SOURCE)
    assert (group.threshold, len(group.share_keys)) == (3, 4)
    assert group.group_key == bls.public_key(LastDealers.WANTED)
    message = certificate_message(simulation.genesis_file.chain_id, 1, View(1), Digest(bytes(32)))
    bls.verify(group.group_key, message, bls.sign(LastDealers.WANTED, message))


@pytest.mark.parametrize(
    "rule",
    ["it revealed something else", "it does not prove knowledge"],
    ids=["commitment", "proof of knowledge"],
)
def test_either_rule_alone_stops_the_last_dealer(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """With one of the two taken out the other one names it."""
    real: Callable[[dkg.Ceremony, dkg.Commitment, dkg.Reveal], None] = dkg._check_reveal

    def without_commitment(ceremony: dkg.Ceremony, commitment: dkg.Commitment, reveal: dkg.Reveal) -> None:
        real(ceremony, dkg.Commitment(ceremony.id, reveal.dealer, reveal.digest), reveal)

    if rule == "it does not prove knowledge":
        monkeypatch.setattr(dkg, "_check_reveal", without_commitment)
    refusal = held(plan_with(last_dealers=(HELPER, LAST)))
    assert isinstance(refusal, dkg.BadDealing)
    assert refusal.dealer == 4
    assert f"that is {LAST}: " in refusal.detail
    assert rule in refusal.detail


def _any_share(
    ceremony: dkg.Ceremony, recipient: int, dealer: int, reveal: dkg.Reveal, share: dkg.DealtShare
) -> bls.Secret:
    """Whatever was dealt, on the polynomial or off it."""
    return bls.Secret.from_bytes(share.value)


def test_without_the_check_on_shares_the_victim_is_blamed_for_a_useless_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dkg, "check_dealt_share", _any_share)
    refusal = held(plan_with(bad_dealers=("data-source-2",)))
    assert isinstance(refusal, dkg.BadDealing)
    assert "no proof of possession" in refusal.detail
    assert refusal.dealer == 1, "the honest first member, not the second that dealt to it"
