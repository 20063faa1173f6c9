"""Signed checkpoints and tile paths, as the public transparency tools read and write them.

Rules and their sources:

- A *note* is UTF-8 text without control characters other than newline, ending in a newline, then an empty line,
  then signature lines ``— name base64(key id ‖ signature)``: C2SP signed-note. Only Ed25519 (type 0x01) here; what
  witnesses sign is in ``cosignature.py``.
- The key id is the first 4 bytes of SHA-256(name ‖ newline ‖ 0x01 ‖ public key). A signature of an unknown
  (name, key id) is ignored; one of a known key that does not verify condemns the note; so does the lack of any.
- A *checkpoint* is a note text of exactly three lines, origin, size and root: C2SP tlog-checkpoint. Extension
  lines are refused: log monitors cannot audit them.
- Tiles are named ``tile/<L>/<N>[.p/<W>]`` and entry bundles ``tile/entries/<N>[.p/<W>]``: C2SP tlog-tiles.

Each value has one spelling: base64 is padded and re-encodes to itself, sizes carry no leading zero. A
checkpoint is read only through ``open_checkpoint``, or by ``parse_checkpoint`` from a text ``verify_note``
vouched for. Ed25519 is verified by ``keys.py`` alone, so that no two verifiers of ours can disagree.

Left to others: which names must have signed and how many (the caller compares the returned names), consistency
between checkpoints (``merkle.py``), when a node signs (``node``).
"""

import binascii
import re
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from consensus.identifiers import DIGEST_BYTES, Digest
from consensus.keys import SignatureScheme, verify
from consensus.merkle import EMPTY_ROOT, MAX_SIZE
from consensus.rejection import Reason, Rejected

MAX_NOTE_BYTES = 1 << 20
MAX_SIGNATURES = 100
ED25519_TYPE = b"\x01"
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
KEY_ID_BYTES = 4

TILE_HASHES = 256
MAX_TILE_LEVEL = 63

_DASH = "— "
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_TILE_PATH = re.compile(
    r"tile/(?P<level>entries|0|[1-9][0-9]?)/(?P<index>(?:x[0-9]{3}/)*[0-9]{3})(?:\.p/(?P<width>[1-9][0-9]{0,2}))?"
)


class NoteSigner(Protocol):
    """An Ed25519 log key, wherever it is kept."""

    @property
    def public_key(self) -> bytes:
        """The 32-byte public key."""

    def sign(self, message: bytes, /) -> bytes:
        """The 64-byte Ed25519 signature of ``message``."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The head of a log: who it is (``origin``), how many leaves, and the RFC 9162 root over them."""

    origin: str
    size: int
    root: Digest


@dataclass(frozen=True, slots=True)
class Tile:
    """``width`` hashes (1 to 256) of one tile; ``index`` counts tiles within their level."""

    level: int
    index: int
    width: int


@dataclass(frozen=True, slots=True)
class EntryBundle:
    """``width`` log entries (1 to 256) under one level-0 tile."""

    index: int
    width: int


# Checkpoints


def checkpoint_text(origin: str, size: int, root: bytes) -> bytes:
    """The note text of a checkpoint: what log keys sign.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when the origin is empty or holds a control character, or size or root is
            out of bounds.
    """
    if not 0 <= size <= MAX_SIZE or len(root) != DIGEST_BYTES or (size == 0 and root != EMPTY_ROOT):
        raise _rejected(f"size {size} with root {root.hex()}")
    text = _utf8(f"{origin}\n{size}\n{b64encode(root).decode()}\n")
    parse_checkpoint(text)
    return text


def parse_checkpoint(text: bytes) -> Checkpoint:
    """The checkpoint a note's text states. It says nothing until ``verify_note`` has vouched for the text.

    Raises:
        Rejected: ``BAD_CHECKPOINT``.
    """
    lines = _note_characters(text).split("\n")
    if len(lines) != 4 or lines[3]:
        raise _rejected(f"{len(lines) - 1} lines, expected origin, size and root, each ending in a newline")
    origin, size_text, root_text, _ = lines
    if not origin:
        raise _rejected("an empty origin")
    if not _DECIMAL.fullmatch(size_text) or int(size_text) > MAX_SIZE:
        raise _rejected(f"size {size_text[:40]!r}, expected a decimal number to {MAX_SIZE}, no leading zero")
    size, root = int(size_text), _strict_base64(root_text)
    if len(root) != DIGEST_BYTES or (size == 0 and root != EMPTY_ROOT):
        raise _rejected(f"root of {len(root)} bytes at size {size}, expected {DIGEST_BYTES}, the empty root at 0")
    return Checkpoint(origin, size, Digest(root))


def open_checkpoint(note: bytes, keys: Mapping[str, bytes]) -> tuple[Checkpoint, frozenset[str]]:
    """The checkpoint of a signed note, and the names in ``keys`` that signed it (at least one).

    Raises:
        Rejected: ``BAD_CHECKPOINT``.
    """
    names = verify_note(note, keys)
    return parse_checkpoint(note_text(note)), names


# Notes


def sign_note(text: bytes, name: str, signer: NoteSigner) -> bytes:
    """The signature line of ``name`` for a note text.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when text or name cannot stand in a note.
    """
    if not _note_characters(text).endswith("\n"):
        raise _rejected("a note text that does not end in a newline")
    stamped = key_id(name, signer.public_key) + signer.sign(text)
    return f"{_DASH}{name} {b64encode(stamped).decode()}\n".encode()


def assemble_note(text: bytes, signature_lines: Sequence[bytes]) -> bytes:
    """The signed note of a text and its signature lines.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when the result is not a note.
    """
    note = text + b"\n" + b"".join(signature_lines)
    parsed_text, _ = split_note(note)
    if parsed_text != text:
        raise _rejected("a text or signature line that ends elsewhere once in a note")
    return note


def note_text(note: bytes) -> bytes:
    """The text of a signed note, without regard to its signatures.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when it is not a note.
    """
    text, _ = split_note(note)
    return text


def verify_note(note: bytes, keys: Mapping[str, bytes]) -> frozenset[str]:
    """The names in ``keys`` (each with its 32-byte Ed25519 public key) whose signature the note bears.

    At least one. Whether these names are enough is the caller's question.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when it is not a note, a known key's signature does not verify, or no known
            key signed.
    """
    text, signatures = split_note(note)
    key_ids = {name: key_id(name, public_key) for name, public_key in keys.items()}
    verified: set[str] = set()
    for name, stamped in signatures:
        if key_ids.get(name) != stamped[:KEY_ID_BYTES]:
            continue
        signature = stamped[KEY_ID_BYTES:]
        if len(signature) != SIGNATURE_BYTES:
            raise _rejected(f"a signature of {len(signature)} bytes by {name!r}, expected {SIGNATURE_BYTES}")
        try:
            verify(SignatureScheme.ED25519, keys[name], text, signature)
        except Rejected as error:
            raise _rejected(f"the signature of {name!r} does not verify") from error
        verified.add(name)
    if not verified:
        raise _rejected(f"none of {len(signatures)} signatures is by one of the {len(keys)} known keys")
    return frozenset(verified)


# Keys


def verify_note_by(note: bytes, name: str, keys: Mapping[str, bytes]) -> frozenset[str]:
    """The holders in ``keys`` (each with its 32-byte Ed25519 public key) who signed the note under one ``name``.

    The members of a consortium sign their log's checkpoints under its origin name, each with its own key.
    At least one must have.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` as ``verify_note``.
    """
    _, signatures = split_note(note)
    present = {stamped[:KEY_ID_BYTES] for signer, stamped in signatures if signer == name}
    signed = {holder: key for holder, key in keys.items() if key_id(name, key) in present}
    if not signed:
        raise _rejected(f"a note that nobody known signed as '{name}'")
    for key in signed.values():
        verify_note(note, {name: key})
    return frozenset(signed)


def key_id(name: str, public_key: bytes) -> bytes:
    """The 4-byte id of a name's Ed25519 key.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when the name cannot stand in a note or the key is not 32 bytes.
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise _rejected(f"a public key of {len(public_key)} bytes, expected {PUBLIC_KEY_BYTES}")
    return typed_key_id(name, ED25519_TYPE + public_key)


def typed_key_id(name: str, typed_key: bytes) -> bytes:
    """The 4-byte id of a name's key, whose type is its first byte.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when the name cannot stand in a note.
    """
    _check_name(name)
    return sha256(_utf8(name) + b"\n" + typed_key).digest()[:KEY_ID_BYTES]


def encode_verifier_key(name: str, public_key: bytes) -> str:
    """How a public log key is handed around: ``name+hexkeyid+base64(0x01 ‖ key)``.

    Raises:
        Rejected: ``BAD_CHECKPOINT``, as ``key_id``.
    """
    key_id(name, public_key)
    return join_verifier_key(name, ED25519_TYPE + public_key)


def join_verifier_key(name: str, typed_key: bytes) -> str:
    """A verifier key of any type: ``name+hexkeyid+base64(type ‖ key)``.

    Raises:
        Rejected: ``BAD_CHECKPOINT``, as ``typed_key_id``.
    """
    return f"{name}+{typed_key_id(name, typed_key).hex()}+{b64encode(typed_key).decode()}"


def split_verifier_key(encoded: str) -> tuple[str, bytes]:
    """Name, and type ‖ public key, of a verifier key of any type.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when it is malformed or its id is wrong.
    """
    if encoded.count("+") < 2:
        raise _rejected(
            f"a verifier key {encoded[:80]!a}, expected NAME+ID+KEY: an ID of 8 hexadecimal digits, and KEY in base64"
        )
    name, _, rest = encoded.partition("+")
    stated_id, _, typed_key_text = rest.partition("+")
    typed_key = _strict_base64(typed_key_text)
    computed_id = typed_key_id(name, typed_key).hex()
    if stated_id != computed_id:
        raise _rejected(f"verifier key id {stated_id[:40]!r}, expected {computed_id!r}")
    return name, typed_key


# Tiles


def tile_path(level: int, index: int, width: int = TILE_HASHES) -> str:
    """Where a tile is served; below 256 hashes it is partial.

    Raises:
        Rejected: ``NOT_FOUND`` when there can be no such tile.
    """
    _check_tile(level, index, width)
    return f"tile/{level}/{_index_path(index)}{_partial(width)}"


def entry_bundle_path(index: int, width: int = TILE_HASHES) -> str:
    """Where the log entries under a level-0 tile are served.

    Raises:
        Rejected: ``NOT_FOUND`` when there can be no such bundle.
    """
    _check_tile(0, index, width)
    return f"tile/entries/{_index_path(index)}{_partial(width)}"


def parse_tile_path(path: str) -> Tile | EntryBundle:
    """The tile or entry bundle that ``path`` names, in its only spelling.

    Raises:
        Rejected: ``NOT_FOUND``.
    """
    # A level-0 index has at most 17 digits: longer paths name nothing and are not worth converting.
    matched = _TILE_PATH.fullmatch(path) if len(path) <= 64 else None
    if matched is None:
        raise Rejected(Reason.NOT_FOUND, f"no tile path: {path[:64]!r}")
    index = int(matched["index"].replace("x", "").replace("/", ""))
    width = TILE_HASHES if matched["width"] is None else int(matched["width"])
    level = 0 if matched["level"] == "entries" else int(matched["level"])
    _check_tile(level, index, width)
    canonical = entry_bundle_path(index, width) if matched["level"] == "entries" else tile_path(level, index, width)
    if path != canonical:
        raise Rejected(Reason.NOT_FOUND, f"tile path {path!r}, expected {canonical!r}")
    return EntryBundle(index, width) if matched["level"] == "entries" else Tile(level, index, width)


def _check_tile(level: int, index: int, width: int) -> None:
    if not (0 <= level <= MAX_TILE_LEVEL and 0 <= index < MAX_SIZE // TILE_HASHES and 1 <= width <= TILE_HASHES):
        raise Rejected(Reason.NOT_FOUND, f"no tile {index} of width {width} at level {level}")


def _index_path(index: int) -> str:
    digits = str(index)
    digits = digits.zfill((len(digits) + 2) // 3 * 3)
    groups = [digits[start : start + 3] for start in range(0, len(digits), 3)]
    return "/".join([*(f"x{group}" for group in groups[:-1]), groups[-1]])


def _partial(width: int) -> str:
    return "" if width == TILE_HASHES else f".p/{width}"


# Note syntax


def split_note(note: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """A note's text, and its signatures as (name, key id ‖ signature), not looked at.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` when it is not a note.
    """
    characters = _note_characters(note)
    text, separator, block = characters.rpartition("\n\n")
    if not separator:
        raise _rejected("a note without an empty line before its signatures")
    if not block.endswith("\n"):
        raise _rejected("a note without signatures, or whose last line does not end")
    lines = block[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise _rejected(f"{len(lines)} signatures, at most {MAX_SIGNATURES} allowed")
    return _utf8(text + "\n"), [_signature_line(line) for line in lines]


def _signature_line(line: str) -> tuple[str, bytes]:
    name, separator, stamped_text = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not separator:
        raise _rejected(f"signature line {line[:80]!r}, expected '— name base64'")
    _check_name(name)
    stamped = _strict_base64(stamped_text)
    if len(stamped) <= KEY_ID_BYTES:
        raise _rejected(f"a signature line of {len(stamped)} bytes, expected a key id and a signature")
    return name, stamped


def _note_characters(encoded: bytes) -> str:
    if len(encoded) > MAX_NOTE_BYTES:
        raise _rejected(f"a note of {len(encoded)} bytes, at most {MAX_NOTE_BYTES} allowed")
    try:
        characters = encoded.decode()
    except UnicodeDecodeError as error:
        raise _rejected(f"not UTF-8: {error}") from error
    if any(letter < " " and letter != "\n" for letter in characters):
        raise _rejected("a control character other than newline")
    return characters


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _rejected(f"not encodable as UTF-8: {error}") from error


def _check_name(name: str) -> None:
    if not name or "+" in name or any(letter.isspace() or letter < " " for letter in name):
        raise _rejected(f"key name {name[:80]!r}, expected no space, plus or control character, and not empty")


def _strict_base64(text: str) -> bytes:
    """Standard base64 (RFC 4648 §4) in its only spelling: padded, no foreign letters, spare bits zero."""
    try:
        decoded = b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _rejected(f"not base64: {error}") from error
    if b64encode(decoded).decode() != text:
        raise _rejected("base64 in another than its canonical spelling")
    return decoded


def _rejected(detail: str) -> Rejected:
    return Rejected(Reason.BAD_CHECKPOINT, detail)
