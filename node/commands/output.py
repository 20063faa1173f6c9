"""How commands print: plain lines for people, one JSON document for scripts."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import click


def print_json(document: object) -> None:
    """One JSON document, indented, keys as given."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, the last one ragged."""
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def utc(milliseconds: int) -> str:
    """A Unix time in milliseconds as people read it."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
