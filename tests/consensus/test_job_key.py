"""Job keys of both schemes, alone and in batches: the id binds the key, the field's length names the scheme."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules_fixtures import assert_malformed

from consensus.identifiers import Tag, tagged_hash
from consensus.job_key import (
    MAX_JOB_SIGNATURE_BYTES,
    check_job_key_id,
    job_key_id,
    scheme_of,
    sign_as_job,
    verify_job_signature,
)
from consensus.keys import SignatureScheme, signer_for
from consensus.rejection import Reason

SEED = bytes(range(32))
MESSAGE = b"what a job says"
KEYS = [signer_for(scheme, SEED) for scheme in SignatureScheme]
ED25519, ML_DSA = KEYS


@pytest.mark.parametrize("key", KEYS, ids=[key.scheme.label for key in KEYS])
def test_job_key_verifies_by_its_id_and_field_alone(key) -> None:  # type: ignore[no-untyped-def]
    (field,) = sign_as_job(key, [MESSAGE])
    verify_job_signature(job_key_id(key), MESSAGE, field)
    assert scheme_of(field) == key.scheme
    check_job_key_id(key.scheme, job_key_id(key))
    assert_malformed(lambda: verify_job_signature(job_key_id(key), b"another", field), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("key", KEYS, ids=[key.scheme.label for key in KEYS])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_job_key_signs_many_at_once(key, count: int) -> None:  # type: ignore[no-untyped-def]
    messages = [b"event %d" % number for number in range(count)]
    fields = sign_as_job(key, messages)
    for message, field in zip(messages, fields, strict=True):
        assert scheme_of(field) == key.scheme
        assert len(field) <= MAX_JOB_SIGNATURE_BYTES
        verify_job_signature(job_key_id(key), message, field)
    assert_malformed(lambda: verify_job_signature(job_key_id(key), messages[1], fields[0]), Reason.BAD_SIGNATURE)


def test_ids_are_the_key_itself_and_the_hash_of_scheme_and_key() -> None:
    assert job_key_id(ED25519) == ED25519.public_key
    assert job_key_id(ML_DSA) == tagged_hash(Tag.JOB_KEY, b"\x02", ML_DSA.public_key)


def test_key_of_another_id_is_refused_though_its_signature_is_good() -> None:
    other = signer_for(SignatureScheme.ML_DSA_65, bytes(32))
    (field,) = sign_as_job(other, [MESSAGE])
    assert_malformed(lambda: verify_job_signature(job_key_id(ML_DSA), MESSAGE, field), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("length", [0, 63, 65, 72, 103, 616, 1_952, 3_309, 5_260, 5_262, 5_269, 5_813])
def test_field_of_a_length_no_scheme_has_is_refused(length: int) -> None:
    assert_malformed(lambda: verify_job_signature(bytes(32), MESSAGE, bytes(length)), Reason.BAD_SIGNATURE)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 5_260), bit=st.integers(0, 7))
def test_any_changed_bit_of_an_ml_dsa_field_is_refused(position: int, bit: int) -> None:
    field = bytearray(sign_as_job(ML_DSA, [MESSAGE])[0])
    field[position] ^= 1 << bit
    assert_malformed(lambda: verify_job_signature(job_key_id(ML_DSA), MESSAGE, bytes(field)), Reason.BAD_SIGNATURE)


def test_id_that_is_no_ed25519_key_is_refused_for_that_scheme_alone() -> None:
    identifier = bytes(32)
    assert_malformed(lambda: check_job_key_id(SignatureScheme.ED25519, identifier), Reason.BAD_KEY)
    check_job_key_id(SignatureScheme.ML_DSA_65, identifier)
