"""An output as a question: how sure the model is of chosen tokens, and the direction that would change it.

The measure is the sum over tokens of ``log p / (1 − p)``, the log-odds, not the loss: where a model is sure of an
output the gradient of its loss vanishes, though that output is exactly what was learned (Park et al., *TRAK*, arXiv
2303.14186, §3).

Shape suffixes: B outputs, T tokens, I and O inputs and outputs of a linear, P and Q dimensions of its weight, V
vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attribution.weights import FOREIGN_FAULTS, LinearWeight, linear_weights
from consensus.rejection import ConfigError, Reason, Rejected

LEAST_CHANCE = 1e-6
"""Chances are kept this far from 0 and 1, where log-odds have no gradient in float32."""
OUTPUTS_AT_ONCE = 16
"""So many outputs go through the model together."""
SAME_ALONE = 1e-3
"""How far an output's gradient may be from what it is when the output is alone, relative to its norm."""


@dataclass(frozen=True, slots=True)
class Output:
    """Tokens, of which those from ``first`` up to, not with, ``end`` are asked about; ``first`` is at least 1."""

    tokens: tuple[int, ...]
    first: int
    end: int

    def __post_init__(self) -> None:
        if not 1 <= self.first < self.end <= len(self.tokens):
            raise Rejected(
                Reason.BAD_FIELD,
                f"expected a span of at least one token after the first, found {self.first}:{self.end} of "
                f"{len(self.tokens)}",
            )


def logits_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` for the token after each, of a model that returns them or an output that holds them.

    Raises:
        ConfigError: the model does not take these tokens, as where its context is shorter or its vocabulary another, or
            returns something else.
    """
    highest = int(tokens_BT.max())
    given = f"tokens {list(tokens_BT.shape)}, the highest of them {highest}"
    try:
        found = model(tokens_BT, use_cache=False) if hasattr(model, "generation_config") else model(tokens_BT)
    except FOREIGN_FAULTS as error:
        raise ConfigError(
            f"the model does not take {given}: {type(error).__name__}: {error}; is its context shorter (--context), or "
            "its tokenizer another (--tokenizer)?"
        ) from error
    logits_BTV = found if isinstance(found, Tensor) else getattr(found, "logits", None)
    if not isinstance(logits_BTV, Tensor) or logits_BTV.shape[:-1] != tokens_BT.shape:
        what = list(logits_BTV.shape) if isinstance(logits_BTV, Tensor) else type(found).__name__
        raise ConfigError(f"the model: expected logits [B, T, V] of {given}; found {what}")
    if logits_BTV.shape[-1] <= highest:
        raise ConfigError(
            f"the model tells {logits_BTV.shape[-1]} tokens apart, and was given {given}: is its tokenizer another "
            "(--tokenizer)?"
        )
    return logits_BTV


def log_chances(model: nn.Module, output: Output) -> Tensor:
    """Log of the chance ``[N]`` of each token asked about, given all before it."""
    return _log_chances(model, [output])[0]


@torch.no_grad()
def log_chance(model: nn.Module, output: Output) -> float:
    """Mean log of the chance of a token asked about."""
    return log_chances(model, output).mean().item()


@torch.no_grad()
def log_odds(model: nn.Module, output: Output) -> float:
    """Mean log-odds of a token asked about."""
    return _log_odds(model, [output]).item() / (output.end - output.first)


def log_odds_gradients(model: nn.Module, output: Output) -> dict[str, Tensor]:
    """Gradient of the output's summed log-odds with respect to every linear weight, in the weight's shape.

    Raises:
        Rejected: ``BAD_FIELD`` when it is not finite.
    """
    weights = {name: held.weight for name, held in linear_weights(model).items()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(_log_odds(model, [output]), list(weights.values()))
    found = {name: gradient.detach().float() for name, gradient in zip(weights, gradients, strict=True)}
    _check_finite(found.values())
    return found


@dataclass(frozen=True, slots=True)
class WeightGradients:
    """Outputs' gradients for one weight: products of what stood on its two sides, token by token.

    A product has as many numbers as the weight, its sides as many as tokens ask for: for short outputs of a large model
    a hundredth.
    """

    left_BTP: Tensor
    right_BTQ: Tensor

    def whole(self) -> Tensor:
        """``[B, P, Q]``."""
        return self.left_BTP.mT @ self.right_BTQ


def gradients_together(model: nn.Module, outputs: Sequence[Output]) -> dict[str, WeightGradients]:
    """``log_odds_gradients`` of outputs of one span by one pass through the model.

    The last output's are compared with what they are alone. Where they differ, a weight is used without its module or
    the model mixes what stands in one batch: then each output goes through it alone.

    Raises:
        Rejected: as ``log_odds_gradients``.
    """
    alone = log_odds_gradients(model, outputs[-1])
    together = _by_operands(model, outputs) if len(outputs) > 1 else None
    if together is not None and all(_same(together[name], gradient) for name, gradient in alone.items()):
        _check_finite(side for held in together.values() for side in (held.left_BTP, held.right_BTQ))
        return together
    each = [*(log_odds_gradients(model, output) for output in outputs[:-1]), alone]
    return {
        name: WeightGradients(
            torch.eye(len(gradient)).expand(len(outputs), -1, -1), torch.stack([gradients[name] for gradients in each])
        )
        for name, gradient in alone.items()
    }


@dataclass(slots=True)
class Captured:
    """What went through a linear in one pass: of each use the inputs and, once it is there, the outputs' gradient."""

    inputs: list[Tensor] = field(default_factory=list)
    deltas: dict[int, Tensor] = field(default_factory=dict)

    def operands(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Inputs ``[B, T, I]`` and outputs' gradients ``[B, T, O]``, uses one after the other; None without any.

        The gradient of one of a batch for the weight is the product of its two.
        """
        uses = [(self.inputs[number], delta) for number, delta in sorted(self.deltas.items())]
        if not uses or any(len(x) % batch or x.shape[:-1] != delta.shape[:-1] for x, delta in uses):
            return None
        inputs, deltas = (
            torch.cat([held.reshape(batch, -1, held.shape[-1]) for held in side], dim=1)
            for side in zip(*uses, strict=True)
        )
        return inputs, deltas


@contextmanager
def capturing(weights: Mapping[str, LinearWeight]) -> Iterator[dict[str, Captured]]:
    """What goes through these linears while the block runs."""
    captured = {name: Captured() for name in weights}
    handles = []

    def hook(held: Captured) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not arguments or not output.requires_grad:
                return
            number = len(held.inputs)
            held.inputs.append(arguments[0].detach())
            output.register_hook(lambda delta: held.deltas.update({number: delta.detach()}))  # type: ignore[no-untyped-call]

        return keep

    try:
        for name, weight in weights.items():
            handles.append(weight.module.register_forward_hook(hook(captured[name])))
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def greedy_completion(model: nn.Module, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The ``count`` most likely next tokens, one after the other."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits_V = logits_of(model, torch.tensor([tokens], dtype=torch.int64))[0, -1]
            tokens.append(int(logits_V.argmax()))
    return tuple(tokens[len(prompt) :])


def _log_chances(model: nn.Module, outputs: Sequence[Output]) -> Tensor:
    """``[B, N]``, of outputs of one span."""
    first, end = outputs[0].first, outputs[0].end
    tokens_BT = torch.tensor([output.tokens for output in outputs], dtype=torch.int64)
    logits_BTV = logits_of(model, tokens_BT[:, :-1]).float()
    chosen_BN = tokens_BT[:, first:end]
    chances_BNV: Tensor = logits_BTV.log_softmax(dim=-1)[:, first - 1 : end - 1]
    return chances_BNV.gather(2, chosen_BN[:, :, None]).squeeze(2)


def _log_odds(model: nn.Module, outputs: Sequence[Output]) -> Tensor:
    log_p_BN = _log_chances(model, outputs).clamp(max=-LEAST_CHANCE)
    return (log_p_BN - torch.log1p(-log_p_BN.exp())).sum()


def _by_operands(model: nn.Module, outputs: Sequence[Output]) -> dict[str, WeightGradients] | None:
    """Each output's gradients; None where a linear does not tell."""
    weights = linear_weights(model)
    with capturing(weights) as captured, torch.enable_grad():
        torch.autograd.grad(_log_odds(model, outputs), [held.weight for held in weights.values()])
    gradients = {}
    for name, held in weights.items():
        operands = captured[name].operands(len(outputs))
        if operands is None:
            return None
        x_BTI, delta_BTO = operands
        left, right = (x_BTI, delta_BTO) if held.turned else (delta_BTO, x_BTI)
        gradients[name] = WeightGradients(left.float(), right.float())
    return gradients


def _same(found: WeightGradients, expected: Tensor) -> bool:
    """Whether the last output's is what it is alone."""
    last = found.left_BTP[-1].mT @ found.right_BTQ[-1]
    return bool((last - expected).norm() <= SAME_ALONE * expected.norm())


def _check_finite(tensors: Iterable[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise Rejected(Reason.BAD_FIELD, "the output's log-odds have no finite gradient")
