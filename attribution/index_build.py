"""Makes an index of a campaign's sketches from the run's files, and holds all of an index to the log.

**Whole or not there.** An index is built beside its place, synced, then renamed. What goes in was held to the log's
commitments first; what fails is left out and named. The same files give the same bytes, whoever builds it and whenever.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from attribution.index import (
    COLUMNS,
    FORMAT,
    NPY_HEADER_BYTES,
    VERSION,
    Index,
    IndexHeader,
    LeftOut,
    Segment,
    SketchedCampaign,
    committed_sketches,
    open_index,
    place_of,
)
from attribution.sketches import Piece, RunFolder, Sketches, open_sketches
from attribution.weights import WindowFile
from consensus.accumulators import WINDOWS, WindowEntry, window_path
from consensus.rejection import ConfigError, Reason, Rejected


def build_index(
    terms: SketchedCampaign, directory: Path, out: Path, progress: Callable[[str], None] = lambda stage: None
) -> Index:
    """Make the index of all sketches in a run's folder that the log commits to; in place of an older one.

    Files that are missing or not the committed ones are left out, and the index says so.

    Raises:
        ConfigError: ``out`` is there and no index.
        Rejected: ``NOT_FOUND`` when nothing of the run is here; as ``SketchBytes`` when a file changes meanwhile.
    """
    _may_replace(out)
    entries, left_out = committed_sketches(terms, directory)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / COLUMNS).mkdir(parents=True)
    (unfinished / WINDOWS).mkdir()
    try:
        writer = _Writer(unfinished, terms)
        for number, (file, entry) in enumerate(entries, 1):
            try:
                taken = open_sketches(RunFolder(), file, entry).check(file, entry, terms.shapes)
                _check_columns(taken, terms)
            except Rejected as error:
                window = file.window
                left_out.append(LeftOut(entry.source.hex(), entry.policy.hex(), window.first, window.last, str(error)))
            else:
                writer.take(file, entry, taken)
            progress(f"sketches: {number} of {len(entries)} files, {writer.size_bytes / 1e6:,.0f} MB")
        if not writer.segments:
            raise Rejected(Reason.NOT_FOUND, f"{directory} holds no sketches that the log commits to: {left_out[0]}")
        for root in {file.window.root for file, _ in entries}:
            shutil.copyfile(directory / window_path(root), unfinished / window_path(root))
        left_out.sort(key=lambda held: (held.source, held.first_step, held.policy))
        writer.finish(tuple(left_out))
        _put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return open_index(out, terms)


@dataclass(frozen=True, slots=True)
class IndexCheck:
    """What an index was found to be: how many segments are the committed ones, which are not, what it does not hold."""

    whole: int
    altered: tuple[str, ...]
    missing: tuple[LeftOut, ...]


def check_index(index: Index, progress: Callable[[str], None] = lambda stage: None) -> IndexCheck:
    """Hold all of an index to the log."""
    entries, missing = committed_sketches(index.terms, index.folder)
    altered: list[str] = []
    whole = 0
    for number, (file, entry) in enumerate(entries, 1):
        try:
            index.sketches(file, entry)
        except Rejected as error:
            missing.append(
                LeftOut(entry.source.hex(), entry.policy.hex(), file.window.first, file.window.last, str(error))
            )
            continue
        try:
            open_sketches(index, file, entry).check(file, entry, index.terms.shapes)
        except Rejected as error:
            altered.append(str(error))
        else:
            whole += 1
        progress(f"index: {number} of {len(entries)} segments")
    committed = {place_of(file, entry) for file, entry in entries}
    listed = {file.window.first for file, _ in entries}
    for segment in index.header.segments:
        if segment.first_step in listed and segment.place not in committed:
            altered.append(
                f"index {index.folder}: source {segment.source} has no sketches of steps {segment.first_step}"
            )
    return IndexCheck(whole, tuple(altered), tuple(missing))


@dataclass(slots=True)
class _Writer:
    """Columns that grow, segment by segment."""

    folder: Path
    terms: SketchedCampaign
    parameters: dict[str, int] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    lacking: list[frozenset[str]] = field(default_factory=list)
    size_bytes: int = 0

    def take(self, file: WindowFile, entry: WindowEntry, taken: Sketches) -> None:
        """The rows of a checked file."""
        for parameter in taken.parameters:
            self.parameters.setdefault(parameter, len(self.parameters))
        self._append("headers", [taken.prefix])
        for piece in taken.pieces:
            self._append(self._path_of(piece), (taken.read(piece, *part) for part in taken.parts_of(piece)))
        self.segments.append(
            Segment(
                entry.source.hex(),
                entry.policy.hex(),
                file.window.first,
                file.window.last,
                len(taken.examples),
                len(taken.visits),
                len(taken.prefix),
            )
        )
        self.lacking.append(frozenset(taken.parameters))

    def finish(self, left_out: tuple[LeftOut, ...]) -> None:
        """Headers, durable; the folder is whole then."""
        segments = [
            msgspec.structs.replace(
                segment, absent=tuple(number for name, number in self.parameters.items() if name not in having)
            )
            for segment, having in zip(self.segments, self.lacking, strict=True)
        ]
        header = IndexHeader(
            FORMAT,
            VERSION,
            self.terms.chain_id.hex(),
            self.terms.campaign.hex(),
            tuple(self.parameters),
            tuple(segments),
            left_out,
        )
        encoded = msgspec.json.format(msgspec.json.encode(header), indent=1)
        (self.folder / "index.json").write_bytes(encoded + b"\n")
        for column in Index(self.folder, header, self.terms).columns.values():
            with column.path.open("r+b") as file:
                file.write(column.header)
        for path in sorted(self.folder.rglob("*")):
            _sync(path)
        _sync(self.folder)

    def _path_of(self, piece: Piece) -> str:
        if not piece.parameter:
            return piece.label
        return f"{COLUMNS}/{self.parameters[piece.parameter]:04}.{piece.part}"

    def _append(self, name: str, parts: Iterable[bytes | bytearray]) -> None:
        path = self.folder / f"{name}.npy"
        begun = path.exists()
        with path.open("ab") as file:
            if not begun:
                file.write(bytes(NPY_HEADER_BYTES))
            for part in parts:
                self.size_bytes += file.write(part)


def _check_columns(taken: Sketches, terms: SketchedCampaign) -> None:
    """What fits no column is left out: weights that the campaign does not have, or another rank than its own."""
    for parameter, parts in taken.parameters.items():
        if parameter not in terms.shapes:
            raise Rejected(Reason.MALFORMED, f"sketches of {parameter!a:.100}, which is no weight of the campaign's")
        rank = parts["scale"].shape[1]
        if rank != terms.rank_of(parameter):
            raise Rejected(
                Reason.MALFORMED, f"sketches of {parameter!a:.100} of rank {rank}, expected {terms.rank_of(parameter)}"
            )


def _may_replace(out: Path) -> None:
    """A folder is replaced only if there is nothing in it but an index."""
    if out.is_symlink() or (out.exists() and not (out / "index.json").is_file()):
        raise ConfigError(f"{out}: expected no such folder, or an index to replace")
    known = {"index.json", WINDOWS, COLUMNS, "examples.npy", "visits.npy", "headers.npy"}
    strangers = sorted(path.name for path in out.iterdir() if path.name not in known) if out.exists() else []
    if strangers:
        raise ConfigError(f"{out}: expected nothing but an index to replace, found {strangers[0]!a:.100}")


def _put_in_place(unfinished: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    unfinished.rename(out)
    _sync(out.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
