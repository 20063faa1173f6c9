"""Keystore: secrets survive a round trip, and nothing else opens, shows or overwrites them."""

import contextlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.rejection import ConfigError
from node.keystore import MODERATE_COST, KeyCost, Keystore, Secrets, read_passphrase

CHEAP = KeyCost(operations=1, memory_bytes=8_192)
SECRETS = Secrets(
    identity_seed=b"I" * 32,
    transport_seed=b"T" * 32,
    log_seed=b"L" * 32,
    bls_share=b"B" * 32,
    job_keys={"run-7": b"J" * 32},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "library.keystore"
    Keystore.create(path, SECRETS, b"correct horse", CHEAP)
    return path


def test_secrets_survive_and_the_file_is_private(path: Path) -> None:
    assert Keystore.open(path, b"correct horse").secrets == SECRETS
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    assert not any(letter * 8 in content for letter in (b"I", b"T", b"L", b"B", b"J"))


def test_default_cost_is_moderate() -> None:
    assert (MODERATE_COST.operations, MODERATE_COST.memory_bytes) == (3, 256 << 20)


def test_wrong_passphrase_is_refused_in_clear_words(path: Path) -> None:
    with pytest.raises(ConfigError, match="passphrase does not open this keystore") as caught:
        Keystore.open(path, b"battery staple")
    assert "battery" not in str(caught.value)


def test_repr_shows_no_secret(path: Path) -> None:
    keystore = Keystore.open(path, b"correct horse")
    shown = repr(keystore) + repr(keystore.secrets) + str(keystore.secrets) + f"{[keystore.secrets]}"
    assert "IIII" not in shown
    assert "hidden" in shown


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o755])
def test_keystore_readable_by_others_is_refused_with_the_fix(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        Keystore.open(path, b"correct horse")


def test_existing_keystore_is_never_overwritten(path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        Keystore.create(path, Secrets.generate(), b"other", CHEAP)
    assert Keystore.open(path, b"correct horse").secrets == SECRETS


def test_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found an empty one"):
        Keystore.create(tmp_path / "k", SECRETS, b"", CHEAP)


def test_missing_keystore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Keystore.open(tmp_path / "absent", b"x")


def test_save_replaces_the_share_under_a_fresh_nonce(path: Path) -> None:
    keystore = Keystore.open(path, b"correct horse")
    before = json.loads(path.read_bytes())
    renewed = Secrets(identity_seed=b"I" * 32, transport_seed=b"T" * 32, log_seed=b"L" * 32)
    keystore.save(renewed)
    after = json.loads(path.read_bytes())
    assert before["nonce"] != after["nonce"]
    assert Keystore.open(path, b"correct horse").secrets == renewed == keystore.secrets
    assert path.stat().st_mode & 0o777 == 0o600


def test_failed_save_leaves_the_old_keystore(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    keystore = Keystore.open(path, b"correct horse")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            keystore.save(Secrets.generate())
    assert Keystore.open(path, b"correct horse").secrets == SECRETS == keystore.secrets
    keystore.save(SECRETS)


@pytest.mark.parametrize(
    "change",
    [
        {"cost": {"operations": 1, "memory_bytes": 1 << 40}},
        {"cost": {"operations": 4_000_000_000, "memory_bytes": 8_192}},
        {"kdf": "pbkdf2"},
        {"format": "something-else"},
        {"version": 2},
        {"salt": "00"},
        {"nonce": "zz"},
        {"ciphertext": "A!=="},
        {"surplus": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_altered_keystore_fields_are_refused(path: Path, change: dict[str, object]) -> None:
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | change).encode())
    with pytest.raises(ConfigError, match="expected"):
        Keystore.open(path, b"correct horse")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_flipped_byte_never_yields_other_secrets(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / "k"
    Keystore.create(path, SECRETS, b"p", CHEAP)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= flip
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):  # what still opens changed white space or hexadecimal's case
        assert Keystore.open(path, b"p").secrets == SECRETS


def test_keystore_of_other_secrets_is_refused_without_showing_them(path: Path) -> None:
    Keystore.open(path, b"correct horse").save(KeyCost())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected version 1 secrets, found another content"):
        Keystore.open(path, b"correct horse")


def test_oversized_keystore_is_refused_before_parsing(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * (1 << 20))
    with pytest.raises(ConfigError, match="expected at most"):
        Keystore.open(path, b"correct horse")


def test_generated_seeds_differ() -> None:
    secrets = Secrets.generate()
    assert len({secrets.identity_seed, secrets.transport_seed, secrets.log_seed, bytes(32)}) == 4
    assert secrets.bls_share is None


def test_passphrase_file_wins_over_environment_and_loses_only_its_line_end(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(b" from file \r\n")
    file.chmod(0o600)
    environment = {"COUNTERSIGN_PASSPHRASE": "from environment"}
    assert read_passphrase(file, environment) == b" from file "
    assert read_passphrase(None, environment) == b"from environment"


def test_unusable_passphrase_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(descriptor, b"\n")
    os.close(descriptor)
    with pytest.raises(ConfigError, match="found nothing"):
        read_passphrase(file, {})
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_passphrase(file, {})
    with pytest.raises(ConfigError, match="found neither"):
        read_passphrase(None, {})
