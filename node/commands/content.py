"""A source's examples, and the salted root over them that its claim names.

Every example is a leaf ``content_leaf(salt, example)`` with a salt of its own, derived from one 32-byte secret of
the source. So the owner can later show one example under the content root and nothing of any other, and nobody
can guess a short example from its digest. The secret is kept in a 0600 file; without it nothing can be shown.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from consensus.identifiers import Digest
from consensus.merkle import Frontier
from consensus.portions import content_leaf, content_salt
from consensus.rejection import ConfigError
from node.files import PRIVATE_MODE, read_private, write_new

SALT_BYTES = 32
_LEAVES_AT_ONCE = 4_096

Splitter = Callable[[Path], Iterator[bytes]]
"""The examples in one file."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a claim says of its examples."""

    root: Digest
    example_count: int
    size_bytes: int


def measure(examples: Iterable[bytes], source_salt: bytes) -> Content:
    """Root, number and size of examples, in their order; they are read once and not kept.

    Raises:
        ConfigError: there is none.
    """
    frontier, waiting = Frontier(), list[Digest]()
    count = size_bytes = 0
    for example in examples:
        waiting.append(content_leaf(content_salt(source_salt, count), example))
        count += 1
        size_bytes += len(example)
        if len(waiting) == _LEAVES_AT_ONCE:
            frontier, waiting = frontier.append(waiting), []
    if not count:
        raise ConfigError("content: expected at least one example, found none")
    return Content(frontier.append(waiting).root, count, size_bytes)


def read_examples(paths: Iterable[Path], split: Splitter) -> Iterator[bytes]:
    """The examples of files and of all files in directories, directories in order of path.

    Raises:
        ConfigError: a path is missing or holds no file.
    """
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"{path}: expected files, found an empty directory")
        for file in files:
            try:
                yield from split(file)
            except OSError as error:
                raise ConfigError(f"{file}: expected a readable file, found: {error.strerror}") from error


def whole_files(path: Path) -> Iterator[bytes]:
    """The file is one example."""
    yield path.read_bytes()


def lines(path: Path) -> Iterator[bytes]:
    """Each line that is not empty, without its line break."""
    with path.open("rb") as file:
        for line in file:
            stripped = line.rstrip(b"\r\n")
            if stripped:
                yield stripped


def pieces_of(example_bytes: int) -> Splitter:
    """Pieces of ``example_bytes``; a file's last one may be shorter."""

    def split(path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while piece := file.read(example_bytes):
                yield piece

    return split


def json_field(field: str) -> Splitter:
    """The text under ``field`` of each line, each a JSON object."""

    def split(path: Path) -> Iterator[bytes]:
        for number, line in enumerate(lines(path), start=1):
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ConfigError(f"{path}, record {number}: expected a JSON object with {field}") from error
            if not isinstance(text, str):
                raise ConfigError(f"{path}, record {number}: expected text in {field}, found {type(text).__name__}")
            yield text.encode()

    return split


def source_salt(path: Path) -> bytes:
    """The source's secret from its file, which is made on first use and never replaced.

    Raises:
        ConfigError: readable by others, or not 32 bytes in hexadecimal.
    """
    if not path.exists():
        salt = os.urandom(SALT_BYTES)
        write_new(path, salt.hex().encode() + b"\n", PRIVATE_MODE)
        return salt
    text = read_private(path, "salt file").decode("ascii", errors="replace").strip()
    try:
        salt = bytes.fromhex(text)
    except ValueError as error:
        raise ConfigError(f"{path}: expected {SALT_BYTES} bytes in hexadecimal, found something else") from error
    if len(salt) != SALT_BYTES:
        raise ConfigError(f"{path}: expected {SALT_BYTES} bytes in hexadecimal, found {len(salt)}")
    return salt
