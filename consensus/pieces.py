"""Pieces of tensors: how a parameter table names a part of a tensor that is in a parameter block of its own.

A parameter block at granularity ``head`` holds what one attention head owns: rows of one matrix, columns of another.
Its table entry is a tensor whose name is the whole tensor's, followed by the piece: ``q.weight[16:32]`` (indexes 16 to
31 of dimension 0) or ``o.weight[:,16:32]`` (of dimension 1), with the piece's own shape.

A table divides a tensor entirely: its pieces follow each other from index 0 along one dimension, alike in everything
else, and the tensor is not named whole beside them. So every number of it is in exactly one parameter block. How far
the tensor reaches, no table says: the released file shows it (``predicates/delta_exact.py``).

Left to others: which rows are whose (``trainer_client/heads.py``).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from consensus.portions import Tensor
from consensus.rejection import Reason, Rejected

HEAD = "head"
"""The routing granularity at which heads of attention are parameter blocks."""

COMMAS = ":,"
"""Stands, once for each, for a whole dimension before the divided one."""


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Indexes ``first`` to ``end - 1`` of one dimension of a tensor, counted from 0."""

    tensor: str
    dimension: int
    first: int
    end: int

    @property
    def name(self) -> str:
        """How a parameter table names the piece."""
        return f"{self.tensor}[{COMMAS * self.dimension}{self.first}:{self.end}]"


def piece_named(name: str) -> TensorPiece | None:
    """The piece that a table's entry names; None for the name of a whole tensor."""
    tensor, bracket, place = name.removesuffix("]").rpartition("[")
    if not tensor or not bracket or not name.endswith("]"):
        return None
    dimension = 0
    while place.startswith(COMMAS):
        place, dimension = place.removeprefix(COMMAS), dimension + 1
    first, _, end = place.partition(":")
    if not all(number.isascii() and number.isdigit() for number in (first, end)):
        return None
    piece = TensorPiece(tensor, dimension, int(first), int(end))
    return piece if piece.name == name and piece.first < piece.end else None


def tensor_named(name: str) -> str:
    """The tensor that a table's entry is, or is a piece of."""
    piece = piece_named(name)
    return name if piece is None else piece.tensor


def whole_tensors(entries: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that a parameter table's entries make up, by name; pieces among them divide theirs entirely.

    Raises:
        Rejected: ``BAD_FIELD`` naming the tensor.
    """
    found: dict[str, Tensor] = {}
    divided: dict[str, list[tuple[TensorPiece, Tensor]]] = {}
    for entry in entries:
        piece = piece_named(entry.name)
        if piece is None:
            found[entry.name] = entry
        else:
            divided.setdefault(piece.tensor, []).append((piece, entry))
    for name, pieces in divided.items():
        if name in found:
            raise Rejected(Reason.BAD_FIELD, f"the parameter table names tensor {name!a} whole and in pieces")
        kinds, reached = set(), 0
        for piece, entry in sorted(pieces, key=lambda each: each[0].first):
            length = piece.end - piece.first
            if piece.first != reached or entry.shape[piece.dimension : piece.dimension + 1] != (length,):
                raise Rejected(Reason.BAD_FIELD, f"{entry.name!a} does not go on at {reached}, or is not of its shape")
            reached = piece.end
            before, after = entry.shape[: piece.dimension], entry.shape[piece.dimension + 1 :]
            kinds.add((before, after, entry.dtype))
        if len(kinds) != 1:
            raise Rejected(Reason.BAD_FIELD, f"the pieces of tensor {name!a} differ in more than their place")
        found[name] = Tensor(name, entry.dtype, (*before, reached, *after))
    return tuple(found[name] for name in sorted(found))
