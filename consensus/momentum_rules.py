"""Momentum after a revocation: which revoked sources a step must account for, and that it does.

A source's gradients outlive it in the optimizer's moments. The first step that admits anything under a grant which
leaves out, as revoked, a source that an earlier standing step admitted settles it by the policy's ``momentum``:
it drops that state (``flush``), or says how much may be left of it (``carry``). What was carried is still flushed
once a policy says so. Members know from the state which sources are due; that the state was dropped is the operator's
claim, which a replay tests.
"""

from collections.abc import Iterable

import msgspec

from consensus import portions as p
from consensus.policy import MOMENTUM_FLUSH
from consensus.rejection import Reason, Rejected
from consensus.state import (
    SOURCE_TABLE,
    CampaignRecord,
    GrantRecord,
    SourceCounts,
    SourceRecord,
    StateView,
    Usage,
    usage_key,
)


def is_revoked_under(grant: GrantRecord, record: SourceRecord) -> bool:
    """Whether the source was revoked when the grant opened."""
    return bool(record.revocation) and record.revoked_at_ms <= grant.opened_at_ms


def is_due(settled: str, momentum: str) -> bool:
    """Whether a revoked source's momentum, ``settled`` so far as its usage says, is to be settled by ``momentum``."""
    return settled not in (MOMENTUM_FLUSH, momentum)


def check_momentum(
    view: StateView,
    campaign_id: bytes,
    campaign: CampaignRecord,
    grant: GrantRecord,
    policy: p.Policy,
    governance: p.StepGovernance,
    operation: p.StepOperation,
) -> tuple[bytes, ...]:
    """The sources whose momentum the step settles, which are those that are due.

    Raises:
        Rejected: ``MOMENTUM_UNACCOUNTED``.
    """
    due = _due(view, campaign_id, campaign, grant, policy) if governance.admitted else ()
    flushed, carried = (due, ()) if policy.momentum == MOMENTUM_FLUSH else ((), due)
    for what, found, expected in (
        ("flushes", operation.flushed, flushed),
        ("carries", tuple(carried.source for carried in operation.carried), carried),
    ):
        if found != expected:
            raise Rejected(
                Reason.MOMENTUM_UNACCOUNTED,
                f"step {operation.index} {what} the momentum of {_named(found)}, due under the policy's"
                f" '{policy.momentum}' is that of {_named(expected)}",
            )
    return due


def undo_counts(
    view: StateView, campaign_id: bytes, uses: Iterable[p.SourceUse], settled: tuple[bytes, ...]
) -> tuple[SourceCounts, ...]:
    """What a rollback of the step takes back, source by source; asked before the step is counted."""

    def before(source: bytes) -> str:
        held = view.find(usage_key(campaign_id, source), Usage)
        return "" if held is None else held.momentum

    counts = {source: SourceCounts(source, 0, 0, (), before(source)) for source in settled}
    for use in uses:
        counts[use.source] = SourceCounts(use.source, use.presented, use.admitted, use.refused, before(use.source))
    return tuple(held for _, held in sorted(counts.items()))


def record_settled(view: StateView, campaign_id: bytes, settled: tuple[bytes, ...], momentum: str) -> None:
    """Say in their usage what became of these sources' momentum."""
    for source in settled:
        key = usage_key(campaign_id, source)
        held = view.get(key, Usage, Reason.UNKNOWN_SOURCE, "usage")
        view.put(key, msgspec.structs.replace(held, momentum=momentum))


def _due(
    view: StateView, campaign_id: bytes, campaign: CampaignRecord, grant: GrantRecord, policy: p.Policy
) -> tuple[bytes, ...]:
    found = []
    for source in {held.source for held in campaign.manifest}.difference(grant.sources):
        usage = view.find(usage_key(campaign_id, source), Usage)
        if usage is not None and usage.admitted and is_due(usage.momentum, policy.momentum):
            record = view.get(SOURCE_TABLE + source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
            if is_revoked_under(grant, record):
                found.append(source)
    return tuple(sorted(found))


def _named(sources: tuple[bytes, ...]) -> str:
    if not sources:
        return "no source"
    return f"{len(sources)} sources, the first is {sources[0].hex()}"
