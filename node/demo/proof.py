"""The rights-holder's proofs: bundles from its own node, checked by ``countersign verify`` in fresh processes.

The command that is run is the one that is printed: paths as the person gave ``--out``, so that it can be repeated
word for word in the same directory and shell.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from consensus.predicates import Predicate
from node.demo.closing import as_typed
from node.demo.consortium import GUILD, Consortium
from node.demo.facts import CheckFacts
from node.demo.processes import Processes, ProcessFailed, countersign_command, log_tail

VERIFY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """A predicate, what it asks in plain words, and what it is asked about, by the names of the HTTP interface."""

    predicate: Predicate
    words: str
    about: str
    subject: Mapping[str, str]


class StepLine(msgspec.Struct, frozen=True):
    """A numbered step of ``countersign verify --json``."""

    number: int
    status: str
    text: str


class VerdictLine(msgspec.Struct, frozen=True):
    """What ``countersign verify --json`` prints; a refused bundle has ``error`` and ``detail`` and no steps."""

    answer: str
    steps: tuple[StepLine, ...] = ()
    error: str = ""
    detail: str = ""


def questions(campaign: str, release: str, revoked: tuple[str, str], refused: tuple[str, str]) -> list[Question]:
    """What the rights-holder asks; ``revoked`` and ``refused`` are a source's name and id."""
    of_campaign = {"campaign": campaign}
    return [
        Question(
            Predicate.INCLUDED,
            "Is the release on the log?",
            "the release event",
            {"event": release},
        ),
        Question(
            Predicate.POLICY_IN_FORCE,
            "Did every step obey the policy in force?",
            "the campaign",
            of_campaign,
        ),
        Question(
            Predicate.SOURCE_HONORED,
            f"Was every use of {revoked[0]} granted by its owner?",
            f"the source {revoked[0]}",
            {**of_campaign, "source": revoked[1]},
        ),
        Question(
            Predicate.SOURCE_UNUSED,
            f"Was nothing of {refused[0]} trained on?",
            f"the source {refused[0]}",
            {**of_campaign, "source": refused[1]},
        ),
        Question(
            Predicate.DELTA_EXACT,
            "Are these weights what the recorded steps ended in?",
            "the campaign and the released file",
            of_campaign,
        ),
        Question(
            Predicate.REFUSALS_COMPLETE,
            "Is every example admitted, or refused for the true reason?",
            "the campaign",
            of_campaign,
        ),
        Question(
            Predicate.ACCUMULATORS,
            "Is it committed what each source added to the weights?",
            "the campaign",
            of_campaign,
        ),
        Question(
            Predicate.EVALUATED,
            "Were these weights evaluated, with no finding open?",
            "the campaign",
            of_campaign,
        ),
    ]


def bundle_path(consortium: Consortium, predicate: Predicate) -> Path:
    """Where the bundle for a predicate is kept."""
    return consortium.directory / "bundles" / f"{predicate.value}.bundle"


def export(consortium: Consortium, asked: Question) -> Path:
    """The bundle for a question, from the rights-holder's node, as ``DIR/bundles/PREDICATE.bundle``."""
    path = bundle_path(consortium, asked.predicate)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(consortium.nodes[GUILD].client.bundle(asked.predicate.value, dict(asked.subject)))
    return path


def check(consortium: Consortium, processes: Processes, asked: Question, bundle: Path) -> CheckFacts:
    """Ask in a fresh process that knows the genesis file, the chain id and the bundle.

    Raises:
        ProcessFailed: it does not answer at all.
    """
    arguments = [
        "verify",
        asked.predicate.value,
        "--bundle",
        str(bundle),
        "--genesis",
        str(consortium.directory / "genesis.json"),
        "--chain-id",
        consortium.chain_id.hex(),
    ]
    log = bundle.with_suffix(".log")
    started = time.perf_counter()
    name = f"countersign verify {asked.predicate.value}"
    _, output = processes.run(name, countersign_command(*arguments, "--json"), log, VERIFY_SECONDS)
    seconds = time.perf_counter() - started
    try:
        verdict = msgspec.json.decode(output, type=VerdictLine)
    except msgspec.DecodeError as error:
        raise ProcessFailed(f"{name} printed no answer; {log_tail(log)}") from error
    if not log.stat().st_size:
        log.unlink()
    steps = tuple((step.number, step.status, step.text) for step in verdict.steps)
    if verdict.error:
        steps = ((1, "failed", f"{verdict.error}: {verdict.detail}"),)
    return CheckFacts(
        predicate=asked.predicate.value,
        question=asked.words,
        about=asked.about,
        answer=verdict.answer,
        steps=steps,
        command=as_typed(*arguments),
        bundle_bytes=bundle.stat().st_size,
        seconds=seconds,
    )
