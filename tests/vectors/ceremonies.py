"""The golden vectors of ceremonies: transcripts that make a genesis, or refresh its keys, and messages that end one.

A refused case takes the first ``after`` messages of the first accepted transcript, and ``messages`` behind them.
"""

from dataclasses import fields
from functools import partial

from agreement import DOMAIN, Case, octets, refusal
from ceremony_fixtures import CeremonyTable
from msgspec.structs import replace
from nacl.bindings import crypto_box_seed_keypair

from consensus import bls
from consensus import key_generation as dkg
from consensus.ceremony import (
    Answer,
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
from consensus.codec import decode, encode
from consensus.identifiers import VOTING_ROLES, Role
from consensus.membership import (
    BLS_THRESHOLD,
    ED25519_LIST,
    Genesis,
    Parameters,
    RoleThreshold,
    check_genesis,
    committee,
)
from consensus.membership_change import check_change, membership_digest
from consensus.participant import Participant, member_seeds

COUNTS = {Role.DATA_SOURCE: (3, 2), Role.GOVERNANCE: (2, 2), Role.VERIFIER: (1, 0), Role.OPERATOR: (1, 1)}
"""Members and how many are needed: a dealt key, a summed one, one member's own."""
INVITATION = Invitation(
    version=1,
    name="vectors.example/log",
    nonce=octets("ceremony nonce"),
    created_ms=1_700_000_000_000,
    certificate_scheme=BLS_THRESHOLD,
    members=tuple(
        Invited(f"{role.value}-{number}", role) for role, (count, _) in COUNTS.items() for number in range(1, count + 1)
    ),
    thresholds=tuple(RoleThreshold(role, COUNTS[role][1]) for role in VOTING_ROLES),
    parameters=Parameters(),
    epoch=0,
    refreshes=None,
)
FIRST, SECOND, LAST = "data-source-1", "data-source-2", "data-source-3"


class Table(CeremonyTable):
    """Participants with the seeds of these vectors. To a refresh they bring what the one ``before`` left them."""

    def __init__(self, invitation: Invitation = INVITATION, before: "Table | None" = None) -> None:
        super().__init__(invitation, {})
        for invited in invitation.members:
            seed = octets("ceremony", invited.name)
            if before is None:
                member = Participant(invitation, invited.name, seed)
            else:
                share = before.members[invited.name].secret(before.transcript())
                kept = member_seeds(seed)
                member = Participant(invitation, invited.name, octets("refresh", invited.name), kept=kept, share=share)
            self.members[invited.name] = member

    def rounds(self, count: int) -> "Table":
        """So many of them, in which everybody says what is due."""
        for _ in range(count):
            self.round()
        return self


def ceremony() -> list[Case]:
    """A founding and a refresh of its keys: held honestly, with a complaint, and ended by who breaks their rules."""
    honest = Table().rounds(5)
    founded = honest.transcript().genesis()
    refresh = replace(INVITATION, epoch=1, refreshes=founded.membership)
    refreshed = Table(decode_invitation(encode(refresh)), honest).rounds(5)
    return [
        {
            **_told(honest),
            "refused": _refused(honest),
            "accepted": [
                _accepted("all keep the rules", honest),
                _accepted("a value that does not open", _complained(Table())),
                *_complained_falsely(honest),
            ],
        },
        {
            **_told(refreshed),
            "chain_id": founded.chain_id.hex(),
            "old_shares": _secrets(honest, FIRST, SECOND, LAST),
            "refused_invitations": _refused_invitations(refresh),
            "refused": _refused_to_refresh(refreshed, honest),
            "accepted": [
                _accepted("all keep the rules", refreshed, founded),
                _accepted("a value that does not open", _complained(Table(refresh, honest)), founded),
            ],
        },
    ]


def _told(honest: Table) -> Case:
    return {
        "invitation": encode(honest.invitation).hex(),
        "domain": DOMAIN,
        "box_secrets": {name: member._box_secret.hex() for name, member in honest.members.items()},
    }


def _complained(table: Table) -> Table:
    """A dealer's value for the first member does not open: it complains, and is answered."""
    table.rounds(2)
    return table.says(SECOND, _spoiled(table.due(SECOND))).round(without=[SECOND]).rounds(3)


def _secrets(table: Table, *names: str) -> list[str]:
    """Shares of a role's key."""
    transcript = table.transcript()
    secrets = [table.members[name].secret(transcript) for name in names]
    return [secret.to_bytes().hex() for secret in secrets if secret is not None]


def _complained_falsely(honest: Table) -> list[Case]:
    """Complaints of a dealer that kept the rules: it answers each, and nothing is lost."""
    deals = honest.transcript().deals(Role.DATA_SOURCE)
    late = Table()
    late.messages = [*honest.messages, honest.signed(LAST, Complain(deals, (2,)))]
    twice = Table().rounds(3)
    for name in (LAST, FIRST):
        twice.says(name, Complain(deals, (2,)))
        twice.says(SECOND, twice.due(SECOND))
    twice.rounds(1)
    unasked = Table()
    unasked.messages = [message for message in twice.messages if b"ceremony-complain" not in message]
    return [
        _accepted("a complaint by who confirmed, which awaits no answer", late),
        _accepted("a second complaint, and a second answer", twice),
        _accepted("answers to complaints that were shown to the dealer alone", unasked),
    ]


def _spoiled(deal: Body) -> Deal:
    """The value for the first member does not open."""
    assert isinstance(deal, Deal)
    return replace(deal, sealed=(bytes(48), *deal.sealed[1:]))


def _accepted(what: str, table: Table, founded: Genesis | None = None) -> Case:
    """A transcript and what it makes; ``founded`` is the genesis of the log whose keys it refreshes."""
    transcript, invitation = table.transcript(), table.invitation
    made = transcript.membership()
    roles: list[Case] = []
    for held in made.groups:
        role, names = held.role, invitation.role_members(held.role)
        case: Case = {"role": role.value, "key_ceremony_id": invitation.key_ceremony(role).id.hex()}
        if transcript.is_dealt(role):
            case |= {
                "commitments": transcript.commitments(role).hex(),
                "deals": transcript.deals(role).hex(),
                "nonces": [
                    [table.members[dealer]._box_nonce(transcript, dealer, name).hex() for name in names]
                    for dealer in names
                ],
                "shares": _secrets(table, *names),
            }
        case |= {
            "group_key": held.group_key.hex(),
            "share_keys": [key.hex() for key in held.share_keys],
            "possession": held.possession.hex(),
        }
        roles.append(case)
    told: Case = {
        "what": what,
        "messages": [message.hex() for message in table.messages],
        "invitation_digest": invitation.digest.hex(),
        "roster": transcript.roster.hex(),
        "roles": roles,
    }
    if founded is not None:
        check_change(made, committee(founded))
        return told | {"membership": encode(made).hex(), "digest": membership_digest(founded.chain_id, made).hex()}
    genesis = transcript.genesis()
    check_genesis(genesis)
    return told | {"genesis": encode(genesis).hex(), "chain_id": genesis.chain_id.hex()}


def _refused(honest: Table) -> list[Case]:
    cases: list[Case] = []

    def refused(what: str, after: int, *messages: bytes) -> None:
        said = [*honest.messages[:after], *messages]
        judged = partial(lambda said: Transcript(INVITATION, said).genesis(), said)
        cases.append(refusal(what, judged, after=after, messages=[message.hex() for message in messages]))

    everyone = len(INVITATION.members)
    whole = len(honest.messages)
    joined, committed, dealt = Table().rounds(1), Table().rounds(2), Table().rounds(3)
    assert honest.messages[: len(dealt.messages)] == dealt.messages
    rogue = dkg.Dealer(INVITATION.key_ceremony(Role.DATA_SOURCE), 3, octets("rogue"))

    commit, deal = joined.due(LAST), committed.due(LAST)
    assert isinstance(commit, Commit)
    assert isinstance(deal, Deal)
    other = joined.signed(LAST, replace(commit, commitment=rogue.commitment()))
    refused("two commitments of one member", whole, other)
    another, _ = crypto_box_seed_keypair(octets("another box key"))
    refused("another join by one member", whole, joined.signed(FIRST, replace(_join(joined, FIRST), box_key=another)))

    wider = replace(INVITATION, members=(*INVITATION.members, Invited("stranger", Role.OPERATOR)))
    refused(
        "a join with an X25519 key of small order",
        everyone - 1,
        joined.signed("operator-1", replace(_join(joined, "operator-1"), box_key=bytes(32))),
    )
    refused("a message of who was not invited", 0, Participant(wider, "stranger", octets("stranger")).join())
    elsewhere = Table(replace(INVITATION, nonce=octets("another nonce")))
    refused("the join of another ceremony", everyone - 1, elsewhere.members["operator-1"].join())
    own, foreign = _join(joined, "operator-1"), _join(joined, FIRST).member.bls_possession
    for what, changes in (
        ("a join in another role", {"role": Role.GOVERNANCE}),
        (
            "a join with the proof of possession of another",
            {"bls_possession": foreign},
        ),
    ):
        body = replace(own, member=replace(own.member, **changes))
        refused(what, everyone - 1, joined.signed("operator-1", body))

    signed = decode(joined.signed(LAST, commit), SignedMessage, 1 << 20)
    refused("a commitment that another signed", everyone, encode(replace(signed, sender=SECOND)))
    refused("a trailing byte", everyone, encode(signed) + b"\x00")
    refused("a commitment over another roster", everyone, joined.signed(LAST, replace(commit, roster=octets("roster"))))
    refused("a commitment where the key is summed", whole, joined.signed("governance-1", commit))
    refused("a deal before all commitments", everyone, joined.signed(FIRST, committed.due(FIRST)))

    early = len(committed.messages)
    revealed = Table()
    revealed.messages = list(committed.messages)
    for name in (FIRST, SECOND):
        revealed.says(name, committed.due(name))
    before = len(revealed.messages)
    assert honest.messages[early:before] == revealed.messages[early:]
    commitments = {
        index: held.commitment
        for index, held in enumerate(committed.transcript().said(Commit, Role.DATA_SOURCE).values(), start=1)
    }
    rogue_reveal = rogue.reveal({**commitments, 3: rogue.commitment()})
    refused("a reveal that was not committed to", before, revealed.signed(LAST, replace(deal, reveal=rogue_reveal)))
    short = replace(deal, sealed=deal.sealed[:-1])
    refused("a value for each member but one", before, revealed.signed(LAST, short))
    elsewhere_dealt = replace(deal, commitments=octets("commitments"))
    refused("a deal over other commitments", before, revealed.signed(LAST, elsewhere_dealt))
    refused("no knowledge of the constant term", everyone, *_without_knowledge(joined, deal))

    complained = Table()
    complained.messages = list(dealt.messages)
    transcript = dealt.transcript()
    deals = transcript.deals(Role.DATA_SOURCE)
    at = len(dealt.messages)
    refused("a complaint of a dealer twice", at, dealt.signed(LAST, Complain(deals, (1, 1))))
    complaint = dealt.signed(LAST, Complain(deals, (2,)))
    complained.messages.append(complaint)
    answer = complained.due(SECOND)
    assert isinstance(answer, Answer)
    wrong = replace(answer.shares[0], value=bytes(31) + b"\x05")
    bad_answer = dealt.signed(SECOND, replace(answer, shares=(wrong,)))
    refused("an answer that is not on the polynomial", at, complaint, bad_answer)
    refused("a right answer and a wrong one", at, complaint, dealt.signed(SECOND, answer), bad_answer)
    refused("a complaint that is not answered", whole - 1, complaint)

    confirm = dealt.due(LAST)
    assert isinstance(confirm, Confirm)
    group = transcript.group(Role.DATA_SOURCE)
    share = dkg.KeyShare(3, bls.secret_from_seed(octets("own choosing")), group)
    forged = dkg.possession_share(INVITATION.key_ceremony(Role.DATA_SOURCE), share)
    last = whole - 1
    assert honest.messages[last] == dealt.signed(LAST, confirm)
    refused("a confirmation with another secret", last, dealt.signed(LAST, replace(confirm, possession=forged)))
    refused("a confirmation of other deals", last, dealt.signed(LAST, replace(confirm, over=octets("deals"))))
    refused("a confirmation by a verifier", whole, dealt.signed("verifier-1", confirm))
    refused("a confirmation missing", last)
    return cases


def _refused_invitations(refresh: Invitation) -> list[Case]:
    """To refresh what cannot be."""
    before = refresh.refreshes
    assert before is not None
    dealt, summed, own = before.groups
    every = (RoleThreshold(Role.DATA_SOURCE, 3), *refresh.thresholds[1:])
    foreign = replace(dealt, share_keys=(*dealt.share_keys[:-1], summed.group_key))
    unproved = replace(dealt, possession=summed.possession)
    other = replace(summed, share_keys=summed.share_keys[::-1])
    bad = {
        "an epoch that is not the next": {"epoch": 2},
        "another name": {"members": (*refresh.members[:-1], Invited("stranger", Role.OPERATOR))},
        "another quorum than before": {"refreshes": replace(before, thresholds=every)},
        "no key that is dealt": {"thresholds": every, "refreshes": replace(before, thresholds=every)},
        "keys under a scheme without any": {"certificate_scheme": ED25519_LIST},
        "role keys in another order": {"refreshes": replace(before, groups=(summed, dealt, own))},
        "a share key off the polynomial": {"refreshes": replace(before, groups=(foreign, summed, own))},
        "the proof of possession of another role": {"refreshes": replace(before, groups=(unproved, summed, own))},
        "summed keys in another order": {"refreshes": replace(before, groups=(dealt, other, own))},
    }
    cases = []
    for what, changes in bad.items():
        encoded = encode(replace(refresh, **changes))
        cases.append(refusal(what, partial(decode_invitation, encoded), invitation=encoded.hex()))
    return cases


def _refused_to_refresh(honest: Table, founded: Table) -> list[Case]:
    cases: list[Case] = []
    invitation = honest.invitation

    def refused(what: str, after: int, *messages: bytes) -> None:
        said = [*honest.messages[:after], *messages]
        judged = partial(lambda said: Transcript(invitation, said).membership(), said)
        cases.append(refusal(what, judged, after=after, messages=[message.hex() for message in messages]))

    def begun(rounds: int) -> Table:
        return Table(invitation, founded).rounds(rounds)

    everyone = len(invitation.members)
    joined, committed = begun(1), begun(2)
    assert honest.messages[: len(committed.messages)] == committed.messages
    own = _join(joined, "operator-1")
    another = replace(own, member=replace(own.member, log_key=octets("another log key")))
    refused("a join with another log key", everyone - 1, joined.signed("operator-1", another))
    refused("the join to the founding", everyone - 1, founded.members["operator-1"].join())

    rules = invitation.key_ceremony(Role.DATA_SOURCE)
    reveal = dkg.Dealer(
        _WithConstant(*(getattr(rules, held.name) for held in fields(rules))), 3, octets("rogue")
    )._reveal
    moved = begun(1).round(without=[LAST])
    moved.says(LAST, Commit(moved.transcript().roster, dkg.Commitment(rules.id, 3, reveal.digest)))
    moved.round(without=[LAST])
    moved.says(LAST, Deal(moved.transcript().commitments(Role.DATA_SOURCE), reveal, (bytes(48),) * 3))
    refused("a polynomial with a constant term", everyone, *moved.messages[everyone:])

    complained = begun(3)
    at = len(complained.messages)
    complained.says(LAST, Complain(complained.transcript().deals(Role.DATA_SOURCE), (2,)))
    answer = complained.due(SECOND)
    assert isinstance(answer, Answer)
    complained.says(SECOND, replace(answer, shares=(replace(answer.shares[0], value=bytes(31) + b"\x05"),)))
    refused("an answer that is not on the polynomial", at, *complained.messages[at:])
    refused("a confirmation missing", len(honest.messages) - 1)
    return cases


class _WithConstant(dkg.Ceremony):
    """A refresh by who deals a constant term, too, which would move the key."""

    lowest_degree = 0


def _join(table: Table, name: str) -> Join:
    return table.transcript().said(Join)[name]


def _without_knowledge(joined: Table, deal: Deal) -> list[bytes]:
    """The last dealer commits to a reveal whose proof of knowledge fails, and all others keep the rules."""
    unknown = replace(deal.reveal, response=bytes(31) + b"\x01")
    table = Table()
    table.messages = list(joined.messages)
    table.round(without=[LAST])
    commitment = dkg.Commitment(unknown.ceremony, unknown.dealer, unknown.digest)
    table.says(LAST, Commit(table.transcript().roster, commitment)).round(without=[LAST])
    over = table.transcript().commitments(Role.DATA_SOURCE)
    table.says(LAST, Deal(over, unknown, deal.sealed))
    return table.messages[len(joined.messages) :]
