"""``countersign decision``: reasons on the log, and governance's word on evaluations."""

import os
from pathlib import Path

import click

from consensus.codec import encode
from consensus.event import CheckedEvent, Kind, check_event, make_entry
from consensus.identifiers import MemberId, Role
from consensus.portions import Portions, SaltedPortion
from consensus.rejection import ConfigError
from consensus.review import ACCEPT, NOTE, REJECT, Decision
from node.commands.fields import digest_argument
from node.commands.member import LocalMember, load_member, read_event, signed_by
from node.commands.submission import deliver


@click.group()
def decision() -> None:
    """Record decisions about a campaign, with their reasons."""


@decision.command("add")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The member's configuration file."
)
@click.option("--campaign", callback=digest_argument, help="The campaign's id: start a new decision.")
@click.option(
    "--about", callback=digest_argument, help="Evaluation, audit result or release; default: the campaign itself."
)
@click.option(
    "--outcome",
    type=click.Choice([NOTE, ACCEPT, REJECT]),
    default=NOTE,
    show_default=True,
    help="accept or reject an evaluation (governance only), or note reasons.",
)
@click.option("--rationale", help="Why, for the log.")
@click.option("--event", "event_path", type=click.Path(path_type=Path), help="Event file to add a signature to.")
@click.option("--submit", is_flag=True, help="Hand it to the node of --config and wait until it is final.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the event, with this signature, to this new file, or to that of --event.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def decision_add(
    config_path: Path,
    campaign: bytes | None,
    about: bytes | None,
    outcome: str,
    rationale: str | None,
    event_path: Path | None,
    submit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Record a decision. A data source's or operator's own; governance's needs as many members as the genesis says.

    An evaluation that misses a threshold bars the campaign's release until governance accepts it, and one that
    governance rejects does whatever it measured. Of governance the first member starts the decision, each further one
    adds a signature to the event file, the last one submits.

    \b
    Examples:
      countersign decision add --config council/node.toml --campaign CAMPAIGN_ID --about EVALUATION_ID \\
        --outcome accept --rationale "measured on noisy labels; see the minutes of 12 May" --submit
      countersign decision add --config senate/node.toml --event decision.event --submit
    """
    if (campaign is None) == (event_path is None):
        raise click.UsageError("give either --campaign ID or --event FILE")
    if not submit and out is None:
        raise click.UsageError("give --submit, --out FILE or both")
    own = load_member(config_path)
    if campaign is not None:
        if not rationale:
            raise click.UsageError("give --rationale TEXT: a decision without reasons is none")
        event, encoded = _new_event(own, campaign, Decision(about or campaign, outcome, rationale))
    else:
        assert event_path is not None
        event, encoded = _with_own_signature(own, read_event(event_path, own.committee), event_path)
    decided = event.governance
    assert isinstance(decided, Decision)
    signers = sorted(own.committee.member(MemberId(signer)).name for signer in event.signers)
    governed = own.committee.member(MemberId(event.entry.author)).role == Role.GOVERNANCE
    missing = own.committee.threshold(Role.GOVERNANCE) - len(signers) if governed else 0
    if not as_json:
        click.echo(f"decision: {decided.outcome} {decided.subject.hex()}, signed by {', '.join(signers)}")
        click.echo(f"because   {decided.rationale!a}")
        if missing > 0:
            click.echo(f"{missing} more governance members must sign")
    if submit:
        check_event(encoded, own.committee)
    deliver(event, encoded, submit_with=config_path if submit else None, out=out, as_json=as_json, added_to=event_path)


def _new_event(own: LocalMember, campaign: bytes, content: Decision) -> tuple[CheckedEvent, bytes]:
    portions = Portions(
        data=None, governance=SaltedPortion(salt=os.urandom(32), content=encode(content)), operation=None
    )
    entry = make_entry(own.committee.chain_id, Kind.DECISION, own.member.id, portions, campaign=campaign)
    return signed_by(own, entry, portions)


def _with_own_signature(own: LocalMember, event: CheckedEvent, path: Path) -> tuple[CheckedEvent, bytes]:
    if event.entry.kind is not Kind.DECISION:
        raise ConfigError(f"{path}: expected a decision, found an event of kind {event.entry.kind.value}")
    own.require(Role.GOVERNANCE, "a decision of more than one member")
    return signed_by(own, event.entry, event.portions)
