"""Clipping of gradients, each parameter block on its own: why, says ``routing.py``."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consensus.pieces import piece_named
from trainer_client.pieces import part_of_entry
from trainer_client.route import RoutingError
from trainer_client.sharding import own_part, whole

CLIP_EPSILON = 1e-6
"""Added to a norm before dividing by it, as in ``torch.nn.utils.clip_grad_norm_``."""


def clip_factor(norm: float, maximum_norm: float) -> float:
    """By how much a gradient of that norm is scaled."""
    return min(1.0, maximum_norm / (norm + CLIP_EPSILON))


def clip_block_gradients(
    model: nn.Module, block_of_parameter: Mapping[str, int], maximum_norm: float
) -> tuple[float | None, ...]:
    """Scales each parameter block's gradient to an L2 norm of at most ``maximum_norm``, each on its own.

    Returns:
        The norm of each block before clipping; ``None`` for a block without gradient, 0 for one of pieces that no
        example may move, of tensors of which others are moved.

    Raises:
        RoutingError: a norm is not finite (an admitted example overflowed; blocked ones cannot).
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
            raise RoutingError(f"the gradient of parameter block {block} has norm {norm.item()}")
        scale = torch.clamp(maximum_norm / (norm + CLIP_EPSILON), max=1.0)
        torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)
        norms.append(norm.item())
    return tuple(norms)
