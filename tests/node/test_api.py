"""The HTTP interface over a real ledger, store and socket: submitting, grants, the node itself."""

import functools
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from api_fixtures import TOKEN, ZEROS, Served, node_of, refusal, served, told, wire
from ledger_fixtures import HOSPITAL, LIBRARIAN
from uncollected import refusals_left

from consensus.codec import encode
from consensus.event import CheckedEvent, Kind, make_entry, pack
from consensus.job_key import job_key_id
from consensus.portions import DataItem, DataPortion, GrantedSource, GrantOperation, GrantTerms, Portions
from consensus.rejection import InvariantBroken, Reason, Rejected
from node.api import LONG_EVENT_BYTES, MAX_BATCH_EVENTS, split_batch
from node.config import ApiSection
from node.endpoints import Router
from node.errors_http import status_of_reason
from node.http_server import HttpRequest
from node.link import NetworkCounters
from node.messages import TURN_EVENTS
from node.metrics import Metrics


def framed(*events: bytes) -> bytes:
    """A batch."""
    return b"".join(struct.pack(">I", len(event)) + event for event in events)


@asynccontextmanager
async def at(tmp_path: Path, **options: object) -> AsyncIterator[Served]:
    async with served(tmp_path / "store", **options) as running:  # type: ignore[arg-type]
        yield running


# Submitting


@pytest.mark.trio
async def test_posted_event_is_final_and_found_by_every_reader(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        event = running.node.memory.source(LIBRARIAN, "atlas")
        answer = await running.client.post("/v1/events", content=wire(event))
        assert answer.status_code == 202
        log_size = running.node.ledger.final.header.log_size
        assert answer.json() == {
            "id": event.id.hex(),
            "leaf_hash": event.leaf_hash.hex(),
            "status": "final",
            "index": log_size - 1,
            "height": running.node.ledger.final.header.height,
        }
        status = await running.client.get(f"/v1/events/{event.id.hex()}")
        assert (status.status_code, status.json()["status"]) == (200, "final")
        raw = await running.client.get(f"/v1/events/{event.id.hex()}/raw")
        assert raw.content == wire(event)
        assert raw.headers["content-type"] == "application/octet-stream"


@pytest.mark.trio
async def test_event_posted_again_is_taken_without_effect(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        event = running.node.memory.source(LIBRARIAN, "atlas")
        first = await running.client.post("/v1/events", content=wire(event))
        again = await running.client.post("/v1/events", content=wire(event))
        assert (again.status_code, again.json()) == (202, first.json())


@pytest.mark.trio
async def test_wait_returns_when_the_event_is_final_and_at_its_limit_when_not(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        running.node.held = True
        event = running.node.memory.source(LIBRARIAN, "atlas")
        before = trio.current_time()
        pending = await running.client.post("/v1/events?wait=0.2", content=wire(event))
        assert (pending.status_code, pending.json()["status"]) == (202, "pending")
        assert trio.current_time() - before >= 0.2
        assert (await running.client.get(f"/v1/events/{event.id.hex()}/raw")).content == wire(event)
        answers = []

        async def wait() -> None:
            answers.append(await running.client.get(f"/v1/events/{event.id.hex()}?wait=30"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.1)
            running.node.seal(event)
        assert answers[0].json()["status"] == "final"


@pytest.mark.trio
async def test_event_that_is_still_on_its_way_to_this_node_is_waited_for(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        event = running.node.memory.source(LIBRARIAN, "atlas")
        assert refusal(await running.client.get(f"/v1/events/{event.id.hex()}?wait=0.2")) == (404, "not-found")
        receipts = []

        async def wait() -> None:
            receipts.append(await running.client.get(f"/v1/receipts/{event.id.hex()}?wait=30"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.1)
            assert (await running.client.post("/v1/events", content=wire(event))).status_code == 202
        assert receipts[0].status_code == 200


@pytest.mark.trio
async def test_body_that_is_refused_is_freed_without_the_collector(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        for path, body in (("/v1/events", b"nothing"), ("/v1/events/batch", framed(b"nothing"))):
            await running.client.post(path, content=body)  # the first one leaves what the client and the node remember
            with refusals_left() as left:
                for _ in range(5):
                    await running.client.post(path, content=body)
                assert left() == 0


@pytest.mark.trio
async def test_event_a_rule_refuses_is_answered_with_the_rule(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        foreign = running.node.memory.revocation(HOSPITAL, told().books)
        assert refusal(await running.client.post("/v1/events", content=wire(foreign))) == (409, "wrong-author")
        status = await running.client.get(f"/v1/events/{foreign.id.hex()}")
        assert (status.status_code, status.json()["status"], status.json()["error"]) == (
            200,
            "rejected",
            "wrong-author",
        )
        assert refusal(await running.client.get(f"/v1/receipts/{foreign.id.hex()}")) == (409, "wrong-author")


@pytest.mark.trio
async def test_damaged_event_bytes_are_refused_by_name_and_change_nothing(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        good = wire(running.node.memory.source(LIBRARIAN, "atlas"))
        before = running.node.ledger.final.digest
        for bad, expected in (
            (b"", "malformed"),
            (b"\xff" * 40, "malformed"),
            (good[:-1], "malformed"),
            (good + b"\x00", "malformed"),
            (good.replace(b"atlas", b"atlus"), "portion-mismatch"),
        ):
            assert refusal(await running.client.post("/v1/events", content=bad)) == (400, expected)
        flipped = bytearray(good)
        flipped[good.index(b"\xc4\x40") + 10] ^= 1
        assert refusal(await running.client.post("/v1/events", content=bytes(flipped))) == (400, "bad-signature")
        assert running.node.ledger.final.digest == before


@pytest.mark.trio
async def test_full_pool_answers_429_with_retry_after(tmp_path: Path) -> None:
    async with at(tmp_path, max_events=1) as running:
        running.node.held = True
        memory = running.node.memory
        await running.client.post("/v1/events", content=wire(memory.source(LIBRARIAN, "first")))
        answer = await running.client.post("/v1/events", content=wire(memory.source(LIBRARIAN, "second")))
        assert refusal(answer) == (429, "overloaded")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.trio
async def test_halted_node_answers_503_and_says_why(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        assert (await running.client.get("/v1/health")).json()["status"] == "ok"
        running.node.halted = "a certified ledger block is invalid"
        for answer in (
            await running.client.get("/v1/health"),
            await running.client.post("/v1/events", content=wire(running.node.memory.source(LIBRARIAN, "atlas"))),
        ):
            assert refusal(answer) == (503, "unavailable")
            assert "a certified ledger block is invalid" in answer.json()["detail"]
            assert answer.headers["retry-after"] == "1"


# Batches


@pytest.mark.trio
async def test_one_bad_event_does_not_spoil_its_batch(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        memory = running.node.memory
        first, last = memory.source(LIBRARIAN, "first"), memory.source(LIBRARIAN, "last")
        foreign = memory.revocation(HOSPITAL, told().books)
        forged = wire(memory.source(LIBRARIAN, "forged"))
        forged = forged.replace(b"forged", b"farged")
        answer = await running.client.post(
            "/v1/events/batch", content=framed(wire(first), b"garbage", wire(foreign), forged, wire(last), wire(first))
        )
        assert answer.status_code == 200
        results = answer.json()["results"]
        assert [(result["status"], result.get("error")) for result in results] == [
            ("final", None),
            ("rejected", "malformed"),
            ("rejected", "wrong-author"),
            ("rejected", "portion-mismatch"),
            ("final", None),
            ("final", None),
        ]
        assert [result["id"] for result in results[:3]] == [first.id.hex(), "", foreign.id.hex()]
        assert len(results[3]["id"]) == 64
        assert results[0]["index"] + 1 == results[4]["index"]


@pytest.mark.trio
async def test_truncated_batch_is_refused_whole_before_any_event_is_taken(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        good = framed(wire(running.node.memory.source(LIBRARIAN, "atlas")))
        before = running.node.ledger.final.digest
        for bad in (good + b"\x00\x00", good + b"\x00\x00\x00\x09x", good[:-1], b"\xff\xff\xff\xff", good + b"\x00"):
            assert refusal(await running.client.post("/v1/events/batch", content=bad)) == (400, "malformed")
        assert running.node.ledger.final.digest == before
        assert (await running.client.post("/v1/events/batch", content=b"")).json() == {"results": []}


def test_batch_of_too_many_frames_is_oversized() -> None:
    assert len(split_batch(bytes(4) * MAX_BATCH_EVENTS)) == MAX_BATCH_EVENTS
    with pytest.raises(Exception, match="oversized"):
        split_batch(bytes(4) * (MAX_BATCH_EVENTS + 1))


@pytest.mark.trio
async def test_large_event_waits_for_as_many_turns_as_it_is_long_before_it_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []

    async def noting(request: HttpRequest, size_bytes: int = 0) -> None:
        waited.append(size_bytes)

    monkeypatch.setattr(HttpRequest, "next_turn", noting)
    async with at(tmp_path) as running:
        for path in ("/v1/events", "/v1/grants"):
            await running.client.post(path, content=bytes(LONG_EVENT_BYTES))
            assert waited == []
            await running.client.post(path, content=bytes(500_000))
            assert waited == [500_000]
            waited.clear()


@pytest.mark.trio
async def test_batches_of_all_clients_are_checked_a_few_events_in_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = framed(*[b"nothing"] * 4 * TURN_EVENTS)
    async with at(tmp_path) as running, trio.open_nursery() as nursery:
        turns, checked_in = [0], []
        plain = running.node.submit_each

        def noting(encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
            checked_in.append(turns[0])
            return plain(encoded)

        async def count_turns() -> None:
            while True:
                turns[0] += 1
                await trio.lowlevel.checkpoint()

        monkeypatch.setattr(running.node, "submit_each", noting)
        nursery.start_soon(count_turns)
        async with trio.open_nursery() as clients:
            for _ in range(30):
                clients.start_soon(functools.partial(running.client.post, "/v1/events/batch", content=batch))
        nursery.cancel_scope.cancel()
        assert len(checked_in) == 30 * 4
        assert max(Counter(checked_in).values()) <= 2, "the task that counts turns is first in one and last in another"


# Grants


@pytest.mark.trio
async def test_grant_is_asked_for_signed_by_hand_and_final(tmp_path: Path) -> None:
    story = told()
    async with at(tmp_path) as running:
        memory = running.node.memory
        terms = GrantTerms(story.run.policy_id, 7, 9, memory.now_ms + 600_000)
        portions = Portions(
            DataPortion(memory.salt(), (DataItem(encode(GrantedSource(story.books))),)),
            memory.salted(terms),
            memory.salted(GrantOperation(job_key_id(story.run.job))),
        )
        entry = make_entry(
            memory.chain_id, Kind.GRANT, memory.ids["operator-1"], portions, campaign=story.run.id, sequence=3
        )
        asked = await running.client.post("/v1/grants", content=pack(entry, portions))
        assert asked.status_code == 202
        grant = asked.json()
        assert (grant["status"], grant["campaign"]) == ("gathering", story.run.id.hex())
        assert (await running.client.get("/v1/grants")).json() == {"grants": [grant]}
        assert (await running.client.get(f"/v1/grants/{grant['id']}")).json() == grant
        signed = await running.client.post(f"/v1/grants/{grant['id']}/sign")
        assert (signed.status_code, signed.json()["status"]) == (200, "final")
        assert refusal(await running.client.post(f"/v1/grants/{ZEROS}/sign")) == (404, "not-found")
        assert refusal(await running.client.get(f"/v1/grants/{ZEROS}")) == (404, "not-found")
        assert refusal(await running.client.post("/v1/grants", content=b"\x93")) == (400, "malformed")


# The node itself


@pytest.mark.trio
async def test_status_and_metrics_agree_with_the_ledger(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        await running.client.post("/v1/events", content=wire(running.node.memory.source(LIBRARIAN, "atlas")))
        await running.client.post("/v1/events", content=b"garbage")
        await running.client.get("/nowhere")
        status = (await running.client.get("/v1/status")).json()
        header = running.node.ledger.final.header
        assert (status["height"], status["log_size"]) == (header.height, header.log_size)
        assert (status["log_root"], status["state_root"]) == (header.log_root.hex(), header.state_root.hex())
        assert status["chain_id"] == running.node.memory.chain_id.hex()
        assert [role["members"] for role in status["tolerances"]] == [2, 1, 1]
        assert status["roles_connected"] == {"data-source": 1, "governance": 1, "operator": 1}
        assert status["clocks_ahead_ms"] == {"governance-1": -250}
        answer = await running.client.get("/metrics")
        assert 'countersign_role_connected{role="operator"} 1.0' in answer.text
        assert 'countersign_role_threshold{role="data-source"} 2.0' in answer.text
        assert 'countersign_clock_ahead_seconds{leader="governance-1"} -0.25' in answer.text
        assert answer.headers["content-type"].startswith("text/plain")
        lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        assert lines["countersign_log_size"] == f"{header.log_size:.1f}"
        assert lines["countersign_events_submitted_total"] == "1.0"
        assert lines['countersign_events_rejected_total{reason="malformed"}'] == "1.0"
        assert (
            lines['countersign_http_request_seconds_count{endpoint="unmatched",method="OTHER",status="404"}'] == "1.0"
        )
        assert float(lines["process_resident_memory_bytes"]) > 1 << 20


def test_metrics_show_finality_and_the_counters_of_other_parts(tmp_path: Path) -> None:
    trio.run(_metrics_with_counters, tmp_path, NetworkCounters(bytes_sent=7, closed_silent=2))


async def _metrics_with_counters(tmp_path: Path, counters: object) -> None:
    node, store = node_of(told(), tmp_path / "store")
    with store:
        metrics = Metrics(node, {"network": counters})  # type: ignore[dict-item]
        metrics.event_final(0.018)
        text = metrics.render().decode()
    assert "countersign_network_bytes_sent_total 7.0" in text
    assert "countersign_network_closed_silent_total 2.0" in text
    assert 'countersign_finality_seconds_bucket{le="0.02"} 1.0' in text


@pytest.mark.trio
async def test_openapi_document_lists_exactly_what_is_served(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        document = (await running.client.get("/v1/openapi.json")).json()
        assert document["openapi"] == "3.1.0"
        described = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
        assert described == {
            (endpoint.method, endpoint.template.replace("...}", "}")) for endpoint in running.api.endpoints
        }
        assert {path for _, path in described} == {
            "/v1/events",
            "/v1/events/batch",
            "/v1/events/{id}",
            "/v1/events/{id}/raw",
            "/v1/receipts/{id}",
            "/v1/state/{key}",
            "/v1/campaigns/{id}",
            "/v1/sources",
            "/v1/policy",
            "/v1/grants",
            "/v1/grants/{id}",
            "/v1/grants/{id}/sign",
            "/v1/audits/{campaign}/{challenge}/share",
            "/v1/audits/{campaign}/{challenge}/beacon",
            "/v1/bundles/{predicate}",
            "/v1/custody/{campaign}",
            "/v1/custody/{campaign}/windows/{root}",
            "/v1/custody/{campaign}/blobs/{sha256}",
            "/v1/checkpoint",
            "/checkpoint",
            "/tile/{place}",
            "/v1/log/consistency",
            "/v1/genesis",
            "/v1/status",
            "/v1/health",
            "/metrics",
            "/v1/openapi.json",
        }
        for operations in document["paths"].values():
            for operation in operations.values():
                assert {"200", "202"} & set(operation["responses"])
                assert {"400", "401", "500"} <= set(operation["responses"])
        Router(running.api.endpoints)


def test_every_reason_has_a_status() -> None:
    statuses = {reason: status_of_reason(reason) for reason in Reason}
    assert set(statuses.values()) == {400, 401, 404, 409, 413, 429}
    assert statuses[Reason.DUPLICATE] == 409
    assert statuses[Reason.BAD_SIGNATURE] == 400


@pytest.mark.trio
async def test_damaged_store_found_by_a_request_stops_the_node(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:  # noqa: PT012 - the server outlives the request
        async with at(tmp_path) as running:
            running.node.ledger.node = _missing  # type: ignore[method-assign]
            answer = await running.client.get("/tile/0/000.p/1")
            assert refusal(answer) == (500, "internal")
            assert "tree node" not in answer.text
            await trio.sleep(60)
    assert raised.group_contains(InvariantBroken, match="tree node 0/0 is missing")


def _missing(level: int, index: int) -> bytes:
    raise InvariantBroken(f"tree node {level}/{index} is missing")


def test_configuration_never_shows_its_tokens() -> None:
    assert TOKEN not in repr(ApiSection(tokens=(TOKEN,)))
