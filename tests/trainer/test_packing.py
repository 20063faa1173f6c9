"""Examples packed into common rows: every one's gradient is its own, and what would mix them is found."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fake_node import running_node
from governed_fixtures import CAMPAIGN, STEPS, Scene, TinyModel, assert_moved_alike, examples_of, weights
from torch import Tensor, nn
from torch.nn import functional

from consensus.event import Kind
from trainer_client.accumulators import SourceAccumulators
from trainer_client.packing import Packed, PackedRows, Packing, losses_by_example, pack
from trainer_client.pieces import whole_entries
from trainer_client.probe import ProbeInputs, probe
from trainer_client.replay import ReplayJob, read_logged_campaign, replay
from trainer_client.route import RoutingError, RoutingLeak, RoutingUnsupported
from trainer_client.routing import Routing
from trainer_client.sketches import SketchBook

LENGTHS = (5, 7, 3, 6, 4)
ROW = 12
WEIGHTS = [[1000, 1000, 1000, 1000], [0, 250, 1000, 0], [500, 0, 0, 1000], [0, 0, 0, 0], [1000, 500, 250, 0]]
SOURCES = [b"a", b"b", b"a", b"b", b"c"]


class Attending(nn.Module):
    """One attention layer between an embedding, a norm of each kind and a head, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ModuleList([nn.Embedding(32, 8), nn.Embedding(ROW, 8)])
        self.layers = nn.ModuleList([nn.Linear(8, 24), nn.Linear(8, 8)])
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.RMSNorm(8)])
        self.head = nn.Linear(8, 32)
        self.double()

    def forward(self, tokens_RT: Tensor, positions_RT: Tensor, attention_R1TT: Tensor | None) -> Tensor:
        x = self.norms[0](self.embedding[0](tokens_RT) + self.embedding[1](positions_RT))
        query, key, value = (part.unsqueeze(1) for part in self.layers[0](x).chunk(3, dim=-1))
        causal = attention_R1TT is None
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_R1TT, is_causal=causal)
        logits: Tensor = self.head(self.norms[1](x + self.layers[1](seen.squeeze(1))))
        return logits


def block_of(model: nn.Module) -> dict[str, int]:
    """Four parameter blocks: embedding, layers, norms, head."""
    blocks = list(dict.fromkeys(name.partition(".")[0] for name, _ in model.named_parameters()))
    return {name: blocks.index(name.partition(".")[0]) for name, _ in model.named_parameters()}


def sequences(seed: int = 3) -> list[list[int]]:
    drawn = torch.randint(0, 32, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed)).tolist()
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    return [drawn[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def packed_losses(model: nn.Module, rows: PackedRows, masked: bool = True) -> Tensor:
    logits_RTV = model(rows.tokens_RT, rows.positions_RT, rows.attention_R1TT if masked else None)
    target_RT = rows.tokens_RT.roll(-1, dims=1)
    loss_RT = functional.cross_entropy(logits_RTV.transpose(1, 2), target_RT, reduction="none")
    return losses_by_example(loss_RT, rows.packing, rows.packing.followed_RT())


def oracle(model: nn.Module, weights_BK: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Every example alone, its gradients weighted by hand."""
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sequence, weights_K in zip(sequences(), weights_BK, strict=True):
        alone = copy.deepcopy(model)
        packed_losses(alone, pack([sequence], len(sequence))).sum().backward()
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            expected[name] += weights_K[block_of(model)[name]] / 1_000 * parameter.grad / 7
    return expected


def routed(
    model: nn.Module, rows: PackedRows, watch: SourceAccumulators | None = None, book: SketchBook | None = None
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    with Routing(model, block_of(model), watch, book) as routing:
        with routing.micro_batch(WEIGHTS, SOURCES, packing=rows.packing):
            routing.routed_loss(packed_losses(model, rows), 7).backward()
        routing.finish_step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> Attending:
    torch.manual_seed(2)
    return Attending()


def test_packed_gradients_are_those_of_each_example_alone(model: Attending) -> None:
    rows = pack(sequences(), ROW)
    assert (rows.packing.rows, rows.packing.is_full) == (3, False)
    found = routed(model, rows)
    for name, expected in oracle(model, WEIGHTS).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_replacing_a_blocked_example_changes_no_bit_of_its_block(model: Attending) -> None:
    others = sequences()
    others[3] = [31] * LENGTHS[3]
    first, second = routed(model, pack(sequences(), ROW)), routed(model, pack(others, ROW))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    others[1] = [30] * LENGTHS[1]
    third = routed(model, pack(others, ROW))
    kept = [name for name in first if torch.equal(first[name], third[name])]
    assert {name.partition(".")[0] for name in kept} == {"embedding", "head"}


def test_accumulators_and_sketches_see_packed_examples_as_they_see_others(model: Attending, tmp_path: Path) -> None:
    rows = pack(sequences(), ROW)
    watch = SourceAccumulators(tmp_path, CAMPAIGN, 4, 4)
    watch.attach(model, block_of(model), whole_entries(model))
    parts: dict[tuple[str, bytes], Tensor] = {}
    sketched: dict[str, tuple[Tensor, Tensor]] = {}

    class Watching:
        def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None:
            parts[parameter, group] = gradient

    class Book:
        def observe(self, parameter: str, left: Tensor, right: Tensor, weights_B: tuple[int, ...]) -> None:
            sketched[parameter] = left, right

    found = routed(model, rows, Watching(), Book())  # type: ignore[arg-type]
    for name in ("layers.0.weight", "layers.1.weight"):
        total = sum(part for (own, _), part in parts.items() if own == name)
        torch.testing.assert_close(total, found[name])
        left_BTP, right_BTQ = sketched[name]
        assert left_BTP.shape[:2] == (len(LENGTHS), max(LENGTHS))
        weights_B = torch.tensor([row[1] for row in WEIGHTS], dtype=torch.float64) / 1_000
        whole = torch.einsum("btp,btq,b->pq", left_BTP, right_BTQ, weights_B)
        torch.testing.assert_close(whole, found[name])
    watch.close()


def test_probe_finds_attention_across_packed_examples_and_passes_it_where_there_is_none(model: Attending) -> None:
    own, other = sequences(), sequences(seed=4)
    longer = [other[0] + [3, 4], *own[1:]]
    for replacement in ([other[0], *own[1:]], longer):
        shown = (own, own[1:], replacement)
        whole, shorter, replaced = (Packed(rows, rows.packing) for rows in (pack(each, 2 * ROW) for each in shown))
        alone = [Packed(rows, rows.packing) for rows in (pack([each], 2 * ROW) for each in own)]
        inputs = ProbeInputs(len(own), whole, shorter, replaced, alone)
        probe(model, block_of(model), lambda model, each: packed_losses(model, each.inputs), inputs)
        with pytest.raises(RoutingLeak, match="replacing a blocked example changes"):
            probe(model, block_of(model), lambda model, each: packed_losses(model, each.inputs, False), inputs)


@pytest.mark.parametrize("spans", [((0, 5), (4, 8)), ((0, 0),), ((0, 30),), ((10, 14),)])
def test_packing_that_cannot_be_is_refused(spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(RoutingError, match="packing: positions"):
        Packing(2, 12, spans)


def test_packing_of_other_examples_or_another_shape_is_refused(model: Attending) -> None:
    rows = pack(sequences(), ROW)
    with Routing(model, block_of(model)) as routing:
        with (
            pytest.raises(RoutingError, match="5 packed examples, and weights of 4"),
            routing.micro_batch(WEIGHTS[:4], packing=rows.packing),
        ):
            pass
        with (
            routing.micro_batch(WEIGHTS, packing=rows.packing),
            pytest.raises(RoutingUnsupported, match="expects 3 rows of 12 positions first"),
        ):
            packed_losses(model, pack(sequences(), ROW + 1))


def test_examples_go_to_the_first_row_with_room_and_long_ones_are_cut() -> None:
    rows = pack([[1, 2, 3], [4] * 9, [5, 6], [7]], 5, padding=31)
    assert rows.tokens_RT.tolist() == [[1, 2, 3, 5, 6], [4, 4, 4, 4, 4], [7, 31, 31, 31, 31]]
    assert rows.positions_RT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert rows.packing.spans_B == ((0, 3), (5, 10), (3, 5), (10, 11))
    assert rows.attention_R1TT[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    for sequences_ in ([], [[1], []]):
        with pytest.raises(RoutingError, match="at least one token"):
            pack(sequences_, 5)
    assert rows.packing.followed_RT().int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    mean = losses_by_example(torch.arange(15.0).view(3, 5), rows.packing)
    assert mean.tolist() == [1.0, 7.0, 3.5, 10.0]


def test_packed_run_is_recorded_replayed_and_ends_where_the_padded_one_does(tmp_path: Path) -> None:
    texts = {name: [text[: 4 + at % 6] for at, text in enumerate(examples_of(name))] for name in ("manual", "paper")}
    texts["secret"] = examples_of("secret")

    def collated(examples: Sequence[bytes]) -> Packed:
        rows = pack([list(example) for example in examples], 16)
        return Packed(rows, rows.packing)

    def run_losses(model: nn.Module, packed: Packed) -> Tensor:
        rows: PackedRows = packed.inputs
        loss_RT = functional.cross_entropy(
            model(rows.tokens_RT).transpose(1, 2), rows.tokens_RT.roll(-1, 1), reduction="none"
        )
        return losses_by_example(loss_RT, rows.packing, rows.packing.followed_RT())

    trained = {}
    for row in (1, 16):
        with running_node() as node:
            scene = Scene(node, tmp_path / str(row), dict(texts))
            scene.register()
            scene.plan_changes.update(accumulator_window_steps=5, sketch_rank=2)
            scene.arguments.update(collate=_alone if row == 1 else collated, probe_loss=run_losses)
            with scene.run() as run:
                for batch in run.batches():
                    assert batch.packing is not None
                    run.learn(run_losses(scene.model, Packed(batch.inputs, batch.packing)))
                run.release(scene.directory / "tuned.safetensors")
            assert len(scene.events(Kind.STEP)) == STEPS
            trained[row] = weights(scene.model)
            torch.manual_seed(1)
            again = type(scene.model)()
            optimizer = torch.optim.AdamW(again.parameters(), lr=0.01, weight_decay=0.1)
            job = ReplayJob(again, optimizer, scene.training_sources, run_losses, scene.arguments["collate"])  # type: ignore[arg-type]
            assert replay(read_logged_campaign(scene.client(), CAMPAIGN), job).matched == STEPS
    torch.manual_seed(1)
    assert_moved_alike(trained[16], trained[1], weights(TinyModel()))


def _alone(examples: Sequence[bytes]) -> Packed:
    """Every example in a row of its own, padded to one length."""
    tokens_RT = torch.zeros(len(examples), 10, dtype=torch.long)
    for row, example in enumerate(examples):
        tokens_RT[row, : len(example)] = torch.tensor(list(example))
    packing = Packing(len(examples), 10, tuple((10 * row, 10 * row + len(each)) for row, each in enumerate(examples)))
    rows = PackedRows(tokens_RT, tokens_RT, tokens_RT, packing)
    return Packed(rows, packing)
