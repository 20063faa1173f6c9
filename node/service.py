"""What the HTTP interface needs of a node: the types both sides meet in, and nothing else.

``api.py`` serves a ``Service``; ``replica.py`` is one. Everything here runs in the node's one trio thread, so
that what an answer reads is never half of two ledger blocks. Rules of admission stay in ``consensus``, the
owner's rules for countersigning in whoever implements ``GrantDesk``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from consensus.event import CheckedEvent
from consensus.identifiers import Digest, Role
from consensus.rejection import Reason, Rejected
from consensus.state import ChallengeRecord
from node.custody import CustodyDesk
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import BeaconShare


class EventState(StrEnum):
    """What became of an event, as this node knows it."""

    PENDING = "pending"
    FINAL = "final"
    REJECTED = "rejected"
    UNKNOWN = "unknown"


class GrantState(StrEnum):
    """How far a grant has come. ``GATHERING``: countersignatures are still missing."""

    GATHERING = "gathering"
    SUBMITTED = "submitted"
    FINAL = "final"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class EventStatus:
    """``index`` and ``height`` are set where it is final, ``reason`` and ``detail`` where it was rejected."""

    state: EventState
    index: int | None = None
    height: int | None = None
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FinalityFigures:
    """Milliseconds from an event's arrival at this node to its finality, over the last ``count`` events."""

    count: int = 0
    median_ms: float = 0.0
    p99_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class RoleReach:
    """Voting members of a role that this node hears, itself among them; below ``threshold`` nothing becomes final."""

    role: Role
    connected: int
    threshold: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node at one moment. Roots and digests are of the newest final ledger block.

    ``halted`` says why the node has stopped for good (a certified but invalid ledger block, a store that
    failed); it is empty while it runs. ``why_not_voting`` is empty while ``voting``. ``peers_connected`` are
    member names, out of ``peers_total`` others.
    """

    epoch: int
    view: int
    height: int
    log_size: int
    log_root: Digest
    state_root: Digest
    head: Digest
    timestamp_ms: int
    peers_connected: tuple[str, ...]
    peers_total: int
    mempool_events: int
    mempool_bytes: int
    voting: bool
    why_not_voting: str = ""
    halted: str = ""
    catching_up: bool = False
    log_missing: int = 0
    votes_sent: int = 0
    finality: FinalityFigures = FinalityFigures()
    evidence: int = 0
    """Members, epochs and offences for which the log holds evidence."""
    roles: tuple[RoleReach, ...] = ()
    clocks_ahead_ms: tuple[tuple[str, int], ...] = ()
    """By leader, how far the timestamp of its newest ledger block was ahead of this node's clock on arrival."""


@dataclass(frozen=True, slots=True)
class GrantRefusal:
    """Why one member will not countersign a grant."""

    member: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class GrantStatus:
    """A grant on its way. ``signers`` and ``missing`` are member names."""

    id: Digest
    campaign: Digest
    state: GrantState
    signers: tuple[str, ...]
    missing: tuple[str, ...]
    refusals: tuple[GrantRefusal, ...]


class GrantDesk(Protocol):
    """Where grants are asked for, countersigned and followed."""

    async def request(self, encoded_unsigned: bytes) -> Digest:
        """Sign an unsigned grant event by this operator's rules and start to gather countersignatures.

        Raises:
            Rejected: the rule it breaks.
        """

    def status(self, event_id: Digest) -> GrantStatus:
        """How far a grant has come.

        Raises:
            Rejected: ``NOT_FOUND``.
        """

    def list(self) -> tuple[GrantStatus, ...]:
        """Grants that are being gathered, wait for this member's hand, or are open."""

    async def sign(self, event_id: Digest) -> GrantStatus:
        """Countersign a grant by hand, with this member's key.

        Raises:
            Rejected: ``NOT_FOUND``, or the rule it breaks.
        """


class Beacons(Protocol):
    """Where shares of audits' beacons are given and beacons made."""

    def record(self, campaign: bytes, challenge: bytes) -> ChallengeRecord:
        """A final audit challenge.

        Raises:
            Rejected: ``NOT_FOUND``.
        """

    def share(self, record: ChallengeRecord) -> BeaconShare:
        """This member's share of its beacon.

        Raises:
            Unavailable: there is none.
        """

    async def beacon(self, record: ChallengeRecord) -> bytes:
        """Its beacon.

        Raises:
            Unavailable: too few members give their shares.
        """


class Service(Protocol):
    """A running node, as its HTTP interface sees it."""

    @property
    def name(self) -> str:
        """This member's name in the genesis."""

    @property
    def role(self) -> str:
        """This member's role."""

    @property
    def ledger(self) -> Ledger:
        """The finalized log and state."""

    @property
    def mempool(self) -> Mempool:
        """Events that wait."""

    @property
    def grants(self) -> GrantDesk:
        """The grant desk."""

    @property
    def beacons(self) -> Beacons:
        """Shares and beacons of audits."""

    @property
    def custody(self) -> CustodyDesk:
        """What this node keeps of campaigns' files."""

    def submit_each(self, encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
        """Check a few signed events, keep them for the next ledger block and pass them on; in order, where one is
        refused, the first rule it breaks or ``OVERLOADED`` when too much waits. An event already pending or final is
        taken again without effect.

        Raises:
            Unavailable: the node cannot take events now (it halted or is catching up).
        """

    def status_of(self, event_id: Digest) -> EventStatus:
        """What became of an event."""

    async def wait_final(self, event_id: Digest, timeout_seconds: float) -> EventStatus:
        """What became of an event, once it is final or rejected or the time is over. ``UNKNOWN`` waits too."""

    def snapshot(self) -> NodeStatus:
        """The node at this moment."""

    def checkpoint_note(self) -> bytes:
        """The C2SP signed note over the newest final log.

        Raises:
            Rejected: ``NOT_FOUND`` while the log has no signed checkpoint.
        """
