"""The heads of a model's attention: which rows and columns of which matrices are whose, as a parameter table.

Known are two layouts:

* **separate** ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, head after head, as Llama and its kin have them. Where
  fewer heads of keys and values serve groups of query heads, those are parameter blocks of their own: ``kv_head``;
* **joined** ``c_attn`` (queries, then keys, then values, each head after head) and ``c_proj``, as GPT-2 has them.

Any other module of attention with trainable parameters is refused by name; for one is taken whatever has "attention" in
the name of its class, or a projection called as above. A layout is recognised by names and sizes, which can lie:
``check_layouts`` tries it on real activations. What a head
owns is rows of the projections to queries, keys and values, their biases, and columns of the one that takes heads
together again; beside these, LoRA's matrices. What heads share (that one's bias, norms of queries and keys, the shared
one of LoRA's matrices) stays in the block of its layer.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consensus.pieces import TensorPiece
from trainer_client.random_states import random_states, set_random_states
from trainer_client.route import RoutingLeak, RoutingUnsupported
from trainer_client.routed_modules import is_conv1d

CACHES = ("cache", "past_key_value", "past_key_values", "layer_past")
"""Arguments in which attention keeps what it has seen: not to be added to."""

Part = tuple[str, int, int]
"""A head's name in its module, and the first and end of its indexes."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear of attention, and whose its outputs are, or its inputs."""

    name: str
    by_outputs: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """One module of attention. ``served_by``: the head whose keys and values each query head reads."""

    module: str
    projections: tuple[Projection, ...]
    served_by: Mapping[str, str]


def head_blocks(model: nn.Module, blocks: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The table ``blocks`` with what heads own moved to blocks of their own, ``MODULE.head.0`` and so on.

    Raises:
        RoutingUnsupported: a module of attention has another layout; no head has trainable parameters.
    """
    divided = dict(_divided(model))
    if not divided:
        raise RoutingUnsupported("routing granularity 'head': no head of attention has trainable parameters")
    table: dict[str, list[str]] = {}
    for block, names in blocks.items():
        for name in names:
            if name not in divided:
                table.setdefault(block, []).append(name)
            for head, piece in divided.get(name, ()):
                table.setdefault(head, []).append(piece.name)
    return {block: tuple(names) for block, names in table.items()}


def attention_layouts(model: nn.Module) -> tuple[AttentionLayout, ...]:
    """The layouts of all modules of attention with trainable parameters.

    Raises:
        RoutingUnsupported: one of them is not known.
    """
    looking = {name: module for name, module in model.named_modules() if _looks_like_attention(module)}
    layouts = []
    for name, module in looking.items():
        holds_another = any(other != name and other.startswith(f"{name}." if name else "") for other in looking)
        if holds_another or not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        layout = _separate(name, module) or _joined(name, module)
        if layout is None:
            raise RoutingUnsupported(
                f"routing granularity 'head': module {name!r} ({type(module).__name__}): whose rows are which"
                " head's is not known; expected q_proj, k_proj, v_proj and o_proj, or c_attn and c_proj, of the sizes"
                " that its heads make"
            )
        layouts.append(layout)
    return tuple(layouts)


def check_layouts(model: nn.Module, run: Callable[[], object]) -> None:
    """Each head's queries, keys and values reach the columns of that head, and nobody else's.

    ``run`` is a forward pass on a real batch. Where it first calls a module of attention, the module is called again
    with the same, under the same autocast, with noise added to what some heads project.

    Raises:
        RoutingLeak: noise of a head reached another one's columns, or none of its own.
        RoutingUnsupported: ``run`` does not call a module of attention.
    """
    layouts = attention_layouts(model)
    tried: set[str] = set()
    with ExitStack() as stack, torch.no_grad():
        if "torch._dynamo" in sys.modules:  # compiled code would not call the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layout in layouts:
            hook = partial(_check_once, model, layout, tried)
            handle = model.get_submodule(layout.module).register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        run()
    untried = [layout.module for layout in layouts if layout.module not in tried]
    if untried:
        raise RoutingUnsupported(f"modules of attention that the probe's batch does not reach: {untried}")


def _divided(model: nn.Module) -> Iterator[tuple[str, tuple[tuple[str, TensorPiece], ...]]]:
    """Each divided parameter, and its pieces with the parameter block of each."""
    for layout in attention_layouts(model):
        for projection in layout.projections:
            prefix = f"{layout.module}.{projection.name}."
            for name, parameter in model.named_parameters():
                if not name.startswith(prefix) or not parameter.requires_grad:
                    continue
                owner = model.get_submodule(name.rpartition(".")[0])
                dimension = _divided_dimension(name.removeprefix(prefix), owner, by_outputs=projection.by_outputs)
                if dimension is None:
                    continue
                yield (
                    name,
                    tuple(
                        (f"{layout.module}.{head}", TensorPiece(name, dimension, first, end))
                        for head, first, end in projection.parts
                    ),
                )


def _divided_dimension(own_name: str, owner: nn.Module, *, by_outputs: bool) -> int | None:
    """Along which dimension a parameter of a projection is divided; None for one that heads share.

    Raises:
        RoutingUnsupported: it is none that is known.
    """
    outputs = 1 if is_conv1d(owner) else 0
    if own_name in ("weight", "base_layer.weight"):
        return outputs if by_outputs else 1 - outputs
    if own_name in ("bias", "base_layer.bias"):
        return 0 if by_outputs else None
    if own_name.startswith("lora_A.") and own_name.endswith(".weight"):
        return None if by_outputs else 1
    if own_name.startswith("lora_B."):
        return 0 if by_outputs else None
    raise RoutingUnsupported(f"parameter {own_name!r} of a projection of heads: whose it is is not known")


def _looks_like_attention(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    return "attention" in type(module).__name__.lower() or bool(children & {"q_proj", "c_attn"})


def _separate(name: str, module: nn.Module) -> AttentionLayout | None:
    projections = [getattr(module, each, None) for each in ("q_proj", "k_proj", "v_proj", "o_proj")]
    sizes = [(getattr(each, "in_features", 0), getattr(each, "out_features", 0)) for each in projections]
    width = getattr(module, "head_dim", 0)
    if not width or not all(outputs for _, outputs in sizes):
        return None
    (_, queries), (_, keys), (_, values), (taken, _) = sizes
    heads, key_heads = queries // width, keys // width
    told = getattr(module, "config", None)
    wanted = (
        getattr(told, "num_attention_heads", heads) * width,
        getattr(told, "num_key_value_heads", key_heads) * width,
    )
    if (queries, keys) != wanted or values != keys or taken != queries or not key_heads or heads % key_heads:
        return None
    own = "head" if key_heads == heads else "kv_head"
    of_queries = _parts("head", heads, width)
    of_keys = _parts(own, key_heads, width)
    served_by = {f"head.{head}": f"{own}.{head * key_heads // heads}" for head in range(heads)}
    return AttentionLayout(
        name,
        (
            Projection("q_proj", True, of_queries),
            Projection("k_proj", True, of_keys),
            Projection("v_proj", True, of_keys),
            Projection("o_proj", False, of_queries),
        ),
        served_by,
    )


def _joined(name: str, module: nn.Module) -> AttentionLayout | None:
    joined, taken = getattr(module, "c_attn", None), getattr(module, "c_proj", None)
    heads = getattr(module, "num_heads", None) or getattr(module, "n_head", 0)
    if joined is None or taken is None or not heads or hasattr(module, "q_attn"):
        return None
    outputs, inputs = _size(joined)[1], _size(taken)[0]
    width = outputs // (3 * heads)
    if outputs != 3 * heads * width or inputs != heads * width:
        return None
    parts = tuple(part for third in range(3) for part in _parts("head", heads, width, third * heads * width))
    served_by = {f"head.{head}": f"head.{head}" for head in range(heads)}
    return AttentionLayout(
        name,
        (Projection("c_attn", True, parts), Projection("c_proj", False, _parts("head", heads, width))),
        served_by,
    )


def _size(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear, whatever LoRA has put around it; 0 of what is none."""
    inner = getattr(module, "base_layer", module)
    if is_conv1d(inner):
        return int(inner.nx), int(inner.nf)  # type: ignore[arg-type]
    return getattr(inner, "in_features", 0), getattr(inner, "out_features", 0)


def _parts(label: str, count: int, width: int, first: int = 0) -> tuple[Part, ...]:
    return tuple((f"{label}.{number}", first + number * width, first + (number + 1) * width) for number in range(count))


def _check_once(
    model: nn.Module,
    layout: AttentionLayout,
    tried: set[str],
    module: nn.Module,
    positional: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    if layout.module not in tried:
        tried.add(layout.module)
        _check_layout(model, layout, positional, {key: None if key in CACHES else named[key] for key in named})


def _check_layout(
    model: nn.Module, layout: AttentionLayout, positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """By the bits of heads' numbers: any two differ in one, so that one has noise in it where the other has none."""
    module = model.get_submodule(layout.module)
    *projections, taking = layout.projections
    random_before = random_states()

    def columns(noisy: frozenset[str]) -> Tensor:
        """What the heads put together, with noise in what those project."""
        found: list[Tensor] = []
        with ExitStack() as stack:
            for projection in projections:
                hook = getattr(module, projection.name).register_forward_hook(_noise(projection, noisy))
                stack.callback(hook.remove)
            hook = getattr(module, taking.name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
            stack.callback(hook.remove)
            set_random_states(random_before)
            module(*positional, **named)
        return found[0]

    plain = columns(frozenset())
    heads = sorted({head for projection in projections for head, _, _ in projection.parts})
    for bit in range(max(1, (len(heads) - 1).bit_length())):
        for value in (0, 1):
            noisy = frozenset(head for number, head in enumerate(heads) if number >> bit & 1 == value)
            found = columns(noisy)
            for head, first, end in taking.parts:
                moved = not torch.equal(found[..., first:end], plain[..., first:end])
                reads = layout.served_by[head]
                if (moved and not noisy & {head, reads}) or (not moved and reads in noisy):
                    raise RoutingLeak(
                        f"module {layout.module!r}: {taking.name}'s columns {first} to {end} are not those of {head}:"
                        " its layout of heads is another one"
                    )
    set_random_states(random_before)


def _noise(projection: Projection, noisy: frozenset[str]) -> Callable[..., Tensor]:
    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        changed = output.clone()
        for head, first, end in projection.parts:
            if head in noisy:
                changed[..., first:end] += torch.linspace(0.5, 1.5, end - first, dtype=output.dtype).to(output.device)
        return changed

    return add
