"""Which options of ``transformers.Trainer`` a governed one can be asked for: what it refuses, each with the reason.

Refused is what a policy could not be enforced under, or what would make the record untrue. Some of it shows in the
arguments (``unsupported_options``), some only in what accelerate makes of them on this device (``not_given``).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from consensus.rejection import CountersignError
from trainer_client.plan import CampaignPlan

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor")
SCHEDULES_STEPPED_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")


class TrainerUnsupported(CountersignError):
    """Options of the Trainer under which the policy could not be enforced or the record would not be true."""


def unsupported_options(args: "TrainingArguments", plan: CampaignPlan, options: Mapping[str, Any]) -> list[str]:
    """What a governed Trainer cannot be asked for, each with the reason."""
    presented = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    refused = {
        f"max_grad_norm={args.max_grad_norm}: a global norm lets blocked examples scale everybody's update; set it to 0"
        f" (the plan clips: clip_norm={plan.clip_norm}, clip_scope={plan.clip_scope})": args.max_grad_norm != 0,
        f"max_steps={args.max_steps}: the plan has planned_steps={plan.planned_steps}": args.max_steps
        != plan.planned_steps,
        f"per_device_train_batch_size × gradient_accumulation_steps × processes = {presented}: the plan has"
        f" batch_size={plan.batch_size}": presented != plan.batch_size,
        "train_dataset: the examples are the campaign's sources": options.get("train_dataset") is not None,
        "model_init: the model must be there before the campaign opens": options.get("model_init") is not None,
        "DeepSpeed or a parallelism_config: several processes train by DDP or FSDP2 here": args.deepspeed is not None
        or args.parallelism_config is not None,
        **_unsupported_sharding(args),
        f"{args.n_gpu} devices (DataParallel): make one visible": args.n_gpu > 1,
        "use_liger_kernel: it replaces forwards": args.use_liger_kernel,
        "neftune_noise_alpha: noise by the batch's shape": args.neftune_noise_alpha is not None,
        "label_smoothing_factor: give compute_loss_func": args.label_smoothing_factor != 0,
        f"train_sampling_strategy={args.train_sampling_strategy}: the campaign fixes the order": str(
            args.train_sampling_strategy
        )
        != "random",
        "dataloader_num_workers: batches are made when their grant is known": args.dataloader_num_workers > 0,
        "auto_find_batch_size: the campaign fixes the size": args.auto_find_batch_size,
        "load_best_model_at_end: what is released is the last recorded step": args.load_best_model_at_end,
        f"optim={_word(args.optim)}: expected one of {', '.join(OPTIMIZERS)}": _word(args.optim) not in OPTIMIZERS,
        f"lr_scheduler_type={_word(args.lr_scheduler_type)}: it is stepped by evaluations": _word(
            args.lr_scheduler_type
        )
        in SCHEDULES_STEPPED_BY_EVALUATION,
    }
    return [problem for problem, found in refused.items() if found]


def _unsupported_sharding(args: "TrainingArguments") -> dict[str, bool]:
    if not args.fsdp:
        return {}
    asked = args.fsdp_plugin_args or {}
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    return {
        "fsdp_config version 1: it flattens parameters into others; use 2": asked.get("fsdp_version") != 2,
        "fsdp_config xla: several processes train by DDP or FSDP2 here": bool(config.get("xla")),
        "fsdp_config activation_checkpointing: it renames the parameters of what it wraps; use the argument of that"
        " name outside fsdp_config": bool(asked.get("activation_checkpointing")),
        "torch_compile with fsdp: accelerate shards the compiled wrapper, and what is called inside it would be left"
        " without its parameters; use either": args.torch_compile,
        "fsdp_config cpu_offload: not tried under a campaign": bool(asked.get("cpu_offload")),
    }


def not_given(args: "TrainingArguments", accelerator: "Accelerator") -> list[str]:
    """What the Trainer was asked for and accelerate does not do on this device, each with the reason."""
    device = accelerator.device.type
    refused = {
        f"fp16: accelerate scales no losses on {device!r} and would train in float32; use bf16": args.fp16
        and accelerator.scaler is None,
        f"fsdp: accelerate shards no model on {device!r}; use DDP, or fully_shard in a loop of your own": bool(
            args.fsdp
        )
        and not accelerator.is_fsdp2,
    }
    return [problem for problem, found in refused.items() if found]


def _word(option: Any) -> str:
    return str(getattr(option, "value", option))
