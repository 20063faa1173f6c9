"""From a source to its examples: sketches of the leading sources, opened and dotted with the query.

A sketch is the low-rank part of what one example added to the gradients of a window (``sketches.py`` reads them and
holds them to the log). Only those of sources that stand out are opened, and of these no more than an allowance: then
the windows in which a source's exact score is highest come first. What is left out is known: the sum over the opened
sketches is held against the source's exact score, from its accumulators. The first examples of each source are
then read once more, to be met by the control outputs: their ``z`` is of sketches, as that of their source is of sums.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attribution.controls import Queries, deviations
from attribution.cores import each_on_a_core
from attribution.sketches import Sketches, SketchQuery, SketchStore, open_sketches
from attribution.weights import WindowFile
from consensus.accumulators import WindowEntry
from consensus.rejection import Rejected

OPEN_AT_MOST = 100_000
"""Example-visits whose sketches are opened for one answer, unless more are asked for."""
JUDGED_EXAMPLES = 5
"""So many of a source's examples, the first ones, are judged against the controls."""
RANKED_EXAMPLES = 1_000
"""At most so many of a source's examples are told one by one."""


@dataclass(slots=True)
class Allowance:
    """How many example-visits may be opened for the rest of an answer."""

    visits: int = OPEN_AT_MOST


@dataclass(frozen=True, slots=True)
class Asked:
    """A source, its exact score, and the part of it that each window has, by its last step."""

    source: bytes
    exact: float
    by_window: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example's part; ``by_window``, by last step, adds up to ``score``. ``steps`` are those it was admitted to.

    ``z`` is against its own scores for the controls; None where that was not asked.
    """

    example: int
    score: float
    by_window: Mapping[int, float]
    steps: tuple[int, ...]
    z: float | None = None


@dataclass(frozen=True, slots=True)
class SourceExamples:
    """A source's examples, the highest score first, the first 1,000 of them told one by one.

    ``opened`` sketches of ``visits`` visits are of ``examples`` examples; ``covered`` is the sum of all of their scores
    over the exact one. ``left_out`` says which windows' sketches are missing or not those committed to, and why.
    ``unopened`` are the first and last steps of those that the allowance did not reach, ``unopened_visits`` their
    visits.
    """

    source: bytes
    rank: int
    opened: int
    visits: int
    examples: int
    covered: float
    ranked: tuple[ExampleScore, ...]
    left_out: tuple[str, ...]
    unopened: tuple[tuple[int, int], ...]
    unopened_visits: int


@dataclass(frozen=True, slots=True)
class _Found:
    """The windows of a source that can be opened, and why the others cannot."""

    held: list[tuple[WindowFile, WindowEntry, Sketches]]
    left_out: list[str]


def source_examples(
    query: SketchQuery,
    files: Sequence[WindowFile],
    sources: Sequence[Asked],
    store: SketchStore,
    allowance: Allowance,
    beside: Iterable[Queries] = (),
) -> list[SourceExamples]:
    """What each example of these sources did for the query; nothing of a source that no window lists sketches of.

    What may be opened goes to the sources in their order. With the query and its controls ``beside``, in one or several
    parts, the first examples of each are judged against the controls.

    Raises:
        Rejected: ``DIGEST_MISMATCH`` for sketches that changed after they were scored.
    """
    asked = [one for one in sources if any(entry.sketches_sha256 for _, entry in _entries(files, one.source))]
    found = [_find(store, files, one.source) for one in asked]
    chosen = [_within(allowance, one, of.held) for one, of in zip(asked, found, strict=True)]
    pieces = [of.held[number] for of, numbers in zip(found, chosen, strict=True) for number in sorted(numbers)]

    def score(piece: tuple[WindowFile, WindowEntry, Sketches]) -> Tensor | Rejected:
        file, entry, sketches = piece
        try:
            return sketches.check(file, entry, query.shapes).scores(query)
        except Rejected as error:
            return error

    scored = each_on_a_core(score, pieces)
    made = [
        _examples_of(one, of, {number: next(scored) for number in sorted(numbers)})
        for one, of, numbers in zip(asked, found, chosen, strict=True)
    ]
    return _judged(made, beside)


def _examples_of(
    asked: Asked, found: _Found, scored: Mapping[int, Tensor | Rejected]
) -> tuple[SourceExamples, list[Sketches]]:
    """Of the windows that were opened, by their number: ranked, and what was not; and their sketches."""
    rows: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]] = []
    visits: list[npt.NDArray[np.int64]] = []
    unopened: list[tuple[int, int]] = []
    rank = unopened_visits = 0
    for number, (file, _, sketches) in enumerate(found.held):
        scores_N = scored.get(number)
        if scores_N is None:
            unopened.append((file.window.first, file.window.last))
            unopened_visits += sketches.claimed_visits
            continue
        if isinstance(scores_N, Rejected):
            found.left_out.append(_why(file, scores_N))
            continue
        rank = max(rank, sketches.rank)
        rows.append((file.window.last, sketches.examples.numpy(), scores_N.numpy()))
        visits.append(sketches.visits.numpy())
    examples, ranked, total = _ranked(rows, visits)
    opened = [held for number, (_, _, held) in enumerate(found.held) if isinstance(scored.get(number), Tensor)]
    made = SourceExamples(
        asked.source,
        rank,
        opened=sum(len(numbers) for _, numbers, _ in rows),
        visits=sum(len(held) for held in visits),
        examples=examples,
        covered=total / asked.exact if asked.exact else 0.0,
        ranked=ranked,
        left_out=tuple(found.left_out),
        unopened=tuple(unopened),
        unopened_visits=unopened_visits,
    )
    return made, opened


def _judged(
    made: Sequence[tuple[SourceExamples, Sequence[Sketches]]], beside: Iterable[Queries]
) -> list[SourceExamples]:
    """The same, the first examples of each with their deviations from their own scores for the controls."""
    firsts = [of.ranked[:JUDGED_EXAMPLES] for of, _ in made]
    parts: list[list[Tensor]] = [[] for _ in made]
    lengths: list[float] = []
    for queries in beside if any(firsts) else ():
        lengths += queries.lengths
        for first, (_, opened), parts_NK in zip(firsts, made, parts, strict=True):
            if first:
                numbers, gradients = [row.example for row in first], queries.gradients
                total_NK = sum(each_on_a_core(partial(_scores_of, numbers, gradients), opened))
                assert isinstance(total_NK, Tensor)
                parts_NK.append(total_NK)
    if not lengths:
        return [of for of, _ in made]
    judged = []
    for first, (of, _), parts_NK in zip(firsts, made, parts, strict=True):
        scores = torch.cat(parts_NK, dim=1).tolist() if first else []
        ranked = [replace(row, z=deviations(scores_K, lengths)) for row, scores_K in zip(first, scores, strict=True)]
        judged.append(replace(of, ranked=(*ranked, *of.ranked[JUDGED_EXAMPLES:])))
    return judged


def _scores_of(examples: Sequence[int], queries: Mapping[str, Tensor], held: Sketches) -> Tensor:
    return held.scores_of(examples, queries)


def _find(store: SketchStore, files: Sequence[WindowFile], source: bytes) -> _Found:
    found = _Found([], [])
    for file, entry in _entries(files, source):
        try:
            found.held.append((file, entry, open_sketches(store, file, entry)))
        except Rejected as error:
            found.left_out.append(_why(file, error))
    return found


def _within(
    allowance: Allowance, asked: Asked, held: Sequence[tuple[WindowFile, WindowEntry, Sketches]]
) -> frozenset[int]:
    """Which of them are opened; the allowance shrinks by their visits."""
    best = sorted(range(len(held)), key=lambda number: (-asked.by_window.get(held[number][0].window.last, 0.0), number))
    chosen = set()
    for number in best:
        visits = held[number][2].claimed_visits
        if visits <= allowance.visits:
            allowance.visits -= visits
            chosen.add(number)
    return frozenset(chosen)


def _ranked(
    rows: Sequence[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]], visits: Sequence[npt.NDArray[np.int64]]
) -> tuple[int, tuple[ExampleScore, ...], float]:
    """How many examples there are, the highest of them in order, and the sum over all."""
    if not rows:
        return 0, (), 0.0
    examples_E, row_of = np.unique(np.concatenate([numbers for _, numbers, _ in rows]), return_inverse=True)
    scores = np.concatenate([scores for _, _, scores in rows])
    windows = np.concatenate([np.full(len(numbers), last) for last, numbers, _ in rows])
    total_E = np.bincount(row_of, weights=scores, minlength=len(examples_E))
    order = np.lexsort((examples_E, -total_E))[:RANKED_EXAMPLES]
    place = np.full(len(examples_E), -1)
    place[order] = np.arange(len(order))
    by_window: list[dict[int, float]] = [{} for _ in order]
    for row in np.flatnonzero(place[row_of] >= 0).tolist():
        parts, last = by_window[place[row_of[row]]], int(windows[row])
        parts[last] = parts.get(last, 0.0) + float(scores[row])
    steps: list[list[int]] = [[] for _ in order]
    visited = np.concatenate(visits)
    place_of_visit = place[np.searchsorted(examples_E, visited[:, 1])]
    for row in np.flatnonzero(place_of_visit >= 0).tolist():
        steps[place_of_visit[row]].append(int(visited[row, 0]))
    ranked = tuple(
        ExampleScore(int(examples_E[row]), float(total_E[row]), by_window[number], tuple(sorted(steps[number])))
        for number, row in enumerate(order.tolist())
    )
    return len(examples_E), ranked, float(total_E.sum())


def _entries(files: Sequence[WindowFile], source: bytes) -> Iterator[tuple[WindowFile, WindowEntry]]:
    for file in files:
        for entry in file.listed.of_sources:
            if entry.source == source:
                yield file, entry


def _why(file: WindowFile, error: Rejected) -> str:
    return f"steps {file.window.first} to {file.window.last}: {error}"
