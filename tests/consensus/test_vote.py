"""Votes, proposals and quorums: each forgery is refused with its reason, each double vote is evidence."""

from dataclasses import replace as replace_fields

import pytest
from consensus_fixtures import make_genesis
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from consensus.block import Body, Header
from consensus.codec import decode, encode
from consensus.identifiers import ZERO_DIGEST, ChainId, Tag, View, tagged_hash
from consensus.membership import committee
from consensus.rejection import Reason, Rejected
from consensus.vote import (
    Notarization,
    Nullification,
    Stalled,
    Tally,
    Vote,
    VoteEvidence,
    VoteKind,
    check_notarization,
    check_nullification,
    check_proposal,
    check_stalled,
    check_vote,
    sign_proposal,
    sign_vote,
)

GENESIS, SECRETS = make_genesis({"data-source": 2, "governance": 1, "operator": 1, "verifier": 1}, seed=3)
VOTERS = committee(GENESIS)
SIGNERS = {member.id: SECRETS[member.name].identity for member in VOTERS.members}
IDS = [member.id for member in VOTERS.voters]
BLOCK = tagged_hash(Tag.BLOCK, b"a")
OTHER_BLOCK = tagged_hash(Tag.BLOCK, b"b")


def vote(voter=IDS[0], kind=VoteKind.NOTARIZE, view=5, block=BLOCK, share=b"", voters=VOTERS, signer=None):
    sign = SIGNERS[signer or voter].sign
    return sign_vote(voters, voter, kind, View(view), block, share=share, sign=sign)


def proposal(view=1, leaf=b"\x01" * 32, signer=None, **changes):
    body = Body(leaf_hashes=(leaf,))
    leader = VOTERS.leader(View(view)).id
    header = Header(
        version=1, chain_id=VOTERS.chain_id, epoch=0, height=1, view=view, leader=leader, parent=bytes(32),
        parent_view=0, timestamp_ms=1, body_root=body.root, event_count=1, log_size=1, log_root=leaf, state_root=leaf,
    )  # fmt: skip
    return sign_proposal(replace(header, **changes), body, SIGNERS[signer or leader].sign)


def refused(reason, check, *arguments):
    with pytest.raises(Rejected) as caught:
        check(*arguments)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", VoteKind)
def test_signed_vote_is_accepted_and_has_one_encoding(kind):
    block = ZERO_DIGEST if kind == VoteKind.NULLIFY else BLOCK
    share = b"\x05" * 96 if kind == VoteKind.FINALIZE else b""
    signed = vote(kind=kind, block=block, share=share)
    check_vote(signed, VOTERS)
    assert decode(encode(signed), Vote, 1_000) == signed


def test_share_swapped_under_a_signed_vote_is_refused():
    signed = vote(kind=VoteKind.FINALIZE, share=b"\x05" * 96)
    refused(Reason.BAD_SIGNATURE, check_vote, replace(signed, share=b"\x06" * 96), VOTERS)
    refused(Reason.BAD_SIGNATURE, check_vote, replace(signed, share=b""), VOTERS)


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_any_flipped_byte_of_a_vote_is_refused(position, flip):
    encoded = bytearray(encode(vote(kind=VoteKind.FINALIZE, share=b"\x05" * 96)))
    encoded[position % len(encoded)] ^= flip
    with pytest.raises(Rejected):
        check_vote(decode(bytes(encoded), Vote, 1_000), VOTERS)


def test_vote_of_another_chain_epoch_or_voter_is_refused():
    refused(Reason.WRONG_CHAIN, check_vote, replace(vote(), chain_id=b"\x01" * 32), VOTERS)
    old = vote(voters=replace_fields(VOTERS, epoch=1))
    refused(Reason.WRONG_EPOCH, check_vote, old, VOTERS)
    refused(Reason.BAD_SIGNATURE, check_vote, replace(old, epoch=0), VOTERS)
    refused(Reason.UNKNOWN_MEMBER, check_vote, replace(vote(), voter=b"\x01" * 32), VOTERS)
    refused(Reason.BAD_SIGNATURE, check_vote, vote(signer=IDS[1]), VOTERS)
    refused(Reason.BAD_SIGNATURE, check_vote, replace(vote(), voter=IDS[1]), VOTERS)


def test_verifier_does_not_vote():
    verifier = next(member.id for member in VOTERS.members if member.id not in IDS)
    refused(Reason.WRONG_ROLE, check_vote, vote(voter=verifier), VOTERS)


def test_nullify_names_no_block_and_only_finalize_carries_a_share():
    for kind, block, share in (
        (VoteKind.NULLIFY, BLOCK, b""),
        (VoteKind.NOTARIZE, ZERO_DIGEST, b""),
        (VoteKind.FINALIZE, ZERO_DIGEST, b""),
        (VoteKind.NOTARIZE, BLOCK, b"\x05"),
    ):
        refused(Reason.BAD_VOTE, lambda k=kind, b=block, s=share: vote(kind=k, block=b, share=s))
        refused(Reason.BAD_VOTE, check_vote, replace(vote(), kind=kind, block=block, share=share), VOTERS)


def test_proposal_is_accepted_from_the_leader_of_its_view_only():
    assert check_proposal(proposal(), VOTERS).view == 1
    refused(Reason.BAD_SIGNATURE, check_proposal, proposal(signer=IDS[1]), VOTERS)
    refused(Reason.WRONG_AUTHOR, check_proposal, proposal(leader=IDS[1], signer=IDS[1]), VOTERS)
    refused(Reason.WRONG_EPOCH, check_proposal, proposal(epoch=1), VOTERS)
    refused(Reason.WRONG_CHAIN, check_proposal, proposal(chain_id=b"\x01" * 32), VOTERS)
    refused(Reason.BAD_BLOCK, check_proposal, proposal(height=0), VOTERS)
    refused(Reason.BAD_BLOCK, check_proposal, proposal(parent_view=1), VOTERS)
    refused(Reason.BAD_BLOCK, check_proposal, replace(proposal(), body=Body(leaf_hashes=(b"\x02" * 32,))), VOTERS)


def quorum(kind=VoteKind.NOTARIZE, block=BLOCK, ids=IDS):
    return tuple(vote(voter=one, kind=kind, block=block) for one in sorted(ids))


def test_quorum_of_every_role_is_a_certificate_and_less_is_not():
    check_notarization(Notarization(view=5, block=BLOCK, votes=quorum()), VOTERS)
    check_nullification(Nullification(view=5, votes=quorum(VoteKind.NULLIFY, ZERO_DIGEST)), VOTERS)
    for missing in IDS:
        votes = quorum(ids=[one for one in IDS if one != missing])
        short = Notarization(view=5, block=BLOCK, votes=votes)
        refused(Reason.QUORUM_NOT_REACHED, check_notarization, short, VOTERS)


def test_certificate_with_foreign_repeated_or_forged_votes_is_refused():
    votes = quorum()
    refused(Reason.BAD_CERTIFICATE, check_notarization, Notarization(view=6, block=BLOCK, votes=votes), VOTERS)
    refused(Reason.BAD_CERTIFICATE, check_notarization, Notarization(view=5, block=OTHER_BLOCK, votes=votes), VOTERS)
    refused(Reason.BAD_CERTIFICATE, check_nullification, Nullification(view=5, votes=votes), VOTERS)
    for wrong in (votes[::-1], (*votes, votes[-1])):
        refused(Reason.BAD_CERTIFICATE, check_notarization, Notarization(view=5, block=BLOCK, votes=wrong), VOTERS)
    forged = (*votes[:-1], replace(votes[-1], signature=votes[0].signature))
    refused(Reason.BAD_SIGNATURE, check_notarization, Notarization(view=5, block=BLOCK, votes=forged), VOTERS)


def test_stalled_of_another_epoch_is_refused():
    stalled = Stalled(version=1, chain_id=VOTERS.chain_id, epoch=0, view=1, finalized_view=0, missing_view=1)
    check_stalled(stalled, VOTERS)
    refused(Reason.WRONG_EPOCH, check_stalled, replace(stalled, epoch=1), VOTERS)
    refused(Reason.WRONG_CHAIN, check_stalled, replace(stalled, chain_id=ChainId(b"\x01" * 32)), VOTERS)


def test_double_votes_are_evidence_once_and_the_first_one_counts():
    tally = Tally(VOTERS)
    first, second = vote(), vote(block=OTHER_BLOCK)
    assert tally.add(first) is None
    assert tally.add(first) is None
    assert tally.add(second) == VoteEvidence(first, second)
    assert tally.add(second) is None
    assert tally.knows(first)
    assert not tally.knows(second)
    for one in IDS[1:]:
        tally.add(vote(voter=one))
    assert tally.quorum(VoteKind.NOTARIZE) == quorum()
    assert tally.quorum(VoteKind.NULLIFY) == ()


@pytest.mark.parametrize("backwards", [False, True])
def test_nullify_and_finalize_of_one_view_are_evidence(backwards):
    pair = [vote(kind=VoteKind.NULLIFY, block=ZERO_DIGEST), vote(kind=VoteKind.FINALIZE)]
    first, second = pair[::-1] if backwards else pair
    tally = Tally(VOTERS)
    tally.add(first)
    evidence = tally.add(second)
    assert evidence == VoteEvidence(first, second)


def test_honest_pairs_are_no_evidence():
    for first, second in (
        (vote(), vote(kind=VoteKind.NULLIFY, block=ZERO_DIGEST)),
        (vote(), vote(kind=VoteKind.FINALIZE, block=OTHER_BLOCK)),
        (vote(), vote(view=6, block=OTHER_BLOCK)),
        (vote(), vote(voter=IDS[1], block=OTHER_BLOCK)),
    ):
        tally = Tally(VOTERS)
        assert tally.add(first) is None
        assert tally.add(second) is None


def test_excluded_voter_counts_no_more():
    tally = Tally(VOTERS)
    for one in IDS:
        tally.add(vote(voter=one, kind=VoteKind.FINALIZE))
    assert tally.quorum(VoteKind.FINALIZE)
    tally.exclude(IDS[0])
    tally.add(vote(kind=VoteKind.FINALIZE))
    assert tally.quorum(VoteKind.FINALIZE) == ()
