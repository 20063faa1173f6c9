"""``countersign overlap``: what a text repeats of a campaign's sources, each with its receipt."""

import json
import shutil
from pathlib import Path

import pytest
from attribution_fixtures import FACTS, INDEXED, examples_of, traced
from click.testing import CliRunner, Result

from node.cli import main

REPEATED = examples_of("harbour")[3]


def ask(folder: Path, *more: object, indexes: tuple[str, ...] = INDEXED, text: bytes = REPEATED) -> Result:
    arguments = [
        "overlap", "--text", text.decode(), "--bundle", folder / "campaign.bundle",
        "--genesis", folder / "genesis.json", "--chain-id", traced().chain_id,
        *(part for name in indexes for part in ("--index", folder / f"{name}.overlap")), *more,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("campaign.bundle", "genesis.json", *(f"{each}.overlap" for each in INDEXED)):
        shutil.copy(traced().folder / name, tmp_path / name)
    for each in INDEXED:
        shutil.copy(traced().folder / f"{each}.overlap.key", tmp_path / f"{each}.overlap.key")
    return tmp_path


def test_a_repeated_record_is_named_with_its_sources_receipt(folder: Path) -> None:
    result = ask(folder)
    assert result.exit_code == 0, result.output
    assert "repeats  harbour in 12 examples:" in result.output
    assert result.output.index("example 3: ") < result.output.index("claimed")
    assert "nothing of castle, mountain" in result.output
    assert "not asked  market: its owner claimed no overlap index" in result.output
    (harbour, *_) = [each for each in json.loads(ask(folder, "--json").output)["sources"] if each["name"] == "harbour"]
    leading = harbour["examples"][0]
    assert (leading["example"], harbour["source"]) == (3, traced().sources["harbour"].hex())
    assert leading["covered_bytes"] >= len(REPEATED) - 22
    assert harbour["admitted"] > 0


def test_a_refused_sources_record_is_recognised_too_and_said_to_be_unused(folder: Path) -> None:
    result = ask(folder, text=examples_of("castle")[0])
    assert result.exit_code == 0, result.output
    assert "repeats  castle" in result.output
    assert "used      0 admitted examples in steps that stand" in result.output


def test_exit_codes_tell_nothing_found_from_not_everybody_asked(folder: Path) -> None:
    text = b"None of the sources has ever said anything like this sentence."
    assert ask(folder, text=text).exit_code == 2  # market has no index
    fact = FACTS["market"][0] + FACTS["market"][1]
    assert ask(folder, text=fact).exit_code == 2
    short = ask(folder, text=b"short")
    assert (short.exit_code, "nothing shorter than 20" in short.stderr) == (2, True)
    assert ask(folder, "--text-file", folder / "genesis.json").exit_code == 2


def test_an_altered_index_and_one_of_another_campaign_are_left_out_and_named(folder: Path) -> None:
    path = folder / "harbour.overlap"
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(bytes(altered))
    result = ask(folder)
    assert result.exit_code == 2
    assert "not asked  harbour: its index is not here" in result.output
    assert f"left out   {path}: SHA-256" in result.output


def test_a_missing_key_and_a_wrong_one_are_named(folder: Path) -> None:
    (folder / "harbour.overlap.key").unlink()
    result = ask(folder)
    assert result.exit_code == 2
    assert f"not asked  harbour: the key of {folder / 'harbour.overlap'} is not here" in result.output
    (folder / "harbour.overlap.key").write_text("7" * 64)
    result = ask(folder)
    assert f"left out   {folder / 'harbour.overlap.key'}: the key of no index that was asked" in result.output
    (folder / "harbour.overlap.key").write_text("no key")
    result = ask(folder)
    assert (result.exit_code, "expected a key of 64 lower-case hex digits" in result.stderr) == (2, True)


def test_runs_shorter_than_asked_for_do_not_count(folder: Path) -> None:
    assert ask(folder, "--at-least", "200").exit_code == 2
    assert ask(folder, "--at-least", "20", indexes=("harbour",)).exit_code == 0
    assert ask(folder, "--at-least", "19").exit_code == 2
