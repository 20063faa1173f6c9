"""The replica over real sockets and disks: agreement, restart, catching up, what stops a vote."""

import dataclasses
import shutil
import threading
from pathlib import Path

import pytest
import trio
from node_fixtures import Consortium, running, until

from consensus.certificate import verify_certificate
from consensus.codec import encode
from consensus.effect import FetchBlock
from consensus.epochs import anchor
from consensus.identifiers import ZERO_DIGEST, MemberId, View
from consensus.membership import BLS_THRESHOLD, SCHEME_NEEDS
from consensus.rejection import ConfigError, InvariantBroken, Reason, Rejected
from consensus.transition import build
from consensus.vote import Notarization, Vote, VoteKind, sign_proposal, sign_vote
from node.journal import JOURNAL_FILE, Journal, VoteRecord
from node.network import Lane, Received
from node.service import EventState
from node.voter import Voter

pytestmark = pytest.mark.trio

NAMES = ("data-source-1", "data-source-2", "governance-1", "operator-1", "verifier-1")


async def test_every_node_ends_at_the_same_log_and_state(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        events = [nodes[number % 2].submit(consortium.source_event(NAMES[number % 2], number)) for number in range(40)]
        for event in events:
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
        await until(lambda: len({node.snapshot().head for node in nodes}) == 1)
        assert {node.snapshot().log_size for node in nodes} == {40}
        assert len({(node.snapshot().log_root, node.snapshot().state_root) for node in nodes}) == 1
        assert not nodes[4].snapshot().voting


@pytest.mark.parametrize("certificate_scheme", [name for name in SCHEME_NEEDS if name != BLS_THRESHOLD])
async def test_every_certificate_scheme_carries_real_nodes_and_its_receipts(
    tmp_path: Path, certificate_scheme: str
) -> None:
    consortium = Consortium(tmp_path, certificate_scheme=certificate_scheme)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        for number in range(5):
            event = nodes[0].submit(consortium.source_event("data-source-1", number))
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
        await until(lambda: len({node.snapshot().head for node in nodes}) == 1)
        certificate = nodes[4].ledger.certificate
    assert certificate is not None
    assert certificate.scheme == certificate_scheme
    trusted = anchor(consortium.genesis, consortium.genesis.chain_id)
    verify_certificate(trusted.newest.scheme, trusted.chain_id, certificate)
    again = consortium.node("operator-1")
    assert again.snapshot().log_size == 5
    again.ledger.store.close()


async def test_keystore_with_another_members_bls_secret_stops_the_node(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    consortium.secrets["operator-1"] = dataclasses.replace(
        consortium.secrets["operator-1"], key_share=consortium.secrets["governance-1"].key_share
    )
    with pytest.raises(ConfigError, match="expected this member's BLS secret"):
        consortium.node("operator-1")


async def test_restarted_voter_keeps_the_log_and_goes_on_voting(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    others = [consortium.node(name) for name in NAMES if name != "operator-1"]
    async with running(others):
        operator = consortium.node("operator-1")
        async with running([operator]):
            first = others[0].submit(consortium.source_event("data-source-1", 1))
            assert (await others[0].wait_final(first.id, 20)).state is EventState.FINAL
            await until(lambda: operator.status_of(first.id).state is EventState.FINAL)
        pending = others[0].submit(consortium.source_event("data-source-1", 2))
        assert (await others[0].wait_final(pending.id, 0.5)).state is EventState.PENDING
        again = consortium.node("operator-1")
        assert again.snapshot().log_size == 1
        async with running([again]):
            assert (await others[0].wait_final(pending.id, 20)).state is EventState.FINAL
            assert again.snapshot().voting


async def test_late_verifier_catches_up_and_agrees(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    voting = [name for name in NAMES if name != "verifier-1"]
    voters = [consortium.node(name) for name in voting]
    async with running(voters):
        events = [voters[0].submit(consortium.source_event("data-source-1", number)) for number in range(100)]
        for event in events:
            assert (await voters[0].wait_final(event.id, 20)).state is EventState.FINAL
        await until(lambda: {node.snapshot().log_size for node in voters} == {100})
    again = [consortium.node(name) for name in NAMES]
    async with running(again):
        verifier = again[-1]
        await until(lambda: verifier.snapshot().log_size == 100)
        assert verifier.ledger.receipt(events[50].id).index == again[0].ledger.receipt(events[50].id).index
        assert verifier.replica.catch_up.events_fetched == 100


async def test_voter_without_its_journal_follows_but_never_votes_again(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        event = nodes[0].submit(consortium.source_event("data-source-1", 1))
        assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
    (consortium.folder / "data-source-1" / JOURNAL_FILE).unlink()
    reborn = consortium.node("data-source-1")
    assert not reborn.snapshot().voting
    assert "vote journal" in reborn.snapshot().why_not_voting
    reborn.ledger.store.close()


async def test_voter_with_a_wiped_directory_learns_from_peers_that_it_voted_and_never_votes_again(
    tmp_path: Path,
) -> None:
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        event = nodes[0].submit(consortium.source_event("data-source-1", 1))
        assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
    shutil.rmtree(consortium.folder / "governance-1")
    again = [consortium.node(name) for name in NAMES]
    async with running(again):
        wiped = again[2]
        await until(lambda: not wiped.snapshot().voting)
        assert "lacks this identity's finalize vote of view" in wiped.snapshot().why_not_voting
        assert wiped.snapshot().votes_sent == 0
        await until(lambda: wiped.snapshot().log_size == 1)


async def test_voter_restored_from_an_old_copy_of_its_whole_directory_never_votes_again(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    directory, copy = tmp_path / "operator-1", tmp_path / "copy"
    for number in (1, 2):
        nodes = [consortium.node(name) for name in NAMES]
        async with running(nodes):
            event = nodes[0].submit(consortium.source_event("data-source-1", number))
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
            await until(lambda nodes=nodes, number=number: {node.snapshot().log_size for node in nodes} == {number})
        if number == 1:
            shutil.copytree(directory, copy)
    shutil.rmtree(directory)
    shutil.copytree(copy, directory)
    again = [consortium.node(name) for name in NAMES]
    async with running(again):
        await until(lambda: not again[3].snapshot().voting)
        assert "restored from an old copy" in again[3].snapshot().why_not_voting
        await until(lambda: again[3].snapshot().log_size == 2)


async def test_voter_whose_journal_lost_the_last_vote_of_a_view_never_votes_again(tmp_path: Path) -> None:
    """The journal still shows an earlier vote in that view: it is the vote that counts, not the view."""
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        event = nodes[0].submit(consortium.source_event("data-source-1", 1))
        assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
        await until(lambda: {node.snapshot().log_size for node in nodes} == {1})
    path = tmp_path / "operator-1" / JOURNAL_FILE
    operator = next(MemberId(member.id) for member in consortium.genesis.members if member.name == "operator-1")
    journal = Journal.open(path, consortium.genesis.chain_id, operator)
    *kept, lost = journal.records()
    journal.close()
    assert lost.view == max(record.view for record in kept)
    path.unlink()
    shortened = Journal.create(path, consortium.genesis.chain_id, operator)
    shortened.append(kept)
    shortened.close()
    shutil.rmtree(tmp_path / "operator-1" / "rocksdb")
    again = [consortium.node(name) for name in NAMES]
    async with running(again):
        await until(lambda: not again[3].snapshot().voting)
        assert "lacks this identity's finalize vote" in again[3].snapshot().why_not_voting
        assert again[3].snapshot().votes_sent == 0


@pytest.mark.parametrize("later", [VoteKind.NULLIFY, VoteKind.FINALIZE])
async def test_notarize_vote_that_comes_last_does_not_hide_what_was_voted_after_it(
    tmp_path: Path, later: VoteKind
) -> None:
    """A notarization that somebody forwards carries it to peers that have heard the later vote."""
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    operator = next(MemberId(member.id) for member in consortium.genesis.members if member.name == "operator-1")

    def vote(kind: VoteKind, view: int) -> Vote:
        return Vote(1, consortium.genesis.chain_id, 0, kind, view, ZERO_DIGEST, operator, b"", bytes(64))

    memory = nodes[0].replica._last_votes
    for heard in (vote(VoteKind.NOTARIZE, 3), vote(later, 3), vote(VoteKind.NOTARIZE, 3), vote(later, 2)):
        memory.note(heard)
    assert memory.of(operator) == vote(later, 3)
    memory.note(vote(VoteKind.NOTARIZE, 4))
    assert memory.of(operator) == vote(VoteKind.NOTARIZE, 4)
    for node in nodes:
        node.ledger.store.close()


async def test_vote_that_comes_when_its_view_is_final_is_remembered_as_well(tmp_path: Path) -> None:
    """No certificate holds the votes of a member that is slower than its role's quorum."""
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        event = nodes[0].submit(consortium.source_event("data-source-1", 1))
        assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
        replica, committee = nodes[0].replica, nodes[0].ledger.committee
        operator = next(member.id for member in committee.voters if member.name == "operator-1")
        view = replica.engine.final_view

        def late(of_view: int, forged: bool = False) -> Vote:
            signer = consortium.secrets["governance-1" if forged else "operator-1"].identity
            return sign_vote(
                committee, operator, VoteKind.NULLIFY, View(of_view), ZERO_DIGEST, share=b"", sign=signer.sign
            )

        def hear(vote: Vote, sender: MemberId = operator) -> Vote | None:
            replica._last_votes._last_votes.clear()
            replica._last_votes._looked_at_height = 1 << 40
            replica._take(Received(sender, Lane.VOTES, encode(vote)))
            return replica._last_votes.of(operator)

        assert hear(late(view)) == late(view)
        assert hear(late(view, forged=True)) is None
        assert hear(late(view + 1_000)) is None
        assert hear(late(view), next(member.id for member in committee.voters if member.id != operator)) is None


async def test_old_vote_heard_again_does_not_hide_the_later_ones_that_the_log_holds(tmp_path: Path) -> None:
    """A voter restored from an old copy repeats what it voted, to peers that have forgotten all but their logs."""
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        for number in range(2):
            event = nodes[0].submit(consortium.source_event("data-source-1", number))
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
    peer = consortium.node("data-source-1")
    async with running([peer]):
        committee, replica = peer.ledger.committee, peer.replica
        operator = next(member.id for member in committee.voters if member.name == "operator-1")
        sign = consortium.secrets["operator-1"].identity.sign
        old = sign_vote(committee, operator, VoteKind.NULLIFY, View(1), ZERO_DIGEST, share=b"", sign=sign)
        replica._take(Received(operator, Lane.VOTES, encode(old)))
        assert operator in replica._last_votes._last_votes
        told = replica._last_votes.of(operator)
        assert told is not None
        assert told.view == peer.ledger.final.header.view > 1


async def test_voter_that_meets_a_vote_it_lost_before_peers_were_asked_follows_and_does_not_halt(
    tmp_path: Path,
) -> None:
    consortium = Consortium(tmp_path)
    node = consortium.node("operator-1")
    async with running([node]):
        committee = node.ledger.committee
        operator = node.replica.engine.own
        assert operator is not None
        sign = consortium.secrets["operator-1"].identity.sign
        lost = sign_vote(committee, operator, VoteKind.NULLIFY, View(3), ZERO_DIGEST, share=b"", sign=sign)
        peer = next(member.id for member in committee.voters if member.id != operator)
        await until(lambda: node.replica._restored is not None)
        node.replica._take(Received(peer, Lane.VOTES, encode(lost)))
        assert node.replica.halted is None
        assert "lacks this identity's nullify vote of view 3" in node.snapshot().why_not_voting
        assert not node.snapshot().voting


async def test_voter_with_the_journal_of_another_epoch_follows_and_does_not_vote(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    operator = next(MemberId(member.id) for member in consortium.genesis.members if member.name == "operator-1")
    vote = Vote(1, consortium.genesis.chain_id, 1, VoteKind.NULLIFY, 7, ZERO_DIGEST, operator, b"", bytes(64))
    (tmp_path / "operator-1").mkdir()
    journal = Journal.create(tmp_path / "operator-1" / JOURNAL_FILE, consortium.genesis.chain_id, operator)
    journal.append([VoteRecord(7, encode(vote))])
    journal.close()
    nodes = [consortium.node("operator-1")]
    async with running(nodes):
        assert not nodes[0].snapshot().voting
        assert "expected votes of it, found one of epoch 1" in nodes[0].snapshot().why_not_voting


async def test_journal_forgets_no_vote_before_the_finality_that_makes_it_useless_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.voter.COMPACT_AT_BYTES", 0)
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    voter, disk = nodes[3]._voter, threading.Event()
    assert isinstance(voter, Voter)
    store = nodes[3].ledger.store
    sync = store.sync

    def slow_sync() -> None:
        disk.wait()
        sync()

    def journalled_views() -> set[int]:
        return {record.view for record in voter._journal.records()}

    monkeypatch.setattr(store, "sync", slow_sync)
    async with running(nodes):
        try:
            for number in range(3):
                event = nodes[0].submit(consortium.source_event("data-source-1", number))
                assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
                if number == 0:
                    first_view = min(journalled_views())
            await until(lambda: nodes[3].ledger.final.header.log_size == 3)
            assert min(journalled_views()) == first_view
        finally:
            disk.set()
        await until(lambda: not nodes[3].replica.undurable)
        event = nodes[0].submit(consortium.source_event("data-source-1", 3))
        await until(lambda: min(journalled_views()) > first_view)


async def test_journal_is_read_again_for_what_may_be_forgotten_only_where_more_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing becomes final for long, it grows, and reading it takes the longer."""
    monkeypatch.setattr("node.voter.COMPACT_AT_BYTES", 0)
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    voter = nodes[3]._voter
    assert isinstance(voter, Voter)
    compact, kept_from = voter._journal.compact, list[int]()

    def note_and_compact(first_view_kept: int) -> None:
        kept_from.append(first_view_kept)
        compact(first_view_kept)

    monkeypatch.setattr(voter._journal, "compact", note_and_compact)
    async with running(nodes):
        for number in range(5):
            event = nodes[0].submit(consortium.source_event("data-source-1", number))
            assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
    assert kept_from
    assert len(set(kept_from)) == len(kept_from)


async def test_proposal_that_the_host_keeps_is_handed_again_to_an_engine_that_dropped_it(tmp_path: Path) -> None:
    """It came while the engine was being told what is final, and did not take it."""
    consortium = Consortium(tmp_path)
    node = consortium.node("verifier-1")
    committee, replica = node.ledger.committee, node.replica
    leader = committee.leader(View(1))
    built = build(
        node.ledger.final,
        (),
        view=View(1),
        leader=leader.id,
        timestamp_ms=consortium.genesis.created_ms,
        committee=committee,
        max_events=1,
        max_bytes=1,
    )
    signers = {member.id: consortium.secrets[member.name].identity for member in committee.voters}
    proposal = sign_proposal(built.state.header, built.body, signers[leader.id].sign)
    votes = tuple(
        sign_vote(committee, voter, VoteKind.NOTARIZE, View(1), proposal.digest, share=b"", sign=signers[voter].sign)
        for voter in sorted(signers)
    )
    asked = replica.engine.receive(Notarization(view=1, block=proposal.digest, votes=votes), leader.id, 0)
    fetch = next(effect for effect in asked if isinstance(effect, FetchBlock))
    replica._proposals.remember(proposal)
    async with trio.open_nursery() as nursery:
        replica._nursery = nursery
        await replica._fetch(fetch)
        await until(lambda: replica.engine.branches.next_needed(proposal.digest) is None)
        nursery.cancel_scope.cancel()
    node.ledger.store.close()


async def test_events_of_a_voted_ledger_block_survive_a_power_cut_at_every_member(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    encoded = consortium.source_event("data-source-1", 1)
    async with running(nodes) as nursery:
        event = nodes[0].submit(encoded)
        await until(lambda: all(node.snapshot().votes_sent for node in nodes[:4]))
        nursery.cancel_scope.cancel()
    again = [consortium.node(name) for name in NAMES]
    async with running(again):
        assert (await again[3].wait_final(event.id, 20)).state is EventState.FINAL


async def test_refused_event_changes_nothing_and_says_why(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        good = consortium.source_event("data-source-1", 1)
        with pytest.raises(Rejected) as altered:
            nodes[0].submit(good[:-1] + bytes([good[-1] ^ 1]))
        assert altered.value.reason in (Reason.PORTION_MISMATCH, Reason.MALFORMED, Reason.NON_CANONICAL)
        event = nodes[0].submit(good)
        assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
        size = nodes[0].snapshot().log_size
        nodes[1].submit(good)
        await trio.sleep(0.5)
        assert nodes[0].snapshot().log_size == size == 1


async def test_data_directory_with_a_lost_state_value_is_recognised_at_start(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    nodes = [consortium.node(name) for name in NAMES]
    async with running(nodes):
        event = nodes[0].submit(consortium.source_event("data-source-1", 1))
        assert (await nodes[0].wait_final(event.id, 20)).state is EventState.FINAL
    node = consortium.node("data-source-1")
    key = next(key for key, _ in node.ledger.store.state_items())
    node.ledger.store._family("state").delete(key)
    node.ledger.store.close()
    with pytest.raises(InvariantBroken, match="fsck"):
        consortium.node("data-source-1")
