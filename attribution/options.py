"""What commands of tracing share: where the log and the run's files are, and how they tell how far they are."""

import functools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from attribution.log import CampaignLog, Outside, open_ledger, open_log
from consensus.identifiers import DIGEST_BYTES, ChainId
from consensus.rejection import ConfigError

TOKEN, CUSTODIAN_TOKEN = "COUNTERSIGN_TOKEN", "COUNTERSIGN_CUSTODIAN_TOKEN"
BASE_TOKEN, BASE_CUSTODIAN_TOKEN = "COUNTERSIGN_BASE_TOKEN", "COUNTERSIGN_BASE_CUSTODIAN_TOKEN"
"""Environment variables, each with one node's token: no node is told another's."""
ACCUMULATORS = click.option(
    "--accumulators",
    "directory",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run's accumulator files.",
)
CUSTODIAN = click.option(
    "--custodian",
    metavar="URL",
    help="A custodian's HTTP address (its token in COUNTERSIGN_CUSTODIAN_TOKEN): what the folder of accumulators lacks "
    "is fetched from there first, and held to the log.",
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
class RunFiles:
    """Where a campaign's files are: the folder of its windows, and, where they are given, its index and factors.

    ``custodian``: the HTTP address of a node that has what the folder lacks.
    """

    accumulators: Path
    index: Path | None = None
    factors: Path | None = None
    custodian: str | None = None
    token_variable: str = CUSTODIAN_TOKEN

    def fetch(self, log: CampaignLog) -> Path:
        """The folder, with what the custodian keeps of the campaign's windows, where one is given.

        Raises:
            Rejected: ``DIGEST_MISMATCH`` for other files than the log commits to; ``NOT_FOUND``.
            Unavailable: the custodian does not answer.
        """
        if self.custodian is not None:
            token, campaign = os.environ.get(self.token_variable), log.bundle.campaign
            _outside().fetch_windows(self.custodian, token, campaign, log.provenance.windows, self.accumulators)
        return self.accumulators


@dataclass(frozen=True, slots=True)
class GivenLog:
    """Where the log of a command is, as its options say."""

    bundle: Path | None
    ledger: str | None
    campaign: str | None
    genesis: Path
    chain_id: str
    token_variable: str = TOKEN

    def open(self) -> CampaignLog:
        """What the log proves about the campaign.

        Raises:
            ConfigError: for a chain id or campaign that is none; as ``open_ledger``.
            Rejected: as ``open_log`` and ``open_ledger``.
            Unavailable: as ``open_ledger``.
        """
        chain_id = pinned_chain(self.chain_id)
        if self.bundle is not None:
            return open_log(self.bundle, self.genesis, chain_id)
        assert self.ledger is not None
        campaign = b"" if self.campaign is None else digest_in(self.campaign)
        if campaign is None:
            raise ConfigError(f"campaign {self.campaign!a:.80}: expected {2 * DIGEST_BYTES} lower-case hex digits")
        token = os.environ.get(self.token_variable)
        return open_ledger(_outside(), self.ledger, token, campaign, self.genesis, chain_id)


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


_BASE_OPTIONS = (
    click.option(
        "--base-ledger",
        metavar="URL|DIRECTORY",
        help="Follow the answer into the log of the campaign that released the base model: a node's HTTP address (its "
        "token in COUNTERSIGN_BASE_TOKEN), or the data directory of a stopped node.",
    ),
    click.option("--base-bundle", type=click.Path(path_type=Path), help="Instead of --base-ledger: a bundle file."),
    click.option(
        "--base-campaign", metavar="ID", help="With --base-ledger: that campaign. Default: the only one on that log."
    ),
    click.option(
        "--base-genesis", type=click.Path(path_type=Path), help="genesis.json of that log. Default: this log's."
    ),
    click.option("--base-chain-id", help="The pinned chain id of that log. Default: this log's."),
    click.option("--base-of-base", type=click.Path(path_type=Path), help="The weights that the base was tuned from."),
    click.option(
        "--base-accumulators", type=click.Path(path_type=Path), help="Folder of that run's accumulator files."
    ),
    click.option(
        "--base-custodian",
        metavar="URL",
        help="As --custodian, of that run; its token in COUNTERSIGN_BASE_CUSTODIAN_TOKEN.",
    ),
    click.option("--base-index", type=click.Path(path_type=Path), help="As --index, of that run."),
    click.option("--base-factors", type=click.Path(path_type=Path), help="As --factors, of the base model's weights."),
)


@dataclass(frozen=True, slots=True)
class GivenBase:
    """Where the campaign that released the base model is to be asked: its log, its own base model, its run's files."""

    log: GivenLog
    weights: Path
    files: RunFiles


def base_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--base-ledger`` and what goes with it, for a command that gets them as ``given_base``, None without.

    Stands below ``log_options``, whose genesis and chain they fall back on.
    """

    @functools.wraps(command)
    def with_base(
        *args: object,
        given: GivenLog,
        base_ledger: str | None,
        base_bundle: Path | None,
        base_campaign: str | None,
        base_genesis: Path | None,
        base_chain_id: str | None,
        base_of_base: Path | None,
        base_accumulators: Path | None,
        base_custodian: str | None,
        base_index: Path | None,
        base_factors: Path | None,
        **options: object,
    ) -> None:
        files = (base_accumulators, base_custodian, base_index, base_factors)
        others = (base_campaign, base_genesis, base_chain_id, base_of_base, *files)
        given_base = None
        if base_ledger is None and base_bundle is None:
            if any(other is not None for other in others):
                raise click.UsageError("what begins with --base- goes with --base-ledger or --base-bundle")
        else:
            if base_ledger is not None and base_bundle is not None:
                raise click.UsageError("expected either --base-bundle or --base-ledger")
            if base_bundle is not None and base_campaign is not None:
                raise click.UsageError("--base-campaign goes with --base-ledger: a bundle is of one campaign")
            if base_of_base is None or base_accumulators is None:
                raise click.UsageError("the base model's log is asked with --base-of-base and --base-accumulators")
            log = GivenLog(
                base_bundle,
                base_ledger,
                base_campaign,
                given.genesis if base_genesis is None else base_genesis,
                given.chain_id if base_chain_id is None else base_chain_id,
                BASE_TOKEN,
            )
            of_run = RunFiles(base_accumulators, base_index, base_factors, base_custodian, BASE_CUSTODIAN_TOKEN)
            given_base = GivenBase(log, base_of_base, of_run)
        command(*args, given=given, given_base=given_base, **options)

    for option in reversed(_BASE_OPTIONS):
        with_base = option(with_base)
    return with_base


def _outside() -> Outside:
    """What the command was started with."""
    outside: Outside = click.get_current_context().obj
    return outside


def pinned_chain(text: str) -> ChainId:
    """The chain id that is trusted.

    Raises:
        ConfigError: it is none.
    """
    found = digest_in(text)
    if found is None:
        raise ConfigError(f"chain id {text!a:.80}: expected {2 * DIGEST_BYTES} lower-case hex digits")
    return ChainId(found)


def digest_in(text: str) -> bytes | None:
    """32 bytes as lower-case hex digits; None for another text."""
    whole = len(text) == 2 * DIGEST_BYTES and not set(text) - set("0123456789abcdef")
    return bytes.fromhex(text) if whole else None


def told(stage: str) -> None:
    """A line on the terminal of whoever waits."""
    if sys.stderr is not None and sys.stderr.isatty():
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
