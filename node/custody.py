"""What a custodian keeps of campaigns: the lists and files of accumulator windows that the log commits to.

Rules, each with a named refusal:

* a window's list is taken if a step that stands on this node's log names its root (``NOT_FOUND``) and it is of the
  steps and campaign that it should be of (``DIGEST_MISMATCH``);
* room for all its files is set aside then, by the sizes it names, within ``maximum_bytes`` (``OVERSIZED``);
* a file is taken in parts, in order (``SEQUENCE_GAP``), never beyond its size (``OVERSIZED``), and kept only if whole
  it has its SHA-256 (``DIGEST_MISMATCH``; then nothing of it stays).

Files are named by digests that were compared, so no name a client sends reaches the disk. Below the directory:
``CAMPAIGN/windows/ROOT.window`` and ``CAMPAIGN/blobs/SHA256.safetensors``, the layout that a job leaves and a trace
reads, and a file that is not whole yet with ``.part`` behind its name. What is acknowledged is on disk.

Everything here blocks; ``api_custody.py`` calls it in one thread at a time. Left to others: reading the log
(``committed_windows``'s caller), who may ask (``auth.py``).
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from consensus.accumulators import WINDOWS, AccumulatorWindow, blob_path, decode_window, window_path
from consensus.bundle import open_bundle
from consensus.epochs import Anchor
from consensus.predicates import Predicate
from consensus.predicates.accumulators import provenance
from consensus.rejection import Reason, Rejected, Unavailable
from node.bundles import LogReader, export_bundle
from node.files import sync_directory, write_fully

PART_SUFFIX = ".part"
DIGEST_NAME = re.compile("[0-9a-f]{64}")
MAX_READ_BYTES = 4 << 20

log = logging.getLogger("countersign.custody")


@dataclass(frozen=True, slots=True)
class CommittedWindow:
    """The steps ``first`` to ``last`` of a campaign, whose accumulators have ``root``."""

    first: int
    last: int
    root: bytes


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A file that a window's list names, and how much of it is here; whole files are held to their SHA-256."""

    sha256: bytes
    size_bytes: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class HeldWindow:
    """A committed window: whether its list is here, and its files."""

    window: CommittedWindow
    is_listed: bool
    files: tuple[HeldFile, ...]

    @property
    def is_whole(self) -> bool:
        """Whether everything of it is here."""
        return self.is_listed and all(file.held_bytes == file.size_bytes for file in self.files)


CommittedWindows = Callable[[bytes], tuple[CommittedWindow, ...]]
"""A campaign's windows that stand. Raises ``Rejected`` (``UNKNOWN_CAMPAIGN``)."""


def committed_windows(trusted: Anchor, reader: LogReader, campaign: bytes) -> tuple[CommittedWindow, ...]:
    """The windows of a campaign that stand on a log.

    Raises:
        Rejected: ``UNKNOWN_CAMPAIGN``; as ``export_bundle``.
    """
    encoded = export_bundle(reader, Predicate.ACCUMULATORS.value, campaign=campaign)
    found = provenance(open_bundle(trusted, encoded))
    return tuple(CommittedWindow(window.first, window.last, window.root) for window in found.windows)


class CustodyDesk:
    """The files of one custodian.

    Args:
        directory: is made when something is first taken.
        maximum_bytes: of all files, also of those still to come of windows whose list is here.
    """

    def __init__(self, directory: Path, maximum_bytes: int) -> None:
        self._directory = directory
        self.maximum_bytes = maximum_bytes

    @property
    def set_aside_bytes(self) -> int:
        """What the windows whose list is here take, or will."""
        return sum(
            size_bytes for campaign in self._campaigns() for size_bytes in self._sizes(self._listed(campaign)).values()
        )

    def windows(self, campaign: bytes, committed: CommittedWindows) -> tuple[HeldWindow, ...]:
        """Every committed window of a campaign, and what of it is here.

        Raises:
            Rejected: ``UNKNOWN_CAMPAIGN``; ``NOT_FOUND`` where this node is no custodian.
        """
        self._require_custodian()
        found = []
        for window in committed(campaign):
            listed = self._list(campaign, window.root)
            sizes = {} if listed is None else self._sizes([listed])
            files = tuple(
                HeldFile(sha256, size_bytes, self._held_bytes(campaign, sha256, size_bytes))
                for sha256, size_bytes in sizes.items()
            )
            found.append(HeldWindow(window, listed is not None, files))
        return tuple(found)

    def take_list(self, campaign: bytes, root: bytes, content: bytes, committed: CommittedWindows) -> None:
        """A window's list; taken again it changes nothing.

        Raises:
            Rejected: ``NOT_FOUND``, ``UNKNOWN_CAMPAIGN``, ``DIGEST_MISMATCH``, ``OVERSIZED``, as ``decode_window``.
            Unavailable: the disk does not take it.
        """
        self._require_custodian()
        window = next((each for each in committed(campaign) if each.root == root), None)
        if window is None:
            raise Rejected(Reason.NOT_FOUND, f"no step that stands in campaign {campaign.hex()} names {root.hex()}")
        listed = decode_window(content, root)
        terms = listed.terms
        if (terms.campaign, terms.first_step, terms.last_step) != (campaign, window.first, window.last):
            raise Rejected(
                Reason.DIGEST_MISMATCH,
                f"the list is of steps {terms.first_step} to {terms.last_step} of campaign {terms.campaign.hex()}, "
                f"committed are {window.first} to {window.last} of {campaign.hex()}",
            )
        if self._list(campaign, root) is not None:
            return
        held = self._sizes(self._listed(campaign))
        needed_bytes = sum(size_bytes for sha256, size_bytes in self._sizes([listed]).items() if sha256 not in held)
        free_bytes = self.maximum_bytes - self.set_aside_bytes
        if needed_bytes > free_bytes:
            raise Rejected(
                Reason.OVERSIZED, f"the window's files need {needed_bytes} bytes, there is room for {free_bytes} here"
            )
        path = self._list_path(campaign, root)
        self._on_disk(lambda: self._write_whole(path, content))

    def take_part(self, campaign: bytes, sha256: bytes, offset: int, content: bytes) -> int:
        """The next part of a file; how many of its bytes are on disk then.

        Raises:
            Rejected: ``NOT_FOUND``: no list here names it; ``SEQUENCE_GAP``, ``OVERSIZED``, ``DIGEST_MISMATCH``.
            Unavailable: the disk does not take it.
        """
        self._require_custodian()
        size_bytes = self._size_of(campaign, sha256)
        held_bytes = self._held_bytes(campaign, sha256, size_bytes)
        if offset != held_bytes:
            raise Rejected(Reason.SEQUENCE_GAP, f"the part begins at {offset}, {held_bytes} bytes of the file are here")
        if held_bytes + len(content) > size_bytes:
            raise Rejected(Reason.OVERSIZED, f"the file has {size_bytes} bytes, the part ends behind them")
        if content:
            self._on_disk(lambda: self._append(self._part_path(campaign, sha256), content))
        if held_bytes + len(content) == size_bytes:
            self._finish(campaign, sha256)
        return held_bytes + len(content)

    def read_list(self, campaign: bytes, root: bytes) -> bytes:
        """A window's list.

        Raises:
            Rejected: ``NOT_FOUND``.
        """
        self._require_custodian()
        try:
            return self._list_path(campaign, root).read_bytes()
        except OSError:
            raise Rejected(Reason.NOT_FOUND, f"no window with root {root.hex()} is here") from None

    def read_part(self, campaign: bytes, sha256: bytes, offset: int, length: int) -> bytes:
        """At most ``length`` bytes of a whole file, from ``offset`` on; empty at its end.

        Raises:
            Rejected: ``NOT_FOUND``: it is not here whole.
        """
        self._require_custodian()
        try:
            with self._blob_path(campaign, sha256).open("rb") as file:
                file.seek(offset)
                return file.read(min(length, MAX_READ_BYTES))
        except OSError:
            raise Rejected(Reason.NOT_FOUND, f"no file with SHA-256 {sha256.hex()} is here whole") from None

    # Inside

    def _require_custodian(self) -> None:
        if not self.maximum_bytes:
            raise Rejected(Reason.NOT_FOUND, "this node is no custodian: custody.maximum_bytes is 0")

    def _campaigns(self) -> Iterator[bytes]:
        if self._directory.is_dir():
            for path in sorted(self._directory.iterdir()):
                if DIGEST_NAME.fullmatch(path.name):
                    yield bytes.fromhex(path.name)

    def _listed(self, campaign: bytes) -> Iterator[AccumulatorWindow]:
        """The lists of a campaign that are here."""
        for path in sorted((self._directory / campaign.hex() / WINDOWS).glob("*.window")):
            listed = self._list(campaign, bytes.fromhex(path.stem)) if DIGEST_NAME.fullmatch(path.stem) else None
            if listed is not None:
                yield listed

    def _list(self, campaign: bytes, root: bytes) -> AccumulatorWindow | None:
        """None where it is not here, or damaged: it can be handed in again."""
        path = self._list_path(campaign, root)
        try:
            return decode_window(path.read_bytes(), root)
        except FileNotFoundError:
            return None
        except Rejected as damaged:
            log.warning("%s: %s", path, damaged)
            return None

    def _size_of(self, campaign: bytes, sha256: bytes) -> int:
        size_bytes = self._sizes(self._listed(campaign)).get(sha256)
        if size_bytes is None:
            raise Rejected(Reason.NOT_FOUND, f"no list of campaign {campaign.hex()} here names {sha256.hex()}")
        return size_bytes

    @staticmethod
    def _sizes(windows: Iterator[AccumulatorWindow] | list[AccumulatorWindow]) -> Mapping[bytes, int]:
        """Sizes by SHA-256 of all files that lists name, each once; where they contradict each other the larger."""
        sizes: dict[bytes, int] = {}
        for window in windows:
            for entry in window.entries:
                sizes[entry.blob_sha256] = max(entry.size_bytes, sizes.get(entry.blob_sha256, 0))
                if entry.sketches_sha256:
                    sizes[entry.sketches_sha256] = max(entry.sketches_bytes, sizes.get(entry.sketches_sha256, 0))
        return sizes

    def _held_bytes(self, campaign: bytes, sha256: bytes, size_bytes: int) -> int:
        if self._blob_path(campaign, sha256).is_file():
            return size_bytes
        try:
            return self._part_path(campaign, sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def _finish(self, campaign: bytes, sha256: bytes) -> None:
        """A file that is whole gets its name, or is thrown away."""
        part, path = self._part_path(campaign, sha256), self._blob_path(campaign, sha256)
        if path.is_file():
            return
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").digest()
        if found != sha256:
            part.unlink()
            raise Rejected(Reason.DIGEST_MISMATCH, f"the file has SHA-256 {found.hex()}, expected {sha256.hex()}")
        self._on_disk(lambda: self._rename(part, path))

    def _list_path(self, campaign: bytes, root: bytes) -> Path:
        return self._directory / campaign.hex() / window_path(root)

    def _blob_path(self, campaign: bytes, sha256: bytes) -> Path:
        return self._directory / campaign.hex() / blob_path(sha256)

    def _part_path(self, campaign: bytes, sha256: bytes) -> Path:
        path = self._blob_path(campaign, sha256)
        return path.with_name(path.name + PART_SUFFIX)

    @staticmethod
    def _on_disk(write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise Unavailable(f"custody: the disk does not take it: {error.strerror}") from error

    @staticmethod
    def _write_whole(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + PART_SUFFIX)
        unfinished.unlink(missing_ok=True)
        CustodyDesk._append(unfinished, content)
        CustodyDesk._rename(unfinished, path)

    @staticmethod
    def _append(path: Path, content: bytes) -> None:
        """Add to a file what is then on disk, or, where the disk does not take it, nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            before_bytes = os.fstat(descriptor).st_size
            try:
                write_fully(descriptor, content)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before_bytes)
                raise
        finally:
            os.close(descriptor)
        if not before_bytes:
            sync_directory(path.parent)

    @staticmethod
    def _rename(unfinished: Path, path: Path) -> None:
        unfinished.replace(path)
        sync_directory(path.parent)
        sync_directory(path.parent.parent)
        sync_directory(path.parent.parent.parent)
