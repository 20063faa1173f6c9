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
from governed_fixtures import CAMPAIGN, Scene, TinyModel, collate, losses
from torch import nn

from consensus.identifiers import ChainId, MemberId
from consensus.rejection import CountersignError
from trainer_client.audit_snapshots import SnapshotFolder
from trainer_client.base_losses import path_of
from trainer_client.evaluating import evaluating
from trainer_client.picked_replay import replay_picked
from trainer_client.ranks import Ranks
from trainer_client.record import Example
from trainer_client.replay import ReplayJob, read_logged_campaign, replay
from trainer_client.tolerant_replay import replay_within

TIMEOUT_SECONDS = 300
KINDS = ("DDP", "FSDP2")
SNAPSHOTS = f"snapshots/{CAMPAIGN.hex()}"
"""Where in a scene's directory a run keeps snapshots for audits."""


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
    """A run of the scene. ``changes`` are of one rank's scene, by rank; ``kill`` is a rank and the step it dies at.

    A run that is to die waits at each step for the log, so that by then there is a checkpoint of each that is due.

    In a run that is ``tested`` the loop asks the model between two steps. With ``replay`` not a run but a replay of the
    campaign on the log.
    """

    kind: str
    kill: tuple[int, int] | None = None
    tested: bool = False
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)
    replay: "Replay | None" = None


@dataclass(frozen=True)
class Replay:
    """What is asked of a replay; ``picked`` steps only, where there are any.

    ``snapshots`` is a folder in the scene's directory to begin at; with a ``tolerance`` numbers are compared.
    """

    weight_decay: float = 0.1
    picked: tuple[int, ...] = ()
    snapshots: str = ""
    tolerance: float = 0.0
    without: tuple[bytes, ...] = ()
    balanced: bool = False


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
    """How a rank's run ended: what it was shown by step, its stand-ins, its weights, or its error.

    Of a replay ``replayed`` are the steps that came out as recorded, of ``executed`` that were taken again where some
    were picked, ``differing`` what of the first did not; ``windows`` were compared.
    """

    seen: list[tuple[int, Example]] = field(default_factory=list)
    stand_ins: int = 0
    replayed: int = 0
    executed: int = 0
    windows: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    recoveries: int = 0
    rollbacks: int = 0
    differing: tuple[str, ...] = ()
    root: bytes = b""
    error: str = ""
    error_type: str = ""


CARRIED = ("texts", "sources", "settings", "plan_changes", "arguments", "build", "salt", "campaign", "key")


class Recites:
    """A memorization check that finds an example of one source recited when it is assessed first; it asks the model."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.found = False

    def glance(self, shown: Mapping[Example, bytes], hits_BT: torch.Tensor, floor: int) -> list[Example]:
        return []

    def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        with evaluating(model), torch.no_grad():
            losses(model, collate(list(shown.values())))
        own = [example for example in sorted(shown) if example[0] == self.source]
        if self.found or not own:
            return {}
        self.found = True
        return {own[0]: 601}


class RecitesOnTheFirst(Recites):
    """Finds an example and its neighbours recited, on the first rank alone: elsewhere kernels differ."""

    around: int | None = None

    def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        with evaluating(model), torch.no_grad():
            losses(model, collate(list(shown.values())))
        own = [number for source, number in sorted(shown) if source == self.source]
        if dist.get_rank() > 0 or not own:
            return {}
        self.around = own[0] if self.around is None else self.around
        return {(self.source, number): 601 for number in own if abs(number - self.around) <= 1}


class Elsewhere(TinyModel):
    """Of a rank that works in another folder than the first."""

    def __init__(self) -> None:
        super().__init__()
        os.chdir("/")


def faster(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a rank that was given another learning rate."""
    return [{"params": list(model.parameters()), "lr": 0.02}]


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
    torch.manual_seed(100 + dist.get_rank())  # other dropout on each rank
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
        if attempt.replay is not None:
            _replay(scene, attempt.replay, outcome)
            return outcome
        with scene.run() as run:
            for batch in run.batches():
                if attempt.kill is not None:
                    run._ledger.wait_all_settled()
                if attempt.kill == (rank, batch.step):
                    os.kill(os.getpid(), signal.SIGKILL)
                outcome.stand_ins += not batch.examples
                outcome.replayed += batch.replayed
                outcome.seen += [(batch.step, example) for example in batch.examples]
                run.learn(losses(scene.wrapped, batch.inputs))
                if attempt.tested:
                    with evaluating(scene.wrapped), torch.no_grad():
                        losses(scene.wrapped, batch.inputs)
            run.release(scene.directory / "tuned.safetensors")
        summary = run.summary()
        outcome.recoveries, outcome.rollbacks = summary.recoveries, summary.rollbacks
    except CountersignError as error:
        outcome.error_type, outcome.error = type(error).__name__, str(error)
    for name, parameter in () if attempt.replay is not None else scene.model.named_parameters():
        held = parameter.detach()
        outcome.weights[name] = (held.full_tensor() if hasattr(held, "full_tensor") else held).clone()
    return outcome


def job_of(scene: Scene, weight_decay: float = 0.1) -> ReplayJob[bytes]:
    """A scene's job as it stands before its first step."""
    torch.manual_seed(1)
    model = scene.wrap(scene.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
    size = scene.arguments["micro_batch_size"]
    kept = path_of(scene.directory, scene.campaign)
    return ReplayJob(
        model,
        optimizer,
        scene.training_sources,
        losses,
        collate,
        micro_batch_size=size,  # type: ignore[arg-type]
        scaler=copy.deepcopy(scene.arguments.get("scaler")),  # type: ignore[arg-type]
        base_losses=kept if kept.exists() else None,
    )


def replay_job(config: Path) -> ReplayJob[bytes]:
    """For ``countersign replay --job`` in the processes of ``torchrun``: ``config`` is of ``replay_configuration``."""
    kind, node, scene = pickle.loads(config.read_bytes())
    dist.init_process_group("gloo")
    made = Scene(node=node, **scene)
    made.wrap = lambda model: _wrap(kind, model)
    return job_of(made)


def replay_configuration(scene: Scene, kind: str) -> bytes:
    """What ``replay_job`` reads."""
    node = NodeAt(scene.node.url, scene.node.chain_id, scene.node.member_id("operator-1"))
    fields = {"directory": scene.directory, **{name: getattr(scene, name) for name in CARRIED}}
    return pickle.dumps((kind, node, fields))


def _replay(scene: Scene, asked: Replay, outcome: Outcome) -> None:
    job = job_of(scene, asked.weight_decay)
    ranks = Ranks.of_job()
    logged = read_logged_campaign(scene.client(), scene.campaign)
    if asked.picked:
        folder = SnapshotFolder(scene.directory / asked.snapshots, CAMPAIGN, ranks) if asked.snapshots else None
        if folder is not None and asked.tolerance:
            windows = scene.directory / "accumulators"
            picked = replay_within(
                logged, job, asked.picked, folder, asked.tolerance, recorded_windows=windows, ranks=ranks
            )
        else:
            picked = replay_picked(logged, job, asked.picked, folder, ranks=ranks)
        outcome.replayed, outcome.executed, difference = picked.matched, picked.executed, picked.difference
        outcome.windows = picked.windows
    else:
        found = replay(logged, job, asked.without, balanced=asked.balanced, ranks=ranks)
        outcome.replayed, outcome.root, difference = found.matched, found.root, found.difference
    outcome.differing = () if difference is None else (f"step {difference.step}", *difference.what)


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
