"""``countersign policy``: sign a policy with other governance members, and read the one in force."""

import os
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from consensus.codec import decode, encode
from consensus.event import CheckedEvent, Kind, check_event, make_entry
from consensus.identifiers import MemberId, Role
from consensus.membership import Member
from consensus.policy import AUTHOR_SCHEMES, check_policy
from consensus.portions import MAX_PORTIONS_BYTES, BandRule, BlockWeight, ClassRule, Policy, Portions, SaltedPortion
from consensus.rejection import ConfigError, Rejected
from node.commands.connection import connect, node_options
from node.commands.member import LocalMember, load_member, read_event, signed_by
from node.commands.output import print_json, printable, utc
from node.commands.submission import deliver
from node.files import read_toml


class BandTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[class.band]]``: the same for a class's examples of one entropy band, counted from 0."""

    band: int
    default_weight_permille: int
    blocks: dict[str, int] = {}


class ClassTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[[class]]``: how deeply a content class may move the parameters, in permille."""

    name: str
    default_weight_permille: int
    blocks: dict[str, int] = {}
    bands: tuple[BandTable, ...] = msgspec.field(name="band", default=())


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``policy.toml``."""

    name: str
    licences: tuple[str, ...]
    purposes: tuple[str, ...]
    classes: tuple[ClassTable, ...] = msgspec.field(name="class")
    memorization_threshold_permille: int
    maximum_grant_steps: int
    maximum_grant_duration_seconds: int
    revocation: str = "drain"
    momentum: str = "carry"
    global_clipping: bool = False
    entropy_edges_milli: tuple[int, ...] = ()
    routing_granularities: tuple[str, ...] = ("block",)
    event_granularities: tuple[str, ...] = ("batch",)
    author_schemes: tuple[str, ...] = AUTHOR_SCHEMES
    required_metadata: tuple[str, ...] = ()
    least_sketch_rank: int = 0
    auditors: tuple[str, ...] = ()
    custody: tuple[str, ...] = ()
    rationale: str = ""


@click.group()
def policy() -> None:
    """Sign and read the policy in force."""


@policy.command("sign")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The member's configuration file."
)
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), help="policy.toml: start a new event.")
@click.option("--event", "event_path", type=click.Path(path_type=Path), help="Event file to add a signature to.")
@click.option("--submit", is_flag=True, help="Hand it to the node of --config and wait until it is final.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the event, with this signature, to this new file, or to that of --event.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def policy_sign(
    config_path: Path,
    policy_path: Path | None,
    event_path: Path | None,
    submit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Sign a policy. As many governance members as the genesis says must sign the same event.

    The first member starts from policy.toml, each further one adds a signature to the event file, the last
    one submits. A policy is in force from its ledger block on, for grants that come after it.

    \b
    Examples:
      countersign policy sign --config council/node.toml --policy policy.toml --submit
      countersign policy sign --config council/node.toml --policy policy.toml --out policy.event
      countersign policy sign --config senate/node.toml --event policy.event --submit
    """
    if (policy_path is None) == (event_path is None):
        raise click.UsageError("give either --policy FILE or --event FILE")
    if not submit and out is None:
        raise click.UsageError("give --submit, --out FILE or both")
    own = load_member(config_path)
    own.require(Role.GOVERNANCE, "a policy")
    if policy_path is not None:
        event, encoded = _new_event(own, read_policy(policy_path, own.committee.members))
    else:
        assert event_path is not None
        event, encoded = _with_own_signature(own, read_event(event_path, own.committee), event_path)
    signers = sorted(own.committee.member(MemberId(signer)).name for signer in event.signers)
    missing = own.committee.threshold(Role.GOVERNANCE) - len(signers)
    if not as_json:
        assert isinstance(event.governance, Policy)
        click.echo(f"policy '{printable(event.governance.name)}', signed by {', '.join(signers)}")
        if missing > 0:
            click.echo(f"{missing} more governance members must sign")
    if submit:
        check_event(encoded, own.committee)
    deliver(event, encoded, submit_with=config_path if submit else None, out=out, as_json=as_json, added_to=event_path)


@policy.command("show")
@node_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def policy_show(config_path: Path | None, url: str | None, token_file: Path | None, as_json: bool) -> None:
    """Show the policy in force.

    \b
    Example:
      countersign policy show --config council/node.toml
    """
    with connect(config_path, url, token_file) as client:
        found = client.policy()
    content = msgspec.json.decode(found.policy)
    if as_json:
        print_json({"id": found.id, "since_ms": found.since_ms, "policy": content})
        return
    click.echo(f"policy {found.id}, in force since {utc(found.since_ms)}")
    print_json(content)


def read_policy(path: Path, members: Sequence[Member] = ()) -> Policy:
    """The policy of a ``policy.toml``; auditors it names are of ``members``.

    Raises:
        ConfigError: missing, not TOML, an unknown or missing key, an auditor that is no member, or values that make no
            policy.
    """
    try:
        file = msgspec.convert(read_toml(path, "a policy"), PolicyFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: expected a policy in TOML, found: {error}") from error
    made = Policy(
        name=file.name,
        licences=file.licences,
        purposes=file.purposes,
        classes=tuple(
            ClassRule(
                content_class=table.name,
                default_weight_permille=table.default_weight_permille,
                blocks=_block_weights(table),
                bands=tuple(
                    BandRule(held.band, held.default_weight_permille, _block_weights(held)) for held in table.bands
                ),
            )
            for table in file.classes
        ),
        entropy_edges_milli=file.entropy_edges_milli,
        memorization_threshold_permille=file.memorization_threshold_permille,
        routing_granularities=file.routing_granularities,
        event_granularities=file.event_granularities,
        author_schemes=file.author_schemes,
        required_metadata=file.required_metadata,
        least_sketch_rank=file.least_sketch_rank,
        auditors=tuple(_auditor(path, name, members) for name in file.auditors),
        custody=file.custody,
        maximum_grant_steps=file.maximum_grant_steps,
        maximum_grant_duration_ms=1_000 * file.maximum_grant_duration_seconds,
        global_clipping=file.global_clipping,
        revocation=file.revocation,
        momentum=file.momentum,
        rationale=file.rationale,
    )
    try:
        # The bounds of numbers and texts are those of the wire form.
        decode(encode(made), Policy, MAX_PORTIONS_BYTES)
        check_policy(made)
    except (Rejected, OverflowError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return made


def _block_weights(table: ClassTable | BandTable) -> tuple[BlockWeight, ...]:
    return tuple(BlockWeight(block, weight) for block, weight in table.blocks.items())


def _auditor(path: Path, name: str, members: Sequence[Member]) -> MemberId:
    for member in members:
        if member.name == name:
            return member.id
    known = ", ".join(member.name for member in members)
    raise ConfigError(f"{path}: auditors: expected members of the network ({known}), found {name!a:.80}")


def _new_event(own: LocalMember, content: Policy) -> tuple[CheckedEvent, bytes]:
    portions = Portions(
        data=None, governance=SaltedPortion(salt=os.urandom(32), content=encode(content)), operation=None
    )
    return signed_by(own, make_entry(own.committee.chain_id, Kind.POLICY, own.member.id, portions), portions)


def _with_own_signature(own: LocalMember, event: CheckedEvent, path: Path) -> tuple[CheckedEvent, bytes]:
    if event.entry.kind is not Kind.POLICY or not isinstance(event.governance, Policy):
        raise ConfigError(f"{path}: expected a policy event, found {event.entry.kind.phrase}")
    check_policy(event.governance)
    return signed_by(own, event.entry, event.portions)
