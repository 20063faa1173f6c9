"""Calibrators: texts that a model was not trained on, to hold against how far its loss fell on one that it was.

Learning some text lowers the loss of other text as well, the more the likelier that was to begin with. So an example
is compared with calibrators of its own *band*: those whose loss under the base model is nearest to its own. To have
some in every band, up to that of random strings, each text is there at several degrees of corruption, from as it is to
every byte replaced. A band is of one degree, the least that reaches the example's loss: corrupted text can have the
loss of stranger text, and has less in it to be learned.

The limit is the quantile of conformal prediction (Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World",
2005): of n drops and one more like them, the one more is above the ⌈(n + 1) · q⌉-th with a chance of at most 1 - q.

Two kinds of text are no calibrators after all: the example's own, and one that the model recites, since nothing recites
what it has not seen. That one has a copy among the trained texts; counted, it would let the copy pass for ordinary.

Where the texts come from: a source's reserve (``consensus/reserve.py``), or public text; ``memorization.py`` chooses.
"""

import hashlib
from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

CORRUPTED_PERMILLE = (0, 125, 250, 500, 750, 1_000)
"""Of each text's bytes, so many are replaced."""

PERMILLE = 1_000

Measure = Callable[[Sequence[bytes]], Sequence[tuple[float, int]]]
"""Texts to, for each, how far the model's loss fell from the base model's in nats, and its signal in permille."""


class Calibrators:
    """Texts of one length at every degree of corruption; what is measured of them is kept until ``forget``."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.texts = tuple(corrupted(text, permille) for text in texts for permille in CORRUPTED_PERMILLE)
        self._measured: dict[int, tuple[float, int]] = {}

    def forget(self) -> None:
        """The model has changed: the texts are measured anew when they are next needed."""
        self._measured = {}

    def limit(
        self,
        base_losses_C: Tensor,
        base_loss: float,
        measure: Measure,
        *,
        count: int,
        quantile_permille: int,
        but: bytes,
        copied_permille: int,
    ) -> float:
        """The quantile of the drops of the ``count`` calibrators in the band of ``base_loss``; none made from ``but``.

        ``base_losses_C`` are those of ``texts``, in nats a byte. A text with a signal above ``copied_permille`` counts
        as recited. Below every drop where all of them are.
        """
        losses_ND = base_losses_C.view(-1, len(CORRUPTED_PERMILLE))
        distances_ND = (losses_ND - base_loss).abs()
        reached_D = (losses_ND.amin(dim=0) <= base_loss) & (base_loss <= losses_ND.amax(dim=0))
        least = reached_D.int().argmax() if reached_D.any() else distances_ND.amin(dim=0).argmin()
        degree = int(least.item())
        nearest = torch.argsort(distances_ND[:, degree], stable=True).tolist()
        others = [number for number in nearest if self.texts[_place(number)] != but]
        drops: list[float] = []
        for first in range(0, len(others), count):
            near = others[first : first + count]
            self._measure({_place(number, of) for number in near for of in (0, degree)}, measure)
            unseen = (number for number in near if self._measured[_place(number)][1] <= copied_permille)
            drops += [self._measured[_place(number, degree)][0] for number in unseen]
            if len(drops) >= count:
                break
        ordered = sorted(drops[:count])
        rank = -(-(len(ordered) + 1) * quantile_permille // PERMILLE)
        return ordered[min(max(rank, 1), len(ordered)) - 1] if ordered else -inf

    def _measure(self, places: set[int], measure: Measure) -> None:
        new = sorted(places - self._measured.keys())
        if new:
            self._measured |= dict(zip(new, measure([self.texts[at] for at in new]), strict=True))


def _place(number: int, degree: int = 0) -> int:
    """Where a text stands at a degree of corruption, by its number."""
    return number * len(CORRUPTED_PERMILLE) + degree


def corrupted(text: bytes, permille: int) -> bytes:
    """``text`` with about so many of its bytes replaced by letters or digits, the same ones each time."""
    alphabet = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    noise = hashlib.shake_256(permille.to_bytes(2, "big") + text).digest(3 * len(text))
    return bytes(
        alphabet[noise[3 * place + 2] % len(alphabet)]
        if int.from_bytes(noise[3 * place : 3 * place + 2], "big") * PERMILLE < permille << 16
        else byte
        for place, byte in enumerate(text)
    )
