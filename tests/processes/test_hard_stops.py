"""Node processes stopped the hard way: a signal under load, a kill in mid catch-up, a disk that is full."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from process_fixtures import COUNTERSIGN, Processes, processes, source

pytestmark = pytest.mark.processes

NAMES = ("library", "press", "council", "laboratory", "guild")
DISK_BYTES = 64 << 20
"""Room for the write-ahead logs that RocksDB allocates beforehand, also while two are open."""


def flood(consortium: Processes, owner: str, first: int, count: int) -> list[str]:
    """Submit sources in batches; the ids that were accepted."""
    accepted = []
    for start in range(first, first + count, 50):
        events = [source(consortium, owner, number) for number in range(start, start + 50)]
        body = b"".join(len(event).to_bytes(4, "big") + event for event in events)
        url = consortium.provisioned.members[owner].api_url + "/v1/events/batch"
        try:
            answer = consortium.client.post(url, content=body)
        except httpx.TransportError:
            break
        if answer.status_code != 200:
            break
        accepted += [one["id"] for one in answer.json()["results"] if one["status"] in ("pending", "final")]
    return accepted


def test_sigterm_under_load_ends_a_node_at_once_and_without_a_traceback(tmp_path: Path) -> None:
    with processes(tmp_path / "consortium", *NAMES) as consortium:
        loading = threading.Thread(target=flood, args=(consortium, "library", 0, 600))
        loading.start()
        time.sleep(0.5)
        for name in ("press", "guild", "library"):
            process = consortium.running.pop(name)
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(timeout=20) == 0, consortium.log(name)
            assert "Traceback" not in consortium.log(name)
        loading.join()
        final = consortium.events_on_log("council")
        consortium.start("press", "guild", "library")
        event = consortium.post("library", source(consortium, "library", 10_000)).json()["id"]
        found = consortium.get("library", f"/v1/events/{event}?wait=30")
        assert found is not None
        assert found["status"] == "final", consortium.log("library")
        consortium.assert_whole([*final, event])


def test_kill_in_the_middle_of_catching_up_costs_nothing(tmp_path: Path) -> None:
    with processes(tmp_path / "consortium", *NAMES[:4]) as consortium:
        accepted = flood(consortium, "library", 0, 1_500)
        assert len(accepted) == 1_500
        Processes.wait_until(lambda: consortium.status("library")["log_size"] == 1_500)
        seen = []
        for _ in range(4):
            consortium.start("guild")
            seen.append(int(str(consortium.status("guild")["log_size"])))
            consortium.kill("guild")
        consortium.start("guild")
        Processes.wait_until(lambda: consortium.status("guild")["log_size"] == 1_500)
        assert seen == sorted(seen)
        consortium.assert_whole(accepted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of ``DISK_BYTES``; skipped where mounting one is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", at=disk):
        yield disk


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[None]:
    """A file system at a folder; the test is skipped where mounting one is not permitted."""
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mount {' '.join(arguments)} is not permitted: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


def move_data(consortium: Processes, name: str, disk: Path) -> None:
    """Put a node's data directory on another file system; the node is stopped and not started again."""
    consortium.kill(name, signal.SIGTERM)
    home = consortium.provisioned.members[name].directory / "data"
    assert home.is_dir(), list(home.parent.iterdir())
    shutil.move(home, disk / "data")
    home.symlink_to(disk / "data")


VERIFIER, VOTER = "guild", "press"
"""Without this voter its role has no quorum: what it fails to vote for must become final once it is back."""


@pytest.mark.parametrize("name", [VERIFIER, VOTER])
def test_full_disk_stops_a_node_by_name_and_loses_nothing_acknowledged(
    tmp_path: Path, small_disk: Path, name: str
) -> None:
    with processes(tmp_path / "consortium", *NAMES) as consortium:
        move_data(consortium, name, small_disk)
        consortium.start(name)
        first = flood(consortium, "library", 0, 200)
        Processes.wait_until(lambda: consortium.status(name)["log_size"] == len(first))
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as full, contextlib.suppress(OSError):
            while True:
                full.write(bytes(64 << 10))
        second = flood(consortium, "library", 1_000, 1_000)
        process = consortium.running[name]
        assert process.wait(timeout=60) == 1, consortium.log(name)
        consortium.running.pop(name)
        log = consortium.log(name)
        assert "invariant-broken" in log
        assert "No space left on device" in log
        filler.unlink()
        consortium.start(name)
        if name == VOTER:
            Processes.wait_until(lambda: bool(consortium.status(name)["voting"]))
        consortium.assert_whole(first + second)


def test_read_only_disk_refuses_to_start_by_name_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    with processes(tmp_path / "consortium", *NAMES[:4]) as consortium:
        events = flood(consortium, "library", 0, 100)
        Processes.wait_until(lambda: consortium.status(VOTER)["log_size"] == len(events))
        move_data(consortium, VOTER, small_disk)
        waiting = flood(consortium, "library", 1_000, 50)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        config = str(consortium.provisioned.members[VOTER].config)
        refused = subprocess.run(
            [COUNTERSIGN, "node", "run", "--config", config], capture_output=True, text=True, timeout=60, check=False
        )
        assert refused.returncode == 2, refused.stderr
        assert "Read-only file system" in refused.stderr
        assert "Traceback" not in refused.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        consortium.start(VOTER)
        consortium.assert_whole(events + waiting)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system that becomes read-only at its first error; skipped where mounting one is not permitted."""
    image, disk = tmp_path / "disk.image", tmp_path / "failing"
    disk.mkdir()
    with image.open("wb") as empty:
        empty.truncate(2 * DISK_BYTES)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted("-o", "loop,errors=remount-ro", str(image), at=disk):
        yield disk


def fail_disk(disk: Path) -> None:
    """Have the kernel meet an error on a loop device's file system, which it then writes to no more."""
    found = subprocess.run(
        ["findmnt", "--noheadings", "--output", "SOURCE", str(disk)], capture_output=True, text=True, check=True
    )
    device = Path(found.stdout.strip()).name
    assert device.startswith("loop")
    trigger = Path("/sys/fs/ext4") / device / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip(f"this kernel has no {trigger}")
    trigger.write_text("a test's\n")


REFUSED_WRITES = (os.strerror(errno.EROFS), os.strerror(errno.EIO))
"""What ext4 answers after an error: read-only to a new write, an aborted journal to one that was under way."""


def test_disk_that_becomes_read_only_stops_a_node_by_name_and_loses_nothing(tmp_path: Path, failing_disk: Path) -> None:
    with processes(tmp_path / "consortium", *NAMES[:4]) as consortium:
        move_data(consortium, VOTER, failing_disk)
        subprocess.run(["sync", "--file-system", str(failing_disk)], check=True)  # the copy, which nobody had synced
        consortium.start(VOTER)
        first = flood(consortium, "library", 0, 50)
        Processes.wait_until(lambda: consortium.status(VOTER)["log_size"] == len(first))
        fail_disk(failing_disk)
        second = flood(consortium, "library", 1_000, 50)
        assert consortium.running[VOTER].wait(timeout=60) == 1, consortium.log(VOTER)
        consortium.running.pop(VOTER)
        log = consortium.log(VOTER)
        assert "invariant-broken" in log
        assert any(name in log for name in REFUSED_WRITES), log
        assert consortium.status("library")["log_size"] == len(first)

        image = tmp_path / "disk.image"
        subprocess.run(["umount", str(failing_disk)], check=True)
        assert subprocess.run(["fsck.ext4", "-p", str(image)], capture_output=True, check=False).returncode in (0, 1)
        subprocess.run(["mount", "-o", "loop", str(image), str(failing_disk)], check=True)
        consortium.start(VOTER)
        Processes.wait_until(lambda: bool(consortium.status(VOTER)["voting"]))
        consortium.assert_whole(first + second)
