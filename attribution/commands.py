"""``countersign trace`` and ``countersign factors``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import nn

from attribution.factors import WeightFactors, factor_tensors, factors_from, fit_factors
from attribution.log import CampaignLog, open_log
from attribution.query import Output, greedy_completion
from attribution.report import trace_json, trace_text
from attribution.trace import control_outputs, trace_output, untraced_tensors
from attribution.weights import build_model, find_windows, load_model, read_tensors
from consensus.identifiers import DIGEST_BYTES, ChainId
from consensus.rejection import ConfigError, Reason, Rejected

FACTOR_SEQUENCES = 256
BATCH_SEQUENCES = 16
CONTROLS = 40

_MODEL = click.option(
    "--model",
    "architecture",
    metavar="MODULE:FUNCTION",
    required=True,
    help="A Python function that returns the model, untrained; it maps tokens [B, T] to logits [B, T, V].",
)
_TEXT = click.option(
    "--text",
    "text_path",
    type=click.Path(path_type=Path),
    help="Public text, for factors and control outputs; default: the topics of Python's own manual.",
)


_CONTEXT = click.option(
    "--context",
    "context_tokens",
    type=click.IntRange(min=8),
    default=128,
    show_default=True,
    help="Tokens of public text that the model reads at once; at most what it can.",
)


@click.command("factors")
@_MODEL
@click.option("--base", "base_path", type=click.Path(path_type=Path), required=True, help="The base model's weights.")
@_TEXT
@_CONTEXT
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
def factors_command(architecture: str, base_path: Path, text_path: Path | None, context_tokens: int, out: Path) -> None:
    """Fit a base model's Kronecker factors over public text, once, for every trace to come.

    Prints the digest that a campaign may commit to (CampaignPlan.factors_digest), so that nobody chooses factors to
    suit an answer. Models read text as bytes.

    \b
    Example:
      countersign factors --model my_model:build --base base.safetensors --out base.factors
    """
    model = build_model(architecture)
    held = read_tensors(base_path)
    model = load_model(architecture, base_path, held.root, "base model")
    tensors = factor_tensors(_fit(model, _sequences(text_path, context_tokens)))
    save_file(tensors, out)
    click.echo(f"base     {held.root.hex()}")
    click.echo(f"factors  {read_tensors(out).root.hex()}")
    click.echo(f"kept in  {out}")


@click.command("trace")
@_MODEL
@click.option("--base", "base_path", type=click.Path(path_type=Path), required=True, help="The base model's weights.")
@click.option("--tuned", "tuned_path", type=click.Path(path_type=Path), required=True, help="The released weights.")
@click.option("--prompt", required=True, help="What the model was given.")
@click.option("--completion", help="The output to ask about; default: what the tuned model says next.")
@click.option("--tokens", "span", metavar="FROM:TO", help="Only these tokens of the completion, counted from 0.")
@click.option(
    "--accumulators",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run's accumulator files.",
)
@click.option("--bundle", "bundle_path", type=click.Path(path_type=Path), required=True, help="The bundle file.")
@click.option("--genesis", "genesis_path", type=click.Path(path_type=Path), required=True, help="genesis.json.")
@click.option("--chain-id", required=True, help="The pinned chain id, 64 hex digits: what you trust.")
@click.option(
    "--factors", "factors_path", type=click.Path(path_type=Path), help="As countersign factors wrote; else fitted now."
)
@_TEXT
@_CONTEXT
@click.option("--length", default=16, show_default=True, help="Tokens to complete, without --completion.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def trace_command(
    architecture: str,
    base_path: Path,
    tuned_path: Path,
    prompt: str,
    completion: str | None,
    span: str | None,
    directory: Path,
    bundle_path: Path,
    genesis_path: Path,
    chain_id: str,
    factors_path: Path | None,
    text_path: Path | None,
    context_tokens: int,
    length: int,
    as_json: bool,
) -> None:
    """Ask which admitted sources shaped an output, from the log and committed accumulators alone.

    Neither the corpus nor the job is needed. The bundle is made by
    countersign log prove --predicate accumulators --campaign ID. Exit code 0 when the output was shaped here, 1 when it
    was not, 2 when what is here does not suffice. Models read text as bytes.

    \b
    Example:
      countersign trace --model my_model:build --base base.safetensors --tuned tuned.safetensors \\
        --prompt "The keeper of Arnholt is " --accumulators run/accumulators \\
        --bundle campaign.bundle --genesis genesis.json --chain-id CHAIN_ID
    """
    log = open_log(bundle_path, genesis_path, _chain(chain_id))
    release = log.provenance.release
    if not log.provenance.windows:
        raise Rejected(Reason.NOT_FOUND, "the job recorded no accumulators: its outputs cannot be traced from the log")
    if release is None:
        raise Rejected(Reason.ROOT_NOT_FINAL, "the campaign has released nothing: there is no tuned model to ask about")
    base = load_model(architecture, base_path, log.provenance.campaign.base_root, "campaign's base model")
    tuned = load_model(architecture, tuned_path, release.parameter_root, "campaign's release")
    search = find_windows(directory, log.bundle.campaign, log.provenance.windows)
    sequences = _sequences(text_path, context_tokens)
    factors = _factors(log, base, factors_path, sequences)
    output, asked = _asked(tuned, prompt, completion, span, length)
    controls = control_outputs([list(sequence) for sequence in sequences], output)[-CONTROLS:]
    trace = trace_output(base, tuned, factors, log.provenance, search.found, output, controls, _told)
    untraced = untraced_tensors(log.provenance.campaign, factors)
    render = trace_json if as_json else trace_text
    click.echo(render(log, trace, search, asked, untraced))
    whole = not search.missing and not log.provenance.uncovered
    click.get_current_context().exit(0 if trace.shaped_here and whole else 1 if whole else 2)


def _factors(
    log: CampaignLog, base: nn.Module, path: Path | None, sequences: Sequence[bytes]
) -> dict[str, WeightFactors]:
    committed = log.provenance.campaign.factors_digest
    if path is None:
        tensors = factor_tensors(_fit(base, sequences))
        if committed:
            click.echo("note: the campaign commits to factors; give them with --factors", err=True)
        return factors_from(tensors, base)
    held = read_tensors(path)
    if committed and held.root != committed:
        raise Rejected(
            Reason.DIGEST_MISMATCH, f"{path} has root {held.root.hex()}, the campaign commits to {committed.hex()}"
        )
    if not committed:
        click.echo("note: the campaign commits to no factors: these are the asker's choice", err=True)
    return factors_from(held.tensors, base)


def _fit(model: nn.Module, sequences: Sequence[bytes]) -> dict[str, WeightFactors]:
    chosen = sequences[:FACTOR_SEQUENCES]
    batches = [
        torch.tensor([list(sequence) for sequence in chosen[start : start + BATCH_SEQUENCES]])
        for start in range(0, len(chosen), BATCH_SEQUENCES)
    ]

    def told(done: int, of: int) -> None:
        if done % 8 == 0 or done == of:
            _told(f"factors: {done} of {of} batches")

    return fit_factors(model, batches, progress=told)


def _asked(tuned: nn.Module, prompt: str, completion: str | None, span: str | None, length: int) -> tuple[Output, str]:
    before = prompt.encode()
    if not before:
        raise Rejected(Reason.BAD_FIELD, "the prompt is empty: the first token of all has no chance to be asked about")
    after = completion.encode() if completion is not None else bytes(greedy_completion(tuned, before, length))
    first, end = 0, len(after)
    if span is not None:
        left, _, right = span.partition(":")
        if not (left.isascii() and left.isdigit() and right.isascii() and right.isdigit()):
            raise ConfigError(f"--tokens: expected FROM:TO, found {span}")
        first, end = int(left), int(right)
    if not 0 <= first < end <= len(after):
        raise Rejected(Reason.BAD_FIELD, f"tokens {first}:{end} of a completion of {len(after)}: an empty span")
    output = Output(tuple(before + after), len(before) + first, len(before) + end)
    return output, f"{prompt}[{after.decode('utf-8', 'backslashreplace')}]"


def public_text(context_tokens: int) -> list[bytes]:
    """The default text: the topics of Python's own manual, in pieces of one length."""
    from pydoc_data.topics import topics  # noqa: PLC0415 (half a megabyte that only this default needs)

    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    return _pieces(text, context_tokens)


def _sequences(path: Path | None, context_tokens: int) -> list[bytes]:
    """Pieces of public text, all of one length, in order."""
    if path is None:
        return public_text(context_tokens)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a text file, found: {error.strerror}") from error
    pieces = _pieces(text, context_tokens)
    if len(pieces) < CONTROLS:
        raise ConfigError(f"{path}: expected at least {CONTROLS * context_tokens} bytes, found {len(text)}")
    return pieces


def _pieces(text: bytes, size: int) -> list[bytes]:
    return [text[start : start + size] for start in range(0, len(text) - size + 1, size)]


def _chain(text: str) -> ChainId:
    if len(text) != 2 * DIGEST_BYTES or set(text) - set("0123456789abcdef"):
        raise Rejected(Reason.MALFORMED, f"chain id {text!a:.80}: expected {2 * DIGEST_BYTES} lower-case hex digits")
    return ChainId(bytes.fromhex(text))


def _told(stage: str) -> None:
    if sys.stderr.isatty():
        click.echo(stage, err=True)
