"""A campaign's history as a bundle proves it: which events there are, in which order, and what became of each step.

Completeness is proved, never assumed. The events a job key writes are numbered from 0 without a gap, each
number once (``campaign_rules.py``); when a bundle holds the numbers 0 … n − 1 and the campaign's certified
head says that the next is n, none is left out. Without the head, a missing *last* part is possible, and a
predicate must find its completeness elsewhere (``source_honored.py`` in the usage record).

Whether a rollback discarded the step before it on the log is written in its operation portion. Where that
is not disclosed, the certified number of steps may still settle it; where it does not, a step's index is
known to an interval and its fate is open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import SHAPES, Kind
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.state import CAMPAIGN_HEAD_TABLE, DELEGATION_TABLE, CampaignHead, DelegationRecord

CLOSING_KINDS = frozenset({Kind.RELEASE, Kind.ABANDON})
"""After one of these the members admit nothing more of the campaign."""

CHAIN_KINDS = frozenset({Kind.CAMPAIGN, Kind.STEP, Kind.ROLLBACK})
"""What a step or rollback may name as the campaign's last event."""


@dataclass(frozen=True, slots=True)
class PlacedStep:
    """A step event; its index lies from ``lowest`` to ``highest``. ``discarded`` is ``None`` where open."""

    event: OpenEvent
    lowest: int
    highest: int
    discarded: bool | None


def member_name(bundle: OpenBundle, identifier: bytes) -> str:
    """A member's name, in the newest epoch that has it."""
    return bundle.trusted.member(identifier).name


def same_member(bundle: OpenBundle, first: bytes, second: bytes) -> bool:
    """Whether two ids are one member's, under one identity key or another that followed it."""
    return bundle.trusted.first_identity(first) == bundle.trusted.first_identity(second)


def job_events(bundle: OpenBundle) -> tuple[OpenEvent, ...]:
    """The events of the campaign's job keys, numbered from 0 without a gap, in log order.

    Each is signed by a key that the campaign's operator delegated for it.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` for a gap or a missing delegation; ``WRONG_AUTHOR``.
    """
    events = tuple(
        event for event in bundle.events if event.entry.campaign == bundle.campaign and SHAPES[event.kind].signed_by_job
    )
    for number, event in enumerate(events):
        if event.entry.sequence != number:
            raise Rejected(
                Reason.BUNDLE_INCOMPLETE,
                f"event {number} of campaign {bundle.campaign.hex()} is not in the bundle, "
                f"the next one is {event.entry.sequence}",
            )
    if not events or events[0].kind is not Kind.CAMPAIGN:
        raise Rejected(
            Reason.BUNDLE_INCOMPLETE, f"campaign {bundle.campaign.hex()}: its opening event is not in the bundle"
        )
    check_delegated(bundle, events, events[0].entry.author)
    return events


def check_delegated(bundle: OpenBundle, events: Sequence[OpenEvent], operator: bytes) -> None:
    """Events of the campaign are the operator's, each signed by a key that it delegated for the campaign.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE`` for a missing delegation; ``UNKNOWN_JOB_KEY``; ``WRONG_AUTHOR``.
    """
    for job_key in sorted({event.entry.signatures[0].signer for event in events}):
        delegation = bundle.record(DELEGATION_TABLE + job_key, DelegationRecord)
        if not same_member(bundle, delegation.operator, operator) or delegation.campaign != bundle.campaign:
            raise Rejected(Reason.UNKNOWN_JOB_KEY, f"job key {job_key.hex()} was delegated for something else")
    if any(not same_member(bundle, event.entry.author, operator) for event in events):
        raise Rejected(Reason.WRONG_AUTHOR, "events of the campaign name different operators")


def note_closing(bundle: OpenBundle, steps: Steps) -> None:
    """Say whether the campaign was over by the bundle's ledger block, or whether later steps may change the answer."""
    closing = next((e for e in bundle.events if e.kind in CLOSING_KINDS and e.entry.campaign == bundle.campaign), None)
    if closing is None:
        steps.not_covered(
            f"what came after ledger block {bundle.header.height}: the campaign is not shown to be closed, "
            "its later steps may change the answer"
        )
    else:
        steps.checked(f"the campaign was closed by entry {closing.index}, its {closing.kind.value}")


def complete_job_events(bundle: OpenBundle) -> tuple[tuple[OpenEvent, ...], CampaignHead]:
    """All events of the campaign's job keys, and the certified head that says there are no others.

    Raises:
        Rejected: as ``job_events``; ``BUNDLE_INCOMPLETE`` when the head counts another number.
    """
    events = job_events(bundle)
    head = bundle.record(CAMPAIGN_HEAD_TABLE + bundle.campaign, CampaignHead)
    if len(events) != head.next_sequence:
        raise Rejected(
            Reason.BUNDLE_INCOMPLETE,
            f"the campaign's head counts {head.next_sequence} events, the bundle holds {len(events)}",
        )
    return events, head


def complete_grants(bundle: OpenBundle, head: CampaignHead) -> tuple[OpenEvent, ...]:
    """All grants of the campaign, in order.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    grants = tuple(
        event for event in bundle.events if event.entry.campaign == bundle.campaign and event.kind is Kind.GRANT
    )
    if tuple(grant.entry.sequence for grant in grants) != tuple(range(1, head.next_grant)):
        raise Rejected(
            Reason.BUNDLE_INCOMPLETE,
            f"the campaign's head counts {head.next_grant - 1} grants, the bundle holds {len(grants)}",
        )
    return grants


def place_steps(events: Sequence[OpenEvent], head_steps: int | None = None) -> tuple[PlacedStep, ...]:
    """Every step of ``events`` with its index and its fate, as far as the disclosed portions tell.

    ``head_steps`` is the campaign's certified number of steps, where ``events`` are all of them.
    """
    discards = _discards(events, head_steps)
    placed: list[PlacedStep] = []
    lowest = highest = 0
    last_is_step = False
    for event in events:
        if event.kind is Kind.STEP:
            lowest, highest = lowest + 1, highest + 1
            if isinstance(event.governance, p.StepGovernance):
                lowest = highest = event.governance.index
            elif isinstance(event.operation, p.StepOperation):
                lowest = highest = event.operation.index
            placed.append(PlacedStep(event, lowest, highest, False))
            last_is_step = True
        elif event.kind is Kind.ROLLBACK:
            discarded = discards[event.index]
            if discarded is not False and last_is_step:
                last = placed[-1]
                placed[-1] = PlacedStep(last.event, last.lowest, last.highest, discarded)
                lowest -= 1
                highest -= 1 if discarded else 0
            if isinstance(event.operation, p.Rollback):
                lowest = highest = event.operation.next_index - 1
            last_is_step = False
    return tuple(placed)


def _discards(events: Sequence[OpenEvent], head_steps: int | None) -> dict[int, bool | None]:
    """Whether each rollback, by its index in the log, discarded the step before it; ``None`` where open."""
    discards: dict[int, bool | None] = {}
    last: OpenEvent | None = None
    for event in events:
        if event.kind is Kind.ROLLBACK:
            if last is None or last.kind is not Kind.STEP:
                discards[event.index] = False
            elif isinstance(event.operation, p.Rollback):
                discards[event.index] = last.id in event.operation.discarded
            else:
                discards[event.index] = None
        if event.kind in CHAIN_KINDS:
            last = event
    open_ones = [index for index, discarded in discards.items() if discarded is None]
    if head_steps is not None and open_ones:
        steps = sum(event.kind is Kind.STEP for event in events)
        remaining = steps - head_steps - sum(discarded is True for discarded in discards.values())
        if remaining in (0, len(open_ones)):
            discards.update(dict.fromkeys(open_ones, remaining > 0))
    return discards
