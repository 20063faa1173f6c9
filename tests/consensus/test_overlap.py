"""Overlap indexes: what they must find, what they must not, and what is no index."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus import overlap
from consensus.overlap import (
    ENTRY_BYTES,
    GUARANTEED_BYTES,
    NGRAM_BYTES,
    WINDOW,
    OverlapBuilder,
    OverlapIndex,
    Run,
    fingerprints,
    ngram_hashes,
    overlap_key,
    overlaps,
)
from consensus.rejection import Reason, Rejected

KEY = bytes(range(32))
EXAMPLES = [
    b"The keeper of Arnholt is Mirela Voss. " + hashlib.shake_256(b"%d" % number).hexdigest(96).encode()
    for number in range(6)
]


def made(*examples: bytes, key: bytes = KEY) -> bytes:
    builder = OverlapBuilder(key)
    for example in examples:
        builder.add(example)
    return builder.finish()


@given(st.binary(max_size=60), st.binary(min_size=GUARANTEED_BYTES, max_size=120), st.binary(max_size=60), st.data())
@settings(max_examples=150, deadline=None)
def test_every_shared_run_of_the_guaranteed_length_is_found_and_no_run_is_untrue(
    before: bytes, shared: bytes, after: bytes, data: st.DataObject
) -> None:
    example = data.draw(st.binary(max_size=60)) + shared + data.draw(st.binary(max_size=60))
    text = before + shared + after
    found = overlaps(OverlapIndex(made(b"x", example)), KEY, text)
    assert [each.example for each in found] == [1]
    for run in found[0].runs:
        assert run.length >= NGRAM_BYTES
        assert text[run.start : run.end] == example[run.place : run.place + run.length]
    assert found[0].covered_bytes == len({at for run in found[0].runs for at in range(run.start, run.end)})


@given(st.integers(2 * WINDOW + NGRAM_BYTES, 300))
@settings(max_examples=40, deadline=None)
def test_a_whole_example_is_found_in_one_run_but_for_its_ends(length: int) -> None:
    example = hashlib.shake_256(b"example").digest(length)
    (found,) = overlaps(OverlapIndex(made(example)), KEY, example)
    assert found.longest.length >= length - 2 * (WINDOW - 1)
    assert found.longest.place == found.longest.start


def test_an_altered_copy_is_found_in_pieces_and_the_most_repeated_example_comes_first() -> None:
    index = OverlapIndex(made(*EXAMPLES))
    text = EXAMPLES[4][:90] + b"!!" + EXAMPLES[4][92:180] + b" and " + EXAMPLES[2][38:100]
    first, second, *others = overlaps(index, KEY, text)
    assert (first.example, second.example) == (4, 2)
    assert len([run for run in first.runs if run.length > 50]) == 2
    assert all(other.covered_bytes < second.covered_bytes for other in others)
    assert [each.example for each in overlaps(index, KEY, text, least_bytes=60)] == [4]


def test_what_is_nowhere_repeated_or_too_short_is_not_found() -> None:
    index = OverlapIndex(made(*EXAMPLES))
    assert overlaps(index, KEY, b"Nothing of what is written here was in any of the examples.") == ()
    assert overlaps(index, KEY, EXAMPLES[0][: NGRAM_BYTES - 1]) == ()
    assert overlaps(OverlapIndex(made(b"short")), KEY, b"short" * 10) == ()


def test_short_texts_keep_one_fingerprint_and_equal_hashes_the_last() -> None:
    text = b"twenty bytes or more!"
    assert len(list(fingerprints(KEY, text))) == 1
    assert list(fingerprints(KEY, text[: NGRAM_BYTES - 1])) == []
    same = bytes(NGRAM_BYTES + WINDOW + 4)
    kept = [place for _, place in fingerprints(KEY, same)]
    assert kept == list(range(WINDOW - 1, len(same) - NGRAM_BYTES + 1))


def test_without_the_key_nothing_can_be_asked_and_another_key_is_named() -> None:
    index = OverlapIndex(made(*EXAMPLES))
    other = overlap_key(KEY)
    assert not set(ngram_hashes(other, EXAMPLES[0])) & set(ngram_hashes(KEY, EXAMPLES[0]))
    with pytest.raises(Rejected, match="the key is not that of the overlap index") as caught:
        overlaps(index, other, EXAMPLES[0])
    assert caught.value.reason is Reason.DIGEST_MISMATCH
    assert other not in (KEY, made(*EXAMPLES))


def test_what_too_many_examples_share_is_looked_at_in_a_few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MAX_PLACES", 3)
    phrase = b"a phrase that every one of the examples has in it"
    index = OverlapIndex(made(*(phrase for _ in range(9))))
    assert [each.example for each in overlaps(index, KEY, phrase)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", Reason.MALFORMED),
        (b"\x00\x00\x00", Reason.MALFORMED),
        (b"\xff\xff\xff\xff" + bytes(64), Reason.MALFORMED),
        (made(*EXAMPLES)[:-1], Reason.MALFORMED),
        (made(*EXAMPLES) + bytes(ENTRY_BYTES), Reason.MALFORMED),
        (made(*EXAMPLES)[:20], Reason.MALFORMED),
    ],
)
def test_what_is_no_index_is_refused_by_name(content: bytes, reason: Reason) -> None:
    with pytest.raises(Rejected) as caught:
        OverlapIndex(content)
    assert caught.value.reason is reason


def test_fingerprint_of_an_example_that_the_index_does_not_count_is_refused() -> None:
    whole = made(EXAMPLES[0])
    start = len(whole) - OverlapIndex(whole).header.fingerprints * ENTRY_BYTES
    entries = [whole[at : at + ENTRY_BYTES] for at in range(start, len(whole), ENTRY_BYTES)]
    altered = b"".join(entry[:8] + b"\x00\x00\x00\x07" + entry[12:] for entry in entries)
    with pytest.raises(Rejected, match="a fingerprint of example 7, of 1"):
        overlaps(OverlapIndex(whole[:start] + altered), KEY, EXAMPLES[0])


@given(st.integers(0, 400), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_an_altered_index_is_refused_or_proves_no_more_than_hashes_say(at: int, flip: int) -> None:
    whole = bytearray(made(*EXAMPLES[:2]))
    whole[at % len(whole)] ^= flip
    try:
        found = overlaps(OverlapIndex(bytes(whole)), KEY, EXAMPLES[0])
    except Rejected:
        return
    assert all(each.example < 2 for each in found)


def test_an_index_of_nothing_is_refused() -> None:
    with pytest.raises(Rejected, match="at least one example"):
        OverlapBuilder(KEY).finish()


def test_an_example_of_four_gigabytes_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    with pytest.raises(Rejected, match="4 GiB or more"):
        OverlapBuilder(KEY).add(Huge())


def test_runs_further_apart_than_a_fingerprint_is_long_are_two() -> None:
    left, right = hashlib.shake_256(b"left").digest(60), hashlib.shake_256(b"right").digest(60)
    gap = bytes(30)
    (found,) = overlaps(OverlapIndex(made(left + gap + right)), KEY, left + b"\x01" * 30 + right)
    assert [isinstance(run, Run) and run.start == run.place for run in found.runs] == [True, True]
