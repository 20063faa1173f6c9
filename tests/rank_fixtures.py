"""Jobs of several processes: a scene's run on each of them, over gloo.

``python -m rank_fixtures SPECIFICATION RANK`` is one of them.
"""

import copy
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from governed_fixtures import Scene, losses
from torch import nn

from consensus.identifiers import ChainId, MemberId
from consensus.rejection import CountersignError
from trainer_client.record import Example

TIMEOUT_SECONDS = 300
KINDS = ("DDP", "FSDP2")


@dataclass(frozen=True)
class NodeAt:
    """What a scene needs of a node, as another process can have it."""

    url: str
    chain_id: ChainId
    operator: MemberId

    def member_id(self, name: str) -> MemberId:
        assert name == "operator-1"
        return self.operator


@dataclass(frozen=True)
class Attempt:
    """A run of the scene. ``changes`` are of one rank's scene, by rank; ``kill`` is a rank and the step it dies at."""

    kind: str
    kill: tuple[int, int] | None = None
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Specification:
    """Runs of a scene one after the other, on ``ranks`` processes."""

    attempts: tuple[Attempt, ...]
    ranks: int
    node: NodeAt
    scene: dict[str, Any]
    meeting: Path


@dataclass
class Outcome:
    """How a rank's run ended: what it was shown by step, its stand-ins, its weights, or its error."""

    seen: list[tuple[int, Example]] = field(default_factory=list)
    stand_ins: int = 0
    replayed: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    recoveries: int = 0
    rollbacks: int = 0
    error: str = ""
    error_type: str = ""


CARRIED = ("texts", "sources", "settings", "plan_changes", "arguments", "build", "salt", "campaign", "key")


class Recites:
    """A memorization check that finds an example of one source recited when it is assessed first."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.found = False

    def glance(self, shown: Mapping[Example, bytes], hits_BT: torch.Tensor, floor: int) -> list[Example]:
        return []

    def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        own = [example for example in sorted(shown) if example[0] == self.source]
        if self.found or not own:
            return {}
        self.found = True
        return {own[0]: 601}


def run_on_ranks(scene: Scene, *attempts: Attempt, ranks: int = 2) -> list[list[Outcome]]:
    """Runs of the scene on so many processes; of each attempt what each of them reports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "specification"
        specification = Specification(
            attempts,
            ranks,
            NodeAt(scene.node.url, scene.node.chain_id, scene.node.member_id("operator-1")),
            {"directory": scene.directory, **{name: getattr(scene, name) for name in CARRIED}},
            Path(folder) / "meeting",
        )
        path.write_bytes(pickle.dumps(specification))
        tests = Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "default",
        }
        command = [sys.executable, "-m", "rank_fixtures", str(path)]
        processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(ranks)]
        try:
            for process in processes:
                process.wait(TIMEOUT_SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found = [path.with_name(f"outcomes-{rank}") for rank in range(ranks)]
        died = [Outcome(error="died")] * len(attempts)
        of_ranks = [pickle.loads(each.read_bytes()) if each.exists() else died for each in found]
        return [list(outcomes) for outcomes in zip(*of_ranks, strict=True)]


def _wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - slow to import

        for layer in getattr(model, "layers", ()):
            fully_shard(layer)
        return fully_shard(model)
    if kind == "DDP with a hook":
        wrapped = nn.parallel.DistributedDataParallel(model)
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # noqa: PLC0415

        wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
        return wrapped
    assert kind == "neither"
    return model


def _run(specification: Specification, attempt: Attempt, rank: int) -> Outcome:
    scene = Scene(node=specification.node, **copy.deepcopy(specification.scene))  # type: ignore[arg-type]
    scene.wrap = lambda model: _wrap(attempt.kind, model)
    for name, value in attempt.changes.get(rank, {}).items():
        setattr(scene, name, value)
    outcome = Outcome()
    try:
        with scene.run() as run:
            for batch in run.batches():
                if attempt.kill == (rank, batch.step):
                    os.kill(os.getpid(), signal.SIGKILL)
                outcome.stand_ins += not batch.examples
                outcome.replayed += batch.replayed
                outcome.seen += [(batch.step, example) for example in batch.examples]
                run.learn(losses(scene.wrapped, batch.inputs))
            run.release(scene.directory / "tuned.safetensors")
        summary = run.summary()
        outcome.recoveries, outcome.rollbacks = summary.recoveries, summary.rollbacks
    except CountersignError as error:
        outcome.error_type, outcome.error = type(error).__name__, str(error)
    for name, parameter in scene.model.named_parameters():
        held = parameter.detach()
        outcome.weights[name] = (held.full_tensor() if hasattr(held, "full_tensor") else held).clone()
    return outcome


def _main() -> None:
    path, rank = Path(sys.argv[1]), int(sys.argv[2])
    specification: Specification = pickle.loads(path.read_bytes())
    dist.init_process_group(
        "gloo", init_method=f"file://{specification.meeting}", rank=rank, world_size=specification.ranks
    )
    try:
        outcomes = [_run(specification, attempt, rank) for attempt in specification.attempts]
        path.with_name(f"outcomes-{rank}").write_bytes(pickle.dumps(outcomes))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    # Outcomes are the parent's classes, by the name under which it imports them.
    from rank_fixtures import _main as main

    main()
