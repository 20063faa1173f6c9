"""Filling up the log below the snapshot it began at, so that this node can prove what stands there.

Ledger blocks come from peers as for catching up, from the first one on, and nothing in them is believed: headers chain
from the genesis to a certified one and at last to the snapshot's own, bodies hash to their headers, entries to their
bodies, portions to their entries, and the tree to every header's root. What is not done again is what the quorum did
that certified the snapshot: verifying the authors' signatures and judging the events by the rules. ``countersign log
fsck`` does both, later, on the stopped node.

What one certificate makes final is one atomic write that moves ``Store.history`` on, so a node that is stopped goes on
where it was; nearly always that is one answer. Where it takes several, the first answer's certificate is kept until it
is reached: with later ones alone, whose first part is no longer known, the log could not be served to others. Peers
share the time (``turns.py``) that their answers and the checking of these take, and are not asked faster than the pace
given.
"""

import logging
from dataclasses import dataclass

import trio

from consensus.block import Body, Header, check_body
from consensus.certificate import decode_certificate
from consensus.codec import decode, encode
from consensus.epochs import verify_header
from consensus.event import CheckedEvent, Kind, check_unsigned, unpack
from consensus.identifiers import Digest, Height, MemberId
from consensus.merkle import Frontier, Node
from consensus.rejection import InvariantBroken, Reason, Rejected, Unavailable
from node.chunk import MAX_PENDING_BYTES, decode_chain
from node.epoch_end import Certified
from node.ledger import MAX_BODY_BYTES, Ledger, entry_writes
from node.messages import MAX_ANSWER_BYTES, BlockRecord, Blocks, GetBlocks, in_turns
from node.network import Network
from node.pace import Pace
from node.store_layout import BlockWrite, History
from node.turns import Turns

log = logging.getLogger("countersign.history")

REQUEST_SECONDS = 10.0
ASKED_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Held:
    """The next ledger blocks, from several answers, short of the certified one."""

    blocks: tuple[BlockWrite, ...] = ()
    size_bytes: int = 0
    promised: tuple[Header, bytes] | None = None
    """That one, with its certificate as kept on disk: the nearest that any of the answers led up to."""


class HistoryFill:
    """Fetches what a log lacks below its snapshot."""

    def __init__(self, ledger: Ledger, network: Network, pace: Pace) -> None:
        self._ledger = ledger
        self._network = network
        self._pace = pace
        self._turns = Turns()
        self._held = _Held()

    async def run(self) -> None:
        """Until nothing is missing.

        Raises:
            InvariantBroken: the disk failed.
        """
        while (history := self._ledger.store.history()) is not None:
            peers = self._turns.order(sorted(self._network.connected))
            failed = not peers
            if peers:
                try:
                    with self._turns.of(peers[0]):  # with the checking, or small answers would cost others the time
                        await self._fill_from(peers[0], history)
                except (Rejected, Unavailable) as error:
                    log.info("ledger blocks from %d of %s: %s", history.next_height, peers[0].hex()[:16], error)
                    self._turns.disappointed(peers[0])
                    failed = True
            if failed:
                await trio.sleep(ASKED_AGAIN_SECONDS)
        log.info("the log is whole")

    async def _fill_from(self, peer: MemberId, history: History) -> None:
        """Take one answer of a peer.

        Raises:
            Rejected: the first thing wrong with it. Unavailable: no answer.
            InvariantBroken: the disk does not hold what was written; the log is another than pinned.
        """
        with self._turns.waiting(peer, self._network.connected, REQUEST_SECONDS) as seconds:
            encoded = await self._network.request(peer, encode(GetBlocks(self._next_height(history))), seconds)
        await self._pace.spend(len(encoded))
        answer = decode(encoded, Blocks, MAX_ANSWER_BYTES)
        headers, certified = await trio.to_thread.run_sync(self._checked_chain, answer, history)
        held, promised = list(self._held.blocks), self._held.promised
        certified_count = 0
        frontier = Frontier.from_bytes(held[-1].frontier) if held else self._ledger.filled_frontier(history)
        for number, (header, record) in enumerate(zip(headers, answer.blocks, strict=False)):
            if header.height > history.base_height:
                break
            if frontier.size == self._ledger.epochs.of(header.epoch).end_size:
                # A carrier: certified, empty, well-formed, and no part of the log. The next epoch does not follow it.
                raise Rejected(Reason.WRONG_EPOCH, f"ledger block {header.height} after the end of its epoch")
            body, events = await self._checked_events(header, record)
            self._ledger.hold_to_pin(frontier, body.leaf_hashes)
            frontier, interior = frontier.append_with_nodes(body.leaf_hashes)
            if (frontier.size, frontier.root) != (header.log_size, header.log_root):
                raise Rejected(Reason.LOG_ROOT_MISMATCH, f"ledger block {header.height}: log root or size")
            last = number == len(answer.blocks) - 1 and header.height < history.base_height
            kept = certified.encode() if last and (not answer.onward or _ends_epoch(events)) else None
            if promised is not None and header.digest == promised[0].digest and kept is None:
                kept, promised = promised[1], None
            held.append(_block_write(header, record, body, events, frontier, interior, kept))
            if kept is not None or header.height == history.base_height:
                certified_count = len(held)
            await trio.lowlevel.checkpoint()  # 4,096 ledger blocks without events would hold votes up
        if self._ledger.store.history() != history:
            raise InvariantBroken("the log is filled up by two at once")
        self._ledger.store.fill(held[:certified_count])
        left = tuple(held[certified_count:])
        if left and (promised is None or headers[-1].height < promised[0].height):
            promised = headers[-1], Certified((), certified.certificate).encode()
        size_bytes = len(encoded) + (0 if certified_count else self._held.size_bytes)
        self._held = _Held(left, size_bytes, promised) if left else _Held()
        if self._held.size_bytes > MAX_PENDING_BYTES:
            self._held = _Held()
            raise Rejected(Reason.OVERSIZED, f"{size_bytes} bytes of ledger blocks under one certificate")

    def _next_height(self, history: History) -> int:
        return history.next_height + len(self._held.blocks)

    def _checked_chain(self, answer: Blocks, history: History) -> tuple[list[Header], Certified]:
        """The headers, certified and one after the other from what is here already.

        Raises:
            Rejected: they are not, or there are none.
        """
        ledger = self._ledger
        height = self._next_height(history)
        if not answer.blocks:
            raise Rejected(Reason.NOT_FOUND, f"no ledger block {height}")
        headers = decode_chain(answer, height, ledger.genesis.chain_id)
        held, parent = self._held.blocks, Digest(headers[0].parent)
        if parent != held[-1].digest if held else ledger.store.height_of_block(parent) != height - 1:
            raise Rejected(Reason.BAD_BLOCK, f"ledger block {height} does not follow our log")
        verify_header(ledger.epochs, encode(headers[-1]), answer.certificate)
        base = ledger.header_at(history.base_height)
        for number, header in enumerate(headers):
            # What leads on from the end of an epoch is no part of the log, and may be as high as the log's next.
            is_carrier = number >= len(answer.blocks) and header.epoch != base.epoch
            if header.height == base.height and header.digest != base.digest and not is_carrier:
                raise Rejected(Reason.BAD_BLOCK, f"another ledger block {header.height} than the log began at")
        return headers, Certified(answer.onward, decode_certificate(answer.certificate))

    async def _checked_events(self, header: Header, record: BlockRecord) -> tuple[Body, list[CheckedEvent]]:
        body = decode(record.body, Body, MAX_BODY_BYTES)
        check_body(header, body)
        committee = self._ledger.epochs.of(header.epoch).committee
        events: list[CheckedEvent] = []
        for turn in in_turns(record.events):
            for parts in map(unpack, turn):
                events.append(check_unsigned(parts.entry, parts.portions, committee))
            await trio.lowlevel.checkpoint()
        if tuple(event.leaf_hash for event in events) != body.leaf_hashes:
            raise Rejected(Reason.BAD_BLOCK, f"events of ledger block {header.height} are not its body's")
        return body, events


def _ends_epoch(events: list[CheckedEvent]) -> bool:
    return bool(events) and events[-1].entry.kind is Kind.MEMBERSHIP


def _block_write(
    header: Header,
    record: BlockRecord,
    body: Body,
    events: list[CheckedEvent],
    frontier: Frontier,
    interior: list[Node],
    certificate: bytes | None,
) -> BlockWrite:
    first_index = header.log_size - header.event_count
    leaves = ((0, first_index + offset, Digest(leaf)) for offset, leaf in enumerate(body.leaf_hashes))
    return BlockWrite(
        height=Height(header.height),
        digest=header.digest,
        header=record.header,
        body=record.body,
        certificate=certificate,
        votes=b"",
        entries=entry_writes(first_index, events),
        nodes=(*leaves, *interior),
        state_changes={},
        log_size=header.log_size,
        frontier=frontier.to_bytes(),
    )
