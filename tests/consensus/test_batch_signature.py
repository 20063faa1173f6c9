"""One signature for many messages: each verifies alone, in any order, and nothing else does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules_fixtures import assert_malformed

from consensus import batch_signature
from consensus.batch_signature import (
    MAX_BATCH,
    MAX_WAY_BYTES,
    PLACE_BYTES,
    is_field_length,
    sign_messages,
    verify_field,
)
from consensus.identifiers import Tag, tagged_message
from consensus.keys import SignatureScheme, signer_for
from consensus.merkle import leaf_hash, root_of
from consensus.rejection import InvariantBroken, Reason

SEED = bytes(range(32))
KEYS = [signer_for(scheme, SEED) for scheme in SignatureScheme]
ED25519, ML_DSA = KEYS
SIGNATURE_BYTES = {SignatureScheme.ED25519: 64, SignatureScheme.ML_DSA_65: 3_309}


def messages(count: int) -> list[bytes]:
    return [b"message %d" % number for number in range(count)]


FIELDS = {count: sign_messages(ED25519, messages(count)) for count in (1, 2, 3, 5, 8, 13)}


@pytest.mark.parametrize("key", KEYS, ids=[key.scheme.label for key in KEYS])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 33])
def test_each_message_verifies_by_its_own_field_alone(key, count: int) -> None:  # type: ignore[no-untyped-def]
    said = messages(count)
    fields = sign_messages(key, said)
    for message, field in zip(reversed(said), reversed(fields), strict=True):
        verify_field(key.scheme, key.public_key, message, field)
        assert is_field_length(len(field), key.scheme)
        for other in said:
            if other != message:
                assert_malformed(
                    lambda other=other, field=field: verify_field(key.scheme, key.public_key, other, field),  # type: ignore[misc]
                    Reason.BAD_SIGNATURE,
                )


def test_single_message_is_signed_plainly_and_none_not_at_all() -> None:
    assert sign_messages(ED25519, [b"alone"]) == [ED25519.sign(b"alone")]
    assert sign_messages(ED25519, []) == []


def test_signature_is_over_size_and_root() -> None:
    field = FIELDS[3][1]
    root = root_of([leaf_hash(message) for message in messages(3)])
    signed = tagged_message(Tag.EVENT_BATCH, (3).to_bytes(4, "big"), root)
    assert field[:64] == ED25519.sign(signed)
    assert field[64 : 64 + PLACE_BYTES] == (1).to_bytes(4, "big") + (3).to_bytes(4, "big")


def test_batch_may_be_as_large_as_its_bound_and_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    way = PLACE_BYTES + 32 * (MAX_BATCH - 1).bit_length()
    assert way == MAX_WAY_BYTES
    monkeypatch.setattr(batch_signature, "MAX_BATCH", 4)
    with pytest.raises(InvariantBroken, match="5 messages under one signature, at most 4"):
        sign_messages(ED25519, messages(5))
    field = FIELDS[5][0]
    assert_malformed(
        lambda: verify_field(ED25519.scheme, ED25519.public_key, messages(5)[0], field), Reason.BAD_SIGNATURE
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_changed_bit_of_a_field_is_refused(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from(sorted(FIELDS)))
    number = data.draw(st.integers(0, count - 1))
    field = bytearray(FIELDS[count][number])
    # Every root that holds is remembered first: what is remembered must not let a changed field through.
    verify_field(ED25519.scheme, ED25519.public_key, messages(count)[number], bytes(field))
    field[data.draw(st.integers(0, len(field) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert_malformed(
        lambda: verify_field(ED25519.scheme, ED25519.public_key, messages(count)[number], bytes(field)),
        Reason.BAD_SIGNATURE,
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_field_of_any_other_length_is_refused(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from(sorted(FIELDS)))
    field = FIELDS[count][0]
    cut = data.draw(st.integers(0, len(field) - 1))
    more = data.draw(st.binary(min_size=1, max_size=700))
    for changed in (field[:cut], field + more):
        assert_malformed(
            lambda changed=changed: verify_field(ED25519.scheme, ED25519.public_key, messages(count)[0], changed),  # type: ignore[misc]
            Reason.BAD_SIGNATURE,
        )


@pytest.mark.parametrize(("index", "size"), [(0, 0), (0, 1), (2, 2), (0, MAX_BATCH + 1), (1, 3), (0, 2**32 - 1)])
def test_place_that_the_path_does_not_lead_from_is_refused(index: int, size: int) -> None:
    field = FIELDS[2][0]
    changed = field[:64] + index.to_bytes(4, "big") + size.to_bytes(4, "big") + field[72:]
    assert_malformed(
        lambda: verify_field(ED25519.scheme, ED25519.public_key, messages(2)[0], changed), Reason.BAD_SIGNATURE
    )


def test_field_of_another_key_is_refused_though_its_root_was_just_verified() -> None:
    other = signer_for(SignatureScheme.ED25519, bytes(32))
    field = FIELDS[2][0]
    verify_field(ED25519.scheme, ED25519.public_key, messages(2)[0], field)
    assert_malformed(lambda: verify_field(other.scheme, other.public_key, messages(2)[0], field), Reason.BAD_SIGNATURE)


def test_plain_signature_over_a_root_is_not_one_over_a_message() -> None:
    """A batch's signature, taken alone, signs nothing that a message can be: it has a tag of its own."""
    root = root_of([leaf_hash(message) for message in messages(2)])
    signature = FIELDS[2][0][:64]
    for message in (root, leaf_hash(root), *messages(2)):
        assert_malformed(
            lambda message=message: verify_field(ED25519.scheme, ED25519.public_key, message, signature),  # type: ignore[misc]
            Reason.BAD_SIGNATURE,
        )


def test_inner_node_is_no_message() -> None:
    """A path cut short would make a message of an inner node, were leaves not hashed apart and the size not signed."""
    field = FIELDS[8][0]
    leaves = [leaf_hash(message) for message in messages(8)]
    inner = b"\x01" + leaves[0] + leaves[1]
    shorter = field[:64] + (0).to_bytes(4, "big") + (4).to_bytes(4, "big") + field[104:]
    assert_malformed(lambda: verify_field(ED25519.scheme, ED25519.public_key, inner, shorter), Reason.BAD_SIGNATURE)


def test_lengths_of_the_two_schemes_are_disjoint() -> None:
    lengths = {scheme: {n for n in range(6_000) if is_field_length(n, scheme)} for scheme in SignatureScheme}
    assert {scheme: min(found) for scheme, found in lengths.items()} == SIGNATURE_BYTES
    assert {len(found) for found in lengths.values()} == {17}
    with_key = {length + 1_952 for length in lengths[SignatureScheme.ML_DSA_65]}
    assert not lengths[SignatureScheme.ED25519] & (lengths[SignatureScheme.ML_DSA_65] | with_key)


def test_unknown_scheme_is_named() -> None:
    assert_malformed(lambda: verify_field(3, ED25519.public_key, b"m", bytes(64)), Reason.BAD_KEY)
