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

SPAN_DIGITS = 16


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``completion`` None asks about what the tuned model says, ``tokens`` None about all of it."""

    prompt: str
    completion: str | None = None
    tokens: str | None = None

    def output(self, tuned: nn.Module, language: Language, length: int, context: int) -> tuple[Output, str, int]:
        """The tokens asked about, how the question reads, and how many tokens the completion has.

        ``context`` is how many tokens the pieces of public text have: control outputs stand at the same place in them.

        Raises:
            ConfigError: ``tokens`` is no FROM:TO; or prompt and completion are longer than ``context``.
            Rejected: ``BAD_FIELD`` for an empty prompt, completion or span, or text that is no UTF-8.
        """
        before = _encoded(language, self.prompt, "prompt")
        if not before:
            raise Rejected(
                Reason.BAD_FIELD, "the prompt is empty: the first token of all has no chance to be asked about"
            )
        said = None if self.completion is None else _encoded(language, self.completion, "completion")
        if said == ():
            raise Rejected(Reason.BAD_FIELD, "the completion is empty: without one, what the tuned model says is asked")
        whole = len(before) + (length if said is None else len(said))
        if whole > context:
            raise ConfigError(
                f"prompt and completion have {whole} tokens, the control outputs {context}: shorten them, or give a "
                "larger --context, at most what the model can read"
            )
        after = greedy_completion(tuned, before, length) if said is None else said
        first, end = (0, len(after)) if self.tokens is None else _span(self.tokens, len(after))
        output = Output(before + after, len(before) + first, len(before) + end)
        asked = f"{language.decode(after[:first])}[{language.decode(after[first:end])}]{language.decode(after[end:])}"
        return output, f"{self.prompt}{asked}", len(after)


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
        if not line.strip():
            raise ConfigError(f"{path}, line {number}: expected a question in JSON, found an empty line")
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


def _encoded(language: Language, text: str, what: str) -> tuple[int, ...]:
    try:
        return language.encode(text)
    except UnicodeEncodeError as error:
        raise Rejected(Reason.BAD_FIELD, f"the {what} is no UTF-8: {text!a:.100}") from error


def _span(text: str, count: int) -> tuple[int, int]:
    """First and end of a FROM:TO within a completion of ``count`` tokens."""
    left, _, right = text.partition(":")
    if not all(side.isascii() and side.isdigit() and len(side) <= SPAN_DIGITS for side in (left, right)):
        raise ConfigError(f"--tokens: expected FROM:TO, found {text!a:.100}")
    first, end = int(left), int(right)
    if first >= end:
        raise Rejected(Reason.BAD_FIELD, f"tokens {first}:{end}: an empty span; TO is the one after the last, from 0")
    if end > count:
        raise Rejected(Reason.BAD_FIELD, f"tokens {first}:{end} are beyond the completion, which has {count}")
    return first, end
