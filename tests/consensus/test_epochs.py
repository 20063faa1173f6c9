"""Members change without a fork: what may follow an epoch, what may not, and who follows from the genesis alone."""

import msgspec
import pytest
from consensus_fixtures import make_genesis
from epoch_fixtures import begin_epoch, change_event, next_membership
from ledger_fixtures import HOSPITAL, LIBRARIAN, OPERATOR, MemoryLedger, Story, begin

from consensus import merkle
from consensus.bundle import MAGIC, Bundle, open_bundle
from consensus.certificate import decode_certificate
from consensus.codec import decode, encode
from consensus.effect import CastVote
from consensus.engine import Engine, Timing
from consensus.epochs import Anchor, EpochLink, Pin, anchor, verify_header
from consensus.event import CheckedEvent
from consensus.identifiers import VOTING_ROLES, Digest, View
from consensus.membership import (
    BLS_MULTISIG,
    BLS_THRESHOLD,
    ED25519_LIST,
    ML_DSA_65_LIST,
    Membership,
    committee,
)
from consensus.membership_change import membership_digest
from consensus.predicates import Answer, Predicate, verify
from consensus.receipt import Receipt, StateReceipt, verify_receipt, verify_state_receipt
from consensus.rejection import Reason, Rejected
from consensus.state import EPOCH_HEAD_KEY, RETIRED_TABLE, SOURCE_TABLE, EpochHead, RetiredMember, read_record
from consensus.transition import Built, LedgerState, apply, build
from consensus.vote import VoteKind, check_vote, sign_vote
from node.bundles import export_bundle

COUNTS = {"data-source": 2, "governance": 3, "operator": 1}
SCHEMES = (BLS_THRESHOLD, BLS_MULTISIG, ED25519_LIST, ML_DSA_65_LIST)


def refused(reason: Reason) -> pytest.RaisesExc[Rejected]:
    return pytest.RaisesExc(Rejected, check=lambda error: error.reason == reason)


def receipt_at(ledger: MemoryLedger, index: int, header: bytes, certificate: bytes, links: object) -> bytes:
    """The receipt of the event at ``index`` under a certified header."""
    size = len(ledger.events)
    proof = merkle.inclusion_proof(index, size, ledger.node)
    return encode(Receipt(1, ledger.entry(index), index, proof, header, certificate, tuple(links)))  # type: ignore[arg-type]


def newest_receipt(ledger: MemoryLedger, index: int) -> bytes:
    return receipt_at(ledger, index, ledger.header, ledger.certificate, ledger.links)


def trust(ledger: MemoryLedger) -> Anchor:
    """What a verifier knows who was given the genesis and nothing else."""
    return anchor(ledger.genesis, ledger.chain_id)


def next_block(
    ledger: MemoryLedger, parent: LedgerState, *events: CheckedEvent, view: int = 0, epoch: str = "newest"
) -> Built:
    members = ledger.committee if epoch == "newest" else committee(ledger.genesis)
    view = view or (parent.header.view + 1 if parent.header.epoch == members.epoch else 1)
    return build(
        parent,
        events,
        view=view,
        leader=members.leader(View(view)).id,
        timestamp_ms=parent.header.timestamp_ms + 1_000,
        committee=members,
        max_events=100,
        max_bytes=1 << 20,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verifier_with_only_the_genesis_follows_joining_rotation_and_departure(scheme: str) -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=scheme)
    trusted = trust(ledger)
    ledger.seal(ledger.source(LIBRARIAN, "of epoch 0"))
    begin_epoch(ledger, add={"archive": "data-source"})
    ledger.seal(ledger.source("archive", "of epoch 1"))
    begin_epoch(ledger, rotate=["archive"])
    ledger.seal(ledger.source("archive", "of epoch 2"))
    begin_epoch(ledger, remove=["archive"])
    ledger.seal(ledger.source(LIBRARIAN, "of epoch 3"))
    assert [link.header for link in ledger.links] == [ledger.certified[at][0] for at in (1, 3, 5)]
    for index, event in enumerate(ledger.events):
        assert verify_receipt(trusted, newest_receipt(ledger, index)).id == event.id
    known = trusted.follow(ledger.links)
    assert [keys.committee.epoch for keys in known.epochs] == [0, 1, 2, 3]
    assert [len(keys.committee.role_members(VOTING_ROLES[0])) for keys in known.epochs] == [2, 3, 3, 2]
    receipt = StateReceipt(
        1, EPOCH_HEAD_KEY, ledger.state.prove(EPOCH_HEAD_KEY), ledger.header, ledger.certificate, ledger.links
    )
    held = verify_state_receipt(trusted, encode(receipt), EPOCH_HEAD_KEY)
    assert held.value is not None
    assert read_record(held.value, EpochHead).epoch == 3
    with refused(Reason.WRONG_EPOCH):
        verify_receipt(trusted, receipt_at(ledger, 0, ledger.header, ledger.certificate, ledger.links[:2]))


def test_member_that_left_is_refused_as_author_signer_and_voter() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    early = ledger.source(HOSPITAL, "signed in time, handed in too late")
    begin_epoch(ledger, remove=[HOSPITAL])
    with refused(Reason.UNKNOWN_MEMBER):
        ledger.check(early.entry, early.portions)
    secret = ledger.secrets[HOSPITAL].identity
    before = committee(ledger.genesis)
    stale = sign_vote(
        before, ledger.ids[HOSPITAL], VoteKind.NULLIFY, View(9), Digest(bytes(32)), share=b"", sign=secret.sign
    )
    check_vote(stale, before)
    with refused(Reason.WRONG_EPOCH):
        check_vote(stale, ledger.committee)
    with refused(Reason.UNKNOWN_MEMBER):
        check_vote(msgspec.structs.replace(stale, epoch=1), ledger.committee)


@pytest.mark.parametrize("role", VOTING_ROLES)
def test_change_without_a_quorum_of_one_role_is_refused(role: str) -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    membership, _ = next_membership(ledger.genesis, ledger.committee, ledger.secrets, add={"newcomer": "operator"})
    voters = [voter.name for voter in ledger.committee.voters]
    signers = [name for name in voters if name != f"{role}-1"]
    with refused(Reason.MISSING_SIGNATURE):
        change_event(ledger, membership, signers)
    assert change_event(ledger, membership, voters).entry.author == ledger.ids[voters[0]]


def test_largest_quorum_that_a_genesis_may_ask_for_fits_the_event_that_changes_it() -> None:
    largest = MemoryLedger({"data-source": 1, "governance": 24, "operator": 1}, certificate_scheme=ML_DSA_65_LIST)
    membership = changed(largest, add={"auditor": "verifier"})
    names = ["data-source-1", *(f"governance-{number}" for number in range(1, 18)), "operator-1"]
    assert len(names) == 19
    event = change_event(largest, membership, names)
    assert len(event.entry_bytes) > 60_000
    largest.seal(event)
    with pytest.raises(Rejected, match="20 signatures"):
        make_genesis({"data-source": 1, "governance": 26, "operator": 1}, certificate_scheme=ML_DSA_65_LIST)
    with pytest.raises(Rejected, match="65 signatures"):
        make_genesis({"data-source": 1, "governance": 93, "operator": 1}, certificate_scheme=ED25519_LIST)


def changed(ledger: MemoryLedger, **options: object) -> Membership:
    return next_membership(ledger.genesis, ledger.committee, ledger.secrets, **options)[0]  # type: ignore[arg-type]


def test_membership_that_skips_or_repeats_an_epoch_is_refused() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    membership = changed(ledger, add={"newcomer": "operator"})
    for epoch in (0, 2):
        with refused(Reason.WRONG_EPOCH):
            change_event(ledger, msgspec.structs.replace(membership, epoch=epoch))


def test_identity_key_in_another_role_is_refused() -> None:
    ledger = MemoryLedger({"data-source": 2, "governance": 1, "operator": 2}, certificate_scheme=ED25519_LIST)
    membership = changed(ledger)
    members = [
        msgspec.structs.replace(member, role=VOTING_ROLES[0]) if member.name == "operator-2" else member
        for member in membership.members
    ]
    thresholds = [
        msgspec.structs.replace(entry, threshold=count)
        for entry, count in zip(membership.thresholds, (3, 1, 1), strict=True)
    ]
    with refused(Reason.BAD_MEMBERSHIP):
        change_event(ledger, msgspec.structs.replace(membership, members=tuple(members), thresholds=tuple(thresholds)))


def test_retired_identity_key_never_returns() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    old = committee(ledger.genesis)
    begin_epoch(ledger, remove=[HOSPITAL])
    record = ledger.state.get(RETIRED_TABLE + old.role_members(VOTING_ROLES[0])[1].id)
    assert record is not None
    assert read_record(record, RetiredMember) == RetiredMember(0, b"")
    membership = changed(ledger)
    members = (*membership.members, old.role_members(VOTING_ROLES[0])[1])
    thresholds = tuple(
        msgspec.structs.replace(entry, threshold=2) if entry.role == VOTING_ROLES[0] else entry
        for entry in membership.thresholds
    )
    returned = msgspec.structs.replace(membership, members=members, thresholds=thresholds)
    with refused(Reason.BAD_MEMBERSHIP):
        ledger.seal(change_event(ledger, returned))


@pytest.mark.parametrize("use", ["transport", "log"])
@pytest.mark.parametrize("when", ["with the change that retires it", "later"])
def test_retired_identity_key_returns_for_no_other_use(use: str, when: str) -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    retired = next(member for member in ledger.genesis.members if member.name == HOSPITAL)
    if when == "later":
        begin_epoch(ledger, remove=[HOSPITAL])
        membership = changed(ledger)
    else:
        membership = changed(ledger, remove=[HOSPITAL])
    first = msgspec.structs.replace(membership.members[0], **{f"{use}_key": retired.identity_key})
    returned = msgspec.structs.replace(membership, members=(first, *membership.members[1:]))
    with pytest.raises(Rejected, match=f"the {use} key of {first.name} was an identity key that is retired"):
        ledger.seal(change_event(ledger, returned))


def test_departure_that_keeps_the_group_key_is_refused() -> None:
    """Share keys of those who stay still lie on the old polynomial: the one who left would still hold a share of it."""
    ledger = MemoryLedger({"data-source": 1, "governance": 4, "operator": 1}, certificate_scheme=BLS_THRESHOLD)
    membership = changed(ledger, remove=["governance-4"])
    old, new = ledger.genesis.groups[1], membership.groups[1]
    kept = msgspec.structs.replace(
        new, group_key=old.group_key, share_keys=old.share_keys[:3], threshold=3, possession=old.possession
    )
    groups = (membership.groups[0], kept, membership.groups[2])
    with refused(Reason.BAD_MEMBERSHIP):
        change_event(ledger, msgspec.structs.replace(membership, groups=groups))


def test_role_keys_of_an_earlier_epoch_prove_nothing_in_a_later_one() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=BLS_THRESHOLD)
    membership = changed(ledger)
    stale = msgspec.structs.replace(membership, members=ledger.genesis.members, groups=ledger.genesis.groups)
    with refused(Reason.BAD_PROOF_OF_POSSESSION):
        change_event(ledger, stale)


def test_nothing_but_empty_carriers_follows_a_terminal_ledger_block_in_its_epoch() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    event = ledger.source(LIBRARIAN, "too late")
    begin_epoch(ledger, add={"newcomer": "verifier"})
    terminal = ledger.ledger
    old = committee(ledger.genesis)
    carrier = next_block(ledger, terminal, event, epoch="old")
    assert carrier.events == ()
    assert carrier.state.ends_epoch
    assert not carrier.state.is_terminal
    apply(terminal, carrier.state.header, carrier.body, (), old)
    smuggled = next_block(ledger, terminal, ledger.check(event.entry, event.portions))
    forged = msgspec.structs.replace(
        smuggled.state.header,
        epoch=0,
        view=terminal.header.view + 1,
        parent_view=terminal.header.view,
        leader=old.leader(View(terminal.header.view + 1)).id,
    )
    with refused(Reason.BAD_BLOCK):
        apply(terminal, forged, smuggled.body, smuggled.events, old)


def test_next_epoch_begins_at_the_terminal_ledger_block_and_at_no_carrier() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    before = ledger.ledger
    begin_epoch(ledger, add={"newcomer": "verifier"})
    first = next_block(ledger, ledger.ledger)
    assert (first.state.header.epoch, first.state.header.view, first.state.header.parent_view) == (1, 1, 0)
    apply(ledger.ledger, first.state.header, first.body, (), ledger.committee)
    with refused(Reason.WRONG_EPOCH):
        apply(ledger.ledger, first.state.header, first.body, (), committee(ledger.genesis))
    carrier = next_block(ledger, ledger.ledger, epoch="old")
    for parent in (carrier.state, before):
        with refused(Reason.WRONG_EPOCH):
            next_block(ledger, parent)


def test_nothing_follows_a_membership_event_in_its_ledger_block() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    change = change_event(ledger, changed(ledger, add={"newcomer": "verifier"}))
    later = ledger.source(LIBRARIAN, "later")
    made = next_block(ledger, ledger.ledger, change, later)
    assert made.events == (change,)
    both = next_block(ledger, ledger.ledger, later, change)
    body = msgspec.structs.replace(both.body, leaf_hashes=both.body.leaf_hashes[::-1])
    header = msgspec.structs.replace(both.state.header, body_root=body.root)
    with refused(Reason.BAD_BLOCK):
        apply(ledger.ledger, header, body, (change, later), ledger.committee)


def test_engine_begins_an_epoch_at_view_one_on_the_terminal_ledger_block() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    for number in range(3):
        ledger.seal(ledger.source(LIBRARIAN, f"source {number}"))
    begin_epoch(ledger, add={"newcomer": "verifier"})
    leader = ledger.committee.leader(View(1)).id
    engine = Engine(ledger.committee, leader, Timing(), ledger.ledger.header, None)
    engine.start(0)
    effects = engine.work_available(1)
    assert (engine.view, engine.final_view) == (1, 0)
    assert any(getattr(effect, "parent", None) == ledger.ledger.header for effect in effects)


def test_end_of_the_epoch_before_is_no_news_to_the_engine_of_the_next() -> None:
    """Its view is of another epoch: taken for one of this, it would make the voter forget votes and skip views."""
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    for number in range(3):
        ledger.seal(ledger.source(LIBRARIAN, f"source {number}"))
    begin_epoch(ledger, add={"newcomer": "verifier"})
    own = next(voter.id for voter in ledger.committee.voters if voter != ledger.committee.leader(View(1)))
    engine = Engine(ledger.committee, own, Timing(timeout_ms=10), ledger.ledger.header, None)
    engine.start(0)
    engine.work_available(1)
    (nullify,) = [effect for effect in engine.tick(20) if isinstance(effect, CastVote)]
    secret = ledger.secrets[next(voter.name for voter in ledger.committee.voters if voter.id == own)].identity
    vote = sign_vote(ledger.committee, own, nullify.kind, nullify.view, nullify.block, share=b"", sign=secret.sign)
    engine.own_vote(vote, 21)
    assert ledger.ledger.header.view > engine.view
    assert engine.caught_up(ledger.ledger.header, decode_certificate(ledger.certificate), 22) == []
    assert (engine.view, engine.final_view) == (1, 0)
    assert any(vote == getattr(effect, "message", None) for effect in engine.tick(10_000)), "it forgot its own vote"


def test_link_with_other_members_than_the_certified_ones_is_refused() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    ledger.seal(ledger.source(LIBRARIAN, "first"))
    begin_epoch(ledger, add={"newcomer": "operator"})
    (link,) = ledger.all_links
    trusted = trust(ledger)
    other = changed(MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST), add={"usurper": "operator"})
    with refused(Reason.BAD_MEMBERSHIP):
        trusted.follow([msgspec.structs.replace(link, membership=encode(other))])
    header, certificate = ledger.certified[0]
    earlier = EpochLink(link.membership, header, certificate, ledger.states[0].prove(EPOCH_HEAD_KEY))
    with refused(Reason.WRONG_EPOCH):
        trusted.follow([earlier])
    with refused(Reason.WRONG_EPOCH):
        trusted.follow([link, link])
    with refused(Reason.BAD_PROOF):
        trusted.follow([msgspec.structs.replace(link, proof=ledger.states[0].prove(EPOCH_HEAD_KEY))])


def retired_key_history() -> tuple[MemoryLedger, MemoryLedger]:
    """The true log in epoch 1, and another from the same genesis that holders of epoch 0's keys wrote later."""
    true, false = (MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST) for _ in range(2))
    for ledger in (true, false):
        ledger.seal(ledger.source(LIBRARIAN, "common"))
    begin_epoch(true, add={"newcomer": "operator"}, remove=[HOSPITAL])
    true.seal(true.source(LIBRARIAN, "true"))
    true.seal(true.source(LIBRARIAN, "newer"))
    begin_epoch(false, add={"usurper": "operator"}, remove=[LIBRARIAN])
    false.seal(false.source(HOSPITAL, "false"))
    false.seal(false.source(HOSPITAL, "newer"))
    false.seal(false.source(HOSPITAL, "newest"))
    return true, false


def test_history_by_retired_keys_verifies_from_genesis_and_is_refused_against_a_pin() -> None:
    true, false = retired_key_history()
    event = true.events[0].id
    trusted = trust(true)
    pin = Pin(3, decode(true.certified[2][0], type(true.ledger.header), 1_024).log_root)
    lie = export_bundle(false, "included", event=event, pinned_size=pin.log_size)
    assert open_bundle(trusted, lie).header.epoch == 1
    with refused(Reason.BAD_CHECKPOINT):
        open_bundle(trusted, lie, pin)
    truth = export_bundle(true, "included", event=event, pinned_size=pin.log_size)
    assert open_bundle(trusted, truth, pin).header == true.ledger.header
    with refused(Reason.BAD_CHECKPOINT):
        open_bundle(trusted, export_bundle(true, "included", event=event), pin)
    exact = Pin(true.ledger.header.log_size, true.ledger.header.log_root)
    assert open_bundle(trusted, export_bundle(true, "included", event=event), exact).header == true.ledger.header
    with refused(Reason.BAD_CHECKPOINT):
        open_bundle(trusted, export_bundle(false, "included", event=event), Pin(9, bytes(32)))
    with refused(Reason.BAD_CHECKPOINT):
        open_bundle(trusted, export_bundle(false, "included", event=event), Pin(5, bytes(32)))


def test_header_by_retired_keys_beyond_the_end_of_their_epoch_is_refused() -> None:
    """The true links show where epoch 0 ended: its keys certify nothing after that, and no other log of that size."""
    true, _ = retired_key_history()
    other = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    other.seal(other.source(LIBRARIAN, "common"))
    other.seal(other.source(LIBRARIAN, "another second"))
    same_size = other.certified[-1]
    other.seal(other.source(LIBRARIAN, "third"))
    for (header, certificate), reason in (
        (same_size, Reason.BAD_CERTIFICATE),
        (other.certified[-1], Reason.WRONG_EPOCH),
    ):
        with refused(reason):
            verify_receipt(trust(true), receipt_at(other, 0, header, certificate, true.all_links))


def test_header_that_begins_an_epoch_with_another_log_is_refused() -> None:
    """Members of an epoch that make a second log of the size at which it began deny what made them its members."""
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    ledger.seal(ledger.source(LIBRARIAN, "first"))
    begin_epoch(ledger, add={"newcomer": "operator"})
    known = trust(ledger).follow(ledger.all_links)
    carrier = msgspec.structs.replace(ledger.ledger.header, epoch=1, view=1)
    verify_header(known, encode(carrier), ledger.certify(carrier))
    other = msgspec.structs.replace(carrier, log_root=bytes(32))
    with refused(Reason.BAD_CERTIFICATE):
        verify_header(known, encode(other), ledger.certify(other))


def test_link_to_members_that_may_not_follow_is_refused_whoever_certified_it() -> None:
    ledger = MemoryLedger(COUNTS, certificate_scheme=ED25519_LIST)
    ledger.seal(ledger.source(LIBRARIAN, "first"))
    membership = changed(ledger, add={"newcomer": "operator"})
    moved = [
        msgspec.structs.replace(member, role="verifier", log_key=b"") if member.name == HOSPITAL else member
        for member in membership.members
    ]
    swapped = decode(encode(msgspec.structs.replace(membership, members=tuple(moved))), Membership, 1 << 20)
    head = EpochHead(1, membership_digest(ledger.chain_id, swapped), bytes(32), ledger.now_ms)
    ledger.collude([], {EPOCH_HEAD_KEY: encode(head)})
    link = EpochLink(encode(swapped), ledger.header, ledger.certificate, ledger.state.prove(EPOCH_HEAD_KEY))
    with pytest.raises(Rejected, match=f"{HOSPITAL} changes role"):
        trust(ledger).follow([link])


def test_bundle_without_its_links_is_refused() -> None:
    true, _ = retired_key_history()
    bundle = export_bundle(true, "included", event=true.events[-1].id)
    opened = decode(bundle[len(MAGIC) :], Bundle, 1 << 20)
    with refused(Reason.WRONG_EPOCH):
        open_bundle(trust(true), MAGIC + encode(msgspec.structs.replace(opened, epochs=())))


def told() -> Story:
    return begin(counts=COUNTS, certificate_scheme=ED25519_LIST)


def test_rotated_owner_and_operator_answer_for_what_they_signed_before() -> None:
    story = told()
    ledger, run = story.ledger, story.run
    ledger.seal(run.grant([story.books, story.records], 1, 4))
    ledger.seal(*run.step())
    begin_epoch(ledger, rotate=[LIBRARIAN, OPERATOR])
    ledger.seal(*run.step())
    ledger.seal(run.grant([story.books, story.records], 3, 4, signers=[LIBRARIAN, HOSPITAL]))
    ledger.seal(*run.step())
    ledger.seal(run.release())
    ledger.seal(ledger.revocation(LIBRARIAN, story.books))
    trusted = trust(ledger)
    for predicate, about in (
        (Predicate.SOURCE_HONORED, {"campaign": run.id, "source": story.books}),
        (Predicate.POLICY_IN_FORCE, {"campaign": run.id}),
        (Predicate.REFUSALS_COMPLETE, {"campaign": run.id}),
        (Predicate.INCLUDED, {"event": ledger.events[-2].id}),
    ):
        bundle = open_bundle(trusted, export_bundle(ledger, predicate.value, **about))
        verdict = verify(bundle, predicate)
        assert verdict.answer is Answer.YES, [step.text for step in verdict.steps]


def test_successor_in_another_role_or_by_another_name_inherits_nothing() -> None:
    story = told()
    ledger = story.ledger
    owner = ledger.ids[LIBRARIAN]
    begin_epoch(ledger, add={"library": "data-source"}, remove=[LIBRARIAN])
    with refused(Reason.WRONG_AUTHOR):
        ledger.seal(ledger.revocation("library", story.books))
    record = ledger.state.get(SOURCE_TABLE + story.books)
    assert record is not None
    assert owner in record


def test_member_that_takes_the_name_of_one_that_stays_does_not_answer_for_it() -> None:
    """Neither for the rules nor for a verifier: a name is inherited from who leaves, not from who is renamed."""
    story = told()
    ledger = story.ledger
    librarian, hospital = ledger.ids[LIBRARIAN], ledger.ids[HOSPITAL]
    swapped = {LIBRARIAN: HOSPITAL, HOSPITAL: LIBRARIAN}
    membership, secrets = next_membership(ledger.genesis, ledger.committee, ledger.secrets)
    members = tuple(
        msgspec.structs.replace(member, name=swapped.get(member.name, member.name)) for member in membership.members
    )
    renamed = msgspec.structs.replace(membership, members=members)
    ledger.seal(change_event(ledger, renamed))
    ledger.enter_epoch(renamed, {swapped.get(name, name): held for name, held in secrets.items()})
    with refused(Reason.WRONG_AUTHOR):
        ledger.seal(ledger.revocation(LIBRARIAN, story.books))
    followed = trust(ledger).follow(ledger.all_links)
    assert followed.first_identity(librarian) == librarian
    assert followed.first_identity(hospital) == hospital
    ledger.seal(ledger.revocation(HOSPITAL, story.books))


def test_source_of_a_member_that_left_is_granted_by_nobody() -> None:
    story = told()
    ledger, run = story.ledger, story.run
    begin_epoch(ledger, remove=[LIBRARIAN])
    with refused(Reason.UNKNOWN_MEMBER):
        ledger.seal(run.grant([story.books], 1, 4))
