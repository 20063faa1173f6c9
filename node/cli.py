"""``countersign``: the root of the command line.

Commands are loaded only when asked for, so that ``countersign verify`` runs where neither libp2p nor RocksDB
nor an HTTP client is installed. A command whose libraries are missing says which extra brings them.

Exit codes: 0 yes or done, 1 no or refused, 2 not known (a node that does not answer, a usage or configuration
error, an event not final yet, a missing extra), 130 interrupted, 141 nobody reads the output any more. Errors are one
line on standard error, ``error: REASON: detail``, never a traceback.

What each command does is in ``commands/``; ``every_command`` lists them all for the tests that hold help and
documentation complete.
"""

import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import click

from consensus.membership import Genesis
from consensus.predicates import Predicate
from consensus.predicates.accumulators import Window
from consensus.rejection import ConfigError, CountersignError, InvariantBroken, Rejected, Unavailable
from node.commands.output import printable

EXIT_REFUSED = 1
EXIT_UNKNOWN = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""As a shell tells of who was ended by SIGINT and SIGPIPE: neither is an answer."""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Where a command is, and its line in the overview."""

    module: str
    attribute: str
    summary: str


COMMANDS: Mapping[str, LazyCommand] = {
    "demo": LazyCommand("node.demo.command", "demo_command", "Run a whole consortium and one governed fine-tune."),
    "ceremony": LazyCommand("node.commands.ceremony", "ceremony", "Make a network's keys together, over files."),
    "network": LazyCommand("node.commands.network", "network", "Make the files of a network for a trial."),
    "membership": LazyCommand("node.commands.membership", "membership", "Change who takes part."),
    "node": LazyCommand("node.commands.process", "node", "Run a node, or ask one how it is."),
    "policy": LazyCommand("node.commands.policy", "policy", "Sign and read the policy in force."),
    "source": LazyCommand("node.commands.source", "source", "Claim, list and revoke data sources."),
    "job": LazyCommand("node.commands.job", "job", "Let a training job write a campaign."),
    "campaign": LazyCommand("node.commands.campaign", "campaign", "Check what a campaign recorded."),
    "decision": LazyCommand("node.commands.decision", "decision", "Record decisions, with their reasons."),
    "audit": LazyCommand("node.commands.audit", "audit", "Record what replays found."),
    "custody": LazyCommand(
        "node.commands.custody", "custody", "Keep a campaign's sums and sketches with others than its operator."
    ),
    "grant": LazyCommand("node.commands.grant", "grant", "See and countersign grants."),
    "log": LazyCommand("node.commands.log", "log", "Read, prove and check the log."),
    "witness": LazyCommand("node.commands.witness", "witness", "Vouch for one history of a log."),
    "trace": LazyCommand("attribution.commands", "trace_command", "Ask which admitted sources shaped an output."),
    "overlap": LazyCommand("attribution.overlap", "overlap_command", "Ask which admitted examples a text repeats."),
    "index": LazyCommand(
        "attribution.index_commands", "index", "Keep a campaign's sketches where traces find them fast."
    ),
    "replay": LazyCommand("trainer_client.replay_command", "replay_command", "Run a campaign again, step by step."),
    "footprint": LazyCommand("attribution.commands", "footprint_command", "Ask what sources moved in a model."),
    "factors": LazyCommand("attribution.commands", "factors_command", "Fit what traces of a base model need, once."),
    "verify": LazyCommand("node.verify", "verify_command", "Check a bundle offline, trusting nobody in it."),
}

_OURS = ("attribution", "consensus", "node", "trainer_client")
_TORCH_MODULES = ("numpy", "safetensors", "torch")
_EXTRAS = {"pyarrow": "export"}


class Refused(click.ClickException):
    """The answer is no. Shown as one line."""

    exit_code = EXIT_REFUSED

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))

    def show(self, file: IO[str] | None = None) -> None:
        """Print it on standard error."""
        click.echo(f"error: {self.message}", err=True)


class NotKnown(Refused):
    """There is no answer: wrongly asked, or nobody to ask."""

    exit_code = EXIT_UNKNOWN


class Interrupted(Refused):
    """Stopped by its user before there was an answer."""

    exit_code = EXIT_INTERRUPTED


class LazyGroup(click.Group):
    """The root group: imports a command's module when it is called, and words every error."""

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command called ``name``, its module imported."""
        found = COMMANDS.get(name)
        if found is None:
            return None
        command = getattr(importlib.import_module(found.module), found.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the arguments, and print help where it is asked for."""
        for stream in (sys.stdout, sys.stderr):
            # A file's name or another's words that the terminal cannot show must not stop an answer.
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        with _wording():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, context: click.Context) -> object:
        """Run a command; what it raises becomes one line and an exit code."""
        context.obj = _Outside()
        with _wording():
            return super().invoke(context)


@contextmanager
def _wording() -> Iterator[None]:
    """What is raised becomes one line and an exit code."""
    try:
        yield
    except ExceptionGroup as group:
        # A node's tasks fail together; the first that says why is the one to show.
        worded = _first_worded(group)
        if worded is None:
            raise
        raise worded from group
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted") from error
    except BrokenPipeError as error:
        if sys.stdout is not None:
            # Nor is what is still buffered written when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from error
    except (CountersignError, ModuleNotFoundError, OSError, UnicodeEncodeError) as error:
        failure = _worded(error)
        if failure is None:
            raise
        raise failure from error


class _Outside:
    """Ledgers and custodians, for commands of other packages, which find this as the context's object."""

    @staticmethod
    def bundle_of(where: str, genesis: Genesis, predicate: Predicate, campaign: bytes, token: str | None) -> bytes:
        """As ``ledgers.bundle_of``."""
        from node.commands.ledgers import bundle_of  # noqa: PLC0415 (needs an HTTP client or RocksDB)

        return bundle_of(where, genesis, predicate, campaign, token)

    @staticmethod
    def fetch_windows(url: str, token: str | None, campaign: bytes, windows: Sequence[Window], directory: Path) -> None:
        """As ``custody.fetch_windows``."""
        from node.client import NodeClient  # noqa: PLC0415 (needs an HTTP client)
        from node.commands.custody import fetch_windows  # noqa: PLC0415

        with NodeClient(url, token) as client:
            fetch_windows(client, campaign, windows, directory)


def _first_worded(group: ExceptionGroup[Exception]) -> Refused | None:
    for error in group.exceptions:
        found = _first_worded(error) if isinstance(error, ExceptionGroup) else _worded(error)
        if found is not None:
            return found
    return None


def _worded(error: Exception) -> Refused | None:
    """The line and exit code for an error; None for one that is a fault of ours and deserves its traceback."""
    if isinstance(error, ConfigError):
        return NotKnown(f"config: {error}")
    if isinstance(error, Rejected):
        return Refused(str(error))
    if isinstance(error, Unavailable):
        return NotKnown(f"unavailable: {error}")
    if isinstance(error, InvariantBroken):
        return Refused(f"invariant-broken: {error}")
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in _OURS:
            return None
        extra = "attribution" if missing in _TORCH_MODULES else _EXTRAS.get(missing, "node")
        return NotKnown(f"this command needs the {extra} extra: pip install 'countersign[{extra}]'")
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return NotKnown("text: expected UTF-8 in every argument and file name, found other bytes")
    if isinstance(error, OSError):
        return NotKnown(f"file: {error.filename or 'input or output'}: {error.strerror or error}")
    return None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("countersign"), prog_name="countersign")
def main() -> None:
    """Every fine-tuning step, countersigned by the parties that answer for it.

    \b
    Try it:     countersign demo
    Check it:   countersign verify included --bundle FILE --genesis FILE --chain-id HEX

    Exit codes: 0 yes or done, 1 no or refused, 2 not known or wrongly asked, 130 interrupted.
    """


def every_command() -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name (``countersign log prove``), groups before what is in them."""
    context = click.Context(main, info_name="countersign")
    yield "countersign", main
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        yield from _walk(f"countersign {name}", command)


def _walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _walk(f"{path} {name}", inner)
