"""Key shares: any quorum makes the same signature, and bad shares are caught and named."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus import bls, threshold
from consensus.rejection import Reason, Rejected
from consensus.threshold import BadShares, GroupKeys

MESSAGE = b"message"


def polynomial_shares(t: int, n: int) -> tuple[bls.Secret, dict[int, bls.Secret], GroupKeys]:
    coefficients = [bls.secret_from_seed(bytes([7, degree] * 16)).scalar for degree in range(t)]
    shares = {
        index: bls.Secret(sum(c * index**k for k, c in enumerate(coefficients)) % bls.GROUP_ORDER)
        for index in range(1, n + 1)
    }
    secret = bls.Secret(coefficients[0])
    keys = tuple(bls.public_key(shares[index]) for index in sorted(shares))
    return secret, shares, GroupKeys(t, bls.public_key(secret), keys)


def summed_shares(n: int) -> tuple[bls.Secret, dict[int, bls.Secret], GroupKeys]:
    shares = {index: bls.secret_from_seed(bytes([9, index] * 16)) for index in range(1, n + 1)}
    secret = bls.Secret(sum(share.scalar for share in shares.values()) % bls.GROUP_ORDER)
    keys = tuple(bls.public_key(share) for share in shares.values())
    return secret, shares, GroupKeys(n, bls.public_key(secret), keys)


SECRET, SHARES, GROUP = polynomial_shares(3, 4)
SIGNATURES = {index: bls.sign(share, MESSAGE) for index, share in SHARES.items()}


@pytest.mark.parametrize(("t", "n"), [(2, 3), (3, 4), (4, 5), (3, 6)])
def test_every_quorum_makes_the_plain_signature_of_the_group_secret(t, n):
    secret, shares, group = polynomial_shares(t, n)
    threshold.check_group_keys(group)
    plain = bls.sign(secret, MESSAGE)
    signatures = {index: bls.sign(share, MESSAGE) for index, share in shares.items()}
    for chosen in combinations(signatures, t):
        assert threshold.combine_shares(t, n, {i: signatures[i] for i in chosen}) == plain


@pytest.mark.parametrize("n", [1, 2, 4])
def test_with_all_members_needed_signatures_add_up(n):
    secret, shares, group = summed_shares(n)
    threshold.check_group_keys(group)
    signatures = {index: bls.sign(share, MESSAGE) for index, share in shares.items()}
    assert threshold.combine_shares(n, n, signatures) == bls.sign(secret, MESSAGE)


def test_large_group_combines():
    secret, shares, _ = polynomial_shares(11, 16)
    signatures = {index: bls.sign(shares[index], MESSAGE) for index in (1, 3, 4, 6, 7, 8, 10, 12, 13, 15, 16)}
    assert threshold.combine_shares(11, 16, signatures) == bls.sign(secret, MESSAGE)


def test_one_share_too_few_is_refused():
    with pytest.raises(Rejected) as refusal:
        threshold.combine_shares(3, 4, {1: SIGNATURES[1], 2: SIGNATURES[2]})
    assert refusal.value.reason is Reason.QUORUM_NOT_REACHED


def test_fewer_shares_than_the_threshold_do_not_sign_for_the_group():
    forged = threshold.combine_shares(2, 4, {1: SIGNATURES[1], 2: SIGNATURES[2]})
    with pytest.raises(Rejected, match="bad-signature"):
        bls.verify(GROUP.group_key, MESSAGE, forged)


@pytest.mark.parametrize("index", [0, -1, 5])
def test_share_of_index_outside_the_group_is_refused(index):
    shares = SIGNATURES | {index: SIGNATURES[1]}
    for act in (
        lambda: threshold.combine_shares(3, 4, shares),
        lambda: threshold.verify_shares(GROUP, MESSAGE, shares),
        lambda: threshold.verify_shares_together(GROUP, MESSAGE, shares),
    ):
        with pytest.raises(Rejected) as refusal:
            act()
        assert refusal.value.reason is Reason.BAD_SHARE


def test_small_indices_have_small_whole_weights():
    assert threshold.lagrange_weights([1, 2]) == threshold.Weights({1: 2, 2: -1}, 1)
    assert threshold.lagrange_weights([1, 2, 4]) == threshold.Weights({1: 8, 2: -6, 4: 1}, 3)


@settings(max_examples=60, deadline=None)
@given(
    indices=st.lists(st.integers(1, 40), min_size=1, max_size=8, unique=True),
    at=st.integers(0, 50),
    coefficients=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=8),
)
def test_lagrange_weights_interpolate_every_polynomial_of_lower_degree(indices, at, coefficients):
    coefficients = coefficients[: len(indices)]
    weights = threshold.lagrange_weights(indices, at)

    def value(x: int) -> int:
        return sum(c * x**k for k, c in enumerate(coefficients))

    total = sum(numerator * value(index) for index, numerator in weights.numerators.items())
    assert total == weights.denominator * value(at)


def test_good_shares_pass_one_by_one_and_together():
    threshold.verify_shares(GROUP, MESSAGE, SIGNATURES)
    threshold.verify_shares_together(GROUP, MESSAGE, SIGNATURES)
    threshold.verify_shares_together(GROUP, MESSAGE, {2: SIGNATURES[2]})


@pytest.mark.parametrize("bad", [b"", bytes(96), b"\xc0" + bytes(95), SIGNATURES[1]])
def test_bad_share_is_refused_and_its_member_named(bad):
    shares = SIGNATURES | {3: bad}
    with pytest.raises(BadShares) as refusal:
        threshold.verify_shares(GROUP, MESSAGE, shares)
    assert refusal.value.indices == (3,)
    assert refusal.value.reason is Reason.BAD_SHARE
    with pytest.raises(Rejected):
        threshold.verify_shares_together(GROUP, MESSAGE, shares)


def test_shares_altered_in_cancelling_ways_fail_the_batch_check():
    """With coefficients of one they pass; with coefficients hashed over all shares they do not."""
    offset = bls.sign(bls.secret_from_seed(b"a" * 32), MESSAGE)
    shares = SIGNATURES | {
        1: bls.aggregate_signatures([SIGNATURES[1], offset]),
        2: bls.weighted_signature_sum([(1, SIGNATURES[2]), (-1, offset)]),
    }
    bls.verify(
        bls.aggregate_public_keys(GROUP.share_keys),
        MESSAGE,
        bls.aggregate_signatures([shares[index] for index in sorted(shares)]),
    )
    with pytest.raises(Rejected, match="bad-signature"):
        threshold.verify_shares_together(GROUP, MESSAGE, shares)
    with pytest.raises(BadShares) as refusal:
        threshold.verify_shares(GROUP, MESSAGE, shares)
    assert refusal.value.indices == (1, 2)


def test_batch_coefficients_depend_on_every_share_and_on_the_message(monkeypatch):
    seen: list[tuple[int, ...]] = []
    inner = bls.weighted_signature_sum

    def record(terms, denominator=1):
        listed = list(terms)
        seen.append(tuple(weight for weight, _ in listed))
        return inner(listed, denominator)

    monkeypatch.setattr(threshold.bls, "weighted_signature_sum", record)
    other = {index: bls.sign(share, b"other") for index, share in SHARES.items()}
    threshold.verify_shares_together(GROUP, MESSAGE, SIGNATURES)
    threshold.verify_shares_together(GROUP, b"other", other)
    with pytest.raises(Rejected):
        threshold.verify_shares_together(GROUP, MESSAGE, SIGNATURES | {4: other[4]})
    first, second, third = seen
    assert not set(first) & set(second)
    assert not set(first) & set(third)
    assert all(weight <= 2**128 for weight in first)
    assert max(first).bit_length() > 100


def test_share_key_off_the_polynomial_is_refused():
    stranger = bls.public_key(bls.secret_from_seed(b"s" * 32))
    for index in range(4):
        keys = list(GROUP.share_keys)
        keys[index] = stranger
        with pytest.raises(Rejected) as refusal:
            threshold.check_group_keys(GroupKeys(3, GROUP.group_key, tuple(keys)))
        assert refusal.value.reason is Reason.BAD_MEMBERSHIP


def test_group_key_that_is_not_what_the_shares_make_is_refused():
    _, _, summed = summed_shares(3)
    for group in (GROUP, summed):
        with pytest.raises(Rejected, match="group key"):
            threshold.check_group_keys(GroupKeys(group.threshold, GROUP.share_keys[0], group.share_keys))


def test_degree_of_the_polynomial_is_checked_against_the_threshold():
    with pytest.raises(Rejected, match="polynomial"):
        threshold.check_group_keys(GroupKeys(2, GROUP.group_key, GROUP.share_keys))
    with pytest.raises(Rejected, match="sum"):
        threshold.check_group_keys(GroupKeys(4, GROUP.group_key, GROUP.share_keys))


@pytest.mark.parametrize("t", [0, 5])
def test_impossible_threshold_is_refused(t):
    with pytest.raises(Rejected, match="threshold"):
        threshold.check_group_keys(GroupKeys(t, GROUP.group_key, GROUP.share_keys))


def test_one_share_key_held_twice_is_refused():
    key = GROUP.share_keys[0]
    with pytest.raises(Rejected, match="same share key"):
        threshold.check_group_keys(GroupKeys(1, key, (key, key)))
