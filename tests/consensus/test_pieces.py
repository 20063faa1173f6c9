"""Pieces of tensors in parameter tables: names that are one, and tables that leave or count something twice."""

import pytest

from consensus.pieces import TensorPiece, piece_named, tensor_named, whole_tensors
from consensus.portions import Tensor
from consensus.rejection import Reason, Rejected


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_piece_is_read_back_from_its_name(dimension: int) -> None:
    piece = TensorPiece("layers.0.q.weight", dimension, 16, 32)
    assert piece_named(piece.name) == piece
    assert TensorPiece("q.weight", 1, 0, 16).name == "q.weight[:,0:16]"
    assert tensor_named(piece.name) == tensor_named(piece.tensor) == piece.tensor


@pytest.mark.parametrize(
    "name",
    [
        "q.weight",
        "q.weight[",
        "q.weight]",
        "[0:4]",
        "q[4]",
        "q[0:04]",
        "q[4:4]",
        "q[-1:4]",
        "q[0:]",
        "q[:0:4]",
        "q[٠:4]",
    ],
)
def test_name_of_no_piece_is_a_whole_tensors(name: str) -> None:
    assert piece_named(name) is None


def entry(name: str, *shape: int, dtype: str = "F32") -> Tensor:
    return Tensor(name, dtype, shape)


def test_pieces_make_up_their_tensors_in_any_order() -> None:
    table = [
        entry("o[:,2:4]", 3, 2),
        entry("q[0:1]", 1, 3),
        entry("norm", 3),
        entry("q[1:4]", 3, 3),
        entry("o[:,0:2]", 3, 2),
    ]
    assert whole_tensors(table) == (entry("norm", 3), entry("o", 3, 4), entry("q", 4, 3))


@pytest.mark.parametrize(
    "table",
    [
        [entry("q", 4, 3), entry("q[0:4]", 4, 3)],
        [entry("q[1:4]", 3, 3)],
        [entry("q[0:2]", 2, 3), entry("q[3:4]", 1, 3)],
        [entry("q[0:2]", 2, 3), entry("q[1:4]", 3, 3)],
        [entry("q[0:2]", 3, 3), entry("q[2:4]", 2, 3)],
        [entry("q[:,0:2]", 2)],
        [entry("q[0:2]", 2, 3), entry("q[:,2:4]", 3, 2)],
        [entry("q[0:2]", 2, 3), entry("q[2:4]", 2, 4)],
        [entry("q[0:2]", 2, 3), entry("q[2:4]", 2, 3, dtype="F16")],
    ],
    ids=["whole as well", "from 1", "gap", "overlap", "length", "dimension", "two dimensions", "width", "dtype"],
)
def test_pieces_that_do_not_make_up_a_tensor_are_refused(table: list[Tensor]) -> None:
    with pytest.raises(Rejected) as refusal:
        whole_tensors(table)
    assert refusal.value.reason is Reason.BAD_FIELD
