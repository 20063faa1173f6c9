"""An epoch that may have ordinary children forks, with no traitor at all, in runs that the real one survives.

And members that do not ask what epoch a vote is of are stopped by who replays those of ended ones.
"""

from collections.abc import Iterable, Sequence

import pytest
from simulation.failures import Fork, Halted
from simulation.host import Node
from simulation.ledger_host import LedgerNode
from simulation.ledgers import LedgerSimulation
from simulation.plan import Change, LedgerPlan

from consensus import transition, vote
from consensus.block import Header
from consensus.certificate import Certificate
from consensus.codec import encode
from consensus.effect import Message
from consensus.engine import Engine
from consensus.epochs import EpochLink
from consensus.identifiers import MemberId
from consensus.membership_change import MembershipChange
from consensus.rejection import Rejected
from consensus.state import EPOCH_HEAD_KEY
from consensus.transition import LedgerState
from consensus.vote import Vote
from node import proposals
from node.epoch_end import Certified
from node.ledger import Finalized, Ledger, _block_write

PLAN = LedgerPlan(
    counts=(3, 1, 1),
    thresholds=(2, 1, 1),
    event_every_ms=60,
    loss=0.35,
    heal_ms=6_000,
    end_ms=6_000,
    changes=tuple(Change(300 + 300 * number, rotate=("operator-1",)) for number in range(8)),
)
"""Members change often, and nobody is a traitor."""

SEARCHED_SEEDS = range(125, 150)
"""The earlier ones survive."""


class EndsWhereCertified(Ledger):
    """Lets the epoch end at whatever ledger block brought the news: the terminal one, or a child of it with events."""

    def commit(
        self, headers: Sequence[Header], certificate: Certificate, votes: Iterable[Vote]
    ) -> tuple[Finalized, ...]:
        written, appended, final, link = [], [], self.final, None
        for header in headers:
            if header.height <= final.header.height or header.epoch < self.committee.epoch:
                continue
            built = self.overlays.get(header.digest)
            if built is None:  # it followed one of the other history
                break
            last = header is headers[-1]
            if last and built.state.ends_epoch:
                link = self._link(headers, certificate)
            kept = Certified((), certificate).encode() if last else None
            written.append(_block_write(final, built, kept, (), link if last else None))
            appended.append(Finalized(header, built.events))
            final = built.state
        self.store.commit(written)
        if link is not None:
            self.epochs, self.links = self.epochs.follow([link]), (*self.links, link)
        self.final, self.certificate = final, certificate
        self.overlays = {
            digest: branch
            for digest, branch in self.overlays.items()
            if branch.state.header.height > final.header.height and branch.state.header.epoch == self.committee.epoch
        }
        return tuple(appended)

    def _link(self, headers: Sequence[Header], certificate: Certificate) -> EpochLink:
        events = [event for header in headers for event in self.overlays[header.digest].events]
        change = next(held for event in events if isinstance(held := event.governance, MembershipChange))
        last = self.overlays[headers[-1].digest].state
        return EpochLink(
            encode(change.membership), encode(last.header), encode(certificate), last.state.prove(EPOCH_HEAD_KEY)
        )


class MutantNode(LedgerNode):
    """Takes a child of a terminal ledger block for one like any other."""

    def new_engine(self) -> Engine:
        engine = super().new_engine()
        self.log.__class__ = EndsWhereCertified
        return engine

    def refuse(self, sender: MemberId, refusal: Rejected) -> None:
        """What others make of their epoch looks odd from another one."""


class MutantSimulation(LedgerSimulation):
    """Nobody minds the damage but the check for forks."""

    def distrusts(self, peer: MemberId, refusal: Rejected) -> None:
        """Nor this."""


def fork_seed() -> int | None:
    for seed in SEARCHED_SEEDS:
        try:
            MutantSimulation(seed, PLAN, host=MutantNode).run()
        except Fork:
            return seed
    return None


def test_epoch_change_with_ordinary_children_forks_without_any_traitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some begin the next epoch at the terminal ledger block, others at its child, and both go on."""
    with monkeypatch.context() as mutated:
        for module in (transition, proposals):
            mutated.setattr(module, "takes_events", lambda parent, committee: True)
        mutated.setattr(LedgerState, "is_terminal", property(lambda state: state.ends_epoch))
        seed = fork_seed()
    assert seed is not None, f"ordinary children survived {len(SEARCHED_SEEDS)} seeds"
    assert LedgerSimulation(seed, PLAN).run().epoch > 0


REPLAYED = LedgerPlan(
    counts=(4, 1, 1), replayers=(1, 0, 0), end_ms=3_000, changes=(Change(500, rotate=("data-source-1",)),)
)


class AnyEpochNode(LedgerNode):
    """Hands its engine messages of whatever epoch, if they are signed."""

    def deliver(self, message: Message, sender: MemberId) -> None:
        if not self.ended:
            Node.deliver(self, message, sender)


def test_votes_replayed_from_an_ended_epoch_halt_members_that_ask_for_no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as mutated:
        mutated.setattr(vote, "_check_place", lambda chain_id, epoch, committee: None)
        with pytest.raises(Halted):
            LedgerSimulation(1, REPLAYED, host=AnyEpochNode).run()
    assert LedgerSimulation(1, REPLAYED).run().epoch == 1
