"""Routing against an oracle that differentiates each example on its own."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer_client.clipping import clip_block_gradients
from trainer_client.probe import probe, tensor_inputs
from trainer_client.route import Route
from trainer_client.routing import (
    Routing,
    RoutingError,
    RoutingLeak,
    RoutingUnsupported,
)

EXAMPLES, LENGTH, WIDTH, VOCABULARY = 6, 5, 8, 11
RELATIVE_ERROR = 1e-6
torch.set_num_threads(1)


class TinyModel(nn.Module):
    """Every supported module: embeddings, both norms, linears with and without bias, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.expand = nn.Linear(WIDTH, 3 * WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.contract = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.scale = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def body(self, x: Tensor) -> Tensor:
        return x + self.contract(self.dropout(functional.gelu(self.expand(self.norm(x)))))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        position_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        x = self.body(self.token(tokens_BT) + self.position(position_BT))
        return self.head(self.scale(x))


BLOCKS = {
    "token.weight": 0,
    "position.weight": 0,
    "norm.weight": 1,
    "norm.bias": 1,
    "expand.weight": 2,
    "expand.bias": 2,
    "contract.weight": 3,
    "scale.weight": 3,
}
BLOCK_COUNT = 4
Row = tuple[int, ...]
weight = st.sampled_from([0, 0, 0, 1, 250, 999, 1000, 1000])
weight_rows = st.lists(st.tuples(*[weight] * BLOCK_COUNT), min_size=EXAMPLES, max_size=EXAMPLES)


def new_model(seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    model = TinyModel().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def new_examples(seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_of_examples(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits_BTV = model(tokens_BT)
    return functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT.roll(-1, 1), reduction="none").mean(1)


def routed_gradients(model: nn.Module, tokens_BT: Tensor, rows: list[Row]) -> dict[str, Tensor | None]:
    model.zero_grad()
    with Routing(model, BLOCKS) as routing:
        with routing.micro_batch(rows):
            routing.routed_loss(loss_of_examples(model, tokens_BT), EXAMPLES).backward()
        routing.finish_step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def oracle_gradients(model: nn.Module, tokens_BT: Tensor, rows: list[Row]) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example, row in enumerate(rows):
        loss = loss_of_examples(model, tokens_BT[example : example + 1]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            totals[name] += row[BLOCKS[name]] / 1000 * gradient / EXAMPLES
    return totals


def assert_agrees(found: dict[str, Tensor | None], expected: dict[str, Tensor], rows: list[Row]) -> None:
    for name, oracle in expected.items():
        gradient = found[name]
        if not any(row[BLOCKS[name]] for row in rows):
            assert gradient is None, f"{name} is blocked for every example"
            continue
        assert gradient is not None
        error = (gradient.double() - oracle).norm() / oracle.norm()
        assert error <= RELATIVE_ERROR, f"{name}: relative error {error:.2e}"


@given(rows=weight_rows)
@settings(max_examples=40, deadline=None)
def test_gradients_agree_with_one_backward_per_example(rows: list[Row]) -> None:
    model = new_model()
    found = routed_gradients(model, new_examples(), rows)
    assert_agrees(found, oracle_gradients(model, new_examples(), rows), rows)


def test_full_weights_leave_every_bit_of_plain_gradients() -> None:
    model, examples = new_model(), new_examples()
    found = routed_gradients(model, examples, [(1000,) * BLOCK_COUNT] * EXAMPLES)
    model.zero_grad()
    (loss_of_examples(model, examples).sum() / EXAMPLES).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


@pytest.mark.parametrize("count", [1, 2, EXAMPLES])
def test_however_few_examples_a_head_with_a_bias_has_every_bit_of_plain_gradients(count: int) -> None:
    """A loss that transposes logits leaves their gradient in another order, in which one example's rows are summed."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY))
    blocks = dict.fromkeys(dict(model.named_parameters()), 0)
    tokens_BT = torch.randint(0, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(4))
    with Routing(model, blocks) as routing, routing.micro_batch([(1000,)] * count):
        routing.routed_loss(loss_of_examples(model, tokens_BT), EXAMPLES).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    (loss_of_examples(model, tokens_BT).sum() / EXAMPLES).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_that_a_narrow_dtype_does_not_have_is_the_weight_of_the_sum(dtype: torch.dtype) -> None:
    delta_BT = torch.linspace(1, 2, 1_000, dtype=torch.float64).to(dtype)[None]
    (admitted,) = Route((333,), lambda: None).admitted(delta_BT)
    assert admitted.dtype == dtype
    assert (admitted.double().sum() / delta_BT.double().sum()).item() == pytest.approx(0.333, rel=3e-4)


def test_forward_and_activation_gradients_are_untouched_by_weights() -> None:
    model, examples = new_model(), new_examples()
    x_BTI = torch.randn(EXAMPLES, LENGTH, WIDTH, requires_grad=True)
    plain = model.scale(model.body(x_BTI))
    plain.square().sum().backward()
    plain_gradient = x_BTI.grad
    x_BTI.grad = None
    with Routing(model, BLOCKS) as routing, routing.micro_batch([(0, 500, 0, 1000)] * EXAMPLES):
        routed = model.scale(model.body(x_BTI))
        routed.square().sum().backward()
    assert torch.equal(plain, routed)
    assert torch.equal(plain_gradient, x_BTI.grad)
    assert examples.shape[0] == EXAMPLES


def test_leaving_refused_examples_out_of_the_batch_changes_no_gradient() -> None:
    model, examples = new_model(), new_examples()
    rows: list[Row] = [(1000, 500, 1000, 0)] * 4 + [(0, 0, 0, 0)] * 2
    whole = routed_gradients(model, examples, rows)
    shortened = routed_gradients(model, examples[:4], rows[:4])
    for name, gradient in whole.items():
        if gradient is None:
            assert shortened[name] is None
        else:
            torch.testing.assert_close(shortened[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("blocked", [0, 3, 5])
def test_infinity_in_a_blocked_example_reaches_no_parameter(blocked: int) -> None:
    model, examples = new_model(), new_examples()
    rows: list[Row] = [(900, 1000, 700, 1000)] * EXAMPLES
    rows[blocked] = (0,) * BLOCK_COUNT
    poison = torch.zeros(EXAMPLES, LENGTH, WIDTH)
    poison[blocked] = torch.inf
    clean = routed_gradients(model, examples, rows)
    model.zero_grad()
    handle = model.dropout.register_forward_hook(lambda _m, _i, output: output + poison.repeat(1, 1, 3))
    try:
        poisoned = routed_gradients(model, examples, rows)
    finally:
        handle.remove()
    for name, gradient in poisoned.items():
        assert torch.equal(gradient, clean[name]), name


@pytest.mark.parametrize("arrangement", ["one run", "scattered"])
def test_replacing_blocked_examples_leaves_parameters_and_optimizer_bit_identical(arrangement: str) -> None:
    blocked = [0, 1, 2] if arrangement == "one run" else [0, 2, 4]
    rows: list[Row] = [(0,) * BLOCK_COUNT if i in blocked else (1000, 0, 300 + i, 1000) for i in range(EXAMPLES)]

    def train(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        model, examples = new_model(), new_examples()
        examples[blocked] = new_examples(seed)[blocked]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with Routing(model, BLOCKS) as routing:
            for _ in range(3):
                optimizer.zero_grad()
                with routing.micro_batch(rows):
                    routing.routed_loss(loss_of_examples(model, examples), EXAMPLES).backward()
                routing.finish_step()
                clip_block_gradients(model, BLOCKS, 0.05)
                optimizer.step()
        state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
        return [parameter.detach() for parameter in model.parameters()], state

    (first, first_state), (second, second_state) = train(7), train(8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first_state, second_state, strict=True))


def test_optimizer_moves_no_parameter_of_a_block_without_weight() -> None:
    model, examples = new_model(), new_examples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before: dict[str, Tensor] = {}
    with Routing(model, BLOCKS) as routing:
        for row in [(1000, 1000, 1000, 1000), (1000, 0, 1000, 0)]:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.zero_grad()
            with routing.micro_batch([row] * EXAMPLES):
                routing.routed_loss(loss_of_examples(model, examples), EXAMPLES).backward()
            assert routing.finish_step().total_permille_K == tuple(EXAMPLES * weight for weight in row)
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (BLOCKS[name] in (1, 3)), name


def test_accumulated_micro_batches_agree_with_one_backward_per_example() -> None:
    model, examples = new_model(), new_examples()
    rows: list[Row] = [(1000, 0, 250, 0), (0, 0, 1000, 0), (500, 0, 0, 0)] * 2
    with Routing(model, BLOCKS) as routing:
        for half in (slice(0, 2), slice(2, EXAMPLES)):
            with routing.micro_batch(rows[half]):
                routing.routed_loss(loss_of_examples(model, examples[half]), EXAMPLES).backward()
        finished = routing.finish_step()
    assert finished.micro_batch_count == 2
    assert finished.example_count == EXAMPLES
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_agrees(found, oracle_gradients(model, examples, rows), rows)


def checkpointed(model: TinyModel, tokens_BT: Tensor, use_reentrant: bool) -> Tensor:
    x = model.token(tokens_BT)
    x = checkpoint(model.body, x, use_reentrant=use_reentrant)
    return functional.cross_entropy(
        model.head(model.scale(x)).transpose(1, 2), tokens_BT.roll(-1, 1), reduction="none"
    ).mean(1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_inside_its_micro_batch_changes_no_bit(use_reentrant: bool) -> None:
    model, examples = new_model(), new_examples()
    rows: list[Row] = [(1000, 0, 250, 1000), (0, 0, 1000, 0), (500, 0, 0, 700)] * 2
    gradients = []
    for loss in (
        lambda: checkpointed(model, examples, use_reentrant),
        lambda: functional.cross_entropy(
            model.head(model.scale(model.body(model.token(examples)))).transpose(1, 2),
            examples.roll(-1, 1),
            reduction="none",
        ).mean(1),
    ):
        model.zero_grad()
        with Routing(model, BLOCKS) as routing, routing.micro_batch(rows):
            routing.routed_loss(loss(), EXAMPLES).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_backward_of_a_checkpointed_loss_under_the_next_weights_is_refused(use_reentrant: bool) -> None:
    model, examples = new_model(), new_examples()
    with Routing(model, BLOCKS) as routing:
        with routing.micro_batch([(1000,) * BLOCK_COUNT] * EXAMPLES):
            loss = routing.routed_loss(checkpointed(model, examples, use_reentrant), EXAMPLES)
        with routing.micro_batch([(0,) * BLOCK_COUNT] * EXAMPLES), pytest.raises(RoutingLeak):
            loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_backward_after_its_micro_batch_has_ended_is_refused() -> None:
    model, examples = new_model(), new_examples()
    with Routing(model, BLOCKS) as routing:
        with routing.micro_batch([(1000,) * BLOCK_COUNT] * EXAMPLES):
            loss = routing.routed_loss(loss_of_examples(model, examples), EXAMPLES)
        with pytest.raises(RoutingLeak):
            loss.backward()


def test_backward_without_routed_loss_under_the_next_weights_is_refused() -> None:
    model, examples = new_model(), new_examples()
    with Routing(model, BLOCKS) as routing:
        with routing.micro_batch([(1000,) * BLOCK_COUNT] * EXAMPLES):
            loss = loss_of_examples(model, examples).sum()
        with routing.micro_batch([(0,) * BLOCK_COUNT] * EXAMPLES), pytest.raises(RoutingLeak):
            loss.backward()


@pytest.mark.parametrize("module", ["scale", "norm", "contract"])
def test_parameter_changed_between_forward_and_backward_is_refused(module: str) -> None:
    model, examples = new_model(), new_examples()
    with Routing(model, BLOCKS) as routing, routing.micro_batch([(1000,) * BLOCK_COUNT] * EXAMPLES):
        loss = routing.routed_loss(loss_of_examples(model, examples), EXAMPLES)
        with torch.no_grad():
            model.get_submodule(module).weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_model_is_unchanged_after_exit_even_on_an_exception() -> None:
    model = new_model()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}

    def fail_inside() -> None:
        with Routing(model, BLOCKS) as routing, routing.micro_batch([(1000,) * BLOCK_COUNT] * EXAMPLES):
            assert "forward" in model.head.__dict__
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert after.keys() == before.keys()
    for name, attributes in after.items():
        assert attributes.keys() == before[name].keys()
        assert all(attributes[key] is before[name][key] for key in attributes)
    with Routing(model, BLOCKS) as routing, routing.micro_batch([(0,) * BLOCK_COUNT]):
        pass


def test_model_is_unchanged_when_a_module_is_split_between_blocks() -> None:
    model = new_model()
    with pytest.raises(RoutingUnsupported, match="norm"), Routing(model, BLOCKS | {"norm.bias": 3}):
        pass
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_training_forward_outside_a_micro_batch_is_refused_and_evaluation_is_not() -> None:
    model, examples = new_model(), new_examples()
    expected = model(examples)
    with Routing(model, BLOCKS):
        with torch.no_grad():
            assert torch.equal(model(examples), expected)
        with pytest.raises(RoutingError, match="outside a micro-batch"):
            model(examples)


def test_autocast_agrees_with_plain_autocast() -> None:
    model, examples = new_model(), new_examples()
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_of_examples(model, examples)
    (plain.sum() / EXAMPLES).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with Routing(model, BLOCKS) as routing, routing.micro_batch([(1000, 1000, 0, 1000)] * EXAMPLES):
        with torch.autocast("cpu", torch.bfloat16):
            loss_B = loss_of_examples(model, examples)
        routing.routed_loss(loss_B, EXAMPLES).backward()
    for name, parameter in model.named_parameters():
        if BLOCKS[name] == 2:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-2, atol=1e-3)


class OwnsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.shift


class DoublingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (OwnsParameter, "OwnsParameter"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "BatchNorm1d"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), "BatchNorm1d"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 1)), "ConvTranspose1d"),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear"),
        (lambda: nn.Sequential(DoublingLinear(2, 2)), "DoublingLinear"),
        (lambda: nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), "max_norm"),
        (lambda: nn.Sequential(nn.Embedding(4, 2, scale_grad_by_freq=True)), "scale_grad_by_freq"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "Parametri"),
    ],
)
def test_modules_outside_the_census_are_refused_by_name(build: Callable[[], nn.Module], named: str) -> None:
    model = build()
    with pytest.raises(RoutingUnsupported, match=named):
        Routing(model, {name: 0 for name, _ in model.named_parameters()})


def test_replaced_forward_of_somebody_else_is_refused() -> None:
    model = new_model()
    routing = Routing(model, BLOCKS)
    model.head.forward = lambda x: x
    with pytest.raises(RoutingUnsupported, match="head"), routing:
        pass


@pytest.mark.parametrize(
    "blocks",
    [{}, {**BLOCKS, "ghost": 0}, {**BLOCKS, "norm.weight": 9}, {k: v for k, v in BLOCKS.items() if v != 1}],
)
def test_parameter_table_with_gaps_or_strangers_is_refused(blocks: dict[str, int]) -> None:
    with pytest.raises(RoutingUnsupported):
        Routing(new_model(), blocks)


@pytest.mark.parametrize("rows", [[], [(0,)], [(0, 0, 0, 1001)], [(0, 0, 0, -1)], [(0, 0, 0, 0.5)], [(0, 0, 0, True)]])
def test_weights_that_are_not_permille_integers_are_refused(rows: list[Row]) -> None:
    routing = Routing(new_model(), BLOCKS)
    with routing, pytest.raises(RoutingError), routing.micro_batch(rows):
        pass


def run_probe(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor] = loss_of_examples) -> None:
    examples = new_examples()
    probe(model, BLOCKS, loss, tensor_inputs(examples, (examples[0] % (VOCABULARY - 1)) + 1))


def test_probe_passes_and_leaves_gradients_buffers_and_random_state() -> None:
    model = new_model().train()
    model.register_buffer("calls", torch.zeros(1))
    model.register_forward_hook(lambda module, _i, _o: module.calls.add_(1) and None)
    model.norm.bias.grad = torch.ones(WIDTH)
    random_before = torch.get_rng_state()
    run_probe(model)
    assert torch.equal(model.norm.bias.grad, torch.ones(WIDTH))
    assert model.norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random_before)
    assert model.calls.item() == 0


class BypassingModel(TinyModel):
    def forward(self, tokens_BT: Tensor) -> Tensor:
        return functional.linear(self.scale(self.body(self.token(tokens_BT))), self.token.weight)


class BroadcastingModel(TinyModel):
    def forward(self, tokens_BT: Tensor) -> Tensor:
        broadcast_TI = self.position(torch.arange(tokens_BT.shape[1]))
        return self.head(self.scale(self.body(self.token(tokens_BT) + broadcast_TI)))


@pytest.mark.parametrize(("kind", "found"), [(BypassingModel, RoutingLeak), (BroadcastingModel, RoutingUnsupported)])
def test_probe_finds_parameters_used_around_the_census(kind: type[TinyModel], found: type[RoutingError]) -> None:
    torch.manual_seed(0)
    with pytest.raises(found):
        run_probe(kind().eval())


def test_probe_finds_a_loss_that_couples_examples() -> None:
    def coupled(model: nn.Module, tokens_BT: Tensor) -> Tensor:
        loss_B = loss_of_examples(model, tokens_BT)
        return loss_B * loss_B.detach().mean()

    with pytest.raises(RoutingLeak, match="replacing a blocked example"):
        run_probe(new_model(), coupled)


def test_unrouted_gradient_in_a_blocked_block_stops_the_step() -> None:
    model = new_model()
    with Routing(model, BLOCKS) as routing:
        with routing.micro_batch([(0, 1000, 1000, 1000)] * EXAMPLES):
            pass
        model.token.weight.grad = torch.ones_like(model.token.weight)
        with pytest.raises(RoutingLeak, match="token"):
            routing.finish_step()


def test_clipping_one_block_leaves_the_others() -> None:
    model, examples = new_model(), new_examples()
    routed_gradients(model, examples, [(1000, 1000, 1000, 0)] * EXAMPLES)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.expand.weight.grad.mul_(1000)
    norms = clip_block_gradients(model, BLOCKS, 9.0)
    assert norms[3] is None
    assert norms[2] > 9.0
    clipped = torch.cat([model.expand.weight.grad.flatten(), model.expand.bias.grad.flatten()])
    assert clipped.norm().item() == pytest.approx(9.0, rel=1e-4)
    assert torch.equal(model.norm.weight.grad, before["norm.weight"])
    model.expand.weight.grad[0, 0] = torch.inf
    with pytest.raises(RoutingError, match="block 2"):
        clip_block_gradients(model, BLOCKS, 1.0)
