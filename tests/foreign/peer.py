"""A member's node as another team would write it from ``docs/protocol.md``: nothing of ours is imported.

It joins a running consortium as a verifying member over stock libp2p (the host that py-libp2p's users get), fetches the
whole log, checks what a light client can, signs sources of its own for a data-source member and sees them become final,
and misbehaves to see what it is told. Section numbers below are those of the specification.

Use: ``python peer.py SETTING.json``; prints one JSON document of what it found. The setting::

    {"genesis": PATH, "chain_id": HEX,
     "verifier": {"name": NAME, "transport_seed": HEX, "listen": [HOST, PORT]},
     "addresses": {NAME: [HOST, PORT], ...},
     "author": {"name": NAME, "identity_seed": HEX, "api": URL}}
"""

import hashlib
import itertools
import json
import logging
import os
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio
from blspy import G1Element, G2Element, PopSchemeMPL
from libp2p import new_host
from libp2p.crypto.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from libp2p.crypto.keys import KeyPair
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr
from nacl.signing import SigningKey, VerifyKey

HEARTBEAT, VOTES, EVENTS, REQUEST, RESPONSE, REFUSAL = range(6)
ZERO = bytes(32)
PENALTY_SECONDS = 1.2
"""For a second a member that broke the framing is not admitted (section 21)."""


# §2 and §3: bytes, digests, trees.


def pack(value: object) -> bytes:
    """MessagePack in its shortest form."""
    return msgspec.msgpack.encode(value)


def unpack(encoded: bytes) -> Any:
    """The value of canonical bytes."""
    value = msgspec.msgpack.decode(encoded)
    require(pack(value) == encoded, "bytes are canonical")
    return value


def name(tag: str) -> bytes:
    return b"countersign/v1/" + tag.encode()


def digest(tag: str, *parts: bytes) -> bytes:
    """``H`` of the specification."""
    framed = (struct.pack(">Q", len(part)) + part for part in (name(tag), *parts))
    return hashlib.sha256(b"".join(framed)).digest()


def message(tag: str, *parts: bytes) -> bytes:
    """``M`` of the specification."""
    return name(tag) + b"\x00" + digest(tag, *parts)


def u64(number: int) -> bytes:
    return struct.pack(">Q", number)


def leaf(content: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + content).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def split(count: int) -> int:
    return 1 << ((count - 1).bit_length() - 1)


def root(leaves: list[bytes]) -> bytes:
    """RFC 9162 §2.1.1, by its recursive definition."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    middle = split(len(leaves))
    return node(root(leaves[:middle]), root(leaves[middle:]))


def path_of(leaves: list[bytes], index: int) -> list[bytes]:
    """RFC 9162 §2.1.3.1, by its recursive definition."""
    if len(leaves) == 1:
        return []
    middle = split(len(leaves))
    if index < middle:
        return [*path_of(leaves[:middle], index), root(leaves[middle:])]
    return [*path_of(leaves[middle:], index - middle), root(leaves[:middle])]


def root_above(start: bytes, index: int, size: int, path: list[bytes]) -> bytes:
    """The root that an inclusion proof gives, by the same recursion as ``path_of``."""
    if size == 1:
        require(not path, "an inclusion proof has as many hashes as its place calls for")
        return start
    require(bool(path) and len(path[-1]) == 32, "an inclusion proof has as many hashes as its place calls for")
    middle = split(size)
    if index < middle:
        return node(root_above(start, index, middle, path[:-1]), path[-1])
    return node(path[-1], root_above(start, index - middle, size - middle, path[:-1]))


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise SystemExit(f"does not hold: {rule}")


# §4: members and genesis.


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    role: str
    scheme: int
    identity_key: str
    transport_key: str
    log_key: str
    bls_key: str
    bls_possession: str

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.identity_key)

    @property
    def id(self) -> bytes:
        return digest("member", bytes([self.scheme]), self.key)

    @property
    def peer(self) -> ID:
        return ID.from_pubkey(Ed25519PublicKey.from_bytes(bytes.fromhex(self.transport_key)))

    def structure(self) -> list[object]:
        keys = (self.identity_key, self.transport_key, self.log_key, self.bls_key, self.bls_possession)
        return [self.name, self.role, self.scheme, *map(bytes.fromhex, keys)]


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    threshold: int

    def structure(self) -> list[object]:
        return [self.role, self.threshold]


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    threshold: int
    group_key: str
    share_keys: list[str]
    possession: str

    def structure(self) -> list[object]:
        share_keys = [bytes.fromhex(key) for key in self.share_keys]
        return [self.role, self.threshold, bytes.fromhex(self.group_key), share_keys, bytes.fromhex(self.possession)]


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    max_block_events: int
    max_event_bytes: int
    heartbeat_ms: int
    max_clock_skew_ms: int
    censorship_ms: int

    def structure(self) -> list[object]:
        return [
            self.max_block_events,
            self.max_event_bytes,
            self.heartbeat_ms,
            self.max_clock_skew_ms,
            self.censorship_ms,
        ]


class Genesis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    name: str
    nonce: str
    created_ms: int
    certificate_scheme: str
    members: list[Member]
    thresholds: list[Threshold]
    groups: list[Group]
    parameters: Parameters

    @property
    def chain_id(self) -> bytes:
        head = ["genesis", self.version, self.name, bytes.fromhex(self.nonce), self.created_ms, self.certificate_scheme]
        lists = [[one.structure() for one in held] for held in (self.members, self.thresholds, self.groups)]
        return digest("genesis", pack([*head, *lists, self.parameters.structure()]))

    @property
    def voters(self) -> list[Member]:
        return [member for member in self.members if member.role != "verifier"]

    def by_id(self, identifier: bytes) -> Member:
        found = [member for member in self.members if member.id == identifier]
        require(len(found) == 1, f"{identifier.hex()} is a member")
        return found[0]

    def named(self, wanted: str) -> Member:
        return next(member for member in self.members if member.name == wanted)


# §7: certificates.


def check_certificate(encoded: bytes, header: bytes, genesis: Genesis) -> None:
    """One pairing equation against the sum of the three group keys (``bls-threshold``)."""
    tag, scheme, view, block, epoch, signature = unpack(encoded)
    held = read_header(header)
    require((tag, scheme) == ("certificate", "bls-threshold"), "the certificate is of the genesis's scheme")
    require(block == digest("block", header) and (view, epoch) == (held.view, held.epoch), "it is of this very header")
    signed = message("certificate", genesis.chain_id, u64(epoch), u64(view), block)
    keys = [G1Element.from_bytes(bytes.fromhex(group.group_key)) for group in genesis.groups]
    joint = keys[0] + keys[1] + keys[2]
    require(PopSchemeMPL.verify(joint, signed, G2Element.from_bytes(signature)), "every role finalized it")


# §8 and §9: events.


@dataclass(frozen=True)
class Event:
    """A signed event that was checked: its entry's bytes, its id, and how it was signed."""

    entry: bytes
    id: bytes
    leaf: bytes
    author: str
    in_batch: bool


def check_source(encoded: bytes, genesis: Genesis) -> Event:
    """A ``source`` event: everything of its check that needs no state."""
    entry, portions = unpack(encoded)
    fields = unpack(entry)
    require(fields[:4] == ["event", 1, genesis.chain_id, "source"], "an event of this chain, a source")
    author_id, campaign, sequence, attempt, data, governance, operation, signatures = fields[4:]
    require((campaign, sequence, attempt) == (ZERO, 0, 0), "a source stands outside campaigns")
    author = genesis.by_id(author_id)
    require(author.role == "data-source", "a data-source member claims sources")
    (salt, items), other, another = unpack(portions)
    require((other, another, governance, operation) == (None, None, b"", b""), "a source has a data portion alone")
    require(len(items) == 1 and items[0][1] == [], "a source is one item")
    require(data == source_commitment(salt, items[0][0]), "the entry commits to its portion")
    identifier = event_id(fields)
    ((signer, signature),) = signatures
    require(signer == author_id, "the author has signed")
    signed = signature_message(genesis.chain_id, identifier)
    check_field(author.key, signed, signature)
    return Event(entry, identifier, leaf(entry), author.name, len(signature) > 64)


def event_id(fields: list[Any]) -> bytes:
    return digest("event", pack([*fields[:-1], []]))


def signature_message(chain_id: bytes, identifier: bytes) -> bytes:
    return message("event-signature", chain_id, b"source", struct.pack(">I", 1), b"data-source", identifier)


def check_field(key: bytes, signed: bytes, signature: bytes) -> None:
    """A signature field: plain, or of a batch."""
    if len(signature) == 64:
        VerifyKey(key).verify(signed, signature)
        return
    way = signature[64:]
    index, size = struct.unpack(">II", way[:8])
    require(2 <= size <= 65_536 and index < size and len(way) % 32 == 8, "a field of a batch names a place in it")
    path = [way[start : start + 32] for start in range(8, len(way), 32)]
    VerifyKey(key).verify(message("event-batch", way[4:8], root_above(leaf(signed), index, size, path)), signature[:64])


def source_commitment(salt: bytes, content: bytes) -> bytes:
    item_salt = digest("salt", salt, b"item", u64(0))
    items_root = root([digest("source-entry", item_salt, content)])
    return digest("portion", b"source", b"data-source", items_root, u64(1))


def make_sources(genesis: Genesis, author: Member, key: SigningKey, names: list[str]) -> list[bytes]:
    """Signed sources, all under one signature where they are several."""
    made: list[tuple[list[Any], bytes]] = []
    for called in names:
        claim = [
            called,
            hashlib.sha256(called.encode()).digest(),
            10,
            1_000,
            "CC-BY-4.0",
            "ownership",
            ["research"],
            "open",
            0,
            4_000_000_000_000,
            "claimed by a foreign implementation",
            b"",
            0,
        ]
        salt = os.urandom(32)
        portions = pack([[salt, [[pack(claim), []]]], None, None])
        commitment = source_commitment(salt, pack(claim))
        head = ["event", 1, genesis.chain_id, "source", author.id, ZERO, 0, 0, commitment, b"", b"", []]
        made.append((head, portions))
    messages = [signature_message(genesis.chain_id, event_id(head)) for head, _ in made]
    leaves = [leaf(one) for one in messages]
    size = struct.pack(">I", len(made))
    if len(made) == 1:
        fields = [key.sign(messages[0]).signature]
    else:
        signature = key.sign(message("event-batch", size, root(leaves))).signature
        fields = [
            signature + struct.pack(">I", index) + size + b"".join(path_of(leaves, index)) for index in range(len(made))
        ]
    return [
        pack([pack([*head[:-1], [[author.id, one]]]), portions])
        for (head, portions), one in zip(made, fields, strict=True)
    ]


# §14 and §15: the log.


@dataclass(frozen=True)
class Header:
    chain_id: bytes
    epoch: int
    height: int
    view: int
    leader: bytes
    parent: bytes
    parent_view: int
    timestamp_ms: int
    body_root: bytes
    event_count: int
    log_size: int
    log_root: bytes
    state_root: bytes


def read_header(encoded: bytes) -> Header:
    tag, version, *rest = unpack(encoded)
    require((tag, version) == ("block", 1), "a header of version 1")
    return Header(*rest)


def genesis_header(genesis: Genesis) -> bytes:
    """The header before the first: known, never voted on."""
    body_root, state_root = digest("block-body"), digest("state-empty")
    numbers = [genesis.created_ms, body_root, 0, 0, root([]), state_root]
    return pack(["block", 1, genesis.chain_id, 0, 0, 0, ZERO, ZERO, 0, *numbers])


class Log:
    """What was fetched and held: events in order, and the header they lead to."""

    def __init__(self, genesis: Genesis) -> None:
        self.genesis = genesis
        self.events: list[Event] = []
        self.head = genesis_header(genesis)

    @property
    def height(self) -> int:
        return read_header(self.head).height

    def take(self, header: bytes, body: bytes, events: list[bytes]) -> None:
        """Append a ledger block, by the rules of ``apply`` that need no state."""
        held, before = read_header(header), read_header(self.head)
        require(held.chain_id == self.genesis.chain_id and held.epoch == 0, "a ledger block of this chain and epoch")
        require(held.height == before.height + 1, "heights follow each other")
        require(held.parent == digest("block", self.head), "a header names its parent")
        require(held.parent_view == before.view < held.view, "views rise")
        require(held.timestamp_ms >= before.timestamp_ms, "time does not go back")
        voters = self.genesis.voters
        require(held.leader == voters[(held.view - 1) % len(voters)].id, "its leader's turn")
        tag, leaves = unpack(body)
        require(tag == "body" and held.body_root == digest("block-body", *leaves), "the body is the header's")
        checked = [check_source(event, self.genesis) for event in events]
        require([event.leaf for event in checked] == leaves, "the events are the body's")
        require(held.event_count == len(leaves), "they are as many as counted")
        self.events += checked
        require(held.log_size == len(self.events), "the log grew by them")
        require(held.log_root == root([event.leaf for event in self.events]), "the log's root is RFC 9162's")
        self.head = header


# §18: receipts.


def check_receipt(encoded: bytes, genesis: Genesis) -> Event:
    """Returns the entry's event; its portion is not in a receipt."""
    tag, version, entry, index, path, header, certificate, links = unpack(encoded)
    require((tag, version, links) == ("receipt", 1, []), "a receipt of epoch 0")
    held = read_header(header)
    require(held.chain_id == genesis.chain_id, "a receipt of this chain")
    check_certificate(certificate, header, genesis)
    require(root_above(leaf(entry), index, held.log_size, path) == held.log_root, "the entry is on the log")
    fields = unpack(entry)
    require(fields[2] == genesis.chain_id and fields[3] == "source", "an entry of this chain")
    author = genesis.by_id(fields[4])
    ((signer, signature),) = fields[-1]
    require(signer == author.id and author.role == "data-source", "the author has signed")
    check_field(author.key, signature_message(genesis.chain_id, event_id(fields)), signature)
    return Event(entry, event_id(fields), leaf(entry), author.name, len(signature) > 64)


# §21: between nodes.


class Refused(Exception):
    """The node's answer was a refusal; its text is the reason."""


class Ended(Exception):
    """The node closed the connection."""


class Link:
    """One stream: frames in both directions, heartbeats while it is open."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._unread = b""
        self._numbers = itertools.count(1)
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._came = trio.Event()
        self.ended = trio.Event()
        self.heard: list[bytes] = []
        """Payloads of kind 1."""

    async def run(self) -> None:
        """Read until the node ends the stream."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            try:
                while True:
                    kind, length = struct.unpack(">BI", await self._exactly(5))
                    payload = await self._exactly(length)
                    if kind == VOTES:
                        self.heard.append(payload)
                    if kind in (RESPONSE, REFUSAL):
                        self._answers[struct.unpack(">Q", payload[:8])[0]] = (kind, payload[8:])
                        came, self._came = self._came, trio.Event()
                        came.set()
            except Exception:  # whatever libp2p raises when the other side is gone
                self.ended.set()
                self._came.set()
            nursery.cancel_scope.cancel()

    async def send(self, kind: int, payload: bytes) -> None:
        await self.write(struct.pack(">BI", kind, len(payload)) + payload)

    async def write(self, frame: bytes) -> None:
        try:
            await self._stream.write(frame)
        except Exception as error:  # whatever libp2p raises when the other side is gone
            raise Ended from error

    async def ask(self, request: object) -> Any:
        """The answer's structure.

        Raises:
            Refused: with the node's reason. Ended: the node closed the connection.
        """
        return unpack(await self.ask_bytes(pack(request)))

    async def ask_bytes(self, request: bytes) -> bytes:
        number = next(self._numbers)
        await self.send(REQUEST, u64(number) + request)
        with trio.fail_after(10):
            while number not in self._answers:
                if self.ended.is_set():
                    raise Ended
                await self._came.wait()
        kind, answer = self._answers.pop(number)
        if kind == REFUSAL:
            raise Refused(answer.decode())
        return answer

    async def _beat(self) -> None:
        with suppress(Ended):
            while True:
                await trio.sleep(1)
                await self.send(HEARTBEAT, b"")

    async def _exactly(self, count: int) -> bytes:
        while len(self._unread) < count:
            received = await self._stream.read(count - len(self._unread))
            if not received:
                raise Ended
            self._unread += received
        taken, self._unread = self._unread[:count], self._unread[count:]
        return taken


@dataclass(frozen=True)
class Place:
    """Who this peer is and where: a verifying member, and the addresses of all."""

    genesis: Genesis
    own: Member
    seed: bytes
    listen: tuple[str, int]
    addresses: dict[str, tuple[str, int]]

    def protocol(self, stream: str) -> str:
        return f"/countersign/1/{self.genesis.chain_id.hex()[:32]}/{stream}"

    def dials(self, other: Member) -> bool:
        """Of two members the one with the lower peer id dials."""
        return self.own.peer.to_bytes() < other.peer.to_bytes()

    def host(self) -> Any:
        key = Ed25519PrivateKey.new(self.seed)
        return new_host(KeyPair(key, key.get_public_key()), muxer_preference="YAMUX")


def multiaddress(address: tuple[str, int]) -> Multiaddr:
    return Multiaddr(f"/ip4/{address[0]}/tcp/{address[1]}")


@asynccontextmanager
async def link_to(place: Place, other: Member, stream: str, protocol: str | None = None) -> AsyncIterator[Link]:
    """A connection of its own to a member that this peer dials, with one stream."""
    async with AsyncExitStack() as stack:
        host = place.host()
        await stack.enter_async_context(host.run(listen_addrs=[]))
        await host.connect(PeerInfo(other.peer, [multiaddress(place.addresses[other.name])]))
        opened = await host.new_stream(other.peer, [protocol or place.protocol(stream)])
        nursery = await stack.enter_async_context(trio.open_nursery())
        link = Link(opened)
        nursery.start_soon(link.run)
        yield link
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def accepted(place: Place, streams: tuple[str, ...]) -> AsyncIterator[dict[str, Link]]:
    """The first link for each stream that members open which dial this peer."""
    send, receive = trio.open_memory_channel[tuple[str, Any]](64)
    async with AsyncExitStack() as stack:
        host = place.host()

        def handler_of(stream: str) -> Any:
            async def handle(opened: Any) -> None:
                await send.send((stream, opened))
                await trio.sleep_forever()

            return handle

        for stream in streams:
            host.set_stream_handler(place.protocol(stream), handler_of(stream))
        await stack.enter_async_context(host.run(listen_addrs=[multiaddress(place.listen)]))
        nursery = await stack.enter_async_context(trio.open_nursery())
        links: dict[str, Link] = {}
        with trio.fail_after(30):
            while len(links) < len(streams):
                stream, opened = await receive.receive()
                if stream not in links:
                    links[stream] = Link(opened)
                    nursery.start_soon(links[stream].run)
        yield links
        nursery.cancel_scope.cancel()


async def fetch(link: Link, log: Log) -> None:
    """Catch up with the certified log of the member at the other end."""
    while True:
        tag, blocks, headers, certificate, height = await link.ask(["get-blocks", log.height + 1])
        require(tag == "blocks", "the answer is to get-blocks")
        for header, body, events in blocks:
            log.take(header, body, events)
        if not blocks:
            return
        above = log.head
        for header in headers:
            require(read_header(header).parent == digest("block", above), "headers lead to the certified one")
            above = header
        check_certificate(certificate, above, log.genesis)
        if log.height >= height:
            return


# §16: votes, as a member hears them.


def check_votes(payloads: list[bytes], genesis: Genesis) -> int:
    """Every vote that was heard is signed by the voter that it names; how many there were."""
    heard = [unpack(payload) for payload in payloads]
    votes = [fields for fields in heard if fields[0] == "vote"]
    for fields in votes:
        version, chain_id, epoch, kind, view, block, voter, share, signature = fields[1:]
        require((version, chain_id, epoch) == (1, genesis.chain_id, 0), "a vote of this chain and epoch")
        require(kind in (1, 2, 3) and view > 0 and (block == ZERO) == (kind == 2), "a vote is of one of three kinds")
        require((share == b"") == (kind != 3), "finalize votes carry a share")
        VerifyKey(genesis.by_id(voter).key).verify(message("vote", pack([*fields[:-1], b""])), signature)
    return len(votes)


# What is done with all that.


class Author:
    """A data-source member's hand: its key, and its node over HTTP (``/v1/openapi.json``)."""

    def __init__(self, genesis: Genesis, called: str, seed: bytes, api: str) -> None:
        self._genesis = genesis
        self._member = genesis.named(called)
        self._key = SigningKey(seed)
        self._client = httpx.Client(base_url=api, timeout=30, trust_env=False)

    def sources(self, *names: str) -> list[bytes]:
        return make_sources(self._genesis, self._member, self._key, list(names))

    def submit(self, event: bytes) -> str:
        answer = self._client.post("/v1/events", content=event)
        return str(answer.json().get("id") or answer.json()["error"])

    def wait_final(self, identifier: bytes) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            answer = self._client.get(f"/v1/events/{identifier.hex()}?wait=10")
            if answer.status_code == 200 and answer.json()["status"] == "final":
                return
            time.sleep(0.05)
        raise SystemExit(f"event {identifier.hex()} did not become final")

    def receipt(self, identifier: bytes) -> bytes:
        return self._client.get(f"/v1/receipts/{identifier.hex()}").content


async def take_part(place: Place, link: Link, author: Author) -> dict[str, object]:
    """Claim sources over HTTP and by gossip, see all final, and hold their receipts and the log to one another."""
    genesis = place.genesis
    posted = [*author.sources("alone"), *author.sources("first", "second", "third")]
    gossiped = author.sources("whispered")
    for event in posted:
        require(author.submit(event) == check_source(event, genesis).id.hex(), "the node names the event's id")
    await link.send(EVENTS, b"".join(struct.pack(">I", len(event)) + event for event in gossiped))
    claimed = [check_source(event, genesis) for event in (*posted, *gossiped)]
    for claim in claimed:
        await trio.to_thread.run_sync(author.wait_final, claim.id)
        receipt = check_receipt(author.receipt(claim.id), genesis)
        require(receipt.entry == claim.entry, "the receipt is of this event")
    log = Log(genesis)
    with trio.fail_after(20):  # what is final at the author's node is so at this one a moment later
        while not {claim.leaf for claim in claimed} <= {event.leaf for event in log.events}:
            await fetch(link, log)
            await trio.sleep(0.05)
    tag, events = await link.ask(["get-events", [claim.leaf for claim in claimed]])
    require(tag == "events" and sorted(events) == sorted([*posted, *gossiped]), "events come as they were sent")
    return {
        "log_size": len(log.events),
        "log_root": read_header(log.head).log_root.hex(),
        "authors": sorted({event.author for event in log.events}),
        "in_batches": sum(event.in_batch for event in log.events),
        "claimed": [claim.id.hex() for claim in claimed],
    }


async def outcome(act: Any) -> str:
    """What the node does about something: a refusal's text, or how the connection ends."""
    try:
        with trio.move_on_after(5) as limit:
            await act()
        return "no answer" if limit.cancelled_caught else "answered"
    except Refused as refusal:
        return str(refusal)
    except Ended:
        return "connection ended"


async def misbehave(place: Place, other: Member, author: Author) -> dict[str, str]:
    """What a member is told that breaks the rules of section 21, each time on a connection of its own."""
    told: dict[str, str] = {}
    wrong = {
        "integer not in its shortest form": b"\x92" + pack("get-blocks") + b"\xcd\x00\x01",
        "unknown request": pack(["get-everything", 1]),
        "field of another type": pack(["get-blocks", "1"]),
        "height below zero": pack(["get-blocks", -1]),
        "bytes after the request": pack(["get-blocks", 1]) + b"\xc0",
        "no MessagePack at all": b"\xc1",
        "nothing": b"",
    }
    async with link_to(place, other, "bulk") as link:
        for what, request in wrong.items():
            told[what] = await outcome(lambda request=request: link.ask_bytes(request))
        (event,) = author.sources("altered")
        altered = event.replace(b"altered", b"ALTERED")
        told["altered event by HTTP"] = author.submit(altered)
        told["no event by HTTP"] = author.submit(b"no event")
        await link.send(EVENTS, struct.pack(">I", len(altered)) + altered)
        told["a good request after all of these"] = await outcome(lambda: link.ask(["get-blocks", 1]))
    for what, frame in {
        "frame beyond the bound": struct.pack(">BI", EVENTS, 1 << 31),
        "frame of an unknown kind": struct.pack(">BI", 9, 0),
        "vote on the bulk stream": struct.pack(">BI", VOTES, 1) + b"\x90",
    }.items():
        async with link_to(place, other, "bulk") as link:
            await link.write(frame)
            told[what] = await outcome(lambda link=link: link.ask(["get-blocks", 1]))
        await trio.sleep(PENALTY_SECONDS)
    elsewhere = place.protocol("bulk").replace("/1/", "/1/00")
    stranger = replace(place, seed=os.urandom(32))
    for what, who, protocol in (("another chain's protocol", place, elsewhere), ("unknown key", stranger, None)):
        try:
            with trio.fail_after(10):
                async with link_to(who, other, "bulk", protocol) as link:
                    told[what] = await outcome(lambda link=link: link.ask(["get-blocks", 1]))
        except Exception:  # whatever the stock host raises
            told[what] = "no connection"
    return told


async def main(setting: dict[str, Any]) -> dict[str, object]:
    """All of it."""
    genesis = msgspec.json.decode(Path(setting["genesis"]).read_bytes(), type=Genesis)
    require(genesis.chain_id.hex() == setting["chain_id"], "the genesis is that of the pinned chain id")
    own, author = setting["verifier"], setting["author"]
    addresses = {called: (host, port) for called, (host, port) in setting["addresses"].items()}
    place = Place(
        genesis, genesis.named(own["name"]), bytes.fromhex(own["transport_seed"]), tuple(own["listen"]), addresses
    )
    hand = Author(genesis, author["name"], bytes.fromhex(author["identity_seed"]), author["api"])
    dialled = [member for member in genesis.voters if place.dials(member)]
    found: dict[str, object] = {"dials": [member.name for member in dialled]}
    if len(dialled) < len(genesis.voters):
        async with accepted(place, ("votes", "bulk")) as links:
            log = Log(genesis)
            await fetch(links["bulk"], log)
            found["log_of_who_dialled"] = len(log.events)
    if dialled:
        async with link_to(place, dialled[0], "bulk") as link, link_to(place, dialled[0], "votes") as votes:
            found |= await take_part(place, link, hand)
            found["votes_heard"] = check_votes(votes.heard, genesis)
        found["told"] = await misbehave(place, dialled[0], hand)
    return found


if __name__ == "__main__":
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    with open(sys.argv[1], encoding="utf-8") as opened:
        print(json.dumps(trio.run(main, json.load(opened)), indent=1))
