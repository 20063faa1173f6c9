"""What lying members answer to who catches up: each lie a true answer with something changed."""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from ledger_fixtures import MemoryLedger, digest
from msgspec.structs import replace

from consensus.block import Body, decode_header
from consensus.certificate import decode_certificate
from consensus.codec import decode, encode
from consensus.event import pack
from consensus.identifiers import MemberId
from node.messages import BlockRecord, Blocks, GetBlocks

if TYPE_CHECKING:
    from simulation.ledgers import LedgerSimulation

FAR = 2**53 - 1
Lie = Callable[["LedgerSimulation", Blocks], Blocks]


def no_end(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """A head far ahead, and nothing of the way to it."""
    return Blocks((), (), b"", FAR)


def stale_head(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """There is nothing more."""
    return Blocks((), (), b"", 0)


def bad_events(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """Spoiled bytes."""
    return _each(truth, lambda record: replace(record, events=tuple(event[:-1] + b"\x00" for event in record.events)))


def missing_event(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """One event left out of each ledger block."""
    return _each(truth, lambda record: replace(record, events=record.events[1:]))


def events_in_another_order(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """Body and events turned round: they fit each other and not the header."""

    def turned(record: BlockRecord) -> BlockRecord:
        leaves = decode(record.body, Body, 1 << 18).leaf_hashes
        return replace(record, body=encode(Body(leaves[::-1])), events=record.events[::-1])

    return _each(truth, turned)


def body_of_another(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """Every body is one of an event nobody has."""
    return _each(truth, lambda record: replace(record, body=encode(Body((digest("nobody's"),))), events=()))


def false_header(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """Another state root in the last header: it is not what the certificate is of."""

    def lied(encoded: bytes) -> bytes:
        header = decode_header(encoded, simulation.committee.chain_id)
        return encode(replace(header, state_root=digest("a state to my taste")))

    if truth.onward:
        return replace(truth, onward=(*truth.onward[:-1], lied(truth.onward[-1])))
    last = truth.blocks[-1]
    return replace(truth, blocks=(*truth.blocks[:-1], replace(last, header=lied(last.header))))


def false_header_certified_anew(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """The same, under a certificate that names the false header and bears the true one's signature."""
    false = false_header(simulation, truth)
    header = decode_header(false.onward[-1] if false.onward else false.blocks[-1].header, simulation.committee.chain_id)
    return replace(false, certificate=encode(replace(decode_certificate(false.certificate), block=header.digest)))


def truncated_certificate(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """Half a signature."""
    certificate = decode_certificate(truth.certificate)
    half = certificate.signature[: max(1, len(certificate.signature) // 2)]
    return replace(truth, certificate=encode(replace(certificate, signature=half)))


def forged_certificate(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """A signature of nobody."""
    certificate = decode_certificate(truth.certificate)
    return replace(truth, certificate=encode(replace(certificate, signature=b"\xc0" + bytes(95))))


def no_certificate(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """True ledger blocks that nothing vouches for."""
    return replace(truth, certificate=b"")


def cut_short(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """The last ledger block is missing, its certificate is not."""
    return replace(truth, blocks=truth.blocks[:-1]) if len(truth.blocks) > 1 else no_end(simulation, truth)


def gap(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """One in between is missing."""
    return replace(truth, blocks=truth.blocks[:1] + truth.blocks[2:], onward=truth.onward[1:])


def onward_to_nowhere(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """Headers that lead in a circle."""
    return replace(truth, onward=(truth.blocks[0].header,) * 3)


def another_chain(simulation: "LedgerSimulation", truth: Blocks) -> Blocks:
    """The sound history of another log."""
    return _elsewhere()


LIES: tuple[Lie, ...] = (
    no_end,
    stale_head,
    bad_events,
    missing_event,
    events_in_another_order,
    body_of_another,
    false_header,
    false_header_certified_anew,
    truncated_certificate,
    forged_certificate,
    no_certificate,
    cut_short,
    gap,
    onward_to_nowhere,
    another_chain,
)


def lie(simulation: "LedgerSimulation", liar: MemberId, truth: Blocks, request: GetBlocks) -> bytes:
    """What a liar answers. Sometimes it is bytes of no answer, or one that was true long ago."""
    chance = simulation.random
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(200))
    if not truth.blocks:
        return encode(no_end(simulation, truth))
    old = simulation.stale_answers.setdefault(liar, truth)
    if chance.random() < 0.1:
        return encode(replace(old, head_height=FAR))
    told = chance.choice(LIES)(simulation, truth)
    simulation.note("lie", liar, request.from_height, len(told.blocks))
    return encode(told)


def _each(truth: Blocks, change: Callable[[BlockRecord], BlockRecord]) -> Blocks:
    return replace(truth, blocks=tuple(change(record) for record in truth.blocks))


@lru_cache(maxsize=1)
def _elsewhere() -> Blocks:
    memory = MemoryLedger(seed=9, certificate_scheme="ed25519")
    memory.seal(memory.source("data-source-1", "elsewhere"))
    event = memory.events[0]
    record = BlockRecord(memory.header, encode(Body((event.leaf_hash,))), (pack(event.entry, event.portions),))
    return Blocks((record,), (), memory.certificate, 1)
