"""Bundles: what one predicate needs, in one file, checked without asking anyone.

A bundle names its chain, its predicate and what the predicate is about, and holds *one* certified header
(the "as of" of every answer), events with inclusion proofs and the portions disclosed of them, and proofs
of records of the state. Everything is bounded, canonical and checked by ``open_bundle`` before a predicate
looks at it:

1. magic, size, canonical bytes, version; 2. the chain is the verifier's; 3. the links from the genesis to the header's
epoch, the header's certificate, and that its log continues the one the verifier pins, if it does;
4. each event: inclusion in ``log_root``, form, signatures; 5. each disclosed portion against the entry's commitment;
6. each record, absence or range against ``state_root``.

A portion is disclosed whole, or, for the data portion, item by item: an item comes with its own salt and
its place in the portion's tree, which reveals how many items there are and nothing of the others.

What a bundle leaves out it cannot hide: predicates count against certified records. A *fact* that a
predicate needs and does not find (an event, a record) is ``BUNDLE_INCOMPLETE``; a *portion* that is not
disclosed makes its answer "unknown".
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, TypeVar

from msgspec import Meta

from consensus import portions as p
from consensus.block import Header
from consensus.codec import decode, encode
from consensus.epochs import Anchor, CertificateBytes, EpochLinks, HeaderBytes, Pin, has_pinned, verify_header
from consensus.event import SHAPES, Entry, Kind, Shape
from consensus.identifiers import Digest, Role
from consensus.merkle import leaf_hash, verify_consistency, verify_inclusion
from consensus.receipt import EntryBytes, InclusionPath, verify_entry
from consensus.rejection import Reason, Rejected
from consensus.state import read_record
from consensus.state_map import KEY_BYTES, MapProof, PrefixProof, verify_map_proof, verify_prefix_proof

VERSION = 1
MAGIC = b"countersign-bundle\x00\x01\r\n\x1a\n"
MAX_BUNDLE_BYTES = 128 * 1024 * 1024
MAX_EVENTS = 262_144

R = TypeVar("R", bound=p.Wire)


class DisclosedExamples(p.Wire, frozen=True):
    """All of an item's list, with the key that the salts of its commitments are drawn from."""

    key: p.Bytes32
    examples: Annotated[tuple[p.Natural, ...], Meta(max_length=p.MAX_EXAMPLES)]


class DisclosedItem(p.Wire, frozen=True):
    """One item of a data portion: its salt, content, place. ``examples`` where its list is disclosed too."""

    number: Annotated[int, Meta(ge=0, lt=p.MAX_ITEMS)]
    salt: p.Bytes32
    content: bytes
    proof: InclusionPath
    examples: DisclosedExamples | None


class DisclosedItems(p.Wire, frozen=True):
    """Some items of a data portion, in rising order, with what its commitment is made of."""

    root: p.Bytes32
    item_count: Annotated[int, Meta(ge=1, le=p.MAX_ITEMS)]
    items: Annotated[tuple[DisclosedItem, ...], Meta(max_length=p.MAX_ITEMS)]


class BundleEvent(p.Wire, frozen=True):
    """An event on the log and what is disclosed of it: at most one of ``data`` and ``items``."""

    entry: EntryBytes
    index: p.Natural
    proof: InclusionPath
    data: p.DataPortion | None
    items: DisclosedItems | None
    governance: p.SaltedPortion | None
    operation: p.SaltedPortion | None


class StateProof(p.Wire, frozen=True):
    """The record under one key of the state, or its absence."""

    key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    proof: MapProof


class RangeProof(p.Wire, frozen=True):
    """All records of the state under one prefix."""

    prefix: Annotated[bytes, Meta(min_length=1, max_length=KEY_BYTES)]
    proof: PrefixProof


class EarlierHeader(p.Wire, frozen=True):
    """An older certified header and what shows that the log only grew since."""

    header: HeaderBytes
    certificate: CertificateBytes
    proof: InclusionPath


class PinnedSize(p.Wire, frozen=True):
    """What shows that the log continues the one of this size, which whoever asked for the bundle had seen."""

    log_size: p.Natural
    proof: InclusionPath


class Bundle(p.Wire, frozen=True, tag="bundle"):
    """The wire form after ``MAGIC``. ``campaign``, ``source`` and ``event`` are empty where not asked about."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    chain_id: p.Bytes32
    predicate: Annotated[str, Meta(min_length=1, max_length=64)]
    campaign: p.OptionalBytes32
    source: p.OptionalBytes32
    event: p.OptionalBytes32
    header: HeaderBytes
    certificate: CertificateBytes
    epochs: EpochLinks
    pinned: PinnedSize | None
    earlier: EarlierHeader | None
    events: Annotated[tuple[BundleEvent, ...], Meta(max_length=MAX_EVENTS)]
    records: Annotated[tuple[StateProof, ...], Meta(max_length=MAX_EVENTS)]
    ranges: Annotated[tuple[RangeProof, ...], Meta(max_length=16)]


@dataclass(frozen=True, slots=True)
class OpenItem:
    """A disclosed item of a data portion; ``examples`` is ``None`` where its list is not disclosed."""

    number: int
    content: p.Wire
    examples: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class OpenEvent:
    """An event proved to be on the log, and what it is shown to say; ``None`` where undisclosed or absent."""

    index: int
    id: Digest
    entry: Entry
    items: tuple[OpenItem, ...]
    whole_data: bool
    governance: p.Wire | None
    operation: p.Wire | None

    @property
    def kind(self) -> Kind:
        """What the event says."""
        return self.entry.kind


@dataclass(frozen=True, slots=True)
class OpenBundle:
    """A bundle whose every part is proved. Lookups raise ``BUNDLE_INCOMPLETE`` for what it does not hold."""

    trusted: Anchor
    predicate: str
    campaign: bytes
    source: bytes
    event: bytes
    header: Header
    earlier: Header | None
    events: tuple[OpenEvent, ...]
    by_id: dict[bytes, OpenEvent]
    records: dict[bytes, bytes | None]
    ranges: dict[bytes, tuple[tuple[bytes, bytes], ...]]
    pin: Pin | None = None
    """A log the verifier knows, which this one continues; None where it knows of none."""

    def event_of(self, identifier: bytes, what: str) -> OpenEvent:
        """The event of that id."""
        found = self.by_id.get(identifier)
        if found is None:
            raise Rejected(Reason.BUNDLE_INCOMPLETE, f"{what} {identifier.hex()} is not in the bundle")
        return found

    def find(self, key: bytes, record: type[R]) -> R | None:
        """The record under ``key``, or ``None``: proved absent."""
        if key not in self.records:
            raise Rejected(Reason.BUNDLE_INCOMPLETE, f"no proof of state record {key.hex()} in the bundle")
        value = self.records[key]
        return None if value is None else read_record(value, record)

    def record(self, key: bytes, record: type[R]) -> R:
        """The record under ``key``, which the predicate needs to exist."""
        found = self.find(key, record)
        if found is None:
            raise Rejected(Reason.NOT_FOUND, f"{record.__name__} {key[1:].hex()} is not on the log")
        return found

    def range(self, prefix: bytes, record: type[R]) -> dict[bytes, R]:
        """All records under ``prefix``, by the rest of their keys."""
        if prefix not in self.ranges:
            raise Rejected(Reason.BUNDLE_INCOMPLETE, f"no proof of state records {prefix.hex()}… in the bundle")
        return {key[len(prefix) :]: read_record(value, record) for key, value in self.ranges[prefix]}


def encode_bundle(bundle: Bundle) -> bytes:
    """The bytes of a bundle file."""
    return MAGIC + encode(bundle)


def open_bundle(trusted: Anchor, encoded: bytes, pin: Pin | None = None) -> OpenBundle:
    """A bundle of the anchor's chain with all of its proofs checked; with a ``pin``, of a log that continues it.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` for a log that is not shown to continue the pinned one; ``MALFORMED``,
            ``OVERSIZED``, ``NON_CANONICAL``, ``WRONG_CHAIN``, ``BAD_CERTIFICATE``,
            ``BAD_PROOF``, ``PORTION_MISMATCH``, ``DUPLICATE``, or an entry's or signature's reason.
    """
    if len(encoded) > MAX_BUNDLE_BYTES:
        raise Rejected(Reason.OVERSIZED, f"{len(encoded)} bytes, at most {MAX_BUNDLE_BYTES} allowed")
    if not encoded.startswith(MAGIC):
        raise Rejected(Reason.MALFORMED, "not a bundle: the file does not start with 'countersign-bundle'")
    bundle = decode(encoded[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    if bundle.chain_id != trusted.chain_id:
        raise Rejected(
            Reason.WRONG_CHAIN,
            f"bundle of chain {bundle.chain_id.hex()}, the pinned chain id is {trusted.chain_id.hex()}",
        )
    trusted = trusted.led_by(bundle.epochs)
    header = verify_header(trusted, bundle.header, bundle.certificate)
    earlier = None if bundle.earlier is None else _open_earlier(trusted, bundle.earlier, header)
    if pin is not None:
        _check_pin(pin, bundle, header)
    _check_rising("events", [event.index for event in bundle.events])
    _check_rising("state records", [proof.key for proof in bundle.records])
    _check_rising("state ranges", [proof.prefix for proof in bundle.ranges])
    events = tuple(_open_event(trusted, event, header) for event in bundle.events)
    by_id: dict[bytes, OpenEvent] = {event.id: event for event in events}
    if len(by_id) != len(events):
        raise Rejected(Reason.DUPLICATE, "the bundle holds an event twice")
    return OpenBundle(
        trusted=trusted,
        predicate=bundle.predicate,
        campaign=bundle.campaign,
        source=bundle.source,
        event=bundle.event,
        header=header,
        earlier=earlier,
        events=events,
        by_id=by_id,
        records={proof.key: verify_map_proof(header.state_root, proof.key, proof.proof) for proof in bundle.records},
        ranges={
            proof.prefix: verify_prefix_proof(header.state_root, proof.prefix, proof.proof) for proof in bundle.ranges
        },
        pin=pin,
    )


def _check_pin(pin: Pin, bundle: Bundle, header: Header) -> None:
    """The header's log begins with the pinned one."""
    if has_pinned(pin, header):
        return
    if header.log_size < pin.log_size:
        raise Rejected(
            Reason.BAD_CHECKPOINT,
            f"a log of size {header.log_size}, older than the pinned one of size {pin.log_size}: ask for a newer",
        )
    if bundle.pinned is None or bundle.pinned.log_size != pin.log_size:
        raise Rejected(
            Reason.BAD_CHECKPOINT,
            f"nothing shows that the log of size {header.log_size} continues the pinned one of size {pin.log_size}: "
            "ask for the bundle with this checkpoint",
        )
    try:
        verify_consistency(pin.log_size, header.log_size, bundle.pinned.proof, pin.log_root, header.log_root)
    except Rejected as error:
        raise Rejected(Reason.BAD_CHECKPOINT, f"another history than the pinned one: {error.detail}") from error


def _check_rising(what: str, places: list[int] | list[bytes]) -> None:
    if any(not first < second for first, second in pairwise(places)):  # type: ignore[operator]
        raise Rejected(Reason.DUPLICATE, f"{what} of the bundle are not in strictly increasing order")


def _open_earlier(trusted: Anchor, earlier: EarlierHeader, header: Header) -> Header:
    older = verify_header(trusted, earlier.header, earlier.certificate)
    verify_consistency(older.log_size, header.log_size, earlier.proof, older.log_root, header.log_root)
    return older


def _open_event(trusted: Anchor, event: BundleEvent, header: Header) -> OpenEvent:
    verify_inclusion(leaf_hash(event.entry), event.index, header.log_size, event.proof, header.log_root)
    verified = verify_entry(event.entry, trusted.at(event.index).committee)
    entry = verified.entry
    shape = SHAPES[entry.kind]
    return OpenEvent(
        index=event.index,
        id=verified.id,
        entry=entry,
        items=_open_data(event, entry, shape),
        whole_data=event.data is not None,
        governance=_open_portion(entry, Role.GOVERNANCE, event.governance, entry.governance, shape.governance),
        operation=_open_portion(entry, Role.OPERATOR, event.operation, entry.operation, shape.operation),
    )


def _open_portion(
    entry: Entry, role: Role, held: p.SaltedPortion | None, commitment: bytes, content: type[p.Wire] | None
) -> p.Wire | None:
    if held is None:
        return None
    if content is None or p.portion_commitment(entry.kind.value, role, held.salt, held.content) != commitment:
        raise Rejected(
            Reason.PORTION_MISMATCH,
            f"{role.value} portion of {entry.kind.phrase} is not the one its entry commits to",
        )
    return decode(held.content, content, p.MAX_PORTIONS_BYTES)


def _open_data(event: BundleEvent, entry: Entry, shape: Shape) -> tuple[OpenItem, ...]:
    if event.data is None and event.items is None:
        return ()
    if shape.data is None or (event.data is not None and event.items is not None):
        raise Rejected(Reason.PORTION_MISMATCH, f"data portion of {entry.kind.phrase} disclosed twice or absent")
    if event.data is not None:
        root, count = p.data_items_root(event.data), len(event.data.items)
    else:
        assert event.items is not None
        root, count = Digest(event.items.root), event.items.item_count
    if p.data_commitment(entry.kind.value, root, count) != entry.data:
        raise Rejected(
            Reason.PORTION_MISMATCH,
            f"data portion of {entry.kind.phrase} is not the one its entry commits to",
        )
    if event.data is not None:
        return _open_whole(event.data, shape.data)
    assert event.items is not None
    return _open_some(event.items, shape.data)


def _open_whole(portion: p.DataPortion, content: type[p.Wire]) -> tuple[OpenItem, ...]:
    opened = []
    for number, item in enumerate(portion.items):
        decoded = decode(item.content, content, p.MAX_PORTIONS_BYTES)
        if isinstance(decoded, p.SourceUse | p.SourceRefusal):
            p.check_examples(portion, number, decoded.examples_root)
            _check_count(decoded, item.examples)
        elif item.examples:
            raise Rejected(Reason.PORTION_MISMATCH, f"item {number} lists examples and commits to none")
        opened.append(OpenItem(number, decoded, item.examples))
    return tuple(opened)


def _open_some(disclosed: DisclosedItems, content: type[p.Wire]) -> tuple[OpenItem, ...]:
    _check_rising("disclosed items", [item.number for item in disclosed.items])
    opened = []
    for item in disclosed.items:
        leaf = p.item_leaf(item.salt, item.content)
        verify_inclusion(leaf, item.number, disclosed.item_count, item.proof, disclosed.root)
        decoded = decode(item.content, content, p.MAX_PORTIONS_BYTES)
        examples: tuple[int, ...] | None = None
        if item.examples is not None:
            examples = item.examples.examples
            if not isinstance(decoded, p.SourceUse | p.SourceRefusal):
                raise Rejected(Reason.PORTION_MISMATCH, f"item {item.number} lists examples and commits to none")
            if p.examples_root(item.examples.key, examples) != decoded.examples_root:
                raise Rejected(Reason.PORTION_MISMATCH, f"examples of item {item.number} do not hash to its root")
            _check_count(decoded, examples)
        opened.append(OpenItem(item.number, decoded, examples))
    return tuple(opened)


def _check_count(content: p.SourceUse | p.SourceRefusal, examples: tuple[int, ...]) -> None:
    expected = content.admitted if isinstance(content, p.SourceUse) else content.count
    if len(examples) != expected:
        raise Rejected(Reason.COUNTS_NOT_CONSERVED, f"an item counts {expected} examples and lists {len(examples)}")
