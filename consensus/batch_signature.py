"""One signature for many messages: what a signer puts under each, and how each is verified by itself.

A signer with many messages at once signs the root of the RFC 9162 tree over them, and each message brings that
signature with its own way up to the root ("Batch Signatures, Revisited", eprint 2023/492, section 3). Its *signature
field* is one of two::

    plain   signature over the message
    batch   signature over M(event-batch, u32(size), root) ‖ u32(index) ‖ u32(size) ‖ path, 32 bytes a hash

A message's leaf is its RFC 9162 leaf hash. The field's length tells the two apart: the signature's is its scheme's.
A batch binds nobody to its other messages: each verifies, is refused or is left out as if it were signed alone.

Whoever verifies the messages of a batch one after the other checks its signature once: roots that held are remembered,
a bounded number. Which messages, and by whose key, is left to ``event.py`` and ``job_key.py``.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from consensus.identifiers import DIGEST_BYTES, Tag, tagged_message
from consensus.keys import ED25519_SIGNATURE_BYTES, ML_DSA_65_SIGNATURE_BYTES, SignatureScheme, Signer, verify
from consensus.merkle import inclusion_proofs_of, inclusion_root, leaf_hash
from consensus.rejection import InvariantBroken, Reason, Rejected

MAX_BATCH = 1 << 16
"""Messages under one signature."""

PLACE_BYTES = 8
MAX_WAY_BYTES = PLACE_BYTES + DIGEST_BYTES * (MAX_BATCH - 1).bit_length()
"""The longest that a batch adds to a signature."""

_SIGNATURE_BYTES: Mapping[int, int] = {
    SignatureScheme.ED25519: ED25519_SIGNATURE_BYTES,
    SignatureScheme.ML_DSA_65: ML_DSA_65_SIGNATURE_BYTES,
}
_REMEMBERED_ROOTS = 256


def sign_messages(key: Signer, messages: Sequence[bytes]) -> list[bytes]:
    """The signature field of each message; a single one is signed plainly.

    Raises:
        InvariantBroken: more than ``MAX_BATCH`` messages.
    """
    if len(messages) < 2:
        return [key.sign(message) for message in messages]
    if len(messages) > MAX_BATCH:
        raise InvariantBroken(f"{len(messages)} messages under one signature, at most {MAX_BATCH} allowed")
    leaves = [leaf_hash(message) for message in messages]
    root, paths = inclusion_proofs_of(leaves)
    size = len(messages).to_bytes(4, "big")
    signature = key.sign(tagged_message(Tag.EVENT_BATCH, size, root))
    return [b"".join((signature, index.to_bytes(4, "big"), size, *path)) for index, path in enumerate(paths)]


def is_field_length(length: int, scheme: int) -> bool:
    """A signature field of a known ``scheme`` can be so many bytes long."""
    way = length - _SIGNATURE_BYTES[scheme]
    return way == 0 or (PLACE_BYTES < way <= MAX_WAY_BYTES and (way - PLACE_BYTES) % DIGEST_BYTES == 0)


def verify_field(scheme: int, key: bytes, message: bytes, field: bytes) -> None:
    """``field`` is the signature field of ``key`` under ``message``.

    Raises:
        Rejected: ``BAD_KEY``, ``BAD_SIGNATURE``.
    """
    length = _SIGNATURE_BYTES.get(scheme)
    if length is None or len(field) <= length:
        verify(scheme, key, message, field)
        return
    if not is_field_length(len(field), scheme):
        raise Rejected(Reason.BAD_SIGNATURE, f"a signature field of {len(field)} bytes, a length that none has")
    way = field[length:]
    _verify_root(scheme, key, way[4:PLACE_BYTES], _root_above(message, way), field[:length])


def _root_above(message: bytes, way: bytes) -> bytes:
    """The batch's root, as the way up from ``message`` gives it: its place in the batch, then the path."""
    index, size = int.from_bytes(way[:4], "big"), int.from_bytes(way[4:PLACE_BYTES], "big")
    if not 2 <= size <= MAX_BATCH:
        raise Rejected(Reason.BAD_SIGNATURE, f"a batch of {size} messages, expected 2 to {MAX_BATCH}")
    path = [way[start : start + DIGEST_BYTES] for start in range(PLACE_BYTES, len(way), DIGEST_BYTES)]
    try:
        return inclusion_root(leaf_hash(message), index, size, path)
    except Rejected as error:
        raise Rejected(Reason.BAD_SIGNATURE, f"the way up a batch: {error.detail}") from error


@lru_cache(maxsize=_REMEMBERED_ROOTS)
def _verify_root(scheme: int, key: bytes, size: bytes, root: bytes, signature: bytes) -> None:
    verify(scheme, key, tagged_message(Tag.EVENT_BATCH, size, root), signature)
