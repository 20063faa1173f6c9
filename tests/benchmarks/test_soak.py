"""A quarter of a minute of the soak, whose hour is `make soak`: it measures, and nothing grows at once."""

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_short_soak_ends_with_every_step_final_and_memory_within_its_floor(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--quick", "--rate", "10", "--directory", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    figures = {figure["name"]: figure for figure in json.loads(finished.stdout)["figures"]}
    assert 0 < figures["steps final at all voters"]["value"] <= 10
    assert figures["memory of the largest voter, last quarter"]["holds"]
    assert figures["memory of the largest voter, last quarter / first"]["value"] < 1.5
    assert not any(tmp_path.iterdir())
