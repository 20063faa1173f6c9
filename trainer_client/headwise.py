"""Linears whose rows or columns are those of attention heads, each in a parameter block of its own.

The forward value and the gradient of the activations are those of the undivided module. The gradient of each piece sums
the rows that its own block's route admits; neighbours of equal weights are one product, so that a tensor whose heads
are all weighted alike costs, and gives to the bit, what it would undivided.

**LoRA.** Of ``B A x`` one matrix is divided by head and the other one shared: beside a projection to queries, keys or
values B has rows of heads and A is shared; beside the one that takes heads together again A has columns of heads and B
is shared. The divided one's gradient is exact. The shared one's is what comes through each head, by the head's weight
or the shared one's own, whichever is less: for A the error is masked head by head before it goes back through B, for B
what heads put into A x. With w_i the weight in the shared one's block and w_ih in head h's that is

    sum_i  sum_h  min(w_i, w_ih) * g_ih        with  sum_h g_ih = g_i

so that weights alike in all of a layer give what they give undivided, and an example enters through no head that it may
not move. Left out, not multiplied by zero, as everywhere (``route.py``).

**Where somebody observes**, each of these gradients is formed group by group, as undivided ones are, and the observer
is told of each piece under the name that the table gives it; whoever observes products, of each piece's operands.

Left to others: which pieces there are (``pieces.py``), when forwards are replaced (``routing.py``).

Shape suffixes: B examples, I inputs, O outputs, R rank. A ``*`` stands for positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer_client.pieces import Division, PieceOfBlock, SharedByHeads
from trainer_client.route import FULL_PERMILLE, Observe, ObserveProduct, Route, RoutingUnsupported
from trainer_client.routed_modules import in_autocast_dtype, is_conv1d


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


@dataclass(frozen=True, slots=True)
class DividedCall:
    """One call of a linear with a divided weight. ``outputs`` is the weight's dimension of outputs."""

    weight: Spans
    bias: Spans | None
    outputs: int


@dataclass(frozen=True, slots=True)
class PairedCall:
    """One call of LoRA's outer matrix on what the inner one gave.

    ``through``: the divided matrix's spans, by how much examples may move the shared one through each.
    """

    inner: Spans
    outer: Spans
    bias: Spans | None
    by_outputs: bool
    through: Spans

    def shared_operands(
        self, delta: Tensor, u: Tensor, x: Tensor, outer_OR: Tensor, inner_RI: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the shared matrix's product: A's from the error that comes back through B, or B's from what A was given.

        Where heads differ these have their weights, and the shared one's route says who enters through any head.
        """
        alike = len(self.through.spans) == 1
        if self.by_outputs:
            return (delta if alike else self.through.weighted(delta)).matmul(outer_OR), x
        return delta, u if alike else self.through.weighted(x).matmul(inner_RI.t())


class _DividedLinear(torch.autograd.Function):
    """A linear, or the one of GPT-2's makers, whose weight is in pieces."""

    @staticmethod
    def forward(ctx, x, weight, bias_O, call):  # type: ignore[no-untyped-def]
        ctx.call = call
        ctx.save_for_backward(x if call.weight.open and weight.requires_grad else None, weight)
        if call.outputs == 0:
            return functional.linear(x, weight, bias_O)
        return torch.addmm(bias_O, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        call = ctx.call
        call.weight.spans[0].route.check_token()
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        delta = delta.contiguous()
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = delta.matmul(weight if call.outputs == 0 else weight.t())
        if need_weight:

            def operands(span: Span) -> tuple[Tensor, Tensor]:
                if call.weight.dimension == call.outputs:
                    left, right = _features(delta, span, call.weight), x
                else:
                    left, right = delta, _features(x, span, call.weight)
                return (left, right) if call.outputs == 0 else (right, left)

            grad_weight = call.weight.weight_gradient(weight, operands)
        if need_bias:
            grad_bias = _bias_gradient(call.bias, delta)
        return grad_x, grad_weight, grad_bias, None


class _PairedOuter(torch.autograd.Function):
    """LoRA's outer matrix B on ``u = A x``; forms the gradients of both matrices, one of which is shared by heads."""

    @staticmethod
    def forward(ctx, u, outer_OR, bias_O, x, inner_RI, call):  # type: ignore[no-untyped-def]
        ctx.call = call
        keep = call.inner.open or call.outer.open
        ctx.save_for_backward(u if keep else None, x if keep else None, outer_OR, inner_RI)
        return functional.linear(u, outer_OR, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        call = ctx.call
        call.outer.spans[0].route.check_token()
        u, x, outer_OR, inner_RI = ctx.saved_tensors
        need_u, need_outer, need_bias, _, need_inner, _ = ctx.needs_input_grad
        delta = delta.contiguous()
        inner_delta = delta.matmul(outer_OR)
        shared = call.inner if call.by_outputs else call.outer
        of_shared = call.shared_operands(delta, u, x, outer_OR, inner_RI) if shared.open else None

        def of_inner(span: Span) -> tuple[Tensor, Tensor]:
            return of_shared if call.by_outputs else (inner_delta, _features(x, span, call.inner))  # type: ignore[return-value]

        def of_outer(span: Span) -> tuple[Tensor, Tensor]:
            return (_features(delta, span, call.outer), u) if call.by_outputs else of_shared  # type: ignore[return-value]

        return (
            inner_delta if need_u else None,
            call.outer.weight_gradient(outer_OR, of_outer) if need_outer else None,
            _bias_gradient(call.bias, delta) if need_bias else None,
            None,
            call.inner.weight_gradient(inner_RI, of_inner) if need_inner else None,
            None,
        )


class DividedForwards:
    """The forwards of modules with pieces, and of LoRA's pairs, while routing is installed.

    Args:
        block_of_entry: of whole tensors; of a shared one, the number under which its own routes are asked for.
        enter: checks one call of a module under its name, and returns its input.
        route_of_block: the running micro-batch's.

    Raises:
        RoutingUnsupported: a module with pieces is no linear.
    """

    def __init__(
        self,
        model: nn.Module,
        division: Division,
        block_of_entry: Mapping[str, int],
        enter: Callable[[str, nn.Module, Tensor], Tensor],
        route_of_block: Callable[[int], Route],
        observers: Observers,
    ) -> None:
        self._division = division
        self._observers = observers
        self._block_of = block_of_entry
        self._enter = enter
        self._route_of_block = route_of_block
        self._name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        modules = dict(model.named_modules())
        self._inner_of: dict[int, tuple[nn.Module, SharedByHeads]] = {}
        self._inner: set[int] = set()
        for shared in division.shared.values():
            names = (shared.tensor, shared.divided) if shared.by_outputs else (shared.divided, shared.tensor)
            inner, outer = (modules[name.rpartition(".")[0]] for name in names)
            self._inner_of[id(outer)] = (inner, shared)
            self._inner.add(id(inner))
        self._given: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What takes the place of the module's forward where gradients are recorded; None where nothing is divided."""
        own = {self._name_of[id(parameter)] for parameter in module.parameters(recurse=False)}
        divided = bool(own & self._division.pieces.keys())
        if id(module) in self._inner:
            kind, forward = "inner", partial(self._inner_forward, name, module)
        elif id(module) in self._inner_of:
            kind, forward = "outer", partial(self._outer_forward, name, module)
        elif divided:
            kind, forward = "divided", partial(self._divided_forward, name, module)
        else:
            return None
        check_divisible(name, module, kind)
        return forward

    def finish(self) -> None:
        """A micro-batch is over.

        Raises:
            RoutingUnsupported: what LoRA's inner matrix gave was not taken by the outer one.
        """
        left, self._given = len(self._given), {}
        if left:
            raise RoutingUnsupported(f"{left} of LoRA's inner matrices gave what no outer one took")

    def _divided_forward(self, name: str, module: nn.Module, input: Tensor) -> Tensor:
        x = self._enter(name, module, input)
        call = DividedCall(self._spans(module, "weight"), self._bias(module), 1 if is_conv1d(module) else 0)
        output: Tensor = _DividedLinear.apply(*in_autocast_dtype(module, x), call)  # type: ignore[no-untyped-call]
        return output

    def _inner_forward(self, name: str, module: nn.Module, input: Tensor) -> Tensor:
        x = self._enter(name, module, input)
        weight = module.weight
        assert isinstance(weight, Tensor)
        given = functional.linear(x, weight.detach())  # its own gradient is formed where the outer one's is
        self._given[id(module)] = (given, x)
        return given

    def _outer_forward(self, name: str, module: nn.Module, input: Tensor) -> Tensor:
        u = self._enter(name, module, input)
        inner, shared = self._inner_of[id(module)]
        given, x = self._given.pop(id(inner), (None, input))
        if given is not input:
            raise RoutingUnsupported(
                f"module {name!r} is called with something else than what LoRA's inner matrix gave"
            )
        through = self._through(shared)
        inner_spans, outer_spans = self._spans(inner, "weight"), self._spans(module, "weight")
        if len(through.spans) == 1:
            if shared.by_outputs:
                inner_spans = inner_spans.all_by(through.spans[0].route)
            else:
                outer_spans = outer_spans.all_by(through.spans[0].route)
        call = PairedCall(inner_spans, outer_spans, self._bias(module), shared.by_outputs, through)
        u, outer_OR, bias_O = in_autocast_dtype(module, u)
        x, inner_RI, _ = in_autocast_dtype(inner, x)
        output: Tensor = _PairedOuter.apply(u, outer_OR, bias_O, x.detach(), inner_RI, call)  # type: ignore[no-untyped-call]
        return output

    def _bias(self, module: nn.Module) -> Spans | None:
        return None if module.bias is None else self._spans(module, "bias")

    def _through(self, shared: SharedByHeads) -> Spans:
        own = self._route_of_block(shared.block).weights_B
        entering = self._route_of_block(self._block_of[shared.tensor])

        def limited(block: int) -> Route:
            of_head = self._route_of_block(block).weights_B
            return replace(entering, weights_B=tuple(map(min, own, of_head)))

        return spans_of(self._division.pieces[shared.divided], limited)

    def _spans(self, module: nn.Module, own_name: str) -> Spans:
        parameter = getattr(module, own_name)
        name = self._name_of[id(parameter)]
        pieces = self._division.pieces.get(name)
        if pieces is not None:
            return spans_of(pieces, self._route_of_block, self._observers)
        whole = Span(0, len(parameter), self._route_of_block(self._block_of[name]))
        return Spans(name, 0, (whole,), self._observers)


def check_divisible(name: str, module: nn.Module, kind: str) -> None:
    """The module is one whose rows or columns can be told apart.

    Raises:
        RoutingUnsupported: ``kind`` is not that of a linear, or LoRA's inner matrix has a bias.
    """
    if kind == "inner" and getattr(module, "bias", None) is not None:
        raise RoutingUnsupported(f"module {name!r} is LoRA's inner matrix and has a bias")
    if type(module).forward is nn.Linear.forward or (kind == "divided" and is_conv1d(module)):
        return
    raise RoutingUnsupported(f"module {name!r} ({type(module).__name__}) cannot be divided by head")


def _alike(left: Route, right: Route) -> bool:
    return (left.weights_B, left.open_elsewhere) == (right.weights_B, right.open_elsewhere)


def _features(operand: Tensor, span: Span, whole: Spans) -> Tensor:
    return operand if len(whole.spans) == 1 else operand[..., span.first : span.end]


def _bias_gradient(spans: Spans | None, delta: Tensor) -> Tensor | None:
    assert spans is not None
    like = delta.new_empty(delta.shape[-1])
    return spans.gradient(like, lambda span: span.route.weighted_rows(_features(delta, span, spans)))
