"""What the optimizer keeps of sources that were revoked since: dropped, or accounted for, by the policy.

Gradients of a source live on in the optimizer's moments after the source is gone. Which step settles that, and for
which sources, is the log's rule (``consensus/momentum_rules.py``), followed here from the steps that stand. *Flush*
drops the optimizer's state of every parameter (at granularity ``head``: every piece) of the parameter blocks in which
the source ever had weight, whosever gradients are in it: the optimizer begins it anew, as before its first step.
*Carry* changes nothing, and says how much may be left.

**The residual** is a bound. A step multiplies a first moment by β₁ (``betas`` of Adam's kin, Kingma and Ba,
arXiv:1412.6980; SGD's ``momentum``), so after k steps of a parameter β₁ᵏ is left of what a gradient weighed in it when
it came. k counts from the source's last admitted step: exact for its newest gradient, more than is left of older ones.
A parameter block counts a step only if all of its parameters take it; of several blocks the most is named; an optimizer
with neither setting is taken to forget nothing. Of second moments, which fade more slowly, it says nothing.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from consensus import portions as p
from consensus.momentum_rules import is_due
from consensus.policy import MOMENTUM_CARRY, MOMENTUM_FLUSH
from consensus.rejection import Reason
from trainer_client.grants import OpenGrant
from trainer_client.pieces import Entries, Entry
from trainer_client.record import Example
from trainer_client.resumption import RecordedStep

LEAST_DECAY = 1e-300
"""In place of a β₁ of nothing at all, of which there is no logarithm."""


class Momentum:
    """What a run's optimizer may keep of whom; stateful, for snapshots.

    Args:
        optimizer: whose state it is about.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._entries: tuple[tuple[Entry, ...], ...] = ()
        self._blocks: dict[bytes, frozenset[int]] = {}
        self._settled: dict[bytes, str] = {}
        self._since: dict[bytes, tuple[float, ...]] = {}
        """Of each source, ``_decay`` after its last admitted step."""
        self._decay: tuple[float, ...] = ()
        """Of each parameter block, the logarithm of what is left of a gradient that came before the first step."""

    def attach(self, block_of_entry: Mapping[str, int], entries: Entries) -> None:
        """Learns the parameter blocks' entries."""
        optimized = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        own: list[list[Entry]] = [[] for _ in range(max(block_of_entry.values(), default=-1) + 1)]
        for name, block in block_of_entry.items():
            if name in entries and id(entries[name].parameter) in optimized:
                own[block].append(entries[name])
        self._entries = tuple(map(tuple, own))
        self._decay = (0.0,) * len(own)

    def due(self, grant: OpenGrant) -> tuple[bytes, ...]:
        """The sources that the next step, if it admits anything under ``grant``, must settle; in order."""
        return tuple(
            source
            for source in sorted(self._blocks)
            if grant.refused.get(source) == Reason.SOURCE_REVOKED.value
            and is_due(self._settled.get(source, ""), grant.policy.momentum)
        )

    def carried(self, source: bytes) -> p.CarriedMomentum:
        """What may be left of an admitted source's gradients, as the next step begins."""
        left = max(
            (
                math.exp(self._decay[block] - self._since[source][block])
                for block in self._blocks[source]
                if any(self._optimizer.state.get(entry.parameter) for entry in self._entries[block])
            ),
            default=0.0,
        )
        return p.CarriedMomentum(source, min(math.ceil(round(left * 10**9, 3)), 10**9))

    def take_step(
        self,
        flushed: Collection[bytes],
        carried: Collection[bytes],
        weights_permille: Mapping[bytes, tuple[int, ...]],
        *,
        skipped: bool = False,
    ) -> None:
        """Between clipping and ``optimizer.step()``: settle what is due, and count the step.

        ``weights_permille`` are the depth profiles of the sources that the step admits, of several the most. In a
        ``skipped`` one nothing fades.
        """
        for source in flushed:
            drop_state(self._optimizer, (entry for block in self._blocks[source] for entry in self._entries[block]))
        self._settled |= dict.fromkeys(flushed, MOMENTUM_FLUSH) | dict.fromkeys(carried, MOMENTUM_CARRY)
        rates = {id(parameter): _kept(group) for group in self._optimizer.param_groups for parameter in group["params"]}
        if not skipped:
            self._decay = tuple(
                decay + (_decay_of(own, rates) if own else 0.0)
                for decay, own in zip(self._decay, self._entries, strict=True)
            )
        for source, profile in weights_permille.items():
            self._settled.pop(source, None)
            self._blocks[source] = self._blocks.get(source, frozenset()) | blocks_with_weight(profile)
            self._since[source] = self._decay

    def state_dict(self) -> dict[str, Any]:
        """Of a moment between steps."""
        return {
            "blocks": {source: sorted(blocks) for source, blocks in self._blocks.items()},
            "settled": dict(self._settled),
            "since": dict(self._since),
            "decay": self._decay,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of the moment that ``state_dict`` was asked for."""
        self._blocks = {source: frozenset(blocks) for source, blocks in state_dict["blocks"].items()}
        self._settled = dict(state_dict["settled"])
        self._since = {source: tuple(since) for source, since in state_dict["since"].items()}
        self._decay = tuple(state_dict["decay"])


def drop_state(optimizer: torch.optim.Optimizer, entries: Iterable[Entry]) -> None:
    """The optimizer forgets what it keeps of these: no moment, no count of steps."""
    for entry in entries:
        optimizer.state.pop(entry.parameter, None)


def blocks_with_weight(profile_permille: tuple[int, ...]) -> frozenset[int]:
    """The parameter blocks that a depth profile lets its class move."""
    return frozenset(block for block, weight in enumerate(profile_permille) if weight)


def blocks_moved(
    steps: Iterable[RecordedStep], sources: Collection[bytes], band_of: Callable[[RecordedStep, Example], int]
) -> frozenset[int]:
    """The parameter blocks in which any example of these sources had weight, by the steps that admitted it."""
    return frozenset(
        block
        for step in steps
        for source, band in {(example[0], band_of(step, example)) for example in step.admitted if example[0] in sources}
        for block in blocks_with_weight(step.weights_permille(source, band))
    )


def _kept(group: Mapping[str, Any]) -> float:
    """What a step leaves of the first moment."""
    if "betas" in group:
        return float(group["betas"][0])
    return float(group.get("momentum", 1.0))


def _decay_of(own: Iterable[Entry], rates: Mapping[int, float]) -> float:
    kept = (1.0 if entry.gradient is None else rates[id(entry.parameter)] for entry in own)
    return math.log(max(*kept, LEAST_DECAY))
