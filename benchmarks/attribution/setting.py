"""A fine-tune small enough to be repeated hundreds of times: what an attribution predicts can be tried out.

Sixteen sources of sixteen pieces of text, each source from a topic of its own of ``pydoc_data.topics``; a byte
transformer trained on other topics; ``STEPS`` steps of AdamW in batches of 32 with per-block clipping, through
``trainer_client.routing``, as a governed job takes them: of all weights, or of LoRA's two matrices beside each linear,
everything else frozen. A *subset* leaves sources (or examples) out: their weight is zero, order and normalisation stay.
Same subset and order, same weights, bit for bit.

Outputs asked about are the next pieces of the sources' own topics, which nothing was trained on.
"""

import copy
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from attribution.query import Output, log_chances
from trainer_client.accumulators import SourceAccumulators
from trainer_client.demo.base import BaseTraining
from trainer_client.demo.corpus import BASE_TOPICS
from trainer_client.demo.model import ByteModel, ModelConfig, parameter_blocks, per_example_loss
from trainer_client.pieces import whole_entries
from trainer_client.routing import Routing
from trainer_client.scaling import Scaling

PIECE_BYTES = 64
PROMPT_BYTES = 16
CONFIG = ModelConfig(context_bytes=PIECE_BYTES, layer_count=2, head_count=4, width=64)
BASE = BaseTraining(steps=400, batch_size=16)
BATCH_SIZE = 32
EPOCHS = 6
LORA_RANK = 8
LORA_SCALE = 2.0
"""What LoRA's matrices add is multiplied by it."""
WARM_UP_STEPS = 8
CLIP_NORM = 1.0
FULL_PERMILLE = 1_000
POLICY = b"p" * 32
CAMPAIGN = b"c" * 32
LOWER = ("embedding", "block.0")
"""Parameter blocks that every other source may not move, where there are depth profiles."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is of everything."""

    sources: int
    examples_per_source: int
    queries_per_source: int
    subsets: int
    """Retrains for each kind of subset."""
    orders: int
    """Retrains of each of the larger subsets in orders of their own."""


FULL = Sizes(16, 16, 2, 100, 2)
QUICK = Sizes(8, 8, 1, 12, 1)


class Tuning(StrEnum):
    """What of the model is tuned."""

    FULL = "full"
    LORA = "lora"


LEARNING_RATE = {Tuning.FULL: 1e-3, Tuning.LORA: 5e-3}
"""LoRA's is the one of 0.002, 0.005 and 0.01 by which outputs gained most, with profiles and without (seed 7)."""


class LowRankAdapted(nn.Module):
    """A frozen linear and LoRA's two matrices beside it (Hu et al., arXiv 2106.09685), which add nothing at first.

    The inner one is random as every new linear of torch.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Linear(linear.in_features, LORA_RANK, bias=False)
        self.lora_B = nn.Linear(LORA_RANK, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """As the linear's, with what the matrices add."""
        added: Tensor = self.lora_B(self.lora_A(x))
        found: Tensor = self.linear(x)
        return found + LORA_SCALE * added


@dataclass(frozen=True, slots=True)
class Setting:
    """Base model, examples (source ``s`` has rows ``s*E`` to ``(s+1)*E``), outputs to ask about, order of training."""

    sizes: Sizes
    base: ByteModel
    examples_NT: Tensor
    queries: tuple[Output, ...]
    public: tuple[bytes, ...]
    order: tuple[tuple[int, ...], ...]
    """Rows of each step."""
    profiled: bool
    """Whether every other source may move the upper half of the model alone."""
    tuning: Tuning
    batch_size: int
    learning_rate: float

    def source_of(self, row: int) -> int:
        """The source an example is of."""
        return row // self.sizes.examples_per_source

    def rows_of(self, sources: Collection[int]) -> frozenset[int]:
        """All examples of these sources."""
        return frozenset(row for row in range(len(self.examples_NT)) if self.source_of(row) in sources)


def make(sizes: Sizes, *, profiled: bool, tuning: Tuning, seed: int = 0) -> Setting:
    """The setting of a seed."""
    needed = (sizes.examples_per_source + sizes.queries_per_source) * PIECE_BYTES
    names = [name for name in sorted(topics) if name not in BASE_TOPICS and len(topics[name]) > needed + 200]
    chosen = random.Random(seed).sample(names, sizes.sources)
    rows: list[bytes] = []
    queries: list[Output] = []
    for name in chosen:
        text = " ".join(topics[name].encode("ascii", "ignore").decode().split()).encode()
        pieces = [text[start : start + PIECE_BYTES] for start in range(0, needed, PIECE_BYTES)]
        rows += pieces[: sizes.examples_per_source]
        queries += [Output(tuple(piece), PROMPT_BYTES, len(piece)) for piece in pieces[sizes.examples_per_source :]]
    pieces = public_pieces()
    order = order_of(len(rows), str(seed))
    examples_NT = torch.tensor([list(row) for row in rows])
    torch.manual_seed(seed)
    base = ByteModel(CONFIG)
    train_base(base, BASE, pieces, seed)
    if tuning is Tuning.LORA:
        adapt(base, seed)
    rate = LEARNING_RATE[tuning]
    return Setting(sizes, base, examples_NT, tuple(queries), tuple(pieces), order, profiled, tuning, BATCH_SIZE, rate)


def order_of(count: int, seed: str, epochs: int = EPOCHS, batch_size: int = BATCH_SIZE) -> tuple[tuple[int, ...], ...]:
    """Which of ``count`` rows each step takes."""
    order: list[tuple[int, ...]] = []
    for epoch in range(epochs):
        shuffled = random.Random(f"{seed} {epoch}").sample(range(count), count)
        order += [tuple(shuffled[at : at + batch_size]) for at in range(0, count, batch_size)]
    return tuple(order)


def adapt(model: nn.Module, seed: int) -> None:
    """Freezes the model and puts LoRA's matrices beside each of its linears, the inner ones random."""
    model.requires_grad_(False)
    torch.manual_seed(seed)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LowRankAdapted(linear))


def public_pieces() -> list[bytes]:
    """What base models are trained on and factors are fitted over."""
    base_text = " ".join(" ".join(topics[name] for name in BASE_TOPICS).split()).encode("ascii", "ignore")
    return [base_text[start : start + PIECE_BYTES] for start in range(0, len(base_text) - PIECE_BYTES, PIECE_BYTES)]


def train_base(
    model: ByteModel,
    training: BaseTraining,
    pieces: Sequence[bytes],
    seed: int,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains a byte model on these pieces; ``told`` each step and its loss in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    draw = random.Random(f"base {seed}")
    for step in range(training.steps):
        warm_up = min(1, (step + 1) / training.warm_up_steps)
        optimizer.param_groups[0]["lr"] = training.learning_rate * warm_up * max(0.05, 1 - step / training.steps)
        records_BT = torch.tensor([list(piece) for piece in draw.sample(pieces, training.batch_size)])
        loss = per_example_loss(model, records_BT).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        told(step + 1, loss.item())


def train(
    setting: Setting,
    kept: Collection[int],
    accumulators: SourceAccumulators | None = None,
    *,
    apart: bool = False,
    order: Sequence[Sequence[int]] = (),
) -> tuple[ByteModel, list[tuple[int, bytes]]]:
    """The fine-tune over the kept rows alone; with ``accumulators`` each source's part of it is summed.

    ``apart``: each example counts as a source of its own there. ``order``: another than the setting's.

    Returns:
        The model, and the last step and root of each window of accumulators.
    """
    model = copy.deepcopy(setting.base)
    tuned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    table = {block: [name for name in names if name in tuned] for block, names in parameter_blocks(model).items()}
    blocks = {block: names for block, names in table.items() if names}
    block_of = {name: number for number, names in enumerate(blocks.values()) for name in names}
    weights_SK = [source_weights(setting, source, list(blocks)) for source in range(setting.sizes.sources)]
    optimizer = torch.optim.AdamW(tuned.values(), lr=setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
    if accumulators is not None:
        accumulators.attach(model, block_of, whole_entries(model))
    roots: list[tuple[int, bytes]] = []
    scaling = Scaling(optimizer, CLIP_NORM)
    routing = Routing(model, block_of, accumulators, None if accumulators is None else accumulators.sketches)
    with routing:
        for index, presented in enumerate(order or setting.order, 1):
            rows = [row for row in presented if row in kept]
            if rows:
                weights_BK = [weights_SK[setting.source_of(row)] for row in rows]
                groups = [source_id(row if apart else setting.source_of(row)) for row in rows]
                if accumulators is not None:
                    accumulators.expect(index, list(zip(groups, rows, strict=True)))
                with routing.micro_batch(weights_BK, groups):
                    loss_B = per_example_loss(model, setting.examples_NT[rows])
                    routing.routed_loss(loss_B, setting.batch_size).backward()  # type: ignore[no-untyped-call]
                routing.finish_step()
                scaled = scaling.finish(model, block_of)
                if accumulators is not None:
                    accumulators.take_step(POLICY, optimizer, scaled.factors)
                optimizer.step()
            if accumulators is not None:
                window = accumulators.end_step(index, recorded=True)
                roots += [] if window is None else [(index, window.result())]
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return model, roots


def source_id(source: int) -> bytes:
    """A source's name in the accumulators."""
    return source.to_bytes(32, "big")


def source_weights(setting: Setting, source: int, blocks: Sequence[str]) -> list[int]:
    """The depth profile of a source."""
    if setting.profiled and source % 2:
        return [0 if block in LOWER else FULL_PERMILLE for block in blocks]
    return [FULL_PERMILLE] * len(blocks)


@torch.no_grad()
def log_odds(model: ByteModel, queries: Sequence[Output]) -> list[float]:
    """What every query's log-odds come to: the figure that an attribution predicts."""
    found = []
    for query in queries:
        log_p_N = log_chances(model, query).double()
        found.append(float((log_p_N - torch.log1p(-log_p_N.exp())).sum()))
    return found
