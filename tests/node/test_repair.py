"""Damaged databases of real nodes: each is named, none is served, and a repaired node has what its peers have."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from node_fixtures import Consortium, running, until
from rocksdict import AccessType

from consensus.block import header_digest
from consensus.rejection import ConfigError, InvariantBroken
from node.fsck import check_data_directory
from node.fsck_reader import Report
from node.identity import LEFT_EPOCHS_FILE
from node.journal import JOURNAL_FILE, Journal, VoteMark, journal_file
from node.ledger import KIND_TERM, Ledger
from node.repair import SOME_VOTES, set_aside, was_cut_off
from node.runner import Node
from node.store import REPAIRING_DIRECTORY, Store
from node.store_layout import SCHEMA_KEY, open_database, vote_mark_key

COUNTS = {"data-source": 3, "governance": 1, "operator": 1, "verifier": 1}
THRESHOLDS = {"data-source": 2, "governance": 1, "operator": 1}
VOTER, VERIFIER = "data-source-3", "verifier-1"
OTHERS = ("data-source-1", "data-source-2", "governance-1", "operator-1")
EVENTS = 40
IN_FIRST_DATA_BLOCK = 12
"""Offset in a table: the first block holds an entry of at least this length; a filter block may follow at once."""


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """A stopped consortium with 40 events. Of two members there are copies as kill -9 would have left them, the first
    half of the log in tables and the rest in the write-ahead log."""
    consortium = Consortium(tmp_path_factory.mktemp("repair"), COUNTS, thresholds=THRESHOLDS)

    async def write(first: int) -> None:
        nodes = [consortium.node(name) for name in (*OTHERS, VOTER, VERIFIER)]
        async with running(nodes):
            for number in range(first, first + EVENTS // 2):
                nodes[0].submit(consortium.source_event("data-source-1", number))
            await until(lambda: {node.snapshot().log_size for node in nodes} == {first + EVENTS // 2})
            await until(lambda: not any(node.replica.undurable for node in nodes))
            for name in (VOTER, VERIFIER):
                as_killed(consortium.folder / name, consortium.folder / f"{name}.kept")

    trio.run(write, 0)
    trio.run(write, EVENTS // 2)
    # On a busy machine a vote more may be cast while nodes are stopped one after another, and peers remember it.
    shutil.copy(consortium.folder / VOTER / JOURNAL_FILE, consortium.folder / f"{VOTER}.kept" / JOURNAL_FILE)
    for name in OTHERS:
        shutil.copytree(consortium.folder / name, consortium.folder / f"{name}.kept")
    return consortium


def as_killed(directory: Path, copy: Path) -> None:
    """Copy a running node's database as it is; the journal, which remembers how far it had come, is copied later."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory / "rocksdb", copy / "rocksdb")


@pytest.fixture(params=[VERIFIER, VOTER])
def victim(history: Consortium, request: pytest.FixtureRequest) -> "Victim":
    """One member's data directory; every member's is as it was, or peers would remember votes of the test before."""
    for name in (*OTHERS, request.param):
        shutil.rmtree(history.folder / name)
        shutil.copytree(history.folder / f"{name}.kept", history.folder / name)
    return Victim(history, request.param)


class Victim:
    """The member whose disk is damaged."""

    def __init__(self, consortium: Consortium, name: str) -> None:
        self.consortium, self.name = consortium, name
        self.directory = consortium.folder / name
        self.database = self.directory / "rocksdb"

    def fsck(self) -> Report:
        return check_data_directory(self.directory, self.consortium.genesis, lambda stage, done, total: None)

    def repair(self) -> Path:
        return set_aside(self.directory, self.consortium.genesis.chain_id).directory

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.database.glob(pattern), key=lambda path: path.stat().st_size)

    @asynccontextmanager
    async def among_peers(self) -> AsyncIterator[tuple[Node, Node]]:
        """The victim's node and a peer's, all running; afterwards their logs agree and the victim's is sound."""
        node = self.consortium.node(self.name)
        peers = [self.consortium.node(name) for name in OTHERS]
        async with running([node, *peers]):
            await until(lambda: node.snapshot().log_size >= EVENTS)
            await until(lambda: node.snapshot().log_root == peers[0].snapshot().log_root)
            yield node, peers[0]
            await until(lambda: not node.replica.undurable)
        assert self.fsck().damages == []

    async def check_restored(self) -> None:
        async with self.among_peers() as (node, peer):
            assert not node.replica.halted
            final = node.ledger.final.header
            assert node.ledger.event(EVENTS - 1) == peer.ledger.event(EVENTS - 1)
            await until(lambda: peer.ledger.store.header(final.height) is not None)
            assert peer.ledger.store.header(final.height) == node.ledger.store.header(final.height)
            if self.name == VOTER:
                await until(lambda: node.snapshot().votes_sent > 0)


def flip(path: Path, place: float = 0.4) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0xFF
    path.write_bytes(content)


def flip_length(manifest: Path, place: float) -> None:
    """In the last record that begins before ``place``."""
    content = bytearray(manifest.read_bytes())
    at = following = 0
    while following < len(content) * place:
        at, following = following, following + 7 + int.from_bytes(content[following + 4 : following + 6], "little")
    content[at + 5] ^= 0x20
    manifest.write_bytes(content)


def cut_off(path: Path, place: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * place)])


def flip_tables(victim: Victim) -> None:
    for table in victim.files("*.sst"):
        content = bytearray(table.read_bytes())
        content[IN_FIRST_DATA_BLOCK] ^= 0xFF
        table.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Victim], None], str]] = {
    "bytes flipped in tables": (flip_tables, "Corruption"),
    "byte flipped in the manifest": (lambda victim: flip(victim.files("MANIFEST-*")[-1]), "MANIFEST"),
    "byte flipped in the write-ahead log": (lambda victim: flip(victim.files("*.log")[-1]), ".log)"),
    "table missing": (lambda victim: victim.files("*.sst")[-1].unlink(), ".sst"),
    "manifest missing": (lambda victim: victim.files("MANIFEST-*")[-1].unlink(), "MANIFEST"),
    "manifest record's length flipped": (
        lambda victim: flip_length(victim.files("MANIFEST-*")[-1], 0.5),
        "MANIFEST",
    ),
    "manifest's last record's length flipped": (
        lambda victim: flip_length(victim.files("MANIFEST-*")[-1], 1.0),
        "MANIFEST",
    ),
    "manifest cut off": (lambda victim: cut_off(victim.files("MANIFEST-*")[-1], 0.2), "does not list"),
    "CURRENT missing": (lambda victim: (victim.database / "CURRENT").unlink(), "CURRENT"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_file_is_named_refused_and_repaired_from_peers(victim: Victim, damage: str) -> None:
    inflict, named = DAMAGES[damage]
    assert victim.files("*.sst")
    inflict(victim)
    report = victim.fsck()
    assert not report.sound
    assert any(named in found.detail + found.key for found in report.damages), report.damages
    with pytest.raises((InvariantBroken, ConfigError), match="countersign log"):
        victim.consortium.node(victim.name)
    aside = victim.repair()
    assert aside.is_dir()
    trio.run(victim.check_restored)


@pytest.mark.parametrize("lost", ["write-ahead log", "whole database"])
def test_what_was_lost_without_a_trace_is_fetched_again(victim: Victim, lost: str) -> None:
    if lost == "whole database":
        shutil.rmtree(victim.database)
    else:
        before = victim.fsck().log_size
        victim.files("*.log")[-1].unlink()
        report = victim.fsck()
        assert report.sound, report.damages
        assert report.log_size < before
    trio.run(victim.check_restored)


def read_everything(directory: Path, consortium: Consortium) -> None:
    """What a node reads at its start and while it serves."""
    with Store.open(directory, consortium.genesis.chain_id, create=False) as store:
        ledger = Ledger(store, consortium.genesis)
        for height in range(1, ledger.final.header.height + 1):
            header, _, _ = ledger.block(height)
            assert store.height_of_block(header_digest(header)) == height
            store.certificate(height)
            ledger.votes(height)
        for index in store.scan(KIND_TERM + b"source", 0, 2 * EVENTS):
            ledger.receipt(ledger.checked(index).id)


def live_tables(directory: Path) -> list[str]:
    """Those the manifest names: a compaction that closing cut off leaves others, which nobody reads."""
    database = open_database(directory / "rocksdb", False, AccessType.read_only(False))
    names = sorted(str(file["name"]).removeprefix("/") for file in database.root.live_files())
    database.families.clear()
    database.handles.clear()
    database.root.close()
    return names


def test_no_table_can_be_damaged_without_a_reader_that_stops(history: Consortium, tmp_path: Path) -> None:
    intact = tmp_path / "intact"
    shutil.copytree(history.folder / "governance-1", intact)
    read_everything(intact, history)
    tables = live_tables(intact)
    assert len(tables) >= 10
    for name in tables:
        shutil.copytree(intact, tmp_path / "damaged")
        table = tmp_path / "damaged" / "rocksdb" / name
        content = bytearray(table.read_bytes())
        content[IN_FIRST_DATA_BLOCK] ^= 0xFF
        table.write_bytes(content)
        report = check_data_directory(tmp_path / "damaged", history.genesis, lambda stage, done, total: None)
        damages = [damage for damage in report.damages if name in damage.detail]
        assert damages, (name, report.damages)
        families = {damage.family for damage in damages}
        if families != {"meta"}:  # there, newer values hide a whole table
            with pytest.raises(InvariantBroken, match=r"Corruption.*countersign log fsck"):
                read_everything(tmp_path / "damaged", history)
        shutil.rmtree(tmp_path / "damaged")


# What a repair keeps


def test_the_damaged_database_is_kept_and_a_second_one_beside_it(victim: Victim) -> None:
    first, second = victim.repair(), victim.repair()
    assert (first.name, second.name) == ("rocksdb.damaged-1", "rocksdb.damaged-2")
    assert sorted(path.name for path in first.glob("CURRENT")) == ["CURRENT"]
    assert not (victim.directory / REPAIRING_DIRECTORY).exists()


def test_an_identity_whose_journal_is_gone_too_does_not_vote_after_a_repair(history: Consortium) -> None:
    victim = Victim(history, VOTER)
    shutil.rmtree(victim.directory)
    shutil.copytree(history.folder / f"{VOTER}.kept", victim.directory)
    (victim.directory / JOURNAL_FILE).unlink()
    flip(victim.files("MANIFEST-*")[-1])
    victim.repair()

    async def stays_silent() -> None:
        async with victim.among_peers() as (node, _):
            assert "expected the vote journal, found none" in node.snapshot().why_not_voting
            assert not node.snapshot().voting
        assert not (victim.directory / JOURNAL_FILE).exists()

    trio.run(stays_silent)


def test_a_journal_restored_from_an_older_copy_is_still_noticed_after_a_repair(history: Consortium) -> None:
    victim = Victim(history, VOTER)
    shutil.rmtree(victim.directory)
    shutil.copytree(history.folder / f"{VOTER}.kept", victim.directory)
    flip_tables(victim)
    (victim.directory / JOURNAL_FILE).unlink()
    member = next(member for member in history.genesis.members if member.name == VOTER)
    Journal.create(victim.directory / JOURNAL_FILE, history.genesis.chain_id, member.id).close()
    victim.repair()
    node = history.node(VOTER)
    try:
        assert "as the store remembers" in node.snapshot().why_not_voting
        opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert str(victim.directory / JOURNAL_FILE) not in opened
    finally:
        node.ledger.store.close()


MARKS = {0: VoteMark(9, 30), 1: VoteMark(4, 12), 3: VoteMark(2, 5)}


@pytest.fixture
def marked(history: Consortium, tmp_path: Path) -> Path:
    """The data directory of a member that voted in three epochs; nothing of it but the database is left."""
    with Store.open(tmp_path / "data", history.genesis.chain_id, create=True) as store:
        for epoch, mark in MARKS.items():
            store.write_vote_mark(mark.encode(), epoch)
        store.sync()
    return tmp_path / "data"


def repaired_marks(history: Consortium, directory: Path) -> dict[int, VoteMark]:
    """What the database remembers after a repair, by epoch; it is sound."""
    set_aside(directory, history.genesis.chain_id)
    assert check_data_directory(directory, history.genesis, lambda stage, done, total: None).damages == []
    with Store.open(directory, history.genesis.chain_id, create=False) as store:
        found = {epoch: store.vote_mark(epoch) for epoch in range(8)}
    return {epoch: VoteMark.decode(mark) for epoch, mark in found.items() if mark is not None}


def test_a_repair_carries_over_the_vote_marks_of_all_epochs(history: Consortium, marked: Path) -> None:
    assert repaired_marks(history, marked) == MARKS
    assert repaired_marks(history, marked) == MARKS


def test_where_no_mark_can_be_read_no_epoch_without_its_journal_is_voted_in_again(
    history: Consortium, marked: Path
) -> None:
    (marked / LEFT_EPOCHS_FILE).write_bytes(b"3\n")
    (marked / journal_file(1)).write_bytes(b"a journal")
    flip(next((marked / "rocksdb").glob("MANIFEST-*")))
    assert repaired_marks(history, marked) == dict.fromkeys((0, 2, 3), SOME_VOTES)


def test_a_journal_names_its_epoch_where_the_mark_of_it_is_lost(history: Consortium, marked: Path) -> None:
    (marked / journal_file(2)).write_bytes(b"a journal")
    (marked / LEFT_EPOCHS_FILE).write_bytes(b"neither a number\n")
    flip(next((marked / "rocksdb").glob("MANIFEST-*")))
    assert repaired_marks(history, marked) == dict.fromkeys((0, 1), SOME_VOTES)


def test_a_database_that_lost_all_it_held_is_not_taken_for_one_without_votes(history: Consortium, marked: Path) -> None:
    with Store.open(marked, history.genesis.chain_id, create=False) as store:
        store._family("meta").delete(SCHEMA_KEY)
        store._family("meta").delete(vote_mark_key(1))
    assert repaired_marks(history, marked) == {**MARKS, 1: SOME_VOTES, 2: SOME_VOTES}


def test_an_epoch_that_an_intact_database_has_no_mark_of_is_not_taken_for_voted_in(
    history: Consortium, marked: Path
) -> None:
    (marked / LEFT_EPOCHS_FILE).write_bytes(b"5\n")
    assert repaired_marks(history, marked) == MARKS


def test_a_first_start_that_was_cut_off_and_repaired_silences_nobody(history: Consortium, tmp_path: Path) -> None:
    (tmp_path / "rocksdb").mkdir()
    (tmp_path / "rocksdb" / "MANIFEST-000001").write_bytes(b"")
    (damage,) = check_data_directory(tmp_path, history.genesis, lambda stage, done, total: None).damages
    assert damage.detail == "missing: never finished; the node does that when it starts"
    assert repaired_marks(history, tmp_path) == {}


def test_a_database_made_anew_beside_an_epoch_that_had_begun_may_stand_for_one_with_votes(
    history: Consortium, tmp_path: Path
) -> None:
    (tmp_path / "rocksdb").mkdir()
    (tmp_path / LEFT_EPOCHS_FILE).write_bytes(b"1\n")
    assert repaired_marks(history, tmp_path) == dict.fromkeys((0, 1), SOME_VOTES)


@pytest.mark.parametrize("renames", [0, 1])
def test_a_repair_cut_off_is_refused_by_the_node_and_finished_by_the_next(
    history: Consortium, tmp_path: Path, renames: int
) -> None:
    directory = tmp_path / "data"
    shutil.copytree(history.folder / "governance-1", directory)
    chain_id = history.genesis.chain_id
    mark = VoteMark(7, 9).encode()
    with Store.open(directory / REPAIRING_DIRECTORY, chain_id, create=True) as store:
        store.write_vote_mark(mark)
    if renames:
        (directory / "rocksdb").rename(directory / "rocksdb.damaged-1")
        assert was_cut_off(directory)
        with pytest.raises(ConfigError, match="cut off: run 'countersign log repair' again"):
            Store.open(directory, chain_id, create=True)
    assert set_aside(directory, chain_id).directory == directory / "rocksdb.damaged-1"
    with Store.open(directory, chain_id, create=False) as store:
        assert store.head() is None
        kept = store.vote_mark()
        assert kept is not None
        assert (kept == mark) == bool(renames)
        assert VoteMark.decode(kept).records > 0


def test_a_directory_in_use_or_empty_is_not_repaired(history: Consortium, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        set_aside(tmp_path, history.genesis.chain_id)
    directory = history.folder / "operator-1"
    with (
        Store.open(directory, history.genesis.chain_id, create=False),
        pytest.raises(ConfigError, match="locked by process"),
    ):
        set_aside(directory, history.genesis.chain_id)
    assert (directory / "rocksdb" / "CURRENT").exists()
