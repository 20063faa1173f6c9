"""Beginning at a snapshot: a certified ledger block's state from peers, none of them believed.

A replica that replays the log from genesis judges every event itself; one that begins at a snapshot relies on the
quorum that certified it for the rules below it, and for nothing else (``docs/adr/015``). What it takes:

1. links from the genesis to the ledger block's epoch, each certified by the members before;
2. the ledger block's header, certified by a quorum of every role of its epoch; the log's frontier, held against it;
3. the state, prefix by prefix, each proved complete against its root (``state_map.py``), from several peers, which
   share the time (``turns.py``).

The state is kept in memory until it is whole and then written at once: a node that is stopped before begins again. The
log below is fetched afterwards (``history.py``).

A server offers states it holds in memory anyway, since branches of the state share their nodes: one at every
``OFFERED_EVERY``th ledger block, so that several members offer the same, and whatever it has offered lately.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from consensus.certificate import Certificate, decode_certificate
from consensus.codec import decode, encode
from consensus.epochs import Anchor, EpochLink, verify_header
from consensus.identifiers import Digest, MemberId
from consensus.merkle import Frontier
from consensus.rejection import InvariantBroken, Reason, Rejected, Unavailable
from consensus.state_map import KEY_BYTES, MAX_PREFIX_ENTRIES, PrefixProof, StateMap, verify_prefix_proof
from consensus.transition import LedgerState
from node.ledger import Ledger
from node.link import Refused
from node.messages import (
    ANSWER_TARGET_BYTES,
    MAX_ANSWER_BYTES,
    GetSnapshot,
    GetState,
    Snapshot,
    StatePart,
)
from node.network import Network
from node.turns import Turns

log = logging.getLogger("countersign.snapshot")

OFFERED_EVERY = 64
OFFERED_AT_MOST = 4
LEAST_EVENTS = 2_000
"""A shorter log is replayed: that takes a second, and checks everything."""
PART_TARGET_BYTES = 256 << 10
MAX_PARTS = 256
REQUEST_SECONDS = 10.0
ATTEMPTS = 3
PATIENCE_SECONDS = 60.0
"""How long a peer may bring nothing new of a state."""
LEAST_BYTES_PER_SECOND = 16 << 10
"""Less than a full part just in time."""
PATIENCE = 3
"""A peer that failed so often is taken to offer nothing: it must not keep a node from replaying a short log."""
SETTLE_SECONDS = 10.0
"""How long peers that are not connected yet are waited for, while fewer than half have said what they offer."""
_NOTHING = Snapshot((), b"", b"", b"")


class SnapshotDesk:
    """What this node offers to those who begin."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._offered: OrderedDict[Digest, tuple[LedgerState, Certificate]] = OrderedDict()

    def appended(self) -> None:
        """Keep the final state if it is one that others keep too."""
        if self._ledger.final.header.height % OFFERED_EVERY == 0:
            self._keep()

    def offer(self, request: GetSnapshot) -> Snapshot:
        """The newest state kept, or the final one; with links first, where they do not fit beside it."""
        newest = next(reversed(self._offered.values()), None)
        height = self._ledger.final.header.height
        if newest is None or height - newest[0].header.height > 2 * OFFERED_EVERY:
            newest = self._keep()
        if newest is None or newest[0].header.log_size < LEAST_EVENTS:
            return _NOTHING
        state, certificate = newest
        links = self._ledger.links[request.known_epoch : state.header.epoch]
        fitting = tuple(_that_fit(links))
        if len(fitting) < len(links):
            return Snapshot(fitting, b"", b"", b"")
        return Snapshot(fitting, encode(state.header), encode(certificate), state.frontier.to_bytes())

    def part(self, request: GetState) -> StatePart:
        """A part of a state that was offered.

        Raises:
            Rejected: ``NOT_FOUND`` for a state that is not kept (any more).
        """
        held = self._offered.get(Digest(request.state_root))
        if held is None and self._ledger.final.state.root == request.state_root:
            held = self._keep()
        if held is None:
            raise Rejected(Reason.NOT_FOUND, f"state {request.state_root.hex()} is not kept")
        return state_part(held[0].state, request.start)

    def _keep(self) -> tuple[LedgerState, Certificate] | None:
        """Keep the final state, if it has a certificate of its own: that of an epoch's last ledger block may not."""
        state, certificate = self._ledger.final, self._ledger.certificate
        if certificate is None or certificate.block != state.digest or state.ends_epoch:
            return None
        self._offered.pop(state.state.root, None)
        self._offered[state.state.root] = state, certificate
        while len(self._offered) > OFFERED_AT_MOST:
            self._offered.popitem(last=False)
        return state, certificate


@dataclass(frozen=True, slots=True)
class Offer:
    """A snapshot whose header is verified, and whose state is not here yet."""

    peer: MemberId
    links: tuple[EpochLink, ...]
    certificate: Certificate
    state: LedgerState
    """Header, digest and frontier; the state itself is empty."""


class Joining:
    """How a log that has not begun begins at a snapshot."""

    def __init__(self, ledger: Ledger, network: Network, begun: Callable[[], None]) -> None:
        """``begun`` is told that it has: what stands below is now to be fetched."""
        self._ledger = ledger
        self._network = network
        self._begun = begun
        self._disappointments: Counter[MemberId] = Counter()
        self._first_asked: float | None = None
        self.given_up = False
        """Nobody offers a snapshot: the log is replayed."""

    async def run(self) -> bool:
        """Begin at a snapshot that a peer offers; whether there was one.

        Raises:
            Unavailable: there may be one; or there was, and none of the peers gave the whole state.
        """
        for _ in range(ATTEMPTS):
            offer = await self._offer()
            if offer is None:
                self.given_up = True
                return False
            state = await self._state(offer)
            begun = LedgerState(offer.state.header, offer.state.digest, offer.state.frontier, state or StateMap())
            if state is None or begun.ends_epoch:
                self._disappointments[offer.peer] += 1
                continue
            if self._ledger.final.header.height > 0:
                log.info("the log began meanwhile: it is replayed")
                return False
            self._ledger.begin_at(begun, offer.links, offer.certificate)
            log.info("began at ledger block %d with %d records of state", begun.header.height, len(state))
            self._begun()
            return True
        raise Unavailable("no peer gives the whole state of a snapshot")

    async def _offer(self) -> Offer | None:
        """The highest snapshot that any connected peer offers, of those that disappointed least.

        Raises:
            Unavailable: none does so far, and too few have said so to replay the whole log.
        """
        if self._first_asked is None:
            self._first_asked = trio.current_time()
        best: Offer | None = None
        unknown = known = 0
        for peer in sorted(self._network.connected):
            try:
                offer = await self._offer_of(peer)
            except (Rejected, Unavailable) as error:
                log.info("snapshot of %s: %s", peer.hex()[:16], error)
                if peer not in self._network.connected:
                    continue  # a link that broke says nothing about what its peer holds
                self._disappointments[peer] += 1
                if self._disappointments[peer] < PATIENCE:
                    unknown += 1
                else:
                    known += 1
                continue
            known += 1
            if offer and (best is None or self._rank(offer) > self._rank(best)):
                best = offer
        settled = trio.current_time() - self._first_asked > SETTLE_SECONDS
        if best is None and (unknown or not known or (2 * known < self._network.peer_count and not settled)):
            raise Unavailable(f"{known} of {self._network.peer_count} peers have said that they offer nothing")
        return best

    def _rank(self, offer: Offer) -> tuple[int, int]:
        return -self._disappointments[offer.peer], offer.state.header.height

    async def _offer_of(self, peer: MemberId) -> Offer | None:
        """What one peer offers, verified.

        Raises:
            Rejected: the first thing wrong with it. Unavailable: no answer.
        """
        epochs, links = self._ledger.epochs, self._ledger.links
        while True:
            encoded = await self._ask(peer, GetSnapshot(len(epochs.epochs) - 1))
            answer = decode(encoded, Snapshot, MAX_ANSWER_BYTES)
            epochs = await trio.to_thread.run_sync(epochs.follow, answer.links)
            links += answer.links
            if answer.header:
                break
            if not answer.links:
                return None
        return await trio.to_thread.run_sync(_verified, peer, answer, epochs, links)

    async def _state(self, offer: Offer) -> StateMap | None:
        """The state of an offer, from whoever has it; None when nobody has all of it (any more).

        A true part may bring next to nothing, for ever: a peer that over time brings less than
        ``LEAST_BYTES_PER_SECOND`` is asked no more, as one that lies or fails.
        """
        root = offer.state.header.state_root
        entries: dict[bytes, bytes] = {}
        start: bytes | None = bytes(KEY_BYTES)
        patience: dict[MemberId, float] = {}
        turns = Turns()
        while start is not None:
            peers = [peer for peer in sorted(self._network.connected) if patience.get(peer, PATIENCE_SECONDS) > 0]
            if not peers:
                return None
            peer = turns.order(peers)[0]
            began_time = trio.current_time()
            earned_seconds = 0.0
            try:
                with turns.of(peer):
                    answer = decode(await self._ask(peer, GetState(root, start)), StatePart, MAX_ANSWER_BYTES)
                    found, start = await trio.to_thread.run_sync(verified_part, root, start, answer)
                new_bytes = sum(len(key) + len(value) for key, value in found.items() if key not in entries)
                earned_seconds = new_bytes / LEAST_BYTES_PER_SECOND
                entries.update(found)
            except (Rejected, Unavailable) as error:
                log.info("state of %s: %s", peer.hex()[:16], error)
                if isinstance(error, Refused) and error.why == Reason.OVERLOADED:
                    await trio.sleep(1)
                else:
                    earned_seconds = -PATIENCE_SECONDS
            spent_seconds = trio.current_time() - began_time
            left_seconds = patience.get(peer, PATIENCE_SECONDS) + earned_seconds - spent_seconds
            patience[peer] = min(PATIENCE_SECONDS, left_seconds)
        state = StateMap().set_many(entries)
        if state.root != root:
            raise InvariantBroken("parts of a state were proved complete and do not make it")
        return state

    async def _ask(self, peer: MemberId, request: GetSnapshot | GetState) -> bytes:
        return await self._network.request(peer, encode(request), REQUEST_SECONDS)


def state_part(state: StateMap, start: bytes, target_bytes: int | None = None) -> StatePart:
    """Prefixes from ``start`` on with all their entries, until they make an answer.

    ``target_bytes`` is what the answer aims at, ``PART_TARGET_BYTES`` by default. The first prefix may begin before
    ``start``: whoever was left by another server between two neighbouring keys would else need some thirty answers to
    get out of there.
    """
    target_bytes = PART_TARGET_BYTES if target_bytes is None else target_bytes
    proofs: list[tuple[bytes, PrefixProof]] = []
    size_bytes = 0
    at: bytes | None = start
    least_length = 0
    while at is not None and size_bytes < target_bytes and len(proofs) < MAX_PARTS:
        prefix = _widest(state, at, target_bytes, least_length)
        proof = state.prove_prefix(prefix)
        proofs.append((prefix, proof))
        size_bytes += sum(len(key) + len(value) for key, value in proof.entries) + 40 * len(proof.path)
        at = _after(prefix)
        least_length = 0 if at is None else len(at.rstrip(b"\x00"))  # a shorter one was too wide before
    return StatePart(tuple(proofs))


def verified_part(root: bytes, start: bytes, part: StatePart) -> tuple[dict[bytes, bytes], bytes | None]:
    """The entries of a part of the state of ``root``, and the key to go on from; None at the end.

    Raises:
        Rejected: ``BAD_PROOF``: a gap, or entries that are not all there are.
    """
    entries: dict[bytes, bytes] = {}
    at: bytes | None = start
    for prefix, proof in part.proofs:
        if at is None or not at.startswith(prefix):
            raise Rejected(Reason.BAD_PROOF, f"prefix {prefix.hex()} does not go on where the one before ends")
        entries.update(verify_prefix_proof(root, prefix, proof))
        at = _after(prefix)
    return entries, at


def _widest(state: StateMap, at: bytes, target_bytes: int, least_length: int) -> bytes:
    """The shortest prefix of a key, of some length at least, whose entries make no more than a part."""
    for length in range(least_length, KEY_BYTES):
        size_bytes = 0
        for count, (key, value) in enumerate(state.items_with_prefix(at[:length]), start=1):
            size_bytes += len(key) + len(value)
            if size_bytes > target_bytes or count > MAX_PREFIX_ENTRIES:
                break
        else:
            return at[:length]
    return at


def _after(prefix: bytes) -> bytes | None:
    """The first key after all that begin with ``prefix``; None where there is none."""
    following = int.from_bytes(prefix, "big") + 1
    if following >= 1 << 8 * len(prefix):
        return None
    return following.to_bytes(len(prefix), "big").ljust(KEY_BYTES, b"\x00")


def _verified(peer: MemberId, answer: Snapshot, epochs: Anchor, links: tuple[EpochLink, ...]) -> Offer:
    header = verify_header(epochs, answer.header, answer.certificate)
    frontier = Frontier.from_bytes(answer.frontier)
    if (frontier.size, frontier.root) != (header.log_size, header.log_root):
        raise Rejected(Reason.LOG_ROOT_MISMATCH, f"a frontier that is not ledger block {header.height}'s")
    state = LedgerState(header, header.digest, frontier, StateMap())
    return Offer(peer, links[: header.epoch], decode_certificate(answer.certificate), state)


def _that_fit(links: tuple[EpochLink, ...]) -> Iterator[EpochLink]:
    size_bytes = 0
    for link in links:
        size_bytes += len(encode(link))
        if size_bytes > ANSWER_TARGET_BYTES:
            return
        yield link
