"""Runs whose process died, taken up again: one continuous chain, nothing twice, nothing missing, the same weights."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_job_fixtures import CAMPAIGN as DEMO_CAMPAIGN
from demo_job_fixtures import written_config
from fake_node import running_node
from governed_fixtures import CAMPAIGN, EVERYTHING, STEPS, RecitesAt, Scene, losses, same_bits, weights
from torch import nn

from consensus.event import CheckedEvent, Kind
from consensus.portions import Rollback, StepOperation
from consensus.rejection import ConfigError, Reason, Rejected
from trainer_client import checkpoints, durable
from trainer_client.commitment import parameter_root_of
from trainer_client.governed import GovernedRun
from trainer_client.record import Example


class Killed(Exception):
    """Stands for the end of the process, as far as one process can stage it."""


@pytest.fixture
def resumable(scene: Scene) -> Scene:
    """Snapshots and checkpoints at every step."""
    scene.register(classes=EVERYTHING)
    scene.settings = replace(scene.settings, snapshot_every_steps=1, checkpoint_every_steps=1)
    scene.plan_changes["accumulator_window_steps"] = 5
    return scene


def train_until(scene: Scene, step: int, model: Mapping[str, object] | None = None) -> None:
    """A run that dies before step ``step`` is learned."""

    def die(at: int) -> None:
        if at == step:
            raise Killed

    with pytest.raises(Killed):
        train(scene, die)


def train(scene: Scene, at_step: Callable[[int], None] = lambda step: None) -> GovernedRun[bytes]:
    return scene.train(at_step)


def kept_by(scene: Scene) -> Path:
    return scene.directory / "checkpoints" / CAMPAIGN.hex()


def recorded_steps(scene: Scene) -> list[int]:
    return [event.operation.index for event in scene.events(Kind.STEP)]  # type: ignore[union-attr]


def uninterrupted(scene: Scene, directory: Path) -> dict[str, torch.Tensor]:
    with running_node() as node:
        other = Scene(node, directory, dict(scene.texts))
        other.register(classes=EVERYTHING)
        other.plan_changes["accumulator_window_steps"] = 5
        other.train()
        return weights(other.model)


@pytest.mark.parametrize("died_at", [1, 2, 7, STEPS])
def test_run_that_died_ends_with_the_weights_of_one_that_did_not(
    resumable: Scene, tmp_path: Path, died_at: int
) -> None:
    train_until(resumable, died_at)
    torch.manual_seed(99)
    random.seed(99)
    train(resumable)
    assert recorded_steps(resumable) == list(range(1, STEPS + 1))
    head = resumable.node.head(CAMPAIGN)
    assert (head.closed, head.rollbacks, head.attempt) == ("released", 0, 0)
    assert head.root == parameter_root_of(resumable.model)
    assert len(resumable.events(Kind.CAMPAIGN)) == 1
    assert same_bits(weights(resumable.model), uninterrupted(resumable, tmp_path / "other"))
    lines = [json.loads(line) for line in (resumable.directory / "steps.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] in ("campaign", "resumed")] == ["campaign", "resumed"]


def test_run_dies_before_every_step_and_arrives(resumable: Scene, tmp_path: Path) -> None:
    resumable.plan_changes["model"] = {"dropout": 0.5}
    for step in range(1, STEPS + 1):
        resumable.plan_changes["model"] = {"dropout": 0.5}
        train_until(resumable, step)
    resumable.plan_changes["model"] = {"dropout": 0.5}
    train(resumable)
    assert recorded_steps(resumable) == list(range(1, STEPS + 1))
    assert resumable.node.head(CAMPAIGN).closed == "released"
    roots = [event.operation.accumulator_root for event in resumable.events(Kind.STEP)]  # type: ignore[union-attr]
    assert [number for number, root in enumerate(roots, 1) if root] == [5, 10, STEPS]


def test_steps_far_from_the_checkpoint_are_replayed_and_recorded_nowhere(resumable: Scene, tmp_path: Path) -> None:
    resumable.settings = replace(resumable.settings, snapshot_every_steps=5, checkpoint_every_steps=5)
    train_until(resumable, 10)
    seen: list[tuple[int, bool]] = []

    with resumable.run() as run:
        for batch in run.batches():
            seen.append((batch.step, batch.replayed))
            run.learn(losses(resumable.model, batch.inputs))
        run.release(resumable.directory / "tuned.safetensors")
    replayed = [step for step, again in seen if again]
    assert replayed == list(range(replayed[0], replayed[-1] + 1))
    assert len(replayed) >= 2
    assert [step for step, again in seen if not again] == list(range(replayed[-1] + 1, STEPS + 1))
    assert recorded_steps(resumable) == list(range(1, STEPS + 1))
    assert same_bits(weights(resumable.model), uninterrupted(resumable, tmp_path / "other"))


def test_recital_that_was_recorded_and_not_undone_is_undone_first(
    resumable: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    recites = RecitesAt(6)

    def die(run: GovernedRun[bytes], *_: object) -> None:
        run._ledger.wait_all_settled()  # the recital is on the log; a process that dies waits for nothing
        raise Killed

    resumable.arguments["memorization"] = recites
    with monkeypatch.context() as patched:
        patched.setattr(GovernedRun, "_swept", die)
        with pytest.raises(Killed):
            train(resumable, recites.at.append)
    assert resumable.node.head(CAMPAIGN).rollback_required
    train(resumable, recites.at.append)
    head = resumable.node.head(CAMPAIGN)
    assert (head.closed, head.rollbacks, head.steps, head.attempt) == ("released", 1, STEPS, 1)
    (rollback,) = resumable.events(Kind.ROLLBACK)
    assert isinstance(rollback.operation, Rollback)
    assert [(signal.source, signal.example) for signal in rollback.operation.memorization] == recites.caught
    assert recorded_steps(resumable) == [*range(1, 7), *range(6, STEPS + 1)]
    later = sum(recites.caught[0] in resumable.presented(step) for step in range(6, STEPS + 1))
    assert resumable.reasons()["memorization-above-threshold"] == later > 0


def test_example_recited_long_before_stays_out_after_the_run_is_taken_up(resumable: Scene) -> None:
    caught: list[Example] = []

    class Recites:
        def glance(self, shown: Mapping[Example, bytes], hits_BT: torch.Tensor, floor: int) -> list[Example]:
            return []

        def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
            if caught:
                return {}
            caught.append(min(shown))
            return {caught[0]: 900}

    resumable.arguments["memorization"] = Recites()
    train_until(resumable, 9)
    train(resumable)
    later = sum(caught[0] in resumable.presented(step) for step in range(1, STEPS + 1))
    assert resumable.reasons()["memorization-above-threshold"] == later > 1
    assert resumable.node.head(CAMPAIGN).closed == "released"


def test_steps_that_reach_the_log_too_late_are_undone_and_taken_again(resumable: Scene, tmp_path: Path) -> None:
    def spool(step: int) -> None:
        if step == 4:
            resumable.node.hold = True
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(resumable, spool)
    resumable.node.pending.clear()
    resumable.node.hold = False
    left = resumable.node.head(CAMPAIGN).steps
    assert left < 5
    refused: list[bytes] = []

    def too_late(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, StepOperation) and event.operation.index == left + 1 and not refused:
            refused.append(event.id)
        return Rejected(Reason.GRANT_CLOSED, "too late") if event.id in refused else None

    resumable.node.refuse_step = too_late
    train(resumable)
    head = resumable.node.head(CAMPAIGN)
    assert (head.closed, head.steps) == ("released", STEPS)
    (rollback,) = resumable.events(Kind.ROLLBACK)
    assert isinstance(rollback.operation, Rollback)
    assert rollback.operation.next_index == left + 1
    assert rollback.operation.discarded[-1] == refused[0]
    assert recorded_steps(resumable) == list(range(1, STEPS + 1))
    assert same_bits(weights(resumable.model), uninterrupted(resumable, tmp_path / "other"))


def test_damaged_newest_checkpoint_leaves_the_one_before(
    resumable: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumable.step_by_step = True
    train_until(resumable, 8)
    kept = sorted(kept_by(resumable).iterdir())
    assert len(kept) == 2
    spoiled = bytearray(kept[-1].read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    kept[-1].write_bytes(spoiled)
    train(resumable)
    assert "the checkpoint is damaged" in caplog.text
    assert same_bits(weights(resumable.model), uninterrupted(resumable, tmp_path / "other"))


@pytest.mark.parametrize("spoil", [b"", b"no checkpoint", bytes(100)], ids=["empty", "short", "zeros"])
def test_checkpoints_that_are_all_damaged_are_named_and_nothing_is_trained(resumable: Scene, spoil: bytes) -> None:
    train_until(resumable, 8)
    for path in kept_by(resumable).iterdir():
        path.write_bytes(spoil)
    with pytest.raises(ConfigError, match=r"the checkpoint is damaged"):
        train(resumable)
    assert max(recorded_steps(resumable)) < 8


def test_other_terms_are_refused_with_both_values(resumable: Scene) -> None:
    train_until(resumable, 4)
    resumable.plan_changes["batch_size"] = 5
    resumable.plan_changes["name"] = "another name"
    with pytest.raises(Rejected) as refusal:
        train(resumable)
    assert refusal.value.reason is Reason.BAD_FIELD
    for words in ("batch_size: opened with 6, asked for 5", "name: opened with 'a campaign', asked for 'another name'"):
        assert words in refusal.value.detail


def test_released_campaign_is_not_taken_up(resumable: Scene) -> None:
    train(resumable)
    with pytest.raises(Rejected) as refusal:
        train(resumable)
    assert refusal.value.reason is Reason.CAMPAIGN_CLOSED


def test_without_checkpoints_a_second_run_of_the_campaign_is_refused(resumable: Scene) -> None:
    resumable.settings = replace(resumable.settings, checkpoint_every_steps=0)
    train_until(resumable, 4)
    assert not (resumable.directory / "checkpoints").exists()
    with pytest.raises(Rejected):
        train(resumable)
    assert len(resumable.events(Kind.CAMPAIGN)) == 1


def test_another_campaigns_checkpoint_is_named(resumable: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    train_until(resumable, 4)
    store = checkpoints.CheckpointStore(kept_by(resumable), bytes(32), 1)
    with pytest.raises(ConfigError, match="expected a checkpoint of campaign"):
        store.newest()
    store.close()


def test_node_that_hides_a_step_is_named(resumable: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    resumable.settings = replace(resumable.settings, snapshot_every_steps=50, checkpoint_every_steps=50)
    train_until(resumable, 6)
    listing = type(resumable.node).listing

    def hiding(self: object, *arguments: object) -> dict[str, object]:
        found = listing(self, *arguments)  # type: ignore[arg-type]
        events = [row for row in found["events"] if row["kind"] == "step"]  # type: ignore[attr-defined]
        return {**found, "events": [row for row in found["events"] if row != events[1]]}  # type: ignore[attr-defined]

    monkeypatch.setattr(type(resumable.node), "listing", hiding)
    with pytest.raises(Rejected) as refusal:
        train(resumable)
    assert refusal.value.reason is Reason.STEP_CHAIN_BROKEN


def test_full_disk_costs_a_checkpoint_and_not_the_run(
    resumable: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync
    calls = 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 and "checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", failing)
    resumable.step_by_step = True
    train(resumable)
    assert "no checkpoint of step" in caplog.text
    assert not list(kept_by(resumable).glob("*.unfinished"))
    assert resumable.node.head(CAMPAIGN).closed == "released"


def test_part_whose_state_is_no_plain_data_costs_the_checkpoints_and_not_the_run(
    resumable: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd:
        def step(self) -> None:
            return

        def state_dict(self) -> dict[str, object]:
            return {"self": Path("a path is code to unpickle")}

        def load_state_dict(self, state: dict[str, object]) -> None:
            return

    resumable.arguments["scheduler"] = Odd()
    train(resumable)
    assert "no checkpoints: " in caplog.text
    assert "cannot be read as plain data" in caplog.text
    assert list(kept_by(resumable).iterdir()) == []
    assert resumable.node.head(CAMPAIGN).closed == "released"


# The real thing: a process, and kill -9


DYING_JOB = """
import os, signal, sys
from trainer_client.demo import job

printed = job._print

def die(line):
    printed(line)
    if line["event"] == "step" and line["step"] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

job._print = die
sys.exit(job.main(sys.argv[2:]))
"""
"""The demonstration's job, which kills itself as it reports a step: whoever kills it may come when it is done."""

NEVER = 0


def roots(events: list[CheckedEvent]) -> list[bytes]:
    return [event.operation.root_after for event in events if isinstance(event.operation, StepOperation)]


def test_job_process_killed_again_and_again_ends_as_if_it_never_was(tmp_path: Path) -> None:
    options: dict[str, object] = {"steps": 12, "snapshot_every_steps": 2, "checkpoint_every_steps": 2, "threads": 1}
    kills = (1, 4, 5, 9, 12)
    found = []
    for name, deaths in (("killed", kills), ("whole", ())):
        folder = tmp_path / name
        folder.mkdir()
        with running_node() as node:
            node.policy()
            config = written_config(
                node, folder, **options, cache_directory=str(tmp_path / "cache"), accumulator_window_steps=4
            )
            for death in (*deaths, NEVER):
                command = [sys.executable, "-c", DYING_JOB, str(death), "--config", str(config)]
                ran = subprocess.run(command, capture_output=True, timeout=600, check=False)
                assert ran.returncode == (0 if death == NEVER else -signal.SIGKILL), ran.stderr.decode()
            head = node.head(DEMO_CAMPAIGN)
            assert (head.closed, head.steps, head.rollbacks) == ("released", 12, 0)
            steps = [event for event in node.order if event.entry.kind is Kind.STEP]
            assert [event.operation.index for event in steps] == list(range(1, 13))  # type: ignore[union-attr]
            found.append(roots(steps))
    assert found[0] == found[1]
