"""What a run of the demonstration established: the one structure that report and summary are made from.

Every figure comes from the run: from the rights-holder's node, from the job's own summary, or from what the
story saw happen. Plain values only, so that a report can be made without a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PartyFacts:
    """A member and where its node stood at the end."""

    name: str
    role: str
    votes: bool
    height: int
    log_root: str
    state_root: str


@dataclass(frozen=True, slots=True)
class ToleranceFacts:
    """What a voting role can bear; see ``consensus.membership.Tolerance``."""

    role: str
    members: int
    threshold: int
    agreement: int
    validity: int
    liveness: int


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A source and its use in the campaign, as the state map counts it. ``refused`` is by reason.

    Of its ``examples`` so many are in ``reserve``, from which no step may train.
    """

    name: str
    id: str
    owner: str
    licence: str
    purposes: tuple[str, ...]
    content_class: str
    examples: int
    reserve: int
    revoked: bool
    presented: int
    admitted: int
    refused: Mapping[str, int]
    discarded: int


@dataclass(frozen=True, slots=True)
class StepFacts:
    """A step event. ``discarded``: a rollback undid it. ``loss`` in nats per byte, None if nothing was admitted."""

    step: int
    attempt: int
    log_index: int
    loss: float | None
    presented: int
    admitted: int
    refused: int
    memorization_permille: int
    discarded: bool


@dataclass(frozen=True, slots=True)
class GrantFacts:
    """A grant on the log: its steps, how many sources it names, who signed it."""

    first_step: int
    last_step: int
    sources: int
    signers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """Something worth telling. ``kind`` is one of ``MOMENT_KINDS``; ``step`` None outside the training."""

    kind: str
    seconds: float
    step: int | None
    text: str


MOMENT_KINDS = (
    "consortium",
    "claim",
    "refusal",
    "rollback",
    "revocation",
    "killed",
    "back",
    "grant",
    "finding",
    "decision",
    "custody",
    "release",
)


Shown = tuple[str, int]
"""A source by name, and an entropy band of its examples."""


@dataclass(frozen=True, slots=True)
class BlockShare:
    """A parameter block, and each source's share of the example weight that was let through to it, in permille."""

    block: str
    permille: Mapping[Shown, int]


@dataclass(frozen=True, slots=True)
class BandFacts:
    """An entropy band above the lowest: from which base loss up, in nats a byte, and what it let through.

    ``examples`` are those admitted in steps that stand, each once, by source; ``blocks`` the parameter blocks that they
    were let through to.
    """

    band: int
    from_nats: float
    examples: Mapping[str, int]
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CustodyFacts:
    """Who else than the operator holds the campaign's sums and sketches, and how much of them."""

    custodian: str
    windows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CheckFacts:
    """One run of ``countersign verify``: the steps it numbered, and the command to run it again."""

    predicate: str
    question: str
    about: str
    answer: str
    steps: tuple[tuple[int, str, str], ...]
    """Number, status, text."""
    command: str
    bundle_bytes: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the answer is yes."""
        return self.answer == "yes"


@dataclass(frozen=True, slots=True)
class RecitedFacts:
    """An example that the tuned model recites above the policy's threshold, by its number in its source."""

    source: str
    owner: str
    example: int
    signal_permille: int


@dataclass(frozen=True, slots=True)
class SurveyFacts:
    """The survey before the release: how many examples were assessed, and which are recited, the strongest first."""

    evaluation: str
    examples: int
    highest_permille: int
    threshold_permille: int
    recited: tuple[RecitedFacts, ...]


@dataclass(frozen=True, slots=True)
class ReserveFacts:
    """What the check said of texts that no step trained on, as the last pass over the manifest ended."""

    texts: int
    taken_for_recited: int


@dataclass(frozen=True, slots=True)
class DecisionFacts:
    """A decision on the log about the campaign: whose, what, and why."""

    signers: tuple[str, ...]
    outcome: str
    rationale: str


@dataclass(frozen=True, slots=True)
class RecallFacts:
    """A planted fact, asked of the base model and of the tuned one, greedily and by mean probability per byte."""

    source: str
    prompt: str
    completion: str
    base_says: str
    tuned_says: str
    base_probability: float
    tuned_probability: float
    fate: str
    """``admitted``, ``refused`` or ``revoked``."""


@dataclass(frozen=True, slots=True)
class ReplayFacts:
    """The fine-tune run again: how many steps came out as recorded, the first difference or nothing, and the source
    that a second replay left out."""

    steps: int
    matched: int
    difference: str
    without: str
    command: str
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether every step came out bit for bit."""
        return self.matched == self.steps


@dataclass(frozen=True, slots=True)
class RankedFacts:
    """A source that ``countersign trace`` ranks: ``z`` as ``docs/attribution.md`` has it, ``entry`` of its claim."""

    source: str
    owner: str
    z: float
    admitted: int
    entry: int
    grants: int
    revoked: bool


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What the log answers about one planted fact as an output."""

    fact: RecallFacts
    made_likelier: bool
    """Whether the fine-tune made it likelier than the base model had it."""
    shaped_here: bool
    """Whether it did, and a source stands out."""
    ranked: tuple[RankedFacts, ...]
    """The source that stands out most first."""
    without_says: str
    """What the model of the replay without a source says instead."""
    without_probability: float
    """And how likely it finds the completion, per byte."""

    @property
    def leads_to(self) -> str:
        """The source that stands out; empty where none does."""
        return self.ranked[0].source if self.shaped_here else ""

    @property
    def right(self) -> bool:
        """Whether it leads to the source that planted the fact, or, where that was never admitted, to none."""
        return self.leads_to == ("" if self.fact.fate == "refused" else self.fact.source)


@dataclass(frozen=True, slots=True)
class TracingFacts:
    """The questions asked of the log about outputs: their answers, and the command to ask the first again."""

    traces: tuple[TraceFacts, ...]
    command: str
    controls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FinalityFacts:
    """Milliseconds from an event's arrival at the operator's node to its finality, over ``count`` events."""

    count: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class RunFacts:
    """All of it."""

    chain_id: str
    origin: str
    started: str
    seconds: float
    python: str
    campaign: str
    policy: str
    policy_rationale: str
    parties: tuple[PartyFacts, ...]
    tolerances: tuple[ToleranceFacts, ...]
    sources: tuple[SourceFacts, ...]
    steps: tuple[StepFacts, ...]
    grants: tuple[GrantFacts, ...]
    moments: tuple[Moment, ...]
    shares: tuple[BlockShare, ...]
    bands: tuple[BandFacts, ...]
    checks: tuple[CheckFacts, ...]
    recall: tuple[RecallFacts, ...]
    survey: SurveyFacts
    reserve: ReserveFacts
    custody: CustodyFacts
    decisions: tuple[DecisionFacts, ...]
    replay: ReplayFacts
    tracing: TracingFacts
    ledger_blocks: int
    log_size: int
    log_root: str
    state_root: str
    certificate_scheme: str
    certificate_bytes: int
    final_steps: int
    rollbacks: int
    revocations: int
    finality: FinalityFacts
    step_overhead_percent: float
    memorization_overhead_percent: float
    """The memorization check's part of ``step_overhead_percent``."""
    paused_seconds: float
    release_file: str
    release_bytes: int
    release_sha256: str

    @property
    def refused_examples(self) -> int:
        """Examples kept from the optimizer, over all sources."""
        return sum(sum(source.refused.values()) for source in self.sources)

    @property
    def replicated(self) -> bool:
        """Whether all nodes stood at one height with one log root and one state root."""
        return len({(party.height, party.log_root, party.state_root) for party in self.parties}) == 1

    @property
    def passed(self) -> bool:
        """Whether everything that was checked holds."""
        return (
            self.replicated and bool(self.checks) and all(check.passed for check in self.checks) and self.replay.exact
        )


def summary_of(facts: RunFacts) -> dict[str, object]:
    """``summary.json``."""
    roles: dict[str, int] = {}
    for party in facts.parties:
        roles[party.role] = roles.get(party.role, 0) + 1
    return {
        "passed": facts.passed,
        "chain_id": facts.chain_id,
        "nodes": len(facts.parties),
        "voting_nodes": sum(party.votes for party in facts.parties),
        "roles": roles,
        "replicated": facts.replicated,
        "ledger_blocks": facts.ledger_blocks,
        "log_size": facts.log_size,
        "log_root": facts.log_root,
        "state_root": facts.state_root,
        "certificate_scheme": facts.certificate_scheme,
        "certificate_bytes": facts.certificate_bytes,
        "campaign": facts.campaign,
        "policy": facts.policy,
        "sources": {source.name: source.id for source in facts.sources},
        "grants": len(facts.grants),
        "steps": facts.final_steps,
        "presented_examples": sum(source.presented for source in facts.sources),
        "admitted_examples": sum(source.admitted for source in facts.sources),
        "refused_examples": facts.refused_examples,
        "rollbacks": facts.rollbacks,
        "revocations": facts.revocations,
        "finality_ms_p50": round(facts.finality.p50_ms, 1),
        "finality_ms_p99": round(facts.finality.p99_ms, 1),
        "finality_events": facts.finality.count,
        "step_overhead_percent": facts.step_overhead_percent,
        "memorization_overhead_percent": facts.memorization_overhead_percent,
        "paused_seconds": facts.paused_seconds,
        "checks": {check.predicate: check.passed for check in facts.checks},
        "recall": {
            recall.source: {
                "fate": recall.fate,
                "base_probability": round(recall.base_probability, 4),
                "tuned_probability": round(recall.tuned_probability, 4),
            }
            for recall in facts.recall
        },
        "memorization": {
            "examples": facts.survey.examples,
            "highest_signal_permille": facts.survey.highest_permille,
            "threshold_permille": facts.survey.threshold_permille,
            "recited": [
                {"source": each.source, "example": each.example, "signal_permille": each.signal_permille}
                for each in facts.survey.recited
            ],
            "reserve": {
                "examples": {source.name: source.reserve for source in facts.sources if source.reserve},
                "assessed": facts.reserve.texts,
                "taken_for_recited": facts.reserve.taken_for_recited,
            },
        },
        "bands": [
            {
                "band": band.band,
                "from_nats": band.from_nats,
                "examples": dict(band.examples),
                "blocks": list(band.blocks),
            }
            for band in facts.bands
        ],
        "custody": {
            "custodian": facts.custody.custodian,
            "windows": facts.custody.windows,
            "size_bytes": facts.custody.size_bytes,
        },
        "decisions": [
            {"by": list(each.signers), "outcome": each.outcome, "rationale": each.rationale} for each in facts.decisions
        ],
        "replay": {
            "steps": facts.replay.steps,
            "matched": facts.replay.matched,
            "without": facts.replay.without,
        },
        "traces": {
            trace.fact.source: {
                "fate": trace.fact.fate,
                "shaped_here": trace.shaped_here,
                "leads_to": trace.leads_to,
                "probability_without": round(trace.without_probability, 4),
                "z": {ranked.source: round(ranked.z, 2) for ranked in trace.ranked},
            }
            for trace in facts.tracing.traces
        },
        "release": {
            "file": facts.release_file,
            "size_bytes": facts.release_bytes,
            "sha256": facts.release_sha256,
        },
        "seconds": round(facts.seconds, 1),
    }
