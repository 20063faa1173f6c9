"""The ``membership`` event: who takes part from the next epoch on, and what the state keeps of it.

Rules:

- The event holds the *whole* membership of the next epoch, checked like a genesis, and is signed by a quorum of
  **every** voting role of the epoch that ends: nobody is added, removed or given another key without all three.
- It is the last event of its epoch (``transition``): its ledger block is *terminal*.
- A member is its identity key, and a key has one role for ever: who changes role leaves and joins with another key.
  One that keeps its key stays the same member whatever its other keys. One that joins under the name and in the role of
  one that leaves *succeeds* it: the same member under another identity key, which answers for what the old one signed
  (its sources, campaigns).
- An identity key that left never returns, for whatever use: it is recorded as retired.
- Under ``bls-threshold`` a role whose members, their keys or their quorum change gets a new group key, made by its new
  members (``ceremony``): whoever left holds shares of nothing. A role that stays as it was may keep its key, and gets
  none that another role had; the proof of possession is made anew for every epoch.

``check_change`` needs only the members of the epoch that ends; ``admit_change`` needs the state.
"""

from collections.abc import Iterable

from consensus import portions as p
from consensus.codec import encode
from consensus.identifiers import ChainId, Digest, MemberId, Tag, tagged_hash
from consensus.keys import SignatureScheme
from consensus.membership import Committee, Member, Membership, check_membership, member_id
from consensus.rejection import Reason, Rejected
from consensus.state import EPOCH_HEAD_KEY, RETIRED_TABLE, EpochHead, RetiredMember, StateView


class MembershipChange(p.Wire, frozen=True):
    """Governance portion of a ``membership`` event."""

    membership: Membership
    statement: p.Text


def membership_digest(chain_id: ChainId, membership: Membership) -> Digest:
    """What the state keeps of a membership, and a verifier compares the one it was handed with."""
    return tagged_hash(Tag.MEMBERSHIP, chain_id, encode(membership))


def check_change(membership: Membership, before: Committee) -> None:
    """A membership may follow the epoch of ``before``.

    Raises:
        Rejected: ``WRONG_EPOCH``; ``BAD_MEMBERSHIP`` for a key in another role than before and for a group key in other
            hands; as ``check_membership``.
    """
    if membership.epoch != before.epoch + 1:
        raise Rejected(Reason.WRONG_EPOCH, f"members of epoch {membership.epoch}, the next is {before.epoch + 1}")
    roles = {member.id: member.role for member in before.members}
    for member in membership.members:
        if roles.get(member.id, member.role) != member.role:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"{member.name} changes role and keeps its identity key")
    check_membership(membership, before.certificate_scheme, before.nonce)
    _check_new_group_keys(membership, before)


def _check_new_group_keys(membership: Membership, before: Committee) -> None:
    """No group key of the epoch before in other hands: a role keeps its own while it is what it was, and no other's."""
    owners = {group.group_key: group.role for group in before.groups}
    for group in membership.groups:
        owner = owners.get(group.group_key)
        if owner is None:
            continue
        if owner is not group.role:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"the group key of {group.role.value} was that of {owner.value}")
        held = [(member.id, member.bls_key) for member in membership.members if member.role == group.role]
        same = held == [(member.id, member.bls_key) for member in before.role_members(group.role)]
        if not (same and group.threshold == before.threshold(group.role)):
            raise Rejected(Reason.BAD_MEMBERSHIP, f"{group.role.value} changes and keeps its group key")


def succeeded(before: Iterable[Member], after: Iterable[Member]) -> dict[MemberId, MemberId]:
    """Whom of those who leave each one who joins follows, by the new one's id. A name left by renaming is no one's."""
    old, new = ({member.id: (member.name, member.role) for member in members} for members in (before, after))
    left = {place: member for member, place in old.items() if member not in new}
    return {member: left[place] for member, place in new.items() if member not in old and place in left}


def admit_change(view: StateView, membership: Membership, event: Digest, timestamp_ms: int, before: Committee) -> None:
    """Record the next epoch's membership and who retires.

    Raises:
        Rejected: ``WRONG_EPOCH`` when the epoch ends already; ``BAD_MEMBERSHIP`` for a retired key that returns.
    """
    head = view.find(EPOCH_HEAD_KEY, EpochHead)
    if head is not None and head.epoch >= membership.epoch:
        raise Rejected(Reason.WRONG_EPOCH, f"the members of epoch {head.epoch} are on the log already")
    staying = {member.id for member in membership.members}
    successors = {old: new for new, old in succeeded(before.members, membership.members).items()}
    for member in before.members:
        if member.id not in staying:
            view.put(RETIRED_TABLE + member.id, RetiredMember(before.epoch, successors.get(member.id, b"")))
    for member in membership.members:
        for use, key in _named_like_identities(member):
            if view.find(RETIRED_TABLE + key, RetiredMember) is not None:
                raise Rejected(
                    Reason.BAD_MEMBERSHIP,
                    f"the {use} key of {member.name} was an identity key that is retired: it cannot return",
                )
    digest = membership_digest(before.chain_id, membership)
    view.put(EPOCH_HEAD_KEY, EpochHead(membership.epoch, digest, event, timestamp_ms))


def _named_like_identities(member: Member) -> Iterable[tuple[str, MemberId]]:
    """A member's Ed25519 keys, as the ids they would have as identities."""
    yield "identity", member.id
    for use, key in (("transport", member.transport_key), ("log", member.log_key)):
        if key:
            yield use, member_id(SignatureScheme.ED25519, key)


def holder(view: StateView, member: bytes) -> bytes:
    """Who answers now for what ``member`` signed: itself, or its last successor."""
    while True:
        retired = view.find(RETIRED_TABLE + member, RetiredMember)
        if retired is None or not retired.successor:
            return member
        member = retired.successor


def holders(view: StateView, members: Iterable[bytes]) -> set[bytes]:
    """``holder`` of each."""
    return {holder(view, member) for member in members}
