"""What others make of the same question, with the whole corpus at hand: kronfluence, TRAK, and a plain dot product.

Each takes the tuned model, every training example and the outputs, and gives a score ``[Q, N]`` per output and example,
positive where the example raises the output. All ask about the same figure, an output's summed log-odds, and about the
parameters that were tuned: TRAK about all of them, the others about the linears' weights.
"""

import copy
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from setting import PROMPT_BYTES
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType

from attribution.query import LEAST_CHANCE, Output, log_odds_gradients
from attribution.weights import linear_weights
from trainer_client.demo.model import per_byte_loss

Scores = np.ndarray
"""``[Q, N]``."""

TRAK_DIMENSIONS = 128
FACTORS_BATCH = 16


def _rows(queries: Sequence[Output]) -> Tensor:
    return torch.tensor([query.tokens for query in queries])


def _log_odds(logits_BTV: Tensor, tokens_BT: Tensor, first: int) -> Tensor:
    """Summed log-odds ``[B]`` of the tokens from ``first`` on."""
    log_p_BT = -functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:], reduction="none")
    log_p_BT = log_p_BT[:, first - 1 :].clamp(max=-LEAST_CHANCE)
    return (log_p_BT - torch.log1p(-log_p_BT.exp())).sum(dim=1)


class ByteTask(Task):  # type: ignore[misc]
    """Next-byte prediction, for kronfluence."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)

    def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False) -> Tensor:
        logits_BTV = model(batch[:, :-1])
        target_BT = batch[:, 1:]
        if sample:
            chances_NV = logits_BTV.detach().flatten(0, 1).softmax(dim=-1)
            target_BT = torch.multinomial(chances_NV, 1).view_as(target_BT)
        return functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")

    def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
        return _log_odds(model(batch[:, :-1]), batch, PROMPT_BYTES).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        return self._names


class Kronfluence:
    """EK-FAC of the tuned model over the corpus, fitted once, factors in ``folder``; scores by damping."""

    def __init__(self, tuned: nn.Module, examples_NT: Tensor, folder: Path) -> None:
        self._examples_NT = examples_NT
        task = ByteTask([name.removesuffix(".weight") for name in linear_weights(tuned)])
        model = prepare_model(copy.deepcopy(tuned), task)
        self._analyzer = Analyzer(
            "lds", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder), log_level=logging.ERROR
        )
        torch.manual_seed(0)
        arguments = FactorArguments(strategy="ekfac")
        self._analyzer.fit_all_factors(
            "factors", list(examples_NT), per_device_batch_size=FACTORS_BATCH, factor_args=arguments
        )

    def scores(self, queries: Sequence[Output], damping: float | None) -> Scores:
        """``damping`` None: a tenth of the mean eigenvalue of each weight."""
        name = f"scores-{damping}"
        self._analyzer.compute_pairwise_scores(
            name,
            "factors",
            query_dataset=list(_rows(queries)),
            train_dataset=list(self._examples_NT),
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=len(self._examples_NT),
            score_args=ScoreArguments(damping_factor=damping),
        )
        found: Tensor = self._analyzer.load_pairwise_scores(name)["all_modules"]
        return -found.double().numpy()


class LogOdds(AbstractModelOutput):  # type: ignore[misc]
    """Summed log-odds of all bytes after the prompt, for TRAK."""

    def __init__(self) -> None:
        super().__init__()

    def get_output(self, model: nn.Module, weights: dict, buffers: dict, tokens_T: Tensor) -> Tensor:  # type: ignore[type-arg]
        tokens_1T = tokens_T.unsqueeze(0)
        logits_1TV = functional_call(model, (weights, buffers), (tokens_1T[:, :-1],))
        return _log_odds(logits_1TV, tokens_1T, PROMPT_BYTES).sum()

    def get_out_to_loss_grad(self, model: nn.Module, weights: dict, buffers: dict, batch: Sequence[Tensor]) -> Tensor:  # type: ignore[type-arg]
        (tokens_BT,) = batch
        with torch.no_grad():
            chances_BT = (-per_byte_loss(model, tokens_BT)).exp()
        return (1 - chances_BT.mean(dim=1)).unsqueeze(-1)


def trak_scores(tuned: nn.Module, examples_NT: Tensor, queries: Sequence[Output]) -> Scores:
    """TRAK from the one model there is, ``TRAK_DIMENSIONS`` projected dimensions."""
    model = copy.deepcopy(tuned).eval()
    asked = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    size = sum(model.get_parameter(name).numel() for name in asked)
    with tempfile.TemporaryDirectory() as folder:
        projector = BasicProjector(
            grad_dim=size, proj_dim=TRAK_DIMENSIONS, seed=0, proj_type=ProjectionType.rademacher, device="cpu"
        )
        traker = TRAKer(
            model=model,
            task=LogOdds(),
            train_set_size=len(examples_NT),
            projector=projector,
            proj_dim=TRAK_DIMENSIONS,
            save_dir=str(Path(folder)),
            device="cpu",
            use_half_precision=False,
            logging_level=logging.ERROR,
            grad_wrt=asked,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for start in range(0, len(examples_NT), 32):
            batch_BT = examples_NT[start : start + 32]
            traker.featurize([batch_BT], num_samples=len(batch_BT))
        traker.finalize_features()
        traker.start_scoring_checkpoint("lds", model.state_dict(), 0, num_targets=len(queries))
        traker.score([_rows(queries)], num_samples=len(queries))
        found = np.array(traker.finalize_scores("lds"), dtype=np.float64)
    return found.T


def dot_scores(tuned: nn.Module, examples_NT: Tensor, queries: Sequence[Output]) -> Scores:
    """Inner products of final gradients over the linear weights."""
    weights = [module.weight for module in linear_weights(tuned).values()]

    def flat(gradients: Sequence[Tensor]) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients])

    asked_QP = torch.stack([flat(list(log_odds_gradients(tuned, query).values())) for query in queries])
    columns = []
    for row in examples_NT:
        loss = per_byte_loss(tuned, row[None]).sum()
        columns.append(-(asked_QP @ flat(torch.autograd.grad(loss, weights))))
    return torch.stack(columns, dim=1).double().numpy()
