"""Catching up: ledger blocks from peers, none of them believed.

A peer answers with consecutive ledger blocks from the height asked for. Their headers must chain from our head to a
certified one, whose certificate is checked once for the chunk; then every event is checked and every block
applied exactly as in the live round. So whatever a peer sends, each answer that is taken brings the log further.
A peer that sends anything else, or nothing, or is slow, is asked no more this time and after all others later.

The same file serves: blocks, events, proposals, as others ask.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import trio

from consensus.block import Body, Header, check_body, decode_header
from consensus.certificate import Certificate, verify_certificate
from consensus.codec import decode, encode
from consensus.event import CheckedEvent, check_event
from consensus.identifiers import ChainId, Digest, MemberId
from consensus.rejection import CountersignError, Reason, Rejected, Unavailable
from node.epoch_end import Certified
from node.ledger import MAX_BODY_BYTES, MAX_CERTIFICATE_BYTES, Finalized, Ledger
from node.messages import (
    ANSWER_TARGET_BYTES,
    MAX_ANSWER_BYTES,
    MAX_ONWARD_HEADERS,
    BlockRecord,
    Blocks,
    Events,
    GetBlocks,
)
from node.network import Network
from node.snapshot import Joining

log = logging.getLogger("countersign.catchup")

REQUEST_SECONDS = 5.0
SLOW_SECONDS = 2.0
"""An answer that took longer is used, and another peer asked next: one that drips must not set the pace."""
EVENTS_BETWEEN_PAUSES = 64


def serve_blocks(ledger: Ledger, request: GetBlocks) -> Blocks:
    """Finalized ledger blocks of one epoch from a height on, ending with a certified one where that fits."""
    head_height = ledger.final.header.height
    records: list[BlockRecord] = []
    certified = epoch = 0
    size_bytes = 0
    height = request.from_height
    while height <= head_height:
        header, body, events = ledger.block(height)
        header_epoch = decode_header(header, ledger.genesis.chain_id).epoch
        if header_epoch != epoch and records:
            break  # whoever asks learns from the last one who certifies this
        epoch = header_epoch
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
    if certified:
        del records[certified:]
    last = request.from_height + len(records) - 1
    certified_height = ledger.store.certified_at_or_after(last)
    if not records or certified_height is None:
        return Blocks((), (), b"", head_height)
    held = Certified.decode(ledger.store.certificate(certified_height) or b"")
    if certified_height - last + len(held.onward) > MAX_ONWARD_HEADERS:
        return Blocks((), (), b"", head_height)
    onward = [ledger.store.header(height) or b"" for height in range(last + 1, certified_height + 1)]
    return Blocks(tuple(records), (*onward, *held.onward), encode(held.certificate), head_height)


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


def decode_chain(blocks: Blocks, first_height: int, chain_id: ChainId) -> list[Header]:
    """The headers of an answer that has ledger blocks: from the height asked for on, each the parent of the next.

    Raises:
        Rejected: they are not; as ``decode_header``.
    """
    encoded = (*(record.header for record in blocks.blocks), *blocks.onward)
    headers = [decode_header(header, chain_id) for header in encoded]
    if headers[0].height != first_height:
        raise Rejected(Reason.BAD_BLOCK, f"ledger block {headers[0].height}, asked for {first_height}")
    for before, after in pairwise(headers):
        if (after.parent, after.height) != (before.digest, before.height + 1):
            raise Rejected(Reason.BAD_BLOCK, f"ledger block {after.height} does not follow the one before")
    return headers


class CertifiedInvalid(CountersignError):
    """A quorum certified a ledger block that breaks the rules: nothing after it can be trusted."""


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
        self._disappointments: Counter[MemberId] = Counter()
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

    async def idle(self) -> None:
        """Until nothing is being fetched."""
        async with self._lock:
            return

    async def reach(self, height: int) -> None:
        """Apply finalized ledger blocks until the log is at ``height`` at least.

        Raises:
            Unavailable: no peer could serve them now.
            CertifiedInvalid: a quorum broke the rules.
        """
        async with self._lock:
            await self._join()
            passed_over: set[MemberId] = set()
            while self._ledger.final.header.height < height:
                peers = self._network.connected - passed_over
                for peer in sorted(peers, key=lambda peer: (self._disappointments[peer], peer)):
                    if await self._from_peer(peer):
                        break
                    passed_over.add(peer)
                else:
                    raise Unavailable(f"no peer serves ledger block {self._ledger.final.header.height + 1}")

    async def from_peer(self, peer: MemberId) -> bool:
        """Apply whatever a peer has beyond our log; whether it had anything.

        Raises:
            CertifiedInvalid: a quorum broke the rules.
        """
        async with self._lock:
            try:
                joined = await self._join()
            except Unavailable as error:
                log.info("beginning at a snapshot pauses: %s", error)
                return False
            return await self._from_peer(peer) or joined

    async def _join(self) -> bool:
        """Begin at a snapshot if that is wanted and nothing has begun; whether it was done."""
        if self._joining is None or self._ledger.final.header.height > 0:
            return False
        return await self._joining.run()

    async def _from_peer(self, peer: MemberId) -> bool:
        """Fetch and apply chunks from a peer, the next one on its way while one is applied.

        Returns: whether the log grew. Stops at the first answer that disappoints.
        """
        before_height = self._ledger.final.header.height
        disappointments = self._disappointments[peer]
        pending: list[Header] = []
        height = before_height + 1
        answer = await self._ask(peer, height)
        while answer is not None:
            following: list[Blocks | None] = []
            failure: Rejected | CertifiedInvalid | None = None
            next_height = height + len(answer.blocks)
            async with trio.open_nursery() as nursery:
                if next_height <= answer.head_height:
                    nursery.start_soon(self._ask_ahead, peer, next_height, following)
                try:
                    await self._apply(answer, height, pending)
                except (Rejected, CertifiedInvalid) as error:
                    failure = error
                    nursery.cancel_scope.cancel()
            if isinstance(failure, CertifiedInvalid):
                raise failure
            if failure is not None:
                self._disappointed(peer, str(failure))
            height = next_height
            answer = following[0] if following and self._disappointments[peer] == disappointments else None
        return self._ledger.final.header.height > before_height

    async def _ask_ahead(self, peer: MemberId, height: int, following: list[Blocks | None]) -> None:
        following.append(await self._ask(peer, height))

    async def _ask(self, peer: MemberId, height: int) -> Blocks | None:
        """A peer's ledger blocks from a height on, None if it has or gives none."""
        start_time = trio.current_time()
        try:
            encoded = await self._network.request(peer, encode(GetBlocks(height)), REQUEST_SECONDS)
            answer = decode(encoded, Blocks, MAX_ANSWER_BYTES)
        except (Unavailable, Rejected) as error:
            self._disappointed(peer, str(error))
            return None
        if trio.current_time() - start_time > SLOW_SECONDS:
            self._disappointed(peer, "slow")
        if not answer.blocks:
            if answer.head_height >= height:
                self._disappointed(peer, f"no ledger block {height}, though it claims {answer.head_height}")
            return None
        return answer

    def _disappointed(self, peer: MemberId, why: str) -> None:
        self._disappointments[peer] += 1
        log.info("ledger blocks from %s: %s", peer.hex()[:16], why)

    async def _apply(self, blocks: Blocks, first_height: int, pending: list[Header]) -> None:
        """Check and apply a chunk; ``pending`` are headers applied and not committed yet, for want of a certificate."""
        ledger = self._ledger
        headers, certificate = self._checked_chain(blocks, first_height)
        ended_height = 0
        await trio.to_thread.run_sync(verify_certificate, ledger.scheme, ledger.genesis.chain_id, certificate)
        for header, record in zip(headers, blocks.blocks, strict=False):
            pending.append(header)
            if header.height <= ledger.final.header.height:
                continue
            body = decode(record.body, Body, MAX_BODY_BYTES)
            check_body(header, body)
            events = await self._checked_events(record)
            if tuple(event.leaf_hash for event in events) != body.leaf_hashes:
                raise Rejected(Reason.BAD_BLOCK, f"events of ledger block {header.height} are not its body's")
            if header.height <= ledger.final.header.height:
                continue
            parent = ledger.state_of(Digest(header.parent))
            if parent is None:
                raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} does not follow our log")
            try:
                after = ledger.verify(parent, header, body, events)
            except Rejected as error:
                raise CertifiedInvalid(f"ledger block {header.height} is certified but invalid: {error}") from error
            self.events_fetched += len(events)
            self.blocks_fetched += 1
            await trio.lowlevel.checkpoint()
            if after.is_terminal:
                ended_height = header.height
                break
        if ended_height or not blocks.onward:
            carriers = [header for header in headers if ended_height and header.height > ended_height]
            self._appended(ledger.commit([*pending, *carriers], certificate, ()))
            pending.clear()

    def _checked_chain(self, blocks: Blocks, first_height: int) -> tuple[list[Header], Certificate]:
        """The headers, each the parent of the next, and the certificate of the last; its signature is unchecked."""
        headers = decode_chain(blocks, first_height, self._ledger.genesis.chain_id)
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
