"""A correct host that holds a real log and state, through all epochs of it.

It runs the node's own parts wherever they wait for nothing: ``Ledger`` (on a store in memory), ``Mempool``, ``Intake``,
``Proposals``, ``Chunk``, ``serve_blocks``. What is simulated is what ``replica``, ``catchup`` and ``runner`` do between
them: carrying out effects, asking peers, going on into the next epoch. Left out are transport identities: a host is
reached whatever keys it has by now, but nobody writes to one that is no member in the writer's epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from simulation.cryptography import Keys
from simulation.failures import Halted
from simulation.host import Journal, Node
from simulation.memory_store import MemoryStore
from simulation.plan import DELAY_MS

from consensus.block import Header, decode_header
from consensus.branches import Verdict
from consensus.certificate import Certificate
from consensus.codec import decode, encode
from consensus.effect import CastVote, Effect, Finalized, Message, PublishEvidence, RequestProposal
from consensus.engine import Engine
from consensus.event import CheckedEvent, Kind, make_entry, pack, pack_parts, sign_entry
from consensus.evidence import Conviction, EvidenceReport, check_evidence
from consensus.identifiers import Digest, MemberId
from consensus.membership import Committee
from consensus.portions import Portions, SaltedPortion
from consensus.rejection import Reason, Rejected
from consensus.state import EVIDENCE_TABLE
from consensus.state_map import StateMap
from consensus.vote import Proposal, Vote, VoteKind, check_proposal
from node.chunk import CertifiedInvalid, Chunk, Pending
from node.intake import Intake
from node.ledger import Finalized as Appended
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import MAX_ANSWER_BYTES, Blocks, GetBlocks, pack_gossip
from node.proposals import Proposals
from node.replica import epoch_of
from node.voter import HeldBlock, VotingKeys

if TYPE_CHECKING:
    from simulation.ledgers import LedgerSimulation

NOBODY = MemberId(bytes(32))


class NoNetwork:
    """What the product's parts are given for a network: the simulation carries everything itself."""

    def __init__(self, simulation: "LedgerSimulation") -> None:
        self.simulation = simulation

    def complain(self, member: MemberId, why: Rejected) -> None:
        """A bad event of a peer's; what a correct one said before it knew of a new epoch may be one, too."""
        if member in self.simulation.garbage:
            self.simulation.refused_events[why.reason.value] += 1


class LedgerNode(Node):
    """Durable: the store, the vote journal of each epoch, evidence. All else dies with the process.

    A host that has lost its store goes through all epochs again, and votes in the one that it was in.
    """

    simulation: "LedgerSimulation"

    def __init__(self, simulation: "LedgerSimulation", own: MemberId, name: str) -> None:
        """``own`` is what others find it by for ever: its first identity."""
        super().__init__(simulation, own)
        self.name = name
        self.disk = MemoryStore()
        self.journals: dict[int, Journal] = {}
        """By epoch."""
        self.reports: dict[Conviction, tuple[EvidenceReport, int]] = {}
        """Evidence, and since when it is kept."""

    # Life and death

    def new_engine(self) -> Engine:
        simulation, network = self.simulation, NoNetwork(self.simulation)
        self.log = Ledger(self.disk, simulation.genesis_file)
        self.mempool = Mempool(2_000, 1 << 24)
        self.intake = Intake(self.log, self.mempool, network, simulation.clock, 1 << 20)  # type: ignore[arg-type]
        return self._engine_of_epoch()

    def _engine_of_epoch(self) -> Engine:
        """What ``runner`` and ``replica`` do when a node starts and when an epoch begins."""
        simulation, committee = self.simulation, self.log.committee
        self.committee: Committee = committee
        self.ended = False
        self.had_work = False
        self.disappointments: Counter[MemberId] = Counter()
        self.asked_ahead: set[MemberId] = set()
        self.proposals = Proposals(
            self.log,
            NoNetwork(simulation),  # type: ignore[arg-type]
            self.mempool,
            self.intake,
            simulation.clock,
        )
        member = next((member for member in committee.voters if member.name == self.name), None)
        # The journals of epochs that have ended are never written again.
        self.member = None if member is None or any(epoch > committee.epoch for epoch in self.journals) else member.id
        self.journal = self.journals.setdefault(committee.epoch, Journal())
        final = self.log.final.header
        engine = self.engine_class(
            committee,
            self.member,
            simulation.plan.timing,
            final,
            self.log.certificate if final.epoch == committee.epoch else None,
        )
        if self.member is not None:
            held: list[HeldBlock] = [block for _, block in self.journal.held]
            self.intake.restore([event for block in held for event in block.events])
            engine.restore(self.journal.votes, [block.proposal for block in held], self.journal.first_view)
            for block in held:
                self.proposals.remember(block.proposal)
        return engine

    def compact_journal(self) -> None:
        if self.head.epoch == self.committee.epoch:
            super().compact_journal()

    def lose_ledger(self) -> None:
        self.disk = MemoryStore()
        self.head, self.ledger = self.simulation.genesis, [self.simulation.genesis]

    def boot(self) -> None:
        super().boot()
        self.later(1, self.tell_work)
        self.hand_in_kept()
        self.simulation.greet(self)

    def step(self, name: str, call: Callable[[Engine], list[Effect]]) -> None:
        if not self.ended:
            super().step(name, call)

    def carry_out(self, effect: Effect) -> None:
        if isinstance(effect, PublishEvidence):
            self.keep(EvidenceReport(effect.evidence))
        elif self.ended:
            return
        super().carry_out(effect)

    def end_epoch(self) -> None:
        """Say what ended it; votes already asked for may still leave until the next one begins."""
        self.ended = True
        certificate = self.log.certificate
        assert certificate is not None
        self.simulation.carried += certificate.block != self.log.final.digest
        self.simulation.broadcast(self.own, certificate)
        self.later(self.simulation.random.randint(1, 600), self.begin_epoch)

    def begin_epoch(self) -> None:
        self.incarnation += 1
        self.intake.begin_epoch()
        self.engine = self._engine_of_epoch()
        self.simulation.note("epoch", self.own, self.committee.epoch)
        self.step("begin", lambda engine: engine.start(self.simulation.now_ms))
        self.later(1, self.tell_work)
        self.hand_in_kept()

    # Who it is

    @property
    def voter(self) -> MemberId:
        assert self.member is not None
        return self.member

    @property
    def cryptography(self) -> Keys:
        return self.simulation.cryptography_of(self.committee.epoch)

    def peers(self) -> list[MemberId]:
        """Whom it talks to, by what they are found by."""
        return [peer for peer in self.simulation.addresses(self.committee) if peer != self.own]

    # Inputs

    def work(self) -> None:
        """Events tell of themselves."""

    def tell_work(self) -> None:
        work = self.proposals.has_work()
        if work:
            self.step("work", lambda engine: engine.work_available(self.simulation.now_ms))
        elif self.had_work:
            self.step("idle", lambda engine: engine.work_exhausted(self.simulation.now_ms))
        self.had_work = work

    def submit(self, encoded: bytes) -> None:
        """As a client.

        Raises:
            Rejected: as ``Intake.submit``.
        """
        self.intake.submit(encoded)
        self.pass_on()
        self.tell_work()

    def pass_on(self) -> None:
        """What waits to be sent to all peers."""
        for encoded in self.intake.take_outgoing():
            self.simulation.gossip(self.own, self.peers(), encoded)

    def take_event(self, sender: MemberId, encoded: bytes) -> None:
        if self.engine is not None and self.intake.receive(sender, pack_gossip([encoded])):
            self.tell_work()

    def offer(self, to: MemberId) -> None:
        for event in tuple(self.mempool.candidates()):
            self.simulation.gossip(self.own, [to], pack_parts(event.entry_bytes, event.portions_bytes))

    def deliver(self, message: Message, sender: MemberId) -> None:
        if self.engine is None or self.ended:
            return
        try:
            epoch = epoch_of(message, self.committee.chain_id)
            if epoch != self.committee.epoch:
                if epoch > self.committee.epoch and sender not in self.asked_ahead:
                    self.asked_ahead.add(sender)
                    self.later(self.simulation.random.randint(2, DELAY_MS), lambda: self.ask_ahead(sender))
                raise Rejected(Reason.WRONG_EPOCH, f"a message of epoch {epoch}, this is {self.committee.epoch}")
        except Rejected as refusal:
            self.refuse(sender, refusal)
            return
        super().deliver(message, sender)

    def refuse(self, sender: MemberId, refusal: Rejected) -> None:
        """Of a correct member's nothing is refused but what it said before it knew of the new epoch, or we did."""
        who = "other"
        if sender in self.simulation.traitors:
            who = "traitor"
        elif sender in self.simulation.garbage:
            who = "garbage"
        elif sender in self.simulation.replayers:
            who = "replayer"
        elif refusal.reason is not Reason.WRONG_EPOCH:
            raise refusal
        self.simulation.refused[f"{who}: {refusal.reason.value}"] += 1

    def receive(self, message: Message, sender: MemberId) -> None:
        super().receive(message, sender)
        engine = self.engine
        if isinstance(message, Proposal) and engine is not None and engine.branches.get(message.digest) is not None:
            self.proposals.remember(message)

    # Effects

    def cast(self, asked: CastVote) -> None:
        """A notarize vote for a ledger block that is not held any more is not cast."""
        if asked.kind == VoteKind.NOTARIZE and self.proposals.held_block(asked.block) is None:
            return
        super().cast(asked)

    def write_journal(self, vote: Vote, proposal: Proposal | None) -> None:
        if vote.kind == VoteKind.NOTARIZE:
            held = self.proposals.held_block(Digest(vote.block))
            assert held is not None
            self.journal.held.append((vote.view, held))
        self.journal.votes.append(vote)

    def propose(self, asked: RequestProposal) -> None:
        if self.member is None or self.ended:
            return
        secrets = self.cryptography.secrets(self.member)
        keys = VotingKeys(self.member, secrets.identity, secrets.identity)
        proposal = self.proposals.build(asked, keys)
        if proposal is None:
            self.step("nothing", lambda engine: engine.nothing_to_propose(asked, self.simulation.now_ms))
        else:
            self.simulation.built_by_correct(proposal, self.log.overlays[proposal.digest].events)
            self.step("propose", lambda engine: engine.own_proposal(proposal, self.simulation.now_ms))
            self.tell_work()

    def verify(self, proposal: Proposal, missing: bool) -> None:
        header = decode_header(proposal.header, self.committee.chain_id)
        leaves = [Digest(leaf) for leaf in proposal.body.leaf_hashes]
        found = {leaf: event for leaf in leaves if (event := self.mempool.get(leaf)) is not None}
        if len(found) == len(leaves):
            self._judge(proposal, header, [found[leaf] for leaf in leaves])
            return

        def ask() -> None:
            if self.ended:
                return
            self._ask_for_events(found, leaves, header)
            events = [found[leaf] for leaf in leaves] if all(leaf in found for leaf in leaves) else None
            self._judge(proposal, header, events)

        self.later(self.simulation.random.randint(2, DELAY_MS), ask)

    def _judge(self, proposal: Proposal, header: Header, events: list[CheckedEvent] | None) -> None:
        verdict = Verdict.MISSING if events is None else self.judged(proposal, header, events)
        digest = proposal.digest
        self.step("verified", lambda engine: engine.block_verified(digest, verdict, self.simulation.now_ms))

    def judged(self, proposal: Proposal, header: Header, events: list[CheckedEvent]) -> Verdict:
        """Whether a ledger block may have this member's vote."""
        verdict = self.proposals.judge(proposal, header, events)
        self.pass_on()
        return verdict

    def _ask_for_events(self, found: dict[Digest, CheckedEvent], leaves: list[Digest], header: Header) -> None:
        for peer in self._askable([MemberId(header.leader)]):
            missing = [leaf for leaf in leaves if leaf not in found]
            if not missing:
                return
            try:
                for encoded in self.simulation.events_from(peer, self, missing):
                    event = self.intake.take_fetched(encoded, peer, frozenset(missing))
                    found[event.leaf_hash] = event
            except Rejected as refusal:
                self.simulation.distrusts(peer, refusal)

    def _askable(self, sources: Iterable[MemberId]) -> list[MemberId]:
        first = [self.simulation.aliases.get(source, source) for source in sources]
        return [peer for peer in dict.fromkeys([*first, *self.peers()]) if peer != self.own]

    def fetch(self, block: Digest, sources: tuple[MemberId, ...]) -> None:
        known = self.proposals.get(block)
        if known is not None:
            self.verify(known, False)
            return
        for peer in self._askable(sources):
            holder = self.simulation.reachable(peer, self)
            proposal = None if holder is None else holder.proposals.get(block)
            if proposal is not None:
                check_proposal(proposal, self.committee)
                self.proposals.remember(proposal)
                super().receive(proposal, peer)
                return

    def keep(self, report: EvidenceReport) -> None:
        """As ``node.evidence`` does."""
        found = check_evidence(report, self.committee)
        if found.digest not in {kept.digest for kept in self.reports}:
            self.reports[found] = report, self.simulation.now_ms
            self.hand_in(report, found)

    def hand_in_kept(self) -> None:
        for found, (report, _) in self.reports.items():
            self.hand_in(report, found)

    def unrecorded(self, state: StateMap, since_ms: int) -> list[Conviction]:
        """What it has kept since before ``since_ms`` and the state does not have."""
        return [
            found
            for found, (_, kept_ms) in self.reports.items()
            if kept_ms < since_ms and state.get(EVIDENCE_TABLE + found.digest) is None
        ]

    def hand_in(self, report: EvidenceReport, found: Conviction) -> None:
        if self.member is None or self.log.final.state.get(EVIDENCE_TABLE + found.digest) is not None:
            return
        portions = Portions(None, SaltedPortion(self.simulation.voices.salt(), encode(report)), None)
        entry = make_entry(self.log.genesis.chain_id, Kind.EVIDENCE, self.member, portions)
        role = self.committee.member(self.member).role
        signed = sign_entry(entry, self.member, role.value, self.cryptography.secrets(self.member).identity)
        self.later(1, lambda: self._submit_own(pack(signed, portions)))

    def _submit_own(self, encoded: bytes) -> None:
        try:
            self.submit(encoded)
        except Rejected as refusal:
            if refusal.reason not in (Reason.DUPLICATE, Reason.UNKNOWN_MEMBER):
                raise  # others handed it in first, or this identity is none any more

    # Catching up

    def catch_up(self, wanted: Certificate) -> None:
        """``replica`` and ``CatchUp.reach``: whoever disappointed least first, until the certified view is reached."""
        while not self.ended and self.log.final_view < wanted.view:
            for peer in sorted(self.peers(), key=lambda peer: (self.disappointments[peer], peer)):
                if self._from_peer(peer):
                    break
            else:
                return
        self._tell_caught_up()

    def ask_ahead(self, peer: MemberId) -> None:
        if not self.ended and self._from_peer(peer):
            self._tell_caught_up()
        self.asked_ahead.discard(peer)

    def _tell_caught_up(self) -> None:
        certificate = self.log.certificate
        if certificate is not None:
            self.step(
                "caught up",
                lambda engine: engine.caught_up(self.log.final.header, certificate, self.simulation.now_ms),
            )

    def _from_peer(self, peer: MemberId) -> bool:
        """Apply what a peer has beyond our log, chunk by chunk; whether the log grew."""
        before_height = self.log.final.header.height
        height, pending = before_height + 1, Pending()
        while (answer := self.simulation.blocks_from(peer, self, GetBlocks(height))) is not None:
            try:
                blocks = decode(answer, Blocks, MAX_ANSWER_BYTES)
                if not blocks.blocks:
                    if blocks.head_height >= height:
                        raise Rejected(Reason.NOT_FOUND, f"no ledger block {height}, claims {blocks.head_height}")
                    break
                self._take_chunk(Chunk(self.log, blocks, height, pending))
            except Rejected as refusal:
                self.disappointments[peer] += 1
                self.simulation.distrusts(peer, refusal)
                break
            except CertifiedInvalid as broken:
                raise Halted(f"seed {self.simulation.seed}: {broken}") from broken
            height += len(blocks.blocks)
        return self.log.final.header.height > before_height

    def _take_chunk(self, chunk: Chunk) -> None:
        chunk.check_certificate()
        for header, record in chunk.lacking():
            chunk.apply(header, record, [event for checked in chunk.check_events(record) for event in checked])
        self.appended(chunk.commit())

    # Finality

    def finalize(self, effect: Finalized) -> None:
        self.appended(self.log.commit(effect.headers, effect.certificate, effect.votes))

    def appended(self, blocks: tuple[Appended, ...]) -> None:
        """One atomic write has brought these."""
        if not blocks:
            return
        simulation = self.simulation
        for block in blocks:
            simulation.finalized(block.header, block.events)
            self.ledger.append(block.header)
            simulation.note("appended", self.own, block.header.height, block.header.digest)
        self.head = self.log.final.header
        simulation.check_host(self)
        self.finalized_at.append(simulation.now_ms)
        self.proposals.appended(blocks)
        for block in blocks:
            self.intake.appended(block.events)
        if self.log.committee.epoch != self.committee.epoch:
            self.end_epoch()
            return
        self.later(0, self.tell_work)

    def settle(self) -> None:
        """Now and then: what can never be admitted waits no more."""
        if self.engine is not None:
            self.proposals.settle()
            self.pass_on()
