"""Governed runs of a tiny model: a scene with a node, sources and a plan."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from fake_node import SALT, FakeNode
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from consensus.event import CheckedEvent, Kind
from consensus.keys import Ed25519SigningKey
from consensus.portions import BlockWeight, ClassRule, SourceRefusal
from consensus.sampler import presented_examples
from trainer_client.calls import Retries
from trainer_client.governed import DEFAULT_SETTINGS, GovernedRun, governed
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource, manifest_of
from trainer_client.record import Example
from trainer_client.replay import ReplayJob
from trainer_client.submit import Client

CAMPAIGN = bytes([7]) * 32
KEY = Ed25519SigningKey(bytes([9]) * 32)
STEPS = 12
BATCH_SIZE = 6
CLIENTS: list[Client] = []
QUICK = Retries(attempts=2, first_seconds=0.01, longest_seconds=0.02)
EVERYTHING = (ClassRule("documentation", 1_000, ()), ClassRule("news", 1_000, ()))
SETTINGS = replace(DEFAULT_SETTINGS, pause_limit_seconds=20.0)


class TinyModel(nn.Module):
    """Next-byte prediction over 32 symbols; parameter blocks ``embedding``, ``layers.0``, ``layers.1``, ``head``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 32)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x = self.embedding(bytes_BT)
        for layer in self.layers:
            x = x + self.dropout(functional.gelu(layer(x)))
        logits: Tensor = self.head(x)
        return logits


class HalfModel(TinyModel):
    """Computes in float16."""

    def forward(self, bytes_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return super().forward(bytes_BT)


class CheckpointedModel(TinyModel):
    """Computes what is between embedding and head again in the backward pass."""

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x = self.embedding(bytes_BT)
        for layer in self.layers:
            x = x + checkpoint(lambda x, layer=layer: functional.gelu(layer(x)), x, use_reentrant=False)
        logits: Tensor = self.head(x)
        return logits


class CausalHeads(nn.Module):
    """Attention of two heads, queries, keys and values joined."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 2
        self.c_attn = nn.Linear(8, 24)
        self.c_proj = nn.Linear(8, 8)

    def forward(self, x_BTI: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.c_attn(x_BTI).chunk(3, dim=-1))
        together = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        output: Tensor = self.c_proj(together)
        return output


class TinyAttention(nn.Module):
    """As ``TinyModel``, with attention between; parameter blocks by head ``attention.head.0``, ``attention.head.1``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.attention = CausalHeads()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 32)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x = self.embedding(bytes_BT)
        logits: Tensor = self.head(self.dropout(x + self.attention(x)))
        return logits


class HalfAttention(TinyAttention):
    """Computes in float16."""

    def forward(self, bytes_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return super().forward(bytes_BT)


def collate(examples: object) -> Tensor:
    return torch.tensor([list(example) for example in examples])  # type: ignore[attr-defined]


def losses(model: nn.Module, inputs_BT: Tensor) -> Tensor:
    logits = model(inputs_BT[:, :-1]).transpose(1, 2)
    return functional.cross_entropy(logits, inputs_BT[:, 1:], reduction="none").mean(dim=1)


def examples_of(name: str, count: int = 8) -> list[bytes]:
    return [
        bytes(byte % 32 for byte in hashlib.sha256(f"{name} {number}".encode()).digest()[:10])
        for number in range(count)
    ]


def edge_between(texts: list[bytes]) -> int:
    """An edge of entropy bands, in thousandths of a nat: half of the texts are below it by ``TinyModel``'s loss."""
    torch.manual_seed(1)
    with torch.no_grad():
        ordered = sorted(losses(TinyModel(), collate(texts)).tolist())
    return round((ordered[len(texts) // 2 - 1] + ordered[len(texts) // 2]) * 500)


@dataclass
class Scene:
    """A node with a policy, an admitted source, one of class news, and one whose licence is not admitted.

    Of the first and the last so many examples are in ``reserve``. A run that goes ``step_by_step`` waits for the log
    before it learns: each snapshot is final by the next step, and what was recorded is there for a run after it.
    """

    node: FakeNode
    directory: Path
    texts: dict[str, list[bytes]]
    sources: dict[str, bytes] = field(default_factory=dict)
    model: nn.Module = field(default_factory=TinyModel)
    settings: RunSettings = SETTINGS
    plan_changes: dict[str, object] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)
    build: Callable[..., nn.Module] = TinyModel
    trained: Callable[[nn.Module], Iterable[object]] = nn.Module.parameters
    seen: list[Example] = field(default_factory=list)
    salt: bytes | None = SALT
    reserve: int = 0
    campaign: bytes = CAMPAIGN
    key: Ed25519SigningKey = KEY
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    wrapped: nn.Module = field(default_factory=nn.Module)
    step_by_step: bool = False

    def register(self, **policy: object) -> None:
        if policy or not self.node.order:
            self.node.policy(**policy)
        self.sources = {
            "manual": self.node.source("manual", self.texts["manual"], reserve=self.reserve),
            "paper": self.node.source("paper", self.texts["paper"], owner="data-source-2", content_class="news"),
            "secret": self.node.source(
                "secret", self.texts["secret"], licence="LicenseRef-Proprietary", reserve=self.reserve
            ),
        }
        self.node.delegate(self.campaign, self.key)

    @property
    def training_sources(self) -> list[TrainingSource[bytes]]:
        return [TrainingSource(self.sources[name], self.texts[name], self.salt) for name in self.sources]

    def client(self) -> Client:
        CLIENTS.append(Client(self.node.url, retries=QUICK))
        return CLIENTS[-1]

    def run(self) -> GovernedRun[bytes]:
        torch.manual_seed(1)
        self.model = self.build(**self.plan_changes.pop("model", {}))  # type: ignore[arg-type]
        self.wrapped = self.wrap(self.model)
        optimizer = torch.optim.AdamW(self.trained(self.model), lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]
        fields: dict[str, object] = {
            "chain_id": self.node.chain_id,
            "operator": self.node.member_id("operator-1"),
            "campaign": self.campaign,
            "name": "a campaign",
            "purpose": "fine-tuning",
            "base_model": "tiny",
            "sampler_seed": bytes(32),
            "batch_size": BATCH_SIZE,
            "planned_steps": STEPS,
            **self.plan_changes,
        }
        return governed(
            self.wrapped,
            optimizer,
            plan=CampaignPlan(**fields),  # type: ignore[arg-type]
            sources=self.training_sources,
            node=self.client(),
            job_key=self.key,
            run_directory=self.directory,
            settings=self.settings,
            **{"collate": collate, **self.arguments},  # type: ignore[arg-type]
        )

    def train(self, at_step: Callable[[int], None] = lambda step: None) -> GovernedRun[bytes]:
        with self.run() as run:
            for batch in run.batches():
                if self.step_by_step:
                    run._ledger.wait_all_settled()
                at_step(batch.step)
                self.seen.extend(batch.examples)
                run.learn(losses(self.wrapped, batch.inputs))
            run.release(self.directory / "tuned.safetensors")
        return run

    def loop(self, body: Callable[[GovernedRun[bytes], Tensor, int], None]) -> None:
        """A run whose loop body is ``body``."""
        with self.run() as run:
            for batch in run.batches():
                body(run, batch.inputs, batch.step)

    def events(self, kind: Kind) -> list[CheckedEvent]:
        return [event for event in self.node.order if event.entry.kind is kind]

    def presented(self, step: int) -> tuple[Example, ...]:
        return presented_examples(manifest_of(self.training_sources), bytes(32), BATCH_SIZE, step)

    def reasons(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for event in self.events(Kind.REFUSAL):
            for item in event.items:
                assert isinstance(item, SourceRefusal)
                counts[item.reason] += item.count
        return counts


def by_heads(scene: Scene) -> None:
    """Nobody may move head 0; ``news`` may not move head 1 either."""
    nobody = BlockWeight("attention.head.0", 0)
    scene.register(
        routing_granularities=("block", "head"),
        classes=(
            ClassRule("documentation", 1_000, (nobody,)),
            ClassRule("news", 1_000, (nobody, BlockWeight("attention.head.1", 0))),
        ),
    )
    scene.build = TinyAttention
    scene.plan_changes.update(routing_granularity="head", model={"dropout": 0.5})
    scene.arguments["probe_loss"] = losses


def replay_job(scene: Scene, dropout: float = 0.5, **changes: object) -> ReplayJob[bytes]:
    """What takes a campaign of a ``TinyModel`` again."""
    torch.manual_seed(1)
    model = TinyModel(dropout)
    return ReplayJob(
        **{  # type: ignore[arg-type]
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
            "sources": scene.training_sources,
            "loss": losses,
            "collate": collate,
            **changes,
        }
    )


def job_again(scene: Scene, scaler: torch.amp.GradScaler | None = None) -> ReplayJob[bytes]:
    """What takes a campaign ``by_heads`` again."""
    torch.manual_seed(1)
    model = scene.build(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return ReplayJob(model, optimizer, scene.training_sources, losses, collate, scaler=scaler)


def limit_pauses(run: GovernedRun[bytes], seconds: float) -> None:
    """From here on the run waits for a grant only so long; opening it had the time of its settings."""
    keeper = run._ledger._own._grants  # type: ignore[union-attr]
    keeper._settings = replace(keeper._settings, pause_limit_seconds=seconds)  # type: ignore[union-attr]


class RecitesAt:
    """A memorization check that finds the least of the examples recited which it is first asked about in one step.

    ``at`` is told of the steps as they come; ``caught`` is what was found.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.at: list[int] = []
        self.caught: list[Example] = []
        self.calibrators: dict[bytes, tuple[bytes, ...]] = {}

    def glance(self, shown: Mapping[Example, bytes], hits_BT: Tensor, floor: int) -> list[Example]:
        return []

    def signals(self, model: nn.Module, shown: Mapping[Example, bytes], threshold: int) -> dict[Example, int]:
        if self.caught or self.at[-1] != self.step:
            return {}
        self.caught.append(min(shown))
        return {self.caught[0]: 900}

    def calibrate_on(self, source: bytes, texts: Sequence[bytes]) -> None:
        self.calibrators[source] = tuple(texts)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_moved_alike(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor], part: float = 0.01
) -> None:
    """Each tensor moved from ``base`` as expected, but for a part of its change's norm.

    Sums in another order differ in the last bits, and AdamW makes a whole step of a gradient that is all but zero:
    single numbers cannot be held to a tolerance of their own.
    """
    for name, wanted in expected.items():
        moved = (wanted - base[name]).norm()
        assert (found[name] - wanted).norm() <= part * moved + 1e-7, f"{name} moved by {float(moved):.3g}"
