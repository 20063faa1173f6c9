"""HTTP/1.1 over trio: h11 parses, this file moves bytes and bounds what a client can hold.

Rules:

1. Only HTTP/1.1. An ``Upgrade`` is ignored (RFC 9110 §7.8), so neither HTTP/2 nor WebSocket code is reachable.
2. A connection's failure ends that connection alone; only ``InvariantBroken`` leaves ``serve_http``.
3. Time is bounded: for the head, for the body as a whole, for each part of a reply the client takes, and
   between requests. Cancellation ends every connection at once, one whose client does not read included.
4. Connections take turns: of those whose requests are here a few are taken apart and answered between two turns of
   all the node's other tasks, and a body is taken a few pieces at a time. However many clients ask at once, votes do
   not wait long. Long work has turns of its own, one at a time (``HttpRequest.next_turn``). Heads and trailers are
   bounded in lines as in bytes, what begins a chunk in bytes.
5. Memory is bounded: head, body, the sum of all bodies until their requests are answered, the sum of all replies until
   they are taken, the number of connections. When there are so many, one that waits for its client, to ask or to take a
   reply, or for an event to be final, gives its place to the next (``places.py``).
6. Path and query are taken literally. Nothing this interface names needs percent-encoding, so every resource
   has one spelling.

Common ASGI servers break rules 1 to 3 before any application code runs: malformed HTTP/2 settings in an upgrade
raise out of the whole server, and writes are shielded from cancellation.
"""

import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import h11
import trio

from consensus.rejection import ConfigError, Reason, Rejected, Unavailable, breaks_invariant
from node.config import Address
from node.errors_http import CLOSING, HttpFault, HttpReply, SlowClient, error_reply, reply_to
from node.places import Place, Places

__all__ = ["AddressReport", "HttpLimits", "HttpRequest", "serve_http"]

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 << 10
SEND_BYTES = 256 << 10
SMALL_REPLY_BYTES = 16 << 10
"""A reply up to this size is always sent: as many as there are connections hold little."""
BACKLOG = 512
REQUESTS_A_TURN = 16
"""Fewer take more time: what clients send together is checked, kept and passed on together."""
SLICE_BYTES = 64 << 10
"""To check so many bytes of an event takes some milliseconds, as long as a slice of long work may take."""
PIECES_A_TURN = 64
MOST_SMALL_PIECES = 4_096
SMALL_PIECE_BYTES = 64
"""A body of more than ``MOST_SMALL_PIECES`` chunks has this many bytes in each, on average, or is refused: to take a
chunk apart costs the same whatever is in it."""
_FIELDS_END = re.compile(rb"\n\r?\n")
_NO_REQUEST = frozenset(bytes([byte]) for byte in range(0x21))
"""What begins with one of these h11 refuses without waiting for the end of it."""
CHUNK_HEAD_BYTES = 256
"""Of the line that begins a chunk: its size, and extensions, which nobody is known to send. The time to take one apart
grows with the square of its length."""
_CHUNK_BEGINS = re.compile(rb"\r?\n?([0-9A-Fa-f]++).*?\r\n", re.DOTALL)
"""With what is left of the end of the chunk before. h11 may still refuse what this takes, and takes no other."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client, and all of them together, may hold."""

    connections: int = 512
    head_bytes: int = 16 << 10
    head_lines: int = 100
    """Of a request, its first and its empty one included; of a chunked body's trailers likewise."""
    bodies_bytes: int = 64 << 20
    """All bodies of requests that are not answered yet, together."""
    replies_bytes: int = 64 << 20
    """All replies over ``SMALL_REPLY_BYTES`` that clients are taking, together; one that is alone may be larger."""
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    """For each ``SEND_BYTES`` of a reply."""
    idle_seconds: float = 75.0
    linger_seconds: float = 2.0


class _Server:
    def __init__(self, handler: "Handler", limits: HttpLimits) -> None:
        self.handler = handler
        self.limits = limits
        self.places = Places(limits.connections)
        self.turn = trio.CapacityLimiter(REQUESTS_A_TURN)
        """Whose requests are to be answered next, in the order in which they came."""
        self.long_turn = trio.CapacityLimiter(1)
        """Whose long work goes on next: a slice of each of a hundred requests in one turn would hold up votes."""
        self.held_bytes = 0
        """Of bodies."""
        self.replies_bytes: Counter[bytes] = Counter()
        """By the network that is taking them."""

    @contextmanager
    def room_for(self, reply: HttpReply, network: bytes) -> Iterator[HttpReply]:
        """The reply, held until the client has taken it, or a refusal where clients hold too much already.

        One network may hold as much as is still free, so that one that takes nothing keeps no other out.
        """
        size_bytes = len(reply.body) if len(reply.body) > SMALL_REPLY_BYTES else 0
        all_bytes = self.replies_bytes.total()
        needed_bytes = all_bytes + self.replies_bytes[network] + size_bytes
        if size_bytes and all_bytes and needed_bytes > self.limits.replies_bytes:
            reply = reply_to(Rejected(Reason.OVERLOADED, "too many replies are being taken at once; retry"))
            size_bytes = 0
        self.replies_bytes[network] += size_bytes
        try:
            yield reply
        finally:
            self.replies_bytes[network] -= size_bytes
            if not self.replies_bytes[network]:
                del self.replies_bytes[network]


class HttpRequest:
    """One request. ``headers`` have lower-case names; ``path`` and ``query`` are as sent."""

    __slots__ = ("_connection", "headers", "method", "path", "query")

    def __init__(self, connection: "_Connection", event: h11.Request) -> None:
        self._connection = connection
        self.method = event.method.decode("ascii")
        target = event.target.decode("ascii")
        self.path, _, self.query = target.partition("?")
        self.headers: dict[str, str] = {}
        for name, value in event.headers:
            key = name.decode("ascii")
            if key in self.headers and key in ("authorization", "host", "origin"):
                raise Rejected(Reason.MALFORMED, f"header {key} stands twice")
            self.headers[key] = value.decode("latin-1")

    async def body(self, max_bytes: int) -> bytes:
        """The whole body; asked for once. It counts as held until the request is answered, or ``release_body``.

        Raises:
            Rejected: ``OVERSIZED`` as soon as it is known to be; ``MALFORMED`` framing; ``OVERLOADED`` when all
                clients together send too much at once.
            SlowClient: it did not arrive in time.
        """
        return await self._connection.read_body(self.headers.get("content-length"), max_bytes)

    def release_body(self) -> None:
        """Nothing holds the body any more, though the request is not answered yet."""
        self._connection.release_body()

    @property
    def network(self) -> bytes:
        """Where the client is (``places.py``)."""
        return self._connection.place.network

    async def next_turn(self, size_bytes: int = 0) -> None:
        """Wait for the turn of a slice of long work, of a few milliseconds. Before it all other tasks have had a turn
        since the last such slice, of whichever request; more of them where it is of many bytes and cannot be divided.
        """
        await self._connection.next_turn(size_bytes)

    def give_way(self) -> None:
        """The answer may be long in coming: from now on a newcomer may have this connection's place."""
        self._connection.give_way()

    def keep_place(self) -> bool:
        """From now on nobody may have this connection's place. False where a newcomer has it: who asked is cut off."""
        return self._connection.keep_place()


class AddressReport(Protocol):
    """A trio task status: told the address once it is listened on."""

    def started(self, value: Address, /) -> None:
        """Called once."""


Handler = Callable[[HttpRequest], Awaitable[HttpReply]]
"""Answers a request. What it raises becomes a reply; ``InvariantBroken`` is then raised on."""


async def serve_http(
    handler: Handler,
    address: Address,
    what: str,
    limits: HttpLimits | None = None,
    *,
    task_status: AddressReport = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on ``address`` and serve until cancelled; tells the address with the port it got.

    Raises:
        ConfigError: the address cannot be listened on; names it and ``what``, the configuration's key.
        InvariantBroken: what a handler found (within an exception group).
    """
    try:
        # Without SO_REUSEPORT, with which two nodes would silently share a port.
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"{what}: cannot listen on {address}: {error.strerror or error}") from error
    if address.port == 0:
        for surplus in listeners[1:]:  # of a name with several addresses: each would have a port of its own
            await surplus.aclose()
        listeners = listeners[:1]
    server = _Server(handler, limits or HttpLimits())

    async def serve_stream(stream: trio.SocketStream) -> None:
        async with stream:
            with server.places.take(stream) as place:
                if place is not None:
                    with place.scope:
                        await _Connection(server, stream, place).run()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve_stream, listeners)
        task_status.started(Address(address.host, listeners[0].socket.getsockname()[1]))


class _Connection:
    def __init__(self, server: _Server, stream: trio.SocketStream, place: Place) -> None:
        self._server = server
        self.place = place
        self._limits = server.limits
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=server.limits.head_bytes)
        self._body_bytes = 0
        self._body_pieces = 0
        self._is_between_chunks = False
        self._is_in_trailers = False

    async def run(self) -> None:
        """Serve requests until the client, a limit or an error ends the connection."""
        try:
            while True:
                try:
                    event = await self._next_request()
                except h11.RemoteProtocolError as error:
                    status = error.error_status_hint if error.error_status_hint >= 400 else 400
                    reason = Reason.OVERSIZED if status in (413, 431) else Reason.MALFORMED
                    await self._send("GET", error_reply(status, reason.value, str(error)))
                    await self._linger()
                    return
                if not isinstance(event, h11.Request):
                    return
                if event.http_version not in (b"1.0", b"1.1"):
                    refusal = error_reply(505, Reason.UNSUPPORTED_VERSION.value, "only HTTP/1.1 is spoken here")
                    await self._send("GET", refusal)
                    await self._linger()
                    return
                if _is_ambiguous(event):
                    why = "a body with both a transfer-encoding and a length, or of HTTP/1.0 with a transfer-encoding"
                    await self._send("GET", error_reply(400, Reason.MALFORMED.value, why, CLOSING))
                    await self._linger()
                    return
                self._is_between_chunks = any(name == b"transfer-encoding" for name, _ in event.headers)
                self._is_in_trailers = False
                self._server.places.serve(self.place)
                try:
                    await self._answer(event)
                finally:
                    self.give_way()
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    await self._linger()
                    return
                self._http.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, SlowClient):
            return
        except h11.LocalProtocolError as error:  # the client's bytes left h11 where no reply can be sent
            log.debug("connection ended: %s", error)

    async def _next_request(self) -> object:
        """A request, when its turn has come, or that there is none any more."""
        if self._needs_more():
            with trio.fail_after(self._limits.idle_seconds):
                await self._receive()
        if self._needs_more():
            with trio.fail_after(self._limits.head_seconds):
                while self._needs_more():
                    await self._receive()
        async with self._server.turn:
            await trio.lowlevel.checkpoint()
        return self._http.next_event()

    def _needs_more(self) -> bool:
        """Whether more is to be received before h11 can say what it is."""
        data, is_over = self._http.trailing_data
        return not (is_over or data[:1] in _NO_REQUEST or self._is_whole(data))

    def _is_whole(self, data: bytes) -> bool:
        """Whether a head, or the trailers of a body, are here to their end.

        Raises:
            h11.RemoteProtocolError: they have too many bytes or lines, whether they are whole or not.
        """
        found = _FIELDS_END.search(data, 0, self._limits.head_bytes)
        end = len(data) if found is None else found.end()
        if end > self._limits.head_bytes or data.count(b"\n", 0, end) > self._limits.head_lines:
            most = f"{self._limits.head_bytes} bytes and {self._limits.head_lines} lines"
            raise h11.RemoteProtocolError(f"header fields of more than {most}", error_status_hint=431)
        return found is not None

    async def _receive(self) -> None:
        self._http.receive_data(await self._stream.receive_some(RECEIVE_BYTES))

    async def read_body(self, content_length: str | None, max_bytes: int) -> bytes:
        """``HttpRequest.body``."""
        if content_length is not None and (len(content_length) > 18 or int(content_length) > max_bytes):
            raise Rejected(Reason.OVERSIZED, f"a body of {content_length[:20]} bytes, at most {max_bytes} allowed")
        body = bytearray()
        try:
            with trio.fail_after(self._limits.body_seconds):
                if self._http.they_are_waiting_for_100_continue:
                    await self._write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
                while not await self._take_body(body, max_bytes):
                    await self._receive()
            return bytes(body)
        except trio.TooSlowError:
            raise SlowClient(f"the body did not arrive in {self._limits.body_seconds:g} seconds") from None
        except h11.RemoteProtocolError as error:
            raise Rejected(Reason.MALFORMED, f"body: {error}") from error

    async def _take_body(self, body: bytearray, max_bytes: int) -> bool:
        """Add to ``body`` what has arrived; whether that was the end of it."""
        server = self._server
        while isinstance(event := self._body_event(), h11.Data):
            self._body_pieces += 1
            if self._body_pieces > MOST_SMALL_PIECES and len(body) < SMALL_PIECE_BYTES * self._body_pieces:
                raise Rejected(Reason.MALFORMED, f"a body in {self._body_pieces} chunks of next to nothing")
            if self._body_pieces % PIECES_A_TURN == 0:
                await trio.lowlevel.checkpoint()
            server.held_bytes += len(event.data)
            self._body_bytes += len(event.data)
            body += event.data
            if len(body) > max_bytes:
                raise Rejected(Reason.OVERSIZED, f"a body over {max_bytes} bytes")
            if server.held_bytes > self._limits.bodies_bytes:
                raise Rejected(Reason.OVERLOADED, "too many bodies are being sent at once; retry")
        return event is not h11.NEED_DATA

    def _body_event(self) -> object:
        """What h11 has of a body, unless that is trailers without end, which it takes apart like a head, or the line
        before a chunk without one.
        """
        if self._is_between_chunks:
            data, _ = self._http.trailing_data
            if self._is_in_trailers:
                self._is_whole(b"\n" + data)
            elif begins := _CHUNK_BEGINS.match(data, 0, CHUNK_HEAD_BYTES):
                self._is_between_chunks = self._is_in_trailers = not begins[1].strip(b"0")
                if self._is_in_trailers:
                    self._is_whole(data[begins.end() - 1 :])
            elif len(data) >= CHUNK_HEAD_BYTES:
                raise h11.RemoteProtocolError(f"no chunk begins in {CHUNK_HEAD_BYTES} bytes")
        event = self._http.next_event()
        if isinstance(event, h11.Data):
            self._is_between_chunks = event.chunk_end
        return event

    def release_body(self) -> None:
        """``HttpRequest.release_body``."""
        self._server.held_bytes -= self._body_bytes
        self._body_bytes = self._body_pieces = 0

    async def next_turn(self, size_bytes: int) -> None:
        """``HttpRequest.next_turn``."""
        turn = self._server.long_turn
        async with turn:  # which is a turn of all other tasks; one more for each slice, if it has company
            for _ in range(size_bytes // SLICE_BYTES + bool(turn.statistics().tasks_waiting)):
                await trio.lowlevel.checkpoint()

    def give_way(self) -> None:
        """``HttpRequest.give_way``."""
        self._server.places.wait(self.place)

    def keep_place(self) -> bool:
        """``HttpRequest.keep_place``."""
        self._server.places.serve(self.place)
        return self.place.is_held

    async def _answer(self, event: h11.Request) -> None:
        method = event.method.decode("ascii")
        try:
            reply = await self._server.handler(HttpRequest(self, event))
        except (Rejected, Unavailable, SlowClient) as error:
            reply = reply_to(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise
        except Exception as error:  # the border to clients: a fault of ours costs one reply
            if breaks_invariant(error):
                log.critical("a request met a broken invariant: the node stops")
                with suppress(Exception):  # whoever asked may be gone, and the node stops all the same
                    await self._send(method, error_reply(500, HttpFault.INTERNAL, "the node stops: see its log"))
                raise
            log.exception("request failed")
            reply = error_reply(500, HttpFault.INTERNAL, "see the node's log")
        finally:
            self.release_body()
        self.give_way()  # a client that takes nothing waits, like one that asks nothing
        with self._server.room_for(reply, self.place.network) as reply:
            await self._send(method, reply)

    async def _send(self, method: str, reply: HttpReply) -> None:
        headers = [
            ("content-type", reply.content_type),
            ("content-length", str(len(reply.body))),
            ("x-content-type-options", "nosniff"),
            *reply.headers,
        ]
        if not self._body_is_over() and CLOSING not in headers:
            headers.append(CLOSING)
        head = self._http.send(h11.Response(status_code=reply.status, headers=headers))
        body = b"" if method == "HEAD" else reply.body
        if len(body) <= SEND_BYTES:
            if body:
                head += self._http.send(h11.Data(data=body))
            await self._write(head + self._http.send(h11.EndOfMessage()))
            return
        await self._write(head)
        for start in range(0, len(body), SEND_BYTES):
            await self._write(self._http.send(h11.Data(data=body[start : start + SEND_BYTES])))
        await self._write(self._http.send(h11.EndOfMessage()))

    def _body_is_over(self) -> bool:
        """Whether nothing of the request is left unread."""
        if self._http.their_state is h11.SEND_BODY:
            try:
                self._body_event()
            except h11.RemoteProtocolError as error:
                log.debug("what is left of a body is malformed: %s", error)
        return self._http.their_state is h11.DONE

    async def _linger(self) -> None:
        """Take what the client still sends, for a moment: closing at once would reset the reply away."""
        with trio.move_on_after(self._limits.linger_seconds):
            await self._stream.send_eof()
            while await self._stream.receive_some(RECEIVE_BYTES):
                pass

    async def _write(self, chunk: bytes) -> None:
        with trio.fail_after(self._limits.send_seconds):
            await self._stream.send_all(chunk)


def _is_ambiguous(event: h11.Request) -> bool:
    """Whether a proxy may take another end of the body than we, and pass on what we would take for a request (RFC 9112
    §6.1).
    """
    names = {name for name, _ in event.headers}
    return b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1")
