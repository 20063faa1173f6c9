"""Time, as something handed in.

``Clock`` is a constructor argument of everything in ``node`` that waits, stamps or measures, so that
tests drive time themselves. Consensus rules never see a clock: the only time they know is a ledger
block's timestamp, and bounded skew against ``now_ms`` is a vote-time rule of the replica.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Wall and monotonic time in milliseconds."""

    def now_ms(self) -> int:
        """Unix time in milliseconds. May jump; fit for timestamps only."""
        ...

    def monotonic_ms(self) -> int:
        """Milliseconds since an arbitrary start. Never goes back; fit for timeouts and durations."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> int:
        """Milliseconds of the machine's monotonic clock."""
        return time.monotonic_ns() // 1_000_000
