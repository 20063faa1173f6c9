"""Real nodes' networks on loopback, for the tests of ``node.network``."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio
from libp2p.io.exceptions import IOException
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamError
from nacl.signing import SigningKey

from consensus.identifiers import MemberId
from node.link import FRAME_HEADER
from node.network import Network, NetworkLimits, Peer, RequestHandler
from node.provision import free_ports
from node.transport import Identity

CHAIN = "c0" * 32
LOST = (IOException, MuxedStreamError, MuxedConnError)
"""What libp2p raises where a connection is lost."""

FAST = NetworkLimits(
    heartbeat_seconds=0.2,
    silence_seconds=20.0,
    handshake_seconds=20.0,
    redial_first_seconds=0.05,
    redial_last_seconds=0.2,
    penalty_seconds=0.2,
)
"""Quick, but for what an honest peer on a machine that stalls would run into."""


@dataclass(frozen=True)
class Party:
    """A member with its transport seed, as the tests (but no other member) know it."""

    seed: bytes
    peer: Peer

    @property
    def member(self) -> MemberId:
        return self.peer.member

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.peer.address.split(":")
        return host, int(port)


def frame(kind: int, payload: bytes) -> bytes:
    """What a link writes, for those who follow no rule."""
    return FRAME_HEADER.pack(kind, len(payload)) + payload


def make_parties(count: int) -> list[Party]:
    """Members on free ports, lowest peer id first: each dials all that follow it."""
    seeds = [bytes([i + 1]) * 32 for i in range(count)]
    seeds.sort(key=lambda seed: Identity.from_seed(seed).peer_id.to_bytes())
    parties = []
    for index, (seed, port) in enumerate(zip(seeds, free_ports(count), strict=True)):
        key = bytes(SigningKey(seed).verify_key)
        parties.append(Party(seed, Peer(MemberId(bytes([index]) * 32), key, f"127.0.0.1:{port}")))
    return parties


def network_of(party: Party, parties: Sequence[Party], *, chain: str = CHAIN, limits: NetworkLimits = FAST) -> Network:
    """The network of one of the parties."""
    others = [other.peer for other in parties if other is not party]
    return Network(party.seed, party.peer.address, others, protocol_suffix=chain, limits=limits)


async def until(condition: Callable[[], object], timeout_seconds: float = 30.0) -> None:
    """Wait until ``condition`` holds. Raises ``trio.TooSlowError``."""
    with trio.fail_after(timeout_seconds):
        while not condition():
            await trio.sleep(0.005)


@asynccontextmanager
async def connected_networks(
    parties: Sequence[Party], handler: RequestHandler | None = None, limits: NetworkLimits = FAST
) -> AsyncIterator[list[Network]]:
    """All parties' networks, open and connected to each other."""
    networks = [network_of(party, parties, limits=limits) for party in parties]
    async with AsyncExitStack() as stack:
        for network in networks:
            await stack.enter_async_context(network.open(handler))
        await until(lambda: all(len(network.connected) == len(parties) - 1 for network in networks))
        yield networks
