"""PEFT's LoRA whose outer matrices are not zero, so that both of a pair have gradients."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def with_lora(model: nn.Module, targets: list[str], **changes: object) -> nn.Module:
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **changes))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return tuned
