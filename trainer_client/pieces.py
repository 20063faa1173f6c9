"""Tensors divided among parameter blocks: which pieces a table makes of a model's, and an optimizer of pieces.

At granularity ``head`` a table names pieces of tensors (``consensus/pieces.py``). To the optimizer each piece is a
parameter of its own while a run lasts: without a gradient where no example of the step may move it, so that neither
momentum nor decay nor a count of steps goes on for it, whatever the optimizer is. Restoring a part of a tensor after
the optimizer's step could not give that: a tensor has one count of steps, and optimizers other than Adam's kin
have one scale or direction for all of it.

Pieces are copies, contiguous, which kernels of fused optimizers take for granted: filled from the tensor before the
optimizer's step and put back into it after.

**What heads share.** Of LoRA's two matrices beside a projection, one is divided by head and the other one shared. An
example reaches the shared one through the heads that it may move, and no others (``headwise.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consensus.pieces import TensorPiece, piece_named
from trainer_client.route import FULL_PERMILLE, RoutingUnsupported, Weights
from trainer_client.sharding import own_part

INNER, OUTER = ".lora_A.", ".lora_B."
"""In the names of LoRA's matrices: of the one that takes the projection's input, of the one that gives its output."""


@dataclass(frozen=True, slots=True)
class PieceOfBlock:
    """A piece of a tensor, and the number of its parameter block."""

    piece: TensorPiece
    block: int

    def of(self, tensor: Tensor) -> Tensor:
        """That part of the tensor, sharing its memory."""
        return tensor.narrow(self.piece.dimension, self.piece.first, self.piece.end - self.piece.first)


@dataclass(frozen=True, slots=True)
class SharedByHeads:
    """A tensor that examples reach through heads alone: its own parameter block, and those of the heads.

    ``divided`` is LoRA's other matrix; it is the outer one where heads are divided ``by_outputs``.
    """

    tensor: str
    divided: str
    by_outputs: bool
    block: int
    heads: tuple[int, ...]

    def weights(self, weights_KB: Sequence[Weights]) -> Weights:
        """For each example whether it reaches the tensor through any head, as full weight or none."""
        return tuple(
            FULL_PERMILLE if own and any(of_heads) else 0
            for own, *of_heads in zip(weights_KB[self.block], *(weights_KB[head] for head in self.heads), strict=True)
        )


@dataclass(frozen=True, slots=True)
class Division:
    """How a parameter table divides a model's tensors; ``pieces`` and ``shared`` by the tensor's name."""

    pieces: Mapping[str, tuple[PieceOfBlock, ...]]
    shared: Mapping[str, SharedByHeads]


def division_of(model: nn.Module, block_of_entry: Mapping[str, int]) -> Division:
    """The division that a table's entries make of the model's tensors.

    Raises:
        RoutingUnsupported: pieces do not make up their tensor, or are of one that several modules use.
    """
    parameters = dict(model.named_parameters())
    found: dict[str, list[PieceOfBlock]] = {}
    for name, block in block_of_entry.items():
        piece = None if name in parameters else piece_named(name)
        if piece is not None and piece.tensor in parameters:
            found.setdefault(piece.tensor, []).append(PieceOfBlock(piece, block))
    if not found:
        return Division({}, {})
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    pieces: dict[str, tuple[PieceOfBlock, ...]] = {}
    for tensor, parts in found.items():
        ordered = tuple(sorted(parts, key=lambda each: each.piece.first))
        shape, dimensions = parameters[tensor].shape, {each.piece.dimension for each in ordered}
        reached = 0
        for each in ordered:
            reached = each.piece.end if each.piece.first == reached else -1
        if len(dimensions) != 1 or max(dimensions) >= len(shape) or reached != shape[max(dimensions)]:
            named = ", ".join(each.piece.name for each in ordered[:8])
            raise RoutingUnsupported(f"the pieces do not make up tensor {tensor!r} of shape {tuple(shape)}: {named}")
        if uses[id(parameters[tensor])] != 1:
            raise RoutingUnsupported(f"tensor {tensor!r} is used by several modules: it cannot be divided by head")
        pieces[tensor] = ordered
    return Division(pieces, dict(_shared(parameters, block_of_entry, pieces)))


def part_of_entry(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """What a table's entry names: a whole tensor, or a piece of one, sharing its memory."""
    if name in tensors:
        return tensors[name]
    piece = piece_named(name)
    if piece is None:
        raise KeyError(name)
    return tensors[piece.tensor].narrow(piece.dimension, piece.first, piece.end - piece.first)


class Moved:
    """Which parameter blocks an example of the step just finished may move; told by ``routing.py``."""

    def __init__(self) -> None:
        self.blocks: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a parameter table while a run is open. ``parameter`` is the optimizer's: of a divided tensor a piece.

    ``tensor`` is the model's, called ``tensor_name``; ``part`` of it is meant, or None for the whole of it.
    """

    tensor_name: str
    tensor: nn.Parameter
    parameter: nn.Parameter
    part: PieceOfBlock | None
    moved: Moved

    @property
    def value(self) -> Tensor:
        """Sharing the model's memory."""
        return self.tensor if self.part is None else self.part.of(self.tensor)

    @property
    def gradient(self) -> Tensor | None:
        """Of a step just finished, this rank's part; None where no example of the step may move the entry."""
        gradient = self.tensor.grad
        if gradient is None or self.part is None:
            return None if gradient is None else own_part(gradient)
        return self.part.of(gradient) if self.part.block in self.moved.blocks else None


Entries = Mapping[str, Entry]
"""By the names that a table gives them."""


def whole_entries(model: nn.Module) -> Entries:
    """Those of a table that divides none of the model's tensors."""
    return {name: Entry(name, parameter, parameter, None, Moved()) for name, parameter in model.named_parameters()}


@contextmanager
def optimizer_by_pieces(
    optimizer: torch.optim.Optimizer, model: nn.Module, division: Division, moved: Moved
) -> Iterator[Entries]:
    """Lets the optimizer have pieces instead of divided tensors; afterwards it has the tensors again.

    Each tensor's state is then put together of its pieces'; counts of steps, one a piece, become the largest. Where
    any of it has another shape than its piece (Adafactor's factors), the tensor has no state, as before its first step.

    Raises:
        RoutingUnsupported: the optimizer already has state of another shape than its tensor's.
    """
    entries = whole_entries(model)
    if not division.pieces:
        yield entries
        return
    pieces = _Pieces(optimizer, model, division, moved)
    hooks = [optimizer.register_step_pre_hook(pieces.before_step), optimizer.register_step_post_hook(pieces.after_step)]
    try:
        pieces.take()
        yield {name: entry for name, entry in entries.items() if name not in division.pieces} | pieces.entries()
    finally:
        for hook in hooks:
            hook.remove()
        pieces.give_back()


class _Pieces:
    """The pieces of one optimizer's divided tensors."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, division: Division, moved: Moved) -> None:
        self._optimizer = optimizer
        self._division = division
        self._moved = moved
        self._tensors = {name: p for name, p in model.named_parameters() if name in division.pieces and p.requires_grad}
        self._held: dict[str, list[nn.Parameter]] = {}

    def take(self) -> None:
        names = {id(parameter): name for name, parameter in self._tensors.items()}
        for group in self._optimizer.param_groups:
            params: list[nn.Parameter] = []
            labels: list[str] = []
            for number, parameter in enumerate(group["params"]):
                name = names.get(id(parameter))
                parts = () if name is None else self._division.pieces[name]
                own = [
                    nn.Parameter(each.of(parameter.detach()).clone(memory_format=torch.contiguous_format))
                    for each in parts
                ] or [parameter]
                params += own
                if "param_names" in group:
                    labels += [each.piece.name for each in parts] or [group["param_names"][number]]
                if name is not None:
                    self._held[name] = own
                    self._divide_state(parameter, parts, own)
            group["params"][:] = params
            if "param_names" in group:
                group["param_names"] = labels

    def entries(self) -> dict[str, Entry]:
        """Those that the optimizer has, by their names."""
        return {
            each.piece.name: Entry(name, self._tensors[name], piece, each, self._moved)
            for name, own in self._held.items()
            for each, piece in zip(self._division.pieces[name], own, strict=True)
        }

    def before_step(self, *_: Any) -> None:
        """Gradients and values of the tensors go to the pieces."""
        with torch.no_grad():
            for name, own in self._held.items():
                tensor = self._tensors[name]
                gradient, tensor.grad = tensor.grad, None
                for each, piece in zip(self._division.pieces[name], own, strict=True):
                    piece.grad = None
                    piece.copy_(each.of(tensor))
                    if gradient is not None and each.block in self._moved.blocks:
                        piece.grad = each.of(gradient).clone(memory_format=torch.contiguous_format)

    def after_step(self, *_: Any) -> None:
        """The tensors get the pieces' values."""
        with torch.no_grad():
            for name, own in self._held.items():
                for each, piece in zip(self._division.pieces[name], own, strict=True):
                    if piece.grad is not None:
                        each.of(self._tensors[name]).copy_(piece)
                        piece.grad = None

    def give_back(self) -> None:
        owners = {id(own[0]): name for name, own in self._held.items()}
        others = {id(piece) for own in self._held.values() for piece in own[1:]}
        for group in self._optimizer.param_groups:
            kept = [(number, each) for number, each in enumerate(group["params"]) if id(each) not in others]
            if "param_names" in group:
                labels = group["param_names"]
                group["param_names"] = [owners.get(id(each), labels[number]) for number, each in kept]
            group["params"][:] = [self._tensors.get(owners.get(id(each), ""), each) for _, each in kept]
        for name, own in self._held.items():
            self._join_state(name, own)
        self._held = {}

    def _divide_state(self, parameter: nn.Parameter, parts: tuple[PieceOfBlock, ...], own: list[nn.Parameter]) -> None:
        if parameter not in self._optimizer.state:
            return
        state = self._optimizer.state[parameter]
        for key, held in state.items():
            if isinstance(held, Tensor) and held.shape != parameter.shape and held.numel() != 1:
                raise RoutingUnsupported(
                    f"the optimizer's {key!r} has shape {tuple(held.shape)}, its tensor {tuple(parameter.shape)}: it"
                    " cannot be divided by head; begin with an optimizer that took no step"
                )
        del self._optimizer.state[parameter]
        for each, piece in zip(parts, own, strict=True):
            self._optimizer.state[piece] = {
                key: (each.of(held) if held.shape == parameter.shape else held).clone(
                    memory_format=torch.contiguous_format
                )
                if isinstance(held, Tensor)
                else held
                for key, held in state.items()
            }

    def _join_state(self, name: str, own: list[nn.Parameter]) -> None:
        tensor, parts = self._tensors[name], self._division.pieces[name]
        states = [self._optimizer.state.pop(piece, {}) for piece in own]
        joined: dict[str, Any] = {}
        for key in dict.fromkeys(key for state in states for key in state):
            held = [
                (each, piece, state[key]) for each, piece, state in zip(parts, own, states, strict=True) if key in state
            ]
            if all(isinstance(value, Tensor) and value.shape == piece.shape for _, piece, value in held):
                joined[key] = torch.zeros_like(tensor, dtype=held[0][2].dtype, requires_grad=False)
                for each, _, value in held:
                    each.of(joined[key]).copy_(value)
            elif all(not isinstance(value, Tensor) or value.numel() == 1 for _, _, value in held):
                values = [value for _, _, value in held if value is not None]
                joined[key] = max(values, key=float) if values else None
            else:
                return
        if joined:
            self._optimizer.state[tensor] = joined


def _shared(
    parameters: Mapping[str, nn.Parameter],
    block_of_entry: Mapping[str, int],
    pieces: Mapping[str, tuple[PieceOfBlock, ...]],
) -> Iterator[tuple[str, SharedByHeads]]:
    """Of each pair of LoRA's matrices of which one is divided, the other, unless it is frozen."""
    for name, parts in pieces.items():
        for here, there, dimension in ((OUTER, INNER, 0), (INNER, OUTER, 1)):
            if here not in name or not name.endswith(".weight"):
                continue
            other = there.join(name.rsplit(here, 1))
            if parts[0].piece.dimension != dimension or other not in block_of_entry:
                raise RoutingUnsupported(
                    f"LoRA's matrix {name!r} is divided along dimension {parts[0].piece.dimension}, and the other one"
                    f" {other!r} is to be whole: expected {OUTER[1:-1]} by outputs, or {INNER[1:-1]} by inputs"
                )
            blocks = tuple(sorted({each.block for each in parts}))
            if parameters[other].requires_grad:
                yield other, SharedByHeads(other, name, dimension == 0, block_of_entry[other], blocks)
