"""The demonstration's child processes: started, watched, and gone when it ends, however it ends.

Each child leads a process group of its own, so that Ctrl-C reaches the demonstration alone and it decides what
stops in which order. Three things see to it that none is left: ``Processes`` stops all on leaving its ``with``
block; a second Ctrl-C meanwhile is ignored; and the kernel kills them should this process die itself (``child.py``).

Start children in the main thread only: the kernel's promise is bound to the thread that forked.
"""

import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from consensus.rejection import ConfigError, CountersignError

STOP_SECONDS = 6.0
TAIL_LINES = 12
TAIL_BYTES = 16_384


class ProcessFailed(CountersignError):
    """A child ended although it should not have; the message names its log and has its last lines."""


class Stopped(BaseException):
    """The person at the keyboard, or a signal, wants the demonstration to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Child:
    """One child process. ``log`` receives its standard error, and its standard output unless ``lines`` is used."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self.lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process = process
        if process.stdout is not None:
            threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    @property
    def process_id(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative is a signal's number."""
        return self._process.poll()

    def check(self) -> None:
        """Raises ``ProcessFailed`` if it has ended with anything but 0."""
        code = self.exit_code
        if code is not None and code != 0:
            raise ProcessFailed(f"{self.name} ended with {_worded(code)}; {log_tail(self.log)}")

    def kill(self) -> None:
        """``kill -9``, the whole group: no goodbye, no flush."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def ask_to_stop(self) -> None:
        """SIGTERM to the whole group; does not wait."""
        if self.exit_code is None:
            self._signal_group(signal.SIGTERM)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within that time."""
        try:
            self._process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self.lines.put(line)
        self.lines.put(None)


class Processes:
    """All children of one demonstration. Use it in a ``with`` block."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_all()

    def start(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        read_lines: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Start ``command``, appending to ``log``. With ``read_lines`` its standard output goes to ``Child.lines``."""
        with log.open("ab") as sink, interrupts_deferred():
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "node.demo.child", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if read_lines else sink,
                stderr=sink,
                process_group=0,
                env=None if environment is None else {**os.environ, **environment},
            )
            child = Child(name, process, log)
            self._children.append(child)
        return child

    def run(self, name: str, command: Sequence[str], log: Path, seconds: float) -> tuple[int, bytes]:
        """Run a command to its end; its exit code and standard output.

        Raises:
            ProcessFailed: it takes longer than ``seconds``.
        """
        child = self.start(name, command, log, read_lines=True)
        if not child.wait(seconds):
            self.kill(child)
            raise ProcessFailed(f"{name} did not end within {seconds:.0f} s; {log_tail(log)}")
        self._children.remove(child)
        output = b"".join(iter(child.lines.get, None))
        code = child.exit_code
        assert code is not None
        return code, output

    def check_run(self, name: str, command: Sequence[str], log: Path, seconds: float) -> None:
        """Run a command to its end, which must be a good one.

        Raises:
            ProcessFailed: it fails, or takes longer than ``seconds``.
        """
        code, _ = self.run(name, command, log, seconds)
        if code != 0:
            raise ProcessFailed(f"{name} ended with {_worded(code)}; {log_tail(log)}")
        log.unlink()

    def kill(self, child: Child) -> None:
        """``kill -9`` one child."""
        child.kill()
        self._children.remove(child)

    def stop(self, child: Child) -> None:
        """Ask one child to stop, kill it if it does not."""
        child.ask_to_stop()
        if not child.wait(STOP_SECONDS):
            child.kill()
        self._children.remove(child)

    def stop_all(self) -> None:
        """Ask all to stop, kill those that do not, and whatever their groups still hold."""
        with interrupts_ignored():
            for child in self._children:
                child.ask_to_stop()
            deadline = time.monotonic() + STOP_SECONDS
            for child in self._children:
                if not child.wait(deadline - time.monotonic()):
                    child.kill()
            self._children.clear()


def countersign_command(*arguments: str) -> list[str]:
    """``countersign ARGUMENTS``: the command of this very installation.

    Raises:
        ConfigError: it is not where this Python keeps its commands.
    """
    command = Path(sysconfig.get_path("scripts")) / "countersign"
    if not command.is_file():
        raise ConfigError(f"{command}: expected the installed countersign command, found nothing: pip install it")
    return [str(command), *arguments]


def log_tail(log: Path) -> str:
    """Where the log is and its last lines, for an error message."""
    try:
        with log.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    except OSError as error:
        return f"its log {log} cannot be read: {error.strerror}"
    if not lines:
        return f"its log {log} is empty"
    return "\n".join([f"the last lines of {log}:", *(f"    {line}" for line in lines)])


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise ``Stopped`` inside, even where the shell had them ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled_by(stop):
        yield


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Nothing interrupts what runs inside: for tidying up."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """What interrupts meanwhile does so at the end: a child that runs must be known before anything is raised."""
    arrived: list[int] = []
    with _handled_by(lambda number, frame: arrived.append(number)):
        yield
    for number in arrived:
        signal.raise_signal(number)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in _STOPPING]
    try:
        yield
    finally:
        for number, held in zip(_STOPPING, before, strict=True):
            signal.signal(number, held)


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _worded(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
