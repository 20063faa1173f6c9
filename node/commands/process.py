"""``countersign node``: run a node, and ask one how it is."""

import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from node.commands.connection import connect, node_options
from node.commands.output import print_json, printable
from node.config import api_tokens, load_config
from node.files import require_folder
from node.identity import load_genesis, load_identity, load_pin

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """One JSON object a line; ``time`` is UTC, ISO 8601."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


@click.group()
def node() -> None:
    """Run a node, or ask one how it is."""


@node.command("run")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The node's configuration file."
)
@click.option("--check", is_flag=True, help="Check configuration, genesis and keystore, then stop.")
def node_run(config_path: Path, check: bool) -> None:
    """Run a node until it is interrupted.

    \b
    Examples:
      countersign node run --config library/node.toml --check
      countersign node run --config library/node.toml
    """
    config = load_config(config_path)
    if check:
        genesis = load_genesis(config)
        member = load_identity(config, genesis).member
        api_tokens(config.api)
        require_folder(config.node.data_directory)
        load_pin(config, genesis)
        role = member.role.value if member in genesis.members else "a member of a later epoch"
        click.echo(f"{config_path}: {member.name}, {role}, chain {config.node.chain_id}: ready")
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if config.node.log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=config.node.log_level.upper(), handlers=[handler])
    from node.runner import run_node  # noqa: PLC0415 (libp2p takes a second to import; only this command needs it)

    run_node(config)


@node.command("status")
@node_options
@click.option("--json", "as_json", is_flag=True, help="Print the node's answer as JSON.")
def node_status(config_path: Path | None, url: str | None, token_file: Path | None, as_json: bool) -> None:
    """Ask a node how it is: height, peers, whether it votes.

    \b
    Examples:
      countersign node status --config library/node.toml
      countersign node status --url http://127.0.0.1:7480 --json
    """
    with connect(config_path, url, token_file) as client:
        status = client.status()
    if as_json:
        print_json(status)
        return
    for name, value in status.items():
        click.echo(f"{name.replace('_', ' '):20} {_readable(value)}")


def _readable(value: object) -> str:
    if isinstance(value, list):
        separator = "; " if any(isinstance(item, dict) for item in value) else ", "
        return separator.join(_readable(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {inner}" for name, inner in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value)) or "-"
