"""The grant desk over real nodes: consent gathered, withheld, given by hand, and asked for by those who may not."""

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from epoch_fixtures import begin_epoch
from ledger_fixtures import (
    GOVERNANCE,
    LIBRARIAN,
    OPERATOR,
    YEAR_MS,
    CampaignRun,
    MemoryLedger,
    begin,
    digest,
)
from network_fixtures import make_parties, network_of
from node_fixtures import Consortium, running, until
from rogue_fixtures import Answer, Rogue, silent
from snapshot_fixtures import written

from consensus import portions as p
from consensus.codec import decode, encode
from consensus.event import CheckedEvent, EventSignature, Kind, pack, pack_parts, sign_entry
from consensus.identifiers import Digest, MemberId
from consensus.job_key import job_key_id
from consensus.membership import committee
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.state_map import StateMap
from node import countersign
from node.config import CountersignSection
from node.countersign import CountersignDesk
from node.messages import AskCountersign, Countersigned, DeliverSignature, decode_request
from node.runner import Node
from node.service import EventState, GrantState

pytestmark = pytest.mark.trio

COUNTS = {"data-source": 2, "governance": 3, "operator": 1}
THRESHOLDS = {"data-source": 2, "governance": 2, "operator": 1}
TWO_OPERATORS = {"data-source": 2, "governance": 1, "operator": 3}
TWO_OF_THREE = {"data-source": 2, "governance": 1, "operator": 2}
BY_HAND = CountersignSection(auto=False)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class LiveLedger(MemoryLedger):
    """What ``CampaignRun`` asks of a ledger, answered by a running node at this moment."""

    def __init__(self, consortium: Consortium) -> None:
        self.genesis = msgspec.structs.replace(consortium.genesis, created_ms=now_ms() - 60_000)
        self.secrets = consortium.secrets
        self.committee = committee(consortium.genesis)
        self.ids = {member.name: member.id for member in consortium.genesis.members}
        self.chain_id = consortium.genesis.chain_id
        self.node_asked: Node | None = None
        self._salts = 0

    @property
    def state(self) -> StateMap:
        assert self.node_asked is not None
        return self.node_asked.ledger.final.state

    @property
    def now_ms(self) -> int:
        return now_ms()


class Scene:
    """Running nodes with a policy, one source of each owner and an open campaign of each operator."""

    def __init__(self, consortium: Consortium, nodes: Sequence[Node]) -> None:
        self.consortium = consortium
        self.nodes = {node.name: node for node in nodes}
        self.live = LiveLedger(consortium)
        self.live.node_asked = nodes[0]
        self.sources: list[bytes] = []
        self.runs: dict[str, CampaignRun] = {}

    @property
    def operator(self) -> Node:
        return self.nodes["operator-1"]

    async def prepare(self) -> None:
        live = self.live
        until_ms = now_ms() + YEAR_MS
        sources = [live.source(f"data-source-{number}", "books", valid_until_ms=until_ms) for number in (1, 2)]
        self.sources = sorted(source.id for source in sources)
        await self.final(live.policy(), *sources)
        manifest = tuple(p.ManifestRange(source, 0, 8) for source in self.sources)
        for name in sorted(name for name in live.ids if name.startswith("operator")):
            self.runs[name] = CampaignRun(live, manifest, name=f"campaign of {name}", operator=name)
            await self.final(*self.runs[name].open())

    async def final(self, *events: CheckedEvent) -> None:
        for event in events:
            self.operator.submit(pack_parts(event.entry_bytes, event.portions_bytes))
        await until(
            lambda: all(
                node.status_of(event.id).state is EventState.FINAL for event in events for node in self.nodes.values()
            )
        )

    def unsigned(self, operator: str = "operator-1", minutes: int = 60) -> bytes:
        """A grant of all sources, as a job asks for it."""
        event = self.runs[operator].grant(self.sources, 1, 4, minutes=minutes)
        return pack(msgspec.structs.replace(event.entry, signatures=()), event.portions)

    def state_of(self, grant: Digest) -> GrantState:
        return self.operator.desk.status(grant).state


@asynccontextmanager
async def scene(
    tmp_path: Path,
    counts: Mapping[str, int] = COUNTS,
    thresholds: Mapping[str, int] = THRESHOLDS,
    absent: Sequence[str] = (),
    by_hand: Sequence[str] = (),
    rogue: str = "",
    answer: Answer = silent,
) -> AsyncIterator[tuple[Scene, Rogue | None]]:
    consortium = Consortium(tmp_path, counts, thresholds=thresholds)
    names = [member.name for member in consortium.genesis.members if member.name not in (*absent, rogue)]
    nodes = [consortium.node(name) for name in names]
    for node in nodes:
        if node.name in by_hand:
            node.desk._rules = BY_HAND
    told = Scene(consortium, nodes)
    async with running(nodes):
        if rogue:
            member = Rogue(consortium, rogue)
            async with member.network.open(answer):
                await member.meets(nodes)
                await told.prepare()
                yield told, member
        else:
            await told.prepare()
            yield told, None


async def test_grant_gathers_every_owner_and_a_governance_threshold_and_becomes_final(tmp_path: Path) -> None:
    async with scene(tmp_path) as (told, _):
        encoded = told.unsigned()
        grant = await told.operator.desk.request(encoded)
        assert await told.operator.desk.request(encoded) == grant
        await until(lambda: told.state_of(grant) is GrantState.FINAL)
        signers = set(told.operator.desk.status(grant).signers)
        assert {"data-source-1", "data-source-2", "operator-1"} <= signers
        assert sum(name.startswith("governance") for name in signers) >= 2
        assert await told.operator.desk.request(encoded) == grant


async def test_one_of_three_governance_nodes_being_down_delays_no_grant(tmp_path: Path) -> None:
    async with scene(tmp_path, absent=["governance-3"]) as (told, _):
        grant = await told.operator.desk.request(told.unsigned())
        await until(lambda: told.state_of(grant) is GrantState.FINAL)
        assert "governance-3" not in told.operator.desk.status(grant).signers


async def test_one_of_three_governance_nodes_that_hangs_delays_no_grant(tmp_path: Path) -> None:
    async def hang(member: MemberId, payload: bytes) -> bytes:
        await trio.sleep(60)
        return b""

    async with scene(tmp_path, rogue="governance-3", answer=hang) as (told, _):
        grant = await told.operator.desk.request(told.unsigned())
        await until(lambda: told.state_of(grant) is GrantState.FINAL)


async def test_grant_waits_for_a_hand_and_is_final_once_it_signed(tmp_path: Path) -> None:
    async with scene(tmp_path, by_hand=["data-source-1"]) as (told, _):
        grant = await told.operator.desk.request(told.unsigned())
        owner = told.nodes["data-source-1"].desk
        await until(lambda: told.operator.desk.status(grant).missing == ("data-source-1",))
        await until(lambda: [status.id for status in owner.list()] == [grant])
        assert told.state_of(grant) is GrantState.GATHERING
        with pytest.raises(Rejected, match="not-found"):
            await owner.sign(Digest(bytes(32)))
        await owner.sign(grant)
        await until(lambda: told.state_of(grant) is GrantState.FINAL)
        await until(lambda: owner.status(grant).state is GrantState.FINAL)
        signed = told.operator.desk.status(grant)
        assert {"data-source-1", "data-source-2", "operator-1"} <= set(signed.signers)
        assert (owner.status(grant).signers, owner.status(grant).missing) == (signed.signers, ())
        await owner.sign(grant)


async def test_operator_restarted_while_gathering_asks_again_and_what_was_given_still_counts(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, COUNTS, thresholds=THRESHOLDS)
    names = [member.name for member in consortium.genesis.members]
    others = [consortium.node(name) for name in names if name != "operator-1"]
    others[0].desk._rules = BY_HAND
    async with running(others):
        first = consortium.node("operator-1")
        told = Scene(consortium, [first, *others])
        async with running([first]):
            await told.prepare()
            encoded = told.unsigned()
            grant = await first.desk.request(encoded)
            await until(others[0].desk.list)
        await until(lambda: not others[0].network.connected & {told.live.ids["operator-1"]})
        await others[0].desk.sign(grant)
        again = consortium.node("operator-1")
        told.nodes["operator-1"] = told.live.node_asked = again
        async with running([again]):
            await until(lambda: again.network.connected)
            with pytest.raises(Rejected, match="not-found"):
                again.desk.status(grant)
            assert await again.desk.request(encoded) == grant
            await until(lambda: told.state_of(grant) is GrantState.FINAL)


async def test_owner_whose_log_is_behind_does_not_turn_a_grant_into_a_refused_one(tmp_path: Path) -> None:
    async def behind(member: MemberId, payload: bytes) -> bytes:
        return encode(Countersigned(None, Reason.UNKNOWN_CAMPAIGN.value, "not here yet"))

    async with scene(tmp_path, rogue="governance-3", answer=behind, by_hand=["data-source-1"]) as (told, _):
        grant = await told.operator.desk.request(told.unsigned())
        await until(lambda: told.operator.desk.status(grant).missing == ("data-source-1",))
        assert told.state_of(grant) is GrantState.GATHERING


async def test_answers_that_are_no_countersignature_are_refused_and_the_grant_goes_on(tmp_path: Path) -> None:
    """The third governance member answers with others' signatures, its own over another event, and noise."""
    turn = 0
    rogues: list[Rogue] = []

    async def answer(member: MemberId, payload: bytes) -> bytes:
        nonlocal turn
        if not isinstance(decode_request(payload), AskCountersign):
            raise Unavailable("nothing else")
        turn += 1
        rogue = rogues[0]
        wrong = rogue.secrets.identity.sign(b"another event")
        answers = [
            b"\xc1",
            encode(Countersigned(EventSignature(rogue.member.id, wrong), "", "")),
            encode(Countersigned(EventSignature(bytes(32), wrong), "", "")),
            encode(Countersigned(EventSignature(member, wrong), "", "")),
            encode(Countersigned(None, "no-such-reason", "x" * 200)),
        ]
        return answers[turn % len(answers)]

    async with scene(tmp_path, rogue="governance-3", answer=answer, by_hand=["data-source-1"]) as (told, rogue):
        assert rogue is not None
        rogues.append(rogue)
        with_rogue_only = told.nodes["governance-2"].desk
        with_rogue_only._rules = BY_HAND
        grant = await told.operator.desk.request(told.unsigned())
        await until(lambda: turn >= 5)
        assert "governance-3" not in told.operator.desk.status(grant).signers
        await with_rogue_only.sign(grant)
        await told.nodes["data-source-1"].desk.sign(grant)
        await until(lambda: told.state_of(grant) is GrantState.FINAL)


async def test_only_the_author_may_ask_and_only_needed_signatures_are_taken(tmp_path: Path) -> None:
    async with scene(tmp_path, TWO_OPERATORS, TWO_OF_THREE, rogue="operator-3", by_hand=["data-source-1"]) as (
        told,
        rogue,
    ):
        assert rogue is not None
        owner, operator = told.live.ids["data-source-2"], told.live.ids["operator-1"]
        encoded = told.unsigned()

        async def refused(member: bytes, message: msgspec.Struct) -> str:
            with pytest.raises(Unavailable, match="refused") as refusal:
                await rogue.network.request(MemberId(member), encode(message), 30)
            return str(refusal.value)

        assert Reason.WRONG_AUTHOR.value in await refused(owner, AskCountersign(encoded))
        with pytest.raises(Rejected) as foreign:
            await told.operator.desk.request(told.unsigned("operator-3"))
        assert foreign.value.reason is Reason.WRONG_AUTHOR
        source = told.live.source("data-source-1", "another")
        not_a_grant = pack(msgspec.structs.replace(source.entry, signatures=()), source.portions)
        assert Reason.BAD_FIELD.value in await refused(owner, AskCountersign(not_a_grant))
        signed = told.runs["operator-3"].grant(told.sources, 1, 4)
        assert Reason.SURPLUS_SIGNATURE.value in await refused(
            owner, AskCountersign(pack_parts(signed.entry_bytes, signed.portions_bytes))
        )
        assert Reason.MALFORMED.value in await refused(owner, AskCountersign(b"grant"))

        grant = await told.operator.desk.request(encoded)
        await until(lambda: told.operator.desk.status(grant).missing == ("data-source-1",))
        entry = told.operator.desk._grants[grant].event.entry
        own = sign_entry(entry, rogue.member.id, rogue.member.role, rogue.secrets.identity).signatures[0]
        assert Reason.SURPLUS_SIGNATURE.value in await refused(operator, DeliverSignature(grant, own))
        forged = EventSignature(told.live.ids["data-source-1"], own.signature)
        assert Reason.BAD_SIGNATURE.value in await refused(operator, DeliverSignature(grant, forged))
        for number in range(50):
            await rogue.network.request(operator, encode(DeliverSignature(digest("unknown", number), own)), 30)
        assert told.operator.desk.status(grant).missing == ("data-source-1",)
        await told.nodes["data-source-1"].desk.sign(grant)
        await until(lambda: told.state_of(grant) is GrantState.FINAL)


async def test_operator_that_asks_without_end_pushes_out_no_other_operators_grant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(countersign, "GRANTS_KEPT", 20)
    async with scene(tmp_path, TWO_OPERATORS, TWO_OF_THREE, rogue="operator-3", by_hand=["data-source-1"]) as (
        told,
        rogue,
    ):
        assert rogue is not None
        owner = told.nodes["data-source-1"].desk
        grant = await told.operator.desk.request(told.unsigned())
        await until(lambda: [status.id for status in owner.list()] == [grant])
        for _ in range(60):
            asked = encode(AskCountersign(told.unsigned("operator-3")))
            answer = await rogue.network.request(told.live.ids["data-source-1"], asked, 30)
            assert decode(answer, Countersigned, 1 << 16).reason == "waiting"
        assert len(owner.list()) == 21
        await owner.sign(grant)
        await until(lambda: told.state_of(grant) is GrantState.FINAL)


async def test_grant_of_as_many_unknown_sources_as_fit_is_refused_and_the_node_runs_on(tmp_path: Path) -> None:
    async with scene(tmp_path) as (told, _):
        run = told.runs["operator-1"]
        terms = p.GrantTerms(run.policy_id, 1, 4, now_ms() + 3_600_000)

        def asking_for(sources: Sequence[bytes]) -> bytes:
            items = tuple(p.DataItem(encode(p.GrantedSource(source))) for source in sorted(sources))
            event = told.live.signed(
                Kind.GRANT,
                ["operator-1", "governance-1", "governance-2"],
                p.Portions(
                    p.DataPortion(told.live.salt(), items),
                    told.live.salted(terms),
                    told.live.salted(p.GrantOperation(job_key_id(run.job))),
                ),
                campaign=run.id,
                sequence=run.grants + 1,
            )
            return pack(msgspec.structs.replace(event.entry, signatures=()), event.portions)

        with pytest.raises(Rejected):
            await told.operator.desk.request(asking_for([digest("nobody's source")]))
        largest = asking_for([digest(number) for number in range(4_096)])
        assert len(encode(AskCountersign(largest))) < told.operator.network.limits.max_request_bytes
        with pytest.raises(Rejected) as large:
            await told.operator.desk.request(largest)
        assert large.value.reason is Reason.UNKNOWN_SOURCE
        grant = await told.operator.desk.request(told.unsigned())
        await until(lambda: told.state_of(grant) is GrantState.FINAL)


async def test_operator_that_lists_no_address_of_an_owner_gathers_on_without_it(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, COUNTS, thresholds=THRESHOLDS)
    ports = dict(consortium.ports)
    names = [member.name for member in consortium.genesis.members]
    nodes = [consortium.node(name) for name in names if name != "operator-1"]
    del consortium.ports["governance-3"]
    operator = consortium.node("operator-1")
    consortium.ports = ports
    told = Scene(consortium, [operator, *nodes])
    async with running([operator, *nodes]):
        await told.prepare()
        grant = await operator.desk.request(told.unsigned())
        await until(lambda: told.state_of(grant) is GrantState.FINAL)


# Successors


class At:
    """A clock that stands."""

    def __init__(self, time_ms: int) -> None:
        self._time_ms = time_ms

    def now_ms(self) -> int:
        return self._time_ms

    def monotonic_ms(self) -> int:
        return self._time_ms


async def test_owner_and_operator_that_changed_their_keys_grant_what_they_could_before(tmp_path: Path) -> None:
    told = begin(counts={"data-source": 2, "governance": 1, "operator": 1}, certificate_scheme="ed25519")
    begin_epoch(told.ledger, rotate=[LIBRARIAN, OPERATOR])
    grant = told.run.grant([told.books], 1, 4)
    unsigned = pack(msgspec.structs.replace(grant.entry, signatures=()), grant.portions)
    ledger = written(told.ledger, tmp_path / LIBRARIAN)
    parties = make_parties(2)

    def unused(*arguments: object) -> Any:
        raise AssertionError(arguments)

    def desk(name: str) -> CountersignDesk:
        member = ledger.committee.member(told.ledger.ids[name])
        signer = told.ledger.secrets[name].identity
        rules = CountersignSection(
            auto=True, sources=("books",), purposes=("*",), operators=("*",), max_steps=4, max_duration_seconds=10**9
        )
        clock = At(told.ledger.now_ms)
        return CountersignDesk(ledger, network_of(parties[0], parties), clock, member, signer, rules, unused, unused)

    operator = told.ledger.ids[OPERATOR]
    answer = decode(await desk(LIBRARIAN).answer(operator, AskCountersign(unsigned)), Countersigned, 1 << 16)
    assert (answer.reason, answer.detail) == ("", "")
    assert answer.signature is not None
    assert answer.signature.signer == told.ledger.ids[LIBRARIAN]
    gathering = desk(OPERATOR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gathering.run)
        await trio.testing.wait_all_tasks_blocked()
        event_id = await gathering.request(unsigned)
        assert gathering._grants[event_id].entry.signatures[0].signer == operator
        assert {member.name for member in gathering._grants[event_id].missing} == {LIBRARIAN, GOVERNANCE}
        nursery.cancel_scope.cancel()
    ledger.store.close()
