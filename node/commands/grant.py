"""``countersign grant``: the permissions that training jobs ask for, and this member's hand under them."""

from pathlib import Path

import click
import msgspec

from node.client import GrantAnswer
from node.commands.connection import connect, node_options
from node.commands.fields import hex_argument
from node.commands.output import print_json, print_table, printable


@click.group()
def grant() -> None:
    """See and countersign grants."""


@grant.command("list")
@node_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def grant_list(config_path: Path | None, url: str | None, token_file: Path | None, as_json: bool) -> None:
    """List grants that wait for signatures, or are open.

    \b
    Example:
      countersign grant list --config library/node.toml
    """
    with connect(config_path, url, token_file) as client:
        grants = client.grants().grants
    if as_json:
        print_json([msgspec.to_builtins(found) for found in grants])
        return
    print_table(
        ("grant", "status", "signed by", "waits for"),
        [(found.id, found.status, ",".join(found.signers), ",".join(found.missing) or "nobody") for found in grants],
    )


@grant.command("show")
@node_options
@click.argument("grant_id", callback=hex_argument)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def grant_show(
    config_path: Path | None, url: str | None, token_file: Path | None, grant_id: str, as_json: bool
) -> None:
    """Show who has signed a grant, who has not, and why.

    \b
    Example:
      countersign grant show --config library/node.toml GRANT_ID
    """
    with connect(config_path, url, token_file) as client:
        _print_grant(client.grant(grant_id), as_json)


@grant.command("sign")
@node_options
@click.argument("grant_id", callback=hex_argument)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def grant_sign(
    config_path: Path | None, url: str | None, token_file: Path | None, grant_id: str, as_json: bool
) -> None:
    """Countersign a grant by hand: the node signs with its member's key, whatever its rules say.

    \b
    Example:
      countersign grant sign --config library/node.toml GRANT_ID
    """
    with connect(config_path, url, token_file) as client:
        _print_grant(client.sign_grant(grant_id), as_json)


def _print_grant(found: GrantAnswer, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    click.echo(f"grant {found.id}: {found.status}")
    if found.campaign:
        click.echo(f"campaign   {found.campaign}")
    click.echo(f"signed by  {', '.join(found.signers) or 'nobody'}")
    click.echo(f"waits for  {', '.join(found.missing) or 'nobody'}")
    for refusal in found.refusals:
        click.echo(printable(f"{refusal.member} refuses: {refusal.error}: {refusal.detail}"))
