"""Convolutions whose parameters' gradients sum admitted examples alone: torch's ``Conv1d``, ``Conv2d`` and ``Conv3d``.

A convolution mixes the positions of an example, never two examples: its weight's gradient is a sum over examples, and
those without weight are left out of it, as of a linear's. Forward value and gradients of activations are torch's own
kernel's, and where every example enters at full weight so are the parameters' gradients, to the bit.

Packed examples share rows, and a kernel at the border of two of them sees both: refused. Transposed convolutions and
subclasses that compute something else are outside the census (``routed_modules.py``).

Shape suffixes: B examples, C channels in, O channels out, S positions along each dimension of space, K of the kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer_client.route import Route, RoutedFunction, RoutingUnsupported

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_KINDS: tuple[type[Convolution], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_Settings = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding and dilation along each dimension of space, and groups of channels."""


def is_convolution(module: nn.Module) -> bool:
    """Whether ``module`` computes what torch's convolutions do, on a weight and bias of its own."""
    forward, inner = type(module).forward, getattr(type(module), "_conv_forward", None)
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return names <= {"weight", "bias"} and any(
        forward is kind.forward and inner is kind._conv_forward for kind in _KINDS
    )


def convolution(module: Convolution, operands: tuple[Tensor, Tensor, Tensor | None], route: Route) -> Tensor:
    """A convolution's output of the operands: input ``[B, C, *S]``, weight ``[O, C / groups, *K]`` and bias ``[O]``.

    Raises:
        RoutingUnsupported: examples are packed, or there is no dimension of examples.
    """
    x, weight, bias = operands
    if route.spans_B:
        raise RoutingUnsupported(f"{type(module).__name__} mixes positions: examples packed into one row would mix")
    if x.dim() != weight.dim():
        raise RoutingUnsupported(
            f"{type(module).__name__} expects {weight.dim()} dimensions, examples first, found shape {tuple(x.shape)}"
        )
    x, padding = _padded(module, x)
    settings = (module.stride, padding, module.dilation, module.groups)
    output: Tensor = _RoutedConvolution.apply(x, weight, bias, settings, route)  # type: ignore[no-untyped-call]
    return output


def _padded(module: Convolution, x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input, and the zeros that the kernel is to add on either side of it: divided between the two as in torch."""
    sides = module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        return functional.pad(x, sides, mode=module.padding_mode), (0,) * (x.dim() - 2)
    before, after = sides[-2::-2], sides[-1::-2]
    if before != after:  # "same", with a kernel of even length
        more = [each for last, first in zip(after[::-1], before[::-1], strict=True) for each in (0, last - first)]
        x = functional.pad(x, more)
    return x, before


class _RoutedConvolution(RoutedFunction):
    @staticmethod
    def forward(ctx, x, weight, bias, settings: _Settings, route: Route):  # type: ignore[no-untyped-def]
        stride, padding, dilation, groups = settings
        ctx.route, ctx.settings = route, (stride, padding, dilation, False, [0] * len(stride), groups)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):  # type: ignore[no-untyped-def]
        route: Route = ctx.route
        route.check_token()
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        sizes = [weight.shape[0]] if ctx.has_bias else None

        def gradients(delta: Tensor, x: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
            if not any(wanted):
                return None, None, None
            backward = torch.ops.aten.convolution_backward
            found: tuple[Tensor | None, ...] = backward(delta, x, weight, sizes, *ctx.settings, wanted)
            return found

        if route.takes_everything:
            grads = gradients(delta, x, [need_x, need_weight, need_bias])
        else:
            grad_x, _, _ = gradients(delta, x, [need_x, False, False])
            grad_weight = grad_bias = None
            if route.open:
                delta_kept, x_kept = route.admitted(delta, x)
                _, grad_weight, grad_bias = gradients(delta_kept, x_kept, [False, need_weight, need_bias])
            elif route.open_elsewhere:
                grad_weight = torch.zeros_like(weight) if need_weight else None
                grad_bias = delta.new_zeros(weight.shape[0]) if need_bias else None
            grads = (grad_x, grad_weight, grad_bias)
        return *grads, None, None
