"""Schedules in words: what they were made with, and nothing that moves."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer_client.schedule import schedule_settings


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)


def warming(steps: int, step: int) -> float:
    return min(1.0, (step + 1) / steps)


@dataclass
class Warming:
    """Called in the place of a function; the number moves with it, for all that is known."""

    steps: int

    def __call__(self, step: int) -> float:
        return warming(self.steps, step)


class Halving:
    def __call__(self, step: int) -> float:
        return 0.5**step


def test_no_schedule_has_no_settings() -> None:
    assert schedule_settings(None) == {}


def test_numbers_it_was_made_with_are_named_and_stay_as_it_goes() -> None:
    optimizer = adamw()
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.01)
    expected = {
        "scheduler": "CosineAnnealingLR",
        "scheduler.T_max": "10",
        "scheduler.base_lrs": "[0.1]",
        "scheduler.eta_min": "0.01",
    }
    assert schedule_settings(schedule) == expected
    optimizer.step()
    schedule.step()
    assert schedule_settings(schedule) == expected


def test_restarts_are_named_as_they_began_and_stay_as_it_goes() -> None:
    optimizer = adamw()
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 3)
    expected = schedule_settings(schedule)
    assert (expected["scheduler.T_0"], expected["scheduler.T_mult"]) == ("2", "3")
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert schedule_settings(schedule) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda made: lr_scheduler.MultiStepLR(made, [3, 7]), lambda made: lr_scheduler.MultiStepLR(made, [3, 8])),
        (
            lambda made: lr_scheduler.OneCycleLR(made, 0.3, total_steps=10, pct_start=0.4),
            lambda made: lr_scheduler.OneCycleLR(made, 0.3, total_steps=10, pct_start=0.5),
        ),
        (
            lambda made: lr_scheduler.OneCycleLR(made, 0.3, total_steps=10, anneal_strategy="cos"),
            lambda made: lr_scheduler.OneCycleLR(made, 0.3, total_steps=10, anneal_strategy="linear"),
        ),
        (
            lambda made: lr_scheduler.CyclicLR(made, 0.1, 0.2, scale_fn=abs, cycle_momentum=False),
            lambda made: lr_scheduler.CyclicLR(made, 0.1, 0.2, scale_fn=float, cycle_momentum=False),
        ),
        (lambda made: lr_scheduler.LambdaLR(made, Warming(4)), lambda made: lr_scheduler.LambdaLR(made, Halving())),
        (
            lambda made: lr_scheduler.MultiStepLR(made, [*range(999), 1_000]),
            lambda made: lr_scheduler.MultiStepLR(made, [*range(999), 1_001]),
        ),
    ],
    ids=["milestones", "part of the cycle", "annealing", "scale", "objects", "many milestones"],
)
def test_schedules_that_were_made_otherwise_are_not_named_alike(
    one: Callable[[torch.optim.Optimizer], object], other: Callable[[torch.optim.Optimizer], object]
) -> None:
    assert schedule_settings(one(adamw())) == schedule_settings(one(adamw()))
    assert schedule_settings(one(adamw())) != schedule_settings(other(adamw()))


def test_milestones_are_listed_as_often_as_they_were_given() -> None:
    found = schedule_settings(lr_scheduler.MultiStepLR(adamw(), [7, 3, 7]))
    assert found["scheduler.milestones"] == "[3, 7, 7]"


@dataclass(slots=True)
class InSlots:
    """A schedule of the job's own without a dictionary."""

    steps: int = 0


def test_schedule_that_keeps_its_own_in_slots_is_named_by_its_class() -> None:
    assert schedule_settings(InSlots()) == {"scheduler": "InSlots"}


def test_function_is_named_with_what_was_bound_to_it() -> None:
    found = schedule_settings(lr_scheduler.LambdaLR(adamw(), partial(warming, 4)))
    assert found["scheduler.lr_lambdas"] == f"[{__name__}.warming(4)]"


def test_schedule_made_of_others_names_them() -> None:
    optimizer = adamw()
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.StepLR(optimizer, 3)]
    found = schedule_settings(lr_scheduler.SequentialLR(optimizer, parts, [5]))
    assert found["scheduler"] == "SequentialLR"
    assert found["scheduler.milestones"] == "[5]"
    assert found["scheduler.schedulers.0"] == "ConstantLR"
    assert found["scheduler.schedulers.0.factor"] == "0.5"
    assert found["scheduler.schedulers.1.step_size"] == "3"


class Own:
    """A schedule of the job's own, which holds what is no setting."""

    def __init__(self, inner: object) -> None:
        self.scheduler = inner
        self.table = {"warm": 1.0}
        self.tables = {"warm": adamw()}
        self.rates = [0.1, adamw()]
        self.note = "x" * 5_000

    def get_last_lr(self) -> list[float]:
        return [0.1]


def test_wrapped_schedule_is_named_and_what_is_no_setting_left_out() -> None:
    found = schedule_settings(Own(lr_scheduler.StepLR(adamw(), 7)))
    assert found["scheduler.scheduler.step_size"] == "7"
    assert found["scheduler.table"] == "{'warm': 1.0}"
    assert not {"scheduler.tables", "scheduler.rates"} & found.keys()
    assert len(found["scheduler.note"]) == 1_000
