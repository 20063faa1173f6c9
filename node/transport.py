"""One authenticated, encrypted libp2p connection with one stream: TCP + Noise XX + yamux, and nothing else.

Built from py-libp2p's parts (multistream-select, Noise, yamux), *not* from its ``new_host()``, whose swarm
adds what a permissioned network must not have. What the parts get wrong is put right here:

- **Identity.** Only ``/noise`` and ``/yamux/1.0.0`` are offered: plaintext, secio and TLS get "na".
  ``RosterNoise`` refuses every peer outside the roster the moment Noise has authenticated it.
- **Remote kill.** Whatever the parts raise (``UnicodeDecodeError`` on the bytes ``03 ff fe 0a``, for one) ends
  at most this connection: a stream that fails is reset, a handshake that fails is a ``HandshakeFailed``.
- **Slots.** An accepted connection holds nothing once it ended; the stock swarm accepts 250 in its lifetime.
- **Bounded reading.** A handshake reads at most ``HANDSHAKE_BYTES``; a Noise message is at most 65,535 bytes;
  ``BoundedYamux`` ends a connection which holds more unread bytes than its window allows (yamux only
  warns), and far fewer before a stream is agreed on; a stream that is refused is forgotten at once.
  ``TcpConnection.read`` reads exactly: ``libp2p.io.utils.read_exactly`` gives up after 100.
- **Writes are never cancelled** but by closing the connection: a half-written Noise message wedges it.
  Closing is ``abort``: synchronous, without a farewell, for yamux's GO_AWAY waits for a lock which a writer
  to a stopped peer holds for ever.
- **Windows** are credited here, half a window at a time (yamux writes a window update for each read), and
  yamux's own pings are off: two peers answering them while both write in bulk wait for each other.
- **Turns.** Yamux takes six locks for a message, and each of trio's gives way to all other tasks even while it is free:
  they are replaced by ones that do not. Other tasks have their turn every ``READS_A_TURN`` reads instead.

Wire form: standard libp2p, so that other implementations can connect. Who is dialled when and what the
stream carries is left to ``network.py``, and so is telling why a connection ended: libp2p's own logger is
silenced up to CRITICAL. Importing libp2p writes no file and leaves the root logger alone, unless the operator
sets ``LIBP2P_DEBUG``, which is then obeyed (it makes a log file in the temporary directory).
"""

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    FLAG_ACK,
    TYPE_PING,
    Yamux,
    YamuxStream,
)
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL

log = logging.getLogger(__name__)
if "LIBP2P_DEBUG" not in os.environ:
    _libp2p_log = logging.getLogger("libp2p")
    _libp2p_log.propagate = True  # to the node's own handlers, instead of straight to stderr
    _libp2p_log.setLevel(logging.CRITICAL)  # lower levels tell of what peers do: a way to flood our log

HANDSHAKE_BYTES = 64 * 1024
"""What a peer may send before Noise and yamux stand; a real handshake is under 1 KiB."""

MAX_NOISE_MESSAGE_BYTES = 65_535
MAX_NEGOTIATION_READ_BYTES = 1024
MAX_STREAMS_IN_NEGOTIATION = 8
RECEIVE_BYTES = 256 * 1024
READS_A_TURN = 32
"""Of a header or a body, of Noise's messages or yamux's frames, that have arrived, before others have their turn."""
NEGOTIATION_UNREAD_BYTES = 512 * 1024
"""Unread bytes allowed before a stream is agreed on: one initial window, and what negotiating takes."""
YAMUX_SLACK_BYTES = 1024 * 1024 + MAX_STREAMS_IN_NEGOTIATION * DEFAULT_WINDOW_SIZE
"""Unread bytes allowed above the window: one large frame of a foreign implementation, and idle streams."""


class HandshakeFailed(Exception):
    """No connection came to be: the message says which step failed. Nothing of it is left open."""


class StrangerRefused(Exception):
    """Noise authenticated a peer that is not on the roster, or not the one that was dialled."""


class WindowExceeded(trio.TooSlowError):
    """The peer ignored flow control. Its base class is the exception on which yamux closes a connection."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Our side of every handshake: the Ed25519 key pair behind our peer id."""

    key_pair: KeyPair
    peer_id: ID

    @classmethod
    def from_seed(cls, seed: bytes) -> "Identity":
        private_key = Ed25519PrivateKey.new(seed)
        key_pair = KeyPair(private_key, private_key.get_public_key())
        return cls(key_pair, ID.from_pubkey(key_pair.public_key))


def peer_id_of(transport_key: bytes) -> ID:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    return ID.from_pubkey(Ed25519PublicKey.from_bytes(transport_key))


class TcpConnection(IRawConnection):  # type: ignore[misc]  # libp2p has no type information
    """A TCP stream as libp2p's parts see it: exact reads, and a bound on the handshake."""

    def __init__(self, stream: trio.SocketStream, *, is_initiator: bool) -> None:
        self.is_initiator = is_initiator
        self.handshake_bytes_left: int | None = HANDSHAKE_BYTES
        self.received_bytes = 0
        self.sent_bytes = 0
        self._reads = 0
        self._stream = stream
        self._unread = bytearray()

    async def read(self, n: int | None = None) -> bytes:
        """Read exactly ``n`` bytes. Raises ``ConnectionClosedError`` at the end, or beyond the bounds."""
        if n is None or n > MAX_NOISE_MESSAGE_BYTES:
            raise ConnectionClosedError(f"a message of {n} bytes, at most {MAX_NOISE_MESSAGE_BYTES} expected")
        if self.handshake_bytes_left is not None:
            self.handshake_bytes_left -= n
            if self.handshake_bytes_left < 0:
                raise ConnectionClosedError(f"more than {HANDSHAKE_BYTES} bytes of handshake")
        self._reads += 1
        if self._reads % READS_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        while len(self._unread) < n:
            try:
                received = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(f"connection lost: {error}") from error
            if not received:
                raise ConnectionClosedError("connection closed by the peer")
            self.received_bytes += len(received)
            self._unread += received
        taken = bytes(memoryview(self._unread)[:n])
        del self._unread[:n]
        return taken

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"connection lost: {error}") from error
        self.sent_bytes += len(data)

    def abort(self) -> None:
        """Close the socket at once; whoever reads or writes on it gets an error."""
        self._stream.socket.close()

    async def close(self) -> None:
        self.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Any]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


class RosterNoise(NoiseTransport):  # type: ignore[misc]
    """Noise XX that ends, once the peer is authenticated, unless the peer is one we expect."""

    def __init__(self, identity: Identity, is_expected: Callable[[ID], bool]) -> None:
        super().__init__(identity.key_pair, create_new_x25519_key_pair().private_key)
        self._is_expected = is_expected

    async def secure_inbound(self, conn: IRawConnection) -> Any:
        return self._admit(await super().secure_inbound(conn))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> Any:
        return self._admit(await super().secure_outbound(conn, peer_id))

    def _admit(self, session: Any) -> Any:
        peer_id = session.get_remote_peer()
        if not self._is_expected(peer_id):
            raise StrangerRefused(f"{peer_id} is not expected here")
        return session


class PromptLock:
    """A lock that is taken without a pause while it is free, and else in the order of asking.

    ``trio.Lock`` gives way to all other tasks even while it is free, and every message passes six locks of yamux.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        if self._held:
            await self._waiting.park()  # whoever releases it passes it on, held
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._held = False


class _WriteLock:
    """A stream's ``rw_lock``, of which yamux takes only the writer's side."""

    def __init__(self) -> None:
        self._lock = PromptLock()

    def write_lock(self) -> PromptLock:
        return self._lock


class PacedSession:
    """A session whose reader pauses now and then: what one peer sends at once must not hold up the others.

    A Noise message may hold thousands of yamux's frames, and a frame be of thousands of Noise messages: those
    ``TcpConnection`` counts.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def read(self, n: int | None = None) -> bytes:
        self._reads += 1
        if self._reads % READS_A_TURN == 0:
            await trio.lowlevel.checkpoint()
        return bytes(await self._session.read(n))


class BoundedYamux(Yamux):  # type: ignore[misc]
    """Yamux that enforces a bound on unread bytes, sends no pings, and answers them off its reading task."""

    def __init__(self, session: Any, peer_id: ID, *, is_initiator: bool) -> None:
        super().__init__(PacedSession(session), peer_id, is_initiator=is_initiator)
        self.streams_lock = PromptLock()
        self._write_lock = PromptLock()
        self.max_unread_bytes = NEGOTIATION_UNREAD_BYTES
        self._pong_waits = False
        self.window_exceeded = False

    async def _read_data_body(self, length: int) -> bytes:
        unread_bytes = sum(map(len, self.stream_buffers.values()))
        if unread_bytes + length > self.max_unread_bytes:
            self.window_exceeded = True
            raise WindowExceeded(f"{unread_bytes} bytes unread, {length} more announced")
        return bytes(await self.secured_conn.read(length))

    async def _measure_rtt_loop(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _write_frame(self, data: bytes) -> None:
        if data[1] == TYPE_PING and data[3] & FLAG_ACK:
            if not self._pong_waits and self._nursery is not None:
                self._pong_waits = True
                self._nursery.start_soon(self._write_pong, data)
            return
        async with self._write_lock:
            await self.secured_conn.write(data)

    async def _write_pong(self, data: bytes) -> None:
        async with self._write_lock:
            self._pong_waits = False
            await self.secured_conn.write(data)


class Connection:
    """An established stream to an authenticated peer. One task reads, one task writes."""

    def __init__(self, tcp: TcpConnection, stream: YamuxStream, peer_id: ID, protocol: str) -> None:
        self.peer_id = peer_id
        self.protocol = protocol
        self._tcp = tcp
        self._stream = stream
        stream.window_lock, stream.rw_lock = PromptLock(), _WriteLock()
        self._window_bytes = DEFAULT_WINDOW_SIZE
        self._uncredited_bytes = 0

    @property
    def received_bytes(self) -> int:
        return self._tcp.received_bytes

    @property
    def sent_bytes(self) -> int:
        return self._tcp.sent_bytes

    @property
    def window_exceeded(self) -> bool:
        """Whether the peer was cut off for ignoring flow control."""
        return bool(self._stream.conn.window_exceeded)

    async def widen_window(self, window_bytes: int) -> None:
        """Let the peer have up to ``window_bytes`` in flight; called once, before reading."""
        await self._credit(window_bytes - DEFAULT_WINDOW_SIZE)
        self._window_bytes = window_bytes

    async def receive(self) -> bytes:
        """The next bytes, at least one. Raises libp2p's errors when the connection is gone."""
        received = await self._stream.conn.read_stream(self._stream.stream_id, RECEIVE_BYTES)
        self._uncredited_bytes += len(received)
        if self._uncredited_bytes >= self._window_bytes // 2:
            credited, self._uncredited_bytes = self._uncredited_bytes, 0
            await self._credit(credited)
        return bytes(received)

    async def send(self, frames: bytes) -> None:
        """Write ``frames``. Never to be cancelled but after ``abort``."""
        await self._stream.write(frames)

    def abort(self) -> None:
        """Close at once, from any task."""
        self._tcp.abort()

    async def _credit(self, credited_bytes: int) -> None:
        self._stream.recv_window += credited_bytes
        await self._stream.send_window_update(credited_bytes)


class _NegotiatedStream:
    """A yamux stream during protocol negotiation: exact, small reads."""

    def __init__(self, stream: YamuxStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        if n is None or n > MAX_NEGOTIATION_READ_BYTES:
            raise ConnectionClosedError(f"a protocol name of {n} bytes")
        received = b""
        while len(received) < n:
            received += await self._stream.conn.read_stream(self._stream.stream_id, n - len(received))
        return received

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)


@asynccontextmanager
async def connect(
    stream: trio.SocketStream,
    noise: RosterNoise,
    peer_id: ID | None,
    protocols: Sequence[str],
    *,
    window_bytes: int,
    handshake_seconds: float,
) -> AsyncIterator[Connection]:
    """Make ``stream`` a ``Connection``; it ends with the context, and the context with it (by cancellation).

    With ``peer_id`` we dialled: that peer is expected, and the stream is opened for ``protocols[0]``. Without,
    we accept: the peer opens the stream, for any of ``protocols``.

    Raises ``HandshakeFailed`` or ``StrangerRefused`` before the context is entered; nothing is left open then.
    """
    tcp = TcpConnection(stream, is_initiator=peer_id is not None)
    negotiation_seconds = int(handshake_seconds) + 1
    connection: Connection | None = None
    try:
        with trio.fail_after(handshake_seconds):
            session = await _secure(tcp, noise, peer_id, negotiation_seconds)
        async with trio.open_nursery() as nursery:
            muxer = BoundedYamux(session, session.get_remote_peer(), is_initiator=tcp.is_initiator)
            nursery.start_soon(_run_muxer, muxer, nursery.cancel_scope)
            accept: trio.MemorySendChannel[tuple[YamuxStream, str]]
            accept, accepted = trio.open_memory_channel(1)
            offered = protocols if peer_id is None else ()
            nursery.start_soon(_answer_streams, muxer, offered, accept, negotiation_seconds)
            with trio.fail_after(handshake_seconds):
                await muxer.event_started.wait()
                if peer_id is None:
                    yamux_stream, protocol = await accepted.receive()
                else:
                    yamux_stream, protocol = await muxer.open_stream(), protocols[0]
                    communicator = MultiselectCommunicator(_NegotiatedStream(yamux_stream))
                    await MultiselectClient().select_one_of([protocol], communicator, negotiation_seconds)
                established = Connection(tcp, yamux_stream, session.get_remote_peer(), protocol)
                muxer.max_unread_bytes = window_bytes + YAMUX_SLACK_BYTES
                await established.widen_window(window_bytes)
                connection = established
            yield connection
            tcp.abort()
            nursery.cancel_scope.cancel()
    except StrangerRefused:
        raise
    except Exception as error:  # the border to libp2p: its parts raise anything
        if connection is not None:
            raise
        raise HandshakeFailed(first_cause(error)) from error
    finally:
        tcp.abort()
    if connection is None:
        raise HandshakeFailed("connection lost during stream negotiation")


async def _secure(tcp: TcpConnection, noise: RosterNoise, peer_id: ID | None, timeout_seconds: int) -> Any:
    """Noise, then the agreement on yamux, within the bounds of a handshake."""
    if peer_id is None:
        await Multiselect({NOISE_PROTOCOL: None}).negotiate(MultiselectCommunicator(tcp), timeout_seconds)
        session = await noise.secure_inbound(tcp)
        communicator = MultiselectCommunicator(session)
        await Multiselect({YAMUX_PROTOCOL: None}).negotiate(communicator, timeout_seconds)
    else:
        select = MultiselectClient().select_one_of
        await select([NOISE_PROTOCOL], MultiselectCommunicator(tcp), timeout_seconds)
        session = await noise.secure_outbound(tcp, peer_id)
        await select([YAMUX_PROTOCOL], MultiselectCommunicator(session), timeout_seconds)
    tcp.handshake_bytes_left = None
    return session


async def _run_muxer(muxer: BoundedYamux, connection_scope: trio.CancelScope) -> None:
    """Run yamux until the connection is gone, then end all that depends on it."""
    try:
        await muxer.start()
    except Exception as error:  # the border to libp2p
        log.debug("connection to %s ended: %s", muxer.peer_id, first_cause(error))
    connection_scope.cancel()


async def _answer_streams(
    muxer: BoundedYamux,
    protocols: Sequence[str],
    accept: "trio.MemorySendChannel[tuple[YamuxStream, str]]",
    timeout_seconds: int,
) -> None:
    """Answer the streams a peer opens: the first for one of ``protocols`` is taken, all others reset."""
    negotiating = 0
    taken = not protocols

    async def answer(stream: YamuxStream) -> None:
        nonlocal negotiating, taken
        try:
            communicator = MultiselectCommunicator(_NegotiatedStream(stream))
            protocol, _ = await Multiselect(dict.fromkeys(protocols)).negotiate(communicator, timeout_seconds)
            if not taken and protocol is not None:
                taken = True
                accept.send_nowait((stream, str(protocol)))
                return
        except Exception as error:  # the border to libp2p
            log.debug("stream of %s refused: %s", muxer.peer_id, first_cause(error))
        finally:
            negotiating -= 1
        await _reset(stream)

    async with trio.open_nursery() as nursery:
        while True:
            try:
                stream = await muxer.accept_stream()
            except Exception as error:  # the border to libp2p
                log.debug("no more streams from %s: %s", muxer.peer_id, first_cause(error))
                return
            if taken or negotiating >= MAX_STREAMS_IN_NEGOTIATION:
                await _reset(stream)
                continue
            negotiating += 1
            nursery.start_soon(answer, stream)


async def _reset(stream: YamuxStream) -> None:
    """Refuse a stream, and forget it: yamux keeps one that holds unread bytes for a minute and more."""
    muxer, stream_id = stream.conn, stream.stream_id
    try:
        await stream.reset()
        muxer.stream_buffers.get(stream_id, bytearray()).clear()
        await muxer._finalize_stream(stream, fully_closed=True)
    except Exception as error:  # the border to libp2p
        log.debug("stream already gone: %s", first_cause(error))


def first_cause(error: BaseException) -> str:
    """One line for the innermost cause of what libp2p raised."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return f"{type(error).__name__}: {error}"
