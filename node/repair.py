"""``countersign log repair``: a damaged database is set aside whole, and the node fetches its log anew from its peers.

Nothing is mended in place: what a damaged database still says cannot be told from what it should say, while every
ledger block a peer serves comes with proof. Rules:

* The damaged database is renamed, never deleted: it may hold the only copy of something, and it is evidence.
* Keystore and vote journal stay as they are. The store's memory of how far the journal had come goes into the new
  database; where it cannot be read and the journal is gone too, the new one remembers that there were votes. So no
  repair makes a voter of an identity without its journal; of an older one, the peers know (``last_votes.py``).
* A repair cut off at any instant is finished, or begun again, by the next; ``Store.open`` refuses to start over it.

Which files are damaged, and how, is said by ``fsck.py``; fetching is ``catchup.py``'s.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from rocksdict import AccessType

from consensus.identifiers import ChainId
from consensus.rejection import ConfigError, InvariantBroken
from node.files import DirectoryLock, sync_directory
from node.fsck_reader import Reader, Report
from node.journal import JOURNAL_FILE, VoteMark
from node.store import REPAIRING_DIRECTORY, Store
from node.store_layout import HEAD_BYTES, HEAD_KEY, VOTE_MARK_KEY, Head, open_database

SOME_VOTES = VoteMark(view=0, records=1)
"""Remembered where nothing is known but that there may have been votes: no new journal is then made."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """Where the damaged database is now, and the height its log had come to, if that could still be read."""

    directory: Path
    height: int | None


def set_aside(directory: Path, chain_id: ChainId, *, votes: bool) -> SetAside:
    """Put an empty database in the place of a stopped node's; ``votes`` says whether its member is a voting one.

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
            height, mark = _remembered(database)
            if mark is None and votes and not (directory / JOURNAL_FILE).exists():
                mark = SOME_VOTES
            _make_empty(making, chain_id, mark)
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


def _make_empty(making: Path, chain_id: ChainId, mark: VoteMark | None) -> None:
    if making.exists():
        shutil.rmtree(making)
    with Store.open(making, chain_id, create=True) as store:
        if mark is not None:
            store.write_vote_mark(mark.encode())
            store.sync()


def _remembered(path: Path) -> tuple[int | None, VoteMark | None]:
    """Height and vote mark of a damaged database, each None where it cannot be read."""
    try:
        reader = Reader(open_database(path, False, AccessType.read_only(False)), Report())
    except InvariantBroken:
        return None, None
    try:
        head, mark = reader.get("meta", HEAD_KEY, "head"), reader.get("meta", VOTE_MARK_KEY, "vote mark")
    finally:
        reader.close()
    height = Head.decode(head).height if head is not None and len(head) >= HEAD_BYTES else None
    return height, VoteMark.decode(mark) if mark is not None and len(mark) == VoteMark.ENCODED_BYTES else None


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
