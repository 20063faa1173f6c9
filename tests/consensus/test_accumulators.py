"""Accumulator windows: which step commits to one, and what a root binds."""

import msgspec
import pytest
from ledger_fixtures import Story, begin, digest
from rules_fixtures import assert_admitted, assert_refused

from consensus.accumulators import (
    AccumulatorWindow,
    WindowEntry,
    WindowTerms,
    decode_window,
    ends_window,
    window_bounds,
    window_root,
)
from consensus.codec import decode, encode
from consensus.membership import ED25519_LIST
from consensus.rejection import Reason, Rejected

ROOT = digest("the root of a window")


def window() -> AccumulatorWindow:
    entries = [(digest("policy", policy), digest("source", source)) for policy in "ab" for source in range(3)]
    blobs = [(b"", b""), *sorted(entries)]
    return AccumulatorWindow(
        1,
        WindowTerms(digest("campaign"), 11, 20),
        tuple(WindowEntry(*place, digest("blob", *place), 100 + n, b"", 0) for n, place in enumerate(blobs)),
    )


def granted(window_steps: int) -> Story:
    told = begin(window_steps, certificate_scheme=ED25519_LIST)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, 100))
    return told


def test_windows_partition_the_steps_and_the_last_may_be_short() -> None:
    ends = [step for step in range(1, 12) if ends_window(4, 11, step)]
    assert ends == [4, 8, 11]
    assert [window_bounds(4, 11, step) for step in (1, 4, 5, 9, 11)] == [(1, 4), (1, 4), (5, 8), (9, 11), (9, 11)]
    assert not any(ends_window(0, 11, step) for step in range(1, 12))


def test_step_that_ends_a_window_without_its_root_is_refused() -> None:
    told = granted(2)
    told.ledger.seal(*told.run.step())
    refusal, step = told.run.step()
    assert_refused(told.ledger, step, Reason.ACCUMULATORS_INCOMPLETE, before=[refusal])


def test_step_that_ends_a_window_with_its_root_is_admitted() -> None:
    told = granted(2)
    told.ledger.seal(*told.run.step())
    refusal, step = told.run.step(accumulator_root=ROOT)
    assert_admitted(told.ledger, step, before=[refusal])


@pytest.mark.parametrize("window_steps", [0, 2])
def test_root_in_a_step_that_ends_no_window_is_refused(window_steps: int) -> None:
    told = granted(window_steps)
    refusal, step = told.run.step(accumulator_root=ROOT)
    assert_refused(told.ledger, step, Reason.ACCUMULATORS_INCOMPLETE, before=[refusal])


def test_window_read_back_is_the_committed_one() -> None:
    held = window()
    assert decode_window(encode(held), window_root(held)) == held
    assert held.total.source == b""
    assert len(held.of_sources) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda held: msgspec.structs.replace(held, terms=msgspec.structs.replace(held.terms, last_step=21)),
        lambda held: msgspec.structs.replace(held, entries=held.entries[:-1]),
        lambda held: msgspec.structs.replace(
            held, entries=(*held.entries[:-1], msgspec.structs.replace(held.entries[-1], size_bytes=7))
        ),
        lambda held: msgspec.structs.replace(
            held, entries=(*held.entries[:-1], msgspec.structs.replace(held.entries[-1], blob_sha256=digest("other")))
        ),
    ],
)
def test_altered_window_is_refused(change: object) -> None:
    held = window()
    with pytest.raises(Rejected) as refused:
        decode_window(encode(change(held)), window_root(held))  # type: ignore[operator]
    assert refused.value.reason is Reason.DIGEST_MISMATCH


@pytest.mark.parametrize(
    "change",
    [
        lambda held: msgspec.structs.replace(held, entries=held.entries[1:]),
        lambda held: msgspec.structs.replace(held, entries=(*held.entries, held.entries[-1])),
        lambda held: msgspec.structs.replace(held, entries=(held.entries[0], *reversed(held.entries[1:]))),
        lambda held: msgspec.structs.replace(held, terms=msgspec.structs.replace(held.terms, first_step=21)),
    ],
)
def test_window_out_of_order_has_no_root(change: object) -> None:
    with pytest.raises(Rejected) as refused:
        window_root(change(window()))  # type: ignore[operator]
    assert refused.value.reason is Reason.BAD_FIELD


def test_entry_with_a_source_and_no_policy_is_malformed() -> None:
    entry = window().entries[1]
    mangled = encode(entry).replace(bytes([0xC4, 32]) + entry.policy, bytes([0xC4, 0]))
    with pytest.raises(Rejected) as refused:
        decode(mangled, WindowEntry, 1_000)
    assert refused.value.reason is Reason.MALFORMED
