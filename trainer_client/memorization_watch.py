"""Which examples of which steps are checked for recitation, and when.

A check costs a forward pass; looking at the forward pass that training makes anyway costs next to nothing. So where
the script hands its logits to ``run.learn``:

* **every step** is glanced at: an example whose signal in the training pass is above the policy's threshold
  is a suspect;
* **every so many steps** (``check_memorization_every_steps``) one above a quarter of the threshold is as well: the
  training pass shows the model *before* the step, and in the demonstration's fine-tune single steps lifted a recital
  from 36 % of the threshold to above it, none from less;
* from where the **last whole pass** over the manifest begins every step counts as such a one: no later step looks at an
  example that was shown for the last time;
* in the **last step** every admitted example is a suspect;
* after a recital, up to ``SWEPT_EXAMPLES`` others of the same sources are assessed, nearest in number first: what is
  repeated in one example is often repeated in its neighbours, and each would cost a step of its own.

Suspects alone are assessed, after the step, under the model it left; a step without suspects needs no snapshot. A
recital that one step lifts past the threshold from under a quarter is found when the example is next presented; what
other examples' steps lift after its last showing, the survey finds (``memorization_manifest.py``). Dropout makes the
glance see less; the assessment runs without it. Without logits the suspects are all admitted examples of every so many
steps, and nobody in the steps between.

Left to others: what a signal is (``memorization.py``), what follows from one (``governed.py``).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from consensus import portions as p
from consensus.rejection import ConfigError, InvariantBroken
from trainer_client.memorization import MemorizationDetector, hits_of
from trainer_client.record import Example
from trainer_client.sharding import part_again

E = TypeVar("E")
E_contra = TypeVar("E_contra", contravariant=True)

SUSPICION_DIVISOR = 4
SWEPT_EXAMPLES = 64
CALIBRATORS_OF_A_SOURCE = 128
"""So many of a source's reserve are used, those first in number: lots have mixed them."""


class MemorizationCheck(Protocol[E_contra]):
    """What finds recited examples; ``DetectorCheck`` is the one provided."""

    def glance(self, examples: Mapping[Example, E_contra], hits_BT: Tensor, floor_permille: int) -> Collection[Example]:
        """The examples whose signal may be above the floor, by which targets of a pass were likeliest (rows in the
        mapping's order)."""
        ...

    def signals(
        self, model: nn.Module, examples: Mapping[Example, E_contra], threshold_permille: int
    ) -> Mapping[Example, int]:
        """The signals found, in permille; examples without a signal are left out."""
        ...

    def calibrate_on(self, source: bytes, texts: Sequence[E_contra]) -> None:
        """Texts of a source that no step trains on, told before the first step: what else of it may be held against."""
        ...


class DetectorCheck:
    """A check by ``memorization.MemorizationDetector`` over examples that are bytes of one length.

    Calibrators are measured anew when they are needed and ``calibrate_every_checks`` assessments have passed.
    """

    def __init__(self, detector: MemorizationDetector, calibrate_every_checks: int = 10) -> None:
        self._detector = detector
        self._calibrate_every_checks = calibrate_every_checks
        self._checks = 0

    def glance(self, examples: Mapping[Example, bytes], hits_BT: Tensor, floor_permille: int) -> list[Example]:
        """See ``MemorizationCheck``.

        Raises:
            InvariantBroken: the pass was not over these examples, byte by byte.
        """
        names, texts = list(examples), list(examples.values())
        expected = (len(texts), len(texts[0]) - 1)
        if tuple(hits_BT.shape) != expected:
            raise InvariantBroken(f"logits for memorization: expected {expected} targets, found {tuple(hits_BT.shape)}")
        return [names[row] for row in self._detector.glance(texts, hits_BT, floor_permille)]

    def signals(
        self, model: nn.Module, examples: Mapping[Example, bytes], threshold_permille: int
    ) -> dict[Example, int]:
        """See ``MemorizationCheck``."""
        if self._checks % self._calibrate_every_checks == 0:
            self._detector.forget_calibration()
        self._checks += 1
        names = sorted(examples)
        texts, sources = [examples[name] for name in names], [source for source, _ in names]
        report = self._detector.assess(model, texts, threshold_permille, sources)
        return {names[found.position]: found.signal_permille for found in report.flagged}

    def calibrate_on(self, source: bytes, texts: Sequence[bytes]) -> None:
        """See ``MemorizationCheck``."""
        self._detector.calibrate_on(source, texts)


def steps_of_a_pass(examples: int, batch_size: int) -> int:
    """How many steps the sampler makes of a pass over ``examples``."""
    return max(1, examples // batch_size)


def last_pass_from(examples: int, batch_size: int, planned_steps: int) -> int:
    """The step with which the last whole pass over ``examples`` begins, 1 where there is none."""
    steps = steps_of_a_pass(examples, batch_size)
    return max(1, planned_steps - planned_steps % steps - steps + 1)


class MemorizationWatch(Generic[E]):
    """Chooses the suspects of each step and has them assessed, at most ``most_at_once`` in a forward pass.

    Args:
        last_pass_from: the step with which the last whole pass over the manifest begins.
    """

    def __init__(
        self,
        check: MemorizationCheck[E] | None,
        every_steps: int,
        last_step: int,
        most_at_once: int,
        last_pass_from: int,
    ) -> None:
        self._check = check
        self._every_steps = every_steps
        self._most_at_once = most_at_once
        self._last_step = last_step
        self._last_pass_from = last_pass_from
        self._reserve: dict[Example, E] = {}
        self._suspects: dict[Example, E] = {}

    def keep_apart(self, reserve: Mapping[Example, E]) -> None:
        """Examples that no step trains on: others of their sources are held against them."""
        self._reserve = dict(reserve)
        texts: dict[bytes, list[E]] = {}
        for source, number in sorted(reserve):
            texts.setdefault(source, []).append(reserve[source, number])
        if self._check is not None:
            for source, held in texts.items():
                self._check.calibrate_on(source, held)

    @property
    def has_suspects(self) -> bool:
        """Whether the step looked at is to be assessed, and so may have to be undone."""
        return bool(self._suspects)

    @property
    def suspects(self) -> frozenset[Example]:
        """Who is to be assessed after the step looked at."""
        return frozenset(self._suspects)

    def suspect(self, examples: Mapping[Example, E]) -> None:
        """These are to be assessed, and nobody else: what all ranks saw of the step."""
        self._suspects = dict(examples)

    def begin(self) -> None:
        """A step begins."""
        self._suspects = {}

    def look(
        self,
        step: int,
        examples: Mapping[Example, E],
        predicted: tuple[Tensor, Tensor] | None,
        threshold_permille: int,
    ) -> None:
        """Adds the suspects among ``examples``, a step's or a micro-batch's, in the order they were presented."""
        if self._check is None:
            return
        due = step % self._every_steps == 0
        if step == self._last_step or (due and predicted is None):
            self._suspects |= examples
        elif predicted is not None:
            logits_BTV, target_BT = predicted
            closely = due or step >= self._last_pass_from
            floor_permille = threshold_permille // SUSPICION_DIVISOR if closely else threshold_permille
            found = self._check.glance(examples, hits_of(logits_BTV.detach(), target_BT).cpu(), floor_permille)
            self._suspects |= {example: examples[example] for example in found}

    def signals(self, model: nn.Module, threshold_permille: int) -> tuple[p.MemorizationSignal, ...]:
        """The suspects' signals under ``model``, in order of example."""
        return self._assessed(model, self._suspects, threshold_permille)

    def sweep(
        self,
        model: nn.Module,
        recited: Collection[Example],
        sources: Mapping[bytes, Sequence[E]],
        out: Collection[Example],
        threshold_permille: int,
    ) -> tuple[p.MemorizationSignal, ...]:
        """The signals above the threshold of the neighbours of ``recited`` examples, but for those ``out`` already."""
        near: dict[Example, E] = {}
        for distance in range(1, SWEPT_EXAMPLES):
            for source, example in sorted(recited):
                for number in (example - distance, example + distance):
                    known = (source, number) in recited or (source, number) in out
                    if 0 <= number < len(sources[source]) and not known and len(near) < SWEPT_EXAMPLES:
                        near[source, number] = sources[source][number]
        found = self._assessed(model, near, threshold_permille)
        return tuple(signal for signal in found if signal.signal_permille > threshold_permille)

    def flagged_of_reserve(
        self, model: nn.Module, sources: Collection[bytes], threshold_permille: int
    ) -> tuple[int, int]:
        """How many reserved examples of these sources would be taken for recited, wrongly, and of how many."""
        reserve = {example: text for example, text in self._reserve.items() if example[0] in sources}
        found = self._assessed(model, reserve, threshold_permille)
        return sum(signal.signal_permille > threshold_permille for signal in found), len(reserve)

    def survey(
        self, model: nn.Module, examples: Mapping[Example, E], threshold_permille: int
    ) -> tuple[p.MemorizationSignal, ...]:
        """The signals of these examples, in order.

        Raises:
            ConfigError: the run checks no memorization.
        """
        if self._check is None:
            raise ConfigError("no memorization check was given to governed(memorization=...)")
        return self._assessed(model, examples, threshold_permille)

    def _assessed(
        self, model: nn.Module, examples: Mapping[Example, E], threshold_permille: int
    ) -> tuple[p.MemorizationSignal, ...]:
        if self._check is None:
            return ()
        found: dict[Example, int] = {}
        names = sorted(examples)
        try:
            for first in range(0, len(names), self._most_at_once):
                chunk = {name: examples[name] for name in names[first : first + self._most_at_once]}
                found |= self._check.signals(model, chunk, threshold_permille)
        finally:
            part_again(model)
        return tuple(
            p.MemorizationSignal(source, example, permille) for (source, example), permille in sorted(found.items())
        )
