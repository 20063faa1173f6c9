"""``countersign index``: build, check and export the index of a campaign's sketches."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from attribution.index import Index, LeftOut, SketchedCampaign, open_index
from attribution.index_build import build_index, check_index
from attribution.log import CampaignLog
from attribution.options import ACCUMULATORS, CUSTODIAN, GivenLog, RunFiles, log_options, told_now_and_then
from attribution.receipts import shown

SHOWN = 10

_INDEX = click.option(
    "--index", "index_path", type=click.Path(path_type=Path), required=True, help="As countersign index build made."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group("index")
def index() -> None:
    """Keep a campaign's sketches where traces find them fast, and take them elsewhere.

    An index holds what the run's files of sketches hold, in columns, one source's rows together. It is no authority:
    whatever a trace reads of it is held to the log, so an index may come from anybody, and can be made again any time.
    """


@index.command("build")
@ACCUMULATORS
@CUSTODIAN
@log_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make, or index to replace.")
@_JSON
def build_command(directory: Path, custodian: str | None, given: GivenLog, out: Path, as_json: bool) -> None:
    """Make the index of all sketches that the log commits to and that are here.

    Exit code 0 when it holds all of them, 2 when files were left out (they are named), 1 when nothing is here to index.

    \b
    Example:
      countersign index build --accumulators run/accumulators --bundle campaign.bundle --genesis genesis.json \\
        --chain-id CHAIN_ID --out campaign.index
    """
    log = given.open()
    made = build_index(
        SketchedCampaign.of(log), RunFiles(directory, custodian=custodian).fetch(log), out, told_now_and_then()
    )
    left_out = made.header.left_out
    if as_json:
        click.echo(json.dumps({**_holdings(made), "left_out": [_fields(held) for held in left_out]}, indent=2))
    else:
        click.echo("\n".join([*_about(log, made), *_named("left out", [str(held) for held in left_out])]))
    click.get_current_context().exit(2 if left_out else 0)


@index.command("check")
@_INDEX
@log_options
@_JSON
def check_command(index_path: Path, given: GivenLog, as_json: bool) -> None:
    """Hold all of an index to the log. Traces do this themselves for what they read.

    Needs no other file of the run. Exit code 0 when the index holds all that the log commits to, 1 when something in it
    is altered, 2 when something is missing.

    \b
    Example:
      countersign index check --index campaign.index --bundle campaign.bundle --genesis genesis.json --chain-id CHAIN_ID
    """
    log = given.open()
    held = open_index(index_path, SketchedCampaign.of(log))
    found = check_index(held, told_now_and_then())
    if as_json:
        document = {
            **_holdings(held),
            "whole_segments": found.whole,
            "altered": list(found.altered),
            "missing": [_fields(each) for each in found.missing],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        lines = [
            *_about(log, held),
            f"checked   {found.whole} of {len(held.header.segments)} segments have the SHA-256 that is on the log",
            *_named("altered", found.altered),
            *_named("missing", [str(each) for each in found.missing]),
        ]
        click.echo("\n".join(lines))
    click.get_current_context().exit(1 if found.altered else 2 if found.missing else 0)


@index.command("export")
@_INDEX
@log_options
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A file: NAME.parquet or NAME.arrow."
)
def export_command(index_path: Path, given: GivenLog, out: Path) -> None:
    """Write an index as one table: Parquet or Arrow. Every row is held to the log first.

    Needs the extra export. Exit code 0 when the table has all that the log commits to, 2 when something is missing, 1
    when something is altered: then nothing is written.

    \b
    Example:
      countersign index export --index campaign.index --bundle campaign.bundle --genesis genesis.json \\
        --chain-id CHAIN_ID --out sketches.parquet
    """
    from attribution.export import export_index  # noqa: PLC0415 (only this needs pyarrow)

    log = given.open()
    held = open_index(index_path, SketchedCampaign.of(log))
    names = {source.id: source.record.claim.name for source in log.provenance.sources}
    rows, left_out = export_index(held, names, out, told_now_and_then())
    lines = [f"exported  {rows} rows to {shown(str(out))}", *_named("left out", [str(each) for each in left_out])]
    click.echo("\n".join(lines))
    click.get_current_context().exit(2 if left_out else 0)


def _about(log: CampaignLog, held: Index) -> list[str]:
    sources = {segment.source for segment in held.header.segments}
    return [
        f"campaign  {log.bundle.campaign.hex()} of {log.provenance.operator}: {shown(log.provenance.campaign.name)}",
        f"index     {shown(str(held.folder))}, {held.size_bytes / 1e6:,.1f} MB",
        f"holds     {held.examples} sketches of {held.visits} example-visits, of {len(held.header.parameters)} "
        f"parameters, in {len(held.header.segments)} segments of {len(sources)} sources",
    ]


def _holdings(held: Index) -> dict[str, object]:
    return {
        "chain_id": held.header.chain_id,
        "campaign": held.header.campaign,
        "index": str(held.folder),
        "size_bytes": held.size_bytes,
        "sketches": held.examples,
        "visits": held.visits,
        "parameters": len(held.header.parameters),
        "segments": len(held.header.segments),
    }


def _named(word: str, what: Sequence[str]) -> list[str]:
    lines = [f"{word:9} {shown(each)}" for each in what[:SHOWN]]
    if len(what) > SHOWN:
        lines.append(f"{'':9} and {len(what) - SHOWN} more")
    return lines


def _fields(held: LeftOut) -> dict[str, object]:
    return {
        "source": held.source,
        "policy": held.policy,
        "first_step": held.first_step,
        "last_step": held.last_step,
        "why": held.why,
    }
