"""Per-source sums against one autograd pass per example, and what is on disk and on the log of them."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_node import FakeNode, running_node
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from consensus.accumulators import AccumulatorWindow, decode_window
from consensus.event import CheckedEvent, Kind
from consensus.keys import Ed25519SigningKey
from consensus.portions import BlockWeight, ClassRule, SourceUse, StepOperation
from consensus.rejection import Reason, Rejected
from trainer_client.accumulators import AccumulatorsBroken, SourceAccumulators, check_conservation
from trainer_client.clipping import clip_block_gradients
from trainer_client.governed import DEFAULT_SETTINGS, governed
from trainer_client.pieces import whole_entries
from trainer_client.plan import CampaignPlan, TrainingSource, default_blocks
from trainer_client.rollback import TrainingState, restore_snapshot, take_snapshot
from trainer_client.routed_modules import observed_parameters
from trainer_client.routing import Routing

torch.set_num_threads(1)
RELATIVE_ERROR = 1e-5
CAMPAIGN, POLICY = bytes([7]) * 32, bytes([8]) * 32
KEY = Ed25519SigningKey(bytes([9]) * 32)
SOURCES = [bytes([number]) * 32 for number in range(3)]
STEPS, WINDOW, BATCH_SIZE = 10, 4, 6


class TinyModel(nn.Module):
    """Embedding, norm and linears, one of them without bias; the head shares the embedding's tensor if ``tied``."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.head = nn.Linear(8, 32, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x = self.norm(self.embedding(bytes_BT))
        for layer in self.layers:
            x = x + functional.gelu(layer(x))
        logits: Tensor = self.head(x)
        return logits


def losses(model: nn.Module, inputs_BT: Tensor) -> Tensor:
    logits = model(inputs_BT[:, :-1]).transpose(1, 2)
    return functional.cross_entropy(logits, inputs_BT[:, 1:], reduction="none").mean(dim=1)


def blocks_of(model: nn.Module) -> dict[str, int]:
    return {name: number for number, names in enumerate(default_blocks(model).values()) for name in names}


class Run:
    """Steps of a routed model with accumulators, in micro-batches, beside an oracle in double precision."""

    def __init__(self, directory: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.block_of = blocks_of(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.accumulators = SourceAccumulators(directory, CAMPAIGN, WINDOW, STEPS, dtype=dtype)
        self.accumulators.attach(model, self.block_of, whole_entries(model))
        self.generator = torch.Generator().manual_seed(3)
        self.oracle: dict[tuple[bytes, str], Tensor] = {}
        self.root = b""

    def step(self, index: int, extra: Callable[[], None] = lambda: None, recorded: bool = True) -> None:
        block_count = max(self.block_of.values()) + 1
        tokens = torch.randint(0, 32, (BATCH_SIZE, 7), generator=self.generator)
        sources = [SOURCES[number] for number in (0, 1, 0, 2, 1, 0)]
        rows = [[(0, 250, 1000)[(number + index) % 3]] * block_count for number in range(BATCH_SIZE)]
        parts = self.oracle_parts(tokens, sources, rows)
        self.optimizer.param_groups[0]["lr"] = 0.01 / index
        self.optimizer.zero_grad()
        with Routing(self.model, self.block_of, self.accumulators) as routing:
            for first in range(0, BATCH_SIZE, 4):
                some = slice(first, first + 4)
                with routing.micro_batch(rows[some], sources[some]):
                    routing.routed_loss(losses(self.model, tokens[some]), BATCH_SIZE).backward()
            routing.finish_step()
        extra()
        norms = clip_block_gradients(self.model, self.block_of, 0.05)
        factors = [None if norm is None else min(1.0, 0.05 / (norm + 1e-6)) for norm in norms]
        for (source, name), part in parts.items():
            factor = factors[self.block_of[name]]
            assert factor is not None
            held = self.oracle.setdefault((source, name), torch.zeros_like(part))
            held += 0.01 / index * factor * part
        self.accumulators.take_step(POLICY, self.optimizer, factors)
        self.optimizer.step()
        root = self.accumulators.end_step(index, recorded=recorded)
        if root is not None:
            self.root = root.result()

    def oracle_parts(
        self, tokens: Tensor, sources: list[bytes], rows: list[list[int]]
    ) -> dict[tuple[bytes, str], Tensor]:
        model = copy.deepcopy(self.model).double()
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        }
        parts: dict[tuple[bytes, str], Tensor] = {}
        for row, source in enumerate(sources):
            loss = losses(model, tokens[row : row + 1]).sum()
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                part = parts.setdefault((source, name), torch.zeros_like(gradient))
                part += rows[row][self.block_of[name]] / 1000 * gradient / BATCH_SIZE
        return parts


def read_window(directory: Path, root: bytes) -> tuple[AccumulatorWindow, list[dict[str, Tensor]]]:
    """The window and its blobs, each checked against its commitment."""
    window = decode_window((directory / "windows" / f"{root.hex()}.window").read_bytes(), root)
    blobs = []
    for entry in window.entries:
        path = directory / "blobs" / f"{entry.blob_sha256.hex()}.safetensors"
        content = path.read_bytes()
        assert (hashlib.sha256(content).digest(), len(content)) == (entry.blob_sha256, entry.size_bytes)
        blobs.append(load_file(path))
    return window, blobs


def test_sums_agree_with_one_backward_per_example(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = Run(tmp_path, TinyModel())
    with run.accumulators:
        for index in range(1, WINDOW + 1):
            run.step(index)
    window, (total, *blobs) = read_window(tmp_path, run.root)
    assert (window.terms.first_step, window.terms.last_step) == (1, WINDOW)
    assert [(entry.policy, entry.source) for entry in window.of_sources] == [(POLICY, source) for source in SOURCES]
    assert set(total) == {"layers.0.weight", "layers.0.bias", "layers.1.weight", "head.weight"}
    for source, blob in zip(SOURCES, blobs, strict=True):
        for name in total:
            oracle = run.oracle[source, name]
            error = (blob[name].double() - oracle).norm() / oracle.norm()
            assert error <= RELATIVE_ERROR, f"{name}: relative error {error:.2e}"


def test_sums_add_up_to_the_whole_gradient_also_as_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = Run(tmp_path, TinyModel(), torch.bfloat16)
    with run.accumulators:
        for index in range(1, WINDOW + 1):
            run.step(index)
    _, (total, *blobs) = read_window(tmp_path, run.root)
    assert total["head.weight"].dtype == torch.bfloat16
    wide = [{name: part.float() for name, part in blob.items()} for blob in (total, *blobs)]
    check_conservation(wide[1:], wide[0], 2**-8)
    with pytest.raises(AccumulatorsBroken, match="away from the whole one"):
        check_conservation(wide[2:], wide[0], 2**-8)


def test_gradient_from_elsewhere_stops_the_run_at_the_end_of_its_window(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = Run(tmp_path, TinyModel())

    def smuggle() -> None:
        gradient = run.model.get_parameter("layers.0.weight").grad
        assert gradient is not None
        gradient += 0.001

    with run.accumulators:
        run.step(1)
        run.step(2, smuggle)
        run.step(3)
        with pytest.raises(AccumulatorsBroken, match=r"'layers.0.weight'"):
            run.step(4)


def test_restored_snapshot_takes_an_undone_step_out_of_the_sums(tmp_path: Path) -> None:
    roots = []
    for undone in (False, True):
        torch.manual_seed(1)
        run = Run(tmp_path / str(undone), TinyModel())
        state = TrainingState(run.model, run.optimizer, {"accumulators": run.accumulators}, {"data": run.generator})
        with run.accumulators:
            run.step(1)
            snapshot = take_snapshot(state, 1, bytes(32))  # type: ignore[arg-type]
            if undone:
                for index in (2, 3, 4, 5):
                    run.step(index)
                restore_snapshot(snapshot, state)
            for index in (2, 3, 4):
                run.step(index)
        roots.append(run.root)
    assert roots[0] == roots[1]


def test_replayed_window_is_written_nowhere_and_the_next_starts_empty(tmp_path: Path) -> None:
    roots = []
    for recorded in (True, False):
        torch.manual_seed(1)
        run = Run(tmp_path / str(recorded), TinyModel())
        with run.accumulators:
            for index in range(1, 2 * WINDOW + 1):
                run.step(index, recorded=recorded or index > WINDOW)
        roots.append(run.root)
        assert len(list((tmp_path / str(recorded) / "windows").iterdir())) == 1 + recorded
    assert roots[0] == roots[1]


def test_tensor_shared_with_an_embedding_is_not_observed() -> None:
    assert "head.weight" in observed_parameters(TinyModel())
    assert observed_parameters(TinyModel(tied=True)) == ("layers.0.weight", "layers.0.bias", "layers.1.weight")


# In a governed run


class Scene:
    """A node, three sources of which one is refused, and runs of a governed fine-tune with accumulators."""

    def __init__(self, node: FakeNode, directory: Path) -> None:
        self.node = node
        self.directory = directory
        self.texts = {
            name: [hashlib.sha256(f"{name} {n}".encode()).digest()[:10] for n in range(8)]
            for name in ("manual", "paper", "secret")
        }
        self.sources: dict[str, bytes] = {}
        self.model = TinyModel()

    def register(self, frozen: tuple[BlockWeight, ...] = ()) -> None:
        self.node.policy(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 1_000, frozen)))
        self.sources = {
            "manual": self.node.source("manual", self.texts["manual"]),
            "paper": self.node.source("paper", self.texts["paper"], owner="data-source-2", content_class="news"),
            "secret": self.node.source("secret", self.texts["secret"], licence="LicenseRef-Proprietary"),
        }
        self.node.delegate(CAMPAIGN, KEY)

    def train(self) -> None:
        torch.manual_seed(1)
        self.model = TinyModel()
        plan = CampaignPlan(
            chain_id=self.node.chain_id,
            operator=self.node.member_id("operator-1"),
            campaign=CAMPAIGN,
            name="a campaign",
            purpose="fine-tuning",
            base_model="tiny",
            sampler_seed=bytes(32),
            batch_size=BATCH_SIZE,
            planned_steps=STEPS,
            accumulator_window_steps=WINDOW,
        )
        with governed(
            self.model,
            torch.optim.AdamW(self.model.parameters(), lr=0.01),
            plan=plan,
            sources=[TrainingSource(self.sources[name], self.texts[name]) for name in self.sources],
            node=self.node.url,
            job_key=KEY,
            run_directory=self.directory,
            collate=lambda examples: torch.tensor([[byte % 32 for byte in example] for example in examples]),
            settings=replace(DEFAULT_SETTINGS, pause_limit_seconds=20.0, snapshot_every_steps=3),
        ) as run:
            for batch in run.batches():
                run.learn(losses(self.model, batch.inputs))
            run.release(self.directory / "tuned.safetensors")

    def steps(self) -> Mapping[int, CheckedEvent]:
        """The last step event of each index."""
        return {
            event.operation.index: event
            for event in self.node.order
            if event.entry.kind is Kind.STEP and isinstance(event.operation, StepOperation)
        }

    def roots(self) -> dict[int, bytes]:
        found = {}
        for index, event in self.steps().items():
            assert isinstance(event.operation, StepOperation)
            if event.operation.accumulator_root:
                found[index] = event.operation.accumulator_root
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with running_node() as node:
        yield Scene(node, tmp_path / "run")


def test_every_window_is_on_the_log_with_the_sources_its_steps_admitted(scene: Scene) -> None:
    scene.register(frozen=(BlockWeight("layers.1", 0),))
    scene.train()
    assert list(scene.roots()) == [4, 8, 10]
    for index, root in scene.roots().items():
        window, (total, *blobs) = read_window(scene.directory / "accumulators", root)
        assert window.terms.last_step == index
        admitted = {
            item.source
            for step in range(window.terms.first_step, index + 1)
            for item in scene.steps()[step].items
            if isinstance(item, SourceUse) and item.admitted
        }
        assert {entry.source for entry in window.of_sources} == admitted
        assert scene.sources["secret"] not in admitted
        for entry, blob in zip(window.of_sources, blobs, strict=True):
            assert ("layers.1.weight" in blob) == (entry.source == scene.sources["manual"])
        wide = [{name: part.float() for name, part in blob.items()} for blob in (total, *blobs)]
        check_conservation(wide[1:], wide[0], 2**-8)


def test_steps_the_log_refused_leave_the_windows_of_an_undisturbed_run(tmp_path: Path) -> None:
    roots = []
    for disturbed in (False, True):
        with running_node() as node:
            scene = Scene(node, tmp_path / str(disturbed))
            scene.register()
            refused: list[bytes] = []

            def refuse_once(event: CheckedEvent, refused: list[bytes] = refused) -> Rejected | None:
                if isinstance(event.operation, StepOperation) and event.operation.index == 6 and not refused:
                    refused.append(event.id)
                return Rejected(Reason.GRANT_CLOSED, "too late") if event.id in refused else None

            if disturbed:
                node.refuse_step = refuse_once
            scene.train()
            assert node.head(CAMPAIGN).rollbacks == disturbed
            roots.append(scene.roots())
    assert roots[0] == roots[1]
