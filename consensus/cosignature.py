"""What witnesses sign of a checkpoint: that it continues every one they signed before, and when they saw it.

C2SP tlog-cosignature. A *cosignature* is a signature line of a note, ``timestamp ‖ signature`` behind the key id, whose
text is a checkpoint. Who trusts a witness need not trust the log to show everybody the same history.

- Ed25519 (type 0x04) signs ``cosignature/v1``, ``time SECONDS`` and the note's text, a line each.
- ML-DSA-44 (type 0x06, FIPS 204, empty context) signs a structure of the cosigner's name, the time, and the
  checkpoint's origin, size and root.
- A plain note signature (type 0x01) by a key given as a witness's is taken too, without a time: so members sign.

A signature of an unknown (name, key id) is ignored; one of a known key that does not verify condemns the note. The
time is the witness's word: whether it is recent enough is the caller's question.
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from consensus.checkpoint import (
    KEY_ID_BYTES,
    join_verifier_key,
    parse_checkpoint,
    split_note,
    split_verifier_key,
    typed_key_id,
)
from consensus.keys import (
    ED25519_KEY_BYTES,
    ED25519_SIGNATURE_BYTES,
    ML_DSA_44_KEY_BYTES,
    ML_DSA_44_SIGNATURE_BYTES,
    Ed25519SigningKey,
    MlDsa44SigningKey,
    SignatureScheme,
    check_public_key,
    verify,
    verify_ml_dsa_44,
)
from consensus.rejection import Reason, Rejected

TIMESTAMP_BYTES = 8
MAX_TIMESTAMP = (1 << 63) - 1
MAX_NAME_BYTES = 255
"""Of the names in what ML-DSA-44 signs."""
_ED25519_HEADER = b"cosignature/v1\n"
_ML_DSA_LABEL = b"subtree/v1\n\x00"


class WitnessKeyType(IntEnum):
    """The type byte of a verifier key (C2SP signed-note)."""

    NOTE_ED25519 = 0x01
    ED25519 = 0x04
    ML_DSA_44 = 0x06

    @property
    def label(self) -> str:
        """Its name on command lines and in key files."""
        return self.name.lower().replace("_", "-")


_KEY_BYTES = {
    WitnessKeyType.NOTE_ED25519: ED25519_KEY_BYTES,
    WitnessKeyType.ED25519: ED25519_KEY_BYTES,
    WitnessKeyType.ML_DSA_44: ML_DSA_44_KEY_BYTES,
}
_SIGNED_BYTES = {
    WitnessKeyType.NOTE_ED25519: ED25519_SIGNATURE_BYTES,
    WitnessKeyType.ED25519: TIMESTAMP_BYTES + ED25519_SIGNATURE_BYTES,
    WitnessKeyType.ML_DSA_44: TIMESTAMP_BYTES + ML_DSA_44_SIGNATURE_BYTES,
}


@dataclass(frozen=True, slots=True)
class WitnessKey:
    """A witness by name and public key: 32 bytes, of ML-DSA-44 1,312."""

    name: str
    type: WitnessKeyType
    public_key: bytes

    @property
    def key_id(self) -> bytes:
        """The 4 bytes that its signatures begin with.

        Raises:
            Rejected: ``BAD_CHECKPOINT`` for a name that cannot stand in a note.
        """
        return typed_key_id(self.name, bytes([self.type]) + self.public_key)


class Cosigner(Protocol):
    """A witness's signing key."""

    @property
    def type(self) -> WitnessKeyType:
        """How it signs."""

    @property
    def public_key(self) -> bytes:
        """What its signatures are verified with."""

    def sign(self, message: bytes) -> bytes:
        """Signature over ``message``."""


class Ed25519Cosigner(Ed25519SigningKey):
    """An Ed25519 key from its 32-byte seed."""

    __slots__ = ()
    type = WitnessKeyType.ED25519


class MlDsa44Cosigner(MlDsa44SigningKey):
    """An ML-DSA-44 key from its 32-byte seed."""

    __slots__ = ()
    type = WitnessKeyType.ML_DSA_44


COSIGNERS: dict[str, type[Ed25519Cosigner] | type[MlDsa44Cosigner]] = {
    cosigner.type.label: cosigner for cosigner in (Ed25519Cosigner, MlDsa44Cosigner)
}
"""By label."""


def encode_witness_key(name: str, cosigner: Cosigner) -> str:
    """How a witness's key is handed around: ``name+hexkeyid+base64(type ‖ key)``.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` for a name that cannot stand in a note.
    """
    return join_verifier_key(name, bytes([cosigner.type]) + cosigner.public_key)


def parse_witness_key(encoded: str) -> WitnessKey:
    """A witness's key, of one of the three types.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when it is malformed, of another type, or its id is wrong; ``BAD_KEY`` for no key.
    """
    name, typed_key = split_verifier_key(encoded)
    if not typed_key or typed_key[0] not in tuple(WitnessKeyType):
        raise _rejected(f"a witness key of type {typed_key[:1].hex() or 'none'}, expected 01, 04 or 06")
    key = WitnessKey(name, WitnessKeyType(typed_key[0]), typed_key[1:])
    if len(key.public_key) != _KEY_BYTES[key.type]:
        raise _rejected(f"a public key of {len(key.public_key)} bytes, expected {_KEY_BYTES[key.type]}")
    if key.type is not WitnessKeyType.ML_DSA_44:
        check_public_key(SignatureScheme.ED25519, key.public_key)
    return key


def cosign(text: bytes, name: str, cosigner: Cosigner, timestamp: int) -> bytes:
    """A witness's signature line for a checkpoint's text. ``timestamp`` is in seconds of Unix time.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when the text is no checkpoint, the name cannot stand in a note, or the time is out
            of bounds.
    """
    key = WitnessKey(name, cosigner.type, cosigner.public_key)
    message = _message(key, text, timestamp)
    stamped = key.key_id + timestamp.to_bytes(TIMESTAMP_BYTES, "big") + cosigner.sign(message)
    return f"— {name} {b64encode(stamped).decode()}\n".encode()


def verify_cosignatures(note: bytes, keys: Sequence[WitnessKey]) -> dict[str, int | None]:
    """The witnesses in ``keys`` that signed the checkpoint of a note, at least one, each with its time.

    Times are in seconds of Unix time, the newest where a witness signed more than once; None of a plain signature, and
    of a witness that signed without a time.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when it is no checkpoint's note, a known key's signature does not verify, or no
            known key signed.
    """
    text, signatures = split_note(note)
    parse_checkpoint(text)
    known = {(key.name, key.key_id): key for key in keys}
    found: dict[str, int | None] = {}
    for name, stamped in signatures:
        key = known.get((name, stamped[:KEY_ID_BYTES]))
        if key is not None:
            seconds = _verified(key, text, stamped[KEY_ID_BYTES:])
            found[name] = max(seconds, found.get(name) or 0) or None
    if not found:
        raise _rejected(f"none of {len(signatures)} signatures is by one of the {len(keys)} witnesses")
    return found


def _verified(key: WitnessKey, text: bytes, signed: bytes) -> int:
    """The time of a signature that verifies; 0 where it has none."""
    if len(signed) != _SIGNED_BYTES[key.type]:
        raise _rejected(f"a signature of {len(signed)} bytes by {key.name!r}, expected {_SIGNED_BYTES[key.type]}")
    if key.type is WitnessKeyType.NOTE_ED25519:
        seconds, message, signature = 0, text, signed
    else:
        seconds, signature = int.from_bytes(signed[:TIMESTAMP_BYTES], "big"), signed[TIMESTAMP_BYTES:]
        message = _message(key, text, seconds)
    try:
        if key.type is WitnessKeyType.ML_DSA_44:
            verify_ml_dsa_44(key.public_key, message, signature)
        else:
            verify(SignatureScheme.ED25519, key.public_key, message, signature)
    except Rejected as error:
        raise _rejected(f"the signature of {key.name!r} does not verify") from error
    return seconds


def _message(key: WitnessKey, text: bytes, timestamp: int) -> bytes:
    """What a witness signs."""
    if not 0 <= timestamp <= MAX_TIMESTAMP:
        raise _rejected(f"a cosignature of time {timestamp}, expected 0 to {MAX_TIMESTAMP}")
    checkpoint = parse_checkpoint(text)
    if key.type is WitnessKeyType.ED25519:
        return _ED25519_HEADER + f"time {timestamp}\n".encode() + text
    span = bytes(8) + checkpoint.size.to_bytes(8, "big")
    named = _short(key.name) + timestamp.to_bytes(8, "big") + _short(checkpoint.origin)
    return _ML_DSA_LABEL + named + span + checkpoint.root


def _short(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > MAX_NAME_BYTES:
        raise _rejected(f"a name of {len(encoded)} bytes, at most {MAX_NAME_BYTES} allowed")
    return bytes([len(encoded)]) + encoded


def _rejected(detail: str) -> Rejected:
    return Rejected(Reason.BAD_CHECKPOINT, detail)
