"""What a command needs to sign for this member, read from its configuration and keystore."""

from dataclasses import dataclass
from pathlib import Path

from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import CheckedEvent, Entry, check_unsigned, pack, sign_entry, unpack
from consensus.identifiers import Role
from consensus.keys import Signer
from consensus.membership import GENESIS_EPOCH, Committee, Genesis, Member, committee
from consensus.portions import Portions
from consensus.receipt import MAX_STATE_RECEIPT_BYTES, StateReceipt, verify_state_receipt
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable
from consensus.state import EPOCH_HEAD_KEY
from node.commands.connection import connect
from node.config import NodeConfig, load_config
from node.identity import identity_in, load_genesis, load_identity

MAX_EVENT_FILE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class LocalMember:
    """This member, with its identity key opened."""

    config: NodeConfig
    genesis: Genesis
    committee: Committee
    member: Member
    signer: Signer

    def sign(self, entry: Entry) -> Entry:
        """The entry with this member's signature."""
        return sign_entry(entry, self.member.id, self.member.role.value, self.signer)

    def require(self, role: Role, what: str) -> None:
        """Raises ``ConfigError`` unless this member holds ``role``."""
        if self.member.role != role:
            signer = f"an {role.value}" if role is Role.OPERATOR else f"a {role.value}"
            raise ConfigError(
                f"{what} is signed by {signer} member; the role of {self.member.name} is {self.member.role.value}"
            )


def load_member(config_path: Path) -> LocalMember:
    """This member with its key, from a configuration file, in the newest epoch that its node proves.

    Where the node does not answer, or has no ledger block yet, that is the epoch of the genesis.

    Raises:
        ConfigError: any of its files is wrong, or the key is not the member's in that epoch.
    """
    config = load_config(config_path)
    genesis = load_genesis(config)
    first = load_identity(config, genesis)
    members = newest_members(config_path, config, genesis)
    if members.epoch == GENESIS_EPOCH and first.member in members.members:
        return LocalMember(config, genesis, members, first.member, first.signer)
    identity = identity_in(config, members, first)
    if isinstance(identity, str):
        raise ConfigError(identity)
    return LocalMember(config, genesis, members, identity.member, identity.signer)


def newest_members(config_path: Path, config: NodeConfig, genesis: Genesis) -> Committee:
    """The members of the newest epoch that the node of a configuration proves, else of the genesis."""
    if config.api.listen.port == 0:
        return committee(genesis)
    try:
        receipt = _epoch_receipt(config_path)
    except (Unavailable, Rejected):
        return committee(genesis)
    return _proven_by(receipt, config, genesis)


def proven_members(config_path: Path, config: NodeConfig, genesis: Genesis) -> Committee:
    """The members of the newest epoch, as the node of a configuration proves them; at first of the genesis.

    Raises:
        Unavailable: the node does not answer: who takes part by now is not known.
        Rejected: it refuses to, or its proof is none.
        ConfigError: its port is left to the system.
    """
    try:
        receipt = _epoch_receipt(config_path)
    except Rejected as error:
        if error.reason is not Reason.NOT_FOUND:
            raise
        return committee(genesis)
    return _proven_by(receipt, config, genesis)


def _epoch_receipt(config_path: Path) -> bytes:
    with connect(config_path, None, None) as client:
        return client.state_receipt(EPOCH_HEAD_KEY)


def _proven_by(encoded: bytes, config: NodeConfig, genesis: Genesis) -> Committee:
    trusted = anchor(genesis, config.node.pinned_chain)
    verify_state_receipt(trusted, encoded, EPOCH_HEAD_KEY)
    receipt = decode(encoded, StateReceipt, MAX_STATE_RECEIPT_BYTES)
    return trusted.led_by(receipt.epochs).newest.committee


def signed_by(own: LocalMember, entry: Entry, portions: Portions) -> tuple[CheckedEvent, bytes]:
    """An event with this member's signature, checked as far as it can be without the log; and its wire form.

    Raises:
        Rejected: the rule it breaks.
    """
    signed = own.sign(entry)
    return check_unsigned(encode(signed), encode(portions), own.committee), pack(signed, portions)


def read_event(path: Path, members: Committee) -> CheckedEvent:
    """An event file, checked but for its signatures.

    Raises:
        ConfigError: the file is missing.
        Rejected: the rule the event breaks.
    """
    try:
        with path.open("rb") as file:
            wire = unpack(file.read(MAX_EVENT_FILE_BYTES))
        return check_unsigned(wire.entry, wire.portions, members)
    except OSError as error:
        raise ConfigError(f"{path}: expected an event file, found: {error.strerror}") from error
    except Rejected as error:
        raise Rejected(error.reason, f"{path}: {error.detail}") from error
