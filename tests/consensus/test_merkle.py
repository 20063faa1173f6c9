"""The RFC 9162 tree against a recursive reference, published vectors and every mutation of a proof."""

from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consensus.identifiers import Digest
from consensus.merkle import (
    EMPTY_ROOT,
    MAX_SIZE,
    Frontier,
    consistency_proof,
    inclusion_proof,
    inclusion_proof_of,
    leaf_hash,
    node_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)
from consensus.rejection import InvariantBroken, Reason, Rejected

# The eight-leaf tree of the certificate-transparency reference implementations (RFC 6962 hashing).
CT_ENTRIES = [
    bytes.fromhex(entry)
    for entry in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
H0 = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
H1 = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7"
H4 = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"
H6 = "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f"
H01 = "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"
H23 = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e"
H45 = "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a"
H67 = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0"
H0123 = "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"
H4567 = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"
CT_INCLUSION = [
    (0, 1, []),
    (0, 8, [H1, H23, H4567]),
    (5, 8, [H4, H67, H0123]),
    (2, 3, [H01]),
    (1, 5, [H0, H23, H4]),
]
CT_CONSISTENCY = [
    (1, 1, []),
    (1, 8, [H1, H23, H4567]),
    (6, 8, [H45, H67, H0123]),
    (2, 5, [H23, H4]),
    (6, 7, [H45, H6, H0123]),
]

fast = settings(deadline=None, max_examples=150)


# The reference: RFC 9162 §2.1.1, §2.1.3.1 and §2.1.4.1, transcribed as the recursions they are.


def k_of(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def mth(d: Sequence[bytes]) -> bytes:
    if not d:
        return sha256(b"").digest()
    if len(d) == 1:
        return d[0]
    k = k_of(len(d))
    return sha256(b"\x01" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: Sequence[bytes]) -> list[bytes]:
    if len(d) == 1:
        return []
    k = k_of(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: Sequence[bytes], complete: bool) -> list[bytes]:
    if m == len(d):
        return [] if complete else [mth(d)]
    k = k_of(len(d))
    if m <= k:
        return [*subproof(m, d[:k], complete), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


def leaves(count: int) -> list[bytes]:
    return [leaf_hash(b"entry %d" % index) for index in range(count)]


class Store:
    """Perfect nodes as a log store keeps them: grown by append_with_nodes, each written once."""

    def __init__(self, leaf_hashes: Sequence[bytes], batch: int = 7) -> None:
        self.frontier = Frontier()
        self.nodes: dict[tuple[int, int], bytes] = {}
        for start in range(0, len(leaf_hashes), batch):
            chunk = leaf_hashes[start : start + batch]
            for offset, digest in enumerate(chunk):
                self.nodes[0, start + offset] = digest
            self.frontier, new = self.frontier.append_with_nodes(chunk)
            for level, index, digest in new:
                assert (level, index) not in self.nodes
                self.nodes[level, index] = digest

    def read(self, level: int, index: int) -> bytes:
        return self.nodes[level, index]


def rejected_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        verify_inclusion(leaf, index, size, proof, root)
    assert caught.value.reason is Reason.BAD_PROOF


def rejected_consistency(first: int, second: int, proof: Sequence[bytes], old: bytes, new: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        verify_consistency(first, second, proof, old, new)
    assert caught.value.reason is Reason.BAD_PROOF


def flipped(digest: bytes, bit: int) -> bytes:
    return (int.from_bytes(digest, "big") ^ (1 << bit)).to_bytes(len(digest), "big")


def proof_mutations(proof: Sequence[bytes], bit: int) -> list[tuple[bytes, ...]]:
    """Each hash flipped, dropped, doubled, shortened, lengthened; neighbours swapped; one added at an end."""
    original = tuple(proof)
    mutated = [(*original, bytes(32)), (bytes(32), *original), original * 2 + (bytes(32),) * 70]
    for place, digest in enumerate(original):
        before, after = original[:place], original[place + 1 :]
        mutated += [
            (*before, flipped(digest, bit), *after),
            (*before, *after),
            (*before, digest, digest, *after),
            (*before, digest[:-1], *after),
            (*before, digest + b"\x00", *after),
            (*before, b"", *after),
        ]
        if after:
            mutated.append((*before, after[0], digest, *after[1:]))
    return mutated


# Published vectors


def test_leaf_and_node_hashes_are_the_rfc_s() -> None:
    assert sha256(b"").digest() == EMPTY_ROOT
    assert leaf_hash(b"L123456").hex() == "395aa064aa4c29f7010acfe3f25db9485bbd4b91897b6ad7ad547639252b4d56"
    assert node_hash(b"N123", b"N456").hex() == "aa217fe888e47007fa15edab33c2b492a722cb106c64667fc2b044444de66bbb"


def test_roots_of_the_reference_tree_match() -> None:
    hashes = [leaf_hash(entry) for entry in CT_ENTRIES]
    frontier = Frontier()
    for size in range(9):
        assert root_of(hashes[:size]).hex() == CT_ROOTS[size]
        assert frontier.root.hex() == CT_ROOTS[size]
        frontier = frontier.append(hashes[size : size + 1])


@pytest.mark.parametrize(("index", "size", "expected"), CT_INCLUSION)
def test_inclusion_proofs_of_the_reference_tree_match(index: int, size: int, expected: list[str]) -> None:
    hashes = [leaf_hash(entry) for entry in CT_ENTRIES[:size]]
    proof = inclusion_proof_of(hashes, index)
    assert [digest.hex() for digest in proof] == expected
    verify_inclusion(hashes[index], index, size, proof, bytes.fromhex(CT_ROOTS[size]))


@pytest.mark.parametrize(("first", "second", "expected"), CT_CONSISTENCY)
def test_consistency_proofs_of_the_reference_tree_match(first: int, second: int, expected: list[str]) -> None:
    store = Store([leaf_hash(entry) for entry in CT_ENTRIES])
    proof = consistency_proof(first, second, store.read)
    assert [digest.hex() for digest in proof] == expected
    verify_consistency(first, second, proof, bytes.fromhex(CT_ROOTS[first]), bytes.fromhex(CT_ROOTS[second]))


# Against the recursive reference


def test_every_proof_of_every_small_tree_matches_the_recursive_reference() -> None:
    everything = leaves(40)
    store = Store(everything)
    roots = [mth(everything[:size]) for size in range(41)]
    assert store.frontier.root == roots[40]
    for size in range(1, 41):
        for index in range(size):
            proof = inclusion_proof(index, size, store.read)
            assert list(proof) == path(index, everything[:size])
            verify_inclusion(everything[index], index, size, proof, roots[size])
        for first in range(1, size + 1):
            proof = consistency_proof(first, size, store.read)
            assert list(proof) == subproof(first, everything[:size], True)
            verify_consistency(first, size, proof, roots[first], roots[size])
        assert consistency_proof(0, size, store.read) == ()
        verify_consistency(0, size, (), EMPTY_ROOT, roots[size])
    verify_consistency(0, 0, (), EMPTY_ROOT, EMPTY_ROOT)


@fast
@given(st.lists(st.integers(0, 70), max_size=8))
def test_appending_in_any_batches_gives_the_same_frontier_and_all_perfect_nodes(batches: list[int]) -> None:
    everything = leaves(sum(batches))
    frontier, nodes, start = Frontier(), dict[tuple[int, int], bytes](), 0
    for batch in batches:
        chunk = everything[start : start + batch]
        grown, new = frontier.append_with_nodes(chunk)
        assert grown == frontier.append(chunk)
        nodes.update({(level, index): digest for level, index, digest in new})
        frontier, start = grown, start + batch
    assert frontier.size == len(everything)
    assert frontier.root == mth(everything)
    expected = {
        (level, index): mth(everything[index << level : (index + 1) << level])
        for level in range(1, 11)
        for index in range(len(everything) >> level)
    }
    assert nodes == expected


def test_two_branches_grown_from_one_frontier_leave_it_unchanged() -> None:
    everything = leaves(21)
    base = Frontier().append(everything[:13])
    kept = (base.size, base.peaks)
    one, two = base.append(everything[13:]), base.append(everything[:3])
    assert one.root == mth(everything)
    assert two.root == mth([*everything[:13], *everything[:3]])
    assert (base.size, base.peaks) == kept
    assert base.append([]) is base
    with pytest.raises(FrozenInstanceError):
        base.size = 1  # type: ignore[misc]


def test_appending_a_hash_of_another_length_stops() -> None:
    with pytest.raises(InvariantBroken):
        Frontier().append([bytes(32), bytes(31)])


def test_growing_past_the_largest_tree_stops() -> None:
    with pytest.raises(InvariantBroken):
        Frontier(MAX_SIZE, (Digest(bytes(32)),)).append([bytes(32)])


# Storage form


@fast
@given(st.integers(0, 300))
def test_frontier_survives_storage(size: int) -> None:
    frontier = Frontier().append(leaves(size))
    assert Frontier.from_bytes(frontier.to_bytes()) == frontier
    assert len(frontier.to_bytes()) == 8 + 32 * size.bit_count()


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        bytes(7),
        bytes(9),
        (3).to_bytes(8, "big") + bytes(32),
        (1).to_bytes(8, "big") + bytes(33),
        (MAX_SIZE + 1).to_bytes(8, "big") + bytes(64),
    ],
)
def test_frontier_of_another_length_or_size_is_rejected(encoded: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        Frontier.from_bytes(encoded)
    assert caught.value.reason is Reason.MALFORMED


# Attacks on inclusion


@fast
@given(
    st.integers(1, 70).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))),
    st.integers(0, 255),
)
def test_any_mutation_of_an_inclusion_proof_is_rejected(tree: tuple[int, int], bit: int) -> None:
    size, index = tree
    everything = leaves(size)
    root, leaf = mth(everything), everything[index]
    proof = path(index, everything)
    for mutated in proof_mutations(proof, bit):
        if mutated != tuple(proof):
            rejected_inclusion(leaf, index, size, mutated, root)
    rejected_inclusion(flipped(leaf, bit), index, size, proof, root)
    rejected_inclusion(leaf, index, size, proof, flipped(root, bit))
    for wrong_length in (b"", leaf[:-1], leaf + b"\x00"):
        rejected_inclusion(wrong_length, index, size, proof, root)
        rejected_inclusion(leaf, index, size, proof, wrong_length)
    for other in range(-1, size + 2):
        if other != index:
            rejected_inclusion(leaf, other, size, proof, root)


@fast
@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))))
def test_an_inclusion_proof_of_one_size_fails_against_the_root_of_every_other(tree: tuple[int, int]) -> None:
    size, index = tree
    everything = leaves(45)
    proof = path(index, everything[:size])
    for other in range(46):
        if other != size:
            rejected_inclusion(everything[index], index, other, proof, mth(everything[:other]))


def test_an_interior_node_passed_off_as_a_leaf_is_rejected() -> None:
    everything = leaves(8)
    node = mth(everything[:2])
    rejected_inclusion(leaf_hash(everything[0] + everything[1]), 0, 4, path(0, everything)[1:], mth(everything))
    # The bare node hash does sit at a place of a smaller tree with the same root: the leaf prefix, applied by
    # whoever hashes the entry, is what keeps entries and nodes apart.
    verify_inclusion(node, 0, 4, path(0, everything)[1:], mth(everything))


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 1), (1, 1), (0, -1), (0, MAX_SIZE + 1), (MAX_SIZE, MAX_SIZE)])
def test_an_index_or_size_out_of_bounds_is_rejected(index: int, size: int) -> None:
    rejected_inclusion(bytes(32), index, size, (), bytes(32))
    with pytest.raises(Rejected):
        inclusion_proof(index, size, lambda level, position: bytes(32))


# Attacks on consistency


@fast
@given(
    st.integers(1, 70).flatmap(lambda second: st.tuples(st.integers(1, second), st.just(second))),
    st.integers(0, 255),
)
def test_any_mutation_of_a_consistency_proof_is_rejected(sizes: tuple[int, int], bit: int) -> None:
    first, second = sizes
    everything = leaves(second)
    old, new = mth(everything[:first]), mth(everything)
    proof = subproof(first, everything, True)
    for mutated in proof_mutations(proof, bit):
        if mutated != tuple(proof):
            rejected_consistency(first, second, mutated, old, new)
    rejected_consistency(first, second, proof, flipped(old, bit), new)
    rejected_consistency(first, second, proof, old, flipped(new, bit))
    for wrong_length in (b"", old[:-1], new + b"\x00"):
        rejected_consistency(first, second, proof, wrong_length, new)
        rejected_consistency(first, second, proof, old, wrong_length)
    for other in range(-1, second + 2):
        if other != first:
            rejected_consistency(other, second, proof, old, new)


@fast
@given(st.integers(1, 40).flatmap(lambda second: st.tuples(st.integers(1, second), st.just(second))))
def test_a_consistency_proof_fails_against_the_root_of_every_other_size(sizes: tuple[int, int]) -> None:
    first, second = sizes
    everything = leaves(45)
    old = mth(everything[:first])
    proof = subproof(first, everything[:second], True)
    for other in range(46):
        if other != second:
            rejected_consistency(first, other, proof, old, mth(everything[:other]))


@pytest.mark.parametrize("first", range(1, 12))
def test_a_rewritten_older_entry_is_never_consistent(first: int) -> None:
    everything = leaves(12)
    rewritten = [bytes(32), *everything[1:]]
    proof = subproof(first, rewritten, True)
    rejected_consistency(first, 12, proof, mth(everything[:first]), mth(rewritten))


def test_an_empty_older_tree_needs_the_empty_root_and_no_proof() -> None:
    root = mth(leaves(3))
    rejected_consistency(0, 3, (), bytes(32), root)
    rejected_consistency(0, 3, (root,), EMPTY_ROOT, root)
    rejected_consistency(0, 0, (), EMPTY_ROOT, root)
    rejected_consistency(0, 0, (), root, root)


def test_equal_sizes_with_different_roots_are_rejected() -> None:
    rejected_consistency(3, 3, (), mth(leaves(3)), mth(leaves(4)))


@pytest.mark.parametrize(("first", "second"), [(-1, 1), (2, 1), (1, MAX_SIZE + 1), (0, -1)])
def test_sizes_out_of_order_or_bounds_are_rejected(first: int, second: int) -> None:
    rejected_consistency(first, second, (), bytes(32), bytes(32))
    with pytest.raises(Rejected):
        consistency_proof(first, second, lambda level, index: bytes(32))


# The largest trees


def huge_node(level: int, index: int) -> bytes:
    """Every perfect node of a tree whose leaves are all equal, whatever its size."""
    digest = leaf_hash(b"same")
    for _ in range(level):
        digest = node_hash(digest, digest)
    return digest


@pytest.mark.parametrize("size", [MAX_SIZE, MAX_SIZE - 1, 2**62 + 1, 2**53 + 12_345])
def test_proofs_reach_the_largest_trees(size: int) -> None:
    peaks = tuple(Digest(huge_node(level, 0)) for level in reversed(range(64)) if size >> level & 1)
    frontier = Frontier(size, peaks)
    assert Frontier.from_bytes(frontier.to_bytes()) == frontier
    for index in (0, 1, size // 2, size - 2, size - 1):
        proof = inclusion_proof(index, size, huge_node)
        verify_inclusion(leaf_hash(b"same"), index, size, proof, frontier.root)
        rejected_inclusion(leaf_hash(b"other"), index, size, proof, frontier.root)
    for first_peaks in range(1, len(peaks) + 1):
        kept = peaks[:first_peaks]
        first = sum(1 << level for level in [lv for lv in reversed(range(64)) if size >> lv & 1][:first_peaks])
        proof = consistency_proof(first, size, huge_node)
        verify_consistency(first, size, proof, Frontier(first, kept).root, frontier.root)
