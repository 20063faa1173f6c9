"""The clients against a real HTTP server: typed answers, retries that stop at a named rejection."""

import gzip
import json
import socket
import time
from collections.abc import Iterator

import pytest
from fake_node import FakeNode, endless_node, running_node

from consensus.event import Kind
from consensus.identifiers import ChainId
from consensus.keys import Ed25519SigningKey
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state import SOURCE_TABLE, SourceRecord
from trainer_client import calls
from trainer_client.calls import Pause, Reply, Retries, UnexpectedAnswer
from trainer_client.submit import AsyncClient, Client

QUICK = Retries(attempts=3, first_seconds=0.01, longest_seconds=0.02)


@pytest.fixture
def node() -> Iterator[FakeNode]:
    with running_node() as running:
        yield running


@pytest.fixture
def client(node: FakeNode) -> Iterator[Client]:
    with Client(node.url, retries=QUICK) as made:
        yield made


def wire_form(node: FakeNode, event: bytes) -> bytes:
    """The bytes of an event that the ledger of ``node`` holds."""
    return node.answer("GET", f"/v1/events/{event.hex()}/raw", b"")[1]


def test_submit_status_and_raw_agree(node: FakeNode, client: Client) -> None:
    event = node.policy()
    submitted = client.submit(wire_form(node, event))
    assert (submitted.id, submitted.status) == (event.hex(), "final")
    assert client.status(event).index == 0
    assert client.raw_event(event) == wire_form(node, event)
    assert client.wait_final(event, limit_seconds=1).status == "final"
    assert client.receipt(event) == b"receipt of " + event.hex().encode()


def test_batch_answers_each_event_in_order_and_a_rejection_does_not_raise(node: FakeNode, client: Client) -> None:
    source = wire_form(node, node.source("a", [b"x"]))
    with running_node() as other, Client(other.url, retries=QUICK) as second:
        other.policy()
        other.refuse_step = lambda event: (
            Rejected(Reason.UNKNOWN_MEMBER, "not you") if event.entry.kind is Kind.POLICY else None
        )
        answers = second.submit_batch([source, wire_form(node, node.policy(name="other")), source])
    assert [answer.status for answer in answers] == ["final", "rejected", "final"]
    assert (answers[1].error, answers[1].rejection.reason) == ("unknown-member", Reason.UNKNOWN_MEMBER)


def test_policy_sources_and_state_are_decoded(node: FakeNode, client: Client) -> None:
    with pytest.raises(Rejected) as none_yet:
        client.policy_in_force()
    assert none_yet.value.reason is Reason.UNKNOWN_POLICY
    policy, source = node.policy(), node.source("a", [b"x", b"y"])
    in_force = client.policy_in_force()
    assert (in_force.id, in_force.policy.name) == (policy, "test policy")
    (listed,) = client.sources()
    assert (listed.id, listed.content_class, listed.author_name) == (source.hex(), "documentation", "data-source-1")
    assert client.source_record(source).claim.example_count == 2
    assert client.state_record(SOURCE_TABLE + bytes(32), SourceRecord) is None
    with pytest.raises(Rejected) as unknown:
        client.source_record(bytes(32))
    assert unknown.value.reason is Reason.UNKNOWN_SOURCE


def test_genesis_of_another_chain_is_refused(node: FakeNode, client: Client) -> None:
    assert client.genesis(node.chain_id).chain_id == node.chain_id
    with pytest.raises(Rejected) as other:
        client.genesis(ChainId(bytes(32)))
    assert other.value.reason is Reason.WRONG_CHAIN
    assert client.checkpoint().startswith("countersign.example/test\n")


def test_named_rejection_is_raised_and_never_tried_again(node: FakeNode, client: Client) -> None:
    node.answers = [(409, {}, b'{"error": "outside-grant", "detail": "step 9"}')]
    with pytest.raises(Rejected, match="step 9") as refusal:
        client.submit(b"event")
    assert refusal.value.reason is Reason.OUTSIDE_GRANT
    assert len(node.requests) == 1


def test_busy_node_is_asked_again_after_the_time_it_names(node: FakeNode, client: Client) -> None:
    node.answers = [(429, {"Retry-After": "1"}, b'{"error": "overloaded"}'), (503, {}, b"")]
    started = time.monotonic()
    assert client.checkpoint()
    assert time.monotonic() - started >= 1.0
    assert len(node.requests) == 3


@pytest.mark.parametrize(
    ("wish", "seconds"),
    [("7", 7.0), ("3600", 60.0), ("31536000000", 60.0), ("9" * 400, 60.0), ("x", 0.01), ("", 0.01)],
)
def test_wish_for_a_pause_is_granted_up_to_a_minute(wish: str, seconds: float) -> None:
    call = calls.checkpoint(QUICK)
    next(call)
    assert call.send(Reply(503, b"", wish)) == Pause(seconds)


def test_node_that_stays_busy_is_unavailable(node: FakeNode, client: Client) -> None:
    node.answers = [(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"")] * 5
    with pytest.raises(Unavailable, match="HTTP 503 after 3 attempts"):
        client.checkpoint()
    assert len(node.requests) == 3


@pytest.mark.parametrize(("status", "error"), [(408, "too-slow"), (500, "internal"), (502, "x"), (503, "unavailable")])
def test_passing_trouble_of_the_node_is_tried_again_and_told_in_its_words(
    node: FakeNode, client: Client, status: int, error: str
) -> None:
    trouble: tuple[int, dict[str, str], bytes] = (
        status,
        {},
        json.dumps({"error": error, "detail": "see its log"}).encode(),
    )
    node.answers = [trouble]
    assert client.checkpoint()
    node.answers = [trouble] * 3
    with pytest.raises(Unavailable, match=rf"HTTP {status} \({error}: see its log\) after 3 attempts"):
        client.checkpoint()


def test_closed_connection_is_tried_again_and_then_unavailable(node: FakeNode, client: Client) -> None:
    node.down = True
    with pytest.raises(Unavailable, match="no connection"):
        client.checkpoint()
    node.down = False
    assert client.checkpoint()


def test_nobody_listening_is_unavailable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with Client(url, retries=QUICK) as client, pytest.raises(Unavailable):
            client.checkpoint()


def test_answers_outside_the_contract_are_named(node: FakeNode, client: Client) -> None:
    for answer in (
        (418, {}, b"oops"),
        (409, {}, b'{"error": "no-such-reason"}'),
        (200, {}, b"not json"),
        (200, {}, b'{"results": []}'),
    ):
        node.answers = [answer]
        with pytest.raises(UnexpectedAnswer):
            client.submit_batch([b"event"])


NESTED = b'{"error": "x", "more": ' + b"[" * 200_000


@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Encoding": "gzip"}, b"<html>no gzip</html>"),
        ({"Location": "http://[::1"}, b"moved"),
        ({}, NESTED),
        ({}, b"[" * 200_000),
        ({}, b"\xff\xfe"),
        ({}, b'{"error": "x", "results": null, "events": [{}], "sources": ["x"], "log_size": NaN}'),
        ({}, b'{"error": "\\ud800", "results": [{"id": "00", "status": "rejected", "error": "\\ud800"}]}'),
        ({}, b'{"events": [], "next": 0, "sources": 1, "log_size": 1' + b"0" * 10_000 + b"}"),
    ],
)
@pytest.mark.asyncio
async def test_answer_that_no_node_gives_is_named_and_never_another_exception(
    node: FakeNode, client: Client, status: int, headers: dict[str, str], body: bytes
) -> None:
    async with AsyncClient(node.url, retries=QUICK) as other:
        for ask in (
            lambda: client.submit_batch([b"event"]),
            client.sources,
            client.log_size,
            lambda: client.campaign(bytes(32)),
            lambda: client.campaign_events(bytes(32)),
        ):
            node.answers = [(status, headers, body)] * QUICK.attempts
            with pytest.raises((UnexpectedAnswer, Unavailable)):
                ask()
        node.answers = [(status, headers, body)] * QUICK.attempts
        with pytest.raises((UnexpectedAnswer, Unavailable)):
            await other.submit_batch([b"event"])


def test_digest_that_is_none_and_a_page_that_leads_nowhere_are_named(node: FakeNode, client: Client) -> None:
    row = {"index": 0, "id": "no digest", "kind": "policy"}
    node.answers = [(200, {}, json.dumps({"events": [row]}).encode())]
    with pytest.raises(UnexpectedAnswer, match="regex"):
        client.campaign_events(bytes(32))
    node.answers = [(200, {}, b'{"events": [], "next": 500}'), (200, {}, b'{"events": [], "next": 500}')]
    with pytest.raises(UnexpectedAnswer, match="the page after 500 begins at 500"):
        client.campaign_events(bytes(32))


def test_text_that_is_none_is_named(node: FakeNode, client: Client) -> None:
    source = node.source("some name", [b"x"])
    record = node.answer("GET", f"/v1/state/{(SOURCE_TABLE + source).hex()}", b"")[1]
    node.answers = [(200, {}, b"\xff"), (200, {}, record.replace(b"some name", b"\xffome name"))]
    with pytest.raises(UnexpectedAnswer):
        client.checkpoint()
    with pytest.raises(UnexpectedAnswer):
        client.source_record(source)


@pytest.mark.asyncio
async def test_answer_has_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_ANSWER_BYTES", 1 << 20)
    with endless_node("flood") as url, Client(url, retries=QUICK) as client:
        with pytest.raises(UnexpectedAnswer, match="more than 1048576 bytes"):
            client.checkpoint()
        async with AsyncClient(url, retries=QUICK) as other:
            with pytest.raises(UnexpectedAnswer, match="more than 1048576 bytes"):
                await other.checkpoint()


@pytest.mark.asyncio
async def test_coded_answer_is_not_unfolded(node: FakeNode, client: Client) -> None:
    coded = gzip.compress(bytes(1 << 20))
    node.answers = [(200, {"Content-Encoding": "gzip"}, coded)] * 2
    assert client.raw_event(bytes(32)) == coded
    async with AsyncClient(node.url, retries=QUICK) as other:
        assert await other.raw_event(bytes(32)) == coded


@pytest.mark.parametrize("answer", ["silence", "header", "drip"])
@pytest.mark.asyncio
async def test_request_has_a_time_limit_however_slowly_something_comes(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "TRANSFER_SECONDS", -29.7)
    with endless_node(answer) as url, Client(url, retries=QUICK) as client:
        with pytest.raises(Unavailable, match="no connection"):
            client.checkpoint()
        async with AsyncClient(url, retries=QUICK) as other:
            with pytest.raises(Unavailable, match="no connection"):
                await other.checkpoint()


def test_closed_client_is_unavailable_and_another_like_it_is_not(node: FakeNode, client: Client) -> None:
    again = client.again()
    client.close()
    with pytest.raises(Unavailable, match="closed"):
        client.checkpoint()
    with again:
        assert again.checkpoint()


def test_event_still_pending_at_the_limit_is_unavailable(node: FakeNode, client: Client) -> None:
    policy = node.policy()
    node.pending[bytes(32)] = node.events[policy]
    with pytest.raises(Unavailable, match="pending"):
        client.wait_final(bytes(32), limit_seconds=0.1)
    node.pending.clear()
    node.rejected[bytes(32)] = Rejected(Reason.DUPLICATE, "again")
    with pytest.raises(Rejected, match="again"):
        client.wait_final(bytes(32), limit_seconds=0.1)


@pytest.mark.asyncio
async def test_proxy_of_the_environment_gets_nothing(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_node() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with Client(node.url, token="secret", retries=QUICK) as client:
            client.checkpoint()
        async with AsyncClient(node.url, token="secret", retries=QUICK) as other:
            await other.checkpoint()
        assert proxy.requests == []
    assert len(node.requests) == 2


@pytest.mark.asyncio
async def test_async_client_answers_as_the_blocking_one(node: FakeNode) -> None:
    policy, source = node.policy(), node.source("a", [b"x"])
    campaign, key = bytes([7]) * 32, Ed25519SigningKey(bytes([9]) * 32)
    node.delegate(campaign, key)
    with Client(node.url, retries=QUICK) as client:
        async with AsyncClient(node.url, retries=QUICK) as other:
            assert await other.policy_in_force() == client.policy_in_force()
            assert await other.sources() == client.sources()
            assert await other.source_record(source) == client.source_record(source)
            assert await other.status(policy) == client.status(policy)
            assert await other.wait_final(policy) == client.wait_final(policy)
            assert await other.raw_event(policy) == client.raw_event(policy)
            assert await other.receipt(policy) == client.receipt(policy)
            assert await other.genesis(node.chain_id) == client.genesis(node.chain_id)
            assert await other.checkpoint() == client.checkpoint()
            assert await other.log_size() == client.log_size() == len(node.order)
            raw = client.raw_event(policy)
            assert await other.submit(raw) == client.submit(raw)
            assert await other.submit_batch([raw, raw]) == client.submit_batch([raw, raw])
            with pytest.raises(Rejected, match="no such campaign"):
                await other.campaign(campaign)
            with pytest.raises(Rejected):
                await other.grant_record(bytes(32))
            node.answers = [(503, {}, b"")]
            assert await other.checkpoint() == client.checkpoint()


@pytest.mark.asyncio
async def test_async_client_without_a_node_is_unavailable(node: FakeNode) -> None:
    node.down = True
    async with AsyncClient(node.url, token="secret", retries=QUICK) as client:
        with pytest.raises(Unavailable):
            await client.checkpoint()
