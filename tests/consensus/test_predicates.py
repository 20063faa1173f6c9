"""Predicates over bundles: honest logs, altered bundles, hidden parts, and logs that a quorum of traitors wrote."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import BLOCKS, HOSPITAL, LIBRARIAN, CampaignRun, MemoryLedger, Story, begin, digest, story
from rules_fixtures import remake, tell

from consensus import portions as p
from consensus.bundle import (
    MAGIC,
    MAX_BUNDLE_BYTES,
    Bundle,
    BundleEvent,
    DisclosedExamples,
    StateProof,
    encode_bundle,
    open_bundle,
)
from consensus.codec import decode, encode
from consensus.epochs import Anchor, anchor
from consensus.event import CheckedEvent, Entry, Kind
from consensus.identifiers import MemberId
from consensus.job_key import job_key_id
from consensus.keys import MlDsa65SigningKey
from consensus.predicates import Answer, Predicate, ReleasedFile, Status, Verdict, verify
from consensus.rejection import Reason, Rejected
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CAMPAIGN_TABLE,
    GRANT_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    CampaignRecord,
    GrantRecord,
    PolicyHead,
    PolicyRecord,
    SourceRecord,
    Usage,
    read_record,
    usage_key,
)
from node.bundles import export_bundle


@cache
def told() -> Story:
    return story()


@cache
def trusted() -> Anchor:
    return anchor(told().ledger.genesis, told().ledger.chain_id)


@cache
def exported(predicate: Predicate, source: str = "") -> bytes:
    return export(told(), predicate, source)


def export(tale: Story, predicate: Predicate, source: str = "") -> bytes:
    if predicate is Predicate.INCLUDED:
        return export_bundle(tale.ledger, predicate, event=tale.ledger.events[8].id)
    if predicate is Predicate.CONSISTENT:
        return export_bundle(tale.ledger, predicate, earlier=tale.ledger.certified[2])
    return export_bundle(tale.ledger, predicate, campaign=tale.run.id, source=getattr(tale, source) if source else b"")


def released(tale: Story) -> ReleasedFile:
    return ReleasedFile("model.safetensors", hashlib.sha256(tale.weights).digest(), tale.run.tensors())


def judged(tale: Story, predicate: Predicate, source: str = "") -> Verdict:
    pinned = anchor(tale.ledger.genesis, tale.ledger.chain_id)
    files = [released(tale)] if predicate is Predicate.DELTA_EXACT else []
    return verify(open_bundle(pinned, export(tale, predicate, source)), predicate, files)


def altered(predicate: Predicate, change: Callable[[Bundle], Bundle], source: str = "") -> Verdict:
    """The verdict on the honest bundle after ``change``."""
    bundle = decode(exported(predicate, source)[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    files = [released(told())] if predicate is Predicate.DELTA_EXACT else []
    return verify(open_bundle(trusted(), encode_bundle(change(bundle))), predicate, files)


def refused(reason: Reason, predicate: Predicate, change: Callable[[Bundle], Bundle], source: str = "") -> str:
    with pytest.raises(Rejected) as caught:
        altered(predicate, change, source)
    assert caught.value.reason is reason
    return caught.value.detail


def kind_of(event: BundleEvent) -> Kind:
    return decode(event.entry, Entry, 1 << 16).kind


def without(bundle: Bundle, kind: Kind, which: int) -> Bundle:
    """The bundle without its ``which``-th event of a kind."""
    victim = [event for event in bundle.events if kind_of(event) is kind][which]
    return msgspec.structs.replace(bundle, events=tuple(event for event in bundle.events if event is not victim))


def changed(bundle: Bundle, kind: Kind, which: int, **fields: object) -> Bundle:
    """The bundle with fields of its ``which``-th event of a kind replaced."""
    victim = [event for event in bundle.events if kind_of(event) is kind][which]
    events = tuple(msgspec.structs.replace(event, **fields) if event is victim else event for event in bundle.events)
    return msgspec.structs.replace(bundle, events=events)


def with_record(bundle: Bundle, key: bytes, proof: StateProof) -> Bundle:
    records = tuple(proof if held.key == key else held for held in bundle.records)
    return msgspec.structs.replace(bundle, records=records)


def record_of(tale: Story, key: bytes, kind: type[p.Wire]) -> p.Wire:
    value = tale.ledger.state.get(key)
    assert value is not None
    return read_record(value, kind)


def failure(verdict: Verdict) -> str:
    """The text of the only failed step of a no."""
    assert verdict.answer is Answer.NO
    (failed,) = [step.text for step in verdict.steps if step.status is Status.FAILED]
    return failed


QUESTIONS = [
    (Predicate.INCLUDED, ""),
    (Predicate.CONSISTENT, ""),
    (Predicate.POLICY_IN_FORCE, ""),
    (Predicate.SOURCE_HONORED, "books"),
    (Predicate.SOURCE_HONORED, "records"),
    (Predicate.SOURCE_HONORED, "archive"),
    (Predicate.SOURCE_UNUSED, "archive"),
    (Predicate.REVOCATION_EXPOSURE, "records"),
    (Predicate.DELTA_EXACT, ""),
    (Predicate.REFUSALS_COMPLETE, ""),
    (Predicate.METADATA_COMPLETE, ""),
    (Predicate.EVALUATED, ""),
]
CAMPAIGN_QUESTIONS = [
    question for question in QUESTIONS if question[0] not in (Predicate.INCLUDED, Predicate.CONSISTENT)
]


# Honest logs.


@pytest.mark.parametrize(("predicate", "source"), QUESTIONS)
def test_honest_log_answers_yes_and_says_what_it_rests_on(predicate: Predicate, source: str) -> None:
    verdict = judged(told(), predicate, source)
    assert verdict.answer is Answer.YES
    assert [step.number for step in verdict.steps] == list(range(1, len(verdict.steps) + 1))
    assert (verdict.as_of.height, verdict.as_of.log_size) == (18, 29)
    if predicate is not Predicate.CONSISTENT:
        assert any(step.status is Status.ATTESTED for step in verdict.steps)


def test_used_source_is_not_unused() -> None:
    assert "24 were admitted, 6 more in discarded steps" in failure(judged(told(), Predicate.SOURCE_UNUSED, "books"))


def test_campaign_still_running_has_no_exact_release() -> None:
    tale = story(released=False)
    assert judged(tale, Predicate.REFUSALS_COMPLETE).answer is Answer.YES
    assert "the campaign is open" in failure(judged(tale, Predicate.DELTA_EXACT))


def test_deltas_are_attested_and_so_are_replays() -> None:
    steps = judged(told(), Predicate.DELTA_EXACT).steps
    assert any(step.status is Status.ATTESTED and "operator-1" in step.text for step in steps)
    replayed = "replay: 1 of 6 steps were re-executed and came out as recorded: data-source-2"
    assert any(step.status is Status.ATTESTED and step.text == replayed for step in steps)


def test_replay_nobody_did_is_not_covered() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.release())
    steps = judged(tale, Predicate.DELTA_EXACT).steps
    assert any(step.status is Status.NOT_COVERED and "0 of 0 steps were re-executed" in step.text for step in steps)


def test_source_honored_discloses_nothing_of_other_sources() -> None:
    tale, encoded = told(), exported(Predicate.SOURCE_HONORED, "books")
    assert tale.books in encoded
    assert tale.records not in encoded
    assert tale.archive not in encoded
    portions = [p.decode_portions(tale.ledger.portions(index)) for index in range(len(tale.ledger.events))]
    assert not any(held.data is not None and held.data.salt in encoded for held in portions[5:])


def test_refused_only_source_is_honored_without_a_grant() -> None:
    verdict = judged(told(), Predicate.SOURCE_HONORED, "archive")
    assert any("no step trained on it" in step.text for step in verdict.steps)


def test_source_never_presented_is_unused_and_honored() -> None:
    tale = begin()
    stray = tale.ledger.source(HOSPITAL, "stray")
    tale.ledger.seal(stray)
    lonely = Story(tale.ledger, tale.run, tale.books, tale.records, stray.id, b"")
    assert judged(lonely, Predicate.SOURCE_UNUSED, "archive").answer is Answer.YES
    assert judged(lonely, Predicate.SOURCE_HONORED, "archive").answer is Answer.YES


def test_job_key_replaced_in_mid_run_keeps_the_history_whole() -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books], 1, 5))
    ledger.seal(*run.step())
    old = run.job
    run.job = MlDsa65SigningKey(digest("another job key"))
    replacement = p.Delegation(
        campaign=run.id,
        job_key=job_key_id(run.job),
        scheme=run.job.scheme,
        not_before_ms=ledger.genesis.created_ms,
        expires_at_ms=ledger.now_ms + 86_400_000,
        replaces=job_key_id(old),
        head=run.head.last_event,
    )
    portions = p.Portions(None, None, ledger.salted(replacement))
    ledger.seal(ledger.signed(Kind.DELEGATION, ["operator-1"], portions, campaign=run.id))
    ledger.seal(run.grant([tale.books], 2, 5))
    ledger.seal(*run.step())
    for predicate in (Predicate.POLICY_IN_FORCE, Predicate.REFUSALS_COMPLETE):
        assert judged(tale, predicate).answer is Answer.YES
    assert judged(tale, Predicate.SOURCE_HONORED, "books").answer is Answer.YES


@pytest.mark.parametrize("index", [0, 1, 7, 16])
def test_member_event_is_included_with_its_signers(index: int) -> None:
    tale = told()
    encoded = export_bundle(tale.ledger, Predicate.INCLUDED, event=tale.ledger.events[index].id)
    verdict = verify(open_bundle(trusted(), encoded), Predicate.INCLUDED)
    assert verdict.answer is Answer.YES
    author = tale.ledger.committee.member(MemberId(tale.ledger.events[index].entry.author)).name
    assert any(author in step.text for step in verdict.steps)


def disclosing(examples: tuple[int, ...]) -> Callable[[Bundle], Bundle]:
    """Adds the list of admitted examples, or another one, to the source's item in step 1."""
    tale = told()
    step = next(event for event in tale.ledger.events if event.entry.kind is Kind.STEP)
    assert step.portions.data is not None
    salt = step.portions.data.salt

    def disclose(bundle: Bundle) -> Bundle:
        items = next(event for event in bundle.events if kind_of(event) is Kind.STEP).items
        assert items is not None
        (item,) = items.items
        listed = DisclosedExamples(p.examples_key(salt, item.number), examples)
        shown = msgspec.structs.replace(item, examples=listed)
        return changed(bundle, Kind.STEP, 0, items=msgspec.structs.replace(items, items=(shown,)))

    return disclose


def used_in_first_step() -> tuple[int, ...]:
    step = next(event for event in told().ledger.events if event.entry.kind is Kind.STEP)
    assert step.portions.data is not None
    return next(
        item.examples
        for use, item in zip(step.items, step.portions.data.items, strict=True)
        if isinstance(use, p.SourceUse) and use.source == told().books
    )


def test_owner_can_disclose_which_examples_were_used() -> None:
    examples = used_in_first_step()
    assert altered(Predicate.SOURCE_HONORED, disclosing(examples), "books").answer is Answer.YES


def test_other_examples_than_were_used_are_refused() -> None:
    examples = used_in_first_step()
    for false in (examples[:-1], (*examples[:-1], 99), (*examples, 99)):
        refused(Reason.PORTION_MISMATCH, Predicate.SOURCE_HONORED, disclosing(false), "books")


def test_forked_log_is_not_consistent() -> None:
    tale = begin()
    fork = tale.ledger.ledger, list(tale.ledger.events)
    tale.ledger.seal()
    earlier = tale.ledger.certified[-1]
    tale.ledger.ledger, tale.ledger.events = fork
    tale.ledger.seal(after_ms=7_000)
    encoded = export_bundle(tale.ledger, Predicate.CONSISTENT, earlier=earlier)
    pinned = anchor(tale.ledger.genesis, tale.ledger.chain_id)
    assert "the log has forked" in failure(verify(open_bundle(pinned, encoded), Predicate.CONSISTENT))


def test_newer_ledger_block_in_the_place_of_the_older_is_not_consistent() -> None:
    tale = begin()
    tale.ledger.seal()
    newer = tale.ledger.certified.pop()
    encoded = export_bundle(tale.ledger, Predicate.CONSISTENT, earlier=newer)
    pinned = anchor(tale.ledger.genesis, tale.ledger.chain_id)
    assert "is not the older one" in failure(verify(open_bundle(pinned, encoded), Predicate.CONSISTENT))


# Bundles with something left out.


@pytest.mark.parametrize(("predicate", "source"), CAMPAIGN_QUESTIONS[:1] + CAMPAIGN_QUESTIONS[-4:-2])
@pytest.mark.parametrize("which", [0, 2, -1])
def test_step_left_out_is_refused(predicate: Predicate, source: str, which: int) -> None:
    refused(Reason.BUNDLE_INCOMPLETE, predicate, lambda bundle: without(bundle, Kind.STEP, which), source)


@pytest.mark.parametrize("which", [0, 3])
def test_hidden_refusal_is_refused(which: int) -> None:
    refused(Reason.BUNDLE_INCOMPLETE, Predicate.REFUSALS_COMPLETE, lambda bundle: without(bundle, Kind.REFUSAL, which))


def test_rollback_left_out_is_refused() -> None:
    refused(Reason.BUNDLE_INCOMPLETE, Predicate.DELTA_EXACT, lambda bundle: without(bundle, Kind.ROLLBACK, 0))


def test_release_left_out_is_refused() -> None:
    refused(Reason.BUNDLE_INCOMPLETE, Predicate.DELTA_EXACT, lambda bundle: without(bundle, Kind.RELEASE, 0))


def test_grant_left_out_is_refused() -> None:
    refused(Reason.BUNDLE_INCOMPLETE, Predicate.POLICY_IN_FORCE, lambda bundle: without(bundle, Kind.GRANT, 1))
    refused(Reason.BUNDLE_INCOMPLETE, Predicate.SOURCE_HONORED, lambda bundle: without(bundle, Kind.GRANT, 0), "books")


def test_revocation_left_out_is_refused() -> None:
    refused(
        Reason.BUNDLE_INCOMPLETE,
        Predicate.SOURCE_HONORED,
        lambda bundle: without(bundle, Kind.REVOCATION, 0),
        "records",
    )


@pytest.mark.parametrize("which", [0, 2, -1])
def test_hidden_use_of_a_source_contradicts_its_usage_record(which: int) -> None:
    verdict = altered(Predicate.SOURCE_HONORED, lambda bundle: changed(bundle, Kind.STEP, which, items=None), "books")
    assert "as the state counts: the bundle shows" in failure(verdict)


def test_last_uses_cut_off_contradict_the_usage_record() -> None:
    def cut(bundle: Bundle) -> Bundle:
        return without(without(without(bundle, Kind.RELEASE, 0), Kind.EVALUATION, 0), Kind.STEP, -1)

    assert "the bundle shows" in failure(altered(Predicate.SOURCE_HONORED, cut, "books"))


def test_rollback_cut_off_contradicts_the_usage_record() -> None:
    """A discarded step passed off as kept: the admitted examples still add up, those kept do not."""
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books], 1, 5))
    ledger.seal(*run.step(flagged=tale.books))
    ledger.seal(run.rollback())
    bundle = decode(export(tale, Predicate.SOURCE_HONORED, "books")[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    pinned = anchor(ledger.genesis, ledger.chain_id)
    cut = open_bundle(pinned, encode_bundle(without(bundle, Kind.ROLLBACK, 0)))
    assert "in steps not discarded" in failure(verify(cut, Predicate.SOURCE_HONORED))


@pytest.mark.parametrize(
    ("predicate", "kind", "portion", "source"),
    [
        (Predicate.POLICY_IN_FORCE, Kind.STEP, "governance", ""),
        (Predicate.POLICY_IN_FORCE, Kind.POLICY, "governance", ""),
        (Predicate.SOURCE_HONORED, Kind.STEP, "governance", "books"),
        (Predicate.SOURCE_HONORED, Kind.GRANT, "items", "books"),
        (Predicate.SOURCE_HONORED, Kind.GRANT, "governance", "books"),
        (Predicate.SOURCE_HONORED, Kind.CAMPAIGN, "operation", "books"),
        (Predicate.SOURCE_HONORED, Kind.SOURCE, "data", "books"),
        (Predicate.METADATA_COMPLETE, Kind.CAMPAIGN, "operation", ""),
        (Predicate.DELTA_EXACT, Kind.CAMPAIGN, "operation", ""),
        (Predicate.DELTA_EXACT, Kind.STEP, "operation", ""),
        (Predicate.DELTA_EXACT, Kind.ROLLBACK, "operation", ""),
        (Predicate.DELTA_EXACT, Kind.RELEASE, "operation", ""),
        (Predicate.REFUSALS_COMPLETE, Kind.STEP, "data", ""),
        (Predicate.REFUSALS_COMPLETE, Kind.REFUSAL, "governance", ""),
    ],
)
def test_undisclosed_portion_never_becomes_a_yes(predicate: Predicate, kind: Kind, portion: str, source: str) -> None:
    verdict = altered(predicate, lambda bundle: changed(bundle, kind, 0, **{portion: None}), source)
    assert verdict.answer is Answer.UNKNOWN


def opened_under(*required: str, environment: dict[str, str] | None = None) -> Verdict:
    """The verdict on a campaign that recorded ``optimizer`` and ``environment`` under a policy with this list."""
    ledger = MemoryLedger()
    books = ledger.source("data-source-1", "books")
    ledger.seal(ledger.policy(required_metadata=required), books)
    run = CampaignRun(ledger, (p.ManifestRange(books.id, 0, 8),), batch_size=4)
    delegation, opening = run.open()
    assert isinstance(opening.operation, p.Campaign)
    settings = tuple(p.Setting(name, value) for name, value in (environment or {}).items())
    told = msgspec.structs.replace(opening.operation, environment=settings)
    ledger.seal(delegation, remake(run, opening, operation=told))
    bundle = export_bundle(ledger, Predicate.METADATA_COMPLETE, campaign=run.id)
    return verify(open_bundle(anchor(ledger.genesis, ledger.chain_id), bundle), Predicate.METADATA_COMPLETE)


def test_fact_of_the_policys_list_that_is_missing_or_says_nothing_is_named() -> None:
    assert opened_under("optimizer", "code.commit", environment={"code.commit": "abc"}).answer is Answer.YES
    assert "'code.commit' is not recorded" in failure(opened_under("optimizer", "code.commit"))
    for nothing in ("none", " None ", "", "unknown"):
        assert opened_under("code.commit", environment={"code.commit": nothing}).answer is Answer.NO
    nothing_asked = opened_under()
    assert nothing_asked.answer is Answer.YES
    assert any("the policy requires no fact" in step.text for step in nothing_asked.steps)


def test_no_weights_at_hand_is_unknown() -> None:
    verdict = verify(open_bundle(trusted(), exported(Predicate.DELTA_EXACT)), Predicate.DELTA_EXACT)
    assert verdict.answer is Answer.UNKNOWN


@pytest.mark.parametrize(("predicate", "source"), CAMPAIGN_QUESTIONS)
def test_record_left_out_is_refused(predicate: Predicate, source: str) -> None:
    for number in range(len(decode(exported(predicate, source)[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES).records)):

        def drop(bundle: Bundle, number: int = number) -> Bundle:
            return msgspec.structs.replace(bundle, records=bundle.records[:number] + bundle.records[number + 1 :])

        refused(Reason.BUNDLE_INCOMPLETE, predicate, drop, source)


# Bundles with something put in another's place.


def test_swapped_portions_are_refused() -> None:
    def swap(bundle: Bundle) -> Bundle:
        steps = [event for event in bundle.events if kind_of(event) is Kind.STEP]
        return changed(
            changed(bundle, Kind.STEP, 0, governance=steps[1].governance),
            Kind.STEP,
            1,
            governance=steps[0].governance,
        )

    refused(Reason.PORTION_MISMATCH, Predicate.POLICY_IN_FORCE, swap)


def test_items_of_another_step_are_refused() -> None:
    def swap(bundle: Bundle) -> Bundle:
        steps = [event for event in bundle.events if kind_of(event) is Kind.STEP]
        return changed(bundle, Kind.STEP, 0, items=steps[1].items)

    refused(Reason.PORTION_MISMATCH, Predicate.SOURCE_HONORED, swap, "books")


def test_item_disclosed_twice_is_refused() -> None:
    def double(bundle: Bundle) -> Bundle:
        items = next(event for event in bundle.events if kind_of(event) is Kind.STEP).items
        assert items is not None
        return changed(bundle, Kind.STEP, 0, items=msgspec.structs.replace(items, items=items.items + items.items))

    refused(Reason.DUPLICATE, Predicate.SOURCE_HONORED, double, "books")


def test_step_twice_is_refused() -> None:
    def double(bundle: Bundle) -> Bundle:
        return msgspec.structs.replace(bundle, events=(*bundle.events, bundle.events[-1]))

    refused(Reason.DUPLICATE, Predicate.DELTA_EXACT, double)


def test_head_of_another_campaign_is_refused() -> None:
    tale = begin()
    other = CampaignRun(tale.ledger, (p.ManifestRange(tale.books, 0, 8),), name="other", batch_size=4)
    tale.ledger.seal(*other.open())
    tale.ledger.seal(tale.run.grant([tale.books], 1, 2))
    tale.ledger.seal(*tale.run.step())
    bundle = decode(export(tale, Predicate.REFUSALS_COMPLETE)[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    key = CAMPAIGN_HEAD_TABLE + tale.run.id
    theirs = StateProof(key, tale.ledger.state.prove(CAMPAIGN_HEAD_TABLE + other.id))
    pinned = anchor(tale.ledger.genesis, tale.ledger.chain_id)
    with pytest.raises(Rejected) as caught:
        open_bundle(pinned, encode_bundle(with_record(bundle, key, theirs)))
    assert caught.value.reason is Reason.BAD_PROOF


def test_stale_state_proof_is_refused() -> None:
    """The campaign's head after step 1, to hide every later step."""
    key = CAMPAIGN_HEAD_TABLE + told().run.id
    stale = StateProof(key, told().ledger.states[3].prove(key))
    refused(Reason.BAD_PROOF, Predicate.DELTA_EXACT, lambda bundle: with_record(bundle, key, stale))


def test_forged_usage_is_refused() -> None:
    key = usage_key(told().run.id, told().books)
    usage = record_of(told(), key, Usage)
    forged = encode(msgspec.structs.replace(usage, admitted=0, discarded=0))
    proof = msgspec.structs.replace(told().ledger.state.prove(key), leaf_value=forged)
    refused(
        Reason.BAD_PROOF,
        Predicate.SOURCE_HONORED,
        lambda bundle: with_record(bundle, key, StateProof(key, proof)),
        "books",
    )


def test_usage_of_another_source_is_refused() -> None:
    key, other = (usage_key(told().run.id, source) for source in (told().books, told().archive))
    proof = StateProof(key, told().ledger.state.prove(other))
    refused(Reason.BAD_PROOF, Predicate.SOURCE_HONORED, lambda bundle: with_record(bundle, key, proof), "books")


def test_policy_left_out_of_the_range_is_refused() -> None:
    tale = story(released=False)
    tale.ledger.seal(tale.ledger.policy(name="second"))
    bundle = decode(export(tale, Predicate.POLICY_IN_FORCE)[len(MAGIC) :], Bundle, MAX_BUNDLE_BYTES)
    (held,) = bundle.ranges
    shorter = msgspec.structs.replace(held.proof, entries=held.proof.entries[:1])
    ranges = (msgspec.structs.replace(held, proof=shorter),)
    pinned = anchor(tale.ledger.genesis, tale.ledger.chain_id)
    with pytest.raises(Rejected) as caught:
        open_bundle(pinned, encode_bundle(msgspec.structs.replace(bundle, ranges=ranges)))
    assert caught.value.reason is Reason.BAD_PROOF


def test_certificate_of_another_ledger_block_is_refused() -> None:
    _, certificate = told().ledger.certified[-2]
    refused(
        Reason.BAD_CERTIFICATE,
        Predicate.DELTA_EXACT,
        lambda bundle: msgspec.structs.replace(bundle, certificate=certificate),
    )


def test_older_header_does_not_fit_the_proofs() -> None:
    header, certificate = told().ledger.certified[-3]
    refused(
        Reason.BAD_PROOF,
        Predicate.DELTA_EXACT,
        lambda bundle: msgspec.structs.replace(bundle, header=header, certificate=certificate),
    )


def test_bundle_and_header_of_a_chain_with_the_same_name_are_refused() -> None:
    other = story(seed=1)
    assert other.ledger.genesis.name == told().ledger.genesis.name
    with pytest.raises(Rejected) as caught:
        open_bundle(trusted(), export(other, Predicate.DELTA_EXACT))
    assert caught.value.reason is Reason.WRONG_CHAIN
    detail = refused(
        Reason.WRONG_CHAIN,
        Predicate.DELTA_EXACT,
        lambda bundle: msgspec.structs.replace(
            bundle, header=other.ledger.header, certificate=other.ledger.certificate
        ),
    )
    assert other.ledger.chain_id.hex() in detail


def test_bundle_of_another_predicate_is_refused() -> None:
    with pytest.raises(Rejected) as caught:
        verify(open_bundle(trusted(), exported(Predicate.DELTA_EXACT)), Predicate.REFUSALS_COMPLETE)
    assert caught.value.reason is Reason.UNKNOWN_PREDICATE


def test_tampered_weights_are_not_the_release() -> None:
    file = released(told())
    bundle = open_bundle(trusted(), exported(Predicate.DELTA_EXACT))
    tensors = (replace(file.tensors[0], digest=bytes(32)), *file.tensors[1:])
    tampered = ReleasedFile("tampered", bytes(32), tensors)
    verdict = verify(bundle, Predicate.DELTA_EXACT, [tampered])
    assert verdict.answer is Answer.NO
    assert sum(step.status is Status.FAILED for step in verdict.steps) == 2


def test_log_that_lost_entries_is_not_consistent() -> None:
    def shorten(bundle: Bundle) -> Bundle:
        assert bundle.earlier is not None
        header, certificate = told().ledger.certified[1]
        return msgspec.structs.replace(
            bundle, earlier=msgspec.structs.replace(bundle.earlier, header=header, certificate=certificate)
        )

    refused(Reason.BAD_PROOF, Predicate.CONSISTENT, shorten)


# Bytes.


@pytest.mark.parametrize("encoded", [b"", b"PK\x03\x04", MAGIC, MAGIC + b"\xc1", b"{}", MAGIC[:-1]])
def test_what_is_no_bundle_is_refused_by_name(encoded: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        open_bundle(trusted(), encoded)
    assert caught.value.reason is Reason.MALFORMED


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(QUESTIONS), st.data())
def test_bundle_with_any_byte_changed_or_cut_is_never_a_yes(
    question: tuple[Predicate, str], draw: st.DataObject
) -> None:
    predicate, source = question
    encoded = exported(predicate, source)
    position = draw.draw(st.integers(0, len(encoded) - 1))
    if draw.draw(st.booleans()):
        encoded = encoded[:position]
    else:
        flipped = bytes([encoded[position] ^ draw.draw(st.integers(1, 255))])
        encoded = encoded[:position] + flipped + encoded[position + 1 :]
    with pytest.raises(Rejected):
        verify(open_bundle(trusted(), encoded), predicate, [released(told())])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_after_the_magic_is_refused(garbage: bytes) -> None:
    with pytest.raises(Rejected):
        open_bundle(trusted(), MAGIC + garbage)


# Logs written by traitors in every role: what the verifier recomputes, it does not believe them.


def granted(tale: Story, *sources: bytes) -> GrantRecord:
    record = record_of(tale, GRANT_TABLE + tale.run.grant_id, GrantRecord)
    assert isinstance(record, GrantRecord)
    return msgspec.structs.replace(record, sources=tuple(sorted(sources)))


def test_use_without_a_grant_is_not_honored() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books], 1, 3))
    lie = granted(tale, tale.books, tale.records)
    tale.ledger.seal_lying(*tale.run.step(grant=lie), lies={GRANT_TABLE + tale.run.grant_id: lie})
    assert "which the owner has not signed" in failure(judged(tale, Predicate.SOURCE_HONORED, "records"))
    assert judged(tale, Predicate.SOURCE_HONORED, "books").answer is Answer.YES


def test_grant_without_the_owners_signature_is_not_honored() -> None:
    tale = begin()
    record = record_of(tale, SOURCE_TABLE + tale.records, SourceRecord)
    lie = msgspec.structs.replace(record, author=tale.ledger.ids[LIBRARIAN])
    grant = tale.run.grant([tale.books, tale.records], 1, 3, signers=[LIBRARIAN])
    tale.ledger.seal_lying(grant, lies={SOURCE_TABLE + tale.records: lie})
    tale.ledger.seal(*tale.run.step())
    assert "which the owner has not signed" in failure(judged(tale, Predicate.SOURCE_HONORED, "records"))


def test_grant_opened_after_the_revocation_is_not_honored() -> None:
    tale = begin()
    unrevoked = record_of(tale, SOURCE_TABLE + tale.records, SourceRecord)
    tale.ledger.seal(tale.ledger.revocation(HOSPITAL, tale.records))
    tale.ledger.seal_lying(
        tale.run.grant([tale.books, tale.records], 1, 3), lies={SOURCE_TABLE + tale.records: unrevoked}
    )
    tale.ledger.seal(*tale.run.step())
    assert "opened after the revocation" in failure(judged(tale, Predicate.SOURCE_HONORED, "records"))


def test_use_after_a_revocation_that_voids_is_not_honored() -> None:
    ledger = MemoryLedger()
    books = ledger.source(LIBRARIAN, "books")
    ledger.seal(ledger.policy(revocation="void"), books)
    run = CampaignRun(ledger, (p.ManifestRange(books.id, 0, 8),), batch_size=4)
    tale = Story(ledger, run, books.id, b"", b"", b"")
    ledger.seal(*run.open())
    ledger.seal(run.grant([books.id], 1, 3))
    unrevoked = record_of(tale, SOURCE_TABLE + books.id, SourceRecord)
    ledger.seal(ledger.revocation(LIBRARIAN, books.id))
    ledger.seal_lying(*run.step(), lies={SOURCE_TABLE + books.id: unrevoked})
    assert "which voids grant 1" in failure(judged(tale, Predicate.SOURCE_HONORED, "books"))


def test_licence_the_policy_does_not_admit_is_not_honored() -> None:
    tale = begin()
    record = record_of(tale, SOURCE_TABLE + tale.archive, SourceRecord)
    assert isinstance(record, SourceRecord)
    lie = msgspec.structs.replace(record, claim=msgspec.structs.replace(record.claim, licence="CC0-1.0"))
    tale.ledger.seal_lying(tale.run.grant([tale.archive], 1, 3), lies={SOURCE_TABLE + tale.archive: lie})
    tale.ledger.seal(*tale.run.step())
    assert "licence-not-admitted" in failure(judged(tale, Predicate.SOURCE_HONORED, "archive"))


def test_usage_recorded_too_low_is_not_honored_and_not_complete() -> None:
    tale = story(released=False)
    key = usage_key(tale.run.id, tale.books)
    lie = encode(msgspec.structs.replace(record_of(tale, key, Usage), admitted=1))
    tale.ledger.collude([], {key: lie})
    assert "as the state counts" in failure(judged(tale, Predicate.SOURCE_HONORED, "books"))
    assert "counts otherwise" in failure(judged(tale, Predicate.REFUSALS_COMPLETE))


def test_profile_above_the_policy_is_found() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books, tale.records], 1, 3))
    key = POLICY_TABLE + tale.run.policy_id
    record = record_of(tale, key, PolicyRecord)
    assert isinstance(record, PolicyRecord)
    rules = tuple(p.ClassRule(rule.content_class, 1_000, ()) for rule in record.policy.classes)
    lie = msgspec.structs.replace(record, policy=msgspec.structs.replace(record.policy, classes=rules))
    deep = tuple(p.ClassProfile(name, 0, (1_000,) * len(BLOCKS)) for name in ("medical", "text"))
    tale.ledger.seal_lying(*tale.run.step(profiles=deep), lies={key: lie})
    assert "class 'medical' in block 'embedding'" in failure(judged(tale, Predicate.POLICY_IN_FORCE))


def tied(tale: Story, **ties: object) -> tuple[CheckedEvent, ...]:
    """The next step, which says that parameter blocks were tied together; of a skipped one that nothing moved."""
    *before, step = tale.run.step()
    operation = step.operation
    assert isinstance(operation, p.StepOperation)
    if ties.get("skipped"):
        deltas = tuple(p.BlockDelta(0, delta.digest) for delta in operation.deltas)
        operation = tell(operation, deltas=deltas, root_after=operation.root_before)
    return *before, remake(tale.run, step, governance=tell(step.governance, **ties), operation=operation)


def test_steps_that_tie_parameter_blocks_together_are_told() -> None:
    tale = begin()
    tale.ledger.seal(tale.ledger.policy(global_clipping=True))
    tale.ledger.seal(tale.run.grant([tale.books, tale.records], 1, 3))
    tale.ledger.seal(*tied(tale, global_clip_nano=p.NANO))
    verdict = judged(tale, Predicate.POLICY_IN_FORCE)
    assert verdict.answer is Answer.YES
    assert not any("clip factor" in step.text for step in verdict.steps), "a factor of one changed nothing"
    tale.ledger.seal(*tied(tale, global_clip_nano=p.NANO // 3))
    (step,) = [step for step in judged(tale, Predicate.POLICY_IN_FORCE).steps if "clip factor" in step.text]
    assert step.status is Status.NOT_COVERED
    assert step.text.endswith("one clip factor scaled all of them in 1 steps, 0 were skipped for an overflow in any")


def test_skipped_step_is_told() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books, tale.records], 1, 3))
    tale.ledger.seal(*tied(tale, skipped=True))
    verdict = judged(tale, Predicate.POLICY_IN_FORCE)
    assert verdict.answer is Answer.YES
    assert any(step.text.endswith("in 0 steps, 1 were skipped for an overflow in any") for step in verdict.steps)


def test_one_factor_over_all_blocks_against_the_policy_is_found() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books, tale.records], 1, 3))
    key = POLICY_TABLE + tale.run.policy_id
    record = record_of(tale, key, PolicyRecord)
    assert isinstance(record, PolicyRecord)
    lie = msgspec.structs.replace(record, policy=msgspec.structs.replace(record.policy, global_clipping=True))
    tale.ledger.seal_lying(*tied(tale, global_clip_nano=1), lies={key: lie})
    assert "one factor scaled all parameter blocks" in failure(judged(tale, Predicate.POLICY_IN_FORCE))


def test_grant_under_a_replaced_policy_is_found() -> None:
    tale = begin()
    old = tale.run.policy_id
    head = record_of(tale, POLICY_HEAD_KEY, PolicyHead)
    tale.ledger.seal(tale.ledger.policy(name="stricter", licences=()))
    grant = tale.run.grant([tale.books], 1, 3, policy=old)
    tale.ledger.seal_lying(grant, lies={POLICY_HEAD_KEY: head})
    tale.ledger.seal(*tale.run.step())
    assert "not the one then in force" in failure(judged(tale, Predicate.POLICY_IN_FORCE))


def test_step_outside_its_grant_is_found() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books], 2, 3))
    lie = msgspec.structs.replace(granted(tale, tale.books), first_step=1)
    tale.ledger.seal_lying(*tale.run.step(), lies={GRANT_TABLE + tale.run.grant_id: lie})
    assert "is outside its grant, 2 to 3" in failure(judged(tale, Predicate.POLICY_IN_FORCE))
    assert "is outside grant 1, 2 to 3" in failure(judged(tale, Predicate.SOURCE_HONORED, "books"))


def test_step_from_other_parameters_is_not_exact() -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books], 1, 3))
    ledger.seal(*run.step())
    run.snapshots.append({name: b"trained off log." for name in run.snapshots[-1]})
    lie = msgspec.structs.replace(run.head, root=run.root())
    ledger.seal_lying(*run.step(), lies={CAMPAIGN_HEAD_TABLE + run.id: lie})
    ledger.seal(run.release())
    finished = Story(ledger, run, tale.books, tale.records, tale.archive, run.weights_file())
    assert "starts from" in failure(judged(finished, Predicate.DELTA_EXACT))


def test_release_of_other_parameters_is_not_exact() -> None:
    tale = begin()
    ledger, run = tale.ledger, tale.run
    ledger.seal(run.grant([tale.books], 1, 3))
    ledger.seal(*run.step())
    run.snapshots.append({name: bytes(15) + b"x" for name in run.snapshots[-1]})
    lie = msgspec.structs.replace(run.head, root=run.root())
    ledger.seal_lying(run.release(), lies={CAMPAIGN_HEAD_TABLE + run.id: lie})
    verdict = judged(
        Story(ledger, run, tale.books, tale.records, tale.archive, run.weights_file()), Predicate.DELTA_EXACT
    )
    assert verdict.answer is Answer.NO


def test_refusal_for_a_false_reason_is_found() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books, tale.records], 1, 3))
    key = SOURCE_TABLE + tale.archive
    record = record_of(tale, key, SourceRecord)
    assert isinstance(record, SourceRecord)
    expired = msgspec.structs.replace(record.claim, valid_until_ms=record.claim.valid_from_ms + 1)
    lie = msgspec.structs.replace(record, claim=expired)
    tale.ledger.seal_lying(*tale.run.step(reason=Reason.SOURCE_EXPIRED.value), lies={key: lie})
    found = failure(judged(tale, Predicate.REFUSALS_COMPLETE))
    assert "as 'source-expired', expected licence-not-admitted" in found


def test_presented_examples_that_nobody_accounts_for_are_found() -> None:
    tale = begin()
    tale.ledger.seal(tale.run.grant([tale.books, tale.records], 1, 3))
    key = CAMPAIGN_TABLE + tale.run.id
    record = record_of(tale, key, CampaignRecord)
    tale.run.batch_size = 6
    lie = msgspec.structs.replace(record, batch_size=6)
    tale.ledger.seal_lying(*tale.run.step(), lies={key: lie})
    found = failure(judged(tale, Predicate.REFUSALS_COMPLETE))
    assert "accounts for 6 examples, 12 were presented; 0 too many, 6 missing" in found


def test_refused_examples_trained_on_all_the_same_are_found() -> None:
    """Step totals and head agree, but the source's own record still says that its examples were refused."""
    tale = story(released=False)
    head = record_of(tale, CAMPAIGN_HEAD_TABLE + tale.run.id, CampaignHead)
    assert isinstance(head, CampaignHead)
    lie = msgspec.structs.replace(head, admitted=head.admitted + 8, refused=head.refused - 8)
    tale.ledger.collude([], {CAMPAIGN_HEAD_TABLE + tale.run.id: encode(lie)})
    assert "the head counts" in failure(judged(tale, Predicate.REFUSALS_COMPLETE))
