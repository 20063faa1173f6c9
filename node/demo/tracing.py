"""From outputs back to sources: the planted facts, asked of the log by ``countersign trace`` in a process of its own.

It is given what a rights-holder would be: the bundle from its own node, the genesis and the chain id, and both models'
weights; not the sources' texts, nor the run's folder. Sums and sketches it fetches from the custodian, each file held
to the log.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from node.demo.closing import as_typed
from node.demo.consortium import COUNCIL
from node.demo.facts import RankedFacts, RecallFacts, TraceFacts, TracingFacts
from node.demo.processes import ProcessFailed, countersign_command, log_tail
from node.demo.training import Training

TRACE_SECONDS = 300.0
MODEL = "trainer_client.demo.model:demonstration_model"


class ReceiptLine(msgspec.Struct, frozen=True):
    """The part of a row's receipt that is shown."""

    entry: int
    grants: tuple[str, ...]
    revocation: str


class SourceLine(msgspec.Struct, frozen=True):
    """A ranked source of ``countersign trace --json``."""

    name: str
    owner: str
    z: float
    admitted: int
    receipt: ReceiptLine


class TraceLine(msgspec.Struct, frozen=True):
    """An answer of ``countersign trace --json``."""

    made_likelier: bool
    shaped_here: bool
    controls: int
    says: Mapping[str, str]
    log_chance: Mapping[str, float]
    sources: tuple[SourceLine, ...]


def trace(training: Training, bundle: Path, without: Path, facts: Sequence[RecallFacts]) -> TracingFacts:
    """Ask the log about every fact's completion; ``without`` are weights of a replay without a source.

    Raises:
        ProcessFailed: it does not answer them all.
    """
    consortium = training.consortium
    directory = consortium.directory / "trace"
    directory.mkdir(exist_ok=True)
    outputs = directory / "outputs.jsonl"
    lines = [json.dumps({"prompt": fact.prompt, "completion": fact.completion}) + "\n" for fact in facts]
    outputs.write_text("".join(lines), encoding="utf-8")
    files: Mapping[str, Path] = {
        "--base": training.base_file,
        "--tuned": training.release_file,
        "--text": consortium.directory / "public.txt",
        "--accumulators": directory / "accumulators",
        "--bundle": bundle,
        "--genesis": consortium.directory / "genesis.json",
        "--without-weights": without,
    }
    arguments = ["trace", "--model", MODEL, "--chain-id", consortium.chain_id.hex()]
    for option, path in files.items():
        arguments += [option, str(path)]
    arguments += ["--custodian", consortium.nodes[COUNCIL].url]
    log = directory / "trace.log"
    started = time.perf_counter()
    page = consortium.directory / "trace.html"
    command = countersign_command(*arguments, "--outputs", str(outputs), "--json", "--html", str(page))
    code, output = training.processes.run("countersign trace", command, log, TRACE_SECONDS)
    seconds = time.perf_counter() - started
    try:
        answers = [msgspec.json.decode(line, type=TraceLine) for line in output.splitlines()]
    except msgspec.DecodeError as error:
        raise ProcessFailed(f"countersign trace printed no answer; {log_tail(log)}") from error
    if code != 0 or len(answers) != len(facts):
        raise ProcessFailed(f"countersign trace answered {len(answers)} of {len(facts)} questions; {log_tail(log)}")
    if not log.stat().st_size:
        log.unlink()
    asked = ["--prompt", facts[0].prompt, "--completion", facts[0].completion]
    return TracingFacts(
        traces=tuple(_trace(fact, answer) for fact, answer in zip(facts, answers, strict=True)),
        command=as_typed(*arguments, *asked),
        controls=min(answer.controls for answer in answers),
        seconds=seconds,
    )


def _trace(fact: RecallFacts, answer: TraceLine) -> TraceFacts:
    ranked = tuple(
        RankedFacts(
            source=row.name,
            owner=row.owner,
            z=row.z,
            admitted=row.admitted,
            entry=row.receipt.entry,
            grants=len(row.receipt.grants),
            revoked=bool(row.receipt.revocation),
        )
        for row in answer.sources
    )
    return TraceFacts(
        fact=fact,
        made_likelier=answer.made_likelier,
        shaped_here=answer.shaped_here,
        ranked=ranked,
        without_says=answer.says["without"],
        without_probability=math.exp(answer.log_chance["without"]),
    )
