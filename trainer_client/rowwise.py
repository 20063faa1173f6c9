"""Modules known by what they do: those that hold vectors alone and treat each row on its own.

Every model family brings a norm of its own (``LlamaRMSNorm``, ``T5LayerNorm``, Gemma's, with ``1 + weight``), each with
another name and another constant. A list of names would be out of date, a guess would leak; so a module is tried. It is
rowwise if it has no child and no buffer, all its parameters are vectors of one length H, and called with one tensor
``[3, 4, H]`` it gives the same shape, the same bits again, the same bits of the others when the first example is
another one, and nothing else for two examples alone. That rules out what draws random numbers, keeps state,
or mixes examples.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer_client.sharding import is_sharded, own_part, whole

TRIED_EXAMPLES, TRIED_POSITIONS = 3, 4
TOLERANCE = 1e-2
"""Of the comparison that is not of bits (fewer examples may be computed in another order), for any dtype."""


def is_rowwise(module: nn.Module) -> bool:
    """Whether ``module`` treats ``[B, *, H]`` row by row; torch's random states are as before afterwards."""
    parameters = list(module.parameters(recurse=False))
    shapes = {tuple(parameter.shape) for parameter in parameters}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or any(module.children()) or any(module.buffers()):
        return False
    like, forward = own_part(parameters[0]), type(module).forward
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, TRIED_EXAMPLES, TRIED_POSITIONS, parameters[0].shape[0], generator=generator)
    first, second = drawn.to(like.device, like.dtype)
    second[1:] = first[1:]
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _gathered(module):
        try:
            found, again, other, fewer = (forward(module, shown) for shown in (first, first, second, first[1:]))
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
    if not isinstance(found, Tensor) or found.shape != first.shape:
        return False
    return (
        torch.equal(found, again)
        and torch.equal(found[1:], other[1:])
        and torch.allclose(found[1:], fewer, rtol=TOLERANCE, atol=TOLERANCE)
    )


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """The module with its own sharded parameters gathered; every rank tries the same modules."""
    held = dict(module._parameters)
    try:
        for name, parameter in held.items():
            if parameter is not None and is_sharded(parameter):
                module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
        yield
    finally:
        module._parameters.update(held)
