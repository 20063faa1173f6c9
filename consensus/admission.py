"""Admission: what an event must satisfy against the state of the log, and how it changes it.

``admit(view, event, timestamp_ms, committee)`` either puts the event's changes into the view or raises
``Rejected`` and leaves it untouched. ``event.check_event`` has already checked all that needs no state.
Time is the ledger block's timestamp, the same for every validator.

The rules, by kind (DESIGN of the protocol: ``docs/protocol.md``, section "Admission"):

* *policy*: well formed, signed with schemes it admits. In force from its ledger block on, for grants that come after.
* *source*: a sane window. *revocation*: by the source's author, once.
* *delegation*: one job key for a campaign; a replacement names the campaign's exact head.
* *campaign*: by its delegated job key, under the policy in force, over registered sources.
* *evidence*: the first of its member, epoch and offence. *membership*: ``membership_change.py``.
* *grant*: every named source admitted by the policy in force until the grant closes, with the
  signature of each one's authority; within the policy's bounds; for the campaign's current job key.
* steps: ``step_rules.py``. Refusals, rollbacks, abandon, release: ``campaign_rules.py``.
* evaluations, decisions: ``review_rules.py``. Audit challenges, audit results: ``audit_rules.py``.
"""

from collections.abc import Callable, Sequence

import msgspec

from consensus import audit_rules, campaign_rules, custody_rules, review_rules, step_rules
from consensus import portions as p
from consensus.campaign_rules import changed, check_job_key, check_sequence, open_campaign
from consensus.event import CheckedEvent, Kind
from consensus.evidence import EvidenceReport, convicted
from consensus.identifiers import Digest, MemberId, Role
from consensus.job_key import check_job_key_id
from consensus.membership import Committee
from consensus.membership_change import MembershipChange, admit_change, holder, holders
from consensus.pieces import HEAD, piece_named, whole_tensors
from consensus.policy import check_author_scheme, check_grant_terms, check_policy, why_refused
from consensus.rejection import Reason, Rejected
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    DELEGATION_TABLE,
    EVIDENCE_TABLE,
    GRANT_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    CampaignRecord,
    DelegationRecord,
    EvidenceRecord,
    GrantRecord,
    PolicyHead,
    PolicyRecord,
    SourceRecord,
    StateView,
)

MAX_MANIFEST_SOURCES = 256
EVENT_GRANULARITY = "batch"
"""The one granularity whose steps these rules know how to judge."""
MAX_BATCH_SIZE = p.MAX_EVENT_EXAMPLES
MAX_POLICY_BYTES = 32_768

RETRYABLE = frozenset(
    {
        Reason.SEQUENCE_GAP,
        Reason.UNKNOWN_SOURCE,
        Reason.UNKNOWN_POLICY,
        Reason.UNKNOWN_CAMPAIGN,
        Reason.UNKNOWN_JOB_KEY,
        Reason.UNKNOWN_GRANT,
    }
)
"""Reasons that may pass once events still on their way are on the log."""


def admit(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Apply one event to the view.

    Raises:
        Rejected: the first rule it breaks; the view is then unchanged.
    """
    try:
        _HANDLERS[event.entry.kind](view, event, timestamp_ms, committee)
        view.commit()
    except Rejected:
        view.discard()
        raise


def _admit_policy(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    policy = event.governance
    assert isinstance(policy, p.Policy)
    check_policy(policy)
    _check_signer_schemes(policy, event, committee)
    for auditor in policy.auditors:
        member = committee.member(MemberId(auditor))
        if member.role == Role.OPERATOR:
            raise Rejected(Reason.WRONG_ROLE, f"{member.name} is an operator and audits nobody")
    assert event.portions.governance is not None
    if len(event.portions.governance.content) > MAX_POLICY_BYTES:
        raise Rejected(Reason.OVERSIZED, f"a policy has at most {MAX_POLICY_BYTES} bytes")
    key = POLICY_TABLE + event.id
    if view.find(key, PolicyRecord) is not None:
        raise Rejected(Reason.DUPLICATE, f"policy {event.id.hex()} is on the log")
    head = view.find(POLICY_HEAD_KEY, PolicyHead)
    view.put(key, PolicyRecord(policy, timestamp_ms))
    view.put(POLICY_HEAD_KEY, PolicyHead(event.id, timestamp_ms, 1 + (head.count if head else 0)))


def _admit_source(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    claim = event.items[0]
    assert isinstance(claim, p.SourceClaim)
    if claim.valid_until_ms <= claim.valid_from_ms:
        raise Rejected(Reason.BAD_FIELD, "the source's validity window is empty")
    if len(set(claim.purposes)) != len(claim.purposes):
        raise Rejected(Reason.BAD_FIELD, "a purpose is listed twice")
    key = SOURCE_TABLE + event.id
    if view.find(key, SourceRecord) is not None:
        raise Rejected(Reason.DUPLICATE, f"source {event.id.hex()} is on the log")
    view.put(key, SourceRecord(event.entry.author, claim, timestamp_ms, 0, b""))


def _admit_revocation(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    revocation = event.items[0]
    assert isinstance(revocation, p.SourceRevocation)
    key = SOURCE_TABLE + revocation.source
    source = view.get(key, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
    if holder(view, source.author) != event.entry.author:
        raise Rejected(Reason.WRONG_AUTHOR, "a source is revoked only by its author, or who succeeded it")
    if source.revocation:
        raise Rejected(Reason.DUPLICATE, f"source {revocation.source.hex()} is already revoked")
    view.put(key, SourceRecord(source.author, source.claim, source.registered_at_ms, timestamp_ms, event.id))


def _admit_evidence(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    report = event.governance
    assert isinstance(report, EvidenceReport)
    found = convicted(report, committee)
    key = EVIDENCE_TABLE + found.digest
    held = view.find(key, EvidenceRecord)
    if held is not None:
        raise Rejected(
            Reason.DUPLICATE, f"event {held.event.hex()} convicts {held.member.hex()} of {held.offence} already"
        )
    view.put(
        key,
        EvidenceRecord(event.id, found.member, found.offence.value, found.epoch, found.view, timestamp_ms),
    )


def _admit_membership(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    change = event.governance
    assert isinstance(change, MembershipChange)
    admit_change(view, change.membership, event.id, timestamp_ms, committee)


def _admit_delegation(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    delegation = event.operation
    assert isinstance(delegation, p.Delegation)
    if delegation.campaign != event.entry.campaign:
        raise Rejected(Reason.BAD_FIELD, "the delegation is filed under another campaign")
    if event.entry.sequence or event.entry.attempt:
        raise Rejected(Reason.BAD_FIELD, "a delegation has sequence and attempt 0")
    if not delegation.not_before_ms < delegation.expires_at_ms or delegation.expires_at_ms <= timestamp_ms:
        raise Rejected(Reason.JOB_KEY_EXPIRED, f"the delegation expires at {delegation.expires_at_ms} ms")
    check_job_key_id(delegation.scheme, delegation.job_key)
    key = DELEGATION_TABLE + delegation.job_key
    if view.find(key, DelegationRecord) is not None:
        raise Rejected(Reason.DUPLICATE, f"job key {delegation.job_key.hex()} is already delegated")
    head = view.find(CAMPAIGN_HEAD_TABLE + delegation.campaign, CampaignHead)
    record = DelegationRecord(
        operator=event.entry.author,
        campaign=delegation.campaign,
        scheme=delegation.scheme,
        not_before_ms=delegation.not_before_ms,
        expires_at_ms=delegation.expires_at_ms,
        replaced=False,
    )
    if head is None:
        if delegation.replaces or delegation.head:
            raise Rejected(Reason.UNKNOWN_CAMPAIGN, "only a campaign on the log has a job key to replace")
        view.put(key, record)
        return
    old_key = DELEGATION_TABLE + head.job_key
    old = view.get(old_key, DelegationRecord, Reason.UNKNOWN_JOB_KEY, "job key")
    if head.closed:
        raise Rejected(Reason.CAMPAIGN_CLOSED, f"the campaign is {head.closed}")
    if holder(view, old.operator) != event.entry.author:
        raise Rejected(Reason.WRONG_AUTHOR, "a job key is replaced only by its operator")
    if delegation.replaces != head.job_key or delegation.head != head.last_event:
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN,
            f"a replacement names job key {head.job_key.hex()} and head {head.last_event.hex()}",
        )
    view.put(key, record)
    view.put(old_key, msgspec.structs.replace(old, replaced=True))
    view.put(CAMPAIGN_HEAD_TABLE + delegation.campaign, changed(head, job_key=delegation.job_key))


def _admit_campaign(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    campaign = event.operation
    assert isinstance(campaign, p.Campaign)
    identifier = event.entry.campaign
    delegation = check_job_key(view, event, campaign.job_key, timestamp_ms)
    if view.find(CAMPAIGN_TABLE + identifier, CampaignRecord) is not None:
        raise Rejected(Reason.DUPLICATE, f"campaign {identifier.hex()} is on the log")
    if event.entry.sequence or event.entry.attempt:
        raise Rejected(Reason.SEQUENCE_GAP, "a campaign opens with sequence and attempt 0")
    policy = _policy_in_force(view, campaign.policy)
    check_author_scheme(policy, delegation.scheme, "the job key")
    if campaign.purpose not in policy.purposes:
        raise Rejected(Reason.PURPOSE_NOT_ADMITTED, f"the policy does not admit purpose '{campaign.purpose}'")
    _check_granularities(policy, campaign.routing_granularity, campaign.event_granularity)
    _check_sketches(policy, campaign.sketch_rank)
    _check_base_losses(policy, campaign.base_losses_sha256)
    if campaign.sketch_rank and not campaign.accumulator_window_steps:
        raise Rejected(Reason.BAD_FIELD, "sketches are kept beside accumulators, and the campaign keeps none")
    blocks = tuple(block.name for block in campaign.parameter_blocks)
    tensors = [tensor for block in campaign.parameter_blocks for tensor in block.tensors]
    if len(set(blocks)) != len(blocks) or len({tensor.name for tensor in tensors}) != len(tensors):
        raise Rejected(Reason.BAD_FIELD, "the parameter table names a parameter block or tensor twice")
    _check_pieces(campaign, tensors)
    manifest = tuple(item for item in event.items if isinstance(item, p.ManifestRange))
    _check_manifest(view, manifest, campaign.batch_size)
    view.put(
        CAMPAIGN_TABLE + identifier,
        CampaignRecord(
            event=event.id,
            operator=event.entry.author,
            purpose=campaign.purpose,
            base_root=campaign.base_root,
            blocks=blocks,
            manifest=manifest,
            sampler_seed=campaign.sampler_seed,
            batch_size=campaign.batch_size,
            planned_steps=campaign.planned_steps,
            routing_granularity=campaign.routing_granularity,
            event_granularity=campaign.event_granularity,
            accumulator_window_steps=campaign.accumulator_window_steps,
            sketch_rank=campaign.sketch_rank,
            custody=policy.custody if campaign.accumulator_window_steps else (),
            base_losses_sha256=campaign.base_losses_sha256,
        ),
    )
    view.put(
        CAMPAIGN_HEAD_TABLE + identifier,
        CampaignHead(
            job_key=campaign.job_key,
            next_sequence=1,
            next_grant=1,
            next_audit=1,
            attempt=0,
            steps=0,
            root=campaign.base_root,
            last_event=event.id,
            undo_root=b"",
            undo_counts=(),
            rollback_required=False,
            pending=(),
            presented=0,
            admitted=0,
            refused=0,
            refusal_events=0,
            discarded_steps=0,
            rollbacks=0,
            open_findings=(),
            closed="",
            release=b"",
        ),
    )


def _check_signer_schemes(policy: p.Policy, event: CheckedEvent, committee: Committee) -> None:
    for signer in sorted(event.signers):
        member = committee.member(MemberId(signer))
        check_author_scheme(policy, member.scheme, member.name)


def _check_manifest(view: StateView, manifest: tuple[p.ManifestRange, ...], batch_size: int) -> None:
    if len(manifest) > MAX_MANIFEST_SOURCES or batch_size > MAX_BATCH_SIZE:
        raise Rejected(
            Reason.OVERSIZED,
            f"at most {MAX_MANIFEST_SOURCES} sources and {MAX_BATCH_SIZE} examples in a batch",
        )
    if len({entry.source for entry in manifest}) != len(manifest):
        raise Rejected(Reason.DUPLICATE, "the manifest names a source twice")
    for entry in manifest:
        source = view.get(SOURCE_TABLE + entry.source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
        if entry.first + entry.count > source.claim.example_count:
            raise Rejected(
                Reason.COUNTS_NOT_CONSERVED,
                f"manifest goes to example {entry.first + entry.count}, '{source.claim.name}' "
                f"has {source.claim.example_count}",
            )
    total = sum(entry.count for entry in manifest)
    if total < batch_size:
        raise Rejected(Reason.COUNTS_NOT_CONSERVED, f"a manifest of {total} examples, batches of {batch_size}")


def _admit_grant(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    terms, operation = event.governance, event.operation
    assert isinstance(terms, p.GrantTerms)
    assert isinstance(operation, p.GrantOperation)
    campaign, head = open_campaign(view, event)
    if view.find(GRANT_TABLE + event.id, GrantRecord) is not None:
        raise Rejected(Reason.DUPLICATE, f"grant {event.id.hex()} is on the log")
    if event.entry.attempt:
        raise Rejected(Reason.BAD_FIELD, "a grant has attempt 0")
    check_sequence(event.entry.sequence, head.next_grant, "grant")
    if operation.job_key != head.job_key:
        raise Rejected(Reason.UNKNOWN_JOB_KEY, f"the campaign's job key is {head.job_key.hex()}")
    delegation = view.get(DELEGATION_TABLE + operation.job_key, DelegationRecord, Reason.UNKNOWN_JOB_KEY, "job key")
    if terms.closes_at_ms > delegation.expires_at_ms:
        raise Rejected(
            Reason.JOB_KEY_EXPIRED, f"the job key expires at {delegation.expires_at_ms} ms, before the grant"
        )
    policy = _policy_in_force(view, terms.policy)
    check_author_scheme(policy, delegation.scheme, "the job key")
    _check_signer_schemes(policy, event, committee)
    _check_granularities(policy, campaign.routing_granularity, campaign.event_granularity)
    _check_sketches(policy, campaign.sketch_rank)
    _check_base_losses(policy, campaign.base_losses_sha256)
    check_grant_terms(Digest(terms.policy), policy, terms, timestamp_ms)
    sources = tuple(item.source for item in event.items if isinstance(item, p.GrantedSource))
    check_granted_sources(view, campaign, policy, sources, timestamp_ms, terms.closes_at_ms)
    owners = holders(
        view,
        [view.get(SOURCE_TABLE + source, SourceRecord, Reason.UNKNOWN_SOURCE, "source").author for source in sources],
    )
    for owner in sorted(owners - event.signers):
        name = committee.member(MemberId(owner)).name
        raise Rejected(Reason.MISSING_SIGNATURE, f"the grant names a source of {name}, which has not signed")
    for signer in sorted(event.signers - owners - {event.entry.author}):
        member = committee.member(MemberId(signer))
        if member.role != Role.GOVERNANCE:
            raise Rejected(Reason.SURPLUS_SIGNATURE, f"{member.name} signed a grant that names no source of its own")
    view.put(
        GRANT_TABLE + event.id,
        GrantRecord(
            campaign=event.entry.campaign,
            policy=terms.policy,
            job_key=operation.job_key,
            sources=sources,
            first_step=terms.first_step,
            last_step=terms.last_step,
            opened_at_ms=timestamp_ms,
            closes_at_ms=terms.closes_at_ms,
        ),
    )
    view.put(CAMPAIGN_HEAD_TABLE + event.entry.campaign, changed(head, next_grant=head.next_grant + 1))


def check_granted_sources(
    view: StateView,
    campaign: CampaignRecord,
    policy: p.Policy,
    sources: tuple[bytes, ...],
    from_ms: int,
    until_ms: int,
) -> None:
    """Every source may be granted to the campaign under the policy, from now until the grant closes.

    Raises:
        Rejected: the reason the policy gives, ``SOURCE_NOT_GRANTED`` for one outside the manifest.
    """
    presented = {entry.source for entry in campaign.manifest}
    if list(sources) != sorted(set(sources)):
        raise Rejected(Reason.BAD_FIELD, "granted sources are not in strictly increasing order")
    for source in sources:
        record = view.get(SOURCE_TABLE + source, SourceRecord, Reason.UNKNOWN_SOURCE, "source")
        if source not in presented:
            raise Rejected(Reason.SOURCE_NOT_GRANTED, f"'{record.claim.name}' is not in the campaign's manifest")
        reason = why_refused(policy, record.claim, bool(record.revocation), campaign.purpose, from_ms, until_ms)
        if reason is not None:
            raise Rejected(reason, f"source '{record.claim.name}'")


def _check_pieces(campaign: p.Campaign, tensors: Sequence[p.Tensor]) -> None:
    """Pieces of tensors divide them, at the granularity that says so."""
    if all(piece_named(tensor.name) is None for tensor in tensors):
        return
    whole_tensors(tensors)
    if campaign.routing_granularity != HEAD:
        raise Rejected(
            Reason.BAD_FIELD, f"pieces of tensors at routing granularity '{campaign.routing_granularity}', not '{HEAD}'"
        )


def _check_granularities(policy: p.Policy, routing: str, event: str) -> None:
    if routing not in policy.routing_granularities:
        raise Rejected(Reason.GRANULARITY_NOT_ADMITTED, f"routing granularity '{routing}'")
    if event not in policy.event_granularities:
        raise Rejected(Reason.GRANULARITY_NOT_ADMITTED, f"event granularity '{event}'")
    if event != EVENT_GRANULARITY:
        raise Rejected(Reason.GRANULARITY_NOT_ADMITTED, f"events of granularity '{event}'; steps are judged by batch")


def _check_sketches(policy: p.Policy, rank: int) -> None:
    if rank < policy.least_sketch_rank:
        raise Rejected(
            Reason.SKETCHES_TOO_COARSE,
            f"gradients are sketched at rank {rank}, the policy wants at least {policy.least_sketch_rank}",
        )


def _check_base_losses(policy: p.Policy, base_losses_sha256: bytes) -> None:
    if policy.entropy_edges_milli and not base_losses_sha256:
        raise Rejected(
            Reason.BASE_LOSSES_MISSING,
            "the policy's depth profiles go by entropy band, and the campaign committed to no base losses",
        )


def _policy_in_force(view: StateView, policy: bytes) -> p.Policy:
    record = view.get(POLICY_TABLE + policy, PolicyRecord, Reason.UNKNOWN_POLICY, "policy")
    head = view.get(POLICY_HEAD_KEY, PolicyHead, Reason.UNKNOWN_POLICY, "policy")
    if head.policy != policy:
        raise Rejected(Reason.POLICY_NOT_IN_FORCE, f"{policy.hex()} was replaced by {head.policy.hex()}")
    return record.policy


_HANDLERS: dict[Kind, Callable[[StateView, CheckedEvent, int, Committee], None]] = {
    Kind.POLICY: _admit_policy,
    Kind.SOURCE: _admit_source,
    Kind.REVOCATION: _admit_revocation,
    Kind.EVIDENCE: _admit_evidence,
    Kind.MEMBERSHIP: _admit_membership,
    Kind.DELEGATION: _admit_delegation,
    Kind.CAMPAIGN: _admit_campaign,
    Kind.GRANT: _admit_grant,
    Kind.STEP: step_rules.admit_step,
    Kind.REFUSAL: campaign_rules.admit_refusal,
    Kind.ROLLBACK: campaign_rules.admit_rollback,
    Kind.ABANDON: campaign_rules.admit_abandon,
    Kind.RELEASE: campaign_rules.admit_release,
    Kind.EVALUATION: review_rules.admit_evaluation,
    Kind.DECISION: review_rules.admit_decision,
    Kind.AUDIT_CHALLENGE: audit_rules.admit_audit_challenge,
    Kind.AUDIT_RESULT: audit_rules.admit_audit_result,
    Kind.CUSTODY: custody_rules.admit_custody,
}
