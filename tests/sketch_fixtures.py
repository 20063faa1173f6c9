"""Files of sketches made by hand, with windows that commit to them: every shape that a campaign may leave."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from attribution.index import SketchedCampaign
from attribution.weights import WindowFile, open_window
from consensus.accumulators import VERSION, AccumulatorWindow, WindowEntry, WindowTerms, window_root
from consensus.bundle import OpenEvent
from consensus.codec import encode
from consensus.predicates.accumulators import Window

CHAIN, CAMPAIGN, POLICY = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
SOURCES = (bytes([4]) * 32, bytes([5]) * 32)
WINDOW_STEPS = 10
RANK = 2
RANKS = {"even": 3}
"""A parameter block that is sketched at a higher rank."""
SHAPES = {"odd": (3, 5), "even": (4, 6), "thin": (1, 7), "closed": (6, 4)}


@dataclass(frozen=True)
class HandMade:
    """A run's folder, what a log would say of it, and the tensors by window and source."""

    folder: Path
    terms: SketchedCampaign
    tensors: dict[tuple[int, bytes], dict[str, Tensor]]

    def files(self) -> tuple[WindowFile, ...]:
        return tuple(open_window(self.folder, CAMPAIGN, window) for window in self.terms.windows)


def made_sketches(first: int, count: int, names: Sequence[str], random: torch.Generator) -> dict[str, Tensor]:
    """Of ``count`` examples, each visited twice in the window that begins at ``first``."""
    examples = torch.arange(count) * 3 + first
    steps = first + torch.arange(2 * count) * WINDOW_STEPS // (2 * count)
    tensors = {"examples": examples, "visits": torch.stack([steps, examples.repeat(2)], dim=1)}
    for name in names:
        rank = min(RANKS.get(name, RANK), *SHAPES[name])
        for part, size in zip(("left", "right"), SHAPES[name], strict=True):
            numbers = torch.randint(1, 16, (count, rank, 2 * ((size + 1) // 2)), generator=random, dtype=torch.uint8)
            if size % 2:
                numbers[:, :, -1] = 8
            tensors[f"{name}/{part}"] = numbers[:, :, ::2] | (numbers[:, :, 1::2] << 4)
        tensors[f"{name}/scale"] = torch.rand(count, rank, generator=random)
    return tensors


def hand_made(folder: Path, changed: Mapping[tuple[int, bytes], dict[str, Tensor]] | None = None) -> HandMade:
    """Two windows of two sources; in the second window one parameter was closed. ``changed`` replaces files."""
    random = torch.Generator().manual_seed(5)
    for name in ("windows", "blobs"):
        (folder / name).mkdir(parents=True)
    windows, held = [], {}
    for first, names in ((1, tuple(SHAPES)), (11, tuple(SHAPES)[:3])):
        entries = [WindowEntry(b"", b"", bytes(32), 1, b"", 0)]
        for number, source in enumerate(SOURCES):
            tensors = made_sketches(first, 5 + number, names, random)
            tensors = (changed or {}).get((first, source), tensors)
            held[first, source] = tensors
            entries.append(WindowEntry(POLICY, source, bytes(32), 1, *written(folder, tensors)))
        last = first + WINDOW_STEPS - 1
        window = AccumulatorWindow(VERSION, WindowTerms(CAMPAIGN, first, last), tuple(entries))
        root = window_root(window)
        (folder / "windows" / f"{root.hex()}.window").write_bytes(encode(window))
        windows.append(Window(first, last, root, cast(OpenEvent, None)))
    terms = SketchedCampaign(CHAIN, CAMPAIGN, RANK, SHAPES, tuple(windows), RANKS)
    return HandMade(folder, terms, held)


def written(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """SHA-256 and size of a file of these tensors."""
    path = folder / "new"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()
    path.rename(folder / "blobs" / f"{digest.hex()}.safetensors")
    return digest, len(content)


def rebuilt(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The examples' parts of a parameter, ``[N, P, Q]``, by the words of the format."""
    left, right = (
        torch.stack([tensors[f"{name}/{part}"] & 15, tensors[f"{name}/{part}"] >> 4], dim=3).flatten(2)[:, :, :size]
        for part, size in zip(("left", "right"), SHAPES[name], strict=True)
    )
    scale = tensors[f"{name}/scale"].double()
    return torch.einsum("nr,nrp,nrq->npq", scale, left.double() - 8, right.double() - 8)


def unpacked(packed: Tensor, size: int) -> Tensor:
    """``[N, r, ⌈size/2⌉]`` bytes of two numbers each, in order."""
    return torch.stack([packed & 15, packed >> 4], dim=3).flatten(2)[:, :, :size].double() - 8
