"""One process of a governed ``transformers.Trainer`` under DDP: ``python -m hf_rank_fixtures SPECIFICATION``.

Torch's and accelerate's own environment variables say which one it is, as ``torchrun`` sets them.
"""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import destroy_process_group, is_initialized
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from trainer_client.hf import FixedLengthCollator, GovernanceCallback, GovernedTrainer

LENGTH = 12


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    """Two layers of random weights, the same at each call."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": LENGTH}
    dropouts = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def train(campaign: dict[str, Any], arguments: dict[str, Any], release: Path) -> GPT2LMHeadModel:
    """The model after a governed ``train``; dropout would draw otherwise in several processes, so there is none."""
    model = gpt2(dropout=0.0)
    callback = GovernanceCallback(**campaign, release=release)
    trainer = GovernedTrainer(
        model, TrainingArguments(**arguments), data_collator=FixedLengthCollator(LENGTH), callbacks=[callback]
    )
    trainer.train()
    assert all("forward" not in module.__dict__ for module in model.modules())
    return model


def _main() -> None:
    path = Path(sys.argv[1])
    model = train(*pickle.loads(path.read_bytes()))
    if os.environ["RANK"] == "1":
        torch.save(model.state_dict(), path.with_name("weights-of-rank-1"))
    if is_initialized():
        destroy_process_group()


if __name__ == "__main__":
    _main()
