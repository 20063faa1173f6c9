"""Which examples a campaign presents at each step: a pure function of its manifest and seed.

Each pass over the manifest (an epoch) is a pseudorandom permutation of 0 … n − 1, so that every presented
example can be named in advance and nothing is kept in memory. The permutation is a balanced Feistel
network over the next even power of two, walked until it falls below n (cycle walking: Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002), with SHA-256 round functions.
"""

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate

from consensus.identifiers import Tag, tagged_hash
from consensus.portions import ManifestRange

ROUNDS = 6
EPOCHS_REMEMBERED = 16
STEPS_REMEMBERED = 256
"""A step's refusals may come in as many events as it presents examples; each is judged by the same sample, and a step
once in each ledger block that is proposed with it. 32 KiB each at most."""


def presented_indexes(seed: bytes, manifest_size: int, batch_size: int, step: int) -> tuple[int, ...]:
    """Manifest indexes presented at ``step`` (from 1), in order of the batch, all different.

    ``manifest_size`` is the number of examples in the manifest, at least ``batch_size``; an epoch's last
    incomplete batch is left out.
    """
    epoch, batch = divmod(step - 1, manifest_size // batch_size)
    key = tagged_hash(Tag.SAMPLER, seed, epoch.to_bytes(8, "big"))
    first = batch * batch_size
    half_bits = max(1, ((manifest_size - 1).bit_length() + 1) // 2)
    places = range(first, first + batch_size)
    # A table of all round values costs no more than the batch would without it, and serves the whole epoch.
    if 1 << half_bits <= batch_size:
        return _permuted_by(_tables(key, half_bits), manifest_size, half_bits, places)
    return tuple(_permuted(key, manifest_size, half_bits, place) for place in places)


def presented_examples(
    manifest: tuple[ManifestRange, ...], seed: bytes, batch_size: int, step: int
) -> tuple[tuple[bytes, int], ...]:
    """(source, example index in the source) presented at ``step``, in the order of the batch."""
    ends = list(accumulate(entry.count for entry in manifest))
    presented = []
    for index in presented_indexes(seed, ends[-1], batch_size, step):
        at = bisect_right(ends, index)
        entry = manifest[at]
        presented.append((entry.source, entry.first + index - (ends[at] - entry.count)))
    return tuple(presented)


@lru_cache(maxsize=STEPS_REMEMBERED)
def presented_by_source(
    manifest: tuple[ManifestRange, ...], seed: bytes, batch_size: int, step: int
) -> Mapping[bytes, "array[int]"]:
    """``presented_examples`` by source: example indexes, strictly rising. Not to be changed by the caller."""
    ends = list(accumulate(entry.count for entry in manifest))
    indexes = sorted(presented_indexes(seed, ends[-1], batch_size, step))
    found: dict[bytes, array[int]] = {}
    first = 0
    for entry, end in zip(manifest, ends, strict=True):
        last = bisect_left(indexes, end, first)
        if last > first:
            shift = entry.first - (end - entry.count)
            examples = [index + shift for index in indexes[first:last]] if shift else indexes[first:last]
            held = found.get(entry.source)
            found[entry.source] = array("Q", examples if held is None else sorted((*held, *examples)))
        first = last
    return found


def is_among(presented: Mapping[bytes, "array[int]"], source: bytes, example: int) -> bool:
    """Whether ``presented_by_source`` names an example."""
    rising = presented.get(source, _NONE)
    at = bisect_left(rising, example)
    return at < len(rising) and rising[at] == example


_NONE = array("Q")


def _permuted(key: bytes, size: int, half_bits: int, value: int) -> int:
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for number in range(ROUNDS):
            left, right = right, left ^ _round(key + bytes([number]), mask, right)
        value = (left << half_bits) | right
        if value < size:
            return value


def _permuted_by(rounds: tuple[list[int], ...], size: int, half_bits: int, places: Iterable[int]) -> tuple[int, ...]:
    """``_permuted`` of each place. Rounds in pairs: after two, each half is in its place again."""
    mask = (1 << half_bits) - 1
    first, second, third, fourth, fifth, sixth = rounds
    permuted = []
    for place in places:
        value = place
        while True:
            left, right = value >> half_bits, value & mask
            left ^= first[right]
            right ^= second[left]
            left ^= third[right]
            right ^= fourth[left]
            left ^= fifth[right]
            right ^= sixth[left]
            value = left << half_bits | right
            if value < size:
                break
        permuted.append(value)
    return tuple(permuted)


def _round(prefix: bytes, mask: int, right: int) -> int:
    return int.from_bytes(hashlib.sha256(prefix + right.to_bytes(8, "big")).digest()[:8], "big") & mask


@lru_cache(maxsize=EPOCHS_REMEMBERED)
def _tables(key: bytes, half_bits: int) -> tuple[list[int], ...]:
    """The values of every round, by its right half."""
    mask = (1 << half_bits) - 1
    return tuple([_round(key + bytes([number]), mask, right) for right in range(mask + 1)] for number in range(ROUNDS))
