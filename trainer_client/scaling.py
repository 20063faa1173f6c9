"""By what gradients are scaled between the backward pass and the optimizer, and whether it steps at all.

* **Clipping** per parameter block (``BLOCK``), why, says ``routing.py``; or all blocks by one factor of their common
  norm (``GLOBAL``), where the policy admits it. The factor is recorded: through it an example that is kept out of a
  block bears on the length of that block's step.
* **Loss scaling** for float16 (``torch.amp.GradScaler``): gradients are divided by the scale before they are clipped. A
  step in which one of them is not finite is *skipped*: optimizer and schedule stay where they are, nothing of it is
  summed, and it is recorded as such. Examples that are kept out of a block cannot make its gradient overflow, since
  they are masked, not multiplied; but what they do elsewhere can skip the step. Where it still overflows at the least
  scale the run ends: it would skip for ever. Of a sharded model a rank sees its part of the gradients: torch's scaler
  asks the others whether theirs overflowed. Of tensors in pieces (``pieces.py``) it is shown the whole ones.

One object serves a run and its replay, so that both scale alike.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from consensus import portions as p
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected
from trainer_client.clipping import GradientOverflow, clip_block_gradients, clip_factor
from trainer_client.sharding import whole

BLOCK, GLOBAL = "block", "global"
CLIP_SCOPE, LOSS_SCALING = "clip_scope", "loss_scaling"
"""The hyperparameters that say so, of campaigns in which it is not per block, or in which losses are scaled."""
ScalerState = Mapping[str, Any]
"""A scaler's ``state_dict``: scale, factors, interval, and the steps since the last overflow."""
LEAST_SCALE = 2.0**-10
"""Where gradients still overflow at so small a scale, it is not for the scale: an admitted example's is not finite."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """What became of a step's gradients: ``factors`` by parameter block, None for one without a gradient.

    A factor makes what an observer of the backward pass saw into what the optimizer gets: clipped, and without the
    ``loss_scale``. Of a ``skipped`` step there are none.
    """

    factors: tuple[float | None, ...]
    loss_scale: float
    global_clip_nano: int
    skipped: bool


class Scaling:
    """The scaling of one job. ``clip_norm`` is the largest L2 norm of a block's gradient, or of all of them together.

    ``optimizer`` has the model's tensors, not yet in pieces.

    Raises:
        ConfigError: ``clip_scope`` is neither of the two.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        clip_scope: str = BLOCK,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if clip_scope not in (BLOCK, GLOBAL):
            raise ConfigError(f"clip_scope is {clip_scope!a:.40}, expected {BLOCK} or {GLOBAL}")
        self._clip_norm = clip_norm
        self._optimizer = optimizer
        self._shown = _Shown(optimizer)
        self._together = clip_scope == GLOBAL
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the losses, if anything does; its state is the job's."""
        return self._scaler

    def hyperparameters(self) -> dict[str, str]:
        """What a campaign records of it, as it begins."""
        found = {CLIP_SCOPE: GLOBAL} if self._together else {}
        if self._scaler is not None:
            found[LOSS_SCALING] = scaling_text(self._scaler)
        return found

    def check_admitted(self, policy: p.Policy) -> None:
        """The policy admits that blocks are clipped together, if they are.

        Raises:
            Rejected: ``GLOBAL_CLIPPING_NOT_ADMITTED``.
        """
        if self._together and not policy.global_clipping:
            raise Rejected(
                Reason.GLOBAL_CLIPPING_NOT_ADMITTED,
                f"the plan clips all parameter blocks together, policy '{policy.name}' has each clipped on its own",
            )

    def check_supported(self, model: nn.Module) -> None:
        """Losses are not scaled where that would not be exact.

        Raises:
            ConfigError: naming what does not go with it.
        """
        if self._scaler is None:
            return
        own = {id(parameter) for parameter in self._shown.parameters}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                raise ConfigError(
                    f"a gradient scaler with parameter {name!a}, which requires a gradient and is not the optimizer's:"
                    " freeze it (requires_grad_(False))"
                )
            if parameter.requires_grad and parameter.dtype == torch.float16:
                raise ConfigError(f"a gradient scaler with parameter {name!a} in float16: keep parameters in float32")

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch's loss."""
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def finish(self, model: nn.Module, block_of: Mapping[str, int]) -> Scaled:
        """After a step's last backward pass: gradients as the optimizer is to have them.

        Raises:
            GradientOverflow: one is not finite, and no losses are scaled, or the scale is the least already; or only
                its norm is not.
        """
        scale = 1.0
        if self._scaler is not None:
            scale = self._scaler.get_scale()
            if self._has_gradients():
                self._scaler.unscale_(self._shown.optimizer)
        try:
            norms = clip_block_gradients(model, block_of, self._clip_norm, together=self._together)
        except GradientOverflow:
            if self._scaler is None or scale <= LEAST_SCALE or self._all_finite():
                raise
            return Scaled((), scale, 0, skipped=True)
        clipped = [None if norm is None else clip_factor(norm, self._clip_norm) for norm in norms]
        factors = tuple(None if factor is None else factor / scale for factor in clipped)
        global_clip_nano = 0
        if self._together:
            of_all = next((factor for factor in clipped if factor is not None), 1.0)
            global_clip_nano = max(1, math.floor(of_all * p.NANO))
        return Scaled(factors, scale, global_clip_nano, skipped=False)

    def step(self, scaled: Scaled) -> None:
        """The optimizer's step, unless it is to be skipped.

        Raises:
            InvariantBroken: the scaler did otherwise.
        """
        if self._scaler is None or not self._has_gradients():
            self._optimizer.step()
            return
        self._scaler.step(self._shown.optimizer)
        self._scaler.update()
        if (self._scaler.get_scale() < scaled.loss_scale) != scaled.skipped:
            raise InvariantBroken(
                f"the gradient scaler {'took' if scaled.skipped else 'skipped'} a step whose gradients say otherwise"
            )

    def _gradients(self) -> Iterator[Tensor]:
        return (parameter.grad for parameter in self._shown.parameters if parameter.grad is not None)

    def _has_gradients(self) -> bool:
        """Whether the step moves anything: a scaler refuses to step where nothing has a gradient."""
        return next(self._gradients(), None) is not None

    def _all_finite(self) -> bool:
        return all(bool(whole(torch.isfinite(gradient).all())) for gradient in self._gradients())


class _Shown:
    """An optimizer as a scaler is to see it: with whole tensors, while it has pieces of them (``pieces.py``).

    Also one that could skip by itself (``fused``) is then not called in a skipped step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.parameters: tuple[Tensor, ...] = tuple(
            parameter for group in optimizer.param_groups for parameter in group["params"]
        )
        self.param_groups = [{"params": self.parameters}]
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What a scaler takes for one: it asks for ``param_groups`` and ``step`` alone."""
        return cast(torch.optim.Optimizer, self)

    def step(self) -> None:
        self._optimizer.step()


def prepared(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
    """The optimizer and the scaler that are in what Accelerate's ``prepare`` made of them; others as they are.

    Raises:
        ConfigError: ``scaler`` is another one than Accelerate's.
    """
    accelerated = sys.modules.get("accelerate.optimizer")  # whoever prepared an optimizer has imported it
    if accelerated is None or not isinstance(optimizer, accelerated.AcceleratedOptimizer):
        return optimizer, scaler
    own = optimizer.scaler
    if scaler is not None and own is not None and scaler is not own:
        raise ConfigError("scaler is another gradient scaler than the one that Accelerate prepared the optimizer with")
    return optimizer.optimizer, scaler if own is None else own


def scale_after(scale: ScalerState, *, skipped: bool) -> ScalerState:
    """The state of a scaler after a step that it skipped or took, from that before: as its ``update`` has it, exactly.

    So where a scaler stood follows from where it began and which steps the log says were skipped.
    """
    if skipped:
        return {**scale, "scale": _float32(scale["scale"] * scale["backoff_factor"]), "_growth_tracker": 0}
    taken = scale["_growth_tracker"] + 1
    if taken < scale["growth_interval"]:
        return {**scale, "_growth_tracker": taken}
    grown = _float32(scale["scale"] * scale["growth_factor"])
    return {**scale, "scale": grown if math.isfinite(grown) else scale["scale"], "_growth_tracker": 0}


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def scaling_text(scaler: torch.amp.GradScaler) -> str:
    """How a scaler scales from where it stands, in words that a replay's can be compared with."""
    return (
        f"from {scaler.get_scale():g}, by {scaler.get_backoff_factor():g} after an overflow, by"
        f" {scaler.get_growth_factor():g} after {scaler.get_growth_interval()} steps without"
    )


def scaling_of(terms: p.Campaign, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> Scaling:
    """The scaling that a campaign recorded, for a replay with that optimizer and scaler.

    Raises:
        Rejected: ``BAD_FIELD``: the campaign recorded no ``clip_norm``, an unknown ``clip_scope``, or scaled losses
            otherwise than this scaler.
    """
    settings = {setting.name: setting.value for setting in terms.hyperparameters}
    if "clip_norm" not in settings:
        raise Rejected(Reason.BAD_FIELD, "the campaign recorded no clip_norm")
    clip_scope = settings.get(CLIP_SCOPE, BLOCK)
    if clip_scope not in (BLOCK, GLOBAL):
        raise Rejected(Reason.BAD_FIELD, f"the campaign recorded {CLIP_SCOPE} {clip_scope!a:.40}")
    scaling = Scaling(optimizer, float(settings["clip_norm"]), clip_scope, scaler)
    recorded, found = settings.get(LOSS_SCALING), scaling.hyperparameters().get(LOSS_SCALING)
    if recorded != found:
        raise Rejected(
            Reason.BAD_FIELD,
            f"the campaign scaled its losses {recorded or 'not at all'}; the job's scaler {found or 'does not'}",
        )
    return scaling
