"""The member's secrets, encrypted in one file.

The key of the file comes from a passphrase through Argon2id; the secrets are sealed with
XSalsa20-Poly1305 (libsodium ``secretbox``). (PEM encryption is PBKDF2 with 2,048 rounds: too weak.) The
file is 0600, replaced atomically, and refused when group or others can read it. Cost parameters stand in
the file and are bounded when read, so that a planted file cannot exhaust memory. No ``repr`` and no
message shows a secret.

Which keys these seeds make is left to ``consensus.keys`` and the network.
"""

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import nacl.exceptions
import nacl.pwhash.argon2id
import nacl.secret
import nacl.utils

from consensus.rejection import ConfigError
from node.files import PRIVATE_MODE, read_private, replace_private, require_absent, write_new

PASSPHRASE_VARIABLE = "COUNTERSIGN_PASSPHRASE"
MAX_KEYSTORE_BYTES = 1 << 20

_Seed = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_MAX_MEMORY_BYTES = 1 << 30


class KeyCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Argon2id cost: passes over ``memory_bytes``. The default is libsodium's *moderate*, about 0.7 s."""

    operations: Annotated[int, msgspec.Meta(ge=1, le=16)] = nacl.pwhash.argon2id.OPSLIMIT_MODERATE
    memory_bytes: Annotated[int, msgspec.Meta(ge=8_192, le=_MAX_MEMORY_BYTES)] = nacl.pwhash.argon2id.MEMLIMIT_MODERATE


MODERATE_COST = KeyCost()


class Secrets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a member must keep to itself; each seed 32 bytes.

    ``identity_seed`` signs votes and events, ``transport_seed`` is the libp2p host key, ``log_seed`` signs
    checkpoints, ``bls_share`` is the share of the role's group key (none before the ceremony, for a
    verifier, or under a scheme without BLS), ``job_keys`` are delegated job keys by name. ``ceremony_seed`` makes all
    of a member's keys and is here only while a ceremony lasts, as is ``ceremony_dealt_over``: the commitments it dealt
    over, which it must never deal over others of.
    """

    identity_seed: _Seed
    transport_seed: _Seed
    log_seed: _Seed
    bls_share: _Seed | None = None
    ceremony_seed: _Seed | None = None
    ceremony_dealt_over: bytes = b""
    job_keys: dict[str, _Seed] = msgspec.field(default_factory=dict)

    def __repr__(self) -> str:
        return "Secrets(hidden)"

    @classmethod
    def generate(cls) -> "Secrets":
        """Fresh seeds from the operating system, without share and job keys."""
        return cls(identity_seed=os.urandom(32), transport_seed=os.urandom(32), log_seed=os.urandom(32))


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="format", tag="countersign-keystore"):
    """The file's outer form; salt and nonce in hexadecimal, ciphertext in base64."""

    version: int
    kdf: Literal["argon2id"]
    cost: KeyCost
    salt: str
    nonce: str
    ciphertext: str


class Keystore:
    """An opened keystore: ``secrets``, and the key to ``save`` changed ones."""

    def __init__(self, path: Path, secrets: Secrets, key: bytes, salt: bytes, cost: KeyCost) -> None:
        self.path = path
        self.secrets = secrets
        self._key = key
        self._salt = salt
        self._cost = cost

    def __repr__(self) -> str:
        return f"Keystore({str(self.path)!r}, hidden)"

    @classmethod
    def create(cls, path: Path, secrets: Secrets, passphrase: bytes, cost: KeyCost = MODERATE_COST) -> "Keystore":
        """A new keystore file. Derives the key: seconds of work, for a worker thread.

        Raises:
            ConfigError: the file exists (overwriting would destroy an identity); empty passphrase.
        """
        require_absent(path)
        if not passphrase:
            raise ConfigError(f"{path}: expected a passphrase, found an empty one")
        salt = nacl.utils.random(nacl.pwhash.argon2id.SALTBYTES)
        keystore = cls(path, secrets, _derive(passphrase, salt, cost), salt, cost)
        write_new(path, keystore._sealed(secrets), PRIVATE_MODE)
        return keystore

    @classmethod
    def open(cls, path: Path, passphrase: bytes) -> "Keystore":
        """Decrypt a keystore file. Derives the key: seconds of work, for a worker thread.

        Raises:
            ConfigError: missing, readable by others, not a keystore, or the passphrase does not open it.
        """
        content = read_private(path, "keystore")
        if len(content) > MAX_KEYSTORE_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_KEYSTORE_BYTES} bytes, found {len(content)}")
        try:
            sealed = msgspec.json.decode(content, type=_Sealed)
            salt, nonce = bytes.fromhex(sealed.salt), bytes.fromhex(sealed.nonce)
            ciphertext = base64.b64decode(sealed.ciphertext, validate=True)
        except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, ValueError) as error:
            raise ConfigError(f"{path}: expected a keystore file, found: {error}") from error
        if sealed.version != 1:
            raise ConfigError(f"{path}: expected keystore version 1, found {sealed.version}")
        if len(salt) != nacl.pwhash.argon2id.SALTBYTES or len(nonce) != nacl.secret.SecretBox.NONCE_SIZE:
            raise ConfigError(f"{path}: expected a keystore file, found a salt or nonce of another length")
        key = _derive(passphrase, salt, sealed.cost)
        try:
            plaintext = nacl.secret.SecretBox(key).decrypt(ciphertext, nonce)
        except nacl.exceptions.CryptoError as error:
            raise ConfigError(
                f"{path}: the passphrase does not open this keystore (wrong passphrase, or a damaged file)"
            ) from error
        try:
            secrets = msgspec.msgpack.decode(plaintext, type=Secrets)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: expected version 1 secrets, found another content") from error
        return cls(path, secrets, key, salt, sealed.cost)

    def save(self, secrets: Secrets) -> None:
        """Replace the file by one with ``secrets`` under a fresh nonce; durable on return."""
        replace_private(self.path, self._sealed(secrets))
        self.secrets = secrets

    def _sealed(self, secrets: Secrets) -> bytes:
        encrypted = nacl.secret.SecretBox(self._key).encrypt(msgspec.msgpack.encode(secrets))
        sealed = _Sealed(
            version=1,
            kdf="argon2id",
            cost=self._cost,
            salt=self._salt.hex(),
            nonce=encrypted.nonce.hex(),
            ciphertext=base64.b64encode(encrypted.ciphertext).decode(),
        )
        return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


def read_passphrase(
    passphrase_file: Path | None, environment: Mapping[str, str], named_by: str = "node.passphrase_file"
) -> bytes:
    """The passphrase: that of the file without its final line break, else the environment's.

    ``named_by`` is how whoever asks names the file: a setting, or an option.

    Raises:
        ConfigError: neither is there, the file is readable by others, or it is empty.
    """
    if passphrase_file is not None:
        passphrase, origin = read_private(passphrase_file, "passphrase file"), str(passphrase_file)
        passphrase = passphrase.removesuffix(b"\n").removesuffix(b"\r")
    elif PASSPHRASE_VARIABLE in environment:
        passphrase, origin = os.fsencode(environment[PASSPHRASE_VARIABLE]), PASSPHRASE_VARIABLE
    else:
        raise ConfigError(f"expected {named_by} or the variable {PASSPHRASE_VARIABLE}, found neither")
    if not passphrase:
        raise ConfigError(f"{origin}: expected a passphrase, found nothing")
    return passphrase


def _derive(passphrase: bytes, salt: bytes, cost: KeyCost) -> bytes:
    key: bytes = nacl.pwhash.argon2id.kdf(
        nacl.secret.SecretBox.KEY_SIZE, passphrase, salt, cost.operations, cost.memory_bytes
    )
    return key
