"""BLS certificates: ``bls-threshold``, the sum of three role signatures, and ``bls-multisig``, a sum and who signed.

Rules:

- Every key that is summed has proved possession, bound to the chain's nonce and to member, or to epoch and role
  (``membership.check_genesis``): no key can be chosen to cancel others (Ristenpart and Yilek, Eurocrypt 2007;
  Boneh, Drijvers and Neven, eprint 2018/483).
- ``bls-threshold``: the sum still verifies when two role signatures are altered in cancelling ways: it proves all
  roles together and none of them alone. ``role_signature`` gives a role's own signature, checked.
- ``bls-multisig``: the bitmap has one encoding, exactly one bit for each voter and no other bit set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Annotated

from msgspec import Meta, Struct

from consensus import bls
from consensus.certificate import SigningSecret, chosen_signers, culprits_among, quorum_not_reached
from consensus.codec import decode, encode
from consensus.identifiers import VOTING_ROLES, MemberId, Role
from consensus.membership import BLS_MULTISIG, BLS_THRESHOLD, MAX_MEMBERS, Committee
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.threshold import GroupKeys, combination_weights, combine_shares, signing_indices

MAX_MULTISIGNATURE_BYTES = 256


class Multisignature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="multisignature"):
    """Payload of a ``bls-multisig`` certificate: bit ``i % 8`` (lowest first) of byte ``i // 8`` is voter ``i``'s."""

    voters: Annotated[bytes, Meta(min_length=1, max_length=MAX_MEMBERS // 8)]
    signature: Annotated[bytes, Meta(min_length=96, max_length=96)]


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

    def check_secret(self, member: MemberId, secret: SigningSecret) -> None:
        """The secret is the member's share of its role's key.

        Raises:
            Rejected: ``BAD_KEY``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        _check_secret(self._share_key(member), secret)

    def share(self, secret: SigningSecret, message: bytes) -> bytes:
        """A BLS signature by the member's key share: 96 bytes."""
        return bls.sign(_bls_secret(secret), message)

    def verify_share(self, member: MemberId, message: bytes, share: bytes) -> None:
        """The share is the member's own.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``, ``WRONG_ROLE``, ``BAD_SIGNATURE``.
        """
        bls.verify(self._share_key(member), message, share)

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
            raise culprits_among(self, message, shares) from error
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
            raise culprits_among(self, message, {members[i - 1].id: own[i] for i in own}) from error
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

    def _share_key(self, member: MemberId) -> bytes:
        index = self.committee.share_index(member)
        return self.groups[self.committee.voter(member).role].share_keys[index - 1]

    def _by_role(self, shares: Mapping[MemberId, bytes]) -> dict[Role, dict[int, bytes]]:
        by_role: dict[Role, dict[int, bytes]] = {role: {} for role in VOTING_ROLES}
        for member, share in shares.items():
            by_role[self.committee.voter(member).role][self.committee.share_index(member)] = share
        return by_role


@dataclass(frozen=True, slots=True)
class BlsMultisig:
    """The sum of ``t_r`` members' own BLS signatures of every role, and a bitmap that says whose."""

    committee: Committee

    @property
    def name(self) -> str:
        """``bls-multisig``."""
        return BLS_MULTISIG

    def check_secret(self, member: MemberId, secret: SigningSecret) -> None:
        """The secret is the member's own BLS key's.

        Raises:
            Rejected: ``BAD_KEY``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        _check_secret(self.committee.voter(member).bls_key, secret)

    def share(self, secret: SigningSecret, message: bytes) -> bytes:
        """A BLS signature by the member's own key: 96 bytes."""
        return bls.sign(_bls_secret(secret), message)

    def verify_share(self, member: MemberId, message: bytes, share: bytes) -> None:
        """The share is the member's own.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``, ``WRONG_ROLE``, ``BAD_SIGNATURE``.
        """
        bls.verify(self.committee.voter(member).bls_key, message, share)

    def combine(self, message: bytes, shares: Mapping[MemberId, bytes]) -> bytes:
        """The sum of the first ``t_r`` signatures of every role, checked as one.

        Raises:
            BadCertificateShares: naming the culprits.
            Rejected: ``QUORUM_NOT_REACHED``, ``UNKNOWN_MEMBER``, ``WRONG_ROLE``.
        """
        chosen = chosen_signers(self.committee, shares)
        bitmap = bytearray(self._bitmap_bytes)
        for position, voter in enumerate(self.committee.voters):
            if voter.id in chosen:
                bitmap[position // 8] |= 1 << position % 8
        try:
            signature = bls.aggregate_signatures(list(chosen.values()))
            payload = encode(Multisignature(voters=bytes(bitmap), signature=signature))
            self.verify(message, payload)
        except Rejected as error:
            raise culprits_among(self, message, shares) from error
        return payload

    def verify(self, message: bytes, payload: bytes) -> None:
        """One pairing check against the sum of the keys of the voters named, a quorum of every role.

        Raises:
            Rejected: ``BAD_CERTIFICATE``, ``QUORUM_NOT_REACHED``, or as ``codec.decode``.
        """
        held = decode(payload, Multisignature, MAX_MULTISIGNATURE_BYTES)
        marked = int.from_bytes(held.voters, "little")
        count = len(self.committee.voters)
        if len(held.voters) != self._bitmap_bytes or marked >> count:
            raise Rejected(Reason.BAD_CERTIFICATE, f"expected a bitmap of {count} voters, found {held.voters.hex()}")
        voters = [voter for position, voter in enumerate(self.committee.voters) if marked >> position & 1]
        if not self.committee.has_quorum(voter.id for voter in voters):
            raise Rejected(Reason.QUORUM_NOT_REACHED, "the marked voters are no quorum of every role")
        try:
            bls.verify(bls.aggregate_public_keys([voter.bls_key for voter in voters]), message, held.signature)
        except Rejected as error:
            raise Rejected(Reason.BAD_CERTIFICATE, error.detail) from error

    @property
    def _bitmap_bytes(self) -> int:
        return -(-len(self.committee.voters) // 8)


def _bls_secret(secret: SigningSecret) -> bls.Secret:
    if not isinstance(secret, bls.Secret):
        raise InvariantBroken("shares of BLS certificates are signed with a BLS secret")
    return secret


def _check_secret(expected_key: bytes, secret: SigningSecret) -> None:
    if bls.public_key(_bls_secret(secret)) != expected_key:
        raise Rejected(Reason.BAD_KEY, f"the BLS secret is not that of {expected_key.hex()}")


def _signers(role: Role, group: GroupKeys, shares: Mapping[int, bytes]) -> list[int]:
    if len(shares) < group.threshold:
        raise quorum_not_reached(role, len(shares), group.threshold)
    return signing_indices(group.threshold, len(group.share_keys), shares)
