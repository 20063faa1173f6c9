"""Schedules in words: what they were made with, and nothing that moves."""

from functools import partial

import torch
from torch import nn
from torch.optim import lr_scheduler

from trainer_client.schedule import schedule_settings


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=0.1)


def warming(steps: int, step: int) -> float:
    return min(1.0, (step + 1) / steps)


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
        self.rates = [0.1, adamw()]
        self.note = "x" * 5_000

    def get_last_lr(self) -> list[float]:
        return [0.1]


def test_wrapped_schedule_is_named_and_what_is_no_setting_left_out() -> None:
    found = schedule_settings(Own(lr_scheduler.StepLR(adamw(), 7)))
    assert found["scheduler.scheduler.step_size"] == "7"
    assert not {"scheduler.table", "scheduler.rates"} & found.keys()
    assert len(found["scheduler.note"]) == 1_000
