"""The pool's door: what is known, or has no room, costs a peer's frame and no check."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from ledger_fixtures import CampaignRun, MemoryLedger, begin
from network_fixtures import make_parties, network_of
from snapshot_fixtures import written
from uncollected import refusals_left

from consensus.event import CheckedEvent, Kind, SignedEvent, check_each, pack_parts
from consensus.identifiers import MemberId
from consensus.membership import Committee
from consensus.portions import Abandon, Portions
from consensus.rejection import Rejected
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

    def check(events: Sequence[SignedEvent], committee: Committee) -> list[CheckedEvent | Rejected]:
        entries.extend(event.entry for event in events)
        return check_each(events, committee)

    monkeypatch.setattr(intake, "check_each", check)
    return entries


def door(ledger: Ledger, max_events: int) -> Intake:
    parties = make_parties(2)
    pool = Mempool(max_events, 1 << 20)
    return Intake(ledger, pool, network_of(parties[0], parties), SystemClock(), 1 << 20)


def packed(event: CheckedEvent) -> bytes:
    return pack_parts(event.entry_bytes, event.portions_bytes)


def frame(*events: CheckedEvent) -> bytes:
    return pack_gossip([packed(event) for event in events])


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


@pytest.mark.trio
async def test_each_of_a_few_events_has_its_own_answer(memory: MemoryLedger, ledger: Ledger) -> None:
    intake = door(ledger, 2)
    events = [packed(memory.source("data-source-1", f"source {number}")) for number in range(3)]
    answers = intake.submit_each([events[0], b"nothing", bytes(2 << 20), events[0], *events[1:]])
    assert [answer.reason.value if isinstance(answer, Rejected) else "taken" for answer in answers] == [
        "taken",
        "malformed",
        "oversized",
        "taken",
        "taken",
        "overloaded",
    ]
    assert intake.refused == {"malformed": 1, "oversized": 1, "overloaded": 1}


@pytest.mark.trio
async def test_refused_event_leaves_nothing_that_only_the_collector_frees(memory: MemoryLedger, ledger: Ledger) -> None:
    intake = door(ledger, 2)
    event = memory.source("data-source-1", "new")
    entry, portions = event.entry_bytes, event.portions_bytes
    wrong = [
        b"nothing",
        bytes(2 << 20),
        pack_parts(b"nothing", portions),
        pack_parts(entry, b"nothing"),
        pack_parts(entry[:-1] + bytes([entry[-1] ^ 1]), portions),
    ]
    with refusals_left() as left:
        for encoded in wrong:
            with suppress(Rejected):
                intake.submit(encoded)
            assert len(intake.submit_each([encoded, encoded])) == 2
            intake.receive(SENDER, pack_gossip([encoded]))
            assert left() == 0
    assert sum(intake.refused.values()) == 4 * len(wrong)


@pytest.mark.trio
async def test_flood_by_keys_that_nobody_delegated_leaves_room_for_those_that_are(tmp_path: Path) -> None:
    told = begin()

    def abandon(run: CampaignRun) -> CheckedEvent:
        return run.written(Kind.ABANDON, Portions(None, None, told.ledger.salted(Abandon(""))))

    known = [abandon(told.run) for _ in range(6)]
    strangers = [abandon(CampaignRun(told.ledger, (), name=f"nobody's {number}")) for number in range(6)]
    ledger = written(told.ledger, tmp_path)
    intake = door(ledger, 20)
    assert intake.receive(SENDER, frame(*strangers)) == 4
    assert [isinstance(answer, Rejected) for answer in intake.submit_each(list(map(packed, strangers[4:])))] == [0, 0]
    answers = intake.submit_each([packed(abandon(CampaignRun(told.ledger, (), name="one more"))), *map(packed, known)])
    assert [answer.reason.value if isinstance(answer, Rejected) else "taken" for answer in answers] == [
        "overloaded",
        *["taken"] * 6,
    ]
    ledger.store.close()
