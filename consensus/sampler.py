"""Which examples a campaign presents at each step: a pure function of its manifest and seed.

Each pass over the manifest (an epoch) is a pseudorandom permutation of 0 … n − 1, so that every presented
example can be named in advance and nothing is kept in memory. The permutation is a balanced Feistel
network over the next even power of two, walked until it falls below n (cycle walking: Black and Rogaway,
"Ciphers with Arbitrary Finite Domains", CT-RSA 2002), with SHA-256 round functions.
"""

import hashlib
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

from consensus.identifiers import Tag, tagged_hash
from consensus.portions import ManifestRange

ROUNDS = 6
STEPS_REMEMBERED = 64
"""A step's refusals may come in as many events as it presents examples; each is judged by the same sample."""


def presented_indexes(seed: bytes, manifest_size: int, batch_size: int, step: int) -> tuple[int, ...]:
    """Manifest indexes presented at ``step`` (from 1), in order of the batch, all different.

    ``manifest_size`` is the number of examples in the manifest, at least ``batch_size``; an epoch's last
    incomplete batch is left out.
    """
    epoch, batch = divmod(step - 1, manifest_size // batch_size)
    key = tagged_hash(Tag.SAMPLER, seed, epoch.to_bytes(8, "big"))
    first = batch * batch_size
    return tuple(_permuted(key, manifest_size, first + offset) for offset in range(batch_size))


@lru_cache(maxsize=STEPS_REMEMBERED)
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


def _permuted(key: bytes, size: int, value: int) -> int:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = value >> half_bits, value & mask
        for number in range(ROUNDS):
            digest = hashlib.sha256(key + bytes([number]) + right.to_bytes(8, "big")).digest()
            left, right = right, left ^ (int.from_bytes(digest[:8], "big") & mask)
        value = (left << half_bits) | right
        if value < size:
            return value
