"""Where the store keeps what: column families, keys and the write of one ledger block.

Numbers are 8 bytes big-endian, so that RocksDB's byte order is their order. ``entries`` and ``portions``
are by log index; ``headers``, ``bodies``, ``certificates`` and ``votes`` by height; ``nodes`` by level (one
byte) and index; ``state`` by the state's own keys; ``lookup`` finds indexes and heights by digest or log
size; ``index`` lists log indexes by term; ``meta`` holds schema version, chain, head, vote mark, the links between
epochs, by number, and while a log that began at a snapshot is not whole yet, how far it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    WriteBatch,
)

from consensus.epochs import MAX_LINKS
from consensus.identifiers import Digest, Height
from consensus.rejection import InvariantBroken
from node.manifest import check_manifest

SCHEMA_VERSION = 1
MAX_TERM_BYTES = 255

_FAMILIES = (
    "entries",
    "portions",
    "nodes",
    "headers",
    "bodies",
    "certificates",
    "votes",
    "state",
    "lookup",
    "index",
    "meta",
)
_MADE_FIRST = frozenset(
    ("rocksdict-config.json", "LOG", "LOCK", "000000.dbtmp", "IDENTITY", "MANIFEST-000001", "000001.dbtmp")
)
"""What is written before CURRENT, in that order."""
_BLOCK_CACHE_BYTES = 8 << 20
_WRITE_BUFFERS_BYTES = 16 << 20
_ARENA_BLOCK_BYTES = 64 << 10
"""What a family's buffer grows by. RocksDB's default is a MiB, with which families that hold next to nothing take most
of ``_WRITE_BUFFERS_BYTES``: tables are written three times as often and compacted the more."""
_MAX_WRITE_AHEAD_BYTES = 256 << 20
_MAX_OPEN_FILES = 256

SCHEMA_KEY = b"schema-version"
CHAIN_KEY = b"chain-id"
HEAD_KEY = b"head"
VOTE_MARK_KEY = b"vote-mark"
EPOCH_LINK = b"epoch-link"
HISTORY_KEY = b"history"
HEAD_BYTES = 48
"""A head has at least so many bytes."""
BY_EVENT, BY_LEAF, BY_BLOCK, BY_LOG_SIZE = b"e", b"l", b"b", b"s"


class EntryWrite(NamedTuple):
    """One event of a ledger block. ``terms`` are what it is listed under (``Store.scan``)."""

    log_index: int
    entry: bytes
    portions: bytes
    event_id: Digest
    leaf_hash: Digest
    terms: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockWrite:
    """Everything one finalized ledger block adds.

    ``certificate`` is None for a ledger block that is final through a descendant's certificate.
    ``nodes`` are complete tree nodes as (level, index, hash); level 0 holds leaf hashes. In
    ``state_changes`` None deletes a key. ``log_size`` and ``frontier`` describe the log after the block.
    """

    height: Height
    digest: Digest
    header: bytes
    body: bytes
    certificate: bytes | None
    votes: bytes
    entries: tuple[EntryWrite, ...]
    nodes: tuple[tuple[int, int, bytes], ...]
    state_changes: Mapping[bytes, bytes | None]
    log_size: int
    frontier: bytes
    epoch_link: tuple[int, bytes] | None = None
    """The epoch that begins at this ledger block and the link to it, where one does."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest ledger block committed, and the log after it."""

    height: Height
    digest: Digest
    log_size: int
    frontier: bytes

    def encode(self) -> bytes:
        """Bytes kept in the database."""
        return u64(self.height) + self.digest + u64(self.log_size) + self.frontier

    @classmethod
    def decode(cls, encoded: bytes) -> "Head":
        """The head of ``encode``'s bytes."""
        return cls(Height(to_int(encoded[:8])), Digest(encoded[8:40]), to_int(encoded[40:48]), encoded[48:])


@dataclass(frozen=True, slots=True)
class History:
    """How far a log that began at the ledger block of height ``base_height`` is filled up below it.

    ``next_height`` is the first ledger block missing, ``frontier`` the tree before it, ``base_size`` how many events
    there are up to the base.
    """

    next_height: int
    base_height: int
    base_size: int
    frontier: bytes

    def encode(self) -> bytes:
        """Bytes kept in the database."""
        return u64(self.next_height) + u64(self.base_height) + u64(self.base_size) + self.frontier

    @classmethod
    def decode(cls, encoded: bytes) -> "History":
        """The history of ``encode``'s bytes."""
        next_height, base_height, base_size = (to_int(encoded[at : at + 8]) for at in (0, 8, 16))
        return cls(next_height, base_height, base_size, encoded[24:])


@dataclass(frozen=True, slots=True)
class BaseWrite:
    """A snapshot to begin a log from: everything but what stands below it. ``epoch_links`` are from epoch 1 on."""

    height: Height
    digest: Digest
    header: bytes
    certificate: bytes
    state: Mapping[bytes, bytes]
    log_size: int
    frontier: bytes
    peaks: tuple[tuple[int, int, bytes], ...]
    epoch_links: tuple[bytes, ...]


@dataclass(slots=True)
class Database:
    """What must be dropped, column families first, before RocksDB releases its own lock."""

    root: Rdict
    families: dict[str, Rdict] = field(default_factory=dict)
    handles: dict[str, object] = field(default_factory=dict)


def open_database(path: Path, create: bool, access: AccessType) -> Database:
    """Open RocksDB with every column family.

    With ``create`` a missing database is made, or its families where that was cut off. Of one that holds anything a
    missing family is damage: made anew, it would hide that the manifest lost it, and RocksDB would drop all that the
    write-ahead log and the tables have of it. It finds a family missing only when it has begun to drop them.

    Raises:
        InvariantBroken: it does not open: a damaged file, or a write-ahead log damaged before its tail.
    """
    create = create and not _holds_anything(path)
    check_manifest(path)
    cache = Cache(_BLOCK_CACHE_BYTES)
    families = {name: _family_options(cache) for name in _FAMILIES}
    options = Options(raw_mode=True)
    options.create_if_missing(create)
    options.create_missing_column_families(create)
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    options.set_atomic_flush(True)
    options.set_db_write_buffer_size(_WRITE_BUFFERS_BYTES)
    options.set_max_total_wal_size(_MAX_WRITE_AHEAD_BYTES)
    options.set_max_open_files(_MAX_OPEN_FILES)
    options.set_keep_log_file_num(4)
    options.set_max_log_file_size(16 << 20)
    try:
        missing = set() if create else set(_FAMILIES).difference(Rdict.list_cf(str(path)))
        if missing:
            lost = ", ".join(sorted(missing))
            raise InvariantBroken(f"{path}: the database does not open: Corruption: its manifest does not list {lost}")
        root = Rdict(str(path), options=options, column_families=families, access_type=access)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise InvariantBroken(f"{path}: the database does not open: {_with_place(path, str(error))}") from error
    database = Database(root)
    for name in _FAMILIES:
        database.families[name] = root.get_column_family(name)
        database.handles[name] = root.get_column_family_handle(name)
    return database


def _with_place(path: Path, told: str) -> str:
    """RocksDB names tables and manifests, but no file of the write-ahead log."""
    if not told.startswith("Corruption") or any(name in told for name in ("MANIFEST", ".sst", "CURRENT", "manifest")):
        return told
    logs = ", ".join(sorted(log.name for log in path.glob("*.log") if log.stat().st_size))
    return f"{told} in the write-ahead log ({logs})" if logs else told


def was_never_made(path: Path) -> bool:
    """Whether there is no database at ``path`` but at most what RocksDB, when it makes one, writes before CURRENT.

    A full disk or a kill leaves that, and nothing was ever stored in it: whatever is written to a database goes to its
    write-ahead log, which is opened after CURRENT is there, and the opening of it leaves a manifest of a higher number
    and deletes the first. So a database that lost its CURRENT has files besides these.
    """
    return all(held.name in _MADE_FIRST or held.name.startswith("LOG.old.") for held in path.iterdir())


def _holds_anything(path: Path) -> bool:
    """Whether something was ever written to the database at ``path``: it is in a table or in the write-ahead log."""
    return any(path.glob("*.sst")) or any(log.stat().st_size for log in path.glob("*.log"))


def _family_options(cache: Cache) -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_bloom_filter(10, False)
    options = Options(raw_mode=True)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.lz4())
    options.set_arena_block_size(_ARENA_BLOCK_BYTES)
    return options


def fill_batch(batch: WriteBatch, block: BlockWrite, handles: Mapping[str, object]) -> None:
    """Put everything but the head of one ledger block into ``batch``."""
    height = u64(block.height)
    entries, portions, nodes = handles["entries"], handles["portions"], handles["nodes"]
    lookup, index, state = handles["lookup"], handles["index"], handles["state"]
    batch.put(height, block.header, handles["headers"])
    batch.put(height, block.body, handles["bodies"])
    batch.put(height, block.votes, handles["votes"])
    if block.epoch_link is not None:
        batch.put(EPOCH_LINK + u64(block.epoch_link[0]), block.epoch_link[1], handles["meta"])
    batch.put(BY_BLOCK + block.digest, height, lookup)
    if block.certificate is not None:
        batch.put(height, block.certificate, handles["certificates"])
    if block.entries:
        batch.put(BY_LOG_SIZE + u64(block.log_size), height, lookup)
    for event in block.entries:
        at = u64(event.log_index)
        batch.put(at, event.entry, entries)
        batch.put(at, event.portions, portions)
        batch.put(BY_EVENT + event.event_id, at, lookup)
        batch.put(BY_LEAF + event.leaf_hash, at, lookup)
        for term in event.terms:
            batch.put(term_prefix(term) + at, b"", index)
    for level, node_index, node_hash in block.nodes:
        batch.put(bytes([level]) + u64(node_index), node_hash, nodes)
    for key, value in sorted(block.state_changes.items()):
        if value is None:
            batch.delete(key, state)
        else:
            batch.put(key, value, state)


def fill_base(batch: WriteBatch, base: BaseWrite, handles: Mapping[str, object]) -> None:
    """Put everything but the head of a snapshot into ``batch``."""
    height = u64(base.height)
    batch.put(height, base.header, handles["headers"])
    batch.put(height, base.certificate, handles["certificates"])
    batch.put(BY_BLOCK + base.digest, height, handles["lookup"])
    for level, node_index, node_hash in base.peaks:
        batch.put(bytes([level]) + u64(node_index), node_hash, handles["nodes"])
    for key, value in sorted(base.state.items()):
        batch.put(key, value, handles["state"])
    for epoch, link in enumerate(base.epoch_links, start=1):
        batch.put(EPOCH_LINK + u64(epoch), link, handles["meta"])


def term_prefix(term: bytes) -> bytes:
    """The term with its length ahead, so that no term is a prefix of another's keys."""
    if len(term) > MAX_TERM_BYTES:
        raise InvariantBroken(f"index term of {len(term)} bytes, at most {MAX_TERM_BYTES}")
    return bytes([len(term)]) + term


def vote_mark_key(epoch: int) -> bytes:
    """Where the vote mark of an epoch is kept."""
    return VOTE_MARK_KEY if epoch == 0 else VOTE_MARK_KEY + u64(epoch)


def vote_mark_epoch(key: bytes) -> int | None:
    """The inverse of ``vote_mark_key``; None for any other key."""
    number = key.removeprefix(VOTE_MARK_KEY)
    epoch = to_int(number)
    return epoch if epoch <= MAX_LINKS and vote_mark_key(epoch) == key else None


def u64(number: int) -> bytes:
    """A number as a key."""
    return number.to_bytes(8, "big")


def to_int(encoded: bytes) -> int:
    """The number of ``u64``."""
    return int.from_bytes(encoded, "big")


def optional_int(encoded: bytes | None) -> int | None:
    """The number of ``u64``, None for none."""
    return None if encoded is None else to_int(encoded)
