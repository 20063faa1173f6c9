"""Sketches against one autograd pass per example, and what a window's file holds of them."""

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from governed_fixtures import CAMPAIGN, STEPS, Scene, TinyModel, collate
from governed_fixtures import losses as run_losses
from safetensors.torch import load_file
from sketch_fixtures import unpacked
from torch import Tensor, nn
from torch.nn import functional

from consensus.accumulators import decode_window
from consensus.event import Kind
from consensus.portions import BlockWeight, ClassRule, StepOperation
from consensus.rejection import Reason, Rejected
from trainer_client.record import Example
from trainer_client.replay import ReplayJob, read_logged_campaign, replay
from trainer_client.routing import Routing
from trainer_client.sketches import NO_OTHERS, SketchBook, WindowSketches, orthonormal, sketch_file

torch.set_num_threads(1)
POLICY = bytes([8]) * 32
SOURCES = [bytes([number]) * 32 for number in range(3)]
EXAMPLES: tuple[Example, ...] = tuple((SOURCES[n % 3], 10 - n) for n in range(6))
WEIGHTS = [[1000, 1000], [250, 1000], [0, 1000], [1000, 0], [500, 500], [1000, 1000]]
BLOCKS = {"first.weight": 0, "first.bias": 0, "second.weight": 1, "second.bias": 1}


class Twice(nn.Module):
    """Two linears; the second is used ``uses`` times."""

    def __init__(self, uses: int = 1) -> None:
        super().__init__()
        self.first, self.second, self.uses = nn.Linear(6, 5), nn.Linear(5, 5), uses

    def forward(self, x_BTI: Tensor) -> Tensor:
        x = functional.gelu(self.first(x_BTI))
        for _ in range(self.uses):
            x = functional.gelu(self.second(x)) + x
        return x


def losses(model: nn.Module, x_BTI: Tensor) -> Tensor:
    return model(x_BTI).square().sum(dim=(1, 2))  # type: ignore[no-any-return]


def sketched(
    model: nn.Module,
    x_BTI: Tensor,
    rank: int,
    sizes: Sequence[int] = (6,),
    weights: Sequence[Sequence[int]] = WEIGHTS,
    ranks: Mapping[str, int] = NO_OTHERS,
) -> SketchBook:
    """A book with one step, taken in micro-batches of these sizes."""
    book = SketchBook(rank, ranks)
    book.attach(["first.weight", "second.weight"])
    first = 0
    with Routing(model, BLOCKS, None, book) as routing:
        for size in sizes:
            some = slice(first, first + size)
            book.expect(3, EXAMPLES[some])
            with routing.micro_batch(weights[some]):
                routing.routed_loss(losses(model, x_BTI[some]), 6).backward()  # type: ignore[no-untyped-call]
            first += size
        routing.finish_step()
    book.take_step(POLICY, {"first.weight": 0.5, "second.weight": 0.25})
    return book


def oracle(model: nn.Module, x_BTI: Tensor) -> dict[str, Tensor]:
    """Each example's part ``[B, P, Q]`` of what reached the optimizer, in double precision."""
    model = copy.deepcopy(model).double()
    names = ["first.weight", "second.weight"]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in range(len(x_BTI)):
        loss = losses(model, x_BTI[row : row + 1].double()).sum() / 6
        for name, gradient in zip(
            names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True
        ):
            factor = {"first.weight": 0.5, "second.weight": 0.25}[name]
            parts[name].append(gradient * WEIGHTS[row][BLOCKS[name]] / 1000 * factor)
    return {name: torch.stack(held) for name, held in parts.items()}


def dense(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    left, right, scale = (tensors[f"{name}/{label}"] for label in ("left", "right", "scale"))
    return torch.einsum("nr,nrp,nrq->npq", scale.double(), left.double(), right.double())


def everything(book: SketchBook) -> dict[str, Tensor]:
    """All rows of a window with one step, in the order of ``EXAMPLES``."""
    window = book.window
    assert list(window.rows) == [(POLICY, *example) for example in EXAMPLES]
    return {
        f"{name}/{label}": part[: len(EXAMPLES)]
        for name, parts in window.factored.items()
        for label, part in zip(("left", "right", "scale"), parts, strict=True)
    }


def inputs() -> Tensor:
    return torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 1, 4)])
def test_full_rank_sketches_are_the_weighted_gradients_up_to_eight_bits(uses: int, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = Twice(uses)
    found = everything(sketched(copy.deepcopy(model), inputs(), 5, sizes))
    for name, expected in oracle(model, inputs()).items():
        error = (dense(found, name) - expected).norm() / expected.norm()
        assert error < 0.02, f"{name}: relative error {error:.3f}"


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_sketches_lose_little_more_than_the_best_of_that_rank(rank: int) -> None:
    torch.manual_seed(1)
    model = Twice()
    found = everything(sketched(copy.deepcopy(model), inputs(), rank))
    for name, expected in oracle(model, inputs()).items():
        lost = (dense(found, name) - expected).norm()
        singular = torch.linalg.svdvals(expected)
        best = singular[:, rank:].square().sum().sqrt()
        assert lost < 1.1 * best + 0.02 * expected.norm()
        assert found[f"{name}/left"].shape == (6, rank, 5)


def test_example_without_weight_has_no_sketch_whatever_is_in_it() -> None:
    torch.manual_seed(1)
    model, x_BTI = Twice(), inputs()
    honest = everything(sketched(copy.deepcopy(model), x_BTI, 2))
    x_BTI[2], x_BTI[3] = 1e30, float("nan")
    weights = [list(row) for row in WEIGHTS]
    weights[3] = [0, 0]
    found = everything(sketched(copy.deepcopy(model), x_BTI, 2, weights=weights))
    assert not honest["first.weight/scale"][2].any()
    assert not found["first.weight/scale"][2].any()
    for name in ("first.weight", "second.weight"):
        assert not found[f"{name}/scale"][3].any()
        others = [0, 1, 4, 5]
        assert torch.equal(dense(found, name)[others], dense(honest, name)[others])


def test_parameter_closed_to_a_whole_micro_batch_is_zero_there() -> None:
    torch.manual_seed(1)
    weights = [[1000, 0], [1000, 0], [1000, 1000], [1000, 1000], [1000, 1000], [1000, 1000]]
    found = everything(sketched(Twice(), inputs(), 2, (2, 4), weights))
    assert not found["second.weight/scale"][:2].any()
    assert found["second.weight/scale"][2:].all()


def test_file_has_one_sources_rows_in_rising_order() -> None:
    torch.manual_seed(1)
    book = sketched(Twice(), inputs(), 2)
    whole = everything(book)
    tensors = sketch_file(book.window, POLICY, SOURCES[0])
    assert tensors.pop("examples").tolist() == [7, 10]
    assert tensors.pop("visits").tolist() == [[3, 7], [3, 10]]
    rows = [EXAMPLES.index((SOURCES[0], example)) for example in (7, 10)]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    for name, sizes in (("first.weight", (5, 6)), ("second.weight", (5, 5))):
        for label, size in zip(("left", "right"), sizes, strict=True):
            assert tensors[f"{name}/{label}"].dtype == torch.uint8
            tensors[f"{name}/{label}"] = unpacked(tensors[f"{name}/{label}"], size)
            assert tensors[f"{name}/{label}"].abs().max() <= 7
        expected = dense(whole, name)[rows]
        assert (dense(tensors, name) - expected).norm() < 0.15 * expected.norm()
    assert sketch_file(book.window, bytes(32), SOURCES[0]) == {}
    assert sketch_file(book.window, POLICY, bytes([9]) * 32) == {}


def test_file_leaves_out_what_its_source_was_kept_out_of_and_is_whole_where_that_was_all() -> None:
    torch.manual_seed(1)
    weights = [[0, 1000], [1000, 1000], [0, 0]] * 2
    book = sketched(Twice(), inputs(), 2, weights=weights)
    names = [
        {label.rpartition("/")[0] for label in sketch_file(book.window, POLICY, source) if "/" in label}
        for source in SOURCES
    ]
    assert names == [{"second.weight"}, {"first.weight", "second.weight"}, {"first.weight", "second.weight"}]


def test_parameter_with_a_rank_of_its_own_is_sketched_at_it() -> None:
    torch.manual_seed(1)
    found = everything(sketched(Twice(), inputs(), 1, ranks={"second.weight": 4}))
    assert found["first.weight/left"].shape == (6, 1, 5)
    assert found["second.weight/left"].shape == (6, 4, 5)


def take_again(book: SketchBook, model: nn.Module, x_BTI: Tensor, step: int, rows: Sequence[int]) -> None:
    """Another step, of the examples at ``rows``."""
    model.zero_grad()
    with Routing(model, BLOCKS, None, book) as routing:
        book.expect(step, [EXAMPLES[row] for row in rows])
        with routing.micro_batch([WEIGHTS[row] for row in rows]):
            routing.routed_loss(losses(model, x_BTI[list(rows)]), 6).backward()  # type: ignore[no-untyped-call]
        routing.finish_step()
    book.take_step(POLICY, {"first.weight": 0.5, "second.weight": 0.25})


@pytest.mark.parametrize(("rank", "most"), [(5, 0.03), (2, 0.5)])
def test_visits_of_an_example_are_summed_within_the_window(rank: int, most: float) -> None:
    torch.manual_seed(1)
    model, x_BTI, other_BTI = Twice(), inputs(), inputs().flip(1)
    book = sketched(copy.deepcopy(model), x_BTI, rank)
    again = [5, 1, 0]
    take_again(book, copy.deepcopy(model), other_BTI, 4, again)
    first, second = oracle(model, x_BTI), oracle(model, other_BTI)
    found = everything(book)
    for name, expected in first.items():
        expected[again] += second[name][again]
        best = torch.linalg.svdvals(expected)[:, rank:].square().sum().sqrt()
        lost = (dense(found, name) - expected).norm()
        assert lost < 1.3 * best + 0.03 * expected.norm()
        assert lost < most * expected.norm()
    tensors = sketch_file(book.window, POLICY, SOURCES[0])
    assert tensors["visits"].tolist() == [[3, 7], [3, 10], [4, 10]]


def test_parameter_first_opened_later_in_a_window_has_nothing_of_before() -> None:
    torch.manual_seed(1)
    closed = [[1000, 0]] * 6
    book = sketched(Twice(), inputs(), 2, weights=closed)
    assert set(book.window.factored) == {"first.weight"}
    take_again(book, Twice(), inputs(), 4, [0, 1])
    assert "second.weight/scale" not in sketch_file(book.window, POLICY, SOURCES[2])
    scale = sketch_file(book.window, POLICY, SOURCES[0])["second.weight/scale"]
    assert scale.shape == (2, 2)
    assert not scale[0].any()
    assert scale[1].all()


def test_sketches_survive_as_plain_data_and_going_back_drops_what_came_since() -> None:
    torch.manual_seed(1)
    model = Twice()
    book = sketched(model, inputs(), 2)
    plain = book.window.plain()
    before = {name: part.clone() for name, part in everything(book).items()}
    take_again(book, model, inputs().flip(1), 4, [0, 1, 2])
    book.expect(5, EXAMPLES)
    book.go_back_to(WindowSketches.from_plain(plain))
    book.take_step(POLICY, {})
    after = everything(book)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [step for _, step in book.window.visits] == [3] * 6
    assert len(book.end_window().rows) == 6
    assert book.window.rows == {}


def test_basis_is_orthonormal_and_zero_rows_stay_zero() -> None:
    y_BrP = torch.randn(3, 3, 7, generator=torch.Generator().manual_seed(1))
    y_BrP[1] = 0
    y_BrP[2, 1] = 2 * y_BrP[2, 0]
    basis = orthonormal(y_BrP)
    assert torch.allclose(basis[0] @ basis[0].T, torch.eye(3), atol=1e-6)
    assert not basis[1].any()
    assert torch.isfinite(basis).all()


# In a governed run


def sketch_files(scene: Scene) -> dict[tuple[int, bytes], dict[str, Tensor]]:
    """Every file that the log's windows list, by last step and source."""
    found = {}
    folder = scene.directory / "accumulators"
    for event in scene.events(Kind.STEP):
        operation = event.operation
        assert isinstance(operation, StepOperation)
        if not operation.accumulator_root:
            continue
        root = operation.accumulator_root
        window = decode_window((folder / "windows" / f"{root.hex()}.window").read_bytes(), root)
        assert window.total.sketches_sha256 == b""
        for entry in window.of_sources:
            path = folder / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors"
            assert path.stat().st_size == entry.sketches_bytes
            found[window.terms.last_step, entry.source] = load_file(path)
    return found


def test_every_admitted_visit_of_a_run_is_in_a_file_the_log_commits_to_and_comes_out_again(scene: Scene) -> None:
    frozen = (BlockWeight("layers.1", 0),)
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 500, frozen)))
    scene.plan_changes.update(accumulator_window_steps=5, sketch_rank=2, model={"dropout": 0.5})
    scene.plan_changes.update(sketch_ranks={"layers.0": 3}, hyperparameters={"sketch_rank.layers.1": "9"})
    scene.arguments["micro_batch_size"] = 4
    scene.train()
    visits = {
        (step, source, example)
        for (_, source), tensors in sketch_files(scene).items()
        for step, example in tensors["visits"].tolist()
    }
    admitted = {
        (step, source, example)
        for step in range(1, STEPS + 1)
        for source, example in scene.presented(step)
        if source != scene.sources["secret"]
    }
    assert visits == admitted
    for (_, source), tensors in sketch_files(scene).items():
        assert tensors["layers.0.weight/scale"].shape[1] == 3
        assert ("layers.1.weight/scale" in tensors) == (source == scene.sources["manual"])
        assert source != scene.sources["manual"] or tensors["layers.1.weight/scale"].shape[1] == 2
    torch.manual_seed(1)
    model = TinyModel(dropout=0.5)
    job = ReplayJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
        sources=scene.training_sources,
        loss=run_losses,
        collate=collate,
        micro_batch_size=4,
    )
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job)
    assert (found.matched, found.difference) == (STEPS, None)


def test_steps_the_log_refused_leave_no_sketch(scene: Scene) -> None:
    scene.register()
    scene.plan_changes.update(accumulator_window_steps=5, sketch_rank=1)
    refused: list[bytes] = []

    def refuse_step_eight_once(event: object) -> Rejected | None:
        operation = event.operation  # type: ignore[attr-defined]
        if isinstance(operation, StepOperation) and operation.index == 8 and not refused:
            refused.append(event.id)  # type: ignore[attr-defined]
            return Rejected(Reason.BAD_FIELD, "for the test")
        return None

    scene.node.refuse_step = refuse_step_eight_once
    scene.train()
    assert scene.node.head(CAMPAIGN).rollbacks == 1
    for tensors in sketch_files(scene).values():
        visits = [tuple(row) for row in tensors["visits"].tolist()]
        assert visits == sorted(set(visits))


@pytest.mark.parametrize(
    ("changes", "policy", "reason"),
    [
        ({"sketch_rank": 1}, {}, Reason.BAD_FIELD),
        ({"sketch_ranks": {"layers.0": 2}, "accumulator_window_steps": 5}, {}, Reason.BAD_FIELD),
        ({"sketch_rank": 2, "sketch_ranks": {"layers.0": 1}, "accumulator_window_steps": 5}, {}, Reason.BAD_FIELD),
        ({"sketch_rank": 2, "sketch_ranks": {"layers.0": 65}, "accumulator_window_steps": 5}, {}, Reason.BAD_FIELD),
        ({"sketch_rank": 2, "sketch_ranks": {"layers.7": 3}, "accumulator_window_steps": 5}, {}, Reason.BAD_FIELD),
        ({"sketch_rank": 1, "accumulator_window_steps": 5}, {"least_sketch_rank": 2}, Reason.SKETCHES_TOO_COARSE),
    ],
)
def test_campaign_without_the_sketches_it_owes_is_refused(
    scene: Scene, changes: dict[str, object], policy: dict[str, int], reason: Reason
) -> None:
    scene.register(**policy)
    scene.plan_changes.update(changes)
    with pytest.raises(Rejected) as refusal, scene.run():
        pass
    assert refusal.value.reason is reason


def test_gradients_that_fill_float16_are_sketched_as_they_are() -> None:
    """As loss scaling has them: an entry of a product of such gradients is beyond float16."""
    torch.manual_seed(0)
    left, right = 3_000 * torch.randn(1, 4, 1_024), torch.randn(1, 4, 512)
    found = []
    for dtype in (torch.float32, torch.float16):
        book = SketchBook(2)
        book.attach(["first.weight"])
        book.expect(1, EXAMPLES[:1])
        book.observe("first.weight", left.to(dtype), right.to(dtype), (1_000,))
        book.take_step(POLICY, {"first.weight": 1.0})
        found.append(book.window.rows_of("first.weight"))
    scale, half_scale = (parts[2] for parts in found)
    assert bool(torch.isfinite(half_scale).all())
    assert bool((scale > 0).all())
    assert torch.allclose(half_scale, scale, rtol=0.02)
