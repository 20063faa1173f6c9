"""Peers share the time."""

import pytest
import trio.testing

from consensus.identifiers import MemberId
from consensus.rejection import Unavailable
from node.turns import DISAPPOINTED_SECONDS, MOST_SECONDS, Turns

FIRST, SECOND, THIRD = (MemberId(bytes([number]) * 32) for number in (1, 2, 3))
ALL = (FIRST, SECOND, THIRD)


async def takes(turns: Turns, peer: MemberId, seconds: float) -> None:
    with turns.of(peer):
        await trio.sleep(seconds)


@pytest.mark.trio
async def test_peer_that_took_least_time_is_next_and_equals_keep_their_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    assert turns.order(reversed(ALL)) == [THIRD, SECOND, FIRST]
    await takes(turns, FIRST, 3)
    await takes(turns, SECOND, 1)
    assert turns.order(ALL) == [THIRD, SECOND, FIRST]


@pytest.mark.trio
async def test_slow_peer_takes_its_share_of_the_time(autojump_clock: trio.testing.MockClock) -> None:
    turns = Turns()
    answers = dict.fromkeys(ALL, 0)
    seconds = {FIRST: 4.0, SECOND: 0.1, THIRD: 0.1}
    while trio.current_time() < 120:
        peer = turns.order(ALL)[0]
        await takes(turns, peer, seconds[peer])
        answers[peer] += 1
    assert answers[FIRST] * seconds[FIRST] == pytest.approx(40, abs=5)
    assert min(answers[SECOND], answers[THIRD]) > 300


async def is_late(turns: Turns, peer: MemberId) -> float:
    """How long a peer was waited for, whose answer did not come."""
    try:
        with turns.of(peer), turns.waiting(peer, ALL, 5.0) as seconds:
            await trio.sleep(seconds)
            raise Unavailable("no response")
    except Unavailable:
        return seconds


async def answers_after(turns: Turns, peer: MemberId, after_seconds: float) -> float:
    with turns.of(peer), turns.waiting(peer, ALL, 5.0) as seconds:
        await trio.sleep(after_seconds)
    return seconds


@pytest.mark.trio
async def test_where_all_are_late_each_is_waited_for_longer_until_it_answers_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    waits: dict[MemberId, list[float]] = {peer: [] for peer in ALL}
    for _ in range(15):
        peer = turns.order(ALL)[0]
        waits[peer].append(await is_late(turns, peer))
    assert all(held == [5, 10, 20, 40, 60] for held in waits.values())
    peer = turns.order(ALL)[0]
    assert await answers_after(turns, peer, 30) == 60
    while turns.order(ALL)[0] != peer:
        await takes(turns, turns.order(ALL)[0], 10)
    assert await answers_after(turns, peer, 1) == 60
    assert await is_late(turns, peer) == 5


@pytest.mark.trio
async def test_who_never_answers_is_waited_for_no_longer_while_others_have_taken_less_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    await takes(turns, FIRST, 1)
    for _ in range(4):
        assert await is_late(turns, FIRST) == 5
    with pytest.raises(Unavailable), turns.waiting(SECOND, ALL, 5.0):
        raise Unavailable("refused at once")
    assert await is_late(turns, SECOND) == 5


@pytest.mark.trio
async def test_turn_that_is_cut_short_counts_and_so_does_what_disappoints(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    with trio.move_on_after(1):
        await takes(turns, FIRST, 10)
    turns.disappointed(SECOND)
    assert [turns.seconds(peer) for peer in ALL] == [pytest.approx(1), DISAPPOINTED_SECONDS, 0]


@pytest.mark.trio
async def test_neither_a_late_comer_nor_one_that_failed_is_alone_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns = Turns()
    await takes(turns, FIRST, 1_000 * MOST_SECONDS)
    assert turns.seconds(FIRST) - turns.seconds(SECOND) == MOST_SECONDS
    served = {SECOND: 0, THIRD: 0}
    while (peer := turns.order(ALL)[0]) != FIRST:
        await takes(turns, peer, 10)
        served[peer] += 1
    assert served[SECOND] == served[THIRD] == MOST_SECONDS / 10
