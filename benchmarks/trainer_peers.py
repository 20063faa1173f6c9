"""What others do beside a training step, for `bench_trainer.py --peers`: MLflow's metrics and model-signing's hash.

Neither does what is measured beside it. MLflow notes numbers in a database that its owner may edit; model-signing says
which files a model is made of, once, when it is done. They are here as costs that people accept today:

* **MLflow** logs loss and learning rate of every step to SQLite, which is what its autologging calls where a Trainer
  reports every step; a plain loop has no autologging of its own.
* **model-signing** hashes the parameters of every step (SHA-256 over a safetensors file). To have a step's file, it is
  written first: a *recorded* step of ours commits to the same tensors without a file.

Installed for this benchmark only (extra `peers`).
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from trainer_client.commitment import copied_tensors


@contextmanager
def peer_steps(
    plain: Callable[[], None], model: nn.Module, directory: Path
) -> Iterator[Mapping[str, Callable[[], None]]]:
    """A plain step followed by what a peer does after it, by name."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = importlib.import_module("mlflow")
    hashing = importlib.import_module("model_signing.hashing")
    folder = directory / "weights"
    folder.mkdir()
    mlflow.set_tracking_uri(f"sqlite:///{directory / 'mlflow.db'}")
    step = 0

    def logged() -> None:
        nonlocal step
        step += 1
        plain()
        mlflow.log_metrics({"loss": 1.0, "learning_rate": 1e-4}, step=step)

    def hashed() -> None:
        plain()
        save_file(copied_tensors(model), folder / "model.safetensors")
        hashing.Config().hash(folder)

    with mlflow.start_run():
        yield {
            f"plain, logged by MLflow {mlflow.__version__}": logged,
            "plain, written and hashed by model-signing": hashed,
        }
