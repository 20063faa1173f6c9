"""What members of a simulated run say, and how long they wait for it to be on the log.

Clients of all members as one: it hands an event to some host, and again to another until it is on the log, as an
outbox does. Some of what is said is inadmissible at once (a source revoked by who does not own it), or becomes so.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ledger_fixtures import MemoryLedger

from consensus import portions as p
from consensus.event import CheckedEvent, Kind, pack_parts
from consensus.identifiers import Digest, Role
from consensus.keys import Ed25519SigningKey, SignatureScheme
from consensus.membership_change import MembershipChange
from consensus.rejection import Rejected
from consensus.transition import is_final

if TYPE_CHECKING:
    from simulation.ledgers import LedgerSimulation

AGAIN_MS = 700
DAY_MS = 86_400_000


@dataclass(slots=True)
class Said:
    """An event on its way."""

    event: CheckedEvent
    since_ms: int
    epoch: int

    @property
    def encoded(self) -> bytes:
        return pack_parts(self.event.entry_bytes, self.event.portions_bytes)


class Voices(MemoryLedger):
    """Every member's client. It signs as ``MemoryLedger`` does and seals nothing."""

    def __init__(self, simulation: "LedgerSimulation") -> None:
        self.simulation = simulation
        self.genesis = simulation.genesis_file
        self.chain_id = self.genesis.chain_id
        self.waiting: list[Said] = []
        self.settled: list[Said] = []
        self.given_up: dict[str, int] = {}
        self.sources: list[tuple[Digest, str]] = []
        """Id of each source said, and its owner's name."""
        self._salts = 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Speak for the members of the newest epoch on the log."""
        keys = self.simulation.cryptography_of(self.simulation.epoch)
        self.committee = keys.committee
        self.ids = {member.name: member.id for member in self.committee.voters}
        self.secrets = {member.name: keys.secrets(member.id) for member in self.committee.voters}

    # What is said

    def speak(self) -> None:
        """Somebody says something."""
        simulation, chance = self.simulation, self.simulation.random
        kinds = [self._say_source] * 4 + [self._say_revocation] * 2 + [self._say_policy, self._say_delegation]
        event = chance.choice(kinds)()
        if event is not None:
            self.say(event)
        simulation.at(chance.randint(1, 2 * simulation.plan.event_every_ms), self.speak)

    def say(self, event: CheckedEvent) -> None:
        said = Said(event, self.simulation.now_ms, self.committee.epoch)
        self.waiting.append(said)
        self._hand_in(said)

    def _names(self, role: Role) -> list[str]:
        return [member.name for member in self.committee.role_members(role)]

    def _say_source(self) -> CheckedEvent:
        owner = self.simulation.random.choice(self._names(Role.DATA_SOURCE))
        event = self.source(owner, f"source {len(self.sources)}")
        self.sources.append((event.id, owner))
        return event

    def _say_revocation(self) -> CheckedEvent | None:
        """By the owner, mostly; of a source that may have been revoked before, or be on its way."""
        if not self.sources:
            return None
        chance = self.simulation.random
        source, owner = chance.choice(self.sources[-6:])
        names = self._names(Role.DATA_SOURCE)
        if owner not in names or chance.random() < 0.2:
            owner = chance.choice(names)
        return self.revocation(owner, source)

    def _say_policy(self) -> CheckedEvent:
        return self.policy(name=f"policy {self._salts}")

    def _say_delegation(self) -> CheckedEvent:
        chance = self.simulation.random
        operator = chance.choice(self._names(Role.OPERATOR))
        now_ms = self.simulation.clock.now_ms()
        campaign = chance.randbytes(32)
        delegation = p.Delegation(
            campaign=campaign,
            scheme=SignatureScheme.ED25519,
            job_key=Ed25519SigningKey(chance.randbytes(32)).public_key,
            not_before_ms=now_ms,
            expires_at_ms=now_ms + DAY_MS,
            replaces=b"",
            head=b"",
        )
        return self.signed(
            Kind.DELEGATION, [operator], p.Portions(None, None, self.salted(delegation)), campaign=campaign
        )

    def change(self, change: MembershipChange) -> CheckedEvent:
        """The end of the epoch, signed by every voter."""
        return self.signed(Kind.MEMBERSHIP, list(self.ids), p.Portions(None, self.salted(change), None))

    # What becomes of it

    def _hand_in(self, said: Said) -> None:
        hosts = [node for node in self.simulation.nodes.values() if node.engine is not None and not node.ended]
        if hosts:
            host = self.simulation.random.choice(hosts)
            try:
                host.submit(said.encoded)
            except Rejected as refusal:
                self._refused(said, refusal)

    def _refused(self, said: Said, refusal: Rejected) -> None:
        if is_final(refusal) and self.simulation.why_inadmissible(said.event) is not None:
            if said in self.waiting:
                self.waiting.remove(said)
            reason = refusal.reason.value
            self.given_up[reason] = self.given_up.get(reason, 0) + 1

    def look(self) -> None:
        """Hand in again what is not on the log."""
        for said in list(self.waiting):
            if said.event.id in self.simulation.on_log:
                self.waiting.remove(said)
                self.settled.append(said)
            elif (refusal := self.simulation.why_inadmissible(said.event)) is not None and is_final(refusal):
                self._refused(said, refusal)
            elif self.simulation.now_ms - said.since_ms >= AGAIN_MS:
                self._hand_in(said)
        self.simulation.at(AGAIN_MS, self.look)

    def overdue(self, since_ms: int) -> list[Said]:
        """What was said before ``since_ms``, could be on the log, and is not."""
        return [
            said
            for said in self.waiting
            if said.since_ms < since_ms
            and said.event.id not in self.simulation.on_log
            and self.simulation.why_inadmissible(said.event) is None
        ]
