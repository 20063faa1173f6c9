"""What commands of tracing share: where the log and the run's files are, and how they tell how far they are."""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from attribution.log import CampaignLog, Ledgers, open_ledger, open_log
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
_LOG_OPTIONS = (
    click.option("--bundle", type=click.Path(path_type=Path), help="The bundle file."),
    click.option(
        "--ledger",
        metavar="URL|DIRECTORY",
        help="Instead of --bundle: a node's HTTP address (its token in COUNTERSIGN_TOKEN), or the data directory of a "
        "stopped node. What comes from there is checked as a bundle is.",
    ),
    click.option(
        "--campaign", metavar="ID", help="With --ledger: the campaign to ask about. Default: the only one on that log."
    ),
    click.option("--genesis", type=click.Path(path_type=Path), required=True, help="genesis.json."),
    click.option("--chain-id", required=True, help="The pinned chain id, 64 hex digits: what you trust."),
)


@dataclass(frozen=True, slots=True)
class GivenLog:
    """Where the log of a command is, as its options say."""

    bundle: Path | None
    ledger: str | None
    campaign: str | None
    genesis: Path
    chain_id: str

    def open(self) -> CampaignLog:
        """What the log proves about the campaign.

        Raises:
            Rejected: ``MALFORMED`` for a chain id or campaign that is none; as ``open_log`` and ``open_ledger``.
            ConfigError, Unavailable: as ``open_ledger``.
        """
        chain_id = pinned_chain(self.chain_id)
        if self.bundle is not None:
            return open_log(self.bundle, self.genesis, chain_id)
        assert self.ledger is not None
        campaign = b"" if self.campaign is None else digest_in(self.campaign)
        if campaign is None:
            raise Rejected(Reason.MALFORMED, f"campaign {self.campaign!a:.80}: expected 64 lower-case hex digits")
        ledgers: Ledgers = click.get_current_context().obj
        return open_ledger(ledgers, self.ledger, campaign, self.genesis, chain_id)


def log_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--bundle`` or ``--ledger``, and what is trusted, for a command that gets them as ``given``."""

    @functools.wraps(command)
    def with_log(
        *args: object,
        bundle: Path | None,
        ledger: str | None,
        campaign: str | None,
        genesis: Path,
        chain_id: str,
        **options: object,
    ) -> None:
        if (bundle is None) == (ledger is None):
            raise click.UsageError("expected either --bundle or --ledger")
        if bundle is not None and campaign is not None:
            raise click.UsageError("--campaign goes with --ledger: a bundle is of one campaign")
        command(*args, given=GivenLog(bundle, ledger, campaign, genesis, chain_id), **options)

    for option in reversed(_LOG_OPTIONS):
        with_log = option(with_log)
    return with_log


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
