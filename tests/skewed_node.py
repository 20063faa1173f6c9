"""``countersign`` with a wall clock that is off: ``python skewed_node.py OFFSET_MS node run --config FILE``.

The machine's clock is everybody's, and time namespaces leave it out; so this process alone is told another time, by the
class that the node takes its time from. The product has no switch for it.
"""

import sys

from node import runner
from node.cli import main
from node.clock import SystemClock

OFFSET_MS = int(sys.argv.pop(1))


class SkewedClock(SystemClock):
    """The machine's clock, ``OFFSET_MS`` ahead."""

    def now_ms(self) -> int:
        """Unix time in milliseconds, wrong."""
        return super().now_ms() + OFFSET_MS


if __name__ == "__main__":
    runner.SystemClock = SkewedClock  # type: ignore[misc]
    main()
