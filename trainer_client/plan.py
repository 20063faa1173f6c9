"""What a governed run is asked to do: the campaign, its sources and its settings, and what follows from them.

Pure functions of model and plan: the parameter table, the campaign's terms, the manifest. The ledger fixes
all of it in the ``campaign`` event, before the first step.

A parameter table groups *every* parameter. Its default puts the parameters of a numbered layer
(``blocks.3.attention.weight``) in one parameter block (``blocks.3``) and everything else in a block named by its first
word (``head``); a policy names its exceptions by these names. At granularity ``head`` what heads of attention own is in
blocks of their own (``heads.py``).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from consensus import portions as p
from consensus.identifiers import ChainId, Digest, MemberId
from consensus.merkle import root_of
from consensus.pieces import HEAD, piece_named
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.sketch_ranks import SKETCH_RANK_OF
from trainer_client.commitment import SAFETENSORS_DTYPES, committed_tensors
from trainer_client.heads import head_blocks
from trainer_client.pieces import part_of_entry
from trainer_client.scaling import BLOCK
from trainer_client.schedule import schedule_settings

E = TypeVar("E")

RANKS = "ranks"
DATA_PARALLEL = "data_parallel"
"""The hyperparameter that says how many processes trained, where there were several."""


@dataclass(frozen=True, slots=True)
class CampaignPlan:
    """One fine-tune, as the ledger is to fix it.

    Args:
        chain_id: the pinned chain.
        operator: the member that delegated the job key.
        campaign: the campaign's id, as the delegation names it.
        batch_size: examples presented at each step, refused ones included.
        blocks: parameter block name to parameter names, or pieces' (``consensus/pieces.py``); None takes
            ``default_blocks``, at granularity ``head`` with heads taken out of them. At ``head`` pieces are those of
            heads, in whichever blocks.
        clip_norm: largest L2 norm of each parameter block's gradient.
        clip_scope: ``block``, or ``global``: one factor for all blocks, of their common norm (``scaling.py``).
        factors_digest: SHA-256 of the file of Kronecker factors that traces of this campaign are to use.
        accumulator_window_steps: steps per window of per-source gradient sums (``accumulators.py``); 0 keeps none.
        sketch_rank: rank at which each example's gradients are kept beside them (``sketches.py``); 0 keeps none.
        sketch_ranks: a higher one, by parameter block: for what a block that some sources are kept out of saves.
        files: what else made the run what it is, by name (a preprocessing script): their SHA-256 are recorded, as the
            first of several processes finds them.
    """

    chain_id: ChainId
    operator: MemberId
    campaign: bytes
    name: str
    purpose: str
    base_model: str
    sampler_seed: bytes
    batch_size: int
    planned_steps: int
    base_provenance: bytes = b""
    routing_granularity: str = "block"
    event_granularity: str = "batch"
    blocks: Mapping[str, tuple[str, ...]] | None = None
    clip_norm: float = 1.0
    clip_scope: str = BLOCK
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    factors_digest: bytes = b""
    accumulator_window_steps: int = 0
    sketch_rank: int = 0
    sketch_ranks: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingSource(Generic[E]):
    """A registered source and its examples, in the order of its content root.

    With ``content_salt``, the owner's secret for this source, the examples are bytes and are checked against
    the claim's content root; a claim with more examples than are here is then refused.
    """

    id: bytes
    examples: Sequence[E]
    content_salt: bytes | None = None


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run behaves toward its node.

    Args:
        renew_at_permille: a grant is renewed when this share of its steps or time is left.
        grant_steps: steps asked for at once; the policy's maximum if it is lower.
        grant_duration_ms: the same for how long a grant is open.
        closing_margin_ms: a grant this near to its end is not used: its steps must still reach the log.
        snapshot_every_steps: least distance between snapshots to return to if a step is not admitted.
        check_memorization_every_steps: how often the memorization check runs.
        checkpoint_every_steps: least distance between checkpoints on disk, from which a run whose process died is taken
            up again (``checkpoints.py``); 0 keeps none.
        audit_snapshot_every_steps: after how many steps each a snapshot is kept for good, for audits to start from
            (``audit_snapshots.py``); 0 keeps none.
        pause_limit_seconds: how long to wait for a grant or for finality; None waits for ever.
        outbox_maximum_bytes: see ``outbox.py``.
    """

    renew_at_permille: int = 500
    grant_steps: int = 1 << 20
    grant_duration_ms: int = 24 * 3_600_000
    closing_margin_ms: int = 2_000
    snapshot_every_steps: int = 20
    check_memorization_every_steps: int = 1
    checkpoint_every_steps: int = 100
    audit_snapshot_every_steps: int = 0
    pause_limit_seconds: float | None = None
    outbox_maximum_bytes: int = 1 << 30


def default_blocks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameter table by numbered layer, in the model's order."""
    table: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        numbered = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        table.setdefault(".".join(parts[: numbered + 1]), []).append(name)
    return {block: tuple(names) for block, names in table.items()}


def blocks_of(plan: CampaignPlan, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The plan's parameter table, which must hold each parameter once, whole or in pieces.

    Raises:
        Rejected: ``BAD_FIELD``. RoutingUnsupported: as ``head_blocks``.
    """
    by_head = plan.routing_granularity == HEAD
    default = head_blocks(model, default_blocks(model)) if by_head else default_blocks(model)
    table = dict(plan.blocks) if plan.blocks is not None else default
    expected = {name for name, _ in model.named_parameters()}
    entries = [name for names in table.values() for name in names]
    pieces = {name: piece.tensor for name in entries if name not in expected and (piece := piece_named(name))}
    of_heads = {name for names in default.values() for name in names} - expected
    if wrong := sorted(pieces.keys() ^ of_heads):
        raise Rejected(
            Reason.BAD_FIELD,
            f"routing granularity '{plan.routing_granularity}': the parameter table's pieces of tensors are not those"
            f" of heads: {wrong[:8]}",
        )
    if len(table) > p.MAX_BLOCKS:
        raise Rejected(
            Reason.BAD_FIELD, f"{len(table)} parameter blocks, at most {p.MAX_BLOCKS} allowed: put several in one"
        )
    listed = [name for name in entries if name not in pieces] + sorted(set(pieces.values()))
    if sorted(listed) != sorted(expected):
        wrong = sorted(set(listed) ^ expected) or sorted({name for name in listed if listed.count(name) > 1})
        raise Rejected(Reason.BAD_FIELD, f"the parameter table must hold each parameter once: {wrong}")
    return table


def sketch_ranks_of(plan: CampaignPlan, model: nn.Module) -> dict[str, int]:
    """The plan's higher ranks of sketches, by name in the parameter table.

    Raises:
        Rejected: ``BAD_FIELD`` without a ``sketch_rank``, for a block that the table does not have, or a rank below
            ``sketch_rank`` or above 64; as ``blocks_of``.
    """
    if not plan.sketch_ranks:
        return {}
    if not plan.sketch_rank:
        raise Rejected(Reason.BAD_FIELD, "sketch_ranks: with sketch_rank 0 nothing is sketched")
    table = blocks_of(plan, model)
    for block, rank in plan.sketch_ranks.items():
        if block not in table:
            raise Rejected(Reason.BAD_FIELD, f"sketch_ranks: there is no parameter block {block!a}")
        if not plan.sketch_rank <= rank <= p.MAX_SKETCH_RANK:
            expected = f"{plan.sketch_rank} (sketch_rank) to {p.MAX_SKETCH_RANK}"
            raise Rejected(Reason.BAD_FIELD, f"sketch_ranks: expected {expected} for {block!a}, found {rank}")
    return {name: rank for block, rank in plan.sketch_ranks.items() for name in table[block]}


def manifest_of(sources: Sequence[TrainingSource[E]]) -> tuple[p.ManifestRange, ...]:
    """Every example of every source, sources in order of id."""
    return tuple(
        p.ManifestRange(source.id, 0, len(source.examples)) for source in sorted(sources, key=lambda source: source.id)
    )


def campaign_terms(
    plan: CampaignPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: object,
    *,
    policy: bytes,
    job_key: bytes,
    base_root: Digest,
    environment: tuple[p.Setting, ...],
    base_losses_sha256: bytes,
) -> p.Campaign:
    """What the ``campaign`` event fixes, besides the manifest.

    Raises:
        ConfigError: one of the plan's files cannot be read.
    """
    tensors = committed_tensors(model)
    return p.Campaign(
        name=plan.name,
        purpose=plan.purpose,
        policy=policy,
        job_key=job_key,
        base_model=plan.base_model,
        base_root=base_root,
        base_provenance=plan.base_provenance,
        parameter_blocks=tuple(
            p.ParameterBlock(
                block,
                tuple(
                    p.Tensor(name, SAFETENSORS_DTYPES[held.dtype], tuple(held.shape))
                    for name, held in ((name, part_of_entry(tensors, name)) for name in names)
                ),
            )
            for block, names in blocks_of(plan, model).items()
        ),
        routing_granularity=plan.routing_granularity,
        event_granularity=plan.event_granularity,
        sampler_seed=plan.sampler_seed,
        batch_size=plan.batch_size,
        planned_steps=plan.planned_steps,
        hyperparameters=_hyperparameters(plan, optimizer, scheduler),
        environment=environment,
        factors_digest=plan.factors_digest,
        accumulator_window_steps=plan.accumulator_window_steps,
        sketch_rank=plan.sketch_rank,
        base_losses_sha256=base_losses_sha256,
    )


def check_content(source: TrainingSource[E], claim: p.SourceClaim) -> None:
    """No more examples are at hand than claimed, and with ``content_salt`` exactly those claimed.

    Raises:
        Rejected: ``COUNTS_NOT_CONSERVED`` or ``DIGEST_MISMATCH``.
    """
    if len(source.examples) > claim.example_count:
        raise Rejected(
            Reason.COUNTS_NOT_CONSERVED,
            f"'{claim.name}' claims {claim.example_count} examples, {len(source.examples)} are here",
        )
    if source.content_salt is None:
        return
    leaves = []
    for index, example in enumerate(source.examples):
        if not isinstance(example, bytes):
            raise Rejected(Reason.BAD_FIELD, f"examples of '{claim.name}' are checked as bytes")
        leaves.append(p.content_leaf(p.content_salt(source.content_salt, index), example))
    root = root_of(leaves)
    if root != claim.content_root:
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"examples of '{claim.name}' have root {root.hex()}, claimed is {claim.content_root.hex()}",
        )


def stepping_settings(optimizer: torch.optim.Optimizer, scheduler: object) -> dict[str, str]:
    """What steps the parameters, by name: the optimizer's class and options, and the schedule's (``schedule.py``)."""
    options = {
        f"optimizer.{number}.{name}": repr(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in ("params", "param_names")  # the parameter table has the names
    }
    return {"optimizer": type(optimizer).__name__, **options, **schedule_settings(scheduler)}


def _hyperparameters(plan: CampaignPlan, optimizer: torch.optim.Optimizer, scheduler: object) -> tuple[p.Setting, ...]:
    settings = {
        # What follows is what the job does, whatever it is called there.
        **{name: value for name, value in plan.hyperparameters.items() if not name.startswith(SKETCH_RANK_OF)},
        **{f"{SKETCH_RANK_OF}{block}": str(rank) for block, rank in plan.sketch_ranks.items()},
        "clip_norm": repr(plan.clip_norm),
        **stepping_settings(optimizer, scheduler),
        **{f"files.{name}.sha256": _sha256_of(path) for name, path in plan.files.items()},
    }
    return tuple(p.Setting(name, value) for name, value in sorted(settings.items()))


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"files: {path}: expected a file to record, found: {error.strerror}") from error
