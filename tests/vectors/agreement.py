"""The golden vectors of what members agree by: certificates. Written by ``generate.py``.

Each file holds what is accepted and, beside it, what must be refused, each with one fault and the name of the rule
that it breaks.

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
from consensus.identifiers import ChainId, Digest, Role, View
from consensus.keys import ML_DSA_65_SIGNATURE_BYTES, MlDsa65SigningKey, SignatureScheme, verify
from consensus.listed_certificates import ListedSignature, SignatureList
from consensus.membership import BLS_MULTISIG, BLS_THRESHOLD, ED25519_LIST, ML_DSA_65_LIST, Genesis
from consensus.participant import MemberSecrets
from consensus.rejection import Rejected

Case = dict[str, object]
Refusals = Iterator[tuple[str, bytes]]

VIEW = View(7)
OUTSIDE_SUBGROUP = bytes.fromhex("8123456789abcdef" + "0123456789abcdef" * 11)
"""A point of G2's curve: the one of the Ethereum vectors."""
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
                "accepted": accepted,
                "refused": [
                    refusal(what, partial(signing.accepts, bad), certificate=bad.hex())
                    for what, bad in (*_altered(signing, quorum), *_PAYLOADS[scheme](signing, quorum))
                ],
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
