"""The arrows between the packages point downwards, and the rules stay pure.

``import-linter`` holds the contracts of ``pyproject.toml``; what it cannot say (which standard modules the
rules may use, that they hold no float and read no clock) is checked on their syntax trees.
"""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest

import consensus
from consensus.state_map import _Branch

ROOT = Path(__file__).resolve().parents[2]
RULES = sorted((ROOT / "consensus").rglob("*.py"))

PURE_MODULES = frozenset(
    {
        "array",
        "base64",
        "binascii",
        "bisect",
        "collections",
        "collections.abc",
        "dataclasses",
        "enum",
        "fractions",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "json",
        "math",
        "msgspec",
        "msgspec.structs",
        "operator",
        "re",
        "struct",
        "typing",
    }
)
"""What any rule may import from outside ``consensus``."""

LIBRARIES_OF = {
    "consensus/bls.py": {"blspy", "pyblst"},
    "consensus/participant.py": {"nacl.bindings", "nacl.exceptions"},
    "consensus/keys.py": {
        "cryptography.exceptions",
        "cryptography.hazmat.primitives.asymmetric.mldsa",
        "nacl.bindings",
        "nacl.exceptions",
        "nacl.signing",
    },
    "consensus/checkpoint.py": {"nacl.exceptions", "nacl.signing"},
}
"""What one rule alone may import: cryptography has one home each."""

FLOAT_FREE_MATH = frozenset({"comb", "gcd", "isqrt", "lcm"})
"""What may come from ``math``: exact on integers, hence the same everywhere."""

ORDER_FREE = frozenset({("consensus/membership.py", "has_quorum")})
"""Functions that may walk a set as it comes: they only count its members."""

FORBIDDEN_NAMES = frozenset(
    {"__import__", "breakpoint", "compile", "eval", "exec", "float", "globals", "hash", "id", "input", "open", "print"}
)
"""Builtins that do I/O, differ between processes, or are not exact."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each imported module, and the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module, tuple(alias.name for alias in node.names)


@pytest.fixture(params=RULES, ids=relative)
def rule(request: pytest.FixtureRequest) -> tuple[str, ast.Module]:
    """Path and syntax tree of one module of ``consensus``."""
    return relative(request.param), ast.parse(request.param.read_text(encoding="utf-8"))


def test_import_contracts_are_kept() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " 0 broken" in finished.stdout


def test_rules_import_nothing_but_what_is_listed(rule: tuple[str, ast.Module]) -> None:
    path, tree = rule
    allowed = PURE_MODULES | LIBRARIES_OF.get(path, set())
    surplus = sorted(
        module
        for module, _ in imports(tree)
        if module not in allowed and module != "consensus" and not module.startswith("consensus.")
    )
    assert surplus == [], f"{path} imports {surplus}"


def test_rules_take_only_exact_functions_from_math(rule: tuple[str, ast.Module]) -> None:
    path, tree = rule
    for module, names in imports(tree):
        if module == "math":
            assert set(names or ["*"]) <= FLOAT_FREE_MATH, f"{path} takes {names} from math"


def test_rules_hold_no_float_and_no_true_division(rule: tuple[str, ast.Module]) -> None:
    path, tree = rule
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            assert not isinstance(node.value, float | complex), f"{path}:{node.lineno} has the float {node.value}"
        if isinstance(node, ast.BinOp | ast.AugAssign):
            assert not isinstance(node.op, ast.Div), f"{path}:{node.lineno} divides to a float"


def test_rules_use_no_builtin_that_does_io_or_differs_between_processes(rule: tuple[str, ast.Module]) -> None:
    path, tree = rule
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            assert node.id not in FORBIDDEN_NAMES, f"{path}:{node.lineno} uses {node.id}"


def test_rules_are_synchronous(rule: tuple[str, ast.Module]) -> None:
    path, tree = rule
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith), path


def test_rules_never_iterate_over_a_set_unsorted(rule: tuple[str, ast.Module]) -> None:
    """The order of a set of bytes or strings differs between processes (hash randomisation)."""
    path, tree = rule
    exempt = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (path, node.name) in ORDER_FREE
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in exempt or not isinstance(node, ast.For | ast.comprehension):
            continue
        iterable = node.iter
        assert not isinstance(iterable, ast.Set | ast.SetComp), f"{path}:{iterable.lineno} iterates over a set"
        if isinstance(iterable, ast.Call) and isinstance(iterable.func, ast.Name):
            assert iterable.func.id not in {"set", "frozenset"}, f"{path}:{iterable.lineno} iterates over a set"


def wire_types() -> list[type[msgspec.Struct]]:
    """Every msgspec Struct that a module of ``consensus`` defines, to be encoded."""
    found = []
    for module in pkgutil.walk_packages(consensus.__path__, "consensus."):
        for value in vars(importlib.import_module(module.name)).values():
            if not isinstance(value, type) or not issubclass(value, msgspec.Struct) or value is _Branch:
                continue  # a branch of the state's tree never leaves memory
            if value.__module__ == module.name:
                found.append(value)
    return sorted(found, key=lambda wire: f"{wire.__module__}.{wire.__qualname__}")


@pytest.mark.parametrize("wire", wire_types(), ids=lambda wire: f"{wire.__module__}.{wire.__qualname__}")
def test_wire_types_have_one_encoding(wire: type[msgspec.Struct]) -> None:
    """Frozen arrays of fields, unknown ones forbidden; no float, set or dict anywhere in a field's type."""
    config = wire.__struct_config__
    assert (config.frozen, config.array_like, config.forbid_unknown_fields) == (True, True, True)
    for name, hint in get_type_hints(wire).items():
        leaves = set(type_leaves(hint))
        assert not leaves & {float, complex, set, frozenset, dict, list, object}, f"{wire.__qualname__}.{name}: {hint}"


def type_leaves(hint: object) -> Iterator[object]:
    """A type and all it is made of."""
    yield getattr(hint, "__origin__", hint)
    for argument in getattr(hint, "__args__", ()):
        yield from type_leaves(argument)
