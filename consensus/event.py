"""Events: the log's entries, their kinds, signatures, and every check that needs no state.

A *signed event* travels as one MessagePack array: the leaf entry's bytes and the portions' bytes. The
entry's bytes are the log's leaf, exactly as received. An event's *id* is the hash of its entry without
signatures; a leaf hash covers them.

Who signs (◆ of the design: one member never speaks for its role):

=============================  ==========================================================
policy                         ``t_r`` governance members, the author among them
source, revocation             the author, a data-source member
evidence                       the author, a member of any voting role
membership                     ``t_r`` members of *every* voting role, the author among them
delegation                     the author, an operator
grant                          the author (operator), ``t_r`` governance members, every
                               data-source authority whose source it names
decision                       the author of a voting role; of governance, ``t_r`` members of it, the author among them
audit-challenge, audit-result  the author, a member that is not an operator
custody                        the author, a member that is not an operator
campaign, step, refusal,       the operator's delegated job key (``job_key.py``)
rollback, abandon, release,
evaluation
=============================  ==========================================================

``check_event`` does all that needs only the event and the members; ``admission.py`` does what needs state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from consensus import portions as p
from consensus.batch_signature import sign_messages, verify_field
from consensus.codec import decode, encode
from consensus.evidence import EvidenceReport, check_evidence
from consensus.identifiers import (
    DIGEST_BYTES,
    VOTING_ROLES,
    ChainId,
    Digest,
    MemberId,
    Role,
    Tag,
    tagged_hash,
    tagged_message,
    tagged_prefix,
)
from consensus.job_key import MAX_JOB_SIGNATURE_BYTES, job_key_id, sign_as_job, verify_job_signature
from consensus.keys import Signer
from consensus.membership import MAX_SIGNERS, Committee
from consensus.membership_change import MembershipChange, check_change
from consensus.merkle import leaf_hash
from consensus.rejection import Reason, Rejected
from consensus.review import AuditChallenge, AuditResult, Decision, Evaluation

VERSION = 1
MAX_ENTRY_BYTES = 65_535
MAX_EVENT_BYTES = MAX_ENTRY_BYTES + p.MAX_PORTIONS_BYTES + 16
JOB_SIGNER_ROLE = "job"


class Kind(StrEnum):
    """What an event says."""

    POLICY = "policy"
    SOURCE = "source"
    REVOCATION = "revocation"
    DELEGATION = "delegation"
    CAMPAIGN = "campaign"
    GRANT = "grant"
    STEP = "step"
    REFUSAL = "refusal"
    ROLLBACK = "rollback"
    ABANDON = "abandon"
    RELEASE = "release"
    EVIDENCE = "evidence"
    MEMBERSHIP = "membership"
    EVALUATION = "evaluation"
    DECISION = "decision"
    AUDIT_CHALLENGE = "audit-challenge"
    AUDIT_RESULT = "audit-result"
    CUSTODY = "custody"

    @property
    def phrase(self) -> str:
        """With its article: ``a step event``, ``an evaluation event``."""
        return f"{'an' if self.value[0] in 'aeiou' else 'a'} {self.value} event"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kind is made of: who authors it, who signs it, the types of its portions."""

    authors: tuple[Role, ...]
    signed_by_job: bool
    in_campaign: bool
    data: type[p.Wire] | None
    governance: type[p.Wire] | None
    operation: type[p.Wire] | None


AUDITING_ROLES = tuple(role for role in Role if role is not Role.OPERATOR)
"""Who may say what came out when the operator's steps were taken again."""

SHAPES: Mapping[Kind, Shape] = {
    Kind.POLICY: Shape((Role.GOVERNANCE,), False, False, None, p.Policy, None),
    Kind.SOURCE: Shape((Role.DATA_SOURCE,), False, False, p.SourceClaim, None, None),
    Kind.REVOCATION: Shape((Role.DATA_SOURCE,), False, False, p.SourceRevocation, None, None),
    Kind.DELEGATION: Shape((Role.OPERATOR,), False, True, None, None, p.Delegation),
    Kind.CAMPAIGN: Shape((Role.OPERATOR,), True, True, p.ManifestRange, None, p.Campaign),
    Kind.GRANT: Shape((Role.OPERATOR,), False, True, p.GrantedSource, p.GrantTerms, p.GrantOperation),
    Kind.STEP: Shape((Role.OPERATOR,), True, True, p.SourceUse, p.StepGovernance, p.StepOperation),
    Kind.REFUSAL: Shape((Role.OPERATOR,), True, True, p.SourceRefusal, p.RefusalGovernance, p.RefusalOperation),
    Kind.ROLLBACK: Shape((Role.OPERATOR,), True, True, None, p.RollbackGovernance, p.Rollback),
    Kind.ABANDON: Shape((Role.OPERATOR,), True, True, None, None, p.Abandon),
    Kind.RELEASE: Shape((Role.OPERATOR,), True, True, None, None, p.Release),
    Kind.EVIDENCE: Shape(VOTING_ROLES, False, False, None, EvidenceReport, None),
    Kind.MEMBERSHIP: Shape(VOTING_ROLES, False, False, None, MembershipChange, None),
    Kind.EVALUATION: Shape((Role.OPERATOR,), True, True, None, None, Evaluation),
    Kind.DECISION: Shape(VOTING_ROLES, False, True, None, Decision, None),
    Kind.AUDIT_CHALLENGE: Shape(AUDITING_ROLES, False, True, None, AuditChallenge, None),
    Kind.AUDIT_RESULT: Shape(AUDITING_ROLES, False, True, None, AuditResult, None),
    Kind.CUSTODY: Shape(AUDITING_ROLES, False, True, None, p.Custody, None),
}

SINGLE_ITEM_KINDS = frozenset({Kind.SOURCE, Kind.REVOCATION})

_SIGNED_BY_SEVERAL = frozenset({Kind.POLICY, Kind.GRANT, Kind.MEMBERSHIP, Kind.DECISION})
"""What others than its author may have to sign; of decisions those of the governance members."""

_LISTING = (p.SourceUse, p.SourceRefusal)
"""Items that list examples."""


class EventSignature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``signer`` is a member id or a job key's id; ``signature`` as in ``batch_signature.py`` or ``job_key.py``."""

    signer: p.Bytes32
    signature: Annotated[bytes, Meta(min_length=64, max_length=MAX_JOB_SIGNATURE_BYTES)]


class Entry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="event"):
    """The log's leaf: who says what about which campaign, by commitments, with signatures.

    ``campaign`` is 32 zero bytes outside campaigns. Within one, the job key's events are numbered by
    ``sequence`` from 0 (the ``campaign`` event), grants by their own from 1; ``attempt`` counts rollbacks.
    """

    version: Annotated[int, Meta(ge=1, le=1)]
    chain_id: p.Bytes32
    kind: Kind
    author: p.Bytes32
    campaign: p.Bytes32
    sequence: p.Natural
    attempt: p.Natural
    data: p.OptionalBytes32
    governance: p.OptionalBytes32
    operation: p.OptionalBytes32
    signatures: Annotated[tuple[EventSignature, ...], Meta(max_length=MAX_SIGNERS)]


class SignedEvent(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An event on the wire: the entry's bytes and the portions' bytes, each canonical."""

    entry: bytes
    portions: bytes


class CheckedEvent(NamedTuple):
    """An event that passed ``check_event``: bytes as received, and their decoded content.

    A node makes one for every event, and a frozen dataclass takes four times as long to make.
    """

    entry_bytes: bytes
    portions_bytes: bytes
    entry: Entry
    portions: p.Portions
    id: Digest
    leaf_hash: Digest
    signers: frozenset[bytes]
    items: tuple[p.Wire, ...]
    governance: p.Wire | None
    operation: p.Wire | None


def event_id(entry: Entry) -> Digest:
    """Hash of the entry without its signatures."""
    return tagged_hash(Tag.EVENT, encode(_bearing(entry, ())))


def _bearing(entry: Entry, signatures: tuple[EventSignature, ...]) -> Entry:
    """The entry with these signatures in place of its own."""
    return Entry(
        entry.version,
        entry.chain_id,
        entry.kind,
        entry.author,
        entry.campaign,
        entry.sequence,
        entry.attempt,
        entry.data,
        entry.governance,
        entry.operation,
        signatures,
    )


def signature_message(entry: Entry, identifier: Digest, signer_role: str) -> bytes:
    """What a signer signs: chain, kind, version, its role (``job`` for a job key), and the event's id."""
    start = _signature_start(entry.chain_id, entry.kind, entry.version, signer_role)
    return _MESSAGE_START + sha256(start + identifier).digest()


_MESSAGE_START = tagged_message(Tag.EVENT_SIGNATURE)[:-DIGEST_BYTES]


@lru_cache(maxsize=256)
def _signature_start(chain_id: bytes, kind: Kind, version: int, signer_role: str) -> bytes:
    """What is hashed before the id: the same for nearly all that a log has of a kind."""
    parts = (chain_id, kind.encode(), version.to_bytes(4, "big"), signer_role.encode())
    return tagged_prefix(Tag.EVENT_SIGNATURE, *parts) + DIGEST_BYTES.to_bytes(8, "big")


def make_entry(
    chain_id: ChainId,
    kind: Kind,
    author: MemberId,
    portions: p.Portions,
    *,
    campaign: bytes = bytes(32),
    sequence: int = 0,
    attempt: int = 0,
) -> Entry:
    """An unsigned entry committing to ``portions``."""
    data, governance, operation = p.commitments(kind, portions)
    return Entry(VERSION, chain_id, kind, author, campaign, sequence, attempt, data, governance, operation, ())


def sign_entry(entry: Entry, signer_id: bytes, signer_role: str, signer: Signer) -> Entry:
    """The entry with one more signature, in signer order. A signer's earlier signature is replaced."""
    return sign_entries([entry], signer_id, signer_role, signer)[0]


def sign_entries(entries: Sequence[Entry], signer_id: bytes, signer_role: str, signer: Signer) -> list[Entry]:
    """As ``sign_entry``, all with one signature: whoever verifies them in a row checks it once."""
    fields = sign_messages(signer, [signature_message(entry, event_id(entry), signer_role) for entry in entries])
    return [
        add_signature(entry, EventSignature(signer_id, field)) for entry, field in zip(entries, fields, strict=True)
    ]


def sign_entries_as_job(entries: Sequence[Entry], key: Signer) -> list[Entry]:
    """The entries with a job key's signature, the only one each may have; it is one for all of them."""
    fields = sign_as_job(key, [signature_message(entry, event_id(entry), JOB_SIGNER_ROLE) for entry in entries])
    identifier = job_key_id(key)
    return [
        add_signature(entry, EventSignature(identifier, field)) for entry, field in zip(entries, fields, strict=True)
    ]


def add_signature(entry: Entry, signature: EventSignature) -> Entry:
    """The entry with this signature, in signer order. A signer's earlier signature is replaced."""
    others = [held for held in entry.signatures if held.signer != signature.signer]
    return _bearing(entry, tuple(sorted([*others, signature], key=lambda held: held.signer)))


def pack(entry: Entry, portions: p.Portions) -> bytes:
    """The wire form of a signed event."""
    return encode(SignedEvent(encode(entry), encode(portions)))


def pack_parts(entry: bytes, portions: bytes) -> bytes:
    """The wire form of a signed event whose two byte strings are already canonical."""
    return encode(SignedEvent(entry, portions))


def unpack(encoded: bytes) -> SignedEvent:
    """A signed event's two byte strings, not yet checked.

    Raises:
        Rejected: as ``codec.decode``.
    """
    return decode(encoded, SignedEvent, MAX_EVENT_BYTES)


def check_event(encoded: bytes, committee: Committee) -> CheckedEvent:
    """Every check of an event that needs no state, in order of cost.

    1. canonical bytes and sizes, 2. chain, 3. shape of its kind, 4. author and role, 5. commitments and
    the content of each portion, 6. signatures, 7. what evidence proves, and that a membership may follow this one.

    Raises:
        Rejected: the first rule broken.
    """
    wire = unpack(encoded)
    return check_parts(wire.entry, wire.portions, committee)


def check_parts(entry_bytes: bytes, portions_bytes: bytes, committee: Committee) -> CheckedEvent:
    """``check_event`` for an event whose two byte strings are already apart."""
    event = check_unsigned(entry_bytes, portions_bytes, committee)
    _check_claims(event, committee)
    return event


def check_each(events: Iterable[SignedEvent], committee: Committee) -> list[CheckedEvent | Rejected]:
    """``check_parts`` of each, in order; where one is refused, why.

    Without tracebacks, which would hold it and the event in a cycle.

    The content of all is checked before the signatures of any: going to and fro between the two, a processor takes a
    tenth longer over each.
    """
    checked: list[CheckedEvent | Rejected] = []
    for wire in events:
        try:
            checked.append(check_unsigned(wire.entry, wire.portions, committee))
        except Rejected as error:
            checked.append(error.anew())
    for place, event in enumerate(checked):
        if isinstance(event, CheckedEvent):
            try:
                _check_claims(event, committee)
            except Rejected as error:
                checked[place] = error.anew()
    return checked


def _check_claims(event: CheckedEvent, committee: Committee) -> None:
    """What of ``check_event`` is left after ``check_unsigned``: signatures, and what evidence and memberships claim."""
    check_signatures(event.entry, event.id, committee)
    if isinstance(event.governance, EvidenceReport):
        check_evidence(event.governance, committee)
    if isinstance(event.governance, MembershipChange):
        check_change(event.governance.membership, committee)


def check_unsigned(entry_bytes: bytes, portions_bytes: bytes, committee: Committee) -> CheckedEvent:
    """All of ``check_event`` except signatures: what a countersigner checks before it adds its own.

    Raises:
        Rejected: the first rule broken.
    """
    entry = decode(entry_bytes, Entry, MAX_ENTRY_BYTES)
    portions = p.decode_portions(portions_bytes)
    if entry.chain_id != committee.chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"event of chain {entry.chain_id.hex()}, this is {committee.chain_id.hex()}")
    shape = SHAPES[entry.kind]
    if (entry.campaign != bytes(32)) != shape.in_campaign:
        raise Rejected(Reason.BAD_FIELD, f"campaign of {entry.kind.phrase}: {entry.campaign.hex()}")
    if not shape.in_campaign and (entry.sequence or entry.attempt):
        raise Rejected(Reason.BAD_FIELD, f"{entry.kind.phrase} has sequence and attempt 0")
    check_author(entry, committee)
    expected = p.commitments(entry.kind, portions)
    if expected != (entry.data, entry.governance, entry.operation):
        raise Rejected(Reason.PORTION_MISMATCH, "the entry's commitments are not those of its portions")
    items = _decode_items(entry.kind, portions.data, shape.data)
    governance = _decode_portion(entry.kind, portions.governance, shape.governance, "governance")
    operation = _decode_portion(entry.kind, portions.operation, shape.operation, "operation")
    return CheckedEvent(
        entry_bytes=entry_bytes,
        portions_bytes=portions_bytes,
        entry=entry,
        portions=portions,
        id=event_id(entry),
        leaf_hash=leaf_hash(entry_bytes),
        signers=frozenset([held.signer for held in entry.signatures]),
        items=items,
        governance=governance,
        operation=operation,
    )


def check_author(entry: Entry, committee: Committee) -> None:
    """The author is a member of a role that may write this kind.

    Raises:
        Rejected: ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
    """
    author = committee.member(MemberId(entry.author))
    authors = SHAPES[entry.kind].authors
    if author.role not in authors:
        raise Rejected(
            Reason.WRONG_ROLE,
            f"{entry.kind.phrase} is authored by a {' or '.join(role.value for role in authors)}, "
            f"{author.name} is a {author.role.value}",
        )


def check_signature(entry: Entry, identifier: Digest, held: EventSignature, committee: Committee) -> None:
    """One signature of a member is valid.

    Raises:
        Rejected: ``UNKNOWN_MEMBER`` or ``BAD_SIGNATURE``.
    """
    member = committee.member(MemberId(held.signer))
    message = signature_message(entry, identifier, member.role)
    verify_field(member.scheme, member.identity_key, message, held.signature)


def _decode_items(kind: Kind, portion: p.DataPortion | None, item_type: type[p.Wire] | None) -> tuple[p.Wire, ...]:
    if (portion is None) != (item_type is None):
        raise Rejected(Reason.PORTION_MISMATCH, f"data portion of {kind.phrase}")
    if portion is None or item_type is None:
        return ()
    if not portion.items or (kind in SINGLE_ITEM_KINDS and len(portion.items) != 1):
        raise Rejected(Reason.PORTION_MISMATCH, f"{len(portion.items)} items in {kind.phrase}")
    listed = sum([len(item.examples) for item in portion.items])
    if listed > p.MAX_EVENT_EXAMPLES:
        raise Rejected(Reason.OVERSIZED, f"{listed} examples in one event, at most {p.MAX_EVENT_EXAMPLES} allowed")
    items = tuple([decode(item.content, item_type, p.MAX_PORTIONS_BYTES) for item in portion.items])
    for number, item in enumerate(items):
        if isinstance(item, _LISTING):
            p.check_examples(portion, number, item.examples_root)
            expected = item.admitted if isinstance(item, p.SourceUse) else item.count
            if len(portion.items[number].examples) != expected:
                raise Rejected(
                    Reason.COUNTS_NOT_CONSERVED,
                    f"item {number} counts {expected} examples and lists {len(portion.items[number].examples)}",
                )
        elif portion.items[number].examples:
            raise Rejected(Reason.PORTION_MISMATCH, f"an item of {kind.phrase} lists no examples")
    return items


def _decode_portion(
    kind: Kind, portion: p.SaltedPortion | None, content_type: type[p.Wire] | None, name: str
) -> p.Wire | None:
    if (portion is None) != (content_type is None):
        raise Rejected(Reason.PORTION_MISMATCH, f"{name} portion of {kind.phrase}")
    if portion is None or content_type is None:
        return None
    return decode(portion.content, content_type, p.MAX_PORTIONS_BYTES)


def check_signatures(entry: Entry, identifier: Digest, committee: Committee) -> None:
    """The signatures its kind needs, in order, none more, all valid.

    Raises:
        Rejected: ``BAD_FIELD``, ``MISSING_SIGNATURE``, ``SURPLUS_SIGNATURE``, ``UNKNOWN_MEMBER``, ``BAD_SIGNATURE``.
    """
    signers = [held.signer for held in entry.signatures]
    if len(signers) > 1 and signers != sorted(set(signers)):
        raise Rejected(Reason.BAD_FIELD, "signatures are not in strictly increasing order of signer")
    if SHAPES[entry.kind].signed_by_job:
        if len(signers) != 1:
            raise Rejected(Reason.MISSING_SIGNATURE, f"{entry.kind.phrase} has one signature, its job key's")
        held = entry.signatures[0]
        verify_job_signature(held.signer, signature_message(entry, identifier, JOB_SIGNER_ROLE), held.signature)
        return
    if entry.author not in signers:
        raise Rejected(Reason.MISSING_SIGNATURE, "the author has not signed")
    if entry.kind in _SIGNED_BY_SEVERAL:
        _check_signers(entry, signers, committee)
    elif len(signers) != 1:
        raise Rejected(Reason.SURPLUS_SIGNATURE, f"{entry.kind.phrase} is signed by its author alone")
    for held in entry.signatures:
        check_signature(entry, identifier, held, committee)


def _check_signers(entry: Entry, signers: list[bytes], committee: Committee) -> None:
    governed = entry.kind is Kind.DECISION and committee.member(MemberId(entry.author)).role == Role.GOVERNANCE
    if entry.kind is Kind.POLICY or governed:
        _check_signer_roles(signers, committee, {Role.GOVERNANCE})
    elif entry.kind is Kind.GRANT:
        _check_signer_roles(signers, committee, {Role.GOVERNANCE, Role.DATA_SOURCE, Role.OPERATOR})
    elif entry.kind is Kind.MEMBERSHIP:
        _check_signer_roles(signers, committee, set(VOTING_ROLES))
        if not committee.has_quorum(MemberId(signer) for signer in signers):
            raise Rejected(Reason.MISSING_SIGNATURE, "a change of members is signed by a quorum of every voting role")
    elif len(signers) != 1:
        raise Rejected(Reason.SURPLUS_SIGNATURE, f"{entry.kind.phrase} is signed by its author alone")
    if entry.kind in (Kind.POLICY, Kind.GRANT) or governed:
        governance = sum(committee.member(MemberId(signer)).role == Role.GOVERNANCE for signer in signers)
        threshold = committee.threshold(Role.GOVERNANCE)
        if governance < threshold:
            raise Rejected(Reason.MISSING_SIGNATURE, f"{governance} governance signatures, {threshold} are needed")


def _check_signer_roles(signers: list[bytes], committee: Committee, roles: set[Role]) -> None:
    for signer in signers:
        member = committee.member(MemberId(signer))
        if member.role not in roles:
            raise Rejected(
                Reason.SURPLUS_SIGNATURE, f"{member.name} is a {member.role}, its signature has no place here"
            )
