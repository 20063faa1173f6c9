"""``countersign source``: what a data-source authority claims about its data, and takes back."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import click
import msgspec
from msgspec import Meta

from consensus.codec import encode
from consensus.event import CheckedEvent, Kind, make_entry
from consensus.identifiers import Role
from consensus.overlap import OverlapBuilder, overlap_key
from consensus.portions import DataItem, DataPortion, Portions, SourceClaim, SourceRevocation, Wire
from consensus.rejection import ConfigError
from consensus.reserve import LOT_BITS, bound_of, reserve_count
from node.client import SourceRow
from node.clock import SystemClock
from node.commands.connection import connect, node_options
from node.commands.content import (
    Splitter,
    json_field,
    lines,
    measure,
    pieces_of,
    read_examples,
    source_salt,
    whole_files,
)
from node.commands.fields import digest_argument
from node.commands.member import LocalMember, load_member, signed_by
from node.commands.output import print_json, print_table, utc
from node.commands.submission import deliver
from node.commands.tables import dataset_column, parquet_column
from node.files import check_output, keep_private, read_toml

DAY_MS = 86_400_000
BACKDATED_MS = 60_000
"""A claim is valid from a minute ago: a ledger block's clock may be a little behind its owner's."""

MAX_VALID_DAYS = 36_525
"""A century."""

NOTED_BYTES = 16 << 20
"""Between lines that say how far an overlap index is."""

LEAST_RESERVE = 32
RESERVE_PERCENT = 2
"""What ``--reserve auto`` keeps back: so many examples, or this share of them if that is more."""

COUNTED_EXAMPLES = 1_000_000
"""So many lots the list draws in all, in 0.4 s, of small sources first: anybody may claim many large ones. Of the
others it says what their bounds come to on average."""

REQUIRED = ("name", "licence", "rights_basis", "purposes", "content_class")


class ClaimFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``claim.toml``; every key can also be given, or overridden, by an option."""

    name: str | None = None
    licence: str | None = None
    rights_basis: str | None = None
    purposes: tuple[str, ...] = ()
    content_class: str | None = msgspec.field(name="class", default=None)
    valid_days: Annotated[int, Meta(ge=1, le=MAX_VALID_DAYS)] | None = None
    statement: str = ""
    reserve: int | str = 0


@click.group()
def source() -> None:
    """Claim, list and revoke data sources."""


@source.command("sign")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The member's configuration file."
)
@click.option("--claim", "claim_path", type=click.Path(path_type=Path), help="claim.toml with any of the keys below.")
@click.option("--name", help="Name of the source.")
@click.option(
    "--content",
    "paths",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="File or directory with the examples; may be repeated. They are read here and never leave.",
)
@click.option("--example-bytes", type=click.IntRange(min=1), help="Every so many bytes of a file are one example.")
@click.option("--lines", "by_line", is_flag=True, help="Every non-empty line is one example.")
@click.option("--jsonl", "field", metavar="FIELD", help="Every line is a JSON object; its text FIELD is the example.")
@click.option("--parquet", "parquet", metavar="COLUMN", help="Every row of a Parquet file; its COLUMN is the example.")
@click.option(
    "--dataset", "dataset", metavar="COLUMN", help="--content is a folder that Hugging Face datasets saved; by COLUMN."
)
@click.option("--licence", help="SPDX identifier, as CC-BY-4.0.")
@click.option("--rights-basis", help="On what the right to license rests, as licence, ownership, consent.")
@click.option("--purpose", "purposes", multiple=True, help="A purpose it may be used for; may be repeated.")
@click.option("--class", "content_class", help="Content class, which the policy gives a depth.")
@click.option(
    "--valid-days",
    type=click.IntRange(min=1, max=MAX_VALID_DAYS),
    help="How long the claim stands. Default: 365.",
)
@click.option("--statement", help="Free text for people.")
@click.option(
    "--salt-file",
    type=click.Path(path_type=Path),
    help="Secret for later proofs about single examples, 0600; made if missing. Default: NAME.salt.",
)
@click.option(
    "--overlap",
    "overlap_path",
    type=click.Path(path_type=Path),
    help="Also write an overlap index, by which outputs that repeat an example are recognised later, and its key to "
    "FILE.key; the claim names its digest. About 2.5 times the examples' size; some seconds a megabyte.",
)
@click.option(
    "--reserve",
    metavar="N|auto",
    help="So many examples are never trained on: memorization of the others is measured against them. Lots drawn from "
    "their root say which. auto: 2 percent, at least 32. At most half. Default: none.",
)
@click.option("--submit", is_flag=True, help="Hand it to the node of --config and wait until it is final.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed event to this new file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def source_sign(
    config_path: Path,
    claim_path: Path | None,
    name: str | None,
    paths: tuple[Path, ...],
    example_bytes: int | None,
    by_line: bool,
    field: str | None,
    parquet: str | None,
    dataset: str | None,
    licence: str | None,
    rights_basis: str | None,
    purposes: tuple[str, ...],
    content_class: str | None,
    valid_days: int | None,
    statement: str | None,
    salt_file: Path | None,
    overlap_path: Path | None,
    reserve: str | None,
    submit: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Sign a claim about a data source.

    The claim names the examples by a salted root; the examples themselves never leave this machine. Without
    --lines, --jsonl, --parquet, --dataset or --example-bytes every file is one example. Keep the salt file: only
    with it can you later prove that an example is among those claimed.

    \b
    Example:
      countersign source sign --config library/node.toml --name sonnets --content sonnets/ \\
        --lines --licence CC-BY-4.0 --rights-basis licence --purpose research --class open --submit
    """
    if not submit and out is None:
        raise click.UsageError("give --submit, --out FILE or both")
    if out is not None:
        check_output(out)
    split = _splitter(example_bytes, by_line, field, parquet, dataset)
    file = _read_claim(claim_path)
    claimed = ClaimFile(
        name=name or file.name,
        licence=licence or file.licence,
        rights_basis=rights_basis or file.rights_basis,
        purposes=purposes or file.purposes,
        content_class=content_class or file.content_class,
        valid_days=valid_days or file.valid_days or 365,
        statement=statement or file.statement,
        reserve=reserve or file.reserve,
    )
    missing = [key for key in REQUIRED if not getattr(claimed, key)]
    if missing:
        wanted = ", ".join("class" if key == "content_class" else key.replace("_", "-") for key in missing)
        raise ConfigError(f"a claim needs {wanted}: give them as options or in --claim FILE")
    own = load_member(config_path)
    own.require(Role.DATA_SOURCE, "a source claim")
    salt_path = salt_file or Path(f"{claimed.name}.salt".replace(os.sep, "-"))
    salt = source_salt(salt_path)
    overlap = None if overlap_path is None else OverlapBuilder(overlap_key(salt))
    examples = dataset_column(paths, dataset) if dataset is not None else read_examples(paths, split)
    content = measure(examples if overlap is None else _told(examples, overlap.add), salt)
    index = b"" if overlap is None else overlap.finish()
    reserved_count = _reserve_of(claimed.reserve, content.example_count)
    now_ms = SystemClock().now_ms()
    assert claimed.name is not None
    assert claimed.licence is not None
    assert claimed.rights_basis is not None
    assert claimed.content_class is not None
    assert claimed.valid_days is not None
    claim = SourceClaim(
        name=claimed.name,
        content_root=content.root,
        example_count=content.example_count,
        size_bytes=content.size_bytes,
        licence=claimed.licence,
        rights_basis=claimed.rights_basis,
        purposes=claimed.purposes,
        content_class=claimed.content_class,
        valid_from_ms=now_ms - BACKDATED_MS,
        valid_until_ms=now_ms + claimed.valid_days * DAY_MS,
        statement=claimed.statement,
        overlap_sha256=hashlib.sha256(index).digest() if index else b"",
        reserve_below=bound_of(content.root, content.example_count, reserved_count),
    )
    if not as_json:
        click.echo(f"{content.example_count} examples, {content.size_bytes} bytes, root {content.root.hex()}")
        click.echo(f"salt in {salt_path}: keep it secret and keep it safe")
        if reserved_count:
            click.echo(f"{reserved_count} of the examples are the reserve, which no step may train on")
    event, encoded = _signed_item(own, Kind.SOURCE, claim)
    if overlap_path is not None:
        keep_private(overlap_path, index)
        keep_private(key_path(overlap_path), overlap_key(salt).hex().encode() + b"\n")
        if not as_json:
            click.echo(f"overlap index in {overlap_path}, its key in {key_path(overlap_path)}: for whom you let ask")
    deliver(event, encoded, submit_with=config_path if submit else None, out=out, as_json=as_json)


@source.command("revoke")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), required=True, help="The member's configuration file."
)
@click.argument("source_id", callback=digest_argument)
@click.option("--reason", required=True, help="Why, for the log.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the signed event to this new file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def source_revoke(config_path: Path, source_id: bytes, reason: str, out: Path | None, as_json: bool) -> None:
    """Take a source back. Only its author can, and only once.

    What that does to open grants is the policy's to say: they run out, or end at once.

    \b
    Example:
      countersign source revoke --config library/node.toml SOURCE_ID --reason "consent withdrawn"
    """
    if not reason.strip():
        raise click.UsageError("give --reason TEXT: the log keeps why a source was taken back")
    own = load_member(config_path)
    own.require(Role.DATA_SOURCE, "a revocation")
    event, encoded = _signed_item(own, Kind.REVOCATION, SourceRevocation(source=source_id, reason=reason))
    deliver(event, encoded, submit_with=config_path if out is None else None, out=out, as_json=as_json)


@source.command("list")
@node_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def source_list(config_path: Path | None, url: str | None, token_file: Path | None, as_json: bool) -> None:
    """List the registered sources.

    The reserve is counted, lot by lot, for a million examples in all, of small sources first; of the others it is
    reckoned from its bound.

    \b
    Example:
      countersign source list --config library/node.toml
    """
    with connect(config_path, url, token_file) as client:
        sources = client.sources().sources
    reserves = _listed_reserves(sources)
    if as_json:
        print_json(
            [
                {**msgspec.to_builtins(row), "reserve": reserve, "reserve_counted": counted}
                for row, (reserve, counted) in zip(sources, reserves, strict=True)
            ]
        )
        return
    print_table(
        ("source", "name", "by", "licence", "purposes", "class", "examples", "reserve", "revoked"),
        [
            (
                row.id,
                row.name,
                row.author_name,
                row.licence,
                ",".join(row.purposes),
                row.content_class,
                str(row.example_count),
                _reserve_text(*reserve),
                utc(row.revoked_at_ms) if row.revoked_at_ms else "no",
            )
            for row, reserve in zip(sources, reserves, strict=True)
        ],
    )


def _listed_reserves(rows: Sequence[SourceRow]) -> list[tuple[int, bool]]:
    """How many examples of each source are in reserve, and whether that was counted."""
    found = [(row.example_count * row.reserve_below >> LOT_BITS, not row.reserve_below) for row in rows]
    left = COUNTED_EXAMPLES
    for number, row in sorted(enumerate(rows), key=lambda numbered: numbered[1].example_count):
        if row.reserve_below and row.example_count <= left:
            left -= row.example_count
            found[number] = reserve_count(bytes.fromhex(row.content_root), row.example_count, row.reserve_below), True
    return found


def _reserve_text(reserve: int, counted: bool) -> str:
    if not counted:
        return f"about {reserve}"
    return str(reserve) if reserve else "none"


def _signed_item(own: LocalMember, kind: Kind, item: Wire) -> tuple[CheckedEvent, bytes]:
    portions = Portions(
        data=DataPortion(salt=os.urandom(32), items=(DataItem(encode(item)),)), governance=None, operation=None
    )
    return signed_by(own, make_entry(own.committee.chain_id, kind, own.member.id, portions), portions)


def key_path(overlap_path: Path) -> Path:
    """Where the key of an overlap index is kept."""
    return overlap_path.with_name(f"{overlap_path.name}.key")


def _reserve_of(asked: int | str, example_count: int) -> int:
    """How many examples are kept in reserve.

    Raises:
        ConfigError: no number, or more than half of the source.
    """
    if asked == "auto":
        reserve = max(LEAST_RESERVE, -(-example_count * RESERVE_PERCENT // 100))
    elif str(asked).isascii() and str(asked).isdigit():
        reserve = int(asked)
    else:
        raise ConfigError(f"reserve: expected a number of examples or auto, found {asked!r}")
    if 2 * reserve > example_count:
        raise ConfigError(f"reserve: expected at most half of {example_count} examples, found {reserve}")
    return reserve


def _told(examples: Iterable[bytes], tell: Callable[[bytes], None]) -> Iterator[bytes]:
    """The examples, each told on the way."""
    done_bytes, noted_bytes = 0, NOTED_BYTES
    for example in examples:
        tell(example)
        yield example
        done_bytes += len(example)
        if done_bytes >= noted_bytes:
            click.echo(f"overlap index: {done_bytes >> 20} MiB of examples done", err=True)
            noted_bytes = done_bytes + NOTED_BYTES


def _splitter(
    example_bytes: int | None, by_line: bool, field: str | None, parquet: str | None, dataset: str | None
) -> Splitter:
    if sum((by_line, *(option is not None for option in (example_bytes, field, parquet, dataset)))) > 1:
        raise click.UsageError("give at most one of --example-bytes, --lines, --jsonl, --parquet and --dataset")
    if parquet is not None:
        return parquet_column(parquet)
    if example_bytes is not None:
        return pieces_of(example_bytes)
    if field is not None:
        return json_field(field)
    return lines if by_line else whole_files


def _read_claim(path: Path | None) -> ClaimFile:
    if path is None:
        return ClaimFile()
    try:
        return msgspec.convert(read_toml(path, "a claim"), ClaimFile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: expected a claim in TOML, found: {error}") from error
