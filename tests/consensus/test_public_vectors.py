"""Vectors others published: Ed25519 edge cases, BLS encodings, RFC 6962 proofs, signed notes.

Sources: the twelve cases of "Taming the many EdDSAs" (eprint 2020/1244, table 6; R of cases 8 and 9 as printed
there), the BLS12-381 deserialization and verification cases of the Ethereum consensus tests, a proof of the
reference log of RFC 6962 implementations. Keys, proofs and notes of RFC 8032, RFC 9162 and C2SP stand in the
tests of their own modules.
"""

from base64 import b64decode, b64encode
from hashlib import sha512

import pytest

from consensus import bls, keys
from consensus.checkpoint import assemble_note, checkpoint_text, key_id, verify_note
from consensus.identifiers import Digest
from consensus.keys import Ed25519SigningKey, SignatureScheme, check_public_key, verify
from consensus.merkle import verify_consistency, verify_inclusion
from consensus.rejection import Reason, Rejected

FIELD = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
CURVE_D = -121665 * pow(121666, -1, FIELD) % FIELD

SMALL = "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"
MIXED_0 = "f7badec5b8abeaf699583992219b7b223f1df3fbbea919844e3f7c554a43dd43"
MIXED = "cdb267ce40c5cd45306fa5d2f29731459387dbf9eb933b7bd5aed9a765b88d4d"
PLAIN = "442aad9f089ad9e14647b1ef9099a1ff4798d78589e66f28eca69c11f582a623"
NOT_CANONICAL = "ec" + "ff" * 31

EDGE_CASES = [
    (
        "small order A and R",
        "8c93255d71dcab10e8f379c26200f3c7bd5f09d9bc3068d3ef4edeb4853022b6",
        SMALL,
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a" + "00" * 32,
    ),
    (
        "small order A",
        "9bd9f44f4dcc75bd531b56b2cd280b0bb38fc1cd6d1230e14861d861de092e79",
        SMALL,
        MIXED_0 + "a5bb704786be79fc476f91d3f3f89b03984d8068dcf1bb7dfc6637b45450ac04",
    ),
    (
        "small order R",
        "aebf3f2601a0c8c5d39cc7d8911642f740b78168218da8471772b35f9d35b9ab",
        MIXED_0,
        SMALL + "8c4bd45aecaca5b24fb97bc10ac27ac8751a7dfe1baff8b953ec9f5833ca260e",
    ),
    (
        "mixed order, both equations hold",
        "9bd9f44f4dcc75bd531b56b2cd280b0bb38fc1cd6d1230e14861d861de092e79",
        MIXED,
        "9046a64750444938de19f227bb80485e92b83fdb4b6506c160484c016cc1852f"
        "87909e14428a7a1d62e9f22f3d3ad7802db02eb2e688b6c52fcd6648a98bd009",
    ),
    (
        "mixed order, only the cofactored equation holds",
        "e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec4011eaccd55b53f56c",
        MIXED,
        "160a1cb0dc9c0258cd0a7d23e94d8fa878bcb1925f2c64246b2dee1796bed512"
        "5ec6bc982a269b723e0668e540911a9a6a58921d6925e434ab10aa7940551a09",
    ),
    (
        "mixed order, the cofactored equation unless reduced first",
        "e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec4011eaccd55b53f56c",
        MIXED,
        "21122a84e0b5fca4052f5b1235c80a537878b38f3142356b2c2384ebad4668b7"
        "e40bc836dac0f71076f9abe3a53f9c03c1ceeeddb658d0030494ace586687405",
    ),
    (
        "S above the order",
        "85e241a07d148b41e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec40",
        PLAIN,
        "e96f66be976d82e60150baecff9906684aebb1ef181f67a7189ac78ea23b6c0e"
        "547f7690a0e2ddcd04d87dbc3490dc19b3b3052f7ff0538cb68afb369ba3a514",
    ),
    (
        "S far above the order",
        "85e241a07d148b41e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec40",
        PLAIN,
        "8ce5b96c8f26d0ab6c47958c9e68b937104cd36e13c33566acd2fe8d38aa1942"
        "7e71f98a473474f2f13f06f97c20d58cc3f54b8bd0d272f42b695dd7e89a8c22",
    ),
    (
        "non-canonical R",
        "9bedc267423725d473888631ebf45988bad3db83851ee85c85e241a07d148b41",
        MIXED_0,
        NOT_CANONICAL + "03be9678ac102edcd92b0210bb34d7428d12ffc5df5f37e359941266a4e35f0f",
    ),
    (
        "non-canonical R, reduced for hashing",
        "9bedc267423725d473888631ebf45988bad3db83851ee85c85e241a07d148b41",
        MIXED_0,
        NOT_CANONICAL + "ca8c5b64cd208982aa38d4936621a4775aa233aa0505711d8fdcfdaa943d4908",
    ),
    (
        "non-canonical A",
        "e96b7021eb39c1a163b6da4e3093dcd3f21387da4cc4572be588fafae23c155b",
        NOT_CANONICAL,
        "a9d55260f765261eb9b84e106f665e00b867287a761990d7135963ee0a7d59dc"
        "a5bb704786be79fc476f91d3f3f89b03984d8068dcf1bb7dfc6637b45450ac04",
    ),
    (
        "non-canonical A, reduced for hashing",
        "39a591f5321bbe07fd5a23dc2f39d025d74526615746727ceefd6e82ae65c06f",
        NOT_CANONICAL,
        "a9d55260f765261eb9b84e106f665e00b867287a761990d7135963ee0a7d59dc"
        "a5bb704786be79fc476f91d3f3f89b03984d8068dcf1bb7dfc6637b45450ac04",
    ),
]


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


def _add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    (x1, y1), (x2, y2) = one, other
    product = CURVE_D * x1 * x2 * y1 * y2 % FIELD
    return (
        (x1 * y2 + x2 * y1) * pow(1 + product, -1, FIELD) % FIELD,
        (y1 * y2 + x1 * x2) * pow(1 - product, -1, FIELD) % FIELD,
    )


def _decode(encoded: bytes) -> tuple[int, int]:
    number = int.from_bytes(encoded, "little")
    y, sign = number & (2**255 - 1), number >> 255
    square = (y * y - 1) * pow(CURVE_D * y * y + 1, -1, FIELD) % FIELD
    x = pow(square, (FIELD + 3) // 8, FIELD)
    if (x * x - square) % FIELD:
        x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    assert (x * x - square) % FIELD == 0
    return (FIELD - x if x % 2 != sign else x), y


def _encode(point: tuple[int, int]) -> bytes:
    x, y = point
    return (y | (x % 2) << 255).to_bytes(32, "little")


def _torsion() -> list[tuple[int, int]]:
    """The seven points of small order that are not the identity."""
    generator = _decode(bytes.fromhex(SMALL))
    points = [generator]
    while len(points) < 7:
        points.append(_add(points[-1], generator))
    return points


@pytest.mark.parametrize("number", range(7))
def test_key_with_any_torsion_component_is_refused(number: int) -> None:
    """One of them, of order 2, passed the subgroup check of libsodium up to 1.0.20 (CVE-2025-69277)."""
    honest = Ed25519SigningKey(bytes(32)).public_key
    with pytest.raises(Rejected) as refusal:
        check_public_key(SignatureScheme.ED25519, _encode(_add(_decode(honest), _torsion()[number])))
    assert refusal.value.reason is Reason.BAD_KEY


def test_signature_with_torsion_in_r_by_an_honest_key_is_refused() -> None:
    """Its maker is the key's holder: valid with the cofactor, invalid without. It would split verifiers."""
    seed = bytes(32)
    digest = bytearray(sha512(seed).digest())
    digest[0] &= 248
    digest[31] = digest[31] & 127 | 64
    secret, nonce = int.from_bytes(digest[:32], "little"), 12345
    key = Ed25519SigningKey(seed).public_key
    base = _decode(bytes.fromhex("58" + "66" * 31))
    point, addend = (0, 1), base
    for bit in range(nonce.bit_length()):
        if nonce >> bit & 1:
            point = _add(point, addend)
        addend = _add(addend, addend)

    def signed(r: bytes) -> bytes:
        challenge = int.from_bytes(sha512(r + key + b"message").digest(), "little")
        return r + ((nonce + challenge * secret) % ORDER).to_bytes(32, "little")

    verify(SignatureScheme.ED25519, key, b"message", signed(_encode(point)))
    for torsion in _torsion():
        with pytest.raises(Rejected):
            verify(SignatureScheme.ED25519, key, b"message", signed(_encode(_add(point, torsion))))


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
