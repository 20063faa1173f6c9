"""Members of one kind each over real ledgers: censors, and senders of garbage with garbage events among it.

Neither is a traitor that ``ledger_adversary`` leads: a censor keeps every rule but those against censorship, and a
sender of garbage says nothing that an honest member would say.
"""

from collections import deque
from typing import TYPE_CHECKING

from simulation.adversary import REMEMBERED, GarbageSender
from simulation.ledger_host import LedgerNode

from consensus.block import Header
from consensus.codec import decode
from consensus.engine import Verdict
from consensus.event import MAX_ENTRY_BYTES, CheckedEvent, Entry, unpack
from consensus.identifiers import MemberId
from consensus.rejection import Rejected
from consensus.vote import Proposal
from node.mempool import URGENT_KINDS

if TYPE_CHECKING:
    from simulation.ledgers import LedgerSimulation


class CensorNode(LedgerNode):
    """Keeps no urgent event, so that it proposes none, and votes for no ledger block with one."""

    def submit(self, encoded: bytes) -> None:
        if not _is_urgent(encoded):
            super().submit(encoded)

    def take_event(self, sender: MemberId, encoded: bytes) -> None:
        if not _is_urgent(encoded):
            super().take_event(sender, encoded)

    def judged(self, proposal: Proposal, header: Header, events: list[CheckedEvent]) -> Verdict:
        found = super().judged(proposal, header, events)
        censored = any(event.entry.kind in URGENT_KINDS for event in events)
        return Verdict.REFUSED if censored and found is Verdict.VALID else found


class LedgerGarbageSender(GarbageSender):
    """Gossips overheard events with a byte changed or cut off, too."""

    simulation: "LedgerSimulation"

    def __init__(self, simulation: "LedgerSimulation", own: MemberId) -> None:
        super().__init__(simulation, own)
        self.events: deque[bytes] = deque(maxlen=REMEMBERED)

    def hear_event(self, encoded: bytes) -> None:
        """Overheard on its way."""
        self.events.append(encoded)

    def act(self) -> None:
        chance = self.simulation.random
        if self.events:
            event = bytearray(chance.choice(list(self.events)))
            if chance.random() < 0.3:
                del event[chance.randrange(len(event)) :]
            else:
                event[chance.randrange(len(event))] ^= 1 << chance.randrange(8)
            self.simulation.gossip(self.own, list(self.simulation.nodes), bytes(event))
        super().act()


def _is_urgent(encoded: bytes) -> bool:
    try:
        return decode(unpack(encoded).entry, Entry, MAX_ENTRY_BYTES).kind in URGENT_KINDS
    except Rejected:
        return False
