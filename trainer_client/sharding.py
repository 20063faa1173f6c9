"""Tensors of which every rank holds a part (``DTensor``, as FSDP2 makes them): gathered, or the part alone.

Gathering is a call that every rank must make, in the same order. Whoever has a sharded tensor has imported its home;
nobody else pays for that.

**Whole for a while.** A forward pass gathers parameters, and a backward pass parts them again. Without one FSDP2 leaves
those of its root module whole: who asks the model and does not train it ends with ``part_again``, and so does who reads
parameters by name, since the caller may have asked the model too.
"""

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


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


def sharded_modules(model: nn.Module) -> "list[FSDPModule]":
    """The modules of a model that ``fully_shard`` was applied to."""
    home = sys.modules.get("torch.distributed.fsdp")
    return [] if home is None else [module for module in model.modules() if isinstance(module, home.FSDPModule)]


def part_again(model: nn.Module) -> None:
    """Leave this rank with its part of each parameter, whatever pass came before; not in the midst of one."""
    for module in sharded_modules(model):
        module.reshard()


def part_of_whole(tensor: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor, where ``like`` is a sharded one of that shape; any other as it is."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    home = sys.modules["torch.distributed.tensor"]
    parted = home.distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # without messages
    return own_part(parted)


def as_part_of(part: Tensor, like: Any) -> Tensor:
    """``part`` as this rank's part of a tensor sharded as ``like`` is; as it is where ``like`` is not sharded."""
    if not is_sharded(like):
        return part
    mesh, placements = like.device_mesh, like.placements
    placed: Tensor = type(like).from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed
