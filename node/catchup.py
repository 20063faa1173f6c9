"""Catching up: ledger blocks from peers, none of them believed.

A peer answers with consecutive ledger blocks up to a certified one. Their headers must chain from our head
to the certificate's, which is checked once for the chunk; then every event is checked and every block
applied exactly as in the live round. A peer that sends anything else is asked no more this time.

The same file serves: blocks, events, proposals, as others ask.
"""

import logging
from collections.abc import Callable, Iterable
from itertools import pairwise

import trio

from consensus.block import Body, Header, check_body, decode_header
from consensus.certificate import Certificate, verify_certificate
from consensus.codec import decode, encode
from consensus.event import CheckedEvent, check_event
from consensus.identifiers import Digest, MemberId
from consensus.rejection import CountersignError, Reason, Rejected, Unavailable
from node.ledger import MAX_BODY_BYTES, MAX_CERTIFICATE_BYTES, Finalized, Ledger
from node.messages import (
    ANSWER_TARGET_BYTES,
    MAX_ANSWER_BYTES,
    BlockRecord,
    Blocks,
    Events,
    GetBlocks,
    GetEvents,
)
from node.network import Network

log = logging.getLogger("countersign.catchup")

REQUEST_SECONDS = 10.0
EVENTS_BETWEEN_PAUSES = 64


def serve_blocks(ledger: Ledger, request: GetBlocks) -> Blocks:
    """Finalized ledger blocks from a height on, ending with a certified one."""
    head_height = ledger.final.header.height
    records: list[BlockRecord] = []
    certified = 0
    size_bytes = 0
    height = request.from_height
    while height <= head_height:
        header, body, events = ledger.block(height)
        record_bytes = len(header) + len(body) + sum(len(event) + 8 for event in events)
        if records and size_bytes + record_bytes > MAX_ANSWER_BYTES - MAX_CERTIFICATE_BYTES:
            break
        records.append(BlockRecord(header, body, tuple(events)))
        size_bytes += record_bytes
        if ledger.store.certificate(height) is not None:
            certified = len(records)
            if size_bytes >= ANSWER_TARGET_BYTES:
                break
        height += 1
    if not certified:
        return Blocks((), b"", head_height)
    certificate = ledger.store.certificate(request.from_height + certified - 1)
    assert certificate is not None
    return Blocks(tuple(records[:certified]), certificate, head_height)


def serve_events(ledger: Ledger, pending: Callable[[Digest], bytes | None], request: GetEvents) -> Events:
    """Events by leaf hash, from the pool or the log, as many as fit."""
    found: list[bytes] = []
    size_bytes = 0
    for leaf_hash in request.leaf_hashes:
        encoded = pending(Digest(leaf_hash))
        if encoded is None:
            continue
        size_bytes += len(encoded) + 8
        if found and size_bytes > ANSWER_TARGET_BYTES:
            break
        found.append(encoded)
    return Events(tuple(found))


class CertifiedInvalid(CountersignError):
    """A quorum certified a ledger block that breaks the rules: nothing after it can be trusted."""


class CatchUp:
    """Fetches and applies what the log lacks."""

    def __init__(self, ledger: Ledger, network: Network, appended: Callable[[tuple[Finalized, ...]], None]) -> None:
        self._ledger = ledger
        self._network = network
        self._appended = appended
        self._lock = trio.Lock()
        self.blocks_fetched = 0
        self.events_fetched = 0

    @property
    def running(self) -> bool:
        """Whether ledger blocks are being fetched now."""
        return self._lock.locked()

    async def reach(self, height: int) -> None:
        """Apply finalized ledger blocks until the log is at ``height`` at least.

        Raises:
            Unavailable: no peer could serve them now.
            CertifiedInvalid: a quorum broke the rules.
        """
        async with self._lock:
            distrusted: set[MemberId] = set()
            while self._ledger.final.header.height < height:
                for peer in sorted(self._network.connected - distrusted):
                    try:
                        if await self._from_peer(peer):
                            break
                    except Rejected as error:
                        log.warning("ledger blocks from %s refused: %s", peer.hex()[:16], error)
                        distrusted.add(peer)
                else:
                    raise Unavailable(f"no peer serves ledger block {self._ledger.final.header.height + 1}")

    async def from_peers(self, peers: Iterable[MemberId]) -> int:
        """Apply whatever each peer has beyond our log; how many ledger blocks that was.

        Raises:
            CertifiedInvalid: a quorum broke the rules.
        """
        before = self.blocks_fetched
        async with self._lock:
            for peer in peers:
                try:
                    while await self._from_peer(peer):
                        pass
                except Rejected as error:
                    log.warning("ledger blocks from %s refused: %s", peer.hex()[:16], error)
        return self.blocks_fetched - before

    async def _from_peer(self, peer: MemberId) -> bool:
        """Fetch and apply chunks from a peer, the next one on its way while one is applied; False if it had none."""
        applied = False
        answer = await self._ask(peer, self._ledger.final.header.height + 1)
        while answer is not None and answer.blocks:
            last = decode_header(answer.blocks[-1].header, self._ledger.genesis.chain_id)
            following: list[Blocks | None] = []
            failure: Rejected | CertifiedInvalid | None = None
            async with trio.open_nursery() as nursery:
                if last.height < answer.head_height:
                    nursery.start_soon(self._ask_ahead, peer, last.height + 1, following)
                try:
                    await self._apply(answer)
                except (Rejected, CertifiedInvalid) as error:
                    failure = error
                    nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            applied = True
            answer = following[0] if following else None
        return applied

    async def _ask_ahead(self, peer: MemberId, height: int, following: list[Blocks | None]) -> None:
        following.append(await self._ask(peer, height))

    async def _ask(self, peer: MemberId, height: int) -> Blocks | None:
        try:
            encoded = await self._network.request(peer, encode(GetBlocks(height)), REQUEST_SECONDS)
            return decode(encoded, Blocks, MAX_ANSWER_BYTES)
        except Unavailable:
            return None
        except Rejected as error:
            log.warning("ledger blocks from %s refused: %s", peer.hex()[:16], error)
            return None

    async def _apply(self, blocks: Blocks) -> None:
        ledger = self._ledger
        headers, certificate = self._checked_chain(blocks)
        await trio.to_thread.run_sync(verify_certificate, ledger.scheme, ledger.genesis.chain_id, certificate)
        for header, record in zip(headers, blocks.blocks, strict=True):
            if header.height <= ledger.final.header.height:
                continue
            body = decode(record.body, Body, MAX_BODY_BYTES)
            events = await self._checked_events(record)
            check_body(header, body)
            if tuple(event.leaf_hash for event in events) != body.leaf_hashes:
                raise Rejected(Reason.BAD_BLOCK, f"events of ledger block {header.height} are not its body's")
            parent = ledger.state_of(Digest(header.parent))
            if parent is None or header.height <= ledger.final.header.height:
                continue
            try:
                ledger.verify(parent, header, body, events)
            except Rejected as error:
                raise CertifiedInvalid(f"ledger block {header.height} is certified but invalid: {error}") from error
            self.events_fetched += len(events)
            self.blocks_fetched += 1
            await trio.lowlevel.checkpoint()
        self._appended(ledger.commit(headers, certificate, ()))

    def _checked_chain(self, blocks: Blocks) -> tuple[list[Header], Certificate]:
        """The headers, each the parent of the next, and the certificate of the last; its signature is unchecked."""
        chain_id = self._ledger.genesis.chain_id
        headers = [decode_header(record.header, chain_id) for record in blocks.blocks]
        for before, after in pairwise(headers):
            if after.parent != before.digest:
                raise Rejected(Reason.BAD_BLOCK, f"ledger block {after.height} does not follow the one before")
        certificate = decode(blocks.certificate, Certificate, MAX_CERTIFICATE_BYTES)
        if certificate.block != headers[-1].digest or certificate.view != headers[-1].view:
            raise Rejected(Reason.BAD_CERTIFICATE, "the certificate is not the last ledger block's")
        if (
            self._ledger.state_of(Digest(headers[0].parent)) is None
            and headers[0].height > self._ledger.final.header.height
        ):
            raise Rejected(Reason.BAD_BLOCK, f"ledger block {headers[0].height} does not follow our log")
        return headers, certificate

    async def _checked_events(self, record: BlockRecord) -> list[CheckedEvent]:
        events: list[CheckedEvent] = []
        for number, encoded in enumerate(record.events):
            events.append(check_event(encoded, self._ledger.committee))
            if number % EVENTS_BETWEEN_PAUSES == EVENTS_BETWEEN_PAUSES - 1:
                await trio.lowlevel.checkpoint()
        return events
