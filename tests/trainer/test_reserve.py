"""A run over sources with a reserve: no reserved example is learned from, each is counted, nothing else changes."""

import json
from collections.abc import Mapping
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
    RecitesAt,
    Scene,
    TinyModel,
    collate,
    examples_of,
    losses,
    same_bits,
    weights,
)
from torch import nn

from consensus.event import Kind
from consensus.portions import Rollback, SourceUse
from consensus.rejection import Reason
from consensus.reserve import RESERVED, reserved_among
from consensus.review import Evaluation
from consensus.state import SOURCE_TABLE, SourceRecord, read_record
from trainer_client import opening
from trainer_client.ledger_side import StepNotAdmitted
from trainer_client.record import Example
from trainer_client.replay import ReplayJob, read_logged_campaign, replay

RESERVE = 3


@pytest.fixture
def reserving(scene: Scene) -> Scene:
    """Three of the eight examples of ``manual`` and of ``secret`` are reserved."""
    scene.reserve = RESERVE
    scene.register(classes=EVERYTHING)
    return scene


def reserve_of(scene: Scene, name: str) -> set[Example]:
    value = scene.node.state.state.get(SOURCE_TABLE + scene.sources[name])
    assert value is not None
    claim = read_record(value, SourceRecord).claim
    return {(scene.sources[name], example) for example in reserved_among(claim, range(len(scene.texts[name])))}


def presented_of(scene: Scene, examples: set[Example]) -> int:
    return sum(example in examples for step in range(1, STEPS + 1) for example in scene.presented(step))


def test_reserved_examples_are_never_admitted_and_each_is_counted(reserving: Scene) -> None:
    run = reserving.train()
    assert reserving.node.rejected == {}
    own, refused_too = reserve_of(reserving, "manual"), reserve_of(reserving, "secret")
    assert (len(own), len(refused_too)) == (RESERVE, RESERVE)
    assert not (own | refused_too) & set(reserving.seen)
    counted = sum(
        count.count
        for event in reserving.events(Kind.STEP)
        for use in event.items
        if isinstance(use, SourceUse)
        for count in use.refused
        if count.reason == RESERVED
    )
    expected = presented_of(reserving, own | refused_too)
    assert counted == expected > 0
    head = reserving.node.head(CAMPAIGN)
    assert head.presented == head.admitted + head.refused == STEPS * BATCH_SIZE
    summary = run._record.summary(0, 0, "", 0.0)
    assert summary.refused_examples == {**reserving.reasons(), RESERVED: expected}
    assert set(reserving.reasons()) == {Reason.LICENCE_NOT_ADMITTED.value}


def test_content_of_the_reserve_changes_no_bit(reserving: Scene, tmp_path: Path) -> None:
    reserving.train()
    with running_node() as node:
        other = Scene(node, tmp_path / "other", dict(reserving.texts), salt=None, reserve=RESERVE)
        other.register(classes=EVERYTHING)
        assert other.sources == reserving.sources
        strange, kept = examples_of("strange"), {number for _, number in reserve_of(other, "manual")}
        other.texts["manual"] = [
            strange[number] if number in kept else text for number, text in enumerate(other.texts["manual"])
        ]
        other.train()
    assert same_bits(weights(reserving.model), weights(other.model))


def test_job_that_trains_on_the_reserve_is_refused_by_name(reserving: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "reserved_among", lambda claim, examples: [])
    with pytest.raises(StepNotAdmitted, match=r"reserved-for-calibration: example [0-9] of '(manual|secret)'"):
        reserving.train()
    assert reserving.node.head(CAMPAIGN).closed == ""


def test_run_over_a_reserve_that_died_ends_with_the_weights_of_one_that_did_not(
    reserving: Scene, tmp_path: Path
) -> None:
    class Killed(Exception):
        """Stands for the end of the process."""

    def die(step: int) -> None:
        if step == 7:
            raise Killed

    reserving.settings = replace(reserving.settings, snapshot_every_steps=1, checkpoint_every_steps=1)
    with pytest.raises(Killed):
        reserving.train(die)
    reserving.train()
    with running_node() as node:
        other = Scene(node, tmp_path / "other", dict(reserving.texts), reserve=RESERVE)
        other.register(classes=EVERYTHING)
        other.train()
    assert same_bits(weights(reserving.model), weights(other.model))
    assert not reserve_of(reserving, "manual") & set(reserving.seen)


def test_replay_of_a_run_over_a_reserve_comes_out_bit_for_bit(reserving: Scene) -> None:
    reserving.plan_changes.update(model={"dropout": 0.5}, accumulator_window_steps=5)
    reserving.train()
    torch.manual_seed(1)
    model = TinyModel(dropout=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    job = ReplayJob(model, optimizer, reserving.training_sources, losses, collate)
    found = replay(read_logged_campaign(reserving.client(), CAMPAIGN), job)
    assert (found.matched, found.difference) == (STEPS, None)
    assert same_bits(weights(model), weights(reserving.model))


def test_reserved_neighbour_of_a_recited_example_is_no_suspect(reserving: Scene) -> None:
    class RecitesNeighbours(RecitesAt):
        """Finds what ``RecitesAt`` finds, and then all that it is asked about with it."""

        def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
            if len(self.caught) == 1 and self.caught[0] not in shown:
                self.caught.extend(shown)
                return dict.fromkeys(shown, 900)
            return super().signals(model, shown, threshold)

    recites = RecitesNeighbours(4)
    reserving.arguments["memorization"] = recites
    reserving.train(recites.at.append)
    (rollback,) = reserving.events(Kind.ROLLBACK)
    assert isinstance(rollback.operation, Rollback)
    named = {(signal.source, signal.example) for signal in rollback.operation.memorization}
    assert len(named) == len(recites.caught) > 1
    assert not named & (reserve_of(reserving, "manual") | reserve_of(reserving, "secret"))


class Mistakes(RecitesAt):
    """Takes the examples of ``mistaken`` for recited whenever it is asked about them."""

    def __init__(self) -> None:
        super().__init__(4)
        self.mistaken: set[Example] = set()

    def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        asked = dict.fromkeys(self.mistaken & shown.keys(), 900)
        return asked or super().signals(model, shown, threshold)


def test_check_is_calibrated_on_the_reserve_and_its_false_positives_are_told_pass_by_pass(reserving: Scene) -> None:
    check = Mistakes()
    kept = reserve_of(reserving, "manual")
    check.mistaken = {min(kept), min(reserve_of(reserving, "secret"))}
    reserving.arguments["memorization"] = check
    with reserving.run() as run:
        for batch in run.batches():
            check.at.append(batch.step)
            run.learn(losses(reserving.wrapped, batch.inputs))
        signals = run.survey_memorization()
        run.release(reserving.directory / "tuned.safetensors")
    assert check.calibrators[reserving.sources["manual"]] == tuple(
        reserving.texts["manual"][number] for _, number in sorted(kept)
    )
    passes = run.summary().memorization_passes
    assert [(each.step, each.recited, each.reserve_flagged, each.reserve_assessed) for each in passes] == [
        (4, len(check.caught), 1, RESERVE),
        (8, len(check.caught), 1, RESERVE),
        (12, len(check.caught), 1, RESERVE),
    ]
    lines = [json.loads(line) for line in (reserving.directory / "steps.jsonl").read_text().splitlines()]
    told = [line["detail"] for line in lines if line["event"] == "memorization"]
    assert told == ["recited so far: 1; taken for recited in reserve: 1 of 3"] * 3
    assert signals == ()
    (event,) = reserving.events(Kind.EVALUATION)
    assert isinstance(event.operation, Evaluation)
    metrics = {metric.name: (metric.value_micro, metric.threshold is None) for metric in event.operation.metrics}
    assert metrics == {"recited": (0, False), "reserve taken for recited": (1_000_000, True)}
    manifest = (reserving.directory / "memorization.jsonl").read_text().splitlines()
    listed = {(bytes.fromhex(line["source"]), line["example"]) for line in map(json.loads, manifest)}
    assert not listed & kept


def test_pass_that_is_undone_is_told_once_when_it_stands(reserving: Scene) -> None:
    recites = RecitesAt(8)
    reserving.arguments["memorization"] = recites
    run = reserving.train(recites.at.append)
    assert recites.caught
    passes = run._record.summary(0, 0, "", 0.0).memorization_passes
    assert [(each.step, each.recited) for each in passes] == [(4, 0), (8, 1), (12, 1)]
