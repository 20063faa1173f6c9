"""Simulated runs whose hosts hold real logs and states, judge real events, and go through epochs.

Hosts are ``ledger_host``, members' clients ``voices``, servers that lie ``liars``, traitors ``ledger_adversary``,
censors, senders of garbage and replayers
``ledger_saboteurs``, the making of a new epoch's keys ``ceremonies``. Checked beside
what ``simulator`` and ``judgement`` check:

- ``Distrusted``: nobody refuses what a correct host answers to who catches up.
- ``Fallen``: no correct host raises what it must not.
- ``Withheld``: no admissible event waits for ever, nor evidence that a member keeps, of whatever epoch; asked at the
  end of a run that healed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from epoch_fixtures import invitation_to, kept_seeds, next_membership
from simulation.adversary import Adversary
from simulation.ceremonies import Ceremony, Seat
from simulation.cryptography import Keys
from simulation.failures import Distrusted, Fallen, Withheld
from simulation.host import Node
from simulation.judgement import JudgedSimulation
from simulation.ledger_adversary import LedgerAdversary
from simulation.ledger_host import LedgerNode
from simulation.ledger_saboteurs import CensorNode, LedgerGarbageSender, Replayer
from simulation.liars import lie
from simulation.plan import DELAY_MS, Change, LedgerPlan
from simulation.voices import Voices

from consensus.codec import encode
from consensus.engine import Engine
from consensus.identifiers import VOTING_ROLES, Digest, MemberId
from consensus.key_generation import BadDealing
from consensus.membership import Committee, Membership
from consensus.membership_change import MembershipChange
from consensus.participant import MemberSecrets
from consensus.rejection import CountersignError, Rejected
from node.catchup import serve_blocks
from node.messages import Blocks, GetBlocks

CEREMONY_AGAIN_MS = 300
ANSWER_TARGET_BYTES = 6_000
"""Of answers to who catches up: a few ledger blocks, so that it takes several."""


class LedgerSimulation(JudgedSimulation):
    """One run with real ledgers."""

    nodes: dict[MemberId, LedgerNode]  # type: ignore[assignment]
    garbage_senders: list[LedgerGarbageSender | Replayer]  # type: ignore[assignment]

    def __init__(
        self,
        seed: int,
        plan: LedgerPlan,
        engine: type[Engine] = Engine,
        host: type[LedgerNode] = LedgerNode,
    ) -> None:
        self.host_class = host
        self.held_events: dict[Digest, bytes] = {}
        """What traitors can show of their ledger blocks."""
        self.spoiled: Counter[str] = Counter()
        """Ledger blocks of traitors that must not be final, by the rule they break."""
        self.refused_events: Counter[str] = Counter()
        """Gossiped events that a host refused, by reason."""
        self.distrusted: Counter[str] = Counter()
        """Answers to who catches up that were refused, by reason."""
        self.named: list[tuple[str, str]] = []
        """Who spoilt a ceremony: by whom named, and who."""
        self.carried = 0
        """How often an epoch ended for a host by the certificate of a carrier."""
        self.replayed: Counter[str] = Counter()
        """Messages of ended epochs that replayers said to everybody, by kind."""
        self.replayers: set[MemberId] = set()
        self.liars: set[MemberId] = set()
        self.away: set[MemberId] = set()
        self.stale_answers: dict[MemberId, Blocks] = {}
        super().__init__(seed, plan, engine)
        self.garbage_senders = [LedgerGarbageSender(self, member) for member in sorted(self.garbage)]
        self.garbage_senders += [Replayer(self, member) for member in sorted(self.replayers)]
        self.voices = Voices(self)

    # Who takes part

    def make_nodes(self) -> dict[MemberId, LedgerNode]:  # type: ignore[override]
        self.names = {member.id: member.name for member in self.committee.voters}
        """By what a host is found by."""
        self.traitor_names = {self.names[traitor] for traitor in self.traitors}
        absent = self.traitors | self.silent | self.garbage
        for index, role in enumerate(VOTING_ROLES):
            rest = [one.id for one in self.committee.role_members(role) if one.id not in absent]
            self.replayers.update(rest[len(rest) - self.plan.replayers[index] :])
        absent |= self.replayers
        for index, role in enumerate(VOTING_ROLES):
            honest = [one.id for one in self.committee.role_members(role) if one.id not in absent]
            honest.sort(reverse=True)  # who catches up asks the lowest first: the liars
            first = honest[: len(honest) - self.plan.liars[index]]
            self.liars.update(honest[len(first) :])
            self.away.update(first[len(first) - self.plan.away[index] :])
        return {
            member.id: (CensorNode if member.id in self.censors else self.host_class)(self, member.id, member.name)
            for member in self.committee.voters
            if member.id not in absent
        }

    def make_adversary(self) -> Adversary:
        return LedgerAdversary(self)

    def addresses(self, committee: Committee) -> list[MemberId]:
        """What the voters of an epoch are found by."""
        return [self.aliases.get(member.id, MemberId(member.id)) for member in committee.voters]

    @property
    def parts(self) -> list[MemberId]:
        return list(self.names)

    # The run

    def run(self) -> "LedgerSimulation":
        self.at(20, self.voices.speak)
        self.at(500, self.voices.look)
        self.at(1_000, self._settle)
        for number, change in enumerate(self.plan.changes, start=1):
            self.at(change.at_ms, lambda number=number, change=change: self._change(number, change))
        try:
            super().run()
        except CountersignError as error:
            raise Fallen(f"seed {self.seed}: {type(error).__name__}: {error}") from error
        return self

    def boot_delay_ms(self, node: Node) -> int:
        return self.plan.away_ms if node.own in self.away else super().boot_delay_ms(node)

    def _settle(self) -> None:
        for node in self.nodes.values():
            node.settle()
        self.at(1_000, self._settle)

    def _heal(self) -> None:
        super()._heal()
        for node in self.nodes.values():
            self.greet(node)

    def _change(self, epoch: int, change: Change) -> None:
        """The members of the next epoch have made their keys; the event that settles them is handed in."""
        if self.epoch != epoch - 1:
            self.at(200, lambda: self._change(epoch, change))
            return
        keys = self.epochs[-1]
        secrets = {member.name: keys.secrets(member.id) for member in keys.committee.voters}
        if self.plan.over_network:
            invitation = invitation_to(self.genesis_file, keys.committee, add=dict(change.add), remove=change.remove)
            kept = kept_seeds(invitation, keys.committee, secrets, rotate=change.rotate)
            Ceremony(
                self,
                invitation,
                kept,
                self._settle_members,
                lambda seat, refusal: self._begin_anew(epoch, change, seat, refusal),
            )
            return
        self._settle_members(
            *next_membership(
                self.genesis_file,
                keys.committee,
                secrets,
                add=dict(change.add),
                remove=change.remove,
                rotate=change.rotate,
            )
        )

    def _begin_anew(self, epoch: int, change: Change, seat: Seat, refusal: Rejected) -> None:
        """Without whoever is named: the ceremony's own rule."""
        if not isinstance(refusal, BadDealing):
            raise refusal
        culprit = seat.ceremony.culprit(refusal)
        self.named.append((seat.name, culprit))
        self.note("named", seat.name, culprit)
        without = replace(
            change,
            add=tuple(joining for joining in change.add if joining[0] != culprit),
            remove=(*change.remove, culprit),
            rotate=tuple(name for name in change.rotate if name != culprit),
        )
        self.at(CEREMONY_AGAIN_MS, lambda: self._change(epoch, without))

    def _settle_members(self, membership: Membership, after: dict[str, MemberSecrets]) -> None:
        """The next epoch's keys are made: hand in the event, and switch on who joins."""
        self.epochs.append(Keys(self.genesis_file, after, membership, self.epochs[-1].committee))
        for member in membership.members:
            address = self.address_of(member.name) or member.id
            if member.name in self.traitor_names:
                self.traitors.add(member.id)
            elif address not in self.names:
                self.names[address] = member.name
                self.nodes[address] = self.host_class(self, address, member.name)
                self.at(1, self.nodes[address].boot)
            if address != member.id:
                self.aliases[member.id] = address
        self.voices.say(self.voices.change(MembershipChange(membership, "")))

    def epoch_began(self) -> None:
        self.voices.begin_epoch()

    def address_of(self, name: str) -> MemberId | None:
        """What a member is found by; None before it has joined."""
        return next((address for address, known in self.names.items() if known == name), None)

    # The network

    def broadcast(self, sender: MemberId, message: object) -> None:
        if self.adversary is not None:
            self.adversary.hear(message)  # type: ignore[arg-type]
        for garbage in self.garbage_senders:
            garbage.hear(message)  # type: ignore[arg-type]
        for to in self.nodes[sender].peers():
            self.send(sender, to, message)  # type: ignore[arg-type]

    def gossip(self, sender: MemberId, recipients: Iterable[MemberId], encoded: bytes) -> None:
        """An event to some."""
        if self.adversary is not None:
            self.adversary.hear_event(encoded)  # type: ignore[attr-defined]
        for garbage in self.garbage_senders if sender not in self.garbage else ():
            garbage.hear_event(encoded)
        for to in recipients:
            node = self.nodes.get(to)
            if node is None or not self.gets_through(sender, to):
                continue
            self.at(self.delay_ms(sender), lambda node=node: node.take_event(sender, encoded))

    def gets_through(self, sender: MemberId, to: MemberId) -> bool:
        """Whether what is said now arrives."""
        if self.healed:
            return True
        return self.side.get(sender, 0) == self.side.get(to, 0) and self.random.random() >= self.plan.loss

    def greet(self, came: LedgerNode) -> None:
        """A host is back: whoever is connected to it offers what waits there."""
        for node in self.nodes.values():
            if node is not came and node.engine is not None and came.own in node.peers():
                node.offer(came.own)

    def reachable(self, peer: MemberId, asker: LedgerNode) -> LedgerNode | None:
        """A correct host that answers now."""
        node = self.nodes.get(peer)
        if node is None or node.engine is None or not self.gets_through(peer, asker.own):
            return None
        return node if asker.own in node.peers() else None

    def blocks_from(self, peer: MemberId, asker: LedgerNode, request: GetBlocks) -> bytes | None:
        """What a peer answers to who catches up; a traitor knows what the foremost of the correct hosts does."""
        if peer in self.traitors or peer in self.liars:
            told = [node for node in self.nodes.values() if node.engine is not None]
            if not told or not self.gets_through(peer, asker.own):
                return None
            truth = serve_blocks(max(told, key=lambda node: node.head.height).log, request, ANSWER_TARGET_BYTES)
            return lie(self, peer, truth, request)
        node = self.reachable(peer, asker)
        return None if node is None else encode(serve_blocks(node.log, request, ANSWER_TARGET_BYTES))

    def events_from(self, peer: MemberId, asker: LedgerNode, leaves: Sequence[Digest]) -> list[bytes]:
        """Events by leaf hash; traitors show what they proposed."""
        if peer in self.traitors:
            return [self.held_events[leaf] for leaf in leaves if leaf in self.held_events]
        node = self.reachable(peer, asker)
        return [] if node is None else list(node.proposals.held_events(leaves))

    def distrusts(self, peer: MemberId, refusal: Rejected) -> None:
        """A host refused an answer."""
        if peer not in self.traitors | self.liars:
            raise Distrusted(f"seed {self.seed}: an honest answer is refused: {refusal}")
        self.distrusted[refusal.reason.value] += 1

    # At the end

    def check_end(self, patience_ms: int = 30 * DELAY_MS) -> None:
        """Asked of a run that healed: nothing admissible has waited longer than ``patience_ms``."""
        since_ms = self.plan.end_ms - patience_ms
        for node in self.nodes.values():
            if node.member is not None and (owed := node.unrecorded(self.history[-1].state, since_ms)):
                raise Withheld(f"seed {self.seed}: {node.name} keeps evidence that is not on the log: {owed}")
        overdue = self.voices.overdue(since_ms)
        if overdue:
            kinds = sorted(said.event.entry.kind.value for said in overdue)
            raise Withheld(f"seed {self.seed}: {len(overdue)} events wait: {kinds}")
