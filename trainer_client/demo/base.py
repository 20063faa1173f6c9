"""The base model: trained once on text that no source holds, then read from a cache.

The cache file's name is a digest of everything its weights depend on: sizes, settings, text, the source code of
model and training, torch version and thread count. Same key, same weights; a damaged file is an error,
not a reason to train again.
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from consensus.rejection import ConfigError
from trainer_client.commitment import committed_tensors
from trainer_client.demo.corpus import RECORD_BYTES, base_text
from trainer_client.demo.model import (
    INITIAL_DEVIATION,
    ByteModel,
    CausalSelfAttention,
    ModelConfig,
    TransformerBlock,
    per_example_loss,
)

Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all and loss in nats per byte."""


@dataclass(frozen=True, slots=True)
class BaseTraining:
    """How the base model is trained: linear warm-up, then linear decay to a twentieth."""

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 3e-3
    warm_up_steps: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 1


def base_model(
    cache_directory: Path,
    config: ModelConfig | None = None,
    training: BaseTraining | None = None,
    progress: Progress | None = None,
) -> ByteModel:
    """The base model from ``cache_directory``, trained and stored there first if it is missing.

    Raises:
        ConfigError: the cached file cannot be read as this model.
    """
    config, training = config or ModelConfig(), training or BaseTraining()
    path = cache_directory / f"base-{cache_key(config, training)}.safetensors"
    if path.exists():
        return _load(path, config)
    model = train_base(config, training, progress)
    cache_directory.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    save_file(committed_tensors(model), unfinished)
    unfinished.replace(path)
    return model


def default_cache_directory() -> Path:
    """``countersign`` below ``$XDG_CACHE_HOME``, or below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "countersign"


def cache_key(config: ModelConfig, training: BaseTraining) -> str:
    """Hexadecimal digest of everything the base weights depend on."""
    parts = (
        repr(astuple(config)),
        repr(astuple(training)),
        hashlib.sha256(base_text()).hexdigest(),
        str(INITIAL_DEVIATION),
        *(inspect.getsource(each) for each in (ByteModel, TransformerBlock, CausalSelfAttention, train_base)),
        torch.__version__,
        str(torch.get_num_threads()),
    )
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:32]


def train_base(config: ModelConfig, training: BaseTraining, progress: Progress | None = None) -> ByteModel:
    """Trains on random windows of the base text; leaves torch's global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = ByteModel(config)
        text_N = torch.frombuffer(bytearray(base_text()), dtype=torch.uint8).long()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=training.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=training.weight_decay,
        )
        for step in range(training.steps):
            warm_up = min(1.0, (step + 1) / training.warm_up_steps)
            rate = training.learning_rate * warm_up * max(0.05, 1 - step / training.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts_B = torch.randint(0, len(text_N) - RECORD_BYTES, (training.batch_size,)).tolist()
            windows_BT = torch.stack([text_N[start : start + RECORD_BYTES] for start in starts_B])
            loss = per_example_loss(model, windows_BT).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()
            if progress is not None:
                progress(step + 1, training.steps, loss.item())
    return model


def _load(path: Path, config: ModelConfig) -> ByteModel:
    with torch.random.fork_rng(devices=[]):
        model = ByteModel(config)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"{path}: expected the cached base model, found: {error}; delete the file") from error
    return model
