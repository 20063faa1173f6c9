"""Whole nodes in one process, over real sockets and real disks, for tests of the replica.

``Consortium`` makes a genesis, a data directory per member and the ``Node`` objects; ``running`` runs some
of them. Processes are for ``tests/processes``; this is for what must be looked at from inside.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio
from consensus_fixtures import SMALLEST, make_genesis
from epoch_fixtures import next_membership

from consensus import portions as p
from consensus.codec import encode
from consensus.event import Kind, make_entry, pack, sign_entry
from consensus.identifiers import MemberId
from consensus.membership import BLS_THRESHOLD, Membership, Parameters, committee
from consensus.membership_change import MembershipChange
from consensus.participant import MemberSecrets
from node.clock import Clock, SystemClock
from node.config import Address, ApiSection, CountersignSection, NetworkSection, NodeConfig, NodeSection
from node.identity import epoch_keystore, load_identity
from node.keystore import KeyCost, Keystore, Secrets
from node.provision import free_ports
from node.runner import Identity, Node

YEAR_MS = 365 * 86_400_000
FAST = Parameters(heartbeat_ms=2_000)
PASSPHRASE = b"a passphrase for a test"
CHEAP = KeyCost(operations=1, memory_bytes=8_192)


class Consortium:
    """Members with their data directories under one folder."""

    def __init__(
        self,
        folder: Path,
        counts: Mapping[str, int] = SMALLEST,
        parameters: Parameters = FAST,
        thresholds: Mapping[str, int] | None = None,
        certificate_scheme: str = BLS_THRESHOLD,
        joining: Sequence[str] = (),
        clock: Clock | None = None,
    ) -> None:
        """``joining`` are names of members to come: they have addresses too."""
        self.clock = clock or SystemClock()
        self.folder = folder
        self.genesis, self.secrets = make_genesis(
            counts, certificate_scheme=certificate_scheme, thresholds=thresholds, parameters=parameters
        )
        names = [*(member.name for member in self.genesis.members), *joining]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def node(self, name: str, sync: Literal["replay", "snapshot"] = "replay", checkpoint: Path | None = None) -> Node:
        """A node over the member's data directory, not yet running; who joins is known by its keystore alone."""
        member = next((held for held in self.genesis.members if held.name == name), None)
        config = NodeConfig(
            node=NodeSection(
                name=name,
                genesis=self.folder / "genesis.json",
                chain_id=self.genesis.chain_id.hex(),
                data_directory=self.folder / name,
                keystore=self.folder / f"{name}.keystore",
                sync=sync,
                checkpoint=checkpoint,
            ),
            network=NetworkSection(
                listen=Address("127.0.0.1", self.ports[name]),
                peers={other: Address("127.0.0.1", port) for other, port in self.ports.items() if other != name},
            ),
            api=ApiSection(listen=Address("127.0.0.1", 0)),
            countersign=CountersignSection(auto=True, purposes=("*",), sources=("*",), operators=("*",)),
        )
        if member is None:
            return Node(config, self.genesis, load_identity(config, self.genesis), self.clock)
        held = self.secrets[name]
        return Node(config, self.genesis, Identity(member, held.identity, kept_secrets(held)), self.clock)

    def first_keystore(self, name: str, passphrase: bytes = PASSPHRASE) -> Path:
        """A member's keystore of the founding, on disk."""
        path = self.folder / f"{name}.keystore"
        Keystore.create(path, kept_secrets(self.secrets[name]), passphrase, CHEAP)
        return path

    def source_event(self, owner: str, number: int) -> bytes:
        """A signed source of ``owner``; ``number`` makes it different."""
        member = next(held for held in self.genesis.members if held.name == owner)
        claim = p.SourceClaim(
            name=f"source {number}",
            content_root=hashlib.sha256(f"content {number}".encode()).digest(),
            example_count=10,
            size_bytes=1_000,
            licence="PSF-2.0",
            rights_basis="owner",
            purposes=("research",),
            content_class="documentation",
            valid_from_ms=0,
            valid_until_ms=2_000_000_000_000 + 100 * YEAR_MS,
            statement="",
            overlap_sha256=b"",
            reserve_below=0,
        )
        salt = hashlib.sha256(f"salt {number}".encode()).digest()
        portions = p.Portions(p.DataPortion(salt, (p.DataItem(encode(claim)),)), None, None)
        entry = make_entry(self.genesis.chain_id, Kind.SOURCE, MemberId(member.id), portions)
        return pack(sign_entry(entry, member.id, member.role, self.secrets[owner].identity), portions)


def kept_secrets(held: MemberSecrets) -> Secrets:
    """What a keystore has of them."""
    return Secrets(
        identity_seed=held.identity_seed,
        transport_seed=held.transport_seed,
        log_seed=held.log_seed or bytes(32),
        bls_share=held.key_share.to_bytes() if held.key_share else None,
    )


def change(consortium: Consortium, membership: Membership, statement: str = "") -> bytes:
    """A membership event signed by every voter of epoch 0."""
    portions = p.Portions(None, p.SaltedPortion(bytes(32), encode(MembershipChange(membership, statement))), None)
    voters = committee(consortium.genesis).voters
    entry = make_entry(consortium.genesis.chain_id, Kind.MEMBERSHIP, MemberId(voters[0].id), portions)
    for member in voters:
        entry = sign_entry(entry, member.id, member.role, consortium.secrets[member.name].identity)
    return pack(entry, portions)


def next_epoch(
    consortium: Consortium,
    remove: tuple[str, ...] = (),
    rotate: tuple[str, ...] = (),
    add: Mapping[str, str] | None = None,
    without_keys: tuple[str, ...] = (),
) -> tuple[Membership, dict[str, MemberSecrets]]:
    """The members of epoch 1, their keystores beside the first ones."""
    membership, secrets = next_membership(
        consortium.genesis, committee(consortium.genesis), consortium.secrets, remove=remove, rotate=rotate, add=add
    )
    for name, held in secrets.items():
        if name not in without_keys:
            Keystore.create(
                epoch_keystore(consortium.folder / f"{name}.keystore", 1),
                kept_secrets(held),
                PASSPHRASE,
                CHEAP,
            )
    return membership, secrets


@asynccontextmanager
async def running(nodes: Iterable[Node]) -> AsyncIterator[trio.Nursery]:
    """Run nodes until the block is left."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def until(condition: object, seconds: float = 60.0) -> None:
    """Wait for ``condition()`` to hold; the test fails after ``seconds``."""
    assert callable(condition)
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.02)
