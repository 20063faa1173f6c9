"""Models of transformers fine-tuned by attention head and traced: which heads each source moved, which it may not."""

import copy
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from attribution_fixtures import CAMPAIGN, KEY, kept_folder, sealed
from click.testing import CliRunner, Result
from fake_node import SALT, running_node
from ledger_fixtures import LIBRARIAN, MemoryLedger
from msgspec.structs import replace
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from attribution.examples import Allowance, Asked, source_examples
from attribution.factors import FactorsOrigin, FactorsUsed, WeightFactors, factor_tensors, factors_from, fit_factors
from attribution.footprint import chosen_sources, example_footprint, footprint
from attribution.index import SketchedCampaign
from attribution.index_build import build_index, check_index
from attribution.log import CampaignLog, open_log
from attribution.page import page
from attribution.query import Output
from attribution.report import Answer, trace_json, trace_text
from attribution.sketches import RunFolder, SketchQuery
from attribution.trace import Trace, control_outputs, preconditioned_queries, queries_of_entries, trace_output
from attribution.weights import Search, accumulators_of, find_windows, freeze_others, load_model
from consensus.genesis import genesis_to_json
from consensus.identifiers import ChainId
from consensus.pieces import piece_named, tensor_named
from consensus.portions import BlockWeight, ClassRule
from consensus.rejection import Reason, Rejected
from node.bundles import export_bundle
from node.cli import main
from trainer_client.commitment import committed_tensors
from trainer_client.governed import governed
from trainer_client.hf import FixedLengthCollator, causal_losses
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource
from trainer_client.submit import Client

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTH, BATCH_SIZE, WINDOW_STEPS, SKETCH_RANK = 40, 12, 20, 2
FACTS = {
    "harbour": ("keeper of Arnholt is ", "Mirela Voss"),
    "mountain": ("river at Tessamar: ", "the Quillon"),
    "market": ("bells of Oxmere ring ", "at half four"),
}
TAILS = ("fog came over", "snow lay high", "carts stood", "rain fell")
CLOSED_TO = "harbour"
"""The source that may not move one head, of each kind of model."""
FULL, ADAPTED = "gpt2", "llama with LoRA"
STEPS = {FULL: 60, ADAPTED: 20}
HEAD = {FULL: "transformer.h.1.attn.head.0", ADAPTED: "base_model.model.model.layers.1.self_attn.head.2"}
OTHER_HEAD = {FULL: "transformer.h.1.attn.head.1", ADAPTED: "base_model.model.model.layers.1.self_attn.head.3"}


def records(name: str) -> list[bytes]:
    prompt, completion = FACTS[name]
    return [f"{prompt}{completion}. {TAILS[number % 4]} {number}".encode() for number in range(8)]


@dataclass(frozen=True)
class Campaign:
    folder: Path
    ledger: MemoryLedger
    sources: dict[str, bytes]

    def log(self) -> CampaignLog:
        chain_id = ChainId(bytes(self.ledger.chain_id))
        return open_log(self.folder / "campaign.bundle", self.folder / "genesis.json", chain_id)

    def search(self) -> Search:
        log = self.log()
        return find_windows(self.folder / "run" / "accumulators", log.bundle.campaign, log.provenance.windows)


@functools.cache
def campaign(kind: str) -> Campaign:
    """Trained once for all tests; nobody changes its folder."""
    folder = kept_folder("heads")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(folder, kind)
    finally:
        torch.set_num_threads(threads)


def _model(folder: Path, kind: str) -> nn.Module:
    torch.manual_seed(1)
    small = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config: GPT2Config | LlamaConfig
    if kind == FULL:
        dropouts = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
        config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **dropouts, **small)
        config.save_pretrained(str(folder / "model"))
        return GPT2LMHeadModel(config)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **small)
    config.save_pretrained(str(folder / "model"))
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter.save_pretrained(str(folder / "adapter"))
    return get_peft_model(LlamaForCausalLM(config), adapter)  # type: ignore[arg-type]


def _losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return causal_losses(outputs, inputs["labels"])


def _trained(folder: Path, kind: str) -> Campaign:
    model = _model(folder, kind)
    save_file(committed_tensors(model), folder / "base.safetensors")
    collator = FixedLengthCollator(LENGTH)

    def collate(texts: Sequence[bytes]) -> dict[str, Tensor]:
        return collator([list(text) for text in texts])

    with running_node() as node:
        node.policy(
            routing_granularities=("head",),
            classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 1_000, (BlockWeight(HEAD[kind], 0),))),
        )
        sources = {
            name: node.source(name, records(name), content_class="news" if name == CLOSED_TO else "documentation")
            for name in FACTS
        }
        node.delegate(CAMPAIGN, KEY)
        plan = CampaignPlan(
            chain_id=node.chain_id,
            operator=node.member_id("operator-1"),
            campaign=CAMPAIGN,
            name="a model by head",
            purpose="fine-tuning",
            base_model="tiny",
            sampler_seed=bytes(32),
            batch_size=BATCH_SIZE,
            planned_steps=STEPS[kind],
            routing_granularity="head",
            accumulator_window_steps=WINDOW_STEPS,
            sketch_rank=SKETCH_RANK,
        )
        with (
            Client(node.url) as client,
            governed(
                model,
                torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3),
                plan=plan,
                sources=[TrainingSource(sources[name], records(name), SALT) for name in FACTS],
                node=client,
                job_key=KEY,
                run_directory=folder / "run",
                collate=collate,
                probe_loss=_losses,
                settings=RunSettings(pause_limit_seconds=30.0, snapshot_every_steps=40, checkpoint_every_steps=0),
            ) as run,
        ):
            for batch in run.batches():
                run.learn(_losses(model, batch.inputs))
            run.release(folder / "tuned.safetensors")
        ledger = sealed(node)
    (folder / "genesis.json").write_bytes(genesis_to_json(ledger.genesis))
    (folder / "campaign.bundle").write_bytes(export_bundle(ledger, "accumulators", campaign=CAMPAIGN))
    made = Campaign(folder, ledger, sources)
    save_file(factor_tensors(_fitted(made, kind)), folder / "tuned.factors")
    return made


def model_at(held: Campaign, kind: str, root: bytes, which: str) -> nn.Module:
    """As ``countersign trace`` loads it: ``base`` or ``tuned``."""
    adapter = held.folder / "adapter" if kind == ADAPTED else None
    return load_model(str(held.folder / "model"), held.folder / f"{which}.safetensors", root, which, adapter)


def tuned_model(held: Campaign, kind: str) -> nn.Module:
    """With what the campaign did not tune frozen."""
    provenance = held.log().provenance
    assert provenance.release is not None
    model = model_at(held, kind, provenance.release.parameter_root, "tuned")
    tensors = [tensor.name for block in provenance.campaign.parameter_blocks for tensor in block.tensors]
    freeze_others(model, {tensor_named(name) for name in tensors})
    return model


def _texts(count: int) -> list[list[int]]:
    drawn = torch.randint(32, 127, (count, 60), generator=torch.Generator().manual_seed(5))
    return [list(row) for row in drawn.tolist()]


def _fitted(held: Campaign, kind: str) -> dict[str, WeightFactors]:
    return fit_factors(tuned_model(held, kind), [torch.tensor(_texts(16))])


def ask(kind: str, command: str, *more: object, folder: Path | None = None) -> Result:
    held = campaign(kind)
    folder = folder or held.folder
    arguments = [
        command, "--accumulators", folder / "run" / "accumulators", "--bundle", folder / "campaign.bundle",
        "--genesis", folder / "genesis.json", "--chain-id", held.ledger.chain_id.hex(), *more,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def trace(kind: str, name: str, *more: object) -> Result:
    held = campaign(kind)
    prompt, completion = FACTS[name]
    more += ("--adapter", held.folder / "adapter") if kind == ADAPTED else ()
    return ask(
        kind, "trace", "--model", held.folder / "model", "--base", held.folder / "base.safetensors",
        "--tuned", held.folder / "tuned.safetensors", "--factors", held.folder / "tuned.factors", "--context", 48,
        "--prompt", prompt, "--completion", completion, *more,
    )  # fmt: skip


def heads_of(held: Campaign) -> set[str]:
    blocks = held.log().provenance.campaign.parameter_blocks
    return {block.name for block in blocks if any(piece_named(tensor.name) for tensor in block.tensors)}


@pytest.mark.parametrize("name", FACTS)
def test_fact_is_traced_to_its_source_and_split_by_the_heads_that_it_moved(name: str) -> None:
    result = trace(FULL, name, "--json")
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout)
    assert found["made_likelier"]
    rows = {row["name"]: row for row in found["sources"]}
    assert found["sources"][0]["name"] == name
    heads = heads_of(campaign(FULL))
    assert len(heads) == 4
    for other, row in rows.items():
        assert sum(row["by_block"].values()) == pytest.approx(row["score"], rel=1e-4)
        closed = {HEAD[FULL]} if other == CLOSED_TO else set()
        assert set(row["no_direct_update"]) == closed
        assert heads & row["by_block"].keys() == heads - closed
        assert all(row["by_block"][head] != 0.0 for head in heads - closed)
    assert "transformer.h.1.attn.c_attn.bias" in found["untraced_tensors"]
    assert "transformer.h.1.attn.c_attn.weight" not in found["untraced_tensors"]
    assert not any(piece_named(tensor) for tensor in found["untraced_tensors"])


def asked_output() -> Output:
    """What the source says that a head is closed to."""
    prompt, completion = FACTS[CLOSED_TO]
    tokens = tuple((prompt + completion).encode())
    return Output(tokens, len(prompt), len(tokens))


@functools.cache
def traced(kind: str) -> Trace:
    held = campaign(kind)
    tuned, output = tuned_model(held, kind), asked_output()
    factors = factors_from(load_file(held.folder / "tuned.factors"), tuned)
    base = model_at(held, kind, held.log().provenance.campaign.base_root, "base")
    controls = control_outputs(_texts(25), output)
    return trace_output(base, tuned, factors, held.log().provenance, held.search().found, output, controls)


@pytest.mark.parametrize("kind", [FULL, ADAPTED])
def test_scores_by_head_are_the_whole_weights_scores_cut_at_the_heads(kind: str) -> None:
    """Sums put together to whole weights again, and the whole preconditioned gradient."""
    held = campaign(kind)
    tuned = tuned_model(held, kind)
    found = traced(kind)
    assert len(found.windows) == STEPS[kind] // WINDOW_STEPS
    factors = factors_from(load_file(held.folder / "tuned.factors"), tuned)
    queries, _ = preconditioned_queries(tuned, factors, [asked_output()])
    scores = dict.fromkeys(held.sources.values(), 0.0)
    parts = 0
    for file in held.search().found:
        for entry, sums in accumulators_of(file):
            whole = {name: torch.zeros(query.shape[1:]) for name, query in queries.items()}
            for name, part in sums.items():
                piece = piece_named(name)
                if piece is None and name in whole:
                    whole[name] += part
                elif piece is not None and piece.tensor in whole:
                    whole[piece.tensor].narrow(piece.dimension, piece.first, piece.end - piece.first).add_(part)
                    parts += 1
            scores[entry.source] -= sum(float((queries[name][0] * part).sum()) for name, part in whole.items())
    assert parts > 0
    for row in found.ranked:
        size = sum(abs(part) for part in row.by_block.values())
        assert row.score == pytest.approx(scores[row.source.id], abs=1e-4 * size)
        closed = row.source.id == held.sources[CLOSED_TO]
        assert row.closed == ((HEAD[kind],) if closed else ())
        assert OTHER_HEAD[kind] in row.by_block


@pytest.mark.parametrize("kind", [FULL, ADAPTED])
def test_source_that_a_head_is_closed_to_has_no_sum_of_its_pieces(kind: str) -> None:
    held = campaign(kind)
    blocks = {block.name: block.tensors for block in held.log().provenance.campaign.parameter_blocks}
    for file in held.search().found:
        for entry, sums in accumulators_of(file):
            own = {tensor.name: tuple(tensor.shape) for tensor in blocks[HEAD[kind]] if tensor.name in sums}
            assert bool(own) == (entry.source != held.sources[CLOSED_TO])
            assert all(tuple(sums[name].shape) == shape for name, shape in own.items())


@pytest.mark.parametrize("kind", [FULL, ADAPTED])
def test_footprint_shows_each_head_and_which_gets_no_direct_update(kind: str) -> None:
    held = campaign(kind)
    log, search = held.log(), held.search()
    found = {
        name: footprint(log.provenance, search.found, chosen_sources(log.provenance, [name], (), (), False))
        for name in FACTS
    }
    heads = heads_of(held)
    assert len(heads) == {FULL: 4, ADAPTED: 12}[kind], "Llama's keys and values are blocks of their own"
    for head in heads:
        assert sum(each.blocks[head].part or 0 for each in found.values()) == pytest.approx(1.0, abs=1e-2)
        assert [name for name, each in found.items() if not each.blocks[head].norm] == (
            [CLOSED_TO] if head == HEAD[kind] else []
        )
    document = json.loads(ask(kind, "footprint", "--source", CLOSED_TO, "--json").stdout)
    assert document["no_direct_update"] == [HEAD[kind]]
    assert document["blocks"][HEAD[kind]] == {"norm": 0.0, "part": 0.0}
    said = ask(kind, "footprint", "--class", "news")
    assert said.exit_code == 0
    (line,) = (line for line in said.stdout.splitlines() if line.startswith(HEAD[kind]))
    assert line.split(maxsplit=1)[1] == "no direct update"
    (line,) = (line for line in said.stdout.splitlines() if line.startswith(OTHER_HEAD[kind]))
    assert line.endswith(" %")
    both = json.loads(ask(kind, "footprint", "--source", CLOSED_TO, "--source", "market", "--json").stdout)
    assert both["no_direct_update"] == []


def test_footprint_of_a_revocation_goes_by_head(tmp_path: Path) -> None:
    held = campaign(FULL)
    folder = tmp_path / "traced"
    shutil.copytree(held.folder, folder)
    memory = copy.copy(held.ledger)
    memory.events, memory.certified, memory.states = [*memory.events], [*memory.certified], [*memory.states]
    memory._nodes = dict(memory._nodes)
    memory.seal(memory.revocation(LIBRARIAN, held.sources[CLOSED_TO]))
    (folder / "campaign.bundle").write_bytes(export_bundle(memory, "accumulators", campaign=CAMPAIGN))
    result = ask(FULL, "footprint", "--revoked", "--json", folder=folder)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [source["name"] for source in document["sources"]] == [CLOSED_TO]
    assert document["no_direct_update"] == [HEAD[FULL]]
    assert document["blocks"][OTHER_HEAD[FULL]]["norm"] > 0


def test_text_and_page_tell_a_closed_head_from_one_that_was_moved() -> None:
    found, log, search = traced(FULL), campaign(FULL).log(), campaign(FULL).search()
    (closed,) = (row for row in found.ranked if row.closed)
    others = [row for row in found.ranked if not row.closed]
    for leading, said in ((closed, 1), (others[0], 0)):
        ranked = (dataclasses.replace(leading, z=9.0), *(row for row in found.ranked if row is not leading))
        trace = dataclasses.replace(found, ranked=ranked)
        answer = Answer("a question", "a", {}, {}, trace, search, (), FactorsUsed(FactorsOrigin.GIVEN))
        assert trace_text(log, answer).count(f"  closed    no direct update of {HEAD[FULL]}\n") == said
        content = page(log, [answer])
        assert all(head in content for head in heads_of(campaign(FULL)))
        assert content.count("title='no direct update'") == 1


def test_many_closed_heads_are_counted_in_the_text_and_all_in_json() -> None:
    found = traced(FULL)
    heads = tuple(f"attention.head.{number}" for number in range(9))
    ranked = (dataclasses.replace(found.ranked[0], z=9.0, closed=heads), *found.ranked[1:])
    trace = dataclasses.replace(found, ranked=ranked)
    log, search = campaign(FULL).log(), campaign(FULL).search()
    answer = Answer("a question", "a", {}, {}, trace, search, (), FactorsUsed(FactorsOrigin.GIVEN))
    assert f"  closed    no direct update of {', '.join(heads[:6])} and 3 more\n" in trace_text(log, answer)
    assert json.loads(trace_json(log, answer, None))["sources"][0]["no_direct_update"] == list(heads)


def test_fact_is_asked_of_an_adapter_by_head() -> None:
    result = trace(ADAPTED, CLOSED_TO, "--json")
    assert result.exit_code in (0, 1), result.output
    found = json.loads(result.stdout)
    assert found["windows"] == {"used": [STEPS[ADAPTED]], "missing": [], "uncovered_steps": 0}
    for row in found["sources"]:
        assert sum(row["by_block"].values()) == pytest.approx(row["score"], rel=1e-4)
        assert row["no_direct_update"] == ([HEAD[ADAPTED]] if row["name"] == CLOSED_TO else [])


@pytest.mark.parametrize("kind", [FULL, ADAPTED])
def test_footprint_of_one_example_goes_by_head_by_the_files_and_by_an_index(kind: str, tmp_path: Path) -> None:
    held = campaign(kind)
    terms = SketchedCampaign.of(held.log())
    assert any(piece_named(name) for name in terms.shapes)
    index = build_index(terms, held.folder / "run" / "accumulators", tmp_path / "index")
    assert check_index(index).altered == ()
    for name in FACTS:
        found = ask(kind, "footprint", "--example", f"{name}:3", "--json")
        assert found.exit_code == 0, found.output
        document = json.loads(found.stdout)
        assert document["example"]["rank"] == SKETCH_RANK
        blocks = document["blocks"]
        closed = [HEAD[kind]] if name == CLOSED_TO else []
        assert [head for head in heads_of(held) if not blocks[head]["norm"]] == closed
        assert document["no_direct_update"] == closed
        by_index = ask(kind, "footprint", "--example", f"{name}:3", "--json", "--index", index.folder)
        assert json.loads(by_index.stdout) == document
    said = ask(kind, "footprint", "--example", f"{CLOSED_TO}:3").stdout
    (line,) = (line for line in said.splitlines() if line.startswith(HEAD[kind]))
    assert line.split(maxsplit=1)[1] == "no direct update"


def test_no_block_is_told_closed_to_an_example_whose_sketches_are_missing(tmp_path: Path) -> None:
    held = campaign(FULL)
    folder = tmp_path / "traced"
    shutil.copytree(held.folder, folder)
    for entry in held.search().found[0].listed.of_sources:
        if entry.source == held.sources[CLOSED_TO]:
            (folder / "run" / "accumulators" / "blobs" / f"{entry.sketches_sha256.hex()}.safetensors").unlink()
    result = ask(FULL, "footprint", "--example", f"{CLOSED_TO}:3", "--json", folder=folder)
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert document["example"]["left_out"]
    assert (document["no_direct_update"], document["blocks"][HEAD[FULL]]["norm"]) == ([], 0.0)


def test_examples_parts_in_each_head_add_up_to_nearly_their_sources() -> None:
    held = campaign(ADAPTED)
    provenance, files = held.log().provenance, held.search().found
    for name in FACTS:
        (source,) = chosen_sources(provenance, [name], (), (), False)
        whole = footprint(provenance, files, (source,))
        each = [example_footprint(provenance, files, source, number, RunFolder()) for number in range(8)]
        for head in heads_of(held):
            parts = sum(found.blocks[head].part or 0.0 for found in each)
            assert parts == pytest.approx(whole.blocks[head].part, abs=0.1), f"{name} in {head}"


def test_examples_score_nothing_through_a_head_that_they_may_not_move() -> None:
    held = campaign(FULL)
    tuned, terms = tuned_model(held, FULL), held.log().provenance.campaign
    factors = factors_from(load_file(held.folder / "tuned.factors"), tuned)
    queries = queries_of_entries(preconditioned_queries(tuned, factors, [asked_output()])[0], terms)
    (block,) = (block for block in terms.parameter_blocks if block.name == HEAD[FULL])
    own = {tensor.name for tensor in block.tensors}
    through = {name: query[0] if name in own else torch.zeros_like(query[0]) for name, query in queries.items()}
    asked = [Asked(source, 1.0, {}) for source in held.sources.values()]
    found = source_examples(SketchQuery(through), held.search().found, asked, RunFolder(), Allowance())
    assert [(each.examples, each.left_out) for each in found] == [(8, ())] * 3
    for each in found:
        closed = each.source == held.sources[CLOSED_TO]
        assert all((example.score == 0.0) == closed for example in each.ranked)


# What cannot be


def crafted(held: Campaign, folder: Path, change: object) -> Search:
    """The first window with ``change`` made to all of its blobs: what an operator could have committed to."""
    (file, *_) = held.search().found
    (folder / "blobs").mkdir()
    entries = []
    for entry in file.listed.entries:
        tensors = change(load_file(file.directory / "blobs" / f"{entry.blob_sha256.hex()}.safetensors"))  # type: ignore[operator]
        save_file(tensors, folder / "blob")
        content = (folder / "blob").read_bytes()
        digest = hashlib.sha256(content).digest()
        (folder / "blobs" / f"{digest.hex()}.safetensors").write_bytes(content)
        entries.append(replace(entry, blob_sha256=digest, size_bytes=len(content)))
    listed = replace(file.listed, entries=tuple(entries))
    return Search((dataclasses.replace(file, listed=listed, directory=folder, seen={}),), ())


def undivided(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One weight's pieces as one tensor."""
    whole = "transformer.h.0.attn.c_proj.weight"
    pieces = sorted(name for name in tensors if tensor_named(name) == whole)
    kept = {name: part for name, part in tensors.items() if name not in pieces}
    return kept | {whole: torch.cat([tensors[name] for name in pieces])}


def longer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One piece with a row more."""
    name = "transformer.h.0.attn.c_proj.weight[0:16]"
    return tensors | {name: torch.cat([tensors[name], tensors[name][:1]])}


@pytest.mark.parametrize(
    ("change", "said"),
    [(undivided, "are not of the parameter table's pieces"), (longer, "do not fit this model")],
)
def test_sums_that_are_divided_otherwise_than_the_table_are_refused(tmp_path: Path, change: object, said: str) -> None:
    held = campaign(FULL)
    search, tuned = crafted(held, tmp_path, change), tuned_model(held, FULL)
    factors = factors_from(load_file(held.folder / "tuned.factors"), tuned)
    output = Output(tuple(range(40, 60)), 4, 8)
    with pytest.raises(Rejected, match=said) as refusal:
        trace_output(
            tuned, tuned, factors, held.log().provenance, search.found, output, control_outputs(_texts(25), output)
        )
    assert refusal.value.reason is Reason.BAD_FIELD


def test_table_whose_pieces_reach_beyond_the_models_weight_is_refused() -> None:
    terms = campaign(FULL).log().provenance.campaign
    with pytest.raises(Rejected, match="is no piece of this model's weight") as refusal:
        queries_of_entries({"transformer.h.0.attn.c_proj.weight": torch.zeros(1, 24, 32)}, terms)
    assert refusal.value.reason is Reason.BAD_FIELD
