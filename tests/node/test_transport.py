"""Locks without needless pauses, and reading that pauses now and then."""

from itertools import pairwise

import pytest
import trio
import trio.testing

from node.transport import READS_A_TURN, PacedSession, PromptLock, TcpConnection


class Arrived:
    """A session whose bytes are all here already."""

    reads = 0

    async def read(self, n: int | None = None) -> bytes:
        self.reads += 1
        return b"-" * (n or 1)

    def get_remote_peer(self) -> str:
        return "peer"


@pytest.mark.trio
async def test_free_lock_is_taken_without_a_pause_and_again_once_released() -> None:
    lock = PromptLock()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await trio.sleep(0)
        before = turns
        for _ in range(100):
            async with lock:
                pass
        assert turns == before
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_held_lock_goes_to_those_who_wait_in_order_and_to_one_at_a_time() -> None:
    lock = PromptLock()
    inside, order = 0, []

    async def take(number: int) -> None:
        nonlocal inside
        async with lock:
            inside += 1
            assert inside == 1
            order.append(number)
            await trio.sleep(0)
            inside -= 1

    async with trio.open_nursery() as nursery:
        async with lock:
            for number in range(5):
                nursery.start_soon(take, number)
                await trio.testing.wait_all_tasks_blocked()
        async with lock:  # asked for after the five
            order.append(5)
    assert order == [0, 1, 2, 3, 4, 5]


@pytest.mark.trio
async def test_lock_is_not_lost_with_a_task_that_is_cancelled_while_it_waits_or_holds() -> None:
    lock = PromptLock()
    taken = []

    async def take(number: int) -> None:
        async with lock:
            taken.append(number)
            await trio.sleep_forever()

    async with trio.open_nursery() as holders, trio.open_nursery() as waiters:
        holders.start_soon(take, 0)
        await trio.testing.wait_all_tasks_blocked()
        waiters.start_soon(take, 1)
        await trio.testing.wait_all_tasks_blocked()
        waiters.cancel_scope.cancel()
        holders.cancel_scope.cancel()
    with trio.fail_after(10):
        async with lock:
            taken.append(2)
    assert taken == [0, 2]


@pytest.mark.trio
async def test_lock_passed_on_to_a_task_that_is_cancelled_in_the_same_moment_is_not_lost() -> None:
    lock = PromptLock()
    async with trio.open_nursery() as waiters:

        async def take() -> None:
            async with lock:
                await trio.sleep(0)

        async with lock:
            waiters.start_soon(take)
            await trio.testing.wait_all_tasks_blocked()
        waiters.cancel_scope.cancel()
    with trio.fail_after(10):
        async with lock:
            pass


@pytest.mark.trio
async def test_reader_of_what_has_all_arrived_lets_others_have_their_turn() -> None:
    session = Arrived()
    paced = PacedSession(session)
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(session.reads)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(10 * READS_A_TURN):
            assert await paced.read(3) == b"---"
        nursery.cancel_scope.cancel()
    assert len(turns) >= 5
    assert max(after - before for before, after in pairwise(turns)) <= 2 * READS_A_TURN
    assert paced.get_remote_peer() == "peer"


@pytest.mark.trio
async def test_reader_of_many_small_messages_lets_others_have_their_turn() -> None:
    """One frame may come as thousands of Noise messages, each two reads here."""
    ours, theirs = trio.socket.socketpair()
    connection = TcpConnection(trio.SocketStream(ours), is_initiator=False)
    connection.handshake_bytes_left = None
    await trio.SocketStream(theirs).send_all(bytes(4_000))
    await connection.read(1)
    read = 0
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(read)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for read in range(3_000):  # noqa: B007 (read by the other task)
            await connection.read(1)
        nursery.cancel_scope.cancel()
    connection.abort()
    theirs.close()
    assert len(turns) >= 5
    assert max(after - before for before, after in pairwise([*turns, 3_000])) <= 2 * READS_A_TURN
