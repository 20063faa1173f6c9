"""Events that wait to be appended: checked once, kept in order of arrival, bounded.

An event is known by its leaf hash, so that the same content with other signatures is another event. What
it waits for is told by status: ``pending`` here, ``final`` on the log, ``rejected`` with a named reason
(kept for the last ``REJECTED_KEPT`` events, so that a client can ask). A full pool refuses the newest, by
name; it never drops what it accepted. Events that cannot be admitted *yet* (a step whose grant is still on
its way) stay until they are admitted or older than ``MAX_WAIT_MS``.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from consensus.event import CheckedEvent, Kind
from consensus.identifiers import Digest
from consensus.rejection import Reason, Rejected

REJECTED_KEPT = 10_000
MAX_WAIT_MS = 10 * 60 * 1_000
URGENT_KINDS = frozenset({Kind.REVOCATION, Kind.POLICY})
"""Kinds a branch may not omit for long (the censorship rule)."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An event and when it came (monotonic milliseconds)."""

    event: CheckedEvent
    since_ms: int

    @property
    def size_bytes(self) -> int:
        """Its size on the wire."""
        return len(self.event.entry_bytes) + len(self.event.portions_bytes)


class Mempool:
    """Pending events, bounded by number and bytes."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._waiting: OrderedDict[Digest, Waiting] = OrderedDict()
        self._by_id: dict[Digest, Digest] = {}
        self._urgent: set[Digest] = set()
        self._rejected: OrderedDict[Digest, Rejected] = OrderedDict()
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held_bytes(self) -> int:
        """Bytes of all pending events."""
        return self._held_bytes

    def add(self, event: CheckedEvent, now_ms: int) -> bool:
        """Keep an event; False if it is here already.

        Raises:
            Rejected: ``OVERLOADED`` when the pool is full; ``DUPLICATE`` for other signatures on a pending event.
        """
        if event.leaf_hash in self._waiting:
            return False
        if event.id in self._by_id:
            raise Rejected(Reason.DUPLICATE, f"event {event.id.hex()} waits with other signatures")
        waiting = Waiting(event, now_ms)
        if len(self._waiting) >= self._max_events or self._held_bytes + waiting.size_bytes > self._max_bytes:
            raise Rejected(
                Reason.OVERLOADED, f"{len(self._waiting)} events of {self._held_bytes} bytes wait; slow down and retry"
            )
        self._rejected.pop(event.id, None)
        self._waiting[event.leaf_hash] = waiting
        self._by_id[event.id] = event.leaf_hash
        self._held_bytes += waiting.size_bytes
        if event.entry.kind in URGENT_KINDS:
            self._urgent.add(event.leaf_hash)
        return True

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
        """Pending events in order of arrival, urgent ones first."""
        urgent = [self._waiting[leaf].event for leaf in self._waiting if leaf in self._urgent] if self._urgent else []
        yield from urgent
        for leaf, waiting in self._waiting.items():
            if leaf not in self._urgent:
                yield waiting.event

    def urgent_before(self, since_ms: int) -> list[CheckedEvent]:
        """Urgent events that came before ``since_ms``."""
        held = (self._waiting[leaf] for leaf in sorted(self._urgent))
        return [waiting.event for waiting in held if waiting.since_ms < since_ms]

    def waiting_since(self, since_ms: int, most: int) -> list[CheckedEvent]:
        """The oldest events that came before ``since_ms``, at most ``most``."""
        found: list[CheckedEvent] = []
        for waiting in self._waiting.values():
            if waiting.since_ms >= since_ms or len(found) == most:
                break
            found.append(waiting.event)
        return found

    def remove(self, leaf_hash: Digest) -> None:
        """Forget a pending event: it is on the log."""
        waiting = self._waiting.pop(leaf_hash, None)
        if waiting is not None:
            self._by_id.pop(waiting.event.id, None)
            self._urgent.discard(leaf_hash)
            self._held_bytes -= waiting.size_bytes

    def reject(self, event: CheckedEvent, why: Rejected) -> None:
        """Forget a pending event for good, remembering why."""
        self.remove(event.leaf_hash)
        self._rejected[event.id] = why
        while len(self._rejected) > REJECTED_KEPT:
            self._rejected.popitem(last=False)

    def expire(self, now_ms: int) -> list[CheckedEvent]:
        """Reject events that have waited too long for what they need."""
        expired = []
        for waiting in list(self._waiting.values()):
            if now_ms - waiting.since_ms < MAX_WAIT_MS:
                break
            expired.append(waiting.event)
            self.reject(waiting.event, Rejected(Reason.SEQUENCE_GAP, "waited too long for the events before it"))
        return expired
