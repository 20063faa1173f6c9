"""Places of connections are shared out by where they come from."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from node.places import Places

pytestmark = pytest.mark.trio


class Door:
    """Holds every connection until it is closed from either side."""

    def __init__(self, most: int) -> None:
        self.places = Places(most)
        self.port = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with self.places.take(stream) as place:
                if place is not None:
                    try:
                        await stream.receive_some()
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        return

    async def come(self, address: str) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port, local_address=address)
        await trio.testing.wait_all_tasks_blocked(0.01)
        return stream


@asynccontextmanager
async def door(most: int) -> AsyncIterator[Door]:
    opened = Door(most)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    opened.port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, opened.serve, listeners)
        yield opened
        nursery.cancel_scope.cancel()


async def is_over(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(0.2):
        try:
            return await stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True
    return False


async def test_address_with_most_connections_makes_room_for_any_newcomer() -> None:
    async with door(4) as opened:
        honest = await opened.come("127.0.0.2")
        crowd = [await opened.come("127.0.0.3") for _ in range(10)]
        assert not await is_over(honest)
        assert [await is_over(one) for one in crowd] == [True] * 7 + [False] * 3
        late = await opened.come("127.0.0.4")
        assert await is_over(crowd[7])
        assert not await is_over(late)
        assert opened.places.given_up == 8
        for stream in (honest, late, *crowd):
            await stream.aclose()


async def test_connection_that_ends_leaves_its_place_to_the_next() -> None:
    async with door(1) as opened:
        for _ in range(5):
            stream = await opened.come("127.0.0.1")
            assert not await is_over(stream)
            await stream.aclose()
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert opened.places.given_up == 0
