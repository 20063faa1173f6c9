"""Attacks on single events: who may sign what, commitments, shapes, and any byte of them."""

import itertools

import msgspec
import pytest
from epoch_fixtures import change_event, next_membership
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import GOVERNANCE, HOSPITAL, LIBRARIAN, OPERATOR, Story, digest
from rules_fixtures import SEVERAL, assert_malformed, granted, listed, opened, remade, remake, tell

from consensus import portions as p
from consensus.codec import encode
from consensus.event import (
    JOB_SIGNER_ROLE,
    MAX_ENTRY_BYTES,
    SHAPES,
    CheckedEvent,
    Entry,
    EventSignature,
    Kind,
    SignedEvent,
    add_signature,
    check_each,
    check_event,
    check_parts,
    check_signature,
    check_unsigned,
    event_id,
    pack,
    pack_parts,
    sign_entries,
    sign_entries_as_job,
    sign_entry,
    signature_message,
    unpack,
)
from consensus.identifiers import ZERO_DIGEST, Role
from consensus.keys import Ed25519SigningKey
from consensus.rejection import Reason, Rejected

MEMBERS = [f"{role}-{n}" for role, count in SEVERAL.items() for n in range(1, count + 1)]
STRANGER = Ed25519SigningKey(digest("stranger"))


def every_kind(counts: dict[str, int] | None = None) -> tuple[Story, dict[Kind, CheckedEvent]]:
    """An honest event of each kind."""
    told = granted(counts)
    ledger, run = told.ledger, told.run
    events = {Kind.SOURCE: ledger.source(LIBRARIAN, "more"), Kind.POLICY: ledger.policy(name="more")}
    events[Kind.REVOCATION] = ledger.revocation(HOSPITAL, told.records)
    events[Kind.EVIDENCE] = ledger.evidence(HOSPITAL, ledger.contradiction(OPERATOR))
    grant = run.grant_id
    events[Kind.GRANT] = run.grant([told.books, told.records], 1, 4)
    run.grant_id = grant
    for event in ledger.events:
        if event.entry.kind in (Kind.DELEGATION, Kind.CAMPAIGN):
            events[event.entry.kind] = event
    for event in run.step():
        events[event.entry.kind] = event
    ledger.seal(*(events[kind] for kind in (Kind.REFUSAL, Kind.STEP)))
    events[Kind.ROLLBACK] = run.rollback("operator-decision")
    events[Kind.EVALUATION] = run.evaluation()
    events[Kind.DECISION] = ledger.decision(run.id, run.id, "note")
    events[Kind.AUDIT_CHALLENGE] = ledger.audit_challenge(HOSPITAL, run.id)
    events[Kind.AUDIT_RESULT] = ledger.audit_result(HOSPITAL, run.id)
    events[Kind.CUSTODY] = ledger.custody(HOSPITAL, run.id, run.head.last_event)
    events[Kind.RELEASE] = run.release()
    abandon = p.Portions(None, None, ledger.salted(p.Abandon("")))
    events[Kind.ABANDON] = run.written(Kind.ABANDON, abandon)
    membership, _ = next_membership(ledger.genesis, ledger.committee, ledger.secrets, add={"newcomer": "verifier"})
    events[Kind.MEMBERSHIP] = change_event(ledger, membership)
    assert set(events) == set(Kind)
    return told, events


TOLD, EVENTS = every_kind(SEVERAL)
COMMITTEE = TOLD.ledger.committee
MEMBER_KINDS = [kind for kind in Kind if not SHAPES[kind].signed_by_job]
JOB_KINDS = [kind for kind in Kind if SHAPES[kind].signed_by_job]


def wire(event: CheckedEvent) -> bytes:
    return pack_parts(event.entry_bytes, event.portions_bytes)


@pytest.mark.parametrize("kind", Kind)
def test_honest_event_of_each_kind_passes(kind: Kind) -> None:
    event = EVENTS[kind]
    checked = check_event(wire(event), COMMITTEE)
    assert checked == event
    assert checked.id == event_id(event.entry)
    assert pack(event.entry, event.portions) == wire(event)


def test_events_checked_together_are_judged_each_for_itself() -> None:
    forged = [
        sign_entry(EVENTS[kind].entry, EVENTS[kind].entry.author, "data-source", STRANGER)
        for kind in (Kind.SOURCE, Kind.REVOCATION)
    ]
    wires = [unpack(wire(event)) for event in EVENTS.values()]
    wires[3:3] = [unpack(pack(entry, EVENTS[Kind.SOURCE].portions)) for entry in forged]
    wires.append(SignedEvent(b"", b""))
    alone: list[CheckedEvent | Reason] = []
    for one in wires:
        try:
            alone.append(check_parts(one.entry, one.portions, COMMITTEE))
        except Rejected as error:
            alone.append(error.reason)
    together = [one.reason if isinstance(one, Rejected) else one for one in check_each(wires, COMMITTEE)]
    assert together == alone
    assert [one for one in alone if isinstance(one, Reason)] == [
        Reason.BAD_SIGNATURE,
        Reason.PORTION_MISMATCH,
        Reason.MALFORMED,
    ]


# Who signs


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("author", MEMBERS)
def test_author_of_another_role_is_refused(kind: Kind, author: str) -> None:
    role = COMMITTEE.member(TOLD.ledger.ids[author]).role
    if role in SHAPES[kind].authors:
        return
    signers = [author, *(name for name in MEMBERS if TOLD.ledger.ids[name] in EVENTS[kind].signers)]
    with pytest.raises(Rejected) as caught:
        remake(TOLD.run, EVENTS[kind], author=TOLD.ledger.ids[author], signers=signers)
    assert caught.value.reason == Reason.WRONG_ROLE


@pytest.mark.parametrize("kind", Kind)
def test_author_who_is_no_member_is_refused(kind: Kind) -> None:
    assert_malformed(lambda: remake(TOLD.run, EVENTS[kind], author=digest("nobody")), Reason.UNKNOWN_MEMBER)


@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_event_without_its_authors_signature_is_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    others = [name for name in MEMBERS if TOLD.ledger.ids[name] in event.signers - {event.entry.author}]
    assert_malformed(lambda: remake(TOLD.run, event, signers=others), Reason.MISSING_SIGNATURE)


@pytest.mark.parametrize("kind", JOB_KINDS)
def test_job_event_with_no_or_a_second_signature_is_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    unsigned = msgspec.structs.replace(event.entry, signatures=())
    assert_malformed(lambda: check_event(pack(unsigned, event.portions), COMMITTEE), Reason.MISSING_SIGNATURE)
    member = COMMITTEE.member(TOLD.ledger.ids[OPERATOR])
    twice = sign_entry(event.entry, member.id, JOB_SIGNER_ROLE, TOLD.ledger.secrets[OPERATOR].identity)
    assert_malformed(lambda: check_event(pack(twice, event.portions), COMMITTEE), Reason.MISSING_SIGNATURE)


@pytest.mark.parametrize("kind", JOB_KINDS)
@pytest.mark.parametrize("role", ["operator", "governance", ""])
def test_job_key_that_signs_as_a_member_is_refused(kind: Kind, role: str) -> None:
    event = EVENTS[kind]
    unsigned = msgspec.structs.replace(event.entry, signatures=())
    forged = sign_entry(unsigned, TOLD.run.job.public_key, role, TOLD.run.job)
    assert_malformed(lambda: check_event(pack(forged, event.portions), COMMITTEE), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("kind", MEMBER_KINDS)
@pytest.mark.parametrize("role", [*Role, JOB_SIGNER_ROLE])
def test_member_that_signs_in_another_role_is_refused(kind: Kind, role: str) -> None:
    event = EVENTS[kind]
    author = COMMITTEE.member(event.entry.author)
    if role == author.role:
        return
    forged = sign_entry(event.entry, author.id, str(role), TOLD.ledger.secrets[author.name].identity)
    assert_malformed(lambda: check_event(pack(forged, event.portions), COMMITTEE), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_signature_by_a_strangers_key_in_a_members_name_is_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    author = COMMITTEE.member(event.entry.author)
    forged = sign_entry(event.entry, author.id, author.role.value, STRANGER)
    assert_malformed(lambda: check_event(pack(forged, event.portions), COMMITTEE), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("kind", MEMBER_KINDS)
@pytest.mark.parametrize("surplus", MEMBERS)
def test_signature_of_a_member_that_has_no_say_is_refused(kind: Kind, surplus: str) -> None:
    event = EVENTS[kind]
    if TOLD.ledger.ids[surplus] in event.signers:
        return
    names = [name for name in MEMBERS if TOLD.ledger.ids[name] in event.signers]
    if kind is Kind.GRANT and not surplus.startswith("verifier"):
        # Which data sources and operators have a say in a grant depends on the state: admission refuses the rest.
        assert remake(TOLD.run, event, signers=[*names, surplus]).id == event.id
        return
    assert_malformed(lambda: remake(TOLD.run, event, signers=[*names, surplus]), Reason.SURPLUS_SIGNATURE)


@pytest.mark.parametrize("kind", [Kind.POLICY, Kind.GRANT, Kind.DECISION])
def test_signature_of_a_stranger_is_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    forged = sign_entry(event.entry, digest("stranger"), "governance", STRANGER)
    assert_malformed(lambda: check_event(pack(forged, event.portions), COMMITTEE), Reason.UNKNOWN_MEMBER)


@pytest.mark.parametrize("kind", [Kind.POLICY, Kind.GRANT, Kind.DECISION])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_governance_quorum_is_demanded(kind: Kind, count: int) -> None:
    event = EVENTS[kind]
    others = [name for name in MEMBERS if TOLD.ledger.ids[name] in event.signers and not name.startswith("governance")]
    for chosen in itertools.combinations([f"governance-{number}" for number in range(1, 5)], count):
        if kind is not Kind.GRANT and GOVERNANCE not in chosen:
            continue
        names = [*others, *chosen]
        if count >= 3:
            assert remake(TOLD.run, event, signers=names).id == event.id
        else:
            with pytest.raises(Rejected) as caught:
                remake(TOLD.run, event, signers=names)
            assert caught.value.reason == Reason.MISSING_SIGNATURE


def test_events_signed_together_are_checked_one_by_one_and_keep_their_ids() -> None:
    ledger = TOLD.ledger
    sources = [ledger.source(LIBRARIAN, f"together {number}") for number in range(5)]
    entries = [event.entry for event in sources]
    role = ledger.committee.member(ledger.ids[LIBRARIAN]).role.value
    signed = sign_entries(entries, ledger.ids[LIBRARIAN], role, ledger.secrets[LIBRARIAN].identity)
    for event, entry in reversed(list(zip(sources, signed, strict=True))):
        assert entry != event.entry
        assert check_event(pack(entry, event.portions), COMMITTEE).id == event.id
    turned = add_signature(entries[0], signed[1].signatures[0])
    assert_malformed(lambda: check_event(pack(turned, sources[0].portions), COMMITTEE), Reason.BAD_SIGNATURE)


def test_job_events_signed_together_are_checked_one_by_one() -> None:
    events = [EVENTS[kind] for kind in (Kind.REFUSAL, Kind.STEP)]
    signed = sign_entries_as_job([event.entry for event in events], TOLD.run.job)
    for event, entry in zip(events, signed, strict=True):
        assert check_event(pack(entry, event.portions), COMMITTEE).id == event.id
    turned = add_signature(signed[0], signed[1].signatures[0])
    assert_malformed(lambda: check_event(pack(turned, events[0].portions), COMMITTEE), Reason.BAD_SIGNATURE)


@pytest.mark.parametrize("kind", [Kind.POLICY, Kind.GRANT])
def test_signers_of_one_event_may_each_have_signed_it_in_a_batch(kind: Kind) -> None:
    event, other = EVENTS[kind], EVENTS[Kind.SOURCE]
    entry = event.entry
    for name, identifier in TOLD.ledger.ids.items():
        if identifier in event.signers:
            role = COMMITTEE.member(identifier).role.value
            together = sign_entries([other.entry, entry], identifier, role, TOLD.ledger.secrets[name].identity)
            entry = together[1]
    assert check_event(pack(entry, event.portions), COMMITTEE).id == event.id


@pytest.mark.parametrize("kind", [Kind.POLICY, Kind.GRANT, Kind.DECISION])
def test_one_members_signature_does_not_count_twice(kind: Kind) -> None:
    event = EVENTS[kind]
    doubled = msgspec.structs.replace(event.entry, signatures=(*event.entry.signatures, event.entry.signatures[0]))
    assert_malformed(lambda: check_event(pack(doubled, event.portions), COMMITTEE), Reason.BAD_FIELD)
    turned = msgspec.structs.replace(event.entry, signatures=event.entry.signatures[::-1])
    assert_malformed(lambda: check_event(pack(turned, event.portions), COMMITTEE), Reason.BAD_FIELD)


def test_signature_of_another_kind_chain_version_or_event_does_not_fit() -> None:
    entry = EVENTS[Kind.SOURCE].entry
    messages = {
        signature_message(entry, event_id(entry), "data-source"),
        signature_message(entry, event_id(entry), "job"),
        signature_message(entry, ZERO_DIGEST, "data-source"),
        signature_message(msgspec.structs.replace(entry, kind=Kind.REVOCATION), event_id(entry), "data-source"),
        signature_message(msgspec.structs.replace(entry, chain_id=ZERO_DIGEST), event_id(entry), "data-source"),
        signature_message(msgspec.structs.replace(entry, version=2), event_id(entry), "data-source"),
    }
    assert len(messages) == 6


def test_id_covers_every_field_but_the_signatures() -> None:
    entry = EVENTS[Kind.GRANT].entry
    others: dict[str, object] = {
        "version": 2,
        "chain_id": ZERO_DIGEST,
        "kind": Kind.STEP,
        "author": ZERO_DIGEST,
        "campaign": ZERO_DIGEST,
        "sequence": 77,
        "attempt": 77,
        "data": ZERO_DIGEST,
        "governance": ZERO_DIGEST,
        "operation": ZERO_DIGEST,
    }
    assert {*others, "signatures"} == set(Entry.__struct_fields__)
    ids = {event_id(msgspec.structs.replace(entry, **{field: value})) for field, value in others.items()}
    assert len(ids) == len(others)
    assert event_id(entry) not in ids
    assert event_id(msgspec.structs.replace(entry, signatures=())) == event_id(entry)


def test_single_signature_is_checked_as_a_countersigner_does() -> None:
    event = EVENTS[Kind.GRANT]
    for held in event.entry.signatures:
        check_signature(event.entry, event.id, held, COMMITTEE)
    wrong = EventSignature(event.entry.signatures[0].signer, event.entry.signatures[1].signature)
    assert_malformed(lambda: check_signature(event.entry, event.id, wrong, COMMITTEE), Reason.BAD_SIGNATURE)
    nobody = EventSignature(digest("nobody"), wrong.signature)
    assert_malformed(lambda: check_signature(event.entry, event.id, nobody, COMMITTEE), Reason.UNKNOWN_MEMBER)


def test_signing_again_replaces_the_earlier_signature() -> None:
    entry = EVENTS[Kind.GRANT].entry
    assert add_signature(entry, entry.signatures[1]) == entry


def test_unsigned_event_passes_only_the_check_for_unsigned_events() -> None:
    event = EVENTS[Kind.GRANT]
    bare = msgspec.structs.replace(event.entry, signatures=())
    assert check_unsigned(encode(bare), event.portions_bytes, COMMITTEE).id == event.id
    assert_malformed(lambda: check_event(pack(bare, event.portions), COMMITTEE), Reason.MISSING_SIGNATURE)


# Place


@pytest.mark.parametrize("kind", Kind)
def test_event_of_another_chain_is_refused(kind: Kind) -> None:
    assert_malformed(lambda: remake(TOLD.run, EVENTS[kind], chain_id=digest("elsewhere")), Reason.WRONG_CHAIN)


@pytest.mark.parametrize("kind", Kind)
def test_event_inside_or_outside_a_campaign_against_its_kind_is_refused(kind: Kind) -> None:
    campaign = bytes(32) if SHAPES[kind].in_campaign else digest("campaign")
    assert_malformed(lambda: remake(TOLD.run, EVENTS[kind], campaign=campaign), Reason.BAD_FIELD)


@pytest.mark.parametrize("kind", [kind for kind in Kind if not SHAPES[kind].in_campaign])
@pytest.mark.parametrize("place", [{"sequence": 1}, {"attempt": 1}])
def test_numbered_event_outside_campaigns_is_refused(kind: Kind, place: dict[str, object]) -> None:
    assert_malformed(lambda: remake(TOLD.run, EVENTS[kind], **place), Reason.BAD_FIELD)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_event_of_another_version_is_malformed(version: int) -> None:
    assert_malformed(lambda: remake(TOLD.run, EVENTS[Kind.SOURCE], version=version), Reason.MALFORMED)


# Portions


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("field", ["data", "governance", "operation"])
def test_commitment_that_is_not_its_portions_is_refused(kind: Kind, field: str) -> None:
    for value in (digest("other"), b"", bytes(16)):
        event = EVENTS[kind]
        if value == getattr(event.entry, field):
            continue
        forged = pack(msgspec.structs.replace(event.entry, **{field: value}), event.portions)
        assert_malformed(lambda: check_event(forged, COMMITTEE), Reason.PORTION_MISMATCH)  # noqa: B023


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("other", Kind)
def test_portions_of_one_kind_are_not_taken_for_another(kind: Kind, other: Kind) -> None:
    if kind is other:
        return
    event = EVENTS[kind]
    entry = EVENTS[other].entry
    data, governance, operation = p.commitments(other.value, event.portions)
    forged = msgspec.structs.replace(entry, data=data, governance=governance, operation=operation)
    with pytest.raises(Rejected) as caught:
        check_event(pack(forged, event.portions), COMMITTEE)
    assert caught.value.reason in (Reason.PORTION_MISMATCH, Reason.MALFORMED, Reason.BAD_SIGNATURE)
    kept = msgspec.structs.replace(entry, data=event.entry.data)
    with pytest.raises(Rejected) as caught:
        check_event(pack(kept, event.portions), COMMITTEE)
    assert caught.value.reason == Reason.PORTION_MISMATCH


@pytest.mark.parametrize("kind", [Kind.SOURCE, Kind.REVOCATION])
def test_source_or_revocation_of_two_items_is_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    assert_malformed(lambda: remake(TOLD.run, event, items=listed(event) * 2), Reason.PORTION_MISMATCH)


@pytest.mark.parametrize("kind", [kind for kind in Kind if SHAPES[kind].data])
def test_data_portion_without_items_is_refused(kind: Kind) -> None:
    assert_malformed(lambda: remake(TOLD.run, EVENTS[kind], items=[]), Reason.PORTION_MISMATCH)


@pytest.mark.parametrize("kind", [Kind.SOURCE, Kind.REVOCATION, Kind.CAMPAIGN, Kind.GRANT])
def test_examples_smuggled_beside_an_item_that_names_none_are_refused(kind: Kind) -> None:
    """They are in no commitment: two members could hold different portions of one event."""
    event = EVENTS[kind]
    items = [(content, (1, 2)) for content, _ in listed(event)]
    assert_malformed(lambda: remake(TOLD.run, event, items=items), Reason.PORTION_MISMATCH)


@pytest.mark.parametrize("kind", [Kind.STEP, Kind.REFUSAL])
def test_examples_that_do_not_hash_to_the_items_root_are_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    items = [(content, (*examples[:-1], 2**40) if examples else ()) for content, examples in listed(event)]
    forged = remade(TOLD.run, event, items=items, recommit=False)
    assert_malformed(lambda: check_event(forged, COMMITTEE), Reason.PORTION_MISMATCH)


@pytest.mark.parametrize("kind", [Kind.STEP, Kind.REFUSAL])
def test_examples_out_of_order_or_repeated_are_refused(kind: Kind) -> None:
    event = EVENTS[kind]
    number = next(n for n, (_, examples) in enumerate(listed(event)) if len(examples) > 1)
    for wrong in (lambda e: e[::-1], lambda e: (e[0], *e[:-1])):
        items = listed(event)
        items[number] = (items[number][0], wrong(items[number][1]))
        assert_malformed(lambda: remake(TOLD.run, event, items=items), Reason.BAD_FIELD)  # noqa: B023


@pytest.mark.parametrize(("kind", "field"), [(Kind.STEP, "admitted"), (Kind.REFUSAL, "count")])
def test_item_that_counts_otherwise_than_it_lists_is_refused(kind: Kind, field: str) -> None:
    event = EVENTS[kind]
    items = [(tell(content, **{field: len(examples) + 1}), examples) for content, examples in listed(event)]
    assert_malformed(lambda: remake(TOLD.run, event, items=items), Reason.COUNTS_NOT_CONSERVED)


# Bytes


def test_entry_above_its_size_is_refused() -> None:
    event = EVENTS[Kind.SOURCE]
    assert_malformed(
        lambda: check_event(pack_parts(bytes(MAX_ENTRY_BYTES + 1), event.portions_bytes), COMMITTEE), Reason.OVERSIZED
    )
    assert_malformed(
        lambda: check_event(pack_parts(event.entry_bytes, bytes(p.MAX_PORTIONS_BYTES + 1)), COMMITTEE),
        Reason.OVERSIZED,
    )


def test_entry_with_sixty_four_of_the_largest_signatures_is_above_the_size_of_a_leaf() -> None:
    event = EVENTS[Kind.GRANT]
    signatures = tuple(EventSignature(digest(number), bytes(3_309)) for number in range(64))
    large = msgspec.structs.replace(event.entry, signatures=signatures)
    assert_malformed(lambda: check_event(pack(large, event.portions), COMMITTEE), Reason.OVERSIZED)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(Kind)), st.integers(min_value=0), st.integers(1, 255), st.booleans())
def test_event_with_any_byte_changed_is_refused_or_is_not_that_event(
    kind: Kind, position: int, difference: int, in_entry: bool
) -> None:
    event = EVENTS[kind]
    parts = [bytearray(event.entry_bytes), bytearray(event.portions_bytes)]
    changed = parts[0] if in_entry else parts[1]
    changed[position % len(changed)] ^= difference
    with pytest.raises(Rejected):
        check_event(pack_parts(bytes(parts[0]), bytes(parts[1])), COMMITTEE)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(Kind)), st.integers(min_value=0), st.integers(1, 255))
def test_wire_form_with_any_byte_changed_is_refused(kind: Kind, position: int, difference: int) -> None:
    encoded = bytearray(wire(EVENTS[kind]))
    encoded[position % len(encoded)] ^= difference
    with pytest.raises(Rejected):
        check_event(bytes(encoded), COMMITTEE)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(Kind)), st.integers(min_value=0), st.binary(max_size=8))
def test_event_cut_short_or_continued_is_refused(kind: Kind, cut: int, tail: bytes) -> None:
    encoded = wire(EVENTS[kind])
    shorter = encoded[: cut % len(encoded)]
    with pytest.raises(Rejected):
        check_event(shorter + tail, COMMITTEE)
    if tail:
        with pytest.raises(Rejected):
            check_event(encoded + tail, COMMITTEE)


def test_wire_form_is_taken_apart_unchecked() -> None:
    event = EVENTS[Kind.STEP]
    assert unpack(wire(event)) == SignedEvent(event.entry_bytes, event.portions_bytes)


def test_all_kinds_have_a_shape() -> None:
    assert set(SHAPES) == set(Kind)
    assert opened().ledger.events
