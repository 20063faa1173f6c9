"""``countersign custody``: handing a campaign's files to a custodian, seeing what it keeps, having them back."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from consensus.accumulators import (
    BLOBS,
    MAX_WINDOW_BYTES,
    WINDOWS,
    AccumulatorWindow,
    blob_path,
    decode_window,
    window_path,
)
from consensus.bundle import open_bundle
from consensus.codec import encode
from consensus.epochs import anchor
from consensus.event import Kind, make_entry
from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.identifiers import ChainId
from consensus.portions import Custody, Portions, SaltedPortion
from consensus.predicates import Predicate
from consensus.predicates.accumulators import Window, provenance
from consensus.rejection import ConfigError, Reason, Rejected, Unavailable
from node.client import CustodyAnswer, NodeClient
from node.commands.connection import connect, node_options
from node.commands.fields import digest_argument
from node.commands.member import load_member, signed_by
from node.commands.output import print_json, print_table
from node.commands.submission import deliver
from node.files import open_regular, sync_directory

PART_BYTES = 4 << 20


@click.group()
def custody() -> None:
    """Keep a campaign's sums and sketches with others than its operator."""


_CAMPAIGN = click.option("--campaign", callback=digest_argument, required=True, help="The campaign's id.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@custody.command("hand-in")
@node_options
@_CAMPAIGN
@click.option(
    "--accumulators",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    help="The run's folder of accumulators.",
)
@_JSON
def custody_hand_in(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    campaign: bytes,
    directory: Path,
    as_json: bool,
) -> None:
    """Hand in what a custodian lacks of the windows that stand on its log.

    It takes what the log commits to and nothing else, and goes on where an earlier attempt ended. Anybody who has the
    files and a token can hand them in.

    \b
    Example:
      countersign custody hand-in --url https://library.example --campaign CAMPAIGN_ID --accumulators run/accumulators
    """
    sent_bytes = 0
    with connect(config_path, url, token_file) as client:
        held = client.custody(campaign.hex())
        for window in held.windows:
            if not window.listed:
                client.hand_in_window(
                    campaign.hex(), window.root, _read(directory / window_path(bytes.fromhex(window.root)))
                )
        held = client.custody(campaign.hex())
        for window in held.windows:
            for file in window.files:
                sent_bytes += _hand_in(client, campaign, directory, file.sha256, file.size_bytes, file.held_bytes)
        held = client.custody(campaign.hex())
    if as_json:
        print_json({"sent_bytes": sent_bytes, "windows": len(held.windows), "whole": _whole(held)})
    else:
        click.echo(f"{sent_bytes} bytes handed in; {_whole(held)} of {len(held.windows)} windows are there whole")


@custody.command("status")
@node_options
@_CAMPAIGN
@_JSON
@click.pass_context
def custody_status(
    context: click.Context,
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    campaign: bytes,
    as_json: bool,
) -> None:
    """Show which windows a custodian says it holds. Exit codes: 0 all that stand, 1 not all.

    Its word: countersign custody fetch checks it.

    \b
    Example:
      countersign custody status --config library/node.toml --campaign CAMPAIGN_ID
    """
    with connect(config_path, url, token_file) as client:
        held = client.custody(campaign.hex())
    whole = _whole(held)
    if as_json:
        print_json(
            {
                "maximum_bytes": held.maximum_bytes,
                "set_aside_bytes": held.set_aside_bytes,
                "windows": [
                    {
                        "first_step": window.first_step,
                        "last_step": window.last_step,
                        "root": window.root,
                        "files": len(window.files),
                        "size_bytes": sum(file.size_bytes for file in window.files),
                        "held_bytes": sum(file.held_bytes for file in window.files),
                        "whole": window.is_whole,
                    }
                    for window in held.windows
                ],
            }
        )
    else:
        rows = [
            (
                f"{window.first_step} to {window.last_step}",
                "whole" if window.is_whole else "incomplete" if window.listed else "missing",
                f"{sum(file.held_bytes for file in window.files)} of {sum(file.size_bytes for file in window.files)}",
            )
            for window in held.windows
        ]
        click.echo(f"{whole} of {len(held.windows)} windows are there whole")
        click.echo(f"{held.set_aside_bytes} of {held.maximum_bytes} bytes are set aside, of all campaigns")
        if rows:
            print_table(("steps", "", "bytes"), rows)
    context.exit(0 if whole == len(held.windows) else 1)


@custody.command("sign")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    required=True,
    help="The custodian's configuration file; its own node is asked what it holds.",
)
@_CAMPAIGN
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed event to this new file instead.")
@_JSON
def custody_sign(config_path: Path, campaign: bytes, out: Path | None, as_json: bool) -> None:
    """Say on the log that this member holds all that stands of a campaign. Refused while a window is not there whole.

    Where the policy names this member's role under custody, a release waits for it: sign when the last step is final.
    It is about the campaign as it stands; later steps need another word. Any member but an operator may say so.

    \b
    Example:
      countersign custody sign --config library/node.toml --campaign CAMPAIGN_ID
    """
    own = load_member(config_path)
    with connect(config_path, None, None) as client:
        # Before what is held is looked at: a window that ends in between is then not signed for.
        last_event = client.campaign(campaign.hex()).last_event
        held = client.custody(campaign.hex())
    lacking = [window for window in held.windows if not window.is_whole]
    if not held.windows:
        raise Rejected(Reason.CUSTODY_MISSING, "the campaign has committed to no window yet: there is nothing to hold")
    if lacking:
        first = f"steps {lacking[0].first_step} to {lacking[0].last_step}"
        raise Rejected(
            Reason.CUSTODY_MISSING, f"{len(lacking)} of {len(held.windows)} windows are not here whole: {first}"
        )
    content = SaltedPortion(os.urandom(32), encode(Custody(bytes.fromhex(last_event))))
    portions = Portions(None, content, None)
    entry = make_entry(own.committee.chain_id, Kind.CUSTODY, own.member.id, portions, campaign=campaign)
    event, encoded = signed_by(own, entry, portions)
    deliver(event, encoded, submit_with=config_path if out is None else None, out=out, as_json=as_json)


@custody.command("fetch")
@node_options
@_CAMPAIGN
@click.option("--genesis", type=click.Path(path_type=Path), required=True, help="The genesis file.")
@click.option("--chain-id", callback=digest_argument, required=True, help="The chain id, from another channel.")
@click.option("--out", "directory", type=click.Path(path_type=Path), required=True, help="The folder to fill.")
@_JSON
def custody_fetch(
    config_path: Path | None,
    url: str | None,
    token_file: Path | None,
    campaign: bytes,
    genesis: Path,
    chain_id: bytes,
    directory: Path,
    as_json: bool,
) -> None:
    """Fetch a campaign's windows from a custodian, each file held to what the log commits to.

    Which windows there must be is proved against the pinned chain; what is in the folder already is kept. The folder
    is one for trace and index, as the job's own.

    \b
    Example:
      countersign custody fetch --url https://library.example --campaign CAMPAIGN_ID --genesis genesis.json \\
        --chain-id CHAIN_ID --out accumulators
    """
    with open_regular(genesis, MAX_JSON_BYTES) as (file, _):
        trusted = anchor(genesis_from_json(file.read()), ChainId(chain_id))
    with connect(config_path, url, token_file) as client:
        encoded = client.bundle(Predicate.ACCUMULATORS, {"campaign": campaign.hex()})
        windows = provenance(open_bundle(trusted, encoded)).windows
        fetched_bytes = fetch_windows(client, campaign, windows, directory)
    if as_json:
        print_json({"fetched_bytes": fetched_bytes, "windows": len(windows)})
    else:
        click.echo(f"{fetched_bytes} bytes fetched; all {len(windows)} windows are in {directory}, held to the log")


def fetch_windows(client: NodeClient, campaign: bytes, windows: Sequence[Window], directory: Path) -> int:
    """Fill a folder with windows' lists and files from a custodian; the bytes of files fetched.

    Raises:
        Rejected: ``DIGEST_MISMATCH`` for other files than the log commits to; ``NOT_FOUND``.
        Unavailable: the custodian does not answer.
    """
    fetched_bytes = 0
    for name in (WINDOWS, BLOBS):
        (directory / name).mkdir(parents=True, exist_ok=True)
    for window in windows:
        listed = _window(client, campaign, directory, window)
        for sha256, size_bytes in _files(listed):
            fetched_bytes += _fetch(client, campaign, directory, sha256, size_bytes)
    return fetched_bytes


def _whole(held: CustodyAnswer) -> int:
    return sum(window.is_whole for window in held.windows)


def _hand_in(
    client: NodeClient, campaign: bytes, directory: Path, sha256: str, size_bytes: int, held_bytes: int
) -> int:
    """Send the rest of a file; the bytes sent."""
    if held_bytes == size_bytes:
        return 0
    path, begun_at = directory / blob_path(bytes.fromhex(sha256)), held_bytes
    try:
        with path.open("rb") as file:
            file.seek(held_bytes)
            at = held_bytes
            while at < size_bytes:
                part = file.read(min(PART_BYTES, size_bytes - at))
                if not part:
                    raise ConfigError(f"{path}: expected {size_bytes} bytes, found {at}")
                held_bytes = client.hand_in_part(campaign.hex(), sha256, at, part).held_bytes
                if held_bytes != at + len(part):
                    raise Unavailable(f"{client.url} has {held_bytes} bytes of {path}, sent were {at + len(part)}")
                at = held_bytes
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that the run's window names, found: {error.strerror}") from error
    return size_bytes - begun_at


def _window(client: NodeClient, campaign: bytes, directory: Path, window: Window) -> AccumulatorWindow:
    """A window's list, from the folder or fetched into it."""
    path = directory / window_path(window.root)
    content = _read(path) if path.is_file() else client.custody_window(campaign.hex(), window.root.hex())
    listed = decode_window(content, window.root)
    terms = listed.terms
    if (terms.campaign, terms.first_step, terms.last_step) != (campaign, window.first, window.last):
        raise Rejected(Reason.DIGEST_MISMATCH, f"window {window.root.hex()} is of other steps or another campaign")
    if not path.is_file():
        _named(path, iter([content]))
    return listed


def _fetch(client: NodeClient, campaign: bytes, directory: Path, sha256: bytes, size_bytes: int) -> int:
    """A file that the folder lacks; the bytes fetched.

    Raises:
        Rejected: ``DIGEST_MISMATCH``: the custodian has another; ``NOT_FOUND``.
    """
    path = directory / blob_path(sha256)
    if path.is_file():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").digest() == sha256:
                return 0
    hashed = hashlib.sha256()

    def parts() -> Iterator[bytes]:
        at = 0
        while at < size_bytes:
            part = client.custody_part(campaign.hex(), sha256.hex(), at)
            if not part or at + len(part) > size_bytes:
                raise Rejected(
                    Reason.DIGEST_MISMATCH, f"file {sha256.hex()}: {at + len(part)} bytes, committed are {size_bytes}"
                )
            hashed.update(part)
            at += len(part)
            yield part
        if hashed.digest() != sha256:
            raise Rejected(
                Reason.DIGEST_MISMATCH, f"the custodian's file {sha256.hex()} has SHA-256 {hashed.hexdigest()}"
            )

    _named(path, parts())
    return size_bytes


def _named(path: Path, parts: Iterator[bytes]) -> None:
    """A file that has its name once all of it is there and right."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            for part in parts:
                file.write(part)
        unfinished.replace(path)
        sync_directory(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _files(listed: AccumulatorWindow) -> Iterator[tuple[bytes, int]]:
    """SHA-256 and size of every file that a window's list names."""
    for entry in listed.entries:
        yield entry.blob_sha256, entry.size_bytes
        if entry.sketches_sha256:
            yield entry.sketches_sha256, entry.sketches_bytes


def _read(path: Path) -> bytes:
    with open_regular(path, MAX_WINDOW_BYTES) as (file, _):
        return file.read()
