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
* **Clipping is per block** (``clip_block_gradients``). A global norm lets a blocked example's other blocks
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

Forwards are replaced on module instances inside ``with Routing(...)`` and put back on exit, whatever happens.

* **Several ranks** (``data_parallel.py``) each route their own examples; the sum over them is formed by DDP or FSDP2.

Left to others: which weights a policy allows (``consensus/policy.py``), optimizer and event
(``governed.py``). Not covered here: double backward.

Shape suffixes: B examples, K parameter blocks, N rows (examples times positions), I inputs, O outputs, V
vocabulary. A ``*`` stands for any number of positions between B and the features.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer_client.packing import Packing
from trainer_client.route import FULL_PERMILLE, Route, RoutingError, RoutingLeak, RoutingUnsupported, Weights
from trainer_client.routed_modules import census, routed_forward
from trainer_client.sharding import own_part, whole

__all__ = [
    "MicroBatch",
    "Routing",
    "RoutingError",
    "RoutingLeak",
    "RoutingUnsupported",
    "StepWeights",
    "clip_block_gradients",
]


CLIP_EPSILON = 1e-6
"""Added to a norm before dividing by it, as in ``torch.nn.utils.clip_grad_norm_``."""


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
    once for each use of its module and each group with weight; see ``routed_modules.observed_parameters``.
    """

    def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None: ...


class ProductObserver(Protocol):
    """Told, inside each backward pass, of what the gradient of a linear's weight is the product of.

    ``left`` ``[B, *, P]`` and ``right`` ``[B, *, Q]`` are neither weighted nor the observer's to change; the gradient
    is the sum over rows of ``weights_B / 1000 * left ⊗ right``. See ``routed_modules.observed_parameters``.
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
        block_of_parameter: name as in ``model.named_parameters()`` (a tied tensor under its first name)
            to the index of its parameter block, from 0 without gaps.
        observer: then every micro-batch names the group of each example.
        product_observer: see its class.

    Raises:
        RoutingUnsupported: a trainable parameter has no block or a module outside the census, or names or
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
        self._block_of = _checked_blocks(model, block_of_parameter)
        self.block_count = max(self._block_of.values()) + 1
        self._modules = census(model)
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
        forwards = [self._routed_forward(name, module) for name, module in self._modules.items()]
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
        open_K: Sequence[bool] = (),
        packing: Packing | None = None,
    ) -> Iterator[MicroBatch]:
        """Weights for the forward *and* backward pass of one micro-batch: a row per example.

        ``groups_B`` names each example's group, for the observer; neighbours of one group cost least. ``open_K`` says
        which parameter blocks an example of any rank may move in this step, where there are several ranks: a block
        that only others' may move gets zeros here, since every rank must bring the gradients that one brings.
        ``packing``: examples are not rows, they have spans of positions (``packing.py``).

        Raises:
            RoutingError: outside ``with routing``, inside another micro-batch, not B rows of K
                integers from 0 to 1000, weight in a block that is not open, or an observer and not B groups.
        """
        if not self._installed or self._active is not None:
            raise RoutingError("a micro-batch runs inside 'with routing' and outside any other micro-batch")
        if self._observer is not None and len(groups_B) != len(weights_permille_BK):
            raise RoutingError(f"expected a group for each of {len(weights_permille_BK)} examples for the observer")
        columns_KB = _columns(weights_permille_BK, self.block_count)
        opened_K = tuple(open_K) or tuple(any(weights_B) for weights_B in columns_KB)
        for block, weights_B in enumerate(columns_KB):
            if any(weights_B) and not opened_K[block]:
                raise RoutingError(f"parameter block {block} is said to be closed and an example has weight in it")
        if packing is not None and len(packing.spans_B) != len(weights_permille_BK):
            raise RoutingError(f"{len(packing.spans_B)} packed examples, and weights of {len(weights_permille_BK)}")
        token = MicroBatch(columns_KB, len(weights_permille_BK), tuple(groups_B), opened_K, packing)
        self._active = token
        try:
            yield token
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
            RoutingError: outside a micro-batch or of another length.
        """
        token = self._active
        if token is None or loss_B.shape != (token.example_count,):
            raise RoutingError(f"expected one loss per example of the micro-batch, found {tuple(loss_B.shape)}")
        if presented_count < 1:
            raise RoutingError(f"expected a positive number of presented examples, found {presented_count}")
        checked_B: Tensor = _TokenCheck.apply(loss_B, partial(self.check_token, token))  # type: ignore[no-untyped-call]
        return checked_B.sum() / presented_count

    def finish_step(self) -> StepWeights:
        """Ends a step, before ``optimizer.step()``: blocks that no example may move are left without gradient.

        Raises:
            RoutingLeak: such a block holds a gradient that is not zero.
        """
        finished = StepWeights(tuple(self._total_permille_K), self._example_count, self._micro_batch_count)
        open_K = tuple(self._open_K)
        self._reset_step()
        for name, parameter in self._model.named_parameters():
            block = self._block_of.get(name)
            if block is None or open_K[block] or parameter.grad is None:
                continue
            if own_part(parameter.grad).count_nonzero().item():
                raise RoutingLeak(f"parameter {name!r} of blocked parameter block {block} has a gradient")
            parameter.grad = None
        return finished

    def check_token(self, token: MicroBatch) -> None:
        """Raises ``RoutingLeak`` unless ``token`` is the micro-batch now running."""
        if self._active is not token:
            raise RoutingLeak("a backward pass outside the micro-batch of its forward pass")

    def _reset_step(self) -> None:
        self._total_permille_K = [0] * self.block_count
        self._open_K = [False] * self.block_count
        self._example_count = 0
        self._micro_batch_count = 0

    def _routed_forward(self, module_name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The replacement for ``module.forward``: routed where gradients are recorded, else the original."""
        original = module.forward
        routed = routed_forward(module)
        assert routed is not None, "the census holds no other"
        name_of = {id(parameter): name for name, parameter in self._model.named_parameters()}
        blocks = {
            self._block_of[name_of[id(parameter)]]
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        }
        if len(blocks) != 1:
            raise RoutingUnsupported(f"module {module_name!r} is split between parameter blocks {sorted(blocks)}")
        block = blocks.pop()
        observer = self._observer
        names = {own: name_of[id(parameter)] for own, parameter in module.named_parameters(recurse=False)}

        def observe(own_name: str, group: bytes, gradient: Tensor) -> None:
            assert observer is not None
            observer.observe(names[own_name], group, gradient)

        def observe_product(own_name: str, left: Tensor, right: Tensor, weights_B: Weights) -> None:
            assert self._product_observer is not None
            self._product_observer.observe(names[own_name], left, right, weights_B)

        def forward(input: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return original(input)  # type: ignore[no-any-return]
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
            route = Route(
                token.weights_KB[block],
                partial(self.check_token, token),
                token.groups_B,
                None if observer is None else observe,
                None if self._product_observer is None else observe_product,
                token.open_K[block],
                () if packing is None else packing.spans_B,
                packing is None or packing.is_full,
            )
            return routed(module, input, route)

        # A compiled model calls it between compiled pieces: weights change with every micro-batch, code must not.
        return torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward  # type: ignore[no-untyped-call]


def clip_factor(norm: float, maximum_norm: float) -> float:
    """By how much a gradient of that norm is scaled."""
    return min(1.0, maximum_norm / (norm + CLIP_EPSILON))


def clip_block_gradients(
    model: nn.Module, block_of_parameter: Mapping[str, int], maximum_norm: float
) -> tuple[float | None, ...]:
    """Scales each parameter block's gradient to an L2 norm of at most ``maximum_norm``, each on its own.

    Returns:
        The norm of each block before clipping; ``None`` for a block without gradient.

    Raises:
        RoutingError: a norm is not finite (an admitted example overflowed; blocked ones cannot).
    """
    gradients_K: list[list[Tensor]] = [[] for _ in range(max(block_of_parameter.values()) + 1)]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients_K[block_of_parameter[name]].append(parameter.grad)
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


def _checked_blocks(model: nn.Module, block_of_parameter: Mapping[str, int]) -> dict[str, int]:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    known = {name for name, _ in model.named_parameters()}
    if not trainable:
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
