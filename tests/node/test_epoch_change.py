"""Nodes that go on into the next epoch without a restart, and what a node is that left, joins late or lacks keys."""

import shutil
from pathlib import Path

import pytest
import trio
from ledger_fixtures import digest
from node_fixtures import PASSPHRASE, Consortium, change, next_epoch, running, until

from consensus.codec import decode, encode
from consensus.effect import PublishEvidence
from consensus.evidence import EvidenceReport
from consensus.identifiers import MemberId, View
from consensus.membership import committee
from consensus.rejection import ConfigError, Reason, Rejected
from consensus.state import EVIDENCE_TABLE, EvidenceRecord, read_record
from consensus.vote import VoteEvidence, VoteKind, check_vote, sign_vote
from node import catchup, runner, snapshot
from node.fsck import check_data_directory
from node.identity import epoch_keystore
from node.keystore import Keystore
from node.messages import MAX_ANSWER_BYTES, Blocks, GetBlocks, GetLastVote, GetSnapshot, Request, pack_gossip
from node.network import Lane, Received
from node.replica import Replica
from node.runner import Node
from node.service import EventState

pytestmark = pytest.mark.trio

COUNTS = {"data-source": 3, "governance": 1, "operator": 1}
NAMES = ("data-source-1", "data-source-2", "data-source-3", "governance-1", "operator-1")


@pytest.fixture
def consortium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Consortium:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    return Consortium(tmp_path, COUNTS)


async def finalize(node: Node, event: bytes) -> None:
    taken = node.submit(event)
    assert (await node.wait_final(taken.id, 20)).state is EventState.FINAL


async def test_nodes_begin_the_next_epoch_without_a_restart_and_finalize_in_it(consortium: Consortium) -> None:
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium)
    async with running(nodes):
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        await finalize(nodes[1], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        await finalize(nodes[2], consortium.source_event("data-source-3", 2))
        await until(lambda: len({node.snapshot().head for node in nodes}) == 1)
        assert all(node.snapshot().voting for node in nodes), [node.snapshot().why_not_voting for node in nodes]
        assert nodes[0].ledger.final.header.epoch == 1
    again = [consortium.node(name) for name in NAMES]
    async with running(again):
        await finalize(again[0], consortium.source_event("data-source-1", 3))
        await until(lambda: all(node.snapshot().log_size == 4 for node in again))


async def test_removed_member_stops_voting_says_so_and_is_refused(consortium: Consortium) -> None:
    nodes = [consortium.node(name) for name in NAMES]
    removed, others = nodes[2], [*nodes[:2], *nodes[3:]]
    membership, _ = next_epoch(consortium, remove=("data-source-3",))
    async with running(nodes):
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        assert not removed.snapshot().voting
        assert "no member of epoch 1" in removed.snapshot().why_not_voting
        assert not removed.network.connected
        assert all("data-source-3" not in node.snapshot().peers_connected for node in others)
        with pytest.raises(Rejected) as caught:
            nodes[0].submit(consortium.source_event("data-source-3", 2))
        assert caught.value.reason is Reason.UNKNOWN_MEMBER
        assert removed.ledger.final.header.log_size == 1


async def test_member_removed_while_it_was_away_learns_it_from_the_others_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    consortium = Consortium(tmp_path, COUNTS, thresholds={"data-source": 2, "governance": 1, "operator": 1})
    others = [consortium.node(name) for name in NAMES if name != "data-source-3"]
    membership, _ = next_epoch(consortium, remove=("data-source-3",))
    async with running(others):
        await finalize(others[0], consortium.source_event("data-source-1", 1))
        await finalize(others[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in others))
        await finalize(others[0], consortium.source_event("data-source-1", 2))
        end = others[0].ledger.end_of(0)
        why = f"data-source-3 is no member of epoch 1: it was removed at ledger block {end}, which ended epoch 0"
        removed = consortium.node("data-source-3")
        assert removed.snapshot().voting
        async with running([removed]):
            await until(lambda: removed.snapshot().why_not_voting == why)
            await until(lambda: removed.snapshot().peers_total == 0)
            assert not removed.snapshot().voting
            assert removed.ledger.final.header.height == end  # nothing of what came after
        assert f"no vote in epoch 1: {why}" in caplog.text
        again = consortium.node("data-source-3")
        assert (again.snapshot().why_not_voting, again.snapshot().peers_total) == (why, 0)
        again._close()
        assert all("data-source-3" not in node.snapshot().peers_connected for node in others)
        assert {node.snapshot().peers_total for node in others} == {3}


async def test_former_member_is_served_the_log_of_its_time_alone_and_not_listened_to(
    consortium: Consortium,
) -> None:
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium, remove=("data-source-3",))
    former = MemberId(next(held.id for held in consortium.genesis.members if held.name == "data-source-3"))
    async with running(nodes):
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        asked, end = nodes[0], nodes[0].ledger.end_of(0)

        async def blocks(height: int) -> Blocks:
            return decode(await asked.answer(former, encode(GetBlocks(height))), Blocks, MAX_ANSWER_BYTES)

        told = await blocks(1)
        assert (len(told.blocks), told.head_height) == (end, end)
        assert await blocks(end + 1) == Blocks((), (), b"", end)
        for stranger, request in ((former, GetSnapshot(0)), (former, GetLastVote(former)), (bytes(32), GetBlocks(1))):
            with pytest.raises(Rejected) as caught:
                await asked.answer(MemberId(stranger), encode(request))
            assert caught.value.reason is Reason.UNKNOWN_MEMBER
        gossip = pack_gossip([consortium.source_event("data-source-1", 2)])
        asked.replica._take(Received(former, Lane.EVENTS, gossip))
        assert not len(asked.mempool)


async def test_node_without_the_next_epochs_keys_follows_and_names_the_file(consortium: Consortium) -> None:
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium, without_keys=("data-source-3",))
    async with running(nodes):
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        assert not nodes[2].snapshot().voting
        why = nodes[2].snapshot().why_not_voting
        assert "data-source-3.epoch-1.keystore: missing; with the secrets in it this member votes in epoch 1" in why
        assert "bad-key" not in why


async def test_member_that_joins_starts_from_the_genesis_follows_and_is_the_vote_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    consortium = Consortium(tmp_path, COUNTS, joining=("operator-2",))
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium, add={"operator-2": "operator"})  # two operators: both are needed
    async with running(nodes):
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        event = nodes[0].submit(consortium.source_event("data-source-1", 2))
        assert (await nodes[0].wait_final(event.id, 0.5)).state is EventState.PENDING
        joined = consortium.node("operator-2")
        assert not joined.snapshot().voting
        assert joined.snapshot().why_not_voting == "operator-2 is no member of epoch 0"
        async with running([joined]):
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
            assert (joined.role, joined.snapshot().voting) == ("operator", True)
        again = consortium.node("operator-2")
        assert again.role == "operator"
        async with running([again]):
            await finalize(nodes[0], consortium.source_event("data-source-1", 3))


async def test_name_of_nobody_is_refused_where_no_keystore_for_a_later_epoch_lies(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, COUNTS, joining=("operator-2",))
    with pytest.raises(ConfigError, match="expected a member of the genesis"):
        consortium.node("operator-2")


@pytest.mark.parametrize("away", [False, True])
async def test_member_with_new_keys_goes_on_with_them_even_if_it_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setattr(runner, "LATER_KEYS_TRIED_SECONDS", 0.5)
    consortium = Consortium(tmp_path, COUNTS, thresholds={"data-source": 2, "governance": 1, "operator": 1})
    others = [consortium.node(name) for name in NAMES if name != "data-source-3"]
    rotating = consortium.node("data-source-3")
    membership, secrets = next_epoch(consortium, rotate=("data-source-3",))  # in which all three are needed
    assert secrets["data-source-3"].transport_seed != consortium.secrets["data-source-3"].transport_seed
    async with running(others), running([] if away else [rotating]) as nursery:
        await finalize(others[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in others))
        if away:
            nursery.start_soon(rotating.run)
        await finalize(others[0], consortium.source_event("data-source-1", 1))
        await until(lambda: rotating.snapshot().voting)


async def test_node_that_was_away_follows_into_the_next_epoch_and_is_the_vote_it_lacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    consortium = Consortium(tmp_path, COUNTS, thresholds={"data-source": 2, "governance": 1, "operator": 1})
    nodes = [consortium.node(name) for name in NAMES if name != "data-source-3"]
    membership, _ = next_epoch(consortium)  # in which all three data sources are needed
    async with running(nodes):
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        event = nodes[0].submit(consortium.source_event("data-source-1", 1))
        assert (await nodes[0].wait_final(event.id, 0.5)).state is EventState.PENDING
        late = consortium.node("data-source-3")
        assert late.replica.engine.committee.epoch == 0
        async with running([late]):
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
            assert late.snapshot().voting


async def test_node_that_catches_up_begins_the_next_epoch_though_there_is_more_to_fetch(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who serves one ledger block after the other, in one turn, does not keep it from voting where it should."""
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium)
    async with running(nodes):
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        for number in range(8):
            await finalize(nodes[0], consortium.source_event("data-source-1", number))
        height = nodes[0].ledger.final.header.height
    shutil.rmtree(consortium.folder / "data-source-3")
    answered = Replica.answer

    async def slowly(replica: Replica, member: MemberId, request: Request) -> bytes:
        if isinstance(request, GetBlocks):
            await trio.sleep(0.5)
        return await answered(replica, member, request)

    monkeypatch.setattr(Replica, "answer", slowly)
    monkeypatch.setattr(catchup, "ANSWER_TARGET_BYTES", 1)
    monkeypatch.setattr(catchup, "TURN_SECONDS", 600.0)
    server, late = consortium.node("data-source-1"), consortium.node("data-source-3")
    async with running([server, late]):
        await until(lambda: late.replica.engine.committee.epoch == 1)
        assert late.ledger.final.header.height < height - 3
        await until(lambda: late.ledger.final.header.height == height)


async def test_node_that_joins_at_a_snapshot_of_a_later_epoch_goes_on_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERSIGN_PASSPHRASE", PASSPHRASE.decode())
    monkeypatch.setattr(snapshot, "LEAST_EVENTS", 2)
    consortium = Consortium(tmp_path, {**COUNTS, "verifier": 1})
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium)
    async with running(nodes):
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        late = consortium.node("verifier-1", sync="snapshot")
        async with running([late]):
            await until(lambda: late.snapshot().log_size == 2 and not late.snapshot().log_missing)
            await until(lambda: late.replica.engine.committee.epoch == 1)
            await finalize(nodes[0], consortium.source_event("data-source-1", 2))
            await until(lambda: late.snapshot().head == nodes[0].snapshot().head)


async def test_a_vote_of_another_epoch_is_refused_by_name(consortium: Consortium) -> None:
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium)
    async with running(nodes):
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        # Whoever combined a certificate keeps the votes behind it.
        vote = next(vote for node in nodes for height in (1, 2, 3) for vote in node.ledger.votes(height))
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.replica.engine.committee.epoch == 1 for node in nodes))
        with pytest.raises(Rejected) as caught:
            check_vote(vote, nodes[0].ledger.committee)
        assert caught.value.reason is Reason.WRONG_EPOCH
        refused = nodes[1].replica.counters.messages_refused
        nodes[0].network.send(MemberId(nodes[1].ledger.epochs.genesis.members[1].id), Lane.VOTES, encode(vote))
        await until(lambda: nodes[1].replica.counters.messages_refused > refused)


async def test_evidence_that_no_log_took_in_its_epoch_is_handed_in_under_the_next_identity(
    consortium: Consortium,
) -> None:
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium, remove=("data-source-3",), rotate=("data-source-1",))
    culprit = next(member for member in consortium.genesis.members if member.name == "data-source-3")
    sign = consortium.secrets[culprit.name].identity.sign
    members = committee(consortium.genesis)

    def contradiction(kind: VoteKind) -> VoteEvidence:
        blocks = digest("one"), digest("other")
        votes = (sign_vote(members, culprit.id, kind, View(9), block, share=b"", sign=sign) for block in blocks)
        return VoteEvidence(*votes)

    kept = consortium.folder / "data-source-1" / "evidence"

    def convicted() -> list[EvidenceRecord]:
        found = nodes[1].ledger.final.state.items_with_prefix(EVIDENCE_TABLE)
        return [read_record(value, EvidenceRecord) for _, value in found]

    async with running(nodes):
        await finalize(nodes[0], consortium.source_event("data-source-2", 1))
        kept.mkdir()
        (kept / "data-source-3.two-notarize-votes.0").write_bytes(
            encode(EvidenceReport(contradiction(VoteKind.NOTARIZE)))
        )
        ending = nodes[0].replica
        await finalize(nodes[0], change(consortium, membership))
        await until(convicted)
        assert [(held.member, held.epoch) for held in convicted()] == [(culprit.id, 0)]
        index = nodes[1].ledger.index_of(convicted()[0].event)
        author = nodes[1].ledger.checked(index).entry.author
        assert author == next(member.id for member in membership.members if member.name == "data-source-1")
        assert author not in {member.id for member in members.members}
        ending._do([PublishEvidence(contradiction(VoteKind.FINALIZE))])  # found in the step that ended the epoch
        assert (kept / "data-source-3.two-finalize-votes.0").exists()


async def test_old_share_is_erased_once_the_new_epoch_is_voted_in(consortium: Consortium) -> None:
    old = consortium.first_keystore("governance-1")
    nodes = [consortium.node(name) for name in NAMES]
    membership, _ = next_epoch(consortium)
    async with running(nodes):
        await finalize(nodes[0], consortium.source_event("data-source-1", 1))
        assert Keystore.open(old, PASSPHRASE).secrets.bls_share is not None
        await finalize(nodes[0], change(consortium, membership))
        await until(lambda: all(node.snapshot().voting and node.replica.engine.committee.epoch == 1 for node in nodes))
    assert Keystore.open(old, PASSPHRASE).secrets.bls_share is None
    assert Keystore.open(epoch_keystore(old, 1), PASSPHRASE).secrets.bls_share is not None
    for name in NAMES:
        assert check_data_directory(consortium.folder / name, consortium.genesis, lambda *_: None).damages == []
