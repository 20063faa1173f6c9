"""``countersign demo`` end to end, with real processes: short of steps and with a barely trained base model.

What a full run shows besides (facts learned, a recital undone) needs more steps than a test has. The job is the
demonstration's own but for its check of memorization: it sees nothing in any step, and one example in the survey before
the release.
"""

import json
import os
import shlex
import signal
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPTS = sysconfig.get_path("scripts")
STEPS = 60
"""Enough that grants are still to be asked for when the revocation is final, also where a node starts slowly."""
ALL_CHECKS = {
    "included",
    "policy-in-force",
    "source-honored",
    "source-unused",
    "delta-exact",
    "refusals-complete",
    "accumulators",
    "evaluated",
}


def processes_about(directory: Path) -> list[str]:
    """Command lines of all processes that name the directory, but for the demonstration itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(str(directory) in word for word in words) and "demo" not in words:
            found.append(" ".join(words))
    return found


def wait_for(words: str, output: Path, demo: subprocess.Popen[bytes], seconds: float) -> str:
    """The output once it contains ``words``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = output.read_text(encoding="utf-8")
        if words in text:
            return text
        assert demo.poll() is None, text
        time.sleep(0.05)
    raise AssertionError(f"no '{words}' within {seconds} s:\n{output.read_text(encoding='utf-8')}")


@contextmanager
def running_demo(directory: Path, cache: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The demonstration in ``directory``/out, and the file that its output goes to."""
    output = directory / "output"
    command = [f"{SCRIPTS}/countersign", "demo", "--out", str(directory / "out"), "--steps", str(STEPS)]
    command += ["--base-steps", "2", "--cache", str(cache), "--job-module", "late_recital_job", *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    with output.open("wb") as sink:
        demo = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
    try:
        yield demo, output
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def stopped(demo: subprocess.Popen[bytes], number: signal.Signals = signal.SIGINT) -> int:
    demo.send_signal(number)
    return demo.wait(timeout=30)


def test_whole_demonstration_proves_what_it_says_and_leaves_no_process(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    with running_demo(tmp_path, cache, "--keep-running") as (demo, output):
        text = wait_for("countersign policy show --config", output, demo, 420.0)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))

        assert summary["passed"]
        assert summary["checks"] == dict.fromkeys(sorted(ALL_CHECKS), True) | summary["checks"]
        assert set(summary["checks"]) == ALL_CHECKS
        assert (summary["nodes"], summary["voting_nodes"]) == (5, 4)
        assert summary["roles"] == {"data-source": 2, "governance": 1, "operator": 1, "verifier": 1}
        assert (summary["steps"], summary["revocations"]) == (STEPS, 1)
        assert summary["certificate_bytes"] == 96
        assert summary["presented_examples"] == summary["admitted_examples"] + summary["refused_examples"]
        assert summary["refused_examples"] > 0
        assert summary["grants"] >= 3

        reserving = {"assignment-letters": 24, "comparison-review": 24, "object-wire": 24}
        assert summary["memorization"]["reserve"]["examples"] == reserving
        assert summary["memorization"]["reserve"]["assessed"] == sum(reserving.values())
        assert "texts that no step trained on, the check takes" in " ".join(text.split())

        (band,) = summary["bands"]
        assert (band["band"], band["from_nats"]) == (1, 4.0)
        assert set(band["blocks"]) <= {"embedding", "block.0", "block.1", "block.2", "block.3", "head"}
        assert "object-wire" in band["examples"]

        assert summary["custody"]["custodian"] == "council"
        assert summary["custody"]["size_bytes"] > 0
        assert "the log bars the release until governance holds" in " ".join(text.split())
        assert (out / "trace" / "accumulators" / "windows").is_dir()

        assert "kill -9: the operator's node is gone" in text
        assert "the operator's node is back" in text
        assert "withdraws scoping-notes" in text
        assert "source-revoked" in text

        assert "the model recites example 0 of debugger-manual (900 ‰)" in " ".join(text.split())
        assert summary["memorization"]["recited"] == [
            {"source": "debugger-manual", "example": 0, "signal_permille": 900}
        ]
        decisions = [(decision["by"], decision["outcome"]) for decision in summary["decisions"]]
        assert decisions == [(["library"], "note"), (["council"], "accept")]
        assert summary["rollbacks"] == 0

        assert summary["replay"] == {"steps": STEPS, "matched": STEPS, "without": "assignment-letters"}
        assert set(summary["traces"]) == set(summary["recall"])
        assert all(len(trace["z"]) == 6 for trace in summary["traces"].values())

        report = (out / "report.html").read_text(encoding="utf-8")
        assert summary["chain_id"] in report
        assert "8 of 8 checks say yes" in report

        status = next(line for line in text.splitlines() if line.strip().startswith("curl") and "/v1/status" in line)
        with urllib.request.urlopen(shlex.split(status)[-1], timeout=10) as answer:
            assert json.load(answer)["chain_id"] == summary["chain_id"]
        assert len([line for line in processes_about(out) if "node run" in line]) == 5

        assert stopped(demo) == 130
    assert processes_about(out) == []

    commands = [line for line in text.splitlines() if "countersign verify " in line and " --bundle " in line]
    assert len(commands) == len(ALL_CHECKS)
    again = subprocess.run(
        shlex.split(commands[-1]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "answer: yes" in again.stdout


@pytest.mark.parametrize("moment", ["1  Consortium", "2  Nodes", "4  Fine-tune", "first grant"])
def test_interrupt_at_any_moment_leaves_no_process_and_exits_130(tmp_path: Path, cache: Path, moment: str) -> None:
    with running_demo(tmp_path, cache) as (demo, output):
        wait_for(moment, output, demo, 120.0)
        assert stopped(demo) == 130
    assert processes_about(tmp_path / "out") == []
    assert "Traceback" not in output.read_text(encoding="utf-8")


def test_node_that_dies_is_named_with_its_log_and_nothing_is_left(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    with running_demo(tmp_path, cache) as (demo, output):
        wait_for("3  Claims", output, demo, 60.0)
        lock = out / "press" / "data" / "lock"
        os.kill(int(lock.read_text(encoding="ascii")), signal.SIGKILL)
        assert demo.wait(timeout=30) == 1
    text = output.read_text(encoding="utf-8")
    assert "the node of press ended with signal SIGKILL" in text
    assert str(out / "press" / "node.log") in text
    assert "Traceback" not in text
    assert processes_about(out) == []


def test_foreign_directory_is_refused_before_anything_starts(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious", encoding="utf-8")
    with running_demo(tmp_path, cache) as (demo, output):
        assert demo.wait(timeout=30) == 2
    assert str(tmp_path / "out") in output.read_text(encoding="utf-8")
    assert (tmp_path / "out" / "thesis.tex").read_text(encoding="utf-8") == "precious"
