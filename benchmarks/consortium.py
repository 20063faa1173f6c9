"""A whole consortium on this machine, for benchmarks: its processes, plain HTTP to them, and signed events to send.

Clients speak HTTP from the benchmark's process over raw sockets, so that what a client costs is small beside what
a node costs. Events are ``source`` claims of any size, signed before a clock starts.
"""

import hashlib
import itertools
import json
import os
import selectors
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from harness import cpu_seconds

from consensus import portions as p
from consensus.codec import encode
from consensus.event import Kind, make_entry, pack, sign_entries
from consensus.identifiers import MemberId, Role, View
from consensus.keys import SignatureScheme, Signer, signer_for
from consensus.membership import Member, committee
from node.demo.processes import Child, Processes, countersign_command
from node.keystore import Keystore, read_passphrase
from node.provision import MemberRequest, Provisioned, provision

BATCH_EVENTS = 500
IN_FLIGHT_EVENTS = 6_000
START_SECONDS = 60.0
FINAL_SECONDS = 120.0
ASKED_AGAIN_SECONDS = 0.05
"""Not oftener: to answer takes a node a millisecond or two, which it would lack for what is measured."""
FAR_FUTURE_MS = 4_000_000_000_000


class Author:
    """A member's hand: its ``signer``; of a data-source member also signed sources, no two alike."""

    def __init__(self, made: Provisioned, name: str) -> None:
        files = made.members[name]
        secrets = Keystore.open(files.keystore, read_passphrase(files.passphrase, os.environ)).secrets
        self.member: Member = next(member for member in made.genesis.members if member.name == name)
        self.address = files.api
        self.signer: Signer = signer_for(SignatureScheme(self.member.scheme), secrets.identity_seed)
        self._chain_id = made.chain_id
        self._made = 0

    def sources(self, count: int, statement_bytes: int = 0, together: int = 1) -> list[bytes]:
        """``count`` new signed source events of some 600 bytes and ``statement_bytes`` (at most 8,192) more.

        ``together``: how many of them bear one signature.
        """
        events: list[bytes] = []
        while len(events) < count:
            claims = [self._source("x" * statement_bytes) for _ in range(min(together, count - len(events)))]
            entries = [
                make_entry(self._chain_id, Kind.SOURCE, MemberId(self.member.id), portions) for portions in claims
            ]
            signed = sign_entries(entries, self.member.id, self.member.role, self.signer)
            events += [pack(entry, portions) for entry, portions in zip(signed, claims, strict=True)]
        return events

    def _source(self, statement: str) -> p.Portions:
        self._made += 1
        label = f"{self.member.name} {self._made}"
        claim = p.SourceClaim(
            name=f"source {label}",
            content_root=hashlib.sha256(f"content {label}".encode()).digest(),
            example_count=10,
            size_bytes=1_000,
            licence="PSF-2.0",
            rights_basis="owner",
            purposes=("research",),
            content_class="documentation",
            valid_from_ms=0,
            valid_until_ms=FAR_FUTURE_MS,
            statement=statement,
            overlap_sha256=b"",
            reserve_below=0,
        )
        salt = hashlib.sha256(f"salt {label}".encode()).digest()
        return p.Portions(p.DataPortion(salt, (p.DataItem(encode(claim)),)), None, None)


class Consortium:
    """The running processes, and plain HTTP to them."""

    def __init__(self, made: Provisioned, processes: Processes, profile: Path | None) -> None:
        self.made = made
        self._processes = processes
        self._profile = profile
        self.children: dict[str, Child] = {}
        self._clients: dict[str, httpx.Client] = {}

    @property
    def voters(self) -> tuple[str, ...]:
        """Names of the voting members, in the leaders' order."""
        return tuple(voter.name for voter in committee(self.made.genesis).voters)

    def leader(self) -> str:
        """Who leads the view that the first running voter is in."""
        asked = next(name for name in self.voters if name in self.children)
        return committee(self.made.genesis).leader(View(int(str(self.status(asked)["view"])))).name

    def start(self, name: str) -> None:
        """Start a member's node and wait until it answers."""
        files = self.made.members[name]
        command = countersign_command("node", "run", "--config", str(files.config))
        if self._profile is not None:
            command = [sys.executable, "-m", "cProfile", "-o", str(self._profile / f"{name}.pstats"), *command]
        child = self._processes.start(name, command, files.directory / "node.log")
        self.children[name] = child
        self._clients[name] = httpx.Client(base_url=files.api_url, timeout=60.0, trust_env=False)
        deadline = time.monotonic() + START_SECONDS
        while True:
            child.check()
            try:
                if self._clients[name].get("/v1/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not answer within {START_SECONDS} s; see {child.log}")
            time.sleep(0.05)

    def begins_at_snapshot(self, name: str) -> None:
        """Configure a member that has not started yet to join at a snapshot."""
        config = self.made.members[name].config
        text = config.read_text(encoding="utf-8").replace("[node]\n", '[node]\nsync = "snapshot"\n')
        config.write_text(text, encoding="utf-8")

    def wait_connected(self) -> None:
        """Until every running voter has a link to every other."""
        running = [name for name in self.voters if name in self.children]
        deadline = time.monotonic() + START_SECONDS
        for name in running:
            while not set(running) - {name} <= set(self.peers_connected(name)):
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{name} reached only {self.peers_connected(name)}; see {self.children[name].log}"
                    )
                time.sleep(0.05)

    def peers_connected(self, name: str) -> list[str]:
        """Names of the members a node has a link to."""
        peers = self.status(name)["peers_connected"]
        assert isinstance(peers, list)
        return peers

    def kill(self, name: str) -> None:
        """``kill -9`` a member's node."""
        self._clients.pop(name).close()
        self._processes.kill(self.children.pop(name))

    def stop(self, name: str) -> None:
        """Stop a member's node."""
        self._clients.pop(name).close()
        self._processes.stop(self.children.pop(name))

    def status(self, name: str) -> dict[str, object]:
        """A node's own account."""
        answer = self._clients[name].get("/v1/status").raise_for_status().json()
        assert isinstance(answer, dict)
        return answer

    def log_size(self, name: str) -> int:
        """How many events are final at a node."""
        return int(str(self.status(name)["log_size"]))

    def wait_final(self, size: int) -> None:
        """Until the log has ``size`` events at every voter that runs."""
        deadline = time.monotonic() + FINAL_SECONDS
        for name in (voter for voter in self.voters if voter in self.children):
            while self.log_size(name) < size:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{name} stands at {self.log_size(name)} of {size}; see {self.children[name].log}"
                    )
                time.sleep(ASKED_AGAIN_SECONDS)

    def receipt(self, name: str, event_id: str) -> bytes:
        """An event's receipt, not yet verified."""
        return self._clients[name].get(f"/v1/receipts/{event_id}").raise_for_status().content

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time each node has used."""
        return {name: cpu_seconds(child.process_id) for name, child in self.children.items()}


@contextmanager
def running(
    origin: str,
    requests: Sequence[MemberRequest],
    *,
    thresholds: Mapping[Role, int] | None = None,
    directory: Path | None = None,
    profile: Path | None = None,
) -> Iterator[Consortium]:
    """A consortium whose voters run and are connected, under ``directory``; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-", dir=directory))
    try:
        made = provision(
            folder / "network", origin, requests, thresholds=thresholds, created_ms=int(time.time() * 1_000)
        )
        with Processes() as processes:
            consortium = Consortium(made, processes, profile)
            for name in consortium.voters:
                consortium.start(name)
            consortium.wait_connected()
            yield consortium
    finally:
        shutil.rmtree(folder)


def wait_until_final(stream: socket.socket, event: bytes) -> float:
    """Post one event and wait for it; milliseconds from the first byte sent to the last of the reply."""
    request = post("/v1/events?wait=30", event)
    started = time.perf_counter()
    stream.sendall(request)
    status, body = read_reply(stream)
    elapsed_ms = 1_000 * (time.perf_counter() - started)
    if status != 202 or json.loads(body)["status"] != "final":
        raise RuntimeError(f"an event was answered {status}: {body[:200]!r}")
    return elapsed_ms


def connect(address: object) -> socket.socket:
    """A keep-alive connection to ``host:port``."""
    host, _, port = str(address).rpartition(":")
    stream = socket.create_connection((host, int(port)), timeout=60)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def post(path: str, body: bytes) -> bytes:
    """A request's bytes."""
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/octet-stream\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def read_reply(stream: socket.socket) -> tuple[int, bytes]:
    """Status and body of a whole reply with a content length."""
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += _some(stream)
    head, body = received[:end].lower(), received[end + 4 :]
    start = head.index(b"content-length:") + 15
    length = int(head[start:].split(b"\r\n", 1)[0])
    while len(body) < length:
        body += _some(stream)
    return int(head.split(b" ", 2)[1]), body


def _some(stream: socket.socket) -> bytes:
    received = stream.recv(1 << 18)
    if not received:
        raise RuntimeError("the node closed the connection")
    return received


def frames(events: Sequence[bytes]) -> bytes:
    """A batch's body."""
    return b"".join(len(event).to_bytes(4, "big") + event for event in events)


def submit_batches(
    consortium: Consortium,
    authors: Sequence[Author],
    events: Sequence[Sequence[bytes]],
    batch_events: int = BATCH_EVENTS,
) -> None:
    """Post each author's events to its own node in batches, not more on their way than the pools hold."""
    base = consortium.log_size(authors[0].member.name)
    streams = [connect(author.address) for author in authors]
    sent = final = 0
    for start in range(0, max(len(own) for own in events), batch_events):
        asked = []
        for stream, own in zip(streams, events, strict=True):
            batch = own[start : start + batch_events]
            if batch:
                stream.sendall(post("/v1/events/batch", frames(batch)))
                asked.append(stream)
                sent += len(batch)
        for stream in asked:
            status, body = read_reply(stream)
            if status != 200:
                raise RuntimeError(f"a batch was answered {status}: {body[:200]!r}")
            refused = [result for result in json.loads(body)["results"] if result["status"] == "rejected"]
            if refused:
                raise RuntimeError(f"{len(refused)} events of a batch were refused: {refused[0]}")
        while sent - final > IN_FLIGHT_EVENTS:
            final = consortium.log_size(authors[0].member.name) - base
            if sent - final > IN_FLIGHT_EVENTS:
                time.sleep(0.02)
    for stream in streams:
        stream.close()


def submit_each(address: object, events: Sequence[bytes], connections: int) -> None:
    """One POST for each event over keep-alive connections, one request on its way on each."""
    waiting = iter(events)
    with selectors.DefaultSelector() as selector:
        for first in itertools.islice(waiting, connections):
            stream = connect(address)
            stream.sendall(post("/v1/events", first))
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                status, body = read_reply(ready)
                if status != 202:
                    raise RuntimeError(f"an event was answered {status}: {body[:200]!r}")
                event = next(waiting, None)
                if event is None:
                    selector.unregister(ready)
                    ready.close()
                else:
                    ready.sendall(post("/v1/events", event))
