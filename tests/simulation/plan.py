"""What a simulated run is made of."""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from consensus.engine import Timing
from consensus.identifiers import VOTING_ROLES, Role
from consensus.membership import (
    Committee,
    Genesis,
    Member,
    Parameters,
    RoleThreshold,
    committee,
    default_threshold,
)

DELAY_MS = 100
"""The longest a message takes once the network has healed: Δ."""


TIMING = Timing(timeout_ms=4 * DELAY_MS, max_timeout_ms=32 * DELAY_MS, heartbeat_ms=30 * DELAY_MS)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of. Counts follow the voting roles; traitors and silent ones come last in each."""

    counts: tuple[int, int, int] = (4, 4, 4)
    thresholds: tuple[int, int, int] | None = None
    traitors: tuple[int, int, int] = (0, 0, 0)
    silent: tuple[int, int, int] = (0, 0, 0)
    selective: tuple[int, int, int] = (0, 0, 0)
    """Correct but heard only by every second member."""
    slow: tuple[int, int, int] = (0, 0, 0)
    """Correct, with every message ten times as long on its way."""
    forgers: tuple[int, int, int] = (0, 0, 0)
    """Correct but for the certificate shares on their finalize votes, which are not theirs (real cryptography only)."""
    garbage: tuple[int, int, int] = (0, 0, 0)
    """Send spoiled messages, those of other epochs and chains, and signed votes for what there is not."""
    censors: tuple[int, int, int] = (0, 0, 0)
    """Leave an urgent event out of their ledger blocks and vote for none that holds it."""
    forgetful: tuple[int, int, int] = (0, 0, 0)
    """Correct but for their journal: after each crash they vote again without it, whatever they hear of their votes."""
    unlucky: tuple[int, int, int] = (0, 0, 0)
    """Correct; some crashes take their ledger, and leave their journal."""
    urgent_ms: int = 0
    """When an urgent event reaches everybody; 0 for none."""
    censorship_ms: int = 0
    """How long a branch may leave it out before correct voters refuse their vote; 0 for ever."""
    pushed: float = 0.0
    """Chance that a traitor's proposal bears a timestamp too far ahead for every correct voter."""
    steady_ms: int = 0
    """How long every message takes, neither more nor less; 0 for delays by chance."""
    loss: float = 0.0
    duplication: float = 0.0
    crash: float = 0.0
    """Chance of a crash at each step of a host before healing."""
    partition_every_ms: int = 0
    heal_ms: int = 0
    end_ms: int = 6_000
    idle: bool = False
    """Work comes once a second instead of always."""
    timing: Timing = TIMING


P = TypeVar("P", bound=Plan)


def turned(plan: P, last: Role) -> P:
    """The same with the roles turned round: ``last`` has what the last role has in ``plan``."""
    by = VOTING_ROLES.index(last) + 1
    held: dict[str, Any] = {field.name: getattr(plan, field.name) for field in fields(plan)}
    per_role = {name: it for name, it in held.items() if isinstance(it, tuple) and [*map(type, it)] == [int] * 3}
    return replace(plan, **{name: it[-by:] + it[:-by] for name, it in per_role.items()})


def named_committee(plan: Plan) -> Committee:
    """Voters with unusable keys: enough where signatures are names."""
    thresholds = plan.thresholds or tuple(default_threshold(count) for count in plan.counts)
    members = tuple(
        Member(
            name=f"{role.value}-{number}",
            role=role,
            scheme=1,
            identity_key=hashlib.sha256(f"{role.value}-{number}".encode()).digest(),
            transport_key=bytes(32),
            log_key=b"",
            bls_key=b"",
            bls_possession=b"",
        )
        for role, count in zip(VOTING_ROLES, plan.counts, strict=True)
        for number in range(1, count + 1)
    )
    return committee(
        Genesis(
            version=1,
            name="simulation.example/log",
            nonce=bytes(32),
            created_ms=0,
            certificate_scheme="ed25519",
            members=members,
            thresholds=tuple(
                RoleThreshold(role=role, threshold=t) for role, t in zip(VOTING_ROLES, thresholds, strict=True)
            ),
            groups=(),
            parameters=Parameters(),
        )
    )


@dataclass(frozen=True, slots=True)
class Change:
    """Who takes part from some time on. ``add`` is (name, role); ``rotate`` are names that get new keys."""

    at_ms: int
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()
    rotate: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LedgerPlan(Plan):
    """A run whose hosts hold real state and judge real events, under real keys."""

    counts: tuple[int, int, int] = (2, 1, 1)
    scheme: str = "ed25519"
    """Of certificates."""
    liars: tuple[int, int, int] = (0, 0, 0)
    """Correct but for what they answer to who catches up."""
    away: tuple[int, int, int] = (0, 0, 0)
    """Correct and switched on for the first time at ``away_ms``; they come before the liars."""
    away_ms: int = 0
    replayers: tuple[int, int, int] = (0, 0, 0)
    """Say nothing but true votes, certificates and proposals of epochs that have ended, to everybody."""
    event_every_ms: int = 150
    """How often some member says something, on average."""
    changes: tuple[Change, ...] = ()
    """The ends of epochs, in order."""
    last_dealers: tuple[str, ...] = ()
    """Two members of a role that fix its key in the ceremony of the next epoch if they can; the second deals last."""
    bad_dealers: tuple[str, ...] = ()
    """Members that deal somebody a useless value."""
    over_network: bool = False
    """Ceremonies of epochs to come are held over the simulated network, and not beside it."""
