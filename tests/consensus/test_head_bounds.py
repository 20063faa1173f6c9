"""The bound of a campaign's head: what refusals and the last step put into it, of the largest campaign there may be."""

import copy
from collections.abc import Sequence

import msgspec
import pytest
from ledger_fixtures import LIBRARIAN, CampaignRun, MemoryLedger, digest
from rules_fixtures import assert_admitted, assert_refused, granted, head_of, remake

from consensus import portions as p
from consensus.admission import MAX_BATCH_SIZE, MAX_MANIFEST_SOURCES
from consensus.campaign_rules import ROOM_BYTES
from consensus.codec import encode
from consensus.event import CheckedEvent
from consensus.membership import ED25519_LIST
from consensus.rejection import Reason
from consensus.reserve import LOT_BITS
from consensus.review_rules import MAX_OPEN_FINDINGS
from consensus.sampler import presented_by_source
from consensus.state import CampaignHead, PendingRefusal, SourceCounts
from consensus.state_map import MAX_VALUE_BYTES

WIDEST = 2**53 - 1
"""The largest number of the wire form."""
UNDO = "operator-decision"


@pytest.fixture(scope="module")
def refused_everywhere() -> CampaignRun:
    """A campaign of the most sources and the largest batch, its first step taken: all sources but one are refused."""
    ledger = MemoryLedger(certificate_scheme=ED25519_LIST)
    claim: dict[str, object] = {"example_count": WIDEST, "reserve_below": 1 << (LOT_BITS - 4)}
    books = ledger.source(LIBRARIAN, "books", **claim)
    others = [
        ledger.source(LIBRARIAN, f"internal-{number}", licence="LicenseRef-internal", **claim)
        for number in range(1, MAX_MANIFEST_SOURCES)
    ]
    ledger.seal(ledger.policy(), books, *others)
    manifest = tuple(p.ManifestRange(source.id, 2**52, 32) for source in (books, *others))
    run = CampaignRun(ledger, manifest, batch_size=MAX_BATCH_SIZE)
    ledger.seal(*run.open())
    ledger.seal(run.grant([books.id], 1, 100))
    ledger.seal(*run.step())
    return run


def undoing(run: CampaignRun, sequence: int) -> CheckedEvent:
    """A rollback of the last step, as the event of this number; the run goes on as if it had not been written."""
    other = copy.copy(run)
    other.snapshots = list(run.snapshots)
    return remake(run, other.rollback(UNDO), sequence=sequence)


def test_refusals_that_leave_no_room_for_undoing_the_last_step_are_admitted_and_the_campaign_goes_on(
    refused_everywhere: CampaignRun,
) -> None:
    run = refused_everywhere
    ledger, before = run.ledger, head_of(run)
    assert_admitted(ledger, undoing(run, before.next_sequence))
    too_late = undoing(run, before.next_sequence + 1)
    refusal, step = run.step()
    ledger.seal(refusal)
    held = head_of(run)
    both = msgspec.structs.replace(held, undo_root=before.undo_root, undo_counts=before.undo_counts)
    assert len(encode(both)) > MAX_VALUE_BYTES
    assert (held.undo_root, held.undo_counts) == (b"", ())
    assert len(encode(held)) <= MAX_VALUE_BYTES - ROOM_BYTES
    assert "left no room" in assert_refused(ledger, too_late, Reason.NOTHING_TO_ROLL_BACK)
    ledger.seal(step)
    after = head_of(run)
    assert (after.steps, after.pending, bool(after.undo_root)) == (2, (), True)
    ledger.seal(run.rollback(UNDO))
    assert head_of(run).steps == 1


def test_refusals_for_two_reasons_of_each_source_cannot_keep_an_audit_from_barring_the_release() -> None:
    """Half of every source's examples are refused under a grant of all sources, the rest under a grant of one."""
    ledger = MemoryLedger()
    sources = [ledger.source(LIBRARIAN, f"books-{n}", example_count=WIDEST) for n in range(MAX_MANIFEST_SOURCES)]
    ledger.seal(ledger.policy(auditors=(ledger.ids[LIBRARIAN],)), *sources)
    run = CampaignRun(ledger, tuple(p.ManifestRange(each.id, 2**52, 16) for each in sources), batch_size=MAX_BATCH_SIZE)
    ledger.seal(*run.open())
    of_all, of_one = (run.grant([each.id for each in granted], 1, 100) for granted in (sources, sources[:1]))
    ledger.seal(of_all, of_one)
    run.grant_id = of_all.id
    ledger.seal(*run.step())
    presented = presented_by_source(run.manifest, digest("sampler", run.name), run.batch_size, 2)

    def refusal(grant: CheckedEvent, reason: Reason, of: Sequence[CheckedEvent], half: int) -> CheckedEvent:
        run.grant_id = grant.id
        refused = {(each.id, reason.value): list(presented[each.id])[half::2] for each in of}
        (event,) = run._refusal(2, refused, run._grant())
        return event

    ledger.seal(refusal(of_all, Reason.MEMORIZATION_ABOVE_THRESHOLD, sources, 0))
    ledger.seal(refusal(of_one, Reason.SOURCE_NOT_GRANTED, sources[1:200], 1))
    one_more = refusal(of_one, Reason.SOURCE_NOT_GRANTED, sources[200:230], 1)
    assert f"at most {MAX_VALUE_BYTES - ROOM_BYTES} allowed" in assert_refused(ledger, one_more, Reason.OVERSIZED)
    challenge = ledger.audit_challenge(LIBRARIAN, run.id, last_step=1, picks=1)
    ledger.seal(challenge)
    assert head_of(run).open_findings == (challenge.id,)


def test_refusals_that_leave_room_keep_the_last_step_undoable() -> None:
    told = granted()
    told.ledger.seal(*told.run.step())
    before = head_of(told.run)
    late = undoing(told.run, before.next_sequence + 1)
    refusal, _ = told.run.step()
    told.ledger.seal(refusal)
    held = head_of(told.run)
    assert held.undo_counts
    assert (held.undo_root, held.undo_counts) == (before.undo_root, before.undo_counts)
    assert_admitted(told.ledger, late)


def widest_head(**fields: object) -> CampaignHead:
    """A head in which all is as large as it gets, but for refusals and the counts of the last step."""
    head = head_of(granted().run)
    numbers = {name: WIDEST for name in head.__struct_fields__ if type(getattr(head, name)) is int}
    findings = tuple(digest(number) for number in range(MAX_OPEN_FINDINGS))
    large: dict[str, object] = {
        **numbers, "undo_root": bytes(32), "closed": "abandoned", "release": bytes(32), "open_findings": findings,
    }  # fmt: skip
    return msgspec.structs.replace(head, **{**large, **fields})


def test_refusals_alone_and_the_last_step_alone_always_fit_with_all_open_findings() -> None:
    """Of each source one reason, and its reserve, which the step counts."""
    longest, next_longest = sorted((reason.value for reason in Reason), key=len)[-2:]
    sources, each = MAX_MANIFEST_SOURCES, MAX_BATCH_SIZE // MAX_MANIFEST_SOURCES
    pending = tuple(PendingRefusal(digest(n), longest, tuple(range(WIDEST - each, WIDEST))) for n in range(sources))
    assert len(encode(widest_head(pending=pending))) <= MAX_VALUE_BYTES - ROOM_BYTES
    refused = (p.Count(longest, MAX_BATCH_SIZE), p.Count(next_longest, MAX_BATCH_SIZE))
    undo = tuple(SourceCounts(digest(n), MAX_BATCH_SIZE, MAX_BATCH_SIZE, refused, "x" * 16) for n in range(sources))
    assert len(encode(widest_head(undo_counts=undo))) <= MAX_VALUE_BYTES - ROOM_BYTES
    assert len(encode(widest_head())) <= ROOM_BYTES, "what is kept free is room for all else of a head"
