"""A member that hands urgent events to one honest member each, and says nothing else.

Who holds one for ``censorship_ms`` refuses the ledger blocks of all others, who do not know of it. Where timeouts have
grown meanwhile, a rotation of leaders takes longer than that, and the members refuse each other's without end.
"""

import pytest
from simulation.ledgers import LedgerSimulation
from simulation.plan import LedgerPlan

from consensus.engine import Timing
from consensus.event import CheckedEvent, pack_parts
from consensus.identifiers import Digest, MemberId
from node.proposals import Proposals

SLOW_MS = range(3_000, 45_000)
"""When messages take about as long as the longest timeout lasts."""
TELLS_FROM_MS = 20_000
TELLS_EVERY_MS = 1_000
SETTLES_EVERY_MS = 50
PLAN = LedgerPlan(
    counts=(4, 1, 1),
    silent=(1, 0, 0),
    timing=Timing(timeout_ms=20, max_timeout_ms=1_500, heartbeat_ms=500),
    censorship_ms=1_500,
    event_every_ms=300,
    end_ms=55_000,
)
"""A twentieth of the times that nodes have if nobody says otherwise."""


class Told(LedgerSimulation):
    """Tells each host of a revocation of its own, once a second."""

    teller = "data-source-4"

    def run(self) -> "Told":
        self.sources: list[Digest] = []
        self.at(100, self._register)
        self.at(TELLS_FROM_MS, self._tell)
        super().run()
        return self

    def _register(self) -> None:
        for number in range(250):
            source = self.voices.source(self.teller, f"a source of the teller's, {number}")
            self.sources.append(source.id)
            self._hand(source, list(self.nodes))

    def _tell(self) -> None:
        for host in self.nodes:
            self._hand(self.voices.revocation(self.teller, self.sources.pop()), [host])
        self.at(TELLS_EVERY_MS, self._tell)

    def _hand(self, event: CheckedEvent, hosts: list[MemberId]) -> None:
        teller = next(member.id for member in self.committee.voters if member.name == self.teller)
        for host in hosts:
            self.nodes[host].take_event(teller, pack_parts(event.entry_bytes, event.portions_bytes))

    def delay_ms(self, sender: MemberId) -> int:
        return self.random.randint(300, 700) if self.now_ms in SLOW_MS else self.random.randint(1, 10)

    def _settle(self) -> None:
        for node in self.nodes.values():
            node.settle()
        self.at(SETTLES_EVERY_MS, self._settle)


def finalized_at_last(seed: int) -> int:
    """How many ledger blocks became final in the last ten seconds, when messages are quick again."""
    simulation = Told(seed, PLAN).run()
    return min(sum(at > PLAN.end_ms - 10_000 for at in node.finalized_at) for node in simulation.nodes.values())


def test_members_told_of_urgent_events_alone_do_not_hold_up_the_others_for_long() -> None:
    assert finalized_at_last(1) > 30


def test_they_do_where_nobody_passes_on_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proposals, "_pass_on", lambda self, event: None)
    assert finalized_at_last(1) < 10
