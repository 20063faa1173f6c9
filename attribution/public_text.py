"""Public text, which factors are fitted over and control outputs are taken of: the caller's, or Python's own manual."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from attribution.language import Language
from consensus.rejection import ConfigError

P = TypeVar("P")

CONTROLS = 40
"""Outputs that a source is measured against."""


def public_text() -> str:
    """The default text: the topics of Python's own manual."""
    from pydoc_data.topics import topics  # noqa: PLC0415 (half a megabyte that only this default needs)

    return "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()


def pieces_of(text: str, language: Language, size: int) -> list[tuple[int, ...]]:
    """A text's tokens in pieces of one length, in order; what is left over is dropped."""
    tokens = language.encode(text)
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


def public_sequences(path: Path | None, language: Language, context_tokens: int) -> list[tuple[int, ...]]:
    """Pieces of the text in a file, or of the default one, all of one length, in order.

    Raises:
        ConfigError: no text file, or less text than the control outputs take.
    """
    if path is None:
        return pieces_of(public_text(), language, context_tokens)
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"{path}: expected a text file, found: {error.strerror}") from error
    pieces = pieces_of(text, language, context_tokens)
    if len(pieces) < CONTROLS:
        wanted = f"at least {CONTROLS * context_tokens} {language.unit}s"
        raise ConfigError(f"{path}: expected {wanted}, found {len(language.encode(text))}")
    return pieces


def spread(pieces: Sequence[P], count: int) -> list[P]:
    """At most ``count`` of them, evenly over the whole: the head of a text may be all of one topic."""
    count = min(count, len(pieces))
    return [pieces[number * len(pieces) // count] for number in range(count)]
