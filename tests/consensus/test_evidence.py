"""Evidence convicts by identity signatures and rules alone: no forged, honest or altered pair does."""

import dataclasses
from collections.abc import Callable

import pytest
from epoch_fixtures import begin_epoch
from ledger_fixtures import GOVERNANCE, HOSPITAL, LIBRARIAN, OPERATOR, MemoryLedger, digest
from msgspec.structs import replace

from consensus import portions as p
from consensus.block import Body, Header
from consensus.bundle import open_bundle
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent, Kind, check_unsigned, make_entry, sign_entry
from consensus.evidence import EvidenceReport, Offence, check_evidence
from consensus.identifiers import ZERO_DIGEST, Digest, MemberId, View
from consensus.keys import Signer
from consensus.membership import ED25519_LIST, Committee, committee
from consensus.predicates import Answer, Predicate, verify
from consensus.rejection import Reason, Rejected
from consensus.state import EVIDENCE_TABLE, EvidenceRecord, read_record
from consensus.transition import is_final
from consensus.vote import (
    ProposalEvidence,
    SignedHeader,
    Vote,
    VoteEvidence,
    VoteKind,
    sign_proposal,
    sign_vote,
)
from node.bundles import export_bundle

COUNTS = {"data-source": 2, "governance": 1, "operator": 1, "verifier": 1}
LEDGER = MemoryLedger(COUNTS)
COMMITTEE = LEDGER.committee
A, B = digest("a"), digest("b")


def vote(
    kind: VoteKind, block: bytes, view: int = 3, share: bytes = b"", voter: str = OPERATOR, signer: str = ""
) -> Vote:
    sign = LEDGER.secrets[signer or voter].identity.sign
    return sign_vote(COMMITTEE, LEDGER.ids[voter], kind, View(view), Digest(block), share=share, sign=sign)


def signed_header(leaf: bytes = A, view: int = 1, signer: str = "", **changes: object) -> SignedHeader:
    leader = COMMITTEE.leader(View(view))
    body = Body(leaf_hashes=(leaf,))
    header = Header(
        version=1, chain_id=COMMITTEE.chain_id, epoch=0, height=1, view=view, leader=leader.id, parent=bytes(32),
        parent_view=0, timestamp_ms=1, body_root=body.root, event_count=1, log_size=1, log_root=leaf, state_root=leaf,
    )  # fmt: skip
    name = signer or leader.name
    return sign_proposal(replace(header, **changes), body, LEDGER.secrets[name].identity.sign).signed_header


def assert_refused(reason: Reason, call: Callable[[], object]) -> Rejected:
    with pytest.raises(Rejected) as caught:
        call()
    assert caught.value.reason == reason
    return caught.value


def convincing(ledger: MemoryLedger, event: CheckedEvent) -> str:
    """What the bundle of an evidence event tells a verifier who trusts the genesis alone, and is convinced."""
    opened = open_bundle(anchor(ledger.genesis, ledger.chain_id), export_bundle(ledger, "evidence", event=event.id))
    verdict = verify(opened, Predicate.EVIDENCE)
    assert verdict.answer is Answer.YES
    return " ".join(step.text for step in verdict.steps)


NOTARIZE, NULLIFY, FINALIZE = VoteKind


@pytest.mark.parametrize(
    ("proof", "offence", "view"),
    [
        (VoteEvidence(vote(NOTARIZE, A), vote(NOTARIZE, B)), Offence.TWO_NOTARIZE_VOTES, 3),
        (VoteEvidence(vote(FINALIZE, A), vote(FINALIZE, B)), Offence.TWO_FINALIZE_VOTES, 3),
        (VoteEvidence(vote(FINALIZE, A), vote(NULLIFY, ZERO_DIGEST)), Offence.NULLIFY_AND_FINALIZE, 3),
        (VoteEvidence(vote(NULLIFY, ZERO_DIGEST), vote(FINALIZE, A)), Offence.NULLIFY_AND_FINALIZE, 3),
        (ProposalEvidence(signed_header(A), signed_header(B)), Offence.TWO_PROPOSALS, 1),
    ],
)
def test_each_offence_convicts_its_author_and_has_one_encoding(
    proof: VoteEvidence | ProposalEvidence, offence: Offence, view: int
) -> None:
    report = EvidenceReport(proof)
    found = check_evidence(report, COMMITTEE)
    culprit = COMMITTEE.leader(View(1)).id if offence is Offence.TWO_PROPOSALS else LEDGER.ids[OPERATOR]
    assert (found.member, found.offence, found.epoch, found.view) == (culprit, offence, 0, view)
    assert decode(encode(report), EvidenceReport, 65_536) == report


@pytest.mark.parametrize(
    "proof",
    [
        VoteEvidence(vote(NOTARIZE, A), vote(NOTARIZE, A)),
        VoteEvidence(vote(NOTARIZE, A), vote(NULLIFY, ZERO_DIGEST)),
        VoteEvidence(vote(NOTARIZE, A), vote(FINALIZE, B)),
        VoteEvidence(vote(NOTARIZE, A), vote(NOTARIZE, B, view=4)),
        VoteEvidence(vote(NOTARIZE, A), vote(NOTARIZE, B, voter=HOSPITAL)),
        ProposalEvidence(signed_header(A), signed_header(A)),
        ProposalEvidence(signed_header(A), signed_header(B, view=2)),
    ],
)
def test_pair_that_an_honest_member_may_sign_convicts_nobody(proof: VoteEvidence | ProposalEvidence) -> None:
    assert_refused(Reason.NO_CONFLICT, lambda: check_evidence(EvidenceReport(proof), COMMITTEE))


def test_votes_that_differ_in_their_bls_share_alone_convict_nobody() -> None:
    proof = VoteEvidence(vote(FINALIZE, A, share=bytes(96)), vote(FINALIZE, A, share=b"\x01" * 96))
    assert_refused(Reason.NO_CONFLICT, lambda: check_evidence(EvidenceReport(proof), COMMITTEE))


@pytest.mark.parametrize("side", [0, 1])
def test_message_the_accused_did_not_sign_convicts_nobody(side: int) -> None:
    votes = [vote(NOTARIZE, A), vote(NOTARIZE, B)]
    votes[side] = vote(NOTARIZE, (A, B)[side], signer=GOVERNANCE)
    assert_refused(Reason.BAD_SIGNATURE, lambda: check_evidence(EvidenceReport(VoteEvidence(*votes)), COMMITTEE))
    headers = [signed_header(A), signed_header(B)]
    headers[side] = signed_header((A, B)[side], signer=GOVERNANCE)
    assert_refused(Reason.BAD_SIGNATURE, lambda: check_evidence(EvidenceReport(ProposalEvidence(*headers)), COMMITTEE))


def test_share_swapped_under_a_vote_convicts_nobody() -> None:
    first, second = vote(FINALIZE, A, share=bytes(96)), vote(FINALIZE, B, share=bytes(96))
    forged = EvidenceReport(VoteEvidence(first, replace(second, share=b"\x07" * 96)))
    assert_refused(Reason.BAD_SIGNATURE, lambda: check_evidence(forged, COMMITTEE))


def test_messages_of_another_chain_epoch_or_of_no_voter_convict_nobody() -> None:
    pair = vote(NOTARIZE, A), vote(NOTARIZE, B)
    for reason, changes in (
        (Reason.WRONG_CHAIN, {"chain_id": digest("other chain")}),
        (Reason.WRONG_EPOCH, {"epoch": 1}),
        (Reason.WRONG_ROLE, {"voter": LEDGER.ids["verifier-1"]}),
        (Reason.UNKNOWN_MEMBER, {"voter": digest("nobody")}),
    ):
        moved = VoteEvidence(*(replace(one, **changes) for one in pair))
        assert_refused(reason, lambda moved=moved: check_evidence(EvidenceReport(moved), COMMITTEE))


def test_two_headers_by_a_member_who_does_not_lead_that_view_convict_nobody() -> None:
    other = COMMITTEE.leader(View(2))
    pair = (signed_header(leaf, signer=other.name, leader=other.id) for leaf in (A, B))
    assert_refused(Reason.WRONG_AUTHOR, lambda: check_evidence(EvidenceReport(ProposalEvidence(*pair)), COMMITTEE))


# On the log


def test_event_whose_report_does_not_convict_is_refused_before_it_is_pooled() -> None:
    ledger = MemoryLedger(COUNTS)
    honest = VoteEvidence(vote(NOTARIZE, A), vote(NULLIFY, ZERO_DIGEST))
    assert_refused(Reason.NO_CONFLICT, lambda: ledger.evidence(HOSPITAL, EvidenceReport(honest)))
    stolen = VoteEvidence(vote(NOTARIZE, A), vote(NOTARIZE, B, signer=HOSPITAL))
    assert_refused(Reason.BAD_SIGNATURE, lambda: ledger.evidence(HOSPITAL, EvidenceReport(stolen)))


def test_verifier_hands_in_no_evidence_and_any_voter_may() -> None:
    ledger = MemoryLedger(COUNTS)
    report = ledger.contradiction(OPERATOR)
    assert_refused(Reason.WRONG_ROLE, lambda: ledger.evidence("verifier-1", report))
    for author in (LIBRARIAN, GOVERNANCE, OPERATOR):
        assert ledger.evidence(author, report).entry.kind is Kind.EVIDENCE


def test_second_proof_of_one_offence_is_a_duplicate_whoever_brings_it_and_in_whatever_view() -> None:
    ledger = MemoryLedger(COUNTS)
    first = ledger.evidence(HOSPITAL, ledger.contradiction(OPERATOR, view=1))
    ledger.seal(first)
    for author, view in ((LIBRARIAN, 1), (HOSPITAL, 2), (OPERATOR, 900)):
        again = ledger.evidence(author, ledger.contradiction(OPERATOR, view=view))
        error = assert_refused(Reason.DUPLICATE, lambda again=again: ledger.seal(again))
        assert is_final(error)
    ledger.seal(ledger.evidence(HOSPITAL, ledger.contradiction(GOVERNANCE)))
    found = check_evidence(ledger.contradiction(OPERATOR), ledger.committee)
    value = ledger.state.get(EVIDENCE_TABLE + found.digest)
    assert value is not None
    record = read_record(value, EvidenceRecord)
    assert (record.event, record.member, record.view) == (first.id, ledger.ids[OPERATOR], 1)
    assert len(list(ledger.state.items_with_prefix(EVIDENCE_TABLE))) == 2


# After its epoch

EPOCHS = {**COUNTS, "data-source": 3}


def test_contradiction_of_an_ended_epoch_convicts_a_member_that_is_none_any_more() -> None:
    ledger = MemoryLedger(EPOCHS, certificate_scheme=ED25519_LIST)
    report, proposals = ledger.contradiction(HOSPITAL), ledger.contradiction(HOSPITAL, view=2)
    begin_epoch(ledger, remove=[HOSPITAL], add={"archive": "data-source"})
    begin_epoch(ledger, rotate=[LIBRARIAN])
    event = ledger.evidence("archive", report)
    ledger.seal(event)
    found = check_evidence(report, ledger.committee)
    assert (found.member, found.epoch) == (ledger.ids[HOSPITAL], 0)
    assert_refused(Reason.DUPLICATE, lambda: ledger.seal(ledger.evidence(OPERATOR, proposals)))
    told = convincing(ledger, event)
    assert f"{HOSPITAL} (data-source) signed, of view 1 in epoch 0" in told
    assert "handed in by archive" in told
    assert "keys of an ended epoch still sign" in told


def test_epoch_is_judged_by_its_own_members_and_none_that_has_not_begun_at_all() -> None:
    ledger = MemoryLedger(EPOCHS, certificate_scheme=ED25519_LIST)
    first, old_key = ledger.committee, ledger.secrets[LIBRARIAN].identity
    begin_epoch(ledger, rotate=[LIBRARIAN])
    second, new_key = ledger.committee, ledger.secrets[LIBRARIAN].identity
    old, new = (next(one.id for one in held.members if one.name == LIBRARIAN) for held in (first, second))

    def pair(members: Committee, voter: MemberId, key: Signer) -> EvidenceReport:
        first, second = (
            sign_vote(members, voter, NOTARIZE, View(1), block, share=b"", sign=key.sign) for block in (A, B)
        )
        return EvidenceReport(VoteEvidence(first, second))

    assert check_evidence(pair(first, old, old_key), second).member == old
    assert check_evidence(pair(second, new, new_key), second).member == new
    for members, voter, key in ((first, new, new_key), (second, old, old_key)):
        forged = pair(members, voter, key)
        assert_refused(Reason.UNKNOWN_MEMBER, lambda forged=forged: check_evidence(forged, second))
    assert_refused(Reason.WRONG_EPOCH, lambda: check_evidence(pair(second, new, new_key), first))
    alone = committee(ledger.genesis, begin_epoch(ledger))
    assert_refused(Reason.WRONG_EPOCH, lambda: check_evidence(pair(first, old, old_key), alone))


# Offline


def convicted_ledger() -> tuple[MemoryLedger, CheckedEvent]:
    ledger = MemoryLedger(COUNTS)
    event = ledger.evidence(HOSPITAL, ledger.contradiction(OPERATOR))
    ledger.seal(ledger.source(LIBRARIAN, "books"), event)
    return ledger, event


def test_bundle_convinces_a_verifier_who_trusts_the_genesis_alone() -> None:
    ledger, event = convicted_ledger()
    told = convincing(ledger, event)
    assert f"{OPERATOR} (operator) signed, of view 1 in epoch 0: a vote to notarize" in told
    assert "handed in by data-source-2" in told


def test_bundle_without_the_messages_is_no_yes_and_one_about_another_event_is_refused() -> None:
    ledger, event = convicted_ledger()
    trusted = anchor(ledger.genesis, ledger.chain_id)
    whole = open_bundle(trusted, export_bundle(ledger, "evidence", event=event.id))
    hidden = tuple(dataclasses.replace(held, governance=None) for held in whole.events)
    bare = dataclasses.replace(whole, events=hidden, by_id={held.id: held for held in hidden})
    assert verify(bare, Predicate.EVIDENCE).answer is Answer.UNKNOWN
    source = ledger.events[0]
    assert source.entry.kind is Kind.SOURCE
    assert_refused(Reason.BAD_FIELD, lambda: export_bundle(ledger, "evidence", event=source.id))
    assert_refused(Reason.NOT_FOUND, lambda: export_bundle(ledger, "evidence", event=digest("nothing")))


def test_log_whose_quorum_colludes_to_convict_an_honest_member_convinces_no_verifier() -> None:
    ledger = MemoryLedger(COUNTS)
    framed = EvidenceReport(VoteEvidence(vote(NOTARIZE, A), vote(NOTARIZE, B, signer=HOSPITAL)))
    portions = p.Portions(None, ledger.salted(framed), None)
    author = ledger.committee.member(ledger.ids[HOSPITAL])
    entry = make_entry(ledger.chain_id, Kind.EVIDENCE, author.id, portions)
    signed = sign_entry(entry, author.id, author.role.value, ledger.secrets[HOSPITAL].identity)
    event = check_unsigned(encode(signed), encode(portions), ledger.committee)
    ledger.collude([event], {})
    bundle = open_bundle(anchor(ledger.genesis, ledger.chain_id), export_bundle(ledger, "evidence", event=event.id))
    assert_refused(Reason.BAD_SIGNATURE, lambda: verify(bundle, Predicate.EVIDENCE))
