"""Work of requests in a worker thread, one at a time, for which a bounded number of requests wait."""

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import trio

from consensus.rejection import Reason, Rejected, Unavailable
from node.http_server import HttpRequest

MOST_WAITING = 32
"""One network may have as many of these places as are still free: half of them, if no other asks."""

T = TypeVar("T")


class OneThread:
    """A worker thread and the requests that wait for it, in the order in which they came."""

    def __init__(self) -> None:
        self._turn = trio.CapacityLimiter(1)
        self._waiting: Counter[bytes] = Counter()
        """By network, with the one that is worked for."""

    async def run(self, request: HttpRequest, work: Callable[[], T]) -> T:
        """What ``work`` makes for a request, in its turn. Until then a newcomer may have its connection's place, and
        then it is not made.

        Raises:
            Rejected: ``OVERLOADED`` where too much waits, of this network or of all. And as ``work``.
            Unavailable: a newcomer has the place.
        """
        network, waiting = request.network, self._waiting.total()
        if waiting + self._waiting[network] >= MOST_WAITING:
            raise Rejected(Reason.OVERLOADED, f"{waiting} requests wait for this; slow down and retry")
        self._waiting[network] += 1
        request.give_way()
        try:
            async with self._turn:
                if not request.keep_place():
                    raise Unavailable("a newcomer has this connection's place")
                return await trio.to_thread.run_sync(work)
        finally:
            self._waiting[network] -= 1
            if not self._waiting[network]:
                del self._waiting[network]
