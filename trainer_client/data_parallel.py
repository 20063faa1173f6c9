"""Models that several ranks train together: DistributedDataParallel, and FSDP2's ``fully_shard``.

Both leave every rank with the *mean* over ranks of their gradients, so each rank's loss is multiplied by their number:
the sum over the global batch is what the policy's weights are about. What else differs:

* **DDP** wraps the module; names, routing and commitments are the module's own. Every rank holds every parameter.
* **FSDP2** leaves names as they are and each rank with a part of every parameter (a ``DTensor``); gathering one is a
  call that every rank must make. Ranks must bring gradients for the same parameters, also one that its own
  examples may not move: it brings zeros where another rank's may.
* **Compiled** models (``torch.compile``) are the module they were compiled from, too: routed forwards run uncompiled
  between compiled pieces (``routing.py``).
* **Accumulation** sends gradients with a step's last micro-batch alone.

Refused, because the sums would not be what they must: a process group without either of them, a communication hook,
parameters on a part of the ranks, trainable parameters that are not sharded beside some that are.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from consensus.identifiers import Digest
from consensus.rejection import ConfigError
from trainer_client.commitment import committed_tensors, copied_tensors, root_of_tensors
from trainer_client.evaluating import evaluating
from trainer_client.ranks import Ranks
from trainer_client.record import Example
from trainer_client.sharding import is_sharded, part_again, sharded_modules, whole


class ParallelModel:
    """A model as the ranks of a job train it.

    Args:
        model: a module, or one in ``DistributedDataParallel``, or sharded by ``fully_shard``; compiled or not.

    Raises:
        ConfigError: see the header.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._wrapper: DistributedDataParallel | None = None
        while (inner := _inside(model)) is not None:
            self._wrapper = model if isinstance(model, DistributedDataParallel) else self._wrapper
            model = inner
        self.module = model
        part_again(self.module)
        self._ranks = ranks
        self.is_sharded = any(is_sharded(parameter) for parameter in self.module.parameters())
        self._sharded_modules = sharded_modules(self.module) if self.is_sharded else []
        self._check()

    @property
    def kind(self) -> str:
        """``DDP``, ``FSDP2``, or nothing for one process."""
        if self._ranks.size == 1:
            return ""
        return "FSDP2" if self.is_sharded else "DDP"

    @contextmanager
    def pass_of(self, *, last: bool) -> Iterator[None]:
        """A forward and backward pass, with a step's ``last`` of which ranks exchange their gradients."""
        for module in self._sharded_modules:
            module.set_requires_gradient_sync(last, recurse=False)
        try:
            with nullcontext() if last or self._wrapper is None else self._wrapper.no_sync():
                yield
        finally:
            for module in self._sharded_modules:
                module.set_requires_gradient_sync(True, recurse=False)

    def of_all(self, loss: Tensor) -> Tensor:
        """The part of this rank's examples in the loss of all, as the wrapper, which averages, must be given it."""
        return loss * self._ranks.size if self._ranks.size > 1 else loss

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Forward passes without dropout and gradients; afterwards parameters and modes are as before."""
        try:
            with evaluating(self.module), torch.no_grad():
                yield
        finally:
            part_again(self.module)

    def copied(self) -> dict[str, Tensor]:
        """On the first rank ``commitment.copied_tensors`` of the whole model; empty elsewhere. Every rank must ask."""
        if not self.is_sharded:
            return copied_tensors(self.module) if self._ranks.is_first else {}
        copies: dict[str, Tensor] = {}
        for name, tensor in committed_tensors(self.module).items():
            held = whole(tensor)
            if self._ranks.is_first:
                copies[name] = held.to("cpu", copy=True).contiguous()
        return copies

    def root(self) -> Digest:
        """The parameter root of the model as it is now, on every rank."""
        copies = self.copied()
        return self._ranks.by_first(lambda: root_of_tensors(copies))

    def _check(self) -> None:
        ranks = self._ranks
        if ranks.size == 1:
            return
        if self._wrapper is None and not self.is_sharded:
            raise ConfigError(
                f"a process group of {ranks.size} ranks, and the model is neither in DistributedDataParallel nor"
                " sharded by fully_shard: gradients would stay where they are"
            )
        if self._wrapper is not None:
            if self._wrapper._comm_hooks:
                raise ConfigError(
                    "DistributedDataParallel has a communication hook: gradients would not be the sum of all ranks'"
                )
            found = torch.distributed.get_world_size(self._wrapper.process_group)
            if found != ranks.size:
                raise ConfigError(f"DistributedDataParallel over {found} of {ranks.size} ranks: expected all of them")
            return
        for name, parameter in self.module.named_parameters():
            if not is_sharded(parameter):
                if parameter.requires_grad:
                    raise ConfigError(f"parameter {name!r} is not sharded: apply fully_shard to the whole model last")
                continue
            found_mesh = tuple(parameter.device_mesh.shape)  # type: ignore[attr-defined]
            if found_mesh != (ranks.size,):
                raise ConfigError(
                    f"parameter {name!r} is sharded over a mesh of shape {found_mesh}: expected ({ranks.size},)"
                )


@dataclass(frozen=True, slots=True)
class RankPass:
    """What a rank shows in one pass: ``examples`` with their weights, and the profiles of the step on every rank."""

    examples: tuple[Example, ...]
    weights_BK: list[list[int]]
    profiles_of_step: set[tuple[int, ...]]


def pass_over(
    own: tuple[Example, ...],
    admitted: Sequence[Example],
    weights_permille: Callable[[Example], Sequence[int]],
    ranks: Ranks,
) -> RankPass:
    """A pass over a rank's ``own`` examples of a step; over a stand-in, which moves nothing, where it has none left.

    ``weights_permille`` is an example's depth profile.
    """
    shown = own or tuple(admitted[:1])
    weights_BK = [[weight if own else 0 for weight in weights_permille(example)] for example in shown]
    elsewhere = admitted if ranks.size > 1 else ()
    return RankPass(shown, weights_BK, {tuple(weights_permille(example)) for example in elsewhere})


def _inside(model: nn.Module) -> nn.Module | None:
    """What DDP or ``torch.compile`` put a wrapper around; None for a model without one."""
    if isinstance(model, DistributedDataParallel):
        return model.module  # type: ignore[no-any-return]
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # whoever compiled a model has imported it
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        return model._orig_mod  # type: ignore[no-any-return]
    return None
