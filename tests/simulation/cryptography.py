"""How simulated hosts sign, check and combine: with names that nobody checks, or with real keys."""

import hashlib
from collections.abc import Mapping
from typing import Protocol

from msgspec.structs import replace

from consensus.block import Body, Header
from consensus.certificate import (
    BadCertificateShares,
    Certificate,
    certificate_message,
    verify_certificate,
)
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.effect import Message
from consensus.identifiers import Digest, MemberId, View
from consensus.membership import Committee, Genesis, Membership
from consensus.participant import MemberSecrets
from consensus.rejection import Reason, Rejected
from consensus.vote import (
    Notarization,
    Nullification,
    Proposal,
    Stalled,
    Vote,
    VoteKind,
    check_notarization,
    check_nullification,
    check_proposal,
    check_stalled,
    check_vote,
    sign_proposal,
    sign_vote,
)


class Cryptography(Protocol):
    """How a simulated host signs, checks and combines."""

    def vote(self, voter: MemberId, kind: VoteKind, view: View, block: Digest) -> Vote: ...

    def forged_vote(self, voter: MemberId, view: View, block: Digest) -> Vote: ...

    def proposal(self, header: Header, body: Body) -> Proposal: ...

    def check(self, message: Message) -> None: ...

    def combine(self, view: View, block: Digest, votes: tuple[Vote, ...]) -> Certificate: ...


class Names:
    """Signatures that anyone can write and nobody checks: the simulator does not forge."""

    def __init__(self, voters: Committee) -> None:
        self._committee = voters

    def vote(self, voter: MemberId, kind: VoteKind, view: View, block: Digest) -> Vote:
        return Vote(
            version=1,
            chain_id=self._committee.chain_id,
            epoch=0,
            kind=kind,
            view=view,
            block=block,
            voter=voter,
            share=b"share" if kind == VoteKind.FINALIZE else b"",
            signature=b"name",
        )

    def forged_vote(self, voter: MemberId, view: View, block: Digest) -> Vote:
        return replace(self.vote(voter, VoteKind.FINALIZE, view, block), share=b"forged")

    def proposal(self, header: Header, body: Body) -> Proposal:
        return Proposal(version=1, header=encode(header), body=body, signature=b"name")

    def check(self, message: Message) -> None:
        """Chain, epoch, names in place of signatures, and quorums."""
        match message:
            case Notarization() | Nullification():
                if not self._committee.has_quorum(MemberId(vote.voter) for vote in message.votes):
                    raise Rejected(Reason.QUORUM_NOT_REACHED, "too few votes")
                for vote in message.votes:
                    self.check(vote)
            case Vote() | Stalled() if message.chain_id != self._committee.chain_id:
                raise Rejected(Reason.WRONG_CHAIN, "another chain's")
            case Vote() | Stalled() if message.epoch != 0:
                raise Rejected(Reason.WRONG_EPOCH, "another epoch's")
            case Vote() | Proposal() if message.signature != b"name":
                raise Rejected(Reason.BAD_SIGNATURE, "not by that name")
            case Certificate() if message.signature != b"sum":
                raise Rejected(Reason.BAD_CERTIFICATE, "not the sum")

    def combine(self, view: View, block: Digest, votes: tuple[Vote, ...]) -> Certificate:
        culprits = tuple(MemberId(vote.voter) for vote in votes if vote.share != b"share")
        if culprits:
            raise BadCertificateShares(culprits, ["traitor"])
        return Certificate(scheme="names", view=view, block=block, epoch=0, signature=b"sum")


class Keys:
    """The real thing: identity signatures, shares, certificates of one epoch; every message is checked, each once."""

    def __init__(
        self,
        genesis: Genesis,
        secrets: Mapping[str, MemberSecrets],
        membership: Membership | None = None,
        before: Committee | None = None,
    ) -> None:
        self._scheme = scheme_for(genesis, membership, before)
        self.committee = self._scheme.committee
        self._secrets = {member.id: secrets[member.name] for member in self.committee.voters}
        self._checked: dict[Message, Rejected | None] = {}

    def secrets(self, voter: MemberId) -> MemberSecrets:
        """What a voter holds."""
        return self._secrets[voter]

    def vote(self, voter: MemberId, kind: VoteKind, view: View, block: Digest) -> Vote:
        secrets, share = self._secrets[voter], b""
        if kind == VoteKind.FINALIZE:
            message = self._certificate_message(view, block)
            share = self._scheme.share(secrets.key_share or secrets.identity, message)
        return sign_vote(self.committee, voter, kind, view, block, share=share, sign=secrets.identity.sign)

    def forged_vote(self, voter: MemberId, view: View, block: Digest) -> Vote:
        """A valid identity signature over a share of another ledger block."""
        secrets = self._secrets[voter]
        message = self._certificate_message(view, Digest(hashlib.sha256(block).digest()))
        share = self._scheme.share(secrets.key_share or secrets.identity, message)
        sign = secrets.identity.sign
        return sign_vote(self.committee, voter, VoteKind.FINALIZE, view, block, share=share, sign=sign)

    def proposal(self, header: Header, body: Body) -> Proposal:
        return sign_proposal(header, body, self._secrets[MemberId(header.leader)].identity.sign)

    def _certificate_message(self, view: View, block: Digest) -> bytes:
        return certificate_message(self.committee.chain_id, self.committee.epoch, view, block)

    def check(self, message: Message) -> None:
        """What a message is worth does not depend on who asks: whoever is second is told what the first found."""
        if message not in self._checked:
            self._checked[message] = None
            try:
                self._check(message)
            except Rejected as refusal:
                self._checked[message] = refusal
        refusal = self._checked[message]
        if refusal is not None:
            raise Rejected(refusal.reason, refusal.detail)

    def _check(self, message: Message) -> None:
        match message:
            case Vote():
                check_vote(message, self.committee)
            case Proposal():
                check_proposal(message, self.committee)
            case Notarization():
                check_notarization(message, self.committee)
            case Nullification():
                check_nullification(message, self.committee)
            case Certificate():
                verify_certificate(self._scheme, self.committee.chain_id, message)
            case Stalled():
                check_stalled(message, self.committee)

    def combine(self, view: View, block: Digest, votes: tuple[Vote, ...]) -> Certificate:
        message = self._certificate_message(view, block)
        payload = self._scheme.combine(message, {MemberId(vote.voter): vote.share for vote in votes})
        return Certificate(
            scheme=self._scheme.name, view=view, block=block, epoch=self.committee.epoch, signature=payload
        )
