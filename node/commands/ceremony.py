"""``countersign ceremony``: partners who trust no machine but their own make a network's keys together."""

import os
from pathlib import Path

import click

from consensus.ceremony import Invitation, Invited, Join, Transcript
from consensus.identifiers import VOTING_ROLES, Role
from consensus.keys import SignatureScheme
from consensus.membership import (
    BLS_THRESHOLD,
    GENESIS_EPOCH,
    SCHEME_NEEDS,
    VERSION,
    Genesis,
    Membership,
    Parameters,
    RoleThreshold,
    committee,
    default_threshold,
)
from consensus.rejection import Reason, Rejected
from node.ceremony import (
    GENESIS_FILE,
    contribute,
    finish,
    has_finished,
    holds,
    join,
    read_folder,
    result_file,
    result_of,
    write_invitation,
)
from node.clock import SystemClock
from node.commands.fields import hex_argument
from node.commands.network import (
    IDENTITIES,
    TWO_THIRDS,
    parse_invited,
    parse_origin,
    print_tolerances,
    threshold_option,
)
from node.commands.output import print_json, print_table
from node.identity import epoch_keystore, first_keystore
from node.keystore import MODERATE_COST, Keystore, read_passphrase
from node.provision import MemberRequest, check_roles

_FOLDER = click.argument("folder", type=click.Path(path_type=Path))
_KEYSTORE = click.option(
    "--keystore", "keystore_path", type=click.Path(path_type=Path), required=True, help="This member's keystore file."
)
_PASSPHRASE_OPTION = "--passphrase-file"
_PASSPHRASE = click.option(
    _PASSPHRASE_OPTION,
    type=click.Path(path_type=Path),
    help="File of mode 0600 with the keystore's passphrase; else the variable COUNTERSIGN_PASSPHRASE.",
)


@click.group()
def ceremony() -> None:
    """Make a network's keys and genesis together, over files that members exchange.

    \b
    1. one person:    ceremony init FOLDER ...          and sends FOLDER to everybody
    2. every member:  ceremony join FOLDER --as NAME    and sends back its join-NAME file
    3. every member:  ceremony contribute FOLDER        again whenever files of others came, until nothing is awaited
    4. every member:  ceremony finish FOLDER            and all compare the chain id

    Whoever carries the files can delay the ceremony and cannot change what comes out of it.
    """


@ceremony.command("init")
@_FOLDER
@click.option(
    "--name",
    "origin",
    metavar="ORIGIN",
    required=True,
    callback=parse_origin,
    help="Origin name of the log, as our.example/log.",
)
@click.option(
    "--member",
    "requests",
    callback=parse_invited,
    metavar="NAME:ROLE",
    multiple=True,
    required=True,
    help="A member to invite: role data-source, governance, operator or verifier.",
)
@click.option(
    "--scheme",
    type=click.Choice(list(SCHEME_NEEDS)),
    default=BLS_THRESHOLD,
    show_default=True,
    help="How ledger blocks are certified.",
)
@threshold_option(TWO_THIRDS)
@click.option(
    "--heartbeat-ms",
    type=click.IntRange(10, 86_400_000),
    help=f"An idle network makes an empty ledger block this often. Default: {Parameters().heartbeat_ms}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ceremony_init(
    folder: Path,
    origin: str,
    requests: tuple[MemberRequest, ...],
    scheme: str,
    thresholds: dict[Role, int],
    heartbeat_ms: int | None,
    as_json: bool,
) -> None:
    """Write the invitation into FOLDER.

    Whoever does this chooses members, roles, quorums and the random nonce, sees no secret, and need not be trusted:
    everybody reads the invitation before joining, and joins the one whose digest was read out.

    \b
    Example:
      countersign ceremony init founding --name our.example/log --member library:data-source \\
        --member council:governance --member laboratory:operator
    """
    check_roles(requests)
    counts = {role: sum(request.role == role for request in requests) for role in VOTING_ROLES}
    invitation = Invitation(
        version=VERSION,
        name=origin,
        nonce=os.urandom(32),
        created_ms=SystemClock().now_ms(),
        certificate_scheme=scheme,
        members=tuple(Invited(request.name, request.role) for request in requests),
        thresholds=tuple(
            RoleThreshold(role, thresholds.get(role, default_threshold(counts[role]))) for role in VOTING_ROLES
        ),
        parameters=Parameters() if heartbeat_ms is None else Parameters(heartbeat_ms=heartbeat_ms),
        epoch=GENESIS_EPOCH,
        refreshes=None,
    )
    write_invitation(folder, invitation)
    if as_json:
        print_json(_invitation_document(invitation))
        return
    _print_invitation(invitation)
    click.echo(
        f"\nSend {folder} to every member, and read them the digest by another channel. Each then joins with\n"
        f"  countersign ceremony join {folder} --as NAME --invitation {invitation.digest.hex()} --keystore FILE "
        "--passphrase-file FILE"
    )


@ceremony.command("join")
@_FOLDER
@click.option("--as", "name", metavar="NAME", required=True, help="The name this member was invited by.")
@click.option(
    "--invitation", metavar="DIGEST", required=True, callback=hex_argument, help="The digest that was read to you."
)
@_KEYSTORE
@_PASSPHRASE
@click.option(
    "--identity",
    type=click.Choice(IDENTITIES),
    help="What this member signs with; default: what the scheme needs, or ed25519.",
)
@click.option(
    "--keep",
    "kept_path",
    type=click.Path(path_type=Path),
    help="A later epoch: the keystore whose identity this member keeps; its passphrase is the same.",
)
def ceremony_join(
    folder: Path,
    name: str,
    invitation: str,
    keystore_path: Path,
    passphrase_file: Path | None,
    identity: str | None,
    kept_path: Path | None,
) -> None:
    """Make this member's keys, on this machine, and join.

    The keystore is new and never leaves this machine; keep passphrase and keystore apart. Send the file this writes
    to the other members.

    \b
    Example:
      countersign ceremony join founding --as library --invitation DIGEST \\
        --keystore library.keystore --passphrase-file library.passphrase
    """
    passphrase = read_passphrase(passphrase_file, os.environ, _PASSPHRASE_OPTION)
    scheme = None if identity is None else SignatureScheme.labelled(identity)
    keep = None if kept_path is None else Keystore.open(kept_path, passphrase).secrets
    written = join(folder, name, invitation, keystore_path, passphrase, scheme, MODERATE_COST, keep)
    click.echo(f"wrote {written}: send it to the other members")
    if kept_path is not None:
        _warn_of_name(keystore_path, kept_path, read_folder(folder).invitation.epoch)
    _print_awaited(read_folder(folder).transcript())


@ceremony.command("contribute")
@_FOLDER
@_KEYSTORE
@_PASSPHRASE
def ceremony_contribute(folder: Path, keystore_path: Path, passphrase_file: Path | None) -> None:
    """Check what the others said and say what is due from this member.

    Run it whenever files of others have come into FOLDER: at most four times. It says nothing twice, and nothing
    before it is safe to say.

    \b
    Example:
      countersign ceremony contribute founding --keystore library.keystore --passphrase-file library.passphrase
    """
    keystore = Keystore.open(keystore_path, read_passphrase(passphrase_file, os.environ, _PASSPHRASE_OPTION))
    if has_finished(read_folder(folder).transcript(), keystore):
        click.echo(f"{keystore_path} has finished this ceremony: nothing more is due")
        return
    transcript = contribute(folder, keystore, lambda written: click.echo(f"wrote {folder / written}: send it on"))
    _print_awaited(transcript)


@ceremony.command("status")
@_FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ceremony_status(folder: Path, as_json: bool) -> None:
    """Check everything in FOLDER and say who is awaited. Needs no secret.

    \b
    Example:
      countersign ceremony status founding
    """
    transcript = read_folder(folder).transcript()
    if as_json:
        print_json(
            {
                **_invitation_document(transcript.invitation),
                "joined": list(transcript.said(Join)),
                "awaited": [
                    {"round": awaited.round, "members": list(awaited.members)} for awaited in transcript.awaited()
                ],
            }
        )
        return
    _print_invitation(transcript.invitation)
    click.echo("")
    _print_awaited(transcript)


@ceremony.command("finish")
@_FOLDER
@_KEYSTORE
@_PASSPHRASE
def ceremony_finish(folder: Path, keystore_path: Path, passphrase_file: Path | None) -> None:
    """Write genesis.json (of a later epoch: epoch-N.membership), and into the keystore what this member's node needs.

    \b
    Example:
      countersign ceremony finish founding --keystore library.keystore --passphrase-file library.passphrase
    """
    keystore = Keystore.open(keystore_path, read_passphrase(passphrase_file, os.environ, _PASSPHRASE_OPTION))
    made, name = finish(folder, keystore)
    if isinstance(made, Membership):
        file, _ = result_file(folder, made)
        click.echo(
            f"members of epoch {made.epoch}: {file}\n\nA quorum of every role now signs it with countersign membership "
            f"sign; {name} keeps {keystore_path} beside its first keystore."
        )
        _say_who_finds(keystore_path, made.epoch)
        return
    _print_genesis(folder, made)
    click.echo(
        f"\nCompare the chain id with every other member, by another channel. Then {name} starts its node from\n"
        f"{folder / GENESIS_FILE} and {keystore_path}: see configs/."
    )


@ceremony.command("verify")
@_FOLDER
@click.option("--chain-id", metavar="HEX", callback=hex_argument, help="At the founding: refuse any other chain.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ceremony_verify(folder: Path, chain_id: str | None, as_json: bool) -> None:
    """Check a whole ceremony again, from its files alone, and that genesis.json is what it ends in.

    Of a later epoch: that epoch-N.membership is. For anybody who was not there. Nothing is written. Exit code 0 when it
    is so, or that file is not there, which is said; 1 when it is not.

    \b
    Examples:
      countersign ceremony verify founding --chain-id CHAIN_ID
      countersign ceremony verify second
    """
    transcript = read_folder(folder).transcript()
    if chain_id is not None and transcript.invitation.epoch != GENESIS_EPOCH:
        raise click.UsageError(
            f"--chain-id: expected a founding ceremony, found one of epoch {transcript.invitation.epoch}, "
            "whose members are of whatever chain signs them"
        )
    made = result_of(transcript)
    if isinstance(made, Genesis) and chain_id is not None and made.chain_id.hex() != chain_id:
        raise Rejected(Reason.WRONG_CHAIN, f"this ceremony ends in chain {made.chain_id.hex()}, not {chain_id}")
    file, encoded = result_file(folder, made)
    there = file.exists()
    if there and not holds(file, encoded):
        wrong, what = (Reason.WRONG_CHAIN, "genesis") if isinstance(made, Genesis) else (Reason.BAD_FIELD, "membership")
        raise Rejected(wrong, f"{file} is not the {what} this ceremony ends in")
    if as_json:
        named = str(file) if there else None
        if isinstance(made, Genesis):
            print_json({"chain_id": made.chain_id.hex(), "genesis": named, "members": len(made.members)})
        else:
            print_json({"epoch": made.epoch, "membership": named, "members": len(made.members)})
        return
    if isinstance(made, Genesis):
        _print_genesis(folder, made)
    else:
        needed = {entry.role: str(entry.threshold) for entry in made.thresholds}
        click.echo(f"epoch  {made.epoch}\n")
        rows = [
            (member.name, member.role.value, needed.get(member.role, "none: it does not vote"), member.id.hex())
            for member in made.members
        ]
        print_table(("member", "role", "needed of its role", "id"), rows)
    ends = (
        f"and that {file} is what they end in" if there else f"{file} is missing: countersign ceremony finish writes it"
    )
    click.echo(f"\nchecked: every message of {len(made.members)} members{',' if there else ';'} {ends}")


def _warn_of_name(keystore: Path, kept: Path, epoch: int) -> None:
    """A keystore that its node does not find is a member that does not vote, known only once the change is final."""
    later = first_keystore(kept)
    expected = epoch_keystore(kept if later is None else later[0], epoch)
    if expected.absolute() != keystore.absolute():
        click.echo(
            f"warning: the node that has {kept} looks for {expected} in epoch {epoch}: {keystore} must be there "
            "by then, under that name",
            err=True,
        )


def _say_who_finds(keystore: Path, epoch: int) -> None:
    found = first_keystore(keystore)
    if found is None or found[1] != epoch:
        click.echo(
            f"warning: no node looks for {keystore}: beside library.keystore it looks for "
            f"{epoch_keystore(Path('library.keystore'), epoch)}, in epoch {epoch}; rename it so",
            err=True,
        )
        return
    first = found[0]
    click.echo(f"A node finds it whose node.keystore is {first}, and no other.")
    if not first.exists():
        click.echo(
            f"warning: there is no {first}: so it is with a member that joins; the keystore of one that stays is "
            "there under another name, which decides the name of this one",
            err=True,
        )


def _print_awaited(transcript: Transcript) -> None:
    awaited = transcript.awaited()
    for one in awaited:
        click.echo(f"awaited: {one.round} of {', '.join(one.members)}")
    if not awaited:
        click.echo("nothing is awaited: every member can finish")


def _print_invitation(invitation: Invitation) -> None:
    click.echo(f"digest  {invitation.digest.hex()}")
    click.echo(f"log     {invitation.name}, certified by {invitation.certificate_scheme}\n")
    needed = {entry.role: str(entry.threshold) for entry in invitation.thresholds}
    rows = [
        (invited.name, invited.role.value, needed.get(invited.role, "none: it does not vote"))
        for invited in invitation.members
    ]
    print_table(("member", "role", "needed of its role"), rows)


def _invitation_document(invitation: Invitation) -> dict[str, object]:
    return {
        "digest": invitation.digest.hex(),
        "name": invitation.name,
        "scheme": invitation.certificate_scheme,
        "members": [{"name": invited.name, "role": invited.role.value} for invited in invitation.members],
        "thresholds": {entry.role.value: entry.threshold for entry in invitation.thresholds},
    }


def _print_genesis(folder: Path, genesis: Genesis) -> None:
    click.echo(f"chain id  {genesis.chain_id.hex()}")
    click.echo(f"genesis   {folder / GENESIS_FILE}\n")
    print_tolerances(committee(genesis).tolerances())
