"""Outputs that go through a model together have the gradients that each has alone, whatever the model does."""

from collections.abc import Callable

import pytest
import torch
from attribution_fixtures import CONFIG
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from attribution.cores import each_on_a_core
from attribution.factors import WeightFactors, damping_of, fit_factors
from attribution.query import (
    Output,
    WeightGradients,
    capturing,
    gradients_together,
    log_odds_gradients,
    logits_of,
)
from attribution.trace import preconditioned_queries
from attribution.weights import linear_weights
from consensus.rejection import ConfigError, Reason, Rejected
from trainer_client.demo.model import ByteModel

VOCABULARY, WIDTH = 32, 8


def outputs(count: int, span: tuple[int, int] = (5, 9)) -> list[Output]:
    texts = torch.randint(VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return [Output(tuple(text), *span) for text in texts]


class Small(nn.Module):
    """Two linears over an embedding; what it does between them is its kind's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT).cumsum(dim=1)
        logits_BTV: Tensor = self.head(functional.gelu(self.between(x_BTD)))
        return logits_BTV

    def between(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.middle(x_BTD)
        return y_BTD


class UsedTwice(Small):
    def between(self, x_BTD: Tensor) -> Tensor:
        return super().between(functional.gelu(super().between(x_BTD)))


class Flattened(Small):
    def between(self, x_BTD: Tensor) -> Tensor:
        return super().between(x_BTD.flatten(0, 1)).view(x_BTD.shape)


class TimeFirst(Small):
    """Batch and time change places: rows cannot be told apart by where they stand."""

    def between(self, x_BTD: Tensor) -> Tensor:
        return super().between(x_BTD.transpose(0, 1)).transpose(0, 1)


class WithoutItsModule(Small):
    def between(self, x_BTD: Tensor) -> Tensor:
        return functional.linear(x_BTD, self.middle.weight, self.middle.bias)


class PartlyWithoutItsModule(Small):
    def between(self, x_BTD: Tensor) -> Tensor:
        return super().between(x_BTD) + functional.linear(x_BTD, self.middle.weight.square())


class Mixing(Small):
    """What stands in one batch changes one another."""

    def between(self, x_BTD: Tensor) -> Tensor:
        return super().between(x_BTD - x_BTD.mean(dim=0))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind().eval()


def small_gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def compare(model: nn.Module, asked: list[Output]) -> None:
    together = gradients_together(model, asked)
    assert together.keys() == linear_weights(model).keys()
    for number, output in enumerate(asked):
        for name, alone in log_odds_gradients(model, output).items():
            found = together[name].whole()[number]
            assert torch.allclose(found, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max())), (name, number)


@pytest.mark.parametrize("kind", [lambda: ByteModel(CONFIG), small_gpt2, Small, UsedTwice, Flattened])
def test_outputs_go_through_the_model_together_and_each_keeps_its_own_gradient(kind: Callable[[], nn.Module]) -> None:
    model, asked = made(kind), outputs(5)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, tokens: passes.append(len(tokens[0])))
    gradients_together(model, asked)
    assert sorted(passes) == [1, 5]
    compare(model, asked)


@pytest.mark.parametrize("kind", [TimeFirst, WithoutItsModule, PartlyWithoutItsModule, Mixing])
def test_outputs_of_a_model_that_does_not_keep_them_apart_are_asked_one_by_one(kind: Callable[[], nn.Module]) -> None:
    model, asked = made(kind), outputs(4)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda module, tokens: passes.append(len(tokens[0])))
    together = gradients_together(model, asked)
    assert sorted(passes) == [1, 1, 1, 1, 4]
    for number, output in enumerate(asked):
        for name, alone in log_odds_gradients(model, output).items():
            assert torch.equal(together[name].whole()[number], alone)


def test_query_of_many_outputs_is_that_of_each_preconditioned_with_its_length() -> None:
    model, asked = made(Small), outputs(37)
    factors = fit_factors(model, [torch.tensor([output.tokens for output in asked])])
    queries, lengths = preconditioned_queries(model, factors, asked)
    for number in (0, 15, 16, 36):
        square = 0.0
        for name, gradient in log_odds_gradients(model, asked[number]).items():
            expected = factors[name].precondition(gradient, damping_of(factors))
            assert torch.allclose(queries[name][number], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            square += float((expected * gradient).sum())
        assert lengths[number] == pytest.approx(square**0.5, rel=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tokens", [2, 40])
def test_sides_of_a_gradient_are_preconditioned_to_what_their_product_is(tokens: int, turned: bool) -> None:
    random = torch.Generator().manual_seed(1)
    outputs_O, inputs_I = (torch.linalg.qr(torch.randn(size, size, generator=random)).Q for size in (6, 9))
    shape = (9, 6) if turned else (6, 9)
    factors = WeightFactors(outputs_O, inputs_I, torch.rand(shape, generator=random), turned)
    left_BTP, right_BTQ = (torch.randn(3, tokens, size, generator=random) for size in shape)
    held = WeightGradients(left_BTP, right_BTQ)
    queries_BPQ, squares_B = factors.precondition_each(held, 0.1)
    for number, gradient_PQ in enumerate(held.whole()):
        expected_PQ = factors.precondition(gradient_PQ, 0.1)
        assert torch.allclose(queries_BPQ[number], expected_PQ, rtol=1e-3, atol=1e-3)
        assert squares_B[number].item() == pytest.approx(float((expected_PQ * gradient_PQ).sum()), rel=1e-3)


def test_gradient_that_is_not_finite_is_refused_and_no_hook_stays() -> None:
    model = made(Small)
    with torch.no_grad():
        model.get_parameter("head.weight")[3, 3] = float("nan")
    with pytest.raises(Rejected) as refusal:
        gradients_together(model, outputs(3))
    assert refusal.value.reason is Reason.BAD_FIELD
    with pytest.raises(RuntimeError, match="in the block"), capturing(linear_weights(model)):
        raise RuntimeError("in the block")
    assert not any(module._forward_hooks for module in model.modules())


def test_factors_of_a_linear_that_text_does_not_reach_through_its_module_are_refused_by_name() -> None:
    with pytest.raises(Rejected, match=r"no text reached 'middle\.weight'") as refusal:
        fit_factors(made(WithoutItsModule), [torch.arange(24).view(2, 12)])
    assert refusal.value.reason is Reason.BAD_FIELD


# On all cores


def test_pieces_come_back_in_order_and_an_error_where_its_result_would_stand() -> None:
    def work(piece: int) -> tuple[int, int]:
        if piece == 7:
            raise ValueError("piece 7")
        return piece, torch.get_num_threads()

    threads = torch.get_num_threads()
    found = each_on_a_core(work, range(20))
    assert [next(found) for _ in range(7)] == [(piece, 1) for piece in range(7)]
    with pytest.raises(ValueError, match="piece 7"):
        next(found)
    assert torch.get_num_threads() == threads
    assert list(each_on_a_core(lambda _: torch.is_grad_enabled(), range(3))) == [False] * 3
    assert not list(each_on_a_core(work, []))


class Broken(Small):
    """Returns what is asked of it, or raises it."""

    def __init__(self, made: object) -> None:
        super().__init__()
        self.made = made

    def forward(self, tokens_BT: Tensor) -> Tensor:
        if isinstance(self.made, Exception):
            raise self.made
        return self.made  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            IndexError("index out of range in self"),
            "the model does not take tokens [1, 3], the highest of them 9: IndexE",
        ),
        (RuntimeError("sizes differ"), "RuntimeError: sizes differ"),
        (torch.zeros(1, 32), "expected logits [B, T, V] of tokens [1, 3], the highest of them 9; found [1, 32]"),
        ("words", "found str"),
        (torch.zeros(1, 3, 9), "the model tells 9 tokens apart"),
    ],
)
def test_model_that_does_not_take_these_tokens_is_told_in_a_line(made: object, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        logits_of(Broken(made), torch.tensor([[3, 9, 1]]))
    assert said in str(refusal.value)
