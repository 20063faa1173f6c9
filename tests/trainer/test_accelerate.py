"""A plain loop whose model and optimizer went through Accelerate's ``prepare``; the batches are the run's own."""

import copy
from collections.abc import Iterator

import governed_fixtures
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from governed_fixtures import CAMPAIGN, STEPS, Scene, TinyAttention, TinyModel, collate, losses, same_bits, weights
from torch import nn

from consensus.event import Kind
from consensus.portions import BlockWeight, ClassRule
from consensus.rejection import ConfigError
from trainer_client.governed import GovernedRun, governed
from trainer_client.replay import ReplayJob, read_logged_campaign, replay
from trainer_client.scaling import prepared

CLASSES = (
    ClassRule("documentation", 1_000, (BlockWeight("layers.0", 0),)),
    ClassRule("news", 1_000, (BlockWeight("layers.0", 0),)),
)
"""One parameter block is closed to everybody."""


@pytest.fixture(params=["no", "bf16", "fp16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def scaling_anew(accelerator: Accelerator) -> None:
    """For float16 the scaler that accelerate makes for accelerators alone; torch's works here too."""
    if accelerator.mixed_precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)


def test_prepared_model_and_optimizer_train_under_a_campaign_that_replays_to_the_bit(
    scene: Scene, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(model: nn.Module, optimizer: object, **arguments: object) -> GovernedRun[bytes]:
        return governed(model, accelerator.prepare(optimizer), **arguments)  # type: ignore[arg-type]

    scaling_anew(accelerator)
    scene.register(classes=CLASSES)
    scene.plan_changes.update(accumulator_window_steps=4)
    scene.wrap = accelerator.prepare
    monkeypatch.setattr(governed_fixtures, "governed", prepared)
    scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"

    skipped = [event.governance.skipped for event in scene.events(Kind.STEP)]  # type: ignore[union-attr]
    assert any(skipped) == (accelerator.mixed_precision == "fp16")

    torch.manual_seed(1)
    base = TinyModel()
    closed = [name for name in weights(base) if name.startswith("layers.0")]
    moved, held = weights(scene.model), weights(base)
    assert same_bits({name: moved[name] for name in closed}, {name: held[name] for name in closed})
    assert not torch.equal(moved["head.weight"], held["head.weight"])

    for balanced in (False, True):
        scaling_anew(accelerator)
        model = copy.deepcopy(base)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        job = ReplayJob(*accelerator.prepare(model, optimizer), scene.training_sources, losses, collate)
        found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job, balanced=balanced)
        assert (found.matched, found.difference) == (STEPS, None)
        assert (found.balance is not None) == balanced


def test_prepared_optimizer_is_divided_among_heads_and_leaves_a_closed_one_as_it_is(
    scene: Scene, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(model: nn.Module, optimizer: object, **arguments: object) -> GovernedRun[bytes]:
        return governed(model, accelerator.prepare(optimizer), **arguments)  # type: ignore[arg-type]

    scaling_anew(accelerator)
    closed = (BlockWeight("attention.head.0", 0),)
    classes = (ClassRule("documentation", 1_000, closed), ClassRule("news", 1_000, closed))
    scene.register(classes=classes, routing_granularities=("head",))
    scene.plan_changes.update(routing_granularity="head", model={})
    scene.arguments["probe_loss"] = losses
    scene.build, scene.wrap = TinyAttention, accelerator.prepare
    monkeypatch.setattr(governed_fixtures, "governed", prepared)
    scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"
    (opening,) = scene.events(Kind.CAMPAIGN)
    recorded = {setting.name: setting.value for setting in opening.operation.hyperparameters}  # type: ignore[union-attr]
    assert recorded["optimizer"] == "AdamW"

    torch.manual_seed(1)
    base = TinyAttention()
    moved, held = weights(scene.model)["attention.c_attn.weight"], weights(base)["attention.c_attn.weight"]
    of_head = torch.arange(24) % 8 < 4
    assert torch.equal(moved[of_head], held[of_head])
    assert not torch.equal(moved[~of_head], held[~of_head])


def test_another_scaler_than_the_prepared_optimizers_is_refused_by_name() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    own, other = (torch.amp.GradScaler("cpu") for _ in range(2))
    inner = torch.optim.SGD([torch.zeros(1)])
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(inner, scaler=own)
    assert prepared(optimizer, None) == prepared(optimizer, own) == (inner, own)
    assert prepared(AcceleratedOptimizer(inner), other) == (inner, other)
    assert prepared(AcceleratedOptimizer(inner), None) == (inner, None)
    with pytest.raises(ConfigError, match="another gradient scaler"):
        prepared(optimizer, other)
    AcceleratorState._reset_state(reset_partial_state=True)
