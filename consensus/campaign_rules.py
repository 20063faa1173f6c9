"""What a job may write into its campaign: refusals, rollbacks, abandon, release, and what all of it and steps share.

The second half of admission (``admission.py`` dispatches here). A campaign's head in the state says where it
stands; every event here is by the campaign's job key, next in sequence, and moves that head by one:

* *step*: ``step_rules.py``.
* *refusal*: the true reason, before its step. One that leaves no room in the head for undoing the last step gives that
  up: of 256 sources and 4,096 examples refused step after step, the head cannot hold both (ADR 040).
* *rollback*: restores a root on the log, and must follow a step whose memorization signal is above the policy's
  threshold. *release*: the root on the log, with no finding open, and what the campaign committed to in custody
  (``custody_rules.py``).
"""

from collections import Counter
from collections.abc import Collection

import msgspec

from consensus import portions as p
from consensus.codec import encode
from consensus.custody_rules import check_in_custody
from consensus.event import CheckedEvent
from consensus.job_key import scheme_of
from consensus.membership import Committee
from consensus.membership_change import holder
from consensus.momentum_rules import is_revoked_under
from consensus.policy import DISCRETIONARY_REFUSALS, REVOCATION_VOID, why_refused
from consensus.rejection import Reason, Rejected
from consensus.reserve import reserved_among
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
from consensus.state_map import MAX_VALUE_BYTES

ROLLBACK_REASONS = frozenset(
    {
        Reason.MEMORIZATION_ABOVE_THRESHOLD.value,
        Reason.GRANT_CLOSED.value,
        "step-not-admitted",
        "operator-decision",
    }
)

ROOM_BYTES = 4_096
"""A head with refusals for the next step keeps so many bytes free, for all else that comes before that step: 64 open
findings, numbers that grow, a new job key. Refusals that would leave less are themselves refused."""


def admit_refusal(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check refusals of examples presented to the next step; they wait in the head for that step.

    Where they leave no room for it the last step can be undone no more.

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
    grant, policy = open_grant(view, event, governance.grant, governance.policy, operation.index, timestamp_ms)
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
        claim = check_refusal_reason(view, refusal.source, refusal.reason, campaign, grant, policy)
        check_none_reserved(claim, reserved_among(claim, item.examples))
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
    moved = changed(
        head,
        next_sequence=head.next_sequence + 1,
        pending=tuple(held for _, held in sorted(pending.items())),
        refusal_events=head.refusal_events + 1,
    )
    if len(encode(moved)) > MAX_VALUE_BYTES - ROOM_BYTES:
        moved = changed(moved, undo_root=b"", undo_counts=())
        size_bytes = len(encode(moved))
        if size_bytes > MAX_VALUE_BYTES - ROOM_BYTES:
            # A source refused for several reasons, by several grants. While such filled the head no audit could bar
            # the release, for want of room.
            raise Rejected(
                Reason.OVERSIZED,
                f"a CampaignHead of {size_bytes} bytes with refusals, at most {MAX_VALUE_BYTES - ROOM_BYTES} allowed",
            )
    view.put(CAMPAIGN_HEAD_TABLE + event.entry.campaign, moved)


def check_refusal_reason(
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
        raise Rejected(
            Reason.NOTHING_TO_ROLL_BACK,
            "the campaign's last event is not a step, or the refusals recorded since left no room for undoing it",
        )
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


def open_grant(
    view: StateView, event: CheckedEvent, grant_id: bytes, policy_id: bytes, index: int, timestamp_ms: int
) -> tuple[GrantRecord, p.Policy]:
    """The grant a step or refusal names is open and covers it; the grant and its policy.

    Raises:
        Rejected: ``UNKNOWN_GRANT``, ``OUTSIDE_GRANT``, ``POLICY_NOT_IN_FORCE``, ``UNKNOWN_JOB_KEY``, ``GRANT_CLOSED``,
            ``SOURCE_REVOKED``.
    """
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


def check_none_reserved(claim: p.SourceClaim, reserved: Collection[int]) -> None:
    """None of a source's ``reserved`` examples is where no event may name one.

    Raises:
        Rejected: ``RESERVED_FOR_CALIBRATION``.
    """
    if reserved:
        raise Rejected(Reason.RESERVED_FOR_CALIBRATION, f"example {min(reserved)} of '{claim.name}' is of its reserve")


def changed(head: CampaignHead, **fields: object) -> CampaignHead:
    """The head with ``fields`` replaced."""
    return msgspec.structs.replace(head, **fields)
