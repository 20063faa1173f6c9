"""The last vote of every member, as far as this node knows: what tells a voter that its journal is not whole.

Votes are signed, so whoever passes one on proves it. A voter whose data directory was wiped or restored from an old
copy learns from its peers that it voted later than its journal remembers.
"""

import logging

import trio

from consensus.codec import decode, encode
from consensus.identifiers import MemberId
from consensus.rejection import Rejected, Unavailable
from consensus.vote import Vote, VoteKind, check_vote
from node.ledger import Ledger
from node.messages import GetLastVote, LastVote
from node.network import Network
from node.voter import Restored

log = logging.getLogger("countersign.votes")

MAX_ANSWER_BYTES = 1 << 16
FETCH_SECONDS = 5.0
ASK_AGAIN_SECONDS = 0.2
VOTES_LOOKED_BACK = 1_000
"""Ledger blocks looked through, once, for members' last votes before one is told."""


class LastVotes:
    """Votes seen of late, by voter."""

    def __init__(self, ledger: Ledger, network: Network) -> None:
        self._ledger = ledger
        self._network = network
        self._last_votes: dict[MemberId, Vote] = {}
        self._looked_at_height = 0
        """Ledger blocks up to here have been looked through."""

    def note(self, vote: Vote) -> None:
        """A checked vote."""
        voter = MemberId(vote.voter)
        held = self._last_votes.get(voter)
        if held is None or _order(vote) > _order(held):
            self._last_votes[voter] = vote

    def note_late(self, vote: Vote, final_view: int) -> None:
        """A vote, not checked, that its voter sends when its view is final already. Others needed it not; but one that
        is always late would leave no trace.

        Raises:
            Rejected: as ``check_vote``.
        """
        held = self._last_votes.get(MemberId(vote.voter))
        if vote.view <= final_view and (held is None or _order(vote) > _order(held)):
            check_vote(vote, self._ledger.committee)
            self.note(vote)

    def of(self, voter: MemberId) -> Vote | None:
        """The latest vote of a member: of this run, or kept behind the last ledger blocks. A run may know of votes only
        that came late, repeated by a voter restored from an old copy.
        """
        height = self._ledger.final.header.height
        for at in range(height, max(self._looked_at_height, height - VOTES_LOOKED_BACK), -1):
            for vote in self._ledger.votes(at):
                self.note(vote)
        self._looked_at_height = height
        return self._last_votes.get(voter)

    async def missing_from(self, voter: MemberId, restored: Restored) -> Vote | None:
        """A vote of ``voter`` that its journal lacks; None once those peers who know of none are, with it, a quorum: no
        fewer could finalize anything against it.
        """
        clear = {voter}
        while not self._ledger.committee.has_quorum(clear):
            for peer in sorted(self._network.connected - clear):
                try:
                    answer = await self._network.request(peer, encode(GetLastVote(voter)), FETCH_SECONDS)
                    vote = decode(answer, LastVote, MAX_ANSWER_BYTES).vote
                    if vote is not None and vote.epoch < self._ledger.committee.epoch:
                        vote = None  # it knows of none in this epoch
                    if vote is not None:
                        check_vote(vote, self._ledger.committee)
                except (Unavailable, Rejected) as error:
                    log.debug("last vote from %s: %s", peer.hex()[:16], error)
                    continue
                if vote is not None and vote.voter == voter and lacks(restored, vote):
                    return vote
                clear.add(peer)
            await trio.sleep(ASK_AGAIN_SECONDS)
        return None


def lacks(restored: Restored, vote: Vote) -> bool:
    """Whether a vote of ours is none of those that the journal holds, nor of a view that it has forgotten."""
    held = ((one.kind, one.view, one.block) for one in restored.votes)
    return vote.view >= restored.first_view and (vote.kind, vote.view, vote.block) not in held


def _order(vote: Vote) -> tuple[int, int, bool]:
    """Rises with each vote of a member that may conflict with another: in a view it notarizes, if it does, before it
    nullifies or finalizes. Heard it may be the other way round, since certificates carry votes too."""
    return vote.epoch, vote.view, vote.kind != VoteKind.NOTARIZE
