"""Tensors of which every rank holds a part (``DTensor``, as FSDP2 makes them): gathered, or the part alone.

Gathering is a call that every rank must make, in the same order. Whoever has a sharded tensor has imported its home;
nobody else pays for that.
"""

import sys
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether other ranks hold other parts of the tensor."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(tensor, home.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which every rank must ask for; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_part_of(part: Tensor, like: Any) -> Tensor:
    """``part`` as this rank's part of a tensor sharded as ``like`` is; as it is where ``like`` is not sharded."""
    if not is_sharded(like):
        return part
    mesh, placements = like.device_mesh, like.placements
    placed: Tensor = type(like).from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed
