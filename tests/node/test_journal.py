"""Vote journal: no acknowledged vote is forgotten, and a journal that forgot one is never voted from."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import node.files
from consensus.identifiers import ChainId, MemberId
from consensus.rejection import ConfigError, InvariantBroken
from node.journal import MAX_RECORD_BYTES, Journal, JournalLost, VoteMark, VoteRecord, check_not_lost
from node.store import Store

CHAIN, MEMBER = ChainId(b"C" * 32), MemberId(b"M" * 32)
HEAD_BYTES = 96

votes = st.builds(VoteRecord, view=st.integers(0, 2**64 - 1), vote=st.binary(max_size=60))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "votes.journal"


def filled(path: Path, count: int = 5) -> list[VoteRecord]:
    records = [VoteRecord(view, b"vote %d" % view) for view in range(1, count + 1)]
    journal = Journal.create(path, CHAIN, MEMBER)
    for record in records:
        journal.append([record])
    journal.close()
    return records


def reopened(path: Path) -> tuple[VoteRecord, ...]:
    journal = Journal.open(path, CHAIN, MEMBER)
    records = journal.records()
    journal.close()
    return records


def test_votes_are_on_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(path, CHAIN, MEMBER)
    sizes_at_sync: list[int] = []
    sync = os.fdatasync

    def recording(descriptor: int) -> None:
        sizes_at_sync.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", recording)
    mark = journal.append([VoteRecord(3, b"notarize"), VoteRecord(3, b"finalize")])
    assert mark == journal.mark == VoteMark(view=3, records=2)
    assert sizes_at_sync == [path.stat().st_size] == [journal.size_bytes]  # one sync for the batch, after it
    journal.close()
    assert reopened(path) == (VoteRecord(3, b"notarize"), VoteRecord(3, b"finalize"))


def test_creation_syncs_the_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(node.files, "sync_directory", synced.append)
    Journal.create(path, CHAIN, MEMBER).close()
    assert set(synced) == {path.parent}
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_read_at_start_is_written_anew_for_it_may_never_have_reached_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = filled(path)
    before = path.stat().st_ino, path.read_bytes()
    synced: list[int] = []
    sync = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    journal = Journal.open(path, CHAIN, MEMBER)
    assert path.stat().st_ino != before[0]
    assert path.read_bytes() == before[1]
    assert synced == [path.stat().st_ino, path.parent.stat().st_ino]
    assert journal.records() == tuple(records)
    journal.close()


def test_journal_knows_from_which_view_on_it_remembers(path: Path) -> None:
    filled(path, 9)
    journal = Journal.open(path, CHAIN, MEMBER)
    assert journal.first_view == 0
    journal.compact(4)
    assert journal.first_view == 4
    journal.append([VoteRecord(12, b"twelve")])
    journal.compact(11)
    assert journal.first_view == 12
    journal.compact(13)
    assert journal.first_view == 13
    journal.close()
    again = Journal.open(path, CHAIN, MEMBER)
    assert again.first_view == 13
    again.append([VoteRecord(15, b"fifteen")])
    assert (again.mark.view, again.records()) == (15, (VoteRecord(15, b"fifteen"),))
    again.close()


def test_journal_is_created_only_once(path: Path) -> None:
    filled(path)
    with pytest.raises(ConfigError, match="found one"):
        Journal.create(path, CHAIN, MEMBER)
    assert len(reopened(path)) == 5


def test_missing_journal_is_lost(path: Path) -> None:
    with pytest.raises(JournalLost, match="must not vote until it is rotated"):
        Journal.open(path, CHAIN, MEMBER)


def test_journal_of_another_chain_or_member_is_refused(path: Path) -> None:
    filled(path)
    with pytest.raises(ConfigError, match="of chain"):
        Journal.open(path, ChainId(b"D" * 32), MEMBER)
    with pytest.raises(ConfigError, match="of member"):
        Journal.open(path, CHAIN, MemberId(b"N" * 32))


def test_every_torn_tail_is_cut_off_and_appending_goes_on(path: Path) -> None:
    records = filled(path, 3)
    whole = path.read_bytes()
    last_bytes = (len(whole) - HEAD_BYTES) // 3
    for missing in range(1, last_bytes + 1):
        path.write_bytes(whole[:-missing])
        journal = Journal.open(path, CHAIN, MEMBER)
        assert journal.mark == VoteMark(2, 2)
        assert path.stat().st_size == len(whole) - last_bytes == journal.size_bytes
        journal.append([records[2]])
        journal.close()
        assert path.read_bytes() == whole


def test_every_flipped_byte_is_damage_and_never_a_shorter_journal(path: Path) -> None:
    filled(path, 3)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        with pytest.raises(JournalLost, match="found damage at byte"):
            Journal.open(path, CHAIN, MEMBER)


def test_removed_or_swapped_record_is_damage(path: Path) -> None:
    filled(path, 3)
    whole = path.read_bytes()
    size = (len(whole) - HEAD_BYTES) // 3
    head, first, second, third = (
        whole[:HEAD_BYTES],
        *(whole[HEAD_BYTES + i * size : HEAD_BYTES + (i + 1) * size] for i in range(3)),
    )
    for forged in (head + first + third, head + second + first + third, head + second + third):
        path.write_bytes(forged)
        with pytest.raises(JournalLost, match="damage"):
            Journal.open(path, CHAIN, MEMBER)


@pytest.mark.parametrize("content", [b"", b"CSVOTES1", bytes(HEAD_BYTES), b"\x00" * 500])
def test_emptied_journal_is_damage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(JournalLost, match="damage at byte 0"):
        Journal.open(path, CHAIN, MEMBER)


def test_journal_of_another_format_is_refused(path: Path) -> None:
    filled(path)
    head = b"CSVOTES2" + path.read_bytes()[8:88]
    path.write_bytes(head + hashlib.sha256(head).digest()[:8])
    with pytest.raises(JournalLost, match="damage at byte 0"):
        Journal.open(path, CHAIN, MEMBER)


def test_zeroes_after_the_last_record_are_damage(path: Path) -> None:
    filled(path)
    path.write_bytes(path.read_bytes() + bytes(64))
    with pytest.raises(JournalLost, match="damage"):
        Journal.open(path, CHAIN, MEMBER)


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_after_a_failed_write_no_later_vote_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    journal = Journal.create(path, CHAIN, MEMBER)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(InvariantBroken, match="No space left"):
            journal.append([VoteRecord(1, b"v")])
    with pytest.raises(InvariantBroken, match="earlier failure"):
        journal.append([VoteRecord(2, b"v")])
    assert journal.mark == VoteMark(0, 0)
    journal.close()
    assert len(reopened(path)) == (1 if call == "fdatasync" else 0)  # counted as cast: it may be on disk


def test_short_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    journal = Journal.create(path, CHAIN, MEMBER)
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    journal.append([VoteRecord(1, b"a vote longer than seven bytes")])
    journal.close()
    assert reopened(path) == (VoteRecord(1, b"a vote longer than seven bytes"),)


def test_oversized_vote_is_refused_and_changes_nothing(path: Path) -> None:
    journal = Journal.create(path, CHAIN, MEMBER)
    with pytest.raises(InvariantBroken, match="at most"):
        journal.append([VoteRecord(1, b"ok"), VoteRecord(1, bytes(MAX_RECORD_BYTES + 1))])
    assert path.stat().st_size == HEAD_BYTES
    journal.append([VoteRecord(1, b"ok")])
    journal.close()


def test_closed_journal_refuses_votes(path: Path) -> None:
    journal = Journal.create(path, CHAIN, MEMBER)
    journal.close()
    journal.close()
    with pytest.raises(InvariantBroken, match="used after close"):
        journal.append([VoteRecord(1, b"v")])


def test_compaction_drops_final_views_and_keeps_the_mark(path: Path) -> None:
    records = filled(path, 9)
    journal = Journal.open(path, CHAIN, MEMBER)
    before = journal.size_bytes
    journal.compact(8)
    assert journal.mark == VoteMark(9, 9)
    assert journal.size_bytes == path.stat().st_size < before
    journal.append([VoteRecord(10, b"ten")])
    journal.compact(100)
    assert journal.records() == ()
    assert journal.mark == VoteMark(10, 10)
    journal.compact(101)
    journal.append([VoteRecord(11, b"eleven")])
    journal.close()
    again = Journal.open(path, CHAIN, MEMBER)
    assert again.mark == VoteMark(11, 11)
    assert again.records() == (VoteRecord(11, b"eleven"),)
    again.close()
    assert records[8] == VoteRecord(9, b"vote 9")


def test_crash_inside_compaction_leaves_the_old_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error")

    records = filled(path)
    journal = Journal.open(path, CHAIN, MEMBER)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(InvariantBroken, match="compaction failed"):
            journal.compact(4)
    journal.close()
    assert reopened(path) == tuple(records)
    again = Journal.open(path, CHAIN, MEMBER)
    again.compact(4)
    again.close()
    assert reopened(path) == tuple(records[3:])


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.one_of(st.lists(votes, max_size=4), st.integers(0, 2**64 - 1), st.just("reopen")), max_size=12)
)
def test_journal_keeps_what_a_plain_list_keeps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[VoteRecord] | int | str]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "votes"
    journal = Journal.create(path, CHAIN, MEMBER)
    kept: list[VoteRecord] = []
    view = count = 0
    for step in steps:
        if isinstance(step, list):
            journal.append(step)
            kept += step
            view, count = max([view, *(record.view for record in step)]), count + len(step)
        elif isinstance(step, int):
            journal.compact(step)
            kept = [record for record in kept if record.view >= step]
        else:
            journal.close()
            journal = Journal.open(path, CHAIN, MEMBER)
        assert journal.records() == tuple(kept)
        assert journal.mark == VoteMark(view, count)
        assert journal.size_bytes == path.stat().st_size
    journal.close()


def test_rolled_back_or_shortened_journal_may_not_vote(path: Path) -> None:
    check_not_lost(VoteMark(7, 20), None)
    check_not_lost(VoteMark(7, 20), VoteMark(7, 20))
    check_not_lost(VoteMark(8, 22), VoteMark(7, 20))
    for journal in (VoteMark(6, 20), VoteMark(7, 19), VoteMark(0, 0)):
        with pytest.raises(JournalLost, match="as the store remembers"):
            check_not_lost(journal, VoteMark(7, 20))


def test_last_vote_cut_off_a_complete_journal_is_noticed_by_the_store_mark(path: Path) -> None:
    journal = Journal.create(path, CHAIN, MEMBER)
    mark = journal.append([VoteRecord(4, b"notarize"), VoteRecord(4, b"finalize")])
    journal.close()
    os.truncate(path, path.stat().st_size - 1)
    shortened = Journal.open(path, CHAIN, MEMBER)
    with pytest.raises(JournalLost):
        check_not_lost(shortened.mark, VoteMark.decode(mark.encode()))
    shortened.close()


def test_deleted_and_recreated_journal_is_noticed_by_the_store(tmp_path: Path, path: Path) -> None:
    with Store.open(tmp_path / "data", CHAIN, create=True) as store:
        journal = Journal.create(path, CHAIN, MEMBER)
        store.write_vote_mark(journal.append([VoteRecord(5, b"notarize")]).encode())
        journal.close()
    path.unlink()
    with Store.open(tmp_path / "data", CHAIN, create=False) as store:
        remembered = store.vote_mark()
        assert remembered is not None
        journal = Journal.create(path, CHAIN, MEMBER)
        with pytest.raises(JournalLost, match="expected at least 1 votes up to view 5"):
            check_not_lost(journal.mark, VoteMark.decode(remembered))
        journal.close()


def test_vote_mark_of_another_length_is_refused() -> None:
    with pytest.raises(InvariantBroken, match="expected 16"):
        VoteMark.decode(bytes(15))


KILLED = """
import sys
from pathlib import Path
from consensus.identifiers import ChainId, MemberId
from node.journal import Journal, VoteRecord
journal = Journal.open(Path(sys.argv[1]), ChainId(b"C" * 32), MemberId(b"M" * 32))
view = journal.mark.view
while True:
    view += 1
    journal.append([VoteRecord(view, b"v" * (view % 997))])
    print(view, flush=True)
    if view % 50 == 0:
        journal.compact(view - 10)
"""


@pytest.mark.processes
def test_killed_process_loses_no_acknowledged_vote(path: Path) -> None:
    Journal.create(path, CHAIN, MEMBER).close()
    acknowledged = 0
    for cycle in range(6):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(30 + 17 * cycle):
                acknowledged = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, rest)])
        journal = Journal.open(path, CHAIN, MEMBER)
        assert acknowledged <= journal.mark.view <= acknowledged + 1
        acknowledged = journal.mark.view
        for record in journal.records():
            assert record.vote == b"v" * (record.view % 997)
        journal.close()
