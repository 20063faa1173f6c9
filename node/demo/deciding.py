"""What the consortium does about examples that the tuned model recites, found when no step can take them out any more.

Done with the commands that anybody would type, each with its own member's configuration: governance has the examples
named, their owners put on the log what they say to it, and governance accepts the finding or rejects it. What these
parties think is here: a text under a licence that lets anybody copy it does nobody harm; the text that stands for
somebody's secret must not leave, and then there is no release.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from consensus.review import ACCEPT, NOTE, REJECT
from node.demo.consortium import COUNCIL, Claims, Consortium
from node.demo.facts import Moment, RecitedFacts, SurveyFacts
from node.demo.processes import Processes, ProcessFailed, countersign_command, log_tail

COMMAND_SECONDS = 60.0
NAMED_IN_A_SENTENCE = 3


class RecitedLine(msgspec.Struct, frozen=True):
    """An example of ``countersign campaign recited --json``."""

    name: str
    owner: str
    example: int
    signal_permille: int


class SurveyLine(msgspec.Struct, frozen=True):
    """What ``countersign campaign recited --json`` prints."""

    evaluation: str
    steps: int
    examples: int
    highest_signal_permille: int
    threshold_permille: int
    recited: tuple[RecitedLine, ...]


class DecidedLine(msgspec.Struct, frozen=True):
    """What ``countersign decision add --json`` prints."""

    id: str
    status: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What governance and the owners say; ``notes`` are by owner."""

    outcome: str
    rationale: str
    notes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Deciding:
    """The parties of one consortium, asked about one campaign. ``manifest`` is what the job left."""

    consortium: Consortium
    processes: Processes
    claims: Claims
    manifest: Path
    tell: Callable[[Moment], None]
    clock: Callable[[], float]

    def survey(self) -> SurveyFacts:
        """What governance learns of the survey: proved to be the recorded one.

        Raises:
            ProcessFailed: the command gives no answer.
        """
        arguments = ("campaign", "recited", "--config", self._config(COUNCIL), self.claims.access.campaign)
        output = self._run(*arguments, "--manifest", str(self.manifest))
        try:
            found = msgspec.json.decode(output, type=SurveyLine)
        except msgspec.DecodeError as error:
            raise ProcessFailed(f"countersign campaign recited printed no answer; {log_tail(self._log)}") from error
        return SurveyFacts(
            evaluation=found.evaluation,
            examples=found.examples,
            highest_permille=found.highest_signal_permille,
            threshold_permille=found.threshold_permille,
            recited=tuple(
                RecitedFacts(line.name, line.owner, line.example, line.signal_permille) for line in found.recited
            ),
        )

    def decide(self, finding: str, step: int) -> None:
        """Look into a finding that bars the release, hear the owners, decide.

        Raises:
            ProcessFailed: it is about something else than recited examples, or a command fails.
        """
        survey = self.survey()
        if finding != survey.evaluation:
            raise ProcessFailed(f"evaluation {finding} bars the release, and nobody here accepts that")
        text = (
            "the survey before the release finds what no check of a step saw: the model recites "
            f"{named(survey.recited)}; no step can be taken back for it now, and the log bars the release"
        )
        self.tell(Moment("finding", self.clock(), step, text))
        licences = {source.description.name: source.description.licence for source in self.claims.sources}
        judgement = judged(survey.recited, licences, self.claims.corpus.canary)
        for owner, note in judgement.notes.items():
            self._add(owner, finding, NOTE, note)
            self.tell(Moment("decision", self.clock(), step, f"{owner}, on the log: {note}"))
        self._add(COUNCIL, finding, judgement.outcome, judgement.rationale)
        said = {ACCEPT: "accepts", REJECT: "rejects"}[judgement.outcome]
        text = f"{COUNCIL} {said} the finding, on the log: {judgement.rationale}"
        self.tell(Moment("decision", self.clock(), step, text))

    def _add(self, member: str, finding: str, outcome: str, rationale: str) -> None:
        arguments = ["decision", "add", "--config", self._config(member), "--campaign", self.claims.access.campaign]
        arguments += ["--about", finding, "--outcome", outcome, "--rationale", rationale, "--submit"]
        output = self._run(*arguments)
        try:
            decided = msgspec.json.decode(output, type=DecidedLine)
        except msgspec.DecodeError as error:
            raise ProcessFailed(f"countersign decision add printed no answer; {log_tail(self._log)}") from error
        if decided.status != "final":
            raise ProcessFailed(f"the decision of {member} is {decided.status}; {log_tail(self._log)}")

    def _run(self, *arguments: str) -> bytes:
        name = f"countersign {arguments[0]} {arguments[1]}"
        _, output = self.processes.run(name, countersign_command(*arguments, "--json"), self._log, COMMAND_SECONDS)
        if not self._log.stat().st_size:
            self._log.unlink()
        return output

    @property
    def _log(self) -> Path:
        return self.consortium.directory / "decision.log"

    def _config(self, member: str) -> str:
        return str(self.consortium.nodes[member].files.config)


def judged(recited: Sequence[RecitedFacts], licences: Mapping[str, str], secret: str) -> Judgement:
    """What the parties say to these examples; ``licences`` by source, ``secret`` the source that must not leak."""
    leaked = any(each.source == secret for each in recited)
    notes = {}
    for owner in sorted({each.owner for each in recited}):
        own = [each for each in recited if each.owner == owner]
        if any(each.source == secret for each in own):
            notes[owner] = f"{named(own)}: {secret} holds what must not leave; do not release"
        else:
            terms = ", ".join(sorted({licences[each.source] for each in own}))
            notes[owner] = f"{named(own)}: published under {terms}, anybody may copy it; no objection"
    if leaked:
        return Judgement(REJECT, f"a text of {secret} must not leave with the weights: no release", notes)
    rationale = (
        f"{count_of(recited)} can be had from the weights word for word, found after the last step, too late to undo; "
        f"only published texts, and {' and '.join(notes)} {'has' if len(notes) == 1 else 'have'} no objection: "
        "released, with this finding on the log"
    )
    return Judgement(ACCEPT, rationale, notes)


def named(recited: Sequence[RecitedFacts]) -> str:
    """The strongest of them, with how strongly, and how many more."""
    shown = [f"example {each.example} of {each.source} ({each.signal_permille} ‰)" for each in recited]
    more = len(shown) - NAMED_IN_A_SENTENCE
    return ", ".join(shown[:NAMED_IN_A_SENTENCE]) + (f" and {more} more" if more > 0 else "")


def count_of(recited: Sequence[RecitedFacts]) -> str:
    """How many examples."""
    return f"{len(recited)} example{'' if len(recited) == 1 else 's'}"
