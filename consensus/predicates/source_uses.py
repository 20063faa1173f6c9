"""What a bundle shows of one source in a campaign: its claim, the steps presented with it, and that these are all.

Completeness rests on the state's usage record: its exact totals of the source in the campaign must be the
sums over the uses disclosed, so that a step that trained on it and is left out, or counted twice, shows. (One
that refused all of it and was discarded leaves no count.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import Kind
from consensus.predicates.history import PlacedStep, member_name, place_steps
from consensus.rejection import Reason, Rejected
from consensus.state import SOURCE_TABLE, SourceRecord, Usage, merge_counts, usage_key


@dataclass(frozen=True, slots=True)
class Claimed:
    """Whose the source is, in words, and what of that does not hold or is not disclosed."""

    owner: str
    text: str
    problems: tuple[str, ...]
    undisclosed: int


@dataclass(frozen=True, slots=True)
class Use:
    """A step that was presented with the source, and what it did with it."""

    step: PlacedStep
    content: p.SourceUse

    @property
    def where(self) -> str:
        """The step, in words."""
        return f"event {self.step.event.entry.sequence} (step {self.step.highest})"


@dataclass(frozen=True, slots=True)
class Totals:
    """Whether the uses are all uses, in words; ``usage`` is what the state counts, None for nothing at all."""

    usage: Usage | None
    text: str
    problems: tuple[str, ...]
    undisclosed: int


def claim_of(bundle: OpenBundle) -> tuple[SourceRecord, Claimed]:
    """The source's record, and whether it is what was signed.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``, ``NOT_FOUND``.
    """
    event = bundle.event_of(bundle.source, "source")
    record = bundle.record(SOURCE_TABLE + bundle.source, SourceRecord)
    claim = record.claim
    owner = member_name(bundle, record.author)
    problems = []
    if event.kind is not Kind.SOURCE or event.entry.author != record.author:
        problems.append("the state records another author")
    if any(item.content != claim for item in event.items):
        problems.append("the state records another claim than was signed")
    text = (
        f"source {claim.name!r} is claimed and signed by {owner}: licence {claim.licence!r}, "
        f"purposes {', '.join(map(repr, claim.purposes))}, class {claim.content_class!r}"
    )
    return record, Claimed(owner, text, tuple(problems), int(not event.items))


def uses_of_source(bundle: OpenBundle, events: Sequence[OpenEvent]) -> tuple[Use, ...]:
    """The steps among a campaign's ``events`` that are shown to have been presented with the source."""
    return tuple(
        Use(step, item.content)
        for step in place_steps(events)
        for item in step.event.items
        if isinstance(item.content, p.SourceUse) and item.content.source == bundle.source
    )


def totals_of(bundle: OpenBundle, uses: Sequence[Use]) -> Totals:
    """The uses against the state's counts.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    usage = bundle.find(usage_key(bundle.campaign, bundle.source), Usage)
    # A step that refused all of it and was discarded leaves no count behind: of these none is claimed.
    text = f"{len(uses)} steps presented with it are in the bundle, among them every one that trained on it"
    if usage is None:
        return Totals(None, text, ("the state has no usage record of it",) if uses else (), 0)
    text += (
        f": {usage.presented} presented, {usage.admitted} admitted, {usage.discarded} more admitted in discarded "
        "steps, as the state counts"
    )
    trained = sum(use.content.admitted for use in uses)
    if trained != usage.admitted + usage.discarded:
        return Totals(usage, text, (f"the bundle shows {trained} admitted",), 0)
    kept = [use.content for use in uses if use.step.discarded is False]
    refused: tuple[p.Count, ...] = ()
    for content in kept:
        refused = merge_counts(refused, content.refused)
    found = (sum(use.presented for use in kept), sum(use.admitted for use in kept), refused)
    if found == (usage.presented, usage.admitted, usage.refused):
        return Totals(usage, text, (), 0)
    if any(use.step.discarded is None for use in uses):
        # All examples trained on are accounted for; which of the steps count as discarded is not to be seen.
        return Totals(usage, text, (), 1)
    problem = f"the bundle shows {found[0]} presented and {found[1]} admitted in steps not discarded"
    return Totals(usage, text, (problem,), 0)


def grant_of(bundle: OpenBundle, use: Use, governance: p.StepGovernance) -> OpenEvent:
    """The grant that a use's step names in its ``governance`` portion.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` where it is not there, or is none of the campaign.
    """
    grant = bundle.event_of(governance.grant, "grant")
    if grant.kind is not Kind.GRANT or grant.entry.campaign != bundle.campaign:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, f"{use.where} names no grant of the campaign")
    return grant
