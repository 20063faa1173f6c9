"""Models written in awkward ways: what is taken is exact, what would leak is refused by name, also without a probe."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from trainer_client.plan import default_blocks
from trainer_client.probe import ProbeInputs, probe, tensor_inputs
from trainer_client.routing import Routing, RoutingError, RoutingLeak, RoutingUnsupported

EXAMPLES, LENGTH, WIDTH, VOCABULARY = 5, 6, 8, 11
RELATIVE_ERROR = 1e-5
torch.set_num_threads(1)

Forward = Callable[[nn.Module, Tensor], Tensor]


class Model(nn.Module):
    """Modules by name, and what to do with them."""

    def __init__(self, compute: Forward, **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def linear(outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, outputs)


def vectors(count: int = EXAMPLES, seed: int = 1) -> Tensor:
    return torch.randn(count, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def images(count: int = EXAMPLES, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens(count: int = EXAMPLES, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().mean(1)


def blocks_of(model: nn.Module) -> dict[str, int]:
    return {name: number for number, names in enumerate(default_blocks(model).values()) for name in names}


def rows(blocks: dict[str, int]) -> list[list[int]]:
    return [
        [0 if row == 0 else 1 + (137 * row + 61 * block) % 1000 for block in range(max(blocks.values()) + 1)]
        for row in range(EXAMPLES)
    ]


def gradients(model: nn.Module, x: Tensor, loss: Forward = squares) -> dict[str, Tensor]:
    blocks = blocks_of(model)
    model.zero_grad()
    with Routing(model, blocks) as routing:
        with routing.micro_batch(rows(blocks)):
            routing.routed_loss(loss(model, x), EXAMPLES).backward()
        routing.finish_step()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it: the scale is a buffer without dimensions."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH, padding_idx=0)
        self.register_buffer("scale", torch.tensor(WIDTH**0.5))

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) * self.scale


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.scale * (hidden if gate is None else hidden * gate)


class Remembering(nn.Module):
    """Buffers without dimensions, made and grown on the way, and of one number in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("made", None)
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("wide", torch.ones(1).expand(WIDTH))
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.made = torch.arange(1.0, x.shape[1] + 1).to(x)
        if len(self.grown) < x.shape[1]:
            self.grown = torch.ones(x.shape[1]).to(x)
        return self.linear(x) * (self.made * self.grown)[:, None] * self.wide


def tied_head() -> nn.Module:
    """Its weight is the embedding's, its bias in a block of its own and held by another module too, as BERT's."""
    head = linear(VOCABULARY)
    embedding = ScaledEmbedding()
    head.weight = embedding.weight
    outer = Model(lambda self, x: self.decoder(x), decoder=head)
    outer.bias = head.bias
    return Model(
        lambda self, x: self.head(self.norm(self.embedding(x))),
        embedding=embedding,
        norm=nn.LayerNorm(WIDTH),
        head=outer,
    )


def added_in_place(self: nn.Module, x: Tensor) -> Tensor:
    hidden = self.first(x)
    hidden += self.second(x).mul_(2)
    hidden[:, 0] = 0
    return self.norm(hidden).mul_(3)


EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "in place, after linears": (lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), linear()), vectors),
    "in place, after Conv1D": (lambda: nn.Sequential(Conv1D(WIDTH, WIDTH), nn.ReLU(inplace=True), linear()), vectors),
    "in place, everywhere": (
        lambda: Model(added_in_place, first=linear(), second=linear(), norm=nn.RMSNorm(WIDTH)),
        vectors,
    ),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.GroupNorm(2, WIDTH), nn.GELU()), images),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GELU(), nn.Conv2d(4, 2, 3)),
        images,
    ),
    "norm of channels": (lambda: nn.Sequential(nn.Conv2d(3, WIDTH, 3), ChannelNorm(WIDTH)), images),
    "slopes of channels": (lambda: nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.PReLU(WIDTH)), images),
    "unused vector": (lambda: nn.Sequential(linear(), HalfUsed()), vectors),
    "called by name": (
        lambda: Model(lambda self, x: self.a(hidden=self.b(input=x)), a=HalfUsed(), b=linear()),
        vectors,
    ),
    "buffers that change": (Remembering, vectors),
    "tied head and scaled embedding": (tied_head, tokens),
}


def built(name: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    torch.manual_seed(0)
    build, inputs = EXACT[name]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, inputs


@pytest.mark.parametrize("name", EXACT)
def test_gradients_agree_with_one_backward_per_example(name: str) -> None:
    model, inputs = built(name)
    blocks, x = blocks_of(model), inputs()
    exact = copy.deepcopy(model).double()
    wide = x.double() if x.is_floating_point() else x
    expected = {each: torch.zeros_like(parameter) for each, parameter in exact.named_parameters()}
    for example, row in enumerate(rows(blocks)):
        loss = squares(exact, wide[example : example + 1]).sum()
        parts = torch.autograd.grad(loss, list(exact.parameters()), allow_unused=True)
        for each, part in zip(expected, parts, strict=True):
            expected[each] += 0 if part is None else row[blocks[each]] / 1000 * part / EXAMPLES
    found = gradients(model, x)
    whole = torch.cat([total.flatten() for total in expected.values()]).norm()
    for each, total in expected.items():
        error = ((found[each].double() if each in found else 0) - total).norm()
        assert error <= RELATIVE_ERROR * whole, f"{each}: {error / whole:.2e}"


@pytest.mark.parametrize("name", EXACT)
def test_probe_passes_and_replacing_a_blocked_example_changes_no_bit(name: str) -> None:
    model, inputs = built(name)
    buffers = dict(model.named_buffers())
    probe(model, blocks_of(model), squares, tensor_inputs(inputs(), inputs(seed=2)[0]))
    assert all(buffer is buffers[each] for each, buffer in model.named_buffers())
    replaced = inputs()
    replaced[0] = inputs(seed=2)[0]
    first, second = (gradients(copy.deepcopy(model), x) for x in (inputs(), replaced))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[each], second[each]) for each in first)


class Borrowing(nn.Linear):
    """A linear whose weight is made of another one's."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__(WIDTH, WIDTH)
        del self.weight
        self.__dict__["lender"] = lender

    @property
    def weight(self) -> Tensor:
        return self.lender.weight * 2


def borrowing() -> nn.Module:
    lender = linear()
    return nn.Sequential(lender, Borrowing(lender))


def with_attention_that_uses_its_linear_itself() -> nn.Module:
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).requires_grad_(False)
    attention.out_proj.requires_grad_(True)
    return Model(lambda self, x: self.attention(x, x, x)[0], attention=attention)


def hooked(*, post: bool) -> nn.Module:
    model = nn.Sequential(linear())
    if post:
        model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    else:
        model[0].weight.register_hook(lambda gradient: gradient + 1)
    return model


class NoisyInTraining(HalfUsed):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * functional.dropout(x, training=self.training)


class OfAnObject(HalfUsed):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.hidden


def with_foreign_scale() -> nn.Module:
    other = HalfUsed()

    class Foreign(HalfUsed):
        def forward(self, x: Tensor) -> Tensor:
            return self.scale * other.scale * x

    return nn.Sequential(other, Foreign())


def calling(compute: Forward) -> nn.Module:
    return Model(compute, a=linear(), b=linear(), vector=HalfUsed())


def nested(self: nn.Module, x: Tensor) -> Tensor:
    return self.a(torch.nested.nested_tensor(list(x), layout=torch.jagged)).to_padded_tensor(0)


@pytest.mark.parametrize(
    ("build", "kind", "named"),
    [
        (borrowing, RoutingUnsupported, "'1': its weight is none of its own parameters"),
        (with_attention_that_uses_its_linear_itself, RoutingLeak, r"around .* 'attention\.out_proj\.weight'"),
        (lambda: calling(lambda self, x: functional.linear(self.a(x), self.b.weight)), RoutingLeak, r"b\.weight"),
        (lambda: calling(lambda self, x: self.vector(self.a(x), x)), RoutingUnsupported, "one tensor, found"),
        (lambda: calling(lambda self, x: self.a((x,))), RoutingUnsupported, "one tensor, found .tuple"),
        (lambda: calling(nested), RoutingUnsupported, "one tensor, found .nested"),
        (lambda: nn.Sequential(nn.LayerNorm([EXAMPLES, LENGTH, WIDTH])), RoutingUnsupported, "mixes examples"),
        (lambda: hooked(post=False), RoutingUnsupported, "'weight' has a hook on its gradient"),
        (lambda: hooked(post=True), RoutingUnsupported, "'weight' has a hook on its gradient"),
        (lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.complex64), RoutingUnsupported, "is complex"),
        (lambda: nn.Linear(WIDTH, WIDTH, device="meta"), RoutingUnsupported, "has no values yet"),
        (lambda: nn.LazyLinear(WIDTH), RoutingUnsupported, "has no values yet"),
        (lambda: nn.Sequential(linear(), NoisyInTraining()), RoutingUnsupported, "NoisyInTraining"),
        (lambda: nn.Sequential(linear(), OfAnObject()), RoutingUnsupported, "OfAnObject"),
        (with_foreign_scale, RoutingUnsupported, "Foreign"),
    ],
)
def test_what_would_leak_or_cannot_be_told_apart_is_refused_by_name_without_a_probe(
    build: Callable[[], nn.Module], kind: type[RoutingError], named: str
) -> None:
    with pytest.raises(kind, match=named):
        gradients(build(), vectors())


def test_what_is_unfrozen_or_put_in_after_forwards_were_replaced_is_refused_by_name() -> None:
    model = nn.Sequential(linear(), linear())
    model[1].requires_grad_(False)
    blocks = blocks_of(model)
    with Routing(model, blocks) as routing:
        model[1].requires_grad_(True)
        with (
            pytest.raises(RoutingUnsupported, match=r"'1\.weight' was made trainable"),
            routing.micro_batch(rows(blocks)),
        ):
            pass
        model[1].requires_grad_(False)
        with routing.micro_batch(rows(blocks)):
            model[1].requires_grad_(True)
            with pytest.raises(RoutingLeak, match=r"1\.weight"):
                routing.routed_loss(squares(model, vectors()), EXAMPLES)
        model[1].requires_grad_(False)
        model[0] = linear()
        with pytest.raises(RoutingUnsupported, match=r"'0\.weight' was"), routing.micro_batch(rows(blocks)):
            pass


def test_parameters_given_for_a_while_are_refused_by_name() -> None:
    def doubled(model: nn.Module, x: Tensor) -> Tensor:
        given = {name: 2 * parameter for name, parameter in model.named_parameters()}
        return torch.func.functional_call(model, given, x).flatten(1).square().mean(1)

    with pytest.raises(RoutingUnsupported, match="none of its own parameters"):
        gradients(nn.Sequential(linear()), vectors(), doubled)


@pytest.mark.parametrize("loss", [lambda loss_B: (loss_B, None), lambda loss_B: 1.0, lambda loss_B: loss_B.detach()])
def test_loss_that_cannot_be_routed_is_refused_by_name(loss: Callable[[Tensor], object]) -> None:
    with pytest.raises(RoutingError, match=r"one loss per example|no trainable parameter was used"):
        gradients(nn.Sequential(linear()), vectors(), lambda model, x: loss(squares(model, x)))


def swapped(self: nn.Module, x: Tensor) -> Tensor:
    """All but the first in another order."""
    order = torch.tensor([0, *range(len(x) - 1, 0, -1)])
    return self.b(self.a(x[order])[order])


def of_the_worst(model: nn.Module, x: Tensor) -> Tensor:
    loss_B = squares(model, x)
    return loss_B * (loss_B == loss_B.max())


@pytest.mark.parametrize(
    ("forward", "loss"),
    [
        (lambda self, x: self.b(self.a(x)), lambda model, x: squares(model, x) / len(x)),
        (lambda self, x: self.b(self.a(x)), of_the_worst),
        (swapped, squares),
    ],
    ids=["divided by their number", "of the worst", "in another order"],
)
def test_probe_finds_gradients_that_are_not_the_sum_of_each_examples_own(forward: Forward, loss: Forward) -> None:
    torch.manual_seed(0)
    model = Model(forward, a=linear(), b=linear())
    first, *others = vectors().unbind()
    small = tensor_inputs(torch.stack([0.1 * first, *others]), 0.2 * first)
    with pytest.raises(RoutingLeak, match="is not the sum of what each example gives alone"):
        probe(model, blocks_of(model), loss, small)


def test_probe_says_nothing_of_a_sum_whose_losses_draw_random_numbers() -> None:
    """Dropout is off while it is tried; noise that the loss itself draws, as in diffusion, is not."""
    model = nn.Sequential(linear(), nn.Dropout(0.5), linear()).train()
    given = tensor_inputs(vectors(), vectors(seed=2)[0])
    probe(model, blocks_of(model), squares, given)
    probe(model, blocks_of(model), lambda model, x: squares(model, x + torch.randn_like(x)), given)
    assert model.training


def test_probe_without_examples_alone_cannot_be_asked_for() -> None:
    with pytest.raises(TypeError, match="alone"):
        ProbeInputs(2, vectors(2), vectors(1), vectors(2))  # type: ignore[call-arg]
