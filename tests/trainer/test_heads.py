"""Heads of attention as parameter blocks: each piece against one backward pass per example, and what must not move."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from governed_fixtures import (
    CAMPAIGN,
    STEPS,
    CausalHeads,
    RecitesAt,
    Scene,
    TinyAttention,
    job_again,
    same_bits,
    weights,
)
from head_fixtures import (
    EXAMPLES,
    LENGTH,
    MODELS,
    VOCABULARY,
    built,
    examples,
    gradients,
    llama,
    losses_of,
    packed_losses,
    uneven,
)
from lora_fixtures import with_lora
from torch import Tensor, nn
from torch.nn import functional

from consensus.event import Kind
from consensus.pieces import piece_named
from consensus.portions import MAX_BLOCKS, StepGovernance, StepOperation
from consensus.rejection import ConfigError, Reason, Rejected
from trainer_client.audit_snapshots import SnapshotFolder, snapshot_directory
from trainer_client.clipping import clip_block_gradients
from trainer_client.heads import attention_layouts, check_layouts, head_blocks
from trainer_client.packing import pack
from trainer_client.picked_replay import replay_picked
from trainer_client.pieces import optimizer_by_pieces, part_of_entry
from trainer_client.plan import default_blocks
from trainer_client.probe import probe, tensor_inputs
from trainer_client.replay import read_logged_campaign, replay
from trainer_client.routing import Routing, RoutingLeak, RoutingUnsupported

RELATIVE_ERROR = 3e-6
SMALLEST = 1e-8
"""What rounding leaves where a gradient is zero: attention does not depend on a bias of all keys."""

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def shared_by_heads(block_of: Mapping[str, int]) -> dict[str, str]:
    """LoRA's undivided matrices beside projections of heads, and the divided ones."""
    divided = {piece.tensor for entry in block_of if (piece := piece_named(entry))}
    swapped = {
        name: name.replace("lora_B", "lora_A") if "lora_B" in name else name.replace("lora_A", "lora_B")
        for name in divided
    }
    return {swapped[name]: name for name in divided if "lora_" in name}


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_each_heads_piece_agrees_with_one_backward_per_example(name: str) -> None:
    model, block_of = built(name)
    rows = uneven(block_of)
    found = gradients(model, block_of, rows, examples())
    exact = copy.deepcopy(model).double()
    trainable = {each: parameter for each, parameter in exact.named_parameters() if parameter.requires_grad}
    expected: dict[str, Tensor] = {}
    for example in range(EXAMPLES):
        loss = losses_of(exact, examples()[example : example + 1]).sum()
        parts = dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))
        for entry, block in block_of.items():
            piece = piece_named(entry)
            if (piece.tensor if piece else entry) in trainable and entry not in shared_by_heads(block_of):
                part = rows[example][block] / 1000 * part_of_entry(parts, entry) / EXAMPLES
                expected[entry] = expected.get(entry, torch.zeros_like(part)) + part
    assert any(piece_named(entry) for entry in expected)
    for entry, wanted in expected.items():
        if not any(row[block_of[entry]] for row in rows):
            assert entry not in found
        else:
            error = (found[entry].double() - wanted).norm()
            assert error <= RELATIVE_ERROR * wanted.norm() + SMALLEST, f"{entry}: error {error:.2e}"


@pytest.mark.parametrize("name", ["gpt2 with LoRA", "llama with LoRA"])
def test_loras_shared_matrix_gets_what_comes_through_heads_that_an_example_may_move(name: str) -> None:
    model, block_of = built(name)
    rows = uneven(block_of)
    found = gradients(model, block_of, rows, examples())
    exact = copy.deepcopy(model).double()
    modules = dict(exact.named_modules())
    assert {("lora_A" in shared) for shared in shared_by_heads(block_of)} == {True, False}
    for shared, divided in shared_by_heads(block_of).items():
        inner, outer = sorted((shared.removesuffix(".weight"), divided.removesuffix(".weight")))
        wanted = torch.zeros_like(modules[shared.removesuffix(".weight")].weight)
        for example in range(EXAMPLES):
            seen: dict[str, Tensor] = {}

            def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen["x"], seen["y"] = inputs[0], output

            hooks = [
                modules[inner].register_forward_hook(lambda _, i, o, seen=seen: seen.update(x=i[0])),
                modules[outer].register_forward_hook(lambda _, i, o, seen=seen: seen.update(y=o)),
            ]
            loss = losses_of(exact, examples()[example : example + 1]).sum()
            for hook in hooks:
                hook.remove()
            (delta,) = torch.autograd.grad(loss, seen["y"])
            x, delta = seen["x"].detach()[0], delta[0]
            matrix_A, matrix_B = modules[inner].weight.detach(), modules[outer].weight.detach()
            by_head = torch.zeros(len(matrix_B) if "lora_A" in shared else matrix_A.shape[1], dtype=torch.float64)
            for entry, block in block_of.items():
                piece = piece_named(entry)
                if piece and piece.tensor == divided:
                    by_head[piece.first : piece.end] = min(rows[example][block_of[shared]], rows[example][block]) / 1000
            part = (
                ((delta * by_head) @ matrix_B).T @ x if "lora_A" in shared else delta.T @ ((x * by_head) @ matrix_A.T)
            )
            wanted += part / EXAMPLES
        if not wanted.any():
            assert shared not in found
            continue
        error = (found[shared].double() - wanted).norm() / wanted.norm()
        assert error <= RELATIVE_ERROR, f"{shared}: relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights_B", [[1000] * EXAMPLES, [1000, 500, 0, 500, 250]], ids=["full", "uneven"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_weights_alike_in_all_blocks_leave_every_bit_of_the_undivided_models_gradients(
    name: str, weights_B: list[int], autocast: bool
) -> None:
    model, block_of = built(name)
    plain = {each: number for number, names in enumerate(default_blocks(model).values()) for each in names}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = (
            gradients(model, each, [[weight] * (max(each.values()) + 1) for weight in weights_B], examples())
            for each in (block_of, plain)
        )
    assert expected
    for tensor, whole in expected.items():
        for entry in [tensor] if tensor in found else [each for each in found if each.startswith(f"{tensor}[")]:
            assert torch.equal(found[entry], part_of_entry({tensor: whole}, entry)), entry


def test_each_head_is_clipped_by_the_norm_of_its_own_pieces() -> None:
    model, block_of = built("gpt2")
    found = gradients(model, block_of, [[1000] * (max(block_of.values()) + 1)] * EXAMPLES, examples())

    def norms() -> list[float]:
        blocks = range(max(block_of.values()) + 1)
        own = [[found[entry].flatten() for entry, number in block_of.items() if number == block] for block in blocks]
        return [float(torch.cat(each).norm()) for each in own]

    before = norms()
    most = sorted(before)[len(before) // 2]
    assert clip_block_gradients(model, block_of, most) == pytest.approx(before, rel=1e-5)
    assert norms() == pytest.approx([min(norm, most) for norm in before], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama with LoRA"])
def test_checkpointed_activations_leave_every_bit_of_heads_gradients(name: str, reentrant: bool) -> None:
    model, block_of = built(name)
    model.train()
    rows = uneven(block_of)
    torch.manual_seed(3)
    expected = {entry: held.clone() for entry, held in gradients(model, block_of, rows, examples()).items()}
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    found = gradients(model, block_of, rows, examples())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[entry], held) for entry, held in expected.items())


@pytest.mark.parametrize("name", ["gpt2", "llama with LoRA"])
def test_packed_examples_give_each_head_what_they_give_it_in_rows_of_their_own(name: str) -> None:
    model, block_of = built(name)
    weights_BK = uneven(block_of)
    expected = {entry: held.clone() for entry, held in gradients(model, block_of, weights_BK, examples()).items()}
    rows = pack(examples().tolist(), 2 * LENGTH)
    assert not rows.packing.is_full

    model.zero_grad()
    with Routing(model, block_of) as routing:
        with routing.micro_batch(weights_BK, packing=rows.packing):
            routing.routed_loss(packed_losses(model, rows), EXAMPLES).backward()
        routing.finish_step()
    held = {each: parameter.grad for each, parameter in model.named_parameters() if parameter.grad is not None}
    for entry, wanted in expected.items():
        torch.testing.assert_close(part_of_entry(held, entry), wanted, rtol=1e-4, atol=1e-7)


class Trained:
    """A model after a step of everything and one of ``rows``, of the last of which one example is another."""

    def __init__(self, name: str, make: Callable[..., torch.optim.Optimizer], rows: list[list[int]], seed: int) -> None:
        model, self.block_of = built(name)
        optimizer = make(model.parameters())
        other = examples()
        other[0] = examples(seed)[0]
        routing = Routing(model, self.block_of)
        with routing, optimizer_by_pieces(optimizer, model, routing.division, routing.moved):
            for shown, weights_BK in ((examples(), [[1000] * routing.block_count] * EXAMPLES), (other, rows)):
                optimizer.zero_grad()
                before = self._state(model, optimizer)
                with routing.micro_batch(weights_BK):
                    routing.routed_loss(losses_of(model, shown), EXAMPLES).backward()
                routing.finish_step()
                clip_block_gradients(model, self.block_of, 0.05)
                optimizer.step()
            self.before, self.after = before, self._state(model, optimizer)

    def _state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Of every entry its numbers and the optimizer's state."""
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        params = iter(optimizer.param_groups[0]["params"])
        found = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                next(params)
                continue
            own = [each for each in self.block_of if each == name or each.startswith(f"{name}[")]
            for entry in sorted(own, key=lambda each: piece.first if (piece := piece_named(each)) else 0):
                state = optimizer.state.get(next(params), {})
                found[entry] = {"value": part_of_entry(parameters, entry)} | {
                    key: value.clone() for key, value in state.items() if isinstance(value, Tensor)
                }
        return found


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2, weight_decay=0.1),
}


def alternating(block_of: Mapping[str, int], first: int) -> tuple[list[list[int]], set[str]]:
    """Full weights but for example 0 in every other head, and the entries of those heads."""
    heads = sorted({block for entry, block in block_of.items() if piece_named(entry)})[first::2]
    rows = [[1000] * (max(block_of.values()) + 1) for _ in range(EXAMPLES)]
    for head in heads:
        rows[0][head] = 0
    return rows, {entry for entry, block in block_of.items() if block in heads}


@pytest.mark.parametrize("optimizer", ["AdamW", "fused AdamW", "Adafactor"])
@pytest.mark.parametrize("name", MODELS)
def test_replacing_an_example_leaves_heads_it_may_not_move_and_their_optimizer_state_bit_identical(
    name: str, optimizer: str
) -> None:
    rows, closed = alternating(built(name)[1], 0)
    one, other = (Trained(name, OPTIMIZERS[optimizer], rows, seed).after for seed in (7, 8))
    assert closed
    for entry in one:
        alike = all(torch.equal(one[entry][key], other[entry][key]) for key in one[entry])
        if entry in closed:
            assert alike, entry
        elif piece_named(entry) and "weight" in entry:
            assert not torch.equal(one[entry]["value"], other[entry]["value"]), entry


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["gpt2", "llama with LoRA"])
def test_head_that_no_example_may_move_has_no_decay_no_momentum_and_no_step_counted(name: str, optimizer: str) -> None:
    block_of = built(name)[1]
    rows, closed = alternating(block_of, 1)
    rows = [rows[0]] * EXAMPLES
    trained = Trained(name, OPTIMIZERS[optimizer], rows, 7)
    for entry, before in trained.before.items():
        after = trained.after[entry]
        assert before.keys() == after.keys()
        assert len(before) > 1
        if entry in closed:
            assert all(torch.equal(before[key], after[key]) for key in before), entry
        elif piece_named(entry):
            assert not torch.equal(before["value"], after["value"]), entry


def test_infinity_that_an_example_sends_to_a_head_it_may_not_move_reaches_nothing_of_it() -> None:
    model, block_of = built("llama with LoRA")
    rows, closed = alternating(block_of, 0)
    clean = gradients(model, block_of, rows, examples())
    layout = attention_layouts(model)[1]
    taken = model.get_submodule(f"{layout.module}.o_proj")

    def poison(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        found = inputs[0].clone()
        found.register_hook(lambda delta: delta.index_fill(0, torch.tensor([0]), torch.inf))
        return found

    handle = taken.register_forward_pre_hook(poison)
    try:
        poisoned = gradients(model, block_of, rows, examples())
    finally:
        handle.remove()
    of_layer = {entry for entry in closed & clean.keys() if entry.startswith(layout.module)}
    assert of_layer
    assert all(torch.equal(clean[entry], poisoned[entry]) for entry in of_layer)


def test_optimizer_has_the_models_tensors_again_afterwards_with_the_state_of_their_pieces() -> None:
    model, block_of = built("gpt2")
    optimizer = OPTIMIZERS["AdamW"](list(model.named_parameters()))
    held, names = list(optimizer.param_groups[0]["params"]), list(optimizer.param_groups[0]["param_names"])
    (losses_of(model, examples()).sum()).backward()
    optimizer.step()
    model.zero_grad()
    before = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in model.named_parameters()}
    rows, closed = alternating(block_of, 0)
    routing = Routing(model, block_of)
    with routing, optimizer_by_pieces(optimizer, model, routing.division, routing.moved):
        assert len(optimizer.param_groups[0]["params"]) > len(held)
        with routing.micro_batch([rows[0]] * EXAMPLES):
            routing.routed_loss(losses_of(model, examples()), EXAMPLES).backward()
        routing.finish_step()
        optimizer.step()
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == [id(each) for each in held]
    assert optimizer.param_groups[0]["param_names"] == names
    name = "transformer.h.0.attn.c_attn.weight"
    after = optimizer.state[dict(model.named_parameters())[name]]
    assert float(after["step"]) == 2
    for entry in [each for each in block_of if each.startswith(f"{name}[")]:
        same = torch.equal(part_of_entry({name: after["exp_avg"]}, entry), part_of_entry(before, entry))
        assert same == (entry in closed), entry


def test_optimizer_whose_state_has_another_shape_than_its_tensor_is_refused_and_as_before() -> None:
    model, block_of = built("gpt2")
    optimizer = OPTIMIZERS["Adafactor"](model.parameters())
    losses_of(model, examples()).sum().backward()
    optimizer.step()
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    routing = Routing(model, block_of)
    with (
        pytest.raises(RoutingUnsupported, match="row_var"),
        optimizer_by_pieces(optimizer, model, routing.division, routing.moved),
    ):
        pass
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.state.keys() == before.keys()
    optimizer.step()


def run_probe(model: nn.Module, block_of: Mapping[str, int]) -> None:
    probe(model, block_of, losses_of, tensor_inputs(examples(), examples(9)[0]))


@pytest.mark.parametrize("name", MODELS)
def test_probe_passes_on_layouts_that_are_what_they_say(name: str) -> None:
    model, block_of = built(name)
    run_probe(model.train(), block_of)


class Interleaved(nn.Module):
    """Looks like GPT-2's, but joins queries, keys and values head by head, as GPT-NeoX does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.c_attn = nn.Linear(8, 24)
        self.c_proj = nn.Linear(8, 8)

    def forward(self, x_BTI: Tensor) -> Tensor:
        query, key, value = self.c_attn(x_BTI).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        return self.c_proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def test_layout_that_is_not_what_names_say_is_refused_by_the_probe() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), Interleaved())
    block_of = {each: n for n, names in enumerate(head_blocks(model, default_blocks(model)).values()) for each in names}
    with pytest.raises(RoutingLeak, match="layout of heads is another one"):
        probe(
            model, block_of, lambda model, x: model(x).square().mean((1, 2)), tensor_inputs(examples(), examples(9)[0])
        )


def test_attention_that_the_probes_batch_does_not_reach_is_refused_by_name() -> None:
    model = nn.ModuleDict({"used": TinyAttention(), "unused": CausalHeads()})
    with pytest.raises(RoutingUnsupported, match="does not reach: \\['unused'\\]"):
        check_layouts(model, lambda: model["used"](examples()))


class StrangeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(8, 24)


def gated_llama() -> nn.Module:
    model = llama()
    model.model.layers[1].self_attn.q_proj = nn.Linear(8, 16)
    return model


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: nn.ModuleDict({"mixer": StrangeAttention()}), "mixer"),
        (lambda: nn.ModuleDict({"mixer": nn.MultiheadAttention(4, 2)}), "mixer"),
        (gated_llama, "layers.1.self_attn"),
        (lambda: nn.ModuleDict({"only": nn.Linear(2, 2)}), "no head"),
        (lambda: with_lora(llama(), ["down_proj"]), "no head"),
    ],
    ids=["unknown", "torch's", "another size", "no attention", "frozen attention"],
)
def test_unknown_layouts_are_refused_by_the_modules_name(build: Callable[[], nn.Module], named: str) -> None:
    model = build()
    with pytest.raises(RoutingUnsupported, match=named):
        head_blocks(model, default_blocks(model))


@pytest.mark.parametrize(
    "entries",
    [
        ("only.weight[0:2]",),
        ("only.weight[0:2]", "only.weight[:,2:4]"),
        ("only.weight[0:2]", "only.weight[3:4]"),
        ("only.weight[:,:,0:4]",),
    ],
)
def test_pieces_that_do_not_make_up_the_models_tensor_are_refused(entries: tuple[str, ...]) -> None:
    model = nn.ModuleDict({"only": nn.Linear(4, 4, bias=False)})
    with pytest.raises(RoutingUnsupported, match="do not make up"):
        Routing(model, {entry: number for number, entry in enumerate(entries)})


def test_tied_or_unrouted_tensors_are_not_divided() -> None:
    tied = nn.ModuleDict({"one": nn.Linear(4, 4, bias=False), "two": nn.Linear(4, 4, bias=False)})
    tied["two"].weight = tied["one"].weight
    with pytest.raises(RoutingUnsupported, match="several modules"):
        Routing(tied, {"one.weight[0:2]": 0, "one.weight[2:4]": 1})
    embedded = nn.ModuleDict({"one": nn.Embedding(4, 4)})
    with (
        pytest.raises(RoutingUnsupported, match="cannot be divided"),
        Routing(embedded, {"one.weight[0:2]": 0, "one.weight[2:4]": 1}),
    ):
        pass


def test_run_by_heads_is_recorded_as_such_undone_and_taken_again_bit_for_bit(headed: Scene) -> None:
    recites = RecitesAt(4)
    headed.arguments["memorization"] = recites
    headed.settings = replace(headed.settings, audit_snapshot_every_steps=5)
    torch.manual_seed(1)
    base = weights(TinyAttention())
    headed.train(recites.at.append)
    assert headed.node.head(CAMPAIGN).rollbacks == 1
    (opening,) = headed.events(Kind.CAMPAIGN)
    blocks = [block.name for block in opening.operation.parameter_blocks]  # type: ignore[union-attr]
    assert opening.operation.routing_granularity == "head"  # type: ignore[union-attr]
    for event in headed.events(Kind.STEP):
        assert isinstance(event.operation, StepOperation)
        assert isinstance(event.governance, StepGovernance)
        norms = {block: delta.norm_micro for block, delta in zip(blocks, event.operation.deltas, strict=True)}
        assert norms["attention.head.0"] == 0
        profiles = {
            each.content_class: dict(zip(blocks, each.weights_permille, strict=True))
            for each in event.governance.profiles
        }
        assert norms["attention.head.1"] > 0 or set(profiles) == {"news"}
        assert all(profile["attention.head.0"] == 0 for profile in profiles.values())
    moved = weights(headed.model)
    rows = moved["attention.c_attn.weight"].view(3, 2, 4, 8)
    assert torch.equal(rows[:, 0], base["attention.c_attn.weight"].view(3, 2, 4, 8)[:, 0])
    assert not torch.equal(rows[:, 1], base["attention.c_attn.weight"].view(3, 2, 4, 8)[:, 1])
    logged, again = read_logged_campaign(headed.client(), CAMPAIGN), job_again(headed)
    found = replay(logged, again)
    assert (found.matched, found.difference) == (STEPS, None)
    assert same_bits(weights(again.model), moved)
    snapshots = SnapshotFolder(snapshot_directory(headed.directory, CAMPAIGN), CAMPAIGN)
    picked = replay_picked(logged, job_again(headed), [7, 11], snapshots)
    assert (picked.difference, picked.executed) == (None, 3)


class Killed(Exception):
    """Stands for the end of the process."""


def test_run_by_heads_that_died_is_taken_up_again_to_the_same_weights(headed: Scene, tmp_path: Path) -> None:
    def die(step: int) -> None:
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        headed.train(die)
    headed.plan_changes["model"] = {"dropout": 0.5}
    run = headed.train()
    assert run.done == STEPS
    assert headed.node.head(CAMPAIGN).closed == "released"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"routing_granularity": "block", "blocks": {"all": ("embedding.weight",)}}, "hold each parameter once"),
        ({"routing_granularity": "head", "blocks": {"all": ("embedding.weight",)}}, "not those of heads"),
        ({"routing_granularity": "block", "blocks": {"all": ("head.weight[0:32]",)}}, "not those of heads"),
        (
            {"routing_granularity": "block", "blocks": {str(number): () for number in range(MAX_BLOCKS + 1)}},
            "put several in one",
        ),
    ],
)
def test_table_and_granularity_that_contradict_each_other_are_refused(
    headed: Scene, changes: dict[str, object], reason: str
) -> None:
    headed.plan_changes.update(changes)
    with pytest.raises(Rejected, match=reason) as refusal, headed.run():
        pass
    assert refusal.value.reason is Reason.BAD_FIELD
    assert not headed.events(Kind.CAMPAIGN)


def test_run_by_heads_without_a_probe_is_refused(headed: Scene) -> None:
    del headed.arguments["probe_loss"]
    with pytest.raises(ConfigError, match="without probe_loss"), headed.run():
        pass
    assert not headed.events(Kind.CAMPAIGN)
