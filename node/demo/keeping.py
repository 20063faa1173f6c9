"""Custody: before the release governance takes what the job committed to about each source, and says so on the log.

Done with the commands that anybody would type: the operator hands in, at the custodian's node, the run's sums and
sketches; the custodian, whose node held each file to its own log, signs that it has them. A trace later reads them from
there (``tracing.py``), and not from the operator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from node.demo.consortium import COUNCIL, LABORATORY, Consortium
from node.demo.facts import CustodyFacts, Moment
from node.demo.processes import Processes, ProcessFailed, countersign_command, log_tail

HAND_IN_SECONDS = 300.0
"""On a busy machine; some hundred megabytes go over HTTP and onto disk."""

Line = TypeVar("Line", bound=msgspec.Struct)


class HandedInLine(msgspec.Struct, frozen=True):
    """What ``countersign custody hand-in --json`` prints."""

    sent_bytes: int
    windows: int
    whole: int


class SignedLine(msgspec.Struct, frozen=True):
    """What ``countersign custody sign --json`` prints."""

    id: str
    status: str


@dataclass(frozen=True, slots=True)
class Keeping:
    """The handing over of one campaign's sums and sketches, which lie in ``accumulators``."""

    consortium: Consortium
    processes: Processes
    campaign: str
    accumulators: Path
    tell: Callable[[Moment], None]
    clock: Callable[[], float]

    def hand_over(self, step: int) -> CustodyFacts:
        """The operator hands in, governance signs.

        Raises:
            ProcessFailed: the custodian lacks something, or its word is not on the log.
        """
        campaign = ("--campaign", self.campaign)
        node = self.consortium.nodes[COUNCIL]
        text = f"the log bars the release until governance holds what the operator alone has: {LABORATORY} hands it in"
        self.tell(Moment("custody", self.clock(), step, text))
        folder = ("--accumulators", str(self.accumulators))
        handed_in = self._run(HandedInLine, "hand-in", "--url", node.url, *campaign, *folder)
        if handed_in.whole != handed_in.windows:
            raise ProcessFailed(f"{COUNCIL} has {handed_in.whole} of {handed_in.windows} windows whole")
        signed = self._run(SignedLine, "sign", "--config", str(node.files.config), *campaign)
        if signed.status != "final":
            raise ProcessFailed(f"the custody event of {COUNCIL} is {signed.status}; {log_tail(self._log)}")
        kept = CustodyFacts(COUNCIL, handed_in.windows, handed_in.sent_bytes)
        text = (
            f"{COUNCIL} has {kept.size_bytes / 1e6:.0f} MB of sums and sketches, each file held to its own log, "
            "and says so on it"
        )
        self.tell(Moment("custody", self.clock(), step, text))
        return kept

    def _run(self, form: type[Line], what: str, *arguments: str) -> Line:
        name = f"countersign custody {what}"
        command = countersign_command("custody", what, *arguments, "--json")
        _, output = self.processes.run(name, command, self._log, HAND_IN_SECONDS)
        try:
            found = msgspec.json.decode(output, type=form)
        except msgspec.DecodeError as error:
            raise ProcessFailed(f"{name} printed no answer; {log_tail(self._log)}") from error
        if not self._log.stat().st_size:
            self._log.unlink()
        return found

    @property
    def _log(self) -> Path:
        return self.consortium.directory / "custody.log"
