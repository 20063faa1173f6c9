"""Picked steps taken again from snapshots: the same bits, the step and tensor that differ, no forged snapshot."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from demo_job_fixtures import CAMPAIGN as DEMO_CAMPAIGN
from demo_job_fixtures import written_config
from fake_node import SALT, FakeNode, running_node
from governed_fixtures import (
    BATCH_SIZE,
    CAMPAIGN,
    EVERYTHING,
    KEY,
    STEPS,
    RecitesAt,
    Scene,
    TinyModel,
    collate,
    losses,
    replay_job,
    same_bits,
    weights,
)
from torch import Tensor, nn

from consensus.beacon import beacon_message, make_beacon, picked_steps
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.event import Kind
from consensus.portions import Portions, SaltedPortion, Wire
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.review import AuditAnswer, AuditChallenge, AuditResult, PickedStep
from node.cli import main
from trainer_client.audit_snapshots import AuditSnapshots, SnapshotFolder
from trainer_client.checkpoints import Checkpoint, checkpoint_files, read_checkpoint, write_checkpoint
from trainer_client.commitment import root_of_tensors, tensor_descriptors
from trainer_client.demo.job import main as demo_job
from trainer_client.governed import GovernedRun, governed
from trainer_client.picked_replay import PickedReplay, replay_picked
from trainer_client.plan import CampaignPlan
from trainer_client.replay import ReplayJob, read_logged_campaign
from trainer_client.replay_command import listed_steps
from trainer_client.rollback import Snapshot
from trainer_client.tensor_digests import FILE_NAME, TensorDigests, differing_tensors

EVERY = 5


def kept_by(scene: Scene) -> Path:
    return scene.directory / "snapshots" / CAMPAIGN.hex()


def picked(scene: Scene, made: ReplayJob[bytes], *steps: int, snapshots: bool = True) -> PickedReplay:
    folder = SnapshotFolder(kept_by(scene), CAMPAIGN) if snapshots else None
    return replay_picked(read_logged_campaign(scene.client(), CAMPAIGN), made, steps, folder)


def snapshot_of(scene: Scene, step: int) -> Snapshot:
    (path,) = checkpoint_files(kept_by(scene), step)
    return read_checkpoint(path, CAMPAIGN).snapshot


def put(scene: Scene, snapshot: Snapshot) -> None:
    """In place of the one of that step, with a file name that fits."""
    for path in checkpoint_files(kept_by(scene), snapshot.step):
        path.unlink()
    write_checkpoint(kept_by(scene), Checkpoint(snapshot, frozenset()), CAMPAIGN)


@pytest.fixture
def kept(scene: Scene) -> Scene:
    """A released run with dropout and accumulators, and a snapshot after each window of five steps."""
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=EVERY)
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=EVERY)
    scene.train()
    return scene


def test_picked_steps_come_out_from_the_nearest_snapshots(kept: Scene) -> None:
    assert [int(path.name[5:14]) for path in checkpoint_files(kept_by(kept))] == [5, 10, STEPS]
    made = replay_job(kept)
    found = picked(kept, made, 3, 7, 12)
    assert [(each.step, each.differing) for each in found.picked] == [(3, ()), (7, ()), (12, ())]
    assert (found.matched, found.difference) == (3, None)
    assert found.executed == 3 + 2 + 2
    assert (found.windows, found.windows_cut) == (1, 0)
    assert found.end_root == kept.node.head(CAMPAIGN).root
    assert same_bits(weights(made.model), weights(kept.model))


def test_picked_steps_without_snapshots_are_taken_from_the_base(kept: Scene) -> None:
    found = picked(kept, replay_job(kept), 3, 7, snapshots=False)
    assert (found.matched, found.executed, found.windows) == (2, 7, 1)


def test_window_that_began_before_the_snapshot_is_counted_and_not_compared(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=EVERY)
    scene.train()
    found = picked(scene, replay_job(scene), 6, 12)
    assert (found.matched, found.executed, found.windows, found.windows_cut) == (2, 2 + 4, 1, 2)


@pytest.mark.parametrize("steps", [(), (0,), (STEPS + 1,), (3, 3), (7, 3)])
def test_steps_that_are_not_on_the_log_are_refused(kept: Scene, steps: tuple[int, ...]) -> None:
    with pytest.raises(Rejected) as refusal:
        picked(kept, replay_job(kept), *steps)
    assert refusal.value.reason is Reason.STEP_CHAIN_BROKEN


def test_first_step_that_differs_is_found_between_snapshots_and_later_snapshots_stand(kept: Scene) -> None:
    calls: list[int] = []

    def spoiled(model: nn.Module, inputs: Tensor) -> Tensor:
        calls.append(1)
        return losses(model, inputs) * (1.001 if len(calls) == 2 else 1.0)

    found = picked(kept, replay_job(kept, loss=spoiled), 8, 9, 12)
    assert found.difference is not None
    assert found.difference.step == 7
    assert "parameter block head" in found.difference.what
    (eighth, ninth, last) = found.picked
    assert eighth.differing == ninth.differing == ("step 7", *found.difference.what)
    assert last.differing == ()
    assert (found.matched, found.executed) == (1, 2 + 2)


def moved_bias(scene: Scene, at: int) -> None:
    """An operator that moves one number after the optimizer's step, and records what then is there."""

    def body(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        assert run.backward(losses(scene.model, inputs))
        run._optimizer.step()
        if step == at:
            with torch.no_grad():
                scene.model.head.bias[3] += 1e-3
        run.optimizer_stepped()

    scene.loop(body)


def with_moved_bias(scene: Scene) -> Path:
    """A run with snapshots after steps 4 and 8 whose operator moved a bias in step 7; its file of digests."""
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=4)
    scene.plan_changes.update(model={"dropout": 0.5})
    moved_bias(scene, 7)
    return kept_by(scene) / FILE_NAME


def test_tensor_that_was_moved_beside_training_is_named(scene: Scene) -> None:
    with_moved_bias(scene)
    found = picked(scene, replay_job(scene), 6, 8, 9)
    first, second, third = found.picked
    assert (first.differing, third.differing) == ((), ())
    assert second.differing == ("step 7", "parameter block head", "tensor head.bias")


def other_digests(content: bytes) -> bytes:
    record = 8 + 32 * len(TinyModel().state_dict())
    return bytes(byte ^ (number % record >= 8) for number, byte in enumerate(content))


def none(content: bytes) -> bytes:
    return b""


def torn(content: bytes) -> bytes:
    return content[: 6 * (len(content) // STEPS) + 11]


@pytest.mark.parametrize("spoil", [other_digests, none, torn])
def test_tensors_digests_that_do_not_give_the_logs_root_name_no_tensor(
    scene: Scene, spoil: Callable[[bytes], bytes]
) -> None:
    path = with_moved_bias(scene)
    path.write_bytes(spoil(path.read_bytes()))
    assert picked(scene, replay_job(scene), 7).picked[0].differing == ("parameter block head",)


def test_record_that_a_crash_tore_puts_no_other_out_of_place(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.ones(3)}
    digests = TensorDigests(tmp_path)
    digests.append(1, tensor_descriptors(tensors))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b"torn")
    later = {**tensors, "b": torch.zeros(3)}
    digests.append(2, tensor_descriptors(later))
    digests.append(2, tensor_descriptors(tensors))
    for step, root, mine, found in (
        (1, root_of_tensors(tensors), later, ("b",)),
        (2, root_of_tensors(later), tensors, ("b",)),
        (2, root_of_tensors(tensors), tensors, ()),
        (3, root_of_tensors(tensors), later, ()),
    ):
        assert differing_tensors(tmp_path, step, root, mine) == found


def test_run_without_snapshots_keeps_no_digests(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.train()
    assert not (scene.directory / "snapshots").exists()


def with_parameters(snapshot: Snapshot) -> Snapshot:
    tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    tensors["head.bias"][0] += 1e-6
    return replace(snapshot, tensors=tensors)


def with_moments(snapshot: Snapshot) -> Snapshot:
    state = {index: dict(held) for index, held in snapshot.optimizer_state.items()}
    state[0]["exp_avg"] = state[0]["exp_avg"] * 1.0001
    return replace(snapshot, optimizer_state=state)


def with_rate(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, optimizer_settings=tuple({**group, "lr": 0.02} for group in snapshot.optimizer_settings))


def with_randomness(snapshot: Snapshot) -> Snapshot:
    states = torch.Generator().manual_seed(5).get_state()
    return replace(snapshot, random=replace(snapshot.random, torch_cpu=states))


def with_python_randomness(snapshot: Snapshot) -> Snapshot:
    version, numbers, gauss = snapshot.random.python
    return replace(snapshot, random=replace(snapshot.random, python=(version, (numbers[0] ^ 1, *numbers[1:]), gauss)))


@pytest.mark.parametrize(
    ("tamper", "what"),
    [
        (with_parameters, "its parameter root is"),
        (with_moments, "its optimizer digest is"),
        (with_rate, "its optimizer digest is"),
        (with_randomness, "its random states' digest is"),
        (with_python_randomness, "its random states' digest is"),
    ],
)
def test_tampered_snapshot_is_refused_with_both_digests(
    kept: Scene, tamper: Callable[[Snapshot], Snapshot], what: str
) -> None:
    put(kept, tamper(snapshot_of(kept, EVERY)))
    with pytest.raises(Rejected) as refusal:
        picked(kept, replay_job(kept), 7)
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    assert f"the snapshot of step 5 is not the log's: {what}" in refusal.value.detail
    assert "the log has" in refusal.value.detail


def of_other_shape(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, tensors={**snapshot.tensors, "head.bias": torch.zeros(3)})


def without_moments(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, optimizer_settings=())


def with_no_random_state(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, random=replace(snapshot.random, torch_cpu=torch.zeros(4, dtype=torch.uint8)))


@pytest.mark.parametrize("tamper", [of_other_shape, without_moments, with_no_random_state])
def test_snapshot_of_another_job_is_refused_by_name(kept: Scene, tamper: Callable[[Snapshot], Snapshot]) -> None:
    put(kept, tamper(snapshot_of(kept, EVERY)))
    with pytest.raises(Rejected, match="the snapshot of step 5 is none of this job") as refusal:
        picked(kept, replay_job(kept), 7)
    assert refusal.value.reason is Reason.DIGEST_MISMATCH


def test_snapshot_of_another_step_under_this_ones_name_is_refused(kept: Scene) -> None:
    (path,) = checkpoint_files(kept_by(kept), 10)
    path.rename(path.with_name(path.name.replace("000000010", "000000006")))
    with pytest.raises(ConfigError, match="expected a snapshot of step 6, found step 10"):
        picked(kept, replay_job(kept), 7)


def test_snapshots_that_are_none_are_named(kept: Scene, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected files called step-….checkpoint, found none"):
        SnapshotFolder(tmp_path / "empty", CAMPAIGN)
    (path,) = checkpoint_files(kept_by(kept), EVERY)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="the checkpoint is damaged"):
        picked(kept, replay_job(kept), 7)


# What the log does not bind: a schedule, a buffer outside the parameter root


class Masked(TinyModel):
    """With a buffer that is in no ``state_dict``."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.register_buffer("scale", torch.ones(8), persistent=False)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        return super().forward(bytes_BT) * self.scale.mean()


def scheduled_job(scene: Scene) -> ReplayJob[bytes]:
    torch.manual_seed(1)
    model = Masked()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return replay_job(scene, model=model, optimizer=optimizer, scheduler=scheduler)


def train_scheduled(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    made = scheduled_job(scene)
    plan: dict[str, Any] = {
        "chain_id": scene.node.chain_id,
        "operator": scene.node.member_id("operator-1"),
        "campaign": CAMPAIGN,
        "name": "a campaign",
        "purpose": "fine-tuning",
        "base_model": "tiny",
        "sampler_seed": bytes(32),
        "batch_size": BATCH_SIZE,
        "planned_steps": STEPS,
    }
    with governed(
        made.model,
        made.optimizer,
        plan=CampaignPlan(**plan),
        sources=scene.training_sources,
        node=scene.client(),
        job_key=KEY,
        run_directory=scene.directory,
        collate=collate,
        scheduler=made.scheduler,
        settings=replace(scene.settings, audit_snapshot_every_steps=EVERY),
    ) as run:
        for batch in run.batches():
            run.learn(losses(made.model, batch.inputs))


def test_schedule_is_the_jobs_own_and_goes_on_where_the_log_stands(scene: Scene) -> None:
    train_scheduled(scene)
    found = picked(scene, scheduled_job(scene), 2, 7, 12)
    assert (found.matched, found.executed) == (3, 2 + 2 + 2)


def test_buffer_that_no_root_covers_is_the_jobs_own_whatever_the_snapshot_says(scene: Scene) -> None:
    train_scheduled(scene)
    snapshot = snapshot_of(scene, EVERY)
    assert "scale" in snapshot.tensors
    put(scene, replace(snapshot, tensors={**snapshot.tensors, "scale": torch.full((8,), 2.0)}))
    made = scheduled_job(scene)
    assert picked(scene, made, 7).matched == 1
    assert made.model.scale.tolist() == [1.0] * 8  # type: ignore[union-attr,operator]


# The run that keeps them


def test_run_that_died_keeps_the_snapshots_of_one_that_did_not(scene: Scene) -> None:
    class Killed(Exception):
        pass

    def die(step: int) -> None:
        if step == 8:
            raise Killed

    scene.register(classes=EVERYTHING)
    scene.settings = replace(
        scene.settings, snapshot_every_steps=1, checkpoint_every_steps=1, audit_snapshot_every_steps=2
    )
    scene.plan_changes["model"] = {"dropout": 0.5}
    with pytest.raises(Killed):
        scene.train(die)
    for path in checkpoint_files(kept_by(scene), 6):
        path.unlink()
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.train()
    kept = [int(path.name[5:14]) for path in checkpoint_files(kept_by(scene))]
    assert kept in ([2, 4, 6, 8, 10, 12], [2, 4, 8, 10, 12])
    found = picked(scene, replay_job(scene), *(step + 1 for step in kept[:-1]))
    assert (found.matched, found.executed) == (len(kept) - 1, len(kept) - 1)


def test_step_that_was_undone_leaves_no_snapshot_of_itself(scene: Scene) -> None:
    recites = RecitesAt(6)
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=3)
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.arguments["memorization"] = recites
    scene.train(recites.at.append)
    assert scene.node.head(CAMPAIGN).rollbacks == 1
    assert [int(path.name[5:14]) for path in checkpoint_files(kept_by(scene))] == [3, 6, 9, 12]
    assert picked(scene, replay_job(scene), 4, 7, 10).matched == 3


def test_full_disk_costs_a_snapshot_and_not_the_run(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if "snapshots" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=EVERY)
    monkeypatch.setattr("trainer_client.durable.os.fsync", failing)
    scene.train()
    assert "no snapshot of step 5 for audits" in caplog.text
    assert checkpoint_files(kept_by(scene)) == []
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_memory_that_is_short_costs_a_snapshot_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("vast", torch.zeros(1).expand(1 << 46), persistent=False)
    audits = AuditSnapshots(tmp_path, CAMPAIGN, 1)
    audits.keep(1, model, torch.optim.SGD(model.parameters(), lr=0.1), ())
    audits.close()
    assert "no snapshot of step 1 for audits" in caplog.text
    assert checkpoint_files(tmp_path) == []


# The command


def test_command_takes_picked_steps_again_from_the_demonstrations_snapshots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_node() as node:
        node.policy()
        config = written_config(node, tmp_path, threads=1, accumulator_window_steps=3, audit_snapshot_every_steps=3)
        assert demo_job(["--config", str(config)]) == 0
        capsys.readouterr()
        run_directory = Path(json.loads(config.read_text())["run_directory"])
        snapshots = config.parent / run_directory / "snapshots" / DEMO_CAMPAIGN.hex()

        def ask(*more: object) -> tuple[int, str]:
            arguments = [
                "replay", "--job", "trainer_client.demo.job:replay_job", "--config", config, "--node", node.url,
                "--chain-id", node.chain_id.hex(), "--campaign", DEMO_CAMPAIGN.hex(), *more,
            ]  # fmt: skip
            result = CliRunner().invoke(main, [str(argument) for argument in arguments])
            assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
            return result.exit_code, result.output

        code, printed = ask("--snapshots", snapshots, "--steps", "5-6")
        assert (code, "replayed 3 steps in" in printed) == (0, True), printed
        assert "2 of the 2 asked for came out as recorded, bit for bit" in printed
        assert "accumulators: 1 whole windows compared, 0 began before" in printed
        code, printed = ask("--snapshots", snapshots, "--steps", "2,5", "--json")
        document = json.loads(printed)
        assert (code, document["replayed"], document["matched"]) == (0, 4, 2)
        assert document["picked"] == [{"step": 2, "differing": []}, {"step": 5, "differing": []}]
        changed = json.loads(config.read_text()) | {"learning_rate_micro": 1_999}
        config.write_text(json.dumps(changed))
        code, printed = ask("--steps", "2")
        assert (code, "step 1 did not come out as recorded" in printed) == (1, True), printed
        assert "give --steps or --audit with --snapshots" in ask("--snapshots", snapshots)[1]
        assert "--steps and --audit compare steps" in ask("--steps", "2", "--balance")[1]


def beacon_of(node: FakeNode, number: int) -> bytes:
    """Made of the shares of every member of the fake node's genesis."""
    scheme = scheme_for(node.genesis)
    message = beacon_message(node.chain_id, 0, DEMO_CAMPAIGN, number)
    shares = {}
    for voter in node.committee.voters:
        secret = node.secrets[voter.name].key_share
        assert secret is not None
        shares[voter.id] = scheme.share(secret, message)
    return make_beacon(scheme, message, shares)


def test_audit_by_lot_is_answered_by_a_replay_from_snapshots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the challenge to the answer that the log admits; only replaying and finality are between."""
    auditor = "data-source-2"
    with running_node() as node:
        node.policy(auditors=(node.member_id(auditor),))
        config = written_config(node, tmp_path, threads=1, accumulator_window_steps=3, audit_snapshot_every_steps=2)
        assert demo_job(["--config", str(config)]) == 0
        capsys.readouterr()
        run_directory = Path(json.loads(config.read_text())["run_directory"])
        snapshots = config.parent / run_directory / "snapshots" / DEMO_CAMPAIGN.hex()

        def say(kind: Kind, content: Wire) -> bytes:
            portions = Portions(None, SaltedPortion(SALT, encode(content)), None)
            return node.by_member(auditor, kind, portions, DEMO_CAMPAIGN)

        asked = AuditChallenge(1, 1, 6, 3, node.now_ms + 3_600_000, "")
        challenge = say(Kind.AUDIT_CHALLENGE, asked)
        assert node.head(DEMO_CAMPAIGN).open_findings == (challenge,)
        beacon = beacon_of(node, 1)
        steps = picked_steps(beacon, 1, 6, 3)
        audit = tmp_path / "audit.json"
        audit.write_text(
            json.dumps(
                {
                    "chain_id": node.chain_id.hex(),
                    "campaign": DEMO_CAMPAIGN.hex(),
                    "challenge": challenge.hex(),
                    "beacon": beacon.hex(),
                    "first_step": 1,
                    "last_step": 6,
                    "steps": steps,
                }
            )
        )
        report = tmp_path / "replay.json"
        arguments = [
            "replay", "--job", "trainer_client.demo.job:replay_job", "--config", config, "--node", node.url,
            "--chain-id", node.chain_id.hex(), "--campaign", DEMO_CAMPAIGN.hex(), "--snapshots", snapshots,
            "--audit", audit, "--report", report,
        ]  # fmt: skip
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        assert "3 of the 3 asked for came out as recorded, bit for bit" in result.output
        document = json.loads(report.read_text())
        assert document["audit"]["challenge"] == challenge.hex()
        picked = tuple(PickedStep(each["step"], tuple(each["differing"])) for each in document["picked"])
        assert tuple(each.step for each in picked) == steps
        end_root = bytes.fromhex(document["end_root"])
        answer = AuditAnswer(challenge, beacon, picked)
        say(Kind.AUDIT_RESULT, AuditResult(1, 6, document["matched"], (), end_root, "", (), "", answer))
        assert node.head(DEMO_CAMPAIGN).open_findings == ()
        for spoil in ({"campaign": "ab" * 32}, {"steps": "all"}):
            audit.write_text(json.dumps(json.loads(audit.read_text()) | spoil))
            result = CliRunner().invoke(main, [str(argument) for argument in arguments])
            assert (result.exit_code, "--audit" in result.stderr) == (2, True), result.stderr


def test_lists_of_steps_are_read_strictly() -> None:
    assert listed_steps("12,40-44,41") == (12, 40, 41, 42, 43, 44)
    for text in ("", "a", "3-", "-3", "3-2", "1_0", "٣", "1-2097152"):
        with pytest.raises(ConfigError, match="--steps"):
            listed_steps(text)
