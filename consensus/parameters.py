"""The parameter root: one digest that names a model's exact weights.

Per tensor, BLAKE3 over its contiguous little-endian bytes; a leaf binds that digest to the tensor's name,
dtype and shape; the root is the RFC 9162 tree over the leaves, sorted by the UTF-8 bytes of their names.
Names, dtype names (``F32``, ``BF16`` …), shapes and bytes are those of a ``safetensors`` file, so that a
verifier recomputes the root of a released file from its header and byte ranges, without torch.

Tensors that share storage (tied weights) are committed once, under one name, as the file holds them once.
The bytes themselves are hashed by whoever holds them; this module takes digests.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from consensus.identifiers import DIGEST_BYTES, Digest, Tag, tagged_hash
from consensus.merkle import root_of
from consensus.rejection import Reason, Rejected

DTYPE_SIZE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}
"""The dtype names a parameter root may hold, and the bits of one element."""

MAX_DIMENSIONS = 16
MAX_EXTENT = 2**53 - 1


@dataclass(frozen=True, slots=True)
class TensorDescriptor:
    """A tensor without its content: safetensors name, dtype name and shape, and BLAKE3 of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes


def tensor_leaf(tensor: TensorDescriptor) -> Digest:
    """The leaf of one tensor.

    Raises:
        Rejected: ``BAD_FIELD`` for a name that is empty or no Unicode text, an unknown dtype, a shape out of
            bounds or a digest that is not 32 bytes.
    """
    name = _encoded(tensor.name)
    if tensor.dtype not in DTYPE_SIZE_BITS:
        raise Rejected(Reason.BAD_FIELD, f"tensor {tensor.name!r} has unknown dtype {tensor.dtype!r}")
    if len(tensor.shape) > MAX_DIMENSIONS or any(not 0 <= extent <= MAX_EXTENT for extent in tensor.shape):
        raise Rejected(Reason.BAD_FIELD, f"tensor {tensor.name!r} has shape {tensor.shape}")
    if len(tensor.digest) != DIGEST_BYTES:
        raise Rejected(Reason.BAD_FIELD, f"tensor {tensor.name!r} has a digest of {len(tensor.digest)} bytes")
    shape = b"".join(extent.to_bytes(8, "big") for extent in tensor.shape)
    return tagged_hash(Tag.TENSOR, name, tensor.dtype.encode(), shape, tensor.digest)


def parameter_root(tensors: Iterable[TensorDescriptor]) -> Digest:
    """The root over ``tensors``, given in any order.

    Raises:
        Rejected: ``BAD_FIELD`` as ``tensor_leaf`` or without any tensor; ``DUPLICATE`` for a repeated name.
    """
    ordered = sorted(tensors, key=lambda tensor: _encoded(tensor.name))
    if not ordered:
        raise Rejected(Reason.BAD_FIELD, "a parameter root over no tensors")
    for before, after in itertools.pairwise(ordered):
        if before.name == after.name:
            raise Rejected(Reason.DUPLICATE, f"tensor {after.name!r} appears twice")
    return root_of([tensor_leaf(tensor) for tensor in ordered])


def _encoded(name: str) -> bytes:
    if not name:
        raise Rejected(Reason.BAD_FIELD, "a tensor without a name")
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise Rejected(Reason.BAD_FIELD, f"tensor name {name!a} is not Unicode text") from error
