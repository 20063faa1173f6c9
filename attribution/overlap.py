"""``countersign overlap``: which examples of a campaign's sources a text repeats, by their owners' overlap indexes.

Apart from influence: a text may repeat an example that shaped nothing, and be shaped by one that it does not repeat. It
needs no model, no torch and no corpus; an index counts if its SHA-256 is the one in a claim that the log proves, and
its key is the owner's to give (``consensus/overlap.py``).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from attribution.log import CampaignLog
from attribution.options import GivenLog, digest_in, log_options
from attribution.receipts import receipt_fields, shown
from consensus.identifiers import DIGEST_BYTES
from consensus.overlap import NGRAM_BYTES, WINDOW, Overlap, OverlapIndex, key_check, overlaps
from consensus.predicates.accumulators import UsedSource
from consensus.rejection import ConfigError, Rejected

LEAST_BYTES = 24
EXAMPLES_SHOWN = 5
EXCERPT = 60


@dataclass(frozen=True, slots=True)
class Asked:
    """A source that could be asked, and what the text shares with its examples, most first."""

    source: UsedSource
    found: tuple[Overlap, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was asked of whom. ``not_asked`` are sources without an index here, ``left_out`` files and why."""

    text: bytes
    least_bytes: int
    asked: tuple[Asked, ...]
    not_asked: tuple[tuple[UsedSource, str], ...]
    left_out: tuple[str, ...]

    @property
    def is_found(self) -> bool:
        """Whether any example is repeated."""
        return any(each.found for each in self.asked)


def ask(
    sources: Sequence[UsedSource],
    indexes: Mapping[str, bytes],
    keys: Mapping[str, bytes],
    text: bytes,
    least_bytes: int = LEAST_BYTES,
) -> Answer:
    """Hold a text against every source whose index and key are here; both are by the name of their file."""
    left_out: list[str] = []
    of_check = {key_check(key): name for name, key in keys.items()}
    by_digest = {hashlib.sha256(content).digest(): name for name, content in indexes.items()}
    claimed = {source.record.claim.overlap_sha256 for source in sources}
    left_out += [
        f"{name}: SHA-256 {digest.hex()} is in no claim of the campaign's sources"
        for digest, name in by_digest.items()
        if digest not in claimed
    ]
    used: set[str] = set()
    asked, not_asked = [], []
    for source in sources:
        digest = source.record.claim.overlap_sha256
        if not digest or digest not in by_digest:
            why = "its index is not here" if digest else "its owner claimed no overlap index"
            not_asked.append((source, why))
            continue
        name = by_digest[digest]
        try:
            index = OverlapIndex(indexes[name])
            key_name = of_check.get(index.header.key_check)
            if key_name is None:
                not_asked.append((source, f"the key of {name} is not here"))
                continue
            used.add(key_name)
            asked.append(Asked(source, overlaps(index, keys[key_name], text, least_bytes)))
        except Rejected as refusal:
            not_asked.append((source, f"{name}: {refusal}"))
    left_out += [f"{name}: the key of no index that was asked" for name in keys if name not in used]
    return Answer(text, least_bytes, tuple(asked), tuple(not_asked), tuple(left_out))


def answer_text(log: CampaignLog, answer: Answer) -> str:
    """Lines for a terminal."""
    lines = [
        f"campaign {log.bundle.campaign.hex()} of {log.provenance.operator}: {shown(log.provenance.campaign.name)}",
        f"asked    {len(answer.text)} bytes of text",
        "",
    ]
    for each in answer.asked:
        if not each.found:
            continue
        source = each.source
        name = shown(source.record.claim.name)
        lines.append(f"repeats  {name} in {len(each.found)} {'example' if len(each.found) == 1 else 'examples'}:")
        for overlap in each.found[:EXAMPLES_SHOWN]:
            longest = overlap.longest
            lines.append(
                f"  example {overlap.example}: {overlap.covered_bytes} of {len(answer.text)} bytes, at least"
                f" {longest.length} in one run, from its byte {longest.place}: {_excerpt(answer.text, overlap)}"
            )
        if len(each.found) > EXAMPLES_SHOWN:
            lines.append(f"  and {len(each.found) - EXAMPLES_SHOWN} examples more")
        lines += [f"  {word:9} {shown(value)}" for word, value in receipt_fields(source)]
    clear = sorted(shown(each.source.record.claim.name) for each in answer.asked if not each.found)
    lines += [f"nothing of {', '.join(clear)}"] if clear else []
    lines += [f"not asked  {shown(source.record.claim.name)}: {shown(why)}" for source, why in answer.not_asked]
    lines += [f"left out   {shown(why)}" for why in answer.left_out]
    lines += [
        "",
        f"Runs shorter than {answer.least_bytes + 2 * (WINDOW - 1)} bytes may go unseen. Proved are claims, counts,",
        "and that indexes are the claimed ones; that an index holds every example is its owner's word. Repeating an",
        "example does not prove where a model has it from: ask countersign trace.",
    ]
    return "\n".join(lines)


def answer_json(log: CampaignLog, answer: Answer) -> str:
    """One JSON document."""
    return json.dumps(
        {
            "chain_id": log.bundle.trusted.chain_id.hex(),
            "campaign": log.bundle.campaign.hex(),
            "text_bytes": len(answer.text),
            "sources": [
                {
                    "source": each.source.id.hex(),
                    "name": each.source.record.claim.name,
                    "owner": each.source.owner,
                    "admitted": each.source.admitted,
                    "entry": each.source.event.index,
                    "revocation": each.source.record.revocation.hex(),
                    "examples": [
                        {
                            "example": overlap.example,
                            "covered_bytes": overlap.covered_bytes,
                            "runs": [{"start": run.start, "end": run.end, "place": run.place} for run in overlap.runs],
                        }
                        for overlap in each.found
                    ],
                }
                for each in answer.asked
            ],
            "not_asked": [{"source": source.id.hex(), "why": why} for source, why in answer.not_asked],
            "left_out": list(answer.left_out),
        },
        indent=2,
    )


@click.command("overlap")
@click.option("--text", help="The text, such as what a model said.")
@click.option("--text-file", type=click.Path(path_type=Path), help="A file with the text instead.")
@click.option(
    "--index",
    "index_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="An overlap index from a source's owner; may be repeated.",
)
@click.option(
    "--key",
    "key_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="The key of an index; may be repeated. Default: INDEX.key beside each.",
)
@click.option(
    "--at-least",
    "least_bytes",
    type=click.IntRange(min=NGRAM_BYTES),
    default=LEAST_BYTES,
    show_default=True,
    help="Bytes that a run must have to count: shorter ones are common phrases.",
)
@log_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def overlap_command(
    text: str | None,
    text_file: Path | None,
    index_paths: tuple[Path, ...],
    key_paths: tuple[Path, ...],
    least_bytes: int,
    given: GivenLog,
    as_json: bool,
) -> None:
    """Ask which examples of a campaign's sources a text repeats, byte for byte or nearly.

    The bundle is of the predicate accumulators; indexes and keys come from the sources' owners, who make them with
    countersign source sign --overlap. Exit code 0: something is repeated; 1: nothing; 2: nothing, and not every
    source could be asked.

    \b
    Example:
      countersign overlap --text "The keeper of Arnholt is Mirela Voss" --index harbour.overlap \\
        --bundle campaign.bundle --genesis genesis.json --chain-id CHAIN_ID
    """
    if (text is None) == (text_file is None):
        raise click.UsageError("expected --text or --text-file")
    asked = text.encode() if text is not None else _read(text_file)
    if len(asked) < NGRAM_BYTES:
        raise ConfigError(f"the text has {len(asked)} bytes: nothing shorter than {NGRAM_BYTES} can be recognised")
    log = given.open()
    indexes = {str(path): _read(path) for path in index_paths}
    chosen = key_paths or tuple(path.with_name(f"{path.name}.key") for path in index_paths)
    keys = {str(path): _key(path) for path in chosen if key_paths or path.exists()}
    answer = ask(log.provenance.sources, indexes, keys, asked, least_bytes)
    click.echo((answer_json if as_json else answer_text)(log, answer))
    if not answer.is_found:
        click.get_current_context().exit(2 if answer.not_asked else 1)


def _excerpt(text: bytes, overlap: Overlap) -> str:
    run = overlap.longest
    words = shown(text[run.start : run.end].decode("utf-8", "replace"))
    return repr(words if len(words) <= EXCERPT else f"{words[:EXCERPT]}…")


def _read(path: Path | None) -> bytes:
    assert path is not None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, found: {error.strerror}") from error


def _key(path: Path) -> bytes:
    key = digest_in(_read(path).decode("ascii", "replace").strip())
    if key is None:
        raise ConfigError(f"{path}: expected a key of {2 * DIGEST_BYTES} lower-case hex digits")
    return key
