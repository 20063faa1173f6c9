"""Replays: a campaign's fine-tune again, from what the log says of it, and without a source.

Grants, refusals, depth profiles and order come from the step events; model, optimizer, loss and examples from the job.
Every step's parameter root, optimizer digest, deltas per parameter block and accumulators are held against the recorded
ones, and the first difference ends the replay: what comes after one follows from it. Bit-exact on the same build of
torch and number of threads; elsewhere kernels differ in the last bits, and the first difference says no more than that.

**By as many processes as the run had.** Sums over ranks are formed by DDP or FSDP2, in an order of theirs, so that only
the same number of them gives the same bits. All call the same functions; the first compares, and the others are told.

**Without a source** its examples have weight zero from its first step on, with everything else as it was: order,
grants, normalisation, what was refused or undone. That is what retraining without it would have made of the same
campaign, in one run, and what a trace estimates.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from consensus import portions as p
from consensus.identifiers import Digest
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.sampler import presented_examples
from consensus.sketch_ranks import sketch_ranks
from consensus.state import POLICY_TABLE, PolicyRecord
from trainer_client.accumulators import SourceAccumulators, by_source
from trainer_client.balance import Balance, BalanceSheet
from trainer_client.base_losses import NOTHING_MEASURED, BaseLosses, Measure, confirmed_losses, read_base_losses
from trainer_client.calls import CampaignStatus
from trainer_client.commitment import optimizer_state_digest, step_commitment
from trainer_client.data_parallel import ParallelModel, pass_over
from trainer_client.momentum import blocks_moved, drop_state
from trainer_client.packing import Packed, taken_apart
from trainer_client.pieces import Entries, optimizer_by_pieces
from trainer_client.plan import DATA_PARALLEL, RANKS, TrainingSource, check_content
from trainer_client.ranks import ALONE, Ranks
from trainer_client.record import Example
from trainer_client.resumption import RecordedStep, past_since, read_opening
from trainer_client.rollback import Stateful
from trainer_client.routing import GradientObserver, Routing
from trainer_client.scaling import Scaled, Scaling, prepared, scaling_of
from trainer_client.sketch_witness import SketchWitness
from trainer_client.step_book import optimizer_digest_of_all
from trainer_client.submit import Client

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class ReplayJob(Generic[E]):
    """A job as it stood before its first step: ``model`` has the base weights, seeds are set.

    ``loss`` gives one loss per example, as in training, and is given what ``collate`` returns; the rest is as in
    ``governed``. ``base_losses`` is the run's file of them, needed where its policies have entropy bands. Of several
    processes each makes one, in its process group, with ``model`` in ``DistributedDataParallel`` or sharded by
    ``fully_shard`` as in training.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sources: Sequence[TrainingSource[E]]
    loss: Callable[[nn.Module, Any], Tensor]
    collate: Callable[[Sequence[E]], Any] = torch.stack  # type: ignore[assignment]
    scheduler: Stateful | None = None
    micro_batch_size: int | None = None
    scaler: torch.amp.GradScaler | None = None
    base_losses: Path | None = None


@dataclass(frozen=True, slots=True)
class LoggedCampaign:
    """What the log has of a campaign: its terms, manifest, claims, the steps that stand, and their policies' edges."""

    id: bytes
    terms: p.Campaign
    manifest: tuple[p.ManifestRange, ...]
    claims: Mapping[bytes, p.SourceClaim]
    steps: tuple[RecordedStep, ...]
    head: CampaignStatus
    entropy_edges_milli: Mapping[bytes, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first step that came out otherwise, and in what."""

    step: int
    what: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """How a replay ended: ``matched`` steps came out as recorded, until there was a difference or a source left out."""

    steps: int
    matched: int
    difference: Difference | None
    root: Digest
    balance: BalanceSheet | None = None


PROFILES = "depth profiles"
"""What differs where a step states profiles of other entropy bands than its examples are of."""

OnStep = Callable[[int, int], None]
"""Told steps done, of how many."""


def read_logged_campaign(client: Client, campaign: bytes) -> LoggedCampaign:
    """A campaign from a node's log.

    Raises:
        Rejected: ``NOT_FOUND``, ``UNKNOWN_POLICY``; as ``resumption.past_since``.
        Unavailable: the node does not answer.
    """
    head = client.campaign(campaign)
    record, terms = read_opening(client, campaign)
    past = past_since(0, head, client.campaign_events(campaign), client.raw_event)
    claims = {source.source: client.source_record(source.source).claim for source in record.manifest}
    edges = {policy: _edges(client, policy) for policy in sorted({step.governance.policy for step in past.steps})}
    return LoggedCampaign(campaign, terms, record.manifest, claims, past.steps, head, edges)


def _edges(client: Client, policy: bytes) -> tuple[int, ...]:
    record = client.state_record(POLICY_TABLE + policy, PolicyRecord)
    if record is None:
        raise Rejected(Reason.UNKNOWN_POLICY, f"policy {policy.hex()} has no record")
    return record.policy.entropy_edges_milli


def replay(
    logged: LoggedCampaign,
    job: ReplayJob[E],
    without: Collection[bytes] = (),
    on_step: OnStep = lambda done, of: None,
    *,
    balanced: bool = False,
    ranks: Ranks = ALONE,
) -> Replayed:
    """Train the job's model as the log says; it holds the result afterwards. All of the job's ``ranks`` call it.

    ``balanced``: keep a balance sheet (``balance.py``), and compare no accumulators; nothing at all where the run kept
    none, since splitting gradients by source then sums them in another order.

    Raises:
        Rejected: ``DIGEST_MISMATCH`` for another base model or other examples; ``UNKNOWN_SOURCE`` for a source of the
            campaign that the job lacks, or one to leave out that the campaign never had; ``BAD_FIELD`` for another
            number of processes than the campaign had, and for a balance sheet of several; as ``Balance``. Of base
            losses, ``DIGEST_MISMATCH`` for another file than the campaign committed to, or other losses than the
            model's; ``BASE_LOSSES_MISSING`` for a step with an unmeasured example.
        RoutingError: as ``routing.py``. ConfigError: as ``data_parallel.ParallelModel``; no file of base losses, and
            the campaign went by entropy bands. RankFailed: another process failed.
    """
    check_job(logged, job, without, ranks)
    if balanced and ranks.size > 1:
        raise Rejected(Reason.BAD_FIELD, f"a balance sheet of {ranks.size} processes: each sees its own examples alone")
    balance = Balance(prepared(job.optimizer, job.scaler)[0]) if balanced else None
    with bench(logged, job, ranks, accumulated=not (without or balanced), balance=balance, without=without) as run:
        grouped = bool(logged.terms.accumulator_window_steps)
        matched = 0
        before = run.copied()
        for number, step in enumerate(logged.steps, 1):
            admitted = tuple(example for example in run.admitted(step) if example[0] not in without)
            accumulator_root = run.take(step, admitted)
            on_step(number, len(logged.steps))
            if without or (balanced and not grouped):
                continue
            after = run.copied()
            what = run.differences(step, before, after, None if balanced else accumulator_root)
            if what:
                return Replayed(number, matched, Difference(step.index, what), run.root())
            matched, before = number, after
        sheet = None if balance is None else balance.sheet(run.blocks)
        return Replayed(len(logged.steps), matched, None, run.root(), sheet)


@contextmanager
def bench(
    logged: LoggedCampaign,
    job: ReplayJob[E],
    ranks: Ranks = ALONE,
    *,
    accumulated: bool,
    balance: Balance | None = None,
    without: Collection[bytes] = (),
    tolerance: float = 0.0,
    witnessed: bool = False,
) -> Iterator["Bench[E]"]:
    """What steps are taken on, with the job's model under the campaign's routing; afterwards it is as it was.

    ``accumulated``: form the campaign's accumulators, if it has any, in a folder that goes away. Sources that it goes
    ``without`` moved nothing, and no momentum is dropped for them. Base losses are measured again, and may be away from
    the recorded ones by ``tolerance`` of theirs. ``witnessed``: the accumulators' sketches are a ``SketchWitness``.

    Raises:
        Rejected, ConfigError: of base losses, as ``replay``.
    """
    optimizer, scaler = prepared(job.optimizer, job.scaler)
    job = replace(job, optimizer=optimizer, scaler=scaler)
    blocks = {block.name: tuple(tensor.name for tensor in block.tensors) for block in logged.terms.parameter_blocks}
    block_of = {name: number for number, names in enumerate(blocks.values()) for name in names}
    parallel = ParallelModel(job.model, ranks)
    model = parallel.module
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        accumulators = _accumulators(logged, folder, ranks, witnessed=witnessed) if accumulated else None
        if accumulators is not None:
            stack.enter_context(accumulators)
        losses = _base_losses(logged, job, parallel, ranks, tolerance)
        grouped = bool(logged.terms.accumulator_window_steps)
        observer = accumulators or balance or (_Unheard() if grouped else None)
        routing = Routing(model, block_of, observer, None if accumulators is None else accumulators.sketches)
        scaling = scaling_of(logged.terms, job.optimizer, job.scaler)
        entries = stack.enter_context(optimizer_by_pieces(job.optimizer, model, routing.division, routing.moved))
        if accumulators is not None:
            accumulators.attach(model, block_of, entries)
        if balance is not None:
            balance.attach(model, entries)
        stack.enter_context(routing)
        without = frozenset(without)
        yield Bench(
            logged=logged,
            job=job,
            ranks=ranks,
            parallel=parallel,
            routing=routing,
            entries=entries,
            blocks=blocks,
            block_of=block_of,
            scaling=scaling,
            accumulators=accumulators,
            balance=balance,
            without=without,
            losses=losses,
        )


class _Unheard(GradientObserver):
    """Has gradients formed source by source, as they were while accumulators were kept, and keeps none."""

    def observe(self, parameter: str, group: bytes, gradient: Tensor) -> None:
        return


@dataclass(slots=True)
class Bench(Generic[E]):
    """Takes steps as ``governed.GovernedRun`` does, without recording any."""

    logged: LoggedCampaign
    job: ReplayJob[E]
    ranks: Ranks
    parallel: ParallelModel
    routing: Routing
    entries: Entries
    blocks: Mapping[str, tuple[str, ...]]
    block_of: Mapping[str, int]
    scaling: Scaling
    accumulators: SourceAccumulators | None
    balance: Balance | None
    without: frozenset[bytes]
    losses: BaseLosses
    scaled: Scaled | None = None

    def admitted(self, step: RecordedStep) -> tuple[Example, ...]:
        """The examples that a step took, in its order."""
        terms = self.logged.terms
        presented = presented_examples(self.logged.manifest, terms.sampler_seed, terms.batch_size, step.index)
        return step.in_order(presented)

    def band(self, step: RecordedStep, example: Example) -> int:
        """The entropy band that a step's example is of, by the campaign's base losses and the step's policy."""
        return self.losses.band(example, self.logged.entropy_edges_milli[step.governance.policy])

    def states_profiles(self, step: RecordedStep) -> bool:
        """Whether a step states depth profiles for just the classes and entropy bands of its admitted examples."""
        stated = {(profile.content_class, profile.band) for profile in step.governance.profiles}
        return stated == {(step.classes[example[0]], self.band(step, example)) for example in step.admitted}

    def copied(self) -> dict[str, Tensor]:
        """Copies of what the model's root covers, on the first of the ranks; nothing elsewhere. All must ask."""
        return self.parallel.copied()

    def root(self) -> Digest:
        """The parameter root of the model as it is now."""
        return self.parallel.root()

    def differences(
        self,
        step: RecordedStep,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        accumulator_root: bytes | None,
    ) -> tuple[str, ...]:
        """What of a step that was just taken is not as recorded; told to all of the ranks. None compares no window."""
        own = optimizer_state_digest(self.job.optimizer)
        found = optimizer_digest_of_all(own, self.ranks) if self.parallel.is_sharded else own

        def compared() -> tuple[str, ...]:
            what = differences(step, before, after, self.blocks, found) + self.scaled_otherwise(step)
            if accumulator_root is not None and accumulator_root != step.operation.accumulator_root:
                what += ("accumulators",)
            return what if self.states_profiles(step) else (PROFILES, *what)

        return self.ranks.by_first(compared)

    def scaled_otherwise(self, step: RecordedStep, tolerance: float = 0.0) -> tuple[str, ...]:
        """What of the step just taken was scaled otherwise than recorded; a factor by more than a part of it."""
        factor, skipped = (0, False) if self.scaled is None else (self.scaled.global_clip_nano, self.scaled.skipped)
        recorded = step.governance
        what = []
        if abs(factor - recorded.global_clip_nano) > tolerance * recorded.global_clip_nano:
            what.append("global clip factor")
        if skipped != recorded.skipped:
            what.append("whether it is skipped")
        return tuple(what)

    def take(self, step: RecordedStep, admitted: tuple[Example, ...]) -> bytes:
        """One step; the root of the accumulators' window that it ends, on the first of the ranks, or nothing."""
        job, model = self.job, self.parallel.module
        job.optimizer.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)  # divided tensors are not the optimizer's
        self.scaled = None
        batches = self.ranks.micro_batches(admitted, job.micro_batch_size or self.logged.terms.batch_size)
        for number, examples in enumerate(batches, 1):
            self._learn(step, admitted, examples, last=number == len(batches))
        if admitted:
            self.routing.finish_step()
            scaled = self.scaled = self.scaling.finish(model, self.block_of)
            self._flush(step)
            self._observe_step(step, scaled)
            self.scaling.step(scaled)
            if self.balance is not None and not scaled.skipped:
                self.balance.after_step(job.optimizer)
            if job.scheduler is not None and not scaled.skipped:
                job.scheduler.step()  # type: ignore[attr-defined]
        if self.accumulators is None:
            return b""
        window = self.accumulators.end_step(step.index, recorded=True)
        return b"" if window is None else window.result()

    def _observe_step(self, step: RecordedStep, scaled: Scaled) -> None:
        """Accumulators and balance take in a step, or drop one that is skipped, before the optimizer takes it."""
        for observer in (self.accumulators, self.balance):
            if observer is not None and scaled.skipped:
                observer.skip_step()
        if scaled.skipped:
            return
        if self.accumulators is not None:
            self.accumulators.take_step(step.permission.policy, self.job.optimizer, scaled.factors)
        if self.balance is not None:
            self.balance.before_step(self.block_of, scaled.factors)

    def _flush(self, step: RecordedStep) -> None:
        """Drop the optimizer's state of the parameter blocks which the step says that it dropped it of."""
        flushed = frozenset(step.operation.flushed) - self.without
        if not flushed:
            return
        moved = blocks_moved(self.logged.steps[: step.index - 1], flushed, self.band)
        entries = {name: entry for name, entry in self.entries.items() if self.block_of.get(name) in moved}
        drop_state(self.job.optimizer, entries.values())
        if self.balance is not None:
            self.balance.drop(entries)

    def _learn(
        self, step: RecordedStep, admitted: tuple[Example, ...], examples: tuple[Example, ...], *, last: bool
    ) -> None:
        job = self.job
        if self.logged.terms.accumulator_window_steps:
            examples = by_source(examples)
        if self.accumulators is not None:
            self.accumulators.expect(step.index, examples)
        contents = {source.id: source.examples for source in job.sources}

        def weights_permille(example: Example) -> tuple[int, ...]:
            return step.weights_permille(example[0], self.band(step, example))

        shown = pass_over(examples, admitted, weights_permille, self.ranks)
        inputs, packing = taken_apart(job.collate([contents[source][number] for source, number in shown.examples]))
        groups = [source for source, _ in shown.examples]
        routed = self.routing.micro_batch(shown.weights_BK, groups, shown.profiles_of_step, packing)
        with self.parallel.pass_of(last=last), routed:
            loss_B = job.loss(job.model, inputs if packing is None else Packed(inputs, packing))
            loss = self.routing.routed_loss(loss_B, self.logged.terms.batch_size)
            self.scaling.backward(self.parallel.of_all(loss))


def check_job(logged: LoggedCampaign, job: ReplayJob[E], without: Collection[bytes] = (), ranks: Ranks = ALONE) -> None:
    """The job has the campaign's base model and its sources' examples, in as many processes as the campaign.

    Raises:
        Rejected: as ``replay``.
    """
    settings = {setting.name: setting.value for setting in logged.terms.hyperparameters}
    recorded = settings.get(RANKS, "1")
    if recorded != str(ranks.size):
        raise Rejected(
            Reason.BAD_FIELD,
            f"the campaign was trained by {recorded!a:.20} processes, the replay runs in {ranks.size} and would add up"
            " in another order: begin as many (torchrun --no-python --nproc-per-node N -- countersign replay ...)",
        )
    parallel = ParallelModel(job.model, ranks)
    if ranks.size > 1 and parallel.kind != settings.get(DATA_PARALLEL):
        raise Rejected(
            Reason.BAD_FIELD,
            f"the campaign was trained with {settings.get(DATA_PARALLEL, '')!a:.20}, the job has {parallel.kind}",
        )
    root = parallel.root()
    if root != logged.terms.base_root:
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"the campaign began at root {logged.terms.base_root.hex()}, the job's model has {root.hex()}",
        )
    ranks.together(lambda: _check_sources(logged, job, without))


def _check_sources(logged: LoggedCampaign, job: ReplayJob[E], without: Collection[bytes]) -> None:
    at_hand = {source.id: source for source in job.sources}
    for held in logged.manifest:
        if held.source not in at_hand:
            raise Rejected(Reason.UNKNOWN_SOURCE, f"the job lacks source {held.source.hex()} of the campaign")
        check_content(at_hand[held.source], logged.claims[held.source])
    for source in without:
        if source not in {held.source for held in logged.manifest}:
            raise Rejected(Reason.UNKNOWN_SOURCE, f"source {source.hex()} is not in the campaign's manifest")


def _base_losses(
    logged: LoggedCampaign, job: ReplayJob[E], model: ParallelModel, ranks: Ranks, tolerance: float
) -> BaseLosses:
    """The campaign's base losses, which the job's model gives again; none where no step went by entropy bands."""
    if not any(logged.entropy_edges_milli.values()):
        return NOTHING_MEASURED
    recorded = ranks.by_first(lambda: _recorded_losses(logged, job.base_losses))
    contents = {source.id: source.examples for source in job.sources}
    batch_size = job.micro_batch_size or logged.terms.batch_size
    measure = Measure(model, job.loss, contents, job.collate, batch_size, ranks)
    confirmed_losses(measure, logged.manifest, recorded, tolerance)
    return recorded


def _recorded_losses(logged: LoggedCampaign, path: Path | None) -> BaseLosses:
    if path is None:
        raise ConfigError(
            "the campaign's depth profiles go by entropy bands, which follow from the run's file of base losses: give"
            " it (base_losses of the ReplayJob, --base-losses of countersign replay)"
        )
    return read_base_losses(path, logged.manifest, logged.terms.base_losses_sha256)


def differences(
    step: RecordedStep,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    blocks: Mapping[str, tuple[str, ...]],
    optimizer_digest: Digest,
) -> tuple[str, ...]:
    """What of a step is not as recorded."""
    recorded = step.operation
    found = step_commitment(before, after, blocks)
    what = [
        f"parameter block {name}"
        for name, mine, theirs in zip(blocks, found.deltas, recorded.deltas, strict=True)
        if mine != theirs
    ]
    if found.root_after != recorded.root_after and not what:
        what.append("parameters")
    if optimizer_digest != recorded.optimizer_digest:
        what.append("optimizer state")
    return tuple(what)


def _accumulators(logged: LoggedCampaign, folder: Path, ranks: Ranks, *, witnessed: bool) -> SourceAccumulators | None:
    terms = logged.terms
    if not terms.accumulator_window_steps:
        return None
    window_steps, planned_steps, tensor_ranks = terms.accumulator_window_steps, terms.planned_steps, sketch_ranks(terms)
    accumulators = SourceAccumulators(
        folder, logged.id, window_steps, planned_steps, terms.sketch_rank, tensor_ranks, ranks=ranks
    )
    if witnessed and terms.sketch_rank:
        accumulators.sketches = SketchWitness(terms.sketch_rank, tensor_ranks)
    return accumulators
