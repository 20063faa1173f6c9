"""Strict BLS: what the libraries let through must be refused here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus import bls
from consensus.identifiers import Tag, tagged_message
from consensus.rejection import Reason, Rejected

FIELD = 0x1A0111EA397FE69A4B1BA7B6434BACD764774B84F38512BF6730D2A0F6B0F6241EABFFFEB153FFFFB9FEFFFFFFFFAAAB
INFINITE_KEY = b"\xc0" + bytes(47)
INFINITE_SIGNATURE = b"\xc0" + bytes(95)

SECRETS = [bls.secret_from_seed(bytes([number]) * 32) for number in range(1, 6)]
KEYS = [bls.public_key(secret) for secret in SECRETS]
MESSAGE = b"message"
SIGNATURES = [bls.sign(secret, MESSAGE) for secret in SECRETS]


def g1_point_outside_subgroup() -> bytes:
    """x = 4: on the curve y² = x³ + 4, not of prime order."""
    assert pow(4**3 + 4, (FIELD - 1) // 2, FIELD) == 1
    return bytes([0x80]) + (4).to_bytes(47, "big")


def g2_point_outside_subgroup() -> bytes:
    """The first x = (0, c) on the twist y² = x³ + 4(1 + i); almost no such point has prime order."""
    for c in range(1, 100):
        # (i·c)³ + 4 + 4i = 4 + (4 - c³) i: a square iff its norm is a square in the base field.
        norm = (16 + (4 - c**3) ** 2) % FIELD
        if pow(norm, (FIELD - 1) // 2, FIELD) == 1:
            return _g2(c, 0)
    raise AssertionError("no point found")


def _g2(imaginary: int, real: int) -> bytes:
    encoded = bytearray(imaginary.to_bytes(48, "big") + real.to_bytes(48, "big"))
    encoded[0] |= 0x80
    return bytes(encoded)


BAD_KEYS = {
    "infinity": INFINITE_KEY,
    "infinity with sign": b"\xe0" + bytes(47),
    "infinity with stray bit": b"\xc0" + bytes(46) + b"\x01",
    "uncompressed infinity": b"\x40" + bytes(47),
    "zero bytes": bytes(48),
    "empty": b"",
    "short": KEYS[0][:-1],
    "long": KEYS[0] + b"\x00",
    "uncompressed length": KEYS[0] + bytes(48),
    "no compression flag": bytes([KEYS[0][0] & 0x7F]) + KEYS[0][1:],
    "x is the field order": bytes([0x80 | 0x1A]) + FIELD.to_bytes(48, "big")[1:],
    "x above the field order": b"\x9f" + b"\xff" * 47,
    "not on the curve": bytes([0x80]) + (1).to_bytes(47, "big"),
    "outside the subgroup": g1_point_outside_subgroup(),
}
BAD_SIGNATURES = {
    "infinity": INFINITE_SIGNATURE,
    "infinity with sign": b"\xe0" + bytes(95),
    "infinity with stray bit": b"\xc0" + bytes(94) + b"\x01",
    "uncompressed infinity": b"\x40" + bytes(95),
    "zero bytes": bytes(96),
    "empty": b"",
    "short": SIGNATURES[0][:-1],
    "long": SIGNATURES[0] + b"\x00",
    "uncompressed length": SIGNATURES[0] + bytes(96),
    "no compression flag": bytes([SIGNATURES[0][0] & 0x7F]) + SIGNATURES[0][1:],
    "imaginary part is the field order": _g2(FIELD, 1),
    "real part is the field order": _g2(1, FIELD),
    "real part above the field order": _g2(1, 2**384 - 1),
    "outside the subgroup": g2_point_outside_subgroup(),
}


def test_published_signature_of_the_ciphersuite_is_reproduced():
    """Ethereum consensus BLS test vector sign_case_84d45c9c7cca6b92."""
    secret = bls.Secret.from_bytes(bytes.fromhex("263dbd792f5b1be47ed85f8938c0f29586af0d3ac7b977f21c278fe1462040e3"))
    message = bytes.fromhex("56" * 32)
    signature = bls.sign(secret, message)
    assert bls.public_key(secret).hex() == (
        "a491d1b0ecd9bb917989f0e74f0dea0422eac4a873e5e2644f368dffb9a6e20fd6e10c1b77654d067c0618f6e5a7f79a"
    )
    assert signature.hex() == (
        "882730e5d03f6b42c3abc26d3372625034e1d871b65a8a6b900a56dae22da98abbe1b68f85e49fe7652a55ec3d0591c2"
        "0767677e33e5cbb1207315c41a9ac03be39c2e7668edc043d6cb1d9fd93033caa8a1c5b0e84bedaeb6c64972503a43eb"
    )
    bls.verify(bls.public_key(secret), message, signature)


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_key_is_refused_everywhere(name):
    key = BAD_KEYS[name]
    for act in (
        lambda: bls.check_public_key(key),
        lambda: bls.verify(key, MESSAGE, SIGNATURES[0]),
        lambda: bls.verify(key, MESSAGE, INFINITE_SIGNATURE),
        lambda: bls.aggregate_public_keys([KEYS[0], key]),
        lambda: bls.weighted_public_key_sum([(0, key), (1, KEYS[0])]),
        lambda: bls.verify_possession(key, b"context", SIGNATURES[0]),
        lambda: bls.verify_possession_share(KEYS[0], key, b"context", SIGNATURES[0]),
    ):
        with pytest.raises(Rejected) as refusal:
            act()
        assert refusal.value.reason is Reason.BAD_KEY


@pytest.mark.parametrize("name", BAD_SIGNATURES)
def test_bad_signature_encoding_is_refused_everywhere(name):
    signature = BAD_SIGNATURES[name]
    for act, reason in (
        (lambda: bls.verify(KEYS[0], MESSAGE, signature), Reason.BAD_SIGNATURE),
        (lambda: bls.aggregate_signatures([SIGNATURES[0], signature]), Reason.BAD_SIGNATURE),
        (lambda: bls.weighted_signature_sum([(0, signature)]), Reason.BAD_SIGNATURE),
        (lambda: bls.verify_possession(KEYS[0], b"", signature), Reason.BAD_PROOF_OF_POSSESSION),
    ):
        with pytest.raises(Rejected) as refusal:
            act()
        assert refusal.value.reason is reason


def test_sum_over_nothing_is_refused():
    for act in (lambda: bls.aggregate_public_keys([]), lambda: bls.aggregate_signatures([])):
        with pytest.raises(Rejected, match="sum over no"):
            act()


def test_keys_and_signatures_that_cancel_are_refused():
    with pytest.raises(Rejected, match="cancel"):
        bls.weighted_public_key_sum([(1, KEYS[0]), (-1, KEYS[0])])
    with pytest.raises(Rejected, match="cancel"):
        bls.weighted_signature_sum([(3, SIGNATURES[0]), (-3, SIGNATURES[0])])
    with pytest.raises(Rejected, match="cancel"):
        bls.weighted_public_key_sum([(bls.GROUP_ORDER, KEYS[0])])


@pytest.mark.parametrize("scalar", [0, -1, bls.GROUP_ORDER, bls.GROUP_ORDER + 1, 2**256])
def test_zero_or_out_of_range_secret_is_refused(scalar):
    with pytest.raises(Rejected) as refusal:
        bls.Secret(scalar)
    assert refusal.value.reason is Reason.BAD_KEY


@pytest.mark.parametrize("encoded", [b"", bytes(31), bytes(32), bytes(33), b"\xff" * 32])
def test_bad_secret_bytes_are_refused(encoded):
    with pytest.raises(Rejected, match="secret"):
        bls.Secret.from_bytes(encoded)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_seed_of_another_length_is_refused(length):
    with pytest.raises(Rejected, match="32 bytes"):
        bls.secret_from_seed(bytes(length))


def test_secret_is_never_shown():
    secret = SECRETS[0]
    assert bls.Secret.from_bytes(secret.to_bytes()).scalar == secret.scalar
    for shown in (repr(secret), str(secret)):
        assert secret.to_bytes().hex() not in shown
        assert str(secret.scalar) not in shown


def test_sum_of_signatures_verifies_under_sum_of_keys_and_no_subset_of_them():
    together = bls.aggregate_signatures(SIGNATURES[:3])
    bls.verify(bls.aggregate_public_keys(KEYS[:3]), MESSAGE, together)
    for keys in (KEYS[:2], KEYS[1:3], KEYS[:4]):
        with pytest.raises(Rejected, match="bad-signature"):
            bls.verify(bls.aggregate_public_keys(keys), MESSAGE, together)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(-40, 40), st.integers(-(2**128), 2**128), st.integers(0, bls.GROUP_ORDER)),
        min_size=1,
        max_size=5,
    )
)
def test_weighted_sums_agree_with_arithmetic_on_secrets(weights):
    expected = sum(weight * SECRETS[i].scalar for i, weight in enumerate(weights)) % bls.GROUP_ORDER
    if expected == 0:
        with pytest.raises(Rejected):
            bls.weighted_public_key_sum(zip(weights, KEYS, strict=False))
        return
    secret = bls.Secret(expected)
    assert bls.weighted_public_key_sum(zip(weights, KEYS, strict=False)) == bls.public_key(secret)
    assert bls.weighted_signature_sum(zip(weights, SIGNATURES, strict=False)) == bls.sign(secret, MESSAGE)


@pytest.mark.parametrize("denominator", [1, 3, -1, -6, 2**200 + 1])
def test_denominator_divides_the_sum(denominator):
    scaled = bls.weighted_signature_sum([(denominator, SIGNATURES[0])])
    assert bls.weighted_signature_sum([(1, scaled)], denominator) == SIGNATURES[0]


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 95), mask=st.integers(1, 255))
def test_any_changed_byte_of_a_signature_is_refused(position, mask):
    changed = bytearray(SIGNATURES[0])
    changed[position] ^= mask
    with pytest.raises(Rejected) as refusal:
        bls.verify(KEYS[0], MESSAGE, bytes(changed))
    assert refusal.value.reason is Reason.BAD_SIGNATURE


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 47), mask=st.integers(1, 255))
def test_any_changed_byte_of_a_key_is_refused(position, mask):
    changed = bytearray(KEYS[0])
    changed[position] ^= mask
    with pytest.raises(Rejected):
        bls.verify(bytes(changed), MESSAGE, SIGNATURES[0])


@settings(max_examples=60, deadline=None)
@given(key=st.binary(max_size=100), signature=st.binary(max_size=200), message=st.binary(max_size=40))
def test_arbitrary_bytes_are_refused_without_another_exception(key, signature, message):
    with pytest.raises(Rejected):
        bls.verify(key, message, signature)
    with pytest.raises(Rejected):
        bls.verify(KEYS[0], message, signature)


def test_possession_is_bound_to_key_and_context():
    proof = bls.prove_possession(SECRETS[0], b"context")
    bls.verify_possession(KEYS[0], b"context", proof)
    for key, context in ((KEYS[1], b"context"), (KEYS[0], b"other")):
        with pytest.raises(Rejected) as refusal:
            bls.verify_possession(key, context, proof)
        assert refusal.value.reason is Reason.BAD_PROOF_OF_POSSESSION


def test_signature_over_the_possession_message_is_no_proof_of_possession():
    """Whatever a member can be made to sign, it never proves possession: the hash-to-curve tag differs."""
    signed = bls.sign(SECRETS[0], tagged_message(Tag.POSSESSION, KEYS[0], b"context"))
    with pytest.raises(Rejected, match="bad-proof-of-possession"):
        bls.verify_possession(KEYS[0], b"context", signed)


def test_rogue_key_forges_a_sum_but_cannot_prove_possession():
    attacker = SECRETS[4]
    rogue = bls.weighted_public_key_sum([(1, KEYS[4]), (-1, KEYS[0])])
    bls.verify(bls.aggregate_public_keys([KEYS[0], rogue]), MESSAGE, bls.sign(attacker, MESSAGE))
    for proof in (
        bls.prove_possession(attacker, b"context"),
        bls.possession_share(attacker, rogue, b"context"),
    ):
        with pytest.raises(Rejected, match="bad-proof-of-possession"):
            bls.verify_possession(rogue, b"context", proof)
