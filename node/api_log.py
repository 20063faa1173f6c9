"""Reading over HTTP: events, receipts, state, campaigns, sources, policy, bundles, and the C2SP log.

Everything answered here is of the finalized log. What a client should not take on trust has a proof beside it:
receipts, ``?proof=1``, bundles, checkpoint and tiles (C2SP tlog-tiles: hashes at levels 0, 8, 16 … in tiles of 256,
entries with 2-byte big-endian lengths). The JSON answers are for people and for the trainer's convenience.

Work on the node's thread is bounded per request, and what is long is done in slices that take turns; bundles are made
in a worker thread, one at a time (``one_thread.py``).
"""

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from consensus import merkle
from consensus.block import decode_header
from consensus.checkpoint import TILE_HASHES, EntryBundle, parse_tile_path
from consensus.codec import decode, encode
from consensus.event import MAX_ENTRY_BYTES, Entry, Kind, event_id, pack_parts
from consensus.genesis import genesis_to_json
from consensus.identifiers import Digest
from consensus.membership import Genesis
from consensus.rejection import Reason, Rejected
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    PolicyHead,
    PolicyRecord,
    SourceRecord,
    read_record,
)
from consensus.state_map import KEY_BYTES
from node import request_fields as fields
from node.bundles import export_bundle
from node.endpoints import Call, Endpoint
from node.errors_http import NOTE, OCTETS, HttpReply, json_reply
from node.ledger import CAMPAIGN_TERM, KIND_TERM, SOURCE_TERM, Ledger
from node.one_thread import OneThread
from node.service import EventState, EventStatus, Service
from node.store import Store

DEFAULT_LIMIT = 100
MAX_LIMIT = 1_000
MAX_PAGE_BYTES = 16 << 20
MAX_SLICE_BYTES = 1 << 20
MAX_SEEKS = 20_000
YIELD_EVERY = 64
_FOREVER = (("cache-control", "public, max-age=31536000, immutable"),)


class LogApi:
    """The endpoints that read."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ledger: Ledger = service.ledger
        self._genesis = genesis_to_json(self._ledger.genesis)
        self._bundles = OneThread()

    def endpoints(self) -> tuple[Endpoint, ...]:
        """The table."""
        filters = ("kind", "campaign", "source", "start", "limit")
        about = ("campaign", "source", "event", "earlier", "size")
        return (
            Endpoint("GET", "/v1/events", "List final events.", self.events, filters),
            Endpoint("GET", "/v1/events/{id}", "Where an event stands.", self.event, ("wait",), refusals=(404,)),
            Endpoint("GET", "/v1/events/{id}/raw", "An event's bytes.", self.raw, content_type=OCTETS, refusals=(404,)),
            Endpoint(
                "GET",
                "/v1/receipts/{id}",
                "Proof that an event is on the log.",
                self.receipt,
                ("wait",),
                content_type=OCTETS,
                refusals=(404, 409),
            ),
            Endpoint(
                "GET",
                "/v1/state/{key}",
                "A record of the state, or its proof.",
                self.state,
                ("proof",),
                content_type=OCTETS,
                refusals=(404,),
            ),
            Endpoint("GET", "/v1/campaigns/{id}", "Where a campaign stands.", self.campaign, refusals=(404,)),
            Endpoint("GET", "/v1/sources", "Every registered source.", self.sources),
            Endpoint("GET", "/v1/policy", "The policy in force.", self.policy, refusals=(404,)),
            Endpoint(
                "GET",
                "/v1/bundles/{predicate}",
                "What a predicate needs, for checking offline.",
                self.bundle,
                about,
                content_type=OCTETS,
                refusals=(404, 409, 413, 429),
            ),
            Endpoint(
                "GET",
                "/v1/log/consistency",
                "Proof that one log extends another.",
                self.consistency,
                ("first", "second"),
            ),
            Endpoint(
                "GET", "/v1/checkpoint", "The newest signed checkpoint.", self.note, content_type=NOTE, refusals=(404,)
            ),
            Endpoint("GET", "/checkpoint", "As /v1/checkpoint (C2SP).", self.note, content_type=NOTE, refusals=(404,)),
            Endpoint("GET", "/tile/{place...}", "A tile (C2SP).", self.tile, content_type=OCTETS, refusals=(404,)),
            Endpoint("GET", "/v1/genesis", "The genesis file.", self.genesis),
        )

    # Events

    async def events(self, call: Call) -> HttpReply:
        """A page of final events that match every filter."""
        self._ledger.require_whole()
        query, log_size = call.query, self._ledger.final.header.log_size
        terms = []
        if "kind" in query:
            if query["kind"] not in frozenset(Kind):
                raise Rejected(Reason.MALFORMED, f"kind '{query['kind']}', expected one of: {', '.join(Kind)}")
            terms.append(KIND_TERM + query["kind"].encode())
        for name, prefix in (("campaign", CAMPAIGN_TERM), ("source", SOURCE_TERM)):
            if name in query:
                terms.append(prefix + fields.digest(name, query[name]))
        limit = fields.whole_number("limit", query.get("limit", str(DEFAULT_LIMIT)), least=1, most=MAX_LIMIT)
        start = fields.optional_number(query, "start", 0)
        next_turn = call.request.next_turn
        if limit > YIELD_EVERY:
            await next_turn()
        indexes, following = await _matching(self._ledger.store, terms, start, limit, log_size, next_turn)
        listed: list[dict[str, object]] = []
        page_bytes = slice_bytes = 0
        for index in indexes:
            if page_bytes > MAX_PAGE_BYTES:
                following = index
                break
            entry_bytes, portions = self._ledger.event(index)
            page_bytes += len(entry_bytes) + len(portions)
            slice_bytes += len(entry_bytes) + len(portions)
            listed.append(self._listed(index, entry_bytes, len(portions)))
            if len(listed) % YIELD_EVERY == 0 or slice_bytes > MAX_SLICE_BYTES:
                await next_turn()
                slice_bytes = 0
        return json_reply({"events": listed, "next": following})

    def _listed(self, index: int, entry_bytes: bytes, portions_size: int) -> dict[str, object]:
        entry = decode(entry_bytes, Entry, MAX_ENTRY_BYTES)
        return {
            "index": index,
            "id": event_id(entry).hex(),
            "kind": entry.kind.value,
            "author": entry.author.hex(),
            "author_name": self._ledger.epochs.member(entry.author).name,
            "campaign": "" if entry.campaign == bytes(32) else entry.campaign.hex(),
            "sequence": entry.sequence,
            "attempt": entry.attempt,
            "size_bytes": len(entry_bytes) + portions_size,
        }

    async def event(self, call: Call) -> HttpReply:
        """Where an event stands."""
        identifier = fields.digest("event id", call.path["id"])
        return json_reply(status_fields(identifier, await self._status(identifier, call)))

    async def raw(self, call: Call) -> HttpReply:
        """An event's bytes, final or pending."""
        identifier = fields.digest("event id", call.path["id"])
        pending = self._service.mempool.find(identifier)
        if pending is not None:
            return HttpReply(200, pack_parts(pending.entry_bytes, pending.portions_bytes), OCTETS)
        return HttpReply(200, pack_parts(*self._ledger.event(self._ledger.index_of(identifier))), OCTETS)

    async def receipt(self, call: Call) -> HttpReply:
        """Proof that an event is on the log; 409 with the reason if it was rejected."""
        identifier = fields.digest("event id", call.path["id"])
        status = await self._status(identifier, call)
        if status.state is EventState.REJECTED and status.reason is not None:
            raise Rejected(status.reason, status.detail)
        if status.state is not EventState.FINAL:
            raise Rejected(Reason.NOT_FOUND, f"event {identifier.hex()} is {status.state.value}, not final")
        return HttpReply(200, encode(self._ledger.receipt(identifier)), OCTETS)

    async def _status(self, identifier: Digest, call: Call) -> EventStatus:
        """What became of an event, waited for as the query asks; one handed to another node may be on its way."""
        seconds = fields.wait_seconds(call.query)
        status = self._service.status_of(identifier)
        if status.state in (EventState.PENDING, EventState.UNKNOWN) and seconds:
            call.request.give_way()
            status = await self._service.wait_final(identifier, seconds)
        if status.state is EventState.UNKNOWN:
            raise Rejected(Reason.NOT_FOUND, f"event {identifier.hex()} is not known here")
        return status

    # State

    async def state(self, call: Call) -> HttpReply:
        """A record of the state, or its proof of presence or absence."""
        key = fields.hex_bytes("state key", call.path["key"], KEY_BYTES)
        if call.query.get("proof", "1") != "1":
            raise Rejected(Reason.MALFORMED, f"proof '{call.query['proof']}', expected 1 or no such parameter")
        if "proof" in call.query:
            return HttpReply(200, encode(self._ledger.state_receipt(key)), OCTETS)
        return HttpReply(200, self._record(key, f"no record is under {key.hex()}"), OCTETS)

    async def campaign(self, call: Call) -> HttpReply:
        """A campaign's head."""
        identifier = fields.digest("campaign", call.path["id"])
        missing = f"campaign {identifier.hex()} is not on the log"
        head = read_record(self._record(CAMPAIGN_HEAD_TABLE + identifier, missing), CampaignHead)
        named = readable(head)
        assert isinstance(named, dict)
        del named["pending"], named["undo_counts"]
        return json_reply(named)

    async def sources(self, call: Call) -> HttpReply:
        """Every registered source, by id."""
        listed = []
        for number, (key, encoded) in enumerate(self._ledger.final.state.items_with_prefix(SOURCE_TABLE)):
            if number % YIELD_EVERY == 0:
                await call.request.next_turn()
            record = read_record(encoded, SourceRecord)
            claim = record.claim
            listed.append(
                {
                    "id": key[1:].hex(),
                    "name": claim.name,
                    "author": record.author.hex(),
                    "author_name": self._ledger.epochs.member(record.author).name,
                    "licence": claim.licence,
                    "rights_basis": claim.rights_basis,
                    "purposes": list(claim.purposes),
                    "class": claim.content_class,
                    "example_count": claim.example_count,
                    "size_bytes": claim.size_bytes,
                    "reserve_below": claim.reserve_below,
                    "content_root": claim.content_root.hex(),
                    "valid_from_ms": claim.valid_from_ms,
                    "valid_until_ms": claim.valid_until_ms,
                    "registered_at_ms": record.registered_at_ms,
                    "revoked_at_ms": record.revoked_at_ms,
                    "statement": claim.statement,
                }
            )
        return json_reply({"sources": listed})

    async def policy(self, call: Call) -> HttpReply:
        """The policy in force."""
        head = read_record(self._record(POLICY_HEAD_KEY, "no policy is in force"), PolicyHead)
        missing = f"policy {head.policy.hex()} has no record"
        record = read_record(self._record(POLICY_TABLE + head.policy, missing), PolicyRecord)
        return json_reply({"id": head.policy.hex(), "since_ms": record.since_ms, "policy": readable(record.policy)})

    def _record(self, key: bytes, missing: str) -> bytes:
        encoded = self._ledger.final.state.get(key)
        if encoded is None:
            raise Rejected(Reason.NOT_FOUND, missing)
        return encoded

    # Proofs

    async def bundle(self, call: Call) -> HttpReply:
        """A bundle, as of the newest certified ledger block."""
        campaign, source, event = (fields.optional_digest(call.query, name) for name in ("campaign", "source", "event"))
        earlier = None
        if "earlier" in call.query:
            earlier = self._ledger.certified(fields.whole_number("earlier", call.query["earlier"], least=1))
        pinned_size = fields.needed_number(call.query, "size") if "size" in call.query else None
        reading = LogReading(self._ledger)

        def export() -> bytes:
            return export_bundle(
                reading,
                call.path["predicate"],
                campaign=campaign,
                source=source,
                event=event,
                earlier=earlier,
                pinned_size=pinned_size,
            )

        return HttpReply(200, await self._bundles.run(call.request, export), OCTETS)

    async def consistency(self, call: Call) -> HttpReply:
        """Proof that the log of ``second`` events extends that of ``first``."""
        first, second = fields.needed_number(call.query, "first"), fields.needed_number(call.query, "second")
        log_size = self._ledger.final.header.log_size
        if not first <= second <= log_size:
            raise Rejected(
                Reason.MALFORMED, f"sizes {first} and {second}, expected first <= second <= {log_size}, the log's"
            )
        proof = merkle.consistency_proof(first, second, self._ledger.node)
        return json_reply({"proof": [held.hex() for held in proof]})

    async def note(self, call: Call) -> HttpReply:
        """The newest signed checkpoint."""
        return HttpReply(200, self._service.checkpoint_note(), NOTE, (("cache-control", "no-cache"),))

    async def tile(self, call: Call) -> HttpReply:
        """A tile of hashes, or an entry bundle."""
        asked = parse_tile_path(f"tile/{call.path['place']}")
        level = 0 if isinstance(asked, EntryBundle) else 8 * asked.level
        start = asked.index * TILE_HASHES
        held = self._ledger.final.header.log_size >> level
        if start + asked.width > held:
            raise Rejected(Reason.NOT_FOUND, f"{held} hashes at this level, the tile ends at {start + asked.width}")
        places = range(start, start + asked.width)
        self._ledger.require_whole()
        if isinstance(asked, EntryBundle):
            entries = self._ledger.store.entries_range(places.start, places.stop)
            body = b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)
        else:
            body = b"".join(self._ledger.node(level, index) for index in places)
        return HttpReply(200, body, OCTETS, _FOREVER)

    async def genesis(self, call: Call) -> HttpReply:
        """The genesis file."""
        return HttpReply(200, self._genesis)


class LogReading:
    """One consistent reading of the log, as of the newest final ledger block: a ``bundles.LogReader``."""

    def __init__(self, ledger: Ledger) -> None:
        """Raises ``Rejected`` (``NOT_FOUND``) while nothing is final, ``Unavailable`` while the log has a gap."""
        ledger.require_whole()
        self._store: Store = ledger.store
        self._log_size = ledger.final.header.log_size
        self.genesis: Genesis = ledger.genesis
        self.header, self.certificate = ledger.final_certified
        self.links = ledger.links[: decode_header(self.header, ledger.genesis.chain_id).epoch]
        self.state = ledger.final.state
        self.node = ledger.node
        self._event = ledger.event

    def entry(self, index: int) -> bytes:
        """The entry at ``index``."""
        return self._event(index)[0]

    def portions(self, index: int) -> bytes:
        """The portions at ``index``."""
        return self._event(index)[1]

    def index_of_event(self, identifier: bytes) -> int | None:
        """Where an event stands, if it did at the time of this reading."""
        index = self._store.index_of_event(Digest(identifier))
        return index if index is not None and index < self._log_size else None

    def campaign_indexes(self, campaign: bytes) -> Sequence[int]:
        """Where the campaign's events stand."""
        found: list[int] = []
        while page := self._store.scan(CAMPAIGN_TERM + campaign, found[-1] + 1 if found else 0, MAX_LIMIT):
            found += page
        return [index for index in found if index < self._log_size]


async def _matching(
    store: Store,
    terms: Sequence[bytes],
    start: int,
    limit: int,
    log_size: int,
    next_turn: Callable[[], Awaitable[None]],
) -> tuple[list[int], int | None]:
    """At most ``limit`` indexes from ``start`` on that are under every term, and where to go on, if anywhere.

    A page may be short, even empty, and still say where to go on: seeks per request are bounded, and
    ``next_turn`` is waited for after every few of them.
    """
    if not terms:
        found = list(range(start, min(start + limit, log_size)))
        return found, found[-1] + 1 if found and found[-1] + 1 < log_size else None
    if len(terms) == 1:
        found = [index for index in store.scan(terms[0], start, limit + 1) if index < log_size]
        return found[:limit], found[limit] if len(found) > limit else None
    found = []
    at, agreed, seeks = start, 0, 0
    while len(found) <= limit and seeks < MAX_SEEKS:
        ahead = store.scan(terms[seeks % len(terms)], at, 1)
        seeks += 1
        if not ahead or ahead[0] >= log_size:
            return found[:limit], found[limit] if len(found) > limit else None
        agreed = agreed + 1 if ahead[0] == at else 1
        at = ahead[0]
        if agreed >= len(terms):
            found.append(at)
            at, agreed = at + 1, 0
        if seeks % YIELD_EVERY == 0:
            await next_turn()
    return found[:limit], found[limit] if len(found) > limit else at


def status_fields(identifier: Digest, status: EventStatus) -> dict[str, object]:
    """An event's status as JSON fields; only those that apply."""
    answer: dict[str, object] = {"id": identifier.hex(), "status": status.state.value}
    if status.index is not None:
        answer["index"] = status.index
    if status.height is not None:
        answer["height"] = status.height
    if status.reason is not None:
        answer["error"], answer["detail"] = status.reason.value, status.detail
    return answer


def readable(value: object) -> object:
    """A wire Struct as JSON values: objects with the fields' names, bytes as hex."""
    if isinstance(value, msgspec.Struct):
        return {name: readable(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [readable(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
