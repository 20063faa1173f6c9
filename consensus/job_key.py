"""Job keys: how the key that an operator delegated to a campaign is named on the log, and how it signs.

A job key belongs to no member, so an event must bring all that its signature is verified with. Its *id* is what a
delegation names and what its signatures are filed under:

=============  ====================================  ==========================================  =====
scheme         id, 32 bytes                          signature field                             bytes
=============  ====================================  ==========================================  =====
Ed25519        the public key itself                 the signature                                  64
ML-DSA-65      ``tagged_hash`` of the public key     the public key, then the signature          5,261
=============  ====================================  ==========================================  =====

In place of the signature either has what ``batch_signature.py`` makes of one for many events, which is longer. No
length is one of both schemes: the length of the field names the scheme, the id binds the key. That the scheme is the
delegated one, and one that the policy admits, needs state: ``campaign_rules.py``.
"""

from collections.abc import Sequence

from consensus.batch_signature import MAX_WAY_BYTES, is_field_length, sign_messages, verify_field
from consensus.identifiers import JobKey, Tag, tagged_hash
from consensus.keys import (
    ML_DSA_65_KEY_BYTES,
    ML_DSA_65_SIGNATURE_BYTES,
    SignatureScheme,
    Signer,
    check_public_key,
)
from consensus.rejection import Reason, Rejected

MAX_JOB_SIGNATURE_BYTES = ML_DSA_65_KEY_BYTES + ML_DSA_65_SIGNATURE_BYTES + MAX_WAY_BYTES

_KEY_BYTES = {SignatureScheme.ED25519: 0, SignatureScheme.ML_DSA_65: ML_DSA_65_KEY_BYTES}
"""How much of a field is the public key."""


def job_key_id(key: Signer) -> JobKey:
    """What the log calls this key."""
    return _id_of(key.scheme, key.public_key)


def check_job_key_id(scheme: SignatureScheme, identifier: bytes) -> None:
    """The id can be one of a key of ``scheme``; a hash cannot be told from any other 32 bytes.

    Raises:
        Rejected: ``BAD_KEY``.
    """
    if scheme == SignatureScheme.ED25519:
        check_public_key(scheme, identifier)


def sign_as_job(key: Signer, messages: Sequence[bytes]) -> list[bytes]:
    """The signature fields of events that this job key signs together; alone, if there is one."""
    fields = sign_messages(key, messages)
    return [key.public_key + field for field in fields] if _KEY_BYTES[key.scheme] else fields


def scheme_of(field: bytes) -> SignatureScheme:
    """The scheme of a job key's signature field.

    Raises:
        Rejected: ``BAD_SIGNATURE`` for a length that no scheme has.
    """
    for scheme, key_bytes in _KEY_BYTES.items():
        if is_field_length(len(field) - key_bytes, scheme):
            return scheme
    raise Rejected(Reason.BAD_SIGNATURE, f"a job key's signature of {len(field)} bytes, a length that no scheme has")


def verify_job_signature(identifier: bytes, message: bytes, field: bytes) -> None:
    """The field is a signature over ``message`` by the job key with this id.

    Raises:
        Rejected: ``BAD_SIGNATURE``.
    """
    scheme = scheme_of(field)
    key_bytes = _KEY_BYTES[scheme]
    if not key_bytes:
        verify_field(scheme, identifier, message, field)
        return
    key = field[:key_bytes]
    if _id_of(scheme, key) != identifier:
        raise Rejected(Reason.BAD_SIGNATURE, f"the signature brings another key than job key {identifier.hex()}")
    verify_field(scheme, key, message, field[key_bytes:])


def _id_of(scheme: SignatureScheme, public_key: bytes) -> JobKey:
    if scheme == SignatureScheme.ED25519:
        return JobKey(public_key)
    return JobKey(tagged_hash(Tag.JOB_KEY, bytes([scheme]), public_key))
