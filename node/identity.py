"""Which member a node or a command is: genesis against the pinned chain id, keystore against the genesis.

A key that is not the one the genesis has for this member stops here: what it signs would be refused by all.
"""

import os
from dataclasses import dataclass

from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.keys import Ed25519SigningKey, SignatureScheme, Signer, signer_for
from consensus.membership import Genesis, Member, check_genesis
from consensus.rejection import ConfigError, Rejected
from node.config import NodeConfig
from node.keystore import Keystore, Secrets, read_passphrase


@dataclass(frozen=True, slots=True)
class Identity:
    """This node's member and what it signs with."""

    member: Member
    signer: Signer
    secrets: Secrets


def load_genesis(config: NodeConfig) -> Genesis:
    """The checked genesis of a configuration.

    Raises:
        ConfigError: it is missing, not one, or not that of the pinned chain.
    """
    path = config.node.genesis
    try:
        with path.open("rb") as file:
            genesis = genesis_from_json(file.read(MAX_JSON_BYTES + 1))
        check_genesis(genesis)
    except OSError as error:
        raise ConfigError(f"{path}: expected a genesis file, found: {error.strerror}") from error
    except Rejected as error:
        raise ConfigError(f"{path}: expected a sound genesis, found {error}") from error
    if genesis.chain_id != config.node.pinned_chain:
        raise ConfigError(
            f"{path}: expected the genesis of chain {config.node.chain_id}, found that of {genesis.chain_id.hex()}"
        )
    return genesis


def member_named(genesis: Genesis, name: str) -> Member:
    """The member of that name.

    Raises:
        ConfigError: there is none.
    """
    for member in genesis.members:
        if member.name == name:
            return member
    known = ", ".join(sorted(member.name for member in genesis.members))
    raise ConfigError(f"node.name: expected a member of the genesis ({known}), found {name}")


def load_identity(config: NodeConfig, genesis: Genesis) -> Identity:
    """The member this node is, by its keystore.

    Raises:
        ConfigError: wrong passphrase, or keys that are not the named member's.
    """
    member = member_named(genesis, config.node.name)
    passphrase = read_passphrase(config.node.passphrase_file, os.environ)
    secrets = Keystore.open(config.node.keystore, passphrase).secrets
    signer = signer_for(SignatureScheme(member.scheme), secrets.identity_seed)
    for what, found, expected in (
        ("identity", signer.public_key, member.identity_key),
        ("transport", Ed25519SigningKey(secrets.transport_seed).public_key, member.transport_key),
    ):
        if found != expected:
            raise ConfigError(
                f"{config.node.keystore}: expected the {what} key the genesis has for {member.name}, found another"
            )
    return Identity(member, signer, secrets)
