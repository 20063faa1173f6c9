"""A whole ledger in memory, for tests: real keys, real admission, real certificates, no node.

``MemoryLedger`` seals events into certified ledger blocks and answers what ``node.bundles.LogReader`` asks.
``CampaignRun`` writes one campaign the way a job does. ``story()`` tells the one most tests use: a policy,
three sources of two owners, steps with refusals, a memorization rollback, a revocation in mid-run, a release.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from blake3 import blake3
from consensus_fixtures import SMALLEST, make_genesis

from consensus import portions as p
from consensus.admission import admit
from consensus.beacon import beacon_message, make_beacon, picked_steps
from consensus.block import Body, Header, decode_header
from consensus.certificate import Certificate, certificate_message
from consensus.certificate_schemes import scheme_for
from consensus.codec import encode
from consensus.epochs import EpochLink
from consensus.event import CheckedEvent, Entry, Kind, check_event, make_entry, pack, sign_entries_as_job, sign_entry
from consensus.evidence import EvidenceReport
from consensus.identifiers import Digest, MemberId, View, tagged_hash
from consensus.identifiers import Tag as DomainTag
from consensus.job_key import job_key_id
from consensus.keys import SignatureScheme, Signer, signer_for
from consensus.membership import BLS_THRESHOLD, Genesis, Membership, Parameters
from consensus.parameters import TensorDescriptor, parameter_root
from consensus.participant import MemberSecrets
from consensus.policy import maximum_profile, why_refused
from consensus.rejection import Reason
from consensus.reserve import RESERVED, reserved_among
from consensus.review import (
    ACCEPT,
    AT_MOST,
    AuditAnswer,
    AuditChallenge,
    AuditResult,
    DataSlice,
    Decision,
    Evaluation,
    Metric,
    PickedStep,
    Threshold,
)
from consensus.sampler import presented_examples
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    EPOCH_HEAD_KEY,
    GRANT_TABLE,
    POLICY_HEAD_KEY,
    POLICY_TABLE,
    SOURCE_TABLE,
    CampaignHead,
    GrantRecord,
    PolicyHead,
    PolicyRecord,
    SourceRecord,
    StateView,
    Usage,
    read_record,
    usage_key,
)
from consensus.state_map import StateMap
from consensus.transition import LedgerState, build, genesis_state
from consensus.vote import VoteEvidence, VoteKind, sign_vote

BLOCK_MS = 1_000
YEAR_MS = 365 * 86_400_000
LIBRARIAN, HOSPITAL = "data-source-1", "data-source-2"
GOVERNANCE, OPERATOR = "governance-1", "operator-1"
BLOCKS = ("embedding", "layer.0", "layer.1")


def digest(*parts: object) -> Digest:
    """32 bytes that stand for something."""
    return Digest(hashlib.sha256("/".join(map(str, parts)).encode()).digest())


def safetensors_file(tensors: dict[str, bytes]) -> bytes:
    """A safetensors file of 2 x 2 float32 tensors: header length, JSON header, contents."""
    header: dict[str, object] = {}
    end = 0
    for name, content in tensors.items():
        header[name] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [end, end + len(content)]}
        end += len(content)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(tensors.values())


class MemoryLedger:
    """One chain's log in memory, grown by ``seal``."""

    def __init__(
        self,
        counts: dict[str, int] | None = None,
        seed: int = 0,
        certificate_scheme: str = BLS_THRESHOLD,
        schemes: Mapping[str, SignatureScheme] | None = None,
        parameters: Parameters | None = None,
    ) -> None:
        self.genesis: Genesis
        self.genesis, self.secrets = make_genesis(
            counts or SMALLEST, seed, certificate_scheme, schemes=schemes, parameters=parameters
        )
        self.scheme = scheme_for(self.genesis)
        self.committee = self.scheme.committee
        self.ids = {member.name: member.id for member in self.genesis.members}
        self.chain_id = self.genesis.chain_id
        self.ledger = genesis_state(self.chain_id, self.genesis.created_ms)
        self.events: list[CheckedEvent] = []
        self.all_links: list[EpochLink] = []
        self.certified: list[tuple[bytes, bytes]] = []
        self.states: list[StateMap] = []
        self._nodes: dict[tuple[int, int], bytes] = {}
        self._salts = 0

    @property
    def header(self) -> bytes:
        return self.certified[-1][0]

    @property
    def certificate(self) -> bytes:
        return self.certified[-1][1]

    @property
    def links(self) -> tuple[EpochLink, ...]:
        """What leads to the epoch of ``header``."""
        return self.all_links[: decode_header(self.header, self.chain_id).epoch]

    @property
    def state(self) -> StateMap:
        return self.ledger.state

    @property
    def now_ms(self) -> int:
        """The time of the next ledger block."""
        return self.ledger.header.timestamp_ms + BLOCK_MS

    def entry(self, index: int) -> bytes:
        return self.events[index].entry_bytes

    def portions(self, index: int) -> bytes:
        return self.events[index].portions_bytes

    def index_of_event(self, identifier: bytes) -> int | None:
        return next((index for index, event in enumerate(self.events) if event.id == identifier), None)

    def campaign_indexes(self, campaign: bytes) -> Sequence[int]:
        return [index for index, event in enumerate(self.events) if event.entry.campaign == campaign]

    def node(self, level: int, index: int) -> bytes:
        return self._nodes[level, index]

    def salt(self) -> bytes:
        """The next portion salt; deterministic, which is fit for a test and nothing else."""
        self._salts += 1
        return digest("salt", self._salts)

    def check(self, entry: Entry, portions: p.Portions) -> CheckedEvent:
        return check_event(pack(entry, portions), self.committee)

    def signed(self, kind: Kind, signers: Sequence[str], portions: p.Portions, **place: object) -> CheckedEvent:
        """An event of members; the first signer is its author."""
        entry = make_entry(self.chain_id, kind, self.ids[signers[0]], portions, **place)  # type: ignore[arg-type]
        for name in signers:
            role = self.committee.member(self.ids[name]).role.value
            entry = sign_entry(entry, self.ids[name], role, self.secrets[name].identity)
        return self.check(entry, portions)

    def salted(self, content: p.Wire) -> p.SaltedPortion:
        return p.SaltedPortion(self.salt(), encode(content))

    def seal(self, *events: CheckedEvent, after_ms: int = BLOCK_MS) -> Header:
        """A certified ledger block with all of ``events``.

        Raises:
            Rejected: why the first one refused was.
        """
        view = 1 + (self.ledger.header.view if self.ledger.header.epoch == self.committee.epoch else 0)
        built = build(
            self.ledger,
            events,
            view=view,
            leader=self.committee.leader(View(view)).id,
            timestamp_ms=self.ledger.header.timestamp_ms + after_ms,
            committee=self.committee,
            max_events=4_096,
            max_bytes=1 << 24,
        )
        for _, refusal in built.refused:
            raise refusal
        self._append(built.state, built.events)
        return built.state.header

    def seal_lying(self, *events: CheckedEvent, lies: dict[bytes, p.Wire]) -> Header:
        """A certified ledger block whose events were judged as if the state were ``lies``: the work of traitors.

        Raises:
            Rejected: when an event breaks a rule even so.
        """
        believed = self.state.set_many({key: encode(record) for key, record in lies.items()})
        view = StateView(believed)
        for event in events:
            admit(view, event, self.now_ms, self.committee)
        return self.collude(events, view.changes())

    def collude(self, events: Sequence[CheckedEvent], changes: dict[bytes, bytes]) -> Header:
        """A certified ledger block that no rule was applied to: what a quorum of traitors can write."""
        before = self.ledger
        body = Body(tuple(event.leaf_hash for event in events))
        frontier = before.frontier.append(body.leaf_hashes)
        state = before.state.set_many(changes)
        view = before.header.view + 1
        header = msgspec.structs.replace(
            before.header,
            height=before.header.height + 1,
            view=view,
            leader=self.committee.leader(View(view)).id,
            parent=before.digest,
            parent_view=before.header.view,
            timestamp_ms=before.header.timestamp_ms + BLOCK_MS,
            body_root=body.root,
            event_count=len(events),
            log_size=frontier.size,
            log_root=frontier.root,
            state_root=state.root,
        )
        self._append(LedgerState(header, header.digest, frontier, state), events)
        return header

    def enter_epoch(self, membership: Membership, secrets: dict[str, MemberSecrets]) -> None:
        """Go on under these members, whom the last ledger block settled."""
        proof = self.state.prove(EPOCH_HEAD_KEY)
        self.all_links.append(EpochLink(encode(membership), self.header, self.certificate, proof))
        self.scheme = scheme_for(self.genesis, membership, self.committee)
        self.committee = self.scheme.committee
        self.secrets = {**self.secrets, **secrets}
        self.ids = {**self.ids, **{member.name: member.id for member in membership.members}}

    def certify(self, header: Header) -> bytes:
        """The certificate of a header, by all voters."""
        message = certificate_message(self.chain_id, header.epoch, View(header.view), header.digest)
        payload = self.scheme.combine(message, self._shares(message))
        return encode(Certificate(self.scheme.name, header.view, header.digest, header.epoch, payload))

    def _append(self, after: LedgerState, events: Sequence[CheckedEvent]) -> None:
        leaves = [event.leaf_hash for event in events]
        for offset, leaf in enumerate(leaves):
            self._nodes[0, len(self.events) + offset] = leaf
        _, nodes = self.ledger.frontier.append_with_nodes(leaves)
        self._nodes.update({(level, index): node for level, index, node in nodes})
        self.events += events
        self.ledger = after
        self.certified.append((encode(after.header), self.certify(after.header)))
        self.states.append(after.state)

    # What members say.

    def policy(self, **fields: object) -> CheckedEvent:
        """A policy: class ``text`` everywhere, class ``medical`` at half depth and not in the embedding."""
        policy = msgspec.structs.replace(
            p.Policy(
                name="test policy",
                licences=("CC-BY-4.0", "CC0-1.0"),
                purposes=("research",),
                classes=(
                    p.ClassRule("medical", 500, (p.BlockWeight("embedding", 0),)),
                    p.ClassRule("text", 1_000, ()),
                ),
                entropy_edges_milli=(),
                memorization_threshold_permille=800,
                routing_granularities=("block",),
                author_schemes=("ed25519", "ml-dsa-65"),
                required_metadata=("optimizer",),
                least_sketch_rank=0,
                auditors=(),
                custody=(),
                event_granularities=("batch",),
                maximum_grant_steps=100,
                maximum_grant_duration_ms=86_400_000,
                global_clipping=False,
                revocation="drain",
                momentum="carry",
                rationale="",
            ),
            **fields,
        )
        signers = [name for name in self.ids if name.startswith("governance")]
        return self.signed(Kind.POLICY, signers, p.Portions(None, self.salted(policy), None))

    def source(self, owner: str, name: str, **fields: object) -> CheckedEvent:
        """A source of 8 examples, class ``text``, licence CC-BY-4.0, for research, valid for a year."""
        claim = msgspec.structs.replace(
            p.SourceClaim(
                name=name,
                content_root=digest("content", name),
                example_count=8,
                size_bytes=800,
                licence="CC-BY-4.0",
                rights_basis="own work",
                purposes=("research",),
                content_class="text",
                valid_from_ms=self.genesis.created_ms,
                valid_until_ms=self.genesis.created_ms + YEAR_MS,
                statement="",
                overlap_sha256=b"",
                reserve_below=0,
            ),
            **fields,
        )
        return self.signed(Kind.SOURCE, [owner], self._one_item(claim))

    def revocation(self, owner: str, source: bytes) -> CheckedEvent:
        """The owner takes a source back."""
        return self.signed(Kind.REVOCATION, [owner], self._one_item(p.SourceRevocation(source, "withdrawn")))

    def contradiction(self, culprit: str, view: int = 1) -> EvidenceReport:
        """Two ledger blocks that one member votes to notarize in one view."""
        sign = self.secrets[culprit].identity.sign
        votes = (
            sign_vote(
                self.committee,
                self.ids[culprit],
                VoteKind.NOTARIZE,
                View(view),
                digest("block", side),
                share=b"",
                sign=sign,
            )
            for side in range(2)
        )
        return EvidenceReport(VoteEvidence(*votes))

    def evidence(self, author: str, report: EvidenceReport) -> CheckedEvent:
        """The report, handed in by a member."""
        return self.signed(Kind.EVIDENCE, [author], p.Portions(None, self.salted(report), None))

    def decision(
        self, campaign: bytes, subject: bytes, outcome: str, signers: Sequence[str] = (), rationale: str = "as agreed"
    ) -> CheckedEvent:
        """A decision of governance, or of ``signers``, the first of which is its author."""
        names = signers or [name for name in self.ids if name.startswith("governance")]
        decided = Decision(subject, outcome, rationale)
        return self.signed(Kind.DECISION, names, p.Portions(None, self.salted(decided), None), campaign=campaign)

    def audit_result(self, auditor: str, campaign: bytes, **fields: object) -> CheckedEvent:
        """An audit result: the first step came out as recorded."""
        result = AuditResult(1, 1, 1, (), bytes(32), "", (p.Setting("torch", "2.13.0"),), "", None)
        result = msgspec.structs.replace(result, **fields)
        return self.signed(Kind.AUDIT_RESULT, [auditor], p.Portions(None, self.salted(result), None), campaign=campaign)

    def custody(self, custodian: str, campaign: bytes, last_event: bytes) -> CheckedEvent:
        """A member's word that it holds a campaign's files, all up to an event."""
        portions = p.Portions(None, self.salted(p.Custody(last_event)), None)
        return self.signed(Kind.CUSTODY, [custodian], portions, campaign=campaign)

    def audit_challenge(self, auditor: str, campaign: bytes, number: int = 1, **fields: object) -> CheckedEvent:
        """An audit by lot of two of the first four steps, to be answered within an hour."""
        challenge = AuditChallenge(number, 1, 4, 2, self.now_ms + 3_600_000, "")
        challenge = msgspec.structs.replace(challenge, **fields)
        portions = p.Portions(None, self.salted(challenge), None)
        return self.signed(Kind.AUDIT_CHALLENGE, [auditor], portions, campaign=campaign)

    def beacon(self, campaign: bytes, number: int = 1) -> bytes:
        """The beacon of an audit in this epoch, by the shares of every voter."""
        message = beacon_message(self.chain_id, self.committee.epoch, campaign, number)
        return make_beacon(self.scheme, message, self._shares(message))

    def _shares(self, message: bytes) -> dict[MemberId, bytes]:
        shares = {}
        for voter in self.committee.voters:
            secret = self.secrets[voter.name]
            own = secret.key_share if secret.key_share is not None else secret.identity
            shares[voter.id] = self.scheme.share(own, message)
        return shares

    def audit_answer(
        self,
        challenge: CheckedEvent,
        *,
        differing_at: Mapping[int, tuple[str, ...]] | None = None,
        beacon: bytes = b"",
        auditor: str = "",
        **fields: object,
    ) -> CheckedEvent:
        """The answer to a challenge by its author: every picked step came out but those of ``differing_at``."""
        asked = challenge.governance
        assert isinstance(asked, AuditChallenge)
        campaign, differing_at = challenge.entry.campaign, differing_at or {}
        beacon = beacon or self.beacon(campaign, asked.number)
        steps = picked_steps(beacon, asked.first_step, asked.last_step, asked.picks)
        picked = tuple(PickedStep(step, differing_at.get(step, ())) for step in steps)
        answer = AuditAnswer(challenge.id, beacon, picked)
        first = next((each.differing for each in picked if each.differing), ())
        said: dict[str, object] = {
            "first_step": asked.first_step,
            "last_step": asked.last_step,
            "matched": len(answer.matching),
            "differing": first,
            "answer": answer,
        }
        said |= fields
        auditor = auditor or self.committee.member(MemberId(challenge.entry.author)).name
        return self.audit_result(auditor, campaign, **said)

    def _one_item(self, content: p.Wire) -> p.Portions:
        return p.Portions(p.DataPortion(self.salt(), (p.DataItem(encode(content)),)), None, None)


@dataclass
class CampaignRun:
    """One campaign as its job writes it. Weights are a few bytes that every step changes."""

    ledger: MemoryLedger
    manifest: tuple[p.ManifestRange, ...]
    name: str = "campaign"
    batch_size: int = 12
    accumulator_window_steps: int = 0
    sketch_rank: int = 0
    base_losses_sha256: bytes = b""
    operator: str = OPERATOR
    attempt: int = 0
    sequence: int = 0
    grants: int = 0
    grant_id: bytes = b""
    snapshots: list[dict[str, bytes]] = field(default_factory=list)
    job_scheme: SignatureScheme = SignatureScheme.ED25519
    job: Signer = field(init=False)
    id: Digest = field(init=False)

    def __post_init__(self) -> None:
        self.job = signer_for(self.job_scheme, digest("job", self.name))
        self.id = tagged_hash(DomainTag.CAMPAIGN, self.name.encode())
        self.snapshots = [{f"{block}.weight": bytes(16) for block in BLOCKS}]

    @property
    def head(self) -> CampaignHead:
        value = self.ledger.state.get(CAMPAIGN_HEAD_TABLE + self.id)
        assert value is not None
        return read_record(value, CampaignHead)

    @property
    def policy_id(self) -> bytes:
        """The policy in force."""
        value = self.ledger.state.get(POLICY_HEAD_KEY)
        assert value is not None
        return read_record(value, PolicyHead).policy

    def tensors(self) -> tuple[TensorDescriptor, ...]:
        """The parameters as they stand."""
        return tuple(
            TensorDescriptor(name, "F32", (2, 2), blake3(content).digest())
            for name, content in self.snapshots[-1].items()
        )

    def root(self) -> bytes:
        return parameter_root(self.tensors())

    def weights_file(self) -> bytes:
        """The parameters as a safetensors file."""
        return safetensors_file(self.snapshots[-1])

    def open(self) -> tuple[CheckedEvent, CheckedEvent]:
        """The delegation and the campaign's opening event."""
        ledger = self.ledger
        expires_ms = ledger.genesis.created_ms + YEAR_MS
        delegation = p.Delegation(
            self.id, job_key_id(self.job), self.job.scheme, ledger.genesis.created_ms, expires_ms, b"", b""
        )
        delegated = ledger.signed(
            Kind.DELEGATION, [self.operator], p.Portions(None, None, ledger.salted(delegation)), campaign=self.id
        )
        campaign = p.Campaign(
            name=self.name,
            purpose="research",
            policy=self.policy_id,
            job_key=job_key_id(self.job),
            base_model="tiny",
            base_root=self.root(),
            base_provenance=b"",
            parameter_blocks=tuple(
                p.ParameterBlock(block, (p.Tensor(f"{block}.weight", "F32", (2, 2)),)) for block in BLOCKS
            ),
            routing_granularity="block",
            event_granularity="batch",
            sampler_seed=digest("sampler", self.name),
            batch_size=self.batch_size,
            planned_steps=100,
            hyperparameters=(p.Setting("optimizer", "adamw"),),
            environment=(),
            factors_digest=b"",
            accumulator_window_steps=self.accumulator_window_steps,
            sketch_rank=self.sketch_rank,
            base_losses_sha256=self.base_losses_sha256,
        )
        items = tuple(p.DataItem(encode(entry)) for entry in self.manifest)
        return delegated, self.written(
            Kind.CAMPAIGN, p.Portions(p.DataPortion(ledger.salt(), items), None, ledger.salted(campaign))
        )

    def written(self, kind: Kind, portions: p.Portions) -> CheckedEvent:
        """The job key's next event."""
        ledger = self.ledger
        entry = make_entry(
            ledger.chain_id,
            kind,
            ledger.ids[self.operator],
            portions,
            campaign=self.id,
            sequence=self.sequence,
            attempt=self.attempt,
        )
        self.sequence += 1
        (signed,) = sign_entries_as_job([entry], self.job)
        return ledger.check(signed, portions)

    def grant(
        self,
        sources: Sequence[bytes],
        first: int,
        last: int,
        signers: Sequence[str] = (),
        minutes: int = 60,
        policy: bytes = b"",
    ) -> CheckedEvent:
        """A grant signed by the operator, governance and the sources' owners (or ``signers``)."""
        ledger = self.ledger
        owners = {self._source(source).author for source in sources}
        names = [self.operator, *(name for name in ledger.ids if name.startswith("governance"))]
        names += signers or [name for name in ledger.ids if ledger.ids[name] in owners]
        terms = p.GrantTerms(policy or self.policy_id, first, last, ledger.now_ms + minutes * 60_000)
        items = tuple(p.DataItem(encode(p.GrantedSource(source))) for source in sorted(sources))
        self.grants += 1
        event = ledger.signed(
            Kind.GRANT,
            names,
            p.Portions(
                p.DataPortion(ledger.salt(), items),
                ledger.salted(terms),
                ledger.salted(p.GrantOperation(job_key_id(self.job))),
            ),
            campaign=self.id,
            sequence=self.grants,
        )
        self.grant_id = event.id
        return event

    def step(
        self,
        flagged: bytes | None = None,
        grant: GrantRecord | None = None,
        profiles: tuple[p.ClassProfile, ...] = (),
        reason: str = "",
        accumulator_root: bytes = b"",
        **says: object,
    ) -> tuple[CheckedEvent, ...]:
        """The refusal the next step needs, if any, and the step. ``flagged`` is a source it memorized.

        For a job that lies: the ``grant`` it pretends to have, the ``profiles`` it applies, a ``reason``, and what
        else it ``says`` in the operation portion.
        """
        ledger, head = self.ledger, self.head
        grant = grant or self._grant()
        index = head.steps + 1
        seed = digest("sampler", self.name)
        admitted: dict[bytes, list[int]] = {}
        refused: dict[tuple[bytes, str], list[int]] = {}
        for source, example in presented_examples(self.manifest, seed, self.batch_size, index):
            if reserved_among(self._source(source).claim, [example]):
                refused.setdefault((source, RESERVED), []).append(example)
            elif source in grant.sources:
                admitted.setdefault(source, []).append(example)
            else:
                refused.setdefault((source, reason or self._reason(source, grant)), []).append(example)
        before = self.root()
        recorded_apart = {named: held for named, held in refused.items() if named[1] != RESERVED}
        refusal = self._refusal(index, recorded_apart, grant) if recorded_apart else ()
        presented = sorted({*admitted, *(source for source, _ in refused)})
        salt = ledger.salt()
        items = []
        for number, source in enumerate(presented):
            counts = tuple(p.Count(why, len(held)) for (of, why), held in sorted(refused.items()) if of == source)
            claim = self._source(source).claim
            examples = tuple(sorted(admitted.get(source, ())))
            items.append(p.use_item(salt, number, source, claim.content_class, counts, examples))
        profiles = profiles or self._profiles(admitted, grant)
        moved = [any(profile.weights_permille[number] for profile in profiles) for number in range(len(BLOCKS))]
        self.snapshots.append(
            {f"{block}.weight": blake3(digest(index, self.attempt, block)).digest()[:16] for block in BLOCKS}
        )
        totals = tuple(
            p.Count(why, sum(len(held) for (_, reason), held in refused.items() if reason == why))
            for why in sorted({reason for _, reason in refused})
        )
        signals = (p.MemorizationSignal(flagged, min(admitted[flagged]), 900),) if flagged is not None else ()
        step = p.StepOperation(
            index=index,
            previous=head.last_event,
            root_before=before,
            root_after=self.root(),
            deltas=tuple(p.BlockDelta(1_000 if moves else 0, digest("delta", index)) for moves in moved),
            optimizer_digest=digest("optimizer", index),
            learning_rate_nano=1_000,
            loss_micro=2_000_000 - index,
            rng_digest=digest("rng", index),
            memorization=signals,
            accumulator_root=accumulator_root,
            flushed=(),
            carried=(),
            step_microseconds=1_000,
        )
        step = msgspec.structs.replace(step, **{**(self._settled(grant) if admitted else {}), **says})
        governance = p.StepGovernance(
            self.grant_id,
            grant.policy,
            step.index,
            profiles,
            self.batch_size,
            sum(map(len, admitted.values())),
            totals,
            0,
            False,
        )
        portions = p.Portions(p.DataPortion(salt, tuple(items)), ledger.salted(governance), ledger.salted(step))
        return (*refusal, self.written(Kind.STEP, portions))

    def _settled(self, grant: GrantRecord) -> dict[str, object]:
        """What an honest step says of the momentum of sources revoked since they were admitted."""
        momentum = self._policy(grant).momentum
        due = [
            source
            for source in sorted({held.source for held in self.manifest}.difference(grant.sources))
            if self._reason(source, grant) == Reason.SOURCE_REVOKED and self._is_unsettled(source, momentum)
        ]
        if momentum == "flush":
            return {"flushed": tuple(due)}
        return {"carried": tuple(p.CarriedMomentum(source, 500_000_000) for source in due)}

    def _is_unsettled(self, source: bytes, momentum: str) -> bool:
        value = self.ledger.state.get(usage_key(self.id, source))
        usage = None if value is None else read_record(value, Usage)
        return usage is not None and usage.admitted > 0 and usage.momentum not in ("flush", momentum)

    def rollback(self, reason: str = Reason.MEMORIZATION_ABOVE_THRESHOLD.value) -> CheckedEvent:
        """The last step on the log is discarded."""
        head, grant = self.head, self._grant()
        last = self.ledger.events[-1]
        assert isinstance(last.operation, p.StepOperation)
        self.snapshots.pop()
        self.attempt += 1
        rollback = p.Rollback(
            discarded=(last.id,),
            reason=reason,
            restored_root=self.root(),
            next_index=head.steps,
            next_attempt=self.attempt,
            memorization=last.operation.memorization,
        )
        self.attempt -= 1
        event = self.written(
            Kind.ROLLBACK,
            p.Portions(
                None,
                self.ledger.salted(p.RollbackGovernance(self.grant_id, grant.policy)),
                self.ledger.salted(rollback),
            ),
        )
        self.attempt += 1
        return event

    def evaluation(self, high_micro: int = 1_300_000, **fields: object) -> CheckedEvent:
        """The loss on held-out text, at most 1.5; missed with a ``high_micro`` beyond that."""
        loss = Metric("loss", 1_200_000, 1_100_000, high_micro, 950, "bootstrap", Threshold(AT_MOST, 1_500_000))
        made = Evaluation(
            name="held-out",
            steps=self.head.steps,
            parameter_root=self.root(),
            data=DataSlice("validation", digest("validation"), 64),
            script_name="evaluate.py",
            script_sha256=digest("script"),
            metrics=(loss,),
        )
        made = msgspec.structs.replace(made, **fields)
        return self.written(Kind.EVALUATION, p.Portions(None, None, self.ledger.salted(made)))

    def release(self) -> CheckedEvent:
        """The parameters as they stand, released."""
        release = p.Release(
            self.root(), self.head.steps, "model.safetensors", hashlib.sha256(self.weights_file()).digest()
        )
        return self.written(Kind.RELEASE, p.Portions(None, None, self.ledger.salted(release)))

    def _refusal(
        self, index: int, refused: dict[tuple[bytes, str], list[int]], grant: GrantRecord
    ) -> tuple[CheckedEvent, ...]:
        salt = self.ledger.salt()
        items = tuple(
            p.refusal_item(salt, number, source, why, tuple(sorted(examples)))
            for number, ((source, why), examples) in enumerate(sorted(refused.items()))
        )
        counts = tuple(
            p.Count(why, sum(len(held) for (_, reason), held in refused.items() if reason == why))
            for why in sorted({reason for _, reason in refused})
        )
        governance = p.RefusalGovernance(self.grant_id, grant.policy, counts)
        portions = p.Portions(
            p.DataPortion(salt, items),
            self.ledger.salted(governance),
            self.ledger.salted(p.RefusalOperation(index)),
        )
        return (self.written(Kind.REFUSAL, portions),)

    def _profiles(self, admitted: dict[bytes, list[int]], grant: GrantRecord) -> tuple[p.ClassProfile, ...]:
        policy = self._policy(grant)
        classes = sorted({self._source(source).claim.content_class for source in admitted})
        return tuple(maximum_profile(policy, name, 0, BLOCKS) for name in classes)

    def _reason(self, source: bytes, grant: GrantRecord) -> str:
        record = self._source(source)
        revoked = bool(record.revocation) and record.revoked_at_ms <= grant.opened_at_ms
        policy = self._policy(grant)
        why = why_refused(policy, record.claim, revoked, "research", grant.opened_at_ms, grant.closes_at_ms)
        return (why or Reason.SOURCE_NOT_GRANTED).value

    def _policy(self, grant: GrantRecord) -> p.Policy:
        value = self.ledger.state.get(POLICY_TABLE + grant.policy)
        assert value is not None
        return read_record(value, PolicyRecord).policy

    def _grant(self) -> GrantRecord:
        value = self.ledger.state.get(GRANT_TABLE + self.grant_id)
        assert value is not None
        return read_record(value, GrantRecord)

    def _source(self, source: bytes) -> SourceRecord:
        value = self.ledger.state.get(SOURCE_TABLE + source)
        assert value is not None
        return read_record(value, SourceRecord)


@dataclass(frozen=True)
class Story:
    """What ``story`` wrote, and the ids to find it by."""

    ledger: MemoryLedger
    run: CampaignRun
    books: bytes
    records: bytes
    archive: bytes
    weights: bytes


def begin(
    accumulator_window_steps: int = 0,
    job_scheme: SignatureScheme = SignatureScheme.ED25519,
    reserve_below: int = 0,
    **ledger_options: object,
) -> Story:
    """A ledger with a policy, three sources and an open campaign; nothing granted yet.

    ``books`` is the librarian's, class text; ``records`` the hospital's, class medical; ``archive`` the
    hospital's too, under a licence the policy does not admit. ``books`` and ``archive`` have the reserve.
    """
    ledger = MemoryLedger(**ledger_options)  # type: ignore[arg-type]
    books = ledger.source(LIBRARIAN, "books", reserve_below=reserve_below)
    records = ledger.source(HOSPITAL, "records", content_class="medical")
    archive = ledger.source(HOSPITAL, "archive", licence="LicenseRef-internal", reserve_below=reserve_below)
    ledger.seal(ledger.policy(), books, records, archive)
    sources = (books.id, records.id, archive.id)
    manifest = tuple(p.ManifestRange(source, 0, 8) for source in sources)
    run = CampaignRun(ledger, manifest, accumulator_window_steps=accumulator_window_steps, job_scheme=job_scheme)
    ledger.seal(*run.open())
    return Story(ledger, run, *sources, b"")


def story(released: bool = True, **ledger_options: object) -> Story:
    """Steps 1, 2, 3 (memorized, rolled back), 3, the hospital revokes ``records``, 4, a new grant, 5, 6, release;
    at last, evidence against the operator. The last weights miss a threshold, which governance accepts, and the
    hospital takes the first step again.
    """
    told = begin(**ledger_options)
    ledger, run = told.ledger, told.run
    ledger.seal(run.grant([told.books, told.records], 1, 4))
    for _ in range(2):
        ledger.seal(*run.step())
    ledger.seal(*run.step(flagged=told.records))
    ledger.seal(run.rollback())
    ledger.seal(*run.step())
    ledger.seal(ledger.revocation(HOSPITAL, told.records))
    ledger.seal(*run.step())
    ledger.seal(run.grant([told.books], 5, 6))
    ledger.seal(*run.step())
    ledger.seal(*run.step())
    missed = run.evaluation(high_micro=1_600_000)
    ledger.seal(missed)
    ledger.seal(ledger.decision(run.id, missed.id, ACCEPT))
    if released:
        ledger.seal(run.release())
    ledger.seal(ledger.audit_result(HOSPITAL, run.id))
    ledger.seal(ledger.evidence(HOSPITAL, ledger.contradiction(OPERATOR)))
    return Story(ledger, run, told.books, told.records, told.archive, run.weights_file())
