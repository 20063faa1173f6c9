"""What no run may end in."""


class Fork(AssertionError):
    """Two histories."""


class DoubleVote(AssertionError):
    """A correct voter broke a voting rule."""


class Halted(AssertionError):
    """A correct engine halted."""


class Unwanted(AssertionError):
    """A ledger block is final that a vote-time rule keeps from a quorum."""


class Inadmissible(AssertionError):
    """An event is final that admission refuses, or one is on the log twice."""


class Diverged(AssertionError):
    """Two correct hosts hold different logs or states at one height."""


class Fallen(AssertionError):
    """A correct host raised what it must not."""


class Distrusted(AssertionError):
    """A correct host refused what another correct host answered."""


class Withheld(AssertionError):
    """An event that could be on the log is not, long after the network has healed."""
