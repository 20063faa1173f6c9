"""The pool's door: what is known, or has no room, costs a peer's frame and no check."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_fixtures import MemoryLedger
from network_fixtures import make_parties, network_of
from snapshot_fixtures import written

from consensus.event import CheckedEvent, check_parts, pack_parts
from consensus.identifiers import MemberId
from consensus.membership import Committee
from node import intake
from node.clock import SystemClock
from node.intake import Intake
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import pack_gossip

SENDER = MemberId(b"s" * 32)


@pytest.fixture
def memory() -> MemoryLedger:
    memory = MemoryLedger()
    memory.seal(memory.source("data-source-1", "on the log"))
    return memory


@pytest.fixture
def ledger(memory: MemoryLedger, tmp_path: Path) -> Iterator[Ledger]:
    ledger = written(memory, tmp_path)
    yield ledger
    ledger.store.close()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The entries whose signatures were checked, in order."""
    entries: list[bytes] = []

    def check(entry: bytes, portions: bytes, committee: Committee) -> CheckedEvent:
        entries.append(entry)
        return check_parts(entry, portions, committee)

    monkeypatch.setattr(intake, "check_parts", check)
    return entries


def door(ledger: Ledger, max_events: int) -> Intake:
    parties = make_parties(2)
    pool = Mempool(max_events, 1 << 20)
    return Intake(ledger, pool, network_of(parties[0], parties), SystemClock(), 1 << 20)


def frame(*events: CheckedEvent) -> bytes:
    return pack_gossip([pack_parts(event.entry_bytes, event.portions_bytes) for event in events])


@pytest.mark.trio
async def test_true_events_that_a_peer_repeats_are_not_checked_again(
    memory: MemoryLedger, ledger: Ledger, checked: list[bytes]
) -> None:
    intake = door(ledger, 10)
    new = memory.source("data-source-1", "new")
    for _ in range(20):
        intake.receive(SENDER, frame(memory.events[0], new, new))
    assert checked == [new.entry_bytes]
    assert not intake.refused


@pytest.mark.trio
async def test_events_of_a_peer_whose_share_is_full_are_refused_unchecked(
    memory: MemoryLedger, ledger: Ledger, checked: list[bytes]
) -> None:
    intake = door(ledger, 8)
    events = [memory.source("data-source-1", f"source {number}") for number in range(30)]
    assert intake.receive(SENDER, frame(*events)) == 4
    assert len(checked) == 4
    assert intake.refused == {"overloaded": 26}
    assert intake.receive(MemberId(b"o" * 32), frame(*events[4:])) == 2
