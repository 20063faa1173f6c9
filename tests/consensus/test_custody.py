"""Custody: who says that it holds what a campaign committed to, what the word is worth, and what waits for it."""

from collections.abc import Iterable

import msgspec
import pytest
from ledger_fixtures import GOVERNANCE, HOSPITAL, LIBRARIAN, OPERATOR, CampaignRun, Story, begin, digest
from rules_fixtures import SEVERAL, assert_admitted, assert_refused, head_of, remake

from consensus.bundle import MAGIC, MAX_BUNDLE_BYTES, Bundle, encode_bundle, open_bundle
from consensus.codec import decode
from consensus.epochs import anchor
from consensus.event import CheckedEvent
from consensus.membership import ED25519_LIST
from consensus.predicates import Answer, Predicate, Status, verify
from consensus.rejection import Reason, Rejected
from consensus.state import CUSTODY_TABLE, CustodyRecord, read_record, review_key, review_prefix
from node.bundles import export_bundle

ROOT = digest("the root of a window")
VERIFIER = "verifier-1"


def taken(custody: Iterable[str] = (), steps: int = 2, window_steps: int = 2) -> Story:
    """A campaign that took some steps, opened under a policy that wants its files in custody of these roles."""
    told = begin(counts=SEVERAL, certificate_scheme=ED25519_LIST)
    ledger = told.ledger
    ledger.seal(ledger.policy(custody=tuple(custody)))
    run = CampaignRun(ledger, told.run.manifest, "held", accumulator_window_steps=window_steps)
    ledger.seal(*run.open())
    ledger.seal(run.grant([told.books, told.records], 1, 100))
    held = Story(ledger, run, told.books, told.records, told.archive, b"")
    for step in range(1, steps + 1):
        ends = bool(window_steps) and step % window_steps == 0
        ledger.seal(*run.step(accumulator_root=ROOT if ends else b""))
    return held


def word(told: Story, custodian: str = HOSPITAL, last_event: bytes = b"") -> CheckedEvent:
    return told.ledger.custody(custodian, told.run.id, last_event or head_of(told.run).last_event)


def said(told: Story, custodian: str = HOSPITAL) -> CheckedEvent:
    event = word(told, custodian)
    told.ledger.seal(event)
    return event


# The word


@pytest.mark.parametrize("custodian", [HOSPITAL, LIBRARIAN, GOVERNANCE, VERIFIER])
def test_member_that_is_no_operator_says_so_in_its_own_name(custodian: str) -> None:
    told = taken()
    event = said(told, custodian)
    value = told.ledger.state.get(review_key(CUSTODY_TABLE, told.run.id, told.ledger.ids[custodian]))
    assert value is not None
    record = read_record(value, CustodyRecord)
    assert (record.event, record.custodian) == (event.id, told.ledger.ids[custodian])
    assert (record.campaign, record.last_event) == (told.run.id, head_of(told.run).last_event)


def test_operator_holds_nothing_for_others() -> None:
    told = taken()
    with pytest.raises(Rejected) as caught:
        word(told, OPERATOR)
    assert caught.value.reason is Reason.WRONG_ROLE


def test_word_about_an_event_that_is_not_the_campaigns_last_is_refused() -> None:
    told = taken()
    early = word(told)
    assert_refused(told.ledger, word(told, last_event=digest("another")), Reason.STEP_CHAIN_BROKEN)
    told.ledger.seal(*told.run.step())
    assert_refused(told.ledger, early, Reason.STEP_CHAIN_BROKEN)


def test_word_given_twice_is_refused_and_a_later_one_replaces_it() -> None:
    told = taken()
    first = said(told)
    assert_refused(told.ledger, first, Reason.DUPLICATE)
    assert_refused(told.ledger, word(told), Reason.DUPLICATE)
    told.ledger.seal(*told.run.step())
    later = said(told)
    value = told.ledger.state.get(review_key(CUSTODY_TABLE, told.run.id, told.ledger.ids[HOSPITAL]))
    assert value is not None
    assert read_record(value, CustodyRecord).event == later.id


def test_word_about_a_campaign_without_accumulators_or_none_at_all_is_refused() -> None:
    told = taken(window_steps=0)
    assert_refused(told.ledger, word(told), Reason.BAD_FIELD)
    unknown = told.ledger.custody(HOSPITAL, digest("no campaign"), digest("an event"))
    assert_refused(told.ledger, unknown, Reason.UNKNOWN_CAMPAIGN)


@pytest.mark.parametrize("place", [{"sequence": 1}, {"attempt": 1}])
def test_word_with_a_number_of_the_jobs_is_refused(place: dict[str, object]) -> None:
    told = taken()
    assert_refused(told.ledger, remake(told.run, word(told), **place), Reason.BAD_FIELD)


def test_word_may_come_after_the_release() -> None:
    told = taken()
    told.ledger.seal(told.run.release())
    assert_admitted(told.ledger, word(told))


# What waits for it


def test_release_waits_until_each_role_of_the_policy_holds_the_files() -> None:
    told = taken(custody=("data-source", "verifier"))
    release = told.run.release()
    assert "no data-source member" in assert_refused(told.ledger, release, Reason.CUSTODY_MISSING)
    said(told, HOSPITAL)
    assert "no verifier member" in assert_refused(told.ledger, release, Reason.CUSTODY_MISSING)
    said(told, VERIFIER)
    told.ledger.seal(release)
    assert head_of(told.run).closed == "released"


def test_members_of_other_roles_do_not_stand_in() -> None:
    told = taken(custody=("verifier",))
    said(told, HOSPITAL)
    said(told, GOVERNANCE)
    assert_refused(told.ledger, told.run.release(), Reason.CUSTODY_MISSING)


def test_word_from_before_the_last_step_or_its_rollback_releases_nothing() -> None:
    told = taken(custody=("data-source",), steps=3)
    said(told)
    told.ledger.seal(*told.run.step(flagged=told.records, accumulator_root=ROOT))
    rollback = told.run.rollback()
    said(told)
    told.ledger.seal(rollback)
    told.ledger.seal(*told.run.step(accumulator_root=digest("what was committed to instead")))
    release = told.run.release()
    assert_refused(told.ledger, release, Reason.CUSTODY_MISSING)
    said(told)
    assert_admitted(told.ledger, release)


def test_policy_that_comes_after_the_opening_asks_nothing_of_the_campaign() -> None:
    told = taken()
    told.ledger.seal(told.ledger.policy(custody=("data-source",)))
    assert_admitted(told.ledger, told.run.release())


def test_campaign_that_keeps_nothing_needs_nobody() -> None:
    told = taken(custody=("data-source",), window_steps=0)
    assert_admitted(told.ledger, told.run.release())


@pytest.mark.parametrize("roles", [("operator",), ("data-source", "data-source"), ("librarian",)])
def test_policy_names_roles_but_the_operators_once_each(roles: tuple[str, ...]) -> None:
    ledger = begin(certificate_scheme=ED25519_LIST).ledger
    assert_refused(ledger, ledger.policy(custody=roles), Reason.BAD_FIELD)


# What a bundle proves of it


def judged(told: Story, encoded: bytes = b"") -> dict[Status, str]:
    encoded = encoded or export_bundle(told.ledger, Predicate.ACCUMULATORS, campaign=told.run.id)
    verdict = verify(open_bundle(anchor(told.ledger.genesis, told.ledger.chain_id), encoded), Predicate.ACCUMULATORS)
    assert verdict.answer is Answer.YES
    return {status: "\n".join(step.text for step in verdict.steps if step.status is status) for status in Status}


def test_custodians_of_the_campaign_as_it_stands_are_told_by_name() -> None:
    told = taken()
    said(told, HOSPITAL)
    told.ledger.seal(*told.run.step())
    told.ledger.seal(*told.run.step(accumulator_root=ROOT))
    assert "who holds the files of these windows" in judged(told)[Status.NOT_COVERED]
    said(told, VERIFIER)
    said(told, GOVERNANCE)
    assert f"held besides: {GOVERNANCE}, {VERIFIER}" in judged(told)[Status.ATTESTED]


def test_bundle_that_leaves_out_who_holds_the_files_is_incomplete() -> None:
    told = taken()
    encoded = export_bundle(told.ledger, Predicate.ACCUMULATORS, campaign=told.run.id)
    bundle = decode(encoded[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    prefix = review_prefix(CUSTODY_TABLE, told.run.id)
    ranges = tuple(proof for proof in bundle.ranges if proof.prefix != prefix)
    assert len(ranges) == len(bundle.ranges) - 1
    without = encode_bundle(msgspec.structs.replace(bundle, ranges=ranges))
    with pytest.raises(Rejected) as caught:
        judged(told, without)
    assert caught.value.reason is Reason.BUNDLE_INCOMPLETE
