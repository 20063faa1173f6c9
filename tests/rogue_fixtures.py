"""A member with a valid transport key and no manners, for attacks on running nodes."""

from collections.abc import Awaitable, Callable, Sequence

import msgspec
from ledger_fixtures import digest
from node_fixtures import Consortium, until

from consensus import portions as p
from consensus.codec import encode
from consensus.event import Kind, make_entry, pack, sign_entry
from consensus.identifiers import MemberId
from consensus.rejection import Unavailable
from node.messages import pack_gossip
from node.network import Lane, Network, Peer
from node.runner import Node

Answer = Callable[[MemberId, bytes], Awaitable[bytes]]


class Rogue:
    """A member's transport and identity keys in the wrong hands."""

    def __init__(self, consortium: Consortium, name: str) -> None:
        self.consortium = consortium
        self.genesis = consortium.genesis
        self.member = next(member for member in self.genesis.members if member.name == name)
        self.secrets = consortium.secrets[name]
        others = [member for member in self.genesis.members if member.name != name]
        self.network = Network(
            self.secrets.transport_seed,
            f"127.0.0.1:{consortium.ports[name]}",
            [Peer(member.id, member.transport_key, f"127.0.0.1:{consortium.ports[member.name]}") for member in others],
            protocol_suffix=self.genesis.chain_id.hex()[:32],
        )
        self.asked = 0

    async def meets(self, nodes: Sequence[Node]) -> None:
        """Wait for both connections to each node."""
        ids = {member.id for member in self.genesis.members if member.name in {node.name for node in nodes}}
        await until(lambda: ids <= self.network.connected)

    def votes(self, message: msgspec.Struct) -> None:
        self.network.broadcast(Lane.VOTES, encode(message))

    def event(self, kind: Kind, content: p.Wire, number: int) -> bytes:
        """An event of one data item, correctly signed."""
        portions = p.Portions(p.DataPortion(digest("rogue", number), (p.DataItem(encode(content)),)), None, None)
        entry = make_entry(self.genesis.chain_id, kind, self.member.id, portions)
        return pack(sign_entry(entry, self.member.id, self.member.role, self.secrets.identity), portions)

    def gossip(self, events: Sequence[bytes]) -> None:
        for start in range(0, len(events), 32):
            self.network.broadcast(Lane.EVENTS, pack_gossip(list(events[start : start + 32])))


async def silent(member: MemberId, payload: bytes) -> bytes:
    raise Unavailable("I say nothing")
