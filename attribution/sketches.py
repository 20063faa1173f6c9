"""Files of sketches, byte by byte: held to what the log commits to, and scored a part at a time.

What such a file holds is said where it is written (``trainer_client/sketches.py``). Its bytes are read from where
they lie (``SketchBytes``): in the run's folder as that file, or over the columns of an index (``index.py``). Either way

* every byte goes, in the file's own order, into the SHA-256 that the window's list binds to the log, before any of
  them is believed: an index needs no trust in whoever built it;
* no more than a part of one parameter is in memory. What is read again to be scored must have the BLAKE3 that its
  part had then, so that a file changed in between is refused as well;
* the score of a row is the same to the last digit, wherever its bytes lay.

The container is safetensors: 8 bytes, the length of a JSON header, little-endian; the header, ``{"name": {"dtype",
"shape", "data_offsets"}}``; the tensors without gaps.

Shape suffixes: N examples, M visits, r rank, P and Q dimensions of a weight.
"""

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol, Self

import msgspec
import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from attribution.weights import WindowFile
from consensus.accumulators import WindowEntry, blob_path
from consensus.rejection import Reason, Rejected

NIBBLE_ZERO = 8
ROWS_AT_ONCE = 4_096
PARAMETER_BYTES, ALL_BYTES = 1 << 23, 1 << 27
"""A file is read a part at a time: so many rows, of at most so many bytes of one tensor and of all of them."""
ROWS_MET_AT_ONCE = 1_024
"""Of a part, so many rows are turned into numbers and met by the query at a time: that stays in the cache."""
MAX_HEADER_BYTES = 1 << 24
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
NUMPY_DTYPES: Mapping[str, str] = {"U8": "|u1", "F32": "<f4", "I64": "<i8"}
LISTS = ("examples", "visits")
FACTORS = ("left", "right", "scale")

Shapes = Mapping[str, tuple[int, ...]]
"""Of a model's weights, by parameter name."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a file; ``begin`` counts from the end of the header."""

    label: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def parameter(self) -> str:
        """Whose factor it is."""
        return self.label.rpartition("/")[0]

    @property
    def part(self) -> str:
        """Which factor; empty for what is none."""
        return self.label.rpartition("/")[2] if "/" in self.label else ""

    @property
    def rows(self) -> int:
        """Its first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape[1:])

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return self.rows * self.row_bytes


class SketchBytes(Protocol):
    """Where the bytes of one file of sketches lie."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def prefix(self) -> bytes:
        """The length and the header.

        Raises:
            Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``, ``MALFORMED``.
        """
        ...

    def read(self, piece: Piece, first_row: int, rows: int) -> bytearray:
        """Some rows of a tensor, fewer where the file ends before.

        Raises:
            Rejected: as ``prefix``.
        """
        ...

    def hold_to(self, sha256: bytes) -> None:
        """For bytes that are no safetensors: refuses them, unless they are the committed ones all the same.

        Raises:
            Rejected: ``DIGEST_MISMATCH``, as ``prefix``.
        """
        ...


class SketchStore(Protocol):
    """What finds the bytes that a window's entry commits to."""

    def sketches(self, file: WindowFile, entry: WindowEntry) -> SketchBytes:
        """Those of one entry.

        Raises:
            Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``.
        """
        ...


class RunFolder:
    """The folder that the job left: a file for each entry."""

    def sketches(self, file: WindowFile, entry: WindowEntry) -> SketchBytes:
        """The file that is named by the entry's digest."""
        path = file.directory / blob_path(entry.sketches_sha256)
        found_bytes = _size_of(path)
        if found_bytes != entry.sketches_bytes:
            raise Rejected(
                Reason.DIGEST_MISMATCH, f"{path} has {found_bytes} bytes, committed are {entry.sketches_bytes}"
            )
        return _SketchFile(path)


class _SketchFile:
    """A file of its own."""

    def __init__(self, path: Path) -> None:
        self.name = f"sketches {path.stem}"
        self._path = path
        self._prefix_bytes = 0

    def prefix(self) -> bytes:
        with open_regular(self._path) as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            held = head + (file.read(length) if length <= MAX_HEADER_BYTES else b"")
        self._prefix_bytes = len(held)
        return held

    def read(self, piece: Piece, first_row: int, rows: int) -> bytearray:
        with open_regular(self._path) as file:
            begin = self._prefix_bytes + piece.begin + first_row * piece.row_bytes
            return read_at(file, begin, rows * piece.row_bytes)

    def hold_to(self, sha256: bytes) -> None:
        with open_regular(self._path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        if digest != sha256:
            raise Rejected(Reason.DIGEST_MISMATCH, f"{self._path} has SHA-256 {digest.hex()}")


class Sketches:
    """One source's sketches of a window: of ``examples`` ``[N]``, summed over ``visits`` ``[M, 2]`` (step, example).

    Made by ``open_sketches`` alone: what is here is what the log commits to.
    """

    def __init__(self, held: SketchBytes, prefix: bytes) -> None:
        self._held = held
        self.prefix = prefix
        self.pieces = pieces_of(held.name, prefix)
        self.parameters: dict[str, dict[str, Piece]] = {}
        """Parts of each parameter, in the file's order."""
        self.lists: dict[str, Piece] = {}
        for piece in self.pieces:
            if piece.label in LISTS:
                self.lists[piece.label] = piece
            else:
                self.parameters.setdefault(piece.parameter, {})[piece.part] = piece
        widths = [piece.row_bytes for piece in self.pieces if piece.label not in LISTS]
        fitting = min(PARAMETER_BYTES // max(1, *widths, 1), ALL_BYTES // max(1, sum(widths)))
        self._rows_at_once = min(ROWS_AT_ONCE, max(1, fitting))
        self._seen: dict[tuple[str, int], bytes] = {}
        self.examples = self.visits = torch.zeros(0, dtype=torch.int64)

    @property
    def claimed_visits(self) -> int:
        """Before anything is checked: how many visits the header speaks of."""
        return self.lists["visits"].rows if "visits" in self.lists else 0

    @property
    def rank(self) -> int:
        """The most columns of any parameter."""
        return max(parts["scale"].shape[1] for parts in self.parameters.values())

    def check(self, file: WindowFile, entry: WindowEntry, shapes: Shapes) -> Self:
        """Reads all of it once, against the entry and against ``shapes``.

        Raises:
            Rejected: ``DIGEST_MISMATCH``, ``MALFORMED``, as ``SketchBytes``.
        """
        name, sha256 = self._held.name, hashlib.sha256(self.prefix)
        size_bytes = len(self.prefix) + sum(piece.size_bytes for piece in self.pieces)
        if size_bytes != entry.sketches_bytes:
            raise Rejected(
                Reason.DIGEST_MISMATCH, f"{name} have {size_bytes} bytes, committed are {entry.sketches_bytes}"
            )
        for piece in self.pieces:
            for first, rows in self.parts_of(piece):
                content = self._held.read(piece, first, rows)
                self._seen[piece.label, first] = blake3(content).digest()
                sha256.update(content)
        if sha256.digest() != entry.sketches_sha256:
            raise Rejected(
                Reason.DIGEST_MISMATCH,
                f"{name} have SHA-256 {sha256.hexdigest()}, committed is {entry.sketches_sha256.hex()}",
            )
        self.examples, self.visits = self._visited(file)
        if not self.parameters:
            raise Rejected(Reason.MALFORMED, f"{name}: expected left, right and scale of each parameter")
        for parameter, parts in self.parameters.items():
            if set(parts) != set(FACTORS):
                raise Rejected(Reason.MALFORMED, f"{name}: the factors of {parameter!a:.100} are not whole")
            if not self._fits(parts, shapes.get(parameter)):
                raise Rejected(
                    Reason.MALFORMED, f"{name}: the factors of {parameter!a:.100} are not of this model's shapes"
                )
        return self

    def parts_of(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each part in which a tensor is read: the same for all factors."""
        for first in range(0, piece.rows, self._rows_at_once):
            yield first, min(self._rows_at_once, piece.rows - first)

    def read(self, piece: Piece, first: int, rows: int) -> bytearray:
        """A part again, which must be as it was when it was checked.

        Raises:
            Rejected: ``DIGEST_MISMATCH``, as ``SketchBytes``.
        """
        content = self._held.read(piece, first, rows)
        if self._seen.get((piece.label, first)) != blake3(content).digest():
            raise Rejected(Reason.DIGEST_MISMATCH, f"{self._held.name} changed while it was read")
        return content

    def scores(self, query: "SketchQuery") -> Tensor:
        """What each example did for the query, ``[N]``; as ``trace.window_scores``, positive where it raised it."""
        total_N = torch.zeros(len(self.examples), dtype=torch.float64)
        for parameter, parts in self.parameters.items():
            if parameter not in query.turned:
                continue
            at_once = min(ROWS_MET_AT_ONCE, self._rows_at_once)
            of_weight = query.of_weight(parameter, at_once, parts["scale"].shape[1])
            for first, rows in self.parts_of(parts["left"]):
                left_NrP, right_NrQ, scale_Nr = (
                    self.tensor(parts[part], first, rows) for part in ("left", "right", "scale")
                )
                for begin in range(0, rows, at_once):
                    few = slice(begin, begin + at_once)
                    columns_Nr = of_weight.columns(left_NrP[few], right_NrQ[few])
                    parts_N = (columns_Nr * scale_Nr[few]).sum(dim=1).double()
                    total_N[first + begin : first + begin + len(parts_N)] -= parts_N
        return total_N

    def scores_of(self, examples: Sequence[int], queries: Mapping[str, Tensor]) -> Tensor:
        """What these examples did for queries, ``[K, P, Q]`` by parameter: ``[N, K]``; zeros of those not here.

        Raises:
            Rejected: as ``read``.
        """
        total_NK = torch.zeros(len(examples), len(next(iter(queries.values()))), dtype=torch.float64)
        for parameter, gradients_NPQ in self.gradients_of(examples):
            if parameter in queries:
                query_KPQ = queries[parameter]
                rows, columns = query_KPQ.shape[1:]
                total_NK -= gradients_NPQ[:, :rows, :columns].flatten(1) @ query_KPQ.flatten(1).T
        return total_NK

    def gradients_of(self, examples: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """What these examples added, ``[N, P, Q]`` of each parameter, padded to even sizes; zeros of those not here.

        Nothing where none of them is here.

        Raises:
            Rejected: as ``read``.
        """
        row_of = {number: row for row, number in enumerate(self.examples.tolist()) if number in examples}
        for parameter, parts in self.parameters.items() if row_of else ():
            sizes = [2 * parts[part].shape[2] for part in ("left", "right")]
            gradients_NPQ = torch.zeros(len(examples), *sizes)
            for first, rows in self.parts_of(parts["left"]):
                here = [
                    place for place, number in enumerate(examples) if first <= row_of.get(number, -1) < first + rows
                ]
                if not here:
                    continue
                left_NrP, right_NrQ, scale_Nr = (self.tensor(parts[part], first, rows) for part in FACTORS)
                for place in here:
                    row = row_of[examples[place]] - first
                    scaled_rP = _in_order(left_NrP[row]) * scale_Nr[row][:, None]
                    gradients_NPQ[place] = scaled_rP.T @ _in_order(right_NrQ[row])
            yield parameter, gradients_NPQ

    def tensor(self, piece: Piece, first: int, rows: int) -> Tensor:
        """A part as numbers; as ``read``."""
        array = np.frombuffer(self.read(piece, first, rows), dtype=NUMPY_DTYPES[piece.dtype])
        return torch.from_numpy(array).reshape(rows, *piece.shape[1:])

    def _whole(self, part: str) -> Tensor:
        piece = self.lists[part]
        parts = [self.tensor(piece, first, rows) for first, rows in self.parts_of(piece)]
        return torch.cat(parts) if parts else torch.zeros(piece.shape, dtype=torch.int64)

    def _visited(self, file: WindowFile) -> tuple[Tensor, Tensor]:
        """Both lists, if they are whole, in order, of the window's steps and of one another."""
        name = self._held.name
        held = {part: (piece.dtype, len(piece.shape), *piece.shape[1:]) for part, piece in self.lists.items()}
        if held.get("examples") != ("I64", 1) or not self.lists["examples"].rows:
            raise Rejected(Reason.MALFORMED, f"{name}: expected examples, int64 [N]")
        if held.get("visits") != ("I64", 2, 2):
            raise Rejected(Reason.MALFORMED, f"{name}: expected visits, int64 [M, 2]")
        examples_N, visits_M2 = self._whole("examples"), self._whole("visits")
        steps_M, of_M = visits_M2.unbind(dim=1)
        later = (steps_M[1:] > steps_M[:-1]) | ((steps_M[1:] == steps_M[:-1]) & (of_M[1:] > of_M[:-1]))
        if not bool((examples_N[1:] > examples_N[:-1]).all() and later.all()) or int(examples_N[0]) < 0:
            raise Rejected(Reason.MALFORMED, f"{name}: examples or visits are not in strictly increasing order")
        if not torch.equal(torch.unique(of_M), examples_N):
            raise Rejected(Reason.MALFORMED, f"{name}: visits are not of the examples listed")
        if int(steps_M[0]) < file.window.first or int(steps_M[-1]) > file.window.last:
            raise Rejected(
                Reason.MALFORMED, f"{name}: visits outside of the steps {file.window.first} to {file.window.last}"
            )
        return examples_N, visits_M2

    def _fits(self, parts: Mapping[str, Piece], shape: tuple[int, ...] | None) -> bool:
        left, right, scale = (parts[part] for part in FACTORS)
        columns = (len(self.examples), scale.shape[1] if len(scale.shape) == 2 else -1)
        return (
            (left.dtype, right.dtype, scale.dtype) == ("U8", "U8", "F32")
            and scale.shape == left.shape[:2] == right.shape[:2] == columns
            and len(left.shape) == len(right.shape) == 3
            and columns[1] > 0
            and (shape is None or packed_sizes(shape) == (left.shape[2], right.shape[2]))
            and all(bool(torch.isfinite(self.tensor(scale, *part)).all()) for part in self.parts_of(scale))
        )


def open_sketches(store: SketchStore, file: WindowFile, entry: WindowEntry) -> Sketches:
    """The sketches that an entry commits to, of which only the header is read yet: they are to be ``check``ed.

    Raises:
        Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``, ``MALFORMED``.
    """
    if not entry.sketches_sha256:
        raise Rejected(Reason.NOT_FOUND, "the window lists no sketches of it")
    held = store.sketches(file, entry)
    prefix = held.prefix()
    try:
        return Sketches(held, prefix)
    except Rejected:
        held.hold_to(entry.sketches_sha256)
        raise


class SketchQuery:
    """A query as sketches are met by it: each weight's gradient, in the order in which numbers are packed.

    Bytes hold two numbers each, of one parity; keeping those of a parity together saves interleaving every sketch.
    """

    def __init__(self, query: Mapping[str, Tensor]) -> None:
        self.shapes: Shapes = {name: tuple(gradient.shape) for name, gradient in query.items()}
        self.turned = {name: _by_parity(_by_parity(gradient).T).contiguous() for name, gradient in query.items()}
        """``[2⌈Q/2⌉, 2⌈P/2⌉]``."""

    def of_weight(self, parameter: str, rows: int, rank: int) -> "WeightQuery":
        """One weight's part, ready to meet sketches of a rank, so many at once."""
        return WeightQuery(self.turned[parameter], rows, rank)


class WeightQuery:
    """A weight's query, and memory in which sketches meet it: taken at every product it would cost as much as that.

    Not for two threads at a time.
    """

    def __init__(self, turned_QP: Tensor, rows: int, rank: int) -> None:
        self._turned_QP = turned_QP
        self._right_NrQ, self._met_NrP, self._left_NrP = (
            torch.empty(rows, rank, size) for size in (*turned_QP.shape, turned_QP.shape[1])
        )

    def columns(self, left_NrP: Tensor, right_NrQ: Tensor) -> Tensor:
        """``[N, r]``: ``leftᵀ query right`` of each column, from packed factors of at most ``rows`` sketches."""
        count = len(left_NrP)
        right = numbers_of(right_NrQ, self._right_NrQ[:count])
        met = self._met_NrP[:count]
        torch.mm(right.flatten(0, 1), self._turned_QP, out=met.flatten(0, 1))
        return met.mul_(numbers_of(left_NrP, self._left_NrP[:count])).sum(dim=2)


def pieces_of(name: str, prefix: bytes) -> tuple[Piece, ...]:
    """The tensors that a header lists, in the order in which they lie.

    Raises:
        Rejected: ``MALFORMED``.
    """
    if len(prefix) < 8 or int.from_bytes(prefix[:8], "little") != len(prefix) - 8:
        raise Rejected(Reason.MALFORMED, f"{name}: no safetensors file: its header is cut off or too long")
    try:
        listed = msgspec.json.decode(prefix[8:], type=dict[str, msgspec.Raw])
        listed.pop("__metadata__", None)
        tensors = {label: msgspec.json.decode(held, type=_Tensor) for label, held in listed.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(Reason.MALFORMED, f"{name}: no safetensors file: {error}") from error
    pieces, end = [], 0
    for label, held in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if held.dtype not in ITEM_BYTES:
            raise Rejected(Reason.MALFORMED, f"{name}: no safetensors file: numbers of {held.dtype!a:.20}")
        piece = Piece(label, held.dtype, held.shape, end)
        if held.data_offsets != (end, end + piece.size_bytes) or (piece.rows and not piece.row_bytes):
            raise Rejected(Reason.MALFORMED, f"{name}: no safetensors file: its tensors do not lie without gaps")
        pieces.append(piece)
        end += piece.size_bytes
    return tuple(pieces)


def numbers_of(packed_NrP: Tensor, numbers_NrP: Tensor | None = None) -> Tensor:
    """``[N, r, ⌈P/2⌉]`` bytes as float32 ``[N, r, 2⌈P/2⌉]``: the lower halves (even places), then the upper ones.

    ``numbers_NrP`` is memory to put them in.
    """
    count, rank, size = packed_NrP.shape
    numbers = torch.empty(count, rank, 2 * size) if numbers_NrP is None else numbers_NrP
    numbers[:, :, :size] = (packed_NrP & 15).view(torch.int8).sub_(NIBBLE_ZERO)
    numbers[:, :, size:] = (packed_NrP >> 4).view(torch.int8).sub_(NIBBLE_ZERO)
    return numbers


def packed_sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes that a column takes along each dimension of a weight."""
    return tuple((size + 1) // 2 for size in shape)


def open_regular(path: Path) -> BufferedReader:
    """A file for reading, as it lies there: no link, no pipe, no device.

    Raises:
        Rejected: ``NOT_FOUND``.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise Rejected(Reason.NOT_FOUND, f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Rejected(Reason.NOT_FOUND, f"{path}: no regular file")
    return file


def read_at(file: BufferedReader, begin: int, size_bytes: int) -> bytearray:
    """Some bytes of a file, fewer where it ends before."""
    content = bytearray(size_bytes)
    file.seek(begin)
    del content[file.readinto(content) :]
    return content


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def __post_init__(self) -> None:
        if min((*self.shape, *self.data_offsets), default=0) < 0:
            raise ValueError("sizes are not negative")


def _size_of(path: Path) -> int:
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _by_parity(x_PQ: Tensor) -> Tensor:
    """Rows of even number, then those of odd number, as many: a row of zeros stands for the one that is missing."""
    even, odd = x_PQ[::2], x_PQ[1::2]
    return torch.cat([even, odd, odd.new_zeros(len(even) - len(odd), odd.shape[1])])


def _in_order(packed_rP: Tensor) -> Tensor:
    """``[r, ⌈P/2⌉]`` bytes as float32 ``[r, 2⌈P/2⌉]``, in the order of the weight."""
    return torch.stack([packed_rP & 15, packed_rP >> 4], dim=2).flatten(1).float() - NIBBLE_ZERO
