"""Which member a node or a command is: genesis against the pinned chain id, keystore against the genesis.

A key that is not the one the genesis has for this member stops here: what it signs would be refused by all.

Secrets for a later epoch lie beside the configured keystore, as ``NAME.epoch-N.SUFFIX``: of who changes its keys, and
of who joins, which has nothing else. Which of them counts is decided by the members of the epoch the log is in.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from consensus.cosignature import parse_witness_key
from consensus.epochs import Pin
from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.identifiers import Role
from consensus.keys import Ed25519SigningKey, SignatureScheme, Signer, signer_for
from consensus.membership import GENESIS_EPOCH, Committee, Genesis, Member, check_genesis
from consensus.rejection import ConfigError, Rejected
from node.config import NodeConfig
from node.keystore import Keystore, Secrets, read_passphrase
from node.verify import read_pin

log = logging.getLogger("countersign")

LEFT_EPOCHS_FILE = "left-epochs"
"""In the data directory: the epoch before which nothing is left to keep or erase; written when that epoch begins,
before anything is signed in it."""
_EPOCH = re.compile(rb"([1-9][0-9]{0,8})\n")
_LATER_KEYSTORE = re.compile(r"(.+)\.epoch-([1-9][0-9]{0,8})((?:\.[^.]+)?)")


@dataclass(frozen=True, slots=True)
class Identity:
    """This node's member and what it signs with."""

    member: Member
    signer: Signer
    secrets: Secrets


def epoch_keystore(base: Path, epoch: int) -> Path:
    """Where a member's secrets from an epoch on are looked for, beside its first keystore."""
    return base.with_name(f"{base.stem}.epoch-{epoch}{base.suffix}")


def first_keystore(path: Path) -> tuple[Path, int] | None:
    """The inverse of ``epoch_keystore``: beside which first keystore a node looks for ``path``, and in which epoch.

    None where no node looks for a file of that name in a later epoch.
    """
    named = _LATER_KEYSTORE.fullmatch(path.name)
    return None if named is None else (path.with_name(named[1] + named[3]), int(named[2]))


def later_keystores(base: Path) -> dict[int, Path]:
    """The keystores for later epochs beside the first, by epoch, rising."""
    found = {}
    for path in base.parent.glob(f"{base.stem}.epoch-*{base.suffix}"):
        epoch = path.name.removeprefix(f"{base.stem}.epoch-").removesuffix(base.suffix)
        if epoch.isascii() and epoch.isdigit() and path == epoch_keystore(base, int(epoch)):
            found[int(epoch)] = path
    return dict(sorted(found.items()))


def left_epochs(data_directory: Path) -> int:
    """The epoch that ``LEFT_EPOCHS_FILE`` names; ``GENESIS_EPOCH`` where there is none, or it says something else."""
    try:
        named = _EPOCH.fullmatch((data_directory / LEFT_EPOCHS_FILE).read_bytes())
    except OSError:
        return GENESIS_EPOCH
    return GENESIS_EPOCH if named is None else int(named[1])


def later_transport_seeds(config: NodeConfig, epoch: int) -> list[bytes]:
    """Transport seeds of the keystores for epochs after ``epoch``, which others may know this node by already.

    Derives keys: for a worker thread. A keystore that does not open gives none.
    """
    seeds = []
    for later, path in later_keystores(config.node.keystore).items():
        if later > epoch:
            try:
                passphrase = read_passphrase(config.node.passphrase_file, os.environ)
                seeds.append(Keystore.open(path, passphrase).secrets.transport_seed)
            except ConfigError as error:
                log.warning("%s", error)
    return seeds


def identity_in(config: NodeConfig, members: Committee, first: Identity) -> Identity | str:
    """The member this node is in a later epoch, by its newest keystore; or why it is none.

    ``first`` is what the configured keystore holds; a keystore made for a later epoch takes its place. Derives a key:
    for a worker thread.
    """
    member = next((held for held in members.members if held.name == config.node.name), None)
    if member is None:
        return f"{config.node.name} is no member of epoch {members.epoch}"
    base = config.node.keystore
    newest = next((e for e in range(members.epoch, 0, -1) if epoch_keystore(base, e).exists()), None)
    secrets = first.secrets
    if newest is not None:
        try:
            passphrase = read_passphrase(config.node.passphrase_file, os.environ)
            secrets = Keystore.open(epoch_keystore(base, newest), passphrase).secrets
        except ConfigError as error:
            return str(error)
    signer = signer_for(SignatureScheme(member.scheme), secrets.identity_seed)
    transport_key = Ed25519SigningKey(secrets.transport_seed).public_key
    if (signer.public_key, transport_key) != (member.identity_key, member.transport_key):
        expected = epoch_keystore(base, members.epoch)
        found = "found others" if expected.exists() else "which is missing: put it there and start the node again"
        return f"expected the keys {member.name} has in epoch {members.epoch} in {expected}, {found}"
    return Identity(member, signer, secrets)


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


def load_pin(config: NodeConfig, genesis: Genesis) -> Pin | None:
    """The log that the node's must begin with, where the configuration names a checkpoint.

    Raises:
        ConfigError: it is none of this log, or not signed by as many of the witnesses as are needed.
    """
    node = config.node
    if node.checkpoint is None:
        return None
    for number, witness in enumerate(node.witnesses, start=1):
        try:
            parse_witness_key(witness)
        except Rejected as error:
            raise ConfigError(f"node.witnesses: key {number}: {error.detail}") from error
    try:
        return read_pin(node.checkpoint, genesis.name, node.witnesses, node.witnesses_needed)[0]
    except Rejected as error:
        raise ConfigError(f"node.checkpoint: {node.checkpoint}: {error.detail}") from error


def load_identity(config: NodeConfig, genesis: Genesis) -> Identity:
    """The member this node is, by its keystore; before the epoch it joins in, a verifier that nobody knows yet.

    Raises:
        ConfigError: wrong passphrase, keys that are not the named member's, or a name that neither the genesis nor a
            keystore for a later epoch has.
    """
    later = later_keystores(config.node.keystore)
    if later and all(member.name != config.node.name for member in genesis.members):
        passphrase = read_passphrase(config.node.passphrase_file, os.environ)
        return _joining(config.node.name, Keystore.open(max(later.items())[1], passphrase).secrets)
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


def _joining(name: str, secrets: Secrets) -> Identity:
    signer = Ed25519SigningKey(secrets.identity_seed)
    transport_key = Ed25519SigningKey(secrets.transport_seed).public_key
    member = Member(
        name=name,
        role=Role.VERIFIER,
        scheme=signer.scheme,
        identity_key=signer.public_key,
        transport_key=transport_key,
        log_key=b"",
        bls_key=b"",
        bls_possession=b"",
    )
    return Identity(member, signer, secrets)
