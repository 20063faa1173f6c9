"""Which leaders are not worth waiting for.

A view whose leader is gone costs everyone a whole timeout, in each of the views it would have led. Nullifying
is always allowed (a voter that has not finalized may nullify at any time), so a voter may guess: a wrong
guess costs one view, never agreement. A leader is *absent* while

- the host has lost its link to it, or
- the last view it led was nullified without a proposal, and nothing it signed for that view or a later one
  has come since, alone or inside a certificate.

What to do about an absent leader is left to ``engine``.
"""

from collections.abc import Iterable

from consensus.identifiers import MemberId, View


class Absence:
    """Per leader, the last sign of life and the last view led in vain. Mutable, owned by the engine."""

    __slots__ = ("_heard", "_in_vain", "_unreachable")

    def __init__(self) -> None:
        self._heard: dict[MemberId, View] = {}
        self._in_vain: dict[MemberId, View] = {}
        self._unreachable: frozenset[MemberId] = frozenset()

    def heard(self, member: MemberId, view: View) -> None:
        """A checked message that ``member`` signed for ``view``."""
        self._heard[member] = max(view, self._heard.get(member, View(0)))

    def led_in_vain(self, leader: MemberId, view: View) -> None:
        """``view`` was nullified, and no proposal of its leader had come."""
        self._in_vain[leader] = max(view, self._in_vain.get(leader, View(0)))

    def set_unreachable(self, members: Iterable[MemberId]) -> None:
        """The members to whom the host had a link and has none now."""
        self._unreachable = frozenset(members)

    def is_absent(self, leader: MemberId) -> bool:
        """Whether to spare the timeout of a view it leads."""
        return leader in self._unreachable or self._in_vain.get(leader, View(0)) > self._heard.get(leader, View(0))
