"""Strict BLS signatures over BLS12-381: 48-byte keys in G1, 96-byte signatures in G2.

Ciphersuite ``BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_`` (draft-irtf-cfrg-bls-signature-05 §4.2.3).
The only module that imports the BLS libraries: ``blspy`` for signing, checking and public sums (it
releases the interpreter lock), ``pyblst`` for a secret scalar times a point of our choosing.

Rules beyond the libraries' own:

- The point at infinity is refused wherever a key or a signature is read, and wherever a sum gives it.
- A sum over nothing is refused; a secret is in [1, r).
- Points are canonical, on the curve and in the prime-order subgroup.
- A proof of possession is a signature under a *separate* hash-to-curve tag over (key, context), so that
  no signature made for another purpose can serve as one and none can move to another context.
- Whatever the bytes, the only exception is ``Rejected``; no message or ``repr`` shows a secret.

Sums take public weights in variable time. Shares, Lagrange and key generation are left to ``threshold``.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, TypeVar, cast

from blspy import G1Element, G2Element, PopSchemeMPL, PrivateKey
from pyblst import BlstP1Element, BlstP2Element, final_verify, miller_loop

from consensus.identifiers import Tag, tagged_message
from consensus.rejection import Reason, Rejected

GROUP_ORDER: Final = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
"""``r``: the order of both groups."""

SECRET_BYTES: Final = 32
PUBLIC_KEY_BYTES: Final = 48
SIGNATURE_BYTES: Final = 96
GENERATOR: Final = bytes(G1Element.generator())
"""The generator of G1: the public key of the secret 1."""

_POSSESSION_DOMAIN: Final = b"COUNTERSIGN-V1_POSSESSION_BLS12381G2_XMD:SHA-256_SSWU_RO_"
_SHORT_WEIGHT_BITS: Final = 32
_CACHED_KEYS: Final = 1_024

Point = TypeVar("Point", G1Element, G2Element)


class Secret:
    """A secret scalar in [1, r)."""

    __slots__ = ("_key", "_scalar")

    def __init__(self, scalar: int) -> None:
        if not 0 < scalar < GROUP_ORDER:
            raise Rejected(Reason.BAD_KEY, "a BLS secret must be at least 1 and below the group order")
        self._scalar = scalar
        self._key = PrivateKey.from_bytes(scalar.to_bytes(SECRET_BYTES, "big"))

    @classmethod
    def from_bytes(cls, encoded: bytes) -> "Secret":
        """The secret of 32 bytes, big-endian.

        Raises:
            Rejected: ``BAD_KEY`` for another length, zero, or a value not below the group order.
        """
        if len(encoded) != SECRET_BYTES:
            raise Rejected(Reason.BAD_KEY, f"a BLS secret has {SECRET_BYTES} bytes, not {len(encoded)}")
        return cls(int.from_bytes(encoded, "big"))

    def to_bytes(self) -> bytes:
        """32 bytes, big-endian."""
        return self._scalar.to_bytes(SECRET_BYTES, "big")

    @property
    def scalar(self) -> int:
        """The secret itself, for key generation."""
        return self._scalar

    def __repr__(self) -> str:
        return "Secret(…)"


def secret_from_seed(seed: bytes) -> Secret:
    """KeyGen (draft-irtf-cfrg-bls-signature-05 §2.3) from exactly 32 bytes.

    Raises:
        Rejected: ``BAD_KEY`` for another length.
    """
    if len(seed) != SECRET_BYTES:
        raise Rejected(Reason.BAD_KEY, f"a seed has {SECRET_BYTES} bytes, not {len(seed)}")
    return Secret.from_bytes(bytes(PopSchemeMPL.key_gen(seed)))


def public_key(secret: Secret) -> bytes:
    """48 bytes."""
    return bytes(secret._key.get_g1())


def sign(secret: Secret, message: bytes) -> bytes:
    """96 bytes, the same for the same message."""
    return bytes(PopSchemeMPL.sign(secret._key, message))


def check_public_key(key: bytes) -> None:
    """``key`` is a canonical point of the prime-order subgroup of G1, not infinity.

    Raises:
        Rejected: ``BAD_KEY``.
    """
    _parse_key(key)


def verify(key: bytes, message: bytes, signature: bytes) -> None:
    """``signature`` is the one of ``key`` over ``message``; one pairing check.

    Raises:
        Rejected: ``BAD_KEY``, ``BAD_SIGNATURE``.
    """
    if not PopSchemeMPL.verify(_parse_key(key), message, _parse_signature(signature)):
        raise Rejected(Reason.BAD_SIGNATURE, f"no BLS signature by {key.hex()}")


def aggregate_public_keys(public_keys: Sequence[bytes]) -> bytes:
    """The sum of keys, each of which must have proved possession.

    Raises:
        Rejected: ``BAD_KEY`` for no keys, a bad one, or a sum at infinity.
    """
    return weighted_public_key_sum([(1, key) for key in public_keys])


def aggregate_signatures(signatures: Sequence[bytes]) -> bytes:
    """The sum of signatures.

    Raises:
        Rejected: ``BAD_SIGNATURE`` for no signatures, a bad one, or a sum at infinity.
    """
    return weighted_signature_sum([(1, signature) for signature in signatures])


def weighted_public_key_sum(terms: Iterable[tuple[int, bytes]]) -> bytes:
    """``Σ weight · key`` with public weights.

    Raises:
        Rejected: ``BAD_KEY`` for no terms, a bad key, or a sum at infinity.
    """
    points = [(weight, _parse_key(key)) for weight, key in terms]
    if not points:
        raise Rejected(Reason.BAD_KEY, "a sum over no keys")
    total = _weighted_sum(points, G1Element())
    if total == G1Element():
        raise Rejected(Reason.BAD_KEY, "the keys cancel: their sum is the point at infinity")
    return bytes(total)


def weighted_signature_sum(terms: Iterable[tuple[int, bytes]], denominator: int = 1) -> bytes:
    """``(Σ weight · signature) / denominator`` with public weights.

    Short weights with one common denominator cost a few additions and at most one multiplication.

    Raises:
        Rejected: ``BAD_SIGNATURE`` for no terms, a bad signature, or a sum at infinity.
    """
    points = [(weight, _parse_signature(signature)) for weight, signature in terms]
    if not points:
        raise Rejected(Reason.BAD_SIGNATURE, "a sum over no signatures")
    total = _weighted_sum(points, G2Element())
    if total == G2Element():
        raise Rejected(Reason.BAD_SIGNATURE, "the signatures cancel: their sum is the point at infinity")
    encoded = bytes(total)
    if denominator % GROUP_ORDER == 1:
        return encoded
    inverse = pow(denominator, -1, GROUP_ORDER)
    return bytes(BlstP2Element.uncompress(encoded).scalar_mul(inverse).compress())


def prove_possession(secret: Secret, context: bytes) -> bytes:
    """Proof that the holder of ``secret`` made its key for ``context``: 96 bytes."""
    return possession_share(secret, public_key(secret), context)


def possession_share(secret: Secret, claimed_key: bytes, context: bytes) -> bytes:
    """The part of ``secret`` in a joint proof of possession of ``claimed_key``.

    Weighted sums of such parts are proofs of the keys whose secrets are the same sums.
    """
    hashed = BlstP2Element.hash_to_group(_possession_message(claimed_key, context), _POSSESSION_DOMAIN)
    return bytes(hashed.scalar_mul(secret.scalar).compress())


def verify_possession(key: bytes, context: bytes, proof: bytes) -> None:
    """``proof`` shows that ``key`` was made by a holder of its secret for ``context``.

    Raises:
        Rejected: ``BAD_KEY``, ``BAD_PROOF_OF_POSSESSION``.
    """
    verify_possession_share(key, key, context, proof)


def verify_possession_share(share_key: bytes, claimed_key: bytes, context: bytes, proof: bytes) -> None:
    """``proof`` is the part of ``share_key``'s secret in a joint proof of ``claimed_key``.

    Raises:
        Rejected: ``BAD_KEY``, ``BAD_PROOF_OF_POSSESSION``.
    """
    check_public_key(share_key)
    check_public_key(claimed_key)
    try:
        _parse_signature(proof)
    except Rejected as error:
        raise Rejected(Reason.BAD_PROOF_OF_POSSESSION, error.detail) from error
    hashed = BlstP2Element.hash_to_group(_possession_message(claimed_key, context), _POSSESSION_DOMAIN)
    left = miller_loop(BlstP1Element.uncompress(share_key), hashed)
    right = miller_loop(BlstP1Element.uncompress(GENERATOR), BlstP2Element.uncompress(proof))
    if not final_verify(left, right):
        raise Rejected(Reason.BAD_PROOF_OF_POSSESSION, f"no proof of possession of {claimed_key.hex()}")


def _possession_message(claimed_key: bytes, context: bytes) -> bytes:
    return tagged_message(Tag.POSSESSION, claimed_key, context)


@lru_cache(maxsize=_CACHED_KEYS)
def _parse_key(encoded: bytes) -> G1Element:
    """A checked key. Cached, bounded: the few keys of a membership are read for every signature."""
    if len(encoded) != PUBLIC_KEY_BYTES:
        raise Rejected(Reason.BAD_KEY, f"BLS key of {len(encoded)} bytes, expected {PUBLIC_KEY_BYTES}")
    try:
        point = G1Element.from_bytes(encoded)
    except ValueError as error:
        raise Rejected(Reason.BAD_KEY, f"{encoded.hex()} is no point of G1") from error
    if point == G1Element():
        raise Rejected(Reason.BAD_KEY, "the point at infinity is no BLS key")
    return point


def _parse_signature(encoded: bytes) -> G2Element:
    if len(encoded) != SIGNATURE_BYTES:
        raise Rejected(Reason.BAD_SIGNATURE, f"BLS signature of {len(encoded)} bytes, expected {SIGNATURE_BYTES}")
    try:
        point = G2Element.from_bytes(encoded)
    except ValueError as error:
        raise Rejected(Reason.BAD_SIGNATURE, f"{encoded.hex()} is no point of G2") from error
    if point == G2Element():
        raise Rejected(Reason.BAD_SIGNATURE, "the point at infinity is no BLS signature")
    return point


def _weighted_sum(terms: Sequence[tuple[int, Point]], infinity: Point) -> Point:
    """Straus's joint multiplication: doublings are shared by all terms.

    Weights are taken nearest to zero modulo the group order, so that small negative ones stay short.
    """
    positive: list[tuple[int, Point]] = []
    for weight, point in terms:
        reduced = weight % GROUP_ORDER
        if reduced > GROUP_ORDER // 2:
            positive.append((GROUP_ORDER - reduced, point.negate()))
        else:
            positive.append((reduced, point))
    bits = max(weight.bit_length() for weight, _ in positive)
    window = 1 if bits <= _SHORT_WEIGHT_BITS else 4
    tables: list[tuple[int, list[Point]]] = []
    for weight, point in positive:
        multiples = [infinity, point]
        while len(multiples) < 1 << window:
            multiples.append(multiples[-1] + point)
        tables.append((weight, multiples))
    total = infinity
    for shift in range(-(-bits // window) * window - window, -1, -window):
        if total != infinity:
            for _ in range(window):
                total = total + total
        for weight, multiples in tables:
            digit = (weight >> shift) & ((1 << window) - 1)
            if digit:
                total = total + multiples[digit]
    return cast(Point, total)
