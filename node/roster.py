"""Whom a node talks to in the newest epoch: its members, and those who were removed and may not know it yet.

A member that was away when it was removed finds nobody who counts it among the members any more. The others go on
answering it under the key it then had, with the ledger blocks of its time (``catchup.serve_former``): the last of them
ends the epoch, so that it stops by the same path as one that was there. Who has a successor is not among them: its node
has the successor's keys. Once a removed member's address is taken out of ``network.peers`` it is not waited for either.
"""

import logging

from consensus.identifiers import MemberId
from consensus.membership import Committee
from consensus.rejection import Unavailable
from consensus.state import RETIRED_TABLE, RetiredMember, read_record
from node.config import NodeConfig
from node.ledger import Ledger
from node.network import Peer

log = logging.getLogger("countersign")


def open_peers(config: NodeConfig, committee: Committee) -> list[Peer]:
    """The other members of an epoch this node talks to; an address of anyone else waits until it is a member."""
    members = {member.name: member for member in committee.members if member.name != config.node.name}
    waiting = sorted(set(config.network.peers) - set(members))
    if waiting:
        log.info("no members of epoch %d: %s; their addresses wait", committee.epoch, ", ".join(waiting))
    return [
        Peer(members[name].id, members[name].transport_key, str(address))
        for name, address in sorted(config.network.peers.items())
        if name in members
    ]


def former_peers(config: NodeConfig, ledger: Ledger) -> list[Peer]:
    """Members that were removed, the last of each name that is none of the newest epoch and has an address."""
    now = ledger.committee.members
    taken = {member.name for member in now} | {config.node.name}
    keys = {member.transport_key for member in now}
    found = []
    for identifier, record in sorted(_removed(ledger), key=lambda held: (-held[1].last_epoch, held[0])):
        member = ledger.epochs.of(record.last_epoch).committee.member(identifier)
        address = config.network.peers.get(member.name)
        if address is None or member.name in taken or member.transport_key in keys:
            continue
        taken.add(member.name)
        keys.add(member.transport_key)
        found.append(Peer(identifier, member.transport_key, str(address)))
    return found


def why_removed(ledger: Ledger, member: MemberId) -> str:
    """When a member was removed, for its operator; empty for one that was not, or has a successor."""
    last_epoch = next((record.last_epoch for identifier, record in _removed(ledger) if identifier == member), None)
    if last_epoch is None:
        return ""
    try:
        return f"it was removed at ledger block {ledger.end_of(last_epoch)}, which ended epoch {last_epoch}"
    except Unavailable:  # the log began at a snapshot and is not whole yet
        return f"it was removed at the end of epoch {last_epoch}"


def _removed(ledger: Ledger) -> list[tuple[MemberId, RetiredMember]]:
    records = ledger.final.state.items_with_prefix(RETIRED_TABLE)
    found = [(MemberId(key[len(RETIRED_TABLE) :]), read_record(value, RetiredMember)) for key, value in records]
    return [(identifier, record) for identifier, record in found if not record.successor]
