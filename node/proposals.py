"""Ledger blocks on their way to finality: what goes into ours, whether others' may have our vote.

A proposal lists its events by leaf hash; they came by gossip before it, or are asked for. Whether it is valid is
``transition.apply``'s to say. What depends on this voter's own clock is said here, and never makes a ledger block
invalid: a timestamp too far from ours, more than the network's limits, or a ledger block that omits an urgent event we
have held for ``censorship_ms``, is refused our vote.

An event is omitted only if the leader could have appended it: it is admissible after the parent and after the ledger
block itself, the parent takes events at all, and there was room. A full ledger block is excused if all of it is urgent
and we have held all of it for half as long; leaders therefore put first, oldest first, what they have held so long.
Without these exceptions what has waited through a long partition would be refused in every order and at every size.

A traitor may have told one member alone of an urgent event; then that member would refuse the ledger blocks of all
others, who cannot know why. So urgent events that have waited for a tenth of ``censorship_ms`` and could be appended
are passed on, once: others have them long before anybody refuses a ledger block that lacks them.
"""

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import trio

from consensus.admission import admit
from consensus.block import Header
from consensus.branches import Verdict
from consensus.codec import decode, encode
from consensus.effect import RequestProposal
from consensus.event import CheckedEvent, Kind, pack_parts
from consensus.identifiers import Digest, MemberId
from consensus.portions import Delegation
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state import StateView
from consensus.transition import LedgerState, build, is_final, takes_events
from consensus.vote import Proposal, check_proposal, sign_proposal
from node.clock import Clock
from node.intake import Intake
from node.ledger import Finalized, Ledger
from node.mempool import Mempool, Waiting
from node.messages import Events, FoundProposal, GetEvents, GetProposal, in_turns
from node.network import Network
from node.voter import HeldBlock, VotingKeys

log = logging.getLogger("countersign.proposals")

MAX_PROPOSAL_BYTES = 1 << 20
MAX_BLOCK_BYTES = 2 << 20
FETCH_SECONDS = 5.0
SILENT_SECONDS = 0.3
"""After which the next peer is asked as well: a view does not wait for those who say nothing."""
ARRIVAL_SECONDS = 0.1
MOST_ARRIVAL_SECONDS = 0.2
"""How long a proposal waits for its next event to arrive by gossip, and for all, before those missing are asked for: to
ask for what is on its way costs both sides more than anything else they do. For all, half of a view's default timeout:
a member that trickles a leader's events to the others must not make its views fail."""
PROPOSALS_KEPT = 128
FINAL_KEPT = 32
"""Of those whose ledger block is final, for peers a second or two behind; others have it from the log. Full ones take
100 KB each."""
TRIED_PER_EVENT = 4
"""For each event a ledger block may have, how many that wait are tried: one full of events that cannot be admitted yet
must not take longer than the view."""
BUILT_WITHIN_MS = 100
"""How long a leader takes over a ledger block. All others take as long to judge it and vote on nothing else meanwhile;
of steps that list thousands of examples one of a thousand events would take seconds."""
SETTLE_AFTER_MS = 1_000
SETTLED_AT_ONCE = 256
SETTLED_WHILE_MOVING = 16
"""Of a backlog that is being appended most events wait for their turn, not for what will never be."""
GROWTH_MS = 60_000
"""How long the log at most counts as having grown for one ledger block, where the heartbeat is longer still."""
NOT_YET_TRIED = 256
"""How many urgent events of one sender are tried in vain for one ledger block, the next ones for the next: a member may
sign any number that wait for what never comes."""
MOVING_MS = 2_000
"""How long after events were appended the others count as such a backlog: several views."""


async def ask_in_turn(peers: Iterable[MemberId], ask: Callable[[MemberId], Awaitable[bool]]) -> None:
    """Ask one peer after the other, the next one also once the last is silent, until one has what is wanted."""
    async with trio.open_nursery() as nursery:

        async def answered_by(peer: MemberId, answered: trio.Event) -> None:
            if await ask(peer):
                nursery.cancel_scope.cancel()
            answered.set()

        for peer in peers:
            answered = trio.Event()
            nursery.start_soon(answered_by, peer, answered)
            with trio.move_on_after(SILENT_SECONDS):
                await answered.wait()


class Proposals:
    """Builds, judges, fetches and remembers proposals."""

    def __init__(self, ledger: Ledger, network: Network, mempool: Mempool, intake: Intake, clock: Clock) -> None:
        self._ledger = ledger
        self._network = network
        self._mempool = mempool
        self._intake = intake
        self._clock = clock
        self._parameters = ledger.genesis.parameters
        self._proposals: dict[Digest, Proposal] = {}
        self._final: deque[Digest] = deque()
        """Of the last final ledger blocks, oldest first: those whose proposals are kept."""
        self._unsent: set[Digest] = set()
        """Those of ours that are not sent, hence perhaps not on disk yet."""
        self._blocked: set[Digest] = set()
        """Events that could not be appended at the last try; tried again once the log has grown."""
        self._grown_ms = clock.monotonic_ms()
        """On the monotonic clock, when the log last grew."""
        self._passed_on: set[Digest] = set()
        """Urgent events that wait and that peers have been told of."""
        self._pass_on_at_ms = 0
        """On the monotonic clock, when to look for others next."""
        self._judged: Digest | None = None
        """The last ledger block judged that applies."""
        self._moving_until_ms = 0
        """On the monotonic clock, until when what waits counts as a backlog that is being appended."""
        self.clocks_ahead_ms: dict[str, int] = {}
        """By leader, how far the timestamp of its newest ledger block was ahead of our clock when we judged it."""

    def remember(self, proposal: Proposal) -> None:
        """Keep a checked proposal, to judge it, serve it and journal it."""
        self._proposals[proposal.digest] = proposal
        while len(self._proposals) > PROPOSALS_KEPT:
            oldest = next(iter(self._proposals))
            del self._proposals[oldest]
            self._unsent.discard(oldest)

    def get(self, block: Digest) -> Proposal | None:
        """A proposal of late, by its ledger block's digest."""
        return self._proposals.get(block)

    def sent(self, block: Digest) -> None:
        """Our proposal of that ledger block is on disk and on its way."""
        self._unsent.discard(block)

    def served(self, block: Digest) -> Proposal | None:
        """``get`` for a peer: none of ours before it is on disk, or who guesses its digest has it signed, and after a
        crash we sign another.
        """
        return None if block in self._unsent else self.get(block)

    def held_block(self, block: Digest) -> HeldBlock | None:
        """What the journal keeps with a notarize vote; None once the log has passed that ledger block by."""
        built = self._ledger.overlays.get(block)
        proposal = self._proposals.get(block)
        if built is None or proposal is None:
            return None
        return HeldBlock(proposal, tuple(pack_parts(event.entry_bytes, event.portions_bytes) for event in built.events))

    def held_events(self, leaf_hashes: Iterable[bytes]) -> Iterator[bytes]:
        """Signed events by leaf hash: those waiting, on a branch, or on the log."""
        branches = {event.leaf_hash: event for built in self._ledger.overlays.values() for event in built.events}
        for leaf_hash in map(Digest, leaf_hashes):
            event = self._mempool.get(leaf_hash) or branches.get(leaf_hash)
            if event is not None:
                yield pack_parts(event.entry_bytes, event.portions_bytes)
            elif (index := self._ledger.store.index_of_leaf(leaf_hash)) is not None:
                yield pack_parts(*self._ledger.event(index))

    # Ours

    def has_work(self) -> bool:
        """Whether an event waits that is not blocked; by counting alone while many wait."""
        if len(self._mempool) > len(self._blocked):
            return True
        return any(event.leaf_hash not in self._blocked for event in self._mempool.candidates())

    def build(self, effect: RequestProposal, keys: VotingKeys) -> Proposal | None:
        """A signed proposal of the events that wait; an empty one only if it may be, or if none can be admitted yet.

        None where there is nothing to propose, or its parent is gone meanwhile.
        """
        parent = self._ledger.state_of(effect.parent.digest)
        if parent is None:
            return None
        timestamp_ms = max(self._clock.now_ms(), parent.header.timestamp_ms)
        pressing = self._pressing(parent, timestamp_ms, self._parameters.censorship_ms // 2)
        passed_over = self._in_flight(parent) | self._blocked | {event.leaf_hash for event in pressing}
        waiting = (event for event in self._mempool.candidates() if event.leaf_hash not in passed_over)
        tried = self._for_a_while(islice(waiting, TRIED_PER_EVENT * self._parameters.max_block_events))
        first = tuple(islice(tried, 1))
        if not pressing and not first and not effect.may_be_empty:
            return None
        built = build(
            parent,
            chain(pressing, first, tried),
            view=effect.view,
            leader=keys.member,
            timestamp_ms=timestamp_ms,
            committee=self._ledger.committee,
            max_events=self._parameters.max_block_events,
            max_bytes=MAX_BLOCK_BYTES,
        )
        for event, _ in built.refused:
            self._blocked.add(event.leaf_hash)
            self._mempool.refused(event.leaf_hash)
        self._ledger.keep(built)
        proposal = sign_proposal(built.state.header, built.body, keys.identity.sign)
        self.remember(proposal)
        self._unsent.add(proposal.digest)
        return proposal

    def _for_a_while(self, events: Iterable[CheckedEvent]) -> Iterator[CheckedEvent]:
        """The first of these, as far as there is time to try them."""
        end_ms = self._clock.monotonic_ms() + BUILT_WITHIN_MS
        for event in events:
            yield event
            if self._clock.monotonic_ms() >= end_ms:
                return

    def _in_flight(self, state: LedgerState) -> set[bytes]:
        """Leaf hashes on the branch above the finalized head."""
        leaves: set[bytes] = set()
        built = self._ledger.overlays.get(state.digest)
        while built is not None:
            leaves.update(built.body.leaf_hashes)
            built = self._ledger.overlays.get(Digest(built.state.header.parent))
        return leaves

    def appended(self, blocks: Sequence[Finalized]) -> None:
        """These are on the log: their events wait no more, and what was blocked may be tried again."""
        self._count_growth(blocks)
        for block in blocks:
            self._final.append(block.header.digest)
            if len(self._final) > FINAL_KEPT:
                self._proposals.pop(self._final.popleft(), None)
            for event in block.events:
                self._mempool.remove(event.leaf_hash)
                if isinstance(event.operation, Delegation):
                    self._mempool.delegated(event.operation.job_key)
            if block.events:
                self._blocked.clear()
                self._moving_until_ms = self._clock.monotonic_ms() + MOVING_MS

    def _count_growth(self, blocks: Sequence[Finalized]) -> None:
        """Of the time since the log last grew, one heartbeat counts: while a quorum works none takes longer.

        Not of a ledger block from long ago: while we catch up, what waits here may be final beyond it.
        """
        now_ms, parameters = self._clock.monotonic_ms(), self._parameters
        most_ms = min(parameters.heartbeat_ms, GROWTH_MS)
        latest_ms = max((block.header.timestamp_ms for block in blocks), default=0)
        if latest_ms >= self._clock.now_ms() - parameters.max_clock_skew_ms - most_ms:
            self._mempool.log_grew(min(now_ms - self._grown_ms, most_ms))
        self._grown_ms = now_ms

    def settle(self) -> None:
        """Reject what has waited a while and the finalized state itself refuses for good, and what is too old."""
        now_ms = self._clock.monotonic_ms()
        for event in self._mempool.too_old():
            self._reject(event, Rejected(Reason.SEQUENCE_GAP, "waited too long for the events before it"))
        final = self._ledger.final
        timestamp_ms = max(final.header.timestamp_ms, self._clock.now_ms())
        most = SETTLED_WHILE_MOVING if now_ms < self._moving_until_ms else SETTLED_AT_ONCE
        for event in self._mempool.to_settle(now_ms - SETTLE_AFTER_MS, now_ms, most):
            try:
                admit(StateView(final.state), event, timestamp_ms, self._ledger.committee)
            except Rejected as error:
                if is_final(error):
                    self._reject(event, error)
        if now_ms >= self._pass_on_at_ms:
            self._pass_on_at_ms = now_ms + self._parameters.censorship_ms // 20
            self._pass_on_pressing()

    def _pass_on_pressing(self) -> None:
        """Tell all peers of urgent events that have waited a while and could be appended."""
        self._passed_on = {leaf for leaf in self._passed_on if self._mempool.get(leaf) is not None}
        newest = None if self._judged is None else self._ledger.state_of(self._judged)
        state = newest or self._ledger.final
        timestamp_ms = max(state.header.timestamp_ms, self._clock.now_ms())
        for event in self._pressing(state, timestamp_ms, self._parameters.censorship_ms // 10):
            if event.leaf_hash not in self._passed_on:
                self._pass_on(event)

    def _pass_on(self, event: CheckedEvent) -> None:
        self._passed_on.add(event.leaf_hash)
        self._intake.pass_on(pack_parts(event.entry_bytes, event.portions_bytes))

    def _reject(self, event: CheckedEvent, why: Rejected) -> None:
        self._blocked.discard(event.leaf_hash)
        self._intake.rejected(event, why)

    # Others'

    async def verdict(self, proposal: Proposal, header: Header, sources: Iterable[MemberId]) -> Verdict:
        """Whether a checked proposal may have our vote; its branch is kept if it is valid."""
        leaves = [Digest(leaf) for leaf in proposal.body.leaf_hashes]
        events = await self._gather(leaves, sources)
        return Verdict.MISSING if events is None else self.judge(proposal, header, events)

    def judge(self, proposal: Proposal, header: Header, events: list[CheckedEvent]) -> Verdict:
        """``verdict`` with the ledger block's events in hand, in order."""
        parent = self._ledger.state_of(Digest(header.parent))
        if parent is None:
            return Verdict.MISSING
        try:
            self._ledger.verify(parent, header, proposal.body, events)
        except Rejected as error:
            log.warning("ledger block of view %d is invalid: %s", header.view, error)
            return Verdict.INVALID
        self._judged = header.digest
        size_bytes = sum(len(event.entry_bytes) + len(event.portions_bytes) for event in events)
        if len(events) > self._parameters.max_block_events or size_bytes > MAX_BLOCK_BYTES:
            log.warning(
                "ledger block of view %d has %d events, %d bytes: too many", header.view, len(events), size_bytes
            )
            return Verdict.REFUSED
        ahead_ms = header.timestamp_ms - self._clock.now_ms()
        leader = self._ledger.epochs.member(MemberId(header.leader)).name
        self.clocks_ahead_ms[leader] = ahead_ms
        if abs(ahead_ms) > self._parameters.max_clock_skew_ms:
            log.warning(
                "ledger block of view %d by %s is %d ms %s our clock, at most %d allowed: one clock is wrong, %s",
                header.view,
                leader,
                abs(ahead_ms),
                "ahead of" if ahead_ms > 0 else "behind",
                self._parameters.max_clock_skew_ms,
                "its or ours" if ahead_ms > 0 else "or it comes from before an outage",
            )
            return Verdict.REFUSED
        if self._censored(parent, header, events, size_bytes):
            return Verdict.REFUSED
        return Verdict.VALID

    def _pressing(self, parent: LedgerState, timestamp_ms: int, held_ms: int) -> list[CheckedEvent]:
        """Urgent events held for ``held_ms`` that a child of ``parent`` could append, in order of arrival, changes of
        members last. Where many are tried in vain the next look is at others.
        """
        urgent = self._mempool.urgent_before(self._clock.monotonic_ms() - held_ms)
        if not urgent or not takes_events(parent, self._ledger.committee):
            return []
        in_flight, found = self._in_flight(parent), list[Waiting]()
        in_vain = Counter[MemberId | None]()
        for waiting in urgent:
            event = waiting.event
            if event.leaf_hash in in_flight or in_vain[waiting.sender] == NOT_YET_TRIED:
                continue
            if self._is_admissible(parent, event, timestamp_ms):
                found.append(waiting)
            else:
                in_vain[waiting.sender] += 1
                self._mempool.refused(event.leaf_hash)
        found.sort(key=lambda one: (one.event.entry.kind is Kind.MEMBERSHIP, one.since_ms))
        return [waiting.event for waiting in found]

    def _is_admissible(self, state: LedgerState, event: CheckedEvent, timestamp_ms: int) -> bool:
        try:
            admit(StateView(state.state), event, timestamp_ms, self._ledger.committee)
        except Rejected:
            return False
        return True

    def _censored(self, parent: LedgerState, header: Header, events: list[CheckedEvent], size_bytes: int) -> bool:
        """Whether a ledger block omits an urgent event we have held too long and that it could append."""
        listed = {event.leaf_hash for event in events}
        after = self._ledger.state_of(header.digest)
        assert after is not None
        for event in self._pressing(parent, header.timestamp_ms, self._parameters.censorship_ms):
            if event.leaf_hash in listed or not self._is_admissible(after, event, header.timestamp_ms):
                continue
            if self._is_full(events, size_bytes) and self._have_pressed(events):
                return False
            log.warning("ledger block of view %d omits %s %s", header.view, event.entry.kind.value, event.id.hex())
            self._pass_on(event)  # again, if need be: whoever refused it may have been short of room
            return True
        return False

    def _is_full(self, events: list[CheckedEvent], size_bytes: int) -> bool:
        """Whether an event of any size that is taken may have found no room."""
        limits = self._parameters
        return len(events) >= limits.max_block_events or size_bytes + limits.max_event_bytes > MAX_BLOCK_BYTES

    def _have_pressed(self, events: list[CheckedEvent]) -> bool:
        """Whether there are events, all urgent, and each would be put first by us, too."""
        since_ms = self._clock.monotonic_ms() - self._parameters.censorship_ms // 2
        held = {waiting.event.leaf_hash for waiting in self._mempool.urgent_before(since_ms)}
        return bool(events) and held.issuperset(event.leaf_hash for event in events)

    async def _gather(self, leaves: list[Digest], sources: Iterable[MemberId]) -> list[CheckedEvent] | None:
        """The events by leaf hash: from the pool, from gossip still under way, then from peers."""
        found: dict[Digest, CheckedEvent] = {}

        def missing() -> list[Digest]:
            """Those that are not found yet, once the pool was looked through for them."""
            lacking = [leaf for leaf in leaves if leaf not in found]
            found.update((leaf, event) for leaf in lacking if (event := self._mempool.get(leaf)) is not None)
            return [leaf for leaf in lacking if leaf not in found]

        latest = trio.current_time() + MOST_ARRIVAL_SECONDS
        with trio.move_on_after(ARRIVAL_SECONDS) as patience:
            while True:
                arrived, before = self._intake.arrived, len(found)
                if not missing():
                    break
                if len(found) > before:
                    patience.deadline = min(latest, trio.current_time() + ARRIVAL_SECONDS)
                await arrived.wait()

        async def ask(peer: MemberId) -> bool:
            wanted = missing()
            if not wanted:
                return True
            asked = frozenset(wanted)
            try:
                answer = await self._network.request(peer, encode(GetEvents(tuple(wanted))), FETCH_SECONDS)
                for turn in in_turns(decode(answer, Events, 2 * MAX_BLOCK_BYTES).events):
                    for encoded in turn:
                        event = self._intake.take_fetched(encoded, peer, asked)
                        found[event.leaf_hash] = event
                    await trio.lowlevel.checkpoint()
            except (Unavailable, Rejected) as error:
                log.debug("events from %s: %s", peer.hex()[:16], error)
            return all(leaf in found for leaf in leaves)

        if len(found) < len(leaves):  # else without a pause: the vote waits for this
            await ask_in_turn(self._askable(sources), ask)
            if missing():  # gossip may have brought the rest while the last one asked was silent
                return None
        return [found[leaf] for leaf in leaves]

    async def fetch(self, block: Digest, sources: Iterable[MemberId]) -> tuple[Proposal, MemberId] | None:
        """A proposal by its ledger block's digest and the peer that had it; None if nobody has."""
        held: list[tuple[Proposal, MemberId]] = []

        async def ask(peer: MemberId) -> bool:
            try:
                answer = await self._network.request(peer, encode(GetProposal(block)), FETCH_SECONDS)
                found = decode(answer, FoundProposal, MAX_PROPOSAL_BYTES).proposal
                if not found:
                    return False
                proposal = decode(found, Proposal, MAX_PROPOSAL_BYTES)
                check_proposal(proposal, self._ledger.committee)
                if proposal.digest != block:
                    raise Rejected(Reason.BAD_BLOCK, "another ledger block than the one asked for")
            except (Unavailable, Rejected) as error:
                log.debug("proposal from %s: %s", peer.hex()[:16], error)
                return False
            held.append((proposal, peer))
            return True

        await ask_in_turn(self._askable(sources), ask)
        if not held:
            return None
        self.remember(held[0][0])
        return held[0]

    def _askable(self, sources: Iterable[MemberId]) -> list[MemberId]:
        connected = self._network.connected
        return list(dict.fromkeys([*(source for source in sources if source in connected), *sorted(connected)]))
