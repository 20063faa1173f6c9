"""``accumulators``: what the log says about who moved a campaign's parameters, and the roots to check the rest by.

A campaign that keeps accumulators commits, at the end of each *window* of steps, to the sums of what each source added
to the gradients (``consensus/accumulators.py``). This predicate proves which windows stand (a discarded step's
commitment does not), which steps they leave out, and for each source that took part: who claimed it, under which
grants and policies it was used, how much of it, whether it was revoked. Whether a *file* is a window's is then a
comparison of roots; what the numbers in it are worth is the operator's word until somebody replays the steps.
"""

from dataclasses import dataclass

from consensus import portions as p
from consensus.accumulators import window_bounds
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import Kind
from consensus.predicates.history import complete_grants, complete_job_events, member_name, note_closing, place_steps
from consensus.predicates.reviews import Audit, audits_of, tell_replays
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.state import (
    CUSTODY_TABLE,
    GRANT_TABLE,
    POLICY_TABLE,
    SOURCE_TABLE,
    CustodyRecord,
    GrantRecord,
    PolicyRecord,
    SourceRecord,
    Usage,
    review_prefix,
    usage_key,
)


@dataclass(frozen=True, slots=True)
class Window:
    """The steps ``first`` to ``last``; ``event``, the last of them, commits to the root of their accumulators."""

    first: int
    last: int
    root: bytes
    event: OpenEvent


@dataclass(frozen=True, slots=True)
class UsedSource:
    """A source of the manifest. ``grants`` name it, by event id; ``usage`` is None if nothing was presented."""

    id: bytes
    owner: str
    event: OpenEvent
    record: SourceRecord
    usage: Usage | None
    grants: tuple[bytes, ...]
    policies: tuple[str, ...]

    @property
    def admitted(self) -> int:
        """Examples admitted in steps that stand."""
        return self.usage.admitted if self.usage is not None else 0


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a campaign's bundle proves. ``uncovered`` are steps after the last window."""

    operator: str
    campaign: p.Campaign
    steps: int
    windows: tuple[Window, ...]
    uncovered: int
    sources: tuple[UsedSource, ...]
    release: p.Release | None
    audits: tuple[Audit, ...] = ()
    custodians: tuple[str, ...] = ()
    """Members that say they hold the files of all windows that stand."""


def accumulators(bundle: OpenBundle, steps: Steps) -> None:
    """Windows of accumulators are committed, and these sources took part.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``, ``NOT_FOUND``.
    """
    found = provenance(bundle)
    steps.checked(f"the campaign of {found.operator} stands at {found.steps} steps, all its events are in the bundle")
    for source in found.sources:
        use = f"{source.admitted} admitted examples under {len(source.grants)} grants"
        revoked = ", revoked since" if source.record.revocation else ""
        steps.checked(
            f"source {source.record.claim.name!a} of {source.owner}, entry {source.event.index}: {use}{revoked}"
        )
    if not found.windows:
        steps.unknown("accumulators: the job recorded none, outputs of this campaign cannot be traced from its log")
        return
    covered = [f"{window.first} to {window.last}" for window in found.windows]
    steps.checked(f"accumulators of steps {', '.join(covered)} are committed, in {len(covered)} windows")
    if found.uncovered:
        steps.unknown(f"the last {found.uncovered} steps: no window that stands holds them")
    note_closing(bundle, steps)
    steps.attested(f"that the accumulators hold what the examples added to the gradients: {found.operator}")
    if found.custodians:
        steps.attested(f"that all files of these windows are held besides: {', '.join(found.custodians)}")
    else:
        steps.not_covered("who holds the files of these windows, besides the operator")
    tell_replays(steps, found.audits, found.steps)
    steps.not_covered("embeddings and norms, which are not accumulated")


def provenance(bundle: OpenBundle) -> Provenance:
    """Everything above, as data.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` for an event, record or portion that is not in the bundle; ``NOT_FOUND``.
    """
    events, head = complete_job_events(bundle)
    opening = events[0]
    if not isinstance(opening.operation, p.Campaign) or not opening.whole_data:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, "the campaign's data and operation portions are not disclosed")
    windows: list[Window] = []
    steps = 0
    for placed in place_steps(events, head.steps):
        step = placed.event.operation
        if not isinstance(step, p.StepOperation) or placed.discarded is None:
            raise Rejected(Reason.BUNDLE_INCOMPLETE, "a step's or rollback's operation portion is not disclosed")
        if placed.discarded:
            continue
        steps = step.index
        if step.accumulator_root:
            campaign = opening.operation
            first, _ = window_bounds(campaign.accumulator_window_steps, campaign.planned_steps, step.index)
            windows.append(Window(first, step.index, step.accumulator_root, placed.event))
    if steps != head.steps:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, f"the head counts {head.steps} steps, {steps} stand in the bundle")
    grants: dict[bytes, GrantRecord] = {
        grant.id: bundle.record(GRANT_TABLE + grant.id, GrantRecord) for grant in complete_grants(bundle, head)
    }
    release = events[-1].operation if events[-1].kind is Kind.RELEASE else None
    return Provenance(
        operator=member_name(bundle, opening.entry.author),
        campaign=opening.operation,
        steps=steps,
        windows=tuple(windows),
        uncovered=steps - (windows[-1].last if windows else 0),
        sources=tuple(
            _used_source(bundle, entry.content.source, grants)
            for entry in opening.items
            if isinstance(entry.content, p.ManifestRange)
        ),
        release=release if isinstance(release, p.Release) else None,
        audits=audits_of(bundle),
        custodians=_custodians(bundle, head.last_event),
    )


def _custodians(bundle: OpenBundle, last_event: bytes) -> tuple[str, ...]:
    records = bundle.range(review_prefix(CUSTODY_TABLE, bundle.campaign), CustodyRecord).values()
    own = [record for record in records if (record.campaign, record.last_event) == (bundle.campaign, last_event)]
    return tuple(sorted(member_name(bundle, record.custodian) for record in own))


def _used_source(bundle: OpenBundle, source: bytes, grants: dict[bytes, GrantRecord]) -> UsedSource:
    event = bundle.event_of(source, "source")
    record = bundle.record(SOURCE_TABLE + source, SourceRecord)
    if event.kind is not Kind.SOURCE or record.author != event.entry.author:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, f"event {source.hex()} is not the source's claim")
    named = {identifier: grant for identifier, grant in grants.items() if source in grant.sources}
    policies = dict.fromkeys(
        bundle.record(POLICY_TABLE + grant.policy, PolicyRecord).policy.name for grant in named.values()
    )
    return UsedSource(
        id=source,
        owner=member_name(bundle, record.author),
        event=event,
        record=record,
        usage=bundle.find(usage_key(bundle.campaign, source), Usage),
        grants=tuple(named),
        policies=tuple(policies),
    )
