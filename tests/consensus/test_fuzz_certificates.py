"""Certificates as attackers make them, of real signatures: accepted exactly if every role's quorum signed that header.

Each certificate is built from a description of who signed what; a few lines here, which share nothing with the schemes,
tell from the description alone whether it proves anything.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import msgspec
import pytest
from consensus_fixtures import make_genesis
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgpack_fixtures import in_other_forms

from consensus import bls
from consensus.bls_certificates import Multisignature
from consensus.certificate import (
    BadCertificateShares,
    Certificate,
    certificate_message,
    decode_certificate,
    verify_certificate,
)
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.identifiers import VOTING_ROLES, ChainId, Digest, MemberId, View
from consensus.listed_certificates import ListedSignature, SignatureList
from consensus.membership import BLS_MULTISIG, BLS_THRESHOLD, ED25519_LIST, ML_DSA_65_LIST
from consensus.rejection import Reason, Rejected
from consensus.threshold import combine_shares

COUNTS = {"data-source": 4, "governance": 3, "operator": 2, "verifier": 1}
THRESHOLDS = {"data-source": 3, "governance": 2, "operator": 2}
QUORUM = tuple(THRESHOLDS[role.value] for role in VOTING_ROLES)
ROLE_OF = (0,) * 4 + (1,) * 3 + (2,) * 2
"""Of each voter by position, the position of its role."""
VOTERS = len(ROLE_OF)

Place = tuple[int, int, bytes]
"""Epoch, view and ledger block."""
TRUE_PLACE: Place = (0, 7, b"b" * 32)
OTHER_PLACES: tuple[Place, ...] = ((1, 7, b"b" * 32), (0, 8, b"b" * 32), (0, 7, b"c" * 32))
INFINITE = b"\xc0" + bytes(95)
OUTSIDE_SUBGROUP = bytes([0x80]) + (1).to_bytes(47, "big") + bytes(48)
"""x = (0, 1) is on the twist; almost no such point has prime order (``test_bls``)."""


@dataclass(frozen=True)
class Network:
    """A chain under one scheme, and its voters' shares over every place."""

    name: str

    @cached_property
    def genesis(self):
        return make_genesis(COUNTS, certificate_scheme=self.name, thresholds=THRESHOLDS)

    @cached_property
    def scheme(self):
        return scheme_for(self.genesis[0])

    @property
    def chain_id(self) -> ChainId:
        return self.genesis[0].chain_id

    @cached_property
    def shares(self) -> dict[Place, list[bytes]]:
        """By place, each voter's share, in the voters' order."""
        secrets = self.genesis[1]
        held = [secrets[voter.name].key_share or secrets[voter.name].identity for voter in self.scheme.committee.voters]
        return {
            place: [self.scheme.share(secret, self.message(place)) for secret in held]
            for place in (TRUE_PLACE, *OTHER_PLACES)
        }

    def message(self, place: Place) -> bytes:
        epoch, view, block = place
        return certificate_message(self.chain_id, epoch, View(view), Digest(block))

    def certificate(self, payload: bytes, place: Place = TRUE_PLACE) -> bytes:
        epoch, view, block = place
        return encode(Certificate(self.name, view, block, epoch, payload))

    @cached_property
    def true_certificate(self) -> bytes:
        voters = self.scheme.committee.voters
        shares = {voter.id: share for voter, share in zip(voters, self.shares[TRUE_PLACE], strict=True)}
        return self.certificate(self.scheme.combine(self.message(TRUE_PLACE), shares))

    def refusal(self, encoded: bytes) -> Reason | None:
        """Why the certificate is refused as one of ``TRUE_PLACE``, None if it is taken. Nothing else may happen."""
        try:
            found = decode_certificate(encoded)
            assert encode(found) == encoded
            verify_certificate(self.scheme, self.chain_id, found)
        except Rejected as error:
            return error.reason
        assert (found.epoch, found.view, found.block) == TRUE_PLACE
        return None


THRESHOLD, MULTISIG, LISTED, LATTICE = NETWORKS = [
    Network(name) for name in (BLS_THRESHOLD, BLS_MULTISIG, ED25519_LIST, ML_DSA_65_LIST)
]


def by_name(network: Network) -> str:
    return network.name


def is_quorum(voters: set[int]) -> bool:
    present = Counter(ROLE_OF[voter] for voter in voters)
    return all(present[role] >= needed for role, needed in enumerate(QUORUM))


places = st.sampled_from((TRUE_PLACE,) * 5 + OTHER_PLACES)
voters = st.integers(0, VOTERS - 1)
quorums = st.sets(voters).filter(is_quorum)
"""Of every role enough, or more."""
some = st.one_of(quorums, st.just(set(range(VOTERS))), st.sets(voters, min_size=1))


@pytest.mark.parametrize("network", [LISTED, LATTICE], ids=by_name)
@settings(max_examples=100, deadline=None)
@given(
    start=some,
    edits=st.lists(st.tuples(st.integers(0, 12), st.integers(0, VOTERS), voters, places), max_size=2),
    order=st.sampled_from(["kept", "kept", "reversed"]),
)
def test_list_is_taken_exactly_if_a_quorum_signed_each_entry_once_in_order(network, start, edits, order) -> None:
    """Entries claim a position and hold a signature of some voter over some place."""
    entries = [(voter, voter, TRUE_PLACE) for voter in sorted(start)]
    for at, claimed, signer, place in edits:
        if at < len(entries):
            entries[at] = (claimed, signer, place)
        else:
            entries.append((claimed, signer, place))
    if order == "reversed":
        entries.reverse()
    payload = encode(
        SignatureList(tuple(ListedSignature(claimed, network.shares[place][by]) for claimed, by, place in entries))
    )
    claims = [claimed for claimed, _, _ in entries]
    is_proof = (
        claims == sorted(set(claims))
        and all(claimed == by and place == TRUE_PLACE for claimed, by, place in entries)
        and is_quorum(set(claims))
    )
    refusal = network.refusal(network.certificate(payload))
    assert (refusal is None) == is_proof, refusal
    assert refusal in (None, Reason.BAD_CERTIFICATE, Reason.QUORUM_NOT_REACHED)


marks = st.tuples(st.just("mark"), st.integers(0, 23))
signatures = st.tuples(st.just("sign"), st.tuples(voters, places))
silences = st.tuples(st.just("silence"), voters)
widths = st.tuples(st.just("width"), st.sampled_from([1, 3]))


@settings(max_examples=150, deadline=None)
@given(start=some, edits=st.lists(st.one_of(marks, signatures, silences, widths), max_size=2))
def test_multisignature_is_taken_exactly_if_the_marked_voters_are_a_quorum_and_all_signed(start, edits) -> None:
    """The bitmap may mark others than signed, or bits beyond the voters, and be wider; a signer may count twice."""
    marked, signers, width = set(start), Counter((voter, TRUE_PLACE) for voter in start), 2
    for edit, value in edits:
        match edit:
            case "mark":
                marked ^= {value}
            case "sign":
                signers[value] += 1
            case "silence":
                signers.pop((value, TRUE_PLACE), None)
            case "width":
                width = value
    assume(signers and max(marked, default=0) < 8 * width)
    signature = bls.aggregate_signatures([MULTISIG.shares[place][voter] for voter, place in signers.elements()])
    bitmap = sum(1 << position for position in marked).to_bytes(width, "little")
    is_proof = (
        width == 2
        and marked <= set(range(VOTERS))
        and is_quorum(marked)
        and signers == Counter((voter, TRUE_PLACE) for voter in marked)
    )
    refusal = MULTISIG.refusal(MULTISIG.certificate(encode(Multisignature(bitmap, signature))))
    assert (refusal is None) == is_proof, refusal
    assert refusal in (None, Reason.BAD_CERTIFICATE, Reason.QUORUM_NOT_REACHED)


def role_signature(role: int, chosen: list[int], place: Place, presented_as: int) -> bytes:
    """What these members' shares give, combined as if they were those of a role, by their positions in their own."""
    held = [share for at, share in enumerate(THRESHOLD.shares[place]) if ROLE_OF[at] == role]
    count = len([at for at in ROLE_OF if at == presented_as])
    return combine_shares(QUORUM[presented_as], count, {index + 1: held[index] for index in chosen})


@st.composite
def role_parts(draw) -> tuple[int, tuple[int, ...], Place, int]:
    """A role, which of its members sign, over what, and whose shares they are combined as."""
    presented_as = draw(st.sampled_from((0, 1, 2)))
    role = draw(st.sampled_from((presented_as,) * 4 + (0, 1, 2)))
    most = min(ROLE_OF.count(role), ROLE_OF.count(presented_as))
    assume(most >= QUORUM[presented_as])
    chosen = draw(st.sets(st.integers(0, most - 1), min_size=QUORUM[presented_as]))
    return role, tuple(sorted(chosen)), draw(places), presented_as


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_role_signatures_are_taken_exactly_if_each_role_signed_once(data, is_whole) -> None:
    """Left out, repeated, of another place, or with one role's shares combined as another's."""
    if is_whole:
        parts = [
            (role, tuple(sorted(data.draw(st.sets(st.integers(0, ROLE_OF.count(role) - 1), min_size=QUORUM[role])))),
             TRUE_PLACE, role)
            for role in range(3)
        ]  # fmt: skip
        parts += data.draw(st.lists(role_parts(), max_size=1))
    else:
        parts = data.draw(st.lists(role_parts(), min_size=1, max_size=4))
    payload = bls.aggregate_signatures([role_signature(*part) for part in parts])
    is_proof = sorted(part[0] for part in parts) == [0, 1, 2] and all(
        place == TRUE_PLACE and role == presented_as for role, _, place, presented_as in parts
    )
    refusal = THRESHOLD.refusal(THRESHOLD.certificate(payload))
    assert (refusal is None) == is_proof, refusal
    assert refusal in (None, Reason.BAD_CERTIFICATE)


@pytest.mark.parametrize("point", [INFINITE, OUTSIDE_SUBGROUP, bytes(96), b"\xff" * 96, INFINITE[:95], b"x"])
def test_points_at_infinity_or_outside_the_subgroup_are_no_certificate(point: bytes) -> None:
    assert THRESHOLD.refusal(THRESHOLD.certificate(point)) is Reason.BAD_CERTIFICATE
    everyone = ((1 << VOTERS) - 1).to_bytes(2, "little")
    marked = MULTISIG.certificate(encode(Multisignature(everyone, point)))
    assert MULTISIG.refusal(marked) is (Reason.BAD_CERTIFICATE if len(point) == 96 else Reason.MALFORMED)
    for network in (THRESHOLD, MULTISIG):
        members = network.scheme.committee.voters
        shares = {voter.id: share for voter, share in zip(members, network.shares[TRUE_PLACE], strict=True)}
        with pytest.raises(BadCertificateShares) as refusal:
            network.scheme.combine(network.message(TRUE_PLACE), shares | {members[0].id: point})
        assert refusal.value.culprits == (members[0].id,)


@pytest.mark.parametrize("network", NETWORKS, ids=by_name)
@settings(max_examples=50, deadline=None)
@given(
    presented=st.dictionaries(voters, st.tuples(voters, places), max_size=VOTERS),
    honest=some,
    with_verifier=st.sampled_from([None, None, None, False, True]),
)
def test_combining_gives_a_certificate_or_names_exactly_the_culprits(network, presented, honest, with_verifier) -> None:
    """Whatever shares members hand in: another's, of another place. What is given always verifies."""
    scheme, message = network.scheme, network.message(TRUE_PLACE)
    members = scheme.committee.voters
    held = {voter: (voter, TRUE_PLACE) for voter in honest} | presented
    shares = {members[by].id: network.shares[place][voter] for by, (voter, place) in held.items()}
    if with_verifier is not None:
        stranger = scheme.committee.members[-1].id if with_verifier else MemberId(bytes(32))
        with pytest.raises(Rejected) as refusal:
            scheme.combine(message, {**shares, stranger: b"share"})
        assert refusal.value.reason is (Reason.WRONG_ROLE if with_verifier else Reason.UNKNOWN_MEMBER)
    culprits = {members[by].id for by, claim in held.items() if claim != (by, TRUE_PLACE)}
    if not is_quorum(set(held)):
        with pytest.raises(Rejected) as refusal:
            scheme.combine(message, shares)
        assert refusal.value.reason is Reason.QUORUM_NOT_REACHED
        return
    try:
        payload = scheme.combine(message, shares)
    except BadCertificateShares as error:
        named = set(error.culprits)
    else:
        # Shares beyond the threshold are not looked at: bad ones among them do no harm.
        assert network.refusal(network.certificate(payload)) is None
        return
    assert named == culprits != set()


@pytest.mark.parametrize("network", NETWORKS, ids=by_name)
@settings(max_examples=40, deadline=None)
@given(
    place=places,
    signed=places,
    scheme=st.sampled_from([None, None, *(other.name for other in NETWORKS), "rot13"]),
    chain=st.booleans(),
)
def test_certificate_is_of_one_chain_epoch_view_and_ledger_block(network, place, signed, scheme, chain) -> None:
    members = network.scheme.committee.voters
    shares = {voter.id: share for voter, share in zip(members, network.shares[signed], strict=True)}
    payload = network.scheme.combine(network.message(signed), shares)
    found = decode_certificate(network.certificate(payload, place))
    if scheme is not None:
        found = msgspec.structs.replace(found, scheme=scheme)
    chain_id = ChainId(bytes(32)) if chain else network.chain_id
    if place == signed and place[0] == 0 and scheme in (None, network.name) and not chain:
        verify_certificate(network.scheme, chain_id, found)
        return
    with pytest.raises(Rejected) as refusal:
        verify_certificate(network.scheme, chain_id, found)
    assert refusal.value.reason in (Reason.WRONG_CHAIN, Reason.WRONG_EPOCH, Reason.BAD_CERTIFICATE)


@pytest.mark.parametrize("network", NETWORKS, ids=by_name)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_same_certificate_in_other_bytes_is_refused(network, data) -> None:
    """Non-minimal integers and lengths, of the certificate or of its payload; parts cut off or added."""
    encoded = network.true_certificate
    payload = decode_certificate(encoded).signature

    def choose(forms: int) -> int:
        return data.draw(st.integers(0, forms - 1))

    match data.draw(st.sampled_from(["certificate", "payload", "longer", "shorter", "longer payload", "field more"])):
        case "certificate":
            forged = in_other_forms(encoded, choose)
        case "payload":
            assume(network is not THRESHOLD)
            forged = network.certificate(in_other_forms(payload, choose))
        case "longer":
            forged = encoded + data.draw(st.binary(min_size=1, max_size=3))
        case "shorter":
            forged = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
        case "longer payload":
            forged = network.certificate(payload + data.draw(st.binary(min_size=1, max_size=3)))
        case _:
            forged = msgspec.msgpack.encode([*msgspec.msgpack.decode(encoded), None])
    expected = {None} if forged == encoded else {Reason.NON_CANONICAL, Reason.MALFORMED, Reason.BAD_CERTIFICATE}
    assert network.refusal(forged) in expected
