"""The probe: shows on the real model, loss and examples, before the first step, that nothing bypasses the routing.

The census of ``routed_modules.py`` sees modules, not what is done with their parameters elsewhere
(``functional.linear(x, layer.weight)``), nor what couples examples (a loss normalised over the batch, an operation
across dimension 0). So a real batch is tried:

1. With every weight zero no parameter has a gradient.
2. A batch with one example less runs too: no module takes another dimension for that of examples.
3. With example 0 blocked and the others at uneven weights, replacing it changes no bit of any gradient or buffer (where
   examples are packed and the replacement has another length, nothing but rounding).
4. The gradient is the sum of what each example gives alone, but for rounding: no loss is divided by the number of
   examples or by what they have in common, no module takes them in another order. Tried without dropout, and not where
   the loss draws random numbers even so.
5. Where heads of attention are parameter blocks: the rows and columns that are said to be a head's are
   (``heads.check_layouts``), and with example 0 blocked in every other head, replacing it changes no bit of those.

What a probe shows it shows of this batch. Whoever computes something else later is found by the log's other checks
or not at all.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from trainer_client.evaluating import evaluating
from trainer_client.heads import check_layouts
from trainer_client.packing import taken_apart
from trainer_client.pieces import Division
from trainer_client.random_states import random_states, set_random_states
from trainer_client.route import FULL_PERMILLE, RoutingError, RoutingLeak
from trainer_client.routing import Routing
from trainer_client.sharding import own_part

Inputs = TypeVar("Inputs")

PACKED_TOLERANCE = 1e-4
"""Of the norm; what another example's content does to a gradient that it reaches is thousands of times as much."""
APART_PERMILLE = (1_000, 0, 600, 250)
"""Weights of neighbouring examples, far enough apart that one example's gradient by another's weight is seen."""
ALONE_TOLERANCE = 0.1
"""Of the norm of the whole gradient, for any dtype; a loss divided by the number of four examples is off by 0.75."""


@dataclass(frozen=True, slots=True)
class ProbeInputs(Generic[Inputs]):
    """Inputs of ``count`` examples, of all but the first, with another in the first's place, and of each alone."""

    count: int
    whole: Inputs
    shorter: Inputs
    replaced: Inputs
    alone: Sequence[Inputs]


def tensor_inputs(examples: Tensor, replacement: Tensor) -> ProbeInputs[Tensor]:
    """From ``[B, …]`` examples, and one unlike ``examples[0]`` without the batch dimension."""
    replaced = examples.clone()
    replaced[0] = replacement
    return ProbeInputs(len(examples), examples, examples[1:], replaced, [each[None] for each in examples])


def probe(
    model: nn.Module,
    block_of_parameter: Mapping[str, int],
    loss_of_inputs: Callable[[nn.Module, Inputs], Tensor],
    inputs: ProbeInputs[Inputs],
) -> None:
    """Does what the header says; gradients, buffers and torch's random state are as before afterwards.

    Args:
        block_of_parameter: as ``Routing``.
        loss_of_inputs: model and inputs, as ``collate`` returns them, to a loss per example ``[B]``.

    Raises:
        RoutingUnsupported: a module is outside the census or is not called with examples first.
        RoutingLeak: one of these does not hold; the message names the parameter or buffer.
        RoutingError: fewer than two examples.
    """
    if inputs.count < 2:
        raise RoutingError(f"the probe needs at least two examples, found {inputs.count}")
    parameters = dict(model.named_parameters())
    gradients_before = {name: parameter.grad for name, parameter in parameters.items()}
    buffers_before = _Buffers(model)
    random_before = random_states()

    def outcome(routing: Routing, shown: Inputs, weights_BK: list[list[int]]) -> dict[str, Tensor]:
        set_random_states(random_before)
        buffers_before.restore()
        for parameter in parameters.values():
            parameter.grad = None
        with routing.micro_batch(weights_BK, packing=taken_apart(shown)[1]):
            routing.routed_loss(loss_of_inputs(model, shown), inputs.count).backward()  # type: ignore[no-untyped-call]
        return {name: own_part(p.grad) for name, p in parameters.items() if p.grad is not None}

    def with_buffers(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers()} | gradients

    together: dict[str, Tensor] = {}
    alone: list[dict[str, Tensor]] = []
    try:
        with Routing(model, block_of_parameter) as routing:
            blocked = [[0] * routing.block_count]
            uneven = [
                [1 + (137 * row + 61 * block) % FULL_PERMILLE for block in range(routing.block_count)]
                for row in range(1, inputs.count)
            ]
            leaked = outcome(routing, inputs.whole, blocked * inputs.count)
            if leaked:
                raise RoutingLeak(f"every weight is zero, yet gradients arrived at {sorted(leaked)}")
            outcome(routing, inputs.shorter, uneven)
            first = with_buffers(outcome(routing, inputs.whole, blocked + uneven))
            second = with_buffers(outcome(routing, inputs.replaced, blocked + uneven))
            pairs: list[tuple[dict[str, Tensor], ...]] = [(first, second)]
            heads = sorted({each.block for pieces in routing.division.pieces.values() for each in pieces})
            for closed in (set(heads[::2]), set(heads[1::2])) if heads else ():
                partly = [[0 if block in closed else 500 for block in range(routing.block_count)]]
                found = [outcome(routing, shown, partly + uneven) for shown in (inputs.whole, inputs.replaced)]
                pairs.append(tuple(_parts_in(routing.division, each, closed) for each in found))
            with _without_dropout(model):
                buffers_before.restore()
                weights_BK = [
                    [APART_PERMILLE[(row + block) % len(APART_PERMILLE)] for block in range(routing.block_count)]
                    for row in range(inputs.count)
                ]
                with routing.micro_batch(weights_BK, packing=taken_apart(inputs.whole)[1]):
                    drawn = [loss_of_inputs(model, inputs.whole).detach() for _ in range(2)]
                if _same_bits(*drawn):  # after other random numbers
                    together = outcome(routing, inputs.whole, weights_BK)
                    alone = [outcome(routing, each, [row]) for each, row in zip(inputs.alone, weights_BK, strict=True)]
        if heads:
            set_random_states(random_before)
            check_layouts(model, lambda: loss_of_inputs(model, inputs.whole))
    finally:
        set_random_states(random_before)
        buffers_before.restore()
        for name, parameter in parameters.items():
            parameter.grad = gradients_before[name]
    # Of another length, the replacement moves others to other positions, where sums are formed in another order.
    exact = taken_apart(inputs.whole)[1] == taken_apart(inputs.replaced)[1]
    same = _same_bits if exact else _same_but_for_rounding
    changed = [
        name
        for one, other in pairs
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not same(one[name], other[name])
    ]
    if changed:
        raise RoutingLeak(f"replacing a blocked example changes: {changed}")
    _check_sum(together, alone)


def _parts_in(division: Division, gradients: Mapping[str, Tensor], blocks: set[int]) -> dict[str, Tensor]:
    """The pieces of divided tensors' gradients that are in these parameter blocks, by the names a table gives them."""
    return {
        each.piece.name: each.of(gradients[name])
        for name, pieces in division.pieces.items()
        for each in pieces
        if each.block in blocks
    }


class _Buffers:
    """A model's buffers as they are now: which there are, and what is in them."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(module, dict(module._buffers)) for module in model.modules()]
        self._saved = {
            id(buffer): buffer.clone() for _, held in self._held for buffer in held.values() if buffer is not None
        }

    def restore(self) -> None:
        for module, held in self._held:
            module._buffers.clear()
            module._buffers.update(held)
            for buffer in held.values():
                if buffer is not None and not _same_bits(buffer, saved := self._saved[id(buffer)]):
                    with torch.no_grad():
                        buffer.copy_(saved)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation, uncompiled; what saves memory by computing twice does so in training alone, and stays in it."""
    with (
        evaluating(model),
        torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
    ):
        for module in model.modules():
            module.training = getattr(module, "gradient_checkpointing", False) is True
        yield


def _check_sum(together: Mapping[str, Tensor], alone: Sequence[Mapping[str, Tensor]]) -> None:
    """The gradient of all examples is the sum of each one's own."""
    off = size = 0.0
    for name in sorted(together.keys() | {name for each in alone for name in each}):
        parts = [each[name].double() for each in (together, *alone) if name in each]
        own = sum(each[name].double() for each in alone if name in each)
        difference = (together[name].double() if name in together else 0.0) - own
        off += float(torch.as_tensor(difference).square().sum())
        size += max(float(part.square().sum()) for part in parts)
    if off > ALONE_TOLERANCE**2 * size:
        raise RoutingLeak(
            f"the gradient is not the sum of what each example gives alone (off by {(off / size) ** 0.5:.0%}): the loss"
            " depends on how many examples there are or on what the others are, or the model puts them in another order"
        )


def _same_but_for_rounding(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    difference = (left.double() - right.double()).norm()
    return bool(difference <= PACKED_TOLERANCE * (left.double().norm() + right.double().norm()))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in every bit, NaN included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    one, other = (each.to_dense() if each.layout is not torch.strided else each for each in (left, right))
    return torch.equal(*(each.reshape(-1).contiguous().view(torch.uint8) for each in (one, other)))
