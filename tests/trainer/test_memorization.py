"""A model that recites is caught; one that learned ordinary text is not."""

import copy

import pytest
import torch

from consensus.rejection import InvariantBroken
from trainer_client.demo.base import BaseTraining, train_base
from trainer_client.demo.corpus import RECORD_BYTES, calibration_records, canary_string, demonstration_corpus
from trainer_client.demo.model import ByteModel, ModelConfig, byte_predictions, per_example_loss, records_to_tensor
from trainer_client.memorization import DetectorSettings, MemorizationDetector, MemorizationReport

THRESHOLD_PERMILLE = 800
CORPUS = demonstration_corpus("library", "press")
ORDINARY = tuple(
    example
    for name in ("import-handbook", "debugger-manual")
    for example in CORPUS.source(name).examples
    if CORPUS.source(name).fact.prompt not in example
)
CANARY = tuple(example for example in CORPUS.source(CORPUS.canary).examples if canary_string() in example)[:16]
HELD_OUT = calibration_records()
SOURCE = bytes([1]) * 32


def fine_tuned(base: ByteModel, examples: tuple[bytes, ...], steps: int) -> ByteModel:
    model = copy.deepcopy(base)
    records_BT = records_to_tensor(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        rows = [(step * 8 + offset) % len(examples) for offset in range(8)]
        optimizer.zero_grad()
        per_example_loss(model, records_BT[rows]).mean().backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def models() -> tuple[ByteModel, ByteModel]:
    """A small base model, and the same one fine-tuned on ordinary text and canaries."""
    torch.set_num_threads(1)
    config = ModelConfig(context_bytes=RECORD_BYTES, layer_count=2, head_count=2, width=64)
    base = train_base(config, BaseTraining(steps=80, batch_size=4))
    half = len(ORDINARY) // 2
    triples = zip(CANARY, ORDINARY[:half], ORDINARY[half:], strict=True)
    return base, fine_tuned(base, tuple(example for triple in triples for example in triple), 160)


@pytest.fixture(scope="module")
def detector(models: tuple[ByteModel, ByteModel]) -> MemorizationDetector:
    return MemorizationDetector(models[0], HELD_OUT[:24], byte_predictions)


def test_repeated_canary_is_caught(models: tuple[ByteModel, ByteModel], detector: MemorizationDetector) -> None:
    report = detector.assess(models[1], CANARY)
    assert [example.position for example in report.above(THRESHOLD_PERMILLE)] == list(range(len(CANARY)))
    assert report.maximum_permille == 1000


def test_ordinary_training_text_is_not_caught(
    models: tuple[ByteModel, ByteModel], detector: MemorizationDetector
) -> None:
    report = detector.assess(models[1], ORDINARY)
    assert report.above(THRESHOLD_PERMILLE) == ()
    assert report.maximum_permille < THRESHOLD_PERMILLE // 2


def test_held_out_text_is_not_caught(models: tuple[ByteModel, ByteModel], detector: MemorizationDetector) -> None:
    assert detector.assess(models[1], HELD_OUT[24:48]).maximum_permille < THRESHOLD_PERMILLE // 2


def test_base_model_against_itself_has_no_signal(models: tuple[ByteModel, ByteModel]) -> None:
    detector = MemorizationDetector(models[0], HELD_OUT[:24], byte_predictions)
    report = detector.assess(models[0], CANARY)
    assert report == MemorizationReport((), 0, len(CANARY), 0)


def test_repetitive_text_is_set_aside_and_counted(
    models: tuple[ByteModel, ByteModel], detector: MemorizationDetector
) -> None:
    report = detector.assess(models[1], [b"-=" * 64, CANARY[0]])
    assert report.set_aside_count == 1
    assert [example.position for example in report.flagged] == [1]
    assert detector.assess(models[1], [b"-=" * 64]).maximum_permille == 0


def test_assessment_is_deterministic_and_leaves_the_model_alone(
    models: tuple[ByteModel, ByteModel], detector: MemorizationDetector
) -> None:
    tuned = models[1].train()
    tuned.blocks[0].eval()
    modes = [module.training for module in tuned.modules()]
    random_before = torch.get_rng_state()
    first = detector.assess(tuned, CANARY)
    assert detector.assess(tuned, CANARY) == first
    assert [module.training for module in tuned.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_before)


def test_too_few_calibrators_are_refused(models: tuple[ByteModel, ByteModel]) -> None:
    with pytest.raises(InvariantBroken, match="held-out"):
        MemorizationDetector(models[0], HELD_OUT[:3], byte_predictions, DetectorSettings())


def calibrated(base: ByteModel, reserve: tuple[bytes, ...]) -> MemorizationDetector:
    """A detector that holds the examples of ``SOURCE`` against these texts of it."""
    detector = MemorizationDetector(base, HELD_OUT[:24], byte_predictions)
    detector.calibrate_on(SOURCE, reserve)
    return detector


def above_threshold(detector: MemorizationDetector, model: ByteModel, texts: tuple[bytes, ...]) -> int:
    report = detector.assess(model, texts, THRESHOLD_PERMILLE, [SOURCE] * len(texts))
    return len(report.above(THRESHOLD_PERMILLE))


def test_canary_is_caught_against_the_reserve_of_its_source_and_the_reserve_is_not(
    models: tuple[ByteModel, ByteModel],
) -> None:
    reserve = HELD_OUT[24:56]
    detector = calibrated(models[0], reserve)
    assert above_threshold(detector, models[1], CANARY) == len(CANARY)
    assert above_threshold(detector, models[1], ORDINARY) == 0
    assert above_threshold(detector, models[1], reserve) == 0


def test_canary_is_caught_though_the_reserve_holds_it_as_well(models: tuple[ByteModel, ByteModel]) -> None:
    canary = canary_string()
    copies = tuple(canary + b" " + record[: RECORD_BYTES - len(canary) - 1] for record in HELD_OUT[24:56])
    assert above_threshold(calibrated(models[0], copies), models[1], CANARY) == len(CANARY)


def test_reserve_of_too_few_texts_leaves_the_public_ones(models: tuple[ByteModel, ByteModel]) -> None:
    base, tuned = models
    public = MemorizationDetector(base, HELD_OUT[:24], byte_predictions)
    few, many = (calibrated(base, HELD_OUT[24 : 24 + count]) for count in (23, 32))
    expected = public.figures(tuned, ORDINARY)
    assert few.figures(tuned, ORDINARY, [SOURCE] * len(ORDINARY)) == expected
    assert many.figures(tuned, ORDINARY, [SOURCE] * len(ORDINARY)) != expected
    assert many.figures(tuned, ORDINARY, [bytes(32)] * len(ORDINARY)) == expected


def test_figures_say_what_the_assessment_rests_on(models: tuple[ByteModel, ByteModel]) -> None:
    detector = calibrated(models[0], HELD_OUT[24:56])
    texts = (*CANARY[:4], *ORDINARY[:4], b"-=" * 64)
    figures = detector.figures(models[1], texts, [SOURCE] * len(texts))
    assert [each.is_recited(THRESHOLD_PERMILLE) for each in figures] == [True] * 4 + [False] * 5
    assert [each.is_set_aside for each in figures] == [False] * 8 + [True]
    assert all(each.drop > each.limit for each in figures[:4])
