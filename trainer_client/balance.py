"""The balance sheet: the change of every linear's parameters, split by source, exactly.

AdamW's update is linear in the first moment, and the first moment is linear in the gradients; the second moment is
shared. So each source has a first moment of its own, ``m_s <- b1 m_s + (1 - b1) g_s`` with ``g_s`` its part of the
gradient after clipping, and of every step (Loshchilov and Hutter, arXiv 1711.05101)

    part of source s    - lr / (1 - b1^t) * m_s / (sqrt(v_t) / sqrt(1 - b2^t) + eps)
    part of the decay   - lr * weight_decay * theta_{t-1}

which add up to the change of theta. An account of change and of nothing else: what a source would have done alone, or
what had come out without it, is another question (``replay.py``, without the source). Kept in float64; the optimizer's
own float32 leaves the *rest*.

Formed in a replay, in the routed backward pass; by head for each piece of a tensor, which the optimizer has as a
parameter of its own (``pieces.py``). Not split: embeddings, norms, convolutions, tensors shared with an embedding.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consensus.rejection import Reason, Rejected
from trainer_client.pieces import Entries
from trainer_client.routed_modules import observed_parameters

Parts = dict[str, Tensor]
"""By the parameter table's names, whole parameters and pieces: parts of their change, float64."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of one parameter block: the norm of a part, and ``<part, change> / <change, change>``."""

    norm: float
    share: float


@dataclass(frozen=True, slots=True)
class BalanceSheet:
    """By parameter block: the norm of its change, each source's entry by id, the decay's, and what is left over.

    Shares of sources, decay and rest add up to one. ``unsplit`` are parameters that no row speaks of.
    """

    changes: Mapping[str, float]
    sources: Mapping[bytes, Mapping[str, Entry]]
    decay: Mapping[str, Entry]
    rest: Mapping[str, Entry]
    unsplit: tuple[str, ...]


class Balance:
    """Splits the steps of one optimizer; an observer of the routing.

    Raises:
        Rejected: ``BAD_FIELD`` for an optimizer whose update is not the one above.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        unusual = [name for group in optimizer.param_groups for name in ("amsgrad", "maximize") if group.get(name)]
        if type(optimizer) is not torch.optim.AdamW or unusual:
            what = ", ".join([type(optimizer).__name__, *unusual])
            raise Rejected(Reason.BAD_FIELD, f"a balance sheet is of torch.optim.AdamW, found {what}")
        self._entries: Entries = {}
        self._unsplit: tuple[str, ...] = ()
        self._first: Parts = {}
        self._pending: dict[bytes, Parts] = {}
        self._moments: dict[bytes, Parts] = {}
        self._parts: dict[bytes, Parts] = {}
        self._decay: Parts = {}
        self._before: Parts = {}
        self._factors: dict[str, float] = {}

    def attach(self, model: nn.Module, entries: Entries) -> None:
        """Learns whose change to split, from here on; ``entries`` are the model's.

        Raises:
            RoutingUnsupported: as ``routed_modules.census``.
        """
        observed = frozenset(observed_parameters(model))
        self._entries = {name: entry for name, entry in entries.items() if entry.tensor_name in observed}
        self._unsplit = tuple(name for name, _ in model.named_parameters() if name not in observed)
        self._first = {name: _wide(entry.value) for name, entry in self._entries.items()}

    def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None:
        """One source's part of one parameter's gradient, in one backward pass."""
        if parameter in self._entries:
            _add(self._pending.setdefault(group, {}), parameter, gradient.double())

    def drop(self, names: Iterable[str]) -> None:
        """The optimizer's state of these was dropped: no source's part of it is left."""
        for name in names:
            for moments in self._moments.values():
                moments.pop(name, None)

    def skip_step(self) -> None:
        """In place of ``before_step`` and ``after_step``: the optimizer does not step."""
        self._pending = {}

    def before_step(self, block_of: Mapping[str, int], factors_of_blocks: Sequence[float | None]) -> None:
        """Between clipping and ``optimizer.step()``; the factors are as for ``SourceAccumulators.take_step``."""
        self._factors, self._before = {}, {}
        for name, entry in self._entries.items():
            factor = factors_of_blocks[block_of[name]]
            if entry.gradient is not None and factor is not None:
                self._factors[name] = factor
                self._before[name] = _wide(entry.value)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After ``optimizer.step()`` and before the schedule's."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for name, factor in self._factors.items():
            parameter = self._entries[name].parameter
            group, state = groups[id(parameter)], optimizer.state[parameter]
            _add(self._decay, name, -float(group["lr"]) * float(group["weight_decay"]) * self._before[name])
            scale = _scale(group, state)
            for source in self._pending.keys() | self._moments.keys():
                moments = self._moments.setdefault(source, {})
                gradient = self._pending.get(source, {}).get(name)
                self._moved(source, name, _moment(moments, name, gradient, factor, group["betas"][0]), scale)
        self._pending = {}

    def sheet(self, blocks: Mapping[str, Sequence[str]]) -> BalanceSheet:
        """The account so far, by parameter block."""
        change = {name: _wide(entry.value) - self._first[name] for name, entry in self._entries.items()}
        rest = {name: held.clone() for name, held in change.items()}
        for parts in (*self._parts.values(), self._decay):
            for name, part in parts.items():
                rest[name] -= part
        split = {block: [name for name in names if name in change] for block, names in blocks.items()}
        split = {block: names for block, names in split.items() if names}
        return BalanceSheet(
            changes={block: _norm(change, names) for block, names in split.items()},
            sources={
                source: {block: _entry(parts, change, names) for block, names in split.items()}
                for source, parts in sorted(self._parts.items())
            },
            decay={block: _entry(self._decay, change, names) for block, names in split.items()},
            rest={block: _entry(rest, change, names) for block, names in split.items()},
            unsplit=self._unsplit,
        )

    def _moved(self, source: bytes, name: str, moment: Tensor | None, scale: Tensor) -> None:
        if moment is not None:
            _add(self._parts.setdefault(source, {}), name, -moment * scale)


def _scale(group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """What the first moment is multiplied by in a step just taken."""
    first, second = group["betas"]
    step = float(state["step"])
    denominator = _wide(state["exp_avg_sq"]).sqrt() / math.sqrt(1 - second**step) + group["eps"]
    scale: Tensor = float(group["lr"]) / (1 - first**step) / denominator
    return scale


def _moment(moments: Parts, name: str, gradient: Tensor | None, factor: float, beta: float) -> Tensor | None:
    """A source's first moment of a parameter, moved on by a step; None while it never had a gradient."""
    if name in moments:
        moments[name].mul_(beta)
    if gradient is not None:
        _add(moments, name, (1 - beta) * factor * gradient)
    return moments.get(name)


def _entry(parts: Parts, change: Parts, names: Sequence[str]) -> Entry:
    along = sum(float((parts[name] * change[name]).sum()) for name in names if name in parts)
    square = _norm(change, names) ** 2
    return Entry(_norm(parts, names), along / square if square > 0 else 0.0)


def _norm(parts: Parts, names: Sequence[str]) -> float:
    return math.sqrt(sum(float((parts[name] * parts[name]).sum()) for name in names if name in parts))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _add(sums: Parts, name: str, part: Tensor) -> None:
    if name in sums:
        sums[name] += part.cpu()
    else:
        sums[name] = part.to("cpu", copy=True)
