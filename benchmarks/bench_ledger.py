"""A whole consortium on one machine: four voting node processes, real sockets, real disks, real signatures.

Two data-source members, one governance member and one operator, made by ``node.provision``, run as
``countersign node run``; every vote is fsynced before it is sent and the log is RocksDB on disk. Clients speak
HTTP from this process over raw sockets, so that what a client costs is small beside what a node costs. Events
are ``source`` claims, signed before the clock starts.

``--profile DIR`` runs every node under cProfile and leaves DIR/NAME.pstats; figures are then worth nothing.
"""

import argparse
import hashlib
import itertools
import json
import os
import selectors
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from harness import Report, at_least, at_most, cpu_seconds, progress, resident_megabytes, run_benchmark, watch_load

from consensus import portions as p
from consensus.certificate import decode_certificate
from consensus.codec import decode, encode
from consensus.event import Kind, check_event, make_entry, pack, sign_entry
from consensus.genesis import signer_for
from consensus.identifiers import MemberId, Role
from consensus.keys import SignatureScheme, Signer
from consensus.membership import Member, committee
from consensus.receipt import MAX_RECEIPT_BYTES, Receipt, anchor, verify_receipt
from node.demo.processes import Child, Processes, countersign_command, stop_signals
from node.keystore import Keystore, read_passphrase
from node.provision import MemberRequest, Provisioned, provision

VOTERS = ("library", "archive", "council", "operator")
VERIFIER = "auditor"
BATCH_EVENTS = 500
IN_FLIGHT_EVENTS = 6_000
START_SECONDS = 30.0
FINAL_SECONDS = 120.0
FAR_FUTURE_MS = 4_000_000_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    finality_events: int
    batch_events: int
    single_events: int
    catch_up_at: int
    memory_at: int
    receipts: int


FULL = Sizes(600, 30_000, 8_000, 40_000, 100_000, 300)
QUICK = Sizes(300, 4_000, 1_500, 6_000, 6_000, 100)


class Author:
    """A data-source member's hand: makes signed sources, no two alike."""

    def __init__(self, made: Provisioned, name: str) -> None:
        files = made.members[name]
        secrets = Keystore.open(files.keystore, read_passphrase(files.passphrase, os.environ)).secrets
        self.member: Member = next(member for member in made.genesis.members if member.name == name)
        self.address = files.api
        self._signer: Signer = signer_for(SignatureScheme(self.member.scheme), secrets.identity_seed)
        self._chain_id = made.chain_id
        self._made = 0

    def sources(self, count: int) -> list[bytes]:
        """``count`` new signed source events."""
        return [self._source() for _ in range(count)]

    def _source(self) -> bytes:
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
            statement="",
        )
        salt = hashlib.sha256(f"salt {label}".encode()).digest()
        portions = p.Portions(p.DataPortion(salt, (p.DataItem(encode(claim)),)), None, None)
        entry = make_entry(self._chain_id, Kind.SOURCE, MemberId(self.member.id), portions)
        return pack(sign_entry(entry, self.member.id, self.member.role, self._signer), portions)


class Consortium:
    """The running processes, and plain HTTP to them."""

    def __init__(self, made: Provisioned, processes: Processes, profile: Path | None) -> None:
        self.made = made
        self._processes = processes
        self._profile = profile
        self.children: dict[str, Child] = {}
        self._clients: dict[str, httpx.Client] = {}

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

    def wait_final(self, size: int, names: Sequence[str] = VOTERS) -> None:
        """Until the log has ``size`` events everywhere."""
        deadline = time.monotonic() + FINAL_SECONDS
        for name in names:
            while self.log_size(name) < size:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{name} stands at {self.log_size(name)} of {size}; see {self.children[name].log}"
                    )
                time.sleep(0.02)

    def receipt(self, name: str, event_id: str) -> bytes:
        """An event's receipt, not yet verified."""
        return self._clients[name].get(f"/v1/receipts/{event_id}").raise_for_status().content

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time each node has used."""
        return {name: cpu_seconds(child.process_id) for name, child in self.children.items()}


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


def submit_batches(consortium: Consortium, authors: Sequence[Author], events: Sequence[Sequence[bytes]]) -> None:
    """Post each author's events to its own node in batches, not more on their way than the pools hold."""
    base = consortium.log_size(authors[0].member.name)
    streams = [connect(author.address) for author in authors]
    sent = final = 0
    for start in range(0, max(len(own) for own in events), BATCH_EVENTS):
        asked = []
        for stream, own in zip(streams, events, strict=True):
            batch = own[start : start + BATCH_EVENTS]
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


def measure_finality(report: Report, consortium: Consortium, authors: Sequence[Author], count: int) -> int:
    """One event at a time, each waited for; returns how many were sent."""
    streams = [connect(author.address) for author in authors]
    samples: list[float] = []
    warm_up = 20
    with watch_load() as load:
        for number in range(warm_up + count):
            author, stream = authors[number % len(authors)], streams[number % len(authors)]
            request = post("/v1/events?wait=30", author.sources(1)[0])
            started = time.perf_counter()
            stream.sendall(request)
            status, body = read_reply(stream)
            elapsed_ms = 1_000 * (time.perf_counter() - started)
            if status != 202 or json.loads(body)["status"] != "final":
                raise RuntimeError(f"an event was answered {status}: {body[:200]!r}")
            if number >= warm_up:
                samples.append(elapsed_ms)
            # No multiple of the round's own period, so that samples fall at every phase of it.
            time.sleep(0.02 + 0.001 * (number * 7 % 13))
    for stream in streams:
        stream.close()
    report.samples("finality of one event, POST to reply", samples, "ms", {0.5: at_most(60), 0.99: at_most(120)}, load)
    return warm_up + count


@contextmanager
def timed_submission(
    report: Report, consortium: Consortium, name: str, count: int, floor: float, verify_seconds: float
) -> Iterator[None]:
    """Events per second from the first byte sent until all are final at every voter."""
    size = consortium.log_size(VOTERS[0])
    before = consortium.cpu_seconds()
    with watch_load() as load:
        started = time.perf_counter()
        yield
        sent_seconds = time.perf_counter() - started
        consortium.wait_final(size + count)
        seconds = time.perf_counter() - started
    used = [consortium.cpu_seconds()[voter] - before[voter] for voter in VOTERS]
    rate = count / seconds
    report.rate(name, rate, "events/s", at_least(floor), load)
    report.rate(f"{name}: answered", count / sent_seconds, "events/s")
    report.rate(f"{name}: CPU of one node, median", 1e6 * statistics.median(used) / count, "us/event")
    cores = len(os.sched_getaffinity(0))
    report.rate(
        f"{name}: share of all cores spent on event signatures", rate * len(VOTERS) * verify_seconds / cores, "1"
    )


def measure_catch_up(report: Report, consortium: Consortium, name: str) -> None:
    """A new verifying node, from an empty directory to the head."""
    size = consortium.log_size(VOTERS[0])
    with watch_load() as load:
        consortium.start(name)
        # From its first peer on: starting Python is not catching up.
        while not _connected(consortium, name):
            time.sleep(0.002)
        first = consortium.log_size(name)
        started = time.perf_counter()
        while (now := consortium.log_size(name)) < size:
            time.sleep(0.01)
        seconds = time.perf_counter() - started
    report.rate(f"catch-up of a new node to {size} events", (now - first) / seconds, "events/s", at_least(4_000), load)
    roots = {str(consortium.status(member)["log_root"]) for member in (VOTERS[0], name)}
    if len(roots) != 1:
        raise RuntimeError("the new node's log differs")
    report.rate("memory of a node that caught up", resident_megabytes(consortium.children[name].process_id), "MB")
    consortium.stop(name)


def measure_receipts(report: Report, consortium: Consortium, events: Sequence[bytes]) -> None:
    """Receipts from a node, verified here; the certificate's size."""
    genesis = consortium.made.genesis
    trusted = anchor(genesis, consortium.made.chain_id)
    members = committee(genesis)
    receipts = [consortium.receipt(VOTERS[0], check_event(event, members).id.hex()) for event in events]
    samples = []
    with watch_load() as load:
        for encoded in receipts:
            started = time.perf_counter()
            verify_receipt(trusted, encoded)
            samples.append(1_000 * (time.perf_counter() - started))
    report.samples("receipt verification", samples, "ms", {0.5: at_most(3)}, load)
    certificate = decode_certificate(decode(receipts[0], Receipt, MAX_RECEIPT_BYTES).certificate)
    report.rate("certificate", len(certificate.signature), "bytes", at_most(96))
    report.rate("receipt", statistics.median(len(encoded) for encoded in receipts), "bytes")


def verify_cost(consortium: Consortium, events: Sequence[bytes]) -> float:
    """Seconds of the check of one event, signature and all, on this machine now."""
    members = committee(consortium.made.genesis)
    started = time.process_time()
    for event in events:
        check_event(event, members)
    return (time.process_time() - started) / len(events)


def report_memory(report: Report, consortium: Consortium, wanted: int) -> None:
    """Resident memory of the voters."""
    size = consortium.log_size(VOTERS[0])
    resident = max(resident_megabytes(consortium.children[name].process_id) for name in VOTERS)
    bound = at_most(250) if size >= wanted >= FULL.memory_at else None
    report.rate(f"memory of the largest voter at {size} events", resident, "MB", bound)
    if bound is None:
        report.note(f"memory was taken at {size} events; its floor is for {FULL.memory_at} (full mode)")


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """All figures, on one consortium."""
    sizes = QUICK if arguments.quick else FULL
    folder = Path(tempfile.mkdtemp(prefix="countersign-bench-", dir=arguments.directory))
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    roles = (Role.DATA_SOURCE, Role.DATA_SOURCE, Role.GOVERNANCE, Role.OPERATOR)
    requests = [MemberRequest(name, role) for name, role in zip(VOTERS, roles, strict=True)]
    requests.append(MemberRequest(VERIFIER, Role.VERIFIER))
    made = provision(folder / "network", "bench.example/ledger", requests, created_ms=int(time.time() * 1_000))
    try:
        with Processes() as processes:
            consortium = Consortium(made, processes, arguments.profile)
            for name in VOTERS:
                consortium.start(name)
            while any(len(_connected(consortium, name)) < len(VOTERS) - 1 for name in VOTERS):
                time.sleep(0.1)
            _measure_running(report, consortium, sizes, arguments.only)
    finally:
        shutil.rmtree(folder)


def _connected(consortium: Consortium, name: str) -> list[object]:
    peers = consortium.status(name)["peers_connected"]
    assert isinstance(peers, list)
    return peers


def _measure_running(report: Report, consortium: Consortium, sizes: Sizes, only: Sequence[str]) -> None:
    authors = [Author(consortium.made, name) for name in VOTERS[:2]]
    kept = authors[0].sources(sizes.receipts)
    verify_seconds = verify_cost(consortium, kept)
    report.rate("check of one event", 1e6 * verify_seconds, "us CPU")
    submit_batches(consortium, authors[:1], [kept])
    consortium.wait_final(len(kept))
    report.rate(
        f"memory of the largest voter at {len(kept)} events",
        max(resident_megabytes(consortium.children[name].process_id) for name in VOTERS),
        "MB",
    )
    if "finality" in only:
        measure_finality(report, consortium, authors, sizes.finality_events)
    if "batch" in only:
        signed = [author.sources(sizes.batch_events // 2) for author in authors]
        with timed_submission(
            report, consortium, "batches over HTTP until final", sizes.batch_events, 1_500, verify_seconds
        ):
            submit_batches(consortium, authors, signed)
    if "single" in only:
        events = authors[0].sources(sizes.single_events)
        with timed_submission(report, consortium, "one POST each until final", len(events), 800, verify_seconds):
            submit_each(authors[0].address, events, connections=8)
    if "receipts" in only:
        measure_receipts(report, consortium, kept)
    if "catch-up" in only:
        _grow(consortium, authors, sizes.catch_up_at)
        measure_catch_up(report, consortium, VERIFIER)
    if "memory" in only:
        _grow(consortium, authors, sizes.memory_at)
        report_memory(report, consortium, sizes.memory_at)


def _grow(consortium: Consortium, authors: Sequence[Author], size: int) -> None:
    """Bring the log to ``size`` events, a part at a time so that this process stays small."""
    while (missing := size - consortium.log_size(VOTERS[0])) > 0:
        part = min(missing, 10_000)
        submit_batches(consortium, authors, [author.sources((part + 1) // 2) for author in authors])
        consortium.wait_final(size - missing + part)
        progress(f"log at {consortium.log_size(VOTERS[0])} events")


PARTS = ("finality", "batch", "single", "receipts", "catch-up", "memory")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a consortium of four voting node processes.")
    parser.add_argument("--directory", type=Path, help="where data directories are made; their disk is measured")
    parser.add_argument("--profile", type=Path, help="run the nodes under cProfile and leave their profiles here")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    with stop_signals():  # so that a benchmark that is stopped leaves neither nodes nor their data
        return run_benchmark("ledger", measure, parser)


if __name__ == "__main__":
    sys.exit(main())
