"""Golden vectors: the same bytes under every hash seed, as committed, and as a stranger's code computes them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VECTORS = Path(__file__).parents[1] / "vectors"
ROOT = VECTORS.parents[1]
FILES = (
    "accumulators",
    "audits",
    "batch_signatures",
    "blocks",
    "ceremony",
    "certificates",
    "epochs",
    "events",
    "evidence",
    "job_keys",
    "log_tree",
    "portions",
    "possession",
    "reserve",
    "sampler",
    "state_map",
    "tagged_hash",
)


def run(program: str, folder: Path, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(VECTORS / program), str(folder)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_vectors_are_made_anew_byte_by_byte_under_every_hash_seed(hash_seed: str, tmp_path: Path) -> None:
    made = run("generate.py", tmp_path, hash_seed)
    assert made.returncode == 0, made.stderr
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(FILES)
    assert sorted(path.stem for path in VECTORS.glob("*.json")) == sorted(FILES)
    for name in FILES:
        committed = (VECTORS / f"{name}.json").read_bytes()
        assert (tmp_path / f"{name}.json").read_bytes() == committed, f"{name}: a wire change, or a broken encoder"


def test_vectors_hold_by_code_that_shares_nothing_with_the_implementation() -> None:
    checked = run("check_vectors.py", VECTORS)
    assert checked.returncode == 0, checked.stderr
    cases = sum(len(json.loads((VECTORS / f"{name}.json").read_text())) for name in FILES)
    assert checked.stdout == f"{cases} vectors hold\n"


def test_checker_imports_nothing_of_ours() -> None:
    imported = set()
    for node in ast.walk(ast.parse((VECTORS / "check_vectors.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            imported.add(node.module.partition(".")[0])
    assert imported == {
        "blspy", "collections", "cryptography", "hashlib", "json", "nacl", "pathlib", "struct", "sys",
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_checker_refuses_a_vector_that_is_changed_anywhere(name: str, tmp_path: Path) -> None:
    """One hex digit of the last case's last digest is turned."""
    for file in FILES:
        (tmp_path / f"{file}.json").write_bytes((VECTORS / f"{file}.json").read_bytes())
    target = tmp_path / f"{name}.json"
    text = target.read_text()
    quoted = [at for at in range(1, len(text)) if text[at] == '"' and text[at - 1] in "0123456789abcdef"]
    at = quoted[-1] - 1
    target.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    assert run("check_vectors.py", tmp_path).returncode != 0
