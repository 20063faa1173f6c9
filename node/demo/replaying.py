"""The fine-tune again, by ``countersign replay``: every step held against the log, then the same without one source."""

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from node.demo.closing import as_typed
from node.demo.consortium import GUILD, SignedSource
from node.demo.facts import ReplayFacts
from node.demo.processes import ProcessFailed, countersign_command, log_tail
from node.demo.training import Training

REPLAY_SECONDS = 900.0
RECORD_SECONDS = 60.0
JOB = "trainer_client.demo.job:replay_job"


class DifferenceLine(msgspec.Struct, frozen=True):
    """The first step that came out otherwise."""

    step: int
    what: tuple[str, ...]


class ReplayLine(msgspec.Struct, frozen=True):
    """What ``countersign replay --json`` prints."""

    steps: int
    replayed: int
    matched: int
    difference: DifferenceLine | None


class RecordedLine(msgspec.Struct, frozen=True):
    """What ``countersign audit record --json`` prints."""

    id: str
    status: str


@dataclass(frozen=True, slots=True)
class Replays:
    """Runs replays of one training, reading the campaign from the rights-holder's node."""

    training: Training

    @property
    def weights_without(self) -> Path:
        """Where the weights go that came out without a source."""
        return self.training.consortium.directory / "replay" / "without.safetensors"

    def run(self, left_out: SignedSource) -> ReplayFacts:
        """Replay everything, then all but one source.

        Raises:
            ProcessFailed: a replay does not come to an end.
        """
        self.weights_without.parent.mkdir(exist_ok=True)
        started = time.perf_counter()
        whole = self._replay("--report", str(self._found))
        self._replay("--without", left_out.id, "--out", str(self.weights_without))
        difference = ""
        if whole.difference is not None:
            difference = f"step {whole.difference.step}: {', '.join(whole.difference.what)}"
        return ReplayFacts(
            steps=whole.steps,
            matched=whole.matched,
            difference=difference,
            without=left_out.description.name,
            command=as_typed(*self._arguments()),
            seconds=time.perf_counter() - started,
        )

    def record(self) -> str:
        """Have the rights-holder sign what its whole replay found; the audit result's id.

        Raises:
            ProcessFailed: the log does not take it.
        """
        consortium = self.training.consortium
        log = self.weights_without.parent / "audit.log"
        config = str(consortium.nodes[GUILD].files.config)
        command = countersign_command("audit", "record", "--config", config, "--replay", str(self._found), "--json")
        code, output = self.training.processes.run("countersign audit record", command, log, RECORD_SECONDS)
        try:
            recorded = msgspec.json.decode(output, type=RecordedLine)
        except msgspec.DecodeError as error:
            raise ProcessFailed(f"countersign audit record printed no answer; {log_tail(log)}") from error
        if code != 0 or recorded.status != "final":
            raise ProcessFailed(f"the audit result is {recorded.status}; {log_tail(log)}")
        log.unlink()
        return recorded.id

    @property
    def _found(self) -> Path:
        """The whole replay's report."""
        return self.weights_without.parent / "replay.json"

    def _arguments(self) -> list[str]:
        consortium = self.training.consortium
        return [
            "replay",
            "--job",
            JOB,
            "--config",
            str(self.training.directory / "job.json"),
            "--node",
            consortium.nodes[GUILD].url,
            "--chain-id",
            consortium.chain_id.hex(),
            "--campaign",
            self.training.access.campaign,
            "--base-losses",
            str(self.training.base_losses),
        ]

    def _replay(self, *more: str) -> ReplayLine:
        log = self.weights_without.parent / "replay.log"
        command = countersign_command(*self._arguments(), *more, "--json")
        _, output = self.training.processes.run("countersign replay", command, log, REPLAY_SECONDS)
        try:
            found = msgspec.json.decode(output, type=ReplayLine)
        except msgspec.DecodeError as error:
            raise ProcessFailed(f"countersign replay printed no answer; {log_tail(log)}") from error
        if not log.stat().st_size:
            log.unlink()
        return found
