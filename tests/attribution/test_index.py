"""The index of sketches: the answers of the run's files, and never one from anything that is not committed."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from attribution_fixtures import FACTS, ask, kept_folder, traced
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_fixtures import story
from sketch_fixtures import SHAPES, SOURCES, HandMade, hand_made, made_sketches, rebuilt
from torch import Tensor

from attribution import sketches
from attribution.examples import Allowance, Asked, SourceExamples, source_examples
from attribution.index import Index, SketchedCampaign, open_index
from attribution.index_build import build_index, check_index
from attribution.sketches import RunFolder, SketchQuery, SketchStore, open_sketches, pieces_of
from consensus.genesis import genesis_to_json
from consensus.rejection import ConfigError, Reason, Rejected
from node.bundles import export_bundle
from node.cli import main


@pytest.fixture
def run(tmp_path: Path) -> HandMade:
    return hand_made(tmp_path / "run")


@pytest.fixture
def built(run: HandMade, tmp_path: Path) -> Index:
    return build_index(run.terms, run.folder, tmp_path / "index")


def gradients() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(9)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def answer(run: HandMade, store: SketchStore, source: bytes = SOURCES[0], at_most: int = 1_000) -> SourceExamples:
    query = SketchQuery(gradients())
    asked = Asked(source, 1.0, {10: 2.0, 20: 5.0})
    (found,) = source_examples(query, run.files(), [asked], store, Allowance(at_most))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def indexed(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["index", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# The answer


def test_index_gives_the_answer_of_the_files_to_the_last_digit(run: HandMade, built: Index) -> None:
    for source in SOURCES:
        assert answer(run, built, source) == answer(run, RunFolder(), source)


def test_score_is_the_inner_product_with_what_the_format_says(run: HandMade, built: Index) -> None:
    query = gradients()
    for file in run.files():
        for entry in file.listed.of_sources:
            tensors = run.tensors[file.window.first, entry.source]
            names = [name for name in SHAPES if f"{name}/left" in tensors]
            expected = -sum(torch.einsum("npq,pq->n", rebuilt(tensors, name), query[name].double()) for name in names)
            found = open_sketches(built, file, entry).check(file, entry, SHAPES).scores(SketchQuery(query))
            assert torch.allclose(found, torch.as_tensor(expected), rtol=1e-5, atol=1e-4)


def test_files_read_in_many_small_parts_give_the_same_scores(
    run: HandMade, built: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer(run, built)
    monkeypatch.setattr(sketches, "ROWS_AT_ONCE", 2)
    parted = answer(run, built)
    assert parted == answer(run, RunFolder())
    assert [row.example for row in parted.ranked] == [row.example for row in whole.ranked]
    assert [row.score for row in parted.ranked] == pytest.approx([row.score for row in whole.ranked])


def test_trace_by_an_index_is_the_trace_by_the_files(tmp_path: Path) -> None:
    folder, completion = traced().folder, FACTS["harbour"][1].decode()
    log = [
        "--bundle",
        folder / "campaign.bundle",
        "--genesis",
        folder / "genesis.json",
        "--chain-id",
        traced().chain_id,
    ]
    made = indexed("build", "--accumulators", folder / "run" / "accumulators", *log, "--out", tmp_path / "index")
    assert made.exit_code == 0, made.output
    assert "108 sketches of 432 example-visits" in made.stdout
    by_files = json.loads(ask(folder, "--completion", completion, "--json").stdout)
    by_index = json.loads(ask(folder, "--completion", completion, "--json", "--index", tmp_path / "index").stdout)
    assert by_index.pop("index") == str(tmp_path / "index")
    assert by_files.pop("index") is None
    assert by_index == by_files
    checked = indexed("check", "--index", tmp_path / "index", *log)
    assert (checked.exit_code, "9 of 9 segments" in checked.stdout) == (0, True)
    few = ask(folder, "--completion", completion, "--index", tmp_path / "index", "--open-at-most", 100)
    assert "not opened  1 window with 48 of 144 visits" in few.stdout
    path = tmp_path / "index" / "columns" / "0003.left.npy"
    path.write_bytes(path.read_bytes()[:128] + bytes(path.stat().st_size - 128))
    spoiled = indexed("check", "--index", tmp_path / "index", *log, "--json")
    assert (spoiled.exit_code, len(json.loads(spoiled.stdout)["altered"])) == (1, 9)
    answered = ask(folder, "--completion", completion, "--index", tmp_path / "index").stdout
    assert "examples of harbour, by 0 sketches" in answered
    assert answered.count("left out  steps") == 3 * answered.count(" by 0 sketches")


# What is opened


def test_windows_with_the_highest_score_are_opened_first_and_the_rest_is_told(run: HandMade, built: Index) -> None:
    found = answer(run, built, at_most=15)
    assert (found.opened, found.visits, found.unopened, found.unopened_visits) == (5, 10, ((1, 10),), 10)
    assert all(set(row.by_window) == {20} for row in found.ranked)
    nothing = answer(run, built, at_most=0)
    assert (nothing.opened, nothing.ranked, nothing.covered, nothing.unopened_visits) == (0, (), 0.0, 20)


def test_allowance_that_one_source_used_is_not_there_for_the_next(run: HandMade, built: Index) -> None:
    allowance = Allowance(25)
    query = SketchQuery(gradients())
    asked = [Asked(source, 1.0, {}) for source in (*SOURCES, bytes(32))]
    opened = source_examples(query, run.files(), asked, built, allowance)
    assert [(found.source, found.visits) for found in opened] == [(SOURCES[0], 20), (SOURCES[1], 0)]
    assert allowance.visits == 5


# Building


def test_columns_are_numpy_arrays_of_one_sources_rows_together(run: HandMade, built: Index) -> None:
    examples = np.load(built.folder / "examples.npy", mmap_mode="r")
    assert examples.tolist() == [
        example
        for source in SOURCES
        for first in (1, 11)
        for example in run.tensors[first, source]["examples"].tolist()
    ]
    number = built.header.parameters.index("closed")
    assert [segment.absent for segment in built.header.segments] == [(), (number,), (), (number,)]
    left = np.load(built.folder / "columns" / f"{number:04}.left.npy", mmap_mode="r")
    expected = torch.cat([run.tensors[1, source]["closed/left"] for source in SOURCES])
    assert (left.dtype, left.tolist()) == (np.uint8, expected.tolist())
    scale = np.load(built.folder / "columns" / f"{number:04}.scale.npy", mmap_mode="r")
    assert scale.dtype == np.float32
    assert (built.examples, built.visits) == (22, 44)


def test_index_is_the_same_bytes_whenever_it_is_built_and_takes_an_older_ones_place(
    run: HandMade, built: Index, tmp_path: Path
) -> None:
    first = contents(built.folder)
    (built.folder / "examples.npy").write_bytes(b"spoiled")
    again = build_index(run.terms, run.folder, built.folder)
    assert contents(again.folder) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "run"]


def test_interrupted_build_leaves_the_older_index_and_nothing_else(run: HandMade, built: Index, tmp_path: Path) -> None:
    before = contents(built.folder)

    def stop(stage: str) -> None:
        raise KeyboardInterrupt(stage)

    with pytest.raises(KeyboardInterrupt):
        build_index(run.terms, run.folder, built.folder, stop)
    assert contents(built.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "run"]


def test_folder_that_is_no_index_is_never_replaced(run: HandMade, built: Index, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "link").symlink_to(built.folder)
    (built.folder / "letter.txt").write_text("dear")
    for out in (tmp_path / "letters", tmp_path / "link", built.folder):
        with pytest.raises(ConfigError, match="index to replace"):
            build_index(run.terms, run.folder, out)
    assert (built.folder / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("spoil", ["missing", "flipped", "longer", "link", "pipe"])
def test_file_that_is_not_committed_is_left_out_named_and_never_answered_from(
    run: HandMade, tmp_path: Path, spoil: str
) -> None:
    (first, _) = run.files()
    (entry, _) = first.listed.of_sources
    path = run.folder / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors"
    content = path.read_bytes()
    if spoil in ("missing", "link", "pipe"):
        path.rename(tmp_path / "moved")
    if spoil == "link":
        path.symlink_to(tmp_path / "moved")
    if spoil == "pipe":
        os.mkfifo(path)
    if spoil in ("flipped", "longer"):
        path.write_bytes(content + b"x" if spoil == "longer" else content[:-1] + bytes([content[-1] ^ 1]))
    built = build_index(run.terms, run.folder, tmp_path / "index")
    (left_out,) = built.header.left_out
    assert (left_out.source, left_out.first_step) == (SOURCES[0].hex(), 1)
    found = answer(run, built)
    assert (found.opened, len(found.left_out)) == (5, 1)
    assert left_out.why in found.left_out[0]
    assert answer(run, RunFolder()).left_out
    checked = check_index(built)
    assert (checked.whole, checked.altered, len(checked.missing)) == (3, (), 1)


def _other_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {f"even/{part}": tensors[f"even/{part}"][:, :2] for part in ("left", "right", "scale")}


def _stranger(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {f"../../stranger/{part}": tensors[f"even/{part}"] for part in ("left", "right", "scale")}


@pytest.mark.parametrize(
    ("change", "said"), [(_other_rank, "of rank 2, expected 3"), (_stranger, "no weight of the campaign's")]
)
def test_committed_sketches_that_fit_no_column_are_left_out_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    odd = change(made_sketches(1, 4, tuple(SHAPES), torch.Generator().manual_seed(1)))
    run = hand_made(tmp_path / "run", {(1, SOURCES[1]): odd})
    built = build_index(run.terms, run.folder, tmp_path / "index")
    (left_out,) = built.header.left_out
    assert said in left_out.why
    assert not (tmp_path.parent / "stranger").exists()


def test_window_whose_list_is_gone_is_named_and_a_folder_with_none_refused(run: HandMade, tmp_path: Path) -> None:
    lists = [run.folder / "windows" / f"{window.root.hex()}.window" for window in run.terms.windows]
    lists[0].unlink()
    built = build_index(run.terms, run.folder, tmp_path / "index")
    assert [(held.first_step, held.source) for held in built.header.left_out] == [(1, "")]
    assert [held.first_step for held in check_index(built).missing] == [1]
    lists[1].unlink()
    with pytest.raises(Rejected, match="holds no sketches") as refusal:
        build_index(run.terms, run.folder, tmp_path / "other")
    assert refusal.value.reason is Reason.NOT_FOUND
    assert not (tmp_path / "other").exists()


def test_file_that_changes_while_it_is_read_is_refused(run: HandMade) -> None:
    (file, _) = run.files()
    (entry, _) = file.listed.of_sources
    held = open_sketches(RunFolder(), file, entry).check(file, entry, SHAPES)
    path = run.folder / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    with pytest.raises(Rejected, match="changed while it was read"):
        held.scores(SketchQuery(gradients()))


# An index from somebody else


@cache
def honest() -> tuple[HandMade, Index, tuple[SourceExamples, ...]]:
    """Made once; nobody changes it."""
    folder = kept_folder("index")
    run = hand_made(folder / "run")
    built = build_index(run.terms, run.folder, folder / "index")
    return run, built, tuple(answer(run, built, source) for source in SOURCES)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    which=st.integers(0, 10_000), place=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["flip", "cut", "add"])
)
def test_any_spoiled_byte_is_refused_by_name_or_changes_no_answer(which: int, place: float, how: str) -> None:
    run, built, expected = honest()
    copy = built.folder.with_name("spoiled")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(built.folder, copy)
    paths = sorted(path for path in copy.rglob("*") if path.is_file())
    path = paths[which % len(paths)]
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if how == "flip":
        content[at] ^= 1 << (which % 8)
    path.write_bytes(content[:at] if how == "cut" else content + b"\x08" if how == "add" else content)
    try:
        spoiled = open_index(copy, run.terms)
    except Rejected:
        return
    checked = check_index(spoiled)
    for source, before in zip(SOURCES, expected, strict=True):
        after = answer(run, spoiled, source)
        assert after == before or after.left_out
        assert after == before or checked.altered or checked.missing
        known = {(row.example, last): part for row in before.ranked for last, part in row.by_window.items()}
        assert all(known[row.example, last] == part for row in after.ranked for last, part in row.by_window.items())


def test_segments_swapped_for_one_another_are_refused(run: HandMade, built: Index) -> None:
    """Both have the right sizes and both are committed to: for other windows."""
    number = built.header.parameters.index("even")
    path = built.folder / "columns" / f"{number:04}.scale.npy"
    content = path.read_bytes()
    rows = content[128:]
    path.write_bytes(content[:128] + rows[40:80] + rows[:40] + rows[80:])
    found = answer(run, built)
    assert (found.opened, len(found.left_out)) == (0, 2)
    assert all("digest-mismatch" in why for why in found.left_out)


Change = Callable[[dict[str, object]], object]


def _with(**fields: object) -> Change:
    return lambda header: header.update(fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with(chain_id="0" * 64), Reason.WRONG_CHAIN),
        (_with(campaign="0" * 64), Reason.UNKNOWN_CAMPAIGN),
        (_with(format="other"), Reason.UNSUPPORTED_VERSION),
        (_with(version=2), Reason.UNSUPPORTED_VERSION),
        (_with(more=1), Reason.MALFORMED),
        (_with(campaign="00"), Reason.MALFORMED),
        (_with(parameters=["../../etc/passwd", "odd", "even", "thin"]), Reason.MALFORMED),
        (_with(parameters=["odd", "odd", "even", "thin"]), Reason.MALFORMED),
        (_with(parameters=["odd", "closed", "thin", "even"]), Reason.DIGEST_MISMATCH),
        (_with(segments=[]), Reason.DIGEST_MISMATCH),
        (lambda header: header["segments"].reverse(), Reason.MALFORMED),  # type: ignore[attr-defined]
        (lambda header: header["segments"][0].update(examples=0), Reason.MALFORMED),  # type: ignore[index]
        (lambda header: header["segments"][0].update(examples=6), Reason.DIGEST_MISMATCH),  # type: ignore[index]
        (lambda header: header["segments"][0].update(examples=2**53), Reason.MALFORMED),  # type: ignore[index]
        (lambda header: header["segments"][0].update(absent=[9]), Reason.MALFORMED),  # type: ignore[index]
        (lambda header: header["segments"][0].update(absent=[1, 0]), Reason.MALFORMED),  # type: ignore[index]
        (lambda header: header["segments"][0].update(absent=[0]), Reason.DIGEST_MISMATCH),  # type: ignore[index]
    ],
)
def test_header_that_is_not_this_campaigns_is_refused_by_name(
    run: HandMade, built: Index, change: Change, reason: Reason
) -> None:
    path = built.folder / "index.json"
    header = json.loads(path.read_bytes())
    change(header)
    path.write_text(json.dumps(header))
    with pytest.raises(Rejected) as refusal:
        open_index(built.folder, run.terms)
    assert refusal.value.reason is reason


@pytest.mark.parametrize("name", ["index.json", "examples.npy", "columns/0001.right.npy"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "gone"])
def test_what_is_no_file_of_its_own_is_refused(
    run: HandMade, built: Index, tmp_path: Path, name: str, kind: str
) -> None:
    path = built.folder / name
    path.rename(tmp_path / "outside")
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(Rejected) as refusal:
        open_index(built.folder, run.terms)
    assert refusal.value.reason is Reason.NOT_FOUND


def test_segment_that_the_log_knows_nothing_of_is_told_by_a_check_and_never_opened(run: HandMade, built: Index) -> None:
    path = built.folder / "index.json"
    header = json.loads(path.read_bytes())
    header["segments"][-1]["policy"] = "f" * 64
    path.write_text(json.dumps(header))
    checked = check_index(open_index(built.folder, run.terms))
    assert (checked.whole, len(checked.altered), len(checked.missing)) == (3, 1, 1)
    assert "has no sketches of steps 11" in checked.altered[0]


def test_index_of_other_weights_than_the_query_has_scores_only_what_both_know(run: HandMade, built: Index) -> None:
    one = {"odd": gradients()["odd"]}
    (found,) = source_examples(SketchQuery(one), run.files(), [Asked(SOURCES[0], 1.0, {})], built, Allowance())
    assert (found.opened, found.left_out) == (10, ())
    resized = {"odd": torch.zeros(7, 9)}
    (found,) = source_examples(SketchQuery(resized), run.files(), [Asked(SOURCES[0], 1.0, {})], built, Allowance())
    assert (found.opened, len(found.left_out)) == (0, 2)
    assert "not of this model's shapes" in found.left_out[0]


NESTED = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"\xff", NESTED, b'{"a": 1}', b'{"a": {"dtype": "U8", "shape": [1]}}',
        b'{"a": {"dtype": "Q8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
        b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [9007199254740992, 0], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
        b' "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
    ],
)  # fmt: skip
def test_header_that_is_no_safetensors_is_refused_by_name(header: bytes) -> None:
    with pytest.raises(Rejected, match="no safetensors file") as refusal:
        pieces_of("x", len(header).to_bytes(8, "little") + header)
    assert refusal.value.reason is Reason.MALFORMED


@given(st.binary(max_size=40), st.integers(0, 60))
def test_any_bytes_as_a_header_are_pieces_without_gaps_or_refused(content: bytes, length: int) -> None:
    try:
        pieces = pieces_of("x", length.to_bytes(8, "little") + content)
    except Rejected:
        return
    assert length == len(content)
    assert [piece.begin for piece in pieces[1:]] == [piece.begin + piece.size_bytes for piece in pieces[:-1]]


def test_index_json_that_is_nested_without_end_is_refused(run: HandMade, built: Index) -> None:
    (built.folder / "index.json").write_bytes(NESTED)
    with pytest.raises(Rejected) as refusal:
        open_index(built.folder, run.terms)
    assert refusal.value.reason is Reason.MALFORMED


# Commands


def test_campaign_that_keeps_no_sketches_is_told_so(tmp_path: Path) -> None:
    told = story()
    (tmp_path / "genesis.json").write_bytes(genesis_to_json(told.ledger.genesis))
    (tmp_path / "campaign.bundle").write_bytes(export_bundle(told.ledger, "accumulators", campaign=told.run.id))
    log = ["--bundle", tmp_path / "campaign.bundle", "--genesis", tmp_path / "genesis.json"]
    log += ["--chain-id", told.ledger.chain_id.hex()]
    built = indexed("build", "--accumulators", tmp_path, *log, "--out", tmp_path / "index")
    assert built.exit_code == 1
    assert "keeps no sketches" in built.output
    assert not (tmp_path / "index").exists()
    assert "keeps no sketches" in indexed("check", "--index", tmp_path, *log).output


def test_index_of_a_trace_is_refused_when_it_is_of_another_campaign(built: Index) -> None:
    result = ask(traced().folder, "--index", built.folder)
    assert result.exit_code == 1
    assert "wrong-chain" in result.output
    assert result.stdout == ""


def test_terms_say_what_the_log_says(run: HandMade) -> None:
    assert run.terms.rank_of("thin") == 1
    assert dataclasses.replace(run.terms, rank=9).rank_of("odd") == 3
    assert isinstance(run.terms, SketchedCampaign)


def test_header_round_trips_through_json(built: Index) -> None:
    encoded = msgspec.json.encode(built.header)
    assert msgspec.json.decode(encoded, type=type(built.header)) == built.header
