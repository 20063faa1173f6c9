"""One clip factor over all parameter blocks, and loss scaling: recorded, undone and taken again to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_node import running_node
from governed_fixtures import (
    BATCH_SIZE,
    CAMPAIGN,
    EVERYTHING,
    STEPS,
    HalfAttention,
    HalfModel,
    RecitesAt,
    Scene,
    TinyModel,
    by_heads,
    collate,
    job_again,
    losses,
    same_bits,
    weights,
)
from rank_fixtures import KINDS, SNAPSHOTS, Attempt, Replay, run_on_ranks
from torch import Tensor

from consensus import portions as p
from consensus.event import CheckedEvent, Kind
from consensus.portions import BlockWeight, ClassRule
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected
from trainer_client.audit_snapshots import SnapshotFolder, snapshot_directory
from trainer_client.balance import Balance
from trainer_client.clipping import GradientOverflow, clip_factor
from trainer_client.governed import GovernedRun, TrainingFailed
from trainer_client.momentum import Momentum
from trainer_client.picked_replay import PickedReplay, replay_picked
from trainer_client.pieces import whole_entries
from trainer_client.plan import default_blocks
from trainer_client.replay import Replayed, ReplayJob, read_logged_campaign, replay
from trainer_client.scaling import GLOBAL, LEAST_SCALE, Scaled, Scaling, scale_after

CLIP_NORM = 0.25
FIRST_SCALE = 2.0**18
"""Overflows in float16 until it is halved some times."""


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)


def halved(scene: Scene) -> Scene:
    """A run in float16 whose scale grows until it overflows, again and again."""
    scene.build = HalfModel
    scene.arguments["scaler"] = scaler()
    return scene


def clipped_together(scene: Scene, **policy: object) -> Scene:
    scene.register(**{"classes": EVERYTHING, "global_clipping": True, **policy})
    scene.plan_changes.update(clip_scope=GLOBAL, clip_norm=CLIP_NORM)
    return scene


def governance_of(scene: Scene) -> list[p.StepGovernance]:
    steps = [event.governance for event in scene.events(Kind.STEP)]
    return [step for step in steps if isinstance(step, p.StepGovernance)]


def operations_of(scene: Scene) -> list[p.StepOperation]:
    return [event.operation for event in scene.events(Kind.STEP) if isinstance(event.operation, p.StepOperation)]


def skipped(scene: Scene) -> list[int]:
    return [step.index for step in governance_of(scene) if step.skipped]


def replayed(scene: Scene, own: torch.amp.GradScaler | None = None, *, balanced: bool = False) -> Replayed:
    torch.manual_seed(1)
    model = scene.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    job = ReplayJob(model, optimizer, scene.training_sources, losses, collate, scaler=own)
    return replay(read_logged_campaign(scene.client(), CAMPAIGN), job, balanced=balanced)


def plain_training(
    scene: Scene, own: torch.amp.GradScaler | None, clip_norm: float = 1.0
) -> tuple[dict[str, Tensor], list[int], list[float]]:
    """The same fine-tune in ordinary torch: weights, steps that the scaler skipped, norms of all gradients."""
    torch.manual_seed(1)
    model = scene.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    text = {scene.sources[name]: scene.texts[name] for name in scene.sources}
    without, norms = [], []
    for step in range(1, STEPS + 1):
        admitted = [held for held in scene.presented(step) if held[0] != scene.sources["secret"]]
        optimizer.zero_grad(set_to_none=True)
        loss = losses(model, collate([text[source][example] for source, example in admitted])).sum() / BATCH_SIZE
        if own is None:
            loss.backward()  # type: ignore[no-untyped-call]
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
            optimizer.step()
            continue
        scale = own.get_scale()
        own.scale(loss).backward()  # type: ignore[no-untyped-call]
        own.unscale_(optimizer)
        for names in default_blocks(model).values():
            torch.nn.utils.clip_grad_norm_([model.get_parameter(name) for name in names], clip_norm)
        own.step(optimizer)
        own.update()
        without += [step] if own.get_scale() < scale else []
    return weights(model), without, norms


# One factor over all blocks


def test_factor_over_all_blocks_is_that_of_their_common_norm_and_is_recorded(scene: Scene) -> None:
    clipped_together(scene).train()
    expected, _, norms = plain_training(scene, None)
    for step, norm in zip(governance_of(scene), norms, strict=True):
        assert step.global_clip_nano == pytest.approx(clip_factor(norm, CLIP_NORM) * p.NANO, rel=1e-5)
    assert min(step.global_clip_nano for step in governance_of(scene)) < p.NANO
    found = weights(scene.model)
    assert all(torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in expected.items())


def test_run_clipped_together_keeps_its_accounts_and_is_replayed_to_the_bit(scene: Scene) -> None:
    clipped_together(scene)
    scene.plan_changes.update(accumulator_window_steps=5, sketch_rank=2)
    scene.train()
    found = replayed(scene)
    assert (found.matched, found.difference) == (STEPS, None)
    sheet = replayed(scene, balanced=True).balance
    assert sheet is not None
    assert max(abs(entry.share) for entry in sheet.rest.values()) < 1e-4


def test_factor_that_was_not_the_one_recorded_is_seen(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped_together(scene)
    honest = Scaling.finish
    with monkeypatch.context() as patched:
        patched.setattr(
            Scaling, "finish", lambda self, *inputs: replace(honest(self, *inputs), global_clip_nano=p.NANO)
        )
        scene.train()
    found = replayed(scene).difference
    assert found is not None
    assert (found.step, found.what) == (1, ("global clip factor",))


def test_plan_that_clips_together_against_the_policy_is_refused_before_anything_is_recorded(scene: Scene) -> None:
    clipped_together(scene, global_clipping=False)
    with pytest.raises(Rejected) as refusal:
        scene.train()
    assert refusal.value.reason is Reason.GLOBAL_CLIPPING_NOT_ADMITTED
    assert scene.events(Kind.CAMPAIGN) == []


def test_policy_that_ends_clipping_together_stops_the_run_by_name_under_its_first_grant(scene: Scene) -> None:
    clipped_together(scene, maximum_grant_steps=4)
    scene.settings = replace(scene.settings, renew_at_permille=0)

    taken: list[int] = []

    def stricter(step: int) -> None:
        taken.append(step)
        if step == 2:
            scene.node.policy(classes=EVERYTHING, maximum_grant_steps=4)

    with pytest.raises(Rejected) as refusal:
        scene.train(stricter)
    assert refusal.value.reason is Reason.GLOBAL_CLIPPING_NOT_ADMITTED
    assert taken == [1, 2, 3, 4]
    recorded = [step.index for step in operations_of(scene)]
    assert recorded == taken[: len(recorded)]


def test_clip_scope_that_is_none_is_refused_by_name(scene: Scene) -> None:
    scene.register()
    scene.plan_changes["clip_scope"] = "layer"
    with pytest.raises(ConfigError, match="clip_scope is 'layer', expected block or global"):
        scene.train()


# Loss scaling


def test_scaled_run_is_bit_identical_to_plain_training_and_names_the_steps_it_skipped(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).train()
    expected, without, _ = plain_training(scene, scaler())
    assert skipped(scene) == without
    assert 1 in without
    assert len(without) < STEPS - 3
    assert same_bits(weights(scene.model), expected)
    for step, operation in zip(governance_of(scene), operations_of(scene), strict=True):
        assert (operation.root_after == operation.root_before) == step.skipped
    assert len({step.optimizer_digest for step in operations_of(scene)}) == STEPS - len(without) + 1


def test_scaled_run_keeps_its_accounts_and_is_replayed_to_the_bit(scene: Scene) -> None:
    shallow = ClassRule("news", 500, (BlockWeight("embedding", 0),))
    scene.register(classes=(ClassRule("documentation", 1_000, ()), shallow))
    halved(scene).plan_changes.update(accumulator_window_steps=4, sketch_rank=2)
    scene.train()
    assert skipped(scene)
    found = replayed(scene, scaler())
    assert (found.matched, found.difference) == (STEPS, None)
    sheet = replayed(scene, scaler(), balanced=True).balance
    assert sheet is not None
    assert max(abs(entry.share) for entry in sheet.rest.values()) < 1e-3


def test_replay_with_another_scaler_or_none_is_refused_by_name(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).train()
    for own in (None, torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)):
        with pytest.raises(Rejected, match="the campaign scaled its losses from"):
            replayed(scene, own)


def test_scheduler_stands_still_in_a_skipped_step(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    run = halved(scene).run()
    scheduler = torch.optim.lr_scheduler.LambdaLR(run._optimizer, lambda step: 1 / (1 + step))
    run._scheduler = scheduler
    with run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
    assert scheduler.last_epoch == STEPS - len(skipped(scene))
    rates = [step.learning_rate_nano for step in operations_of(scene)]
    assert rates == sorted(rates, reverse=True)


def test_scaled_run_that_died_goes_on_at_the_scale_it_had(scene: Scene, tmp_path: Path) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).settings = replace(scene.settings, checkpoint_every_steps=1, snapshot_every_steps=1)

    def die(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.train(die)
    halved(scene).train()
    with running_node() as node:
        other = Scene(node, tmp_path / "other", dict(scene.texts))
        other.register(classes=EVERYTHING)
        halved(other).train()
    assert skipped(scene) == skipped(other)
    assert same_bits(weights(scene.model), weights(other.model))


def test_rollback_brings_the_scale_back(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).settings = replace(scene.settings, snapshot_every_steps=2)
    refused: list[bytes] = []

    def refuse_once(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, p.StepOperation) and event.operation.index == 8 and not refused:
            refused.append(event.id)
        return Rejected(Reason.GRANT_CLOSED, "too late") if event.id in refused else None

    scene.node.refuse_step = refuse_once
    scene.train()
    assert scene.node.head(CAMPAIGN).rollbacks == 1
    expected, without, _ = plain_training(scene, scaler())
    assert same_bits(weights(scene.model), expected)
    assert sorted(set(skipped(scene))) == without


def test_recital_in_a_scaled_run_undoes_its_step_and_the_replay_agrees(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    recites = RecitesAt(7)
    halved(scene).arguments["memorization"] = recites
    scene.train(recites.at.append)
    assert scene.node.head(CAMPAIGN).rollbacks == 1
    assert replayed(scene, scaler()).difference is None


def test_what_is_kept_out_of_a_block_leaves_no_bit_there_under_loss_scaling(scene: Scene, tmp_path: Path) -> None:
    closed = ClassRule("news", 1_000, tuple(BlockWeight(name, 0) for name in ("embedding", "layers.0", "layers.1")))
    found = []
    with running_node() as node:
        other = Scene(node, tmp_path / "other", dict(scene.texts))
        for each in (scene, other):
            each.register(classes=(ClassRule("documentation", 1_000, ()), closed))
            each.salt = None  # so that examples are not held against the claim
            halved(each).plan_changes["planned_steps"] = 1
            each.arguments["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        other.texts["paper"] = [bytes(10)] * 8
        for each in (scene, other):
            each.train()
            found.append(weights(each.model))
    assert scene.seen == other.seen
    assert {source for source, _ in scene.seen} == {scene.sources["manual"], scene.sources["paper"]}
    assert skipped(scene) == skipped(other) == []
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] if not name.startswith("head"))
    assert not torch.equal(found[0]["head.weight"], found[1]["head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_skip_and_clip_alike_and_are_replayed(scene: Scene, kind: str) -> None:
    clipped_together(halved(scene))
    scene.arguments["micro_batch_size"] = 2
    scene.plan_changes["accumulator_window_steps"] = 4
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    picked = Replay(picked=(6, STEPS), snapshots=SNAPSHOTS)
    taken, again, some = run_on_ranks(
        scene, Attempt(kind), Attempt(kind, replay=Replay()), Attempt(kind, replay=picked)
    )
    assert [outcome.error for outcome in (*taken, *again, *some)] == [""] * 6
    assert skipped(scene)
    assert 0 < min(step.global_clip_nano for step in governance_of(scene) if not step.skipped) < p.NANO
    assert [(outcome.replayed, outcome.differing) for outcome in again] == [(STEPS, ())] * 2
    assert [(outcome.replayed, outcome.executed, outcome.differing) for outcome in some] == [(2, 2 + 4, ())] * 2
    for step, operation in zip(governance_of(scene), operations_of(scene), strict=True):
        assert (operation.root_after == operation.root_before) == step.skipped


def test_rank_with_another_scaler_is_refused_by_name(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).arguments["micro_batch_size"] = None
    other = {**scene.arguments, "scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}
    (outcomes,) = run_on_ranks(scene, Attempt("DDP", changes={1: {"arguments": other}}))
    assert all("was started with another plan" in outcome.error for outcome in outcomes)
    assert scene.events(Kind.CAMPAIGN) == []


def test_step_that_may_move_nothing_passes_the_scaler_by(scene: Scene) -> None:
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 0, ())))
    halved(scene).plan_changes["batch_size"] = 1
    scene.train()
    still = [
        step.index
        for step in governance_of(scene)
        if not any(map(any, (each.weights_permille for each in step.profiles)))
    ]
    assert set(still) - {step.index for step in governance_of(scene) if not step.admitted}
    assert not set(still) & set(skipped(scene))


def test_gradient_that_overflows_at_every_scale_ends_the_run_by_its_block(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    own = halved(scene).arguments["scaler"] = torch.amp.GradScaler("cpu", init_scale=2 * LEAST_SCALE)

    def steep(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        loss_B = losses(scene.model, inputs)
        run.learn(loss_B + (loss_B - loss_B.detach()).abs().sqrt())

    with pytest.raises(GradientOverflow, match="the gradient of parameter block"):
        scene.loop(steep)
    assert own.get_scale() == LEAST_SCALE, "one step was skipped before"


def test_norm_that_overflows_over_finite_gradients_is_no_reason_to_skip() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaling = Scaling(optimizer, 1.0, scaler=torch.amp.GradScaler("cpu", init_scale=1.0))
    scaling.backward(1e30 * model(torch.ones(1, 4)).sum())
    with pytest.raises(GradientOverflow, match="norm inf"):
        scaling.finish(model, {"weight": 0, "bias": 0})


def test_parameters_that_a_scaler_cannot_scale_are_refused_by_name() -> None:
    model = torch.nn.Linear(4, 4)
    scaling = Scaling(torch.optim.SGD([model.weight], lr=1.0), 1.0, scaler=scaler())
    with pytest.raises(ConfigError, match="parameter 'bias', which requires a gradient and is not the optimizer's"):
        scaling.check_supported(model)
    half = torch.nn.Linear(4, 4).half()
    scaling = Scaling(torch.optim.SGD(half.parameters(), lr=1.0), 1.0, scaler=scaler())
    with pytest.raises(ConfigError, match="parameter 'weight' in float16"):
        scaling.check_supported(half)


def test_campaign_records_what_the_job_does_whatever_the_plan_calls_it(scene: Scene) -> None:
    clipped_together(scene)
    scene.plan_changes["hyperparameters"] = {"clip_scope": "block", "clip_norm": "77", "schedule": "constant"}
    scene.train()
    (opening,) = scene.events(Kind.CAMPAIGN)
    assert isinstance(opening.operation, p.Campaign)
    recorded = {setting.name: setting.value for setting in opening.operation.hyperparameters}
    assert (recorded["clip_scope"], recorded["clip_norm"]) == ("global", repr(CLIP_NORM))
    assert recorded["schedule"] == "constant"


def test_scaled_run_by_heads_is_bit_identical_to_plain_training(scene: Scene) -> None:
    by_heads(scene)
    scene.node.policy(classes=EVERYTHING, routing_granularities=("head",))
    halved(scene).build = HalfAttention
    scene.plan_changes.update(model={}, clip_norm=1e9)
    scene.train()
    expected, without, _ = plain_training(scene, scaler(), clip_norm=1e9)
    assert skipped(scene) == without
    assert 1 in without
    assert same_bits(weights(scene.model), expected)


def test_scaled_run_by_heads_leaves_a_closed_head_as_it_is_and_is_replayed_to_the_bit(scene: Scene) -> None:
    by_heads(scene)
    halved(scene).build = HalfAttention
    scene.plan_changes["accumulator_window_steps"] = 4
    scene.arguments["micro_batch_size"] = 2
    scene.train()
    assert 0 < len(skipped(scene)) < STEPS
    torch.manual_seed(1)
    base, moved = weights(HalfAttention()), weights(scene.model)
    for name, rows in (("attention.c_attn.weight", 8), ("attention.c_attn.bias", 8)):
        closed = torch.arange(24) % rows < 4
        assert torch.equal(moved[name][closed], base[name][closed])
        assert not torch.equal(moved[name][~closed], base[name][~closed])
    job = replace(job_again(scene, scaler()), micro_batch_size=2)
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job)
    assert (found.matched, found.difference) == (STEPS, None)


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def from_snapshots(
    scene: Scene, own: torch.amp.GradScaler, *steps: int, loss: Callable[[torch.nn.Module, Tensor], Tensor] = losses
) -> PickedReplay:
    torch.manual_seed(1)
    model = scene.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    sources, schedule = scene.training_sources, scheduled(optimizer)
    job = ReplayJob(model, optimizer, sources, loss, collate, scheduler=schedule, scaler=own)
    folder = SnapshotFolder(snapshot_directory(scene.directory, CAMPAIGN), CAMPAIGN)
    return replay_picked(read_logged_campaign(scene.client(), CAMPAIGN), job, steps, folder)


def train_scheduled(scene: Scene) -> None:
    run = scene.run()
    run._scheduler = scheduled(run._optimizer)
    with run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))


def test_scale_and_schedule_at_a_snapshot_follow_from_the_log(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).settings = replace(scene.settings, audit_snapshot_every_steps=1)
    train_scheduled(scene)
    late = [step for step in skipped(scene) if step > 2]
    assert late, "the scale overflowed again"
    for picked in ((STEPS,), (*late[:-1], STEPS), tuple(range(1, STEPS + 1))):
        own = scaler()
        found = from_snapshots(scene, own, *picked)
        assert (found.difference, found.executed) == (None, len(picked))
        assert own.state_dict() == scene.arguments["scaler"].state_dict()  # type: ignore[attr-defined]


def test_replay_that_skips_another_step_finds_scale_and_schedule_again_at_the_next_snapshot(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    halved(scene).settings = replace(scene.settings, audit_snapshot_every_steps=STEPS // 2)
    train_scheduled(scene)
    calls: list[int] = []
    first = next(step for step in range(1, STEPS) if step not in skipped(scene))

    def steep(model: torch.nn.Module, inputs: Tensor) -> Tensor:
        calls.append(1)
        return losses(model, inputs) * (1e6 if len(calls) == first else 1.0)

    found = from_snapshots(scene, scaler(), first, STEPS, loss=steep)
    assert found.difference is not None
    assert (found.difference.step, "whether it is skipped" in found.difference.what) == (first, True)
    assert [bool(each.differing) for each in found.picked] == [True, False]


def test_steps_that_may_move_nothing_leave_the_scale_at_a_snapshot_where_it_was(scene: Scene) -> None:
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 0, ())))
    halved(scene).plan_changes["batch_size"] = 1
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=1)
    train_scheduled(scene)
    assert [step for step in governance_of(scene) if step.admitted and not any(step.profiles[0].weights_permille)]
    own = scaler()
    assert from_snapshots(scene, own, STEPS).difference is None
    assert own.state_dict() == scene.arguments["scaler"].state_dict()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("backoff", "growth", "first"), [(0.5, 2.0, 2.0**16), (0.7, 1.3, 1000.0), (0.5, 2.0, 2.0**126)]
)
def test_scale_worked_out_is_the_one_that_torch_keeps(backoff: float, growth: float, first: float) -> None:
    """Over a course with overflows, growth, and growth past what float32 holds."""
    own = torch.amp.GradScaler("cpu", init_scale=first, growth_factor=growth, backoff_factor=backoff, growth_interval=2)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    own.scale(torch.ones(()))
    worked_out = own.state_dict()
    for overflows in (False, False, False, False, True, False, True, True, False, False, False, False, False):
        parameter.grad = torch.full((1,), float("inf") if overflows else 1.0)
        own.step(optimizer)
        own.update()
        worked_out = scale_after(worked_out, skipped=overflows)
        assert own.state_dict() == worked_out


def test_loop_with_a_scaler_that_steps_the_optimizer_past_the_run_ends_before_it_is_recorded(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    with halved(scene).run() as run:
        batch = next(run.batches())
        assert run.backward(losses(scene.model, batch.inputs))
        with pytest.raises(TrainingFailed, match=r"by run\.step_optimizer"):
            run.optimizer_stepped()
        assert not run.step_optimizer(), "the first step is skipped"
        with pytest.raises(TrainingFailed, match="without all losses"):
            run.step_optimizer()
        run.optimizer_stepped()
    assert skipped(scene) == [1]


def test_overflow_without_a_scaler_ends_the_run_by_name(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.build = HalfModel
    with pytest.raises(GradientOverflow, match="the gradient of parameter block"):
        scene.loop(lambda run, inputs, step: run.learn(2.0**30 * losses(scene.model, inputs).float()))


def test_scaler_that_takes_a_step_which_overflowed_is_no_scaler() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaling = Scaling(optimizer, 1.0, scaler=scaler())
    scaling.backward(parameter.sum())
    with pytest.raises(InvariantBroken, match="the gradient scaler took a step"):
        scaling.step(Scaled((), FIRST_SCALE, 0, skipped=True))


def test_nothing_fades_in_a_skipped_step() -> None:
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    momentum = Momentum(optimizer)
    block_of = {name: 0 for name, _ in model.named_parameters()}
    momentum.attach(block_of, whole_entries(model))
    momentum.take_step((), (), {b"s": (1_000,)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = momentum.carried(b"s")
    momentum.take_step((), (), {}, skipped=True)
    assert momentum.carried(b"s") == before
    momentum.take_step((), (), {})
    assert momentum.carried(b"s").residual_nano < before.residual_nano


def test_balance_drops_what_a_skipped_step_saw() -> None:
    model = TinyModel()
    balance = Balance(torch.optim.AdamW(model.parameters()))
    balance.attach(model, whole_entries(model))
    balance.observe("head.weight", b"s", torch.ones_like(model.head.weight))
    balance.skip_step()
    assert balance._pending == {}
