"""Identity signatures: Ed25519 (RFC 8032) and ML-DSA-65 (FIPS 204).

Every verifier must accept exactly the same signatures, or one set of votes splits the members in two.
Ed25519 is therefore verified by libsodium alone, which refuses non-canonical ``S``, non-canonical and
small-order public keys; other libraries accept some of them. Its releases differ too: later ones verify with
the cofactor, earlier ones without, and a signer can make signatures that only one of the two accepts. Both
equations agree where key and ``R`` lie in the prime-order subgroup, as every honest signer's do; any other
signature is refused ("Taming the many EdDSAs", SSR 2020, eprint 2020/1244, section 3). The key is checked always; with
it, the equation without cofactor holds for an ``R`` of prime order alone, so ``R`` is checked (43 µs) only where the
libsodium at hand, asked once about case 4 of that paper's table 6, turns out to use the cofactor.

ML-DSA-65 signatures are hedged: signing the same message twice gives different bytes, both valid.
Key storage and randomness for seeds are left to the node.
"""

from enum import IntEnum
from functools import lru_cache
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.mldsa import (
    MLDSA44PrivateKey,
    MLDSA44PublicKey,
    MLDSA65PrivateKey,
    MLDSA65PublicKey,
)
from nacl.bindings import crypto_core_ed25519_is_valid_point, crypto_scalarmult, crypto_sign_open
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.signing import SigningKey

from consensus.rejection import Reason, Rejected

SEED_BYTES = 32
ED25519_KEY_BYTES = 32
ED25519_SIGNATURE_BYTES = 64
ML_DSA_44_KEY_BYTES = 1_312
ML_DSA_44_SIGNATURE_BYTES = 2_420
ML_DSA_65_KEY_BYTES = 1_952
ML_DSA_65_SIGNATURE_BYTES = 3_309

_CACHED_KEYS = 1_024


class SignatureScheme(IntEnum):
    """How a member or an author signs; the value is on the wire."""

    ED25519 = 1
    ML_DSA_65 = 2

    @property
    def label(self) -> str:
        """Its name in policies and on command lines: ``ed25519``, ``ml-dsa-65``."""
        return self.name.lower().replace("_", "-")

    @classmethod
    def labelled(cls, label: str) -> "SignatureScheme":
        """The scheme of that name.

        Raises:
            Rejected: ``BAD_KEY``.
        """
        for scheme in cls:
            if scheme.label == label:
                return scheme
        raise Rejected(Reason.BAD_KEY, f"signature scheme '{label}' is unknown")


_ED25519 = SignatureScheme.ED25519
"""Bound once: Python 3.11 looks a member of an enumeration up through a property, and most signatures ask for it."""


class Signer(Protocol):
    """A signing key that can name itself."""

    @property
    def scheme(self) -> SignatureScheme:
        """How it signs."""

    @property
    def public_key(self) -> bytes:
        """What its signatures are verified with."""

    def sign(self, message: bytes) -> bytes:
        """Signature over ``message``."""


class Ed25519SigningKey:
    """An Ed25519 key from its 32-byte seed (RFC 8032 §5.1.5)."""

    __slots__ = ("_key", "_public_key")

    def __init__(self, seed: bytes) -> None:
        _check_seed(seed)
        self._key = SigningKey(seed)
        self._public_key = bytes(self._key.verify_key)

    @property
    def scheme(self) -> SignatureScheme:
        """``ED25519``."""
        return SignatureScheme.ED25519

    @property
    def public_key(self) -> bytes:
        """32 bytes."""
        return self._public_key

    def sign(self, message: bytes) -> bytes:
        """64 bytes, the same for the same message."""
        return bytes(self._key.sign(message).signature)

    def __repr__(self) -> str:
        return f"Ed25519SigningKey(public_key={self._public_key.hex()})"


class _MlDsaSigningKey:
    """An ML-DSA key from its 32-byte seed (FIPS 204 §5.1); its signatures differ each time."""

    __slots__ = ("_key", "_public_key")

    def __init__(self, seed: bytes, kind: type[MLDSA44PrivateKey] | type[MLDSA65PrivateKey]) -> None:
        _check_seed(seed)
        self._key = kind.from_seed_bytes(seed)
        self._public_key = self._key.public_key().public_bytes_raw()

    @property
    def public_key(self) -> bytes:
        """What its signatures are verified with."""
        return self._public_key

    def sign(self, message: bytes) -> bytes:
        """Signature over ``message``, with an empty context."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(public_key={self._public_key[:16].hex()}…)"


class MlDsa65SigningKey(_MlDsaSigningKey):
    """An ML-DSA-65 key: public key of 1,952 bytes, signatures of 3,309."""

    __slots__ = ()

    def __init__(self, seed: bytes) -> None:
        super().__init__(seed, MLDSA65PrivateKey)

    @property
    def scheme(self) -> SignatureScheme:
        """``ML_DSA_65``."""
        return SignatureScheme.ML_DSA_65


class MlDsa44SigningKey(_MlDsaSigningKey):
    """An ML-DSA-44 key: public key of 1,312 bytes, signatures of 2,420. Witnesses sign with it, members do not."""

    __slots__ = ()

    def __init__(self, seed: bytes) -> None:
        super().__init__(seed, MLDSA44PrivateKey)


def verify_ml_dsa_44(key: bytes, message: bytes, signature: bytes) -> None:
    """``signature`` is one of the ML-DSA-44 ``key`` over ``message``, with an empty context (FIPS 204 §5.3).

    Raises:
        Rejected: ``BAD_KEY`` for a key of the wrong length; ``BAD_SIGNATURE``.
    """
    _check_key_length(key, ML_DSA_44_KEY_BYTES)
    _check_signature_length(signature, ML_DSA_44_SIGNATURE_BYTES)
    try:
        MLDSA44PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature as error:
        raise Rejected(Reason.BAD_SIGNATURE, f"no ML-DSA-44 signature by {key[:16].hex()}…") from error


def signer_for(scheme: SignatureScheme, seed: bytes) -> Signer:
    """The signing key of ``scheme`` that ``seed`` gives.

    Raises:
        Rejected: ``BAD_KEY`` for a seed of another length than 32 bytes.
    """
    if scheme == SignatureScheme.ML_DSA_65:
        return MlDsa65SigningKey(seed)
    return Ed25519SigningKey(seed)


def check_public_key(scheme: int, key: bytes) -> None:
    """``key`` is a usable public key of ``scheme``.

    Ed25519: canonical, on the curve, in the prime-order subgroup, not the identity.

    Raises:
        Rejected: ``BAD_KEY``.
    """
    if scheme == SignatureScheme.ED25519:
        _check_key_length(key, ED25519_KEY_BYTES)
        if not crypto_core_ed25519_is_valid_point(key):
            raise Rejected(Reason.BAD_KEY, f"{key.hex()} is no Ed25519 public key of prime order")
    elif scheme == SignatureScheme.ML_DSA_65:
        # Any 1,952 bytes decode to a key (FIPS 204 §7.2: ten-bit coefficients are all in range).
        _check_key_length(key, ML_DSA_65_KEY_BYTES)
    else:
        raise Rejected(Reason.BAD_KEY, f"signature scheme {scheme} is unknown")


def check_sealing_key(key: bytes) -> None:
    """``key`` is an X25519 public key that a secret can be shared with: no point of small order (RFC 7748 §6.1).

    Raises:
        Rejected: ``BAD_KEY``.
    """
    try:
        crypto_scalarmult(bytes(SEED_BYTES), key)
    except CryptoError as error:
        # Every secret is a multiple of the cofactor, so with such a point each of them shares zero.
        raise Rejected(Reason.BAD_KEY, f"{key.hex()} is an X25519 public key of small order") from error


def verify(scheme: int, key: bytes, message: bytes, signature: bytes) -> None:
    """``signature`` is one of ``key`` over ``message``.

    Raises:
        Rejected: ``BAD_KEY`` for an unknown scheme or a key of the wrong length; ``BAD_SIGNATURE``.
    """
    if scheme == _ED25519:
        _check_key_length(key, ED25519_KEY_BYTES)
        _check_signature_length(signature, ED25519_SIGNATURE_BYTES)
        try:
            crypto_sign_open(signature + message, key)
        except BadSignatureError as error:
            raise Rejected(Reason.BAD_SIGNATURE, f"no Ed25519 signature by {key.hex()}") from error
        if not _of_prime_order(key):
            raise Rejected(Reason.BAD_SIGNATURE, f"{key.hex()} is no Ed25519 public key of prime order")
        if _COFACTORED and not crypto_core_ed25519_is_valid_point(signature[:ED25519_KEY_BYTES]):
            raise Rejected(Reason.BAD_SIGNATURE, f"R of the signature by {key.hex()} is not of prime order")
    elif scheme == SignatureScheme.ML_DSA_65:
        _check_key_length(key, ML_DSA_65_KEY_BYTES)
        _check_signature_length(signature, ML_DSA_65_SIGNATURE_BYTES)
        try:
            MLDSA65PublicKey.from_public_bytes(key).verify(signature, message)
        except InvalidSignature as error:
            raise Rejected(Reason.BAD_SIGNATURE, f"no ML-DSA-65 signature by {key[:16].hex()}…") from error
    else:
        raise Rejected(Reason.BAD_KEY, f"signature scheme {scheme} is unknown")


@lru_cache(maxsize=_CACHED_KEYS)
def _of_prime_order(key: bytes) -> bool:
    """Cached, bounded: the few keys of a membership sign nearly everything."""
    return crypto_core_ed25519_is_valid_point(key)


def _check_seed(seed: bytes) -> None:
    if len(seed) != SEED_BYTES:
        raise Rejected(Reason.BAD_KEY, f"a seed has {SEED_BYTES} bytes, not {len(seed)}")


def _check_key_length(key: bytes, expected: int) -> None:
    if len(key) != expected:
        raise Rejected(Reason.BAD_KEY, f"public key of {len(key)} bytes, expected {expected}")


def _check_signature_length(signature: bytes, expected: int) -> None:
    if len(signature) != expected:
        raise Rejected(Reason.BAD_SIGNATURE, f"signature of {len(signature)} bytes, expected {expected}")


def _verifies_with_cofactor() -> bool:
    message = bytes.fromhex("e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec4011eaccd55b53f56c")
    key = bytes.fromhex("cdb267ce40c5cd45306fa5d2f29731459387dbf9eb933b7bd5aed9a765b88d4d")
    signature = bytes.fromhex(
        "160a1cb0dc9c0258cd0a7d23e94d8fa878bcb1925f2c64246b2dee1796bed512"
        "5ec6bc982a269b723e0668e540911a9a6a58921d6925e434ab10aa7940551a09"
    )
    try:
        crypto_sign_open(signature + message, key)
    except BadSignatureError:
        return False
    return True


_COFACTORED = _verifies_with_cofactor()
