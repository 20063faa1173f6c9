"""Events on their way to the log: checked once, pooled, passed on, and told about.

An event enters through the API (``submit``) or by gossip (``receive``); either way ``check_event`` runs once.
What was submitted here is flooded to all peers, many events to a frame when many wait (no timer: whatever
has gathered while the last frame was written goes into the next). What peers brought is not passed on, but for urgent
events that wait (``proposals``). Whoever waits for an event to be final is
woken when its ledger block is durable.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress

import trio

from consensus.event import SHAPES, CheckedEvent, SignedEvent, check_each, check_event, check_parts, pack_parts, unpack
from consensus.identifiers import Digest, MemberId
from consensus.merkle import leaf_hash
from consensus.rejection import Reason, Rejected
from consensus.state import DELEGATION_TABLE
from node.clock import Clock
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import in_turns, pack_gossip, unpack_gossip
from node.network import Lane, Network

log = logging.getLogger("countersign.intake")

FINALITY_SAMPLES = 2_000
FETCHED_KEPT = 10_000
"""How many of the events that peers were asked for are remembered, to know them when gossip brings them."""


class Intake:
    """The pool's only door."""

    def __init__(self, ledger: Ledger, mempool: Mempool, network: Network, clock: Clock, max_event_bytes: int) -> None:
        self._ledger = ledger
        self._mempool = mempool
        self._network = network
        self._clock = clock
        self._max_event_bytes = max_event_bytes
        self._outgoing: list[bytes] = []
        self._outgoing_wake = trio.Event()
        self._waiters: dict[Digest, trio.Event] = {}
        self._submitted_ms: OrderedDict[Digest, int] = OrderedDict()
        self._fetched: OrderedDict[bytes, None] = OrderedDict()
        """Leaf hashes, oldest first."""
        self.arrived = trio.Event()
        self.finality_ms: list[int] = []
        """Milliseconds from submission here to durable finality here, the last ``FINALITY_SAMPLES``."""
        self.on_final: Callable[[float], None] = lambda seconds: None
        """Told the seconds each event submitted here took."""
        self.refused: dict[str, int] = {}
        """Events refused, by reason."""

    def submit(self, encoded: bytes) -> CheckedEvent:
        """Take an event from a client; pass it on to all peers.

        Raises:
            Rejected: the rule it breaks, ``DUPLICATE`` if it is on the log, ``OVERLOADED``.
        """
        (answer,) = self.submit_each((encoded,))
        if isinstance(answer, Rejected):
            raise answer.anew()
        return answer

    def submit_each(self, encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
        """``submit`` of a few events, in order; where one is refused, why."""
        answers: list[CheckedEvent | Rejected] = []
        for event, one in zip(self._check_each(encoded), encoded, strict=True):
            answer = event
            if isinstance(event, CheckedEvent):
                try:
                    if self._pool(event, None, self._orphan_of(event)):
                        self._taken(event, one)
                except Rejected as error:
                    answer = _told(error)
            if isinstance(answer, Rejected):
                self._count(answer)
            answers.append(answer)
        return answers

    def _taken(self, event: CheckedEvent, encoded: bytes) -> None:
        self._tell_arrival()
        self._submitted_ms[event.id] = self._clock.monotonic_ms()
        if len(self._submitted_ms) > 4 * FINALITY_SAMPLES:
            self._submitted_ms.popitem(last=False)
        self.pass_on(encoded)

    def pass_on(self, encoded: bytes) -> None:
        """Send an event to all peers."""
        self._outgoing.append(encoded)
        self._outgoing_wake.set()

    def take_outgoing(self) -> list[bytes]:
        """What is to be sent to all peers, once."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def receive(self, sender: MemberId, frame: bytes) -> int:
        """Take gossip; returns how many events were new. Bad ones are counted, the rest taken.

        Raises:
            Rejected: ``MALFORMED``, ``OVERSIZED`` for what is no frame of ``pack_gossip``.
        """
        news = self._news(sender, unpack_gossip(frame))
        taken = 0
        for event in check_each(news, self._ledger.committee):
            if isinstance(event, Rejected):
                self._refuse(sender, event)
                continue
            try:
                taken += self._pool(event, sender, self._orphan_of(event))
            except Rejected as error:
                self._refuse(sender, error)
        if taken:
            self._tell_arrival()
        return taken

    def _news(self, sender: MemberId, copies: Iterable[bytes]) -> list[SignedEvent]:
        """What of a peer's gossip is to be checked.

        The check is most of what an event costs, so what is known is not checked again, and what there is no room for
        not at all: a peer that repeats what is true, or sends without end, has that for nothing.
        """
        news: dict[bytes, SignedEvent] = {}
        size_bytes = 0
        for encoded in copies:
            try:
                self._check_size(encoded)
                wire = unpack(encoded)
                leaf = leaf_hash(wire.entry)
                if leaf in news or self._is_known(leaf):
                    continue
                wire_bytes = len(wire.entry) + len(wire.portions)
                self._mempool.require_room(wire_bytes, sender, (len(news), size_bytes))
                news[leaf] = wire
                size_bytes += wire_bytes
            except Rejected as error:
                self._refuse(sender, error)
        return list(news.values())

    def _is_known(self, leaf: Digest) -> bool:
        return (
            leaf in self._fetched
            or self._mempool.get(leaf) is not None
            or self._ledger.store.index_of_leaf(leaf) is not None
        )

    def _count(self, refusal: Rejected) -> None:
        self.refused[refusal.reason.value] = self.refused.get(refusal.reason.value, 0) + 1

    def _refuse(self, sender: MemberId, error: Rejected) -> None:
        self._count(error)
        self._network.complain(sender, error)

    def take_fetched(self, encoded: bytes, sender: MemberId, asked: Container[bytes]) -> CheckedEvent:
        """An event that a peer was asked for: pooled, so that it is not checked again when it comes by gossip.

        It is returned even where the pool does not take it, for its size or for want of room: a ledger block is judged
        by it.

        Raises:
            Rejected: the rule it breaks; ``BAD_FIELD`` for one whose leaf hash nobody ``asked`` for.
        """
        wire = unpack(encoded)
        leaf = leaf_hash(wire.entry)
        if leaf not in asked:
            raise Rejected(Reason.BAD_FIELD, f"an event with leaf hash {leaf.hex()}, which was not asked for")
        event = check_parts(wire.entry, wire.portions, self._ledger.committee)
        with suppress(Rejected):
            self._check_size(encoded)
            if self._pool(event, sender, self._orphan_of(event)):
                self._fetched[leaf] = None
                if len(self._fetched) > FETCHED_KEPT:
                    self._fetched.popitem(last=False)
                self._tell_arrival()
        return event

    def restore(self, events: Iterable[bytes]) -> None:
        """Take back what the vote journal kept: events of ledger blocks this member voted for.

        None is an orphan: the delegation may be in such a ledger block, too.
        """
        for encoded in events:
            try:
                self._pool(self.check(encoded), None)
            except Rejected as error:
                log.warning("an event of the vote journal is refused: %s", error)
        self._tell_arrival()

    def check(self, encoded: bytes) -> CheckedEvent:
        """Check an event without pooling it.

        Raises:
            Rejected: the rule it breaks.
        """
        self._check_size(encoded)
        return check_event(encoded, self._ledger.committee)

    def _check_each(self, encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
        answers: dict[int, CheckedEvent | Rejected] = {}
        wires: dict[int, SignedEvent] = {}
        for place, one in enumerate(encoded):
            try:
                self._check_size(one)
                wires[place] = unpack(one)
            except Rejected as error:
                answers[place] = _told(error)
        answers.update(zip(wires, check_each(wires.values(), self._ledger.committee), strict=True))
        return [answers[place] for place in range(len(encoded))]

    def _orphan_of(self, event: CheckedEvent) -> bytes:
        """The job key that signed it, if the log has no delegation of it yet; else nothing."""
        if not SHAPES[event.entry.kind].signed_by_job:
            return b""
        signer = event.entry.signatures[0].signer
        return signer if self._ledger.final.state.get(DELEGATION_TABLE + signer) is None else b""

    def _pool(self, event: CheckedEvent, sender: MemberId | None, orphan_of: bytes = b"") -> bool:
        """False if it is here, or on the log, already."""
        if self._ledger.store.index_of_event(event.id) is not None:
            return False
        return self._mempool.add(event, self._clock.monotonic_ms(), sender, orphan_of)

    def _check_size(self, encoded: bytes) -> None:
        if len(encoded) > self._max_event_bytes:
            raise Rejected(Reason.OVERSIZED, f"{len(encoded)} bytes, at most {self._max_event_bytes} allowed")

    def _tell_arrival(self) -> None:
        arrived, self.arrived = self.arrived, trio.Event()
        arrived.set()

    def begin_epoch(self) -> None:
        """Check what waits by the members of the new epoch: nothing of one that left is admitted any more."""
        for event in tuple(self._mempool.candidates()):
            try:
                self.check(pack_parts(event.entry_bytes, event.portions_bytes))
            except Rejected as error:
                self.rejected(event, error)

    async def run(self) -> None:
        """Flood submitted events until cancelled."""
        while True:
            await self._outgoing_wake.wait()
            self._outgoing_wake = trio.Event()
            while self._outgoing:
                for turn in in_turns(self.take_outgoing()):
                    self._network.broadcast(Lane.EVENTS, pack_gossip(turn))
                    await trio.lowlevel.checkpoint()

    async def offer(self, peer: MemberId) -> None:
        """Send a peer that came (back) what waits here."""
        waiting = (pack_parts(event.entry_bytes, event.portions_bytes) for event in tuple(self._mempool.candidates()))
        for turn in in_turns(waiting):
            if peer not in self._network.connected:
                return
            self._network.send(peer, Lane.EVENTS, pack_gossip(turn))
            await trio.lowlevel.checkpoint()

    def appended(self, events: tuple[CheckedEvent, ...]) -> None:
        """These are durable on the log: forget them and wake whoever waits."""
        now_ms = self._clock.monotonic_ms()
        for event in events:
            since_ms = self._submitted_ms.pop(event.id, None)
            if since_ms is not None:
                self.finality_ms.append(now_ms - since_ms)
                self.on_final((now_ms - since_ms) / 1_000)
            self._tell(event.id)
        del self.finality_ms[:-FINALITY_SAMPLES]

    def rejected(self, event: CheckedEvent, why: Rejected) -> None:
        """This can never be admitted: say so to whoever waits."""
        self._mempool.reject(event, why)
        self._submitted_ms.pop(event.id, None)
        self._count(why)
        self._tell(event.id)

    async def wait(self, event_id: Digest) -> None:
        """Until the event is durable on the log or rejected; the caller bounds the time and asks which."""
        waiter = self._waiters.setdefault(event_id, trio.Event())
        try:
            await waiter.wait()
        finally:
            if self._waiters.get(event_id) is waiter and not waiter.statistics().tasks_waiting:
                del self._waiters[event_id]

    def _tell(self, event_id: Digest) -> None:
        waiter = self._waiters.pop(event_id, None)
        if waiter is not None:
            waiter.set()


def _told(error: Rejected) -> Rejected:
    """As an answer. Tracebacks, its own and its causes', hold the frames that hold it, and the event: a cycle."""
    return error.anew()
