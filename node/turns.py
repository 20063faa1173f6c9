"""Whose turn it is to serve: peers that are asked for much share the time that it takes.

Asked next is who has taken the least time so far. So a peer that is slow, or answers with as little as it may, takes
its share of the time, one of as many as there are peers, and not of the answers; a fast one brings the more in its own.
What disappoints counts as ``DISAPPOINTED_SECONDS``. Nobody is counted as more than ``MOST_SECONDS`` below the one that
has taken most: neither is a peer that comes late asked alone for long, nor one that failed often asked never again.

On a slow link every answer is late, and asking for it again brings it no sooner. So a peer is waited for twice as long
after each late answer, up to ``LONGEST_WAIT_SECONDS``, where nobody else has taken less time: what it takes so is its
share, and one that never answers, while others do, gets no more than it always had.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio

from consensus.identifiers import MemberId
from consensus.rejection import Unavailable

DISAPPOINTED_SECONDS = 16.0
MOST_SECONDS = 300.0
LONGEST_WAIT_SECONDS = 60.0


class Turns:
    """How long each peer has taken."""

    def __init__(self) -> None:
        self._seconds: dict[MemberId, float] = {}
        self._patience: dict[MemberId, float] = {}
        """How many times as long as others those are waited for whose last answers were late."""

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

    @contextmanager
    def waiting(self, peer: MemberId, peers: Iterable[MemberId], least_seconds: float) -> Iterator[float]:
        """How long to wait for an answer of a peer, one of ``peers``; asked inside, so that a late one is known."""
        patience = self._patience.get(peer, 1.0)
        is_next = self.order([peer, *peers])[0] == peer
        seconds = max(least_seconds, min(patience * least_seconds, LONGEST_WAIT_SECONDS)) if is_next else least_seconds
        start_time = trio.current_time()
        try:
            yield seconds
        except Unavailable:
            if trio.current_time() - start_time >= seconds and patience * least_seconds < LONGEST_WAIT_SECONDS:
                self._patience[peer] = 2 * patience
            raise
        if trio.current_time() - start_time < least_seconds:
            self._patience.pop(peer, None)

    def disappointed(self, peer: MemberId) -> None:
        """A peer's answer was none, or wrong, or not what it had promised."""
        self._add(peer, DISAPPOINTED_SECONDS)

    def _add(self, peer: MemberId, seconds: float) -> None:
        self._seconds[peer] = self.seconds(peer) + seconds
