"""Opening a governed run: what it is given, what it works with, and the order in which that comes to be.

First everything that can refuse without a trace (parameter table, routing, the sources' claims, the probe), then the
files of the run and, where the policy has entropy bands, base losses; parameter blocks that no example may move are
reported; then the campaign on the log, and last the threads that ask for grants. Everything opened is closed by the
caller's stack, in reverse order.

A campaign that is on the log already and open, with a checkpoint in the run's directory, is taken up again instead:
what the process before left in the outbox is delivered, the checkpoint restored, and the steps since are read from the
log, to be replayed (``resumption.py``).

Several ranks open together. The first one talks to the node and keeps the record in the run's directory; another keeps
its checkpoints, and a record of what its steps took, in ``rank-N`` below it.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from consensus import portions as p
from consensus.job_key import job_key_id
from consensus.keys import Signer
from consensus.policy import why_refused
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.reserve import reserved_among
from trainer_client.accumulators import SourceAccumulators
from trainer_client.audit_snapshots import snapshot_directory
from trainer_client.base_losses import (
    NOTHING_MEASURED,
    BaseLosses,
    Measure,
    base_losses,
    closed_blocks,
    path_of,
    read_base_losses,
    write_base_losses,
)
from trainer_client.calls import CampaignStatus, PolicyInForce
from trainer_client.capture import capture_environment
from trainer_client.checkpoints import CheckpointStore
from trainer_client.commitment import root_of_tensors
from trainer_client.data_parallel import ParallelModel
from trainer_client.grants import OpenGrant
from trainer_client.ledger_side import LedgerSide
from trainer_client.memorization_watch import MemorizationCheck
from trainer_client.momentum import Momentum
from trainer_client.pieces import optimizer_by_pieces
from trainer_client.plan import (
    DATA_PARALLEL,
    RANKS,
    CampaignPlan,
    RunSettings,
    TrainingSource,
    blocks_of,
    campaign_terms,
    check_content,
    manifest_of,
    stepping_settings,
)
from trainer_client.probe import ProbeInputs, probe
from trainer_client.progress import OnProgress, Progress, RunRecord
from trainer_client.ranks import Ranks
from trainer_client.resumption import RecordedPast
from trainer_client.rollback import SnapshotRing, Stateful, TrainingState, take_snapshot
from trainer_client.routing import Routing
from trainer_client.scaling import Scaling
from trainer_client.shared_ledger import SharedLedger
from trainer_client.step_book import FollowingBook, OptimizerDigests, StepBook
from trainer_client.submit import Client
from trainer_client.tensor_digests import TensorDigests

E = TypeVar("E")

PROBED_EXAMPLES = 4
MAY_CHANGE = frozenset({"environment", "job_key", "policy"})
"""Terms of a campaign that need not be the same when it is taken up again: what was true as it opened."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunArguments(Generic[E]):
    """What ``governed`` was called with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: CampaignPlan
    sources: Sequence[TrainingSource[E]]
    node: str | Client
    job_key: Signer
    run_directory: Path
    collate: Callable[[Sequence[E]], Any]
    probe_loss: Callable[[nn.Module, Any], Tensor] | None
    memorization: MemorizationCheck[E] | None
    scheduler: Stateful | None
    scaler: torch.amp.GradScaler | None
    micro_batch_size: int | None
    settings: RunSettings
    on_progress: OnProgress | None


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A campaign taken up again at ``ring``'s snapshot: what is to be replayed, by which grants.

    ``undo``: the last step of ``past`` was recited from, and its rollback is not on the log yet.
    """

    past: RecordedPast
    grants: Mapping[bytes, OpenGrant]
    undo: bool


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the node says before anything is on the log: claims, the policy in force, the sources that it admits now."""

    claims: dict[bytes, p.SourceClaim]
    policy: PolicyInForce
    admitted: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """What a run works with while it is open.

    ``parameters`` are copies of the model's tensors as the run begins, ``ring`` holds a snapshot of it; ``block_of``
    numbers the parameter block of each parameter, ``classes`` names the content class of each source, ``base_losses``
    sort examples into entropy bands, ``reserves`` are the examples of a source that no step may admit. On other ranks
    than the first ``parameters`` are empty.
    """

    routing: Routing
    block_of: dict[str, int]
    classes: dict[bytes, str]
    base_losses: BaseLosses
    reserves: dict[bytes, frozenset[int]]
    record: RunRecord
    parameters: dict[str, Tensor]
    ring: SnapshotRing
    ledger: SharedLedger
    book: StepBook | FollowingBook
    checkpoints: CheckpointStore
    taken_up: TakenUp | None


def open_run(
    arguments: RunArguments[E],
    model: ParallelModel,
    ranks: Ranks,
    state: TrainingState,
    stack: ExitStack,
    wait_on_close: Callable[[], bool],
    accumulators: SourceAccumulators | None,
    momentum: Momentum,
    scaling: Scaling,
) -> OpenedRun:
    """Opens the campaign and begins to ask for grants; ``wait_on_close`` is asked whether to wait for delivery.

    ``accumulators``, where the campaign keeps them, and ``momentum`` learn of model and routing.

    Raises:
        Rejected, RoutingUnsupported, ConfigError, Unavailable, RankFailed: as ``GovernedRun.__enter__``; ``stack`` is
        the caller's to close.
    """
    plan = _plan_of_all(arguments, model, ranks, scaling)
    client = _client(arguments.node, stack) if ranks.is_first else None
    _check_optimized(arguments.optimizer, model.module)
    blocks = blocks_of(plan, model.module)
    block_of = {name: number for number, names in enumerate(blocks.values()) for name in names}
    if accumulators is not None:
        stack.enter_context(accumulators)
    routing = Routing(model.module, block_of, accumulators, None if accumulators is None else accumulators.sketches)
    if routing.division.pieces:
        if model.is_sharded:
            raise ConfigError("routing granularity 'head' with fully_shard: ranks hold rows, not heads; use DDP")
        if arguments.probe_loss is None:
            raise ConfigError("routing granularity 'head' without probe_loss: only a probe shows whose rows are whose")
    scaling.check_supported(model.module)
    entries = stack.enter_context(
        optimizer_by_pieces(arguments.optimizer, model.module, routing.division, routing.moved)
    )
    if accumulators is not None:
        accumulators.attach(model.module, block_of, entries)
    momentum.attach(block_of, entries)
    sources = {source.id: source for source in arguments.sources}
    asked = ranks.by_first(lambda: _asked(client, sources, plan.purpose))
    claims, policy = asked.claims, asked.policy
    scaling.check_admitted(policy.policy)
    ranks.together(lambda: _check_contents(sources, claims))
    classes = {identifier: claim.content_class for identifier, claim in claims.items()}
    reserves = {
        identifier: frozenset(reserved_among(claim, range(len(sources[identifier].examples))))
        for identifier, claim in claims.items()
    }
    probe_loss = arguments.probe_loss
    if probe_loss is not None:
        ranks.together(lambda: _probe(arguments, model.module, probe_loss, block_of, asked.admitted, reserves))
    stack.enter_context(routing)
    directory = own_directory(arguments.run_directory, ranks)
    directory.mkdir(parents=True, exist_ok=True)
    record = RunRecord.opened(directory, arguments.on_progress if ranks.is_first else None)
    stack.callback(record.close)
    checkpoints = CheckpointStore(
        directory / "checkpoints" / plan.campaign.hex(), plan.campaign, arguments.settings.checkpoint_every_steps, ranks
    )
    stack.callback(checkpoints.close)
    parameters = model.copied()
    base_root = ranks.by_first(lambda: root_of_tensors(parameters))
    own = None
    if client is not None:
        own = LedgerSide(plan, arguments.settings, client, arguments.job_key, directory / "outbox.sqlite", classes)
    ledger = SharedLedger(ranks, own)
    stack.callback(lambda: ledger.close(wait=wait_on_close()))
    digests = OptimizerDigests(ranks, is_sharded=model.is_sharded)
    book: StepBook | FollowingBook = FollowingBook(digests)
    if own is not None:
        for_audits = arguments.settings.audit_snapshot_every_steps
        tensor_digests = TensorDigests(snapshot_directory(directory, plan.campaign) if for_audits else None)
        book = StepBook(own, record, blocks, plan.planned_steps, digests, tensor_digests)
    stack.enter_context(book)
    manifest = manifest_of(arguments.sources)
    head = ledger.deliver_left()
    checkpoint = None if head is None else checkpoints.newest_of_all()
    if head is not None and checkpoint is None:
        raise _already_begun(head, plan.campaign, directory)
    losses_path = path_of(arguments.run_directory, plan.campaign)
    opened = None if head is None else ledger.opening()
    if opened is None:
        losses = _measure(arguments, model, ranks, policy.policy, asked.admitted)
        if losses.sha256:
            ranks.by_first(lambda: write_base_losses(losses_path, losses))
    elif opened.base_losses_sha256:
        committed = opened.base_losses_sha256
        losses = ranks.by_first(lambda: read_base_losses(losses_path, manifest, committed))
    else:
        losses = NOTHING_MEASURED
    terms = ranks.by_first(
        lambda: campaign_terms(
            plan,
            model.module,
            arguments.optimizer,
            arguments.scheduler,
            policy=policy.id,
            job_key=job_key_id(arguments.job_key),
            base_root=base_root,
            environment=capture_environment(Path.cwd()).settings,
            base_losses_sha256=losses.sha256,
        )
    )
    closed = closed_blocks(policy.policy, {source: classes[source] for source in asked.admitted}, losses, tuple(blocks))
    if closed and ranks.is_first:
        _log.warning("no example that the policy in force admits may move %s", ", ".join(closed))
        done = 0 if head is None else head.steps
        record.note(Progress("closed", done, plan.planned_steps, detail=", ".join(closed)))
    if head is None:
        ring = SnapshotRing(take_snapshot(state, 0, base_root))
        checkpoints.begin(ring.final)
        event = ledger.open_campaign(terms, manifest)
        book.note("campaign", 0, id=event.id.hex())
        ledger.start_grants(tuple(blocks), losses.measured, book.note_grant)
        return OpenedRun(
            routing, block_of, classes, losses, reserves, record, parameters, ring, ledger, book, checkpoints, None
        )
    assert opened is not None
    assert checkpoint is not None
    _check_continues(opened, terms, head)
    ring = SnapshotRing(checkpoint.snapshot)
    ring.roll_back(state)
    parameters = model.copied()
    ledger.take_up(head)
    past = ledger.past_since(checkpoint.snapshot.step, head)
    past = RecordedPast(past.steps, past.recited | checkpoint.recited)
    detail = f"taken up from the checkpoint of step {checkpoint.snapshot.step}; {len(past.steps)} steps are replayed"
    book.note("resumed", head.steps, detail=detail)
    grants = ledger.start_grants(tuple(blocks), losses.measured, book.note_grant, past.steps)
    taken_up = TakenUp(past, grants, head.rollback_required)
    return OpenedRun(
        routing, block_of, classes, losses, reserves, record, parameters, ring, ledger, book, checkpoints, taken_up
    )


def own_directory(run_directory: Path, ranks: Ranks) -> Path:
    """Where this rank keeps what is its own."""
    return run_directory if ranks.is_first else run_directory / f"rank-{ranks.rank}"


def _client(node: str | Client, stack: ExitStack) -> Client:
    return node if isinstance(node, Client) else stack.enter_context(Client(node))


def _asked(client: Client | None, sources: Iterable[bytes], purpose: str) -> _Asked:
    assert client is not None
    records = {identifier: client.source_record(identifier) for identifier in sorted(sources)}
    policy = client.policy_in_force()
    now_ms = time.time_ns() // 1_000_000
    admitted = frozenset(
        identifier
        for identifier, record in records.items()
        if why_refused(policy.policy, record.claim, bool(record.revocation), purpose, now_ms, now_ms) is None
    )
    return _Asked({identifier: record.claim for identifier, record in records.items()}, policy, admitted)


def _measure(
    arguments: RunArguments[E], model: ParallelModel, ranks: Ranks, policy: p.Policy, admitted: Collection[bytes]
) -> BaseLosses:
    """The base losses of a campaign about to open, of examples whose sources the policy admits; none without bands.

    Raises:
        ConfigError: the policy has bands, and nothing to measure with was given; as ``base_losses``.
    """
    if not policy.entropy_edges_milli:
        return NOTHING_MEASURED
    loss = arguments.probe_loss
    if loss is None:
        raise ConfigError(
            "the policy in force goes by entropy bands, and nothing measures the base model's loss on each example:"
            " give governed() the loss of your training as probe_loss"
        )
    contents = {source.id: source.examples for source in arguments.sources}
    batch_size = arguments.micro_batch_size or arguments.plan.batch_size
    measure = Measure(model, loss, contents, arguments.collate, batch_size, ranks)
    return base_losses(measure, manifest_of(arguments.sources), admitted)


def _check_optimized(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The optimizer steps the model's parameters alone.

    Raises:
        ConfigError: it has others, which nothing would limit, commit to or restore.
    """
    own = {id(parameter) for parameter in model.parameters()}
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := [tuple(parameter.shape) for parameter in optimized if id(parameter) not in own]:
        raise ConfigError(
            f"the optimizer has parameters that are not the model's, of shapes {foreign[:8]}: give one module"
        )


def _check_contents(sources: Mapping[bytes, TrainingSource[E]], claims: Mapping[bytes, p.SourceClaim]) -> None:
    for identifier, claim in claims.items():
        check_content(sources[identifier], claim)


def _plan_of_all(arguments: RunArguments[E], model: ParallelModel, ranks: Ranks, scaling: Scaling) -> CampaignPlan:
    """The plan, with how gradients are scaled and how the ranks divide a step among its hyperparameters.

    Raises:
        ConfigError: a rank was started with another plan, other sources or other settings, of its optimizer and
            schedule too.
    """
    plan, micro_batch_size = arguments.plan, arguments.micro_batch_size
    plan = replace(plan, hyperparameters={**plan.hyperparameters, **scaling.hyperparameters()})
    if ranks.size == 1:
        return plan
    asked: dict[str, object] = {
        "plan": plan,
        "sources": manifest_of(arguments.sources),
        "micro_batch_size": micro_batch_size,
        "settings": arguments.settings,
        **stepping_settings(arguments.optimizer, arguments.scheduler),
    }
    for rank, others in enumerate(ranks.gathered(asked)):
        for what in dict.fromkeys((*asked, *others)):
            own, other = asked.get(what), others.get(what)
            if own != other:
                raise ConfigError(f"rank {rank} was started with another {what}: {other!r:.400}, not {own!r:.400}")
    layout = {RANKS: str(ranks.size), DATA_PARALLEL: model.kind}
    if micro_batch_size is not None:
        layout["micro_batch_size"] = str(micro_batch_size)
    return replace(plan, hyperparameters={**plan.hyperparameters, **layout})


def _already_begun(head: CampaignStatus, campaign: bytes, directory: Path) -> Rejected:
    stands = f"is {head.closed}" if head.closed else f"stands at step {head.steps}"
    return Rejected(
        Reason.DUPLICATE,
        f"campaign {campaign.hex()} is on the log already and {stands}; {directory} has no checkpoint to take it up"
        " from. Run it in the directory that it began in, or have a job key delegated for another campaign",
    )


def _check_continues(opened: p.Campaign, terms: p.Campaign, head: CampaignStatus) -> None:
    """The campaign on the log is the plan's, and open.

    Raises:
        Rejected: ``CAMPAIGN_CLOSED``, ``UNKNOWN_JOB_KEY``; ``BAD_FIELD`` naming every term that differs.
    """
    if head.closed:
        raise Rejected(Reason.CAMPAIGN_CLOSED, f"the campaign is {head.closed}")
    if bytes.fromhex(head.job_key) != terms.job_key:
        raise Rejected(Reason.UNKNOWN_JOB_KEY, f"the campaign goes on under job key {head.job_key}")
    different = [
        f"{name}: opened with {getattr(opened, name)!r:.200}, asked for {getattr(terms, name)!r:.200}"
        for name in opened.__struct_fields__
        if name not in MAY_CHANGE and getattr(opened, name) != getattr(terms, name)
    ]
    if different:
        raise Rejected(Reason.BAD_FIELD, f"the campaign cannot be taken up with other terms: {'; '.join(different)}")


def _not_reserved(source: TrainingSource[E], reserves: Mapping[bytes, frozenset[int]]) -> Iterator[int]:
    return (row for row in range(len(source.examples)) if row not in reserves[source.id])


def _probe(
    arguments: RunArguments[E],
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    block_of: Mapping[str, int],
    admitted: Collection[bytes],
    reserves: Mapping[bytes, frozenset[int]],
) -> None:
    """The probe on a few examples of sources that the policy in force admits; nobody else's reach the model."""
    examples = [
        example
        for source in arguments.sources
        if source.id in admitted
        # One by one: a slice of a ``datasets.Dataset`` is a table of columns.
        for example in (source.examples[row] for row in islice(_not_reserved(source, reserves), PROBED_EXAMPLES))
    ]
    if len(examples) < 3:
        _log.warning("the probe needs three admitted examples and found %d: nothing was tried", len(examples))
        return
    other, *shown = examples[: PROBED_EXAMPLES + 1]
    whole, shorter, replaced = (arguments.collate(each) for each in (shown, shown[1:], [other, *shown[1:]]))
    alone = [arguments.collate([example]) for example in shown]
    probe(model, block_of, loss, ProbeInputs(len(shown), whole, shorter, replaced, alone))
