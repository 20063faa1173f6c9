"""``countersign log``: read the log and keep proofs of what is on it; ``log_disk.py`` has what needs the disk."""

import time
from pathlib import Path

import click
import msgspec

from consensus.bundle import open_bundle
from consensus.checkpoint import encode_verifier_key, note_text, parse_checkpoint, verify_note_by
from consensus.epochs import Anchor, Pin, anchor
from consensus.event import Kind, check_event, pack_parts
from consensus.membership import Genesis
from consensus.predicates import SUBJECTS, Predicate, predicate_named
from consensus.receipt import verify_receipt
from consensus.rejection import Reason, Rejected
from node.client import PAGE_EVENTS, EventRow, NodeClient
from node.commands.connection import connect, node_options
from node.commands.fields import hex_argument
from node.commands.log_disk import log_fsck, log_repair
from node.commands.member import newest_members, proven_members, read_event
from node.commands.output import print_json, print_table, utc
from node.commands.submission import deliver
from node.config import NodeConfig, load_config
from node.files import check_output, write_output
from node.identity import load_genesis
from node.verify import read_pin

FOLLOW_SECONDS = 1.0

_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The node's configuration file."
)


@click.group()
def log() -> None:
    """Read, prove, check and repair the log."""


log.add_command(log_fsck)
log.add_command(log_repair)


@log.command("checkpoint")
@_CONFIG
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed note to this new file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_checkpoint(config_path: Path, out: Path | None, as_json: bool) -> None:
    """Fetch the newest signed checkpoint and check it against the members' log keys.

    \b
    Example:
      countersign log checkpoint --config library/node.toml
    """
    config = load_config(config_path)
    genesis = load_genesis(config)
    if out is not None:
        check_output(out)
    with connect(config_path, None, None) as client:
        note = client.checkpoint()
    log_keys = _log_keys(config_path, config, genesis)
    signers = sorted(verify_note_by(note, genesis.name, log_keys))
    checkpoint = parse_checkpoint(note_text(note))
    if checkpoint.origin != genesis.name:
        raise Rejected(Reason.BAD_CHECKPOINT, f"checkpoint of '{checkpoint.origin}', this log is '{genesis.name}'")
    if out is not None:
        write_output(out, note)
    if as_json:
        print_json(
            {
                "origin": checkpoint.origin,
                "size": checkpoint.size,
                "root": checkpoint.root.hex(),
                "signers": signers,
                "note": note.decode(),
            }
        )
        return
    click.echo(note.decode(), nl=False)
    click.echo(f"checked: {checkpoint.size} events, signed by {', '.join(signers)}", err=True)


@log.command("keys")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_keys(config_path: Path, as_json: bool) -> None:
    """Print the keys that members sign checkpoints with, as witnesses and monitors take them.

    A verifier key (C2SP signed-note) of each voting member, by the log's own name: every one of them signs for the log.

    \b
    Example:
      countersign log keys --config library/node.toml
    """
    config = load_config(config_path)
    genesis = load_genesis(config)
    held = _log_keys(config_path, config, genesis)
    keys = {name: encode_verifier_key(genesis.name, log_key) for name, log_key in held.items()}
    if as_json:
        print_json({"origin": genesis.name, "keys": keys})
        return
    print_table(("member", "verifier key"), [(name, key) for name, key in keys.items()])


@log.command("show")
@node_options
@click.option("--kind", type=click.Choice([kind.value for kind in Kind]), help="Only events of this kind.")
@click.option("--campaign", metavar="ID", callback=hex_argument, help="Only events of this campaign.")
@click.option("--source", metavar="ID", callback=hex_argument, help="Only events that name this source.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="First log index.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many events.")
@click.option("--follow", is_flag=True, help="Go on with new events until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def log_show(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    kind: str | None,
    campaign: str | None,
    source: str | None,
    start: int,
    limit: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """List the events on the log.

    \b
    Examples:
      countersign log show --config library/node.toml --kind source
      countersign log show --config library/node.toml --campaign CAMPAIGN_ID --follow
    """
    asked = {"kind": kind, "campaign": campaign, "source": source}
    filters = {name: value for name, value in asked.items() if value is not None}
    left = limit
    with connect(config_path, url, token_file) as client:
        first = True
        while left is None or left > 0:
            rows, following = _page(client, filters, start, min(PAGE_EVENTS, left or PAGE_EVENTS))
            if rows or first:
                _print_events(rows, as_json, first)
            first = False
            left = None if left is None else left - len(rows)
            if following is not None:
                start = following
            elif follow:
                start = rows[-1].index + 1 if rows else start
                time.sleep(FOLLOW_SECONDS)
            else:
                return


@log.command("submit")
@_CONFIG
@click.argument("event_path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_submit(config_path: Path, event_path: Path, as_json: bool) -> None:
    """Hand in a signed event from a file and wait until it is final.

    For events signed on a machine that no node reaches.

    \b
    Example:
      countersign log submit --config library/node.toml claim.event
    """
    config = load_config(config_path)
    members = newest_members(config_path, config, load_genesis(config))
    event = read_event(event_path, members)
    encoded = pack_parts(event.entry_bytes, event.portions_bytes)
    check_event(encoded, members)
    deliver(event, encoded, submit_with=config_path, out=None, as_json=as_json)


@log.command("prove")
@_CONFIG
@click.argument("event_id", required=False, callback=hex_argument)
@click.option("--predicate", help="Ask for the bundle of this predicate instead, as countersign verify takes it.")
@click.option("--campaign", metavar="ID", callback=hex_argument, help="What the predicate is about.")
@click.option("--source", metavar="ID", callback=hex_argument, help="What the predicate is about.")
@click.option("--event", "about_event", metavar="ID", callback=hex_argument, help="What the predicate is about.")
@click.option("--earlier", metavar="HEIGHT", type=click.IntRange(min=1), help="Older ledger block, for 'consistent'.")
@click.option(
    "--checkpoint",
    "checkpoint_path",
    type=click.Path(path_type=Path),
    help="A checkpoint seen before: show in the bundle that the log continues it.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New file to write the proof to.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_prove(
    config_path: Path,
    event_id: str | None,
    predicate: str | None,
    campaign: str | None,
    source: str | None,
    about_event: str | None,
    earlier: int | None,
    checkpoint_path: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Fetch a proof, check it against the genesis, and keep it.

    With EVENT_ID a receipt: that the event is on the log. With --predicate a bundle, which anybody checks offline
    with countersign verify.

    \b
    Examples:
      countersign log prove --config library/node.toml EVENT_ID --out claim.receipt
      countersign log prove --config library/node.toml --predicate included --event EVENT_ID --out claim.bundle
      countersign verify included --bundle claim.bundle --genesis genesis.json --chain-id CHAIN_ID
    """
    if (event_id is None) == (predicate is None):
        raise click.UsageError("give either EVENT_ID or --predicate")
    if event_id is not None and checkpoint_path is not None:
        raise click.UsageError("a receipt is held against no checkpoint: use --predicate included --event EVENT_ID")
    if predicate is not None:
        about = {"campaign": campaign, "source": source, "event": about_event, "earlier": earlier}
        _check_subjects(predicate_named(predicate), {name for name, value in about.items() if value is not None})
    check_output(out)
    config = load_config(config_path)
    trusted = anchor(load_genesis(config), config.node.pinned_chain)
    with connect(config_path, None, None) as client:
        if event_id is not None:
            proof = client.receipt(event_id)
            said = _check_receipt(trusted, proof, event_id)
        else:
            assert predicate is not None
            subject = {"campaign": campaign, "source": source, "event": about_event}
            asked = {name: value for name, value in subject.items() if value is not None}
            if earlier is not None:
                asked["earlier"] = str(earlier)
            pin = None if checkpoint_path is None else read_pin(checkpoint_path, trusted.genesis.name)[0]
            if pin is not None:
                asked["size"] = str(pin.log_size)
            proof = client.bundle(predicate, asked)
            said = _check_bundle(trusted, proof, predicate, pin)
    write_output(out, proof)
    if as_json:
        print_json({**said, "file": str(out), "size_bytes": len(proof)})
        return
    for name, value in said.items():
        click.echo(f"{name.replace('_', ' '):14} {value}")
    click.echo(f"{'kept in':14} {out} ({len(proof)} bytes)")


def _check_subjects(predicate: Predicate, given: set[str]) -> None:
    needed = {*SUBJECTS[predicate], *(("earlier",) if predicate is Predicate.CONSISTENT else ())}
    if given != needed:
        expected, found = (" and ".join(f"--{name}" for name in sorted(names)) or "none" for names in (needed, given))
        raise click.UsageError(f"--predicate {predicate.value}: expected {expected} beside it, found {found}")


def _log_keys(config_path: Path, config: NodeConfig, genesis: Genesis) -> dict[str, bytes]:
    """By name, what the members of the newest epoch sign checkpoints with."""
    members = proven_members(config_path, config, genesis).members
    return {member.name: member.log_key for member in members if member.log_key}


def _page(
    client: NodeClient, filters: dict[str, str], start: int, limit: int
) -> tuple[tuple[EventRow, ...], int | None]:
    page = client.events(filters, start, limit)
    return page.events, page.next


def _print_events(rows: tuple[EventRow, ...], as_json: bool, first: bool) -> None:
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row).decode())
        return
    if first:
        click.echo(f"{'index':>8}  {'kind':10}  {'event':64}  {'author':16}  {'campaign':16}  {'seq':>5}  bytes")
    for row in rows:
        click.echo(
            f"{row.index:>8}  {row.kind:10}  {row.id:64}  {row.author_name:16}  {row.campaign[:16]:16}  "
            f"{row.sequence:>5}  {row.size_bytes}"
        )


def _check_receipt(trusted: Anchor, proof: bytes, event_id: str) -> dict[str, object]:
    verified = verify_receipt(trusted, proof)
    if verified.id.hex() != event_id:
        raise Rejected(Reason.BAD_PROOF, f"asked about {event_id}, the receipt is of {verified.id.hex()}")
    return {
        "event": event_id,
        "kind": verified.entry.kind.value,
        "log_index": verified.index,
        "as_of": f"log size {verified.header.log_size}, {utc(verified.header.timestamp_ms)}",
    }


def _check_bundle(trusted: Anchor, proof: bytes, predicate: str, pin: Pin | None) -> dict[str, object]:
    opened = open_bundle(trusted, proof, pin)
    if opened.predicate != predicate:
        raise Rejected(Reason.BAD_PROOF, f"asked for '{predicate}', the bundle is for '{opened.predicate}'")
    return {
        "predicate": predicate,
        "events": len(opened.events),
        "as_of": f"log size {opened.header.log_size}, {utc(opened.header.timestamp_ms)}",
    }
