"""What a command needs to sign for this member, read from its configuration and keystore."""

from dataclasses import dataclass
from pathlib import Path

from consensus.codec import encode
from consensus.event import CheckedEvent, Entry, check_unsigned, pack, sign_entry, unpack
from consensus.identifiers import Role
from consensus.keys import Signer
from consensus.membership import Committee, Genesis, Member, committee
from consensus.portions import Portions
from consensus.rejection import ConfigError
from node.config import NodeConfig, load_config
from node.identity import load_genesis, load_identity

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
            raise ConfigError(
                f"{what} is signed by a {role.value} member; {self.member.name} is a {self.member.role.value}"
            )


def load_member(config_path: Path) -> LocalMember:
    """This member with its key, from a configuration file.

    Raises:
        ConfigError: any of its files is wrong, or the key is not the member's.
    """
    config = load_config(config_path)
    genesis = load_genesis(config)
    identity = load_identity(config, genesis)
    return LocalMember(config, genesis, committee(genesis), identity.member, identity.signer)


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
    except OSError as error:
        raise ConfigError(f"{path}: expected an event file, found: {error.strerror}") from error
    return check_unsigned(wire.entry, wire.portions, members)
