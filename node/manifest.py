"""RocksDB's manifest, the list of a database's families and tables, where RocksDB itself reads it too kindly.

A crash may cut off the record written last, so RocksDB takes one that seems to reach beyond the file's end for such a
tear, and the manifest to end before it. It then makes what it does not find listed anew, and deletes the tables it does
not find listed. A single flipped bit in a record's length looks the same, wherever in the file it is; but there the
record is whole, as its checksum says under its true length. That is what is looked for here: no database opens with it.

A manifest that lost its end looks as a crash leaves it. What is held against that is in ``Store.open``.

The format: blocks of 32 KiB; records of checksum (CRC-32C, masked), length, type and payload, none across the end of
a block; fewer than seven bytes there are filling.
"""

import struct
from pathlib import Path

from consensus.rejection import InvariantBroken

_BLOCK_BYTES = 32 << 10
_HEADER = struct.Struct("<IHB")
_CRC32C_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8


def check_manifest(path: Path) -> None:
    """Look for a record with a damaged length in the manifest of the database at ``path``; of others RocksDB tells.

    Raises:
        InvariantBroken: there is one.
    """
    try:
        manifest = path / (path / "CURRENT").read_text("ascii").strip()
        content = manifest.read_bytes()
    except (OSError, ValueError):  # RocksDB says what is wrong with these
        return
    at = _end_of_whole_records(content)
    if at + _HEADER.size > len(content):
        return
    checksum, length, kind = _HEADER.unpack_from(content, at)
    true_length = _length_by_checksum(checksum, kind, content[at + _HEADER.size :])
    if true_length is not None:
        raise InvariantBroken(
            f"{path}: the database does not open: Corruption: the record at byte {at} of {manifest.name} says that it "
            f"has {length} bytes, it has {true_length}"
        )


def _end_of_whole_records(content: bytes) -> int:
    at = 0
    while at + _HEADER.size <= len(content):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER.size:
            at += left
            continue
        _, length, _ = _HEADER.unpack_from(content, at)
        if _HEADER.size + length > min(left, len(content) - at):
            break
        at += _HEADER.size + length
    return at


def _length_by_checksum(checksum: int, kind: int, rest: bytes) -> int | None:
    """How much of ``rest`` the checksum of a record of this type is of; None where of no beginning of it."""
    rotated = (checksum - _MASK_DELTA) & 0xFFFFFFFF
    wanted = ((rotated << 15 | rotated >> 17) & 0xFFFFFFFF) ^ 0xFFFFFFFF
    state = _crc32c(0xFFFFFFFF, kind)
    for length, byte in enumerate(rest[:_BLOCK_BYTES]):
        if state == wanted:
            return length
        state = _crc32c(state, byte)
    return len(rest) if state == wanted else None


def _crc32c(state: int, byte: int) -> int:
    state ^= byte
    for _ in range(8):
        state = state >> 1 ^ (_CRC32C_POLYNOMIAL if state & 1 else 0)
    return state
