"""The host of the BFT engine: carries out its effects over network, journal and disk.

One trio task reads what peers send, votes before events, checks it and feeds the engine. The engine answers
with effects: those that only compute are done at once, those that wait (journal, fetch, combine) run as
tasks and feed their result back. All engine calls happen on the trio thread, never across an ``await``.

Rules that depend on this voter's own clock live here, not in ``apply``: a proposal whose timestamp is too far
from ours, or whose branch omits an urgent event we have held for ``censorship_ms``, is refused our vote but
not called invalid.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from consensus.admission import admit
from consensus.block import Header
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
from consensus.event import CheckedEvent, check_event, pack_parts
from consensus.identifiers import Digest, MemberId
from consensus.rejection import InvariantBroken, Reason, Rejected, Unavailable
from consensus.state import StateView
from consensus.transition import LedgerState, build, is_final
from consensus.vote import (
    Notarization,
    Nullification,
    Proposal,
    Stalled,
    Vote,
    check_notarization,
    check_nullification,
    check_proposal,
    check_stalled,
    check_vote,
    sign_proposal,
)
from node.catchup import CatchUp, CertifiedInvalid, serve_blocks, serve_events
from node.clock import Clock
from node.intake import Intake
from node.ledger import Finalized as Appended
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import Events, FoundProposal, GetBlocks, GetEvents, GetLastVote, GetProposal, LastVote
from node.network import Lane, Network, Received
from node.voter import HeldBlock, Voter

log = logging.getLogger("countersign.replica")

MAX_MESSAGE_BYTES = 1 << 20
MAX_BLOCK_BYTES = 2 << 20
FETCH_SECONDS = 5.0
ARRIVAL_SECONDS = 0.03
"""How long a proposal waits for its events to arrive by gossip before they are asked for."""
PROPOSALS_KEPT = 256
ASK_AGAIN_SECONDS = 0.2
PEERS_LOOKED_AT_SECONDS = 0.2
VOTES_LOOKED_BACK = 1_000
"""Ledger blocks looked through for a member's last vote before saying that it never voted."""


@dataclass(slots=True)
class ReplicaCounters:
    """What the metrics endpoint shows of the round."""

    messages: int = 0
    messages_refused: int = 0
    blocks_finalized: int = 0
    events_finalized: int = 0
    evidence: int = 0


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
    ) -> None:
        self._ledger = ledger
        self._network = network
        self._mempool = mempool
        self._intake = intake
        self._clock = clock
        self._voter = voter
        self._parameters = ledger.genesis.parameters
        self.counters = ReplicaCounters()
        self.catch_up = CatchUp(ledger, network, self._appended)
        self.engine = Engine(
            ledger.committee,
            voter.keys.member if voter else None,
            timing,
            ledger.final.header,
            ledger.certificate,
        )
        self._nursery: trio.Nursery | None = None
        self._deadline_ms: int | None = None
        self._timer_changed = trio.Event()
        self._proposals: dict[Digest, Proposal] = {}
        self._suspects: dict[Digest, CheckedEvent] = {}
        self._blocked: set[Digest] = set()
        self._durable_wake = trio.Event()
        self._undurable: list[Appended] = []
        self.undurable: set[Digest] = set()
        """Ids of events appended but not yet synced to disk: not final for anyone who asks."""
        self._had_work = False
        self._stopped: str | None = None
        self.voting_since_start = voter is not None
        self.why_not_voting = ""
        self._last_votes: dict[MemberId, Vote] = {}

    @property
    def halted(self) -> str | None:
        """Why the replica stopped for good, if it did."""
        return self._stopped or self.engine.halted

    async def run(self) -> None:
        """Take part until cancelled.

        Raises:
            InvariantBroken: journal or disk failed; the process must stop.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_durable)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._watch_intake)
            nursery.start_soon(self._watch_peers)
            if self._voter is not None:
                restored = self._voter.restored()
                self._intake.restore(restored.events)
                self.engine.restore(restored.votes, restored.proposals)
                for proposal in restored.proposals:
                    self._remember(proposal)
                nursery.start_soon(self._vote, self._voter)
            self._do(self.engine.start(self._now_ms))
            async for received in self._network.incoming:
                self._take(received)

    async def _vote(self, voter: Voter) -> None:
        """Cast votes, once peers enough for a quorum know of none of ours that the journal lacks."""
        if not await self._journal_is_whole(voter):
            return
        await voter.run(self._held_block, self._send_votes, self._count_vote, lambda: self.engine.finalized.view)

    async def _journal_is_whole(self, voter: Voter) -> bool:
        """Ask peers for our own last vote until those who know of none beyond the journal are, with us, a quorum."""
        own = voter.keys.member
        clear = {own}
        while not self._ledger.committee.has_quorum(clear):
            for peer in sorted(self._network.connected - clear):
                try:
                    answer = await self._network.request(peer, encode(GetLastVote(own)), FETCH_SECONDS)
                    vote = decode(answer, LastVote, MAX_MESSAGE_BYTES).vote
                    if vote is not None:
                        check_vote(vote, self._ledger.committee)
                except (Unavailable, Rejected) as error:
                    log.debug("own last vote from %s: %s", peer.hex()[:16], error)
                    continue
                if vote is not None and vote.voter == own and vote.view > voter.highest_view:
                    self.voting_since_start = False
                    self.why_not_voting = (
                        f"the vote journal ends at view {voter.highest_view}, but this identity voted in view "
                        f"{vote.view}: it was lost or restored from an old copy and must not vote until rotated"
                    )
                    log.critical("this node does not vote: %s", self.why_not_voting)
                    return False
                clear.add(peer)
            await trio.sleep(ASK_AGAIN_SECONDS)
        return True

    def _held_block(self, block: Digest) -> HeldBlock:
        built = self._ledger.overlays.get(block)
        proposal = self._proposals.get(block)
        if built is None or proposal is None:
            raise InvariantBroken(f"asked to notarize ledger block {block.hex()}, which is not held")
        return HeldBlock(proposal, tuple(pack_parts(event.entry_bytes, event.portions_bytes) for event in built.events))

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
        if self._stopped is not None:
            return
        try:
            if received.lane is Lane.EVENTS:
                self._intake.receive(received.member, received.frame)
            else:
                message: Message = decode(received.frame, Message, MAX_MESSAGE_BYTES)  # type: ignore[arg-type]
                if not self.engine.wants(message):
                    return
                self._check(message)
                if isinstance(message, Proposal):
                    self._remember(message)
                elif isinstance(message, Vote):
                    self._note_vote(message)
                self._do(self.engine.receive(message, received.member, self._now_ms))
        except Rejected as error:
            self.counters.messages_refused += 1
            log.debug("message of %s refused: %s", received.member.hex()[:16], error)

    def _check(self, message: Message) -> None:
        committee = self._ledger.committee
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
                verify_certificate(self._ledger.scheme, committee.chain_id, message)
            case Stalled():
                check_stalled(message, committee)

    def _note_vote(self, vote: Vote) -> None:
        voter = MemberId(vote.voter)
        held = self._last_votes.get(voter)
        if held is None or vote.view >= held.view:
            self._last_votes[voter] = vote

    def _remember(self, proposal: Proposal) -> None:
        self._proposals[proposal.digest] = proposal
        while len(self._proposals) > PROPOSALS_KEPT:
            del self._proposals[next(iter(self._proposals))]

    async def _watch_intake(self) -> None:
        while True:
            arrived = self._intake.arrived
            if len(self._mempool) and not self._had_work:
                self._tell_work()
            await arrived.wait()

    async def _catch_up_with(self, peers: Iterable[MemberId]) -> None:
        """Append what a peer that has just connected has beyond our log, without waiting for the next round."""
        try:
            if await self.catch_up.from_peers(sorted(peers)) and self._ledger.certificate is not None:
                self._do(self.engine.caught_up(self._ledger.final.header, self._ledger.certificate, self._now_ms))
        except CertifiedInvalid as error:
            self._stop(str(error))

    async def _watch_peers(self) -> None:
        """Catch up with a peer that came, offer it pending events again; let those go that waited too long."""
        connected: frozenset[MemberId] = frozenset()
        while True:
            await trio.sleep(PEERS_LOOKED_AT_SECONDS)
            now = self._network.connected
            if now - connected:
                await self._catch_up_with(now - connected)
                if len(self._mempool):
                    self._intake.offer_again()
            connected = now
            for event in self._mempool.expire(self._now_ms):
                self._blocked.discard(event.leaf_hash)

    def _tell_work(self) -> None:
        work = self._has_work()
        if work:
            self._do(self.engine.work_available(self._now_ms))
        elif self._had_work:
            self._do(self.engine.work_exhausted(self._now_ms))
        self._had_work = work

    def _has_work(self) -> bool:
        """Whether an event waits that is neither blocked nor in flight; by counting alone while many wait."""
        bodies = [built.body.leaf_hashes for built in self._ledger.overlays.values()]
        if len(self._mempool) > len(self._blocked) + sum(map(len, bodies)):
            return True
        passed_over = self._blocked.union(*bodies)
        return any(event.leaf_hash not in passed_over for event in self._mempool.candidates())

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
            if self._stopped is not None:
                return
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
                case PublishEvidence():
                    self.counters.evidence += 1
                    log.warning("a member equivocated: %s", type(effect.evidence).__name__)
                case Halt():
                    log.critical("halted: %s", effect.reason)

    def _send_votes(self, messages: list[Proposal | Vote]) -> None:
        for message in messages:
            self._network.broadcast(Lane.VOTES, encode(message))

    def _count_vote(self, vote: Vote) -> None:
        self._do(self.engine.own_vote(vote, self._now_ms))

    async def _propose(self, effect: RequestProposal) -> None:
        await trio.lowlevel.checkpoint()
        parent = self._ledger.state_of(effect.parent.digest)
        if parent is None or self._voter is None:
            return
        in_flight = self._in_flight(parent)
        built = build(
            parent,
            (
                event
                for event in self._mempool.candidates()
                if event.leaf_hash not in in_flight and event.leaf_hash not in self._blocked
            ),
            view=effect.view,
            leader=self._voter.keys.member,
            timestamp_ms=self._clock.now_ms(),
            committee=self._ledger.committee,
            max_events=self._parameters.max_block_events,
            max_bytes=MAX_BLOCK_BYTES,
        )
        self._blocked.update(event.leaf_hash for event, _ in built.refused)
        self._suspects.update((event.leaf_hash, event) for event, why in built.refused if is_final(why))
        self._ledger.keep(built)
        proposal = sign_proposal(built.state.header, built.body, self._voter.keys.identity.sign)
        self._remember(proposal)
        self._do(self.engine.own_proposal(proposal, self._now_ms))
        self._settle_suspects()
        self._tell_work()

    def _in_flight(self, state: LedgerState) -> set[bytes]:
        """Leaf hashes on the branch above the finalized head."""
        leaves: set[bytes] = set()
        built = self._ledger.overlays.get(state.digest)
        while built is not None:
            leaves.update(built.body.leaf_hashes)
            built = self._ledger.overlays.get(Digest(built.state.header.parent))
        return leaves

    async def _verify(self, effect: VerifyBlock) -> None:
        digest = effect.proposal.digest
        verdict = await self._verdict(effect.proposal, effect.header, effect.parent)
        self._do(self.engine.block_verified(digest, verdict, self._now_ms))

    async def _verdict(self, proposal: Proposal, header: Header, parent_header: Header) -> Verdict:
        leaves = [Digest(leaf) for leaf in proposal.body.leaf_hashes]
        events = await self._gather(leaves, (MemberId(header.leader),))
        if events is None:
            return Verdict.MISSING
        parent = self._ledger.state_of(parent_header.digest)
        if parent is None:
            return Verdict.MISSING
        try:
            self._ledger.verify(parent, header, proposal.body, events)
        except Rejected as error:
            log.warning("ledger block of view %d is invalid: %s", header.view, error)
            return Verdict.INVALID
        size_bytes = sum(len(event.entry_bytes) + len(event.portions_bytes) for event in events)
        if len(events) > self._parameters.max_block_events or size_bytes > MAX_BLOCK_BYTES:
            log.warning(
                "ledger block of view %d has %d events, %d bytes: too many", header.view, len(events), size_bytes
            )
            return Verdict.REFUSED
        if abs(header.timestamp_ms - self._clock.now_ms()) > self._parameters.max_clock_skew_ms:
            log.warning(
                "ledger block of view %d has timestamp %d ms, too far from ours", header.view, header.timestamp_ms
            )
            return Verdict.REFUSED
        if self._censored(header):
            return Verdict.REFUSED
        return Verdict.VALID

    def _censored(self, header: Header) -> bool:
        """Whether the branch omits an urgent event we have held too long and that it could append."""
        urgent = self._mempool.urgent_before(self._now_ms - self._parameters.censorship_ms)
        if not urgent:
            return False
        state = self._ledger.state_of(header.digest)
        assert state is not None
        in_flight = self._in_flight(state)
        for event in urgent:
            if event.leaf_hash in in_flight:
                continue
            try:
                admit(StateView(state.state), event, header.timestamp_ms, self._ledger.committee)
            except Rejected:
                continue
            log.warning("ledger block of view %d omits %s %s", header.view, event.entry.kind.value, event.id.hex())
            return True
        return False

    async def _gather(self, leaves: list[Digest], sources: tuple[MemberId, ...]) -> list[CheckedEvent] | None:
        """The events by leaf hash: from the pool, from gossip still under way, then from peers."""
        found: dict[Digest, CheckedEvent] = {}
        with trio.move_on_after(ARRIVAL_SECONDS):
            while True:
                arrived = self._intake.arrived
                found.update((leaf, event) for leaf in leaves if (event := self._mempool.get(leaf)) is not None)
                if len(found) == len(leaves):
                    break
                await arrived.wait()
        connected = self._network.connected
        for peer in dict.fromkeys((*(source for source in sources if source in connected), *sorted(connected))):
            missing = [leaf for leaf in leaves if leaf not in found and self._mempool.get(leaf) is None]
            found.update((leaf, event) for leaf in leaves if (event := self._mempool.get(leaf)) is not None)
            if not missing:
                break
            try:
                answer = await self._network.request(peer, encode(GetEvents(tuple(missing))), FETCH_SECONDS)
                for encoded in decode(answer, Events, 2 * MAX_BLOCK_BYTES).events:
                    event = check_event(encoded, self._ledger.committee)
                    found[event.leaf_hash] = event
            except (Unavailable, Rejected) as error:
                log.debug("events from %s: %s", peer.hex()[:16], error)
        if any(leaf not in found for leaf in leaves):
            return None
        return [found[leaf] for leaf in leaves]

    async def _fetch(self, effect: FetchBlock) -> None:
        proposal = self._proposals.get(effect.block)
        if proposal is not None:
            await self._fetch_events(proposal, effect.sources)
            return
        for peer in self._askable(effect.sources):
            try:
                answer = await self._network.request(peer, encode(GetProposal(effect.block)), FETCH_SECONDS)
                found = decode(answer, FoundProposal, MAX_MESSAGE_BYTES).proposal
                if not found:
                    continue
                proposal = decode(found, Proposal, MAX_MESSAGE_BYTES)
                check_proposal(proposal, self._ledger.committee)
                if proposal.digest != effect.block:
                    raise Rejected(Reason.BAD_BLOCK, "another ledger block than the one asked for")
            except (Unavailable, Rejected) as error:
                log.debug("proposal from %s: %s", peer.hex()[:16], error)
                continue
            self._remember(proposal)
            self._do(self.engine.receive(proposal, peer, self._now_ms))
            return

    async def _fetch_events(self, proposal: Proposal, sources: tuple[MemberId, ...]) -> None:
        header = check_proposal(proposal, self._ledger.committee)
        parent = self._ledger.state_of(Digest(header.parent))
        if parent is None:
            return
        leaves = [Digest(leaf) for leaf in proposal.body.leaf_hashes]
        if await self._gather(leaves, sources) is None:
            return
        verdict = await self._verdict(proposal, header, parent.header)
        if verdict is not Verdict.MISSING:
            self._do(self.engine.block_verified(proposal.digest, verdict, self._now_ms))

    def _askable(self, sources: Iterable[MemberId]) -> list[MemberId]:
        connected = self._network.connected
        return list(dict.fromkeys([*(source for source in sources if source in connected), *sorted(connected)]))

    async def _need(self, effect: NeedBlocks) -> None:
        target_view = effect.certificate.view
        try:
            while self._ledger.final.header.view < target_view:
                await self.catch_up.reach(self._ledger.final.header.height + 1)
        except Unavailable as error:
            log.info("catching up pauses: %s", error)
        except CertifiedInvalid as error:
            self._stop(str(error))
            return
        certificate = self._ledger.certificate
        if certificate is not None:
            self._do(self.engine.caught_up(self._ledger.final.header, certificate, self._now_ms))

    async def _combine(self, effect: CombineFinalization) -> None:
        committee, scheme = self._ledger.committee, self._ledger.scheme
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
            for event in block.events:
                self._mempool.remove(event.leaf_hash)
                self._blocked.discard(event.leaf_hash)
                self._suspects.pop(event.leaf_hash, None)
            self._undurable.append(block)
            self.undurable.update(event.id for event in block.events)
        if any(block.events for block in appended):
            self._blocked.clear()
        if appended:
            self._settle_suspects()
            self._durable_wake.set()
            if self._nursery is not None:
                self._nursery.start_soon(self._after_appended)

    async def _after_appended(self) -> None:
        await trio.lowlevel.checkpoint()
        self._tell_work()

    def _settle_suspects(self) -> None:
        """Reject for good what the finalized state itself refuses for good."""
        if not self._suspects:
            return
        final = self._ledger.final
        for leaf_hash, event in list(self._suspects.items()):
            try:
                admit(
                    StateView(final.state),
                    event,
                    max(final.header.timestamp_ms, self._clock.now_ms()),
                    self._ledger.committee,
                )
            except Rejected as error:
                if is_final(error):
                    self._intake.rejected(event, error)
                    self._blocked.discard(leaf_hash)
                    del self._suspects[leaf_hash]
                    continue
            if not self._ledger.overlays:
                del self._suspects[leaf_hash]

    async def _keep_durable(self) -> None:
        while True:
            await self._durable_wake.wait()
            self._durable_wake = trio.Event()
            blocks, self._undurable = self._undurable, []
            await trio.to_thread.run_sync(self._ledger.store.sync)
            for block in blocks:
                self.undurable.difference_update(event.id for event in block.events)
                self._intake.appended(block.events)

    # Serving

    async def answer(self, member: MemberId, request: GetBlocks | GetEvents | GetProposal | GetLastVote) -> bytes:
        """The answer to a peer's request for what the log or the pool holds."""
        match request:
            case GetBlocks():
                return encode(serve_blocks(self._ledger, request))
            case GetEvents():
                return encode(serve_events(self._ledger, self._held, request))
            case GetProposal():
                held = self._proposals.get(Digest(request.block))
                return encode(FoundProposal(encode(held) if held else b""))
            case GetLastVote():
                return encode(LastVote(self._last_vote(MemberId(request.voter))))

    def _last_vote(self, voter: MemberId) -> Vote | None:
        """The latest vote of a member: of this run, or kept behind the last ledger blocks."""
        height = self._ledger.final.header.height
        for behind in range(min(VOTES_LOOKED_BACK, height)):
            if voter in self._last_votes:
                break
            for vote in self._ledger.votes(height - behind):
                self._note_vote(vote)
        return self._last_votes.get(voter)

    def _held(self, leaf_hash: Digest) -> bytes | None:
        event = self._mempool.get(leaf_hash)
        if event is not None:
            return pack_parts(event.entry_bytes, event.portions_bytes)
        for built in self._ledger.overlays.values():
            for event in built.events:
                if event.leaf_hash == leaf_hash:
                    return pack_parts(event.entry_bytes, event.portions_bytes)
        index = self._ledger.store.index_of_leaf(leaf_hash)
        return pack_parts(*self._ledger.event(index)) if index is not None else None
