"""Bulk service keeps its pace, and no member keeps another from it."""

import pytest
import trio
import trio.testing

from consensus.identifiers import MemberId
from consensus.rejection import Reason, Rejected
from node.messages import ANSWER_TARGET_BYTES
from node.pace import BURST_SECONDS, MAX_WAIT_SECONDS, Pace, Service

pytestmark = pytest.mark.trio

GREEDY, OTHER, THIRD = (MemberId(bytes([number]) * 32) for number in range(3))


async def test_pace_lets_a_burst_through_then_holds_back_then_refuses(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(1_000)
    start = trio.current_time()
    await pace.spend(1_000)
    assert trio.current_time() == start
    await pace.spend(2_000)
    assert trio.current_time() == pytest.approx(start + 2)
    pace = Pace(1_000)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(pace.spend, 1_000)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Rejected) as refusal:
            await pace.spend(1)
        assert refusal.value.reason is Reason.OVERLOADED
    assert trio.current_time() <= start + 2 + MAX_WAIT_SECONDS + 1


class Desk:
    """Makes answers and remembers for whom."""

    def __init__(self, bytes_per_second: int, answer_bytes: int = ANSWER_TARGET_BYTES) -> None:
        self.service = Service(bytes_per_second)
        self.answer_bytes = answer_bytes
        self.made: list[MemberId] = []
        self.refused: list[MemberId] = []

    async def ask(self, member: MemberId, least_bytes: int = 0) -> None:
        def make() -> bytes:
            self.made.append(member)
            return bytes(self.answer_bytes)

        try:
            await self.service.serve(member, make, least_bytes)
        except Rejected:
            self.refused.append(member)


async def test_answer_that_is_refused_is_not_made_before(autojump_clock: trio.testing.MockClock) -> None:
    desk = Desk(ANSWER_TARGET_BYTES)
    async with trio.open_nursery() as nursery:
        for _ in range(1_000):
            nursery.start_soon(desk.ask, GREEDY)
    assert len(desk.made) == 2
    assert len(desk.refused) == 998


@pytest.mark.parametrize("bytes_per_second", [1 << 20, 8 << 20])
async def test_member_that_asks_without_end_keeps_no_other_out(
    bytes_per_second: int, autojump_clock: trio.testing.MockClock
) -> None:
    desk = Desk(bytes_per_second)

    async def without_end() -> None:
        while True:
            await desk.ask(GREEDY)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(without_end)
        await trio.sleep(10)
        start_time = trio.current_time()
        for _ in range(5):
            await desk.ask(OTHER)
            await trio.sleep(0.01)
        assert desk.refused.count(OTHER) == 0
        assert trio.current_time() - start_time <= 5 * (MAX_WAIT_SECONDS + BURST_SECONDS)
        nursery.cancel_scope.cancel()


async def test_answers_keep_the_pace_whoever_asks(autojump_clock: trio.testing.MockClock) -> None:
    desk = Desk(8 << 20)
    start_time = trio.current_time()
    async with trio.open_nursery() as nursery:
        for member in (GREEDY, OTHER, THIRD):
            for _ in range(4):
                nursery.start_soon(desk.ask, member)
    assert trio.current_time() - start_time >= 12 * ANSWER_TARGET_BYTES / (8 << 20) - 2 * BURST_SECONDS


async def test_small_answer_to_a_dear_question_is_charged_for_the_question(
    autojump_clock: trio.testing.MockClock,
) -> None:
    desk = Desk(1 << 20, answer_bytes=1)
    start_time = trio.current_time()
    for _ in range(5):
        await desk.ask(GREEDY, least_bytes=1 << 20)
    assert trio.current_time() - start_time >= 5 - 1 - BURST_SECONDS


async def test_question_that_is_refused_frees_its_place() -> None:
    service = Service(1 << 20)

    def none() -> bytes:
        raise Rejected(Reason.NOT_FOUND, "nothing here")

    for _ in range(100):
        with pytest.raises(Rejected) as refusal:
            await service.serve(GREEDY, none)
        assert refusal.value.reason is Reason.NOT_FOUND
