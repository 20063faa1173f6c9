"""A node's configuration: one TOML file, checked whole before anything starts.

Unknown keys and wrong types are refused with file, key, expected and found, because a misspelt rule that is
silently ignored countersigns what its owner did not mean to. Relative paths are relative to the file. The
examples in ``configs/`` document every key; a test holds them complete.

Secrets stay out of it: passphrase and API tokens can stand in files of their own, which ``keystore.py`` and
``api_tokens`` read. That the genesis matches ``chain_id`` is checked by who loads the genesis.
"""

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from consensus.engine import Timing
from consensus.identifiers import ChainId
from consensus.membership import MemberName
from consensus.rejection import ConfigError
from node.files import read_private, read_toml

ANY = "*"
MIN_TOKEN_CHARACTERS = 16
DEFAULT_TIMING = Timing()

_Positive = Annotated[int, Meta(ge=1, le=2**53 - 1)]
_TOKEN = r"\A[!-~]*\Z"
_Token = Annotated[str, Meta(min_length=MIN_TOKEN_CHARACTERS, pattern=_TOKEN)]
_CHAIN_ID = r"\A[0-9a-f]{64}\Z"
_MISSING = re.compile("Object missing required field `([a-z_]+)`")
_WORDED = {
    r"\A[a-z0-9]([a-z0-9.-]*[a-z0-9])?\Z": "a name of a-z, 0-9, '.' and '-', the first and last a letter or digit",
    _TOKEN: "visible ASCII characters alone",
    _CHAIN_ID: "64 lower-case hexadecimal digits",
}
"""What msgspec would tell as a pattern, in words."""


class Address:
    """A host and TCP port, written ``host:port`` or ``[IPv6]:port``; port 0 lets the system choose."""

    __slots__ = ("host", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address written as ``text``.

        Raises:
            ValueError: it is not one.
        """
        host, separator, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        elif ":" in host:
            raise ValueError(f'expected "host:port" or "[IPv6]:port", found "{text}"')
        if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
            raise ValueError(f'expected "host:port" with a port from 0 to 65535, found "{text}"')
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and (self.host, self.port) == (other.host, other.port)

    def __hash__(self) -> int:
        return hash((self.host, self.port))


class NodeSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Who this node is and where its files are."""

    name: MemberName
    genesis: Path
    chain_id: Annotated[str, Meta(pattern=_CHAIN_ID)]
    data_directory: Path
    keystore: Path
    passphrase_file: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    sync: Literal["replay", "snapshot"] = "replay"
    checkpoint: Path | None = None
    witnesses: tuple[str, ...] = ()
    witnesses_needed: Annotated[int, Meta(ge=1)] = 1

    @property
    def pinned_chain(self) -> ChainId:
        """The chain id as bytes: this node's trust anchor."""
        return ChainId(bytes.fromhex(self.chain_id))


class NetworkSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Where other members reach this node, and where it reaches them, by member name."""

    listen: Address
    peers: dict[MemberName, Address] = {}


class ApiSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The HTTP interface for trainers and people."""

    listen: Address = Address("127.0.0.1", 0)
    tokens: tuple[_Token, ...] = ()
    tokens_file: Path | None = None
    max_body_bytes: _Positive = 8 << 20

    def __repr__(self) -> str:
        return f"ApiSection(listen={self.listen!r}, tokens=hidden, max_body_bytes={self.max_body_bytes})"


class CountersignSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The owner's rules for countersigning grants without asking; without ``auto`` every grant waits."""

    auto: bool = False
    purposes: tuple[str, ...] = ()
    max_steps: _Positive = 1_000
    max_duration_seconds: _Positive = 3_600
    sources: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()


class LimitsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds on what waits in memory, and on what catching up may take: an answer has at most 4 MiB and seconds."""

    mempool_events: _Positive = 20_000
    mempool_bytes: _Positive = 64 << 20
    sync_bytes_per_second: Annotated[int, Meta(ge=1 << 20, le=2**53 - 1)] = 8 << 20


class CustodySection(Struct, frozen=True, forbid_unknown_fields=True):
    """How much of campaigns' files this node keeps, all together; 0: it is no custodian."""

    maximum_bytes: Annotated[int, Meta(ge=0, le=2**53 - 1)] = 0


class RoundSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How long this voter waits for others; its own choice, no rule of the network."""

    timeout_ms: Annotated[int, Meta(ge=10, le=60_000)] = DEFAULT_TIMING.timeout_ms
    max_timeout_ms: Annotated[int, Meta(ge=10, le=600_000)] = DEFAULT_TIMING.max_timeout_ms


class NodeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole configuration file; every path absolute."""

    node: NodeSection
    network: NetworkSection
    api: ApiSection = ApiSection()
    countersign: CountersignSection = CountersignSection()
    limits: LimitsSection = LimitsSection()
    round: RoundSection = RoundSection()
    custody: CustodySection = CustodySection()


def load_config(path: Path) -> NodeConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: missing, not TOML, an unknown key, a wrong type or value, or sections that contradict
            each other; names file, key, expected and found.
    """
    path = path.absolute()
    table = read_toml(path, "a configuration")
    _refuse_unknown_keys(path, table)

    def resolve(kind: type, found: object) -> object:
        if not isinstance(found, str) or not found:
            raise ValueError(f"expected a non-empty string, found {found!r}")
        if kind is Address:
            return Address.parse(found)
        return path.parent / _expanded(found)

    try:
        for name, address in _peers(table):
            _check_peer(path, name, address, resolve)
        config = msgspec.convert(table, NodeConfig, dec_hook=resolve)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_readable(str(error), table)}") from error
    _check_together(path, config)
    return config


def api_tokens(api: ApiSection) -> tuple[str, ...]:
    """The API tokens of the configuration and of ``tokens_file``: one a line, ``#`` starts a comment line.

    Raises:
        ConfigError: the file is missing, readable by others, holds a token that is too short or cannot be sent, or
            none: that must not open the interface to everybody.
    """
    if api.tokens_file is None:
        return api.tokens
    lines = read_private(api.tokens_file, "token file").decode("utf-8", errors="replace").splitlines()
    listed = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    for number, token in enumerate(listed, start=1):
        if len(token) < MIN_TOKEN_CHARACTERS:
            raise ConfigError(
                f"{api.tokens_file}: expected tokens of at least {MIN_TOKEN_CHARACTERS} characters, "
                f"found token {number} with {len(token)}"
            )
        if not re.fullmatch(_TOKEN, token):
            raise ConfigError(f"{api.tokens_file}: expected visible ASCII alone, found more in token {number}")
    if not api.tokens + listed:
        raise ConfigError(f"{api.tokens_file}: expected at least one token, a line each, found none")
    return api.tokens + listed


def _refuse_unknown_keys(path: Path, table: dict[str, object]) -> None:
    sections = {field.name: field.type for field in msgspec.structs.fields(NodeConfig)}
    _refuse_unknown(path, "", table, tuple(sections))
    for section, content in table.items():
        if isinstance(content, dict):
            known = tuple(field.name for field in msgspec.structs.fields(sections[section]))
            _refuse_unknown(path, f"{section}.", content, known)


def _refuse_unknown(path: Path, prefix: str, table: dict[str, object], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            suggestion = f" (did you mean {prefix}{close[0]}?)" if close else ""
            raise ConfigError(f"{path}: unknown key {prefix}{key}{suggestion}; expected one of: {', '.join(known)}")


def _peers(table: dict[str, object]) -> Iterable[tuple[str, object]]:
    network = table.get("network")
    peers = network.get("peers") if isinstance(network, dict) else None
    return peers.items() if isinstance(peers, dict) else ()


def _check_peer(path: Path, name: str, address: object, resolve: Callable[[type, object], object]) -> None:
    """msgspec does not say which of the peers is wrong."""
    for part, kind in ((name, MemberName), (address, Address)):
        try:
            msgspec.convert(part, kind, dec_hook=resolve)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: network.peers.{_readable(f'{error} - at `$.{name}`', {name: part})}") from error


def _expanded(text: str) -> Path:
    if "\0" in text:
        raise ValueError("expected a path, found one with a zero byte")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f'expected a path, found "{text}", whose home directory is not known') from error


def _readable(message: str, table: dict[str, object]) -> str:
    """msgspec's message with the key first, and what was found: its "… - at `$.api.listen`" becomes "api.listen: …"."""
    text, _, place = message.partition(" - at `$")
    key = place.removesuffix("`").removeprefix(".")
    missing = _MISSING.fullmatch(text)
    if missing is not None:
        return f"{'.'.join(filter(None, (key, missing[1])))}: required, found none"
    if text.startswith("Invalid enum value"):
        text = f"expected one of {', '.join(_permitted(key))}"
    if "found" not in text and not key.startswith("api.tokens"):
        found: object = table
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        # A whole section may hold tokens.
        text += f", found {found!r:.80}" if isinstance(found, str | int | float) else ""
    for pattern, wording in _WORDED.items():
        text = text.replace(f"`str` matching regex {pattern!r}", wording)
    return f"{key or 'file'}: {text[:1].lower()}{text[1:].replace('`', '')}"


def _permitted(key: str) -> tuple[str, ...]:
    """The values of a key that has a few of them."""
    kind: object = NodeConfig
    for part in key.split("."):
        kind = next(field.type for field in msgspec.structs.fields(kind) if field.name == part)  # type: ignore[arg-type]
    return get_args(kind)


def _check_together(path: Path, config: NodeConfig) -> None:
    api, countersign, node = config.api, config.countersign, config.node
    if node.checkpoint is None and node.witnesses:
        raise ConfigError(f"{path}: node.witnesses: expected node.checkpoint beside them, found none")
    if node.witnesses_needed > max(1, len(node.witnesses)):
        raise ConfigError(
            f"{path}: node.witnesses_needed: expected at most as many as node.witnesses has, {len(node.witnesses)}, "
            f"found {node.witnesses_needed}"
        )
    if not api.listen.is_loopback and not api.tokens and api.tokens_file is None:
        raise ConfigError(
            f"{path}: api.listen: expected a loopback address, or api.tokens or api.tokens_file; "
            f"found {api.listen} without tokens"
        )
    if config.node.name in config.network.peers:
        raise ConfigError(f"{path}: network.peers: expected other members, found this node, {config.node.name}")
    for name, address in config.network.peers.items():
        if address.port == 0:
            raise ConfigError(f"{path}: network.peers.{name}: expected a port from 1 to 65535, found {address}")
    if config.round.max_timeout_ms < config.round.timeout_ms:
        raise ConfigError(
            f"{path}: round.max_timeout_ms: expected at least round.timeout_ms, {config.round.timeout_ms}, "
            f"found {config.round.max_timeout_ms}"
        )
    if countersign.auto:
        for key in ("purposes", "sources", "operators"):
            if not getattr(countersign, key):
                raise ConfigError(f"{path}: countersign.{key}: expected at least one with countersign.auto, found none")
