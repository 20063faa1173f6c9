"""Examples from a column of a Parquet file, or of a folder that ``datasets`` saved (``Dataset.save_to_disk``).

Each row is an example, in order: text as UTF-8, bytes as they are. Both are read a batch of rows at a time by pyarrow
(extra ``export``); ``datasets`` itself is not needed.

A saved dataset is one split: ``state.json`` names its Arrow files in their order. One whose rows are picked or
shuffled by an index beside them is refused, since its order is not that of the files.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from consensus.rejection import ConfigError
from node.commands.content import Splitter

ROWS_AT_ONCE = 1_024
ARROW_FILE_MAGIC = b"ARROW1"
DAMAGED = (OSError, ValueError, MemoryError)
"""What pyarrow raises beside its own errors where a file is damaged: lengths in it may be anything."""


def parquet_column(column: str) -> Splitter:
    """The rows of a Parquet file's column.

    Raises (the splitter):
        ConfigError: no Parquet file, no such column, or another kind of column.
    """

    def split(path: Path) -> Iterator[bytes]:
        import pyarrow  # noqa: PLC0415 (an extra that only these options need)
        import pyarrow.parquet  # noqa: PLC0415

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _check_column(path, column, file.schema_arrow)
                yield from _rows(path, column, file.iter_batches(ROWS_AT_ONCE, columns=[column]))
        except (pyarrow.ArrowException, *DAMAGED) as error:
            raise ConfigError(f"{path}: expected a Parquet file, found: {_in_a_line(error)}") from error

    return split


def dataset_column(paths: Iterable[Path], column: str) -> Iterator[bytes]:
    """The rows of a column of folders that ``datasets`` saved.

    Raises:
        ConfigError: a folder is none, holds several splits or an index of rows, or as ``parquet_column``.
    """
    import pyarrow  # noqa: PLC0415
    import pyarrow.ipc  # noqa: PLC0415

    for folder in paths:
        for path in _shards(folder):
            try:
                with path.open("rb") as file:
                    is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
                    file.seek(0)
                    if is_file:
                        opened = pyarrow.ipc.open_file(file)
                        batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
                    else:
                        batches = opened = pyarrow.ipc.open_stream(file)
                    _check_column(path, column, opened.schema)
                    yield from _rows(path, column, batches)
            except (pyarrow.ArrowException, *DAMAGED) as error:
                raise ConfigError(f"{path}: expected Arrow record batches, found: {_in_a_line(error)}") from error


def _shards(folder: Path) -> list[Path]:
    """The Arrow files of a saved split, in order."""
    if (folder / "dataset_dict.json").is_file():
        raise ConfigError(f"{folder}: it holds several splits; give the folder of one, as {folder / 'train'}")
    state_path = folder / "state.json"
    try:
        state = json.loads(state_path.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        indexed = state.get("_indices_data_files")
    except OSError as error:
        raise ConfigError(f"{state_path}: expected a folder that datasets saved, found: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{state_path}: expected the state of a saved dataset, found {error!r:.200}") from error
    if indexed:
        raise ConfigError(f"{folder}: its rows are picked by an index: save it after flatten_indices()")
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ConfigError(f"{state_path}: expected names of files beside it, found {names!r:.200}")
    return [folder / name for name in names]


def _check_column(path: Path, column: str, schema: Any) -> None:
    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        raise ConfigError(f"{path}: expected one column {column!r}, found {', '.join(schema.names)!a}")
    kind = str(schema.field(found[0]).type)
    if kind not in ("string", "large_string", "binary", "large_binary"):
        raise ConfigError(f"{path}: expected text or bytes in column {column!r}, found {kind}")


def _rows(path: Path, column: str, batches: Iterable[Any]) -> Iterator[bytes]:
    done = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file point anywhere: reading them unchecked ends the process
        for value in batch.column(column).cast("large_binary").to_pylist():
            if value is None:
                raise ConfigError(f"{path}, row {done}: expected text or bytes in column {column!r}, found none")
            yield value
            done += 1


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
