"""Job keys: how the key that an operator delegated to a campaign is named on the log, and how it signs.

A job key belongs to no member, so an event must bring all that its signature is verified with. Its *id* is what a
delegation names and what its signatures are filed under:

=============  ====================================  ==========================================  =====
scheme         id, 32 bytes                          signature field                             bytes
=============  ====================================  ==========================================  =====
Ed25519        the public key itself                 the signature                                  64
ML-DSA-65      ``tagged_hash`` of the public key     the public key, then the signature          5,261
=============  ====================================  ==========================================  =====

The length of the field names the scheme, the id binds the key. That the scheme is the delegated one, and one that the
policy admits, needs state: ``campaign_rules.py``.
"""

from consensus.identifiers import JobKey, Tag, tagged_hash
from consensus.keys import (
    ED25519_SIGNATURE_BYTES,
    ML_DSA_65_KEY_BYTES,
    ML_DSA_65_SIGNATURE_BYTES,
    SignatureScheme,
    Signer,
    check_public_key,
    verify,
)
from consensus.rejection import Reason, Rejected

MAX_JOB_SIGNATURE_BYTES = ML_DSA_65_KEY_BYTES + ML_DSA_65_SIGNATURE_BYTES

_SCHEMES = {
    ED25519_SIGNATURE_BYTES: SignatureScheme.ED25519,
    MAX_JOB_SIGNATURE_BYTES: SignatureScheme.ML_DSA_65,
}


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


def sign_as_job(key: Signer, message: bytes) -> bytes:
    """The signature field of an event that this job key signs."""
    signature = key.sign(message)
    return key.public_key + signature if key.scheme == SignatureScheme.ML_DSA_65 else signature


def scheme_of(field: bytes) -> SignatureScheme:
    """The scheme of a job key's signature field.

    Raises:
        Rejected: ``BAD_SIGNATURE`` for a length that no scheme has.
    """
    scheme = _SCHEMES.get(len(field))
    if scheme is None:
        lengths = " or ".join(str(length) for length in _SCHEMES)
        raise Rejected(Reason.BAD_SIGNATURE, f"a job key's signature of {len(field)} bytes, expected {lengths}")
    return scheme


def verify_job_signature(identifier: bytes, message: bytes, field: bytes) -> None:
    """The field is a signature over ``message`` by the job key with this id.

    Raises:
        Rejected: ``BAD_SIGNATURE``.
    """
    scheme = scheme_of(field)
    if scheme == SignatureScheme.ED25519:
        verify(scheme, identifier, message, field)
        return
    key, signature = field[:ML_DSA_65_KEY_BYTES], field[ML_DSA_65_KEY_BYTES:]
    if _id_of(scheme, key) != identifier:
        raise Rejected(Reason.BAD_SIGNATURE, f"the signature brings another key than job key {identifier.hex()}")
    verify(scheme, key, message, signature)


def _id_of(scheme: SignatureScheme, public_key: bytes) -> JobKey:
    if scheme == SignatureScheme.ED25519:
        return JobKey(public_key)
    return JobKey(tagged_hash(Tag.JOB_KEY, bytes([scheme]), public_key))
