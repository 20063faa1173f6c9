"""What a revocation does to the optimizer's state: dropped to the bit, or carried and accounted for."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_node import FakeNode, running_node
from governed_fixtures import (
    BATCH_SIZE,
    CAMPAIGN,
    EVERYTHING,
    SETTINGS,
    STEPS,
    RecitesAt,
    Scene,
    TinyModel,
    collate,
    examples_of,
    job_again,
    losses,
    same_bits,
    weights,
)
from rank_fixtures import KINDS, Attempt, Replay, run_on_ranks
from torch import Tensor, nn

from consensus.event import CheckedEvent, Kind
from consensus.portions import BlockWeight, ClassRule, StepOperation
from consensus.rejection import Reason, Rejected
from trainer_client import momentum as momentum_module
from trainer_client.audit_snapshots import SnapshotFolder
from trainer_client.momentum import Momentum
from trainer_client.picked_replay import replay_picked
from trainer_client.pieces import whole_entries
from trainer_client.plan import default_blocks
from trainer_client.replay import ReplayJob, read_logged_campaign, replay

GRANT_STEPS = 4
FLUSHED_AT = GRANT_STEPS + 1
"""The first step under a grant without ``paper``, which is revoked under the first one."""

SHALLOW_NEWS = (
    ClassRule("documentation", 1_000, ()),
    ClassRule("news", 500, (BlockWeight("embedding", 0), BlockWeight("layers.0", 0))),
)


def prepare(scene: Scene, momentum: str, classes: tuple[ClassRule, ...] = EVERYTHING, **policy: object) -> Scene:
    """Grants of four steps, each asked for at the end of the one before. All three sources are admitted at first."""
    licences = ("PSF-2.0", "LicenseRef-Proprietary")
    scene.register(momentum=momentum, classes=classes, licences=licences, maximum_grant_steps=GRANT_STEPS, **policy)
    scene.settings = replace(SETTINGS, renew_at_permille=0)
    return scene


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Scene]:
    """A second scene of the same texts, on a node of its own."""
    texts = {name: examples_of(name) for name in ("manual", "paper", "secret")}
    with running_node() as node:
        yield Scene(node, tmp_path / "another", texts)


def revoking(scene: Scene) -> Callable[[int], None]:
    """Revokes ``paper`` before step 2 is learned."""

    def at_step(step: int) -> None:
        if step == 2:
            scene.node.revoke(scene.sources["paper"], owner="data-source-2")

    return at_step


def steps_of(scene: Scene) -> list[StepOperation]:
    return [event.operation for event in scene.events(Kind.STEP) if isinstance(event.operation, StepOperation)]


def flushes_of(scene: Scene) -> list[tuple[int, tuple[bytes, ...]]]:
    return [(step.index, step.flushed) for step in steps_of(scene) if step.flushed]


def plain_training(scene: Scene, flushed_at: int | None, dropout: float = 0.0) -> dict[str, Tensor]:
    """The same fine-tune in ordinary torch; before one of its steps AdamW's state is thrown away."""
    torch.manual_seed(1)
    model = TinyModel(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    text = {scene.sources[name]: scene.texts[name] for name in scene.sources}
    for step in range(1, STEPS + 1):
        is_out = step >= FLUSHED_AT
        admitted = [held for held in scene.presented(step) if not (is_out and held[0] == scene.sources["paper"])]
        optimizer.zero_grad(set_to_none=True)
        inputs = collate([text[source][example] for source, example in admitted])
        (losses(model, inputs).sum() / BATCH_SIZE).backward()  # type: ignore[no-untyped-call]
        for names in default_blocks(model).values():
            torch.nn.utils.clip_grad_norm_([model.get_parameter(name) for name in names], 1.0)
        if step == flushed_at:
            optimizer.state.clear()
        optimizer.step()
    return weights(model)


def job(scene: Scene, dropout: float = 0.0) -> ReplayJob[bytes]:
    torch.manual_seed(1)
    model = TinyModel(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return ReplayJob(model, optimizer, scene.training_sources, losses, collate)


def assert_replayed(scene: Scene, dropout: float = 0.0) -> None:
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job(scene, dropout))
    assert (found.matched, found.difference) == (STEPS, None)


@contextmanager
def flushing_nothing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(momentum_module, "drop_state", lambda optimizer, entries: None)
        yield


# Flush


def test_flushed_run_is_bit_identical_to_plain_training_that_throws_the_state_away_there(scene: Scene) -> None:
    prepare(scene, "flush").train(revoking(scene))
    assert flushes_of(scene) == [(FLUSHED_AT, (scene.sources["paper"],))]
    assert all(not step.carried for step in steps_of(scene))
    assert same_bits(weights(scene.model), plain_training(scene, FLUSHED_AT))
    assert not same_bits(weights(scene.model), plain_training(scene, None))


def test_carried_run_is_bit_identical_to_plain_training_and_names_the_source_once(scene: Scene) -> None:
    prepare(scene, "carry").train(revoking(scene))
    paper = scene.sources["paper"]
    assert same_bits(weights(scene.model), plain_training(scene, None))
    assert flushes_of(scene) == []
    last = max(step for step in range(1, FLUSHED_AT) if paper in {source for source, _ in scene.presented(step)})
    residual = math.ceil(round(0.9 ** (GRANT_STEPS - last) * 10**9, 3))
    carried = [(step.index, [(each.source, each.residual_nano) for each in step.carried]) for step in steps_of(scene)]
    assert [each for each in carried if each[1]] == [(FLUSHED_AT, [(paper, residual)])]
    lines = [json.loads(line) for line in (scene.directory / "steps.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "momentum")
    assert (line["step"], line["detail"]) == (FLUSHED_AT, f"{paper.hex()} carried, at most {residual / 10**9:.9f}")
    assert_replayed(scene)


@pytest.mark.parametrize(("momentum", "forgets"), [("flush", True), ("carry", False)])
def test_state_after_the_flush_holds_nothing_of_what_the_revoked_source_was(
    scene: Scene, another: Scene, momentum: str, forgets: bool
) -> None:
    """Nothing moves at a rate of zero: only the optimizer's state can remember other examples of the source."""
    for each in (scene, another):
        each.salt = None
        prepare(each, momentum)
    another.texts["paper"] = examples_of("what the source never held")
    for each in (scene, another):
        run = each.run()
        run._optimizer.param_groups[0]["lr"] = 0.0
        at_step = revoking(each)
        with run:
            for batch in run.batches():
                at_step(batch.step)
                run.learn(losses(each.model, batch.inputs))
    assert scene.sources == another.sources
    digests = [[step.optimizer_digest for step in steps_of(each)] for each in (scene, another)]
    alike = [mine == other for mine, other in zip(*digests, strict=True)]
    assert not any(alike[:GRANT_STEPS])
    assert alike[GRANT_STEPS:] == [forgets] * (STEPS - GRANT_STEPS)


def test_blocks_that_the_source_could_not_move_keep_their_state(scene: Scene) -> None:
    prepare(scene, "flush", SHALLOW_NEWS)
    held: dict[int, set[str]] = {}
    names: dict[Tensor, str] = {}
    step = 0
    at_step = revoking(scene)
    with scene.run() as run:
        names |= {parameter: name for name, parameter in scene.model.named_parameters()}
        run._optimizer.register_step_pre_hook(
            lambda optimizer, *_: held.update({step: {names[parameter] for parameter in optimizer.state}})
        )
        for batch in run.batches():
            step = batch.step
            at_step(step)
            run.learn(losses(scene.model, batch.inputs))
    assert held[FLUSHED_AT] == {"embedding.weight", "layers.0.weight", "layers.0.bias"}
    assert all(found == set(names.values()) for at, found in held.items() if at not in (1, FLUSHED_AT))


def test_pieces_of_heads_are_flushed_one_by_one_and_replayed(headed: Scene) -> None:
    """``news`` may move neither head: their pieces keep what they have, in the same tensors' rows."""
    classes = (
        ClassRule("documentation", 1_000, ()),
        ClassRule("news", 1_000, (BlockWeight("attention.head.1", 0),)),
    )
    headed.node.policy(
        momentum="flush", classes=classes, routing_granularities=("head",), maximum_grant_steps=GRANT_STEPS
    )
    headed.settings = replace(SETTINGS, renew_at_permille=0)
    without: dict[int, set[str]] = {}
    step = 0
    at_step = revoking(headed)
    with headed.run() as run:
        entries = {
            each.part.piece.name if each.part else each.tensor_name: each
            for own in run._momentum._entries
            for each in own
        }
        run._optimizer.register_step_pre_hook(
            lambda optimizer, *_: without.update(
                {step: {name for name, each in entries.items() if each.parameter not in optimizer.state}}
            )
        )
        for batch in run.batches():
            step = batch.step
            at_step(step)
            run.learn(losses(headed.model, batch.inputs))
        run.release(headed.directory / "tuned.safetensors")
    (opened,) = headed.events(Kind.CAMPAIGN)
    blocks = {block.name: {tensor.name for tensor in block.tensors} for block in opened.operation.parameter_blocks}  # type: ignore[union-attr]
    assert len(blocks["attention.head.1"]) > 1
    assert without[FLUSHED_AT] == set(entries) - blocks["attention.head.1"]
    assert without[FLUSHED_AT + 1] == set()
    found = replay(read_logged_campaign(headed.client(), CAMPAIGN), job_again(headed))
    assert (found.matched, found.difference) == (STEPS, None)


# Replays


def test_flush_is_replayed_bit_for_bit_whole_from_snapshots_and_in_the_balance(scene: Scene) -> None:
    prepare(scene, "flush", SHALLOW_NEWS)
    scene.settings = replace(scene.settings, audit_snapshot_every_steps=3)
    scene.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=5)
    scene.train(revoking(scene))
    assert_replayed(scene, 0.5)
    logged = read_logged_campaign(scene.client(), CAMPAIGN)
    snapshots = SnapshotFolder(scene.directory / "snapshots" / CAMPAIGN.hex(), CAMPAIGN)
    picked = replay_picked(logged, job(scene, 0.5), [FLUSHED_AT, 8], snapshots)
    assert [each.differing for each in picked.picked] == [(), ()]
    assert picked.executed == 4
    sheet = replay(logged, job(scene, 0.5), balanced=True).balance
    assert sheet is not None
    assert all(sheet.rest[block].norm < 1e-5 * norm for block, norm in sheet.changes.items())


def test_flush_that_was_recorded_and_not_done_is_seen_by_a_replay(scene: Scene) -> None:
    prepare(scene, "flush")
    with flushing_nothing():
        scene.train(revoking(scene))
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job(scene))
    assert found.difference is not None
    assert found.difference.step == FLUSHED_AT
    assert "optimizer state" in found.difference.what


def test_replay_without_the_source_flushes_nothing_for_it(scene: Scene, another: Scene) -> None:
    roots = []
    for each, momentum in ((scene, "flush"), (another, "carry")):
        prepare(each, momentum).train(revoking(each))
        logged = read_logged_campaign(each.client(), CAMPAIGN)
        roots.append(replay(logged, job(each), {each.sources["paper"]}).root)
    assert roots[0] == roots[1]
    assert scene.node.head(CAMPAIGN).root != another.node.head(CAMPAIGN).root


# Going back


@pytest.mark.parametrize("refused_at", [FLUSHED_AT, FLUSHED_AT + 2])
def test_run_sent_back_behind_its_flush_flushes_again_and_ends_as_if_it_never_was(
    scene: Scene, refused_at: int
) -> None:
    prepare(scene, "flush")
    scene.settings = replace(scene.settings, snapshot_every_steps=GRANT_STEPS)
    refused: list[bytes] = []

    def refuse_once(event: CheckedEvent) -> Rejected | None:
        if isinstance(event.operation, StepOperation) and event.operation.index == refused_at and not refused:
            refused.append(event.id)
        return Rejected(Reason.GRANT_CLOSED, "too late") if event.id in refused else None

    scene.node.refuse_step = refuse_once
    run = scene.train(revoking(scene))
    assert run._record.recoveries == 1
    head = scene.node.head(CAMPAIGN)
    assert (head.closed, head.steps, head.attempt) == ("released", STEPS, 1)
    assert flushes_of(scene) == [(FLUSHED_AT, (scene.sources["paper"],))]
    assert same_bits(weights(scene.model), plain_training(scene, FLUSHED_AT))


def test_flush_of_a_step_that_was_undone_for_a_recital_is_done_again(scene: Scene) -> None:
    prepare(scene, "flush")
    recites = RecitesAt(FLUSHED_AT)
    scene.arguments["memorization"] = recites
    at_step = revoking(scene)
    revoked: list[int] = []

    def once(step: int) -> None:
        recites.at.append(step)
        if step not in revoked:
            revoked.append(step)
            at_step(step)

    scene.train(once)
    assert scene.node.head(CAMPAIGN).rollbacks == 1
    assert flushes_of(scene) == [(FLUSHED_AT, (scene.sources["paper"],))] * 2
    assert_replayed(scene)


class Killed(Exception):
    """Stands for the end of the process, as far as one process can stage it."""


@pytest.mark.parametrize("momentum", ["flush", "carry"])
@pytest.mark.parametrize("died_at", [FLUSHED_AT, FLUSHED_AT + 1, FLUSHED_AT + 3])
def test_run_that_died_about_its_flush_ends_with_the_weights_of_one_that_did_not(
    scene: Scene, died_at: int, momentum: str
) -> None:
    prepare(scene, momentum)
    scene.settings = replace(scene.settings, snapshot_every_steps=2, checkpoint_every_steps=2)
    at_step = revoking(scene)

    def die(step: int) -> None:
        at_step(step)
        if step == died_at:
            raise Killed

    with pytest.raises(Killed):
        scene.train(die)
    scene.train()
    assert scene.node.head(CAMPAIGN).rollbacks == 0
    settled = [step.index for step in steps_of(scene) if step.flushed or step.carried]
    assert settled == [FLUSHED_AT]
    assert same_bits(weights(scene.model), plain_training(scene, FLUSHED_AT if momentum == "flush" else None))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_flush_alike_and_replay_it(scene: Scene, kind: str) -> None:
    prepare(scene, "flush", SHALLOW_NEWS)
    scene.arguments["micro_batch_size"] = 2
    revoke_after_the_first_grant(scene.node, scene.sources["paper"])
    outcomes, replayed = run_on_ranks(scene, Attempt(kind), Attempt(kind, replay=Replay()))
    assert [outcome.error for outcome in (*outcomes, *replayed)] == [""] * 4
    assert same_bits(outcomes[0].weights, outcomes[1].weights)
    assert flushes_of(scene) == [(FLUSHED_AT, (scene.sources["paper"],))]
    assert [(outcome.replayed, outcome.differing) for outcome in replayed] == [(STEPS, ())] * 2


def revoke_after_the_first_grant(node: FakeNode, source: bytes) -> None:
    """Before anything else is on the log: whatever grant is asked for next, it is without the source."""

    def revoke_once(event: CheckedEvent) -> None:
        if any(each.entry.kind is Kind.GRANT for each in node.order):
            node.refuse_step = lambda event: None
            node.revoke(source, owner="data-source-2")

    node.refuse_step = revoke_once


# The residual


def one_block(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[nn.Linear, Momentum]:
    model = nn.Linear(1, 2)
    optimizer = optimizer_of(list(model.parameters()))
    held = Momentum(optimizer)
    held.attach({"weight": 0, "bias": 0}, whole_entries(model))
    return model, held


def take(model: nn.Linear, held: Momentum, gradient: float, sources: tuple[bytes, ...], *, bias: bool = True) -> None:
    model.weight.grad = torch.full_like(model.weight, gradient)
    model.bias.grad = torch.full_like(model.bias, gradient) if bias else None
    held.take_step((), (), dict.fromkeys(sources, (1_000,)))
    held._optimizer.step()


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_residual_is_what_is_left_of_the_newest_gradient_and_bounds_older_ones(steps: int) -> None:
    model, held = one_block(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, betas=(0.8, 0.99)))
    take(model, held, 3.0, (b"revoked",))
    for _ in range(steps):
        take(model, held, 0.0, (b"other",))
    moment = held._optimizer.state[model.weight]["exp_avg"].double() / ((1 - 0.8) * 3.0)
    found = held.carried(b"revoked").residual_nano
    assert found / 10**9 == pytest.approx(float(moment.max()), rel=1e-6)
    assert found == math.ceil(round(0.8**steps * 10**9, 3))


def test_residual_counts_only_steps_that_a_whole_block_took() -> None:
    model, held = one_block(lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    take(model, held, 1.0, (b"revoked",))
    take(model, held, 1.0, (b"other",), bias=False)
    assert held.carried(b"revoked").residual_nano == 10**9, "the bias kept all of it"


@pytest.mark.parametrize(
    ("optimizer_of", "residual"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 0),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5), 250_000_000),
        (lambda parameters: torch.optim.Adagrad(parameters, lr=0.1), 10**9),
    ],
)
def test_residual_of_other_optimizers_is_never_less_than_they_keep(
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer], residual: int
) -> None:
    model, held = one_block(optimizer_of)
    take(model, held, 1.0, (b"revoked",))
    for _ in range(2):
        take(model, held, 1.0, (b"other",))
    assert held.carried(b"revoked").residual_nano == residual


def test_momentum_put_back_is_what_it_was() -> None:
    model, held = one_block(lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    take(model, held, 1.0, (b"revoked",))
    before = held.state_dict()
    residual = held.carried(b"revoked")
    take(model, held, 1.0, (b"other",))
    held.take_step((b"revoked",), (), {})
    assert held.state_dict() != before
    held.load_state_dict(before)
    assert held.state_dict() == before
    take(model, held, 1.0, (b"other",))
    assert held.carried(b"revoked").residual_nano < residual.residual_nano
