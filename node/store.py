"""The finalized log on disk: RocksDB, one atomic write per ledger block.

What it promises:

* **Atomic.** Everything a ledger block adds (header, certificate, votes, body, events, tree nodes, state
  changes, head) is one write across all column families: after a crash it is there whole or not at all.
* **Durable after sync.** ``commit`` returns before the disk has the block; ``sync`` returns after. A block
  is acknowledged only after the ``sync`` that covers it. ``sync`` blocks, releases the GIL, and belongs in
  a worker thread; a synchronous *write* would hold the GIL while the disk works.
* **In order.** Heights are 0 (genesis), 1, 2, ...; log indexes have no gap. Anything else is our own fault. A log that
  began at a snapshot (``begin_at``) has one gap, below it, which ``fill`` closes from its lower end; ``history`` says
  how far, until nothing is missing.
* **One process.** An ``flock`` on the data directory is taken before the database is touched.
* **Nothing is lost silently.** RocksDB's default recovery drops every record after a damaged one in its
  write-ahead log; the mode used here drops only an incomplete last record, which was never acknowledged,
  and refuses to open otherwise. Iterators stop without an error at a damaged block, so every scan ends in
  ``status()``. Flushes are atomic across column families, so even a database without its write-ahead log
  is a whole earlier one.

A deleted write-ahead log opens as that earlier database, in every recovery mode: at start the ledger
checks the head against its certificate, and the vote journal against ``vote_mark``.

Bytes in, bytes out: what they mean is left to ``ledger.py`` and ``consensus``. rocksdict raises bare
``Exception``; ``_translated`` turns that, and only that, into ``InvariantBroken``.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rocksdict import AccessType, Rdict, WriteBatch

from consensus.identifiers import ChainId, Digest, Height
from consensus.rejection import ConfigError, InvariantBroken
from node.files import UNWRITABLE, DirectoryLock, require_folder, sync_directory
from node.store_layout import (
    BY_BLOCK,
    BY_EVENT,
    BY_LEAF,
    BY_LOG_SIZE,
    CHAIN_KEY,
    EPOCH_LINK,
    HEAD_KEY,
    HISTORY_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    BaseWrite,
    BlockWrite,
    Database,
    EntryWrite,
    Head,
    History,
    fill_base,
    fill_batch,
    open_database,
    optional_int,
    term_prefix,
    to_int,
    u64,
    vote_mark_key,
    was_never_made,
)

STATE_PAGE_ITEMS = 4_096
REPAIRING_DIRECTORY = "repairing"
"""Where ``repair.py`` makes the database that replaces a damaged one."""
_REPAIR = "run 'countersign log repair'"
_CHECK = "run 'countersign log fsck', then 'countersign log repair'"


class Store:
    """An open data directory. Made by ``open`` or ``open_read_only``; closed by ``close`` or ``with``."""

    def __init__(self, directory: Path, lock: DirectoryLock, database: Database) -> None:
        self._directory = directory
        self._lock = lock
        self._database: Database | None = database
        self._sync_lock = threading.Lock()
        self._failure: str | None = None
        self._head: Head | None = None
        self._history: History | None = None

    @classmethod
    def open(cls, path: Path, chain_id: ChainId, *, create: bool) -> "Store":
        """Open the data directory ``path`` for one chain, for reading and writing.

        With ``create`` a missing or empty directory becomes the store of ``chain_id``, and so does one in which the
        making of a database was cut off.

        RocksDB deletes every table that its manifest does not list, when it opens for writing. A crash leaves some, of
        which all is listed elsewhere or in the write-ahead log; a manifest that lost its end leaves some that hold what
        nothing else does. So where there are such tables the log is looked at first without changing anything, and
        unless it has every ledger block up to its head they stay. What that does not hold: a manifest that lost all
        since the newest flush began, with nothing written since. This is a whole earlier database, as one without its
        write-ahead log is, and such are told by no trace from what a crash leaves.

        Raises:
            ConfigError: no store there and not ``create``; another process holds it; it belongs to
                another chain or an unknown schema version.
            InvariantBroken: the database is damaged.
        """
        existing = (path / "rocksdb" / "CURRENT").exists()
        if not existing and not create:
            raise ConfigError(f"{path}: expected a Countersign data directory, found none")
        if not existing and (path / "rocksdb").exists() and not was_never_made(path / "rocksdb"):
            raise ConfigError(f"{path}: expected a database, found one without its file CURRENT: {_REPAIR}")
        if not (path / "rocksdb").exists() and (path / REPAIRING_DIRECTORY).exists():
            raise ConfigError(f"{path}: expected a database, found a repair that was cut off: {_REPAIR} again")
        require_folder(path)
        # What members show each other on the log is not for everybody on this machine.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = DirectoryLock.acquire(path)
        try:
            cls._look_for_lost_tables(path, lock)
        except BaseException:
            lock.release()
            raise
        store = cls._opened(path, lock, chain_id, create, AccessType.read_write())
        if not existing:
            sync_directory(path)
            sync_directory(path.parent)
        return store

    @classmethod
    def open_read_only(cls, path: Path, chain_id: ChainId) -> "Store":
        """Open an existing data directory without changing it, for ``fsck`` while the node is down.

        Raises:
            ConfigError, InvariantBroken: as ``open``.
        """
        if not (path / "rocksdb" / "CURRENT").exists():
            raise ConfigError(f"{path}: expected a Countersign data directory, found none")
        lock = DirectoryLock.acquire(path)
        return cls._opened(path, lock, chain_id, False, AccessType.read_only(False))

    @classmethod
    def _opened(cls, path: Path, lock: DirectoryLock, chain_id: ChainId, create: bool, access: AccessType) -> "Store":
        store: Store | None = None
        try:
            store = cls(path, lock, _open_advising(path, create, access))
            store._identify(chain_id, create)
            store._load_head()
        except BaseException:
            if store is None:
                lock.release()
            else:
                store.close()
            raise
        return store

    @classmethod
    def _look_for_lost_tables(cls, path: Path, lock: DirectoryLock) -> None:
        """Refuse to open for writing where that could delete what nothing else holds; see ``open``."""
        tables = {table.name for table in (path / "rocksdb").glob("*.sst")}
        if not tables:
            return
        found = cls(path, lock, _open_advising(path, False, AccessType.read_only(False)))
        try:
            unlisted = tables.difference(found._listed_tables())
            if unlisted:
                found._load_head()
                found._require_every_header(f"{len(unlisted)} tables that no manifest lists, as {min(unlisted)}")
        finally:
            found._close_database()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release database and directory. Waits for a running ``sync``; a second call does nothing.

        Raises:
            InvariantBroken: the database could not write what it had buffered; the directory is released all the same.
        """
        with self._sync_lock:
            if self._database is None:
                return
            try:
                self._close_database()
            finally:
                self._lock.release()

    # Writing

    def commit(self, blocks: Sequence[BlockWrite]) -> None:
        """Write consecutive ledger blocks in one atomic write; durable after the next ``sync``.

        Ledger blocks that are final through a descendant's certificate go in one call with that descendant,
        so that the head on disk always has its certificate.

        Raises:
            InvariantBroken: height or log index out of order; the write failed (the store then refuses
                every later write: what the disk holds is known only after a restart).
        """
        self._check_writable()
        database = self._opened_database()
        head = self._head
        for block in blocks:
            _check_order(head, block)
            head = Head(block.height, block.digest, block.log_size, block.frontier)
        if head is None or head is self._head:
            return
        with self._translated(f"commit of ledger block {head.height}", poisons=True):
            batch = WriteBatch(raw_mode=True)
            for block in blocks:
                fill_batch(batch, block, database.handles)
            batch.put(HEAD_KEY, head.encode(), database.handles["meta"])
            database.root.write(batch)
        self._head = head

    def begin_at(self, base: BaseWrite, history: History) -> None:
        """Begin a log at a snapshot, in one atomic write, where there is nothing yet but genesis.

        Raises:
            InvariantBroken: there is more; the write failed.
        """
        self._check_writable()
        if self._head is None or self._head.height != 0:
            raise InvariantBroken(f"{self._directory}: a snapshot over a log that has begun")
        database = self._opened_database()
        head = Head(base.height, base.digest, base.log_size, base.frontier)
        with self._translated(f"snapshot of ledger block {base.height}", poisons=True):
            batch = WriteBatch(raw_mode=True)
            fill_base(batch, base, database.handles)
            batch.put(HEAD_KEY, head.encode(), database.handles["meta"])
            batch.put(HISTORY_KEY, history.encode(), database.handles["meta"])
            database.root.write(batch)
        self._head, self._history = head, history

    def fill(self, blocks: Sequence[BlockWrite]) -> None:
        """Write the next ledger blocks below the snapshot the log began at, in one atomic write.

        Raises:
            InvariantBroken: they are not the next ones; the write failed.
        """
        self._check_writable()
        database, history = self._opened_database(), self._history
        if not blocks:
            return
        if history is None or [block.height for block in blocks] != list(
            range(history.next_height, history.next_height + len(blocks))
        ):
            raise InvariantBroken(f"{self._directory}: ledger block {blocks[0].height} is not the next one missing")
        last = blocks[-1]
        whole = last.height == history.base_height
        filled = History(last.height + 1, history.base_height, history.base_size, last.frontier)
        with self._translated(f"ledger blocks up to {last.height}", poisons=True):
            batch = WriteBatch(raw_mode=True)
            for block in blocks:
                fill_batch(batch, block, database.handles)
            if whole:
                batch.delete(HISTORY_KEY, database.handles["meta"])
            else:
                batch.put(HISTORY_KEY, filled.encode(), database.handles["meta"])
            database.root.write(batch)
        self._history = None if whole else filled

    def write_vote_mark(self, mark: bytes, epoch: int = 0) -> None:
        """Remember how far the vote journal of an epoch had come; no sync, the journal itself is the durable record.

        Raises:
            InvariantBroken: the write failed.
        """
        self._check_writable()
        with self._translated("vote mark", poisons=True):
            self._family("meta").put(vote_mark_key(epoch), mark)

    def sync(self) -> Height | None:
        """Make every commit so far durable; for a worker thread. Returns the newest height it covers.

        Raises:
            InvariantBroken: the disk did not take it. Never retried: after a failed sync the kernel may
                have dropped the pages, and a second sync would succeed without them.
        """
        with self._sync_lock:
            self._check_writable()
            covered = self._head
            with self._translated("sync", poisons=True):
                self._opened_database().root.flush_wal(True)
        return None if covered is None else covered.height

    # Reading

    def head(self) -> Head | None:
        """The newest ledger block committed, None before genesis."""
        return self._head

    def history(self) -> History | None:
        """What is missing below the snapshot this log began at; None where nothing is."""
        return self._history

    def vote_mark(self, epoch: int = 0) -> bytes | None:
        """What ``write_vote_mark`` last wrote for an epoch."""
        return self._get("meta", vote_mark_key(epoch))

    def epoch_links(self) -> list[bytes]:
        """The links from epoch 0 to the newest, in order."""
        links: list[bytes] = []
        while (link := self._get("meta", EPOCH_LINK + u64(len(links) + 1))) is not None:
            links.append(link)
        return links

    def entry(self, index: int) -> bytes | None:
        """The signed leaf entry at a log index."""
        return self._get("entries", u64(index))

    def portions(self, index: int) -> bytes | None:
        """The portions of the event at a log index."""
        return self._get("portions", u64(index))

    def header(self, height: int) -> bytes | None:
        """The header at a height."""
        return self._get("headers", u64(height))

    def body(self, height: int) -> bytes | None:
        """The body at a height."""
        return self._get("bodies", u64(height))

    def certificate(self, height: int) -> bytes | None:
        """The finalize certificate of a height, None where a descendant's covers it."""
        return self._get("certificates", u64(height))

    def votes(self, height: int) -> bytes | None:
        """The identity votes kept behind a finalized ledger block."""
        return self._get("votes", u64(height))

    def node(self, level: int, index: int) -> bytes | None:
        """A complete node of the Merkle tree: 32 bytes; level 0 holds leaf hashes."""
        return self._get("nodes", bytes([level]) + u64(index))

    def state_value(self, key: bytes) -> bytes | None:
        """The state's value under a key."""
        return self._get("state", key)

    def index_of_event(self, event_id: Digest) -> int | None:
        """The log index of an event id."""
        return optional_int(self._get("lookup", BY_EVENT + event_id))

    def index_of_leaf(self, leaf_hash: Digest) -> int | None:
        """The log index of a leaf hash."""
        return optional_int(self._get("lookup", BY_LEAF + leaf_hash))

    def height_of_block(self, digest: Digest) -> Height | None:
        """The height of the ledger block with this header digest."""
        height = optional_int(self._get("lookup", BY_BLOCK + digest))
        return None if height is None else Height(height)

    def height_of_index(self, index: int) -> Height | None:
        """The height of the ledger block that appended a log index, None where that is missing below a snapshot."""
        found = self._page("lookup", BY_LOG_SIZE + u64(index + 1), BY_LOG_SIZE, 1)
        height, history = Height(to_int(found[0][1])) if found else None, self._history
        if height is None or history is None:
            return height
        # Of what is missing there are no log sizes: the next one found is a ledger block's above the snapshot.
        return height if index >= history.base_size or height < history.next_height else None

    def certified_at_or_after(self, height: int) -> Height | None:
        """The first height from ``height`` on that has its own certificate: what proves ``height`` final."""
        found = self._page("certificates", u64(height), b"", 1)
        return Height(to_int(found[0][0])) if found else None

    def entries_range(self, start: int, end: int) -> list[bytes]:
        """The signed leaf entries of indexes ``start`` ≤ i < ``end``, as far as the log goes.

        Raises:
            InvariantBroken: an index inside the log is missing or the database is damaged.
        """
        size = 0 if self._head is None else self._head.log_size
        wanted = range(start, min(end, size))
        found = self._page("entries", u64(start), b"", len(wanted))
        if [to_int(key) for key, _ in found] != list(wanted):
            raise InvariantBroken(f"{self._directory}: entries {start} to {end} of the log have a gap")
        return [entry for _, entry in found]

    def scan(self, term: bytes, start: int, limit: int) -> list[int]:
        """At most ``limit`` log indexes ≥ ``start`` listed under ``term``, ascending.

        Raises:
            InvariantBroken: the database is damaged.
        """
        prefix = term_prefix(term)
        return [to_int(key[len(prefix) :]) for key, _ in self._page("index", prefix + u64(start), prefix, limit)]

    def state_items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of the state, ascending by key.

        Read in pages, so that an unfinished iteration holds nothing open.

        Raises:
            InvariantBroken: the database is damaged, or a ledger block was committed in between.
        """
        at, start = self._head, b""
        while True:
            page = self._page("state", start, b"", STATE_PAGE_ITEMS)
            if self._head != at:
                raise InvariantBroken(f"{self._directory}: a ledger block was committed while the state was read")
            yield from page
            if len(page) < STATE_PAGE_ITEMS:
                return
            start = page[-1][0] + b"\x00"

    # Inside

    def _identify(self, chain_id: ChainId, create: bool) -> None:
        version, chain = self._get("meta", SCHEMA_KEY), self._get("meta", CHAIN_KEY)
        if version is None and chain is None and create:
            database = self._opened_database()
            with self._translated("initialisation", poisons=True):
                batch = WriteBatch(raw_mode=True)
                batch.put(SCHEMA_KEY, u64(SCHEMA_VERSION), database.handles["meta"])
                batch.put(CHAIN_KEY, chain_id, database.handles["meta"])
                database.root.write(batch)
                database.root.flush_wal(True)
            return
        if version is None or to_int(version) != SCHEMA_VERSION:
            found = "none" if version is None else str(to_int(version))
            raise ConfigError(f"{self._directory}: expected schema version {SCHEMA_VERSION}, found {found}")
        if chain != chain_id:
            found = "none" if chain is None else chain.hex()
            raise ConfigError(f"{self._directory}: expected chain {chain_id.hex()}, found chain {found}")

    def _close_database(self) -> None:
        database, self._database = self._opened_database(), None
        database.families.clear()
        database.handles.clear()
        with self._translated("close"):
            database.root.close()

    def _listed_tables(self) -> set[str]:
        with self._translated("list of tables"):
            return {str(table["name"]).lstrip("/") for table in self._opened_database().root.live_files()}

    def _require_every_header(self, unlisted: str) -> None:
        """Every ledger block is there, hence all that was written up to the head: flushes are of all families at once.

        Those of a clean close are not, but that of ``meta``, with the head, is the last.
        """
        history, height = self._history, -1 if self._head is None else self._head.height
        expected = height + 1 - (0 if history is None else history.base_height - history.next_height)
        held, start = 0, b""
        while page := self._page("headers", start, b"", STATE_PAGE_ITEMS):
            held, start = held + len(page), page[-1][0] + b"\x00"
        if self._get("meta", SCHEMA_KEY) is None or held != expected:
            raise InvariantBroken(
                f"{self._directory}: {unlisted}, and {held} headers, expected {expected} up to head {height}: {_CHECK}"
            )

    def _load_head(self) -> None:
        """Read the head; it, the newest header and the newest entry belong together."""

        def damaged(found: str) -> InvariantBroken:
            return InvariantBroken(f"{self._directory}: {found}: {_CHECK}")

        encoded = self._get("meta", HEAD_KEY)
        self._head = head = None if encoded is None else Head.decode(encoded)
        history = self._get("meta", HISTORY_KEY)
        self._history = None if history is None else History.decode(history)
        height = -1 if head is None else head.height
        size = 0 if head is None else head.log_size
        if height >= 0 and self.header(height) is None:
            raise damaged(f"head is {height}, its header is missing")
        if self.header(height + 1) is not None:
            raise damaged(f"head is {height}, found header {height + 1}")
        filled = self._history is None or size > self._history.base_size
        if size > 0 and filled and self.entry(size - 1) is None:
            raise damaged(f"log size is {size}, its last entry is missing")
        if self.entry(size) is not None:
            raise damaged(f"log size is {size}, found entry {size}")

    def _check_writable(self) -> None:
        if self._failure is not None:
            raise InvariantBroken(f"{self._directory}: refused after an earlier failure: {self._failure}")

    def _opened_database(self) -> Database:
        if self._database is None:
            raise InvariantBroken(f"{self._directory}: used after close")
        return self._database

    def _family(self, name: str) -> Rdict:
        return self._opened_database().families[name]

    def _get(self, family: str, key: bytes) -> bytes | None:
        database = self._opened_database()
        try:  # not ``_translated``: a node reads for every event it receives
            found: bytes | None = database.families[family].get(key)
        except Exception as error:
            self._fail(f"read from {family}", error)
        return found

    def _page(self, family: str, start: bytes, prefix: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """At most ``limit`` items with ``prefix`` from ``start`` on; the iterator is gone on return."""
        page: list[tuple[bytes, bytes]] = []
        with self._translated(f"scan of {family}"):
            iterator = self._family(family).iter()
            try:
                iterator.seek(start)
                while len(page) < limit and iterator.valid():
                    key: bytes = iterator.key()
                    if not key.startswith(prefix):
                        break
                    page.append((key, iterator.value()))
                    iterator.next()
                iterator.status()
            finally:
                del iterator  # an exception's traceback would keep it, and it keeps the database open
        return page

    @contextmanager
    def _translated(self, what: str, poisons: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._fail(what, error, poisons)

    def _fail(self, what: str, error: Exception, poisons: bool = False) -> NoReturn:
        if type(error) is not Exception:  # rocksdict's own errors are bare Exceptions
            raise error
        if poisons:
            self._failure = f"{what}: {error}"
        advice = _advice(str(error), _CHECK if "Corruption" in str(error) else "")
        raise InvariantBroken(f"{self._directory}: {what} failed: {error}{advice and ': '}{advice}") from error


__all__ = ["BlockWrite", "EntryWrite", "Head", "Store"]


def _open_advising(path: Path, create: bool, access: AccessType) -> Database:
    try:
        return open_database(path / "rocksdb", create, access)
    except InvariantBroken as error:
        raise InvariantBroken(f"{error}: {_advice(str(error), _CHECK)}") from error


def _advice(error: str, otherwise: str) -> str:
    """What to do about an error of RocksDB, which has no number, but repeats what the system said."""
    return next((advice for number, advice in UNWRITABLE.items() if os.strerror(number) in error), otherwise)


def _check_order(head: Head | None, block: BlockWrite) -> None:
    height = 0 if head is None else head.height + 1
    size = 0 if head is None else head.log_size
    if block.height != height:
        raise InvariantBroken(f"commit of ledger block {block.height}, expected {height}")
    indexes = [entry.log_index for entry in block.entries]
    if indexes != list(range(size, size + len(indexes))) or block.log_size != size + len(indexes):
        raise InvariantBroken(
            f"ledger block {height} appends {len(indexes)} events to reach log size {block.log_size}, "
            f"expected indexes without a gap from {size}"
        )
