"""Witnesses' cosignatures: notes of public witnesses, and notes that are no such thing.

Notes and keys of the folder ``cosigned`` are of public certificate logs and of witnesses of the transparency.dev
network.
"""

import base64
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.checkpoint import assemble_note, checkpoint_text, join_verifier_key, sign_note
from consensus.cosignature import (
    MAX_TIMESTAMP,
    Cosigner,
    Ed25519Cosigner,
    MlDsa44Cosigner,
    WitnessKey,
    WitnessKeyType,
    cosign,
    encode_witness_key,
    parse_witness_key,
    verify_cosignatures,
)
from consensus.keys import Ed25519SigningKey
from consensus.rejection import Reason, Rejected

PUBLIC = Path(__file__).with_name("cosigned")
NAME = "witness.example/w1"
TEXT = checkpoint_text("log.example/countersign", 5, bytes(range(32)))
COSIGNERS = (Ed25519Cosigner(bytes(32)), MlDsa44Cosigner(bytes(32)))


def public(which: str) -> tuple[bytes, list[WitnessKey]]:
    keys = (PUBLIC / f"{which}.keys").read_text().split()
    return (PUBLIC / f"{which}.note").read_bytes(), [parse_witness_key(key) for key in keys]


def key_of(cosigner: Cosigner, name: str = NAME) -> WitnessKey:
    return parse_witness_key(encode_witness_key(name, cosigner))


def cosigned(cosigner: Cosigner, timestamp: int, name: str = NAME) -> bytes:
    return assemble_note(TEXT, [cosign(TEXT, name, cosigner, timestamp)])


def refused(note: bytes, keys: list[WitnessKey]) -> str:
    with pytest.raises(Rejected) as caught:
        verify_cosignatures(note, keys)
    assert caught.value.reason is Reason.BAD_CHECKPOINT
    return caught.value.detail


def test_cosignatures_of_public_witnesses_verify() -> None:
    note, keys = public("ed25519")
    seen = 1_779_573_024
    assert [verify_cosignatures(note, [key]) for key in keys] == [
        {keys[0].name: None},
        *({key.name: seen} for key in keys[1:]),
    ]
    assert len(verify_cosignatures(note, keys)) == len(keys)
    note, keys = public("ml-dsa-44")
    assert [key.type for key in keys] == [WitnessKeyType.ED25519, WitnessKeyType.ML_DSA_44]
    for key in keys:
        assert verify_cosignatures(note, [key]) == {"witness.navigli.sunlight.geomys.org": 1_785_704_691}


@pytest.mark.parametrize("which", ["ed25519", "ml-dsa-44"])
def test_public_witness_of_another_checkpoint_is_refused(which: str) -> None:
    note, keys = public(which)
    origin, size, rest = note.split(b"\n", 2)
    for altered in (b"\n".join((origin, size + b"0", rest)), b"\n".join((b"other.example", size, rest))):
        for key in keys:
            assert "does not verify" in refused(altered, [key])


@pytest.mark.parametrize("cosigner", COSIGNERS, ids=lambda cosigner: cosigner.type.label)
@pytest.mark.parametrize("timestamp", [1, 1_790_000_000, MAX_TIMESTAMP])
def test_cosignature_has_its_time(cosigner: Cosigner, timestamp: int) -> None:
    assert verify_cosignatures(cosigned(cosigner, timestamp), [key_of(cosigner)]) == {NAME: timestamp}


@pytest.mark.parametrize("cosigner", COSIGNERS, ids=lambda cosigner: cosigner.type.label)
def test_time_is_signed(cosigner: Cosigner) -> None:
    line = cosign(TEXT, NAME, cosigner, 1_790_000_000)
    stamped = bytearray(base64.b64decode(line.split()[-1]))
    stamped[11] ^= 1
    altered = f"— {NAME} {base64.b64encode(stamped).decode()}\n".encode()
    assert "does not verify" in refused(assemble_note(TEXT, [altered]), [key_of(cosigner)])


def test_newest_time_of_a_witness_counts_and_a_time_of_zero_is_none() -> None:
    key = key_of(COSIGNERS[0])
    lines = [cosign(TEXT, NAME, COSIGNERS[0], timestamp) for timestamp in (7, 9, 8)]
    assert verify_cosignatures(assemble_note(TEXT, lines), [key]) == {NAME: 9}
    assert verify_cosignatures(cosigned(COSIGNERS[1], 0), [key_of(COSIGNERS[1])]) == {NAME: None}


def test_plain_signature_of_a_witness_counts_without_a_time_and_is_no_cosignature() -> None:
    signer = Ed25519SigningKey(bytes(32))
    plain = WitnessKey(NAME, WitnessKeyType.NOTE_ED25519, signer.public_key)
    note = assemble_note(TEXT, [sign_note(TEXT, NAME, signer)])
    assert verify_cosignatures(note, [plain]) == {NAME: None}
    assert "none of 1 signatures" in refused(note, [key_of(COSIGNERS[0])])
    assert "none of 1 signatures" in refused(cosigned(COSIGNERS[0], 1), [plain])


def test_strangers_are_ignored_and_a_bad_signature_of_a_known_key_condemns_the_note() -> None:
    good, bad = key_of(COSIGNERS[0]), key_of(Ed25519Cosigner(bytes([1]) * 32), "witness.example/w2")
    line = cosign(TEXT, NAME, COSIGNERS[0], 5)
    forged = f"— {bad.name} {base64.b64encode(bad.key_id + bytes(72)).decode()}\n".encode()
    note = assemble_note(TEXT, [forged, line])
    assert verify_cosignatures(note, [good]) == {NAME: 5}
    assert "does not verify" in refused(note, [good, bad])
    assert "none of 2 signatures" in refused(note, [])


@pytest.mark.parametrize("cosigner", COSIGNERS, ids=lambda cosigner: cosigner.type.label)
@pytest.mark.parametrize("cut", [1, -1, -64])
def test_signature_of_another_length_is_refused(cosigner: Cosigner, cut: int) -> None:
    key = key_of(cosigner)
    stamped = base64.b64decode(cosign(TEXT, NAME, cosigner, 5).split()[-1])
    stamped = stamped + bytes(cut) if cut > 0 else stamped[:cut]
    note = assemble_note(TEXT, [f"— {NAME} {base64.b64encode(stamped).decode()}\n".encode()])
    assert f"a signature of {len(stamped) - 4} bytes" in refused(note, [key])


def test_time_beyond_what_fits_is_refused() -> None:
    for cosigner in COSIGNERS:
        for timestamp in (-1, MAX_TIMESTAMP + 1):
            with pytest.raises(Rejected, match="a cosignature of time"):
                cosign(TEXT, NAME, cosigner, timestamp)
    key = key_of(COSIGNERS[0])
    stamped = key.key_id + bytes([0x80]) + bytes(71)
    note = assemble_note(TEXT, [f"— {NAME} {base64.b64encode(stamped).decode()}\n".encode()])
    assert "a cosignature of time 9223372036854775808" in refused(note, [key])


def test_only_a_checkpoint_is_cosigned() -> None:
    text = b"log.example/countersign\n5\nno root\n"
    with pytest.raises(Rejected, match="not base64"):
        cosign(text, NAME, COSIGNERS[0], 5)
    signer = Ed25519SigningKey(bytes(32))
    note = assemble_note(text, [sign_note(text, NAME, signer)])
    assert "not base64" in refused(note, [WitnessKey(NAME, WitnessKeyType.NOTE_ED25519, signer.public_key)])


def test_names_that_ml_dsa_cannot_sign_are_refused() -> None:
    long = "w" * 256
    with pytest.raises(Rejected, match="a name of 256 bytes"):
        cosign(TEXT, long, COSIGNERS[1], 5)
    assert verify_cosignatures(cosigned(COSIGNERS[0], 5, long), [key_of(COSIGNERS[0], long)]) == {long: 5}


@pytest.mark.parametrize(
    ("typed_key", "detail"),
    [
        (b"", "of type none"),
        (b"\x02" + bytes(32), "of type 02"),
        (b"\x04" + bytes(31), "a public key of 31 bytes, expected 32"),
        (b"\x06" + bytes(32), "a public key of 32 bytes, expected 1312"),
        (b"\x04" + bytes(32), "no Ed25519 public key"),
    ],
)
def test_keys_that_are_none_are_refused(typed_key: bytes, detail: str) -> None:
    with pytest.raises(Rejected, match=detail):
        parse_witness_key(join_verifier_key(NAME, typed_key))


def test_key_of_a_wrong_id_is_refused() -> None:
    encoded = encode_witness_key(NAME, COSIGNERS[1]).replace("+", "+0", 1)
    with pytest.raises(Rejected, match="verifier key id"):
        parse_witness_key(encoded)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300), st.integers(0, 2_500))
def test_nothing_but_a_named_refusal_comes_of_noise(noise: bytes, place: int) -> None:
    note, keys = public("ml-dsa-44")
    altered = note[:place] + noise + note[place + len(noise) :]
    with suppress(Rejected):
        assert set(verify_cosignatures(altered, keys)) <= {key.name for key in keys}


def test_key_shows_no_seed() -> None:
    for cosigner in (Ed25519Cosigner(bytes([9]) * 32), MlDsa44Cosigner(bytes([9]) * 32)):
        assert "09" * 8 not in repr(cosigner)
        assert cosigner.public_key.hex()[:16] in repr(cosigner)
