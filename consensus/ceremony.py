"""The founding ceremony: members who trust no machine but their own agree on a genesis by exchanging messages.

One person writes the *invitation*: log name, nonce, scheme, quorums, who takes part in which role. Nobody need trust
that person: everything said later is bound to the invitation's digest, and members compare that digest by another
channel. Then, in rounds, each message signed by its sender's identity key:

1. *join*: the member's public keys, with proofs of possession, and a key to seal shares to it. All joins make the
   *roster*.
2. *commit*, 3. *deal*: rounds 1 and 2 of ``key_generation``, in roles whose key is dealt (``t < n``); the dealt values
   travel sealed to their recipients. A member deals only with every commitment of its role in hand, and never over
   two sets of them: else who moves last could see our reveal, and choose its polynomial anew.
4. *complain*, *answer*: a member whose value from a dealer is missing from the polynomial that dealer revealed says so;
   the dealer must show that value to all (Gennaro, Jarecki, Krawczyk and Rabin, *Secure Distributed Key Generation for
   Discrete-Log Based Cryptosystems*, §3). A value that fits is used, one that does not convicts the dealer. If the
   complaint was false, a value the complainer knew already is known to all: nothing is lost. Nothing but a wrong value
   convicts: whoever shows its complaint to the dealer alone, or late, makes it answer what others were not shown, or
   again, and no more. A member that confirms says that its values are good, so its complaint awaits no answer: the
   dealer may have finished, and have no seed left to answer from.
5. *confirm*: the member's part in the joint proof of possession of its role's key, where roles have one.

Every message names the digest of all messages of the round before it, so that members who were shown different
messages find out at the next. Two messages of one round by one member are ``equivocation``; but for answers, which add
up, and of two values for one recipient one is wrong. A bad dealer is named by ``BadDealing``. Either ends the ceremony:
it is begun anew, without that member.

A ceremony may *refresh* the role keys of an epoch instead of making new ones: the invitation holds that epoch's whole
membership, everybody joins as the member it is there, dealt keys get new shares under the same key
(``key_generation``), and summed ones stay as they are.

A ``Transcript`` checks what was said, with no secret at all, and is what anyone verifies the genesis by. What a member
says, and its secrets, are left to ``participant``; files and passphrases to the node.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from consensus import key_generation as dkg
from consensus.codec import decode, encode
from consensus.identifiers import VOTING_ROLES, Digest, Role, Tag, tagged_hash, tagged_message
from consensus.keys import check_sealing_key, verify
from consensus.membership import (
    GENESIS_EPOCH,
    MAX_GENESIS_BYTES,
    MAX_MEMBERS,
    VERSION,
    Genesis,
    LogName,
    Member,
    MemberName,
    Membership,
    Parameters,
    RoleGroup,
    RoleThreshold,
    check_member_keys,
    check_membership,
    scheme_needs,
)
from consensus.rejection import Reason, Rejected
from consensus.threshold import GroupKeys

MAX_MESSAGE_BYTES = 262_144
MAX_INVITATION_BYTES = MAX_GENESIS_BYTES + MAX_MESSAGE_BYTES
"""One to a refresh holds a whole membership beside the names."""
SEALED_BYTES = 32 + 16
"""A dealt value and the authenticator of the box it is sealed in."""

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Sealed = Annotated[bytes, Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]


class Invited(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A member to be."""

    name: MemberName
    role: Role


class Invitation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-invitation"):
    """All of a genesis but the members' keys; the fields are those of ``Genesis``. For a later epoch of the same log
    they are its genesis's again, with that epoch's members and quorums. ``refreshes`` is the membership of the epoch
    before where its role keys are kept.
    """

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    name: LogName
    nonce: Bytes32
    created_ms: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    certificate_scheme: Annotated[str, Meta(min_length=1, max_length=32)]
    members: Annotated[tuple[Invited, ...], Meta(min_length=3, max_length=MAX_MEMBERS)]
    thresholds: Annotated[tuple[RoleThreshold, ...], Meta(min_length=3, max_length=3)]
    parameters: Parameters
    epoch: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    refreshes: Membership | None

    @property
    def digest(self) -> Digest:
        """What members compare by another channel before they join."""
        return tagged_hash(Tag.CEREMONY, b"invitation", encode(self))

    def role_members(self, role: Role) -> tuple[str, ...]:
        """Names of a role's members, in order: the order of their key shares."""
        return tuple(invited.name for invited in self.members if invited.role == role)

    def key_ceremony(self, role: Role) -> dkg.Ceremony:
        """What a voting role's key is made for."""
        needed = next(entry.threshold for entry in self.thresholds if entry.role == role)
        count = len(self.role_members(role))
        groups = () if self.refreshes is None or needed == count else self.refreshes.groups
        kept = [GroupKeys(held.threshold, held.group_key, held.share_keys) for held in groups if held.role == role]
        return dkg.Ceremony(self.nonce, self.epoch, role, needed, count, kept[0] if kept else None)

    def refreshed(self, name: str) -> Member | None:
        """The member of that name as it was and stays; None where new keys are made."""
        members = () if self.refreshes is None else self.refreshes.members
        return next((member for member in members if member.name == name), None)


class Join(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-join"):
    """Round 1. ``box_key`` is the X25519 key that dealt values are sealed to."""

    invitation: Bytes32
    member: Member
    box_key: Bytes32


class Commit(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-commit"):
    """Round 2, over the roster."""

    roster: Bytes32
    commitment: dkg.Commitment


class Deal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-deal"):
    """Round 3, over all commitments of the role. ``sealed`` has a value for each of the role's members, in order."""

    commitments: Bytes32
    reveal: dkg.Reveal
    sealed: Annotated[tuple[Sealed, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


class Complain(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-complain"):
    """Round 4, over all deals of the role: the dealers whose value is not on the polynomial they revealed."""

    deals: Bytes32
    dealers: Annotated[tuple[dkg.Index, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


class Answer(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-answer"):
    """Round 4: the values a dealer dealt to those who complain, for all to see. Who complains later gets another."""

    deals: Bytes32
    shares: Annotated[tuple[dkg.DealtShare, ...], Meta(min_length=1, max_length=MAX_MEMBERS)]


class Confirm(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-confirm"):
    """Round 5, over all deals of the role, or over the roster where keys are summed."""

    over: Bytes32
    possession: dkg.PossessionShare


Body = Join | Commit | Deal | Complain | Answer | Confirm
B = TypeVar("B", Join, Commit, Deal, Complain, Confirm)
ROUNDS: tuple[type[Body], ...] = (Join, Commit, Deal, Complain, Answer, Confirm)
_DEALING: tuple[type[Body], ...] = (Commit, Deal, Complain, Answer)


class SignedMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ceremony-message"):
    """A member's word: ``body`` is a canonical ``Body``, ``signature`` its identity key's over it."""

    sender: MemberName
    body: Annotated[bytes, Meta(max_length=MAX_MESSAGE_BYTES)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=3_309)]


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a ceremony waits for: a round, and the members whose messages are missing."""

    round: str
    members: tuple[str, ...]


def decode_invitation(encoded: bytes) -> Invitation:
    """An invitation that can lead to a genesis, or to the members of a later epoch.

    Raises:
        Rejected: ``BAD_MEMBERSHIP`` for repeated names, missing roles or quorums no genesis may have, and for a refresh
            of other members than those invited, or of no dealt key; as ``check_membership``; as ``codec.decode``.
    """
    invitation = decode(encoded, Invitation, MAX_INVITATION_BYTES)
    scheme_needs(invitation.certificate_scheme)
    names = [invited.name for invited in invitation.members]
    if len(set(names)) != len(names):
        raise Rejected(Reason.BAD_MEMBERSHIP, "the invitation names a member twice")
    if tuple(entry.role for entry in invitation.thresholds) != VOTING_ROLES:
        raise Rejected(Reason.BAD_MEMBERSHIP, "thresholds must name every voting role once, in order")
    for entry in invitation.thresholds:
        count = len(invitation.role_members(entry.role))
        if not count < 2 * entry.threshold <= 2 * count:
            raise Rejected(
                Reason.BAD_MEMBERSHIP,
                f"threshold {entry.threshold} of {count} {entry.role.value} members: expected n/2 < t <= n",
            )
    if invitation.refreshes is not None:
        _check_refresh(invitation, invitation.refreshes)
    return invitation


def _check_refresh(invitation: Invitation, before: Membership) -> None:
    if not scheme_needs(invitation.certificate_scheme).group_keys:
        raise Rejected(Reason.BAD_MEMBERSHIP, f"{invitation.certificate_scheme} has no role keys to refresh")
    invited = tuple(Invited(member.name, member.role) for member in before.members)
    expected = (before.epoch + 1, invited, before.thresholds)
    if (invitation.epoch, invitation.members, invitation.thresholds) != expected:
        raise Rejected(Reason.BAD_MEMBERSHIP, "a refresh is for the next epoch, of the same members and quorums")
    if all(invitation.key_ceremony(role).summed for role in VOTING_ROLES):
        raise Rejected(Reason.BAD_MEMBERSHIP, "every role needs all of its members: no key has shares to refresh")
    check_membership(before, invitation.certificate_scheme, invitation.nonce)


class Transcript:
    """Everything said in a ceremony so far, checked. Order and repetition of ``messages`` make no difference."""

    def __init__(self, invitation: Invitation, messages: Iterable[bytes]) -> None:
        """
        Raises:
            Rejected: ``EQUIVOCATION`` naming who said two things in one round; ``UNKNOWN_MEMBER`` for a sender who was
                not invited; ``WRONG_CHAIN`` for a message of another ceremony, or over messages other than those
                here; ``BAD_SIGNATURE``, ``BAD_KEY``, ``BAD_PROOF_OF_POSSESSION``, ``BAD_MEMBERSHIP``; as
                ``codec.decode``.
            BadDealing: naming a dealer that broke the key generation.
        """
        self.invitation = invitation
        self._roles = {invited.name: invited.role for invited in invitation.members}
        self._said: dict[type[Body], dict[str, dict[bytes, Body]]] = {kind: {} for kind in ROUNDS}
        opened = [_opened(message) for message in messages]
        for message, body in sorted(opened, key=lambda pair: ROUNDS.index(type(pair[1]))):
            self._take(message, body)
        self._check()

    # What was said

    def said(self, kind: type[B], role: Role | None = None) -> dict[str, B]:
        """Bodies of one round by sender, in the roster's order; of one role's members if given."""
        return {
            name: body
            for name in self._roles
            if role in (None, self._roles[name])
            for body in self._said[kind].get(name, {}).values()
            if isinstance(body, kind)
        }

    def answers(self, role: Role) -> dict[str, dict[int, dkg.DealtShare]]:
        """Values shown to all, by dealer and recipient, whether or not the complaints are here."""
        names = self.invitation.role_members(role)
        return {name: {share.recipient: share for share in self._shown(name)} for name in names}

    def member(self, name: str) -> Member:
        """A member that has joined.

        Raises:
            Rejected: ``CEREMONY_INCOMPLETE``.
        """
        joined = self.said(Join).get(name)
        if joined is None:
            raise Rejected(Reason.CEREMONY_INCOMPLETE, f"{name} has not joined")
        return joined.member

    def is_dealt(self, role: Role) -> bool:
        """Whether the role's key is made by dealing: roles have keys, and not all members are needed."""
        return (
            scheme_needs(self.invitation.certificate_scheme).group_keys
            and not self.invitation.key_ceremony(role).summed
        )

    def awaited(self) -> tuple[Awaited, ...]:
        """What is missing next; empty once the genesis can be made."""
        missing = self.missing(Join, tuple(self._roles))
        if missing or not scheme_needs(self.invitation.certificate_scheme).group_keys:
            return missing
        waits: list[Awaited] = []
        for role in VOTING_ROLES:
            members = self.invitation.role_members(role)
            rounds: tuple[type[Body], ...] = (Commit, Deal) if self.is_dealt(role) else ()
            found = next((held for kind in rounds if (held := self.missing(kind, members))), ())
            if not found and self.is_dealt(role):
                found = self.unanswered(role)
            waits += found or self.missing(Confirm, members)
        return tuple(waits)

    # Digests of rounds

    @cached_property
    def roster(self) -> Digest:
        """Digest of all joins. Raises ``CEREMONY_INCOMPLETE``."""
        return self._digest("roster", self.invitation.digest, Join, tuple(self._roles))

    def commitments(self, role: Role) -> Digest:
        """Digest of a role's commitments. Raises ``CEREMONY_INCOMPLETE``."""
        return self._digest(f"commitments {role.value}", self.roster, Commit, self.invitation.role_members(role))

    def deals(self, role: Role) -> Digest:
        """Digest of a role's deals. Raises ``CEREMONY_INCOMPLETE``."""
        return self._digest(f"deals {role.value}", self.commitments(role), Deal, self.invitation.role_members(role))

    # Results

    def reveals(self, role: Role) -> dict[int, dkg.Reveal]:
        """A role's reveals by index."""
        members = self.invitation.role_members(role)
        return {members.index(name) + 1: deal.reveal for name, deal in self.said(Deal, role).items()}

    def group(self, role: Role) -> GroupKeys:
        """A role's key and share keys.

        Raises:
            Rejected: ``CEREMONY_INCOMPLETE``.
            BadDealing: naming the dealer.
        """
        ceremony, names = self.invitation.key_ceremony(role), self.invitation.role_members(role)
        if ceremony.summed:
            members = [self.member(name) for name in names]
            return dkg.sum_member_keys(
                ceremony,
                [member.id for member in members],
                [member.bls_key for member in members],
                [member.bls_possession for member in members],
            )
        self.deals(role)
        commits = self.said(Commit, role)
        return dkg.check_reveals(
            ceremony,
            {names.index(name) + 1: held.commitment for name, held in commits.items()},
            self.reveals(role),
        )

    def genesis(self) -> Genesis:
        """What the founding ceremony ends in; the same for everyone who has the same messages.

        Raises:
            Rejected: ``WRONG_EPOCH`` for a ceremony of a later epoch; as ``membership``.
            BadDealing: as ``membership``.
        """
        invitation, made = self.invitation, self.membership()
        if invitation.epoch != GENESIS_EPOCH:
            raise Rejected(Reason.WRONG_EPOCH, f"this ceremony makes the members of epoch {invitation.epoch}")
        return Genesis(
            version=VERSION,
            name=invitation.name,
            nonce=invitation.nonce,
            created_ms=invitation.created_ms,
            certificate_scheme=invitation.certificate_scheme,
            members=made.members,
            thresholds=made.thresholds,
            groups=made.groups,
            parameters=invitation.parameters,
        )

    def membership(self) -> Membership:
        """Members and keys of the epoch that the ceremony is for.

        Raises:
            Rejected: ``CEREMONY_INCOMPLETE`` saying what is awaited; as ``membership.check_membership``.
            BadDealing: naming a member whose part in a proof of possession is bad.
        """
        for awaited in self.awaited():
            raise Rejected(
                Reason.CEREMONY_INCOMPLETE, f"waiting for the {awaited.round} of {', '.join(awaited.members)}"
            )
        invitation = self.invitation
        groups = []
        if scheme_needs(invitation.certificate_scheme).group_keys:
            for role in VOTING_ROLES:
                group, names = self.group(role), invitation.role_members(role)
                parts = {names.index(name) + 1: held.possession for name, held in self.said(Confirm, role).items()}
                possession = dkg.combine_possession(invitation.key_ceremony(role), group, parts)
                groups.append(RoleGroup(role, group.threshold, group.group_key, group.share_keys, possession))
        made = Membership(
            epoch=invitation.epoch,
            members=tuple(self.member(name) for name in self._roles),
            thresholds=invitation.thresholds,
            groups=tuple(groups),
        )
        check_membership(made, invitation.certificate_scheme, invitation.nonce)
        return made

    # Checks

    def _take(self, message: SignedMessage, body: Body) -> None:
        sender, kind = message.sender, type(body)
        if sender not in self._roles:
            raise Rejected(Reason.UNKNOWN_MEMBER, f"a message of {sender}, who was not invited")
        if isinstance(body, Join):
            self._check_join(sender, body)
            member = body.member
        else:
            member = self.member(sender)
        try:
            verify(member.scheme, member.identity_key, tagged_message(Tag.CEREMONY, message.body), message.signature)
        except Rejected as error:
            raise _told(f"the {_name(kind)} of {sender}", error) from error
        held = self._said[kind].setdefault(sender, {})
        held[message.body] = body
        # A dealer answers again whenever another complaint reaches it. The values themselves say whether it lies.
        if len(held) > 1 and kind is not Answer:
            raise Rejected(
                Reason.EQUIVOCATION, f"{sender} signed two different messages of round {_name(kind)}: begin without it"
            )

    def _check_join(self, sender: str, join: Join) -> None:
        if join.invitation != self.invitation.digest:
            raise Rejected(Reason.WRONG_CHAIN, f"{sender} joined another ceremony: {join.invitation.hex()}")
        if (join.member.name, join.member.role) != (sender, self._roles[sender]):
            raise Rejected(
                Reason.BAD_MEMBERSHIP,
                f"{sender} joined as {join.member.name}, {join.member.role.value}; it was invited as a "
                f"{self._roles[sender].value}",
            )
        refreshed = self.invitation.refreshed(sender)
        if refreshed is not None and join.member != refreshed:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"{sender} joined with other keys: a refresh changes no member")
        try:
            check_member_keys(join.member, self.invitation.certificate_scheme, self.invitation.nonce)
            check_sealing_key(join.box_key)
        except Rejected as error:
            raise _told(f"the join of {sender}", error) from error

    def _check(self) -> None:
        """Messages of a round are over all of those before it that are here, and dealers kept the protocol."""
        if self.missing(Join, tuple(self._roles)):
            self._expect_none_after(Join, tuple(self._roles))
            return
        for role in VOTING_ROLES:
            members = self.invitation.role_members(role)
            if not self.is_dealt(role):
                self._expect_none_of(_DEALING, members, f"the key of {role.value} is not dealt")
                self._check_over(role, Confirm, "over", self.roster)
                continue
            self._check_over(role, Commit, "roster", self.roster)
            if self.missing(Commit, members):
                self._expect_none_after(Commit, members)
                continue
            self._check_over(role, Deal, "commitments", self.commitments(role))
            if self.missing(Deal, members):
                self._expect_none_after(Deal, members)
                continue
            self._check_over(role, Complain, "deals", self.deals(role))
            self._check_over(role, Answer, "deals", self.deals(role))
            self._check_over(role, Confirm, "over", self.deals(role))
            self._check_dealing(role)
        verifiers = self.invitation.role_members(Role.VERIFIER)
        self._expect_none_of((*_DEALING, Confirm), verifiers, "a verifier takes no part after it joined")

    def _expect_none_of(self, rounds: tuple[type[Body], ...], members: tuple[str, ...], why: str) -> None:
        for kind in rounds:
            for name in members:
                if name in self._said[kind]:
                    raise Rejected(Reason.BAD_FIELD, f"a {_name(kind)} of {name}: {why}")

    def _check_dealing(self, role: Role) -> None:
        names = self.invitation.role_members(role)
        ceremony, reveals = self.invitation.key_ceremony(role), self.reveals(role)
        try:
            self.group(role)
            for name, deal in self.said(Deal, role).items():
                if len(deal.sealed) != len(names):
                    raise dkg.BadDealing(names.index(name) + 1, f"it sealed {len(deal.sealed)} of {len(names)} values")
            for dealer, name in enumerate(names, start=1):
                # Whether a complaint is here that asks for them says nothing of the dealer: whoever complained chose
                # whom it told. Sorted, so that whoever has the same messages is told the same.
                for share in sorted(self._shown(name), key=encode):
                    dkg.check_dealt_share(ceremony, share.recipient, dealer, reveals[dealer], share)
        except dkg.BadDealing as error:
            raise dkg.BadDealing(error.dealer, f"that is {names[error.dealer - 1]}: {error.why}") from error

    def accused(self, role: Role) -> dict[str, tuple[int, ...]]:
        """Dealers that are complained of, and the indices of who complains."""
        names = self.invitation.role_members(role)
        accused: dict[str, list[int]] = {}
        for name, complaint in self.said(Complain, role).items():
            if list(complaint.dealers) != sorted(set(complaint.dealers)) or complaint.dealers[-1] > len(names):
                raise Rejected(Reason.BAD_FIELD, f"{name} complains of dealers {list(complaint.dealers)}")
            for dealer in complaint.dealers:
                accused.setdefault(names[dealer - 1], []).append(names.index(name) + 1)
        return {name: tuple(complainers) for name, complainers in accused.items()}

    def unanswered(self, role: Role) -> tuple[Awaited, ...]:
        """Whose answers are awaited, by a member that has not confirmed; empty where none is."""
        names, answers, confirmed = self.invitation.role_members(role), self.answers(role), self.said(Confirm, role)
        dealers = tuple(
            dealer
            for dealer, complainers in sorted(self.accused(role).items())
            if any(index not in answers[dealer] and names[index - 1] not in confirmed for index in complainers)
        )
        return (Awaited(_name(Answer), dealers),) if dealers else ()

    def _shown(self, dealer: str) -> set[dkg.DealtShare]:
        answers = self._said[Answer].get(dealer, {}).values()
        return {share for answer in answers if isinstance(answer, Answer) for share in answer.shares}

    def missing(self, kind: type[Body], members: tuple[str, ...]) -> tuple[Awaited, ...]:
        """Whose message of a round is not here; empty where all are."""
        missing = tuple(name for name in members if name not in self._said[kind])
        return (Awaited(_name(kind), missing),) if missing else ()

    def _expect_none_after(self, kind: type[Body], members: tuple[str, ...]) -> None:
        for later in ROUNDS[ROUNDS.index(kind) + 1 :]:
            for name in members:
                if name in self._said[later]:
                    missing = ", ".join(self.missing(kind, members)[0].members)
                    raise Rejected(
                        Reason.CEREMONY_INCOMPLETE,
                        f"{name} has gone on to {_name(later)}, the {_name(kind)} of {missing} is not here",
                    )

    def _check_over(self, role: Role, kind: type[Body], field: str, expected: Digest) -> None:
        for name, bodies in self._said[kind].items():
            if self._roles[name] == role and any(getattr(body, field) != expected for body in bodies.values()):
                raise Rejected(
                    Reason.WRONG_CHAIN,
                    f"the {_name(kind)} of {name} is over other messages than those here: somebody showed you and it "
                    "different ones; compare the files",
                )

    def _digest(self, what: str, before: Digest, kind: type[Body], members: tuple[str, ...]) -> Digest:
        for missing in self.missing(kind, members):
            raise Rejected(
                Reason.CEREMONY_INCOMPLETE, f"waiting for the {missing.round} of {', '.join(missing.members)}"
            )
        return tagged_hash(
            Tag.CEREMONY, what.encode(), before, *(body for name in members for body in self._said[kind][name])
        )


def _opened(message: bytes) -> tuple[SignedMessage, Body]:
    signed = decode(message, SignedMessage, MAX_MESSAGE_BYTES)
    try:
        return signed, decode(signed.body, Body, MAX_MESSAGE_BYTES)  # type: ignore[arg-type]
    except Rejected as error:
        raise _told(f"a message of {signed.sender}", error) from error


def _told(which: str, error: Rejected) -> Rejected:
    """What is wrong with a message, with whose it is."""
    return Rejected(error.reason, f"{which}: {error.detail}")


def _name(kind: type[Body]) -> str:
    return kind.__name__.lower()
