"""What a client can do to the HTTP server before anyone asks who it is: nothing that outlives its connection."""

import functools
import json
import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import pairwise

import h11
import pytest
import trio

from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected, breaks_invariant
from node.config import Address
from node.errors_http import HttpReply, json_reply
from node.http_server import (
    CHUNK_HEAD_BYTES,
    MOST_SMALL_PIECES,
    PIECES_A_TURN,
    REQUESTS_A_TURN,
    SLICE_BYTES,
    Handler,
    HttpLimits,
    HttpRequest,
    serve_http,
)

LOOPBACK = Address("127.0.0.1", 0)
HEAD = b"host: localhost\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
ALIVE = b"GET /alive HTTP/1.1\r\n" + HEAD + b"connection: close\r\n\r\n"
SMALL = HttpLimits(connections=4, head_bytes=2_048, bodies_bytes=1_000, idle_seconds=0.6, linger_seconds=0.1)
BRISK = replace(SMALL, head_seconds=0.3, body_seconds=0.3, send_seconds=0.3)
"""For clients that are too slow; whoever is not would be cut off by it on a machine that stalls."""


async def echo(request: HttpRequest) -> HttpReply:
    """Says what it was asked, with a body of the length the query names."""
    if request.path == "/fault":
        raise KeyError("a fault of ours")
    if request.path == "/large":
        return HttpReply(200, bytes(32 << 20), "application/octet-stream")
    body = await request.body(1_000) if request.method == "POST" else b""
    return json_reply({"method": request.method, "path": request.path, "body": body.decode("latin-1")})


@asynccontextmanager
async def listening(limits: HttpLimits = SMALL, handler: Handler = echo) -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        address: Address = await nursery.start(functools.partial(serve_http, handler, LOOPBACK, "api.listen", limits))
        yield address
        nursery.cancel_scope.cancel()


async def exchange(address: Address, *parts: bytes, pause_seconds: float = 0.0, limit_seconds: float = 60.0) -> bytes:
    """Send the parts, as far as they are taken, then read until the server closes."""
    with trio.fail_after(limit_seconds):
        async with await trio.open_tcp_stream(address.host, address.port) as stream:
            with suppress(trio.BrokenResourceError):
                for part in parts:
                    await stream.send_all(part)
                    await trio.sleep(pause_seconds)
            return await rest_of(stream)


async def asking_to_continue(address: Address, head: bytes) -> trio.SocketStream:
    """A connection whose request's body the server waits for."""
    stream = await trio.open_tcp_stream(address.host, address.port)
    await stream.send_all(head)
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
    return stream


async def rest_of(stream: trio.SocketStream) -> bytes:
    """What is received until the server closes."""
    received = b""
    with suppress(trio.BrokenResourceError):
        async for chunk in stream:
            received += chunk
    return received


async def still_serves(address: Address) -> None:
    answer = await exchange(address, ALIVE)
    assert answer.startswith(b"HTTP/1.1 200 ")


def settings(frame: bytes) -> bytes:
    """An upgrade to HTTP/2 over clear text with these settings."""
    return (
        b"GET / HTTP/1.1\r\n"
        + HEAD
        + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: "
        + frame
        + b"\r\n\r\n"
    )


WEBSOCKET = (
    b"GET / HTTP/1.1\r\n" + HEAD + b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n"
)


@pytest.mark.trio
@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        pytest.param(200, settings(b"abcde"), id="h2c-padding"),
        pytest.param(200, settings(b"AAAA"), id="h2c-short"),
        pytest.param(200, settings(b"AAIAAABk"), id="h2c-setting"),
        pytest.param(200, WEBSOCKET + b"sec-websocket-extensions: \xff;;=\r\n\r\n", id="websocket-extensions"),
        pytest.param(200, WEBSOCKET + b"content-length: 5\r\n\r\nhello", id="websocket-body"),
        pytest.param(505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100, id="http2-preface"),
        pytest.param(400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="tls"),
        pytest.param(400, b"GET /\xff HTTP/1.1\r\n" + HEAD + b"\r\n", id="target-not-ascii"),
        pytest.param(400, b"GET / HTTP/1.1\r\n\r\n", id="no-host"),
        pytest.param(400, b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", id="two-hosts"),
        pytest.param(400, b"GET / HTTP/1.1\r\n" + HEAD + b"a b: c\r\n\r\n", id="header-name"),
        pytest.param(
            400, b"GET / HTTP/1.1\r\n" + HEAD + b"authorization: a\r\nauthorization: b\r\n\r\n", id="two-tokens"
        ),
        pytest.param(400, b"POST / HTTP/1.1\r\n" + HEAD + b"content-length: 1_0\r\n\r\n", id="length-underscore"),
        pytest.param(400, b"POST / HTTP/1.1\r\n" + HEAD + b"content-length: -1\r\n\r\n", id="length-negative"),
        pytest.param(
            400, b"POST / HTTP/1.1\r\n" + HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", id="two-lengths"
        ),
        pytest.param(400, b"POST / HTTP/1.1\r\n" + HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", id="chunk-size"),
        pytest.param(501, b"POST / HTTP/1.1\r\n" + HEAD + b"transfer-encoding: gzip\r\n\r\n", id="encoding"),
        pytest.param(431, b"GET / HTTP/1.1\r\n" + HEAD + b"a: " + b"b" * 5_000, id="head-too-long"),
        pytest.param(431, b"GET / HTTP/1.1\r\n" + HEAD + b"a: " + b"b" * 5_000 + b"\r\n\r\n", id="whole-head-too-long"),
        pytest.param(431, b"GET / HTTP/1.1\r\n" + HEAD + b"a:\r\n" * 98 + b"\r\n", id="head-of-101-lines"),
        pytest.param(431, b"GET / HTTP/1.1\n" + b"host: localhost\n" + b"a:\n" * 98 + b"\n", id="head-of-bare-lines"),
        pytest.param(431, b"GET / HTTP/1.1\n" + b"host: localhost\n" + b"a:\n" * 99, id="lines-without-end"),
        pytest.param(200, b"GET / HTTP/1.1\r\n" + HEAD + b"a:\r\n" * 97 + b"\r\n", id="head-of-100-lines"),
        pytest.param(
            400, b"POST / HTTP/1.1\r\n" + HEAD + CHUNKED + b"1\r\nx\r\n0\r\n" + b"a:\n" * 101, id="trailers-without-end"
        ),
        pytest.param(
            400, b"POST / HTTP/1.1\r\n" + HEAD + CHUNKED + b"0\r\n" + b"a:\r\n" * 101 + b"\r\n", id="trailers-too-many"
        ),
        pytest.param(
            200, b"POST / HTTP/1.1\r\n" + HEAD + CHUNKED + b"2\r\nab\r\n00;x\r\nb: c\r\n\r\n", id="chunks-and-a-trailer"
        ),
        pytest.param(
            200,
            b"POST / HTTP/1.1\r\n" + HEAD + CHUNKED + b"12e\r\n0\r\n" + b"\n" * 299 + b"\r\n0\r\n\r\n",
            id="chunk-of-lines",
        ),
        pytest.param(500, b"GET /fault HTTP/1.1\r\n" + HEAD + b"\r\n", id="handler-fault"),
    ],
)
async def test_malformed_bytes_cost_one_reply_and_nothing_else(
    status: int, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    async with listening() as address:
        answer = await exchange(address, request_bytes)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), answer
        assert b"Traceback" not in answer
        assert b"KeyError" not in answer
        if status != 200:
            assert set(json.loads(body)) == {"error", "detail"}
        await still_serves(address)


@pytest.mark.trio
@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\n" + HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + HEAD + b"transfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n",
        b"POST / HTTP/1.0\r\n" + HEAD + b"connection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n",
    ],
)
async def test_request_hidden_behind_a_body_of_two_lengths_is_not_answered(head: bytes) -> None:
    async with listening() as address:
        answer = await exchange(address, head + b"0\r\n\r\n" + b"GET /smuggled HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"smuggled" not in answer
        await still_serves(address)


@pytest.mark.trio
async def test_pipelined_requests_are_answered_in_order_on_one_connection() -> None:
    async with listening() as address:
        one = b"POST /%d HTTP/1.1\r\n" + HEAD + b"content-length: 2\r\n\r\n%02d"
        requests = b"".join(one % (number, number) for number in range(40))
        answer = await exchange(address, requests)
        assert [b'"path":"/%d","body":"%02d"' % (number, number) in answer for number in range(40)] == [True] * 40
        assert answer.count(b"HTTP/1.1 200 ") == 40


@pytest.mark.trio
async def test_lines_of_a_body_and_of_the_next_request_are_not_of_the_head_before_them() -> None:
    lines = replace(SMALL, head_lines=5)
    async with listening(lines) as address:
        body = b"\n" * 900
        post = b"POST / HTTP/1.1\r\n" + HEAD + b"content-length: 900\r\n\r\n" + body
        get = b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n"
        answer = await exchange(address, post + get * 20 + get[:-2] + b"a:\r\n" * 3 + b"\r\n" + get)
        assert answer.count(b"HTTP/1.1 200 ") == 21
        assert answer.count(b"HTTP/1.1 ") == 22
        assert b"HTTP/1.1 431 " in answer


@pytest.mark.trio
@pytest.mark.parametrize("step", [1, 2, 3, 7])
async def test_trailers_are_bounded_wherever_the_body_before_them_was_divided(step: int) -> None:
    lines = replace(SMALL, head_lines=10)
    for count, status in ((8, 200), (9, 400)):
        body = b"5\r\nhello\r\na\r\n0\r\n\r\n\n\n\n\n\n\r\n000\r\n" + b"a:\r\n" * count + b"\r\n"
        body = b"POST / HTTP/1.1\r\n" + HEAD + b"connection: close\r\n" + CHUNKED + body
        async with listening(lines) as address:
            parts = [body[start : start + step] for start in range(0, len(body), step)]
            answer = await exchange(address, *parts, pause_seconds=0.001)
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer


@pytest.mark.trio
async def test_trailers_of_a_request_that_is_refused_unread_are_not_taken_apart() -> None:
    async def refusing(request: HttpRequest) -> HttpReply:
        raise Rejected(Reason.NOT_FOUND, "whatever it is")

    async with listening(handler=refusing) as address:
        for count, closes in ((90, False), (101, True)):
            trailers = b"0\r\n" + b"a:\n" * count + b"\n"
            answer = await exchange(address, b"POST / HTTP/1.1\r\n" + HEAD + CHUNKED + trailers)
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert (b"connection: close" in answer) == closes


@pytest.mark.trio
@pytest.mark.parametrize(
    "begins",
    [
        pytest.param(b"1" * 65_000, id="digits-without-end"),
        pytest.param(b"1;" + b" " * 65_000 + b"\n\r\n", id="blanks"),
        pytest.param(b"5\r\nhello\r\n" + b"1" * 65_000, id="second-chunk"),
        pytest.param(b"5" + b";" * 256 + b"\r\nhello", id="a-byte-too-long"),
        pytest.param(b"5;" + b"\n" * 65_000 + b"\r\nhello", id="bare-lines"),
    ],
)
@pytest.mark.parametrize("is_read", [True, False])
async def test_what_begins_a_chunk_is_not_taken_apart_beyond_some_bytes(
    monkeypatch: pytest.MonkeyPatch, begins: bytes, is_read: bool
) -> None:
    async def refusing(request: HttpRequest) -> HttpReply:
        if request.path != "/alive":
            raise Rejected(Reason.NOT_FOUND, "whatever it is")
        return HttpReply(200, b"here")

    longest = 0
    parse = h11.Connection.next_event

    def measured(connection: h11.Connection) -> object:
        nonlocal longest
        line = bytes(connection.trailing_data[0]).lstrip(b"\r\n").partition(b"\r\n")[0]
        longest = max(longest, len(line) if connection.their_state is h11.SEND_BODY else 0)
        return parse(connection)

    monkeypatch.setattr(h11.Connection, "next_event", measured)
    request = b"POST / HTTP/1.1\r\n" + HEAD + CHUNKED + begins
    async with listening() if is_read else listening(handler=refusing) as address:
        answer = await exchange(address, request)
        assert answer.startswith(b"HTTP/1.1 400 " if is_read else b"HTTP/1.1 404 "), answer
        assert b"connection: close" in answer
        await still_serves(address)
    assert longest <= CHUNK_HEAD_BYTES


@pytest.mark.trio
@pytest.mark.parametrize("step", [1, 7, 300, 5_000])
async def test_chunk_whose_size_comes_alone_may_hold_anything(step: int) -> None:
    data = b"0" * 700 + b"\r\n" * 20 + b"1" * 260
    body = b"%x;a=b\r\n" % len(data)
    async with listening() as address:
        request = b"POST / HTTP/1.1\r\n" + HEAD + b"connection: close\r\n" + CHUNKED + body
        rest = data + b"\r\n0\r\n\r\n"
        answer = await exchange(
            address, request, *(rest[at : at + step] for at in range(0, len(rest), step)), pause_seconds=0.0005
        )
        assert answer.startswith(b"HTTP/1.1 200 "), answer


@pytest.mark.trio
async def test_connection_outlives_two_thousand_requests() -> None:
    patient = replace(SMALL, idle_seconds=60.0)
    async with listening(patient) as address, await trio.open_tcp_stream(address.host, address.port) as stream:
        for _ in range(2_000):
            await stream.send_all(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += await stream.receive_some()
            assert b"connection: close" not in answer


@pytest.mark.trio
async def test_expected_continue_is_sent_only_when_the_body_is_wanted() -> None:
    async with listening() as address:
        head = b"POST / HTTP/1.1\r\n" + HEAD + b"expect: 100-continue\r\nconnection: close\r\ncontent-length: "
        async with await asking_to_continue(address, head + b"5\r\n\r\n") as stream:
            await stream.send_all(b"hello")
            assert b'"body":"hello"' in await rest_of(stream)
        refused = await exchange(address, head + b"5000\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 413 ")


@pytest.mark.trio
async def test_client_that_dribbles_a_head_is_cut_off() -> None:
    async with listening(BRISK) as address:
        assert await exchange(address, b"GET / HT", *[b"T"] * 30, pause_seconds=0.05) == b""
        await still_serves(address)


@pytest.mark.trio
async def test_client_that_dribbles_a_body_is_answered_408() -> None:
    async with listening(BRISK) as address:
        head = b"POST / HTTP/1.1\r\n" + HEAD + b"content-length: 900\r\n\r\n"
        answer = await exchange(address, head, *[b"x"] * 8, pause_seconds=0.05)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"too-slow"' in answer
        await still_serves(address)


@pytest.mark.trio
async def test_silent_connection_is_closed() -> None:
    async with listening() as address:
        assert await exchange(address) == b""
        assert (await exchange(address, b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")).startswith(b"HTTP/1.1 200 ")


@pytest.mark.trio
async def test_client_that_does_not_read_a_large_reply_is_cut_off() -> None:
    async with listening(BRISK) as address, await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(b"GET /large HTTP/1.1\r\n" + HEAD + b"\r\n")
        await trio.sleep(1)
        received = 0
        with trio.fail_after(60):
            try:
                while chunk := await stream.receive_some(1 << 20):
                    received += len(chunk)
            except trio.BrokenResourceError:
                pass
        assert received < 32 << 20


@pytest.mark.trio
async def test_shutdown_does_not_wait_for_a_client_that_does_not_read() -> None:
    patient = HttpLimits(send_seconds=3_600)
    with trio.fail_after(60):
        async with listening(patient) as address:
            stream = await trio.open_tcp_stream(address.host, address.port)
            await stream.send_all(b"GET /large HTTP/1.1\r\n" + HEAD + b"\r\n")
            await trio.sleep(0.2)
        await stream.aclose()


@pytest.mark.trio
async def test_bodies_sent_at_once_are_bounded_together() -> None:
    async with listening() as address:
        head = b"POST / HTTP/1.1\r\n" + HEAD + b"connection: close\r\ncontent-length: 600\r\n"
        answers = []
        one_is_refused = trio.Event()

        async def end(stream: trio.SocketStream) -> None:
            await one_is_refused.wait()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(b"x" * 50)

        async def send() -> None:
            async with (
                await asking_to_continue(address, head + b"expect: 100-continue\r\n\r\n") as stream,
                trio.open_nursery() as own,
            ):
                await stream.send_all(b"x" * 550)
                own.start_soon(end, stream)
                answers.append(await rest_of(stream))
                one_is_refused.set()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(send)
        assert sorted(answer[:13] for answer in answers) == [b"HTTP/1.1 200 ", b"HTTP/1.1 429 "]
        await still_serves(address)


@pytest.mark.trio
async def test_body_counts_until_its_request_is_answered_or_nothing_holds_it() -> None:
    held, leave = trio.Event(), trio.Event()

    async def slow(request: HttpRequest) -> HttpReply:
        await request.body(1_000)
        if request.path == "/released":
            request.release_body()
        if request.path != "/quick":
            held.set()
            await leave.wait()
        return HttpReply(200, b"done")

    def post(path: str) -> bytes:
        return f"POST {path} HTTP/1.1\r\n".encode() + HEAD + b"connection: close\r\ncontent-length: 600\r\n\r\n"

    for path, meanwhile in (("/held", b"HTTP/1.1 429 "), ("/released", b"HTTP/1.1 200 ")):
        held, leave = trio.Event(), trio.Event()
        async with listening(handler=slow) as address, await trio.open_tcp_stream(*address_of(address)) as stream:
            await stream.send_all(post(path) + bytes(600))
            await held.wait()
            assert (await exchange(address, post("/quick"), bytes(600))).startswith(meanwhile)
            leave.set()
            assert (await rest_of(stream)).startswith(b"HTTP/1.1 200 ")
            assert (await exchange(address, post("/quick"), bytes(600))).startswith(b"HTTP/1.1 200 ")


def address_of(address: Address) -> tuple[str, int]:
    return address.host, address.port


@pytest.mark.trio
async def test_replies_that_are_not_taken_are_bounded_together_and_for_each_network() -> None:
    asked = b"GET /large HTTP/1.1\r\n" + HEAD + b"connection: close\r\n\r\n"
    roomy = replace(SMALL, replies_bytes=80 << 20)
    async with listening(roomy) as address:
        async with await trio.open_tcp_stream(address.host, address.port) as idle:
            await idle.send_all(asked)
            assert (await idle.receive_some(15)).startswith(b"HTTP/1.1 200 "), "the first is sent whatever its size"
            assert (await exchange(address, asked)).startswith(b"HTTP/1.1 429 ")
            await still_serves(address)
            async with await trio.open_tcp_stream(address.host, address.port, local_address="127.0.0.2") as other:
                await other.send_all(asked)
                assert (await other.receive_some(15)).startswith(b"HTTP/1.1 200 "), "of another network"
        answer = b""
        with trio.fail_after(60):
            while not answer.startswith(b"HTTP/1.1 200 "):
                answer = await exchange(address, asked)
        assert len(answer) > 32 << 20


@pytest.mark.trio
async def test_connection_over_the_limit_takes_the_place_of_the_one_idle_longest() -> None:
    async with listening(replace(SMALL, idle_seconds=60.0)) as address:
        streams = [await trio.open_tcp_stream(address.host, address.port) for _ in range(SMALL.connections)]
        await streams[0].send_all(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert (await streams[0].receive_some()).startswith(b"HTTP/1.1 200 ")
        assert (await exchange(address, ALIVE)).startswith(b"HTTP/1.1 200 ")
        assert await streams[1].receive_some() == b"", "it has waited longer than the one that was answered"
        await streams[0].send_all(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert (await streams[0].receive_some()).startswith(b"HTTP/1.1 200 ")
        for stream in streams:
            await stream.aclose()


@pytest.mark.trio
async def test_connection_that_is_being_answered_keeps_its_place() -> None:
    entered, leave = trio.Event(), trio.Event()

    async def slow(request: HttpRequest) -> HttpReply:
        entered.set()
        await leave.wait()
        return HttpReply(200, b"late")

    limits = replace(SMALL, connections=1)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, slow, Address("127.0.0.1", 0), "api.listen", limits)
        async with await trio.open_tcp_stream(address.host, address.port) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")
            await entered.wait()
            assert await exchange(address, b"") == b""
            leave.set()
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_client_that_does_not_take_its_reply_gives_its_place_to_the_next() -> None:
    limits = replace(SMALL, connections=1, idle_seconds=60.0)
    async with listening(limits) as address, await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(b"GET /large HTTP/1.1\r\n" + HEAD + b"\r\n")
        assert (await stream.receive_some(1_000)).startswith(b"HTTP/1.1 200 ")
        await still_serves(address)


@pytest.mark.trio
async def test_request_that_waits_for_something_to_happen_gives_its_place_to_the_next() -> None:
    entered, left = trio.Event(), trio.Event()

    async def waiting(request: HttpRequest) -> HttpReply:
        if request.path != "/alive":
            request.give_way()
            entered.set()
            try:
                await trio.sleep_forever()
            finally:
                left.set()
        return HttpReply(200, b"here")

    limits = replace(SMALL, connections=1)
    async with listening(limits, waiting) as address, await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n")
        await entered.wait()
        await still_serves(address)
        assert await stream.receive_some() == b""
        assert left.is_set(), "what nobody waits for holds no memory"


async def counting_turns(turns: list[int]) -> None:
    while True:
        turns[0] += 1
        await trio.lowlevel.checkpoint()


@pytest.mark.trio
async def test_few_requests_are_answered_between_two_turns_of_all_other_tasks_however_many_are_here() -> None:
    turns, answered_in = [0], []

    async def noting(request: HttpRequest) -> HttpReply:
        answered_in.append(turns[0])
        return HttpReply(200, b"")

    pipelined = (b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n") * 49 + ALIVE
    async with listening(replace(SMALL, connections=50), noting) as address, trio.open_nursery() as nursery:
        nursery.start_soon(counting_turns, turns)
        async with trio.open_nursery() as clients:
            for _ in range(50):
                clients.start_soon(exchange, address, pipelined)
        nursery.cancel_scope.cancel()
    assert len(answered_in) == 50 * 50
    assert max(Counter(answered_in).values()) <= REQUESTS_A_TURN


@pytest.mark.trio
async def test_long_work_is_done_a_slice_at_a_time_however_many_requests_are_of_it() -> None:
    turns, slices_in = [0], []

    async def long(request: HttpRequest) -> HttpReply:
        for _ in range(10):
            await request.next_turn()
            slices_in.append(turns[0])
        return HttpReply(200, b"")

    async with listening(replace(SMALL, connections=50), long) as address, trio.open_nursery() as nursery:
        nursery.start_soon(counting_turns, turns)
        async with trio.open_nursery() as clients:
            for _ in range(50):
                clients.start_soon(exchange, address, ALIVE)
        nursery.cancel_scope.cancel()
    assert len(slices_in) == 50 * 10
    assert max(Counter(slices_in).values()) <= 2, (
        "the turns are counted by a task that is first in one and last in another"
    )


@pytest.mark.trio
async def test_votes_have_as_many_turns_before_long_work_as_it_is_long() -> None:
    turns, slices_in = [0], [0]

    async def long(request: HttpRequest) -> HttpReply:
        await request.next_turn(20 * SLICE_BYTES)
        slices_in.append(turns[0])
        return HttpReply(200, b"")

    async with listening(replace(SMALL, connections=50), long) as address, trio.open_nursery() as nursery:
        nursery.start_soon(counting_turns, turns)
        async with trio.open_nursery() as clients:
            for _ in range(10):
                clients.start_soon(exchange, address, ALIVE)
        nursery.cancel_scope.cancel()
    assert len(slices_in) == 1 + 10
    assert min(later - before for before, later in pairwise(slices_in)) >= 20


@pytest.mark.trio
async def test_few_heads_are_taken_apart_between_two_turns_of_all_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, taken_apart_in = [0], []
    plain = h11.Connection.next_event

    def noting(connection: h11.Connection) -> object:
        event = plain(connection)
        if isinstance(event, h11.Request):
            taken_apart_in.append(turns[0])
        return event

    monkeypatch.setattr(h11.Connection, "next_event", noting)
    many = 5 * REQUESTS_A_TURN
    async with listening(replace(SMALL, connections=many)) as address, trio.open_nursery() as nursery:
        nursery.start_soon(counting_turns, turns)
        clients = [socket.create_connection(address_of(address)) for _ in range(many)]
        await trio.sleep(0.1)
        for client in clients:
            client.sendall(ALIVE)  # all of them before the server has a turn
        for client in clients:
            client.setblocking(False)
            async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
                assert (await rest_of(stream)).startswith(b"HTTP/1.1 200 ")
        nursery.cancel_scope.cancel()
    assert len(taken_apart_in) == many
    assert max(Counter(taken_apart_in).values()) <= REQUESTS_A_TURN


@pytest.mark.trio
async def test_body_of_small_chunks_is_taken_a_few_at_a_time_and_not_without_end() -> None:
    turns, taken_in = [0], []

    async def taking(request: HttpRequest) -> HttpReply:
        began = turns[0]
        try:
            return HttpReply(200, await request.body(100_000))
        finally:
            taken_in.append(turns[0] - began)

    def chunks(count: int) -> bytes:
        head = b"POST / HTTP/1.1\r\n" + HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        return head + b"1\r\nx\r\n" * count + b"0\r\n\r\n"

    limits = replace(SMALL, bodies_bytes=100_000)
    async with listening(limits, taking) as address, trio.open_nursery() as nursery:
        nursery.start_soon(counting_turns, turns)
        assert (await exchange(address, chunks(MOST_SMALL_PIECES))).endswith(b"x" * MOST_SMALL_PIECES)
        assert taken_in[0] >= MOST_SMALL_PIECES // PIECES_A_TURN // 2
        refused = await exchange(address, chunks(10 * MOST_SMALL_PIECES))
        assert refused.startswith(b"HTTP/1.1 400 ")
        assert b"chunks of next to nothing" in refused
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_port_in_use_is_a_configuration_error_that_names_address_and_key() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"api\.listen: cannot listen on {address}"):
            await serve_http(echo, address, "api.listen")


@pytest.mark.trio
async def test_address_that_does_not_exist_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"api\.listen: cannot listen on 192\.0\.2\.1:0"):
        await serve_http(echo, Address("192.0.2.1", 0), "api.listen")


@pytest.mark.trio
async def test_name_with_two_addresses_gets_one_port() -> None:
    async with trio.open_nursery() as nursery:
        start = functools.partial(serve_http, echo, Address("localhost", 0), "api.listen", SMALL)
        address: Address = await nursery.start(start)
        await still_serves(address)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize("in_a_task", [False, True])
async def test_broken_invariant_stops_the_node_whoever_asked_and_whichever_task_it_met(
    is_gone: bool, in_a_task: bool
) -> None:
    begun, go_on = trio.Event(), trio.Event()

    async def breaking() -> None:
        raise InvariantBroken("the ledger does not match its head")

    async def handler(request: HttpRequest) -> HttpReply:
        begun.set()
        await go_on.wait()
        if not in_a_task:
            await breaking()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(breaking)
        return json_reply({})

    async def ask() -> None:
        async with listening(handler=handler) as address, await trio.open_tcp_stream(*address_of(address)) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")
            await begun.wait()
            if is_gone:  # with a reset, so that no reply can be sent
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await stream.aclose()
                await trio.sleep(0.05)
            go_on.set()
            await trio.sleep(30)

    with pytest.raises(ExceptionGroup) as stopped:
        await ask()
    assert breaks_invariant(stopped.value)
