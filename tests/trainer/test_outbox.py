"""The outbox loses nothing, sends in order, takes each event once and stays inside its bound."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trainer_client.outbox import Outbox, OutboxFull, OutboxInUse, State


def named(number: int, size_bytes: int = 100) -> tuple[bytes, bytes]:
    """An event's id and bytes, by number."""
    return hashlib.sha256(b"%d" % number).digest(), bytes([number % 256]) * size_bytes


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.sqlite", maximum_bytes=1_000) as opened:
        yield opened


def test_events_leave_in_the_order_they_were_put(outbox: Outbox) -> None:
    outbox.put([named(2), named(1)])
    outbox.put([named(3)])
    assert [out.id for out in outbox.queued(10, 10_000)] == [named(2)[0], named(1)[0], named(3)[0]]


def test_event_put_twice_is_held_once(outbox: Outbox) -> None:
    outbox.put([named(1)])
    outbox.put([named(1)])
    outbox.finalize([named(1)[0]])
    outbox.put([named(1)])
    assert outbox.queued(10, 10_000) == ()
    assert outbox.held_bytes == 0


def test_batch_is_bounded_by_count_and_by_bytes_but_never_empty(outbox: Outbox) -> None:
    outbox.put([named(number) for number in range(5)])
    assert len(outbox.queued(2, 10_000)) == 2
    assert len(outbox.queued(10, 250)) == 2
    assert len(outbox.queued(10, 1)) == 1


def test_full_outbox_blocks_until_something_is_settled_and_loses_nothing(outbox: Outbox) -> None:
    outbox.put([named(number) for number in range(10)])
    done = threading.Event()

    def put_one_more() -> None:
        outbox.put([named(10)])
        done.set()

    thread = threading.Thread(target=put_one_more)
    thread.start()
    assert not done.wait(0.1)
    outbox.finalize([named(0)[0]])
    assert done.wait(60)
    thread.join()
    assert [out.id for out in outbox.queued(99, 10_000)] == [named(number)[0] for number in range(1, 11)]


def test_full_outbox_refuses_by_name_when_the_wait_is_limited(outbox: Outbox) -> None:
    outbox.put([named(number) for number in range(10)])
    with pytest.raises(OutboxFull, match="1000 bytes"):
        outbox.put([named(10)], timeout_seconds=0.05)
    assert outbox.fate(named(10)[0]) is None


def test_full_disk_is_a_full_outbox_and_half_a_put_never_happens(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.sqlite") as outbox:
        pages = outbox._connection.execute("PRAGMA page_count").fetchone()[0]
        outbox._connection.execute(f"PRAGMA max_page_count = {pages + 4}")
        with pytest.raises(OutboxFull):
            outbox.put([named(1), named(2, size_bytes=100_000)], timeout_seconds=0.05)
        assert outbox.unsettled() == ()
        outbox._connection.execute("PRAGMA max_page_count = 1000000")
        outbox.put([named(1), named(2, size_bytes=100_000)], timeout_seconds=0.05)
        assert len(outbox.unsettled()) == 2


def test_fate_that_does_not_fit_on_a_full_disk_changes_nothing_and_is_noted_later(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.sqlite") as outbox:
        outbox.put([named(1), named(2)])
        pages = outbox._connection.execute("PRAGMA page_count").fetchone()[0]
        outbox._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutboxFull, match="full"):
            outbox.reject([named(1)[0], named(2)[0]], "outside-grant", "long" * 10_000)
        assert [fate.state for fate in outbox.unsettled()] == [State.QUEUED] * 2
        assert outbox.held_bytes == 200
        outbox._connection.execute("PRAGMA max_page_count = 1000000")
        outbox.reject([named(1)[0], named(2)[0]], "outside-grant", "long" * 10_000)
        assert outbox.unsettled() == ()
        assert outbox.held_bytes == 0


def test_rejection_keeps_its_reason_and_a_settled_event_never_changes(outbox: Outbox) -> None:
    outbox.put([named(1), named(2)])
    outbox.reject([named(1)[0]], "outside-grant", "step 9")
    outbox.finalize([named(1)[0]])
    outbox.accept([named(1)[0]])
    fate = outbox.fate(named(1)[0])
    assert fate is not None
    assert (fate.state, fate.reason, fate.detail) == (State.REJECTED, "outside-grant", "step 9")


def test_what_is_no_character_in_a_rejection_is_replaced(outbox: Outbox) -> None:
    outbox.put([named(1)])
    outbox.reject([named(1)[0]], "bad\udfff", "step \ud800")
    fate = outbox.fate(named(1)[0])
    assert fate is not None
    assert (fate.state, fate.reason, fate.detail) == (State.REJECTED, "bad?", "step ?")


def test_change_that_fails_for_whatever_reason_leaves_the_outbox_usable(outbox: Outbox) -> None:
    unbindable: list[bytes] = [named(1)[0], "\ud800"]  # type: ignore[list-item]
    outbox.put([named(1)])
    with pytest.raises(UnicodeEncodeError):
        outbox.accept(unbindable)
    with pytest.raises(UnicodeEncodeError):
        outbox.put([named(2), ("\ud800", b"event")])  # type: ignore[list-item]
    assert [out.id for out in outbox.queued(10, 10_000)] == [named(1)[0]]
    outbox.put([named(3)])
    assert outbox.held_bytes == 200


def test_second_process_is_refused(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.sqlite"):
        script = (
            "import sys\nfrom pathlib import Path\nfrom trainer_client.outbox import Outbox, OutboxInUse\n"
            "try:\n    Outbox(Path(sys.argv[1]))\nexcept OutboxInUse:\n    sys.exit(7)\n"
        )
        ran = subprocess.run([sys.executable, "-c", script, str(tmp_path / "outbox.sqlite")], check=False, timeout=60)
    assert ran.returncode == 7
    with Outbox(tmp_path / "outbox.sqlite") as again:
        assert again.unsettled() == ()


def test_second_open_in_this_process_is_refused(tmp_path: Path) -> None:
    with Outbox(tmp_path / "outbox.sqlite"), pytest.raises(OutboxInUse):
        Outbox(tmp_path / "outbox.sqlite")


KILLED_WRITER = """
import hashlib, sys
from pathlib import Path
from trainer_client.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    outbox.put([(hashlib.sha256(b"%d" % n).digest(), bytes([n % 256]) * 100) for n in (number, number + 1)])
    print(number + 1, flush=True)
    number += 2
"""


def test_writer_killed_at_any_moment_loses_nothing_it_put_and_leaves_no_half(tmp_path: Path) -> None:
    path, number = tmp_path / "outbox.sqlite", 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", KILLED_WRITER, str(path), str(number)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(20):
            last = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        last = max([last, *(int(line) for line in writer.stdout.read().split())])
        writer.stdout.close()
        writer.wait()
        with Outbox(path) as outbox:
            held = [out.id for out in outbox.queued(100_000, 1 << 30)]
        assert held == [named(n)[0] for n in range(len(held))]
        assert len(held) % 2 == 0
        assert len(held) > last
        number = len(held)


class OutboxAgainstAList(RuleBasedStateMachine):
    """The outbox and a plain dict agree after every operation, also across a reopening."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.outbox = Outbox(Path(self.folder.name) / "outbox.sqlite")
        self.model: dict[int, State] = {}

    @rule(numbers=st.lists(st.integers(0, 15), min_size=1, max_size=3, unique=True))
    def put(self, numbers: list[int]) -> None:
        self.outbox.put([named(number) for number in numbers])
        for number in numbers:
            self.model.setdefault(number, State.QUEUED)

    @rule(number=st.integers(0, 15))
    def accept(self, number: int) -> None:
        self.outbox.accept([named(number)[0]])
        if self.model.get(number) is State.QUEUED:
            self.model[number] = State.ACCEPTED

    @rule(number=st.integers(0, 15), rejected=st.booleans())
    def settle(self, number: int, rejected: bool) -> None:
        if rejected:
            self.outbox.reject([named(number)[0]], "outside-grant", "")
        else:
            self.outbox.finalize([named(number)[0]])
        if self.model.get(number) in (State.QUEUED, State.ACCEPTED):
            self.model[number] = State.REJECTED if rejected else State.FINAL

    @rule()
    def node_forgets(self) -> None:
        self.outbox.requeue_accepted()
        for number, state in self.model.items():
            self.model[number] = State.QUEUED if state is State.ACCEPTED else state

    @rule()
    def finalize_to_the_newest(self) -> None:
        ends = self.outbox.oldest_and_newest_accepted()
        accepted = [number for number, state in self.model.items() if state is State.ACCEPTED]
        assert (ends is None) == (not accepted)
        if ends is not None:
            assert (ends[0].id, ends[1].id) == (named(accepted[0])[0], named(accepted[-1])[0])
            self.outbox.finalize_accepted_through(ends[1].position)
            self.model.update(dict.fromkeys(accepted, State.FINAL))

    @rule()
    def reopen(self) -> None:
        self.outbox.close()
        self.outbox = Outbox(Path(self.folder.name) / "outbox.sqlite")

    @invariant()
    def agrees(self) -> None:
        queued = [number for number, state in self.model.items() if state is State.QUEUED]
        assert [out.id for out in self.outbox.queued(99, 10_000)] == [named(number)[0] for number in queued]
        for number, state in self.model.items():
            fate = self.outbox.fate(named(number)[0])
            assert fate is not None
            assert fate.state is state
        open_count = sum(state in (State.QUEUED, State.ACCEPTED) for state in self.model.values())
        assert self.outbox.held_bytes == 100 * open_count

    def teardown(self) -> None:
        self.outbox.close()
        self.folder.cleanup()


TestOutboxAgainstAList = OutboxAgainstAList.TestCase
TestOutboxAgainstAList.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
