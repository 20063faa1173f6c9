"""A source's reserve: the examples that its owner keeps from training, for memorization to be measured against.

Each example of a source has a *lot*: 53 bits of a hash over the source's content root and the example's index. The
claim's ``reserve_below`` is a bound; the examples whose lots are below it are the reserve, with 0 there are none. So:

* anybody names the reserve from the claim, example by example, at a hash each: no list is sent or kept, and nobody
  walks a source, which may claim to have any number of examples;
* who trains has no say in it: the root is the owner's, and stood before the campaign;
* content that is claimed again under the same root has the same lots: what was kept back stays so, and of two reserves
  the larger one holds the other.

A reserved example that is presented is counted by the step, as refused ``reserved-for-calibration``, with no event of
its own (``step_rules.py``). What the reserve is used for: ``trainer_client/memorization.py``.
"""

import hashlib
from collections.abc import Iterable
from heapq import nsmallest

from consensus.identifiers import Tag, tagged_prefix
from consensus.portions import SourceClaim
from consensus.rejection import Reason

LOT_BITS = 53
RESERVED = Reason.RESERVED_FOR_CALIBRATION.value
_UNUSED_BITS = 64 - LOT_BITS
_EIGHT = (8).to_bytes(8, "big")


def lot(content_root: bytes, example: int) -> int:
    """An example's lot, 0 to 2⁵³ − 1: the leading bits of ``tagged_hash(RESERVE, content root, u64(example))``."""
    drawn = hashlib.sha256(_before(content_root) + example.to_bytes(8, "big")).digest()
    return int.from_bytes(drawn[:8], "big") >> _UNUSED_BITS


def reserved_among(claim: SourceClaim, examples: Iterable[int]) -> list[int]:
    """Those of ``examples`` that are in the claim's reserve, in their order."""
    return _drawn(claim.content_root, claim.reserve_below, examples)


def reserve_count(content_root: bytes, example_count: int, reserve_below: int) -> int:
    """How many of a source's examples are reserved under this bound; draws every lot once."""
    return len(_drawn(content_root, reserve_below, range(example_count)))


def bound_of(content_root: bytes, example_count: int, reserve: int) -> int:
    """The ``reserve_below`` under which ``reserve`` of a source's examples lie, at most all; draws every lot once."""
    if not reserve:
        return 0
    return nsmallest(reserve, (lot(content_root, example) for example in range(example_count)))[-1] + 1


def _drawn(content_root: bytes, reserve_below: int, examples: Iterable[int]) -> list[int]:
    if not reserve_below:
        return []
    sha256, before = hashlib.sha256, _before(content_root)
    bound = (reserve_below << _UNUSED_BITS).to_bytes(8, "big")
    return [example for example in examples if sha256(before + example.to_bytes(8, "big")).digest() < bound]


def _before(content_root: bytes) -> bytes:
    return tagged_prefix(Tag.RESERVE, content_root) + _EIGHT
