"""What a campaign owes to a revoked source: told whole, proved where it owes nothing, and never a no by concealment."""

from collections.abc import Callable
from functools import cache

import msgspec
import pytest
from ledger_fixtures import HOSPITAL, LIBRARIAN, Story, begin, digest, story
from rules_fixtures import remake, tell

from consensus import portions as p
from consensus.bundle import MAGIC, MAX_BUNDLE_BYTES, Bundle, BundleEvent, encode_bundle, open_bundle
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import Entry, Kind
from consensus.predicates import Answer, Predicate, Status, Verdict, verify
from consensus.predicates.history import job_events
from consensus.predicates.source_uses import grant_of, uses_of_source
from consensus.rejection import Reason, Rejected
from consensus.state import SOURCE_TABLE, SourceRecord, Usage, read_record, usage_key
from node.bundles import export_bundle


@cache
def told() -> Story:
    return story()


def exported(tale: Story, source: bytes) -> Bundle:
    encoded = export_bundle(tale.ledger, Predicate.REVOCATION_EXPOSURE, campaign=tale.run.id, source=source)
    return decode(encoded[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)


def judged(tale: Story, bundle: Bundle) -> Verdict:
    opened = open_bundle(anchor(tale.ledger.genesis, tale.ledger.chain_id), encode_bundle(bundle))
    return verify(opened, Predicate.REVOCATION_EXPOSURE)


def exposure(tale: Story, source: bytes) -> Verdict:
    return judged(tale, exported(tale, source))


def refused(tale: Story, bundle: Bundle, reason: Reason) -> str:
    with pytest.raises(Rejected) as refusal:
        judged(tale, bundle)
    assert refusal.value.reason is reason
    return refusal.value.detail


def texts(verdict: Verdict, status: Status) -> list[str]:
    return [step.text for step in verdict.steps if step.status is status]


def told_of(verdict: Verdict, status: Status, begins: str) -> str:
    (found,) = [text for text in texts(verdict, status) if text.startswith(begins)]
    return found


def of_kind(bundle: Bundle, kind: Kind, change: Callable[[BundleEvent], BundleEvent]) -> Bundle:
    """The bundle with its events of a kind changed."""
    events = tuple(
        change(event) if decode(event.entry, Entry, 1 << 16).kind is kind else event for event in bundle.events
    )
    return msgspec.structs.replace(bundle, events=events)


def closing(portion: str) -> Callable[[BundleEvent], BundleEvent]:
    return lambda event: msgspec.structs.replace(event, **{portion: None})


# Exposed


def test_steps_before_and_after_the_revocation_its_momentum_and_the_release_are_told() -> None:
    verdict = exposure(told(), told().records)
    assert verdict.answer is Answer.YES
    revoked = told_of(verdict, Status.CHECKED, "data-source-2 revoked it")
    assert revoked == "data-source-2 revoked it, entry 16, at 1700000009000 ms"
    assert "3 steps trained on it (1, 2, 3)" in told_of(verdict, Status.CHECKED, "before the revocation")
    assert "1 steps trained on it (4)" in told_of(verdict, Status.CHECKED, "after it")
    drained = told_of(verdict, Status.CHECKED, "1 steps trained on it (4)")
    assert "ran under grant 1, opened before it (revocation: 'drain'); for steps up to 4, until " in drained
    assert "is carried on" in told_of(verdict, Status.CHECKED, "momentum")
    assert "at step 5 at most 500000000 billionths" in told_of(verdict, Status.ATTESTED, "that at step")
    assert "more were admitted to steps that were discarded" in "\n".join(texts(verdict, Status.CHECKED))
    release = told_of(verdict, Status.CHECKED, "released 'model.safetensors'")
    assert told().run.root().hex() in release
    assert release.endswith("entry 26, after the revocation; its steps are among those released")


def after_a_release(momentum: str = "carry") -> Story:
    """``records`` trained on, released, then revoked."""
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(ledger.policy(momentum=momentum))
    ledger.seal(run.grant([tale.books, tale.records], 1, 4))
    ledger.seal(*run.step())
    ledger.seal(run.release())
    ledger.seal(ledger.revocation(HOSPITAL, tale.records))
    return tale


def test_release_before_the_revocation_is_told_apart_and_its_momentum_is_not_settled() -> None:
    tale = after_a_release()
    verdict = exposure(tale, tale.records)
    assert verdict.answer is Answer.YES
    assert "before the revocation; its steps are" in told_of(verdict, Status.CHECKED, "released 'model")
    assert told_of(verdict, Status.CHECKED, "after it") == "after it: no step trained on it"
    assert "not settled" in told_of(verdict, Status.CHECKED, "momentum")


def test_flushed_momentum_is_checked_to_be_recorded_and_attested_to_be_dropped() -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(ledger.policy(momentum="flush"))
    ledger.seal(run.grant([tale.books, tale.records], 1, 4))
    ledger.seal(*run.step())
    ledger.seal(ledger.revocation(HOSPITAL, tale.records))
    ledger.seal(run.grant([tale.books], 2, 4))
    ledger.seal(*run.step())
    verdict = exposure(tale, tale.records)
    assert verdict.answer is Answer.YES
    assert told_of(verdict, Status.CHECKED, "momentum").endswith("had a part in was flushed")
    assert told_of(verdict, Status.ATTESTED, "that the state was dropped") == "that the state was dropped: operator-1"
    assert "not shown to be closed" in told_of(verdict, Status.NOT_COVERED, "what came after")


def test_campaign_given_up_released_nothing() -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books, tale.records], 1, 4))
    ledger.seal(*run.step())
    ledger.seal(run.written(Kind.ABANDON, p.Portions(None, None, ledger.salted(p.Abandon("no more money")))))
    ledger.seal(ledger.revocation(HOSPITAL, tale.records))
    verdict = exposure(tale, tale.records)
    assert verdict.answer is Answer.YES
    assert told_of(verdict, Status.CHECKED, "the campaign was closed").endswith("its abandon: nothing released")


# Not exposed


def test_source_that_is_not_revoked_exposes_nothing() -> None:
    verdict = exposure(told(), told().books)
    assert verdict.answer is Answer.NO
    (failed,) = texts(verdict, Status.FAILED)
    assert failed == "data-source-1 revoked it: as of this ledger block it is not revoked"
    assert "revocation;" not in "\n".join(texts(verdict, Status.CHECKED))


@pytest.mark.parametrize("presented", [True, False])
def test_revoked_source_that_no_step_trained_on_is_proved_not_to_be_in_it(presented: bool) -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    stray = ledger.source(HOSPITAL, "stray")
    ledger.seal(stray)
    ledger.seal(run.grant([tale.books], 1, 4))
    ledger.seal(*run.step())
    source = tale.archive if presented else stray.id
    ledger.seal(ledger.revocation(HOSPITAL, source))
    ledger.seal(run.release())
    verdict = exposure(tale, source)
    assert verdict.answer is Answer.NO
    (failed,) = texts(verdict, Status.FAILED)
    assert failed.endswith("none was, as the state counts")
    assert told_of(verdict, Status.CHECKED, "released").endswith("with no step of it")


def test_source_of_discarded_steps_alone_is_in_nothing_that_stands() -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books, tale.records], 1, 4))
    ledger.seal(*run.step(flagged=tale.records))
    ledger.seal(run.rollback())
    ledger.seal(ledger.revocation(HOSPITAL, tale.records))
    verdict = exposure(tale, tale.records)
    assert verdict.answer is Answer.NO
    assert "to steps that were discarded" in "\n".join(texts(verdict, Status.CHECKED))


# What a bundle hides


def test_bundle_says_nothing_of_other_sources() -> None:
    encoded = encode_bundle(exported(told(), told().records))
    assert told().records in encoded
    assert told().books not in encoded
    assert told().archive not in encoded


def test_hidden_use_is_refused_and_never_a_no() -> None:
    bundle = of_kind(exported(told(), told().records), Kind.STEP, closing("items"))
    assert "the bundle shows 0 admitted" in refused(told(), bundle, Reason.COUNTS_NOT_CONSERVED)


def test_usage_that_the_state_counts_too_low_is_refused() -> None:
    tale = after_a_release()
    key = usage_key(tale.run.id, tale.records)
    value = tale.ledger.state.get(key)
    assert value is not None
    tale.ledger.collude([], {key: encode(msgspec.structs.replace(read_record(value, Usage), admitted=0))})
    refused(tale, exported(tale, tale.records), Reason.COUNTS_NOT_CONSERVED)


def test_hidden_release_is_not_taken_for_none() -> None:
    bundle = exported(told(), told().records)
    events = tuple(event for event in bundle.events if decode(event.entry, Entry, 1 << 16).kind is not Kind.RELEASE)
    verdict = judged(told(), msgspec.structs.replace(bundle, events=events))
    assert verdict.answer is Answer.YES
    assert "or a release may change the answer" in told_of(verdict, Status.NOT_COVERED, "what came after")


def test_closed_portions_are_said_to_be_closed_and_the_rest_stays_told() -> None:
    bundle = exported(told(), told().records)
    for kind, portion in ((Kind.GRANT, "governance"), (Kind.RELEASE, "operation"), (Kind.STEP, "operation")):
        bundle = of_kind(bundle, kind, closing(portion))
    verdict = judged(told(), bundle)
    assert verdict.answer is Answer.YES
    assert told_of(verdict, Status.CHECKED, "1 steps trained").endswith("ran under grant 1, opened before it")
    assert told_of(verdict, Status.CHECKED, "released: entry 26").endswith("among those released")
    assert not [text for text in texts(verdict, Status.ATTESTED) if text.startswith("that at step")]
    hidden = judged(told(), of_kind(bundle, Kind.STEP, closing("governance")))
    assert hidden.answer is Answer.YES
    assert "1 later steps ran" in told_of(hidden, Status.NOT_COVERED, "under which grants")


def test_claim_that_is_not_disclosed_leaves_the_answer_open() -> None:
    bundle = of_kind(exported(told(), told().records), Kind.SOURCE, closing("data"))
    assert judged(told(), bundle).answer is Answer.UNKNOWN


def test_step_that_the_counts_leave_out_was_discarded_though_its_rollback_is_not_disclosed() -> None:
    bundle = of_kind(exported(told(), told().records), Kind.ROLLBACK, closing("operation"))
    verdict = judged(told(), bundle)
    assert verdict.answer is Answer.YES
    assert "3 steps trained on it (1, 2, 3)" in told_of(verdict, Status.CHECKED, "before the revocation")


def test_step_before_a_rollback_that_is_not_disclosed_may_have_been_discarded() -> None:
    """The rollback is of a step that never reached the log."""
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books, tale.records], 1, 4))
    ledger.seal(*run.step())
    root, undone = run.root(), run.rollback("operator-decision")
    assert isinstance(undone.operation, p.Rollback)
    elsewhere = tell(undone.operation, discarded=(digest("off the log"),), restored_root=root, next_index=2)
    ledger.seal(remake(run, undone, operation=elsewhere))
    ledger.seal(ledger.revocation(HOSPITAL, tale.records))
    assert exposure(tale, tale.records).answer is Answer.YES
    verdict = judged(tale, of_kind(exported(tale, tale.records), Kind.ROLLBACK, closing("operation")))
    assert verdict.answer is Answer.UNKNOWN
    assert "of which 1 may have been discarded" in told_of(verdict, Status.CHECKED, "before the revocation")


# Logs that traitors in every role wrote


def with_record(tale: Story, **changes: object) -> Bundle:
    key = SOURCE_TABLE + tale.records
    value = tale.ledger.state.get(key)
    assert value is not None
    tale.ledger.collude([], {key: encode(msgspec.structs.replace(read_record(value, SourceRecord), **changes))})
    return exported(tale, tale.records)


def test_revocation_that_its_owner_did_not_sign_is_refused() -> None:
    tale = after_a_release()
    other = tale.ledger.revocation(LIBRARIAN, tale.books)
    tale.ledger.seal(other)
    assert "no revocation by the source's owner" in refused(
        tale, with_record(tale, revocation=other.id), Reason.BUNDLE_INCOMPLETE
    )
    tale = after_a_release()
    refused(tale, with_record(tale, revocation=tale.books), Reason.BUNDLE_INCOMPLETE)


def test_claim_that_is_not_the_signed_one_is_refused() -> None:
    tale = after_a_release()
    bundle = with_record(tale, author=tale.ledger.ids[LIBRARIAN])
    assert "another author" in refused(tale, bundle, Reason.BUNDLE_INCOMPLETE)
    tale = after_a_release()
    value = tale.ledger.state.get(SOURCE_TABLE + tale.records)
    assert value is not None
    claim = msgspec.structs.replace(read_record(value, SourceRecord).claim, licence="CC0-1.0")
    assert "another claim" in refused(tale, with_record(tale, claim=claim), Reason.BUNDLE_INCOMPLETE)


def test_event_that_is_no_grant_of_the_campaign_grants_nothing() -> None:
    opened = open_bundle(
        anchor(told().ledger.genesis, told().ledger.chain_id), encode_bundle(exported(told(), told().records))
    )
    use = uses_of_source(opened, job_events(opened))[0]
    assert isinstance(use.step.event.governance, p.StepGovernance)
    assert grant_of(opened, use, use.step.event.governance).kind is Kind.GRANT
    for elsewhere in (told().records, use.step.event.id, bytes(32)):
        named = msgspec.structs.replace(use.step.event.governance, grant=elsewhere)
        with pytest.raises(Rejected) as refusal:
            grant_of(opened, use, named)
        assert refusal.value.reason is Reason.BUNDLE_INCOMPLETE


def test_use_under_a_grant_opened_after_the_revocation_is_named_as_such() -> None:
    tale = begin()
    ledger = tale.ledger
    value = ledger.state.get(SOURCE_TABLE + tale.records)
    assert value is not None
    unrevoked = read_record(value, SourceRecord)
    ledger.seal(ledger.revocation(HOSPITAL, tale.records))
    ledger.seal_lying(tale.run.grant([tale.books, tale.records], 1, 3), lies={SOURCE_TABLE + tale.records: unrevoked})
    ledger.seal(*tale.run.step())
    verdict = exposure(tale, tale.records)
    assert verdict.answer is Answer.YES
    assert "opened after it, which source-honored refuses" in told_of(verdict, Status.CHECKED, "1 steps trained")
