"""What goes into a ledger block and what gets a vote: urgent events that have waited long stop no log."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from epoch_fixtures import change_event, next_membership
from ledger_fixtures import LIBRARIAN, CampaignRun, MemoryLedger

from consensus.block import Body, Header, decode_header
from consensus.branches import Verdict
from consensus.codec import decode, encode
from consensus.effect import RequestProposal
from consensus.event import CheckedEvent, Kind, pack_parts
from consensus.identifiers import Digest, MemberId, View
from consensus.membership import ED25519_LIST, Parameters
from consensus.portions import Abandon, BlockWeight, ClassRule, ManifestRange, Portions
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.transition import LedgerState
from consensus.vote import Proposal
from node.intake import Intake
from node.ledger import Finalized, Ledger
from node.mempool import MAX_WAIT_MS, Mempool
from node.messages import Events, FoundProposal, GetEvents, GetProposal, pack_gossip
from node.proposals import ARRIVAL_SECONDS, BUILT_WITHIN_MS, TRIED_PER_EVENT, Proposals
from node.store import Store
from node.voter import VotingKeys

CENSORSHIP_MS = 10_000
LONG_AGO_MS, LATELY_MS, NOW_MS = 0, 50_000, 50_500


class Clock:
    """Stands still, or goes on by ``tick_ms`` each time it is asked how long something takes."""

    def __init__(self, unix_ms: int) -> None:
        self._unix_ms = unix_ms
        self._monotonic_ms = NOW_MS
        self.tick_ms = 0

    def now_ms(self) -> int:
        return self._unix_ms

    def monotonic_ms(self) -> int:
        self._monotonic_ms += self.tick_ms
        return self._monotonic_ms

    def go_on(self, for_ms: int) -> None:
        self._unix_ms += for_ms
        self._monotonic_ms += for_ms


class Peers:
    """One peer, with the events it has at hand; nothing said of it is a complaint."""

    def __init__(self) -> None:
        self.connected: frozenset[MemberId] = frozenset()
        self.at_hand: list[CheckedEvent] = []
        self.asked: list[GetEvents] = []

    async def request(self, member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
        assert member in self.connected
        self.asked.append(decode(payload, GetEvents, 1 << 20))
        return encode(Events(tuple(map(packed, self.at_hand))))

    def complain(self, member: MemberId, why: Rejected) -> None:
        raise AssertionError(why)


class Desk:
    """One member's proposals over a log of its own."""

    def __init__(self, memory: MemoryLedger, directory: Path) -> None:
        self.memory = memory
        self.ledger = Ledger(Store.open(directory, memory.chain_id, create=True), memory.genesis)
        self.mempool = Mempool(1_000, 1 << 24)
        self.clock, self.peers = Clock(memory.genesis.created_ms + NOW_MS), Peers()
        self.intake = Intake(self.ledger, self.mempool, self.peers, self.clock, 1 << 20)  # type: ignore[arg-type]
        self.proposals = Proposals(
            self.ledger,
            self.peers,  # type: ignore[arg-type]
            self.mempool,
            self.intake,
            self.clock,
        )

    def hold(self, since_ms: int, *events: CheckedEvent) -> "Desk":
        for event in events:
            self.mempool.add(event, since_ms)
        return self

    def propose(self, view: int = 1, parent: Header | None = None) -> tuple[Proposal, tuple[CheckedEvent, ...]]:
        """The leader's ledger block, whoever that is; an empty one where nothing new waits."""
        made = self.build(view, parent, may_be_empty=True)
        assert made is not None
        return made, self.ledger.overlays[made.digest].events

    def build(self, view: int, parent: Header | None, may_be_empty: bool) -> Proposal | None:
        """What its leader proposes when asked."""
        leader = self.ledger.committee.leader(View(view))
        secrets = self.memory.secrets[leader.name]
        keys = VotingKeys(leader.id, secrets.identity, secrets.identity)
        asked = RequestProposal(View(view), parent or self.ledger.final.header, may_be_empty)
        return self.proposals.build(asked, keys)

    def judge(self, made: tuple[Proposal, tuple[CheckedEvent, ...]]) -> Verdict:
        proposal, events = made
        return self.proposals.judge(proposal, decode_header(proposal.header, self.memory.chain_id), list(events))

    def grow(self, ago_ms: int = 0) -> None:
        """An empty ledger block is on the log, made so long ago."""
        header = msgspec.structs.replace(self.ledger.final.header, timestamp_ms=self.clock.now_ms() - ago_ms)
        self.proposals.appended([Finalized(header, ())])

    async def verdict(self, made: tuple[Proposal, tuple[CheckedEvent, ...]], peer: MemberId) -> Verdict:
        """``judge``, of events that the leader passes on."""
        self.peers.connected = frozenset({peer})
        proposal = made[0]
        return await self.proposals.verdict(proposal, decode_header(proposal.header, self.memory.chain_id), [peer])


def packed(event: CheckedEvent) -> bytes:
    return pack_parts(event.entry_bytes, event.portions_bytes)


@pytest.fixture
def memory() -> MemoryLedger:
    parameters = Parameters(max_block_events=3, censorship_ms=CENSORSHIP_MS)
    return MemoryLedger(certificate_scheme=ED25519_LIST, parameters=parameters)


@pytest.fixture
def desks(memory: MemoryLedger, tmp_path: Path) -> Iterator[tuple[Desk, Desk]]:
    """A leader's and a voter's."""
    both = Desk(memory, tmp_path / "leader"), Desk(memory, tmp_path / "voter")
    yield both
    for desk in both:
        desk.ledger.store.close()


def policies(memory: MemoryLedger, count: int) -> list[CheckedEvent]:
    return [memory.policy(name=f"policy {number}") for number in range(count)]


def test_ledger_block_that_omits_what_it_could_append_is_refused(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    leader, voter = desks
    (omitted,) = policies(memory, 1)
    made = leader.hold(LATELY_MS, memory.source(LIBRARIAN, "instead")).propose()
    assert voter.hold(LATELY_MS, omitted).judge(made) is Verdict.VALID
    voter.mempool.remove(omitted.leaf_hash)
    assert voter.hold(LONG_AGO_MS, omitted).judge(made) is Verdict.REFUSED


def test_leader_proposes_nothing_while_all_that_waits_is_on_its_branch(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    leader, _ = desks
    first, second = (memory.source(LIBRARIAN, name) for name in ("first", "second"))
    made, events = leader.hold(LATELY_MS, first).propose()
    header = decode_header(made.header, memory.chain_id)
    assert events == (first,)
    assert leader.build(2, header, may_be_empty=False) is None
    assert leader.propose(2, header)[1] == ()
    assert leader.hold(LATELY_MS, second).build(2, header, may_be_empty=False) is not None
    assert leader.propose(2, header)[1] == (second,)


def test_leader_with_only_what_cannot_be_admitted_yet_tries_it_once(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """Others have it, too, and would wait for the leader's ledger block until their timers fire."""
    leader, _ = desks
    source = memory.source(LIBRARIAN, "late")
    leader.hold(LATELY_MS, memory.revocation(LIBRARIAN, source.id))
    assert leader.proposals.has_work()
    made = leader.build(1, None, may_be_empty=False)
    assert made is not None
    assert made.body.leaf_hashes == ()
    assert not leader.proposals.has_work()
    assert leader.build(1, None, may_be_empty=False) is None


def test_leader_stops_at_what_it_has_when_events_take_long_to_try(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    leader, voter = desks
    events = [memory.source(LIBRARIAN, f"source {number}") for number in range(3)]
    leader.hold(LATELY_MS, *events)
    leader.clock.tick_ms = BUILT_WITHIN_MS // 2
    made = leader.propose()
    assert [event.id for event in made[1]] == [event.id for event in events[:2]]
    assert voter.judge(made) is Verdict.VALID


def test_urgent_events_are_appended_however_long_they_take(memory: MemoryLedger, desks: tuple[Desk, Desk]) -> None:
    leader, _ = desks
    urgent = policies(memory, 3)
    leader.hold(LONG_AGO_MS, *urgent)
    leader.clock.tick_ms = 2 * BUILT_WITHIN_MS
    assert {event.id for event in leader.propose()[1]} == {event.id for event in urgent}


def test_revocation_that_waited_with_its_source_gets_in_one_ledger_block_later(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """Urgent events are tried first, so the revocation finds no source yet: no leader could do otherwise."""
    source = memory.source(LIBRARIAN, "waited")
    revocation = memory.revocation(LIBRARIAN, source.id)
    for desk in desks:
        desk.hold(LONG_AGO_MS, source, revocation)
    leader, voter = desks
    first = leader.propose()
    assert first[1] == (source,)
    assert voter.judge(first) is Verdict.VALID
    second = leader.propose(2, decode_header(first[0].header, memory.chain_id))
    assert second[1] == (revocation,), "though it was refused before and nothing has been appended since"
    assert voter.judge(second) is Verdict.VALID


def test_more_urgent_events_than_a_ledger_block_holds_are_appended_oldest_first(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    waited = policies(memory, 7)
    leader, voter = desks
    for number, event in enumerate(waited):
        leader.hold(number, event)
        voter.hold(7 - number, event)  # which heard of them the other way round
    first = leader.propose()
    assert list(first[1]) == waited[:3]
    assert voter.judge(first) is Verdict.VALID
    second = leader.propose(2, decode_header(first[0].header, memory.chain_id))
    assert list(second[1]) == waited[3:6]
    assert voter.judge(second) is Verdict.VALID


def test_full_ledger_block_of_newer_or_less_urgent_events_excuses_no_omission(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    omitted, *newer = policies(memory, 4)
    leader, voter = desks
    made = leader.hold(LATELY_MS, *newer).propose()
    assert len(made[1]) == 3
    assert voter.hold(LONG_AGO_MS, omitted).hold(LATELY_MS, *newer).judge(made) is Verdict.REFUSED
    sources = [memory.source(LIBRARIAN, f"source {number}") for number in range(3)]
    for event in newer:
        leader.mempool.remove(event.leaf_hash)
    made = leader.hold(LONG_AGO_MS, *sources).propose()
    assert voter.hold(LONG_AGO_MS, *sources).judge(made) is Verdict.REFUSED


def test_ledger_block_that_is_not_full_excuses_no_omission(memory: MemoryLedger, desks: tuple[Desk, Desk]) -> None:
    omitted, *others = policies(memory, 3)
    leader, voter = desks
    made = leader.hold(LONG_AGO_MS, *others).propose()
    assert voter.hold(LONG_AGO_MS, omitted, *others).judge(made) is Verdict.REFUSED
    empty = leader.propose(2, decode_header(made[0].header, memory.chain_id))
    assert empty[1] == ()
    assert voter.judge(empty) is Verdict.REFUSED


def test_of_two_urgent_events_that_exclude_each_other_one_is_enough(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    source = memory.source(LIBRARIAN, "revoked twice")
    memory.seal(source)
    leader, voter = desks
    for desk in desks:
        desk.hold(LATELY_MS, source)
    first = leader.propose()
    assert voter.judge(first) is Verdict.VALID
    revocations = [memory.revocation(LIBRARIAN, source.id) for _ in range(2)]
    for desk in desks:
        desk.hold(LONG_AGO_MS, *revocations)
    second = leader.propose(2, decode_header(first[0].header, memory.chain_id))
    assert len(second[1]) == 1
    assert voter.judge(second) is Verdict.VALID


def test_carrier_may_have_a_vote_though_urgent_events_wait(memory: MemoryLedger, desks: tuple[Desk, Desk]) -> None:
    """It must be empty: were it refused for that, an epoch whose last ledger block needs it would never end."""
    membership, _ = next_membership(memory.genesis, memory.committee, memory.secrets, add={"late": "operator"})
    change = change_event(memory, membership)
    leader, voter = desks
    for desk in desks:
        desk.hold(LATELY_MS, change)
    terminal = leader.propose()
    assert terminal[1] == (change,)
    assert voter.judge(terminal) is Verdict.VALID
    for desk in desks:
        desk.hold(LONG_AGO_MS, *policies(memory, 1))
    carrier = leader.propose(2, decode_header(terminal[0].header, memory.chain_id))
    assert carrier[1] == ()
    assert voter.judge(carrier) is Verdict.VALID


def test_change_of_members_may_not_be_omitted_and_goes_after_all_that_is_urgent(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """Whoever is to be removed would leave it out; and what it wants to keep out must not fall behind the change."""
    membership, _ = next_membership(memory.genesis, memory.committee, memory.secrets, add={"late": "operator"})
    change = change_event(memory, membership)
    (policy,) = policies(memory, 1)
    source = memory.source(LIBRARIAN, "instead")
    leader, voter = desks
    without_change = leader.hold(LATELY_MS, source, policy).propose()
    assert voter.hold(LONG_AGO_MS, change).hold(LATELY_MS, policy).judge(without_change) is Verdict.REFUSED
    leader.mempool.remove(policy.leaf_hash)
    leader.mempool.remove(source.leaf_hash)
    without_policy = leader.hold(LONG_AGO_MS, change).propose()
    voter.mempool.remove(policy.leaf_hash)
    assert voter.hold(LONG_AGO_MS, policy).judge(without_policy) is Verdict.REFUSED
    both = leader.hold(LONG_AGO_MS + 1, policy).hold(LONG_AGO_MS, source).propose()
    assert both[1] == (policy, change)
    assert voter.judge(both) is Verdict.VALID


def test_urgent_events_are_told_in_order_of_arrival(memory: MemoryLedger) -> None:
    mempool = Mempool(10, 1 << 20)
    events = policies(memory, 4)
    for since_ms, event in zip((3, 1, 4, 2), events, strict=True):
        mempool.add(event, since_ms)
    assert [waiting.event for waiting in mempool.urgent_before(4)] == [events[0], events[1], events[3]]
    assert mempool.urgent_before(1) == []


def test_urgent_event_that_waits_and_could_be_appended_is_passed_on_once(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """Its sender may have told this member alone, which would refuse what others propose without it."""
    desk = desks[0]
    waits, new = policies(memory, 2)
    needs_a_source = memory.revocation(LIBRARIAN, Digest(bytes(32)))
    ordinary = memory.source(LIBRARIAN, "ordinary")
    desk.hold(LONG_AGO_MS, waits, needs_a_source, ordinary).hold(LATELY_MS, new)
    desk.proposals.settle()
    assert desk.intake.take_outgoing() == [packed(waits)]
    desk.clock.go_on(CENSORSHIP_MS)
    desk.proposals.settle()
    assert desk.intake.take_outgoing() == [packed(new)]


def test_urgent_event_for_which_a_vote_is_refused_is_passed_on_at_once(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    leader, voter = desks
    (policy,) = policies(memory, 1)
    assert voter.hold(LONG_AGO_MS, policy).judge(leader.propose()) is Verdict.REFUSED
    assert voter.intake.take_outgoing() == [packed(policy)]


def test_urgent_events_that_wait_for_what_never_comes_cost_little_and_hide_those_of_no_other(
    memory: MemoryLedger, desks: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.proposals.NOT_YET_TRIED", 3)
    leader, voter = desks
    in_vain = [memory.revocation(LIBRARIAN, Digest(bytes([number]) * 32)) for number in range(10)]
    of_the_same, of_another = policies(memory, 2)
    for event in (*in_vain, of_the_same):
        voter.mempool.add(event, LONG_AGO_MS, MemberId(b"m" * 32))
    voter.mempool.add(of_another, LONG_AGO_MS, MemberId(b"n" * 32))
    tried: list[CheckedEvent] = []
    admissible = voter.proposals._is_admissible

    def note(state: LedgerState, event: CheckedEvent, timestamp_ms: int) -> bool:
        tried.append(event)
        return admissible(state, event, timestamp_ms)

    monkeypatch.setattr(voter.proposals, "_is_admissible", note)
    assert voter.judge(leader.propose()) is Verdict.REFUSED
    assert set(tried) & set(in_vain) == set(in_vain[:3])
    assert voter.intake.take_outgoing() == [packed(of_another)]
    voter.mempool.remove(of_another.leaf_hash)
    for first in (3, 6):
        tried.clear()
        assert voter.judge(leader.propose()) is Verdict.VALID
        assert tried == in_vain[first : first + 3], "the next look is at others"
    assert voter.judge(leader.propose()) is Verdict.REFUSED
    assert voter.intake.take_outgoing() == [packed(of_the_same)]


def test_any_number_of_urgent_events_in_vain_hide_none_from_the_leader_either(
    memory: MemoryLedger, desks: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.proposals.NOT_YET_TRIED", 3)
    monkeypatch.setattr("node.proposals.TRIED_PER_EVENT", 2)
    leader = desks[0]
    (urgent,) = policies(memory, 1)
    for number in range(40):
        leader.mempool.add(memory.revocation(LIBRARIAN, Digest(bytes([number]) * 32)), LATELY_MS, OTHER)
    leader.mempool.add(urgent, LATELY_MS, OTHER)
    assert BusyLog(leader).blocks_until(urgent, 10)


def test_urgent_event_is_passed_on_each_time_that_a_vote_is_refused_for_it(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """Whom it was told may have had no room for it then."""
    leader, voter = desks
    (policy,) = policies(memory, 1)
    voter.hold(LONG_AGO_MS, policy).proposals.settle()
    for view in (1, 2):
        assert voter.judge(leader.propose(view)) is Verdict.REFUSED
    assert voter.intake.take_outgoing() == [packed(policy)] * 3


@pytest.mark.trio
async def test_events_that_keep_coming_by_gossip_are_not_asked_for(
    memory: MemoryLedger, desks: tuple[Desk, Desk], autojump_clock: trio.testing.MockClock
) -> None:
    leader, voter = desks
    made = leader.hold(LATELY_MS, *(memory.source(LIBRARIAN, f"source {number}") for number in range(3))).propose()

    async def pass_on() -> None:
        for event in made[1]:
            await trio.sleep(0.6 * ARRIVAL_SECONDS)
            assert voter.intake.receive(memory.ids[LIBRARIAN], pack_gossip([packed(event)])) == 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on)
        assert await voter.verdict(made, memory.ids[LIBRARIAN]) is Verdict.VALID
    assert voter.peers.asked == []


@pytest.mark.trio
async def test_event_that_never_comes_is_asked_for_however_many_others_do(
    memory: MemoryLedger, desks: tuple[Desk, Desk], autojump_clock: trio.testing.MockClock
) -> None:
    leader, voter = desks
    made = leader.hold(LATELY_MS, *(memory.source(LIBRARIAN, f"source {number}") for number in range(3))).propose()
    first, *kept_back = made[1]
    voter.hold(LATELY_MS, first)
    voter.peers.at_hand = kept_back
    begun = trio.current_time()
    with trio.CancelScope() as others:
        async with trio.open_nursery() as nursery:

            async def pass_others_on() -> None:
                for number in range(1_000):
                    event = packed(memory.source(LIBRARIAN, f"other {number}"))
                    voter.intake.receive(memory.ids[LIBRARIAN], pack_gossip([event]))
                    await trio.sleep(0.5 * ARRIVAL_SECONDS)

            nursery.start_soon(pass_others_on)
            assert await voter.verdict(made, memory.ids[LIBRARIAN]) is Verdict.VALID
            others.cancel()
    assert trio.current_time() - begun <= 2 * ARRIVAL_SECONDS
    assert [set(asked.leaf_hashes) for asked in voter.peers.asked] == [{event.leaf_hash for event in kept_back}]


@pytest.mark.trio
async def test_event_that_was_asked_for_is_not_checked_again_when_it_comes_by_gossip(
    memory: MemoryLedger, desks: tuple[Desk, Desk], autojump_clock: trio.testing.MockClock
) -> None:
    leader, voter = desks
    made = leader.hold(LATELY_MS, memory.source(LIBRARIAN, "asked for")).propose()
    voter.peers.at_hand = list(made[1])
    assert await voter.verdict(made, memory.ids[LIBRARIAN]) is Verdict.VALID
    (event,) = made[1]
    spoiled = pack_parts(event.entry_bytes, event.portions_bytes[:-1])
    with pytest.raises(Rejected):
        voter.intake.check(spoiled)
    assert voter.intake.receive(memory.ids[LIBRARIAN], pack_gossip([packed(event), spoiled])) == 0
    assert voter.mempool.get(event.leaf_hash) is not None
    assert voter.intake.refused == {}


@pytest.mark.trio
async def test_peer_that_answers_with_what_nobody_asked_for_fills_no_pool(
    memory: MemoryLedger, desks: tuple[Desk, Desk], autojump_clock: trio.testing.MockClock
) -> None:
    leader, voter = desks
    made = leader.hold(LATELY_MS, memory.source(LIBRARIAN, "kept back")).propose()
    voter.peers.at_hand = [memory.source(LIBRARIAN, "another")]
    assert await voter.verdict(made, memory.ids[LIBRARIAN]) is Verdict.MISSING
    assert len(voter.peers.asked) == 1
    assert len(voter.mempool) == 0


@pytest.mark.trio
async def test_fetched_event_larger_than_gossip_allows_is_judged_and_never_proposed(
    memory: MemoryLedger, desks: tuple[Desk, Desk], autojump_clock: trio.testing.MockClock
) -> None:
    leader, voter = desks
    blocks = tuple(BlockWeight(f"{number:0100}", 0) for number in range(4_000))
    large = memory.policy(classes=tuple(ClassRule(name, 0, blocks) for name in ("a", "b", "c")))
    assert len(packed(large)) > 1 << 20
    made = leader.hold(LATELY_MS, memory.source(LIBRARIAN, "small")).propose()
    proposal = made[0]
    lying = msgspec.structs.replace(proposal, body=Body((large.leaf_hash,)))
    voter.peers.at_hand = [large]
    voter.peers.connected = frozenset({memory.ids[LIBRARIAN]})
    header = decode_header(proposal.header, memory.chain_id)
    verdict = await voter.proposals.verdict(lying, header, [memory.ids[LIBRARIAN]])
    assert verdict is Verdict.INVALID
    assert len(voter.mempool) == 0
    assert len(voter.hold(LATELY_MS, memory.source(LIBRARIAN, "own")).propose(2)[1]) == 1


@pytest.mark.trio
async def test_holders_that_say_nothing_delay_a_ledger_block_by_a_moment_each(
    memory: MemoryLedger,
    desks: tuple[Desk, Desk],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    leader, voter = desks
    withheld = memory.source(LIBRARIAN, "withheld")
    proposal, _ = leader.hold(LATELY_MS, withheld).propose()
    silent, honest = [MemberId(bytes([number]) * 32) for number in range(3)], MemberId(bytes([9]) * 32)

    async def request(member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
        if member in silent:
            await trio.sleep(timeout_seconds)
            raise Unavailable("no answer")
        if isinstance(decode(payload, GetEvents | GetProposal, 1 << 20), GetProposal):  # type: ignore[arg-type]
            return encode(FoundProposal(encode(proposal)))
        return encode(Events((packed(withheld),)))

    monkeypatch.setattr(voter.peers, "request", request)
    voter.peers.connected = frozenset([*silent, honest])

    header = decode_header(proposal.header, memory.chain_id)
    most_seconds = ARRIVAL_SECONDS + 1
    with trio.fail_after(most_seconds):
        assert await voter.proposals.verdict(proposal, header, silent) is Verdict.VALID
    with trio.fail_after(most_seconds):
        assert await voter.proposals.fetch(proposal.digest, silent) == (proposal, honest)


@pytest.mark.trio
async def test_event_that_gossip_brings_while_the_last_holder_is_silent_is_found(
    memory: MemoryLedger,
    desks: tuple[Desk, Desk],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    leader, voter = desks
    late = memory.source(LIBRARIAN, "late")
    made = leader.hold(LATELY_MS, late).propose()

    async def request(member: MemberId, payload: bytes, timeout_seconds: float) -> bytes:
        await trio.sleep(0.5 * timeout_seconds)
        assert voter.intake.receive(memory.ids[LIBRARIAN], pack_gossip([packed(late)])) == 1
        raise Unavailable("no answer")

    monkeypatch.setattr(voter.peers, "request", request)
    assert await voter.verdict(made, memory.ids[LIBRARIAN]) is Verdict.VALID


def test_proposal_that_may_not_be_on_disk_yet_is_served_to_nobody(desks: tuple[Desk, Desk]) -> None:
    desk, _ = desks
    ours, _ = desk.propose()
    assert desk.proposals.get(ours.digest) is ours
    assert desk.proposals.served(ours.digest) is None
    desk.proposals.sent(ours.digest)
    assert desk.proposals.served(ours.digest) is ours


def test_proposals_long_on_the_log_are_forgotten(desks: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    desk, _ = desks
    monkeypatch.setattr("node.proposals.FINAL_KEPT", 1)
    made = [desk.propose(view)[0] for view in (1, 2, 3)]
    for proposal in made[:2]:
        desk.proposals.appended([Finalized(decode_header(proposal.header, desk.memory.chain_id), ())])
    assert [desk.proposals.get(proposal.digest) is proposal for proposal in made] == [False, True, True]


def test_event_that_waits_for_a_log_that_stands_still_is_not_thrown_away(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """Its quorum may be gone for days; the first ledger block after that must not end its patience either."""
    desk, _ = desks
    revocation = memory.revocation(LIBRARIAN, memory.source(LIBRARIAN, "not handed in yet").id)
    desk.hold(LATELY_MS, revocation)
    for _ in range(3):
        desk.clock.go_on(2 * MAX_WAIT_MS)
        desk.proposals.settle()
        assert desk.mempool.find(revocation.id) is not None
        desk.grow()
        desk.proposals.settle()
        assert desk.mempool.find(revocation.id) is not None


def test_event_is_not_too_old_while_its_node_catches_up(memory: MemoryLedger, desks: tuple[Desk, Desk]) -> None:
    """It may be final in ledger blocks that are still to come."""
    desk, _ = desks
    revocation = memory.revocation(LIBRARIAN, memory.source(LIBRARIAN, "not handed in yet").id)
    desk.hold(LATELY_MS, revocation)
    for _ in range(2 * MAX_WAIT_MS // 10_000):
        desk.clock.go_on(10_000)
        desk.grow(ago_ms=3_600_000)
        desk.proposals.settle()
    assert desk.mempool.find(revocation.id) is not None


@pytest.mark.trio
async def test_event_that_waited_too_long_for_others_is_rejected_by_name_and_whoever_waits_is_told(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    desk, _ = desks
    revocation = memory.revocation(LIBRARIAN, memory.source(LIBRARIAN, "never handed in").id)
    desk.hold(LATELY_MS, revocation)
    desk.propose()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.intake.wait, revocation.id)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(MAX_WAIT_MS // memory.genesis.parameters.heartbeat_ms):
            assert desk.mempool.find(revocation.id) is not None
            desk.clock.go_on(memory.genesis.parameters.heartbeat_ms)
            desk.grow()
            desk.proposals.settle()
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
    assert len(desk.mempool) == 0
    why = desk.mempool.rejection(revocation.id)
    assert why is not None
    assert why.reason is Reason.SEQUENCE_GAP
    assert desk.intake.refused == {"sequence-gap": 1}
    assert not desk.proposals.has_work()


TRIED = 3 * TRIED_PER_EVENT
"""By the leader of one ledger block."""
OTHER = MemberId(b"o" * 32)


class BusyLog:
    """A leader's branch that grows with each ledger block, also by what others bring."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.view = desk, 0
        self.parent: Header | None = None

    def grow(self) -> tuple[CheckedEvent, ...]:
        """What goes into the next ledger block."""
        self.view += 1
        made, events = self.desk.propose(self.view, self.parent)
        self.parent = decode_header(made.header, self.desk.memory.chain_id)
        elsewhere = self.desk.memory.source(LIBRARIAN, f"elsewhere {self.view}")
        self.desk.proposals.appended([Finalized(self.parent, (*events, elsewhere))])
        return events

    def blocks_until(self, event: CheckedEvent, most: int) -> int:
        """How many ledger blocks it takes until one has the event."""
        return next(count for count in range(1, most + 1) if event in self.grow())


def orphans(memory: MemoryLedger, first: int, count: int) -> list[CheckedEvent]:
    """Of campaigns that nobody opened, by keys that nobody delegated."""
    return [
        CampaignRun(memory, (), name=f"nobody's {number}").written(
            Kind.ABANDON, Portions(None, None, memory.salted(Abandon("")))
        )
        for number in range(first, first + count)
    ]


def delegated_late(memory: MemoryLedger, log: BusyLog) -> tuple[CheckedEvent, CheckedEvent]:
    """A campaign that can be opened once its job key's delegation, the first of the two, is on the log."""
    policy, source = memory.policy(), memory.source(LIBRARIAN, "books")
    memory.seal(policy, source)
    log.desk.hold(LATELY_MS, policy, source)
    assert set(log.grow()) == {policy, source}
    return CampaignRun(memory, (ManifestRange(source.id, 0, 8),), batch_size=4).open()


def test_events_that_cannot_be_admitted_yet_stop_no_later_one_of_the_same_node(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    """What others bring has those before it tried again, each time."""
    desk, _ = desks
    log, honest = BusyLog(desk), memory.source(LIBRARIAN, "honest")
    desk.hold(LATELY_MS, *orphans(memory, 0, 5 * TRIED), honest)
    assert log.blocks_until(honest, 20) <= 11
    late = memory.source(LIBRARIAN, "late")
    desk.hold(LATELY_MS, late)
    assert log.blocks_until(late, 20) == 1


def test_event_that_was_refused_once_is_appended_though_new_ones_come_without_end(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    desk, _ = desks
    log = BusyLog(desk)
    delegation, campaign = delegated_late(memory, log)
    desk.hold(LATELY_MS, campaign)
    assert log.grow() == ()
    appended: list[CheckedEvent] = []
    for number in range(12):
        desk.hold(LATELY_MS, *orphans(memory, 2 * TRIED * number, 2 * TRIED))
        if number == 3:
            desk.mempool.add(delegation, LATELY_MS, OTHER)
        appended += log.grow()
    assert appended == [delegation, campaign]


def test_event_behind_many_that_were_refused_is_appended_soon_after_what_it_waits_for(
    memory: MemoryLedger, desks: tuple[Desk, Desk]
) -> None:
    desk, _ = desks
    log = BusyLog(desk)
    delegation, campaign = delegated_late(memory, log)
    desk.hold(LATELY_MS, *orphans(memory, 0, 5 * TRIED), campaign)
    for _ in range(12):
        assert log.grow() == ()
    desk.mempool.add(delegation, LATELY_MS, OTHER)
    assert log.blocks_until(delegation, 1) == 1
    assert log.blocks_until(campaign, 20) <= 6


def test_events_count_as_by_an_unknown_job_key_until_its_delegation_is_on_the_log(
    memory: MemoryLedger, desks: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, _ = desks
    monkeypatch.setattr("node.mempool.ORPHANS", 500)
    log = BusyLog(desk)
    delegation, campaign = delegated_late(memory, log)
    first, second, third = orphans(memory, 0, 3)
    for event in (campaign, first):
        desk.intake.submit(packed(event))
    with pytest.raises(Rejected, match="overloaded"):
        desk.intake.submit(packed(second))
    desk.intake.submit(packed(delegation))
    assert delegation in log.grow()
    desk.intake.submit(packed(second))
    with pytest.raises(Rejected, match="overloaded"):
        desk.intake.submit(packed(third))
    voted_for = orphans(memory, 3, 4)
    desk.intake.restore(map(packed, voted_for))
    assert len(list(desk.proposals.held_events(event.leaf_hash for event in voted_for))) == 4
