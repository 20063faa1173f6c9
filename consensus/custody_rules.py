"""Custody: members other than the operator that say they hold what a campaign committed to (ADR 031).

* *custody*: by a member that is not an operator, about a campaign that keeps accumulators, naming the campaign's last
  event as it stands: a word about windows that were undone since is worth nothing.
* A *release* waits until of every role that the policy named when the campaign opened some member has said so of the
  event that the campaign ends with.

No member sees another's disk, so that the files are there is the custodian's word. It is signed, and anybody whom the
custodian lets can ask for them.
"""

from consensus.event import CheckedEvent
from consensus.identifiers import Role
from consensus.membership import Committee
from consensus.portions import Custody
from consensus.rejection import Reason, Rejected
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    CUSTODY_TABLE,
    CampaignHead,
    CampaignRecord,
    CustodyRecord,
    StateView,
    review_key,
)


def admit_custody(view: StateView, event: CheckedEvent, timestamp_ms: int, committee: Committee) -> None:
    """Check a custodian's word, and keep it in place of what it said of the campaign before.

    Raises:
        Rejected: with the rule it breaks.
    """
    custody = event.governance
    assert isinstance(custody, Custody)
    identifier, custodian = event.entry.campaign, event.entry.author
    if event.entry.sequence or event.entry.attempt:
        raise Rejected(Reason.BAD_FIELD, "a custody event has sequence and attempt 0")
    campaign = view.get(CAMPAIGN_TABLE + identifier, CampaignRecord, Reason.UNKNOWN_CAMPAIGN, "campaign")
    head = view.get(CAMPAIGN_HEAD_TABLE + identifier, CampaignHead, Reason.UNKNOWN_CAMPAIGN, "campaign")
    if not campaign.accumulator_window_steps:
        raise Rejected(Reason.BAD_FIELD, "the campaign keeps no accumulators, so there is nothing to hold")
    if custody.last_event != head.last_event:
        raise Rejected(
            Reason.STEP_CHAIN_BROKEN,
            f"holds what stands up to {custody.last_event.hex()}, the campaign's last event is {head.last_event.hex()}",
        )
    key = review_key(CUSTODY_TABLE, identifier, custodian)
    held = view.find(key, CustodyRecord)
    if held is not None and held.last_event == custody.last_event:
        raise Rejected(Reason.DUPLICATE, f"the member said so in {held.event.hex()}")
    view.put(key, CustodyRecord(identifier, event.id, custodian, custody.last_event, timestamp_ms))


def check_in_custody(
    view: StateView, identifier: bytes, campaign: CampaignRecord, head: CampaignHead, committee: Committee
) -> None:
    """Of every role that must hold the campaign's files some member does, by its word.

    Raises:
        Rejected: ``CUSTODY_MISSING``.
    """
    for role in campaign.custody:
        members = committee.role_members(Role(role))
        keys = [review_key(CUSTODY_TABLE, identifier, member.id) for member in members]
        records = [view.find(key, CustodyRecord) for key in keys]
        if not any(record is not None and record.last_event == head.last_event for record in records):
            raise Rejected(
                Reason.CUSTODY_MISSING,
                f"no {role} member says that it holds the campaign's files up to {head.last_event.hex()}",
            )
