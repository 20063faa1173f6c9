"""The history that a run with real ledgers keeps itself, and what it holds hosts against.

Checked beside what ``simulator`` checks:

- ``Inadmissible``: whatever is final passed ``check_event`` and ``apply`` again, under the members of its epoch, and is
  on the log once. Whatever a correct leader builds passes them, too.
- ``Fork``: as in ``simulator``, across epochs. A carrier is no ledger block of the log: its certificate is its terminal
  ledger block's.
- ``Diverged``: every host's log and state have the roots its headers say, at every height.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from consensus_fixtures import make_genesis
from simulation.cryptography import Keys
from simulation.failures import Diverged, Fork, Inadmissible, Unwanted
from simulation.plan import LedgerPlan
from simulation.simulator import Simulation

from consensus import transition
from consensus.admission import admit
from consensus.block import Header, decode_header
from consensus.engine import Engine
from consensus.event import CheckedEvent, check_event, pack_parts
from consensus.identifiers import VOTING_ROLES, Digest
from consensus.membership import Committee, Genesis, Parameters
from consensus.participant import MemberSecrets
from consensus.rejection import Reason, Rejected
from consensus.state import StateView
from consensus.transition import LedgerState, genesis_state
from consensus.vote import Proposal

if TYPE_CHECKING:
    from simulation.ledger_host import LedgerNode

NEVER_CENSORED_MS = 86_400_000


class SimulatedClock:
    """The clock of every host: Unix time begins with the genesis."""

    def __init__(self, simulation: "JudgedSimulation") -> None:
        self._simulation = simulation

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return self._simulation.genesis_file.created_ms + self._simulation.now_ms

    def monotonic_ms(self) -> int:
        """Milliseconds since the run began."""
        return self._simulation.now_ms


@lru_cache(maxsize=16)
def founded(plan: LedgerPlan) -> tuple[Genesis, dict[str, MemberSecrets]]:
    """The genesis of a plan."""
    roles = [role.value for role in VOTING_ROLES]
    return make_genesis(
        dict(zip(roles, plan.counts, strict=True)),
        certificate_scheme=plan.scheme,
        thresholds=None if plan.thresholds is None else dict(zip(roles, plan.thresholds, strict=True)),
        parameters=Parameters(
            max_block_events=6,
            heartbeat_ms=plan.timing.heartbeat_ms,
            censorship_ms=plan.censorship_ms or NEVER_CENSORED_MS,
        ),
    )


class JudgedSimulation(Simulation):
    """A run whose every ledger block is judged apart from its hosts."""

    plan: LedgerPlan

    def __init__(self, seed: int, plan: LedgerPlan, engine: type[Engine]) -> None:
        self.genesis_file, secrets = founded(plan)
        self.clock = SimulatedClock(self)
        keys = Keys(self.genesis_file, secrets)
        self.epochs: list[Keys] = [keys]
        """How each epoch signs, up to the one whose membership event was written last."""
        self.epoch = 0
        """The newest one that has begun on the log, at ``epoch_began_ms``."""
        self.epoch_began_ms = 0
        start = genesis_state(self.genesis_file.chain_id, self.genesis_file.created_ms)
        self.states: dict[Digest, LedgerState] = {start.digest: start}
        """After every admissible ledger block that was ever built."""
        self.history: list[LedgerState] = [start]
        self.on_log: dict[Digest, int] = {}
        """Height at which each event is final."""
        super().__init__(seed, plan, engine, cryptography=keys, voters=keys.committee)

    def first_header(self) -> Header:
        return self.history[0].header

    def committee_of(self, epoch: int) -> Committee:
        return self.epochs[epoch].committee

    def cryptography_of(self, epoch: int) -> Keys:
        return self.epochs[epoch]

    def epoch_began(self) -> None:
        """The log has gone on to the next epoch."""

    def judged(self, proposal: Proposal, events: Sequence[CheckedEvent]) -> Rejected | None:
        """Why a new proposal must never be final, None where it may; the header is known from now on."""
        header = decode_header(proposal.header, self.committee.chain_id)
        digest = proposal.digest
        self.headers[digest] = header
        self.proposals[digest] = proposal
        parent = self.states.get(Digest(header.parent))
        try:
            if parent is None:
                raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} follows one that breaks a rule")
            built = transition.apply(parent, header, proposal.body, events, self.committee_of(header.epoch))
        except Rejected as refusal:
            self.invalid.add(digest)
            return refusal
        self.states[digest] = built.state
        return None

    def built_by_correct(self, proposal: Proposal, events: Sequence[CheckedEvent]) -> None:
        """A correct leader proposes."""
        refusal = self.judged(proposal, events)
        if refusal is not None:
            raise Inadmissible(f"seed {self.seed}: a correct leader built what breaks a rule: {refusal}")

    def certifiable(self, digest: Digest) -> None:
        """A carrier stands for the ledger block it carries."""
        while (state := self.states.get(digest)) is not None and state.ends_epoch and not state.is_terminal:
            digest = Digest(state.header.parent)
        super().certifiable(digest)

    def finalized(self, header: Header, events: Sequence[CheckedEvent]) -> None:
        """A host appends a ledger block: the first one's is judged again from its bytes."""
        if header.height < len(self.history):
            if self.history[header.height].digest != header.digest:
                raise Fork(f"seed {self.seed}: a ledger forks at height {header.height}")
            return
        if self.final.setdefault(header.height, header.digest) != header.digest:
            raise Fork(f"seed {self.seed}: a ledger forks at height {header.height}")
        before = self.history[-1]
        if header.parent != before.digest:
            raise Fork(f"seed {self.seed}: a ledger forks at height {header.height - 1}")
        self.check_wanted(header)
        committee = self.committee_of(header.epoch)
        try:
            again = [check_event(pack_parts(event.entry_bytes, event.portions_bytes), committee) for event in events]
            built = transition.apply(before, header, self.proposals[header.digest].body, again, committee)
        except Rejected as refusal:
            raise Inadmissible(f"seed {self.seed}: final at height {header.height}: {refusal}") from refusal
        for event in again:
            if self.on_log.setdefault(event.id, header.height) != header.height:
                raise Inadmissible(f"seed {self.seed}: event {event.id.hex()} is on the log twice")
        self.history.append(built.state)
        if built.state.is_terminal and (newest := transition.epoch_head(built.state.state).epoch) > self.epoch:
            self.epoch = newest
            self.epoch_began_ms = self.now_ms
            self.epoch_began()

    def check_wanted(self, header: Header) -> None:
        """No timestamp that every correct voter refuses."""
        if header.digest in self.pushed:
            raise Unwanted(f"seed {self.seed}: a pushed timestamp is final at height {header.height}")

    def check_host(self, node: "LedgerNode") -> None:
        """A host's log and state are what its headers say."""
        held, head = node.log.final, node.disk.head()
        expected = self.history[held.header.height]
        here = (held.digest, held.frontier.root, held.state.root)
        if here != (expected.digest, expected.header.log_root, expected.header.state_root):
            raise Diverged(f"seed {self.seed}: {node.name} holds another log or state at {held.header.height}")
        if head is None or (head.digest, head.log_size) != (held.digest, held.frontier.size):
            raise Diverged(f"seed {self.seed}: {node.name} has another head on disk than in memory")

    def why_inadmissible(self, event: CheckedEvent) -> Rejected | None:
        """Why the newest state would refuse an event now."""
        final = self.history[-1]
        committee = self.committee_of(self.epoch)
        try:
            again = check_event(pack_parts(event.entry_bytes, event.portions_bytes), committee)
            admit(StateView(final.state), again, max(final.header.timestamp_ms, self.clock.now_ms()), committee)
        except Rejected as refusal:
            return refusal
        return None
