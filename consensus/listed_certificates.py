"""Certificates that list members' identity signatures: ``ed25519`` and ``ml-dsa-65``.

The longest ones, and the ones whose every signature a verifier can check with nothing but RFC 8032 or FIPS 204; under
``ml-dsa-65`` a finalized history outlives the breaking of elliptic curves. Every voter's identity key is of the
certificates' scheme (``membership.check_genesis``).

Rules: voters are listed once, in order, by their position from 0; a quorum of every role is among them; every
signature listed is good.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct

from consensus import bls, keys
from consensus.certificate import MAX_SIGNATURE_BYTES, SigningSecret, chosen_signers, culprits_among
from consensus.codec import decode, encode
from consensus.identifiers import MemberId
from consensus.membership import MAX_MEMBERS, Committee, Member
from consensus.rejection import InvariantBroken, Reason, Rejected


class ListedSignature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One signature of a listed certificate; ``voter`` counts from 0 in the order of the voters."""

    voter: Annotated[int, Meta(ge=0, le=MAX_MEMBERS - 1)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=3_309)]


class SignatureList(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="signature-list"):
    """Payload of a listed certificate, in strictly rising order of voters."""

    signatures: Annotated[tuple[ListedSignature, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


@dataclass(frozen=True, slots=True)
class SignatureLists:
    """Identity signatures of ``t_r`` members of every role, all by one signature scheme."""

    name: str
    """``ed25519`` or ``ml-dsa-65``."""
    committee: Committee

    def check_secret(self, member: MemberId, secret: SigningSecret) -> None:
        """The secret is the member's identity key.

        Raises:
            Rejected: ``BAD_KEY``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        if _identity(secret).public_key != self.committee.voter(member).identity_key:
            raise Rejected(Reason.BAD_KEY, "the signing key is not this member's identity key")

    def share(self, secret: SigningSecret, message: bytes) -> bytes:
        """An identity signature."""
        return _identity(secret).sign(message)

    def verify_share(self, member: MemberId, message: bytes, share: bytes) -> None:
        """The share is the member's own.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``, ``WRONG_ROLE``, ``BAD_SIGNATURE``.
        """
        _verify_identity(self.committee.voter(member), message, share)

    def combine(self, message: bytes, shares: Mapping[MemberId, bytes]) -> bytes:
        """The first ``t_r`` signatures of every role, each checked.

        Raises:
            BadCertificateShares: naming the culprits.
            Rejected: ``QUORUM_NOT_REACHED``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        chosen = chosen_signers(self.committee, shares)
        try:
            for member, share in chosen.items():
                self.verify_share(member, message, share)
        except Rejected as error:
            raise culprits_among(self, message, shares) from error
        return encode(
            SignatureList(
                signatures=tuple(
                    ListedSignature(voter=index, signature=chosen[voter.id])
                    for index, voter in enumerate(self.committee.voters)
                    if voter.id in chosen
                )
            )
        )

    def verify(self, message: bytes, payload: bytes) -> None:
        """Every listed signature is good, and ``t_r`` members of every role are listed.

        Raises:
            Rejected: ``BAD_CERTIFICATE``, ``QUORUM_NOT_REACHED``, or as ``codec.decode``.
        """
        listed = decode(payload, SignatureList, MAX_SIGNATURE_BYTES).signatures
        positions = [entry.voter for entry in listed]
        if positions != sorted(set(positions)) or positions[-1] >= len(self.committee.voters):
            raise Rejected(Reason.BAD_CERTIFICATE, "voters must be listed once each, in order")
        voters = [self.committee.voters[position] for position in positions]
        if not self.committee.has_quorum(voter.id for voter in voters):
            raise Rejected(Reason.QUORUM_NOT_REACHED, "the listed voters are no quorum of every role")
        try:
            for voter, entry in zip(voters, listed, strict=True):
                _verify_identity(voter, message, entry.signature)
        except Rejected as error:
            raise Rejected(Reason.BAD_CERTIFICATE, error.detail) from error


def _identity(secret: SigningSecret) -> keys.Signer:
    if isinstance(secret, bls.Secret):
        raise InvariantBroken("listed signatures are made with the identity key")
    return secret


def _verify_identity(member: Member, message: bytes, signature: bytes) -> None:
    keys.verify(member.scheme, member.identity_key, message, signature)
