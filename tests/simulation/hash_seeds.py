"""A program run twice, under two hash seeds: what depends on the order of a set prints something else."""

import os
import subprocess
import sys
from pathlib import Path


def printed_under_two_hash_seeds(program: str) -> list[str]:
    """What it prints under each."""
    tests = Path(__file__).parents[1]
    return [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
