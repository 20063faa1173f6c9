"""``evidence``: a member signed two messages that contradict each other.

The event on the log only carries the two messages: whether they convict is checked here, by signatures and rules
alone, and holds whoever authored the event.
"""

from consensus import vote as v
from consensus.block import Header, decode_header
from consensus.bundle import OpenBundle
from consensus.event import Kind
from consensus.evidence import EvidenceReport, Offence, check_evidence
from consensus.identifiers import ChainId
from consensus.predicates.history import member_name
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected

_RULES = {
    Offence.TWO_NOTARIZE_VOTES: "a voter notarizes at most one ledger block in a view",
    Offence.TWO_FINALIZE_VOTES: "a voter finalizes at most one ledger block in a view",
    Offence.NULLIFY_AND_FINALIZE: "a voter never nullifies and finalizes the same view",
    Offence.TWO_PROPOSALS: "a leader proposes at most one ledger block in its view",
}


def evidence(bundle: OpenBundle, steps: Steps) -> None:
    """The messages in the event asked about convict a member.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``; ``BAD_FIELD`` for an event of another kind; what ``check_evidence`` finds.
    """
    event = bundle.event_of(bundle.event, "event")
    if event.kind is not Kind.EVIDENCE:
        raise Rejected(Reason.BAD_FIELD, f"event {event.id.hex()} is a {event.kind.value}, no evidence")
    author = member_name(bundle, event.entry.author)
    steps.checked(f"event {event.id.hex()} is entry {event.index} of {bundle.header.log_size}, handed in by {author}")
    report = event.governance
    if report is None:
        steps.unknown("the two messages: the portion that holds them is not disclosed")
        return
    assert isinstance(report, EvidenceReport)
    found = check_evidence(report, bundle.trusted.at(event.index).committee)
    member = bundle.trusted.of(found.epoch).committee.member(found.member)
    first, second = _said(report, bundle.trusted.chain_id)
    steps.checked(f"{member.name} ({member.role.value}) signed, of view {found.view} in epoch {found.epoch}: {first}")
    steps.checked(f"{member.name} signed, of the same view: {second}")
    steps.checked(f"the two contradict each other ({found.offence.value}): {_RULES[found.offence]}")
    if found.epoch < bundle.trusted.at(event.index).committee.epoch:
        steps.not_covered(
            f"when: epoch {found.epoch} had ended before the event was appended, and keys of an ended epoch still sign"
        )
    steps.not_covered(
        f"whether {member.name} meant to: a stolen key, a copied keystore or a restored vote journal signs as well"
    )
    steps.not_covered("BLS shares: they are no part of the blame, since other members of a role can forge them")


def _said(report: EvidenceReport, chain_id: ChainId) -> tuple[str, str]:
    match report.proof:
        case v.VoteEvidence(first, second):
            return _vote(first), _vote(second)
        case v.ProposalEvidence(first, second):
            return _proposal(decode_header(first.header, chain_id)), _proposal(decode_header(second.header, chain_id))


def _vote(vote: v.Vote) -> str:
    if vote.kind == v.VoteKind.NULLIFY:
        return "a vote to nullify it"
    return f"a vote to {vote.kind.name.lower()} ledger block {vote.block.hex()}"


def _proposal(header: Header) -> str:
    return f"a proposal of ledger block {header.digest.hex()} at height {header.height}"
