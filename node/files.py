"""Files that must survive a crash or stay private.

A new or renamed file is durable only when its directory is synced too. A file that holds a secret is
created 0600 and refused when group or others can read it. One process holds a data directory at a time:
libp2p shares ports silently, so nothing else stops a second node from voting with the same keys. A file that others
hand in is read only if it is a regular one: a pipe or a device has no end.

What a command writes for its user is there whole or not at all, and takes no other file's place: a slip in ``--out``
must not cost a keystore, nor a full disk the signatures that others gave.
"""

import errno
import fcntl
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from consensus.rejection import ConfigError, Reason, Rejected

PRIVATE_MODE = 0o600
PUBLIC_MODE = 0o644
MAX_TOML_BYTES = 1 << 20
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a file system says that has no hard links."""


UNWRITABLE = {
    errno.EACCES: "make it writable and start again",
    errno.EROFS: "make it writable and start again",
    errno.ENOSPC: "free space there and start again",
    errno.EDQUOT: "free space there and start again",
}
"""What to do, by what the system says of a disk that did not take a write: nothing is damaged by it."""


class DirectoryLock:
    """An exclusive ``flock`` on a directory's ``lock`` file, until ``release`` or the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, directory: Path) -> "DirectoryLock":
        """Lock ``directory`` without waiting.

        Raises:
            ConfigError: another process holds it; names its process id. Or the disk takes no write.
        """
        path = directory / "lock"
        with _advising(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"{directory}: expected a data directory no process uses, found it locked by process {holder}"
            ) from error
        try:
            with _advising(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except (ConfigError, OSError):
            os.close(descriptor)
            raise
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


def make_durable_directory(directory: Path, mode: int = 0o777) -> None:
    """Make ``directory``, if it is not there, and its name in the folder above durable.

    Synced whether or not it was there: who made it before may have been killed in between.
    """
    directory.mkdir(mode=mode, exist_ok=True)
    sync_directory(directory.parent)


def write_fully(descriptor: int, content: bytes) -> None:
    """Write all of ``content``; ``os.write`` may take less."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_private(path: Path, content: bytes) -> None:
    """Replace ``path`` by a 0600 file with ``content``: after a crash the old or the new one, never both."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    _write_unfinished(temporary, content, PRIVATE_MODE)
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


def require_absent(path: Path) -> None:
    """Raises ``ConfigError`` if something has this name already: nothing is written over."""
    if os.path.lexists(path):
        raise ConfigError(
            f"{path}: expected no file yet, found one; nothing is overwritten: move it away, or give another name"
        )


def write_new(path: Path, content: bytes, mode: int = PUBLIC_MODE) -> None:
    """Make a file, whole or not at all, never in place of another.

    Raises:
        ConfigError: there is something of that name.
        OSError: it cannot be written; names ``path``, and nothing is left of it.
    """
    require_absent(path)
    temporary = _beside(path)
    with _naming(path):
        _write_unfinished(temporary, content, mode)
        try:
            _link_or_rename(temporary, path)
        except FileExistsError:
            require_absent(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def check_output(path: Path, made_of: Path | None = None) -> None:
    """Raises ``ConfigError`` if ``write_output`` would refuse: before long work, rather than after it."""
    if str(path) == "-":
        raise ConfigError("-: expected the name of a file; the standard output is /dev/stdout")
    if not _takes_bytes(path) and not _is_same(path, made_of):
        require_absent(path)


def write_output(path: Path, content: bytes, made_of: Path | None = None) -> None:
    """Write what a command was asked for, as ``write_new``; a pipe or a device takes it as it is.

    ``made_of`` is the file that the content adds to, whose name may be given again: it is replaced whole or not at all.

    Raises:
        ConfigError: another file is there.
        OSError: it cannot be written; names ``path``, and what was there before is as it was.
    """
    check_output(path, made_of)
    if _takes_bytes(path):
        with path.open("wb", buffering=0) as file, _naming(path):
            write_fully(file.fileno(), content)
    elif _is_same(path, made_of):
        target = path.resolve()
        temporary = _beside(target)
        with _naming(path):
            _write_unfinished(temporary, content, stat.S_IMODE(target.stat().st_mode))
            temporary.rename(target)
            sync_directory(target.parent)
    else:
        write_new(path, content)


def keep_private(path: Path, content: bytes) -> None:
    """A 0600 file with ``content``; one that is there and is the same is kept.

    Raises:
        ConfigError: another file is there.
        OSError: as ``write_new``.
    """
    if not (path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content):
        write_new(path, content, PRIVATE_MODE)


def require_folder(path: Path) -> None:
    """Raises ``ConfigError`` if what is there is no folder; there may be nothing."""
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"{path}: expected a folder, or nothing yet, found something else")


def _takes_bytes(path: Path) -> bool:
    """Whether it is a pipe, a device or a socket, such as /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_same(path: Path, made_of: Path | None) -> bool:
    return made_of is not None and path.exists() and made_of.exists() and path.samefile(made_of)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file that was asked for, not the unfinished one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _advising(path: Path) -> Iterator[None]:
    """Errors of a disk that takes no write name the file and say what to do; others name the file."""
    try:
        with _naming(path):
            yield
    except OSError as error:
        advice = UNWRITABLE.get(error.errno or 0)
        if advice is None:
            raise
        raise ConfigError(f"{path}: expected to write it, found: {error.strerror}: {advice}") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def _write_unfinished(temporary: Path, content: bytes, mode: int) -> None:
    """A new file with ``content``, on disk; nothing is left of one that could not be written."""
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        write_fully(descriptor, content)
        os.fsync(descriptor)
    except OSError:
        temporary.unlink()
        raise
    finally:
        os.close(descriptor)


def _link_or_rename(temporary: Path, path: Path) -> None:
    """Give a file its name unless it is taken. Memory sticks (FAT) know no links: there the name is taken first."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_MODE))
        temporary.rename(path)


def read_toml(path: Path, what: str) -> dict[str, object]:
    """The table of a TOML file; ``what`` names it in errors, as "a policy".

    Raises:
        ConfigError: it is missing, too large, or not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected {what} file, found: {error.strerror}") from error
    if len(content) > MAX_TOML_BYTES:
        raise ConfigError(f"{path}: expected {what} file, found more than {MAX_TOML_BYTES} bytes")
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: expected {what} in TOML, found: {error}") from error


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
