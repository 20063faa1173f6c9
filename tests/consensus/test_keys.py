"""Identity signatures: every verifier must accept exactly the same ones."""

import pytest
from ed25519_fixtures import NON_CANONICAL_KEYS, ORDER, SMALL_ORDER_KEYS, add, decode_point, encode_point
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.keys import (
    Ed25519SigningKey,
    MlDsa65SigningKey,
    SignatureScheme,
    Signer,
    check_public_key,
    verify,
)
from consensus.rejection import Reason, Rejected

ED25519 = SignatureScheme.ED25519
ML_DSA_65 = SignatureScheme.ML_DSA_65
SEED = bytes(range(32))


def test_rfc8032_vector_2_is_reproduced():
    key = Ed25519SigningKey(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.public_key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = key.sign(b"\x72")
    assert signature.hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    verify(ED25519, key.public_key, b"\x72", signature)


@pytest.mark.parametrize("key", SMALL_ORDER_KEYS + NON_CANONICAL_KEYS)
def test_small_order_or_non_canonical_key_is_refused(key):
    with pytest.raises(Rejected) as refusal:
        check_public_key(ED25519, bytes.fromhex(key))
    assert refusal.value.reason is Reason.BAD_KEY


@pytest.mark.parametrize("key", SMALL_ORDER_KEYS + NON_CANONICAL_KEYS)
def test_signature_for_every_message_under_small_order_key_is_refused(key):
    """R = identity, S = 0 satisfies the equation for a key of order 1, and often for the others."""
    forged = bytes.fromhex(SMALL_ORDER_KEYS[0]) + bytes(32)
    for message in (b"", b"a", b"b", b"c", b"d", b"e", b"f", b"g"):
        with pytest.raises(Rejected) as refusal:
            verify(ED25519, bytes.fromhex(key), message, forged)
        assert refusal.value.reason is Reason.BAD_SIGNATURE


def test_key_of_mixed_order_is_refused():
    honest = decode_point(Ed25519SigningKey(SEED).public_key)
    mixed = encode_point(add(honest, decode_point(bytes.fromhex(SMALL_ORDER_KEYS[4]))))
    assert encode_point(honest) == Ed25519SigningKey(SEED).public_key
    with pytest.raises(Rejected, match="prime order"):
        check_public_key(ED25519, mixed)


def test_second_encoding_of_the_same_ed25519_signature_is_refused():
    key = Ed25519SigningKey(SEED)
    signature = key.sign(b"message")
    s = int.from_bytes(signature[32:], "little")
    malleable = signature[:32] + (s + ORDER).to_bytes(32, "little")
    with pytest.raises(Rejected) as refusal:
        verify(ED25519, key.public_key, b"message", malleable)
    assert refusal.value.reason is Reason.BAD_SIGNATURE


@pytest.mark.parametrize("key", [Ed25519SigningKey(SEED), MlDsa65SigningKey(SEED)])
def test_signature_verifies_and_any_changed_byte_is_refused(key: Signer):
    check_public_key(key.scheme, key.public_key)
    signature = key.sign(b"message")
    verify(key.scheme, key.public_key, b"message", signature)
    with pytest.raises(Rejected, match="bad-signature"):
        verify(key.scheme, key.public_key, b"massage", signature)

    @settings(max_examples=60, deadline=None)
    @given(position=st.integers(0, len(signature) - 1), mask=st.integers(1, 255))
    def mutate(position: int, mask: int) -> None:
        changed = bytearray(signature)
        changed[position] ^= mask
        with pytest.raises(Rejected) as refusal:
            verify(key.scheme, key.public_key, b"message", bytes(changed))
        assert refusal.value.reason is Reason.BAD_SIGNATURE

    mutate()


@pytest.mark.parametrize("scheme", [ED25519, ML_DSA_65])
@settings(max_examples=60, deadline=None)
@given(key=st.binary(max_size=64), signature=st.binary(max_size=80))
def test_arbitrary_bytes_are_refused_without_another_exception(scheme, key, signature):
    with pytest.raises(Rejected):
        verify(scheme, key, b"message", signature)


@pytest.mark.parametrize(("scheme", "length"), [(ED25519, 31), (ED25519, 33), (ML_DSA_65, 1951)])
def test_key_of_wrong_length_is_refused(scheme, length):
    for act in (
        lambda: check_public_key(scheme, bytes(length)),
        lambda: verify(scheme, bytes(length), b"", b""),
    ):
        with pytest.raises(Rejected) as refusal:
            act()
        assert refusal.value.reason is Reason.BAD_KEY


@pytest.mark.parametrize(("scheme", "length"), [(ED25519, 63), (ED25519, 65), (ML_DSA_65, 3308)])
def test_signature_of_wrong_length_is_refused(scheme, length):
    key = Ed25519SigningKey(SEED) if scheme == ED25519 else MlDsa65SigningKey(SEED)
    with pytest.raises(Rejected) as refusal:
        verify(scheme, key.public_key, b"", bytes(length))
    assert refusal.value.reason is Reason.BAD_SIGNATURE


@pytest.mark.parametrize("scheme", [0, 3, 255])
def test_unknown_scheme_is_refused(scheme):
    with pytest.raises(Rejected, match="unknown"):
        check_public_key(scheme, bytes(32))
    with pytest.raises(Rejected, match="unknown"):
        verify(scheme, bytes(32), b"", bytes(64))


@pytest.mark.parametrize("kind", [Ed25519SigningKey, MlDsa65SigningKey])
def test_seed_is_never_shown_and_must_have_32_bytes(kind):
    assert SEED.hex() not in repr(kind(SEED))
    assert repr(SEED) not in repr(kind(SEED))
    assert kind(SEED).public_key == kind(SEED).public_key
    for length in (0, 31, 33):
        with pytest.raises(Rejected, match="32 bytes"):
            kind(bytes(length))


def test_schemes_do_not_take_each_others_signatures():
    ed25519, ml_dsa = Ed25519SigningKey(SEED), MlDsa65SigningKey(SEED)
    assert (ed25519.scheme, ml_dsa.scheme) == (ED25519, ML_DSA_65)
    with pytest.raises(Rejected):
        verify(ML_DSA_65, ml_dsa.public_key, b"m", ed25519.sign(b"m"))
    with pytest.raises(Rejected):
        verify(ED25519, ed25519.public_key, b"m", ml_dsa.sign(b"m"))
