"""What sources moved, from the log and committed accumulators: parts that add up, and nothing of what was refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from attribution_fixtures import FACTS, REFUSED, SKETCH_RANK, STEPS, WINDOW_STEPS, traced
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from attribution.footprint import chosen_sources, example_footprint, footprint
from attribution.index import SketchedCampaign
from attribution.index_build import build_index
from attribution.log import CampaignLog, open_log
from attribution.sketches import RunFolder
from attribution.weights import Search, accumulators_of, find_windows
from consensus.identifiers import ChainId
from consensus.portions import ParameterBlock
from consensus.rejection import Reason, Rejected
from node.cli import main

ADMITTED = [name for name in FACTS if name != REFUSED]


def opened() -> tuple[CampaignLog, Search]:
    folder = traced().folder
    log = open_log(folder / "campaign.bundle", folder / "genesis.json", ChainId(bytes.fromhex(traced().chain_id)))
    return log, find_windows(folder / "run" / "accumulators", log.bundle.campaign, log.provenance.windows)


def ask(folder: Path, *criteria: str) -> Result:
    arguments = [
        "footprint", "--accumulators", folder / "run" / "accumulators", "--bundle", folder / "campaign.bundle",
        "--genesis", folder / "genesis.json", "--chain-id", traced().chain_id, *criteria,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_parts_of_all_sources_add_up_to_one_in_every_block_and_window() -> None:
    log, search = opened()
    found = [
        footprint(log.provenance, search.found, chosen_sources(log.provenance, [name], (), (), False))
        for name in ADMITTED
    ]
    assert sum(each.whole.part or 0 for each in found) == pytest.approx(1.0, abs=1e-3)
    for window in found[0].windows:
        assert sum(each.windows[window].part or 0 for each in found) == pytest.approx(1.0, abs=1e-3)
    moved = [block for block, motion in found[0].blocks.items() if motion.part is not None]
    assert moved == ["block.0", "block.1", "head"]
    for block in moved:
        assert sum(each.blocks[block].part or 0 for each in found) == pytest.approx(1.0, abs=1e-3)
    together = footprint(log.provenance, search.found, chosen_sources(log.provenance, ADMITTED, (), (), False))
    assert together.whole.part == pytest.approx(1.0, abs=1e-6)


def test_norm_is_that_of_the_sources_own_sums() -> None:
    log, search = opened()
    found = footprint(log.provenance, search.found, chosen_sources(log.provenance, ["harbour"], (), (), False))
    harbour = traced().sources["harbour"]
    sums: dict[str, torch.Tensor] = {}
    for file in search.found:
        for entry, parts in accumulators_of(file):
            if entry.source == harbour:
                for name, part in parts.items():
                    sums[name] = sums.get(name, torch.zeros_like(part)) + part
    expected = sum(float(part.square().sum()) for name, part in sums.items() if name.startswith("blocks.1.")) ** 0.5
    assert found.blocks["block.1"].norm == pytest.approx(expected, rel=1e-5)
    assert list(found.windows) == [
        (1, WINDOW_STEPS),
        (WINDOW_STEPS + 1, 2 * WINDOW_STEPS),
        (2 * WINDOW_STEPS + 1, STEPS),
    ]


def test_command_says_what_a_source_moved_and_what_was_released() -> None:
    result = ask(traced().folder, "--source", "harbour")
    assert result.exit_code == 0, result.output
    for words in ("harbour of data-source-1", "steps 1 to 12", "block.1", "everything", "released  tuned.safetensors"):
        assert words in result.output
    document = json.loads(ask(traced().folder, "--source", traced().sources["harbour"].hex(), "--json").stdout)
    assert [source["name"] for source in document["sources"]] == ["harbour"]
    assert document["whole"]["part"] > 0.1
    assert document["sources"][0]["admitted"] > 0
    assert document["release"]["file"] == "tuned.safetensors"


def test_refused_source_moved_nothing() -> None:
    result = ask(traced().folder, "--source", REFUSED, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["whole"] == {"norm": 0.0, "part": 0.0}
    assert document["sources"][0]["admitted"] == 0
    assert document["no_direct_update"] == ["block.0", "block.1", "head"]
    of_one = json.loads(ask(traced().folder, "--example", f"{REFUSED}:0", "--json").stdout)
    assert of_one["no_direct_update"] == document["no_direct_update"]


def test_block_of_which_no_sums_are_kept_is_not_said_to_have_been_moved_by_nothing() -> None:
    document = json.loads(ask(traced().folder, "--source", "harbour", "--json").stdout)
    assert document["blocks"]["embedding"] == {"norm": None, "part": None}
    (line,) = (row for row in ask(traced().folder, "--source", "harbour").stdout.splitlines() if row[:9] == "embedding")
    assert line.split() == ["embedding", "–", "–"]


def test_owner_and_class_choose_all_their_sources() -> None:
    document = json.loads(ask(traced().folder, "--owner", "data-source-1", "--json").stdout)
    assert {source["name"] for source in document["sources"]} == set(FACTS)
    same = json.loads(ask(traced().folder, "--class", document["sources"][0]["class"], "--json").stdout)
    assert same["whole"]["part"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "criteria", [("--source", "nowhere"), ("--owner", "nobody"), ("--class", "poetry"), ("--revoked",)], ids=str
)
def test_criterion_that_no_source_meets_is_named(criteria: tuple[str, ...]) -> None:
    result = ask(traced().folder, *criteria)
    assert result.exit_code == 1
    assert "unknown-source: no source of the campaign" in result.output
    as_of = opened()[0].verdict.as_of
    assert f": this log is of ledger block {as_of.height} ({as_of.log_size} entries)" in result.output


def test_no_criterion_is_a_usage_error() -> None:
    assert ask(traced().folder).exit_code == 2


def test_missing_window_is_left_out_named_and_no_whole_answer(tmp_path: Path) -> None:
    shutil.copytree(traced().folder, tmp_path / "traced")
    for path in (tmp_path / "traced" / "run" / "accumulators" / "windows").iterdir():
        path.unlink()
        break
    result = ask(tmp_path / "traced", "--source", "harbour")
    assert result.exit_code == 2
    assert "left out  steps" in result.output
    assert "2 of 3 windows" in result.output


def test_choice_is_by_the_campaigns_manifest_alone() -> None:
    log, _ = opened()
    with pytest.raises(Rejected) as refusal:
        chosen_sources(log.provenance, ["ab" * 32], (), (), False)
    assert refusal.value.reason is Reason.UNKNOWN_SOURCE


def test_example_moved_what_its_sketches_hold_by_the_files_and_by_an_index(tmp_path: Path) -> None:
    folder = traced().folder
    log, search = opened()
    terms = SketchedCampaign.of(log)
    build_index(terms, folder / "run" / "accumulators", tmp_path / "index")
    by_files = json.loads(ask(folder, "--example", "harbour:3", "--json").stdout)
    by_index = json.loads(ask(folder, "--example", "harbour:3", "--json", "--index", str(tmp_path / "index")).stdout)
    assert by_files == by_index
    use = by_files["example"]
    assert (use["example"], use["rank"], use["left_out"]) == (3, SKETCH_RANK, [])
    visited: list[int] = []
    square = 0.0
    for file in search.found:
        (entry,) = (each for each in file.listed.of_sources if each.source == traced().sources["harbour"])
        tensors = load_file(file.directory / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors")
        visited += [step for step, example in tensors["visits"].tolist() if example == 3]
        if file.window.first == 1:
            row = tensors["examples"].tolist().index(3)
            for name in {label.rpartition("/")[0] for label in tensors} - {""}:
                left, right = (
                    torch.stack([tensors[f"{name}/{part}"][row] & 15, tensors[f"{name}/{part}"][row] >> 4], dim=2)
                    .flatten(1)
                    .double()
                    - 8
                    for part in ("left", "right")
                )
                square += float(((left.T * tensors[f"{name}/scale"][row].double()) @ right).square().sum())
    assert use["steps"] == visited
    assert by_files["windows"][0]["norm"] == pytest.approx(square**0.5, rel=1e-4)
    assert [block for block, motion in by_files["blocks"].items() if motion["norm"]] == ["block.0", "block.1", "head"]
    assert 0 < by_files["whole"]["part"] < 0.2
    text = ask(folder, "--example", "harbour:3").stdout
    assert f"example 3 of it, admitted to steps {', '.join(map(str, visited))}" in text
    assert f"sketches of rank {SKETCH_RANK}" in text


def test_examples_of_a_source_move_less_than_the_source(tmp_path: Path) -> None:
    log, search = opened()
    (source,) = chosen_sources(log.provenance, ["harbour"], (), (), False)
    whole = footprint(log.provenance, search.found, (source,))
    parts = [example_footprint(log.provenance, search.found, source, row, RunFolder()).whole.part for row in range(12)]
    assert whole.whole.part is not None
    assert 0.3 < sum(part or 0.0 for part in parts) / whole.whole.part < 1.2


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (["--example", "harbour:99"], 1, "bad-field: 'harbour' has 12 examples, from 0: there is no example 99"),
        (["--example", "castle:0"], 1, "admitted to steps none"),
        (["--example", "nobody:0"], 1, "unknown-source"),
        (["--example", "harbour"], 2, "expected SOURCE:INDEX"),
        (["--example", "harbour:-1"], 2, "expected SOURCE:INDEX"),
        (["--example", "harbour:1", "--source", "harbour"], 2, "or --example alone"),
    ],
)
def test_example_that_was_not_used_or_not_named_is_told_apart(asked: list[str], code: int, said: str) -> None:
    result = ask(traced().folder, *asked)
    assert (result.exit_code, said in result.output) == (code, True), result.output


def test_example_whose_sketches_are_altered_is_told_without_them(tmp_path: Path) -> None:
    shutil.copytree(traced().folder, tmp_path / "traced")
    _, search = opened()
    (entry,) = (each for each in search.found[1].listed.of_sources if each.source == traced().sources["harbour"])
    path = tmp_path / "traced/run/accumulators/blobs" / f"{entry.sketches_sha256.hex()}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    result = ask(tmp_path / "traced", "--example", "harbour:3")
    assert result.exit_code == 2
    assert f"left out  steps {WINDOW_STEPS + 1} to {2 * WINDOW_STEPS}: digest-mismatch" in result.stdout


def test_no_block_of_biases_alone_is_told_closed_to_an_example_that_has_no_sketch_of_them() -> None:
    log, search = opened()
    blocks = []
    for block in log.provenance.campaign.parameter_blocks:
        biases = tuple(tensor for tensor in block.tensors if tensor.name.endswith(".bias"))
        others = tuple(tensor for tensor in block.tensors if tensor not in biases)
        blocks += [ParameterBlock(block.name, others), ParameterBlock(f"{block.name} biases", biases)]
    campaign = msgspec.structs.replace(log.provenance.campaign, parameter_blocks=tuple(blocks))
    provenance = dataclasses.replace(log.provenance, campaign=campaign)
    (source,) = chosen_sources(provenance, ["harbour"], (), (), False)
    of_source = footprint(provenance, search.found, (source,))
    assert of_source.blocks["block.1 biases"].norm > 0
    of_one = example_footprint(provenance, search.found, source, 0, RunFolder())
    assert of_one.of_example is not None
    assert of_one.of_example.steps
    assert (of_one.blocks["block.1"].norm > 0, of_one.closed) == (True, ())
