"""Ledger blocks: header, body, and their digests.

A header binds everything a certificate vouches for: its place (chain, epoch, height, view, parent),
its time, the events it appends (``body_root``), the log after them (``log_size``, ``log_root``, RFC
9162) and the state after them (``state_root``). A certificate signs the header's digest and never
enters one, so that late votes cannot change history.

A body lists the RFC 9162 leaf hashes of its signed events, in log order. Events travel ahead of the
proposal; a voter that lacks one fetches it by leaf hash before it votes.
"""

from typing import Annotated

from msgspec import Meta, Struct

from consensus.codec import decode, encode
from consensus.identifiers import ChainId, Digest, Height, Tag, View, tagged_hash
from consensus.rejection import Reason, Rejected

VERSION = 1
MAX_BLOCK_EVENTS = 4_096
MAX_HEADER_BYTES = 1_024

Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Natural = Annotated[int, Meta(ge=0, le=2**53 - 1)]


class Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="block"):
    """What a certificate vouches for. ``timestamp_ms`` is Unix time in milliseconds."""

    version: Annotated[int, Meta(ge=1, le=1)]
    chain_id: Bytes32
    epoch: Natural
    height: Natural
    view: Natural
    leader: Bytes32
    parent: Bytes32
    parent_view: Natural
    timestamp_ms: Natural
    body_root: Bytes32
    event_count: Annotated[int, Meta(ge=0, le=MAX_BLOCK_EVENTS)]
    log_size: Natural
    log_root: Bytes32
    state_root: Bytes32

    @property
    def digest(self) -> Digest:
        """What votes and certificates name: the tagged hash of the canonical header."""
        return header_digest(encode(self))


class Body(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="body"):
    """The leaf hashes (RFC 9162 §2.1.1) of the events a ledger block appends, in log order."""

    leaf_hashes: Annotated[tuple[Bytes32, ...], Meta(max_length=MAX_BLOCK_EVENTS)]

    @property
    def root(self) -> Digest:
        """What ``Header.body_root`` commits to."""
        return tagged_hash(Tag.BODY, *self.leaf_hashes)


def header_digest(encoded: bytes) -> Digest:
    """Digest of a header's canonical bytes."""
    return tagged_hash(Tag.BLOCK, encoded)


def decode_header(encoded: bytes, chain_id: ChainId) -> Header:
    """A header of this chain.

    Raises:
        Rejected: as ``codec.decode``; ``WRONG_CHAIN`` for another chain's header.
    """
    header = decode(encoded, Header, MAX_HEADER_BYTES)
    if header.chain_id != chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"header of chain {header.chain_id.hex()}, this is {chain_id.hex()}")
    return header


def genesis_header(chain_id: ChainId, timestamp_ms: int, log_root: Digest, state_root: Digest) -> Header:
    """The root of every branch: height 0, view 0, no events. Known from the genesis, never voted on."""
    return Header(
        version=VERSION,
        chain_id=chain_id,
        epoch=0,
        height=Height(0),
        view=View(0),
        leader=bytes(32),
        parent=bytes(32),
        parent_view=View(0),
        timestamp_ms=timestamp_ms,
        body_root=Body(leaf_hashes=()).root,
        event_count=0,
        log_size=0,
        log_root=log_root,
        state_root=state_root,
    )


def check_body(header: Header, body: Body) -> None:
    """The body is the one its header commits to.

    Raises:
        Rejected: ``BAD_BLOCK``.
    """
    if header.event_count != len(body.leaf_hashes) or header.body_root != body.root:
        raise Rejected(Reason.BAD_BLOCK, f"body of ledger block {header.height} is not the one its header names")
    if len(set(body.leaf_hashes)) != len(body.leaf_hashes):
        raise Rejected(Reason.DUPLICATE, f"ledger block {header.height} lists an event twice")


__all__ = [
    "MAX_BLOCK_EVENTS",
    "Body",
    "Header",
    "check_body",
    "decode_header",
    "genesis_header",
    "header_digest",
]
