"""Runs of several processes over gloo: one event a step, the weights of one process, and everybody goes one way."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import rank_fixtures
import torch
from fake_node import FakeNode, running_node
from governed_fixtures import (
    CAMPAIGN,
    STEPS,
    Scene,
    TinyAttention,
    TinyModel,
    assert_moved_alike,
    collate,
    edge_between,
    examples_of,
    losses,
    same_bits,
    weights,
)
from rank_fixtures import (
    KINDS,
    SNAPSHOTS,
    Attempt,
    Elsewhere,
    Outcome,
    Recites,
    RecitesOnTheFirst,
    Replay,
    faster,
    replay_configuration,
    run_on_ranks,
)
from safetensors.torch import load_file
from torch import Tensor

from consensus.accumulators import AccumulatorWindow, decode_window
from consensus.bands import decode_losses
from consensus.event import Kind
from consensus.portions import BandRule, BlockWeight, ClassRule, Rollback, StepOperation
from consensus.rejection import Reason, Rejected
from trainer_client.base_losses import path_of
from trainer_client.checkpoints import Checkpoint, checkpoint_files, read_checkpoint, step_of, write_checkpoint
from trainer_client.commitment import root_of_tensors
from trainer_client.replay import ReplayJob, read_logged_campaign, replay

UPPER = BandRule(1, 1_000, (BlockWeight("layers.1", 0), BlockWeight("layers.0", 250)))
WINDOW_STEPS = 5
CLASSES = (
    ClassRule("documentation", 1_000, (BlockWeight("layers.1", 0),), (UPPER,)),
    ClassRule("news", 500, (BlockWeight("embedding", 0), BlockWeight("layers.1", 0))),
)
"""One parameter block is closed to everybody, another one to one of the two sources; one goes by entropy band."""


@dataclass
class Trained:
    """A scene trained by two ranks, replays of it by as many, by name, and the same run by one process."""

    kind: str
    scene: Scene
    outcomes: list[Outcome]
    replays: dict[str, list[Outcome]]
    alone: Scene


def new_scene(node: FakeNode, directory: Path) -> Scene:
    texts = {name: examples_of(name) for name in ("manual", "paper", "secret")}
    scene = Scene(node, directory, texts)
    scene.register(classes=CLASSES, entropy_edges_milli=(edge_between(texts["manual"]),))
    scene.arguments["probe_loss"] = losses
    scene.plan_changes.update(accumulator_window_steps=WINDOW_STEPS, sketch_rank=2)
    scene.arguments["micro_batch_size"] = 2
    return scene


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with running_node() as node, running_node() as other:
        scene = new_scene(node, tmp_path_factory.mktemp("ranks"))
        scene.settings = replace(scene.settings, audit_snapshot_every_steps=WINDOW_STEPS)
        by_threes = {"arguments": {**scene.arguments, "micro_batch_size": 3}}
        other_kind = next(kind for kind in KINDS if kind != request.param)
        replays = {
            "whole": Attempt(request.param, replay=Replay()),
            "other decay": Attempt(request.param, replay=Replay(weight_decay=0.2)),
            "picked": Attempt(request.param, replay=Replay(picked=(2, STEPS))),
            "from snapshots": Attempt(request.param, replay=Replay(picked=(3, 7, STEPS), snapshots=SNAPSHOTS)),
            "named": Attempt(request.param, replay=Replay(weight_decay=0.2, picked=(1, 6), snapshots=SNAPSHOTS)),
            "within": Attempt(
                request.param,
                replay=Replay(picked=(3, STEPS), snapshots=SNAPSHOTS, tolerance=1e-2),
                changes={0: by_threes, 1: by_threes},
            ),
            "without": Attempt(request.param, replay=Replay(without=(scene.sources["paper"],))),
            "balanced": Attempt(request.param, replay=Replay(balanced=True)),
            "other wrapper": Attempt(other_kind, replay=Replay()),
            "other text": Attempt(
                request.param, replay=Replay(), changes={1: {"texts": {**scene.texts, "manual": examples_of("else")}}}
            ),
        }
        outcomes, *replayed = run_on_ranks(scene, Attempt(request.param), *replays.values())
        alone = new_scene(other, tmp_path_factory.mktemp("alone"))
        alone.train()
        yield Trained(request.param, scene, outcomes, dict(zip(replays, replayed, strict=True)), alone)


def steps_of(scene: Scene) -> list[StepOperation]:
    return [event.operation for event in scene.events(Kind.STEP) if isinstance(event.operation, StepOperation)]


def windows_of(scene: Scene) -> list[AccumulatorWindow]:
    folder = scene.directory / "accumulators" / "windows"
    roots = [step.accumulator_root for step in steps_of(scene) if step.accumulator_root]
    return [decode_window((folder / f"{root.hex()}.window").read_bytes(), root) for root in roots]


def blob(scene: Scene, sha256: bytes) -> dict[str, Tensor]:
    return load_file(scene.directory / "accumulators" / "blobs" / f"{sha256.hex()}.safetensors")


def test_every_step_is_one_event_and_the_model_is_released(trained: Trained) -> None:
    assert [outcome.error for outcome in trained.outcomes] == ["", ""]
    assert [step.index for step in steps_of(trained.scene)] == list(range(1, STEPS + 1))
    head = trained.scene.node.head(CAMPAIGN)
    assert (head.closed, head.rollbacks, head.attempt) == ("released", 0, 0)
    assert head.root == root_of_tensors(load_file(trained.scene.directory / "tuned.safetensors"))
    (opened,) = trained.scene.events(Kind.CAMPAIGN)
    layout = {setting.name: setting.value for setting in opened.operation.hyperparameters}  # type: ignore[union-attr]
    assert (layout["ranks"], layout["data_parallel"], layout["micro_batch_size"]) == ("2", trained.kind, "2")


def test_weights_and_losses_are_those_of_one_process(trained: Trained) -> None:
    torch.manual_seed(1)
    base = weights(TinyModel())
    for outcome in trained.outcomes:
        assert_moved_alike(outcome.weights, weights(trained.alone.model), base)
    for found, alone in zip(steps_of(trained.scene), steps_of(trained.alone), strict=True):
        assert found.loss_micro == pytest.approx(alone.loss_micro, rel=1e-3)
        assert [delta.norm_micro for delta in found.deltas] == pytest.approx(
            [delta.norm_micro for delta in alone.deltas], rel=0.01, abs=5
        )


def test_ranks_measure_the_base_losses_that_one_process_measures_and_state_the_same_bands(trained: Trained) -> None:
    found, alone = (path_of(scene.directory, CAMPAIGN).read_bytes() for scene in (trained.scene, trained.alone))
    assert len(found) == len(alone) == 4 * 24
    apart = zip(decode_losses(found, 24), decode_losses(alone, 24), strict=True)
    assert max(abs(one - other) for one, other in apart) <= 1
    stated, expected = (
        [[(each.content_class, each.band) for each in event.governance.profiles] for event in scene.events(Kind.STEP)]  # type: ignore[union-attr]
        for scene in (trained.scene, trained.alone)
    )
    assert stated == expected
    assert {band for step in stated for _, band in step} == {0, 1}


def test_block_closed_to_everybody_is_as_it_was_on_every_rank(trained: Trained) -> None:
    torch.manual_seed(1)
    base = weights(type(trained.scene.model)())
    for outcome in trained.outcomes:
        closed = {name: held for name, held in outcome.weights.items() if name.startswith("layers.1")}
        assert same_bits(closed, {name: base[name] for name in closed})
        assert not torch.equal(outcome.weights["embedding.weight"], base["embedding.weight"])


def test_every_admitted_example_is_shown_to_one_rank_and_stand_ins_fill_up(trained: Trained) -> None:
    shown = sorted(each for outcome in trained.outcomes for each in outcome.seen)
    admitted = sorted(
        (step, example)
        for step in range(1, STEPS + 1)
        for example in trained.scene.presented(step)
        if example[0] != trained.scene.sources["secret"]
    )
    assert shown == admitted
    assert sum(outcome.stand_ins for outcome in trained.outcomes) > 0
    assert all(outcome.seen for outcome in trained.outcomes)


def test_accumulators_are_the_sums_of_all_ranks(trained: Trained) -> None:
    pairs = list(zip(windows_of(trained.scene), windows_of(trained.alone), strict=True))
    assert len(pairs) == 3
    for found, alone in pairs:
        assert [entry.source for entry in found.entries] == [entry.source for entry in alone.entries]
        for entry, expected in zip(found.entries, alone.entries, strict=True):
            sums, wanted = blob(trained.scene, entry.blob_sha256), blob(trained.alone, expected.blob_sha256)
            assert sums.keys() == wanted.keys()
            for name, held in sums.items():
                error = (held.float() - wanted[name].float()).norm() / wanted[name].float().norm()
                assert error < 0.02, f"{name} of window {found.terms}"


def test_sketches_name_every_visit_and_say_what_those_of_one_process_say(trained: Trained) -> None:
    for found, alone in zip(windows_of(trained.scene), windows_of(trained.alone), strict=True):
        for entry, expected in zip(found.of_sources, alone.of_sources, strict=True):
            tensors, wanted = blob(trained.scene, entry.sketches_sha256), blob(trained.alone, expected.sketches_sha256)
            assert torch.equal(tensors["visits"], wanted["visits"])
            assert torch.equal(tensors["examples"], wanted["examples"])
            for name in ("layers.0.weight", "head.weight"):
                ours, theirs = (float(each[f"{name}/scale"].norm()) for each in (tensors, wanted))
                assert ours == pytest.approx(theirs, rel=0.1)


def test_all_ranks_go_back_with_the_log_and_with_a_recital(trained: Trained, tmp_path: Path) -> None:
    refused: list[bytes] = []

    def refuse_step_eight_once(event: object) -> Rejected | None:
        operation = event.operation  # type: ignore[attr-defined]
        if isinstance(operation, StepOperation) and operation.index == 8 and not refused:
            refused.append(event.id)  # type: ignore[attr-defined]
            return Rejected(Reason.BAD_FIELD, "for the test")
        return None

    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        node.refuse_step = refuse_step_eight_once
        scene.build = partial(TinyModel, dropout=0.5)
        scene.settings = replace(
            scene.settings, snapshot_every_steps=2, check_memorization_every_steps=3, audit_snapshot_every_steps=2
        )
        scene.arguments["memorization"] = Recites(scene.sources["manual"])
        outcomes, every, some = run_on_ranks(
            scene,
            Attempt(trained.kind, tested=True),
            Attempt(trained.kind, replay=Replay(picked=tuple(range(1, STEPS + 1)), snapshots=SNAPSHOTS)),
            Attempt(trained.kind, replay=Replay(picked=(3, 9, 11), snapshots=SNAPSHOTS)),
        )
        assert [(outcome.error, outcome.recoveries) for outcome in outcomes] == [("", 1), ("", 1)]
        head = node.head(CAMPAIGN)
        assert (head.closed, head.rollbacks, head.steps) == ("released", 2, STEPS)
        causes = [event.operation.reason for event in scene.events(Kind.ROLLBACK)]  # type: ignore[union-attr]
        assert sorted(causes) == ["memorization-above-threshold", "step-not-admitted"]
        (recital,) = [
            event.operation
            for event in scene.events(Kind.ROLLBACK)
            if isinstance(event.operation, Rollback) and event.operation.memorization
        ]
        recited = {(signal.source, signal.example) for signal in recital.memorization}
        shown_again = [step for outcome in outcomes for step, example in outcome.seen if example in recited]
        assert max(shown_again) == 3
        for name, found in outcomes[0].weights.items():
            assert torch.equal(found, outcomes[1].weights[name])
        for again, executed in ((every, (STEPS, STEPS)), (some, (3, 3))):
            assert [(outcome.error, outcome.differing) for outcome in again] == [("", ())] * 2
            assert [(outcome.replayed, outcome.executed) for outcome in again] == [executed] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_recital_that_only_the_first_rank_finds_is_undone_on_all(kind: str, tmp_path: Path) -> None:
    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        scene.plan_changes.update(planned_steps=4)
        scene.arguments["memorization"] = RecitesOnTheFirst(scene.sources["manual"])
        (outcomes,) = run_on_ranks(scene, Attempt(kind))
        assert [(outcome.error, outcome.rollbacks) for outcome in outcomes] == [("", 1)] * 2
        head = node.head(CAMPAIGN)
        assert (head.closed, head.rollbacks, head.steps) == ("released", 1, 4)
        (rollback,) = [event.operation for event in scene.events(Kind.ROLLBACK)]
        assert isinstance(rollback, Rollback)
        assert len(rollback.memorization) > 1
        for name, found in outcomes[0].weights.items():
            assert torch.equal(found, outcomes[1].weights[name])


def test_run_of_which_a_rank_was_killed_ends_with_the_weights_of_one_that_was_not(
    trained: Trained, tmp_path: Path
) -> None:
    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        scene.settings = replace(
            scene.settings, snapshot_every_steps=1, checkpoint_every_steps=2, audit_snapshot_every_steps=2
        )
        (outcomes,) = run_on_ranks(scene, Attempt(trained.kind, kill=(1, 8)))
        assert [outcome.error for outcome in outcomes] == ["died", "died"]
        picked = Replay(picked=(3, STEPS - 1, STEPS), snapshots=SNAPSHOTS)
        outcomes, again = run_on_ranks(scene, Attempt(trained.kind), Attempt(trained.kind, replay=picked))
        assert [(outcome.error, outcome.replayed, outcome.executed) for outcome in again] == [("", 3, 3)] * 2
        assert [outcome.error for outcome in outcomes] == ["", ""]
        assert [step.index for step in steps_of(scene)] == list(range(1, STEPS + 1))
        assert (node.head(CAMPAIGN).closed, node.head(CAMPAIGN).rollbacks) == ("released", 0)
        for outcome, whole in zip(outcomes, trained.outcomes, strict=True):
            assert min(step for step, _ in outcome.seen) > 1
            assert same_bits(outcome.weights, whole.weights)


def test_replay_by_as_many_processes_gives_every_bit_of_steps_and_accumulators_again(trained: Trained) -> None:
    head = trained.scene.node.head(CAMPAIGN)
    for outcome in trained.replays["whole"]:
        assert (outcome.error, outcome.differing) == ("", ())
        assert (outcome.replayed, outcome.root) == (STEPS, head.root)
    for outcome in trained.replays["picked"]:
        assert (outcome.error, outcome.differing, outcome.replayed) == ("", (), 2)


def test_replay_by_as_many_processes_tells_all_of_them_the_first_difference(trained: Trained) -> None:
    first, second = trained.replays["other decay"]
    assert first == second
    assert first.replayed == 0
    assert first.differing[0] == "step 1"
    assert "optimizer state" in first.differing


def test_picked_steps_of_several_processes_come_out_from_the_snapshots_before_them(trained: Trained) -> None:
    assert [step_of(path) for path in checkpoint_files(trained.scene.directory / SNAPSHOTS)] == [5, 10, STEPS]
    for outcome in trained.replays["from snapshots"]:
        assert (outcome.error, outcome.differing, outcome.replayed) == ("", (), 3)
        assert (outcome.executed, outcome.windows) == (3 + 2 + 2, 1)


def test_snapshot_of_several_processes_is_of_the_whole_job_and_the_first_one_keeps_it(trained: Trained) -> None:
    (path,) = checkpoint_files(trained.scene.directory / SNAPSHOTS, STEPS)
    kept = read_checkpoint(path, CAMPAIGN)
    assert kept.snapshot.root == trained.scene.node.head(CAMPAIGN).root
    assert same_bits(kept.snapshot.tensors, trained.outcomes[0].weights)
    for number, tensor in enumerate(kept.snapshot.tensors.values()):
        assert {held.shape for held in kept.snapshot.optimizer_state.get(number, {}).values()} <= {
            tensor.shape,
            torch.Size(()),
        }
    assert len(kept.others) == 1
    assert not (trained.scene.directory / "rank-1" / "snapshots").exists()


def test_tensors_that_differ_are_named_on_all_processes_and_the_next_snapshot_stands(trained: Trained) -> None:
    first, second = trained.replays["named"]
    assert first == second
    assert first.differing[0] == "step 1"
    assert "tensor head.weight" in first.differing
    assert (first.replayed, first.executed) == (1, 2)


def test_steps_of_several_processes_in_another_order_come_out_within_the_tolerance(trained: Trained) -> None:
    first, second = trained.replays["within"]
    assert first == second
    assert (first.error, first.differing, first.replayed) == ("", (), 2)
    assert (first.executed, first.windows) == (5 + 2, 2)


def with_moments_of_the_last_row(kept: Checkpoint) -> Checkpoint:
    state = {index: dict(held) for index, held in kept.snapshot.optimizer_state.items()}
    state[0]["exp_avg"] = state[0]["exp_avg"].clone()
    state[0]["exp_avg"][-1] += 1e-3
    return replace(kept, snapshot=replace(kept.snapshot, optimizer_state=state))


def with_parameters(kept: Checkpoint) -> Checkpoint:
    tensors = {**kept.snapshot.tensors, "head.bias": kept.snapshot.tensors["head.bias"] + 1e-6}
    return replace(kept, snapshot=replace(kept.snapshot, tensors=tensors))


def with_random_states_of_the_first_for_all(kept: Checkpoint) -> Checkpoint:
    return replace(kept, others=(kept.snapshot.random,))


def of_one_process(kept: Checkpoint) -> Checkpoint:
    return replace(kept, others=())


def test_snapshot_that_is_not_the_logs_on_any_process_is_refused_by_name_on_all(trained: Trained) -> None:
    scene = trained.scene
    tampered = {
        with_moments_of_the_last_row: "its optimizer digest is",
        with_parameters: "its parameter root is",
        with_random_states_of_the_first_for_all: "its random states' digest is",
        of_one_process: "is of 1 processes, the job of 2",
    }
    for tamper in tampered:
        for path in checkpoint_files(scene.directory / SNAPSHOTS):
            write_checkpoint(scene.directory / tamper.__name__, tamper(read_checkpoint(path, CAMPAIGN)), CAMPAIGN)
    attempts = [
        Attempt(trained.kind, replay=Replay(picked=(7,), snapshots=folder))
        for folder in (*(tamper.__name__ for tamper in tampered), SNAPSHOTS)
    ]
    elsewhere = replace(attempts[-1], changes={1: {"directory": scene.directory / "rank-1"}})
    *refused, honest, lacking = run_on_ranks(scene, *attempts, elsewhere)
    for outcomes, text in zip(refused, tampered.values(), strict=True):
        assert [outcome.error_type for outcome in outcomes] == ["Rejected", "Rejected"]
        assert all(text in outcome.error and "the snapshot of step 5" in outcome.error for outcome in outcomes)
    assert [(outcome.error, outcome.replayed) for outcome in honest] == [("", 1)] * 2
    assert [outcome.error_type for outcome in lacking] == ["RankFailed", "ConfigError"]
    assert all("expected a checkpoint, found" in outcome.error for outcome in lacking)


def test_disk_that_takes_no_snapshot_costs_several_processes_the_snapshots_and_not_the_run(tmp_path: Path) -> None:
    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        scene.plan_changes["planned_steps"] = 3
        scene.settings = replace(scene.settings, audit_snapshot_every_steps=1)
        scene.directory.mkdir()
        (scene.directory / "snapshots").write_text("a file, where a folder is wanted")
        (outcomes,) = run_on_ranks(scene, Attempt("FSDP2"))
        assert [outcome.error for outcome in outcomes] == ["", ""]
        assert node.head(CAMPAIGN).closed == "released"


def test_replay_without_a_source_by_several_processes_compares_nothing_and_ends_elsewhere(trained: Trained) -> None:
    first, second = trained.replays["without"]
    assert first == second
    assert (first.error, first.replayed, first.differing) == ("", 0, ())
    assert first.root not in (b"", trained.scene.node.head(CAMPAIGN).root)


def test_replay_by_several_processes_refuses_what_it_cannot_hold_by_name_on_all(trained: Trained) -> None:
    for name, text in (("other wrapper", f"trained with '{trained.kind}'"), ("balanced", "a balance sheet of 2")):
        assert [outcome.error_type for outcome in trained.replays[name]] == ["Rejected", "Rejected"]
        assert all(text in outcome.error for outcome in trained.replays[name])
    first, second = trained.replays["other text"]
    assert (first.error_type, second.error_type) == ("RankFailed", "Rejected")
    assert "digest-mismatch" in first.error


def test_replay_command_in_as_many_processes_prints_one_document(trained: Trained, tmp_path: Path) -> None:
    """All steps of DDP's run, two from snapshots of FSDP2's."""
    some = ["--snapshots", str(trained.scene.directory / SNAPSHOTS), "--steps", f"7,{STEPS}"]
    more, replayed, matched = ([], STEPS, STEPS) if trained.kind == "DDP" else (some, 4, 2)
    tests = Path(rank_fixtures.__file__).parent
    config = tmp_path / "job"
    config.write_bytes(replay_configuration(trained.scene, trained.kind))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--no-python",
        "--nproc-per-node",
        "2",
        "--",
    ]
    command += [str(Path(sys.executable).with_name("countersign")), "replay", "--job", "rank_fixtures:replay_job"]
    command += ["--config", str(config), "--node", trained.scene.node.url, "--campaign", CAMPAIGN.hex()]
    command += ["--chain-id", trained.scene.node.chain_id.hex(), "--out", str(tmp_path / "again.safetensors"), "--json"]
    command += more
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["replayed"], document["matched"], document["difference"]) == (replayed, matched, None)
    assert root_of_tensors(load_file(tmp_path / "again.safetensors")).hex() == document["recorded_root"]


def test_replay_by_one_process_of_a_run_by_two_is_refused_by_name(trained: Trained) -> None:
    torch.manual_seed(1)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    job = ReplayJob(model, optimizer, trained.scene.training_sources, losses, collate)
    with pytest.raises(Rejected, match="trained by '2' processes"):
        replay(read_logged_campaign(trained.scene.client(), CAMPAIGN), job)


def test_what_would_not_be_one_job_is_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        other_texts = {**scene.texts, "manual": examples_of("something else")}
        by_head = {"build": TinyAttention, "plan_changes": {"routing_granularity": "head"}}
        attempts = (
            Attempt("neither"),
            Attempt("DDP with a hook"),
            Attempt("DDP", changes={1: {"plan_changes": {**scene.plan_changes, "planned_steps": 5}}}),
            Attempt("DDP", changes={1: {"texts": other_texts}}),
            Attempt("FSDP2", changes={0: by_head, 1: by_head}),
            Attempt("DDP", changes={1: {"settings": replace(scene.settings, audit_snapshot_every_steps=5)}}),
            Attempt("DDP", changes={1: {"trained": faster}}),
        )
        neither, hooked, planned, content, sharded, settled, stepping = run_on_ranks(scene, *attempts)
        for outcomes, text in (
            (neither, "neither in DistributedDataParallel"),
            (hooked, "communication hook"),
            (sharded, "ranks hold rows, not heads"),
        ):
            assert {outcome.error_type for outcome in outcomes} == {"ConfigError"}
            assert all(text in outcome.error for outcome in outcomes)
        assert "rank 1 was started with another plan" in planned[0].error
        assert "rank 0 was started with another plan" in planned[1].error
        assert ["was started with another settings" in outcome.error for outcome in settled] == [True, True]
        assert "rank 1 was started with another optimizer.0.lr: '0.02', not '0.01'" in stepping[0].error
        assert "rank 0 was started with another optimizer.0.lr: '0.01', not '0.02'" in stepping[1].error
        assert (content[0].error_type, content[1].error_type) == ("RankFailed", "Rejected")
        assert "rank 1: Rejected: digest-mismatch" in content[0].error
        assert not scene.events(Kind.CAMPAIGN)


def test_files_that_the_first_rank_alone_has_are_recorded_and_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prepare.py").write_text("cleaned = True\n")
    monkeypatch.chdir(tmp_path)
    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        files = {"preprocessing": Path("prepare.py"), "missing": Path("filter.py")}
        scene.plan_changes.update(planned_steps=2, files=files)
        one = {"plan_changes": {**scene.plan_changes, "files": {"preprocessing": files["preprocessing"]}}}
        missing, taken = run_on_ranks(
            scene, Attempt("DDP"), Attempt("DDP", changes={0: one, 1: {**one, "build": Elsewhere}})
        )
        assert [(each.error_type, "filter.py: expected a file to record" in each.error) for each in missing] == [
            ("ConfigError", True)
        ] * 2
        assert [outcome.error for outcome in taken] == ["", ""]
        (opening,) = scene.events(Kind.CAMPAIGN)
        recorded = {setting.name: setting.value for setting in opening.operation.hyperparameters}  # type: ignore[union-attr]
        assert recorded["files.preprocessing.sha256"] == hashlib.sha256(b"cleaned = True\n").hexdigest()


def test_examples_the_log_never_admitted_change_no_bit_on_any_rank(trained: Trained, tmp_path: Path) -> None:
    with running_node() as node:
        scene = new_scene(node, tmp_path / "run")
        scene.salt = None
        scene.texts["secret"] = examples_of("another secret")
        (outcomes,) = run_on_ranks(scene, Attempt(trained.kind))
        for outcome, other in zip(outcomes, trained.outcomes, strict=True):
            assert same_bits(outcome.weights, other.weights)
