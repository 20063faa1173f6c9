"""Accumulators of a window against a run's own, where last bits differ: numbers within a tolerance.

The log has a window's root alone. Its numbers are in the files that the run kept, or a custodian gives out; which files
those are is bound by the root, so each is held to it first and nothing of another is used. Then, for every policy,
source and tensor, as for the total:

    ‖mine − recorded‖ <= tolerance · ‖recorded‖        (2-norms)

``BF16_TOLERANCE`` at least: both are stored in bfloat16. A source's sum that one side lacks is a difference, whatever
its size: which sources may move which parameter block follows from weights, not from rounding.

Sketches are held to the gradients of the steps taken again (``sketch_witness.py``): ``recorded_sketches`` gives them to
that before the window's first step, ``differing_sketches`` says at its end which hold too little.
"""

import hashlib
from collections.abc import Mapping
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
from trainer_client.sketch_witness import holding_less
from trainer_client.sketches import Place

BF16_TOLERANCE = 2.0**-7
"""A rounding of each side, two units of the last of eight bits together."""
NAMED = 8
"""So many examples of a source are named, of those whose sketches hold too little."""
INDEXES = frozenset({"examples", "visits"})
PARTS = {"left": torch.uint8, "right": torch.uint8, "scale": torch.float32}


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


def recorded_sketches(recorded: Path, root: bytes) -> dict[tuple[bytes, bytes], dict[str, Tensor]]:
    """The files of a window's sketches in a folder, by policy and source.

    Raises:
        ConfigError, Rejected: as ``differing_sums``; ``MALFORMED`` for a file that is none of sketches.
    """
    found = {}
    for entry in _window(recorded, root).entries:
        if entry.sketches_sha256:
            file = _tensors(recorded, entry.sketches_sha256, entry.sketches_bytes)
            check_sketches(file, entry.sketches_sha256)
            found[entry.policy, entry.source] = file
    return found


def differing_sketches(
    mine: Path,
    my_root: bytes,
    recorded: Mapping[tuple[bytes, bytes], Mapping[str, Tensor]],
    shared: Mapping[Place, float],
    tolerance: float,
) -> tuple[str, ...]:
    """Which recorded sketches of a window are not of the gradients that were formed again, by source and example.

    Args:
        mine: the folder of the replay's own window, of root ``my_root``.
        recorded: as ``recorded_sketches`` gave them.
        shared: as ``SketchWitness`` summed it.
    """
    own = recorded_sketches(mine, my_root)
    what: list[str] = []
    for place in sorted(own.keys() | recorded.keys()):
        name = f"sketches of source {place[1].hex()[:16]}"
        here, there = own.get(place), recorded.get(place)
        if here is None or there is None or _shapes(here) != _shapes(there) or not _same_visits(here, there):
            what.append(name)
            continue
        of_source = {example: held for (*held_place, example), held in shared.items() if tuple(held_place) == place}
        less = holding_less(here, there, of_source, tolerance)
        what += [f"{name}: {each}" for each in less[:NAMED]]
        if len(less) > NAMED:
            what.append(f"{name}: {len(less) - NAMED} more")
    return tuple(what)


def _same_visits(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(here[index], there[index]) for index in INDEXES)


def _shapes(file: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in file.items()}


def check_sketches(file: Mapping[str, Tensor], digest: bytes) -> None:
    """The file's tensors are those of sketches, with a row for each example.

    Raises:
        Rejected: ``MALFORMED``.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.items():
        parameter, _, part = name.rpartition("/")
        parts.setdefault(parameter, {})[part] = tensor
    indexes = parts.pop("", {})
    sound = indexes.keys() == INDEXES and all(tensor.dtype == torch.int64 for tensor in indexes.values())
    sound = sound and indexes["examples"].dim() == 1 and indexes["visits"].dim() == 2
    for tensors in parts.values():
        sound = sound and {name: tensor.dtype for name, tensor in tensors.items()} == PARTS
        sound = sound and tensors["left"].dim() == tensors["right"].dim() == 3
        sound = sound and len(tensors["left"]) == len(indexes["examples"])
        sound = sound and tensors["left"].shape[:2] == tensors["right"].shape[:2] == tensors["scale"].shape
    if not sound:
        raise Rejected(Reason.MALFORMED, f"the file {digest.hex()} is none of sketches, though committed")


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
    return _tensors(folder, entry.blob_sha256, entry.size_bytes)


def _tensors(folder: Path, digest: bytes, size_bytes: int) -> dict[str, Tensor]:
    path = folder / blob_path(digest)
    content = _read(path, size_bytes)
    found = hashlib.sha256(content).digest()
    if found != digest:
        raise Rejected(Reason.DIGEST_MISMATCH, f"{path} has SHA-256 {found.hex()}, committed is {digest.hex()}")
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
