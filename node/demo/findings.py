"""What the rights-holder's node says about the campaign, read from its replica and checked again.

Events come as bytes and pass ``check_event`` here (commitments and every signature), so that the report rests on
what was signed and not on a node's summary of it. Counts per source are the state map's ``Usage`` records.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from consensus import portions as p
from consensus.certificate import decode_certificate
from consensus.codec import decode
from consensus.event import CheckedEvent, Kind, check_event
from consensus.identifiers import MemberId
from consensus.membership import Committee
from consensus.receipt import MAX_RECEIPT_BYTES, Receipt
from consensus.rejection import Reason, Rejected
from consensus.review import Decision
from consensus.state import CAMPAIGN_TABLE, CampaignRecord, Usage, read_record, usage_key
from node.client import NodeClient
from node.demo.facts import BlockShare, DecisionFacts, GrantFacts, SourceFacts, StepFacts

MICRO = 1_000_000
PERMILLE = 1_000


@dataclass(frozen=True, slots=True)
class CampaignFindings:
    """A campaign as the log has it."""

    steps: tuple[StepFacts, ...]
    grants: tuple[GrantFacts, ...]
    sources: tuple[SourceFacts, ...]
    shares: tuple[BlockShare, ...]
    decisions: tuple[DecisionFacts, ...]
    final_steps: int
    rollbacks: int


class FinalHead(msgspec.Struct, frozen=True):
    """The part of ``/v1/campaigns/{id}`` that is needed here."""

    steps: int
    rollbacks: int
    closed: str


class DemoClient(NodeClient):
    """A node's client that also reads records of the state."""

    def campaign_head(self, campaign: str) -> FinalHead:
        """Where a campaign stands."""
        return msgspec.json.decode(self._request("GET", f"/v1/campaigns/{campaign}"), type=FinalHead)

    def state(self, key: bytes) -> bytes:
        """A record of the state.

        Raises:
            Rejected: ``NOT_FOUND``.
        """
        return self._request("GET", f"/v1/state/{key.hex()}")

    def find_state(self, key: bytes) -> bytes | None:
        """A record of the state, or None."""
        try:
            return self.state(key)
        except Rejected as error:
            if error.reason is not Reason.NOT_FOUND:
                raise
            return None


def read_campaign(client: DemoClient, committee: Committee, campaign: str) -> CampaignFindings:
    """Everything the report says about a campaign.

    Raises:
        Rejected: an event breaks a rule, or the campaign is not released.
        Unavailable: the node does not answer.
    """
    head = client.campaign_head(campaign)
    if head.closed != "released":
        raise Rejected(Reason.ROOT_NOT_FINAL, f"campaign {campaign} is {head.closed or 'open'}, not released")
    record = read_record(client.state(CAMPAIGN_TABLE + bytes.fromhex(campaign)), CampaignRecord)
    discarded: set[bytes] = set()
    for _, event in _events(client, committee, Kind.ROLLBACK, campaign):
        assert isinstance(event.operation, p.Rollback)
        discarded.update(event.operation.discarded)
    steps = []
    weights: dict[str, dict[bytes, int]] = {block: {} for block in record.blocks}
    for index, event in _events(client, committee, Kind.STEP, campaign):
        undone = event.id in discarded
        steps.append(_step(index, event, undone))
        if not undone:
            _add_weights(weights, record.blocks, event)
    sources = tuple(_sources(client, campaign))
    names = {bytes.fromhex(source.id): source.name for source in sources}
    return CampaignFindings(
        steps=tuple(steps),
        grants=tuple(_grant(event, committee) for _, event in _events(client, committee, Kind.GRANT, campaign)),
        sources=sources,
        shares=tuple(_share(block, weights[block], names) for block in record.blocks),
        decisions=tuple(
            _decision(event, committee) for _, event in _events(client, committee, Kind.DECISION, campaign)
        ),
        final_steps=head.steps,
        rollbacks=head.rollbacks,
    )


def count_events(client: NodeClient, kind: Kind) -> int:
    """How many events of a kind are on the log."""
    return sum(1 for _ in client.every_event({"kind": kind.value}))


def certificate_bytes(client: NodeClient, event: str) -> int:
    """Bytes of the signature that certifies the ledger block of an event's receipt."""
    receipt = decode(client.receipt(event), Receipt, MAX_RECEIPT_BYTES)
    return len(decode_certificate(receipt.certificate).signature)


def _events(client: NodeClient, committee: Committee, kind: Kind, campaign: str) -> Iterator[tuple[int, CheckedEvent]]:
    for row in client.every_event({"kind": kind.value, "campaign": campaign}):
        yield row.index, check_event(client.event_bytes(row.id), committee)


def _step(index: int, event: CheckedEvent, undone: bool) -> StepFacts:
    operation, governance = event.operation, event.governance
    assert isinstance(operation, p.StepOperation)
    assert isinstance(governance, p.StepGovernance)
    return StepFacts(
        step=operation.index,
        attempt=event.entry.attempt,
        log_index=index,
        loss=operation.loss_micro / MICRO if governance.admitted else None,
        presented=governance.presented,
        admitted=governance.admitted,
        refused=governance.presented - governance.admitted,
        memorization_permille=max((signal.signal_permille for signal in operation.memorization), default=0),
        discarded=undone,
    )


def _add_weights(weights: dict[str, dict[bytes, int]], blocks: tuple[str, ...], event: CheckedEvent) -> None:
    """Adds admitted examples × depth weight, per parameter block and source."""
    assert isinstance(event.governance, p.StepGovernance)
    profiles = {profile.content_class: profile.weights_permille for profile in event.governance.profiles}
    for use in event.items:
        assert isinstance(use, p.SourceUse)
        if not use.admitted:
            continue
        for block, weight in zip(blocks, profiles[use.content_class], strict=True):
            weights[block][use.source] = weights[block].get(use.source, 0) + use.admitted * weight


def _share(block: str, weights: Mapping[bytes, int], names: Mapping[bytes, str]) -> BlockShare:
    total = sum(weights.values())
    return BlockShare(
        block, {names[source]: round(PERMILLE * weight / total) for source, weight in weights.items() if weight}
    )


def _grant(event: CheckedEvent, committee: Committee) -> GrantFacts:
    assert isinstance(event.governance, p.GrantTerms)
    return GrantFacts(
        first_step=event.governance.first_step,
        last_step=event.governance.last_step,
        sources=len(event.items),
        signers=tuple(sorted(committee.member(MemberId(signer)).name for signer in event.signers)),
    )


def _decision(event: CheckedEvent, committee: Committee) -> DecisionFacts:
    assert isinstance(event.governance, Decision)
    return DecisionFacts(
        signers=tuple(sorted(committee.member(MemberId(signer)).name for signer in event.signers)),
        outcome=event.governance.outcome,
        rationale=event.governance.rationale,
    )


def _sources(client: DemoClient, campaign: str) -> Iterator[SourceFacts]:
    for row in sorted(client.sources().sources, key=lambda each: (each.author_name, each.name)):
        encoded = client.find_state(usage_key(bytes.fromhex(campaign), bytes.fromhex(row.id)))
        usage = None if encoded is None else read_record(encoded, Usage)
        yield SourceFacts(
            name=row.name,
            id=row.id,
            owner=row.author_name,
            licence=row.licence,
            purposes=row.purposes,
            content_class=row.content_class,
            examples=row.example_count,
            revoked=bool(row.revoked_at_ms),
            presented=usage.presented if usage else 0,
            admitted=usage.admitted if usage else 0,
            refused={count.reason: count.count for count in usage.refused} if usage else {},
            discarded=usage.discarded if usage else 0,
        )
