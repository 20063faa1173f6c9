"""A replay's witness of recorded sketches where last bits differ: how much of its gradient each one holds.

At low rank the directions that are kept turn with the last bits: two honest sketches of one gradient may have hardly a
number in common. What they share is how much of the gradient ``G`` they hold, ``‖G‖² − ‖G − S‖² = 2⟨G, S⟩ − ‖S‖²`` of a
sketch ``S`` (Frobenius norms). The product is exact and costs no more than sketching: while the steps of a window are
taken again, ``⟨l rᵀ, u vᵀ⟩ = (l·u)(r·v)`` is summed over the positions of each example and its sketch's columns. With
``T`` the replay's own sketch of the same example, over all its tensors together,

    2⟨G, S⟩ − ‖S‖² >= (1 − tolerance) · ‖T‖²        summed over the examples of a source
    2⟨G, S⟩ − ‖S‖² >= ½ · ‖T‖²                      for each of them

A direction that turned among its equals costs nothing here. One that is not the gradient's costs what it holds, and
what it stands in place of; so does a sketch made larger or smaller. The tolerance is ``LEAST_TOLERANCE`` or more:
sketches stand in four bits, and where an example was visited more than once in a window each visit was brought down to
the rank. What honest ones lose by that differs from example to example, and hardly for all of a source: of one forged
sketch that keeps half of what it should hold only the sum over its source can tell.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trainer_client.record import Example
from trainer_client.route import FULL_PERMILLE, Weights
from trainer_client.sketches import NO_OTHERS, Place, SketchBook, factors_of

LEAST_TOLERANCE = 0.1
"""Honest sketches may differ by so much in what they hold of a source's gradients, as a part of the replay's own."""
LEAST_OF_ONE = 0.5
"""So much of what the replay's own sketch of an example holds must the recorded one hold."""
ALL = "all examples together"

Files = Mapping[tuple[bytes, bytes], Mapping[str, Tensor]]
"""By policy and source, what ``sketches.sketch_file`` made."""


class SketchWitness(SketchBook):
    """The replay's own sketches, and beside them what recorded ones share with the gradients of the same examples.

    Args:
        rank, ranks: as of the campaign's.
    """

    def __init__(self, rank: int, ranks: Mapping[str, int] = NO_OTHERS) -> None:
        super().__init__(rank, ranks)
        self._recorded: Files = {}
        self._rows: dict[Place, int] = {}
        self._examples: tuple[Example, ...] = ()
        self._products: list[tuple[str, Place, float]] = []
        self.shared: dict[Place, float] = {}
        """⟨G, S⟩ of the window so far, by place, with weight, learning rate and clip factor in G as in S."""

    def hold(self, recorded: Files) -> None:
        """The recorded sketches of the window that begins; none for one that is not compared."""
        self._recorded, self.shared, self._products = recorded, {}, []
        self._rows = {
            (*place, example): row
            for place, file in recorded.items()
            for row, example in enumerate(file["examples"].tolist())
        }

    def expect(self, step: int, examples: Sequence[Example]) -> None:
        super().expect(step, examples)
        self._examples = tuple(examples)

    def observe(self, parameter: str, left: Tensor, right: Tensor, weights_B: Weights) -> None:
        super().observe(parameter, left, right, weights_B)
        if parameter not in self._parameters:
            return
        for (policy, source), file in self._recorded.items():
            if f"{parameter}/left" not in file:
                continue
            of = [
                (number, (policy, *example))
                for number, example in enumerate(self._examples)
                if example[0] == source and weights_B[number] and (policy, *example) in self._rows
            ]
            if not of:
                continue
            numbers, rows = [number for number, _ in of], [self._rows[place] for _, place in of]
            u_nrP, v_nrQ = factors_of(file, parameter, rows)
            if u_nrP.shape[2] < left.shape[-1] or v_nrQ.shape[2] < right.shape[-1]:
                continue  # of another shape than the weight: told by the comparison of the files
            shared_n = _products(left[numbers], right[numbers], u_nrP, v_nrQ)
            for (number, place), product in zip(of, shared_n.tolist(), strict=True):
                self._products.append((parameter, place, product * weights_B[number] / FULL_PERMILLE))

    def take_step(self, policy: bytes, factors: Mapping[str, float]) -> None:
        super().take_step(policy, factors)
        products, self._products = self._products, []
        for parameter, place, product in products:
            if place[0] == policy:
                self.shared[place] = self.shared.get(place, 0.0) + product * factors.get(parameter, 0.0)

    def skip_step(self) -> None:
        super().skip_step()
        self._products = []


def holding_less(
    own: Mapping[str, Tensor], recorded: Mapping[str, Tensor], shared: Mapping[int, float], tolerance: float
) -> tuple[str, ...]:
    """Which of a source's recorded sketches hold less of their gradients than they must, in words.

    Args:
        own, recorded: the source's files, the replay's and the run's, of the same examples, visits and tensors.
        shared: ⟨G, S⟩ by example.
        tolerance: see above.
    """
    examples = own["examples"].tolist()
    shared_N = torch.tensor([shared.get(example, 0.0) for example in examples], dtype=torch.float64)
    own_N, recorded_N = (sum(_squares(file), torch.zeros_like(shared_N)) for file in (own, recorded))
    held_N = 2 * shared_N - recorded_N
    # Of a sketch with a number that is none nothing is at least anything.
    less = [number for number, enough in enumerate((held_N >= LEAST_OF_ONE * own_N).tolist()) if not enough]
    what = [f"example {examples[number]}" for number in less]
    if not held_N.sum() >= (1 - max(tolerance, LEAST_TOLERANCE)) * own_N.sum():
        what.append(ALL)
    return tuple(what)


def _squares(file: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """For each parameter ``[N]``: the squared norm of each example's sketch."""
    for parameter in {name.rsplit("/", 1)[0] for name in file if "/" in name}:
        left_NrP, right_NrQ = (factor.double() for factor in factors_of(file, parameter))
        products_Nrr = (left_NrP @ left_NrP.transpose(1, 2)) * (right_NrQ @ right_NrQ.transpose(1, 2))
        yield products_Nrr.sum(dim=(1, 2))


def _products(left: Tensor, right: Tensor, u_nrP: Tensor, v_nrQ: Tensor) -> Tensor:
    """``[n]``: of each example the inner product of its gradient, ``[n, *, P]`` and ``[n, *, Q]``, and a sketch."""
    along = []
    for operand, factor in ((left, u_nrP), (right, v_nrQ)):
        wide = operand.detach().float()
        wide_nTP = wide.flatten(1, -2) if wide.dim() > 2 else wide.unsqueeze(1)
        along.append(wide_nTP @ factor[:, :, : wide_nTP.shape[2]].to(wide.device).transpose(1, 2))
    return (along[0] * along[1]).double().sum(dim=(1, 2)).cpu()
