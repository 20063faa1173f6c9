"""``countersign campaign``: whether it recorded all that its policy requires, and what was found on its weights."""

import json
from pathlib import Path

import click

from consensus.bundle import open_bundle
from consensus.epochs import anchor
from consensus.predicates import Predicate, verify
from node.commands.connection import connect
from node.commands.fields import hex_argument
from node.config import load_config
from node.identity import load_genesis
from node.verify import verdict_object, verdict_text


@click.group()
def campaign() -> None:
    """Look at campaigns."""


_CAMPAIGN = click.argument("campaign_id", callback=hex_argument)
_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="A member's configuration file."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@campaign.command("check")
@_CAMPAIGN
@_CONFIG
@_JSON
@click.pass_context
def campaign_check(context: click.Context, campaign_id: str, config_path: Path, as_json: bool) -> None:
    """Check that a campaign recorded every fact on its policy's list. Exit codes: 0 yes, 1 no, 2 unknown.

    The node's answer is not believed: it is a proof, checked here against the genesis. Put it into the pipeline that
    starts or releases a training run.

    \b
    Example:
      countersign campaign check --config laboratory/node.toml CAMPAIGN_ID
    """
    _answer(context, Predicate.METADATA_COMPLETE, campaign_id, config_path, as_json)


@campaign.command("reviews")
@_CAMPAIGN
@_CONFIG
@_JSON
@click.pass_context
def campaign_reviews(context: click.Context, campaign_id: str, config_path: Path, as_json: bool) -> None:
    """Show the evaluations, decisions and audit results of a campaign. Exit codes: 0 yes, 1 no, 2 unknown.

    Yes: its weights as they stand were evaluated, and no finding about them is open. The node's answer is not believed:
    it is a proof, checked here against the genesis.

    \b
    Example:
      countersign campaign reviews --config council/node.toml CAMPAIGN_ID
    """
    _answer(context, Predicate.EVALUATED, campaign_id, config_path, as_json)


def _answer(context: click.Context, asked: Predicate, campaign_id: str, config_path: Path, as_json: bool) -> None:
    config = load_config(config_path)
    trusted = anchor(load_genesis(config), config.node.pinned_chain)
    with connect(config_path, None, None) as client:
        bundle = open_bundle(trusted, client.bundle(asked, {"campaign": campaign_id}))
    verdict = verify(bundle, asked)
    click.echo(json.dumps(verdict_object(bundle, verdict), indent=2) if as_json else verdict_text(bundle, verdict))
    context.exit(verdict.answer.exit_code)
