"""What is asked of a run with real ledgers."""

from collections import Counter
from dataclasses import dataclass, field

from simulation.ledgers import LedgerSimulation
from simulation.outcomes import Outcome, longest_wait_ms
from simulation.plan import LedgerPlan


@dataclass(frozen=True, slots=True)
class LedgerOutcome(Outcome):
    """What is asked of one with real ledgers: of the members of its newest epoch, from the time it began."""

    epoch: int
    heights: tuple[int, ...]
    """Of members' logs."""
    kinds: Counter[str]
    """Events on the log, by kind."""
    carried: int = 0
    spoiled: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    refused_events: Counter[str] = field(default_factory=Counter)
    distrusted: Counter[str] = field(default_factory=Counter)
    replayed: Counter[str] = field(default_factory=Counter)
    """As in ``LedgerSimulation``."""


def ledger_outcome(seed: int, plan: LedgerPlan) -> LedgerOutcome:
    """One run with real ledgers, judged; events may wait for ever only if traitors may stop the log."""
    simulation = LedgerSimulation(seed, plan).run()
    committee = simulation.committee_of(simulation.epoch)
    nodes = [node for node in simulation.correct if node.own in simulation.addresses(committee)]
    began_ms = max(plan.heal_ms, simulation.epoch_began_ms, plan.away_ms)
    if plan.heal_ms < plan.end_ms:
        simulation.check_end()
    return LedgerOutcome(
        seed,
        longest_wait_ms(simulation, nodes, began_ms),
        sum(not any(at > began_ms for at in node.finalized_at) for node in nodes),
        simulation.epoch,
        tuple(node.head.height for node in nodes),
        Counter(said.event.entry.kind.value for said in simulation.voices.settled),
        simulation.carried,
        simulation.spoiled,
        simulation.refused,
        simulation.refused_events,
        simulation.distrusted,
        simulation.replayed,
    )
