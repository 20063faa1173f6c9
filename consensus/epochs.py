"""Following a chain's epochs from its genesis, by certificates alone.

What changes hands between epochs is one *link*: the next membership, and a header certified by the *ending* epoch
whose state names that membership's digest. Whoever trusts the members of epoch e believes them about those of e + 1;
so trust walks from the pinned genesis to the newest epoch, and needs nobody's word on the way. The certified header
may be the terminal ledger block or a carrier after it: their logs and states are the same.

Rules:

- Every header is judged by the members of the epoch it names, and only as far as that epoch went: a certified header
  of epoch e beyond the log size at which e ended is refused.
- Keys of an ended epoch still sign. Whoever gets hold of a quorum of them in every role can write another history
  from that epoch on, links and all, which verifies from genesis. A ``Pin`` ends that: the size and root of a log that
  the verifier has seen, or that a witness it trusts has signed. Everything that is not shown to continue it is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from msgspec import Meta

from consensus.block import MAX_HEADER_BYTES, Header, decode_header
from consensus.certificate import MAX_CERTIFICATE_BYTES, CertificateScheme, decode_certificate, verify_certificate
from consensus.certificate_schemes import scheme_for
from consensus.codec import decode
from consensus.identifiers import ChainId, Digest, MemberId
from consensus.membership import (
    MAX_GENESIS_BYTES,
    Committee,
    Genesis,
    Member,
    Membership,
    check_genesis,
)
from consensus.membership_change import check_change, membership_digest, succeeded
from consensus.merkle import EMPTY_ROOT
from consensus.portions import Wire
from consensus.rejection import Reason, Rejected
from consensus.state import EPOCH_HEAD_KEY, EpochHead, read_record
from consensus.state_map import MapProof, verify_map_proof

MAX_LINKS = 256
"""Epochs one proof can lead through: one change a month for twenty years."""
MAX_LINKS_BYTES = 64 << 20
"""All links of one proof together."""

HeaderBytes = Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]
CertificateBytes = Annotated[bytes, Meta(max_length=MAX_CERTIFICATE_BYTES)]


class EpochLink(Wire, frozen=True, tag="epoch-link"):
    """The members of an epoch and what the epoch before certified of them."""

    membership: Annotated[bytes, Meta(max_length=MAX_GENESIS_BYTES)]
    header: HeaderBytes
    certificate: CertificateBytes
    proof: MapProof


EpochLinks = Annotated[tuple[EpochLink, ...], Meta(max_length=MAX_LINKS)]


@dataclass(frozen=True, slots=True)
class EpochKeys:
    """One epoch as a verifier knows it. Its events have log indexes from ``first_index`` to before ``end_size``.

    ``first_root`` and ``end_root`` are the log's roots at these sizes. The newest epoch known has no end: None.
    """

    committee: Committee
    scheme: CertificateScheme
    first_index: int
    first_root: Digest
    succeeded: Mapping[MemberId, MemberId]
    """Whom of the epoch before each new member followed, by the new one's id."""
    end_size: int | None = None
    end_root: Digest | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """A log that the verifier knows to be the true one, as it was at some time."""

    log_size: int
    log_root: bytes


@dataclass(frozen=True, slots=True)
class Anchor:
    """What a verifier trusts: a checked genesis, and the epochs that follow from it as far as it was shown."""

    chain_id: ChainId
    genesis: Genesis
    epochs: tuple[EpochKeys, ...]

    @property
    def newest(self) -> EpochKeys:
        """The newest epoch known."""
        return self.epochs[-1]

    def of(self, epoch: int) -> EpochKeys:
        """An epoch by number.

        Raises:
            Rejected: ``WRONG_EPOCH`` for one that no link leads to.
        """
        if not 0 <= epoch < len(self.epochs):
            raise Rejected(
                Reason.WRONG_EPOCH, f"of epoch {epoch}; the links given lead from the genesis to {len(self.epochs) - 1}"
            )
        return self.epochs[epoch]

    def at(self, index: int) -> EpochKeys:
        """The epoch in which the event at a log index was appended."""
        return next(keys for keys in reversed(self.epochs) if index >= keys.first_index)

    def member(self, identifier: bytes) -> Member:
        """A member of any epoch known, as the newest one that has it lists it.

        Raises:
            Rejected: ``UNKNOWN_MEMBER``.
        """
        for keys in reversed(self.epochs):
            if any(member.id == identifier for member in keys.committee.members):
                return keys.committee.member(MemberId(identifier))
        raise Rejected(Reason.UNKNOWN_MEMBER, f"{identifier.hex()} is no member of any epoch known")

    def first_identity(self, identifier: bytes) -> bytes:
        """The id under which a member first took part: equal for two ids exactly if they are one member."""
        for keys in reversed(self.epochs):
            identifier = keys.succeeded.get(MemberId(identifier), identifier)
        return identifier

    def follow(self, links: Iterable[EpochLink]) -> "Anchor":
        """The anchor with the epochs that the links lead to, each certified by the one before.

        Raises:
            Rejected: ``WRONG_EPOCH`` for a link that is not the next; ``BAD_MEMBERSHIP`` for a membership other than
                the certified one; ``BAD_PROOF``; as ``verify_header`` and ``check_change``.
        """
        known = self
        for link in links:
            known = known._after(link)
        return known

    def led_by(self, links: tuple[EpochLink, ...]) -> "Anchor":
        """``follow`` for links that begin at the genesis, as every proof brings them: those known are passed over."""
        return self.follow(links[len(self.epochs) - 1 :])

    def _after(self, link: EpochLink) -> "Anchor":
        ending = self.newest
        header = verify_header(self, link.header, link.certificate)
        value = verify_map_proof(header.state_root, EPOCH_HEAD_KEY, link.proof)
        head = None if value is None else read_record(value, EpochHead)
        if head is None or (header.epoch, head.epoch) != (ending.committee.epoch, ending.committee.epoch + 1):
            raise Rejected(
                Reason.WRONG_EPOCH, f"no end of epoch {ending.committee.epoch} in ledger block {header.height}"
            )
        membership = decode(link.membership, Membership, MAX_GENESIS_BYTES)
        if membership.epoch != head.epoch or membership_digest(self.chain_id, membership) != head.membership:
            raise Rejected(Reason.BAD_MEMBERSHIP, f"not the members that epoch {header.epoch} certified")
        check_change(membership, ending.committee)
        size, root = header.log_size, Digest(header.log_root)
        ended = replace(ending, end_size=size, end_root=root)
        scheme = scheme_for(self.genesis, membership, ending.committee)
        followed = succeeded(ending.committee.members, membership.members)
        begun = EpochKeys(scheme.committee, scheme, size, root, followed)
        return replace(self, epochs=(*self.epochs[:-1], ended, begun))


def anchor(genesis: Genesis, pinned: ChainId) -> Anchor:
    """The trust anchor of everything that follows. Build it once; it takes some milliseconds.

    Raises:
        Rejected: ``WRONG_CHAIN`` when the genesis is not the pinned one, naming both; ``MALFORMED`` for text
            that has no UTF-8 form; else as ``membership.check_genesis``.
    """
    try:
        chain_id = genesis.chain_id
    except UnicodeEncodeError as error:
        raise Rejected(Reason.MALFORMED, f"a genesis with text that is not Unicode: {error}") from error
    if chain_id != pinned:
        raise Rejected(
            Reason.WRONG_CHAIN,
            f"the genesis is that of chain {chain_id.hex()}, the pinned chain id is {pinned.hex()}",
        )
    check_genesis(genesis)
    scheme = scheme_for(genesis)
    return Anchor(chain_id, genesis, (EpochKeys(scheme.committee, scheme, 0, EMPTY_ROOT, {}),))


def verify_header(trusted: Anchor, encoded_header: bytes, encoded_certificate: bytes) -> Header:
    """The header of this chain that the certificate is of, by the members of its epoch.

    Raises:
        Rejected: ``WRONG_CHAIN``, ``BAD_CERTIFICATE``, ``WRONG_EPOCH``, or as ``codec.decode``.
    """
    header = decode_header(encoded_header, trusted.chain_id)
    certificate = decode_certificate(encoded_certificate)
    named = (certificate.block, certificate.view, certificate.epoch)
    if named != (header.digest, header.view, header.epoch):
        raise Rejected(
            Reason.BAD_CERTIFICATE,
            f"certificate of ledger block {certificate.block.hex()} in view {certificate.view}, "
            f"the header is {header.digest.hex()} in view {header.view}",
        )
    keys = trusted.of(header.epoch)
    verify_certificate(keys.scheme, trusted.chain_id, certificate)
    _check_within(keys, header)
    return header


def has_pinned(pin: Pin, header: Header) -> bool:
    """Whether a verified header has the pinned log; False where it is of another size.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` for another log of the same size.
    """
    if header.log_size != pin.log_size:
        return False
    if header.log_root != pin.log_root:
        raise Rejected(
            Reason.BAD_CHECKPOINT,
            f"another history: log root {header.log_root.hex()} at size {header.log_size}, "
            f"the pinned one is {pin.log_root.hex()}",
        )
    return True


def _check_within(keys: EpochKeys, header: Header) -> None:
    """The header's log lies within its epoch, and begins and ends it with the same log as the links did."""
    end = keys.end_size
    if header.log_size < keys.first_index or (end is not None and header.log_size > end):
        raise Rejected(
            Reason.WRONG_EPOCH,
            f"log size {header.log_size} in epoch {header.epoch}, which reaches from {keys.first_index} to {end}",
        )
    for size, root in ((keys.first_index, keys.first_root), (end, keys.end_root)):
        if header.log_size == size and header.log_root != root:
            raise Rejected(Reason.BAD_CERTIFICATE, f"another log of size {size} is certified in epoch {header.epoch}")
