"""One standing connection to a member: frames out of its outbox, frames into the inbox, requests and answers.

Frames are kind (1 byte), length (4 bytes, big-endian), payload; requests, responses and refusals start with
the request's number (8 bytes, counted by the requester from 1 for each connection).

- One task writes, many frames at a time, taking its sources in turn, and a heartbeat when it was idle. No
  deadline stands around a write, and the connection is aborted before the writing task is cancelled.
- One task reads, and never waits for whoever processes what it read. A frame over the cap, of an unknown
  kind, on the wrong connection, or beyond the member's budget raises ``Misbehaved``.
- One task watches: nothing received for ``silence_seconds`` (a stopped process, a cut cable) ends the link.

A link ends when any of them does; requests that wait for an answer then fail. Which links there are, and what
becomes of a member that misbehaved, is left to ``network.py``.
"""

import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import trio

from consensus.identifiers import MemberId
from consensus.rejection import Unavailable
from node.lanes import Inbox, Lane, Outbox, OverBudget, Received
from node.messages import MAX_REQUEST_BYTES
from node.transport import Connection, first_cause

log = logging.getLogger(__name__)

FRAME_HEADER = struct.Struct(">BI")
REQUEST_NUMBER = struct.Struct(">Q")
MAX_REFUSAL_BYTES = 64
FRAMES_A_TURN = 256
"""Of those that have arrived, before other tasks have their turn."""


class FrameKind(IntEnum):
    """First byte of a frame; the values of ``Lane`` are kinds."""

    HEARTBEAT = 0
    VOTES = Lane.VOTES
    EVENTS = Lane.EVENTS
    REQUEST = 3
    RESPONSE = 4
    REFUSAL = 5


class LinkKind(StrEnum):
    """Which of a member's two connections; the value is the last part of its protocol's name."""

    URGENT = "votes"
    BULK = "bulk"

    @property
    def lane(self) -> Lane:
        return Lane.VOTES if self is LinkKind.URGENT else Lane.EVENTS


@dataclass(frozen=True, slots=True)
class NetworkLimits:
    """Bounds of the network layer, for each member where not said otherwise."""

    max_frame_bytes: int = 4 * 1024 * 1024
    votes_outbox_bytes: int = 8 * 1024 * 1024
    events_outbox_bytes: int = 32 * 1024 * 1024
    votes_inbox_bytes: int = 8 * 1024 * 1024
    events_inbox_bytes: int = 32 * 1024 * 1024
    window_bytes: int = 4 * 1024 * 1024
    batch_bytes: int = 256 * 1024
    heartbeat_seconds: float = 1.0
    silence_seconds: float = 5.0
    handshake_seconds: float = 5.0
    redial_first_seconds: float = 0.1
    redial_last_seconds: float = 5.0
    penalty_seconds: float = 1.0
    stale_seconds: float = 10.0
    max_complaints: int = 64
    complaints_forgiven_per_second: float = 1.0
    max_handshakes: int = 128
    """Inbound connections in handshake at a time, of all peers together (``places.py``)."""
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_requests_in_service: int = 16
    max_outstanding_requests: int = 64
    request_service_seconds: float = 60.0


@dataclass(slots=True)
class NetworkCounters:
    """What happened since the start; for the metrics endpoint."""

    bytes_sent: int = 0
    bytes_received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    votes_dropped: int = 0
    events_dropped: int = 0
    stale_dropped: int = 0
    connections: int = 0
    reconnects: int = 0
    dials_failed: int = 0
    refused_strangers: int = 0
    refused_handshakes: int = 0
    refused_overload: int = 0
    closed_silent: int = 0
    closed_oversized: int = 0
    closed_malformed: int = 0
    closed_over_budget: int = 0
    closed_bad_content: int = 0
    requests_sent: int = 0
    requests_failed: int = 0
    requests_served: int = 0
    requests_refused: int = 0


class Misbehaved(Exception):
    """The member broke a rule; ``counter`` is the field of ``NetworkCounters`` that counts such cases."""

    def __init__(self, counter: str, detail: str) -> None:
        super().__init__(detail)
        self.counter = counter


class Refused(Unavailable):
    """The member refused a request; ``why`` is its word for the reason, of at most ``MAX_REFUSAL_BYTES``."""

    def __init__(self, why: str, asked: str = "") -> None:
        super().__init__(f"{asked}refused: {why}")
        self.why = why


@dataclass(slots=True, eq=False)
class _Answer:
    """What became of a request of ours."""

    failure: str
    refusal: str | None = None
    response: bytes | None = None
    done: trio.Event = field(default_factory=trio.Event)


class Link:
    """A standing connection to ``member``. ``run`` it once; everything else may be called while it runs."""

    def __init__(
        self,
        *,
        member: MemberId,
        kind: LinkKind,
        connection: Connection,
        outbox: Outbox,
        inbox: Inbox,
        serve: "Callable[[Link, int, bytes], None]",
        limits: NetworkLimits,
        counters: NetworkCounters,
    ) -> None:
        self.member = member
        self.kind = kind
        self.requests_in_service = 0
        self.refusals_in_flight = 0
        self._connection = connection
        self._outbox = outbox
        self._inbox = inbox
        self._serve = serve
        self._limits = limits
        self._counters = counters
        self._wake = trio.Event()
        self._last_received_time = trio.current_time()
        self._control: deque[tuple[bytes, trio.Event]] = deque()
        self._answers: dict[int, _Answer] = {}
        self._next_request_number = 1
        self._closed = False
        self._counted_bytes = (0, 0)

    async def run(self) -> None:
        """Send and receive until the connection ends. Raises ``Misbehaved`` if by the member's fault."""
        misbehaved: Misbehaved | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                nursery.start_soon(self._watch)
                try:
                    await self._read()
                except Misbehaved as error:
                    misbehaved = error
                self.abort()
                nursery.cancel_scope.cancel()
        finally:
            self.abort()
            self._fail_waiting()
            if misbehaved is not None:  # also where the end of the connection has cancelled this task by now
                raise misbehaved

    def wake(self) -> None:
        """Tell the writing task that there is something to send."""
        self._wake.set()

    def abort(self) -> None:
        """End the connection at once, from any task."""
        self._connection.abort()

    async def request(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Ask the member. Raises ``Unavailable`` without a response in time, ``Refused`` when refused."""
        if self._closed or len(self._answers) >= self._limits.max_outstanding_requests:
            raise Unavailable(f"connection lost, or {len(self._answers)} requests outstanding")
        number, self._next_request_number = self._next_request_number, self._next_request_number + 1
        answer = self._answers[number] = _Answer(f"no response within {timeout_seconds} s")
        written = self._put_control(FrameKind.REQUEST, number, payload)
        try:
            with trio.move_on_after(timeout_seconds):
                await answer.done.wait()
        finally:
            # What is on its way counts until it is answered: the member serves it, whether or not we still wait.
            if self._withdraw(written):
                self._answers.pop(number, None)
        if answer.refusal is not None:
            raise Refused(answer.refusal)
        if answer.response is None:
            raise Unavailable(answer.failure)
        return answer.response

    async def respond(self, number: int, response: bytes) -> None:
        """Answer the member's request, and wait until that is written or the link has ended."""
        await self._put_control(FrameKind.RESPONSE, number, response).wait()

    async def refuse(self, number: int, why: str) -> None:
        """Refuse the member's request, and wait until that is written or the link has ended."""
        await self._put_control(FrameKind.REFUSAL, number, why.encode()[:MAX_REFUSAL_BYTES]).wait()

    def _put_control(self, kind: FrameKind, number: int, payload: bytes) -> trio.Event:
        written = trio.Event()
        if self._closed:
            written.set()
            return written
        header = FRAME_HEADER.pack(kind, REQUEST_NUMBER.size + len(payload)) + REQUEST_NUMBER.pack(number)
        self._control.append((header + payload, written))
        self.wake()
        return written

    def _withdraw(self, written: trio.Event) -> bool:
        """Take back a control frame that is not on its way yet; whether it was not."""
        for place, (_, event) in enumerate(self._control):
            if event is written:
                del self._control[place]
                return True
        return False

    def _fail_waiting(self) -> None:
        self._closed = True
        for _, written in self._control:
            written.set()
        self._control.clear()
        for answer in self._answers.values():
            answer.failure = "connection lost"
            answer.done.set()
        self._count_bytes()

    def _count_bytes(self) -> None:
        sent, received = self._connection.sent_bytes, self._connection.received_bytes
        self._counters.bytes_sent += sent - self._counted_bytes[0]
        self._counters.bytes_received += received - self._counted_bytes[1]
        self._counted_bytes = (sent, received)

    async def _write(self, link_scope: trio.CancelScope) -> None:
        heartbeat = FRAME_HEADER.pack(FrameKind.HEARTBEAT, 0)
        try:
            while True:
                self._wake = trio.Event()
                parts, written = self._next_batch()
                if not parts:
                    with trio.move_on_after(self._limits.heartbeat_seconds) as idle:
                        await self._wake.wait()
                    if not idle.cancelled_caught:
                        continue
                    parts = [heartbeat]
                try:
                    await self._connection.send(b"".join(parts))
                finally:
                    for event in written:
                        event.set()
        except Exception as error:  # the border to libp2p
            log.debug("writing to %s: %s", self.member.hex(), first_cause(error))
            self.abort()
            link_scope.cancel()

    def _next_batch(self) -> tuple[list[bytes], list[trio.Event]]:
        """Take some ``batch_bytes`` of frames, control and lane in turn; and the events of control frames."""
        parts: list[bytes] = []
        written: list[trio.Event] = []
        size_bytes = 0
        while size_bytes < self._limits.batch_bytes and (self._control or self._outbox):
            if self._control:
                control, event = self._control.popleft()
                parts.append(control)
                written.append(event)
                size_bytes += len(control)
                self._counters.frames_sent += 1
            frame = self._outbox.take()
            if frame is not None:
                parts += (FRAME_HEADER.pack(self.kind.lane, len(frame)), frame)
                size_bytes += FRAME_HEADER.size + len(frame)
                self._counters.frames_sent += 1
        return parts, written

    async def _watch(self) -> None:
        while True:
            await trio.sleep(self._limits.silence_seconds / 10)
            self._count_bytes()
            silent_seconds = trio.current_time() - self._last_received_time
            if silent_seconds > self._limits.silence_seconds:
                self._counters.closed_silent += 1
                log.info("%s was silent for %.1f s: disconnected", self.member.hex(), silent_seconds)
                self.abort()
                return

    async def _read(self) -> None:
        """Read until the connection ends; returns then. Raises ``Misbehaved``."""
        unread = bytearray()
        frames = 0
        while True:
            try:
                unread += await self._connection.receive()
            except Exception as error:  # the border to libp2p
                log.debug("reading from %s: %s", self.member.hex(), first_cause(error))
                return
            self._last_received_time = trio.current_time()
            offset = 0
            while len(unread) - offset >= FRAME_HEADER.size:
                kind, length = FRAME_HEADER.unpack_from(unread, offset)
                if length > self._limits.max_frame_bytes + REQUEST_NUMBER.size:
                    raise Misbehaved("closed_oversized", f"frame of {length} bytes")
                end = offset + FRAME_HEADER.size + length
                if len(unread) < end:
                    break
                self._take_frame(kind, bytes(memoryview(unread)[offset + FRAME_HEADER.size : end]))
                offset = end
                frames += 1
                if frames % FRAMES_A_TURN == 0:
                    await trio.lowlevel.checkpoint()
            del unread[:offset]

    def _take_frame(self, kind: int, payload: bytes) -> None:
        if kind == FrameKind.HEARTBEAT and not payload:
            return
        self._counters.frames_received += 1
        if kind == self.kind.lane:
            if len(payload) > self._limits.max_frame_bytes:
                raise Misbehaved("closed_oversized", f"frame of {len(payload)} bytes")
            try:
                self._inbox.put(Received(self.member, self.kind.lane, payload))
            except OverBudget as error:
                raise Misbehaved("closed_over_budget", str(error)) from error
            return
        if self.kind is not LinkKind.BULK or len(payload) < REQUEST_NUMBER.size:
            raise Misbehaved("closed_malformed", f"frame of kind {kind} on {self.kind}")
        (number,) = REQUEST_NUMBER.unpack_from(payload)
        content = payload[REQUEST_NUMBER.size :]
        if kind == FrameKind.REQUEST:
            if len(content) > self._limits.max_request_bytes:
                raise Misbehaved("closed_oversized", f"request of {len(content)} bytes")
            self._serve(self, number, content)
        elif kind == FrameKind.RESPONSE or (kind == FrameKind.REFUSAL and len(content) <= MAX_REFUSAL_BYTES):
            self._take_answer(number, kind == FrameKind.RESPONSE, content)
        else:
            raise Misbehaved("closed_malformed", f"frame of kind {kind} with {len(content)} bytes")

    def _take_answer(self, number: int, is_response: bool, content: bytes) -> None:
        """An answer to nothing we (still) wait for is dropped: it may have come too late."""
        answer = self._answers.pop(number, None)
        if answer is None:
            return
        if is_response:
            answer.response = content
        else:
            answer.refusal = content.decode("ascii", "replace")
        answer.done.set()
