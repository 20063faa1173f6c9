"""A plain loop whose model and optimizer went through Accelerate's ``prepare``; the batches are the run's own."""

from collections.abc import Iterator

import governed_fixtures
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from governed_fixtures import CAMPAIGN, STEPS, Scene, TinyModel, collate, losses, same_bits, weights
from torch import nn

from consensus.portions import BlockWeight, ClassRule
from trainer_client.governed import GovernedRun, governed
from trainer_client.replay import ReplayJob, read_logged_campaign, replay

CLASSES = (
    ClassRule("documentation", 1_000, (BlockWeight("layers.0", 0),)),
    ClassRule("news", 1_000, (BlockWeight("layers.0", 0),)),
)
"""One parameter block is closed to everybody."""


@pytest.fixture(params=["no", "bf16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_prepared_model_and_optimizer_train_under_a_campaign_that_replays_to_the_bit(
    scene: Scene, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(model: nn.Module, optimizer: object, **arguments: object) -> GovernedRun[bytes]:
        return governed(model, accelerator.prepare(optimizer), **arguments)  # type: ignore[arg-type]

    scene.register(classes=CLASSES)
    scene.plan_changes.update(accumulator_window_steps=4)
    scene.wrap = accelerator.prepare
    monkeypatch.setattr(governed_fixtures, "governed", prepared)
    scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"

    torch.manual_seed(1)
    base = TinyModel()
    closed = [name for name in weights(base) if name.startswith("layers.0")]
    moved, held = weights(scene.model), weights(base)
    assert same_bits({name: moved[name] for name in closed}, {name: held[name] for name in closed})
    assert not torch.equal(moved["head.weight"], held["head.weight"])

    model, optimizer = accelerator.prepare(base, torch.optim.AdamW(base.parameters(), lr=0.01, weight_decay=0.1))
    job = ReplayJob(model, optimizer, scene.training_sources, losses, collate)
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job)
    assert (found.matched, found.difference) == (STEPS, None)
