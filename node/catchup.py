"""Catching up: ledger blocks from peers, none of them believed.

A peer answers with consecutive ledger blocks from the height asked for. Their headers must chain from our head to a
certified one, whose certificate is checked once for the chunk; then every event is checked and every block
applied exactly as in the live round (``chunk``). So whatever a peer sends, each answer that is taken brings the log
further.
Peers share the time (``turns.py``): a turn ends after ``TURN_SECONDS``, or with the first answer that is none, is
wrong, or brings little of what there is. So one that serves true ledger blocks, few at a time or late, sets no pace.
Only what one certificate makes final is asked for to its end from whoever began it, also where its answers are small or
late, for ``PROMISE_SECONDS``: a part is of no use. Whoever waits for a height waits for one turn of others at most, and
no peer's word for what height there is keeps us asking.

The same file serves: blocks, events, proposals, as others ask.
"""

import logging
from collections.abc import Callable, Iterator

import trio

from consensus.block import decode_header
from consensus.codec import decode, encode
from consensus.event import CheckedEvent
from consensus.identifiers import MemberId
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state import RETIRED_TABLE, RetiredMember, read_record
from node.chunk import MAX_RECORDS_BYTES, CertifiedInvalid, Chunk, Pending
from node.epoch_end import Certified
from node.ledger import Finalized, Ledger
from node.messages import (
    ANSWER_TARGET_BYTES,
    MAX_ANSWER_BLOCKS,
    MAX_ANSWER_BYTES,
    MAX_ONWARD_HEADERS,
    BlockRecord,
    Blocks,
    Events,
    GetBlocks,
)
from node.network import Network
from node.snapshot import Joining
from node.turns import Turns

log = logging.getLogger("countersign.catchup")

REQUEST_SECONDS = 5.0
"""How long an answer is waited for, or longer where all are late (``turns.py``)."""
TURN_SECONDS = 2.0
"""How long a peer is asked for more before it is another's turn."""
PROMISE_SECONDS = 300.0
"""How long a peer is asked for the rest of what one certificate makes final."""


def serve_blocks(
    ledger: Ledger, request: GetBlocks, target_bytes: int | None = None, last_height: int | None = None
) -> Blocks:
    """Finalized ledger blocks of one epoch from a height on, ending with a certified one where that fits.

    ``target_bytes`` is what the answer aims at, ``ANSWER_TARGET_BYTES`` by default. Of the log nothing is said beyond
    ``last_height``, the head by default.
    """
    target_bytes = ANSWER_TARGET_BYTES if target_bytes is None else target_bytes
    head_height = ledger.final.header.height if last_height is None else last_height
    records: list[BlockRecord] = []
    certified = epoch = 0
    size_bytes = 0
    height = request.from_height
    while height <= head_height and len(records) < MAX_ANSWER_BLOCKS:
        header, body, events = ledger.block(height)
        header_epoch = decode_header(header, ledger.genesis.chain_id).epoch
        if header_epoch != epoch and records:
            break  # whoever asks learns from the last one who certifies this
        epoch = header_epoch
        record = BlockRecord(header, body, tuple(events))
        if records and size_bytes + record.size_bytes > MAX_RECORDS_BYTES:
            break
        records.append(record)
        size_bytes += record.size_bytes
        if ledger.store.certificate(height) is not None:
            certified = len(records)
            if size_bytes >= target_bytes:
                break
        height += 1
    if certified:
        del records[certified:]
    last = request.from_height + len(records) - 1
    certified_height = ledger.store.certified_at_or_after(last)
    if not records or certified_height is None or certified_height > head_height:
        return Blocks((), (), b"", head_height)
    held = Certified.decode(ledger.store.certificate(certified_height) or b"")
    if certified_height - last + len(held.onward) > MAX_ONWARD_HEADERS:
        return Blocks((), (), b"", head_height)
    onward = [ledger.store.header(height) or b"" for height in range(last + 1, certified_height + 1)]
    return Blocks(tuple(records), (*onward, *held.onward), encode(held.certificate), head_height)


def serve_former(ledger: Ledger, member: MemberId, request: object) -> Blocks:
    """``serve_blocks`` for a member that left: those of its time, the last of which tells it so, and nothing else.

    Raises:
        Rejected: ``UNKNOWN_MEMBER`` for another request, or somebody who was no member of an earlier epoch.
        Unavailable: as ``Ledger.require_whole``.
    """
    retired = ledger.final.state.get(RETIRED_TABLE + member)
    if retired is None or not isinstance(request, GetBlocks):
        raise Rejected(Reason.UNKNOWN_MEMBER, f"{member.hex()} is no member of epoch {ledger.committee.epoch}")
    last_height = ledger.end_of(read_record(retired, RetiredMember).last_epoch)
    return serve_blocks(ledger, request, last_height=last_height)


def serve_events(held: Iterator[bytes]) -> Events:
    """Those of the events held that fit."""
    found: list[bytes] = []
    size_bytes = 0
    for encoded in held:
        size_bytes += len(encoded) + 8
        if found and size_bytes > ANSWER_TARGET_BYTES:
            break
        found.append(encoded)
    return Events(tuple(found))


class CatchUp:
    """Fetches and applies what the log lacks."""

    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        appended: Callable[[tuple[Finalized, ...]], None],
        joining: Joining | None = None,
    ) -> None:
        """``joining`` is how a log that has nothing yet begins at a snapshot; without it everything is replayed."""
        self._ledger = ledger
        self._joining = joining
        self._network = network
        self._appended = appended
        self._lock = trio.Lock()
        self._applying = trio.Lock()
        self._turns = Turns()
        self._claimed: dict[MemberId, int] = {}
        """The height of each peer's log, as it said last."""
        self._paused_for = ""
        self.blocks_fetched = 0
        self.events_fetched = 0

    @property
    def running(self) -> bool:
        """Whether ledger blocks are being fetched now."""
        return self._lock.locked()

    @property
    def undecided(self) -> bool:
        """Whether the log is to begin at a snapshot and has not begun, nor will it be replayed."""
        return self._joining is not None and self._ledger.final.header.height == 0 and not self._joining.given_up

    async def applied(self) -> None:
        """Until the answer of a peer that is being applied, if one is, is: what it brings need not be fetched as well.

        No server keeps others waiting by this for longer than one answer of its takes to be found wrong.
        """
        if self._applying.locked():
            async with self._applying:
                return

    async def reach(self, height: int) -> None:
        """Apply finalized ledger blocks until the log is at ``height`` at least.

        Raises:
            Unavailable: no peer could serve them now.
            CertifiedInvalid: a quorum broke the rules.
        """
        async with self._lock:
            await self._join()
        await self._reach(lambda: height)

    async def from_peer(self, peer: MemberId) -> bool:
        """Apply what a peer has beyond our log, from whoever serves it once the first turn is over; whether it grew.

        How far that is, is the peer's word, and taken while its own answers are ample: it may claim any height.

        Raises:
            CertifiedInvalid: a quorum broke the rules.
        """
        async with self._lock:
            try:
                joined = await self._join()
            except Unavailable as error:
                if str(error) != self._paused_for:  # every peer that comes finds the same
                    self._paused_for = str(error)
                    log.info("beginning at a snapshot pauses: %s", error)
                return False
            if not await self._from_peer(peer):
                return joined
        try:
            await self._reach(lambda: self._claimed[peer])
        except Unavailable as error:
            log.info("catching up pauses: %s", error)
        return True

    async def _join(self) -> bool:
        """Begin at a snapshot if that is wanted and nothing has begun; whether it was done."""
        if self._joining is None or self._ledger.final.header.height > 0:
            return False
        return await self._joining.run()

    async def _reach(self, goal: Callable[[], int]) -> None:
        """``reach``, a turn at a time: others whose goal is nearer, or who greet a peer, have theirs in between."""
        passed_over: set[MemberId] = set()
        while self._ledger.final.header.height < goal():
            async with self._lock:
                if self._ledger.final.header.height >= goal():
                    return
                peers = self._network.in_own_order(self._network.connected - passed_over)
                if not peers:
                    raise Unavailable(f"no peer serves ledger block {self._ledger.final.header.height + 1}")
                peer = self._turns.order(peers)[0]
                if await self._from_peer(peer):
                    passed_over.clear()  # who had nothing more then may have it now
                else:
                    passed_over.add(peer)

    async def _from_peer(self, peer: MemberId) -> bool:
        """A turn of a peer; whether the log grew by it: what the round appends meanwhile is not the peer's."""
        with self._turns.of(peer):
            return await self._turn(peer)

    async def _turn(self, peer: MemberId) -> bool:
        """Fetch and apply chunks from a peer, the next one on its way while one is applied; whether the log grew."""
        grew = False
        start_time = trio.current_time()
        pending = Pending()
        height = self._ledger.final.header.height + 1
        answer = await self._ask(peer, height)
        while answer is not None:
            epoch = self._ledger.committee.epoch
            following: list[Blocks | None] = []
            failure: Rejected | CertifiedInvalid | None = None
            height += len(answer.blocks)
            limit_seconds = PROMISE_SECONDS if answer.onward else TURN_SECONDS
            goes_on = height <= answer.head_height and trio.current_time() - start_time < limit_seconds
            async with trio.open_nursery() as nursery:
                if goes_on and (answer.onward or _is_ample(answer)):
                    nursery.start_soon(self._ask_ahead, peer, height, following)
                try:
                    grew |= await self._apply(answer, height - len(answer.blocks), pending)
                except (Rejected, CertifiedInvalid) as error:
                    failure = error
                    nursery.cancel_scope.cancel()
            if isinstance(failure, CertifiedInvalid):
                raise failure
            if failure is not None:
                self._disappointed(peer, str(failure))
                self._claimed[peer] = 0
                return grew
            if goes_on and not following and self._ledger.committee.epoch != epoch:
                await self._ask_ahead(peer, height, following)  # no answer goes on beyond the end of an epoch
            if not following and not _is_ample(answer):
                self._claimed[peer] = height - 1  # there may be more, but not by the word of one that drips
            answer = following[0] if following else None
        if pending.headers:
            self._disappointed(peer, "what it promised to be final did not follow")
            self._claimed[peer] = 0
        return grew

    async def _ask_ahead(self, peer: MemberId, height: int, following: list[Blocks | None]) -> None:
        following.append(await self._ask(peer, height))

    async def _ask(self, peer: MemberId, height: int) -> Blocks | None:
        """A peer's ledger blocks from a height on, None if it has or gives none."""
        try:
            with self._turns.waiting(peer, self._network.connected, REQUEST_SECONDS) as seconds:
                encoded = await self._network.request(peer, encode(GetBlocks(height)), seconds)
            answer = decode(encoded, Blocks, MAX_ANSWER_BYTES)
        except (Unavailable, Rejected) as error:
            self._disappointed(peer, str(error))
            return None
        self._claimed[peer] = answer.head_height
        if not answer.blocks:
            if answer.head_height >= height:
                self._disappointed(peer, f"no ledger block {height}, though it claims {answer.head_height}")
            return None
        return answer

    def _disappointed(self, peer: MemberId, why: str) -> None:
        self._turns.disappointed(peer)
        log.info("ledger blocks from %s: %s", peer.hex()[:16], why)

    async def _apply(self, blocks: Blocks, first_height: int, pending: Pending) -> bool:
        """Check and apply a chunk; whether the log grew by it. ``pending`` is as in ``Chunk``."""
        chunk = Chunk(self._ledger, blocks, first_height, pending)
        await trio.to_thread.run_sync(chunk.check_certificate)
        async with self._applying:
            for header, record in chunk.lacking():
                events: list[CheckedEvent] = []
                for checked in chunk.check_events(record):
                    events += checked
                    await trio.lowlevel.checkpoint()
                if chunk.apply(header, record, events):
                    self.events_fetched += len(events)
                    self.blocks_fetched += 1
                    await trio.lowlevel.checkpoint()
            appended = chunk.commit()
        if appended:
            self._appended(appended)
        return bool(appended)


def _is_ample(blocks: Blocks) -> bool:
    """Whether an answer brings a good part of what a server aims at: one that falls short of it stops for no reason."""
    return sum(record.size_bytes for record in blocks.blocks) >= ANSWER_TARGET_BYTES // 4
