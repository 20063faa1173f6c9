"""Memory and finality of four voting nodes under a steady load of training steps, for as long as asked.

`make soak MINUTES=60`. One campaign's steps of 32 examples are posted one after the other, ``--rate`` a second, to the
operator's node; state grows with sources and campaigns, not with steps, so what grows here is either the log's own
bookkeeping or a leak. Every ten seconds the resident memory of each voter is noted, and one step is waited for until it
is final. Figures are of the first and the last quarter of the time after the first minute, in which caches fill.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from composite import CompositeCampaign
from consortium import Author, Consortium, connect, post, read_reply, running, wait_until_final
from harness import Report, at_most, progress, resident_megabytes, run_benchmark, watch_load

from consensus.identifiers import Role
from node.demo.processes import stop_signals
from node.provision import MemberRequest

EXAMPLES = 32
SAMPLED_SECONDS = 10.0
WARM_UP_SECONDS = 60.0
VOTERS = {
    "library": Role.DATA_SOURCE,
    "archive": Role.DATA_SOURCE,
    "council": Role.GOVERNANCE,
    "operator": Role.OPERATOR,
}


@dataclass
class Samples:
    """What was noted, in order: seconds since the start, largest voter's memory in MB, milliseconds until final."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    final_ms: list[float] = field(default_factory=list)

    def quarters(self, values: list[float]) -> tuple[list[float], list[float]]:
        """The first and the last quarter of what was noted after the warm-up; of a short run, of everything."""
        kept = [value for at, value in zip(self.seconds, values, strict=True) if at >= WARM_UP_SECONDS]
        kept = kept if len(kept) >= 8 else values
        count = max(1, len(kept) // 4)
        return kept[:count], kept[-count:]


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """The whole soak, on one consortium."""
    requests = [MemberRequest(name, role) for name, role in VOTERS.items()]
    with running("bench.example/soak", requests, directory=arguments.directory) as consortium:
        seconds = 60.0 * (0.25 if arguments.quick else arguments.minutes)
        samples, sent = soak(consortium, seconds, arguments.rate)
        report_samples(report, samples, sent, seconds)


def soak(consortium: Consortium, seconds: float, rate: float) -> tuple[Samples, int]:
    """Post steps at ``rate`` a second for so long; what was noted, and how many became final at every voter."""
    authors = [Author(consortium.made, name) for name in ("library", "council", "operator")]
    campaign = CompositeCampaign(consortium.made, *authors, batch_size=EXAMPLES)
    stream = connect(authors[-1].address)
    for event in campaign.opening:
        wait_until_final(stream, event)
    size = consortium.log_size("operator")
    samples, sent, noted = Samples(), 0, 0
    begun = time.monotonic()
    with watch_load() as load:
        while (elapsed := time.monotonic() - begun) < seconds:
            (step,) = campaign.steps(1)
            if elapsed >= noted * SAMPLED_SECONDS:
                noted += 1
                samples.final_ms.append(wait_until_final(stream, step))
                samples.seconds.append(elapsed)
                samples.megabytes.append(_largest(consortium))
                if noted % 30 == 1:
                    progress(f"{elapsed:.0f} s: {sent} steps, {samples.megabytes[-1]:.0f} MB")
            else:
                stream.sendall(post("/v1/events", step))
                status, body = read_reply(stream)
                if status != 202:
                    raise RuntimeError(f"a step was answered {status}: {body[:200]!r}")
            sent += 1
            time.sleep(max(0.0, begun + sent / rate - time.monotonic()))
    progress(f"outside load {load.outside_cores:.2f} cores")
    stream.close()
    consortium.wait_final(size + sent)
    return samples, sent


def report_samples(report: Report, samples: Samples, sent: int, seconds: float) -> None:
    """Memory and finality at the beginning and at the end."""
    report.rate("time", seconds / 60, "minutes")
    report.rate("steps final at all voters", sent / seconds, "events/s")
    early, late = (statistics.median(part) for part in samples.quarters(samples.megabytes))
    report.rate("memory of the largest voter, first quarter", early, "MB")
    report.rate("memory of the largest voter, last quarter", late, "MB", at_most(250))
    report.rate("memory of the largest voter, last quarter / first", late / early, "1")
    report.rate(
        "memory of the largest voter, for each 1,000 steps between", 1_000 * (late - early) / (0.75 * sent), "MB"
    )
    early, late = (statistics.median(part) for part in samples.quarters(samples.final_ms))
    report.rate("until final, first quarter", early, "ms")
    report.rate("until final, last quarter", late, "ms")


def _largest(consortium: Consortium) -> float:
    return max(resident_megabytes(child.process_id) for child in consortium.children.values())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Memory and finality under a steady load of steps.")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--rate", type=float, default=20.0, help="steps a second")
    parser.add_argument("--directory", type=Path, help="where data directories are made")
    with stop_signals():
        return run_benchmark("soak", measure, parser)


if __name__ == "__main__":
    sys.exit(main())
