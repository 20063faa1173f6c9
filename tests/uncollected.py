"""What is kept alive by nothing but a cycle of references."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from consensus.rejection import Rejected


@contextmanager
def refusals_left() -> Iterator[Callable[[], int]]:
    """With the collector at rest: how many refusals there are more than at first. Each may hold what it refused."""
    gc.collect()
    gc.disable()
    try:
        before = _refusals()
        yield lambda: _refusals() - before
    finally:
        gc.enable()


def _refusals() -> int:
    # Not by isinstance: other libraries have objects that warn when they are asked for their class.
    return sum(type(found) is Rejected for found in gc.get_objects())
