"""The genesis file: one reading of every file, and no file that does more than be refused."""

import json

import msgspec
import pytest
from consensus_fixtures import make_genesis, seed_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.codec import decode, encode
from consensus.genesis import (
    MAX_JSON_BYTES,
    MemberPlan,
    generate_genesis,
    genesis_from_json,
    genesis_to_json,
)
from consensus.identifiers import Role
from consensus.keys import Ed25519SigningKey, MlDsa65SigningKey, SignatureScheme, signer_for
from consensus.membership import ED25519_LIST, MAX_GENESIS_BYTES, Genesis
from consensus.rejection import Reason, Rejected

GENESIS, SECRETS = make_genesis()
TEXT = genesis_to_json(GENESIS)


def edited(*path: object, value: object = None) -> bytes:
    """The genesis file with one value replaced."""
    parsed = json.loads(TEXT)
    place = parsed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(parsed).encode()


def refused(text: bytes, reason: Reason = Reason.MALFORMED) -> None:
    with pytest.raises(Rejected) as refusal:
        genesis_from_json(text)
    assert refusal.value.reason is reason


@pytest.mark.parametrize("certificate_scheme", ["bls-threshold", "ed25519"])
def test_file_and_wire_forms_round_trip(certificate_scheme):
    genesis, _ = make_genesis(certificate_scheme=certificate_scheme)
    assert genesis_from_json(genesis_to_json(genesis)) == genesis
    assert decode(encode(genesis), Genesis, MAX_GENESIS_BYTES) == genesis


def test_file_is_readable():
    parsed = json.loads(TEXT)
    assert list(parsed)[:3] == ["version", "name", "nonce"]
    assert parsed["nonce"] == GENESIS.nonce.hex()
    assert parsed["members"][0]["role"] == "data-source"
    assert parsed["groups"][0]["share_keys"] == [key.hex() for key in GENESIS.groups[0].share_keys]


def test_layout_does_not_change_the_chain_id():
    dense = json.dumps(json.loads(TEXT), sort_keys=True, separators=(",", ":")).encode()
    assert genesis_from_json(dense).chain_id == GENESIS.chain_id


@pytest.mark.parametrize(
    "text",
    [
        edited("surplus", value=1),
        edited("members", 0, "surplus", value=1),
        edited("parameters", "surplus", value=1),
        edited("nonce", value=GENESIS.nonce.hex().upper()),
        edited("nonce", value="0x" + GENESIS.nonce.hex()),
        edited("nonce", value=GENESIS.nonce.hex()[:-1]),
        edited("nonce", value=GENESIS.nonce.hex()[:-2]),
        edited("nonce", value=" " + GENESIS.nonce.hex()),
        edited("nonce", value=None),
        edited("nonce", value=["ab"]),
        edited("nonce", value=7),
        edited("members", value={}),
        edited("members", value=[]),
        edited("members", value=[[]]),
        edited("members", value="x"),
        edited("members", 0, value=None),
        edited("members", 0, "role", value="king"),
        edited("members", 0, "role", value=["operator"]),
        edited("members", 0, "name", value="\ud800"),
        edited("members", 0, "name", value="a\n"),
        edited("members", 0, "scheme", value=True),
        edited("members", 0, "scheme", value="1"),
        edited("members", 0, "scheme", value=256),
        edited("created_ms", value=1.0),
        edited("created_ms", value=-1),
        edited("created_ms", value=2**64),
        edited("created_ms", value=10**30),
        edited("created_ms", value=float("nan")),
        edited("created_ms", value="1_000"),
        edited("version", value=2),
        edited("name", value="has space"),
        edited("certificate_scheme", value=""),
        edited("groups", 0, "share_keys", value=[]),
        edited("groups", 0, "share_keys", value="ab"),
        edited("groups", 0, "threshold", value=0),
        edited("thresholds", value=[]),
        edited("parameters", value=None),
        edited("parameters", "heartbeat_ms", value=0),
        TEXT.replace(b'"version": 1,', b'"version": 1, "version": 1,'),
        TEXT.replace(b'"version": 1,', b""),
        TEXT.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + TEXT,
        b"",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"version": ' + b"9" * 5_000 + b"}",
    ],
)
def test_file_that_is_not_exactly_a_genesis_is_refused(text):
    refused(text)


@pytest.mark.parametrize("position", range(len(GENESIS.__struct_fields__)))
def test_missing_field_is_refused(position):
    parsed = json.loads(TEXT)
    del parsed[GENESIS.__struct_fields__[position]]
    refused(json.dumps(parsed).encode())


def test_oversized_file_is_refused_unread():
    refused(b" " * (MAX_JSON_BYTES + 1), Reason.OVERSIZED)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(TEXT) - 1), replacement=st.binary(max_size=3))
def test_mutated_file_is_refused_or_another_genesis_but_never_a_crash(position, replacement):
    try:
        genesis = genesis_from_json(TEXT[:position] + replacement + TEXT[position + 1 :])
    except Rejected:
        return
    assert genesis_from_json(genesis_to_json(genesis)) == genesis


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_without_another_exception(text):
    with pytest.raises(Rejected):
        genesis_from_json(text)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, len(encode(GENESIS)) - 1), mask=st.integers(1, 255))
def test_any_changed_byte_of_the_wire_form_gives_another_chain(position, mask):
    changed = bytearray(encode(GENESIS))
    changed[position] ^= mask
    try:
        genesis = decode(bytes(changed), Genesis, MAX_GENESIS_BYTES)
    except Rejected:
        return
    assert genesis.chain_id != GENESIS.chain_id


def test_members_secrets_follow_from_their_own_seed_alone():
    """Another member's seed changes nothing of what a member keeps, but its share of a joint key."""
    plans = [
        MemberPlan(f"m-{i}", role, seed_bytes(0, "m", i))
        for i, role in enumerate((Role.DATA_SOURCE, Role.DATA_SOURCE, Role.GOVERNANCE, Role.OPERATOR))
    ]
    other = [MemberPlan("m-0", Role.DATA_SOURCE, seed_bytes(1, "m", 0)), *plans[1:]]
    first, second = (
        generate_genesis(name="x", nonce=bytes(32), created_ms=0, plans=chosen) for chosen in (plans, other)
    )
    assert first[0].members[1:] == second[0].members[1:]
    assert first[0].groups[1:] == second[0].groups[1:]
    assert first[0].members[0] != second[0].members[0]
    kept = first[1]["m-1"]
    assert len({kept.identity_seed, kept.transport_seed, kept.log_seed}) == 3


def test_secrets_fit_the_genesis_and_are_not_shown():
    for member in GENESIS.members:
        kept = SECRETS[member.name]
        assert kept.identity.public_key == member.identity_key
        assert Ed25519SigningKey(kept.identity_seed).public_key == member.identity_key
        assert Ed25519SigningKey(kept.transport_seed).public_key == member.transport_key
        if member.role is Role.VERIFIER:
            assert (kept.log_seed, kept.key_share) == (None, None)
        else:
            assert kept.log_seed is not None
            assert Ed25519SigningKey(kept.log_seed).public_key == member.log_key
        for secret in (kept.identity_seed, kept.transport_seed):
            assert repr(secret) not in repr(kept)
    plan = MemberPlan("m", Role.OPERATOR, b"q" * 32)
    assert "qqq" not in repr(plan)


def test_list_certificates_need_no_key_share():
    genesis, secrets = make_genesis(certificate_scheme=ED25519_LIST)
    assert all(kept.key_share is None for kept in secrets.values())
    assert genesis.groups == ()


@pytest.mark.parametrize(("nonce", "seed"), [(bytes(31), bytes(32)), (bytes(32), bytes(31))])
def test_short_nonce_or_seed_is_refused(nonce, seed):
    plans = [MemberPlan("a", Role.OPERATOR, seed)]
    with pytest.raises(Rejected, match="32 bytes"):
        generate_genesis(name="x", nonce=nonce, created_ms=0, plans=plans)


def test_signer_is_of_the_scheme_asked_for():
    assert isinstance(signer_for(SignatureScheme.ED25519, bytes(32)), Ed25519SigningKey)
    assert isinstance(signer_for(SignatureScheme.ML_DSA_65, bytes(32)), MlDsa65SigningKey)


def test_unlikely_sizes_decode():
    """A genesis of many members stays within the bounds of file and wire."""
    genesis, _ = make_genesis({"data-source": 30, "governance": 30, "operator": 30}, certificate_scheme=ED25519_LIST)
    assert len(genesis_to_json(genesis)) < MAX_JSON_BYTES
    assert genesis_from_json(genesis_to_json(genesis)) == genesis
    assert msgspec.structs.replace(genesis) == genesis


def test_text_that_has_no_bytes_is_refused() -> None:
    genesis, _ = make_genesis()
    encoded = genesis_to_json(genesis).replace(b'"countersign.example/test"', b'"\\ud800"')
    with pytest.raises(Rejected) as refusal:
        genesis_from_json(encoded)
    assert refusal.value.reason is Reason.MALFORMED
