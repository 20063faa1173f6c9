"""Nine voting node processes, three of each role with two needed: what one more voter costs, what a dead leader costs.

A leader is killed, or stopped with SIGSTOP, while the log is idle and it is its turn; the next event is sent to a
member of another role at once. *Recovery* is that event's time from POST to final. A killed leader's links
break, so that nobody waits for it; a stopped one's do not, so that the first view it does not answer in costs a
timeout. All nine share this machine's cores.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consortium import Author, Consortium, connect, running, submit_batches, wait_until_final
from harness import Report, at_most, run_benchmark, watch_load

from consensus.identifiers import VOTING_ROLES, Role
from node.demo.processes import stop_signals
from node.provision import MemberRequest

MEMBERS_PER_ROLE, NEEDED = 3, 2
SETTLE_SECONDS = 2.0
QUIET_EVENTS = 24


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """All figures, on one consortium."""
    finality_events, batch_events, deaths = (60, 1_000, 3) if arguments.quick else (300, 10_000, 9)
    requests = [
        MemberRequest(f"{role.value}-{number}", role) for role in VOTING_ROLES for number in range(MEMBERS_PER_ROLE)
    ]
    thresholds = dict.fromkeys(VOTING_ROLES, NEEDED)
    with running("bench.example/rounds", requests, thresholds=thresholds, directory=arguments.directory) as consortium:
        authors = [Author(consortium.made, request.name) for request in requests if request.role == Role.DATA_SOURCE]
        measure_finality(report, authors[0], finality_events)
        measure_throughput(report, consortium, authors, batch_events)
        measure_recovery(report, consortium, authors, "killed", deaths, _kill, _start)
        measure_recovery(report, consortium, authors, "stopped", deaths, _freeze, _thaw)


def measure_finality(report: Report, author: Author, count: int) -> None:
    """One event at a time, each waited for."""
    stream = connect(author.address)
    samples = []
    with watch_load() as load:
        for number, event in enumerate(author.sources(count)):
            samples.append(wait_until_final(stream, event))
            time.sleep(0.02 + 0.001 * (number * 7 % 13))
    stream.close()
    report.samples("finality of one event among nine voters, POST to reply", samples, "ms", load=load)


def measure_throughput(report: Report, consortium: Consortium, authors: Sequence[Author], count: int) -> None:
    """Signed events in batches until final at all nine."""
    events = [author.sources(count // len(authors)) for author in authors]
    size, total = consortium.log_size(consortium.voters[0]), sum(len(own) for own in events)
    with watch_load() as load:
        started = time.perf_counter()
        submit_batches(consortium, authors, events)
        consortium.wait_final(size + total)
        seconds = time.perf_counter() - started
    report.rate("batches over HTTP until final at nine voters", total / seconds, "events/s", load=load)


def measure_recovery(
    report: Report,
    consortium: Consortium,
    authors: Sequence[Author],
    how: str,
    deaths: int,
    take_away: Callable[[Consortium, str], None],
    bring_back: Callable[[Consortium, str], None],
) -> None:
    """Take the leader of the current view away, ask for an event, bring it back; ``deaths`` times."""
    samples = []
    with watch_load() as load:
        for _ in range(deaths):
            leader = consortium.leader()
            author = next(author for author in authors if author.member.name != leader)
            event = author.sources(1)[0]
            stream = connect(author.address)
            take_away(consortium, leader)
            samples.append(wait_until_final(stream, event) / 1_000)
            bring_back(consortium, leader)
            consortium.wait_connected()
            # Until the one that came back has caught up and votes, and timeouts are those of a network at peace again:
            # each that ran out makes the next ones longer, each ledger block shorter by an eighth of what they grew.
            for quiet in author.sources(QUIET_EVENTS):
                wait_until_final(stream, quiet)
            stream.close()
            time.sleep(SETTLE_SECONDS)
    report.samples(f"recovery after the leader was {how}", samples, "s", {0.9: at_most(1)}, load)


def _kill(consortium: Consortium, name: str) -> None:
    consortium.kill(name)


def _start(consortium: Consortium, name: str) -> None:
    consortium.start(name)


def _freeze(consortium: Consortium, name: str) -> None:
    os.kill(consortium.children[name].process_id, signal.SIGSTOP)


def _thaw(consortium: Consortium, name: str) -> None:
    os.kill(consortium.children[name].process_id, signal.SIGCONT)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a consortium of nine voting node processes.")
    parser.add_argument("--directory", type=Path, help="where data directories are made; their disk is measured")
    with stop_signals():
        return run_benchmark("rounds", measure, parser)


if __name__ == "__main__":
    sys.exit(main())
