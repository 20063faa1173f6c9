"""Evidence: two messages, signed by one member, that no honest member can both have signed.

Rules:

- The blame rests on identity signatures alone. A BLS share is no part of it: any ``t`` shares of a role forge
  another member's, and two votes that differ in nothing but share or signature say the same.
- What convicts, by offence (the rules of ``vote``):

  ========================  ===========================================================================
  ``two-notarize-votes``    notarize votes of one view for two ledger blocks
  ``two-finalize-votes``    finalize votes of one view for two ledger blocks
  ``nullify-and-finalize``  a nullify and a finalize vote of one view
  ``two-proposals``         two headers of one view, both signed as proposals by that view's leader
  ========================  ===========================================================================

- One record for each member, epoch and offence: the first proof is enough to act on, and whoever signs a thousand
  contradictions fills no log with them.
- A contradiction convicts in its own epoch and in every later one, by the members of its own. Nothing in two messages
  tells when they were signed: a key that is out of use can still sign both, whoever has it then.

Anyone checks an ``EvidenceReport`` with the members' keys alone; the event that carries it is authored by any
voting member of the epoch it is appended in, who vouches for nothing. What follows from evidence is for people, and a
``membership`` change.
"""

from dataclasses import dataclass
from enum import StrEnum

from consensus.block import decode_header
from consensus.identifiers import Digest, MemberId, Tag, tagged_hash
from consensus.membership import Committee
from consensus.portions import Wire
from consensus.rejection import Reason, Rejected
from consensus.vote import (
    ProposalEvidence,
    VoteEvidence,
    VoteKind,
    check_signed_header,
    check_vote,
    conflicting,
)


class Offence(StrEnum):
    """Which rule the two messages break together."""

    TWO_NOTARIZE_VOTES = "two-notarize-votes"
    TWO_FINALIZE_VOTES = "two-finalize-votes"
    NULLIFY_AND_FINALIZE = "nullify-and-finalize"
    TWO_PROPOSALS = "two-proposals"


class EvidenceReport(Wire, frozen=True):
    """Governance portion of an ``evidence`` event: the two signed messages."""

    proof: VoteEvidence | ProposalEvidence


@dataclass(frozen=True, slots=True)
class Conviction:
    """Whom a report convicts, of what, in which view of which epoch."""

    member: MemberId
    offence: Offence
    epoch: int
    view: int

    @property
    def digest(self) -> Digest:
        """What the state files it under: not the view, so that one member's offences of one kind are one record."""
        return tagged_hash(Tag.EVIDENCE, self.member, self.epoch.to_bytes(8, "big"), self.offence.value.encode())


def check_evidence(report: EvidenceReport, committee: Committee) -> Conviction:
    """Both messages are of this chain and one epoch, well formed, signed by one member, and contradict each other.

    The epoch is that of ``committee`` or one before it.

    Raises:
        Rejected: ``NO_CONFLICT`` when an honest member may sign both; ``WRONG_EPOCH`` for one that has not begun; and
            as ``check_vote`` or ``check_signed_header``.
    """
    conviction = convicted(report, committee)
    committee = committee.of_epoch(conviction.epoch)
    match report.proof:
        case VoteEvidence(first, second):
            check_vote(first, committee)
            check_vote(second, committee)
        case ProposalEvidence(first, second):
            check_signed_header(first, committee)
            check_signed_header(second, committee)
    return conviction


def convicted(report: EvidenceReport, committee: Committee) -> Conviction:
    """Whom the report convicts if its signatures are valid; they are not looked at.

    Raises:
        Rejected: ``NO_CONFLICT``, or as ``codec.decode`` for a header that is not canonical.
    """
    match report.proof:
        case VoteEvidence(first, second):
            if not conflicting(first, second):
                raise Rejected(Reason.NO_CONFLICT, "no rule forbids the two votes together")
            return Conviction(MemberId(first.voter), _offence_of(first.kind, second.kind), first.epoch, first.view)
        case ProposalEvidence(first, second):
            one = decode_header(first.header, committee.chain_id)
            other = decode_header(second.header, committee.chain_id)
            if (one.epoch, one.view, one.leader) != (other.epoch, other.view, other.leader) or one == other:
                raise Rejected(Reason.NO_CONFLICT, "the two proposals are not of one leader and view, or are the same")
            return Conviction(MemberId(one.leader), Offence.TWO_PROPOSALS, one.epoch, one.view)


def _offence_of(first: VoteKind, second: VoteKind) -> Offence:
    if first != second:
        return Offence.NULLIFY_AND_FINALIZE
    return Offence.TWO_NOTARIZE_VOTES if first == VoteKind.NOTARIZE else Offence.TWO_FINALIZE_VOTES
