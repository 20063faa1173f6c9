"""The fine-tune as the demonstration sees it: the job's process, and what is done to it on the way.

The job is ``trainer_client.demo.job``; its standard output is one JSON object a line. Two things happen to it. Its
operator's node is killed with ``kill -9`` and started again some steps later, while the job trains on inside its
grant. And one source is revoked by its owner at about half of the steps: open grants run out, the next is asked
for without it.
"""

import json
import queue
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from consensus.rejection import Unavailable
from node.demo.consortium import GUILD, LABORATORY, PURPOSE, Consortium, JobAccess, SignedSource
from node.demo.display import Display, TrainingView
from node.demo.facts import CustodyFacts, Moment
from node.demo.processes import Child, Processes, ProcessFailed

KILL_AT_PERCENT = 25
REVOKE_AT_PERCENT = 50
STEPS_DOWN_PERCENT = 6
SECONDS_DOWN = 8.0
STATUS_SECONDS = 0.7
BATCH_SIZE = 22
"""So that twelve steps are a pass over the manifest, and as many of a step are admitted as sources without reserves
would leave of one of sixteen."""
CHECK_MEMORIZATION_EVERY_STEPS = 15
ACCUMULATOR_WINDOW_STEPS = 30
SKETCH_RANK = 2
DECISION_WAIT_SECONDS = 120.0
CUSTODY_WAIT_SECONDS = 300.0
PATIENCE_SECONDS = 240.0
"""A job that says nothing for so long is given up."""

Tell = Callable[[Moment], None]

_REASON = re.compile(r"[a-z]+(?:-[a-z]+)+")
_STEPS = re.compile(r"steps (\d+) to (\d+)")


class JobLine(msgspec.Struct, frozen=True):
    """One line of the job; see ``trainer_client.progress.Progress``."""

    event: str
    step: int = 0
    of: int = 0
    attempt: int = 0
    loss: float | None = None
    refused: int = 0
    detail: str = ""
    id: str = ""


class Completion(msgspec.Struct, frozen=True):
    """What one model made of a prompt."""

    text: str
    exact: bool
    probability: float


class FactLine(msgspec.Struct, frozen=True):
    """A planted fact in the job's summary."""

    source: str
    prompt: str
    completion: str
    base: Completion
    tuned: Completion


class PassLine(msgspec.Struct, frozen=True):
    """What the memorization check said of the owners' reserves as a pass over the manifest ended."""

    reserve_flagged: int
    reserve_assessed: int


class JobSummary(msgspec.Struct, frozen=True):
    """The part of the job's ``summary.json`` that the report uses."""

    steps: int
    rollbacks: int
    release: str
    facts: tuple[FactLine, ...]
    paused_seconds: float
    step_overhead_percent: float
    memorization_overhead_percent: float = 0.0
    memorization_passes: tuple[PassLine, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How long, and from where the base model comes."""

    steps: int
    cache_directory: Path
    base_steps: int | None
    job_module: str = "trainer_client.demo.job"


@dataclass(slots=True)
class Disruption:
    """The node that is killed and comes back."""

    killed_at_step: int | None = None
    killed_at: float = 0.0
    restarted: bool = False
    back_at_step: int | None = None


@dataclass(slots=True)
class Training:
    """One run of the job. ``run`` it once."""

    consortium: Consortium
    processes: Processes
    display: Display
    tell: Tell
    clock: Callable[[], float]
    """Seconds since the demonstration began."""
    sources: tuple[SignedSource, ...]
    revoked: SignedSource
    access: JobAccess
    options: TrainingOptions
    decide: Callable[[str, int], None]
    """What is done about a finding that bars the release; the last step."""
    hand_over: Callable[[int], CustodyFacts]
    """What is done about a release that waits for custody; the last step."""
    view: TrainingView = field(init=False)
    disruption: Disruption = field(default_factory=Disruption)
    revocation: str = ""
    custody: CustodyFacts | None = None
    _revocation_final: bool = False
    _granted_until: int = 0
    _reasons: set[str] = field(default_factory=set)
    _losses: dict[int, float] = field(default_factory=dict)
    _refused: dict[int, int] = field(default_factory=dict)
    _asked_status: float = 0.0

    def __post_init__(self) -> None:
        self.view = TrainingView(self.options.steps, nodes=dict.fromkeys(self.consortium.nodes, "up"))

    @property
    def directory(self) -> Path:
        """Where the job keeps its records."""
        return self.consortium.directory / "job"

    @property
    def base_file(self) -> Path:
        """Where the job leaves the base model's weights."""
        return self.directory / "base.safetensors"

    @property
    def accumulators(self) -> Path:
        """Where the job keeps what each source added to the gradients."""
        return self.directory / "accumulators"

    @property
    def base_losses(self) -> Path:
        """Where the job wrote what the base model loses on each example."""
        return self.directory / "base-losses" / f"{self.access.campaign}.losses"

    @property
    def manifest(self) -> Path:
        """Where the job lists how strongly the model recites each example that it was shown."""
        return self.directory / "memorization.jsonl"

    @property
    def release_file(self) -> Path:
        """Where the job leaves the fine-tuned weights."""
        return self.consortium.directory / "release" / "model.safetensors"

    def run(self) -> JobSummary:
        """Start the job, watch and disrupt it, return what it sums up.

        Raises:
            ProcessFailed: the job or a node ended, or the job falls silent.
        """
        self.directory.mkdir()
        self.release_file.parent.mkdir()
        config = self.directory / "job.json"
        config.write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", self.options.job_module, "--config", str(config)]
        job = self.processes.start("the training job", command, self.directory / "job.log", read_lines=True)
        with self.display.training(self.view):
            self._follow(job)
        if not job.wait(30.0):
            raise ProcessFailed("the training job said it was done and did not end")
        job.check()
        summary = (self.directory / "summary.json").read_bytes()
        return msgspec.json.decode(summary, type=JobSummary)

    def _config(self) -> dict[str, object]:
        config: dict[str, object] = {
            "node_url": self.consortium.nodes[LABORATORY].url,
            "chain_id": self.consortium.chain_id.hex(),
            "operator": self.consortium.member(LABORATORY).member.id.hex(),
            "campaign": self.access.campaign,
            "job_key_file": str(self.access.key_file.resolve()),
            "run_directory": str(self.directory.resolve()),
            "release_file": str(self.release_file.resolve()),
            "base_file": str(self.base_file.resolve()),
            "cache_directory": str(self.options.cache_directory.resolve()),
            "purpose": PURPOSE,
            "steps": self.options.steps,
            "batch_size": BATCH_SIZE,
            "check_memorization_every_steps": CHECK_MEMORIZATION_EVERY_STEPS,
            "accumulator_window_steps": ACCUMULATOR_WINDOW_STEPS,
            "sketch_rank": SKETCH_RANK,
            "decision_wait_seconds": DECISION_WAIT_SECONDS,
            "custody_wait_seconds": CUSTODY_WAIT_SECONDS,
            "sources": [
                {
                    "id": source.id,
                    "name": source.description.name,
                    "file": str((self.consortium.directory / source.description.file).resolve()),
                    "content_salt": source.salt.hex(),
                }
                for source in self.sources
            ],
        }
        if self.options.base_steps is not None:
            config["base_steps"] = self.options.base_steps
        return config

    def _follow(self, job: Child) -> None:
        heard = time.monotonic()
        while True:
            try:
                line = job.lines.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() - heard > PATIENCE_SECONDS:
                    raise ProcessFailed(f"the training job has said nothing for {PATIENCE_SECONDS:.0f} s") from None
            else:
                if line is None:
                    job.wait(10.0)
                    job.check()
                    return
                self._heard(msgspec.json.decode(line, type=JobLine))
                heard = time.monotonic()  # a decision or a hand-over, for which the job waits, is over by now
            self.consortium.check()
            self._disrupt()
            self._ask_status()

    # What the job says

    def _heard(self, line: JobLine) -> None:
        match line.event:
            case "base":
                self.view.base_first = self.view.base_first or line.step
                self.view.base_step, self.view.base_of = line.step, line.of
                self.display.base_trained(self.view)
            case "campaign":
                self._moment(
                    "claim",
                    "the job opened its campaign: base model, parameters, examples, what the base model loses on each "
                    "of them, and seed are fixed",
                    None,
                )
            case "grant":
                self._granted(line)
            case "refusal":
                self._refusal(line)
            case "rollback":
                self._rolled_back(line)
            case "recovery":
                self._moment(
                    "rollback", f"the log refused a step ({line.detail}); the job restored its snapshot", line.step
                )
            case "step":
                self._stepped(line)
            case "finding":
                self.decide(line.id, line.step)
            case "custody":
                self.custody = self.hand_over(line.step)
            case _:
                pass

    def _granted(self, line: JobLine) -> None:
        first = not self._granted_until
        steps = _STEPS.search(line.detail)
        if steps is not None:
            self._granted_until = max(self._granted_until, int(steps[2]))
        self.view.grant = line.detail
        if first:
            self._moment("grant", f"first grant, signed by all whom it names: {line.detail}", None)
        else:
            self._moment("grant", f"grant renewed ahead of time: {line.detail}", max(self.view.step, 1))

    def _refusal(self, line: JobLine) -> None:
        new = sorted(set(_REASON.findall(line.detail)) - self._reasons)
        if new:
            self._reasons.update(new)
            self._moment("refusal", f"refused from here on: {', '.join(new)}", line.step)

    def _rolled_back(self, line: JobLine) -> None:
        self.view.rollbacks += 1
        text = "undone again: the model recited more of what it was shown"
        if self.view.rollbacks == 1:
            text = (
                "undone bit for bit: the model recited its training text; "
                "the step is taken again without those examples, for good"
            )
        self._moment("rollback", text, line.step)

    def _stepped(self, line: JobLine) -> None:
        self.view.step = line.step
        if line.loss is not None:
            self._losses[line.step] = line.loss
        self._refused[line.step] = line.refused
        self.view.losses = [self._losses[step] for step in sorted(self._losses)]
        self.view.refused = sum(self._refused.values())
        self.view.reasons = sorted(self._reasons)
        self.display.trained(self.view)

    # What is done to it

    def _disrupt(self) -> None:
        self._kill_and_restart()
        if not self.revocation and 100 * self.view.step >= REVOKE_AT_PERCENT * self.options.steps:
            if self.disruption.killed_at_step is not None and self.disruption.back_at_step is None:
                return
            self.revocation = self.consortium.revoke(self.revoked, "the author withdrew consent")
            self._moment(
                "revocation",
                f"{self.revoked.description.owner} withdraws {self.revoked.description.name}; "
                f"granted steps (up to {self._granted_until}) run out, the next grant is without it",
                self.view.step,
            )

    def _kill_and_restart(self) -> None:
        disruption, node = self.disruption, self.consortium.nodes[LABORATORY]
        pause = max(2, STEPS_DOWN_PERCENT * self.options.steps // 100)
        if disruption.killed_at_step is None:
            due = 100 * self.view.step >= KILL_AT_PERCENT * self.options.steps
            if due and self._granted_until - self.view.step >= 2 * pause:
                node.kill()
                disruption.killed_at_step, disruption.killed_at = self.view.step, time.monotonic()
                self.view.nodes[LABORATORY] = "down"
                self._moment(
                    "killed",
                    "kill -9: the operator's node is gone, the job trains on inside its grant",
                    self.view.step,
                )
        elif not disruption.restarted:
            waited = time.monotonic() - disruption.killed_at
            if self.view.step - disruption.killed_at_step >= pause or waited > SECONDS_DOWN:
                node.start()
                disruption.restarted = True
        elif disruption.back_at_step is None:
            answer = node.status()
            if answer is not None and len(answer.peers_connected) == answer.peers_total:
                disruption.back_at_step = self.view.step
                self.view.nodes[LABORATORY] = "back"
                taken = self.view.step - disruption.killed_at_step
                waited = time.monotonic() - disruption.killed_at
                self._moment(
                    "back",
                    f"the operator's node is back after {waited:.1f} s; the job took {taken} steps meanwhile "
                    "and hands them in now",
                    self.view.step,
                )

    def _ask_status(self) -> None:
        if time.monotonic() - self._asked_status < STATUS_SECONDS:
            return
        answer = self.consortium.nodes[GUILD].status()
        if answer is not None:
            self.view.height, self.view.log_size = answer.height, answer.log_size
        if self.view.nodes[LABORATORY] != "down":
            operator = self.consortium.nodes[LABORATORY].status()
            if operator is not None:
                self.view.finality_ms = operator.finality.median_ms
        if self.revocation and not self._revocation_final:
            self._follow_revocation()
        self._asked_status = time.monotonic()

    def _follow_revocation(self) -> None:
        owner = self.consortium.nodes[self.revoked.description.owner]
        try:
            answer = owner.client.event(self.revocation)
        except Unavailable:
            return
        if answer.status == "final":
            self._revocation_final = True
            self.display.done(f"the revocation is final in ledger block {answer.height}")

    def _moment(self, kind: str, text: str, step: int | None) -> None:
        self.tell(Moment(kind, self.clock(), step, text))
