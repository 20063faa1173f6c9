"""Accumulator windows: how a campaign's per-source sums of gradients are committed.

A campaign that keeps accumulators is cut into windows of ``accumulator_window_steps`` steps; the last one may
be shorter. For every policy and source with an admitted example in the window the trainer sums, over its steps,
what that source added to the gradient the optimizer received, times the learning rate of the step; and, apart
from that, the whole gradient times the learning rate (the window's *total*). Each sum is a blob, a safetensors
file named by its SHA-256; beside it, where the campaign sketches (``sketch_rank``), a file of the same gradients,
example by example, at low rank (``trainer_client/sketches.py``). Here is what the log binds of them:

* the step that ends a window, and no other, names the window's root (``accumulator_root`` of its operation
  portion); members refuse a step that does otherwise, so that no window can be left out (``step_rules.py``);
* the root is the RFC 9162 tree over one leaf for the window itself and one for each entry, entries in order of
  policy and source, the total first: one entry can be shown with its proof and reveals no other.

That the sums are what the gradients were is the operator's word. What anybody can recompute: entries add up to the
total (conservation), and no source or parameter block has an entry that the log's steps did not admit.
"""

from itertools import pairwise
from typing import Annotated

from msgspec import Meta

from consensus.codec import decode, encode
from consensus.identifiers import Digest, Tag, tagged_hash
from consensus.merkle import root_of
from consensus.portions import MAX_ITEMS, Bytes32, Natural, OptionalBytes32, Wire
from consensus.rejection import Reason, Rejected

VERSION = 1
MAX_ENTRIES = 4 * MAX_ITEMS
MAX_WINDOW_BYTES = MAX_ENTRIES * 160 + 256

WINDOWS, BLOBS = "windows", "blobs"
"""Below the folder that a job leaves, a custodian keeps and a trace reads."""

Step = Annotated[int, Meta(ge=1, le=2**53 - 1)]


class WindowTerms(Wire, frozen=True):
    """Which steps of which campaign a window sums, both ends included."""

    campaign: Bytes32
    first_step: Step
    last_step: Step


class WindowEntry(Wire, frozen=True):
    """One blob: the sum of one source's gradients under one policy, or, with both empty, the total.

    ``sketches_sha256`` names the file of its examples' sketches, empty where there is none.
    """

    policy: OptionalBytes32
    source: OptionalBytes32
    blob_sha256: Bytes32
    size_bytes: Natural
    sketches_sha256: OptionalBytes32
    sketches_bytes: Natural

    def __post_init__(self) -> None:
        if (len(self.policy), len(self.source)) not in ((0, 0), (32, 32)):
            raise ValueError("policy and source are 32 bytes each, or both empty")
        if len(self.sketches_sha256) not in (0, 32) or bool(self.sketches_sha256) != bool(self.sketches_bytes):
            raise ValueError("a file of sketches has a digest of 32 bytes and a size, or neither")


class AccumulatorWindow(Wire, frozen=True, tag="accumulator-window"):
    """A window's terms and entries: what its root is computed from, as its file holds it."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    terms: WindowTerms
    entries: Annotated[tuple[WindowEntry, ...], Meta(min_length=1, max_length=MAX_ENTRIES)]

    @property
    def total(self) -> WindowEntry:
        """The entry of the whole gradient."""
        return self.entries[0]

    @property
    def of_sources(self) -> tuple[WindowEntry, ...]:
        """The entries of sources, in order of policy and source."""
        return self.entries[1:]


def window_bounds(window_steps: int, planned_steps: int, step: int) -> tuple[int, int]:
    """First and last step of the window that ``step`` (from 1) belongs to; ``window_steps`` is positive."""
    first = (step - 1) // window_steps * window_steps + 1
    return first, min(first + window_steps - 1, planned_steps)


def ends_window(window_steps: int, planned_steps: int, step: int) -> bool:
    """Whether ``step`` must name an accumulator root; never where the campaign keeps no accumulators."""
    return window_steps > 0 and window_bounds(window_steps, planned_steps, step)[1] == step


def window_root(window: AccumulatorWindow) -> Digest:
    """The root that the step which ends the window commits to.

    Raises:
        Rejected: ``BAD_FIELD`` when steps or entries are out of order or the total is not the first entry.
    """
    if window.terms.first_step > window.terms.last_step:
        raise Rejected(Reason.BAD_FIELD, f"a window from step {window.terms.first_step} to {window.terms.last_step}")
    places = [(entry.policy, entry.source) for entry in window.entries]
    if places[0] != (b"", b"") or any(not before < after for before, after in pairwise(places)):
        raise Rejected(Reason.BAD_FIELD, "entries of a window are not the total, then policies and sources in order")
    return root_of([tagged_hash(Tag.ACCUMULATOR, encode(leaf)) for leaf in (window.terms, *window.entries)])


def window_path(root: bytes) -> str:
    """Where a window's list is below the folder."""
    return f"{WINDOWS}/{root.hex()}.window"


def blob_path(sha256: bytes) -> str:
    """Where a file that a list names is below the folder: sums or sketches."""
    return f"{BLOBS}/{sha256.hex()}.safetensors"


def decode_window(encoded: bytes, root: bytes) -> AccumulatorWindow:
    """The window of a file that must have the committed ``root``.

    Raises:
        Rejected: ``DIGEST_MISMATCH``, as ``window_root`` or as ``codec.decode``.
    """
    window = decode(encoded, AccumulatorWindow, MAX_WINDOW_BYTES)
    found = window_root(window)
    if found != root:
        raise Rejected(Reason.DIGEST_MISMATCH, f"the window has root {found.hex()}, committed is {root.hex()}")
    return window
