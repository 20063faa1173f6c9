"""``countersign membership``: who takes part next.

One invitation for the next epoch, a ceremony of all who will be members (``countersign ceremony``), then one event that
holds the whole next membership and is signed by a quorum of every role.
"""

import os
from pathlib import Path

import click

from consensus.ceremony import Invitation, Invited
from consensus.codec import decode, encode
from consensus.event import CheckedEvent, Kind, check_event, make_entry
from consensus.identifiers import VOTING_ROLES, MemberId, Role
from consensus.membership import VERSION, Genesis, Membership, RoleThreshold, default_threshold
from consensus.membership_change import MembershipChange
from consensus.portions import Portions, SaltedPortion
from consensus.rejection import ConfigError, Reason, Rejected
from node.ceremony import MAX_MEMBERSHIP_BYTES, write_invitation
from node.commands.member import LocalMember, load_member, proven_members, read_event, signed_by
from node.commands.network import TWO_THIRDS, parse_invited, threshold_option
from node.commands.output import print_json, print_table
from node.commands.submission import deliver
from node.provision import MemberRequest, check_roles

_KEYSTORE_RULE = (
    "STEM.SUFFIX is what\nnode.keystore of its node.toml names, and goes on naming: beside library.keystore its node "
    "looks for\nlibrary.epoch-{}.keystore, and for no other file."
)

_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The member's configuration file."
)


@click.group()
def membership() -> None:
    """Change who takes part: members join, leave, change their keys, or refresh their shares.

    \b
    1. one member:       membership invite FOLDER ...   and sends FOLDER to all who will be members
                         (or membership refresh FOLDER: new shares, nothing else changes)
    2. all of them:      ceremony join, contribute, finish, as at the founding
    3. a quorum of now:  membership sign                one after the other; the last one submits
    """


@membership.command("show")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def membership_show(config_path: Path, as_json: bool) -> None:
    """Show the members of the newest epoch, as the node of --config proves them.

    \b
    Example:
      countersign membership show --config library/node.toml
    """
    own = load_member(config_path)
    members = proven_members(config_path, own.config, own.genesis)
    if as_json:
        listed = [{"name": member.name, "role": member.role.value, "id": member.id.hex()} for member in members.members]
        thresholds = {role.value: members.threshold(role) for role in VOTING_ROLES}
        print_json({"epoch": members.epoch, "members": listed, "thresholds": thresholds})
        return
    click.echo(f"epoch {members.epoch}\n")
    needed = {role: str(members.threshold(role)) for role in VOTING_ROLES}
    print_table(
        ("member", "role", "needed of its role", "id"),
        [
            (member.name, member.role.value, needed.get(member.role, "none: it does not vote"), member.id.hex())
            for member in members.members
        ],
    )


@membership.command("invite")
@click.argument("folder", type=click.Path(path_type=Path))
@_CONFIG
@click.option("--add", "added", callback=parse_invited, metavar="NAME:ROLE", multiple=True, help="Who joins.")
@click.option("--remove", "removed", metavar="NAME", multiple=True, help="Who leaves.")
@threshold_option(f"as now where a role stays as it is, else {TWO_THIRDS}")
def membership_invite(
    folder: Path,
    config_path: Path,
    added: tuple[MemberRequest, ...],
    removed: tuple[str, ...],
    thresholds: dict[Role, int],
) -> None:
    """Write the invitation to the next epoch's ceremony into FOLDER.

    Who is not removed stays. Each member that stays decides when it joins the ceremony whether it keeps its identity.

    \b
    Example:
      countersign membership invite second --config library/node.toml --add archive:data-source --remove press
    """
    own = load_member(config_path)
    before = proven_members(config_path, own.config, own.genesis)
    names = {member.name for member in before.members}
    for name in removed:
        if name not in names:
            raise ConfigError(f"--remove {name}: expected one of {', '.join(sorted(names))}")
    stays = [Invited(member.name, member.role) for member in before.members if member.name not in removed]
    invited = (*stays, *(Invited(request.name, request.role) for request in added))
    check_roles(invited)
    kept = []
    for role in VOTING_ROLES:
        now = [one.name for one in invited if one.role == role]
        same = now == [member.name for member in before.role_members(role)]
        default = before.threshold(role) if same else default_threshold(len(now))
        kept.append(RoleThreshold(role, thresholds.get(role, default)))
    _invite(folder, own.genesis, before.epoch + 1, invited, tuple(kept), None)
    click.echo(f"and with --keep STEM.SUFFIX if it stays who it is. {_KEYSTORE_RULE.format(before.epoch + 1)}")


@membership.command("refresh")
@click.argument("folder", type=click.Path(path_type=Path))
@_CONFIG
def membership_refresh(folder: Path, config_path: Path) -> None:
    """Write the invitation to a ceremony that gives all members new shares under the role keys they have, into FOLDER.

    Nobody joins, leaves or changes keys, so verifiers see the same role keys. A share that was stolen before is worth
    nothing any more, unless the thief has as many of one role as make its signature: then the role needs a new key, by
    membership invite. Roles that need all of their members have no shares of a key, and stay as they are.

    \b
    Example:
      countersign membership refresh fresh --config library/node.toml
    """
    own = load_member(config_path)
    before = proven_members(config_path, own.config, own.genesis)
    invited = tuple(Invited(member.name, member.role) for member in before.members)
    thresholds = tuple(RoleThreshold(role, before.threshold(role)) for role in VOTING_ROLES)
    now = Membership(before.epoch, before.members, thresholds, before.groups)
    _invite(folder, own.genesis, before.epoch + 1, invited, thresholds, now)
    click.echo(
        f"and with --keep and the keystore whose share it votes with now. {_KEYSTORE_RULE.format(before.epoch + 1)}"
    )


def _invite(
    folder: Path,
    genesis: Genesis,
    epoch: int,
    invited: tuple[Invited, ...],
    thresholds: tuple[RoleThreshold, ...],
    refreshes: Membership | None,
) -> None:
    invitation = Invitation(
        version=VERSION,
        name=genesis.name,
        nonce=genesis.nonce,
        created_ms=genesis.created_ms,
        certificate_scheme=genesis.certificate_scheme,
        members=invited,
        thresholds=thresholds,
        parameters=genesis.parameters,
        epoch=epoch,
        refreshes=refreshes,
    )
    write_invitation(folder, invitation)
    click.echo(f"epoch   {invitation.epoch}\ndigest  {invitation.digest.hex()}\n")
    print_table(("member", "role"), [(one.name, one.role.value) for one in invited])
    later = f"STEM.epoch-{invitation.epoch}.SUFFIX"
    click.echo(
        f"\nSend {folder} to every member, and read them the digest by another channel. Each then joins with\n"
        f"  countersign ceremony join {folder} --as NAME --invitation {invitation.digest.hex()} --keystore {later} "
        "--passphrase-file FILE"
    )


@membership.command("sign")
@_CONFIG
@click.option("--membership", "membership_path", type=click.Path(path_type=Path), help="What the ceremony ended in.")
@click.option("--event", "event_path", type=click.Path(path_type=Path), help="Event file to add a signature to.")
@click.option("--statement", default="", help="Why, for people; with --membership.")
@click.option("--submit", is_flag=True, help="Hand it to the node of --config and wait until it is final.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the event, with this signature, to this new file, or to that of --event.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def membership_sign(
    config_path: Path,
    membership_path: Path | None,
    event_path: Path | None,
    statement: str,
    submit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Sign the next membership. A quorum of every role must sign the same event.

    Sign only what the ceremony you took part in ended in: compare the file's members. Once the event is final the epoch
    is over, and every member needs its keystore of the next one beside its first.

    \b
    Examples:
      countersign membership sign --config library/node.toml --membership second/epoch-1.membership --out change.event
      countersign membership sign --config council/node.toml --event change.event --out change.event
      countersign membership sign --config laboratory/node.toml --event change.event --submit
    """
    if (membership_path is None) == (event_path is None):
        raise click.UsageError("give either --membership FILE or --event FILE")
    if not submit and out is None:
        raise click.UsageError("give --submit, --out FILE or both")
    own = load_member(config_path)
    if membership_path is not None:
        event, encoded = _new_event(own, _read_membership(membership_path), statement)
    else:
        assert event_path is not None
        held = read_event(event_path, own.committee)
        if held.entry.kind is not Kind.MEMBERSHIP:
            raise ConfigError(f"{event_path}: expected a membership event, found {held.entry.kind.phrase}")
        event, encoded = signed_by(own, held.entry, held.portions)
    _require_later(own, event)
    if not as_json:
        _print_signers(own, event)
    if submit:
        check_event(encoded, own.committee)
    deliver(event, encoded, submit_with=config_path if submit else None, out=out, as_json=as_json, added_to=event_path)


def _new_event(own: LocalMember, made: Membership, statement: str) -> tuple[CheckedEvent, bytes]:
    content = encode(MembershipChange(made, statement))
    portions = Portions(data=None, governance=SaltedPortion(salt=os.urandom(32), content=content), operation=None)
    return signed_by(own, make_entry(own.committee.chain_id, Kind.MEMBERSHIP, own.member.id, portions), portions)


def _read_membership(path: Path) -> Membership:
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_MEMBERSHIP_BYTES + 1), Membership, MAX_MEMBERSHIP_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: expected a membership file, found: {error.strerror}") from error
    except Rejected as error:
        raise Rejected(error.reason, f"{path}: {error.detail}") from error


def _require_later(own: LocalMember, event: CheckedEvent) -> None:
    change, now = event.governance, own.committee.epoch
    assert isinstance(change, MembershipChange)
    if change.membership.epoch <= now:
        raise Rejected(Reason.WRONG_EPOCH, f"the members of epoch {change.membership.epoch}: it is epoch {now} already")


def _print_signers(own: LocalMember, event: CheckedEvent) -> None:
    change = event.governance
    assert isinstance(change, MembershipChange)
    before = {member.name: member.id for member in own.committee.members}
    after = {member.name: member.id for member in change.membership.members}
    click.echo(f"members of epoch {change.membership.epoch}: {', '.join(after)}")
    for said, names in (
        ("join", sorted(after.keys() - before.keys())),
        ("leave", sorted(before.keys() - after.keys())),
        ("change their keys", sorted(name for name in after.keys() & before.keys() if after[name] != before[name])),
    ):
        if names:
            click.echo(f"{said}: {', '.join(names)}")
    signers = [own.committee.member(MemberId(signer)) for signer in sorted(event.signers)]
    kept_keys = {group.group_key for group in own.committee.groups}
    kept = [group.role.value for group in change.membership.groups if group.group_key in kept_keys]
    if kept:
        click.echo(f"role keys that stay, under new shares where some members are enough: {', '.join(kept)}")
    click.echo(f"signed by {', '.join(sorted(member.name for member in signers))}")
    for role in VOTING_ROLES:
        missing = own.committee.threshold(role) - sum(member.role == role for member in signers)
        if missing > 0:
            click.echo(f"{missing} more of {role.value} must sign")
