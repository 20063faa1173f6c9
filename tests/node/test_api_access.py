"""What the HTTP interface refuses: other spellings, other methods, large bodies, strangers."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from api_fixtures import TOKEN, ZEROS, Served, refusal, served
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.rejection import Reason, Rejected
from node import request_fields
from node.errors_http import HttpFault


@asynccontextmanager
async def at(tmp_path: Path, **options: object) -> AsyncIterator[Served]:
    async with served(tmp_path / "store", **options) as running:  # type: ignore[arg-type]
        yield running


# Strictness


@pytest.mark.trio
@pytest.mark.parametrize(
    "path",
    [
        f"/v1/events/{ZEROS}?wiat=1",
        f"/v1/events/{ZEROS}?wait=61",
        f"/v1/events/{ZEROS}?wait=-1",
        f"/v1/events/{ZEROS}?wait=1e1",
        f"/v1/events/{ZEROS}?wait=nan",
        f"/v1/events/{ZEROS}?wait=",
        f"/v1/events/{ZEROS}?wait=1&wait=1",
        f"/v1/events/{ZEROS}?wait",
        f"/v1/events/{ZEROS}?",
        "/v1/events?start=1_0",
        "/v1/events?start=+1",
        "/v1/events?start=%31",
        "/v1/events?start=01",
        "/v1/events?start=٣",
        "/v1/events?start=9007199254740992",
        "/v1/events?limit=0",
        "/v1/events?limit=1001",
        "/v1/events?kind=spoon",
        "/v1/events?campaign=ab",
        "/v1/events?&",
        f"/v1/events/{'AB' * 32}",
        f"/v1/events/{'ab' * 31}",
        f"/v1/events/{'ab' * 33}",
        f"/v1/events/{'zz' * 32}",
        f"/v1/receipts/{'0x' + 'ab' * 31}",
        f"/v1/campaigns/{'ab' * 31 + ' a'}",
        f"/v1/state/{ZEROS}",
        f"/v1/state/{'00' * 34}",
        f"/v1/state/{'00' * 33}?proof=0",
        f"/v1/state/{'00' * 33}?proof=true",
        "/v1/log/consistency?first=1",
        "/v1/log/consistency?first=2&second=1",
        "/v1/log/consistency?first=1&second=99999",
        "/v1/status?verbose=1",
        "/v1/grants/xyz",
    ],
)
async def test_misspelt_path_or_query_is_refused_by_name(tmp_path: Path, path: str) -> None:
    async with at(tmp_path) as running:
        if path.endswith("?"):  # an empty query is no query
            assert refusal(await running.client.get(path)) == (404, "not-found")
            return
        answer = await running.client.get(path)
        assert refusal(answer) == (400, "malformed")


@pytest.mark.trio
async def test_unknown_path_and_wrong_method_are_answered_in_json(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        for path in ("/", "/v1", "/v1/events/", "/v2/events", "/v1/events/a/b/c", "/V1/status", "//v1/status"):
            answer = await running.raw(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 404 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "not-found"
        wrong = await running.client.delete("/v1/events")
        assert refusal(wrong) == (405, HttpFault.METHOD_NOT_ALLOWED)
        assert wrong.headers["allow"] == "GET, POST"
        assert refusal(await running.client.put("/v1/status")) == (405, "method-not-allowed")
        head = await running.client.head("/v1/status")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 100


@pytest.mark.trio
async def test_body_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with at(tmp_path, max_body_bytes=1_000) as running:
        announced = await running.raw(
            b"POST /v1/events HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1001\r\n\r\n", seconds=1
        )
        assert announced.startswith(b"HTTP/1.1 413 ")
        assert b'"oversized"' in announced
        huge = await running.raw(
            b"POST /v1/events HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999999999999\r\n\r\n", seconds=1
        )
        assert huge.startswith(b"HTTP/1.1 413 ")

        async def stream() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield bytes(100)

        assert refusal(await running.client.post("/v1/events", content=stream())) == (413, "oversized")
        assert refusal(await running.client.post("/v1/events/batch", content=bytes(5_000))) == (413, "oversized")
        exactly = await running.client.post("/v1/events", content=bytes(1_000))
        assert refusal(exactly) == (400, "malformed")


# Who may ask


@pytest.mark.trio
@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        TOKEN,
    ],
)
async def test_request_without_one_of_the_tokens_is_unauthorized(tmp_path: Path, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    async with at(tmp_path, tokens=("another-token-of-this-node", TOKEN), headers=headers) as running:
        for path in ("/v1/status", "/v1/health", "/metrics", "/checkpoint", "/nowhere", "/v1/grants"):
            answer = await running.client.get(path)
            assert refusal(answer) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in answer.text
        posted = await running.client.post("/v1/events", content=b"x")
        assert refusal(posted) == (401, "unauthorized")


@pytest.mark.trio
async def test_token_opens_every_endpoint_whatever_the_host(tmp_path: Path) -> None:
    headers = {"authorization": f"bearer {TOKEN}", "host": "node.example"}
    async with at(tmp_path, tokens=(TOKEN,), headers=headers) as running:
        assert (await running.client.get("/v1/status")).status_code == 200


@pytest.mark.trio
@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"host": "evil.example"}, {"host": "evil.example:80"}, {"origin": "null"}],
)
async def test_foreign_web_page_cannot_use_a_loopback_node(tmp_path: Path, headers: dict[str, str]) -> None:
    async with at(tmp_path, headers=headers) as running:
        assert refusal(await running.client.post(f"/v1/grants/{ZEROS}/sign")) == (401, "unauthorized")
        assert refusal(await running.client.get("/v1/status")) == (401, "unauthorized")


@pytest.mark.trio
@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:9", "127.0.0.1", "[::1]:8080", "[::1]"])
async def test_loopback_by_any_name_is_served_without_tokens(tmp_path: Path, host: str) -> None:
    async with at(tmp_path, headers={"host": host}) as running:
        assert (await running.client.get("/v1/status")).status_code == 200


# Readers of paths and queries


def outcome(read: Callable[[], object]) -> object:
    """What was read, or the reason it was refused."""
    try:
        return read()
    except Rejected as error:
        return error.reason


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text("0123456789abcdef", max_size=20)))
def test_any_text_is_one_value_in_one_spelling_or_malformed(text: str) -> None:
    number = outcome(lambda: request_fields.whole_number("start", text))
    assert number is Reason.MALFORMED or str(number) == text
    found = outcome(lambda: request_fields.hex_bytes("id", text, max(1, len(text) // 2)))
    assert found is Reason.MALFORMED or (isinstance(found, bytes) and found.hex() == text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["wait", "kind", "x"]), st.text("a1.-%&=+ ", max_size=4)), max_size=4))
def test_query_is_read_whole_or_refused(pairs: list[tuple[str, str]]) -> None:
    query = "&".join(f"{name}={value}" for name, value in pairs)
    found = outcome(lambda: request_fields.read_query(query, ("wait", "kind")))
    assert found is Reason.MALFORMED or (found == dict(pairs) and len(dict(pairs)) == len(pairs))
