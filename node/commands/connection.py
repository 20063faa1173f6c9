"""Which node a command talks to: that of ``--config``, or the one at ``--url``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from consensus.rejection import ConfigError
from node.client import NodeClient
from node.config import NodeConfig, api_tokens, load_config
from node.files import read_private

TOKEN_VARIABLE = "COUNTERSIGN_TOKEN"

F = TypeVar("F", bound=Callable[..., object])


def node_options(command: F) -> F:
    """``--config``, ``--url`` and ``--token-file`` of a command that asks a node."""
    command = click.option(
        "--token-file",
        type=click.Path(path_type=Path),
        help=f"File of mode 0600 with the API token for --url; or set {TOKEN_VARIABLE}.",
    )(command)
    command = click.option("--url", metavar="URL", help="The node's HTTP address, as http://127.0.0.1:7480.")(command)
    return click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        help="The node's configuration file; its [api] section says where it listens.",
    )(command)


def connect(config_path: Path | None, url: str | None, token_file: Path | None) -> NodeClient:
    """The client of the node a command's options name.

    Raises:
        ConfigError: neither option, or a configuration that leaves the port open.
    """
    config = load_config(config_path) if config_path is not None else None
    if url is not None:
        return NodeClient(url, _token(token_file))
    if config is None:
        raise ConfigError("expected --config FILE or --url URL, found neither")
    tokens = api_tokens(config.api)
    return NodeClient(api_url(config), tokens[0] if tokens else _token(token_file))


def api_url(config: NodeConfig) -> str:
    """Where the node of a configuration serves HTTP.

    Raises:
        ConfigError: the port is left to the system.
    """
    listen = config.api.listen
    if listen.port == 0:
        raise ConfigError(f"api.listen: expected a port, found {listen}, which the system chooses: give --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(listen.host)
    return f"http://{listen}" if host is None else f"http://{host}:{listen.port}"


def _token(token_file: Path | None) -> str | None:
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE)
    return read_private(token_file, "token file").decode("utf-8", errors="replace").strip()
