"""Measures with intervals, and what a governed run records of them."""

import hashlib
import json
import math
import random
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_node import FakeNode
from governed_fixtures import CAMPAIGN, STEPS, Scene, losses
from torch import Tensor, nn

from consensus import portions as p
from consensus.codec import encode
from consensus.event import CheckedEvent, Kind
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.review import AT_LEAST, AT_MOST, MICRO, DataSlice, Decision, Evaluation, Metric, Threshold, is_met
from trainer_client.evaluation import mean_metric, proportion_metric, slice_of, slice_of_file
from trainer_client.record import Example

SLICE = slice_of("validation", [b"one", b"two"])
SCRIPT = Path(__file__)


# Measures


def test_mean_of_a_sample_is_covered_at_about_the_confidence_asked_for() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(200):
        metric = mean_metric("m", [draw.gauss(5.0, 2.0) for _ in range(50)])
        covered += metric.low_micro <= 5 * MICRO <= metric.high_micro
    assert 180 <= covered <= 199


def test_mean_is_the_mean_and_comes_out_the_same_twice() -> None:
    draw = random.Random(1)
    values = [draw.random() for _ in range(100)]
    metric = mean_metric("m", values, at_most=0.75)
    assert metric == mean_metric("m", values, at_most=0.75)
    assert metric.value_micro == round(statistics.fmean(values) * MICRO)
    assert metric.low_micro < metric.value_micro < metric.high_micro
    assert (metric.confidence_permille, metric.method) == (950, "bootstrap")
    assert metric.threshold == Threshold(AT_MOST, 750_000)
    half_width = 1.96 * statistics.stdev(values) / 10 * MICRO
    assert metric.high_micro - metric.value_micro == pytest.approx(half_width, rel=0.15)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_proportion_has_wilsons_interval(successes: int, trials: int, low: float, high: float) -> None:
    metric = proportion_metric("p", successes, trials)
    assert metric.low_micro / MICRO == pytest.approx(low, abs=5e-5)
    assert metric.high_micro / MICRO == pytest.approx(high, abs=5e-5)


def test_proportion_of_everything_keeps_its_interval_within_one() -> None:
    metric = proportion_metric("p", 20, 20, at_least=0.8)
    assert metric.high_micro == MICRO
    assert is_met(metric)
    assert metric.threshold == Threshold(AT_LEAST, 800_000)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ([1.0], {}),
        ([], {}),
        ([1.0, math.nan], {}),
        ([1.0, math.inf], {}),
        ([1e10, 1e10], {}),
        ([1.0, 2.0], {"at_most": 1.0, "at_least": 1.0}),
        ([1.0, 2.0], {"at_most": 1e10}),
        ([1.0, 2.0], {"confidence": 1.0}),
    ],
)
def test_what_is_no_measure_is_refused_by_name(values: Sequence[float], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="metric 'm'"):
        mean_metric("m", values, **options)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2)])
def test_what_is_no_proportion_is_refused_by_name(successes: int, trials: int) -> None:
    with pytest.raises(ConfigError, match="metric 'p'"):
        proportion_metric("p", successes, trials)


def test_data_slice_names_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"content")
    assert slice_of_file("d", path, 3) == DataSlice("d", hashlib.sha256(b"content").digest(), 3)
    assert slice_of("d", [b"ab", b"c"]).sha256 != slice_of("d", [b"a", b"bc"]).sha256
    with pytest.raises(ConfigError, match="readable file"):
        slice_of_file("d", tmp_path / "none", 3)
    with pytest.raises(ConfigError):
        slice_of("d", [])
    with pytest.raises(ConfigError):
        slice_of_file("d", path, 0)


# In a run


def evaluations(scene: Scene) -> list[Evaluation]:
    found = [event.operation for event in scene.events(Kind.EVALUATION)]
    return [each for each in found if isinstance(each, Evaluation)]


def trained(scene: Scene, metrics: Mapping[int, Sequence[Metric]]) -> None:
    """A released run that evaluates after the steps named."""
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
            if batch.step in metrics:
                run.evaluate("held-out", metrics[batch.step], data=SLICE, script=SCRIPT)
        run.release(scene.directory / "tuned.safetensors")


def test_evaluation_is_bound_to_the_weights_after_the_last_step(scene: Scene) -> None:
    scene.register()
    metric = mean_metric("loss", [1.0, 2.0, 3.0], at_most=4.0)
    trained(scene, {3: [metric], STEPS: [metric, mean_metric("accuracy", [0.0, 1.0])]})
    first, last = evaluations(scene)
    steps = [event.operation for event in scene.events(Kind.STEP)]
    third = steps[2]
    assert isinstance(third, p.StepOperation)
    assert (first.steps, first.parameter_root) == (3, third.root_after)
    assert last.parameter_root == scene.node.head(CAMPAIGN).root
    assert [each.name for each in last.metrics] == ["accuracy", "loss"]
    assert (first.data, first.script_name) == (SLICE, "test_evaluation.py")
    assert first.script_sha256 == hashlib.sha256(SCRIPT.read_bytes()).digest()
    lines = [json.loads(line) for line in (scene.directory / "steps.jsonl").read_text().splitlines()]
    noted = next(line for line in lines if line["event"] == "evaluation")
    assert "'loss' is 2, " in noted["detail"]
    assert "at most 4: met" in noted["detail"]


def test_missed_threshold_bars_the_release_until_governance_accepts(scene: Scene) -> None:
    scene.register()
    with pytest.raises(Rejected) as refusal:
        trained(scene, {STEPS: [mean_metric("loss", [1.0, 2.0, 3.0], at_most=0.5)]})
    assert refusal.value.reason is Reason.FINDING_OPEN
    (finding,) = scene.node.head(CAMPAIGN).open_findings
    decide(scene.node, finding)
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        run.release(scene.directory / "tuned.safetensors")
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_refused_release_leaves_the_run_where_it_stood(scene: Scene) -> None:
    scene.register()
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        run.evaluate("held-out", [mean_metric("loss", [1.0, 2.0, 3.0], at_most=0.5)], data=SLICE, script=SCRIPT)
        with pytest.raises(Rejected) as refusal:
            run.release(scene.directory / "tuned.safetensors")
        assert refusal.value.reason is Reason.FINDING_OPEN
        (finding,) = scene.node.head(CAMPAIGN).open_findings
        decide(scene.node, finding)
        run.release(scene.directory / "tuned.safetensors")
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_campaign_can_be_abandoned_after_its_release_was_refused(scene: Scene) -> None:
    scene.register()
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        run.evaluate("held-out", [mean_metric("loss", [1.0, 2.0, 3.0], at_most=0.5)], data=SLICE, script=SCRIPT)
        with pytest.raises(Rejected):
            run.release(scene.directory / "tuned.safetensors")
        run.abandon("worse than before")
    assert scene.node.head(CAMPAIGN).closed == "abandoned"


def decide(node: FakeNode, finding: bytes, outcome: str = "accept") -> None:
    decision = p.SaltedPortion(bytes(32), encode(Decision(finding, outcome, "as agreed")))
    node.by_member("governance-1", Kind.DECISION, p.Portions(None, decision, None), campaign=CAMPAIGN)


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ([mean_metric("loss", [1.0, 2.0])] * 2, Reason.BAD_FIELD),
        ([], Reason.MALFORMED),
        ([mean_metric("long " * 30, [1.0, 2.0])], Reason.MALFORMED),
    ],
)
def test_evaluation_that_the_log_would_refuse_is_refused_before_it_is_recorded(
    scene: Scene, metrics: list[Metric], reason: Reason
) -> None:
    scene.register()
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
            if batch.step == 3:
                with pytest.raises(Rejected) as refusal:
                    run.evaluate("held-out", metrics, data=SLICE, script=SCRIPT)
                assert refusal.value.reason is reason
        run.release(scene.directory / "tuned.safetensors")
    assert evaluations(scene) == []
    assert scene.node.head(CAMPAIGN).rollbacks == 0


@pytest.mark.parametrize("at", [5, STEPS])
def test_evaluation_refused_by_the_log_costs_no_step_for_good(scene: Scene, at: int) -> None:
    scene.register()
    refused: list[bytes] = []

    def refuse_evaluations(event: CheckedEvent) -> Rejected | None:
        if event.entry.kind is Kind.EVALUATION and not refused:
            refused.append(event.id)
            return Rejected(Reason.OVERSIZED, "too many open findings")
        return None

    scene.node.refuse_step = refuse_evaluations
    metric = mean_metric("loss", [1.0, 2.0])
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
            if batch.step == at and not batch.replayed and not refused:
                run.evaluate("held-out", [metric], data=SLICE, script=SCRIPT)
        run.release(scene.directory / "tuned.safetensors")
    head = scene.node.head(CAMPAIGN)
    assert (head.closed, head.steps, len(refused)) == ("released", STEPS, 1)
    assert evaluations(scene) == []


def test_replayed_steps_are_not_evaluated_twice(scene: Scene) -> None:
    scene.register()
    refused: list[bytes] = []

    def refuse_step_eight_once(event: CheckedEvent) -> Rejected | None:
        operation = event.operation
        if isinstance(operation, p.StepOperation) and operation.index == 8 and not refused:
            refused.append(event.id)
            return Rejected(Reason.BAD_FIELD, "for the test")
        return None

    scene.node.refuse_step = refuse_step_eight_once
    scene.settings = replace(scene.settings, snapshot_every_steps=5)
    metric = mean_metric("loss", [1.0, 2.0])
    nothing: list[int] = []
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
            if run.evaluate("held-out", [metric], data=SLICE, script=SCRIPT) is None:
                nothing.append(batch.step)
        run.release(scene.directory / "tuned.safetensors")
    assert nothing
    assert [evaluation.steps for evaluation in evaluations(scene)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("died_after", ["the last step", "its evaluation"])
def test_run_that_died_near_its_end_is_evaluated_once(scene: Scene, died_after: str) -> None:
    scene.register()
    scene.settings = replace(scene.settings, snapshot_every_steps=1, checkpoint_every_steps=1)
    metric = mean_metric("loss", [1.0, 2.0])

    def run_and_evaluate(dies: bool) -> None:
        with scene.run() as run:
            for batch in run.batches():
                run.learn(losses(scene.model, batch.inputs))
                if batch.step == STEPS and dies and died_after == "the last step":
                    raise KeyboardInterrupt
            run.evaluate("held-out", [metric], data=SLICE, script=SCRIPT)
            if dies:
                raise KeyboardInterrupt
            run.release(scene.directory / "tuned.safetensors")

    with pytest.raises(KeyboardInterrupt):
        run_and_evaluate(True)
    run_and_evaluate(False)
    assert [evaluation.steps for evaluation in evaluations(scene)] == [STEPS]
    assert scene.node.head(CAMPAIGN).closed == "released"


# The memorization manifest


class Recites:
    """A check by which the model recites whatever ``examples`` names."""

    def __init__(self) -> None:
        self.examples: dict[Example, int] = {}

    def glance(self, shown: Mapping[Example, bytes], hits_BT: Tensor, floor: int) -> list[Example]:
        return []

    def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        return {example: permille for example, permille in self.examples.items() if example in shown}


def test_memorization_manifest_lists_every_example_shown_and_nothing_refused(scene: Scene) -> None:
    scene.register()
    check = Recites()
    scene.arguments["memorization"] = check
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        faint = (scene.sources["manual"], 3)
        check.examples = {faint: 120}
        signals = run.survey_memorization()
        run.release(scene.directory / "tuned.safetensors")
    assert [(signal.source, signal.example, signal.signal_permille) for signal in signals] == [(*faint, 120)]
    path = scene.directory / "memorization.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shown = {example for step in range(1, STEPS + 1) for example in scene.presented(step)}
    admitted = {(source.hex(), number) for source, number in shown if source != scene.sources["secret"]}
    assert {(line["source"], line["example"]) for line in lines} == admitted
    assert [line["signal_permille"] for line in lines if line["signal_permille"]] == [120]
    (evaluation,) = evaluations(scene)
    assert (evaluation.name, evaluation.data.examples) == ("memorization", len(admitted))
    assert evaluation.data.sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert evaluation.metrics[0].value_micro == 0


def test_example_recited_late_bars_the_release(scene: Scene) -> None:
    scene.register()
    check = Recites()
    scene.arguments["memorization"] = check

    def body() -> None:
        with scene.run() as run:
            for batch in run.batches():
                run.learn(losses(scene.model, batch.inputs))
            check.examples = {(scene.sources["manual"], 3): 900}
            run.survey_memorization()
            run.release(scene.directory / "tuned.safetensors")

    with pytest.raises(Rejected) as refusal:
        body()
    assert refusal.value.reason is Reason.FINDING_OPEN


def surveyed(scene: Scene, on_finding: Callable[[bytes], None], limit_seconds: float) -> None:
    """A run whose survey finds an example recited, which then waits for a decision; ``on_finding`` is told of it."""
    scene.register()
    check = Recites()
    scene.arguments |= {
        "memorization": check,
        "on_progress": lambda told: on_finding(bytes.fromhex(told.id)) if told.event == "finding" else None,
    }
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        check.examples = {(scene.sources["manual"], 3): 900}
        run.survey_memorization()
        run.wait_for_decisions(limit_seconds)
        run.release(scene.directory / "tuned.safetensors")


def test_run_that_waits_releases_once_governance_accepted_what_was_recited_late(scene: Scene) -> None:
    told: list[bytes] = []

    def decide_soon(finding: bytes) -> None:
        told.append(finding)
        threading.Timer(0.2, lambda: decide(scene.node, finding)).start()

    surveyed(scene, decide_soon, 60.0)
    (evaluation,) = scene.events(Kind.EVALUATION)
    assert told == [evaluation.id]
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_run_that_waits_ends_at_once_where_governance_rejects(scene: Scene) -> None:
    with pytest.raises(Rejected, match="governance rejected") as refusal:
        surveyed(scene, lambda finding: decide(scene.node, finding, "reject"), 600.0)
    assert refusal.value.reason is Reason.FINDING_OPEN
    assert scene.node.head(CAMPAIGN).closed == ""


def test_run_that_waits_in_vain_names_the_finding_and_can_be_taken_up(scene: Scene) -> None:
    scene.settings = replace(scene.settings, snapshot_every_steps=1, checkpoint_every_steps=1)
    findings: list[bytes] = []
    with pytest.raises(Rejected, match="no decision after 0 s about 1 findings") as refusal:
        surveyed(scene, findings.append, 0.0)
    assert refusal.value.reason is Reason.FINDING_OPEN
    assert findings[0].hex() in refusal.value.detail
    decide(scene.node, findings[0])
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        run.survey_memorization()
        run.wait_for_decisions(0.0)
        run.release(scene.directory / "tuned.safetensors")
    assert len(evaluations(scene)) == 1
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_survey_without_a_check_or_before_any_step_is_refused_by_name(scene: Scene) -> None:
    scene.register()
    with scene.run() as run:
        with pytest.raises(ConfigError, match="after the last step"):
            run.survey_memorization()
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        with pytest.raises(ConfigError, match="no memorization check"):
            run.survey_memorization()
