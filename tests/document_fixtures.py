"""The documents as tests read them: their fenced blocks, and what a reader would type."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z]+_ID\b")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def section(text: str, first: str, until: str = "") -> str:
    """From the heading ``first`` to the heading ``until``, or to the end."""
    assert text.count(f"\n{first}\n") == 1, first
    rest = text[text.index(f"\n{first}\n") :]
    if not until:
        return rest
    assert f"\n{until}\n" in rest, until
    return rest[: rest.index(f"\n{until}\n")]


def fenced(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def typed_lines(block: str) -> Iterator[str]:
    """What follows "$ " in a console block, continued over backslashes."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield line[2:]


def console_lines(text: str) -> Iterator[str]:
    """All lines of all console blocks."""
    for body in fenced(text, "console", "bash", "sh"):
        yield from typed_lines(body)
