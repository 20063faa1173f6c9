"""One answer of a peer that has ledger blocks we lack: checked and applied, a step at a time, nothing believed.

The steps, in order: the headers chain from our log to the one the certificate names; a quorum certified that one; each
ledger block's events are checked and are its body's; it applies on its parent; what the certificate makes final is
committed, and what an earlier one does that is reached. Where to pause between steps, and whom to ask next, is left to
``catchup``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from consensus.block import Body, Header, check_body, decode_header
from consensus.certificate import Certificate, verify_certificate
from consensus.codec import decode
from consensus.event import CheckedEvent, check_each, unpack
from consensus.identifiers import ChainId, Digest
from consensus.rejection import CountersignError, Reason, Rejected
from node.ledger import MAX_BODY_BYTES, MAX_CERTIFICATE_BYTES, Finalized, Ledger
from node.messages import MAX_ANSWER_BYTES, BlockRecord, Blocks, in_turns

MAX_RECORDS_BYTES = MAX_ANSWER_BYTES - MAX_CERTIFICATE_BYTES
"""The ledger blocks of one answer, where there are several."""

MAX_PENDING_BYTES = 256 << 20
"""What may lie applied under one certificate: four times what a node keeps waiting by default."""


class CertifiedInvalid(CountersignError):
    """A quorum certified a ledger block that breaks the rules: nothing after it can be trusted."""


def decode_chain(blocks: Blocks, first_height: int, chain_id: ChainId) -> list[Header]:
    """The headers of an answer that has ledger blocks: from the height asked for on, each the parent of the next.

    All are of one epoch: by a certificate of the next one they would be final, too, but nobody could show it by the
    members of their own. And there are no more than we serve at once: of what is kept under one certificate the first
    part must reach far enough for the headers that lead on from it, or nobody could be served it any more.

    Raises:
        Rejected: they are not; as ``decode_header``. ``OVERSIZED`` for more than ``MAX_RECORDS_BYTES``.
    """
    size_bytes = sum(record.size_bytes for record in blocks.blocks)
    if len(blocks.blocks) > 1 and size_bytes > MAX_RECORDS_BYTES:
        raise Rejected(Reason.OVERSIZED, f"{size_bytes} bytes of ledger blocks in one answer")
    encoded = (*(record.header for record in blocks.blocks), *blocks.onward)
    headers = [decode_header(header, chain_id) for header in encoded]
    if headers[0].height != first_height:
        raise Rejected(Reason.BAD_BLOCK, f"ledger block {headers[0].height}, asked for {first_height}")
    for before, after in pairwise(headers):
        if (after.parent, after.height) != (before.digest, before.height + 1):
            raise Rejected(Reason.BAD_BLOCK, f"ledger block {after.height} does not follow the one before")
        if after.epoch != before.epoch:
            raise Rejected(
                Reason.WRONG_EPOCH, f"ledger block {after.height} is of epoch {after.epoch}, after another's"
            )
    return headers


@dataclass(slots=True)
class Pending:
    """Ledger blocks of one peer that are applied and not committed yet, for want of what makes them final."""

    headers: list[Header] = field(default_factory=list)
    size_bytes: int = 0
    promised: tuple[Header, Certificate] | None = None
    """The nearest certified ledger block that they lead up to, kept with its certificate for when it is reached."""

    def promise(self, header: Header, certificate: Certificate) -> None:
        """They lead up to this one. A later one than before makes none final that it does not, and may be too far."""
        if self.promised is None or header.height < self.promised[0].height:
            self.promised = header, certificate

    def reached(self) -> tuple[list[Header], Certificate] | None:
        """Those that the certificate promised makes final, once they are all here; they are taken out."""
        if self.promised is None:
            return None
        header, certificate = self.promised
        reached = [held for held in self.headers if held.height <= header.height]
        if not reached or reached[-1].digest != header.digest:
            return None
        self.headers = self.headers[len(reached) :]
        self.promised = None
        return reached, certificate

    def clear(self) -> None:
        """They are on the log."""
        self.headers.clear()
        self.size_bytes, self.promised = 0, None


class Chunk:
    """An answer with ledger blocks, on its way into the log."""

    def __init__(self, ledger: Ledger, blocks: Blocks, first_height: int, pending: Pending) -> None:
        """``pending`` is what earlier answers of this peer left; it is added to and cleared.

        Raises:
            Rejected: the headers do not chain from our log to the certificate's, or ever farther without an end
                (``OVERSIZED`` for more than ``MAX_PENDING_BYTES``); the certificate's signature is unchecked.
        """
        self._ledger = ledger
        self._blocks = blocks
        self._pending = pending
        self._ended_height = 0
        self._headers = decode_chain(blocks, first_height, ledger.genesis.chain_id)
        self._certificate = decode(blocks.certificate, Certificate, MAX_CERTIFICATE_BYTES)
        first, last = self._headers[0], self._headers[-1]
        if self._certificate.block != last.digest or self._certificate.view != last.view:
            raise Rejected(Reason.BAD_CERTIFICATE, "the certificate is not the last ledger block's")
        if pending.size_bytes > MAX_PENDING_BYTES:
            raise Rejected(Reason.OVERSIZED, f"{pending.size_bytes} bytes of ledger blocks under one certificate")
        if first.height > ledger.final.header.height and ledger.state_of(Digest(first.parent)) is None:
            raise Rejected(Reason.BAD_BLOCK, f"ledger block {first.height} does not follow our log")

    def check_certificate(self) -> None:
        """A quorum certified the last header: the slow part, fit for a thread.

        Raises:
            Rejected: as ``verify_certificate``.
        """
        verify_certificate(self._ledger.scheme, self._ledger.genesis.chain_id, self._certificate)

    def lacking(self) -> Iterator[tuple[Header, BlockRecord]]:
        """The ledger blocks to apply, oldest first; none that is on the log already.

        Raises:
            Rejected: ``WRONG_EPOCH`` for one after the end of its epoch: a carrier is no ledger block of the log.
        """
        for header, record in zip(self._headers, self._blocks.blocks, strict=False):
            if self._ended_height:
                raise Rejected(Reason.WRONG_EPOCH, f"ledger block {header.height} after the end of its epoch")
            self._pending.headers.append(header)
            self._pending.size_bytes += sum(map(len, record.events))
            if header.height > self._ledger.final.header.height:
                yield header, record

    def check_events(self, record: BlockRecord) -> Iterator[list[CheckedEvent]]:
        """The events of a ledger block, once they are checked, a turn's at a time.

        Raises:
            Rejected: as ``check_event``.
        """
        for turn in in_turns(record.events):
            wires = [unpack(encoded) for encoded in turn]
            checked: list[CheckedEvent] = []
            for event in check_each(wires, self._ledger.committee):
                if isinstance(event, Rejected):
                    raise event
                checked.append(event)
            yield checked

    def apply(self, header: Header, record: BlockRecord, events: list[CheckedEvent]) -> bool:
        """Keep a ledger block as a branch; False if it is on the log meanwhile.

        Raises:
            Rejected: body or events are not the header's; it does not follow our log.
            CertifiedInvalid: a quorum broke the rules.
        """
        ledger = self._ledger
        body = decode(record.body, Body, MAX_BODY_BYTES)
        check_body(header, body)
        if tuple(event.leaf_hash for event in events) != body.leaf_hashes:
            raise Rejected(Reason.BAD_BLOCK, f"events of ledger block {header.height} are not its body's")
        if header.height <= ledger.final.header.height:
            return False
        if header.epoch != ledger.committee.epoch:  # the round has ended it meanwhile
            raise Rejected(Reason.WRONG_EPOCH, f"ledger block {header.height} after the end of its epoch")
        parent = ledger.state_of(Digest(header.parent))
        if parent is None:
            raise Rejected(Reason.BAD_BLOCK, f"ledger block {header.height} does not follow our log")
        try:
            after = ledger.verify(parent, header, body, events)
        except Rejected as error:
            raise CertifiedInvalid(f"ledger block {header.height} is certified but invalid: {error}") from error
        if after.is_terminal:
            self._ended_height = header.height
        return True

    def commit(self) -> tuple[Finalized, ...]:
        """Append what the certificate makes final, and one promised before it; nothing while that is not all here."""
        appended: tuple[Finalized, ...] = ()
        if (reached := self._pending.reached()) is not None:
            appended = self._ledger.commit(*reached, ())
            self._pending.size_bytes = sum(record.size_bytes for record in self._blocks.blocks)
        if self._blocks.onward and not self._ended_height:
            self._pending.promise(self._headers[-1], self._certificate)
            return appended
        carriers = [header for header in self._headers if self._ended_height and header.height > self._ended_height]
        appended += self._ledger.commit([*self._pending.headers, *carriers], self._certificate, ())
        self._pending.clear()
        return appended
