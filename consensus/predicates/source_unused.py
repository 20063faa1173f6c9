"""``source-unused``: no example of a source moved a campaign's parameters.

The state keeps exact counts of each source in each campaign; that there is none, or that none of its
examples was admitted, is a fact with a proof. Which other sources the campaign used stays hidden.
"""

from consensus.bundle import OpenBundle
from consensus.event import Kind
from consensus.predicates.history import member_name, note_closing, same_member
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.state import DELEGATION_TABLE, DelegationRecord, Usage, usage_key


def source_unused(bundle: OpenBundle, steps: Steps) -> None:
    """The campaign has no usage record of the source, or one without an admitted example.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``; ``UNKNOWN_JOB_KEY``.
    """
    source = bundle.event_of(bundle.source, "source")
    campaign = next((e for e in bundle.events if e.kind is Kind.CAMPAIGN and e.entry.campaign == bundle.campaign), None)
    if campaign is None or source.kind is not Kind.SOURCE:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, "the source's or the campaign's opening event is not in the bundle")
    job_key = campaign.entry.signatures[0].signer
    delegation = bundle.record(DELEGATION_TABLE + job_key, DelegationRecord)
    same = same_member(bundle, delegation.operator, campaign.entry.author)
    if not same or delegation.campaign != bundle.campaign:
        raise Rejected(Reason.UNKNOWN_JOB_KEY, f"job key {job_key.hex()} was delegated for something else")
    owner, operator = member_name(bundle, source.entry.author), member_name(bundle, campaign.entry.author)
    steps.checked(f"the source is {owner}'s, entry {source.index}; the campaign {operator}'s, entry {campaign.index}")
    usage = bundle.find(usage_key(bundle.campaign, bundle.source), Usage)
    if usage is None:
        steps.checked("the state has no usage record of the source in the campaign")
    else:
        problems = []
        if usage.admitted or usage.discarded:
            problems.append(f"{usage.admitted} were admitted, {usage.discarded} more in discarded steps")
        steps.check(f"of {usage.presented} presented examples of the source none was admitted", problems)
    note_closing(bundle, steps)
    steps.attested(f"that the job trained on nothing but what it recorded: {operator}")
    steps.not_covered("other campaigns: each has its own bundle")
