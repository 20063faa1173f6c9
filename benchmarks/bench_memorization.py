"""How well the memorization check tells what a model recites, pass by pass over the examples, and what that costs.

A small byte model is fine-tuned on one source, without governance and without undoing anything: ordinary records that
are shown once in each pass, planted ones shown several times in each, half of them ordinary text and half random
strings. The source keeps a reserve, drawn by lot as for a claim (``consensus/reserve.py``). After each pass:

* *recited* is what the model continues verbatim from a prompt of the text, by a greedy continuation made for that byte
  by byte, as far beyond the base model's own as the policy's threshold says. It shares nothing with the detector.
* the detector's figures of every text: trained ones, the reserve and more of the source's records that were never
  trained on, and text that the base model was trained on.

AUC is the chance that a recited text ranks above one never trained on: by signal, and where that is equal by how far
its drop is above its limit; and by the drop alone, which has not looked at any continuation. The model is small and its
passes few: what holds of larger ones has to be measured there.
"""

import argparse
import copy
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from harness import Report, at_least, at_most, progress, run_benchmark, watch_load
from torch import Tensor, nn

from consensus.portions import SourceClaim
from consensus.reserve import bound_of, reserved_among
from trainer_client.demo.base import BaseTraining, train_base
from trainer_client.demo.corpus import BASE_TOPICS, RECORD_BYTES, calibration_records, records_of
from trainer_client.demo.model import (
    ByteModel,
    ModelConfig,
    byte_predictions,
    loss_and_predictions,
    records_to_tensor,
)
from trainer_client.memorization import DetectorSettings, MemorizationDetector, StageFigures
from trainer_client.memorization_watch import DetectorCheck, MemorizationWatch
from trainer_client.record import Example

SOURCE = hashlib.sha256(b"the source").digest()
TOPICS = ("debugger", "import", "execmodel", "assignment", "comparisons")
THRESHOLD_PERMILLE = 600
BATCH_SIZE = 16
REPETITIONS = (4, 16, 64)
PROMPTS_EVERY_BYTES = 4
SETTINGS = DetectorSettings()
RECITED_BYTES = THRESHOLD_PERMILLE * SETTINGS.recital_bytes // 1_000 + 1
ROWS_AT_ONCE = 64
ALPHABET = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"


@dataclass(frozen=True, slots=True)
class Material:
    """Texts by what becomes of them; ``shown`` are trained texts with how often each is shown in a pass."""

    shown: dict[bytes, int]
    reserve: tuple[bytes, ...]
    never: tuple[bytes, ...]
    boilerplate: tuple[bytes, ...]

    @property
    def random(self) -> set[bytes]:
        """The trained random strings."""
        return {text for text in self.shown if not set(text) - set(ALPHABET)}

    @property
    def once(self) -> tuple[bytes, ...]:
        """What is shown once in a pass."""
        return tuple(text for text, times in self.shown.items() if times == 1)


def random_string(number: int) -> bytes:
    """A record of letters and digits, none like another."""
    drawn = hashlib.shake_256(b"planted %d" % number).digest(RECORD_BYTES)
    return bytes(ALPHABET[byte % len(ALPHABET)] for byte in drawn)


def material(ordinary: int, planted: int) -> Material:
    """Of so many ordinary records a tenth is never shown at all; ``planted`` records of each kind and repetition."""
    records = records_of(TOPICS)
    spread = [records[number * len(records) // ordinary] for number in range(ordinary)]
    never = tuple(spread[::10])
    source = [record for record in spread if record not in never]
    root = hashlib.sha256(b"".join(source)).digest()
    reserve_below = bound_of(root, len(source), max(32, len(source) * 2 // 100))
    claim = SourceClaim(
        "records", root, len(source), 1, "PSF-2.0", "licence", ("research",), "text", 0, 1, "", b"", reserve_below
    )
    reserved = set(reserved_among(claim, range(len(source))))
    trained = [record for number, record in enumerate(source) if number not in reserved]
    shown = dict.fromkeys(trained, 1)
    for number, times in enumerate(REPETITIONS * planted):
        shown[trained[number * len(trained) // (planted * len(REPETITIONS))]] = times
        shown[random_string(number)] = times
    return Material(
        shown=shown,
        reserve=tuple(source[number] for number in sorted(reserved)),
        never=never,
        boilerplate=records_of(BASE_TOPICS)[:: len(records_of(BASE_TOPICS)) // len(never)],
    )


def batches(shown: dict[bytes, int], number: int) -> Iterator[list[bytes]]:
    """A pass's records in batches, in an order of its own."""
    every = [(text, copy_of) for text, times in shown.items() for copy_of in range(times)]
    every.sort(key=lambda held: hashlib.sha256(b"%d %d" % (number, held[1]) + held[0]).digest())
    texts = [text for text, _ in every]
    return (texts[first : first + BATCH_SIZE] for first in range(0, len(texts), BATCH_SIZE))


@torch.no_grad()
def continued_bytes(model: nn.Module, texts: Sequence[bytes]) -> Tensor:
    """How many bytes a greedy continuation repeats of each text, from each prompt: ``[B, prompts]``."""
    starts = range(SETTINGS.prompt_bytes, RECORD_BYTES - RECITED_BYTES + 1, PROMPTS_EVERY_BYTES)
    text_RT = records_to_tensor(texts).repeat_interleave(len(starts), dim=0)
    place_R = torch.tensor(list(starts)).repeat(len(texts))
    continued_R = torch.zeros_like(place_R)
    open_R = torch.arange(len(place_R))
    while len(open_R):
        going = []
        for rows_R in open_R.split(ROWS_AT_ONCE):
            at_R = place_R[rows_R] + continued_R[rows_R]
            written_RT = text_RT[rows_R].masked_fill(torch.arange(RECORD_BYTES) >= at_R[:, None], 0)
            next_R = model(written_RT)[torch.arange(len(rows_R)), at_R - 1].argmax(dim=-1)
            right_R = next_R == text_RT[rows_R, at_R]
            continued_R[rows_R] += right_R.long()
            going.append(rows_R[right_R & (at_R + 1 < RECORD_BYTES)])
        open_R = torch.cat(going)
    return continued_R.view(len(texts), len(starts))


def auc(positive: Sequence[tuple[float, float]], negative: Sequence[tuple[float, float]]) -> float:
    """The chance that a positive ranks above a negative; half where they are equal."""
    pairs = [(above, below) for above in positive for below in negative]
    return sum((above > below) + 0.5 * (above == below) for above, below in pairs) / len(pairs)


def score(figures: StageFigures) -> tuple[float, float]:
    """What ranks a text: its signal, then how far its drop is above its limit."""
    return float(figures.signal_permille), figures.drop - figures.limit


def drops_of(figures: Mapping[bytes, StageFigures], texts: Sequence[bytes]) -> list[tuple[float, float]]:
    """What ranks texts by their drops alone."""
    return [(figures[text].drop - figures[text].limit, 0.0) for text in texts]


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """Fine-tune pass by pass, and hold the detector against what is recited after each."""
    torch.set_num_threads(1)
    passes, ordinary, planted = (3, 160, 1) if arguments.quick else (6, 420, 4)
    config = ModelConfig(context_bytes=RECORD_BYTES, layer_count=2, head_count=2, width=64)
    base = train_base(config, BaseTraining(steps=80 if arguments.quick else 400, batch_size=8))
    texts = material(ordinary, planted)
    subject = Subject(base, texts, passes)
    report.note(
        f"{len(texts.once)} records shown once a pass, {len(texts.shown) - len(texts.once)} shown "
        f"{' to '.join(map(str, (REPETITIONS[0], REPETITIONS[-1])))} times (half of them random strings), "
        f"{len(texts.reserve)} in reserve, {len(texts.never)} more of the source and {len(texts.boilerplate)} of the "
        f"base model's own never shown; threshold {THRESHOLD_PERMILLE} of 1,000, recited from {RECITED_BYTES} bytes on"
    )
    for number in range(1, passes + 1):
        subject.train_pass(report, number)
        subject.measure_pass(report, number)


class Subject:
    """A model in training and the detector that watches it."""

    def __init__(self, base: ByteModel, texts: Material, passes: int) -> None:
        self.base = base
        self.model = copy.deepcopy(base)
        self.texts = texts
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        held_out = calibration_records()[:32]
        self.detector = MemorizationDetector(base, held_out, byte_predictions, SETTINGS)
        self.detector.calibrate_on(SOURCE, texts.reserve)
        self.public = MemorizationDetector(base, held_out, byte_predictions, SETTINGS)
        self.step = 0
        shown_count = sum(texts.shown.values())
        self.watch: MemorizationWatch[bytes] = MemorizationWatch(
            DetectorCheck(self.detector),
            every_steps=1,
            last_step=passes * -(-shown_count // BATCH_SIZE),
            most_at_once=BATCH_SIZE,
            last_pass_from=1 << 30,
        )
        self.watch.keep_apart({(SOURCE, -1 - number): text for number, text in enumerate(texts.reserve)})
        self.found: set[bytes] = set()
        self.negatives = (*texts.reserve, *texts.never, *texts.boilerplate)
        self.continued_by_base_BP = continued_bytes(base, [*texts.shown, *self.negatives])

    def train_pass(self, report: Report, number: int) -> None:
        """One pass, watched as a governed run watches it; what is found recited is left in training all the same."""
        training_seconds = watching_seconds = 0.0
        with watch_load() as load:
            for batch in batches(self.texts.shown, number):
                self.step += 1
                begun = time.perf_counter()
                self.optimizer.zero_grad()
                loss_B, predicted = loss_and_predictions(self.model, records_to_tensor(batch))
                loss_B.mean().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                trained = time.perf_counter()
                self._look(batch, predicted)
                training_seconds += trained - begun
                watching_seconds += time.perf_counter() - trained
            begun = time.perf_counter()
            flagged, of = self.watch.flagged_of_reserve(self.model, {SOURCE}, THRESHOLD_PERMILLE)
            watching_seconds += time.perf_counter() - begun
        name = f"pass {number}: time of the check, of training"
        report.rate(name, 100 * watching_seconds / training_seconds, "%", load=load)
        report.rate(f"pass {number}: taken for recited of {of} in reserve, as a run tells", flagged, "texts")

    def _look(self, batch: Sequence[bytes], predicted: tuple[Tensor, Tensor]) -> None:
        """What a run does about a step; what was found recited before is out, and not looked at again."""
        self.watch.begin()
        rows = [row for row, text in enumerate(batch) if text not in self.found]
        if not rows:
            return
        named: dict[Example, bytes] = {(SOURCE, row): batch[row] for row in rows}
        logits_BTV, target_BT = predicted
        self.watch.look(self.step, named, (logits_BTV[rows], target_BT[rows]), THRESHOLD_PERMILLE)
        for signal in self.watch.signals(self.model, THRESHOLD_PERMILLE):
            if signal.signal_permille > THRESHOLD_PERMILLE:
                self.found.add(batch[signal.example])

    def measure_pass(self, report: Report, number: int) -> None:
        """What is recited, and what the detector says of every text."""
        texts, negatives = self.texts, self.negatives
        shown, apart = list(texts.shown), (*texts.reserve, *texts.never)
        excess_BP = continued_bytes(self.model, [*shown, *negatives]) - self.continued_by_base_BP
        excess = zip((*shown, *negatives), excess_BP.amax(dim=1).tolist(), strict=True)
        recited = {text for text, size_bytes in excess if size_bytes >= RECITED_BYTES}
        progress(f"pass {number}: {len(recited)} texts recited")
        self.detector.forget_calibration()
        self.public.forget_calibration()
        own = dict(zip((*shown, *negatives), self.figures_of(self.detector, (*shown, *negatives)), strict=True))
        public = dict(zip(apart, self.figures_of(self.public, apart), strict=True))
        positives = [text for text in shown if text in recited]
        name = f"pass {number}"
        for kind, pool in (("random strings", texts.random), ("ordinary text", set(shown) - texts.random)):
            report.rate(f"{name}: recited by greedy continuation, {kind}", len(recited & pool), f"of {len(pool)}")
        flagged = {text for text, figures in own.items() if figures.is_recited(THRESHOLD_PERMILLE)}
        if positives:
            rank = auc([score(own[text]) for text in positives], [score(own[text]) for text in negatives])
            report.rate(f"{name}: AUC, recited against never trained", rank, "", at_least(0.99))
            rank = auc(drops_of(own, positives), drops_of(own, negatives))
            report.rate(f"{name}: AUC by drop alone, recited against never trained", rank, "", at_least(0.99))
            for of, found in (("of every text", flagged), ("of the steps as they went by", self.found)):
                share = len(found & set(positives)) / len(positives)
                bound = at_least(0.95) if found is flagged else None
                report.rate(f"{name}: recall of {len(positives)} recited, by a check {of}", share, "", bound)
        false = len(flagged & set(negatives))
        report.rate(
            f"{name}: false positives of {len(negatives)} never trained", false / len(negatives), "", at_most(0.01)
        )
        early = len((flagged - recited) & set(shown))
        report.rate(f"{name}: flagged of the trained and not recited from these prompts", early, f"of {len(shown)}")
        once = auc(drops_of(own, texts.once), drops_of(own, apart))
        report.rate(f"{name}: AUC by drop alone, trained once a pass against never trained", once, "")
        for of, figures in (("their own reserve", own), ("public text", public)):
            above = sum(figures[text].drop > figures[text].limit for text in apart) / len(apart)
            report.rate(f"{name}: never trained and above the 95 % quantile of {of}", 100 * above, "%")

    def figures_of(self, detector: MemorizationDetector, texts: Sequence[bytes]) -> tuple[StageFigures, ...]:
        """The detector's figures; ``public`` knows no source and answers by public text."""
        return detector.figures(self.model, texts, [SOURCE] * len(texts))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what the memorization check finds, misses and costs.")
    return run_benchmark("memorization", measure, parser)


if __name__ == "__main__":
    sys.exit(main())
