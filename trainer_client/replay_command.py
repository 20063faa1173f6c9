"""``countersign replay``."""

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from safetensors.torch import save_file

from consensus.identifiers import DIGEST_BYTES, ChainId
from consensus.rejection import ConfigError, Reason, Rejected
from trainer_client.audit_snapshots import SnapshotFolder
from trainer_client.balance import BalanceSheet
from trainer_client.data_parallel import ParallelModel
from trainer_client.picked_replay import PickedReplay, replay_picked
from trainer_client.ranks import Ranks
from trainer_client.replay import LoggedCampaign, Replayed, ReplayJob, read_logged_campaign, replay
from trainer_client.submit import Client
from trainer_client.tolerant_replay import replay_within

MAX_LISTED_STEPS = 1 << 20
MAX_AUDIT_BYTES = 1 << 20
TOLD_EVERY = 10
"""Parts of a replay after which progress is told."""


class AuditFile(msgspec.Struct, frozen=True):
    """What ``countersign audit beacon`` writes, as far as it is needed."""

    chain_id: str
    campaign: str
    challenge: str
    beacon: str
    first_step: int
    last_step: int
    steps: tuple[int, ...]


@click.command("replay")
@click.option(
    "--job",
    "factory",
    metavar="MODULE:FUNCTION",
    required=True,
    help="A Python function that takes --config and returns a ReplayJob: base model, optimizer, sources, loss.",
)
@click.option("--config", type=click.Path(path_type=Path), required=True, help="The job's own configuration file.")
@click.option("--node", "node_url", required=True, help="URL of a node to read the campaign from: your own.")
@click.option("--token", help="The node's bearer token, if it wants one.")
@click.option("--chain-id", required=True, help="The pinned chain id, 64 hex digits.")
@click.option("--campaign", required=True, help="The campaign's id, 64 hex digits.")
@click.option("--without", "left_out", multiple=True, metavar="SOURCE", help="Leave out a source, by its event id.")
@click.option(
    "--snapshots",
    "snapshot_folder",
    type=click.Path(path_type=Path),
    help="The run's snapshots for audits, to begin at instead of at the base model.",
)
@click.option(
    "--steps", "step_list", metavar="LIST", help="Only these steps, such as 12,40-44, and what leads to them."
)
@click.option(
    "--audit",
    "audit_path",
    type=click.Path(path_type=Path),
    help="Only the steps that an audit picked: what countersign audit beacon --out wrote.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="On another build: how far numbers may be apart, relative to the change between two snapshots, such as 0.01.",
)
@click.option(
    "--accumulators",
    "recorded_windows",
    type=click.Path(path_type=Path),
    help="With --tolerance: the run's folder of accumulators, to compare the sums of every source, too.",
)
@click.option(
    "--base-losses",
    "base_losses",
    type=click.Path(path_type=Path),
    help="The run's file of base losses, where the campaign's policy has entropy bands.",
)
@click.option("--balance", "balanced", is_flag=True, help="Split the change of the weights by source (AdamW).")
@click.option("--out", type=click.Path(path_type=Path), help="Where to keep the weights it ends with.")
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path),
    help="Also write the JSON document to this file: what countersign audit record puts on the log.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def replay_command(
    factory: str,
    config: Path,
    node_url: str,
    token: str | None,
    chain_id: str,
    campaign: str,
    left_out: tuple[str, ...],
    snapshot_folder: Path | None,
    step_list: str | None,
    audit_path: Path | None,
    tolerance: float | None,
    recorded_windows: Path | None,
    base_losses: Path | None,
    balanced: bool,
    out: Path | None,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Run a campaign's fine-tune again and hold every step against the log, or see what it were without a source.

    Needs the base model and the sources' examples, which are checked against the log, and the build of torch and
    number of threads of the job, for the same bits. Exit code 0 when every step came out as recorded, 1 at the first
    that did not. A campaign of several processes takes as many, whose process group the job's function makes
    (torchrun --no-python --nproc-per-node 2 -- countersign replay ...). With --steps or --audit only those are taken
    again, each from the newest snapshot before it (--snapshots), and the tensors of the one that differs are named as
    well. On another build than the job's, --tolerance compares the numbers in snapshots instead of bits, from each to
    the next.
    With --without nothing is compared: the weights are those of the same campaign without the source.
    With --balance the change of every linear's parameters is split among sources and weight decay, exactly: an account
    of what was added to the weights, not of who mattered.

    \b
    Examples:
      countersign replay --job my_job:replay_job --config job.json --node http://127.0.0.1:7001 \\
        --chain-id CHAIN_ID --campaign CAMPAIGN_ID
      countersign replay --job my_job:replay_job --config job.json --node http://127.0.0.1:7001 \\
        --chain-id CHAIN_ID --campaign CAMPAIGN_ID --snapshots snapshots --steps 12,40-44
    """
    if step_list is not None and audit_path is not None:
        raise click.UsageError("give either --steps or --audit")
    some_steps = step_list is not None or audit_path is not None
    if some_steps and (left_out or balanced):
        raise click.UsageError("--steps and --audit compare steps; --without and --balance need all of them")
    if tolerance is not None and (snapshot_folder is None or not some_steps):
        raise click.UsageError("--tolerance compares with snapshots: give --snapshots, and --steps or --audit")
    if recorded_windows is not None and tolerance is None:
        raise click.UsageError("--accumulators goes with --tolerance: without it the log's own digests are compared")
    if snapshot_folder is not None and not some_steps:
        raise click.UsageError("give --steps or --audit with --snapshots: all steps are taken from the base model")
    chain, identifier = ChainId(_digest("--chain-id", chain_id)), _digest("--campaign", campaign)
    without = frozenset(_digest("--without", source) for source in left_out)
    audited = None if audit_path is None else read_audit(audit_path, chain, identifier)
    asked = listed_steps(step_list) if step_list is not None else ()
    asked = asked if audited is None else audited.steps
    job = load_job(factory, config)
    if base_losses is not None:
        job = replace(job, base_losses=base_losses)
    ranks = Ranks.of_job()

    def read() -> LoggedCampaign:
        with Client(node_url, token) as client:
            client.genesis(chain)
            return read_logged_campaign(client, identifier)

    logged = ranks.by_first(read)
    parallel = ParallelModel(job.model, ranks)
    told = _told if ranks.is_first else _untold
    begun = time.perf_counter()
    picked: PickedReplay | None = None
    if some_steps:
        folder = None if snapshot_folder is None else SnapshotFolder(snapshot_folder, identifier, ranks)
        if folder is not None and tolerance is not None:
            picked = replay_within(logged, job, asked, folder, tolerance, told, recorded_windows, ranks)
        else:
            picked = replay_picked(logged, job, asked, folder, told, ranks)
        found = Replayed(picked.executed, picked.matched, picked.difference, parallel.root())
    else:
        found = replay(logged, job, without, told, balanced=balanced, ranks=ranks)
    seconds = time.perf_counter() - begun
    ended = parallel.copied() if out is not None else {}
    if ranks.is_first:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_file(ended, out)
        document = _document(chain, logged, found, picked, audited, without, seconds)
        if report_path is not None:
            report_path.write_text(document + "\n", encoding="utf-8")
        click.echo(document if as_json else _text(logged, found, picked, without, seconds))
    ranks.close()
    click.get_current_context().exit(0 if found.difference is None else 1)


def load_job(factory: str, config: Path) -> ReplayJob[Any]:
    """What ``module:function`` makes of a configuration file.

    Raises:
        ConfigError: there is no such function, or it returns no ``ReplayJob``.
    """
    module_name, _, function_name = factory.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--job {factory}: expected module:function, here or where Python looks, found: {error}"
        ) from error
    job = function(config)
    if not isinstance(job, ReplayJob):
        raise ConfigError(f"--job {factory}: expected a function that returns a ReplayJob")
    return job


def listed_steps(text: str) -> tuple[int, ...]:
    """The steps of a list such as ``12,40-44``, rising.

    Raises:
        ConfigError: it is no such list.
    """
    steps: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        ends = (first, last or first)
        if not all(end.isascii() and end.isdigit() for end in ends) or part.endswith("-"):
            raise ConfigError(f"--steps {text!a:.80}: expected steps and ranges, such as 12,40-44")
        listed = range(int(ends[0]), int(ends[1]) + 1)
        if not 0 < len(listed) <= MAX_LISTED_STEPS:
            raise ConfigError(f"--steps {part!a:.80}: expected a rising range of {MAX_LISTED_STEPS} steps at most")
        steps.update(listed)
    return tuple(sorted(steps))


def read_audit(path: Path, chain_id: ChainId, campaign: bytes) -> AuditFile:
    """The audit in a file of ``countersign audit beacon``. That its beacon is one the log's members check.

    Raises:
        ConfigError: it is none, or another campaign's or chain's.
    """
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(MAX_AUDIT_BYTES), type=AuditFile)
    except OSError as error:
        raise ConfigError(f"--audit {path}: expected an audit's JSON document, found: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--audit {path}: expected an audit's JSON document, found: {error}") from error
    if (found.chain_id, found.campaign) != (chain_id.hex(), campaign.hex()):
        raise ConfigError(f"--audit {path}: an audit of campaign {found.campaign:.80} on chain {found.chain_id:.80}")
    return found


def _text(
    logged: LoggedCampaign,
    found: Replayed,
    picked: PickedReplay | None,
    without: frozenset[bytes],
    seconds: float,
) -> str:
    lines = [f"campaign {logged.id.hex()}: {logged.terms.name!a:.100}"]
    if without:
        names = ", ".join(f"{logged.claims[source].name!a:.60}" for source in sorted(without))
        lines.append(f"replayed {found.steps} steps without {names}, in {seconds:.0f} s; nothing to compare with")
    elif picked is not None:
        lines += _picked_lines(picked, seconds)
    elif found.matched == 0 and found.difference is None:
        lines.append(
            f"replayed {found.steps} steps in {seconds:.0f} s; not compared: the run kept no accumulators, so its"
        )
        lines.append("gradients were summed in another order")
    elif found.difference is None:
        lines.append(f"replayed {found.steps} steps in {seconds:.0f} s; every one came out as recorded, bit for bit")
    else:
        what = ", ".join(f"{each!a:.80}" for each in found.difference.what)
        lines.append(f"step {found.difference.step} did not come out as recorded: {what}")
        lines.append(f"the {found.matched} steps before it did, bit for bit")
    lines.append(f"root     {found.root.hex()}")
    if found.balance is not None:
        lines += ["", *_balance_lines(logged, found.balance)]
    return "\n".join(lines)


def _picked_lines(picked: PickedReplay, seconds: float) -> list[str]:
    lines = [
        f"replayed {picked.executed} steps in {seconds:.0f} s; {picked.matched} of the {len(picked.picked)} asked for "
        f"came out as recorded, {f'within {picked.tolerance}' if picked.tolerance else 'bit for bit'}"
    ]
    if picked.windows or picked.windows_cut:
        lines.append(
            f"accumulators: {picked.windows} whole windows compared, {picked.windows_cut} began before and were not"
        )
    if picked.difference is not None:
        what = ", ".join(f"{each!a:.80}" for each in picked.difference.what)
        lines.append(f"step {picked.difference.step} did not come out as recorded: {what}")
    return lines


def _document(
    chain_id: ChainId,
    logged: LoggedCampaign,
    found: Replayed,
    picked: PickedReplay | None,
    audited: AuditFile | None,
    without: frozenset[bytes],
    seconds: float,
) -> str:
    """``end_root`` is the parameter root after the last step that came out as recorded."""
    difference = found.difference
    end_root = found.root if difference is None else logged.steps[found.matched].operation.root_before
    if picked is not None:
        end_root = picked.end_root
    document = {
        "chain_id": chain_id.hex(),
        "campaign": logged.id.hex(),
        "without": sorted(source.hex() for source in without),
        "steps": len(logged.steps),
        "replayed": found.steps,
        "matched": found.matched,
        "difference": None if difference is None else {"step": difference.step, "what": list(difference.what)},
        "root": found.root.hex(),
        "end_root": end_root.hex(),
        "recorded_root": logged.head.root,
        "environment": environment(),
        "seconds": round(seconds, 3),
    }
    if picked is not None:
        document["picked"] = [{"step": each.step, "differing": list(each.differing)} for each in picked.picked]
        document["tolerance"] = picked.tolerance
        document["audit"] = None if audited is None else msgspec.to_builtins(audited)
        document["windows"] = {"compared": picked.windows, "cut": picked.windows_cut}
    if found.balance is not None:
        document["balance"] = asdict(
            found.balance, dict_factory=lambda pairs: {str(name): _plain(value) for name, value in pairs}
        )
    return json.dumps(document, indent=2)


def environment() -> dict[str, str]:
    """What the last bits depend on: build of torch, its threads and instruction set, the machine."""
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def _balance_lines(logged: LoggedCampaign, sheet: BalanceSheet) -> list[str]:
    """A table: parts of each parameter block's change, along it; every line adds up to 100 %."""
    columns = [(f"{logged.claims[source].name!a:.32}", entries) for source, entries in sheet.sources.items()]
    columns += [("weight decay", sheet.decay), ("rest (rounding)", sheet.rest)]
    first = max((len(block) for block in sheet.changes), default=0)
    lines = ["part of the change of each parameter block, along it; a line adds up to 100 %"]
    lines.append(f"{'':{first}}" + "".join(f"  {name:>8}" for name, _ in columns) + "  norm of the change")
    for block, norm in sheet.changes.items():
        cells = [(max(8, len(name)), entries[block]) for name, entries in columns]
        parts = "".join(f"  {f'{100 * entry.share:.1f}' if entry.norm else '–':>{width}}" for width, entry in cells)
        lines.append(f"{block:{first}}{parts}  {norm:>18.4g}")
    lines.append(f"not split: {len(sheet.unsplit)} tensors (embeddings, norms, convolutions); –: nothing was added")
    return lines


def _plain(value: Any) -> Any:
    """With sources as hexadecimal, for JSON."""
    if isinstance(value, Mapping):
        return {key.hex() if isinstance(key, bytes) else key: _plain(held) for key, held in value.items()}
    return value


def _told(done: int, of: int) -> None:
    if sys.stderr.isatty() and (done == of or done % max(1, of // TOLD_EVERY) == 0):
        click.echo(f"step {done} of {of}", err=True)


def _untold(done: int, of: int) -> None:
    return


def _digest(option: str, text: str) -> bytes:
    if len(text) != 2 * DIGEST_BYTES or set(text) - set("0123456789abcdef"):
        raise Rejected(Reason.MALFORMED, f"{option} {text!a:.80}: expected {2 * DIGEST_BYTES} lower-case hex digits")
    return bytes.fromhex(text)
