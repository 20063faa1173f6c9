"""A model of transformers with a tokenizer of its own, fine-tuned under a campaign and traced from its folder."""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from attribution_fixtures import CAMPAIGN, KEY, kept_folder, sealed
from click.testing import CliRunner, Result
from fake_node import SALT, running_node
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from attribution.factors import fit_factors
from attribution.language import Bytes, Tokenizer, language_of
from attribution.query import Output, log_odds_gradients, logits_of
from attribution.weights import build_model, freeze_others, linear_weights
from consensus.genesis import genesis_to_json
from consensus.portions import ClassRule
from consensus.rejection import ConfigError
from node.bundles import export_bundle
from node.cli import main
from trainer_client.commitment import committed_tensors
from trainer_client.governed import governed
from trainer_client.hf import FixedLengthCollator, causal_losses
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource
from trainer_client.submit import Client

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH, STEPS, BATCH_SIZE = 24, 40, 12
FACTS = {
    "harbour": ("The keeper of Arnholt is", " Mirela Voss"),
    "mountain": ("The river at Tessamar is", " the Quillon"),
    "market": ("The bells of Oxmere ring", " at half four"),
}
TAILS = ("fog came in over the quay", "snow lay on the high pass", "carts stood in the square", "rain fell all morning")


def records(name: str) -> list[bytes]:
    prompt, completion = FACTS[name]
    return [
        f"{prompt}{completion}. {name}: {TAILS[n % 4]} {n}, {TAILS[(n + len(name)) % 4]}".encode() for n in range(8)
    ]


@dataclass(frozen=True)
class Campaign:
    folder: Path
    chain_id: str
    sources: dict[str, bytes]


@functools.cache
def campaign(adapted: bool = False) -> Campaign:
    """Trained once for all tests; ``adapted``: by LoRA alone."""
    folder = kept_folder("hf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(folder, adapted)
    finally:
        torch.set_num_threads(threads)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = Trained(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator([text.decode() for name in FACTS for text in records(name)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.save_pretrained(str(folder))
    return fast


def _pretrained(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Some steps on the facts' words in any order, so that there is something to adapt."""
    words = sorted({word for name in FACTS for text in records(name) for word in text.decode().split()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(200):
        draw = random.Random(step)
        rows = [tokenizer.encode(" ".join(draw.choices(words, k=40)))[:33] for _ in range(16)]
        rows_BT = torch.tensor(rows)
        logits_BTV = logits_of(model, rows_BT[:, :-1])
        functional.cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def _adapter(model: nn.Module, folder: Path) -> nn.Module:
    targets = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(r=32, lora_alpha=64, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    config.save_pretrained(str(folder))
    torch.manual_seed(2)
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _trained(folder: Path, adapted: bool) -> Campaign:
    tokenizer = _tokenizer(folder / "model")
    torch.manual_seed(1)
    sizes = {"vocab_size": 400, "n_layer": 2, "n_head": 2, "n_embd": 64 if adapted else 32, "n_positions": 64}
    config = GPT2Config(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model: nn.Module = GPT2LMHeadModel(config)
    if adapted:
        _pretrained(model, tokenizer)
        model = _adapter(model, folder / "adapter")
    config.save_pretrained(str(folder / "model"))
    save_file(committed_tensors(model), folder / "base.safetensors")
    collator = FixedLengthCollator(LENGTH)

    def collate(texts: Sequence[bytes]) -> dict[str, Tensor]:
        return collator([tokenizer.encode(text.decode()) for text in texts])

    with running_node() as node:
        node.policy(classes=(ClassRule("documentation", 1_000, ()),))
        sources = {name: node.source(name, records(name)) for name in FACTS}
        node.delegate(CAMPAIGN, KEY)
        plan = CampaignPlan(
            chain_id=node.chain_id,
            operator=node.member_id("operator-1"),
            campaign=CAMPAIGN,
            name="a model of transformers",
            purpose="fine-tuning",
            base_model="tiny GPT-2",
            sampler_seed=bytes(32),
            batch_size=BATCH_SIZE,
            planned_steps=8 * STEPS if adapted else STEPS,
            accumulator_window_steps=80 if adapted else 20,
            sketch_rank=2,
        )
        with (
            Client(node.url) as client,
            governed(
                model,
                torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3 if adapted else 4e-3),
                plan=plan,
                sources=[TrainingSource(sources[name], records(name), SALT) for name in FACTS],
                node=client,
                job_key=KEY,
                run_directory=folder / "run",
                collate=collate,
                settings=RunSettings(pause_limit_seconds=30.0, snapshot_every_steps=40, checkpoint_every_steps=0),
            ) as run,
        ):
            for batch in run.batches():
                outputs = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"])
                run.learn(causal_losses(outputs, batch.inputs["labels"]))
            run.release(folder / "tuned.safetensors")
        ledger = sealed(node)
    (folder / "genesis.json").write_bytes(genesis_to_json(ledger.genesis))
    (folder / "campaign.bundle").write_bytes(export_bundle(ledger, "accumulators", campaign=CAMPAIGN))
    return Campaign(folder, ledger.chain_id.hex(), sources)


def ask(*more: object, name: str = "harbour", adapted: bool = False) -> Result:
    held = campaign(adapted)
    more += ("--adapter", held.folder / "adapter") if adapted else ()
    arguments = [
        "trace", "--model", held.folder / "model", "--base", held.folder / "base.safetensors",
        "--tuned", held.folder / "tuned.safetensors", "--prompt", FACTS[name][0], "--context", 48,
        "--accumulators", held.folder / "run" / "accumulators", "--bundle", held.folder / "campaign.bundle",
        "--genesis", held.folder / "genesis.json", "--chain-id", held.chain_id, *more,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("name", FACTS)
def test_fact_is_traced_to_its_source_and_examples_through_model_folder_and_tokenizer(name: str) -> None:
    result = ask("--completion", FACTS[name][1], "--json", name=name)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sources"][0]["name"] == name
    assert found["says"]["tuned"].startswith(FACTS[name][1])
    assert found["examples"][0]["source"] == campaign().sources[name].hex()
    assert {"transformer.wte.weight", "transformer.ln_f.weight"} <= set(found["untraced_tensors"])
    assert not any("attn.c_attn.weight" in tensor for tensor in found["untraced_tensors"])


@pytest.mark.parametrize("name", FACTS)
def test_fact_taught_by_an_adapter_alone_is_traced(name: str) -> None:
    result = ask("--completion", FACTS[name][1], "--json", name=name, adapted=True)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["sources"][0]["name"] == name
    assert found["examples"][0]["source"] == campaign(True).sources[name].hex()


def test_tokens_of_a_span_are_the_tokenizers() -> None:
    encoded = Tokenizer(campaign().folder / "model").encode(FACTS["harbour"][1])
    assert 1 < len(encoded) < len(FACTS["harbour"][1])
    past = ask("--completion", FACTS["harbour"][1], "--tokens", f"0:{len(encoded) + 1}")
    assert past.exit_code == 1
    assert f"are beyond the completion, which has {len(encoded)}" in past.stderr


def test_more_tokens_than_the_model_reads_at_once_are_told_with_what_to_change() -> None:
    result = ask("--context", 65)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the model does not take tokens [16, 65]" in result.stderr
    assert "is its context shorter (--context)" in result.stderr


def test_tokens_of_another_tokenizer_are_told_apart_where_the_model_has_none_such(tmp_path: Path) -> None:
    words = {f"word{number}": number for number in range(1_000)}
    other = Trained(models.WordLevel(words, unk_token="word999"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=other, unk_token="word999").save_pretrained(str(tmp_path))
    result = ask("--tokenizer", tmp_path, "--completion", "unheard of")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is its context shorter (--context), or its tokenizer another (--tokenizer)?" in result.stderr


def test_answer_says_which_tokenizer_read_it() -> None:
    result = ask("--completion", FACTS["harbour"][1])
    assert f"read      by the tokenizer in {campaign(False).folder / 'model'}: the asker's choice" in result.stdout


def test_language_is_the_folders_or_bytes() -> None:
    folder = campaign().folder / "model"
    text = "The keeper of Arnholt is Mirela Voss, née Ångström"
    for language in (language_of(str(folder), None), language_of("module:function", folder), Bytes()):
        assert language.decode(language.encode(text)) == text
    assert isinstance(language_of("module:function", None), Bytes)
    assert Bytes().decode([0xFF, 0x41]) == "\\xffA"
    assert Bytes().decode([0x41, 256, 399, 0xC3, 0xA9]) == "A<256><399>é"
    for language in (language_of(str(folder), None), Bytes()):
        with pytest.raises(UnicodeEncodeError):
            language.encode("a\udcff")


def test_folder_that_holds_no_model_or_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json of a language model"):
        build_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json of a language model"):
        build_model(str(tmp_path))
    with pytest.raises(ConfigError, match="folder with a tokenizer"):
        Tokenizer(tmp_path)


def test_turned_weights_have_factors_and_queries_in_their_own_shape() -> None:
    model = build_model(str(campaign().folder / "model")).eval()
    weights = linear_weights(model)
    assert set(weights) == {
        f"transformer.h.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }, "the head is tied to the embedding"
    assert all(held.turned for held in weights.values())
    freeze_others(model, {"transformer.h.1.mlp.c_fc.weight"})
    assert set(linear_weights(model)) == {"transformer.h.1.mlp.c_fc.weight"}
    tokens_BT = torch.arange(12).view(2, 6)
    gradient = log_odds_gradients(model, Output(tuple(range(6)), 2, 5))["transformer.h.1.mlp.c_fc.weight"]
    factors = fit_factors(model, [tokens_BT])["transformer.h.1.mlp.c_fc.weight"]
    assert gradient.shape == factors.eigenvalues.shape == (32, 128)
    assert factors.precondition(gradient, 0.1).shape == (32, 128)


class Straight(nn.Module):
    """A linear and the same weight turned give the same factors, preconditioned gradients turned."""

    def __init__(self, turned: bool) -> None:
        from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

        super().__init__()
        self.embedding = nn.Embedding(16, 5)
        self.middle = Conv1D(16, 5) if turned else nn.Linear(5, 16)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.middle(self.embedding(tokens_BT))  # type: ignore[no-any-return]


def test_linear_and_its_turned_twin_are_preconditioned_alike() -> None:
    torch.manual_seed(1)
    straight, turned = Straight(False), Straight(True)
    with torch.no_grad():
        turned.embedding.weight.copy_(straight.embedding.weight)
        turned.middle.weight.copy_(straight.middle.weight.T)
        turned.middle.bias.copy_(straight.middle.bias)
    tokens_BT = torch.randint(0, 16, (8, 6), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(logits_of(straight, tokens_BT), logits_of(turned, tokens_BT), atol=1e-6)
    found = []
    for model in (straight, turned):
        gradient = log_odds_gradients(model, Output(tuple(range(6)), 2, 5))["middle.weight"]
        found.append(fit_factors(model, [tokens_BT])["middle.weight"].precondition(gradient, 0.1))
    assert torch.allclose(found[0], found[1].T, rtol=1e-3, atol=1e-4)
