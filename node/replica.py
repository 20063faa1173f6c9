"""The host of the BFT engine: carries out its effects over network, journal and disk.

One trio task reads what peers send, votes before events, checks it and feeds the engine. The engine answers
with effects: those that only compute are done at once, those that wait (journal, fetch, combine) run as
tasks and feed their result back. All engine calls happen on the trio thread, never across an ``await``.

Rules that depend on this voter's own clock live here, not in ``apply``: a proposal whose timestamp is too far
from ours, or whose branch omits an urgent event we have held for ``censorship_ms``, is refused our vote but
not called invalid.

A replica serves one epoch. Once the ledger has gone on to the next, nothing is voted, proposed or fetched any more;
``run`` tells every peer the certificate that ended it, waits until all of it is durable, and returns. The node then
makes another replica, the same way as when it starts: so a crash at any instant of the switch needs no recovery of its
own.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from consensus.block import Header, decode_header
from consensus.branches import Verdict
from consensus.certificate import BadCertificateShares, Certificate, certificate_message, verify_certificate
from consensus.codec import decode, encode
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
from consensus.identifiers import ChainId, Digest, MemberId
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.vote import (
    Notarization,
    Nullification,
    Proposal,
    Stalled,
    Vote,
    VoteKind,
    check_notarization,
    check_nullification,
    check_proposal,
    check_stalled,
    check_vote,
)
from node.catchup import CatchUp, serve_blocks, serve_events, serve_former
from node.chunk import CertifiedInvalid
from node.clock import Clock
from node.evidence import EvidenceDesk
from node.history import HistoryFill
from node.intake import Intake
from node.last_votes import LastVotes, lacks
from node.ledger import Finalized as Appended
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import (
    FoundProposal,
    GetBlocks,
    GetEvents,
    GetLastVote,
    GetProposal,
    GetSnapshot,
    GetState,
    LastVote,
)
from node.network import Lane, Network, Received
from node.pace import Pace, Service
from node.proposals import Proposals
from node.snapshot import Joining, SnapshotDesk
from node.voter import Restored, Voter

log = logging.getLogger("countersign.replica")

MAX_MESSAGE_BYTES = 1 << 20
PEERS_LOOKED_AT_SECONDS = 0.1
GREETED_AGAIN_SECONDS = 1.0
EVENT_BYTES_PER_SECOND = 8 << 20
"""What each member may fetch of events: more than a log ever takes, and a sixth of a core's time to look them up."""
LOOKED_UP_BYTES = 128
"""What an event that is asked for counts at least: to look in vain takes as long as to send so much."""


@dataclass(slots=True)
class ReplicaCounters:
    """What the metrics endpoint shows of the round."""

    messages: int = 0
    messages_refused: int = 0
    blocks_finalized: int = 0
    events_finalized: int = 0
    evidence: int = 0


@dataclass(frozen=True, slots=True)
class SyncChoice:
    """How a log that has nothing yet begins, and how fast bulk is served and fetched below a snapshot."""

    from_snapshot: bool
    bytes_per_second: int


class Replica:
    """One node's part in the round; with no ``voter`` it follows and checks, and never votes."""

    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        mempool: Mempool,
        intake: Intake,
        clock: Clock,
        voter: Voter | None,
        timing: Timing,
        evidence: EvidenceDesk,
        sync: SyncChoice,
        counters: ReplicaCounters,
    ) -> None:
        self._evidence = evidence
        self._committee, self._scheme = ledger.committee, ledger.scheme
        self._ended = trio.Event()
        self._asked_ahead: set[MemberId] = set()
        self._ledger = ledger
        self._network = network
        self._mempool = mempool
        self._intake = intake
        self._clock = clock
        self._voter = voter
        self.counters = counters
        self._bulk = Service(sync.bytes_per_second)
        self._event_service: dict[MemberId, Service] = {}
        joining = Joining(ledger, network, self._fill_up) if sync.from_snapshot else None
        self.catch_up = CatchUp(ledger, network, self._appended, joining)
        self._history = HistoryFill(ledger, network, Pace(sync.bytes_per_second))
        self._snapshots = SnapshotDesk(ledger)
        self.engine = Engine(
            ledger.committee,
            voter.keys.member if voter else None,
            timing,
            ledger.final.header,
            ledger.certificate if ledger.final.header.epoch == ledger.committee.epoch else None,
        )
        self._nursery: trio.Nursery | None = None
        self._deadline_ms: int | None = None
        self._timer_changed = trio.Event()
        self._proposals = Proposals(ledger, network, mempool, intake, clock)
        self._last_votes = LastVotes(ledger, network)
        self._durable_wake = trio.Event()
        self._undurable: list[Appended] = []
        self.undurable: set[Digest] = set()
        """Ids of events appended but not yet synced to disk: not final for anyone who asks."""
        self._durable_view = 0
        """The view of a ledger block that is final and on disk."""
        self._had_work = False
        self._stopped: str | None = None
        self.voting_since_start = voter is not None
        self.why_not_voting = ""
        self._restored: Restored | None = None
        """What the journal holds, until peers enough know of no vote of ours beside."""

    @property
    def clocks_ahead_ms(self) -> dict[str, int]:
        """By leader, how far its newest timestamp was ahead of this node's clock."""
        return self._proposals.clocks_ahead_ms

    @property
    def halted(self) -> str | None:
        """Why the replica stopped for good, if it did."""
        return self._stopped or self.engine.halted

    async def run(self) -> None:
        """Take part until the epoch has ended durably, or cancelled.

        Raises:
            InvariantBroken: journal or disk failed; the process must stop.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._end_epoch, nursery.cancel_scope)
            nursery.start_soon(self._keep_durable)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._watch_intake)
            nursery.start_soon(self._watch_peers)
            if self._ledger.missing_blocks:
                self._fill_up()
            if self._voter is not None:
                restored = self._voter.restored()
                self._intake.restore(restored.events)
                self.engine.restore(restored.votes, restored.proposals, restored.first_view)
                for proposal in restored.proposals:
                    self._proposals.remember(proposal)
                self._restored = restored
                nursery.start_soon(self._vote, self._voter, restored)
            self._evidence.hand_in_kept()
            self._do(self.engine.start(self._now_ms))
            async for received in self._network.incoming:
                self._take(received)
        # Nothing appends any more. A snapshot may have ended the epoch: it appended no ledger block, and is not synced.
        await self._make_durable()

    def _fill_up(self) -> None:
        """The log has begun at a snapshot, or still lacks what is below one."""
        assert self._nursery is not None
        if self._ledger.committee.epoch != self._committee.epoch:
            self._ended.set()
        else:
            self._nursery.start_soon(self._history.run)

    async def _end_epoch(self, scope: trio.CancelScope) -> None:
        await self._ended.wait()
        log.info("epoch %d has ended", self._committee.epoch)
        if self._ledger.certificate is not None:
            self._network.broadcast(Lane.VOTES, encode(self._ledger.certificate))
        scope.cancel()  # catching up as well: it may last as long as a peer likes, and the next replica begins it anew

    async def _vote(self, voter: Voter, restored: Restored) -> None:
        """Cast votes, once peers enough for a quorum know of none of ours that the journal lacks."""
        unknown = await self._last_votes.missing_from(voter.keys.member, restored)
        if unknown is not None:
            self._vote_no_more(voter, unknown)
        if not self.voting_since_start:
            return
        self._restored = None
        await voter.run(
            self._proposals.held_block,
            self._send_votes,
            self._count_vote,
            lambda: min(self._durable_view, self.engine.final_view),  # it still votes in views that it takes for open
        )

    def _was_lost(self, vote: Vote) -> bool:
        """Whether it is ours and not in the journal, as far as we have not voted yet since we started."""
        return self._restored is not None and vote.voter == self.engine.own and lacks(self._restored, vote)

    def _vote_no_more(self, voter: Voter, unknown: Vote) -> None:
        self.voting_since_start = False
        self._restored = self.engine.own = None  # or the engine would halt when it meets such a vote: it only follows
        kind = VoteKind(unknown.kind).name.lower()
        self.why_not_voting = (
            f"the vote journal ends at view {voter.highest_view} and lacks this identity's {kind} vote of view "
            f"{unknown.view}, which a peer holds: it was lost or restored from an old copy, and this identity must "
            "not vote until it is rotated"
        )
        log.critical("this node does not vote: %s", self.why_not_voting)

    def _stop(self, reason: str) -> None:
        """Take no more part: what a quorum certified breaks the rules."""
        self._stopped = reason
        log.critical("halted: %s", reason)

    # Inputs

    @property
    def _now_ms(self) -> int:
        return self._clock.monotonic_ms()

    def _take(self, received: Received) -> None:
        self.counters.messages += 1
        if self._stopped is not None or self._ended.is_set() or not self._committee.has_member(received.member):
            return
        try:
            if received.lane is Lane.EVENTS:
                self._intake.receive(received.member, received.frame)
            else:
                message: Message = decode(received.frame, Message, MAX_MESSAGE_BYTES)  # type: ignore[arg-type]
                epoch = epoch_of(message, self._committee.chain_id)
                if epoch != self._committee.epoch:
                    self._ask_ahead(received.member, epoch)
                    raise Rejected(Reason.WRONG_EPOCH, f"a message of epoch {epoch}, this is {self._committee.epoch}")
                if not self.engine.wants(message):
                    if isinstance(message, Vote) and received.member == message.voter:
                        self._last_votes.note_late(message, self.engine.final_view)
                    return
                self._check(message)
                for vote in _votes_in(message):
                    self._last_votes.note(vote)
                    if self._voter is not None and self._was_lost(vote):
                        self._vote_no_more(self._voter, vote)
                effects = self.engine.receive(message, received.member, self._now_ms)
                if isinstance(message, Proposal) and self.engine.branches.get(message.digest) is not None:
                    # Only what the engine keeps, which is bounded by view: a leader that signs proposals without end
                    # must not push others' out.
                    self._proposals.remember(message)
                self._do(effects)
        except Rejected as error:
            self.counters.messages_refused += 1
            log.debug("message of %s refused: %s", received.member.hex()[:16], error)
            self._network.complain(received.member, error)

    def _ask_ahead(self, peer: MemberId, epoch: int) -> None:
        """Whoever is in a later epoch has the end of ours."""
        assert self._nursery is not None
        if epoch > self._committee.epoch and peer not in self._asked_ahead and peer in self._network.connected:
            self._asked_ahead.add(peer)
            self._nursery.start_soon(self._greet, peer, self._asked_ahead)

    def _check(self, message: Message) -> None:
        committee = self._committee
        match message:
            case Vote():
                check_vote(message, committee)
            case Proposal():
                check_proposal(message, committee)
            case Notarization():
                check_notarization(message, committee)
            case Nullification():
                check_nullification(message, committee)
            case Certificate():
                verify_certificate(self._scheme, committee.chain_id, message)
            case Stalled():
                check_stalled(message, committee)

    async def _watch_intake(self) -> None:
        while True:
            arrived = self._intake.arrived
            if len(self._mempool) and (not self._had_work or self.engine.waits_for_work):
                self._tell_work()
            await arrived.wait()

    async def _greet(self, peer: MemberId, greeting: set[MemberId]) -> None:
        """Offer a peer that has just connected what waits here, and append what it has beyond our log.

        One at a time for each peer and not at once again, or a peer that comes and goes would keep us busy.
        """
        await self._intake.offer(peer)
        try:
            while True:
                if await self.catch_up.from_peer(peer):
                    self._caught_up()
                await trio.sleep(GREETED_AGAIN_SECONDS)
                if not self.catch_up.undecided or peer not in self._network.connected:
                    break
        except CertifiedInvalid as error:
            self._stop(str(error))
        greeting.discard(peer)

    def _caught_up(self) -> None:
        certificate = self._ledger.certificate
        if certificate is not None and not self._ended.is_set():
            self._do(self.engine.caught_up(self._ledger.final.header, certificate, self._now_ms))

    async def _watch_peers(self) -> None:
        """Greet peers that came, tell the engine of those that went; let events go that waited too long."""
        assert self._nursery is not None
        greeted: frozenset[MemberId] = frozenset()
        greeting: set[MemberId] = set()
        known: set[MemberId] = set()
        lost: set[MemberId] = set()
        while True:
            await trio.sleep(PEERS_LOOKED_AT_SECONDS)
            connected = self._network.connected
            known |= connected
            if known - connected != lost:
                lost = known - connected
                self._do(self.engine.peers_lost(lost, self._now_ms))
            came = connected - greeted - greeting
            greeting |= came
            for peer in sorted(came):
                self._nursery.start_soon(self._greet, peer, greeting)
            greeted = (greeted & connected) | came
            self._proposals.settle()

    def _tell_work(self) -> None:
        work = self._proposals.has_work()
        if work:
            self._do(self.engine.work_available(self._now_ms))
        elif self._had_work:
            self._do(self.engine.work_exhausted(self._now_ms))
        self._had_work = work

    async def _keep_time(self) -> None:
        while True:
            changed = self._timer_changed
            if self._deadline_ms is None:
                await changed.wait()
                continue
            wait_seconds = max(0, self._deadline_ms - self._now_ms) / 1_000
            with trio.move_on_after(wait_seconds):
                await changed.wait()
            if self._deadline_ms is not None and self._now_ms >= self._deadline_ms:
                self._deadline_ms = None
                self._do(self.engine.tick(self._now_ms))

    # Effects

    def _do(self, effects: Iterable[Effect]) -> None:
        assert self._nursery is not None
        for effect in effects:
            if isinstance(effect, PublishEvidence):  # whatever has ended meanwhile, it convicts
                self.counters.evidence += 1
                self._evidence.take(effect.evidence)
                continue
            if self._stopped is not None or self._ended.is_set():
                continue
            match effect:
                case Broadcast():
                    self._network.broadcast(Lane.VOTES, encode(effect.message))
                case Send():
                    self._network.send(effect.to, Lane.VOTES, encode(effect.message))
                case SetTimer():
                    self._deadline_ms = effect.deadline_ms
                    changed, self._timer_changed = self._timer_changed, trio.Event()
                    changed.set()
                case CastVote():
                    assert self._voter is not None
                    if self.voting_since_start:
                        self._voter.cast(effect)
                case RequestProposal():
                    self._nursery.start_soon(self._propose, effect)
                case VerifyBlock():
                    self._nursery.start_soon(self._verify, effect)
                case FetchBlock():
                    self._nursery.start_soon(self._fetch, effect)
                case NeedBlocks():
                    self._nursery.start_soon(self._need, effect)
                case CombineFinalization():
                    self._nursery.start_soon(self._combine, effect)
                case Finalized():
                    self._finalize(effect)
                case Halt():
                    log.critical("halted: %s", effect.reason)

    def _send_votes(self, messages: list[Proposal | Vote]) -> None:
        for message in messages:
            if isinstance(message, Proposal):
                self._proposals.sent(message.digest)
            self._network.broadcast(Lane.VOTES, encode(message))

    def _count_vote(self, vote: Vote) -> None:
        self._do(self.engine.own_vote(vote, self._now_ms))

    async def _propose(self, effect: RequestProposal) -> None:
        await trio.lowlevel.checkpoint()
        if self._voter is None or self._ended.is_set():
            return
        proposal = self._proposals.build(effect, self._voter.keys)
        if proposal is None:
            self._do(self.engine.nothing_to_propose(effect, self._now_ms))
        else:
            self._do(self.engine.own_proposal(proposal, self._now_ms))
            self._tell_work()

    async def _verify(self, effect: VerifyBlock) -> None:
        digest = effect.proposal.digest
        if await self._is_overtaken(effect.header):
            return
        verdict = await self._proposals.verdict(effect.proposal, effect.header, (MemberId(effect.header.leader),))
        self._do(self.engine.block_verified(digest, verdict, self._now_ms))

    async def _is_overtaken(self, header: Header) -> bool:
        """Whether what a peer has beyond our log has brought this ledger block; the engine learns of it by
        ``caught_up``."""
        await self.catch_up.applied()
        return header.height <= self._ledger.final.header.height

    async def _fetch(self, effect: FetchBlock) -> None:
        known = self._proposals.get(effect.block)
        if known is None:
            found = await self._proposals.fetch(effect.block, effect.sources)
            if found is not None:
                self._do(self.engine.receive(*found, self._now_ms))
            return
        header = check_proposal(known, self._committee)
        # The engine may have dropped it when it came: it was being told of what is final meanwhile.
        self._do(self.engine.receive(known, MemberId(header.leader), self._now_ms))
        if await self._is_overtaken(header):
            return
        verdict = await self._proposals.verdict(known, header, effect.sources)
        if verdict is not Verdict.MISSING:
            self._do(self.engine.block_verified(effect.block, verdict, self._now_ms))

    async def _need(self, effect: NeedBlocks) -> None:
        target_view = effect.certificate.view
        try:
            while not self._ended.is_set() and self._ledger.final_view < target_view:
                await self.catch_up.reach(self._ledger.final.header.height + 1)
        except Unavailable as error:
            log.info("catching up pauses: %s", error)
        except CertifiedInvalid as error:
            self._stop(str(error))
            return
        self._caught_up()

    async def _combine(self, effect: CombineFinalization) -> None:
        committee, scheme = self._committee, self._scheme
        message = certificate_message(committee.chain_id, committee.epoch, effect.view, effect.block)
        shares = {MemberId(vote.voter): vote.share for vote in effect.votes}
        try:
            payload = await trio.to_thread.run_sync(scheme.combine, message, shares)
        except BadCertificateShares as error:
            log.warning("%s", error)
            self._do(self.engine.combine_failed(effect.view, error.culprits, self._now_ms))
            return
        certificate = Certificate(scheme.name, effect.view, effect.block, committee.epoch, payload)
        own = self.engine.own or MemberId(bytes(32))
        self._do(self.engine.receive(certificate, own, self._now_ms))

    # Finality

    def _finalize(self, effect: Finalized) -> None:
        self._appended(self._ledger.commit(effect.headers, effect.certificate, effect.votes))

    def _appended(self, appended: tuple[Appended, ...]) -> None:
        for block in appended:
            self.counters.blocks_finalized += 1
            self.counters.events_finalized += len(block.events)
            self._undurable.append(block)
            self.undurable.update(event.id for event in block.events)
        if appended:
            self._snapshots.appended()
            self._proposals.appended(appended)
            self._durable_wake.set()
            if self._ledger.committee.epoch != self._committee.epoch:
                self._ended.set()
            if self._nursery is not None:
                self._nursery.start_soon(self._after_appended)

    async def _after_appended(self) -> None:
        await trio.lowlevel.checkpoint()
        self._tell_work()

    async def _keep_durable(self) -> None:
        while True:
            await self._durable_wake.wait()
            self._durable_wake = trio.Event()
            await self._make_durable()

    async def _make_durable(self) -> None:
        blocks, final_view = tuple(self._undurable), self._ledger.final_view
        await trio.to_thread.run_sync(self._ledger.store.sync)
        self._durable_view = final_view
        self._undurable = [block for block in self._undurable if block not in blocks]
        for block in blocks:
            self.undurable.difference_update(event.id for event in block.events)
            self._intake.appended(block.events)

    # Serving

    async def answer(
        self, member: MemberId, request: GetBlocks | GetSnapshot | GetState | GetEvents | GetProposal | GetLastVote
    ) -> bytes:
        """The answer to a peer's request for what the log or the pool holds.

        Raises:
            Rejected: there is none; ``OVERLOADED`` where too many answers wait for their turn.
            Unavailable: it is below a snapshot and not fetched yet.
        """
        match request:
            case GetBlocks():
                return await self._bulk.serve(member, lambda: encode(serve_blocks(self._ledger, request)))
            case GetSnapshot():
                return await self._bulk.serve(member, lambda: encode(self._snapshots.offer(request)))
            case GetState():
                return await self._bulk.serve(member, lambda: encode(self._snapshots.part(request)))
            case GetEvents():
                leaves = request.leaf_hashes
                service = self._event_service.setdefault(member, Service(EVENT_BYTES_PER_SECOND))
                return await service.serve(
                    member,
                    lambda: encode(serve_events(self._proposals.held_events(leaves))),
                    least_bytes=LOOKED_UP_BYTES * len(leaves),
                )
            case GetProposal():
                held = self._proposals.served(Digest(request.block))
                return encode(FoundProposal(encode(held) if held else b""))
            case GetLastVote():
                return encode(LastVote(self._last_votes.of(MemberId(request.voter))))

    async def answer_former(self, member: MemberId, request: object) -> bytes:
        """The answer to a member that left.

        Raises:
            Rejected, Unavailable: as ``serve_former``; ``OVERLOADED`` as ``answer``.
        """
        return await self._bulk.serve(member, lambda: encode(serve_former(self._ledger, member, request)))


def epoch_of(message: Message, chain_id: ChainId) -> int:
    """The epoch that a message says it is of.

    Raises:
        Rejected: as ``decode_header``.
    """
    match message:
        case Proposal():
            return decode_header(message.header, chain_id).epoch
        case Notarization() | Nullification():
            return message.votes[0].epoch
        case _:
            return message.epoch


def _votes_in(message: Message) -> tuple[Vote, ...]:
    """The signed votes a checked message carries."""
    match message:
        case Vote():
            return (message,)
        case Notarization() | Nullification():
            return message.votes
        case _:
            return ()
