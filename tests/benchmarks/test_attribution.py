"""What the attribution benchmark measures with: a flattering score, or a LoRA that is none, would make it a fiction."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def repeats() -> Iterator[ModuleType]:
    """``repeats.py``, which finds its neighbours as it does when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.syspath_prepend(BENCHMARKS / "attribution")
        yield importlib.import_module("repeats")
    for name in ("harness", "setting", "repeats"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def setting(repeats: ModuleType) -> ModuleType:
    return sys.modules["setting"]


def test_scores_that_foretell_the_order_of_outcomes_get_one_and_the_opposite_minus_one(repeats: ModuleType) -> None:
    draw = np.random.default_rng(1)
    scores_QS, kept_KS = draw.normal(size=(3, 8)), (draw.random((40, 8)) < 0.5).astype(float)
    outcomes_KQ = np.exp(kept_KS @ scores_QS.T)
    assert repeats.linear_datamodeling_score(scores_QS, kept_KS, outcomes_KQ) == pytest.approx(1.0)
    assert repeats.linear_datamodeling_score(-scores_QS, kept_KS, outcomes_KQ) == pytest.approx(-1.0)
    assert abs(repeats.linear_datamodeling_score(draw.normal(size=(3, 8)), kept_KS, outcomes_KQ)) < 0.9


def test_equal_predictions_share_a_rank(repeats: ModuleType) -> None:
    kept_KS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    found = repeats.linear_datamodeling_score(np.array([[1.0, 1.0]]), kept_KS, np.array([[1.0], [2.0], [3.0], [0.0]]))
    assert found == pytest.approx(np.corrcoef([2.5, 2.5, 4.0, 1.0], [2.0, 3.0, 4.0, 1.0])[0, 1])


def test_lora_changes_nothing_at_first_and_is_all_that_is_tuned(setting: ModuleType) -> None:
    torch.manual_seed(0)
    model = setting.ByteModel(setting.CONFIG)
    tokens_BT = torch.arange(40).reshape(2, 20)
    expected, linears = model(tokens_BT), sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    setting.adapt(model, 0)
    assert torch.equal(model(tokens_BT), expected)
    tuned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(tuned) == 2 * linears
    assert all(".lora_A." in name or ".lora_B." in name for name in tuned)


def test_an_order_takes_every_row_once_an_epoch_and_another_seed_takes_another(setting: ModuleType) -> None:
    order = setting.order_of(256, "0")
    steps = len(order) // setting.EPOCHS
    for epoch in range(setting.EPOCHS):
        rows = [row for step in order[epoch * steps : (epoch + 1) * steps] for row in step]
        assert sorted(rows) == list(range(256))
    assert setting.order_of(256, "0") == order != setting.order_of(256, "1")


def test_an_average_run_takes_each_subset_in_orders_of_its_own(repeats: ModuleType, setting: ModuleType) -> None:
    model = setting.ByteModel(setting.CONFIG)
    held = setting.Setting(
        setting.FULL,
        model,
        torch.zeros(256, 2),
        (),
        (),
        setting.order_of(256, "0"),
        False,
        setting.Tuning.FULL,
        32,
        1e-3,
    )
    asked, *_ = repeats._asked(held, 0)
    runs = repeats._runs(held, asked, 0)
    single, averaged = runs[: len(asked.kept)], runs[len(asked.kept) :]
    assert all(not seed for _, seed in single)
    assert [rows for rows, _ in averaged] == [rows for rows, _ in single for _ in range(setting.FULL.orders)]
    assert len({seed for _, seed in averaged}) == len(averaged)
    assert all(len(rows) == 128 for rows, _ in runs)


def test_facts_are_traced_and_sources_removed_in_a_tiny_shape() -> None:
    command = [sys.executable, str(BENCHMARKS / "attribution" / "scale.py"), "--quick", "--removals", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    figures = {figure["name"]: figure for figure in json.loads(finished.stdout)["figures"]}
    assert figures["facts whose own source ranks first, of 8"]["floor"] == ">= 8"
    assert figures["removals whose own fact goes the way predicted, of 2"]["floor"] == ">= 2"
