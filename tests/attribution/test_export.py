"""The index as a table for other tools: whole, documented, held to the log, or not there."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attribution_fixtures import CAMPAIGN, traced
from click.testing import CliRunner
from sketch_fixtures import POLICY, RANK, RANKS, SHAPES, SOURCES, HandMade, hand_made, rebuilt

from attribution.export import export_index
from attribution.index import Index, open_index
from attribution.index_build import build_index
from consensus.rejection import ConfigError, Reason, Rejected
from node.cli import _worded, main

NAMES = {SOURCES[0]: "harbour"}


@pytest.fixture
def run(tmp_path: Path) -> HandMade:
    return hand_made(tmp_path / "run")


@pytest.fixture
def built(run: HandMade, tmp_path: Path) -> Index:
    return build_index(run.terms, run.folder, tmp_path / "index")


def read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_table_holds_every_row_as_the_files_do(run: HandMade, built: Index, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sketches.{suffix}"
    assert export_index(built, NAMES, path) == (22, ())
    rows = read(path).to_pylist()
    assert len(rows) == 22
    for row in rows:
        tensors = run.tensors[row["first_step"], row["source"]]
        number = tensors["examples"].tolist().index(row["example"])
        assert (row["policy"], row["last_step"]) == (POLICY, row["first_step"] + 9)
        assert row["source_name"] == NAMES.get(row["source"], "")
        assert row["steps"] == [step for step, example in tensors["visits"].tolist() if example == row["example"]]
        square = 0.0
        for name, shape in SHAPES.items():
            if f"{name}/left" not in tensors:
                assert row[f"{name}/left"] is row[f"{name}/right"] is row[f"{name}/scale"] is None
                continue
            square += float(rebuilt(tensors, name)[number].square().sum())
            assert row[f"{name}/scale"] == tensors[f"{name}/scale"][number].tolist()
            for part, size in zip(("left", "right"), shape, strict=True):
                packed = np.frombuffer(row[f"{name}/{part}"], np.uint8).reshape(
                    min(RANKS.get(name, RANK), *shape), (size + 1) // 2
                )
                assert np.array_equal(packed, tensors[f"{name}/{part}"][number].numpy())
        assert row["norm"] == pytest.approx(square**0.5, rel=1e-4)


def test_every_column_says_what_it_holds_and_the_file_what_it_lacks(
    run: HandMade, built: Index, tmp_path: Path
) -> None:
    (file, _) = run.files()
    (entry, _) = file.listed.of_sources
    (run.folder / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors").unlink()
    lacking = build_index(run.terms, run.folder, built.folder)
    rows, left_out = export_index(lacking, NAMES, tmp_path / "sketches.parquet")
    assert (rows, len(left_out)) == (17, 1)
    schema = read(tmp_path / "sketches.parquet").schema
    assert all(len(field.metadata[b"description"]) > 10 for field in schema)
    assert schema.metadata[b"campaign"].decode() == run.terms.campaign.hex()
    assert json.loads(schema.metadata[b"left_out"]) == [str(left_out[0])]
    assert "not-found" in str(left_out[0])
    assert schema.field("odd/left").type == pa.binary(2 * 2)
    assert torch.tensor(schema.field("thin/scale").type.list_size).item() == 1


def test_altered_index_is_exported_not_at_all(run: HandMade, built: Index, tmp_path: Path) -> None:
    path = built.folder / "columns" / "0000.left.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    out = tmp_path / "sketches.parquet"
    with pytest.raises(Rejected) as refusal:
        export_index(open_index(built.folder, run.terms), NAMES, out)
    assert refusal.value.reason is Reason.DIGEST_MISMATCH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "run"]


def test_file_of_another_kind_is_not_written(built: Index, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.parquet or ….arrow"):
        export_index(built, NAMES, tmp_path / "sketches.csv")


def test_command_exports_a_trained_campaign(tmp_path: Path) -> None:
    folder = traced().folder
    log = ["--bundle", folder / "campaign.bundle", "--genesis", folder / "genesis.json"]
    log += ["--chain-id", traced().chain_id]
    runner = CliRunner()
    build = ["index", "build", "--accumulators", folder / "run" / "accumulators", *log, "--out", tmp_path / "index"]
    assert runner.invoke(main, [str(word) for word in build]).exit_code == 0
    export = ["index", "export", "--index", tmp_path / "index", *log, "--out", tmp_path / "sketches.parquet"]
    result = runner.invoke(main, [str(word) for word in export])
    assert (result.exit_code, "exported  108 rows" in result.stdout) == (0, True)
    table = read(tmp_path / "sketches.parquet")
    assert set(table["source_name"].to_pylist()) == {"harbour", "mountain", "market"}
    assert table.schema.metadata[b"campaign"].decode() == CAMPAIGN.hex()


def test_missing_pyarrow_is_told_with_the_extra_that_brings_it() -> None:
    told = _worded(ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"))
    assert told is not None
    assert "countersign[export]" in told.message
