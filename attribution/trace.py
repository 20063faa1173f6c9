"""From an output back to the sources that shaped it.

For output ``f`` and source ``s``: ``score_s = − Σ_W < P ∇_W f , A_sW >``, with ``A_sW`` what the source's examples
added to the gradient of weight ``W``, times learning rate (the committed accumulators), ``∇_W f`` at the tuned weights
and ``P`` the factors' preconditioner, on the query's side.
Positive: the source's examples raised the output. The scores of control outputs, which no source is known to have
shaped, give each source a mean and a deviation to be judged by (``controls.py``; docs/adr/013, docs/adr/018).

Of a large model a few outputs at a time are met with the accumulators: a query has as many numbers as all linears.

Where a parameter table divides tensors among heads, accumulators are of its pieces (``consensus/pieces.py``). The
query's gradient is the whole weight's, preconditioned as such, and then cut: scores of pieces add up to the weight's.

Only what is committed counts: a window whose file is missing or altered is left out and named, and the answer says
which steps it rests on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attribution.controls import Queries, deviations
from attribution.cores import each_on_a_core
from attribution.examples import Allowance, Asked, SourceExamples, source_examples
from attribution.factors import WeightFactors, damping_of
from attribution.query import OUTPUTS_AT_ONCE, Output, WeightGradients, gradients_together, log_chance
from attribution.sketches import RunFolder, SketchQuery, SketchStore
from attribution.weights import Summed, WindowFile, map_entries
from consensus import portions as p
from consensus.accumulators import WindowEntry
from consensus.pieces import TensorPiece, piece_named, tensor_named
from consensus.predicates.accumulators import Provenance, UsedSource
from consensus.rejection import Reason, Rejected

LEAST_CONTROLS = 25
QUERIES_BYTES = 1 << 31
"""Queries of so many bytes are held together, unless a single one has more."""
SHAPED_LIFT_NATS = 0.05
"""Mean gain in log-chance per token, over the base model, below which an output counts as not shaped here."""
LEADING_SOURCES = 3
"""At most so many have their sketches opened."""
SHAPED_Z = 3.0
"""Deviations above its controls that the leading source must stand for the output to count as shaped by it."""


@dataclass(frozen=True, slots=True)
class SourceScore:
    """One source's part. ``z`` is against the controls; parts by block, window and policy each add up to ``score``.

    ``closed`` are parameter blocks that others moved in these windows, and this source did not directly.
    """

    source: UsedSource
    score: float
    z: float
    by_block: Mapping[str, float]
    by_window: Mapping[int, float]
    by_policy: Mapping[bytes, float]
    closed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """An answer. ``ranked`` has the highest ``z`` first; ``windows`` are the last steps of the windows it rests on.

    ``examples`` are those of the sources that stand out, in the same order, where the campaign keeps sketches.
    """

    base_log_chance: float
    tuned_log_chance: float
    ranked: tuple[SourceScore, ...]
    examples: tuple[SourceExamples, ...]
    controls: int
    windows: tuple[int, ...]

    @property
    def lift_nats(self) -> float:
        """What the fine-tune added to the mean log-chance of a token."""
        return self.tuned_log_chance - self.base_log_chance

    @property
    def made_likelier(self) -> bool:
        """Whether this fine-tune made the output likelier."""
        return self.lift_nats >= SHAPED_LIFT_NATS

    @property
    def shaped_here(self) -> bool:
        """Whether this fine-tune made the output likelier, and some source stands out."""
        return self.made_likelier and bool(self.ranked) and self.ranked[0].z >= SHAPED_Z


@dataclass(slots=True)
class _Tally:
    """Scores of one source for the output and each control, and the output's split."""

    scores: list[float]
    by_block: dict[str, float] = field(default_factory=dict)
    by_window: dict[int, float] = field(default_factory=dict)
    by_policy: dict[bytes, float] = field(default_factory=dict)

    def add(self, first: int, parts: Sequence[float], block: str, window: int, policy: bytes) -> None:
        """Parts of the scores from number ``first`` on."""
        for number, part in enumerate(parts, start=first):
            self.scores[number] += part
        own = parts[0] if first == 0 else 0.0
        self.by_block[block] = self.by_block.get(block, 0.0) + own
        self.by_window[window] = self.by_window.get(window, 0.0) + own
        self.by_policy[policy] = self.by_policy.get(policy, 0.0) + own


def trace_output(
    base: nn.Module,
    tuned: nn.Module,
    factors: Mapping[str, WeightFactors],
    provenance: Provenance,
    files: Sequence[WindowFile],
    output: Output,
    controls: Sequence[Output],
    progress: Callable[[str], None] = lambda stage: None,
    store: SketchStore | None = None,
    allowance: Allowance | None = None,
) -> Trace:
    """Rank the campaign's sources by what they did for ``output``, and the leading ones' examples.

    Args:
        store: where sketches are; by default in the files' own folder.
        allowance: how many example-visits' sketches may be opened.

    Raises:
        Rejected: ``BAD_FIELD`` for fewer than 25 controls; ``NOT_FOUND`` without any window's file; ``BAD_FIELD`` for
            accumulators or a parameter table that do not fit the model; as ``map_entries``.
    """
    if len(controls) < LEAST_CONTROLS:
        raise Rejected(
            Reason.BAD_FIELD,
            f"expected at least {LEAST_CONTROLS} control outputs, found {len(controls)}: more public text (--text) or "
            "shorter pieces of it (--context) are needed",
        )
    if not files:
        raise Rejected(Reason.NOT_FOUND, "no window's accumulators are here: there is nothing to trace by")
    asked = (output, *controls)
    at_once = queries_at_once(factors)
    parts = [slice(first, first + at_once) for first in range(0, len(asked), at_once)]

    def queries_of(few: slice) -> Queries:
        progress("gradients of the output and its controls" + (f", from {few.start + 1}" if len(parts) > 1 else ""))
        queries, lengths = preconditioned_queries(tuned, factors, asked[few])
        return Queries(queries_of_entries(queries, provenance.campaign), lengths)

    block_of = {tensor.name: block.name for block in provenance.campaign.parameter_blocks for tensor in block.tensors}
    known = {source.id: source for source in provenance.sources}
    tallies = {source: _Tally([0.0] * len(asked)) for source in known}
    sketched = any(entry.sketches_sha256 for file in files for entry in file.listed.of_sources)
    lengths: list[float] = []
    query: SketchQuery | None = None
    held: list[Queries] = []
    for few in parts:
        queries = queries_of(few)
        lengths += queries.lengths
        for file in files:
            progress(f"steps {file.window.first} to {file.window.last}")
            _meet(queries, few.start, file, tallies, block_of)
        if sketched and query is None:
            query = SketchQuery({name: gradients_KPQ[0].clone() for name, gradients_KPQ in queries.gradients.items()})
        held = [queries] if len(parts) == 1 else []
        del queries
    moved = {block for tally in tallies.values() for block in tally.by_block}
    ranked = [
        SourceScore(
            known[source],
            tally.scores[0],
            deviations(tally.scores, lengths),
            tally.by_block,
            tally.by_window,
            tally.by_policy,
            tuple(
                block.name
                for block in provenance.campaign.parameter_blocks
                if block.name in moved and block.name not in tally.by_block
            ),
        )
        for source, tally in tallies.items()
        if known[source].admitted
    ]
    ranked.sort(key=lambda row: (-row.z, row.source.id))
    leading = [row for row in ranked[:LEADING_SOURCES] if row.z >= SHAPED_Z]
    opened: list[SourceExamples] = []
    if leading and query is not None:
        progress(f"examples of {', '.join(ascii(row.source.record.claim.name)[:60] for row in leading)}")
        asked_of = [Asked(row.source.id, row.score, row.by_window) for row in leading]
        beside = held or map(queries_of, parts)
        opened = source_examples(query, files, asked_of, store or RunFolder(), allowance or Allowance(), beside)
    return Trace(
        base_log_chance=log_chance(base, output),
        tuned_log_chance=log_chance(tuned, output),
        ranked=tuple(ranked),
        examples=tuple(opened),
        controls=len(controls),
        windows=tuple(file.window.last for file in files),
    )


def _meet(
    queries: Queries, first: int, file: WindowFile, tallies: Mapping[bytes, _Tally], block_of: Mapping[str, str]
) -> None:
    """Adds to the tallies what a window has for the outputs from number ``first`` on."""
    for entry, name, parts in window_scores(queries.gradients, file):
        tally, block = tallies.get(entry.source), block_of.get(name)
        if tally is None:
            raise Rejected(Reason.UNKNOWN_SOURCE, f"source {entry.source.hex()} is not in the campaign's manifest")
        if block is None:
            raise Rejected(Reason.BAD_FIELD, f"accumulators of {name!a} are in no parameter block")
        tally.add(first, parts, block, file.window.last, entry.policy)


def window_scores(queries: Mapping[str, Tensor], file: WindowFile) -> Iterator[tuple[WindowEntry, str, list[float]]]:
    """For each source's entry of a window and each weight, or piece, of the queries: the part of every query's score.

    Args:
        queries: ``[K, P, Q]`` by the parameter table's names.

    Raises:
        Rejected: ``BAD_FIELD`` for accumulators of another shape than the model's, or of a weight that is divided
            otherwise; as ``map_entries``.
    """
    weights = {tensor_named(name) for name in queries}

    def meet(together: Sequence[Summed]) -> list[tuple[WindowEntry, str, list[float]]]:
        found = []
        for name in {name for _, sums in together for name in sums if name not in queries}:
            if tensor_named(name) in weights:
                raise Rejected(Reason.BAD_FIELD, f"accumulators of {name!a} are not of the parameter table's pieces")
        for name, gradients_KPQ in queries.items():
            those = [(entry, sums[name]) for entry, sums in together if name in sums]
            if not those:
                continue
            if any(accumulated.shape != gradients_KPQ.shape[1:] for _, accumulated in those):
                raise Rejected(Reason.BAD_FIELD, f"accumulators of {name!a} do not fit this model")
            sums_EN = torch.stack([accumulated.flatten() for _, accumulated in those])
            parts_EK = -(sums_EN @ gradients_KPQ.flatten(1).T)
            found += [(entry, name, parts_K) for (entry, _), parts_K in zip(those, parts_EK.tolist(), strict=True)]
        return found

    for parts in map_entries(meet, file):
        yield from parts


def queries_of_entries(queries: dict[str, Tensor], campaign: p.Campaign) -> dict[str, Tensor]:
    """Queries ``[K, P, Q]`` of whole weights by the campaign's table: a divided weight's are cut into its pieces.

    ``queries`` is left empty, so that no weight's are there twice.

    Raises:
        Rejected: ``BAD_FIELD`` for pieces beyond the weight.
    """
    pieces_of: dict[str, list[TensorPiece]] = {}
    for tensor in (tensor for block in campaign.parameter_blocks for tensor in block.tensors):
        piece = piece_named(tensor.name)
        if piece is not None:
            pieces_of.setdefault(piece.tensor, []).append(piece)
    found: dict[str, Tensor] = {}
    for name in tuple(queries):
        whole_KPQ = queries.pop(name)
        if name not in pieces_of:
            found[name] = whole_KPQ
        for piece in pieces_of.get(name, ()):
            if piece.dimension > 1 or piece.end > whole_KPQ.shape[1 + piece.dimension]:
                raise Rejected(Reason.BAD_FIELD, f"{piece.name!a} is no piece of this model's weight")
            part = whole_KPQ.narrow(1 + piece.dimension, piece.first, piece.end - piece.first)
            found[piece.name] = part.contiguous()
    return found


def preconditioned_queries(
    model: nn.Module, factors: Mapping[str, WeightFactors], outputs: Sequence[Output]
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """Outputs' preconditioned gradients, ``[K, P, Q]`` by parameter name; and each one's length in that metric.

    Raises:
        Rejected: as ``gradients_together``.
    """
    queries = {
        name: held.eigenvalues.new_empty(len(outputs), *held.eigenvalues.shape) for name, held in factors.items()
    }
    squares_K = torch.zeros(len(outputs), dtype=torch.float64)
    damping = damping_of(factors)

    def gradients() -> Iterator[tuple[slice, str, WeightGradients]]:
        for first in range(0, len(outputs), OUTPUTS_AT_ONCE):
            few = slice(first, min(first + OUTPUTS_AT_ONCE, len(outputs)))
            together = gradients_together(model, outputs[few])
            yield from ((few, name, together[name]) for name in factors)

    def precondition(piece: tuple[slice, str, WeightGradients]) -> tuple[slice, Tensor]:
        few, name, held = piece
        queries[name][few], squares_B = factors[name].precondition_each(held, damping)
        return few, squares_B

    for few, squares_B in each_on_a_core(precondition, gradients()):
        squares_K[few] += squares_B
    return queries, tuple(math.sqrt(max(square, 0.0)) or 1.0 for square in squares_K.tolist())


def queries_at_once(factors: Mapping[str, WeightFactors]) -> int:
    """How many queries are held together: at least one."""
    each_bytes = sum(held.eigenvalues.numel() * held.eigenvalues.element_size() for held in factors.values())
    return max(1, QUERIES_BYTES // each_bytes)


def control_outputs(sequences: Sequence[Sequence[int]], like: Output) -> tuple[Output, ...]:
    """Outputs of the same span as ``like``, one from each sequence that is long enough."""
    return tuple(
        Output(tuple(tokens[: len(like.tokens)]), like.first, like.end)
        for tokens in sequences
        if len(tokens) >= len(like.tokens)
    )


def untraced_tensors(campaign: p.Campaign, factors: Mapping[str, WeightFactors]) -> tuple[str, ...]:
    """Tensors of the campaign that no answer speaks of: embeddings, norms, convolutions, biases."""
    tensors = [tensor_named(tensor.name) for block in campaign.parameter_blocks for tensor in block.tensors]
    return tuple(name for name in dict.fromkeys(tensors) if name not in factors)
