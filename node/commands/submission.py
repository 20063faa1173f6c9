"""Handing in a signed event, or keeping it in a file for later."""

from pathlib import Path

import click

from consensus.event import CheckedEvent
from node.client import EventAnswer
from node.commands.connection import connect
from node.commands.output import print_json
from node.files import sync_directory

WAIT_SECONDS = 30.0


def deliver(
    event: CheckedEvent, encoded: bytes, *, submit_with: Path | None, out: Path | None, as_json: bool
) -> EventAnswer | None:
    """Write the event to ``out``, hand it to the node of the configuration ``submit_with``; either may be None.

    Returns the node's answer where there is one.

    Raises:
        Rejected, Unavailable: as ``NodeClient.submit``.
    """
    if out is not None:
        out.write_bytes(encoded)
        sync_directory(out.absolute().parent)
    answer = None
    if submit_with is not None:
        with connect(submit_with, None, None) as client:
            answer = client.submit(encoded, WAIT_SECONDS)
    report(event.entry.kind.value, event.id.hex(), answer, out, as_json)
    return answer


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
        click.echo(f"{kind} {event_id}: {answer.status}; the network has not finalized it yet")
    else:
        where = "" if answer.height is None else f", ledger block {answer.height}"
        click.echo(f"{kind} {event_id}: final, log index {answer.index}{where}")
