"""What the log implies, as an authenticated map: every fact later admission or a verifier needs.

Each fact is a record in the sorted state map (``state_map.py``) under a 33-byte key: a table byte and a
32-byte digest. The map's root stands in every header, so that presence *and absence* have proofs.

========  ==================  ==================================================
table     key                 record
========  ==================  ==================================================
1         zero                ``PolicyHead``: the policy in force
2         policy id           ``PolicyRecord``
3         source id           ``SourceRecord``: claim, author, revocation
4         job key's id        ``DelegationRecord``
5         campaign id         ``CampaignRecord``: what was fixed when it opened
6         campaign id         ``CampaignHead``: where it stands
7         grant id            ``GrantRecord``
8         campaign ‖ source   ``Usage``: exact counts of one source in one campaign
9         conviction          ``EvidenceRecord``: a member's first proved offence of a kind in an epoch
10        zero                ``EpochHead``: the newest membership after the genesis
11        member id           ``RetiredMember``: an identity key that left, and who follows it
12        campaign ‖ event    ``EvaluationRecord``: what was measured on which weights, and how it stands
13        campaign ‖ event    ``DecisionRecord``
14        campaign ‖ event    ``AuditRecord``: steps that a member other than the operator took again
15        campaign ‖ event    ``ChallengeRecord``: an audit by lot, and how it stands
16        campaign ‖ member   ``CustodyRecord``: up to where a member holds a campaign's files
========  ==================  ==================================================
"""

from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from consensus.codec import encode
from consensus.identifiers import Tag as DomainTag
from consensus.identifiers import tagged_hash
from consensus.keys import SignatureScheme
from consensus.portions import (
    Bytes32,
    Count,
    Counts,
    ManifestRange,
    Name,
    Natural,
    OptionalBytes32,
    Policy,
    SourceClaim,
    Wire,
)
from consensus.rejection import Reason, Rejected
from consensus.state_map import MAX_VALUE_BYTES, StateMap

POLICY_HEAD_KEY = b"\x01" + bytes(32)
POLICY_TABLE = b"\x02"
SOURCE_TABLE = b"\x03"
DELEGATION_TABLE = b"\x04"
CAMPAIGN_TABLE = b"\x05"
CAMPAIGN_HEAD_TABLE = b"\x06"
GRANT_TABLE = b"\x07"
USAGE_TABLE = b"\x08"
EVIDENCE_TABLE = b"\x09"
EPOCH_HEAD_KEY = b"\x0a" + bytes(32)
RETIRED_TABLE = b"\x0b"
EVALUATION_TABLE = b"\x0c"
DECISION_TABLE = b"\x0d"
AUDIT_TABLE = b"\x0e"
CHALLENGE_TABLE = b"\x0f"
CUSTODY_TABLE = b"\x10"

R = TypeVar("R", bound=Wire)

Bytes48 = Annotated[bytes, Meta(min_length=48, max_length=48)]
Treatment = Annotated[str, Meta(max_length=16)]


class PolicyHead(Wire, frozen=True):
    """The policy in force, since when, and how many there have been."""

    policy: Bytes32
    since_ms: Natural
    count: Natural


class PolicyRecord(Wire, frozen=True):
    """A policy that is or was in force."""

    policy: Policy
    since_ms: Natural


class SourceRecord(Wire, frozen=True):
    """A registered source; ``revoked_at_ms`` is 0 and ``revocation`` empty until its author revokes it."""

    author: Bytes32
    claim: SourceClaim
    registered_at_ms: Natural
    revoked_at_ms: Natural
    revocation: OptionalBytes32


class DelegationRecord(Wire, frozen=True):
    """A job key: whose, for which campaign, for how long, whether another replaced it."""

    operator: Bytes32
    campaign: Bytes32
    scheme: SignatureScheme
    not_before_ms: Natural
    expires_at_ms: Natural
    replaced: bool


class CampaignRecord(Wire, frozen=True):
    """What a campaign fixed when it opened, as far as later events are judged by it."""

    event: Bytes32
    operator: Bytes32
    purpose: Name
    base_root: Bytes32
    blocks: tuple[Name, ...]
    manifest: tuple[ManifestRange, ...]
    sampler_seed: Bytes32
    batch_size: Natural
    planned_steps: Natural
    routing_granularity: Name
    event_granularity: Name
    accumulator_window_steps: Natural
    sketch_rank: Natural
    custody: tuple[Name, ...]
    base_losses_sha256: OptionalBytes32


class SourceCounts(Wire, frozen=True):
    """One source's counts in the last step, so that a rollback can take them back; ``momentum`` as it was before."""

    source: Bytes32
    presented: Natural
    admitted: Natural
    refused: Counts
    momentum: Treatment


class PendingRefusal(Wire, frozen=True):
    """Examples refused for the next step, not yet accounted for by its event."""

    source: Bytes32
    reason: Name
    examples: tuple[Natural, ...]


class CampaignHead(Wire, frozen=True):
    """Where a campaign stands. ``closed`` is empty, ``released`` or ``abandoned``.

    ``last_event`` is the last step, rollback or opening event; ``undo_root`` the parameter root before
    the last step, empty where there is none to undo, or the refusals of the next step left no room for that.
    ``open_findings`` are the evaluations and audit challenges that bar a release.
    """

    job_key: Bytes32
    next_sequence: Natural
    next_grant: Natural
    next_audit: Natural
    attempt: Natural
    steps: Natural
    root: Bytes32
    last_event: Bytes32
    undo_root: OptionalBytes32
    undo_counts: tuple[SourceCounts, ...]
    rollback_required: bool
    pending: tuple[PendingRefusal, ...]
    presented: Natural
    admitted: Natural
    refused: Natural
    refusal_events: Natural
    discarded_steps: Natural
    rollbacks: Natural
    open_findings: tuple[Bytes32, ...]
    closed: Annotated[str, Meta(max_length=16)]
    release: OptionalBytes32


class GrantRecord(Wire, frozen=True):
    """A grant on the log; ``opened_at_ms`` is its ledger block's timestamp, at which sources are judged."""

    campaign: Bytes32
    policy: Bytes32
    job_key: Bytes32
    sources: tuple[Bytes32, ...]
    first_step: Natural
    last_step: Natural
    opened_at_ms: Natural
    closes_at_ms: Natural


class Usage(Wire, frozen=True):
    """Exact counts of one source in one campaign, rolled-back steps taken out and counted apart.

    ``momentum`` is what a step did about the source's gradients after its revocation, ``carry`` or ``flush``; empty
    while none did, and again once the source is admitted.
    """

    campaign: Bytes32
    source: Bytes32
    presented: Natural
    admitted: Natural
    refused: Counts
    discarded: Natural
    first_step: Natural
    last_step: Natural
    momentum: Treatment


class EvidenceRecord(Wire, frozen=True):
    """The event that proves it; later proofs of the same member, epoch and offence are refused."""

    event: Bytes32
    member: Bytes32
    offence: Name
    epoch: Natural
    view: Natural
    recorded_at_ms: Natural


class EpochHead(Wire, frozen=True):
    """The newest epoch and the digest of its membership. In a header of the epoch before: this one is about to end."""

    epoch: Natural
    membership: Bytes32
    event: Bytes32
    since_ms: Natural


class RetiredMember(Wire, frozen=True):
    """An identity key that took part until ``last_epoch`` and never will again; ``successor`` may be empty."""

    last_epoch: Natural
    successor: OptionalBytes32


class Standing(StrEnum):
    """How an evaluation stands: by its thresholds, by a later one of the same test, or by governance's decision."""

    MET = "met"
    UNMET = "unmet"
    SUPERSEDED = "superseded"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class EvaluationRecord(Wire, frozen=True):
    """An evaluation: ``test`` is ``review.examination_digest``, ``standing`` a ``Standing``."""

    campaign: Bytes32
    event: Bytes32
    test: Bytes32
    steps: Natural
    parameter_root: Bytes32
    standing: Name
    recorded_at_ms: Natural


class DecisionRecord(Wire, frozen=True):
    """A decision about ``subject``."""

    campaign: Bytes32
    event: Bytes32
    author: Bytes32
    subject: Bytes32
    outcome: Name
    recorded_at_ms: Natural


class AuditRecord(Wire, frozen=True):
    """An audit result: of the steps from ``first_step`` to ``last_step`` the first ``matched`` came out as recorded.

    One that answers a ``challenge`` is about the steps picked of these: those ``matching`` and those ``differing``.
    """

    campaign: Bytes32
    event: Bytes32
    auditor: Bytes32
    first_step: Natural
    last_step: Natural
    matched: Natural
    challenge: OptionalBytes32
    matching: tuple[Natural, ...]
    differing: tuple[Natural, ...]
    recorded_at_ms: Natural

    @property
    def differing_step(self) -> int | None:
        """The first step that did not come out as recorded, if any."""
        if self.challenge:
            return self.differing[0] if self.differing else None
        return self.first_step + self.matched if self.matched < self.last_step - self.first_step + 1 else None


class ChallengeStanding(StrEnum):
    """How an audit by lot stands. Still ``open`` after its time it has failed: nobody answered."""

    OPEN = "open"
    PASSED = "passed"
    DIFFERED = "differed"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class ChallengeRecord(Wire, frozen=True):
    """An audit by lot; ``beacon_key`` is that of ``epoch``, in which the challenge became final.

    ``barring``: an auditor that the policy names asked for it, so it is an open finding until it passed. ``answer`` is
    the audit result, empty until there is one.
    """

    campaign: Bytes32
    event: Bytes32
    auditor: Bytes32
    number: Natural
    first_step: Natural
    last_step: Natural
    picks: Natural
    answer_by_ms: Natural
    epoch: Natural
    beacon_key: Bytes48
    barring: bool
    answer: OptionalBytes32
    standing: Name
    recorded_at_ms: Natural

    def failed(self, at_ms: int) -> bool:
        """Whether nobody has answered in time, as of then."""
        return not self.answer and at_ms > self.answer_by_ms

    @property
    def stands_open(self) -> bool:
        """Whether it is one of the campaign's open findings."""
        unsettled = self.standing in (ChallengeStanding.OPEN, ChallengeStanding.DIFFERED)
        return self.standing == ChallengeStanding.REJECTED or (self.barring and unsettled)


class CustodyRecord(Wire, frozen=True):
    """A member's newest word that it holds a campaign's files, all up to ``last_event`` (``CampaignHead``'s then)."""

    campaign: Bytes32
    event: Bytes32
    custodian: Bytes32
    last_event: Bytes32
    recorded_at_ms: Natural


def review_prefix(table: bytes, campaign: bytes) -> bytes:
    """What the keys of a campaign's records in ``table`` begin with, 17 bytes."""
    return table + tagged_hash(DomainTag.CAMPAIGN, campaign)[:16]


def review_key(table: bytes, campaign: bytes, event: bytes) -> bytes:
    """Key of a review: the campaign's prefix, then the first 16 bytes of the event's id (of custody: the member's)."""
    return review_prefix(table, campaign) + event[:16]


def usage_key(campaign: bytes, source: bytes) -> bytes:
    """Key of a source's usage in a campaign."""
    return USAGE_TABLE + tagged_hash(DomainTag.CAMPAIGN, campaign, source)


def read_record(encoded: bytes, record: type[R]) -> R:
    """A record from a value of the state map. The map is ours or proved, so its bytes are canonical."""
    try:
        return msgspec.msgpack.decode(encoded, type=record)
    except msgspec.DecodeError as error:
        raise Rejected(Reason.BAD_PROOF, f"a state value is not a {record.__name__}") from error


class StateView:
    """The state while a ledger block is applied: the parent's map under the changes made so far.

    An event's changes are *put* while it is judged, and *committed* together or *discarded* together, so a
    refused event leaves the view untouched.
    """

    def __init__(self, parent: StateMap) -> None:
        self._parent = parent
        self._records: dict[bytes, Wire | None] = {}
        self._put: dict[bytes, Wire] = {}
        self._changed: dict[bytes, bytes] = {}

    def find(self, key: bytes, record: type[R]) -> R | None:
        """The record under ``key``, or None."""
        if key in self._put:
            put = self._put[key]
            assert isinstance(put, record)
            return put
        if key in self._records:
            held = self._records[key]
            assert held is None or isinstance(held, record)
            return held
        encoded = self._parent.get(key)
        found = None if encoded is None else read_record(encoded, record)
        self._records[key] = found
        return found

    def get(self, key: bytes, record: type[R], missing: Reason, what: str) -> R:
        """The record under ``key``.

        Raises:
            Rejected: ``missing`` where there is none.
        """
        found = self.find(key, record)
        if found is None:
            raise Rejected(missing, f"{what} {key[1:].hex()} is not on the log")
        return found

    def put(self, key: bytes, record: Wire) -> None:
        """Set the record under ``key``, once committed."""
        self._put[key] = record

    def commit(self) -> None:
        """Keep what was put since the last commit.

        Raises:
            Rejected: ``OVERSIZED`` for a record the state map cannot hold; nothing is then kept.
        """
        encoded = {key: encode(record) for key, record in self._put.items()}
        for key, value in encoded.items():
            if len(value) > MAX_VALUE_BYTES:
                name = type(self._put[key]).__name__
                raise Rejected(Reason.OVERSIZED, f"a {name} of {len(value)} bytes, at most {MAX_VALUE_BYTES} allowed")
        self._records.update(self._put)
        self._changed.update(encoded)
        self._put = {}

    def discard(self) -> None:
        """Forget what was put since the last commit."""
        self._put = {}

    def changes(self) -> dict[bytes, bytes]:
        """Encoded records committed so far, by key."""
        return dict(sorted(self._changed.items()))


def merge_counts(first: tuple[Count, ...], second: tuple[Count, ...], sign: int = 1) -> tuple[Count, ...]:
    """Counts by reason of both, sorted by reason; ``sign=-1`` subtracts. Zero counts are left out."""
    totals = {count.reason: count.count for count in first}
    for count in second:
        totals[count.reason] = totals.get(count.reason, 0) + sign * count.count
    return tuple(Count(reason, total) for reason, total in sorted(totals.items()) if total)
