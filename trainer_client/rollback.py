"""Snapshots of a training job, and the ring that a rollback returns through.

A snapshot holds everything the next step depends on: parameters and buffers, optimizer state and settings,
random states (torch, CUDA, Python, numpy), and whatever else has ``state_dict`` and ``load_state_dict`` (scheduler,
loader position, gradient scaler) or is a ``torch.Generator``. Restoring is bit-exact; undoing AdamW by algebra
is not, which is why there are snapshots.

* Tensors are restored in place: the objects that the optimizer and the caller hold stay the same ones.
* Optimizer state is put back as it was, not through ``Optimizer.load_state_dict``, which casts state to
  the parameter's dtype.
* A restore that fails half-way puts back what it found and raises.
* Of a sharded job (FSDP2) a snapshot holds this rank's part; every rank takes and restores its own.

The job runs ahead of the ledger's finality. ``SnapshotRing`` keeps two snapshots: F, of the last parameter
root known to be final, and C, a later candidate. When C's root becomes final, C becomes F. A step that
cannot be admitted sends the job back to F.

Left to others: which root is final and what is submitted about it (``governed.py``).
"""

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn

from consensus.identifiers import Digest
from consensus.rejection import InvariantBroken
from trainer_client.sharding import as_part_of, is_sharded, own_part, part_again, part_of_whole


class Stateful(Protocol):
    """What a scheduler, loader or scaler offers: its state out and in again."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The live objects of a job: what a snapshot is taken of and restored into."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RandomState:
    """The states of every global random generator a training step may draw from."""

    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]
    python: tuple[Any, ...]
    numpy: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job at a step boundary; ``step`` is the number of steps done, ``root`` its parameter root."""

    step: int
    root: Digest
    tensors: Mapping[str, Tensor]
    optimizer_state: Mapping[int, Mapping[str, Any]]
    optimizer_settings: tuple[Mapping[str, Any], ...]
    stateful: Mapping[str, Mapping[str, Any]]
    generators: Mapping[str, Tensor]
    random: RandomState


@dataclass(frozen=True, slots=True)
class StepBeginning:
    """What a forward and backward pass may change: buffers and random states, as they were before it."""

    buffers: Mapping[str, Tensor]
    random: RandomState


def step_beginning(state: TrainingState) -> StepBeginning:
    """A copy of both; small beside a snapshot."""
    return StepBeginning({name: buffer.clone() for name, buffer in state.model.named_buffers()}, random_state())


def own_copy(tensor: Tensor) -> Tensor:
    """A copy of this rank's part of a tensor, where the tensor is."""
    return own_part(tensor).detach().clone()


def take_snapshot(
    state: TrainingState,
    step: int,
    root: Digest,
    beginning: StepBeginning | None = None,
    copied: Callable[[Tensor], Tensor] = own_copy,
) -> Snapshot:
    """A copy of everything; nothing in it is shared with the job. ``root`` is the caller's to know.

    With ``beginning`` it is the snapshot of that moment, taken later: after the backward pass, before the optimizer,
    with everything stateful and every generator as they were. ``copied`` makes the copies of tensors of model and
    optimizer, in an order that is the same on every rank.
    """
    parameters = _optimized(state.optimizer)
    tensors = _tensors(state.model) | dict(beginning.buffers if beginning is not None else {})
    return Snapshot(
        step=step,
        root=root,
        tensors={name: copied(tensor) for name, tensor in tensors.items()},
        optimizer_state={
            index: _copied(state.optimizer.state[parameter], copied)
            for index, parameter in enumerate(parameters)
            if parameter in state.optimizer.state
        },
        optimizer_settings=tuple(
            copy.deepcopy({key: value for key, value in group.items() if key != "params"})
            for group in state.optimizer.param_groups
        ),
        stateful={name: copy.deepcopy(each.state_dict()) for name, each in state.stateful.items()},
        generators={name: generator.get_state().clone() for name, generator in state.generators.items()},
        random=beginning.random if beginning is not None else random_state(),
    )


def restore_snapshot(snapshot: Snapshot, state: TrainingState) -> None:
    """Puts a job back to ``snapshot``, bit for bit; gradients are cleared. The snapshot stays usable.

    Raises:
        InvariantBroken: the job is not the one the snapshot is of; nothing was changed.
    """
    _check_fits(snapshot, state)
    found = take_snapshot(state, snapshot.step, snapshot.root)
    try:
        _write(snapshot, state)
    except BaseException:
        _write(found, state)
        raise


def own_part_of(snapshot: Snapshot, state: TrainingState) -> Snapshot:
    """Of a snapshot with whole tensors, what this rank holds of them, on its own device.

    What an optimizer keeps in main memory (its counts of steps, mostly) stays there.
    """
    tensors, parameters = _tensors(state.model), _optimized(state.optimizer)
    return replace(
        snapshot,
        tensors={
            name: part_of_whole(tensor, tensors[name]) if name in tensors else tensor
            for name, tensor in snapshot.tensors.items()
        },
        optimizer_state={
            index: {
                key: _part_at(value, parameters[index]) if isinstance(value, Tensor) else value
                for key, value in held.items()
            }
            for index, held in snapshot.optimizer_state.items()
        },
    )


def _part_at(value: Tensor, parameter: Tensor) -> Tensor:
    part = part_of_whole(value, parameter)
    return part if part.device.type == "cpu" else part.to(parameter.device)


def random_state() -> RandomState:
    """The global random states as they are now."""
    return RandomState(
        torch_cpu=torch.get_rng_state(),
        torch_cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else (),
        python=random.getstate(),
        numpy=copy.deepcopy(dict(numpy.random.get_state(legacy=False))),
    )


class SnapshotRing:
    """F, the last final snapshot, and at most one candidate C that waits to become final."""

    def __init__(self, final: Snapshot) -> None:
        self._final = final
        self._candidate: Snapshot | None = None

    @property
    def final(self) -> Snapshot:
        """F: where a rollback returns to."""
        return self._final

    @property
    def candidate(self) -> Snapshot | None:
        """C, or ``None`` when the next step may offer one."""
        return self._candidate

    def offer(self, snapshot: Snapshot) -> None:
        """Makes ``snapshot`` the candidate.

        Raises:
            InvariantBroken: a candidate is waiting, or ``snapshot`` is not later than F.
        """
        if self._candidate is not None:
            raise InvariantBroken(f"the snapshot of step {self._candidate.step} still waits to become final")
        if snapshot.step <= self._final.step:
            raise InvariantBroken(f"expected a step after {self._final.step}, found {snapshot.step}")
        self._candidate = snapshot

    def finalized(self, step: int, root: Digest) -> None:
        """Step ``step`` is final with ``root``: a candidate of that step becomes F; other steps change nothing.

        Raises:
            InvariantBroken: the ledger has another root for the candidate's step.
        """
        if self._candidate is None or self._candidate.step != step:
            return
        if self._candidate.root != root:
            raise InvariantBroken(
                f"step {step} is final with root {root.hex()}, the snapshot has {self._candidate.root.hex()}"
            )
        self._final, self._candidate = self._candidate, None

    def roll_back(self, state: TrainingState) -> Snapshot:
        """Restores F, drops C and returns F."""
        restore_snapshot(self._final, state)
        self._candidate = None
        return self._final


def _write(snapshot: Snapshot, state: TrainingState) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(state.model).items():
            own_part(tensor).copy_(snapshot.tensors[name])
            tensor.grad = None
    optimizer = state.optimizer
    optimizer.state.clear()
    for index, parameter in enumerate(_optimized(optimizer)):
        parameter.grad = None
        if index in snapshot.optimizer_state:
            optimizer.state[parameter] = _sharded_like(parameter, _copied(snapshot.optimizer_state[index]))
    for group, saved in zip(optimizer.param_groups, snapshot.optimizer_settings, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(copy.deepcopy(dict(saved)), params=parameters)
    for name, each in state.stateful.items():
        each.load_state_dict(copy.deepcopy(dict(snapshot.stateful[name])))
    for name, generator in state.generators.items():
        generator.set_state(snapshot.generators[name])
    torch.set_rng_state(snapshot.random.torch_cpu)
    if snapshot.random.torch_cuda:
        torch.cuda.set_rng_state_all(list(snapshot.random.torch_cuda))
    random.setstate(snapshot.random.python)
    numpy.random.set_state(copy.deepcopy(dict(snapshot.random.numpy)))


def _check_fits(snapshot: Snapshot, state: TrainingState) -> None:
    tensors = {name: (own_part(tensor).shape, tensor.dtype) for name, tensor in _tensors(state.model).items()}
    saved = {name: (tensor.shape, tensor.dtype) for name, tensor in snapshot.tensors.items()}
    if tensors != saved:
        raise InvariantBroken("the model's tensors are not those of the snapshot")
    if len(state.optimizer.param_groups) != len(snapshot.optimizer_settings):
        raise InvariantBroken("the optimizer's parameter groups are not those of the snapshot")
    if state.stateful.keys() != snapshot.stateful.keys():
        raise InvariantBroken("the job's stateful objects are not those of the snapshot")
    if state.generators.keys() != snapshot.generators.keys():
        raise InvariantBroken("the job's generators are not those of the snapshot")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    part_again(model)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _copied(values: Mapping[str, Any], copied: Callable[[Tensor], Tensor] = own_copy) -> dict[str, Any]:
    return {key: copied(value) if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in values.items()}


def _sharded_like(parameter: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state of a sharded parameter as it was: sharded where it has the shape of this rank's part."""
    if not is_sharded(parameter):
        return values
    shape = own_part(parameter).shape
    return {
        key: as_part_of(value, parameter) if isinstance(value, Tensor) and value.shape == shape else value
        for key, value in values.items()
    }
