"""A node process whose disk is damaged or rolled back: named, refused, repaired from peers; or silent, and why."""

import re
import shutil
from pathlib import Path

import pytest
from process_fixtures import Processes, processes, source

from consensus.identifiers import Role
from node.journal import JOURNAL_FILE
from node.provision import MemberRequest

pytestmark = pytest.mark.processes

NAMES = ("library", "press", "archive", "council", "laboratory")
MEMBERS = tuple(
    MemberRequest(name, role)
    for name, role in zip(NAMES, (*[Role.DATA_SOURCE] * 3, Role.GOVERNANCE, Role.OPERATOR), strict=True)
)
THRESHOLDS = {Role.DATA_SOURCE: 2}
"""One data source of the three may be away."""
VICTIM, STAND_IN, PEER = "archive", "press", "library"
TABLE, MANIFEST, WRITE_AHEAD_LOG = "*.sst", "MANIFEST-*", "*.log"
IN_FIRST_RECORD = 12
"""Offset in a table, a manifest and a write-ahead log: all begin with a record of at least this length."""
EVENTS = 10


class Disk:
    """The victim's data directory, and what its operator does about it."""

    def __init__(self, consortium: Processes) -> None:
        self.consortium = consortium
        self.directory = consortium.provisioned.members[VICTIM].directory / "data"
        self.acknowledged: list[str] = []
        self._number = 0

    def write(self) -> None:
        """Events more, final for the peer; while the victim runs it has them too."""
        c = self.consortium
        answers = [c.post(PEER, source(c, PEER, self._number + offset)) for offset in range(EVENTS)]
        self._number += EVENTS
        assert {answer.status_code for answer in answers} == {202}, answers[0].text
        events = [str(answer.json()["id"]) for answer in answers]
        assert all(c.is_final(PEER, event, 60) for event in events), c.log(PEER)
        self.acknowledged += events
        c.assert_one_log(self.acknowledged)

    def file(self, pattern: str) -> Path:
        """The largest one that matches."""
        return max((self.directory / "rocksdb").glob(pattern), key=lambda path: path.stat().st_size)

    def flip(self, pattern: str) -> str:
        """One byte of a file differs; the file's name."""
        path = self.file(pattern)
        content = bytearray(path.read_bytes())
        content[IN_FIRST_RECORD] ^= 0xFF
        path.write_bytes(content)
        return path.name

    def fsck(self, code: int) -> str:
        """What ``countersign log fsck`` says, ending so."""
        checked = self.consortium.run(VICTIM, "log", "fsck")
        assert checked.returncode == code, (checked.stdout, checked.stderr)
        return checked.stdout

    def events_left(self) -> int:
        """How many events are in a database that ``fsck`` finds nothing wrong with."""
        found = re.fullmatch(r"sound: \d+ ledger blocks, (\d+) events, \d+ state values\n", self.fsck(0))
        assert found is not None
        return int(found[1])

    def repair(self, says: str) -> None:
        """``countersign log repair``."""
        repaired = self.consortium.run(VICTIM, "log", "repair")
        assert repaired.returncode == 0, (repaired.stdout, repaired.stderr)
        assert says in repaired.stdout

    def come_back(self) -> None:
        """The victim starts, and has the log of the others; what they finalized meanwhile included.

        It need not be healthy: it halts where a vote of its own that it does not know of comes from a peer before it
        has asked.
        """
        c = self.consortium
        self.write()
        c.launch(VICTIM)
        c.wait_until(lambda: c.get(VICTIM, "/v1/status") is not None)
        c.assert_one_log(self.acknowledged)

    def await_votes(self) -> None:
        """The victim votes again: on what is new, since an idle log moves with its heartbeat alone."""

        def votes() -> bool:
            status = self.consortium.status(VICTIM)
            return bool(status["voting"]) and int(str(status["votes_sent"])) > 0

        self.write()
        self.consortium.wait_until(votes, 60)

    def assert_silent(self, why: str) -> None:
        """The victim does not vote, and its operator is told why."""
        c = self.consortium
        c.wait_until(lambda: why in str(c.status(VICTIM)["why_not_voting"]), 60)
        assert c.status(VICTIM)["votes_sent"] == 0
        told = c.run(VICTIM, "node", "status").stdout
        assert re.search(r"^voting +no$", told, re.MULTILINE), told
        assert re.search(rf"^why not voting +.*{why}", told, re.MULTILINE), told


def test_each_damage_to_a_disk_is_named_and_repaired_from_peers_and_a_lost_memory_of_votes_silences(
    tmp_path: Path,
) -> None:
    with processes(tmp_path / "consortium", *NAMES, members=MEMBERS, thresholds=THRESHOLDS) as consortium:
        disk = Disk(consortium)
        disk.write()
        consortium.kill(VICTIM)
        consortium.start(VICTIM)  # which puts what the write-ahead log held into tables
        disk.write()
        for pattern in (TABLE, MANIFEST, WRITE_AHEAD_LOG):
            refuse_and_repair(disk, pattern)
        fetch_again_what_a_deleted_log_held(disk)
        be_silent_once_rolled_back(disk)
        be_silent_without_a_journal(disk)
        consortium.assert_whole(disk.acknowledged)


def refuse_and_repair(disk: Disk, pattern: str) -> None:
    """A flipped byte in the largest of such files."""
    disk.consortium.kill(VICTIM)
    flipped = disk.flip(pattern)
    found = disk.fsck(1)
    assert flipped in found, (flipped, found)
    if pattern != TABLE:  # which is not read before it is needed
        refused = disk.consortium.run(VICTIM, "node", "run")
        assert refused.returncode == 1, refused.stderr
        assert flipped in refused.stderr
        assert "countersign log repair" in refused.stderr
    disk.repair("set aside: ")
    disk.come_back()
    disk.await_votes()


def fetch_again_what_a_deleted_log_held(disk: Disk) -> None:
    """The database is an earlier one, and the journal says what was voted since."""
    disk.consortium.kill(VICTIM)
    disk.file(WRITE_AHEAD_LOG).unlink()
    assert disk.events_left() < len(disk.acknowledged)
    disk.repair("nothing to repair")
    disk.come_back()
    disk.await_votes()


def be_silent_once_rolled_back(disk: Disk) -> None:
    """As where a virtual machine's snapshot is restored: the copy is a sound one."""
    copy = disk.directory.with_name("copy")
    disk.consortium.kill(VICTIM)
    shutil.copytree(disk.directory, copy)
    disk.consortium.kill(STAND_IN)  # without it nothing is final that the victim has not voted for
    disk.consortium.start(VICTIM)
    disk.write()
    disk.consortium.kill(VICTIM)
    disk.consortium.start(STAND_IN)
    shutil.rmtree(disk.directory)
    copy.rename(disk.directory)
    assert disk.events_left() < len(disk.acknowledged)
    disk.come_back()
    disk.assert_silent("restored from an old copy")


def be_silent_without_a_journal(disk: Disk) -> None:
    """Damage that took the journal too: a repaired database remembers that there were votes."""
    disk.consortium.kill(VICTIM)
    (disk.directory / JOURNAL_FILE).unlink()
    assert disk.flip(MANIFEST) in disk.fsck(1)
    disk.repair("set aside: ")
    disk.come_back()
    disk.assert_silent("expected the vote journal, found none")
    disk.write()
    assert disk.consortium.status(VICTIM)["votes_sent"] == 0
