"""Vectors of transitions: whole logs from an empty state, ledger block by ledger block, with every record each changes.

What a rule refuses is tried on the way and changes nothing. The stories go where the effects of events on the state
are least plain: refusals that merge, rollbacks of steps that settled momentum, findings that change places.
"""

from collections.abc import Sequence

from epoch_fixtures import change_event, next_membership
from ledger_fixtures import HOSPITAL, LIBRARIAN, OPERATOR, CampaignRun, MemoryLedger, digest
from rules_fixtures import listed, remake, tell, usage_of

from consensus import portions as p
from consensus.admission import admit
from consensus.codec import encode
from consensus.event import CheckedEvent, Kind, pack_parts
from consensus.identifiers import MemberId
from consensus.job_key import job_key_id
from consensus.keys import Ed25519SigningKey
from consensus.membership import BLS_THRESHOLD, ED25519_LIST
from consensus.rejection import Rejected
from consensus.review import ACCEPT, REJECT
from consensus.sampler import presented_examples
from consensus.state import StateView
from consensus.transition import LedgerState


def wire(event: CheckedEvent) -> str:
    """The event as it is sent, in hex."""
    return pack_parts(event.entry_bytes, event.portions_bytes).hex()


class Told(MemoryLedger):
    """A ledger that keeps what every ledger block changed, and what was refused before it."""

    def __init__(self, certificate_scheme: str) -> None:
        super().__init__(certificate_scheme=certificate_scheme)
        self.blocks: list[dict[str, object]] = []
        self._refused: list[dict[str, object]] = []

    def _append(self, after: LedgerState, events: Sequence[CheckedEvent]) -> None:
        view = StateView(self.state)
        for event in events:
            admit(view, event, after.header.timestamp_ms, self.committee)
        self.blocks.append(
            {
                "refused": self._refused,
                "timestamp_ms": after.header.timestamp_ms,
                "events": [wire(event) for event in events],
                "changed": [[key.hex(), value.hex()] for key, value in view.changes().items()],
                "state_root": after.header.state_root.hex(),
            }
        )
        self._refused = []
        super()._append(after, events)

    def refuse(self, event: CheckedEvent, *before: CheckedEvent) -> None:
        """Note why an event is refused after ``before``, in the next ledger block."""
        view = StateView(self.state)
        for earlier in before:
            admit(view, earlier, self.now_ms, self.committee)
        try:
            admit(view, event, self.now_ms, self.committee)
        except Rejected as refusal:
            self._refused.append(
                {
                    "what": event.entry.kind.phrase,
                    "timestamp_ms": self.now_ms,
                    "before": [wire(earlier) for earlier in before],
                    "event": wire(event),
                    "reason": refusal.reason.value,
                }
            )
            return
        raise AssertionError(f"{event.entry.kind.phrase} is admitted")

    def vector(self, what: str) -> dict[str, object]:
        return {"what": what, "genesis": encode(self.genesis).hex(), "blocks": self.blocks}


def opened(
    certificate_scheme: str, accumulator_window_steps: int = 0, batch_size: int = 12, **policy: object
) -> tuple[Told, CampaignRun, bytes, bytes]:
    """An open campaign over books and records, which are granted, and an archive, which cannot be."""
    ledger = Told(certificate_scheme)
    books = ledger.source(LIBRARIAN, "books")
    records = ledger.source(HOSPITAL, "records", content_class="medical")
    archive = ledger.source(HOSPITAL, "archive", licence="LicenseRef-internal")
    if "auditors" in policy:
        policy["auditors"] = (ledger.ids[HOSPITAL],)
    ledger.seal(ledger.policy(), ledger.policy(**policy), books, records, archive)
    manifest = tuple(p.ManifestRange(source.id, 0, 8) for source in (books, records, archive))
    run = CampaignRun(ledger, manifest, batch_size=batch_size, accumulator_window_steps=accumulator_window_steps)
    ledger.seal(*run.open())
    ledger.seal(run.grant([books.id, records.id], 1, 100))
    return ledger, run, books.id, records.id


def presents(run: CampaignRun) -> set[bytes]:
    """The sources of which the next step is shown examples."""
    return {
        source
        for source, _ in presented_examples(
            run.manifest, digest("sampler", run.name), run.batch_size, run.head.steps + 1
        )
    }


def admitted(run: CampaignRun, source: bytes) -> int:
    """How many examples of a source stand as admitted."""
    usage = usage_of(run, source)
    return 0 if usage is None else usage.admitted


def halved(run: CampaignRun) -> tuple[CheckedEvent, CheckedEvent, CheckedEvent]:
    """The next step after two refusals for one reason, the later examples first."""
    refusal, step = run.step()
    ((held, examples),) = listed(refusal)
    half = len(examples) // 2
    parts = []
    for offset, taken in enumerate((examples[half:], examples[:half])):
        assert isinstance(held, p.SourceRefusal)
        total = (p.Count(held.reason, len(taken)),)
        parts.append(
            remake(
                run,
                refusal,
                items=[(tell(held, count=len(taken)), taken)],
                governance=tell(refusal.governance, refused=total),
                sequence=refusal.entry.sequence + offset,
            )
        )
    run.sequence += 1
    return parts[0], parts[1], remake(run, step, sequence=step.entry.sequence + 1)


def steps() -> dict[str, object]:
    """Refusals, steps, rollbacks, evaluations, decisions, release and abandon."""
    ledger, run, _, records = opened(ED25519_LIST)
    first, second, step = halved(run)
    ledger.refuse(second)
    ledger.refuse(first, first)
    ledger.refuse(remake(run, step, sequence=first.entry.sequence))
    ledger.seal(first)
    ledger.seal(second)
    ledger.seal(step)
    ledger.seal(*run.step(flagged=records))
    undone = ledger.events[-1]
    rollback = run.rollback()
    run.attempt -= 1
    for discarded in ((undone.id, digest("lost")), (digest("lost"),), (undone.id, undone.id)):
        ledger.refuse(remake(run, rollback, operation=tell(rollback.operation, discarded=discarded)))
    lost = (digest("never on the log"), step.id, undone.id)
    rollback = remake(run, rollback, operation=tell(rollback.operation, discarded=lost))
    run.attempt += 1
    ledger.seal(rollback)
    place = {"sequence": run.sequence, "attempt": run.attempt}
    operation = p.Rollback((rollback.id,), "operator-decision", run.root(), 1, run.attempt + 1, ())
    ledger.refuse(remake(run, rollback, operation=operation, **place))
    refusal, step = run.step()
    ledger.seal(refusal)
    stale = remake(run, rollback, operation=tell(operation, discarded=(digest("job's own"),), next_index=2), **place)
    run.sequence, run.attempt = run.sequence - 1, run.attempt + 1
    run.snapshots.pop()
    ledger.seal(remake(run, stale, sequence=run.sequence))
    run.sequence += 1
    ledger.seal(*run.step())
    tests = [run.evaluation(high_micro=1_600_000, name=name) for name in ("first", "second", "third")]
    for test in tests:
        ledger.seal(test)
    ledger.seal(ledger.decision(run.id, tests[0].id, REJECT))
    ledger.seal(run.evaluation(high_micro=1_700_000, name="second"))
    ledger.seal(run.evaluation(name="third"), run.evaluation(name="first"))
    ledger.seal(ledger.decision(run.id, tests[0].id, ACCEPT, rationale="as agreed"))
    release = run.release()
    run.sequence -= 1
    ledger.refuse(release)
    ledger.seal(run.evaluation(name="second"))
    release = run.release()
    ledger.seal(release)
    ledger.seal(ledger.decision(run.id, release.id, "note", [HOSPITAL]))
    other = CampaignRun(ledger, run.manifest, name="another")
    ledger.seal(*other.open())
    ledger.seal(other.written(Kind.ABANDON, p.Portions(None, None, ledger.salted(p.Abandon("no need")))))
    return ledger.vector("steps, refusals, rollbacks and reviews")


def momentum() -> dict[str, object]:
    """A revocation, the step that flushes what is left of the source, its rollback, a new job key."""
    ledger, run, books, records = opened(ED25519_LIST, batch_size=7, momentum="flush")
    ledger.seal(*run.step())
    while records in presents(run) or not admitted(run, records):
        ledger.seal(*run.step())
    ledger.seal(ledger.revocation(HOSPITAL, records))
    ledger.refuse(ledger.revocation(HOSPITAL, records))
    ledger.seal(run.grant([books], 1, 100))
    *before, step = run.step(flushed=())
    ledger.refuse(step, *before)
    run.sequence -= 1 + len(before)
    run.snapshots.pop()
    ledger.seal(*run.step())
    assert (records, 0) in [(counts.source, counts.presented) for counts in run.head.undo_counts]
    ledger.seal(run.rollback("operator-decision"))
    ledger.seal(*run.step())
    ledger.seal(*run.step())
    wrong = run.grant([books], 1, 100, signers=[LIBRARIAN, HOSPITAL])
    run.grants -= 1
    ledger.refuse(wrong)
    key, old = Ed25519SigningKey(digest("another job key")), job_key_id(run.job)
    delegation = p.Delegation(
        run.id, job_key_id(key), key.scheme, ledger.now_ms, ledger.now_ms + 86_400_000, old, run.head.last_event
    )
    place = p.Portions(None, None, ledger.salted(delegation))
    ledger.seal(ledger.signed(Kind.DELEGATION, [OPERATOR], place, campaign=run.id))
    run.job = key
    ledger.seal(run.grant([books], 1, 100))
    ledger.seal(*run.step())
    return ledger.vector("momentum of a revoked source, and a job key replaced")


def audits() -> dict[str, object]:
    """Two audits that bar the release, one answered with a difference, and files in custody."""
    ledger, run, _, _ = opened(BLS_THRESHOLD, 100, auditors=(), custody=("data-source",))
    for _ in range(5):
        ledger.seal(*run.step())
    challenges = []
    for number in (1, 2):
        challenges.append(ledger.audit_challenge(HOSPITAL, run.id, number))
        ledger.refuse(ledger.audit_challenge(HOSPITAL, run.id, number + 1))
        ledger.seal(challenges[-1])
    missed = run.evaluation(high_micro=1_600_000)
    ledger.seal(missed)
    differing = {step: ("parameters",) for step in range(1, 5)}
    answer = ledger.audit_answer(challenges[0], differing_at=differing)
    ledger.seal(answer)
    ledger.refuse(ledger.audit_answer(challenges[0]))
    ledger.seal(ledger.decision(run.id, challenges[1].id, REJECT))
    ledger.seal(ledger.decision(run.id, missed.id, ACCEPT))
    ledger.seal(ledger.decision(run.id, challenges[0].id, REJECT))
    ledger.seal(ledger.audit_answer(challenges[1]))
    for challenge in challenges:
        ledger.seal(ledger.decision(run.id, challenge.id, ACCEPT))
    ledger.seal(ledger.audit_result(LIBRARIAN, run.id))
    custody = ledger.custody(HOSPITAL, run.id, run.head.last_event)
    ledger.seal(custody)
    ledger.refuse(ledger.custody(HOSPITAL, run.id, run.head.last_event))
    ledger.seal(*run.step())
    release = run.release()
    ledger.refuse(release)
    ledger.refuse(ledger.custody(LIBRARIAN, run.id, custody.entry.campaign))
    ledger.seal(ledger.custody(LIBRARIAN, run.id, run.head.last_event), release)
    return ledger.vector("audits by lot and custody")


def members() -> dict[str, object]:
    """Evidence, and an owner whose identity key is replaced: its successor answers for its sources."""
    ledger, run, _, records = opened(ED25519_LIST)
    report = ledger.contradiction(OPERATOR)
    ledger.seal(ledger.evidence(HOSPITAL, report))
    ledger.refuse(ledger.evidence(LIBRARIAN, report))
    ledger.seal(*run.step())
    membership, secrets = next_membership(ledger.genesis, ledger.committee, ledger.secrets, rotate=(HOSPITAL,))
    ledger.seal(change_event(ledger, membership))
    ledger.enter_epoch(membership, secrets)
    assert MemberId(ledger.ids[HOSPITAL]) in {member.id for member in ledger.committee.members}
    ledger.refuse(ledger.revocation(LIBRARIAN, records))
    ledger.seal(ledger.revocation(HOSPITAL, records))
    return ledger.vector("evidence, and a change of members")


def transitions() -> list[dict[str, object]]:
    """All stories."""
    return [steps(), momentum(), audits(), members()]
