"""``countersign audit``: audits by lot, and what a replay found, on the log in its auditor's name."""

import json
import os
from pathlib import Path
from typing import Annotated

import click
import msgspec
from msgspec import Meta

from consensus import bls
from consensus.beacon import beacon_message, picked_steps
from consensus.codec import encode
from consensus.epochs import anchor
from consensus.event import AUDITING_ROLES, Kind, make_entry
from consensus.portions import Portions, SaltedPortion, Setting, Wire
from consensus.receipt import verify_state_receipt
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.review import MAX_PICKS, AuditAnswer, AuditChallenge, AuditResult, PickedStep
from consensus.state import CHALLENGE_TABLE, ChallengeRecord, read_record, review_key
from node.clock import SystemClock
from node.commands.connection import connect
from node.commands.fields import digest_argument
from node.commands.member import LocalMember, load_member, signed_by
from node.commands.output import utc
from node.commands.submission import deliver
from node.config import load_config
from node.files import check_output, write_output
from node.identity import load_genesis

MAX_REPLAY_BYTES = 1 << 20
HOUR_MS = 3_600_000

HexDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Difference(msgspec.Struct, frozen=True):
    step: Annotated[int, Meta(ge=1)]
    what: Annotated[tuple[str, ...], Meta(min_length=1)]


class _Audit(msgspec.Struct, frozen=True):
    """The audit by lot that a replay was of."""

    challenge: HexDigest
    beacon: Annotated[str, Meta(pattern="^[0-9a-f]{192}$")]
    first_step: Annotated[int, Meta(ge=1)]
    last_step: Annotated[int, Meta(ge=1)]


class _Picked(msgspec.Struct, frozen=True):
    step: Annotated[int, Meta(ge=1)]
    differing: tuple[str, ...]


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
    picked: tuple[_Picked, ...] = ()
    audit: _Audit | None = None
    tolerance: Annotated[str, Meta(max_length=128)] = ""


@click.group()
def audit() -> None:
    """Ask for audits by lot, and record what replays found."""


_CONFIG = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The auditor's configuration file."
)
_CAMPAIGN = click.option("--campaign", callback=digest_argument, required=True, help="The campaign's id.")


@audit.command("challenge")
@_CONFIG
@_CAMPAIGN
@click.option("--first-step", type=click.IntRange(1), default=1, show_default=True, help="Where the range begins.")
@click.option("--last-step", type=click.IntRange(1), required=True, help="Where it ends; no longer to be undone.")
@click.option("--picks", type=click.IntRange(1, MAX_PICKS), required=True, help="How many of its steps are picked.")
@click.option("--hours", type=click.IntRange(1, 24 * 89), default=72, show_default=True, help="Time to answer.")
@click.option("--number", type=click.IntRange(1), help="The audit's number; without it the node is asked for the next.")
@click.option("--statement", default="", help="A word on it, for the log.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed event to this new file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit_challenge(
    config_path: Path,
    campaign: bytes,
    first_step: int,
    last_step: int,
    picks: int,
    hours: int,
    number: int | None,
    statement: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Have some steps of a campaign picked by lot, to be taken again.

    Which ones nobody knows before the challenge is final: then countersign audit beacon tells. Any member but an
    operator may ask, or the auditors that the policy names; what these ask for bars the release until it passed. An
    answer (countersign audit record) after the given time is refused, and the audit has failed.

    \b
    Example:
      countersign audit challenge --config hospital/node.toml --campaign CAMPAIGN_ID --last-step 500 --picks 8
    """
    own = _auditor(config_path)
    if number is None:
        with connect(config_path, None, None) as client:
            number = client.campaign(campaign.hex()).next_audit
    answer_by_ms = SystemClock().now_ms() + hours * HOUR_MS
    challenge = AuditChallenge(number, first_step, last_step, picks, answer_by_ms, statement)
    if not as_json:
        click.echo(f"audit {number} of campaign {campaign.hex()}: {picks} of the steps {first_step} to {last_step}")
        click.echo(f"to be answered by {utc(answer_by_ms)}")
    _sign_and_deliver(own, Kind.AUDIT_CHALLENGE, campaign, challenge, config_path, out, as_json)


@audit.command("beacon")
@_CONFIG
@_CAMPAIGN
@click.option("--challenge", callback=digest_argument, required=True, help="The challenge's event id.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write it to this new file, for replay --audit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit_beacon(config_path: Path, campaign: bytes, challenge: bytes, out: Path | None, as_json: bool) -> None:
    """Gather the beacon of a final challenge from the members, and see which steps it picks.

    The node's answer is not believed: challenge and key are proved against the genesis, and the beacon is checked.

    \b
    Example:
      countersign audit beacon --config hospital/node.toml --campaign CAMPAIGN_ID --challenge CHALLENGE_ID \\
        --out audit.json
    """
    if out is not None:
        check_output(out)
    config = load_config(config_path)
    trusted = anchor(load_genesis(config), config.node.pinned_chain)
    key = review_key(CHALLENGE_TABLE, campaign, challenge)
    with connect(config_path, None, None) as client:
        value = verify_state_receipt(trusted, client.state_receipt(key), key).value
        record = None if value is None else read_record(value, ChallengeRecord)
        if record is None or record.event != challenge:
            raise Rejected(Reason.NOT_FOUND, f"{challenge.hex()} is no final audit challenge of {campaign.hex()}")
        beacon = bytes.fromhex(client.beacon(campaign.hex(), challenge.hex()).beacon)
    bls.verify(record.beacon_key, beacon_message(trusted.chain_id, record.epoch, campaign, record.number), beacon)
    steps = picked_steps(beacon, record.first_step, record.last_step, record.picks)
    document = json.dumps(
        {
            "chain_id": trusted.chain_id.hex(),
            "campaign": campaign.hex(),
            "challenge": challenge.hex(),
            "number": record.number,
            "epoch": record.epoch,
            "beacon": beacon.hex(),
            "first_step": record.first_step,
            "last_step": record.last_step,
            "steps": list(steps),
            "answer_by_ms": record.answer_by_ms,
        },
        indent=2,
    )
    if out is not None:
        write_output(out, document.encode() + b"\n")
    if as_json:
        click.echo(document)
        return
    click.echo(f"audit {record.number}: steps {', '.join(map(str, steps))}")
    click.echo(f"to be answered by {utc(record.answer_by_ms)}")


@audit.command("record")
@_CONFIG
@click.option(
    "--replay",
    "replay_path",
    type=click.Path(path_type=Path),
    required=True,
    help="What countersign replay --report wrote.",
)
@click.option("--statement", default="", help="A word on it, for the log.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed event to this new file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def audit_record(config_path: Path, replay_path: Path, statement: str, out: Path | None, as_json: bool) -> None:
    """Sign a replay's result, so that proofs about the campaign say how much of it was taken again, and by whom.

    Any member but an operator may. What came out otherwise is recorded as well: that is what audits are for. A replay
    of the steps that an audit picked (countersign replay --audit) becomes the answer to its challenge.

    \b
    Example:
      countersign replay --job my_job:replay_job --config job.json --node http://127.0.0.1:7001 \\
        --chain-id CHAIN_ID --campaign CAMPAIGN_ID --report replay.json
      countersign audit record --config hospital/node.toml --replay replay.json
    """
    own = _auditor(config_path)
    replayed = _read_replay(replay_path)
    if bytes.fromhex(replayed.chain_id) != own.committee.chain_id:
        raise ConfigError(
            f"{replay_path}: a replay of chain {replayed.chain_id}, this is {own.committee.chain_id.hex()}"
        )
    answer = _answer(replayed)
    first, last = 1, replayed.steps if replayed.difference is None else replayed.difference.step
    if replayed.audit is not None:
        first, last = replayed.audit.first_step, replayed.audit.last_step
    result = AuditResult(
        first_step=first,
        last_step=last,
        matched=replayed.matched,
        differing=() if replayed.difference is None else _shortened(replayed.difference.what, 64),
        end_root=bytes.fromhex(replayed.end_root),
        tolerance=replayed.tolerance,
        environment=tuple(Setting(name, value) for name, value in sorted(replayed.environment.items())),
        statement=statement,
        answer=answer,
    )
    if not as_json:
        of = f"{replayed.steps} steps" if answer is None else f"{len(answer.picked)} steps picked by lot"
        found = "all" if replayed.difference is None else f"step {replayed.difference.step} did not; {replayed.matched}"
        click.echo(f"audit of campaign {replayed.campaign}, {of}: {found} came out as recorded")
    campaign = bytes.fromhex(replayed.campaign)
    _sign_and_deliver(own, Kind.AUDIT_RESULT, campaign, result, config_path, out, as_json)


def _auditor(config_path: Path) -> LocalMember:
    own = load_member(config_path)
    if own.member.role not in AUDITING_ROLES:
        raise ConfigError(f"an operator's steps are audited by others; {own.member.name} is an operator")
    return own


def _sign_and_deliver(
    own: LocalMember, kind: Kind, campaign: bytes, content: Wire, config_path: Path, out: Path | None, as_json: bool
) -> None:
    portions = Portions(
        data=None, governance=SaltedPortion(salt=os.urandom(32), content=encode(content)), operation=None
    )
    entry = make_entry(own.committee.chain_id, kind, own.member.id, portions, campaign=campaign)
    event, encoded = signed_by(own, entry, portions)
    deliver(event, encoded, submit_with=config_path if out is None else None, out=out, as_json=as_json)


def _answer(replayed: _Replay) -> AuditAnswer | None:
    if replayed.audit is None:
        return None
    picked = tuple(PickedStep(each.step, _shortened(each.differing, 16)) for each in replayed.picked)
    return AuditAnswer(bytes.fromhex(replayed.audit.challenge), bytes.fromhex(replayed.audit.beacon), picked)


def _shortened(names: tuple[str, ...], most: int) -> tuple[str, ...]:
    return tuple(each[:128] for each in names[:most])


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
    if bool(replayed.picked) != (replayed.audit is not None):
        raise ConfigError(f"{path}: a replay of steps that its runner chose; expected one of all, or of an audit's")
    if replayed.audit is not None:
        matching = sum(not each.differing for each in replayed.picked)
        whole = matching == len(replayed.picked)
        if matching != replayed.matched or whole != (replayed.difference is None):
            raise ConfigError(f"{path}: {replayed.matched} picked steps came out as recorded, {matching} are named")
        return replayed
    if replayed.difference is None and replayed.matched != replayed.steps:
        raise ConfigError(f"{path}: nothing was compared in this replay, so there is nothing to record")
    if replayed.difference is not None and replayed.difference.step != replayed.matched + 1:
        raise ConfigError(
            f"{path}: {replayed.matched} steps came out as recorded, and step {replayed.difference.step} did not"
        )
    return replayed
