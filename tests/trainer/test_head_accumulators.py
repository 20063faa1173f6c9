"""What each source adds to each head: its sums by piece, on disk, on the log, replayed and in the balance sheet."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_node import running_node
from governed_fixtures import (
    CAMPAIGN,
    STEPS,
    RecitesAt,
    Scene,
    TinyAttention,
    assert_moved_alike,
    by_heads,
    job_again,
    same_bits,
    weights,
)
from head_fixtures import EXAMPLES, LENGTH, MODELS, built, examples, gradients, losses_of, packed_losses, uneven
from rank_fixtures import Attempt, run_on_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from consensus.accumulators import AccumulatorWindow, decode_window
from consensus.event import Kind
from consensus.pieces import piece_named, tensor_named
from consensus.portions import StepOperation
from trainer_client.accumulators import SourceAccumulators, check_conservation
from trainer_client.audit_snapshots import SnapshotFolder, snapshot_directory
from trainer_client.clipping import clip_block_gradients, clip_factor
from trainer_client.packing import pack
from trainer_client.picked_replay import replay_picked
from trainer_client.pieces import Entries, optimizer_by_pieces, part_of_entry
from trainer_client.plan import default_blocks
from trainer_client.replay import read_logged_campaign, replay
from trainer_client.routed_modules import observed_parameters
from trainer_client.routing import Routing
from trainer_client.sketches import SketchBook

RELATIVE_ERROR = 1e-5
SMALLEST = 1e-8
POLICY = bytes([8]) * 32
SOURCES = [bytes([number]) * 32 for number in (0, 1, 0, 2, 1)]
WINDOW, CLIP_NORM = 2, 0.05

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Told:
    """An observer that adds up what it is told."""

    def __init__(self) -> None:
        self.sums: dict[tuple[bytes, str], Tensor] = {}

    def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None:
        held = self.sums.get((group, parameter))
        self.sums[group, parameter] = gradient if held is None else held + gradient


def learn(routing: Routing, model: nn.Module, tokens_BT: Tensor, rows: list[list[int]]) -> None:
    """Two micro-batches."""
    with routing:
        for first in range(0, EXAMPLES, 3):
            some = slice(first, first + 3)
            with routing.micro_batch(rows[some], SOURCES[some]):
                routing.routed_loss(losses_of(model, tokens_BT[some]), EXAMPLES).backward()
        routing.finish_step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights_B", [[1000] * EXAMPLES, [1000, 500, 0, 500, 250]], ids=["full", "uneven"])
def test_weights_alike_in_all_blocks_tell_every_bit_of_what_undivided_tensors_tell(
    name: str, weights_B: list[int]
) -> None:
    model, block_of = built(name)
    plain = {each: number for number, names in enumerate(default_blocks(model).values()) for each in names}
    found, expected = Told(), Told()
    for told, table in ((found, block_of), (expected, plain)):
        model.zero_grad()
        rows = [[weight] * (max(table.values()) + 1) for weight in weights_B]
        learn(Routing(model, table, told), model, examples(), rows)
    assert any(piece_named(entry) for _, entry in found.sums)
    for (source, tensor), whole in expected.sums.items():
        entries = [tensor] if tensor in block_of else [each for each in block_of if each.startswith(f"{tensor}[")]
        assert entries
        for entry in entries:
            assert torch.equal(found.sums.pop((source, entry)), part_of_entry({tensor: whole}, entry)), entry
    assert not found.sums


class Windowed:
    """Steps of a model by head with accumulators, and of every source the gradients of its examples alone."""

    def __init__(self, name: str, folder: Path) -> None:
        self.model, self.block_of = built(name)
        self.expected: dict[tuple[bytes, str], Tensor] = {}
        self.total: dict[str, Tensor] = {}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        accumulators = SourceAccumulators(folder, CAMPAIGN, WINDOW, WINDOW, dtype=torch.float32)
        routing = Routing(self.model, self.block_of, accumulators)
        with accumulators, optimizer_by_pieces(optimizer, self.model, routing.division, routing.moved) as held:
            accumulators.attach(self.model, self.block_of, held)
            for index in range(1, WINDOW + 1):
                optimizer.param_groups[0]["lr"] = 0.01 / index
                rows = self.rows(index)
                alone = {source: self._alone(source, rows) for source in set(SOURCES)}
                optimizer.zero_grad()
                self.model.zero_grad()
                learn(routing, self.model, examples(), rows)
                norms = clip_block_gradients(self.model, self.block_of, CLIP_NORM)
                factors = [None if norm is None else clip_factor(norm, CLIP_NORM) for norm in norms]
                for source, found in alone.items():
                    for entry, gradient in found.items():
                        factor = factors[self.block_of[entry]]
                        assert factor is not None
                        part = 0.01 / index * factor * gradient
                        place = source, entry
                        self.expected[place] = self.expected.get(place, torch.zeros_like(part)) + part
                self._add_gradients(held, 0.01 / index)
                accumulators.take_step(POLICY, optimizer, factors)
                optimizer.step()
                root = accumulators.end_step(index, recorded=True)
            assert root is not None
            self.window, self.blobs = read_window(folder, root.result())

    def rows(self, index: int) -> list[list[int]]:
        """Uneven; nobody may move the first head, nor source 1 the last one, in any step."""
        rows = uneven(self.block_of)[index:] + uneven(self.block_of)[:index]
        heads = self.heads()
        for row, source in zip(rows, SOURCES, strict=True):
            row[heads[0]] = 0
            row[heads[-1]] = 0 if source == SOURCES[1] else row[heads[-1]] or 700
        return rows

    def heads(self) -> list[int]:
        return sorted({block for entry, block in self.block_of.items() if piece_named(entry)})

    def of_block(self, block: int) -> set[str]:
        return {entry for entry, number in self.block_of.items() if number == block}

    def _alone(self, source: bytes, rows: list[list[int]]) -> dict[str, Tensor]:
        own = [row if of == source else [0] * len(row) for row, of in zip(rows, SOURCES, strict=True)]
        return gradients(copy.deepcopy(self.model), self.block_of, own, examples())

    def _add_gradients(self, held: Entries, rate: float) -> None:
        for name, entry in held.items():
            if entry.gradient is not None:
                self.total[name] = self.total.get(name, torch.zeros_like(entry.gradient)) + rate * entry.gradient


def read_window(folder: Path, root: bytes) -> tuple[AccumulatorWindow, dict[bytes, dict[str, Tensor]]]:
    """A window and its sums by source; those of the empty one are the total."""
    window = decode_window((folder / "windows" / f"{root.hex()}.window").read_bytes(), root)
    return window, {
        entry.source: {
            name: part.float()
            for name, part in load_file(folder / "blobs" / f"{entry.blob_sha256.hex()}.safetensors").items()
        }
        for entry in window.entries
    }


@pytest.mark.parametrize("name", MODELS)
def test_sums_of_each_source_are_by_piece_the_gradients_of_its_examples_alone(name: str, tmp_path: Path) -> None:
    run = Windowed(name, tmp_path)
    total = run.blobs.pop(b"")
    assert any(piece_named(entry) for entry in total)
    assert not any(entry in total for entry in run.of_block(run.heads()[0])), "nobody may move it"
    for entry, wanted in run.total.items():
        if entry in total:
            torch.testing.assert_close(total[entry], wanted, rtol=1e-4, atol=1e-8)
    for source, sums in run.blobs.items():
        for entry in total:
            wanted = run.expected.get((source, entry))
            assert (entry in sums) == (wanted is not None), entry
            if wanted is not None:
                error = float((sums[entry] - wanted).norm())
                assert error <= RELATIVE_ERROR * float(wanted.norm()) + SMALLEST, f"{entry}: error {error:.2e}"
        closed = [entry for entry in run.of_block(run.heads()[-1]) if entry in sums]
        assert bool(closed) == (source != SOURCES[1])
    check_conservation(run.blobs.values(), total, RELATIVE_ERROR)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_full_rank_sketches_of_each_heads_pieces_are_each_examples_gradient_up_to_eight_bits(
    name: str, packed: bool
) -> None:
    model, block_of = built(name)
    rows = uneven(block_of)
    heads = sorted({block for entry, block in block_of.items() if piece_named(entry)})
    alone = [
        {
            entry: part.clone()
            for entry, part in gradients(
                model,
                block_of,
                [row if other == example else [0] * len(row) for other, row in enumerate(rows)],
                examples(),
            ).items()
        }
        for example in range(EXAMPLES)
    ]
    book = SketchBook(rank=32)
    book.attach(entry for entry in block_of if tensor_named(entry) in observed_parameters(model))
    book.expect(3, [(SOURCES[example], example) for example in range(EXAMPLES)])
    model.zero_grad()
    packing = pack(examples().tolist(), 2 * LENGTH) if packed else None
    with Routing(model, block_of, None, book) as routing:
        with routing.micro_batch(rows, packing=None if packing is None else packing.packing):
            loss_B = losses_of(model, examples()) if packing is None else packed_losses(model, packing)
            routing.routed_loss(loss_B, EXAMPLES).backward()
        routing.finish_step()
    book.take_step(POLICY, dict.fromkeys(block_of, 0.5))
    sketched = book.window.factored
    for entry in sketched:
        left, right, scale = (part.double() for part in book.window.rows_of(entry))
        dense_BPQ = torch.einsum("nr,nrp,nrq->npq", scale, left, right)
        for example, found in enumerate(alone):
            expected = 0.5 * found[entry].double() if entry in found else torch.zeros_like(dense_BPQ[example])
            if not rows[example][block_of[entry]]:
                assert not scale[example].any(), entry
            assert (dense_BPQ[example] - expected).norm() <= 0.02 * expected.norm() + 1e-7, entry
    of_heads = {entry for entry in sketched if piece_named(entry)}
    assert {block_of[entry] for entry in of_heads} == {block for block in heads if any(row[block] for row in rows)}


# In a governed run


KEPT = {"accumulator_window_steps": 5, "sketch_rank": 2}


@pytest.fixture
def kept(headed: Scene) -> Scene:
    """A run by heads that keeps accumulators and sketches; ``paper`` may not move head 1, nobody head 0."""
    headed.plan_changes.update(KEPT)
    return headed


def roots_of(scene: Scene) -> list[bytes]:
    operations = [event.operation for event in scene.events(Kind.STEP)]
    roots = {each.index: each.accumulator_root for each in operations if isinstance(each, StepOperation)}
    return [root for _, root in sorted(roots.items()) if root]


def windows_of(scene: Scene) -> list[dict[bytes, dict[str, Tensor]]]:
    """Sums by source of each window that stands."""
    return [read_window(scene.directory / "accumulators", root)[1] for root in roots_of(scene)]


def heads_in(sums: Mapping[str, Tensor]) -> set[int]:
    """Of the model's attention: rows of queries name them, 0 to 3 and 4 to 7."""
    return {head for head in (0, 1) if f"attention.c_attn.weight[{4 * head}:{4 * head + 4}]" in sums}


def test_source_that_a_head_is_closed_to_has_no_sum_there_in_any_window_of_the_log(kept: Scene) -> None:
    recites = RecitesAt(4)
    kept.arguments["memorization"] = recites
    kept.settings = replace(kept.settings, audit_snapshot_every_steps=5)
    kept.train(recites.at.append)
    assert kept.node.head(CAMPAIGN).rollbacks == 1
    windows = windows_of(kept)
    assert len(windows) == 3
    (opening,) = kept.events(Kind.CAMPAIGN)
    table = {tensor.name for block in opening.operation.parameter_blocks for tensor in block.tensors}  # type: ignore[union-attr]
    for window in windows:
        total = window.pop(b"")
        assert set(total) < table
        assert {source: heads_in(sums) for source, sums in window.items()} == {
            kept.sources["manual"]: {1},
            kept.sources["paper"]: set(),
        }
        assert "attention.c_proj.bias" in window[kept.sources["paper"]], "heads share it"
        check_conservation(window.values(), total, 2**-8)
    logged, again = read_logged_campaign(kept.client(), CAMPAIGN), job_again(kept)
    found = replay(logged, again)
    assert (found.matched, found.difference) == (STEPS, None)
    assert same_bits(weights(again.model), weights(kept.model))
    snapshots = SnapshotFolder(snapshot_directory(kept.directory, CAMPAIGN), CAMPAIGN)
    picked = replay_picked(logged, job_again(kept), [10, 12], snapshots)
    assert (picked.difference, picked.windows) == (None, 2)


def test_one_heads_sums_booked_to_another_source_are_seen_by_a_replay(
    kept: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter root and every total stays right."""
    observe = SourceAccumulators.observe
    moved_to = {kept.sources["manual"]: kept.sources["paper"]}

    def booked(self: SourceAccumulators, parameter: str, group: bytes, gradient: Tensor) -> None:
        mine = parameter == "attention.c_proj.weight[:,4:8]"
        observe(self, parameter, moved_to.get(group, group) if mine else group, gradient)

    with monkeypatch.context() as patched:
        patched.setattr(SourceAccumulators, "observe", booked)
        kept.train()
    found = replay(read_logged_campaign(kept.client(), CAMPAIGN), job_again(kept))
    assert found.difference is not None
    assert (found.difference.step, found.difference.what) == (5, ("accumulators",))


def test_balance_sheet_by_head_adds_up_and_has_nothing_of_a_source_in_a_head_that_it_may_not_move(kept: Scene) -> None:
    kept.train()
    logged, again = read_logged_campaign(kept.client(), CAMPAIGN), job_again(kept)
    found = replay(logged, again, balanced=True)
    assert (found.matched, found.difference) == (STEPS, None)
    assert same_bits(weights(again.model), weights(kept.model))
    sheet = found.balance
    assert sheet is not None
    manual, paper = sheet.sources[kept.sources["manual"]], sheet.sources[kept.sources["paper"]]
    assert sheet.unsplit == ("embedding.weight",)
    assert list(sheet.changes) == ["attention.head.0", "attention.head.1", "attention", "head"]
    assert sheet.changes["attention.head.0"] == 0.0
    assert paper["attention.head.1"].norm == 0.0
    assert manual["attention.head.1"].norm > 0
    for block, norm in sheet.changes.items():
        if block != "attention.head.0":
            assert sheet.rest[block].norm < 1e-5 * norm
            shares = [entries[block].share for entries in (manual, paper, sheet.decay, sheet.rest)]
            assert sum(shares) == pytest.approx(1.0, abs=1e-9)


def test_two_ranks_by_heads_train_and_sum_what_one_process_does(kept: Scene, tmp_path: Path) -> None:
    changes = {"model": {}, "planned_steps": 6}
    kept.plan_changes.update(changes)
    kept.arguments["micro_batch_size"] = 2
    (parallel,) = run_on_ranks(kept, Attempt("DDP"))
    assert [outcome.error for outcome in parallel] == ["", ""]
    torch.manual_seed(1)
    base = weights(TinyAttention())
    with running_node() as node:
        alone = Scene(node, tmp_path / "alone", kept.texts)
        by_heads(alone)
        alone.plan_changes.update(changes, **KEPT)
        alone.train()
        windows = list(zip(windows_of(kept), windows_of(alone), strict=True))
    expected = weights(alone.model)
    del expected["attention.c_attn.bias"]  # that of keys has a gradient of rounding errors alone
    for outcome in parallel:
        assert_moved_alike(outcome.weights, expected, base)
        closed = outcome.weights["attention.c_attn.weight"].view(3, 2, 4, 8)[:, 0]
        assert torch.equal(closed, base["attention.c_attn.weight"].view(3, 2, 4, 8)[:, 0])
    assert len(windows) == 2
    for found, wanted in windows:
        assert {source: sums.keys() for source, sums in found.items()} == {
            source: sums.keys() for source, sums in wanted.items()
        }
        for source, sums in wanted.items():
            for entry, part in sums.items():
                assert (found[source][entry] - part).norm() <= 0.02 * part.norm() + 1e-6, entry


class Killed(Exception):
    """Stands for the end of the process."""


def test_run_that_died_in_a_window_ends_it_with_the_sums_of_one_that_did_not(kept: Scene, tmp_path: Path) -> None:
    def die(step: int) -> None:
        if step == 8:
            raise Killed

    changes = dict(kept.plan_changes)
    with pytest.raises(Killed):
        kept.train(die)
    kept.plan_changes.update(changes)
    kept.train()
    with running_node() as node:
        other = Scene(node, tmp_path / "other", kept.texts)
        by_heads(other)
        other.plan_changes.update(KEPT)
        other.train()
    assert roots_of(kept) == roots_of(other)
