"""A causal byte-level transformer of 0.87 million parameters.

Small enough to fine-tune on two cores in half a minute, and made only of modules whose parameter
gradients ``trainer_client.routing`` can attribute to examples: positions are looked up per example
(``[B, T]`` indices), never broadcast, because a broadcast adds the examples together first.

Shape suffixes: B examples, T bytes, D width, H heads, E width of a head, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY_SIZE = 256
INITIAL_DEVIATION = 0.06


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a :class:`ByteModel`; the default has 875,264 parameters."""

    context_bytes: int = 128
    layer_count: int = 4
    head_count: int = 4
    width: int = 128


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a byte sees itself and the bytes before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_count = config.head_count
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch_size, length, width = x_BTD.shape
        shape_BTHE = (batch_size, length, self.head_count, width // self.head_count)
        query_BTD, key_BTD, value_BTD = self.query_key_value(x_BTD).split(width, dim=-1)
        mixed_BHTE = functional.scaled_dot_product_attention(
            query_BTD.view(shape_BTHE).transpose(1, 2),
            key_BTD.view(shape_BTHE).transpose(1, 2),
            value_BTD.view(shape_BTHE).transpose(1, 2),
            is_causal=True,
        )
        projected_BTD: Tensor = self.output(mixed_BHTE.transpose(1, 2).reshape(x_BTD.shape))
        return projected_BTD


class TransformerBlock(nn.Module):
    """Attention, then a two-layer perceptron, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.perceptron_norm = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        hidden_BTD = self.expand(self.perceptron_norm(x_BTD))
        contracted_BTD: Tensor = self.contract(functional.gelu(hidden_BTD, approximate="tanh"))
        return x_BTD + contracted_BTD


class ByteModel(nn.Module):
    """Next-byte prediction over at most ``config.context_bytes`` bytes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.byte_embedding = nn.Embedding(VOCABULARY_SIZE, config.width)
        self.position_embedding = nn.Embedding(config.context_bytes, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layer_count))
        self.final_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY_SIZE, bias=False)
        self._initialise()

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` for the byte after each of ``bytes_BT`` (int64)."""
        positions_BT = torch.arange(bytes_BT.shape[1], device=bytes_BT.device).expand_as(bytes_BT)
        x_BTD = self.byte_embedding(bytes_BT) + self.position_embedding(positions_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(self.final_norm(x_BTD))
        return logits_BTV

    def _initialise(self) -> None:
        residual_scale = (2 * self.config.layer_count) ** -0.5
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("attention.output.weight", "contract.weight")):
                nn.init.normal_(parameter, std=INITIAL_DEVIATION * residual_scale)
            else:
                nn.init.normal_(parameter, std=0.02 if "embedding" in name else INITIAL_DEVIATION)


def demonstration_model() -> ByteModel:
    """The demonstration's model, untrained: for ``countersign trace --model``."""
    return ByteModel(ModelConfig())


def parameter_blocks(model: ByteModel) -> dict[str, tuple[str, ...]]:
    """The parameter-block table at granularity ``block``: ``embedding``, ``block.0`` …, ``head``.

    Returns:
        Block name to the names of its parameters, in the order of the forward pass.
    """
    table: dict[str, list[str]] = {"embedding": []}
    table |= {f"block.{index}": [] for index in range(model.config.layer_count)}
    table["head"] = []
    for name, _ in model.named_parameters():
        first, _, rest = name.partition(".")
        if first == "blocks":
            table[f"block.{rest.partition('.')[0]}"].append(name)
        elif first in ("byte_embedding", "position_embedding"):
            table["embedding"].append(name)
        else:
            table["head"].append(name)
    return {block: tuple(names) for block, names in table.items()}


def records_to_tensor(records: Sequence[bytes]) -> Tensor:
    """Records of equal length as int64 ``[B, T]``."""
    return torch.tensor([list(record) for record in records], dtype=torch.int64)


def per_example_loss(model: nn.Module, records_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each record's bytes after its first: ``[B]``."""
    return per_byte_loss(model, records_BT).mean(dim=1)


def per_byte_loss(model: nn.Module, records_BT: Tensor) -> Tensor:
    """Cross-entropy in nats of each byte after the first: ``[B, T - 1]``."""
    logits_BTV = model(records_BT[:, :-1])
    return functional.cross_entropy(logits_BTV.transpose(1, 2), records_BT[:, 1:], reduction="none")


def loss_and_predictions(model: nn.Module, records_BT: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``per_example_loss`` together with the logits ``[B, T - 1, V]`` and targets ``[B, T - 1]`` it is taken from."""
    logits_BTV, target_BT = model(records_BT[:, :-1]), records_BT[:, 1:]
    loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
    return loss_BT.mean(dim=1), (logits_BTV, target_BT)


def byte_predictions(model: nn.Module, texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """For each byte after the first of texts of one length: its loss, and whether it was the likeliest.

    Returns:
        float32 and bool, each ``[B, T - 1]``; the form that ``memorization.Predictions`` asks for.
    """
    records_BT = records_to_tensor(texts)
    logits_BTV = model(records_BT[:, :-1])
    target_BT = records_BT[:, 1:]
    loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
    return loss_BT, logits_BTV.argmax(dim=-1) == target_BT


@torch.no_grad()
def greedy_continuations(model: nn.Module, prompts: Sequence[bytes], byte_count: int) -> list[bytes]:
    """The ``byte_count`` likeliest next bytes after each prompt, each chosen greedily.

    Prompts of one length share a batch. Prompt and continuation together fit the model's context.
    """
    continuations: dict[int, bytes] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        text_BT = records_to_tensor([prompts[row] for row in rows])
        for _ in range(byte_count):
            next_B = model(text_BT)[:, -1].argmax(dim=-1)
            text_BT = torch.cat([text_BT, next_B[:, None]], dim=1)
        for row, completed in zip(rows, text_BT.tolist(), strict=True):
            continuations[row] = bytes(completed[length:])
    return [continuations[row] for row in range(len(prompts))]
