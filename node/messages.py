"""What nodes ask each other over the request protocol, and how events are packed for gossip.

Requests and answers are wire Structs (``consensus.codec``: canonical, bounded). Nothing in an answer is
believed: ledger blocks come with a certificate, events and proposals are checked like gossip.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

from msgspec import Meta

from consensus.block import MAX_BLOCK_EVENTS, MAX_HEADER_BYTES
from consensus.codec import decode
from consensus.epochs import EpochLinks
from consensus.event import EventSignature
from consensus.merkle import MAX_FRONTIER_BYTES
from consensus.portions import Bytes32, Natural, Text, Wire
from consensus.rejection import Reason, Rejected
from consensus.state_map import KEY_BYTES, PrefixProof
from consensus.vote import Vote

MAX_REQUEST_BYTES = 256 << 10
MAX_ANSWER_BYTES = 4 << 20
ANSWER_TARGET_BYTES = 2 << 20
"""What a server aims at in one answer; one ledger block may be more."""
MAX_ANSWER_BLOCKS = 4_096
MAX_ONWARD_HEADERS = 1_024

MAX_GOSSIP_EVENTS = 32
"""In one frame: a rule between members. What a node takes in one turn is its own choice, and never more."""

TURN_EVENTS = MAX_GOSSIP_EVENTS
TURN_BYTES = 64 << 10
"""How many events a node checks before it looks at votes again: no more than takes it a few milliseconds, tens of them
for steps that list thousands of examples."""


class GetBlocks(Wire, frozen=True, tag="get-blocks"):
    """Finalized ledger blocks from this height on, as many as fit, up to a certified one."""

    from_height: Annotated[int, Meta(ge=1, le=2**53 - 1)]


class BlockRecord(Wire, frozen=True):
    """A finalized ledger block with its signed events (wire form), in order."""

    header: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]
    body: bytes
    events: Annotated[tuple[bytes, ...], Meta(max_length=MAX_BLOCK_EVENTS)]

    @property
    def size_bytes(self) -> int:
        """What it counts in an answer."""
        return len(self.header) + len(self.body) + sum(len(event) + 8 for event in self.events)


class Blocks(Wire, frozen=True, tag="blocks"):
    """Consecutive ledger blocks; ``certificate`` is the last one's, empty with none.

    Where what one certificate makes final does not fit, ``onward`` has the headers from there to the certified one:
    they show that these ledger blocks are final, and the rest is asked for next.
    """

    blocks: Annotated[tuple[BlockRecord, ...], Meta(max_length=MAX_ANSWER_BLOCKS)]
    onward: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)], ...], Meta(max_length=MAX_ONWARD_HEADERS)
    ]
    certificate: bytes
    head_height: Natural


class GetEvents(Wire, frozen=True, tag="get-events"):
    """Events by leaf hash, pending or final."""

    leaf_hashes: Annotated[tuple[Bytes32, ...], Meta(min_length=1, max_length=MAX_BLOCK_EVENTS)]


class Events(Wire, frozen=True, tag="events"):
    """Those that were at hand and fitted."""

    events: Annotated[tuple[bytes, ...], Meta(max_length=MAX_BLOCK_EVENTS)]


class GetProposal(Wire, frozen=True, tag="get-proposal"):
    """A proposal by its ledger block's digest."""

    block: Bytes32


class FoundProposal(Wire, frozen=True, tag="proposal-found"):
    """The proposal's bytes, empty if unknown."""

    proposal: bytes


class GetSnapshot(Wire, frozen=True, tag="get-snapshot"):
    """A recent ledger block to begin from, for one who knows the epochs up to this one."""

    known_epoch: Natural


class Snapshot(Wire, frozen=True, tag="snapshot"):
    """A ledger block with its own certificate, the log's frontier after it, and links towards its epoch.

    Where not all links to its epoch fit, header, certificate and frontier are empty and the rest is asked for next; a
    node that has nothing to offer answers with all of them empty.
    """

    links: EpochLinks
    header: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]
    certificate: bytes
    frontier: Annotated[bytes, Meta(max_length=MAX_FRONTIER_BYTES)]


class GetState(Wire, frozen=True, tag="get-state"):
    """The state of this root from a key on."""

    state_root: Bytes32
    start: Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class StatePart(Wire, frozen=True, tag="state-part"):
    """Prefixes that cover the keys from the one asked for on without a gap, each with all its entries and a proof."""

    proofs: Annotated[
        tuple[tuple[Annotated[bytes, Meta(max_length=KEY_BYTES)], PrefixProof], ...],
        Meta(min_length=1, max_length=4_096),
    ]


class GetLastVote(Wire, frozen=True, tag="get-last-vote"):
    """The latest vote of a member that the receiver has seen: a voter with an empty journal asks for its own."""

    voter: Bytes32


class LastVote(Wire, frozen=True, tag="last-vote"):
    """That vote, None if none was seen. Its signature makes it proof, whoever passes it on."""

    vote: Vote | None


class AskCountersign(Wire, frozen=True, tag="ask-countersign"):
    """An unsigned grant and its portions, for the receiver to countersign by its owner's rules."""

    event: Annotated[bytes, Meta(max_length=MAX_REQUEST_BYTES - 1_024)]


class Countersigned(Wire, frozen=True, tag="countersigned"):
    """A countersignature; or, with none, the reason it is withheld (``waiting`` for one by hand)."""

    signature: EventSignature | None
    reason: Text
    detail: Text


class DeliverSignature(Wire, frozen=True, tag="deliver-signature"):
    """A countersignature given later, by hand, to the operator's node."""

    event_id: Bytes32
    signature: EventSignature


class GetBeaconShare(Wire, frozen=True, tag="get-beacon-share"):
    """The receiver's share of the beacon of a campaign's audit challenge, which must be final."""

    campaign: Bytes32
    challenge: Bytes32


class BeaconShare(Wire, frozen=True, tag="beacon-share"):
    """That share; ``voter`` is the id that the member had in the epoch in which the challenge became final."""

    voter: Bytes32
    share: Annotated[bytes, Meta(min_length=96, max_length=96)]


class Done(Wire, frozen=True, tag="done"):
    """Taken."""


Request = (
    GetBlocks
    | GetSnapshot
    | GetState
    | GetEvents
    | GetProposal
    | GetLastVote
    | AskCountersign
    | DeliverSignature
    | GetBeaconShare
)


def decode_request(encoded: bytes) -> Request:
    """A request.

    Raises:
        Rejected: as ``codec.decode``.
    """
    request: Request = decode(encoded, Request, MAX_REQUEST_BYTES)  # type: ignore[arg-type]
    return request


def pack_gossip(events: list[bytes]) -> bytes:
    """Signed events as one frame: each after its length as 4 bytes big-endian."""
    return b"".join(len(event).to_bytes(4, "big") + event for event in events)


def in_turns(events: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Signed events in order, as many at a time as a node handles before it looks at anything else: within
    ``TURN_EVENTS`` and, but for one large event, ``TURN_BYTES``.
    """
    turn: list[bytes] = []
    size_bytes = 0
    for event in events:
        if turn and (len(turn) == TURN_EVENTS or size_bytes + len(event) > TURN_BYTES):
            yield turn
            turn, size_bytes = [], 0
        turn.append(event)
        size_bytes += len(event) + 4
    if turn:
        yield turn


def unpack_gossip(frame: bytes) -> list[bytes]:
    """The signed events of a frame of ``pack_gossip``.

    Raises:
        Rejected: ``MALFORMED``; ``OVERSIZED`` for more than ``MAX_GOSSIP_EVENTS``: a frame of a million empty events
            would hold the node up for seconds.
    """
    events: list[bytes] = []
    position = 0
    while position < len(frame):
        if len(events) == MAX_GOSSIP_EVENTS:
            raise Rejected(Reason.OVERSIZED, f"more than {MAX_GOSSIP_EVENTS} events in a frame")
        end = position + 4 + int.from_bytes(frame[position : position + 4], "big")
        if len(frame) < position + 4 or end > len(frame):
            raise Rejected(Reason.MALFORMED, f"frame ends inside an event at byte {position}")
        events.append(frame[position + 4 : end])
        position = end
    return events
