"""``countersign campaign``: whether it recorded what its policy requires, what was found on its weights and decided."""

import json
from pathlib import Path

import click
import msgspec

from consensus.bundle import OpenBundle, open_bundle
from consensus.epochs import anchor
from consensus.predicates import Predicate, verify
from consensus.review import metric_text
from node.client import NodeClient
from node.commands.connection import connect
from node.commands.fields import hex_argument
from node.commands.manifest import read_manifest, survey_of
from node.commands.output import print_json, print_table
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


@campaign.command("recited")
@_CAMPAIGN
@_CONFIG
@click.option(
    "--manifest",
    "manifest_path",
    type=click.Path(path_type=Path),
    required=True,
    help="The operator's memorization.jsonl, as its job left it.",
)
@click.option(
    "--above",
    "threshold_permille",
    type=click.IntRange(0, 1_000),
    help="Signals above this count, in permille; default: the threshold of the policy in force.",
)
@_JSON
@click.pass_context
def campaign_recited(
    context: click.Context,
    campaign_id: str,
    config_path: Path,
    manifest_path: Path,
    threshold_permille: int | None,
    as_json: bool,
) -> None:
    """Name the examples that a campaign's weights recite, by its manifest. Exit codes: 0 none, 1 some.

    What governance decides about when a survey bars a release: whose example, and how strongly. That the file is the
    one recorded is proved, here, against the genesis; the signals in it are the operator's claim. An owner finds
    example N of its source as the N-th of its file, from 0.

    \b
    Example:
      countersign campaign recited --config council/node.toml CAMPAIGN_ID --manifest memorization.jsonl
    """
    manifest = read_manifest(manifest_path)
    with connect(config_path, None, None) as client:
        bundle = _opened(client, config_path, Predicate.EVALUATED, campaign_id)
        survey = survey_of(bundle, manifest, manifest_path)
        if threshold_permille is None:
            in_force = msgspec.json.decode(client.policy().policy, type=_Threshold)
            threshold_permille = in_force.memorization_threshold_permille
        sources = {row.id: (row.name, row.author_name) for row in client.sources().sources}
    recited = manifest.above(threshold_permille)
    rows = [(*sources.get(line.source, (line.source, "nobody known")), line) for line in recited]
    evaluation = survey.record.event.hex()
    if as_json:
        print_json(
            {
                "evaluation": evaluation,
                "standing": survey.record.standing,
                "steps": survey.record.steps,
                "examples": len(manifest.lines),
                "highest_signal_permille": manifest.highest_permille,
                "threshold_permille": threshold_permille,
                "recited": [
                    {
                        "source": line.source,
                        "name": name,
                        "owner": owner,
                        "example": line.example,
                        "signal_permille": line.signal_permille,
                    }
                    for name, owner, line in rows
                ],
            }
        )
    else:
        click.echo(f"evaluation {evaluation}, entry {survey.index}, step {survey.record.steps}")
        click.echo(f"stands     {survey.record.standing}")
        for metric in survey.evaluation.metrics:
            click.echo(f"measured   {metric_text(metric)}, says the operator")
        click.echo(f"strongest  {manifest.highest_permille} of 1000, of {len(manifest.lines)} examples shown")
        click.echo(f"recited    {len(recited)} above {threshold_permille}")
        if rows:
            cells = [(name, owner, str(line.example), str(line.signal_permille)) for name, owner, line in rows]
            print_table(("source", "owner", "example", "signal"), cells)
    context.exit(1 if recited else 0)


def _answer(context: click.Context, asked: Predicate, campaign_id: str, config_path: Path, as_json: bool) -> None:
    with connect(config_path, None, None) as client:
        bundle = _opened(client, config_path, asked, campaign_id)
    verdict = verify(bundle, asked)
    click.echo(json.dumps(verdict_object(bundle, verdict), indent=2) if as_json else verdict_text(bundle, verdict))
    context.exit(verdict.answer.exit_code)


def _opened(client: NodeClient, config_path: Path, asked: Predicate, campaign_id: str) -> OpenBundle:
    """A bundle about a campaign, proved against the genesis of the configuration."""
    config = load_config(config_path)
    trusted = anchor(load_genesis(config), config.node.pinned_chain)
    return open_bundle(trusted, client.bundle(asked, {"campaign": campaign_id}))


class _Threshold(msgspec.Struct, frozen=True):
    """The part of a policy that is needed here."""

    memorization_threshold_permille: int
