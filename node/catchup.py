"""Catching up: ledger blocks from peers, none of them believed.

A peer answers with consecutive ledger blocks up to a certified one. Their headers must chain from our head
to the certificate's, which is checked once for the chunk; then every event is checked and every block
applied exactly as in the live round. A peer that sends anything else is asked no more this time.

The same file serves: blocks, events, proposals, as others ask.
"""

import logging
from collections.abc import Callable, Iterable

import trio

from consensus.block import Body, check_body, decode_header
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

    async def reach(self, height: int, first_ask: Iterable[MemberId]) -> None:
        """Apply finalized ledger blocks until the log is at ``height`` at least.

        Raises:
            Unavailable: no peer could serve them now.
        """
        async with self._lock:
            distrusted: set[MemberId] = set()
            while self._ledger.final.header.height < height:
                if not await self._next_chunk(first_ask, distrusted):
                    raise Unavailable(f"no peer serves ledger block {self._ledger.final.header.height + 1}")

    async def _next_chunk(self, first_ask: Iterable[MemberId], distrusted: set[MemberId]) -> bool:
        connected = self._network.connected
        asked = dict.fromkeys([*(m for m in first_ask if m in connected), *sorted(connected)])
        for peer in asked:
            if peer in distrusted:
                continue
            request = GetBlocks(self._ledger.final.header.height + 1)
            try:
                answer = await self._network.request(peer, encode(request), REQUEST_SECONDS)
                blocks = decode(answer, Blocks, MAX_ANSWER_BYTES)
                if not blocks.blocks:
                    continue
                await self._apply(blocks)
                return True
            except Unavailable:
                continue
            except Rejected as error:
                log.warning("ledger blocks from %s refused: %s", peer.hex()[:16], error)
                distrusted.add(peer)
        return False

    async def _apply(self, blocks: Blocks) -> None:
        ledger = self._ledger
        chain_id = ledger.genesis.chain_id
        headers = [decode_header(record.header, chain_id) for record in blocks.blocks]
        certificate = decode(blocks.certificate, Certificate, MAX_CERTIFICATE_BYTES)
        previous = ledger.final.digest
        for header in headers:
            if header.parent != previous:
                raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} does not follow the one before")
            previous = header.digest
        if certificate.block != previous or certificate.view != headers[-1].view:
            raise Rejected(Reason.BAD_CERTIFICATE, "the certificate is not the last ledger block's")
        await trio.to_thread.run_sync(verify_certificate, ledger.scheme, chain_id, certificate)
        parent = ledger.final
        for header, record in zip(headers, blocks.blocks, strict=True):
            body = decode(record.body, Body, MAX_BODY_BYTES)
            events: list[CheckedEvent] = []
            for number, encoded in enumerate(record.events):
                events.append(check_event(encoded, ledger.committee))
                if number % EVENTS_BETWEEN_PAUSES == EVENTS_BETWEEN_PAUSES - 1:
                    await trio.lowlevel.checkpoint()
            check_body(header, body)
            if tuple(event.leaf_hash for event in events) != body.leaf_hashes:
                raise Rejected(Reason.BAD_BLOCK, f"events of ledger block {header.height} are not its body's")
            try:
                parent = ledger.verify(parent, header, body, events)
            except Rejected as error:
                raise CertifiedInvalid(f"ledger block {header.height} is certified but invalid: {error}") from error
            self.events_fetched += len(events)
            await trio.lowlevel.checkpoint()
        self.blocks_fetched += len(headers)
        self._appended(ledger.commit(headers, certificate, ()))
