"""Notes, checkpoints and tile paths: published vectors, other spellings, forged and hostile notes."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from consensus.checkpoint import (
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    Checkpoint,
    EntryBundle,
    Tile,
    assemble_note,
    checkpoint_text,
    encode_verifier_key,
    entry_bundle_path,
    key_id,
    note_text,
    open_checkpoint,
    parse_checkpoint,
    parse_tile_path,
    sign_note,
    split_verifier_key,
    tile_path,
    verify_note,
    verify_note_by,
)
from consensus.identifiers import Digest
from consensus.merkle import EMPTY_ROOT, MAX_SIZE
from consensus.rejection import Reason, Rejected

fast = settings(deadline=None, max_examples=150)

# golang.org/x/mod/sumdb/note, package documentation.
VECTOR_VERIFIER_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
VECTOR_SIGNER_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
VECTOR_TEXT = b"If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
VECTOR_LINE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
).encode()
VECTOR_NOTE = VECTOR_TEXT + b"\n" + VECTOR_LINE
VECTOR_KEYS = {"PeterNeumann": split_verifier_key(VECTOR_VERIFIER_KEY)[1][1:]}

ROOT = Digest(bytes(range(32)))
ORIGIN = "log.example/countersign"


class Signer:
    """A log key in memory."""

    def __init__(self, seed: int) -> None:
        self._key = SigningKey(seed.to_bytes(32, "big"))

    @property
    def public_key(self) -> bytes:
        return bytes(self._key.verify_key)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message).signature


ONE, TWO = Signer(1), Signer(2)
TEXT = checkpoint_text(ORIGIN, 5, ROOT)
NOTE = assemble_note(TEXT, [sign_note(TEXT, "one", ONE), sign_note(TEXT, "two", TWO)])
KEYS = {"one": ONE.public_key, "two": TWO.public_key}


def rejected_note(note: bytes, keys: dict[str, bytes] = KEYS) -> str:
    with pytest.raises(Rejected) as caught:
        verify_note(note, keys)
    assert caught.value.reason is Reason.BAD_CHECKPOINT
    return caught.value.detail


def rejected_checkpoint(text: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        parse_checkpoint(text)
    assert caught.value.reason is Reason.BAD_CHECKPOINT


def line(name: str, stamped: bytes) -> bytes:
    return f"— {name} {base64.b64encode(stamped).decode()}\n".encode()


# Published vectors


def test_the_published_note_verifies() -> None:
    assert verify_note(VECTOR_NOTE, VECTOR_KEYS) == {"PeterNeumann"}
    assert note_text(VECTOR_NOTE) == VECTOR_TEXT


def test_the_published_key_signs_the_published_line() -> None:
    signer = Signer(int.from_bytes(VECTOR_SIGNER_SEED, "big"))
    assert sign_note(VECTOR_TEXT, "PeterNeumann", signer) == VECTOR_LINE
    assert encode_verifier_key("PeterNeumann", signer.public_key) == VECTOR_VERIFIER_KEY


def test_the_checkpoint_of_the_specification_parses() -> None:
    # c2sp.org/tlog-checkpoint
    text = b"example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    root = Digest(bytes.fromhex("0ac5186a91863e8e1d90c808014aa89bf5da8e3ee1d9f07630f0378f68f1ab62"))
    assert parse_checkpoint(text) == Checkpoint("example.com/behind-the-sofa", 20_852_163, root)
    assert checkpoint_text("example.com/behind-the-sofa", 20_852_163, root) == text


# Notes


def test_a_signed_checkpoint_opens_with_the_names_that_signed() -> None:
    assert open_checkpoint(NOTE, KEYS) == (Checkpoint(ORIGIN, 5, ROOT), frozenset({"one", "two"}))
    assert verify_note(NOTE, {"two": TWO.public_key}) == {"two"}


def test_unknown_signers_are_ignored_even_under_a_known_name_or_id() -> None:
    stranger = Signer(3)
    impostor = sign_note(TEXT, "one", stranger)
    same_id = line("stranger", key_id("one", ONE.public_key) + bytes(64))
    other_type = line("witness", b"\x01\x02\x03\x04" + bytes(3_309))
    note = assemble_note(TEXT, [impostor, same_id, other_type, sign_note(TEXT, "two", TWO)])
    assert verify_note(note, KEYS) == {"two"}


def test_a_note_no_known_key_signed_is_rejected() -> None:
    assert "none of 2 signatures" in rejected_note(NOTE, {})
    rejected_note(NOTE, {"one": Signer(3).public_key})


def test_a_bad_signature_of_a_known_key_condemns_the_note() -> None:
    good = sign_note(TEXT, "two", TWO)
    stamp = key_id("one", ONE.public_key)
    for signature in (bytes(64), ONE.sign(TEXT + b"x"), TWO.sign(TEXT), ONE.sign(TEXT)[:-1], ONE.sign(TEXT) + b"\x00"):
        rejected_note(assemble_note(TEXT, [good, line("one", stamp + signature)]))
    rejected_note(assemble_note(TEXT, [good, sign_note(TEXT, "one", ONE), line("one", stamp + bytes(64))]))


def test_a_small_order_key_that_signs_everything_is_rejected() -> None:
    identity = (1).to_bytes(32, "little")
    forged = line("weak", key_id("weak", identity) + identity + bytes(32))
    rejected_note(assemble_note(TEXT, [forged]), {"weak": identity})


@fast
@given(st.integers(0, len(NOTE) - 1), st.integers(0, 7))
def test_any_flipped_bit_in_a_note_loses_a_signature_or_is_rejected(position: int, bit: int) -> None:
    mutated = bytearray(NOTE)
    mutated[position] ^= 1 << bit
    try:
        names = verify_note(bytes(mutated), KEYS)
    except Rejected:
        return
    assert len(names) < 2
    assert note_text(bytes(mutated)) == TEXT


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\n",
        TEXT,
        TEXT + b"\n",
        NOTE[:-1],
        NOTE + b"\n",
        NOTE + b"trailing\n",
        NOTE.replace(b"\n\n", b"\n"),
        NOTE.replace(b"\n\n", b"\n\r\n"),
        NOTE.replace(b"\n\n", b"\n\x00\n\n"),
        NOTE.replace(b"\n\n", b"\n\xff\n\n"),
        NOTE.replace("— one".encode(), b"-- one"),
        NOTE.replace("— one ".encode(), "— one\t".encode()),
        NOTE.replace("— one ".encode(), "— one  ".encode()),
        NOTE.replace("— one ".encode(), "—  ".encode()),
        NOTE.replace("— one ".encode(), "— o+e ".encode()),
        NOTE.replace("— one ".encode(), "— o\u2003e ".encode()),
        TEXT + b"\n" + "— one\n".encode(),
        TEXT + b"\n" + "— one \n".encode(),
        TEXT + b"\n" + line("one", b"abcd"),
        TEXT + b"\n" + line("one", bytes(68)).replace(b"=", b""),
        TEXT + b"\n" + line("one", bytes(68)).replace(b"A=", b"B="),
        TEXT + b"\n" + line("one", bytes(68)).replace(b"AAAA", b"AA A", 1),
        TEXT + b"\n" + line("one", bytes(68)).replace(b"AAAA", b"AA_A", 1),
        TEXT + b"\n" + line("one", bytes(68)).replace(b"AAAA", "AAéA".encode(), 1),
    ],
)
def test_a_note_in_any_other_form_is_rejected(note: bytes) -> None:
    assert note != NOTE
    rejected_note(note)
    # A known key's good signature after the malformed line does not save it.
    if note.endswith(b"\n") and "\n\n—".encode() in note:
        rejected_note(note + sign_note(TEXT, "two", TWO))


def test_the_last_empty_line_ends_the_text() -> None:
    text = b"first\n\nsecond\n\n\n"
    note = assemble_note(text, [sign_note(text, "one", ONE)])
    assert verify_note(note, KEYS) == {"one"}
    assert note_text(note) == text


def test_too_many_signatures_or_bytes_are_rejected() -> None:
    signed = sign_note(TEXT, "one", ONE)
    other = line("other", bytes(68))
    assert verify_note(assemble_note(TEXT, [signed] + [other] * (MAX_SIGNATURES - 1)), KEYS) == {"one"}
    assert "101 signatures" in rejected_note(TEXT + b"\n" + signed + other * MAX_SIGNATURES)
    long_text = b"x" * (MAX_NOTE_BYTES - len(signed) - 2) + b"\n"
    long_line = sign_note(long_text, "one", ONE)
    assert verify_note(assemble_note(long_text, [long_line]), KEYS) == {"one"}
    assert "bytes, at most" in rejected_note(b"x" + long_text + b"\n" + long_line)


def test_nothing_that_could_not_be_read_back_is_signed_or_assembled() -> None:
    for text in (b"", b"no newline", b"control\x07\n", b"\xff\n", b"tab\t\n"):
        with pytest.raises(Rejected):
            sign_note(text, "one", ONE)
    for name in ("", "a b", "a+b", "a\nb", "a\u00a0b", "\x01", "\ud800"):
        with pytest.raises(Rejected):
            sign_note(TEXT, name, ONE)
    for lines in ([], [b"\n"], [sign_note(TEXT, "one", ONE), b"\n" + sign_note(TEXT, "two", TWO)]):
        with pytest.raises(Rejected):
            assemble_note(TEXT, lines)
    with pytest.raises(Rejected):
        assemble_note(b"no newline", [sign_note(TEXT, "one", ONE)])


# Checkpoints


@fast
@given(
    st.text(st.characters(codec="utf-8", min_codepoint=32), min_size=1, max_size=30),
    st.integers(1, MAX_SIZE),
    st.binary(min_size=32, max_size=32),
)
def test_a_checkpoint_has_one_text(origin: str, size: int, root: bytes) -> None:
    text = checkpoint_text(origin, size, root)
    assert parse_checkpoint(text) == Checkpoint(origin, size, Digest(root))


def test_the_empty_log_has_the_empty_root() -> None:
    assert parse_checkpoint(checkpoint_text(ORIGIN, 0, EMPTY_ROOT)).size == 0
    rejected_checkpoint(TEXT.replace(b"\n5\n", b"\n0\n"))


@pytest.mark.parametrize(
    ("origin", "size", "root"),
    [
        ("", 1, ROOT),
        ("a\nb", 1, ROOT),
        ("a\tb", 1, ROOT),
        ("\ud800", 1, ROOT),
        (ORIGIN, -1, ROOT),
        (ORIGIN, MAX_SIZE + 1, ROOT),
        (ORIGIN, 1, ROOT[:-1]),
        (ORIGIN, 0, ROOT),
    ],
)
def test_a_checkpoint_that_could_not_be_read_back_is_never_written(origin: str, size: int, root: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        checkpoint_text(origin, size, root)
    assert caught.value.reason is Reason.BAD_CHECKPOINT


@pytest.mark.parametrize(
    "size", ["", "05", "+5", "-5", " 5", "5 ", "5_0", "0x5", "٥", "5.0", str(MAX_SIZE + 1), "9" * 5_000]
)
def test_a_size_in_any_other_spelling_is_rejected(size: str) -> None:
    rejected_checkpoint(TEXT.replace(b"\n5\n", f"\n{size}\n".encode()))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        TEXT[:-1],
        TEXT + b"extension\n",
        TEXT + b"\n",
        b"\n" + TEXT,
        TEXT.replace(ORIGIN.encode(), b""),
        TEXT.replace(b"\n", b"\r\n"),
        TEXT.replace(b"Hh8=", b"Hh8"),
        TEXT.replace(b"Hh8=", b"Hh9="),
        TEXT.replace(b"Hh8=", b"HR8f"),
        TEXT.replace(b"Hh8=", b""),
        TEXT.replace(ORIGIN.encode(), b"\xff"),
        b"x" * MAX_NOTE_BYTES + TEXT,
    ],
)
def test_a_checkpoint_in_any_other_form_is_rejected(text: bytes) -> None:
    assert text != TEXT
    rejected_checkpoint(text)


def test_a_signed_note_that_is_no_checkpoint_does_not_open() -> None:
    with pytest.raises(Rejected) as caught:
        open_checkpoint(VECTOR_NOTE, VECTOR_KEYS)
    assert caught.value.reason is Reason.BAD_CHECKPOINT


# Verifier keys


def test_a_verifier_key_survives_its_spelling_even_with_plus_in_its_base64() -> None:
    with_plus = next(
        signer for signer in map(Signer, range(1, 200)) if b"+" in base64.b64encode(b"\x01" + signer.public_key)
    )
    encoded = encode_verifier_key(ORIGIN, with_plus.public_key)
    assert split_verifier_key(encoded) == (ORIGIN, b"\x01" + with_plus.public_key)


@pytest.mark.parametrize(
    "encoded",
    [
        "",
        "PeterNeumann",
        "PeterNeumann+c74f20a3",
        "PeterNeumann+c74f20a3+",
        VECTOR_VERIFIER_KEY.replace("PeterNeumann", "PeterNeumenn"),
        VECTOR_VERIFIER_KEY.replace("PeterNeumann", ""),
        VECTOR_VERIFIER_KEY.replace("PeterNeumann", "Peter Neumann"),
        VECTOR_VERIFIER_KEY.replace("c74f20a3", "C74F20A3"),
        VECTOR_VERIFIER_KEY.replace("c74f20a3", "c74f20a4"),
        VECTOR_VERIFIER_KEY.replace("ARpc", "Ahpc"),
        VECTOR_VERIFIER_KEY + "\n",
        VECTOR_VERIFIER_KEY[:-4],
        VECTOR_VERIFIER_KEY[:-1],
    ],
)
def test_a_verifier_key_in_any_other_form_is_rejected(encoded: str) -> None:
    with pytest.raises(Rejected) as caught:
        split_verifier_key(encoded)
    assert caught.value.reason is Reason.BAD_CHECKPOINT


def test_holders_of_keys_under_one_name_are_told_apart() -> None:
    note = assemble_note(TEXT, [sign_note(TEXT, ORIGIN, ONE), sign_note(TEXT, "elsewhere", TWO)])
    assert verify_note_by(note, ORIGIN, KEYS) == {"one"}
    with pytest.raises(Rejected, match="nobody known signed"):
        verify_note_by(note, ORIGIN, {"two": TWO.public_key})
    forged = f"— {ORIGIN} {base64.b64encode(key_id(ORIGIN, TWO.public_key) + bytes(64)).decode()}\n".encode()
    with pytest.raises(Rejected, match="does not verify"):
        verify_note_by(assemble_note(TEXT, [sign_note(TEXT, ORIGIN, ONE), forged]), ORIGIN, KEYS)


def test_log_key_of_another_length_has_no_id() -> None:
    with pytest.raises(Rejected, match="a public key of 31 bytes"):
        encode_verifier_key(ORIGIN, bytes(31))


# Tiles


@pytest.mark.parametrize(
    ("path", "tile"),
    [
        ("tile/0/000", Tile(0, 0, 256)),
        ("tile/0/x001/x234/067", Tile(0, 1_234_067, 256)),
        ("tile/1/000.p/17", Tile(1, 0, 17)),
        ("tile/63/x001/000.p/255", Tile(63, 1_000, 255)),
        ("tile/entries/x273/112.p/1", EntryBundle(273_112, 1)),
        ("tile/entries/999", EntryBundle(999, 256)),
    ],
)
def test_tile_paths_of_the_specification(path: str, tile: Tile | EntryBundle) -> None:
    assert parse_tile_path(path) == tile
    if isinstance(tile, Tile):
        assert tile_path(tile.level, tile.index, tile.width) == path
    else:
        assert entry_bundle_path(tile.index, tile.width) == path


@fast
@given(st.integers(0, 63), st.integers(0, MAX_SIZE // 256 - 1), st.integers(1, 256))
def test_every_tile_has_one_path(level: int, index: int, width: int) -> None:
    assert parse_tile_path(tile_path(level, index, width)) == Tile(level, index, width)
    assert parse_tile_path(entry_bundle_path(index, width)) == EntryBundle(index, width)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tile",
        "/tile/0/000",
        "tile/0/000/",
        "tile/00/000",
        "tile/64/000",
        "tile/-1/000",
        "tile/8/0/000",
        "tile/0/0",
        "tile/0/0000",
        "tile/0/x000/001",
        "tile/0/x001/x234/067/x000",
        "tile/0/001/234",
        "tile/0/X001/234",
        "tile/0/000.p/0",
        "tile/0/000.p/256",
        "tile/0/000.p/01",
        "tile/0/000.p/999",
        "tile/0/000.p/",
        "tile/0/000\n",
        "tile/0/٠٠٠",
        "tile/entries/../../etc",
        "tile/data/000",
        "tile/0/" + "x999/" * 6 + "999",
        "tile/0/" + "x999/" * 5_000 + "999",
    ],
)
def test_a_tile_path_in_any_other_form_is_not_found(path: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_tile_path(path)
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("level", "index", "width"), [(64, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2**55, 1), (0, 0, 0), (0, 0, 257)]
)
def test_there_is_no_path_for_an_impossible_tile(level: int, index: int, width: int) -> None:
    with pytest.raises(Rejected) as caught:
        tile_path(level, index, width)
    assert caught.value.reason is Reason.NOT_FOUND
