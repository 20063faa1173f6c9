"""``transformers.Trainer`` in float16: torch's scaler behind accelerate's optimizer, the run says what is skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_node import running_node
from hf_fixtures import BATCH_SIZE, STEPS, DiesAt, Scene, in_a_plain_loop, recorded, replayed
from hf_rank_fixtures import AcceleratedTrainer, gpt2, scaler
from torch import nn
from transformers import set_seed

from consensus.event import Kind
from consensus.portions import ClassRule, StepGovernance
from trainer_client.commitment import parameter_root_of
from trainer_client.hf import GovernedTrainer, TrainerUnsupported
from trainer_client.plan import RunSettings
from trainer_client.replay import Replayed

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with running_node() as node:
        yield Scene(node, tmp_path)


def trainer(scene: Scene, model: nn.Module, accumulated: int = 1, **options: object) -> GovernedTrainer:
    arguments = scene.arguments(
        fp16=True, per_device_train_batch_size=BATCH_SIZE // accumulated, gradient_accumulation_steps=accumulated
    )
    return scene.trainer(model, kind=AcceleratedTrainer, args=arguments, **options)


def governance(scene: Scene, number: int = 7) -> list[StepGovernance]:
    return [
        event.governance
        for event in scene.events(Kind.STEP)
        if event.entry.campaign == bytes([number]) * 32 and isinstance(event.governance, StepGovernance)
    ]


def skipped(scene: Scene, number: int = 7) -> list[int]:
    return [step.index for step in governance(scene, number) if step.skipped]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_chain_in_float16_is_the_one_a_plain_loop_records_and_replays_to_the_bit(
    scene: Scene, accumulated: int
) -> None:
    scene.plan_changes = {"accumulator_window_steps": 4}
    model = gpt2()
    ran = trainer(scene, model, accumulated)
    ran.train()
    head = scene.node.head(bytes([7]) * 32)
    assert (head.closed, head.steps, scene.node.rejected) == ("released", STEPS, {})
    assert head.root == parameter_root_of(model)
    assert 1 in skipped(scene)
    assert len(skipped(scene)) < STEPS
    in_a_plain_loop(scene, gpt2(), 8, BATCH_SIZE // accumulated, scaler())
    assert [recorded(step) for step in scene.steps(7)] == [recorded(step) for step in scene.steps(8)]
    assert skipped(scene, 7) == skipped(scene, 8)
    assert ran.lr_scheduler.last_epoch == STEPS - len(skipped(scene))
    again = gpt2()
    found = replayed(scene, again, BATCH_SIZE // accumulated, scaler())
    assert found == Replayed(STEPS, STEPS, None, parameter_root_of(model))


def test_training_in_float16_that_died_goes_on_at_the_scale_it_had(scene: Scene) -> None:
    settings = RunSettings(snapshot_every_steps=1, checkpoint_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer(scene, gpt2(), settings=settings, callbacks=[DiesAt(5)]).train()
    set_seed(99)
    trainer(scene, gpt2(), settings=settings).train()
    in_a_plain_loop(scene, gpt2(), 8, BATCH_SIZE, scaler())
    assert [recorded(step) for step in scene.steps(7)] == [recorded(step) for step in scene.steps(8)]
    assert skipped(scene, 7) == skipped(scene, 8)


def test_step_in_float16_that_the_log_refuses_is_taken_again_at_its_scale(scene: Scene) -> None:
    scene.refuse_last_step_once()
    result = trainer(scene, gpt2(), settings=RunSettings(snapshot_every_steps=2)).train()
    head = scene.node.head(bytes([7]) * 32)
    assert (head.closed, head.steps, head.rollbacks, result.global_step) == ("released", STEPS, 1, STEPS)
    assert replayed(scene, gpt2(), BATCH_SIZE, scaler()).difference is None


def test_step_in_float16_that_may_move_nothing_passes_the_scaler_by(scene: Scene) -> None:
    scene.node.policy(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 0, ())))
    scene.plan_changes = {"batch_size": 1}
    arguments = scene.arguments(fp16=True, per_device_train_batch_size=1)
    scene.trainer(gpt2(), kind=AcceleratedTrainer, args=arguments).train()
    still = [
        step.index
        for step in governance(scene)
        if step.admitted and not any(map(any, (profile.weights_permille for profile in step.profiles)))
    ]
    assert still
    assert not set(still) & set(skipped(scene))
    assert replayed(scene, gpt2(), 1, scaler()).difference is None


def test_float16_where_accelerate_scales_no_losses_is_refused_by_name(scene: Scene) -> None:
    with pytest.raises(TrainerUnsupported, match="fp16: accelerate scales no losses on 'cpu'"):
        scene.trainer(gpt2(), args=scene.arguments(fp16=True))
    assert scene.events(Kind.CAMPAIGN) == []
