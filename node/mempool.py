"""Events that wait to be appended: checked once, kept in order of arrival, bounded.

An event is known by its leaf hash, so that the same content with other signatures is another event. What
it waits for is told by status: ``pending`` here, ``final`` on the log, ``rejected`` with a named reason
(kept for the last ``REJECTED_KEPT`` events, so that a client can ask). A full pool refuses the newest, by
name; it never drops what it accepted. Events that cannot be admitted *yet* (a step whose grant is still on
its way) stay until they are admitted or have waited ``MAX_WAIT_MS`` while the log grew: what waits while it stands
still, for a quorum or for this node's way to one, waits for no event. The pool is bounded either way.

An event waits with its content unfolded, which takes more memory than its bytes: of honest ones up to six times as
much, of one made of the smallest pieces twenty times. So an event counts its bytes, and more where it unfolds to over
``UNFOLDED`` times those. To find out costs a part of what a check does, so the first ``UNMEASURED`` of the pool is
taken without: at worst the pool takes nine times the bytes it is given.

No event that cannot be admitted yet stands in the way of others of its sender: those that no ledger block was tried
with are taken in order of arrival, and every other place is for one that was refused, those tried longest ago first.
So neither an endless stream of new events nor any number of old ones hides an event from the leader: it reaches each
after twice as many tries as events were before it, however often the log grows meanwhile.

Anybody can sign events of a campaign with a job key of their own, which wait for a delegation that never comes. So of
events by job keys that the log does not know clients may have one part in ``ORPHANS`` of the pool, a peer twice that:
it has taken as much itself, and gives it up at another time. An orphan counts as one until its key is delegated.

No peer can fill the pool: one may have as much waiting as is still free, so that one flooding peer holds half of it,
two hold two thirds, and there is always room for another. Proposals take the peers' events in turn. Shares go by who
*brought* an event, which the transport authenticates, not by its author, whom a step names before its job key is
known to be delegated.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from gc import get_referents
from itertools import takewhile
from sys import getsizeof
from typing import NamedTuple

from consensus.event import CheckedEvent, Kind
from consensus.identifiers import Digest, MemberId
from consensus.rejection import Reason, Rejected

REJECTED_KEPT = 10_000
UNFOLDED = 6
UNMEASURED = 8
"""Up to one part in so many of the pool's bytes nothing is measured."""
ORPHANS = 10
"""Up to one part in so many of the pool is for orphans that clients bring."""
MAX_WAIT_MS = 10 * 60 * 1_000
URGENT_KINDS = frozenset(
    {
        Kind.REVOCATION,
        Kind.POLICY,
        Kind.EVIDENCE,
        Kind.DECISION,
        Kind.AUDIT_CHALLENGE,
        Kind.AUDIT_RESULT,
        Kind.MEMBERSHIP,
    }
)
"""Kinds a branch may not omit for long (the censorship rule). A change of members is taken after all others of them:
nothing may follow it in its epoch."""


class Waiting(NamedTuple):
    """An event, when it came (monotonic milliseconds), how long the log had grown by then, the peer that brought it,
    None for a client of this node, the bytes it counts, and the job key it was an orphan of, if it was one."""

    event: CheckedEvent
    since_ms: int
    since_growth_ms: int
    sender: MemberId | None
    size_bytes: int
    orphan_of: bytes


@dataclass(slots=True)
class _Share:
    """What one peer, or this node's clients, brought; each event is in one of the three."""

    urgent: OrderedDict[Digest, CheckedEvent] = field(default_factory=OrderedDict)
    """In order of arrival, but those a ledger block was tried with in vain after the others, in that order."""
    untried: OrderedDict[Digest, CheckedEvent] = field(default_factory=OrderedDict)
    """In order of arrival."""
    refused: OrderedDict[Digest, CheckedEvent] = field(default_factory=OrderedDict)
    """Not to be admitted yet when a ledger block was last tried with them, in that order."""
    held_bytes: int = 0
    orphans: int = 0
    orphan_bytes: int = 0

    def __len__(self) -> int:
        return len(self.urgent) + len(self.untried) + len(self.refused)

    def in_order(self) -> Iterator[CheckedEvent]:
        """Urgent ones, then one untried and one refused in turn."""
        yield from self.urgent.values()
        untried, refused = iter(self.untried.values()), iter(self.refused.values())
        for _ in range(min(len(self.untried), len(self.refused))):
            yield next(untried)
            yield next(refused)
        yield from untried
        yield from refused


class Mempool:
    """Pending events, bounded by number and bytes, and for each peer by what is free."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._waiting: OrderedDict[Digest, Waiting] = OrderedDict()
        self._shares: dict[MemberId | None, _Share] = {}
        self._by_id: dict[Digest, Digest] = {}
        self._fresh: OrderedDict[Digest, int] = OrderedDict()
        """When each event came that ``to_settle`` has not given yet."""
        self._settled: OrderedDict[Digest, int] = OrderedDict()
        """When ``to_settle`` last gave each of the others."""
        self._urgent: OrderedDict[Digest, None] = OrderedDict()
        """In order of arrival, but those a ledger block was tried with in vain after the others, in that order."""
        self._orphans: dict[bytes, set[Digest]] = {}
        """By job key."""
        self._rejected: OrderedDict[Digest, Rejected] = OrderedDict()
        self._held_bytes = 0
        self._growth_ms = 0
        """How long the log has grown since this node was started."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held_bytes(self) -> int:
        """Bytes of all pending events."""
        return self._held_bytes

    def add(self, event: CheckedEvent, now_ms: int, sender: MemberId | None = None, orphan_of: bytes = b"") -> bool:
        """Keep an event that ``sender`` brought, None for a client of this node; False if it is here already.

        ``orphan_of``: the job key that signed it, if the log has no delegation of it.

        Raises:
            Rejected: ``OVERLOADED`` when the pool, the sender's share of it, or that of its orphans, is full;
                ``DUPLICATE`` for other signatures on a pending event.
        """
        if event.leaf_hash in self._waiting:
            return False
        if event.id in self._by_id:
            raise Rejected(Reason.DUPLICATE, f"event {event.id.hex()} waits with other signatures")
        size_bytes = len(event.entry_bytes) + len(event.portions_bytes)
        if self._held_bytes + size_bytes > self._max_bytes // UNMEASURED:
            size_bytes = max(size_bytes, _unfolded_bytes(event) // UNFOLDED)
        waiting = Waiting(event, now_ms, self._growth_ms, sender, size_bytes, orphan_of)
        self.require_room(waiting.size_bytes, sender)
        share = self._shares.get(sender) or _Share()
        if orphan_of:
            self._require_room_for_orphan(size_bytes, sender, share)
            self._orphans.setdefault(orphan_of, set()).add(event.leaf_hash)
            share.orphans += 1
            share.orphan_bytes += size_bytes
        self._rejected.pop(event.id, None)
        self._waiting[event.leaf_hash] = waiting
        self._shares[sender] = share
        (share.urgent if _goes_first(event) else share.untried)[event.leaf_hash] = event
        share.held_bytes += waiting.size_bytes
        self._by_id[event.id] = event.leaf_hash
        self._fresh[event.leaf_hash] = now_ms
        self._held_bytes += waiting.size_bytes
        if event.entry.kind in URGENT_KINDS:
            self._urgent[event.leaf_hash] = None
        return True

    def require_room(self, size_bytes: int, sender: MemberId | None, ahead: tuple[int, int] = (0, 0)) -> None:
        """There is room for an event of this size that ``sender`` brings, None for a client of this node.

        ``ahead``: how many events, of how many bytes, the same sender brings that are to be taken before it.

        Raises:
            Rejected: ``OVERLOADED`` when the pool, or the sender's share of it, is full.
        """
        events, held_bytes = len(self._waiting) + ahead[0], self._held_bytes + ahead[1]
        if sender is not None:
            share = self._shares.get(sender) or _Share()
            events += len(share) + ahead[0]
            held_bytes += share.held_bytes + ahead[1]
        if events >= self._max_events or held_bytes + size_bytes > self._max_bytes:
            raise Rejected(
                Reason.OVERLOADED, f"{len(self._waiting)} events of {self._held_bytes} bytes wait; slow down and retry"
            )

    def _require_room_for_orphan(self, size_bytes: int, sender: MemberId | None, share: _Share) -> None:
        part = ORPHANS if sender is None else ORPHANS // 2
        most_bytes = self._max_bytes // part
        if share.orphans and (
            share.orphans >= self._max_events // part or share.orphan_bytes + size_bytes > most_bytes
        ):
            raise Rejected(
                Reason.OVERLOADED,
                f"{share.orphans} events by job keys that no delegation on the log names wait; retry once it is final",
            )

    def delegated(self, job_key: bytes) -> None:
        """The log knows this key: what waits by it is no orphan any more."""
        for leaf_hash in self._orphans.pop(job_key, ()):
            self._count_no_orphan(self._waiting[leaf_hash])

    def _count_no_orphan(self, waiting: Waiting) -> None:
        share = self._shares[waiting.sender]
        share.orphans -= 1
        share.orphan_bytes -= waiting.size_bytes

    def get(self, leaf_hash: Digest) -> CheckedEvent | None:
        """A pending event."""
        waiting = self._waiting.get(leaf_hash)
        return waiting.event if waiting else None

    def find(self, event_id: Digest) -> CheckedEvent | None:
        """A pending event by id."""
        leaf_hash = self._by_id.get(event_id)
        return self.get(leaf_hash) if leaf_hash else None

    def rejection(self, event_id: Digest) -> Rejected | None:
        """Why an event was rejected, if it was, lately."""
        return self._rejected.get(event_id)

    def candidates(self) -> Iterator[CheckedEvent]:
        """Pending events: one of each sender in turn, a sender's urgent ones first, its others in order of arrival
        and, in every other place, those refused lately."""
        turns = deque(share.in_order() for share in self._shares.values())
        while turns:
            event = next(turns[0], None)
            if event is None:
                turns.popleft()
            else:
                turns.rotate(-1)
                yield event

    def refused(self, leaf_hash: Digest) -> None:
        """A ledger block was tried with a pending event and could not have it yet: its turn is after the others'."""
        waiting = self._waiting.get(leaf_hash)
        if waiting is None:
            return
        share = self._shares[waiting.sender]
        if leaf_hash in self._urgent:
            self._urgent.move_to_end(leaf_hash)
        if _goes_first(waiting.event):
            share.urgent.move_to_end(leaf_hash)
        else:
            share.untried.pop(leaf_hash, None)
            share.refused[leaf_hash] = waiting.event
            share.refused.move_to_end(leaf_hash)

    def urgent_before(self, since_ms: int) -> list[Waiting]:
        """Urgent events that came before ``since_ms``: in order of arrival, but those ``refused`` after the others."""
        return [waiting for leaf in self._urgent if (waiting := self._waiting[leaf]).since_ms < since_ms]

    def to_settle(self, since_ms: int, now_ms: int, most: int) -> list[CheckedEvent]:
        """At most ``most`` events that have waited since ``since_ms`` or before without being given here.

        Those never given come first, so that no number of events that wait for others can hide them.
        """
        found: list[Digest] = []
        for queue in (self._fresh, self._settled):
            while queue and len(found) < most and next(iter(queue.values())) < since_ms:
                found.append(queue.popitem(last=False)[0])
        self._settled.update((leaf, now_ms) for leaf in found)
        return [self._waiting[leaf].event for leaf in found]

    def remove(self, leaf_hash: Digest) -> None:
        """Forget a pending event: it is on the log."""
        waiting = self._waiting.pop(leaf_hash, None)
        if waiting is not None:
            share = self._shares[waiting.sender]
            siblings = self._orphans.get(waiting.orphan_of, set())
            if leaf_hash in siblings:
                self._count_no_orphan(waiting)
                siblings.remove(leaf_hash)
                if not siblings:
                    del self._orphans[waiting.orphan_of]
            for queue in (share.urgent, share.untried, share.refused):
                queue.pop(leaf_hash, None)
            share.held_bytes -= waiting.size_bytes
            if not share:
                del self._shares[waiting.sender]
            self._fresh.pop(leaf_hash, None)
            self._settled.pop(leaf_hash, None)
            self._by_id.pop(waiting.event.id, None)
            self._urgent.pop(leaf_hash, None)
            self._held_bytes -= waiting.size_bytes

    def reject(self, event: CheckedEvent, why: Rejected) -> None:
        """Forget a pending event for good, remembering why."""
        self.remove(event.leaf_hash)
        # Not what was raised: its traceback holds the event, and all that was at hand where it was judged.
        self._rejected[event.id] = Rejected(why.reason, why.detail)
        while len(self._rejected) > REJECTED_KEPT:
            self._rejected.popitem(last=False)

    def log_grew(self, for_ms: int) -> None:
        """So much more time has passed in which the log grew: only that counts as waited for other events."""
        self._growth_ms += for_ms

    def too_old(self) -> list[CheckedEvent]:
        """Events that have waited too long for what they need, oldest first."""
        latest_ms = self._growth_ms - MAX_WAIT_MS
        return [
            waiting.event for waiting in takewhile(lambda one: one.since_growth_ms <= latest_ms, self._waiting.values())
        ]


def _goes_first(event: CheckedEvent) -> bool:
    return event.entry.kind in URGENT_KINDS and event.entry.kind is not Kind.MEMBERSHIP


def _unfolded_bytes(event: CheckedEvent) -> int:
    """What the content of an event takes in memory, decoded; small integers take nothing, Python has them already."""
    total_bytes = 0
    level: list[object] = [event.portions, event.items, event.governance, event.operation]
    while level:
        total_bytes += sum(map(getsizeof, level))
        level = [
            found
            for found in get_referents(*level)
            if not isinstance(found, type) and not (found.__class__ is int and found <= 256)
        ]
    return total_bytes
