"""``transformers.Trainer`` under a campaign: a callback that says which, and a Trainer that asks it.

::

    governance = GovernanceCallback(plan=plan, sources=sources, node=url, job_key=key, run_directory=path)
    collator = FixedLengthCollator(128)
    trainer = GovernedTrainer(model=model, args=arguments, data_collator=collator, callbacks=[governance])
    trainer.train()

The callback alone cannot do it (``docs/adr/016-a-trainer-of-our-own.md``): no callback sees an exception, and the
Trainer's loader collates batches before the step before them is taken, so before their grant is known. What the
Trainer keeps: optimizer, learning rate schedule, accumulation, checkpointing, autocast, logging, evaluation, saving.
What is replaced:

* **Which examples.** ``train_dataset`` is the sources of the campaign, in the order of its sampler. Refused examples
  are not collated. One global step is one event whatever ``gradient_accumulation_steps`` is and however many
  processes train (DDP or FSDP2, as ``torchrun`` starts them); where refusals leave fewer micro-batches, the first
  ones are empty and run nothing. A step without any admitted example is recorded, and is no step of the Trainer's
  optimizer or schedule.
* **The loss.** One per example: the mean over its own labels, or what ``compute_loss_func(outputs, labels)`` gives.
* **Clipping** per parameter block, by the plan's ``clip_norm``.
* **The optimizer's step under fp16.** The scaler is accelerate's; the run knows which steps to skip.
* **global_step** is the campaign's, also after a rollback.

Before anything is on the log, a real batch is probed (``probe.py``). Options under which the record would not be
true are refused by name when the Trainer is made (``hf_options.py``). Forwards are put back when ``train``
ends, whatever happens.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from consensus.keys import Signer
from trainer_client.governed import DEFAULT_SETTINGS, GovernedRun, governed
from trainer_client.hf_options import TrainerUnsupported, not_given, unsupported_options
from trainer_client.memorization_watch import MemorizationCheck
from trainer_client.packing import Packed, Packing, losses_by_example, pack, taken_apart
from trainer_client.plan import CampaignPlan, RunSettings, TrainingSource
from trainer_client.progress import OnProgress
from trainer_client.record import Example
from trainer_client.sharding import whole
from trainer_client.step_book import Step
from trainer_client.submit import Client

IGNORED_LABEL = -100
PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "shift_labels")
RECORDED = (
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "activation_checkpointing",
    "bf16",
    "fp16",
    "torch_compile",
    "seed",
)

LossOfOutputs = Callable[..., Tensor]
"""Model outputs and labels to one loss per example, each normalised by itself or by constants."""


def causal_losses(outputs: Any, labels_BT: Tensor) -> Tensor:
    """Each example's mean loss over its own next-token labels, ``[B]``; an example without labels has loss 0."""
    target_BT = labels_BT[:, 1:]
    logits_BVT = _widened(outputs.logits)[:, :-1].transpose(1, 2)
    loss_BT = functional.cross_entropy(logits_BVT, target_BT, reduction="none", ignore_index=IGNORED_LABEL)
    count_B = (target_BT != IGNORED_LABEL).sum(dim=1).clamp(min=1)
    return loss_BT.sum(dim=1) / count_B


def packed_causal_losses(outputs: Any, labels_RT: Tensor, packing: Packing) -> Tensor:
    """As ``causal_losses``, of examples packed into rows."""
    target_RT = labels_RT[:, 1:]
    logits_RVT = _widened(outputs.logits)[:, :-1].transpose(1, 2)
    loss_RT = functional.cross_entropy(logits_RVT, target_RT, reduction="none", ignore_index=IGNORED_LABEL)
    return losses_by_example(functional.pad(loss_RT, (1, 0)), packing, labels_RT != IGNORED_LABEL)


def _widened(logits: Tensor) -> Tensor:
    """In float32 where a sharded model gives out half precision, as accelerate has others give it out."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@dataclasses.dataclass(frozen=True, slots=True)
class FixedLengthCollator:
    """Examples, as token ids or as ``{"input_ids": …}``, cut or padded to ``length``.

    A fixed length, because padding to the longest of a batch lets one example shape what is computed of the others.
    """

    length: int
    padding: int = 0

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each ``[B, length]``."""
        ids = [list(each["input_ids"] if isinstance(each, Mapping) else each)[: self.length] for each in examples]
        padded_BT = torch.tensor([each + [self.padding] * (self.length - len(each)) for each in ids])
        mask_BT = torch.tensor([[1] * len(each) + [0] * (self.length - len(each)) for each in ids])
        return {
            "input_ids": padded_BT,
            "attention_mask": mask_BT,
            "labels": padded_BT.masked_fill(mask_BT == 0, IGNORED_LABEL),
        }


@dataclasses.dataclass(frozen=True, slots=True)
class PackingCollator:
    """Examples, as token ids or as ``{"input_ids": …}``, several to a row of ``length``; longer ones are cut.

    Attention is kept inside each example by a mask, which models take with attention ``eager`` or ``sdpa``.
    """

    length: int
    padding: int = 0

    def __call__(self, examples: Sequence[Any]) -> Packed:
        """``input_ids``, ``position_ids``, ``labels`` ``[R, length]``; ``attention_mask`` ``[R, 1, length, length]``.

        An example's first token is predicted from nothing, so it has no label.
        """
        sequences = [each["input_ids"] if isinstance(each, Mapping) else each for each in examples]
        rows = pack(sequences, self.length, self.padding)
        predicted_RT = rows.packing.followed_RT().roll(1, dims=1)
        hidden = torch.zeros(rows.attention_R1TT.shape).masked_fill(~rows.attention_R1TT, torch.finfo(torch.float).min)
        inputs = {
            "input_ids": rows.tokens_RT,
            "position_ids": rows.positions_RT,
            "attention_mask": hidden,
            "labels": rows.tokens_RT.masked_fill(~predicted_RT, IGNORED_LABEL),
        }
        return Packed(inputs, rows.packing)


class GovernanceCallback(TrainerCallback):
    """The campaign of a ``GovernedTrainer``; arguments are those of ``governed``.

    Args:
        release: where the weights go that are released when training ends; None releases nothing.
    """

    def __init__(
        self,
        *,
        plan: CampaignPlan,
        sources: Sequence[TrainingSource[Any]],
        node: str | Client,
        job_key: Signer,
        run_directory: Path,
        release: Path | None = None,
        memorization: MemorizationCheck[Any] | None = None,
        settings: RunSettings = DEFAULT_SETTINGS,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.plan = plan
        self.run: GovernedRun[Any] | None = None
        self._sources = sources
        self._node = node
        self._job_key = job_key
        self._run_directory = run_directory
        self._release = release
        self._memorization = memorization
        self._settings = settings
        self._on_progress = on_progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        """Begin where the run stands: behind step 0 where it was taken up again.

        Raises:
            TrainerUnsupported: no ``GovernedTrainer`` opened the run: nothing would be governed.
        """
        if self.run is None:
            raise TrainerUnsupported("GovernanceCallback works in a GovernedTrainer; this one would not be governed")
        state.global_step = self.run.done

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> TrainerControl:
        """Record the step; the Trainer goes on while steps are missing, also after the log refused some."""
        assert self.run is not None
        self.run.optimizer_stepped()
        was_last = state.global_step >= state.max_steps
        if was_last or self.run.done >= self.plan.planned_steps:
            control.should_training_stop = self.run.complete()
        state.global_step = self.run.done
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of_trainer: Any
    ) -> None:
        """Release, where a release was asked for; the last steps, without an admitted example, were none here."""
        if self.run is not None:
            state.global_step = self.run.done
        if self._release is not None and self.run is not None:
            self.run.release(self._release)

    def open(self, trainer: "GovernedTrainer", model: nn.Module, stack: ExitStack) -> None:
        """Opens the run around ``model``, as the trainer calls it, and the trainer's optimizer and schedule.

        Raises:
            As ``GovernedRun.__enter__``.
        """
        optimizer = trainer.optimizer
        recorded = {f"trainer.{name}": str(getattr(trainer.args, name)) for name in RECORDED}
        plan = dataclasses.replace(self.plan, hyperparameters={**recorded, **self.plan.hyperparameters})
        model.train()  # as in the steps to come: the probe tries this
        self.run = stack.enter_context(
            governed(
                model,
                cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer)),
                plan=plan,
                sources=self._sources,
                node=self._node,
                job_key=self._job_key,
                run_directory=self._run_directory,
                collate=trainer.governed_inputs,
                probe_loss=trainer.losses_of_inputs,
                memorization=self._memorization,
                scheduler=trainer.lr_scheduler,
                scaler=trainer.accelerator.scaler,
                micro_batch_size=trainer.args.per_device_train_batch_size,
                settings=self._settings,
                on_progress=self._on_progress,
            )
        )
        stack.callback(self._forget_run)

    def _forget_run(self) -> None:
        self.run = None


class GovernedTrainer(Trainer):
    """``Trainer`` with a ``GovernanceCallback`` among its callbacks; no ``train_dataset``: the sources are it.

    Raises:
        TrainerUnsupported: with every option that cannot be governed, at once.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        data_collator: Callable[[Sequence[Any]], dict[str, Tensor] | Packed],
        callbacks: list[TrainerCallback],
        compute_loss_func: LossOfOutputs | None = None,
        **options: Any,
    ) -> None:
        found = [callback for callback in callbacks if isinstance(callback, GovernanceCallback)]
        if len(found) != 1:
            raise TrainerUnsupported(f"expected one GovernanceCallback among the callbacks, found {len(found)}")
        (self.governance,) = found
        problems = unsupported_options(args, self.governance.plan, options)
        if problems:
            raise TrainerUnsupported("; ".join(problems))
        self._losses_of_outputs = compute_loss_func or causal_losses
        self._open = ExitStack()
        collator = cast(Callable[[Sequence[Any]], dict[str, Tensor]], data_collator)
        super().__init__(model, args, data_collator=collator, callbacks=callbacks, **options)
        problems = not_given(args, self.accelerator)
        if problems:
            raise TrainerUnsupported("; ".join(problems))

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **named: Any) -> Any:
        """As the Trainer's; the campaign opens once optimizer and schedule are made, and closes whatever happens.

        A campaign whose process died is taken up again from the run's directory, asked for or not.

        Raises:
            TrainerUnsupported: asked to resume from a checkpoint of the Trainer's. As ``GovernedRun.__enter__`` and
                ``learn``.
        """
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            raise TrainerUnsupported(
                f"resume_from_checkpoint={resume_from_checkpoint}: a run is taken up from its own run_directory"
            )
        with self._open:
            return super().train(None, *others, **named)

    def get_train_dataloader(self) -> "_Presented":  # type: ignore[override]
        """The campaign's micro-batches, each made when it is asked for."""
        return _Presented(self)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's; where losses are scaled it steps through the run."""
        optimizer = super().create_optimizer(model)
        if self.accelerator.scaler is not None and not isinstance(optimizer, _ScaledOptimizer):
            optimizer = self.optimizer = _ScaledOptimizer(optimizer, self.governance)
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: object = None) -> Tensor:
        """For the log, of gradients as the optimizer gets them; the Trainer's divides by the loss scale once more."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **named)  # type: ignore[no-untyped-call]
        self.governance.open(self, prepared[0], self._open)
        return prepared

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: "_MicroBatch", num_items_in_batch: object = None
    ) -> Tensor:
        """Forward and routed backward pass of one micro-batch; its part of the step's mean loss."""
        if inputs.examples is None:
            return torch.zeros((), device=self.args.device)
        run = self.governance.run
        assert run is not None
        model.train()
        batch = run.present(inputs.step, inputs.examples)
        inputs.update(batch.inputs)
        labels_BT = batch.inputs["labels"]
        outputs, loss_B = self._forward(model, batch.inputs, batch.packing)
        predicted = None
        if self._losses_of_outputs is causal_losses and not (labels_BT == IGNORED_LABEL).any():
            predicted = outputs.logits[:, :-1], labels_BT[:, 1:]
        run.backward(loss_B, predicted)
        # Of several processes the Trainer takes the mean; a stand-in's loss is nobody's.
        part = loss_B.detach().float().sum() * self.args.world_size / len(inputs.step.admitted)
        return part if inputs.examples else torch.zeros_like(part)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a micro-batch without examples: none."""
        return super().floating_point_ops(inputs) if inputs else 0

    def governed_inputs(self, examples: Sequence[Any]) -> dict[str, Tensor] | Packed:
        """The collated examples, on the model's device.

        Raises:
            TrainerUnsupported: they are packed by another collator than ``PackingCollator``, or not one row for each
                example; packed, with a ``compute_loss_func`` of rows.
        """
        collated, packing = taken_apart(self.data_collator(list(examples)))
        inputs: dict[str, Tensor] = dict(self._prepare_inputs(collated))
        if packing is not None:
            if self._losses_of_outputs is not causal_losses:
                raise TrainerUnsupported("compute_loss_func gives a loss per row, and rows hold several examples")
            return Packed(inputs, packing)
        packed = sorted(inputs.keys() & set(PACKED))
        if packed or "labels" not in inputs or len(inputs["labels"]) != len(examples):
            raise TrainerUnsupported(
                f"the collator must give labels and one row per example, or be PackingCollator; found {sorted(inputs)}"
                f" for {len(examples)} examples"
            )
        return inputs

    def losses_of_inputs(self, model: nn.Module, inputs: dict[str, Tensor] | Packed) -> Tensor:
        """One loss per example, as in training."""
        return self._forward(model, *taken_apart(inputs))[1]

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor], packing: Packing | None) -> tuple[Any, Tensor]:
        with self.compute_loss_context_manager():
            outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
            if packing is not None:
                return outputs, packed_causal_losses(outputs, inputs["labels"], packing)
            return outputs, self._losses_of_outputs(outputs, inputs["labels"])


class _ScaledOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """The Trainer's optimizer where losses are scaled: the run takes its step or skips it."""

    _is_accelerate_prepared = True

    def __init__(self, optimizer: torch.optim.Optimizer, governance: GovernanceCallback) -> None:
        super().__init__(optimizer)
        self._governance = governance
        self._took_step = True

    def step(self, closure: object = None) -> None:
        run = self._governance.run
        assert run is not None
        self._took_step = run.step_optimizer()

    @property
    def step_was_skipped(self) -> bool:
        return not self._took_step


class _MicroBatch(dict[str, Tensor]):
    """Part of a step on its way through the Trainer; it holds tensors once ``training_step`` collated them.

    ``examples`` are None where there is nothing to do, and empty for a stand-in (``governed.Batch``).
    """

    def __init__(self, step: Step, examples: tuple[Example, ...] | None) -> None:
        super().__init__()
        self.step = step
        self.examples = examples


class _Presented:
    """The Trainer's loader: for each step as many micro-batches as it accumulates, the first ones perhaps empty.

    DDP exchanges gradients in the last one, so that has to be one that runs.
    """

    def __init__(self, trainer: GovernedTrainer) -> None:
        self._trainer = trainer
        self._micro_batches: Iterator[_MicroBatch] | None = None

    def __iter__(self) -> Iterator[_MicroBatch]:
        if self._micro_batches is None:
            self._micro_batches = self._generate()
        return self._micro_batches

    def _generate(self) -> Iterator[_MicroBatch]:
        args, run = self._trainer.args, self._trainer.governance.run
        assert run is not None
        for step in run.steps():
            for _ in range(args.gradient_accumulation_steps - len(step.batches)):
                yield _MicroBatch(step, None)
            for examples in step.batches:
                yield _MicroBatch(step, examples)
