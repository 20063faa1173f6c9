"""``countersign witness``: vouch for one history of a log, with a key that needs no membership."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from consensus.checkpoint import Checkpoint, assemble_note, note_text, parse_checkpoint
from consensus.cosignature import (
    COSIGNERS,
    Cosigner,
    Ed25519Cosigner,
    WitnessKey,
    cosign,
    encode_witness_key,
    parse_witness_key,
    verify_cosignatures,
)
from consensus.epochs import Anchor, anchor
from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable
from node.commands.connection import connect, node_options
from node.commands.fields import hex_argument
from node.commands.output import print_json, utc
from node.config import load_config
from node.files import PRIVATE_MODE, open_regular, read_private, require_absent, write_new, write_output
from node.identity import load_genesis
from node.verify import MAX_CHECKPOINT_BYTES, pinned_chain
from node.witness import ask_witness, next_checkpoint, stated_by

SEED_BYTES = 32


class WitnessKeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A witness's secret, mode 0600; the seed in hexadecimal."""

    name: str
    scheme: str
    seed: str

    def __repr__(self) -> str:
        return f"WitnessKeyFile(name={self.name!r}, hidden)"


@click.group()
def witness() -> None:
    """Vouch for one history of a log, or have it vouched for."""


_KEY = click.option(
    "--key", "key_path", type=click.Path(path_type=Path), required=True, help="File of countersign witness key."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@witness.command("key")
@click.option("--name", required=True, help="What the witness is called, best a domain: witness.example/w1.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New key file to write, mode 0600.")
@click.option(
    "--scheme",
    type=click.Choice(tuple(COSIGNERS)),
    default=Ed25519Cosigner.type.label,
    show_default=True,
    help="How it signs; ml-dsa-44 withstands quantum computers, and not every tool reads it yet.",
)
@_JSON
def witness_key(name: str, out: Path, scheme: str, as_json: bool) -> None:
    """Make a witness's key.

    Printed is the verifier key that others trust it by.

    \b
    Example:
      countersign witness key --name witness.example/w1 --out witness.key
    """
    require_absent(out)
    seed = os.urandom(SEED_BYTES)
    verifier_key = encode_witness_key(name, COSIGNERS[scheme](seed))
    write_new(out, msgspec.json.encode(WitnessKeyFile(name, scheme, seed.hex())), PRIVATE_MODE)
    if as_json:
        print_json({"name": name, "scheme": scheme, "verifier_key": verifier_key, "file": str(out)})
        return
    click.echo(verifier_key)
    click.echo(f"kept in {out}: whoever has this file can vouch in your name", err=True)


@witness.command("cosign")
@node_options
@click.option("--genesis", "genesis_path", type=click.Path(path_type=Path), help="genesis.json, with --url.")
@click.option(
    "--chain-id", callback=hex_argument, help="The pinned chain id, with --url: 64 hex digits, what you trust."
)
@_KEY
@click.option(
    "--checkpoint",
    "checkpoint_path",
    type=click.Path(path_type=Path),
    required=True,
    help="The checkpoint that this witness signed last: read before, replaced after. Keep it; at first there is none.",
)
@_JSON
def witness_cosign(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    genesis_path: Path | None,
    chain_id: str | None,
    key_path: Path,
    checkpoint_path: Path,
    as_json: bool,
) -> None:
    """Sign a checkpoint that continues the last.

    It is the newest of a node, of a verifying one too. The log must be certified by the members that the genesis leads
    to, and begin with everything this witness signed before. Run it from time to time, and hand around what it leaves
    in --checkpoint: whoever trusts the witness holds bundles against it with countersign verify --checkpoint FILE
    --witness KEY.

    \b
    Examples:
      countersign witness cosign --url https://node.example --genesis genesis.json --chain-id CHAIN_ID \\
        --key witness.key --checkpoint witnessed.txt
      countersign witness cosign --config auditor/node.toml --key witness.key --checkpoint witnessed.txt
    """
    name, cosigner = _cosigner(key_path)
    trusted = _trusted(config_path, genesis_path, chain_id)
    own = parse_witness_key(encode_witness_key(name, cosigner))
    with _alone(checkpoint_path):
        last, signed_at = _last(checkpoint_path, trusted.genesis.name, own)
        now = int(time.time())
        if now < signed_at:
            raise ConfigError(
                f"{checkpoint_path} was signed at {utc(1_000 * signed_at)}: this machine's clock is behind it"
            )
        with connect(config_path, url, token_file) as client:
            text, lines = next_checkpoint(client, trusted, last)
        signed = assemble_note(text, [*lines, cosign(text, name, cosigner, now)])
        write_output(checkpoint_path, signed, checkpoint_path)
    stated = parse_checkpoint(text)
    if as_json:
        before = None if last is None else last.size
        print_json({"witness": name, "size": stated.size, "root": stated.root.hex(), "before": before, "time": now})
        return
    click.echo(signed.decode(), nl=False)
    since = "the first that this witness signs" if last is None else f"it continues the {last.size} signed before"
    click.echo(f"signed: {stated.size} events, certified from the genesis on; {since}", err=True)


@witness.command("ask")
@node_options
@click.option(
    "--witness",
    "asked",
    nargs=2,
    multiple=True,
    required=True,
    metavar="URL KEY",
    help="A witness's submission prefix (C2SP tlog-witness) and verifier key; may be given more than once.",
)
@click.option(
    "--checkpoint",
    "checkpoint_path",
    type=click.Path(path_type=Path),
    required=True,
    help="File for the checkpoint with the witnesses' signatures, replaced; it says what each of them signed last.",
)
@_JSON
def witness_ask(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    asked: tuple[tuple[str, str], ...],
    checkpoint_path: Path,
    as_json: bool,
) -> None:
    """Have public witnesses sign a checkpoint.

    It is the newest of a voting node. A witness has to know the log: give its operator what countersign log keys
    prints. Any witness of the C2SP protocol will do. Its signature says that it saw one history, not that the members
    certified it. The file is written if one of them signs. Exit code 0 when all did, 1 when one refused, 2 when one
    could not be asked.

    \b
    Example:
      countersign witness ask --config library/node.toml --witness https://witness.example/ KEY \\
        --checkpoint witnessed.txt
    """
    witnesses = [(witness_url, parse_witness_key(key)) for witness_url, key in asked]
    failed: dict[str, Rejected | Unavailable] = {}
    with connect(config_path, url, token_file) as client:
        note = signed = client.checkpoint()
        stated = parse_checkpoint(note_text(note))
        if checkpoint_path.exists():
            # It is replaced, and must not be another file.
            _stated_in(checkpoint_path, stated.origin)
        for witness_url, key in witnesses:
            old_size = _signed_before(checkpoint_path, stated, key)
            try:
                lines = ask_witness(
                    witness_url, key, note, old_size, lambda size: client.consistency(size, stated.size)
                )
            except (Rejected, Unavailable) as error:
                failed[key.name] = error
            else:
                signed += lines
    times = verify_cosignatures(signed, [key for _, key in witnesses]) if signed != note else {}
    if times:
        write_output(checkpoint_path, signed, checkpoint_path)
    if as_json:
        refusals = {name: str(why) for name, why in failed.items()}
        print_json({"size": stated.size, "root": stated.root.hex(), "witnesses": times, "failed": refusals})
    elif times:
        click.echo(signed.decode(), nl=False)
    for name, seconds in times.items():
        when = "" if seconds is None else f" at {utc(1_000 * seconds)}"
        click.echo(f"signed: {stated.size} events, by {name}{when}", err=True)
    for name, why in failed.items():
        click.echo(f"not signed by {name}: {why}", err=True)
    refused = any(isinstance(why, Rejected) for why in failed.values())
    click.get_current_context().exit(1 if refused else 2 if failed else 0)


def _signed_before(path: Path, stated: Checkpoint, key: WitnessKey) -> int:
    """The size that a witness signed last as far as a file says; 0 where it says nothing, and the witness will."""
    try:
        last, _ = _last(path, stated.origin, key)
    except Rejected:
        return 0
    return 0 if last is None or last.size > stated.size else last.size


def _cosigner(path: Path) -> tuple[str, Cosigner]:
    try:
        held = msgspec.json.decode(read_private(path, "witness key"), type=WitnessKeyFile)
        return held.name, COSIGNERS[held.scheme](_seed(held.seed))
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: expected a file of countersign witness key, found another content") from error


def _seed(text: str) -> bytes:
    seed = bytes.fromhex(text)
    if len(seed) != SEED_BYTES:
        raise ValueError("a seed has 32 bytes")
    return seed


def _trusted(config_path: Path | None, genesis_path: Path | None, chain_id: str | None) -> Anchor:
    if genesis_path is not None and chain_id is not None:
        with open_regular(genesis_path, MAX_JSON_BYTES) as (file, size_bytes):
            return anchor(genesis_from_json(file.read(size_bytes)), pinned_chain(chain_id))
    if config_path is None or genesis_path is not None or chain_id is not None:
        raise ConfigError("expected --config FILE, or --url URL with --genesis FILE and --chain-id HEX")
    config = load_config(config_path)
    return anchor(load_genesis(config), config.node.pinned_chain)


def _last(path: Path, origin: str, key: WitnessKey) -> tuple[Checkpoint | None, int]:
    """The checkpoint that a witness signed last, and when; None and 0 where there is no file.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` for a file that holds none of this log's, or none that the witness signed.
    """
    if not path.exists():
        return None, 0
    note, stated = _stated_in(path, origin)
    try:
        return stated, verify_cosignatures(note, [key])[key.name] or 0
    except Rejected as error:
        raise Rejected(Reason.BAD_CHECKPOINT, f"{path}: {error.detail}") from error


def _stated_in(path: Path, origin: str) -> tuple[bytes, Checkpoint]:
    """The note in a file, and the checkpoint of this log that it states. Raises as ``_last``."""
    with open_regular(path, MAX_CHECKPOINT_BYTES) as (file, size_bytes):
        note = file.read(size_bytes)
    try:
        return note, stated_by(note_text(note), origin)
    except Rejected as error:
        raise Rejected(Reason.BAD_CHECKPOINT, f"{path}: {error.detail}") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process signs at a time: two could sign a smaller log after a larger one."""
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"{path}: another process signs with it just now") from error
    finally:
        os.close(descriptor)
