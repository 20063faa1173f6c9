"""Reading over HTTP from a real ledger: every proof verifies, every page is whole, every tile is the log's."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from api_fixtures import ZEROS, Served, node_of, refusal, served, told, wire
from ledger_fixtures import HOSPITAL, LIBRARIAN, MemoryLedger, Story

from consensus import merkle
from consensus.bundle import open_bundle
from consensus.checkpoint import entry_bundle_path, open_checkpoint, tile_path
from consensus.epochs import anchor
from consensus.event import Kind
from consensus.genesis import genesis_from_json
from consensus.portions import Policy
from consensus.receipt import verify_receipt, verify_state_receipt
from consensus.state import POLICY_HEAD_KEY, SOURCE_TABLE, SourceRecord, read_record
from node.api_log import _matching
from node.http_server import HttpRequest
from node.ledger import CAMPAIGN_TERM, KIND_TERM


@asynccontextmanager
async def at(tmp_path: Path, **options: object) -> AsyncIterator[Served]:
    async with served(tmp_path / "store", **options) as running:  # type: ignore[arg-type]
        yield running


@pytest.fixture
def turns_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that waited for a turn of long work, in order."""
    paths: list[str] = []
    plain = HttpRequest.next_turn

    async def noting(request: HttpRequest, size_bytes: int = 0) -> None:
        paths.append(request.path)
        await plain(request, size_bytes)

    monkeypatch.setattr(HttpRequest, "next_turn", noting)
    return paths


# Reading


@pytest.mark.trio
async def test_receipt_and_state_proofs_verify_against_the_pinned_genesis(tmp_path: Path) -> None:
    story = told()
    async with at(tmp_path) as running:
        genesis = genesis_from_json((await running.client.get("/v1/genesis")).content)
        trusted = anchor(genesis, story.ledger.chain_id)
        event = story.ledger.events[7]
        receipt = await running.client.get(f"/v1/receipts/{event.id.hex()}")
        assert verify_receipt(trusted, receipt.content).id == event.id
        present = await running.client.get(f"/v1/state/{(SOURCE_TABLE + story.books).hex()}?proof=1")
        found = verify_state_receipt(trusted, present.content, SOURCE_TABLE + story.books)
        record = await running.client.get(f"/v1/state/{(SOURCE_TABLE + story.books).hex()}")
        assert found.value == record.content
        assert read_record(record.content, SourceRecord).claim.name == "books"
        absent = await running.client.get(f"/v1/state/{(SOURCE_TABLE + bytes(32)).hex()}?proof=1")
        assert verify_state_receipt(trusted, absent.content, SOURCE_TABLE + bytes(32)).value is None
        missing = await running.client.get(f"/v1/state/{(SOURCE_TABLE + bytes(32)).hex()}")
        assert refusal(missing) == (404, "not-found")
        assert refusal(await running.client.get(f"/v1/receipts/{ZEROS}?wait=1")) == (404, "not-found")


@pytest.mark.trio
async def test_listing_pages_through_every_event_once_under_any_filter(tmp_path: Path) -> None:
    story = told()
    async with at(tmp_path) as running:
        campaign, books = story.run.id.hex(), story.books.hex()
        for query, expected in (
            ("", [event.id for event in story.ledger.events]),
            ("kind=step", [event.id for event in story.ledger.events if event.entry.kind is Kind.STEP]),
            (
                f"kind=step&campaign={campaign}&source={books}",
                [
                    event.id
                    for event in story.ledger.events
                    if event.entry.kind is Kind.STEP and any(item.source == story.books for item in event.items)  # type: ignore[attr-defined]
                ],
            ),
            (f"kind=policy&campaign={campaign}", []),
            (f"campaign={ZEROS}", []),
        ):
            for limit in (1, 2, 7, 1_000):
                listed: list[str] = []
                following: int | None = 0
                while following is not None:
                    page = (
                        await running.client.get(
                            f"/v1/events?{query}&start={following}&limit={limit}".replace("?&", "?")
                        )
                    ).json()
                    assert len(page["events"]) <= limit
                    listed += [event["id"] for event in page["events"]]
                    following = page["next"]
                assert listed == [identifier.hex() for identifier in expected]
        beyond = (await running.client.get("/v1/events?start=9007199254740991")).json()
        assert beyond == {"events": [], "next": None}
        first = (await running.client.get("/v1/events?limit=1")).json()["events"][0]
        event = story.ledger.events[0]
        assert first == {
            "index": 0,
            "id": event.id.hex(),
            "kind": "policy",
            "author": event.entry.author.hex(),
            "author_name": "governance-1",
            "campaign": "",
            "sequence": 0,
            "attempt": 0,
            "size_bytes": len(event.entry_bytes) + len(event.portions_bytes),
        }


@pytest.mark.trio
async def test_seeks_of_a_listing_are_bounded_and_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.api_log.MAX_SEEKS", 3)
    node, store = node_of(told(), tmp_path / "store")
    with store:
        terms = [KIND_TERM + b"step", CAMPAIGN_TERM + told().run.id]
        found: list[int] = []
        following: int | None = 0
        while following is not None:
            log_size = node.ledger.final.header.log_size
            page, following = await _matching(store, terms, following, 100, log_size, trio.lowlevel.checkpoint)
            found += page
        kinds = [event.entry.kind for event in told().ledger.events]
        assert found == [index for index, kind in enumerate(kinds) if kind is Kind.STEP]


@pytest.mark.trio
@pytest.mark.parametrize("path", ["/v1/events?limit=1000", "/v1/sources", "/v1/events?limit=3&kind=step&campaign={}"])
async def test_listings_go_on_in_turns_of_all_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns_taken: list[str], path: str
) -> None:
    monkeypatch.setattr("node.api_log.YIELD_EVERY", 2)
    async with at(tmp_path) as running:
        answer = (await running.client.get(path.format(told().run.id.hex()))).json()
        listed = answer.get("events") or answer["sources"]
        assert len(listed) >= 3
        assert len(turns_taken) >= len(listed) / 2


@pytest.mark.trio
async def test_listing_goes_on_in_the_next_turn_after_a_large_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns_taken: list[str]
) -> None:
    monkeypatch.setattr("node.api_log.MAX_SLICE_BYTES", 0)
    async with at(tmp_path) as running:
        assert len((await running.client.get("/v1/events?limit=10")).json()["events"]) == len(turns_taken) == 10


@pytest.mark.trio
async def test_campaign_sources_and_policy_say_what_the_state_holds(tmp_path: Path) -> None:
    story = told()
    async with at(tmp_path) as running:
        campaign = (await running.client.get(f"/v1/campaigns/{story.run.id.hex()}")).json()
        head = story.run.head
        assert {name: campaign[name] for name in ("steps", "root", "job_key", "rollbacks", "closed")} == {
            "steps": 6,
            "root": head.root.hex(),
            "job_key": head.job_key.hex(),
            "rollbacks": 1,
            "closed": "",
        }
        assert campaign["presented"] == campaign["admitted"] + campaign["refused"]
        sources = {source["name"]: source for source in (await running.client.get("/v1/sources")).json()["sources"]}
        assert set(sources) == {"books", "records", "archive"}
        assert sources["books"]["revoked_at_ms"] == 0
        assert sources["records"]["revoked_at_ms"] > 0
        assert (sources["records"]["author_name"], sources["records"]["class"]) == (HOSPITAL, "medical")
        assert sources["books"]["reserve_below"] == 0
        policy = (await running.client.get("/v1/policy")).json()
        assert policy["id"] == story.run.policy_id.hex()
        assert set(policy["policy"]) == set(Policy.__struct_fields__)
        assert policy["policy"]["classes"][0]["blocks"] == [{"block": "embedding", "weight_permille": 0}]
        assert refusal(await running.client.get(f"/v1/campaigns/{ZEROS}")) == (404, "not-found")


@pytest.mark.trio
async def test_bundle_opens_under_the_pinned_genesis(tmp_path: Path) -> None:
    story = told()
    async with at(tmp_path) as running:
        trusted = anchor(story.ledger.genesis, story.ledger.chain_id)
        campaign, event = story.run.id.hex(), story.ledger.events[3].id.hex()
        for path in (
            f"source-honored?campaign={campaign}&source={story.books.hex()}",
            f"included?event={event}",
            "consistent?earlier=2",
        ):
            answer = await running.client.get(f"/v1/bundles/{path}")
            assert answer.status_code == 200, answer.text
            open_bundle(trusted, answer.content)
        for path, expected in (
            ("nonsense", (400, "unknown-predicate")),
            ("included", (400, "bad-field")),
            (f"included?event={ZEROS}", (404, "not-found")),
            (f"delta-exact?campaign={ZEROS}", (409, "unknown-campaign")),
            ("consistent?earlier=999", (404, "not-found")),
            ("consistent?earlier=0", (400, "malformed")),
        ):
            assert refusal(await running.client.get(f"/v1/bundles/{path}")) == expected


@pytest.mark.trio
async def test_empty_log_answers_not_found_everywhere(tmp_path: Path) -> None:
    async with at(tmp_path, story=Story(MemoryLedger(), told().run, b"", b"", b"", b"")) as running:
        for path in (
            "/v1/policy",
            f"/v1/state/{POLICY_HEAD_KEY.hex()}",
            f"/v1/state/{POLICY_HEAD_KEY.hex()}?proof=1",
            f"/v1/bundles/included?event={ZEROS}",
            "/checkpoint",
            "/tile/0/000.p/1",
        ):
            assert refusal(await running.client.get(path)) == (404, "not-found")
        assert (await running.client.get("/v1/events")).json() == {"events": [], "next": None}
        assert (await running.client.get("/v1/sources")).json() == {"sources": []}
        assert (await running.client.get("/v1/log/consistency?first=0&second=0")).json() == {"proof": []}
        assert (await running.client.get("/v1/status")).json()["height"] == 0


# The C2SP log


@pytest.mark.trio
async def test_tiles_rebuild_the_root_the_checkpoint_signs(tmp_path: Path) -> None:
    async with at(tmp_path) as running:
        for number in range(250):
            running.node.submit(wire(running.node.memory.source(LIBRARIAN, f"source {number}")))
        note = await running.client.get("/checkpoint")
        assert note.headers["content-type"] == "text/plain; charset=utf-8"
        assert note.content == (await running.client.get("/v1/checkpoint")).content
        origin = running.node.ledger.genesis.name
        checkpoint, names = open_checkpoint(note.content, {origin: running.node.log_key.public_key})
        assert (checkpoint.origin, names) == (origin, frozenset({origin}))
        assert 256 < checkpoint.size < 512
        hashes, entries = [], []
        for index, width in ((0, 256), (1, checkpoint.size - 256)):
            tile = (await running.client.get("/" + tile_path(0, index, width))).content
            assert len(tile) == 32 * width
            hashes += [tile[start : start + 32] for start in range(0, len(tile), 32)]
            bundle = (await running.client.get("/" + entry_bundle_path(index, width))).content
            while bundle:
                size = int.from_bytes(bundle[:2], "big")
                entries.append(bundle[2 : 2 + size])
                bundle = bundle[2 + size :]
        assert hashes == [merkle.leaf_hash(entry) for entry in entries]
        assert merkle.root_of(hashes) == checkpoint.root
        upper = await running.client.get("/" + tile_path(1, 0, 1))
        assert upper.content == merkle.root_of(hashes[:256])
        proof = (await running.client.get(f"/v1/log/consistency?first=24&second={checkpoint.size}")).json()["proof"]
        old_root = merkle.root_of(hashes[:24])
        merkle.verify_consistency(24, checkpoint.size, [bytes.fromhex(h) for h in proof], old_root, checkpoint.root)


@pytest.mark.trio
@pytest.mark.parametrize(
    "path",
    [
        "/tile/0/000",  # 25 leaves: the full tile is not there yet
        "/tile/0/000.p/29",
        "/tile/0/000.p/0",
        "/tile/0/000.p/256",
        "/tile/0/001.p/1",
        "/tile/1/000.p/1",
        "/tile/63/000.p/1",
        "/tile/64/000.p/1",
        "/tile/00/000.p/1",
        "/tile/0/0.p/1",
        "/tile/0/x000/000.p/1",
        "/tile/-1/000.p/1",
        "/tile/entries/001.p/1",
        "/tile/data/000.p/1",
        "/tile/",
        "/tile/0/../0/000.p/1",
        "/tile/0/%2e%2e/000.p/1",
        "/tile/../../etc/passwd",
        "/tile/0//000.p/1",
        "/tile/0/000.p/1/",
        "/tile/0/" + "x999/" * 100 + "999",
    ],
)
async def test_tile_path_in_another_spelling_or_outside_the_log_is_not_found(tmp_path: Path, path: str) -> None:
    async with at(tmp_path) as running:
        answer = await running.raw(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        assert json.loads(body)["error"] == "not-found"
