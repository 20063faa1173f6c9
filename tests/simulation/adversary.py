"""All traitors of a simulated run as one adversary that hears everything at once; and members that send garbage."""

from collections import deque
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from consensus.certificate import Certificate
from consensus.effect import Message
from consensus.identifiers import ZERO_DIGEST, Digest, MemberId, View
from consensus.vote import Notarization, Nullification, Proposal, Stalled, Vote, VoteKind

if TYPE_CHECKING:
    from simulation.simulator import Simulation

M = TypeVar("M", Vote, Proposal, Certificate)

LONGEST_PAUSE_MS = 100
"""Between two acts."""
REMEMBERED = 64
"""Overheard messages that garbage is made of."""
FAR_VIEWS = 1 << 40


class Adversary:
    """All traitors at once. Hears everything at once; acts at random, in a mood of its own."""

    def __init__(self, simulation: "Simulation") -> None:
        self.simulation = simulation
        self.votes: dict[tuple[VoteKind, int, int, bytes], dict[bytes, Vote]] = {}
        self.committee = simulation.committee
        """The members of the epoch it acts in now."""
        self.view = 1
        self.proposed: dict[tuple[int, int], int] = {}
        chance = simulation.random
        self.moves = [self.notarize] * chance.randint(1, 3) + [self.certify] * chance.randint(1, 3)
        self.moves += [self.nullify] * chance.randint(0, 2) + [self.finalize] * chance.randint(0, 2)
        self.moves_at_once = chance.randint(1, 4)

    def hear(self, message: Message) -> None:
        if isinstance(message, Vote):
            key = (message.kind, message.epoch, message.view, message.block)
            self.votes.setdefault(key, {})[message.voter] = message

    def act(self) -> None:
        simulation = self.simulation
        chance = simulation.random
        engines = [node.engine for node in simulation.nodes.values() if node.engine is not None]
        if engines:
            engine = chance.choice(engines)
            self.view, self.committee = engine.view, engine.committee
            self.propose()
            for _ in range(self.moves_at_once):
                chance.choice(self.moves)()
        simulation.at(chance.randint(1, LONGEST_PAUSE_MS), self.act)

    def propose(self) -> None:
        """Up to two proposals on likely and unlikely parents, each to some."""
        leader, place = self.committee.leader(View(self.view)).id, (self.committee.epoch, self.view)
        if leader not in self.simulation.traitors or self.proposed.get(place, 0) >= 2:
            return
        self.proposed[place] = self.proposed.get(place, 0) + 1
        self.tell([self.proposal(leader)])

    def proposal(self, leader: MemberId) -> Proposal:
        """One that says of itself whether it is invalid or pushed."""
        simulation = self.simulation
        parents = [header for header in simulation.headers.values() if header.view < self.view]
        parents.sort(key=lambda header: header.view)
        parent = simulation.random.choice(parents[-3:])
        proposal = simulation.build(leader, View(self.view), parent)
        if simulation.random.random() < 0.2:
            simulation.invalid.add(proposal.digest)
        if simulation.plan.pushed and simulation.random.random() < simulation.plan.pushed:
            simulation.pushed.add(proposal.digest)
        return proposal

    def _some_block(self) -> tuple[View, Digest] | None:
        simulation = self.simulation
        recent = [
            (View(header.view), digest)
            for digest, header in simulation.headers.items()
            if header.view >= max(1, self.view - 2) and header.epoch == self.committee.epoch
        ]
        return simulation.random.choice(recent) if recent else None

    def _cast(self, kind: VoteKind, view: View, block: Digest) -> list[Vote]:
        votes = []
        epoch = self.committee.epoch
        cryptography = self.simulation.cryptography_of(epoch)
        for traitor in sorted(self.simulation.traitors & {voter.id for voter in self.committee.voters}):
            vote = cryptography.vote(traitor, kind, view, block)
            self.votes.setdefault((kind, epoch, view, block), {})[traitor] = vote
            votes.append(vote)
        return votes

    def notarize(self) -> None:
        if (found := self._some_block()) is not None:
            self.tell(self._cast(VoteKind.NOTARIZE, *found))

    def finalize(self) -> None:
        if (found := self._some_block()) is not None:
            self.tell(self._cast(VoteKind.FINALIZE, *found))

    def nullify(self) -> None:
        view = View(max(1, self.view - self.simulation.random.randrange(3)))
        self.tell(self._cast(VoteKind.NULLIFY, view, ZERO_DIGEST))

    def certify(self) -> None:
        """A certificate out of the traitors' votes and overheard ones."""
        simulation = self.simulation
        possible = [
            key
            for key, votes in self.votes.items()
            if key[1] == self.committee.epoch
            and key[2] >= self.view - 2
            and self.committee.has_quorum(MemberId(one) for one in votes)
        ]
        if not possible:
            return
        key = simulation.random.choice(possible)
        kind, _, view, block = key
        found = self.votes[key]
        votes = tuple(found[voter] for voter in sorted(found))
        if kind == VoteKind.NOTARIZE:
            self.tell([Notarization(view=view, block=block, votes=votes)])
        elif kind == VoteKind.NULLIFY:
            self.tell([Nullification(view=view, votes=votes)])

    def tell(self, messages: list[Proposal] | list[Vote] | list[Notarization] | list[Nullification]) -> None:
        simulation = self.simulation
        sender = min(simulation.traitors)
        some = [to for to in simulation.nodes if simulation.random.random() < 0.7]
        for to in some:
            for message in messages:
                simulation.send(sender, to, message)


class GarbageSender:
    """One member that sends nothing but what no honest one would: overheard messages spoiled, of another epoch or
    chain, with too few votes; and votes under its own good signature for ledger blocks and views that there are not."""

    def __init__(self, simulation: "Simulation", own: MemberId) -> None:
        self.simulation = simulation
        self.own = own
        self.heard: deque[Message] = deque(maxlen=REMEMBERED)

    def hear(self, message: Message) -> None:
        self.heard.append(message)

    def act(self) -> None:
        chance = self.simulation.random
        for _ in range(chance.randint(1, 6)):
            message = self._nonsense() if chance.random() < 0.4 or not self.heard else self._spoiled()
            for to in self.simulation.nodes:
                if chance.random() < 0.5:
                    self.simulation.send(self.own, to, message)
        self.simulation.at(chance.randint(1, LONGEST_PAUSE_MS), self.act)

    def _spoiled(self) -> Message:
        chance = self.simulation.random
        message = chance.choice(list(self.heard))
        match message:
            case Notarization() | Nullification() if chance.random() < 0.5:
                return replace(message, votes=message.votes[:1])
            case Notarization() | Nullification():
                return replace(message, votes=tuple(_unsigned(vote) for vote in message.votes))
            case Vote() | Stalled() if chance.random() < 0.3:
                return replace(message, epoch=message.epoch + 1)
            case Vote() | Stalled() if chance.random() < 0.3:
                return replace(message, chain_id=ZERO_DIGEST)
            case Vote() | Proposal() | Certificate():
                return _unsigned(message)
        return message

    def _nonsense(self) -> Vote:
        """A vote that its signature is good for."""
        chance = self.simulation.random
        views = [node.engine.view for node in self.simulation.nodes.values() if node.engine is not None] or [1]
        view = View(max(1, chance.choice((0, max(views) + chance.randint(-3, 3), max(views) + FAR_VIEWS))))
        kind = chance.choice(list(VoteKind))
        block = ZERO_DIGEST if kind == VoteKind.NULLIFY else Digest(chance.randbytes(32))
        return self.simulation.cryptography.vote(self.own, kind, view, block)


def _unsigned(message: M) -> M:
    return replace(message, signature=bytes(len(message.signature)))
