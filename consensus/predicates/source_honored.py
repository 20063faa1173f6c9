"""``source-honored``: every use of one source in a campaign was granted by its owner, and these are all uses.

Completeness rests on the state's usage record (``source_uses.py``), order on the log: a grant stands before or
after a revocation. Of the campaign's other sources nothing is needed, so nothing of
them is in the bundle; where a rollback's portion names one it stays closed (``history.py``).
"""

from dataclasses import dataclass, field

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.policy import REVOCATION_VOID, why_refused
from consensus.predicates.history import job_events, member_name, note_closing, same_member
from consensus.predicates.source_uses import Use, claim_of, grant_of, totals_of, uses_of_source
from consensus.predicates.verdict import Steps
from consensus.reserve import RESERVED
from consensus.state import POLICY_TABLE, PolicyRecord, SourceRecord


@dataclass(slots=True)
class _Findings:
    """What was found against the grants, their terms and the revocation; and what could not be seen."""

    consent: list[str] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)
    revocation: list[str] = field(default_factory=list)
    undisclosed: int = 0
    grants: set[bytes] = field(default_factory=set)


def source_honored(bundle: OpenBundle, steps: Steps) -> None:
    """The source's claim, its uses and their totals, their grants, and its revocation.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    record, claim = claim_of(bundle)
    steps.check(claim.text, claim.problems, claim.undisclosed)
    steps.attested(f"that the claim is true (rights basis {record.claim.rights_basis!r}): {claim.owner}")
    events = job_events(bundle)
    operator = member_name(bundle, events[0].entry.author)
    uses = uses_of_source(bundle, events)
    totals = totals_of(bundle, uses)
    steps.check(totals.text, totals.problems, totals.undisclosed)
    owner = claim.owner
    revocation = bundle.event_of(record.revocation, "revocation") if record.revocation else None
    findings = _Findings()
    for use in uses:
        if use.content.admitted:
            _check_use(bundle, use, record, revocation, events[0], findings)
    if not any(use.content.admitted for use in uses):
        steps.checked("no step trained on it, so none needed a grant")
    else:
        steps.check(
            f"every step that trained on it ran inside one of {len(findings.grants)} grants that name it, "
            f"each signed by {owner}",
            findings.consent,
            findings.undisclosed,
        )
        steps.check(
            "licence, purpose, class and validity window of the claim are admitted by each grant's policy",
            findings.terms,
            findings.undisclosed,
        )
    if revocation is None:
        steps.checked(f"{owner} has not revoked it")
    else:
        later = sum(bool(use.content.admitted) and use.step.event.index > revocation.index for use in uses)
        drained = f"; {later} later steps trained on it under grants opened before, which ran out" if later else ""
        steps.check(
            f"{owner} revoked it (entry {revocation.index}): no grant opened later covers a use{drained}",
            findings.revocation,
            findings.undisclosed,
        )
    if record.claim.reserve_below:
        kept = sum(count.count for use in uses for count in use.content.refused if count.reason == RESERVED)
        steps.attested(
            f"that the {kept} examples counted as of its reserve are all of the reserve that it was presented with: "
            "the members that certified the log, each of whom can tell them (refusals-complete shows it)"
        )
    note_closing(bundle, steps)
    steps.attested(f"that the job trained on nothing but what it recorded: {operator}")
    steps.attested("that each step was on the log before its grant closed: the members that certified the log")
    steps.not_covered("other campaigns: each has its own bundle")


def _check_use(
    bundle: OpenBundle,
    use: Use,
    record: SourceRecord,
    revocation: OpenEvent | None,
    campaign: OpenEvent,
    findings: _Findings,
) -> None:
    governance = use.step.event.governance
    if not isinstance(governance, p.StepGovernance) or not isinstance(campaign.operation, p.Campaign):
        findings.undisclosed += 1
        return
    if use.content.content_class != record.claim.content_class:
        findings.terms.append(f"{use.where} uses it as class {use.content.content_class!r}")
    grant = grant_of(bundle, use, governance)
    number = grant.entry.sequence
    findings.grants.add(grant.id)
    if not any(same_member(bundle, record.author, held.signer) for held in grant.entry.signatures):
        findings.consent.append(f"{use.where} names grant {number}, which the owner has not signed")
    if not same_member(bundle, grant.entry.author, campaign.entry.author) or grant.index > use.step.event.index:
        findings.consent.append(f"{use.where} names grant {number}, of another operator or opened later")
    named = {item.content.source for item in grant.items if isinstance(item.content, p.GrantedSource)}
    if bundle.source not in named:
        if not grant.whole_data:
            findings.undisclosed += 1
            return
        findings.consent.append(f"{use.where} names grant {number}, which does not name the source")
    terms, job = grant.governance, grant.operation
    if not isinstance(terms, p.GrantTerms) or not isinstance(job, p.GrantOperation):
        findings.undisclosed += 1
        return
    if job.job_key != use.step.event.entry.signatures[0].signer:
        findings.consent.append(f"{use.where} is not by the job key that grant {number} names")
    if use.step.highest < terms.first_step or use.step.lowest > terms.last_step:
        findings.consent.append(f"{use.where} is outside grant {number}, {terms.first_step} to {terms.last_step}")
    elif use.step.lowest < terms.first_step or use.step.highest > terms.last_step:
        findings.undisclosed += 1
    _check_terms(bundle, use, record, terms, campaign.operation.purpose, findings)
    if revocation is not None:
        policy = bundle.record(POLICY_TABLE + terms.policy, PolicyRecord).policy
        if grant.index > revocation.index:
            findings.revocation.append(f"{use.where} ran under grant {number}, opened after the revocation")
        elif policy.revocation == REVOCATION_VOID and use.step.event.index > revocation.index:
            findings.revocation.append(f"{use.where} came after the revocation, which voids grant {number}")


def _check_terms(
    bundle: OpenBundle, use: Use, record: SourceRecord, terms: p.GrantTerms, purpose: str, findings: _Findings
) -> None:
    held = bundle.record(POLICY_TABLE + terms.policy, PolicyRecord)
    claim = record.claim
    # A grant's own time is in a record that names other sources; it opened no earlier than all of these.
    opened_ms = max(record.registered_at_ms, held.since_ms, terms.closes_at_ms - held.policy.maximum_grant_duration_ms)
    if opened_ms < claim.valid_from_ms:
        findings.undisclosed += 1
    from_ms = max(opened_ms, claim.valid_from_ms)
    reason = why_refused(held.policy, claim, False, purpose, from_ms, terms.closes_at_ms)
    if reason is not None:
        findings.terms.append(f"{use.where}: {reason.value}")
