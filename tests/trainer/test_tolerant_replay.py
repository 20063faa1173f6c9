"""Picked steps taken again where last bits differ: what is told apart from rounding, and what passes for it.

Micro-batches stand for another build: gradients are summed in another order, and no digest comes out.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from governed_fixtures import CAMPAIGN, EVERYTHING, STEPS, Scene, losses, replay_job
from torch import Tensor, nn

from consensus.portions import NANO, BlockWeight, ClassRule
from consensus.rejection import ConfigError, Reason, Rejected
from node.cli import main
from trainer_client import accumulators
from trainer_client.accumulators import SourceAccumulators
from trainer_client.audit_snapshots import SnapshotFolder
from trainer_client.checkpoints import Checkpoint, checkpoint_files, read_checkpoint, write_checkpoint
from trainer_client.governed import GovernedRun
from trainer_client.picked_replay import PickedReplay, replay_picked
from trainer_client.record import Example
from trainer_client.replay import ReplayJob, read_logged_campaign
from trainer_client.route import Weights
from trainer_client.scaling import GLOBAL, Scaled, Scaling
from trainer_client.sketches import SketchBook
from trainer_client.tolerant_replay import replay_within, tolerance_text
from trainer_client.window_comparison import check_sketches

TOLERANCE = 1e-3


def kept_by(scene: Scene) -> Path:
    return scene.directory / "snapshots" / CAMPAIGN.hex()


def elsewhere(scene: Scene, **changes: object) -> ReplayJob[bytes]:
    """The job on another build."""
    return replay_job(scene, dropout=0.0, micro_batch_size=2, **changes)


def within(scene: Scene, made: ReplayJob[bytes], *steps: int, tolerance: float = TOLERANCE) -> PickedReplay:
    folder = SnapshotFolder(kept_by(scene), CAMPAIGN)
    return replay_within(read_logged_campaign(scene.client(), CAMPAIGN), made, steps, folder, tolerance)


@pytest.fixture
def kept(scene: Scene) -> Scene:
    """A released run with a snapshot after every four steps."""
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.train()
    return scene


def test_steps_of_another_build_come_out_within_the_tolerance_and_not_bit_for_bit(kept: Scene) -> None:
    logged = read_logged_campaign(kept.client(), CAMPAIGN)
    exact = replay_picked(logged, elsewhere(kept), (2, 6, 12), SnapshotFolder(kept_by(kept), CAMPAIGN))
    assert exact.matched == 0
    found = within(kept, elsewhere(kept), 2, 6, 12)
    assert [(each.step, each.differing) for each in found.picked] == [(2, ()), (6, ()), (12, ())]
    assert (found.matched, found.difference, found.executed) == (3, None, STEPS)
    assert found.end_root == kept.node.head(CAMPAIGN).root
    assert found.tolerance == tolerance_text(TOLERANCE)
    assert found.tolerance.startswith("0.001 of each tensor's change")


def test_only_the_stretches_with_picked_steps_are_taken_again(kept: Scene) -> None:
    found = within(kept, elsewhere(kept), 10, 11)
    assert (found.matched, found.executed) == (2, 4)


def skips_training(scene: Scene, run: GovernedRun[bytes], inputs: Tensor) -> None:
    assert run.backward(losses(scene.model, inputs))
    before = [parameter.detach().clone() for parameter in scene.model.parameters()]
    run._optimizer.step()
    with torch.no_grad():
        for parameter, held in zip(scene.model.parameters(), before, strict=True):
            parameter.copy_(held)
    run.optimizer_stepped()


def moves_one_tensor(scene: Scene, run: GovernedRun[bytes], inputs: Tensor) -> None:
    assert run.backward(losses(scene.model, inputs))
    run._optimizer.step()
    with torch.no_grad():
        scene.model.head.bias += 1e-3
    run.optimizer_stepped()


def learns_something_else(scene: Scene, run: GovernedRun[bytes], inputs: Tensor) -> None:
    assert run.backward(losses(scene.model, inputs.flip(1)))
    run._optimizer.step()
    run.optimizer_stepped()


Lie = Callable[[Scene, GovernedRun[bytes], Tensor], None]


@pytest.mark.parametrize(
    ("lie", "what"),
    [
        (skips_training, "tensor head.weight"),
        (moves_one_tensor, "tensor head.bias"),
        (learns_something_else, "tensor embedding.weight"),
    ],
)
def test_operator_that_did_something_else_in_one_step_is_outside_the_tolerance(
    scene: Scene, lie: Lie, what: str
) -> None:
    def body(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        if step == 6:
            lie(scene, run, inputs)
        else:
            run.learn(losses(scene.model, inputs))

    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.loop(body)
    found = within(scene, elsewhere(scene), 2, 5, 6)
    first, second, third = found.picked
    assert first.differing == ()
    assert second.differing == third.differing
    assert second.differing[0] == "steps 5 to 8"
    assert what in second.differing
    assert found.difference is not None
    assert (found.difference.step, found.difference.what[0]) == (5, "by step 8")
    assert found.matched == 1


def test_clip_factor_that_was_not_the_one_recorded_is_outside_the_tolerance(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.register(classes=EVERYTHING, global_clipping=True)
    scene.plan_changes.update(clip_scope=GLOBAL, clip_norm=0.25)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    honest, lies = Scaling.finish, 0

    def finish(*inputs: Any) -> Scaled:
        nonlocal lies
        scaled = honest(*inputs)
        lies += 1
        return replace(scaled, global_clip_nano=NANO) if lies == 6 else scaled

    with monkeypatch.context() as patched:
        patched.setattr(Scaling, "finish", finish)
        scene.train()
    found = within(scene, elsewhere(scene), 2, 6)
    assert [(each.step, bool(each.differing)) for each in found.picked] == [(2, False), (6, True)]
    assert found.picked[1].differing == ("steps 5 to 8", "global clip factor in step 6")


def test_tensor_that_the_record_never_changed_must_not_change_at_all(scene: Scene) -> None:
    frozen = (BlockWeight("head", 0),)
    scene.register(classes=(ClassRule("documentation", 1_000, frozen), ClassRule("news", 1_000, frozen)))
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.train()
    assert within(scene, elsewhere(scene), 2).matched == 1

    def nudged(model: nn.Module, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            model.head.bias[0] += 1e-6  # type: ignore[union-attr,index]
        return losses(model, inputs)

    found = within(scene, elsewhere(scene, loss=nudged), 2)
    assert "tensor head.bias" in found.picked[0].differing


def test_optimizer_that_differs_though_the_weights_do_not_is_seen(kept: Scene) -> None:
    """The last step's moments are wrong in the record: the next stretch would begin with them."""
    made = elsewhere(kept)
    stepped = made.optimizer.step
    count: list[int] = []

    def step() -> None:
        stepped()
        count.append(1)
        if len(count) == 4:
            made.optimizer.state[made.optimizer.param_groups[0]["params"][0]]["exp_avg"].mul_(1.5)

    made.optimizer.step = step  # type: ignore[method-assign,assignment]
    found = within(kept, made, 3)
    assert found.picked[0].differing == ("steps 1 to 4", "optimizer state 0 exp_avg")


def test_steps_behind_the_last_snapshot_are_refused(kept: Scene) -> None:
    for path in checkpoint_files(kept_by(kept), STEPS):
        path.unlink()
    with pytest.raises(Rejected, match="no snapshot at or after step 9") as refusal:
        within(kept, elsewhere(kept), 2, 9)
    assert refusal.value.reason is Reason.NOT_FOUND


def test_tampered_snapshot_at_the_end_of_a_stretch_is_refused_too(kept: Scene) -> None:
    (path,) = checkpoint_files(kept_by(kept), 8)
    snapshot = read_checkpoint(path, CAMPAIGN).snapshot
    path.unlink()
    tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    tensors["head.bias"][0] += 1e-6
    write_checkpoint(kept_by(kept), Checkpoint(replace(snapshot, tensors=tensors), frozenset()), CAMPAIGN)
    with pytest.raises(Rejected, match="the snapshot of step 8 is not the log's: its parameter root") as refusal:
        within(kept, elsewhere(kept), 6)
    assert refusal.value.reason is Reason.DIGEST_MISMATCH


def test_command_wants_snapshots_and_a_sensible_tolerance() -> None:
    needed = ("replay", "--job", "m:f", "--config", "c", "--node", "u", "--chain-id", "ab", "--campaign", "cd")
    for more in (("--tolerance", "0.01"), ("--tolerance", "0.01", "--steps", "3"), ("--tolerance", "2")):
        assert CliRunner().invoke(main, [*needed, *more]).exit_code == 2


# Accumulators


@pytest.fixture
def summed(scene: Scene) -> Scene:
    """A released run with windows of four steps, and snapshots at their ends and in their midst."""
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=2)
    scene.plan_changes.update(accumulator_window_steps=4)
    scene.train()
    return scene


def with_windows(scene: Scene, *steps: int, folder: Path | None = None) -> PickedReplay:
    logged = read_logged_campaign(scene.client(), CAMPAIGN)
    snapshots = SnapshotFolder(kept_by(scene), CAMPAIGN)
    windows = folder or scene.directory / "accumulators"
    return replay_within(logged, elsewhere(scene), steps, snapshots, TOLERANCE, recorded_windows=windows)


def test_sums_of_another_build_come_out_within_the_tolerance_for_windows_taken_whole(summed: Scene) -> None:
    found = with_windows(summed, *range(1, STEPS + 1))
    assert (found.matched, found.difference) == (STEPS, None)
    assert (found.windows, found.windows_cut) == (STEPS // 4, 0)
    found = with_windows(summed, 4, 5, 7)
    assert (found.matched, found.windows, found.windows_cut) == (3, 1, 1)


def test_sums_booked_to_another_source_are_outside_the_tolerance_and_named(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.plan_changes.update(accumulator_window_steps=4)
    manual, paper = scene.sources["manual"], scene.sources["paper"]
    honest = SourceAccumulators.observe

    def swapped(self: SourceAccumulators, parameter: str, group: bytes, gradient: Tensor) -> None:
        honest(self, parameter, {manual: paper, paper: manual}.get(group, group), gradient)

    with monkeypatch.context() as lying:
        lying.setattr(SourceAccumulators, "observe", swapped)
        scene.train()
    found = with_windows(scene, 4)
    assert found.matched == 0
    assert found.difference is not None
    named = {each.split(":")[0] for each in found.picked[0].differing[1:]}
    assert {f"accumulators of source {source.hex()[:16]}" for source in (manual, paper)} <= named
    assert "accumulators' total" not in named


def test_altered_or_missing_file_of_a_recorded_window_is_refused_by_name(summed: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    shutil.copytree(summed.directory / "accumulators", folder)
    blob = max((folder / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(Rejected, match=r"committed is [0-9a-f]{64}"):
        with_windows(summed, *range(1, STEPS + 1), folder=folder)
    blob.unlink()
    with pytest.raises(ConfigError, match="expected a file of the recorded window"):
        with_windows(summed, *range(1, STEPS + 1), folder=folder)


def test_accumulators_of_a_campaign_that_keeps_none_are_refused_by_name(kept: Scene) -> None:
    with pytest.raises(ConfigError, match="keeps no accumulators"):
        with_windows(kept, 4)


# Sketches


def sketched(scene: Scene) -> Scene:
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 500, (BlockWeight("head", 0),))))
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.plan_changes.update(accumulator_window_steps=4, sketch_rank=2)
    return scene


def test_sketches_of_another_build_hold_as_much_of_their_gradients(scene: Scene) -> None:
    sketched(scene).train()
    found = with_windows(scene, *range(1, STEPS + 1))
    assert (found.matched, found.difference, found.windows) == (STEPS, None, STEPS // 4)


Forge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def nothing(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left, torch.zeros_like(right)


def twice_as_large(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left, 2 * right


def turned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left, right.flip(-1)


@pytest.mark.parametrize("forge", [nothing, twice_as_large, turned])
def test_sketches_that_are_not_of_their_gradients_are_named(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, forge: Forge
) -> None:
    """Those of one step of a window; its sums are as they should be."""
    sketched(scene)
    honest = SketchBook.observe

    def observe(self: SketchBook, parameter: str, left: Tensor, right: Tensor, weights_B: Weights) -> None:
        if self._step == 6:
            left, right = forge(left, right)
        honest(self, parameter, left, right, weights_B)

    with monkeypatch.context() as lying:
        lying.setattr(SketchBook, "observe", observe)
        scene.train()
    found = with_windows(scene, *range(1, STEPS + 1))
    assert [bool(each.differing) for each in found.picked] == [4 < step <= 8 for step in range(1, STEPS + 1)]
    assert all(each.startswith("sketches of source ") for each in found.picked[5].differing[1:])


def test_one_forged_sketch_is_named_with_its_example(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sketched(scene)
    honest = SketchBook.observe
    forged: set[Example] = set()

    def observe(self: SketchBook, parameter: str, left: Tensor, right: Tensor, weights_B: Weights) -> None:
        if self._step == 2:
            forged.add(self._batches[-1][0])
            right = right.clone()
            right[0] = right[0].flip(-1)
        honest(self, parameter, left, right, weights_B)

    with monkeypatch.context() as lying:
        lying.setattr(SketchBook, "observe", observe)
        scene.train()
    found = with_windows(scene, 2)
    ((source, example),) = forged
    assert f"sketches of source {source.hex()[:16]}: example {example}" in found.picked[0].differing


def test_committed_sketches_of_another_shape_are_named_and_do_not_end_the_replay(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketched(scene)
    honest = accumulators.sketch_file

    def narrower(*inputs: Any) -> dict[str, Tensor]:
        file = honest(*inputs)
        return {name: part[:, :, :1].contiguous() if name.endswith("/left") else part for name, part in file.items()}

    with monkeypatch.context() as lying:
        lying.setattr(accumulators, "sketch_file", narrower)
        scene.train()
    found = with_windows(scene, 2)
    named = {f"sketches of source {source.hex()[:16]}" for name, source in scene.sources.items() if name != "secret"}
    assert named.issuperset(found.picked[0].differing[1:])
    assert found.picked[0].differing[1:]


def test_file_that_is_none_of_sketches_is_refused_though_committed() -> None:
    examples, visits = torch.arange(2), torch.zeros(2, 2, dtype=torch.int64)
    left, scale = torch.zeros(2, 3, 4, dtype=torch.uint8), torch.zeros(2, 3)
    sound = {"examples": examples, "visits": visits, "w/left": left, "w/right": left, "w/scale": scale}
    check_sketches(sound, b"")
    for name, other in (
        ("examples", examples.float()),
        ("visits", visits[0]),
        ("w/left", left[:1]),
        ("w/left", left.float()),
        ("w/right", left[:, :2]),
        ("w/scale", scale.double()),
        ("w/more", scale),
        ("more", examples),
    ):
        with pytest.raises(Rejected, match="none of sketches") as refusal:
            check_sketches({**sound, name: other}, b"")
        assert refusal.value.reason is Reason.MALFORMED
    with pytest.raises(Rejected, match="none of sketches"):
        check_sketches({name: tensor for name, tensor in sound.items() if name != "w/scale"}, b"")
