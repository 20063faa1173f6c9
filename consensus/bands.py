"""Entropy bands: examples sorted by how unlikely the base model found them, each band with depth profiles of its own.

A policy names rising *edges*, in thousandths of a nat per token. Band 0 holds examples whose *base loss* is below the
first edge, band i those from edge i - 1 up to, not including, edge i, the last one the rest. Without edges there is one
band of all.

A base loss is what the base model loses on an example, in whole thousandths of a nat per token, measured before the
first step. A campaign commits to all of them by the SHA-256 of one file: for each example of the manifest, in its
order, 4 bytes, big-endian; ``UNMEASURED`` stands for an example that was kept from the model, which is in no band.
Committed to are losses, not bands, because a later policy may draw other edges.

That the losses are the base model's is the operator's word until somebody measures them again, with the base model and
the examples (``trainer_client/base_losses.py``). What each step's profiles must be follows from the file exactly.
"""

import struct
from bisect import bisect_right
from collections.abc import Sequence

from consensus.rejection import Reason, Rejected

MAX_BANDS = 16

UNMEASURED = 2**32 - 1
LARGEST_LOSS_MILLI = UNMEASURED - 1
"""Larger losses are said to be this."""

LOSS_BYTES = 4


def band_of(loss_milli: int, edges_milli: Sequence[int]) -> int:
    """The band, from 0, of an example with this base loss.

    Raises:
        Rejected: ``BASE_LOSSES_MISSING`` for an unmeasured example, where there are edges.
    """
    if edges_milli and loss_milli == UNMEASURED:
        raise Rejected(Reason.BASE_LOSSES_MISSING, "the base model's loss of this example was not measured")
    return bisect_right(edges_milli, loss_milli)


def encode_losses(losses_milli: Sequence[int]) -> bytes:
    """The file of base losses; each from 0 to ``LARGEST_LOSS_MILLI``, or ``UNMEASURED``."""
    return struct.pack(f">{len(losses_milli)}I", *losses_milli)


def decode_losses(encoded: bytes, count: int) -> tuple[int, ...]:
    """The losses of a file for a manifest of ``count`` examples.

    Raises:
        Rejected: ``MALFORMED`` for a file of another size.
    """
    if len(encoded) != LOSS_BYTES * count:
        raise Rejected(
            Reason.MALFORMED, f"base losses in {len(encoded)} bytes, expected {LOSS_BYTES} for each of {count} examples"
        )
    return struct.unpack(f">{count}I", encoded)
