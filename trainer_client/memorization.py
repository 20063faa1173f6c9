"""Staged detection of examples that the model has begun to recite: cheap and certain stages first.

1. **Glance.** The training step's own forward pass says, for each byte, whether it was the model's likeliest. A
   greedy continuation equals the text as far as each likeliest byte, given the true bytes before it, is the
   true one; so one forward pass shows every continuation of every prompt of at least ``prompt_bytes``, and
   the longest run of such *hits* bounds the signal from above. Examples whose bound is low go no further.
2. **Recitation.** For the rest: how many bytes the model continues verbatim beyond what the base model continues
   from the same prompt (boilerplate). The *signal* is that excess in permille of ``recital_bytes``, at most 1000.
   Text that compresses below ``compression_floor_permille`` zlib bytes per byte is set aside and counted: it
   is predictable without having been seen.
3. **Calibrators.** A signal above the policy's threshold counts only if the example's loss also *dropped* as only seen
   text does. Its drop is how far its loss fell from the base model's, in the best stretch of ``stretch_bytes``;
   it must exceed a quantile of the drops of calibrators of its band of base loss (``calibrators.py``): texts of the
   same source that no step trains on, where its owner keeps a reserve of at least ``calibrator_count``, else public
   ones. A quantile, because any fixed threshold drifts as the model learns. A signal at or under the threshold is
   reported as measured, without this stage: nothing depends on it.

Every stage must agree, so their order is a matter of cost alone: what the step's own pass shows for nothing comes
first. The base model is asked once per text, and only for texts past the glance; the calibrators nearest to an example
only where it comes to stage 3.

Deterministic; leaves mode, gradients and random state of both models alone. The signal is the operator's claim;
the threshold is the policy's. Left to ``memorization_watch.py``: which steps and examples are looked at when.
Not covered: paraphrase, recitation of another text than the example.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consensus.rejection import InvariantBroken
from trainer_client.calibrators import PERMILLE, Calibrators
from trainer_client.evaluating import evaluating

Predictions = Callable[[nn.Module, Sequence[bytes]], tuple[Tensor, Tensor]]
"""A model and B texts of one length T to, for each byte after the first, its loss in nats and whether it was
the model's likeliest: float and bool ``[B, T - 1]``."""


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """Quantities of all stages, in bytes and permille; ``texts_at_once`` go through a model together."""

    stretch_bytes: int = 32
    calibrator_count: int = 24
    quantile_permille: int = 950
    copied_permille: int = 500
    compression_floor_permille: int = 350
    prompt_bytes: int = 16
    recital_bytes: int = 48
    texts_at_once: int = 16


@dataclass(frozen=True, slots=True)
class FlaggedExample:
    """An example that is recited to some degree: its place in the assessed sequence, and its signal, at least 1."""

    position: int
    signal_permille: int


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What every stage says of a text: its signal, its drop and the limit for it, whether it is set aside.

    ``base_loss`` is the base model's over the whole text, ``drop`` that of the best stretch; in nats a byte.
    """

    signal_permille: int
    base_loss: float
    drop: float
    limit: float
    is_set_aside: bool

    def is_recited(self, threshold_permille: int) -> bool:
        """Whether all stages agree that it is."""
        return not self.is_set_aside and self.signal_permille > threshold_permille and self.drop > self.limit


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
    """Compares a model in training with its base model on examples and on calibrators.

    Args:
        base_model: as it was before the first step; read, never changed.
        held_out: public texts that neither model was trained on, of one length, at least ``calibrator_count``.
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
        if len(held_out) < self._settings.calibrator_count:
            raise InvariantBroken(
                f"expected at least {self._settings.calibrator_count} held-out texts, found {len(held_out)}"
            )
        self._public = Calibrators(held_out)
        self._own: dict[bytes, Calibrators] = {}
        self._base_seen: dict[bytes, tuple[Tensor, Tensor]] = {}

    def calibrate_on(self, source: bytes, texts: Sequence[bytes]) -> None:
        """Examples of a source are held against these texts of it; against public ones where there are too few."""
        if len(texts) >= self._settings.calibrator_count:
            self._own[source] = Calibrators(texts)

    def forget_calibration(self) -> None:
        """Calibrators are measured anew, under the model as it is then, when they are next needed."""
        for calibrators in (self._public, *self._own.values()):
            calibrators.forget()

    def glance(self, texts: Sequence[bytes], hits_BT: Tensor, floor_permille: int) -> tuple[int, ...]:
        """The texts whose signal under these hits (bool ``[B, T - 1]``, in any model's pass) is above a floor."""
        rows = [row for row in range(len(texts)) if self._bound(hits_BT[row].tolist()) > floor_permille]
        rows = [row for row in rows if not self._is_set_aside(texts[row])]
        if not rows:
            return ()
        _, base_hits_BT = self._ask_base([texts[row] for row in rows])
        signals = [self._signal(hits_BT[row].tolist(), base_hits_BT[at].tolist()) for at, row in enumerate(rows)]
        return tuple(row for row, signal in zip(rows, signals, strict=True) if signal > floor_permille)

    def assess(
        self,
        model: nn.Module,
        examples: Sequence[bytes],
        threshold_permille: int = 0,
        sources: Sequence[bytes] | None = None,
    ) -> MemorizationReport:
        """Recitation of ``examples``, all of one length, by ``model`` as it is now; above the threshold, calibrated.

        ``sources`` names each example's; None holds all of them against public text.
        """
        kept = [position for position, example in enumerate(examples) if not self._is_set_aside(example)]
        texts = [examples[position] for position in kept]
        calibrators = [self._calibrators_of(sources, position) for position in kept]
        recited = self._recited(model, texts, calibrators, threshold_permille) if kept else []
        flagged = tuple(FlaggedExample(kept[row], signal_permille) for row, signal_permille in recited)
        return MemorizationReport(
            flagged=flagged,
            maximum_permille=max((example.signal_permille for example in flagged), default=0),
            assessed_count=len(examples),
            set_aside_count=len(examples) - len(kept),
        )

    def figures(
        self, model: nn.Module, examples: Sequence[bytes], sources: Sequence[bytes] | None = None
    ) -> tuple[StageFigures, ...]:
        """Every stage's figures of every example, which ``assess`` spares itself; for measuring the detector."""
        losses_BT, hits_BT = self._ask(model, examples)
        base_losses_BT, base_hits_BT = self._ask_base(examples)
        drops, base_losses = self._drops(losses_BT, base_losses_BT), base_losses_BT.mean(dim=1).tolist()
        return tuple(
            StageFigures(
                signal_permille=self._signal(hits_BT[row].tolist(), base_hits_BT[row].tolist()),
                base_loss=base_losses[row],
                drop=drops[row],
                limit=self._limit(model, text, base_losses[row], self._calibrators_of(sources, row)),
                is_set_aside=self._is_set_aside(text),
            )
            for row, text in enumerate(examples)
        )

    def _calibrators_of(self, sources: Sequence[bytes] | None, position: int) -> Calibrators:
        return self._public if sources is None else self._own.get(sources[position], self._public)

    def _recited(
        self, model: nn.Module, texts: Sequence[bytes], calibrators: Sequence[Calibrators], threshold_permille: int
    ) -> list[tuple[int, int]]:
        """Row and signal of the texts with any, but for those above the threshold that dropped no more than others."""
        losses_BT, hits_BT = self._ask(model, texts)
        rows = [row for row, hits_T in enumerate(hits_BT.tolist()) if self._bound(hits_T) > 0]
        if not rows:
            return []
        base_losses_BT, base_hits_BT = self._ask_base([texts[row] for row in rows])
        drops, base_losses = self._drops(losses_BT[rows], base_losses_BT), base_losses_BT.mean(dim=1).tolist()
        found = []
        for at, row in enumerate(rows):
            signal = self._signal(hits_BT[row].tolist(), base_hits_BT[at].tolist())
            if signal > threshold_permille and drops[at] <= self._limit(
                model, texts[row], base_losses[at], calibrators[row]
            ):
                continue
            if signal > 0:
                found.append((row, signal))
        return found

    def _is_set_aside(self, text: bytes) -> bool:
        return len(zlib.compress(text, 9)) * PERMILLE < self._settings.compression_floor_permille * len(text)

    def _bound(self, hits_T: list[bool]) -> int:
        """The signal if the base model continued nothing."""
        return self._signal(hits_T, [False] * len(hits_T))

    def _drops(self, losses_BT: Tensor, base_losses_BT: Tensor) -> list[float]:
        """The largest mean drop of a stretch, for each text."""
        stretch = min(self._settings.stretch_bytes, losses_BT.shape[1])
        drops_BT = base_losses_BT - losses_BT
        largest: list[float] = drops_BT.unfold(1, stretch, 1).mean(dim=2).amax(dim=1).tolist()
        return largest

    def _limit(self, model: nn.Module, text: bytes, base_loss: float, calibrators: Calibrators) -> float:
        """The quantile of the drops of the calibrators in the text's band."""

        def measure(texts: Sequence[bytes]) -> list[tuple[float, int]]:
            losses_BT, hits_BT = self._ask(model, texts)
            base_losses_BT, base_hits_BT = self._ask_base(texts)
            drops = self._drops(losses_BT, base_losses_BT)
            hits = zip(hits_BT.tolist(), base_hits_BT.tolist(), strict=True)
            return [(drop, self._signal(*pair)) for drop, pair in zip(drops, hits, strict=True)]

        return calibrators.limit(
            self._ask_base(calibrators.texts)[0].mean(dim=1),
            base_loss,
            measure,
            count=self._settings.calibrator_count,
            quantile_permille=self._settings.quantile_permille,
            but=text,
            copied_permille=self._settings.copied_permille,
        )

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
        size, losses, hits = self._settings.texts_at_once, [], []
        with evaluating(model), torch.no_grad():
            for first in range(0, len(texts), size):
                losses_BT, hits_BT = self._predictions(model, texts[first : first + size])
                losses.append(losses_BT.float().cpu())
                hits.append(hits_BT.cpu())
        return torch.cat(losses), torch.cat(hits)


def hits_of(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Whether each target was a likeliest choice, ties included: bool ``[B, T]``."""
    with torch.no_grad():
        return logits_BTV.gather(-1, target_BT[..., None])[..., 0] >= logits_BTV.amax(dim=-1)


def _run_lengths(hits_T: list[bool]) -> list[int]:
    """For each position, how many hits follow without a miss, itself included."""
    lengths = [0] * (len(hits_T) + 1)
    for position in range(len(hits_T) - 1, -1, -1):
        lengths[position] = lengths[position + 1] + 1 if hits_T[position] else 0
    return lengths[:-1]
