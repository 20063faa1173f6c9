"""The golden vectors of the founding ceremony: transcripts that make a genesis, and messages that end one.

A refused case takes the first ``after`` messages of the first accepted transcript, and ``messages`` behind them.
"""

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
)
from consensus.codec import decode, encode
from consensus.identifiers import VOTING_ROLES, Role
from consensus.membership import BLS_THRESHOLD, Parameters, RoleThreshold, check_genesis
from consensus.participant import Participant

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
    """Participants with the seeds of these vectors."""

    def __init__(self, invitation: Invitation = INVITATION) -> None:
        names = [invited.name for invited in invitation.members]
        super().__init__(invitation, {name: Participant(invitation, name, octets("ceremony", name)) for name in names})

    def rounds(self, count: int) -> "Table":
        """So many of them, in which everybody says what is due."""
        for _ in range(count):
            self.round()
        return self


def ceremony() -> list[Case]:
    """One founding: held honestly, with a complaint, and ended by who breaks its rules."""
    honest = Table().rounds(5)
    complained = Table().rounds(2)
    complained.says(SECOND, _spoiled(complained.due(SECOND))).round(without=[SECOND]).rounds(3)
    secrets = {name: member._box_secret.hex() for name, member in honest.members.items()}
    return [
        {
            "invitation": encode(INVITATION).hex(),
            "domain": DOMAIN,
            "box_secrets": secrets,
            "refused": _refused(honest),
            "accepted": [
                _accepted("all keep the rules", honest),
                _accepted("a value that does not open", complained),
                *_complained_falsely(honest),
            ],
        }
    ]


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


def _accepted(what: str, table: Table) -> Case:
    transcript = table.transcript()
    genesis = transcript.genesis()
    check_genesis(genesis)
    roles: list[Case] = []
    for held in genesis.groups:
        role, names = held.role, INVITATION.role_members(held.role)
        case: Case = {"role": role.value, "key_ceremony_id": INVITATION.key_ceremony(role).id.hex()}
        if transcript.is_dealt(role):
            secrets = [table.members[name].secret(transcript) for name in names]
            case |= {
                "commitments": transcript.commitments(role).hex(),
                "deals": transcript.deals(role).hex(),
                "nonces": [
                    [table.members[dealer]._box_nonce(transcript, dealer, name).hex() for name in names]
                    for dealer in names
                ],
                "shares": [secret.to_bytes().hex() for secret in secrets if secret is not None],
            }
        case |= {
            "group_key": held.group_key.hex(),
            "share_keys": [key.hex() for key in held.share_keys],
            "possession": held.possession.hex(),
        }
        roles.append(case)
    return {
        "what": what,
        "messages": [message.hex() for message in table.messages],
        "invitation_digest": INVITATION.digest.hex(),
        "roster": transcript.roster.hex(),
        "roles": roles,
        "genesis": encode(genesis).hex(),
        "chain_id": genesis.chain_id.hex(),
    }


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
