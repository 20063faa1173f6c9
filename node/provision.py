"""A whole consortium's files, made by one person: for trials, tests and the demonstration.

Runs the real distributed key generation, every member with fresh secrets of its own, and writes what each
member's node starts from::

    DIR/genesis.json
    DIR/<name>/node.toml        as the examples in configs/, trial values filled in
    DIR/<name>/keystore.json    the member's secrets, encrypted
    DIR/<name>/passphrase       what opens them, mode 0600
    DIR/<name>/data/            made by the node on its first run

Whoever runs this sees every secret, so the result proves nothing between parties that do not trust that
person. In production each member makes its own keys and the parties exchange the same messages as files
(``node/ceremony.py``).

Trial values: every node signs every grant for the purposes given (``[countersign]``), its HTTP interface is on
loopback without tokens, and ports not given are free ones at the time of writing.
"""

import os
import secrets as system_random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consensus.ceremony import Invited
from consensus.genesis import MemberPlan, generate_genesis, genesis_from_json, genesis_to_json
from consensus.identifiers import VOTING_ROLES, ChainId, Role
from consensus.keys import SignatureScheme
from consensus.membership import BLS_THRESHOLD, Genesis, Parameters, check_genesis
from consensus.participant import MemberSecrets
from consensus.rejection import ConfigError, Rejected
from node.config import Address, load_config
from node.files import replace_private
from node.keystore import MODERATE_COST, KeyCost, Keystore, Secrets

LOOPBACK = "127.0.0.1"
FIRST_PORT, END_PORT, PORTS_TRIED = 12_000, 32_000, 10_000
RANDOM_PASSPHRASE_COST = KeyCost(operations=1, memory_bytes=8_192)
"""A passphrase of 256 random bits cannot be guessed at any cost: deriving a key from it need not be slow."""

DEFAULT_PURPOSES = ("research", "evaluation")


@dataclass(frozen=True, slots=True)
class MemberRequest:
    """A member to make. Ports default to free ones; a host other than loopback listens on all interfaces."""

    name: str
    role: Role
    network: Address | None = None
    api: Address | None = None


@dataclass(frozen=True, slots=True)
class ProvisionedMember:
    """One member's files and addresses."""

    name: str
    role: Role
    directory: Path
    config: Path
    keystore: Path
    passphrase: Path
    network: Address
    api: Address

    @property
    def api_url(self) -> str:
        """Where its node will serve HTTP."""
        return f"http://{self.api}"


@dataclass(frozen=True, slots=True)
class Provisioned:
    """A consortium on disk."""

    genesis: Genesis
    genesis_path: Path
    chain_id: ChainId
    members: Mapping[str, ProvisionedMember]


def provision(
    directory: Path,
    origin: str,
    requests: Sequence[MemberRequest],
    *,
    created_ms: int,
    certificate_scheme: str = BLS_THRESHOLD,
    identity_scheme: SignatureScheme | None = None,
    thresholds: Mapping[Role, int] | None = None,
    parameters: Parameters | None = None,
    passphrase: bytes | None = None,
    purposes: Sequence[str] = DEFAULT_PURPOSES,
) -> Provisioned:
    """Make and write a consortium. Without ``passphrase`` each member gets a random one.

    Raises:
        ConfigError: the directory is in use, or these members make no sound genesis.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory}: expected an empty or missing directory, found files in it")
    check_roles(requests)
    located = _with_addresses(requests)
    try:
        genesis, secrets = generate_genesis(
            name=origin,
            nonce=os.urandom(32),
            created_ms=created_ms,
            plans=[MemberPlan(request.name, request.role, os.urandom(32), identity_scheme) for request in requests],
            certificate_scheme=certificate_scheme,
            thresholds=thresholds,
            parameters=parameters,
        )
        # The file's strict reading is what holds names to their pattern, and a name becomes a directory below.
        check_genesis(genesis_from_json(genesis_to_json(genesis)))
    except Rejected as error:
        raise ConfigError(f"these members make no sound genesis: {error}") from error
    directory.mkdir(parents=True, exist_ok=True)
    genesis_path = directory / "genesis.json"
    genesis_path.write_bytes(genesis_to_json(genesis))
    for member in (_member_of(directory, request) for request in located):
        _write_member(member, located, genesis, secrets[member.name], passphrase, purposes)
    members = {request.name: _member_of(directory, request) for request in located}
    return Provisioned(genesis, genesis_path, genesis.chain_id, members)


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports that nobody listens on at this moment.

    Below the range from which the kernel takes the ports of outgoing connections (32768 and up on Linux), or one of
    those could take the port before its node does.

    Raises:
        ConfigError: nearly all are taken.
    """
    sockets: list[socket.socket] = []
    try:
        for _ in range(PORTS_TRIED):
            if len(sockets) == count:
                break
            held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                held.bind((LOOPBACK, FIRST_PORT + system_random.randbelow(END_PORT - FIRST_PORT)))
            except OSError:
                held.close()
            else:
                sockets.append(held)
        if len(sockets) < count:
            raise ConfigError(f"expected {count} free ports between {FIRST_PORT} and {END_PORT}, found {len(sockets)}")
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def check_roles(requests: Sequence[MemberRequest | Invited]) -> None:
    """What a key generation needs before it starts; all else is ``check_genesis``'s.

    Raises:
        ConfigError: two members of one name, or a voting role without a member.
    """
    names = [request.name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two members are called {name}")
    for role in VOTING_ROLES:
        if all(request.role != role for request in requests):
            raise ConfigError(f"expected at least one {role.value} member, found none")


def _with_addresses(requests: Sequence[MemberRequest]) -> list[MemberRequest]:
    ports = iter(free_ports(2 * len(requests)))
    return [
        MemberRequest(
            request.name,
            request.role,
            request.network or Address(LOOPBACK, next(ports)),
            request.api or Address(LOOPBACK, next(ports)),
        )
        for request in requests
    ]


def _member_of(directory: Path, request: MemberRequest) -> ProvisionedMember:
    own = directory / request.name
    assert request.network is not None
    assert request.api is not None
    return ProvisionedMember(
        name=request.name,
        role=request.role,
        directory=own,
        config=own / "node.toml",
        keystore=own / "keystore.json",
        passphrase=own / "passphrase",
        network=request.network,
        api=request.api,
    )


def _write_member(
    member: ProvisionedMember,
    everyone: Sequence[MemberRequest],
    genesis: Genesis,
    secrets: MemberSecrets,
    passphrase: bytes | None,
    purposes: Sequence[str],
) -> None:
    member.directory.mkdir(mode=0o700)
    cost = MODERATE_COST if passphrase is not None else RANDOM_PASSPHRASE_COST
    opened_by = passphrase if passphrase is not None else system_random.token_hex(32).encode()
    replace_private(member.passphrase, opened_by + b"\n")
    Keystore.create(
        member.keystore,
        Secrets(
            identity_seed=secrets.identity_seed,
            transport_seed=secrets.transport_seed,
            # A verifier signs no checkpoints; the file's form has the seed all the same, and nothing uses it.
            log_seed=secrets.log_seed if secrets.log_seed is not None else os.urandom(32),
            bls_share=None if secrets.key_share is None else secrets.key_share.to_bytes(),
        ),
        opened_by,
        cost,
    )
    member.config.write_text(_config_text(member, everyone, genesis, purposes), encoding="utf-8")
    load_config(member.config)


def _config_text(
    member: ProvisionedMember, everyone: Sequence[MemberRequest], genesis: Genesis, purposes: Sequence[str]
) -> str:
    listen = member.network if member.network.is_loopback else Address("0.0.0.0", member.network.port)
    peers = "\n".join(f'{_key(peer.name)} = "{peer.network}"' for peer in everyone if peer.name != member.name)
    rules = _VERIFIER_RULES
    if member.role in VOTING_ROLES:
        rules = _VOTER_RULES.format(purposes=", ".join(f'"{purpose}"' for purpose in purposes))
    return _CONFIG.format(
        name=member.name,
        role=member.role.value,
        origin=genesis.name,
        chain_id=genesis.chain_id.hex(),
        listen=listen,
        peers=peers,
        api=member.api,
        rules=rules,
    )


def _key(name: str) -> str:
    """A member name as a TOML key: one with a dot is quoted."""
    return f'"{name}"' if "." in name else name


_CONFIG = """\
# {name}, a {role} member of {origin}: made by `countersign network init` for a trial.
#
# Relative paths are relative to this file. The examples in configs/ explain every key.

[node]
name = "{name}"
genesis = "../genesis.json"
chain_id = "{chain_id}"
# Never copy it back from a backup while the keystore's identity still votes.
data_directory = "data"
keystore = "keystore.json"
passphrase_file = "passphrase"

[network]
listen = "{listen}"

[network.peers]
{peers}

[api]
listen = "{api}"

[countersign]
{rules}"""

_VOTER_RULES = """\
# A trial's standing consent: every grant for these purposes. Keep it as narrow as the licence.
auto = true
purposes = [{purposes}]
max_steps = 1000
max_duration_seconds = 3600
sources = ["*"]
operators = ["*"]
"""

_VERIFIER_RULES = """\
# A verifying node countersigns nothing.
auto = false
"""
