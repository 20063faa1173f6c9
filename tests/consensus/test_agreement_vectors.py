"""The golden vectors of what must be refused, held to this code: it accepts what it must, and says why it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from consensus import bls
from consensus.ceremony import Transcript, decode_invitation
from consensus.certificate import certificate_message, decode_certificate, verify_certificate
from consensus.certificate_schemes import scheme_for
from consensus.codec import decode, encode
from consensus.evidence import EvidenceReport, Offence, check_evidence
from consensus.identifiers import ChainId, Digest, Role, Tag, View, tagged_message
from consensus.membership import (
    BLS_THRESHOLD,
    MAX_GENESIS_BYTES,
    SCHEME_NEEDS,
    Genesis,
    check_genesis,
    committee,
    member_id,
)
from consensus.membership_change import membership_digest
from consensus.rejection import Rejected
from consensus.state_map import MapProof, PrefixProof, verify_map_proof, verify_prefix_proof
from consensus.threshold import (
    GroupKeys,
    check_group_keys,
    combine_shares,
    group_possession_context,
    member_possession_context,
)

VECTORS = Path(__file__).parents[1] / "vectors"


def held(name: str) -> list[dict]:
    return json.loads((VECTORS / f"{name}.json").read_text())


def trials(name: str) -> list[object]:
    """Every case of a file beside what it shares with its neighbours."""
    return [
        pytest.param(shared, case, id=f"{place}-{case['what'].replace(' ', '-')}")
        for place, shared in enumerate(held(name))
        for case in (*shared["accepted"], *shared["refused"])
    ]


def assert_as_told(case: dict, judge: Callable[[], object]) -> None:
    """A case with a reason is refused for it, any other is not refused."""
    found = ""
    try:
        judge()
    except Rejected as rejected:
        found = rejected.reason.value
    assert found == case.get("reason", "")


def genesis_of(shared: dict) -> Genesis:
    genesis = decode(bytes.fromhex(shared["genesis"]), Genesis, MAX_GENESIS_BYTES)
    check_genesis(genesis)
    assert genesis.chain_id.hex() == shared["chain_id"]
    return genesis


def test_every_certificate_scheme_has_vectors_of_both_kinds() -> None:
    assert {shared["scheme"] for shared in held("certificates")} == set(SCHEME_NEEDS)
    for shared in held("certificates"):
        assert shared["accepted"]
        assert {"bad-certificate", "malformed"} <= {case["reason"] for case in shared["refused"]}
    assert (VECTORS / "certificates.json").stat().st_size < 400_000


@pytest.mark.parametrize(("shared", "case"), trials("certificates"))
def test_certificates(shared: dict, case: dict) -> None:
    genesis, encoded = genesis_of(shared), bytes.fromhex(case["certificate"])
    scheme = scheme_for(genesis)
    assert_as_told(case, lambda: verify_certificate(scheme, genesis.chain_id, decode_certificate(encoded)))
    if "reason" not in case:
        made = decode_certificate(encoded)
        message = certificate_message(genesis.chain_id, made.epoch, View(made.view), Digest(made.block))
        assert message.hex() == case["message"]


def test_shares_of_a_threshold_certificate_are_their_voters_own_and_combine_to_it() -> None:
    (shared,) = [shared for shared in held("certificates") if shared["scheme"] == BLS_THRESHOLD]
    scheme, (case,) = scheme_for(genesis_of(shared)), shared["accepted"]
    message, voters = bytes.fromhex(case["message"]), scheme.committee.voters
    shares = {voter.id: bytes.fromhex(share) for voter, share in zip(voters, case["shares"], strict=True)}
    for voter, share in shares.items():
        scheme.verify_share(voter, message, share)
    payload = decode_certificate(bytes.fromhex(case["certificate"])).signature
    for left_out in voters[:3]:
        assert scheme.combine(message, {who: share for who, share in shares.items() if who != left_out.id}) == payload


def judge_possession(kind: str, case: dict) -> None:
    nonce, proof = bytes.fromhex(case["nonce"]), bytes.fromhex(case["proof"])
    if kind == "member":
        identity = member_id(case["scheme"], bytes.fromhex(case["identity_key"]))
        bls.verify_possession(bytes.fromhex(case["key"]), member_possession_context(nonce, identity), proof)
        return
    key, context = bytes.fromhex(case["group_key"]), group_possession_context(nonce, case["epoch"], Role(case["role"]))
    if kind == "part":
        bls.verify_possession_share(bytes.fromhex(case["share_key"]), key, context, proof)
        return
    check_group_keys(GroupKeys(case["threshold"], key, tuple(bytes.fromhex(share) for share in case["share_keys"])))
    bls.verify_possession(key, context, proof)
    if "parts" in case:
        assert context.hex() == case["context"]
        assert tagged_message(Tag.POSSESSION, key, context).hex() == case["message"]
        parts = {index: bytes.fromhex(part) for index, part in enumerate(case["parts"], start=1)}
        assert combine_shares(case["threshold"], len(parts), parts) == proof


@pytest.mark.parametrize(("shared", "case"), trials("possession"))
def test_proofs_of_possession(shared: dict, case: dict) -> None:
    assert shared["domain"].encode() == bls._POSSESSION_DOMAIN
    assert_as_told(case, lambda: judge_possession(shared["kind"], case))


def test_every_offence_has_a_vector() -> None:
    (shared,) = held("evidence")
    assert {case["convicts"][1] for case in shared["accepted"]} == {offence.value for offence in Offence}


@pytest.mark.parametrize(("shared", "case"), trials("evidence"))
def test_evidence(shared: dict, case: dict) -> None:
    def judge() -> None:
        report = decode(bytes.fromhex(case["report"]), EvidenceReport, 65_536)
        found = check_evidence(report, committee(genesis_of(shared)))
        assert [found.member.hex(), found.offence.value, found.epoch, found.view] == case["convicts"]
        assert found.digest.hex() == case["digest"]

    assert_as_told(case, judge)


@pytest.mark.parametrize(
    "case", [case for shared in held("ceremony") for case in shared.get("refused_invitations", ())]
)
def test_invitations_that_are_refused(case: dict) -> None:
    assert_as_told(case, lambda: decode_invitation(bytes.fromhex(case["invitation"])))


@pytest.mark.parametrize(("shared", "case"), trials("ceremony"))
def test_ceremonies(shared: dict, case: dict) -> None:
    invitation = decode_invitation(bytes.fromhex(shared["invitation"]))
    before = shared["accepted"][0]["messages"][: case.get("after", 0)]
    messages = [bytes.fromhex(message) for message in (*before, *case["messages"])]
    assert_as_told(case, lambda: Transcript(invitation, messages).membership())
    if "reason" in case:
        return
    transcript = Transcript(invitation, reversed(messages * 2))
    assert (invitation.digest.hex(), transcript.roster.hex()) == (case["invitation_digest"], case["roster"])
    if invitation.refreshes is None:
        genesis = transcript.genesis()
        check_genesis(genesis)
        assert (encode(genesis).hex(), genesis.chain_id.hex()) == (case["genesis"], case["chain_id"])
    else:
        made = transcript.membership()
        chain_id = ChainId(bytes.fromhex(shared["chain_id"]))
        assert (encode(made).hex(), membership_digest(chain_id, made).hex()) == (case["membership"], case["digest"])
    for told in case["roles"]:
        role = Role(told["role"])
        assert invitation.key_ceremony(role).id.hex() == told["key_ceremony_id"]
        assert transcript.group(role).group_key.hex() == told["group_key"]
        if "deals" in told:
            assert transcript.commitments(role).hex() == told["commitments"]
            assert transcript.deals(role).hex() == told["deals"]


def pairs(entries: list[list[str]]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((bytes.fromhex(key), bytes.fromhex(value)) for key, value in entries)


@pytest.mark.parametrize("shared", held("state_map"), ids=lambda shared: f"{len(shared['entries'])}-entries")
def test_proofs_of_keys_and_prefixes_and_of_their_absence(shared: dict) -> None:
    root, entries = bytes.fromhex(shared["root"]), pairs(shared["entries"])

    def judge(case: dict) -> None:
        path = tuple((bit, bytes.fromhex(sibling)) for bit, sibling in case["path"])
        if "prefix" in case:
            prefix = bytes.fromhex(case["prefix"])
            found = verify_prefix_proof(root, prefix, PrefixProof(pairs(case["found"]), path))
            assert found == tuple(entry for entry in entries if entry[0].startswith(prefix))
            return
        key, leaf_key, leaf_value = (bytes.fromhex(case[name]) for name in ("key", "leaf_key", "leaf_value"))
        assert verify_map_proof(root, key, MapProof(leaf_key, leaf_value, path)) == dict(entries).get(key)

    for case in (*shared["proofs"], *shared["prefixes"], *shared["refused"]):
        assert_as_told(case, lambda case=case: judge(case))
