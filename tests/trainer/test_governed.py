"""Governed runs of a tiny model against the real rules behind a real HTTP server."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from fake_node import running_node
from governed_fixtures import (
    BATCH_SIZE,
    CAMPAIGN,
    EVERYTHING,
    SETTINGS,
    STEPS,
    Scene,
    TinyModel,
    collate,
    examples_of,
    limit_pauses,
    losses,
    same_bits,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from consensus.codec import encode
from consensus.event import CheckedEvent, Kind
from consensus.keys import Ed25519SigningKey
from consensus.portions import (
    BlockWeight,
    ClassRule,
    Custody,
    Portions,
    Release,
    Rollback,
    SaltedPortion,
    StepOperation,
)
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected, Unavailable
from trainer_client import ledger_side
from trainer_client.commitment import parameter_root_of, root_of_tensors
from trainer_client.course import ReplayFailed
from trainer_client.governed import GovernedRun, TrainingFailed
from trainer_client.grants import POLL_SECONDS
from trainer_client.ledger_side import StepNotAdmitted
from trainer_client.plan import default_blocks
from trainer_client.record import Example
from trainer_client.routing import RoutingError


def plain_training(scene: Scene, refused: Callable[[int, Example], bool]) -> dict[str, Tensor]:
    """The same fine-tune in ordinary torch, of the examples that are not refused, without any governance."""
    torch.manual_seed(1)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    text = {scene.sources[name]: scene.texts[name] for name in scene.sources}
    for step in range(1, STEPS + 1):
        admitted = [example for example in scene.presented(step) if not refused(step, example)]
        optimizer.zero_grad(set_to_none=True)
        inputs = collate([text[source][example] for source, example in admitted])
        (losses(model, inputs).sum() / BATCH_SIZE).backward()  # type: ignore[no-untyped-call]
        for names in default_blocks(model).values():
            torch.nn.utils.clip_grad_norm_([model.get_parameter(name) for name in names], 1.0)
        optimizer.step()
    return weights(model)


def assert_unpatched(model: nn.Module) -> None:
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not any(thread.name in ("delivery", "grants") for thread in threading.enumerate())


def test_run_records_every_step_and_releases_the_root_it_reached(scene: Scene) -> None:
    scene.register()
    run = scene.train()
    head = scene.node.head(CAMPAIGN)
    assert (head.closed, head.steps, head.presented) == ("released", STEPS, STEPS * BATCH_SIZE)
    assert scene.node.rejected == {}
    assert head.root == parameter_root_of(scene.model)
    released = scene.directory / "tuned.safetensors"
    assert root_of_tensors(load_file(released)) == head.root
    (event,) = scene.events(Kind.RELEASE)
    assert isinstance(event.operation, Release)
    assert event.operation.file_sha256 == hashlib.sha256(released.read_bytes()).digest()
    assert_unpatched(scene.model)
    summary = run._record.summary(0, 0, "", 0.0)
    assert len(summary.losses) == STEPS
    assert summary.refused_examples == dict(scene.reasons()) == {"licence-not-admitted": head.refused}


def test_refused_example_never_reaches_the_model_and_its_content_changes_no_bit(scene: Scene, tmp_path: Path) -> None:
    scene.register()
    scene.train()
    assert scene.sources["secret"] not in {source for source, _ in scene.seen}
    first = weights(scene.model)
    with running_node() as node:
        other = Scene(node, tmp_path / "other", dict(scene.texts), salt=None)
        other.register()
        assert other.sources == scene.sources
        other.texts["secret"] = examples_of("another secret")
        other.train()
    assert same_bits(first, weights(other.model))


def test_run_is_bit_identical_to_plain_training_without_the_refused_examples(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.train()
    expected = plain_training(scene, lambda step, example: example[0] == scene.sources["secret"])
    assert same_bits(weights(scene.model), expected)


def test_recited_example_undoes_its_step_bit_for_bit_and_stays_out(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    caught: list[Example] = []

    class Recites:
        def glance(self, shown: Mapping[Example, bytes], hits_BT: Tensor, floor: int) -> list[Example]:
            raise AssertionError("no logits were given")

        def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
            assert threshold == 600
            manual = [example for example in sorted(shown) if example[0] == scene.sources["manual"]]
            if at[-1] >= 4 and not caught and manual:
                caught.append(manual[0])
                return {manual[0]: 601}
            return {sorted(shown)[0]: 600}  # Not above the threshold.

    at: list[int] = []
    scene.arguments["memorization"] = Recites()
    run = scene.train(at.append)
    head = scene.node.head(CAMPAIGN)
    assert (head.rollbacks, head.attempt, head.steps, head.closed) == (1, 1, STEPS, "released")
    (rollback,) = scene.events(Kind.ROLLBACK)
    assert isinstance(rollback.operation, Rollback)
    undone = rollback.operation.next_index
    assert at.count(undone) == 2
    before, discarded = scene.events(Kind.STEP)[undone - 2 : undone]
    assert isinstance(before.operation, StepOperation)
    assert rollback.operation.restored_root == before.operation.root_after
    assert rollback.operation.discarded == (discarded.id,)
    (example,) = caught
    later = sum(example in scene.presented(step) for step in range(undone, STEPS + 1))
    assert scene.reasons()["memorization-above-threshold"] == later
    expected = plain_training(
        scene, lambda step, shown: shown[0] == scene.sources["secret"] or (shown == example and step >= undone)
    )
    assert same_bits(weights(scene.model), expected)
    summary = run._record.summary(0, 0, "", 0.0)
    assert summary.rollbacks == 1
    assert 0 < summary.repeated_seconds < summary.training_seconds
    assert summary.governance_seconds > summary.repeated_seconds


def test_example_seen_recited_in_the_training_pass_undoes_its_step_with_its_neighbours(scene: Scene) -> None:
    """The snapshot is taken after the forward pass here, and must still hold the random state before it."""
    scene.register(classes=EVERYTHING)
    scene.plan_changes["model"] = {"dropout": 0.5}
    floors: list[int] = []

    class Recites:
        def glance(self, shown: Mapping[Example, bytes], hits_BT: Tensor, floor: int) -> list[Example]:
            assert hits_BT.shape == (len(shown), 9)
            floors.append(floor)
            return [next(iter(shown))] if len(floors) == 4 else []

        def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
            return dict.fromkeys(shown, 601) if len(floors) == 4 else {}

    scene.arguments["memorization"] = Recites()
    scene.settings = replace(SETTINGS, check_memorization_every_steps=2)
    with scene.run() as run:
        for batch in run.batches():
            logits_BTV, target_BT = scene.model(batch.inputs[:, :-1]), batch.inputs[:, 1:]
            loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
            run.learn(loss_BT.mean(dim=1), (logits_BTV, target_BT))
        run.release(scene.directory / "tuned.safetensors")
    head = scene.node.head(CAMPAIGN)
    assert (head.rollbacks, head.attempt, head.steps, head.closed) == (1, 1, STEPS, "released")
    assert floors == [600, 150, 600, 150, 150, 600, 150, 600, 150, *[150] * 3]  # The last pass begins with step 9.
    steps = [event.operation for event in scene.events(Kind.STEP)]
    undone, again = (step for step in steps if isinstance(step, StepOperation) and step.index == 4)
    assert (undone.rng_digest, undone.root_before) == (again.rng_digest, again.root_before)
    assert len(undone.memorization) == 1
    (rollback,) = scene.events(Kind.ROLLBACK)
    assert isinstance(rollback.operation, Rollback)
    source = undone.memorization[0].source
    out = {(signal.source, signal.example) for signal in rollback.operation.memorization}
    assert out == {(source, example) for example in range(8)}


def test_class_with_weight_zero_for_a_block_never_moves_it(scene: Scene) -> None:
    frozen = (BlockWeight("embedding", 0), BlockWeight("head", 0))
    scene.register(classes=(ClassRule("documentation", 300, frozen), ClassRule("news", 500, frozen)))
    torch.manual_seed(1)
    untouched = weights(TinyModel())
    scene.train()
    after = weights(scene.model)
    assert torch.equal(after["embedding.weight"], untouched["embedding.weight"])
    assert torch.equal(after["head.weight"], untouched["head.weight"])
    assert not torch.equal(after["layers.0.weight"], untouched["layers.0.weight"])


def test_step_of_refused_examples_alone_moves_nothing_and_is_recorded(scene: Scene) -> None:
    scene.register()
    del scene.sources["paper"]
    scene.plan_changes["batch_size"] = 1
    scene.plan_changes["planned_steps"] = 16
    scene.train()
    steps = [event.operation for event in scene.events(Kind.STEP)]
    assert len(steps) == 16
    empty = [step for step in steps if isinstance(step, StepOperation) and step.root_before == step.root_after]
    assert len(empty) == 8
    assert all(delta.norm_micro == 0 for step in empty for delta in step.deltas)


def test_exception_in_the_loop_leaves_the_model_unpatched_and_ends_the_threads(scene: Scene) -> None:
    scene.register()

    def fail_in_step_three(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        loss = losses(scene.model, inputs)
        run.learn(loss if step != 3 else loss / (1 // (step - 3)))

    with pytest.raises(ZeroDivisionError):
        scene.loop(fail_in_step_three)
    assert_unpatched(scene.model)
    losses(scene.model, collate(scene.texts["manual"])).sum().backward()  # type: ignore[no-untyped-call]


def test_leaving_the_loop_early_keeps_what_was_recorded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_side, "EXIT_WAIT_SECONDS", 60.0)
    scene.register()
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
            if batch.step == 3:
                break
    assert scene.node.head(CAMPAIGN).steps == 3
    assert scene.node.head(CAMPAIGN).root == parameter_root_of(scene.model)
    assert_unpatched(scene.model)


def test_refused_opening_leaves_the_model_unpatched(scene: Scene) -> None:
    scene.register()
    scene.plan_changes["purpose"] = "world domination"
    with pytest.raises(Rejected) as refusal, scene.run():
        pass
    assert refusal.value.reason is Reason.PURPOSE_NOT_ADMITTED
    assert_unpatched(scene.model)


@pytest.mark.parametrize("steps", [2, STEPS])
def test_campaign_that_began_in_another_directory_is_refused_by_name_and_recorded_nowhere(
    scene: Scene, steps: int
) -> None:
    scene.register()
    if steps == STEPS:
        scene.train()
    else:
        with scene.run() as run:
            for batch in islice(run.batches(), steps):
                run.learn(losses(scene.model, batch.inputs))
    recorded = len(scene.node.order)
    scene.directory = scene.directory / "again"
    stands = "is released" if steps == STEPS else f"stands at step {steps}"
    with pytest.raises(Rejected, match=f"already and {stands}.*no checkpoint") as refusal, scene.run():
        pass
    assert refusal.value.reason is Reason.DUPLICATE
    assert len(scene.node.order) == recorded
    assert_unpatched(scene.model)


def test_examples_other_than_the_claimed_ones_are_refused_before_anything_is_recorded(scene: Scene) -> None:
    scene.register()
    scene.texts["manual"] = examples_of("forged")
    with pytest.raises(Rejected) as refusal, scene.run():
        pass
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    assert scene.events(Kind.CAMPAIGN) == []


def test_node_that_is_down_inside_a_grant_does_not_stop_the_job(scene: Scene) -> None:
    scene.register()
    reached: list[int] = []

    def at_step(step: int) -> None:
        reached.append(step)
        if step == 3:
            scene.node.down = True
        if step == STEPS:
            assert scene.node.head(CAMPAIGN).steps <= 3
            scene.node.down = False

    scene.train(at_step)
    assert reached == list(range(1, STEPS + 1))
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_node_that_forgets_what_it_accepted_is_told_again(scene: Scene) -> None:
    scene.register()

    def at_step(step: int) -> None:
        with scene.node.lock:
            if step == 3:
                scene.node.hold = True
            if step == 9:
                scene.node.pending.clear()
                scene.node.hold = False

    scene.train(at_step)
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_source_revoked_in_mid_run_is_refused_from_the_next_grant_on(scene: Scene) -> None:
    scene.register(maximum_grant_steps=4)

    def at_step(step: int) -> None:
        if step == 2:
            scene.node.revoke(scene.sources["paper"], owner="data-source-2")

    # Renewing only at the end of a grant keeps the next request behind the revocation.
    scene.settings = replace(SETTINGS, renew_at_permille=0)
    scene.train(at_step)
    assert len(scene.events(Kind.GRANT)) == 3
    expected = sum(
        example[0] == scene.sources["paper"] for step in range(5, STEPS + 1) for example in scene.presented(step)
    )
    assert scene.reasons()["source-revoked"] == expected > 0


def test_job_pauses_without_a_grant_and_goes_on_with_one(scene: Scene) -> None:
    scene.register()
    scene.node.sign_grants = lambda: sum("/v1/grants/" in asked for asked in scene.node.requests) > 3
    run = scene.train()
    assert run._record.costs.paused_seconds > 2 * POLL_SECONDS
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_job_without_a_grant_gives_up_only_at_its_pause_limit(scene: Scene) -> None:
    scene.register()
    scene.node.sign_grants = lambda: False
    with scene.run() as run:
        limit_pauses(run, 0.3)
        with pytest.raises(Unavailable, match="no grant for step 1"):
            next(run.batches())
    assert_unpatched(scene.model)


def test_leaving_ends_a_request_for_a_grant_that_a_busy_node_holds_up(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.register()
    answer, asked, over = scene.node.answer, threading.Event(), threading.Event()

    def busy_with_grants(method: str, target: str, body: bytes) -> tuple[int, bytes]:
        if (method, target) == ("POST", "/v1/grants"):
            asked.set()
            over.wait(40)
        return answer(method, target, body)

    monkeypatch.setattr(scene.node, "answer", busy_with_grants)
    with scene.run() as run:
        limit_pauses(run, 0.3)
        with pytest.raises(Unavailable, match="no grant for step 1"):
            next(run.batches())
        assert asked.wait(20)
        started = time.monotonic()
    assert time.monotonic() - started < 20
    over.set()


def test_page_of_a_proxy_in_place_of_the_campaigns_head_is_waited_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.register()
    answer, pages = scene.node.answer, [b"<html>", b"{}"]

    def behind_a_proxy(method: str, target: str, body: bytes) -> tuple[int, bytes]:
        if pages and "/v1/campaigns/" in target:
            return 200, pages.pop()
        return answer(method, target, body)

    monkeypatch.setattr(scene.node, "answer", behind_a_proxy)
    scene.train()
    assert not pages
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_job_is_told_that_nobody_asks_for_grants_any_more(scene: Scene) -> None:
    scene.register()
    with scene.run() as run:
        run._ledger._own._grants._client = None  # type: ignore[union-attr,assignment]
        with pytest.raises(InvariantBroken, match="grants are not asked for any more: AttributeError"):
            next(run.batches())
    assert_unpatched(scene.model)


def test_campaign_whose_sources_are_all_refused_ends_with_the_reason(scene: Scene) -> None:
    scene.register(licences=("CC0-1.0",))
    with pytest.raises(Rejected) as refusal:
        scene.train()
    assert refusal.value.reason is Reason.SOURCE_NOT_GRANTED


def test_step_the_log_refuses_is_rolled_back_replayed_and_taken_again(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.settings = replace(SETTINGS, snapshot_every_steps=2)
    refused: list[bytes] = []

    def refuse_once(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, StepOperation) and event.operation.index == 6 and not refused:
            refused.append(event.id)
        return Rejected(Reason.GRANT_CLOSED, "too late") if event.id in refused else None

    scene.node.refuse_step = refuse_once
    run = scene.train()
    head = scene.node.head(CAMPAIGN)
    assert (head.closed, head.steps, head.attempt) == ("released", STEPS, 1)
    (rollback,) = scene.events(Kind.ROLLBACK)
    assert isinstance(rollback.operation, Rollback)
    assert rollback.operation.reason == "grant-closed"
    assert rollback.operation.discarded[-1] == refused[0]
    assert same_bits(
        weights(scene.model), plain_training(scene, lambda step, example: example[0] == scene.sources["secret"])
    )
    assert run._record.recoveries == 1


def test_full_outbox_slows_the_job_and_a_refused_step_still_comes_through(scene: Scene) -> None:
    scene.register()
    scene.settings = replace(SETTINGS, outbox_maximum_bytes=4_000, snapshot_every_steps=2)
    refused: list[bytes] = []

    def refuse_once(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, StepOperation) and event.operation.index == 5 and not refused:
            refused.append(event.id)
        return Rejected(Reason.BAD_FIELD, "no") if event.id in refused else None

    scene.node.refuse_step = refuse_once
    scene.train()
    head = scene.node.head(CAMPAIGN)
    assert (head.closed, head.steps, head.attempt) == ("released", STEPS, 1)


def test_replay_with_dropout_repeats_the_random_draws(scene: Scene) -> None:
    scene.register()
    scene.plan_changes["model"] = {"dropout": 0.3}
    scene.settings = replace(SETTINGS, snapshot_every_steps=3)
    refused: list[bytes] = []

    def refuse_once(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, StepOperation) and event.operation.index == 9 and not refused:
            refused.append(event.id)
        return Rejected(Reason.PARAMETER_ROOT_BROKEN, "no") if event.id in refused else None

    scene.node.refuse_step = refuse_once
    scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"


def test_replay_that_ends_elsewhere_abandons_the_campaign(scene: Scene) -> None:
    scene.register()
    refused: list[bytes] = []
    scene.settings = replace(SETTINGS, snapshot_every_steps=100)

    def refuse_once(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, StepOperation) and event.operation.index == 5 and not refused:
            refused.append(event.id)
        return Rejected(Reason.PARAMETER_ROOT_BROKEN, "no") if event.id in refused else None

    scene.node.refuse_step = refuse_once
    calls: Counter[int] = Counter()

    def learn_something_else_the_second_time(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        calls[step] += 1
        run.learn(calls[step] * losses(scene.model, inputs))

    with pytest.raises(ReplayFailed):
        scene.loop(learn_something_else_the_second_time)
    assert scene.node.head(CAMPAIGN).closed == "abandoned"
    assert_unpatched(scene.model)


def test_step_refused_again_and_again_ends_the_run_by_name(scene: Scene) -> None:
    scene.register()
    scene.node.refuse_step = lambda event: (
        Rejected(Reason.BAD_FIELD, "never")
        if isinstance(event.operation, StepOperation) and event.operation.index == 4
        else None
    )
    with pytest.raises(StepNotAdmitted, match="step 4 was refused 4 times"):
        scene.train()
    assert_unpatched(scene.model)


def test_micro_batches_give_the_same_step_as_one_batch(scene: Scene, tmp_path: Path) -> None:
    scene.register()
    scene.train()
    whole = weights(scene.model)
    with running_node() as node:
        split = Scene(node, tmp_path / "split", scene.texts, arguments={"micro_batch_size": 2})
        split.register()
        split.train()
        assert node.head(CAMPAIGN).steps == STEPS
        assert split.sources == scene.sources
    for name, after in weights(split.model).items():
        torch.testing.assert_close(after, whole[name], rtol=1e-4, atol=1e-6)


def test_learning_a_batch_twice_is_refused(scene: Scene) -> None:
    scene.register()

    def learn_twice(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        loss = losses(scene.model, inputs)
        run.learn(loss)
        run.learn(loss)

    with pytest.raises(TrainingFailed, match="once for each batch"):
        scene.loop(learn_twice)
    assert_unpatched(scene.model)


def test_skipped_learn_is_refused(scene: Scene) -> None:
    scene.register()
    with pytest.raises(TrainingFailed, match="was not called"):
        scene.loop(lambda run, inputs, step: None)
    assert_unpatched(scene.model)


def test_loss_that_is_not_finite_is_refused(scene: Scene) -> None:
    scene.register()
    with pytest.raises(TrainingFailed, match="nan"):
        scene.loop(lambda run, inputs, step: run.learn(losses(scene.model, inputs) * float("nan")))
    assert scene.node.head(CAMPAIGN).steps == 0


class DeepModel(TinyModel):
    """The names of its parameters are more than a setting on the log may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.extend([nn.Linear(8, 8) for _ in range(250)])


def test_campaign_of_an_optimizer_that_knows_its_parameters_names_is_admitted(scene: Scene) -> None:
    scene.register()
    scene.build, scene.trained = DeepModel, nn.Module.named_parameters
    with scene.run():
        pass
    (opened,) = scene.events(Kind.CAMPAIGN)
    settings = {setting.name for setting in opened.operation.hyperparameters}  # type: ignore[union-attr]
    assert "optimizer.0.lr" in settings
    assert "optimizer.0.param_names" not in settings


def test_schedule_and_the_files_that_the_plan_names_are_recorded(scene: Scene, tmp_path: Path) -> None:
    script = tmp_path / "prepare.py"
    script.write_bytes(b"print()\n")
    scene.register()
    scene.plan_changes["files"] = {"preprocessing": script}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scene.arguments["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with scene.run():
        pass
    (opened,) = scene.events(Kind.CAMPAIGN)
    settings = {setting.name: setting.value for setting in opened.operation.hyperparameters}  # type: ignore[union-attr]
    assert settings["scheduler"] == "StepLR"
    assert settings["scheduler.step_size"] == "3"
    assert settings["files.preprocessing.sha256"] == hashlib.sha256(b"print()\n").hexdigest()
    script.write_bytes(b"print(1)\n")
    with pytest.raises(Rejected, match="hyperparameters"), scene.run():
        pass
    script.unlink()
    with pytest.raises(ConfigError, match=r"prepare\.py: expected a file to record, found: No such file"), scene.run():
        pass


def test_optimizer_with_a_parameter_that_is_not_the_models_is_refused_and_recorded_nowhere(scene: Scene) -> None:
    scene.register()
    scene.trained = lambda model: [*model.parameters(), nn.Parameter(torch.zeros(3))]
    with pytest.raises(ConfigError, match=r"parameters that are not the model's, of shapes \[\(3,\)\]"), scene.run():
        pass
    assert scene.events(Kind.CAMPAIGN) == []


def test_loss_of_another_length_is_refused(scene: Scene) -> None:
    scene.register()
    with pytest.raises(RoutingError, match="one loss per example"):
        scene.loop(lambda run, inputs, step: run.learn(losses(scene.model, inputs).mean()))


def test_spooled_events_of_a_run_that_died_are_delivered_by_the_next(scene: Scene) -> None:
    scene.register()

    def stop_the_node(step: int) -> None:
        scene.node.down = step > 2
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.train(stop_the_node)
    scene.node.down = False
    assert scene.node.head(CAMPAIGN).steps < 3
    scene.campaign, scene.key = bytes([8]) * 32, Ed25519SigningKey(bytes([10]) * 32)
    scene.node.delegate(scene.campaign, scene.key)
    scene.train()
    assert scene.node.head(CAMPAIGN).steps == 3
    assert scene.node.head(scene.campaign).closed == "released"


def test_run_record_says_what_happened_line_by_line(scene: Scene) -> None:
    scene.register()
    scene.train()
    lines = [json.loads(line) for line in (scene.directory / "steps.jsonl").read_text().splitlines()]
    kinds = Counter(line["event"] for line in lines)
    assert kinds["step"] == STEPS
    assert kinds["campaign"] == kinds["release"] == kinds["grant"] == 1
    logged = {event.id.hex() for event in scene.node.order}
    assert all(line["id"] in logged for line in lines)


def test_release_that_waits_for_custody_goes_through_after_a_custodians_word(scene: Scene) -> None:
    scene.register(custody=("data-source",))
    scene.plan_changes["accumulator_window_steps"] = 4
    with scene.run() as run:
        for batch in run.batches():
            run.learn(losses(scene.model, batch.inputs))
        with pytest.raises(Rejected) as refusal:
            run.release(scene.directory / "tuned.safetensors")
        assert refusal.value.reason is Reason.CUSTODY_MISSING
        word = SaltedPortion(bytes(32), encode(Custody(scene.node.head(CAMPAIGN).last_event)))
        scene.node.by_member("data-source-2", Kind.CUSTODY, Portions(None, word, None), campaign=CAMPAIGN)
        run.release(scene.directory / "tuned.safetensors")
    assert scene.node.head(CAMPAIGN).closed == "released"


class AdaptedModel(TinyModel):
    """A frozen model with a bottleneck adapter (Houlsby et al., arXiv 1902.00751) behind each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.adapters = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3), nn.GELU(), nn.Linear(3, 8)) for _ in self.layers]
        )

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x = self.embedding(bytes_BT)
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = x + functional.gelu(layer(x))
            x = x + adapter(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_adapters_of_a_frozen_model_go_by_depth_profiles(scene: Scene, granularity: str) -> None:
    """One parameter block for each adapter: everybody is kept out of the first, nothing of the base moves."""
    closed = (BlockWeight("adapters.0", 0),)
    scene.register(
        routing_granularities=(granularity,),
        classes=(ClassRule("documentation", 1_000, closed), ClassRule("news", 500, closed)),
    )
    scene.build = AdaptedModel
    scene.plan_changes.update(routing_granularity=granularity, accumulator_window_steps=5)
    scene.trained = lambda model: [parameter for parameter in model.parameters() if parameter.requires_grad]
    scene.arguments["probe_loss"] = losses
    scene.train()
    torch.manual_seed(1)
    base, tuned = weights(AdaptedModel()), weights(scene.model)
    moved = {name for name, tensor in tuned.items() if not torch.equal(tensor, base[name])}
    assert moved == {name for name in base if name.startswith("adapters.1.")}
    assert scene.node.head(CAMPAIGN).steps == STEPS
