"""Files that commands write: whole or not at all, never in place of another, and named where they cannot be."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from consensus.rejection import ConfigError
from node.files import (
    MAX_TOML_BYTES,
    PRIVATE_MODE,
    DirectoryLock,
    check_output,
    keep_private,
    read_toml,
    require_folder,
    write_new,
    write_output,
)

OVER_THE_LIMIT = """
import resource, sys
from pathlib import Path
from node.files import {function}
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = Path(sys.argv[1])
try:
    {function}(path, bytes(8192){more})
except OSError as error:
    print(error.filename, error.strerror, sep=": ")
"""


def written_over_the_limit(function: str, path: Path, more: str = "") -> str:
    """What a process says that may not write so large a file: a full disk, for everybody to try."""
    code = OVER_THE_LIMIT.format(function=function, more=more)
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True, cwd=root
    ).stdout.strip()


@pytest.mark.parametrize("write", [write_new, write_output])
def test_nothing_is_written_over(tmp_path: Path, write: object) -> None:
    assert callable(write)
    file, folder, dangling = tmp_path / "keystore.json", tmp_path / "folder", tmp_path / "dangling"
    file.write_bytes(b"an identity")
    folder.mkdir()
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (file, folder, dangling):
        with pytest.raises(ConfigError, match="nothing is overwritten"):
            write(path, b"an event")
    assert file.read_bytes() == b"an identity"
    assert sorted(held.name for held in tmp_path.iterdir()) == ["dangling", "folder", "keystore.json"]


def test_an_output_may_take_the_name_of_the_file_it_adds_to_and_no_other(tmp_path: Path) -> None:
    event, link, other = tmp_path / "change.event", tmp_path / "link", tmp_path / "other"
    event.write_bytes(b"one signature")
    event.chmod(0o640)
    other.write_bytes(b"other")
    link.symlink_to(event)
    write_output(link, b"two signatures", event)
    assert event.read_bytes() == b"two signatures"
    assert (link.is_symlink(), stat.S_IMODE(event.stat().st_mode)) == (True, 0o640)
    for made_of in (event, None, tmp_path / "none"):
        with pytest.raises(ConfigError, match="nothing is overwritten"):
            check_output(other, made_of)
        with pytest.raises(ConfigError, match="nothing is overwritten"):
            write_output(other, b"two signatures", made_of)
    for write in (check_output, lambda path: write_output(path, b"an event")):
        with pytest.raises(ConfigError, match="the standard output is /dev/stdout"):
            write(Path("-"))
    check_output(link, event)
    check_output(tmp_path / "new")
    assert other.read_bytes() == b"other"


def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(tmp_path: Path) -> None:
    event = tmp_path / "change.event"
    event.write_bytes(b"signatures of others")
    too_large = os.strerror(errno.EFBIG)
    assert written_over_the_limit("write_output", event, ", path") == f"{event}: {too_large}"
    assert event.read_bytes() == b"signatures of others"
    for function in ("write_output", "write_new"):
        assert written_over_the_limit(function, tmp_path / "new") == f"{tmp_path / 'new'}: {too_large}"
    assert written_over_the_limit("replace_private", event).endswith(too_large)
    assert event.read_bytes() == b"signatures of others"
    assert list(tmp_path.iterdir()) == [event]


def test_a_folder_that_is_not_there_is_told_by_the_name_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "none" / "claim.event"
    with pytest.raises(FileNotFoundError) as caught:
        write_output(path, b"an event")
    assert caught.value.filename == str(path)


def test_a_pipe_takes_an_output_as_it_is() -> None:
    reading, writing = os.pipe()
    try:
        path = Path(f"/dev/fd/{writing}")
        check_output(path)
        write_output(path, b"a bundle")
        assert os.read(reading, 100) == b"a bundle"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_memory_stick_without_links_takes_new_files_and_keeps_those_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "join-library.ceremony"
    write_new(path, b"a message")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        write_new(path, b"another")
    assert path.read_bytes() == b"a message"
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file_is_kept_where_it_is_the_same_and_never_replaced_by_another(tmp_path: Path) -> None:
    path = tmp_path / "sonnets.overlap"
    for _ in range(2):
        keep_private(path, b"an index")
        assert stat.S_IMODE(path.stat().st_mode) == PRIVATE_MODE
    for other in (b"another.", b"longer than it was"):
        with pytest.raises(ConfigError, match="nothing is overwritten"):
            keep_private(path, other)
    assert path.read_bytes() == b"an index"


def test_what_is_no_table_or_has_no_end_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    for content in (b"name = ", b"\xff", b"a = " + b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"policy\.toml: expected a policy in TOML"):
            read_toml(path, "a policy")
    for endless in (Path("/dev/zero"), path):
        path.write_bytes(b"#" * (MAX_TOML_BYTES + 1))
        with pytest.raises(ConfigError, match="found more than"):
            read_toml(endless, "a policy")
    with pytest.raises(ConfigError, match="expected a policy file, found: No such file"):
        read_toml(tmp_path / "none", "a policy")
    with pytest.raises(ConfigError, match="expected a folder"):
        require_folder(path)
    require_folder(tmp_path)
    require_folder(tmp_path / "none")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "lock: expected to write it, found: Read-only file system: make it writable and start again"),
        (errno.ENOSPC, "lock: expected to write it, found: No space left on device: free space there and start again"),
    ],
)
def test_lock_on_a_disk_that_takes_no_write_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=message):
        DirectoryLock.acquire(tmp_path)


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_lock_that_a_full_disk_does_not_take_is_named_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, call, refuse)
        expected = f"{tmp_path}/lock: expected to write it, found: No space left on device: free space there and start"
        with pytest.raises(ConfigError, match=expected):
            DirectoryLock.acquire(tmp_path)
    DirectoryLock.acquire(tmp_path).release()


def test_lock_that_fails_otherwise_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="Input/output error") as failed:
        DirectoryLock.acquire(tmp_path)
    assert failed.value.filename == str(tmp_path / "lock")
