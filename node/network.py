"""The network of a node: authenticated frames and requests between the members of one chain, over libp2p.

Between every two members stand two libp2p connections (``transport.py``), each with one stream:

- *urgent* (``/countersign/1/CHAIN/votes``) carries the ``VOTES`` lane;
- *bulk* (``/countersign/1/CHAIN/bulk``) carries the ``EVENTS`` lane, requests and responses.

They are two because libp2p's write lock and the kernel's buffers would put votes behind bulk. The chain id in
the protocol's name keeps nodes of different chains apart. Rules:

1. Of every two members the one with the lower peer id dials. A peer is admitted only if it is on the roster
   *and* the one to dial us. A new connection replaces the older one of its kind.
   Connections that are not authenticated yet are bounded, those of one address by themselves (``places.py``).
2. A member that breaks the protocol of ``link.py`` (a frame over the cap, of an unknown kind, on the wrong
   connection, flow control ignored) loses both connections and is not admitted for ``penalty_seconds``.
3. Readers always drain. What is received and not yet processed is bounded per member and lane; a member that
   exceeds its budget is treated as in rule 2. So whoever owns ``incoming`` must keep up, or drop by itself.
4. What the owner of ``incoming`` finds that no honest member sends (``complain``: a signature that does not verify,
   bytes that do not decode) was checked at our cost. A member may cause ``max_complaints`` of them, and
   ``complaints_forgiven_per_second`` more as time goes by; beyond that, rule 2, and what waits of it is forgotten.
5. Sending never blocks: bounded outboxes (``lanes.py``) wait for one writing task per connection. A request that was
   sent counts against ``max_outstanding_requests`` until it is answered: the member serves it all the same.
6. Each side of a connection writes at least every ``heartbeat_seconds``; a connection on which nothing came for
   ``silence_seconds`` is closed. The dialler redials after 0.1 s, doubling up to 5 s.
7. Whatever libp2p or a request handler raises ends at most one connection or request. Only our own broken
   promises (``InvariantBroken``, raised by a request handler) end the node.

Frames are not acknowledged. On one lane they arrive in order; those in flight when its connection breaks are
lost. The protocol above rebroadcasts, and fetches what it misses. Meaning and signatures of frames are left to
the replica. ``change_roster`` ends the connections of whoever left and begins those of whoever joined.

A *former* member may not know that it is one. Connections to it are kept like all others, so that its requests are
answered (what it may have is left to the request handler); ``broadcast`` passes it over, and it is not ``connected``.
"""

import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import trio

from consensus.identifiers import MemberId
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected, Unavailable, breaks_invariant
from node.lanes import Inbox, Lane, Outbox, Received
from node.link import Link, LinkKind, Misbehaved, NetworkCounters, NetworkLimits, Refused
from node.places import Places
from node.transport import (
    Connection,
    HandshakeFailed,
    Identity,
    RosterNoise,
    StrangerRefused,
    connect,
    peer_id_of,
)

__all__ = ["Lane", "Network", "NetworkCounters", "NetworkLimits", "Peer", "Received", "RequestHandler"]

log = logging.getLogger(__name__)

_NEVER_HONEST = frozenset(
    {
        Reason.MALFORMED,
        Reason.NON_CANONICAL,
        Reason.OVERSIZED,
        Reason.UNSUPPORTED_VERSION,
        Reason.WRONG_CHAIN,
        Reason.BAD_KEY,
        Reason.BAD_SIGNATURE,
        Reason.PORTION_MISMATCH,
        Reason.BAD_CERTIFICATE,
    }
)
"""Reasons that no change of members or state explains: every member checks these before it sends anything on."""

RequestHandler = Callable[[MemberId, bytes], Awaitable[bytes]]
"""Answers a member's request. Whatever it raises becomes a refusal; only ``InvariantBroken`` ends the node."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another member: who it is, the Ed25519 public key (32 bytes) of its connections, and ``host:port``."""

    member: MemberId
    transport_key: bytes
    address: str


@dataclass(slots=True, eq=False)
class _Member:
    """All we hold of another member."""

    peer: Peer
    peer_id_bytes: bytes
    is_former: bool
    outboxes: dict[LinkKind, Outbox]
    links: dict[LinkKind, Link] = field(default_factory=dict)
    links_ever: int = 0
    admitted_from_time: float = float("-inf")
    complaints: float = 0.0
    complained_at_time: float = 0.0
    dialling: dict[LinkKind, trio.CancelScope] = field(default_factory=dict)


class Network:
    """A node's connections to the other members of its chain. Used by one trio run, opened once."""

    def __init__(
        self,
        transport_seed: bytes,
        listen: str,
        peers: Sequence[Peer],
        *,
        protocol_suffix: str,
        limits: NetworkLimits | None = None,
    ) -> None:
        """``transport_seed``: 32 secret bytes. ``listen``: ``host:port``; port 0 takes a free one.

        Raises ``ConfigError`` for an address or key that cannot be, or a member or key that is listed twice.
        """
        self.limits = limits or NetworkLimits()
        self.counters = NetworkCounters()
        self._identity = Identity.from_seed(transport_seed)
        self._own_id_bytes: bytes = self._identity.peer_id.to_bytes()
        self._listen_host, self._listen_port = split_address(listen, "listen")
        self._listen = listen
        self._protocols = {f"/countersign/1/{protocol_suffix}/{kind}": kind for kind in LinkKind}
        self._protocol_of = {kind: protocol for protocol, kind in self._protocols.items()}
        self._members: dict[MemberId, _Member] = {}
        self._by_peer_id: dict[bytes, _Member] = {}
        for peer in peers:
            self._add_member(peer)
        self.incoming = Inbox(
            self._members,
            {Lane.VOTES: self.limits.votes_inbox_bytes, Lane.EVENTS: self.limits.events_inbox_bytes},
        )
        self._request_handler: RequestHandler = _serve_nothing
        self._handshakes = Places(self.limits.max_handshakes)
        self._nursery: trio.Nursery | None = None
        self._addresses: list[tuple[str, int]] = []

    @property
    def connected(self) -> frozenset[MemberId]:
        """The members to which both connections stand; no former ones."""
        return frozenset(
            member
            for member, state in self._members.items()
            if len(state.links) == len(LinkKind) and not state.is_former
        )

    @property
    def peer_count(self) -> int:
        """How many other members there are, connected or not; no former ones."""
        return sum(not state.is_former for state in self._members.values())

    def in_own_order(self, members: Iterable[MemberId]) -> list[MemberId]:
        """Members in an order that stays, and differs from node to node: not all ask the same one first."""
        return sorted(members, key=lambda member: hashlib.sha256(self._own_id_bytes + member).digest())

    @property
    def listen_port(self) -> int:
        """The port we listen on, known once open."""
        return self._addresses[0][1]

    @property
    def peer_id(self) -> str:
        """Our libp2p peer id, as others write it."""
        return str(self._identity.peer_id)

    @asynccontextmanager
    async def open(self, request_handler: RequestHandler | None = None) -> AsyncIterator["Network"]:
        """Listen, dial and serve until the context is left; then every connection and the port are closed.

        Raises ``ConfigError`` naming the address if it cannot be listened on.
        """
        if self._nursery is not None:
            raise InvariantBroken("a network is opened once")
        self._request_handler = request_handler or _serve_nothing
        listeners = await self._open_listeners()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(trio.serve_listeners, self._accept, listeners)
                for member in self._members.values():
                    self._begin_dialling(member)
                yield self
                nursery.cancel_scope.cancel()
        finally:
            for listener in listeners:
                listener.socket.close()
            self.incoming.close()

    def change_roster(self, transport_seed: bytes, peers: Sequence[Peer], former: Sequence[Peer] = ()) -> None:
        """Talk to these members from now on, with this transport key; connections that need not change stay.

        ``former`` are members that left, whose requests are answered.

        Raises ``ConfigError`` like the constructor.
        """
        identity = Identity.from_seed(transport_seed)
        wanted = {peer.member: (peer, False) for peer in peers} | {peer.member: (peer, True) for peer in former}
        is_new = identity.peer_id.to_bytes() != self._own_id_bytes
        for member, state in list(self._members.items()):
            if is_new or wanted.get(member) != (state.peer, state.is_former):
                del self._members[member], self._by_peer_id[state.peer_id_bytes]
                for attempt in state.dialling.values():
                    attempt.cancel()
                for link in state.links.values():
                    link.abort()
                self.incoming.forget(member)
        self._identity, self._own_id_bytes = identity, identity.peer_id.to_bytes()
        for peer, is_former in wanted.values():
            if peer.member not in self._members:
                self._add_member(peer, is_former)
                self.incoming.expect(peer.member)
                self._begin_dialling(self._members[peer.member])

    def send(self, member: MemberId, lane: Lane, frame: bytes) -> None:
        """Queue ``frame`` for ``member``; never blocks. Whether it arrives is not told; drops are counted.

        Raises ``InvariantBroken`` if ``member`` is not a peer or the frame is over the cap.
        """
        state = self._members.get(member)
        if state is None:
            raise InvariantBroken(f"no peer is member {member.hex()}")
        self._queue(state, lane, frame)

    def broadcast(self, lane: Lane, frame: bytes) -> None:
        """``send`` to every peer that is no former member."""
        for state in self._members.values():
            if not state.is_former:
                self._queue(state, lane, frame)

    def complain(self, member: MemberId, why: Rejected) -> None:
        """Rule 4: ``member`` sent what no honest one does; nothing happens for a reason that may be anybody's."""
        state = self._members.get(member)
        if state is None or why.reason not in _NEVER_HONEST:
            return
        now = trio.current_time()
        forgiven = (now - state.complained_at_time) * self.limits.complaints_forgiven_per_second
        state.complaints = max(0.0, state.complaints - forgiven) + 1
        state.complained_at_time = now
        if state.complaints > self.limits.max_complaints:
            self.incoming.forget(member)
            self._punish(state, Misbehaved("closed_bad_content", str(why)))

    async def request(self, member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
        """Ask ``member`` and return its response.

        Raises ``Unavailable`` if none comes, for whatever reason (``Refused`` for the member's own), and
        ``InvariantBroken`` like ``send``.
        """
        state = self._members.get(member)
        if state is None or len(payload) > self.limits.max_request_bytes:
            raise InvariantBroken(f"request of {len(payload)} bytes to {member.hex()}: no peer, or too large")
        link = state.links.get(LinkKind.BULK)
        self.counters.requests_sent += 1
        try:
            if link is None:
                raise Unavailable("not connected")
            return await link.request(payload, timeout_seconds)
        except Unavailable as error:
            self.counters.requests_failed += 1
            asked = f"request to {member.hex()}: "
            if isinstance(error, Refused):
                raise Refused(error.why, asked) from None
            raise Unavailable(f"{asked}{error}") from None

    def _add_member(self, peer: Peer, is_former: bool = False) -> None:
        if len(peer.transport_key) != 32:
            raise ConfigError(f"transport key of {peer.member.hex()}: 32 bytes expected")
        split_address(peer.address, f"address of {peer.member.hex()}")
        peer_id_bytes: bytes = peer_id_of(peer.transport_key).to_bytes()
        if peer_id_bytes == self._own_id_bytes:
            raise ConfigError(f"peer {peer.member.hex()} has our own transport key")
        if peer.member in self._members or peer_id_bytes in self._by_peer_id:
            raise ConfigError(f"peer {peer.member.hex()}: member or transport key is listed twice")
        outboxes = {
            LinkKind.URGENT: Outbox(Lane.VOTES, self.limits.votes_outbox_bytes),
            LinkKind.BULK: Outbox(Lane.EVENTS, self.limits.events_outbox_bytes),
        }
        state = _Member(peer, peer_id_bytes, is_former, outboxes)
        self._members[peer.member] = self._by_peer_id[peer_id_bytes] = state

    def _queue(self, state: _Member, lane: Lane, frame: bytes) -> None:
        if len(frame) > self.limits.max_frame_bytes:
            raise InvariantBroken(f"frame of {len(frame)} bytes, at most {self.limits.max_frame_bytes}")
        kind = LinkKind.URGENT if lane is Lane.VOTES else LinkKind.BULK
        if lane is Lane.EVENTS and kind not in state.links:
            # Whoever is away catches up from ledger blocks; a backlog for it would only hold memory.
            self.counters.events_dropped += 1
            return
        dropped = state.outboxes[kind].put(frame, trio.current_time())
        if lane is Lane.VOTES:
            self.counters.votes_dropped += dropped
        else:
            self.counters.events_dropped += dropped
        link = state.links.get(kind)
        if link is not None:
            link.wake()

    async def _open_listeners(self) -> list[trio.SocketListener]:
        """Listen without SO_REUSEPORT, with which two nodes would silently share a port."""
        try:
            listeners = await trio.open_tcp_listeners(self._listen_port, host=self._listen_host)
        except OSError as error:
            raise ConfigError(f"network.listen: cannot listen on {self._listen}: {error}") from error
        self._addresses = [listener.socket.getsockname()[:2] for listener in listeners]
        return list(listeners)

    async def _accept(self, stream: trio.SocketStream) -> None:
        """Serve one inbound TCP connection to its end."""
        noise = RosterNoise(self._identity, self._may_dial_us)
        with self._handshakes.take(stream) as place:
            if place is None:
                return
            try:
                async with self._connect(stream, noise, None, list(self._protocols)) as connection:
                    self._handshakes.leave(place)
                    state = self._by_peer_id.get(connection.peer_id.to_bytes())
                    if state is None or not self._may_dial_us(connection.peer_id):
                        # Expected while it was greeted, and no more. Raised here it would come out wrapped.
                        self.counters.refused_strangers += 1
                        return
                    await self._run_link(state, self._protocols[connection.protocol], connection)
            except StrangerRefused as error:
                self.counters.refused_strangers += 1
                log.debug("stranger refused: %s", error)
            except HandshakeFailed as error:
                if place.is_held:
                    self.counters.refused_handshakes += 1
                else:
                    self.counters.refused_overload += 1
                log.debug("inbound handshake failed: %s", error)
            except Exception:  # the border to libp2p
                log.warning("inbound connection failed", exc_info=True)

    def _may_dial_us(self, peer_id: object) -> bool:
        """Rule 1, and the penalty of rule 2."""
        state = self._by_peer_id.get(peer_id.to_bytes())  # type: ignore[attr-defined]
        return (
            state is not None
            and state.peer_id_bytes < self._own_id_bytes
            and trio.current_time() >= state.admitted_from_time
        )

    def _begin_dialling(self, state: _Member) -> None:
        """Rule 1."""
        if self._nursery is not None and self._own_id_bytes < state.peer_id_bytes:
            for kind in LinkKind:
                self._nursery.start_soon(self._keep_dialling, state, kind)

    async def _keep_dialling(self, state: _Member, kind: LinkKind) -> None:
        """Keep one of the connections to a member standing."""
        delay_seconds = self.limits.redial_first_seconds
        while state is self._members.get(state.peer.member):
            with trio.CancelScope() as attempt:
                state.dialling[kind] = attempt
                start_time = trio.current_time()
                if await self._dial(state, kind) and trio.current_time() > start_time + delay_seconds:
                    delay_seconds = self.limits.redial_first_seconds
                await trio.sleep(delay_seconds)
                while trio.current_time() < state.admitted_from_time:  # also of a penalty that begins meanwhile
                    await trio.sleep_until(state.admitted_from_time)
                delay_seconds = min(2 * delay_seconds, self.limits.redial_last_seconds)

    async def _dial(self, state: _Member, kind: LinkKind) -> bool:
        """Dial once and serve the connection to its end; return whether it came to be."""
        host, port = split_address(state.peer.address, "address")
        peer_id = peer_id_of(state.peer.transport_key)
        noise = RosterNoise(self._identity, lambda remote: bool(remote == peer_id))
        established = False
        try:
            with trio.fail_after(self.limits.handshake_seconds):
                stream = await trio.open_tcp_stream(host, port)
            async with self._connect(stream, noise, peer_id, [self._protocol_of[kind]]) as connection:
                if trio.current_time() < state.admitted_from_time:
                    return False  # its other connection was ended for its fault while this one was made
                established = True
                await self._run_link(state, kind, connection)
        except (HandshakeFailed, StrangerRefused, OSError, trio.TooSlowError) as error:
            self.counters.dials_failed += 1
            log.debug("dialling %s (%s) failed: %s", state.peer.member.hex(), state.peer.address, error)
        except Exception:  # the border to libp2p
            log.warning("connection to %s failed", state.peer.member.hex(), exc_info=True)
        return established

    def _connect(
        self, stream: trio.SocketStream, noise: RosterNoise, peer_id: object, protocols: Sequence[str]
    ) -> AbstractAsyncContextManager[Connection]:
        return connect(
            stream,
            noise,
            peer_id,
            protocols,
            window_bytes=self.limits.window_bytes,
            handshake_seconds=self.limits.handshake_seconds,
        )

    async def _run_link(self, state: _Member, kind: LinkKind, connection: Connection) -> None:
        """Serve a connection to a member until it ends; it replaces the older one of its kind."""
        older = state.links.get(kind)
        if older is not None:
            older.abort()
        outbox = state.outboxes[kind]
        self.counters.stale_dropped += outbox.drop_before(trio.current_time() - self.limits.stale_seconds)
        link = Link(
            member=state.peer.member,
            kind=kind,
            connection=connection,
            outbox=outbox,
            inbox=self.incoming,
            serve=self._serve,
            limits=self.limits,
            counters=self.counters,
        )
        state.links[kind] = link
        self.counters.connections += 1
        if state.links_ever >= len(LinkKind):
            self.counters.reconnects += 1
        state.links_ever += 1
        log.info("connected to %s (%s)", state.peer.member.hex(), kind)
        try:
            await link.run()
        except Misbehaved as error:
            self._punish(state, error)
        finally:
            if state.links.get(kind) is link:
                del state.links[kind]
            if connection.window_exceeded:
                self._punish(state, Misbehaved("closed_over_budget", "flow control ignored"))
            log.info("disconnected from %s (%s)", state.peer.member.hex(), kind)

    def _punish(self, state: _Member, error: Misbehaved) -> None:
        """Rule 2: close what stands to the member, and refuse it for a while."""
        setattr(self.counters, error.counter, getattr(self.counters, error.counter) + 1)
        log.warning("%s misbehaved (%s): %s", state.peer.member.hex(), error.counter, error)
        state.admitted_from_time = trio.current_time() + self.limits.penalty_seconds
        for link in state.links.values():
            link.abort()

    def _serve(self, link: Link, number: int, payload: bytes) -> None:
        """Answer a request in a task of its own, outside its link, so that our own errors reach the node."""
        if self._nursery is None:
            raise InvariantBroken("a request before the network is open")
        if link.requests_in_service < self.limits.max_requests_in_service:
            link.requests_in_service += 1
            self._nursery.start_soon(self._answer, link, number, payload)
        elif link.refusals_in_flight < self.limits.max_outstanding_requests:
            link.refusals_in_flight += 1
            self._nursery.start_soon(self._refuse, link, number, Reason.OVERLOADED)
        else:
            raise Misbehaved("closed_over_budget", "requests without end")

    async def _answer(self, link: Link, number: int, payload: bytes) -> None:
        try:
            with trio.fail_after(self.limits.request_service_seconds):
                response = await self._request_handler(link.member, payload)
            if len(response) > self.limits.max_frame_bytes:
                raise Rejected(Reason.OVERSIZED, f"response of {len(response)} bytes")
            await link.respond(number, response)
            self.counters.requests_served += 1
        except Exception as error:  # what a handler raises ends neither the link nor the node
            if breaks_invariant(error):
                raise
            if not isinstance(error, Rejected | Unavailable):
                log.warning("request of %s failed", link.member.hex(), exc_info=True)
            link.refusals_in_flight += 1
            await self._refuse(link, number, error.reason if isinstance(error, Rejected) else type(error).__name__)
        finally:
            link.requests_in_service -= 1

    async def _refuse(self, link: Link, number: int, why: str) -> None:
        self.counters.requests_refused += 1
        await link.refuse(number, why)
        link.refusals_in_flight -= 1


def split_address(address: str, what: str) -> tuple[str, int]:
    """``host:port`` or ``[IPv6]:port``. Raises ``ConfigError`` naming ``what``."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ConfigError(f"{what}: expected host:port, found {address!r}")
    return host, int(port)


async def _serve_nothing(member: MemberId, payload: bytes) -> bytes:
    raise Unavailable(f"no request is served here: {len(payload)} bytes from {member.hex()}")
