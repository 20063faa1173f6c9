"""What a round costs each voter with 4, 9 and 12 of them: real engines, signatures and certificates, in one process.

The simulation of the tests (`tests/simulation`) carries the messages under a virtual clock, so that only processor
time is measured: every voter checks every vote, proposal and certificate by itself, signs its own, and combines the
certificate. Beside it the check and the admission of one event. Both together give how many events a second so many
voters could take on the cores of this machine, if the network, the disk and HTTP cost nothing.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

from consortium import Author
from harness import Report, run_benchmark, watch_load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from simulation.cryptography import Keys
from simulation.plan import Plan
from simulation.simulator import Simulation

from consensus.effect import Message
from consensus.event import check_event
from consensus.genesis import MemberPlan, generate_genesis
from consensus.identifiers import VOTING_ROLES, Role, View
from consensus.membership import committee
from consensus.transition import apply, build, genesis_state
from node.provision import MemberRequest, provision

COUNTS = ((2, 1, 1), (3, 3, 3), (4, 4, 4))
EVENTS_A_BLOCK = 1_000


class EveryVoterChecks(Keys):
    """Real keys, and no voter spared a check that another made."""

    def check(self, message: Message) -> None:
        self._check(message)


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """An event, then rounds of so many voters."""
    event_seconds = measure_event(report, 200 if arguments.quick else EVENTS_A_BLOCK)
    for counts in COUNTS:
        measure_rounds(report, counts, 2_000 if arguments.quick else 10_000, event_seconds)


def measure_event(report: Report, count: int) -> float:
    """CPU seconds of a voter for one event: its check, and its part of applying a ledger block."""
    roles = {"library": Role.DATA_SOURCE, "council": Role.GOVERNANCE, "operator": Role.OPERATOR}
    with tempfile.TemporaryDirectory() as folder:
        requests = [MemberRequest(name, role) for name, role in roles.items()]
        made = provision(Path(folder) / "network", "bench.example/voters", requests, created_ms=0)
        events = Author(made, "library").sources(count)
    members = committee(made.genesis)
    start = genesis_state(made.chain_id, 0)
    leader = members.leader(View(1)).id
    begun = time.process_time()
    checked = [check_event(event, members) for event in events]
    checked_seconds = (time.process_time() - begun) / count
    built = build(
        start, checked, view=1, leader=leader, timestamp_ms=1, committee=members, max_events=count, max_bytes=1 << 30
    )
    begun = time.process_time()
    apply(start, built.state.header, built.body, checked, members)
    applied_seconds = (time.process_time() - begun) / count
    report.rate("check of one event", 1e6 * checked_seconds, "us CPU")
    report.rate("its part of applying a ledger block", 1e6 * applied_seconds, "us CPU")
    return checked_seconds + applied_seconds


def measure_rounds(report: Report, counts: tuple[int, int, int], simulated_ms: int, event_seconds: float) -> None:
    """Rounds of so many voters for as long as that on the virtual clock."""
    plans = [
        MemberPlan(f"{role.value}-{number}", role, hashlib.sha256(f"{role} {number}".encode()).digest())
        for role, count in zip(VOTING_ROLES, counts, strict=True)
        for number in range(count)
    ]
    genesis, secrets = generate_genesis(
        name="bench.example/voters", nonce=bytes(32), created_ms=0, plans=plans, certificate_scheme="bls-threshold"
    )
    simulation = Simulation(
        1,
        Plan(counts=counts, end_ms=simulated_ms),
        cryptography=EveryVoterChecks(genesis, secrets),
        voters=committee(genesis),
    )
    begun = time.process_time()
    with watch_load() as load:
        simulation.run()
    used = time.process_time() - begun
    blocks, voters = max(simulation.final), sum(counts)
    block_seconds = used / blocks / voters
    of = f"{voters} voters, simulated"
    report.rate(f"{of}: CPU of one voter for each ledger block", 1_000 * block_seconds, "ms CPU", load=load)
    bound = len(os.sched_getaffinity(0)) / (voters * (event_seconds + block_seconds / EVENTS_A_BLOCK))
    report.rate(f"{of}: most events/s that all cores could take, {EVENTS_A_BLOCK} a ledger block", bound, "events/s")


def main() -> int:
    """The command line."""
    return run_benchmark("voters", measure, argparse.ArgumentParser(description="Measure rounds of 4, 9, 12 voters."))


if __name__ == "__main__":
    sys.exit(main())
