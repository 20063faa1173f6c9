"""What bergson makes of the same question: EK-FAC over the corpus, and an index of projected gradients.

bergson is made for models of transformers. Its collectors take whatever has linears, gives logits and says where it is,
which ``_AsTransformers`` lends the byte model; gradients, factors and preconditioning are bergson's own.

The index is what it can keep in place of the corpus: of each example's gradient a random projection of the same few
numbers for each linear, to be multiplied with the output's.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from math import isqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
from bergson.config.config import HessianConfig, InversionConfig
from bergson.hessians.hessian_approximations import fit_factored_hessians
from bergson.hessians.preconditioner import FactoredPreconditioner
from datasets import Dataset
from setting import PROMPT_BYTES, LowRankAdapted
from torch import Tensor, nn

from attribution.query import Output
from attribution.weights import linear_weights

IGNORED_LABEL = -100
BATCH = 32
INDEX_NUMBERS = 2_304
"""Kept of an example at most: 16 × 16 of each of nine linears."""
NUMBER_BYTES = 4

Gradients = dict[str, Tensor]
"""``[N, P * Q]`` by linear."""


class _AsTransformers(nn.Module):
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, tokens_BT: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(tokens_BT))


class Bergson:
    """The tuned model and its examples; files go below ``folder``."""

    def __init__(self, tuned: nn.Module, examples_NT: Tensor, folder: Path) -> None:
        self._model = _AsTransformers(tuned)
        self._targets = {f"model.{name.removesuffix('.weight')}" for name in linear_weights(tuned)}
        self._is_adapted = any(isinstance(module, LowRankAdapted) for module in tuned.modules())
        self._folder = folder
        self._examples = Dataset.from_dict({"input_ids": examples_NT.tolist()})
        self._dimension = isqrt(INDEX_NUMBERS // len(self._targets))

    @property
    def index_bytes(self) -> int:
        """Of the projected gradients."""
        return len(self._examples) * len(self._targets) * self._dimension**2 * NUMBER_BYTES

    def scores(self, queries: Sequence[Output]) -> np.ndarray:
        """By EK-FAC of the tuned model, damped as bergson does by default."""
        settings = self._settings("factors")
        torch.manual_seed(0)
        with _quietly():
            fit_factored_hessians(
                self._model,
                self._examples,
                settings,
                HessianConfig("kfac", ev_correction=True),
                target_modules=self._targets,
                attention_cfgs={},
                batches=_batches(self._examples),
                path=str(settings.partial_run_path),
                do_eigendecomposition=True,
            )
        factors = FactoredPreconditioner.from_path(
            settings.partial_run_path, inversion_cfg=InversionConfig(), ev_correction=True
        )
        asked = factors.apply(self._gradients(_asked(queries), "log_odds"))
        return _products(asked, self._gradients(self._examples, "ce"))

    def projected_scores(self, queries: Sequence[Output]) -> np.ndarray:
        """By inner products of projected gradients."""
        processor = GradientProcessor(projection_dim=self._dimension, reshape_to_square=self._is_adapted)
        asked = self._gradients(_asked(queries), "log_odds", processor)
        return _products(asked, self._gradients(self._examples, "ce", processor))

    def _settings(self, name: str, loss: str = "ce") -> IndexConfig:
        settings = IndexConfig(str(self._folder / name), loss_fn=loss, loss_reduction="sum")
        settings.partial_run_path.mkdir(exist_ok=True)
        return settings

    def _gradients(self, rows: Dataset, loss: str, processor: GradientProcessor | None = None) -> Gradients:
        settings = self._settings("gradients", loss)
        with _quietly():
            collector = InMemoryCollector(
                model=self._model,
                data=rows,
                cfg=settings,
                processor=processor or GradientProcessor(),
                target_modules=self._targets,
            )
            computer = CollectorComputer(self._model, rows, collector=collector, batches=_batches(rows), cfg=settings)
            computer.run_with_collector_hooks()
        return collector.gradients


def _asked(queries: Sequence[Output]) -> Dataset:
    tokens = [list(query.tokens) for query in queries]
    labels = [[IGNORED_LABEL] * PROMPT_BYTES + each[PROMPT_BYTES:] for each in tokens]
    return Dataset.from_dict({"input_ids": tokens, "labels": labels})


def _batches(rows: Dataset) -> list[list[int]]:
    return [list(range(start, min(start + BATCH, len(rows)))) for start in range(0, len(rows), BATCH)]


def _products(asked: Gradients, examples: Gradients) -> np.ndarray:
    """``[Q, N]``; both are gradients of what is to fall, so alike ones raise the output."""
    return sum((asked[name].double() @ examples[name].double().T) for name in examples).numpy()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without its progress bars and reports."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
