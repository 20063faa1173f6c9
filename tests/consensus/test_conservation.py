"""Conservation, statefully: a random job against plain bookkeeping; the state's totals are always the model's."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rules_fixtures import granted, head_of, usage_of

from consensus import portions as p
from consensus.event import CheckedEvent
from consensus.rejection import Reason, Rejected


class Job(RuleBasedStateMachine):
    """Steps, flagged steps, rollbacks, rollbacks of nothing, new grants and replays, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.told = granted()
        self.sources = (self.told.books, self.told.records, self.told.archive)
        self.admitted: Counter[bytes] = Counter()
        self.refused: Counter[tuple[bytes, str]] = Counter()
        self.discarded: Counter[bytes] = Counter()
        self.steps: list[tuple[Counter[bytes], Counter[tuple[bytes, str]], bytes]] = []
        self.totals: Counter[str] = Counter()
        self.events: list[CheckedEvent] = []
        self.attempt = 0
        self.must_undo = False
        self.may_undo = False

    def take(self, *events: CheckedEvent) -> None:
        self.told.ledger.seal(*events)
        self.events += events

    @precondition(lambda self: not self.must_undo)
    @rule(flagged=st.booleans())
    def step(self, flagged: bool) -> None:
        run = self.told.run
        before = head_of(run).root
        flag = run._grant().sources[0] if flagged else None
        try:
            events = run.step(flagged=flag)
        except KeyError:  # the flagged source has no example in this batch
            run.sequence = head_of(run).next_sequence
            events = run.step()
            flagged = False
        self.take(*events)
        admitted: Counter[bytes] = Counter()
        refused: Counter[tuple[bytes, str]] = Counter()
        step = events[-1]
        assert step.portions.data is not None
        for use, item in zip(step.items, step.portions.data.items, strict=True):
            assert isinstance(use, p.SourceUse)
            admitted[use.source] += len(item.examples)
            for count in use.refused:
                refused[use.source, count.reason] += count.count
        self.steps.append((admitted, refused, before))
        self.admitted += admitted
        self.refused += refused
        self.totals["refusal events"] += len(events) - 1
        self.must_undo, self.may_undo = flagged, True

    @precondition(lambda self: self.may_undo)
    @rule()
    def undo(self) -> None:
        reason = Reason.MEMORIZATION_ABOVE_THRESHOLD.value if self.must_undo else "operator-decision"
        self.take(self.told.run.rollback(reason))
        admitted, refused, _ = self.steps.pop()
        self.admitted -= admitted
        self.refused -= refused
        self.discarded += admitted
        self.totals["discarded"] += 1
        self.totals["rollbacks"] += 1
        self.attempt += 1
        self.must_undo = self.may_undo = False

    @precondition(lambda self: not self.must_undo)
    @rule(narrow=st.booleans())
    def renew(self, narrow: bool) -> None:
        named = [self.told.books] if narrow else [self.told.books, self.told.records]
        self.take(self.told.run.grant(named, 1, 100))
        self.may_undo = False

    @precondition(lambda self: self.events)
    @rule(at=st.integers(min_value=0))
    def replay(self, at: int) -> None:
        event = self.events[at % len(self.events)]
        with pytest.raises(Rejected) as caught:
            self.told.ledger.seal(event)
        assert caught.value.reason == Reason.DUPLICATE

    @invariant()
    def totals_are_the_models(self) -> None:
        head = head_of(self.told.run)
        assert head.admitted == self.admitted.total()
        assert head.refused == self.refused.total()
        assert head.presented == head.admitted + head.refused == 12 * len(self.steps)
        assert head.steps == len(self.steps)
        assert head.attempt == self.attempt
        assert head.rollback_required == self.must_undo
        assert head.refusal_events == self.totals["refusal events"]
        assert (head.discarded_steps, head.rollbacks) == (self.totals["discarded"], self.totals["rollbacks"])
        for source in self.sources:
            usage = usage_of(self.told.run, source)
            if usage is None:
                assert not self.admitted[source]
                assert not self.discarded[source]
                continue
            assert usage.admitted == self.admitted[source]
            assert usage.discarded == self.discarded[source]
            counts = {count.reason: count.count for count in usage.refused}
            assert counts == {reason: n for (of, reason), n in self.refused.items() if of == source and n}
            assert usage.presented == usage.admitted + sum(counts.values())


TestConservation = Job.TestCase
TestConservation.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
