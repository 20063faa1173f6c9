"""A node for tests: the real rules of ``consensus`` behind a real HTTP server, without peers or a disk.

It applies every event with ``transition.build``, one ledger block per submission (or holds them back while
``hold`` is set), signs grants with every member's key, and can be told to be down, busy or forgetful.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingTCPServer
from urllib.parse import parse_qs, urlsplit

from consensus_fixtures import make_genesis

from consensus import portions as p
from consensus.codec import decode, encode
from consensus.event import (
    MAX_ENTRY_BYTES,
    CheckedEvent,
    Entry,
    Kind,
    check_event,
    check_unsigned,
    event_id,
    make_entry,
    pack,
    sign_entry,
    unpack,
)
from consensus.genesis import genesis_to_json
from consensus.identifiers import MemberId, Role, View
from consensus.job_key import job_key_id
from consensus.keys import Signer
from consensus.membership import committee
from consensus.merkle import root_of
from consensus.rejection import Reason, Rejected
from consensus.reserve import bound_of
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
from consensus.transition import build, genesis_state, is_final

SALT = bytes(range(32))


class FakeNode:
    """The ledger and its switches. ``hold``: accept, finalize nothing. ``down``: close every connection."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.genesis, self.secrets = make_genesis(seed=seed)
        self.committee = committee(self.genesis)
        self.chain_id = self.genesis.chain_id
        self.state = genesis_state(self.chain_id, self.genesis.created_ms)
        self.lock = threading.RLock()
        self.events: dict[bytes, CheckedEvent] = {}
        self.pending: dict[bytes, CheckedEvent] = {}
        self.rejected: dict[bytes, Rejected] = {}
        self.order: list[CheckedEvent] = []
        self.hold = False
        self.down = False
        self.clock_ahead_ms = 0
        self.sign_grants: Callable[[], bool] = lambda: True
        self.refuse_step: Callable[[CheckedEvent], Rejected | None] = lambda event: None
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[str] = []
        self.grants: dict[bytes, dict[str, object]] = {}
        self.held_grants: list[tuple[Entry, CheckedEvent]] = []
        self.url = ""

    # What the members do.

    def member_id(self, name: str) -> MemberId:
        return next(member.id for member in self.genesis.members if member.name == name)

    def by_member(self, name: str, kind: Kind, portions: p.Portions, campaign: bytes = bytes(32)) -> bytes:
        """An event signed by one member (and, for a policy, by every governance member), on the log."""
        identifier = self.member_id(name)
        entry = make_entry(self.chain_id, kind, identifier, portions, campaign=campaign)
        role = self.committee.member(identifier).role
        entry = sign_entry(entry, identifier, role.value, self.secrets[name].identity)
        if kind is Kind.POLICY:
            entry = self.signed_by_role(entry, Role.GOVERNANCE)
        event = check_event(pack(entry, portions), self.committee)
        with self.lock:
            self.apply([event])
            if event.id in self.rejected:
                raise self.rejected[event.id]
        return event.id

    def signed_by_role(self, entry: Entry, role: Role) -> Entry:
        for member in self.committee.role_members(role):
            entry = sign_entry(entry, member.id, role.value, self.secrets[member.name].identity)
        return entry

    def policy(self, **changes: object) -> bytes:
        """Put a policy in force: everything of licence PSF-2.0 for fine-tuning, class by class."""
        fields: dict[str, object] = {
            "name": "test policy",
            "licences": ("PSF-2.0",),
            "purposes": ("fine-tuning",),
            "classes": (
                p.ClassRule("documentation", 1_000, ()),
                p.ClassRule("news", 500, (p.BlockWeight("embedding", 0),)),
            ),
            "entropy_edges_milli": (),
            "memorization_threshold_permille": 600,
            "routing_granularities": ("block",),
            "event_granularities": ("batch",),
            "author_schemes": ("ed25519", "ml-dsa-65"),
            "required_metadata": (),
            "least_sketch_rank": 0,
            "auditors": (),
            "custody": (),
            "maximum_grant_steps": 100,
            "maximum_grant_duration_ms": 3_600_000,
            "global_clipping": False,
            "revocation": "drain",
            "momentum": "carry",
            "rationale": "",
        }
        policy = p.Policy(**{**fields, **changes})  # type: ignore[arg-type]
        return self.by_member(
            "governance-1", Kind.POLICY, p.Portions(None, p.SaltedPortion(SALT, encode(policy)), None)
        )

    def source(
        self,
        name: str,
        examples: list[bytes],
        *,
        owner: str = "data-source-1",
        licence: str = "PSF-2.0",
        content_class: str = "documentation",
        purposes: tuple[str, ...] = ("fine-tuning",),
        overlap_sha256: bytes = b"",
        reserve: int = 0,
    ) -> bytes:
        """Register a source whose content tree is salted with ``SALT``, with so many examples in reserve."""
        root = root_of([p.content_leaf(p.content_salt(SALT, index), example) for index, example in enumerate(examples)])
        claim = p.SourceClaim(
            name=name,
            content_root=root,
            example_count=len(examples),
            size_bytes=sum(map(len, examples)),
            licence=licence,
            rights_basis="licence",
            purposes=purposes,
            content_class=content_class,
            valid_from_ms=0,
            valid_until_ms=2**52,
            statement="",
            overlap_sha256=overlap_sha256,
            reserve_below=bound_of(root, len(examples), reserve),
        )
        return self.by_member(
            owner, Kind.SOURCE, p.Portions(p.DataPortion(SALT, (p.DataItem(encode(claim)),)), None, None)
        )

    def revoke(self, source: bytes, owner: str = "data-source-1") -> bytes:
        item = p.DataItem(encode(p.SourceRevocation(source, "")))
        return self.by_member(owner, Kind.REVOCATION, p.Portions(p.DataPortion(SALT, (item,)), None, None))

    def delegate(self, campaign: bytes, job_key: Signer) -> bytes:
        delegation = p.Delegation(campaign, job_key_id(job_key), job_key.scheme, 0, 2**52, b"", b"")
        portions = p.Portions(None, None, p.SaltedPortion(SALT, encode(delegation)))
        return self.by_member("operator-1", Kind.DELEGATION, portions, campaign)

    # The ledger.

    @property
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.clock_ahead_ms

    def apply(self, candidates: list[CheckedEvent]) -> None:
        """One ledger block of what is admissible; the rest stays pending or is rejected for good."""
        view = self.state.header.view + 1
        built = build(
            self.state,
            candidates,
            view=view,
            leader=self.committee.leader(View(view)).id,
            timestamp_ms=self.now_ms,
            committee=self.committee,
            max_events=1_000,
            max_bytes=1 << 24,
        )
        if built.events:
            self.state = built.state
        for event in built.events:
            self.events[event.id] = event
            self.order.append(event)
            self.pending.pop(event.id, None)
        for event, refusal in built.refused:
            if is_final(refusal):
                self.rejected[event.id] = refusal
                self.pending.pop(event.id, None)

    def take(self, encoded: bytes) -> dict[str, object]:
        """Submit one event."""
        event = check_event(encoded, self.committee)
        with self.lock:
            if event.id in self.events:
                return {"id": event.id.hex(), "status": "final"}
            refusal = self.refuse_step(event)
            if refusal is not None:
                self.rejected[event.id] = refusal
            else:
                self.rejected.pop(event.id, None)
                self.pending[event.id] = event
            self.settle()
            if event.id in self.rejected:
                raise self.rejected[event.id]
            return {"id": event.id.hex(), "status": "final" if event.id in self.events else "pending"}

    def settle(self) -> None:
        if not self.hold:
            while self.pending:
                before = len(self.events)
                self.apply(list(self.pending.values()))
                if len(self.events) == before:
                    return

    def drop_pending(self) -> None:
        """As a pool does with what has waited too long."""
        with self.lock:
            for identifier in self.pending:
                self.rejected[identifier] = Rejected(Reason.SEQUENCE_GAP, "waited too long for the events before it")
            self.pending.clear()

    def release_held(self) -> None:
        with self.lock:
            self.hold = False
            self.settle()

    def head(self, campaign: bytes) -> CampaignHead:
        encoded = self.state.state.get(CAMPAIGN_HEAD_TABLE + campaign)
        if encoded is None:
            raise Rejected(Reason.NOT_FOUND, "no such campaign")
        return read_record(encoded, CampaignHead)

    def record(self, key: bytes) -> bytes:
        encoded = self.state.state.get(key)
        if encoded is None:
            raise Rejected(Reason.NOT_FOUND, "no such record")
        return encoded

    def request_grant(self, encoded: bytes) -> dict[str, object]:
        wire = unpack(encoded)
        event = check_unsigned(wire.entry, wire.portions, self.committee)
        self.grants[event.id] = {"id": event.id.hex(), "status": "gathering", "missing": ["governance-1"]}
        entry = decode(wire.entry, Entry, MAX_ENTRY_BYTES)
        self.held_grants.append((entry, event))
        self.sign_held_grants()
        return self.grants[event.id]

    def sign_held_grants(self) -> None:
        while self.sign_grants() and self.held_grants:
            entry, event = self.held_grants.pop(0)
            owners = {
                read_record(self.record(SOURCE_TABLE + item.source), SourceRecord).author
                for item in event.items
                if isinstance(item, p.GrantedSource)
            }
            for member in self.committee.voters:
                if member.role in (Role.GOVERNANCE, Role.OPERATOR) or member.id in owners:
                    entry = sign_entry(entry, member.id, member.role.value, self.secrets[member.name].identity)
            try:
                status = self.take(pack(entry, event.portions))["status"]
                self.grants[event_id(entry)] = {
                    "id": event.id.hex(),
                    "status": "final" if status == "final" else "submitted",
                }
            except Rejected as refusal:
                said = {"member": "operator-1", "error": refusal.reason.value, "detail": refusal.detail}
                self.grants[event.id] = {"id": event.id.hex(), "status": "refused", "refusals": [said]}

    # HTTP.

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        url = urlsplit(target)
        query = parse_qs(url.query)
        parts = url.path.strip("/").split("/")
        match (method, *parts):
            case ("POST", "v1", "events"):
                return 202, _json(self.take(body))
            case ("POST", "v1", "events", "batch"):
                return 200, _json({"results": [self.take_framed(frame) for frame in _frames(body)]})
            case ("GET", "v1", "events"):
                return 200, _json(self.listing(query["campaign"][0], int(query["start"][0]), int(query["limit"][0])))
            case ("GET", "v1", "events", identifier):
                deadline = time.monotonic() + float(query.get("wait", ["0"])[0])
                while True:
                    found = self.status(bytes.fromhex(identifier))
                    if found["status"] != "pending" or time.monotonic() >= deadline:
                        return 200, _json(found)
                    time.sleep(0.01)
            case ("GET", "v1", "events", identifier, "raw"):
                event = self.events[bytes.fromhex(identifier)]
                return 200, pack(event.entry, event.portions)
            case ("GET", "v1", "receipts", identifier):
                return 200, b"receipt of " + identifier.encode()
            case ("GET", "v1", "state", key):
                return 200, self.record(bytes.fromhex(key))
            case ("GET", "v1", "campaigns", identifier):
                return 200, _json(_head_json(self.head(bytes.fromhex(identifier))))
            case ("GET", "v1", "sources"):
                return 200, _json({"sources": self.source_list()})
            case ("POST", "v1", "grants"):
                return 202, _json(self.request_grant(body))
            case ("GET", "v1", "grants", identifier):
                self.sign_held_grants()
                return 200, _json(self.grants[bytes.fromhex(identifier)])
            case ("GET", "v1", "genesis"):
                return 200, genesis_to_json(self.genesis)
            case ("GET", "v1", "status"):
                return 200, _json({"log_size": len(self.order)})
            case ("GET", "v1", "checkpoint"):
                return 200, b"countersign.example/test\n0\n"
        raise Rejected(Reason.NOT_FOUND, target)

    def take_framed(self, encoded: bytes) -> dict[str, object]:
        identifier = event_id(decode(unpack(encoded).entry, Entry, MAX_ENTRY_BYTES)).hex()
        try:
            return self.take(encoded)
        except Rejected as refusal:
            said = {"error": refusal.reason.value, "detail": refusal.detail}
            return {"id": identifier, "status": "rejected", **said}

    def listing(self, campaign: str, start: int, limit: int) -> dict[str, object]:
        with self.lock:
            rows = [
                {"index": index, "id": event.id.hex(), "kind": event.entry.kind.value}
                for index, event in enumerate(self.order)
                if index >= start and event.entry.campaign.hex() == campaign
            ]
        following = rows[limit]["index"] if len(rows) > limit else None
        return {"events": rows[:limit], "next": following}

    def status(self, identifier: bytes) -> dict[str, object]:
        with self.lock:
            if identifier in self.events:
                return {"id": identifier.hex(), "status": "final", "index": 0, "height": 1}
            if identifier in self.rejected:
                refusal = self.rejected[identifier]
                said = {"error": refusal.reason.value, "detail": refusal.detail}
                return {"id": identifier.hex(), "status": "rejected", **said}
            if identifier in self.pending:
                return {"id": identifier.hex(), "status": "pending"}
        raise Rejected(Reason.NOT_FOUND, "no such event")

    def source_list(self) -> list[dict[str, object]]:
        listed = []
        for event in self.order:
            if event.entry.kind is Kind.SOURCE:
                record = read_record(self.record(SOURCE_TABLE + event.id), SourceRecord)
                listed.append(
                    {
                        "id": event.id.hex(),
                        "name": record.claim.name,
                        "author": record.author.hex(),
                        "author_name": self.committee.member(MemberId(record.author)).name,
                        "licence": record.claim.licence,
                        "purposes": list(record.claim.purposes),
                        "class": record.claim.content_class,
                        "example_count": record.claim.example_count,
                        "revoked_at_ms": record.revoked_at_ms,
                    }
                )
        return listed

    def policy_record(self) -> p.Policy:
        head = read_record(self.record(POLICY_HEAD_KEY), PolicyHead)
        return read_record(self.record(POLICY_TABLE + head.policy), PolicyRecord).policy


@contextmanager
def running_node(seed: int = 0) -> Iterator[FakeNode]:
    """A fake node on a free local port; each ``seed`` has a chain of its own."""
    node = FakeNode(seed)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # One packet for an answer: separate ones wait for a delayed acknowledgement.

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            node.requests.append(f"{self.command} {self.path}")
            if node.down:
                self.close_connection = True
                return
            headers: dict[str, str] = {}
            if node.answers:
                status, headers, reply = node.answers.pop(0)
            else:
                try:
                    status, reply = node.answer(self.command, self.path, body)
                except Rejected as refusal:
                    status = 404 if refusal.reason is Reason.NOT_FOUND else 409
                    reply = _json({"error": refusal.reason.value, "detail": refusal.detail})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = handle_one

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    node.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield node
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def endless_node(answer: str) -> Iterator[str]:
    """The URL of what is no node: its answer is ``silence``, a ``drip`` of spaces, a ``header`` or a ``flood``."""
    over = threading.Event()
    beginning = {
        "drip": b"HTTP/1.1 200 OK\r\n\r\n",
        "flood": b"HTTP/1.1 200 OK\r\n\r\n",
        "header": b"HTTP/1.1 200 OK\r\nA:",
    }

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(1 << 16)
                self.request.sendall(beginning.get(answer, b""))
                while not over.wait(0.0 if answer == "flood" else 0.05):
                    self.request.sendall({"silence": b"", "flood": bytes(1 << 16)}.get(answer, b" "))

    server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _frames(body: bytes) -> list[bytes]:
    frames = []
    while body:
        size = int.from_bytes(body[:4], "big")
        frames.append(body[4 : 4 + size])
        assert len(frames[-1]) == size
        body = body[4 + size :]
    return frames


def _head_json(head: CampaignHead) -> dict[str, object]:
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name in head.__struct_fields__
        for value in [getattr(head, name)]
        if not isinstance(value, tuple)
    }
