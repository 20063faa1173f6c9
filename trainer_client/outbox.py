"""The outbox: what the job has to say, on disk until the log has it.

The job runs ahead of finality, so an event is written here before training goes on, and leaves only when a
node has said what became of it::

    queued ──> accepted ──> final
       │  ^        │ │
       │  └────────┘ │          a node that lost what it accepted is told again
       └─────────────┴──> rejected(reason, detail)

* **Durable.** SQLite in WAL mode with ``synchronous=FULL``: ``put`` returns after an fsync. A killed process
  loses nothing it put, and half of a ``put`` never happens.
* **In order.** Events leave in the order they were put.
* **Exactly once.** By event id: putting one again changes nothing.
* **Bounded, policy BLOCK.** At most ``maximum_bytes`` of unsettled events are held. A full outbox, or a full
  disk, makes ``put`` wait: the job slows down, nothing is lost. A wait that reaches its limit raises
  ``OutboxFull``. Settled events keep a row of about a hundred bytes and give their own bytes back. To note what became
  of an event takes room on the disk, too: without it ``OutboxFull`` is raised and nothing has changed. That does not
  wait, as nobody but the node gives the fate of an event: whoever was told asks again.
* **One owner.** A second process that opens the same file is refused.

Delivery is left to ``delivery.py``; what to say, to ``record.py``.
"""

import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from consensus.rejection import Unavailable

DEFAULT_MAXIMUM_BYTES = 1 << 30
DISK_FULL_RETRY_SECONDS = 0.5


class State(StrEnum):
    """What is known of an event's fate."""

    QUEUED = "queued"
    ACCEPTED = "accepted"
    FINAL = "final"
    REJECTED = "rejected"


class OutboxFull(Unavailable):
    """No room within the time allowed, or none on the disk for a change; nothing was changed and nothing was lost."""


class OutboxInUse(Unavailable):
    """Another process has the outbox open."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An event on its way: its place in the order, its id and its wire form."""

    position: int
    id: bytes
    event: bytes


@dataclass(frozen=True, slots=True)
class Fate:
    """What is known of one event; ``reason`` and ``detail`` are empty unless it was rejected."""

    position: int
    id: bytes
    state: State
    reason: str
    detail: str


class Outbox:
    """A durable queue of events in the file at ``path``. Its methods may be called from any thread.

    ``accept``, ``requeue_accepted``, ``finalize``, ``finalize_accepted_through`` and ``reject`` raise ``OutboxFull``
    where the disk is full, and have then changed nothing.

    Raises:
        OutboxInUse: another process has it open.
    """

    def __init__(self, path: Path, maximum_bytes: int = DEFAULT_MAXIMUM_BYTES) -> None:
        self._maximum_bytes = maximum_bytes
        self._changed = threading.Condition()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=0.0)
        try:
            for statement in _SET_UP:
                self._connection.execute(statement)
        except sqlite3.OperationalError as error:
            self._connection.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                raise OutboxInUse(f"{path} is open in another process") from error
            raise
        row = self._connection.execute("SELECT COALESCE(SUM(LENGTH(event)), 0) FROM events").fetchone()
        self._held_bytes: int = row[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. What it holds stays for the next process."""
        with self._changed:
            self._connection.close()

    @property
    def held_bytes(self) -> int:
        """Bytes of the events that are not settled."""
        with self._changed:
            return self._held_bytes

    def put(self, events: Sequence[tuple[bytes, bytes]], timeout_seconds: float | None = None) -> None:
        """Put (id, wire form) pairs, all or none, on disk before this returns. Waits while there is no room.

        An event larger than the whole outbox is put when the outbox is empty.

        Raises:
            OutboxFull: there was no room for ``timeout_seconds``; ``None`` waits for ever.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        needed_bytes = sum(len(event) for _, event in events)
        with self._changed:
            while True:
                if self._held_bytes == 0 or self._held_bytes + needed_bytes <= self._maximum_bytes:
                    if self._insert(events):
                        self._changed.notify_all()
                        return
                    pause_seconds: float | None = DISK_FULL_RETRY_SECONDS
                else:
                    pause_seconds = None
                left_seconds = None if deadline is None else deadline - time.monotonic()
                if left_seconds is not None and left_seconds <= 0:
                    raise OutboxFull(
                        f"{self._held_bytes} bytes of events are unsettled, {self._maximum_bytes} are allowed or"
                        f" the disk is full; {needed_bytes} more were to be put"
                    )
                limits = [limit for limit in (pause_seconds, left_seconds) if limit is not None]
                self._changed.wait(min(limits) if limits else None)

    def queued(
        self, maximum_events: int, maximum_bytes: int, before_position: int | None = None
    ) -> tuple[Outgoing, ...]:
        """The oldest queued events, in order; at least one if there is any (before a position, where one is given)."""
        chosen: list[Outgoing] = []
        size_bytes = 0
        with self._changed:
            rows = self._connection.execute(
                "SELECT position, id, event FROM events WHERE state = 'queued' AND position < ?"
                " ORDER BY position LIMIT ?",
                (_LAST_POSITION if before_position is None else before_position, maximum_events),
            )
            for position, identifier, event in rows:
                size_bytes += len(event)
                if chosen and size_bytes > maximum_bytes:
                    break
                chosen.append(Outgoing(position, identifier, event))
        return tuple(chosen)

    def oldest_and_newest_accepted(self) -> tuple[Outgoing, Outgoing] | None:
        """The two ends of what a node has accepted and not settled, or None."""
        query = "SELECT position, id, event FROM events WHERE state = 'accepted' ORDER BY position {} LIMIT 1"
        with self._changed:
            oldest = self._connection.execute(query.format("ASC")).fetchone()
            newest = self._connection.execute(query.format("DESC")).fetchone()
        return None if oldest is None else (Outgoing(*oldest), Outgoing(*newest))

    def is_settled_before(self, position: int) -> bool:
        """Whether the fate of every event before a position is known."""
        with self._changed:
            row = self._connection.execute(
                "SELECT 1 FROM events WHERE state IN ('queued', 'accepted') AND position < ? LIMIT 1", (position,)
            ).fetchone()
        return row is None

    def accept(self, identifiers: Sequence[bytes]) -> None:
        """A node has them pending."""
        self._move("UPDATE events SET state = 'accepted' WHERE id = ? AND state = 'queued'", identifiers)

    def requeue_accepted(self) -> None:
        """Everything accepted is queued again: the node does not know it any more, or not all of it."""
        self._move("UPDATE events SET state = 'queued' WHERE state = 'accepted' AND ? = ''", [""])

    def finalize(self, identifiers: Sequence[bytes]) -> None:
        """They are on the log."""
        self._move(
            "UPDATE events SET state = 'final', event = x'' WHERE id = ? AND state IN ('queued', 'accepted')",
            identifiers,
        )

    def finalize_accepted_through(self, position: int) -> None:
        """Every accepted event up to a position is on the log."""
        self._move(
            "UPDATE events SET state = 'final', event = x'' WHERE position <= ? AND state = 'accepted'",
            [position],
        )

    def reject(self, identifiers: Sequence[bytes], reason: str, detail: str) -> None:
        """They will never be on the log, and why: a node's words, of which what is no character is kept as "?"."""
        self._move(
            "UPDATE events SET state = 'rejected', event = x'', reason = ?2, detail = ?3"
            " WHERE id = ?1 AND state IN ('queued', 'accepted')",
            identifiers,
            tuple(said.encode(errors="replace").decode() for said in (reason, detail)),
        )

    def fate(self, identifier: bytes) -> Fate | None:
        """What is known of an event; None for one that was never put."""
        with self._changed:
            row = self._connection.execute(_FATE + " WHERE id = ?", (identifier,)).fetchone()
        return None if row is None else _fate(row)

    def event(self, identifier: bytes) -> bytes:
        """An event's wire form; empty once its fate is settled.

        Raises:
            KeyError: it was never put.
        """
        with self._changed:
            row = self._connection.execute("SELECT event FROM events WHERE id = ?", (identifier,)).fetchone()
        if row is None:
            raise KeyError(identifier.hex())
        encoded: bytes = row[0]
        return encoded

    def unsettled(self) -> tuple[Fate, ...]:
        """Every event whose fate is open, in order."""
        with self._changed:
            rows = self._connection.execute(
                _FATE + " WHERE state IN ('queued', 'accepted') ORDER BY position"
            ).fetchall()
        return tuple(_fate(row) for row in rows)

    def wait_settled(self, identifier: bytes, timeout_seconds: float | None = None) -> Fate:
        """Wait until an event is final or rejected, or the time is over, and say what is known of it.

        Raises:
            KeyError: it was never put.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                row = self._connection.execute(_FATE + " WHERE id = ?", (identifier,)).fetchone()
                if row is None:
                    raise KeyError(identifier.hex())
                fate = _fate(row)
                left_seconds = None if deadline is None else deadline - time.monotonic()
                if fate.state in (State.FINAL, State.REJECTED) or (left_seconds is not None and left_seconds <= 0):
                    return fate
                self._changed.wait(left_seconds)

    def wait_changed(self, timeout_seconds: float) -> None:
        """Wait until something is put or settled, or the time is over."""
        with self._changed:
            self._changed.wait(timeout_seconds)

    def _insert(self, events: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether there was room on the disk."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            added_bytes = 0
            for identifier, event in events:
                cursor = self._connection.execute(
                    "INSERT OR IGNORE INTO events (id, event, state) VALUES (?, ?, 'queued')", (identifier, event)
                )
                added_bytes += len(event) if cursor.rowcount else 0
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._undo(error):
                return False
            raise
        self._held_bytes += added_bytes
        return True

    def _undo(self, error: BaseException) -> bool:
        """End a transaction that failed; whether it may succeed later, for it failed at the disk."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        full = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in full

    def _move(self, statement: str, keys: Sequence[bytes | int | str], extra: tuple[str, ...] = ()) -> None:
        with self._changed:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                for key in keys:
                    self._connection.execute(statement, (key, *extra))
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._undo(error):
                    raise OutboxFull(f"what became of events cannot be written to the disk: {error}") from error
                raise
            row = self._connection.execute(
                "SELECT COALESCE(SUM(LENGTH(event)), 0) FROM events WHERE state IN ('queued', 'accepted')"
            ).fetchone()
            self._held_bytes = row[0]
            self._changed.notify_all()


_SET_UP = (
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "CREATE TABLE IF NOT EXISTS events ("
    " position INTEGER PRIMARY KEY AUTOINCREMENT,"
    " id BLOB NOT NULL UNIQUE,"
    " event BLOB NOT NULL,"
    " state TEXT NOT NULL CHECK (state IN ('queued', 'accepted', 'final', 'rejected')),"
    " reason TEXT NOT NULL DEFAULT '',"
    " detail TEXT NOT NULL DEFAULT '')",
    "CREATE INDEX IF NOT EXISTS unsettled ON events (state, position) WHERE state IN ('queued', 'accepted')",
)

_LAST_POSITION = (1 << 63) - 1

_FATE = "SELECT position, id, state, reason, detail FROM events"


def _fate(row: tuple[int, bytes, str, str, str]) -> Fate:
    return Fate(row[0], row[1], State(row[2]), row[3], row[4])
