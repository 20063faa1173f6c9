"""Compiled models: routed as the ones they were compiled from, and as they were afterwards."""

import pytest
import torch
from governed_fixtures import EVERYTHING, STEPS, Scene, TinyModel, losses, same_bits, weights
from torch import Tensor, nn

from consensus.event import Kind
from trainer_client.plan import default_blocks
from trainer_client.routing import Routing

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

WEIGHTS = [[1000, 0, 500, 1000], [0, 0, 0, 0], [1000, 250, 0, 1000], [500, 0, 1000, 0]]


def compiled(model: nn.Module) -> nn.Module:
    """The compiler's own tracing and backward pass, without the minutes of generating C++."""
    wrapped: nn.Module = torch.compile(model, backend="aot_eager")
    return wrapped


def gradients(called: nn.Module, model: nn.Module, routing: Routing, inputs_BT: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    with routing.micro_batch(WEIGHTS):
        routing.routed_loss(losses(called, inputs_BT), 5).backward()
    routing.finish_step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_a_compiled_model_are_routed_also_if_it_ran_before_and_plain_again_after() -> None:
    torch.manual_seed(1)
    model = TinyModel()
    block_of = {name: number for number, names in enumerate(default_blocks(model).values()) for name in names}
    inputs_BT = torch.randint(0, 32, (4, 10))
    called = compiled(model)
    losses(called, inputs_BT).sum().backward()
    with Routing(model, block_of) as routing:
        expected = gradients(model, model, routing, inputs_BT)
        for _ in range(2):
            found = gradients(called, model, routing, inputs_BT)
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in found)
    plain = []
    for each in (called, model):
        model.zero_grad()
        losses(each, inputs_BT).sum().backward()
        plain.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(plain[0][name], plain[1][name], atol=1e-6) for name in plain[1])


def test_compiled_run_ends_with_the_weights_of_the_plain_one(scene: Scene) -> None:
    scene.register(classes=EVERYTHING)
    scene.plan_changes.update(accumulator_window_steps=5)
    scene.wrap = compiled
    scene.train()
    assert len(scene.events(Kind.STEP)) == STEPS
    found = weights(scene.model)
    (opened,) = scene.events(Kind.CAMPAIGN)
    names = [tensor.name for block in opened.operation.parameter_blocks for tensor in block.tensors]  # type: ignore[union-attr]
    assert sorted(names) == sorted(found)
    assert "forward" not in scene.model.head.__dict__
    torch.manual_seed(1)
    assert not same_bits(found, weights(TinyModel()))
