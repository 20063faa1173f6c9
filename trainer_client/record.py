"""What happened, as events: construction alone, no I/O, clock or randomness.

A ``Recorder`` holds where its campaign stands *as the job sees it*, ahead of the log: next sequence number,
attempt, steps, parameter root, the last event that others chain to. Each method returns the signed event of
one happening and moves that place forward by exactly the rules of ``consensus/admission.py``; should the log
refuse an event, ``move_to`` puts the recorder back to where the log stands.

A step comes with its refusals, as an event of their own before it, but for those of a source's reserve, which its
claim names: the step counts them. Salts come from the caller (32 fresh random bytes each); what to record, and when, is
left to ``governed.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from consensus import portions as p
from consensus.codec import decode, encode
from consensus.event import Entry, Kind, event_id, make_entry, pack, sign_entries_as_job
from consensus.identifiers import ChainId, Digest, MemberId
from consensus.job_key import job_key_id
from consensus.keys import Signer
from consensus.rejection import InvariantBroken
from consensus.reserve import RESERVED
from consensus.review import DataSlice, Evaluation, Metric, check_evaluation
from consensus.state import merge_counts

Example = tuple[bytes, int]
"""An example's name on the log: its source, and its index below the source's content root."""

Salts = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event ready to be sent: its id and wire form, and its place in the campaign."""

    id: Digest
    kind: Kind
    sequence: int
    attempt: int
    encoded: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a campaign stands: the fields of ``state.CampaignHead`` that the next event is judged by.

    ``undo_root`` is the parameter root before the last step, None where there is no step to undo.
    """

    next_sequence: int
    attempt: int
    steps: int
    root: Digest
    last_event: Digest
    undo_root: Digest | None


@dataclass(frozen=True, slots=True)
class Permission:
    """A grant as a step names it: its id, its policy's id."""

    grant: bytes
    policy: bytes


@dataclass(frozen=True, slots=True)
class StepUse:
    """What a step presented: admitted examples, and refused ones with their reason."""

    admitted: frozenset[Example]
    refused: Mapping[Example, str]

    @property
    def sources(self) -> tuple[bytes, ...]:
        """Every presented source, in order of id."""
        return tuple(sorted({source for source, _ in (*self.admitted, *self.refused)}))


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an optimizer step did; see ``portions.StepOperation`` and ``portions.StepGovernance`` for units."""

    root_before: Digest
    root_after: Digest
    deltas: tuple[p.BlockDelta, ...]
    optimizer_digest: bytes
    learning_rate_nano: int
    loss_micro: int
    rng_digest: bytes
    memorization: tuple[p.MemorizationSignal, ...]
    step_microseconds: int
    accumulator_root: bytes = b""
    flushed: tuple[bytes, ...] = ()
    carried: tuple[p.CarriedMomentum, ...] = ()
    global_clip_nano: int = 0
    skipped: bool = False


class Recorder:
    """Builds the events of one campaign, signed with its job key.

    Args:
        operator: the member whose job key ``signer`` is; every event's author.
        campaign: the campaign's id, 32 bytes, as its delegation names it.
        salts: gives 32 fresh random bytes at each call.
    """

    def __init__(self, chain_id: ChainId, operator: MemberId, campaign: bytes, signer: Signer, salts: Salts) -> None:
        self._chain_id = chain_id
        self._operator = operator
        self._campaign = campaign
        self._signer = signer
        self._salts = salts
        self._place: Place | None = None

    @property
    def place(self) -> Place:
        """Where the campaign stands after the last event built.

        Raises:
            InvariantBroken: it has not been opened.
        """
        if self._place is None:
            raise InvariantBroken("the campaign has not been opened")
        return self._place

    def move_to(self, place: Place) -> None:
        """Continue from here: where the log stands, after it refused what came later."""
        self._place = place

    def open_campaign(self, terms: p.Campaign, manifest: Sequence[p.ManifestRange]) -> RecordedEvent:
        """The ``campaign`` event, sequence 0."""
        data = p.DataPortion(self._salts(), tuple(p.DataItem(encode(entry)) for entry in manifest))
        (event,) = self._signed([(Kind.CAMPAIGN, p.Portions(data, None, self._salted(terms)))], 0, 0)
        self._place = Place(1, 0, 0, Digest(terms.base_root), event.id, None)
        return event

    def grant_request(
        self, sequence: int, policy: bytes, sources: Iterable[bytes], first_step: int, last_step: int, closes_at_ms: int
    ) -> RecordedEvent:
        """An *unsigned* grant for this job key, for the operator's node to sign and gather signatures."""
        items = tuple(p.DataItem(encode(p.GrantedSource(source))) for source in sorted(set(sources)))
        portions = p.Portions(
            p.DataPortion(self._salts(), items),
            self._salted(p.GrantTerms(policy, first_step, last_step, closes_at_ms)),
            self._salted(p.GrantOperation(job_key_id(self._signer))),
        )
        entry = self._entry(Kind.GRANT, portions, sequence, 0)
        return RecordedEvent(event_id(entry), Kind.GRANT, sequence, 0, pack(entry, portions))

    def step(
        self,
        permission: Permission,
        use: StepUse,
        classes: Mapping[bytes, str],
        profiles: Sequence[p.ClassProfile],
        outcome: StepOutcome,
    ) -> tuple[RecordedEvent, ...]:
        """One optimizer step, after the refusal of examples kept from it, if any is told by an event of its own.

        Both bear one signature, which every node then checks once. ``classes`` names each source's class; ``profiles``
        are those it applied, in order of class and entropy band.

        Raises:
            InvariantBroken: the step starts from another root than the campaign stands at.
        """
        place = self.place
        if outcome.root_before != place.root:
            raise InvariantBroken(
                f"the step starts from {outcome.root_before.hex()}, the campaign stands at {place.root.hex()}"
            )
        told = []
        if refused := refused_by_event(use.refused):
            told.append((Kind.REFUSAL, self._refusal(permission, refused)))
        told.append((Kind.STEP, self._step(permission, use, classes, profiles, outcome)))
        events = self._signed(told, place.next_sequence, place.attempt)
        self._place = Place(
            next_sequence=place.next_sequence + len(events),
            attempt=place.attempt,
            steps=place.steps + 1,
            root=outcome.root_after,
            last_event=events[-1].id,
            undo_root=outcome.root_before,
        )
        return events

    def rollback(
        self,
        permission: Permission,
        discarded: Sequence[bytes],
        reason: str,
        memorization: tuple[p.MemorizationSignal, ...] = (),
    ) -> RecordedEvent:
        """Steps undone, newest first. Undoes the campaign's last step where ``discarded`` names it.

        Raises:
            InvariantBroken: it names the last event, and that is not a step.
        """
        place = self.place
        root, steps = place.root, place.steps
        if place.last_event in discarded:
            if place.undo_root is None:
                raise InvariantBroken("the campaign's last event is not a step")
            root, steps = place.undo_root, place.steps - 1
        operation = p.Rollback(
            discarded=tuple(discarded),
            reason=reason,
            restored_root=root,
            next_index=steps + 1,
            next_attempt=place.attempt + 1,
            memorization=memorization,
        )
        governance = p.RollbackGovernance(permission.grant, permission.policy)
        event = self._next(Kind.ROLLBACK, p.Portions(None, self._salted(governance), self._salted(operation)))
        self._place = Place(place.next_sequence + 1, place.attempt + 1, steps, root, event.id, None)
        return event

    def abandon(self, reason: str) -> RecordedEvent:
        """The campaign ends without a release."""
        return self._next(Kind.ABANDON, p.Portions(None, None, self._salted(p.Abandon(reason))))

    def evaluation(
        self, name: str, metrics: Sequence[Metric], data: DataSlice, script: tuple[str, bytes]
    ) -> Evaluation:
        """Metrics of the weights where the campaign stands; ``script`` is its name and SHA-256.

        Raises:
            Rejected: ``BAD_FIELD`` or ``MALFORMED`` for what the log would refuse.
        """
        ordered = tuple(sorted(metrics, key=lambda metric: metric.name))
        evaluation = Evaluation(name, self.place.steps, self.place.root, data, *script, ordered)
        check_evaluation(decode(encode(evaluation), Evaluation, p.MAX_PORTIONS_BYTES))
        return evaluation

    def record_evaluation(self, evaluation: Evaluation) -> RecordedEvent:
        """An evaluation that ``evaluation`` made, with nothing recorded since."""
        return self._next(Kind.EVALUATION, p.Portions(None, None, self._salted(evaluation)))

    def release(self, file_name: str, file_sha256: bytes) -> RecordedEvent:
        """The campaign ends with these weights, at the root where it stands."""
        release = p.Release(self.place.root, self.place.steps, file_name, file_sha256)
        return self._next(Kind.RELEASE, p.Portions(None, None, self._salted(release)))

    def _refusal(self, permission: Permission, refused: Mapping[Example, str]) -> p.Portions:
        salt = self._salts()
        grouped: dict[tuple[bytes, str], list[int]] = {}
        for (source, example), reason in refused.items():
            grouped.setdefault((source, reason), []).append(example)
        items = tuple(
            p.refusal_item(salt, number, source, reason, tuple(sorted(examples)))
            for number, ((source, reason), examples) in enumerate(sorted(grouped.items()))
        )
        governance = p.RefusalGovernance(permission.grant, permission.policy, count_reasons(refused.values()))
        operation = p.RefusalOperation(self.place.steps + 1)
        return p.Portions(p.DataPortion(salt, items), self._salted(governance), self._salted(operation))

    def _step(
        self,
        permission: Permission,
        use: StepUse,
        classes: Mapping[bytes, str],
        profiles: Sequence[p.ClassProfile],
        outcome: StepOutcome,
    ) -> p.Portions:
        place = self.place
        salt = self._salts()
        items = tuple(
            p.use_item(
                salt,
                number,
                source,
                classes[source],
                count_reasons(reason for (of, _), reason in use.refused.items() if of == source),
                tuple(sorted(example for of, example in use.admitted if of == source)),
            )
            for number, source in enumerate(use.sources)
        )
        governance = p.StepGovernance(
            grant=permission.grant,
            policy=permission.policy,
            index=place.steps + 1,
            profiles=tuple(profiles),
            presented=len(use.admitted) + len(use.refused),
            admitted=len(use.admitted),
            refused=count_reasons(use.refused.values()),
            global_clip_nano=outcome.global_clip_nano,
            skipped=outcome.skipped,
        )
        operation = p.StepOperation(
            index=place.steps + 1,
            previous=place.last_event,
            root_before=outcome.root_before,
            root_after=outcome.root_after,
            deltas=outcome.deltas,
            optimizer_digest=outcome.optimizer_digest,
            learning_rate_nano=outcome.learning_rate_nano,
            loss_micro=outcome.loss_micro,
            rng_digest=outcome.rng_digest,
            memorization=outcome.memorization,
            accumulator_root=outcome.accumulator_root,
            flushed=outcome.flushed,
            carried=outcome.carried,
            step_microseconds=outcome.step_microseconds,
        )
        return p.Portions(p.DataPortion(salt, items), self._salted(governance), self._salted(operation))

    def _next(self, kind: Kind, portions: p.Portions) -> RecordedEvent:
        place = self.place
        (event,) = self._signed([(kind, portions)], place.next_sequence, place.attempt)
        self._place = Place(
            place.next_sequence + 1, place.attempt, place.steps, place.root, place.last_event, place.undo_root
        )
        return event

    def _signed(
        self, told: Sequence[tuple[Kind, p.Portions]], sequence: int, attempt: int
    ) -> tuple[RecordedEvent, ...]:
        """Events numbered from ``sequence``, under one signature."""
        entries = [
            self._entry(kind, portions, sequence + number, attempt) for number, (kind, portions) in enumerate(told)
        ]
        return tuple(
            RecordedEvent(event_id(entry), entry.kind, entry.sequence, attempt, pack(entry, portions))
            for entry, (_, portions) in zip(sign_entries_as_job(entries, self._signer), told, strict=True)
        )

    def _entry(self, kind: Kind, portions: p.Portions, sequence: int, attempt: int) -> Entry:
        return make_entry(
            self._chain_id,
            kind,
            self._operator,
            portions,
            campaign=self._campaign,
            sequence=sequence,
            attempt=attempt,
        )

    def _salted(self, content: p.Wire) -> p.SaltedPortion:
        return p.SaltedPortion(self._salts(), encode(content))


def refused_by_event(refused: Mapping[Example, str]) -> dict[Example, str]:
    """The refusals that are told by an event of their own: all but those of a reserve."""
    return {example: reason for example, reason in refused.items() if reason != RESERVED}


def count_reasons(reasons: Iterable[str]) -> tuple[p.Count, ...]:
    """Counts by reason, in order of reason."""
    return merge_counts((), tuple(p.Count(reason, 1) for reason in reasons))
