"""Reading released weights: a strict, streaming reader of safetensors files.

One pass over the file gives its SHA-256 and the BLAKE3 of each tensor, in constant memory. What a file means
must not depend on who reads it, so everything that two readers could take differently is refused: a repeated
name, holes or overlaps between tensors, bytes that belong to none, a length that is not that of dtype and
shape, a header that is not UTF-8 JSON or does not begin with a brace. The rules are those of the format's own
description, without its leniencies.

Left to others: what the digests are compared with (``consensus/predicates/delta_exact.py``). No tensor library
is needed.
"""

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, NoReturn

from blake3 import blake3

from consensus.parameters import DTYPE_SIZE_BITS, MAX_DIMENSIONS, MAX_EXTENT, TensorDescriptor
from consensus.predicates import ReleasedFile
from consensus.rejection import Reason, Rejected
from node.files import open_regular

MAX_WEIGHTS_BYTES = 1 << 42
MAX_HEADER_BYTES = 32 * 1024 * 1024
LENGTH_BYTES = 8
CHUNK_BYTES = 1 << 20

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor as the header describes it; ``begin`` and ``end`` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_weights(path: Path) -> ReleasedFile:
    """A safetensors file's SHA-256, and name, dtype, shape and BLAKE3 of each of its tensors.

    Raises:
        Rejected: ``NOT_FOUND``, ``OVERSIZED`` or ``MALFORMED``.
    """
    with open_regular(path, MAX_WEIGHTS_BYTES) as (file, size_bytes):
        try:
            return _read(str(path), file, size_bytes)
        except (ValueError, RecursionError) as error:
            raise Rejected(Reason.MALFORMED, f"{path}: not a safetensors file: {error!s:.500}") from error


def _read(name: str, file: BinaryIO, size_bytes: int) -> ReleasedFile:
    length = file.read(LENGTH_BYTES)
    header_bytes = int.from_bytes(length, "little")
    if len(length) < LENGTH_BYTES or header_bytes > size_bytes - LENGTH_BYTES:
        raise ValueError(f"a file of {size_bytes} bytes with a header of {header_bytes}")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} allowed")
    header = file.read(header_bytes)
    places = _places(header, size_bytes - LENGTH_BYTES - header_bytes)
    whole = hashlib.sha256(length + header)
    tensors = []
    for place in places:
        content = blake3()
        left = place.end - place.begin
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise ValueError("the file became shorter while it was read")
            whole.update(chunk)
            content.update(chunk)
            left -= len(chunk)
        tensors.append(TensorDescriptor(place.name, place.dtype, place.shape, content.digest()))
    return ReleasedFile(name, whole.digest(), tuple(tensors))


def _places(header: bytes, content_bytes: int) -> list[_Place]:
    """The tensors of a header in the order of their bytes, which they fill without a hole or an overlap."""
    if not header.startswith(b"{"):
        raise ValueError("the header does not begin with a brace")
    table = json.loads(
        header.decode("utf-8"),
        object_pairs_hook=_unique_names,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is not a table of texts")
    places = sorted((_place(name, entry) for name, entry in table.items()), key=lambda place: (place.begin, place.end))
    reached = 0
    for place in places:
        if place.begin != reached:
            raise ValueError(f"tensor {place.name!a:.200} begins at byte {place.begin}, expected {reached}")
        reached = place.end
    if reached != content_bytes:
        raise ValueError(f"the tensors end at byte {reached} of {content_bytes}")
    return places


def _place(name: str, entry: object) -> _Place:
    what = f"tensor {name!a:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZE_BITS:
        raise ValueError(f"{what} has unknown dtype {dtype!a:.40}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{what} has no shape of at most {MAX_DIMENSIONS} dimensions")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has no two data offsets")
    begin, end = offsets
    if 8 * (end - begin) != prod(shape) * DTYPE_SIZE_BITS[dtype]:
        raise ValueError(f"{what} has {end - begin} bytes, not as many as its dtype and shape say")
    return _Place(name, dtype, tuple(shape), begin, end)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_EXTENT for item in value)


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return names


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is not a whole number")
