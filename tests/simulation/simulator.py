"""Deterministic simulation of N engines: one seeded heap of (time, sequence, action), a virtual clock.

Network: random delay (hence reordering), loss, duplication and partitions until ``heal_ms``; from then on
every message arrives within ``DELAY_MS``. Hosts crash at every step they take for an effect, also between
signing, journalling and sending, and come back from their journal and ledger; every second crash finds the journal
compacted, and some lose the ledger. The traitors are one
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
from collections import Counter
from collections.abc import Callable

from simulation.adversary import Adversary, GarbageSender
from simulation.cryptography import Cryptography, Names
from simulation.failures import DoubleVote, Fork, Unwanted
from simulation.host import Node
from simulation.plan import DELAY_MS, Plan, named_committee

from consensus.block import Body, Header, genesis_header
from consensus.branches import Verdict
from consensus.effect import Message, PublishEvidence
from consensus.engine import Engine
from consensus.identifiers import VOTING_ROLES, ZERO_DIGEST, ChainId, Digest, MemberId, View
from consensus.membership import Committee
from consensus.vote import Proposal, Vote, VoteKind


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
        self.genesis = self.first_header()
        self.headers: dict[Digest, Header] = {self.genesis.digest: self.genesis}
        self.proposals: dict[Digest, Proposal] = {}
        self.invalid: set[Digest] = set()
        self.pushed: set[Digest] = set()
        self.with_urgent: set[Digest] = set()
        self.final: dict[int, Digest] = {0: self.genesis.digest}
        self.finalize_votes: dict[tuple[int, int, bytes], set[MemberId]] = {}
        self.cast: dict[tuple[bytes, int, int], dict[VoteKind, bytes]] = {}
        self.evidence: list[PublishEvidence] = []
        self.side: dict[MemberId, int] = {}
        self.traitors: set[MemberId] = set()
        self.silent: set[MemberId] = set()
        self.deaf_to: dict[MemberId, set[MemberId]] = {}
        self.slow: set[MemberId] = set()
        self.forgers: set[MemberId] = set()
        self.censors: set[MemberId] = set()
        self.garbage: set[MemberId] = set()
        self.forgetful: set[MemberId] = set()
        self.unlucky: set[MemberId] = set()
        self.refused: Counter[str] = Counter()
        """Messages that a host refused before its engine saw them, by reason."""
        self._assign()
        self.aliases: dict[MemberId, MemberId] = {}
        """What a host that changed its keys is called in ``nodes``."""
        self.nodes: dict[MemberId, Node] = self.make_nodes()
        self.adversary = self.make_adversary() if self.traitors else None
        self.garbage_senders = [GarbageSender(self, member) for member in sorted(self.garbage)]

    def first_header(self) -> Header:
        """The root of every branch."""
        return genesis_header(ChainId(self.committee.chain_id), 0, ZERO_DIGEST, ZERO_DIGEST)

    def make_nodes(self) -> dict[MemberId, Node]:
        """The correct hosts."""
        absent = self.traitors | self.silent | self.garbage
        return {member.id: Node(self, member.id) for member in self.committee.voters if member.id not in absent}

    def make_adversary(self) -> Adversary:
        """The traitors."""
        return Adversary(self)

    def committee_of(self, epoch: int) -> Committee:
        """The members of an epoch: here there is but one."""
        return self.committee

    def cryptography_of(self, epoch: int) -> Cryptography:
        """How the members of an epoch sign."""
        return self.cryptography

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
            self.forgetful.update(first[len(first) - self.plan.forgetful[index] :])
            self.unlucky.update(first[len(first) - self.plan.unlucky[index] :])

    def run(self) -> "Simulation":
        """Until ``end_ms``; raises with the seed in the message when a rule breaks."""
        for node in self.nodes.values():
            self.at(self.boot_delay_ms(node), node.boot)
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

    def boot_delay_ms(self, node: Node) -> int:
        """When a host is switched on."""
        return self.random.randrange(20)

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
    def correct(self) -> list[Node]:
        """The hosts that keep every rule of voting: what is asked of progress is asked of them."""
        return [node for node in self.nodes.values() if node.own not in self.forgetful]

    @property
    def healed(self) -> bool:
        return self.now_ms >= self.plan.heal_ms

    def _heal(self) -> None:
        self.side.clear()
        for node in self.nodes.values():
            node.height_at_heal = node.head.height

    @property
    def parts(self) -> list[MemberId]:
        """Whom a partition puts on one side or the other."""
        return [member.id for member in self.committee.voters]

    def _partition(self) -> None:
        if not self.healed:
            self.side = {member: self.random.randrange(2) for member in self.parts}
            self.at(self.random.randrange(1, 2 * self.plan.partition_every_ms), self._partition)

    def _work(self) -> None:
        for node in self.nodes.values():
            node.work()
        self.at(1_000, self._work)

    def send(self, sender: MemberId, to: MemberId, message: Message) -> None:
        """Over the network as it is now."""
        to = self.aliases.get(to, to)
        node = self.nodes.get(to)
        if node is None or to == sender or to in self.deaf_to.get(sender, ()):
            return
        copies = 1
        if not self.healed:
            if self.side.get(sender, 0) != self.side.get(to, 0) or self.random.random() < self.plan.loss:
                return
            copies += self.random.random() < self.plan.duplication
        for _ in range(copies):
            self.at(self.delay_ms(sender), lambda: node.deliver(message, sender))

    def delay_ms(self, sender: MemberId) -> int:
        """How long a message of ``sender`` takes now."""
        if self.plan.steady_ms:
            return self.plan.steady_ms
        longest = DELAY_MS if self.healed or self.random.random() < 0.9 else 8 * DELAY_MS
        return self.random.randint(1, longest * (10 if sender in self.slow else 1))

    def broadcast(self, sender: MemberId, message: Message) -> None:
        if self.adversary is not None:
            self.adversary.hear(message)
        for sender_of_garbage in self.garbage_senders:
            sender_of_garbage.hear(message)
        for to in self.nodes:
            self.send(sender, to, message)

    def judge(self, vote: Vote) -> None:
        """A vote is about to be sendable: a correct voter's keeps the rules."""
        voter, committee = MemberId(vote.voter), self.committee_of(vote.epoch)
        if self.aliases.get(voter, voter) in self.forgetful:
            return
        cast = self.cast.setdefault((voter, vote.epoch, vote.view), {})
        before = cast.setdefault(vote.kind, vote.block)
        both = VoteKind.NULLIFY in cast and VoteKind.FINALIZE in cast
        if self.judge_votes and (before != vote.block or both):
            raise DoubleVote(f"seed {self.seed}: voter {voter.hex()[:8]} in view {vote.view}: {cast}")
        if vote.kind == VoteKind.FINALIZE:
            able = self.traitors | self.garbage | self.forgetful
            bad = {member.id for member in committee.voters if self.aliases.get(member.id, member.id) in able}
            voters = self.finalize_votes.setdefault((vote.epoch, vote.view, vote.block), bad)
            voters.add(voter)
            if committee.has_quorum(voters):
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
