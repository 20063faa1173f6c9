"""Eigenvalue-corrected Kronecker factors (EK-FAC) of a model's linear weights, over public text.

George, Laurent, Bouthillier, Ballas and Vincent, *Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis*, arXiv 1806.03884; for influence, Grosse et al., arXiv 2308.03296. Per weight ``[O, I]``:

1. ``A = E[x xᵀ]`` over inputs and ``S = E[δ δᵀ]`` over gradients of the outputs, targets drawn from the model's own
   predictions (the Fisher, not the empirical one);
2. their eigenvectors ``U_A``, ``U_S``;
3. eigenvalues ``Λ = E[(U_Sᵀ G U_A)²]`` over whole sequences' gradients ``G``.

A gradient ``q`` is preconditioned to ``U_S ((U_Sᵀ q U_A) / (Λ + λ)) U_Aᵀ``. **One ``λ`` for all weights**: the damped
inverse is of the curvature of the whole model, block by block, so what is added to it is a multiple of one identity. A
``λ`` of each weight's own, as in Grosse et al., weighs steep weights down against flat ones (docs/adr/037).
It is the query that is preconditioned: what training accumulated stays as it was committed. Deterministic for given
weights, text and seed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn import functional

from attribution.cores import each_on_a_core
from attribution.query import WeightGradients, capturing, logits_of
from attribution.weights import LinearWeight, linear_weights
from consensus.rejection import Reason, Rejected

DAMPING = 0.02
"""Part of the mean eigenvalue, over all weights, that is added to each."""


@dataclass(frozen=True, slots=True)
class WeightFactors:
    """Of one weight: ``output_vectors`` ``[O, O]``, ``input_vectors`` ``[I, I]``, ``eigenvalues`` in its shape.

    ``turned``: the weight is ``[I, O]``.
    """

    output_vectors: Tensor
    input_vectors: Tensor
    eigenvalues: Tensor
    turned: bool = False

    def precondition(self, gradient: Tensor, damping: float) -> Tensor:
        """The gradient in the inverse metric, ``damping`` added to each eigenvalue."""
        left, right = self._vectors
        return self._turned_back(left.T @ gradient @ right / (self.eigenvalues + damping))

    def precondition_each(self, gradients: WeightGradients, damping: float) -> tuple[Tensor, Tensor]:
        """Outputs' gradients in the inverse metric, ``[B, P, Q]``, and the squares of their lengths in it, ``[B]``.

        Sides of few tokens are rotated before they are multiplied: that costs a fraction of rotating the product.
        """
        left, right = self._vectors
        tokens, size_P, size_Q = gradients.left_BTP.shape[1], len(left), len(right)
        if tokens * (size_P**2 + size_Q**2) < size_P * size_Q * (size_P + size_Q):
            rotated_BPQ = (gradients.left_BTP @ left).mT @ (gradients.right_BTQ @ right)
        else:
            rotated_BPQ = left.T @ gradients.whole() @ right
        divided_BPQ = rotated_BPQ / (self.eigenvalues + damping)
        squares_B = (rotated_BPQ * divided_BPQ).sum(dim=(1, 2), dtype=torch.float64)
        return self._turned_back(divided_BPQ), squares_B

    @property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        sides = (self.output_vectors, self.input_vectors)
        return sides[::-1] if self.turned else sides

    def _turned_back(self, rotated: Tensor) -> Tensor:
        left, right = self._vectors
        return left @ rotated @ right.T


PARTS = ("output_vectors", "input_vectors", "eigenvalues")
"""What a file of factors holds of each weight."""


class FactorsOrigin(StrEnum):
    """Where the factors of a trace come from."""

    COMMITTED = "committed"
    """A file whose root stands in the campaign."""
    GIVEN = "given"
    """A file of the asker's choice."""
    FITTED = "fitted"
    """Fitted for this trace, on the released weights, over a text of the asker's choice."""


@dataclass(frozen=True, slots=True)
class FactorsUsed:
    """Where factors come from; ``root`` is the parameter root of their file, empty for those fitted."""

    origin: FactorsOrigin
    root: bytes = b""


def fit_factors(
    model: nn.Module,
    sequences_BT: Sequence[Tensor],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, WeightFactors]:
    """Factors of every linear weight of ``model``, over batches of token sequences ``[B, T]``.

    ``model`` maps tokens ``[B, T]`` to logits ``[B, T, V]`` for the next token, or to an output that holds them.
    ``progress`` is told batches done.

    Raises:
        Rejected: ``BAD_FIELD`` without any text, or when a value is not finite.
    """
    if not sequences_BT:
        raise Rejected(Reason.BAD_FIELD, "factors need text: no sequence was given")
    weights = linear_weights(model)
    sizes = {name: _sizes(held) for name, held in weights.items()}
    inputs = {name: torch.zeros(size, size) for name, (_, size) in sizes.items()}
    outputs = {name: torch.zeros(size, size) for name, (size, _) in sizes.items()}
    rows = 0
    total = 2 * len(sequences_BT)
    for number, captured in enumerate(_passes(model, weights, sequences_BT, seed)):
        for name, of in captured.items():
            x_NI, delta_NO = (held.flatten(0, 1) for held in of)
            inputs[name] += x_NI.T @ x_NI
            outputs[name] += delta_NO.T @ delta_NO
        rows += len(x_NI)
        progress(number + 1, total)
    # One matrix gains little from several threads; covariances go as they are used.
    found = each_on_a_core(
        lambda name: (_eigenvectors(outputs.pop(name) / rows), _eigenvectors(inputs.pop(name) / rows)), tuple(weights)
    )
    vectors = dict(zip(weights, found, strict=True))
    eigenvalues = {name: torch.zeros(held.weight.shape) for name, held in weights.items()}
    count = 0
    for number, captured in enumerate(_passes(model, weights, sequences_BT, seed)):
        for name, of in captured.items():
            output_vectors, input_vectors = vectors[name]
            x_BTI, delta_BTO = of
            projected_BOI = torch.einsum("bto,bti->boi", delta_BTO @ output_vectors, x_BTI @ input_vectors)
            squares_OI = projected_BOI.square().sum(dim=0)
            eigenvalues[name] += squares_OI.T if weights[name].turned else squares_OI
        count += len(x_BTI)
        progress(len(sequences_BT) + number + 1, total)
    return {
        name: WeightFactors(*vectors[name], eigenvalues[name] / count, held.turned) for name, held in weights.items()
    }


def damping_of(factors: Mapping[str, WeightFactors]) -> float:
    """What is added to each eigenvalue of these weights: the same for all of them."""
    total = math.fsum(float(held.eigenvalues.sum(dtype=torch.float64)) for held in factors.values())
    return DAMPING * total / sum(held.eigenvalues.numel() for held in factors.values())


def factor_tensors(factors: Mapping[str, WeightFactors]) -> dict[str, Tensor]:
    """As tensors of one file, whose parameter root a campaign may commit to."""
    return {f"{name}/{part}": getattr(held, part).contiguous() for name, held in factors.items() for part in PARTS}


def factors_from(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, WeightFactors]:
    """The factors of a file, which must be those of ``model``'s linear weights.

    Raises:
        Rejected: ``MALFORMED``.
    """
    factors = {}
    for name, held in linear_weights(model).items():
        size_out, size_in = _sizes(held)
        expected = {
            "output_vectors": (size_out,) * 2,
            "input_vectors": (size_in,) * 2,
            "eigenvalues": tuple(held.weight.shape),
        }
        parts = {}
        for part, shape in expected.items():
            tensor = tensors.get(f"{name}/{part}")
            if tensor is None or tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
                raise Rejected(Reason.MALFORMED, f"factors of {name}: expected {part} of shape {shape}, finite")
            parts[part] = tensor
        factors[name] = WeightFactors(**parts, turned=held.turned)
    return factors


def _passes(
    model: nn.Module, weights: Mapping[str, LinearWeight], sequences_BT: Sequence[Tensor], seed: int
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs ``[B, T, I]`` and output gradients ``[B, T, O]`` of every weight, batch by batch; the same each time."""
    generator = torch.Generator().manual_seed(seed)
    for tokens_BT in sequences_BT:
        with capturing(weights) as captured, torch.enable_grad():
            logits_BTV = logits_of(model, tokens_BT)
            probabilities_NV = logits_BTV.detach().flatten(0, 1).softmax(dim=-1)
            targets_N = torch.multinomial(probabilities_NV, 1, generator=generator).squeeze(1)
            loss = functional.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction="sum")
            torch.autograd.grad(loss, [held.weight for held in weights.values()])
        if not torch.isfinite(loss):
            raise Rejected(Reason.BAD_FIELD, f"the model's loss on the public text is {loss.item()}")
        operands = {name: held.operands(len(tokens_BT)) for name, held in captured.items()}
        unseen = [name for name, found in operands.items() if found is None]
        if unseen:
            raise Rejected(Reason.BAD_FIELD, f"no text reached {unseen[0]!a:.100} through its module")
        yield {name: found for name, found in operands.items() if found is not None}


def _sizes(held: LinearWeight) -> tuple[int, int]:
    """Outputs and inputs."""
    first, second = held.weight.shape
    return (second, first) if held.turned else (first, second)


def _eigenvectors(symmetric: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(symmetric.double()).eigenvectors
    return vectors.float()
