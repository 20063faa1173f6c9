"""What governing a training step costs, in CPU seconds on one thread.

A plain AdamW step, the same step routed by per-example weights, without and with sketches and accumulators, the routed
steps with all that is recorded of each, and the plain step again take turns on one model: the ratio of the two plain
ones (the A/A control) says how far this machine can be trusted, the ratios of the others to plain are the overhead.
With ``--peers`` plain steps with what others do beside them take turns, too (``trainer_peers.py``).
*Recorded* is copies of the parameters, roots and deltas, the optimizer's digest and the signed event, every step;
hashing has threads of its own, whose processor time counts. Commitments and event are measured apart, too, as parts of
a plain step.

Two models: the demonstration's byte model, and a GPT of about 20 million parameters (8 layers of width 256, 50,257
tokens, tied head). Three examples in four are admitted everywhere, one in four only above the lower half.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from harness import Report, at_most, run_benchmark, watch_load
from torch import Tensor, nn
from torch.nn import functional
from trainer_peers import peer_steps

from consensus import portions as p
from consensus.identifiers import ChainId, Digest, MemberId
from consensus.keys import Ed25519SigningKey
from trainer_client.accumulators import SourceAccumulators
from trainer_client.commitment import (
    CommitmentWorker,
    copied_tensors,
    optimizer_state_digest,
    parameter_root_of,
    step_commitment,
)
from trainer_client.demo.model import ByteModel, ModelConfig, parameter_blocks
from trainer_client.pieces import whole_entries
from trainer_client.ranks import ALONE
from trainer_client.record import Permission, Place, Recorder, StepOutcome, StepUse
from trainer_client.routed_modules import observed_parameters
from trainer_client.routing import Routing
from trainer_client.scaling import Scaling
from trainer_client.sketches import SketchBook
from trainer_client.step_book import OptimizerDigests

GPT_TOKENS = 50_257
LEARNING_RATE = 1e-4
SKETCH_RANK = 1
SOURCES = 4
GPT_BATCH = 8
RECORDED = "routed and recorded"
FLOORS = {RECORDED: 1.03, f"{RECORDED}, sketches of rank 1": 1.08}
"""Of the GPT; asked for where the control is within half of what they allow."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under measurement."""

    name: str
    model: ByteModel
    tokens: int
    batch_size: int
    rounds: int

    @property
    def blocks(self) -> Mapping[str, tuple[str, ...]]:
        """Its parameter table."""
        return {name: names for name, names in parameter_blocks(self.model).items() if names}


def byte_model(quick: bool) -> Subject:
    """The demonstration's model."""
    return Subject("byte model, 0.9 M", ByteModel(ModelConfig()), 256, 16, 8 if quick else 40)


def gpt(quick: bool) -> Subject:
    """8 layers of width 256 with the vocabulary of GPT-2 and a tied head."""
    model = ByteModel(ModelConfig(layer_count=8, head_count=8, width=256))
    model.byte_embedding = nn.Embedding(GPT_TOKENS, 256)
    model.head = nn.Linear(256, GPT_TOKENS, bias=False)
    nn.init.normal_(model.byte_embedding.weight, std=0.02)
    model.head.weight = model.byte_embedding.weight
    return Subject("GPT 8x256, 19 M", model, GPT_TOKENS, GPT_BATCH, 3 if quick else 12)


class StepEvents:
    """Builds and signs the events of steps over one model."""

    def __init__(self, subject: Subject) -> None:
        blocks = list(subject.blocks)
        self._source = hashlib.sha256(b"source").digest()
        self._use = StepUse(frozenset((self._source, number) for number in range(subject.batch_size)), {})
        self._root = Digest(hashlib.sha256(b"root").digest())
        self._place = Place(1, 0, 0, self._root, self._root, None)
        self._profile = p.ClassProfile("documentation", 0, tuple(1_000 for _ in blocks))
        self._deltas = tuple(p.BlockDelta(1, self._root) for _ in blocks)
        self._recorder = Recorder(
            ChainId(bytes(32)), MemberId(bytes(32)), bytes(32), Ed25519SigningKey(bytes(32)), lambda: bytes(32)
        )

    def build(self) -> None:
        """One event."""
        self._recorder.move_to(self._place)
        outcome = StepOutcome(self._root, self._root, self._deltas, self._root, 1, 1, self._root, (), 1)
        permission = Permission(bytes(32), bytes(32))
        classes = {self._source: "documentation"}
        self._recorder.step(permission, self._use, classes, (self._profile,), outcome)


class Steps:
    """Plain and routed steps of one model on the same batch."""

    def __init__(self, subject: Subject, directory: Path) -> None:
        self._model = subject.model
        self._batch_size = subject.batch_size
        self.optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE)
        length = self._model.config.context_bytes
        self._records_BT = torch.randint(subject.tokens, (subject.batch_size, length + 1))
        blocks = list(subject.blocks.values())
        self._block_of = {name: index for index, names in enumerate(blocks) for name in names}
        self._sources = [bytes([row % SOURCES]) * 32 for row in range(subject.batch_size)]
        self._book = SketchBook(SKETCH_RANK)
        self._book.attach(observed_parameters(self._model))
        self._accumulators = SourceAccumulators(directory, bytes(32), 1 << 30, 1 << 30, SKETCH_RANK)
        self._accumulators.attach(self._model, self._block_of, whole_entries(self._model))
        self._done = 0
        self._before: dict[str, Tensor] = {}
        self._worker = CommitmentWorker(subject.blocks)
        self._digests = OptimizerDigests(ALONE, is_sharded=False)
        self._events = StepEvents(subject)
        routed = Routing(self._model, self._block_of)
        sketched = Routing(self._model, self._block_of, None, self._book)
        self.routings = {
            "routed": routed,
            "routed, sketches of rank 1": sketched,
            "routed, accumulators and sketches of rank 1": Routing(
                self._model, self._block_of, self._accumulators, self._accumulators.sketches
            ),
            RECORDED: routed,
            f"{RECORDED}, sketches of rank 1": sketched,
        }
        full, upper = [1_000] * len(blocks), [0] * (len(blocks) // 2) + [1_000] * (len(blocks) - len(blocks) // 2)
        self._weights_BK = [upper if row % 4 == 3 else full for row in range(subject.batch_size)]

    def _loss_B(self) -> Tensor:
        logits_BTV = self._model(self._records_BT[:, :-1])
        loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), self._records_BT[:, 1:], reduction="none")
        return loss_BT.mean(dim=1)

    def plain(self) -> None:
        """Forward, backward, AdamW."""
        (self._loss_B().sum() / self._batch_size).backward()  # type: ignore[no-untyped-call]
        self._update()

    def routed(self, kind: str) -> None:
        """The same inside a routed micro-batch; the routing of that kind is installed already."""
        routing = self.routings[kind]
        self._done += 1
        first = self._done * self._batch_size
        examples = [(source, first + row) for row, source in enumerate(self._sources)]
        for watcher in (self._book, self._accumulators):
            watcher.expect(self._done, examples)
        with routing.micro_batch(self._weights_BK, self._sources):
            routing.routed_loss(self._loss_B(), self._batch_size).backward()  # type: ignore[no-untyped-call]
        routing.finish_step()
        if "accumulators" in kind:
            scaled = Scaling(self.optimizer, clip_norm=1e9).finish(self._model, self._block_of)
            self._accumulators.take_step(bytes(32), self.optimizer, scaled.factors)
        elif "sketches" in kind:
            self._book.take_step(bytes(32), {})
        self.optimizer.step()
        if RECORDED in kind:
            before, self._before = self._before or copied_tensors(self._model), copied_tensors(self._model)
            commitment = self._worker.submit(before, self._before)
            self._digests.begin(self.optimizer)
            commitment.result()
            self._digests.finish()
            self._events.build()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Waits for what runs beside."""
        self._accumulators.close()
        self._worker.close()
        self._digests.close()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def cpu_seconds_of(call: Callable[[], object]) -> float:
    """CPU time of this process, all threads, for one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def measure_routing(report: Report, subject: Subject, *, peers: bool) -> float:
    """Interleaved plain, routed and plain steps, and ``peers``'; returns the plain step's CPU seconds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps = Steps(subject, folder)
        others = stack.enter_context(peer_steps(steps.plain, subject.model, folder)) if peers else {}
        first: list[float] = []
        governed: dict[str, list[float]] = {kind: [] for kind in (*steps.routings, *others)}
        second: list[float] = []
        with watch_load() as load:
            for number in range(-1, subject.rounds):
                one = cpu_seconds_of(steps.plain)
                took = {}
                for kind, routing in steps.routings.items():
                    with routing:
                        took[kind] = cpu_seconds_of(partial(steps.routed, kind))
                took |= {kind: cpu_seconds_of(step) for kind, step in others.items()}
                other = cpu_seconds_of(steps.plain)
                if number >= 0:  # the first round warms up
                    first.append(one)
                    second.append(other)
                    for kind, seconds in took.items():
                        governed[kind].append(seconds)
        steps.close()
    plain = statistics.median(first + second)
    report.samples(f"{subject.name}: plain step", [1_000 * value for value in first + second], "ms CPU", None, load)
    control = statistics.median(two / one for one, two in zip(first, second, strict=True))
    report.rate(f"{subject.name}: A/A control, plain / plain", control, "1", load=load)
    for kind, values in governed.items():
        ratios = [2 * value / (one + two) for one, value, two in zip(first, values, second, strict=True)]
        floor = FLOORS.get(kind) if subject.batch_size == GPT_BATCH else None
        conclusive = floor is not None and abs(control - 1) <= (floor - 1) / 2
        if floor is not None and not conclusive:
            report.note(f"{subject.name}: {kind} has the floor {floor}; the control is too far from 1 to ask for it")
        bound = at_most(floor) if floor is not None and conclusive else None
        report.rate(f"{subject.name}: {kind} / plain", statistics.median(ratios), "1", bound, load)
    measure_commitment(report, subject, steps.optimizer, plain)
    return plain


def measure_commitment(report: Report, subject: Subject, optimizer: torch.optim.Optimizer, plain: float) -> None:
    """Copies, roots, deltas and the optimizer's digest, as parts of a plain step."""
    model, repeats = subject.model, max(3, subject.rounds // 2)
    before, after = copied_tensors(model), copied_tensors(model)
    known = parameter_root_of(model)
    parts: dict[str, Callable[[], object]] = {
        "snapshot of the parameters": lambda: copied_tensors(model),
        "roots and deltas": lambda: step_commitment(before, after, subject.blocks, known),
        "optimizer state digest": lambda: optimizer_state_digest(optimizer),
    }
    for part, call in parts.items():
        seconds = statistics.median(cpu_seconds_of(call) for _ in range(repeats))
        report.rate(f"{subject.name}: {part}", 1_000 * seconds, "ms CPU")
        report.rate(f"{subject.name}: {part} / plain step", seconds / plain, "1")


def measure_event(report: Report, subject: Subject, plain: float) -> None:
    """Building and signing the event of a step over this model."""
    events, calls = StepEvents(subject), 50

    def build_many() -> None:
        for _ in range(calls):
            events.build()

    report.time_calls(f"{subject.name}: step event, built and signed", events.build, 10, calls)
    seconds = cpu_seconds_of(build_many) / calls
    report.rate(f"{subject.name}: step event / plain step", seconds / plain, "1")


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """Both models, one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    report.note("one thread; ratios are medians over interleaved rounds, CPU time of the whole process")
    for make in (byte_model, gpt):
        subject = make(arguments.quick)
        measure_event(report, subject, measure_routing(report, subject, peers=arguments.peers))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a governed training step.")
    parser.add_argument("--peers", action="store_true", help="also MLflow's and model-signing's part, if installed")
    return run_benchmark("trainer", measure, parser)


if __name__ == "__main__":
    sys.exit(main())
