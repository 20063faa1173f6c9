"""From a source to its examples: sketches of the leading sources, opened and dotted with the query.

A sketch is the low-rank part of what one example added to the gradients of a window (``trainer_client/sketches.py``
writes them, the window's list binds them to the log). Only the files of sources that stand out are opened. What the
sketches leave out is known: their sum is held against the source's exact score, from its accumulators.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attribution.weights import WindowFile, read_blob
from consensus.accumulators import WindowEntry
from consensus.rejection import Reason, Rejected

NIBBLE_ZERO = 8
ROWS_AT_ONCE = 4_096
"""Sketches turned into numbers at a time: what bounds memory."""


@dataclass(frozen=True, slots=True)
class Sketches:
    """One source's sketches of a window: of ``examples`` ``[N]``, summed over ``visits`` ``[M, 2]`` (step, example)."""

    examples: Tensor
    visits: Tensor
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]]

    def scores(self, query: Mapping[str, Tensor]) -> Tensor:
        """What each example did for the query, ``[N]``; as ``trace.window_scores``, positive where it raised it."""
        total_N = torch.zeros(len(self.examples), dtype=torch.float64)
        for name, (left_NrP, right_NrQ, scale_Nr) in self.factors.items():
            if name not in query:
                continue
            for first in range(0, len(total_N), ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                size_P, size_Q = query[name].shape
                turned_NrP = unpacked(right_NrQ[rows], size_Q) @ query[name].T
                parts_Nr = (turned_NrP * unpacked(left_NrP[rows], size_P)).sum(dim=2) * scale_Nr[rows]
                total_N[rows] -= parts_Nr.sum(dim=1).double()
        return total_N


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example's part; ``by_window``, by last step, adds up to ``score``. ``steps`` are those it was admitted to."""

    example: int
    score: float
    by_window: Mapping[int, float]
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceExamples:
    """A source's examples, the highest score first.

    ``covered`` is the sum of all of their scores over the exact one; ``left_out`` says which windows' sketches are
    missing or not those committed to, and why.
    """

    source: bytes
    rank: int
    opened: int
    covered: float
    ranked: tuple[ExampleScore, ...]
    left_out: tuple[str, ...]


def source_examples(
    query: Mapping[str, Tensor], files: Sequence[WindowFile], source: bytes, exact: float
) -> SourceExamples | None:
    """What each example of a source did for the query; None where no window lists sketches of it."""
    by_example: dict[int, dict[int, float]] = {}
    steps: dict[int, list[int]] = {}
    left_out: list[str] = []
    opened = rank = 0
    for file, entry in _entries(files, source):
        try:
            held = read_sketches(file, entry, query)
        except Rejected as error:
            left_out.append(f"steps {file.window.first} to {file.window.last}: {error}")
            continue
        opened += len(held.examples)
        rank = max(rank, *(scale_Nr.shape[1] for _, _, scale_Nr in held.factors.values()))
        for example, score in zip(held.examples.tolist(), held.scores(query).tolist(), strict=True):
            by_window = by_example.setdefault(example, {})
            by_window[file.window.last] = by_window.get(file.window.last, 0.0) + score
        for step, example in held.visits.tolist():
            steps.setdefault(example, []).append(step)
    if not any(entry.sketches_sha256 for _, entry in _entries(files, source)):
        return None
    ranked = [
        ExampleScore(example, sum(by_window.values()), by_window, tuple(sorted(steps[example])))
        for example, by_window in by_example.items()
    ]
    ranked.sort(key=lambda row: (-row.score, row.example))
    covered = sum(row.score for row in ranked) / exact if exact else 0.0
    return SourceExamples(source, rank, opened, covered, tuple(ranked), tuple(left_out))


def read_sketches(file: WindowFile, entry: WindowEntry, query: Mapping[str, Tensor]) -> Sketches:
    """The sketches that an entry commits to, whose parameters have the shapes of the query's.

    Raises:
        Rejected: ``NOT_FOUND``, ``DIGEST_MISMATCH``, ``MALFORMED``.
    """
    if not entry.sketches_sha256:
        raise Rejected(Reason.NOT_FOUND, "the window lists no sketches of it")
    tensors = read_blob(file.directory, entry.sketches_sha256, entry.sketches_bytes)
    blob = f"sketches {entry.sketches_sha256.hex()}"
    examples, visits = _visited(blob, tensors.pop("examples", None), tensors.pop("visits", None), file)
    factors = {}
    for name in sorted({label.rpartition("/")[0] for label in tensors}):
        parts = tuple(tensors.pop(f"{name}/{label}", None) for label in ("left", "right", "scale"))
        left, right, scale = parts
        if left is None or right is None or scale is None:
            raise Rejected(Reason.MALFORMED, f"{blob}: the factors of {name!a:.100} are not whole")
        if not _fits(left, right, scale, len(examples), query.get(name)):
            raise Rejected(Reason.MALFORMED, f"{blob}: the factors of {name!a:.100} are not of this model's shapes")
        factors[name] = (left, right, scale)
    if tensors or not factors:
        raise Rejected(Reason.MALFORMED, f"{blob}: expected left, right and scale of each parameter, and nothing else")
    return Sketches(examples, visits, factors)


def unpacked(packed: Tensor, size: int) -> Tensor:
    """``[N, r, ⌈size/2⌉]`` bytes of two numbers each, as float32 ``[N, r, size]``."""
    both = torch.stack([packed & 15, packed >> 4], dim=3).flatten(2)
    return both[:, :, :size].float() - NIBBLE_ZERO


def _entries(files: Sequence[WindowFile], source: bytes) -> Iterator[tuple[WindowFile, WindowEntry]]:
    for file in files:
        for entry in file.listed.of_sources:
            if entry.source == source:
                yield file, entry


def _visited(blob: str, examples: Tensor | None, visits: Tensor | None, file: WindowFile) -> tuple[Tensor, Tensor]:
    """Both lists, if they are whole, in order, of the window's steps and of one another."""
    if examples is None or examples.dtype != torch.int64 or examples.dim() != 1 or not len(examples):
        raise Rejected(Reason.MALFORMED, f"{blob}: expected examples, int64 [N]")
    if visits is None or visits.dtype != torch.int64 or visits.dim() != 2 or visits.shape[1] != 2:
        raise Rejected(Reason.MALFORMED, f"{blob}: expected visits, int64 [M, 2]")
    numbers, rows = examples.tolist(), [tuple(row) for row in visits.tolist()]
    if any(not first < second for held in (numbers, rows) for first, second in pairwise(held)) or numbers[0] < 0:
        raise Rejected(Reason.MALFORMED, f"{blob}: examples or visits are not in strictly increasing order")
    if {example for _, example in rows} != set(numbers):
        raise Rejected(Reason.MALFORMED, f"{blob}: visits are not of the examples listed")
    if rows[0][0] < file.window.first or rows[-1][0] > file.window.last:
        raise Rejected(
            Reason.MALFORMED, f"{blob}: visits outside of the steps {file.window.first} to {file.window.last}"
        )
    return examples, visits


def _fits(left: Tensor, right: Tensor, scale: Tensor, count: int, query: Tensor | None) -> bool:
    shape = (count, scale.shape[1] if scale.dim() == 2 else -1)
    return (
        left.dtype == right.dtype == torch.uint8
        and scale.dtype == torch.float32
        and tuple(scale.shape) == shape
        and tuple(left.shape[:2]) == tuple(right.shape[:2]) == shape
        and left.dim() == right.dim() == 3
        and shape[1] > 0
        and bool(torch.isfinite(scale).all())
        and (query is None or (left.shape[2], right.shape[2]) == tuple((size + 1) // 2 for size in query.shape))
    )
