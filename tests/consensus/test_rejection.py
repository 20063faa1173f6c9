"""Refusals as other processes get them."""

import pickle

from consensus.rejection import Reason, Rejected


def test_refusal_sent_to_another_process_has_its_reason_and_detail() -> None:
    found = pickle.loads(pickle.dumps(Rejected(Reason.BAD_FIELD, "expected one, found two")))
    assert isinstance(found, Rejected)
    assert (found.reason, found.detail, str(found)) == (
        Reason.BAD_FIELD,
        "expected one, found two",
        "bad-field: expected one, found two",
    )
