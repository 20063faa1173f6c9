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

Left to others: how a gradient is put together and who is told of it (``spans.py``), which pieces there are
(``pieces.py``), when forwards are replaced (``routing.py``).

Shape suffixes: B examples, I inputs, O outputs, R rank. A ``*`` stands for positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer_client.pieces import Division, SharedByHeads
from trainer_client.route import Route, RoutedFunction, RoutingUnsupported, unviewed
from trainer_client.routed_modules import in_autocast_dtype, is_conv1d
from trainer_client.spans import Observers, Span, Spans, spans_of


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
        self, delta: Tensor, inner_delta: Tensor, u: Tensor, x: Tensor, outer_OR: Tensor, inner_RI: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of the shared matrix's product: A's from the error that comes back through B, or B's from what A was given.

        Where heads differ these have their weights, and the shared one's route says who enters through any head.
        """
        alike = len(self.through.spans) == 1
        if self.by_outputs:
            return inner_delta if alike else self.through.weighted(delta).matmul(outer_OR), x
        return delta, u if alike else self.through.weighted(x).matmul(inner_RI.t())


class _DividedLinear(RoutedFunction):
    """A linear, or the one of GPT-2's makers, whose weight is in pieces."""

    @staticmethod
    def forward(ctx, x, weight, bias_O, call):  # type: ignore[no-untyped-def]
        ctx.call = call
        ctx.save_for_backward(x if call.weight.open and weight.requires_grad else None, weight)
        if call.outputs == 0:
            return unviewed(functional.linear(x, weight, bias_O))
        output_NO = torch.addmm(bias_O, x.reshape(-1, x.shape[-1]), weight)
        return unviewed(output_NO.view(*x.shape[:-1], weight.shape[1]))

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


class _PairedOuter(RoutedFunction):
    """LoRA's outer matrix B on ``u = A x``; forms the gradients of both matrices, one of which is shared by heads."""

    @staticmethod
    def forward(ctx, u, outer_OR, bias_O, x, inner_RI, call):  # type: ignore[no-untyped-def]
        ctx.call = call
        keep = call.inner.open or call.outer.open
        ctx.save_for_backward(u if keep else None, x if keep else None, outer_OR, inner_RI)
        return unviewed(functional.linear(u, outer_OR, bias_O))

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
        of_shared = call.shared_operands(delta, inner_delta, u, x, outer_OR, inner_RI) if shared.open else None

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
        divided = bool(own & self._division.pieces.keys()) or self._is_split(module)
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

    def _is_split(self, module: nn.Module) -> bool:
        """Whether it is a linear whose weight and bias are in different parameter blocks, as of a tied head."""
        trained = [self._name_of[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
        blocks = {self._block_of.get(name) for name in trained}
        return len(blocks) > 1 and (type(module).forward is nn.Linear.forward or is_conv1d(module))

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


def _features(operand: Tensor, span: Span, whole: Spans) -> Tensor:
    return operand if len(whole.spans) == 1 else operand[..., span.first : span.end]


def _bias_gradient(spans: Spans | None, delta: Tensor) -> Tensor | None:
    assert spans is not None
    like = delta.new_empty(delta.shape[-1])
    return spans.gradient(like, lambda span: span.route.weighted_rows(_features(delta, span, spans)))
