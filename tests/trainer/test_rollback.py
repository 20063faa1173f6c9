"""Snapshots restore bit-exactly, and the ring returns to what is final."""

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from consensus.identifiers import Digest
from consensus.rejection import InvariantBroken
from trainer_client.rollback import (
    SnapshotRing,
    TrainingState,
    own_part_of,
    restore_snapshot,
    step_beginning,
    take_snapshot,
)

ROOT = Digest(bytes(32))
OTHER_ROOT = Digest(bytes([1]) * 32)


class Position:
    """A loader's place."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.fails = False

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.fails:
            self.fails = False
            raise OSError("loader lost")
        self.taken = state["taken"]


class Job:
    """A job that draws from every random source it can."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(dtype)
        self.model.register_buffer("calls", torch.zeros(1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, amsgrad=True)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.position = Position()
        self.generator = torch.Generator().manual_seed(9)
        self.state = TrainingState(
            self.model,
            self.optimizer,
            {"scheduler": self.scheduler, "position": self.position},
            {"sampler": self.generator},
        )
        self.dtype = dtype

    def step(self) -> None:
        x = torch.rand(3, 4, generator=self.generator) + random.random() + float(numpy.random.rand())
        self.position.taken.append(len(self.position.taken))
        self.model.calls += 1
        self.optimizer.zero_grad()
        self.model(x.to(self.dtype)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    def everything(self) -> list[Tensor | float | list[int]]:
        tensors = [t.detach().clone() for t in (*self.model.parameters(), *self.model.buffers())]
        state = [v.clone() for entry in self.optimizer.state.values() for v in entry.values()]
        rest = [torch.get_rng_state(), self.generator.get_state()]
        numbers = [self.optimizer.param_groups[0]["lr"], self.scheduler.last_epoch, list(self.position.taken)]
        return [*tensors, *state, *rest, *numbers, random.getstate()[1], numpy.random.get_state()[1].tolist()]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_restored_job_repeats_the_same_steps_bit_for_bit(steps_before: int, dtype: torch.dtype) -> None:
    job = Job(dtype)
    for _ in range(steps_before):
        job.step()
    snapshot = take_snapshot(job.state, steps_before, ROOT)
    at_snapshot = job.everything()
    runs = []
    for _ in range(2):
        for _ in range(4):
            job.step()
        runs.append(job.everything())
        restore_snapshot(snapshot, job.state)
        assert_same(job.everything(), at_snapshot)
    assert_same(*runs)


def test_snapshot_taken_after_the_backward_pass_restores_the_beginning_of_the_step() -> None:
    job = Job()
    job.step()
    beginning, expected = step_beginning(job.state), take_snapshot(job.state, 1, ROOT)
    job.model.calls += 1
    job.model(torch.rand(3, 4)).sum().backward()
    random.random()
    numpy.random.rand()
    late = take_snapshot(job.state, 1, ROOT, beginning)
    runs = []
    for snapshot in (late, expected):
        restore_snapshot(snapshot, job.state)
        job.step()
        runs.append(job.everything())
    assert_same(*runs)


def test_restore_keeps_the_objects_the_optimizer_holds() -> None:
    job = Job()
    identities = [id(parameter) for parameter in job.model.parameters()]
    snapshot = take_snapshot(job.state, 0, ROOT)
    job.step()
    restore_snapshot(snapshot, job.state)
    assert [id(parameter) for parameter in job.model.parameters()] == identities
    assert [id(parameter) for parameter in job.optimizer.param_groups[0]["params"]] == identities
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_optimizer_state_of_higher_precision_than_its_parameter_is_not_rounded() -> None:
    job = Job(torch.bfloat16)
    job.step()
    parameter = next(job.model.parameters())
    job.optimizer.state[parameter]["exp_avg"] = torch.full_like(parameter, 1 / 3, dtype=torch.float32)
    snapshot = take_snapshot(job.state, 1, ROOT)
    job.optimizer.state[parameter]["exp_avg"].zero_()
    restore_snapshot(snapshot, job.state)
    assert torch.equal(
        job.optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 1 / 3, dtype=torch.float32)
    )


def test_restore_that_fails_half_way_changes_nothing() -> None:
    job = Job()
    snapshot = take_snapshot(job.state, 0, ROOT)
    job.step()
    before = job.everything()
    job.position.fails = True
    with pytest.raises(OSError, match="loader lost"):
        restore_snapshot(snapshot, job.state)
    assert_same(job.everything(), before)


def test_snapshot_of_another_model_is_refused_and_changes_nothing() -> None:
    snapshot = take_snapshot(Job().state, 0, ROOT)
    job = Job()
    job.step()
    stranger = nn.Linear(2, 2)
    split = torch.optim.AdamW([{"params": [parameter]} for parameter in job.model.parameters()])
    before = job.everything()
    stateful, generators = job.state.stateful, job.state.generators
    for other in (
        TrainingState(stranger, job.optimizer, stateful, generators),
        TrainingState(job.model, split, stateful, generators),
        TrainingState(job.model, job.optimizer, {}, generators),
        TrainingState(job.model, job.optimizer, stateful, {}),
    ):
        random_before = torch.get_rng_state()
        with pytest.raises(InvariantBroken):
            restore_snapshot(snapshot, other)
        assert torch.equal(torch.get_rng_state(), random_before)
    assert_same(job.everything(), before)


def stepped_at(device: str, fake: FakeTensorMode) -> TrainingState:
    """A job as it stands after a step; a fake tensor has a device that need not be there."""
    with fake:
        parameter = nn.Parameter(torch.empty(2, 2, device=device))
        model = nn.ParameterList([parameter])
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        moments = {key: torch.empty(2, 2, device=device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.empty(()), **moments}
    return TrainingState(model, optimizer)


def test_optimizer_state_of_the_first_ranks_snapshot_goes_to_this_ranks_device() -> None:
    fake = FakeTensorMode()
    first, own = stepped_at("cuda:0", fake), stepped_at("cuda:1", fake)
    snapshot = take_snapshot(first, 1, Digest(bytes(32)))
    with fake:
        part = own_part_of(snapshot, own)
    found = {key: str(value.device) for key, value in part.optimizer_state[0].items()}
    assert found == {"step": "cpu", "exp_avg": "cuda:1", "exp_avg_sq": "cuda:1"}


def test_candidate_becomes_final_only_with_its_own_root_and_step() -> None:
    job = Job()
    ring = SnapshotRing(take_snapshot(job.state, 0, ROOT))
    job.step()
    candidate = take_snapshot(job.state, 1, OTHER_ROOT)
    ring.offer(candidate)
    with pytest.raises(InvariantBroken, match="waits"):
        ring.offer(candidate)
    ring.finalized(7, OTHER_ROOT)
    assert ring.candidate is candidate
    with pytest.raises(InvariantBroken, match="root"):
        ring.finalized(1, ROOT)
    ring.finalized(1, OTHER_ROOT)
    assert ring.final is candidate
    assert ring.candidate is None
    with pytest.raises(InvariantBroken, match="after 1"):
        ring.offer(candidate)


def test_roll_back_returns_to_the_final_snapshot_and_drops_the_candidate() -> None:
    job = Job()
    at_start = job.everything()
    ring = SnapshotRing(take_snapshot(job.state, 0, ROOT))
    job.step()
    ring.offer(take_snapshot(job.state, 1, OTHER_ROOT))
    job.step()
    assert ring.roll_back(job.state).step == 0
    assert ring.candidate is None
    assert_same(job.everything(), at_start)
