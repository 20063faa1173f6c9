"""``revocation-exposure``: whether, and how, a campaign depends on a source that was revoked.

*Yes*: its owner revoked it, and steps that stand trained on it. Then the steps before and after the revocation are
told (after it: under grants that were open and ran out), what became of its gradients in the optimizer's momentum
(``momentum_rules.py``), and whether the weights were released, before or after. *No* is proved as well: it was not
revoked, or the state's exact counts have no example of it in a step that stands (``source_uses.py``). What does not
fit together is refused, and is never a no.

Of other sources nothing is in the bundle. So the campaign's head, which names those of its last step, is not either:
that a campaign has released nothing is not shown, only that it did.
"""

from collections.abc import Sequence

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import Kind
from consensus.policy import MOMENTUM_CARRY, MOMENTUM_FLUSH
from consensus.predicates.history import CLOSING_KINDS, job_events, member_name, same_member
from consensus.predicates.source_uses import Use, claim_of, grant_of, totals_of, uses_of_source
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.state import POLICY_TABLE, PolicyRecord, SourceRecord, Usage


def revocation_exposure(bundle: OpenBundle, steps: Steps) -> None:
    """The source's revocation, the steps that trained on it around it, its momentum, and the release.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``; ``COUNTS_NOT_CONSERVED`` for uses that are not those the state counts.
    """
    record, claim = claim_of(bundle)
    if claim.problems:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, f"event {bundle.source.hex()}: {claim.problems[0]}")
    steps.check(claim.text, (), claim.undisclosed)
    events = job_events(bundle)
    operator = member_name(bundle, events[0].entry.author)
    uses = uses_of_source(bundle, events)
    totals = totals_of(bundle, uses)
    if totals.problems:
        raise Rejected(Reason.COUNTS_NOT_CONSERVED, f"{totals.text}: {totals.problems[0]}")
    steps.check(totals.text, (), totals.undisclosed)
    revocation = _revocation(bundle, record)
    not_revoked = [] if revocation is not None else ["as of this ledger block it is not revoked"]
    when = "" if revocation is None else f", entry {revocation.index}, at {record.revoked_at_ms} ms"
    steps.check(f"{claim.owner} revoked it{when}", not_revoked)
    usage = totals.usage
    unused = [] if usage is not None and usage.admitted else ["none was, as the state counts"]
    steps.check("examples of it were admitted to steps that stand", unused)
    if usage is not None and usage.discarded:
        steps.checked(
            f"{usage.discarded} more were admitted to steps that were discarded: what was before them was restored"
        )
    if revocation is not None and usage is not None and usage.admitted:
        # Where the counts of the steps known to stand are the state's, those whose fate is open have been discarded.
        fates = (False, None) if totals.undisclosed else (False,)
        trained = [use for use in uses if use.content.admitted and use.step.discarded in fates]
        _tell_steps(bundle, steps, trained, revocation)
        _tell_momentum(bundle, steps, usage, events, operator)
    _tell_release(bundle, steps, revocation, usage)
    steps.attested(f"that the job trained on nothing but what it recorded: {operator}")
    steps.not_covered("how much of it the weights keep, which footprints and traces estimate")
    steps.not_covered("other campaigns, and models tuned from this one's release: each has its own bundle")


def _revocation(bundle: OpenBundle, record: SourceRecord) -> OpenEvent | None:
    if not record.revocation:
        return None
    event = bundle.event_of(record.revocation, "revocation")
    if event.kind is not Kind.REVOCATION or not same_member(bundle, event.entry.author, record.author):
        raise Rejected(Reason.BUNDLE_INCOMPLETE, f"event {event.id.hex()} is no revocation by the source's owner")
    return event


def _tell_steps(bundle: OpenBundle, steps: Steps, trained: Sequence[Use], revocation: OpenEvent) -> None:
    """Which steps trained on it, before and after."""
    before = [use for use in trained if use.step.event.index < revocation.index]
    after = [use for use in trained if use.step.event.index > revocation.index]
    steps.checked(f"before the revocation: {_named(before)}")
    steps.checked(f"after it: {_named(after)}")
    for grant, uses in _by_grant(bundle, after):
        if grant is None:
            steps.not_covered(f"under which grants {len(uses)} later steps ran: portions are not disclosed")
            continue
        number, terms = grant.entry.sequence, grant.governance
        opened = "after it, which source-honored refuses" if grant.index > revocation.index else "before it"
        until = ""
        if isinstance(terms, p.GrantTerms):
            policy = bundle.record(POLICY_TABLE + terms.policy, PolicyRecord).policy
            until = (
                f" (revocation: {policy.revocation!r}); for steps up to {terms.last_step}, until "
                f"{terms.closes_at_ms} ms"
            )
        steps.checked(f"{_named(uses)} ran under grant {number}, opened {opened}{until}")


def _by_grant(bundle: OpenBundle, uses: Sequence[Use]) -> list[tuple[OpenEvent | None, list[Use]]]:
    """The uses of each grant, in order; those whose grant is not disclosed last, under None."""
    found: dict[int, tuple[OpenEvent, list[Use]]] = {}
    hidden: list[Use] = []
    for use in uses:
        governance = use.step.event.governance
        if not isinstance(governance, p.StepGovernance):
            hidden.append(use)
            continue
        grant = grant_of(bundle, use, governance)
        found.setdefault(grant.index, (grant, []))[1].append(use)
    shown: list[tuple[OpenEvent | None, list[Use]]] = [held for _, held in sorted(found.items())]
    return [*shown, (None, hidden)] if hidden else shown


def _tell_momentum(bundle: OpenBundle, steps: Steps, usage: Usage, events: Sequence[OpenEvent], operator: str) -> None:
    """What the state records of its momentum; and, where it is disclosed, in which step, and what was left."""
    if usage.momentum == MOMENTUM_FLUSH:
        steps.checked("momentum: a step that stands records that the optimizer's state it had a part in was flushed")
        steps.attested(f"that the state was dropped: {operator}")
    elif usage.momentum == MOMENTUM_CARRY:
        steps.checked("momentum: a step that stands records that what was left of its gradients is carried on")
        left = [
            (step.index, carried.residual_nano)
            for step in (event.operation for event in events)
            if isinstance(step, p.StepOperation)
            for carried in step.carried
            if carried.source == bundle.source
        ]
        for index, residual_nano in left:
            steps.attested(
                f"that at step {index} at most {residual_nano} billionths of each gradient were left in it: {operator}"
            )
    else:
        steps.checked(
            "momentum: not settled; no later step that stands admitted anything under a grant that leaves it out as "
            "revoked"
        )


def _tell_release(bundle: OpenBundle, steps: Steps, revocation: OpenEvent | None, usage: Usage | None) -> None:
    closing = next((e for e in bundle.events if e.kind in CLOSING_KINDS and e.entry.campaign == bundle.campaign), None)
    if closing is None:
        steps.not_covered(
            f"what came after ledger block {bundle.header.height}: the campaign is not shown to be closed, later steps "
            "or a release may change the answer"
        )
        return
    if closing.kind is not Kind.RELEASE:
        steps.checked(f"the campaign was closed by entry {closing.index}, its {closing.kind.value}: nothing released")
        return
    order = ""
    if revocation is not None:
        order = ", before the revocation" if closing.index < revocation.index else ", after the revocation"
    contains = "its steps are among those released" if usage is not None and usage.admitted else "with no step of it"
    release = closing.operation
    which = ""
    if isinstance(release, p.Release):
        which = f" {release.file_name!r}, root {release.parameter_root.hex()}, after {release.steps} steps"
    steps.checked(f"released{which}: entry {closing.index}{order}; {contains}")


def _named(uses: Sequence[Use]) -> str:
    """Steps and how much of the source they admitted; one whose fate is open is said to be so."""
    if not uses:
        return "no step trained on it"
    numbers = ", ".join(str(use.step.highest) for use in uses)
    admitted = sum(use.content.admitted for use in uses)
    unsettled = sum(use.step.discarded is None for use in uses)
    open_fates = f", of which {unsettled} may have been discarded" if unsettled else ""
    return f"{len(uses)} steps trained on it ({numbers}), {admitted} examples admitted{open_fates}"
