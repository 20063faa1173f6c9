"""Vectors others published: Ed25519 edge cases, BLS encodings, RFC 6962 proofs, signed notes.

Sources: the twelve cases of "Taming the many EdDSAs" (``ed25519_fixtures.py``), the BLS12-381 deserialization and
verification cases of the Ethereum consensus tests, a proof of the reference log of RFC 6962 implementations. Keys,
proofs and notes of RFC 8032, RFC 9162 and C2SP stand in the tests of their own modules.
"""

from base64 import b64decode, b64encode
from hashlib import sha512

import pytest
from ed25519_fixtures import BASE_POINT, EDGE_CASES, ORDER, add, decode_point, encode_point, multiple, torsion_points

from consensus import bls, keys
from consensus.checkpoint import assemble_note, checkpoint_text, key_id, verify_note
from consensus.identifiers import Digest
from consensus.keys import Ed25519SigningKey, SignatureScheme, check_public_key, verify
from consensus.merkle import verify_consistency, verify_inclusion
from consensus.rejection import Reason, Rejected


@pytest.mark.parametrize(("case", "message", "key", "signature"), EDGE_CASES, ids=[case[0] for case in EDGE_CASES])
def test_no_edge_case_on_which_ed25519_libraries_differ_is_accepted(
    case: str, message: str, key: str, signature: str
) -> None:
    with pytest.raises(Rejected) as refusal:
        verify(SignatureScheme.ED25519, bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signature))
    assert refusal.value.reason is Reason.BAD_SIGNATURE


def test_libsodium_that_verifies_with_the_cofactor_accepts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_COFACTORED", True)
    signer = Ed25519SigningKey(bytes(32))
    verify(SignatureScheme.ED25519, signer.public_key, b"message", signer.sign(b"message"))
    for _, message, key, signature in EDGE_CASES:
        with pytest.raises(Rejected):
            verify(SignatureScheme.ED25519, bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signature))


@pytest.mark.parametrize("number", range(7))
def test_key_with_any_torsion_component_is_refused(number: int) -> None:
    """One of them, of order 2, passed the subgroup check of libsodium up to 1.0.20 (CVE-2025-69277)."""
    honest = Ed25519SigningKey(bytes(32)).public_key
    with pytest.raises(Rejected) as refusal:
        check_public_key(SignatureScheme.ED25519, encode_point(add(decode_point(honest), torsion_points()[number])))
    assert refusal.value.reason is Reason.BAD_KEY


def test_signature_with_torsion_in_r_by_an_honest_key_is_refused() -> None:
    """Its maker is the key's holder: valid with the cofactor, invalid without. It would split verifiers."""
    seed = bytes(32)
    digest = bytearray(sha512(seed).digest())
    digest[0] &= 248
    digest[31] = digest[31] & 127 | 64
    secret, nonce = int.from_bytes(digest[:32], "little"), 12345
    key = Ed25519SigningKey(seed).public_key
    point = multiple(nonce, BASE_POINT)

    def signed(r: bytes) -> bytes:
        challenge = int.from_bytes(sha512(r + key + b"message").digest(), "little")
        return r + ((nonce + challenge * secret) % ORDER).to_bytes(32, "little")

    verify(SignatureScheme.ED25519, key, b"message", signed(encode_point(point)))
    for torsion in torsion_points():
        with pytest.raises(Rejected):
            verify(SignatureScheme.ED25519, key, b"message", signed(encode_point(add(point, torsion))))


def test_edge_case_signatures_condemn_a_note() -> None:
    text = checkpoint_text("log", 1, Digest(bytes(32)))
    for _, _, key, signature in EDGE_CASES:
        stamped = b64encode(key_id("log", bytes.fromhex(key)) + bytes.fromhex(signature))
        note = assemble_note(text, ["— log ".encode() + stamped + b"\n"])
        with pytest.raises(Rejected) as refusal:
            verify_note(note, {"log": bytes.fromhex(key)})
        assert refusal.value.reason is Reason.BAD_CHECKPOINT


BLS_KEY = "a491d1b0ecd9bb917989f0e74f0dea0422eac4a873e5e2644f368dffb9a6e20fd6e10c1b77654d067c0618f6e5a7f79a"
BAD_G1 = {
    "infinity": "c0" + "00" * 47,
    "infinity with false b flag": "80" + "00" * 47,
    "infinity with true b flag": "c01" + "0" * 93,
    "not in G1": "8123456789abcdef" + "0123456789abcdef" * 5,
    "not in curve": "8123456789abcdef" + "0123456789abcdef" * 4 + "0123456789abcde0",
    "x equal to modulus": "9a0111ea397fe69a4b1ba7b6434bacd764774b84f38512bf6730d2a0f6b0f6241eabfffeb153ffffb9fefffff"
    "fffaaab",
    "x greater than modulus": "9a0111ea397fe69a4b1ba7b6434bacd764774b84f38512bf6730d2a0f6b0f6241eabfffeb153ffffb9fef"
    "fffffffaaac",
    "too few bytes": BLS_KEY[:-2],
    "too many bytes": BLS_KEY + "00",
    "b flag and a flag true": "e0" + "00" * 47,
    "b flag and x nonzero": "c123456789abcdef" + "0123456789abcdef" * 5,
    "wrong c flag": "0123456789abcdef" * 6,
}
BAD_G2 = {
    "infinity": "c0" + "00" * 95,
    "infinity with false b flag": "80" + "00" * 95,
    "infinity with true b flag": "c01" + "0" * 189,
    "not in G2": "8123456789abcdef" + "0123456789abcdef" * 11,
    "not in curve": "8123456789abcdef" + "0123456789abcdef" * 10 + "0123456789abcde0",
    "b flag and a flag true": "e0" + "00" * 95,
    "b flag and x nonzero": "c123456789abcdef" + "0123456789abcdef" * 11,
    "wrong c flag": "0123456789abcdef" * 12,
    "zero": "00" * 96,
}


@pytest.mark.parametrize("name", BAD_G1)
def test_bls_key_the_ethereum_vectors_refuse_is_refused(name: str) -> None:
    with pytest.raises(Rejected) as refusal:
        bls.check_public_key(bytes.fromhex(BAD_G1[name]))
    assert refusal.value.reason is Reason.BAD_KEY
    with pytest.raises(Rejected):
        bls.verify(bytes.fromhex(BAD_G1[name]), b"message", bytes.fromhex(BAD_G2["infinity"]))


@pytest.mark.parametrize("name", BAD_G2)
def test_bls_signature_the_ethereum_vectors_refuse_is_refused(name: str) -> None:
    with pytest.raises(Rejected) as refusal:
        bls.verify(bytes.fromhex(BLS_KEY), bytes.fromhex("56" * 32), bytes.fromhex(BAD_G2[name]))
    assert refusal.value.reason is Reason.BAD_SIGNATURE
    with pytest.raises(Rejected):
        bls.verify_possession(bytes.fromhex(BLS_KEY), b"", bytes.fromhex(BAD_G2[name]))


def test_bls_key_the_ethereum_vectors_accept_is_accepted() -> None:
    bls.check_public_key(bytes.fromhex(BLS_KEY))


ROOT_2 = b64decode("+sVCA+fMaWzw38tCySodnbr3CtnmIfS9jZhmLwDjwSU=")
ROOT_5 = b64decode("Tju7H3tHjc/nH7YxYxUZo7yhLJrvyhYSv85ME6hiZNQ=")
ROOT_8 = b64decode("XcnaeacGWamtVZy3Ad7ZoqudgjqtL0lgz+Nw7/RgQyg=")
LEAF_5 = b64decode("QnGia+DYqE8L1UyMMC58s6O10fpngKQLzOKHNHfatlg=")
CONSISTENCY_2_5 = (
    b64decode("Xwg/ChozygdqlSeYMlgNs+DvRYS9/x9UyKNg9Q3jAx4="),
    b64decode("vBoGQ7EuTS18d5GPROD095qDi2z57FtcKD4fTYhZnms="),
)
INCLUSION_5_8 = (
    b64decode("vBoGQ7EuTS18d5GPROD095qDi2z57FtcKD4fTYhZnms="),
    b64decode("yoVOoSjtBQtBs1/8G4e46yveRh6eO1WW7Oa51ZdaCuA="),
    b64decode("037kGJdt2VdTwcc4Yrk5j6Kiz5tP8P3+izDNlSCWFLc="),
)


def test_published_proofs_hold() -> None:
    verify_consistency(2, 5, CONSISTENCY_2_5, ROOT_2, ROOT_5)
    verify_inclusion(LEAF_5, 5, 8, INCLUSION_5_8, ROOT_8)


@pytest.mark.parametrize(
    ("first", "second", "proof", "one", "two"),
    [
        (1, 5, CONSISTENCY_2_5, ROOT_2, ROOT_5),
        (3, 5, CONSISTENCY_2_5, ROOT_2, ROOT_5),
        (0, 5, CONSISTENCY_2_5, ROOT_2, ROOT_5),
        (2, 10, CONSISTENCY_2_5, ROOT_2, ROOT_5),
        (2, 2, CONSISTENCY_2_5, ROOT_2, ROOT_5),
        (5, 2, CONSISTENCY_2_5, ROOT_2, ROOT_5),
        (2, 5, CONSISTENCY_2_5, ROOT_5, ROOT_2),
        (2, 5, (), ROOT_2, ROOT_5),
        (2, 5, CONSISTENCY_2_5[:-1], ROOT_2, ROOT_5),
        (2, 5, (*CONSISTENCY_2_5, b""), ROOT_2, ROOT_5),
        (2, 5, (*CONSISTENCY_2_5, ROOT_2), ROOT_2, ROOT_5),
        (2, 5, (ROOT_2, *CONSISTENCY_2_5), ROOT_2, ROOT_5),
        (2, 5, (b"garbage", *CONSISTENCY_2_5), ROOT_2, ROOT_5),
        (2, 5, CONSISTENCY_2_5, b"WrongRoot", ROOT_5),
        (2, 5, CONSISTENCY_2_5, ROOT_2, b"WrongRoot"),
    ],
)
def test_published_probes_of_a_consistency_proof_are_refused(
    first: int, second: int, proof: tuple[bytes, ...], one: bytes, two: bytes
) -> None:
    with pytest.raises(Rejected) as refusal:
        verify_consistency(first, second, proof, one, two)
    assert refusal.value.reason is Reason.BAD_PROOF


@pytest.mark.parametrize(
    ("leaf", "index", "size", "proof", "root"),
    [
        (LEAF_5, 4, 8, INCLUSION_5_8, ROOT_8),
        (LEAF_5, 7, 8, INCLUSION_5_8, ROOT_8),
        (LEAF_5, 5, 16, INCLUSION_5_8, ROOT_8),
        (LEAF_5, 5, 4, INCLUSION_5_8, ROOT_8),
        (LEAF_5, 5, 0, INCLUSION_5_8, ROOT_8),
        (LEAF_5, -1, 8, INCLUSION_5_8, ROOT_8),
        (b"WrongLeaf", 5, 8, INCLUSION_5_8, ROOT_8),
        (LEAF_5, 5, 8, INCLUSION_5_8, bytes(32)),
        (LEAF_5, 5, 8, (), ROOT_8),
        (LEAF_5, 5, 8, INCLUSION_5_8[:-1], ROOT_8),
        (LEAF_5, 5, 8, (*INCLUSION_5_8, b""), ROOT_8),
        (LEAF_5, 5, 8, (*INCLUSION_5_8, ROOT_8), ROOT_8),
        (LEAF_5, 5, 8, (ROOT_8, *INCLUSION_5_8), ROOT_8),
    ],
)
def test_published_probes_of_an_inclusion_proof_are_refused(
    leaf: bytes, index: int, size: int, proof: tuple[bytes, ...], root: bytes
) -> None:
    with pytest.raises(Rejected) as refusal:
        verify_inclusion(leaf, index, size, proof, root)
    assert refusal.value.reason is Reason.BAD_PROOF
