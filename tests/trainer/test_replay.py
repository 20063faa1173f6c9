"""A governed run, run again from the log: the same bits, or the first step and block that differ."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from demo_job_fixtures import CAMPAIGN as DEMO_CAMPAIGN
from demo_job_fixtures import written_config
from fake_node import running_node
from governed_fixtures import (
    CAMPAIGN,
    EVERYTHING,
    STEPS,
    RecitesAt,
    Scene,
    TinyModel,
    losses,
    replay_job,
    same_bits,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from consensus.event import Kind
from consensus.portions import BlockWeight, ClassRule, StepOperation
from consensus.rejection import ConfigError, Reason, Rejected
from node.cli import main
from trainer_client.commitment import root_of_tensors
from trainer_client.demo.job import main as demo_job
from trainer_client.replay import Replayed, ReplayJob, read_logged_campaign, replay
from trainer_client.replay_command import load_job


def replayed(scene: Scene, made: ReplayJob[bytes], without: frozenset[bytes] = frozenset()) -> Replayed:
    return replay(read_logged_campaign(scene.client(), CAMPAIGN), made, without)


@pytest.fixture
def trained(scene: Scene) -> Scene:
    """A released run with depth profiles, accumulators, dropout, a refused source and a recital that was undone."""
    frozen = (BlockWeight("embedding", 0), BlockWeight("layers.0", 250))
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 500, frozen)))
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=5)
    recites = RecitesAt(4)
    scene.arguments["memorization"] = recites
    scene.train(recites.at.append)
    assert scene.node.head(CAMPAIGN).rollbacks == 1
    return scene


def test_replay_comes_out_bit_for_bit_to_the_released_weights(trained: Scene) -> None:
    made = replay_job(trained)
    seen: list[tuple[int, int]] = []
    found = replay(read_logged_campaign(trained.client(), CAMPAIGN), made, (), lambda done, of: seen.append((done, of)))
    assert (found.steps, found.matched, found.difference) == (STEPS, STEPS, None)
    assert found.root == trained.node.head(CAMPAIGN).root
    assert same_bits(weights(made.model), weights(trained.model))
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]


def test_replay_in_micro_batches_is_the_run_in_micro_batches(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.arguments["micro_batch_size"] = 2
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.train()
    assert replayed(scene, replay_job(scene, micro_batch_size=2)).difference is None
    assert replayed(scene, replay_job(scene)).difference is not None


Spoil = Callable[[Scene, list[int]], ReplayJob[bytes]]


def other_loss(scene: Scene, calls: list[int]) -> ReplayJob[bytes]:
    def spoiled(model: nn.Module, inputs: Tensor) -> Tensor:
        calls.append(1)
        return losses(model, inputs) * (1.001 if len(calls) == 7 else 1.0)

    return replay_job(scene, loss=spoiled)


def other_rate(scene: Scene, calls: list[int]) -> ReplayJob[bytes]:
    made = replay_job(scene)
    made.optimizer.param_groups[0]["lr"] = 0.0101
    return made


@pytest.mark.parametrize(("spoil", "step"), [(other_loss, 7), (other_rate, 1)])
def test_first_step_that_differs_is_named_with_its_blocks_and_ends_the_replay(
    trained: Scene, spoil: Spoil, step: int
) -> None:
    calls: list[int] = []
    found = replayed(trained, spoil(trained, calls))
    assert found.difference is not None
    assert (found.steps, found.matched, found.difference.step) == (step, step - 1, step)
    assert "parameter block head" in found.difference.what
    assert len(calls) in (0, step)


def test_optimizer_that_was_tampered_with_is_seen_though_the_parameters_are_right(trained: Scene) -> None:
    made = replay_job(trained)
    made.optimizer.param_groups[0]["eps"] = 1e-8 + 1e-24
    found = replayed(trained, made)
    assert found.difference is not None
    assert found.difference.what == ("optimizer state",)


def test_accumulators_that_were_not_the_gradients_are_seen(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that books one source's part to another keeps every parameter root and every total."""
    from trainer_client.accumulators import SourceAccumulators  # noqa: PLC0415

    scene.register(classes=EVERYTHING)
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=5)
    manual, paper = scene.sources["manual"], scene.sources["paper"]
    observe = SourceAccumulators.observe
    with monkeypatch.context() as patched:
        patched.setattr(
            SourceAccumulators,
            "observe",
            lambda self, name, group, gradient: observe(self, name, manual if group == paper else group, gradient),
        )
        scene.train()
    found = replayed(scene, replay_job(scene))
    assert found.difference is not None
    assert (found.difference.step, found.difference.what) == (5, ("accumulators",))


def test_without_a_source_is_the_fine_tune_that_it_never_was_in(trained: Scene, tmp_path: Path) -> None:
    paper = trained.sources["paper"]
    made = replay_job(trained)
    found = replayed(trained, made, frozenset({paper}))
    assert (found.steps, found.matched, found.difference) == (STEPS, 0, None)
    blank = [
        replace(source, examples=[bytes(len(each)) for each in source.examples]) if source.id == paper else source
        for source in made.sources
    ]
    other = replay_job(trained, sources=[replace(source, content_salt=None) for source in blank])
    replayed(trained, other, frozenset({paper}))
    assert same_bits(weights(made.model), weights(other.model))
    assert not same_bits(weights(made.model), weights(trained.model))


def test_without_every_admitted_source_nothing_moves(trained: Scene) -> None:
    made = replay_job(trained)
    before = weights(made.model)
    replayed(trained, made, frozenset({trained.sources["paper"], trained.sources["manual"]}))
    assert same_bits(before, weights(made.model))


def test_other_model_other_examples_and_unknown_sources_are_refused_by_name(trained: Scene) -> None:
    other = TinyModel(0.5)
    with pytest.raises(Rejected, match="the campaign began at root") as refusal:
        replayed(trained, replay_job(trained, model=other))
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    sources = trained.training_sources
    with pytest.raises(Rejected, match="the job lacks source") as refusal:
        replayed(trained, replay_job(trained, sources=sources[1:]))
    assert refusal.value.reason is Reason.UNKNOWN_SOURCE
    spoiled = replace(sources[0], examples=[bytes(10), *list(sources[0].examples)[1:]])
    with pytest.raises(Rejected, match="claimed is") as refusal:
        replayed(trained, replay_job(trained, sources=[spoiled, *sources[1:]]))
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    with pytest.raises(Rejected, match="is not in the campaign's manifest"):
        replayed(trained, replay_job(trained), frozenset({bytes(32)}))


def test_balance_sheet_adds_up_to_the_change_of_the_weights(trained: Scene) -> None:
    made = replay_job(trained)
    found = replay(read_logged_campaign(trained.client(), CAMPAIGN), made, balanced=True)
    assert (found.matched, found.difference) == (STEPS, None)
    sheet = found.balance
    assert sheet is not None
    manual, paper, secret = (trained.sources[name] for name in ("manual", "paper", "secret"))
    assert set(sheet.sources) == {manual, paper}
    assert secret not in sheet.sources
    assert list(sheet.changes) == ["layers.0", "layers.1", "head"]
    assert sheet.unsplit == ("embedding.weight",)
    for block, norm in sheet.changes.items():
        assert norm > 0.01
        assert sheet.rest[block].norm < 1e-5 * norm
        shares = [entries[block].share for entries in (*sheet.sources.values(), sheet.decay, sheet.rest)]
        assert sum(shares) == pytest.approx(1.0, abs=1e-9)
        assert all(sheet.sources[source][block].norm > 0 for source in (manual, paper))


def test_balance_of_a_source_that_a_block_is_closed_to_is_nothing_there(scene: Scene) -> None:
    closed = (BlockWeight("layers.0", 0), BlockWeight("head", 0))
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 500, closed)))
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=5)
    scene.train()
    sheet = replay(read_logged_campaign(scene.client(), CAMPAIGN), replay_job(scene), balanced=True).balance
    assert sheet is not None
    paper = sheet.sources[scene.sources["paper"]]
    assert (paper["layers.0"].norm, paper["head"].norm) == (0.0, 0.0)
    assert paper["layers.1"].norm > 0


def test_balance_of_one_source_is_all_but_the_decay(scene: Scene) -> None:
    """With one source its first moment is the optimizer's own."""
    scene.register(classes=EVERYTHING)
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.train()
    made = replay_job(scene)
    logged = read_logged_campaign(scene.client(), CAMPAIGN)
    found = replay(logged, made, without={scene.sources["paper"]}, balanced=True)
    assert found.balance is not None
    (entries,) = found.balance.sources.values()
    for block in found.balance.changes:
        assert entries[block].share + found.balance.decay[block].share == pytest.approx(1.0, abs=1e-5)


def test_run_without_accumulators_is_balanced_and_not_compared(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.plan_changes["model"] = {"dropout": 0.5}
    scene.train()
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), replay_job(scene), balanced=True)
    assert (found.steps, found.matched, found.difference) == (STEPS, 0, None)
    assert found.balance is not None


def test_balance_is_of_adamw_alone(trained: Scene) -> None:
    model = replay_job(trained).model
    for optimizer in (
        torch.optim.SGD(model.parameters(), lr=0.01),
        torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    ):
        with pytest.raises(Rejected, match=r"a balance sheet is of torch.optim.AdamW, found"):
            replay(
                read_logged_campaign(trained.client(), CAMPAIGN),
                replay_job(trained, model=model, optimizer=optimizer),
                balanced=True,
            )


def ask(config: Path, node_url: str, chain_id: str, *more: object) -> tuple[int, str]:
    arguments = [
        "replay", "--job", "trainer_client.demo.job:replay_job", "--config", config, "--node", node_url,
        "--chain-id", chain_id, "--campaign", DEMO_CAMPAIGN.hex(), *more,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_command_replays_the_demonstrations_job_and_leaves_a_source_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_node() as node:
        node.policy()
        config = written_config(node, tmp_path, threads=1, accumulator_window_steps=3)
        assert demo_job(["--config", str(config)]) == 0
        capsys.readouterr()
        chain_id = node.chain_id.hex()
        code, printed = ask(config, node.url, chain_id)
        assert (code, "6 steps in" in printed, "bit for bit" in printed) == (0, True, True), printed
        steps = [event for event in node.order if event.entry.kind is Kind.STEP]
        assert isinstance(steps[-1].operation, StepOperation)
        source = json.loads(config.read_text())["sources"][0]["id"]
        out = tmp_path / "without" / "weights.safetensors"
        code, printed = ask(config, node.url, chain_id, "--without", source, "--out", out, "--json")
        document = json.loads(printed)
        assert (code, document["without"], document["replayed"], document["matched"]) == (0, [source], 6, 0)
        assert root_of_tensors(load_file(out)).hex() == document["root"] != document["recorded_root"]
        code, printed = ask(config, node.url, chain_id, "--balance")
        assert code == 0
        _, table = printed.split("a line adds up to 100 %\n")
        header, *rows, _ = table.strip().splitlines()
        assert "  weight decay  " in header
        balance = json.loads(ask(config, node.url, chain_id, "--balance", "--json")[1])["balance"]
        assert [row.split()[0] for row in rows] == list(balance["changes"])
        for row in rows:
            _, *parts, norm = row.replace("–", "0").split()
            assert sum(map(float, parts)) == pytest.approx(100, abs=0.1 * len(parts))
            assert float(norm) > 0
        assert source in balance["sources"]
        changed = json.loads(config.read_text()) | {"learning_rate_micro": 1_999}
        config.write_text(json.dumps(changed))
        code, printed = ask(config, node.url, chain_id)
        assert code == 1
        assert "step 1 did not come out as recorded" in printed
        assert ask(config, node.url, "ab" * 32)[0] == 1
        assert "malformed" in ask(config, node.url, "xyz")[1]
        assert "unknown-source" in ask(config, node.url, chain_id, "--without", "ab" * 32)[1]


@pytest.mark.parametrize("factory", ["nowhere", "nowhere:job", "trainer_client.demo.job:nothing", "builtins:str"])
def test_job_that_is_none_is_named(factory: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--job"):
        load_job(factory, tmp_path)
