"""What is asked: a prompt, its completion and which of its tokens, one question or a file of them.

A file has one JSON object a line: ``{"prompt": "…", "completion": "…", "tokens": "0:4"}``; the last two may be missing.
How text becomes tokens is the model's language (``language.py``).
"""

from pathlib import Path

import msgspec
from torch import nn

from attribution.language import Language
from attribution.query import Output, greedy_completion
from consensus.rejection import ConfigError, Reason, Rejected


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``completion`` None asks about what the tuned model says, ``tokens`` None about all of it."""

    prompt: str
    completion: str | None = None
    tokens: str | None = None

    def output(self, tuned: nn.Module, language: Language, length: int) -> tuple[Output, str, int]:
        """The tokens asked about, how the question reads, and how many tokens the completion has.

        Raises:
            ConfigError: ``tokens`` is no FROM:TO.
            Rejected: ``BAD_FIELD`` for an empty prompt or span.
        """
        before = language.encode(self.prompt)
        if not before:
            raise Rejected(
                Reason.BAD_FIELD, "the prompt is empty: the first token of all has no chance to be asked about"
            )
        if self.completion is None:
            after = greedy_completion(tuned, before, length)
        else:
            after = language.encode(self.completion)
        first, end = 0, len(after)
        if self.tokens is not None:
            left, _, right = self.tokens.partition(":")
            if not (left.isascii() and left.isdigit() and right.isascii() and right.isdigit()):
                raise ConfigError(f"--tokens: expected FROM:TO, found {self.tokens}")
            first, end = int(left), int(right)
        if not 0 <= first < end <= len(after):
            raise Rejected(Reason.BAD_FIELD, f"tokens {first}:{end} of a completion of {len(after)}: an empty span")
        output = Output(before + after, len(before) + first, len(before) + end)
        return output, f"{self.prompt}[{language.decode(after)}]", len(after)


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file.

    Raises:
        ConfigError: it cannot be read, is empty, or a line is no question.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: expected a file of questions, found: {error.strerror}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(msgspec.json.decode(line, type=Question))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}: expected a question in JSON, found: {error}") from error
    if not questions:
        raise ConfigError(f"{path}: expected a question a line, found none")
    return tuple(questions)


def greedy_text(model: nn.Module, language: Language, prompt: str, count: int) -> str:
    """The ``count`` likeliest next tokens of a model, as text."""
    return language.decode(greedy_completion(model, language.encode(prompt), count))
