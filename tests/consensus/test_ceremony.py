"""The founding ceremony: who cheats is named and fixes no key, and everybody who has the messages has the genesis."""

import hashlib
from collections.abc import Callable, Iterable

import pytest
from ceremony_fixtures import CeremonyTable
from msgspec.structs import replace

from consensus import bls
from consensus import key_generation as dkg
from consensus.ceremony import (
    ROUNDS,
    Answer,
    Awaited,
    Body,
    Commit,
    Complain,
    Confirm,
    Deal,
    Invitation,
    Invited,
    Join,
    SignedMessage,
    Transcript,
    decode_invitation,
)
from consensus.certificate import certificate_message
from consensus.certificate_schemes import scheme_for
from consensus.codec import decode, encode
from consensus.identifiers import VOTING_ROLES, Digest, Role, Tag, View, tagged_message
from consensus.keys import SignatureScheme
from consensus.membership import SCHEME_NEEDS, Parameters, RoleThreshold, check_genesis, committee
from consensus.membership_change import check_change
from consensus.participant import Participant, derive_seed, hold_ceremony, member_seeds
from consensus.rejection import Reason, Rejected
from consensus.threshold import combine_shares

SMALL = {Role.DATA_SOURCE: (2, 2), Role.GOVERNANCE: (1, 1), Role.OPERATOR: (1, 1), Role.VERIFIER: (1, 0)}
DEALT = {Role.DATA_SOURCE: (3, 2), Role.GOVERNANCE: (1, 1), Role.OPERATOR: (1, 1), Role.VERIFIER: (1, 0)}
"""Members and how many of them are needed."""
FIRST, SECOND, LAST = "data-source-1", "data-source-2", "data-source-3"


def invitation_of(counts: dict[Role, tuple[int, int]] = DEALT, scheme: str = "bls-threshold") -> Invitation:
    return Invitation(
        version=1,
        name="ceremony.example/log",
        nonce=b"n" * 32,
        created_ms=1_700_000_000_000,
        certificate_scheme=scheme,
        members=tuple(
            Invited(f"{role.value}-{number}", role)
            for role, (count, _) in counts.items()
            for number in range(1, count + 1)
        ),
        thresholds=tuple(RoleThreshold(role, counts[role][1]) for role in VOTING_ROLES),
        parameters=Parameters(),
        epoch=0,
        refreshes=None,
    )


def seed(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


class Table(CeremonyTable):
    """Participants whose seeds are their names."""

    def __init__(self, invitation: Invitation | None = None, before: "Table | None" = None) -> None:
        """``before`` is the ceremony whose keys ``invitation`` refreshes."""
        invitation = invitation or invitation_of()
        members = {
            invited.name: Participant(invitation, invited.name, seed(invited.name))
            if before is None
            else before.again(invitation, invited.name)
            for invited in invitation.members
        }
        super().__init__(invitation, members)

    def again(self, invitation: Invitation, name: str) -> Participant:
        """A member with all that it keeps of this ceremony, and a new seed."""
        share = self.members[name].secret(self.transcript())
        return Participant(invitation, name, seed(f"{name} again"), kept=member_seeds(seed(name)), share=share)

    def held(self) -> "Table":
        """All rounds."""
        for _ in range(len(ROUNDS)):
            self.round()
        assert self.transcript().awaited() == ()
        return self


def refused(reason: Reason, call: Callable[[], object]) -> Rejected:
    with pytest.raises(Rejected) as caught:
        call()
    assert caught.value.reason is reason
    return caught.value


def assert_signs(table: Table) -> None:
    """The genesis is sound, and the members' secrets make certificates of it."""
    transcript = table.transcript()
    genesis = transcript.genesis()
    check_genesis(genesis)
    scheme = scheme_for(genesis)
    message = certificate_message(genesis.chain_id, 0, View(1), Digest(bytes(32)))
    shares = {}
    for voter in scheme.committee.voters:
        member = table.members[voter.name]
        secret = member.secret(transcript)
        scheme.check_secret(voter.id, secret or member.identity)
        shares[voter.id] = scheme.share(secret or member.identity, message)
    scheme.verify(message, scheme.combine(message, shares))


# Honest members


@pytest.mark.parametrize("scheme", SCHEME_NEEDS)
@pytest.mark.parametrize("counts", [SMALL, DEALT], ids=["all needed", "some needed"])
def test_honest_members_reach_one_genesis_whose_certificates_their_secrets_make(
    scheme: str, counts: dict[Role, tuple[int, int]]
) -> None:
    table = Table(invitation_of(counts, scheme))
    for _ in range(5):
        table.round()
    said = len(table.messages)
    assert table.transcript().awaited() == ()
    assert len(table.round().messages) == said
    assert_signs(table)
    assert table.transcript().genesis() == Transcript(table.invitation, reversed(table.messages * 2)).genesis()


def test_each_round_waits_for_every_member_and_says_for_whom() -> None:
    table = Table()
    for expected in ("join", "commit", "deal", "confirm"):
        table.round(without=[LAST])
        waits = {awaited.round: awaited.members for awaited in table.transcript().awaited()}
        assert waits[expected] == (LAST,)
        others = [name for name in table.members if name != LAST]
        assert all(table.members[name].next_message(table.transcript()) is None for name in others if "data" in name)
        error = refused(Reason.CEREMONY_INCOMPLETE, table.transcript().genesis)
        assert LAST in error.detail
        table.round()
    assert_signs(table)


def test_what_is_asked_of_a_ceremony_too_early_is_refused() -> None:
    table = Table()
    refused(Reason.CEREMONY_INCOMPLETE, lambda: table.transcript().member(FIRST))
    refused(Reason.CEREMONY_INCOMPLETE, lambda: table.transcript().roster)
    refused(Reason.CEREMONY_INCOMPLETE, lambda: table.members[FIRST].secret(table.round().transcript()))


def test_participant_is_a_function_of_its_seed() -> None:
    one, other = Table(), Table()
    for _ in range(4):
        one.round()
        other.round()
    assert one.messages == other.messages
    secrets = one.members[FIRST].secrets(one.transcript())
    again = other.members[FIRST].secret(other.transcript())
    assert secrets.key_share is not None
    assert again is not None
    assert secrets.key_share.to_bytes() == again.to_bytes()
    assert (secrets.identity_seed, secrets.log_seed) == (
        member_seeds(seed(FIRST)).identity,
        member_seeds(seed(FIRST)).log,
    )
    refused(Reason.BAD_KEY, lambda: Participant(one.invitation, FIRST, bytes(31)))
    assert "secret" not in repr(one.members[FIRST])


def test_post_quantum_identities_take_part() -> None:
    invitation = invitation_of()
    members = [
        Participant(invitation, invited.name, seed(invited.name), SignatureScheme.ML_DSA_65)
        for invited in invitation.members
    ]
    check_genesis(hold_ceremony(invitation, members).genesis())


# The last dealer


def test_last_dealer_that_saw_the_others_reveal_cannot_choose_its_polynomial() -> None:
    """The attack on plain Feldman: pick the own constant so that the sum is a key one knows."""
    table = Table().round().round()
    names = table.invitation.role_members(Role.DATA_SOURCE)
    transcript = table.transcript()
    for name in (FIRST, SECOND):
        table.says(name, table.due(name))
    rogue = dkg.Dealer(table.invitation.key_ceremony(Role.DATA_SOURCE), 3, b"chosen after the others' reveals!"[:32])
    honest = table.due(LAST)
    assert isinstance(honest, Deal)
    commitments = {names.index(name) + 1: held.commitment for name, held in transcript.said(Commit).items()}
    chosen = replace(honest, reveal=rogue.reveal({**commitments, 3: rogue.commitment()}))
    error = refused(Reason.BAD_DEALING, table.says(LAST, chosen).transcript)
    assert LAST in error.detail
    assert "something else than it committed to" in error.detail


def test_last_dealer_that_changes_its_commitment_after_the_reveals_is_an_equivocator() -> None:
    table = Table().round().round()
    first = table.due(FIRST)
    table.says(FIRST, first)
    rogue = dkg.Dealer(table.invitation.key_ceremony(Role.DATA_SOURCE), 3, b"r" * 32)
    other = Commit(table.transcript().roster, rogue.commitment())
    error = refused(Reason.EQUIVOCATION, lambda: Table.says(table, LAST, other).transcript())
    assert LAST in error.detail


def test_member_that_dealt_once_deals_over_no_other_commitments_though_its_files_are_gone() -> None:
    table = Table().round().round()
    member = table.members[FIRST]
    assert isinstance(table.due(FIRST), Deal)
    assert member.dealt_over == table.transcript().commitments(Role.DATA_SOURCE)
    restarted = Participant(table.invitation, FIRST, seed(FIRST), dealt_over=member.dealt_over)
    shown = Table().round()
    rogue = dkg.Dealer(shown.invitation.key_ceremony(Role.DATA_SOURCE), 3, b"r" * 32)
    shown.says(LAST, Commit(shown.transcript().roster, rogue.commitment())).round(without=[LAST])
    error = refused(Reason.EQUIVOCATION, lambda: restarted.next_message(shown.transcript()))
    assert "dealt over other commitments" in error.detail


# Bad values, complaints


def spoiled(deal: Body, recipient: int) -> Deal:
    """A deal whose value for one recipient does not open."""
    assert isinstance(deal, Deal)
    sealed = list(deal.sealed)
    sealed[recipient - 1] = bytes(48)
    return replace(deal, sealed=tuple(sealed))


def test_bad_value_is_complained_of_answered_in_the_open_and_the_ceremony_ends_well() -> None:
    table = Table().round().round()
    table.says(SECOND, spoiled(table.due(SECOND), 1)).round(without=[SECOND])
    complaint = table.due(FIRST)
    assert isinstance(complaint, Complain)
    assert complaint.dealers == (2,)
    table.says(FIRST, complaint)
    assert table.transcript().awaited()[0].round == "answer"
    assert table.members[FIRST].next_message(table.transcript()) is None
    answer = table.due(SECOND)
    assert isinstance(answer, Answer)
    table.says(SECOND, answer).round().round()
    assert_signs(table)


def test_dealer_that_has_confirmed_still_answers_a_complaint_that_came_late() -> None:
    table = Table().round().round()
    table.says(SECOND, spoiled(table.due(SECOND), 1)).round(without=[SECOND]).round(without=[FIRST])
    assert any(name == SECOND for name in table.transcript().said(Confirm))
    assert isinstance(table.due(FIRST), Complain)
    assert isinstance(table.round().due(SECOND), Answer)
    assert_signs(table.held())


def test_dealer_that_answers_a_complaint_with_a_wrong_value_is_convicted() -> None:
    table = Table().round().round()
    table.says(SECOND, spoiled(table.due(SECOND), 1)).round(without=[SECOND])
    table.says(FIRST, table.due(FIRST))
    answer = table.due(SECOND)
    assert isinstance(answer, Answer)
    wrong = replace(answer.shares[0], value=bytes(31) + b"\x05")
    error = refused(Reason.BAD_DEALING, table.says(SECOND, replace(answer, shares=(wrong,))).transcript)
    assert SECOND in error.detail


def test_false_complaint_delays_and_convicts_nobody() -> None:
    table = Table().round().round().round()
    table.says(LAST, Complain(table.transcript().deals(Role.DATA_SOURCE), (1, 2)))
    table.round(without=[LAST]).round().round()
    assert_signs(table)


def without(kind: type[Body], table: Table) -> list[bytes]:
    """What a member has who got no message of one kind."""
    return [
        message
        for message in table.messages
        if not isinstance(decode(decode(message, SignedMessage, 1 << 20).body, Body, 1 << 20), kind)  # type: ignore[arg-type]
    ]


def complained(false: Iterable[str] = (), of: int = 1) -> Table:
    """All have dealt well, and some complain of a dealer all the same."""
    table = Table().round().round().round()
    for name in false:
        table.says(name, Complain(table.transcript().deals(Role.DATA_SOURCE), (of,)))
    return table


def twice_spoiled() -> Table:
    """The second member dealt badly to both others; the first complains and has its answer, the last comes later."""
    table = Table().round().round()
    table.says(SECOND, spoiled(spoiled(table.due(SECOND), 1), 3)).round(without=[SECOND]).round(without=[LAST, SECOND])
    assert list(table.transcript().accused(Role.DATA_SOURCE).values()) == [(1,)]
    return table.says(SECOND, table.due(SECOND))


def test_answer_without_its_complaint_convicts_nobody() -> None:
    """A traitor complains to the dealer alone; the others get the answer, and perhaps the complaint later."""
    table = complained(false=[LAST])
    table.says(FIRST, table.due(FIRST))
    shown = Transcript(table.invitation, without(Complain, table))
    assert {awaited.round for awaited in shown.awaited()} == {"confirm"}
    confirmed = table.members[SECOND].next_message(shown)
    assert confirmed is not None
    table.messages.append(confirmed)
    assert_signs(table.held())
    late = [*without(Complain, table), *table.messages]
    made = Transcript(table.invitation, without(Complain, table)).genesis()
    assert made == Transcript(table.invitation, late).genesis() == Transcript(table.invitation, late[::-1]).genesis()


def test_value_shown_to_all_that_nobody_asked_for_is_checked_and_otherwise_ignored() -> None:
    table = complained()
    ceremony, deals = table.invitation.key_ceremony(Role.DATA_SOURCE), table.transcript().deals(Role.DATA_SOURCE)
    dealer = dkg.Dealer(ceremony, 1, derive_seed(seed(FIRST), "bls"))
    good = Answer(deals, (dealer.share_for(200), dealer.share_for(3)))
    wrong = Answer(deals, (replace(dealer.share_for(2), value=bytes(31) + b"\x05"),))
    assert_signs(table.says(FIRST, good).held())
    error = refused(Reason.BAD_DEALING, table.says(FIRST, wrong).transcript)
    assert f"that is {FIRST}: its share for 2 is not on the polynomial" in error.detail


def test_dealer_answers_a_complaint_that_came_after_its_answer() -> None:
    table = twice_spoiled()
    complaint = table.due(LAST)
    assert isinstance(complaint, Complain)
    table.says(LAST, complaint)
    assert table.transcript().awaited()[0] == Awaited("answer", (SECOND,))
    again = table.due(SECOND)
    assert isinstance(again, Answer)
    assert [share.recipient for share in again.shares] == [3]
    assert_signs(table.says(SECOND, again).held())
    made = table.transcript().genesis()
    assert Transcript(table.invitation, reversed(table.messages * 2)).genesis() == made
    # Both answers as one, as a dealer makes it that lost the first.
    table.messages = without(Answer, table)
    both = table.due(SECOND)
    assert isinstance(both, Answer)
    assert [share.recipient for share in both.shares] == [1, 3]
    assert table.says(SECOND, both).says(SECOND, again).transcript().genesis() == made


@pytest.mark.parametrize("which", [1, 3], ids=["first answer", "second answer"])
def test_dealer_that_answers_one_complaint_well_and_one_badly_is_convicted(which: int) -> None:
    table = twice_spoiled()
    answers = table.transcript().answers(Role.DATA_SOURCE)[SECOND]
    table.round(without=[SECOND])
    last = table.due(SECOND)
    assert isinstance(last, Answer)
    good = {**answers, 3: last.shares[0]}
    table.messages = without(Answer, table)
    for recipient, share in good.items():
        shown = replace(share, value=bytes(31) + b"\x05") if recipient == which else share
        table.says(SECOND, Answer(last.deals, (shown,)))
    for messages in (table.messages, table.messages[::-1], without(Complain, table)):
        error = refused(Reason.BAD_DEALING, lambda messages=messages: Transcript(table.invitation, messages))
        assert f"that is {SECOND}: its share for {which} is not on the polynomial" in error.detail


def test_dealer_that_shows_two_values_to_one_member_is_convicted_by_the_wrong_one_though_all_have_confirmed() -> None:
    table = twice_spoiled()
    deals, right = table.transcript().deals(Role.DATA_SOURCE), table.transcript().answers(Role.DATA_SOURCE)[SECOND][1]
    table.held()
    table.says(SECOND, Answer(deals, (replace(right, value=bytes(31) + b"\x05"),)))
    for messages in (table.messages, table.messages[::-1]):
        error = refused(Reason.BAD_DEALING, lambda messages=messages: Transcript(table.invitation, messages))
        assert f"that is {SECOND}: its share for 1 is not on the polynomial" in error.detail


def test_complaint_of_a_member_that_confirms_awaits_no_answer() -> None:
    """Its confirmation says that its values are good. A dealer that has finished has no seed to answer with."""
    table = Table().held()
    made = table.transcript().genesis()
    table.says(LAST, Complain(table.transcript().deals(Role.DATA_SOURCE), (1, 2)))
    for messages in (table.messages, table.messages[::-1]):
        transcript = Transcript(table.invitation, messages)
        assert transcript.awaited() == ()
        assert transcript.genesis() == made
    assert isinstance(table.due(FIRST), Answer)
    # Also while others have not confirmed: they wait for no answer.
    early = complained().round(without=[FIRST])
    early.says(LAST, Complain(early.transcript().deals(Role.DATA_SOURCE), (2,)))
    assert early.transcript().awaited() == (Awaited("confirm", (FIRST,)),)
    assert isinstance(early.due(FIRST), Confirm)
    assert early.says(FIRST, early.due(FIRST)).transcript().genesis() == made


def test_complainer_that_never_confirms_is_who_is_awaited_once_it_has_its_answer() -> None:
    table = complained(false=[LAST])
    assert table.transcript().awaited()[0] == Awaited("answer", (FIRST,))
    for _ in range(3):
        table.round(without=[LAST])
    assert table.transcript().awaited() == (Awaited("confirm", (LAST,)),)
    assert LAST in refused(Reason.CEREMONY_INCOMPLETE, table.transcript().genesis).detail


def test_complainer_that_has_confirmed_and_lost_its_answer_waits_for_it() -> None:
    table = twice_spoiled().held()
    kept = table.messages
    table.messages = without(Answer, table)
    assert table.transcript().awaited() == ()
    error = refused(Reason.CEREMONY_INCOMPLETE, lambda: table.members[FIRST].secret(table.transcript()))
    assert f"waiting for what {SECOND} answers to {FIRST}: " in error.detail
    assert isinstance(table.due(SECOND), Answer)
    table.messages = kept
    assert_signs(table)


def test_dealer_that_seals_too_few_values_is_named() -> None:
    table = Table().round().round()
    deal = table.due(LAST)
    assert isinstance(deal, Deal)
    table.says(LAST, replace(deal, sealed=deal.sealed[:2])).round(without=[LAST])
    error = refused(Reason.BAD_DEALING, table.transcript)
    assert f"that is {LAST}: it sealed 2 of 3 values" in error.detail


@pytest.mark.parametrize("dealers", [(2, 1), (1, 1), (4,)])
def test_complaint_of_repeated_disordered_or_unknown_dealers_is_refused(dealers: tuple[int, ...]) -> None:
    table = Table().round().round().round()
    complaint = Complain(table.transcript().deals(Role.DATA_SOURCE), dealers)
    refused(Reason.BAD_FIELD, lambda: table.says(LAST, complaint).transcript().awaited())


def test_confirmation_with_a_secret_of_ones_own_choosing_is_named() -> None:
    table = Table().round().round().round().round(without=[LAST])
    honest = table.due(LAST)
    assert isinstance(honest, Confirm)
    group = table.transcript().group(Role.DATA_SOURCE)
    ceremony = table.invitation.key_ceremony(Role.DATA_SOURCE)
    forged = dkg.possession_share(ceremony, dkg.KeyShare(3, bls.secret_from_seed(b"o" * 32), group))
    table.says(LAST, replace(honest, possession=forged))
    refused(Reason.BAD_DEALING, table.transcript().genesis)


# Other people's messages


def test_message_of_a_stranger_forged_or_of_another_ceremony_is_refused() -> None:
    table = Table().round()
    wider = replace(table.invitation, members=(*table.invitation.members, Invited("eve", Role.OPERATOR)))
    stranger = Participant(wider, "eve", seed("eve"))
    refused(Reason.UNKNOWN_MEMBER, lambda: Transcript(table.invitation, [stranger.join()]))
    other = Table(replace(table.invitation, nonce=b"o" * 32)).round()
    refused(Reason.WRONG_CHAIN, lambda: Transcript(table.invitation, other.messages))
    stolen = decode(table.messages[0], SignedMessage, 1 << 20)
    relabelled = encode(replace(stolen, sender=SECOND))
    refused(Reason.BAD_MEMBERSHIP, lambda: Transcript(table.invitation, [relabelled]))
    forged = encode(replace(stolen, signature=bytes(64)))
    refused(Reason.BAD_SIGNATURE, lambda: Transcript(table.invitation, [forged]))


def test_commitment_under_another_members_name_is_refused() -> None:
    table = Table().round()
    body = encode(table.due(FIRST))
    signature = table.members[FIRST].identity.sign(tagged_message(Tag.CEREMONY, body))
    forged = encode(SignedMessage(SECOND, body, signature))
    refused(Reason.BAD_SIGNATURE, lambda: Transcript(table.invitation, [*table.messages, forged]))


def test_member_that_takes_anothers_name_first_is_noticed_by_its_owner() -> None:
    table = Table().round(without=[LAST])
    impostor = Participant(table.invitation, LAST, seed("impostor"))
    transcript = Transcript(table.invitation, [*table.messages, impostor.join()])
    refused(Reason.WRONG_CHAIN, lambda: table.members[LAST].next_message(transcript))


def test_members_shown_different_joins_find_out_at_the_next_round() -> None:
    table = Table().round()
    other = Table()
    other.members[LAST] = Participant(other.invitation, LAST, seed("another last"))
    other.round()
    table.says(FIRST, other.due(FIRST))
    error = refused(Reason.WRONG_CHAIN, table.transcript)
    assert FIRST in error.detail


def test_key_taken_from_another_member_proves_no_possession() -> None:
    table = Table().round(without=[LAST])
    honest = table.due(LAST)
    assert isinstance(honest, Join)
    theirs = table.transcript().member(FIRST)
    for fields, reason in (
        ({"bls_key": theirs.bls_key}, Reason.BAD_PROOF_OF_POSSESSION),
        ({"bls_key": theirs.bls_key, "bls_possession": theirs.bls_possession}, Reason.BAD_PROOF_OF_POSSESSION),
        ({"role": Role.OPERATOR}, Reason.BAD_MEMBERSHIP),
        ({"name": FIRST}, Reason.BAD_MEMBERSHIP),
        ({"log_key": b""}, Reason.BAD_KEY),
    ):
        joined = Table().round(without=[LAST]).says(LAST, replace(honest, member=replace(honest.member, **fields)))
        refused(reason, joined.transcript)


SMALL_ORDER = [
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ec" + 30 * "ff" + "7f"),
    bytes.fromhex("ed" + 30 * "ff" + "7f"),
    bytes.fromhex("ee" + 30 * "ff" + "7f"),
]
"""X25519 points whose shared secret is zero whatever the other's secret (the list of cr.yp.to/ecdh.html)."""


@pytest.mark.parametrize("key", SMALL_ORDER, ids=bytes.hex)
def test_join_that_nothing_can_be_sealed_to_names_its_sender(key: bytes) -> None:
    table = Table().round(without=[LAST])
    table.says(LAST, replace(table.due(LAST), box_key=key))
    error = refused(Reason.BAD_KEY, table.transcript)
    assert LAST in error.detail


def test_messages_out_of_turn_are_refused() -> None:
    table = Table().round()
    commit = table.due(FIRST)
    missing_join = [message for message in table.messages if decode(message, SignedMessage, 1 << 20).sender != LAST]
    early = Table()
    early.messages = missing_join
    refused(Reason.CEREMONY_INCOMPLETE, early.says(FIRST, commit).transcript)
    roster = table.transcript().roster
    for name in ("governance-1", "verifier-1"):
        again = Table().round()
        refused(Reason.BAD_FIELD, again.says(name, Commit(roster, commit.commitment)).transcript)  # type: ignore[union-attr]


@pytest.mark.parametrize("position", range(0, 400, 37))
def test_changed_byte_of_a_message_is_refused(position: int) -> None:
    table = Table().round()
    changed = bytearray(table.messages[0])
    changed[position % len(changed)] ^= 0x21
    with pytest.raises(Rejected):
        Transcript(table.invitation, [bytes(changed), *table.messages[1:]])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"certificate_scheme": "rot13"}, Reason.BAD_MEMBERSHIP),
        ({"thresholds": tuple(RoleThreshold(role, 1) for role in VOTING_ROLES)}, Reason.BAD_MEMBERSHIP),
        ({"thresholds": tuple(RoleThreshold(Role.OPERATOR, 1) for _ in range(3))}, Reason.BAD_MEMBERSHIP),
        ({"members": (Invited("a", Role.OPERATOR),) * 3}, Reason.BAD_MEMBERSHIP),
        ({"members": tuple(Invited(name, Role.OPERATOR) for name in "abc")}, Reason.BAD_MEMBERSHIP),
        ({"name": "Upper"}, Reason.MALFORMED),
        ({"nonce": b""}, Reason.MALFORMED),
        ({"version": 2}, Reason.MALFORMED),
    ],
)
def test_invitation_that_leads_to_no_genesis_is_refused(changes: dict[str, object], reason: Reason) -> None:
    assert decode_invitation(encode(invitation_of())) == invitation_of()
    refused(reason, lambda: decode_invitation(encode(replace(invitation_of(), **changes))))


# Refresh


def founded(scheme: str = "bls-threshold") -> Table:
    return Table(invitation_of(DEALT, scheme)).held()


def refreshing(before: Table) -> Invitation:
    return replace(before.invitation, epoch=1, refreshes=before.transcript().genesis().membership)


def test_refresh_keeps_every_role_key_under_new_shares_and_may_follow_the_epoch() -> None:
    before = founded()
    genesis = before.transcript().genesis()
    invitation = decode_invitation(encode(refreshing(before)))
    table = Table(invitation, before).held()
    after = table.transcript().membership()
    refused(Reason.WRONG_EPOCH, table.transcript().genesis)
    check_change(after, committee(genesis))
    assert after.members == genesis.members
    assert [group.group_key for group in after.groups] == [group.group_key for group in genesis.groups]
    assert not set(after.groups[0].share_keys) & set(genesis.groups[0].share_keys)
    assert [group.share_keys for group in after.groups[1:]] == [group.share_keys for group in genesis.groups[1:]]
    scheme = scheme_for(genesis, after)
    message = certificate_message(genesis.chain_id, 1, View(1), Digest(bytes(32)))
    shares = {}
    for voter in scheme.committee.voters:
        secret = table.members[voter.name].secret(table.transcript())
        assert secret is not None
        scheme.check_secret(voter.id, secret)
        shares[voter.id] = scheme.share(secret, message)
    scheme.verify(message, scheme.combine(message, shares))


def test_old_share_makes_no_signature_together_with_new_ones() -> None:
    before = founded()
    table = Table(refreshing(before), before).held()
    key, message = table.transcript().group(Role.DATA_SOURCE).group_key, b"message"
    old, new = (
        {
            index: bls.sign(secret, message)
            for index, name in enumerate((FIRST, SECOND, LAST), start=1)
            if (secret := held.members[name].secret(held.transcript())) is not None
        }
        for held in (before, table)
    )
    bls.verify(key, message, combine_shares(2, 3, {1: new[1], 3: new[3]}))
    for mixed in ({1: old[1], 3: new[3]}, {2: new[2], 3: old[3]}):
        signature = combine_shares(2, 3, mixed)
        refused(Reason.BAD_SIGNATURE, lambda signature=signature: bls.verify(key, message, signature))
    # The limit of a refresh: as many old ones as make the key's signature still do.
    bls.verify(key, message, combine_shares(2, 3, {1: old[1], 3: old[3]}))


def test_dealer_that_deals_a_constant_into_a_refresh_is_named() -> None:
    """It would move the group key, or give itself a part of it."""
    before = founded()
    table = Table(refreshing(before), before).round()
    ceremony = table.invitation.key_ceremony(Role.DATA_SOURCE)
    new_key = replace(table.invitation, refreshes=None).key_ceremony(Role.DATA_SOURCE)
    reveal = replace(dkg.Dealer(new_key, 3, seed("any"))._reveal, ceremony=ceremony.id)
    commitment = dkg.Commitment(ceremony.id, 3, reveal.digest)
    table.round(without=[LAST]).says(LAST, Commit(table.transcript().roster, commitment)).round(without=[LAST])
    over = table.transcript().commitments(Role.DATA_SOURCE)
    table.says(LAST, Deal(over, reveal, (bytes(48), bytes(48), bytes(48))))
    error = refused(Reason.BAD_DEALING, table.transcript)
    assert f"that is {LAST}: polynomial with 2 coefficients, expected 1" in error.detail


def test_false_value_in_a_refresh_is_complained_of_and_mended() -> None:
    before = founded()
    table = Table(refreshing(before), before).round().round()
    table.says(LAST, spoiled(table.due(LAST), 1)).round(without=[LAST])
    assert isinstance(table.due(FIRST), Complain)
    table.held()
    assert table.transcript().membership().groups[0].group_key == before.transcript().genesis().groups[0].group_key


def test_refresh_takes_no_other_keys_than_members_have() -> None:
    before = founded()
    invitation = refreshing(before)
    kept, share = member_seeds(seed(FIRST)), before.members[FIRST].secret(before.transcript())
    other = before.members[SECOND].secret(before.transcript())
    for seeds, held in ((kept, None), (kept, other), (member_seeds(seed("other")), share)):
        refused(
            Reason.BAD_KEY,
            lambda seeds=seeds, held=held: Participant(invitation, FIRST, seed("again"), kept=seeds, share=held),
        )
    table = Table(invitation, before)
    joined = table.due(FIRST)
    assert isinstance(joined, Join)
    table.says(FIRST, replace(joined, member=replace(joined.member, log_key=bytes(31) + b"\x01")))
    error = refused(Reason.BAD_MEMBERSHIP, table.transcript)
    assert "a refresh changes no member" in error.detail


def test_invitation_to_refresh_what_cannot_be_is_refused() -> None:
    before = founded()
    good = refreshing(before)
    held = good.refreshes
    assert held is not None
    for bad, why in (
        (replace(good, epoch=2), "for the next epoch"),
        (replace(good, members=good.members[:-1]), "same members"),
        (replace(good, thresholds=(RoleThreshold(Role.DATA_SOURCE, 3), *good.thresholds[1:])), "same members"),
        (replace(good, refreshes=replace(held, groups=held.groups[::-1])), "role keys must be given"),
        (replace(good, certificate_scheme="ed25519"), "ed25519 has no role keys to refresh"),
    ):
        error = refused(Reason.BAD_MEMBERSHIP, lambda bad=bad: decode_invitation(encode(bad)))
        assert why in error.detail
    summed = Table(invitation_of(SMALL)).held()
    error = refused(Reason.BAD_MEMBERSHIP, lambda: decode_invitation(encode(refreshing(summed))))
    assert "no key has shares to refresh" in error.detail
