"""``countersign trace``, ``countersign footprint`` and ``countersign factors``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from attribution.asking import (
    FACTOR_SEQUENCES,
    Asked,
    answer_of_both,
    asked_campaign,
    fit_on_text,
    sketch_store,
    traceable_root,
)
from attribution.examples import OPEN_AT_MOST
from attribution.factors import factor_tensors
from attribution.footprint import chosen_sources, example_footprint, footprint
from attribution.footprint_report import footprint_json, footprint_text
from attribution.language import Language, language_of
from attribution.log import CampaignLog, check_released_base
from attribution.options import ACCUMULATORS, CUSTODIAN, INDEX, GivenBase, GivenLog, RunFiles, base_options, log_options
from attribution.page import page
from attribution.public_text import public_sequences
from attribution.questions import Question, read_questions
from attribution.report import trace_json, trace_text
from attribution.standings import standings, standings_fields, standings_text
from attribution.weights import find_windows, load_model, read_tensors
from consensus.predicates.accumulators import UsedSource
from consensus.rejection import ConfigError, Reason, Rejected

_MODEL = click.option(
    "--model",
    "architecture",
    metavar="MODULE:FUNCTION|FOLDER",
    required=True,
    help="A Python function that returns the model, untrained; it maps tokens [B, T] to logits [B, T, V]. Its module "
    "may lie in this folder. Or a folder with the config.json of a causal language model of transformers.",
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
    help="Pieces of public text to fit over, evenly over the whole; fewer are quicker, but all tokens together should "
    "be several times as many as the widest linear is wide.",
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
    _may_write(out)
    held = read_tensors(weights_path)
    model = load_model(architecture, weights_path, held.root, "model", adapter_path)
    language = language_of(architecture, tokenizer_path)
    sequences = public_sequences(text_path, language, context_tokens)
    tensors = factor_tensors(fit_on_text(model, sequences, sequence_count))
    try:
        save_file(tensors, out)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{out}: expected to write the factors, found: {error}") from error
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
@CUSTODIAN
@INDEX
@click.option(
    "--open-at-most",
    type=click.IntRange(min=0),
    default=OPEN_AT_MOST,
    show_default=True,
    help="Example-visits whose sketches one answer may open.",
)
@log_options
@base_options
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
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Tokens to complete, without --completion.",
)
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
    custodian: str | None,
    index_path: Path | None,
    open_at_most: int,
    given: GivenLog,
    given_base: GivenBase | None,
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
    if page_path is not None:
        _may_write(page_path)
    log = given.open()
    tuned_root = traceable_root(log.provenance)
    chosen = _chosen_by_now(log, names, owners, classes, revoked)
    log_before = None
    if given_base is not None:
        log_before = given_base.log.open()
        check_released_base(log, log_before)
        traceable_root(log_before.provenance)
    language = language_of(architecture, tokenizer_path)

    def model(path: Path, root: bytes, what: str) -> nn.Module:
        return load_model(architecture, path, root, what, adapter_path)

    base = model(base_path, log.provenance.campaign.base_root, "campaign's base model")
    tuned = model(tuned_path, tuned_root, "campaign's release")
    all_asked = _asked(questions, tuned, language, length, context_tokens, outputs_path)
    beside = {} if without_path is None else {"without": _unchecked_model(architecture, adapter_path, without_path)}
    sequences = public_sequences(text_path, language, context_tokens)
    before = None
    if given_base is not None and log_before is not None:
        root = log_before.provenance.campaign.base_root
        first = model(given_base.weights, root, "model that the base model was tuned from")
        before = asked_campaign(log_before, first, base, given_base.files, language, sequences)
    files = RunFiles(directory, index_path, factors_path, custodian)
    here = asked_campaign(log, base, tuned, files, language, sequences)
    answers = []
    for number, asked in enumerate(all_asked):
        if before is None:
            answer = here.answer(asked, open_at_most, beside)
        else:
            answer = answer_of_both(here, before, asked, open_at_most, beside)
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
        _write_page(page_path, page(log, answers, standing))
    if not all(campaign.is_whole for campaign in (here, before) if campaign is not None):
        click.get_current_context().exit(2)
    if chosen:
        answered = any(each.stands_out for each in standing)
    else:
        answered = outputs_path is not None or all(answer.is_shaped for answer in answers)
    click.get_current_context().exit(0 if answered else 1)


def _asked(
    questions: Sequence[Question], tuned: nn.Module, language: Language, length: int, context: int, path: Path | None
) -> list[Asked]:
    """All questions in tokens, before any is answered; one of a file that cannot be asked is named by its line."""
    asked = []
    for number, question in enumerate(questions, start=1):
        where = "" if path is None else f"{path}, line {number}: "
        try:
            asked.append(Asked(question, *question.output(tuned, language, length, context)))
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error
        except Rejected as error:
            raise Rejected(error.reason, f"{where}{error.detail}") from error
    return asked


def _chosen_by_now(
    log: CampaignLog, names: Sequence[str], owners: Sequence[str], classes: Sequence[str], revoked: bool
) -> tuple[UsedSource, ...]:
    """The sources that options choose; a log is old where it knows nothing yet of what was asked about."""
    try:
        return chosen_sources(log.provenance, names, owners, classes, revoked)
    except Rejected as error:
        as_of = log.verdict.as_of
        when = f"this log is of ledger block {as_of.height} ({as_of.log_size} entries)"
        raise Rejected(error.reason, f"{error.detail}: {when}") from error


def _may_write(path: Path) -> None:
    """Before the work: a file that cannot be written is no end for it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: expected a file to write, in a folder that is there")


def _write_page(path: Path, content: str) -> None:
    try:
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: expected to write the page, found: {error.strerror}") from error


@click.command("footprint")
@_chosen
@click.option("--example", metavar="SOURCE:INDEX", help="Instead of sources: one example of a source, by its sketches.")
@ACCUMULATORS
@CUSTODIAN
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
    custodian: str | None,
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
    chosen = _chosen_by_now(log, names, owners, classes, revoked)
    if not log.provenance.windows:
        raise Rejected(Reason.NOT_FOUND, "the job recorded no accumulators: what its sources moved is not on the log")
    folder = RunFiles(directory, custodian=custodian).fetch(log)
    search = find_windows(folder, log.bundle.campaign, log.provenance.windows)
    if example is None:
        found = footprint(log.provenance, search.found, chosen)
    else:
        if len(chosen) != 1:
            raise Rejected(Reason.BAD_FIELD, f"{len(chosen)} sources are called {names[0]!a:.80}: give the event id")
        found = example_footprint(log.provenance, search.found, chosen[0], number, sketch_store(log, index_path))
    click.echo((footprint_json if as_json else footprint_text)(log, found, search))
    if search.missing or log.provenance.uncovered or (found.of_example and found.of_example.left_out):
        click.get_current_context().exit(2)
    click.get_current_context().exit(0 if found.admitted else 1)


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


def _unchecked_model(architecture: str, adapter: Path | None, path: Path) -> nn.Module:
    """A model whose weights no log knows: those of a replay without a source."""
    return load_model(architecture, path, read_tensors(path).root, "replay", adapter)
