"""Members of one kind each over real ledgers: censors, senders of garbage with garbage events among it, replayers.

None is a traitor that ``ledger_adversary`` leads: a censor keeps every rule but those against censorship, a sender of
garbage says nothing that an honest member would say, and a replayer what others said in an epoch that has ended.
"""

from collections import deque
from typing import TYPE_CHECKING

from simulation.adversary import LONGEST_PAUSE_MS, REMEMBERED, GarbageSender
from simulation.ledger_host import LedgerNode

from consensus.block import Header
from consensus.codec import decode
from consensus.effect import Message
from consensus.engine import Verdict
from consensus.event import MAX_ENTRY_BYTES, CheckedEvent, Entry, unpack
from consensus.identifiers import MemberId
from consensus.rejection import Rejected
from consensus.vote import Proposal
from node.mempool import URGENT_KINDS
from node.replica import epoch_of

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


class Replayer:
    """Keeps what correct members say, unspoiled, and says it again once its epoch has ended."""

    def __init__(self, simulation: "LedgerSimulation", own: MemberId) -> None:
        self.simulation = simulation
        self.own = own
        self.heard: dict[type, dict[int, deque[Message]]] = {}
        """By kind and epoch."""

    def hear(self, message: Message) -> None:
        """Overheard on its way."""
        epoch = epoch_of(message, self.simulation.committee.chain_id)
        of_kind = self.heard.setdefault(type(message), {})
        of_kind.setdefault(epoch, deque(maxlen=REMEMBERED)).append(message)

    def hear_event(self, encoded: bytes) -> None:
        """Events are of no epoch."""

    def act(self) -> None:
        """One of each kind, to everybody."""
        simulation = self.simulation
        chance = simulation.random
        for kind, by_epoch in self.heard.items():
            ended = [message for epoch, told in by_epoch.items() if epoch < simulation.epoch for message in told]
            if ended:
                message = chance.choice(ended)
                simulation.replayed[kind.__name__] += 1
                for to in simulation.nodes:
                    simulation.send(self.own, to, message)
        simulation.at(chance.randint(1, LONGEST_PAUSE_MS), self.act)


def _is_urgent(encoded: bytes) -> bool:
    try:
        return decode(unpack(encoded).entry, Entry, MAX_ENTRY_BYTES).kind in URGENT_KINDS
    except Rejected:
        return False
