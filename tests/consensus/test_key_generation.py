"""Distributed key generation: one cheating member neither fixes the key nor goes unnamed."""

from collections.abc import Sequence

import msgspec
import pytest

from consensus import bls, threshold
from consensus.codec import decode, encode
from consensus.identifiers import MemberId, Role
from consensus.key_generation import (
    BadDealing,
    Ceremony,
    Commitment,
    Dealer,
    DealtShare,
    KeyShare,
    PossessionShare,
    Reveal,
    check_dealt_shares,
    check_reveals,
    combine_possession,
    possession_share,
    sum_member_keys,
)
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.threshold import member_possession_context

CEREMONY = Ceremony(nonce=b"n" * 32, epoch=0, role=Role.GOVERNANCE, threshold=3, member_count=4)
SEEDS = [bytes([index]) * 32 for index in range(1, 5)]
MEMBERS = [MemberId(bytes([100 + index]) * 32) for index in range(1, 5)]
DEALERS = {index: Dealer(CEREMONY, index, SEEDS[index - 1]) for index in range(1, 5)}
COMMITMENTS = {index: dealer.commitment() for index, dealer in DEALERS.items()}
REVEALS = {index: dealer.reveal(COMMITMENTS) for index, dealer in DEALERS.items()}
GROUP = check_reveals(CEREMONY, COMMITMENTS, REVEALS)
STRANGER = bls.secret_from_seed(b"s" * 32)


def run_key_generation(
    ceremony: Ceremony, members: Sequence[MemberId], seeds: Sequence[bytes]
) -> tuple[tuple[KeyShare, ...], bytes]:
    """The messages of one role among members in one process: their key shares, and the joint proof of possession."""
    indices = range(1, ceremony.member_count + 1)
    if ceremony.summed:
        secrets = [bls.secret_from_seed(seed) for seed in seeds]
        possessions = [
            bls.prove_possession(secret, member_possession_context(ceremony.nonce, member))
            for member, secret in zip(members, secrets, strict=True)
        ]
        group = sum_member_keys(ceremony, members, [bls.public_key(secret) for secret in secrets], possessions)
    else:
        dealers = [Dealer(ceremony, index, seed) for index, seed in zip(indices, seeds, strict=True)]
        commitments = {dealer.index: dealer.commitment() for dealer in dealers}
        reveals = {dealer.index: dealer.reveal(commitments) for dealer in dealers}
        group = check_reveals(ceremony, commitments, reveals)
        secrets = [
            check_dealt_shares(ceremony, index, reveals, {dealer.index: dealer.share_for(index) for dealer in dealers})
            for index in indices
        ]
    shares = tuple(KeyShare(index, secret, group) for index, secret in zip(indices, secrets, strict=True))
    parts = {share.index: possession_share(ceremony, share) for share in shares}
    return shares, combine_possession(ceremony, group, parts)


def dealt_to(recipient: int) -> dict[int, DealtShare]:
    return {index: dealer.share_for(recipient) for index, dealer in DEALERS.items()}


def committed(reveals: dict[int, Reveal]) -> dict[int, Commitment]:
    return {
        index: Commitment(ceremony=CEREMONY.id, dealer=index, digest=reveal.digest) for index, reveal in reveals.items()
    }


def changed(reveal: Reveal, **fields: object) -> Reveal:
    return msgspec.structs.replace(reveal, **fields)


@pytest.mark.parametrize(("t", "n"), [(1, 1), (2, 2), (2, 3), (3, 4), (4, 4), (5, 7)])
def test_members_get_fitting_shares_and_the_group_signs(t, n):
    ceremony = Ceremony(b"n" * 32, 0, Role.OPERATOR, t, n)
    members = [MemberId(bytes([index]) * 32) for index in range(n)]
    shares, possession = run_key_generation(ceremony, members, [bytes([i]) * 32 for i in range(n)])
    group = shares[0].group
    threshold.check_group_keys(group)
    bls.verify_possession(group.group_key, ceremony.possession_context, possession)
    assert [bls.public_key(share.secret) for share in shares] == list(group.share_keys)
    signatures = {share.index: bls.sign(share.secret, b"m") for share in shares[n - t :]}
    bls.verify(group.group_key, b"m", threshold.combine_shares(t, n, signatures))


def test_key_generation_is_a_function_of_seeds_and_ceremony_alone():
    first = run_key_generation(CEREMONY, MEMBERS, SEEDS)
    again = run_key_generation(CEREMONY, MEMBERS, SEEDS)
    assert first[1] == again[1]
    assert first[0][0].group == again[0][0].group
    other = Ceremony(b"o" * 32, 0, Role.GOVERNANCE, 3, 4)
    assert run_key_generation(other, MEMBERS, SEEDS)[0][0].group != first[0][0].group


def test_same_seed_gives_unrelated_polynomials_in_every_ceremony():
    ceremonies = [
        CEREMONY,
        Ceremony(b"o" * 32, 0, Role.GOVERNANCE, 3, 4),
        Ceremony(b"n" * 32, 1, Role.GOVERNANCE, 3, 4),
        Ceremony(b"n" * 32, 0, Role.OPERATOR, 3, 4),
        Ceremony(b"n" * 32, 0, Role.GOVERNANCE, 2, 4),
        Ceremony(b"n" * 32, 0, Role.GOVERNANCE, 3, 5),
    ]
    assert len({Dealer(ceremony, 1, SEEDS[0]).share_for(1).value for ceremony in ceremonies}) == len(ceremonies)
    assert len({ceremony.id for ceremony in ceremonies}) == len(ceremonies)


def test_last_dealer_that_waits_for_the_reveals_cannot_fix_the_key():
    """In plain Feldman the last to move cancels everybody's constant term; here it has committed."""
    target = bls.public_key(STRANGER)
    others = [(-1, REVEALS[index].coefficients[0]) for index in (1, 2, 3)]
    cancelling = bls.weighted_public_key_sum([(1, target), *others])
    rogue = changed(REVEALS[4], coefficients=(cancelling, *REVEALS[4].coefficients[1:]))
    reveals = REVEALS | {4: rogue}
    total = bls.aggregate_public_keys([reveal.coefficients[0] for reveal in reveals.values()])
    assert total == target, "the attack itself works: the group secret would be the attacker's"
    with pytest.raises(BadDealing, match="something else than it committed to") as refusal:
        check_reveals(CEREMONY, COMMITMENTS, reveals)
    assert refusal.value.dealer == 4


def test_dealer_that_learnt_the_reveals_early_cannot_prove_its_cancelling_constant():
    """Even if its commitment comes last, knowing the others' points is not knowing the scalar."""
    target = bls.public_key(STRANGER)
    others = [(-1, REVEALS[index].coefficients[0]) for index in (1, 2, 3)]
    cancelling = bls.weighted_public_key_sum([(1, target), *others])
    rogue = changed(REVEALS[4], coefficients=(cancelling, *REVEALS[4].coefficients[1:]))
    reveals = REVEALS | {4: rogue}
    with pytest.raises(BadDealing, match="does not prove knowledge") as refusal:
        check_reveals(CEREMONY, committed(reveals), reveals)
    assert refusal.value.dealer == 4
    assert refusal.value.reason is Reason.BAD_DEALING


def test_copied_polynomial_with_its_proof_is_refused():
    """The proof is bound to the dealer: another's cannot be replayed to double its weight."""
    copied = changed(REVEALS[1], dealer=2)
    reveals = REVEALS | {2: copied}
    with pytest.raises(BadDealing, match="does not prove knowledge") as refusal:
        check_reveals(CEREMONY, committed(reveals), reveals)
    assert refusal.value.dealer == 2


@pytest.mark.parametrize(
    "other",
    [
        Ceremony(b"o" * 32, 0, Role.GOVERNANCE, 3, 4),
        Ceremony(b"n" * 32, 1, Role.GOVERNANCE, 3, 4),
        Ceremony(b"n" * 32, 0, Role.OPERATOR, 3, 4),
    ],
    ids=["nonce", "epoch", "role"],
)
def test_proof_of_knowledge_from_another_ceremony_is_refused(other):
    dealers = {index: Dealer(other, index, SEEDS[index - 1]) for index in range(1, 5)}
    foreign = dealers[3].reveal({index: dealer.commitment() for index, dealer in dealers.items()})
    with pytest.raises(BadDealing, match="another ceremony"):
        check_reveals(CEREMONY, COMMITMENTS, REVEALS | {3: foreign})
    reveals = REVEALS | {3: changed(foreign, ceremony=CEREMONY.id)}
    with pytest.raises(BadDealing, match="does not prove knowledge"):
        check_reveals(CEREMONY, committed(reveals), reveals)


def test_nobody_reveals_before_all_have_committed():
    missing = {index: commitment for index, commitment in COMMITMENTS.items() if index != 2}
    with pytest.raises(BadDealing, match="missing") as refusal:
        DEALERS[1].reveal(missing)
    assert refusal.value.dealer == 2


def test_commitment_made_in_our_name_stops_the_reveal():
    forged = msgspec.structs.replace(COMMITMENTS[1], digest=bytes(32))
    with pytest.raises(BadDealing, match="not ours"):
        DEALERS[1].reveal(COMMITMENTS | {1: forged})


def test_message_of_a_dealer_outside_the_ceremony_is_refused():
    stranger = Commitment(ceremony=CEREMONY.id, dealer=5, digest=bytes(32))
    with pytest.raises(BadDealing) as refusal:
        DEALERS[1].reveal(COMMITMENTS | {5: stranger})
    assert refusal.value.dealer == 5


def test_message_filed_under_another_dealer_is_refused():
    with pytest.raises(BadDealing, match="another ceremony or dealer"):
        check_reveals(CEREMONY, COMMITMENTS | {2: COMMITMENTS[3]}, REVEALS)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"coefficients": REVEALS[2].coefficients[:2]}, "2 coefficients"),
        ({"coefficients": (*REVEALS[2].coefficients, REVEALS[1].coefficients[0])}, "4 coefficients"),
        ({"coefficients": (b"\xc0" + bytes(47), *REVEALS[2].coefficients[1:])}, "infinity"),
        ({"coefficients": (*REVEALS[2].coefficients[:2], b"\xc0" + bytes(47))}, "infinity"),
        ({"coefficients": (*REVEALS[2].coefficients[:2], bytes(48))}, "no point"),
        ({"response": b"\xff" * 32}, "out of range"),
        ({"response": bytes(32)}, "does not prove knowledge"),
        ({"nonce_point": REVEALS[1].nonce_point}, "does not prove knowledge"),
    ],
)
def test_malformed_reveal_names_its_dealer(fields, complaint):
    reveals = REVEALS | {2: changed(REVEALS[2], **fields)}
    with pytest.raises(BadDealing, match=complaint) as refusal:
        check_reveals(CEREMONY, committed(reveals), reveals)
    assert refusal.value.dealer == 2


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (bytes(32), "no scalar"),
        (b"\xff" * 32, "no scalar"),
        (STRANGER.to_bytes(), "not on the polynomial"),
        (DEALERS[3].share_for(2).value, "not on the polynomial"),
    ],
    ids=["zero", "out of range", "random", "another member's"],
)
def test_bad_dealt_share_is_a_complaint_that_names_the_dealer(value, complaint):
    bad = DealtShare(ceremony=CEREMONY.id, dealer=3, recipient=1, value=value)
    with pytest.raises(BadDealing, match=complaint) as refusal:
        check_dealt_shares(CEREMONY, 1, REVEALS, dealt_to(1) | {3: bad})
    assert refusal.value.dealer == 3
    assert value.hex() not in str(refusal.value)


def test_share_for_another_member_is_refused():
    with pytest.raises(BadDealing, match="for 2, not for 1"):
        check_dealt_shares(CEREMONY, 1, REVEALS, dealt_to(1) | {3: DEALERS[3].share_for(2)})


def test_members_that_saw_different_reveals_cannot_prove_possession():
    """A dealer that reveals one thing to some and another to others: the last round names the victims."""
    equivocating = {**DEALERS, 4: Dealer(CEREMONY, 4, b"x" * 32)}
    commitments = {index: dealer.commitment() for index, dealer in equivocating.items()}
    reveals = {index: dealer.reveal(commitments) for index, dealer in equivocating.items()}
    group = check_reveals(CEREMONY, COMMITMENTS, REVEALS)
    misled = check_reveals(CEREMONY, commitments, reveals)
    parts = {}
    for index in range(1, 5):
        secret = check_dealt_shares(CEREMONY, index, REVEALS, dealt_to(index))
        parts[index] = possession_share(CEREMONY, KeyShare(index, secret, group))
    wrong = {index: dealer.share_for(2) for index, dealer in equivocating.items()}
    secret = check_dealt_shares(CEREMONY, 2, reveals, wrong)
    parts[2] = possession_share(CEREMONY, KeyShare(2, secret, misled))
    with pytest.raises(BadDealing, match="it computed the group key") as refusal:
        combine_possession(CEREMONY, group, parts)
    assert refusal.value.dealer == 2


def test_bad_part_of_the_joint_possession_names_its_member():
    shares, _ = run_key_generation(CEREMONY, MEMBERS, SEEDS)
    parts = {share.index: possession_share(CEREMONY, share) for share in shares}
    parts[3] = msgspec.structs.replace(parts[3], signature=parts[2].signature)
    with pytest.raises(BadDealing, match="no proof of possession") as refusal:
        combine_possession(CEREMONY, shares[0].group, parts)
    assert refusal.value.dealer == 3


def test_rogue_member_key_in_a_summed_group_is_refused():
    """Its owner could sign for the whole role alone; it cannot prove possession."""
    ceremony = Ceremony(b"n" * 32, 0, Role.OPERATOR, 2, 2)
    honest = bls.secret_from_seed(SEEDS[0])
    rogue = bls.weighted_public_key_sum([(1, bls.public_key(STRANGER)), (-1, bls.public_key(honest))])
    contexts = [threshold.member_possession_context(ceremony.nonce, member) for member in MEMBERS[:2]]
    possessions = [bls.prove_possession(honest, contexts[0]), bls.prove_possession(STRANGER, contexts[1])]
    keys = [bls.public_key(honest), rogue]
    assert bls.aggregate_public_keys(keys) == bls.public_key(STRANGER)
    with pytest.raises(BadDealing) as refusal:
        sum_member_keys(ceremony, MEMBERS[:2], keys, possessions)
    assert refusal.value.dealer == 2


def test_possession_of_another_member_or_chain_is_refused_in_a_summed_group():
    ceremony = Ceremony(b"n" * 32, 0, Role.OPERATOR, 1, 1)
    secret = bls.secret_from_seed(SEEDS[0])
    for nonce, member in ((b"o" * 32, MEMBERS[0]), (b"n" * 32, MEMBERS[1])):
        proof = bls.prove_possession(secret, threshold.member_possession_context(nonce, member))
        with pytest.raises(BadDealing):
            sum_member_keys(ceremony, MEMBERS[:1], [bls.public_key(secret)], [proof])


def test_summing_and_dealing_are_not_mixed_up():
    with pytest.raises(InvariantBroken):
        sum_member_keys(CEREMONY, MEMBERS, [], [])
    with pytest.raises(InvariantBroken):
        Dealer(Ceremony(b"n" * 32, 0, Role.OPERATOR, 2, 2), 1, SEEDS[0])


def test_round_messages_survive_the_wire_and_show_no_secret():
    part = possession_share(CEREMONY, run_key_generation(CEREMONY, MEMBERS, SEEDS)[0][0])
    share = DEALERS[1].share_for(2)
    for message in (COMMITMENTS[1], REVEALS[1], share, part):
        assert decode(encode(message), type(message), 4_096) == message
    for shown in (repr(share), repr(DEALERS[1]), repr(KeyShare(1, STRANGER, GROUP))):
        assert repr(share.value) not in shown
        assert share.value.hex() not in shown
        assert str(STRANGER.scalar) not in shown
    assert repr(SEEDS[0]) not in repr(DEALERS[1])
    with pytest.raises(Rejected):
        decode(encode(share), PossessionShare, 4_096)
