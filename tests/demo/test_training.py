"""How long the demonstration waits for its training job."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.demo import training
from node.demo.consortium import GUILD, LABORATORY
from node.demo.facts import CustodyFacts
from node.demo.processes import Processes
from node.demo.training import PATIENCE_SECONDS, Training, TrainingOptions

JOB = """
import time
print('{"event": "custody", "step": 40}', flush=True)
time.sleep(0.4)
print('{"event": "done"}', flush=True)
"""


def test_job_that_waits_for_a_long_hand_over_is_not_given_up_as_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_seconds = 0.0
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now_seconds))
    kept = CustodyFacts("council", 6, 1_000)

    def hand_over(step: int) -> CustodyFacts:
        nonlocal now_seconds
        now_seconds += 2 * PATIENCE_SECONDS
        return kept

    node = SimpleNamespace(status=lambda: None)
    consortium: Any = SimpleNamespace(nodes={LABORATORY: node, GUILD: node}, check=lambda: None)
    unused: Any = None
    with Processes() as processes:
        job = processes.start("the job", [sys.executable, "-c", JOB], tmp_path / "job.log", read_lines=True)
        followed = Training(
            consortium=consortium, processes=processes, display=unused, tell=unused, clock=unused, sources=(),
            revoked=unused, access=unused, options=TrainingOptions(40, tmp_path, None), decide=unused,
            hand_over=hand_over,
        )  # fmt: skip
        followed._follow(job)
    assert followed.custody == kept
