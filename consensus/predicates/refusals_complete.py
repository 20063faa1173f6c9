"""``refusals-complete``: every example a campaign was presented with was admitted or refused, for the true reason.

The examples presented at each step follow from the campaign's manifest and seed alone (``sampler.py``), and which
of them are of a source's reserve from its claim (``reserve.py``), so the verifier makes the lists itself and holds them
against the admitted and refused examples of every step and refusal, one by one. Totals must be those of the campaign's
head and of every source's usage record. A refusal's reason is recomputed from claim, policy, purpose and revocation as
they stood when its grant opened.
This predicate needs the data portions of all sources.
"""

from collections import Counter
from dataclasses import dataclass, field

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import SHAPES, Kind
from consensus.policy import DISCRETIONARY_REFUSALS, why_refused
from consensus.predicates.history import complete_job_events, member_name
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason
from consensus.reserve import RESERVED, reserved_among
from consensus.sampler import presented_by_source
from consensus.state import (
    CAMPAIGN_TABLE,
    GRANT_TABLE,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignRecord,
    GrantRecord,
    PolicyRecord,
    SourceRecord,
    Usage,
    usage_key,
)


@dataclass(slots=True)
class _Totals:
    """Counts of one source, or of all. ``discarded`` are examples admitted in discarded steps."""

    presented: int = 0
    admitted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    discarded: int = 0

    def same(self, presented: int, admitted: int, refused: dict[str, int], discarded: int) -> bool:
        """Whether these are the counts."""
        own = {reason: count for reason, count in self.refused.items() if count}
        return (self.presented, self.admitted, own, self.discarded) == (presented, admitted, refused, discarded)


@dataclass(slots=True)
class _Replay:
    """The campaign's accounts while its events are replayed in order."""

    bundle: OpenBundle
    campaign: CampaignRecord
    by_source: dict[bytes, _Totals] = field(default_factory=dict)
    pending: dict[tuple[bytes, str], set[int]] = field(default_factory=dict)
    last_step: OpenEvent | None = None
    steps: int = 0
    recorded: int = 0
    refusals: int = 0
    conserved: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def refusals_complete(bundle: OpenBundle, steps: Steps) -> None:
    """Presented = admitted + refused, example by example, over all events of the campaign.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    events, head = complete_job_events(bundle)
    operator = member_name(bundle, events[0].entry.author)
    campaign = bundle.record(CAMPAIGN_TABLE + bundle.campaign, CampaignRecord)
    steps.checked(f"the campaign of {operator} has {len(events)} events, all in the bundle")
    undisclosed = sum(_closed(event) for event in events)
    if undisclosed:
        steps.unknown(f"which examples were admitted and refused: {undisclosed} events are not fully disclosed")
        return
    total = sum(entry.count for entry in campaign.manifest)
    if not 1 <= campaign.batch_size <= min(total, p.MAX_EXAMPLES):
        steps.check("the manifest fills a batch", [f"batches of {campaign.batch_size}"])
        return
    replay = _Replay(bundle, campaign)
    for event in events[1:]:
        if event.kind is Kind.REFUSAL:
            _replay_refusal(replay, event)
        elif event.kind is Kind.STEP:
            _replay_step(replay, event)
        elif event.kind is Kind.ROLLBACK:
            _replay_rollback(replay, event)
    steps.check(
        f"{replay.recorded} steps: the examples the manifest and seed present are, one by one, those admitted and "
        "those refused",
        replay.conserved,
    )
    steps.check(f"{replay.refusals} refusal events: each gives the reason the policy gives", replay.reasons)
    problems = []
    totals = replay.by_source.values()
    found = (
        sum(total.presented for total in totals),
        sum(total.admitted for total in totals),
        sum(total.refused.total() for total in totals),
    )
    if (*found, replay.steps, replay.refusals) != (
        head.presented,
        head.admitted,
        head.refused,
        head.steps,
        head.refusal_events,
    ):
        problems.append(f"the head counts {head.presented}, {head.admitted} and {head.refused}")
    for entry in campaign.manifest:
        usage = bundle.find(usage_key(bundle.campaign, entry.source), Usage)
        own = replay.by_source.get(entry.source, _Totals())
        refused = {count.reason: count.count for count in usage.refused} if usage else {}
        counts = (usage.presented, usage.admitted, refused, usage.discarded) if usage else (0, 0, refused, 0)
        if not own.same(*counts):
            problems.append(f"the usage record of source {entry.source.hex()} counts otherwise")
    steps.check(
        f"{found[0]} presented = {found[1]} admitted + {found[2]} refused, as the campaign's head and the usage "
        f"records of {len(campaign.manifest)} sources count",
        problems,
    )
    if reserved := sum(totals.refused[RESERVED] for totals in replay.by_source.values()):
        steps.checked(f"{reserved} of those refused are of their owners' reserves, of which no step admitted any")
    steps.attested(f"that the job trained on nothing but what it recorded: {operator}")
    if head.pending:
        steps.not_covered("examples refused for a step that is not on the log yet")


def _closed(event: OpenEvent) -> bool:
    """Whether a portion that the replay needs is missing."""
    if event.kind not in (Kind.STEP, Kind.REFUSAL, Kind.ROLLBACK):
        return False
    shape = SHAPES[event.kind]
    return (shape.data is not None and not event.whole_data) or event.governance is None or event.operation is None


def _replay_refusal(replay: _Replay, event: OpenEvent) -> None:
    governance, operation = event.governance, event.operation
    assert isinstance(governance, p.RefusalGovernance)
    assert isinstance(operation, p.RefusalOperation)
    where = f"event {event.entry.sequence}"
    replay.refusals += 1
    if operation.index != replay.steps + 1:
        replay.conserved.append(f"{where} refuses for step {operation.index}, the next is {replay.steps + 1}")
    for item in event.items:
        refusal = item.content
        assert isinstance(refusal, p.SourceRefusal)
        assert item.examples is not None
        held = replay.pending.setdefault((refusal.source, refusal.reason), set())
        if held & set(item.examples):
            replay.conserved.append(f"{where} refuses an example twice")
        held.update(item.examples)
        allowed = _allowed_reasons(replay, refusal.source, governance.grant)
        if refusal.reason not in allowed:
            replay.reasons.append(
                f"{where} refuses source {refusal.source.hex()} as {refusal.reason!r}, "
                f"expected {' or '.join(sorted(allowed))}"
            )


def _allowed_reasons(replay: _Replay, source: bytes, grant_id: bytes) -> frozenset[str]:
    bundle = replay.bundle
    grant = bundle.record(GRANT_TABLE + grant_id, GrantRecord)
    if source in grant.sources:
        return DISCRETIONARY_REFUSALS
    record = bundle.record(SOURCE_TABLE + source, SourceRecord)
    policy = bundle.record(POLICY_TABLE + grant.policy, PolicyRecord).policy
    states = {bool(record.revocation) and record.revoked_at_ms <= grant.opened_at_ms}
    if record.revocation and record.revoked_at_ms == grant.opened_at_ms:
        # In one ledger block with the grant: the refusal may stand before or after the revocation.
        states.add(False)
    reasons = [
        why_refused(policy, record.claim, revoked, replay.campaign.purpose, grant.opened_at_ms, grant.closes_at_ms)
        for revoked in states
    ]
    return frozenset((reason or Reason.SOURCE_NOT_GRANTED).value for reason in reasons)


def _replay_step(replay: _Replay, event: OpenEvent) -> None:
    operation = event.operation
    assert isinstance(operation, p.StepOperation)
    campaign = replay.campaign
    replay.recorded += 1
    where = f"event {event.entry.sequence} (step {operation.index})"
    if operation.index != replay.steps + 1:
        replay.conserved.append(f"{where}: the campaign's next step is {replay.steps + 1}")
    presented = presented_by_source(campaign.manifest, campaign.sampler_seed, campaign.batch_size, operation.index)
    accounted: Counter[tuple[bytes, int]] = Counter()
    refused: dict[bytes, Counter[str]] = {}
    for (source, reason), examples in replay.pending.items():
        accounted.update((source, example) for example in examples)
        refused.setdefault(source, Counter())[reason] += len(examples)
    for item in event.items:
        use = item.content
        assert isinstance(use, p.SourceUse)
        assert item.examples is not None
        accounted.update((use.source, example) for example in item.examples)
        counts = Counter({count.reason: count.count for count in use.refused})
        claim = replay.bundle.record(SOURCE_TABLE + use.source, SourceRecord).claim
        expected = refused.pop(use.source, Counter())
        if reserved := reserved_among(claim, presented.get(use.source, ())):
            accounted.update((use.source, example) for example in reserved)
            expected[RESERVED] += len(reserved)
        if reserved_among(claim, item.examples):
            replay.conserved.append(f"{where}: examples of the reserve of {claim.name!r} were admitted")
        if counts != expected:
            replay.conserved.append(
                f"{where}: refusals of source {use.source.hex()} are not those recorded before and those of its reserve"
            )
        if use.presented != use.admitted + counts.total():
            replay.conserved.append(f"{where}: presented of source {use.source.hex()} is not admitted + refused")
        if use.content_class != claim.content_class:
            replay.conserved.append(f"{where}: class of {claim.name!r} is not {use.content_class!r}")
        totals = replay.by_source.setdefault(use.source, _Totals())
        totals.presented += use.presented
        totals.admitted += use.admitted
        totals.refused.update(counts)
    due = Counter((source, example) for source, listed in presented.items() for example in listed)
    if refused or accounted != due:
        replay.conserved.append(
            f"{where} accounts for {accounted.total()} examples, {due.total()} were presented; "
            f"{(accounted - due).total()} too many, {(due - accounted).total()} missing"
        )
    replay.pending.clear()
    replay.steps, replay.last_step = operation.index, event


def _replay_rollback(replay: _Replay, event: OpenEvent) -> None:
    rollback = event.operation
    assert isinstance(rollback, p.Rollback)
    last = replay.last_step
    if last is not None and last.id in rollback.discarded:
        for item in last.items:
            use = item.content
            assert isinstance(use, p.SourceUse)
            totals = replay.by_source[use.source]
            totals.presented -= use.presented
            totals.admitted -= use.admitted
            totals.refused.subtract({count.reason: count.count for count in use.refused})
            totals.discarded += use.admitted
        replay.steps -= 1
    replay.last_step = None
    replay.pending.clear()
