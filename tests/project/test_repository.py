"""The repository keeps its own house rules."""

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("consensus", "node", "trainer_client")
LONG_FILE_LINES = 400

TEXT_FOLDERS = (*PACKAGES, "tests", "scripts", "docs", "configs", "benchmarks", ".ci")
TEXT_SUFFIXES = {"", ".cfg", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}

REGISTRIES = ("py" + "pi", "python" + "hosted", "download.py" + "torch", "npm" + "js")
REGISTRY_HOST = re.compile(r"\b(?:" + "|".join(map(re.escape, REGISTRIES)) + r")\.(?:org|com)\b")
"""Where packages come from is the installer's to say: a mirror may be all there is."""

UNFINISHED = re.compile(r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")


def texts() -> Iterator[Path]:
    """Every text file of the project, sorted."""
    yield from sorted(
        path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT_SUFFIXES and path.name != ".coverage"
    )
    for folder in TEXT_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
                yield path


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods in ``body`` without a docstring."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{prefix}{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=relative)
def test_every_module_says_what_it_is_responsible_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{relative(path)} has no header"


@pytest.mark.parametrize("path", modules("consensus"), ids=relative)
def test_everything_public_in_the_rules_has_a_docstring(path: Path) -> None:
    found = list(undocumented(ast.parse(path.read_text(encoding="utf-8")).body))
    assert found == [], f"{relative(path)}: {', '.join(found)}"


def test_no_text_names_a_package_registry() -> None:
    found = [relative(path) for path in texts() if REGISTRY_HOST.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_nothing_is_left_for_later_in_a_comment() -> None:
    found = [relative(path) for path in texts() if UNFINISHED.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_decision_records_are_numbered_without_gap_and_complete() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:3]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        text = path.read_text(encoding="utf-8")
        headings = [line for line in text.splitlines() if line.startswith("#")]
        assert headings[0].startswith(f"# {path.name[:3]} "), relative(path)
        assert headings[1:4] == ["## Context", "## Decision", "## Consequences"], relative(path)


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=relative)
def test_links_between_documents_and_modules_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{relative(path)} links to {target}"


def test_continuous_integration_is_one_executable_script() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_prerequisites_that_are_there_are_found() -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_prerequisites.py"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("wrapper", "named"),
    [
        (None, ("no C compiler", "build-essential", "libgmp-dev", "gmp-devel")),
        ("exit 1", ("cannot compile", "build-essential")),
        ('grep -q gmp.h "$1" && exit 1; exit 0', ("gmp.h", "libgmp-dev", "gmp-devel")),
    ],
    ids=["no compiler", "broken compiler", "no gmp.h"],
)
def test_missing_prerequisites_are_named_with_their_packages(
    tmp_path: Path, wrapper: str | None, named: tuple[str, ...]
) -> None:
    compiler = tmp_path / "compiler"
    if wrapper is not None:
        compiler.write_text(f"#!/bin/sh\n{wrapper}\n", encoding="utf-8")
        compiler.chmod(0o755)
    finished = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_prerequisites.py"],
        env={**os.environ, "CC": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    for words in named:
        assert words in finished.stderr


def test_long_files_are_reported(record_property: Callable[[str, object], None]) -> None:
    """A file past ~400 lines is probably two rooms: reported (``pytest --junit-xml``), not refused."""
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules(*PACKAGES)}
    for path, lines in sorted(lengths.items()):
        if lines > LONG_FILE_LINES:
            record_property(path, lines)
    assert lengths
