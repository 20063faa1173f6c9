"""What a step must satisfy: the part of admission that every training step goes through.

Inside an open grant, chained to the campaign's last event and parameter root; presented examples exactly the
sampler's; admitted ones granted, refused ones recorded before, and those of a source's reserve (``reserve.py``)
neither, but counted; profiles at or below the policy's; a parameter block that no admitted example may touch has not
moved, none has in a skipped step; one clip factor over all of them only where the policy admits it; windows of
accumulators are committed where they end; momentum of revoked sources is accounted for (``momentum_rules.py``).

What a step shares with the campaign's other events is in ``campaign_rules.py``.
"""

from array import array
from collections import Counter
from collections.abc import Mapping

from consensus import portions as p
from consensus.accumulators import ends_window
from consensus.campaign_rules import changed, check_none_reserved, check_refusal_reason, job_event, open_grant
from consensus.event import CheckedEvent
from consensus.membership import Committee
from consensus.momentum_rules import check_momentum, record_settled, undo_counts
from consensus.policy import check_profile
from consensus.rejection import Reason, Rejected
from consensus.reserve import RESERVED, reserved_among
from consensus.sampler import presented_by_source
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    CampaignRecord,
    GrantRecord,
    SourceRecord,
    StateView,
    Usage,
    merge_counts,
    usage_key,
)


def admit_step(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check a step against grant, chain, sampler and policy, and move the campaign's head by it.

    Raises:
        Rejected: with the rule it breaks.
    """
    governance, operation = event.governance, event.operation
    assert isinstance(governance, p.StepGovernance)
    assert isinstance(operation, p.StepOperation)
    campaign, head = job_event(view, event, timestamp_ms)
    if head.rollback_required:
        raise Rejected(Reason.ROLLBACK_REQUIRED, "the last step's memorization signal is above the threshold")
    grant, policy = open_grant(view, event, governance.grant, governance.policy, operation.index, timestamp_ms)
    _check_step_chain(governance, operation, campaign, head)
    _check_accumulators(operation, campaign)
    uses = tuple(item for item in event.items if isinstance(item, p.SourceUse))
    for held in head.pending:
        check_refusal_reason(view, held.source, held.reason, campaign, grant, policy)
    _check_uses(view, event, uses, campaign, head, grant, operation.index)
    _check_step_totals(uses, governance)
    _check_profiles(uses, governance, operation, policy, campaign)
    _check_ties(governance, operation, policy)
    flagged = _check_memorization(event, uses, operation, policy)
    settled = check_momentum(view, event.entry.campaign, campaign, grant, policy, governance, operation)
    counts = undo_counts(view, event.entry.campaign, uses, settled)
    for use in uses:
        _record_usage(view, event.entry.campaign, use, operation.index)
    record_settled(view, event.entry.campaign, settled, policy.momentum)
    view.put(
        CAMPAIGN_HEAD_TABLE + event.entry.campaign,
        changed(
            head,
            next_sequence=head.next_sequence + 1,
            steps=operation.index,
            root=operation.root_after,
            last_event=event.id,
            undo_root=operation.root_before,
            undo_counts=counts,
            rollback_required=flagged,
            pending=(),
            presented=head.presented + governance.presented,
            admitted=head.admitted + governance.admitted,
            refused=head.refused + sum(count.count for count in governance.refused),
        ),
    )


def _check_step_chain(
    governance: p.StepGovernance, operation: p.StepOperation, campaign: CampaignRecord, head: CampaignHead
) -> None:
    if operation.index != head.steps + 1:
        raise Rejected(Reason.STEP_CHAIN_BROKEN, f"step {operation.index}, the campaign's next is {head.steps + 1}")
    if governance.index != operation.index:
        raise Rejected(
            Reason.BAD_FIELD, f"step {operation.index} is number {governance.index} in its governance portion"
        )
    if operation.index > campaign.planned_steps:
        raise Rejected(Reason.OUTSIDE_GRANT, f"the campaign plans {campaign.planned_steps} steps")
    if operation.previous != head.last_event:
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN,
            f"previous is {operation.previous.hex()}, the campaign's last event is {head.last_event.hex()}",
        )
    if operation.root_before != head.root:
        raise Rejected(
            Reason.PARAMETER_ROOT_BROKEN,
            f"starts from {operation.root_before.hex()}, the campaign stands at {head.root.hex()}",
        )


def _check_accumulators(operation: p.StepOperation, campaign: CampaignRecord) -> None:
    """The step that ends a window commits to its sums, and no other does: no window can be left out."""
    due = ends_window(campaign.accumulator_window_steps, campaign.planned_steps, operation.index)
    if due != bool(operation.accumulator_root):
        expected = "ends a window and commits to its sums" if due else "ends no window of accumulators"
        found = operation.accumulator_root.hex() or "none"
        raise Rejected(
            Reason.ACCUMULATORS_INCOMPLETE, f"step {operation.index} {expected}, its accumulator root is {found}"
        )


def _check_uses(
    view: StateView,
    event: CheckedEvent,
    uses: tuple[p.SourceUse, ...],
    campaign: CampaignRecord,
    head: CampaignHead,
    grant: GrantRecord,
    index: int,
) -> None:
    """Presented = admitted + refused, example by example, and admitted sources are granted."""
    assert event.portions.data is not None
    sources = [use.source for use in uses]
    if sources != sorted(set(sources)):
        raise Rejected(Reason.BAD_FIELD, "sources of a step are not in strictly increasing order")
    pending_of: dict[bytes, list[int]] = {}
    refused: dict[bytes, Counter[str]] = {}
    for pending in head.pending:
        pending_of.setdefault(pending.source, []).extend(pending.examples)
        refused.setdefault(pending.source, Counter())[pending.reason] += len(pending.examples)
    presented = presented_by_source(campaign.manifest, campaign.sampler_seed, campaign.batch_size, index)
    accounted: dict[bytes, array[int]] = {}
    for use, item in zip(uses, event.portions.data.items, strict=True):
        record = view.get(SOURCE_TABLE + use.source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
        if use.content_class != record.claim.content_class:
            raise Rejected(
                Reason.BAD_FIELD,
                f"class of '{record.claim.name}' is '{record.claim.content_class}', not '{use.content_class}'",
            )
        if use.admitted and use.source not in grant.sources:
            raise Rejected(Reason.SOURCE_NOT_GRANTED, f"'{record.claim.name}' was trained on without a grant")
        reserved = reserved_among(record.claim, presented.get(use.source, ()))
        if reserved:
            check_none_reserved(record.claim, set(reserved).intersection(item.examples))
            pending_of.setdefault(use.source, []).extend(reserved)
            refused.setdefault(use.source, Counter())[RESERVED] += len(reserved)
        expected = tuple(p.Count(reason, count) for reason, count in sorted(refused.pop(use.source, {}).items()))
        if use.refused != expected:
            raise Rejected(
                Reason.COUNTS_NOT_CONSERVED,
                f"refusals of '{record.claim.name}' are not those recorded before the step and those of its reserve",
            )
        if use.presented != use.admitted + sum(count.count for count in use.refused):
            raise Rejected(Reason.COUNTS_NOT_CONSERVED, f"presented of '{record.claim.name}' is not admitted + refused")
        listed = sorted((*item.examples, *pending_of[use.source])) if use.source in pending_of else item.examples
        accounted[use.source] = array("Q", listed)
    if refused or accounted != presented:
        for source in refused:
            accounted[source] = array("Q", pending_of[source])
        claimed, due = _counted(accounted), _counted(presented)
        raise Rejected(
            Reason.COUNTS_NOT_CONSERVED,
            f"step {index} accounts for {claimed.total()} examples, {due.total()} were presented; "
            f"{(claimed - due).total()} too many, {(due - claimed).total()} missing",
        )


def _counted(examples: Mapping[bytes, "array[int]"]) -> Counter[tuple[bytes, int]]:
    return Counter((source, example) for source, listed in examples.items() for example in listed)


def _check_step_totals(uses: tuple[p.SourceUse, ...], governance: p.StepGovernance) -> None:
    refused: tuple[p.Count, ...] = ()
    for use in uses:
        refused = merge_counts(refused, use.refused)
    totals = (sum(use.presented for use in uses), sum(use.admitted for use in uses), refused)
    if totals != (governance.presented, governance.admitted, governance.refused):
        raise Rejected(Reason.COUNTS_NOT_CONSERVED, "the step's totals are not the sums over its sources")


def _check_profiles(
    uses: tuple[p.SourceUse, ...],
    governance: p.StepGovernance,
    operation: p.StepOperation,
    policy: p.Policy,
    campaign: CampaignRecord,
) -> None:
    applied = [(profile.content_class, profile.band) for profile in governance.profiles]
    if applied != sorted(set(applied)):
        raise Rejected(Reason.BAD_FIELD, "a step states the profile of each class and entropy band once, in order")
    admitted: Counter[str] = Counter()
    for use in uses:
        admitted[use.content_class] += use.admitted
    stated = Counter(content_class for content_class, _ in applied)
    if stated.keys() != (+admitted).keys() or not stated <= admitted:
        raise Rejected(
            Reason.BAD_FIELD, "a step states a profile for each admitted class, and for no more bands than examples"
        )
    for profile in governance.profiles:
        check_profile(policy, profile, campaign.blocks)
    if len(operation.deltas) != len(campaign.blocks):
        raise Rejected(
            Reason.BAD_FIELD,
            f"{len(operation.deltas)} deltas, the campaign has {len(campaign.blocks)} parameter blocks",
        )
    for number, (block, delta) in enumerate(zip(campaign.blocks, operation.deltas, strict=True)):
        if delta.norm_micro and not any(profile.weights_permille[number] for profile in governance.profiles):
            raise Rejected(Reason.DEPTH_ABOVE_MAXIMUM, f"block '{block}' moved, no admitted example may touch it")
    may_move = any(any(profile.weights_permille) for profile in governance.profiles)
    if not may_move and operation.root_after != operation.root_before:
        raise Rejected(
            Reason.PARAMETER_ROOT_BROKEN,
            f"the root became {operation.root_after.hex()}, no admitted example may touch any parameter block",
        )


def _check_ties(governance: p.StepGovernance, operation: p.StepOperation, policy: p.Policy) -> None:
    """One factor over all blocks only where the policy admits it; a skipped step had examples and moved nothing."""
    if governance.global_clip_nano and not policy.global_clipping:
        raise Rejected(
            Reason.GLOBAL_CLIPPING_NOT_ADMITTED,
            "the gradients of all parameter blocks were scaled by one factor, the policy has each clipped on its own",
        )
    if not governance.skipped:
        return
    if not governance.admitted:
        raise Rejected(Reason.BAD_FIELD, "a step without an admitted example has nothing to skip")
    if operation.root_after != operation.root_before or any(delta.norm_micro for delta in operation.deltas):
        raise Rejected(Reason.PARAMETER_ROOT_BROKEN, "a skipped step moves no parameter")


def _check_memorization(
    event: CheckedEvent, uses: tuple[p.SourceUse, ...], operation: p.StepOperation, policy: p.Policy
) -> bool:
    assert event.portions.data is not None
    signalled = {signal.source for signal in operation.memorization}
    admitted = {
        use.source: frozenset(item.examples)
        for use, item in zip(uses, event.portions.data.items, strict=True)
        if use.source in signalled
    }
    for signal in operation.memorization:
        if signal.example not in admitted.get(signal.source, ()):
            raise Rejected(Reason.BAD_FIELD, f"a memorization signal names example {signal.example}, not in this step")
    return any(signal.signal_permille > policy.memorization_threshold_permille for signal in operation.memorization)


def _record_usage(view: StateView, campaign: bytes, use: p.SourceUse, index: int) -> None:
    key = usage_key(campaign, use.source)
    held = view.find(key, Usage) or Usage(campaign, use.source, 0, 0, (), 0, index, index, "")
    view.put(
        key,
        Usage(
            campaign,
            use.source,
            held.presented + use.presented,
            held.admitted + use.admitted,
            merge_counts(held.refused, use.refused),
            held.discarded,
            held.first_step,
            max(held.last_step, index),
            "" if use.admitted else held.momentum,
        ),
    )
