"""A bound on the bytes per second that bulk service may take, so that votes and events keep their share."""

from collections import Counter
from collections.abc import Callable

import trio

from consensus.identifiers import MemberId
from consensus.rejection import Reason, Rejected
from node.messages import ANSWER_TARGET_BYTES

BURST_SECONDS = 1.0
MAX_WAIT_SECONDS = 4.0
"""Whoever would have to wait longer is told to ask again: it waits at its own cost, not in our memory."""
LEAST_PLACES = 2


class Pace:
    """So many bytes a second, a second's worth at once after a rest."""

    def __init__(self, bytes_per_second: int) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_from_time = float("-inf")

    async def spend(self, size_bytes: int) -> None:
        """Wait for the turn of so many bytes.

        Raises:
            Rejected: ``OVERLOADED`` where that would be too long; nothing is spent.
        """
        now = trio.current_time()
        free_from_time = max(self._free_from_time, now - BURST_SECONDS) + size_bytes / self.bytes_per_second
        if free_from_time - now > MAX_WAIT_SECONDS:
            raise Rejected(Reason.OVERLOADED, f"{free_from_time - now:.0f} s of bulk service would be waited for")
        self._free_from_time = free_from_time
        await trio.sleep_until(max(now, free_from_time))

    async def rest(self) -> None:
        """Wait until what was charged is paid off."""
        await trio.sleep_until(max(trio.current_time(), self._free_from_time))

    def charge(self, size_bytes: int) -> None:
        """Count bytes that have been spent."""
        earliest_time = trio.current_time() - BURST_SECONDS
        self._free_from_time = max(self._free_from_time, earliest_time) + size_bytes / self.bytes_per_second


class Service:
    """Bulk answers at a pace, one after the other, each made only when its turn has come.

    An answer that is refused costs nothing: made first and refused then, small questions without end would cost
    all the time there is. There are as many places to wait in as full answers take ``MAX_WAIT_SECONDS``, and a member
    may have as many of them as are still free: so one that asks without end keeps nobody out.
    """

    def __init__(self, bytes_per_second: int) -> None:
        self._pace = Pace(bytes_per_second)
        self._places = max(LEAST_PLACES, int(MAX_WAIT_SECONDS * bytes_per_second / ANSWER_TARGET_BYTES))
        self._waiting: Counter[MemberId] = Counter()
        self._turn = trio.Lock()

    async def serve(self, member: MemberId, make: Callable[[], bytes], least_bytes: int = 0) -> bytes:
        """The answer that ``make`` makes for a member, counted as ``least_bytes`` at least.

        Raises:
            Rejected: ``OVERLOADED`` where too much waits, of this member or of all. And as ``make``.
        """
        if self._waiting.total() + self._waiting[member] >= self._places:
            raise Rejected(Reason.OVERLOADED, f"{self._waiting.total()} wait for bulk service; ask again")
        self._waiting[member] += 1
        try:
            async with self._turn:
                await self._pace.rest()
                answer = make()
                self._pace.charge(max(least_bytes, len(answer)))
        finally:
            self._waiting[member] -= 1
        return answer
