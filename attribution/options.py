"""What commands of tracing share: where the log and the run's files are, and how they tell how far they are."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from consensus.identifiers import DIGEST_BYTES, ChainId
from consensus.rejection import Reason, Rejected

ACCUMULATORS = click.option(
    "--accumulators",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run's accumulator files.",
)
INDEX = click.option(
    "--index",
    "index_path",
    type=click.Path(path_type=Path),
    help="As countersign index build made: sketches are opened there instead of in the folder of accumulators.",
)
BUNDLE = click.option(
    "--bundle", "bundle_path", type=click.Path(path_type=Path), required=True, help="The bundle file."
)
GENESIS = click.option(
    "--genesis", "genesis_path", type=click.Path(path_type=Path), required=True, help="genesis.json."
)
CHAIN_ID = click.option("--chain-id", required=True, help="The pinned chain id, 64 hex digits: what you trust.")


def pinned_chain(text: str) -> ChainId:
    """The chain id that is trusted.

    Raises:
        Rejected: ``MALFORMED``.
    """
    found = digest_in(text)
    if found is None:
        raise Rejected(Reason.MALFORMED, f"chain id {text!a:.80}: expected {2 * DIGEST_BYTES} lower-case hex digits")
    return ChainId(found)


def digest_in(text: str) -> bytes | None:
    """32 bytes as lower-case hex digits; None for another text."""
    whole = len(text) == 2 * DIGEST_BYTES and not set(text) - set("0123456789abcdef")
    return bytes.fromhex(text) if whole else None


def told(stage: str) -> None:
    """A line on the terminal of whoever waits."""
    if sys.stderr.isatty():
        click.echo(stage, err=True)


def told_now_and_then(every_seconds: float = 1.0) -> Callable[[str], None]:
    """As ``told``, for work of many small parts: most lines are dropped."""
    last = 0.0

    def tell(stage: str) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            told(stage)

    return tell
