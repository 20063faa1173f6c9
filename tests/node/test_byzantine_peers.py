"""A member with a valid transport key and no manners: whatever it sends, honest nodes run on and agree.

``Rogue`` is a bare ``Network`` under a member's seed. The committee of these tests reaches its quorum without it, so
that every test ends with the same question: does an honest event still become final everywhere?
"""

import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from ledger_fixtures import MemoryLedger, digest
from network_fixtures import make_parties, network_of
from node_fixtures import Consortium, running, until
from rogue_fixtures import Answer, Rogue, silent

from consensus import portions as p
from consensus.block import Body, Header
from consensus.certificate import Certificate, decode_certificate
from consensus.codec import decode, encode
from consensus.event import JOB_SIGNER_ROLE, CheckedEvent, Entry, Kind, check_event, make_entry, pack, sign_entry
from consensus.evidence import EvidenceReport, Offence, check_evidence
from consensus.identifiers import Digest, MemberId, View
from consensus.keys import Ed25519SigningKey
from consensus.membership import committee as committee_of
from consensus.rejection import Reason, Rejected, Unavailable
from consensus.transition import build
from consensus.vote import Notarization, Proposal, VoteEvidence, VoteKind, sign_proposal, sign_vote
from node import catchup, chunk
from node.catchup import CatchUp, serve_blocks
from node.journal import Journal, VoteMark, VoteRecord
from node.ledger import Ledger
from node.messages import (
    MAX_GOSSIP_EVENTS,
    BlockRecord,
    Blocks,
    GetBlocks,
    GetEvents,
    GetLastVote,
    GetProposal,
    decode_request,
)
from node.network import Lane
from node.runner import Node
from node.service import EventState
from node.store import Store

pytestmark = pytest.mark.trio

COUNTS = {"data-source": 3, "governance": 1, "operator": 1, "verifier": 1}
THRESHOLDS = {"data-source": 2, "governance": 1, "operator": 1}
ROGUE = "data-source-3"
HONEST = ("data-source-1", "data-source-2", "governance-1", "operator-1", "verifier-1")


@asynccontextmanager
async def beset(tmp_path: Path, answer: Answer = silent) -> AsyncIterator[tuple[Consortium, list[Node], Rogue]]:
    """Honest nodes that run, and a rogue connected to each."""
    consortium = Consortium(tmp_path, COUNTS, thresholds=THRESHOLDS)
    nodes = [consortium.node(name) for name in HONEST]
    rogue = Rogue(consortium, ROGUE)
    async with running(nodes), rogue.network.open(answer):
        await rogue.meets(nodes)
        yield consortium, nodes, rogue


async def goes_on(consortium: Consortium, nodes: Sequence[Node], number: int, seconds: float = 60) -> CheckedEvent:
    """An honest event becomes final at every node, and they agree."""
    event = nodes[0].submit(consortium.source_event("data-source-1", number))
    await until(lambda: all(node.status_of(event.id).state is EventState.FINAL for node in nodes), seconds)
    assert not any(node.replica.halted for node in nodes)
    await until(lambda: len({node.snapshot().head for node in nodes}) == 1)
    return event


# Frames and requests


async def test_garbage_on_every_lane_and_as_requests_costs_its_sender_alone(tmp_path: Path) -> None:
    chance = random.Random(7)
    async with beset(tmp_path) as (consortium, nodes, rogue):
        good = consortium.source_event("data-source-2", 900)
        payloads = [
            b"",
            b"\x00" * 10_000,
            b"\x91" * 50_000,
            b"\xdd\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\x95\xa4vote" + b"\xcf" + b"\xff" * 8,
            encode(GetBlocks(1)),
            *(chance.randbytes(chance.randrange(1, 4_000)) for _ in range(50)),
            *(good[:cut] + chance.randbytes(3) + good[cut + 3 :] for cut in range(0, len(good), 17)),
        ]
        for payload in payloads:
            rogue.network.broadcast(Lane.VOTES, payload)
            rogue.network.broadcast(Lane.EVENTS, payload)
            rogue.gossip([payload])
        requests = [
            *payloads[:20],
            encode(GetBlocks(2**53 - 1)),
            encode(GetEvents(tuple(digest("nobody has", number) for number in range(4_096)))),
            encode(GetProposal(bytes(32))),
            encode(GetLastVote(bytes(32))),
            encode(GetLastVote(rogue.member.id)),
        ]
        for member in rogue.network.connected:
            for request in requests:
                try:
                    await rogue.network.request(member, request, 5)
                except Unavailable:
                    continue
        await goes_on(consortium, nodes, 1)


async def test_member_that_floods_with_bad_signatures_is_cut_off_and_costs_no_more_checks(tmp_path: Path) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        await rogue.meets(nodes)
        good = consortium.source_event("data-source-2", 900)
        forged = [good[:-1] + bytes([number % 256]) for number in range(3_000) if number % 256 != good[-1]]
        rogue.gossip(forged)
        event = await goes_on(consortium, nodes, 1)
        checked = [sum(node.replica._intake.refused.values()) for node in nodes]
        closed = [node.network.counters.closed_bad_content for node in nodes]
        assert all(closed)
        await until(lambda: rogue.network.connected)
        rogue.gossip(forged)
        await goes_on(consortium, nodes, 2)
        limits = nodes[0].network.limits
        assert max(checked) <= limits.max_complaints + MAX_GOSSIP_EVENTS + 60
        for node, checked_before, closed_before in zip(nodes, checked, closed, strict=True):
            # On a busy machine it comes back more than once meanwhile: each connection costs a frame.
            connections = 1 + node.network.counters.closed_bad_content - closed_before
            more = sum(node.replica._intake.refused.values()) - checked_before
            assert more <= connections * (MAX_GOSSIP_EVENTS + 60)
        assert event.id


async def test_frame_of_a_million_empty_events_is_refused_at_once(tmp_path: Path) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        for _ in range(3):
            rogue.network.broadcast(Lane.EVENTS, bytes(4 << 20))
        await goes_on(consortium, nodes, 1)
        await until(lambda: all(node.network.counters.bytes_received > 3 * (4 << 20) for node in nodes))
        assert not any(node.replica._intake.refused for node in nodes), "no event of it was looked at by itself"


# Proposals and votes


def next_view_of(rogue: Rogue, node: Node) -> View:
    view = node.replica.engine.view
    while node.ledger.committee.leader(view).id != rogue.member.id:
        view = View(view + 1)
    return view


async def test_leader_that_signs_proposals_without_end_pushes_no_others_out(tmp_path: Path) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        events = [nodes[0].submit(consortium.source_event("data-source-1", number)) for number in range(30)]
        for count in range(600):
            if count % 50 == 0:
                await trio.sleep(0.01)
            view = next_view_of(rogue, nodes[0])
            built = build(
                nodes[0].ledger.final,
                (),
                view=view,
                leader=rogue.member.id,
                timestamp_ms=time.time_ns() // 1_000_000 + count,
                committee=nodes[0].ledger.committee,
                max_events=1,
                max_bytes=1,
            )
            rogue.votes(sign_proposal(built.state.header, built.body, rogue.secrets.identity.sign))
        for event in events:
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
        assert all(len(node.replica._proposals._proposals) <= 256 for node in nodes)
        assert all(len(node.ledger.overlays) <= 128 for node in nodes)
        await goes_on(consortium, nodes, 100)


def honest_header(rogue: Rogue, node: Node, view: View, events: Sequence[CheckedEvent] = ()) -> tuple[Header, Body]:
    built = build(
        node.ledger.final,
        events,
        view=view,
        leader=rogue.member.id,
        timestamp_ms=time.time_ns() // 1_000_000,
        committee=node.ledger.committee,
        max_events=4_096,
        max_bytes=1 << 30,
    )
    return built.state.header, built.body


def with_leaves(header: Header, leaves: tuple[bytes, ...]) -> tuple[Header, Body]:
    body = Body(leaves)
    return msgspec.structs.replace(header, body_root=body.root, event_count=len(leaves)), body


def of_unknown_events(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    return with_leaves(honest_header(rogue, node, view)[0], (digest("nobody has this"),))


def of_another_parent(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    header, body = honest_header(rogue, node, view)
    return msgspec.structs.replace(header, parent=digest("no ledger block")), body


def of_a_far_parent_view(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    header, body = honest_header(rogue, node, view)
    return msgspec.structs.replace(header, parent_view=0, height=2**53 - 1), body


def of_next_year(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    header, body = honest_header(rogue, node, view)
    return msgspec.structs.replace(header, timestamp_ms=2**53 - 1), body


def of_last_year(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    header, body = honest_header(rogue, node, view)
    return msgspec.structs.replace(header, timestamp_ms=0), body


def of_a_false_state(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    header, body = honest_header(rogue, node, view)
    return msgspec.structs.replace(header, state_root=digest("false"), log_root=digest("false")), body


def of_a_false_log_size(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    header, body = honest_header(rogue, node, view)
    return msgspec.structs.replace(header, log_size=2**53 - 1), body


def of_an_event_on_the_log(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    return with_leaves(honest_header(rogue, node, view)[0], (node.ledger.checked(0).leaf_hash,))


def of_too_many_events(rogue: Rogue, node: Node, view: View) -> tuple[Header, Body]:
    return with_leaves(honest_header(rogue, node, view)[0], tuple(digest("many", number) for number in range(4_096)))


@pytest.mark.parametrize(
    "crooked",
    [
        of_unknown_events,
        of_another_parent,
        of_a_far_parent_view,
        of_next_year,
        of_last_year,
        of_a_false_state,
        of_a_false_log_size,
        of_an_event_on_the_log,
        of_too_many_events,
    ],
)
async def test_crooked_proposal_gets_no_vote_and_the_chain_goes_on(
    tmp_path: Path, crooked: Callable[[Rogue, Node, View], tuple[Header, Body]]
) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        await goes_on(consortium, nodes, 1)
        proposed: set[Digest] = set()
        for number in range(2, 4):
            view = next_view_of(rogue, nodes[0])
            header, body = crooked(rogue, nodes[0], view)
            proposal = sign_proposal(header, body, rogue.secrets.identity.sign)
            proposed.add(proposal.digest)
            rogue.votes(proposal)
            await goes_on(consortium, nodes, number)
        assert all(node.ledger.store.height_of_block(block) is None for node in nodes for block in proposed)


async def test_finalize_votes_with_bad_shares_delay_no_certificate(tmp_path: Path) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        shares = [b"", bytes(96), b"\xc0" + bytes(95), b"\xff" * 96, random.Random(1).randbytes(96)]

        async def vote_badly() -> None:
            async for received in rogue.network.incoming:
                if received.lane is not Lane.VOTES:
                    continue
                try:
                    message = decode(received.frame, Proposal | Notarization, 1 << 20)  # type: ignore[arg-type]
                except Rejected:
                    continue
                view, block = (
                    (message.view, message.block)
                    if isinstance(message, Notarization)
                    else (decode(message.header, Header, 1_024).view, message.digest)
                )
                rogue.votes(
                    sign_vote(
                        nodes[0].ledger.committee,
                        rogue.member.id,
                        VoteKind.FINALIZE,
                        View(view),
                        Digest(block),
                        share=shares[view % len(shares)],
                        sign=rogue.secrets.identity.sign,
                    )
                )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(vote_badly)
            for number in range(6):
                await goes_on(consortium, nodes, number)
            nursery.cancel_scope.cancel()


async def test_member_that_contradicts_itself_is_convicted_once_on_every_honest_log(tmp_path: Path) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        committee = nodes[0].ledger.committee

        def contradict(view: int, kind: VoteKind = VoteKind.NOTARIZE) -> None:
            for side in range(2):
                block = digest("side", side)
                sign = rogue.secrets.identity.sign
                rogue.votes(sign_vote(committee, rogue.member.id, kind, View(view), block, share=b"", sign=sign))

        await goes_on(consortium, nodes, 0)
        for ahead in range(1, 20):
            contradict(nodes[0].snapshot().view + ahead)
        await until(lambda: all(len(evidence_on(node)) == 1 for node in nodes))
        contradict(nodes[0].snapshot().view + 30, VoteKind.FINALIZE)
        await until(lambda: all(len(evidence_on(node)) == 2 for node in nodes))
        await goes_on(consortium, nodes, 1)
        events = evidence_on(nodes[0])
        assert all(evidence_on(node) == events for node in nodes)
        reports = [
            decode(p.decode_portions(portions).governance.content, EvidenceReport, 65_536)  # type: ignore[union-attr]
            for _, portions in events
        ]
        convictions = [check_evidence(report, committee) for report in reports]
        assert [found.member for found in convictions] == [rogue.member.id] * 2
        assert {found.offence for found in convictions} == {Offence.TWO_NOTARIZE_VOTES, Offence.TWO_FINALIZE_VOTES}
        # Whoever does not vote keeps the proof as well.
        assert all(len(list(((consortium.folder / name) / "evidence").iterdir())) <= 2 for name in HONEST)


async def test_evidence_kept_before_a_crash_is_handed_in_after_it(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, COUNTS, thresholds=THRESHOLDS)
    members = committee_of(consortium.genesis)
    culprit = next(member for member in consortium.genesis.members if member.name == ROGUE)
    votes = (
        sign_vote(
            members,
            culprit.id,
            VoteKind.NOTARIZE,
            View(5),
            digest("side", side),
            share=b"",
            sign=consortium.secrets[ROGUE].identity.sign,
        )
        for side in range(2)
    )
    kept = (consortium.folder / HONEST[0]) / "evidence"
    kept.mkdir(parents=True)
    (kept / f"{ROGUE}.two-notarize-votes.0").write_bytes(encode(EvidenceReport(VoteEvidence(*votes))))
    (kept / "half-written.new").write_bytes(b"\x91")
    nodes = [consortium.node(name) for name in HONEST]
    async with running(nodes):
        await until(lambda: all(len(evidence_on(node)) == 1 for node in nodes))
        await goes_on(consortium, nodes, 1)


def evidence_on(node: Node) -> list[tuple[bytes, bytes]]:
    """Entries and portions of the evidence on a node's log."""
    events = [node.ledger.event(index) for index in range(node.ledger.final.header.log_size)]
    return [held for held in events if decode(held[0], Entry, 65_535).kind is Kind.EVIDENCE]


async def test_voter_on_a_slow_disk_that_the_others_leave_behind_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consortium = Consortium(tmp_path, COUNTS, thresholds=THRESHOLDS)
    nodes = [consortium.node(name) for name in (*HONEST, ROGUE)]
    slow = nodes[-1]
    assert slow._voter is not None
    journal: Journal = slow._voter._journal
    append = journal.append

    def append_slowly(votes: Sequence[VoteRecord]) -> VoteMark:
        time.sleep(0.3)
        return append(votes)

    monkeypatch.setattr(journal, "append", append_slowly)
    async with running(nodes):
        for number in range(15):
            event = nodes[0].submit(consortium.source_event("data-source-1", number))
            await until(lambda event=event: nodes[0].status_of(event.id).state is EventState.FINAL)
        await goes_on(consortium, nodes, 100)
        assert slow.snapshot().voting


# The pool and what leaves it


async def test_flood_of_events_that_can_never_be_admitted_fills_no_pool_and_stops_no_honest_event(
    tmp_path: Path,
) -> None:
    async with beset(tmp_path) as (consortium, nodes, rogue):
        for node in nodes:
            node._mempool._max_events = 256
        revocations = [
            rogue.event(Kind.REVOCATION, p.SourceRevocation(digest("no source", number), "spite"), number)
            for number in range(400)
        ]
        rogue.gossip(revocations)
        job = Ed25519SigningKey(digest("nobody delegated"))
        portions = p.Portions(
            None, None, p.SaltedPortion(bytes(32), encode(p.Release(digest("root"), 1, "model", digest("file"))))
        )
        forged = [
            pack(
                sign_entry(
                    make_entry(
                        consortium.genesis.chain_id,
                        Kind.RELEASE,
                        next(member.id for member in consortium.genesis.members if member.name == "operator-1"),
                        portions,
                        campaign=digest("campaign", number),
                    ),
                    job.public_key,
                    JOB_SIGNER_ROLE,
                    job,
                ),
                portions,
            )
            for number in range(100)
        ]
        rogue.gossip(forged)
        await until(lambda: all(len(node.mempool) == 128 for node in nodes))
        for number in range(5):
            await goes_on(consortium, nodes, number)
        assert all(len(node.mempool) <= 256 for node in nodes)


async def test_event_refused_for_good_is_rejected_by_name_at_every_node_though_a_peer_hangs(tmp_path: Path) -> None:
    async def hang(member: MemberId, payload: bytes) -> bytes:
        await trio.sleep(60)
        return b""

    async with beset(tmp_path, hang) as (consortium, nodes, rogue):
        source = await goes_on(consortium, nodes, 1)
        encoded = rogue.event(Kind.REVOCATION, p.SourceRevocation(source.id, "not mine"), 1)
        rogue.gossip([encoded])
        event = check_event(encoded, nodes[0].ledger.committee)
        await until(lambda: all(node.status_of(event.id).state is EventState.REJECTED for node in nodes))
        assert {node.status_of(event.id).reason for node in nodes} == {Reason.WRONG_AUTHOR}
        await goes_on(consortium, nodes, 2)


# Catching up


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """A consortium whose honest voters hold 30 events, none of them running."""
    consortium = Consortium(tmp_path_factory.mktemp("history"), COUNTS, thresholds=THRESHOLDS)

    async def write() -> None:
        nodes = [consortium.node(name) for name in HONEST[:-1]]
        async with running(nodes):
            for number in range(6):
                events = [nodes[0].submit(consortium.source_event("data-source-1", 10 * number + i)) for i in range(5)]
                for event in events:
                    assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
            await until(lambda: {node.snapshot().log_size for node in nodes} == {30})

    trio.run(write)
    return consortium


Lie = Callable[[Blocks, GetBlocks], Awaitable[bytes]]


def tampered(**changes: object) -> Lie:
    async def lie(truth: Blocks, request: GetBlocks) -> bytes:
        return encode(msgspec.structs.replace(truth, **changes)) if truth.blocks else encode(truth)

    return lie


async def no_end(truth: Blocks, request: GetBlocks) -> bytes:
    return encode(Blocks((), (), b"", 2**53 - 1))


async def noise(truth: Blocks, request: GetBlocks) -> bytes:
    return b"\x00" * 1_000


async def nothing(truth: Blocks, request: GetBlocks) -> bytes:
    await trio.sleep(60)
    return b""


async def bad_events(truth: Blocks, request: GetBlocks) -> bytes:
    records = [
        msgspec.structs.replace(record, events=tuple(event[:-1] + b"\x00" for event in record.events))
        for record in truth.blocks
    ]
    return encode(msgspec.structs.replace(truth, blocks=tuple(records)))


async def missing_event(truth: Blocks, request: GetBlocks) -> bytes:
    records = [msgspec.structs.replace(record, events=record.events[1:]) for record in truth.blocks]
    return encode(msgspec.structs.replace(truth, blocks=tuple(records)))


async def truncated(truth: Blocks, request: GetBlocks) -> bytes:
    return encode(msgspec.structs.replace(truth, blocks=truth.blocks[:-1]))


async def gap(truth: Blocks, request: GetBlocks) -> bytes:
    return encode(msgspec.structs.replace(truth, blocks=truth.blocks[:1] + truth.blocks[2:]))


async def later(truth: Blocks, request: GetBlocks) -> bytes:
    return encode(msgspec.structs.replace(truth, blocks=truth.blocks[1:]))


async def onward_to_nowhere(truth: Blocks, request: GetBlocks) -> bytes:
    return encode(msgspec.structs.replace(truth, onward=(truth.blocks[0].header,) * 3)) if truth.blocks else b""


async def forged_certificate(truth: Blocks, request: GetBlocks) -> bytes:
    if not truth.blocks:
        return encode(truth)
    certificate = decode_certificate(truth.certificate)
    forged = Certificate(
        certificate.scheme, certificate.view, certificate.block, certificate.epoch, b"\xc0" + bytes(95)
    )
    return encode(msgspec.structs.replace(truth, certificate=encode(forged)))


FIRST: dict[str, Blocks] = {}


async def the_same_again(truth: Blocks, request: GetBlocks) -> bytes:
    """True ledger blocks, the first one for ever, with more promised."""
    return encode(msgspec.structs.replace(FIRST["answer"], head_height=2**53 - 1))


async def another_chain(truth: Blocks, request: GetBlocks) -> bytes:
    memory = MemoryLedger(seed=9)
    memory.seal(memory.source("data-source-1", "elsewhere"))
    event = memory.events[0]
    record = BlockRecord(memory.header, encode(Body((event.leaf_hash,))), (pack(event.entry, event.portions),))
    return encode(Blocks((record,), (), memory.certificate, 1))


@pytest.mark.parametrize(
    "lie",
    [
        no_end,
        noise,
        nothing,
        bad_events,
        missing_event,
        truncated,
        gap,
        later,
        onward_to_nowhere,
        forged_certificate,
        the_same_again,
        another_chain,
        tampered(certificate=b""),
        tampered(blocks=()),
        tampered(head_height=2**53 - 1),
    ],
)
async def test_lying_server_neither_kills_nor_stalls_a_node_that_catches_up(
    history: Consortium, lie: Lie, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catchup, "REQUEST_SECONDS", 1.0)
    shutil.rmtree(history.folder / "verifier-1", ignore_errors=True)
    voters = [history.node(name) for name in HONEST[:-1]]
    verifier = history.node("verifier-1")
    rogue = Rogue(history, ROGUE)
    size = voters[0].snapshot().log_size
    FIRST["answer"] = serve_blocks(voters[0].ledger, GetBlocks(1))

    async def answer(member: MemberId, payload: bytes) -> bytes:
        request = decode_request(payload)
        assert isinstance(request, GetBlocks)
        rogue.asked += 1
        return await lie(serve_blocks(voters[0].ledger, request), request)

    async with rogue.network.open(answer), running([verifier]):
        await until(lambda: rogue.asked)
        async with running(voters):
            await until(lambda: verifier.snapshot().log_size >= size, 60)
            assert not verifier.replica.halted
            await goes_on(history, [*voters, verifier], 1_000 + size)


async def test_ledger_blocks_under_one_distant_certificate_are_served_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryLedger()
    for number in range(12):
        memory.seal(memory.source("data-source-1", f"source {number}"))
    monkeypatch.setattr(catchup, "MAX_RECORDS_BYTES", 4_000)
    monkeypatch.setattr(chunk, "MAX_RECORDS_BYTES", 4_000)
    stores = [Store.open(tmp_path / name, memory.chain_id, create=True) for name in ("full", "empty")]
    full, empty = (Ledger(store, memory.genesis) for store in stores)
    headers = []
    state = full.final
    for height, (encoded, _) in enumerate(memory.certified, start=1):
        header = decode(encoded, Header, 1_024)
        event = memory.events[height - 1]
        state = full.verify(state, header, Body((event.leaf_hash,)), (event,))
        headers.append(header)
    full.commit(headers, decode_certificate(memory.certificate), ())
    first = serve_blocks(full, GetBlocks(1))
    assert 1 <= len(first.blocks) < 12
    assert len(first.blocks) + len(first.onward) == 12

    async def answer(member: MemberId, payload: bytes) -> bytes:
        request = decode_request(payload)
        assert isinstance(request, GetBlocks)
        return encode(serve_blocks(full, request))

    parties = make_parties(2)
    server, client = (network_of(party, parties) for party in parties)
    async with server.open(answer), client.open():
        await until(lambda: client.connected)
        catch_up = CatchUp(empty, client, lambda appended: None)
        await catch_up.reach(12)
    assert empty.final.digest == full.final.digest
    assert empty.store.certificate(11) is None
    for store in stores:
        store.close()
