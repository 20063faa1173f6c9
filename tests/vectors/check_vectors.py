"""Checks the golden vectors without a line of the implementation: hashlib, struct, json and libraries for signatures.

    python tests/vectors/check_vectors.py [FOLDER]

Written from the specification, so that a mistake made twice the same way is made by two people. A vector
that does not hold raises, and so does one that must be refused and is not, or for another reason; the number of
checked cases is printed.
"""

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

from blspy import G1Element, G2Element, PopSchemeMPL
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey
from nacl.bindings import crypto_box_open_easy, crypto_scalarmult
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.signing import VerifyKey

ROUNDS = 6
VOTING_ROLES = ("data-source", "governance", "operator")
FIELD = 0x1A0111EA397FE69A4B1BA7B6434BACD764774B84F38512BF6730D2A0F6B0F6241EABFFFEB153FFFFB9FEFFFFFFFFAAAB
ORDER = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
"""Of BLS12-381: the field's size, and the order of the groups of keys and signatures."""

EDWARDS_FIELD = 2**255 - 19
EDWARDS_ORDER = 2**252 + 27742317777372353535851937790883648493
EDWARDS_D = -121665 * pow(121666, -1, EDWARDS_FIELD) % EDWARDS_FIELD
EDWARDS_BASE = "58" + "66" * 31
"""Of edwards25519 (RFC 8032 section 5.1): the field, the order of the group of keys, d, and the generator."""

Judge = Callable[[dict], None]


def check(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise SystemExit(f"{what}: found {found!r}, the vector says {expected!r}")


def framed(tag: str, *parts: bytes) -> bytes:
    return b"".join(struct.pack(">Q", len(part)) + part for part in (tag.encode(), *parts))


def tagged(tag: str, *parts: bytes) -> bytes:
    return hashlib.sha256(framed(tag, *parts)).digest()


def message(tag: str, *parts: bytes) -> bytes:
    return tag.encode() + b"\x00" + tagged(tag, *parts)


def name(purpose: str) -> str:
    return f"countersign/v1/{purpose}"


# MessagePack: what the wire types use, read strictly (shortest forms only) and written back.


def unpack(encoded: bytes) -> object:
    value, end = read(encoded, 0)
    check(end, len(encoded), "end of encoding")
    check(pack(value), encoded, "canonical encoding")
    return value


def read(encoded: bytes, at: int) -> tuple[object, int]:
    first = encoded[at]
    if first < 0x80:
        return first, at + 1
    if 0x90 <= first <= 0x9F:
        return read_array(encoded, at + 1, first & 0x0F)
    if 0xA0 <= first <= 0xBF:
        end = at + 1 + (first & 0x1F)
        return encoded[at + 1 : end].decode(), end
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at + 1
    integers = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
    if first in integers:
        size = struct.calcsize(integers[first])
        return struct.unpack_from(integers[first], encoded, at + 1)[0], at + 1 + size
    lengths = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I"}
    length = struct.unpack_from(lengths[first], encoded, at + 1)[0]
    start = at + 1 + struct.calcsize(lengths[first])
    if first >= 0xDC:
        return read_array(encoded, start, length)
    octets = encoded[start : start + length]
    return (octets.decode() if first >= 0xD9 else octets), start + length


def read_array(encoded: bytes, at: int, length: int) -> tuple[list[object], int]:
    items = []
    for _ in range(length):
        item, at = read(encoded, at)
        items.append(item)
    return items, at


def pack(value: object) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        for limit, head, form in ((2**8, 0xCC, ">B"), (2**16, 0xCD, ">H"), (2**32, 0xCE, ">I"), (2**64, 0xCF, ">Q")):
            if value < 0x80:
                return bytes([value])
            if value < limit:
                return bytes([head]) + struct.pack(form, value)
    if isinstance(value, bytes):
        return sized(len(value), None, 0xC4) + value
    if isinstance(value, str):
        octets = value.encode()
        return sized(len(octets), (0xA0, 32), 0xD9) + octets
    assert isinstance(value, list)
    head = bytes([0x90 | len(value)]) if len(value) < 16 else b"\xdc" + struct.pack(">H", len(value))
    return head + b"".join(pack(item) for item in value)


def sized(length: int, short: tuple[int, int] | None, head: int) -> bytes:
    if short is not None and length < short[1]:
        return bytes([short[0] | length])
    for step, (limit, form) in enumerate(((2**8, ">B"), (2**16, ">H"), (2**32, ">I"))):
        if length < limit:
            return bytes([head + step]) + struct.pack(form, length)
    raise SystemExit("too long")


# RFC 9162 §2.1.1, by its recursive definition.


def leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def tree(leaves: list[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + tree(leaves[:split]) + tree(leaves[split:])).digest()


def path(leaves: list[bytes], index: int) -> list[bytes]:
    if len(leaves) == 1:
        return []
    split = 1
    while 2 * split < len(leaves):
        split *= 2
    if index < split:
        return [*path(leaves[:split], index), tree(leaves[split:])]
    return [*path(leaves[split:], index - split), tree(leaves[:split])]


# What must be refused, and why.


class Refused(Exception):
    """An input breaks a rule; the argument is the rule's name."""


def refuse_if(broken: bool, reason: str) -> None:
    if broken:
        raise Refused(reason)


def expect(judge: Judge, case: dict) -> None:
    """What carries a reason is refused for it; all else is accepted."""
    found = ""
    try:
        judge(case)
    except Refused as refused:
        found = refused.args[0]
    check(found, case.get("reason", ""), case["what"])


def decoded(encoded: bytes) -> object:
    """``unpack`` for bytes that may be anything."""
    try:
        value, end = read(encoded, 0)
    except (IndexError, KeyError, UnicodeDecodeError, struct.error):
        raise Refused("malformed") from None
    refuse_if(end != len(encoded), "malformed")
    refuse_if(pack(value) != encoded, "non-canonical")
    return value


def octets(least: int, most: int | None = None) -> Callable[[object], bool]:
    return lambda value: isinstance(value, bytes) and least <= len(value) <= (least if most is None else most)


def text(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and least <= len(value) <= most


def natural(least: int = 0, most: int = 2**53 - 1) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


def fields(value: object, tag: str, *fits: Callable[[object], bool]) -> list:
    """The fields behind the tag, of the right number and kinds."""
    refuse_if(not isinstance(value, list) or len(value) != 1 + len(fits) or value[0] != tag, "malformed")
    assert isinstance(value, list)
    refuse_if(not all(fit(field) for fit, field in zip(fits, value[1:], strict=True)), "malformed")
    return value[1:]


# BLS12-381. Points come from a library; what is done with them is told by section 6.


def point_of(kind: type, encoded: bytes, size: int, reason: str) -> object:
    refuse_if(len(encoded) != size, reason)
    try:
        point = kind.from_bytes(encoded)
    except ValueError:
        raise Refused(reason) from None
    refuse_if(point == kind(), reason)
    return point


def key_of(encoded: bytes) -> G1Element:
    return point_of(G1Element, encoded, 48, "bad-key")


def verify_bls(key: G1Element, signed: bytes, signature: bytes, reason: str) -> None:
    point = point_of(G2Element, signature, 96, reason)
    refuse_if(not PopSchemeMPL.verify(key, signed, point), reason)


def times(scalar: int, point: G1Element | G2Element) -> G1Element | G2Element:
    total = type(point)()
    for digit in f"{scalar % ORDER:b}":
        total = total + total
        if digit == "1":
            total = total + point
    return total


def total_of(points: list) -> G1Element | G2Element:
    total = type(points[0])()
    for point in points:
        total = total + point
    return total


def interpolated(points: dict[int, G1Element | G2Element], at: int = 0) -> G1Element | G2Element:
    """Lagrange in the exponent: the value at ``at`` of the polynomial through ``points`` by index."""
    terms = []
    for index, point in points.items():
        over, under = 1, 1
        for other in points:
            if other != index:
                over, under = over * (at - other) % ORDER, under * (index - other) % ORDER
        terms.append(times(over * pow(under, -1, ORDER), point))
    return total_of(terms)


def is_square(real: int, imaginary: int = 0) -> bool:
    """In the field, or in its extension by a root of -1, where the norm decides."""
    norm = real * real + imaginary * imaginary if imaginary else real
    return pow(norm, (FIELD - 1) // 2, FIELD) == 1


def on_curve(encoded: bytes) -> bool:
    """Whether a compressed x has a y, in whatever subgroup: x³ + 4 in G1's field, x³ + 4(1 + u) in G2's."""
    high = int.from_bytes(bytes([encoded[0] & 0x1F]) + encoded[1:48], "big")
    if len(encoded) == 48:
        return is_square(high**3 + 4)
    low = int.from_bytes(encoded[48:], "big")
    return is_square(low**3 - 3 * low * high**2 + 4, (3 * low**2 * high - high**3 + 4) % FIELD)


# Ed25519 as section 4 tells it. A library's word on the cases where libraries differ would be worth nothing.

Extended = tuple[int, int, int, int]
IDENTITY: Extended = (0, 1, 1, 0)


def edwards_sum(one: Extended, other: Extended) -> Extended:
    """RFC 8032 section 5.1.4."""
    low, high = (one[1] - one[0]) * (other[1] - other[0]), (one[1] + one[0]) * (other[1] + other[0])
    cross, depth = 2 * one[3] * other[3] * EDWARDS_D, 2 * one[2] * other[2]
    e, f, g, h = high - low, depth - cross, depth + cross, high + low
    return e * f % EDWARDS_FIELD, g * h % EDWARDS_FIELD, f * g % EDWARDS_FIELD, e * h % EDWARDS_FIELD


def edwards_times(scalar: int, point: Extended) -> Extended:
    total = IDENTITY
    for digit in f"{scalar:b}":
        total = edwards_sum(total, total)
        if digit == "1":
            total = edwards_sum(total, point)
    return total


def edwards_same(one: Extended, other: Extended) -> bool:
    return all((one[axis] * other[2] - other[axis] * one[2]) % EDWARDS_FIELD == 0 for axis in (0, 1))


def edwards_point(encoded: bytes, reason: str) -> Extended:
    """RFC 8032 section 5.1.3: one encoding for each point, and of these points only those of prime order."""
    number = int.from_bytes(encoded, "little")
    y, sign = number % 2**255, number >> 255
    refuse_if(y >= EDWARDS_FIELD, reason)
    over, under = (y * y - 1) % EDWARDS_FIELD, (EDWARDS_D * y * y + 1) % EDWARDS_FIELD
    square = over * pow(under, -1, EDWARDS_FIELD) % EDWARDS_FIELD
    x = pow(square, (EDWARDS_FIELD + 3) // 8, EDWARDS_FIELD)
    if x * x % EDWARDS_FIELD != square:
        x = x * pow(2, (EDWARDS_FIELD - 1) // 4, EDWARDS_FIELD) % EDWARDS_FIELD
    refuse_if(x * x % EDWARDS_FIELD != square or (x == 0 and sign == 1), reason)
    if x % 2 != sign:
        x = EDWARDS_FIELD - x
    point = (x, y, 1, x * y % EDWARDS_FIELD)
    refuse_if(edwards_same(point, IDENTITY), reason)
    refuse_if(not edwards_same(edwards_times(EDWARDS_ORDER, point), IDENTITY), reason)
    return point


def verify_ed25519(key: bytes, signed: bytes, signature: bytes) -> None:
    refuse_if(len(signature) != 64, "bad-signature")
    s = int.from_bytes(signature[32:], "little")
    refuse_if(s >= EDWARDS_ORDER, "bad-signature")
    public, r = edwards_point(key, "bad-signature"), edwards_point(signature[:32], "bad-signature")
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + key + signed).digest(), "little") % EDWARDS_ORDER
    left = edwards_times(s, edwards_point(bytes.fromhex(EDWARDS_BASE), "bad-signature"))
    refuse_if(not edwards_same(left, edwards_sum(r, edwards_times(challenge, public))), "bad-signature")


# The files.


def check_ed25519(case: dict) -> None:
    def judge(trial: dict) -> None:
        key = bytes.fromhex(trial["key"])
        if "signature" in trial:
            verify_ed25519(key, bytes.fromhex(trial["message"]), bytes.fromhex(trial["signature"]))
            return
        refuse_if(len(key) != 32, "bad-key")
        edwards_point(key, "bad-key")

    expect(judge, case)


def check_hash(case: dict) -> None:
    parts = [bytes.fromhex(part) for part in case["parts"]]
    check(tagged(case["tag"], *parts).hex(), case["hash"], "tagged hash")
    check(message(case["tag"], *parts).hex(), case["message"], "tagged message")


def check_portions(case: dict) -> None:
    data, governance, operation = unpack(bytes.fromhex(case["portions"]))
    salt, items = data
    leaves = []
    for number, (content, examples) in enumerate(items):
        place = struct.pack(">Q", number)
        item_salt = tagged(name("salt"), salt, b"item", place)
        check(item_salt.hex(), case["item_salts"][number], "item salt")
        leaves.append(tagged(name("source-entry"), item_salt, content))
        key = tagged(name("salt"), salt, b"examples", place)
        drawn = hashlib.shake_256(framed(name("salt"), key)).digest(32 * len(examples))
        committed = b""
        for position, example in enumerate(examples):
            example_salt = drawn[32 * position : 32 * position + 32]
            check(example_salt.hex(), case["example_salts"][number][position], "example salt")
            committed += tagged(name("example"), example_salt, struct.pack(">Q", example))
        pages = [committed[first : first + 16 * 32] for first in range(0, len(committed), 16 * 32)]
        root = tree([hashlib.sha256(b"\x00" + page).digest() for page in pages])
        check(root.hex(), case["examples_roots"][number], "examples root")
        use = unpack(content)
        check(use[5], root, "root in the item")
        check(use[2], use[3] + sum(count for _, count in use[4]), "presented")
        check(use[3], len(examples), "admitted")
    kind = case["kind"].encode()
    committed = tagged(name("portion"), kind, b"data-source", tree(leaves), struct.pack(">Q", len(items)))
    check(committed.hex(), case["data"], "data commitment")
    for role, held in (("governance", governance), ("operator", operation)):
        field = "operation" if role == "operator" else role
        check(tagged(name("portion"), kind, role.encode(), *held).hex(), case[field], f"{field} commitment")


PORTIONS = {"policy": "g", "source": "d", "step": "dgo", "custody": "g"}
"""Whether an event of the kind has a data, a governance and an operation portion."""


def check_event(case: dict) -> None:
    encoded = bytes.fromhex(case["entry"])
    entry = unpack(encoded)
    unsigned = pack([*entry[:-1], []])
    check(unsigned.hex(), case["unsigned"], "unsigned entry")
    identifier = tagged(name("event"), unsigned)
    check(identifier.hex(), case["id"], "event id")
    check(leaf(encoded).hex(), case["leaf_hash"], "leaf hash")
    _, version, chain_id, kind = entry[:4]
    signed = message(
        name("event-signature"), chain_id, kind.encode(), struct.pack(">I", version), case["role"].encode(), identifier
    )
    check(signed.hex(), case["message"], "signed message")
    ((signer, signature),) = entry[-1]
    key = bytes.fromhex(case["public_key"])
    check(signer, key if case["role"] == "job" else tagged(name("member"), b"\x01", key), "signer")
    check(entry[4] == signer, case["role"] != "job", "author")
    check([part != b"" for part in entry[8:11]], [part in PORTIONS[kind] for part in "dgo"], "portions of the kind")
    check(signature.hex(), case["signature"], "signature")
    VerifyKey(key).verify(signed, signature)


def verify_field(scheme: int, key: bytes, signed: bytes, field: bytes) -> None:
    """A signature field: plain, or the signature over a batch's root and the message's way up to it."""
    length = {1: 64, 2: 3_309}[scheme]
    if len(field) <= length:
        verify_identity(scheme, key, signed, field, "bad-signature")
        return
    way = field[length:]
    refuse_if(not 40 <= len(way) <= 8 + 32 * 16 or len(way) % 32 != 8, "bad-signature")
    index, size = struct.unpack_from(">II", way)
    refuse_if(not 2 <= size <= 65_536 or index >= size, "bad-signature")
    hashes = [way[at : at + 32] for at in range(8, len(way), 32)]
    try:
        root = included_root(leaf(signed), index, size, hashes)
    except Refused:
        raise Refused("bad-signature") from None
    over = message(name("event-batch"), struct.pack(">I", size), root)
    verify_identity(scheme, key, over, field[:length], "bad-signature")


def check_job_key(case: dict) -> None:
    """The id of a key, or the field that a key of this id has signed with."""

    def judge(trial: dict) -> None:
        if "public_key" in trial:
            key = bytes.fromhex(trial["public_key"])
            check(job_key_id(trial["scheme"], key).hex(), trial["id"], "id of a job key")
            return
        identifier, field = bytes.fromhex(trial["id"]), bytes.fromhex(trial["field"])
        scheme = next((scheme for scheme, lengths in JOB_FIELDS.items() if len(field) in lengths), 0)
        refuse_if(scheme == 0, "bad-signature")
        key, rest = (identifier, field) if scheme == 1 else (field[:1_952], field[1_952:])
        refuse_if(job_key_id(scheme, key) != identifier, "bad-signature")
        verify_field(scheme, key, bytes.fromhex(trial["message"]), rest)

    expect(judge, case)


JOB_FIELDS = {
    1: {64, *(72 + 32 * hashes for hashes in range(1, 17))},
    2: {5_261, *(5_269 + 32 * hashes for hashes in range(1, 17))},
}


def job_key_id(scheme: int, key: bytes) -> bytes:
    return key if scheme == 1 else tagged(name("job-key"), bytes([scheme]), key)


def check_batch(case: dict) -> None:
    messages = [bytes.fromhex(held) for held in case["messages"]]
    key = bytes.fromhex(case["public_key"])

    def judge(trial: dict) -> None:
        for index, encoded in enumerate(trial["fields"]):
            field = bytes.fromhex(encoded)
            verify_field(1, key, messages[index], field)
            if len(messages) > 1:
                ups = b"".join(path([leaf(held) for held in messages], index))
                way = struct.pack(">II", index, len(messages)) + ups
                check(field[64:].hex(), way.hex(), f"way up from message {index}")

    expect(judge, case)


def check_block(case: dict) -> None:
    encoded = bytes.fromhex(case["header"])
    header = unpack(encoded)
    check(header[0], "block", "header's tag")
    check(tagged(name("block"), encoded).hex(), case["digest"], "header digest")
    leaves = [bytes.fromhex(held) for held in case["leaf_hashes"]]
    check(tagged(name("block-body"), *leaves), header[10], "body root")
    check(len(leaves), header[11], "event count")
    for vote in case["votes"]:
        unsigned = bytes.fromhex(vote["unsigned"])
        fields = unpack(unsigned)
        check(fields[-1], b"", "signature in the signed bytes")
        check(fields[6] in (bytes(32), bytes.fromhex(case["digest"])), True, "block voted for")
        signed = message(name("vote"), unsigned)
        check(signed.hex(), vote["message"], "vote message")
        VerifyKey(bytes.fromhex(vote["public_key"])).verify(signed, bytes.fromhex(vote["signature"]))


def check_tree(case: dict) -> None:
    check(tree([leaf(bytes.fromhex(entry)) for entry in case["entries"]]).hex(), case["root"], "log root")


def split_of(size: int) -> int:
    """The largest power of two below the size (RFC 9162 §2.1.1)."""
    return 1 << (size - 1).bit_length() - 1


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def included_root(leaf_hash: bytes, index: int, size: int, proof: list[bytes]) -> bytes:
    """The root that an inclusion proof leads to: PATH of §2.1.3.1, backwards."""
    refuse_if(not 0 <= index < size or any(len(held) != 32 for held in proof), "bad-proof")
    refuse_if((size == 1) != (not proof), "bad-proof")
    if size == 1:
        return leaf_hash
    split = split_of(size)
    if index < split:
        return node(included_root(leaf_hash, index, split, proof[:-1]), proof[-1])
    return node(proof[-1], included_root(leaf_hash, index - split, size - split, proof[:-1]))


def roots_by(first: int, second: int, proof: list[bytes], older: bytes | None) -> tuple[bytes, bytes]:
    """Both roots that a consistency proof leads to: SUBPROOF of §2.1.4.1, backwards; ``older`` where it is left out."""
    if first == second:
        refuse_if(len(proof) != (older is None), "bad-proof")
        known = proof[0] if older is None else older
        return known, known
    refuse_if(not proof, "bad-proof")
    split = split_of(second)
    if first <= split:
        old, new = roots_by(first, split, proof[:-1], older)
        return old, node(new, proof[-1])
    old, new = roots_by(first - split, second - split, proof[:-1], None)
    return node(proof[-1], old), node(proof[-1], new)


def verify_consistency(first: int, second: int, proof: list[bytes], older: bytes, newer: bytes) -> None:
    refuse_if(not 0 <= first <= second or any(len(held) != 32 for held in proof), "bad-proof")
    refuse_if((first == 0 and older != tree([])) or (second == 0 and newer != tree([])), "bad-proof")
    if first == 0:
        refuse_if(bool(proof), "bad-proof")
        return
    refuse_if(roots_by(first, second, proof, older) != (older, newer), "bad-proof")


def check_log_proof(case: dict) -> None:
    """Of an entry in the tree, or of a tree that continues another; what holds is the proof RFC 9162 makes."""
    leaves = [leaf(f"entry {number}".encode()) for number in range(100)]
    proof = [bytes.fromhex(held) for held in case["proof"]]

    def judge_inclusion(trial: dict) -> None:
        held, index, size = bytes.fromhex(trial["leaf_hash"]), trial["index"], trial["size"]
        refuse_if(included_root(held, index, size, proof).hex() != trial["root"], "bad-proof")
        check((held, proof), (leaves[index], path(leaves[:size], index)), "inclusion proof")
        check(tree(leaves[:size]).hex(), trial["root"], "root of an inclusion proof")

    def judge_consistency(trial: dict) -> None:
        first, second = trial["first_size"], trial["second_size"]
        roots = [bytes.fromhex(trial[field]) for field in ("first_root", "second_root")]
        verify_consistency(first, second, proof, *roots)
        check(roots, [tree(leaves[:first]), tree(leaves[:second])], "roots of a consistency proof")

    expect(judge_inclusion if "index" in case else judge_consistency, case)


def bit_of(key: bytes, bit: int) -> int:
    return key[bit // 8] >> (7 - bit % 8) & 1


def state_root(entries: list[tuple[bytes, bytes]]) -> bytes:
    """The crit-bit tree's root, by its definition: split at the first bit at which the keys differ."""
    if not entries:
        return tagged(name("state-empty"))
    if len(entries) == 1:
        return tagged(name("state-leaf"), *entries[0])
    bit = next(bit for bit in range(8 * 33) if len({bit_of(key, bit) for key, _ in entries}) == 2)
    sides = [[entry for entry in entries if bit_of(entry[0], bit) == side] for side in (0, 1)]
    return tagged(name("state-node"), struct.pack(">H", bit), state_root(sides[0]), state_root(sides[1]))


def folded(node: bytes, asked: bytes, path: list) -> bytes:
    """The root that a path from the root down leads to, on the side that the asked key takes."""
    bits = [bit for bit, _ in path]
    refuse_if(bits != sorted(set(bits)), "bad-proof")
    for bit, sibling in reversed(path):
        other = bytes.fromhex(sibling)
        pair = (other, node) if bit_of(asked, bit) else (node, other)
        node = tagged(name("state-node"), struct.pack(">H", bit), *pair)
    return node


def proved_key(root: str, key: bytes, leaf_key: bytes, leaf_value: bytes, path: list) -> bytes | None:
    """The value of a key, or None where it is proved absent."""
    if not leaf_key:
        refuse_if(bool(leaf_value or path) or root != tagged(name("state-empty")).hex(), "bad-proof")
        return None
    refuse_if(any(bit_of(key, bit) != bit_of(leaf_key, bit) for bit, _ in path), "bad-proof")
    refuse_if(folded(tagged(name("state-leaf"), leaf_key, leaf_value), key, path).hex() != root, "bad-proof")
    return leaf_value if leaf_key == key else None


def proved_prefix(root: str, prefix: bytes, found: list[tuple[bytes, bytes]], path: list) -> list[tuple[bytes, bytes]]:
    """All entries under a prefix; none where the one foreign leaf proves it."""
    if len(found) == 0 or (len(found) == 1 and not found[0][0].startswith(prefix)):
        padded = prefix + bytes(33 - len(prefix))
        refuse_if(proved_key(root, padded, *(found[0] if found else (b"", b"")), path) is not None, "bad-proof")
        return []
    keys = [key for key, _ in found]
    refuse_if(keys != sorted(set(keys)) or not all(key.startswith(prefix) for key in keys), "bad-proof")
    refuse_if(any(bit >= 8 * len(prefix) for bit, _ in path), "bad-proof")
    refuse_if(folded(state_root(found), prefix, path).hex() != root, "bad-proof")
    return found


def pairs(entries: list) -> list[tuple[bytes, bytes]]:
    return [(bytes.fromhex(key), bytes.fromhex(value)) for key, value in entries]


def check_state(case: dict) -> None:
    entries, root = pairs(case["entries"]), case["root"]
    check(state_root(entries).hex(), root, "state root")

    def judge(trial: dict) -> None:
        if "prefix" in trial:
            prefix = bytes.fromhex(trial["prefix"])
            found = proved_prefix(root, prefix, pairs(trial["found"]), trial["path"])
            check(found, [entry for entry in entries if entry[0].startswith(prefix)], "entries under a prefix")
            return
        key, leaf_key, leaf_value = (bytes.fromhex(trial[field]) for field in ("key", "leaf_key", "leaf_value"))
        value = proved_key(root, key, leaf_key, leaf_value, trial["path"])
        check(value, dict(entries).get(key), "value of a key")
        check(trial["present"], value is not None, "presence")

    for trial in (*case["proofs"], *case["prefixes"], *case["refused"]):
        expect(judge, {"what": "state proof", **trial})


def presented_indexes(seed: bytes, size: int, batch: int, step: int) -> list[int]:
    epoch, number = divmod(step - 1, size // batch)
    key = tagged(name("sampler"), seed, struct.pack(">Q", epoch))
    bits = 1
    while 4**bits < size:
        bits += 1
    indexes = []
    for at in range(number * batch, (number + 1) * batch):
        value = at
        while True:
            left, right = divmod(value, 2**bits)
            for turn in range(ROUNDS):
                digest = hashlib.sha256(key + bytes([turn]) + struct.pack(">Q", right)).digest()
                left, right = right, left ^ struct.unpack(">Q", digest[:8])[0] % 2**bits
            value = left * 2**bits + right
            if value < size:
                break
        indexes.append(value)
    return indexes


def examples_at(manifest: list, indexes: list[int]) -> list[list]:
    """Source and example of each index into a manifest of (source, first, count)."""
    examples = []
    for index in indexes:
        left = index
        for source, start, count in manifest:
            if left < count:
                examples.append([source, start + left])
                break
            left -= count
    return examples


def check_sample(case: dict) -> None:
    size = sum(count for _, _, count in case["manifest"])
    indexes = presented_indexes(bytes.fromhex(case["seed"]), size, case["batch_size"], case["step"])
    check(indexes, case["indexes"], "indexes presented")
    examples = examples_at(case["manifest"], indexes)
    check(examples, case["examples"], "examples presented")


def check_reserve(case: dict) -> None:
    root = bytes.fromhex(case["content_root"])
    lots = [
        struct.unpack(">Q", tagged(name("reserve"), root, struct.pack(">Q", example))[:8])[0] // 2**11
        for example in range(len(case["lots"]))
    ]
    check(lots, case["lots"], "lots")
    check([example for example, drawn in enumerate(lots) if drawn < case["reserve_below"]], case["reserve"], "reserve")


def check_window(case: dict) -> None:
    leaves = [bytes.fromhex(part) for part in (case["terms"], *case["entries"])]
    check(tree([tagged(name("accumulator"), part) for part in leaves]).hex(), case["root"], "root of a window")
    kind, version, terms, entries = unpack(bytes.fromhex(case["window"]))
    check((kind, version), ("accumulator-window", 1), "kind and version of a window")
    check([pack(part) for part in (terms, *entries)], leaves, "terms and entries of a window")


def check_epoch(case: dict) -> None:
    """From the genesis to the next epoch's members, as a verifier goes who has nothing else."""
    genesis = unpack(bytes.fromhex(case["genesis"]))
    chain_id = tagged(name("genesis"), bytes.fromhex(case["genesis"]))
    kind, membership, header, certificate, (_, record, _) = unpack(bytes.fromhex(case["link"]))
    check(kind, "epoch-link", "link's tag")
    block, entries = unpack(header), [(bytes.fromhex(key), bytes.fromhex(value)) for key, value in case["state"]]
    check((block[2], block[3]), (chain_id, 0), "chain and epoch of the header")
    check(state_root(entries), block[14], "state root of the header")
    check(record, dict(entries)[b"\x0a" + bytes(32)], "record of the next epoch")
    epoch, digest, event, _ = unpack(record)
    check(epoch, 1, "next epoch")
    check(tagged(name("membership"), chain_id, membership), digest, "digest of the next members")
    check(digest.hex(), case["membership_digest"], "digest of the next members")
    kind, scheme, view, certified, of_epoch, payload = unpack(certificate)
    check(certified, tagged(name("block"), header), "ledger block of the certificate")
    check((kind, scheme, view, of_epoch), ("certificate", "ed25519", block[5], 0), "certificate")
    signed = message(name("certificate"), chain_id, struct.pack(">Q", 0), struct.pack(">Q", view), certified)
    check(signed.hex(), case["certificate_message"], "certificate message")
    old, new = genesis[6], unpack(membership)[2]
    kind, signatures = unpack(payload)
    check((kind, [voter for voter, _ in signatures]), ("signature-list", [0, 1, 2]), "voters of the certificate")
    for voter, signature in signatures:
        VerifyKey(old[voter][3]).verify(signed, signature)
    entry = unpack(bytes.fromhex(case["event"]))
    check(tagged(name("event"), pack([*entry[:-1], []])), event, "event of the change")
    retired = tagged(name("member"), bytes([old[2][2]]), old[2][3])
    followed = unpack(dict(entries)[b"\x0b" + retired])
    check(followed, [0, tagged(name("member"), bytes([new[2][2]]), new[2][3])], "who follows the retired key")


def check_audit(case: dict) -> None:
    chain, campaign, beacon = (bytes.fromhex(case[field]) for field in ("chain_id", "campaign", "beacon"))
    epoch, number = struct.pack(">Q", case["epoch"]), struct.pack(">Q", case["number"])
    check(message(name("beacon"), chain, epoch, campaign, number).hex(), case["message"], "message of a beacon")
    count, chosen = case["last_step"] - case["first_step"] + 1, []
    for place in range(count - case["picks"], count):
        drawn = int.from_bytes(tagged(name("picked-steps"), beacon, struct.pack(">Q", place)), "big") % (place + 1)
        chosen.append(drawn if drawn not in chosen else place)
    check(sorted(case["first_step"] + step for step in chosen), case["picked"], "picked steps")


def verify_identity(scheme: int, key: bytes, signed: bytes, signature: bytes, reason: str) -> None:
    refuse_if(len(signature) != {1: 64, 2: 3_309}[scheme], reason)
    try:
        if scheme == 1:
            VerifyKey(key).verify(signed, signature)
        else:
            MLDSA65PublicKey.from_public_bytes(key).verify(signature, signed)
    except (BadSignatureError, InvalidSignature):
        raise Refused(reason) from None


def member_id(member: list) -> bytes:
    return tagged(name("member"), bytes([member[2]]), member[3])


def voters_of(genesis: list) -> list[list]:
    return [member for member in genesis[6] if member[1] in VOTING_ROLES]


def require_quorum(genesis: list, signers: list[list]) -> None:
    for role, needed in genesis[7]:
        refuse_if(sum(signer[1] == role for signer in signers) < needed, "quorum-not-reached")


def verify_threshold(genesis: list, signed: bytes, payload: bytes) -> None:
    verify_bls(total_of([key_of(group[2]) for group in genesis[8]]), signed, payload, "bad-certificate")


def verify_multisignature(genesis: list, signed: bytes, payload: bytes) -> None:
    bitmap, signature = fields(decoded(payload), "multisignature", octets(1, 32), octets(96))
    voters = voters_of(genesis)
    marked = [place for place in range(8 * len(bitmap)) if bitmap[place // 8] >> place % 8 & 1]
    refuse_if(len(bitmap) != (len(voters) + 7) // 8 or marked[-1:] >= [len(voters)], "bad-certificate")
    signers = [voters[place] for place in marked]
    require_quorum(genesis, signers)
    verify_bls(total_of([key_of(signer[6]) for signer in signers]), signed, signature, "bad-certificate")


def verify_list(genesis: list, signed: bytes, payload: bytes) -> None:
    (listed,) = fields(decoded(payload), "signature-list", lambda value: isinstance(value, list) and len(value) > 0)
    for entry in listed:
        fields(["", *entry], "", natural(0, 255), octets(64, 3_309))
    voters, places = voters_of(genesis), [place for place, _ in listed]
    refuse_if(places != sorted(set(places)) or places[-1] >= len(voters), "bad-certificate")
    require_quorum(genesis, [voters[place] for place in places])
    for place, signature in listed:
        verify_identity(voters[place][2], voters[place][3], signed, signature, "bad-certificate")


PAYLOADS = {
    "bls-threshold": verify_threshold,
    "bls-multisig": verify_multisignature,
    "ed25519": verify_list,
    "ml-dsa-65": verify_list,
}


def check_certificates(case: dict) -> None:
    """Certificates under one genesis, by the certificate scheme it chose."""
    genesis, chain_id = unpack(bytes.fromhex(case["genesis"])), tagged(name("genesis"), bytes.fromhex(case["genesis"]))
    check(chain_id.hex(), case["chain_id"], "chain id")

    def judge(trial: dict) -> None:
        text = lambda value: isinstance(value, str) and 1 <= len(value) <= 32  # noqa: E731
        shape = (text, natural(1), octets(32), natural(), octets(1, 848_928))
        scheme, view, block, epoch, payload = fields(
            decoded(bytes.fromhex(trial["certificate"])), "certificate", *shape
        )
        refuse_if(scheme != genesis[5], "bad-certificate")
        refuse_if(epoch != 0, "wrong-epoch")
        signed = message(name("certificate"), chain_id, struct.pack(">Q", epoch), struct.pack(">Q", view), block)
        check(signed.hex(), trial.get("message", signed.hex()), "certificate message")
        PAYLOADS[scheme](genesis, signed, payload)
        if "shares" in trial:
            check_shares(genesis, signed, [bytes.fromhex(share) for share in trial["shares"]], payload)

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)
        if "subgroup" in trial["what"]:
            check(on_curve(unpack(bytes.fromhex(trial["certificate"]))[-1][-96:]), True, "a point of the curve")


def check_shares(genesis: list, signed: bytes, shares: list[bytes], payload: bytes) -> None:
    """Every voter's share is its own, and any t of a role make the same role signature."""
    voters, parts = voters_of(genesis), []
    for role, needed, group_key, share_keys, _ in genesis[8]:
        held = {}
        for voter, share in zip(voters, shares, strict=True):
            if voter[1] == role:
                held[len(held) + 1] = point_of(G2Element, share, 96, "bad-share")
                verify_bls(key_of(share_keys[len(held) - 1]), signed, share, "bad-share")
        summed = needed == len(held)
        first = total_of([*held.values()]) if summed else interpolated(dict([*held.items()][:needed]))
        last = first if summed else interpolated(dict([*held.items()][-needed:]))
        check(bytes(first), bytes(last), "role signature by other members")
        verify_bls(key_of(group_key), signed, bytes(first), "bad-share")
        parts.append(first)
    check(bytes(total_of(parts)), payload, "sum of the role signatures")


def verify_possession(share_key: bytes, claimed_key: bytes, context: bytes, domain: str, proof: bytes) -> bytes:
    """One equation of pairings, and the message: e(share key, hashed) = e(generator, proof)."""
    share, _ = key_of(share_key), key_of(claimed_key)
    point = point_of(G2Element, proof, 96, "bad-proof-of-possession")
    signed = message(name("proof-of-possession"), claimed_key, context)
    hashed = G2Element.from_message(signed, domain.encode())
    refuse_if(share.pair(hashed) != G1Element.generator().pair(point), "bad-proof-of-possession")
    return signed


def check_group(needed: int, group_key: bytes, share_keys: list[bytes]) -> None:
    refuse_if(not 1 <= needed <= len(share_keys), "bad-membership")
    whole, shares = key_of(group_key), {index: key_of(key) for index, key in enumerate(share_keys, 1)}
    refuse_if(len(set(share_keys)) != len(share_keys), "bad-membership")
    if needed == len(share_keys):
        refuse_if(total_of([*shares.values()]) != whole, "bad-membership")
        return
    first = {index: shares[index] for index in range(1, needed + 1)}
    refuse_if(interpolated(first) != whole, "bad-membership")
    for index, share in shares.items():
        refuse_if(interpolated(first, index) != share, "bad-membership")


def group_context(nonce: bytes, epoch: int, role: str) -> bytes:
    return tagged(name("proof-of-possession"), b"group", nonce, struct.pack(">Q", epoch), role.encode())


def check_possession(case: dict) -> None:
    """Proofs of possession of a member's own key, of a group's key, and a member's part in the latter."""

    def judge(trial: dict) -> None:
        held = {key: bytes.fromhex(value) for key, value in trial.items() if key in byte_fields}
        if case["kind"] == "member":
            identity = tagged(name("member"), bytes([trial["scheme"]]), held["identity_key"])
            context = tagged(name("proof-of-possession"), b"member", held["nonce"], identity)
            share_key = claimed = held["key"]
        else:
            context = group_context(held["nonce"], trial["epoch"], trial["role"])
            claimed = held["group_key"]
            share_key = held.get("share_key", claimed)
        if case["kind"] == "group":
            check_group(trial["threshold"], claimed, [bytes.fromhex(key) for key in trial["share_keys"]])
        signed = verify_possession(share_key, claimed, context, case["domain"], held["proof"])
        check(context.hex(), trial.get("context", context.hex()), "context of a proof of possession")
        check(signed.hex(), trial.get("message", signed.hex()), "message of a proof of possession")
        if "parts" in trial:
            parts = {index: bytes.fromhex(part) for index, part in enumerate(trial["parts"], 1)}
            for index, key in enumerate(trial["share_keys"], 1):
                verify_possession(bytes.fromhex(key), claimed, context, case["domain"], parts[index])
            check(combined(trial["threshold"], parts).hex(), trial["proof"], "joint proof of possession")

    byte_fields = {"nonce", "identity_key", "key", "group_key", "share_key", "proof"}
    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)
        for field in byte_fields & set(trial):
            if f"{field} outside the subgroup" == trial["what"]:
                check(on_curve(bytes.fromhex(trial[field])), True, "a point of the curve")


def combined(needed: int, signatures: dict[int, bytes]) -> bytes:
    """The signature that a group's parts make: their sum, or the value at zero where fewer than all are needed."""
    points = {index: point_of(G2Element, signature, 96, "bad-share") for index, signature in signatures.items()}
    if needed == len(points):
        return bytes(total_of([*points.values()]))
    return bytes(interpolated({index: points[index] for index in sorted(points)[:needed]}))


VOTE = (
    natural(1, 1), octets(32), natural(), natural(1, 3), natural(1), octets(32), octets(32), octets(0, 3_309),
    octets(0, 8_192),
)  # fmt: skip
HEADER = (
    natural(1, 1), octets(32), natural(), natural(), natural(), octets(32), octets(32), natural(), natural(),
    octets(32), natural(0, 4_096), natural(), octets(32), octets(32),
)  # fmt: skip
NULLIFY, FINALIZE = 2, 3


def convict_by_votes(genesis: list, chain_id: bytes, first: object, second: object) -> list:
    """Whom two votes convict of what: member, offence, epoch, view."""
    one, other = (fields(vote, "vote", *VOTE) for vote in (first, second))
    _, chain, epoch, kind, view, block, voter, _, _ = one
    refuse_if((chain, epoch, view, voter) != (other[1], other[2], other[4], other[6]), "no-conflict")
    if kind == other[3]:
        refuse_if(block == other[5], "no-conflict")
        offence = {1: "two-notarize-votes", NULLIFY: "", FINALIZE: "two-finalize-votes"}[kind]
    else:
        refuse_if({kind, other[3]} != {NULLIFY, FINALIZE}, "no-conflict")
        offence = "nullify-and-finalize"
    for vote in (one, other):
        refuse_if(vote[2] != 0, "wrong-epoch")
        refuse_if(vote[1] != chain_id, "wrong-chain")
        refuse_if((vote[3] == NULLIFY) != (vote[5] == bytes(32)), "bad-vote")
        refuse_if(vote[7] != b"" and vote[3] != FINALIZE, "bad-vote")
        members = {member_id(member): member for member in genesis[6]}
        refuse_if(voter not in members, "unknown-member")
        refuse_if(members[voter][1] not in VOTING_ROLES, "wrong-role")
        signed = message(name("vote"), pack(["vote", *vote[:-1], b""]))
        verify_identity(members[voter][2], members[voter][3], signed, vote[8], "bad-signature")
    return [voter, offence, epoch, view]


def convict_by_proposals(genesis: list, chain_id: bytes, first: object, second: object) -> list:
    held = [fields(signed, "signed-header", octets(0, 1_024), octets(0, 8_192)) for signed in (first, second)]
    headers = [fields(decoded(header), "block", *HEADER) for header, _ in held]
    for header in headers:
        refuse_if(header[1] != chain_id, "wrong-chain")
    places = [(header[2], header[4], header[5]) for header in headers]
    refuse_if(places[0] != places[1] or headers[0] == headers[1], "no-conflict")
    for header, (encoded, signature) in zip(headers, held, strict=True):
        _, _, epoch, height, view, leader, _, parent_view = header[:8]
        refuse_if(epoch != 0, "wrong-epoch")
        refuse_if(height == 0 or view == 0 or parent_view >= view, "bad-block")
        voters = voters_of(genesis)
        leading = voters[(view - 1) % len(voters)]
        refuse_if(leader != member_id(leading), "wrong-author")
        signed = message(name("proposal"), tagged(name("block"), encoded))
        verify_identity(leading[2], leading[3], signed, signature, "bad-signature")
    return [places[0][2], "two-proposals", places[0][0], places[0][1]]


def check_evidence(case: dict) -> None:
    """Pairs of messages that one member signed: who is convicted of what, and who is not."""
    genesis, chain_id = unpack(bytes.fromhex(case["genesis"])), tagged(name("genesis"), bytes.fromhex(case["genesis"]))
    check(chain_id.hex(), case["chain_id"], "chain id")

    def judge(trial: dict) -> None:
        report = decoded(bytes.fromhex(trial["report"]))
        refuse_if(not isinstance(report, list) or len(report) != 1 or not isinstance(report[0], list), "malformed")
        kinds = {"vote-evidence": convict_by_votes, "proposal-evidence": convict_by_proposals}
        refuse_if(len(report[0]) != 3 or report[0][0] not in kinds, "malformed")
        found = kinds[report[0][0]](genesis, chain_id, *report[0][1:])
        convicted = [found[0].hex(), *found[1:]]
        check(convicted, trial.get("convicts", convicted), "whom evidence convicts of what")
        digest = tagged(name("evidence"), found[0], struct.pack(">Q", found[2]), found[1].encode()).hex()
        check(digest, trial.get("digest", digest), "what the state files a conviction under")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)


ROUNDS_OF_CEREMONY = ("join", "commit", "deal", "complain", "answer", "confirm")


def check_invitation(encoded: bytes, domain: str) -> list:
    """The terms of a ceremony; what it refreshes are the role keys of the epoch before, one of them dealt."""
    terms = decoded(encoded)
    _, _, _, nonce, _, scheme, invited, thresholds, _, epoch, refreshes = terms
    if refreshes is not None:
        _, before, members, quorums, groups = refreshes
        counts = {role: sum(held == role for _, held in invited) for role in VOTING_ROLES}
        refuse_if(scheme != "bls-threshold", "bad-membership")
        refuse_if((epoch, thresholds) != (before + 1, quorums), "bad-membership")
        refuse_if(invited != [member[:2] for member in members], "bad-membership")
        refuse_if(all(needed == counts[role] for role, needed in thresholds), "bad-membership")
        expected = [[role, needed, counts[role]] for role, needed in thresholds]
        refuse_if([[*group[:2], len(group[3])] for group in groups] != expected, "bad-membership")
        for role, needed, group_key, share_keys, possession in groups:
            own_keys = [member[6] for member in members if member[1] == role]
            check_group(needed, group_key, share_keys)
            refuse_if(needed == counts[role] and share_keys != own_keys, "bad-membership")
            verify_possession(group_key, group_key, group_context(nonce, before, role), domain, possession)
    return terms


class Ceremony:
    """A ceremony under ``bls-threshold``: what was said, checked, and what it makes."""

    def __init__(self, invitation: bytes, messages: list[bytes], domain: str) -> None:
        self.terms, self.domain = check_invitation(invitation, domain), domain
        self.digest = tagged(name("ceremony"), b"invitation", invitation)
        _, _, _, self.nonce, _, _, self.invited, self.thresholds, _, self.epoch, refreshes = self.terms
        self.kept = {} if refreshes is None else {member[0]: member for member in refreshes[2]}
        self.old_groups = {} if refreshes is None else {group[0]: group for group in refreshes[4]}
        self.bodies: dict[tuple[str, str], bytes] = {}
        self.answered: list[tuple[str, list]] = []
        self.said: dict[str, dict[str, list]] = {kind: {} for kind in ROUNDS_OF_CEREMONY}
        opened = []
        for encoded in messages:
            sender, body, signature = fields(
                decoded(encoded), "ceremony-message", text(1, 64), octets(1, 262_144), octets(64, 3_309)
            )
            value = decoded(body)
            opened.append((value[0].removeprefix("ceremony-"), sender, body, value, signature))
        for said in sorted(opened, key=lambda one: ROUNDS_OF_CEREMONY.index(one[0])):
            self.take(*said)
        names = [sender for sender, _ in self.invited]
        self.require("join", names)
        self.roster = self.digest_of("roster", self.digest, "join", names)
        self.groups = [self.group(*threshold) for threshold in self.thresholds]
        for kind in ROUNDS_OF_CEREMONY[1:]:
            refuse_if(any([sender, "verifier"] in self.invited for sender in self.said[kind]), "bad-field")

    def take(self, kind: str, sender: str, body: bytes, value: list, signature: bytes) -> None:
        roles = dict(self.invited)
        refuse_if(sender not in roles, "unknown-member")
        if kind == "join":
            _, invitation, member, box_key = value
            refuse_if(invitation != self.digest, "wrong-chain")
            refuse_if(member[:2] != [sender, roles[sender]], "bad-membership")
            refuse_if(self.kept.get(sender, member) != member, "bad-membership")
            if member[1] in VOTING_ROLES:
                context = tagged(name("proof-of-possession"), b"member", self.nonce, member_id(member))
                verify_possession(member[6], member[6], context, self.domain, member[7])
            try:
                crypto_scalarmult(bytes(32), box_key)
            except CryptoError:
                raise Refused("bad-key") from None
        else:
            refuse_if(sender not in self.said["join"], "ceremony-incomplete")
            member = self.said["join"][sender][2]
        verify_identity(member[2], member[3], message(name("ceremony"), body), signature, "bad-signature")
        if kind == "answer":
            self.answered.append((sender, value))
        else:
            refuse_if(self.bodies.setdefault((kind, sender), body) != body, "equivocation")
        self.said[kind][sender] = value

    def require(self, kind: str, names: list[str]) -> None:
        refuse_if(any(sender not in self.said[kind] for sender in names), "ceremony-incomplete")

    def digest_of(self, what: str, before: bytes, kind: str, names: list[str]) -> bytes:
        self.require(kind, names)
        return tagged(name("ceremony"), what.encode(), before, *(self.bodies[kind, sender] for sender in names))

    def over(self, kind: str, names: list[str], digest: bytes) -> list[list]:
        """What these members said in a round, which names what was said before."""
        found = [self.said[kind][sender] for sender in names if sender in self.said[kind]]
        refuse_if(any(value[1] != digest for value in found), "wrong-chain")
        return found

    def group(self, role: str, needed: int) -> dict:
        """A role's key and its proof of possession, with the digests on the way."""
        names = [sender for sender, held in self.invited if held == role]
        counted = (struct.pack(">I", needed), struct.pack(">I", len(names)))
        old = self.old_groups.get(role) if needed < len(names) else None
        made = {"role": role, "names": names, "old": old}
        bound = (self.nonce, struct.pack(">Q", self.epoch), role.encode(), *counted)
        made["id"] = tagged(name("dkg-ceremony"), *bound, *((old[2], *old[3]) if old else ()))
        if needed == len(names):
            for kind in ROUNDS_OF_CEREMONY[1:5]:
                refuse_if(any(sender in self.said[kind] for sender in names), "bad-field")
            keys = [key_of(self.said["join"][sender][2][6]) for sender in names]
            whole, last = total_of(keys), self.roster
        else:
            keys, whole, last = self.deal(made, role, needed, names)
        self.over("confirm", names, last)
        self.require("confirm", names)
        parts, context = {}, group_context(self.nonce, self.epoch, role)
        for index, sender in enumerate(names, 1):
            _, ceremony, dealer, group_key, part = self.said["confirm"][sender][2]
            refuse_if((ceremony, dealer, group_key) != (made["id"], index, bytes(whole)), "bad-dealing")
            try:
                verify_possession(bytes(keys[index - 1]), group_key, context, self.domain, part)
            except Refused:
                raise Refused("bad-dealing") from None
            parts[index] = part
        made |= {"key": bytes(whole), "share_keys": [bytes(key) for key in keys], "needed": needed}
        made["possession"] = combined(needed, parts)
        verify_possession(made["key"], made["key"], context, self.domain, made["possession"])
        return made

    def deal(self, made: dict, role: str, needed: int, names: list[str]) -> tuple[list, G1Element, bytes]:
        """Share keys and key of a role whose key is dealt, and the digest of its deals."""
        self.over("commit", names, self.roster)
        made["commitments"] = self.digest_of(f"commitments {role}", self.roster, "commit", names)
        self.over("deal", names, made["commitments"])
        made["deals"] = self.digest_of(f"deals {role}", made["commitments"], "deal", names)
        polynomials, lowest = [], 1 if made["old"] else 0
        for index, sender in enumerate(names, 1):
            (_, _, reveal, sealed), commitment = self.said["deal"][sender], self.said["commit"][sender][2]
            committed = tagged(name("dkg-commitment"), pack(reveal))
            refuse_if(commitment != ["dkg-commitment", made["id"], index, committed], "bad-dealing")
            _, ceremony, dealer, coefficients, point, response = reveal
            refuse_if((ceremony, dealer, len(coefficients)) != (made["id"], index, needed - lowest), "bad-dealing")
            challenge = tagged(
                name("dkg-proof-of-knowledge"), made["id"], struct.pack(">I", index), coefficients[0], point
            )
            polynomial = {power: key_of(coefficient) for power, coefficient in enumerate(coefficients, lowest)}
            left = times(int.from_bytes(response, "big"), G1Element.generator())
            right = key_of(point) + times(int.from_bytes(challenge, "big"), polynomial[lowest])
            refuse_if(left != right or int.from_bytes(response, "big") >= ORDER, "bad-dealing")
            refuse_if(len(sealed) != len(names), "bad-dealing")
            polynomials.append(polynomial)
        made["polynomials"] = polynomials
        made["answers"] = self.answers(made, names)
        summed = {power: total_of([held[power] for held in polynomials]) for power in range(lowest, needed)}
        keys = [value_at(summed, index) for index in range(1, len(names) + 1)]
        if made["old"] is None:
            return keys, summed[0], made["deals"]
        _, _, old_key, old_keys, _ = made["old"]
        return [key_of(old) + key for old, key in zip(old_keys, keys, strict=True)], key_of(old_key), made["deals"]

    def answers(self, made: dict, names: list[str]) -> dict[tuple[int, int], int]:
        """Values shown in the open, by dealer and recipient: all fit, whoever asked for them."""
        asked: list[tuple[int, int]] = []
        self.over("complain", names, made["deals"])
        for index, sender in enumerate(names, 1):
            dealers = self.said["complain"].get(sender, [0, 0, []])[2]
            refuse_if(dealers != sorted(set(dealers)) or dealers[-1:] > [len(names)], "bad-field")
            asked += [(dealer, index) for dealer in dealers if sender not in self.said["confirm"]]
        shown = {}
        for sender, (_, deals, shares) in self.answered:
            if sender not in names:
                continue
            refuse_if(deals != made["deals"], "wrong-chain")
            dealer = names.index(sender) + 1
            for _, ceremony, by, recipient, value in shares:
                scalar = int.from_bytes(value, "big")
                fits = times(scalar, G1Element.generator()) == value_at(made["polynomials"][dealer - 1], recipient)
                refuse_if((ceremony, by) != (made["id"], dealer) or not fits or scalar >= ORDER, "bad-dealing")
                shown[dealer, recipient] = scalar
        refuse_if(any(pair not in shown for pair in asked), "ceremony-incomplete")
        return shown

    def membership(self) -> list:
        members = [self.said["join"][sender][2] for sender, _ in self.invited]
        parts = ("role", "needed", "key", "share_keys", "possession")
        groups = [[made[part] for part in parts] for made in self.groups]
        return ["membership", self.epoch, members, self.thresholds, groups]

    def genesis(self) -> list:
        _, version, log, nonce, created, scheme, _, _, parameters, _, _ = self.terms
        return ["genesis", version, log, nonce, created, scheme, *self.membership()[2:], parameters]


def value_at(polynomial: dict[int, G1Element], index: int) -> G1Element:
    return total_of([times(index**power, coefficient) for power, coefficient in polynomial.items()])


def check_ceremony(case: dict) -> None:
    """A ceremony from its messages: every digest on the way, and the genesis or the members it ends in."""
    invitation = bytes.fromhex(case["invitation"])
    secrets = {sender: bytes.fromhex(secret) for sender, secret in case["box_secrets"].items()}
    honest = [bytes.fromhex(encoded) for encoded in case["accepted"][0]["messages"]]

    def judge(trial: dict) -> None:
        said = [bytes.fromhex(encoded) for encoded in trial["messages"]]
        held = Ceremony(invitation, honest[: trial.get("after", 0)] + said, case["domain"])
        if "reason" in trial:
            return
        check(held.digest.hex(), trial["invitation_digest"], "invitation digest")
        check(held.roster.hex(), trial["roster"], "roster")
        if held.kept:
            membership = pack(held.membership())
            check(membership.hex(), trial["membership"], "members of the next epoch")
            digest = tagged(name("membership"), bytes.fromhex(case["chain_id"]), membership)
            check(digest.hex(), trial["digest"], "digest of the members")
        else:
            genesis = pack(held.genesis())
            check(genesis.hex(), trial["genesis"], "genesis")
            check(tagged(name("genesis"), genesis).hex(), trial["chain_id"], "chain id")
        for made, told in zip(held.groups, trial["roles"], strict=True):
            found = {"role": made["role"], "key_ceremony_id": made["id"].hex()}
            if "deals" in made:
                found |= {"commitments": made["commitments"].hex(), "deals": made["deals"].hex()}
                found["nonces"], found["shares"] = open_boxes(held, made, secrets, case.get("old_shares"))
            found |= {"group_key": made["key"].hex(), "share_keys": [key.hex() for key in made["share_keys"]]}
            check({**found, "possession": made["possession"].hex()}, told, f"keys of {made['role']}")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)
    for trial in case.get("refused_invitations", ()):
        expect(lambda trial: check_invitation(bytes.fromhex(trial["invitation"]), case["domain"]), trial)


def open_boxes(
    held: Ceremony, made: dict, secrets: dict[str, bytes], old_shares: list[str] | None
) -> tuple[list[list[str]], list[str]]:
    """The nonces of the sealed values by dealer and recipient, and the share that the values of each recipient make."""
    nonces, shares = [], [int(old, 16) for old in old_shares or ["0"] * len(made["names"])]
    for dealer, sender in enumerate(made["names"], 1):
        row = []
        for recipient, receiver in enumerate(made["names"], 1):
            parts = (b"box", held.roster, sender.encode(), receiver.encode())
            nonce = tagged(name("ceremony"), *parts)[:24]
            row.append(nonce.hex())
            sealed, box_key = held.said["deal"][sender][3][recipient - 1], held.said["join"][sender][3]
            try:
                scalar = int.from_bytes(crypto_box_open_easy(sealed, nonce, box_key, secrets[receiver]), "big")
            except CryptoError:
                scalar = made["answers"][dealer, recipient]
            fits = times(scalar, G1Element.generator()) == value_at(made["polynomials"][dealer - 1], recipient)
            check(fits, True, "a dealt value")
            shares[recipient - 1] = (shares[recipient - 1] + scalar) % ORDER
        nonces.append(row)
    for share, key in zip(shares, made["share_keys"], strict=True):
        check(bytes(times(share, G1Element.generator())), key, "share key of a share")
    return nonces, [share.to_bytes(32, "big").hex() for share in shares]


CHECKS = {
    "ed25519": check_ed25519,
    "tagged_hash": check_hash,
    "portions": check_portions,
    "events": check_event,
    "job_keys": check_job_key,
    "batch_signatures": check_batch,
    "blocks": check_block,
    "log_tree": check_tree,
    "log_proofs": check_log_proof,
    "state_map": check_state,
    "sampler": check_sample,
    "reserve": check_reserve,
    "accumulators": check_window,
    "epochs": check_epoch,
    "audits": check_audit,
    "certificates": check_certificates,
    "possession": check_possession,
    "evidence": check_evidence,
    "ceremony": check_ceremony,
}


def check_all(checks: dict[str, Judge], folder: str | Path = Path(__file__).parent) -> None:
    """Every case of these files; prints how many there are, of which some have several answers to check."""
    total = 0
    for file, checker in checks.items():
        for case in json.loads(Path(folder, f"{file}.json").read_text(encoding="ascii")):
            checker(case)
            total += len(case.get("accepted", ())) + len(case.get("refused", ())) or 1
    print(f"{total} vectors hold")


if __name__ == "__main__":
    check_all(CHECKS, *sys.argv[1:])
