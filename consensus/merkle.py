"""The RFC 9162 Merkle tree: roots, growth, inclusion and consistency proofs.

Rules and their sources:

- Tree hashes, with 0x00 before a leaf and 0x01 before a node: RFC 9162 §2.1.1. The domain is the RFC's, not
  ``identifiers.Tag``, so that any RFC 9162 or C2SP tool reads the log.
- Inclusion proofs: §2.1.3. Consistency proofs: §2.1.4. Both verifiers fail on a proof that is one hash too
  short or too long and on a hash that is not 32 bytes (concatenated parts of other lengths can collide).

A *perfect node* ``(level, index)`` is the root of the leaves ``[index << level, (index + 1) << level)``, all
of them present. It never changes once written; every root and every proof is made of perfect nodes alone, and
those at levels 0, 8, 16 … are what C2SP tiles hold.

A ``Frontier`` is the compact range ``[0, size)``: the few perfect nodes that cover the tree. It is immutable,
so that each branch of the BFT round grows its own from the finalized one.

A proof says nothing about the tree's *size* by itself: some sizes share a path's shape. Take size and root
from the same certified header or signed checkpoint, never from the proof's sender.

Left to others: persistence of nodes and tiles (``node/store.py``), who signed a root (``certificate.py``,
``checkpoint.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from consensus.identifiers import DIGEST_BYTES, Digest
from consensus.rejection import InvariantBroken, Reason, Rejected

MAX_SIZE = 2**63
EMPTY_ROOT = Digest(sha256().digest())

LEAF_PREFIX = b"\x00"
NODE_PREFIX = b"\x01"
SIZE_BYTES = 8
MAX_FRONTIER_BYTES = SIZE_BYTES + 64 * DIGEST_BYTES

Node = tuple[int, int, Digest]
"""A perfect node with its place: level, index, hash."""

NodeReader = Callable[[int, int], bytes]
"""Where proofs take perfect nodes from: level, index → hash. Level 0 is the leaf hashes."""


def leaf_hash(entry: bytes) -> Digest:
    """Hash of a log entry: SHA-256(0x00 ‖ entry)."""
    return Digest(sha256(LEAF_PREFIX + entry).digest())


def node_hash(left: bytes, right: bytes) -> Digest:
    """Hash of two subtrees: SHA-256(0x01 ‖ left ‖ right)."""
    return Digest(sha256(NODE_PREFIX + left + right).digest())


@dataclass(frozen=True, slots=True)
class Frontier:
    """The perfect nodes covering a tree of ``size`` leaves, largest (leftmost) first. Immutable."""

    size: int = 0
    peaks: tuple[Digest, ...] = ()

    @property
    def root(self) -> Digest:
        """The tree's root hash."""
        if not self.peaks:
            return EMPTY_ROOT
        root = self.peaks[-1]
        for peak in self.peaks[-2::-1]:
            root = node_hash(peak, root)
        return root

    def nodes(self) -> list[Node]:
        """The peaks with their places in the tree, largest first."""
        placed: list[Node] = []
        first = 0
        for peak, level in zip(self.peaks, _levels(self.size), strict=True):
            placed.append((level, first >> level, peak))
            first += 1 << level
        return placed

    def append(self, leaf_hashes: Sequence[bytes]) -> "Frontier":
        """The frontier after appending ``leaf_hashes`` in order.

        Raises:
            InvariantBroken: a leaf hash is not 32 bytes, or the tree would pass ``MAX_SIZE``.
        """
        grown, _ = self._grow(leaf_hashes)
        return grown

    def append_with_nodes(self, leaf_hashes: Sequence[bytes]) -> tuple["Frontier", list[Node]]:
        """As ``append``, with every interior node it completed, level by level from 1, left to right."""
        grown, runs = self._grow(leaf_hashes)
        nodes = [
            (level, first + offset, Digest(digest))
            for level, (first, run) in enumerate(runs, start=1)
            for offset, digest in enumerate(run)
        ]
        return grown, nodes

    def to_bytes(self) -> bytes:
        """Canonical storage form: size as 8 bytes big-endian, then the peaks."""
        return self.size.to_bytes(SIZE_BYTES, "big") + b"".join(self.peaks)

    @classmethod
    def from_bytes(cls, encoded: bytes) -> "Frontier":
        """The frontier whose ``to_bytes`` is ``encoded``.

        Raises:
            Rejected: ``MALFORMED`` when the size is out of bounds or does not call for that many peaks.
        """
        size = int.from_bytes(encoded[:SIZE_BYTES], "big")
        expected_bytes = SIZE_BYTES + DIGEST_BYTES * size.bit_count()
        if len(encoded) != expected_bytes or size > MAX_SIZE:
            raise Rejected(
                Reason.MALFORMED,
                f"frontier of size {size} in {len(encoded)} bytes, expected {expected_bytes}",
            )
        starts = range(SIZE_BYTES, expected_bytes, DIGEST_BYTES)
        return cls(size, tuple(Digest(bytes(encoded[start : start + DIGEST_BYTES])) for start in starts))

    def _grow(self, leaf_hashes: Sequence[bytes]) -> tuple["Frontier", list[tuple[int, list[bytes]]]]:
        """Append level by level; runs give, from level 1 up, first index and hashes of completed nodes."""
        if not leaf_hashes:
            return self, []
        if set(map(len, leaf_hashes)) != {DIGEST_BYTES}:
            raise InvariantBroken("appending a leaf hash that is not 32 bytes")
        size = self.size + len(leaf_hashes)
        if size > MAX_SIZE:
            raise InvariantBroken(f"a tree of {size} leaves, at most {MAX_SIZE} allowed")
        kept = list(self.peaks)
        new_peaks: list[bytes] = []
        runs: list[tuple[int, list[bytes]]] = []
        level = 0
        run = list(leaf_hashes)
        first = self.size
        while run:
            if first & 1:
                # The old peak of this level is the left sibling of the run's first node.
                run = [kept.pop(), *run]
                first -= 1
            if len(run) & 1:
                new_peaks.append(run[-1])
            run = [
                sha256(NODE_PREFIX + left + right).digest() for left, right in zip(run[::2], run[1::2], strict=False)
            ]
            level += 1
            first >>= 1
            if run:
                runs.append((first, run))
        new_peaks.reverse()
        return Frontier(size, (*kept, *map(Digest, new_peaks))), runs


def inclusion_proof(index: int, size: int, node: NodeReader) -> tuple[bytes, ...]:
    """The path from leaf ``index`` to the root of the first ``size`` leaves, leaf's sibling first (§2.1.3.1).

    Raises:
        Rejected: ``BAD_PROOF`` when there is no such leaf.
    """
    _check_index(index, size)
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_root(middle, end, node))
            end = middle
        else:
            path.append(_range_root(start, middle, node))
            start = middle
    return tuple(reversed(path))


def consistency_proof(first: int, second: int, node: NodeReader) -> tuple[bytes, ...]:
    """What shows that the first ``first`` of ``second`` leaves are the older tree (§2.1.4.1).

    Empty when the sizes are equal or the older tree is empty.

    Raises:
        Rejected: ``BAD_PROOF`` unless 0 ≤ ``first`` ≤ ``second`` ≤ ``MAX_SIZE``.
    """
    _check_sizes(first, second)
    if first in (0, second):
        return ()
    path: list[bytes] = []
    start, end = 0, second
    while first != end:
        middle = start + _split(end - start)
        if first <= middle:
            path.append(_range_root(middle, end, node))
            end = middle
        else:
            path.append(_range_root(start, middle, node))
            start = middle
    if start:
        # Else the remaining subtree is the whole older tree, whose root the verifier has.
        path.append(_range_root(start, end, node))
    return tuple(reversed(path))


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Leaf hash ``leaf`` stands at ``index`` in the tree of ``size`` leaves and root ``root`` (§2.1.3.2).

    Raises:
        Rejected: ``BAD_PROOF``.
    """
    _check_hashes((leaf, root, *_bounded(proof)))
    _check_root("tree", inclusion_root(leaf, index, size, proof), root)


def inclusion_root(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root of the tree of ``size`` leaves in which ``proof`` puts leaf hash ``leaf`` at ``index``.

    That all of them are hashes of 32 bytes is the caller's to see to.

    Raises:
        Rejected: ``BAD_PROOF``.
    """
    _check_index(index, size)
    position, last = index, size - 1
    computed = leaf
    for sibling in proof:
        if last == 0:
            raise Rejected(Reason.BAD_PROOF, f"{len(proof)} hashes are too many for leaf {index} of {size}")
        if position & 1 or position == last:
            computed = sha256(NODE_PREFIX + sibling + computed).digest()
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            computed = sha256(NODE_PREFIX + computed + sibling).digest()
        position >>= 1
        last >>= 1
    if last != 0:
        raise Rejected(Reason.BAD_PROOF, f"{len(proof)} hashes are too few for leaf {index} of {size}")
    return computed


def verify_consistency(first: int, second: int, proof: Sequence[bytes], first_root: bytes, second_root: bytes) -> None:
    """The tree of ``first`` leaves is a prefix of the tree of ``second`` leaves (§2.1.4.2).

    Raises:
        Rejected: ``BAD_PROOF``.
    """
    _check_sizes(first, second)
    _check_hashes((first_root, second_root, *_bounded(proof)))
    if first in (0, second):
        if proof:
            raise Rejected(Reason.BAD_PROOF, f"{len(proof)} hashes between sizes {first} and {second}, expected 0")
        _check_root("older tree", EMPTY_ROOT if first == 0 else second_root, first_root)
        if second == 0:
            _check_root("newer tree", EMPTY_ROOT, second_root)
        return
    # Where the older tree is one perfect node, the proof starts at it and leaves it out.
    path = (first_root, *proof) if first.bit_count() == 1 else tuple(proof)
    if not path:
        raise Rejected(Reason.BAD_PROOF, f"no hashes between sizes {first} and {second}")
    position, last = first - 1, second - 1
    while position & 1:
        position >>= 1
        last >>= 1
    older = newer = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise Rejected(Reason.BAD_PROOF, f"{len(proof)} hashes are too many for sizes {first} and {second}")
        if position & 1 or position == last:
            older = node_hash(sibling, older)
            newer = node_hash(sibling, newer)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            newer = node_hash(newer, sibling)
        position >>= 1
        last >>= 1
    if last != 0:
        raise Rejected(Reason.BAD_PROOF, f"{len(proof)} hashes are too few for sizes {first} and {second}")
    _check_root("older tree", older, first_root)
    _check_root("newer tree", newer, second_root)


def root_of(leaf_hashes: Sequence[bytes]) -> Digest:
    """Root of a small in-memory tree (a portion, a list of examples, tensors)."""
    if len(leaf_hashes) == 1 and len(leaf_hashes[0]) == DIGEST_BYTES:
        return Digest(leaf_hashes[0])
    return Frontier().append(leaf_hashes).root


def inclusion_proof_of(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Inclusion proof in a small in-memory tree.

    Raises:
        Rejected: ``BAD_PROOF`` when there is no such leaf.
    """
    _, node = _in_memory(leaf_hashes)
    return inclusion_proof(index, len(leaf_hashes), node)


def inclusion_proofs_of(leaf_hashes: Sequence[bytes]) -> tuple[Digest, list[tuple[bytes, ...]]]:
    """The root of a small in-memory tree, and the inclusion proof of each leaf."""
    frontier, node = _in_memory(leaf_hashes)
    return frontier.root, [inclusion_proof(index, frontier.size, node) for index in range(frontier.size)]


def _in_memory(leaf_hashes: Sequence[bytes]) -> tuple[Frontier, NodeReader]:
    frontier, nodes = Frontier().append_with_nodes(leaf_hashes)
    interior = {(level, position): digest for level, position, digest in nodes}
    return frontier, lambda level, position: interior[level, position] if level else leaf_hashes[position]


def _split(count: int) -> int:
    """The largest power of two below ``count``, for ``count`` ≥ 2."""
    return 1 << ((count - 1).bit_length() - 1)


def _range_root(start: int, end: int, node: NodeReader) -> bytes:
    """Root of the leaves ``[start, end)``, a range that §2.1.1 splits off."""
    peaks: list[bytes] = []
    while start < end:
        level = (end - start).bit_length() - 1
        peaks.append(node(level, start >> level))
        start += 1 << level
    root = peaks.pop()
    while peaks:
        root = node_hash(peaks.pop(), root)
    return root


def _levels(size: int) -> list[int]:
    """The levels of the peaks of a tree, largest first."""
    return [level for level in reversed(range(size.bit_length())) if size >> level & 1]


def _check_index(index: int, size: int) -> None:
    if not 0 <= index < size <= MAX_SIZE:
        raise Rejected(Reason.BAD_PROOF, f"no leaf {index} in a tree of {size}, at most {MAX_SIZE} allowed")


def _check_sizes(first: int, second: int) -> None:
    if not 0 <= first <= second <= MAX_SIZE:
        raise Rejected(Reason.BAD_PROOF, f"sizes {first} and {second}, expected 0 <= first <= second <= {MAX_SIZE}")


def _bounded(proof: Sequence[bytes]) -> Sequence[bytes]:
    """The proof, unless it is longer than any proof in a tree of ``MAX_SIZE`` can be."""
    if len(proof) > MAX_SIZE.bit_length():
        raise Rejected(Reason.BAD_PROOF, f"{len(proof)} hashes, at most {MAX_SIZE.bit_length()} allowed")
    return proof


def _check_hashes(hashes: Sequence[bytes]) -> None:
    for digest in hashes:
        if len(digest) != DIGEST_BYTES:
            raise Rejected(Reason.BAD_PROOF, f"a hash of {len(digest)} bytes, expected {DIGEST_BYTES}")


def _check_root(which: str, computed: bytes, expected: bytes) -> None:
    if computed != expected:
        raise Rejected(Reason.BAD_PROOF, f"root of the {which} is {expected.hex()}, the proof gives {computed.hex()}")
