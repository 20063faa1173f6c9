"""A bound on the bytes per second that bulk service may take, so that votes and events keep their share."""

import trio

from consensus.rejection import Reason, Rejected

BURST_SECONDS = 1.0
MAX_WAIT_SECONDS = 4.0
"""Whoever would have to wait longer is told to ask again: it waits at its own cost, not in our memory."""


class Pace:
    """So many bytes a second, a second's worth at once after a rest."""

    def __init__(self, bytes_per_second: int) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_from_time = float("-inf")

    async def spend(self, size_bytes: int) -> None:
        """Wait for the turn of so many bytes.

        Raises:
            Rejected: ``OVERLOADED`` where that would be too long; nothing is spent.
        """
        now = trio.current_time()
        free_from_time = max(self._free_from_time, now - BURST_SECONDS) + size_bytes / self._bytes_per_second
        if free_from_time - now > MAX_WAIT_SECONDS:
            raise Rejected(Reason.OVERLOADED, f"{free_from_time - now:.0f} s of bulk service would be waited for")
        self._free_from_time = free_from_time
        await trio.sleep_until(max(now, free_from_time))
