"""``countersign log repair``: a damaged database is set aside whole, and the node fetches its log anew from its peers.

Nothing is mended in place: what a damaged database still says cannot be told from what it should say, while every
ledger block a peer serves comes with proof. Rules:

* The damaged database is renamed, never deleted: it may hold the only copy of something, and it is evidence.
* Keystores and vote journals stay as they are. The store's memory of how far each epoch's journal had come goes into
  the new database; where it cannot be read and that journal is gone too, the new one remembers that there were votes.
  So no repair makes a voter of an identity without its journal; of an older one, the peers know (``last_votes.py``).
* Which epochs those may be, the data directory says: ``left-epochs`` names an epoch before anything is signed in it, a
  journal is made for one that has begun, and the database itself may still have marks and links. A keystore says
  nothing: it is put there before its epoch begins, and one that waits for its epoch must not find itself silenced.
* A repair cut off at any instant is finished, or begun again, by the next; ``Store.open`` refuses to start over it.

Which files are damaged, and how, is said by ``fsck.py``; fetching is ``catchup.py``'s.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rocksdict import AccessType

from consensus.epochs import MAX_LINKS
from consensus.identifiers import ChainId
from consensus.membership import GENESIS_EPOCH
from consensus.rejection import ConfigError, InvariantBroken
from node.files import DirectoryLock, sync_directory
from node.fsck_reader import Reader, Report
from node.identity import left_epochs
from node.journal import VoteMark, journal_file
from node.store import REPAIRING_DIRECTORY, Store
from node.store_layout import (
    EPOCH_LINK,
    HEAD_BYTES,
    HEAD_KEY,
    SCHEMA_KEY,
    Head,
    open_database,
    u64,
    vote_mark_epoch,
    vote_mark_key,
    was_never_made,
)

SOME_VOTES = VoteMark(view=0, records=1)
"""Remembered where nothing is known but that there may have been votes: no new journal is then made."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """Where the damaged database is now, and the height its log had come to, if that could still be read."""

    directory: Path
    height: int | None


def set_aside(directory: Path, chain_id: ChainId) -> SetAside:
    """Put an empty database in the place of a stopped node's.

    Raises:
        ConfigError: no database there, or another process holds the directory.
    """
    database, making = directory / "rocksdb", directory / REPAIRING_DIRECTORY
    made = making / "rocksdb"
    if not database.exists() and not made.exists():
        raise ConfigError(f"{directory}: expected a Countersign data directory, found none")
    lock = DirectoryLock.acquire(directory)
    try:
        if database.exists():
            memory = _remembered(database, _newest_epoch(directory))
            height = memory.height
            # Nothing is signed before there is a database: a first start that was cut off made no votes.
            begun = memory.newest_epoch > GENESIS_EPOCH or not was_never_made(database)
            _make_empty(making, chain_id, _marks(directory, memory) if begun else {})
            aside = _free_name(directory)
            database.rename(aside)
            sync_directory(directory)
        else:  # an earlier repair got as far as this
            height, aside = None, _newest_aside(directory)
        made.rename(database)
        sync_directory(directory)
        shutil.rmtree(making)
    finally:
        lock.release()
    return SetAside(aside, height)


def was_cut_off(directory: Path) -> bool:
    """Whether an earlier repair ended between its two renames: nothing is left to check, only to finish."""
    return not (directory / "rocksdb").exists() and (directory / REPAIRING_DIRECTORY / "rocksdb").exists()


def _make_empty(making: Path, chain_id: ChainId, marks: Mapping[int, VoteMark]) -> None:
    if making.exists():
        shutil.rmtree(making)
    with Store.open(making, chain_id, create=True) as store:
        for epoch, mark in marks.items():
            store.write_vote_mark(mark.encode(), epoch)
        store.sync()


def _newest_epoch(directory: Path) -> int:
    """The newest epoch that the files beside the database name."""
    journals = (epoch for epoch in range(1, MAX_LINKS + 1) if (directory / journal_file(epoch)).exists())
    return max((left_epochs(directory), *journals))


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a damaged database still says. ``whole``: all that it had to say of votes."""

    newest_epoch: int
    height: int | None = None
    marks: Mapping[int, VoteMark] = field(default_factory=dict)
    whole: bool = False


def _remembered(path: Path, newest_epoch: int) -> _Memory:
    """``newest_epoch`` is the newest known of without the database."""
    report = Report()
    try:
        reader = Reader(open_database(path, False, AccessType.read_only(False)), report)
    except InvariantBroken:
        return _Memory(newest_epoch)
    try:
        keys = {key for key, _ in reader.items("meta")}
        linked = (epoch for epoch in range(1, MAX_LINKS + 1) if EPOCH_LINK + u64(epoch) in keys)
        marked = {epoch for key in keys if (epoch := vote_mark_epoch(key)) is not None}
        newest_epoch = max((newest_epoch, *linked, *marked))
        # One by one: the scan ends at the first damaged block, and marks may stand behind it.
        marks = {}
        for epoch in sorted(marked.union(range(newest_epoch + 1))):
            mark = reader.get("meta", vote_mark_key(epoch), f"vote mark of epoch {epoch}")
            if mark is not None and len(mark) == VoteMark.ENCODED_BYTES:
                marks[epoch] = VoteMark.decode(mark)
        head = reader.get("meta", HEAD_KEY, "head")
    finally:
        reader.close()
    height = Head.decode(head).height if head is not None and len(head) >= HEAD_BYTES else None
    # Without its schema version a database has lost what was ever written to it.
    return _Memory(newest_epoch, height, marks, whole=report.sound and SCHEMA_KEY in keys)


def _marks(directory: Path, memory: _Memory) -> dict[int, VoteMark]:
    """What the new database remembers of votes, by epoch: at least what the old one did.

    A voter of the genesis has had its journal since its first start, so there a missing mark says nothing. A later
    epoch begins before its voter has a journal, as the keystore may come later: an intact database without a mark says
    that there was no vote. Whose directory it is does not matter: a mark does nothing in an epoch that its member has
    no vote in.
    """
    marks = dict(memory.marks)
    for epoch in range(memory.newest_epoch + 1):
        may_have_voted = epoch == GENESIS_EPOCH or not memory.whole
        if epoch not in marks and may_have_voted and not (directory / journal_file(epoch)).exists():
            marks[epoch] = SOME_VOTES
    return marks


def _free_name(directory: Path) -> Path:
    number = 1
    while (aside := _aside(directory, number)).exists():
        number += 1
    return aside


def _newest_aside(directory: Path) -> Path:
    number = 1
    while _aside(directory, number + 1).exists():
        number += 1
    return _aside(directory, number)


def _aside(directory: Path, number: int) -> Path:
    return directory / f"rocksdb.damaged-{number}"
