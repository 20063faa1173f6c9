"""Node processes in network namespaces of their own, joined by cables that a test cuts, slows and makes lossy.

Needs ``ip`` and ``nsenter`` (iproute2, util-linux) and root, or user namespaces where root is not had; elsewhere the
tests are skipped and say why. ``namespace_switch`` makes the network and is its switch.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from namespace_switch import address_of
from process_fixtures import COUNTERSIGN, Processes

from consensus.identifiers import Role
from node.config import Address
from node.provision import MemberRequest

SWITCH = Path(__file__).with_name("namespace_switch.py")
NETWORK_PORT = 7_400
NAMES = ("library", "press", "archive", "council", "laboratory")
MEMBERS = tuple(
    MemberRequest(name, role, Address(address_of(number), NETWORK_PORT))
    for number, (name, role) in enumerate(
        zip(NAMES, (*[Role.DATA_SOURCE] * 3, Role.GOVERNANCE, Role.OPERATOR), strict=True)
    )
)
THRESHOLDS = {Role.DATA_SOURCE: 2}
"""One data-source authority of the three may be away; council and laboratory are needed."""


class NamespaceProcesses(Processes):
    """A consortium whose nodes run in network namespaces; ``Processes`` in everything else."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, MEMBERS, THRESHOLDS)
        ports = [str(self.provisioned.members[name].api.port) for name in NAMES]
        self._enter: list[str] = ["nsenter"]
        as_root = ["unshare", "--user", "--map-root-user"] if os.geteuid() != 0 else []
        self._switch = subprocess.Popen(
            [*as_root, sys.executable, str(SWITCH), *ports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._switch.stdout is not None
        assert self._switch.stderr is not None
        line = self._switch.stdout.readline()
        if not line:
            why = self._switch.stderr.read().decode().strip().splitlines()
            self.close()
            pytest.skip(f"network namespaces are not permitted: {why[-1] if why else 'no reason given'}")
        if as_root:
            self._enter += ["--preserve-credentials", f"--user=/proc/{self._switch.pid}/ns/user"]
        self._namespaces: dict[str, str] = dict(zip(NAMES, json.loads(line), strict=True))
        self.programs: dict[str, list[str]] = {}
        """What runs in place of ``countersign``, for nodes that something is wrong with."""

    def command(self, name: str) -> list[str]:
        """A node, started inside its namespace."""
        program = self.programs.get(name, [COUNTERSIGN])
        config = str(self.provisioned.members[name].config)
        return [*self._enter, f"--net={self._namespaces[name]}", *program, "node", "run", "--config", config]

    def close(self) -> None:
        """Kill all nodes and the switch: the namespaces go with them."""
        super().close()
        assert self._switch.stdin is not None
        self._switch.stdin.close()
        try:
            self._switch.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._switch.kill()
            self._switch.wait()
        for pipe in (self._switch.stdout, self._switch.stderr):
            assert pipe is not None
            pipe.close()

    # The network

    def link(
        self,
        senders: Iterable[str],
        receivers: Iterable[str],
        *,
        blocked: bool = False,
        delay_seconds: float = 0.0,
        loss: float = 0.0,
    ) -> None:
        """How frames go from ``senders`` to ``receivers`` from now on."""
        wanted = {
            "from": [NAMES.index(name) for name in senders],
            "to": [NAMES.index(name) for name in receivers],
            "blocked": blocked,
            "delay_seconds": delay_seconds,
            "loss": loss,
        }
        assert self._switch.stdin is not None
        assert self._switch.stdout is not None
        self._switch.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._switch.stdin.flush()
        assert self._switch.stdout.readline() == b"done\n"

    def partition(self, *side: str) -> None:
        """Nothing goes any more between these nodes and the rest."""
        rest = [name for name in NAMES if name not in side]
        self.link(side, rest, blocked=True)
        self.link(rest, side, blocked=True)

    def heal(self) -> None:
        """Every frame arrives, at once."""
        self.link(NAMES, NAMES)


@contextmanager
def namespace_processes(directory: Path) -> Iterator[NamespaceProcesses]:
    """A consortium in network namespaces, no node running yet; all gone afterwards."""
    for program in ("ip", "nsenter", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (iproute2, util-linux)")
    consortium = NamespaceProcesses(directory)
    try:
        yield consortium
    finally:
        consortium.close()
