"""An output as a question: how sure the model is of chosen tokens, and the direction that would change it.

The measure is the sum over tokens of ``log p / (1 − p)``, the log-odds, not the loss: where a model is sure of an
output the gradient of its loss vanishes, though that output is exactly what was learned (Park et al., *TRAK*, arXiv
2303.14186, §3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attribution.weights import linear_weights
from consensus.rejection import Reason, Rejected

LEAST_CHANCE = 1e-6
"""Chances are kept this far from 0 and 1, where log-odds have no gradient in float32."""


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
    """Logits ``[B, T, V]`` for the token after each, of a model that returns them or an output that holds them."""
    found = model(tokens_BT, use_cache=False) if hasattr(model, "generation_config") else model(tokens_BT)
    logits_BTV: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits_BTV


def log_chances(model: nn.Module, output: Output) -> Tensor:
    """Log of the chance ``[N]`` of each token asked about, given all before it."""
    tokens_T = torch.tensor([output.tokens], dtype=torch.int64)
    logits_TV = logits_of(model, tokens_T[:, :-1])[0].float()
    chosen_N = tokens_T[0, output.first : output.end]
    chances_NV: Tensor = logits_TV.log_softmax(dim=-1)[output.first - 1 : output.end - 1]
    return chances_NV.gather(1, chosen_N[:, None]).squeeze(1)


@torch.no_grad()
def log_chance(model: nn.Module, output: Output) -> float:
    """Mean log of the chance of a token asked about."""
    return log_chances(model, output).mean().item()


def log_odds_gradients(model: nn.Module, output: Output) -> dict[str, Tensor]:
    """Gradient of the output's summed log-odds with respect to every linear weight, in the weight's shape.

    Raises:
        Rejected: ``BAD_FIELD`` when it is not finite.
    """
    weights = {name: held.weight for name, held in linear_weights(model).items()}
    with torch.enable_grad():
        log_p_N = log_chances(model, output).clamp(max=-LEAST_CHANCE)
        log_odds = (log_p_N - torch.log1p(-log_p_N.exp())).sum()
        gradients = torch.autograd.grad(log_odds, list(weights.values()))
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise Rejected(Reason.BAD_FIELD, "the output's log-odds have no finite gradient")
    return {name: gradient.detach().float() for name, gradient in zip(weights, gradients, strict=True)}


def greedy_completion(model: nn.Module, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The ``count`` most likely next tokens, one after the other."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits_V = logits_of(model, torch.tensor([tokens], dtype=torch.int64))[0, -1]
            tokens.append(int(logits_V.argmax()))
    return tuple(tokens[len(prompt) :])
