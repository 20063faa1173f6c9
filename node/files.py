"""Files that must survive a crash or stay private.

A new or renamed file is durable only when its directory is synced too. A file that holds a secret is
created 0600 and refused when group or others can read it. One process holds a data directory at a time:
libp2p shares ports silently, so nothing else stops a second node from voting with the same keys. A file that others
hand in is read only if it is a regular one: a pipe or a device has no end.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from consensus.rejection import ConfigError, Reason, Rejected

PRIVATE_MODE = 0o600


class DirectoryLock:
    """An exclusive ``flock`` on a directory's ``lock`` file, until ``release`` or the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, directory: Path) -> "DirectoryLock":
        """Lock ``directory`` without waiting.

        Raises:
            ConfigError: another process holds it; names its process id.
        """
        path = directory / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"{directory}: expected a data directory no process uses, found it locked by process {holder}"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        """Give the directory back. The file stays: removing it would let two processes lock two files."""
        os.close(self._descriptor)


def sync_directory(directory: Path) -> None:
    """Make creations and renames in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, content: bytes) -> None:
    """Write all of ``content``; ``os.write`` may take less."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_private(path: Path, content: bytes) -> None:
    """Replace ``path`` by a 0600 file with ``content``: after a crash the old or the new one, never both."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_MODE)
    try:
        write_fully(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(path)
    sync_directory(path.parent)


@contextmanager
def open_regular(path: Path, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, opened, and its size in bytes.

    Raises:
        Rejected: ``NOT_FOUND`` when it cannot be opened or read, or is a pipe, a device, a folder;
            ``OVERSIZED`` above ``max_bytes``.
    """
    try:
        # Without O_NONBLOCK, opening a pipe nobody writes to would never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected(Reason.NOT_FOUND, f"{path} cannot be read: not a regular file")
            if status.st_size > max_bytes:
                raise Rejected(Reason.OVERSIZED, f"{path} has {status.st_size} bytes, at most {max_bytes} allowed")
            yield file, status.st_size
    except OSError as error:
        raise Rejected(Reason.NOT_FOUND, f"{path} cannot be read: {error.strerror}") from error


def write_new(path: Path, content: bytes) -> None:
    """Make a file that anybody may read, whole or not at all, never in place of another.

    Raises:
        FileExistsError: there is one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_fully(descriptor, content)
        os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink()
    sync_directory(path.parent)


def read_private(path: Path, what: str) -> bytes:
    """The bytes of a file that holds a secret.

    Raises:
        ConfigError: it is missing, or group or others can read it; the message has the command that fixes it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"{path}: expected a {what} only its owner can read, found mode {mode:04o}; "
                    f"fix it with: chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable {what}, found: {error.strerror}") from error
