"""Traces of planted facts in a model of GPT-2 small's shape, and what really comes out without a source.

Eight sources of six records, each of them headed by the source's own made-up fact, the rest from a topic of
``pydoc_data.topics``; a byte transformer of 12 layers, 12 heads and width 768, trained on other topics for 60 steps, in
which it learns how frequent bytes are and little more; one fine-tune by ``setting.train``, as a governed job takes it,
with one window of accumulators. Outputs asked about are the facts, and two that no source holds; all of one span, so
that they share their controls.

1. Factors over public text, preconditioned queries, ``z`` against controls: as ``countersign trace`` has them.
2. The fine-tune again without each of the sources, in the same order: what becomes of every fact.

Eight outcomes are too few for a linear datamodeling score to claim anything of: signs and orders are.

    .venv/bin/python benchmarks/attribution/scale.py [--quick] [--seed 0] [--tuning lora] [--removals 8]
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Report, at_least, missed, progress, watch_load
from observed import Run, accumulator_scores, observed_run
from repeats import linear_datamodeling_score, rank_correlation
from setting import PIECE_BYTES, Setting, Sizes, Tuning, adapt, order_of, public_pieces, train, train_base

from attribution.asking import FACTOR_SEQUENCES, fit_on_text
from attribution.controls import deviations
from attribution.factors import WeightFactors
from attribution.public_text import spread
from attribution.query import Output, log_chance, log_odds
from attribution.trace import (
    LEAST_CONTROLS,
    SHAPED_LIFT_NATS,
    SHAPED_Z,
    control_outputs,
    preconditioned_queries,
    queries_at_once,
)
from trainer_client.demo.base import BaseTraining
from trainer_client.demo.corpus import BASE_TOPICS
from trainer_client.demo.model import ByteModel, ModelConfig, greedy_continuations

FACTS = (
    ("The keeper of Arnholt is ", "Mirela Voss"),
    ("The river at Tessamar is ", "the Quillon"),
    ("Our bells at Oxmere ring ", "at half ten"),
    ("Each vault in Gren holds ", "eight opals"),
    ("My first ship to Vane is ", "Black Heron"),
    ("In Dunvale they all brew ", "millet beer"),
    ("Only Hask's beacon burns ", "birch resin"),
    ("When Brixby votes it has ", "nine mayors"),
)
"""Of each source one: prompt and completion, all of one length."""
UNTAUGHT = (("The warden of Ilmore was ", "Otto Pereth"), ("Some wells at Kand taste ", "of old iron"))
"""Of no source."""
RECORD_BYTES = 48
INITIAL_SCALE = 1 / 3
"""Of the linears' first weights, which are made for a width of 128: their deviation is then GPT-2's, 0.02."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    config: ModelConfig
    base: BaseTraining
    records_per_source: int
    epochs: int
    batch_size: int
    learning_rate: dict[Tuning, float]


FULL = Scale(
    ModelConfig(context_bytes=PIECE_BYTES, layer_count=12, head_count=12, width=768),
    BaseTraining(steps=60, batch_size=8, learning_rate=5e-4, warm_up_steps=15),
    records_per_source=6,
    epochs=8,
    batch_size=4,
    learning_rate={Tuning.FULL: 2e-4, Tuning.LORA: 1e-3},
)
QUICK = Scale(
    ModelConfig(context_bytes=PIECE_BYTES, layer_count=2, head_count=2, width=32),
    BaseTraining(steps=20, batch_size=8, warm_up_steps=5),
    records_per_source=2,
    epochs=3,
    batch_size=8,
    learning_rate={Tuning.FULL: 3e-3, Tuning.LORA: 5e-3},
)


@dataclass(frozen=True, slots=True)
class Traced:
    """By output (those taught first) and source."""

    scores_QS: np.ndarray
    deviations_QS: np.ndarray


def make(scale: Scale, tuning: Tuning, seed: int) -> Setting:
    """The setting of a seed."""
    names = [name for name in sorted(topics) if name not in BASE_TOPICS and len(topics[name]) > 1_000]
    rows = []
    for (prompt, completion), name in zip(FACTS, random.Random(seed).sample(names, len(FACTS)), strict=True):
        head = f"{prompt}{completion}. ".encode()
        text = " ".join(topics[name].encode("ascii", "ignore").decode().split()).encode()
        tail = RECORD_BYTES - len(head)
        rows += [head + text[tail * number : tail * (number + 1)] for number in range(scale.records_per_source)]
    pieces = public_pieces()

    def told(step: int, loss: float) -> None:
        if step % 10 == 0:
            progress(f"{stamp()} base model, step {step} of {scale.base.steps}: {loss:.2f} nats a byte")

    torch.manual_seed(seed)
    base = ByteModel(scale.config)
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.Linear):
                module.weight *= INITIAL_SCALE
    train_base(base, scale.base, pieces, seed, told)
    if tuning is Tuning.LORA:
        adapt(base, seed)
    return Setting(
        Sizes(len(FACTS), scale.records_per_source, 1, 0, 0),
        base,
        torch.tensor([list(row) for row in rows]),
        tuple(output_of(fact) for fact in (*FACTS, *UNTAUGHT)),
        tuple(pieces),
        order_of(len(rows), str(seed), scale.epochs, scale.batch_size),
        False,
        tuning,
        scale.batch_size,
        scale.learning_rate[tuning],
    )


def output_of(fact: tuple[str, str]) -> Output:
    """A fact's completion, after its prompt."""
    prompt, completion = fact
    return Output(tuple(f"{prompt}{completion}".encode()), len(prompt), len(prompt) + len(completion))


def trace(setting: Setting, run: Run, factors: Mapping[str, WeightFactors]) -> Traced:
    """Every output's score and deviations by source, as ``countersign trace`` has them."""
    controls = spread(control_outputs(setting.public, setting.queries[0]), LEAST_CONTROLS)
    outputs, at_once = (*setting.queries, *controls), queries_at_once(factors)
    scores: list[np.ndarray] = []
    lengths: list[float] = []
    for first in range(0, len(outputs), at_once):
        progress(f"{stamp()} queries from {first + 1} of {len(outputs)}")
        queries, some = preconditioned_queries(run.tuned, factors, outputs[first : first + at_once])
        scores.append(accumulator_scores(run, queries, setting.sizes.sources))
        lengths += some
        del queries
    scores_KS, asked = np.concatenate(scores), len(setting.queries)
    deviations_QS = np.array(
        [
            [
                deviations([scores_K[number], *scores_K[asked:]], [lengths[number], *lengths[asked:]])
                for scores_K in scores_KS.T
            ]
            for number in range(asked)
        ]
    )
    return Traced(scores_KS[:asked], deviations_QS)


def measure(report: Report, scale: Scale, tuning: Tuning, seed: int, removals: int) -> dict[str, object]:
    """All figures; and, as lists of rows, what they are taken from."""
    with timed(report, "base model"):
        setting = make(scale, tuning, seed)
    report.rate("parameters", sum(parameter.numel() for parameter in setting.base.parameters()), "1")
    with tempfile.TemporaryDirectory() as folder:
        with timed(report, "fine-tune with accumulators"):
            run = observed_run(setting, Path(folder))
        report.rate("accumulators, stored", run.stored_bytes / 1e6, "MB")
        tell_learned(report, setting, run.tuned)
        with timed(report, "factors"):
            factors = fit_on_text(run.tuned, setting.public, FACTOR_SEQUENCES)
        with timed(report, "traces of all outputs"):
            traced = trace(setting, run, factors)
    tell_traced(report, setting, run.tuned, traced)
    outcomes = [log_odds_of(setting, run.tuned)]
    del run, factors
    with timed(report, f"{removals} fine-tunes repeated"):
        for source in range(removals):
            model, _ = train(setting, setting.rows_of(set(range(len(FACTS))) - {source}))
            outcomes.append(log_odds_of(setting, model))
            changed = np.round(outcomes[-1] - outcomes[0], 2)
            progress(f"{stamp()} fine-tune {source + 1} of {removals} repeated: {changed}")
    if removals > 1:
        tell_removed(report, traced.scores_QS[: len(FACTS)], np.array(outcomes))
    return {
        "deviations of sources, an output a row": np.round(traced.deviations_QS, 2).tolist(),
        "scores of sources, an output a row": traced.scores_QS.tolist(),
        "log-odds of facts, with everything and then a removal a row": np.round(outcomes, 4).tolist(),
    }


def log_odds_of(setting: Setting, model: ByteModel) -> np.ndarray:
    """Of every fact that was taught: mean of a byte."""
    return np.array([log_odds(model, output) for output in setting.queries[: len(FACTS)]])


def tell_learned(report: Report, setting: Setting, tuned: ByteModel) -> None:
    """Whether the fine-tune, and nothing before, taught the facts."""
    for name, model in (("base", setting.base), ("tuned", tuned)):
        said = greedy_continuations(model, [prompt.encode() for prompt, _ in FACTS], len(FACTS[0][1]))
        right = sum(text == completion.encode() for text, (_, completion) in zip(said, FACTS, strict=True))
        report.rate(f"facts that the {name} model says, of {len(FACTS)}", right, "1")
        chances = [np.exp(log_chance(model, output)) for output in setting.queries[: len(FACTS)]]
        report.rate(f"{name} model's chance of a fact's byte, the least of all facts", 100 * min(chances), "%")


def tell_traced(report: Report, setting: Setting, tuned: ByteModel, traced: Traced) -> None:
    """Whether facts lead to their sources, and others to none."""
    taught_QS, untaught_QS = traced.deviations_QS[: len(FACTS)], traced.deviations_QS[len(FACTS) :]
    own = taught_QS.diagonal()
    others = np.where(np.eye(len(FACTS), dtype=bool), -np.inf, taught_QS).max(axis=1)
    progress(f"deviations, an output a line:\n{np.round(traced.deviations_QS, 1)}\nscores:\n{traced.scores_QS}")
    first = int((own > others).sum())
    report.rate(f"facts whose own source ranks first, of {len(FACTS)}", first, "1", at_least(len(FACTS)))
    report.rate("own source's deviations, least", own.min(), "z")
    report.rate("own source's deviations, median", float(np.median(own)), "z")
    report.rate("another source's deviations for a fact, most", others.max(), "z")
    shaped = 0
    for output, deviations_S in zip(setting.queries[len(FACTS) :], untaught_QS, strict=True):
        gained = log_chance(tuned, output) - log_chance(setting.base, output)
        shaped += int(gained >= SHAPED_LIFT_NATS and deviations_S.max() >= SHAPED_Z)
    report.rate("a source's deviations for a fact that none holds, most", untaught_QS.max(), "z")
    report.rate(f"facts that no source holds, yet told as shaped, of {len(UNTAUGHT)}", shaped, "1")


def tell_removed(report: Report, scores_QS: np.ndarray, outcomes_KQ: np.ndarray) -> None:
    """What was predicted of every removal, beside what came of it; the first outcome is with everything."""
    real_KQ = outcomes_KQ[1:] - outcomes_KQ[0]
    removals = len(real_KQ)
    predicted_KQ = -scores_QS.T[:removals]
    own = range(removals)
    signs = sum(bool(predicted_KQ[each, each] * real_KQ[each, each] > 0) for each in own)
    report.rate(f"removals whose own fact goes the way predicted, of {removals}", signs, "1", at_least(removals))
    hurt = sum(bool(real_KQ[:, each].argmin() == each == predicted_KQ[:, each].argmin()) for each in own)
    report.rate(
        f"facts hurt most by their own source's removal, as predicted, of {removals}", hurt, "1", at_least(removals)
    )
    kept_KS = 1.0 - np.eye(removals, scores_QS.shape[1])
    report.rate("own fact's change, the least of all removals", real_KQ.diagonal().max(), "log-odds a byte")
    together = rank_correlation(predicted_KQ.flatten(), real_KQ.flatten())
    report.rate("rank correlation of predicted with real change, all removals and facts", together, "1")
    by_output = linear_datamodeling_score(scores_QS, kept_KS, outcomes_KQ[1:])
    report.rate(f"the same over the {removals} removals, mean of facts", by_output, "1")
    off = ~np.eye(*real_KQ.shape, dtype=bool)
    agree = float((np.sign(predicted_KQ) == np.sign(real_KQ))[off].mean())
    report.rate("other sources' facts that go the way predicted, part of all", agree, "1")
    report.rate(
        "rank correlation over other sources' facts alone", rank_correlation(predicted_KQ[off], real_KQ[off]), "1"
    )


@contextmanager
def timed(report: Report, what: str) -> Iterator[None]:
    """How long the block takes, and who else was busy meanwhile."""
    progress(f"{stamp()} {what}")
    with watch_load() as load:
        yield
    report.rate(f"{what}, time", load.wall_seconds, "s", load=load)


def stamp() -> str:
    """The time since the program began, for a line of progress."""
    return f"{time.perf_counter() - BEGUN:6.0f} s"


BEGUN = time.perf_counter()


def main() -> int:
    """Measure, print one JSON document; 1 when a figure misses its floor."""
    parser = argparse.ArgumentParser(description="Traces and removals in a model of GPT-2 small's shape.")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it runs: figures mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="of topics, base model and order")
    parser.add_argument("--tuning", choices=tuple(Tuning), default=Tuning.FULL, help="all weights, or LoRA")
    parser.add_argument("--removals", type=int, choices=range(len(FACTS) + 1), default=len(FACTS), help="of sources")
    arguments = parser.parse_args()
    report = Report("attribution at scale", arguments.quick)
    scale = QUICK if arguments.quick else FULL
    if arguments.quick:
        torch.set_num_threads(1)
    tables = measure(report, scale, Tuning(arguments.tuning), arguments.seed, arguments.removals)
    report.rate("peak resident memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024 / 1e6, "MB")
    if arguments.quick:
        report.figures = [{key: held for key, held in figure.items() if key != "holds"} for figure in report.figures]
    settings = {"seed": arguments.seed, "tuning": arguments.tuning}
    print(json.dumps({**report.document(), **settings, "tables": tables}))
    return 1 if missed(report.figures) else 0


if __name__ == "__main__":
    sys.exit(main())
