"""What a job may write into its campaign: steps, refusals, rollbacks, abandon, release.

The second half of admission (``admission.py`` dispatches here). A campaign's head in the state says where it
stands; every event here is by the campaign's job key, next in sequence, and moves that head by one:

* *step*: inside an open grant, chained to the last event and parameter root; presented examples exactly the
  sampler's; admitted ones granted, refused ones recorded before, and those of a source's reserve (``reserve.py``)
  neither, but counted; profiles at or below the policy's; a parameter block that no admitted example may touch has not
  moved, none has in a skipped step; one clip factor over all of them only where the policy admits it; windows of
  accumulators are committed where they end; momentum of revoked sources is accounted for (``momentum_rules.py``).
* *refusal*: the true reason, before its step. *rollback*: restores a root on the log, and must follow a step
  whose memorization signal is above the policy's threshold. *release*: the root on the log, with no finding open,
  and what the campaign committed to in custody (``custody_rules.py``).
"""

from array import array
from collections import Counter
from collections.abc import Collection, Mapping

import msgspec

from consensus import portions as p
from consensus.accumulators import ends_window
from consensus.custody_rules import check_in_custody
from consensus.event import CheckedEvent
from consensus.job_key import scheme_of
from consensus.membership import Committee
from consensus.membership_change import holder
from consensus.momentum_rules import check_momentum, is_revoked_under, record_settled, undo_counts
from consensus.policy import DISCRETIONARY_REFUSALS, REVOCATION_VOID, check_profile, why_refused
from consensus.rejection import Reason, Rejected
from consensus.reserve import RESERVED, reserved_among
from consensus.sampler import is_among, presented_by_source
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    DELEGATION_TABLE,
    GRANT_TABLE,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    CampaignRecord,
    DelegationRecord,
    GrantRecord,
    PendingRefusal,
    PolicyRecord,
    SourceCounts,
    SourceRecord,
    StateView,
    Usage,
    merge_counts,
    usage_key,
)

ROLLBACK_REASONS = frozenset(
    {
        Reason.MEMORIZATION_ABOVE_THRESHOLD.value,
        Reason.GRANT_CLOSED.value,
        "step-not-admitted",
        "operator-decision",
    }
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
    grant, policy = _open_grant(view, event, governance.grant, governance.policy, operation.index, timestamp_ms)
    _check_step_chain(governance, operation, campaign, head)
    _check_accumulators(operation, campaign)
    uses = tuple(item for item in event.items if isinstance(item, p.SourceUse))
    for held in head.pending:
        _check_refusal_reason(view, held.source, held.reason, campaign, grant, policy)
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
            _check_none_reserved(record.claim, set(reserved).intersection(item.examples))
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


def _check_none_reserved(claim: p.SourceClaim, reserved: Collection[int]) -> None:
    if reserved:
        raise Rejected(Reason.RESERVED_FOR_CALIBRATION, f"example {min(reserved)} of '{claim.name}' is of its reserve")


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


def admit_refusal(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check refusals of examples presented to the next step; they wait in the head for that step.

    Raises:
        Rejected: with the rule it breaks.
    """
    governance, operation = event.governance, event.operation
    assert isinstance(governance, p.RefusalGovernance)
    assert isinstance(operation, p.RefusalOperation)
    campaign, head = job_event(view, event, timestamp_ms)
    if head.rollback_required:
        raise Rejected(Reason.ROLLBACK_REQUIRED, "the last step's memorization signal is above the threshold")
    if operation.index != head.steps + 1:
        raise Rejected(Reason.STEP_CHAIN_BROKEN, f"refusal for step {operation.index}, the next is {head.steps + 1}")
    grant, policy = _open_grant(view, event, governance.grant, governance.policy, operation.index, timestamp_ms)
    refusals = tuple(item for item in event.items if isinstance(item, p.SourceRefusal))
    named = [(refusal.source, refusal.reason) for refusal in refusals]
    if named != sorted(set(named)):
        raise Rejected(Reason.BAD_FIELD, "refusals are not in strictly increasing order of source and reason")
    assert event.portions.data is not None
    pending = {(held.source, held.reason): held for held in head.pending}
    taken = {(held.source, example) for held in head.pending for example in held.examples}
    presented = presented_by_source(campaign.manifest, campaign.sampler_seed, campaign.batch_size, operation.index)
    totals: Counter[str] = Counter()
    for refusal, item in zip(refusals, event.portions.data.items, strict=True):
        claim = _check_refusal_reason(view, refusal.source, refusal.reason, campaign, grant, policy)
        _check_none_reserved(claim, reserved_among(claim, item.examples))
        for example in item.examples:
            if (refusal.source, example) in taken or not is_among(presented, refusal.source, example):
                raise Rejected(
                    Reason.COUNTS_NOT_CONSERVED,
                    f"example {example} of source {refusal.source.hex()} is refused twice or was not presented",
                )
            taken.add((refusal.source, example))
        totals[refusal.reason] += refusal.count
        earlier = pending.get((refusal.source, refusal.reason))
        examples = tuple(sorted((*(earlier.examples if earlier else ()), *item.examples)))
        pending[(refusal.source, refusal.reason)] = PendingRefusal(refusal.source, refusal.reason, examples)
    if governance.refused != tuple(p.Count(reason, count) for reason, count in sorted(totals.items())):
        raise Rejected(Reason.COUNTS_NOT_CONSERVED, "the refusal's totals are not the sums over its sources")
    view.put(
        CAMPAIGN_HEAD_TABLE + event.entry.campaign,
        changed(
            head,
            next_sequence=head.next_sequence + 1,
            pending=tuple(held for _, held in sorted(pending.items())),
            refusal_events=head.refusal_events + 1,
        ),
    )


def _check_refusal_reason(
    view: StateView, source: bytes, named: str, campaign: CampaignRecord, grant: GrantRecord, policy: p.Policy
) -> p.SourceClaim:
    """The reason named is the one that holds under the grant (which the step must share with its refusals).

    Returns the source's claim.
    """
    record = view.get(SOURCE_TABLE + source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
    if source in grant.sources:
        allowed = DISCRETIONARY_REFUSALS
    else:
        revoked = is_revoked_under(grant, record)
        reason = why_refused(policy, record.claim, revoked, campaign.purpose, grant.opened_at_ms, grant.closes_at_ms)
        allowed = frozenset({(reason or Reason.SOURCE_NOT_GRANTED).value})
    if named not in allowed:
        raise Rejected(
            Reason.BAD_FIELD,
            f"'{record.claim.name}' refused as '{named}', expected {' or '.join(sorted(allowed))}",
        )
    return record.claim


def admit_rollback(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check a rollback and put the campaign back where it stood before the step it discards.

    Raises:
        Rejected: with the rule it breaks.
    """
    governance, rollback = event.governance, event.operation
    assert isinstance(governance, p.RollbackGovernance)
    assert isinstance(rollback, p.Rollback)
    _, head = job_event(view, event, timestamp_ms)
    grant = view.get(GRANT_TABLE + governance.grant, GrantRecord, Reason.UNKNOWN_GRANT, "grant")
    if (grant.campaign, grant.policy) != (event.entry.campaign, governance.policy):
        raise Rejected(Reason.UNKNOWN_GRANT, "the grant is another campaign's or under another policy")
    if rollback.reason not in ROLLBACK_REASONS:
        raise Rejected(Reason.BAD_FIELD, f"reason '{rollback.reason}', expected {', '.join(sorted(ROLLBACK_REASONS))}")
    if rollback.next_attempt != head.attempt + 1:
        raise Rejected(Reason.STEP_CHAIN_BROKEN, f"the next attempt is {head.attempt + 1}")
    if len(set(rollback.discarded)) != len(rollback.discarded):
        raise Rejected(Reason.DUPLICATE, "a discarded step is named twice")
    undoes_last = head.last_event in rollback.discarded
    if undoes_last and rollback.discarded[-1] != head.last_event:
        raise Rejected(Reason.BAD_FIELD, "discarded steps are not newest first: the one on the log comes last")
    if head.rollback_required and not undoes_last:
        raise Rejected(Reason.ROLLBACK_REQUIRED, f"the rollback must discard step {head.last_event.hex()}")
    if rollback.reason == Reason.MEMORIZATION_ABOVE_THRESHOLD and not head.rollback_required:
        raise Rejected(Reason.NOTHING_TO_ROLL_BACK, "no step on the log is above the memorization threshold")
    if undoes_last and not head.undo_root:
        raise Rejected(Reason.NOTHING_TO_ROLL_BACK, "the campaign's last event is not a step")
    restored = head.undo_root if undoes_last else head.root
    if rollback.restored_root != restored:
        raise Rejected(
            Reason.PARAMETER_ROOT_BROKEN,
            f"restores {rollback.restored_root.hex()}, expected {restored.hex()}",
        )
    steps = head.steps - 1 if undoes_last else head.steps
    if rollback.next_index != steps + 1:
        raise Rejected(Reason.STEP_CHAIN_BROKEN, f"the next step is {steps + 1}, not {rollback.next_index}")
    presented = admitted = refused = 0
    if undoes_last:
        for counts in head.undo_counts:
            _take_back(view, event.entry.campaign, counts)
            presented += counts.presented
            admitted += counts.admitted
            refused += sum(count.count for count in counts.refused)
    view.put(
        CAMPAIGN_HEAD_TABLE + event.entry.campaign,
        changed(
            head,
            next_sequence=head.next_sequence + 1,
            attempt=rollback.next_attempt,
            steps=steps,
            root=restored,
            last_event=event.id,
            undo_root=b"",
            undo_counts=(),
            rollback_required=False,
            pending=(),
            presented=head.presented - presented,
            admitted=head.admitted - admitted,
            refused=head.refused - refused,
            discarded_steps=head.discarded_steps + len(rollback.discarded),
            rollbacks=head.rollbacks + 1,
        ),
    )


def _take_back(view: StateView, campaign: bytes, counts: SourceCounts) -> None:
    key = usage_key(campaign, counts.source)
    held = view.get(key, Usage, Reason.UNKNOWN_SOURCE, "usage")
    view.put(
        key,
        Usage(
            campaign,
            counts.source,
            held.presented - counts.presented,
            held.admitted - counts.admitted,
            merge_counts(held.refused, counts.refused, sign=-1),
            held.discarded + counts.admitted,
            held.first_step,
            held.last_step,
            counts.momentum,
        ),
    )


def admit_abandon(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Close a campaign without a release.

    Raises:
        Rejected: with the rule it breaks.
    """
    _, head = job_event(view, event, timestamp_ms)
    view.put(
        CAMPAIGN_HEAD_TABLE + event.entry.campaign,
        changed(head, next_sequence=head.next_sequence + 1, closed="abandoned"),
    )


def admit_release(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Close a campaign with the root that the log holds for it.

    Raises:
        Rejected: with the rule it breaks.
    """
    release = event.operation
    assert isinstance(release, p.Release)
    campaign, head = job_event(view, event, timestamp_ms)
    if head.rollback_required:
        raise Rejected(Reason.ROLLBACK_REQUIRED, "the last step's memorization signal is above the threshold")
    if head.pending:
        raise Rejected(Reason.COUNTS_NOT_CONSERVED, "refusals are recorded for a step that is not on the log")
    if head.open_findings:
        raise Rejected(
            Reason.FINDING_OPEN,
            f"{len(head.open_findings)} evaluations bar the release, the first is {head.open_findings[0].hex()}",
        )
    if (release.parameter_root, release.steps) != (head.root, head.steps):
        raise Rejected(
            Reason.ROOT_NOT_FINAL,
            f"releases {release.parameter_root.hex()} after {release.steps} steps, the log stands at "
            f"{head.root.hex()} after {head.steps}",
        )
    check_in_custody(view, event.entry.campaign, campaign, head, committee)
    view.put(
        CAMPAIGN_HEAD_TABLE + event.entry.campaign,
        changed(head, next_sequence=head.next_sequence + 1, closed="released", release=event.id),
    )


def check_sequence(found: int, expected: int, what: str) -> None:
    """The number found is the next one expected.

    Raises:
        Rejected: ``DUPLICATE`` for an earlier number, ``SEQUENCE_GAP`` for a later one.
    """
    if found < expected:
        raise Rejected(Reason.DUPLICATE, f"{what} {found} is already on the log")
    if found > expected:
        raise Rejected(Reason.SEQUENCE_GAP, f"{what} {found}, the next is {expected}")


def check_job_key(view: StateView, event: CheckedEvent, job_key: bytes, timestamp_ms: int) -> DelegationRecord:
    """The event's one signature is by ``job_key``, delegated by its author for its campaign, now: its delegation."""
    held = event.entry.signatures[0]
    signer = held.signer
    delegation = view.get(DELEGATION_TABLE + signer, DelegationRecord, Reason.UNKNOWN_JOB_KEY, "job key")
    if signer != job_key or delegation.replaced:
        raise Rejected(Reason.UNKNOWN_JOB_KEY, f"signed by {signer.hex()}, the campaign's job key is {job_key.hex()}")
    if holder(view, delegation.operator) != event.entry.author:
        raise Rejected(Reason.WRONG_AUTHOR, "the job key was delegated by another operator")
    if delegation.campaign != event.entry.campaign:
        raise Rejected(Reason.UNKNOWN_JOB_KEY, "the job key was delegated for another campaign")
    if scheme_of(held.signature) != delegation.scheme:
        raise Rejected(
            Reason.UNKNOWN_JOB_KEY,
            f"signed with {scheme_of(held.signature).label}, the job key was delegated for {delegation.scheme.label}",
        )
    if not delegation.not_before_ms <= timestamp_ms < delegation.expires_at_ms:
        raise Rejected(
            Reason.JOB_KEY_EXPIRED,
            f"valid from {delegation.not_before_ms} until {delegation.expires_at_ms} ms, it is {timestamp_ms} ms",
        )
    return delegation


def open_campaign(view: StateView, event: CheckedEvent) -> tuple[CampaignRecord, CampaignHead]:
    """Record and head of the event's campaign, which is its author's and still open.

    Raises:
        Rejected: ``UNKNOWN_CAMPAIGN``, ``WRONG_AUTHOR`` or ``CAMPAIGN_CLOSED``.
    """
    identifier = event.entry.campaign
    campaign = view.get(CAMPAIGN_TABLE + identifier, CampaignRecord, Reason.UNKNOWN_CAMPAIGN, "campaign")
    head = view.get(CAMPAIGN_HEAD_TABLE + identifier, CampaignHead, Reason.UNKNOWN_CAMPAIGN, "campaign")
    if event.entry.author != holder(view, campaign.operator):
        raise Rejected(Reason.WRONG_AUTHOR, "the campaign is another operator's")
    if head.closed:
        raise Rejected(Reason.CAMPAIGN_CLOSED, f"the campaign is {head.closed}")
    return campaign, head


def job_event(view: StateView, event: CheckedEvent, timestamp_ms: int) -> tuple[CampaignRecord, CampaignHead]:
    """Checks common to what a job key writes: open campaign, its key, next in sequence, right attempt.

    Raises:
        Rejected: with the rule it breaks.
    """
    campaign, head = open_campaign(view, event)
    check_job_key(view, event, head.job_key, timestamp_ms)
    check_sequence(event.entry.sequence, head.next_sequence, "event")
    if event.entry.attempt != head.attempt:
        raise Rejected(Reason.STEP_CHAIN_BROKEN, f"attempt {event.entry.attempt}, the campaign is at {head.attempt}")
    return campaign, head


def _open_grant(
    view: StateView, event: CheckedEvent, grant_id: bytes, policy_id: bytes, index: int, timestamp_ms: int
) -> tuple[GrantRecord, p.Policy]:
    """The grant a step or refusal names is open and covers it."""
    grant = view.get(GRANT_TABLE + grant_id, GrantRecord, Reason.UNKNOWN_GRANT, "grant")
    if grant.campaign != event.entry.campaign:
        raise Rejected(Reason.OUTSIDE_GRANT, "the grant is another campaign's")
    if grant.policy != policy_id:
        raise Rejected(Reason.POLICY_NOT_IN_FORCE, f"the grant is under policy {grant.policy.hex()}")
    if grant.job_key != event.entry.signatures[0].signer:
        raise Rejected(Reason.UNKNOWN_JOB_KEY, "the grant is for another job key")
    if not grant.first_step <= index <= grant.last_step:
        raise Rejected(Reason.OUTSIDE_GRANT, f"step {index}, the grant is for {grant.first_step} to {grant.last_step}")
    if timestamp_ms > grant.closes_at_ms:
        raise Rejected(Reason.GRANT_CLOSED, f"closed at {grant.closes_at_ms} ms, it is {timestamp_ms} ms")
    policy = view.get(POLICY_TABLE + grant.policy, PolicyRecord, Reason.UNKNOWN_POLICY, "policy").policy
    if policy.revocation == REVOCATION_VOID:
        for source in grant.sources:
            record = view.get(SOURCE_TABLE + source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
            if record.revocation:
                raise Rejected(Reason.SOURCE_REVOKED, f"'{record.claim.name}' was revoked, which voids the grant")
    return grant, policy


def changed(head: CampaignHead, **fields: object) -> CampaignHead:
    """The head with ``fields`` replaced."""
    return msgspec.structs.replace(head, **fields)
