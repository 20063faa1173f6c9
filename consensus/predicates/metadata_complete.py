"""``metadata-complete``: a campaign recorded every fact that its policy requires of one.

A policy lists names; a campaign's opening event holds named values: hyperparameters, and what was captured of code,
machine and environment. A name is there if either list has it with a value that says something. Values are the
operator's claims; that they were made before the first step, and cannot be changed, is what the log adds.
"""

from consensus import portions as p
from consensus.bundle import OpenBundle
from consensus.event import Kind
from consensus.predicates.history import member_name
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.state import CAMPAIGN_TABLE, POLICY_TABLE, CampaignRecord, PolicyRecord

SAYS_NOTHING = frozenset({"", "none", "unknown"})
"""Values that a capture writes where it found nothing."""


def metadata_complete(bundle: OpenBundle, steps: Steps) -> None:
    """The campaign's opening event holds every name on the list of the policy it opened under.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``; ``BAD_FIELD`` for a record that names an event of another kind.
    """
    record = bundle.record(CAMPAIGN_TABLE + bundle.campaign, CampaignRecord)
    event = bundle.event_of(record.event, "campaign's opening event")
    if event.kind is not Kind.CAMPAIGN:
        raise Rejected(Reason.BAD_FIELD, f"event {event.id.hex()} is a {event.kind.value}, no campaign")
    operator = member_name(bundle, event.entry.author)
    steps.checked(f"the campaign was opened by {operator}, entry {event.index} of {bundle.header.log_size}")
    campaign = event.operation
    if campaign is None:
        steps.unknown("what the campaign recorded: the portion that holds it is not disclosed")
        return
    assert isinstance(campaign, p.Campaign)
    policy = bundle.record(POLICY_TABLE + campaign.policy, PolicyRecord).policy
    steps.checked(f"it opened under policy {policy.name!a} ({campaign.policy.hex()})")
    values = {
        setting.name: setting.value
        for setting in (*campaign.environment, *campaign.hyperparameters)
        if setting.value.strip().lower() not in SAYS_NOTHING
    }
    required = policy.required_metadata
    missing = [f"{name!a} is not recorded" for name in required if name not in values]
    steps.check(f"all {len(required)} facts that the policy requires are recorded", missing)
    steps.attested(f"that the recorded values are true: {operator}")
    if not required:
        steps.not_covered("anything: the policy requires no fact of a campaign")
