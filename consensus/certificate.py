"""Finalization certificates: short proof that every voting role agreed to one ledger block.

A certificate vouches for (chain, epoch, view, ledger block digest). ``CertificateScheme`` hides how; the genesis
chooses one:

=================  ==========================================================  =================================
scheme             payload                                                     bytes, for n voters of which t sign
=================  ==========================================================  =================================
``bls-threshold``  the sum of three role signatures (``bls_certificates``)     96
``bls-multisig``   bitmap and the sum of members' signatures (the same)        116 + n / 8
``ed25519``        list of members' signatures (``listed_certificates``)       about 70 t
``ml-dsa-65``      list of members' signatures (the same)                      about 3,315 t
=================  ==========================================================  =================================

Rules:

- ``combine`` needs ``t_r`` shares of *every* voting role. It combines optimistically and checks once; when
  that fails it checks share by share and names the culprits, so that the caller can retry without them.
- A certificate is not unique (other signers, another scheme) and so never enters a digest.

Votes, and when a share may leave the process, are left to ``vote`` and ``engine``; which scheme a genesis
means to ``certificate_schemes``.
"""

from collections.abc import Mapping
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from consensus import bls, keys
from consensus.codec import decode
from consensus.identifiers import VOTING_ROLES, ChainId, Digest, MemberId, Role, Tag, View, tagged_message
from consensus.membership import MAX_MEMBERS, Committee, Member
from consensus.rejection import InvariantBroken, Reason, Rejected

MAX_SIGNATURE_BYTES = MAX_MEMBERS * (keys.ML_DSA_65_SIGNATURE_BYTES + 7) + 32
"""A list of the longest signatures by as many voters as there can be: 829 KiB."""
MAX_CERTIFICATE_BYTES = MAX_SIGNATURE_BYTES + 256

SigningSecret = bls.Secret | keys.Signer
"""What a member makes its shares with: a BLS secret, or its identity key where certificates list signatures."""


class Certificate(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certificate"):
    """Proof that ``block`` is final in ``view``. ``signature`` is as ``scheme`` defines it."""

    scheme: Annotated[str, Meta(min_length=1, max_length=32)]
    view: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    block: Annotated[bytes, Meta(min_length=32, max_length=32)]
    epoch: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    signature: Annotated[bytes, Meta(min_length=1, max_length=MAX_SIGNATURE_BYTES)]


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

    def check_secret(self, member: MemberId, secret: SigningSecret) -> None:
        """Raises ``Rejected`` with ``BAD_KEY`` unless ``secret`` makes this member's shares."""

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


def chosen_signers(committee: Committee, shares: Mapping[MemberId, bytes]) -> dict[MemberId, bytes]:
    """The first ``t_r`` shares of every role, in the order of the voters.

    Raises:
        Rejected: ``QUORUM_NOT_REACHED``; ``UNKNOWN_MEMBER``, ``WRONG_ROLE`` for a share of no voter.
    """
    for member in shares:
        committee.voter(member)
    chosen: set[MemberId] = set()
    for role in VOTING_ROLES:
        present = [member.id for member in committee.role_members(role) if member.id in shares]
        needed = committee.threshold(role)
        if len(present) < needed:
            raise quorum_not_reached(role, len(present), needed)
        chosen.update(present[:needed])
    return {voter.id: shares[voter.id] for voter in committee.voters if voter.id in chosen}


def quorum_not_reached(role: Role, present: int, needed: int) -> Rejected:
    """Too few shares of a role."""
    return Rejected(Reason.QUORUM_NOT_REACHED, f"{present} shares of role {role.value}, {needed} needed")


def culprits_among(scheme: CertificateScheme, message: bytes, shares: Mapping[MemberId, bytes]) -> BadCertificateShares:
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
