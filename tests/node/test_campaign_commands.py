"""``countersign campaign recited``: the manifest that a job left, held to what is on the log."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import trio
from api_fixtures import served
from click.testing import CliRunner, Result
from ledger_fixtures import GOVERNANCE, Story
from rules_fixtures import granted

from consensus.event import CheckedEvent
from consensus.genesis import genesis_to_json
from consensus.portions import Policy
from consensus.rejection import ConfigError
from consensus.review import ACCEPT, AT_MOST, MICRO, DataSlice, Metric, Threshold
from consensus.state import POLICY_TABLE, PolicyRecord, read_record
from node.cli import main
from node.commands.manifest import MAX_MANIFEST_BYTES, read_manifest


@dataclass(frozen=True)
class Survey:
    """A configuration for a node that is up, a manifest's file, and the evaluation on the log that names it."""

    story: Story
    config: Path
    manifest: Path
    evaluation: CheckedEvent

    async def recited(self, *more: str) -> Result:
        arguments = ["campaign", "recited", "--config", str(self.config), self.story.run.id.hex()]
        arguments += ["--manifest", str(self.manifest), *more]
        return await trio.to_thread.run_sync(lambda: CliRunner().invoke(main, arguments))


def line(source: bytes, example: int, signal_permille: int) -> str:
    return json.dumps({"source": source.hex(), "example": example, "signal_permille": signal_permille})


@asynccontextmanager
async def surveyed(
    directory: Path, signals: tuple[int, ...], *, accepted: bool = False, source: bytes = b""
) -> AsyncIterator[Survey]:
    """A campaign of one step whose survey found these signals of the first examples of a source."""
    told = granted()
    told.ledger.seal(*told.run.step())
    manifest = directory / "memorization.jsonl"
    lines = (line(source or told.books, example, signal) for example, signal in enumerate(signals))
    manifest.write_text("\n".join((*lines, "")), encoding="utf-8")
    count = sum(signal > 800 for signal in signals) * MICRO
    evaluation = told.run.evaluation(
        name="memorization",
        data=DataSlice("memorization", sha256(manifest.read_bytes()).digest(), len(signals)),
        metrics=(Metric("recited", count, count, count, 999, "census", Threshold(AT_MOST, 0)),),
    )
    told.ledger.seal(evaluation)
    if accepted:
        told.ledger.seal(told.ledger.decision(told.run.id, evaluation.id, ACCEPT))
    (directory / "genesis.json").write_bytes(genesis_to_json(told.ledger.genesis))
    async with served(directory / "store", story=told) as running:
        config = directory / "node.toml"
        config.write_text(
            f'[node]\nname = "{GOVERNANCE}"\ngenesis = "genesis.json"\nchain_id = "{told.ledger.chain_id.hex()}"\n'
            'data_directory = "data"\nkeystore = "keystore.json"\n[network]\nlisten = "127.0.0.1:1"\n[network.peers]\n'
            f'[api]\nlisten = "{running.address}"\n',
            encoding="utf-8",
        )
        yield Survey(told, config, manifest, evaluation)


@pytest.mark.trio
async def test_recited_examples_are_named_with_their_owners_and_the_finding_to_decide_about(tmp_path: Path) -> None:
    async with surveyed(tmp_path, (0, 812, 800, 1_000)) as survey:
        shown = await survey.recited("--above", "800")
        assert shown.exit_code == 1, shown.output
        assert f"evaluation {survey.evaluation.id.hex()}" in shown.output
        assert "stands     unmet" in shown.output
        assert "'recited' is 2, 2 to 2 at 99.9 % ('census'); at most 0: MISSED, says the operator" in shown.output
        assert "recited    2 above 800" in shown.output
        document = json.loads((await survey.recited("--above", "800", "--json")).output)
    assert [(row["example"], row["signal_permille"]) for row in document["recited"]] == [(3, 1_000), (1, 812)]
    assert {(row["name"], row["owner"]) for row in document["recited"]} == {("books", "data-source-1")}
    assert document["evaluation"] == survey.evaluation.id.hex()
    assert (document["examples"], document["highest_signal_permille"]) == (4, 1_000)


def policy_in_force(told: Story) -> Policy:
    value = told.ledger.state.get(POLICY_TABLE + told.run.policy_id)
    assert value is not None
    return read_record(value, PolicyRecord).policy


@pytest.mark.trio
async def test_without_a_number_the_threshold_of_the_policy_in_force_counts(tmp_path: Path) -> None:
    async with surveyed(tmp_path, (0, 1_000)) as survey:
        threshold = policy_in_force(survey.story).memorization_threshold_permille
        document = json.loads((await survey.recited("--json")).output)
    assert document["threshold_permille"] == threshold
    assert len(document["recited"]) == 1


@pytest.mark.trio
async def test_manifest_of_a_model_that_recites_nothing_exits_0(tmp_path: Path) -> None:
    async with surveyed(tmp_path, (0, 120)) as survey:
        shown = await survey.recited("--above", "800")
    assert (shown.exit_code, "stands     met" in shown.output) == (0, True), shown.output
    assert "strongest  120 of 1000, of 2 examples shown" in shown.output


@pytest.mark.trio
async def test_accepted_finding_is_told_as_accepted_and_still_recited(tmp_path: Path) -> None:
    async with surveyed(tmp_path, (900,), accepted=True) as survey:
        shown = await survey.recited("--above", "800")
    assert (shown.exit_code, "stands     accepted" in shown.output) == (1, True), shown.output


@pytest.mark.trio
async def test_source_that_the_log_does_not_know_is_shown_by_its_id(tmp_path: Path) -> None:
    async with surveyed(tmp_path, (900,), source=bytes([5]) * 32) as survey:
        shown = await survey.recited("--above", "800")
    assert (shown.exit_code, f"{'05' * 32}  nobody known" in shown.output) == (1, True), shown.output


@pytest.mark.trio
async def test_manifest_with_a_signal_made_smaller_is_not_the_one_on_the_log(tmp_path: Path) -> None:
    async with surveyed(tmp_path, (900, 0)) as survey:
        survey.manifest.write_text(survey.manifest.read_text().replace("900", "100"), encoding="utf-8")
        shown = await survey.recited()
    assert shown.exit_code == 2
    assert "which none of its 1 evaluations names" in shown.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "found no example"),
        (b"not json\n", "expected a memorization manifest, found"),
        (b'{"source": "ab", "example": 0, "signal_permille": 0}\n', "expected a memorization manifest, found"),
        (line(bytes(32), 0, 1_001).encode(), "expected a memorization manifest, found"),
        (line(bytes(32), -1, 0).encode(), "expected a memorization manifest, found"),
        (line(bytes(32), 0, 0).encode()[:-1] + b', "more": 1}', "expected a memorization manifest, found"),
        (b"\xff\xfe\n", "expected a memorization manifest, found"),
        (None, "No such file"),
    ],
)
def test_what_is_no_manifest_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "memorization.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refusal:
        read_manifest(path)
    assert str(path) in str(refusal.value)


def test_manifest_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "memorization.jsonl"
    with path.open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ConfigError, match="at most"):
        read_manifest(path)


def test_manifest_without_an_end_is_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a regular file"):
            read_manifest(path)
