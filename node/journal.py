"""The vote journal: a vote is on disk before it is sent.

A member that forgets a vote may vote twice in a view, and two votes in one view are what forks a
history. Rules:

* ``append`` returns after ``fsync``; creation and compaction sync the directory too. Several votes of one
  turn share one sync. Both block: call them in a worker thread.
* The journal is created once, with the identity it belongs to. A missing, damaged, shortened or rolled-back
  journal raises ``JournalLost``: this identity never votes again until its owner rotates it. The node goes
  on as a non-voting one.
* The only damage a crash can leave is an incomplete last record: it was never acknowledged, and it is cut
  off. A complete record that fails its checksum is damage wherever it stands. A record's frame has its own
  checksum, so that a damaged length never passes for a torn tail.

A shortened journal looks like a torn tail. ``VoteMark`` (highest view, records ever written) is therefore
also kept in the store, written after the journal; ``check_not_lost`` compares it with what the journal
knows. Restoring journal and store together from an older copy is visible only in peers' memory of this
member's votes (``last_votes.py``).

Compaction forgets, and the database may be lost afterwards: then the journal does not say any more what was
voted in views that are not final now. ``first_view`` is where its memory begins; below it nothing is voted.

File: 96-byte head (magic, chain id, identity, highest view and number of records dropped by compaction,
8 bytes of SHA-256), then records: length u32, view u64, CRC-32 of both, payload, SHA-256 over the previous
checksum, frame and payload. The chaining makes a removed or reordered record damage as well.
"""

import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from consensus.identifiers import ChainId, MemberId
from consensus.rejection import ConfigError, InvariantBroken
from node.files import replace_private, write_fully

MAX_RECORD_BYTES = 8 << 20
ROTATE = "this identity must not vote until it is rotated"
JOURNAL_FILE = "votes.journal"
"""Its name in the data directory, in epoch 0."""


def journal_file(epoch: int) -> str:
    """The journal of an epoch: a journal serves one, and those of ended epochs stay, never to be written again."""
    return JOURNAL_FILE if epoch == 0 else f"votes.epoch-{epoch}.journal"


_MAGIC = b"CSVOTES1"
_HEAD = struct.Struct(">8s32s32sQQ")
_HEAD_CHECK_BYTES = 8
_HEAD_BYTES = _HEAD.size + _HEAD_CHECK_BYTES
_FRAME = struct.Struct(">IQ")
_CRC = struct.Struct(">I")
_FRAME_BYTES = _FRAME.size + _CRC.size
_CHECK_BYTES = 32


class JournalLost(ConfigError):
    """This identity's memory of its votes is lost or damaged; it must not vote until rotated."""


@dataclass(frozen=True, slots=True)
class VoteRecord:
    """One journalled vote: the view it was cast in and its bytes."""

    view: int
    vote: bytes


@dataclass(frozen=True, slots=True)
class VoteMark:
    """How far a journal has come: its highest view and how many records were ever written."""

    ENCODED_BYTES: ClassVar[int] = 16

    view: int
    records: int

    def encode(self) -> bytes:
        """16 bytes, for ``Store.write_vote_mark``."""
        return self.view.to_bytes(8, "big") + self.records.to_bytes(8, "big")

    @classmethod
    def decode(cls, encoded: bytes) -> "VoteMark":
        """The mark of ``encode``'s bytes.

        Raises:
            InvariantBroken: not 16 bytes.
        """
        if len(encoded) != cls.ENCODED_BYTES:
            raise InvariantBroken(f"vote mark of {len(encoded)} bytes, expected {cls.ENCODED_BYTES}")
        return cls(int.from_bytes(encoded[:8], "big"), int.from_bytes(encoded[8:], "big"))


def check_not_lost(journal: VoteMark, remembered: VoteMark | None) -> None:
    """The journal has come as far as ``remembered``, the store's mark.

    Raises:
        JournalLost: it has not.
    """
    if remembered is not None and (journal.view < remembered.view or journal.records < remembered.records):
        raise JournalLost(
            f"vote journal: expected at least {remembered.records} votes up to view {remembered.view} as the "
            f"store remembers, found {journal.records} up to view {journal.view}; {ROTATE}"
        )


class Journal:
    """An open vote journal. Made by ``create`` (once per identity) or ``open``."""

    def __init__(self, path: Path, chain_id: ChainId, identity: MemberId) -> None:
        self._path = path
        self._chain_id = chain_id
        self._identity = identity
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._chain = b""
        self._size_bytes = 0
        self._mark = VoteMark(0, 0)
        self._first_view = 0

    @classmethod
    def create(cls, path: Path, chain_id: ChainId, identity: MemberId) -> "Journal":
        """A new, empty journal for an identity that has never voted.

        Raises:
            ConfigError: there is one already.
        """
        if path.exists():
            raise ConfigError(f"{path}: expected no vote journal yet, found one")
        replace_private(path, _encode_head(chain_id, identity, VoteMark(0, 0)))
        return cls.open(path, chain_id, identity)

    @classmethod
    def open(cls, path: Path, chain_id: ChainId, identity: MemberId) -> "Journal":
        """The existing journal of an identity; an incomplete last record is cut off.

        What is read may never have reached the disk: a process that is killed before ``fsync`` leaves it in the page
        cache, and a sync after one that failed proves nothing. It is written anew before anybody relies on it.

        Raises:
            JournalLost: it is missing or damaged.
            ConfigError: it belongs to another chain or identity.
        """
        journal = cls(path, chain_id, identity)
        content = journal._read()
        _, complete_bytes = journal._replay(content)
        replace_private(path, content[:complete_bytes])
        journal._attach(complete_bytes)
        return journal

    @property
    def mark(self) -> VoteMark:
        """How far this journal has come, compacted records included."""
        return self._mark

    @property
    def first_view(self) -> int:
        """In earlier views this identity may have voted as is not written here any more; 0 where all is here."""
        return self._first_view

    @property
    def size_bytes(self) -> int:
        """Size of the file: when to ``compact``."""
        return self._size_bytes

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def records(self) -> tuple[VoteRecord, ...]:
        """Every record kept, in the order written, read from the file: to re-tally after a crash.

        Raises:
            JournalLost: the file was damaged since it was opened.
        """
        with self._lock:
            return self._replay(self._read())[0]

    def append(self, votes: Sequence[VoteRecord]) -> VoteMark:
        """Write votes in order with one sync; they may be sent when this returns.

        Raises:
            InvariantBroken: a vote is too large, or the disk did not take it. The journal then refuses
                every later vote: what the disk holds is known only after a restart.
        """
        with self._lock:
            descriptor = self._opened()
            chain, mark, written = self._chain, self._mark, bytearray()
            for record in votes:
                if len(record.vote) > MAX_RECORD_BYTES:
                    raise InvariantBroken(f"vote of {len(record.vote)} bytes, at most {MAX_RECORD_BYTES}")
                encoded = _encode_record(record, chain)
                chain = encoded[-_CHECK_BYTES:]
                written += encoded
                mark = VoteMark(max(mark.view, record.view), mark.records + 1)
            try:
                write_fully(descriptor, bytes(written))
                os.fdatasync(descriptor)
            except OSError as error:
                self._failure = f"writing failed: {error.strerror}"
                raise InvariantBroken(f"{self._path}: {self._failure}") from error
            self._chain, self._mark = chain, mark
            self._size_bytes += len(written)
            return mark

    def compact(self, first_view_kept: int) -> None:
        """Drop the records of earlier views: once a later view is final, durably, they are not needed again.

        Raises:
            JournalLost: the file was damaged since it was opened.
            InvariantBroken: the disk did not take the new file.
        """
        with self._lock:
            self._opened()
            records, _ = self._replay(self._read())
            kept = [record for record in records if record.view >= first_view_kept]
            dropped_views = [record.view for record in records if record.view < first_view_kept]
            if not dropped_views:
                return
            dropped = VoteMark(self._mark.view, self._mark.records - len(kept))
            content = bytearray(_encode_head(self._chain_id, self._identity, dropped))
            chain = _chain_start(bytes(content))
            for record in kept:
                encoded = _encode_record(record, chain)
                chain = encoded[-_CHECK_BYTES:]
                content += encoded
            try:
                replace_private(self._path, bytes(content))
            except OSError as error:
                self._failure = f"compaction failed: {error.strerror}"
                raise InvariantBroken(f"{self._path}: {self._failure}") from error
            os.close(self._opened())
            self._attach(len(content))
            self._replay(bytes(content))

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError as error:
            raise JournalLost(f"{self._path}: expected the vote journal, found none; {ROTATE}") from error

    def _attach(self, size_bytes: int) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size_bytes = size_bytes

    def _opened(self) -> int:
        if self._failure is not None:
            raise InvariantBroken(f"{self._path}: refused after an earlier failure: {self._failure}")
        if self._descriptor is None:
            raise InvariantBroken(f"{self._path}: used after close")
        return self._descriptor

    def _replay(self, content: bytes) -> tuple[tuple[VoteRecord, ...], int]:
        """The records of a file and the bytes they fill; sets mark, chain and first view."""
        dropped = mark = self._check_head(content)
        chain = _chain_start(content[:_HEAD_BYTES])
        records: list[VoteRecord] = []
        position = _HEAD_BYTES
        while len(content) - position >= _FRAME_BYTES:
            frame = content[position : position + _FRAME.size]
            length, view = _FRAME.unpack(frame)
            (crc,) = _CRC.unpack_from(content, position + _FRAME.size)
            if crc != zlib.crc32(frame):
                raise self._damaged(position)
            payload_at = position + _FRAME_BYTES
            end = payload_at + length + _CHECK_BYTES
            if end > len(content):
                break
            record = VoteRecord(view, content[payload_at : payload_at + length])
            encoded = _encode_record(record, chain)
            if encoded != content[position:end]:
                raise self._damaged(position)
            records.append(record)
            chain = encoded[-_CHECK_BYTES:]
            mark = VoteMark(max(mark.view, view), mark.records + 1)
            position = end
        self._chain, self._mark = chain, mark
        # All that was dropped is of views before those kept.
        self._first_view = min((record.view for record in records), default=mark.view + 1) if dropped.records else 0
        return tuple(records), position

    def _check_head(self, content: bytes) -> VoteMark:
        head = content[: _HEAD.size]
        check = hashlib.sha256(head).digest()[:_HEAD_CHECK_BYTES]
        if len(content) < _HEAD_BYTES or check != content[_HEAD.size : _HEAD_BYTES]:
            raise self._damaged(0)
        magic, chain_id, identity, view, records = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise self._damaged(0)
        if chain_id != self._chain_id:
            raise ConfigError(
                f"{self._path}: expected a vote journal of chain {self._chain_id.hex()}, found {chain_id.hex()}"
            )
        if identity != self._identity:
            raise ConfigError(
                f"{self._path}: expected the vote journal of member {self._identity.hex()}, found {identity.hex()}"
            )
        return VoteMark(view, records)

    def _damaged(self, position: int) -> JournalLost:
        return JournalLost(f"{self._path}: expected an intact vote journal, found damage at byte {position}; {ROTATE}")


def _encode_head(chain_id: ChainId, identity: MemberId, dropped: VoteMark) -> bytes:
    head = _HEAD.pack(_MAGIC, chain_id, identity, dropped.view, dropped.records)
    return head + hashlib.sha256(head).digest()[:_HEAD_CHECK_BYTES]


def _chain_start(head: bytes) -> bytes:
    return hashlib.sha256(head).digest()


def _encode_record(record: VoteRecord, chain: bytes) -> bytes:
    frame = _FRAME.pack(len(record.vote), record.view)
    framed = frame + _CRC.pack(zlib.crc32(frame)) + record.vote
    return framed + hashlib.sha256(chain + framed).digest()
