"""Handing in a signed event, or keeping it in a file for later."""

from pathlib import Path

import click

from consensus.event import CheckedEvent
from node.client import EventAnswer
from node.commands.connection import connect
from node.commands.output import print_json
from node.files import write_output

WAIT_SECONDS = 30.0
EXIT_NOT_FINAL = 2


def deliver(
    event: CheckedEvent,
    encoded: bytes,
    *,
    submit_with: Path | None,
    out: Path | None,
    as_json: bool,
    added_to: Path | None = None,
) -> None:
    """Write the event to ``out``, hand it to the node of the configuration ``submit_with``; either may be None.

    ``added_to`` is the event file that a signature was added to, which ``out`` may name again.

    Raises:
        ConfigError: another file is there.
        Rejected, Unavailable: as ``NodeClient.submit``.
        Exit: code 2, not known, once it is told that the event was taken and is not final yet.
    """
    if out is not None:
        write_output(out, encoded, added_to)
    answer = None
    if submit_with is not None:
        with connect(submit_with, None, None) as client:
            answer = client.submit(encoded, WAIT_SECONDS)
    report(event.entry.kind.value, event.id.hex(), answer, out, as_json)
    if answer is not None:
        require_final(answer)


def require_final(answer: EventAnswer) -> None:
    """Ends the command with exit code 2, not known, where the network has not finalized an event yet."""
    if answer.index is None:
        raise click.exceptions.Exit(EXIT_NOT_FINAL)


def report(kind: str, event_id: str, answer: EventAnswer | None, out: Path | None, as_json: bool) -> None:
    """What happened to an event."""
    if as_json:
        print_json(
            {
                "kind": kind,
                "id": event_id,
                "status": "signed" if answer is None else answer.status,
                "index": None if answer is None else answer.index,
                "height": None if answer is None else answer.height,
                "file": None if out is None else str(out),
            }
        )
        return
    if answer is None:
        click.echo(f"{kind} {event_id}: signed, in {out}")
    elif answer.index is None:
        click.echo(
            f"{kind} {event_id}: {answer.status}; the network has not finalized it in {WAIT_SECONDS:.0f} s and goes on "
            "trying: countersign log show lists it once it is final"
        )
    else:
        where = "" if answer.height is None else f", ledger block {answer.height}"
        click.echo(f"{kind} {event_id}: final, log index {answer.index}{where}")
