"""Store: a ledger block is on disk whole or not at all, damage is never silent, one process at a time."""

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from rocksdict import AccessType, Options, Rdict

import node.store
from consensus.identifiers import ChainId, Digest, Height
from consensus.rejection import ConfigError, InvariantBroken
from node import store_layout
from node.store import BlockWrite, EntryWrite, Head, Store

CHAIN, OTHER = ChainId(b"C" * 32), ChainId(b"D" * 32)


def sha(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).digest())


def block(
    height: int,
    start: int,
    count: int,
    *,
    changes: dict[bytes, bytes | None] | None = None,
    certified: bool = True,
    padding: int = 0,
) -> BlockWrite:
    """Ledger block ``height`` appending ``count`` events from log index ``start``; all of it follows from both."""
    entries = tuple(
        EntryWrite(
            log_index=index,
            entry=b"entry %d " % index + bytes(padding),
            portions=b"portions %d" % index,
            event_id=sha(f"event {index}"),
            leaf_hash=sha(f"leaf {index}"),
            terms=(b"kind:step" if index % 2 else b"kind:grant", b"kind", b"c:%d" % (index % 3)),
        )
        for index in range(start, start + count)
    )
    return BlockWrite(
        height=Height(height),
        digest=sha(f"block {height}"),
        header=b"header %d" % height,
        body=b"body %d" % height,
        certificate=b"certificate %d" % height if certified else None,
        votes=b"votes %d" % height,
        entries=entries,
        nodes=tuple((0, entry.log_index, entry.leaf_hash) for entry in entries),
        state_changes={b"height": b"%d" % height} if changes is None else changes,
        log_size=start + count,
        frontier=sha(f"frontier {start + count}"),
    )


def filled(path: Path, blocks: int = 4, events: int = 5, padding: int = 0) -> None:
    with Store.open(path, CHAIN, create=True) as store:
        for height in range(blocks):
            store.commit([block(height, height * events, events, padding=padding)])
        store.sync()


def check_whole(store: Store, events: int) -> int:
    """Every ledger block up to the head is there whole; returns the number of blocks."""
    head = store.head()
    blocks = 0 if head is None else head.height + 1
    size = 0 if head is None else head.log_size
    assert size == blocks * events
    for height in range(blocks):
        expected = block(height, height * events, events)
        assert store.header(height) == expected.header
        assert store.body(height) == expected.body
        assert store.certificate(height) == expected.certificate
        assert store.votes(height) == expected.votes
        for event in expected.entries:
            assert store.index_of_event(event.event_id) == store.index_of_leaf(event.leaf_hash) == event.log_index
            assert store.portions(event.log_index) == event.portions
            assert store.node(0, event.log_index) == event.leaf_hash
    assert store.scan(b"kind", 0, size + 1) == list(range(size))
    assert len(store.entries_range(0, size)) == size
    assert dict(store.state_items()) == ({} if head is None else {b"height": b"%d" % head.height})
    assert store.header(blocks) is None
    assert store.entry(size) is None
    assert store.index_of_event(sha(f"event {size}")) is None
    return blocks


# Reading and writing


def test_new_store_is_empty(tmp_path: Path) -> None:
    with Store.open(tmp_path / "new" / "node", CHAIN, create=True) as store:
        assert store.head() is None
        assert store.sync() is None
        assert store.vote_mark() is None
        assert list(store.state_items()) == []
        assert store.entries_range(0, 10) == []
        assert store.height_of_index(0) is None


def test_committed_blocks_are_read_back_by_every_key(tmp_path: Path) -> None:
    with Store.open(tmp_path, CHAIN, create=True) as store:
        store.commit([block(0, 0, 0)])
        store.commit([block(1, 0, 3)])
        store.commit([block(2, 3, 0, certified=False)])
        store.commit([block(3, 3, 4, certified=False)])
        store.commit([block(4, 7, 1)])
        assert store.sync() == 4
        assert store.head() == Head(Height(4), sha("block 4"), 8, sha("frontier 8"))
        assert store.header(3) == b"header 3"
        assert store.certificate(3) is None
        assert [store.certified_at_or_after(height) for height in range(6)] == [0, 1, 4, 4, 4, None]
        assert [store.height_of_index(index) for index in range(9)] == [1, 1, 1, 3, 3, 3, 3, 4, None]
        assert store.height_of_block(sha("block 3")) == 3
        assert store.height_of_block(sha("leaf 3")) is None
        assert store.index_of_leaf(sha("leaf 6")) == 6
        assert store.index_of_event(sha("leaf 6")) is None
        assert store.entries_range(2, 4) == [b"entry 2 ", b"entry 3 "]
        assert store.entries_range(7, 100) == [b"entry 7 "]
        assert store.entries_range(5, 5) == store.entries_range(9, 4) == []
        assert store.state_value(b"height") == b"4"


def test_scan_never_mixes_terms_of_which_one_begins_the_other(tmp_path: Path) -> None:
    with Store.open(tmp_path, CHAIN, create=True) as store:
        store.commit([block(0, 0, 10)])
        assert store.scan(b"kind", 0, 100) == list(range(10))
        assert store.scan(b"kind:grant", 0, 100) == [0, 2, 4, 6, 8]
        assert store.scan(b"kind:grant", 3, 2) == [4, 6]
        assert store.scan(b"kind:", 0, 100) == []
        assert store.scan(b"c:1", 5, 100) == [7]


def test_term_too_long_to_frame_stops_the_commit_whole(tmp_path: Path) -> None:
    with Store.open(tmp_path, CHAIN, create=True) as store:
        event = EntryWrite(0, b"e", b"p", sha("e"), sha("l"), (bytes(256),))
        broken = block(0, 0, 1)
        with pytest.raises(InvariantBroken, match="index term of 256 bytes"):
            store.commit(
                [BlockWrite(**{name: getattr(broken, name) for name in broken.__slots__} | {"entries": (event,)})]
            )
        assert store.head() is None
        assert store.header(0) is None


@pytest.mark.parametrize(
    "wrong",
    [block(1, 5, 1), block(3, 5, 1), block(0, 5, 1), block(2, 6, 1), block(2, 4, 1), block(2, 0, 5)],
    ids=["same height", "height gap", "genesis again", "index gap", "index again", "log from zero"],
)
def test_block_out_of_order_is_refused_and_changes_nothing(tmp_path: Path, wrong: BlockWrite) -> None:
    with Store.open(tmp_path, CHAIN, create=True) as store:
        store.commit([block(0, 0, 0)])
        store.commit([block(1, 0, 5)])
        with pytest.raises(InvariantBroken, match="expected"):
            store.commit([wrong])
        assert store.head() == Head(Height(1), sha("block 1"), 5, sha("frontier 5"))
        store.commit([block(2, 5, 1)])


def test_first_block_must_be_genesis(tmp_path: Path) -> None:
    with Store.open(tmp_path, CHAIN, create=True) as store, pytest.raises(InvariantBroken, match="expected 0"):
        store.commit([block(1, 0, 0)])


def test_state_is_iterated_across_pages_and_refuses_a_commit_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.store, "STATE_PAGE_ITEMS", 4)
    state = {bytes([number]) * 33: b"%d" % number for number in range(16)}
    with Store.open(tmp_path, CHAIN, create=True) as store:
        store.commit([block(0, 0, 0, changes=dict(state))])
        assert list(store.state_items()) == sorted(state.items())
        store.commit([block(1, 0, 0, changes={b"\x03" * 33: None, b"\x05" * 33: b"new"})])
        assert dict(store.state_items()) == {k: v for k, v in state.items() if k[0] != 3} | {b"\x05" * 33: b"new"}
        items = store.state_items()
        next(items)
        store.commit([block(2, 0, 0)])
        with pytest.raises(InvariantBroken, match="while the state was read"):
            list(items)


class StoreAgainstPlainDicts(RuleBasedStateMachine):
    """The store and a model of plain dicts answer alike, across reopening."""

    directory: Path

    @initialize()
    def start(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.store = Store.open(self.directory, CHAIN, create=True)
        self.entries: list[EntryWrite] = []
        self.blocks: list[BlockWrite] = []
        self.state: dict[bytes, bytes] = {}
        self.mark: bytes | None = None

    @rule(
        count=st.integers(0, 3),
        certified=st.booleans(),
        changes=st.dictionaries(st.binary(min_size=1, max_size=2), st.none() | st.binary(max_size=3), max_size=4),
    )
    def commit(self, count: int, certified: bool, changes: dict[bytes, bytes | None]) -> None:
        written = block(len(self.blocks), len(self.entries), count, changes=changes, certified=certified)
        self.store.commit([written])
        self.blocks.append(written)
        self.entries += written.entries
        for key, value in changes.items():
            self.state.pop(key, None)
            if value is not None:
                self.state[key] = value

    @rule(mark=st.binary(min_size=16, max_size=16))
    def remember(self, mark: bytes) -> None:
        self.store.write_vote_mark(mark)
        self.mark = mark

    @rule()
    def sync(self) -> None:
        assert self.store.sync() == (len(self.blocks) - 1 if self.blocks else None)

    @rule(read_only=st.booleans())
    def reopen(self, read_only: bool) -> None:
        self.store.close()
        if read_only:
            with Store.open_read_only(self.directory, CHAIN) as reader:
                assert dict(reader.state_items()) == self.state
        self.store = Store.open(self.directory, CHAIN, create=False)

    @rule(start=st.integers(0, 20), limit=st.integers(0, 6), third=st.integers(0, 2))
    def scan(self, start: int, limit: int, third: int) -> None:
        term = b"c:%d" % third
        found = [entry.log_index for entry in self.entries if entry.log_index >= start and term in entry.terms]
        assert self.store.scan(term, start, limit) == found[:limit]
        assert self.store.entries_range(start, start + limit) == [
            entry.entry for entry in self.entries[start : start + limit]
        ]

    @invariant()
    def same_answers(self) -> None:
        head = self.store.head()
        assert (head.height + 1 if head else 0) == len(self.blocks)
        assert list(self.store.state_items()) == sorted(self.state.items())
        assert self.store.vote_mark() == self.mark
        for written in self.blocks[-2:]:
            assert self.store.certificate(written.height) == written.certificate
            assert self.store.height_of_block(written.digest) == written.height
            for entry in written.entries:
                assert self.store.height_of_index(entry.log_index) == written.height

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


def test_store_answers_like_plain_dicts(tmp_path: Path) -> None:
    class Machine(StoreAgainstPlainDicts):
        directory = tmp_path / "stateful"

    run_state_machine_as_test(Machine, settings=settings(max_examples=10, stateful_step_count=25, deadline=None))


# Opening


def test_missing_store_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        Store.open(tmp_path / "absent", CHAIN, create=False)
    with pytest.raises(ConfigError, match="found none"):
        Store.open_read_only(tmp_path / "absent", CHAIN)
    assert not (tmp_path / "absent").exists()


def test_directory_of_another_chain_is_refused_naming_both(tmp_path: Path) -> None:
    filled(tmp_path)
    both = f"expected chain {OTHER.hex()}, found chain {CHAIN.hex()}"
    with pytest.raises(ConfigError, match=both):
        Store.open(tmp_path, OTHER, create=True)
    with pytest.raises(ConfigError, match=both):
        Store.open_read_only(tmp_path, OTHER)
    with Store.open(tmp_path, CHAIN, create=False) as store:
        assert check_whole(store, 5) == 4


def test_unknown_schema_version_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    rewrite_meta(tmp_path, b"schema-version", (2).to_bytes(8, "big"))
    with pytest.raises(ConfigError, match="expected schema version 1, found 2"):
        Store.open(tmp_path, CHAIN, create=True)


def test_head_without_its_header_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    for height, size, message in (
        (7, 20, "its header is missing"),
        (2, 20, "found header 3"),
        (3, 30, "its last entry is missing"),
        (3, 10, "found entry 10"),
    ):
        rewrite_meta(tmp_path, b"head", Head(Height(height), sha("x"), size, b"").encode())
        with pytest.raises(InvariantBroken, match=f"{message}: run 'countersign log fsck', then"):
            Store.open(tmp_path, CHAIN, create=False)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        (
            "IO error: No space left on device: While appending to file: /d/000011.sst",
            "free space there and start again",
        ),
        ("IO error: While open a file for random read: Read-only file system", "make it writable and start again"),
        ("Corruption: block checksum mismatch", "run 'countersign log fsck', then 'countersign log repair'"),
    ],
)
def test_advice_is_for_what_the_disk_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, advice: str
) -> None:
    filled(tmp_path)

    def failing(*_: object, **__: object) -> None:
        raise Exception(said)

    with Store.open(tmp_path, CHAIN, create=False) as store, pytest.raises(InvariantBroken) as caught:  # noqa: SIM117
        with store._translated("sync"):
            failing()
    assert str(caught.value).endswith(f": {advice}")
    monkeypatch.setattr(store_layout, "Rdict", SimpleNamespace(list_cf=failing))
    with pytest.raises(InvariantBroken) as caught:
        Store.open(tmp_path, CHAIN, create=False)
    assert str(caught.value).endswith(f"the database does not open: {said}: {advice}")


def test_database_that_lost_its_current_file_is_not_created_anew(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "rocksdb" / "CURRENT").unlink()
    with pytest.raises(ConfigError, match="without its file CURRENT: run 'countersign log repair'"):
        Store.open(tmp_path, CHAIN, create=True)


MAKING = ("rocksdict-config.json", "LOG", "LOCK", "000000.dbtmp", "IDENTITY", "MANIFEST-000001", "000001.dbtmp")
"""What RocksDB writes before CURRENT, in that order."""


@pytest.mark.parametrize("steps", range(len(MAKING) + 1))
def test_making_cut_off_before_its_end_is_finished_at_the_next_start(tmp_path: Path, steps: int) -> None:
    (tmp_path / "rocksdb").mkdir()
    for name in MAKING[:steps]:
        (tmp_path / "rocksdb" / name).write_bytes(b"")
    with Store.open(tmp_path, CHAIN, create=True) as store:
        store.write_vote_mark(b"a mark")
        store.sync()
    with Store.open(tmp_path, CHAIN, create=False) as store:
        assert store.vote_mark() == b"a mark"


@pytest.mark.parametrize("kept", ["*.log", "*.sst", "MANIFEST-*", "OPTIONS-*"])
def test_what_held_a_vote_mark_is_never_taken_for_what_was_never_made(tmp_path: Path, kept: str) -> None:
    """Of all that tells a database apart one file is enough, after whatever start."""
    for _ in range(3):
        with Store.open(tmp_path / "data", CHAIN, create=True) as store:
            store.write_vote_mark(b"a mark")
            store.sync()
            shutil.copytree(tmp_path / "data", tmp_path / "killed")
        for found in (tmp_path / "killed", tmp_path / "data"):
            held = set((found / "rocksdb").glob(kept))
            assert held or (kept == "*.sst" and found.name == "killed")
            for path in (found / "rocksdb").iterdir():
                if path not in held and path.name not in MAKING:
                    path.unlink()
            if held:
                with pytest.raises(ConfigError, match="without its file CURRENT"):
                    Store.open(found, CHAIN, create=True)
            shutil.rmtree(found / "rocksdb")
        shutil.rmtree(tmp_path / "killed")


def test_second_opener_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with Store.open(tmp_path, CHAIN, create=True):
        for opening in (Store.open_read_only, lambda p, c: Store.open(p, c, create=True)):
            with pytest.raises(ConfigError, match="locked by process"):
                opening(tmp_path, CHAIN)
    Store.open(tmp_path, CHAIN, create=False).close()


def test_second_process_is_refused_before_the_database_is_touched(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from node.store import Store\n"
        f"Store.open(Path({str(tmp_path)!r}), {CHAIN!r}, create=True)"
    )
    with Store.open(tmp_path, CHAIN, create=True):
        before = sorted(path.name for path in (tmp_path / "rocksdb").iterdir())
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "ConfigError" in process.stderr
        assert "found it locked by process" in process.stderr
        assert sorted(path.name for path in (tmp_path / "rocksdb").iterdir()) == before
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_close_releases_the_directory_even_with_an_unfinished_iteration(tmp_path: Path) -> None:
    store = Store.open(tmp_path, CHAIN, create=True)
    store.commit([block(0, 0, 2, changes={b"a": b"1", b"b": b"2"})])
    items = store.state_items()
    next(items)
    store.close()
    store.close()
    with Store.open(tmp_path, CHAIN, create=False) as again:
        assert again.state_value(b"b") == b"2"
    with pytest.raises(InvariantBroken, match="used after close"):
        store.entry(0)


def test_refused_opening_releases_the_directory(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError) as kept:
        Store.open(tmp_path, OTHER, create=False)
    Store.open(tmp_path, CHAIN, create=False).close()
    assert kept.value.__traceback__ is not None


def test_reader_sees_what_a_killed_node_left_and_changes_nothing(tmp_path: Path) -> None:
    run_killed(tmp_path, stop_after=3)
    before = {path.name: path.read_bytes() for path in (tmp_path / "rocksdb").glob("*.log")}
    assert any(before.values())
    with Store.open_read_only(tmp_path, CHAIN) as store:
        blocks = check_whole(store, EVENTS)
        assert blocks >= 3
        with pytest.raises(InvariantBroken, match="read only"):
            store.commit([block(blocks, blocks * EVENTS, 0)])
    assert {path.name: path.read_bytes() for path in (tmp_path / "rocksdb").glob("*.log")} == before


# Damage


def write_ahead_log(path: Path) -> Path:
    return max((path / "rocksdb").glob("*.log"), key=lambda log: log.stat().st_size)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.999])
def test_flipped_byte_in_the_write_ahead_log_is_refused(tmp_path: Path, place: float) -> None:
    run_killed(tmp_path, stop_after=5)
    log = write_ahead_log(tmp_path)
    content = bytearray(log.read_bytes())
    content[int(len(content) * place)] ^= 0xFF
    log.write_bytes(content)
    for opening in (Store.open_read_only, lambda p, c: Store.open(p, c, create=False)):
        with pytest.raises(InvariantBroken, match="does not open: Corruption"):
            opening(tmp_path, CHAIN)


def test_torn_tail_of_the_write_ahead_log_drops_at_most_its_last_block(tmp_path: Path) -> None:
    acknowledged = run_killed(tmp_path, stop_after=5)
    log = write_ahead_log(tmp_path)
    log.write_bytes(log.read_bytes()[:-20])
    with Store.open(tmp_path, CHAIN, create=False) as store:
        assert check_whole(store, EVENTS) >= acknowledged - 1


def test_deleted_write_ahead_log_leaves_a_whole_earlier_log(tmp_path: Path) -> None:
    filled(tmp_path, blocks=3, events=EVENTS)
    Store.open(tmp_path, CHAIN, create=False).close()
    run_killed(tmp_path, stop_after=8)
    write_ahead_log(tmp_path).unlink()
    with Store.open(tmp_path, CHAIN, create=False) as store:
        assert check_whole(store, EVENTS) == 3


def records(manifest: bytes) -> list[int]:
    """Where each record of a manifest begins; see ``node/manifest.py``."""
    at, found = 0, []
    while at < len(manifest):
        found.append(at)
        at += 7 + int.from_bytes(manifest[at + 4 : at + 6], "little")
    return found


def holding(path: Path) -> dict[str, bytes]:
    """The files that the log is in."""
    return {file.name: file.read_bytes() for file in (path / "rocksdb").iterdir() if file.suffix in (".sst", ".log")}


class Killed:
    """A data directory as kill -9 left it, and its manifest, of which copies are damaged."""

    def __init__(self, path: Path, blocks: int) -> None:
        self.path, self.blocks = path, blocks
        (self.manifest,) = (path / "rocksdb").glob("MANIFEST-*")
        self.content = self.manifest.read_bytes()

    def opens_whole(self, manifest: bytes, copy: Path) -> bool:
        """Whether it opens with this manifest, and then has all; otherwise it is refused and nothing is deleted."""
        shutil.copytree(self.path, copy)
        (copy / "rocksdb" / self.manifest.name).write_bytes(manifest)
        before = holding(copy)
        refused = ""
        try:
            with Store.open(copy, CHAIN, create=True) as store:
                assert check_whole(store, EVENTS) == self.blocks
        except InvariantBroken as error:
            refused = str(error)
        assert not refused or ("run 'countersign log fsck'" in refused and holding(copy) == before), refused
        shutil.rmtree(copy)
        return not refused


def killed(path: Path, monkeypatch: pytest.MonkeyPatch) -> Killed:
    """In its tables are ledger blocks of before its last start, and later ones; in its write-ahead log is one more."""
    monkeypatch.setattr(store_layout, "_WRITE_BUFFERS_BYTES", 2 << 20)
    files = path / "data" / "rocksdb"
    filled(path / "data", 5, EVENTS)
    with Store.open(path / "data", CHAIN, create=True) as store:
        height, before = 5, len(list(files.glob("*.sst")))
        while len(list(files.glob("*.sst"))) < before + 11 or len(list(files.glob("*.log"))) > 1:
            assert height < 1_000
            store.commit([block(height, height * EVENTS, EVENTS, padding=10_000)])
            height += 1
            time.sleep(0.02)
        store.commit([block(height, height * EVENTS, EVENTS)])
        store.sync()
        shutil.copytree(path / "data", path / "killed")
    return Killed(path / "killed", height + 1)


@pytest.mark.parametrize("since_the_newest_flush", ["a ledger block", "nothing"])
def test_flipped_bit_in_the_length_of_any_record_of_the_manifest_is_refused_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since_the_newest_flush: str
) -> None:
    directory = killed(tmp_path, monkeypatch)
    if since_the_newest_flush == "nothing":
        write_ahead_log(directory.path).write_bytes(b"")
        with Store.open_read_only(directory.path, CHAIN) as store:
            directory.blocks = check_whole(store, EVENTS)
    assert directory.opens_whole(directory.content, tmp_path / "copy")
    for number, at in enumerate(records(directory.content)):
        manifest = bytearray(directory.content)
        manifest[at + 5] ^= 0x40 >> number % 3
        assert not directory.opens_whole(bytes(manifest), tmp_path / "copy"), (number, at)


@pytest.mark.parametrize("ended", ["killed", "stopped"])
def test_manifest_that_lost_its_end_opens_whole_or_is_refused_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    """The end lost is also that of flushes whose part of the write-ahead log is gone."""
    if ended == "killed":
        directory = killed(tmp_path, monkeypatch)
    else:
        filled(tmp_path / "stopped", 5, EVENTS)
        directory = Killed(tmp_path / "stopped", 5)
    starts = records(directory.content)
    opened = [directory.opens_whole(directory.content[:at], tmp_path / "copy") for at in starts]
    torn = [directory.opens_whole(directory.content[: at + 9], tmp_path / "copy") for at in starts]
    assert opened == torn == sorted(opened)
    assert not opened[len(starts) // 2]


def test_young_database_whose_manifest_lost_families_is_refused_and_keeps_its_write_ahead_log(tmp_path: Path) -> None:
    run_killed(tmp_path / "data", stop_after=3)
    directory = Killed(tmp_path / "data", -1)
    for at in records(directory.content):
        assert not directory.opens_whole(directory.content[:at], tmp_path / "copy")


def test_what_a_crash_left_of_an_unfinished_table_stops_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = killed(tmp_path, monkeypatch)
    tables = sorted((directory.path / "rocksdb").glob("*.sst"))
    unfinished = directory.path / "rocksdb" / "000900.sst"
    unfinished.write_bytes(tables[-1].read_bytes()[:100])
    assert directory.opens_whole(directory.content, tmp_path / "copy")
    with Store.open(directory.path, CHAIN, create=True):
        assert not unfinished.exists()


def test_making_of_families_cut_off_before_its_end_is_finished_at_the_next_start(tmp_path: Path) -> None:
    with Store.open(tmp_path / "data", CHAIN, create=True):
        shutil.copytree(tmp_path / "data", tmp_path / "killed")
    for log in (tmp_path / "killed" / "rocksdb").glob("*.log"):
        log.write_bytes(b"")
    directory = Killed(tmp_path / "killed", 0)
    starts, names = records(directory.content), [name.encode() for name in store_layout._FAMILIES]
    families = [
        at
        for at, after in zip(starts, [*starts[1:], None], strict=True)
        if any(name in directory.content[at:after] for name in names)
    ]
    assert len(families) == len(names)
    for at in families:
        assert directory.opens_whole(directory.content[:at], tmp_path / "copy")


def test_flipped_byte_in_a_table_is_reported_by_scans_that_would_end_silently(tmp_path: Path) -> None:
    filled(tmp_path, blocks=40, events=50, padding=200)
    Store.open(tmp_path, CHAIN, create=False).close()
    tables = sorted((tmp_path / "rocksdb").glob("*.sst"), key=lambda table: table.stat().st_size)
    for table in tables:
        content = table.read_bytes()
        at = content.find(b"entry 1")
        if at >= 0:
            table.write_bytes(content[:at] + b"E" + content[at + 1 :])
            break
    else:
        pytest.fail("no table holds the entries")
    with Store.open(tmp_path, CHAIN, create=False) as store:
        with pytest.raises(InvariantBroken, match="Corruption"):
            store.entries_range(0, 2_000)
        with pytest.raises(InvariantBroken, match="Corruption"):
            [store.entry(index) for index in range(2_000)]
    database = Rdict(
        str(tmp_path / "rocksdb"),
        options=Options(raw_mode=True),
        access_type=AccessType.read_only(False),
        column_families={"entries": Options(raw_mode=True)},
    )
    assert len(list(database.get_column_family("entries").items())) < 2_000  # the trap: no error
    database.close()


# Durability


EVENTS = 7
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import CHAIN, EVENTS, Store, block
store = Store.open(Path(sys.argv[1]), CHAIN, create=True)
head = store.head()
height = 0 if head is None else head.height + 1
while True:
    store.commit([block(height, height * EVENTS, EVENTS)])
    height += 1
    if height % 3 == 0:
        print(store.sync() + 1, flush=True)
"""


def run_killed(path: Path, stop_after: int) -> int:
    """Commit and sync in another process, kill -9 it after some acknowledgements; returns blocks acknowledged."""
    command = [sys.executable, "-c", WRITER, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(stop_after)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().splitlines()]
    assert process.returncode == -signal.SIGKILL
    return acknowledged[-1]


@pytest.mark.processes
def test_killed_process_loses_no_acknowledged_block_and_tears_none(tmp_path: Path) -> None:
    for cycle in range(15):
        acknowledged = run_killed(tmp_path, stop_after=1 + 3 * cycle)
        with Store.open(tmp_path, CHAIN, create=False) as store:
            head = store.head()
            assert head is not None
            assert head.height + 1 >= acknowledged
            if cycle in (0, 7, 14):
                check_whole(store, EVENTS)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import CHAIN, Store, block
from consensus.rejection import InvariantBroken
store = Store.open(Path(sys.argv[1]), CHAIN, create=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
height = 0
try:
    while True:
        store.commit([block(height, height * 20, 20, padding=100)])
        store.sync()
        height += 1
except InvariantBroken:
    print(height)
for refused in (lambda: store.commit([block(height, height * 20, 20)]), store.sync, lambda: store.write_vote_mark(b"")):
    try:
        refused()
    except InvariantBroken as error:
        assert "earlier failure" in str(error), error
    else:
        raise AssertionError("written after a failure")
print("refused", flush=True)
import os
os._exit(0)
"""


def test_full_disk_stops_writing_for_good_and_keeps_acknowledged_blocks(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.split()[1:] == ["refused"], process.stderr
    acknowledged = int(process.stdout.split()[0])
    assert acknowledged > 3
    with Store.open(tmp_path, CHAIN, create=False) as store:
        head = store.head()
        assert head is not None
        assert acknowledged - 1 <= head.height <= acknowledged
        assert len(store.entries_range(0, head.log_size)) == head.log_size == 20 * (head.height + 1)


def test_sync_in_a_worker_thread_leaves_other_threads_running(tmp_path: Path) -> None:
    """The GIL is free while the disk works; with a synchronous write it would not be."""
    turns = 0
    turns_within_sync: list[int] = []
    finished = threading.Event()

    with Store.open(tmp_path, CHAIN, create=True) as store:

        def sync() -> None:
            for height in range(10):
                store.commit([block(height, height * 100, 100, padding=50_000)])
                before = turns
                store.sync()
                turns_within_sync.append(turns - before)
            finished.set()

        worker = threading.Thread(target=sync)
        worker.start()
        while not finished.is_set():
            turns += 1
            time.sleep(0)
        worker.join()
    assert max(turns_within_sync) >= 5, turns_within_sync


def test_write_buffers_are_filled_by_what_is_written_and_not_by_families_that_hold_little(tmp_path: Path) -> None:
    """RocksDB's arenas, of a MiB for each family, would take most of the buffers, and tables be written too often."""
    with Store.open(tmp_path, CHAIN, create=True) as store:
        for height in range(12):
            store.commit([block(height, height * 100, 100, padding=10_000)])
        store.sync()
        assert list((tmp_path / "rocksdb").glob("*.sst")) == []


def test_commits_go_on_while_a_worker_syncs(tmp_path: Path) -> None:
    with Store.open(tmp_path, CHAIN, create=True) as store:
        covered: list[int] = []
        done = threading.Event()

        def sync() -> None:
            while not done.is_set():
                height = store.sync()
                covered.append(-1 if height is None else height)

        worker = threading.Thread(target=sync)
        worker.start()
        for height in range(200):
            store.commit([block(height, height * EVENTS, EVENTS)])
        done.set()
        worker.join()
        assert covered == sorted(covered)
        assert store.sync() == 199
        assert check_whole(store, EVENTS) == 200


def rewrite_meta(path: Path, key: bytes, value: bytes) -> None:
    options = Options(raw_mode=True)
    names = Rdict.list_cf(str(path / "rocksdb"))
    database = Rdict(str(path / "rocksdb"), options=options, column_families={n: Options(raw_mode=True) for n in names})
    database.get_column_family("meta").put(key, value)
    database.close()
