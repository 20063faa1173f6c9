"""Finalization certificates: short proof that every voting role agreed to one ledger block.

A certificate vouches for (chain, epoch, view, ledger block digest). ``CertificateScheme`` hides how:

- ``bls-threshold``: the *sum* of three role signatures over one message, 96 bytes, one pairing check
  against the sum of the three role keys. Safe because every role key has proved possession, bound to
  nonce, epoch and role (``membership.check_genesis``).
- ``ed25519``: the list of identity signatures of ``t_r`` members of every role.

Rules:

- ``combine`` needs ``t_r`` shares of *every* voting role. It combines optimistically and checks once; when
  that fails it checks share by share and names the culprits, so that the caller can retry without them.
- The sum still verifies when two role signatures are altered in cancelling ways: it proves all roles
  together and none of them alone. ``role_signature`` gives a role's own signature, checked.
- A certificate is not unique (other signers, another scheme) and so never enters a digest.

Votes, and when a share may leave the process, are left to ``vote`` and ``engine``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from consensus import bls, keys
from consensus.codec import decode, encode
from consensus.identifiers import VOTING_ROLES, ChainId, Digest, MemberId, Role, Tag, View, tagged_message
from consensus.membership import (
    BLS_THRESHOLD,
    ED25519_LIST,
    MAX_MEMBERS,
    Committee,
    Genesis,
    Member,
    committee,
)
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.threshold import GroupKeys, combination_weights, combine_shares, signing_indices

MAX_SIGNATURE_BYTES = 32_768
MAX_CERTIFICATE_BYTES = MAX_SIGNATURE_BYTES + 256

SigningSecret = bls.Secret | keys.Signer
"""What a member makes its shares with: its key share, or its identity key under ``ed25519``."""


class Certificate(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certificate"):
    """Proof that ``block`` is final in ``view``. ``signature`` is as ``scheme`` defines it."""

    scheme: Annotated[str, Meta(min_length=1, max_length=32)]
    view: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    block: Annotated[bytes, Meta(min_length=32, max_length=32)]
    epoch: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    signature: Annotated[bytes, Meta(min_length=1, max_length=MAX_SIGNATURE_BYTES)]


class ListedSignature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One signature of an ``ed25519`` certificate; ``voter`` counts from 0 in the order of the voters."""

    voter: Annotated[int, Meta(ge=0, le=MAX_MEMBERS - 1)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class SignatureList(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="signature-list"):
    """Payload of an ``ed25519`` certificate, in strictly rising order of voters."""

    signatures: Annotated[tuple[ListedSignature, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


class BadCertificateShares(Rejected):
    """Shares that are not their members' own; ``culprits`` can be left out and ``combine`` tried again."""

    def __init__(self, culprits: tuple[MemberId, ...], names: list[str]) -> None:
        super().__init__(Reason.BAD_SHARE, f"bad certificate shares of {', '.join(names)}")
        self.culprits = culprits


class CertificateScheme(Protocol):
    """How shares of members become a certificate. One instance per epoch."""

    @property
    def name(self) -> str:
        """As in ``Genesis.certificate_scheme``."""

    @property
    def committee(self) -> Committee:
        """The voters."""

    def share(self, secret: SigningSecret, message: bytes) -> bytes:
        """A member's share over ``message``."""

    def verify_share(self, member: MemberId, message: bytes, share: bytes) -> None:
        """Raises ``Rejected`` unless ``share`` is the member's own over ``message``."""

    def combine(self, message: bytes, shares: Mapping[MemberId, bytes]) -> bytes:
        """The checked payload of a certificate.

        Raises:
            BadCertificateShares: naming the culprits.
            Rejected: ``QUORUM_NOT_REACHED``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """

    def verify(self, message: bytes, payload: bytes) -> None:
        """Raises ``Rejected`` unless ``payload`` proves that every role agreed to ``message``."""


@dataclass(frozen=True, slots=True)
class BlsThreshold:
    """The sum of three role signatures: 96 bytes, one pairing check."""

    committee: Committee
    groups: dict[Role, GroupKeys]
    certificate_key: bytes
    """The sum of the three role keys."""

    @property
    def name(self) -> str:
        """``bls-threshold``."""
        return BLS_THRESHOLD

    def share(self, secret: SigningSecret, message: bytes) -> bytes:
        """A BLS signature by the member's key share: 96 bytes."""
        if not isinstance(secret, bls.Secret):
            raise InvariantBroken("bls-threshold shares are signed with a BLS secret")
        return bls.sign(secret, message)

    def verify_share(self, member: MemberId, message: bytes, share: bytes) -> None:
        """The share is the member's own.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``, ``WRONG_ROLE``, ``BAD_SIGNATURE``.
        """
        index = self.committee.share_index(member)
        bls.verify(self.groups[self.committee.voter(member).role].share_keys[index - 1], message, share)

    def combine(self, message: bytes, shares: Mapping[MemberId, bytes]) -> bytes:
        """The sum of the role signatures that ``t_r`` shares of every role make; checked as one.

        Raises:
            BadCertificateShares: naming the culprits.
            Rejected: ``QUORUM_NOT_REACHED``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        by_role = self._by_role(shares)
        weights = {}
        for role in VOTING_ROLES:
            group = self.groups[role]
            indices = _signers(role, group, by_role[role])
            weights[role] = combination_weights(group.threshold, len(group.share_keys), indices)
        denominator = lcm(*(found.denominator for found in weights.values()))
        terms = [
            (numerator * (denominator // weights[role].denominator), by_role[role][index])
            for role in VOTING_ROLES
            for index, numerator in weights[role].numerators.items()
        ]
        try:
            payload = bls.weighted_signature_sum(terms, denominator)
            bls.verify(self.certificate_key, message, payload)
        except Rejected as error:
            raise _culprits(self, message, shares) from error
        return payload

    def role_signature(self, role: Role, message: bytes, shares: Mapping[MemberId, bytes]) -> bytes:
        """One role's own signature, checked against its own key.

        Raises:
            BadCertificateShares: naming the culprits.
            Rejected: ``QUORUM_NOT_REACHED``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        group = self.groups[role]
        own = self._by_role(shares)[role]
        _signers(role, group, own)
        try:
            signature = combine_shares(group.threshold, len(group.share_keys), own)
            bls.verify(group.group_key, message, signature)
        except Rejected as error:
            members = self.committee.role_members(role)
            raise _culprits(self, message, {members[i - 1].id: own[i] for i in own}) from error
        return signature

    def verify(self, message: bytes, payload: bytes) -> None:
        """One pairing check against the sum of the role keys.

        Raises:
            Rejected: ``BAD_CERTIFICATE``.
        """
        try:
            bls.verify(self.certificate_key, message, payload)
        except Rejected as error:
            raise Rejected(Reason.BAD_CERTIFICATE, error.detail) from error

    def _by_role(self, shares: Mapping[MemberId, bytes]) -> dict[Role, dict[int, bytes]]:
        by_role: dict[Role, dict[int, bytes]] = {role: {} for role in VOTING_ROLES}
        for member, share in shares.items():
            by_role[self.committee.voter(member).role][self.committee.share_index(member)] = share
        return by_role


@dataclass(frozen=True, slots=True)
class Ed25519List:
    """Identity signatures of ``t_r`` members of every role."""

    committee: Committee

    @property
    def name(self) -> str:
        """``ed25519``."""
        return ED25519_LIST

    def share(self, secret: SigningSecret, message: bytes) -> bytes:
        """An identity signature: 64 bytes."""
        if isinstance(secret, bls.Secret):
            raise InvariantBroken("ed25519 shares are signed with the identity key")
        return secret.sign(message)

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
        for member in shares:
            self.committee.voter(member)
        chosen: dict[MemberId, bytes] = {}
        for role in VOTING_ROLES:
            present = [member.id for member in self.committee.role_members(role) if member.id in shares]
            needed = self.committee.threshold(role)
            if len(present) < needed:
                raise _quorum_not_reached(role, len(present), needed)
            chosen.update((member, shares[member]) for member in present[:needed])
        try:
            for member, share in chosen.items():
                self.verify_share(member, message, share)
        except Rejected as error:
            raise _culprits(self, message, shares) from error
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


def scheme_for(genesis: Genesis) -> BlsThreshold | Ed25519List:
    """The certificate scheme of a genesis that ``membership.check_genesis`` has accepted.

    Raises:
        Rejected: ``BAD_MEMBERSHIP`` for a scheme this version does not know.
    """
    if genesis.certificate_scheme == BLS_THRESHOLD:
        return BlsThreshold(
            committee=committee(genesis),
            groups={
                group.role: GroupKeys(group.threshold, group.group_key, group.share_keys) for group in genesis.groups
            },
            certificate_key=bls.aggregate_public_keys([group.group_key for group in genesis.groups]),
        )
    if genesis.certificate_scheme == ED25519_LIST:
        return Ed25519List(committee=committee(genesis))
    raise Rejected(Reason.BAD_MEMBERSHIP, f"certificate scheme {genesis.certificate_scheme!a} is not implemented")


def certificate_message(chain_id: ChainId, epoch: int, view: View, block: Digest) -> bytes:
    """What finalization shares sign."""
    return tagged_message(Tag.CERTIFICATE, chain_id, epoch.to_bytes(8, "big"), view.to_bytes(8, "big"), block)


def decode_certificate(encoded: bytes) -> Certificate:
    """A certificate, not yet verified.

    Raises:
        Rejected: as ``codec.decode``.
    """
    return decode(encoded, Certificate, MAX_CERTIFICATE_BYTES)


def verify_certificate(scheme: CertificateScheme, chain_id: ChainId, certificate: Certificate) -> None:
    """Every voting role of the epoch finalized ``certificate.block`` in ``certificate.view`` on this chain.

    Raises:
        Rejected: ``BAD_CERTIFICATE``, ``WRONG_EPOCH``, ``WRONG_CHAIN``, or as the scheme's ``verify``.
    """
    if scheme.committee.chain_id != chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"voters of chain {scheme.committee.chain_id.hex()}")
    if certificate.scheme != scheme.name:
        raise Rejected(Reason.BAD_CERTIFICATE, f"certificate scheme {certificate.scheme!a}, expected {scheme.name}")
    if certificate.epoch != scheme.committee.epoch:
        raise Rejected(
            Reason.WRONG_EPOCH,
            f"certificate of epoch {certificate.epoch}, expected {scheme.committee.epoch}",
        )
    message = certificate_message(chain_id, certificate.epoch, View(certificate.view), Digest(certificate.block))
    scheme.verify(message, certificate.signature)


def _signers(role: Role, group: GroupKeys, shares: Mapping[int, bytes]) -> list[int]:
    if len(shares) < group.threshold:
        raise _quorum_not_reached(role, len(shares), group.threshold)
    return signing_indices(group.threshold, len(group.share_keys), shares)


def _quorum_not_reached(role: Role, present: int, needed: int) -> Rejected:
    return Rejected(Reason.QUORUM_NOT_REACHED, f"{present} shares of role {role.value}, {needed} needed")


def _verify_identity(member: Member, message: bytes, signature: bytes) -> None:
    keys.verify(member.scheme, member.identity_key, message, signature)


def _culprits(
    scheme: BlsThreshold | Ed25519List, message: bytes, shares: Mapping[MemberId, bytes]
) -> BadCertificateShares:
    """Checks share by share which members to leave out."""
    culprits: list[Member] = []
    for voter in scheme.committee.voters:
        if voter.id not in shares:
            continue
        try:
            scheme.verify_share(voter.id, message, shares[voter.id])
        except Rejected:
            culprits.append(voter)
    if not culprits:
        raise InvariantBroken("every share verifies, but they do not combine: the role keys do not fit")
    return BadCertificateShares(tuple(culprit.id for culprit in culprits), [culprit.name for culprit in culprits])
