"""The authenticated sorted map behind ``state_root``: a persistent crit-bit tree with proofs.

The tree. A *branch* holds the first bit at which the keys below it differ and two subtrees, 0 to the left,
1 to the right; a *leaf* holds a key and its value. Bits count from the first byte's highest, so in-order is
byte order. Branch bits grow strictly on every way down. A set of entries has exactly one such tree: the
root is the same whatever the order of insertions and removals (history independence), and costs no empty
placeholders.

Keys are exactly ``KEY_BYTES`` = 33 bytes, a table byte and a 32-byte digest, so no key is another's prefix.

Hashes (``identifiers.tagged_hash``)::

    leaf    STATE_LEAF(key, value)
    branch  STATE_NODE(bit as 2 bytes big-endian, left, right)
    empty   STATE_EMPTY()

Why a proof is sound. ``state_root`` is certified: a quorum in every role recomputed it by this code, so it
is the root of a real crit-bit tree. A proof gives a leaf and, root first, the branches above it as (bit,
sibling hash); which side the sibling is on is decided by the *queried* key's bit, never by the sender.
Recomputing the root from them shows, by collision resistance and because the tags keep leaf and branch
apart, that these are the tree's own nodes and that they are what a search for the queried key visits. A
search for a present key ends at its leaf; so if this leaf bears another key, the queried key is absent. One
format serves both answers.

A prefix proof gives all entries of one subtree and the branches above it, all of which decide on bits
*inside* the prefix: no key with the prefix can lie elsewhere. The verifier rebuilds the subtree from the
entries; its hash leaves no room for an omission. That a prefix is unused is shown by the leaf at which a
search for any key under it ends: had the prefix entries, that leaf would be one of them.

Maps are immutable; a change shares all untouched nodes with its origin, so each branch of the BFT round
lays its own over the finalized one. Hashes of branches are filled in when a root or a proof is asked for, and before a
change: a branch without one belongs to the batch of changes that made it, and the rest of that batch changes it
in place, so that a batch copies and hashes each touched branch once. A batch goes through its keys in order, each from
where its way parts from the one before. Loops, no recursion: depth is bounded by 264, not by the interpreter.

Left to others: what keys and values mean (``state.py``), storage (``node/store.py``), who certified the
root.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, final

from msgspec import Meta, Struct

from consensus.identifiers import DIGEST_BYTES, Digest, Tag, tagged_hash
from consensus.rejection import InvariantBroken, Reason, Rejected

KEY_BYTES = 33
KEY_BITS = 8 * KEY_BYTES
MAX_VALUE_BYTES = 65_536
MAX_PREFIX_ENTRIES = 65_536
EMPTY_STATE_ROOT = tagged_hash(Tag.STATE_EMPTY)

PathStep = tuple[Annotated[int, Meta(ge=0, le=KEY_BITS - 1)], Annotated[bytes, Meta(min_length=32, max_length=32)]]
"""A branch on the way to a proven leaf: its bit and the hash of the subtree not taken."""

Path = Annotated[tuple[PathStep, ...], Meta(max_length=KEY_BITS)]

Entry = tuple[
    Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)],
    Annotated[bytes, Meta(max_length=MAX_VALUE_BYTES)],
]


class MapProof(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a search for a key ends: the leaf, and the branches above it from the root down.

    For an empty map all three are empty.
    """

    leaf_key: Annotated[bytes, Meta(max_length=KEY_BYTES)]
    leaf_value: Annotated[bytes, Meta(max_length=MAX_VALUE_BYTES)]
    path: Path


class PrefixProof(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All entries under a prefix in key order, and the branches above their subtree from the root down.

    Where there is none, ``entries`` is the one foreign leaf at which a search for the prefix ends (nothing
    for an empty map).
    """

    entries: Annotated[tuple[Entry, ...], Meta(max_length=MAX_PREFIX_ENTRIES)]
    path: Path


_MISSING = Digest(b"")
"""In place of a branch's hash until it is asked for."""

_Leaf = bytes
"""A key, the hash of its leaf and its value, end to end. Leaves are most of what a state takes in memory; as one object
each they take a third less."""

_HASHED_BYTES = KEY_BYTES + DIGEST_BYTES


class _Branch(Struct, eq=False, gc=False):
    """``place`` is its bit's, of ``_PLACES``, so that a search does not take the bit apart at every branch.

    No cycle is ever made of branches, so the collector of cycles need not know them: they are most objects a node has.
    """

    place: "_Place"
    left: "_Node"
    right: "_Node"
    digest: Digest = _MISSING


_Node = _Leaf | _Branch

_Place = tuple[int, int, int]
"""A bit of a key: the byte it is in, the mask of it in that byte, and its number."""

_PLACES: tuple[_Place, ...] = tuple((bit >> 3, 128 >> (bit & 7), bit) for bit in range(KEY_BITS))


@final
@dataclass(frozen=True, slots=True, eq=False)
class StateMap:
    """An immutable sorted map from 33-byte keys to values of at most 64 KiB; ``StateMap()`` is empty.

    Keys and values are the caller's: one that breaks a bound raises ``InvariantBroken``. Check what comes
    from a peer before asking.
    """

    _top: _Node | None = None
    _count: int = 0

    @property
    def root(self) -> Digest:
        """What ``Header.state_root`` commits to."""
        return EMPTY_STATE_ROOT if self._top is None else _digest_of(self._top)

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> bytes | None:
        """The value of ``key``, or None."""
        _require_key(key)
        if self._top is None:
            return None
        leaf = _search(self._top, key)
        return leaf[_HASHED_BYTES:] if leaf.startswith(key) else None

    def set(self, key: bytes, value: bytes) -> "StateMap":
        """The map with ``key`` bound to ``value``."""
        return self.set_many({key: value})

    def remove(self, key: bytes) -> "StateMap":
        """The map without ``key``; the same map where it has none."""
        return self.set_many({key: None})

    def set_many(self, changes: Mapping[bytes, bytes | None]) -> "StateMap":
        """The map after all ``changes``; None removes. The same map where nothing changes."""
        top, count = self._top, self._count
        values: dict[bytes, bytes] = {}
        for key, value in changes.items():
            _require_key(key)
            if value is None:
                top, difference = _without(top, key)
                count += difference
            elif len(value) > MAX_VALUE_BYTES:
                raise InvariantBroken(f"a state value of {len(value)} bytes, at most {MAX_VALUE_BYTES} allowed")
            else:
                values[key] = value
        if values:
            top, difference = _with_all(top, values)
            count += difference
        return self if top is self._top else StateMap(top, count)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries in key order."""
        return self.items_with_prefix(b"")

    def items_with_prefix(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The entries whose key starts with ``prefix`` (whole bytes), in key order."""
        _require_prefix(prefix)
        if self._top is None:
            return
        _, subtree = _descend(self._top, prefix, 8 * len(prefix))
        # A subtree whose branches all decide after the prefix has it in every key or in none.
        if not _first_leaf(subtree).startswith(prefix):
            return
        pending = [subtree]
        while pending:
            node = pending.pop()
            if isinstance(node, _Branch):
                pending += (node.right, node.left)
            else:
                yield node[:KEY_BYTES], node[_HASHED_BYTES:]

    def prove(self, key: bytes) -> MapProof:
        """Proof of the value of ``key``, or of its absence."""
        _require_key(key)
        if self._top is None:
            return MapProof(leaf_key=b"", leaf_value=b"", path=())
        path, _ = _descend(self._top, key, KEY_BITS)
        leaf = _search(self._top, key)
        return MapProof(leaf_key=leaf[:KEY_BYTES], leaf_value=leaf[_HASHED_BYTES:], path=path)

    def prove_prefix(self, prefix: bytes) -> PrefixProof:
        """Proof of all entries under ``prefix``, or that there is none.

        Raises:
            Rejected: ``OVERSIZED`` when they are more than ``MAX_PREFIX_ENTRIES``; ask for a longer prefix.
        """
        _require_prefix(prefix)
        if self._top is None:
            return PrefixProof(entries=(), path=())
        entries: list[tuple[bytes, bytes]] = []
        for entry in self.items_with_prefix(prefix):
            if len(entries) == MAX_PREFIX_ENTRIES:
                raise Rejected(Reason.OVERSIZED, f"more than {MAX_PREFIX_ENTRIES} entries under one prefix")
            entries.append(entry)
        if not entries:
            absence = self.prove(prefix.ljust(KEY_BYTES, b"\x00"))
            return PrefixProof(entries=((absence.leaf_key, absence.leaf_value),), path=absence.path)
        path, _ = _descend(self._top, prefix, 8 * len(prefix))
        return PrefixProof(entries=tuple(entries), path=path)


def verify_map_proof(root: bytes, key: bytes, proof: MapProof) -> bytes | None:
    """The value of ``key`` in the map of root ``root``, or None: proved absent.

    Raises:
        Rejected: ``BAD_PROOF``.
    """
    _check_length("key", key, KEY_BYTES)
    if not proof.leaf_key:
        if proof.leaf_value or proof.path:
            raise Rejected(Reason.BAD_PROOF, "a proof of the empty map with a value or a path")
        _check_root(EMPTY_STATE_ROOT, root)
        return None
    _check_entry(proof.leaf_key, proof.leaf_value)
    _check_path(proof.path, KEY_BITS)
    for bit, _ in proof.path:
        if _bit(proof.leaf_key, bit) != _bit(key, bit):
            raise Rejected(Reason.BAD_PROOF, f"the leaf is not on the way to the key: they differ at bit {bit}")
    _check_root(_fold(_leaf_hash(proof.leaf_key, proof.leaf_value), key, proof.path), root)
    return proof.leaf_value if proof.leaf_key == key else None


def verify_prefix_proof(root: bytes, prefix: bytes, proof: PrefixProof) -> tuple[tuple[bytes, bytes], ...]:
    """All entries whose key starts with ``prefix`` in the map of root ``root``, in key order.

    Raises:
        Rejected: ``BAD_PROOF``.
    """
    if len(prefix) > KEY_BYTES:
        raise Rejected(Reason.BAD_PROOF, f"a prefix of {len(prefix)} bytes, at most {KEY_BYTES} allowed")
    if len(proof.entries) > MAX_PREFIX_ENTRIES:
        raise Rejected(Reason.BAD_PROOF, f"{len(proof.entries)} entries, at most {MAX_PREFIX_ENTRIES} allowed")
    first_key, first_value = proof.entries[0] if proof.entries else (b"", b"")
    if not proof.entries or (len(proof.entries) == 1 and not first_key.startswith(prefix)):
        absence = MapProof(leaf_key=first_key, leaf_value=first_value, path=proof.path)
        if proof.entries:
            _check_entry(first_key, first_value)
        # None, or the foreign leaf would be the padded key, which has the prefix.
        verify_map_proof(root, prefix.ljust(KEY_BYTES, b"\x00"), absence)
        return ()
    previous = b""
    for key, value in proof.entries:
        _check_entry(key, value)
        if not key.startswith(prefix):
            raise Rejected(Reason.BAD_PROOF, f"key {key.hex()} is not under prefix {prefix.hex()}")
        if key <= previous:
            raise Rejected(Reason.BAD_PROOF, f"key {key.hex()} after {previous.hex()}, expected ascending keys")
        previous = key
    _check_path(proof.path, 8 * len(prefix))
    subtree = StateMap().set_many(dict(proof.entries))
    _check_root(_fold(subtree.root, prefix, proof.path), root)
    return proof.entries


# The tree


def _bit(key: bytes, bit: int) -> int:
    byte, mask, _ = _PLACES[bit]
    return 1 if key[byte] & mask else 0


def _search(top: _Node, key: bytes) -> _Leaf:
    """The leaf at which a search for ``key`` ends."""
    node = top
    while isinstance(node, _Branch):
        byte, mask, _ = node.place
        node = node.right if key[byte] & mask else node.left
    return node


def _descend(top: _Node, key: bytes, end_bit: int) -> tuple[tuple[tuple[int, Digest], ...], _Node]:
    """Follow ``key`` through the branches deciding before ``end_bit``: their steps, and the node reached."""
    steps: list[tuple[int, Digest]] = []
    node = top
    while isinstance(node, _Branch) and (bit := node.place[2]) < end_bit:
        taken, other = (node.right, node.left) if _bit(key, bit) else (node.left, node.right)
        steps.append((bit, _digest_of(other)))
        node = taken
    return tuple(steps), node


def _first_leaf(node: _Node) -> _Leaf:
    while isinstance(node, _Branch):
        node = node.left
    return node


def _with_all(top: _Node | None, values: Mapping[bytes, bytes]) -> tuple[_Node | None, int]:
    """The tree with these keys bound to these values, and by how many entries it grew; the same where all were."""
    if top is not None:
        _digest_of(top)  # now none of its branches is taken for one of the batch's own
    root, grown, changed = top, 0, False
    way: list[_Branch] = []
    """The branches above the last key, root first: all of them the batch's own."""
    last = 0
    for key in sorted(values):
        number = int.from_bytes(key, "big")
        parting = KEY_BITS - (last ^ number).bit_length()
        while way and way[-1].place[2] > parting:
            way.pop()
        last = number
        node: _Node | None = _step(way[-1], key) if way else root
        while isinstance(node, _Branch):
            if node.digest:
                node = _Branch(node.place, node.left, node.right)
                if way:
                    _lead(way[-1], key, node)
                else:
                    root = node
            way.append(node)
            node = _step(node, key)
        leaf = _leaf(key, values[key])
        if node == leaf:
            continue
        changed = True
        new: _Node = leaf
        if node is None:
            grown += 1
        elif not node.startswith(key):
            critical = KEY_BITS - (int.from_bytes(node[:KEY_BYTES], "big") ^ number).bit_length()
            displaced: _Node = node
            while way and way[-1].place[2] > critical:
                displaced = way.pop()
            byte, mask, _ = place = _PLACES[critical]
            new = _Branch(place, displaced, leaf) if key[byte] & mask else _Branch(place, leaf, displaced)
            grown += 1
        if way:
            _lead(way[-1], key, new)
        else:
            root = new
        if isinstance(new, _Branch):
            way.append(new)
    return (root if changed else top), grown


def _step(branch: _Branch, key: bytes) -> _Node:
    byte, mask, _ = branch.place
    return branch.right if key[byte] & mask else branch.left


def _lead(branch: _Branch, key: bytes, node: _Node) -> None:
    """Put ``node`` where ``key`` leads from a branch of the batch's own."""
    byte, mask, _ = branch.place
    if key[byte] & mask:
        branch.right = node
    else:
        branch.left = node


def _without(top: _Node | None, key: bytes) -> tuple[_Node | None, int]:
    """The tree without ``key``, and by how many entries it grew (0 or -1)."""
    above: list[_Branch] = []
    node = top
    while isinstance(node, _Branch):
        above.append(node)
        node = _step(node, key)
    if top is None or node is None or not node.startswith(key):
        return top, 0
    if not above:
        return None, -1
    parent = above.pop()
    rest = parent.left if _bit(key, parent.place[2]) else parent.right
    for branch in reversed(above):
        byte, mask, _ = branch.place
        goes_right = key[byte] & mask
        rest = _Branch(branch.place, branch.left, rest) if goes_right else _Branch(branch.place, rest, branch.right)
    return rest, -1


# Hashes: the bytes of tagged_hash, with the constant parts joined beforehand (a test holds them equal).


def _prefixed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


_DIGEST_LENGTH = DIGEST_BYTES.to_bytes(8, "big")
_LEAF_START = _prefixed(Tag.STATE_LEAF.value.encode()) + KEY_BYTES.to_bytes(8, "big")
_BRANCH_STARTS = tuple(
    _prefixed(Tag.STATE_NODE.value.encode()) + _prefixed(bit.to_bytes(2, "big")) + _DIGEST_LENGTH
    for bit in range(KEY_BITS)
)


def _leaf(key: bytes, value: bytes) -> _Leaf:
    return key + _leaf_hash(key, value) + value


def _leaf_hash(key: bytes, value: bytes) -> Digest:
    return Digest(sha256(_LEAF_START + key + _prefixed(value)).digest())


def _branch_hash(bit: int, left: bytes, right: bytes) -> Digest:
    return Digest(sha256(_BRANCH_STARTS[bit] + left + _DIGEST_LENGTH + right).digest())


def _digest_of(node: _Node) -> Digest:
    """The node's hash; computes and keeps those still missing below it."""
    if not isinstance(node, _Branch):
        return Digest(node[KEY_BYTES:_HASHED_BYTES])
    if node.digest:
        return node.digest
    missing = [node]
    for branch in missing:  # it grows on the way: parents stand before children
        left, right = branch.left, branch.right
        if isinstance(left, _Branch) and not left.digest:
            missing.append(left)
        if isinstance(right, _Branch) and not right.digest:
            missing.append(right)
    for branch in reversed(missing):
        left, right = branch.left, branch.right
        branch.digest = _branch_hash(
            branch.place[2],
            left.digest if isinstance(left, _Branch) else left[KEY_BYTES:_HASHED_BYTES],
            right.digest if isinstance(right, _Branch) else right[KEY_BYTES:_HASHED_BYTES],
        )
    return node.digest


def _fold(digest: Digest, key: bytes, path: Sequence[tuple[int, bytes]]) -> Digest:
    """The root above a node of hash ``digest`` that ``key`` leads to through ``path``."""
    for bit, sibling in reversed(path):
        digest = _branch_hash(bit, sibling, digest) if _bit(key, bit) else _branch_hash(bit, digest, sibling)
    return digest


# Bounds


def _require_key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvariantBroken(f"a state key of {len(key)} bytes, expected {KEY_BYTES}")


def _require_prefix(prefix: bytes) -> None:
    if len(prefix) > KEY_BYTES:
        raise InvariantBroken(f"a state key prefix of {len(prefix)} bytes, at most {KEY_BYTES} allowed")


def _check_length(name: str, part: bytes, expected_bytes: int) -> None:
    if len(part) != expected_bytes:
        raise Rejected(Reason.BAD_PROOF, f"a {name} of {len(part)} bytes, expected {expected_bytes}")


def _check_entry(key: bytes, value: bytes) -> None:
    _check_length("leaf key", key, KEY_BYTES)
    if len(value) > MAX_VALUE_BYTES:
        raise Rejected(Reason.BAD_PROOF, f"a value of {len(value)} bytes, at most {MAX_VALUE_BYTES} allowed")


def _check_path(path: Sequence[tuple[int, bytes]], end_bit: int) -> None:
    previous = -1
    for bit, sibling in path:
        if not previous < bit < end_bit:
            raise Rejected(Reason.BAD_PROOF, f"branch bit {bit} after {previous}, expected ascending to {end_bit}")
        _check_length("sibling hash", sibling, DIGEST_BYTES)
        previous = bit


def _check_root(computed: bytes, expected: bytes) -> None:
    if computed != expected:
        raise Rejected(Reason.BAD_PROOF, f"state root is {expected.hex()}, the proof gives {computed.hex()}")
