"""``countersign log fsck``: recompute a stopped node's data directory from its genesis, and name what differs.

Reads the database below ``Store``, so that damage which stops a node from starting does not stop the check, and
changes nothing. In order, per ledger block:

1. header: canonical, of this chain, at its height, naming its predecessor's digest, within its epoch: what leads on
   from the end of one is no part of the log;
2. certificate, where there is one: of this header or a carrier after it, by a quorum of every role of its epoch; the
   head has one, and so has each epoch's last ledger block;
3. body: the one the header names; votes: signed by members, for this view;
4. events: bytes that hash to the body's leaves, portions that hash to the entry's commitments, signatures;
5. tree: every complete node, and the root and size the header names;
6. rules: the events applied again to the state since genesis, and the root the header names;
7. lookups and listings of all of these.

A log that began at a snapshot and is not filled up yet is checked as far as it goes: the part from the genesis on as
above; the ledger block it began at, by its certificate and the peaks of its tree; those after it, of which the rules
alone cannot be applied again. What is missing in between is counted and is no damage.

The links between epochs come first: who certifies what follows from them, and they from the genesis.
Then head, every value of the state, and that no column family holds anything more. After damage that a later
check builds on, that check stops and says from where on; the others go on. The vote journal is not covered: the
node itself refuses to vote with a damaged or older one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rocksdict import AccessType

from consensus.block import Body, Header, check_body, decode_header, header_digest
from consensus.codec import decode, encode
from consensus.epochs import MAX_LINKS, MAX_LINKS_BYTES, EpochLink, anchor, verify_header
from consensus.event import MAX_ENTRY_BYTES, CheckedEvent, Entry, check_parts, event_id
from consensus.identifiers import Digest
from consensus.membership import Genesis
from consensus.merkle import Frontier, leaf_hash
from consensus.rejection import ConfigError, InvariantBroken, Rejected
from consensus.state_map import StateMap
from consensus.transition import LedgerState, apply, genesis_state
from consensus.vote import Vote, check_vote
from node.epoch_end import Certified
from node.files import DirectoryLock
from node.fsck_reader import Damage, Reader, Report
from node.ledger import MAX_BODY_BYTES, index_terms
from node.store_layout import (
    BY_BLOCK,
    BY_EVENT,
    BY_LEAF,
    BY_LOG_SIZE,
    CHAIN_KEY,
    EPOCH_LINK,
    HEAD_BYTES,
    HEAD_KEY,
    HISTORY_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    Head,
    History,
    open_database,
    term_prefix,
    to_int,
    u64,
    vote_mark_epoch,
    was_never_made,
)

MAX_VOTE_BYTES = 16_384
_META_KEYS = (SCHEMA_KEY, CHAIN_KEY, HEAD_KEY, HISTORY_KEY)

ProgressReport = Callable[[str, int, int], None]
"""Told the stage, how much of it is done, and how much it is in all."""


def check_data_directory(directory: Path, genesis: Genesis, progress: ProgressReport) -> Report:
    """Check the data directory of a stopped node against a genesis that ``check_genesis`` has accepted.

    Raises:
        ConfigError: no data directory there, another process holds it, or it is another chain's.
    """
    path = directory / "rocksdb"
    if not path.exists():
        raise ConfigError(f"{directory}: expected a Countersign data directory, found none")
    report = Report()
    lock = DirectoryLock.acquire(directory)
    try:
        if not (path / "CURRENT").exists():
            unmade = ": never finished; the node does that when it starts" if was_never_made(path) else ""
            report.add("database", str(path / "CURRENT"), f"missing{unmade}")
            return report
        try:
            database = open_database(path, False, AccessType.read_only(False))
        except InvariantBroken as error:
            report.add("database", str(path), str(error))
            return report
        reader = Reader(database, report)
        try:
            _Check(reader, genesis, progress, report).run(directory)
        finally:
            reader.close()
    finally:
        lock.release()
    return report


class _Check:
    """One run. ``None`` in ``_previous``, ``_frontier`` or ``_state`` says that damage cut that chain of checks."""

    def __init__(self, reader: Reader, genesis: Genesis, progress: ProgressReport, report: Report) -> None:
        self._reader = reader
        self._genesis = genesis
        self._epochs = anchor(genesis, genesis.chain_id)
        self._progress = progress
        self._report = report
        start = genesis_state(genesis.chain_id, genesis.created_ms)
        self._state: LedgerState | None = start
        self._frontier: Frontier | None = start.frontier
        self._previous: Digest | None = start.digest
        self._last_header: Header | None = start.header
        self._log_size = 0
        self._missing_heights = self._missing_indexes = range(0)
        """What a log that began at a snapshot lacks below it, the ledger block it began at included."""
        self._base_peaks: tuple[bytes, ...] = ()
        self._expected: Counter[str] = Counter()

    def run(self, directory: Path) -> None:
        self._check_meta(directory)
        self._follow_links()
        head = self._read_head()
        height = head.height if head is not None else self._newest_header()
        if head is not None or height:
            self._check_genesis_block()
        history = self._read_history(height)
        if history is None:
            self._check_blocks(1, height, height)
        else:
            self._check_blocks(1, history.next_height - 1, height)
            self._check_base(history)
            self._check_blocks(history.base_height + 1, height, height)
        self._report.height, self._report.log_size = height, self._log_size
        if head is not None:
            self._check_head(head)
        self._check_state()
        self._check_surplus(height)

    # Meta

    def _check_meta(self, directory: Path) -> None:
        version = self._reader.need("meta", SCHEMA_KEY, "schema version")
        if version is not None and to_int(version) != SCHEMA_VERSION:
            raise ConfigError(f"{directory}: expected schema version {SCHEMA_VERSION}, found {to_int(version)}")
        chain = self._reader.need("meta", CHAIN_KEY, "chain id")
        if chain is not None and chain != self._genesis.chain_id:
            raise ConfigError(f"{directory}: expected chain {self._genesis.chain_id.hex()}, found {chain.hex()}")

    def _follow_links(self) -> None:
        """From genesis as far as the links hold; events and votes of later epochs are then found wanting."""
        for epoch in range(1, MAX_LINKS + 1):
            encoded = self._reader.get("meta", EPOCH_LINK + u64(epoch), f"link to epoch {epoch}")
            if encoded is None:
                return
            try:
                self._epochs = self._epochs.follow([decode(encoded, EpochLink, MAX_LINKS_BYTES)])
            except Rejected as error:
                self._report.add("meta", f"link to epoch {epoch}", str(error))
                return

    def _read_head(self) -> Head | None:
        encoded = self._reader.get("meta", HEAD_KEY, "head")
        if encoded is None:
            if self._newest_header():
                self._report.add("meta", "head", "missing, though there are ledger blocks")
            return None
        if len(encoded) < HEAD_BYTES:
            self._report.add("meta", "head", f"{len(encoded)} bytes")
            return None
        head = Head.decode(encoded)
        if self._reader.get("headers", u64(head.height), f"height {head.height}") is None:
            newest = self._newest_header()
            if head.height > newest:  # up to there nothing is missing: a flipped bit would say so of 2**63 heights
                self._report.add("meta", "head", f"height {head.height}, the newest ledger block is {newest}")
                return None
        return head

    def _read_history(self, height: int) -> History | None:
        """What is missing of the log; None where nothing is, or where that is damaged: then all of it is wanting."""
        encoded = self._reader.get("meta", HISTORY_KEY, "history")
        if encoded is None:
            return None
        history = History.decode(encoded)
        try:
            Frontier.from_bytes(history.frontier)
        except Rejected as error:
            self._report.add("meta", "history", str(error))
            return None
        if not 1 <= history.next_height <= history.base_height <= height:
            found = f"filled up to {history.next_height - 1}, begun at {history.base_height}"
            self._report.add("meta", "history", f"{found}, the newest ledger block is {height}")
            return None
        self._missing_heights = range(history.next_height, history.base_height + 1)
        self._report.missing_blocks = len(self._missing_heights)
        return history

    def _newest_header(self) -> int:
        """The greatest height of which a header says itself that it is of it: a strange key may be any number."""
        newest = 0
        for key, encoded in self._reader.items("headers"):
            try:
                if decode_header(encoded, self._genesis.chain_id).height == to_int(key):
                    newest = to_int(key)
            except Rejected:
                continue
        return newest

    def _check_head(self, head: Head) -> None:
        if self._previous is not None and head.digest != self._previous:
            self._report.add("meta", "head", f"digest {head.digest.hex()}, header {head.height} is another")
        if head.log_size != self._log_size:
            self._report.add("meta", "head", f"log size {head.log_size}, the headers say {self._log_size}")
        if self._frontier is not None and head.frontier != self._frontier.to_bytes():
            self._report.add("meta", "head", "its frontier is not the tree's")
        if head.height and self._reader.get("certificates", u64(head.height), f"height {head.height}") is None:
            self._report.add("certificates", f"height {head.height}", "missing: nothing vouches for the head")

    # Ledger blocks

    def _check_genesis_block(self) -> None:
        """Height 0 follows from the genesis, is certified by nobody and appends nothing."""
        header = genesis_state(self._genesis.chain_id, self._genesis.created_ms).header
        for family, expected in (("headers", encode(header)), ("bodies", encode(Body(()))), ("votes", b"")):
            found = self._reader.need(family, u64(0), "height 0")
            if found is not None and found != expected:
                self._report.add(family, "height 0", "not what the genesis makes it")
        self._check_lookup(BY_BLOCK + header.digest, f"ledger block {header.digest.hex()}", 0)

    def _check_blocks(self, first: int, last: int, height: int) -> None:
        for at in range(first, last + 1):
            self._check_block(at)
            self._progress("ledger blocks", at, height)

    def _check_base(self, history: History) -> None:
        """The ledger block that the log began at: header, certificate and tree; its body is missing as those below."""
        name = f"height {history.base_height}"
        if self._frontier is not None and history.frontier != self._frontier.to_bytes():
            self._report.add("meta", "history", "its frontier is not the tree's")
        if history.next_height < history.base_height:
            self._previous = None
        self._missing_indexes = range(self._log_size, history.base_size)
        placed = Frontier(history.base_size, (Digest(bytes(32)),) * history.base_size.bit_count()).nodes()
        self._base_peaks = tuple(bytes([level]) + u64(index) for level, index, _ in placed)
        self._log_size = history.base_size
        self._state = None
        encoded = self._reader.need("headers", u64(history.base_height), name)
        header = self._checked_header(history.base_height, encoded) if encoded is not None else None
        if header is None:
            self._previous = self._last_header = None
            self._cut_tree(name)
            return
        self._previous, self._last_header = header.digest, header
        self._check_epoch(name, header)
        self._check_lookup(BY_BLOCK + header.digest, f"ledger block {header.digest.hex()}", history.base_height)
        if self._reader.need("certificates", u64(history.base_height), name) is not None:
            self._check_certificate(name, header)
        if history.base_size != header.log_size:
            self._report.add("meta", "history", f"log size {history.base_size}, {name} says {header.log_size}")
        found = [self._reader.need("nodes", key, f"level {key[0]} index {to_int(key[1:])}") for key in self._base_peaks]
        frontier = Frontier(history.base_size, tuple(Digest(peak) for peak in found if peak is not None))
        self._frontier = frontier
        if len(frontier.peaks) < len(found):
            self._cut_tree(name)
        elif frontier.root != header.log_root:
            differs = f"root {frontier.root.hex()}, expected {header.log_root.hex()}"
            self._report.add("nodes", f"peaks at {name}", differs)
            self._cut_tree(name)

    def _check_block(self, height: int) -> None:
        name = f"height {height}"
        encoded = self._reader.need("headers", u64(height), name)
        header = self._checked_header(height, encoded) if encoded is not None else None
        if header is None:
            self._previous = self._last_header = None
            self._cut_state(height)
            return
        after_gap = self._last_header is None
        self._previous, self._last_header = header.digest, header
        self._check_epoch(name, header)
        self._check_lookup(BY_BLOCK + header.digest, f"ledger block {header.digest.hex()}", height)
        self._check_certificate(name, header)
        self._check_votes(name, header)
        body = self._checked_body(name, header)
        first = header.log_size - header.event_count
        if first != self._log_size and not after_gap:
            self._report.add("headers", name, f"events from index {first} on, expected {self._log_size}")
        if first != self._log_size:
            self._cut_tree(name)
        self._log_size = header.log_size
        if header.event_count:
            self._check_lookup(BY_LOG_SIZE + u64(header.log_size), f"log size {header.log_size}", height)
        leaves = body.leaf_hashes if body is not None else (None,) * header.event_count
        events = [self._checked_event(first + offset, leaf) for offset, leaf in enumerate(leaves)]
        self._check_tree(name, header, first, leaves)
        self._apply(height, header, body, events)

    def _checked_header(self, height: int, encoded: bytes) -> Header | None:
        name = f"height {height}"
        try:
            header = decode_header(encoded, self._genesis.chain_id)
        except Rejected as error:
            self._report.add("headers", name, str(error))
            return None
        if header.height != height:
            self._report.add("headers", name, f"holds the header of height {header.height}")
            return None
        if self._previous is not None and header.parent != self._previous:
            self._report.add("headers", name, f"parent {header.parent.hex()}, header {height - 1} is another")
        return header

    def _check_epoch(self, name: str, header: Header) -> None:
        """An epoch's keys go on certifying after its end, so a certificate alone does not make a header the log's."""
        if header.epoch >= len(self._epochs.epochs):
            return  # no certificate of it holds, which is noted
        keys, first = self._epochs.of(header.epoch), header.log_size - header.event_count
        end = keys.end_size
        if first < keys.first_index or (end is not None and (first >= end or header.log_size > end)):
            within = f"epoch {header.epoch}, which reaches from index {keys.first_index} to before {end}"
            self._report.add("headers", name, f"of {within}; its events would be from index {first} on")

    def _check_certificate(self, name: str, header: Header) -> None:
        # Nobody can be served across the end of an epoch without one: those of the next epoch do not count there.
        ended = header.epoch < len(self._epochs.epochs) and self._epochs.of(header.epoch).end_size == header.log_size
        wanted = self._reader.need if ended else self._reader.get
        encoded = wanted("certificates", u64(header.height), name)
        if encoded is None:
            return
        try:
            certified = Certified.decode(encoded)
            of_header = certified.header(encode(header), self._genesis.chain_id)
            verify_header(self._epochs, of_header, encode(certified.certificate))
        except Rejected as error:
            self._report.add("certificates", name, str(error))

    def _check_votes(self, name: str, header: Header) -> None:
        encoded = self._reader.need("votes", u64(header.height), name)
        at = 0
        try:
            while encoded and at < len(encoded):
                end = at + 4 + to_int(encoded[at : at + 4])
                vote = decode(encoded[at + 4 : end], Vote, MAX_VOTE_BYTES)
                check_vote(vote, self._epochs.of(header.epoch).committee)
                if vote.view != header.view:
                    self._report.add("votes", name, f"a vote of view {vote.view}, expected {header.view}")
                at = end
        except Rejected as error:
            self._report.add("votes", name, f"at byte {at}: {error}")

    def _checked_body(self, name: str, header: Header) -> Body | None:
        encoded = self._reader.need("bodies", u64(header.height), name)
        if encoded is None:
            return None
        try:
            body = decode(encoded, Body, MAX_BODY_BYTES)
            check_body(header, body)
        except Rejected as error:
            self._report.add("bodies", name, str(error))
            return None
        return body

    # Events

    def _checked_event(self, index: int, leaf: bytes | None) -> CheckedEvent | None:
        """The event at a log index; None where it is damaged. ``leaf`` is the body's, None where that is lost."""
        name = f"index {index}"
        self._expected["lookup"] += 2
        entry = self._reader.need("entries", u64(index), name)
        portions = self._reader.need("portions", u64(index), name)
        if entry is None:
            return None
        found = leaf_hash(entry)
        if leaf is not None and found != leaf:
            self._report.add("entries", name, f"leaf hash {found.hex()}, the body has {leaf.hex()}")
            return None
        self._check_lookup(BY_LEAF + found, f"leaf {found.hex()}", index, counted=False)
        if portions is None:
            return None
        try:
            event = check_parts(entry, portions, self._epochs.at(index).committee)
        except Rejected as error:
            self._report.add("entries" if leaf is None else "portions", name, str(error))
            return None
        self._check_lookup(BY_EVENT + event.id, f"event {event.id.hex()}", index, counted=False)
        for listed_under in index_terms(event):
            self._expected["index"] += 1
            key_name = f"term {listed_under.hex()} {name}"
            self._reader.need("index", term_prefix(listed_under) + u64(index), key_name)
        return event

    def _check_lookup(self, key: bytes, name: str, value: int, counted: bool = True) -> None:
        if counted:
            self._expected["lookup"] += 1
        found = self._reader.need("lookup", key, name)
        if found is not None and to_int(found) != value:
            self._report.add("lookup", name, f"says {to_int(found)}, expected {value}")

    # Tree and state

    def _check_tree(self, name: str, header: Header, first: int, leaves: Sequence[bytes | None]) -> None:
        known = [leaf for leaf in leaves if leaf is not None]
        if self._frontier is None or len(known) != len(leaves):
            self._cut_tree(name)
            return
        grown, interior = self._frontier.append_with_nodes(known)
        nodes = [*((0, first + offset, leaf) for offset, leaf in enumerate(known)), *interior]
        for level, index, digest in nodes:
            found = self._reader.need("nodes", bytes([level]) + u64(index), f"level {level} index {index}")
            if found is not None and found != digest:
                self._report.add("nodes", f"level {level} index {index}", f"{found.hex()}, expected {digest.hex()}")
        if (grown.size, grown.root) != (header.log_size, header.log_root):
            self._report.add("headers", name, f"log root {header.log_root.hex()}, the tree's is {grown.root.hex()}")
        self._frontier = grown

    def _cut_tree(self, name: str) -> None:
        if self._frontier is not None:
            self._report.add("nodes", f"from {name} on", "not re-checked: a ledger block is damaged")
        self._frontier = None

    def _apply(self, height: int, header: Header, body: Body | None, events: Sequence[CheckedEvent | None]) -> None:
        if self._state is None:
            return
        intact = [event for event in events if event is not None]
        if body is None or len(intact) != len(events):
            self._cut_state(height)
            return
        try:
            members = self._epochs.of(header.epoch).committee
            self._state = apply(self._state, header, body, intact, members).state
        except Rejected as error:
            self._report.add("headers", f"height {height}", f"its events do not apply: {error}")
            self._state = None

    def _cut_state(self, height: int) -> None:
        if self._state is not None:
            self._report.add("state", f"from height {height} on", "rules not re-checked: a ledger block is damaged")
        self._state = None

    def _check_state(self) -> None:
        """Every stored value against the recomputed state, or else all of them against the head's root."""
        stored: dict[bytes, bytes] = {}
        for key, value in self._reader.items("state"):
            stored[key] = value
            self._progress("state values", len(stored), len(stored))
        self._report.state_values = len(stored)
        if self._state is not None:
            recomputed = dict(self._state.state.items())
            for key in sorted(stored.keys() | recomputed.keys()):
                name = f"key {key.hex()}"
                if key not in stored:
                    self._report.add("state", name, "missing")
                elif key not in recomputed:
                    self._report.add("state", name, "does not belong here")
                elif stored[key] != recomputed[key]:
                    self._report.add("state", name, "its value is not what the events make it")
        elif self._last_header is not None:
            try:
                root = StateMap().set_many(stored).root
            except InvariantBroken as error:
                self._report.add("state", "all", str(error))
                return
            if root != self._last_header.state_root:
                self._report.add("state", "all", f"root {root.hex()}, expected {self._last_header.state_root.hex()}")

    # What does not belong here

    def _check_surplus(self, height: int) -> None:
        """Keys beyond the log by their number; lookups and listings, being costly, only where there are too many."""
        for family in ("headers", "bodies", "votes", "certificates", "entries", "portions", "nodes"):
            for key, _ in self._reader.items(family):
                if not self._belongs(family, key, height):
                    self._strange(family, key)
        for key, _ in self._reader.items("meta"):  # read whole: its newest values hide older, damaged blocks
            if key not in _META_KEYS and vote_mark_epoch(key) is None and not self._is_followed_link(key):
                self._strange("meta", key)
        for family, check in (("lookup", self._lookup_belongs), ("index", self._listing_belongs)):
            if sum(1 for _ in self._reader.items(family)) > self._expected[family]:
                for key, value in self._reader.items(family):
                    try:
                        belongs = check(key, value)
                    except Rejected:
                        continue  # what it points to is damaged, and noted
                    if not belongs:
                        self._strange(family, key)

    def _is_followed_link(self, key: bytes) -> bool:
        """Vote marks, in contrast, may be of epochs that the log has yet to come to: a repair carries them over."""
        return any(key == EPOCH_LINK + u64(epoch) for epoch in range(1, len(self._epochs.epochs)))

    def _strange(self, family: str, key: bytes) -> None:
        self._report.add(family, f"key {key.hex()}", "does not belong here")

    def _belongs(self, family: str, key: bytes, height: int) -> bool:
        if family == "nodes":
            if len(key) != 9:
                return False
            last_leaf = ((to_int(key[1:]) + 1) << key[0]) - 1
            is_missing = last_leaf in self._missing_indexes and key not in self._base_peaks
            return last_leaf < self._log_size and not is_missing
        at = to_int(key)
        if family in ("entries", "portions"):
            return len(key) == 8 and at < self._log_size and at not in self._missing_indexes
        if at in self._missing_heights:
            return len(key) == 8 and at == self._missing_heights[-1] and family in ("headers", "certificates")
        return len(key) == 8 and (family == "certificates") <= at <= height

    def _lookup_belongs(self, key: bytes, value: bytes) -> bool:
        table, found, at = key[:1], key[1:], to_int(value)
        if table in (BY_BLOCK, BY_LOG_SIZE):
            header = self._reader.get("headers", u64(at), f"height {at}")
            if header is None:
                return self._last_header is not None and at <= self._last_header.height
            if table == BY_BLOCK:
                return header_digest(header) == found
            return decode_header(header, self._genesis.chain_id).log_size == to_int(found)
        entry = self._reader.get("entries", u64(at), f"index {at}")
        if entry is None:
            return table in (BY_LEAF, BY_EVENT) and at < self._log_size
        if table == BY_LEAF:
            return leaf_hash(entry) == found
        return table == BY_EVENT and event_id(decode(entry, Entry, MAX_ENTRY_BYTES)) == found

    def _listing_belongs(self, key: bytes, _value: bytes) -> bool:
        at = key[-8:]
        entry = self._reader.get("entries", at, f"index {to_int(at)}")
        portions = self._reader.get("portions", at, f"index {to_int(at)}")
        if entry is None or portions is None:
            return to_int(at) < self._log_size  # what it points to is damaged, and noted
        return key[1:-8] in index_terms(check_parts(entry, portions, self._epochs.at(to_int(at)).committee))


__all__ = ["Damage", "Report", "check_data_directory"]
