"""The end of the demonstration: facts gathered from the nodes and the job, the closing table, what to ask next."""

import hashlib
import platform
import shlex
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from consensus.event import Kind
from consensus.rejection import Unavailable
from node.demo.consortium import COUNCIL, GUILD, LABORATORY, Claims, Consortium
from node.demo.display import NO, OK, safe
from node.demo.facts import (
    CheckFacts,
    CustodyFacts,
    FinalityFacts,
    Moment,
    PartyFacts,
    RecallFacts,
    ReplayFacts,
    ReserveFacts,
    RunFacts,
    SurveyFacts,
    ToleranceFacts,
    TracingFacts,
)
from node.demo.findings import certificate_bytes, count_events, read_campaign
from node.demo.processes import countersign_command
from node.demo.training import JobSummary


@dataclass(frozen=True, slots=True)
class Seen:
    """What the story itself saw."""

    started_at: datetime
    seconds: float
    moments: tuple[Moment, ...]
    parties: tuple[PartyFacts, ...]
    checks: tuple[CheckFacts, ...]
    recall: tuple[RecallFacts, ...]
    survey: SurveyFacts
    custody: CustodyFacts
    replay: ReplayFacts
    tracing: TracingFacts
    release_file: Path
    base_losses_file: Path


def gather(consortium: Consortium, claims: Claims, job: JobSummary, run: Seen) -> RunFacts:
    """Everything the report and the summary say.

    Raises:
        Rejected, Unavailable: as ``read_campaign``.
    """
    client = consortium.nodes[GUILD].client
    edges_milli = claims.policy.entropy_edges_milli
    campaign = read_campaign(client, consortium.committee, claims.access.campaign, run.base_losses_file, edges_milli)
    revocations = count_events(client, Kind.REVOCATION)
    certificate = certificate_bytes(client, job.release)
    status = consortium.nodes[GUILD].status()
    operator = consortium.nodes[LABORATORY].status()
    if status is None or operator is None:
        raise Unavailable("a node stopped answering")
    release = run.release_file.read_bytes()
    return RunFacts(
        chain_id=consortium.chain_id.hex(),
        origin=consortium.made.genesis.name,
        started=f"{run.started_at:%Y-%m-%d %H:%M} UTC",
        seconds=run.seconds,
        python=platform.python_version(),
        campaign=claims.access.campaign,
        policy=claims.policy_event.id,
        policy_rationale=claims.policy.rationale,
        parties=run.parties,
        tolerances=tuple(
            ToleranceFacts(
                tolerance.role.value,
                tolerance.members,
                tolerance.threshold,
                tolerance.agreement,
                tolerance.validity,
                tolerance.liveness,
            )
            for tolerance in consortium.committee.tolerances()
        ),
        sources=campaign.sources,
        steps=campaign.steps,
        grants=campaign.grants,
        moments=run.moments,
        shares=campaign.shares,
        bands=campaign.bands,
        checks=run.checks,
        recall=run.recall,
        survey=run.survey,
        reserve=reserve_of(job),
        custody=run.custody,
        decisions=campaign.decisions,
        replay=run.replay,
        tracing=run.tracing,
        ledger_blocks=status.height,
        log_size=status.log_size,
        log_root=status.log_root,
        state_root=status.state_root,
        certificate_scheme=consortium.made.genesis.certificate_scheme,
        certificate_bytes=certificate,
        final_steps=campaign.final_steps,
        rollbacks=campaign.rollbacks,
        revocations=revocations,
        finality=FinalityFacts(operator.finality.count, operator.finality.median_ms, operator.finality.p99_ms),
        step_overhead_percent=job.step_overhead_percent,
        memorization_overhead_percent=job.memorization_overhead_percent,
        paused_seconds=job.paused_seconds,
        release_file=f"release/{run.release_file.name}",
        release_bytes=len(release),
        release_sha256=hashlib.sha256(release).hexdigest(),
    )


def recalled(claims: Claims, job: JobSummary) -> tuple[RecallFacts, ...]:
    """What both models make of the planted facts, and what became of the sources that planted them."""
    fates = {claims.corpus.licence_refused: "refused", claims.corpus.purpose_refused: "refused"}
    fates[claims.corpus.revoked] = "revoked"
    return tuple(
        RecallFacts(
            source=fact.source,
            prompt=fact.prompt,
            completion=fact.completion,
            base_says=fact.base.text,
            tuned_says=fact.tuned.text,
            base_probability=fact.base.probability,
            tuned_probability=fact.tuned.probability,
            fate=fates.get(fact.source, "admitted"),
        )
        for fact in job.facts
    )


def reserve_of(job: JobSummary) -> ReserveFacts:
    """What the job's check said of the owners' reserves, last."""
    last = job.memorization_passes[-1] if job.memorization_passes else None
    return ReserveFacts(0, 0) if last is None else ReserveFacts(last.reserve_assessed, last.reserve_flagged)


def closing_rows(facts: RunFacts) -> list[tuple[str, str]]:
    """The closing table: what, and how much, as markup."""
    return [
        ("steps on the log", f"[bold]{facts.final_steps}[/]"),
        ("examples refused", f"[bold]{facts.refused_examples}[/]"),
        ("rollbacks, revocations", f"[bold]{facts.rollbacks}, {facts.revocations}[/]"),
        ("ledger blocks, events", f"[bold]{facts.ledger_blocks}, {facts.log_size}[/]"),
        ("certificate", f"[bold]{facts.certificate_bytes} bytes[/] [dim]{facts.certificate_scheme}[/]"),
        (
            "finality",
            f"[bold]{facts.finality.p50_ms:.0f} ms[/] median, {facts.finality.p99_ms:.0f} ms at the 99th "
            f"percentile [dim]({facts.finality.count} events)[/]",
        ),
        (
            "governance overhead",
            f"[bold]{facts.step_overhead_percent:.1f} %[/] of training time, "
            f"{facts.memorization_overhead_percent:.1f} % of it the memorization check",
        ),
        *_recalled(facts),
        ("strongest recital left", _recited(facts)),
        (
            "held against the sources' reserve",
            f"[bold]{facts.reserve.taken_for_recited}[/] of {facts.reserve.texts} texts that no step trained on are "
            "taken for recited",
        ),
        *_banded(facts),
        (
            "sums and sketches held by",
            f"[bold]{safe(facts.custody.custodian)}[/], {facts.custody.size_bytes / 1e6:.0f} MB: the trace reads them "
            "there",
        ),
        ("steps that came out again", f"[bold]{facts.replay.matched}[/] of {facts.replay.steps}, bit for bit"),
        ("nodes at one log", OK if facts.replicated else NO),
        *((check.predicate, OK if check.passed else f"{NO} {safe(check.answer)}") for check in facts.checks),
        ("all of it took", f"[bold]{facts.seconds:.0f} s[/]"),
    ]


def ways_to_ask(consortium: Consortium, facts: RunFacts) -> list[str]:
    """Commands to try while the nodes are kept running."""
    url = consortium.nodes[GUILD].url
    config = str(consortium.nodes[GUILD].files.config)
    source = next(source.id for source in facts.sources if source.revoked) if facts.revocations else facts.sources[0].id
    return [
        f"curl -s {url}/v1/status",
        f"curl -s {url}/v1/campaigns/{facts.campaign}",
        f"curl -s '{url}/v1/events?kind=rollback'",
        f"curl -s {url}/v1/sources",
        f"curl -s {url}/checkpoint",
        f"curl -s {url}/v1/openapi.json",
        f"curl -s '{url}/v1/bundles/source-honored?campaign={facts.campaign}&source={source}' -o honored.bundle",
        as_typed("node", "status", "--config", config),
        as_typed("source", "list", "--config", config),
        as_typed("policy", "show", "--config", config),
    ]


def as_typed(*arguments: str) -> str:
    """``countersign ARGUMENTS`` for the user's own shell, in this directory.

    The bare name if PATH leads to this very installation; else its path, from here where it is below.

    Raises:
        ConfigError: as ``countersign_command``.
    """
    own = Path(countersign_command()[0])
    named = shutil.which("countersign")
    if named is not None and Path(named).samefile(own):
        program = "countersign"
    else:
        here = Path.cwd()
        program = str(own.relative_to(here) if own.is_relative_to(here) else own)
    return shlex.join([program, *arguments])


def _recited(facts: RunFacts) -> str:
    survey = facts.survey
    text = f"[bold]{survey.highest_permille} ‰[/] [dim]of {survey.examples} examples shown[/]"
    if not survey.recited:
        return f"{text}, none above {survey.threshold_permille} ‰"
    above = f"[bold]{len(survey.recited)}[/] above {survey.threshold_permille} ‰"
    return f"{text}, {above}, which {COUNCIL} accepted on the log"


def _banded(facts: RunFacts) -> list[tuple[str, str]]:
    return [
        (
            f"kept to {safe(', '.join(band.blocks))}",
            f"[bold]{sum(band.examples.values())}[/] examples of {safe(', '.join(band.examples))}: as unlikely as "
            f"{band.from_nats:g} nats a byte or more",
        )
        for band in facts.bands
        if band.examples
    ]


def _recalled(facts: RunFacts) -> list[tuple[str, str]]:
    learned = sum(fact.tuned_says == fact.completion for fact in facts.recall if fact.fate == "admitted")
    admitted = sum(fact.fate == "admitted" for fact in facts.recall)
    refused = [fact for fact in facts.recall if fact.fate == "refused"]
    traced = [trace for trace in facts.tracing.traces if trace.fact.fate != "refused"]
    untaught = [trace for trace in facts.tracing.traces if trace.fact.fate == "refused"]
    leaked = sum(fact.tuned_says == fact.completion for fact in refused)
    return [
        ("planted facts it knows now", f"[bold]{learned}[/] of {admitted} from admitted sources"),
        ("", f"[bold]{leaked}[/] of {len(refused)} from refused sources"),
        ("traced to the right source", f"[bold]{sum(trace.right for trace in traced)}[/] of {len(traced)} facts"),
        ("", f"[bold]{sum(not trace.right for trace in untaught)}[/] of {len(untaught)} refused facts to a source"),
    ]
