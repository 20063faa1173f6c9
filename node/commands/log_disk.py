"""``countersign log fsck`` and ``log repair``: what a stopped node has on disk.

RocksDB is imported by these commands alone: ``countersign log show`` and its like need no database.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from node.commands.output import print_json
from node.config import load_config
from node.identity import load_genesis

if TYPE_CHECKING:
    from node.fsck_reader import Report

PROGRESS_SECONDS = 2.0

_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The node's configuration file."
)


@click.command("fsck")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_fsck(config_path: Path, as_json: bool) -> None:
    """Recompute everything a stopped node has on disk, and name what is damaged.

    Every header, certificate, event, tree node and state value, from genesis on. Where the node began at a snapshot,
    the ledger blocks that it has yet to fetch are counted and are no damage. Nothing is changed but the file lock.
    Exit code 0 when all is as it should be, 1 when something is not.

    \b
    Example:
      countersign log fsck --config library/node.toml
    """
    from node.fsck import check_data_directory  # noqa: PLC0415 (only these commands open the database)

    config = load_config(config_path)
    report = check_data_directory(config.node.data_directory, load_genesis(config), Progress())
    if as_json:
        print_json(_report_fields(report))
    else:
        print_report(report)
    if not report.sound:
        raise click.exceptions.Exit(1)


@click.command("repair")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def log_repair(config_path: Path, as_json: bool) -> None:
    """Check a stopped node's data directory; if it is damaged, set it aside so that the node fetches its log anew.

    The damaged database is renamed, not deleted. Keystore and vote journal stay. Once started, the node fetches the
    log from the other members and checks every part of it. Does nothing to a sound directory.

    \b
    Example:
      countersign log repair --config library/node.toml
    """
    from node.fsck import check_data_directory  # noqa: PLC0415
    from node.repair import SetAside, set_aside, was_cut_off  # noqa: PLC0415

    config = load_config(config_path)
    genesis = load_genesis(config)
    directory = config.node.data_directory
    report = None if was_cut_off(directory) else check_data_directory(directory, genesis, Progress())
    aside: SetAside | None = None
    if report is None or not report.sound:
        aside = set_aside(directory, genesis.chain_id)
    if as_json:
        found = {} if report is None else _report_fields(report)
        print_json({**found, "set_aside": None if aside is None else str(aside.directory)})
        return
    if report is not None:
        print_report(report)
    if aside is None:
        click.echo("nothing to repair")
        return
    height = "" if aside.height is None else f", which had come to ledger block {aside.height}"
    click.echo(f"set aside: {aside.directory}{height}")
    click.echo(
        "now start the node: it fetches the log from its peers. Delete what was set aside once their roots agree."
    )


class Progress:
    """Says on standard error how far a long check has come, at most every two seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            click.echo(f"{stage}: {done} of {total}", err=True)


def _report_fields(report: "Report") -> dict[str, object]:
    return {
        "sound": report.sound,
        "ledger_blocks": report.height,
        "events": report.log_size,
        "state_values": report.state_values,
        "ledger_blocks_missing": report.missing_blocks,
        "damages": [msgspec.to_builtins(damage) for damage in report.damages],
        "damages_left_out": report.damages_left_out,
    }


def print_report(report: "Report") -> None:
    """What was found, the verdict last."""
    for damage in report.damages:
        click.echo(f"damaged: {damage.family} {damage.key}: {damage.detail}")
    if report.damages_left_out:
        click.echo(f"and {report.damages_left_out} more")
    if report.missing_blocks:
        click.echo(
            f"not whole: {report.missing_blocks} ledger blocks missing below the snapshot that the log began at, "
            "and the rules not applied again from there on; started, the node fetches them"
        )
    verdict = "sound" if report.sound else "damaged"
    click.echo(
        f"{verdict}: {report.height} ledger blocks, {report.log_size} events, {report.state_values} state values"
    )
