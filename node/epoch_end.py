"""How an epoch's last ledger block is certified on disk, and what leads on from it.

The log's last ledger block of an epoch is the terminal one. Where it became final through a *carrier*, an empty
descendant in its own epoch that is no part of the log, the certificate kept for it is the carrier's, with the headers
from the terminal ledger block (exclusive) to that carrier. Everybody else reads the pair that a certificate is of.
"""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from consensus.block import MAX_HEADER_BYTES, decode_header
from consensus.certificate import MAX_CERTIFICATE_BYTES, Certificate
from consensus.codec import decode, encode
from consensus.epochs import EpochLink
from consensus.identifiers import ChainId
from consensus.membership_change import MembershipChange
from consensus.portions import Wire
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.state import EPOCH_HEAD_KEY
from consensus.transition import Built

MAX_CARRIERS = 1_024
MAX_STORED_CERTIFICATE_BYTES = MAX_CERTIFICATE_BYTES + MAX_CARRIERS * (MAX_HEADER_BYTES + 3) + 64


class CarriedCertificate(Wire, frozen=True, tag="carried-certificate"):
    """The certificate of a carrier; ``headers`` lead to it from the terminal ledger block, the last is its own."""

    headers: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)], ...], Meta(min_length=1, max_length=MAX_CARRIERS)
    ]
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate as kept for a ledger block, with the headers after it up to the one it is of; mostly none."""

    onward: tuple[bytes, ...]
    certificate: Certificate

    def encode(self) -> bytes:
        """What is kept on disk."""
        return encode(CarriedCertificate(self.onward, self.certificate) if self.onward else self.certificate)

    @classmethod
    def decode(cls, encoded: bytes) -> "Certified":
        """What ``encode`` made.

        Raises:
            Rejected: as ``codec.decode``.
        """
        held: Certificate | CarriedCertificate = decode(
            encoded,
            Certificate | CarriedCertificate,  # type: ignore[arg-type]
            MAX_STORED_CERTIFICATE_BYTES,
        )
        if isinstance(held, CarriedCertificate):
            return cls(held.headers, held.certificate)
        return cls((), held)

    def header(self, kept_for: bytes, chain_id: ChainId) -> bytes:
        """The header that the certificate is of, where it is kept for the ledger block with the header ``kept_for``.

        Raises:
            Rejected: ``BAD_CERTIFICATE`` for headers that do not follow each other within its epoch.
        """
        before = decode_header(kept_for, chain_id)
        for encoded in self.onward:
            after = decode_header(encoded, chain_id)
            if (after.parent, after.epoch, after.log_size) != (before.digest, before.epoch, before.log_size):
                raise Rejected(Reason.BAD_CERTIFICATE, f"no carrier of ledger block {before.height}")
            before = after
        if self.certificate.block != before.digest:
            raise Rejected(Reason.BAD_CERTIFICATE, f"the certificate is not ledger block {before.height}'s")
        return self.onward[-1] if self.onward else kept_for


def link_of(terminal: Built, certified: Certified) -> EpochLink:
    """The link to the epoch that begins at a terminal ledger block."""
    change = terminal.events[-1].governance
    if not isinstance(change, MembershipChange):
        raise InvariantBroken(f"ledger block {terminal.state.header.height} ends an epoch without a membership event")
    header = certified.onward[-1] if certified.onward else encode(terminal.state.header)
    proof = terminal.state.state.prove(EPOCH_HEAD_KEY)
    return EpochLink(encode(change.membership), header, encode(certified.certificate), proof)
