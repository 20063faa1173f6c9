"""Examples out of Parquet files and saved datasets: the rows in their order, or the reason why not."""

import json
from contextlib import suppress
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.rejection import ConfigError
from node.commands.content import read_examples
from node.commands.tables import dataset_column, parquet_column

TEXTS = [f"record {number}: é" for number in range(2_500)]


def table(texts: list[str | None]) -> pyarrow.Table:
    return pyarrow.table({"text": pyarrow.array(texts, pyarrow.string()), "number": list(range(len(texts)))})


def saved(folder: Path, parts: list[list[str | None]], *, as_file: bool = False) -> Path:
    """As ``Dataset.save_to_disk`` leaves a split: Arrow files and a state that names them."""
    folder.mkdir()
    names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        whole = table(part)
        new = pyarrow.ipc.new_file if as_file else pyarrow.ipc.new_stream
        with new(str(folder / name), whole.schema) as writer:
            writer.write_table(whole, max_chunksize=700)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_rows_of_a_parquet_column_are_examples_in_order(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(table(TEXTS), tmp_path / "a.parquet", row_group_size=600)
    assert list(read_examples([tmp_path / "a.parquet"], parquet_column("text"))) == [text.encode() for text in TEXTS]
    raw = pyarrow.table({"text": pyarrow.array([b"\xff\x00", b""], pyarrow.large_binary())})
    pyarrow.parquet.write_table(raw, tmp_path / "b.parquet")
    assert list(read_examples([tmp_path / "b.parquet"], parquet_column("text"))) == [b"\xff\x00", b""]


@pytest.mark.parametrize("as_file", [False, True])
def test_rows_of_a_saved_dataset_are_examples_in_the_order_of_its_files(tmp_path: Path, as_file: bool) -> None:
    folder = saved(tmp_path / "split", [list(TEXTS[:1_000]), list(TEXTS[1_000:])], as_file=as_file)
    assert list(dataset_column([folder], "text")) == [text.encode() for text in TEXTS]


def test_what_is_no_column_of_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table(["one", None]), path)
    for column, problem in (
        ("words", "expected one column 'words', found 'text, number'"),
        ("number", "expected text or bytes in column 'number', found int64"),
        ("text", "row 1: expected text or bytes in column 'text', found none"),
    ):
        with pytest.raises(ConfigError, match=problem):
            list(parquet_column(column)(path))
        with pytest.raises(ConfigError, match=problem):
            list(dataset_column([saved(tmp_path / f"split-{column}", [["one", None]])], column))
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ConfigError, match="expected a Parquet file"):
        list(parquet_column("text")(path))


def test_what_is_no_saved_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder that datasets saved"):
        list(dataset_column([tmp_path], "text"))
    folder = saved(tmp_path / "split", [["one"]])
    state = json.loads((folder / "state.json").read_text())
    for changes, problem in (
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "flatten_indices"),
        ({"_data_files": [{"filename": "../data.arrow"}]}, "expected names of files beside it"),
        ({"_data_files": []}, "expected names of files beside it"),
        ({"_data_files": [{"filename": "missing.arrow"}]}, "expected Arrow record batches"),
        ({"_data_files": 7}, "expected the state of a saved dataset"),
    ):
        (folder / "state.json").write_text(json.dumps({**state, **changes}))
        with pytest.raises(ConfigError, match=problem):
            list(dataset_column([folder], "text"))
    (folder / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match="several splits"):
        list(dataset_column([folder], "text"))


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_refused_by_name_or_read_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(table(["one", "two", "three"]), path)
    split = saved(folder / "split", [["one", "two", "three"]])
    (shard,) = split.glob("*.arrow")
    for damaged in (path, shard):
        content = bytearray(damaged.read_bytes())
        content[at % len(content)] ^= flip
        damaged.write_bytes(bytes(content))
    for examples in (parquet_column("text")(path), dataset_column([split], "text")):
        with suppress(ConfigError):
            assert all(isinstance(example, bytes) for example in examples)
