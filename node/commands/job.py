"""``countersign job``: let a training job write one campaign, for a while.

The job gets a key of its own and never the operator's: a stolen job key can write one campaign, inside grants
that others signed, until it expires or ``--replace`` takes its place.
"""

import os
from pathlib import Path

import click
import msgspec

from consensus.codec import encode
from consensus.event import Kind, make_entry
from consensus.identifiers import Role, Tag, tagged_hash
from consensus.job_key import job_key_id
from consensus.keys import SignatureScheme, signer_for
from consensus.portions import Delegation, Portions, SaltedPortion
from consensus.rejection import Rejected
from node.clock import SystemClock
from node.commands.connection import api_url, connect
from node.commands.fields import hex_argument, number_argument
from node.commands.member import load_member, signed_by
from node.commands.output import print_json, utc
from node.commands.submission import WAIT_SECONDS, require_final
from node.files import PRIVATE_MODE, require_absent, write_new

HOUR_MS = 3_600_000
BACKDATED_MS = 60_000
"""A delegation counts from a minute ago: a ledger block's clock may be a little behind the operator's."""


class JobKeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a training job reads to know who it is; bytes in hexadecimal, mode 0600."""

    chain_id: str
    campaign: str
    operator: str
    job_key_scheme: str
    job_key_seed: str
    node_url: str
    expires_at_ms: int

    def __repr__(self) -> str:
        return f"JobKeyFile(campaign={self.campaign}, hidden)"


@click.group()
def job() -> None:
    """Let a training job write a campaign."""


@job.command("delegate")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The operator's configuration file."
)
@click.option("--campaign", "name", required=True, help="What you call the campaign; it names itself when it opens.")
@click.option(
    "--hours",
    type=click.FloatRange(min=0.01, max=8_760),
    callback=number_argument,
    required=True,
    help="How long the job may write.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New job key file to write, mode 0600.")
@click.option(
    "--replace",
    "replaced",
    metavar="CAMPAIGN_ID",
    callback=hex_argument,
    help="Replace the lost or stolen job key of this campaign, naming its exact head.",
)
@click.option(
    "--scheme",
    type=click.Choice([scheme.label for scheme in SignatureScheme]),
    default=SignatureScheme.ED25519.label,
    show_default=True,
    help="How the job signs; the policy must admit it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, without the key.")
def job_delegate(
    config_path: Path, name: str, hours: float, out: Path, replaced: str | None, scheme: str, as_json: bool
) -> None:
    """Make a job key and let it write one campaign.

    The delegation is final before the command returns. The training job reads the file; give it to nothing else.

    \b
    Examples:
      countersign job delegate --config laboratory/node.toml --campaign sonnets-1 --hours 8 --out job-key.json
      countersign job delegate --config laboratory/node.toml --campaign sonnets-1 --hours 8 \\
        --out new-key.json --replace CAMPAIGN_ID
    """
    require_absent(out)
    own = load_member(config_path)
    own.require(Role.OPERATOR, "a delegation")
    seed = os.urandom(32)
    key = signer_for(SignatureScheme.labelled(scheme), seed)
    now_ms = SystemClock().now_ms()
    expires_at_ms = now_ms + int(hours * HOUR_MS)
    with connect(config_path, None, None) as client:
        campaign: bytes = tagged_hash(Tag.CAMPAIGN, own.member.id, os.urandom(32))
        old_key = head = b""
        if replaced is not None:
            stands = client.campaign(replaced)
            campaign = bytes.fromhex(replaced)
            old_key, head = bytes.fromhex(stands.job_key), bytes.fromhex(stands.last_event)
        delegation = Delegation(
            campaign=campaign,
            job_key=job_key_id(key),
            scheme=key.scheme,
            not_before_ms=now_ms - BACKDATED_MS,
            expires_at_ms=expires_at_ms,
            replaces=old_key,
            head=head,
        )
        portions = Portions(
            data=None, governance=None, operation=SaltedPortion(salt=os.urandom(32), content=encode(delegation))
        )
        entry = make_entry(own.committee.chain_id, Kind.DELEGATION, own.member.id, portions, campaign=campaign)
        event, encoded = signed_by(own, entry, portions)
        file = JobKeyFile(
            chain_id=own.committee.chain_id.hex(),
            campaign=campaign.hex(),
            operator=own.member.id.hex(),
            job_key_scheme=key.scheme.label,
            job_key_seed=seed.hex(),
            node_url=api_url(own.config),
            expires_at_ms=expires_at_ms,
        )
        # Written first: a delegated key that nobody holds could only be replaced once its campaign is open.
        write_new(out, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n", PRIVATE_MODE)
        try:
            answer = client.submit(encoded, WAIT_SECONDS)
        except Rejected:
            out.unlink()
            raise
    if as_json:
        print_json(
            {
                "id": event.id.hex(),
                "status": answer.status,
                "campaign": campaign.hex(),
                "job_key": delegation.job_key.hex(),
                "expires_at_ms": expires_at_ms,
                "file": str(out),
            }
        )
    else:
        click.echo(f"campaign {name!a} {campaign.hex()}")
        click.echo(f"job key {delegation.job_key.hex()} may write it until {utc(expires_at_ms)}: {answer.status}")
        click.echo(f"job key file {out}: give it to the training job alone")
    require_final(answer)
