"""A log on disk that was written by a quorum in memory, and networks that serve and fetch it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from ledger_fixtures import MemoryLedger
from network_fixtures import make_parties, network_of, until

from consensus.block import Body, decode_header
from consensus.certificate import decode_certificate
from consensus.codec import encode
from consensus.identifiers import MemberId
from node.catchup import serve_blocks
from node.ledger import Ledger
from node.messages import GetBlocks, GetSnapshot, GetState, Request, decode_request
from node.network import Network, RequestHandler
from node.snapshot import SnapshotDesk
from node.store import Store

Answer = Callable[[Request], Awaitable[bytes]]


def written(memory: MemoryLedger, directory: Path, blocks: int | None = None) -> Ledger:
    """A ledger on disk with the first ``blocks`` ledger blocks of ``memory``, each committed by itself."""
    ledger = Ledger(Store.open(directory, memory.chain_id, create=True), memory.genesis)
    write(ledger, memory, blocks)
    return ledger


def write(ledger: Ledger, memory: MemoryLedger, blocks: int | None = None) -> None:
    """Commit those of the first ``blocks`` ledger blocks of ``memory`` that are not there, each by itself."""
    for encoded, certificate in memory.certified[:blocks]:
        header = decode_header(encoded, memory.chain_id)
        if header.height <= ledger.final.header.height:
            continue
        events = memory.events[header.log_size - header.event_count : header.log_size]
        body = Body(tuple(event.leaf_hash for event in events))
        ledger.verify(ledger.final, header, body, events)
        ledger.commit([header], decode_certificate(certificate), ())


def honest(ledger: Ledger) -> Answer:
    """What a node answers that has this log."""
    desk = SnapshotDesk(ledger)

    async def answer(request: Request) -> bytes:
        match request:
            case GetSnapshot():
                return encode(desk.offer(request))
            case GetState():
                return encode(desk.part(request))
            case GetBlocks():
                return encode(serve_blocks(ledger, request))
        raise AssertionError(f"asked for {request}")

    return answer


@asynccontextmanager
async def served(answers: Sequence[Answer], away: int = 0) -> AsyncIterator[Network]:
    """The network of one who asks servers that answer so, once all but those that are away are connected."""
    parties = make_parties(len(answers) + 1 + away)
    client = network_of(parties[0], parties)

    def handler(answer: Answer) -> RequestHandler:
        async def handle(member: MemberId, payload: bytes) -> bytes:
            return await answer(decode_request(payload))

        return handle

    async with AsyncExitStack() as stack:
        for party, answer in zip(parties[1 : len(answers) + 1], answers, strict=True):
            await stack.enter_async_context(network_of(party, parties).open(handler(answer)))
        await stack.enter_async_context(client.open())
        await until(lambda: len(client.connected) == len(answers))
        yield client
