"""Accumulators of a window against a run's own, where last bits differ: numbers within a tolerance.

The log has a window's root alone. Its numbers are in the files that the run kept, or a custodian gives out; which files
those are is bound by the root, so each is held to it first and nothing of another is used. Then, for every policy,
source and tensor, as for the total:

    ‖mine − recorded‖ <= tolerance · ‖recorded‖        (2-norms)

``BF16_TOLERANCE`` at least: both are stored in bfloat16. A source's sum that one side lacks is a difference, whatever
its size: which sources may move which parameter block follows from weights, not from rounding. Sketches are not
compared: at low rank the directions that are kept turn with the last bits.
"""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from consensus.accumulators import (
    MAX_WINDOW_BYTES,
    AccumulatorWindow,
    WindowEntry,
    blob_path,
    decode_window,
    window_path,
)
from consensus.rejection import ConfigError, Reason, Rejected

BF16_TOLERANCE = 2.0**-7
"""A rounding of each side, two units of the last of eight bits together."""


def differing_sums(mine: Path, my_root: bytes, recorded: Path, root: bytes, tolerance: float) -> tuple[str, ...]:
    """What of a window's sums in the folder ``mine`` is not as in ``recorded``, by source and tensor.

    Raises:
        ConfigError: a file of the recorded window is not there. Rejected: ``DIGEST_MISMATCH`` for one that is not
            the committed one; as ``decode_window``.
    """
    own, theirs = (
        {(entry.policy, entry.source): entry for entry in _window(folder, wanted).entries}
        for folder, wanted in ((mine, my_root), (recorded, root))
    )
    bound = max(tolerance, BF16_TOLERANCE)
    what: list[str] = []
    for place in sorted(own.keys() | theirs.keys()):
        if place not in own or place not in theirs:
            what.append(_of(place))
            continue
        here, there = _sums(mine, own[place]), _sums(recorded, theirs[place])
        for name in sorted(here.keys() | there.keys()):
            if name not in here or name not in there or not _is_near(here[name], there[name], bound):
                what.append(f"{_of(place)}: {name}")
    return tuple(what)


def _of(place: tuple[bytes, bytes]) -> str:
    return f"accumulators of source {place[1].hex()[:16]}" if place[1] else "accumulators' total"


def _is_near(here: Tensor, there: Tensor, tolerance: float) -> bool:
    if here.shape != there.shape:
        return False
    recorded = there.to(torch.float64)
    apart = torch.linalg.vector_norm(here.to(torch.float64) - recorded)
    return bool(apart <= tolerance * torch.linalg.vector_norm(recorded))


def _window(folder: Path, root: bytes) -> AccumulatorWindow:
    return decode_window(_read(folder / window_path(root), MAX_WINDOW_BYTES), root)


def _sums(folder: Path, entry: WindowEntry) -> dict[str, Tensor]:
    path = folder / blob_path(entry.blob_sha256)
    content = _read(path, entry.size_bytes)
    found = hashlib.sha256(content).digest()
    if found != entry.blob_sha256:
        raise Rejected(
            Reason.DIGEST_MISMATCH, f"{path} has SHA-256 {found.hex()}, committed is {entry.blob_sha256.hex()}"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Rejected(Reason.MALFORMED, f"{path}: no safetensors file, though committed: {error}") from error
    return tensors


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: expected a file of the recorded window, found: {error.strerror}") from error
