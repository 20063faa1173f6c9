"""This member's vote: signed, journalled with fsync, only then sent.

Votes are cast in the order the engine asks for them. All that wait are journalled with one sync. A notarize vote
takes its ledger block along, proposal and events: it asserts that they are durably held, and after a power cut at
every member at once what a quorum finalized must still be there to append. A BLS share
is the slow part of a finalize vote (0.4 ms), so it is computed in a worker thread while the notarize vote of
the same ledger block is on its way to disk; it leaves memory only inside the journalled finalize vote.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from consensus import bls
from consensus.certificate import CertificateScheme, certificate_message
from consensus.codec import decode, encode
from consensus.effect import CastVote
from consensus.identifiers import VOTING_ROLES, Digest, MemberId, View
from consensus.keys import Signer
from consensus.membership import GENESIS_EPOCH, Committee, scheme_needs
from consensus.portions import Wire
from consensus.rejection import ConfigError, Rejected
from consensus.vote import Proposal, Vote, VoteKind, sign_vote
from node.identity import Identity, epoch_keystore, later_keystores, left_epochs
from node.journal import ROTATE, Journal, JournalLost, VoteMark, VoteRecord, check_not_lost, journal_file
from node.ledger import Ledger
from node.store import Store

log = logging.getLogger("countersign.voter")

MAX_JOURNALLED_BYTES = 8 << 20
COMPACT_AT_BYTES = 4 << 20
MAX_SHARES_AHEAD = 64


@dataclass(frozen=True, slots=True)
class VotingKeys:
    """What a voter signs with: its identity, and what its certificate shares are made with."""

    member: MemberId
    identity: Signer
    share_secret: bls.Secret | Signer


class HeldBlock(Wire, frozen=True, tag="held-block"):
    """A ledger block this member votes to notarize: the leader's proposal and its signed events, in order."""

    proposal: Proposal
    events: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """What the journal holds: votes in the order they were cast, proposals, the events of proposed blocks."""

    votes: tuple[Vote, ...]
    proposals: tuple[Proposal, ...]
    events: tuple[bytes, ...]
    first_view: View
    """What was voted in earlier views, it does not say any more."""


class Voter:
    """Casts this member's votes."""

    def __init__(
        self, keys: VotingKeys, committee: Committee, scheme: CertificateScheme, journal: Journal, store: Store
    ) -> None:
        self.keys = keys
        self._committee = committee
        self._scheme = scheme
        self._journal = journal
        self._store = store
        self._waiting: list[CastVote] = []
        self._wake = trio.Event()
        self._shares: dict[tuple[View, Digest], bytes] = {}
        self._compacted_view = 0
        self._compact_at_bytes = COMPACT_AT_BYTES
        self.votes_cast = 0

    def restored(self) -> Restored:
        """What the journal holds.

        Raises:
            JournalLost, Rejected: the journal is damaged.
        """
        votes: list[Vote] = []
        proposals: list[Proposal] = []
        events: list[bytes] = []
        for record in self._journal.records():
            held: Vote | HeldBlock = decode(record.vote, Vote | HeldBlock, MAX_JOURNALLED_BYTES)  # type: ignore[arg-type]
            if isinstance(held, Vote):
                if held.epoch != self._committee.epoch:
                    raise JournalLost(
                        f"vote journal of epoch {self._committee.epoch}: expected votes of it, found one of epoch "
                        f"{held.epoch}; {ROTATE}"
                    )
                votes.append(held)
            else:
                proposals.append(held.proposal)
                events.extend(held.events)
        return Restored(tuple(votes), tuple(proposals), tuple(events), View(self._journal.first_view))

    @property
    def highest_view(self) -> int:
        """The highest view this journal has ever held a vote of; 0 for none."""
        return self._journal.mark.view

    def close(self) -> None:
        """The epoch has ended: the journal is written no more."""
        self._journal.close()

    def cast(self, effect: CastVote) -> None:
        """Queue a vote the engine decided on."""
        self._waiting.append(effect)
        self._wake.set()

    async def run(
        self,
        held: Callable[[Digest], HeldBlock | None],
        send: Callable[[list[Proposal | Vote]], None],
        counted: Callable[[Vote], None],
        durable_view: Callable[[], int],
    ) -> None:
        """Cast votes until cancelled: ``send`` gets what is journalled, then ``counted`` each vote.

        ``durable_view`` is the view of a ledger block that is final and on disk: earlier votes may be forgotten.

        ``held`` gives the ledger block of a notarize vote. Votes wait their turn, and others may finalize a later
        ledger block meanwhile: a notarize vote whose ledger block is not held any more is not cast.

        Raises:
            InvariantBroken: the journal did not take a vote; a voter that cannot journal stops.
        """
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._waiting:
                casting, self._waiting = self._waiting, []
                await self._cast_all(casting, held, send, counted)
            if self._journal.size_bytes > self._compact_at_bytes and durable_view() > self._compacted_view:
                self._compacted_view = durable_view()
                await trio.to_thread.run_sync(self._journal.compact, self._compacted_view + 1)
                self._compact_at_bytes = max(COMPACT_AT_BYTES, 2 * self._journal.size_bytes)

    async def _cast_all(
        self,
        casting: list[CastVote],
        held: Callable[[Digest], HeldBlock | None],
        send: Callable[[list[Proposal | Vote]], None],
        counted: Callable[[Vote], None],
    ) -> None:
        messages: list[Proposal | Vote] = []
        records: list[VoteRecord] = []
        for effect in casting:
            block = None
            if effect.kind == VoteKind.NOTARIZE:
                block = held(effect.block)
                if block is None:
                    log.info("view %d is over: no notarize vote", effect.view)
                    continue
            share = await self._share(effect.view, effect.block) if effect.kind == VoteKind.FINALIZE else b""
            vote = sign_vote(
                self._committee,
                self.keys.member,
                effect.kind,
                effect.view,
                effect.block,
                share=share,
                sign=self.keys.identity.sign,
            )
            if effect.proposal is not None:
                messages.append(effect.proposal)
            messages.append(vote)
            if block is not None:
                records.append(VoteRecord(effect.view, encode(block)))
            records.append(VoteRecord(effect.view, encode(vote)))
        if not records:
            return
        async with trio.open_nursery() as nursery:
            for effect in casting:
                if effect.kind == VoteKind.NOTARIZE:
                    nursery.start_soon(self._prepare_share, effect.view, effect.block)
            mark = await trio.to_thread.run_sync(self._journal.append, records)
            self._store.write_vote_mark(mark.encode(), self._committee.epoch)
            send(messages)
            for message in messages:
                if isinstance(message, Vote):
                    self.votes_cast += 1
                    counted(message)

    async def _prepare_share(self, view: View, block: Digest) -> None:
        if len(self._shares) >= MAX_SHARES_AHEAD:
            self._shares.clear()
        self._shares[view, block] = await trio.to_thread.run_sync(self._make_share, view, block)

    async def _share(self, view: View, block: Digest) -> bytes:
        prepared = self._shares.pop((view, block), None)
        if prepared is not None:
            return prepared
        return await trio.to_thread.run_sync(self._make_share, view, block)

    def _make_share(self, view: View, block: Digest) -> bytes:
        message = certificate_message(self._committee.chain_id, self._committee.epoch, view, block)
        return self._scheme.share(self.keys.share_secret, message)


def voting_keys(identity: Identity, scheme: CertificateScheme) -> VotingKeys | str:
    """What a voting member of the scheme's epoch signs with; or why it has none."""
    share: bls.Secret | Signer = identity.signer
    if scheme_needs(scheme.committee.certificate_scheme).member_keys:
        if identity.secrets.bls_share is None:
            return "expected a BLS key share, found none"
        share = bls.Secret.from_bytes(identity.secrets.bls_share)
    try:
        scheme.check_secret(identity.member.id, share)
    except Rejected as error:
        return f"expected this member's BLS secret: {error}"
    return VotingKeys(identity.member.id, identity.signer, share)


def open_voter(identity: Identity, ledger: Ledger, keystore: Path, data_directory: Path) -> Voter | str:
    """A member's voter in the newest epoch, with the vote journal of that epoch; or why it has none.

    Raises:
        ConfigError: in epoch 0, ``keystore`` has no BLS secret, or another's, and none was erased when that epoch
            ended. In a later one it may come yet.
    """
    member, committee = identity.member, ledger.committee
    if member.role not in VOTING_ROLES:
        return "a verifier never votes"
    keys = voting_keys(identity, ledger.scheme)
    if isinstance(keys, str):
        return _without_share(keystore, data_directory, committee.epoch, keys)
    path = data_directory / journal_file(committee.epoch)
    remembered, head = ledger.store.vote_mark(committee.epoch), ledger.store.head()
    # In a later epoch a data directory may well be newer than this voter's first vote; peers are asked either way.
    may_be_new = head is None or head.height == 0 or committee.epoch != GENESIS_EPOCH
    journal: Journal | None = None
    try:
        if not path.exists() and remembered is None and may_be_new:
            journal = Journal.create(path, ledger.genesis.chain_id, member.id)
        else:
            journal = Journal.open(path, ledger.genesis.chain_id, member.id)
        check_not_lost(journal.mark, VoteMark.decode(remembered) if remembered else None)
        voter = Voter(keys, committee, ledger.scheme, journal, ledger.store)
        voter.restored()
    except JournalLost as error:
        if journal is not None:
            journal.close()
        log.critical("this node does not vote: %s", error)
        return str(error)
    return voter


def _without_share(keystore: Path, data_directory: Path, epoch: int, found: str) -> str:
    # The mark stays when a database is lost or repaired: the log is back in an epoch that its member has left.
    left = left_epochs(data_directory)
    if left > epoch:
        return f"{keystore}: shares of epochs before {left} are erased; the log is fetched again up to there"
    if epoch == GENESIS_EPOCH and not later_keystores(keystore):
        raise ConfigError(f"{keystore}: {found}")
    expected = epoch_keystore(keystore, epoch)
    if epoch != GENESIS_EPOCH and not expected.exists():
        # What was found wrong is in an older keystore, which need not have it.
        found = f"missing; with the secrets in it this member votes in epoch {epoch}"
    return f"{expected}: {found}; put it there and start the node again"
