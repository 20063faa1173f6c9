"""Beacons of audits: this member's shares of them, and beacons made of the shares of all (``consensus/beacon.py``).

- **No share before finality** ◆: one is made only for a challenge that the finalized state has. Earlier, whoever gets
  it could know which steps will be picked while they can still be chosen.
- **A share outlives its epoch.** The group key changes with the epoch, and the secret is erased; so before that
  (``ended_epochs``) the shares of all unanswered challenges are put on disk, under the id that this member then had.
- Shares are public once the challenge is final: any member, and whoever may use the HTTP interface, may have them.
- Members learn of finality one after another, so whoever had no share to give yet is asked again for a while.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from consensus.beacon import beacon_message, make_beacon
from consensus.certificate import CertificateScheme
from consensus.codec import decode, encode
from consensus.identifiers import MemberId
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable
from consensus.state import CHALLENGE_TABLE, ChallengeRecord, read_record, review_key
from node.files import make_durable_directory, read_private, replace_private
from node.ledger import Ledger
from node.messages import BeaconShare, GetBeaconShare
from node.voter import VotingKeys

log = logging.getLogger("countersign.beacons")

ASK_SECONDS = 10.0
PATIENCE_SECONDS = 5.0
ASK_AGAIN_SECONDS = 0.1
MAX_SHARE_BYTES = 1_024


class SharePeers(Protocol):
    """The other members, as far as they are asked for shares."""

    @property
    def connected(self) -> frozenset[MemberId]:
        """Who can be asked now."""

    async def request(self, member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
        """A member's answer; raises ``Unavailable`` where none comes."""


@dataclass
class Gathering:
    """The shares of one beacon as they come in."""

    scheme: CertificateScheme
    message: bytes
    shares: dict[MemberId, bytes] = field(default_factory=dict)
    answered: set[MemberId] = field(default_factory=set)
    """Members that gave a true share: they are not asked again."""
    refusals: dict[MemberId, str] = field(default_factory=dict)
    """Why a member gave none, as last logged."""

    @property
    def complete(self) -> bool:
        """Whether there is a quorum of every role."""
        return self.scheme.committee.has_quorum(self.shares)


class BeaconDesk:
    """Gives this member's shares and gathers the others'."""

    def __init__(
        self, ledger: Ledger, directory: Path, peers: SharePeers, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """``directory`` keeps shares of epochs that ended; ``patience_seconds``: how long members are asked again."""
        self._ledger = ledger
        self._directory = directory
        self._peers = peers
        self._patience_seconds = patience_seconds
        self._keys: VotingKeys | None = None
        self._scheme: CertificateScheme | None = None
        self._why_none = "this node has not begun to vote"

    def begin_epoch(self, keys: VotingKeys | None, why_none: str) -> None:
        """Give shares of the ledger's newest epoch with these keys; ``why_none`` where there are none."""
        self._keys, self._scheme, self._why_none = keys, self._ledger.scheme, why_none

    def owed(self) -> dict[int, list[ChallengeRecord]]:
        """Unanswered challenges of epochs that have ended for which no share is on disk, by epoch."""
        found: dict[int, list[ChallengeRecord]] = {}
        for _, value in self._ledger.final.state.items_with_prefix(CHALLENGE_TABLE):
            record = read_record(value, ChallengeRecord)
            if record.epoch < self._ledger.committee.epoch and not record.answer and not self._kept(record).exists():
                found.setdefault(record.epoch, []).append(record)
        return found

    def keep(self, record: ChallengeRecord, keys: VotingKeys, scheme: CertificateScheme) -> None:
        """Put this member's share of a challenge of that scheme's epoch on disk.

        Raises:
            OSError: it is not there.
        """
        make_durable_directory(self._directory)
        replace_private(self._kept(record), encode(self._made(record, keys, scheme)))

    def record(self, campaign: bytes, challenge: bytes) -> ChallengeRecord:
        """The final challenge of that id.

        Raises:
            Rejected: ``NOT_FOUND``: there is none in the finalized state.
        """
        value = self._ledger.final.state.get(review_key(CHALLENGE_TABLE, campaign, challenge))
        record = None if value is None else read_record(value, ChallengeRecord)
        if record is None or (record.campaign, record.event) != (campaign, challenge):
            raise Rejected(
                Reason.NOT_FOUND, f"audit challenge {challenge.hex()} is not final; no share is given before it is"
            )
        return record

    def share(self, record: ChallengeRecord) -> BeaconShare:
        """This member's share of the beacon of a final challenge.

        Raises:
            Unavailable: this node has none to give, and why.
        """
        if self._scheme is not None and self._scheme.committee.epoch == record.epoch:
            if self._keys is None:
                raise Unavailable(f"no share of audit {record.number}: {self._why_none}")
            return self._made(record, self._keys, self._scheme)
        try:
            return decode(read_private(self._kept(record), "beacon share"), BeaconShare, MAX_SHARE_BYTES)
        except (ConfigError, Rejected) as error:
            raise Unavailable(f"no share of audit {record.number} of epoch {record.epoch}: {error}") from error

    async def beacon(self, record: ChallengeRecord) -> bytes:
        """The beacon of a final challenge, from this member's share and those of the members connected.

        Raises:
            Unavailable: too few shares of some role could be had.
        """
        scheme = self._ledger.epochs.of(record.epoch).scheme
        message = beacon_message(scheme.committee.chain_id, record.epoch, record.campaign, record.number)
        gathering = Gathering(scheme, message)
        try:
            own = self.share(record)
            gathering.shares[MemberId(own.voter)] = own.share
        except Unavailable as error:
            log.info("%s", error)
        deadline = trio.current_time() + self._patience_seconds
        await self._ask_all(record, gathering)
        while not gathering.complete and trio.current_time() < deadline:
            await trio.sleep(ASK_AGAIN_SECONDS)
            await self._ask_all(record, gathering)
        if not gathering.complete:
            missing = [voter.name for voter in scheme.committee.voters if voter.id not in gathering.shares]
            raise Unavailable(f"too few shares of audit {record.number}'s beacon; none of {', '.join(missing)}")
        return make_beacon(scheme, message, gathering.shares)

    async def answer(self, request: GetBeaconShare) -> bytes:
        """The answer to another member's request.

        Raises:
            Rejected: ``NOT_FOUND``. Unavailable: as ``share``.
        """
        return encode(self.share(self.record(request.campaign, request.challenge)))

    async def _ask_all(self, record: ChallengeRecord, gathering: Gathering) -> None:
        """Ask whoever is connected and has not answered; as soon as there is a quorum, nobody else is waited for."""
        async with trio.open_nursery() as nursery:
            for member in sorted(self._peers.connected - gathering.answered):
                nursery.start_soon(self._ask, member, record, gathering, nursery.cancel_scope)
            if gathering.complete:
                nursery.cancel_scope.cancel()

    async def _ask(
        self, member: MemberId, record: ChallengeRecord, gathering: Gathering, round_scope: trio.CancelScope
    ) -> None:
        try:
            request = encode(GetBeaconShare(record.campaign, record.event))
            found = decode(await self._peers.request(member, request, ASK_SECONDS), BeaconShare, MAX_SHARE_BYTES)
            gathering.scheme.verify_share(MemberId(found.voter), gathering.message, found.share)
        except (Unavailable, Rejected) as error:
            if gathering.refusals.get(member) != str(error):
                gathering.refusals[member] = str(error)
                log.info("share of audit %d from %s: %s", record.number, member.hex(), error)
            return
        gathering.shares[MemberId(found.voter)] = found.share
        gathering.answered.add(member)
        if gathering.complete:
            round_scope.cancel()

    def _made(self, record: ChallengeRecord, keys: VotingKeys, scheme: CertificateScheme) -> BeaconShare:
        message = beacon_message(scheme.committee.chain_id, record.epoch, record.campaign, record.number)
        return BeaconShare(keys.member, scheme.share(keys.share_secret, message))

    def _kept(self, record: ChallengeRecord) -> Path:
        return self._directory / f"{record.event.hex()}.share"
