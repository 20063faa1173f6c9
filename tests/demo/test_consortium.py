"""Output directories and child processes of the demonstration: what may be replaced, what may not survive."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from consensus.rejection import ConfigError
from node.demo.directory import ABOUT_FILE, ABOUT_FIRST_LINE, prepare
from node.demo.processes import Processes, ProcessFailed, Stopped, log_tail, stop_signals
from node.files import DirectoryLock


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def earlier_run(directory: Path) -> Path:
    directory.mkdir()
    (directory / ABOUT_FILE).write_text(f"{ABOUT_FIRST_LINE}\n", encoding="utf-8")
    (directory / "library").mkdir()
    return directory


def test_directory_of_somebody_else_is_refused_by_name_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        prepare(tmp_path, keep=False)
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "precious"


def test_directory_with_another_about_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / ABOUT_FILE).write_text("my notes", encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing was touched"):
        prepare(tmp_path, keep=False)


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="found a file"):
        prepare(path, keep=False)


def test_missing_and_empty_directories_need_nothing(tmp_path: Path) -> None:
    assert not prepare(tmp_path, keep=True)
    assert not prepare(tmp_path / "new", keep=True)


def test_earlier_run_is_replaced_unless_it_is_to_be_kept(tmp_path: Path) -> None:
    directory = earlier_run(tmp_path / "out")
    with pytest.raises(ConfigError, match="--keep"):
        prepare(directory, keep=True)
    assert (directory / "library").exists()
    assert prepare(directory, keep=False)
    assert not directory.exists()


def test_run_in_progress_is_not_replaced(tmp_path: Path) -> None:
    directory = earlier_run(tmp_path / "out")
    lock = DirectoryLock.acquire(directory)
    try:
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            prepare(directory, keep=False)
        assert (directory / "library").exists()
    finally:
        lock.release()


def test_child_that_ignores_the_request_to_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.demo.processes.STOP_SECONDS", 0.5)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    with Processes() as processes:
        child = processes.start("stubborn", [sys.executable, "-c", stubborn], tmp_path / "log", read_lines=True)
        assert child.lines.get(timeout=10) == b"up\n"
    assert not alive(child.process_id)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_child_that_was_being_started_when_the_person_stopped_is_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    started: list[int] = []

    class InterruptedOnceForked(subprocess.Popen[bytes]):
        """The signal comes when the child runs and nobody knows of it yet."""

        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self.pid)
            signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", InterruptedOnceForked)
    with stop_signals(), pytest.raises(Stopped) as caught, Processes() as processes:
        processes.start("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert caught.value.number == number
    assert not alive(started[0])


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from node.demo.processes import Processes
        with Processes() as processes:
            child = processes.start(
                "sleeper", [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"],
                Path({str(tmp_path / "log")!r}), read_lines=True)
            assert child.lines.get(timeout=10) == b"up\\n"
            print(child.process_id, flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        sleeper = int(started.stdout.readline())
        assert alive(sleeper)
        started.kill()
    assert eventually(lambda: not alive(sleeper))


def test_failed_child_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    script = "import sys; [print('line', n, file=sys.stderr) for n in range(40)]; sys.exit(3)"
    with Processes() as processes:
        child = processes.start("the failing one", [sys.executable, "-c", script], tmp_path / "log")
        assert child.wait(10)
        with pytest.raises(ProcessFailed, match="the failing one ended with exit code 3") as caught:
            child.check()
    assert "line 39" in str(caught.value)
    assert "line 5\n" not in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)


def test_log_that_is_missing_or_empty_is_said_to_be(tmp_path: Path) -> None:
    assert "cannot be read" in log_tail(tmp_path / "none")
    (tmp_path / "empty").touch()
    assert "is empty" in log_tail(tmp_path / "empty")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signals_raise_and_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals(), pytest.raises(Stopped, match=number.name) as caught:
        signal.raise_signal(number)
    assert caught.value.number == number
    assert signal.getsignal(number) is before
