"""Taking a campaign up again: what the log says of the steps after a checkpoint.

The campaign's events are read newest first, as far back as the checkpoint's step: steps that no later rollback discards
are the ones to replay, and the rollbacks name every example undone on the way for being recited. Events are asked for
by id and held to it, and the steps must be all from the checkpoint's to the head's: a node can withhold, not make up;
whether the replay ends at the log's root is checked in the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from consensus import portions as p
from consensus.codec import decode
from consensus.event import MAX_ENTRY_BYTES, Entry, Kind, event_id, unpack
from consensus.identifiers import Digest
from consensus.rejection import Reason, Rejected
from consensus.review import Evaluation
from consensus.state import CAMPAIGN_TABLE, CampaignRecord
from trainer_client.calls import CampaignStatus, ListedEvent
from trainer_client.record import Example, Permission
from trainer_client.submit import Client

FetchEvent = Callable[[bytes], bytes]
"""An event's id to its wire form."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step as the log has it."""

    id: Digest
    operation: p.StepOperation
    governance: p.StepGovernance
    admitted: frozenset[Example]
    classes: Mapping[bytes, str]
    """Content class of each source presented."""

    @property
    def index(self) -> int:
        """Its place among the campaign's steps, from 1."""
        return self.operation.index

    @property
    def permission(self) -> Permission:
        """The grant it was taken under."""
        return Permission(self.governance.grant, self.governance.policy)

    def in_order(self, presented: Sequence[Example]) -> tuple[Example, ...]:
        """The admitted examples as the step took them: in the order in which the sampler presented them."""
        return tuple(example for example in presented if example in self.admitted)

    def weights_permille(self, source: bytes, band: int) -> tuple[int, ...]:
        """The depth profile of an admitted source's examples of an entropy band, over the campaign's parameter blocks.

        Nothing but zeros where the step states no such profile.
        """
        for profile in self.governance.profiles:
            if (profile.content_class, profile.band) == (self.classes[source], band):
                return profile.weights_permille
        return (0,) * len(self.operation.deltas)


@dataclass(frozen=True, slots=True)
class RecordedRollback:
    """A rollback as the log has it."""

    id: Digest
    discarded: tuple[bytes, ...]
    memorization: tuple[p.MemorizationSignal, ...]


@dataclass(frozen=True, slots=True)
class RecordedPast:
    """What lies between a checkpoint and the campaign's head: steps that stand, oldest first, and recited examples."""

    steps: tuple[RecordedStep, ...]
    recited: frozenset[Example]


def recorded(encoded: bytes, identifier: bytes) -> RecordedStep | RecordedRollback | None:
    """A step or rollback from its wire form; None for an event of another kind.

    Raises:
        Rejected: ``DIGEST_MISMATCH`` or ``PORTION_MISMATCH`` when it is not the event with that id; as ``decode``.
    """
    entry, portions = _opened(encoded, identifier)
    found = Digest(identifier)
    if entry.kind not in (Kind.STEP, Kind.ROLLBACK) or portions.operation is None or portions.governance is None:
        return None
    if entry.kind is Kind.ROLLBACK:
        rollback = decode(portions.operation.content, p.Rollback, p.MAX_PORTIONS_BYTES)
        return RecordedRollback(found, tuple(rollback.discarded), tuple(rollback.memorization))
    operation = decode(portions.operation.content, p.StepOperation, p.MAX_PORTIONS_BYTES)
    governance = decode(portions.governance.content, p.StepGovernance, p.MAX_PORTIONS_BYTES)
    items = portions.data.items if portions.data is not None else ()
    uses = [(decode(item.content, p.SourceUse, p.MAX_PORTIONS_BYTES), item.examples) for item in items]
    return RecordedStep(
        id=found,
        operation=operation,
        governance=governance,
        admitted=frozenset((use.source, example) for use, examples in uses for example in examples),
        classes={use.source: use.content_class for use, _ in uses},
    )


def read_opening(client: Client, campaign: bytes) -> tuple[CampaignRecord, p.Campaign]:
    """A campaign's record, and the terms that it was opened with.

    Raises:
        Rejected: ``NOT_FOUND``; as ``recorded_terms``. Unavailable: the node does not answer.
    """
    record = client.state_record(CAMPAIGN_TABLE + campaign, CampaignRecord)
    if record is None:
        raise Rejected(Reason.NOT_FOUND, f"campaign {campaign.hex()} has no record")
    return record, recorded_terms(client.raw_event(record.event), record.event)


def recorded_terms(encoded: bytes, identifier: bytes) -> p.Campaign:
    """The terms of a campaign, from the wire form of its opening event.

    Raises:
        Rejected: as ``recorded``; ``MALFORMED`` for an event of another kind.
    """
    entry, portions = _opened(encoded, identifier)
    if entry.kind is not Kind.CAMPAIGN or portions.operation is None:
        raise Rejected(Reason.MALFORMED, f"event {identifier.hex()} opens no campaign")
    return decode(portions.operation.content, p.Campaign, p.MAX_PORTIONS_BYTES)


def recorded_evaluation(encoded: bytes, identifier: bytes) -> Evaluation:
    """An evaluation from its wire form.

    Raises:
        Rejected: as ``recorded``; ``MALFORMED`` for an event of another kind.
    """
    entry, portions = _opened(encoded, identifier)
    if entry.kind is not Kind.EVALUATION or portions.operation is None:
        raise Rejected(Reason.MALFORMED, f"event {identifier.hex()} is no evaluation")
    return decode(portions.operation.content, Evaluation, p.MAX_PORTIONS_BYTES)


def past_since(
    checkpoint_step: int, head: CampaignStatus, listed: Sequence[ListedEvent], fetch: FetchEvent
) -> RecordedPast:
    """The steps that stand after ``checkpoint_step``; ``listed`` are the campaign's events in the log's order.

    Raises:
        Rejected: as ``recorded``; ``STEP_CHAIN_BROKEN`` where steps are missing between checkpoint and head.
    """
    steps: list[RecordedStep] = []
    discarded: set[bytes] = set()
    recited: set[Example] = set()
    for row in reversed(listed):
        if row.kind not in (Kind.STEP, Kind.ROLLBACK):
            continue
        event = recorded(fetch(bytes.fromhex(row.id)), bytes.fromhex(row.id))
        if isinstance(event, RecordedRollback):
            discarded.update(event.discarded)
            recited.update((signal.source, signal.example) for signal in event.memorization)
        elif isinstance(event, RecordedStep) and event.id not in discarded:
            if event.index <= checkpoint_step:
                break
            steps.append(event)
    steps.reverse()
    if [step.index for step in steps] != list(range(checkpoint_step + 1, head.steps + 1)):
        found = f"{steps[0].index} to {steps[-1].index}" if steps else "none"
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN,
            f"expected steps {checkpoint_step + 1} to {head.steps} on the log, the node shows {found}",
        )
    return RecordedPast(tuple(steps), frozenset(recited))


def _opened(encoded: bytes, identifier: bytes) -> tuple[Entry, p.Portions]:
    wire = unpack(encoded)
    entry = decode(wire.entry, Entry, MAX_ENTRY_BYTES)
    found = event_id(entry)
    if found != identifier:
        raise Rejected(Reason.DIGEST_MISMATCH, f"asked for event {identifier.hex()}, got {found.hex()}")
    portions = p.decode_portions(wire.portions)
    if p.commitments(entry.kind.value, portions) != (entry.data, entry.governance, entry.operation):
        raise Rejected(
            Reason.PORTION_MISMATCH, f"event {identifier.hex()}: its commitments are not those of its portions"
        )
    return entry, portions
