"""Five real node processes for tests: provisioned, started, killed and asked over HTTP."""

import hashlib
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from consensus import portions as p
from consensus.codec import encode
from consensus.event import Kind, make_entry, pack, sign_entry
from consensus.genesis import genesis_from_json
from consensus.identifiers import MemberId, Role
from consensus.keys import signer_for
from consensus.membership import BLS_THRESHOLD, Member, Parameters
from consensus.portions import Portions
from node.client import NodeClient
from node.fsck import check_data_directory
from node.keystore import Keystore, Secrets
from node.provision import MemberRequest, Provisioned, provision

MEMBERS = (
    MemberRequest("library", Role.DATA_SOURCE),
    MemberRequest("press", Role.DATA_SOURCE),
    MemberRequest("council", Role.GOVERNANCE),
    MemberRequest("laboratory", Role.OPERATOR),
    MemberRequest("guild", Role.VERIFIER),
)
START_SECONDS = 60.0
COUNTERSIGN = str(Path(sysconfig.get_path("scripts")) / "countersign")


class Processes:
    """A provisioned consortium whose nodes are separate processes."""

    def __init__(
        self,
        directory: Path,
        members: Sequence[MemberRequest] = MEMBERS,
        thresholds: Mapping[Role, int] | None = None,
        certificate_scheme: str = BLS_THRESHOLD,
    ) -> None:
        self.provisioned: Provisioned = provision(
            directory,
            "countersign.example/processes",
            members,
            created_ms=time.time_ns() // 1_000_000,
            certificate_scheme=certificate_scheme,
            thresholds=thresholds,
            parameters=Parameters(heartbeat_ms=1_000),
        )
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.client = httpx.Client(timeout=30.0)

    def command(self, name: str) -> list[str]:
        """What starts a node."""
        return [COUNTERSIGN, "node", "run", "--config", str(self.provisioned.members[name].config)]

    def launch(self, name: str) -> None:
        """Start a node and wait for nothing."""
        log = (self.provisioned.members[name].directory / "node.log").open("ab")
        self.running[name] = subprocess.Popen(
            self.command(name),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def start(self, *names: str) -> None:
        """Start nodes and wait until each answers."""
        for name in names:
            self.launch(name)
        for name in names:
            self.wait_until(lambda name=name: self.get(name, "/v1/health") is not None)  # type: ignore[misc]

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a node with a signal and wait for it."""
        process = self.running.pop(name)
        os.killpg(process.pid, number)
        process.wait(timeout=20)

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        """A node that SIGSTOP has stopped; it goes on when the block is left."""
        os.killpg(self.running[name].pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.running[name].pid, signal.SIGCONT)

    def run(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """What ``countersign WORDS --config FILE`` answers a member's operator."""
        config = str(self.provisioned.members[name].config)
        return subprocess.run(
            [COUNTERSIGN, *words, "--config", config], capture_output=True, text=True, timeout=120, check=False
        )

    def close(self) -> None:
        """Kill all that still run."""
        for name in list(self.running):
            self.kill(name)
        self.client.close()

    def get(self, name: str, path: str) -> dict[str, object] | None:
        """A node's JSON answer, None while it does not answer with 200."""
        try:
            response = self.client.get(self.provisioned.members[name].api_url + path)
        except httpx.TransportError:
            return None
        return response.json() if response.status_code == 200 else None

    def status(self, name: str) -> dict[str, object]:
        """``/v1/status`` of a node that must answer."""
        found = self.get(name, "/v1/status")
        assert found is not None, self.log(name)
        return found

    def post(self, name: str, event: bytes, wait_seconds: int = 0) -> httpx.Response:
        """Submit one event."""
        path = f"/v1/events?wait={wait_seconds}" if wait_seconds else "/v1/events"
        return self.client.post(self.provisioned.members[name].api_url + path, content=event)

    def log(self, name: str) -> str:
        """The end of a node's log, for a failing assertion."""
        return (self.provisioned.members[name].directory / "node.log").read_text()[-4_000:]

    def member(self, name: str) -> Member:
        """The genesis's entry of a member."""
        return next(member for member in self.provisioned.genesis.members if member.name == name)

    def secrets(self, name: str) -> Secrets:
        """What a member's keystore holds."""
        held = self.provisioned.members[name]
        return Keystore.open(held.keystore, held.passphrase.read_bytes().strip()).secrets

    def sign(self, name: str, kind: Kind, portions: Portions) -> bytes:
        """An event signed with a member's own keystore."""
        member = self.member(name)
        signer = signer_for(member.scheme, self.secrets(name).identity_seed)  # type: ignore[arg-type]
        entry = make_entry(self.provisioned.chain_id, kind, MemberId(member.id), portions)
        return pack(sign_entry(entry, member.id, member.role, signer), portions)

    # Judgement

    def is_final(self, name: str, event: str, within_seconds: float = 0.0) -> bool:
        """Whether an event is final for a node, or becomes so in time."""
        deadline = time.monotonic() + within_seconds
        while True:
            found = self.get(name, f"/v1/events/{event}")
            if found is not None and found["status"] == "final":
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)

    def events_on_log(self, name: str) -> list[str]:
        """The ids of all final events, as a node lists them."""
        with NodeClient(self.provisioned.members[name].api_url) as client:
            return [row.id for row in client.every_event({})]

    def assert_one_log(self, acknowledged: Iterable[str]) -> None:
        """The logs of all that run become one that has every acknowledged event once; nobody is convicted."""
        events, names = set(acknowledged), list(self.running)

        def is_one() -> bool:
            roots = {str(self.status(name)["log_root"]) for name in names}
            return len(roots) == 1 and events.issubset(self.events_on_log(names[0]))

        self.wait_until(is_one, 60)
        for name in names:
            listed = self.events_on_log(name)
            assert events.issubset(listed), (name, events.difference(listed))
            assert len(listed) == len(set(listed)), name
            assert self.status(name)["evidence"] == 0, self.log(name)

    def assert_whole(self, acknowledged: Iterable[str]) -> None:
        """``assert_one_log``; and all that run end in order, saw nobody contradict himself, and have sound disks."""
        self.assert_one_log(acknowledged)
        names = list(self.running)
        for name in names:
            assert self.status(name)["halted"] == "", self.log(name)
        for name in names:
            os.killpg(self.running[name].pid, signal.SIGTERM)
        for name in names:
            assert self.running.pop(name).wait(timeout=30) == 0, self.log(name)
            said = (self.provisioned.members[name].directory / "node.log").read_text()
            assert "Traceback" not in said, name
            assert "contradicts itself" not in said, name
        genesis = genesis_from_json(self.provisioned.genesis_path.read_bytes())
        for name in names:
            data = self.provisioned.members[name].directory / "data"
            report = check_data_directory(data, genesis, lambda stage, done, total: None)
            assert report.sound, (name, report.damages)

    @staticmethod
    def wait_until(condition: object, seconds: float = START_SECONDS) -> None:
        """Poll until ``condition()`` holds; fail after ``seconds``."""
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.05)


@contextmanager
def processes(
    directory: Path,
    *start: str,
    members: Sequence[MemberRequest] = MEMBERS,
    thresholds: Mapping[Role, int] | None = None,
    certificate_scheme: str = BLS_THRESHOLD,
) -> Iterator[Processes]:
    """A consortium with some of its nodes running, all gone afterwards."""
    consortium = Processes(directory, members, thresholds, certificate_scheme)
    try:
        consortium.start(*start)
        yield consortium
    finally:
        consortium.close()


def source(consortium: Processes, owner: str, number: int) -> bytes:
    """A signed source of ``owner``; ``number`` makes it different."""
    claim = p.SourceClaim(
        name=f"source {number}",
        content_root=hashlib.sha256(f"content {number}".encode()).digest(),
        example_count=1,
        size_bytes=1,
        licence="PSF-2.0",
        rights_basis="owner",
        purposes=("research",),
        content_class="documentation",
        valid_from_ms=0,
        valid_until_ms=2**52,
        statement="",
        overlap_sha256=b"",
        reserve_below=0,
    )
    salt = hashlib.sha256(f"salt {number}".encode()).digest()
    return consortium.sign(
        owner, Kind.SOURCE, p.Portions(p.DataPortion(salt, (p.DataItem(encode(claim)),)), None, None)
    )
