"""The way of one module call's gradient: which examples enter, by how much, and the errors when that cannot hold.

Blocked rows are left out before any arithmetic, because 0 times infinity is not 0; which rows enter depends on weights
alone. Where somebody observes, examples of one group are summed apart.

Where examples are packed into common rows (``packing.py``), positions are what is left out or summed.

Left to others: which modules have a route (``routed_modules.py``), which weights (``routing.py``).

Shape suffixes: B examples, R rows of packed examples, N rows (examples times positions), I inputs, O outputs; P and Q
either of the last two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Function

from consensus.rejection import CountersignError

FULL_PERMILLE = 1_000
MAX_RUNS = 4
"""Up to so many runs of equal weight are multiplied in place; more are first gathered into one copy."""

Weights = tuple[int, ...]
"""One parameter block's weight for each example of a micro-batch, in permille."""


class RoutingError(CountersignError):
    """Routing could not hold what it promises for this step; the step must not reach the optimizer."""


class RoutingUnsupported(RoutingError):
    """The model holds trainable parameters whose gradients cannot be attributed to examples."""


class RoutingLeak(RoutingError):
    """A gradient arrived where the weights allow none, or under other weights than its forward pass."""


class RoutedFunction(Function):
    """A module's forward whose backward takes a route. Of its tensors the first one is the activation.

    The others are the module's own parameters: around these functions no trainable parameter may be used.
    """


def unviewed(output: Tensor) -> Tensor:
    """The same memory as no view of another tensor: views made inside a ``Function`` cannot be changed in place."""
    if not output._is_view():
        return output
    whole: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return whole


Observe = Callable[[str, bytes, Tensor], None]
"""Told of a parameter, a group of examples, and what it adds to that parameter's gradient; the tensor is the callee's
to keep. Called inside the backward pass. A route's parameters are ``"weight"`` and ``"bias"``; where tensors are
divided (``headwise.py``) they have the names of a parameter table's entries."""


ObserveProduct = Callable[[str, Tensor, Tensor, Weights], None]
"""Told of ``"weight"``, the two operands ``[B, *, P]`` and ``[B, *, Q]`` of its gradient, one summand a row, and every
example's weight in permille. Called inside the backward pass."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which rows of one module call enter its parameters' gradients, and by how much.

    Where somebody observes, examples of one group (of one source, say) are summed apart: ``groups_B`` names each
    example's group, and the gradient is the sum over groups of what ``observe`` was told.
    """

    weights_B: Weights
    check_token: Callable[[], None]
    groups_B: tuple[bytes, ...] = ()
    observe: Observe | None = None
    observe_product: ObserveProduct | None = None
    open_elsewhere: bool = False
    """An example of another rank may enter where none of these may: zeros stand for them."""
    spans_B: tuple[tuple[int, int], ...] = ()
    """Where examples are packed, each one's positions, counted over all rows: operands are ``[R, T, …]`` then."""
    is_full: bool = True
    """Whether every position is some example's."""

    @property
    def takes_everything(self) -> bool:
        """Whether every row enters at full weight."""
        return self.is_full and set(self.weights_B) == {FULL_PERMILLE}

    @property
    def open(self) -> bool:
        return any(self.weights_B)

    def places(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The operands with what is told apart along dimension 0: examples, or positions where they are packed."""
        return tuple(operand.flatten(0, 1) for operand in operands) if self.spans_B else operands

    def runs(self) -> list[tuple[int, int, int]]:
        """Runs of neighbouring places of equal weight that is not zero: first, end, weight."""
        runs: list[tuple[int, int, int]] = []
        spans = self.spans_B or [(example, example + 1) for example in range(len(self.weights_B))]
        for (first, end), weight in sorted(zip(spans, self.weights_B, strict=True)):
            if runs and runs[-1][1] == first and runs[-1][2] == weight:
                runs[-1] = (runs[-1][0], end, weight)
            elif weight:
                runs.append((first, end, weight))
        return runs

    def admitted(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The operands' places of examples with weight; the first operand is scaled by the weights."""
        return self._kept(self.runs(), *self.places(*operands))

    def _kept(self, runs: Sequence[tuple[int, int, int]], *operands: Tensor) -> tuple[Tensor, ...]:
        kept = [place for first, end, _ in runs for place in range(first, end)]
        if len(kept) < len(operands[0]):
            index = torch.tensor(kept, device=operands[0].device)
            operands = tuple(operand.index_select(0, index) for operand in operands)
        if any(weight != FULL_PERMILLE for _, _, weight in runs):
            factors = [weight / FULL_PERMILLE for first, end, weight in runs for _ in range(first, end)]
            first = operands[0]
            wide = torch.promote_types(first.dtype, torch.float32)  # bfloat16 has no 0.333, it would weigh all by 0.332
            factor = torch.tensor(factors, dtype=wide, device=first.device).view(-1, *(1,) * (first.dim() - 1))
            operands = ((first * factor).to(first.dtype), *operands[1:])
        return operands

    def by_example(self, operand: Tensor) -> Tensor:
        """``[B, T, …]`` of an operand, packed ones padded with zeros to the longest example."""
        if not self.spans_B:
            return operand
        (places,) = self.places(operand)
        longest = max(end - first for first, end in self.spans_B)
        padded = places.new_zeros(len(self.spans_B), longest, *places.shape[1:])
        for example, (first, end) in enumerate(self.spans_B):
            padded[example, : end - first] = places[first:end]
        return padded

    def by_group(self) -> list[tuple[bytes, "Route"]]:
        """For each group with weight, in order of its first example: the route of its examples alone."""
        groups = dict.fromkeys(group for group, weight in zip(self.groups_B, self.weights_B, strict=True) if weight)
        return [
            (
                group,
                replace(
                    self,
                    weights_B=tuple(
                        weight if own == group else 0 for own, weight in zip(self.groups_B, self.weights_B, strict=True)
                    ),
                ),
            )
            for group in groups
        ]

    def linear_gradients(
        self, product: tuple[Tensor, Tensor] | None, delta: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a linear's weight and bias; ``None`` for one whose operands are ``None``.

        Args:
            product: ``[B, *, P]`` and ``[B, *, Q]``: delta and input, ordered as the weight's dimensions ``[P, Q]``.
            delta: ``[B, *, O]``, for the bias.
        """
        if self.observe_product is not None and product is not None:
            left, right = (self.by_example(operand) for operand in product)
            self.observe_product("weight", left, right, self.weights_B)
        if self.observe is None:
            weight_PQ = None if product is None else self.weighted_products(*product)
            return weight_PQ, None if delta is None else self.weighted_rows(delta)
        sums: dict[str, Tensor] = {}
        for group, route in self.by_group():
            parts: dict[str, Tensor] = {}
            if product is not None:
                parts["weight"] = route.weighted_products(*product)
            if delta is not None:
                parts["bias"] = route.weighted_rows(delta)
            for parameter, part in parts.items():
                # The first part is copied: the observer keeps its own, autograd keeps the sum.
                sums[parameter] = sums[parameter].add_(part) if parameter in sums else part.clone()
                self.observe(parameter, group, part)
        return sums.get("weight"), sums.get("bias")

    def weighted_rows(self, delta: Tensor) -> Tensor:
        """Sum over examples and positions of weight times delta: ``[B, *, O]`` to ``[O]``."""
        (admitted,) = self.admitted(delta)
        return _rows(admitted).sum(dim=0)

    def weighted_products(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum over examples of weight times leftᵀ right: ``[B, *, P]`` and ``[B, *, Q]`` to ``[P, Q]``."""
        runs = self.runs()
        left, right = self.places(left, right)
        if len(runs) > MAX_RUNS:
            if left.shape[-1] <= right.shape[-1]:
                left, right = self._kept(runs, left, right)
            else:
                right, left = self._kept(runs, right, left)
            return _rows(left).t() @ _rows(right)
        product_PQ: Tensor | None = None
        for first, end, weight in runs:
            left_PN = _rows(left[first:end]).t()
            right_NQ = _rows(right[first:end])
            factor = weight / FULL_PERMILLE
            if product_PQ is None:
                product_PQ = left_PN @ right_NQ
                if factor != 1.0:
                    product_PQ *= factor
            else:
                product_PQ.addmm_(left_PN, right_NQ, alpha=factor)
        if product_PQ is None:
            raise RoutingError("no example has weight: the block must be skipped, not summed")
        return product_PQ


def _rows(x: Tensor) -> Tensor:
    """All dimensions but the last folded into one: ``[N, features]``."""
    return x.reshape(-1, x.shape[-1])
