"""``policy-in-force``: every step of a campaign ran under a grant of the policy in force when it was granted.

All policies there ever were are a range of the state, so the one in force at a grant's place in the log is
the newest before it: a fact of order, with no clock in it. A grant's and a campaign's terms are records of
the state; a step's grant, policy and applied depth profiles are in its governance portion. The other two
portions are not needed, except to tell a step's index after a rollback (``history.py``).
"""

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.identifiers import Digest, Role
from consensus.policy import check_grant_terms, check_profile
from consensus.predicates.history import (
    PlacedStep,
    complete_grants,
    complete_job_events,
    member_name,
    place_steps,
)
from consensus.predicates.verdict import Steps
from consensus.rejection import Rejected
from consensus.state import (
    CAMPAIGN_TABLE,
    GRANT_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    CampaignRecord,
    GrantRecord,
    PolicyHead,
    PolicyRecord,
)


def policy_in_force(bundle: OpenBundle, steps: Steps) -> None:
    """Each step's grant, policy and depth profiles, for all steps of the campaign.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    events, head = complete_job_events(bundle)
    grants = complete_grants(bundle, head)
    operator = member_name(bundle, events[0].entry.author)
    placed = place_steps(events, head.steps)
    discarded = sum(step.discarded is True for step in placed)
    steps.checked(
        f"the campaign of {operator} has {len(events)} events and {len(grants)} grants, all in the bundle: "
        f"{len(placed)} steps, {discarded} of them discarded"
    )
    policies, order = _policies(bundle, steps)
    records = _check_grants(bundle, steps, grants, policies, order)
    _check_steps(bundle, steps, placed, records, policies)
    steps.attested(f"that training applied these depth profiles to its gradients: {operator}")
    if any(policy.entropy_edges_milli for policy in policies.values()):
        steps.attested(f"which examples are of which entropy band, committed to as the campaign opened: {operator}")
    steps.attested("that each step was on the log before its grant closed: the members that certified the log")
    steps.not_covered("whose sources were used, and their owners' consent: source-honored")


def _policies(bundle: OpenBundle, steps: Steps) -> tuple[dict[bytes, p.Policy], tuple[OpenEvent, ...]]:
    """Every policy there ever was by id, and their events in log order."""
    records = bundle.range(POLICY_TABLE, PolicyRecord)
    head = bundle.record(POLICY_HEAD_KEY, PolicyHead)
    order = tuple(sorted((bundle.event_of(policy, "policy") for policy in records), key=lambda event: event.index))
    problems = []
    if len(order) != head.count or not order or order[-1].id != head.policy:
        problems.append(f"the state counts {head.count} and names {head.policy.hex()} as the newest")
    undisclosed = 0
    for event in order:
        if event.governance is None:
            undisclosed += 1
        elif event.governance != records[event.id].policy:
            problems.append(f"the record of policy {event.id.hex()} is not what was signed")
    names = sorted({member_name(bundle, held.signer) for event in order for held in event.entry.signatures})
    quorum = min((bundle.trusted.at(event.index).committee.threshold(Role.GOVERNANCE) for event in order), default=0)
    steps.check(
        f"{len(order)} policies were ever in force, each signed by at least {quorum} of governance "
        f"({', '.join(names)}), as the state records them",
        problems,
        undisclosed,
    )
    return {policy: record.policy for policy, record in records.items()}, order


def _check_grants(
    bundle: OpenBundle,
    steps: Steps,
    grants: tuple[OpenEvent, ...],
    policies: dict[bytes, p.Policy],
    order: tuple[OpenEvent, ...],
) -> dict[bytes, GrantRecord]:
    records: dict[bytes, GrantRecord] = {}
    problems: list[str] = []
    for grant in grants:
        record = records[grant.id] = bundle.record(GRANT_TABLE + grant.id, GrantRecord)
        number = grant.entry.sequence
        if record.campaign != bundle.campaign:
            problems.append(f"grant {number} is recorded for another campaign")
        in_force = [event.id for event in order if event.index < grant.index]
        if not in_force or in_force[-1] != record.policy:
            problems.append(f"grant {number} is under policy {record.policy.hex()}, not the one then in force")
            continue
        terms = p.GrantTerms(record.policy, record.first_step, record.last_step, record.closes_at_ms)
        try:
            check_grant_terms(Digest(record.policy), policies[record.policy], terms, record.opened_at_ms)
        except Rejected as error:
            problems.append(f"grant {number}: {error.detail}")
    steps.check(
        f"{len(grants)} grants: each under the policy in force at its place in the log, within that policy's "
        "bounds, signed by the operator and governance",
        problems,
    )
    return records


def _check_steps(
    bundle: OpenBundle,
    steps: Steps,
    placed: tuple[PlacedStep, ...],
    grants: dict[bytes, GrantRecord],
    policies: dict[bytes, p.Policy],
) -> None:
    campaign = bundle.record(CAMPAIGN_TABLE + bundle.campaign, CampaignRecord)
    grant_problems: list[str] = []
    depth_problems: list[str] = []
    scaled = skipped = 0
    undisclosed = unplaced = 0
    for step in placed:
        governance = step.event.governance
        if not isinstance(governance, p.StepGovernance):
            undisclosed += 1
            continue
        where = f"event {step.event.entry.sequence} (step {step.highest})"
        grant = grants.get(governance.grant)
        if grant is None:
            grant_problems.append(f"{where} names grant {governance.grant.hex()}, not one of the campaign's")
            continue
        if governance.policy != grant.policy or governance.policy not in policies:
            grant_problems.append(f"{where} names policy {governance.policy.hex()}, its grant {grant.policy.hex()}")
            continue
        if step.event.index < bundle.event_of(governance.grant, "grant").index:
            grant_problems.append(f"{where} stands before its grant")
        if step.event.entry.signatures[0].signer != grant.job_key:
            grant_problems.append(f"{where} is not by the job key its grant names")
        if step.highest < grant.first_step or step.lowest > grant.last_step:
            grant_problems.append(f"{where} is outside its grant, {grant.first_step} to {grant.last_step}")
        elif step.lowest < grant.first_step or step.highest > grant.last_step:
            unplaced += 1
        if governance.global_clip_nano and not policies[governance.policy].global_clipping:
            depth_problems.append(f"{where}: one factor scaled all parameter blocks, the policy does not admit that")
        scaled += 0 < governance.global_clip_nano < p.NANO
        skipped += governance.skipped
        for profile in governance.profiles:
            try:
                check_profile(policies[governance.policy], profile, campaign.blocks)
            except Rejected as error:
                depth_problems.append(f"{where}: {error.detail}")
    steps.check(
        f"{len(placed)} steps: each inside an open range of a grant and under its policy",
        grant_problems,
        undisclosed + unplaced,
    )
    steps.check(
        f"{len(placed)} steps: each recorded depth profile at or below its policy's maximum in all "
        f"{len(campaign.blocks)} parameter blocks",
        depth_problems,
        undisclosed,
    )
    if scaled or skipped:
        steps.not_covered(
            f"what an example kept out of a parameter block did there by way of others: one clip factor scaled all of "
            f"them in {scaled} steps, {skipped} were skipped for an overflow in any"
        )
