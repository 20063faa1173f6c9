"""The measuring itself: a wrong quantile or a load that counts ourselves would make every figure a fiction."""

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_quantiles_are_samples_by_nearest_rank(harness: ModuleType) -> None:
    ordered = [float(number) for number in range(1, 101)]
    assert [harness.quantile(ordered, fraction) for fraction in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert harness.quantile([7.0], 0.99) == 7.0


def test_quantile_of_nothing_is_an_error_not_zero(harness: ModuleType) -> None:
    with pytest.raises(ValueError, match="no samples"):
        harness.quantile([], 0.5)


def test_waiting_for_the_disk_is_not_load_but_stolen_time_is(harness: ModuleType) -> None:
    assert harness.machine_ticks("cpu  1 2 4 1000 1000 8 16 32 64 128\ncpu0 9 9 9 9\n") == 63


def test_process_name_with_parenthesis_and_spaces_is_no_obstacle(harness: ModuleType) -> None:
    fields = " ".join(str(number) for number in range(5, 53))
    assert harness.process_ticks(f"42 (a) b (c) S 7 {fields}\n")[0] == 7
    assert harness.process_ticks("1 (x) S 7 0 0 0 0 0 0 0 0 0 10 20 30 40 0\n")[1] == 100


def test_own_work_is_not_outside_load(harness: ModuleType) -> None:
    with harness.watch_load() as load:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    assert load.own_seconds >= 0.2
    assert load.outside_seconds <= load.wall_seconds * (os.cpu_count() or 1) - load.own_seconds + 0.2


def test_missed_floor_counts_only_on_a_quiet_machine(harness: ModuleType) -> None:
    report = harness.Report("test", True)
    quiet, busy = harness.Load(1.0, 0.5, 0.0), harness.Load(1.0, 0.5, 0.9)
    report.rate("kept", 2_000, "events/s", harness.at_least(1_500), quiet)
    report.rate("missed", 1_000, "events/s", harness.at_least(1_500), quiet)
    report.rate("disturbed", 1_000, "events/s", harness.at_least(1_500), busy)
    report.samples(
        "tail", [1.0] * 98 + [500.0] * 2, "ms", {0.5: harness.at_most(60), 0.99: harness.at_most(120)}, quiet
    )
    assert harness.missed(report.figures) == ["missed", "tail"]
    assert report.figures[-2]["holds"] is True
    assert report.figures[-2]["p99"] == 500.0
