"""``countersign network``: the files of a network, for trials where one person plays every party."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from consensus.identifiers import VOTING_ROLES, Role
from consensus.keys import SignatureScheme
from consensus.membership import (
    BLS_THRESHOLD,
    SCHEME_NEEDS,
    Genesis,
    LogName,
    MemberName,
    Parameters,
    Tolerance,
    committee,
)
from node.clock import SystemClock
from node.commands.output import print_json, print_table
from node.config import Address
from node.files import read_private
from node.provision import DEFAULT_PURPOSES, MemberRequest, Provisioned, provision

TWO_THIRDS = "two thirds, rounded down, plus one"
Command = TypeVar("Command", bound=Callable[..., object])
IDENTITIES = [scheme.label for scheme in SignatureScheme]


def parse_members(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[MemberRequest, ...]:
    """``NAME:ROLE[:HOST:PORT]`` each. A click callback."""
    return _parsed(context, parameter, values, "NAME:ROLE[:HOST:PORT]")


def parse_invited(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[MemberRequest, ...]:
    """``NAME:ROLE`` each: where somebody's node will be is that member's to say. A click callback."""
    return _parsed(context, parameter, values, "NAME:ROLE")


def parse_origin(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The origin name of a log. A click callback."""
    try:
        return msgspec.convert(value, LogName)
    except msgspec.ValidationError as error:
        raise click.BadParameter(
            f"expected up to 128 of a-z, 0-9, '.', '-' and '/', the first and last a letter or digit, found {value!a}",
            context,
            parameter,
        ) from error


def _parsed(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...], form: str
) -> tuple[MemberRequest, ...]:
    requests = []
    for value in values:
        name, _, rest = value.partition(":")
        role, separator, address = rest.partition(":")
        try:
            if separator and "HOST" not in form:
                raise ValueError("an address")
            requests.append(MemberRequest(name, Role(role), Address.parse(address) if separator else None))
        except ValueError as error:
            roles = ", ".join(role.value for role in Role)
            raise click.BadParameter(
                f"expected {form} with a role of {roles}, found {value!a}", context, parameter
            ) from error
        try:
            msgspec.convert(name, MemberName)
        except msgspec.ValidationError as error:
            raise click.BadParameter(
                f"expected a name of up to 64 of a-z, 0-9, '.' and '-', the first and last a letter or digit, "
                f"found {name!a}",
                context,
                parameter,
            ) from error
    return tuple(requests)


def threshold_option(default: str) -> Callable[[Command], Command]:
    """``--threshold ROLE=N``, given again for each role; ``default`` says what holds for the others."""
    return click.option(
        "--threshold",
        "thresholds",
        callback=parse_thresholds,
        metavar="ROLE=N",
        multiple=True,
        help=f"Members of a role that must agree; more than half. Default: {default}.",
    )


def parse_thresholds(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[Role, int]:
    """``ROLE=N`` each. A click callback."""
    thresholds: dict[Role, int] = {}
    for value in values:
        role_text, _, number = value.partition("=")
        if role_text not in {role.value for role in VOTING_ROLES} or not (number.isascii() and number.isdigit()):
            roles = ", ".join(role.value for role in VOTING_ROLES)
            raise click.BadParameter(f"expected ROLE=N with a role of {roles}, found {value}", context, parameter)
        thresholds[Role(role_text)] = int(number)
    return thresholds


@click.group()
def network() -> None:
    """Make the files of a network for a trial."""


@network.command("init")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; empty or missing.")
@click.option(
    "--name",
    "origin",
    metavar="ORIGIN",
    required=True,
    callback=parse_origin,
    help="Origin name of the log, as trial.example/log.",
)
@click.option(
    "--member",
    "requests",
    callback=parse_members,
    metavar="NAME:ROLE[:HOST:PORT]",
    multiple=True,
    required=True,
    help="A member: role data-source, governance, operator or verifier. Without HOST:PORT a free loopback port.",
)
@click.option(
    "--scheme",
    type=click.Choice(list(SCHEME_NEEDS)),
    default=BLS_THRESHOLD,
    show_default=True,
    help="How ledger blocks are certified.",
)
@click.option(
    "--identity",
    type=click.Choice(IDENTITIES),
    help="What members sign with; default: what the scheme needs, or ed25519.",
)
@threshold_option(TWO_THIRDS)
@click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="File of mode 0600 with one passphrase for all keystores; else each gets a random one.",
)
@click.option(
    "--heartbeat-ms",
    type=click.IntRange(10, 86_400_000),
    help=f"An idle network makes an empty ledger block this often. Default: {Parameters().heartbeat_ms}.",
)
@click.option(
    "--purpose",
    "purposes",
    multiple=True,
    default=DEFAULT_PURPOSES,
    show_default=True,
    help="A purpose the nodes sign grants for without asking.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def network_init(
    out: Path,
    origin: str,
    requests: tuple[MemberRequest, ...],
    scheme: str,
    identity: str | None,
    thresholds: dict[Role, int],
    passphrase_file: Path | None,
    heartbeat_ms: int | None,
    purposes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write genesis, configuration and keystores of a whole network.

    For trials and demonstrations: you run it, so you see every member's secrets. In production every party
    makes its own keys, with the same messages and checks: see countersign ceremony.

    \b
    Example:
      countersign network init --out trial --name trial.example/log \\
        --member library:data-source --member press:data-source \\
        --member council:governance --member laboratory:operator
      countersign node run --config trial/library/node.toml
    """
    passphrase = None
    if passphrase_file is not None:
        passphrase = read_private(passphrase_file, "passphrase file").removesuffix(b"\n").removesuffix(b"\r")
        if not passphrase:
            raise click.UsageError(f"{passphrase_file}: expected a passphrase, found nothing")
    made = provision(
        out,
        origin,
        requests,
        created_ms=SystemClock().now_ms(),
        certificate_scheme=scheme,
        identity_scheme=None if identity is None else SignatureScheme.labelled(identity),
        thresholds=thresholds,
        parameters=Parameters() if heartbeat_ms is None else Parameters(heartbeat_ms=heartbeat_ms),
        passphrase=passphrase,
        purposes=purposes,
    )
    tolerances = committee(made.genesis).tolerances()
    if as_json:
        print_json(_document(made, tolerances))
        return
    click.echo(f"chain id  {made.chain_id.hex()}")
    click.echo(f"genesis   {made.genesis_path}")
    click.echo("For a trial: all secrets were made here, by one person. In production hold a key ceremony instead.\n")
    _print_members(made)
    click.echo("")
    print_tolerances(tolerances)


def print_tolerances(tolerances: tuple[Tolerance, ...]) -> None:
    """What each role can bear, as a table and in words where it bears nothing."""
    print_table(
        ("role", "members", "needed", "traitors: agreement", "traitors: validity", "silent: liveness"),
        [
            (
                tolerance.role.value,
                str(tolerance.members),
                str(tolerance.threshold),
                str(tolerance.agreement),
                str(tolerance.validity),
                str(tolerance.liveness),
            )
            for tolerance in tolerances
        ],
    )
    click.echo(
        "agreement: history forks only if every role has more traitors than this. validity: an invalid event\n"
        "passes only if every role has more. liveness: the log stops when any one role has more silent members."
    )
    for tolerance in tolerances:
        if tolerance.liveness == 0:
            members = "its only member is" if tolerance.members == 1 else f"any of its {tolerance.members} members is"
            click.echo(f"{tolerance.role.value} tolerates no silent node: the log waits while {members} down.")


def _print_members(made: Provisioned) -> None:
    print_table(
        ("member", "role", "network", "http", "configuration"),
        [
            (member.name, member.role.value, str(member.network), member.api_url, str(member.config))
            for member in made.members.values()
        ],
    )


def _document(made: Provisioned, tolerances: tuple[Tolerance, ...]) -> dict[str, object]:
    genesis: Genesis = made.genesis
    return {
        "chain_id": made.chain_id.hex(),
        "genesis": str(made.genesis_path),
        "name": genesis.name,
        "scheme": genesis.certificate_scheme,
        "members": [
            {
                "name": member.name,
                "role": member.role.value,
                "config": str(member.config),
                "network": str(member.network),
                "api_url": member.api_url,
            }
            for member in made.members.values()
        ],
        "tolerances": [
            {
                "role": tolerance.role.value,
                "members": tolerance.members,
                "threshold": tolerance.threshold,
                "agreement": tolerance.agreement,
                "validity": tolerance.validity,
                "liveness": tolerance.liveness,
            }
            for tolerance in tolerances
        ],
    }
