"""Overlap: keyed fingerprints of a source's examples, by which a text that repeats one is recognised without it.

*Winnowing* (Schleimer, Wilkerson and Aiken, SIGMOD 2003). Every ``NGRAM_BYTES`` neighbouring bytes of an example are
hashed; of each ``WINDOW`` neighbouring hashes the least is kept (the rightmost of equals), with its place. So

* any run of ``GUARANTEED_BYTES`` bytes that a text shares with an example shares a fingerprint;
* no run shorter than ``NGRAM_BYTES`` ever does;
* two fingerprints at one distance in both, at most ``NGRAM_BYTES`` apart, prove every byte between them equal.

The hash is BLAKE2b (RFC 7693) keyed with a secret of the source's owner, of eight bytes: without the key nobody can ask
whether a guessed text is in a source. The key follows from the secret of the source's salts and gives none of them
away, so that an owner can hand it to an auditor.

An *overlap index* is the header (MessagePack array, canonical, after its length as four bytes big-endian) and, for each
fingerprint in rising order, 16 bytes big-endian: hash (8), example (4), place in the example (4). A source's claim
names its SHA-256. What the index leaves out cannot be found: whether it is whole, only who has the examples can say.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

from msgspec import Meta

from consensus.codec import decode, encode
from consensus.identifiers import Tag, tagged_hash
from consensus.portions import Bytes32, Natural, Wire
from consensus.rejection import Reason, Rejected

VERSION = 1
NGRAM_BYTES = 20
WINDOW = 12
GUARANTEED_BYTES = NGRAM_BYTES + WINDOW - 1
HASH_BYTES = 8
ENTRY_BYTES = HASH_BYTES + 8
MAX_HEADER_BYTES = 256
MAX_PLACES = 1_000
"""Of one fingerprint, at most so many places are looked at: what more examples share tells none of them apart."""

Fingerprint = tuple[bytes, int]
"""Hash and place."""


class OverlapHeader(Wire, frozen=True):
    """``key_check`` tells whether a key is the index's; it tells nothing of the key."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    ngram_bytes: Annotated[int, Meta(ge=NGRAM_BYTES, le=NGRAM_BYTES)]
    window: Annotated[int, Meta(ge=WINDOW, le=WINDOW)]
    key_check: Bytes32
    examples: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    fingerprints: Natural


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes ``start`` to ``end`` of a text, equal to those of the example from ``place`` on."""

    start: int
    end: int
    place: int

    @property
    def length(self) -> int:
        """In bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a text shares with one example: runs in order of ``start``, and how many of its bytes they cover."""

    example: int
    runs: tuple[Run, ...]
    covered_bytes: int

    @property
    def longest(self) -> Run:
        """The first of the longest runs."""
        return max(self.runs, key=lambda run: run.length)


class OverlapIndex:
    """An index's content, decoded.

    Raises:
        Rejected: ``MALFORMED``, ``OVERSIZED``.
    """

    def __init__(self, content: bytes) -> None:
        size = int.from_bytes(content[:4], "big")
        if len(content) < 4 or size > MAX_HEADER_BYTES:
            raise Rejected(Reason.MALFORMED, f"overlap index: expected a header of at most {MAX_HEADER_BYTES} bytes")
        self.header = decode(content[4 : 4 + size], OverlapHeader, max_bytes=MAX_HEADER_BYTES)
        self._entries = memoryview(content)[4 + size :]
        expected = self.header.fingerprints * ENTRY_BYTES
        if len(self._entries) != expected:
            raise Rejected(
                Reason.MALFORMED,
                f"overlap index: {len(self._entries)} bytes of fingerprints, expected {expected}",
            )

    def places(self, fingerprint: bytes) -> Iterator[tuple[int, int]]:
        """Examples and places where a hash was kept, in order, at most ``MAX_PLACES``.

        Raises:
            Rejected: ``MALFORMED`` for an example that the index does not count.
        """
        low, high = 0, self.header.fingerprints
        while low < high:
            middle = (low + high) // 2
            if self._hash(middle) < fingerprint:
                low = middle + 1
            else:
                high = middle
        for entry in range(low, min(self.header.fingerprints, low + MAX_PLACES)):
            if self._hash(entry) != fingerprint:
                return
            start = entry * ENTRY_BYTES + HASH_BYTES
            example = int.from_bytes(self._entries[start : start + 4], "big")
            if example >= self.header.examples:
                raise Rejected(
                    Reason.MALFORMED, f"overlap index: a fingerprint of example {example}, of {self.header.examples}"
                )
            yield example, int.from_bytes(self._entries[start + 4 : start + 8], "big")

    def _hash(self, entry: int) -> bytes:
        return bytes(self._entries[entry * ENTRY_BYTES : entry * ENTRY_BYTES + HASH_BYTES])


def overlap_key(source_salt: bytes) -> bytes:
    """The key of a source's fingerprints, from the secret its examples' salts are derived from."""
    return tagged_hash(Tag.OVERLAP_KEY, source_salt)


def key_check(key: bytes) -> bytes:
    """What an index says of its key."""
    return tagged_hash(Tag.OVERLAP_KEY_CHECK, key)


class OverlapBuilder:
    """Makes a source's overlap index of examples given one by one, in the order of its content root."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._examples = 0
        self._entries: list[bytes] = []

    def add(self, example: bytes) -> None:
        """The next example.

        Raises:
            Rejected: ``OVERSIZED``: it has 4 GiB or more.
        """
        if len(example) >> 32:
            raise Rejected(Reason.OVERSIZED, f"example {self._examples} has {len(example)} bytes, 4 GiB or more")
        number = self._examples.to_bytes(4, "big")
        self._examples += 1
        self._entries += [kept + number + place.to_bytes(4, "big") for kept, place in fingerprints(self._key, example)]

    def finish(self) -> bytes:
        """The index.

        Raises:
            Rejected: ``BAD_FIELD``: no example was given.
        """
        if not self._examples:
            raise Rejected(Reason.BAD_FIELD, "an overlap index is of at least one example")
        self._entries.sort()
        header = encode(
            OverlapHeader(VERSION, NGRAM_BYTES, WINDOW, key_check(self._key), self._examples, len(self._entries))
        )
        return b"".join((len(header).to_bytes(4, "big"), header, *self._entries))


def fingerprints(key: bytes, text: bytes) -> Iterator[Fingerprint]:
    """The hashes kept of a text, in order of place; none of one shorter than ``NGRAM_BYTES``."""
    hashes = ngram_hashes(key, text)
    waiting: deque[Fingerprint] = deque()
    last_kept = -1
    for place, own in enumerate(hashes):
        while waiting and waiting[-1][0] >= own:
            waiting.pop()
        waiting.append((own, place))
        if waiting[0][1] <= place - WINDOW:
            waiting.popleft()
        full = place >= WINDOW - 1 or place == len(hashes) - 1
        if full and waiting[0][1] != last_kept:
            last_kept = waiting[0][1]
            yield waiting[0]


def ngram_hashes(key: bytes, text: bytes) -> list[bytes]:
    """The keyed hash of every ``NGRAM_BYTES`` neighbours."""
    return [
        blake2b(text[place : place + NGRAM_BYTES], key=key, digest_size=HASH_BYTES).digest()
        for place in range(len(text) - NGRAM_BYTES + 1)
    ]


def overlaps(index: OverlapIndex, key: bytes, text: bytes, least_bytes: int = NGRAM_BYTES) -> tuple[Overlap, ...]:
    """What ``text`` shares with examples in runs of at least so many bytes, most bytes first.

    Runs are as long as fingerprints prove; the true ones may be up to ``WINDOW - 1`` bytes longer at either end. So
    those of ``least_bytes + 2 * (WINDOW - 1)`` and more are all found.

    Raises:
        Rejected: ``DIGEST_MISMATCH`` for another key than the index's; as ``OverlapIndex.places``.
    """
    if key_check(key) != index.header.key_check:
        raise Rejected(Reason.DIGEST_MISMATCH, "the key is not that of the overlap index")
    seen: dict[int, dict[int, list[int]]] = {}
    for start, own in enumerate(ngram_hashes(key, text)):
        for example, place in index.places(own):
            seen.setdefault(example, {}).setdefault(place - start, []).append(start)
    found = []
    for example, diagonals in seen.items():
        runs = sorted(
            (run for offset, starts in diagonals.items() for run in _runs(offset, starts) if run.length >= least_bytes),
            key=lambda run: (run.start, -run.end, run.place),
        )
        if runs:
            found.append(Overlap(example, tuple(runs), _covered(runs)))
    return tuple(sorted(found, key=lambda each: (-each.covered_bytes, -each.longest.length, each.example)))


def _runs(offset: int, starts: Sequence[int]) -> Iterator[Run]:
    """Runs along one distance between text and example, from hits in rising order."""
    first = last = starts[0]
    for start in starts[1:]:
        if start - last > NGRAM_BYTES:
            yield Run(first, last + NGRAM_BYTES, first + offset)
            first = start
        last = start
    yield Run(first, last + NGRAM_BYTES, first + offset)


def _covered(runs: Sequence[Run]) -> int:
    """Bytes in at least one of the runs, which are in order of start."""
    covered = reached = 0
    for run in runs:
        covered += max(0, run.end - max(run.start, reached))
        reached = max(reached, run.end)
    return covered
