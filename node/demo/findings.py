"""What the rights-holder's node says about the campaign, read from its replica and checked again.

Events come as bytes and pass ``check_event`` here (commitments and every signature), so that the report rests on
what was signed and not on a node's summary of it. Counts per source are the state map's ``Usage`` records. Which
entropy band an example is of says the job's file of base losses, held to the digest that the campaign committed to.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import msgspec

from consensus import portions as p
from consensus.bands import band_of, decode_losses
from consensus.certificate import decode_certificate
from consensus.codec import decode
from consensus.event import CheckedEvent, Kind, check_event
from consensus.identifiers import MemberId
from consensus.membership import Committee
from consensus.receipt import MAX_RECEIPT_BYTES, Receipt
from consensus.rejection import Reason, Rejected
from consensus.reserve import reserve_count
from consensus.review import Decision
from consensus.state import CAMPAIGN_TABLE, CampaignRecord, Usage, read_record, usage_key
from node.client import NodeClient
from node.demo.facts import BandFacts, BlockShare, DecisionFacts, GrantFacts, SourceFacts, StepFacts

MICRO = 1_000_000
MILLI = PERMILLE = 1_000


@dataclass(frozen=True, slots=True)
class CampaignFindings:
    """A campaign as the log has it."""

    steps: tuple[StepFacts, ...]
    grants: tuple[GrantFacts, ...]
    sources: tuple[SourceFacts, ...]
    shares: tuple[BlockShare, ...]
    bands: tuple[BandFacts, ...]
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


def read_campaign(
    client: DemoClient, committee: Committee, campaign: str, base_losses: Path, edges_milli: Sequence[int]
) -> CampaignFindings:
    """Everything the report says about a campaign, whose policy draws its entropy bands at ``edges_milli``.

    Raises:
        Rejected: an event breaks a rule, the campaign is not released, or committed to other base losses.
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
    applied = _Applied(record, _losses_of(record, base_losses), edges_milli)
    for index, event in _events(client, committee, Kind.STEP, campaign):
        undone = event.id in discarded
        steps.append(_step(index, event, undone))
        if not undone:
            applied.add(event)
    sources = tuple(_sources(client, campaign))
    names = {bytes.fromhex(source.id): source.name for source in sources}
    return CampaignFindings(
        steps=tuple(steps),
        grants=tuple(_grant(event, committee) for _, event in _events(client, committee, Kind.GRANT, campaign)),
        sources=sources,
        shares=applied.shares(names),
        bands=applied.bands(names),
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


def _losses_of(record: CampaignRecord, path: Path) -> dict[bytes, tuple[int, tuple[int, ...]]]:
    """Of each source the number of its first example, and the base losses from there on."""
    encoded = path.read_bytes()
    found = sha256(encoded).digest()
    if found != record.base_losses_sha256:
        raise Rejected(
            Reason.DIGEST_MISMATCH,
            f"{path} has SHA-256 {found.hex()}, the campaign committed to {record.base_losses_sha256.hex()}",
        )
    losses = decode_losses(encoded, sum(held.count for held in record.manifest))
    by_source, begun = {}, 0
    for held in record.manifest:
        by_source[held.source] = (held.first, losses[begun : begun + held.count])
        begun += held.count
    return by_source


@dataclass(slots=True)
class _Applied:
    """The depths that steps applied, example by example, added up by parameter block, source and entropy band."""

    record: CampaignRecord
    losses: Mapping[bytes, tuple[int, tuple[int, ...]]]
    edges_milli: Sequence[int]
    weights: dict[str, Counter[tuple[bytes, int]]] = field(default_factory=dict)
    seen: set[tuple[bytes, int, int]] = field(default_factory=set)
    """Source, band and number of every example admitted."""

    def add(self, event: CheckedEvent) -> None:
        """A step that stands."""
        assert isinstance(event.governance, p.StepGovernance)
        assert event.portions.data is not None
        profiles = {
            (profile.content_class, profile.band): profile.weights_permille for profile in event.governance.profiles
        }
        for use, item in zip(event.items, event.portions.data.items, strict=True):
            assert isinstance(use, p.SourceUse)
            bands = [self._band(use.source, example) for example in item.examples]
            self.seen.update((use.source, band, number) for band, number in zip(bands, item.examples, strict=True))
            for band, count in Counter(bands).items():
                for block, weight in zip(self.record.blocks, profiles[use.content_class, band], strict=True):
                    self.weights.setdefault(block, Counter())[use.source, band] += count * weight

    def shares(self, names: Mapping[bytes, str]) -> tuple[BlockShare, ...]:
        """Of every block, in the campaign's order."""
        found = []
        for block in self.record.blocks:
            weights = self.weights.get(block, Counter())
            total = weights.total()
            permille = {
                (names[source], band): round(PERMILLE * weight / total)
                for (source, band), weight in weights.items()
                if weight
            }
            found.append(BlockShare(block, permille))
        return tuple(found)

    def bands(self, names: Mapping[bytes, str]) -> tuple[BandFacts, ...]:
        """Those above the lowest."""
        found = []
        for band, edge_milli in enumerate(self.edges_milli, start=1):
            examples = Counter(names[source] for source, of, _ in self.seen if of == band)
            blocks = [
                block
                for block in self.record.blocks
                if any(weight for (_, of), weight in self.weights.get(block, Counter()).items() if of == band)
            ]
            found.append(BandFacts(band, edge_milli / MILLI, dict(sorted(examples.items())), tuple(blocks)))
        return tuple(found)

    def _band(self, source: bytes, example: int) -> int:
        first, losses = self.losses[source]
        return band_of(losses[example - first], self.edges_milli)


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
            reserve=reserve_count(bytes.fromhex(row.content_root), row.example_count, row.reserve_below),
            revoked=bool(row.revoked_at_ms),
            presented=usage.presented if usage else 0,
            admitted=usage.admitted if usage else 0,
            refused={count.reason: count.count for count in usage.refused} if usage else {},
            discarded=usage.discarded if usage else 0,
        )
