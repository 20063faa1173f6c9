"""The probe: shows on the real model, loss and examples, before the first step, that nothing bypasses the routing.

The census of ``routed_modules.py`` sees modules, not what is done with their parameters elsewhere
(``functional.linear(x, layer.weight)``), nor what couples examples (a loss normalised over the batch, an operation
across dimension 0). So a real batch is tried:

1. With every weight zero no parameter has a gradient.
2. A batch with one example less runs too: no module takes another dimension for that of examples.
3. With example 0 blocked and the others at uneven weights, replacing it changes no bit of any gradient or buffer (where
   examples are packed and the replacement has another length, nothing but rounding).
4. Where heads of attention are parameter blocks: the rows and columns that are said to be a head's are
   (``heads.check_layouts``), and with example 0 blocked in every other head, replacing it changes no bit of those.

What a probe shows it shows of this batch. Whoever computes something else later is found by the log's other checks
or not at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True, slots=True)
class ProbeInputs(Generic[Inputs]):
    """Inputs of ``count`` examples, of all but the first, and of all with another in the first's place."""

    count: int
    whole: Inputs
    shorter: Inputs
    replaced: Inputs


def tensor_inputs(examples: Tensor, replacement: Tensor) -> ProbeInputs[Tensor]:
    """From ``[B, …]`` examples, and one unlike ``examples[0]`` without the batch dimension."""
    replaced = examples.clone()
    replaced[0] = replacement
    return ProbeInputs(len(examples), examples, examples[1:], replaced)


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
    buffers_before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random_before = random_states()

    def outcome(routing: Routing, shown: Inputs, weights_BK: list[list[int]]) -> dict[str, Tensor]:
        set_random_states(random_before)
        _restore_buffers(model, buffers_before)
        for parameter in parameters.values():
            parameter.grad = None
        with routing.micro_batch(weights_BK, packing=taken_apart(shown)[1]):
            routing.routed_loss(loss_of_inputs(model, shown), inputs.count).backward()  # type: ignore[no-untyped-call]
        found = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return found | {name: own_part(p.grad) for name, p in parameters.items() if p.grad is not None}

    try:
        with Routing(model, block_of_parameter) as routing:
            blocked = [[0] * routing.block_count]
            uneven = [
                [1 + (137 * row + 61 * block) % FULL_PERMILLE for block in range(routing.block_count)]
                for row in range(1, inputs.count)
            ]
            leaked = outcome(routing, inputs.whole, blocked * inputs.count).keys() - buffers_before.keys()
            if leaked:
                raise RoutingLeak(f"every weight is zero, yet gradients arrived at {sorted(leaked)}")
            outcome(routing, inputs.shorter, uneven)
            first = outcome(routing, inputs.whole, blocked + uneven)
            second = outcome(routing, inputs.replaced, blocked + uneven)
            pairs: list[tuple[dict[str, Tensor], ...]] = [(first, second)]
            heads = sorted({each.block for pieces in routing.division.pieces.values() for each in pieces})
            for closed in (set(heads[::2]), set(heads[1::2])) if heads else ():
                partly = [[0 if block in closed else 500 for block in range(routing.block_count)]]
                found = [outcome(routing, shown, partly + uneven) for shown in (inputs.whole, inputs.replaced)]
                pairs.append(tuple(_parts_in(routing.division, each, closed) for each in found))
        if heads:
            set_random_states(random_before)
            check_layouts(model, lambda: loss_of_inputs(model, inputs.whole))
    finally:
        set_random_states(random_before)
        _restore_buffers(model, buffers_before)
        for name, parameter in parameters.items():
            parameter.grad = gradients_before[name]
    # Of another length, the replacement moves others to other positions, where sums are formed in another order.
    exact = taken_apart(inputs.whole)[1] == taken_apart(inputs.replaced)[1]
    same = _same_bits if exact else _same_but_for_rounding
    changed = [name for one, other in pairs for name in sorted(one) if not same(one[name], other[name])]
    if changed:
        raise RoutingLeak(f"replacing a blocked example changes: {changed}")


def _parts_in(division: Division, gradients: Mapping[str, Tensor], blocks: set[int]) -> dict[str, Tensor]:
    """The pieces of divided tensors' gradients that are in these parameter blocks, by the names a table gives them."""
    return {
        each.piece.name: each.of(gradients[name])
        for name, pieces in division.pieces.items()
        for each in pieces
        if each.block in blocks
    }


def _restore_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])


def _same_but_for_rounding(left: Tensor, right: Tensor) -> bool:
    difference = (left.double() - right.double()).norm()
    return bool(difference <= PACKED_TOLERANCE * (left.double().norm() + right.double().norm()))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in every bit, NaN included."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
