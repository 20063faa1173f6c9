"""Verdicts: the answer of a predicate, the numbered steps to it, and what it rests on.

Every step says how far it goes: ``checked`` was recomputed from proofs, ``attested`` is somebody's signed
word, named in the text, ``not-covered`` was not looked at, ``failed`` was checked and is not so. An answer
is *no* as soon as a step fails, *unknown* when something the predicate needs is not disclosed, else *yes*.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from consensus.block import Header


class Status(StrEnum):
    """How far a step goes."""

    CHECKED = "checked"
    ATTESTED = "attested"
    NOT_COVERED = "not-covered"
    FAILED = "failed"


class Answer(StrEnum):
    """What a predicate found. The exit codes of ``countersign verify``: 0, 1, 2."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"

    @property
    def exit_code(self) -> int:
        """0 yes, 1 no (as for a refused bundle), 2 unknown."""
        return (Answer.YES, Answer.NO, Answer.UNKNOWN).index(self)


@dataclass(frozen=True, slots=True)
class CheckedStep:
    """One numbered step of a verification."""

    number: int
    text: str
    status: Status


@dataclass(frozen=True, slots=True)
class AsOf:
    """The certified ledger block an answer holds for; later events may change it."""

    height: int
    log_size: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A predicate's answer."""

    predicate: str
    answer: Answer
    steps: tuple[CheckedStep, ...]
    as_of: AsOf


@dataclass(slots=True)
class Steps:
    """The steps of a verification in the making."""

    steps: list[CheckedStep] = field(default_factory=list)
    undisclosed: bool = False

    def checked(self, text: str) -> None:
        """A step that was recomputed and holds."""
        self._add(text, Status.CHECKED)

    def attested(self, text: str) -> None:
        """A step that rests on the word of whom the text names."""
        self._add(text, Status.ATTESTED)

    def not_covered(self, text: str) -> None:
        """What this predicate does not answer; it does not weigh on the answer."""
        self._add(text, Status.NOT_COVERED)

    def unknown(self, text: str) -> None:
        """A step that needs what is not disclosed: no yes without it."""
        self.undisclosed = True
        self._add(text, Status.NOT_COVERED)

    def check(self, text: str, problems: Sequence[str], undisclosed: int = 0) -> None:
        """A step that holds unless ``problems`` were found or ``undisclosed`` portions are missing."""
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self._add(f"{text}: {problems[0]}{more}", Status.FAILED)
        elif undisclosed:
            self.unknown(f"{text}: {undisclosed} portions are not disclosed")
        else:
            self.checked(text)

    def verdict(self, predicate: str, header: Header) -> Verdict:
        """The answer these steps give."""
        if any(step.status is Status.FAILED for step in self.steps):
            answer = Answer.NO
        else:
            answer = Answer.UNKNOWN if self.undisclosed else Answer.YES
        as_of = AsOf(header.height, header.log_size, header.timestamp_ms)
        return Verdict(predicate, answer, tuple(self.steps), as_of)

    def _add(self, text: str, status: Status) -> None:
        self.steps.append(CheckedStep(len(self.steps) + 1, text, status))
