"""Requests that wait for one worker thread: few of them, and not for clients that are gone."""

import functools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from api_fixtures import refusal, served, told

from node.config import Address
from node.errors_http import HttpReply
from node.http_server import HttpLimits, HttpRequest, serve_http
from node.one_thread import MOST_WAITING, OneThread

ASKED = b"GET /made HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
ALIVE = ASKED.replace(b"made", b"alive")


class Slow:
    """What a server makes in one thread, when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.made = 0
        self.waiting = 0
        self._thread = OneThread()

    def make(self) -> bytes:
        """Made."""
        assert self.may.wait(60)
        self.made += 1
        return b"made"

    async def handler(self, request: HttpRequest) -> HttpReply:
        """Answers ``/made`` in the thread, all else at once."""
        if request.path != "/made":
            return HttpReply(200, b"here")
        self.waiting += 1
        try:
            return HttpReply(200, await self._thread.run(request, self.make))
        finally:
            self.waiting -= 1

    async def wait_for(self, count: int) -> None:
        """Until so many wait."""
        with trio.fail_after(60):
            while self.waiting != count:
                await trio.sleep(0.01)


@asynccontextmanager
async def slow(limits: HttpLimits) -> AsyncIterator[tuple[Slow, Address]]:
    made = Slow()
    async with trio.open_nursery() as nursery:
        serve = functools.partial(serve_http, made.handler, Address("127.0.0.1", 0), "api.listen", limits)
        try:
            yield made, await nursery.start(serve)
        finally:
            made.may.set()
            nursery.cancel_scope.cancel()


async def ask(address: Address, asked: bytes = ASKED, network: str = "127.0.0.1") -> trio.SocketStream:
    stream = await trio.open_tcp_stream(address.host, address.port, local_address=network)
    await stream.send_all(asked)
    return stream


async def answer_of(stream: trio.SocketStream) -> bytes:
    """All that comes until the server closes."""
    with trio.fail_after(60):
        async with stream:
            return b"".join([chunk async for chunk in stream])


@pytest.mark.trio
async def test_no_more_wait_than_there_are_places_and_one_network_keeps_no_other_out() -> None:
    async with slow(HttpLimits(connections=2 * MOST_WAITING)) as (made, address):
        streams = [await ask(address) for _ in range(MOST_WAITING // 2)]
        await made.wait_for(MOST_WAITING // 2)
        for _ in range(3):
            refused = await answer_of(await ask(address))
            assert refused.startswith(b"HTTP/1.1 429 ")
            assert b"retry-after" in refused
        streams.append(await ask(address, network="127.0.0.2"))
        await made.wait_for(MOST_WAITING // 2 + 1)
        made.may.set()
        for stream in streams:
            assert (await answer_of(stream)).endswith(b"made")
        assert (await answer_of(await ask(address))).endswith(b"made"), "their places are free again"


@pytest.mark.trio
async def test_client_that_waits_gives_its_place_to_the_next_and_nothing_is_made_for_it() -> None:
    async with slow(HttpLimits(connections=4)) as (made, address):
        first = await ask(address)
        await made.wait_for(1)
        gone = [await ask(address) for _ in range(3)]
        await made.wait_for(4)
        for stream in gone:
            await stream.aclose()
        others = [await ask(address, ALIVE) for _ in range(3)]
        for stream in others:
            assert (await answer_of(stream)).endswith(b"here")
        made.may.set()
        assert (await answer_of(first)).endswith(b"made"), "what is being made keeps its place"
        await made.wait_for(0)
        assert made.made == 1


@pytest.mark.trio
async def test_bundles_and_custody_refuse_whom_they_have_no_place_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.one_thread.MOST_WAITING", 0)
    campaign, digest = told().run.id.hex(), "00" * 32
    async with served(tmp_path / "store", custody_bytes=1 << 20) as running:
        for method, path in (
            ("GET", "/v1/bundles/consistent?earlier=2"),
            ("GET", f"/v1/custody/{campaign}"),
            ("GET", f"/v1/custody/{campaign}/windows/{digest}"),
            ("PUT", f"/v1/custody/{campaign}/windows/{digest}"),
            ("GET", f"/v1/custody/{campaign}/blobs/{digest}"),
            ("PUT", f"/v1/custody/{campaign}/blobs/{digest}"),
        ):
            answer = await running.client.request(method, path, content=b"x" if method == "PUT" else None)
            assert refusal(answer) == (429, "overloaded")
