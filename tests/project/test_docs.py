"""What the documents say of commands, options, files, names and numbers is so."""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from document_fixtures import FENCE, PLACEHOLDER, ROOT, console_lines, fenced, text_of

from consensus.block import Body
from consensus.codec import encode
from consensus.event import SHAPES
from consensus.identifiers import Role, Tag
from consensus.membership import default_threshold, member_id
from consensus.parameters import TensorDescriptor, parameter_root
from consensus.policy import band_count, class_rule
from consensus.portions import (
    Count,
    data_commitment,
    examples_key,
    examples_root,
    item_leaf,
    item_salt,
    portion_commitment,
)
from consensus.predicates import Predicate
from consensus.reserve import lot
from consensus.sampler import presented_indexes
from consensus.state_map import EMPTY_STATE_ROOT, StateMap
from node.cli import every_command, main
from node.commands.policy import PolicyFile, read_policy
from node.config import NodeConfig

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = dict(every_command())

LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_COMMAND = re.compile(r"(?<!`)`countersign ([^`]+)`(?!`)")
ZERO = bytes(32)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def countersign_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ``countersign`` in a console block, without the program's name."""
    for path in DOCUMENTS:
        for line in console_lines(text_of(path)):
            words = shlex.split(line)
            if words[0].rpartition("/")[2] == "countersign":
                yield f"{name_of(path)}: {line}", words[1:]


COMMAND_LINES = list(countersign_lines())


def slug(heading: str) -> str:
    """The anchor under which a heading is shown."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that ``words`` begin with, and the rest."""
    path, rest = "countersign", list(words)
    while isinstance(COMMANDS[path], click.Group) and rest and not rest[0].startswith("-"):
        path = f"{path} {rest.pop(0)}"
        assert path in COMMANDS, f"there is no command '{path}'"
    return COMMANDS[path], rest


def test_documents_hold_command_lines_to_check() -> None:
    assert len(COMMAND_LINES) > 30


@pytest.mark.parametrize(("line", "words"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_every_command_line_parses(line: str, words: list[str]) -> None:
    command, rest = resolve([PLACEHOLDER.sub("ab" * 32, word) for word in words])
    if command is main:
        known = {option for parameter in main.params for option in parameter.opts}
        assert set(rest) <= known, line
        return
    assert not isinstance(command, click.Group), f"{line}: a command of that family is missing"
    command.make_context("countersign", rest)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_named_in_running_text_exist(path: Path) -> None:
    for mention in INLINE_COMMAND.findall(FENCE.sub("", text_of(path))):
        command, rest = resolve([word for word in mention.split() if word != "…"])
        known = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
        assert {word for word in rest if word.startswith("-")} <= known, f"{name_of(path)}: countersign {mention}"


def test_every_command_is_in_some_document() -> None:
    written = " ".join(" ".join(text_of(path).split()) for path in DOCUMENTS) + " "
    leaves = [name for name, command in COMMANDS.items() if not isinstance(command, click.Group)]
    missing = [name for name in leaves if not re.search(rf"{name}[\s`.,)]", written) and name != "countersign demo"]
    assert missing == []
    assert "make demo" in written


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_make_target_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for line in console_lines(text_of(path)):
        words = shlex.split(line)
        if words[0] == "make":
            assert words[1] in targets, f"{name_of(path)}: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_relative_link_and_anchor_leads_somewhere(path: Path) -> None:
    for target in LINK.findall(FENCE.sub("", text_of(path))):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name_of(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(found)), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{name_of(path)} links to {target}"


PYTHON = [(name_of(path), body) for path in DOCUMENTS for body in fenced(text_of(path), "python")]


@pytest.mark.parametrize(("name", "body"), PYTHON, ids=[f"{name} {number}" for number, (name, _) in enumerate(PYTHON)])
def test_python_in_documents_compiles_and_names_what_exists(name: str, body: str) -> None:
    tree = ast.parse(body, name)
    compile(tree, name, "exec")
    imported: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("consensus", "trainer_client", "node")):
            module = importlib.import_module(node.module or "")
            imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            called = imported[node.func.id]
            assert callable(called)
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
            inspect.signature(called).bind(*node.args, **keywords)


def test_the_tutorials_policy_is_accepted_and_the_one_to_copy(tmp_path: Path) -> None:
    (written,) = fenced(text_of(ROOT / "docs" / "tutorial.md"), "toml")
    path = tmp_path / "policy.toml"
    path.write_text(written, encoding="utf-8")
    assert read_policy(path) == read_policy(ROOT / "configs" / "policy.toml")


def test_the_example_policy_has_every_key_and_shows_the_defaults() -> None:
    text = text_of(ROOT / "configs" / "policy.toml")
    shown = tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))
    assert set(shown) == {field.encode_name for field in msgspec.structs.fields(PolicyFile)}
    assert read_policy(ROOT / "configs" / "policy.toml").revocation == shown["revocation"]


def test_the_example_policy_by_entropy_has_rules_for_a_band_and_the_operators_guide_shows_them() -> None:
    policy = read_policy(ROOT / "configs" / "policy-bands.toml")
    letters = class_rule(policy, "letters")
    assert letters is not None
    assert (band_count(policy), [rule.band for rule in letters.bands]) == (3, [2])
    (excerpt,) = (text for text in fenced(text_of(ROOT / "docs" / "operator.md"), "toml") if "[[class.band]]" in text)
    (shown,) = tomllib.loads(excerpt)["class"]
    assert shown["band"] == [
        {
            "band": rule.band,
            "default_weight_permille": rule.default_weight_permille,
            "blocks": {weight.block: weight.weight_permille for weight in rule.blocks},
        }
        for rule in letters.bands
    ]


def test_the_tutorials_script_is_the_one_to_copy() -> None:
    (written,) = fenced(text_of(ROOT / "docs" / "tutorial.md"), "python")
    assert written == text_of(ROOT / "docs" / "train.py")


def test_the_operators_guide_explains_every_configuration_key_and_default() -> None:
    guide = text_of(ROOT / "docs" / "operator.md")
    table = guide.partition("## Configuration")[2].partition("**Ports.**")[0]
    documented = dict(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (.+?) \|", table, re.MULTILINE))
    expected: dict[str, str] = {}
    for section in msgspec.structs.fields(NodeConfig):
        for field in msgspec.structs.fields(section.type):
            default = "none" if field.default in (None, (), {}) else f"`{field.default}`"
            if isinstance(field.default, int) and not isinstance(field.default, bool):
                default = str(field.default)
            if field.default is msgspec.NODEFAULT:
                default = "none" if field.name == "peers" else "required"
            expected[f"{section.name}.{field.name}"] = default.replace("`False`", "`false`")
    assert documented == expected


def test_the_operators_guide_explains_every_policy_key() -> None:
    guide = text_of(ROOT / "docs" / "operator.md")
    for field in msgspec.structs.fields(PolicyFile):
        assert f"`{field.encode_name}`" in guide or f"`[[{field.encode_name}]]`" in guide, field.encode_name


def test_metrics_named_in_the_operators_guide_exist() -> None:
    source = text_of(ROOT / "node" / "metrics.py")
    for metric in re.findall(r"`countersign_(\w+)`", text_of(ROOT / "docs" / "operator.md")):
        name = metric.removesuffix("_total")
        assert f'"{name}"' in source or f'"countersign_{name}"' in source, metric


@pytest.mark.parametrize(
    ("document", "mention"),
    [("README.md", "`{}`"), ("docs/protocol.md", "| `{}` |"), ("docs/verifier.md", "countersign verify {} ")],
)
def test_every_predicate_is_explained(document: str, mention: str) -> None:
    text = text_of(ROOT / document)
    assert [predicate for predicate in Predicate if mention.format(predicate.value) not in text] == []


def test_the_protocol_lists_every_tag_and_kind() -> None:
    protocol = text_of(ROOT / "docs" / "protocol.md")
    for tag in Tag:
        assert f"`{tag.value.removeprefix('countersign/v1/')}`" in protocol, tag
    for kind in SHAPES:
        assert f"| `{kind.value}` |" in protocol, kind


def test_the_protocols_quorum_table_is_arithmetic() -> None:
    protocol = text_of(ROOT / "docs" / "protocol.md")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", protocol, re.MULTILINE)
    assert len(rows) == 6
    for n, t, agreement, validity, liveness in (tuple(map(int, row)) for row in rows):
        assert (agreement, validity, liveness) == (2 * t - n - 1, t - 1, n - t)
        assert t == default_threshold(n) or (n, t) == (3, 2)


VECTORS = {
    "member id of scheme 1, key 00…": member_id(1, ZERO).hex(),
    "empty state root": EMPTY_STATE_ROOT.hex(),
    "state root of one entry: key 03 ‖ 00…, value 90": StateMap().set(b"\x03" + ZERO, b"\x90").root.hex(),
    'Count("memorization-above-threshold", 2)': encode(Count("memorization-above-threshold", 2)).hex(),
    "governance commitment of a policy, salt 00…, content 90": portion_commitment(
        "policy", Role.GOVERNANCE, ZERO, b"\x90"
    ).hex(),
    "data commitment of a step, portion salt 00…, one item 90": data_commitment(
        "step", item_leaf(item_salt(ZERO, 0), b"\x90"), 1
    ).hex(),
    "examples root, portion salt 00…, item 0, examples 7 and 8": examples_root(examples_key(ZERO, 0), (7, 8)).hex(),
    'parameter root of one tensor "w", F32, [2, 2], digest 00…': parameter_root(
        [TensorDescriptor("w", "F32", (2, 2), ZERO)]
    ).hex(),
    "body_root of an empty body": Body(()).root.hex(),
    "sampler, seed 00…, n = 10, b = 4, steps 1 to 3": "`, `".join(
        " ".join(map(str, presented_indexes(ZERO, 10, 4, step))) for step in (1, 2, 3)
    ),
    "reserve, content root 00…, lots of examples 0 and 1": f"{lot(ZERO, 0)} {lot(ZERO, 1)}",
}


def test_the_protocols_vectors_are_those_of_the_code() -> None:
    section = text_of(ROOT / "docs" / "protocol.md").partition("## 22. Vectors")[2]
    written = dict(re.findall(r"^\| (.+?) \| `(.+)` \|$", section, re.MULTILINE))
    assert written == VECTORS
