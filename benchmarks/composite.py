"""A campaign whose steps each list as many examples as asked for, by default as many as an event may.

Policy, source, delegation, opening and grant are made by hand with all members' keys, as a benchmark may; the steps by
the trainer client's own recorder. The operator's claims in them (roots, losses) mean nothing here.
"""

import hashlib
import os
import time
from collections.abc import Sequence

from consortium import FAR_FUTURE_MS, Author

from consensus import portions as p
from consensus.codec import decode, encode
from consensus.event import MAX_ENTRY_BYTES, Entry, Kind, event_id, make_entry, pack, sign_entry, unpack
from consensus.identifiers import Digest, MemberId
from consensus.job_key import job_key_id
from consensus.keys import Ed25519SigningKey
from consensus.policy import AUTHOR_SCHEMES
from consensus.sampler import presented_examples
from node.provision import Provisioned
from trainer_client.record import Permission, Recorder, StepOutcome, StepUse

EXAMPLES_A_STEP = p.MAX_EVENT_EXAMPLES
EXAMPLES_IN_SOURCE = 1_000_000
GRANT_MS = 86_400_000
BLOCK, CLASS = "all", "documentation"


class CompositeCampaign:
    """Events to post one after the other: ``opening``, each on the log before the next, then ``steps``."""

    def __init__(
        self,
        made: Provisioned,
        data_source: Author,
        governance: Author,
        operator: Author,
        batch_size: int = EXAMPLES_A_STEP,
    ) -> None:
        self._batch_size = batch_size
        self._chain_id = made.chain_id
        self._governance, self._operator, self._data_source = governance, operator, data_source
        self._job_key = Ed25519SigningKey(_bytes("job key"))
        self._campaign = _bytes("campaign")
        member = MemberId(operator.member.id)
        self._recorder = Recorder(made.chain_id, member, self._campaign, self._job_key, lambda: os.urandom(32))
        self._manifest: tuple[p.ManifestRange, ...] = ()
        self._permission = Permission(b"", b"")
        self.opening = tuple(self._opened())

    def steps(self, count: int) -> list[bytes]:
        """The next ``count`` step events, of ``batch_size`` examples each."""
        (presented,) = self._manifest
        made = []
        for _ in range(count):
            place = self._recorder.place
            examples = presented_examples(self._manifest, bytes(32), self._batch_size, place.steps + 1)
            root = Digest(_bytes(f"root {place.steps + 1}"))
            outcome = StepOutcome(place.root, root, (p.BlockDelta(1, root),), root, 1, 1, root, (), 1)
            use = StepUse(frozenset(examples), {})
            profile = p.ClassProfile(CLASS, 0, (1_000,))
            (step,) = self._recorder.step(self._permission, use, {presented.source: CLASS}, (profile,), outcome)
            made.append(step.encoded)
        return made

    def _opened(self) -> Sequence[bytes]:
        policy, policy_id = self._by(Kind.POLICY, [self._governance], governance=_policy())
        source, source_id = self._by(Kind.SOURCE, [self._data_source], data=_claim())
        key = job_key_id(self._job_key)
        delegation, _ = self._by(
            Kind.DELEGATION,
            [self._operator],
            operation=p.Delegation(self._campaign, key, self._job_key.scheme, 0, FAR_FUTURE_MS, b"", b""),
            campaign=self._campaign,
        )
        self._manifest = (p.ManifestRange(source_id, 0, EXAMPLES_IN_SOURCE),)
        tensor = p.Tensor("weight", "F32", (1,))
        terms = p.Campaign(
            name="composite events",
            purpose="research",
            policy=policy_id,
            job_key=key,
            base_model="none",
            base_root=_bytes("base"),
            base_provenance=b"",
            parameter_blocks=(p.ParameterBlock(BLOCK, (tensor,)),),
            routing_granularity="block",
            event_granularity="batch",
            sampler_seed=bytes(32),
            batch_size=self._batch_size,
            planned_steps=1_000_000,
            hyperparameters=(),
            environment=(),
            factors_digest=b"",
            accumulator_window_steps=0,
            sketch_rank=0,
            base_losses_sha256=b"",
        )
        campaign = self._recorder.open_campaign(terms, self._manifest).encoded
        closes_at_ms = int(time.time() * 1_000) + GRANT_MS - 60_000
        request = self._recorder.grant_request(1, policy_id, [source_id], 1, 1_000_000, closes_at_ms)
        wire = unpack(request.encoded)
        grant = self._signed(wire.entry, wire.portions, [self._governance, self._data_source, self._operator])
        self._permission = Permission(request.id, policy_id)
        return policy, source, delegation, campaign, grant

    def _by(
        self,
        kind: Kind,
        authors: Sequence[Author],
        data: p.Wire | None = None,
        governance: p.Wire | None = None,
        operation: p.Wire | None = None,
        campaign: bytes = bytes(32),
    ) -> tuple[bytes, Digest]:
        portions = p.Portions(
            None if data is None else p.DataPortion(os.urandom(32), (p.DataItem(encode(data)),)),
            None if governance is None else p.SaltedPortion(os.urandom(32), encode(governance)),
            None if operation is None else p.SaltedPortion(os.urandom(32), encode(operation)),
        )
        author = MemberId(authors[0].member.id)
        entry = make_entry(self._chain_id, kind, author, portions, campaign=campaign)
        return self._signed(encode(entry), encode(portions), authors), event_id(entry)

    def _signed(self, entry_bytes: bytes, portions_bytes: bytes, authors: Sequence[Author]) -> bytes:
        entry = decode(entry_bytes, Entry, MAX_ENTRY_BYTES)
        for author in authors:
            entry = sign_entry(entry, author.member.id, author.member.role, author.signer)
        return pack(entry, p.decode_portions(portions_bytes))


def _policy() -> p.Policy:
    return p.Policy(
        name="composite events",
        licences=("PSF-2.0",),
        purposes=("research",),
        classes=(p.ClassRule(CLASS, 1_000, ()),),
        entropy_edges_milli=(),
        memorization_threshold_permille=1_000,
        routing_granularities=("block",),
        event_granularities=("batch",),
        author_schemes=AUTHOR_SCHEMES,
        required_metadata=(),
        least_sketch_rank=0,
        auditors=(),
        custody=(),
        maximum_grant_steps=1_000_000,
        maximum_grant_duration_ms=GRANT_MS,
        global_clipping=False,
        revocation="drain",
        momentum="carry",
        rationale="",
    )


def _claim() -> p.SourceClaim:
    return p.SourceClaim(
        name="composite",
        content_root=_bytes("content"),
        example_count=EXAMPLES_IN_SOURCE,
        size_bytes=EXAMPLES_IN_SOURCE,
        licence="PSF-2.0",
        rights_basis="owner",
        purposes=("research",),
        content_class=CLASS,
        valid_from_ms=0,
        valid_until_ms=FAR_FUTURE_MS,
        statement="",
        overlap_sha256=b"",
        reserve_below=0,
    )


def _bytes(label: str) -> bytes:
    return hashlib.sha256(f"composite {label}".encode()).digest()
