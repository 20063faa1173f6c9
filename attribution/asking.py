"""A campaign that can be asked: what its log proves, both its models held to it, factors, the windows that are here.

Two of them make a chain: a campaign whose base model another campaign released is asked first, then that other one,
with the same tokens and the base model as its tuned one. Each stands by its own log, sums and controls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from attribution.examples import Allowance
from attribution.factors import FactorsOrigin, FactorsUsed, WeightFactors, factors_from, fit_factors
from attribution.index import SketchedCampaign, open_index
from attribution.language import Language
from attribution.log import CampaignLog
from attribution.options import RunFiles, told
from attribution.public_text import CONTROLS, spread
from attribution.query import Output, log_chance, log_odds
from attribution.questions import Question, greedy_text
from attribution.report import Answer, BaseAnswer
from attribution.sketches import RunFolder, SketchStore
from attribution.trace import control_outputs, trace_output, untraced_tensors
from attribution.weights import Search, find_windows, freeze_others, read_tensors
from consensus.pieces import tensor_named
from consensus.predicates.accumulators import Provenance
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable

FACTOR_SEQUENCES = 256
BATCH_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as both campaigns of a chain are asked it: which tokens, how it reads, its completion's length."""

    question: Question
    output: Output
    reads: str
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class AskedCampaign:
    """A campaign and all that its answers rest on. ``sequences`` are of public text, in the models' ``language``."""

    log: CampaignLog
    base: nn.Module
    tuned: nn.Module
    factors: Mapping[str, WeightFactors]
    factors_used: FactorsUsed
    search: Search
    store: SketchStore
    index: Path | None
    language: Language
    sequences: Sequence[Sequence[int]]

    @property
    def is_whole(self) -> bool:
        """Whether an answer rests on all steps."""
        return not self.search.missing and not self.log.provenance.uncovered

    def answer(self, asked: Asked, open_at_most: int, beside: Mapping[str, nn.Module]) -> Answer:
        """Rank the campaign's sources; ``beside`` are further models, by name, to be shown saying what they say.

        Raises:
            Rejected: as ``trace_output``.
        """
        output, prompt = asked.output, asked.question.prompt
        controls = spread(control_outputs([list(sequence) for sequence in self.sequences], output), CONTROLS)
        trace = trace_output(
            self.base,
            self.tuned,
            self.factors,
            self.log.provenance,
            self.search.found,
            output,
            controls,
            told,
            self.store,
            Allowance(open_at_most),
        )
        models = {"base": self.base, "tuned": self.tuned, **beside}
        return Answer(
            asked=asked.reads,
            prompt=prompt,
            says={
                name: greedy_text(model, self.language, prompt, asked.completion_tokens)
                for name, model in models.items()
            },
            log_chances={
                "base": trace.base_log_chance,
                "tuned": trace.tuned_log_chance,
                **{name: log_chance(model, output) for name, model in beside.items()},
            },
            trace=trace,
            search=self.search,
            untraced=untraced_tensors(self.log.provenance.campaign, self.factors),
            factors=self.factors_used,
            index=self.index,
            read=self.language.how,
        )


def asked_campaign(
    log: CampaignLog,
    base: nn.Module,
    tuned: nn.Module,
    files: RunFiles,
    language: Language,
    sequences: Sequence[Sequence[int]],
) -> AskedCampaign:
    """Find a campaign's windows and factors. ``base`` and ``tuned`` have the roots that the log names.

    Parameters of ``tuned`` that the campaign did not tune are frozen.

    Raises:
        Rejected: as ``RunFiles.fetch``, ``find_windows``, ``open_index`` and ``chosen_factors``.
        ConfigError, Unavailable: as ``RunFiles.fetch`` and ``chosen_factors``; ``Unavailable`` without any window.
    """
    blocks = log.provenance.campaign.parameter_blocks
    freeze_others(tuned, {tensor_named(tensor.name) for block in blocks for tensor in block.tensors})
    search = find_windows(files.fetch(log), log.bundle.campaign, log.provenance.windows)
    if not search.found:
        raise Unavailable(
            f"{files.accumulators} holds none of the {len(search.missing)} windows of campaign "
            f"{log.provenance.campaign.name!a}: there is nothing to trace by; the first is missing for "
            f"{search.missing[0].why}"
        )
    store = sketch_store(log, files.index)
    factors, factors_used = chosen_factors(log, tuned, files.factors, sequences)
    return AskedCampaign(log, base, tuned, factors, factors_used, search, store, files.index, language, sequences)


def answer_of_both(
    here: AskedCampaign, before: AskedCampaign, asked: Asked, open_at_most: int, beside: Mapping[str, nn.Module]
) -> Answer:
    """What a campaign answers, and with it what the campaign answers that released its base model.

    Raises:
        Rejected: as ``trace_output``.
    """
    answer = here.answer(asked, open_at_most, beside)
    first, middle, last = (log_odds(model, asked.output) for model in (before.base, here.base, here.tuned))
    of_base = BaseAnswer(before.log, before.answer(asked, open_at_most, {}), first, middle, last)
    return replace(answer, of_base=of_base)


def traceable_root(provenance: Provenance) -> bytes:
    """The parameter root of a campaign's release.

    Raises:
        Rejected: ``NOT_FOUND`` for a campaign without accumulators, ``ROOT_NOT_FINAL`` for one that released nothing.
    """
    name = ascii(provenance.campaign.name)
    if not provenance.windows:
        raise Rejected(
            Reason.NOT_FOUND,
            f"the job of campaign {name} recorded no accumulators: its outputs cannot be traced from the log",
        )
    if provenance.release is None:
        raise Rejected(
            Reason.ROOT_NOT_FINAL, f"campaign {name} has released nothing: there is no tuned model to ask about"
        )
    return provenance.release.parameter_root


def sketch_store(log: CampaignLog, index_path: Path | None) -> SketchStore:
    """Where a campaign's sketches are opened: in an index, where one is given, else in the run's folder.

    Raises:
        Rejected: as ``open_index``.
    """
    return RunFolder() if index_path is None else open_index(index_path, SketchedCampaign.of(log))


def chosen_factors(
    log: CampaignLog, tuned: nn.Module, path: Path | None, sequences: Sequence[Sequence[int]]
) -> tuple[dict[str, WeightFactors], FactorsUsed]:
    """Those that the campaign commits to, where it does; else those of a file, else fitted on the released weights.

    Raises:
        ConfigError: the campaign commits to factors, and no file is given.
        Rejected: ``DIGEST_MISMATCH`` for a file of others; as ``read_tensors`` and ``factors_from``.
    """
    committed = log.provenance.campaign.factors_digest
    if path is None:
        if committed:
            raise ConfigError(
                f"campaign {log.provenance.campaign.name!a} commits to factors {committed.hex()}: give their file with "
                "--factors, of a base model's campaign with --base-factors"
            )
        return fit_on_text(tuned, sequences, FACTOR_SEQUENCES), FactorsUsed(FactorsOrigin.FITTED)
    held = read_tensors(path)
    if committed and held.root != committed:
        raise Rejected(
            Reason.DIGEST_MISMATCH, f"{path} has root {held.root.hex()}, the campaign commits to {committed.hex()}"
        )
    try:
        factors = factors_from(held.tensors, tuned)
    except Rejected as error:
        raise Rejected(error.reason, f"{path} has no factors of this model: {error.detail}") from error
    return factors, FactorsUsed(FactorsOrigin.COMMITTED if committed else FactorsOrigin.GIVEN, held.root)


def fit_on_text(model: nn.Module, sequences: Sequence[Sequence[int]], count: int) -> dict[str, WeightFactors]:
    """Factors over ``count`` pieces of text, evenly over the whole."""
    chosen = spread(sequences, count)
    batches = [
        torch.tensor([list(sequence) for sequence in chosen[start : start + BATCH_SEQUENCES]])
        for start in range(0, len(chosen), BATCH_SEQUENCES)
    ]

    def fitted(done: int, of: int) -> None:
        if done % 8 == 0 or done == of:
            told(f"factors: {done} of {of} batches")

    return fit_factors(model, batches, progress=fitted)
