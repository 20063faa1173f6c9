"""Modules whose parameter gradients can be summed over chosen examples, and the census of them.

For each module type a custom backward: the forward value and the gradient of the activations are torch's own,
the parameters' gradients sum only the rows of examples with weight. Blocked rows are left out before any
arithmetic, because 0 times infinity is not 0; which rows enter depends on weights alone.

``census`` is the default-deny list: a trainable parameter outside these module types is refused by name.

Left to others: which weights, for which micro-batch, and when forwards are replaced (``routing.py``).

Shape suffixes: B examples, N rows (examples times positions), I inputs, O outputs, V vocabulary, X any number
of positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

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


Observe = Callable[[str, bytes, Tensor], None]
"""Told of ``"weight"`` or ``"bias"``, a group of examples, and what it adds to that parameter's gradient; the tensor
is the callee's to keep. Called inside the backward pass."""


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

    @property
    def open(self) -> bool:
        return any(self.weights_B)

    def runs(self) -> list[tuple[int, int, int]]:
        """Runs of neighbours of equal weight that is not zero: first, end, weight."""
        runs: list[tuple[int, int, int]] = []
        for example, weight in enumerate(self.weights_B):
            if runs and runs[-1][1] == example and runs[-1][2] == weight:
                runs[-1] = (runs[-1][0], example + 1, weight)
            elif weight:
                runs.append((example, example + 1, weight))
        return runs

    def admitted(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The operands' rows of examples with weight; the first operand is scaled by the weights."""
        kept = [example for example, weight in enumerate(self.weights_B) if weight]
        if len(kept) < len(self.weights_B):
            index_B = torch.tensor(kept, device=operands[0].device)
            operands = tuple(operand.index_select(0, index_B) for operand in operands)
        factors = [self.weights_B[example] / FULL_PERMILLE for example in kept]
        if any(factor != 1.0 for factor in factors):
            shape = (len(kept),) + (1,) * (operands[0].dim() - 1)
            factor_B = torch.tensor(factors, dtype=operands[0].dtype, device=operands[0].device)
            operands = (operands[0] * factor_B.view(shape), *operands[1:])
        return operands

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
        self, delta: Tensor, x: Tensor | None, *, weight: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of a linear's weight ``[O, I]`` and bias ``[O]``, ``None`` for those not asked for."""
        if self.observe is None:
            product = self.weighted_products(delta, x) if weight and x is not None else None
            return product, self.weighted_rows(delta) if bias else None
        sums: dict[str, Tensor] = {}
        for group, route in self.by_group():
            parts: dict[str, Tensor] = {}
            if weight and x is not None:
                parts["weight"] = route.weighted_products(delta, x)
            if bias:
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

    def weighted_products(self, delta: Tensor, x: Tensor) -> Tensor:
        """Sum over examples of weight times deltaᵀ x: ``[B, *, O]`` and ``[B, *, I]`` to ``[O, I]``."""
        runs = self.runs()
        if len(runs) > MAX_RUNS:
            if delta.shape[-1] <= x.shape[-1]:
                delta, x = self.admitted(delta, x)
            else:
                x, delta = self.admitted(x, delta)
            return _rows(delta).t() @ _rows(x)
        product_OI: Tensor | None = None
        for first, end, weight in runs:
            delta_ON = _rows(delta[first:end]).t()
            x_NI = _rows(x[first:end])
            factor = weight / FULL_PERMILLE
            if product_OI is None:
                product_OI = delta_ON @ x_NI
                if factor != 1.0:
                    product_OI *= factor
            else:
                product_OI.addmm_(delta_ON, x_NI, alpha=factor)
        if product_OI is None:
            raise RoutingError("no example has weight: the block must be skipped, not summed")
        return product_OI


class _RoutedLinear(torch.autograd.Function):
    """``functional.linear`` whose weight and bias gradients sum over admitted examples alone."""

    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, route):  # type: ignore[no-untyped-def]
        ctx.route = route
        keep_x = route.open and weight_OI.requires_grad
        ctx.save_for_backward(x if keep_x else None, weight_OI)
        return functional.linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        x, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = delta.matmul(weight_OI) if need_x else None
        grad_weight = grad_bias = None
        if route.open:
            grad_weight, grad_bias = route.linear_gradients(delta, x, weight=need_weight, bias=need_bias)
        return grad_x, grad_weight, grad_bias, None


class _RoutedEmbedding(torch.autograd.Function):
    """``functional.embedding`` whose table gradient sums over admitted examples alone."""

    @staticmethod
    def forward(ctx, index_BX, weight_VI, padding_index, route):  # type: ignore[no-untyped-def]
        ctx.route, ctx.vocabulary_size, ctx.padding_index = route, weight_VI.shape[0], padding_index
        ctx.save_for_backward(index_BX)
        return functional.embedding(index_BX, weight_VI)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        if not route.open:
            return None, None, None, None
        (index_BX,) = ctx.saved_tensors
        delta, index_BX = route.admitted(delta, index_BX)
        grad_weight = torch.ops.aten.embedding_dense_backward(
            delta, index_BX, ctx.vocabulary_size, ctx.padding_index, False
        )
        return None, grad_weight, None, None


class _RoutedLayerNorm(torch.autograd.Function):
    """``functional.layer_norm`` whose scale and shift gradients sum over admitted examples alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, settings):  # type: ignore[no-untyped-def]
        shape, epsilon, route = settings
        output, mean, inverse_deviation = torch.native_layer_norm(x, shape, weight, bias, epsilon)
        ctx.route, ctx.shape = route, shape
        ctx.save_for_backward(x, weight, bias, mean, inverse_deviation)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        x, weight, bias, mean, inverse_deviation = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        backward = torch.ops.aten.native_layer_norm_backward
        grad_x = grad_weight = grad_bias = None
        mask = [need_x, False, False]
        if route.open and set(route.weights_B) == {FULL_PERMILLE}:
            mask = [need_x, need_weight, need_bias]
        elif route.open:
            delta_kept, *kept = route.admitted(delta, x, mean, inverse_deviation)
            _, grad_weight, grad_bias = backward(
                delta_kept,
                kept[0],
                ctx.shape,
                kept[1],
                kept[2],
                weight,
                bias,
                [False, need_weight, need_bias],
            )
        if any(mask):
            grads = backward(delta, x, ctx.shape, mean, inverse_deviation, weight, bias, mask)
            grad_x = grads[0] if mask[0] else None
            grad_weight = grads[1] if mask[1] else grad_weight
            grad_bias = grads[2] if mask[2] else grad_bias
        return grad_x, grad_weight, grad_bias, None


class _RoutedRMSNorm(torch.autograd.Function):
    """``functional.rms_norm`` whose scale gradient sums over admitted examples alone.

    The backward pass runs the norm again, once for activations and once for the scale: it is cheap beside
    a linear, and torch has no public backward of its own for it.
    """

    @staticmethod
    def forward(ctx, x, weight, settings):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.epsilon, ctx.route = settings
        ctx.save_for_backward(x, weight)
        return functional.rms_norm(x, ctx.shape, weight, ctx.epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        x, weight = (tensor.detach() for tensor in ctx.saved_tensors)
        grad_x = grad_weight = None
        with torch.enable_grad():
            if ctx.needs_input_grad[0]:
                x_again = x.requires_grad_()
                output = functional.rms_norm(x_again, ctx.shape, weight, ctx.epsilon)
                (grad_x,) = torch.autograd.grad(output, x_again, delta)
            if ctx.needs_input_grad[1] and route.open:
                delta_kept, x_kept = route.admitted(delta, x.detach())
                weight_again = weight.requires_grad_()
                output = functional.rms_norm(x_kept, ctx.shape, weight_again, ctx.epsilon)
                (grad_weight,) = torch.autograd.grad(output, weight_again, delta_kept)
        return grad_x, grad_weight, None


def _linear(module: nn.Linear, x: Tensor, route: Route) -> Tensor:
    weight_OI: Tensor = module.weight
    bias_O: Tensor | None = module.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight_OI = x.to(dtype), weight_OI.to(dtype)
        bias_O = bias_O.to(dtype) if bias_O is not None else None
    output: Tensor = _RoutedLinear.apply(x, weight_OI, bias_O, route)  # type: ignore[no-untyped-call]
    return output


def _embedding(module: nn.Embedding, index_BX: Tensor, route: Route) -> Tensor:
    padding_index = -1 if module.padding_idx is None else module.padding_idx
    output: Tensor = _RoutedEmbedding.apply(index_BX, module.weight, padding_index, route)  # type: ignore[no-untyped-call]
    return output


def _layer_norm(module: nn.LayerNorm, x: Tensor, route: Route) -> Tensor:
    shape = list(module.normalized_shape)
    x = _in_dtype_of(module.weight, x)
    output: Tensor = _RoutedLayerNorm.apply(x, module.weight, module.bias, (shape, module.eps, route))  # type: ignore[no-untyped-call]
    return output


def _rms_norm(module: nn.RMSNorm, x: Tensor, route: Route) -> Tensor:
    shape = list(module.normalized_shape)
    x = _in_dtype_of(module.weight, x)
    output: Tensor = _RoutedRMSNorm.apply(x, module.weight, (shape, module.eps, route))  # type: ignore[no-untyped-call]
    return output


def _in_dtype_of(weight: Tensor, x: Tensor) -> Tensor:
    """Under autocast norms run in the dtype of their parameters, as torch's own do."""
    return x.to(weight.dtype) if torch.is_autocast_enabled(x.device.type) else x


ROUTED_FORWARDS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _rms_norm,
}
"""The census, by forward method: a subclass that computes something else is not in it."""


def census(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own trainable parameters, by name; refuses what cannot be routed."""
    routed: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        label = f"module {name or '(root)'!r} ({type(module).__name__})"
        if isinstance(module, _NormBase):
            raise RoutingUnsupported(f"{label} mixes examples through shared statistics")
        own = {own_name for own_name, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        if type(module).forward not in ROUTED_FORWARDS or own - {"weight", "bias"}:
            raise RoutingUnsupported(f"{label} owns trainable {sorted(own)} and is not in the census")
        if "forward" in module.__dict__:
            raise RoutingUnsupported(f"{label} already has a forward of its own on the instance")
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            raise RoutingUnsupported(f"{label} uses max_norm, scale_grad_by_freq or sparse gradients")
        routed[name] = module
    return routed


def observed_parameters(model: nn.Module) -> tuple[str, ...]:
    """Trainable parameters whose gradient is, in whole, what an observer is told: those of linears alone.

    A tensor that an embedding shares (a tied head) is none of them: its gradient has a second part.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in census(model).values():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and all(ROUTED_FORWARDS[type(owner).forward] is _linear for owner in owners[id(parameter)])
    )


def _rows(x: Tensor) -> Tensor:
    """All dimensions but the last folded into one: ``[N, features]``."""
    return x.reshape(-1, x.shape[-1])


def _check_embedding(label: str, module: nn.Embedding) -> None:
    """``max_norm`` rewrites rows that were looked up, and frequencies count other examples' rows."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise RoutingUnsupported(f"{label} uses max_norm, scale_grad_by_freq or sparse gradients")
