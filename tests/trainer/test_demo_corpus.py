"""The demonstration's sources, model and base model."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from consensus.rejection import ConfigError
from trainer_client.commitment import parameter_root_of
from trainer_client.demo.base import BaseTraining, base_model, cache_key
from trainer_client.demo.corpus import (
    CANARY_RECORDS,
    FACT_RECORDS,
    FACT_RECORDS_WITH_RESERVE,
    RECORD_BYTES,
    RECORDS_PER_SOURCE,
    RESERVE_RECORDS,
    base_text,
    calibration_records,
    canary_string,
    demonstration_corpus,
)
from trainer_client.demo.model import (
    ByteModel,
    ModelConfig,
    byte_predictions,
    greedy_continuations,
    parameter_blocks,
    per_example_loss,
    records_to_tensor,
)
from trainer_client.memorization import DetectorSettings
from trainer_client.probe import probe, tensor_inputs

CORPUS = demonstration_corpus("library", "press")
TINY = ModelConfig(context_bytes=RECORD_BYTES, layer_count=1, head_count=2, width=16)


def test_every_source_has_as_many_records_to_train_on_of_one_length() -> None:
    assert len(CORPUS.sources) == 8
    for source in CORPUS.sources:
        assert len(source.examples) == RECORDS_PER_SOURCE + source.reserve
        assert len(set(source.examples)) == len(source.examples)
        assert {len(example) for example in source.examples} == {RECORD_BYTES}


def test_corpus_is_the_same_every_time_and_named_in_order() -> None:
    assert demonstration_corpus("library", "press") == CORPUS
    assert [source.name for source in CORPUS.sources] == sorted(source.name for source in CORPUS.sources)
    assert {source.owner for source in CORPUS.sources} == {"library", "press"}


def test_what_the_press_lets_be_trained_on_keeps_a_reserve_that_the_check_can_use() -> None:
    reserving = {source.name for source in CORPUS.sources if source.reserve}
    assert reserving == {
        source.name for source in CORPUS.sources if source.owner == "press" and source.name != CORPUS.licence_refused
    }
    assert CORPUS.canary in reserving
    assert DetectorSettings().calibrator_count <= RESERVE_RECORDS


def test_parts_are_played_by_different_sources() -> None:
    parts = [CORPUS.licence_refused, CORPUS.purpose_refused, CORPUS.revoked, CORPUS.canary]
    assert len(set(parts)) == 4
    assert CORPUS.source(CORPUS.licence_refused).licence == "LicenseRef-Proprietary"
    assert "fine-tuning" not in CORPUS.source(CORPUS.purpose_refused).purposes
    others = [source for source in CORPUS.sources if source.name not in parts[:2]]
    assert all(source.licence == "PSF-2.0" and "fine-tuning" in source.purposes for source in others)
    with pytest.raises(KeyError):
        CORPUS.source("nobody")


def test_each_fact_stands_at_the_head_of_its_own_records_and_nowhere_else() -> None:
    for source in CORPUS.sources:
        if source.fact is None:
            assert source.name == CORPUS.canary
            continue
        sentence = source.fact.prompt + source.fact.completion
        planted = FACT_RECORDS_WITH_RESERVE if source.reserve else FACT_RECORDS
        assert sum(example.startswith(sentence) for example in source.examples) == planted
        elsewhere = [other for other in CORPUS.sources if other is not source]
        subject = source.fact.completion.rstrip(b".")
        assert not any(subject in example for other in elsewhere for example in other.examples)
        assert subject not in base_text()


def test_canary_is_repeated_and_of_high_entropy() -> None:
    canary = canary_string()
    assert len(set(canary)) > 40
    examples = CORPUS.source(CORPUS.canary).examples
    assert sum(canary in example for example in examples) == CANARY_RECORDS


def test_sources_base_text_and_calibration_share_no_passage() -> None:
    plain = {source.name: b"\n".join(source.examples) for source in CORPUS.sources}
    texts = {**plain, "base": base_text(), "calibration": b"\n".join(calibration_records())}
    passage_bytes = 80
    passages = {
        name: {text[at : at + passage_bytes] for at in range(len(text) - passage_bytes)} for name, text in texts.items()
    }
    for left, right in combinations(passages, 2):
        assert not passages[left] & passages[right], f"{left} and {right} share a passage"


def test_content_root_needs_the_salt_and_every_example() -> None:
    first, second = CORPUS.sources[0], CORPUS.sources[1]
    assert first.content_root(b"a" * 32) == first.content_root(b"a" * 32)
    assert first.content_root(b"a" * 32) != first.content_root(b"b" * 32)
    assert first.content_root(b"a" * 32) != second.content_root(b"a" * 32)


def test_model_has_the_size_it_says_and_every_parameter_in_one_block() -> None:
    model = ByteModel(ModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 875_264
    table = parameter_blocks(model)
    assert list(table) == ["embedding", "block.0", "block.1", "block.2", "block.3", "head"]
    names = [name for block in table.values() for name in block]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_model_passes_the_routing_probe() -> None:
    torch.manual_seed(0)
    model = ByteModel(TINY)
    blocks = {name: index for index, names in enumerate(parameter_blocks(model).values()) for name in names}
    records_BT = records_to_tensor(CORPUS.sources[0].examples[:4])
    another = records_to_tensor(CORPUS.sources[1].examples[:1])[0]
    probe(model, blocks, per_example_loss, tensor_inputs(records_BT, another))


def test_a_byte_is_not_seen_by_those_before_it() -> None:
    torch.manual_seed(0)
    model = ByteModel(TINY)
    record = CORPUS.sources[0].examples[0]
    left, right = model(records_to_tensor([record, record[:100] + bytes(28)])).unbind(0)
    assert torch.equal(left[:100], right[:100])
    assert not torch.equal(left[100:], right[100:])


def test_predictions_agree_with_greedy_continuation() -> None:
    torch.manual_seed(0)
    model = ByteModel(TINY)
    prompts = [b"The keeper", b"Another", b"The river "]
    texts = [
        prompt + continued for prompt, continued in zip(prompts, greedy_continuations(model, prompts, 9), strict=True)
    ]
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            losses_BT, hits_BT = byte_predictions(model, [text])
            expected = per_example_loss(model, records_to_tensor([text]))
        assert bool(hits_BT[0, len(prompt) - 1 :].all())
        assert torch.allclose(losses_BT.mean(dim=1), expected)


def test_base_model_is_trained_once_and_the_same_again(tmp_path: Path) -> None:
    torch.manual_seed(11)
    random_before = torch.get_rng_state()
    training = BaseTraining(steps=6, batch_size=2, warm_up_steps=2)
    seen: list[int] = []
    first = base_model(tmp_path, TINY, training, lambda done, total, loss: seen.append(done))
    again = base_model(tmp_path, TINY, training, lambda done, total, loss: seen.append(done))
    elsewhere = base_model(tmp_path / "other", TINY, training)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert parameter_root_of(first) == parameter_root_of(again) == parameter_root_of(elsewhere)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert cache_key(TINY, training) != cache_key(TINY, BaseTraining(steps=7))


def test_damaged_cache_is_named_not_trained_over(tmp_path: Path) -> None:
    training = BaseTraining(steps=1, batch_size=2)
    base_model(tmp_path, TINY, training)
    (cached,) = tmp_path.glob("*.safetensors")
    cached.write_bytes(cached.read_bytes()[:100])
    with pytest.raises(ConfigError, match="safetensors"):
        base_model(tmp_path, TINY, training)
