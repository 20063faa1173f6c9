"""How commands print: plain lines for people, one JSON document for scripts."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click


def print_json(document: object) -> None:
    """One JSON document, indented, keys as given; with escapes where it could not be printed as UTF-8."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    try:
        text.encode((sys.stdout.encoding or "utf-8") if sys.stdout else "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    click.echo(text)


def printable(text: str) -> str:
    """The text with control characters spelled out: names on a log are other people's words."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the last one ragged."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def utc(milliseconds: int) -> str:
    """A Unix time in milliseconds as people read it."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
