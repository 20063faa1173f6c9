"""Clipping of gradients, each parameter block on its own or all together: why, says ``scaling.py``."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consensus.pieces import piece_named
from trainer_client.pieces import part_of_entry
from trainer_client.route import RoutingError
from trainer_client.sharding import own_part, whole

CLIP_EPSILON = 1e-6
"""Added to a norm before dividing by it, as in ``torch.nn.utils.clip_grad_norm_``."""


class GradientOverflow(RoutingError):
    """A gradient is not finite: an admitted example overflowed; blocked ones cannot."""


def clip_factor(norm: float, maximum_norm: float) -> float:
    """By how much a gradient of that norm is scaled."""
    return min(1.0, maximum_norm / (norm + CLIP_EPSILON))


def clip_block_gradients(
    model: nn.Module, block_of_parameter: Mapping[str, int], maximum_norm: float, *, together: bool = False
) -> tuple[float | None, ...]:
    """Scales each parameter block's gradient to an L2 norm of at most ``maximum_norm``, each on its own.

    ``together``: by one factor, of the norm of them all.

    Returns:
        The norm that each block was clipped by, before clipping: its own, or that of all; ``None`` for a block without
        gradient, 0 for one of pieces that no example may move, of tensors of which others are moved.

    Raises:
        GradientOverflow: a norm is not finite.
    """
    gradients_K: list[list[Tensor]] = [[] for _ in range(max(block_of_parameter.values()) + 1)]
    held = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, gradient in held.items():
        if name in block_of_parameter:
            gradients_K[block_of_parameter[name]].append(gradient)
    for name, block in block_of_parameter.items():
        piece = None if name in held else piece_named(name)
        if piece is not None and piece.tensor in held:
            gradients_K[block].append(part_of_entry(held, name))
    norms: list[float | None] = []
    for block, gradients in enumerate(gradients_K):
        if not gradients:
            norms.append(None)
            continue
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if not torch.isfinite(norm):
            raise GradientOverflow(f"the gradient of parameter block {block} has norm {norm.item()}")
        if not together:
            scale = torch.clamp(maximum_norm / (norm + CLIP_EPSILON), max=1.0)
            torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)
        norms.append(norm.item())
    if not together:
        return tuple(norms)
    of_all = math.sqrt(sum(norm * norm for norm in norms if norm is not None))
    every = [own_part(gradient) for gradients in gradients_K for gradient in gradients]
    if every:
        torch._foreach_mul_(every, clip_factor(of_all, maximum_norm))
    return tuple(None if norm is None else of_all for norm in norms)
