"""A running node: every part put together from one configuration file.

Start, in order, each step naming what is wrong if it fails: genesis against the pinned chain id; keystore
against the genesis; data directory (lock, chain, head against its certificate); vote journal; network and
HTTP interface listening; then the replica. A voter whose journal is lost or rolled back runs on without
voting and says why.
"""

import ctypes
import gc
import logging
import signal
import statistics
from collections.abc import Sequence

import trio

from consensus.checkpoint import assemble_note, checkpoint_text, sign_note
from consensus.engine import Timing
from consensus.event import CheckedEvent
from consensus.identifiers import VOTING_ROLES, Digest, MemberId
from consensus.keys import Ed25519SigningKey
from consensus.membership import GENESIS_EPOCH, Genesis
from consensus.rejection import InvariantBroken, Reason, Rejected, Unavailable
from consensus.state import EVIDENCE_TABLE, RETIRED_TABLE
from node.api import serve
from node.beacons import BeaconDesk
from node.clock import Clock, SystemClock
from node.config import NodeConfig
from node.countersign import CountersignDesk
from node.custody import CustodyDesk
from node.ended_epochs import leave_ended_epochs
from node.evidence import EvidenceDesk
from node.identity import (
    Identity,
    identity_in,
    later_keystores,
    later_transport_seeds,
    load_genesis,
    load_identity,
    load_pin,
)
from node.intake import Intake
from node.ledger import Ledger
from node.mempool import Mempool
from node.messages import AskCountersign, DeliverSignature, GetBeaconShare, decode_request
from node.metrics import Metrics
from node.network import Network
from node.proposals import MAX_BLOCK_BYTES
from node.replica import Replica, ReplicaCounters, SyncChoice
from node.roster import former_peers, open_peers, why_removed
from node.service import EventState, EventStatus, FinalityFigures, NodeStatus, RoleReach
from node.store import Store
from node.voter import Voter, open_voter

log = logging.getLogger("countersign")

MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``."""
LARGE_BUFFER_BYTES = 512 << 10
"""From which size on a buffer has pages of its own, returned when it is freed."""
KEPT_FREE_BYTES = 4 << 20
"""How much freed memory is kept for the next small ones."""

EVIDENCE_DIRECTORY = "evidence"
BEACON_SHARES_DIRECTORY = "beacon-shares"
CUSTODY_DIRECTORY = "custody"
LATER_KEYS_TRIED_SECONDS = 5.0
"""How long a node without any connection waits before it tries the keys it will have."""
LEAVING_SECONDS = 0.5
"""How long connections stand when an epoch has ended: who leaves gets the certificate that says so."""


class Node:
    """The service behind the HTTP interface."""

    def __init__(self, config: NodeConfig, genesis: Genesis, identity: Identity, clock: Clock) -> None:
        """Open data directory and journal, connect the parts; nothing runs yet.

        Raises:
            ConfigError, InvariantBroken: as ``Store.open`` and ``Ledger``.
        """
        self.config = config
        self._identity = self._first_identity = identity
        self._why_no_member = ""
        self._clock = clock
        self._why_not_voting = ""
        store = Store.open(config.node.data_directory, genesis.chain_id, create=True)
        try:
            self._ledger = Ledger(store, genesis, load_pin(config, genesis))
            self._mempool = Mempool(config.limits.mempool_events, config.limits.mempool_bytes)
            self.network = Network(
                identity.secrets.transport_seed,
                str(config.network.listen),
                open_peers(config, self._ledger.committee),
                protocol_suffix=genesis.chain_id.hex()[:32],
            )
            self._intake = Intake(
                self._ledger,
                self._mempool,
                self.network,
                clock,
                min(genesis.parameters.max_event_bytes, MAX_BLOCK_BYTES),
            )
            if not self._is_genesis_member:
                self._settle_identity()
                self._change_roster(self._identity.secrets.transport_seed)
            self._voter = self._open_voter()
            self._say_why_not_voting()
            self.replica = self._new_replica(ReplicaCounters())
        except BaseException:
            store.close()
            raise
        self.desk = CountersignDesk(
            self._ledger,
            self.network,
            clock,
            identity.member,
            identity.signer,
            config.countersign,
            self.submit,
            self.status_of,
        )
        if not self._is_genesis_member:
            self._desk_begins_epoch()
        self.beacons = BeaconDesk(self._ledger, config.node.data_directory / BEACON_SHARES_DIRECTORY, self.network)
        self.custody = CustodyDesk(config.node.data_directory / CUSTODY_DIRECTORY, config.custody.maximum_bytes)
        self._beacons_begin_epoch()
        self._leave_ended_epochs()
        self._note: tuple[int, bytes] | None = None

    def _new_replica(self, counters: ReplicaCounters) -> Replica:
        config = self.config
        return Replica(
            self._ledger,
            self.network,
            self._mempool,
            self._intake,
            self._clock,
            self._voter,
            Timing(
                config.round.timeout_ms,
                config.round.max_timeout_ms,
                self._ledger.genesis.parameters.heartbeat_ms,
            ),
            EvidenceDesk(
                config.node.data_directory / EVIDENCE_DIRECTORY,
                self._ledger,
                self._identity.member,
                self._identity.signer,
                self._intake.submit,
            ),
            SyncChoice(config.node.sync == "snapshot", config.limits.sync_bytes_per_second),
            counters,
        )

    # Epochs

    @property
    def _is_genesis_member(self) -> bool:
        """Whether the log is in the genesis's epoch and this node one of its members: the keystore has been checked."""
        committee = self._ledger.committee
        return committee.epoch == GENESIS_EPOCH and self._first_identity.member in committee.members

    async def _try_later_keys(self) -> None:
        """Who changed its keys while it was away is known to the others by the new ones; who joins, by no other."""
        turn = 0
        while True:
            await trio.sleep(LATER_KEYS_TRIED_SECONDS)
            if self.network.connected or not later_keystores(self.config.node.keystore):
                continue
            epoch = self._ledger.committee.epoch
            seeds = await trio.to_thread.run_sync(later_transport_seeds, self.config, epoch)
            seeds.append(self._identity.secrets.transport_seed)
            if not self.network.connected and epoch == self._ledger.committee.epoch:
                self._change_roster(seeds[turn % len(seeds)])
                turn += 1

    def _settle_identity(self) -> None:
        """Be who this node is in the newest epoch. Derives a key."""
        found = identity_in(self.config, self._ledger.committee, self._first_identity)
        if isinstance(found, Identity):
            self._identity, self._why_no_member = found, ""
            return
        removed = why_removed(self._ledger, self._identity.member.id)
        self._why_no_member = f"{found}: {removed}" if removed else found

    @property
    def _is_retired(self) -> bool:
        return self._ledger.final.state.get(RETIRED_TABLE + self._identity.member.id) is not None

    def _change_roster(self, transport_seed: bytes) -> None:
        """Talk to the members of the newest epoch; to nobody once this member's key is retired."""
        if self._is_retired:
            self.network.change_roster(transport_seed, ())
        else:
            peers = open_peers(self.config, self._ledger.committee)
            self.network.change_roster(transport_seed, peers, former_peers(self.config, self._ledger))

    def _desk_begins_epoch(self) -> None:
        is_member = not self._why_no_member
        self.desk.begin_epoch(
            self._identity.member if is_member else None, self._identity.signer if is_member else None
        )

    def _beacons_begin_epoch(self) -> None:
        self.beacons.begin_epoch(self._voter.keys if self._voter is not None else None, self._why_not_voting)

    def _say_why_not_voting(self) -> None:
        if self._voter is None and (self._identity.member.role in VOTING_ROLES or self._is_retired):
            log.critical("no vote in epoch %d: %s", self._ledger.committee.epoch, self._why_not_voting)

    def _leave_ended_epochs(self) -> None:
        leave_ended_epochs(self.config, self._ledger, self._first_identity, self.beacons)

    async def _begin_epoch(self) -> None:
        """Go on in the epoch that the log has gone on to; what ended the one before is durable."""
        epoch = self._ledger.committee.epoch
        await trio.to_thread.run_sync(self._leave_ended_epochs)
        await trio.to_thread.run_sync(self._settle_identity)
        if self._voter is not None:
            self._voter.close()
        self._voter = self._open_voter()
        self._say_why_not_voting()
        await trio.sleep(LEAVING_SECONDS)
        self._intake.begin_epoch()
        self._desk_begins_epoch()
        self._beacons_begin_epoch()
        self._change_roster(self._identity.secrets.transport_seed)
        self.replica = self._new_replica(self.replica.counters)
        log.info("epoch %d begins at ledger block %d", epoch, self._ledger.final.header.height)

    async def _take_part(self) -> None:
        while True:
            await self.replica.run()
            await self._begin_epoch()

    def _open_voter(self) -> Voter | None:
        """Who votes for this member in the newest epoch, None for nobody, and why.

        Raises:
            ConfigError: as ``open_voter``.
        """
        opened: Voter | str = self._why_no_member
        if not opened:
            section = self.config.node
            opened = open_voter(self._identity, self._ledger, section.keystore, section.data_directory)
        self._why_not_voting = opened if isinstance(opened, str) else ""
        return None if isinstance(opened, str) else opened

    # Service

    @property
    def name(self) -> str:
        """This member's name."""
        return self._identity.member.name

    @property
    def role(self) -> str:
        """This member's role."""
        return self._identity.member.role.value

    @property
    def ledger(self) -> Ledger:
        """The finalized log and state."""
        return self._ledger

    @property
    def mempool(self) -> Mempool:
        """Events that wait."""
        return self._mempool

    @property
    def grants(self) -> CountersignDesk:
        """The grant desk."""
        return self.desk

    def submit_each(self, encoded: Sequence[bytes]) -> list[CheckedEvent | Rejected]:
        """Take a few events from a client; where one is refused, the first rule broken or ``OVERLOADED``.

        Raises:
            Unavailable: the node has halted, or does not know its whole log yet.
        """
        self._require_taking()
        return self._intake.submit_each(encoded)

    def submit(self, encoded: bytes) -> CheckedEvent:
        """Take one event.

        Raises:
            Rejected: the first rule broken; ``OVERLOADED``.
            Unavailable: as ``submit_each``.
        """
        self._require_taking()
        return self._intake.submit(encoded)

    def _require_taking(self) -> None:
        if self.replica.halted:
            raise Unavailable(f"the node has halted: {self.replica.halted}")
        self._ledger.require_whole()  # or an event on the log already might be refused as its own duplicate

    def status_of(self, event_id: Digest) -> EventStatus:
        """What became of an event.

        Raises:
            Unavailable: it is unknown here and the log is not whole yet.
        """
        if self._mempool.find(event_id) is not None or event_id in self.replica.undurable:
            return EventStatus(EventState.PENDING)
        index = self._ledger.store.index_of_event(event_id)
        if index is not None:
            return EventStatus(EventState.FINAL, index, self._ledger.store.height_of_index(index))
        self._ledger.require_whole()
        why = self._mempool.rejection(event_id)
        if why is not None:
            return EventStatus(EventState.REJECTED, reason=why.reason, detail=why.detail)
        return EventStatus(EventState.UNKNOWN)

    async def wait_final(self, event_id: Digest, timeout_seconds: float) -> EventStatus:
        """What became of an event, once it is final or rejected or the time is over."""
        status = self.status_of(event_id)
        if status.state in (EventState.PENDING, EventState.UNKNOWN):
            with trio.move_on_after(timeout_seconds):
                await self._intake.wait(event_id)
            status = self.status_of(event_id)
        return status

    def snapshot(self) -> NodeStatus:
        """The node at this moment."""
        final = self._ledger.final
        name_of = self._ledger.epochs.member
        committee = self._ledger.committee
        heard = {*self.network.connected, self._identity.member.id}
        samples = self._intake.finality_ms
        finality = FinalityFigures()
        if samples:
            ordered = sorted(samples)
            finality = FinalityFigures(
                len(ordered),
                statistics.median(ordered),
                float(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]),
            )
        return NodeStatus(
            epoch=self._ledger.committee.epoch,
            view=self.replica.engine.view,
            height=final.header.height,
            log_size=final.header.log_size,
            log_root=Digest(final.header.log_root),
            state_root=Digest(final.header.state_root),
            head=final.digest,
            timestamp_ms=final.header.timestamp_ms,
            peers_connected=tuple(sorted(name_of(member).name for member in self.network.connected)),
            peers_total=self.network.peer_count,
            mempool_events=len(self._mempool),
            mempool_bytes=self._mempool.held_bytes,
            voting=self._voter is not None and self.replica.voting_since_start and not self.replica.halted,
            why_not_voting=self._why_not_voting or self.replica.why_not_voting,
            halted=self.replica.halted or "",
            catching_up=self.replica.catch_up.running,
            log_missing=self._ledger.missing_blocks,
            votes_sent=self._voter.votes_cast if self._voter else 0,
            finality=finality,
            evidence=sum(1 for _ in self._ledger.final.state.items_with_prefix(EVIDENCE_TABLE)),
            roles=tuple(
                RoleReach(
                    role, sum(member.id in heard for member in committee.role_members(role)), committee.threshold(role)
                )
                for role in VOTING_ROLES
            ),
            clocks_ahead_ms=tuple(sorted(self.replica.clocks_ahead_ms.items())),
        )

    def checkpoint_note(self) -> bytes:
        """The C2SP signed note over the newest final log, signed by this member's log key.

        Raises:
            Rejected: ``NOT_FOUND`` on an empty log.
        """
        header = self._ledger.final.header
        if not self._identity.member.log_key:
            raise Rejected(Reason.NOT_FOUND, "a verifier has no log key: ask a voting member's node for its checkpoint")
        if header.log_size == 0:
            raise Rejected(Reason.NOT_FOUND, "the log is empty")
        if self._note is None or self._note[0] != header.log_size:
            origin = self._ledger.genesis.name
            text = checkpoint_text(origin, header.log_size, header.log_root)
            signer = Ed25519SigningKey(self._identity.secrets.log_seed)
            line = sign_note(text, origin, signer)
            self._note = (header.log_size, assemble_note(text, [line]))
        return self._note[1]

    # Peers

    async def answer(self, member: MemberId, payload: bytes) -> bytes:
        """The answer to a peer's request.

        Raises:
            Rejected: not a request, or one whose answer is no.
        """
        request = decode_request(payload)
        if not self._ledger.committee.has_member(member):
            return await self.replica.answer_former(member, request)
        if isinstance(request, AskCountersign | DeliverSignature):
            return await self.desk.answer(member, request)
        if isinstance(request, GetBeaconShare):
            return await self.beacons.answer(request)
        return await self.replica.answer(member, request)

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with self.network.open(self.answer), trio.open_nursery() as nursery:
                metrics = Metrics(self, {"network": self.network.counters, "round": self.replica.counters})
                self._intake.on_final = metrics.event_final
                nursery.start_soon(self.desk.run)
                nursery.start_soon(self._intake.run)
                address = await nursery.start(serve, self, self.config.api, metrics)
                log.info(
                    "%s (%s) serves http://%s, chain %s",
                    self.name,
                    self.role,
                    address,
                    self._ledger.genesis.chain_id.hex(),
                )
                nursery.start_soon(self._take_part)
                nursery.start_soon(self._try_later_keys)
        finally:
            self._close()

    def _close(self) -> None:
        store = self._ledger.store
        try:
            store.sync()
        finally:
            try:
                store.close()
            except InvariantBroken as error:  # of a full disk, say: what failed first is the one to raise
                log.critical("closing the data directory: %s", error)


def run_node(config: NodeConfig) -> None:
    """Run a node until SIGINT or SIGTERM.

    Raises:
        ConfigError: the configuration, the keystore, the data directory or an address is wrong.
        InvariantBroken: disk or journal failed, or the data directory is damaged.
    """
    return_freed_memory()
    genesis = load_genesis(config)
    identity = load_identity(config, genesis)
    # What is loaded by now lives for ever, and a node makes few cycles: looking through it all for garbage every few
    # hundred events costs a tenth of its time and 60 ms at once.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    trio.run(_run, config, genesis, identity)


def return_freed_memory() -> None:
    """Have glibc give large freed buffers back to the system, where it is the C library.

    By itself it learns from the first large buffer that is freed to keep such ones (mallopt(3), the dynamic mmap
    threshold): a node at 100,000 events then held 275 MB instead of 226.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MALLOPT_MMAP_THRESHOLD, LARGE_BUFFER_BYTES)
        mallopt(MALLOPT_TRIM_THRESHOLD, KEPT_FREE_BYTES)


async def _run(config: NodeConfig, genesis: Genesis, identity: Identity) -> None:
    node = Node(config, genesis, identity, SystemClock())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
        await node.run()


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            log.info("stopping on %s", signal.Signals(number).name)
            scope.cancel()
            return
