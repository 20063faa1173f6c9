"""Refusals as other processes get them."""

import pickle

from consensus.rejection import InvariantBroken, Reason, Rejected, breaks_invariant


def test_refusal_sent_to_another_process_has_its_reason_and_detail() -> None:
    found = pickle.loads(pickle.dumps(Rejected(Reason.BAD_FIELD, "expected one, found two")))
    assert isinstance(found, Rejected)
    assert (found.reason, found.detail, str(found)) == (
        Reason.BAD_FIELD,
        "expected one, found two",
        "bad-field: expected one, found two",
    )


def test_broken_invariant_is_found_among_what_several_tasks_raised() -> None:
    broken = InvariantBroken("the head")
    assert breaks_invariant(broken)
    assert breaks_invariant(ExceptionGroup("two", [KeyError(), ExceptionGroup("one", [broken])]))
    assert not breaks_invariant(ExceptionGroup("two", [KeyError(), Rejected(Reason.BAD_FIELD, "one")]))
    assert not breaks_invariant(KeyError())
