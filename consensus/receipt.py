"""Receipts: that an event stands in the log, or what the log's state says, checked by anyone, offline.

A *receipt* is an event's entry, its RFC 9162 inclusion proof, and a certified header at or after the
ledger block that appended it. A *state receipt* is a proof of one record of the state (or of its absence)
under such a header. ``verify_receipt`` numbers its steps; ``docs/`` and messages use the same numbers:

1. the bytes are canonical, the version is known;
2. header and entry are of this chain (the verifier's ``Anchor``, never something the receipt brought);
3. the links lead from the genesis to the header's epoch, each certified by the epoch before (``epochs``), and the
   certificate is of this very header: every voting role of its epoch finalized it;
4. the entry's leaf hash is in the tree of the header's ``log_size`` and ``log_root``;
5. the entry is well formed for its kind, and everyone who must sign it has: members of the epoch in which it was
   appended.

A state receipt has steps 1 to 3, and the proof against the header's ``state_root`` as step 4.

What an event *says* is in its portions, which a receipt does not hold; see ``bundle.py``. That a job key
was delegated by the entry's author is a fact of the state: the members checked it when they admitted the
event, a bundle proves it again.
"""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from consensus.block import MAX_HEADER_BYTES, Header
from consensus.certificate import MAX_CERTIFICATE_BYTES
from consensus.codec import decode
from consensus.epochs import MAX_LINKS_BYTES, Anchor, CertificateBytes, EpochLinks, HeaderBytes, verify_header
from consensus.event import MAX_ENTRY_BYTES, SHAPES, Entry, check_author, check_signatures, event_id
from consensus.identifiers import Digest
from consensus.membership import Committee
from consensus.merkle import leaf_hash, verify_inclusion
from consensus.portions import Bytes32, Natural, Wire
from consensus.rejection import Reason, Rejected
from consensus.state_map import KEY_BYTES, MAX_VALUE_BYTES, MapProof, verify_map_proof

VERSION = 1
MAX_RECEIPT_BYTES = MAX_ENTRY_BYTES + MAX_HEADER_BYTES + MAX_CERTIFICATE_BYTES + 64 * 34 + 64 + MAX_LINKS_BYTES
MAX_STATE_RECEIPT_BYTES = MAX_VALUE_BYTES + MAX_HEADER_BYTES + MAX_CERTIFICATE_BYTES + 264 * 40 + 256 + MAX_LINKS_BYTES

EntryBytes = Annotated[bytes, Meta(max_length=MAX_ENTRY_BYTES)]
InclusionPath = Annotated[tuple[Bytes32, ...], Meta(max_length=64)]


class Receipt(Wire, frozen=True, tag="receipt"):
    """An event's entry, where it stands in the log, and who vouches for that log."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    entry: EntryBytes
    index: Natural
    proof: InclusionPath
    header: HeaderBytes
    certificate: CertificateBytes
    epochs: EpochLinks = ()


class StateReceipt(Wire, frozen=True, tag="state-receipt"):
    """One record of the state, or its absence, and who vouches for that state."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    key: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    proof: MapProof
    header: HeaderBytes
    certificate: CertificateBytes
    epochs: EpochLinks = ()


@dataclass(frozen=True, slots=True)
class VerifiedEntry:
    """An entry of this chain, well formed and signed."""

    entry: Entry
    id: Digest
    leaf_hash: Digest


@dataclass(frozen=True, slots=True)
class VerifiedReceipt:
    """An event that stands at ``index`` of the log that ``header`` certifies."""

    entry: Entry
    id: Digest
    index: int
    header: Header


@dataclass(frozen=True, slots=True)
class VerifiedState:
    """The record under ``key``, or ``None``: proved absent."""

    key: bytes
    value: bytes | None
    header: Header


def verify_receipt(trusted: Anchor, encoded: bytes) -> VerifiedReceipt:
    """The event of a receipt, checked by the five steps in the module's header.

    Raises:
        Rejected: the first step that fails.
    """
    receipt = decode(encoded, Receipt, MAX_RECEIPT_BYTES)  # 1
    trusted = trusted.led_by(receipt.epochs)
    header = verify_header(trusted, receipt.header, receipt.certificate)  # 2, 3
    verify_inclusion(leaf_hash(receipt.entry), receipt.index, header.log_size, receipt.proof, header.log_root)  # 4
    verified = verify_entry(receipt.entry, trusted.at(receipt.index).committee)  # 2, 5
    return VerifiedReceipt(verified.entry, verified.id, receipt.index, header)


def verify_state_receipt(trusted: Anchor, encoded: bytes, key: bytes) -> VerifiedState:
    """The record under ``key``, or its absence, checked by four steps.

    Raises:
        Rejected: the first step that fails; ``BAD_PROOF`` for a receipt of another key.
    """
    receipt = decode(encoded, StateReceipt, MAX_STATE_RECEIPT_BYTES)  # 1
    if receipt.key != key:
        raise Rejected(Reason.BAD_PROOF, f"receipt of state record {receipt.key.hex()}, expected {key.hex()}")
    trusted = trusted.led_by(receipt.epochs)
    header = verify_header(trusted, receipt.header, receipt.certificate)  # 2, 3
    value = verify_map_proof(header.state_root, receipt.key, receipt.proof)  # 4
    return VerifiedState(receipt.key, value, header)


def verify_entry(encoded: bytes, members: Committee) -> VerifiedEntry:
    """An entry of this chain with every signature its kind needs (steps 2 and 5).

    Raises:
        Rejected: ``WRONG_CHAIN``, ``WRONG_ROLE``, ``BAD_FIELD``, a signature's reason, or as ``codec.decode``.
    """
    entry = decode(encoded, Entry, MAX_ENTRY_BYTES)
    if entry.chain_id != members.chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"event of chain {entry.chain_id.hex()}, this is {members.chain_id.hex()}")
    shape = SHAPES[entry.kind]
    check_author(entry, members)
    if (entry.campaign != bytes(32)) != shape.in_campaign:
        raise Rejected(Reason.BAD_FIELD, f"campaign of {entry.kind.phrase}: {entry.campaign.hex()}")
    identifier = event_id(entry)
    check_signatures(entry, identifier, members)
    return VerifiedEntry(entry, identifier, Digest(leaf_hash(encoded)))
