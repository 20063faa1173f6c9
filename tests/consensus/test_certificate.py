"""Certificates: three roles or none, for exactly one ledger block of one chain, epoch and view."""

import msgspec
import pytest
from consensus_fixtures import SMALLEST, make_genesis
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus import bls
from consensus.bls_certificates import BlsThreshold, Multisignature
from consensus.certificate import (
    MAX_CERTIFICATE_BYTES,
    BadCertificateShares,
    Certificate,
    certificate_message,
    decode_certificate,
    verify_certificate,
)
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.identifiers import VOTING_ROLES, ChainId, Digest, MemberId, Role, View
from consensus.listed_certificates import ListedSignature, SignatureList
from consensus.membership import Genesis, check_genesis, committee
from consensus.rejection import InvariantBroken, Reason, Rejected

COUNTS = {"data-source": 4, "governance": 4, "operator": 4, "verifier": 1}
BLOCK = Digest(b"b" * 32)
VIEW = View(7)


class Network:
    """A genesis, its scheme, and every voter's share over one ledger block."""

    def __init__(self, counts: dict[str, int], certificate_scheme: str, seed: int = 0) -> None:
        self.genesis: Genesis
        self.genesis, self.secrets = make_genesis(counts, seed=seed, certificate_scheme=certificate_scheme)
        self.scheme = scheme_for(self.genesis)
        self.chain_id = self.genesis.chain_id
        self.message = certificate_message(self.chain_id, 0, VIEW, BLOCK)
        self.shares = self.shares_over(self.message)
        self.ids = {member.name: member.id for member in self.genesis.members}

    def shares_over(self, message: bytes) -> dict[MemberId, bytes]:
        shares = {}
        for voter in committee(self.genesis).voters:
            kept = self.secrets[voter.name]
            shares[voter.id] = self.scheme.share(kept.key_share or kept.identity, message)
        return shares

    def without(self, *names: str) -> dict[MemberId, bytes]:
        left_out = {self.ids[name] for name in names}
        return {member: share for member, share in self.shares.items() if member not in left_out}

    def certificate(self, **fields: object) -> Certificate:
        made = Certificate(
            scheme=self.scheme.name,
            view=VIEW,
            block=BLOCK,
            epoch=0,
            signature=self.scheme.combine(self.message, self.shares),
        )
        return msgspec.structs.replace(made, **fields)


BLS = Network(COUNTS, "bls-threshold")
LIST = Network(COUNTS, "ed25519")
MULTISIG = Network(COUNTS, "bls-multisig")
LATTICE = Network(COUNTS, "ml-dsa-65")
ALL = [BLS, MULTISIG, LIST, LATTICE]
SMALL_BLS = Network({"data-source": 2, "governance": 1, "operator": 1}, "bls-threshold")
SMALL = [SMALL_BLS, *(Network(SMALLEST, network.scheme.name) for network in ALL[1:])]
NETWORKS = [*ALL, *SMALL]


def name_of(network: Network) -> str:
    return f"{network.scheme.name}-{len(network.shares)}"


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_certificate_of_all_voters_verifies_and_survives_the_wire(network):
    made = network.certificate()
    decoded = decode_certificate(encode(made))
    assert decoded == made
    verify_certificate(network.scheme, network.chain_id, decoded)


def test_sizes_are_those_the_specification_states():
    sizes = {network.scheme.name: len(network.certificate().signature) for network in ALL}
    assert sizes["bls-threshold"] == 96
    assert sizes["bls-multisig"] == 96 + 2 + 20
    assert sizes["ed25519"] < 9 * 72
    assert 9 * 3_309 < sizes["ml-dsa-65"] < 9 * 3_320
    assert MAX_CERTIFICATE_BYTES > 256 * 3_316


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_any_quorum_of_every_role_is_enough(network):
    shares = network.without("data-source-1", "governance-3", "operator-2")
    network.scheme.verify(network.message, network.scheme.combine(network.message, shares))


def test_bls_certificate_is_the_same_whoever_signed():
    full = BLS.scheme.combine(BLS.message, BLS.shares)
    for left_out in (("data-source-1",), ("governance-2", "operator-1"), ("operator-3",)):
        assert BLS.scheme.combine(BLS.message, BLS.without(*left_out)) == full


@pytest.mark.parametrize("network", ALL, ids=name_of)
@pytest.mark.parametrize("role", VOTING_ROLES)
def test_one_role_short_of_its_threshold_makes_no_certificate(network, role):
    shares = network.without(f"{role.value}-1", f"{role.value}-4")
    with pytest.raises(Rejected, match=role.value) as refusal:
        network.scheme.combine(network.message, shares)
    assert refusal.value.reason is Reason.QUORUM_NOT_REACHED


@pytest.mark.parametrize("network", NETWORKS, ids=name_of)
def test_bad_shares_are_named_and_the_rest_still_combines(network):
    wrong = network.shares_over(b"another message")
    bad = [network.ids["data-source-1"]]
    if len(network.shares) > 4:
        bad.append(network.ids["operator-3"])
    with pytest.raises(BadCertificateShares) as refusal:
        network.scheme.combine(network.message, network.shares | {member: wrong[member] for member in bad})
    assert refusal.value.culprits == tuple(bad)
    assert refusal.value.reason is Reason.BAD_SHARE
    assert "data-source-1" in refusal.value.detail
    if len(network.shares) > 4:
        rest = {member: share for member, share in network.shares.items() if member not in bad}
        network.scheme.verify(network.message, network.scheme.combine(network.message, rest))


@pytest.mark.parametrize("network", ALL, ids=name_of)
@pytest.mark.parametrize("bad", [b"", b"x", bytes(64), bytes(96), b"\xc0" + bytes(95), b"\xff" * 96])
def test_malformed_share_names_its_member(network, bad):
    culprit = network.ids["governance-1"]
    with pytest.raises(BadCertificateShares) as refusal:
        network.scheme.combine(network.message, network.shares | {culprit: bad})
    assert refusal.value.culprits == (culprit,)


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_share_of_another_member_names_who_presented_it(network):
    """Shares of one role are no good in another, nor at another index."""
    for presenter, owner in (("governance-1", "operator-1"), ("operator-1", "operator-2")):
        stolen = {network.ids[presenter]: network.shares[network.ids[owner]]}
        with pytest.raises(BadCertificateShares) as refusal:
            network.scheme.combine(network.message, network.shares | stolen)
        assert refusal.value.culprits == (network.ids[presenter],)


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_shares_of_verifiers_and_strangers_are_refused(network):
    share = network.shares[network.ids["operator-1"]]
    for member, reason in (
        (network.ids["verifier-1"], Reason.WRONG_ROLE),
        (MemberId(bytes(32)), Reason.UNKNOWN_MEMBER),
    ):
        for act in (
            lambda member=member: network.scheme.combine(network.message, network.shares | {member: share}),
            lambda member=member: network.scheme.verify_share(member, network.message, share),
        ):
            with pytest.raises(Rejected) as refusal:
                act()
            assert refusal.value.reason is reason


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_share_is_checked_against_its_own_member(network):
    first, second = network.ids["operator-1"], network.ids["operator-2"]
    network.scheme.verify_share(first, network.message, network.shares[first])
    with pytest.raises(Rejected, match="bad-signature"):
        network.scheme.verify_share(second, network.message, network.shares[first])


def test_cancelling_tampering_passes_the_sum_but_not_a_role_signature():
    """Two corrupt roles shift their signatures against each other: the sum proves all roles together, no
    role alone."""
    assert isinstance(SMALL_BLS.scheme, BlsThreshold)
    offset = bls.sign(bls.secret_from_seed(b"t" * 32), SMALL_BLS.message)
    governance, operator = SMALL_BLS.ids["governance-1"], SMALL_BLS.ids["operator-1"]
    shares = SMALL_BLS.shares | {
        governance: bls.aggregate_signatures([SMALL_BLS.shares[governance], offset]),
        operator: bls.weighted_signature_sum([(1, SMALL_BLS.shares[operator]), (-1, offset)]),
    }
    payload = SMALL_BLS.scheme.combine(SMALL_BLS.message, shares)
    assert payload == SMALL_BLS.scheme.combine(SMALL_BLS.message, SMALL_BLS.shares)
    for role, culprit in ((Role.GOVERNANCE, governance), (Role.OPERATOR, operator)):
        with pytest.raises(BadCertificateShares) as refusal:
            SMALL_BLS.scheme.role_signature(role, SMALL_BLS.message, shares)
        assert refusal.value.culprits == (culprit,)


@pytest.mark.parametrize("role", VOTING_ROLES)
def test_role_signature_is_that_of_the_role_key_and_no_certificate(role):
    assert isinstance(BLS.scheme, BlsThreshold)
    signature = BLS.scheme.role_signature(role, BLS.message, BLS.shares)
    bls.verify(BLS.scheme.groups[role].group_key, BLS.message, signature)
    with pytest.raises(Rejected, match="bad-certificate"):
        BLS.scheme.verify(BLS.message, signature)
    with pytest.raises(Rejected) as refusal:
        BLS.scheme.role_signature(role, BLS.message, BLS.without(f"{role.value}-1", f"{role.value}-2"))
    assert refusal.value.reason is Reason.QUORUM_NOT_REACHED


def test_two_roles_are_no_certificate():
    assert isinstance(BLS.scheme, BlsThreshold)
    signatures = [BLS.scheme.role_signature(role, BLS.message, BLS.shares) for role in VOTING_ROLES]
    BLS.scheme.verify(BLS.message, bls.aggregate_signatures(signatures))
    for left_out in range(3):
        rest = [signature for i, signature in enumerate(signatures) if i != left_out]
        with pytest.raises(Rejected) as refusal:
            BLS.scheme.verify(BLS.message, bls.aggregate_signatures(rest))
        assert refusal.value.reason is Reason.BAD_CERTIFICATE


@pytest.mark.parametrize("network", ALL, ids=name_of)
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"view": VIEW + 1}, Reason.BAD_CERTIFICATE),
        ({"block": b"c" * 32}, Reason.BAD_CERTIFICATE),
        ({"epoch": 1}, Reason.WRONG_EPOCH),
        ({"scheme": "rot13"}, Reason.BAD_CERTIFICATE),
    ],
)
def test_certificate_moved_to_another_view_block_epoch_or_scheme_is_refused(network, fields, reason):
    with pytest.raises(Rejected) as refusal:
        verify_certificate(network.scheme, network.chain_id, network.certificate(**fields))
    assert refusal.value.reason is reason


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_certificate_of_another_chain_is_refused(network):
    other = Network(COUNTS, network.scheme.name, seed=1)
    with pytest.raises(Rejected):
        verify_certificate(other.scheme, other.chain_id, network.certificate())
    with pytest.raises(Rejected) as refusal:
        verify_certificate(other.scheme, network.chain_id, network.certificate())
    assert refusal.value.reason is Reason.WRONG_CHAIN


def test_certificate_of_one_scheme_is_refused_by_the_other():
    for network in ALL:
        for other in ALL:
            if network is not other:
                with pytest.raises(Rejected):
                    network.scheme.verify(network.message, other.certificate().signature)
                with pytest.raises(Rejected):
                    verify_certificate(network.scheme, network.chain_id, network.certificate(scheme=other.scheme.name))


def test_messages_differ_in_every_part():
    chain, other = ChainId(b"1" * 32), ChainId(b"2" * 32)
    messages = {
        certificate_message(chain, 0, VIEW, BLOCK),
        certificate_message(other, 0, VIEW, BLOCK),
        certificate_message(chain, 1, VIEW, BLOCK),
        certificate_message(chain, 0, View(VIEW + 1), BLOCK),
        certificate_message(chain, 0, VIEW, Digest(bytes(32))),
    }
    assert len(messages) == 5


def listed(*entries: tuple[int, bytes]) -> bytes:
    return encode(SignatureList(signatures=tuple(ListedSignature(voter=v, signature=s) for v, s in entries)))


@pytest.mark.parametrize("network", [LIST, LATTICE], ids=name_of)
def test_list_with_repeated_disordered_or_unknown_voters_is_refused(network):
    voters = network.scheme.committee.voters
    full = [(position, network.shares[voter.id]) for position, voter in enumerate(voters)]
    network.scheme.verify(network.message, listed(*full))
    for entries in (
        [full[0], *full],
        [full[1], full[0], *full[2:]],
        [*full, (12, full[11][1])],
        [*full[:11], (255, full[11][1])],
    ):
        with pytest.raises(Rejected) as refusal:
            network.scheme.verify(network.message, listed(*entries))
        assert refusal.value.reason is Reason.BAD_CERTIFICATE
    with pytest.raises(Rejected) as refusal:
        network.scheme.verify(network.message, listed(*full[2:]))
    assert refusal.value.reason is Reason.QUORUM_NOT_REACHED


@pytest.mark.parametrize("network", ALL, ids=name_of)
@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_any_changed_byte_of_a_certificate_is_refused(network, position, mask):
    changed = bytearray(encode(network.certificate()))
    changed[position % len(changed)] ^= mask
    with pytest.raises(Rejected):
        verify_certificate(network.scheme, network.chain_id, decode_certificate(bytes(changed)))


@pytest.mark.parametrize("network", ALL, ids=name_of)
@settings(max_examples=60, deadline=None)
@given(payload=st.binary(max_size=200))
def test_arbitrary_payload_is_refused_without_another_exception(network, payload):
    with pytest.raises(Rejected):
        network.scheme.verify(network.message, payload)
    with pytest.raises(Rejected):
        decode_certificate(payload)


def marked(network, *positions, width=2, signature=None):
    voters = network.scheme.committee.voters
    shares = [network.shares[voters[position].id] for position in positions]
    bits = sum(1 << position for position in positions)
    return encode(
        Multisignature(voters=bits.to_bytes(width, "little"), signature=signature or bls.aggregate_signatures(shares))
    )


def test_bitmap_of_another_width_or_with_spare_bits_is_refused():
    everyone = tuple(range(12))
    MULTISIG.scheme.verify(MULTISIG.message, marked(MULTISIG, *everyone))
    whole = bls.aggregate_signatures(list(MULTISIG.shares.values()))
    spare = Multisignature(voters=(0x1FFF).to_bytes(2, "little"), signature=whole)
    short = Multisignature(voters=b"\xff", signature=whole)
    for payload in (marked(MULTISIG, *everyone, width=3), encode(spare), encode(short)):
        with pytest.raises(Rejected) as refusal:
            MULTISIG.scheme.verify(MULTISIG.message, payload)
        assert refusal.value.reason is Reason.BAD_CERTIFICATE


def test_bitmap_that_claims_more_or_fewer_than_signed_is_refused():
    everyone, quorum = tuple(range(12)), (0, 1, 2, 4, 5, 6, 8, 9, 10)
    signed_by_nine = bls.aggregate_signatures(
        [MULTISIG.shares[MULTISIG.scheme.committee.voters[position].id] for position in quorum]
    )
    MULTISIG.scheme.verify(MULTISIG.message, marked(MULTISIG, *quorum))
    with pytest.raises(Rejected) as refusal:
        MULTISIG.scheme.verify(MULTISIG.message, marked(MULTISIG, *everyone, signature=signed_by_nine))
    assert refusal.value.reason is Reason.BAD_CERTIFICATE
    with pytest.raises(Rejected) as refusal:
        MULTISIG.scheme.verify(MULTISIG.message, marked(MULTISIG, *quorum[:-1]))
    assert refusal.value.reason is Reason.QUORUM_NOT_REACHED


def test_key_chosen_to_cancel_the_others_proves_no_possession_so_it_enters_no_genesis():
    """Ristenpart and Yilek: without proofs the rogue's own signature would pass for the sum."""
    voters = MULTISIG.scheme.committee.voters
    own = bls.secret_from_seed(b"r" * 32)
    others = [voter.bls_key for voter in voters if voter.name != "operator-4"]
    rogue_key = bls.weighted_public_key_sum([(1, bls.public_key(own)), *((-1, key) for key in others)])
    assert bls.aggregate_public_keys([rogue_key, *others]) == bls.public_key(own)
    members = tuple(
        msgspec.structs.replace(member, bls_key=rogue_key) if member.name == "operator-4" else member
        for member in MULTISIG.genesis.members
    )
    with pytest.raises(Rejected) as refusal:
        check_genesis(msgspec.structs.replace(MULTISIG.genesis, members=members))
    assert refusal.value.reason is Reason.BAD_PROOF_OF_POSSESSION


@pytest.mark.parametrize("network", ALL, ids=name_of)
def test_secret_of_another_member_or_kind_is_found_before_it_signs(network):
    first, second = network.secrets["operator-1"], network.secrets["operator-2"]
    member = network.ids["operator-1"]
    network.scheme.check_secret(member, first.key_share or first.identity)
    with pytest.raises(Rejected) as refusal:
        network.scheme.check_secret(member, second.key_share or second.identity)
    assert refusal.value.reason is Reason.BAD_KEY
    wrong = first.identity if first.key_share is not None else bls.secret_from_seed(bytes(32))
    for act in (network.scheme.share, lambda secret, _: network.scheme.check_secret(member, secret)):
        with pytest.raises(InvariantBroken):
            act(wrong, b"m")


def test_role_keys_that_do_not_fit_their_shares_stop_the_node():
    """Only an unchecked genesis can lead here: no member is to blame."""
    other = Network(COUNTS, "bls-threshold", seed=1)
    assert isinstance(BLS.scheme, BlsThreshold)
    assert isinstance(other.scheme, BlsThreshold)
    broken = BlsThreshold(BLS.scheme.committee, BLS.scheme.groups, other.scheme.certificate_key)
    with pytest.raises(InvariantBroken):
        broken.combine(BLS.message, BLS.shares)


def test_unknown_scheme_is_refused():
    with pytest.raises(Rejected, match="no certificate scheme"):
        scheme_for(msgspec.structs.replace(LIST.genesis, certificate_scheme="rot13"))
