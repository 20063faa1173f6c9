"""Sequences of several examples in one row, and which positions are whose.

Packing short examples into full rows spares computing on padding. Enforcement is then by position: every example has
a *span* of neighbouring positions, and a product sums the positions of admitted examples alone. That means what it
says only if no example sees another one:

* attention must be block-diagonal (``PackedRows.attention_R1TT``, or a kernel that takes sequence lengths);
* positions begin anew with each example (``PackedRows.positions_RT``);
* the loss of an example is of its own positions (``losses_by_example``).

The probe finds attention across examples on a real batch: a blocked example that another one attends to changes
gradients when it is replaced.

Shape suffixes: B examples, R rows, T positions of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer_client.route import RoutingError

Span = tuple[int, int]
"""First and end, counted over all rows, row after row."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Which positions of ``rows`` rows of ``row_positions`` belong to each example, in order of the batch.

    Raises:
        RoutingError: a span is empty, leaves its row, or overlaps another.
    """

    rows: int
    row_positions: int
    spans_B: tuple[Span, ...]

    def __post_init__(self) -> None:
        reached = 0
        for first, end in sorted(self.spans_B):
            if first < reached or end <= first or end > self.positions:
                raise RoutingError(f"packing: positions {first} to {end} overlap others, are none, or are outside")
            if first // self.row_positions != (end - 1) // self.row_positions:
                raise RoutingError(f"packing: positions {first} to {end} are in two rows of {self.row_positions}")
            reached = end

    @property
    def positions(self) -> int:
        """Of all rows together."""
        return self.rows * self.row_positions

    @property
    def is_full(self) -> bool:
        """Whether every position is some example's."""
        return sum(end - first for first, end in self.spans_B) == self.positions

    def followed_RT(self) -> Tensor:
        """True at positions whose next one is of the same example: those that predict one of its tokens."""
        followed = torch.zeros(self.positions, dtype=torch.bool)
        for first, end in self.spans_B:
            followed[first : end - 1] = True
        return followed.view(self.rows, self.row_positions)


@dataclass(frozen=True, slots=True)
class Packed:
    """What a ``collate`` returns that packs: the model's inputs, and whose positions are whose."""

    inputs: Any
    packing: Packing


def taken_apart(inputs: Any) -> tuple[Any, Packing | None]:
    """What a ``collate`` returned as the model's inputs and, where it packed, the packing."""
    return (inputs.inputs, inputs.packing) if isinstance(inputs, Packed) else (inputs, None)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Token sequences in rows: ``tokens_RT`` padded, whose is what, and what keeps examples apart.

    ``attention_R1TT`` is true where a position may attend to another one: to itself and those before it of the same
    example.
    """

    tokens_RT: Tensor
    positions_RT: Tensor
    attention_R1TT: Tensor
    packing: Packing


def pack(sequences: Sequence[Sequence[int]], row_positions: int, padding: int = 0) -> PackedRows:
    """Each sequence into the first row that has room for it; longer ones are cut.

    Raises:
        RoutingError: no sequence, or an empty one.
    """
    if not sequences or not all(len(sequence) for sequence in sequences):
        raise RoutingError("packing: expected sequences of at least one token each")
    used: list[int] = []
    spans: list[Span] = []
    for sequence in sequences:
        length = min(len(sequence), row_positions)
        row = next((number for number, taken in enumerate(used) if taken + length <= row_positions), len(used))
        if row == len(used):
            used.append(0)
        first = row * row_positions + used[row]
        spans.append((first, first + length))
        used[row] += length
    packing = Packing(len(used), row_positions, tuple(spans))
    tokens = torch.full((packing.positions,), padding)
    places = torch.zeros(packing.positions, dtype=torch.long)
    owners = torch.full((packing.positions,), -1)
    for number, (sequence, (first, end)) in enumerate(zip(sequences, spans, strict=True)):
        tokens[first:end] = torch.tensor(list(sequence[: end - first]))
        places[first:end] = torch.arange(end - first)
        owners[first:end] = number
    owners_RT = owners.view(packing.rows, row_positions)
    same_RTT = owners_RT[:, :, None] == owners_RT[:, None, :]
    causal_TT = torch.ones(row_positions, row_positions, dtype=torch.bool).tril()
    return PackedRows(
        tokens.view(packing.rows, row_positions),
        places.view(packing.rows, row_positions),
        (same_RTT & causal_TT)[:, None],
        packing,
    )


def losses_by_example(loss_RT: Tensor, packing: Packing, counted_RT: Tensor | None = None) -> Tensor:
    """Each example's mean over its own positions, ``[B]``; of those ``counted_RT`` where given, 0 where none is."""
    loss_N = loss_RT.reshape(-1)
    counted_N = None if counted_RT is None else counted_RT.reshape(-1)
    losses = []
    for first, end in packing.spans_B:
        own = loss_N[first:end]
        if counted_N is None:
            losses.append(own.mean())
        else:
            counted = counted_N[first:end]
            losses.append(torch.where(counted, own, 0.0).sum() / counted.sum().clamp(min=1))
    return torch.stack(losses)
