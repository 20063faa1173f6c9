"""A whole consortium on one machine: four voting node processes, real sockets, real disks, real signatures.

Two data-source members, one governance member and one operator, made by ``node.provision``, run as
``countersign node run``; every vote is fsynced before it is sent and the log is RocksDB on disk. Clients speak
HTTP from this process over raw sockets, so that what a client costs is small beside what a node costs. Events
are ``source`` claims, signed before the clock starts.

``--profile DIR`` runs every node under cProfile and leaves DIR/NAME.pstats; figures are then worth nothing.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from composite import EXAMPLES_A_STEP, CompositeCampaign
from consortium import (
    ASKED_AGAIN_SECONDS,
    BATCH_EVENTS,
    Author,
    Consortium,
    connect,
    frames,
    post,
    read_reply,
    running,
    submit_batches,
    submit_each,
    wait_until_final,
)
from harness import Report, at_least, at_most, progress, resident_megabytes, run_benchmark, watch_load

from consensus.certificate import decode_certificate
from consensus.codec import decode
from consensus.epochs import anchor
from consensus.event import check_event
from consensus.identifiers import Role
from consensus.membership import committee
from consensus.receipt import MAX_RECEIPT_BYTES, Receipt, verify_receipt
from node.demo.processes import stop_signals
from node.provision import MemberRequest

VOTERS = ("library", "archive", "council", "operator")
VERIFIER, SNAPSHOT_VERIFIER = "auditor", "guild"
OTHER_BATCHES = (10, 100)
STATEMENT_BYTES = (0, 2_000, 8_000)
SIGNED_TOGETHER, CHECKED_EVENTS = 32, 300
LOAD_BATCH_EVENTS, LOAD_PERIOD_SECONDS = 100, 0.1
SINGLE_CONNECTIONS = 32
"""Each waits for its answer before it sends again: with 8 of them a tenth of the cores' time is nobody's."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    finality_events: int
    batch_events: int
    single_events: int
    catch_up_at: int
    memory_at: int
    receipts: int
    composite_steps: int


FULL = Sizes(600, 30_000, 8_000, 40_000, 100_000, 300, 200)
QUICK = Sizes(300, 4_000, 1_500, 6_000, 6_000, 100, 40)
WARM_UP_STEPS = 5


def measure_finality(report: Report, consortium: Consortium, authors: Sequence[Author], count: int) -> int:
    """One event at a time, each waited for; returns how many were sent."""
    streams = [connect(author.address) for author in authors]
    samples: list[float] = []
    warm_up = 20
    with watch_load() as load:
        for number in range(warm_up + count):
            author, stream = authors[number % len(authors)], streams[number % len(authors)]
            elapsed_ms = wait_until_final(stream, author.sources(1)[0])
            if number >= warm_up:
                samples.append(elapsed_ms)
            # No multiple of the round's own period, so that samples fall at every phase of it.
            time.sleep(0.02 + 0.001 * (number * 7 % 13))
    for stream in streams:
        stream.close()
    report.samples("finality of one event, POST to reply", samples, "ms", {0.5: at_most(35), 0.99: at_most(70)}, load)
    return warm_up + count


def measure_finality_under_load(report: Report, consortium: Consortium, authors: Sequence[Author], count: int) -> None:
    """The same while another client sends 1,000 events a second in batches, whether they become final or not."""
    size = consortium.log_size(VOTERS[0])
    probes = authors[1].sources(count)
    batches = [authors[0].sources(LOAD_BATCH_EVENTS) for _ in range(10 * count)]
    done, sent = threading.Event(), 0

    def load_it() -> None:
        nonlocal sent
        stream = connect(authors[0].address)
        started = time.monotonic()
        for number, batch in enumerate(batches):
            if done.wait(max(0.0, started + number * LOAD_PERIOD_SECONDS - time.monotonic())):
                break
            stream.sendall(post("/v1/events/batch", frames(batch)))
            status, body = read_reply(stream)
            if status != 200:
                raise RuntimeError(f"a batch was answered {status}: {body[:200]!r}")
            sent += len(batch)
        stream.close()

    client = threading.Thread(target=load_it)
    samples: list[float] = []
    stream = connect(authors[1].address)
    with watch_load() as load:
        started = time.monotonic()
        client.start()
        time.sleep(1)
        for number, probe in enumerate(probes):
            samples.append(wait_until_final(stream, probe))
            time.sleep(0.02 + 0.001 * (number * 7 % 13))
        done.set()
        client.join()
        seconds = time.monotonic() - started
    stream.close()
    consortium.wait_final(size + sent + count)
    report.rate("load sent meanwhile", sent / seconds, "events/s")
    name = f"finality at {LOAD_BATCH_EVENTS / LOAD_PERIOD_SECONDS:g} events/s by batches, POST to reply"
    report.samples(name, samples, "ms", {0.5: at_most(120), 0.99: at_most(250)}, load)


def measure_sizes(report: Report, consortium: Consortium, authors: Sequence[Author], count: int) -> None:
    """Throughput in batches against the size of an event, and of a batch."""
    shapes = [(statement_bytes, BATCH_EVENTS) for statement_bytes in STATEMENT_BYTES]
    shapes += [(0, batch_events) for batch_events in OTHER_BATCHES]
    for statement_bytes, batch_events in shapes:
        events = [author.sources(count // 2, statement_bytes) for author in authors]
        size = consortium.log_size(VOTERS[0])
        with watch_load() as load:
            started = time.perf_counter()
            submit_batches(consortium, authors, events, batch_events)
            consortium.wait_final(size + 2 * (count // 2))
            seconds = time.perf_counter() - started
        name = f"batches of {batch_events} events of {len(events[0][0])} bytes until final"
        report.rate(name, 2 * (count // 2) / seconds, "events/s", load=load)


@contextmanager
def timed_submission(
    report: Report, consortium: Consortium, name: str, count: int, floor: float, check_seconds: float
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
        f"{name}: share of all cores spent on event signatures", rate * len(VOTERS) * check_seconds / cores, "1"
    )


def measure_batches(
    report: Report, consortium: Consortium, authors: Sequence[Author], count: int, together: int
) -> None:
    """Throughput in batches of events, ``together`` of which bear one signature."""
    signed = [author.sources(count // 2, together=together) for author in authors]
    name = "batches over HTTP until final"
    if together > 1:
        name += f", {together} events to a signature"
    check_seconds = check_cost(consortium, signed[0][:CHECKED_EVENTS])
    with timed_submission(report, consortium, name, count, 2_500, check_seconds):
        submit_batches(consortium, authors, signed)


def measure_joining(report: Report, consortium: Consortium, name: str) -> None:
    """A new verifying node that joins at a snapshot: until it is at the head, and until its log is whole."""
    size = consortium.log_size(VOTERS[0])
    consortium.begins_at_snapshot(name)
    with watch_load() as load:
        consortium.start(name)
        while not consortium.peers_connected(name):
            time.sleep(0.002)
        started = time.perf_counter()
        while consortium.log_size(name) < size:
            time.sleep(0.005)
        report.rate(f"at the head of {size} events by a snapshot", 1_000 * (time.perf_counter() - started), "ms")
        while consortium.status(name)["log_missing"]:
            time.sleep(0.02)
        seconds = time.perf_counter() - started
    report.rate(f"a whole log of {size} events below a snapshot", size / seconds, "events/s", at_least(6_000), load)
    if len({str(consortium.status(member)["log_root"]) for member in (VOTERS[0], name)}) != 1:
        raise RuntimeError("the new node's log differs")
    consortium.stop(name)


def measure_catch_up(report: Report, consortium: Consortium, name: str) -> None:
    """A new verifying node, from an empty directory to the head, by replaying the log."""
    size = consortium.log_size(VOTERS[0])
    with watch_load() as load:
        consortium.start(name)
        # From its first peer on: starting Python is not catching up.
        while not consortium.peers_connected(name):
            time.sleep(0.002)
        first = consortium.log_size(name)
        started = time.perf_counter()
        while (now := consortium.log_size(name)) < size:
            time.sleep(ASKED_AGAIN_SECONDS)
        seconds = time.perf_counter() - started
    report.rate(f"catch-up of a new node to {size} events", (now - first) / seconds, "events/s", at_least(6_000), load)
    roots = {str(consortium.status(member)["log_root"]) for member in (VOTERS[0], name)}
    if len(roots) != 1:
        raise RuntimeError("the new node's log differs")
    report.rate("memory of a node that caught up", resident_megabytes(consortium.children[name].process_id), "MB")
    consortium.stop(name)


def measure_composite(report: Report, consortium: Consortium, steps: int) -> None:
    """Step events that each list thousands of examples, handed to the operator's node: examples until final."""
    data_source, _, governance, operator = (Author(consortium.made, name) for name in VOTERS)
    campaign = CompositeCampaign(consortium.made, data_source, governance, operator)
    stream = connect(operator.address)
    for event in campaign.opening:
        wait_until_final(stream, event)
    events = campaign.steps(steps + WARM_UP_STEPS)
    size = consortium.log_size(VOTERS[0])
    for event in events[:WARM_UP_STEPS]:
        wait_until_final(stream, event)
    stream.close()
    before = consortium.cpu_seconds()
    with watch_load() as load:
        started = time.perf_counter()
        submit_batches(consortium, [operator], [events[WARM_UP_STEPS:]])
        consortium.wait_final(size + len(events))
        seconds = time.perf_counter() - started
    used = [consortium.cpu_seconds()[voter] - before[voter] for voter in VOTERS]
    rate = steps * EXAMPLES_A_STEP / seconds
    report.rate(
        f"composite events of {EXAMPLES_A_STEP} examples until final", rate, "examples/s", at_least(200_000), load
    )
    report.rate(
        f"composite events, {len(events[0])} bytes each: CPU of one node, median",
        1e3 * statistics.median(used) / steps,
        "ms/event",
    )


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


def check_cost(consortium: Consortium, events: Sequence[bytes]) -> float:
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
    """All figures; ``OF_THEIR_OWN`` have a consortium each."""
    sizes = QUICK if arguments.quick else FULL
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    roles = (Role.DATA_SOURCE, Role.DATA_SOURCE, Role.GOVERNANCE, Role.OPERATOR)
    requests = [MemberRequest(name, role) for name, role in zip(VOTERS, roles, strict=True)]
    requests += [MemberRequest(name, Role.VERIFIER) for name in (VERIFIER, SNAPSHOT_VERIFIER)]
    for parts in (set(PARTS) - OF_THEIR_OWN, *({part} for part in sorted(OF_THEIR_OWN))):
        if wanted := parts.intersection(arguments.only):
            with running(
                "bench.example/ledger", requests, directory=arguments.directory, profile=arguments.profile
            ) as consortium:
                _measure_running(report, consortium, sizes, wanted)


def _measure_running(report: Report, consortium: Consortium, sizes: Sizes, only: Collection[str]) -> None:
    authors = [Author(consortium.made, name) for name in VOTERS[:2]]
    if "sizes" in only:
        measure_sizes(report, consortium, authors, sizes.batch_events // 5)
        return
    if "together" in only:
        measure_batches(report, consortium, authors, sizes.batch_events, SIGNED_TOGETHER)
        return
    if "composite" in only:
        measure_composite(report, consortium, sizes.composite_steps)
        return
    kept = authors[0].sources(sizes.receipts)
    check_seconds = check_cost(consortium, kept)
    report.rate("check of one event", 1e6 * check_seconds, "us CPU")
    submit_batches(consortium, authors[:1], [kept])
    consortium.wait_final(len(kept))
    report.rate(
        f"memory of the largest voter at {len(kept)} events",
        max(resident_megabytes(consortium.children[name].process_id) for name in VOTERS),
        "MB",
    )
    if "finality" in only:
        measure_finality(report, consortium, authors, sizes.finality_events)
    if "loaded" in only:
        measure_finality_under_load(report, consortium, authors, sizes.finality_events // 2)
    if "batch" in only:
        measure_batches(report, consortium, authors, sizes.batch_events, 1)
    if "single" in only:
        events = authors[0].sources(sizes.single_events)
        with timed_submission(report, consortium, "one POST each until final", len(events), 1_000, check_seconds):
            submit_each(authors[0].address, events, SINGLE_CONNECTIONS)
    if "receipts" in only:
        measure_receipts(report, consortium, kept)
    if "catch-up" in only:
        _grow(consortium, authors, sizes.catch_up_at)
        measure_catch_up(report, consortium, VERIFIER)
        measure_joining(report, consortium, SNAPSHOT_VERIFIER)
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


PARTS = ("finality", "loaded", "sizes", "batch", "together", "single", "composite", "receipts", "catch-up", "memory")

OF_THEIR_OWN = {"sizes", "together", "composite"}
"""What stays in the nodes' memory or log and is no part of the rest."""


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
