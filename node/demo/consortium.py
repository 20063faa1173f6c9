"""The demonstration's parties: their files, their nodes, and what each of them signs.

Five members: two data-source authorities, one governance, which keeps the campaign's sums and sketches besides, one
operator, one rights-holder that verifies. Files
are made by ``provision.py``, claims by the same code as ``countersign source sign`` and ``policy sign``; every
event is signed with the key in its author's own keystore and handed to its author's own node.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

import msgspec

from consensus.codec import encode
from consensus.event import Kind, make_entry
from consensus.identifiers import ChainId, Role, Tag, tagged_hash
from consensus.job_key import job_key_id
from consensus.keys import Ed25519SigningKey
from consensus.membership import Committee, Parameters, committee
from consensus.portions import (
    DataItem,
    DataPortion,
    Delegation,
    Policy,
    Portions,
    SaltedPortion,
    SourceClaim,
    SourceRevocation,
    Wire,
)
from consensus.rejection import ConfigError, CountersignError, Unavailable
from consensus.reserve import bound_of
from node.clock import SystemClock
from node.commands.content import measure, pieces_of, read_examples, source_salt
from node.commands.job import JobKeyFile
from node.commands.member import LocalMember, load_member, signed_by
from node.commands.policy import read_policy
from node.demo.directory import mark
from node.demo.findings import DemoClient
from node.demo.processes import Child, Processes, countersign_command
from node.files import replace_private
from node.provision import MemberRequest, Provisioned, ProvisionedMember, provision

ORIGIN = "demo.countersign.example/log"
PURPOSE = "fine-tuning"
LIBRARY, PRESS, COUNCIL, LABORATORY, GUILD = "library", "press", "council", "laboratory", "guild"
PARTIES: tuple[tuple[str, Role], ...] = (
    (LIBRARY, Role.DATA_SOURCE),
    (PRESS, Role.DATA_SOURCE),
    (COUNCIL, Role.GOVERNANCE),
    (LABORATORY, Role.OPERATOR),
    (GUILD, Role.VERIFIER),
)

HEARTBEAT_MS = 2_000
START_SECONDS = 60.0
FINALITY_SECONDS = 30.0
CHECK_SECONDS = 1.0
BACKDATED_MS = 60_000
DAY_MS = 86_400_000
JOB_KEY_MS = 3_600_000
POLL_SECONDS = 0.05
CUSTODY_BYTES = 2_000_000_000
"""Room at the custodian's for the sums and sketches of one campaign, and to spare."""

POLICY_FILE = Path(__file__).with_name("policy.toml")


class NotFinal(CountersignError):
    """The network took an event and did not finalize it in time."""


class SourceDescription(msgspec.Struct, frozen=True):
    """One source of ``corpus.json``; ``file`` is relative to the output directory."""

    name: str
    owner: str
    file: str
    licence: str
    rights_basis: str
    purposes: tuple[str, ...]
    content_class: str
    reserve: int


class CorpusDescription(msgspec.Struct, frozen=True):
    """``corpus.json`` as ``trainer_client.demo.export`` writes it: sources, and the names of those with a part."""

    example_bytes: int
    licence_refused: str
    purpose_refused: str
    revoked: str
    canary: str
    sources: tuple[SourceDescription, ...]


@dataclass(frozen=True, slots=True)
class Finalized:
    """An event on the log and how long that took, from handing it in."""

    id: str
    index: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class SignedSource:
    """A source on the log; ``salt`` is the owner's secret for its examples."""

    description: SourceDescription
    id: str
    salt: bytes
    examples: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class JobAccess:
    """What lets the job write: its campaign, the file with its key, the delegation."""

    campaign: str
    key_file: Path
    delegation: Finalized


@dataclass(frozen=True, slots=True)
class Claims:
    """What the parties said before the first step."""

    corpus: CorpusDescription
    sources: tuple[SignedSource, ...]
    policy: Policy
    policy_event: Finalized
    access: JobAccess

    def source(self, name: str) -> SignedSource:
        """The signed source of that name."""
        return next(source for source in self.sources if source.description.name == name)


class Node:
    """One member's node: its files, its process while it runs, a client for its HTTP interface."""

    def __init__(self, files: ProvisionedMember, processes: Processes) -> None:
        self.files = files
        self.name = files.name
        self.role = files.role
        self.log = files.directory / "node.log"
        self.client = DemoClient(files.api_url, timeout_seconds=10.0)
        self._processes = processes
        self.child: Child | None = None

    @property
    def url(self) -> str:
        """Where it serves HTTP."""
        return self.files.api_url

    def start(self) -> None:
        """Start its process: ``countersign node run --config FILE``."""
        command = countersign_command("node", "run", "--config", str(self.files.config))
        self.child = self._processes.start(f"the node of {self.name}", command, self.log)

    def kill(self) -> None:
        """``kill -9``."""
        assert self.child is not None
        self._processes.kill(self.child)
        self.child = None

    def check(self) -> None:
        """Raises ``ProcessFailed`` if its process has ended by itself."""
        if self.child is not None:
            self.child.check()

    def status(self) -> "NodeAnswer | None":
        """What it says of itself, None while it does not answer."""
        try:
            return msgspec.convert(self.client.status(), NodeAnswer)
        except Unavailable:
            return None


class FinalityAnswer(msgspec.Struct, frozen=True):
    """Milliseconds from an event's arrival at the node to its finality, over ``count`` events."""

    count: int = 0
    median_ms: float = 0.0
    p99_ms: float = 0.0


class NodeAnswer(msgspec.Struct, frozen=True):
    """The part of ``/v1/status`` that the demonstration reads."""

    height: int
    log_size: int
    log_root: str
    state_root: str
    peers_connected: tuple[str, ...]
    peers_total: int
    voting: bool
    halted: str
    finality: FinalityAnswer


class Consortium:
    """The five parties. Make it with ``found``."""

    def __init__(self, directory: Path, made: Provisioned, processes: Processes) -> None:
        self.directory = directory
        self.made = made
        self.nodes: Mapping[str, Node] = {name: Node(files, processes) for name, files in made.members.items()}
        self._members: dict[str, LocalMember] = {}
        self._processes = processes

    @property
    def chain_id(self) -> ChainId:
        """The pinned chain id."""
        return self.made.chain_id

    @property
    def committee(self) -> Committee:
        """Voters and thresholds."""
        return committee(self.made.genesis)

    def member(self, name: str) -> LocalMember:
        """A member with the key of its own keystore."""
        if name not in self._members:
            self._members[name] = load_member(self.nodes[name].files.config)
        return self._members[name]

    def check(self) -> None:
        """Raises ``ProcessFailed`` if a node has ended that should run."""
        for node in self.nodes.values():
            node.check()

    def start(self, each: Callable[[Node, NodeAnswer], None]) -> None:
        """Start all nodes; calls ``each`` with every node once it is connected to all others.

        Raises:
            ProcessFailed: one ended. Unavailable: they do not find each other in time.
        """
        for node in self.nodes.values():
            node.start()
        waiting = dict(self.nodes)
        deadline = time.monotonic() + START_SECONDS
        while waiting:
            self.check()
            for name in list(waiting):
                answer = waiting[name].status()
                if answer is not None and len(answer.peers_connected) == answer.peers_total:
                    each(waiting.pop(name), answer)
            if waiting and time.monotonic() > deadline:
                logs = ", ".join(str(node.log) for node in waiting.values())
                raise Unavailable(f"not connected after {START_SECONDS:.0f} s: {', '.join(waiting)}; see {logs}")
            time.sleep(POLL_SECONDS)

    # Claims

    def sign_source(self, description: SourceDescription, example_bytes: int) -> SignedSource:
        """An owner claims a source: measures its file, signs, hands it to its own node."""
        own = self.member(description.owner)
        salt = source_salt(self.nodes[description.owner].files.directory / "sources" / f"{description.name}.salt")
        content = measure(
            read_examples([self.directory / description.file], pieces_of(example_bytes)),
            salt,
        )
        now_ms = SystemClock().now_ms()
        claim = SourceClaim(
            name=description.name,
            content_root=content.root,
            example_count=content.example_count,
            size_bytes=content.size_bytes,
            licence=description.licence,
            rights_basis=description.rights_basis,
            purposes=description.purposes,
            content_class=description.content_class,
            valid_from_ms=now_ms - BACKDATED_MS,
            valid_until_ms=now_ms + 365 * DAY_MS,
            statement="Documentation of the Python standard library, with facts made up for the demonstration.",
            overlap_sha256=b"",
            reserve_below=bound_of(content.root, content.example_count, description.reserve),
        )
        final = self._finalize(own, Kind.SOURCE, data=claim)
        return SignedSource(description, final.id, salt, content.example_count, final.milliseconds)

    def sign_policy(self, maximum_grant_steps: int) -> tuple[Policy, Finalized]:
        """Governance signs ``policy.toml`` with this bound on grants; the file signed stays with its files."""
        path = self.nodes[COUNCIL].files.directory / "policy.toml"
        template = Template(POLICY_FILE.read_text(encoding="utf-8"))
        path.write_text(template.substitute(maximum_grant_steps=maximum_grant_steps), encoding="utf-8")
        policy = read_policy(path)
        return policy, self._finalize(self.member(COUNCIL), Kind.POLICY, governance=policy)

    def delegate(self) -> JobAccess:
        """The operator makes a job key for one campaign, valid for an hour, and says so on the log."""
        own = self.member(LABORATORY)
        seed = os.urandom(32)
        key = Ed25519SigningKey(seed)
        campaign = tagged_hash(Tag.CAMPAIGN, own.member.id, os.urandom(32))
        now_ms = SystemClock().now_ms()
        delegation = Delegation(
            campaign=campaign,
            job_key=job_key_id(key),
            scheme=key.scheme,
            not_before_ms=now_ms - BACKDATED_MS,
            expires_at_ms=now_ms + JOB_KEY_MS,
            replaces=b"",
            head=b"",
        )
        file = JobKeyFile(
            chain_id=self.chain_id.hex(),
            campaign=campaign.hex(),
            operator=own.member.id.hex(),
            job_key_scheme=key.scheme.label,
            job_key_seed=seed.hex(),
            node_url=self.nodes[LABORATORY].url,
            expires_at_ms=delegation.expires_at_ms,
        )
        path = self.nodes[LABORATORY].files.directory / "job-key.json"
        replace_private(path, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
        return JobAccess(
            campaign.hex(), path, self._finalize(own, Kind.DELEGATION, operation=delegation, campaign=campaign)
        )

    def revoke(self, source: SignedSource, reason: str) -> str:
        """The owner takes a source back: signed and handed to its node, not waited for. Returns the event's id."""
        own = self.member(source.description.owner)
        revocation = SourceRevocation(source=bytes.fromhex(source.id), reason=reason)
        event, encoded = _signed(own, Kind.REVOCATION, data=revocation)
        self.nodes[own.member.name].client.submit(encoded)
        return event

    def _finalize(
        self,
        own: LocalMember,
        kind: Kind,
        *,
        data: Wire | None = None,
        governance: Wire | None = None,
        operation: Wire | None = None,
        campaign: bytes = bytes(32),
    ) -> Finalized:
        event, encoded = _signed(own, kind, data=data, governance=governance, operation=operation, campaign=campaign)
        client = self.nodes[own.member.name].client
        started = time.perf_counter()
        answer = client.submit(encoded, CHECK_SECONDS)
        while answer.index is None:
            self.check()
            if time.perf_counter() - started > FINALITY_SECONDS:
                raise NotFinal(f"the {kind.value} event {event} is not final after {FINALITY_SECONDS:.0f} s")
            answer = client.event(event, CHECK_SECONDS)
        return Finalized(event, answer.index, 1_000 * (time.perf_counter() - started))


def found(directory: Path, processes: Processes) -> Consortium:
    """Make all members' files in an empty or missing directory, marked as ours.

    Raises:
        ConfigError: as ``provision``.
    """
    with signals_held():
        made = provision(
            directory,
            ORIGIN,
            [MemberRequest(name, role) for name, role in PARTIES],
            created_ms=SystemClock().now_ms(),
            parameters=Parameters(heartbeat_ms=HEARTBEAT_MS),
            purposes=(PURPOSE,),
        )
        with made.members[COUNCIL].config.open("a", encoding="utf-8") as config:
            config.write(f"\n[custody]\nmaximum_bytes = {CUSTODY_BYTES}\n")
        mark(directory)
    return Consortium(directory, made, processes)


def read_corpus(directory: Path) -> CorpusDescription:
    """``corpus.json`` below the output directory.

    Raises:
        ConfigError: it is missing or not one.
    """
    path = directory / "corpus.json"
    try:
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), CorpusDescription)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: expected the description of the sources, found: {error}") from error


@contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP wait until what runs inside is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signed(
    own: LocalMember,
    kind: Kind,
    *,
    data: Wire | None = None,
    governance: Wire | None = None,
    operation: Wire | None = None,
    campaign: bytes = bytes(32),
) -> tuple[str, bytes]:
    portions = Portions(
        data=None if data is None else DataPortion(os.urandom(32), (DataItem(encode(data)),)),
        governance=None if governance is None else SaltedPortion(os.urandom(32), encode(governance)),
        operation=None if operation is None else SaltedPortion(os.urandom(32), encode(operation)),
    )
    entry = make_entry(own.committee.chain_id, kind, own.member.id, portions, campaign=campaign)
    event, encoded = signed_by(own, entry, portions)
    return event.id.hex(), encoded
