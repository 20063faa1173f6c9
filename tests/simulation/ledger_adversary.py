"""Traitors over real ledgers: they propose what no rule was applied to, and vote when they have left."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ledger_fixtures import digest as made_up
from msgspec.structs import replace
from simulation.adversary import Adversary

from consensus.block import Body, Header
from consensus.event import CheckedEvent, check_event, pack_parts
from consensus.identifiers import ZERO_DIGEST, Digest, MemberId, Role, View
from consensus.rejection import Rejected
from consensus.transition import LedgerState, build
from consensus.vote import Proposal, VoteKind, sign_proposal, sign_vote

if TYPE_CHECKING:
    from simulation.ledgers import LedgerSimulation

REMEMBERED = 40
PUSHED_MS = 60_000


class LedgerAdversary(Adversary):
    """All traitors at once."""

    simulation: "LedgerSimulation"

    def __init__(self, simulation: "LedgerSimulation") -> None:
        super().__init__(simulation)
        self.events: deque[bytes] = deque(maxlen=REMEMBERED)
        self.falsehood = simulation.random.random()
        """How often it proposes what breaks a rule."""
        self.moves += [self.vote_after_leaving] + [self.go_along] * simulation.random.randint(1, 3)

    def hear_event(self, encoded: bytes) -> None:
        """Overheard on its way."""
        if encoded not in self.events:
            self.events.append(encoded)

    # Ledger blocks

    def proposal(self, leader: MemberId) -> Proposal:
        simulation, chance = self.simulation, self.simulation.random
        parent = chance.choice(self._parents())
        view = max(self.view, self._view_of(parent) + 1)
        events = self._some_events()
        built = build(
            parent,
            events,
            view=view,
            leader=leader,
            timestamp_ms=simulation.clock.now_ms(),
            committee=self.committee,
            max_events=4,
            max_bytes=1 << 20,
        )
        header, body, listed = built.state.header, built.body, built.events
        if chance.random() < self.falsehood:
            header, body, listed = chance.choice(
                [self._unjudged, self._false_root, self._out_of_place, self._another_body, self._disowned]
            )(parent, header, body, listed)
        elif simulation.plan.pushed and chance.random() < simulation.plan.pushed:
            header = replace(header, timestamp_ms=header.timestamp_ms + PUSHED_MS)
            simulation.pushed.add(header.digest)
        sign = simulation.cryptography_of(self.committee.epoch).secrets(leader).identity.sign
        proposal = sign_proposal(header, body, sign)
        simulation.held_events.update(
            (event.leaf_hash, pack_parts(event.entry_bytes, event.portions_bytes)) for event in listed
        )
        refusal = simulation.judged(proposal, listed)
        if refusal is not None:
            simulation.spoiled[refusal.reason.value] += 1
        return proposal

    def _view_of(self, state: LedgerState) -> int:
        return state.header.view if state.header.epoch == self.committee.epoch else 0

    def _parents(self) -> list[LedgerState]:
        """The newest ledger blocks that one of this epoch may follow; carriers and terminal ones among them."""
        epoch = self.committee.epoch
        found = [
            state
            for state in self.simulation.states.values()
            if (state.header.epoch == epoch and state.header.view < self.view)
            or (state.header.epoch == epoch - 1 and state.is_terminal)
        ]
        return sorted(found, key=self._view_of)[-3:]

    def _some_events(self) -> list[CheckedEvent]:
        """Old and new ones; those that members of this epoch may not say are left out."""
        chance = self.simulation.random
        found: list[CheckedEvent] = []
        for encoded in chance.sample(list(self.events), min(len(self.events), chance.randint(0, 4))):
            try:
                found.append(check_event(encoded, self.committee))
            except Rejected:
                continue
        return found

    def _unjudged(
        self, parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent]
    ) -> tuple[Header, Body, Sequence[CheckedEvent]]:
        """Events on the log, or twice in it, or that the state refuses: none of them judged, the log's root right."""
        chance, voices = self.simulation.random, self.simulation.voices
        listed = [*self._some_events(), *events]
        owners = [member.name for member in self.committee.role_members(Role.DATA_SOURCE)]
        speaks = self.committee.epoch == self.simulation.epoch
        if voices.sources and speaks and chance.random() < 0.5:
            source, owner = chance.choice(voices.sources)
            strangers = [name for name in owners if name != owner]
            listed.append(voices.revocation(chance.choice(strangers or owners), source))
        if speaks and chance.random() < 0.2:
            listed.append(voices.revocation(chance.choice(owners), made_up("no source")))
        unique = list({event.leaf_hash: event for event in listed}.values())
        body = Body(tuple(event.leaf_hash for event in unique))
        frontier = parent.frontier.append(body.leaf_hashes)
        header = replace(
            header,
            body_root=body.root,
            event_count=len(unique),
            log_size=frontier.size,
            log_root=frontier.root,
            state_root=parent.state.root,
        )
        return header, body, unique

    def _false_root(
        self, parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent]
    ) -> tuple[Header, Body, Sequence[CheckedEvent]]:
        """Another log, or another state, than the events make."""
        false = self.simulation.random.choice(
            [{"state_root": made_up("state")}, {"log_root": made_up("log")}, {"log_size": header.log_size + 1}]
        )
        return replace(header, **false), body, events

    def _out_of_place(
        self, parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent]
    ) -> tuple[Header, Body, Sequence[CheckedEvent]]:
        """At another height, on another parent's view, or before its parent in time."""
        false = self.simulation.random.choice(
            [
                {"height": header.height + 1},
                {"parent_view": max(0, header.parent_view - 1)},
                {"timestamp_ms": max(0, parent.header.timestamp_ms - 1)},
                {"view": header.view + len(self.committee.voters)},
            ]
        )
        return replace(header, **false), body, events

    def _another_body(
        self, parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent]
    ) -> tuple[Header, Body, Sequence[CheckedEvent]]:
        """Not the one the header names."""
        return header, Body((*body.leaf_hashes, made_up("one more"))), events

    def _disowned(
        self, parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent]
    ) -> tuple[Header, Body, Sequence[CheckedEvent]]:
        """An event that nobody has, since nobody said it."""
        body = Body((made_up("said by nobody", header.view),))
        frontier = parent.frontier.append(body.leaf_hashes)
        root = {"log_size": frontier.size, "log_root": frontier.root, "state_root": parent.state.root}
        return replace(header, body_root=body.root, event_count=1, **root), body, ()

    # Votes

    def go_along(self) -> None:
        """Vote as correct members would, or nearly: without some help nothing becomes final against the others."""
        simulation, view = self.simulation, View(self.view)
        here = [
            digest
            for digest, header in simulation.headers.items()
            if header.view == view and header.epoch == self.committee.epoch
        ]
        if not here or simulation.random.random() < 0.3:
            self.tell(self._cast(VoteKind.NULLIFY, view, ZERO_DIGEST))
            return
        block = simulation.random.choice(here)
        self.tell(self._cast(VoteKind.NOTARIZE, view, block))
        self.tell(self._cast(VoteKind.FINALIZE, view, block))

    def vote_after_leaving(self) -> None:
        """A traitor that is no member any more votes as if it were, in this epoch and in its own."""
        simulation, chance = self.simulation, self.simulation.random
        now = self.committee
        members = {voter.id for voter in now.voters}
        for old in range(now.epoch) if chance.random() < 0.1 else ():
            committee = simulation.committee_of(old)
            gone = sorted({voter.id for voter in committee.voters} & simulation.traitors - members)
            for traitor in gone:
                sign = simulation.cryptography_of(old).secrets(traitor).identity.sign
                block = chance.choice(list(simulation.headers))
                for place in (committee, now):
                    view = View(max(1, self.view - chance.randrange(2)))
                    kind = chance.choice([VoteKind.NOTARIZE, VoteKind.NULLIFY])
                    about = ZERO_DIGEST if kind == VoteKind.NULLIFY else Digest(block)
                    self.tell([sign_vote(place, traitor, kind, view, about, share=b"", sign=sign)])
