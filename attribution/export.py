"""An index as one table for other tools: Parquet, or Arrow's file format, by the suffix of the file.

A row for each window, policy, source and example; every column says in its metadata what it holds, and the file's
metadata of which chain and campaign it is, and what it lacks. Rows are held to the log before they are written.

Needs pyarrow, the extra ``export``.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from attribution.index import Index, LeftOut, committed_sketches
from attribution.sketches import Piece, Sketches, numbers_of, open_sketches
from attribution.weights import WindowFile
from consensus.accumulators import WindowEntry
from consensus.rejection import ConfigError, Reason, Rejected

SUFFIXES = (".parquet", ".arrow")
REPEATING = ["first_step", "last_step", "policy", "source", "source_name"]
"""Columns worth a dictionary: the factors are not."""
NOTE = (
    "one row for each window of steps, policy, source and example: the example's part of what the source added to the "
    "gradients, times learning rate; of a parameter, sum over r of scale[r] * outer(left[r], right[r])"
)


def export_index(
    index: Index, source_names: Mapping[bytes, str], out: Path, progress: Callable[[str], None] = lambda stage: None
) -> tuple[int, tuple[LeftOut, ...]]:
    """Write the table; how many rows it has, and what of the campaign is not in it.

    Raises:
        ConfigError: a suffix that is none of ours.
        Rejected: ``NOT_FOUND`` for an index with nothing of what the log commits to; as ``open_sketches``.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out}: expected a file called …{' or …'.join(SUFFIXES)}")
    entries, left_out = committed_sketches(index.terms, index.folder)
    held: list[tuple[WindowFile, WindowEntry]] = []
    for file, entry in entries:
        try:
            index.sketches(file, entry)
        except Rejected as error:
            whose = (entry.source.hex(), entry.policy.hex(), file.window.first, file.window.last)
            left_out.append(LeftOut(*whose, str(error)))
        else:
            held.append((file, entry))
    if not held:
        raise Rejected(Reason.NOT_FOUND, f"index {index.folder} holds nothing that the log commits to")
    schema = _schema(index, left_out)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    rows = 0
    try:
        with unfinished.open("wb") as sink, _writer(sink, schema, out.suffix) as writer:
            for number, (file, entry) in enumerate(held, 1):
                sketches = open_sketches(index, file, entry).check(file, entry, index.terms.shapes)
                name = source_names.get(entry.source, "")
                for batch in _batches(schema, index, file, entry, name, sketches):
                    writer.write_batch(batch)
                rows += len(sketches.examples)
                progress(f"export: {number} of {len(held)} segments, {rows} rows")
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return rows, tuple(left_out)


def _writer(sink: Any, schema: Any, suffix: str) -> Any:
    if suffix == ".arrow":
        return pa.ipc.new_file(sink, schema)
    return pq.ParquetWriter(sink, schema, use_dictionary=REPEATING, write_statistics=REPEATING)


def _schema(index: Index, left_out: list[LeftOut]) -> Any:
    terms = index.terms
    fields = [
        _field("first_step", pa.int64(), "first step of the window"),
        _field("last_step", pa.int64(), "last step of the window"),
        _field("policy", pa.binary(32), "event id of the policy"),
        _field("source", pa.binary(32), "event id of the source's claim"),
        _field("source_name", pa.string(), "the source's name, as its claim has it"),
        _field("example", pa.int64(), "index of the example in its source"),
        _field("steps", pa.list_(pa.int64()), "steps in which it was admitted"),
        _field("norm", pa.float32(), "Frobenius norm of its part, over all parameters here"),
    ]
    for parameter in index.header.parameters:
        shape, rank = terms.shapes[parameter], terms.rank_of(parameter)
        for part, size in zip(("left", "right"), shape, strict=True):
            width = (size + 1) // 2
            what = (
                f"{part} factors of {parameter} {list(shape)}: {rank} rows of {size} numbers from -7 to 7, each "
                "plus 8, two to a byte, the lower half first; null where the parameter was closed"
            )
            fields.append(_field(f"{parameter}/{part}", pa.binary(rank * width), what))
        fields.append(
            _field(f"{parameter}/scale", pa.list_(pa.float32(), rank), f"scale of each of the {rank} columns")
        )
    lacking = [str(held) for held in left_out]
    return pa.schema(
        fields,
        metadata={
            "countersign": "sketches",
            "description": NOTE,
            "chain_id": terms.chain_id.hex(),
            "campaign": terms.campaign.hex(),
            "sketch_rank": str(terms.rank),
            "left_out": json.dumps(lacking),
        },
    )


def _field(name: str, kind: Any, description: str) -> Any:
    return pa.field(name, kind, metadata={"description": description})


def _batches(
    schema: Any, index: Index, file: WindowFile, entry: WindowEntry, name: str, sketches: Sketches
) -> Iterator[Any]:
    visits_M2 = sketches.visits.numpy()
    order = np.argsort(visits_M2[:, 1], kind="stable")
    steps_M, of_M = visits_M2[order, 0], visits_M2[order, 1]
    any_piece = next(iter(sketches.parameters.values()))["scale"]
    for first, rows in sketches.parts_of(any_piece):
        examples_N = sketches.examples.numpy()[first : first + rows]
        bounds = np.searchsorted(of_M, np.append(examples_N, examples_N[-1] + 1)).astype(np.int32)
        visited = pa.array(steps_M[bounds[0] : bounds[-1]])
        columns = [
            pa.array(np.full(rows, file.window.first)),
            pa.array(np.full(rows, file.window.last)),
            _repeated(entry.policy, rows),
            _repeated(entry.source, rows),
            pa.array([name] * rows, pa.string()),
            pa.array(examples_N),
            pa.ListArray.from_arrays(pa.array(bounds - bounds[0]), visited),
        ]
        square_N = torch.zeros(rows, dtype=torch.float64)
        factors = []
        for parameter in index.header.parameters:
            parts = sketches.parameters.get(parameter)
            kinds = [schema.field(f"{parameter}/{part}").type for part in ("left", "right", "scale")]
            if parts is None:
                factors += [pa.nulls(rows, kind) for kind in kinds]
                continue
            square_N += _squares(sketches, parts, index.terms.shapes[parameter], first, rows)
            for kind, part in zip(kinds[:2], ("left", "right"), strict=True):
                content = pa.py_buffer(sketches.read(parts[part], first, rows))
                factors.append(pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, content]))
            scale = pa.array(sketches.tensor(parts["scale"], first, rows).flatten().numpy())
            factors.append(pa.FixedSizeListArray.from_arrays(scale, type=kinds[2]))
        norms = pa.array(square_N.clamp(min=0).sqrt().float().numpy())
        yield pa.RecordBatch.from_arrays([*columns, norms, *factors], schema=schema)


def _squares(sketches: Sketches, parts: Mapping[str, Piece], shape: tuple[int, ...], first: int, rows: int) -> Tensor:
    """Squared Frobenius norm ``[N]`` of ``Σ_r scale_r left_r right_rᵀ``, from the products of columns."""
    scale_Nr = sketches.tensor(parts["scale"], first, rows)
    products_Nrr = scale_Nr[:, :, None] * scale_Nr[:, None, :]
    for part, size in zip(("left", "right"), shape, strict=True):
        numbers = numbers_of(sketches.tensor(parts[part], first, rows))
        if size % 2:
            numbers[:, :, -1] = 0.0
        products_Nrr = products_Nrr * (numbers @ numbers.transpose(1, 2))
    return products_Nrr.sum(dim=(1, 2)).double()


def _repeated(value: bytes, rows: int) -> Any:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(value * rows)])
