"""``countersign trace``, ``countersign footprint`` and ``countersign factors``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click
import torch
from safetensors.torch import save_file
from torch import nn

from attribution.examples import OPEN_AT_MOST, Allowance
from attribution.factors import FactorsOrigin, WeightFactors, factor_tensors, factors_from, fit_factors
from attribution.footprint import chosen_sources, example_footprint, footprint
from attribution.index import SketchedCampaign, open_index
from attribution.language import Language, language_of
from attribution.log import CampaignLog
from attribution.options import ACCUMULATORS, INDEX, GivenLog, log_options, told
from attribution.page import page
from attribution.query import log_chance
from attribution.questions import Question, greedy_text, read_questions
from attribution.report import Answer, footprint_json, footprint_text, trace_json, trace_text
from attribution.sketches import RunFolder, SketchStore
from attribution.standings import standings, standings_fields, standings_text
from attribution.trace import control_outputs, trace_output, untraced_tensors
from attribution.weights import find_windows, freeze_others, load_model, read_tensors
from consensus.pieces import tensor_named
from consensus.rejection import ConfigError, Reason, Rejected

P = TypeVar("P")

FACTOR_SEQUENCES = 256
BATCH_SEQUENCES = 16
CONTROLS = 40

_MODEL = click.option(
    "--model",
    "architecture",
    metavar="MODULE:FUNCTION|FOLDER",
    required=True,
    help="A Python function that returns the model, untrained; it maps tokens [B, T] to logits [B, T, V]. Or a folder "
    "with the config.json of a causal language model of transformers.",
)
_TOKENIZER = click.option(
    "--tokenizer",
    "tokenizer_path",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder with a tokenizer of transformers. Default: the one in the model's folder, else text is bytes.",
)
_ADAPTER = click.option(
    "--adapter",
    "adapter_path",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder with adapter_config.json: the adapter that PEFT puts around the model.",
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
@_ADAPTER
@_TOKENIZER
@click.option(
    "--weights", "weights_path", type=click.Path(path_type=Path), required=True, help="The weights to fit factors of."
)
@_TEXT
@_CONTEXT
@click.option(
    "--sequences",
    "sequence_count",
    type=click.IntRange(min=1),
    default=FACTOR_SEQUENCES,
    show_default=True,
    help="Pieces of public text to fit over, evenly over the whole; fewer are quicker.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def factors_command(
    architecture: str,
    adapter_path: Path | None,
    tokenizer_path: Path | None,
    weights_path: Path,
    text_path: Path | None,
    context_tokens: int,
    sequence_count: int,
    out: Path,
    as_json: bool,
) -> None:
    """Fit a model's Kronecker factors over public text, once, for every trace to come.

    Those of the released weights make the better answers, and are what traces fit for themselves. Those of the base
    model can be had before the fine-tune: a campaign may commit to the digest printed here
    (CampaignPlan.factors_digest), so that nobody chooses factors to suit an answer.

    \b
    Example:
      countersign factors --model my_model:build --weights tuned.safetensors --out tuned.factors
    """
    held = read_tensors(weights_path)
    model = load_model(architecture, weights_path, held.root, "model", adapter_path)
    language = language_of(architecture, tokenizer_path)
    sequences = _sequences(text_path, language, context_tokens)
    tensors = factor_tensors(fit_on_text(model, sequences, sequence_count))
    save_file(tensors, out)
    root = read_tensors(out).root
    if as_json:
        click.echo(json.dumps({"weights": held.root.hex(), "factors": root.hex(), "file": str(out)}, indent=2))
        return
    click.echo(f"weights  {held.root.hex()}")
    click.echo(f"factors  {root.hex()}")
    click.echo(f"kept in  {out}")


_CHOICES = (
    click.option("--source", "names", multiple=True, help="A source's name or event id; may be given more than once."),
    click.option("--owner", "owners", multiple=True, help="All sources of a member."),
    click.option("--class", "classes", multiple=True, help="All sources of a content class."),
    click.option("--revoked", is_flag=True, help="All sources that are revoked by now."),
)


def _chosen(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose sources, as ``chosen_sources`` takes them."""
    for option in reversed(_CHOICES):
        command = option(command)
    return command


@click.command("trace")
@_MODEL
@_ADAPTER
@_TOKENIZER
@click.option("--base", "base_path", type=click.Path(path_type=Path), required=True, help="The base model's weights.")
@click.option("--tuned", "tuned_path", type=click.Path(path_type=Path), required=True, help="The released weights.")
@click.option("--prompt", help="What the model was given.")
@click.option("--completion", help="The output to ask about; default: what the tuned model says next.")
@click.option("--tokens", "span", metavar="FROM:TO", help="Only these tokens of the completion, counted from 0.")
@click.option(
    "--outputs",
    "outputs_path",
    type=click.Path(path_type=Path),
    help='Instead of --prompt: a file with a question a line, {"prompt": …, "completion": …, "tokens": …}.',
)
@_chosen
@ACCUMULATORS
@INDEX
@click.option(
    "--open-at-most",
    type=click.IntRange(min=0),
    default=OPEN_AT_MOST,
    show_default=True,
    help="Example-visits whose sketches one answer may open.",
)
@log_options
@click.option(
    "--factors",
    "factors_path",
    type=click.Path(path_type=Path),
    help="As countersign factors wrote. Default: fitted now, unless the campaign commits to factors.",
)
@click.option(
    "--without-weights",
    "without_path",
    type=click.Path(path_type=Path),
    help="Weights that countersign replay --without ended with: shown beside, as what came out without that source.",
)
@_TEXT
@_CONTEXT
@click.option("--length", default=16, show_default=True, help="Tokens to complete, without --completion.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--html", "page_path", type=click.Path(path_type=Path), help="Also write a self-contained page.")
def trace_command(
    architecture: str,
    adapter_path: Path | None,
    tokenizer_path: Path | None,
    base_path: Path,
    tuned_path: Path,
    prompt: str | None,
    completion: str | None,
    span: str | None,
    outputs_path: Path | None,
    names: tuple[str, ...],
    owners: tuple[str, ...],
    classes: tuple[str, ...],
    revoked: bool,
    directory: Path,
    index_path: Path | None,
    open_at_most: int,
    given: GivenLog,
    factors_path: Path | None,
    without_path: Path | None,
    text_path: Path | None,
    context_tokens: int,
    length: int,
    as_json: bool,
    page_path: Path | None,
) -> None:
    """Ask which admitted sources shaped an output, from the log and committed accumulators alone.

    Neither the corpus nor the job is needed. The log is asked by --ledger, or beforehand by
    countersign log prove --predicate accumulators --campaign ID, whose file is the --bundle. Exit code 0 when the
    output was shaped here, 1 when it was not or no source stands out, 2 when what is here does not suffice. With
    --outputs each line gets an answer of its own (with --json a document a line), and 0 says that all were answered.
    With --source, --owner, --class or --revoked it ends with the outputs in which these sources stand out, and 0 says
    that there are any.

    \b
    Example:
      countersign trace --model my_model:build --base base.safetensors --tuned tuned.safetensors \\
        --prompt "The keeper of Arnholt is " --accumulators run/accumulators \\
        --ledger http://127.0.0.1:7480 --genesis genesis.json --chain-id CHAIN_ID
    """
    questions = _questions(prompt, completion, span, outputs_path)
    if outputs_path is None and (names or owners or classes or revoked):
        raise click.UsageError("--source, --owner, --class and --revoked ask about --outputs")
    log = given.open()
    release = log.provenance.release
    if not log.provenance.windows:
        raise Rejected(Reason.NOT_FOUND, "the job recorded no accumulators: its outputs cannot be traced from the log")
    if release is None:
        raise Rejected(Reason.ROOT_NOT_FINAL, "the campaign has released nothing: there is no tuned model to ask about")
    chosen = chosen_sources(log.provenance, names, owners, classes, revoked)
    store = _store(log, index_path)
    language = language_of(architecture, tokenizer_path)
    base = load_model(architecture, base_path, log.provenance.campaign.base_root, "campaign's base model", adapter_path)
    tuned = load_model(architecture, tuned_path, release.parameter_root, "campaign's release", adapter_path)
    others = {} if without_path is None else {"without": _unchecked_model(architecture, adapter_path, without_path)}
    blocks = log.provenance.campaign.parameter_blocks
    freeze_others(tuned, {tensor_named(tensor.name) for block in blocks for tensor in block.tensors})
    search = find_windows(directory, log.bundle.campaign, log.provenance.windows)
    sequences = _sequences(text_path, language, context_tokens)
    factors, origin = chosen_factors(log, tuned, factors_path, sequences)
    untraced = untraced_tensors(log.provenance.campaign, factors)
    answers = []
    for number, question in enumerate(questions):
        output, asked, count = question.output(tuned, language, length)
        controls = spread(control_outputs([list(sequence) for sequence in sequences], output), CONTROLS)
        allowance = Allowance(open_at_most)
        trace = trace_output(
            base, tuned, factors, log.provenance, search.found, output, controls, told, store, allowance
        )
        models = {"base": base, "tuned": tuned, **others}
        answer = Answer(
            asked=asked,
            prompt=question.prompt,
            says={name: greedy_text(model, language, question.prompt, count) for name, model in models.items()},
            log_chances={
                "base": trace.base_log_chance,
                "tuned": trace.tuned_log_chance,
                **{name: log_chance(model, output) for name, model in others.items()},
            },
            trace=trace,
            search=search,
            untraced=untraced,
            factors=origin,
            index=index_path,
        )
        if as_json:
            click.echo(trace_json(log, answer, indent=2 if outputs_path is None else None))
        else:
            click.echo("\n" * bool(number) + trace_text(log, answer))
        answers.append(answer)
    standing = standings(answers, chosen)
    if chosen and as_json:
        click.echo(json.dumps(standings_fields(standing, len(answers))))
    elif chosen:
        click.echo("\n" + standings_text(standing, len(answers)))
    if page_path is not None:
        _write_page(page_path, page(log, answers))
    if search.missing or log.provenance.uncovered:
        click.get_current_context().exit(2)
    if chosen:
        answered = any(each.stands_out for each in standing)
    else:
        answered = outputs_path is not None or all(answer.trace.shaped_here for answer in answers)
    click.get_current_context().exit(0 if answered else 1)


def _write_page(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: expected to write the page, found: {error.strerror}") from error


@click.command("footprint")
@_chosen
@click.option("--example", metavar="SOURCE:INDEX", help="Instead of sources: one example of a source, by its sketches.")
@ACCUMULATORS
@INDEX
@log_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def footprint_command(
    names: tuple[str, ...],
    owners: tuple[str, ...],
    classes: tuple[str, ...],
    revoked: bool,
    example: str | None,
    directory: Path,
    index_path: Path | None,
    given: GivenLog,
    as_json: bool,
) -> None:
    """Ask which steps and parts of the model sources moved, how much, and what was released after.

    The way back from a revocation: --revoked shows what depends on sources that were taken back. --example asks about a
    single example, where the campaign keeps sketches. Needs no model. Exit code 0 when something of them was admitted,
    1 when nothing was, 2 when what is here does not suffice.

    \b
    Example:
      countersign footprint --source harbour --accumulators run/accumulators \\
        --bundle campaign.bundle --genesis genesis.json --chain-id CHAIN_ID
    """
    if bool(names or owners or classes or revoked) == (example is not None):
        raise click.UsageError("expected --source, --owner, --class or --revoked; or --example alone")
    names, number = (names, 0) if example is None else _example(example)
    log = given.open()
    chosen = chosen_sources(log.provenance, names, owners, classes, revoked)
    if not log.provenance.windows:
        raise Rejected(Reason.NOT_FOUND, "the job recorded no accumulators: what its sources moved is not on the log")
    search = find_windows(directory, log.bundle.campaign, log.provenance.windows)
    if example is None:
        found = footprint(log.provenance, search.found, chosen)
    else:
        if len(chosen) != 1:
            raise Rejected(Reason.BAD_FIELD, f"{len(chosen)} sources are called {names[0]!a:.80}: give the event id")
        found = example_footprint(log.provenance, search.found, chosen[0], number, _store(log, index_path))
    click.echo((footprint_json if as_json else footprint_text)(log, found, search))
    if search.missing or log.provenance.uncovered or (found.of_example and found.of_example.left_out):
        click.get_current_context().exit(2)
    click.get_current_context().exit(0 if found.admitted else 1)


def _store(log: CampaignLog, index_path: Path | None) -> SketchStore:
    return RunFolder() if index_path is None else open_index(index_path, SketchedCampaign.of(log))


def _example(text: str) -> tuple[tuple[str, ...], int]:
    source, _, number = text.rpartition(":")
    if not source or not (number.isascii() and number.isdigit() and len(number) < 17):
        raise ConfigError(f"--example: expected SOURCE:INDEX, found {text!a:.100}")
    return (source,), int(number)


def _questions(prompt: str | None, completion: str | None, span: str | None, path: Path | None) -> tuple[Question, ...]:
    if path is None:
        if prompt is None:
            raise click.UsageError("expected --prompt or --outputs")
        return (Question(prompt, completion, span),)
    if prompt is not None or completion is not None or span is not None:
        raise click.UsageError("--outputs brings prompts, completions and tokens itself")
    return read_questions(path)


def chosen_factors(
    log: CampaignLog, tuned: nn.Module, path: Path | None, sequences: Sequence[Sequence[int]]
) -> tuple[dict[str, WeightFactors], FactorsOrigin]:
    """Those that the campaign commits to, where it does; else those of a file, else fitted on the released weights.

    Raises:
        ConfigError: the campaign commits to factors, and no file is given.
        Rejected: ``DIGEST_MISMATCH`` for a file of others; as ``read_tensors`` and ``factors_from``.
    """
    committed = log.provenance.campaign.factors_digest
    if path is None:
        if committed:
            raise ConfigError(f"the campaign commits to factors {committed.hex()}: give their file with --factors")
        return fit_on_text(tuned, sequences, FACTOR_SEQUENCES), FactorsOrigin.FITTED
    held = read_tensors(path)
    if committed and held.root != committed:
        raise Rejected(
            Reason.DIGEST_MISMATCH, f"{path} has root {held.root.hex()}, the campaign commits to {committed.hex()}"
        )
    return factors_from(held.tensors, tuned), FactorsOrigin.COMMITTED if committed else FactorsOrigin.GIVEN


def _unchecked_model(architecture: str, adapter: Path | None, path: Path) -> nn.Module:
    """A model whose weights no log knows: those of a replay without a source."""
    return load_model(architecture, path, read_tensors(path).root, "replay", adapter)


def spread(pieces: Sequence[P], count: int) -> list[P]:
    """At most ``count`` of them, evenly over the whole: the head of a text may be all of one topic."""
    count = min(count, len(pieces))
    return [pieces[number * len(pieces) // count] for number in range(count)]


def fit_on_text(model: nn.Module, sequences: Sequence[Sequence[int]], count: int) -> dict[str, WeightFactors]:
    """Factors over ``count`` pieces of text, evenly over the whole."""
    chosen = spread(sequences, count)
    batches = [
        torch.tensor([list(sequence) for sequence in chosen[start : start + BATCH_SEQUENCES]])
        for start in range(0, len(chosen), BATCH_SEQUENCES)
    ]

    def fitted(done: int, of: int) -> None:
        if done % 8 == 0 or done == of:
            told(f"factors: {done} of {of} batches")

    return fit_factors(model, batches, progress=fitted)


def public_text() -> str:
    """The default text: the topics of Python's own manual."""
    from pydoc_data.topics import topics  # noqa: PLC0415 (half a megabyte that only this default needs)

    return "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()


def pieces_of(text: str, language: Language, size: int) -> list[tuple[int, ...]]:
    """A text's tokens in pieces of one length, in order; what is left over is dropped."""
    tokens = language.encode(text)
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


def _sequences(path: Path | None, language: Language, context_tokens: int) -> list[tuple[int, ...]]:
    """Pieces of public text, all of one length, in order."""
    if path is None:
        return pieces_of(public_text(), language, context_tokens)
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"{path}: expected a text file, found: {error.strerror}") from error
    pieces = pieces_of(text, language, context_tokens)
    if len(pieces) < CONTROLS:
        wanted = f"at least {CONTROLS * context_tokens} {language.unit}s"
        raise ConfigError(f"{path}: expected {wanted}, found {len(language.encode(text))}")
    return pieces
