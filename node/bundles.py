"""Making bundles: what a predicate needs, taken from one consistent reading of the log.

The export side of ``consensus/bundle.py``. Nothing here decides an answer: the bundle is checked by whoever
reads it. What is disclosed is decided here, and no more than the predicate needs:

=======================  ================================================================================
``included``             the entry; no portion
``consistent``           two certified headers
``policy-in-force``      governance portions of policies and steps
``source-honored``       the one source's items; governance portions of the steps that used it
``source-unused``        nothing
``revocation-exposure``  as ``source-honored``; operation portions of the release and of steps that settle its momentum
``delta-exact``          operation portions of the campaign's events
``refusals-complete``    all portions of steps, refusals and rollbacks
``evidence``             the two signed messages
``metadata-complete``    the operation portion of the campaign's opening event
``accumulators``         the manifest; operation portions of the campaign's events; its sources' claims
=======================  ================================================================================

In the narrow ones a rollback's operation portion is disclosed only if its memorization signals name no
source (but the one asked about); a step's only if, without it, its index could not be told, and if neither signals
nor the momentum that it settles name another.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from consensus import merkle
from consensus import portions as p
from consensus.block import Header, decode_header
from consensus.bundle import (
    VERSION,
    Bundle,
    BundleEvent,
    DisclosedItem,
    DisclosedItems,
    EarlierHeader,
    PinnedSize,
    RangeProof,
    StateProof,
    encode_bundle,
)
from consensus.codec import decode
from consensus.epochs import EpochLink
from consensus.event import MAX_ENTRY_BYTES, SHAPES, Entry, Kind, event_id
from consensus.membership import Genesis
from consensus.predicates import SUBJECTS, Predicate, predicate_named
from consensus.predicates.history import CLOSING_KINDS
from consensus.rejection import Reason, Rejected
from consensus.state import (
    AUDIT_TABLE,
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    CHALLENGE_TABLE,
    CUSTODY_TABLE,
    DECISION_TABLE,
    DELEGATION_TABLE,
    EVALUATION_TABLE,
    GRANT_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignRecord,
    GrantRecord,
    SourceRecord,
    read_record,
    review_prefix,
    usage_key,
)
from consensus.state_map import StateMap


class LogReader(Protocol):
    """One consistent reading of a log: everything as of ``header``. Indexes count from 0."""

    @property
    def genesis(self) -> Genesis:
        """The chain's genesis."""

    @property
    def header(self) -> bytes:
        """Canonical bytes of a certified header, the "as of" of what is exported."""

    @property
    def certificate(self) -> bytes:
        """Canonical bytes of its certificate."""

    @property
    def links(self) -> tuple[EpochLink, ...]:
        """What leads from the genesis to the header's epoch."""

    @property
    def state(self) -> StateMap:
        """The state whose root the header names."""

    def entry(self, index: int) -> bytes:
        """The entry at ``index``."""

    def portions(self, index: int) -> bytes:
        """The portions of the entry at ``index``, in their wire form."""

    def index_of_event(self, identifier: bytes) -> int | None:
        """Where the event of that id stands, if it does."""

    def campaign_indexes(self, campaign: bytes) -> Sequence[int]:
        """Where the campaign's events stand, in rising order."""

    def node(self, level: int, index: int) -> bytes:
        """A perfect node of the log's tree (``consensus/merkle.py``)."""


def export_bundle(
    reader: LogReader,
    predicate: str,
    *,
    campaign: bytes = b"",
    source: bytes = b"",
    event: bytes = b"",
    earlier: tuple[bytes, bytes] | None = None,
    pinned_size: int | None = None,
) -> bytes:
    """The bytes of a bundle for ``predicate``. ``earlier`` is an older header and its certificate; ``pinned_size`` the
    size of a log that whoever asks has seen, which this one is shown to continue.

    Raises:
        Rejected: ``UNKNOWN_PREDICATE``; ``BAD_FIELD`` when what it is about is not given; ``NOT_FOUND``,
            ``UNKNOWN_CAMPAIGN`` or ``UNKNOWN_SOURCE`` when it is not on the log.
    """
    asked = predicate_named(predicate)
    needed = SUBJECTS[asked]
    for name, identifier in (("campaign", campaign), ("source", source), ("event", event)):
        if len(identifier) != (32 if name in needed else 0):
            raise Rejected(
                Reason.BAD_FIELD,
                f"'{predicate}' is asked about {' and '.join(needed) or 'no event'}, "
                f"the {name} given has {len(identifier)} bytes",
            )
    export = _Export(reader, campaign, source, event)
    if (earlier is not None) != (asked is Predicate.CONSISTENT):
        raise Rejected(Reason.BAD_FIELD, "an earlier header belongs to 'consistent', which needs one")
    _COLLECTORS[asked](export)
    return encode_bundle(
        Bundle(
            version=VERSION,
            chain_id=reader.genesis.chain_id,
            predicate=asked.value,
            campaign=campaign,
            source=source,
            event=event,
            header=reader.header,
            certificate=reader.certificate,
            epochs=reader.links,
            pinned=None if pinned_size is None else export.pinned(pinned_size),
            earlier=None if earlier is None else export.earlier(*earlier),
            events=tuple(held for _, held in sorted(export.events.items())),
            records=tuple(StateProof(key, reader.state.prove(key)) for key in sorted(export.keys)),
            ranges=tuple(RangeProof(prefix, reader.state.prove_prefix(prefix)) for prefix in sorted(export.prefixes)),
        )
    )


_APART_FROM_WEIGHTS = frozenset({Kind.REFUSAL, Kind.EVALUATION})
"""What a job writes that moves no parameter root."""


class _Export:
    """A bundle in the making."""

    def __init__(self, reader: LogReader, campaign: bytes, source: bytes, event: bytes) -> None:
        self.reader = reader
        self.campaign = campaign
        self.source = source
        self.event = event
        self.header: Header = decode_header(reader.header, reader.genesis.chain_id)
        self.events: dict[int, BundleEvent] = {}
        self.keys: set[bytes] = set()
        self.prefixes: set[bytes] = set()

    def earlier(self, header: bytes, certificate: bytes) -> EarlierHeader:
        older = decode_header(header, self.reader.genesis.chain_id)
        proof = merkle.consistency_proof(older.log_size, self.header.log_size, self.reader.node)
        return EarlierHeader(header, certificate, proof)

    def pinned(self, log_size: int) -> PinnedSize:
        if log_size > self.header.log_size:
            raise Rejected(Reason.NOT_FOUND, f"the log has {self.header.log_size} entries, fewer than {log_size}")
        return PinnedSize(log_size, merkle.consistency_proof(log_size, self.header.log_size, self.reader.node))

    def index_of(self, identifier: bytes, missing: Reason, what: str) -> int:
        index = self.reader.index_of_event(identifier)
        if index is None or index >= self.header.log_size:
            raise Rejected(missing, f"{what} {identifier.hex()} is not on the log")
        return index

    def campaign_events(self) -> list[tuple[int, Entry]]:
        """The campaign's events under the header, in order."""
        indexes = [index for index in self.reader.campaign_indexes(self.campaign) if index < self.header.log_size]
        events = [(index, self.entry(index)) for index in indexes]
        if not any(entry.kind is Kind.CAMPAIGN for _, entry in events):
            raise Rejected(Reason.UNKNOWN_CAMPAIGN, f"campaign {self.campaign.hex()} is not on the log")
        return events

    def entry(self, index: int) -> Entry:
        return decode(self.reader.entry(index), Entry, MAX_ENTRY_BYTES)

    def portions(self, index: int) -> p.Portions:
        return p.decode_portions(self.reader.portions(index))

    def add(
        self,
        index: int,
        *,
        data: p.DataPortion | None = None,
        items: DisclosedItems | None = None,
        governance: p.SaltedPortion | None = None,
        operation: p.SaltedPortion | None = None,
    ) -> None:
        proof = merkle.inclusion_proof(index, self.header.log_size, self.reader.node)
        entry = self.reader.entry(index)
        self.events[index] = BundleEvent(entry, index, proof, data, items, governance, operation)

    def add_job_events(self, disclose: Callable[[int, Entry, p.Portions], None]) -> None:
        """All events of the campaign's job keys, and that these were delegated."""
        for index, entry in self.campaign_events():
            if SHAPES[entry.kind].signed_by_job:
                disclose(index, entry, self.portions(index))
                self.keys.add(DELEGATION_TABLE + entry.signatures[0].signer)

    def grants(self) -> list[tuple[int, Entry]]:
        return [(index, entry) for index, entry in self.campaign_events() if entry.kind is Kind.GRANT]


def _included(export: _Export) -> None:
    index = export.index_of(export.event, Reason.NOT_FOUND, "event")
    export.add(index)
    entry = export.entry(index)
    if SHAPES[entry.kind].signed_by_job:
        export.keys.add(DELEGATION_TABLE + entry.signatures[0].signer)


def _consistent(export: _Export) -> None:
    """Two headers say it all."""


def _policy_in_force(export: _Export) -> None:
    def disclose(index: int, entry: Entry, portions: p.Portions) -> None:
        governance = portions.governance if entry.kind is Kind.STEP else None
        operation = portions.operation if entry.kind is Kind.ROLLBACK and _names_only(portions, ()) else None
        export.add(index, governance=governance, operation=operation)

    export.add_job_events(disclose)
    for index, _ in export.grants():
        export.add(index)
        export.keys.add(GRANT_TABLE + _event_id(export, index))
    for key, _ in export.reader.state.items_with_prefix(POLICY_TABLE):
        index = export.index_of(key[1:], Reason.UNKNOWN_POLICY, "policy")
        export.add(index, governance=export.portions(index).governance)
    export.prefixes.add(POLICY_TABLE)
    export.keys |= {POLICY_HEAD_KEY, CAMPAIGN_TABLE + export.campaign, CAMPAIGN_HEAD_TABLE + export.campaign}


def _source_honored(export: _Export) -> None:
    sources = (export.source,)
    _add_source(export)
    entries = [entry for _, entry in export.campaign_events() if SHAPES[entry.kind].signed_by_job]
    portions_of = {
        entry.sequence: export.portions(index)
        for index, entry in export.campaign_events()
        if SHAPES[entry.kind].signed_by_job
    }
    hidden = any(
        entry.kind is Kind.ROLLBACK and not _names_only(portions_of[entry.sequence], sources) for entry in entries
    )

    used: set[bytes] = set()

    def disclose(index: int, entry: Entry, portions: p.Portions) -> None:
        items = _items_of(portions, p.SourceUse, export.source) if entry.kind is Kind.STEP else None
        governance = None
        if items is not None and portions.governance is not None and _trained_on(items):
            governance = portions.governance
            used.add(decode(governance.content, p.StepGovernance, p.MAX_PORTIONS_BYTES).grant)
        tells = entry.kind is Kind.ROLLBACK or (entry.kind is Kind.STEP and hidden)
        shown = entry.kind is Kind.CAMPAIGN or (tells and _names_only(portions, sources))
        export.add(
            index,
            items=items,
            governance=governance,
            operation=portions.operation if shown else None,
        )

    export.add_job_events(disclose)
    for index, _ in export.grants():
        portions = export.portions(index)
        items = _items_of(portions, p.GrantedSource, export.source)
        if portions.governance is None or (items is None and _event_id(export, index) not in used):
            continue
        export.add(index, items=items, governance=portions.governance, operation=portions.operation)
        terms = decode(portions.governance.content, p.GrantTerms, p.MAX_PORTIONS_BYTES)
        export.keys.add(POLICY_TABLE + terms.policy)
    export.keys |= {SOURCE_TABLE + export.source, usage_key(export.campaign, export.source)}


def _source_unused(export: _Export) -> None:
    export.add(export.index_of(export.source, Reason.UNKNOWN_SOURCE, "source"))
    for index, entry in export.campaign_events():
        if entry.kind is Kind.CAMPAIGN:
            export.keys.add(DELEGATION_TABLE + entry.signatures[0].signer)
        if entry.kind is Kind.CAMPAIGN or entry.kind in CLOSING_KINDS:
            export.add(index)
    export.keys.add(usage_key(export.campaign, export.source))


def _revocation_exposure(export: _Export) -> None:
    _source_honored(export)
    for index, entry in export.campaign_events():
        portions = export.portions(index)
        settles = entry.kind is Kind.STEP and _settles(portions, export.source)
        if entry.kind is Kind.RELEASE or (settles and _names_only(portions, (export.source,))):
            export.events[index] = msgspec.structs.replace(export.events[index], operation=portions.operation)


def _delta_exact(export: _Export) -> None:
    export.add_job_events(
        lambda index, entry, portions: export.add(
            index, operation=None if entry.kind in _APART_FROM_WEIGHTS else portions.operation
        )
    )
    export.keys.add(CAMPAIGN_HEAD_TABLE + export.campaign)
    export.prefixes |= {review_prefix(table, export.campaign) for table in (AUDIT_TABLE, CHALLENGE_TABLE)}


def _refusals_complete(export: _Export) -> None:
    def disclose(index: int, entry: Entry, portions: p.Portions) -> None:
        if entry.kind in (Kind.STEP, Kind.REFUSAL, Kind.ROLLBACK):
            export.add(index, data=portions.data, governance=portions.governance, operation=portions.operation)
        else:
            export.add(index)

    export.add_job_events(disclose)
    for index, _ in export.grants():
        key = GRANT_TABLE + _event_id(export, index)
        export.keys.add(key)
        value = export.reader.state.get(key)
        if value is not None:
            export.keys.add(POLICY_TABLE + read_record(value, GrantRecord).policy)
    key = CAMPAIGN_TABLE + export.campaign
    value = export.reader.state.get(key)
    if value is None:
        raise Rejected(Reason.UNKNOWN_CAMPAIGN, f"campaign {export.campaign.hex()} is not on the log")
    for presented in read_record(value, CampaignRecord).manifest:
        export.keys |= {SOURCE_TABLE + presented.source, usage_key(export.campaign, presented.source)}
    export.keys |= {key, CAMPAIGN_HEAD_TABLE + export.campaign}


def _evidence(export: _Export) -> None:
    index = export.index_of(export.event, Reason.NOT_FOUND, "event")
    if export.entry(index).kind is not Kind.EVIDENCE:
        raise Rejected(Reason.BAD_FIELD, f"event {export.event.hex()} is a {export.entry(index).kind.value}")
    export.add(index, governance=export.portions(index).governance)


def _accumulators(export: _Export) -> None:
    manifest: list[bytes] = []

    def disclose(index: int, entry: Entry, portions: p.Portions) -> None:
        data = portions.data if entry.kind is Kind.CAMPAIGN else None
        if data is not None:
            for item in data.items:
                manifest.append(decode(item.content, p.ManifestRange, p.MAX_PORTIONS_BYTES).source)
        export.add(index, data=data, operation=None if entry.kind in _APART_FROM_WEIGHTS else portions.operation)

    export.add_job_events(disclose)
    for index, _ in export.grants():
        export.add(index)
        key = GRANT_TABLE + _event_id(export, index)
        value = export.reader.state.get(key)
        if value is not None:
            export.keys |= {key, POLICY_TABLE + read_record(value, GrantRecord).policy}
    for source in manifest:
        index = export.index_of(source, Reason.UNKNOWN_SOURCE, "source")
        export.add(index, data=export.portions(index).data)
        export.keys |= {SOURCE_TABLE + source, usage_key(export.campaign, source)}
    export.keys.add(CAMPAIGN_HEAD_TABLE + export.campaign)
    export.prefixes |= {review_prefix(table, export.campaign) for table in (AUDIT_TABLE, CUSTODY_TABLE)}


def _metadata_complete(export: _Export) -> None:
    for index, entry in export.campaign_events():
        if entry.kind is Kind.CAMPAIGN:
            operation = export.portions(index).operation
            assert operation is not None
            export.add(index, operation=operation)
            policy = decode(operation.content, p.Campaign, p.MAX_PORTIONS_BYTES).policy
            export.keys |= {CAMPAIGN_TABLE + export.campaign, POLICY_TABLE + policy}


def _evaluated(export: _Export) -> None:
    for index, entry in export.campaign_events():
        if entry.kind in (Kind.EVALUATION, Kind.DECISION, Kind.AUDIT_CHALLENGE, Kind.AUDIT_RESULT):
            portions = export.portions(index)
            export.add(index, governance=portions.governance, operation=portions.operation)
        if entry.kind is Kind.EVALUATION:
            export.keys.add(DELEGATION_TABLE + entry.signatures[0].signer)
    export.keys |= {CAMPAIGN_TABLE + export.campaign, CAMPAIGN_HEAD_TABLE + export.campaign}
    tables = (EVALUATION_TABLE, DECISION_TABLE, AUDIT_TABLE, CHALLENGE_TABLE)
    export.prefixes |= {review_prefix(table, export.campaign) for table in tables}


def _add_source(export: _Export) -> None:
    """The source's event with its claim, and its revocation."""
    index = export.index_of(export.source, Reason.UNKNOWN_SOURCE, "source")
    export.add(index, data=export.portions(index).data)
    value = export.reader.state.get(SOURCE_TABLE + export.source)
    if value is None:
        raise Rejected(Reason.UNKNOWN_SOURCE, f"source {export.source.hex()} is not on the log")
    revocation = read_record(value, SourceRecord).revocation
    if revocation:
        export.add(export.index_of(revocation, Reason.NOT_FOUND, "revocation"))


def _event_id(export: _Export, index: int) -> bytes:
    return event_id(export.entry(index))


def _items_of(
    portions: p.Portions, content: type[p.SourceUse | p.GrantedSource], source: bytes
) -> DisclosedItems | None:
    """The items about one source, each with its own salt and place; ``None`` where there is none."""
    portion = portions.data
    assert portion is not None
    numbers = [
        number
        for number, item in enumerate(portion.items)
        if decode(item.content, content, p.MAX_PORTIONS_BYTES).source == source
    ]
    if not numbers:
        return None
    leaves = [p.item_leaf(p.item_salt(portion.salt, number), item.content) for number, item in enumerate(portion.items)]
    return DisclosedItems(
        root=merkle.root_of(leaves),
        item_count=len(leaves),
        items=tuple(
            DisclosedItem(
                number=number,
                salt=p.item_salt(portion.salt, number),
                content=portion.items[number].content,
                proof=merkle.inclusion_proof_of(leaves, number),
                examples=None,
            )
            for number in numbers
        ),
    )


def _trained_on(items: DisclosedItems) -> bool:
    """Whether any of a step's disclosed items admits an example."""
    return any(decode(item.content, p.SourceUse, p.MAX_PORTIONS_BYTES).admitted for item in items.items)


def _names_only(portions: p.Portions, sources: Iterable[bytes]) -> bool:
    """Whether a step's or rollback's operation portion names only ``sources``."""
    assert portions.operation is not None
    content: type[p.StepOperation | p.Rollback] = p.Rollback if portions.data is None else p.StepOperation
    operation = decode(portions.operation.content, content, p.MAX_PORTIONS_BYTES)
    named = {signal.source for signal in operation.memorization}
    if isinstance(operation, p.StepOperation):
        named.update(operation.flushed, (carried.source for carried in operation.carried))
    return named <= set(sources)


def _settles(portions: p.Portions, source: bytes) -> bool:
    """Whether a step says what becomes of the source's momentum."""
    assert portions.operation is not None
    operation = decode(portions.operation.content, p.StepOperation, p.MAX_PORTIONS_BYTES)
    return source in operation.flushed or any(carried.source == source for carried in operation.carried)


_COLLECTORS: dict[Predicate, Callable[[_Export], None]] = {
    Predicate.INCLUDED: _included,
    Predicate.CONSISTENT: _consistent,
    Predicate.POLICY_IN_FORCE: _policy_in_force,
    Predicate.SOURCE_HONORED: _source_honored,
    Predicate.SOURCE_UNUSED: _source_unused,
    Predicate.REVOCATION_EXPOSURE: _revocation_exposure,
    Predicate.DELTA_EXACT: _delta_exact,
    Predicate.REFUSALS_COMPLETE: _refusals_complete,
    Predicate.EVIDENCE: _evidence,
    Predicate.ACCUMULATORS: _accumulators,
    Predicate.METADATA_COMPLETE: _metadata_complete,
    Predicate.EVALUATED: _evaluated,
}
