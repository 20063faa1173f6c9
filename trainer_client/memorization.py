"""Staged detection of examples that the model has begun to recite.

1. **Screen.** An example's *drop* is how far its loss fell from the base model's, in the best stretch of
   ``stretch_bytes``. It is flagged when its drop exceeds a quantile of the drops of held-out texts with about
   the same base loss (its twins). A quantile, because any fixed threshold drifts as the model learns. The twins are
   held-out records as they are and corrupted, so that there are twins for high-entropy strings too. Text that
   compresses below ``compression_floor_permille`` zlib bytes per byte is set aside and counted: it is
   predictable without having been seen.
2. **Recitation.** For flagged examples alone: how many bytes the model's greedy choice continues verbatim, after a
   prompt of at least ``prompt_bytes``, beyond what the base model continues from the same prompt (boilerplate).
   The *signal* is that excess in permille of ``recital_bytes``, at most 1000.

A greedy continuation equals the text as far as each likeliest byte, given the true bytes before it, is
the true one; so one forward pass shows every continuation of every prompt.

Deterministic; leaves mode, gradients and random state of both models alone. The signal is the operator's claim;
the threshold is the policy's. Not covered: paraphrase, recitation of another text than the example.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consensus.rejection import InvariantBroken

Predictions = Callable[[nn.Module, Sequence[bytes]], tuple[Tensor, Tensor]]
"""A model and B texts of one length T to, for each byte after the first, its loss in nats and whether it was
the model's likeliest: float and bool ``[B, T - 1]``."""

PERMILLE = 1_000


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """Quantities of both stages, in bytes and permille."""

    stretch_bytes: int = 32
    twin_count: int = 24
    quantile_permille: int = 950
    compression_floor_permille: int = 350
    prompt_bytes: int = 16
    recital_bytes: int = 48


@dataclass(frozen=True, slots=True)
class FlaggedExample:
    """An example past the screen: its place in the assessed sequence, and its signal."""

    position: int
    signal_permille: int


@dataclass(frozen=True, slots=True)
class MemorizationReport:
    """What one assessment found; ``maximum_permille`` is 0 where nothing was flagged."""

    flagged: tuple[FlaggedExample, ...]
    maximum_permille: int
    assessed_count: int
    set_aside_count: int

    def above(self, threshold_permille: int) -> tuple[FlaggedExample, ...]:
        """The flagged examples whose signal exceeds a policy's threshold."""
        return tuple(example for example in self.flagged if example.signal_permille > threshold_permille)


class MemorizationDetector:
    """Compares a model in training with its base model on examples and on held-out twins.

    Args:
        base_model: as it was before the first step; read, never changed.
        held_out: texts that neither model was trained on, of one length, at least ``twin_count``.
        predictions: how to ask a model.
    """

    def __init__(
        self,
        base_model: nn.Module,
        held_out: Sequence[bytes],
        predictions: Predictions,
        settings: DetectorSettings | None = None,
    ) -> None:
        self._base_model = base_model
        self._predictions = predictions
        self._settings = settings or DetectorSettings()
        self._twins = tuple(text for held in held_out for text in (held, _corrupted(held, 4), _corrupted(held, 1)))
        if len(held_out) < self._settings.twin_count:
            raise InvariantBroken(
                f"expected at least {self._settings.twin_count} held-out texts, found {len(held_out)}"
            )
        self._base_seen: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._twin_base_losses, self._twin_drops = self._screened(base_model, self._twins)

    def calibrate(self, model: nn.Module) -> None:
        """Measures the twins under ``model`` as it is now; repeat as training goes on."""
        self._twin_base_losses, self._twin_drops = self._screened(model, self._twins)

    def assess(self, model: nn.Module, examples: Sequence[bytes]) -> MemorizationReport:
        """Both stages over ``examples``, all of one length, against the last calibration."""
        settings = self._settings
        kept = [
            position
            for position, example in enumerate(examples)
            if len(zlib.compress(example, 9)) * PERMILLE >= settings.compression_floor_permille * len(example)
        ]
        flagged = []
        if kept:
            texts = [examples[position] for position in kept]
            losses_BT, hits_BT = self._ask(model, texts)
            base_losses_BT, base_hits_BT = self._ask_base(texts)
            base_loss_B, drop_B = self._drops(losses_BT, base_losses_BT)
            for row, position in enumerate(kept):
                if drop_B[row].item() > self._limit(base_loss_B[row]):
                    signal = self._signal(hits_BT[row].tolist(), base_hits_BT[row].tolist())
                    flagged.append(FlaggedExample(position, signal))
        return MemorizationReport(
            flagged=tuple(flagged),
            maximum_permille=max((example.signal_permille for example in flagged), default=0),
            assessed_count=len(examples),
            set_aside_count=len(examples) - len(kept),
        )

    def _screened(self, model: nn.Module, texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        losses_BT, _ = self._ask(model, texts)
        base_losses_BT, _ = self._ask_base(texts)
        return self._drops(losses_BT, base_losses_BT)

    def _drops(self, losses_BT: Tensor, base_losses_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The stretch with the largest mean drop: the base loss there, and the drop, each ``[B]``."""
        stretch = min(self._settings.stretch_bytes, losses_BT.shape[1])
        base_BS = base_losses_BT.unfold(1, stretch, 1).mean(dim=2)
        drops_BS = base_BS - losses_BT.unfold(1, stretch, 1).mean(dim=2)
        drop_B, best_B = drops_BS.max(dim=1)
        return base_BS.gather(1, best_B[:, None])[:, 0], drop_B

    def _limit(self, base_loss: Tensor) -> float:
        """The quantile of the drops of the twins nearest in base loss."""
        distances_C = (self._twin_base_losses - base_loss).abs()
        nearest = torch.argsort(distances_C, stable=True)[: self._settings.twin_count]
        ordered = sorted(self._twin_drops[nearest].tolist())
        return float(ordered[(len(ordered) - 1) * self._settings.quantile_permille // PERMILLE])

    def _signal(self, hits_T: list[bool], base_hits_T: list[bool]) -> int:
        """The longest verbatim continuation beyond the base model's own, in permille of the recital."""
        runs, base_runs = _run_lengths(hits_T), _run_lengths(base_hits_T)
        first = self._settings.prompt_bytes - 1
        excess = max((run - base for run, base in zip(runs[first:], base_runs[first:], strict=True)), default=0)
        return min(max(excess, 0), self._settings.recital_bytes) * PERMILLE // self._settings.recital_bytes

    def _ask_base(self, texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        """The base model's predictions; each text is asked once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._base_seen]
        if new:
            losses_BT, hits_BT = self._ask(self._base_model, new)
            self._base_seen |= {text: (losses_BT[row], hits_BT[row]) for row, text in enumerate(new)}
        losses, hits = zip(*(self._base_seen[text] for text in texts), strict=True)
        return torch.stack(losses), torch.stack(hits)

    def _ask(self, model: nn.Module, texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
        with _evaluating(model), torch.no_grad():
            losses_BT, hits_BT = self._predictions(model, texts)
        return losses_BT.float().cpu(), hits_BT.cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _run_lengths(hits_T: list[bool]) -> list[int]:
    """For each position, how many hits follow without a miss, itself included."""
    lengths = [0] * (len(hits_T) + 1)
    for position in range(len(hits_T) - 1, -1, -1):
        lengths[position] = lengths[position + 1] + 1 if hits_T[position] else 0
    return lengths[:-1]


def _corrupted(text: bytes, one_in: int) -> bytes:
    """``text`` with one in ``one_in`` bytes replaced by a letter or digit, the same ones each time."""
    alphabet = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    noise = hashlib.shake_256(one_in.to_bytes(1, "big") + text).digest(2 * len(text))
    return bytes(
        alphabet[noise[2 * place + 1] % len(alphabet)] if noise[2 * place] % one_in == 0 else byte
        for place, byte in enumerate(text)
    )
