"""Digests of every tensor after every step, for whoever wants to know which one a replay differs in.

The log has one digest for all weights after a step, the parameter root, and one for each parameter block's change. The
root is a Merkle root over the tensors' own digests, so these need not be believed: whatever is read here is used only
if it gives the step's root on the log. They are computed for the root anyway; kept they cost 32 bytes a tensor and
step.

One file, records of equal length in the order of the steps: the step (8 bytes, big-endian), then the BLAKE3 of each
tensor, by the UTF-8 bytes of their names. A step that was undone and taken again stands there twice.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from consensus.parameters import TensorDescriptor, parameter_root
from trainer_client.commitment import tensor_descriptors

FILE_NAME = "tensors.digests"
STEP_BYTES = 8
DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


class TensorDigests:
    """Writes the digests of one run to ``directory``; does nothing where it is None."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def append(self, step: int, tensors: Iterable[TensorDescriptor]) -> None:
        """Those after a step. A full disk costs the rest of them, and a warning."""
        if self._directory is None:
            return
        record = step.to_bytes(STEP_BYTES, "big") + b"".join(tensor.digest for tensor in _ordered(tensors))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with (self._directory / FILE_NAME).open("ab") as file:
                # After a crash a record may be torn: it goes, or all behind it would be out of place.
                file.truncate(file.tell() - file.tell() % len(record))
                file.write(record)
        except OSError as error:
            _log.warning("no digests of tensors from step %d on: %s", step, error)
            self._directory = None


def differing_tensors(directory: Path, step: int, root: bytes, mine: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the tensors of ``mine`` that are not those after ``step``; none where no digests give ``root``."""
    own = _ordered(tensor_descriptors(mine))
    size = STEP_BYTES + DIGEST_BYTES * len(own)
    try:
        with (directory / FILE_NAME).open("rb") as file:
            while len(record := file.read(size)) == size:
                if int.from_bytes(record[:STEP_BYTES], "big") != step:
                    continue
                digests = [record[start : start + DIGEST_BYTES] for start in range(STEP_BYTES, size, DIGEST_BYTES)]
                recorded = [replace(tensor, digest=digest) for tensor, digest in zip(own, digests, strict=True)]
                if parameter_root(recorded) == root:
                    return tuple(a.name for a, b in zip(own, recorded, strict=True) if a.digest != b.digest)
    except OSError as error:
        _log.info("no digests of tensors: %s", error)
    return ()


def _ordered(tensors: Iterable[TensorDescriptor]) -> list[TensorDescriptor]:
    return sorted(tensors, key=lambda tensor: tensor.name.encode())
