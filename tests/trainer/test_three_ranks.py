"""Three processes: shares that differ from rank to rank and from step to step, with accumulation and checkpointing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from fake_node import FakeNode, running_node
from governed_fixtures import EVERYTHING, CheckpointedModel, Scene, assert_moved_alike, examples_of, weights
from rank_fixtures import KINDS, Attempt, Outcome, Replay, run_on_ranks

from consensus.event import CheckedEvent
from consensus.keys import Ed25519SigningKey
from consensus.portions import StepOperation
from consensus.rejection import Reason, Rejected

RANKS, STEPS = 3, 8
BATCH_SIZE = 4
"""Of which the policy refuses a third: often fewer than there are ranks."""


@dataclass
class Trained:
    """A campaign trained by three ranks, its replay by as many, and the same training by one process."""

    scene: Scene
    outcomes: list[Outcome]
    replayed: list[Outcome]
    alone: Scene


def new_scene(node: FakeNode, directory: Path, number: int = 7) -> Scene:
    scene = Scene(node, directory, {name: examples_of(name) for name in ("manual", "paper", "secret")})
    scene.campaign, scene.key = bytes([number]) * 32, Ed25519SigningKey(bytes([number]) * 32)
    scene.build = CheckpointedModel
    scene.plan_changes.update(batch_size=BATCH_SIZE, planned_steps=STEPS)
    return scene


def refuses_once(step: int) -> Callable[[CheckedEvent], Rejected | None]:
    """The log refuses each campaign's step of that number when it first sees it."""
    refused: set[bytes] = set()

    def refuse(event: CheckedEvent) -> Rejected | None:
        operation, campaign = event.operation, event.entry.campaign
        if not isinstance(operation, StepOperation) or operation.index != step or campaign in refused:
            return None
        refused.add(campaign)
        return Rejected(Reason.BAD_FIELD, "for the test")

    return refuse


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trained]]:
    """Of both wrappers in the same processes, each in a campaign of its own."""
    with running_node() as node, running_node() as other:
        alone = new_scene(other, tmp_path_factory.mktemp("alone"))
        alone.register(classes=EVERYTHING)
        alone.train()
        scenes = [
            new_scene(node, tmp_path_factory.mktemp(kind) / "run", number) for number, kind in enumerate(KINDS, 7)
        ]
        scenes[0].register(classes=EVERYTHING)
        attempts = []
        for scene, kind in zip(scenes, KINDS, strict=True):
            scene.sources = scenes[0].sources
            scene.settings = replace(scene.settings, snapshot_every_steps=2)
            scene.arguments["micro_batch_size"] = 1
            if scene is not scenes[0]:
                node.delegate(scene.campaign, scene.key)
            own = {name: getattr(scene, name) for name in ("campaign", "key", "directory")}
            changes = {rank: own for rank in range(RANKS)}
            attempts += [Attempt(kind, changes=changes), Attempt(kind, changes=changes, replay=Replay())]
        node.refuse_step = refuses_once(6)
        found = run_on_ranks(scenes[0], *attempts, ranks=RANKS)
        yield {
            kind: Trained(scene, *found[2 * number : 2 * number + 2], alone)
            for number, (kind, scene) in enumerate(zip(KINDS, scenes, strict=True))
        }


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest, of_kinds: dict[str, Trained]) -> Trained:
    return of_kinds[request.param]


def steps_of(trained: Trained) -> list[StepOperation]:
    """Those that stand: of a step that was taken again the last."""
    found = {
        event.operation.index: event.operation
        for event in trained.scene.node.order
        if event.entry.campaign == trained.scene.campaign and isinstance(event.operation, StepOperation)
    }
    return [found[index] for index in sorted(found)]


def test_step_of_three_ranks_is_one_event_also_where_a_rank_has_nothing_in_it(trained: Trained) -> None:
    assert [outcome.error for outcome in trained.outcomes] == [""] * RANKS
    assert [step.index for step in steps_of(trained)] == list(range(1, STEPS + 1))
    head = trained.scene.node.head(trained.scene.campaign)
    assert (head.closed, head.steps) == ("released", STEPS)
    shares = [
        [sum(step == index for step, _ in set(outcome.seen)) for outcome in trained.outcomes]
        for index in range(1, STEPS + 1)
    ]
    assert {0, 1, 2} <= {count for share in shares for count in share}
    assert [len(set(outcome.seen)) > 0 for outcome in trained.outcomes] == [True] * RANKS


def test_three_ranks_train_what_one_process_trains(trained: Trained) -> None:
    torch.manual_seed(1)
    base = weights(CheckpointedModel())
    for outcome in trained.outcomes:
        assert_moved_alike(outcome.weights, weights(trained.alone.model), base)


def test_three_ranks_go_back_together_when_the_log_refuses_a_step(trained: Trained) -> None:
    assert trained.scene.node.head(trained.scene.campaign).rollbacks == 1
    assert [outcome.recoveries for outcome in trained.outcomes] == [1] * RANKS


def test_replay_by_three_ranks_gives_every_bit_again(trained: Trained) -> None:
    root = trained.scene.node.head(trained.scene.campaign).root
    for outcome in trained.replayed:
        assert (outcome.error, outcome.replayed, outcome.differing, outcome.root) == ("", STEPS, (), root)
