"""Every event a recorder builds is one the log's own rules admit, in the place the recorder says."""

import hashlib
import itertools
from dataclasses import dataclass

import pytest
from fake_node import SALT, FakeNode

from consensus import portions as p
from consensus.codec import decode
from consensus.event import MAX_ENTRY_BYTES, Entry, Kind, unpack
from consensus.identifiers import Digest
from consensus.keys import Ed25519SigningKey
from consensus.policy import maximum_profile
from consensus.rejection import InvariantBroken, Reason, Rejected
from consensus.sampler import presented_examples
from trainer_client.record import Permission, Place, RecordedEvent, Recorder, StepOutcome, StepUse, count_reasons

CAMPAIGN = bytes([7]) * 32
BLOCKS = ("embedding", "head")


def root(number: int) -> Digest:
    return Digest(hashlib.sha256(b"root %d" % number).digest())


@dataclass
class Scene:
    """A ledger with a policy, two admitted sources and a refused one, and a recorder for a campaign over them."""

    node: FakeNode
    recorder: Recorder
    policy: bytes
    sources: dict[str, bytes]
    classes: dict[bytes, str]
    manifest: tuple[p.ManifestRange, ...]

    def take(self, *events: RecordedEvent) -> None:
        for event in events:
            self.node.take(event.encoded)
            assert event.id in self.node.events, event.kind

    def open(self) -> None:
        terms = p.Campaign(
            name="a campaign",
            purpose="fine-tuning",
            policy=self.policy,
            job_key=KEY.public_key,
            base_model="base",
            base_root=root(0),
            base_provenance=b"",
            parameter_blocks=tuple(p.ParameterBlock(name, (p.Tensor(name, "F32", (2,)),)) for name in BLOCKS),
            routing_granularity="block",
            event_granularity="batch",
            sampler_seed=bytes(32),
            batch_size=6,
            planned_steps=10,
            hyperparameters=(),
            environment=(),
            factors_digest=b"",
            accumulator_window_steps=0,
            sketch_rank=0,
            base_losses_sha256=b"",
        )
        self.take(self.recorder.open_campaign(terms, self.manifest))

    def grant(self) -> Permission:
        admitted = [self.sources["manual"], self.sources["paper"]]
        closes_at_ms = self.node.now_ms + 60_000
        sequence = self.node.head(CAMPAIGN).next_grant
        request = self.recorder.grant_request(sequence, self.policy, admitted, 1, 10, closes_at_ms)
        self.node.request_grant(request.encoded)
        assert request.id in self.node.events
        return Permission(request.id, self.policy)

    def use(self, step: int, recited: frozenset[tuple[bytes, int]] = frozenset()) -> StepUse:
        shown = presented_examples(self.manifest, bytes(32), 6, step)
        refused = {one: "memorization-above-threshold" for one in shown if one in recited}
        refused |= {one: "licence-not-admitted" for one in shown if one[0] == self.sources["secret"]}
        return StepUse(frozenset(shown) - refused.keys(), refused)

    def events(
        self, permission: Permission, use: StepUse, after: Digest, signals: tuple[p.MemorizationSignal, ...] = ()
    ) -> tuple[RecordedEvent, ...]:
        policy = self.node.policy_record()
        admitted = sorted({self.classes[source] for source, _ in use.admitted})
        profiles = [maximum_profile(policy, name, 0, BLOCKS) for name in admitted]
        outcome = StepOutcome(
            root_before=self.recorder.place.root,
            root_after=after,
            deltas=(p.BlockDelta(5 if use.admitted else 0, bytes(32)), p.BlockDelta(0, bytes(32))),
            optimizer_digest=bytes(32),
            learning_rate_nano=1,
            loss_micro=2,
            rng_digest=bytes(32),
            memorization=signals,
            step_microseconds=3,
        )
        return self.recorder.step(permission, use, self.classes, profiles, outcome)

    def agrees(self) -> None:
        """The recorder stands exactly where the log stands."""
        head = self.node.head(CAMPAIGN)
        undo = Digest(head.undo_root) if head.undo_root else None
        place = Place(head.next_sequence, head.attempt, head.steps, Digest(head.root), Digest(head.last_event), undo)
        assert self.recorder.place == place


KEY = Ed25519SigningKey(bytes([9]) * 32)


@pytest.fixture
def scene() -> Scene:
    node = FakeNode()
    policy = node.policy()
    examples = [b"example %d" % number for number in range(8)]
    sources = {
        "manual": node.source("manual", examples),
        "paper": node.source("paper", examples, owner="data-source-2", content_class="news"),
        "secret": node.source("secret", examples, licence="LicenseRef-Proprietary"),
    }
    node.delegate(CAMPAIGN, KEY)
    counter = itertools.count()
    recorder = Recorder(
        node.chain_id,
        node.member_id("operator-1"),
        CAMPAIGN,
        KEY,
        lambda: hashlib.sha256(b"%d" % next(counter)).digest(),
    )
    made = Scene(
        node,
        recorder,
        policy,
        sources,
        {sources["manual"]: "documentation", sources["paper"]: "news", sources["secret"]: "documentation"},
        tuple(p.ManifestRange(source, 0, 8) for source in sorted(sources.values())),
    )
    made.open()
    return made


def test_campaign_from_opening_to_release_is_admitted(scene: Scene) -> None:
    scene.agrees()
    permission = scene.grant()
    for step in range(1, 6):
        events = scene.events(permission, scene.use(step), root(step))
        scene.take(*events)
        scene.agrees()
    scene.take(scene.recorder.release("tuned.safetensors", bytes(32)))
    head = scene.node.head(CAMPAIGN)
    assert (head.closed, head.steps, head.presented) == ("released", 5, 30)
    assert head.refused == sum(len(scene.use(step).refused) for step in range(1, 6)) > 0
    assert head.presented == head.admitted + head.refused


def test_refusal_and_step_bear_one_signature(scene: Scene) -> None:
    events = scene.events(scene.grant(), scene.use(1), root(1))
    assert [event.kind for event in events] == [Kind.REFUSAL, Kind.STEP]
    entries = [decode(unpack(event.encoded).entry, Entry, MAX_ENTRY_BYTES) for event in events]
    refused, stepped = (entry.signatures[0].signature for entry in entries)
    assert refused[:64] == stepped[:64]
    assert (len(refused), len(stepped)) == (104, 104)
    scene.take(*events)
    scene.agrees()


def test_recited_step_is_rolled_back_and_repeated_without_the_example(scene: Scene) -> None:
    permission = scene.grant()
    use = scene.use(1)
    source, example = recited = min(use.admitted)
    signals = (p.MemorizationSignal(source, example, 900),)
    events = scene.events(permission, use, root(1), signals)
    scene.take(*events)
    assert scene.node.head(CAMPAIGN).rollback_required
    reason = Reason.MEMORIZATION_ABOVE_THRESHOLD.value
    scene.take(scene.recorder.rollback(permission, [events[-1].id], reason, signals))
    scene.agrees()
    assert scene.recorder.place.root == root(0)
    again = scene.use(1, frozenset({recited}))
    scene.take(*scene.events(permission, again, root(11)))
    scene.agrees()
    assert (scene.recorder.place.attempt, scene.recorder.place.steps) == (1, 1)


def test_step_of_refused_examples_alone_is_admitted_and_moves_nothing(scene: Scene) -> None:
    permission = scene.grant()
    use = scene.use(1)
    refused = {one: use.refused.get(one, "memorization-above-threshold") for one in (*use.admitted, *use.refused)}
    scene.take(*scene.events(permission, StepUse(frozenset(), refused), root(0)))
    scene.agrees()
    assert scene.node.head(CAMPAIGN).root == root(0)


def test_refused_step_is_discarded_and_the_next_attempt_admitted(scene: Scene) -> None:
    permission = scene.grant()
    scene.take(*scene.events(permission, scene.use(1), root(1)))
    stands = scene.recorder.place
    lost = [scene.events(permission, scene.use(step), root(step))[-1] for step in (2, 3)]
    scene.recorder.move_to(stands)
    scene.take(scene.recorder.rollback(permission, [lost[1].id, lost[0].id], "step-not-admitted"))
    scene.agrees()
    scene.take(*scene.events(permission, scene.use(2), root(22)))
    scene.agrees()
    assert scene.node.head(CAMPAIGN).discarded_steps == 2
    for event in lost:
        with pytest.raises(Rejected):
            scene.node.take(event.encoded)


def test_abandoned_campaign_is_closed(scene: Scene) -> None:
    scene.take(scene.recorder.abandon("the operator stops"))
    assert scene.node.head(CAMPAIGN).closed == "abandoned"


def test_rollback_of_an_opening_event_is_our_own_mistake(scene: Scene) -> None:
    with pytest.raises(InvariantBroken, match="not a step"):
        scene.recorder.rollback(Permission(SALT, SALT), [scene.recorder.place.last_event], "operator-decision")


def test_step_from_another_root_is_our_own_mistake(scene: Scene) -> None:
    permission = scene.grant()
    outcome = StepOutcome(root(5), root(6), (), bytes(32), 0, 0, bytes(32), (), 0)
    with pytest.raises(InvariantBroken, match="starts from"):
        scene.recorder.step(permission, StepUse(frozenset(), {}), {}, (), outcome)


def test_recorder_without_a_campaign_has_no_place(scene: Scene) -> None:
    fresh = Recorder(scene.node.chain_id, scene.node.member_id("operator-1"), CAMPAIGN, KEY, lambda: SALT)
    with pytest.raises(InvariantBroken, match="not been opened"):
        fresh.abandon("never opened")


def test_grant_request_is_unsigned_and_its_id_survives_signing(scene: Scene) -> None:
    permission = scene.grant()
    event = scene.node.events[Digest(permission.grant)]
    assert event.entry.kind is Kind.GRANT
    assert len(event.entry.signatures) == 4


def test_reasons_are_counted_in_order() -> None:
    counts = count_reasons(["b", "a", "b"])
    assert counts == (p.Count("a", 1), p.Count("b", 2))
    assert count_reasons([]) == ()
