"""Models of transformers and PEFT under routing: randomly initialised from their configurations, nothing downloaded."""

import copy
from collections.abc import Callable

import pytest
import torch
from lora_fixtures import with_lora
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from trainer_client.plan import default_blocks
from trainer_client.probe import probe, tensor_inputs
from trainer_client.routing import Routing, RoutingError, RoutingLeak, RoutingUnsupported
from trainer_client.rowwise import is_rowwise

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXAMPLES, LENGTH, VOCABULARY = 5, 7, 31
RELATIVE_ERROR = 2e-6
torch.set_num_threads(1)

SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}


def gpt2() -> nn.Module:
    """Tied head, ``Conv1D``, position ids of batch 1."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=LENGTH, **SMALL))


def llama(**changes: object) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**LAYERS, num_key_value_heads=1, **SMALL, **changes))


def gemma() -> nn.Module:
    """Tied head, an embedding that scales by a buffer without dimensions."""
    return Gemma2ForCausalLM(Gemma2Config(**LAYERS, num_key_value_heads=1, head_dim=4, **SMALL))


def bert() -> nn.Module:
    """Tied head whose bias has another parameter block than its weight, and two owners."""
    return BertForMaskedLM(BertConfig(**LAYERS, max_position_embeddings=LENGTH, **SMALL))


def checkpointed_llama() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    model.activation_checkpointing_enable()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama, tied and checkpointed": checkpointed_llama,
    "gemma": gemma,
    "gemma with LoRA": lambda: with_lora(gemma(), ["q_proj", "down_proj"]),
    "bert": bert,
    "gpt2 with LoRA": lambda: with_lora(gpt2(), ["c_attn", "c_fc"], fan_in_fan_out=True),
    "llama with LoRA": lambda: with_lora(llama(), ["q_proj", "v_proj", "down_proj"]),
    "llama with LoRA and a head of its own": lambda: with_lora(llama(), ["k_proj"], modules_to_save=["lm_head"]),
}


def built(name: str) -> tuple[nn.Module, dict[str, int]]:
    torch.manual_seed(0)
    model = MODELS[name]()
    model.eval()
    if "checkpointed" in name:
        model.train()
    blocks = {each: number for number, names in enumerate(default_blocks(model).values()) for each in names}
    return model, blocks


def examples(seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def losses(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT.roll(-1, 1), reduction="none").mean(1)


def rows(block_count: int) -> list[list[int]]:
    """The first example blocked, the others at weights that differ by example and block; one block closed to all."""
    uneven = [
        [0 if block == 1 else 1 + (137 * row + 61 * block) % 1000 for block in range(block_count)]
        for row in range(EXAMPLES - 1)
    ]
    return [[0] * block_count, *uneven]


def gradients(model: nn.Module, blocks: dict[str, int], tokens_BT: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    with Routing(model, blocks) as routing:
        with routing.micro_batch(rows(routing.block_count)):
            routing.routed_loss(losses(model, tokens_BT), EXAMPLES).backward()
        routing.finish_step()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree_with_one_backward_per_example(name: str) -> None:
    model, blocks = built(name)
    found = gradients(model, blocks, examples())
    exact = copy.deepcopy(model).double()
    trainable = {each: parameter for each, parameter in exact.named_parameters() if parameter.requires_grad}
    weights = rows(max(blocks.values()) + 1)
    expected = {each: torch.zeros_like(parameter) for each, parameter in trainable.items()}
    for example in range(EXAMPLES):
        loss = losses(exact, examples()[example : example + 1]).sum()
        parts = torch.autograd.grad(loss, list(trainable.values()))
        for each, part in zip(trainable, parts, strict=True):
            expected[each] += weights[example][blocks[each]] / 1000 * part / EXAMPLES
    assert found.keys() == {each for each in trainable if blocks[each] != 1}
    for each, gradient in found.items():
        error = (gradient.double() - expected[each]).norm()  # a softmax does not see a shift: biases of keys have none
        assert error <= RELATIVE_ERROR * expected[each].norm() + 1e-9, f"{each}: error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_forward_has_the_bits_of_the_model_itself_and_the_model_is_unchanged_after(name: str) -> None:
    model, blocks = built(name)
    plain = losses(model, examples())
    with Routing(model, blocks) as routing, routing.micro_batch([[1000] * routing.block_count] * EXAMPLES):
        assert torch.equal(losses(model, examples()), plain)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_replacing_a_blocked_example_changes_no_bit_of_any_gradient(name: str) -> None:
    model, blocks = built(name)
    replaced = examples()
    replaced[0] = examples(2)[0]
    first, second = gradients(model, blocks, examples()), gradients(model, blocks, replaced)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[each], second[each]) for each in first)
    probe(model, blocks, losses, tensor_inputs(examples(), examples(2)[0]))


def test_probe_finds_the_mean_over_unmasked_tokens_of_the_batch() -> None:
    """The loss transformers computes by itself: how long a blocked example is scales everybody's gradient."""
    model, blocks = built("llama")

    def mean_over_tokens(model: nn.Module, tokens_BT: Tensor) -> Tensor:
        kept_BT = tokens_BT != 1
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT, reduction="none")
        return (loss_BT * kept_BT).sum(1) / kept_BT.sum()

    shorter = examples()[0].clone()
    shorter[3:] = 1
    with pytest.raises(RoutingLeak, match="replacing a blocked example"):
        probe(model, blocks, mean_over_tokens, tensor_inputs(examples(), shorter))
    with pytest.raises(RoutingError, match="one loss per example"):
        probe(
            model, blocks, lambda model, tokens_BT: losses(model, tokens_BT).mean(), tensor_inputs(examples(), shorter)
        )


def test_experts_that_regroup_examples_are_refused_by_name() -> None:
    model = MixtralForCausalLM(MixtralConfig(**LAYERS, num_key_value_heads=1, num_local_experts=2, **SMALL))
    with pytest.raises(RoutingUnsupported, match="MixtralTopKRouter"):
        Routing(model, {name: 0 for name, _ in model.named_parameters()})


def test_table_indexed_by_distances_instead_of_examples_is_refused_by_name() -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes, **SMALL))
    model.eval()

    def loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
        logits_BTV = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).logits
        return functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT, reduction="none").mean(1)

    inputs = tensor_inputs(examples(), examples(2)[0])
    with pytest.raises(RoutingUnsupported, match="relative_attention_bias"):
        probe(model, {name: 0 for name, _ in model.named_parameters()}, loss, inputs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    probe(model, {name: 0 for name, parameter in model.named_parameters()}, loss, inputs)


class MixingNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.norm()


class DrawingNorm(MixingNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * functional.dropout(x)


class CountingNorm(MixingNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.shape[0]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LlamaRMSNorm(8), True),
        (T5LayerNorm(8), True),
        (GemmaRMSNorm(8), True),
        (nn.RMSNorm(8), True),
        (LlamaRMSNorm(8).bfloat16(), True),
        (MixingNorm(), False),
        (DrawingNorm(), False),
        (CountingNorm(), False),
        (nn.GroupNorm(2, 8), False),
        (nn.Linear(8, 8), False),
        (nn.Bilinear(8, 8, 8), False),
        (nn.Dropout(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_rowwise_is_what_treats_rows_alike_and_apart(module: nn.Module, expected: bool) -> None:
    random_before = torch.get_rng_state()
    assert is_rowwise(module) is expected
    assert torch.equal(torch.get_rng_state(), random_before)
