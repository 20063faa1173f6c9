"""Golden vectors of checkpoint notes, by members and witnesses (C2SP signed-note, tlog-checkpoint, tlog-cosignature).

The note with ML-DSA-44 is a public witness's: such signatures differ each time they are made.
"""

from base64 import b64encode
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from agreement import Case, octets, refusal

from consensus.checkpoint import (
    assemble_note,
    checkpoint_text,
    encode_verifier_key,
    key_id,
    note_text,
    parse_checkpoint,
    sign_note,
)
from consensus.cosignature import Ed25519Cosigner, cosign, encode_witness_key, parse_witness_key, verify_cosignatures
from consensus.keys import Ed25519SigningKey
from consensus.merkle import EMPTY_ROOT

PUBLIC = Path(__file__).parents[1] / "consensus" / "cosigned"
ORIGIN = "vectors.example/log"
MEMBER, OTHER = (Ed25519SigningKey(octets("log key", number)) for number in (1, 2))
WITNESS = Ed25519Cosigner(octets("witness"))
NAME = "witness.example/w1"
SECONDS = 1_700_000_000
ROOT = octets("root")
TEXT = checkpoint_text(ORIGIN, 7, ROOT)
KEYS = [
    encode_verifier_key(ORIGIN, MEMBER.public_key),
    encode_witness_key(NAME, WITNESS),
]


def checkpoints() -> list[Case]:
    """Notes with the verifier keys that are known, who of them signed when, and the checkpoint."""
    cases = [
        refusal(what, partial(_judge, note, keys), keys=keys, note=note.hex()) for what, note, keys in _bad_notes()
    ]
    for what, note, keys in _good_notes():
        signed, size, root = _judge(note, keys)
        cases.append({"what": what, "keys": keys, "note": note.hex(), "signed": signed, "size": size, "root": root})
    return cases


def _judge(note: bytes, keys: list[str]) -> tuple[dict[str, int | None], int, str]:
    """Who signed at what time, by name, and the size and root that they signed."""
    signed = verify_cosignatures(note, [parse_witness_key(key) for key in keys])
    checkpoint = parse_checkpoint(note_text(note))
    return dict(sorted(signed.items())), checkpoint.size, checkpoint.root.hex()


def _line(name: str, stamped: bytes) -> bytes:
    return f"— {name} {b64encode(stamped).decode()}\n".encode()


def _good_notes() -> Iterator[tuple[str, bytes, list[str]]]:
    mine, cosigned = sign_note(TEXT, ORIGIN, MEMBER), cosign(TEXT, NAME, WITNESS, SECONDS)
    yield (
        "by a member, and by one that is not known",
        assemble_note(TEXT, [sign_note(TEXT, ORIGIN, OTHER), mine]),
        KEYS[:1],
    )
    yield (
        "of an empty log",
        assemble_note(empty := checkpoint_text(ORIGIN, 0, EMPTY_ROOT), [sign_note(empty, ORIGIN, MEMBER)]),
        KEYS,
    )
    yield "by a witness twice", assemble_note(TEXT, [cosign(TEXT, NAME, WITNESS, SECONDS - 5), cosigned]), KEYS
    for which in ("ed25519", "ml-dsa-44"):
        note, keys = (PUBLIC / f"{which}.note").read_bytes(), (PUBLIC / f"{which}.keys").read_text().split()
        yield f"by public witnesses, {which}", note, keys
    yield "by a member and a witness", assemble_note(TEXT, [mine, cosigned]), KEYS


def _bad_notes() -> Iterator[tuple[str, bytes, list[str]]]:
    mine, cosigned = sign_note(TEXT, ORIGIN, MEMBER), cosign(TEXT, NAME, WITNESS, SECONDS)
    good = assemble_note(TEXT, [mine, cosigned])
    yield "by nobody known", assemble_note(TEXT, [sign_note(TEXT, ORIGIN, OTHER)]), KEYS
    yield "signed by nobody", TEXT + b"\n", KEYS
    yield "a signature over another text", TEXT.replace(b"\n7\n", b"\n8\n") + b"\n" + mine, KEYS
    stamp = key_id(ORIGIN, MEMBER.public_key)
    wrong = _line(ORIGIN, stamp + MEMBER.sign(b"another text"))
    yield "a good signature, and a bad one of a known key", TEXT + b"\n" + cosigned + wrong, KEYS
    short = _line(ORIGIN, stamp + MEMBER.sign(TEXT)[:-1])
    yield "a signature a byte short", TEXT + b"\n" + short, KEYS
    seconds = SECONDS.to_bytes(8, "big")
    witness_id = parse_witness_key(KEYS[1]).key_id
    at_another = _line(NAME, witness_id + (SECONDS + 1).to_bytes(8, "big") + WITNESS.sign(_timed(SECONDS)))
    yield "a cosignature of another time", TEXT + b"\n" + at_another, KEYS
    plain = _line(NAME, witness_id + seconds + WITNESS.sign(TEXT))
    yield "a cosignature over the text alone", TEXT + b"\n" + plain, KEYS
    late = _line(NAME, witness_id + (1 << 63).to_bytes(8, "big") + WITNESS.sign(_timed(1 << 63)))
    yield "a cosignature at 2⁶³ seconds", TEXT + b"\n" + late, KEYS
    name, _, key = KEYS[0].split("+", 2)
    yield "a verifier key with another id", good, [f"{name}+{bytes(4).hex()}+{key}"]
    for what, text in (
        ("an extension line", TEXT + b"more\n"),
        ("two lines", TEXT[: TEXT[:-1].rindex(b"\n") + 1]),
        ("no origin", b"\n" + TEXT.split(b"\n", 1)[1]),
        ("a size with a leading zero", TEXT.replace(b"\n7\n", b"\n07\n")),
        ("a size below zero", TEXT.replace(b"\n7\n", b"\n-7\n")),
        ("a size above 2⁶³", TEXT.replace(b"\n7\n", f"\n{2**63 + 1}\n".encode())),
        ("a root of 31 bytes", f"{ORIGIN}\n7\n{b64encode(ROOT[:31]).decode()}\n".encode()),
        ("a root without padding", TEXT.replace(b"=", b"")),
        ("an empty log with another root", TEXT.replace(b"\n7\n", b"\n0\n")),
        ("a carriage return", TEXT.replace(b"\n", b"\r\n")),
    ):
        yield what, text + b"\n" + _line(ORIGIN, stamp + MEMBER.sign(text)), KEYS
    yield "no empty line before the signatures", TEXT + mine, KEYS
    yield "no line end at the end", good[:-1], KEYS
    yield "a hyphen for the dash", TEXT + b"\n" + mine.replace("—".encode(), b"-"), KEYS
    yield "a signature line with two spaces", TEXT + b"\n" + mine.replace(b" ", b"  "), KEYS
    yield "a signature without padding", TEXT + b"\n" + mine.rstrip(b"=\n") + b"\n", KEYS
    yield "no UTF-8", TEXT + b"\n" + b"\xff" + mine, KEYS
    yield "more than 100 signatures", TEXT + b"\n" + mine * 101, KEYS


def _timed(seconds: int) -> bytes:
    return f"cosignature/v1\ntime {seconds}\n".encode() + TEXT
