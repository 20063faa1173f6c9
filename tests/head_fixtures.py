"""Small models whose heads are parameter blocks, and what is routed to them."""

from collections.abc import Callable, Mapping

import torch
from lora_fixtures import with_lora
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from consensus.pieces import piece_named
from trainer_client.heads import head_blocks
from trainer_client.packing import PackedRows, pack
from trainer_client.pieces import part_of_entry
from trainer_client.plan import default_blocks
from trainer_client.routing import Routing

EXAMPLES, LENGTH, VOCABULARY = 5, 6, 23

SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2() -> nn.Module:
    """Joined queries, keys and values."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=3, n_embd=12, n_positions=LENGTH, **SMALL))


def llama() -> nn.Module:
    """Four query heads, in two groups that share keys and values; biases."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **sizes, **SMALL)
    )


def without_A(model: nn.Module) -> nn.Module:
    """LoRA of which only B is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "gpt2 with LoRA": lambda: with_lora(gpt2(), ["c_attn", "attn.c_proj"], fan_in_fan_out=True),
    "llama with LoRA": lambda: with_lora(llama(), ["q_proj", "v_proj", "o_proj", "down_proj"]),
    "llama with frozen A": lambda: without_A(with_lora(llama(), ["q_proj", "v_proj"])),
}


def built(name: str) -> tuple[nn.Module, dict[str, int]]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in each:
                parameter.normal_(std=0.1)
    table = head_blocks(model, default_blocks(model))
    return model, {each: number for number, names in enumerate(table.values()) for each in names}


def examples(seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses_of(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT.roll(-1, 1), reduction="none").mean(1)


def packed_losses(model: nn.Module, rows: PackedRows) -> Tensor:
    """``losses_of`` of ``examples()``, which are packed into these rows."""
    targets = pack(examples().roll(-1, 1).tolist(), rows.packing.row_positions)
    given = {"position_ids": rows.positions_RT, "attention_mask": rows.attention_R1TT, "use_cache": False}
    logits_RVT = model(input_ids=rows.tokens_RT, **given).logits.transpose(1, 2)
    losses_RT = functional.cross_entropy(logits_RVT, targets.tokens_RT, reduction="none")
    return torch.stack([losses_RT.flatten()[first:end].mean() for first, end in rows.packing.spans_B])


def uneven(block_of: Mapping[str, int]) -> list[list[int]]:
    """Weights that differ by example and block, about a third of them zero, one example blocked everywhere."""
    rows = [
        [(137 * row + 61 * block) % 1001 if (row + 2 * block) % 3 else 0 for block in range(max(block_of.values()) + 1)]
        for row in range(EXAMPLES)
    ]
    rows[2] = [0] * len(rows[2])
    return rows


def gradients(
    model: nn.Module, block_of: Mapping[str, int], rows: list[list[int]], tokens_BT: Tensor
) -> dict[str, Tensor]:
    """By the table's entries; those without a gradient left out."""
    model.zero_grad()
    with Routing(model, block_of) as routing:
        with routing.micro_batch(rows):
            routing.routed_loss(losses_of(model, tokens_BT), EXAMPLES).backward()
        routing.finish_step()
        held = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {
            entry: part_of_entry(held, entry)
            for entry, block in block_of.items()
            if (entry in held)
            or ((piece := piece_named(entry)) and piece.tensor in held and block in routing.moved.blocks)
        }
