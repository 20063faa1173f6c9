"""The golden vectors of what members agree by: certificates and keys. Written by ``generate.py``.

Each file holds what must be refused, each with one fault and the name of the rule that it breaks, and what is
accepted. The latter stands last: a test turns the last digit of each file, and that must not go unseen.

ML-DSA-65 signatures differ each time they are made. So that the rest of the file can be compared byte by byte, those
of the committed file are taken again wherever they still verify.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import msgspec

from consensus import bls
from consensus.bls_certificates import Multisignature
from consensus.certificate import (
    Certificate,
    SigningSecret,
    certificate_message,
    decode_certificate,
    verify_certificate,
)
from consensus.certificate_schemes import scheme_for
from consensus.codec import decode, encode
from consensus.genesis import MemberPlan, generate_genesis
from consensus.identifiers import ChainId, Digest, Role, Tag, View, tagged_message
from consensus.keys import ML_DSA_65_SIGNATURE_BYTES, MlDsa65SigningKey, SignatureScheme, verify
from consensus.listed_certificates import ListedSignature, SignatureList
from consensus.membership import BLS_MULTISIG, BLS_THRESHOLD, ED25519_LIST, ML_DSA_65_LIST, Genesis, member_id
from consensus.participant import MemberSecrets
from consensus.rejection import Rejected
from consensus.threshold import (
    GroupKeys,
    check_group_keys,
    combine_shares,
    group_possession_context,
    lagrange_weights,
    member_possession_context,
)

Case = dict[str, object]
Refusals = Iterator[tuple[str, bytes]]

VIEW = View(7)
KEY_OUTSIDE_SUBGROUP = bytes.fromhex("8123456789abcdef" + "0123456789abcdef" * 5)
OUTSIDE_SUBGROUP = bytes.fromhex("8123456789abcdef" + "0123456789abcdef" * 11)
"""Points of the curves of G1 and G2: those of the Ethereum vectors."""
INFINITY = b"\xc0" + bytes(95)


def octets(*parts: object) -> bytes:
    """32 bytes that stand for something."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).digest()


def refusal(what: str, call: Callable[[], object], **case: object) -> Case:
    """A case that this implementation refuses, with its reason."""
    try:
        call()
    except Rejected as rejected:
        return {"what": what, **case, "reason": rejected.reason.value}
    raise AssertionError(f"{what}: accepted")


def founded(
    scheme: str, counts: Mapping[Role, int], thresholds: Mapping[Role, int]
) -> tuple[Genesis, dict[str, MemberSecrets]]:
    """A genesis in which a verifier stands between the voters, so that their positions are not those of members."""
    names = [f"{role.value}-{number}" for role, count in counts.items() for number in range(1, count + 1)]
    names.insert(1, "verifier-1")
    plans = [
        MemberPlan(
            name,
            Role(name.rpartition("-")[0]),
            octets("seed", scheme, name),
            SignatureScheme.ED25519 if name == "verifier-1" else None,
        )
        for name in names
    ]
    return generate_genesis(
        name="vectors.example/log",
        nonce=octets("nonce", scheme),
        created_ms=1_700_000_000_000,
        plans=plans,
        certificate_scheme=scheme,
        thresholds=thresholds,
    )


SMALL = ({Role.DATA_SOURCE: 3, Role.GOVERNANCE: 1, Role.OPERATOR: 1}, {Role.DATA_SOURCE: 2})
TWO_BYTES = ({Role.DATA_SOURCE: 7, Role.GOVERNANCE: 1, Role.OPERATOR: 1}, {Role.DATA_SOURCE: 4})
"""Nine voters: their bitmap has two bytes."""


class Signing:
    """A genesis and what its voters sign."""

    def __init__(self, scheme: str, committee: tuple[Mapping[Role, int], Mapping[Role, int]] = SMALL) -> None:
        self.genesis, self.secrets = founded(scheme, *committee)
        self.scheme = scheme_for(self.genesis)
        self.voters = self.scheme.committee.voters
        self.block = Digest(octets("ledger block"))

    def message(self, chain_id: bytes = b"") -> bytes:
        """What a certificate of the ledger block is over, on this chain or another."""
        return certificate_message(ChainId(chain_id or self.genesis.chain_id), 0, VIEW, self.block)

    def shares(self, message: bytes) -> list[bytes]:
        """Every voter's, in order."""
        made = []
        for voter in self.voters:
            secrets = self.secrets[voter.name]
            made.append(_share(secrets.key_share or secrets.identity, message))
        return made

    def certificate(self, places: tuple[int, ...], message: bytes = b"") -> Certificate:
        """By the voters of these positions, whether they are a quorum or not."""
        shares = self.shares(message or self.message())
        chosen = {place: shares[place] for place in places}
        match self.scheme.name:
            case name if name == BLS_THRESHOLD:
                payload = self.scheme.combine(
                    message or self.message(), {self.voters[place].id: share for place, share in chosen.items()}
                )
            case name if name == BLS_MULTISIG:
                marked = sum(1 << place for place in places)
                bitmap = marked.to_bytes(-(-len(self.voters) // 8), "little")
                payload = encode(Multisignature(bitmap, bls.aggregate_signatures([*chosen.values()])))
            case _:
                listed = tuple(ListedSignature(place, share) for place, share in chosen.items())
                payload = encode(SignatureList(listed))
        return Certificate(self.scheme.name, VIEW, self.block, 0, payload)

    def accepts(self, encoded: bytes) -> None:
        """Raises ``Rejected`` for bytes that are no certificate under this genesis."""
        verify_certificate(self.scheme, self.genesis.chain_id, decode_certificate(encoded))


def _share(secret: SigningSecret, message: bytes) -> bytes:
    if isinstance(secret, bls.Secret):
        return bls.sign(secret, message)
    if isinstance(secret, MlDsa65SigningKey):
        return _kept_signature(secret.public_key, message) or _signed_anew(secret, message)
    return secret.sign(message)


@cache
def _signed_anew(key: MlDsa65SigningKey, message: bytes) -> bytes:
    return key.sign(message)


@cache
def _kept_signature(key: bytes, message: bytes) -> bytes | None:
    for signature in _kept_signatures():
        try:
            verify(SignatureScheme.ML_DSA_65, key, message, signature)
        except Rejected:
            continue
        return signature
    return None


@cache
def _kept_signatures() -> tuple[bytes, ...]:
    committed = Path(__file__).parent / "certificates.json"
    found: dict[bytes, None] = {}
    for case in json.loads(committed.read_text()) if committed.exists() else ():
        for trial in (*case["accepted"], *case["refused"]) if case["scheme"] == ML_DSA_65_LIST else ():
            try:
                held = decode_certificate(bytes.fromhex(trial["certificate"])).signature
                listed = decode(held, SignatureList, 1 << 20).signatures
            except Rejected:
                continue
            found.update((entry.signature, None) for entry in listed)
    return tuple(signature for signature in found if len(signature) == ML_DSA_65_SIGNATURE_BYTES)


def certificates() -> list[Case]:
    """Certificates of every scheme, under a genesis each."""
    cases = []
    for scheme, committee in (
        (BLS_THRESHOLD, SMALL),
        (BLS_MULTISIG, SMALL),
        (BLS_MULTISIG, TWO_BYTES),
        (ED25519_LIST, SMALL),
        (ML_DSA_65_LIST, SMALL),
    ):
        signing = Signing(scheme, committee)
        last = len(signing.voters) - 1
        quorum = (*range(committee[1][Role.DATA_SOURCE]), last - 1, last)
        accepted = [_accepted(signing, "a quorum of every role", quorum)]
        if scheme == BLS_THRESHOLD:
            accepted[0]["shares"] = [share.hex() for share in signing.shares(signing.message())]
        elif scheme != ML_DSA_65_LIST:
            accepted.append(_accepted(signing, "another quorum", (*range(1, quorum[-3] + 2), last - 1, last)))
            accepted.append(_accepted(signing, "all voters", tuple(range(last + 1))))
        cases.append(
            {
                "scheme": scheme,
                "genesis": encode(signing.genesis).hex(),
                "chain_id": signing.genesis.chain_id.hex(),
                "refused": [
                    refusal(what, partial(signing.accepts, bad), certificate=bad.hex())
                    for what, bad in (*_altered(signing, quorum), *_PAYLOADS[scheme](signing, quorum))
                ],
                "accepted": accepted,
            }
        )
    return cases


def _accepted(signing: Signing, what: str, places: tuple[int, ...]) -> Case:
    certificate = encode(signing.certificate(places))
    signing.accepts(certificate)
    return {"what": what, "message": signing.message().hex(), "certificate": certificate.hex()}


def _altered(signing: Signing, quorum: tuple[int, ...]) -> Refusals:
    """What no scheme takes."""
    good = signing.certificate(quorum)
    encoded = encode(good)
    yield "of another view", encode(msgspec.structs.replace(good, view=VIEW + 1))
    yield "signed for another chain", encode(signing.certificate(quorum, signing.message(octets("another chain"))))
    yield "truncated", encoded[:-1]
    yield "a trailing byte", encoded + b"\x00"
    if signing.scheme.name == ML_DSA_65_LIST:
        return
    yield "of another ledger block", encode(msgspec.structs.replace(good, block=octets("another ledger block")))
    yield "of an epoch that has not begun", encode(msgspec.structs.replace(good, epoch=1))
    other = ED25519_LIST if signing.scheme.name == BLS_MULTISIG else BLS_MULTISIG
    yield "of another scheme by name", encode(msgspec.structs.replace(good, scheme=other))
    yield "of view 0", encode(msgspec.structs.replace(good, view=0))
    at = 1 + len(b"certificate") + 1 + len(good.scheme) + 1
    assert encoded[at] == VIEW
    yield "the view in two bytes", encoded[:at] + b"\xcc" + encoded[at:]


def _threshold_refusals(signing: Signing, quorum: tuple[int, ...]) -> Refusals:
    good, message = signing.certificate(quorum), signing.message()
    shares = signing.shares(message)
    two_roles = bls.aggregate_signatures(shares[-2:])
    payload = good.signature
    for what, bad in (
        ("two of three roles", two_roles),
        ("shares of a role added up, where t < n", bls.aggregate_signatures([shares[place] for place in quorum])),
        ("a byte short", payload[:-1]),
        ("a byte more", payload + b"\x00"),
        ("the negated signature", bytes([payload[0] ^ 0x20]) + payload[1:]),
        ("the point at infinity", INFINITY),
        ("a point outside the subgroup", OUTSIDE_SUBGROUP),
        ("no point", b"\xff" * 96),
    ):
        yield what, encode(msgspec.structs.replace(good, signature=bad))


def _multisignature_refusals(signing: Signing, quorum: tuple[int, ...]) -> Refusals:
    good, last = signing.certificate(quorum), len(signing.voters) - 1
    held = decode(good.signature, Multisignature, 256)
    marked, size = int.from_bytes(held.voters, "little"), len(held.voters)

    def changed(**fields: object) -> bytes:
        return encode(msgspec.structs.replace(good, signature=encode(msgspec.structs.replace(held, **fields))))

    yield "a bit beyond the last voter", changed(voters=(marked | 1 << last + 1).to_bytes(size, "little"))
    yield "a longer bitmap", changed(voters=held.voters + b"\x00")
    yield "a shorter bitmap" if size > 1 else "an empty bitmap", _shorter(good, held)
    yield "a voter marked that did not sign", changed(voters=(marked | 1 << quorum[-3] + 1).to_bytes(size, "little"))
    yield "nobody marked", changed(voters=bytes(size))
    yield "no quorum of one role", encode(signing.certificate(quorum[1:]))
    yield "the highest bit first", changed(voters=bytes(int(f"{byte:08b}"[::-1], 2) for byte in held.voters))
    yield "the point at infinity", changed(signature=INFINITY)
    yield "a point outside the subgroup", changed(signature=OUTSIDE_SUBGROUP)
    yield "a signature of 95 bytes", encode(msgspec.structs.replace(good, signature=_raw_multi(held.voters, 95)))
    yield "a trailing byte in the payload", encode(msgspec.structs.replace(good, signature=good.signature + b"\x00"))
    head = good.signature.index(b"\xc4" + bytes([size]) + held.voters)
    wide = good.signature[:head] + b"\xc5\x00" + good.signature[head + 1 :]
    yield "the bitmap's length in two bytes", encode(msgspec.structs.replace(good, signature=wide))


def _shorter(good: Certificate, held: Multisignature) -> bytes:
    payload = msgspec.msgpack.encode(["multisignature", held.voters[:-1], held.signature])
    return encode(msgspec.structs.replace(good, signature=payload))


def _raw_multi(voters: bytes, length: int) -> bytes:
    return msgspec.msgpack.encode(["multisignature", voters, bytes(length)])


def _list_refusals(signing: Signing, quorum: tuple[int, ...]) -> Refusals:
    good = signing.certificate(quorum)
    held = decode(good.signature, SignatureList, 1 << 20).signatures

    def changed(*listed: ListedSignature) -> bytes:
        return encode(msgspec.structs.replace(good, signature=encode(SignatureList(listed))))

    first, second, *rest = held
    yield "a voter twice", changed(first, second, second, *rest)
    yield "no quorum of one role", changed(second, *rest)
    turned = first.signature[:-1] + bytes([first.signature[-1] ^ 1])
    yield "a wrong signature", changed(ListedSignature(first.voter, turned), second, *rest)
    short = ListedSignature(first.voter, first.signature[:-1])
    yield "a signature a byte short", changed(short, second, *rest)
    if signing.scheme.name == ML_DSA_65_LIST:
        return
    yield "not in the order of voters", changed(second, first, *rest)
    yield "a voter beyond the last", changed(*held, ListedSignature(len(signing.voters), first.signature))
    swapped = (ListedSignature(first.voter, second.signature), ListedSignature(second.voter, first.signature))
    yield "signatures of two voters exchanged", changed(*swapped, *rest)
    surplus = ListedSignature(quorum[-3] + 1, first.signature)
    yield "a quorum, and a wrong signature beside it", changed(first, second, surplus, *rest)
    yield "nobody listed", encode(msgspec.structs.replace(good, signature=encode(SignatureList(()))))
    yield "a trailing byte in the payload", encode(msgspec.structs.replace(good, signature=good.signature + b"\x00"))


_PAYLOADS: dict[str, Callable[[Signing, tuple[int, ...]], Refusals]] = {
    BLS_THRESHOLD: _threshold_refusals,
    BLS_MULTISIG: _multisignature_refusals,
    ED25519_LIST: _list_refusals,
    ML_DSA_65_LIST: _list_refusals,
}


DOMAIN = "COUNTERSIGN-V1_POSSESSION_BLS12381G2_XMD:SHA-256_SSWU_RO_"
"""Of hashing to the curve, for proofs of possession alone."""


def possession() -> list[Case]:
    """Proofs of possession of members' own keys, of role keys, and members' parts in the latter."""
    return [_member_proofs(), _group_proofs(), _group_parts()]


def _member_proofs() -> Case:
    nonce, identity = octets("nonce"), octets("identity")
    secret, other = bls.secret_from_seed(octets("bls")), bls.secret_from_seed(octets("another bls"))
    key = bls.public_key(secret)
    context = member_possession_context(nonce, member_id(1, identity))
    role_context = group_possession_context(nonce, 0, Role.OPERATOR)
    proof, message = bls.prove_possession(secret, context), tagged_message(Tag.POSSESSION, key, context)
    base = {"nonce": nonce, "scheme": 1, "identity_key": identity, "key": key, "proof": proof}

    def refused(what: str, **changes: object) -> Case:
        case = {**base, **changes}
        return refusal(what, partial(accept_member_proof, **case), **_hexed(case))

    accept_member_proof(**base)
    return {
        "kind": "member",
        "domain": DOMAIN,
        "refused": [
            refused("of another chain", nonce=octets("another nonce")),
            refused("of another member", identity_key=octets("another identity")),
            refused("of another identity scheme", scheme=2),
            refused("of another key", key=bls.public_key(other)),
            refused("by another secret", proof=bls.possession_share(other, key, context)),
            refused("of a group", proof=bls.prove_possession(secret, role_context)),
            refused("hashed to the curve as certificates are", proof=bls.sign(secret, message)),
            refused("over the key alone", proof=bls.prove_possession(secret, b"")),
            refused("a proof a byte short", proof=proof[:-1]),
            refused("proof at infinity", proof=INFINITY),
            refused("proof outside the subgroup", proof=OUTSIDE_SUBGROUP),
            refused("a key a byte short", key=key[:-1]),
            refused("key at infinity", key=b"\xc0" + bytes(47)),
            refused("key outside the subgroup", key=KEY_OUTSIDE_SUBGROUP),
        ],
        "accepted": [
            {"what": "of a member", **_hexed({**base, "context": context, "message": message})},
        ],
    }


def _group(role: Role, needed: int, count: int) -> tuple[GroupKeys, list[bls.Secret]]:
    """A role's key as a ceremony makes it, and the members' secrets."""
    drawn = [bls.secret_from_seed(octets("group", role.value, number)) for number in range(count)]
    shares = drawn
    if needed < count:
        polynomial = [secret.scalar for secret in drawn[:needed]]
        values = [sum(part * at**power for power, part in enumerate(polynomial)) for at in range(1, count + 1)]
        shares = [bls.Secret(value % bls.GROUP_ORDER) for value in values]
    keys = tuple(bls.public_key(share) for share in shares)
    whole = bls.public_key(drawn[0]) if needed < count else bls.aggregate_public_keys(keys)
    return GroupKeys(needed, whole, keys), shares


def _proved(role: Role, needed: int, count: int, epoch: int) -> dict[str, object]:
    group, secrets = _group(role, needed, count)
    context = group_possession_context(octets("nonce"), epoch, role)
    parts = [bls.possession_share(secret, group.group_key, context) for secret in secrets]
    return {
        "nonce": octets("nonce"),
        "epoch": epoch,
        "role": role.value,
        "threshold": needed,
        "group_key": group.group_key,
        "share_keys": list(group.share_keys),
        "proof": combine_shares(needed, count, dict(enumerate(parts, 1))),
        "context": context,
        "message": tagged_message(Tag.POSSESSION, group.group_key, context),
        "parts": parts,
    }


def _group_proofs() -> Case:
    dealt, summed = _proved(Role.DATA_SOURCE, 2, 3, 0), _proved(Role.GOVERNANCE, 2, 2, 0)
    accepted = {
        "two of three": dealt,
        "three of four": _proved(Role.OPERATOR, 3, 4, 5),
        "two of two": summed,
        "one of one": _proved(Role.OPERATOR, 1, 1, 0),
    }

    def refused(what: str, base: dict[str, object], **changes: object) -> Case:
        case = {**{name: value for name, value in base.items() if name in GROUP_FIELDS}, **changes}
        return refusal(what, partial(accept_group_proof, **case), **_hexed(case))

    for case in accepted.values():
        accept_group_proof(**{name: value for name, value in case.items() if name in GROUP_FIELDS})
    first, second, third = _octet_list(dealt["share_keys"])
    own = _octet_list(summed["share_keys"])
    foreign = bls.public_key(bls.secret_from_seed(octets("foreign")))
    whole, degree = _octets(dealt["group_key"]), _proved(Role.DATA_SOURCE, 3, 4, 0)
    zero = lagrange_weights([1, 2])
    at_zero = bls.weighted_public_key_sum([(zero.numerators[index], key) for index, key in enumerate(own, 1)])
    return {
        "kind": "group",
        "domain": DOMAIN,
        "refused": [
            refused("another group key", dealt, group_key=foreign),
            refused("the last share key off the polynomial", dealt, share_keys=[first, second, foreign]),
            refused("the first share key off the polynomial", dealt, share_keys=[foreign, second, third]),
            refused("share keys in another order", dealt, share_keys=[second, first, third]),
            refused("a share key twice", dealt, share_keys=[first, first, third]),
            refused("a polynomial of a higher degree", {**degree, "threshold": 2}),
            refused("t < n, keys added up", dealt, group_key=bls.aggregate_public_keys([first, second, third])),
            refused("t = n, not the sum", summed, group_key=foreign),
            refused("t = n, interpolated", summed, group_key=at_zero),
            refused("more needed than there are", summed, threshold=3),
            refused("a share key at infinity", dealt, share_keys=[first, second, b"\xc0" + bytes(47)]),
            refused("group_key outside the subgroup", dealt, group_key=KEY_OUTSIDE_SUBGROUP),
            refused("of another epoch", dealt, epoch=1),
            refused("of another role", dealt, role=Role.OPERATOR.value),
            refused("of another chain", dealt, nonce=octets("another nonce")),
            refused("parts added up, where t < n", dealt, proof=bls.aggregate_signatures(_octet_list(dealt["parts"]))),
            refused("of a member", dealt, proof=_member_proof_as_group(whole)),
            refused("proof at infinity", dealt, proof=INFINITY),
        ],
        "accepted": [{"what": what, **_hexed(case)} for what, case in accepted.items()],
    }


def _member_proof_as_group(key: bytes) -> bytes:
    """The role's secret, if one had it, signing as if it were a member's."""
    secret = bls.secret_from_seed(octets("group", Role.DATA_SOURCE.value, 0))
    assert bls.public_key(secret) == key
    return bls.prove_possession(secret, member_possession_context(octets("nonce"), member_id(1, octets("identity"))))


def _group_parts() -> Case:
    dealt = _proved(Role.DATA_SOURCE, 2, 3, 0)
    keys, parts = _octet_list(dealt["share_keys"]), _octet_list(dealt["parts"])
    base = {name: dealt[name] for name in ("nonce", "epoch", "role", "group_key")}
    base |= {"share_key": keys[0], "proof": parts[0]}
    secret = _group(Role.DATA_SOURCE, 2, 3)[1][0]
    context, other = _octets(dealt["context"]), bls.public_key(bls.secret_from_seed(octets("foreign")))

    def refused(what: str, **changes: object) -> Case:
        case = {**base, **changes}
        return refusal(what, partial(accept_part, **case), **_hexed(case))

    accept_part(**base)
    return {
        "kind": "part",
        "domain": DOMAIN,
        "refused": [
            refused("by another member", proof=parts[1]),
            refused("for another group key", proof=bls.possession_share(secret, other, context)),
            refused("for the share key itself", proof=bls.prove_possession(secret, context)),
            refused("of another epoch", epoch=1),
            refused("share_key outside the subgroup", share_key=KEY_OUTSIDE_SUBGROUP),
        ],
        "accepted": [{"what": "of the first of three", **_hexed(base)}],
    }


GROUP_FIELDS = ("nonce", "epoch", "role", "threshold", "group_key", "share_keys", "proof")


def accept_member_proof(nonce: bytes, scheme: int, identity_key: bytes, key: bytes, proof: bytes) -> None:
    """Raises ``Rejected`` unless ``proof`` is one of a member's own key."""
    bls.verify_possession(key, member_possession_context(nonce, member_id(scheme, identity_key)), proof)


def accept_group_proof(
    nonce: bytes, epoch: int, role: str, threshold: int, group_key: bytes, share_keys: list[bytes], proof: bytes
) -> None:
    """Raises ``Rejected`` unless the share keys fit the group key and ``proof`` is one of it."""
    check_group_keys(GroupKeys(threshold, group_key, tuple(share_keys)))
    bls.verify_possession(group_key, group_possession_context(nonce, epoch, Role(role)), proof)


def accept_part(nonce: bytes, epoch: int, role: str, group_key: bytes, share_key: bytes, proof: bytes) -> None:
    """Raises ``Rejected`` unless ``proof`` is the part of ``share_key`` in a proof of ``group_key``."""
    bls.verify_possession_share(share_key, group_key, group_possession_context(nonce, epoch, Role(role)), proof)


def _octets(value: object) -> bytes:
    assert isinstance(value, bytes)
    return value


def _octet_list(value: object) -> list[bytes]:
    assert isinstance(value, list)
    return value


def _hexed(case: Mapping[str, object]) -> Case:
    def readable(value: object) -> object:
        if isinstance(value, list):
            return [readable(item) for item in value]
        return value.hex() if isinstance(value, bytes) else value

    return {name: readable(value) for name, value in case.items()}
