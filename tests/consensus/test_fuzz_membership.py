"""Memberships as attackers write them, epoch after epoch: what follows is exactly what the rules say.

Random changes, honest and not, go through the rules that members and verifiers use. Whether one may be admitted is told
here by a few lines of their own; after each that was, what the theorem needs is looked at.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from consensus_fixtures import make_genesis, seed_bytes
from epoch_fixtures import change_event, next_membership
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import LIBRARIAN, MemoryLedger
from msgpack_fixtures import in_other_forms

from consensus import bls
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent
from consensus.identifiers import VOTING_ROLES, Digest, MemberId, Role, View
from consensus.keys import Ed25519SigningKey, Signer
from consensus.membership import (
    BLS_MULTISIG,
    BLS_THRESHOLD,
    ED25519_LIST,
    MAX_GENESIS_BYTES,
    Committee,
    Member,
    Membership,
    RoleGroup,
    RoleThreshold,
    committee,
    default_threshold,
    member_id,
)
from consensus.membership_change import check_change
from consensus.participant import MemberSecrets
from consensus.rejection import Reason, Rejected
from consensus.threshold import combine_shares, group_possession_context, member_possession_context
from consensus.vote import VoteKind, check_vote, sign_vote

COUNTS = {"data-source": 2, "governance": 2, "operator": 1, "verifier": 1}
REFUSED = {
    Reason.BAD_MEMBERSHIP,
    Reason.BAD_KEY,
    Reason.BAD_PROOF_OF_POSSESSION,
    Reason.WRONG_EPOCH,
    Reason.MALFORMED,
}
"""Reasons that a change of members may be refused for, whatever is in it."""
KEYS = ("identity_key", "transport_key", "log_key", "bls_key")


@dataclass
class Chain:
    """A log whose members change, and what these tests remember of it."""

    ledger: MemoryLedger
    signers: dict[MemberId, Signer] = field(default_factory=dict)
    """Everybody's identity key, of those that left, too."""
    left: set[MemberId] = field(default_factory=set)
    """Identity keys that left."""
    changes: list[CheckedEvent] = field(default_factory=list)
    newcomers: int = 0

    @property
    def needs_bls(self) -> bool:
        return self.ledger.genesis.certificate_scheme == BLS_MULTISIG

    def newcomer(self, name: str, role: Role) -> tuple[Member, MemberSecrets]:
        """A member with keys that nobody had."""
        self.newcomers += 1
        seeds = [seed_bytes(self.newcomers, f"newcomer's {purpose}", 0) for purpose in ("identity", "transport", "log")]
        identity, transport, log = map(Ed25519SigningKey, seeds)
        votes = role in VOTING_ROLES
        share = bls.secret_from_seed(seed_bytes(self.newcomers, "bls", 0)) if votes and self.needs_bls else None
        context = member_possession_context(self.ledger.genesis.nonce, member_id(1, identity.public_key))
        member = Member(
            name,
            role,
            1,
            identity.public_key,
            transport.public_key,
            log.public_key if votes else b"",
            bls.public_key(share) if share else b"",
            bls.prove_possession(share, context) if share else b"",
        )
        self.signers[member.id] = identity
        return member, MemberSecrets(identity, *seeds[:2], seeds[2] if votes else None, share)


def is_sound(membership: Membership, before: Committee, left: set[MemberId], needs_bls: bool) -> bool:
    """Whether the rules of ``docs/protocol.md`` admit the change; keys are known to be keys."""
    members = membership.members
    roles = {member.id: member.role for member in before.members}
    counts = Counter(member.role for member in members)
    held = [key for member in members for name in KEYS if (key := getattr(member, name))]
    return (
        membership.epoch == before.epoch + 1
        and [entry.role for entry in membership.thresholds] == list(VOTING_ROLES)
        and all(counts[entry.role] < 2 * entry.threshold <= 2 * counts[entry.role] for entry in membership.thresholds)
        and len({member.name for member in members}) == len(members)
        and len(set(held)) == len(held)
        and not left & {member.id for member in members}
        and all(roles.get(member.id, member.role) == member.role for member in members)
        and all(member.scheme == 1 and member.identity_key and member.transport_key for member in members)
        and all((member.role in VOTING_ROLES) == bool(member.log_key) for member in members)
        and all((member.role in VOTING_ROLES and needs_bls) == bool(member.bls_key) for member in members)
    )


def is_possessed(member: Member, nonce: bytes) -> bool:
    if not member.bls_key:
        return not member.bls_possession
    try:
        bls.verify_possession(member.bls_key, member_possession_context(nonce, member.id), member.bls_possession)
    except Rejected:
        return False
    return True


def least_thresholds(members: list[Member]) -> tuple[RoleThreshold, ...]:
    counts = Counter(member.role for member in members)
    return tuple(RoleThreshold(role, counts[role] // 2 + 1) for role in VOTING_ROLES)


def drawn_change(draw, chain: Chain) -> tuple[Membership, dict[str, MemberSecrets]]:
    """Joins, departures and new keys, and at times what an attacker adds to them."""
    ledger, places = chain.ledger, st.integers(0, 9)
    members, secrets = list(ledger.committee.members), dict[str, MemberSecrets]()

    def newcomer(name: str, role: Role) -> Member:
        member, secrets[name] = chain.newcomer(name, role)
        return member

    for _ in range(draw(st.integers(0, 2))):
        at = draw(places) % len(members)
        match draw(st.sampled_from(["join", "leave", "new keys", "new keys", "new name"])):
            case "join":
                members.append(newcomer(f"newcomer-{chain.newcomers}", draw(st.sampled_from(tuple(Role)))))
            case "leave" if len(members) > 1:
                del members[at]
            case "new keys":
                members[at] = newcomer(members[at].name, members[at].role)
            case "new name":
                renamed = f"renamed-{ledger.committee.epoch}-{at}"
                secrets[renamed] = secrets.get(members[at].name) or ledger.secrets[members[at].name]
                members[at] = msgspec.structs.replace(members[at], name=renamed)
    membership = Membership(ledger.committee.epoch + 1, tuple(members), least_thresholds(members), ())
    if draw(st.booleans()):
        membership = draw(twisted(membership, chain))
    return membership, secrets


RULES_OF_EPOCHS = ("role", "return", "epoch")
RULES_OF_MEMBERS = ("key", "name", "threshold", "order", "empty", "scheme", "twin", "proof", "small")
TWISTS = RULES_OF_EPOCHS * 3 + RULES_OF_MEMBERS
"""What each breaks is told by its case; the rare ones are tried more."""


@st.composite
def twisted(draw, membership: Membership, chain: Chain) -> Membership:
    """The membership with one thing an attacker would try."""
    members, thresholds = list(membership.members), membership.thresholds
    at, other = (draw(st.integers(0, len(members) - 1)) for _ in range(2))
    place = draw(st.integers(0, 2))
    epoch = membership.epoch
    match draw(st.sampled_from(TWISTS)):
        case "key":
            fields = {draw(st.sampled_from(KEYS)): getattr(members[other], draw(st.sampled_from(KEYS)))}
            members[at] = msgspec.structs.replace(members[at], **fields)
        case "name":
            members[at] = msgspec.structs.replace(members[at], name=members[other].name)
        case "threshold":
            chosen = RoleThreshold(VOTING_ROLES[place], draw(st.integers(0, 5)))
            thresholds = (*thresholds[:place], chosen, *thresholds[place + 1 :])
        case "order":
            thresholds = tuple(draw(st.permutations(thresholds)))
        case "empty":
            members = [member for member in members if member.role != VOTING_ROLES[place]]
        case "role":
            members[at] = msgspec.structs.replace(members[at], role=draw(st.sampled_from(VOTING_ROLES)))
            thresholds = least_thresholds(members)
        case "epoch":
            epoch += draw(st.sampled_from([-2, -1, 1, 2]))
        case "scheme":
            members[at] = msgspec.structs.replace(members[at], scheme=draw(st.integers(1, 3)))
        case "twin":
            members.append(msgspec.structs.replace(members[at], name="twin"))
            thresholds = least_thresholds(members)
        case "return" if chain.left:
            gone = draw(st.sampled_from(sorted(chain.left)))
            known = chain.ledger.committee
            while not known.has_member(gone):
                assert known.before is not None
                known = known.before
            members.append(msgspec.structs.replace(known.member(gone), name="returned"))
            thresholds = least_thresholds(members)
        case "proof":
            members[at] = msgspec.structs.replace(members[at], bls_possession=members[other].bls_possession)
        case "small":
            members[at] = msgspec.structs.replace(members[at], transport_key=bytes(32))
    return Membership(max(0, epoch), tuple(members), thresholds, ())


def is_admissible(membership: Membership, chain: Chain) -> bool:
    ledger = chain.ledger
    return (
        is_sound(membership, ledger.committee, chain.left, chain.needs_bls)
        and all(is_possessed(member, ledger.genesis.nonce) for member in membership.members)
        and all(member.transport_key != bytes(32) for member in membership.members)
    )


def check_invariants(chain: Chain, before: Committee) -> None:
    """What the theorem needs of the epoch that has begun, and that those who left are nobody in it."""
    ledger, now = chain.ledger, chain.ledger.committee
    assert now.epoch == before.epoch + 1
    for tolerance in now.tolerances():
        assert tolerance.members < 2 * tolerance.threshold <= 2 * tolerance.members
        assert tolerance.agreement >= 0
        assert tolerance.liveness >= 0
    assert len({member.id for member in now.members}) == len(now.members)
    for gone in (member for member in before.members if not now.has_member(member.id)):
        if gone.role not in VOTING_ROLES:
            continue
        sign = chain.signers[gone.id].sign
        vote = sign_vote(before, gone.id, VoteKind.NULLIFY, View(1), Digest(bytes(32)), share=b"", sign=sign)
        check_vote(vote, before)
        with pytest.raises(Rejected, match=Reason.WRONG_EPOCH.value):
            check_vote(vote, now)
        forged = sign_vote(now, gone.id, VoteKind.NULLIFY, View(1), Digest(bytes(32)), share=b"", sign=sign)
        with pytest.raises(Rejected, match=Reason.UNKNOWN_MEMBER.value):
            check_vote(forged, now)
    for change in chain.changes:
        with pytest.raises(Rejected):
            ledger.seal(change)
        with pytest.raises(Rejected):
            ledger.check(change.entry, change.portions)


def is_refused(chain: Chain, membership: Membership) -> bool:
    """Hand the change in, signed by every voter; it is admitted or refused by name."""
    ledger = chain.ledger
    try:
        change = change_event(ledger, membership)
        ledger.seal(change)
    except Rejected as error:
        refusal = error.reason
    else:
        chain.changes.append(change)
        return False
    assert refusal in REFUSED
    return True


def changes_as_the_rules_say(scheme: str, data: st.DataObject) -> None:
    """Up to five changes in a row."""
    chain = Chain(MemoryLedger(COUNTS, certificate_scheme=scheme))
    ledger = chain.ledger
    chain.signers.update((ledger.ids[name], held.identity) for name, held in ledger.secrets.items())
    ledger.seal(ledger.source(LIBRARIAN, "the first"))
    for _ in range(data.draw(st.integers(1, 5))):
        membership, secrets = drawn_change(data.draw, chain)
        before = ledger.committee
        admissible = is_admissible(membership, chain)
        assert is_refused(chain, membership) != admissible
        if admissible:
            ledger.enter_epoch(membership, secrets)
            chain.left |= {member.id for member in before.members if not ledger.committee.has_member(member.id)}
            check_invariants(chain, before)
    followed = anchor(ledger.genesis, ledger.chain_id).follow(ledger.all_links)
    assert [keys.committee.epoch for keys in followed.epochs] == list(range(ledger.committee.epoch + 1))
    assert followed.newest.committee.members == ledger.committee.members


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_members_change_exactly_as_the_rules_say_and_every_epoch_keeps_the_bounds(data) -> None:
    changes_as_the_rules_say(ED25519_LIST, data)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_members_with_bls_keys_change_exactly_as_the_rules_say_each_key_possessed(data) -> None:
    changes_as_the_rules_say(BLS_MULTISIG, data)


@settings(max_examples=40, deadline=None)
@given(signers=st.sets(st.sampled_from([f"{role}-{n + 1}" for role in COUNTS for n in range(COUNTS[role])])))
def test_change_is_taken_exactly_if_voters_of_every_role_signed_it_and_nobody_else(signers) -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    membership, _ = next_membership(ledger.genesis, ledger.committee, ledger.secrets)
    voters = {voter.name for voter in ledger.committee.voters}
    names = sorted(signers) or ["data-source-1"]
    if set(names) == voters:
        change_event(ledger, membership, names)
        return
    with pytest.raises(Rejected) as refusal:
        change_event(ledger, membership, names)
    assert refusal.value.reason in (Reason.MISSING_SIGNATURE, Reason.SURPLUS_SIGNATURE, Reason.WRONG_ROLE)


# Role keys

POLYNOMIALS = {"data-source": 4, "governance": 4, "operator": 1}
"""Two roles of three in four, so that the keys of either fit the other, and one of a single member."""


@dataclass(frozen=True)
class RoleKeys:
    """A committee, what a ceremony made for its next epoch, and everybody's shares of the keys of both."""

    before: Committee
    membership: Membership
    shares: dict[bytes, list[bls.Secret]]
    """By group key, in the order of the role's members."""

    def possession(self, group_key: bytes, role: Role, epoch: int) -> bytes:
        """What the holders of that key's shares can prove, whatever for."""
        context = group_possession_context(self.before.nonce, epoch, role)
        held = self.shares[group_key]
        parts = {at: bls.possession_share(share, group_key, context) for at, share in enumerate(held, start=1)}
        return combine_shares(default_threshold(len(held)), len(held), parts)


@functools.cache
def role_keys() -> RoleKeys:
    """The members stay with all their keys, and two of the three roles get a new role key."""
    genesis, secrets = make_genesis(POLYNOMIALS, certificate_scheme=BLS_THRESHOLD)
    before = committee(genesis)
    made, later = next_membership(genesis, before, secrets)
    shares: dict[bytes, list[bls.Secret]] = {}
    for groups, members, held in ((before.groups, before.members, secrets), (made.groups, made.members, later)):
        for group in groups:
            names = [member.name for member in members if member.role == group.role]
            shares[group.group_key] = [share for name in names if (share := held[name].key_share) is not None]
    keys = RoleKeys(before, msgspec.structs.replace(made, members=before.members), shares)
    only = before.groups[2]
    kept = msgspec.structs.replace(only, possession=keys.possession(only.group_key, only.role, 1))
    return replace(keys, membership=msgspec.structs.replace(keys.membership, groups=(*made.groups[:2], kept)))


def test_role_that_stays_as_it_was_keeps_its_key_with_a_new_proof() -> None:
    keys = role_keys()
    check_change(keys.membership, keys.before)
    old = keys.before.groups[0]
    kept = msgspec.structs.replace(old, possession=keys.possession(old.group_key, old.role, 1))
    check_change(msgspec.structs.replace(keys.membership, groups=(kept, *keys.membership.groups[1:])), keys.before)


def test_role_that_stays_does_not_get_the_key_another_role_had() -> None:
    """Three of governance would be all of the data sources, too, and name the shares of a key they have all of."""
    keys = role_keys()
    sources, governance, operator = keys.membership.groups
    old = keys.before.groups[1]
    possession = keys.possession(old.group_key, sources.role, 1)
    taken = msgspec.structs.replace(old, role=sources.role, possession=possession)
    with pytest.raises(Rejected, match="was that of governance") as refusal:
        check_change(msgspec.structs.replace(keys.membership, groups=(taken, governance, operator)), keys.before)
    assert refusal.value.reason is Reason.BAD_MEMBERSHIP


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_role_keys_are_taken_exactly_if_made_for_their_role_and_epoch(data) -> None:
    keys = role_keys()
    groups, is_true = [], True
    for place, fresh in enumerate(keys.membership.groups):
        source = data.draw(st.sampled_from(["fresh", "fresh", "own", "another's"]))
        origin = {"fresh": fresh, "own": keys.before.groups[place], "another's": keys.before.groups[1 - place % 2]}[
            source
        ]
        about = (fresh.role, 1)
        if data.draw(st.integers(0, 5)) == 5:
            about = (data.draw(st.sampled_from(VOTING_ROLES)), data.draw(st.integers(0, 2)))
        shares = list(origin.share_keys)
        edit = data.draw(
            st.sampled_from([None] * 12 + ["swapped", "infinite", "another's", "fewer", "threshold", "key"])
        )
        group_key, threshold = origin.group_key, fresh.threshold
        match edit:
            case "swapped":
                shares.reverse()
            case "infinite":
                shares[-1] = b"\xc0" + bytes(47)
            case "another's":
                shares[-1] = keys.before.voters[0].bls_key
            case "fewer":
                shares = shares[:-1] or shares
            case "threshold":
                threshold -= threshold > 1
            case "key":
                group_key = shares[0]
        groups.append(
            RoleGroup(fresh.role, threshold, group_key, tuple(shares), keys.possession(origin.group_key, *about))
        )
        is_true &= (source != "another's" and about == (fresh.role, 1)) and (group_key, threshold, tuple(shares)) == (
            origin.group_key,
            fresh.threshold,
            origin.share_keys,
        )
    forged = msgspec.structs.replace(keys.membership, groups=tuple(groups))
    if is_true:
        check_change(forged, keys.before)
        return
    with pytest.raises(Rejected) as refusal:
        check_change(forged, keys.before)
    assert refusal.value.reason in REFUSED


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_same_membership_in_other_bytes_is_refused(data) -> None:
    encoded = encode(role_keys().membership)
    forged = in_other_forms(encoded, lambda forms: data.draw(st.integers(0, forms * 3)) % forms)
    if forged == encoded:
        decode(forged, Membership, MAX_GENESIS_BYTES)
        return
    with pytest.raises(Rejected, match=Reason.NON_CANONICAL.value):
        decode(forged, Membership, MAX_GENESIS_BYTES)
