"""The README's five minutes, the tutorial and the verifier's guide, typed into one shell as a reader would.

Every line of every console block runs, in order, in a directory that holds nothing but what a clone holds. Files
that a document tells the reader to write are written from its own blocks. Placeholders are replaced by what earlier
commands printed. Each command must exit 0.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from document_fixtures import FENCE, PLACEHOLDER, ROOT, console_lines, section, text_of, typed_lines

pytestmark = pytest.mark.processes

COMMAND_SECONDS = 90.0
START_SECONDS = 60.0
DIGITS = re.compile(r"\d+")

PRINTED = (
    re.compile(r"^(?P<name>chain) id +(?P<id>[0-9a-f]{64})$", re.MULTILINE),
    re.compile(r"^(?P<name>campaign) '.*' (?P<id>[0-9a-f]{64})$", re.MULTILINE),
    re.compile(r"^(?P<id>[0-9a-f]{64})  (?P<name>[a-z]+) ", re.MULTILINE),
    re.compile(r"^ *\d+  (?P<name>release) +(?P<id>[0-9a-f]{64})", re.MULTILINE),
)
"""Where a reader finds what to put in place of NAME_ID: the first that was printed counts."""


class Shell:
    """One bash in which line after line is typed; what it starts in the background is gone with it."""

    def __init__(self, directory: Path) -> None:
        scripts = sysconfig.get_path("scripts")
        path = [entry for entry in os.environ["PATH"].split(os.pathsep) if Path(entry) != Path(scripts)]
        self.ids: dict[str, str] = {}
        self.directory = directory
        self.nodes: dict[str, tuple[str, Path]] = {}
        """A node's process id and log, by the directory of its configuration."""
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=directory,
            env={**os.environ, "PATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def type(self, line: str, expected_code: int = 0) -> str:
        """What a line prints; placeholders are filled in before, ids are picked up after."""
        filled = PLACEHOLDER.sub(lambda found: self.ids[found.group()], line)
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{{ {filled}\n}} < /dev/null\nprintf '\\n--- %s\\n' $?\n")
        self._bash.stdin.flush()
        watchdog = threading.Timer(COMMAND_SECONDS, self.close)
        watchdog.start()
        printed = ""
        try:
            for part in self._bash.stdout:
                if part.startswith("--- "):
                    break
                printed += part
            else:
                raise AssertionError(f"'{line}' did not end within {COMMAND_SECONDS} s:\n{printed}")
        finally:
            watchdog.cancel()
        code = int(part.removeprefix("--- "))
        assert code == expected_code, f"'{filled}' exits {code}:\n{printed}{self.logs()}"
        for pattern in PRINTED:
            for found in pattern.finditer(printed):
                self.ids.setdefault(f"{found['name'].upper()}_ID", found["id"])
        return printed

    def start_node(self, line: str) -> None:
        """``countersign node run`` as in a terminal of its own, up to the line that says that it serves."""
        name = Path(shlex.split(line)[-1]).parent.name
        log = self.directory / f"{name}.log"
        log.touch()
        process = self.type(f"{line} > {shlex.quote(str(log))} 2>&1 & echo $!").split()[0]
        self.nodes[name] = process, log
        deadline = time.monotonic() + START_SECONDS
        while "serves http://" not in text_of(log):
            assert time.monotonic() < deadline, text_of(log)
            time.sleep(0.05)

    def stop_node(self, name: str) -> None:
        """As Ctrl-C in the node's terminal."""
        process, _ = self.nodes.pop(name)
        self.type(f"kill -INT {process}; wait {process}")

    def logs(self) -> str:
        """The ends of the nodes' logs, for a failing assertion."""
        return "".join(f"\n{name}: {text_of(log)[-1_000:]}" for name, (_, log) in self.nodes.items())

    def close(self) -> None:
        """Kill the shell and everything it started."""
        if self._bash.poll() is None:
            os.killpg(self._bash.pid, signal.SIGKILL)


@contextmanager
def reader(directory: Path) -> Iterator[Shell]:
    """A reader's shell in what looks like a clone after ``make demo``."""
    clone = directory / "clone"
    clone.mkdir()
    for name in ("configs", "docs"):
        (clone / name).symlink_to(ROOT / name)
    assert (Path(sys.prefix) / "bin" / "activate").is_file(), "the tests run in the environment that make makes"
    (clone / ".venv").symlink_to(sys.prefix)
    shell = Shell(clone)
    try:
        yield shell
    finally:
        shell.close()
        assert shell._bash.stdin is not None
        assert shell._bash.stdout is not None
        shell._bash.communicate()
    assert processes_in(directory) == []


def processes_in(directory: Path) -> list[str]:
    """Command lines of processes whose working directory is below ``directory``, zombies aside."""
    found: list[str] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "cwd").resolve(strict=True).is_relative_to(directory):
                    found.append((process / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.05)
    return found


def follow(shell: Shell, text: str, working_directory: Path) -> dict[str, str]:
    """Do what the text says, block by block: what each line printed."""
    printed: dict[str, str] = {}
    before = 0
    for block in FENCE.finditer(text):
        language, body = block.groups()
        told = re.search(r"\bWrite `([\w.]+)`", text[before : block.start()])
        before = block.end()
        if language in ("toml", "python") and told:
            (working_directory / told[1]).write_text(body, encoding="utf-8")
        elif language == "console":
            for line in typed_lines(body):
                if line.startswith("countersign node run"):
                    shell.start_node(line)
                    continue
                if "log fsck" in line:
                    shell.stop_node(Path(shlex.split(line)[-1]).parent.name)
                printed[line] = shell.type(line)
    return printed


def one(printed: dict[str, str], words: str) -> str:
    """What the only line with ``words`` in it printed."""
    (found,) = (output for line, output in printed.items() if words in line)
    return found


def test_five_minutes_of_the_readme_end_in_a_yes(tmp_path: Path) -> None:
    tour = section(text_of(ROOT / "README.md"), "## Five minutes", "## The code in eight files")
    with reader(tmp_path) as shell:
        printed = follow(shell, tour, tmp_path / "nowhere")
        assert "admitted" in one(printed, "python train.py")
        assert "answer: yes" in one(printed, "countersign verify delta-exact")
        assert list(printed)[-1] == "kill $(jobs -p)"
        shell.type("wait")


def test_tutorial_then_every_question_of_the_verifiers_guide(tmp_path: Path) -> None:
    tutorial = text_of(ROOT / "docs" / "tutorial.md")
    directory = tmp_path / "consortium"
    with reader(tmp_path) as shell:
        printed = follow(shell, section(tutorial, "## 2. A consortium of your own", "## 7. Things to try"), directory)
        assert "licence-not-admitted" in one(printed, "python train.py")
        assert "source-revoked" not in one(printed, "python train.py")
        for line, output in printed.items():
            if line.startswith("countersign verify"):
                assert "answer: yes" in output, line

        (promised,) = (body for language, body in FENCE.findall(tutorial) if language == "text")
        unused = DIGITS.sub("N", one(printed, "countersign verify source-unused"))
        for line in DIGITS.sub("N", promised).splitlines():
            assert " ".join(line.split()) in " ".join(unused.split()), line

        tampered_is_noticed(shell, directory, next(line for line in printed if "verify delta-exact" in line))
        verifiers_guide(shell, directory)

        printed = follow(shell, section(tutorial, "## 7. Things to try"), directory)
        assert "'source-revoked'" in one(printed, "python train.py")
        assert "sound" in one(printed, "log fsck")


def tampered_is_noticed(shell: Shell, directory: Path, verify: str) -> None:
    """What the tutorial's first part promises of changed weights, a changed bundle and another chain."""
    for file, answer in (("first/tuned.safetensors", "answer: no"), ("delta.bundle", "refused: ")):
        path = directory / file
        honest = path.read_bytes()
        path.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
        assert answer in shell.type(verify, 1)
        path.write_bytes(honest)
    assert "refused: " in shell.type(verify.replace("CHAIN_ID", "ab" * 32), 1)
    assert "answer: yes" in shell.type(verify)


def verifiers_guide(shell: Shell, directory: Path) -> None:
    """All bundles and questions of the guide, asked about the tutorial's campaign in its ``trial`` directory."""
    guide = text_of(ROOT / "docs" / "verifier.md")
    shell.type("cd trial && cp ../first/tuned.safetensors .")
    shell.type("countersign log show --config library/node.toml --kind release")
    shell.ids["EVENT_ID"] = shell.ids["RELEASE_ID"]
    asked = 0
    for line in console_lines(guide):
        if not line.startswith("countersign"):
            continue
        shell.ids["SOURCE_ID"] = shell.ids["DIARIES_ID" if "unused" in line else "LETTERS_ID"]
        output = shell.type(line)
        if line.startswith("countersign verify"):
            asked += 1
            assert "answer: yes" in output, line
    assert asked == 8
    shell.type("cd ..")


def test_both_commands_of_the_readme_are_targets() -> None:
    commands = list(console_lines(section(text_of(ROOT / "README.md"), "## Two commands", "## Five minutes")))
    assert commands == ["make demo", "make test"]
    for command in commands:
        asked = subprocess.run(
            [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert asked.returncode == 0, asked.stderr
