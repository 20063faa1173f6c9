"""``countersign verify``: one predicate, one file, one command, no network.

Reads the files, hashes the weights, prints what ``consensus.predicates`` finds. It trusts nothing but the
chain id it is given: a genesis that is another chain's is refused whatever stands beside it. Imports neither
network, database nor tensor libraries, so that it runs from a bare installation; a test holds it to that.

Whatever a file holds, it is read once, in bounded memory where it may be large, and only if it is a regular
file: a pipe or a device has no end. Weights are read by the strict reader of ``node/weights.py``.

Exit codes: 0 yes; 1 no, or refused (a bundle that is malformed, altered, incomplete or another chain's, a
file that cannot be read); 2 unknown, because something the answer needs is not disclosed or not given, or because the
question was wrongly typed: digits or a key that are none, a file that is not there.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click

from consensus.bundle import MAX_BUNDLE_BYTES, OpenBundle, open_bundle
from consensus.checkpoint import note_text, parse_checkpoint
from consensus.cosignature import parse_witness_key, verify_cosignatures
from consensus.epochs import Pin, anchor
from consensus.genesis import MAX_JSON_BYTES, genesis_from_json
from consensus.identifiers import DIGEST_BYTES, ChainId
from consensus.predicates import Answer, Predicate, ReleasedFile, Verdict, predicate_named, verify
from consensus.rejection import Reason, Rejected
from node.commands.fields import hex_argument
from node.commands.output import printable
from node.files import open_regular
from node.weights import read_weights

MAX_CHECKPOINT_BYTES = 65_536
LATEST_PRINTABLE_MS = 253_402_300_799_999
"""The end of the year 9999, the last that a calendar date is printed for."""


def _digest_typed(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return value and str(hex_argument(context, parameter, value))


def _witness_keys(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for witness in value:
        try:
            parse_witness_key(witness)
        except Rejected as error:
            raise click.BadParameter(error.detail, context, parameter) from error
    return value


@click.command("verify")
@click.argument("predicate", metavar="PREDICATE")
@click.option("--bundle", "bundle_path", required=True, type=click.Path(path_type=Path), help="The bundle file.")
@click.option("--genesis", "genesis_path", required=True, type=click.Path(path_type=Path), help="genesis.json.")
@click.option(
    "--chain-id", required=True, callback=hex_argument, help="The pinned chain id, 64 hex digits: what you trust."
)
@click.option(
    "--weights",
    "weights",
    multiple=True,
    type=click.Path(path_type=Path),
    help="For delta-exact: a .safetensors file; default ../release/*.safetensors beside the bundle's folder.",
)
@click.option("--campaign", default="", callback=_digest_typed, help="Refuse a bundle about another campaign (hex).")
@click.option("--source", default="", callback=_digest_typed, help="Refuse a bundle about another source (hex).")
@click.option("--event", default="", callback=_digest_typed, help="Refuse a bundle about another event (hex).")
@click.option(
    "--earlier",
    default="",
    callback=_digest_typed,
    help="For consistent: refuse another earlier ledger block (digest, hex).",
)
@click.option(
    "--checkpoint",
    "checkpoint_path",
    type=click.Path(path_type=Path),
    help="A checkpoint you know to be true: refuse a log that does not continue it.",
)
@click.option(
    "--witness",
    "witnesses",
    multiple=True,
    metavar="KEY",
    callback=_witness_keys,
    help="Verifier key (C2SP) of a witness you trust, of any type: one of them must have signed the checkpoint.",
)
@click.option(
    "--witnesses-needed",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="So many of the witnesses must have signed it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify_command(
    context: click.Context,
    predicate: str,
    bundle_path: Path,
    genesis_path: Path,
    chain_id: str,
    weights: tuple[Path, ...],
    campaign: str,
    source: str,
    event: str,
    earlier: str,
    checkpoint_path: Path | None,
    witnesses: tuple[str, ...],
    witnesses_needed: int,
    as_json: bool,
) -> None:
    """Check PREDICATE offline over a bundle file, with numbered steps.

    PREDICATE is one of included, consistent, policy-in-force, source-honored, source-unused, revocation-exposure,
    delta-exact, refusals-complete, evidence, metadata-complete, accumulators, evaluated. Exits 0 for yes, 1 for no or a
    refused bundle, 2 for unknown.

    \b
    Example:
      countersign verify delta-exact --bundle bundles/delta-exact.bundle --genesis genesis.json \\
        --chain-id 9691603b15437d1ae2fe384ba7552431dba59652775d8cb79e37e37c313cd1d6
    """
    for option, paths in (
        ("--bundle", (bundle_path,)),
        ("--genesis", (genesis_path,)),
        ("--weights", weights),
        ("--checkpoint", () if checkpoint_path is None else (checkpoint_path,)),
    ):
        for path in paths:
            # Of one that is there and cannot be read the bundle is refused.
            if not os.path.lexists(path):
                raise click.UsageError(f"{option} {path}: no such file", context)
    subjects = {"campaign": campaign, "source": source, "event": event, "earlier": earlier}
    try:
        checked = check_files(
            predicate,
            bundle_path,
            genesis_path,
            chain_id,
            weights,
            subjects,
            checkpoint_path,
            witnesses,
            witnesses_needed,
        )
    except Rejected as error:
        if as_json:
            refused = {"predicate": predicate, "answer": "refused", "error": error.reason.value, "detail": error.detail}
            _show(json.dumps(refused, indent=2))
        else:
            _show(printable(f"refused: {error.reason.value}: {error.detail}"), to_errors=True)
        context.exit(Answer.NO.exit_code)
    bundle, verdict = checked.bundle, checked.verdict
    if as_json:
        said = {"witnesses": checked.witnesses} if witnesses else {}
        _show(json.dumps({**verdict_object(bundle, verdict), **said}, indent=2))
    else:
        _show(verdict_text(bundle, verdict))
        for name, seconds in checked.witnesses.items():
            when = "" if seconds is None else f", at {_time(1_000 * seconds)} (UTC)"
            _show(printable(f"checkpoint signed by witness {name}{when}"), to_errors=True)
    if checked.hint:
        _show(printable(checked.hint), to_errors=True)
    context.exit(verdict.answer.exit_code)


@dataclass(frozen=True, slots=True)
class CheckedFiles:
    """What was found: the opened bundle, its verdict, and what to do about an unknown one.

    ``witnesses`` are those asked about that signed the checkpoint, each with its time in seconds, None without one.
    """

    bundle: OpenBundle
    verdict: Verdict
    hint: str
    witnesses: dict[str, int | None]


def check_files(
    predicate: str,
    bundle_path: Path,
    genesis_path: Path,
    chain_id: str,
    weights: Sequence[Path],
    subjects: dict[str, str],
    checkpoint_path: Path | None = None,
    witnesses: Sequence[str] = (),
    witnesses_needed: int = 1,
) -> CheckedFiles:
    """Check a bundle's file, and what stands beside it.

    Raises:
        Rejected: whatever is wrong with a file or with what it holds.
    """
    asked = predicate_named(predicate)
    pinned = pinned_chain(chain_id)
    trusted = anchor(genesis_from_json(_read(genesis_path, MAX_JSON_BYTES)), pinned)
    if witnesses_needed > max(1, len(witnesses)):
        raise Rejected(
            Reason.BAD_FIELD, f"{witnesses_needed} witnesses are needed, {len(witnesses)} given: --witness KEY"
        )
    pin, signed = None, dict[str, int | None]()
    if checkpoint_path is not None:
        pin, signed = read_pin(checkpoint_path, trusted.genesis.name, witnesses, witnesses_needed)
    elif witnesses:
        raise Rejected(Reason.BAD_FIELD, "a witness vouches for a checkpoint: give --checkpoint FILE")
    bundle = open_bundle(trusted, _read(bundle_path, MAX_BUNDLE_BYTES), pin)
    held = {
        "campaign": bundle.campaign,
        "source": bundle.source,
        "event": bundle.event,
        "earlier": bundle.earlier.digest if bundle.earlier else b"",
    }
    for name, wanted in subjects.items():
        found = held[name]
        if wanted and found != _unhex(name, wanted):
            raise Rejected(Reason.BAD_FIELD, f"the bundle is about {name} {found.hex() or 'none'}, not {wanted}")
    files: list[ReleasedFile] = []
    hint = ""
    if asked is Predicate.DELTA_EXACT:
        release = bundle_path.resolve().parent.parent / "release"
        paths = list(weights) or sorted(release.glob("*.safetensors"))
        if not paths:
            hint = f"no weights to compare: give --weights FILE.safetensors, or put the file into {release}"
        files = [read_weights(path) for path in paths]
    elif weights:
        raise Rejected(Reason.BAD_FIELD, f"'{asked.value}' compares no weights")
    return CheckedFiles(bundle, verify(bundle, asked, files), hint, signed)


def read_pin(
    path: Path, origin: str, witnesses: Sequence[str] = (), needed: int = 1
) -> tuple[Pin, dict[str, int | None]]:
    """The log that a checkpoint file states, and the witnesses that signed it, each with its time.

    Its signatures are looked at for ``witnesses`` (verifier keys) alone, of whom so many are ``needed``.

    Raises:
        Rejected: ``BAD_CHECKPOINT`` for a file that holds none, of another log, of an empty one, or by too few
            witnesses.
    """
    note = _read(path, MAX_CHECKPOINT_BYTES)
    stated = parse_checkpoint(note_text(note) if b"\n\n" in note else note)
    signed: dict[str, int | None] = {}
    if witnesses:
        signed = verify_cosignatures(note, [parse_witness_key(witness) for witness in witnesses])
        if len(signed) < needed:
            raise Rejected(
                Reason.BAD_CHECKPOINT, f"signed by {', '.join(signed)} alone; {needed} of the witnesses are needed"
            )
    if stated.origin != origin:
        raise Rejected(Reason.BAD_CHECKPOINT, f"a checkpoint of {stated.origin!a}, the genesis is that of {origin!a}")
    if stated.size == 0:
        raise Rejected(Reason.BAD_CHECKPOINT, "a checkpoint of an empty log pins nothing")
    return Pin(stated.size, stated.root), signed


def pinned_chain(text: str) -> ChainId:
    """The chain id that somebody typed.

    Raises:
        Rejected: ``MALFORMED``.
    """
    return ChainId(_unhex("chain id", text))


def verdict_text(bundle: OpenBundle, verdict: Verdict) -> str:
    """What a person reads: what it is about, the steps, as of when, the answer."""
    lines = [f"{verdict.predicate}, chain {bundle.trusted.chain_id.hex()}"]
    for name, subject in (("campaign", bundle.campaign), ("source", bundle.source), ("event", bundle.event)):
        if subject:
            lines.append(f"about {name} {subject.hex()}")
    lines.append("")
    lines += [f"{step.number:>3}  {step.status.value:<11}  {printable(step.text)}" for step in verdict.steps]
    as_of = verdict.as_of
    lines += [
        "",
        f"as of ledger block {as_of.height}, log size {as_of.log_size}, time {_time(as_of.timestamp_ms)} (UTC)",
        f"answer: {verdict.answer.value}",
    ]
    return "\n".join(lines)


def verdict_object(bundle: OpenBundle, verdict: Verdict) -> dict[str, object]:
    """What a program reads."""
    return {
        "predicate": verdict.predicate,
        "answer": verdict.answer.value,
        "chain_id": bundle.trusted.chain_id.hex(),
        "campaign": bundle.campaign.hex(),
        "source": bundle.source.hex(),
        "event": bundle.event.hex(),
        "as_of": {
            "height": verdict.as_of.height,
            "log_size": verdict.as_of.log_size,
            "timestamp_ms": verdict.as_of.timestamp_ms,
        },
        "steps": [{"number": step.number, "status": step.status.value, "text": step.text} for step in verdict.steps],
    }


def _time(timestamp_ms: int) -> str:
    if timestamp_ms > LATEST_PRINTABLE_MS:
        return f"{timestamp_ms} ms"
    return datetime.fromtimestamp(timestamp_ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _unhex(name: str, text: str) -> bytes:
    if len(text) != 2 * DIGEST_BYTES or set(text) - set("0123456789abcdef"):
        raise Rejected(Reason.MALFORMED, f"{name} {text!a:.80}: expected {2 * DIGEST_BYTES} lower-case hex digits")
    return bytes.fromhex(text)


def _read(path: Path, max_bytes: int) -> bytes:
    with open_regular(path, max_bytes) as (file, size_bytes):
        return file.read(size_bytes)


def _show(text: str, *, to_errors: bool = False) -> None:
    """Print, with what the terminal's character set lacks spelled out: no name in a bundle may stop the answer."""
    stream = sys.stderr if to_errors else sys.stdout
    encoding = (stream.encoding if stream else None) or "utf-8"  # None where the caller has closed it
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=to_errors)
