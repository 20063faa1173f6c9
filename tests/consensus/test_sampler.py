"""The sampler: permutations of the manifest, the same for everyone, all examples once per epoch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import digest

from consensus import sampler
from consensus.identifiers import ZERO_DIGEST, Tag, tagged_hash
from consensus.portions import ManifestRange
from consensus.sampler import is_among, presented_by_source, presented_examples, presented_indexes

SEED = digest("seed")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.data(), st.binary(min_size=32, max_size=32), st.integers(0, 5))
def test_every_epoch_presents_different_examples_of_the_manifest(
    size: int, drawn: st.DataObject, seed: bytes, epoch: int
) -> None:
    batch = drawn.draw(st.integers(1, size))
    batches = size // batch
    shown = [
        index
        for step in range(1 + epoch * batches, 1 + (epoch + 1) * batches)
        for index in presented_indexes(seed, size, batch, step)
    ]
    assert len(shown) == len(set(shown)) == batches * batch
    assert set(shown) <= set(range(size))


def test_epochs_seeds_and_steps_differ() -> None:
    orders = {
        presented_indexes(SEED, 64, 64, 1),
        presented_indexes(SEED, 64, 64, 2),
        presented_indexes(digest("other"), 64, 64, 1),
    }
    assert len(orders) == 3
    assert all(sorted(order) == list(range(64)) for order in orders)


@pytest.mark.parametrize("size", [2**31, 2**53 - 1, 512 * (2**53 - 1)])
def test_manifest_of_the_largest_size_is_sampled(size: int) -> None:
    shown = presented_indexes(SEED, size, 64, 2**53 - 1)
    assert len(set(shown)) == 64
    assert all(0 <= index < size for index in shown)


def test_indexes_are_spread_evenly() -> None:
    counts = [0] * 8
    for number in range(400):
        counts[presented_indexes(digest(number), 8, 1, 1)[0]] += 1
    assert all(25 <= count <= 75 for count in counts), counts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1_000), st.integers(1, 20)), min_size=1, max_size=6), st.integers(1, 50))
def test_examples_are_those_of_the_manifests_ranges(ranges: list[tuple[int, int]], step: int) -> None:
    # Two ranges of each source, the later examples first.
    manifest = tuple(
        ManifestRange(digest(n // 2), first + 2_000 * (1 - n % 2), count) for n, (first, count) in enumerate(ranges)
    )
    total = sum(count for _, count in ranges)
    listed = {(entry.source, entry.first + n) for entry in manifest for n in range(entry.count)}
    shown = presented_examples(manifest, SEED, total, step)
    assert len(shown) == total
    assert set(shown) == listed
    by_source = presented_by_source(manifest, SEED, total, step)
    assert {(source, example) for source, examples in by_source.items() for example in examples} == listed
    assert all(list(examples) == sorted(set(examples)) for examples in by_source.values())
    assert all(is_among(by_source, *example) for example in listed)
    assert not any(is_among(by_source, source, 2**53) or is_among(by_source, ZERO_DIGEST, 0) for source in by_source)


def test_sampler_is_fixed() -> None:
    assert presented_indexes(bytes(32), 10, 5, 1) == presented_indexes(bytes(32), 10, 5, 1)
    assert sorted(presented_indexes(bytes(32), 10, 5, 1) + presented_indexes(bytes(32), 10, 5, 2)) == list(range(10))


def test_many_refusals_of_one_step_do_not_sample_it_anew_each() -> None:
    """A job that refuses 4,096 examples one by one would otherwise cost every validator minutes for a ledger block."""
    manifest = (ManifestRange(digest("large"), 0, 2**40),)
    presented_by_source.cache_clear()
    shown = [presented_by_source(manifest, SEED, 512, 3) for _ in range(50)]
    assert all(each is shown[0] for each in shown)
    assert presented_by_source.cache_info().misses == 1
    assert presented_by_source(manifest, SEED, 512, 4) != shown[0]


@pytest.mark.parametrize(("size", "batch"), [(40, 8), (64, 32), (1_000, 32), (5_000, 128), (70_000, 512)])
def test_table_of_round_values_changes_nothing(size: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with_table = [presented_indexes(bytes(32), size, batch, step) for step in (1, 2)]
    used: list[bytes] = []

    def one_by_one(rounds: object, of: int, half_bits: int, places: range) -> tuple[int, ...]:
        used.append(b"")
        key = tagged_hash(Tag.SAMPLER, bytes(32), bytes(8))
        return tuple(sampler._permuted(key, of, half_bits, place) for place in places)

    monkeypatch.setattr(sampler, "_permuted_by", one_by_one)
    first_epoch = [presented_indexes(bytes(32), size, batch, step) for step in (1, 2)]
    assert first_epoch == with_table[:2]
    assert len(used) == 2
