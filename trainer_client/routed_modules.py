"""Modules whose parameter gradients can be summed over chosen examples, and the census of them.

For each module type a custom backward: the forward value and the gradient of the activations are torch's own,
the parameters' gradients sum only the rows that the call's ``route`` admits.

``census`` is the default-deny list: a trainable parameter outside these modules is refused by name. It holds torch's
linear, embedding, layer norm and convolutions (``convolution.py``), the linear of GPT-2's makers (``Conv1D`` of
transformers), and modules known by what they do instead of by name (``rowwise.py``): the norms that every model family
brings of its own. LoRA's two matrices are linears; the frozen weight beside them needs no route.

Left to others: which weights, for which micro-batch, and when forwards are replaced (``routing.py``).

Shape suffixes: B examples, N rows (examples times positions), I inputs, O outputs, V vocabulary, X any number
of positions.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from trainer_client.bypass import check_parameter
from trainer_client.convolution import convolution, is_convolution
from trainer_client.route import Route, RoutedFunction, RoutingUnsupported, unviewed
from trainer_client.rowwise import is_examplewise, is_rowwise


class _RoutedLinear(RoutedFunction):
    """``functional.linear`` whose weight and bias gradients sum over admitted examples alone."""

    @staticmethod
    def forward(ctx, x, weight_OI, bias_O, route):  # type: ignore[no-untyped-def]
        ctx.route = route
        keep_x = route.open and weight_OI.requires_grad
        ctx.save_for_backward(x if keep_x else None, weight_OI)
        return unviewed(functional.linear(x, weight_OI, bias_O))

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        x, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        delta, delta_NO = _folded(delta)
        grad_x = (delta_NO @ weight_OI).view(*delta.shape[:-1], weight_OI.shape[1]) if need_x else None
        grad_weight = grad_bias = None
        if route.open:
            product = (delta, x) if need_weight else None
            grad_weight, grad_bias = route.linear_gradients(product, delta if need_bias else None)
        elif route.open_elsewhere:
            grad_weight = torch.zeros_like(weight_OI) if need_weight else None
            grad_bias = delta.new_zeros(delta.shape[-1]) if need_bias else None
        return grad_x, grad_weight, grad_bias, None


class _RoutedConv1D(RoutedFunction):
    """The linear of GPT-2's makers, whose weight is ``[I, O]``: as ``_RoutedLinear``, in their order of operations."""

    @staticmethod
    def forward(ctx, x, weight_IO, bias_O, route):  # type: ignore[no-untyped-def]
        ctx.route = route
        keep_x = route.open and weight_IO.requires_grad
        ctx.save_for_backward(x if keep_x else None, weight_IO)
        output_NO = torch.addmm(bias_O, x.reshape(-1, x.shape[-1]), weight_IO)
        return unviewed(output_NO.view(*x.shape[:-1], weight_IO.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        x, weight_IO = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        delta, delta_NO = _folded(delta)
        grad_x = (delta_NO @ weight_IO.t()).view(*delta.shape[:-1], weight_IO.shape[0]) if need_x else None
        grad_weight = grad_bias = None
        if route.open:
            product = (x, delta) if need_weight else None
            grad_weight, grad_bias = route.linear_gradients(product, delta if need_bias else None)
        elif route.open_elsewhere:
            grad_weight = torch.zeros_like(weight_IO) if need_weight else None
            grad_bias = delta.new_zeros(delta.shape[-1]) if need_bias else None
        return grad_x, grad_weight, grad_bias, None


class _RoutedEmbedding(RoutedFunction):
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
            zeros_VI = delta.new_zeros(ctx.vocabulary_size, delta.shape[-1]) if route.open_elsewhere else None
            return None, zeros_VI, None, None
        (index_BX,) = ctx.saved_tensors
        delta, index_BX = route.admitted(delta, index_BX)
        grad_weight = torch.ops.aten.embedding_dense_backward(
            delta, index_BX, ctx.vocabulary_size, ctx.padding_index, False
        )
        return None, grad_weight, None, None


class _RoutedLayerNorm(RoutedFunction):
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
        if route.takes_everything:
            mask = [need_x, need_weight, need_bias]
        elif route.open_elsewhere and not route.open:
            grad_weight = torch.zeros_like(weight) if need_weight else None
            grad_bias = torch.zeros_like(bias) if need_bias else None
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


class _RoutedByRowwiseRule(RoutedFunction):
    """A module that treats rows alike and apart (``rowwise.py``): its parameters' gradients of admitted examples alone.

    The backward pass runs the module's own forward again, for activations over all rows and for parameters over
    the admitted ones: cheap for a norm beside a linear, and whatever the module computes is what is differentiated.
    """

    @staticmethod
    def forward(ctx, settings, x, *parameters):  # type: ignore[no-untyped-def]
        ctx.compute, ctx.route = settings
        ctx.autocast = (
            x.device.type,
            torch.get_autocast_dtype(x.device.type),
            torch.is_autocast_enabled(x.device.type),
        )
        ctx.parameters = parameters
        ctx.save_for_backward(x, *parameters)  # the parameters too: torch then refuses them if changed meanwhile
        return ctx.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route = ctx.route
        route.check_token()
        x, *_ = ctx.saved_tensors
        need_x = ctx.needs_input_grad[1]
        wanted = [parameter for parameter, need in zip(ctx.parameters, ctx.needs_input_grad[2:], strict=True) if need]
        grad_x, found = None, {}
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            if need_x:
                x_again = x.detach().requires_grad_()
                (grad_x,) = torch.autograd.grad(ctx.compute(x_again), x_again, delta)
            if wanted and route.open:
                delta_kept, x_kept = route.admitted(delta, x.detach())
                gradients = torch.autograd.grad(ctx.compute(x_kept), wanted, delta_kept, allow_unused=True)
                found = {id(parameter): gradient for parameter, gradient in zip(wanted, gradients, strict=True)}
            elif route.open_elsewhere:
                found = {id(parameter): torch.zeros_like(parameter) for parameter in wanted}
        return None, grad_x, *(found.get(id(parameter)) for parameter in ctx.parameters)


def _folded(delta: Tensor) -> tuple[Tensor, Tensor]:
    """``delta`` as torch's own linear takes it, and its rows ``[N, O]``: copied into order at most once.

    A loss that transposes logits leaves it in another order. Of several examples rows can then not be told without a
    copy; of one they can, and are summed in the order in which they lie. A copy would round the bias's sum otherwise.
    """
    delta_NO = delta.reshape(-1, delta.shape[-1])
    return delta_NO.view(delta.shape), delta_NO


def _linear(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    output: Tensor = _RoutedLinear.apply(*in_autocast_dtype(module, x), route)  # type: ignore[no-untyped-call]
    return output


def _conv1d(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    output: Tensor = _RoutedConv1D.apply(*in_autocast_dtype(module, x), route)  # type: ignore[no-untyped-call]
    return output


def in_autocast_dtype(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias in the dtype in which autocast, where it is on, would multiply them."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return x, weight, bias


def _embedding(module: nn.Embedding, index_BX: Tensor, route: Route) -> Tensor:
    padding_index = -1 if module.padding_idx is None else module.padding_idx
    output: Tensor = _RoutedEmbedding.apply(index_BX, module.weight, padding_index, route)  # type: ignore[no-untyped-call]
    return output


def _layer_norm(module: nn.LayerNorm, x: Tensor, route: Route) -> Tensor:
    shape = list(module.normalized_shape)
    if x.dim() <= len(shape) or (route.spans_B and len(shape) > 1):
        raise RoutingUnsupported(f"LayerNorm over {shape} mixes examples, found shape {tuple(x.shape)}")
    x = _in_dtype_of(module.weight, x)
    output: Tensor = _RoutedLayerNorm.apply(x, module.weight, module.bias, (shape, module.eps, route))  # type: ignore[no-untyped-call]
    return output


def _convolution(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return convolution(module, in_autocast_dtype(module, x), route)


def _by_rowwise_rule(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    compute = partial(type(module).forward, module)
    output: Tensor = _RoutedByRowwiseRule.apply((compute, route), x, *module.parameters(recurse=False))  # type: ignore[no-untyped-call]
    return output


def _by_examplewise_rule(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    if route.spans_B:
        raise RoutingUnsupported(f"{type(module).__name__} mixes positions: examples packed into one row would mix")
    return _by_rowwise_rule(module, x, route)


def _in_dtype_of(weight: Tensor, x: Tensor) -> Tensor:
    """Under autocast norms run in the dtype of their parameters, as torch's own do."""
    return x.to(weight.dtype) if torch.is_autocast_enabled(x.device.type) else x


RoutedForward = Callable[[Any, Tensor, Route], Tensor]

ROUTED_FORWARDS: dict[Callable[..., Tensor], RoutedForward] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
}
"""The census, by forward method: a subclass that computes something else is not in it."""


def routed_forward(module: nn.Module) -> RoutedForward | None:
    """What takes the place of a module's forward; None for one outside the census."""
    forward = type(module).forward
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if forward in ROUTED_FORWARDS and names <= {"weight", "bias"}:
        return ROUTED_FORWARDS[forward]
    if is_conv1d(module):
        return _conv1d
    if is_convolution(module):
        return _convolution
    if is_rowwise(module):
        return _by_rowwise_rule
    return _by_examplewise_rule if is_examplewise(module) else None


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is the linear of GPT-2's makers, whose weight is ``[I, O]``."""
    # Whoever has a module of this class has imported its home; nobody else needs transformers.
    transformers_home = sys.modules.get("transformers.pytorch_utils")
    return transformers_home is not None and type(module).forward is transformers_home.Conv1D.forward


def census(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that own trainable parameters, by name; refuses what cannot be routed.

    A module outside the census may hold tensors that one of the census owns too (a head's bias, say): used by itself
    it is found where the loss is taken (``bypass.around_routes``).
    """
    routed: dict[str, nn.Module] = {}
    outside: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        label = f"module {name or '(root)'!r} ({type(module).__name__})"
        if isinstance(module, _NormBase) and (module.track_running_stats or not isinstance(module, _InstanceNorm)):
            raise RoutingUnsupported(f"{label} mixes examples through shared statistics")
        own = {own_name: p for own_name, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        for own_name, parameter in own.items():
            check_parameter(f"{label}: parameter {own_name!r}", parameter)
        if "forward" in module.__dict__:
            raise RoutingUnsupported(f"{label} already has a forward of its own on the instance")
        if routed_forward(module) is None:
            outside[label] = {own_name: id(parameter) for own_name, parameter in own.items()}
            continue
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            raise RoutingUnsupported(f"{label} uses max_norm, scale_grad_by_freq or sparse gradients")
        routed[name] = module
    owned = {id(parameter) for module in routed.values() for parameter in module.parameters(recurse=False)}
    for label, held in outside.items():
        if unowned := sorted(own_name for own_name, parameter in held.items() if parameter not in owned):
            raise RoutingUnsupported(f"{label} owns trainable {unowned} and is not in the census")
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
        and all(routed_forward(owner) in (_linear, _conv1d) for owner in owners[id(parameter)])
    )
