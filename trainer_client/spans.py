"""A tensor's rows or columns by whose examples enter there: its gradient, put together of what each head admits.

Neighbours of equal weights are one *span*, and one product. Where somebody observes, a span's gradient is formed group
by group, as undivided ones are (``route.py``), and the observer is told of each piece within it under the name that the
parameter table gives it; whoever observes products, of each piece's operands.

Left to others: what the products are of (``headwise.py``), which pieces there are (``pieces.py``).

Shape suffixes: B examples, F features, P and Q dimensions of a weight. A ``*`` stands for positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer_client.pieces import PieceOfBlock
from trainer_client.route import FULL_PERMILLE, Observe, ObserveProduct, Route


@dataclass(frozen=True, slots=True)
class Observers:
    """Who is told of gradients, and of what weights' gradients are the product of, by the table's names."""

    gradient: Observe | None = None
    product: ObserveProduct | None = None


NOBODY = Observers()


@dataclass(frozen=True, slots=True)
class Span:
    """Indexes ``first`` to ``end - 1`` along the divided dimension, whose rows enter there, and the pieces within."""

    first: int
    end: int
    route: Route
    pieces: tuple[PieceOfBlock, ...] = ()

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """Each piece's name, its first index within the span, and its length."""
        pieces = [each.piece for each in self.pieces]
        return [(piece.name, piece.first - self.first, piece.end - piece.first) for piece in pieces]


@dataclass(frozen=True, slots=True)
class Spans:
    """A whole tensor, divided along ``dimension``; a tensor that is not divided is one span, without pieces."""

    tensor: str
    dimension: int
    spans: tuple[Span, ...]
    observers: Observers

    @property
    def open(self) -> bool:
        """Whether any example of this micro-batch enters anywhere."""
        return any(span.route.open for span in self.spans)

    def all_by(self, route: Route) -> "Spans":
        """An undivided tensor's, by another route."""
        (span,) = self.spans
        return replace(self, spans=(replace(span, route=route),))

    def weight_gradient(self, like: Tensor, operands: Callable[[Span], tuple[Tensor, Tensor]]) -> Tensor | None:
        """Of a weight whose gradient in a span is the product of two ``[B, *, P]`` and ``[B, *, Q]``."""
        if self.observers.product is not None:
            for span in self.spans:
                if span.route.open:
                    self._tell_operands(self.observers.product, span, *operands(span))
        return self.gradient(like, lambda span: span.route.weighted_products(*operands(span)))

    def gradient(self, like: Tensor, of_span: Callable[[Span], Tensor]) -> Tensor | None:
        """The tensor's gradient, put together of its spans'; None where no example of any rank enters."""
        if not self.open:
            return torch.zeros_like(like) if any(span.route.open_elsewhere for span in self.spans) else None
        if len(self.spans) == 1:
            return self._observed(self.spans[0], of_span)
        whole = torch.zeros_like(like)
        for span in self.spans:
            if span.route.open:
                whole.narrow(self.dimension, span.first, span.end - span.first).copy_(self._observed(span, of_span))
        return whole

    def _observed(self, span: Span, of_span: Callable[[Span], Tensor]) -> Tensor:
        """What ``of_span`` makes of the span; where somebody observes, the sum over groups of what it makes of each."""
        observe = self.observers.gradient
        if observe is None:
            return of_span(span)
        total: Tensor | None = None
        for group, route in span.route.by_group():
            part = of_span(replace(span, route=route))
            # The first part is copied: the observer keeps its own, autograd keeps the sum.
            total = part.clone() if total is None else total.add_(part)
            if not span.pieces:
                observe(self.tensor, group, part)
            for name, first, length in span.parts:
                observe(name, group, part.narrow(self.dimension, first, length))
        assert total is not None, "the span is open"
        return total

    def _tell_operands(self, observe: ObserveProduct, span: Span, left: Tensor, right: Tensor) -> None:
        left, right = (span.route.by_example(operand) for operand in (left, right))
        if not span.pieces:
            observe(self.tensor, left, right, span.route.weights_B)
        for name, first, length in span.parts:
            if self.dimension == 0:
                observe(name, left.narrow(-1, first, length), right, span.route.weights_B)
            else:
                observe(name, left, right.narrow(-1, first, length), span.route.weights_B)

    def weighted(self, operand: Tensor) -> Tensor:
        """The operand ``[B, *, F]``, divided along its features, by the weights of heads; zeros where none enters."""
        (places,) = self.spans[0].route.places(operand)
        masked = torch.zeros_like(places)
        for span in self.spans:
            for first, end, weight in span.route.runs():
                part = places[first:end, ..., span.first : span.end]
                masked[first:end, ..., span.first : span.end] = (
                    part if weight == FULL_PERMILLE else part * (weight / FULL_PERMILLE)
                )
        return masked.view(operand.shape)


def spans_of(
    pieces: Sequence[PieceOfBlock], route_of_block: Callable[[int], Route], observers: Observers = NOBODY
) -> Spans:
    """Pieces with their routes, neighbours of equal weights as one."""
    spans: list[Span] = []
    for each in pieces:
        route = route_of_block(each.block)
        if spans and _alike(spans[-1].route, route):
            last = spans[-1]
            spans[-1] = Span(last.first, each.piece.end, last.route, (*last.pieces, each))
        else:
            spans.append(Span(each.piece.first, each.piece.end, route, (each,)))
    return Spans(pieces[0].piece.tensor, pieces[0].piece.dimension, tuple(spans), observers)


def _alike(left: Route, right: Route) -> bool:
    return (left.weights_B, left.open_elsewhere) == (right.weights_B, right.open_elsewhere)
