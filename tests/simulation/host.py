"""A correct host: it carries out its engine's effects, and may die between any two; one kind forgets its votes then."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from simulation.cryptography import Cryptography
from simulation.failures import Fork, Halted
from simulation.plan import DELAY_MS

from consensus.block import Header
from consensus.branches import Verdict
from consensus.certificate import BadCertificateShares, Certificate
from consensus.effect import (
    Broadcast,
    CastVote,
    CombineFinalization,
    Effect,
    FetchBlock,
    Finalized,
    Halt,
    Message,
    NeedBlocks,
    PublishEvidence,
    RequestProposal,
    Send,
    SetTimer,
    VerifyBlock,
)
from consensus.engine import Engine
from consensus.identifiers import Digest, MemberId, View
from consensus.rejection import Rejected
from consensus.vote import Proposal, Vote, VoteKind

if TYPE_CHECKING:
    from simulation.simulator import Simulation


LOSES_LEDGER = 0.5
"""How often a crash takes an unlucky host's ledger."""


class Crash(Exception):
    """The simulated process dies here."""


class ForgetfulEngine(Engine):
    """Comes back without its votes, and votes again whatever it hears of them."""

    def restore(self, votes: Iterable[Vote], proposals: Iterable[Proposal], first_view: View) -> None:
        super().restore((), (), View(0))

    def _decided_to_cast(self, state: object, vote: Vote) -> bool:
        return True


class Journal:
    """Votes of one epoch and what they are for; it forgets as ``node.journal`` does."""

    def __init__(self) -> None:
        self.votes: list[Vote] = []
        self.held: list[tuple[int, Any]] = []
        """The view of each ledger block, and what the host keeps of it."""
        self.first_view = View(0)
        """How this host voted in earlier ones it may have forgotten."""

    def compact(self, final_view: int) -> None:
        """Forget what was voted in views up to ``final_view``."""
        kept = [vote for vote in self.votes if vote.view > final_view]
        if len(kept) < len(self.votes):
            highest_view = max(vote.view for vote in self.votes)
            self.first_view = View(min((vote.view for vote in kept), default=highest_view + 1))
            self.votes = kept
            self.held = [(view, held) for view, held in self.held if view > final_view]


class Node:
    """A correct host: durable journal, ledger and ledger block store; an engine that dies with the process."""

    def __init__(self, simulation: "Simulation", own: MemberId) -> None:
        self.simulation = simulation
        self.own = own
        self.journal = Journal()
        self.store: dict[Digest, Proposal] = {}
        self.head = simulation.genesis
        self.ledger: list[Header] = [simulation.genesis]
        self.certificate: Certificate | None = None
        self.finalized_at: list[int] = []
        self.height_at_heal = 0
        self.incarnation = 0
        self.engine: Engine | None = None
        self.deadline_ms: int | None = None

    # Life and death

    @property
    def voter(self) -> MemberId:
        """Whom it votes as now."""
        return self.own

    @property
    def cryptography(self) -> Cryptography:
        """What it signs and checks with now."""
        return self.simulation.cryptography

    @property
    def engine_class(self) -> type[Engine]:
        """What it runs."""
        simulation = self.simulation
        return ForgetfulEngine if self.own in simulation.forgetful else simulation.engine_class

    def boot(self) -> None:
        simulation = self.simulation
        self.engine = self.new_engine()
        self.step("boot", lambda engine: engine.start(simulation.now_ms))
        if not simulation.plan.idle:
            self.work()

    def new_engine(self) -> Engine:
        """An engine that knows what is durable."""
        simulation = self.simulation
        engine = self.engine_class(simulation.committee, self.own, simulation.plan.timing, self.head, self.certificate)
        engine.restore(self.journal.votes, [proposal for _, proposal in self.journal.held], self.journal.first_view)
        return engine

    def die(self) -> None:
        self.simulation.note("crash", self.own)
        self.incarnation += 1
        self.engine = None
        if self.incarnation % 2 == 0:
            self.compact_journal()
        if self.own in self.simulation.unlucky and self.simulation.random.random() < LOSES_LEDGER:
            self.lose_ledger()
        self.simulation.at(self.simulation.random.randint(10, 1_500), self.boot)

    def compact_journal(self) -> None:
        """Behind what is final and durable; no vote that was asked for earlier is on its way any more."""
        self.journal.compact(self.head.view)

    def lose_ledger(self) -> None:
        """Whoever ran it begins anew beside the journal."""
        self.store = {proposal.digest: proposal for _, proposal in self.journal.held}
        self.head, self.ledger, self.certificate = self.simulation.genesis, [self.simulation.genesis], None

    def hazard(self) -> None:
        """The process may die here."""
        simulation = self.simulation
        if simulation.plan.crash and not simulation.healed and simulation.random.random() < simulation.plan.crash:
            raise Crash

    def later(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Unless the process dies meanwhile."""
        incarnation = self.incarnation

        def guarded() -> None:
            if self.incarnation == incarnation and self.engine is not None:
                try:
                    action()
                except Crash:
                    self.die()

        self.simulation.at(delay_ms, guarded)

    # Inputs

    def step(self, name: str, call: Callable[[Engine], list[Effect]]) -> None:
        if self.engine is None:
            return
        try:
            effects = call(self.engine)
            self.simulation.note(name, self.own, [type(effect).__name__ for effect in effects])
            for effect in effects:
                self.hazard()
                self.carry_out(effect)
                self.hazard()
        except Crash:
            self.die()

    def work(self) -> None:
        self.step("work", lambda engine: engine.work_available(self.simulation.now_ms))

    def deliver(self, message: Message, sender: MemberId) -> None:
        if self.engine is None or not self.engine.wants(message):
            return
        try:
            self.cryptography.check(message)
        except Rejected as refusal:
            self.refuse(sender, refusal)
            return
        self.receive(message, sender)

    def refuse(self, sender: MemberId, refusal: Rejected) -> None:
        """Nothing that a correct member sends is refused."""
        if sender not in self.simulation.garbage:
            raise refusal
        self.simulation.refused[refusal.reason.value] += 1

    def receive(self, message: Message, sender: MemberId) -> None:
        if isinstance(message, Proposal):
            self.store[message.digest] = message
        self.step("receive", lambda engine: engine.receive(message, sender, self.simulation.now_ms))

    # Effects

    def carry_out(self, effect: Effect) -> None:
        simulation, pause = self.simulation, self.simulation.random.randint(1, 5)
        match effect:
            case CastVote():
                self.later(pause, lambda: self.cast(effect))
            case RequestProposal():
                self.later(pause, lambda: self.propose(effect))
            case VerifyBlock(proposal):
                self.later(pause, lambda: self.verify(proposal, simulation.random.random() < 0.05))
            case FetchBlock(block, sources):
                self.later(pause + simulation.random.randint(2, DELAY_MS), lambda: self.fetch(block, sources))
            case NeedBlocks(_, certificate):
                self.later(pause + simulation.random.randint(2, DELAY_MS), lambda: self.catch_up(certificate))
            case Broadcast(message):
                simulation.broadcast(self.own, message)
            case Send(to, message):
                simulation.send(self.own, to, message)
            case SetTimer(deadline_ms):
                self.deadline_ms = deadline_ms
                if deadline_ms is not None:
                    self.later(deadline_ms - simulation.now_ms, self.tick)
            case CombineFinalization():
                self.later(pause, lambda: self.combine(effect))
            case Finalized():
                self.finalize(effect)
            case PublishEvidence():
                simulation.evidence.append(effect)
            case Halt(reason):
                self.engine = None
                if simulation.judge_votes and self.own not in simulation.forgetful:
                    raise Halted(f"seed {simulation.seed}: {reason}")

    def tick(self) -> None:
        if self.deadline_ms is not None and self.simulation.now_ms >= self.deadline_ms:
            self.step("tick", lambda engine: engine.tick(self.simulation.now_ms))

    def cast(self, asked: CastVote) -> None:
        """Sign, journal, send, tell the engine; the process may die between any two."""
        vote = self.cryptography.vote(self.voter, asked.kind, asked.view, asked.block)
        if self.own in self.simulation.forgers and asked.kind == VoteKind.FINALIZE:
            vote = self.cryptography.forged_vote(self.voter, asked.view, asked.block)
        self.hazard()
        self.write_journal(vote, asked.proposal)
        self.simulation.judge(vote)
        self.hazard()
        if asked.proposal is not None:
            self.simulation.broadcast(self.own, asked.proposal)
        self.simulation.broadcast(self.own, vote)
        self.hazard()
        self.step("own vote", lambda engine: engine.own_vote(vote, self.simulation.now_ms))

    def write_journal(self, vote: Vote, proposal: Proposal | None) -> None:
        """Durable before anything leaves."""
        if proposal is not None:
            self.journal.held.append((vote.view, proposal))
            self.store[proposal.digest] = proposal
        self.journal.votes.append(vote)

    def propose(self, asked: RequestProposal) -> None:
        """Where nothing need be proposed, now and then nothing is: more to append comes a little later."""
        if self.simulation.plan.idle and not asked.may_be_empty and self.simulation.random.random() < 0.3:
            self.step("nothing", lambda engine: engine.nothing_to_propose(asked, self.simulation.now_ms))
            self.later(self.simulation.random.randint(1, DELAY_MS), self.work)
            return
        proposal = self.simulation.build(self.own, asked.view, asked.parent)
        self.step("propose", lambda engine: engine.own_proposal(proposal, self.simulation.now_ms))

    def verify(self, proposal: Proposal, missing: bool) -> None:
        """Some of its events are ``missing`` the first time, as they may be."""
        digest = proposal.digest
        verdict = Verdict.MISSING if missing else self.simulation.verdict(digest, self.own)
        self.step("verified", lambda engine: engine.block_verified(digest, verdict, self.simulation.now_ms))

    def fetch(self, block: Digest, sources: tuple[MemberId, ...]) -> None:
        if block in self.store and self.simulation.random.random() < 0.5:
            self.verify(self.store[block], False)
        for source in sources:
            holder = self.simulation.nodes.get(source)
            if holder is not None and holder.engine is not None and block in holder.store:
                self.simulation.send(source, self.own, holder.store[block])
                if block in self.store:
                    self.verify(self.store[block], False)

    def catch_up(self, wanted: Certificate) -> None:
        """From any reachable correct member; the engine asks again on standstill."""
        simulation = self.simulation
        others = [
            node
            for node in simulation.nodes.values()
            if node.engine is not None
            and simulation.side.get(node.own, 0) == simulation.side.get(self.own, 0)
            and node.head.height > self.head.height
        ]
        if others:
            other = simulation.random.choice(others)
            headers, certificate = tuple(other.ledger[self.head.height + 1 :]), other.certificate
            assert certificate is not None
            self.append(headers, certificate)
            self.step("caught up", lambda engine: engine.caught_up(headers[-1], certificate, simulation.now_ms))

    def combine(self, asked: CombineFinalization) -> None:
        simulation = self.simulation
        try:
            certificate = self.cryptography.combine(asked.view, asked.block, asked.votes)
        except BadCertificateShares as bad:
            culprits = bad.culprits
            assert set(culprits) <= simulation.traitors | simulation.forgers
            self.step("bad shares", lambda engine: engine.combine_failed(asked.view, culprits, simulation.now_ms))
        else:
            self.step("combined", lambda engine: engine.receive(certificate, self.own, simulation.now_ms))

    def finalize(self, effect: Finalized) -> None:
        self.append(effect.headers, effect.certificate)

    def append(self, headers: tuple[Header, ...], certificate: Certificate) -> None:
        """One atomic write."""
        simulation = self.simulation
        for header in headers:
            if header.height <= self.head.height:
                continue
            digest = header.digest
            if header.parent != self.head.digest or simulation.final.get(header.height, digest) != digest:
                raise Fork(f"seed {simulation.seed}: a ledger forks at height {header.height}")
            simulation.check_wanted(header)
            self.head = header
            self.ledger.append(header)
        if headers[-1] == self.head:
            self.certificate = certificate
        self.finalized_at.append(simulation.now_ms)
        if simulation.plan.idle:
            self.later(0, lambda: self.step("idle", lambda engine: engine.work_exhausted(simulation.now_ms)))
