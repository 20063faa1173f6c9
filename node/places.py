"""Places for connections of whoever reaches a port: bounded, and shared out by where they come from.

Who opens a connection is known later, or never. When all places are taken, a newcomer gets that of the connection which
has waited longest, of the network that holds most of those that wait. So one machine that opens connections without end
keeps out nobody but itself. A connection whose request is being worked on gives its place to nobody; one that waits for
its client, or for something to happen, does.

A network is an IPv4 address, or the first 64 bits of an IPv6 address.
"""

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

IPV6_NETWORK_BYTES = 8


@dataclass(slots=True, eq=False)
class Place:
    """One connection's place; ``is_held`` until a newcomer has it, or the connection has ended."""

    stream: trio.SocketStream
    network: bytes
    is_held: bool = True
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of all that is done for the connection: it ends when a newcomer has the place, or it would hold its memory."""


class Places:
    """So many connections at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._waiting: dict[bytes, dict[Place, None]] = {}
        """By network, who may have to go, the longest waiting first."""
        self.given_up = 0
        """How many connections were closed, or not taken, for want of a place."""

    @contextmanager
    def take(self, stream: trio.SocketStream) -> Iterator[Place | None]:
        """A place for a connection that waits; None if all that have one are being served."""
        if self._held >= self._most:
            self.given_up += 1
            if not self._take_back():
                yield None
                return
        place = Place(stream, _network_of(stream))
        self._held += 1
        self.wait(place)
        try:
            yield place
        finally:
            self.leave(place)

    def wait(self, place: Place) -> None:
        """The connection waits from now on: for its client, or for something to happen."""
        if place.is_held:
            self._waiting.setdefault(place.network, {})[place] = None

    def serve(self, place: Place) -> None:
        """The connection is served from now on."""
        waiting = self._waiting.get(place.network, {})
        waiting.pop(place, None)
        if not waiting:
            self._waiting.pop(place.network, None)

    def leave(self, place: Place) -> None:
        """The connection needs its place no more."""
        if place.is_held:
            self.serve(place)
            place.is_held = False
            self._held -= 1

    def _take_back(self) -> bool:
        crowd = max(self._waiting.values(), key=len, default=None)
        if crowd is None:
            return False
        place = next(iter(crowd))
        self.leave(place)
        place.stream.socket.close()
        place.scope.cancel()
        return True


def _network_of(stream: trio.SocketStream) -> bytes:
    try:
        address = ipaddress.ip_address(stream.socket.getpeername()[0].partition("%")[0])
    except (OSError, ValueError):
        return b""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else address
    return address.packed[:IPV6_NETWORK_BYTES] if mapped is None else mapped.packed
