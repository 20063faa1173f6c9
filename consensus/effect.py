"""What the BFT engine asks of its host, and the messages voters exchange.

An engine is pure: it returns effects, in order, and its host carries them out. The host's promises are
written on each effect; ``engine`` says when each is asked for.
"""

from dataclasses import dataclass

from consensus.block import Header
from consensus.certificate import Certificate
from consensus.identifiers import Digest, Height, MemberId, View
from consensus.vote import Evidence, Notarization, Nullification, Proposal, Stalled, Vote, VoteKind

Message = Vote | Proposal | Notarization | Nullification | Certificate | Stalled
"""What travels between voters. A host checks a message before it hands it to the engine."""


@dataclass(frozen=True, slots=True)
class CastVote:
    """Sign, journal with fsync, send to all voters, then hand to ``Engine.own_vote``: in this order.

    A finalize vote carries the voter's share; it may be signed from the moment the same ledger block is
    notarized, beside the fsync, but leaves memory only inside the journalled vote. ``proposal`` is the
    voter's own: it is journalled together with the vote and sent in one write before it. A crash before
    the journal means that nothing was sent. A host that cannot journal stops.
    """

    kind: VoteKind
    view: View
    block: Digest
    proposal: Proposal | None = None


@dataclass(frozen=True, slots=True)
class RequestProposal:
    """Build a ledger block on ``parent`` for ``view`` and answer ``Engine.own_proposal``.

    Where all events that wait are on the branch already, answer ``Engine.nothing_to_propose`` instead, unless the
    ledger block ``may_be_empty``: then it is time for one.
    """

    view: View
    parent: Header
    may_be_empty: bool


@dataclass(frozen=True, slots=True)
class VerifyBlock:
    """Apply to the state and tree overlay of ``parent`` and answer ``Engine.block_verified``.

    Ledger blocks of one branch are asked for in order; ``parent`` was found valid before or is final.
    """

    proposal: Proposal
    header: Header
    parent: Header


@dataclass(frozen=True, slots=True)
class FetchBlock:
    """Get a ledger block and the events it names, from one of ``sources`` or anyone.

    A fetched proposal goes through ``check_proposal`` to ``Engine.receive``; events that were missing
    after ``MISSING`` lead to another ``Engine.block_verified``.
    """

    block: Digest
    sources: tuple[MemberId, ...]


@dataclass(frozen=True, slots=True)
class NeedBlocks:
    """Catch up from ``from_height`` to the certified ledger block, then call ``Engine.caught_up``."""

    from_height: Height
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send to every other member."""

    message: Message


@dataclass(frozen=True, slots=True)
class Send:
    """Send to one member."""

    to: MemberId
    message: Message


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Call ``Engine.tick`` at ``deadline_ms``, instead of at any earlier set deadline; None: not at all."""

    deadline_ms: int | None


@dataclass(frozen=True, slots=True)
class CombineFinalization:
    """Combine the shares of a quorum of finalize votes and check the certificate once.

    Hand the certificate to ``Engine.receive``; if it fails, find the bad shares one by one and name their
    voters to ``Engine.combine_failed``.
    """

    view: View
    block: Digest
    votes: tuple[Vote, ...]


@dataclass(frozen=True, slots=True)
class Finalized:
    """Apply and append ``headers``, oldest first, and store ``certificate``, which vouches for the last.

    Each extends the one before; the first extends the last finalized one. A host skips heights at or
    below its head (catch-up may have been faster). ``votes`` are the identity votes seen, kept so that
    a fork can name culprits; empty if the certificate came before them.
    """

    headers: tuple[Header, ...]
    certificate: Certificate
    votes: tuple[Vote, ...]


@dataclass(frozen=True, slots=True)
class PublishEvidence:
    """Submit evidence of a member's conflicting messages to the log."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop voting and applying, for good, and publish what is known. The engine answers nothing more."""

    reason: str


Effect = (
    CastVote
    | RequestProposal
    | VerifyBlock
    | FetchBlock
    | NeedBlocks
    | Broadcast
    | Send
    | SetTimer
    | CombineFinalization
    | Finalized
    | PublishEvidence
    | Halt
)
