"""Lanes: what travels between members, and the bounded queues at either end of a connection.

Two lanes keep what is urgent apart from what is big: ``VOTES`` carries votes, proposals and
certificates; ``EVENTS`` carries the gossip of events. Both ends are bounded in bytes, per member and
lane, so that no member can exhaust our memory nor, being slow, make us hold its backlog:

- ``Outbox``: what waits to be sent to one member. A full ``VOTES`` outbox drops its *oldest* frame (a newer
  vote or certificate supersedes it); a full ``EVENTS`` outbox refuses the *newest* (an event depends on
  those before it, so the prefix is worth more). Both count the drop. Frames that waited longer than a
  connection's absence are dropped when the connection comes back: catching up is cheaper than reading them.
- ``Inbox``: what was received and not yet processed, for all members. It serves members in turn, votes
  before events with a bounded preference, so that one flooding member cannot starve the others.

Who is a member is left to ``network.py``, how frames reach the other side to ``link.py``, and what a frame
means to the replica.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import trio

from consensus.identifiers import MemberId

FRAME_OVERHEAD_BYTES = 128
"""Charged to a queue for each frame besides its length: what Python keeps for it. Bounds empty frames too."""

VOTES_IN_A_ROW = 32
"""So many vote frames are served before one waiting event frame gets its turn."""


class Lane(IntEnum):
    """The urgency of a frame; the value is its kind byte on the wire."""

    VOTES = 1
    EVENTS = 2


@dataclass(frozen=True, slots=True)
class Received:
    """One frame as it came from a member, authenticated by the member's transport key only."""

    member: MemberId
    lane: Lane
    frame: bytes


class OverBudget(Exception):
    """A member sent more than we processed, beyond its budget; it is to be disconnected."""


class Outbox:
    """Frames that wait to be sent to one member on one lane, oldest first; bounded in bytes."""

    def __init__(self, lane: Lane, capacity_bytes: int) -> None:
        self._drops_oldest = lane is Lane.VOTES
        self._capacity_bytes = capacity_bytes
        self._frames: deque[tuple[float, bytes]] = deque()
        self._queued_bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: bytes, now: float) -> int:
        """Queue ``frame`` and return how many frames the bound cost: 0, or what was dropped."""
        dropped = 0
        cost = len(frame) + FRAME_OVERHEAD_BYTES
        while self._queued_bytes + cost > self._capacity_bytes:
            if not self._drops_oldest or not self._frames:
                return dropped + 1
            self.take()
            dropped += 1
        self._frames.append((now, frame))
        self._queued_bytes += cost
        return dropped

    def take(self) -> bytes | None:
        """Remove and return the oldest frame, or None if there is none."""
        if not self._frames:
            return None
        _, frame = self._frames.popleft()
        self._queued_bytes -= len(frame) + FRAME_OVERHEAD_BYTES
        return frame

    def drop_before(self, time: float) -> int:
        """Drop the frames queued before ``time`` and return how many there were."""
        dropped = 0
        while self._frames and self._frames[0][0] < time:
            self.take()
            dropped += 1
        return dropped


class Inbox(trio.abc.ReceiveChannel[Received]):
    """Frames received and not yet processed: a receive channel that serves the members in turn.

    A frame counts against its sender's budget until it is received from here. Any number of tasks may
    receive. After ``close`` the frames that are left can be received, then ``trio.EndOfChannel`` follows.
    """

    def __init__(self, members: Iterable[MemberId], budget_bytes: dict[Lane, int]) -> None:
        self._budget_bytes = budget_bytes
        self._frames: dict[tuple[MemberId, Lane], deque[bytes]] = {
            (member, lane): deque() for member in members for lane in Lane
        }
        self._queued_bytes = dict.fromkeys(self._frames, 0)
        self._turns: dict[Lane, deque[MemberId]] = {lane: deque() for lane in Lane}
        self._votes_in_a_row = 0
        self._waiting = trio.lowlevel.ParkingLot()
        self._closed = False

    def __len__(self) -> int:
        return sum(len(frames) for frames in self._frames.values())

    def expect(self, member: MemberId) -> None:
        """Take frames of one more member."""
        for lane in Lane:
            self._frames.setdefault((member, lane), deque())
            self._queued_bytes.setdefault((member, lane), 0)

    def put(self, received: Received) -> None:
        """Queue a frame. Raises ``OverBudget`` if its member left too little processed."""
        key = (received.member, received.lane)
        cost = len(received.frame) + FRAME_OVERHEAD_BYTES
        if self._queued_bytes[key] + cost > self._budget_bytes[received.lane]:
            raise OverBudget(
                f"{self._queued_bytes[key]} bytes unprocessed on {received.lane.name}, "
                f"budget {self._budget_bytes[received.lane]}"
            )
        frames = self._frames[key]
        if not frames:
            self._turns[received.lane].append(received.member)
        frames.append(received.frame)
        self._queued_bytes[key] += cost
        self._waiting.unpark()

    def forget(self, member: MemberId) -> None:
        """Drop what waits of a member."""
        for lane in Lane:
            self._frames[member, lane].clear()
            self._queued_bytes[member, lane] = 0
            if member in self._turns[lane]:
                self._turns[lane].remove(member)

    def receive_nowait(self) -> Received:
        """The next frame. Raises ``trio.WouldBlock`` if none waits, ``trio.EndOfChannel`` after ``close``."""
        votes, events = self._turns[Lane.VOTES], self._turns[Lane.EVENTS]
        if votes and (not events or self._votes_in_a_row < VOTES_IN_A_ROW):
            self._votes_in_a_row += 1
            return self._take(Lane.VOTES)
        self._votes_in_a_row = 0
        if events:
            return self._take(Lane.EVENTS)
        if self._closed:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    async def receive(self) -> Received:
        """Wait for the next frame. Raises ``trio.EndOfChannel`` when closed and drained."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                received = self.receive_nowait()
            except trio.WouldBlock:
                await self._waiting.park()
                continue
            await trio.lowlevel.cancel_shielded_checkpoint()
            return received

    def close(self) -> None:
        """No frame follows; receivers that wait get ``trio.EndOfChannel``."""
        self._closed = True
        self._waiting.unpark_all()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def _take(self, lane: Lane) -> Received:
        member = self._turns[lane].popleft()
        frames = self._frames[member, lane]
        frame = frames.popleft()
        self._queued_bytes[member, lane] -= len(frame) + FRAME_OVERHEAD_BYTES
        if frames:
            self._turns[lane].append(member)
        return Received(member, lane, frame)
