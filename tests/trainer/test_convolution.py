"""Convolutions under depth profiles: torch's bits at full weight, the weighted sum else, nothing of what is blocked."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from governed_fixtures import CAMPAIGN, STEPS, Scene, collate, losses, same_bits, weights
from torch import Tensor, nn
from torch.nn import functional

from consensus.portions import BlockWeight, ClassRule
from trainer_client.packing import Packing
from trainer_client.replay import ReplayJob, read_logged_campaign, replay
from trainer_client.routed_modules import census, observed_parameters
from trainer_client.routing import Routing, RoutingUnsupported

EXAMPLES, CHANNELS = 5, 4
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

SHAPES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "bias": False}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": "valid"}),
    (nn.Conv2d, {"kernel_size": 3, "groups": CHANNELS, "padding": (1, 0), "padding_mode": "reflect"}),
    (nn.Conv3d, {"kernel_size": 2}),
]


class Seen(nn.Module):
    """Two convolutions, the second of which needs the first one's activations, and a head."""

    def __init__(self, kind: type[nn.Module], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.first = kind(CHANNELS, CHANNELS, 1)
        self.second = kind(CHANNELS, 2 * CHANNELS, **options)
        self.head = nn.Linear(2 * CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        features_BO = torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(2).mean(2)
        return self.head(features_BO).square().sum(1)


def setting(kind: type[nn.Module], options: Mapping[str, Any]) -> tuple[Seen, Tensor, dict[str, int]]:
    torch.manual_seed(0)
    model = Seen(kind, options)
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.randn(EXAMPLES, CHANNELS, *(9, 8, 5)[:dimensions])
    blocks = {name: ("first", "second", "head").index(name.split(".")[0]) for name, _ in model.named_parameters()}
    return model, x, blocks


def routed(
    model: nn.Module, x: Tensor, blocks: dict[str, int], rows: list[tuple[int, ...]]
) -> dict[str, Tensor | None]:
    model.zero_grad()
    with Routing(model, blocks) as routing:
        with routing.micro_batch(rows):
            routing.routed_loss(model(x), EXAMPLES).backward()
        routing.finish_step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_full_weights_leave_every_bit_of_plain_gradients(kind: type[nn.Module], options: dict[str, Any]) -> None:
    model, x, blocks = setting(kind, options)
    found = routed(model, x, blocks, [(1000,) * 3] * EXAMPLES)
    model.zero_grad()
    (model(x).sum() / EXAMPLES).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "options"), SHAPES)
def test_weighted_gradients_are_the_weighted_sum_of_each_examples_own(
    kind: type[nn.Module], options: dict[str, Any]
) -> None:
    model, x, blocks = setting(kind, options)
    rows = [(1000, 250, 1000), (0, 1000, 1000), (500, 0, 1000), (1000, 0, 1000), (0, 750, 1000)]
    found = routed(model, x, blocks, rows)
    parameters = dict(copy.deepcopy(model).double().named_parameters())
    own = copy.deepcopy(model).double()
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example, row in enumerate(rows):
        gradients = torch.autograd.grad(own(x[example : example + 1].double()).sum(), list(own.parameters()))
        for name, gradient in zip(totals, gradients, strict=True):
            totals[name] += row[blocks[name]] / 1000 * gradient / EXAMPLES
    for name, total in totals.items():
        gradient = found[name]
        assert gradient is not None
        assert (gradient.double() - total).norm() <= 1e-5 * total.norm(), name


@pytest.mark.parametrize(("kind", "options"), SHAPES)
@pytest.mark.parametrize("other", [7.0, float("inf"), float("nan")])
def test_replacing_a_blocked_example_changes_no_bit(
    kind: type[nn.Module], options: dict[str, Any], other: float
) -> None:
    model, x, blocks = setting(kind, options)
    rows = [(1000, 1000, 1000), (0, 0, 0), (1000, 500, 1000), (0, 1000, 1000), (1000, 0, 0)]
    found = {
        name: gradient.clone() for name, gradient in routed(model, x, blocks, rows).items() if gradient is not None
    }
    replaced = x.clone()
    replaced[1] = other
    again = routed(model, replaced, blocks, rows)
    assert found.keys() == again.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, again[name]), name  # type: ignore[arg-type]


def test_convolution_that_no_example_may_move_has_no_gradient_and_passes_activations_on() -> None:
    model, x, blocks = setting(*SHAPES[3])
    found = routed(model, x, blocks, [(1000, 0, 1000)] * EXAMPLES)
    assert found["second.weight"] is None
    assert found["second.bias"] is None
    model.zero_grad()
    (model(x).sum() / EXAMPLES).backward()
    assert torch.equal(found["first.weight"], model.first.weight.grad)  # type: ignore[arg-type, union-attr]


def test_closed_convolution_brings_zeros_where_another_rank_may_move_it() -> None:
    model, x, blocks = setting(*SHAPES[3])
    with Routing(model, blocks) as routing:
        with routing.micro_batch([(1000, 0, 1000)] * EXAMPLES, weights_of_step=[(1000, 0, 1000), (0, 1000, 0)]):
            routing.routed_loss(model(x), EXAMPLES).backward()
        routing.finish_step()
    assert not model.second.weight.grad.any()  # type: ignore[union-attr]
    assert not model.second.bias.grad.any()  # type: ignore[union-attr]


def test_convolution_is_not_summed_by_source() -> None:
    model, _, _ = setting(*SHAPES[0])
    assert observed_parameters(model) == ("head.weight", "head.bias")


def test_packed_examples_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1), nn.Linear(8, 8))
    packing = Packing(1, CHANNELS, ((0, 2), (2, 4)))
    with (
        Routing(model, dict.fromkeys(dict(model.named_parameters()), 0)) as routing,
        routing.micro_batch([(1000,), (1000,)], packing=packing),
        pytest.raises(RoutingUnsupported, match="Conv1d mixes positions"),
    ):
        model(torch.randn(1, CHANNELS, 8))


def test_examples_that_look_like_channels_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3))
    with (
        Routing(model, dict.fromkeys(dict(model.named_parameters()), 0)) as routing,
        routing.micro_batch([(1000,)] * CHANNELS),
        pytest.raises(RoutingUnsupported, match=r"expects 3 dimensions, examples first, found shape \(4, 9\)"),
    ):
        model(torch.randn(CHANNELS, 9))


class Causal(nn.Module):
    """Next-byte prediction by convolutions over the bytes before; blocks ``embedding``, ``layers.N``, ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, groups=8)])
        self.head = nn.Linear(8, 32)

    def forward(self, bytes_BT: Tensor) -> Tensor:
        x_BCT = self.embedding(bytes_BT).mT
        for layer in self.layers:
            x_BCT = x_BCT + functional.gelu(layer(functional.pad(x_BCT, (2, 0))))
        logits: Tensor = self.head(x_BCT.mT)
        return logits


def test_governed_convolutions_come_out_of_a_replay_bit_for_bit(scene: Scene) -> None:
    closed = (BlockWeight("layers.0", 0), BlockWeight("layers.1", 250))
    scene.register(classes=(ClassRule("documentation", 1_000, ()), ClassRule("news", 1_000, closed)))
    scene.build = Causal
    scene.plan_changes["accumulator_window_steps"] = 5
    scene.arguments["probe_loss"] = losses
    scene.train()
    torch.manual_seed(1)
    model = Causal()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    job = ReplayJob(model, optimizer, scene.training_sources, losses, collate)
    found = replay(read_logged_campaign(scene.client(), CAMPAIGN), job, ())
    assert (found.steps, found.matched, found.difference) == (STEPS, STEPS, None)
    assert same_bits(weights(model), weights(scene.model))


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    "module",
    [
        Standardised(CHANNELS, CHANNELS, 3),
        nn.ConvTranspose1d(CHANNELS, CHANNELS, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(CHANNELS, CHANNELS, 3)),
    ],
)
def test_convolutions_that_compute_something_else_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(RoutingUnsupported, match="not in the census"):
        census(nn.Sequential(module))
