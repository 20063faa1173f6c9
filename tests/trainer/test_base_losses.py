"""Entropy bands in a run: base losses are measured and committed to, and say how deep each example reaches."""

import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_node import running_node
from governed_fixtures import (
    CAMPAIGN,
    EVERYTHING,
    SETTINGS,
    STEPS,
    Scene,
    TinyModel,
    assert_moved_alike,
    collate,
    edge_between,
    examples_of,
    limit_pauses,
    losses,
    replay_job,
    same_bits,
    weights,
)
from torch import Tensor, nn

from consensus import portions as p
from consensus.bands import UNMEASURED, encode_losses
from consensus.event import Kind
from consensus.portions import BandRule, BlockWeight, ClassRule
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable
from node.cli import main
from trainer_client.audit_snapshots import SnapshotFolder
from trainer_client.base_losses import BaseLosses, Measure, path_of, read_base_losses
from trainer_client.data_parallel import ParallelModel
from trainer_client.governed import GovernedRun
from trainer_client.picked_replay import replay_picked
from trainer_client.plan import default_blocks, manifest_of
from trainer_client.ranks import ALONE
from trainer_client.record import Example
from trainer_client.replay import Replayed, ReplayJob, read_logged_campaign, replay
from trainer_client.tolerant_replay import replay_within

LOWER = ("embedding", "layers.0")
HIGH = BandRule(1, 1_000, tuple(BlockWeight(block, 0) for block in LOWER))
BANDED = (ClassRule("documentation", 1_000, (), (HIGH,)), ClassRule("news", 500, ()))
"""Of class documentation the upper band moves the upper parameter blocks alone."""


def banded(scene: Scene, **policy: object) -> Scene:
    """A policy with two bands."""
    scene.register(**{"classes": BANDED, "entropy_edges_milli": (edge(),), **policy})
    scene.arguments["probe_loss"] = losses
    return scene


def in_one_step(scene: Scene) -> Scene:
    """A campaign of one step that presents everything."""
    scene.plan_changes.update(batch_size=24, planned_steps=1)
    return scene


@cache
def base_loss_milli(text: bytes) -> int:
    torch.manual_seed(1)
    with torch.no_grad():
        return round(float(losses(TinyModel(), collate([text]))[0]) * 1_000)


@cache
def edge() -> int:
    """An edge in the middle of ``manual``'s base losses."""
    return edge_between(examples_of("manual"))


def band(text: bytes) -> int:
    return int(base_loss_milli(text) >= edge())


def profiles_of(scene: Scene) -> list[list[tuple[str, int]]]:
    return [
        [(profile.content_class, profile.band) for profile in event.governance.profiles]
        for event in scene.events(Kind.STEP)
        if isinstance(event.governance, p.StepGovernance)
    ]


def kept_at(scene: Scene) -> Path:
    return path_of(scene.directory, CAMPAIGN)


def kept(scene: Scene) -> BaseLosses:
    return read_base_losses(kept_at(scene), manifest_of(scene.training_sources), committed(scene))


def committed(scene: Scene) -> bytes:
    (opened,) = scene.events(Kind.CAMPAIGN)
    assert isinstance(opened.operation, p.Campaign)
    return opened.operation.base_losses_sha256


def job(scene: Scene, **changes: object) -> ReplayJob[bytes]:
    return replay_job(scene, **{"base_losses": kept_at(scene), **changes})


def replayed(scene: Scene, made: ReplayJob[bytes]) -> Replayed:
    return replay(read_logged_campaign(scene.client(), CAMPAIGN), made)


@pytest.fixture
def trained(scene: Scene) -> Scene:
    """A released run under bands, with dropout, accumulators, sketches and snapshots for audits."""
    banded(scene)
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=4, sketch_rank=2)
    scene.settings = replace(SETTINGS, audit_snapshot_every_steps=4)
    scene.train()
    return scene


# What an example may move


def first_of_band(scene: Scene, wanted: int) -> int:
    return [band(text) for text in scene.texts["manual"]].index(wanted)


def with_other_text(scene: Scene, number: int) -> None:
    """Another text of the same band takes an example's place."""
    wanted = band(scene.texts["manual"][number])
    others = (text for text in examples_of("other", 64) if band(text) == wanted)
    scene.texts["manual"] = [next(others) if at == number else text for at, text in enumerate(scene.texts["manual"])]


@pytest.mark.parametrize("wanted", [0, 1])
def test_replacing_an_example_of_the_upper_band_changes_no_bit_of_the_lower_blocks(
    scene: Scene, tmp_path: Path, wanted: int
) -> None:
    found = []
    number = first_of_band(scene, wanted)
    for change in (False, True):
        with running_node() as node:
            made = Scene(node, tmp_path / str(change), dict(scene.texts), salt=None)
            in_one_step(banded(made))
            if change:
                with_other_text(made, number)
            made.train()
            found.append(weights(made.model))
    plain, other = found
    lower = {name for name in plain if name.startswith(LOWER)}
    assert len(lower) == 3
    same = {name for name in plain if torch.equal(plain[name], other[name])}
    assert same == (lower if wanted == 1 else set())


def test_step_is_the_weighted_sum_of_each_example_alone(scene: Scene) -> None:
    in_one_step(banded(scene)).train()
    torch.manual_seed(1)
    model = TinyModel()
    base = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    blocks = default_blocks(model)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, content in (("manual", scene.texts["manual"]), ("paper", scene.texts["paper"])):
        for text in content:
            model.zero_grad()
            losses(model, collate([text])).sum().backward()  # type: ignore[no-untyped-call]
            for block, names in blocks.items():
                full = 0.5 if name == "paper" else 1.0
                weight = 0.0 if name == "manual" and band(text) == 1 and block in LOWER else full
                for parameter in names:
                    gradient = model.get_parameter(parameter).grad
                    assert gradient is not None
                    sums[parameter] += weight * gradient / 24
    for name, parameter in model.named_parameters():
        parameter.grad = sums[name]
    for names in blocks.values():
        torch.nn.utils.clip_grad_norm_([model.get_parameter(name) for name in names], 1.0)
    optimizer.step()
    assert_moved_alike(weights(scene.model), weights(model), base)


def test_steps_state_just_the_bands_of_their_admitted_examples(trained: Scene) -> None:
    names = {identifier: name for name, identifier in trained.sources.items()}
    expected = []
    for step in range(1, STEPS + 1):
        stated = set()
        for source, number in trained.presented(step):
            if names[source] != "secret":
                own = "documentation" if names[source] == "manual" else "news"
                stated.add((own, band(trained.texts[names[source]][number])))
        expected.append(sorted(stated))
    assert profiles_of(trained) == expected
    assert {at for step in expected for name, at in step if name == "documentation"} == {0, 1}
    assert trained.node.head(CAMPAIGN).closed == "released"


# What is measured, and committed to


def test_campaign_commits_to_the_base_losses_of_what_the_policy_admits_and_the_rest_never_meets_the_model(
    scene: Scene,
) -> None:
    banded(scene)
    shown: set[bytes] = set()

    def noting(examples: Sequence[bytes]) -> Tensor:
        shown.update(examples)
        return collate(examples)

    scene.arguments["collate"] = noting
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.train()
    assert committed(scene) == sha256(kept_at(scene).read_bytes()).digest()
    by_source = {source.id: [base_loss_milli(text) for text in source.examples] for source in scene.training_sources}
    by_source[scene.sources["secret"]] = [UNMEASURED] * 8
    assert kept_at(scene).read_bytes() == encode_losses([loss for _, own in sorted(by_source.items()) for loss in own])
    assert kept(scene).measured == {scene.sources["manual"], scene.sources["paper"]}
    assert not shown.intersection(scene.texts["secret"])
    assert shown == {*scene.texts["manual"], *scene.texts["paper"]}


def test_without_bands_nothing_is_measured_and_committed_to(scene: Scene) -> None:
    scene.register()
    scene.arguments["probe_loss"] = losses
    scene.train()
    assert committed(scene) == b""
    assert not kept_at(scene).parent.exists()


def test_bands_without_a_loss_to_measure_with_are_refused_before_anything_is_on_the_log(scene: Scene) -> None:
    banded(scene)
    del scene.arguments["probe_loss"]
    with pytest.raises(ConfigError, match=r"entropy bands.* give governed\(\) the loss of your training as probe_loss"):
        scene.train()
    assert not scene.events(Kind.CAMPAIGN)


def one_for_all(model: nn.Module, inputs: Tensor) -> Tensor:
    return losses(model, inputs).mean()


def endless(model: nn.Module, inputs: Tensor) -> Tensor:
    return losses(model, inputs) / 0.0


@pytest.mark.parametrize("loss", [one_for_all, endless])
def test_loss_that_is_no_finite_number_for_each_example_is_refused(
    loss: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    texts = {b"source": examples_of("manual")}
    examples = tuple((b"source", number) for number in range(8))
    model = TinyModel(0.5)
    with pytest.raises(ConfigError, match="expected a finite number for each of 4 examples"):
        Measure(ParallelModel(model, ALONE), loss, texts, collate, 4, ALONE).losses_milli(examples)
    assert all(module.training for module in model.modules())


def test_random_numbers_and_modes_are_as_before_and_losses_are_without_dropout() -> None:
    texts = {b"source": examples_of("manual")}
    examples = tuple((b"source", number) for number in range(8))
    torch.manual_seed(1)
    model = TinyModel(0.5)
    model.layers.eval()
    before = torch.get_rng_state()
    found = Measure(ParallelModel(model, ALONE), losses, texts, collate, 3, ALONE).losses_milli(examples)
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, model.layers.training) == (True, False)
    assert found == {example: base_loss_milli(texts[b"source"][example[1]]) for example in examples}


# Later policies


def test_policy_that_brings_bands_later_gives_no_grant_to_a_campaign_without_base_losses(scene: Scene) -> None:
    scene.register(classes=EVERYTHING, maximum_grant_steps=2)
    scene.settings = replace(SETTINGS, renew_at_permille=0)

    def body(run: GovernedRun[bytes], inputs: Tensor, step: int) -> None:
        if step == 1:  # at step 2, the last of its grant, the next one is already asked for
            scene.node.policy(classes=BANDED, entropy_edges_milli=(3_000,))
            limit_pauses(run, 1.0)
        run.learn(losses(scene.model, inputs))

    with pytest.raises(Unavailable, match="no grant for step 3"):
        scene.loop(body)
    assert len(scene.events(Kind.GRANT)) == 1


def test_later_edges_sort_the_same_losses_and_an_unmeasured_source_is_not_asked_for(scene: Scene) -> None:
    """The second policy admits ``secret``, of which nothing was measured, and puts everything into the lower band."""
    banded(scene, maximum_grant_steps=2)
    scene.settings = replace(SETTINGS, renew_at_permille=0)

    def change(step: int) -> None:
        if step == 1:  # at step 2, the last of its grant, the next one is already asked for
            licences = ("PSF-2.0", "LicenseRef-Proprietary")
            scene.node.policy(classes=BANDED, entropy_edges_milli=(2**31,), licences=licences)

    scene.train(change)
    assert scene.reasons().keys() == {"licence-not-admitted", "source-not-granted"}
    assert {at for step in profiles_of(scene)[2:] for _, at in step} == {0}
    assert replayed(scene, job(scene, **plain_model())).difference is None


def plain_model() -> dict[str, object]:
    torch.manual_seed(1)
    model = TinyModel()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)}


# Parameter blocks that nobody may move


def test_block_that_no_example_may_move_is_reported_before_the_campaign_opens(scene: Scene) -> None:
    """Class documentation may move the head in a band of which it has no example, class news never."""
    nobody = (BlockWeight("head", 0),)
    rules = (ClassRule("documentation", 1_000, nobody, (BandRule(1, 1_000, ()),)), ClassRule("news", 1_000, nobody))
    highest = max(map(base_loss_milli, scene.texts["manual"]))
    for lowest, expected in ((highest + 1, ["head"]), (highest, [])):
        with running_node() as node:
            made = Scene(node, scene.directory / str(lowest), scene.texts)
            banded(made, classes=rules, entropy_edges_milli=(lowest,)).train()
            lines = [json.loads(line) for line in (made.directory / "steps.jsonl").read_text().splitlines()]
            assert [line["detail"] for line in lines if line["event"] == "closed"] == expected
            assert [line["event"] for line in lines][: len(expected) + 1] == ["closed", "campaign"][
                -len(expected) - 1 :
            ]
            moved = weights(made.model)["head.weight"]
            torch.manual_seed(1)
            assert torch.equal(moved, TinyModel().head.weight) == bool(expected)


# A process that died


class Killed(Exception):
    """Stands for the end of the process."""


def train_until(scene: Scene, step: int) -> None:
    def die(at: int) -> None:
        if at == step:
            raise Killed

    scene.settings = replace(SETTINGS, snapshot_every_steps=1, checkpoint_every_steps=1)
    scene.plan_changes["model"] = {"dropout": 0.5}
    with pytest.raises(Killed):
        scene.train(die)
    scene.plan_changes["model"] = {"dropout": 0.5}


def never(*asked: object) -> Any:
    raise AssertionError("base losses were measured again")


def test_run_that_is_taken_up_reads_its_base_losses_and_ends_as_one_that_never_died(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(banded(scene), 7)
    with monkeypatch.context() as patched:
        patched.setattr(Measure, "losses_milli", never)
        scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"
    with running_node() as node:
        other = banded(Scene(node, tmp_path / "other", dict(scene.texts)))
        other.plan_changes["model"] = {"dropout": 0.5}
        other.train()
        assert same_bits(weights(scene.model), weights(other.model))
        assert profiles_of(scene) == profiles_of(other)


def test_run_whose_base_losses_were_altered_or_lost_is_not_taken_up(scene: Scene) -> None:
    train_until(banded(scene), 4)
    encoded = kept_at(scene).read_bytes()
    kept_at(scene).write_bytes(bytes([*encoded[:3], encoded[3] ^ 1, *encoded[4:]]))
    with pytest.raises(Rejected, match="the campaign committed to") as refusal:
        scene.train()
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    kept_at(scene).unlink()
    scene.plan_changes["model"] = {"dropout": 0.5}
    with pytest.raises(ConfigError, match="expected the campaign's base losses"):
        scene.train()
    kept_at(scene).write_bytes(encoded)
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"


# Replays


def test_replay_measures_again_and_comes_out_bit_for_bit(trained: Scene) -> None:
    made = job(trained)
    found = replayed(trained, made)
    assert (found.matched, found.difference) == (STEPS, None)
    assert same_bits(weights(made.model), weights(trained.model))
    picked = replay_picked(
        read_logged_campaign(trained.client(), CAMPAIGN),
        job(trained),
        (3, 10),
        SnapshotFolder(trained.directory / "snapshots" / CAMPAIGN.hex(), CAMPAIGN),
    )
    assert (picked.matched, picked.difference) == (2, None)


def test_replay_without_the_file_or_with_an_altered_one_is_refused_by_name(trained: Scene) -> None:
    with pytest.raises(ConfigError, match="--base-losses"):
        replayed(trained, job(trained, base_losses=None))
    encoded = kept_at(trained).read_bytes()
    kept_at(trained).write_bytes(bytes([*encoded[:3], encoded[3] ^ 1, *encoded[4:]]))
    with pytest.raises(Rejected, match="the campaign committed to") as refusal:
        replayed(trained, job(trained))
    assert refusal.value.reason is Reason.DIGEST_MISMATCH


def test_operator_that_commits_to_losses_which_are_not_the_models_is_found_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One example of the upper band is said to be of the lower one: the log has no reason to refuse that."""
    banded(scene)
    scene.plan_changes["model"] = {"dropout": 0.5}
    lied_about = scene.sources["manual"], first_of_band(scene, 1)

    honest = Measure.losses_milli

    def lie(self: Measure[bytes], examples: Sequence[Example]) -> dict[Example, int]:
        return {**honest(self, examples), lied_about: 0}

    with monkeypatch.context() as patched:
        patched.setattr(Measure, "losses_milli", lie)
        scene.train()
    assert scene.node.head(CAMPAIGN).closed == "released"
    with pytest.raises(Rejected, match=f"base losses of 1 examples .*example {lied_about[1]} of source") as refusal:
        replayed(scene, job(scene))
    assert refusal.value.reason is Reason.DIGEST_MISMATCH


def test_step_that_states_other_bands_than_its_examples_are_of_is_found_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 5 on everything is trained on as the lower band may be."""
    banded(scene)
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.settings = replace(SETTINGS, audit_snapshot_every_steps=4)
    profiles = GovernedRun._profiles

    def shallow(self: Any, grant: Any, admitted: Sequence[Example]) -> dict[Example, p.ClassProfile]:
        honest = profiles(self, grant, admitted)
        if self.done < 4:
            return honest
        return {example: grant.profiles[profile.content_class, 0] for example, profile in honest.items()}

    with monkeypatch.context() as patched:
        patched.setattr(GovernedRun, "_profiles", shallow)
        scene.train()
    found = replayed(scene, job(scene))
    assert found.difference is not None
    assert (found.difference.step, found.difference.what[0]) == (5, "depth profiles")
    folder = SnapshotFolder(scene.directory / "snapshots" / CAMPAIGN.hex(), CAMPAIGN)
    logged = read_logged_campaign(scene.client(), CAMPAIGN)
    within = replay_within(logged, job(scene), (2, 6), folder, 0.01)
    assert within.picked[0].differing == ()
    assert "depth profiles of step 5" in within.picked[1].differing


def test_within_a_tolerance_losses_may_be_apart_and_bits_may_not(trained: Scene) -> None:
    def nearly(model: nn.Module, inputs: Tensor) -> Tensor:
        return losses(model, inputs) * (1.0 if torch.is_grad_enabled() else 1.001)

    logged = read_logged_campaign(trained.client(), CAMPAIGN)
    folder = SnapshotFolder(trained.directory / "snapshots" / CAMPAIGN.hex(), CAMPAIGN)
    with pytest.raises(Rejected, match="are not the model's"):
        replayed(trained, job(trained, loss=nearly))
    assert replay_within(logged, job(trained, loss=nearly), (3,), folder, 0.01).matched == 1


def test_command_takes_the_file_of_base_losses(trained: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.SimpleNamespace(job=lambda config: job(trained, base_losses=None))
    monkeypatch.setitem(sys.modules, "banded_job", made)  # type: ignore[arg-type]
    arguments = ["replay", "--job", "banded_job:job", "--config", str(tmp_path), "--node", trained.node.url]
    arguments += ["--chain-id", trained.node.chain_id.hex(), "--campaign", CAMPAIGN.hex()]
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "--base-losses" in refused.output) == (2, True), refused.output
    done = CliRunner().invoke(main, [*arguments, "--base-losses", str(kept_at(trained))])
    assert (done.exit_code, "bit for bit" in done.output) == (0, True), done.output


def test_flush_after_a_revocation_drops_what_the_revoked_examples_bands_moved(scene: Scene, tmp_path: Path) -> None:
    """Class news may move the lower blocks in its upper band alone, in which it has no example."""
    deep = (BandRule(1, 1_000, ()),)
    lower = tuple(BlockWeight(block, 0) for block in LOWER)
    rules = (ClassRule("documentation", 1_000, ()), ClassRule("news", 500, lower, deep))
    beyond = max(map(base_loss_milli, (*scene.texts["manual"], *scene.texts["paper"]))) + 1
    banded(scene, classes=rules, entropy_edges_milli=(beyond,), momentum="flush", maximum_grant_steps=4)
    scene.settings = replace(SETTINGS, renew_at_permille=0)

    def revoke(step: int) -> None:
        if step == 2:
            scene.node.revoke(scene.sources["paper"], owner="data-source-2")

    scene.train(revoke)
    steps = [event.operation for event in scene.events(Kind.STEP) if isinstance(event.operation, p.StepOperation)]
    assert [step.index for step in steps if step.flushed] == [5]
    made = job(scene, **plain_model())
    assert replayed(scene, made).difference is None
    counted = {name: int(made.optimizer.state[parameter]["step"]) for name, parameter in made.model.named_parameters()}
    assert {counted[name] for name in counted if name.startswith(LOWER)} == {STEPS}
    assert {counted[name] for name in counted if not name.startswith(LOWER)} == {STEPS - 4}
