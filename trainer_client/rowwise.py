"""Modules known by what they do: those that hold vectors alone, or one table of embeddings, and treat examples apart.

Every model family brings a norm of its own (``LlamaRMSNorm``, ``T5LayerNorm``, Gemma's, with ``1 + weight``), each with
another name and another constant, and some an embedding that scales what it finds. A list of names would be out of
date, a guess would leak; so a module is tried. It must have no child and no buffer (an embedding may have some), all
its parameters are vectors of one length H, and called with one tensor ``[3, 4, H]`` it gives the same bits again, the
same bits of the others when the first example is another one, and nothing else for two examples alone, in training and
in evaluation, of its own parameters alone. That rules out what draws random numbers, keeps state, or mixes examples.

A *rowwise* module treats positions alike and apart, too: it gives the same for ``[12, H]``. An *examplewise* one may
mix an example's positions and have its features elsewhere: it may be called with ``[3, H, 4]`` or ``[3, H, 4, 4]``, as
``nn.GroupNorm``, and with examples packed into common rows it is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer_client.bypass import around_routes
from trainer_client.evaluating import evaluating
from trainer_client.sharding import is_sharded, own_part, whole

TRIED_EXAMPLES, TRIED_POSITIONS = 3, 4
TOLERANCE = 1e-2
"""Of the comparison that is not of bits (fewer examples may be computed in another order), for any dtype."""

_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a forward may raise that expects something else than one tensor of the shape tried."""


def is_rowwise(module: nn.Module) -> bool:
    """Whether ``module`` treats ``[B, *, H]`` row by row; torch's random states are as before afterwards."""
    tried = _rows(module)
    return tried is not None and _treats_apart(module, *tried, flattened=True)


def is_examplewise(module: nn.Module) -> bool:
    """Whether ``module`` treats ``[B, …]`` example by example; torch's random states are as before afterwards."""
    tried = _rows(module)
    if tried is None:
        return False
    shapes = [tried] if isinstance(module, nn.Embedding) else [tried, *map(_features_second, (tried, tried), (0, 1))]
    return any(_treats_apart(module, *each, flattened=False) for each in shapes)


def _rows(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Two inputs ``[3, 4, H]`` that differ in the first example, or of indexes ``[3, 4]``; None for other modules."""
    parameters = list(module.parameters(recurse=False))
    shapes = {tuple(parameter.shape) for parameter in parameters}
    if len(shapes) != 1 or any(module.children()):
        return None
    like, (shape,) = own_part(parameters[0]), shapes
    generator = torch.Generator().manual_seed(0)
    size = (2, TRIED_EXAMPLES, TRIED_POSITIONS)
    if isinstance(module, nn.Embedding) and shape == (module.num_embeddings, module.embedding_dim):
        drawn = torch.randint(module.num_embeddings, size, generator=generator).to(like.device)
    elif len(shape) == 1 and not any(module.buffers()) and like.is_floating_point():
        drawn = torch.randn(*size, *shape, generator=generator).to(like.device, like.dtype)
    else:
        return None
    first, second = drawn
    second[1:] = first[1:]
    return first, second


def _features_second(tried: tuple[Tensor, Tensor], more: int) -> tuple[Tensor, Tensor]:
    """``[3, H, 4]``, or one dimension more of space."""
    first, second = (each.mT if not more else each.mT[..., None] * torch.arange(1, 5).to(each) for each in tried)
    return first.contiguous(), second.contiguous()


def _treats_apart(module: nn.Module, first: Tensor, second: Tensor, *, flattened: bool) -> bool:
    forward = type(module).forward
    devices = [first.device] if first.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _gathered(module), evaluating(module):
        own = {id(parameter) for parameter in module.parameters()}
        for training in (False, True):
            module.training = training
            try:
                with torch.no_grad():
                    found, again, other, fewer = (forward(module, shown) for shown in (first, first, second, first[1:]))
                    rows = forward(module, first.flatten(0, 1)) if flattened else None
                with torch.enable_grad():
                    leaves = around_routes(forward(module, first).sum())
            except _REFUSALS:
                return False
            if not isinstance(found, Tensor) or found.shape[: first.dim()] != first.shape:
                return False
            apart = (
                torch.equal(found, again)
                and torch.equal(found[1:], other[1:])
                and torch.allclose(found[1:], fewer, rtol=TOLERANCE, atol=TOLERANCE)
                and (rows is None or torch.allclose(found.flatten(0, 1), rows, rtol=TOLERANCE, atol=TOLERANCE))
                and all(id(leaf) in own for leaf in leaves)
            )
            if not apart:
                return False
    return True


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
