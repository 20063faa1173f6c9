"""The index of a campaign's sketches: columns of NumPy, one source's rows together.

A folder that holds, in other order, what the files of sketches hold, and nothing of its own:

* ``index.json``: of which chain and campaign, the parameters, a *segment* for each file taken (source, policy, window,
  how many examples and visits, length of its safetensors header), in order of source, window and policy; and which
  files were left out, and why;
* ``windows/ROOT.window``: the windows' lists, as in the run's folder;
* ``examples.npy`` int64 ``[N]``, ``visits.npy`` int64 ``[M, 2]`` (step, example), ``headers.npy`` uint8: those of all
  segments, one after the other;
* ``columns/NUMBER.left.npy`` and ``.right.npy`` uint8 ``[N, r, ⌈P/2⌉]``, ``.scale.npy`` float32 ``[N, r]`` for each
  parameter. A segment that does not have a parameter (it was closed) has no rows there.

**Root of trust.** None of it is believed because it is here. The lists are held to the roots on the log; of a segment,
the headers' bytes and its rows of each column, put in the order that the header says, are the file that its list
commits to by SHA-256, and are held to that by every query that opens it (``sketches.py``). What ``index.json`` says
only tells where to read. So an index may come from anybody, and a spoiled one gives no answer instead of a wrong one.

Rows are read a part at a time, not mapped: what is mapped counts as memory, and a file cut off under a map kills the
process. ``index_build.py`` makes an index and checks all of one.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from attribution.log import CampaignLog
from attribution.sketches import (
    FACTORS,
    MAX_HEADER_BYTES,
    Piece,
    SketchBytes,
    open_regular,
    packed_sizes,
    read_at,
)
from attribution.weights import WindowFile, open_window
from consensus.accumulators import WindowEntry
from consensus.predicates.accumulators import Window
from consensus.rejection import Reason, Rejected
from consensus.sketch_ranks import sketch_ranks

FORMAT = "countersign-sketch-index"
VERSION = 1
MAX_INDEX_JSON_BYTES = 1 << 29
NPY_HEADER_BYTES = 128
COLUMNS = "columns"

Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=1, le=2**53 - 1)]


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of sketches: whose, of which window, how much. ``absent`` are numbers of parameters it does not have."""

    source: Hex32
    policy: Hex32
    first_step: Count
    last_step: Count
    examples: Count
    visits: Count
    header_bytes: Annotated[int, Meta(ge=8, le=MAX_HEADER_BYTES + 8)]
    absent: tuple[Annotated[int, Meta(ge=0)], ...] = ()

    @property
    def place(self) -> tuple[str, int, str]:
        """What there is one segment of, and by what they are sorted."""
        return self.source, self.first_step, self.policy


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the index does not hold, and why; ``source`` and ``policy`` are empty for a whole window."""

    source: str
    policy: str
    first_step: Count
    last_step: Count
    why: str

    def __str__(self) -> str:
        whose = f", source {self.source}" if self.source else ""
        return f"steps {self.first_step} to {self.last_step}{whose}: {self.why}"


class IndexHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``index.json``."""

    format: str
    version: int
    chain_id: Hex32
    campaign: Hex32
    parameters: tuple[str, ...]
    segments: tuple[Segment, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True)
class SketchedCampaign:
    """What the log says of a campaign's sketches. By weights' names: ``shapes``, and ``ranks`` other than ``rank``."""

    chain_id: bytes
    campaign: bytes
    rank: int
    shapes: Mapping[str, tuple[int, ...]]
    windows: tuple[Window, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, log: CampaignLog) -> Self:
        """From a checked bundle.

        Raises:
            Rejected: ``NOT_FOUND`` for a campaign that keeps no sketches; as ``sketch_ranks``.
        """
        campaign = log.provenance.campaign
        if not campaign.sketch_rank or not log.provenance.windows:
            raise Rejected(
                Reason.NOT_FOUND,
                f"campaign {log.bundle.campaign.hex()} keeps no sketches (sketch_rank {campaign.sketch_rank}, "
                f"{len(log.provenance.windows)} windows): there is nothing to index",
            )
        tensors = [tensor for block in campaign.parameter_blocks for tensor in block.tensors if len(tensor.shape) == 2]
        return cls(
            bytes(log.bundle.trusted.chain_id),
            log.bundle.campaign,
            campaign.sketch_rank,
            {tensor.name: tensor.shape for tensor in tensors},
            log.provenance.windows,
            sketch_ranks(campaign),
        )

    def rank_of(self, parameter: str) -> int:
        """Columns kept of a weight."""
        return min(self.ranks.get(parameter, self.rank), *self.shapes[parameter])


Committed = tuple[WindowFile, WindowEntry]


def committed_sketches(terms: SketchedCampaign, directory: Path) -> tuple[list[Committed], list[LeftOut]]:
    """What the log commits to, in an index's order, by the lists in ``directory``; and windows without a list."""
    found: list[Committed] = []
    missing: list[LeftOut] = []
    for window in terms.windows:
        try:
            file = open_window(directory, terms.campaign, window)
        except Rejected as error:
            missing.append(LeftOut("", "", window.first, window.last, str(error)))
        else:
            found += [(file, entry) for entry in file.listed.of_sources]
    found.sort(key=lambda pair: place_of(*pair))
    return found, missing


@dataclass(frozen=True, slots=True)
class Column:
    """One file of rows: a NumPy array with a header of 128 bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    row_bytes: int

    @property
    def header(self) -> bytes:
        """As NumPy's format 1.0 has it."""
        described = f"{{'descr': '{self.dtype}', 'fortran_order': False, 'shape': {self.shape!r}, }}"
        padded = described.ljust(NPY_HEADER_BYTES - 11) + "\n"
        return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")

    def check(self) -> None:
        """Refuses a file of another size or form.

        Raises:
            Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``.
        """
        with open_regular(self.path) as file:
            self._check_size(file.fileno())
            if file.read(NPY_HEADER_BYTES) != self.header:
                raise Rejected(Reason.DIGEST_MISMATCH, f"{self.path}: expected {self.dtype} {self.shape}")

    def read(self, first: int, rows: int) -> bytearray:
        """A copy of some rows.

        Raises:
            Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``.
        """
        with open_regular(self.path) as file:
            self._check_size(file.fileno())
            return read_at(file, NPY_HEADER_BYTES + first * self.row_bytes, rows * self.row_bytes)

    def _check_size(self, descriptor: int) -> None:
        found, expected = os.fstat(descriptor).st_size, NPY_HEADER_BYTES + self.shape[0] * self.row_bytes
        if found != expected:
            raise Rejected(Reason.DIGEST_MISMATCH, f"{self.path} has {found} bytes, expected {expected}")


class Index:
    """An index in a folder: a store of sketches. ``open_index`` makes it."""

    def __init__(self, folder: Path, header: IndexHeader, terms: SketchedCampaign) -> None:
        self.folder = folder
        self.header = header
        self.terms = terms
        self._number_of = {segment.place: number for number, segment in enumerate(header.segments)}
        segments = header.segments
        self._first_example = _starts(segment.examples for segment in segments)
        self._first_visit = _starts(segment.visits for segment in segments)
        self._first_header = _starts(segment.header_bytes for segment in segments)
        lacking = {number for segment in segments for number in segment.absent}
        self._first_of_parameter = {
            number: _starts(0 if number in segment.absent else segment.examples for segment in segments)
            for number in sorted(lacking)
        }
        self._parameter_number = {name: number for number, name in enumerate(header.parameters)}
        self.columns = self._all_columns()

    @property
    def examples(self) -> int:
        """Rows: examples, by source, policy and window."""
        return self._first_example[-1]

    @property
    def visits(self) -> int:
        """Example-visits that the rows sum over."""
        return self._first_visit[-1]

    @property
    def size_bytes(self) -> int:
        """Of all columns."""
        return sum(NPY_HEADER_BYTES + column.shape[0] * column.row_bytes for column in self.columns.values())

    def sketches(self, file: WindowFile, entry: WindowEntry) -> SketchBytes:
        """Those of one entry of a window.

        Raises:
            Rejected: ``NOT_FOUND`` where the index does not hold them.
        """
        number = self._number_of.get(place_of(file, entry))
        if number is None:
            source, policy, first = entry.source.hex(), entry.policy.hex(), file.window.first
            why = next(
                (
                    held.why
                    for held in self.header.left_out
                    if held.first_step == first and (held.source, held.policy) in (("", ""), (source, policy))
                ),
                "build it again",
            )
            raise Rejected(Reason.NOT_FOUND, f"index {self.folder} does not hold these sketches: {why}")
        return _IndexedSketches(self, number)

    def column_and_first(self, label: str, number: int) -> tuple[Column, int, int]:
        """The column of a tensor called ``label``, and a segment's first row and number of rows there.

        Raises:
            Rejected: ``DIGEST_MISMATCH`` for a tensor that the index does not have.
        """
        segment, column = self.header.segments[number], self.columns.get(label)
        if column is None:
            raise Rejected(Reason.DIGEST_MISMATCH, f"index {self.folder} has no column of {label!a:.100}")
        if label == "visits":
            return column, self._first_visit[number], segment.visits
        parameter = self._parameter_number.get(label.rpartition("/")[0], -1)
        if parameter in segment.absent:
            raise Rejected(Reason.DIGEST_MISMATCH, f"index {self.folder} has no rows of {label!a:.100} there")
        firsts = self._first_of_parameter.get(parameter, self._first_example)
        return column, firsts[number], segment.examples

    def prefix_of(self, number: int) -> bytes:
        """The safetensors header of a segment's file, with its length."""
        length = self.header.segments[number].header_bytes
        return bytes(self.columns["headers"].read(self._first_header[number], length))

    def _all_columns(self) -> dict[str, Column]:
        columns = {
            "examples": Column(self.folder / "examples.npy", "<i8", (self._first_example[-1],), 8),
            "visits": Column(self.folder / "visits.npy", "<i8", (self._first_visit[-1], 2), 16),
            "headers": Column(self.folder / "headers.npy", "|u1", (self._first_header[-1],), 1),
        }
        for number, parameter in enumerate(self.header.parameters):
            rows = self._first_of_parameter.get(number, self._first_example)[-1]
            rank, sizes = self.terms.rank_of(parameter), packed_sizes(self.terms.shapes[parameter])
            for part, size in zip(FACTORS, (*sizes, 0), strict=True):
                shape = (rows, rank, size) if size else (rows, rank)
                path = self.folder / COLUMNS / f"{number:04}.{part}.npy"
                columns[f"{parameter}/{part}"] = Column(
                    path, "|u1" if size else "<f4", shape, rank * size if size else 4 * rank
                )
        return columns


@dataclass(frozen=True, slots=True)
class _IndexedSketches:
    """The bytes of one segment, where an index has them."""

    index: Index
    number: int

    @property
    def name(self) -> str:
        segment = self.index.header.segments[self.number]
        return (
            f"index {self.index.folder}, sketches of source {segment.source}, steps {segment.first_step} to "
            f"{segment.last_step},"
        )

    def prefix(self) -> bytes:
        return self.index.prefix_of(self.number)

    def read(self, piece: Piece, first_row: int, rows: int) -> bytearray:
        column, first, count = self.index.column_and_first(piece.label, self.number)
        if (piece.rows, piece.row_bytes) != (count, column.row_bytes):
            raise Rejected(
                Reason.DIGEST_MISMATCH,
                f"{self.name} have {piece.rows} rows of {piece.row_bytes} bytes of {piece.label!a:.100}, expected "
                f"{count} of {column.row_bytes}",
            )
        return column.read(first + first_row, rows)

    def hold_to(self, sha256: bytes) -> None:
        raise Rejected(Reason.DIGEST_MISMATCH, f"{self.name} have a header that is not the committed one")


def open_index(folder: Path, terms: SketchedCampaign) -> Index:
    """An index of this campaign; its content is held to the log as it is read.

    Raises:
        Rejected: ``NOT_FOUND``, ``OVERSIZED``, ``MALFORMED``, ``UNSUPPORTED_VERSION``, ``WRONG_CHAIN``,
            ``UNKNOWN_CAMPAIGN``, ``DIGEST_MISMATCH`` for columns of other sizes.
    """
    header = _read_header(folder)
    if header.chain_id != terms.chain_id.hex():
        raise Rejected(Reason.WRONG_CHAIN, f"index {folder} is of chain {header.chain_id}, not {terms.chain_id.hex()}")
    if header.campaign != terms.campaign.hex():
        raise Rejected(
            Reason.UNKNOWN_CAMPAIGN, f"index {folder} is of campaign {header.campaign}, not {terms.campaign.hex()}"
        )
    unknown = sorted(set(header.parameters) - set(terms.shapes))
    if unknown or len(set(header.parameters)) != len(header.parameters):
        raise Rejected(Reason.MALFORMED, f"index {folder}: parameters {unknown!a:.200} are not the campaign's")
    places = [segment.place for segment in header.segments]
    if sorted(set(places)) != places:
        raise Rejected(Reason.MALFORMED, f"index {folder}: its segments are not in order")
    for segment in header.segments:
        if list(segment.absent) != sorted(set(segment.absent) & set(range(len(header.parameters)))):
            raise Rejected(Reason.MALFORMED, f"index {folder}: a segment lacks parameters that there are not")
    index = Index(folder, header, terms)
    for column in index.columns.values():
        column.check()
    return index


def _read_header(folder: Path) -> IndexHeader:
    path = folder / "index.json"
    with open_regular(path) as file:
        content = file.read(MAX_INDEX_JSON_BYTES + 1)
    if len(content) > MAX_INDEX_JSON_BYTES:
        raise Rejected(Reason.OVERSIZED, f"{path} has more than {MAX_INDEX_JSON_BYTES} bytes")
    try:
        header = msgspec.json.decode(content, type=IndexHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(Reason.MALFORMED, f"{path}: no index of sketches: {error}") from error
    if (header.format, header.version) != (FORMAT, VERSION):
        raise Rejected(
            Reason.UNSUPPORTED_VERSION,
            f"{path}: expected {FORMAT} {VERSION}, found {header.format!a:.60} {header.version}",
        )
    return header


def place_of(file: WindowFile, entry: WindowEntry) -> tuple[str, int, str]:
    """A segment's ``place``, of an entry."""
    return entry.source.hex(), file.window.first, entry.policy.hex()


def _starts(counts: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))
