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
    for name in ("assignment-letters", "debugger-manual")
    for example in CORPUS.source(name).examples
    if CORPUS.source(name).fact.prompt not in example
)
CANARY = tuple(example for example in CORPUS.source(CORPUS.canary).examples if canary_string() in example)
HELD_OUT = calibration_records()


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


def test_too_few_twins_are_refused(models: tuple[ByteModel, ByteModel]) -> None:
    with pytest.raises(InvariantBroken, match="held-out"):
        MemorizationDetector(models[0], HELD_OUT[:3], byte_predictions, DetectorSettings())
