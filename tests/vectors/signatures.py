"""The golden vectors of Ed25519 where libraries differ: what every member must accept or refuse alike."""

from collections.abc import Iterator
from functools import partial
from hashlib import sha512

from agreement import Case, octets, refusal
from ed25519_fixtures import (
    BASE_POINT,
    EDGE_CASES,
    NON_CANONICAL_KEYS,
    ORDER,
    SMALL_ORDER_KEYS,
    add,
    decode_point,
    encode_point,
    multiple,
    torsion_points,
)

from consensus.keys import Ed25519SigningKey, SignatureScheme, check_public_key, verify

SCHEME = SignatureScheme.ED25519
SEED = octets("seed", "ed25519")
NONCE = int.from_bytes(octets("nonce", "ed25519"), "little") % ORDER
ORDERS = (8, 4, 8, 2, 8, 4, 8)
"""Of the points of ``torsion_points``."""
IDENTITY = bytes.fromhex(SMALL_ORDER_KEYS[0])


def _secret(seed: bytes) -> int:
    """The scalar of RFC 8032 section 5.1.5."""
    digest = bytearray(sha512(seed).digest()[:32])
    digest[0] &= 248
    digest[31] = digest[31] & 127 | 64
    return int.from_bytes(digest, "little")


def _challenge(r: bytes, key: bytes, message: bytes) -> int:
    return int.from_bytes(sha512(r + key + message).digest(), "little") % ORDER


def _signed(key: bytes, r: bytes, message: bytes, nonce: int = NONCE) -> bytes:
    """A signature by whoever has the secret, under whatever key and R it says."""
    return r + ((nonce + _challenge(r, key, message) * _secret(SEED)) % ORDER).to_bytes(32, "little")


def ed25519() -> list[Case]:
    """Keys, and signatures under keys, refused and accepted."""
    honest = Ed25519SigningKey(SEED)
    rfc = Ed25519SigningKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    cases = [refusal(what, partial(check_public_key, SCHEME, key), key=key.hex()) for what, key in _bad_keys()]
    for what, key, message, signature in _bad_signatures():
        call = partial(verify, SCHEME, key, message, signature)
        cases.append(refusal(what, call, key=key.hex(), message=message.hex(), signature=signature.hex()))
    check_public_key(SCHEME, honest.public_key)
    cases.append({"what": "a key of prime order", "key": honest.public_key.hex()})
    for what, signer, message in (
        ("RFC 8032, test 1: nothing signed", rfc, b""),
        ("a message", honest, b"message"),
    ):
        signature = signer.sign(message)
        verify(SCHEME, signer.public_key, message, signature)
        held = {"key": signer.public_key.hex(), "message": message.hex(), "signature": signature.hex()}
        cases.append({"what": what, **held})
    return cases


def _bad_keys() -> Iterator[tuple[str, bytes]]:
    honest = Ed25519SigningKey(SEED).public_key
    for number, key in enumerate(SMALL_ORDER_KEYS, 1):
        yield f"key of small order, {number}", bytes.fromhex(key)
    for number, key in enumerate(NON_CANONICAL_KEYS, 1):
        yield f"key not canonical, {number}", bytes.fromhex(key)
    for order, point in zip(ORDERS, torsion_points(), strict=True):
        yield f"key with a torsion component of order {order}", encode_point(add(decode_point(honest), point))
    yield "key that is no point", bytes([2]) + bytes(31)
    yield "key a byte short", honest[:-1]


def _bad_signatures() -> Iterator[tuple[str, bytes, bytes, bytes]]:
    for what, message, key, signature in EDGE_CASES:
        yield what, bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signature)
    for number, key in enumerate(SMALL_ORDER_KEYS, 1):
        for tried in range(64):
            message = f"message {tried}".encode()
            if _challenge(IDENTITY, bytes.fromhex(key), message) % 8 == 0:
                break
        yield (
            f"R the identity and S 0, both equations hold, under key {number}",
            bytes.fromhex(key),
            message,
            (IDENTITY + bytes(32)),
        )
    honest = Ed25519SigningKey(SEED)
    key, r = honest.public_key, encode_point(multiple(NONCE, BASE_POINT))
    for order, point in zip(ORDERS, torsion_points(), strict=True):
        mixed = encode_point(add(decode_point(key), point))
        for both in (True, False):
            message = next(
                message
                for message in (f"message {tried}".encode() for tried in range(1_000))
                if (_challenge(r, mixed, message) % order == 0) == both
            )
            which = "both equations hold" if both else "only the cofactored equation holds"
            what = f"key with a torsion component of order {order}, {which}"
            yield what, mixed, message, _signed(mixed, r, message)
        turned = encode_point(add(decode_point(r), point))
        what = f"R with a torsion component of order {order}, only the cofactored equation holds"
        yield what, key, b"message", _signed(key, turned, b"message")
    yield "R the identity, both equations hold", key, b"message", _signed(key, IDENTITY, b"message", 0)
    good = honest.sign(b"message")
    s = int.from_bytes(good[32:], "little")
    yield "S raised by the order, both equations hold", key, b"message", good[:32] + (s + ORDER).to_bytes(32, "little")
    yield "another message", key, b"massage", good
    yield "a signature a byte short", key, b"message", good[:-1]
    yield "a signature a byte longer", key, b"message", good + b"\x00"
