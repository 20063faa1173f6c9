"""How a model reads text: as bytes, or through the tokenizer of its folder."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from consensus.rejection import ConfigError

BYTE_VALUES = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Language(Protocol):
    """Text to tokens and back."""

    @property
    def unit(self) -> str:
        """What a token is called."""
        ...

    @property
    def how(self) -> str:
        """How it makes tokens of text."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, nothing put before or behind them.

        Raises:
            UnicodeEncodeError: it has no UTF-8.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is none is spelled out."""
        ...


class Bytes:
    """Every byte of UTF-8 is a token."""

    unit = "byte"
    how = "as bytes"

    def encode(self, text: str) -> tuple[int, ...]:
        """See ``Language``."""
        return tuple(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """See ``Language``."""
        runs = itertools.groupby(tokens, key=lambda token: token < BYTE_VALUES)
        return "".join(
            bytes(run).decode("utf-8", "backslashreplace") if are_bytes else "".join(f"<{token}>" for token in run)
            for are_bytes, run in runs
        )


class Tokenizer:
    """The tokenizer that a folder of transformers' holds.

    Raises:
        ConfigError: transformers is not installed, or the folder holds none.
    """

    unit = "token"

    def __init__(self, folder: Path) -> None:
        self.how = f"by the tokenizer in {folder}"
        try:
            from transformers import AutoTokenizer  # noqa: PLC0415 (only models of transformers need it)
        except ImportError as error:
            raise ConfigError(f"--tokenizer {folder}: needs transformers: pip install 'countersign[hf]'") from error
        try:
            self._held: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder}: expected a folder with a tokenizer, found: {error}") from error

    def encode(self, text: str) -> tuple[int, ...]:
        """See ``Language``."""
        text.encode()
        return tuple(self._held.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """See ``Language``."""
        return str(self._held.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def language_of(architecture: str, tokenizer: Path | None) -> Language:
    """The tokenizer asked for; else the one in the model's folder; else bytes.

    Raises:
        ConfigError: as ``Tokenizer``.
    """
    folder = Path(architecture)
    if tokenizer is None and folder.is_dir() and any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = folder
    return Bytes() if tokenizer is None else Tokenizer(tokenizer)
