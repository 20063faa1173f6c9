"""The golden vectors of signatures: Ed25519 where libraries differ, fields of batches, and fields of job keys."""

from collections.abc import Iterator
from functools import partial
from hashlib import sha512

from agreement import Case, Signing, octets, refusal
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

from consensus.batch_signature import sign_messages, verify_field
from consensus.identifiers import Tag, tagged_hash, tagged_message
from consensus.job_key import job_key_id, sign_as_job, verify_job_signature
from consensus.keys import Ed25519SigningKey, SignatureScheme, check_public_key, signer_for, verify
from consensus.membership import ML_DSA_65_LIST
from consensus.merkle import leaf_hash, root_of

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


# What stands beside a signer in an entry


def batch_signatures() -> list[Case]:
    """Signature fields of one message or of many that one Ed25519 key signed together, and what is none."""
    key = Ed25519SigningKey(octets("seed", "batch"))
    cases = []
    for what, message, field in _bad_fields(key):
        call = partial(verify_field, SCHEME, key.public_key, message, field)
        held = {"public_key": key.public_key.hex(), "messages": [message.hex()], "fields": [field.hex()]}
        cases.append(refusal(what, call, **held))
    for count in (1, 2, 3, 7, 8):
        messages = [octets("message", number) for number in range(count)]
        fields = sign_messages(key, messages)
        cases.append(
            {
                "what": f"{count} messages",
                "public_key": key.public_key.hex(),
                "messages": [message.hex() for message in messages],
                "fields": [field.hex() for field in fields],
            }
        )
    return cases


def _place(index: int, size: int) -> bytes:
    return index.to_bytes(4, "big") + size.to_bytes(4, "big")


def _bad_fields(key: Ed25519SigningKey) -> Iterator[tuple[str, bytes, bytes]]:
    """Of the third of three messages: its path is one hash."""
    messages = [octets("message", number) for number in range(3)]
    first, _, field = sign_messages(key, messages)
    message, signature, path = messages[2], field[:64], field[72:]
    yield "a plain signature of another message", message, key.sign(messages[0])
    yield "the signature over the root without its way", message, signature
    yield "a field of another message", message, first
    yield "another index", message, signature + _place(0, 3) + path
    yield "an index beyond the batch", message, signature + _place(3, 3) + path
    yield "another size", message, signature + _place(2, 4) + path
    yield "a batch of one", message, signature + _place(0, 1) + path
    yield "a batch of more than 65,536", message, signature + _place(2, 65_537) + path
    many = [octets("message", number) for number in range(65_537)]
    last = leaf_hash(many[-1])
    below = root_of([leaf_hash(held) for held in many[:-1]])
    over = tagged_message(Tag.EVENT_BATCH, (65_537).to_bytes(4, "big"), root_of([below, last]))
    yield "the last of 65,537 messages", many[-1], key.sign(over) + _place(65_536, 65_537) + below
    yield "another hash", message, signature + _place(2, 3) + octets("hash")
    yield "a hash more", message, field + octets("hash")
    yield "no hash", message, field[:72]
    yield "a byte more", message, field + b"\x00"
    yield "a byte short", message, field[:-1]
    yield "17 hashes", message, signature + _place(2, 3) + octets("hash") * 17
    root = root_of([leaf_hash(held) for held in messages])
    yield "a signature over the root without a size", message, key.sign(root) + field[64:]
    yield (
        "a signature over the root with another size",
        message,
        (key.sign(tagged_message(Tag.EVENT_BATCH, (4).to_bytes(4, "big"), root)) + field[64:]),
    )
    flat = root_of([tagged_hash(Tag.EVENT, held) for held in messages])
    yield (
        "leaves with a tag",
        message,
        (key.sign(tagged_message(Tag.EVENT_BATCH, (3).to_bytes(4, "big"), flat)) + field[64:]),
    )


def job_keys() -> list[Case]:
    """What the log calls a job key, by scheme, and signature fields that are not its own."""
    cases = []
    for what, identifier, message, field in _bad_job_fields():
        call = partial(verify_job_signature, identifier, message, field)
        cases.append(refusal(what, call, id=identifier.hex(), message=message.hex(), field=field.hex()))
    key, messages = Ed25519SigningKey(octets("job", "ed25519")), [octets("message", number) for number in range(3)]
    for what, fields in (("plain", sign_as_job(key, messages[:1])), ("of a batch", sign_as_job(key, messages))):
        verify_job_signature(key.public_key, messages[0], fields[0])
        held = {"id": key.public_key.hex(), "message": messages[0].hex(), "field": fields[0].hex()}
        cases.append({"what": f"a field of scheme 1, {what}", **held})
    named, message, field = _post_quantum()
    verify_job_signature(named, message, field)
    told = {"id": named.hex(), "message": message.hex(), "field": field.hex()}
    cases.append({"what": "a field of scheme 2, plain", **told})
    for scheme in SignatureScheme:
        held_key = signer_for(scheme, octets("job", scheme.label))
        public = held_key.public_key.hex()
        held = {"scheme": held_key.scheme, "public_key": public, "id": job_key_id(held_key).hex()}
        cases.append({"what": f"a key of scheme {scheme.value}", **held})
    return cases


def _bad_job_fields() -> Iterator[tuple[str, bytes, bytes, bytes]]:
    key, other = Ed25519SigningKey(octets("job", "ed25519")), Ed25519SigningKey(octets("another job"))
    message = octets("message", 0)
    yield "signed by another key", key.public_key, message, other.sign(message)
    yield "signed over another message", key.public_key, message, key.sign(octets("message", 1))
    yield (
        "the public key before the signature, in scheme 1",
        key.public_key,
        message,
        key.public_key + key.sign(message),
    )
    for length in (0, 63, 65, 72, 104 + 32 * 16, 5_260, 5_262, 5_269):
        yield f"a field of {length} bytes", key.public_key, message, bytes(length)
    named, signed, field = _post_quantum()
    yield "another key than the id names, in scheme 2", octets("id"), signed, field
    yield "over another message, in scheme 2", named, message, field
    yield "a wrong signature, in scheme 2", named, signed, field[:-1] + bytes([field[-1] ^ 1])
    yield "a signature of scheme 1 for an id of scheme 2", named, message, key.sign(message)


def _post_quantum() -> tuple[bytes, bytes, bytes]:
    """Id, message and field of a key of scheme 2: a signature that ``certificates`` has, made anew it would differ."""
    signing = Signing(ML_DSA_65_LIST)
    voter, signed = signing.voters[0], signing.message()
    signer = signing.secrets[voter.name].identity
    return job_key_id(signer), signed, voter.identity_key + signing.shares(signed)[0]
