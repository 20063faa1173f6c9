"""``countersign audit``: what a replay found, on the log in its auditor's name."""

import os
from pathlib import Path
from typing import Annotated

import click
import msgspec
from msgspec import Meta

from consensus.codec import encode
from consensus.event import AUDITING_ROLES, Kind, make_entry
from consensus.portions import Portions, SaltedPortion, Setting
from consensus.rejection import ConfigError
from consensus.review import AuditResult
from node.commands.member import load_member, signed_by
from node.commands.submission import deliver

MAX_REPLAY_BYTES = 1 << 20

HexDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Difference(msgspec.Struct, frozen=True):
    step: Annotated[int, Meta(ge=1)]
    what: Annotated[tuple[str, ...], Meta(min_length=1)]


class _Replay(msgspec.Struct, frozen=True):
    """What ``countersign replay --report`` writes, as far as it is needed."""

    chain_id: HexDigest
    campaign: HexDigest
    steps: Annotated[int, Meta(ge=1)]
    matched: Annotated[int, Meta(ge=0)]
    end_root: HexDigest
    difference: _Difference | None
    without: tuple[str, ...]
    environment: dict[str, str]


@click.group()
def audit() -> None:
    """Record what replays found."""


@audit.command("record")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The auditor's configuration file."
)
@click.option(
    "--replay",
    "replay_path",
    type=click.Path(path_type=Path),
    required=True,
    help="What countersign replay --report wrote.",
)
@click.option("--statement", default="", help="A word on it, for the log.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed event to this file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit_record(config_path: Path, replay_path: Path, statement: str, out: Path | None, as_json: bool) -> None:
    """Sign a replay's result, so that proofs about the campaign say how much of it was taken again, and by whom.

    Any member but an operator may. What came out otherwise is recorded as well: that is what audits are for.

    \b
    Example:
      countersign replay --job my_job:replay_job --config job.json --node http://127.0.0.1:7001 \\
        --chain-id CHAIN_ID --campaign CAMPAIGN_ID --report replay.json
      countersign audit record --config hospital/node.toml --replay replay.json
    """
    own = load_member(config_path)
    if own.member.role not in AUDITING_ROLES:
        raise ConfigError(f"an operator's steps are audited by others; {own.member.name} is a {own.member.role.value}")
    replayed = _read_replay(replay_path)
    if bytes.fromhex(replayed.chain_id) != own.committee.chain_id:
        raise ConfigError(
            f"{replay_path}: a replay of chain {replayed.chain_id}, this is {own.committee.chain_id.hex()}"
        )
    result = AuditResult(
        first_step=1,
        last_step=replayed.steps if replayed.difference is None else replayed.difference.step,
        matched=replayed.matched,
        differing=() if replayed.difference is None else tuple(each[:128] for each in replayed.difference.what[:64]),
        end_root=bytes.fromhex(replayed.end_root),
        tolerance="",
        environment=tuple(Setting(name, value) for name, value in sorted(replayed.environment.items())),
        statement=statement,
    )
    portions = Portions(
        data=None, governance=SaltedPortion(salt=os.urandom(32), content=encode(result)), operation=None
    )
    campaign = bytes.fromhex(replayed.campaign)
    entry = make_entry(own.committee.chain_id, Kind.AUDIT_RESULT, own.member.id, portions, campaign=campaign)
    event, encoded = signed_by(own, entry, portions)
    if not as_json:
        found = "all" if replayed.difference is None else f"step {replayed.difference.step} did not; {replayed.matched}"
        click.echo(f"audit of campaign {replayed.campaign}, {replayed.steps} steps: {found} came out as recorded")
    deliver(event, encoded, submit_with=config_path if out is None else None, out=out, as_json=as_json)


def _read_replay(path: Path) -> _Replay:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_REPLAY_BYTES + 1)
        replayed = msgspec.json.decode(content[:MAX_REPLAY_BYTES], type=_Replay)
    except OSError as error:
        raise ConfigError(f"{path}: expected a replay's JSON document, found: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a replay's JSON document, found: {error}") from error
    if replayed.without:
        raise ConfigError(f"{path}: a replay without a source compares nothing, and audits nothing")
    if replayed.difference is None and replayed.matched != replayed.steps:
        raise ConfigError(f"{path}: nothing was compared in this replay, so there is nothing to record")
    if replayed.difference is not None and replayed.difference.step != replayed.matched + 1:
        raise ConfigError(
            f"{path}: {replayed.matched} steps came out as recorded, and step {replayed.difference.step} did not"
        )
    return replayed
