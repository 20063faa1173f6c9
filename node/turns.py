"""Whose turn it is to serve: peers that are asked for much share the time that it takes.

Asked next is who has taken the least time so far. So a peer that is slow, or answers with as little as it may, takes
its share of the time, one of as many as there are peers, and not of the answers; a fast one brings the more in its own.
What disappoints counts as ``DISAPPOINTED_SECONDS``. Nobody is counted as more than ``MOST_SECONDS`` below the one that
has taken most: neither is a peer that comes late asked alone for long, nor one that failed often asked never again.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio

from consensus.identifiers import MemberId

DISAPPOINTED_SECONDS = 16.0
MOST_SECONDS = 300.0


class Turns:
    """How long each peer has taken."""

    def __init__(self) -> None:
        self._seconds: dict[MemberId, float] = {}

    def order(self, peers: Iterable[MemberId]) -> list[MemberId]:
        """The peers, who has taken the least time first; as they were given where that is equal."""
        return sorted(peers, key=self.seconds)

    def seconds(self, peer: MemberId) -> float:
        """How long a peer has taken, or is counted as having taken."""
        most = max(self._seconds.values(), default=0.0)
        return max(self._seconds.get(peer, 0.0), most - MOST_SECONDS)

    @contextmanager
    def of(self, peer: MemberId) -> Iterator[None]:
        """The time until it is left counts as this peer's."""
        start_time = trio.current_time()
        try:
            yield
        finally:
            self._add(peer, trio.current_time() - start_time)

    def disappointed(self, peer: MemberId) -> None:
        """A peer's answer was none, or wrong, or not what it had promised."""
        self._add(peer, DISAPPOINTED_SECONDS)

    def _add(self, peer: MemberId, seconds: float) -> None:
        self._seconds[peer] = self.seconds(peer) + seconds
