"""Membership: quorums per role, and every way a genesis can lie about its keys."""

import msgspec
import pytest
from consensus_fixtures import make_genesis, seed_bytes

from consensus import bls
from consensus.identifiers import VOTING_ROLES, MemberId, Role, View
from consensus.keys import Ed25519SigningKey, SignatureScheme
from consensus.membership import (
    ED25519_LIST,
    ML_DSA_65_LIST,
    SCHEME_NEEDS,
    Genesis,
    Member,
    check_genesis,
    committee,
    default_threshold,
)
from consensus.participant import derive_seed
from consensus.rejection import Reason, Rejected
from consensus.threshold import combine_shares, group_possession_context, member_possession_context

GENESIS, SECRETS = make_genesis({"data-source": 4, "governance": 2, "operator": 1, "verifier": 1})
"""3 of 4 on a polynomial, 2 of 2 summed, 1 of 1."""
LIST_GENESIS, _ = make_genesis(certificate_scheme=ED25519_LIST)
FOREIGN, _ = make_genesis({"data-source": 4, "governance": 2, "operator": 1, "verifier": 1}, seed=1)


def with_member(position: int, genesis: Genesis = GENESIS, **fields: object) -> Genesis:
    members = list(genesis.members)
    members[position] = msgspec.structs.replace(members[position], **fields)
    return msgspec.structs.replace(genesis, members=tuple(members))


def with_group(position: int, **fields: object) -> Genesis:
    groups = list(GENESIS.groups)
    groups[position] = msgspec.structs.replace(groups[position], **fields)
    return msgspec.structs.replace(GENESIS, groups=tuple(groups))


def with_threshold(position: int, threshold: int, genesis: Genesis = GENESIS) -> Genesis:
    thresholds = list(genesis.thresholds)
    thresholds[position] = msgspec.structs.replace(thresholds[position], threshold=threshold)
    return msgspec.structs.replace(genesis, thresholds=tuple(thresholds))


def refused(genesis: Genesis, reason: Reason, match: str | None = None) -> None:
    with pytest.raises(Rejected, match=match) as refusal:
        check_genesis(genesis)
    assert refusal.value.reason is reason


@pytest.mark.parametrize("certificate_scheme", SCHEME_NEEDS)
@pytest.mark.parametrize(
    "counts",
    [
        {"data-source": 1, "governance": 1, "operator": 1},
        {"data-source": 2, "governance": 1, "operator": 1, "verifier": 2},
        {"data-source": 4, "governance": 3, "operator": 5},
    ],
)
def test_generated_genesis_is_accepted(counts, certificate_scheme):
    genesis, secrets = make_genesis(counts, certificate_scheme=certificate_scheme)
    check_genesis(genesis)
    assert genesis.chain_id == make_genesis(counts, certificate_scheme=certificate_scheme)[0].chain_id
    assert set(secrets) == {member.name for member in genesis.members}


def test_post_quantum_identities_are_accepted():
    genesis, _ = make_genesis(scheme=SignatureScheme.ML_DSA_65)
    check_genesis(genesis)


def test_lower_threshold_than_default_is_accepted_above_half():
    check_genesis(make_genesis({"data-source": 3, "governance": 3, "operator": 3}, thresholds={"operator": 2})[0])


def test_unknown_scheme_is_refused():
    refused(msgspec.structs.replace(GENESIS, certificate_scheme="rot13"), Reason.BAD_MEMBERSHIP, "rot13")


@pytest.mark.parametrize("role", VOTING_ROLES)
def test_voting_role_without_members_is_refused(role):
    members = tuple(member for member in GENESIS.members if member.role != role)
    refused(msgspec.structs.replace(GENESIS, members=members), Reason.BAD_MEMBERSHIP, "no member holds")


@pytest.mark.parametrize(("position", "threshold"), [(0, 2), (0, 5), (1, 1), (1, 3), (2, 2)])
def test_threshold_at_half_or_above_all_is_refused(position, threshold):
    refused(with_threshold(position, threshold), Reason.BAD_MEMBERSHIP, "expected n/2 < t <= n")


@pytest.mark.parametrize("order", [(0, 2, 1), (0, 0, 1), (1, 2, 0)])
def test_thresholds_and_role_keys_name_every_role_once_in_order(order):
    thresholds = tuple(GENESIS.thresholds[position] for position in order)
    refused(msgspec.structs.replace(GENESIS, thresholds=thresholds), Reason.BAD_MEMBERSHIP, "in order")
    groups = tuple(GENESIS.groups[position] for position in order)
    refused(msgspec.structs.replace(GENESIS, groups=groups), Reason.BAD_MEMBERSHIP, "in order")


def test_missing_role_keys_are_refused():
    refused(msgspec.structs.replace(GENESIS, groups=()), Reason.BAD_MEMBERSHIP, "role keys")
    refused(msgspec.structs.replace(LIST_GENESIS, groups=GENESIS.groups), Reason.BAD_MEMBERSHIP, "no role keys")


def test_same_name_twice_is_refused():
    refused(with_member(0, name=GENESIS.members[1].name), Reason.BAD_MEMBERSHIP, "two members are called")


@pytest.mark.parametrize("name", ["", "Upper", "-x", "x-", "a b", "a/b", "näh", "x" * 65, "a\n"])
def test_name_outside_the_charset_does_not_decode(name):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(msgspec.to_builtins(with_member(0, name=name), builtin_types=(bytes,)), Genesis)


def test_member_with_two_roles_is_refused():
    """The same node listed as operator and as data source: every key repeats."""
    twin = msgspec.structs.replace(GENESIS.members[0], role=Role.VERIFIER, name="twin", log_key=b"", bls_key=b"")
    twin = msgspec.structs.replace(twin, bls_possession=b"")
    genesis = msgspec.structs.replace(GENESIS, members=(*GENESIS.members, twin))
    refused(genesis, Reason.BAD_MEMBERSHIP, "identity key of twin is also the identity key of data-source-1")


@pytest.mark.parametrize("field", ["transport_key", "log_key"])
@pytest.mark.parametrize("other", ["identity_key", "transport_key", "log_key"])
@pytest.mark.parametrize("holder", [0, 5])
def test_key_used_twice_for_whatever_purpose_is_refused(field, other, holder):
    if holder == 0 and field == other:
        return
    genesis = with_member(0, **{field: getattr(GENESIS.members[holder], other)})
    refused(genesis, Reason.BAD_MEMBERSHIP, "is also the")


def test_bls_key_used_twice_is_refused():
    """With its proof bound to the member, the copy has no proof; the same member cannot appear twice."""
    source = GENESIS.members[0]
    genesis = with_member(1, bls_key=source.bls_key, bls_possession=source.bls_possession)
    refused(genesis, Reason.BAD_PROOF_OF_POSSESSION)
    proof = bls.prove_possession(
        bls.secret_from_seed(derive_seed(seed_bytes(0, "data-source", 1), "bls")),
        member_possession_context(GENESIS.nonce, GENESIS.members[1].id),
    )
    genesis = with_member(1, bls_key=source.bls_key, bls_possession=proof)
    refused(genesis, Reason.BAD_MEMBERSHIP, "BLS key of data-source-2 is also the BLS key of data-source-1")


@pytest.mark.parametrize(
    "fields",
    [
        {"identity_key": bytes(32)},
        {"identity_key": b"\x01" + bytes(31)},
        {"identity_key": bytes(31)},
        {"transport_key": bytes(32)},
        {"log_key": bytes(32)},
        {"log_key": b""},
        {"bls_key": b"\xc0" + bytes(47)},
        {"bls_key": b""},
        {"scheme": 2},
        {"scheme": 3},
    ],
)
def test_invalid_key_is_refused(fields):
    refused(with_member(0, **fields), Reason.BAD_KEY)


def test_verifier_with_keys_it_has_no_use_for_is_refused():
    spare = Ed25519SigningKey(bytes(32)).public_key
    refused(with_member(7, log_key=spare), Reason.BAD_MEMBERSHIP, "signs no checkpoints")
    refused(with_member(7, bls_key=GENESIS.members[0].bls_key), Reason.BAD_MEMBERSHIP, "no use for a BLS key")
    refused(
        with_member(0, LIST_GENESIS, bls_key=GENESIS.members[0].bls_key),
        Reason.BAD_MEMBERSHIP,
        "no use for a BLS key",
    )


def test_list_certificates_need_identities_that_sign_them():
    for certificate_scheme, scheme in (
        (ED25519_LIST, SignatureScheme.ML_DSA_65),
        (ML_DSA_65_LIST, SignatureScheme.ED25519),
    ):
        with pytest.raises(Rejected, match="another scheme") as refusal:
            make_genesis(certificate_scheme=certificate_scheme, scheme=scheme)
        assert refusal.value.reason is Reason.BAD_MEMBERSHIP


@pytest.mark.parametrize("certificate_scheme", SCHEME_NEEDS)
@pytest.mark.parametrize("other", SCHEME_NEEDS)
def test_members_made_for_one_scheme_are_refused_under_one_that_needs_other_keys(certificate_scheme, other):
    genesis, _ = make_genesis(certificate_scheme=certificate_scheme)
    moved = msgspec.structs.replace(genesis, certificate_scheme=other)
    if certificate_scheme == other:
        check_genesis(moved)
    else:
        with pytest.raises(Rejected):
            check_genesis(moved)


@pytest.mark.parametrize(
    "proof", [b"", bytes(96), FOREIGN.members[0].bls_possession], ids=["empty", "zeros", "foreign"]
)
def test_bad_member_possession_is_refused(proof):
    refused(with_member(0, bls_possession=proof), Reason.BAD_PROOF_OF_POSSESSION)


def test_possession_made_for_another_chain_is_refused():
    genesis = msgspec.structs.replace(GENESIS, nonce=FOREIGN.nonce)
    refused(genesis, Reason.BAD_PROOF_OF_POSSESSION)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_group_possession_of_another_role_epoch_or_chain_is_refused(position):
    group = GENESIS.groups[position]
    refused(with_group(position, possession=FOREIGN.groups[position].possession), Reason.BAD_PROOF_OF_POSSESSION)
    refused(
        with_group(position, possession=GENESIS.groups[(position + 1) % 3].possession),
        Reason.BAD_PROOF_OF_POSSESSION,
    )
    operator = SECRETS["operator-1"].key_share
    assert operator is not None
    if group.role == Role.OPERATOR:
        for context in (
            group_possession_context(GENESIS.nonce, 1, Role.OPERATOR),
            group_possession_context(GENESIS.nonce, 0, Role.GOVERNANCE),
            member_possession_context(GENESIS.nonce, GENESIS.members[6].id),
        ):
            proof = bls.prove_possession(operator, context)
            refused(with_group(position, possession=proof), Reason.BAD_PROOF_OF_POSSESSION)


def test_rogue_role_key_that_cancels_the_others_is_refused():
    """The operator alone could otherwise certify anything: the three-role sum would be its own key."""
    operator = bls.secret_from_seed(b"o" * 32)
    others = [(-1, group.group_key) for group in GENESIS.groups[:2]]
    rogue = bls.weighted_public_key_sum([(1, bls.public_key(operator)), *others])
    total = bls.aggregate_public_keys([GENESIS.groups[0].group_key, GENESIS.groups[1].group_key, rogue])
    assert total == bls.public_key(operator), "the attack itself works"
    genesis = with_group(2, group_key=rogue)
    refused(genesis, Reason.BAD_MEMBERSHIP, "sum of the share keys")
    genesis = with_group(2, group_key=rogue, share_keys=(rogue,))
    refused(genesis, Reason.BAD_MEMBERSHIP, "their own keys")
    members = (
        *genesis.members[:6],
        msgspec.structs.replace(genesis.members[6], bls_key=rogue),
        *genesis.members[7:],
    )
    refused(msgspec.structs.replace(genesis, members=members), Reason.BAD_PROOF_OF_POSSESSION)


def test_share_key_off_the_polynomial_is_refused():
    keys = GENESIS.groups[0].share_keys
    wrong = (*keys[:3], GENESIS.members[0].bls_key)
    refused(with_group(0, share_keys=wrong), Reason.BAD_MEMBERSHIP, "polynomial")
    refused(with_group(0, share_keys=(*keys[:3], b"\xc0" + bytes(47))), Reason.BAD_KEY)


def test_group_of_another_size_or_threshold_is_refused():
    refused(with_group(0, share_keys=GENESIS.groups[0].share_keys[:3]), Reason.BAD_MEMBERSHIP, "expected 3 of 4")
    refused(with_group(0, threshold=4), Reason.BAD_MEMBERSHIP, "expected 3 of 4")


def test_dealt_share_that_is_also_its_members_own_key_is_refused():
    share = SECRETS["data-source-1"].key_share
    possession = bls.prove_possession(share, member_possession_context(GENESIS.nonce, GENESIS.members[0].id))
    reused = with_member(0, bls_key=GENESIS.groups[0].share_keys[0], bls_possession=possession)
    refused(reused, Reason.BAD_MEMBERSHIP, "own BLS key")


def test_role_keys_shared_between_roles_are_refused():
    """Two roles under one polynomial, proved for both: whoever holds one role's shares holds both roles."""
    counts = {"data-source": 3, "governance": 3, "operator": 1}
    genesis, secrets = make_genesis(counts, thresholds={"data-source": 2, "governance": 2})
    shared = genesis.groups[0]
    context = group_possession_context(genesis.nonce, 0, Role.GOVERNANCE)
    parts = {}
    for index in (1, 2):
        share = secrets[f"data-source-{index}"].key_share
        assert share is not None
        parts[index] = bls.possession_share(share, shared.group_key, context)
    possession = combine_shares(2, 3, parts)
    bls.verify_possession(shared.group_key, context, possession)
    copy = msgspec.structs.replace(shared, role=Role.GOVERNANCE, possession=possession)
    groups = (shared, copy, genesis.groups[2])
    refused(msgspec.structs.replace(genesis, groups=groups), Reason.BAD_MEMBERSHIP, "appears in two roles")


def test_committee_orders_leaders_and_shares_by_the_genesis():
    voters = committee(GENESIS)
    assert [member.role for member in voters.voters] == [
        Role.DATA_SOURCE, Role.DATA_SOURCE, Role.DATA_SOURCE, Role.DATA_SOURCE,
        Role.GOVERNANCE, Role.GOVERNANCE, Role.OPERATOR,
    ]  # fmt: skip
    assert [voters.leader(View(view)) for view in range(1, 9)] == [*voters.voters, voters.voters[0]]
    assert [voters.share_index(member.id) for member in voters.voters] == [1, 2, 3, 4, 1, 2, 1]
    assert voters.role_members(Role.VERIFIER) == (GENESIS.members[7],)
    assert [voters.threshold(role) for role in VOTING_ROLES] == [3, 2, 1]
    assert voters.member(GENESIS.members[7].id) == GENESIS.members[7]


def test_verifiers_and_strangers_have_no_voters_place():
    voters = committee(GENESIS)
    for act in (voters.voter, voters.share_index):
        with pytest.raises(Rejected) as refusal:
            act(GENESIS.members[7].id)
        assert refusal.value.reason is Reason.WRONG_ROLE
        with pytest.raises(Rejected) as refusal:
            act(MemberId(bytes(32)))
        assert refusal.value.reason is Reason.UNKNOWN_MEMBER
    with pytest.raises(Rejected, match="no threshold"):
        voters.threshold(Role.VERIFIER)


def test_quorum_needs_the_threshold_of_every_role():
    voters = committee(GENESIS)
    ids = [member.id for member in voters.voters]
    verifier = GENESIS.members[7].id
    assert voters.has_quorum(ids)
    assert voters.has_quorum(iter(ids[1:]))
    for missing in (ids[2:], ids[:4] + ids[5:], ids[:6], [], ids[:4]):
        assert not voters.has_quorum(missing)
    assert not voters.has_quorum([ids[0], ids[0], ids[0], *ids[4:]])
    assert not voters.has_quorum([*ids[:6], verifier, MemberId(bytes(32))])


def test_tolerances_are_printed_per_role():
    found = {entry.role: entry for entry in committee(GENESIS).tolerances()}
    data = found[Role.DATA_SOURCE]
    assert (data.members, data.threshold, data.agreement, data.validity, data.liveness) == (4, 3, 1, 2, 1)
    operator = found[Role.OPERATOR]
    assert (operator.agreement, operator.validity, operator.liveness) == (0, 0, 0)


def test_default_threshold_is_two_thirds_plus_one():
    assert [default_threshold(n) for n in range(1, 8)] == [1, 2, 3, 3, 4, 5, 5]


def test_member_id_binds_scheme_and_key():
    member: Member = GENESIS.members[0]
    assert member.id != msgspec.structs.replace(member, scheme=2).id
    assert member.id == msgspec.structs.replace(member, name="renamed").id
    assert len({member.id for member in GENESIS.members}) == len(GENESIS.members)
