"""Who takes part, with which keys, and how many of each role make a quorum.

The genesis lists the members of a log, their keys, the group key of each voting role and the log's
fixed parameters. Its digest is the chain id: the trust anchor every verifier pins.

Rules:

- A certificate needs ``t_r`` members of *every* voting role, ``n_r/2 < t_r <= n_r``. Two certificates then
  share ``2 t_r - n_r`` members in every role, so history forks only if every role holds that many traitors.
- No member holds two roles and no key appears twice, whatever it is used for.
- Every BLS key and every group key carries a proof of possession bound to the genesis nonce (and to
  member, or to epoch and role), so that no key can be chosen to cancel others in a sum
  (Ristenpart and Yilek, Eurocrypt 2007).
- The share keys of a role lie on one polynomial of degree ``t_r - 1`` whose value at zero is the group
  key; with ``t_r = n_r`` they are the members' own keys and the group key is their sum.

Members and keys hold for one *epoch*; those of epoch 0 stand in the genesis, later ones in a ``membership`` event.
Wire bounds are declared on the Structs; what they mean together is checked by ``check_membership``. Key
generation is left to ``key_generation``, certificates to ``certificate``, the change from one epoch to the next to
``epochs``, the genesis file people read to ``genesis``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated

from msgspec import Meta, Struct

from consensus import bls, keys, threshold
from consensus.codec import encode
from consensus.identifiers import VOTING_ROLES, ChainId, MemberId, Role, Tag, View, tagged_hash
from consensus.rejection import Reason, Rejected

VERSION = 1
GENESIS_EPOCH = 0
MAX_MEMBERS = 256
MAX_GENESIS_BYTES = 1_048_576
MAX_SIGNERS = 64
"""Of one event."""
MAX_SIGNERS_BYTES = 65_000
"""What they and their signatures take of an entry's 65,535 bytes, a frame of 38 for each."""
_SIGNER_BYTES: Mapping[int, int] = {
    keys.SignatureScheme.ED25519: keys.ED25519_SIGNATURE_BYTES + 38,
    keys.SignatureScheme.ML_DSA_65: keys.ML_DSA_65_SIGNATURE_BYTES + 38,
}

BLS_THRESHOLD = "bls-threshold"
ED25519_LIST = "ed25519"
BLS_MULTISIG = "bls-multisig"
ML_DSA_65_LIST = "ml-dsa-65"


@dataclass(frozen=True, slots=True)
class SchemeNeeds:
    """What a certificate scheme needs of its voters."""

    identity: keys.SignatureScheme | None
    """The only scheme of identity keys it takes, if not any."""
    member_keys: bool
    """Whether every voter has a BLS key of its own, with proof of possession."""
    group_keys: bool
    """Whether every voting role has a joint key."""


SCHEME_NEEDS = {
    BLS_THRESHOLD: SchemeNeeds(None, True, True),
    BLS_MULTISIG: SchemeNeeds(None, True, False),
    ED25519_LIST: SchemeNeeds(keys.SignatureScheme.ED25519, False, False),
    ML_DSA_65_LIST: SchemeNeeds(keys.SignatureScheme.ML_DSA_65, False, False),
}
"""The certificate schemes a genesis may choose, by name."""

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
PublicKeyBytes = Annotated[bytes, Meta(min_length=48, max_length=48)]
SignatureBytes = Annotated[bytes, Meta(min_length=96, max_length=96)]
MemberName = Annotated[str, Meta(max_length=64, pattern=r"\A[a-z0-9]([a-z0-9.-]*[a-z0-9])?\Z")]
LogName = Annotated[str, Meta(max_length=128, pattern=r"\A[a-z0-9]([a-z0-9./-]*[a-z0-9])?\Z")]


class Member(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A node of an authority, with its own keys. ``scheme`` is a ``keys.SignatureScheme``."""

    name: MemberName
    role: Role
    scheme: Annotated[int, Meta(ge=1, le=255)]
    identity_key: Annotated[bytes, Meta(min_length=1, max_length=4_096)]
    transport_key: Bytes32
    """Ed25519 key of the member's libp2p peer id."""
    log_key: Annotated[bytes, Meta(max_length=32)]
    """Ed25519 key of its checkpoint signatures; empty for a verifier."""
    bls_key: Annotated[bytes, Meta(max_length=48)]
    """Its own BLS key; empty for a verifier and where certificates need none."""
    bls_possession: Annotated[bytes, Meta(max_length=96)]
    """Proof of possession of ``bls_key``, bound to the genesis nonce and this member; else empty."""

    @property
    def id(self) -> MemberId:
        """What signatures and messages name the member by."""
        return member_id(self.scheme, self.identity_key)


class RoleGroup(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The joint key of one voting role. ``share_keys`` follow the order of the role's members."""

    role: Role
    threshold: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
    group_key: PublicKeyBytes
    share_keys: Annotated[tuple[PublicKeyBytes, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    possession: SignatureBytes
    """Proof of possession of ``group_key`` by the role, bound to nonce, epoch and role."""


class Parameters(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Limits every voter applies alike; durations in milliseconds."""

    max_block_events: Annotated[int, Meta(ge=1, le=4_096)] = 1_024
    max_event_bytes: Annotated[int, Meta(ge=1_024, le=16_777_216)] = 1_048_576
    heartbeat_ms: Annotated[int, Meta(ge=10, le=86_400_000)] = 10_000
    max_clock_skew_ms: Annotated[int, Meta(ge=10, le=3_600_000)] = 5_000
    censorship_ms: Annotated[int, Meta(ge=10, le=86_400_000)] = 30_000


class RoleThreshold(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``t_r`` of one voting role."""

    role: Role
    threshold: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]


class Membership(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="membership"):
    """Members, quorums and role keys of one epoch; the fields are those of ``Genesis``."""

    epoch: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    thresholds: Annotated[tuple[RoleThreshold, ...], Meta(min_length=3, max_length=3)]
    groups: Annotated[tuple[RoleGroup, ...], Meta(max_length=3)]


class Genesis(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="genesis"):
    """The beginning of a log. ``created_ms`` is Unix time in milliseconds."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    name: LogName
    """Origin name of the log, as its checkpoints carry it."""
    nonce: Bytes32
    created_ms: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    certificate_scheme: Annotated[str, Meta(min_length=1, max_length=32)]
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]
    thresholds: Annotated[tuple[RoleThreshold, ...], Meta(min_length=3, max_length=3)]
    """``t_r`` of each voting role, in the order of ``VOTING_ROLES``."""
    groups: Annotated[tuple[RoleGroup, ...], Meta(max_length=3)]
    """Role keys in the order of ``VOTING_ROLES``; empty where certificates need none."""
    parameters: Parameters

    @property
    def chain_id(self) -> ChainId:
        """Digest of the canonical genesis: what every verifier pins."""
        return ChainId(tagged_hash(Tag.GENESIS, encode(self)))

    @property
    def membership(self) -> Membership:
        """Members and keys of epoch 0."""
        return Membership(GENESIS_EPOCH, self.members, self.thresholds, self.groups)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How many members of a role may be faulty before a property is lost."""

    role: Role
    members: int
    threshold: int
    agreement: int
    """Traitors in *every* role must exceed this for history to fork: ``2t - n - 1``."""
    validity: int
    """Traitors in *every* role must exceed this for an invalid event to be certified: ``t - 1``."""
    liveness: int
    """Silent members of this role alone must exceed this for the log to stop: ``n - t``."""


@dataclass(frozen=True, slots=True)
class Committee:
    """The voters of one epoch and their quorum, made by ``committee``."""

    chain_id: ChainId
    epoch: int
    nonce: bytes
    """The genesis nonce: what every proof of possession of this chain is bound to."""
    certificate_scheme: str
    members: tuple[Member, ...]
    groups: tuple[RoleGroup, ...]
    voters: tuple[Member, ...]
    """Members of the voting roles, in the order of the genesis: the leaders' order."""
    _by_id: dict[MemberId, Member]
    _by_role: dict[Role, tuple[Member, ...]]
    _thresholds: dict[Role, int]
    _share_index: dict[MemberId, int]
    before: "Committee | None" = field(default=None, compare=False, repr=False)
    """The members of the epoch before, as far back as they are known; None of the genesis's."""

    def of_epoch(self, epoch: int) -> "Committee":
        """The members of this epoch or an earlier one: what was signed in an epoch is judged by its own members.

        Raises:
            Rejected: ``WRONG_EPOCH`` for a later epoch, or one before all that are known.
        """
        found: Committee | None = self
        while found is not None and found.epoch > epoch:
            found = found.before
        if found is None or found.epoch != epoch:
            raise Rejected(Reason.WRONG_EPOCH, f"of epoch {epoch}, this is epoch {self.epoch}")
        return found

    def has_member(self, identifier: MemberId) -> bool:
        """Whether somebody of that id belongs to this epoch, in whatever role."""
        return identifier in self._by_id

    def member(self, identifier: MemberId) -> Member:
        """The member of that id.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``.
        """
        found = self._by_id.get(identifier)
        if found is None:
            raise Rejected(Reason.UNKNOWN_MEMBER, f"{identifier.hex()} is no member of epoch {self.epoch}")
        return found

    def voter(self, identifier: MemberId) -> Member:
        """The voting member of that id.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``; ``WRONG_ROLE`` for a verifier.
        """
        found = self.member(identifier)
        if found.role not in VOTING_ROLES:
            raise Rejected(Reason.WRONG_ROLE, f"{found.name} is a {found.role.value} and does not vote")
        return found

    def role_members(self, role: Role) -> tuple[Member, ...]:
        """Members of a role, in the order of the genesis."""
        return self._by_role[role]

    def threshold(self, role: Role) -> int:
        """``t_r`` of a voting role.

        Raises:
            Rejected: ``WRONG_ROLE`` for a role that does not vote.
        """
        found = self._thresholds.get(role)
        if found is None:
            raise Rejected(Reason.WRONG_ROLE, f"{role.value} does not vote and has no threshold")
        return found

    def leader(self, view: View) -> Member:
        """Who proposes in ``view``: round-robin over the voters, view 1 first."""
        return self.voters[(view - 1) % len(self.voters)]

    def has_quorum(self, identifiers: Iterable[MemberId]) -> bool:
        """Whether ``t_r`` members of every voting role are among ``identifiers``.

        Repeated ids count once; ids of verifiers and strangers not at all.
        """
        present = dict.fromkeys(VOTING_ROLES, 0)
        for identifier in set(identifiers):
            found = self._by_id.get(identifier)
            if found is not None and found.role in present:
                present[found.role] += 1
        return all(present[role] >= self._thresholds[role] for role in VOTING_ROLES)

    def share_index(self, identifier: MemberId) -> int:
        """Position of a voter within its role, from 1: the index of its key share.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``; ``WRONG_ROLE`` for a verifier.
        """
        return self._share_index[self.voter(identifier).id]

    def tolerances(self) -> tuple[Tolerance, ...]:
        """What each voting role can bear, in the order of ``VOTING_ROLES``."""
        return tuple(
            Tolerance(
                role=role,
                members=(n := len(self._by_role[role])),
                threshold=(t := self._thresholds[role]),
                agreement=2 * t - n - 1,
                validity=t - 1,
                liveness=n - t,
            )
            for role in VOTING_ROLES
        )


@lru_cache(maxsize=4 * MAX_MEMBERS)
def member_id(scheme: int, identity_key: bytes) -> MemberId:
    """Id of the member who holds ``identity_key``; cached, since every message asks for its sender's."""
    return MemberId(tagged_hash(Tag.MEMBER, bytes([scheme]), identity_key))


def default_threshold(member_count: int) -> int:
    """The quorum that weighs traitors and silent members alike: ``floor(2n/3) + 1``, never above n."""
    return 2 * member_count // 3 + 1


def committee(genesis: Genesis, membership: Membership | None = None, before: Committee | None = None) -> Committee:
    """The voters of an epoch: of the genesis itself, or of a later ``membership`` that passed ``check_membership``.

    ``before`` are those of the epoch that ended; without them nothing that was signed in it can be judged.
    """
    held = membership or genesis.membership
    by_role = {role: tuple(member for member in held.members if member.role == role) for role in Role}
    return Committee(
        chain_id=genesis.chain_id,
        epoch=held.epoch,
        nonce=genesis.nonce,
        certificate_scheme=genesis.certificate_scheme,
        members=held.members,
        groups=held.groups,
        voters=tuple(member for member in held.members if member.role in VOTING_ROLES),
        _by_id={member.id: member for member in held.members},
        _by_role=by_role,
        _thresholds={entry.role: entry.threshold for entry in held.thresholds},
        _share_index={member.id: index for role in VOTING_ROLES for index, member in enumerate(by_role[role], start=1)},
        before=before,
    )


def scheme_needs(certificate_scheme: str) -> SchemeNeeds:
    """What the scheme of that name needs.

    Raises:
        Rejected: ``BAD_MEMBERSHIP`` for a name that is none.
    """
    found = SCHEME_NEEDS.get(certificate_scheme)
    if found is None:
        raise Rejected(
            Reason.BAD_MEMBERSHIP,
            f"no certificate scheme is called {certificate_scheme!a}; known are {', '.join(SCHEME_NEEDS)}",
        )
    return found


def check_genesis(genesis: Genesis) -> None:
    """Everything a genesis claims that needs no trust: quorums, keys, proofs of possession, role keys.

    Raises:
        Rejected: ``BAD_MEMBERSHIP``, ``BAD_KEY``, ``BAD_PROOF_OF_POSSESSION``.
    """
    check_membership(genesis.membership, genesis.certificate_scheme, genesis.nonce)


def check_membership(membership: Membership, certificate_scheme: str, nonce: bytes) -> None:
    """``check_genesis`` for the members of any epoch of a chain.

    Raises:
        Rejected: ``BAD_MEMBERSHIP``, ``BAD_KEY``, ``BAD_PROOF_OF_POSSESSION``.
    """
    needs = scheme_needs(certificate_scheme)
    _check_quorums(membership)
    _check_members(membership, certificate_scheme, nonce)
    _check_change_fits(membership)
    if needs.group_keys:
        _check_groups(membership, nonce)
    elif membership.groups:
        raise Rejected(Reason.BAD_MEMBERSHIP, f"{certificate_scheme} certificates need no role keys")


def check_member_keys(member: Member, certificate_scheme: str, nonce: bytes) -> None:
    """A member has the keys its role and the certificate scheme need, valid and possessed, and no other.

    Raises:
        Rejected: ``BAD_MEMBERSHIP``, ``BAD_KEY``, ``BAD_PROOF_OF_POSSESSION``.
    """
    needs = scheme_needs(certificate_scheme)
    votes = member.role in VOTING_ROLES
    keys.check_public_key(member.scheme, member.identity_key)
    keys.check_public_key(keys.SignatureScheme.ED25519, member.transport_key)
    if votes:
        keys.check_public_key(keys.SignatureScheme.ED25519, member.log_key)
    elif member.log_key:
        raise Rejected(Reason.BAD_MEMBERSHIP, f"{member.name} is a verifier and signs no checkpoints")
    if votes and needs.identity is not None and member.scheme != needs.identity:
        raise Rejected(
            Reason.BAD_MEMBERSHIP,
            f"{certificate_scheme} certificates list identity signatures: {member.name} has another scheme",
        )
    if votes and needs.member_keys:
        context = threshold.member_possession_context(nonce, member.id)
        bls.verify_possession(member.bls_key, context, member.bls_possession)
    elif member.bls_key or member.bls_possession:
        raise Rejected(Reason.BAD_MEMBERSHIP, f"{member.name} has no use for a BLS key")


def _check_quorums(membership: Membership) -> None:
    """``n_r/2 < t_r <= n_r`` with at least one member in every voting role."""
    if tuple(entry.role for entry in membership.thresholds) != VOTING_ROLES:
        raise Rejected(Reason.BAD_MEMBERSHIP, "thresholds must name every voting role once, in order")
    for entry in membership.thresholds:
        n = sum(member.role == entry.role for member in membership.members)
        if n == 0:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"no member holds the voting role {entry.role.value}")
        if not n < 2 * entry.threshold <= 2 * n:
            raise Rejected(
                Reason.BAD_MEMBERSHIP,
                f"threshold {entry.threshold} of {n} {entry.role.value} members: expected n/2 < t <= n",
            )


def _check_change_fits(membership: Membership) -> None:
    """Whoever signs, a quorum of every role fits one event: else these members could never be changed."""
    signers, size_bytes = 0, 0
    for entry in membership.thresholds:
        signed = sorted(_SIGNER_BYTES[member.scheme] for member in membership.members if member.role == entry.role)
        signers += entry.threshold
        size_bytes += sum(signed[-entry.threshold :])
    if signers > MAX_SIGNERS or size_bytes > MAX_SIGNERS_BYTES:
        raise Rejected(
            Reason.BAD_MEMBERSHIP,
            f"a change of members takes {signers} signatures of {size_bytes} bytes together: one event holds"
            f" {MAX_SIGNERS}, of {MAX_SIGNERS_BYTES} bytes",
        )


def _check_members(membership: Membership, certificate_scheme: str, nonce: bytes) -> None:
    """Valid keys, unique names, and no key twice anywhere."""
    names: set[str] = set()
    seen: dict[bytes, str] = {}
    for member in membership.members:
        if member.name in names:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"two members are called {member.name}")
        names.add(member.name)
        check_member_keys(member, certificate_scheme, nonce)
        for purpose, key in (
            ("identity", member.identity_key),
            ("transport", member.transport_key),
            ("log", member.log_key),
            ("BLS", member.bls_key),
        ):
            if not key:
                continue
            use = f"{purpose} key of {member.name}"
            if key in seen:
                raise Rejected(Reason.BAD_MEMBERSHIP, f"the {use} is also the {seen[key]}")
            seen[key] = use


def _check_groups(membership: Membership, nonce: bytes) -> None:
    """Role keys are what their members' shares add up to, and were made by them."""
    if tuple(group.role for group in membership.groups) != VOTING_ROLES:
        raise Rejected(Reason.BAD_MEMBERSHIP, "role keys must be given for every voting role once, in order")
    own_keys = {member.bls_key for member in membership.members if member.bls_key}
    for group, entry in zip(membership.groups, membership.thresholds, strict=True):
        members = [member for member in membership.members if member.role == group.role]
        if group.threshold != entry.threshold or len(group.share_keys) != len(members):
            raise Rejected(
                Reason.BAD_MEMBERSHIP,
                f"role key of {group.role.value} is {group.threshold} of {len(group.share_keys)},"
                f" expected {entry.threshold} of {len(members)}",
            )
        group_keys = threshold.GroupKeys(group.threshold, group.group_key, group.share_keys)
        threshold.check_group_keys(group_keys)
        if group_keys.summed and group.share_keys != tuple(member.bls_key for member in members):
            raise Rejected(
                Reason.BAD_MEMBERSHIP,
                f"{group.role.value} needs all its members: its share keys must be their own keys",
            )
        if not group_keys.summed and own_keys.intersection((group.group_key, *group.share_keys)):
            raise Rejected(Reason.BAD_MEMBERSHIP, f"a key of {group.role.value} is also a member's own BLS key")
        context = threshold.group_possession_context(nonce, membership.epoch, group.role)
        bls.verify_possession(group.group_key, context, group.possession)
    _check_no_key_in_two_roles(membership)


def _check_no_key_in_two_roles(membership: Membership) -> None:
    """With shares in common, whoever holds one role would hold part of another."""
    seen: set[bytes] = set()
    for group in membership.groups:
        own = {group.group_key, *group.share_keys}
        if seen & own:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"a key of {group.role.value} appears in two roles")
        seen |= own
