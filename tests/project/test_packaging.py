"""What is installed for whom: a verifier needs no network, no storage engine, no torch, no event loop."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()

NOT_FOR_A_VERIFIER = (
    "asyncio",
    "h11",
    "httpcore",
    "httpx",
    "libp2p",
    "multiaddr",
    "numpy",
    "prometheus_client",
    "pyarrow",
    "rich",
    "rocksdict",
    "torch",
    "trio",
)

BLOCK_IMPORTS = """
import importlib.abc, sys

BLOCKED = frozenset(sys.argv.pop(1).split(","))

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named '{fullname}' (not installed for a verifier)", name=fullname)
        return None

sys.meta_path.insert(0, Absent())
"""


def run_without(blocked: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in a fresh process in which the ``blocked`` modules cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK_IMPORTS + program, ",".join(blocked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def distribution_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_blocked_modules_really_are_absent() -> None:
    finished = run_without(("msgspec",), "import msgspec")
    assert finished.returncode != 0
    assert "not installed for a verifier" in finished.stderr


@pytest.mark.parametrize("arguments", [["verify", "--help"], ["--help"]], ids=" ".join)
def test_verify_runs_without_network_storage_or_torch(arguments: list[str]) -> None:
    finished = run_without(NOT_FOR_A_VERIFIER, f"import node.cli; node.cli.main({arguments!r})")
    assert finished.returncode == 0, finished.stderr
    assert "Usage" in finished.stdout


def test_rules_import_without_network_storage_or_torch() -> None:
    program = """
import importlib, pkgutil, consensus
for module in pkgutil.walk_packages(consensus.__path__, "consensus."):
    importlib.import_module(module.name)
"""
    finished = run_without(NOT_FOR_A_VERIFIER, program)
    assert finished.returncode == 0, finished.stderr


def test_trainer_client_without_the_hf_extra_imports_but_for_its_one_module() -> None:
    program = """
import importlib, pkgutil, trainer_client
for module in pkgutil.walk_packages(trainer_client.__path__, "trainer_client."):
    if module.name != "trainer_client.hf":
        importlib.import_module(module.name)
"""
    finished = run_without(("accelerate", "peft", "transformers"), program)
    assert finished.returncode == 0, finished.stderr


def test_attribution_without_the_export_extra_imports_but_for_its_one_module() -> None:
    program = """
import importlib, pkgutil, attribution
for module in pkgutil.walk_packages(attribution.__path__, "attribution."):
    if module.name != "attribution.export":
        importlib.import_module(module.name)
"""
    finished = run_without(("pyarrow",), program)
    assert finished.returncode == 0, finished.stderr


def test_base_installation_brings_no_network_storage_or_torch() -> None:
    base = {distribution_name(requirement) for requirement in PROJECT["dependencies"]}
    absent = {re.sub(r"_", "-", name) for name in NOT_FOR_A_VERIFIER}
    assert base & absent == set()


def test_a_node_is_installed_without_torch_or_numpy() -> None:
    node = {distribution_name(requirement) for requirement in PROJECT["optional-dependencies"]["node"]}
    assert node & {"torch", "numpy"} == set()


def test_every_direct_dependency_is_pinned_by_the_constraints() -> None:
    pinned = {distribution_name(line) for line in CONSTRAINTS}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    direct = {distribution_name(requirement) for group in groups for requirement in group}
    assert direct - pinned == set()


def test_constraints_are_exact_portable_and_sorted() -> None:
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"not an exact public version: {line!r}"
    names = [distribution_name(line) for line in CONSTRAINTS]
    assert sorted(CONSTRAINTS, key=str.lower) == CONSTRAINTS
    assert len(set(names)) == len(names)


def test_constraints_pull_in_no_accelerator_libraries() -> None:
    names = [distribution_name(line) for line in CONSTRAINTS]
    assert [name for name in names if name.startswith(("nvidia", "cuda", "triton", "pytorch"))] == []


def test_command_and_classifiers_name_what_is_supported() -> None:
    assert PROJECT["scripts"]["countersign"] == "node.cli:main"
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    supported = {line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if ":: Python :: 3." in line}
    assert supported == {"3.11", "3.12"}
