"""Deterministic simulation of N engines: one seeded heap of (time, sequence, action), a virtual clock.

Network: random delay (hence reordering), loss, duplication and partitions until ``heal_ms``; from then on
every message arrives within ``DELAY_MS``. Hosts crash at every step they take for an effect, also between
signing, journalling and sending, and come back from their journal and ledger. The traitors are one
adversary that hears everything at once, signs anything with their names, and sends to whom and when it likes.

Checked after every step that could break it:

- ``Fork``: two ledger blocks that could both be certified with the traitors' help are on one branch, and
  every ledger is a prefix of that branch. (Stronger than looking at what honest nodes saw.)
- ``DoubleVote``: no correct voter notarizes or finalizes twice in a view, or nullifies and finalizes it.
- ``Halted``: no correct engine halts.
- ``Unwanted``: no ledger block that too many correct voters refuse (a timestamp pushed ahead, an urgent event left out
  for too long) is final.

Identity signatures are checked outside engines; the fast cryptography of ``Names`` leaves them out, ``Keys``
is the real one.
"""

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from simulation.adversary import Adversary, GarbageSender
from simulation.cryptography import Cryptography, Names

from consensus.block import Body, Header, genesis_header
from consensus.branches import Verdict
from consensus.certificate import (
    BadCertificateShares,
    Certificate,
)
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
from consensus.engine import Engine, Timing
from consensus.identifiers import VOTING_ROLES, ZERO_DIGEST, ChainId, Digest, MemberId, View
from consensus.membership import (
    Committee,
    Genesis,
    Member,
    Parameters,
    RoleThreshold,
    committee,
    default_threshold,
)
from consensus.rejection import Rejected
from consensus.vote import (
    Proposal,
    Vote,
    VoteKind,
)

DELAY_MS = 100
"""The longest a message takes once the network has healed: Δ."""


TIMING = Timing(timeout_ms=4 * DELAY_MS, max_timeout_ms=32 * DELAY_MS, heartbeat_ms=30 * DELAY_MS)


class Fork(AssertionError):
    """Two histories."""


class DoubleVote(AssertionError):
    """A correct voter broke a voting rule."""


class Halted(AssertionError):
    """A correct engine halted."""


class Unwanted(AssertionError):
    """A ledger block is final that a vote-time rule keeps from a quorum."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of. Counts follow the voting roles; traitors and silent ones come last in each."""

    counts: tuple[int, int, int] = (4, 4, 4)
    thresholds: tuple[int, int, int] | None = None
    traitors: tuple[int, int, int] = (0, 0, 0)
    silent: tuple[int, int, int] = (0, 0, 0)
    selective: tuple[int, int, int] = (0, 0, 0)
    """Correct but heard only by every second member."""
    slow: tuple[int, int, int] = (0, 0, 0)
    """Correct, with every message ten times as long on its way."""
    forgers: tuple[int, int, int] = (0, 0, 0)
    """Correct but for the certificate shares on their finalize votes, which are not theirs (real cryptography only)."""
    garbage: tuple[int, int, int] = (0, 0, 0)
    """Send spoiled messages, those of other epochs and chains, and signed votes for what there is not."""
    censors: tuple[int, int, int] = (0, 0, 0)
    """Leave an urgent event out of their ledger blocks and vote for none that holds it."""
    urgent_ms: int = 0
    """When an urgent event reaches everybody; 0 for none."""
    censorship_ms: int = 0
    """How long a branch may leave it out before correct voters refuse their vote; 0 for ever."""
    pushed: float = 0.0
    """Chance that a traitor's proposal bears a timestamp too far ahead for every correct voter."""
    loss: float = 0.0
    duplication: float = 0.0
    crash: float = 0.0
    """Chance of a crash at each step of a host before healing."""
    partition_every_ms: int = 0
    heal_ms: int = 0
    end_ms: int = 6_000
    idle: bool = False
    """Work comes once a second instead of always."""
    timing: Timing = TIMING


def named_committee(plan: Plan) -> Committee:
    """Voters with unusable keys: enough where signatures are names."""
    thresholds = plan.thresholds or tuple(default_threshold(count) for count in plan.counts)
    members = tuple(
        Member(
            name=f"{role.value}-{number}",
            role=role,
            scheme=1,
            identity_key=hashlib.sha256(f"{role.value}-{number}".encode()).digest(),
            transport_key=bytes(32),
            log_key=b"",
            bls_key=b"",
            bls_possession=b"",
        )
        for role, count in zip(VOTING_ROLES, plan.counts, strict=True)
        for number in range(1, count + 1)
    )
    return committee(
        Genesis(
            version=1,
            name="simulation.example/log",
            nonce=bytes(32),
            created_ms=0,
            certificate_scheme="ed25519",
            members=members,
            thresholds=tuple(
                RoleThreshold(role=role, threshold=t) for role, t in zip(VOTING_ROLES, thresholds, strict=True)
            ),
            groups=(),
            parameters=Parameters(),
        )
    )


class Crash(Exception):
    """The simulated process dies here."""


class Simulation:
    """One run. ``engine`` is what correct hosts run; ``rules`` whether their votes are judged, too."""

    def __init__(
        self,
        seed: int,
        plan: Plan,
        engine: type[Engine] = Engine,
        *,
        judge_votes: bool = True,
        cryptography: Cryptography | None = None,
        voters: Committee | None = None,
    ) -> None:
        self.seed = seed
        self.plan = plan
        self.random = random.Random(seed)
        self.committee = voters or named_committee(plan)
        self.cryptography = cryptography or Names(self.committee)
        self.engine_class = engine
        self.judge_votes = judge_votes
        self.now_ms = 0
        self.steps = 0
        self._sequence = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._trace = hashlib.sha256()
        self.genesis = genesis_header(ChainId(self.committee.chain_id), 0, ZERO_DIGEST, ZERO_DIGEST)
        self.headers: dict[Digest, Header] = {self.genesis.digest: self.genesis}
        self.proposals: dict[Digest, Proposal] = {}
        self.invalid: set[Digest] = set()
        self.pushed: set[Digest] = set()
        self.with_urgent: set[Digest] = set()
        self.final: dict[int, Digest] = {0: self.genesis.digest}
        self.finalize_votes: dict[tuple[int, bytes], set[MemberId]] = {}
        self.cast: dict[tuple[bytes, int], dict[VoteKind, bytes]] = {}
        self.evidence: list[PublishEvidence] = []
        self.side: dict[MemberId, int] = {}
        self.traitors: set[MemberId] = set()
        self.silent: set[MemberId] = set()
        self.deaf_to: dict[MemberId, set[MemberId]] = {}
        self.slow: set[MemberId] = set()
        self.forgers: set[MemberId] = set()
        self.censors: set[MemberId] = set()
        self.garbage: set[MemberId] = set()
        self.refused: dict[str, int] = {}
        """Messages that a host refused before its engine saw them, by reason."""
        self._assign()
        self.nodes = {
            member.id: Node(self, member.id)
            for member in self.committee.voters
            if member.id not in self.traitors | self.silent | self.garbage
        }
        self.adversary = Adversary(self) if self.traitors else None
        self.garbage_senders = [GarbageSender(self, member) for member in sorted(self.garbage)]

    def _assign(self) -> None:
        for index, role in enumerate(VOTING_ROLES):
            ids = [member.id for member in self.committee.role_members(role)]
            bad, mute, picky = self.plan.traitors[index], self.plan.silent[index], self.plan.selective[index]
            self.traitors.update(ids[len(ids) - bad :])
            self.silent.update(ids[len(ids) - bad - mute : len(ids) - bad])
            for member in ids[len(ids) - bad - mute - picky : len(ids) - bad - mute]:
                others = [voter.id for voter in self.committee.voters if voter.id != member]
                self.deaf_to[member] = set(others[::2])
            first = ids[: len(ids) - bad - mute]
            noise = self.plan.garbage[index]
            self.garbage.update(first[len(first) - noise :])
            first = first[: len(first) - noise]
            self.slow.update(first[len(first) - self.plan.slow[index] :])
            self.forgers.update(first[len(first) - self.plan.forgers[index] :])
            self.censors.update(first[len(first) - self.plan.censors[index] :])

    def run(self) -> "Simulation":
        """Until ``end_ms``; raises with the seed in the message when a rule breaks."""
        for node in self.nodes.values():
            self.at(self.random.randrange(20), node.boot)
        if self.plan.idle:
            self.at(500, self._work)
        if self.plan.partition_every_ms:
            self.at(0, self._partition)
        if self.adversary is not None:
            self.at(1, self.adversary.act)
        for sender in self.garbage_senders:
            self.at(1, sender.act)
        self.at(self.plan.heal_ms, self._heal)
        while self._heap and self._heap[0][0] <= self.plan.end_ms:
            self.now_ms, _, action = heapq.heappop(self._heap)
            self.steps += 1
            action()
        return self

    @property
    def trace(self) -> str:
        """Digest of everything that happened, in order."""
        return self._trace.hexdigest()

    def note(self, *parts: object) -> None:
        """Into the trace."""
        self._trace.update(repr((self.now_ms, parts)).encode())

    def at(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Do ``action`` after ``delay_ms``."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now_ms + delay_ms, self._sequence, action))

    @property
    def healed(self) -> bool:
        return self.now_ms >= self.plan.heal_ms

    def _heal(self) -> None:
        self.side.clear()
        for node in self.nodes.values():
            node.height_at_heal = node.head.height

    def _partition(self) -> None:
        if not self.healed:
            self.side = {member.id: self.random.randrange(2) for member in self.committee.voters}
            self.at(self.random.randrange(1, 2 * self.plan.partition_every_ms), self._partition)

    def _work(self) -> None:
        for node in self.nodes.values():
            node.work()
        self.at(1_000, self._work)

    def send(self, sender: MemberId, to: MemberId, message: Message) -> None:
        """Over the network as it is now."""
        node = self.nodes.get(to)
        if node is None or to == sender or to in self.deaf_to.get(sender, ()):
            return
        copies = 1
        if not self.healed:
            if self.side.get(sender, 0) != self.side.get(to, 0) or self.random.random() < self.plan.loss:
                return
            copies += self.random.random() < self.plan.duplication
        for _ in range(copies):
            longest = DELAY_MS if self.healed or self.random.random() < 0.9 else 8 * DELAY_MS
            longest *= 10 if sender in self.slow else 1
            self.at(self.random.randint(1, longest), lambda: node.deliver(message, sender))

    def broadcast(self, sender: MemberId, message: Message) -> None:
        if self.adversary is not None:
            self.adversary.hear(message)
        for sender_of_garbage in self.garbage_senders:
            sender_of_garbage.hear(message)
        for to in self.nodes:
            self.send(sender, to, message)

    def judge(self, vote: Vote) -> None:
        """A correct voter's vote is about to be sendable."""
        voter = MemberId(vote.voter)
        cast = self.cast.setdefault((voter, vote.view), {})
        before = cast.setdefault(vote.kind, vote.block)
        both = VoteKind.NULLIFY in cast and VoteKind.FINALIZE in cast
        if self.judge_votes and (before != vote.block or both):
            raise DoubleVote(f"seed {self.seed}: voter {voter.hex()[:8]} in view {vote.view}: {cast}")
        if vote.kind == VoteKind.FINALIZE:
            voters = self.finalize_votes.setdefault((vote.view, vote.block), self.traitors | self.garbage)
            voters.add(voter)
            if self.committee.has_quorum(voters):
                self.certifiable(Digest(vote.block))

    def certifiable(self, digest: Digest) -> None:
        """A certificate for ``digest`` can exist: it must be on the one branch."""
        while (header := self.headers[digest]) and self.final.setdefault(header.height, digest) == digest:
            if header.height == 0 or self.final.get(header.height - 1) == header.parent:
                return
            digest = Digest(header.parent)
        raise Fork(f"seed {self.seed}: two final ledger blocks at height {header.height}")

    def build(self, leader: MemberId, view: View, parent: Header) -> Proposal:
        """A ledger block no one built before."""
        leaf = hashlib.sha256(f"{leader.hex()} {view} {len(self.proposals)}".encode()).digest()
        body = Body(leaf_hashes=(leaf,))
        header = Header(
            version=1,
            chain_id=self.committee.chain_id,
            epoch=0,
            height=parent.height + 1,
            view=view,
            leader=leader,
            parent=parent.digest,
            parent_view=parent.view,
            timestamp_ms=self.now_ms,
            body_root=body.root,
            event_count=1,
            log_size=parent.log_size + 1,
            log_root=leaf,
            state_root=leaf,
        )
        proposal = self.cryptography.proposal(header, body)
        digest = proposal.digest
        self.headers[digest] = header
        self.proposals[digest] = proposal
        arrived = self.plan.urgent_ms and self.now_ms >= self.plan.urgent_ms
        if parent.digest in self.with_urgent or (arrived and leader not in self.censors | self.traitors):
            self.with_urgent.add(digest)
        return proposal

    def verdict(self, digest: Digest, voter: MemberId) -> Verdict:
        """What a correct voter, or a censor, finds out about a ledger block now."""
        plan = self.plan
        if digest in self.invalid:
            return Verdict.INVALID
        if digest in self.pushed:
            return Verdict.REFUSED
        if plan.urgent_ms and self.now_ms >= plan.urgent_ms:
            holds = digest in self.with_urgent
            overdue = plan.censorship_ms and self.now_ms >= plan.urgent_ms + plan.censorship_ms
            if holds if voter in self.censors else overdue and not holds:
                return Verdict.REFUSED
        return Verdict.VALID

    def check_wanted(self, header: Header) -> None:
        """A finalized ledger block is one that enough correct voters could vote for."""
        plan, digest = self.plan, header.digest
        if digest in self.pushed:
            raise Unwanted(f"seed {self.seed}: a pushed timestamp is final at height {header.height}")
        overdue = plan.censorship_ms and header.timestamp_ms > plan.urgent_ms + plan.censorship_ms
        if overdue and digest not in self.with_urgent:
            raise Unwanted(f"seed {self.seed}: the urgent event is left out at height {header.height}")


class Node:
    """A correct host: durable journal, ledger and ledger block store; an engine that dies with the process."""

    def __init__(self, simulation: Simulation, own: MemberId) -> None:
        self.simulation = simulation
        self.own = own
        self.journal: list[Vote] = []
        self.journalled_proposals: list[Proposal] = []
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

    def boot(self) -> None:
        simulation = self.simulation
        self.engine = simulation.engine_class(
            simulation.committee, self.own, simulation.plan.timing, self.head, self.certificate
        )
        self.engine.restore(self.journal, self.journalled_proposals)
        self.step("boot", lambda engine: engine.start(simulation.now_ms))
        if not simulation.plan.idle:
            self.work()

    def die(self) -> None:
        self.simulation.note("crash", self.own)
        self.incarnation += 1
        self.engine = None
        self.simulation.at(self.simulation.random.randint(10, 1_500), self.boot)

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
            self.simulation.cryptography.check(message)
        except Rejected as refusal:
            if sender not in self.simulation.garbage:
                raise
            refused = self.simulation.refused
            refused[refusal.reason.value] = refused.get(refusal.reason.value, 0) + 1
            return
        if isinstance(message, Proposal):
            self.store[message.digest] = message
        self.step("receive", lambda engine: engine.receive(message, sender, self.simulation.now_ms))

    # Effects

    def carry_out(self, effect: Effect) -> None:
        simulation, pause = self.simulation, self.simulation.random.randint(1, 5)
        match effect:
            case CastVote():
                self.later(pause, lambda: self.cast(effect))
            case RequestProposal(view, parent):
                self.later(pause, lambda: self.propose(view, parent))
            case VerifyBlock(proposal):
                self.later(pause, lambda: self.verify(proposal.digest, simulation.random.random() < 0.05))
            case FetchBlock(block, sources):
                self.later(pause + simulation.random.randint(2, DELAY_MS), lambda: self.fetch(block, sources))
            case NeedBlocks():
                self.later(pause + simulation.random.randint(2, DELAY_MS), self.catch_up)
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
            case Finalized(headers, certificate):
                self.append(headers, certificate)
            case PublishEvidence():
                simulation.evidence.append(effect)
            case Halt(reason):
                self.engine = None
                if simulation.judge_votes:
                    raise Halted(f"seed {simulation.seed}: {reason}")

    def tick(self) -> None:
        if self.deadline_ms is not None and self.simulation.now_ms >= self.deadline_ms:
            self.step("tick", lambda engine: engine.tick(self.simulation.now_ms))

    def cast(self, asked: CastVote) -> None:
        """Sign, journal, send, tell the engine; the process may die between any two."""
        vote = self.simulation.cryptography.vote(self.own, asked.kind, asked.view, asked.block)
        if self.own in self.simulation.forgers and asked.kind == VoteKind.FINALIZE:
            vote = self.simulation.cryptography.forged_vote(self.own, asked.view, asked.block)
        self.hazard()
        if asked.proposal is not None:
            self.journalled_proposals.append(asked.proposal)
            self.store[asked.proposal.digest] = asked.proposal
        self.journal.append(vote)
        self.simulation.judge(vote)
        self.hazard()
        if asked.proposal is not None:
            self.simulation.broadcast(self.own, asked.proposal)
        self.simulation.broadcast(self.own, vote)
        self.hazard()
        self.step("own vote", lambda engine: engine.own_vote(vote, self.simulation.now_ms))

    def propose(self, view: View, parent: Header) -> None:
        proposal = self.simulation.build(self.own, view, parent)
        self.step("propose", lambda engine: engine.own_proposal(proposal, self.simulation.now_ms))

    def verify(self, digest: Digest, missing: bool) -> None:
        verdict = Verdict.MISSING if missing else self.simulation.verdict(digest, self.own)
        self.step("verified", lambda engine: engine.block_verified(digest, verdict, self.simulation.now_ms))

    def fetch(self, block: Digest, sources: tuple[MemberId, ...]) -> None:
        if block in self.store and self.simulation.random.random() < 0.5:
            self.verify(block, False)
        for source in sources:
            holder = self.simulation.nodes.get(source)
            if holder is not None and holder.engine is not None and block in holder.store:
                self.simulation.send(source, self.own, holder.store[block])
                if block in self.store:
                    self.verify(block, False)

    def catch_up(self) -> None:
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
            certificate = simulation.cryptography.combine(asked.view, asked.block, asked.votes)
        except BadCertificateShares as bad:
            culprits = bad.culprits
            assert set(culprits) <= simulation.traitors | simulation.forgers
            self.step("bad shares", lambda engine: engine.combine_failed(asked.view, culprits, simulation.now_ms))
        else:
            self.step("combined", lambda engine: engine.receive(certificate, self.own, simulation.now_ms))

    def append(self, headers: tuple[Header, ...], certificate: Certificate) -> None:
        """One atomic write; the journal is pruned behind it."""
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
        view = self.head.view
        self.journal = [vote for vote in self.journal if vote.view > view]
        if simulation.plan.idle:
            self.later(0, lambda: self.step("idle", lambda engine: engine.work_exhausted(simulation.now_ms)))
