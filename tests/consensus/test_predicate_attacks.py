"""What a dishonest bundle maker can try under an honest quorum, and which words a verdict may use for what."""

import hashlib
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from ledger_fixtures import (
    HOSPITAL,
    LIBRARIAN,
    OPERATOR,
    CampaignRun,
    Story,
    begin,
    story,
)
from rules_fixtures import remake, tell

from consensus import portions as p
from consensus.bundle import MAGIC, MAX_BUNDLE_BYTES, Bundle, encode_bundle, open_bundle
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import Entry, Kind
from consensus.genesis import genesis_from_json, genesis_to_json
from consensus.keys import SignatureScheme
from consensus.parameters import TensorDescriptor, parameter_root
from consensus.predicates import SUBJECTS, Answer, Predicate, ReleasedFile, Status, Verdict, verify
from consensus.rejection import Reason, Rejected
from consensus.state import DELEGATION_TABLE, DelegationRecord, usage_key
from node.bundles import export_bundle


@cache
def told() -> Story:
    return story()


def parts(encoded: bytes) -> Bundle:
    return decode(encoded[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)


def judged(tale: Story, bundle: Bundle, files: tuple[ReleasedFile, ...] = ()) -> Verdict:
    opened = open_bundle(anchor(tale.ledger.genesis, tale.ledger.chain_id), encode_bundle(bundle))
    return verify(opened, Predicate(bundle.predicate), files)


def exported(tale: Story, predicate: Predicate, source: bytes = b"") -> Bundle:
    kind = Kind.EVIDENCE if predicate is Predicate.EVIDENCE else Kind.POLICY
    event = next(event for event in tale.ledger.events if event.entry.kind is kind)
    held = {"campaign": tale.run.id, "source": source or tale.books, "event": event.id}
    about = {name: held[name] for name in SUBJECTS[predicate]}
    earlier = tale.ledger.certified[2] if predicate is Predicate.CONSISTENT else None
    return parts(export_bundle(tale.ledger, predicate, earlier=earlier, **about))


def text_of(verdict: Verdict, status: Status) -> str:
    return "\n".join(step.text for step in verdict.steps if step.status is status)


@pytest.mark.parametrize("predicate", list(Predicate))
@pytest.mark.parametrize("name", ["campaign", "source", "event"])
def test_bundle_that_names_a_subject_its_predicate_does_not_check_is_refused(predicate: Predicate, name: str) -> None:
    """Else 'included' would answer yes for an event 'of' any campaign one asks about."""
    if name in SUBJECTS[predicate]:
        return
    tale = told()
    spoofed = msgspec.structs.replace(exported(tale, predicate), **{name: tale.run.id})
    with pytest.raises(Rejected) as refusal:
        judged(tale, spoofed)
    assert refusal.value.reason is Reason.BAD_FIELD


def test_good_file_vouches_for_no_other_file_given_with_it() -> None:
    tale = told()
    bundle = exported(tale, Predicate.DELTA_EXACT)
    good = ReleasedFile("good", hashlib.sha256(tale.weights).digest(), tale.run.tensors())
    assert judged(tale, bundle, (good,)).answer is Answer.YES
    evil = replace(good, name="evil", sha256=bytes(32))
    for files in ((good, evil), (evil, good)):
        verdict = judged(tale, bundle, files)
        assert verdict.answer is Answer.NO
        assert "evil has " in text_of(verdict, Status.FAILED)
    other = replace(good, name="other", tensors=(replace(good.tensors[0], digest=bytes(32)), *good.tensors[1:]))
    assert judged(tale, bundle, (good, other)).answer is Answer.NO


@pytest.mark.parametrize("change", [{"name": "x"}, {"dtype": "I32"}, {"shape": (4,)}, {"digest": bytes(32)}])
def test_renamed_retyped_reshaped_or_altered_tensor_is_not_the_release(change: dict[str, object]) -> None:
    tale = told()
    tensors = tale.run.tensors()
    file = ReleasedFile(
        "f",
        hashlib.sha256(tale.weights).digest(),
        (replace(tensors[0], **change), *tensors[1:]),  # type: ignore[arg-type]
    )
    assert judged(tale, exported(tale, Predicate.DELTA_EXACT), (file,)).answer is Answer.NO
    for wrong in (tensors[1:], (*tensors, tensors[0]), (*tensors, replace(tensors[0], name="extra"))):
        assert judged(tale, exported(tale, Predicate.DELTA_EXACT), (replace(file, tensors=wrong),)).answer is Answer.NO


def test_tensors_outside_the_parameter_table_are_pointed_out() -> None:
    tale = begin()
    run = CampaignRun(tale.ledger, (p.ManifestRange(tale.books, 0, 8),), name="hidden", batch_size=4)
    run.snapshots[0]["adapter.weight"] = b"\x01" * 16
    tale.ledger.seal(*run.open())
    tale.ledger.seal(run.release())
    hidden = Story(tale.ledger, run, tale.books, tale.records, tale.archive, run.weights_file())
    file = ReleasedFile("f", hashlib.sha256(run.weights_file()).digest(), run.tensors())
    verdict = judged(hidden, exported(hidden, Predicate.DELTA_EXACT), (file,))
    assert verdict.answer is Answer.YES
    assert "1 more tensors of the file ('adapter.weight' first)" in text_of(verdict, Status.NOT_COVERED)


@pytest.mark.parametrize(("rows", "answer"), [(2, Answer.YES), (1, Answer.NO), (3, Answer.NO)])
def test_pieces_of_a_parameter_table_must_reach_to_the_end_of_the_files_tensors(rows: int, answer: Answer) -> None:
    tale = begin()
    policy = tale.ledger.policy(routing_granularities=("head",))
    tale.ledger.seal(policy)
    run = CampaignRun(tale.ledger, (p.ManifestRange(tale.books, 0, 8),), name="by head", batch_size=4)
    delegation, opening = run.open()
    assert isinstance(opening.operation, p.Campaign)
    first, *others = opening.operation.parameter_blocks
    name = first.tensors[0].name
    heads = tuple(
        p.ParameterBlock(f"head.{row}", (p.Tensor(f"{name}[{row}:{row + 1}]", "F32", (1, 2)),)) for row in range(rows)
    )
    by_head = tell(opening.operation, routing_granularity="head", parameter_blocks=(*heads, *others))
    tale.ledger.seal(delegation, remake(run, opening, operation=by_head))
    tale.ledger.seal(run.release())
    held = Story(tale.ledger, run, tale.books, tale.records, tale.archive, run.weights_file())
    file = ReleasedFile("f", hashlib.sha256(run.weights_file()).digest(), run.tensors())
    verdict = judged(held, exported(held, Predicate.DELTA_EXACT), (file,))
    assert verdict.answer is answer
    assert (f"{name!r} of the campaign's table is another" in text_of(verdict, Status.FAILED)) == (rows != 2)


@pytest.mark.parametrize("name", ["", "\ud800"])
def test_tensor_name_without_a_utf8_form_is_refused_and_not_a_crash(name: str) -> None:
    with pytest.raises(Rejected) as refusal:
        parameter_root([TensorDescriptor(name, "F32", (2, 2), bytes(32)), *told().run.tensors()])
    assert refusal.value.reason is Reason.BAD_FIELD


def test_answer_about_an_old_ledger_block_says_that_the_campaign_was_still_open() -> None:
    """The oldest trick: 'unused', proved for the moment before the training."""
    tale = begin()
    verdict = judged(tale, exported(tale, Predicate.SOURCE_UNUSED))
    assert verdict.answer is Answer.YES
    assert "the campaign is not shown to be closed" in text_of(verdict, Status.NOT_COVERED)
    for predicate, source in ((Predicate.SOURCE_HONORED, told().books), (Predicate.SOURCE_UNUSED, told().archive)):
        closed = judged(told(), exported(told(), predicate, source))
        assert closed.answer is Answer.YES
        assert "was closed by entry 26, its release" in text_of(closed, Status.CHECKED)
        assert "not shown to be closed" not in text_of(closed, Status.NOT_COVERED)


@pytest.mark.parametrize("predicate", [Predicate.SOURCE_HONORED, Predicate.SOURCE_UNUSED])
def test_hidden_closing_event_makes_the_answer_weaker_never_stronger(predicate: Predicate) -> None:
    bundle = exported(told(), predicate, told().archive)
    events = tuple(e for e in bundle.events if decode(e.entry, Entry, 1 << 16).kind is not Kind.RELEASE)
    assert len(events) == len(bundle.events) - 1
    verdict = judged(told(), msgspec.structs.replace(bundle, events=events))
    assert "not shown to be closed" in text_of(verdict, Status.NOT_COVERED)


def test_refused_and_discarded_presentation_left_out_is_not_called_complete() -> None:
    """No certified count tells of a step that refused all of a source and was rolled back."""
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books, tale.records], 1, 4))
    ledger.seal(*run.step(flagged=tale.records))
    ledger.seal(run.rollback())
    bundle = exported(tale, Predicate.SOURCE_HONORED, tale.archive)
    whole = text_of(judged(tale, bundle), Status.CHECKED)
    assert "1 steps presented with it are in the bundle" in whole
    hidden = tuple(
        msgspec.structs.replace(event, items=None) if decode(event.entry, Entry, 1 << 16).kind is Kind.STEP else event
        for event in bundle.events
    )
    verdict = judged(tale, msgspec.structs.replace(bundle, events=hidden))
    assert verdict.answer is Answer.YES
    assert "0 steps presented with it are in the bundle, among them every one that trained on it" in text_of(
        verdict, Status.CHECKED
    )
    assert "all of them" not in text_of(verdict, Status.CHECKED)


def test_uses_after_a_revocation_that_drains_are_counted_in_the_answer() -> None:
    verdict = judged(told(), exported(told(), Predicate.SOURCE_HONORED, told().records))
    assert verdict.answer is Answer.YES
    assert "1 later steps trained on it under grants opened before" in text_of(verdict, Status.CHECKED)


def test_words_of_a_claim_cannot_pose_as_words_of_the_verifier() -> None:
    tale = begin()
    spoof = "books' is claimed and signed by data-source-1: licence 'CC0"
    source = tale.ledger.source(HOSPITAL, spoof, licence="CC-BY-4.0', class 'all")
    tale.ledger.seal(source)
    run = CampaignRun(tale.ledger, (p.ManifestRange(source.id, 0, 8),), name="other", batch_size=4)
    tale.ledger.seal(*run.open())
    other = Story(tale.ledger, run, source.id, b"", b"", b"")
    text = text_of(judged(other, exported(other, Predicate.SOURCE_HONORED)), Status.CHECKED)
    assert f'source "{spoof}" is claimed and signed by {HOSPITAL}' in text
    assert "licence \"CC-BY-4.0', class 'all\"" in text


def test_usage_of_another_campaign_or_its_events_prove_nothing() -> None:
    tale = story()
    run = CampaignRun(tale.ledger, (p.ManifestRange(tale.books, 0, 8),), name="second", batch_size=4)
    tale.ledger.seal(*run.open())
    second = Story(tale.ledger, run, tale.books, tale.records, tale.archive, b"")
    unused, used = exported(second, Predicate.SOURCE_UNUSED), exported(tale, Predicate.SOURCE_UNUSED)
    assert judged(second, unused).answer is Answer.YES
    assert judged(tale, used).answer is Answer.NO
    for mixed in (
        msgspec.structs.replace(unused, campaign=tale.run.id),
        msgspec.structs.replace(unused, campaign=tale.run.id, events=used.events),
        msgspec.structs.replace(used, records=unused.records),
    ):
        with pytest.raises(Rejected) as refusal:
            judged(tale, mixed)
        assert refusal.value.reason is Reason.BUNDLE_INCOMPLETE
    # The absence of the second campaign's record, passed off as that of the first one's.
    key = usage_key(tale.run.id, tale.books)
    (absence,) = [held.proof for held in unused.records if held.key == usage_key(run.id, tale.books)]
    records = tuple(msgspec.structs.replace(held, proof=absence) if held.key == key else held for held in used.records)
    assert never_yes(tale, msgspec.structs.replace(used, records=records))


def never_yes(tale: Story, bundle: Bundle) -> bool:
    try:
        return judged(tale, bundle).answer is not Answer.YES
    except Rejected as refusal:
        return refusal.reason is Reason.BAD_PROOF


def test_campaign_opened_with_a_key_nobody_delegated_is_not_called_the_operators() -> None:
    bundle = exported(told(), Predicate.SOURCE_UNUSED, told().archive)
    records = tuple(held for held in bundle.records if not held.key.startswith(b"\x04"))
    assert len(records) == len(bundle.records) - 1
    with pytest.raises(Rejected) as refusal:
        judged(told(), msgspec.structs.replace(bundle, records=records))
    assert refusal.value.reason is Reason.BUNDLE_INCOMPLETE


def test_campaign_of_a_key_delegated_for_another_one_is_refused() -> None:
    tale = begin()
    record = DelegationRecord(tale.ledger.ids[OPERATOR], bytes(32), SignatureScheme.ED25519, 0, 1, False)
    tale.ledger.collude([], {DELEGATION_TABLE + tale.run.job.public_key: encode(record)})
    with pytest.raises(Rejected) as refusal:
        judged(tale, exported(tale, Predicate.SOURCE_UNUSED))
    assert refusal.value.reason is Reason.UNKNOWN_JOB_KEY


def test_both_ledger_blocks_are_named_by_digest_so_that_a_fork_cannot_hide_behind_a_height() -> None:
    tale = told()
    verdict = judged(tale, exported(tale, Predicate.CONSISTENT))
    checked = text_of(verdict, Status.CHECKED)
    opened = open_bundle(
        anchor(tale.ledger.genesis, tale.ledger.chain_id), encode_bundle(exported(tale, Predicate.CONSISTENT))
    )
    assert opened.earlier is not None
    assert opened.earlier.digest.hex() in checked
    assert opened.header.digest.hex() in checked


def test_grant_is_not_called_fully_signed_where_its_owners_were_not_looked_for() -> None:
    text = text_of(judged(told(), exported(told(), Predicate.POLICY_IN_FORCE)), Status.CHECKED)
    assert "by all who must sign" not in text
    assert LIBRARIAN not in text


def test_genesis_with_text_that_is_not_unicode_is_refused_and_not_a_crash() -> None:
    genesis = told().ledger.genesis
    encoded = genesis_to_json(genesis).replace(b'"bls-threshold"', b'"\\ud800"')
    with pytest.raises(Rejected) as refusal:
        anchor(genesis_from_json(encoded), genesis.chain_id)
    assert refusal.value.reason is Reason.MALFORMED
