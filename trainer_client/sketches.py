"""Sketches: what each example added to the gradients of a step, at low rank, in a few bytes.

The gradient of a linear's weight is a sum over positions, ``G_i = Σ_t l_it r_itᵀ`` for example i (of a linear ``l`` is
delta and ``r`` the input). It is factored without being formed, by the randomised range finder (Halko, Martinsson and
Tropp, arXiv 0909.4061, algorithm 4.1 and 4.4 with one power iteration), inside the backward pass that routes it:

    Y_i = Lᵢᵀ (Rᵢ Ω)            Ω the same for every example, drawn by rank and the parameter's name
    U_i = basis of Lᵢᵀ (Rᵢ (Rᵢᵀ (Lᵢ Y_i)))
    V_i = (Lᵢ U_i)ᵀ Rᵢ          G_i ≈ U_i V_i

and kept, while its window is filled, as int8 with one scale for each of the rank's columns, in which stand the
example's weight, the learning rate and the clip factor: like the accumulators beside it, a sketch is of what reached
the optimizer. **Visits of one example in one window are summed** and brought back to the rank (their columns are the
positions of one gradient): the sum is what a trace asks for, and a fixed rank of it says more than the same rank of
each visit, in fewer bytes (docs/adr/021).

A window's sketches of one source under one policy are one safetensors file:

* ``examples`` int64 ``[N]``, rising, and ``visits`` int64 ``[M, 2]``: step and example of each visit, rising;
* for each parameter ``[P, Q]`` that one of these examples moved (for all, where they moved none): ``NAME/left`` uint8
  ``[N, r, ⌈P/2⌉]``, ``NAME/right`` uint8 ``[N, r, ⌈Q/2⌉]``: numbers from −7 to 7, each plus 8, two to a byte, the lower
  half first; ``NAME/scale`` float32 ``[N, r]``. An example's part of the window is ``Σ_r scale_r left_r right_rᵀ``.
  Four bits lose nothing that shows, and twice the columns fit.

Shape suffixes: B examples, T positions, P and Q dimensions of a weight.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from trainer_client.record import Example
from trainer_client.route import FULL_PERMILLE, Weights

INT8_LARGEST = 127
NIBBLE_LARGEST, NIBBLE_ZERO = 7, 8
CLIPPED_TO = (1.0, 0.8, 0.65, 0.5)
"""Parts of a column's largest number at which it may be cut off, so that the others are told apart better."""
TINY = 1e-30

Factored = tuple[Tensor, Tensor, Tensor]
"""``left`` int8 ``[B, r, P]``, ``right`` int8 ``[B, r, Q]``, ``scale`` float32 ``[B, r]``."""

Place = tuple[bytes, bytes, int]
"""Policy, source and example."""

NO_OTHERS: Mapping[str, int] = MappingProxyType({})


class SketchBook:
    """The sketches of the window being filled.

    Args:
        rank: columns kept of each gradient, at least 1; of a smaller weight its smaller dimension.
        ranks: of parameters of which another number is kept.
    """

    def __init__(self, rank: int, ranks: Mapping[str, int] = NO_OTHERS) -> None:
        self._rank = rank
        self._ranks = ranks
        self._parameters: frozenset[str] = frozenset()
        self._step = 0
        self._batches: list[tuple[Example, ...]] = []
        self._pending: dict[str, dict[int, Factored]] = {}
        self._open: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._window = WindowSketches({}, [], {})
        self._draws: dict[tuple[str, int, torch.device], Tensor] = {}

    def attach(self, parameters: Iterable[str]) -> None:
        """Whose gradients to sketch; biases have none worth it."""
        self._parameters = frozenset(parameters)

    def expect(self, step: int, examples: Sequence[Example]) -> None:
        """The micro-batch whose backward pass comes next is of these examples, in this order."""
        self._close_micro_batch()
        self._step = step
        self._batches.append(tuple(examples))

    def observe(self, parameter: str, left: Tensor, right: Tensor, weights_B: Weights) -> None:
        """One use of a linear in a backward pass: ``[B, *, P]`` and ``[B, *, Q]``, and each example's permille."""
        if parameter not in self._parameters:
            return
        # Products of gradients that fill float16, as loss scaling has them, overflow in it.
        left, right = (x.float() if x.dtype == torch.float16 else x for x in (left, right))
        left_BTP, right_BTQ = (x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1) for x in (left, right))
        scale_B = torch.tensor(weights_B, dtype=torch.float32, device=left.device) / FULL_PERMILLE
        u_BrP, v_BrQ = self._factor(parameter, left_BTP, right_BTQ)
        v_BrQ = torch.where(scale_B[:, None, None] > 0, v_BrQ, 0.0)
        held = self._open.get(parameter)
        if held is not None:
            # The module was used twice: both parts, a rank at a time, are the positions of one gradient.
            both = [torch.cat(parts, dim=1) for parts in ((held[0], u_BrP), (held[1], v_BrQ))]
            u_BrP, v_BrQ = self._factor(parameter, both[0], both[1])
        self._open[parameter] = (u_BrP, v_BrQ, scale_B)

    def take_step(self, policy: bytes, factors: Mapping[str, float]) -> None:
        """The step's sketches enter the window; ``factors`` are learning rate times clip factor, by parameter."""
        self._close_micro_batch()
        pending, batches = self._pending, self._batches
        self._pending, self._batches = {}, []
        if not pending:
            return
        places = [(policy, source, example) for batch in batches for source, example in batch]
        factored: dict[str, Factored] = {}
        for parameter, parts in pending.items():
            like = next(iter(parts.values()))
            filled = [parts.get(number) or _nothing(like, len(batch)) for number, batch in enumerate(batches)]
            left, right, scale = (torch.cat([part[n] for part in filled]).cpu() for n in range(3))
            factored[parameter] = left, right, scale * factors.get(parameter, 0.0)
        self._window.visits += [(place, self._step) for place in places]
        self._enter(self._window, places, factored)

    def skip_step(self) -> None:
        """In place of ``take_step``: nothing of the step enters the window."""
        self._close_micro_batch()
        self._pending, self._batches = {}, []

    def merged(self, windows: Sequence["WindowSketches"]) -> "WindowSketches":
        """One window of what several ranks sketched of the same steps; an example may have been with each of them."""
        merged, *others = windows
        for window in others:
            merged.visits += window.visits
            whole = {name: window.rows_of(name) for name in window.factored}
            self._enter(merged, sorted(window.rows, key=window.rows.__getitem__), whole)
        return merged

    def _enter(self, window: "WindowSketches", places: Sequence[Place], factored: Mapping[str, Factored]) -> None:
        """Add sketches to a window's, one row of each parameter's for each place."""
        again = [row for row, place in enumerate(places) if place in window.rows]
        for place in places:
            window.rows.setdefault(place, len(window.rows))
        index = torch.tensor([window.rows[place] for place in places])
        for parameter, parts in factored.items():
            held = window.room_for(parameter, parts)
            new = self._summed(parameter, parts, held, index, again) if again else parts
            for kept, part in zip(held, new, strict=True):
                kept[index] = part

    def _summed(self, parameter: str, new: Factored, held: Factored, index: Tensor, again: Sequence[int]) -> Factored:
        """``new`` with what the window holds of the examples at its rows ``again`` added."""
        rows = torch.tensor(again)
        old_left, old_right = _unscaled(tuple(part[index[rows]] for part in held))
        new_left, new_right = _unscaled(tuple(part[rows] for part in new))
        both = torch.cat([old_left, new_left], dim=1), torch.cat([old_right, new_right], dim=1)
        merged = _quantised(*self._factor(parameter, *both), torch.ones(len(rows)))
        for part, sums in zip(new, merged, strict=True):
            part[rows] = sums
        return new

    def end_window(self) -> "WindowSketches":
        """The window's sketches; the next one begins empty."""
        window, self._window = self._window, WindowSketches({}, [], {})
        return window

    @property
    def window(self) -> "WindowSketches":
        """Those of the window so far; the book goes on writing into it."""
        return self._window

    def go_back_to(self, window: "WindowSketches") -> None:
        """Those of a window as it was; what the step being taken added is dropped."""
        self._open, self._pending, self._batches = {}, {}, []
        self._window = window

    def _close_micro_batch(self) -> None:
        opened, self._open = self._open, {}
        for parameter, (u_BrP, v_BrQ, scale_B) in opened.items():
            held = self._pending.setdefault(parameter, {})
            held[len(self._batches) - 1] = _quantised(u_BrP, v_BrQ, scale_B)

    def _factor(self, parameter: str, left_BTP: Tensor, right_BTQ: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, r, P]`` orthonormal and ``[B, r, Q]``.

        Every product has its few columns as rows in front: the other way round batched products are ten times slower.
        """
        rank = min(self._ranks.get(parameter, self._rank), left_BTP.shape[-1], right_BTQ.shape[-1])
        start_BrT = (right_BTQ @ self._draw(parameter, right_BTQ, rank)).transpose(1, 2)
        u_BrP = orthonormal(start_BrT @ left_BTP)
        z_BrQ = orthonormal(_times(u_BrP, left_BTP) @ right_BTQ)
        u_BrP = orthonormal(_times(z_BrQ, right_BTQ) @ left_BTP)
        return u_BrP, (_times(u_BrP, left_BTP) @ right_BTQ).float()

    def _draw(self, parameter: str, like: Tensor, rank: int) -> Tensor:
        size = like.shape[-1]
        key = (parameter, rank, like.device)
        held = self._draws.get(key)
        if held is None:
            seed = int.from_bytes(hashlib.sha256(parameter.encode()).digest()[:7], "big")
            held = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed)).to(like.device)
            self._draws[key] = held
        return held.to(like.dtype)


@dataclass(slots=True)
class WindowSketches:
    """Sums by place: ``rows`` says which row of every parameter's tensors (which may have room for more)."""

    rows: dict[Place, int]
    visits: list[tuple[Place, int]]
    factored: dict[str, Factored]

    def room_for(self, parameter: str, like: Factored) -> Factored:
        """The parameter's tensors, with zeros for rows they had no room for."""
        held = self.factored.get(parameter)
        if held is None or len(held[0]) < len(self.rows):
            held = grown = _nothing(like, 2 * len(self.rows)) if held is None else _grown(held, 2 * len(self.rows))
            self.factored[parameter] = grown
        return held

    def rows_of(self, parameter: str) -> Factored:
        """The parameter's tensors with a row for each place, of zeros where it was never sketched."""
        parts = self.factored[parameter]
        count = len(self.rows)
        left, right, scale = parts if len(parts[0]) >= count else _grown(parts, count)
        return left[:count], right[:count], scale[:count]

    def plain(self) -> tuple[Any, ...]:
        """As plain data, for a snapshot."""
        count = len(self.rows)
        factored = {name: [part[:count].clone() for part in parts] for name, parts in self.factored.items()}
        return [(list(place), row) for place, row in self.rows.items()], list(self.visits), factored

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Self:
        """From what ``plain`` made, sharing nothing with it."""
        rows, visits, factored = plain
        return cls(
            {(place[0], place[1], place[2]): row for place, row in rows},
            [((place[0], place[1], place[2]), step) for place, step in visits],
            {name: tuple(part.clone() for part in parts) for name, parts in factored.items()},
        )


def orthonormal(y_BrP: Tensor) -> Tensor:
    """An orthonormal basis of each example's rows, by Gram-Schmidt, twice; a zero row stays zero."""
    basis: list[Tensor] = []
    for row_BP in y_BrP.float().unbind(dim=1):
        left_BP = row_BP
        for _ in range(2 if basis else 0):
            for done_BP in basis:
                left_BP = left_BP - (left_BP * done_BP).sum(dim=1, keepdim=True) * done_BP
        norm_B1 = left_BP.norm(dim=1, keepdim=True)
        basis.append(torch.where(norm_B1 > TINY, left_BP / norm_B1.clamp(min=TINY), 0.0))
    return torch.stack(basis, dim=1)


def _times(rows_BrN: Tensor, x_BTN: Tensor) -> Tensor:
    """``[B, r, T]``: how far each position goes along each row."""
    return rows_BrN.to(x_BTN.dtype) @ x_BTN.transpose(1, 2)


def sketch_file(window: WindowSketches, policy: bytes, source: bytes) -> dict[str, Tensor]:
    """The tensors of one source's file under one policy; empty where it has no example."""
    own = sorted((place[2], row) for place, row in window.rows.items() if place[:2] == (policy, source))
    if not own:
        return {}
    visits = sorted((step, place[2]) for place, step in window.visits if place[:2] == (policy, source))
    index = torch.tensor([row for _, row in own])
    tensors = {"examples": torch.tensor([example for example, _ in own]), "visits": torch.tensor(visits)}
    kept = {parameter: tuple(part[index] for part in window.rows_of(parameter)) for parameter in window.factored}
    moved = {parameter: parts for parameter, parts in kept.items() if bool(parts[2].any())}
    for parameter, (left, right, scale) in (moved or kept).items():
        tensors[f"{parameter}/left"], left_scale_Nr = _as_nibbles(left)
        tensors[f"{parameter}/right"], right_scale_Nr = _as_nibbles(right)
        tensors[f"{parameter}/scale"] = scale * left_scale_Nr * right_scale_Nr
    return tensors


def factors_of(file: Mapping[str, Tensor], parameter: str, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """``[N, r, P]`` and ``[N, r, Q]`` of a parameter in a file of ``sketch_file``, the second with the scale in it.

    Args:
        rows: of the examples wanted; None for all. Of an odd dimension a zero stands at the end.
    """
    left, right, scale = (file[f"{parameter}/{part}"] for part in ("left", "right", "scale"))
    if rows is not None:
        left, right, scale = (part[list(rows)] for part in (left, right, scale))
    return _of_nibbles(left), _of_nibbles(right) * scale[:, :, None]


def _of_nibbles(packed: Tensor) -> Tensor:
    halves = torch.stack([packed & 0x0F, packed >> 4], dim=3).flatten(2)
    return halves.float() - NIBBLE_ZERO


def _grown(parts: Factored, count: int) -> Factored:
    left, right, scale = (torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])]) for part in parts)
    return left, right, scale


def _unscaled(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``[B, r, P]`` and ``[B, r, Q]``, of which the second carries the scale."""
    left, right, scale = parts
    return left.float(), right.float() * scale[:, :, None]


def _nothing(like: Factored, count: int) -> Factored:
    """Sketches of examples that a parameter was closed to."""
    left, right, scale = (part.new_zeros(count, *part.shape[1:]) for part in like)
    return left, right, scale


def _quantised(u_BrP: Tensor, v_BrQ: Tensor, scale_B: Tensor) -> Factored:
    left, left_scale_Br = _as_int8(u_BrP)
    right, right_scale_Br = _as_int8(v_BrQ)
    return left, right, left_scale_Br * right_scale_Br * scale_B[:, None]


def _as_nibbles(x_NrP: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to −7 … 7 and packed, and the scale of each column, of several the one that loses least."""
    largest_Nr1 = x_NrP.float().abs().amax(dim=2, keepdim=True)
    kept, scale, least = x_NrP.float() * 0, largest_Nr1 * 0, torch.full_like(largest_Nr1, float("inf"))
    for part in CLIPPED_TO:
        tried = largest_Nr1 * part / NIBBLE_LARGEST
        rounded = (x_NrP.float() / tried.clamp(min=TINY)).round().clamp(-NIBBLE_LARGEST, NIBBLE_LARGEST)
        lost = (rounded * tried - x_NrP).square().sum(dim=2, keepdim=True)
        better = lost < least
        kept, scale = torch.where(better, rounded, kept), torch.where(better, tried, scale)
        least = torch.minimum(lost, least)
    raised = (kept + NIBBLE_ZERO).to(torch.uint8)
    if raised.shape[2] % 2:
        raised = torch.cat([raised, raised.new_full((*raised.shape[:2], 1), NIBBLE_ZERO)], dim=2)
    return raised[:, :, ::2] | (raised[:, :, 1::2] << 4), scale.squeeze(2)


def _as_int8(x_BrN: Tensor) -> tuple[Tensor, Tensor]:
    scale_Br = x_BrN.abs().amax(dim=2) / INT8_LARGEST
    divided = x_BrN / scale_Br.clamp(min=TINY)[:, :, None]
    return divided.round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale_Br
