"""Per-example depth profiles, enforced on parameter gradients in one backward pass.

A *depth profile* gives each parameter block an integer weight from 0 to 1000 permille. With example i's
weight ``w_ib`` for block b, its gradient ``g_ib`` and the committed number of presented examples c, one
backward pass leaves in block b

    grad_b = sum_i (w_ib / 1000) * g_ib / c

and nothing else. What the policy blocks never enters the sum:

* **The forward pass and the gradients of activations are untouched.** A weight limits what an example
  writes into a block, not what flows through it to blocks below. Zero means "no direct update".
* **Blocked rows are left out, not multiplied by zero**, because 0 times infinity is not 0. Which rows enter
  a product depends on weights alone, so that replacing a blocked example leaves every bit as it was.
* **c is fixed in advance** (``routed_loss``). A mean over admitted examples, or over unmasked tokens, would
  let the number or length of blocked examples scale everyone's gradient. Examples with zero weight for every
  block may be left out of the batch altogether: c still counts them, the gradient stays the same.
* **A block that no example of a step may move has no gradient at all** (``None``). AdamW moves a parameter
  with a zero gradient, by its momentum and by weight decay; it skips one without.
* **Clipping is per block** (``clipping.py``). A global norm lets a blocked example's other blocks
  shrink the update of this one.
* **Default deny.** Trainable parameters may be owned only by the module types of ``routed_modules.census``,
  called with the examples along dimension 0. Anything else is refused by name, before the first step:
  parameters held by other modules, shared batch statistics, forwards that somebody else replaced. What a census
  cannot see (``functional.linear(x, layer.weight)``, a loss that couples examples) ``probe.py`` finds on a real batch.
* **Packed examples** (``packing.py``) are told apart by position instead of by row.
* **An embedding called with one row of indexes** (position ids ``[1, T]``) looks them up for each example of the
  micro-batch: the same values, in a shape whose gradient is still told apart by example.
* **A backward pass runs under the weights of its forward pass.** Each micro-batch is a token; a gradient that
  arrives under another one raises. Gradient checkpointing recomputes inside the same micro-batch, or raises.

* **A table may divide tensors among the heads of attention** (``pieces.py``, ``headwise.py``): each piece is routed by
  its own block's weights. A piece that no example may move, of a tensor of which another piece is moved, only an
  optimizer leaves alone whose parameters are pieces (``pieces.optimizer_by_pieces``).

Forwards are replaced on module instances inside ``with Routing(...)`` and put back on exit, whatever happens.

* **Several ranks** (``data_parallel.py``) each route their own examples; the sum over them is formed by DDP or FSDP2.

Left to others: which weights a policy allows (``consensus/policy.py``), optimizer and event
(``governed.py``). Not covered here: double backward.

Shape suffixes: B examples, K parameter blocks, N rows (examples times positions), I inputs, O outputs, V
vocabulary. A ``*`` stands for any number of positions between B and the features.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer_client.bypass import around_routes, check_own, one_tensor
from trainer_client.headwise import DividedForwards
from trainer_client.packing import Packing
from trainer_client.pieces import Division, Moved, division_of
from trainer_client.route import FULL_PERMILLE, Route, RoutingError, RoutingLeak, RoutingUnsupported, Weights
from trainer_client.routed_modules import census, routed_forward
from trainer_client.sharding import own_part, sharded_modules
from trainer_client.spans import Observers

__all__ = [
    "MicroBatch",
    "Routing",
    "RoutingError",
    "RoutingLeak",
    "RoutingUnsupported",
    "StepWeights",
]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward and backward pass: a token, compared by identity."""

    weights_KB: tuple[Weights, ...]
    example_count: int
    groups_B: tuple[bytes, ...]
    open_K: tuple[bool, ...]
    packing: Packing | None = None

    @property
    def rows(self) -> int:
        """What inputs have along dimension 0: examples, or rows that examples are packed into."""
        return self.example_count if self.packing is None else self.packing.rows


class GradientObserver(Protocol):
    """Told, inside each backward pass, what every group of examples adds to the gradient of a linear's parameter.

    ``gradient`` is weighted and normalised as in the sum above, and the observer's to keep. A parameter is told of
    once for each use of its module and each group with weight; see ``routed_modules.observed_parameters``. Of a divided
    one pieces are told, under the names of the parameter table's entries.
    """

    def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None: ...


class ProductObserver(Protocol):
    """Told, inside each backward pass, of what the gradient of a linear's weight is the product of.

    ``left`` ``[B, *, P]`` and ``right`` ``[B, *, Q]`` are neither weighted nor the observer's to change; the gradient
    is the sum over rows of ``weights_B / 1000 * left ⊗ right``. See ``GradientObserver`` for which parameters.
    """

    def observe(self, parameter: str, left: Tensor, right: Tensor, weights_B: Weights) -> None: ...


@dataclass(frozen=True, slots=True)
class StepWeights:
    """What was routed between two calls of ``finish_step``: total permille per block, and examples."""

    total_permille_K: tuple[int, ...]
    example_count: int
    micro_batch_count: int


class Routing:
    """Routes the gradients of ``model``'s trainable parameters by per-example weights.

    Args:
        model: its trainable parameters must all appear in ``block_of_parameter``.
        block_of_parameter: name as in ``model.named_parameters()`` (a tied tensor under its first name), or of a piece
            (``consensus/pieces.py``), to the index of its parameter block, from 0 without gaps.
        observer: then every micro-batch names the group of each example.
        product_observer: see its class.

    Raises:
        RoutingUnsupported: a trainable parameter has no block or a module outside the census, names or
            indexes are left over.
    """

    def __init__(
        self,
        model: nn.Module,
        block_of_parameter: Mapping[str, int],
        observer: GradientObserver | None = None,
        product_observer: ProductObserver | None = None,
    ) -> None:
        self._model = model
        self._observer = observer
        self._product_observer = product_observer
        self.division = division_of(model, block_of_parameter)
        self._block_of = _checked_blocks(model, block_of_parameter, self.division)
        self.block_count = max(self._block_of.values()) + 1
        self._shared = tuple(self.division.shared.values())
        # What heads share has weights of its own, behind those of the parameter blocks.
        self._block_of |= {each.tensor: self.block_count + place for place, each in enumerate(self._shared)}
        self.moved = Moved()
        self._modules = census(model)
        observers = Observers(
            None if observer is None else observer.observe,
            None if product_observer is None else product_observer.observe,
        )
        self._divided = DividedForwards(
            model, self.division, self._block_of, self._entered, self._plain_route, observers
        )
        self._active: MicroBatch | None = None
        self._installed = False
        self._reset_step()

    def __enter__(self) -> Self:
        """Replaces the forwards of the census.

        Raises:
            RoutingUnsupported: somebody replaced one since.
        """
        if self._installed:
            raise RoutingError("this Routing is already installed")
        self._modules = census(self._model)
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        forwards = [self._routed_forward(name, module) for name, module in self._modules.items()]
        self._sharded = bool(sharded_modules(self._model))
        self._installed = True
        for module, forward in zip(self._modules.values(), forwards, strict=True):
            module.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._modules.values():
            module.__dict__.pop("forward", None)
        self._active = None
        self._installed = False

    @contextmanager
    def micro_batch(
        self,
        weights_permille_BK: Sequence[Sequence[int]],
        groups_B: Sequence[bytes] = (),
        weights_of_step: Collection[Sequence[int]] = (),
        packing: Packing | None = None,
    ) -> Iterator[MicroBatch]:
        """Weights for the forward *and* backward pass of one micro-batch: a row per example.

        ``groups_B`` names each example's group, for the observer; neighbours of one group cost least.
        ``weights_of_step`` are the rows that examples of any rank have in this step, where there are several ranks: a
        parameter block that only others' may move gets zeros here, since every rank must bring the gradients that one
        brings.
        ``packing``: examples are not rows, they have spans of positions (``packing.py``).

        Raises:
            RoutingError: outside ``with routing``, inside another micro-batch, not B rows of K
                integers from 0 to 1000, weight in a block that no row of the step has, or an observer and not B groups.
        """
        if not self._installed or self._active is not None:
            raise RoutingError("a micro-batch runs inside 'with routing' and outside any other micro-batch")
        if self._observer is not None and len(groups_B) != len(weights_permille_BK):
            raise RoutingError(f"expected a group for each of {len(weights_permille_BK)} examples for the observer")
        columns_KB = self._with_shared(_columns(weights_permille_BK, self.block_count))
        opened_K = tuple(any(weights_B) for weights_B in columns_KB)
        if weights_of_step:
            of_step_KC = self._with_shared(_columns(tuple(weights_of_step), self.block_count))
            opened_K = tuple(any(weights_C) for weights_C in of_step_KC)
        for block, weights_B in enumerate(columns_KB):
            if any(weights_B) and not opened_K[block]:
                raise RoutingError(f"parameter block {block} is said to be closed and an example has weight in it")
        if packing is not None and len(packing.spans_B) != len(weights_permille_BK):
            raise RoutingError(f"{len(packing.spans_B)} packed examples, and weights of {len(weights_permille_BK)}")
        self._check_trained()
        token = MicroBatch(columns_KB, len(weights_permille_BK), tuple(groups_B), opened_K, packing)
        self._active = token
        try:
            yield token
            self._divided.finish()
            for block, weights_B in enumerate(token.weights_KB):
                self._total_permille_K[block] += sum(weights_B)
                self._open_K[block] |= token.open_K[block]
            self._example_count += token.example_count
            self._micro_batch_count += 1
        finally:
            self._active = None

    def routed_loss(self, loss_B: Tensor, presented_count: int) -> Tensor:
        """The scalar to call ``backward`` on: the sum of ``loss_B`` over ``presented_count`` (c).

        ``loss_B`` has one loss per example of this micro-batch, each normalised by constants alone (the
        mean over a fixed number of tokens). ``presented_count`` is the same for every micro-batch of a step.

        Raises:
            RoutingError: outside a micro-batch, of another length, or of no trainable parameter.
            RoutingLeak: it depends on a trainable parameter in another way than by its module's forward.
        """
        token = self._active
        if not isinstance(loss_B, Tensor):
            raise RoutingError(f"expected a tensor of one loss per example, found {type(loss_B).__name__}")
        if token is None or loss_B.shape != (token.example_count,):
            raise RoutingError(f"expected one loss per example of the micro-batch, found {tuple(loss_B.shape)}")
        if presented_count < 1:
            raise RoutingError(f"expected a positive number of presented examples, found {presented_count}")
        if not loss_B.requires_grad:
            raise RoutingError("the loss has no gradient: no trainable parameter was used to compute it")
        self._check_reached(loss_B)
        checked_B: Tensor = _TokenCheck.apply(loss_B, partial(self.check_token, token))  # type: ignore[no-untyped-call]
        return checked_B.sum() / presented_count

    def finish_step(self) -> StepWeights:
        """Ends a step, before ``optimizer.step()``: blocks that no example may move are left without gradient.

        Raises:
            RoutingLeak: such a block holds a gradient that is not zero.
        """
        totals_K = tuple(self._total_permille_K[: self.block_count])
        finished = StepWeights(totals_K, self._example_count, self._micro_batch_count)
        open_K = tuple(self._open_K)
        self._reset_step()
        self.moved.blocks = frozenset(block for block, is_open in enumerate(open_K) if is_open)
        for name, parameter in self._model.named_parameters():
            gradient = parameter.grad
            if gradient is None or (name not in self._block_of and name not in self.division.pieces):
                continue
            closed = self._closed_parts(name, own_part(gradient))
            for part, block in closed:
                if part.count_nonzero().item():
                    raise RoutingLeak(f"parameter {name!r} of blocked parameter block {block} has a gradient")
            if len(closed) == len(self.division.pieces.get(name, (name,))):
                parameter.grad = None
        return finished

    def _closed_parts(self, name: str, gradient: Tensor) -> list[tuple[Tensor, int]]:
        """Those of a gradient's pieces that no example of the step may move, and their parameter blocks."""
        pieces = self.division.pieces.get(name)
        if pieces is None:
            block = self._block_of[name]
            return [] if block in self.moved.blocks else [(gradient, block)]
        return [(each.of(gradient), each.block) for each in pieces if each.block not in self.moved.blocks]

    def check_token(self, token: MicroBatch) -> None:
        """Raises ``RoutingLeak`` unless ``token`` is the micro-batch now running."""
        if self._active is not token:
            raise RoutingLeak("a backward pass outside the micro-batch of its forward pass")

    def _check_trained(self) -> None:
        """Nothing was made trainable, or put in a trainable parameter's place, since forwards were replaced."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                held = self._trained.get(name)
                if held is None or (held is not parameter and not self._sharded):
                    raise RoutingUnsupported(
                        f"parameter {name!r} was made trainable, or put there, after forwards were replaced"
                    )

    def _check_reached(self, loss_B: Tensor) -> None:
        leaves = around_routes(loss_B)
        reached = {self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names}
        if self._sharded:  # ranks compute with what they gathered
            reached |= {f"one of shape {tuple(leaf.shape)}" for leaf in leaves if isinstance(leaf, nn.Parameter)}
        if reached:
            raise RoutingLeak(f"the loss depends on parameters around their modules' forwards: {sorted(reached)}")

    def _reset_step(self) -> None:
        count = self.block_count + len(self._shared)
        self._total_permille_K = [0] * count
        self._open_K = [False] * count
        self._example_count = 0
        self._micro_batch_count = 0

    def _with_shared(self, weights_KB: tuple[Weights, ...]) -> tuple[Weights, ...]:
        return (*weights_KB, *(each.weights(weights_KB) for each in self._shared))

    def _entered(self, module_name: str, module: nn.Module, input: Tensor) -> Tensor:
        """A call's input, once it is seen to have examples first."""
        token = self._active
        if token is None:
            raise RoutingError(f"module {module_name!r} ran with gradients outside a micro-batch")
        if input.dim() >= 2 and input.shape[0] == 1 and isinstance(module, nn.Embedding):
            input = input.expand(token.rows, *input.shape[1:])
        packing = token.packing
        rows_first = input.dim() >= 2 and input.shape[0] == token.rows
        if not rows_first or (packing is not None and input.shape[1] != packing.row_positions):
            expected = f"{token.rows} examples along dimension 0 and at least 2 dimensions"
            if packing is not None:
                expected = f"{packing.rows} rows of {packing.row_positions} positions first"
            raise RoutingUnsupported(f"module {module_name!r} expects {expected}, found shape {tuple(input.shape)}")
        return input

    def _plain_route(self, block: int) -> Route:
        """The route of a parameter block in the micro-batch now running, observed by nobody."""
        token = self._active
        assert token is not None
        packing = token.packing
        return Route(
            token.weights_KB[block],
            partial(self.check_token, token),
            token.groups_B,
            open_elsewhere=token.open_K[block],
            spans_B=() if packing is None else packing.spans_B,
            is_full=packing is None or packing.is_full,
        )

    def _routed_forward(self, module_name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The replacement for ``module.forward``: routed where gradients are recorded, else the original."""
        divided = self._divided.of(module_name, module)
        if divided is not None:
            return self._replacement(module_name, module, divided)
        routed = routed_forward(module)
        assert routed is not None, "the census holds no other"
        blocks = {
            self._block_of[self._names[id(parameter)]]
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        }
        if len(blocks) != 1:
            raise RoutingUnsupported(f"module {module_name!r} is split between parameter blocks {sorted(blocks)}")
        block = blocks.pop()
        observer = self._observer
        names = {own: self._names[id(parameter)] for own, parameter in module.named_parameters(recurse=False)}

        def observe(own_name: str, group: bytes, gradient: Tensor) -> None:
            assert observer is not None
            observer.observe(names[own_name], group, gradient)

        def observe_product(own_name: str, left: Tensor, right: Tensor, weights_B: Weights) -> None:
            assert self._product_observer is not None
            self._product_observer.observe(names[own_name], left, right, weights_B)

        def forward(input: Tensor) -> Tensor:
            input = self._entered(module_name, module, input)
            route = self._plain_route(block)
            if observer is not None or self._product_observer is not None:
                observed_product = None if self._product_observer is None else observe_product
                route = replace(route, observe=None if observer is None else observe, observe_product=observed_product)
            return routed(module, input, route)

        return self._replacement(module_name, module, forward)

    def _replacement(
        self, module_name: str, module: nn.Module, routed: Callable[[Tensor], Tensor]
    ) -> Callable[..., Tensor]:
        """The module's own forward where no gradients are recorded; else ``routed``, of one tensor."""
        original, held = module.forward, dict(module._parameters)

        def forward(*positional: object, **named: object) -> Tensor:
            if not torch.is_grad_enabled():
                return original(*positional, **named)  # type: ignore[no-any-return]
            if not self._sharded:
                check_own(module_name, module, held)
            return routed(one_tensor(module_name, (*positional, *named.values())))

        return _uncompiled(forward)


def _uncompiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled model calls it between compiled pieces: weights change with every micro-batch, code must not."""
    return torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward  # type: ignore[no-untyped-call]


class _TokenCheck(torch.autograd.Function):
    """The identity; its backward, the first of a pass, checks the micro-batch."""

    @staticmethod
    def forward(ctx, loss_B, check_token):  # type: ignore[no-untyped-def]
        ctx.check_token = check_token
        return loss_B.view_as(loss_B)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta_B):  # type: ignore[no-untyped-def]
        ctx.check_token()
        return delta_B, None


def _checked_blocks(model: nn.Module, block_of_parameter: Mapping[str, int], division: Division) -> dict[str, int]:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable -= division.pieces.keys()
    known = {name for name, _ in model.named_parameters()} - division.pieces.keys()
    known |= {each.piece.name for pieces in division.pieces.values() for each in pieces}
    if not trainable and not division.pieces:
        raise RoutingUnsupported("the model has no trainable parameter")
    without, unknown = trainable - block_of_parameter.keys(), block_of_parameter.keys() - known
    if without or unknown:
        raise RoutingUnsupported(f"parameters without block: {sorted(without)}; unknown: {sorted(unknown)}")
    found = sorted(set(block_of_parameter.values()))
    if found != list(range(len(found))):
        raise RoutingUnsupported(f"expected block indexes 0 to {len(found) - 1}, found {found}")
    return dict(block_of_parameter)


def _columns(weights_permille_BK: Sequence[Sequence[int]], block_count: int) -> tuple[Weights, ...]:
    """The rows per example as one tuple per block, checked."""
    if not weights_permille_BK:
        raise RoutingError("a micro-batch needs at least one example")
    for example, row_K in enumerate(weights_permille_BK):
        if len(row_K) != block_count:
            raise RoutingError(f"example {example}: expected {block_count} weights, found {len(row_K)}")
        for weight in row_K:
            if type(weight) is not int or not 0 <= weight <= FULL_PERMILLE:
                raise RoutingError(f"example {example}: expected integers from 0 to 1000, found {weight!r}")
    return tuple(zip(*weights_permille_BK, strict=True))
