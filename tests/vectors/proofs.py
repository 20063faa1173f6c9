"""The golden vectors of proofs in the log's tree (RFC 9162): an entry is in it, a log continues another."""

from collections.abc import Iterator
from functools import partial

from agreement import Case, octets, refusal

from consensus.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof_of,
    leaf_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)

Inclusion = tuple[bytes, int, int, tuple[bytes, ...], bytes]
Consistency = tuple[int, int, tuple[bytes, ...], bytes, bytes]

LEAVES = [leaf_hash(f"entry {number}".encode()) for number in range(100)]
"""Those of ``log_tree``."""
EMPTY = root_of([])


def log_proofs() -> list[Case]:
    """Refused proofs, each with one fault, and accepted ones of small and odd sizes."""
    cases = [refusal(what, partial(verify_inclusion, *bad), **_inclusion(*bad)) for what, bad in _bad_inclusions()]
    cases += [
        refusal(what, partial(verify_consistency, *bad), **_consistency(*bad)) for what, bad in _bad_consistencies()
    ]
    for first, second in (
        (0, 0), (0, 5), (1, 1), (1, 2), (1, 8), (2, 3), (2, 5), (3, 4), (3, 7), (4, 8), (5, 5), (6, 8), (7, 31),
        (31, 64), (64, 100), (65, 100), (99, 100),
    ):  # fmt: skip
        good = _consistent(first, second)
        verify_consistency(*good)
        cases.append({"what": f"the first {first} of {second}", **_consistency(*good)})
    for index, size in (
        (0, 1), (0, 2), (1, 2), (2, 3), (0, 5), (4, 5), (3, 7), (6, 7), (7, 8), (8, 9), (30, 31), (63, 64), (64, 100),
        (99, 100),
    ):  # fmt: skip
        held = _included(index, size)
        verify_inclusion(*held)
        cases.append({"what": f"leaf {index} of {size}", **_inclusion(*held)})
    return cases


def _included(index: int, size: int) -> Inclusion:
    return LEAVES[index], index, size, inclusion_proof_of(LEAVES[:size], index), root_of(LEAVES[:size])


def _consistent(first: int, second: int) -> Consistency:
    _, nodes = Frontier().append_with_nodes(LEAVES[:second])
    interior = {(level, place): digest for level, place, digest in nodes}
    proof = consistency_proof(first, second, lambda level, place: interior[level, place] if level else LEAVES[place])
    return first, second, proof, root_of(LEAVES[:first]), root_of(LEAVES[:second])


def _bad_inclusions() -> Iterator[tuple[str, Inclusion]]:
    leaf, index, size, proof, root = _included(5, 7)
    yield "the leaf before", (leaf, index - 1, size, proof, root)
    yield "the leaf after", (leaf, index + 1, size, proof, root)
    yield "no such leaf", (leaf, size, size, proof, root)
    yield "a smaller tree", (leaf, index, 6, proof, root)
    yield "a larger tree", (leaf, index, 16, proof, root)
    yield "an empty tree", (leaf, 0, 0, (), EMPTY)
    yield "another leaf", (LEAVES[4], index, size, proof, root)
    yield "another root", (leaf, index, size, proof, octets("root"))
    yield "no hashes", (leaf, index, size, (), root)
    yield "the last hash left out", (leaf, index, size, proof[:-1], root)
    yield "the first hash left out", (leaf, index, size, proof[1:], root)
    yield "a hash more", (leaf, index, size, (*proof, root), root)
    yield "the root's side first", (leaf, index, size, proof[::-1], root)
    yield "a hash of 31 bytes", (leaf, index, size, (*proof[:-1], proof[-1][:-1]), root)
    yield "a hash of no bytes", (leaf, index, size, (*proof, b""), root)
    alone = _included(0, 1)
    yield "a hash beside the only leaf", (*alone[:3], (octets("more"),), alone[4])


def _bad_consistencies() -> Iterator[tuple[str, Consistency]]:
    first, second, proof, older, newer = _consistent(3, 7)
    yield "another older size", (2, second, proof, older, newer)
    yield "another newer size", (first, 16, proof, older, newer)
    yield "of the newer to the older", (second, first, proof, newer, older)
    yield "the roots exchanged", (first, second, proof, newer, older)
    yield "another older root", (first, second, proof, octets("root"), newer)
    yield "another newer root", (first, second, proof, older, octets("root"))
    yield "no hashes between two sizes", (first, second, (), older, newer)
    yield "the last hash of two trees left out", (first, second, proof[:-1], older, newer)
    yield "a hash more than there is", (first, second, (*proof, newer), older, newer)
    yield "hashes in another order", (first, second, proof[::-1], older, newer)
    yield "a hash of 33 bytes", (first, second, (proof[0] + b"\x00", *proof[1:]), older, newer)
    yield "hashes between equal sizes", (first, first, (older,), older, older)
    yield "another log of the same size", (first, first, (), older, octets("root"))
    yield "hashes after nothing", (0, second, proof, EMPTY, newer)
    yield "a root of nothing that is none", (0, second, (), older, newer)
    perfect = _consistent(4, 7)
    yield (
        "the older root, where it is a node of the newer tree, first",
        (
            4,
            7,
            (perfect[3], *perfect[2]),
            *perfect[3:],
        ),
    )


def _inclusion(leaf: bytes, index: int, size: int, proof: tuple[bytes, ...], root: bytes) -> Case:
    return {
        "leaf_hash": leaf.hex(),
        "index": index,
        "size": size,
        "proof": [digest.hex() for digest in proof],
        "root": root.hex(),
    }


def _consistency(first: int, second: int, proof: tuple[bytes, ...], older: bytes, newer: bytes) -> Case:
    return {
        "first_size": first,
        "second_size": second,
        "proof": [digest.hex() for digest in proof],
        "first_root": older.hex(),
        "second_root": newer.hex(),
    }
