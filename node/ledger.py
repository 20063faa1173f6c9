"""The finalized log on disk and the branches above it in memory.

Opening checks what the disk says before it is used: the head's header against its certificate and the
pinned genesis, the state map's root and the tree's root against the header. A write-ahead log that
vanished, a restored backup or a flipped byte in the state ends here, by name, not in a fork.

The members that judge a ledger block are those of its epoch: the links to all epochs so far are kept beside the log
(``epoch_end``) and checked when it is opened. What comes next is judged by the newest.

One ledger block is one atomic write (``store.commit``), durable after ``sync``. Branches that are not
final live in ``overlays`` and never touch the disk.

A log may begin at a snapshot (``snapshot.py``), with what stands below it filled up later (``history.py``). Until it is
whole, what would need the missing part raises ``Unavailable``: an answer from half a log would look like one from all
of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consensus import merkle
from consensus.block import Body, Header, decode_header
from consensus.certificate import Certificate, CertificateScheme
from consensus.codec import decode, encode
from consensus.epochs import MAX_LINKS_BYTES, Anchor, EpochLink, Pin, anchor, verify_header
from consensus.event import CheckedEvent, check_event, check_parts, pack_parts
from consensus.identifiers import Digest, Height
from consensus.membership import Committee, Genesis
from consensus.merkle import Frontier
from consensus.portions import GrantedSource, ManifestRange, SourceClaim, SourceRefusal, SourceRevocation, SourceUse
from consensus.receipt import Receipt, StateReceipt
from consensus.rejection import InvariantBroken, Reason, Rejected, Unavailable
from consensus.state_map import StateMap
from consensus.transition import Built, LedgerState, apply, genesis_state
from consensus.vote import Vote
from node.epoch_end import Certified, link_of
from node.store import Store
from node.store_layout import BaseWrite, BlockWrite, EntryWrite, History

MAX_CERTIFICATE_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 18
MAX_VOTE_BYTES = 1 << 16
KIND_TERM, CAMPAIGN_TERM, SOURCE_TERM, AUTHOR_TERM = b"k", b"c", b"s", b"a"
_SOURCE_ITEMS = (GrantedSource, ManifestRange, SourceRefusal, SourceRevocation, SourceUse)


@dataclass(frozen=True, slots=True)
class Finalized:
    """What one ledger block appended, for those who wait for it."""

    header: Header
    events: tuple[CheckedEvent, ...]


class Ledger:
    """One chain's log: finalized on disk, branches in memory."""

    def __init__(self, store: Store, genesis: Genesis, pin: Pin | None = None) -> None:
        """Read the head and check it, with a genesis that ``check_genesis`` has accepted.

        ``pin`` is what the log must begin with: no ledger block is appended by which it would not.

        Raises:
            InvariantBroken: the disk does not hold what its head's certificate vouches for, run
                ``countersign log fsck`` and ``countersign log repair``; or another log than ``pin``'s.
        """
        self.store = store
        self.genesis = genesis
        self.epochs: Anchor = anchor(genesis, genesis.chain_id)
        self.links: tuple[EpochLink, ...] = ()
        self.certificate: Certificate | None = None
        self._onward: tuple[bytes, ...] = ()
        self.final = self._load()
        self.overlays: dict[Digest, Built] = {}
        self._pin = pin
        self._hold_disk_to_pin()

    @property
    def committee(self) -> Committee:
        """The members of the newest epoch: they make the ledger block after the final one."""
        return self.epochs.newest.committee

    @property
    def final_view(self) -> int:
        """View of the final ledger block in the newest epoch: 0 where that begins at it, since views count anew."""
        header = self.final.header
        return header.view if header.epoch == self.committee.epoch else 0

    @property
    def missing_blocks(self) -> int:
        """How many ledger blocks are missing below the snapshot this log began at; 0 where it is whole."""
        history = self.store.history()
        return 0 if history is None else history.base_height - history.next_height + 1

    def header_at(self, height: int) -> Header:
        """The header of a ledger block that is here.

        Raises:
            InvariantBroken: the disk does not hold it.
        """
        try:
            return decode_header(self.store.header(height) or b"", self.genesis.chain_id)
        except Rejected as error:
            raise _damaged(error) from error

    def filled_frontier(self, history: History) -> Frontier:
        """The tree of what is filled up below the snapshot this log began at.

        Raises:
            InvariantBroken: the disk holds another tree than the last ledger block's there.
        """
        header = self.header_at(history.next_height - 1)
        try:
            frontier = Frontier.from_bytes(history.frontier)
            if (frontier.size, frontier.root) != (header.log_size, header.log_root):
                raise Rejected(Reason.LOG_ROOT_MISMATCH, f"the tree filled up is not ledger block {header.height}'s")
        except Rejected as error:
            raise _damaged(error) from error
        return frontier

    def require_whole(self) -> None:
        """Nothing is missing below the snapshot this log began at.

        Raises:
            Unavailable: it is, and how much.
        """
        history = self.store.history()
        if history is not None:
            raise Unavailable(
                f"this node began at a snapshot and still fetches the log below ledger block {history.base_height}; "
                f"it has come to {history.next_height - 1}"
            )

    @property
    def scheme(self) -> CertificateScheme:
        """How the newest epoch certifies."""
        return self.epochs.newest.scheme

    def hold_to_pin(self, before: Frontier, leaf_hashes: Sequence[bytes]) -> None:
        """Leaves after those of ``before`` are what the pin says, as far as it goes.

        Raises:
            InvariantBroken: they are not.
        """
        pin = self._pin
        if pin is not None and before.size < pin.log_size <= before.size + len(leaf_hashes):
            root = before.append(leaf_hashes[: pin.log_size - before.size]).root
            if root != pin.log_root:
                raise InvariantBroken(_another_log(pin, root))

    def _hold_disk_to_pin(self) -> None:
        pin, history = self._pin, self.store.history()
        frontier = self.final.frontier if history is None else self.filled_frontier(history)
        if pin is None or frontier.size < pin.log_size:
            return
        proof = merkle.consistency_proof(pin.log_size, frontier.size, self.node)
        try:
            merkle.verify_consistency(pin.log_size, frontier.size, proof, pin.log_root, frontier.root)
        except Rejected as error:
            raise InvariantBroken(_another_log(pin)) from error

    def _load(self) -> LedgerState:
        head = self.store.head()
        start = genesis_state(self.genesis.chain_id, self.genesis.created_ms)
        if head is None:
            self.store.commit([_block_write(start, Built(start, Body(()), (), {}, (), ()), None, ())])
            return start
        if head.height == 0:
            return start
        try:
            encoded_header, encoded_certificate = self.store.header(head.height), self.store.certificate(head.height)
            if encoded_header is None or encoded_certificate is None:
                raise Rejected(Reason.BAD_CERTIFICATE, f"ledger block {head.height} has no header or certificate")
            self.links = tuple(decode(link, EpochLink, MAX_LINKS_BYTES) for link in self.store.epoch_links())
            self.epochs = self.epochs.follow(self.links)
            header = decode_header(encoded_header, self.genesis.chain_id)
            certified = Certified.decode(encoded_certificate)
            verify_header(
                self.epochs,
                certified.header(encoded_header, self.genesis.chain_id),
                encode(certified.certificate),
            )
            frontier = Frontier.from_bytes(head.frontier)
            if (frontier.size, frontier.root) != (header.log_size, header.log_root):
                raise Rejected(Reason.LOG_ROOT_MISMATCH, f"the tree on disk is not ledger block {head.height}'s")
            state = StateMap().set_many(dict(self.store.state_items()))
            if state.root != header.state_root:
                raise Rejected(Reason.STATE_ROOT_MISMATCH, f"the state on disk is not ledger block {head.height}'s")
        except Rejected as error:
            raise _damaged(error) from error
        self.certificate, self._onward = certified.certificate, certified.onward
        return LedgerState(header, header.digest, frontier, state)

    def begin_at(self, state: LedgerState, links: tuple[EpochLink, ...], certificate: Certificate) -> None:
        """Begin at a verified snapshot, where the log has nothing yet; ``links`` lead from the genesis to its epoch.

        Raises:
            InvariantBroken: the log has begun, or the write failed.
        """
        header = state.header
        base = BaseWrite(
            height=Height(header.height),
            digest=state.digest,
            header=encode(header),
            certificate=Certified((), certificate).encode(),
            state=dict(state.state.items()),
            log_size=header.log_size,
            frontier=state.frontier.to_bytes(),
            peaks=tuple(state.frontier.nodes()),
            epoch_links=tuple(encode(link) for link in links),
        )
        missing = History(self.final.header.height + 1, header.height, header.log_size, self.final.frontier.to_bytes())
        epochs = self.epochs.led_by(links)
        self.store.begin_at(base, missing)
        self.epochs, self.links = epochs, links
        self.final, self.certificate, self._onward = state, certificate, ()
        self.overlays = {}

    # Branches

    def state_of(self, digest: Digest) -> LedgerState | None:
        """The state after a ledger block: the finalized head or one on a branch above it."""
        if digest == self.final.digest:
            return self.final
        built = self.overlays.get(digest)
        return built.state if built else None

    def verify(self, parent: LedgerState, header: Header, body: Body, events: Sequence[CheckedEvent]) -> LedgerState:
        """Apply a proposed ledger block to its branch, keep the result and return the state after it.

        Raises:
            Rejected: the rule it breaks.
        """
        built = apply(parent, header, body, events, self.epochs.of(header.epoch).committee)
        self.overlays[built.state.digest] = built
        return built.state

    def keep(self, built: Built) -> None:
        """Keep a ledger block of our own making as a branch."""
        self.overlays[built.state.digest] = built

    # Finality

    def commit(
        self, headers: Sequence[Header], certificate: Certificate, votes: Iterable[Vote]
    ) -> tuple[Finalized, ...]:
        """Append finalized ledger blocks from their branch, oldest first, in one atomic write.

        Of an epoch that ends among them only those up to the terminal one are appended: the rest are carriers.

        ``certificate`` and ``votes`` are the last one's. Those on the log already are skipped. Written, not
        yet durable: ``store.sync`` makes it so.

        Raises:
            InvariantBroken: they do not follow the head, or their branch is unknown.
        """
        written: list[BlockWrite] = []
        appended: list[Finalized] = []
        final = self.final
        certified = Certified((), certificate)
        link: EpochLink | None = None
        for header in headers:
            if header.height <= final.header.height or header.epoch < self.committee.epoch:
                continue
            built = self.overlays.get(header.digest)
            if built is None or header.parent != final.digest:
                raise InvariantBroken(f"ledger block {header.height} is final but its branch is not here")
            self.hold_to_pin(final.frontier, built.body.leaf_hashes)
            last = header is headers[-1] or built.state.is_terminal
            if last:
                onward = tuple(encode(carrier) for carrier in headers if carrier.height > header.height)
                certified = Certified(onward, certificate)
            link = link_of(built, certified) if last and built.state.is_terminal else None
            kept = votes if last and not certified.onward else ()
            written.append(_block_write(final, built, certified.encode() if last else None, kept, link))
            appended.append(Finalized(header, built.events))
            final = built.state
            if link is not None:
                break
        if not written:
            return ()
        epochs = self.epochs if link is None else self.epochs.follow([link])
        self.store.commit(written)
        if link is not None:
            self.epochs, self.links = epochs, (*self.links, link)
        self.final = final
        self.certificate, self._onward = certified.certificate, certified.onward
        height = final.header.height
        self.overlays = {
            digest: branch
            for digest, branch in self.overlays.items()
            if branch.state.header.height > height and branch.state.header.epoch == self.committee.epoch
        }
        return tuple(appended)

    # Reading

    def event(self, index: int) -> tuple[bytes, bytes]:
        """Entry and portions at a log index.

        Raises:
            Rejected: ``NOT_FOUND``. Unavailable: as ``require_whole``.
        """
        entry, portions = self.store.entry(index), self.store.portions(index)
        if entry is None or portions is None:
            if index < self.final.header.log_size:
                self.require_whole()
            raise Rejected(Reason.NOT_FOUND, f"the log has no index {index}")
        return entry, portions

    def index_of(self, event_id: Digest) -> int:
        """Log index of an event.

        Raises:
            Rejected: ``NOT_FOUND``. Unavailable: as ``require_whole``.
        """
        index = self.store.index_of_event(event_id)
        if index is None:
            self.require_whole()
            raise Rejected(Reason.NOT_FOUND, f"event {event_id.hex()} is not on the log")
        return index

    def block(self, height: int) -> tuple[bytes, bytes, list[bytes]]:
        """Header, body and signed events (wire form) of a finalized ledger block.

        Raises:
            Rejected: ``NOT_FOUND``. Unavailable: as ``require_whole``.
        """
        header, body = self.store.header(height), self.store.body(height)
        if header is None or body is None:
            if height <= self.final.header.height:
                self.require_whole()
            raise Rejected(Reason.NOT_FOUND, f"the log has no ledger block {height}")
        decoded = decode_header(header, self.genesis.chain_id)
        first = decoded.log_size - decoded.event_count
        return header, body, [pack_parts(*self.event(index)) for index in range(first, decoded.log_size)]

    def node(self, level: int, index: int) -> bytes:
        """A node of the Merkle tree.

        Raises:
            InvariantBroken: it is missing. Unavailable: it is below a snapshot and not fetched yet.
        """
        held = self.store.node(level, index)
        if held is None:
            self.require_whole()
            raise InvariantBroken(f"tree node {level}/{index} is missing: run 'countersign log fsck'")
        return held

    def certified(self, height: int) -> tuple[bytes, bytes]:
        """Header and certificate of the first certified ledger block from ``height`` on.

        Raises:
            Rejected: ``NOT_FOUND``.
        """
        certified = self.store.certified_at_or_after(height)
        header = self.store.header(certified) if certified is not None else None
        certificate = self.store.certificate(certified) if certified is not None else None
        if header is None or certificate is None:
            raise Rejected(Reason.NOT_FOUND, f"no certified ledger block from height {height} on")
        held = Certified.decode(certificate)
        return held.header(header, self.genesis.chain_id), encode(held.certificate)

    def end_of(self, epoch: int) -> int:
        """Height of the terminal ledger block of an epoch that has ended.

        Raises:
            Unavailable: as ``require_whole``.
        """
        size = self.epochs.of(epoch).end_size
        height = None if size is None else self.store.height_of_index(size - 1)
        if height is None:
            self.require_whole()
            raise InvariantBroken(f"epoch {epoch} has no last ledger block: run 'countersign log fsck'")
        return height

    @property
    def final_certified(self) -> tuple[bytes, bytes]:
        """A header with the final log and state, and its certificate: the final ledger block's or its carrier's.

        Raises:
            Rejected: ``NOT_FOUND`` on an empty log.
        """
        if self.certificate is None:
            raise Rejected(Reason.NOT_FOUND, "no ledger block is final yet")
        return self._onward[-1] if self._onward else encode(self.final.header), encode(self.certificate)

    def receipt(self, event_id: Digest) -> Receipt:
        """Proof that an event is on the log.

        Raises:
            Rejected: ``NOT_FOUND``.
        """
        index = self.index_of(event_id)
        height = self.store.height_of_index(index)
        assert height is not None
        header, certificate = self.certified(height)
        size = decode_header(header, self.genesis.chain_id).log_size
        return Receipt(
            1,
            self.event(index)[0],
            index,
            merkle.inclusion_proof(index, size, self.node),
            header,
            certificate,
            self._links_to(header),
        )

    def state_receipt(self, key: bytes) -> StateReceipt:
        """Proof of what the finalized state holds under a key, or that it holds nothing; with the links to all epochs.

        Raises:
            Rejected: ``NOT_FOUND`` on an empty log.
        """
        header, certificate = self.final_certified
        return StateReceipt(1, key, self.final.state.prove(key), header, certificate, self.links)

    def _links_to(self, header: bytes) -> tuple[EpochLink, ...]:
        """The links that lead to a header's epoch."""
        return self.links[: decode_header(header, self.genesis.chain_id).epoch]

    def check(self, signed_event: bytes) -> CheckedEvent:
        """``check_event`` against the members of the newest epoch.

        Raises:
            Rejected: the first rule broken.
        """
        return check_event(signed_event, self.committee)

    def votes(self, height: int) -> list[Vote]:
        """The identity votes kept behind a finalized ledger block."""
        kept = self.store.votes(height) or b""
        votes = []
        position = 0
        while position < len(kept):
            end = position + 4 + int.from_bytes(kept[position : position + 4], "big")
            votes.append(decode(kept[position + 4 : end], Vote, MAX_VOTE_BYTES))
            position = end
        return votes

    def checked(self, index: int) -> CheckedEvent:
        """The event at a log index, checked again."""
        return check_parts(*self.event(index), self.epochs.at(index).committee)


def _damaged(error: Rejected) -> InvariantBroken:
    return InvariantBroken(
        f"the data directory is damaged ({error}): run 'countersign log fsck', then 'countersign log repair'"
    )


def _another_log(pin: Pin, root: bytes = b"") -> str:
    found = f", which have root {root.hex()}" if root else ""
    return (
        f"the log does not begin with the {pin.log_size} entries of node.checkpoint, root {pin.log_root.hex()}{found}: "
        "this is another history. Find out who tells it; then start with an empty data directory"
    )


def _block_write(
    parent: LedgerState,
    built: Built,
    certificate: bytes | None,
    votes: Iterable[Vote],
    link: EpochLink | None = None,
) -> BlockWrite:
    header = built.state.header
    first_index = parent.header.log_size
    return BlockWrite(
        height=Height(header.height),
        digest=built.state.digest,
        header=encode(header),
        body=encode(built.body),
        certificate=certificate,
        votes=b"".join(framed(encode(vote)) for vote in votes),
        entries=entry_writes(first_index, built.events),
        nodes=built.nodes,
        state_changes=built.changes,
        log_size=header.log_size,
        frontier=built.state.frontier.to_bytes(),
        epoch_link=None if link is None else (header.epoch + 1, encode(link)),
    )


def entry_writes(first_index: int, events: Iterable[CheckedEvent]) -> tuple[EntryWrite, ...]:
    """What the disk keeps of consecutive events."""
    return tuple(
        EntryWrite(
            first_index + offset,
            event.entry_bytes,
            event.portions_bytes,
            event.id,
            event.leaf_hash,
            index_terms(event),
        )
        for offset, event in enumerate(events)
    )


def framed(payload: bytes) -> bytes:
    """``payload`` after its length as 4 bytes big-endian."""
    return len(payload).to_bytes(4, "big") + payload


def index_terms(event: CheckedEvent) -> tuple[bytes, ...]:
    """What ``Store.scan`` lists an event under: kind, author, campaign, each source it names."""
    entry = event.entry
    terms = [KIND_TERM + entry.kind.encode(), AUTHOR_TERM + entry.author]
    if entry.campaign != bytes(32):
        terms.append(CAMPAIGN_TERM + entry.campaign)
    for item in event.items:
        if isinstance(item, _SOURCE_ITEMS):
            terms.append(SOURCE_TERM + item.source)
        elif isinstance(item, SourceClaim):
            terms.append(SOURCE_TERM + event.id)
    return tuple(dict.fromkeys(terms))
