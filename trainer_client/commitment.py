"""Commitments to parameters, their change in a step, and optimizer state.

The rule for the root is ``consensus/parameters.py``; here are the bytes. Committed are a model's parameters and
persistent buffers: what a ``safetensors`` file of the model holds. A tensor reachable under several names
(tied weights) is committed once, under the name that ``model.state_dict()`` lists first;
``committed_tensors`` is both what is hashed and what is to be saved, so file and root cannot differ.

A step's *delta* is taken per parameter block, in float32 (float64 for float64 tensors), as the difference of two
snapshots: its L2 norm in millionths and the parameter root of the difference.

``CommitmentWorker`` hashes copies in one thread while training goes on; BLAKE3 and torch both release
the interpreter lock. A commitment is a claim of the operator until the tensors are released or audited.
"""

import math
import struct
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from blake3 import blake3
from torch import Tensor, nn

from consensus.identifiers import Digest, Tag, tagged_hash
from consensus.parameters import TensorDescriptor, parameter_root
from consensus.portions import BlockDelta
from consensus.rejection import InvariantBroken
from trainer_client.pieces import part_of_entry
from trainer_client.sharding import own_part

MICRO = 1_000_000
PIECE_ELEMENTS = 1 << 15
"""In the cache, and no more than torch does in one thread: a second one would spin while this one hashes."""

SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True, slots=True)
class StepCommitment:
    """What a step did to the parameters: roots before and after, and each block's delta in table order.

    ``tensors_after`` are what ``root_after`` is the root of.
    """

    root_before: Digest
    root_after: Digest
    deltas: tuple[BlockDelta, ...]
    tensors_after: tuple[TensorDescriptor, ...]


def committed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once; references, not copies."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def copied_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``committed_tensors`` as contiguous copies in main memory, safe to hash while training goes on."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in committed_tensors(model).items()}


def parameter_root_of(model: nn.Module) -> Digest:
    """The parameter root of a model as it is now."""
    return root_of_tensors(committed_tensors(model))


def root_of_tensors(tensors: Mapping[str, Tensor]) -> Digest:
    """The parameter root of named tensors.

    Raises:
        Rejected: as ``consensus.parameters.parameter_root``.
        InvariantBroken: a dtype that has no safetensors name.
    """
    return parameter_root(tensor_descriptors(tensors))


def tensor_descriptors(tensors: Mapping[str, Tensor]) -> tuple[TensorDescriptor, ...]:
    """What the parameter root of named tensors is made of.

    Raises:
        InvariantBroken: a dtype that has no safetensors name.
    """
    return tuple(_descriptor(name, tensor) for name, tensor in tensors.items())


def step_commitment(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    blocks: Mapping[str, tuple[str, ...]],
    root_before: Digest | None = None,
) -> StepCommitment:
    """Roots and deltas between two snapshots; ``blocks`` is the parameter table, in its order.

    ``root_before`` spares hashing ``before`` again where its root is known.

    Raises:
        InvariantBroken: names, shapes or dtypes differ, or a delta is not finite.
    """
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (before, after)]
    if kinds[0] != kinds[1]:
        raise InvariantBroken("the two snapshots hold different tensors")
    deltas = tuple(
        _block_delta(block, {name: (part_of_entry(before, name), part_of_entry(after, name)) for name in names})
        for block, names in blocks.items()
    )
    tensors_after = tensor_descriptors(after)
    return StepCommitment(root_before or root_of_tensors(before), parameter_root(tensors_after), deltas, tensors_after)


def optimizer_state_digest(optimizer: torch.optim.Optimizer) -> Digest:
    """A digest of everything in ``optimizer.state_dict()``: state tensors and settings, exactly.

    Raises:
        InvariantBroken: a value of a type whose bytes are not defined here.
    """
    return tagged_hash(Tag.OPTIMIZER, *_value_bytes(optimizer.state_dict()))


class CommitmentWorker:
    """One thread that computes commitments in order of submission.

    A snapshot that was one step's ``after`` and is the next one's ``before`` is hashed once.
    """

    def __init__(self, blocks: Mapping[str, tuple[str, ...]]) -> None:
        self._blocks = dict(blocks)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commitment")
        self._last: tuple[Mapping[str, Tensor], Digest] | None = None
        self.cpu_seconds = 0.0

    def submit(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Future[StepCommitment]:
        """The commitment of a step between two snapshots nobody changes any more (``copied_tensors``)."""
        return self._executor.submit(self._commit, before, after)

    def _commit(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> StepCommitment:
        known = self._last[1] if self._last is not None and self._last[0] is before else None
        commitment = step_commitment(before, after, self._blocks, known)
        self._last = (after, commitment.root_after)
        self.cpu_seconds = time.thread_time()
        return commitment

    def close(self) -> None:
        """Waits for what was submitted and ends the thread."""
        self._executor.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's contiguous little-endian bytes, as a ``safetensors`` file holds them."""
    if sys.byteorder != "little":
        raise InvariantBroken("tensor bytes are defined on little-endian machines alone")
    flat = own_part(tensor).detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _descriptor(name: str, tensor: Tensor) -> TensorDescriptor:
    dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvariantBroken(f"tensor {name!r} has dtype {tensor.dtype}, which has no safetensors name")
    return TensorDescriptor(name, dtype, tuple(tensor.shape), blake3(tensor_bytes(tensor)).digest())


def _block_delta(block: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> BlockDelta:
    described = []
    square_sum = 0.0
    for name, (before, after) in pairs.items():
        wide = torch.float64 if after.dtype == torch.float64 else torch.float32
        content, squares = _difference(before, after, wide)
        described.append(TensorDescriptor(name, SAFETENSORS_DTYPES[wide], tuple(after.shape), content))
        square_sum += squares
    if not math.isfinite(square_sum):
        raise InvariantBroken(f"the delta of parameter block {block!r} has norm {math.sqrt(square_sum)}")
    return BlockDelta(round(math.sqrt(square_sum) * MICRO), parameter_root(described))


def _difference(before: Tensor, after: Tensor, wide: torch.dtype) -> tuple[bytes, float]:
    """BLAKE3 of ``after - before`` in ``wide``, and its sum of squares in float64.

    A piece at a time, so that the difference stays in the processor's cache: eight times as fast as all at once.
    """
    hasher, squares = blake3(), 0.0
    first, last = before.reshape(-1), after.reshape(-1)
    held = torch.empty(min(PIECE_ELEMENTS, last.numel()), dtype=wide)
    for start in range(0, last.numel(), PIECE_ELEMENTS):
        end = min(start + PIECE_ELEMENTS, last.numel())
        piece = held[: end - start]
        torch.sub(last[start:end].to(wide), first[start:end].to(wide), out=piece)
        hasher.update(tensor_bytes(piece))
        squares += torch.linalg.vector_norm(piece, dtype=torch.float64).item() ** 2
    return hasher.digest(), squares


def _value_bytes(value: object) -> list[bytes]:
    """An injective list of byte strings for nested optimizer state: type letter, length, content."""
    if isinstance(value, Tensor):
        shape = b"".join(extent.to_bytes(8, "big") for extent in value.shape)
        return [b"T", str(value.dtype).encode(), shape, blake3(tensor_bytes(value)).digest()]
    if isinstance(value, Mapping):
        keyed = sorted(((repr(key), item) for key, item in value.items()), key=lambda pair: pair[0])
        inner = [part for key, item in keyed for part in (key.encode(), *_value_bytes(item))]
        return [b"M", len(keyed).to_bytes(8, "big"), *inner]
    if isinstance(value, list | tuple):
        inner = [part for item in value for part in _value_bytes(item)]
        return [b"L", len(value).to_bytes(8, "big"), *inner]
    if isinstance(value, bool) or value is None:
        return [b"B", repr(value).encode()]
    if isinstance(value, int):
        return [b"I", str(value).encode()]
    if isinstance(value, float):
        return [b"F", struct.pack("<d", value)]
    if isinstance(value, str):
        return [b"S", value.encode()]
    raise InvariantBroken(f"optimizer state holds a {type(value).__name__}")
