"""The BFT round: Simplex with role quorums, as a pure state machine.

PROTOCOL. Views are numbered from 1; voters lead in turn. A *certificate* of a view is a notarization
or nullification (a quorum of identity votes) or a finalization (see ``certificate``); a quorum has ``t_r``
members of every voting role. In view ``v`` a voter:

1. *Enter*: on any certificate of ``v - 1`` or a later view, which it forwards once, go to the view after it.
2. *Propose*: the leader, once a ledger block is due, proposes on the highest notarized ledger block whose
   branch it has verified, with every view between nullified; it sends its notarize vote with the proposal.
3. *Notarize* ◆ the leader's first proposal, once, if its parent is notarized (or final), every view between
   the parent's and ``v`` is nullified (the gap check), and the host finds it valid on its parent's overlay.
4. *Finalize* ◆ a ledger block as soon as it is notarized and found valid, if it did not nullify its view.
   It has entered ``v + 1`` by then and goes on there: two hops notarize, the third finalizes meanwhile.
5. *Nullify* ◆ ``v`` when its timer fires, its proposal is invalid, its leader is absent (see ``absence``) or
   so many nullified that it cannot be notarized any more, if it did not finalize in ``v``.
6. *Decide*: a finalization makes its ledger block and all ancestors final. Late finalize votes count.

Why no fork: two quorums share an honest voter in some role. If a ledger block is final in ``v``, that voter
finalized, so ``v`` is never nullified, nothing else is notarized in it, and whoever notarizes above must,
by the gap check, extend it.

*When a ledger block is due*: at once while there is work that is not on its branch yet; after half the first
timeout while the highest notarized ledger block is not final; ``heartbeat_ms`` after the last one otherwise. *When the
timer runs*: while there is work, a message of this or a later view has been seen, the highest notarized ledger
block is not final, or a heartbeat is due. Timeouts grow by half up to a cap with every view left after one, and
go a quarter of the way back to where they began with every finalization.
*On standstill*, two timeouts after the last finalization (whatever views ended meanwhile: others may have
finalized what we lack) and then every timeout: repeat own votes that are not final yet, the
own proposal with the certificates of its gap, and the certificate that led to this view; ask all for
what is missing (``Stalled``); repeat requests. The asked answer with certificates, at most
``MAX_ANSWER_MESSAGES`` and ``MAX_ANSWER_BYTES`` at a time.

EPOCHS. One engine serves one epoch. The host ends it once the epoch's terminal ledger block is final (``transition``),
even if a carrier's certificate made it so, and begins another under the new members, whose views count from 1.

DEVIATIONS from Chan and Pass, *Simplex Consensus*, eprint 2023/463:

- Quorums are per role instead of 2n/3; leaders rotate instead of being drawn by a hash.
- One dummy block per view becomes the *nullification*; the finalized chain has no dummies.
- A view is entered on a certificate of any later view, without those between (a proposer that lacks
  some asks for them).
- A voter that nullified does not notarize in that view any more; an invalid proposal is nullified at once.
- Finalize votes may be sent in any later view; they need a verified ledger block, since a vote asserts
  that its events are held.
- Timers are suspended when idle, and grow. Idle leaders propose nothing until the heartbeat.
- Certificates are forwarded when they move the forwarder; the rest travels on request.

HOST. One call per input, with the host's monotonic clock in milliseconds; each returns effects to be
carried out in order (``effect`` has the promises). Messages are checked (``check_vote`` ...) before;
``wants`` tells which need no check since they would change nothing. On restart: ``restore`` with the
journalled votes and proposals above the last finalized ledger block, then ``start``. A voter whose journal
is lost or rolled back must run with ``own=None``; a vote of ours that our journal lacks and has not forgotten
halts the engine.

MEMORY is bounded by votes of ``LOOKAHEAD_VIEWS`` views ahead, three per voter and view, two proposals per
view, and the certificates of views above the last finalized one; below it everything is dropped.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from consensus.absence import Absence
from consensus.block import VERSION, Header, decode_header
from consensus.branches import Branch, Branches, Status, Verdict
from consensus.certificate import Certificate
from consensus.codec import encode
from consensus.effect import (
    Broadcast,
    CastVote,
    CombineFinalization,
    Effect,
    FetchBlock,
    Finalized,
    Halt,
    Message,
    NeedBlocks,
    PublishEvidence,
    RequestProposal,
    Send,
    SetTimer,
    VerifyBlock,
)
from consensus.identifiers import ZERO_DIGEST, Digest, Height, MemberId, View
from consensus.membership import Committee
from consensus.rejection import InvariantBroken
from consensus.vote import (
    Notarization,
    Nullification,
    Proposal,
    ProposalEvidence,
    Stalled,
    Tally,
    Vote,
    VoteKind,
)

LOOKAHEAD_VIEWS = 64
MAX_UNFINAL_BLOCKS = 1_000
"""How far notarized ledger blocks may run ahead of the finalized one. What one certificate makes final has to fit what
stores and peers take (1,024); where all of a role must vote, one that withholds its finalize votes decides how far.
"""
MAX_ANSWER_MESSAGES = 128
MAX_ANSWER_BYTES = 2 << 20
"""Of certificates said at once, encoded. What waits for a peer is bounded: of many members with large signatures, more
would push out what was asked for first."""
ViewCertificate = Notarization | Nullification | Certificate
"""What ends a view."""
DECIDED = (Status.VALID, Status.REFUSED, Status.INVALID)


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in milliseconds; each host's own choice but for the heartbeat, which genesis fixes."""

    timeout_ms: int = 400
    max_timeout_ms: int = 30_000
    heartbeat_ms: int = 10_000


@dataclass(slots=True)
class _Round:
    """What is known of one view: others' votes, and what we voted."""

    tally: Tally
    proposal: Proposal | None = None
    proposal_reported: bool = False
    notarization: Notarization | None = None
    nullification: Nullification | None = None
    notarized: Digest | None = None
    """What we voted to notarize."""
    nullified: bool = False
    finalized: Digest | None = None
    """What we voted to finalize."""
    votes: list[Vote] = field(default_factory=list)
    """Our own signed votes: journalled, hence sendable."""
    combining: bool = False


class Engine:
    """One voter's (or, with ``own=None``, one observer's) part in the BFT round."""

    def __init__(
        self,
        committee: Committee,
        own: MemberId | None,
        timing: Timing,
        finalized: Header,
        certificate: Certificate | None,
    ) -> None:
        """``finalized`` is the ledger's head with its ``certificate``.

        An epoch begins at the genesis header or at the terminal ledger block of the epoch before: its view counts as 0,
        and ``certificate`` is None.
        """
        final_view = View(finalized.view if finalized.epoch == committee.epoch else 0)
        self.committee = committee
        self.own = own
        self.timing = timing
        self.branches = Branches(finalized)
        self._absence = Absence()
        self.halted: str | None = None
        self._certificate = certificate
        self._pending: Certificate | None = None
        self._rounds: dict[View, _Round] = {}
        self._unsettled: set[View] = set()
        self._first_view = View(0)
        """How we voted in earlier ones may be forgotten."""
        self._highest_certified = final_view
        self._highest_notarized = final_view
        self._highest_seen = final_view
        self._requested: set[Digest] = set()
        self._catching_up = False
        self._answered_ms: dict[MemberId, int] = {}
        self._effects: list[Effect] = []
        self._now_ms = 0
        self._deadline_ms: int | None = None
        self._has_work = False
        self._last_block_ms = 0
        self._timeout_ms = timing.timeout_ms
        self._repeat_from = 0
        self.view = View(final_view + 1)
        self._entry: ViewCertificate | None = certificate
        self._entered_ms = 0
        self._active_since_ms: int | None = None
        self._repeat_at_ms: int | None = None
        self._proposal_requested = False
        self._nothing_above: Header | None = None
        """The ledger block to extend on whose branch all is that waits, as the host said in this view."""

    @property
    def finalized(self) -> Header:
        """Header of the last finalized ledger block."""
        return self.branches.finalized

    @property
    def final_view(self) -> View:
        """Its view in this epoch: 0 where the epoch begins at it."""
        header = self.branches.finalized
        return View(header.view if header.epoch == self.committee.epoch else 0)

    # Inputs

    def restore(self, votes: Iterable[Vote], proposals: Iterable[Proposal], first_view: View) -> None:
        """Take back what the journal holds above the last finalized ledger block; before ``start``.

        It does not say how we voted in views before ``first_view``: we vote in none of them again.

        Raises:
            InvariantBroken: the journal holds another voter's vote, or votes that conflict.
        """
        self._first_view = first_view
        for vote in votes:
            if vote.voter != self.own:
                raise InvariantBroken(f"the journal holds a vote of {vote.voter.hex()}")
            if vote.view <= self.final_view:
                continue
            state = self._round(View(vote.view))
            block = Digest(vote.block)
            if vote.kind == VoteKind.NOTARIZE and state.notarized in (None, block):
                state.notarized = block
            elif vote.kind == VoteKind.FINALIZE and state.finalized in (None, block) and not state.nullified:
                state.finalized = block
            elif vote.kind == VoteKind.NULLIFY and state.finalized is None:
                state.nullified = True
            else:
                raise InvariantBroken(f"the journal holds conflicting votes of view {vote.view}")
            state.votes.append(vote)
            state.tally.add(vote)
            self.view = max(self.view, View(vote.view + (vote.kind == VoteKind.FINALIZE)))
            self._highest_seen = self.view
        for proposal in proposals:
            header = decode_header(proposal.header, self.committee.chain_id)
            if header.view > self.final_view:
                self.branches.add(proposal, header)
                state = self._round(View(header.view))
                state.proposal = state.proposal or proposal

    def start(self, now_ms: int) -> list[Effect]:
        """Begin, or begin again: whoever restarts repeats its votes and asks what it missed."""
        self._last_block_ms = self._entered_ms = now_ms
        self._now_ms = now_ms
        for view in sorted(self._rounds):
            for kind in VoteKind:
                self._count(view, kind)
        if self._rounds or self._certificate is not None:
            self._repeat()
        return self._settle(now_ms)

    def receive(self, message: Message, sender: MemberId, now_ms: int) -> list[Effect]:
        """A checked message from another member, or a certificate that the host combined or fetched."""
        if self.halted is not None:
            return []
        self._now_ms = now_ms
        match message:
            case Vote():
                self._on_vote(message)
            case Proposal():
                self._on_proposal(message)
            case Notarization():
                self._on_notarization(message)
            case Nullification():
                self._on_nullification(message)
            case Certificate():
                self._on_finalization(message)
            case Stalled():
                self._answer(message, sender)
        return self._settle(now_ms)

    def own_vote(self, vote: Vote, now_ms: int) -> list[Effect]:
        """A vote the engine asked for, signed, journalled and sent."""
        if self.halted is not None or vote.view <= self.final_view:
            return []
        state = self._round(View(vote.view))
        if not self._decided_to_cast(state, vote):
            raise InvariantBroken(f"a {vote.kind.name.lower()} vote of view {vote.view} that nobody asked for")
        state.votes.append(vote)
        state.tally.add(vote)
        self._count(View(vote.view), vote.kind)
        return self._settle(now_ms)

    def own_proposal(self, proposal: Proposal, now_ms: int) -> list[Effect]:
        """The answer to ``RequestProposal``: nothing happens if the view is over meanwhile."""
        header = decode_header(proposal.header, self.committee.chain_id)
        if self.halted is not None or header.view != self.view or self.own != header.leader:
            return []
        state = self._round(self.view)
        if state.proposal is None and self._may_notarize(state):
            block = self.branches.add(proposal, header)
            block.status = Status.VALID
            state.proposal = proposal
            # A traitor may have shown them to us alone: without them others could not vote for what rests on them.
            self._effects += [Broadcast(one) for one in _at_once(self._rests_on(header)) if one != self._entry]
            self._vote(VoteKind.NOTARIZE, self.view, block.digest, proposal)
        return self._settle(now_ms)

    def nothing_to_propose(self, request: RequestProposal, now_ms: int) -> list[Effect]:
        """The answer to a ``RequestProposal`` that may not be empty: all that waits is on its branch already.

        Asked again once ``work_available`` says that more waits, another ledger block is to be extended, time asks, or
        it leads another view.
        """
        if self.halted is not None or request.may_be_empty or request.view != self.view:
            return []
        self._proposal_requested = False
        self._nothing_above = request.parent
        return self._settle(now_ms)

    def block_verified(self, digest: Digest, verdict: Verdict, now_ms: int) -> list[Effect]:
        """The host's answer to ``VerifyBlock``."""
        block = self.branches.get(digest)
        if self.halted is not None or block is None or block.status in DECIDED:
            return []
        match verdict:
            case Verdict.MISSING:
                block.status = Status.MISSING
                self._effects.append(FetchBlock(digest, self._holders(View(block.header.view))))
            case Verdict.VALID:
                block.status = Status.VALID
            case Verdict.REFUSED:
                block.status = Status.REFUSED
            case Verdict.INVALID:
                block.status = Status.INVALID
        return self._settle(now_ms)

    def combine_failed(self, view: View, bad_voters: Iterable[MemberId], now_ms: int) -> list[Effect]:
        """The shares of ``bad_voters`` spoil the certificate: their votes do not count."""
        if self.halted is not None or view <= self.final_view:
            return []
        state = self._round(view)
        state.combining = False
        for voter in bad_voters:
            state.tally.exclude(voter)
        self._count(view, VoteKind.FINALIZE)
        return self._settle(now_ms)

    def caught_up(self, header: Header, certificate: Certificate, now_ms: int) -> list[Effect]:
        """The host has applied everything up to ``header``, certified by ``certificate``.

        The end of the epoch before is no news, whatever its view: this epoch began at it.
        """
        if self.halted is not None or header.epoch != self.committee.epoch or header.view <= self.final_view:
            return []
        self._now_ms = now_ms
        try:
            self._set_finalized(header, certificate)
        except InvariantBroken as broken:
            self._halt(str(broken))
        return self._settle(now_ms)

    def work_available(self, now_ms: int) -> list[Effect]:
        """Events wait to be appended, or more of them: propose, or expect a proposal."""
        self._has_work = True
        self._nothing_above = None
        return self._settle(now_ms)

    def work_exhausted(self, now_ms: int) -> list[Effect]:
        """No events wait."""
        self._has_work = False
        return self._settle(now_ms)

    @property
    def waits_for_work(self) -> bool:
        """Whether it leads and proposed nothing, since all that waited was on its branch: more is news to it."""
        return self._nothing_above is not None and self._is_to_propose()

    def peers_lost(self, members: Iterable[MemberId], now_ms: int) -> list[Effect]:
        """The members to whom the host had a link and has none now; replaces what it said before."""
        self._absence.set_unreachable(members)
        return self._settle(now_ms)

    def tick(self, now_ms: int) -> list[Effect]:
        """The deadline of ``SetTimer`` has passed (or not yet: then nothing happens)."""
        if self._deadline_ms is not None and now_ms >= self._deadline_ms:
            self._deadline_ms = None
        return self._settle(now_ms)

    def wants(self, message: Message) -> bool:
        """Whether the message could change anything; if not, its signatures need no check."""
        match message:
            case Vote():
                state = self._rounds.get(View(message.view))
                return self._in_window(message.view) and (state is None or not state.tally.knows(message))
            case Proposal():
                return self.branches.get(message.digest) is None
            case Notarization():
                state = self._rounds.get(View(message.view))
                return message.view > self.final_view and (state is None or state.notarization is None)
            case Nullification():
                state = self._rounds.get(View(message.view))
                return message.view > self.final_view and (state is None or state.nullification is None)
            case Certificate():
                known = self.final_view if self._pending is None else self._pending.view
                return message.view > known
            case Stalled():
                return True

    # The rules ◆

    def _may_notarize(self, state: _Round) -> bool:
        return self.own is not None and state.notarized is None and not state.nullified

    def _may_nullify(self, state: _Round) -> bool:
        return self.own is not None and not state.nullified and state.finalized is None

    def _may_finalize(self, state: _Round) -> bool:
        return self.own is not None and state.finalized is None and not state.nullified

    def _gap_nullified(self, parent_view: View, view: View) -> bool:
        return all(
            (state := self._rounds.get(View(between))) is not None and state.nullification is not None
            for between in range(parent_view + 1, view)
        )

    # Messages

    def _on_vote(self, vote: Vote) -> None:
        if self._in_window(vote.view):
            self._highest_seen = max(self._highest_seen, View(vote.view))
            self._add_vote(vote)
            self._count(View(vote.view), vote.kind)

    def _add_vote(self, vote: Vote) -> None:
        state = self._round(View(vote.view))
        if vote.voter == self.own and vote.view >= self._first_view and not self._decided_to_cast(state, vote):
            self._halt(f"a vote of ours for view {vote.view} that our journal lacks")
            return
        self._hear(MemberId(vote.voter), View(vote.view))
        evidence = state.tally.add(vote)
        if evidence is not None:
            self._effects.append(PublishEvidence(evidence))

    def _hear(self, member: MemberId, view: View) -> None:
        """A sign of life; of views far ahead it says no more than of the next each may lead."""
        self._absence.heard(member, min(view, View(self.view + len(self.committee.voters))))

    def _on_proposal(self, proposal: Proposal) -> None:
        header = decode_header(proposal.header, self.committee.chain_id)
        digest = proposal.digest
        if digest in self._requested and header.view > self.final_view:
            self._requested.discard(digest)
            self.branches.add(proposal, header)
        if not self._in_window(header.view):
            return
        self._highest_seen = max(self._highest_seen, View(header.view))
        self._hear(MemberId(header.leader), View(header.view))
        state = self._round(View(header.view))
        if state.proposal is None:
            state.proposal = proposal
            self.branches.add(proposal, header)
        elif state.proposal.header != proposal.header and not state.proposal_reported:
            state.proposal_reported = True
            self.branches.add(proposal, header)
            evidence = ProposalEvidence(state.proposal.signed_header, proposal.signed_header)
            self._effects.append(PublishEvidence(evidence))

    def _on_notarization(self, notarization: Notarization) -> None:
        if notarization.view > self.final_view:
            self._adopt_notarization(notarization)
            self._merge(notarization.votes)

    def _adopt_notarization(self, notarization: Notarization) -> None:
        view = View(notarization.view)
        state = self._round(view)
        if state.notarization is None:
            state.notarization = notarization
            self._unsettled.add(view)
            self._last_block_ms = self._now_ms
            self._highest_certified = max(self._highest_certified, view)
            self._highest_notarized = max(self._highest_notarized, view)
        elif state.notarization.block != notarization.block:
            self._halt(f"two ledger blocks are notarized in view {view}: every role has too many traitors")

    def _on_nullification(self, nullification: Nullification) -> None:
        if nullification.view > self.final_view:
            self._adopt_nullification(nullification)
            self._merge(nullification.votes)

    def _adopt_nullification(self, nullification: Nullification) -> None:
        view = View(nullification.view)
        state = self._round(view)
        if state.nullification is None:
            state.nullification = nullification
            self._highest_certified = max(self._highest_certified, view)
            if state.proposal is None:
                self._absence.led_in_vain(self.committee.leader(view).id, view)

    def _merge(self, votes: tuple[Vote, ...]) -> None:
        """Votes inside a certificate count, and are compared, like those that came alone."""
        for vote in votes:
            if self.halted is None:
                self._add_vote(vote)

    def _on_finalization(self, certificate: Certificate) -> None:
        view = View(certificate.view)
        if view == self.final_view and certificate.block != self.branches.finalized_digest:
            self._halt(f"two ledger blocks are finalized in view {view}: every role has too many traitors")
        if view > (self.final_view if self._pending is None else self._pending.view):
            self._pending = certificate
            self._catching_up = False
            self._highest_certified = max(self._highest_certified, view)

    def _answer(self, stalled: Stalled, sender: MemberId) -> None:
        """Send what the asker lacks, at most once in half a timeout."""
        answered_ms = self._answered_ms.get(sender)
        if answered_ms is not None and self._now_ms < answered_ms + self.timing.timeout_ms // 2:
            return
        self._answered_ms[sender] = self._now_ms
        messages: list[ViewCertificate] = []
        newest = self._pending or self._certificate
        if newest is not None and newest.view > stalled.finalized_view:
            messages.append(newest)
        for view in sorted(view for view in self._rounds if view >= stalled.missing_view):
            state = self._rounds[view]
            messages.extend(one for one in (state.notarization, state.nullification) if one is not None)
        self._effects.extend(Send(sender, message) for message in _at_once(messages))

    # Counting

    def _in_window(self, view: int) -> bool:
        return self.final_view < view <= self.view + LOOKAHEAD_VIEWS

    def _round(self, view: View) -> _Round:
        state = self._rounds.get(view)
        if state is None:
            state = self._rounds[view] = _Round(Tally(self.committee))
        return state

    def _decided_to_cast(self, state: _Round, vote: Vote) -> bool:
        match vote.kind:
            case VoteKind.NOTARIZE:
                return state.notarized == vote.block
            case VoteKind.NULLIFY:
                return state.nullified
            case VoteKind.FINALIZE:
                return state.finalized == vote.block

    def _count(self, view: View, kind: VoteKind) -> None:
        """Turn a quorum of votes into a certificate, or ask the host to."""
        state = self._round(view)
        match kind:
            case VoteKind.NOTARIZE:
                if state.notarization is None and (votes := state.tally.quorum(kind)):
                    self._adopt_notarization(Notarization(view=view, block=votes[0].block, votes=votes))
            case VoteKind.NULLIFY:
                if state.nullification is None and (votes := state.tally.quorum(kind)):
                    self._adopt_nullification(Nullification(view=view, votes=votes))
            case VoteKind.FINALIZE:
                pending_view = self.final_view if self._pending is None else self._pending.view
                if not state.combining and view > pending_view and (votes := state.tally.quorum(kind)):
                    state.combining = True
                    self._effects.append(CombineFinalization(view, Digest(votes[0].block), votes))

    # What follows

    def _settle(self, now_ms: int) -> list[Effect]:
        """Do everything the rules allow now."""
        self._now_ms = now_ms
        try:
            if self.halted is None:
                self._decide()
                self._enter()
                self._follow_branches()
                self._consider_proposal()
                self._lead()
                self._watch_time()
        except InvariantBroken as broken:
            self._halt(str(broken))
        effects, self._effects = self._effects, []
        return effects

    def _halt(self, reason: str) -> None:
        self.halted = reason
        self._effects = [effect for effect in self._effects if isinstance(effect, PublishEvidence)]
        self._effects.append(Halt(reason))

    def _vote(self, kind: VoteKind, view: View, block: Digest, proposal: Proposal | None = None) -> None:
        if view < self._first_view:
            return
        state = self._round(view)
        match kind:
            case VoteKind.NOTARIZE:
                state.notarized = block
            case VoteKind.NULLIFY:
                state.nullified = True
            case VoteKind.FINALIZE:
                state.finalized = block
        self._effects.append(CastVote(kind, view, block, proposal))

    def _decide(self) -> None:
        """Finalize the newest certified branch as soon as all of it is here and verified."""
        certificate = self._pending
        if certificate is None:
            return
        block = Digest(certificate.block)
        needed = self.branches.next_needed(block)
        if isinstance(needed, Branch):
            self._verify_certified(needed)
        elif needed is not None:
            if not self._catching_up:
                self._catching_up = True
                self._effects.append(NeedBlocks(Height(self.finalized.height + 1), certificate))
        else:
            headers = self.branches.chain(block)
            state = self._round(View(certificate.view))
            votes = tuple(vote for vote in state.tally.quorum(VoteKind.FINALIZE) if vote.block == block)
            self._effects.append(Finalized(headers, certificate, votes))
            self._set_finalized(headers[-1], certificate)

    def _set_finalized(self, header: Header, certificate: Certificate) -> None:
        view = View(header.view)
        state = self._rounds.get(view)
        if state is not None and state.nullification is not None:
            raise InvariantBroken(f"view {view} is nullified and finalized: every role has too many traitors")
        self.branches.finalize(header)
        self._certificate = certificate
        if self._pending is not None and self._pending.view <= view:
            self._pending = None
        self._catching_up = False
        self._rounds = {other: state for other, state in self._rounds.items() if other > view}
        self._unsettled = {other for other in self._unsettled if other > view}
        self._requested.clear()
        self._highest_certified = max(self._highest_certified, view)
        self._highest_notarized = max(self._highest_notarized, view)
        # Slowly, or a machine that needs longer than the first timeout would waste every other view; not so slowly that
        # one bad leader in three drives it to the cap: 1.5 ** 3 * 0.75 ** 6 < 1.
        self._timeout_ms -= (self._timeout_ms - self.timing.timeout_ms + 3) // 4
        self._last_block_ms = self._now_ms
        self._repeat_at_ms = None

    def _enter(self) -> None:
        """Go to the view after the highest certified one and forward what led there."""
        if self._highest_certified < self.view:
            return
        # However the view ends: one that is notarized after our timer fired is one that we cannot finalize any more.
        waited = self._active_since_ms is not None and self._now_ms >= self._active_since_ms + self._timeout_ms
        if waited and self._expects_block():
            self._timeout_ms = min(self._timeout_ms * 3 // 2, self.timing.max_timeout_ms)
        state = self._rounds.get(self._highest_certified)
        self._entry = self._certificate
        if state is not None and state.notarization is not None:
            self._entry = state.notarization
        elif state is not None and state.nullification is not None:
            self._entry = state.nullification
        elif self._pending is not None:
            self._entry = self._pending
        if self._entry is not None and self._entry.view == self._highest_certified:
            self._effects.append(Broadcast(self._entry))
        self.view = View(self._highest_certified + 1)
        self._entered_ms = self._now_ms
        self._active_since_ms = None
        self._proposal_requested = False
        self._nothing_above = None

    def _follow_branches(self) -> None:
        """Get and verify what is notarized; finalize what is found valid."""
        for view in sorted(self._unsettled):
            state = self._rounds[view]
            if state.notarization is None:
                continue
            block = Digest(state.notarization.block)
            needed = self.branches.next_needed(block)
            if isinstance(needed, Branch):
                self._verify_certified(needed)
            elif needed is None:
                self._unsettled.discard(view)
                if self._may_finalize(state):
                    self._vote(VoteKind.FINALIZE, view, block)
            elif not self._catching_up and needed not in self._requested:
                self._requested.add(needed)
                self._effects.append(FetchBlock(needed, self._holders(view)))

    def _verify_certified(self, block: Branch) -> None:
        if block.status == Status.INVALID:
            raise InvariantBroken(f"ledger block {block.digest.hex()} is certified but invalid")
        self._verify(block)

    def _verify(self, block: Branch) -> None:
        parent = self.branches.header(Digest(block.header.parent))
        if block.status == Status.UNVERIFIED and parent is not None:
            block.status = Status.VERIFYING
            self._effects.append(VerifyBlock(block.proposal, block.header, parent))

    def _holders(self, view: View) -> tuple[MemberId, ...]:
        """Who said that they hold the ledger block of ``view``."""
        notarization = self._round(view).notarization
        if notarization is None:
            return (self.committee.leader(view).id,)
        return tuple(MemberId(vote.voter) for vote in notarization.votes if vote.voter != self.own)

    def _consider_proposal(self) -> None:
        """Notarize the leader's proposal, nullify if it is invalid, or wait for what it rests on."""
        state = self._rounds.get(self.view)
        if state is None or state.proposal is None or not self._may_notarize(state):
            return
        block = self.branches.get(state.proposal.digest)
        if block is None:
            return
        if block.status == Status.INVALID or not self._may_follow(block.header):
            self._nullify(state)
        elif not self._extends_certified(block.header) or self._is_too_far(block.header.height):
            return
        elif block.status == Status.VALID:
            self._vote(VoteKind.NOTARIZE, self.view, block.digest)
        else:
            self._verify(block)

    def _may_follow(self, header: Header) -> bool:
        """False if the parent can never be one: behind or beside the finalized, or at another height."""
        parent = self.branches.header(Digest(header.parent))
        if header.parent_view < self.final_view or (parent is not None and header.height != parent.height + 1):
            return False
        return header.parent_view != self.final_view or header.parent == self.branches.finalized_digest

    def _extends_certified(self, header: Header) -> bool:
        """The parent is final, or notarized and verified, and the gap to it is nullified."""
        if self.branches.header(Digest(header.parent)) is None:
            return False
        if header.parent_view != self.final_view:
            state = self._rounds.get(View(header.parent_view))
            if state is None or state.notarization is None or state.notarization.block != header.parent:
                return False
        return self._gap_nullified(View(header.parent_view), View(header.view))

    def _is_too_far(self, height: int) -> bool:
        return height > self.finalized.height + MAX_UNFINAL_BLOCKS

    def _nullify(self, state: _Round) -> None:
        if self._may_nullify(state):
            self._vote(VoteKind.NULLIFY, self.view, ZERO_DIGEST)

    def _lead(self) -> None:
        if not self._is_to_propose() or self._due_ms() > self._now_ms:
            return
        parent = self._highest_parent()
        if parent is not None and not self._is_too_far(parent.height + 1):
            self._proposal_requested = True
            may_be_empty = self._due_empty_ms() <= self._now_ms
            self._effects.append(RequestProposal(self.view, parent, may_be_empty))

    def _is_to_propose(self) -> bool:
        if self._proposal_requested or self.own is None or self.committee.leader(self.view).id != self.own:
            return False
        if self.view < self._first_view:
            return False
        state = self._rounds.get(self.view)
        return state is None or (state.proposal is None and self._may_notarize(state))

    def _highest_parent(self) -> Header | None:
        """The highest verified notarized ledger block with every view since nullified."""
        for view in range(self.view - 1, self.final_view, -1):
            state = self._rounds.get(View(view))
            if state is None:
                return None
            if state.notarization is not None:
                header = self.branches.header(Digest(state.notarization.block))
                if header is not None:
                    return header
            if state.nullification is None:
                return None
        return self.finalized

    # Time

    def _tip_is_final(self) -> bool:
        return self._highest_notarized <= self.final_view and self._pending is None

    def _due_ms(self) -> int:
        """When the next ledger block is due."""
        if self._has_work and (self._nothing_above is None or self._nothing_above != self._highest_parent()):
            return self._now_ms
        return self._due_empty_ms()

    def _heartbeat_due_ms(self) -> int:
        return self._last_block_ms + self.timing.heartbeat_ms

    def _due_empty_ms(self) -> int:
        """When it is due even with no event."""
        if self._tip_is_final():
            return self._heartbeat_due_ms()
        return min(self._heartbeat_due_ms(), self._entered_ms + self.timing.timeout_ms // 2)

    def _expects_block(self) -> bool:
        """Whether we know ourselves why there should be one: that others vote, of this view or later ones, is none."""
        return self._has_work or not self._tip_is_final() or self._heartbeat_due_ms() <= self._now_ms

    def _watch_time(self) -> None:
        is_active = self._expects_block() or self._highest_seen >= self.view
        deadlines = [self._due_ms()] if self._is_to_propose() else []
        if not is_active:
            self._active_since_ms = self._repeat_at_ms = None
            deadlines.append(self._heartbeat_due_ms())
        else:
            if self._active_since_ms is None:
                self._active_since_ms = self._now_ms
            if self._repeat_at_ms is None:
                self._repeat_at_ms = self._now_ms + 2 * self._timeout_ms
            nullify_ms = self._active_since_ms if self._is_hopeless() else self._active_since_ms + self._timeout_ms
            if nullify_ms <= self._now_ms:
                self._nullify(self._round(self.view))
            deadlines.append(nullify_ms)
            if self._repeat_at_ms <= self._now_ms:
                self._repeat_at_ms = self._now_ms + self._timeout_ms
                self._repeat()
            deadlines.append(self._repeat_at_ms)
        deadline_ms = min(deadline for deadline in deadlines if deadline > self._now_ms)
        if deadline_ms != self._deadline_ms:
            self._deadline_ms = deadline_ms
            self._effects.append(SetTimer(deadline_ms))

    def _is_hopeless(self) -> bool:
        """Whether waiting in this view is in vain: its leader is absent, or too few are left to notarize."""
        state = self._rounds.get(self.view)
        if state is not None and not state.tally.may_notarize():
            return True
        leader = self.committee.leader(self.view).id
        return (state is None or state.proposal is None) and leader != self.own and self._absence.is_absent(leader)

    def _repeat(self) -> None:
        """Standstill: say again what others may have missed, ask for what we may have."""
        if self._entry is not None:
            self._effects.append(Broadcast(self._entry))
        self._repeat_proposal()
        own_votes = [vote for view in sorted(self._rounds) for vote in self._rounds[view].votes]
        start = self._repeat_from if self._repeat_from < len(own_votes) else 0
        self._repeat_from = start + MAX_ANSWER_MESSAGES
        for vote in own_votes[start : self._repeat_from]:
            self._effects.append(Broadcast(vote))
        self._effects.append(
            Broadcast(
                Stalled(
                    version=VERSION,
                    chain_id=self.committee.chain_id,
                    epoch=self.committee.epoch,
                    view=self.view,
                    finalized_view=self.final_view,
                    missing_view=self._missing_view(),
                )
            )
        )
        self._requested.clear()
        self._catching_up = False
        self.branches.retry_missing()
        self._decide()
        self._follow_branches()

    def _repeat_proposal(self) -> None:
        """Our proposal of this view, after the certificates its gap check needs."""
        state = self._rounds.get(self.view)
        if state is None or state.proposal is None or not state.votes or state.notarized != state.proposal.digest:
            return
        header = decode_header(state.proposal.header, self.committee.chain_id)
        if header.leader == self.own:
            self._effects += [Broadcast(one) for one in (*_at_once(self._rests_on(header)), state.proposal)]

    def _rests_on(self, header: Header) -> Iterator[ViewCertificate]:
        """The certificates by which others accept a proposal: of views since its parent, newest first, and of that."""
        for view in range(header.view - 1, header.parent_view, -1):
            before = self._rounds.get(View(view))
            if before is not None and before.nullification is not None:
                yield before.nullification
        parent = self._rounds.get(View(header.parent_view))
        if parent is not None and parent.notarization is not None:
            yield parent.notarization
        elif header.parent_view == self.final_view < header.view - 1 and self._certificate is not None:
            # Not where no view lies between: what led us here has been forwarded.
            yield self._certificate

    def _missing_view(self) -> View:
        view = View(self.final_view + 1)
        while (state := self._rounds.get(view)) is not None and (
            state.notarization is not None or state.nullification is not None
        ):
            view = View(view + 1)
        return view


def _at_once(certificates: Iterable[ViewCertificate]) -> Iterator[ViewCertificate]:
    """The first of them, as many as may be sent in one go."""
    size_bytes = 0
    for number, certificate in enumerate(certificates):
        size_bytes += len(encode(certificate))
        if number and (number == MAX_ANSWER_MESSAGES or size_bytes > MAX_ANSWER_BYTES):
            return
        yield certificate
