"""One process of a governed ``transformers.Trainer`` of several: ``python -m hf_rank_fixtures SPECIFICATION``.

Torch's and accelerate's own environment variables say which one it is, as ``torchrun`` sets them.
"""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed import destroy_process_group, is_initialized
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from trainer_client.hf import FixedLengthCollator, GovernanceCallback, GovernedTrainer, causal_losses
from trainer_client.ranks import Ranks
from trainer_client.replay import Replayed, ReplayJob, read_logged_campaign, replay
from trainer_client.sharding import whole
from trainer_client.submit import Client

LENGTH = 12


def scaler() -> torch.amp.GradScaler:
    """Overflows in float16 until it is halved some times, and again when it has grown."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)


class AcceleratedTrainer(GovernedTrainer):
    """Accelerate scales losses and shards models on accelerators alone; what it does there goes in main memory too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fp16:
            self.accelerator.native_amp = True
            self.accelerator.scaler = scaler()
        if self.args.fsdp:
            state = self.accelerator.state
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.args.fp16:
                state.fsdp_plugin.set_mixed_precision("fp16")
            self.is_fsdp_enabled = True


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    """Two layers of random weights, the same at each call."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": LENGTH}
    dropouts = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def lora(dropout: float = 0.1) -> nn.Module:
    model = get_peft_model(gpt2(dropout), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


BUILDS: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "lora": lora}


def train(campaign: dict[str, Any], arguments: dict[str, Any], release: Path, build: str = "gpt2") -> nn.Module:
    """The model after a governed ``train``; dropout would draw otherwise in several processes, so there is none."""
    model = BUILDS[build](dropout=0.0)
    callback = GovernanceCallback(**campaign, release=release)
    trainer = AcceleratedTrainer(
        model, TrainingArguments(**arguments), data_collator=FixedLengthCollator(LENGTH), callbacks=[callback]
    )
    trainer.train()
    assert all("forward" not in module.__dict__ for module in model.modules())
    return model


def replayed(campaign: dict[str, Any], arguments: dict[str, Any], build: str) -> Replayed:
    """The campaign again, by as many processes and without the Trainer."""
    plan = campaign["plan"]
    model = BUILDS[build](dropout=0.0)
    plain = {name: value for name, value in arguments.items() if not name.startswith(("fsdp", "fp16", "torch_compile"))}
    made = Trainer(model, TrainingArguments(**plain)).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[id(each)] for each in group["params"]]} for group in made.param_groups]
    wrapped: nn.Module = model
    if arguments.get("fsdp"):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: PLC0415 - slow to import

        half = torch.float16 if arguments.get("fp16") else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)
        inner = model if isinstance(model, GPT2LMHeadModel) else model.get_base_model()
        for layer in inner.transformer.h:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    else:
        wrapped = DistributedDataParallel(model)
    if arguments.get("torch_compile"):
        wrapped = torch.compile(wrapped, backend=arguments["torch_compile_backend"])
    for group in groups:
        group["params"] = [model.get_parameter(name) for name in group["params"]]
    optimizer = type(made)(groups)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=plan.planned_steps)

    def loss(called: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = called(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
        return causal_losses(outputs, inputs["labels"])

    with Client(campaign["node"]) as client:
        logged = read_logged_campaign(client, plan.campaign)
    job = ReplayJob(
        wrapped,
        optimizer,
        campaign["sources"],
        loss,
        FixedLengthCollator(LENGTH),
        scheduler,
        arguments["per_device_train_batch_size"],
        scaler() if arguments.get("fp16") else None,
    )
    return replay(logged, job, ranks=Ranks.of_job())


def _main() -> None:
    path = Path(sys.argv[1])
    campaign, arguments, release, build = pickle.loads(path.read_bytes())
    model = train(campaign, arguments, release, build)
    weights = {name: whole(tensor).detach() for name, tensor in model.state_dict().items()}
    found = replayed(campaign, arguments, build)
    if os.environ["RANK"] == "1":
        path.with_name("of-rank-1").write_bytes(pickle.dumps((weights, found)))
    if is_initialized():
        destroy_process_group()


if __name__ == "__main__":
    _main()
