"""Votes, proposals and quorums of votes.

Every voter of a view may say three things about it: *notarize* one proposal, *nullify* the view, or
*finalize* the notarized proposal. A vote carries its voter's identity signature, which covers the BLS
share that rides on a finalize vote: shares alone are no evidence, since any ``t`` of them forge another's.

Rules (DESIGN §6; Chan and Pass, eprint 2023/463):

- A voter notarizes at most one ledger block per view.
- A voter never nullifies and finalizes the same view.
- A voter finalizes at most one ledger block per view.
- A leader proposes at most one ledger block in its view.
- A quorum is ``t_r`` members of every voting role.

``check_*`` verify one message on its own: bytes, place, signatures. ``Tally`` counts checked votes of one
view and returns ``Evidence`` where two of one voter break a rule; what evidence proves is told by ``evidence``.
When to vote is left to ``engine``, the 96-byte finalization to ``certificate``.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

from consensus import keys
from consensus.block import (
    MAX_HEADER_BYTES,
    VERSION,
    Body,
    Bytes32,
    Header,
    check_body,
    decode_header,
    header_digest,
)
from consensus.codec import encode
from consensus.identifiers import ZERO_DIGEST, Digest, MemberId, Tag, View, tagged_message
from consensus.membership import MAX_MEMBERS, Committee
from consensus.rejection import Reason, Rejected

MAX_VIEW = 2**53 - 1
MAX_SHARE_BYTES = keys.ML_DSA_65_SIGNATURE_BYTES
MAX_SIGNATURE_BYTES = 8_192

ViewNumber = Annotated[int, Meta(ge=1, le=MAX_VIEW)]
Epoch = Annotated[int, Meta(ge=0, le=MAX_VIEW)]
SignatureBytes = Annotated[bytes, Meta(max_length=MAX_SIGNATURE_BYTES)]
Sign = Callable[[bytes], bytes]
"""Signs a message with the member's identity key."""


class VoteKind(IntEnum):
    """What a vote says; the value is what is signed."""

    NOTARIZE = 1
    NULLIFY = 2
    FINALIZE = 3


class Vote(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="vote"):
    """One voter's word on a view. ``block`` is zero in a nullify vote; ``share`` rides on finalize only."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    chain_id: Bytes32
    epoch: Epoch
    kind: VoteKind
    view: ViewNumber
    block: Bytes32
    voter: Bytes32
    share: Annotated[bytes, Meta(max_length=MAX_SHARE_BYTES)]
    signature: SignatureBytes


class Proposal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="proposal"):
    """A leader's ledger block for its view. ``header`` is the canonical ``Header``."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    header: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]
    body: Body
    signature: SignatureBytes

    @property
    def digest(self) -> Digest:
        """Digest of the proposed ledger block."""
        return header_digest(self.header)

    @property
    def signed_header(self) -> "SignedHeader":
        """What the leader's signature is on: the header names the body."""
        return SignedHeader(header=self.header, signature=self.signature)


class SignedHeader(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="signed-header"):
    """A proposal without its body."""

    header: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]
    signature: SignatureBytes


class Notarization(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="notarization"):
    """A quorum of notarize votes for one ledger block."""

    view: ViewNumber
    block: Bytes32
    votes: Annotated[tuple[Vote, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


class Nullification(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="nullification"):
    """A quorum of nullify votes for one view: it ends without a ledger block."""

    view: ViewNumber
    votes: Annotated[tuple[Vote, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


class Stalled(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="stalled"):
    """A voter that makes no progress asks what it lacks. Unsigned: only its sender is answered."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    chain_id: Bytes32
    epoch: Epoch
    view: ViewNumber
    finalized_view: Annotated[int, Meta(ge=0, le=MAX_VIEW)]
    missing_view: ViewNumber
    """Lowest view above ``finalized_view`` for which the sender holds neither certificate."""


class VoteEvidence(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="vote-evidence"):
    """Two signed votes of one voter of which a rule forbids one."""

    first: Vote
    second: Vote


class ProposalEvidence(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="proposal-evidence"):
    """Two headers that one leader signed as proposals for one view."""

    first: SignedHeader
    second: SignedHeader


Evidence = VoteEvidence | ProposalEvidence


def vote_message(vote: Vote) -> bytes:
    """What the voter's identity key signs: everything but the signature, the share included."""
    return tagged_message(Tag.VOTE, encode(replace(vote, signature=b"")))


def proposal_message(header: bytes) -> bytes:
    """What the leader's identity key signs; the header's digest binds chain, epoch, view and leader."""
    return tagged_message(Tag.PROPOSAL, header_digest(header))


def sign_vote(
    committee: Committee, voter: MemberId, kind: VoteKind, view: View, block: Digest, *, share: bytes, sign: Sign
) -> Vote:
    """A signed vote of ``voter``; ``share`` is its share of the certificate or empty."""
    unsigned = Vote(
        version=VERSION,
        chain_id=committee.chain_id,
        epoch=committee.epoch,
        kind=kind,
        view=view,
        block=block,
        voter=voter,
        share=share,
        signature=b"",
    )
    _check_shape(unsigned)
    return replace(unsigned, signature=sign(vote_message(unsigned)))


def sign_proposal(header: Header, body: Body, sign: Sign) -> Proposal:
    """A leader's signed proposal of its ledger block."""
    unsigned = Proposal(version=VERSION, header=encode(header), body=body, signature=b"")
    return replace(unsigned, signature=sign(proposal_message(unsigned.header)))


def check_vote(vote: Vote, committee: Committee) -> None:
    """The vote is well formed and its voter, a voter of this epoch, signed it. Its share is not checked.

    Raises:
        Rejected: ``WRONG_CHAIN``, ``WRONG_EPOCH``, ``BAD_VOTE``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``,
            ``BAD_SIGNATURE``.
    """
    _check_place(vote.chain_id, vote.epoch, committee)
    _check_shape(vote)
    member = committee.voter(MemberId(vote.voter))
    keys.verify(member.scheme, member.identity_key, vote_message(vote), vote.signature)


def check_proposal(proposal: Proposal, committee: Committee) -> Header:
    """The header of a proposal that the leader of its view signed and whose body is the one it names.

    Raises:
        Rejected: ``BAD_BLOCK``, ``DUPLICATE``, and as ``check_signed_header``.
    """
    check_body(decode_header(proposal.header, committee.chain_id), proposal.body)
    return check_signed_header(proposal.signed_header, committee)


def check_signed_header(signed: SignedHeader, committee: Committee) -> Header:
    """A header that the leader of its view signed as its proposal.

    Raises:
        Rejected: ``WRONG_CHAIN``, ``WRONG_EPOCH``, ``WRONG_AUTHOR``, ``BAD_BLOCK``, ``BAD_SIGNATURE``, and as
            ``codec.decode`` for a header that is not canonical.
    """
    header = decode_header(signed.header, committee.chain_id)
    _check_place(header.chain_id, header.epoch, committee)
    if header.height == 0 or header.view == 0 or header.parent_view >= header.view:
        raise Rejected(
            Reason.BAD_BLOCK,
            f"height {header.height}, view {header.view}, parent of view {header.parent_view}: out of order",
        )
    leader = committee.leader(View(header.view))
    if header.leader != leader.id:
        raise Rejected(
            Reason.WRONG_AUTHOR,
            f"{header.leader.hex()} proposes in view {header.view}, its leader is {leader.name}",
        )
    keys.verify(leader.scheme, leader.identity_key, proposal_message(signed.header), signed.signature)
    return header


def check_notarization(notarization: Notarization, committee: Committee) -> None:
    """A quorum of checked notarize votes for the ledger block named.

    Raises:
        Rejected: ``BAD_CERTIFICATE``, ``QUORUM_NOT_REACHED``, and as ``check_vote``.
    """
    _check_quorum(notarization.votes, VoteKind.NOTARIZE, View(notarization.view), Digest(notarization.block), committee)


def check_nullification(nullification: Nullification, committee: Committee) -> None:
    """A quorum of checked nullify votes for the view named.

    Raises:
        Rejected: ``BAD_CERTIFICATE``, ``QUORUM_NOT_REACHED``, and as ``check_vote``.
    """
    _check_quorum(nullification.votes, VoteKind.NULLIFY, View(nullification.view), ZERO_DIGEST, committee)


def check_stalled(stalled: Stalled, committee: Committee) -> None:
    """The question belongs to this chain and epoch.

    Raises:
        Rejected: ``WRONG_CHAIN``, ``WRONG_EPOCH``.
    """
    _check_place(stalled.chain_id, stalled.epoch, committee)


def conflicting(first: Vote, second: Vote) -> bool:
    """Whether no honest voter can have signed both."""
    if (first.voter, first.chain_id, first.epoch, first.view) != (
        second.voter,
        second.chain_id,
        second.epoch,
        second.view,
    ):
        return False
    if first.kind == second.kind:
        return first.block != second.block
    return {first.kind, second.kind} == {VoteKind.NULLIFY, VoteKind.FINALIZE}


class Tally:
    """Checked votes of one view: the first of each kind by each voter counts, whatever else it says.

    Mutable, owned by the engine. Memory is bounded by three votes per voter.
    """

    __slots__ = ("_by_kind", "_committee", "_excluded", "_reported")

    def __init__(self, committee: Committee) -> None:
        self._committee = committee
        self._by_kind: dict[VoteKind, dict[MemberId, Vote]] = {kind: {} for kind in VoteKind}
        self._excluded: set[MemberId] = set()
        self._reported: set[MemberId] = set()

    def add(self, vote: Vote) -> VoteEvidence | None:
        """Count a checked vote; the evidence, once per voter, if it conflicts with an earlier one."""
        voter = MemberId(vote.voter)
        evidence = None
        if voter not in self._reported:
            for votes in self._by_kind.values():
                earlier = votes.get(voter)
                if earlier is not None and conflicting(earlier, vote):
                    self._reported.add(voter)
                    evidence = VoteEvidence(first=earlier, second=vote)
                    break
        if not (vote.kind == VoteKind.FINALIZE and voter in self._excluded):
            self._by_kind[vote.kind].setdefault(voter, vote)
        return evidence

    def knows(self, vote: Vote) -> bool:
        """Whether exactly this vote was counted before (so that its signature need not be checked again)."""
        return self._by_kind[vote.kind].get(MemberId(vote.voter)) == vote

    def exclude(self, voter: MemberId) -> None:
        """Drop a voter's finalize vote, whose share was bad, and count no other from it in this view."""
        self._excluded.add(voter)
        self._by_kind[VoteKind.FINALIZE].pop(voter, None)

    def may_notarize(self) -> bool:
        """Whether a quorum is left beside those who nullified (and so, if honest, notarize no more)."""
        nullified = self._by_kind[VoteKind.NULLIFY]
        notarized = self._by_kind[VoteKind.NOTARIZE]
        return not nullified or self._committee.has_quorum(
            voter.id for voter in self._committee.voters if voter.id not in nullified or voter.id in notarized
        )

    def quorum(self, kind: VoteKind) -> tuple[Vote, ...]:
        """Votes of ``kind`` that agree on a ledger block and are a quorum, in the order of their voters.

        Empty if there are none; two quorums cannot disagree, since ``t_r > n_r / 2``.
        """
        by_block: dict[bytes, dict[MemberId, Vote]] = {}
        for voter, vote in self._by_kind[kind].items():
            by_block.setdefault(vote.block, {})[voter] = vote
        for votes in by_block.values():
            if self._committee.has_quorum(votes):
                return tuple(votes[voter] for voter in sorted(votes))
        return ()


def _check_place(chain_id: bytes, epoch: int, committee: Committee) -> None:
    if chain_id != committee.chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"of chain {chain_id.hex()}, this is {committee.chain_id.hex()}")
    if epoch != committee.epoch:
        raise Rejected(Reason.WRONG_EPOCH, f"of epoch {epoch}, this is epoch {committee.epoch}")


def _check_shape(vote: Vote) -> None:
    if (vote.kind == VoteKind.NULLIFY) != (vote.block == ZERO_DIGEST):
        raise Rejected(Reason.BAD_VOTE, f"a {vote.kind.name.lower()} vote for block {vote.block.hex()}")
    if vote.share and vote.kind != VoteKind.FINALIZE:
        raise Rejected(Reason.BAD_VOTE, f"a {vote.kind.name.lower()} vote carries a share")


def _check_quorum(votes: tuple[Vote, ...], kind: VoteKind, view: View, block: Digest, committee: Committee) -> None:
    """Cheap checks first: a certificate that is no quorum costs its sender more than us."""
    voters = [vote.voter for vote in votes]
    if voters != sorted(set(voters)):
        raise Rejected(Reason.BAD_CERTIFICATE, "votes must be in the order of their voters, one each")
    for vote in votes:
        if (vote.kind, vote.view, vote.block) != (kind, view, block):
            raise Rejected(
                Reason.BAD_CERTIFICATE,
                f"a {vote.kind.name.lower()} vote of view {vote.view}, expected {kind.name.lower()} of {view}",
            )
    if not committee.has_quorum(MemberId(voter) for voter in voters):
        raise Rejected(Reason.QUORUM_NOT_REACHED, f"{len(votes)} votes are no quorum of every role")
    for vote in votes:
        check_vote(vote, committee)
