"""(state, ledger block) -> state: the one function by which the log moves.

A ``LedgerState`` is immutable and shares structure with its parent, so every notarized branch has its own
at no cost; only finalized ones reach a disk. ``build`` makes a ledger block on a state, ``apply`` checks
one, both by the same steps: admit the events in order at the block's timestamp, append their leaves,
root the state.

Epochs: a ledger block whose last event is a ``membership`` event is *terminal*. Its descendants within the epoch carry
nothing: they exist only so that a finalization of one of them makes the terminal one final. The next epoch begins at
the terminal ledger block itself, whatever carriers there were: views count from 1 again, under the new members.

Time here is only monotonic. Whether a timestamp is close to a voter's own clock is a question for the
voter when it votes, never for ``apply``: a replica that catches up a year later must agree.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consensus.admission import RETRYABLE, admit
from consensus.block import MAX_BLOCK_EVENTS, VERSION, Body, Header, check_body, genesis_header
from consensus.event import CheckedEvent, Kind
from consensus.identifiers import ChainId, Digest, MemberId, View
from consensus.membership import Committee
from consensus.merkle import Frontier, Node
from consensus.rejection import Reason, Rejected
from consensus.state import EPOCH_HEAD_KEY, EpochHead, StateView, read_record
from consensus.state_map import StateMap


@dataclass(frozen=True, slots=True)
class LedgerState:
    """The log after a ledger block: its header, the tree's frontier, the state."""

    header: Header
    digest: Digest
    frontier: Frontier
    state: StateMap

    @property
    def ends_epoch(self) -> bool:
        """Whether the next epoch's members are settled: this ledger block is terminal, or a carrier after it."""
        return epoch_head(self.state).epoch > self.header.epoch

    @property
    def is_terminal(self) -> bool:
        """Whether this ledger block settled them itself: the next epoch begins at it."""
        return self.ends_epoch and self.header.event_count > 0


@dataclass(frozen=True, slots=True)
class Built:
    """A ledger block on its parent.

    ``changes`` are the state's, ``nodes`` the complete tree nodes it adds as (level, index, hash), leaves at
    level 0. ``refused`` pairs each left-out candidate with why.
    """

    state: LedgerState
    body: Body
    events: tuple[CheckedEvent, ...]
    changes: dict[bytes, bytes]
    nodes: tuple[Node, ...]
    refused: tuple[tuple[CheckedEvent, Rejected], ...]


def epoch_head(state: StateMap) -> EpochHead:
    """The newest epoch that a state knows of; epoch 0, of the genesis, where there was no change."""
    value = state.get(EPOCH_HEAD_KEY)
    return EpochHead(0, bytes(32), bytes(32), 0) if value is None else read_record(value, EpochHead)


def genesis_state(chain_id: ChainId, created_ms: int) -> LedgerState:
    """The empty log every chain starts from."""
    frontier, state = Frontier(), StateMap()
    header = genesis_header(chain_id, created_ms, Digest(frontier.root), Digest(state.root))
    return LedgerState(header, header.digest, frontier, state)


def build(
    parent: LedgerState,
    candidates: Iterable[CheckedEvent],
    *,
    view: int,
    leader: MemberId,
    timestamp_ms: int,
    committee: Committee,
    max_events: int,
    max_bytes: int,
) -> Built:
    """The ledger block a leader proposes: candidates in order, those not admissible left out and named.

    The timestamp is raised to the parent's if it is behind it. Nothing follows a membership event.

    Raises:
        Rejected: ``WRONG_EPOCH``: these members make no ledger block on that parent.
    """
    timestamp_ms = max(timestamp_ms, parent.header.timestamp_ms)
    admitted: list[CheckedEvent] = []
    refused: list[tuple[CheckedEvent, Rejected]] = []
    changes = StateView(parent.state)
    size_bytes, most_events = 0, min(max_events, MAX_BLOCK_EVENTS)
    parent_view = _parent_view(parent, committee)
    for event in candidates if takes_events(parent, committee) else ():
        event_bytes = len(event.entry_bytes) + len(event.portions_bytes)
        if event_bytes > max_bytes:
            continue  # none has room for it, and what waits behind it has
        if len(admitted) >= most_events or size_bytes + event_bytes > max_bytes:
            break
        try:
            admit(changes, event, timestamp_ms, committee)
        except Rejected as error:
            refused.append((event, error))
            continue
        admitted.append(event)
        size_bytes += event_bytes
        if event.entry.kind is Kind.MEMBERSHIP:
            break
    body = Body(tuple(event.leaf_hash for event in admitted))
    frontier, nodes = parent.frontier.append_with_nodes(body.leaf_hashes)
    changed = changes.changes()
    state = parent.state.set_many(changed)
    header = Header(
        version=VERSION,
        chain_id=parent.header.chain_id,
        epoch=committee.epoch,
        height=parent.header.height + 1,
        view=view,
        leader=leader,
        parent=parent.digest,
        parent_view=parent_view,
        timestamp_ms=timestamp_ms,
        body_root=body.root,
        event_count=len(admitted),
        log_size=frontier.size,
        log_root=frontier.root,
        state_root=state.root,
    )
    after = LedgerState(header, header.digest, frontier, state)
    return Built(after, body, tuple(admitted), changed, _tree_nodes(parent, body, nodes), tuple(refused))


def apply(
    parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent], committee: Committee
) -> Built:
    """Check a ledger block on its parent and return the state after it.

    ``events`` are the body's, in order, each already through ``check_event``.

    Raises:
        Rejected: ``BAD_BLOCK``, ``BAD_TIMESTAMP``, ``LOG_ROOT_MISMATCH``, ``STATE_ROOT_MISMATCH``, or the
            rule an event breaks.
    """
    check_body(header, body)
    _check_place(parent, header, committee)
    if tuple(event.leaf_hash for event in events) != body.leaf_hashes:
        raise Rejected(Reason.BAD_BLOCK, f"events of ledger block {header.height} are not its body's")
    if events and not takes_events(parent, committee):
        raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} has events after its epoch's last")
    if Kind.MEMBERSHIP in [event.entry.kind for event in events[:-1]]:
        raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} has events after a membership event")
    changes = StateView(parent.state)
    for event in events:
        admit(changes, event, header.timestamp_ms, committee)
    frontier, nodes = parent.frontier.append_with_nodes(body.leaf_hashes)
    if (header.log_size, header.log_root) != (frontier.size, frontier.root):
        raise Rejected(Reason.LOG_ROOT_MISMATCH, f"ledger block {header.height}: log root or size")
    changed = changes.changes()
    state = parent.state.set_many(changed)
    if header.state_root != state.root:
        raise Rejected(Reason.STATE_ROOT_MISMATCH, f"ledger block {header.height}: state root")
    after = LedgerState(header, header.digest, frontier, state)
    return Built(after, body, tuple(events), changed, _tree_nodes(parent, body, nodes), ())


def is_final(refusal: Rejected) -> bool:
    """Whether an event refused for this reason can never be admitted later."""
    return refusal.reason not in RETRYABLE


def takes_events(parent: LedgerState, committee: Committee) -> bool:
    """Whether a child of ``parent`` made by ``committee`` may have events: not if it is a carrier."""
    return not (parent.ends_epoch and committee.epoch == parent.header.epoch)


def _tree_nodes(parent: LedgerState, body: Body, interior: Sequence[Node]) -> tuple[Node, ...]:
    first = parent.frontier.size
    leaves = ((0, first + offset, Digest(leaf)) for offset, leaf in enumerate(body.leaf_hashes))
    return (*leaves, *interior)


def _check_place(parent: LedgerState, header: Header, committee: Committee) -> None:
    before = parent.header
    if header.chain_id != before.chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"header of chain {header.chain_id.hex()}")
    if header.epoch != committee.epoch:
        raise Rejected(Reason.WRONG_EPOCH, f"epoch {header.epoch}, these are the members of {committee.epoch}")
    parent_view = _parent_view(parent, committee)
    if (header.parent, header.parent_view, header.height) != (parent.digest, parent_view, before.height + 1):
        raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} does not follow its parent")
    if header.view <= parent_view:
        raise Rejected(Reason.BAD_BLOCK, f"view {header.view} is not after its parent's {parent_view}")
    if header.leader != committee.leader(View(header.view)).id:
        raise Rejected(Reason.BAD_BLOCK, f"ledger block of view {header.view} by another than its leader")
    if header.timestamp_ms < before.timestamp_ms:
        raise Rejected(
            Reason.BAD_TIMESTAMP,
            f"timestamp {header.timestamp_ms} ms is before its parent's {before.timestamp_ms} ms",
        )


def _parent_view(parent: LedgerState, committee: Committee) -> int:
    """The view that the parent counts as, for a child made by ``committee``: 0 where its epoch begins there."""
    if committee.epoch == parent.header.epoch:
        return parent.header.view
    if committee.epoch != parent.header.epoch + 1 or not parent.is_terminal:
        raise Rejected(
            Reason.WRONG_EPOCH,
            f"members of epoch {committee.epoch} follow no ledger block {parent.header.height} of epoch"
            f" {parent.header.epoch}",
        )
    return 0
