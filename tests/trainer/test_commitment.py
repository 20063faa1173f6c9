"""Parameter roots, deltas and optimizer digests."""

import math
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from consensus.parameters import TensorDescriptor, parameter_root
from consensus.rejection import InvariantBroken, Reason, Rejected
from trainer_client import commitment
from trainer_client.commitment import (
    CommitmentWorker,
    committed_tensors,
    copied_tensors,
    optimizer_state_digest,
    parameter_root_of,
    root_of_tensors,
    step_commitment,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4).to(torch.bfloat16)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def root_of_file(path: Path) -> bytes:
    """As a verifier without torch would: header and byte ranges alone."""
    import json  # noqa: PLC0415

    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    start = 8 + header_bytes
    return parameter_root(
        TensorDescriptor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            blake3(content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]).digest(),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    )


def test_root_of_a_model_is_recomputed_from_its_file_bytes(tmp_path: Path) -> None:
    model = Tied()
    path = tmp_path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in committed_tensors(model).items()}, path, {"format": "pt"})
    assert parameter_root_of(model) == root_of_file(path)
    with safe_open(path, "pt") as opened:
        assert sorted(opened.keys()) == ["body.bias", "body.weight", "kept", "table.weight"]


@pytest.mark.parametrize("changed", ["table.weight", "body.bias", "kept"])
def test_any_changed_element_changes_the_root(changed: str) -> None:
    model = Tied()
    before = parameter_root_of(model)
    with torch.no_grad():
        committed_tensors(model)[changed].view(-1)[-1] += 1
    assert parameter_root_of(model) != before


def test_negative_zero_changes_the_root() -> None:
    assert root_of_tensors({"a": torch.tensor([0.0])}) != root_of_tensors({"a": torch.tensor([-0.0])})


DIGEST = bytes(range(32))
GOOD = TensorDescriptor("a", "F32", (2, 3), DIGEST)


@pytest.mark.parametrize(
    "other",
    [
        TensorDescriptor("b", "F32", (2, 3), DIGEST),
        TensorDescriptor("a", "BF16", (2, 3), DIGEST),
        TensorDescriptor("a", "F32", (3, 2), DIGEST),
        TensorDescriptor("a", "F32", (6,), DIGEST),
        TensorDescriptor("a", "F32", (2, 3), DIGEST[::-1]),
    ],
)
def test_name_dtype_shape_and_digest_all_enter_the_root(other: TensorDescriptor) -> None:
    assert parameter_root([GOOD]) != parameter_root([other])


@given(st.permutations([TensorDescriptor(name, "F32", (1,), DIGEST) for name in "abcdefé"]))
@settings(max_examples=20, deadline=None)
def test_root_does_not_depend_on_the_order_given(tensors: list[TensorDescriptor]) -> None:
    assert parameter_root(tensors) == parameter_root(sorted(tensors, key=lambda tensor: tensor.name))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([], Reason.BAD_FIELD),
        ([GOOD, GOOD], Reason.DUPLICATE),
        ([TensorDescriptor("", "F32", (1,), DIGEST)], Reason.BAD_FIELD),
        ([TensorDescriptor("a", "float32", (1,), DIGEST)], Reason.BAD_FIELD),
        ([TensorDescriptor("a", "F32", (-1,), DIGEST)], Reason.BAD_FIELD),
        ([TensorDescriptor("a", "F32", (1,) * 17, DIGEST)], Reason.BAD_FIELD),
        ([TensorDescriptor("a", "F32", (1,), DIGEST[1:])], Reason.BAD_FIELD),
    ],
)
def test_malformed_descriptors_are_rejected(tensors: list[TensorDescriptor], reason: Reason) -> None:
    with pytest.raises(Rejected) as rejected:
        parameter_root(tensors)
    assert rejected.value.reason is reason


BLOCKS = {"one": ("a",), "two": ("b", "c")}


def snapshots() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    before = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(1, dtype=torch.bfloat16)}
    after = {"a": torch.zeros(2), "b": torch.tensor([3.0, 0.0]), "c": torch.tensor([4.0], dtype=torch.bfloat16)}
    return before, after


def test_delta_norms_are_per_block_in_millionths() -> None:
    commitment = step_commitment(*snapshots(), BLOCKS)
    assert [delta.norm_micro for delta in commitment.deltas] == [0, 5_000_000]
    assert commitment.root_before != commitment.root_after


def test_delta_that_is_not_finite_stops_the_job() -> None:
    before, after = snapshots()
    after["a"][0] = torch.nan
    with pytest.raises(InvariantBroken, match="one"):
        step_commitment(before, after, BLOCKS)


def test_snapshots_of_different_models_are_refused() -> None:
    before, after = snapshots()
    after["a"] = torch.zeros(3)
    with pytest.raises(InvariantBroken, match="different tensors"):
        step_commitment(before, after, BLOCKS)


def test_worker_commits_what_was_copied_not_what_training_made_of_it() -> None:
    model = nn.Linear(64, 64)
    before = copied_tensors(model)
    with CommitmentWorker({"all": ("weight", "bias")}) as worker:
        for _ in range(3):
            with torch.no_grad():
                model.weight.add_(0.5)
            after = copied_tensors(model)
            expected = step_commitment(before, after, {"all": ("weight", "bias")})
            pending = worker.submit(before, after)
            with torch.no_grad():
                model.bias.add_(1.0)
            assert pending.result(timeout=30) == expected
            before = after


def trained(steps: int) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return optimizer


def test_optimizer_digest_sees_state_settings_and_nothing_else() -> None:
    assert optimizer_state_digest(trained(2)) == optimizer_state_digest(trained(2))
    assert optimizer_state_digest(trained(2)) != optimizer_state_digest(trained(1))
    changed = trained(2)
    changed.param_groups[0]["lr"] = 0.2
    assert optimizer_state_digest(changed) != optimizer_state_digest(trained(2))
    momentum = next(iter((altered := trained(2)).state.values()))["exp_avg"]
    momentum.view(-1)[0] += 1e-3
    assert optimizer_state_digest(altered) != optimizer_state_digest(trained(2))


def test_optimizer_state_of_unknown_type_is_refused() -> None:
    optimizer = trained(1)
    optimizer.param_groups[0]["strange"] = object()
    with pytest.raises(InvariantBroken, match="object"):
        optimizer_state_digest(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("piece", [1, 7, 24, 1_000])
def test_deltas_are_the_same_in_pieces_of_any_size(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    before = {
        "weight": torch.randn(4, 6).to(dtype),
        "scale": torch.tensor(1.5, dtype=dtype),
        "none": torch.zeros(0, dtype=dtype),
    }
    after = {name: tensor + 0.25 for name, tensor in before.items()}
    blocks = {"all": tuple(before)}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    differences = {name: after[name].to(wide) - before[name].to(wide) for name in before}
    monkeypatch.setattr(commitment, "PIECE_ELEMENTS", piece)
    (delta,) = step_commitment(before, after, blocks).deltas
    assert delta.digest == root_of_tensors(differences)
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in differences.values()))
    assert delta.norm_micro == round(norm * 1e6)
