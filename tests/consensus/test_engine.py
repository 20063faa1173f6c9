"""The engine's rules one by one: what it asks of its host after each input, and what it never does."""

import hashlib

import pytest
from simulation.cryptography import Names
from simulation.simulator import Plan, named_committee

from consensus.block import Body, Header, genesis_header
from consensus.branches import Verdict
from consensus.certificate import Certificate
from consensus.codec import encode
from consensus.effect import (
    Broadcast,
    CastVote,
    CombineFinalization,
    FetchBlock,
    Finalized,
    Halt,
    NeedBlocks,
    PublishEvidence,
    RequestProposal,
    Send,
    SetTimer,
    VerifyBlock,
)
from consensus.engine import LOOKAHEAD_VIEWS, Engine, Timing
from consensus.identifiers import ZERO_DIGEST, View
from consensus.rejection import InvariantBroken
from consensus.vote import Notarization, Nullification, Proposal, Stalled, VoteKind

VOTERS = named_committee(Plan(counts=(3, 3, 3), thresholds=(2, 2, 2)))
NAMES = Names(VOTERS)
IDS = [member.id for member in VOTERS.voters]
LEADER, FOLLOWER = IDS[0], IDS[6]
"""The leader of view 1, and one who leads view 7."""
OTHERS = [one for index, one in enumerate(IDS) if index % 3]
"""A quorum without the first member of each role, who is under test."""
GENESIS = genesis_header(VOTERS.chain_id, 0, ZERO_DIGEST, ZERO_DIGEST)
TIMING = Timing(timeout_ms=100, max_timeout_ms=300, heartbeat_ms=1_000)
NOTARIZE, NULLIFY, FINALIZE = VoteKind


def build(view, parent=GENESIS, leaf=b"a", **changes):
    root = hashlib.sha256(leaf).digest()
    body = Body(leaf_hashes=(root,))
    fields = dict(
        version=1, chain_id=VOTERS.chain_id, epoch=0, height=parent.height + 1, view=view,
        leader=VOTERS.leader(View(view)).id, parent=parent.digest, parent_view=parent.view, timestamp_ms=1,
        body_root=body.root, event_count=1, log_size=1, log_root=root, state_root=root,
    )  # fmt: skip
    header = Header(**{**fields, **changes})
    return header, Proposal(version=1, header=encode(header), body=body, signature=b"name")


def vote(kind, view, block=ZERO_DIGEST, voter=IDS[1]):
    return NAMES.vote(voter, kind, View(view), block)


def votes(kind, view, block=ZERO_DIGEST, ids=OTHERS):
    return tuple(vote(kind, view, block, one) for one in sorted(ids))


def notarization(header):
    return Notarization(view=header.view, block=header.digest, votes=votes(NOTARIZE, header.view, header.digest))


def nullification(view):
    return Nullification(view=view, votes=votes(NULLIFY, view))


def certificate(header):
    return Certificate(scheme="names", view=header.view, block=header.digest, epoch=0, signature=b"sum")


class Host:
    """Answers casts and verifications at once; keeps every effect."""

    def __init__(self, own=FOLLOWER, verdict=Verdict.VALID, engine=None):
        self.engine = engine or Engine(VOTERS, own, TIMING, GENESIS, None)
        self.verdict = verdict
        self.effects = []
        self.now = 0

    def do(self, name, *arguments):
        self.carry_out(getattr(self.engine, name)(*arguments, self.now))
        return self

    def hear(self, *messages):
        for message in messages:
            self.do("receive", message, IDS[1])
        return self

    def wait(self, milliseconds):
        self.now += milliseconds
        return self.do("tick")

    def carry_out(self, effects):
        self.effects += effects
        for effect in effects:
            if isinstance(effect, CastVote):
                own = NAMES.vote(self.engine.own, effect.kind, effect.view, effect.block)
                self.do("own_vote", own)
            elif isinstance(effect, VerifyBlock) and self.verdict is not None:
                self.do("block_verified", effect.header.digest, self.verdict)

    def asked(self, kind):
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def cast(self):
        return [(effect.kind, effect.view, effect.block) for effect in self.asked(CastVote)]


def follower(**changes):
    return Host(FOLLOWER, **changes).do("start")


def test_proposal_is_notarized_then_finalized_and_the_view_left_before_finality():
    host = follower()
    header, proposal = build(1)
    host.hear(proposal)
    assert host.cast() == [(NOTARIZE, 1, header.digest)]
    host.hear(*votes(NOTARIZE, 1, header.digest))
    assert host.engine.view == 2
    assert host.cast()[-1] == (FINALIZE, 1, header.digest)
    host.hear(*votes(FINALIZE, 1, header.digest))
    (combine,) = host.asked(CombineFinalization)
    assert VOTERS.has_quorum(one.voter for one in combine.votes)
    host.hear(certificate(header))
    (final,) = host.asked(Finalized)
    assert final.headers == (header,)
    assert set(combine.votes) <= set(final.votes)


def test_leader_with_work_proposes_at_once_and_casts_vote_and_proposal_together():
    host = Host(LEADER).do("start")
    assert host.asked(RequestProposal) == []
    host.do("work_available")
    assert host.asked(RequestProposal) == [RequestProposal(View(1), GENESIS, may_be_empty=False)]
    header, proposal = build(1)
    host.do("own_proposal", proposal)
    assert host.asked(CastVote) == [CastVote(NOTARIZE, View(1), header.digest, proposal)]
    host.do("own_proposal", build(1, leaf=b"b")[1])
    assert len(host.cast()) == 1


def test_leader_whose_branch_has_all_that_waits_proposes_nothing_until_more_comes_or_time_asks():
    header, proposal = build(1)
    host = Host(IDS[1]).do("start").do("work_available").hear(proposal, notarization(header))
    (asked,) = host.asked(RequestProposal)
    assert asked == RequestProposal(View(2), header, may_be_empty=False)
    assert not host.engine.waits_for_work
    host.do("nothing_to_propose", asked).do("tick").hear(*votes(FINALIZE, 1, header.digest))
    assert host.engine.waits_for_work
    host.hear(certificate(header))
    assert host.engine.finalized == header
    assert host.asked(RequestProposal) == [asked]
    assert host.do("work_available").asked(RequestProposal) == [asked, asked]
    assert not host.engine.waits_for_work
    host.do("nothing_to_propose", asked).do("work_exhausted")
    host.wait(1_000)
    assert host.asked(RequestProposal)[2:] == [RequestProposal(View(2), header, may_be_empty=True)]
    assert host.do("nothing_to_propose", host.asked(RequestProposal)[-1]).asked(RequestProposal)[3:] == []


def test_leader_that_had_nothing_for_one_branch_is_asked_again_for_another():
    """What is on a branch that is left behind waits again."""
    header, proposal = build(3)
    host = Host(IDS[3]).do("start").do("work_available")
    host.hear(nullification(1), nullification(2), proposal, notarization(header))
    (asked,) = host.asked(RequestProposal)
    host.do("nothing_to_propose", asked)
    assert host.engine.waits_for_work
    host.hear(*(nullification(view) for view in range(4, 12)))
    assert not host.engine.waits_for_work
    child, grandchild = build(12, header), build(13, header)
    host.hear(child[1], notarization(child[0]))
    assert host.asked(RequestProposal) == [asked, RequestProposal(View(13), child[0], may_be_empty=False)]
    host.do("nothing_to_propose", asked)
    assert not host.engine.waits_for_work
    host.do("own_proposal", grandchild[1])
    assert host.cast()[-1] == (NOTARIZE, 13, grandchild[0].digest)


def test_leader_that_had_nothing_is_asked_again_in_the_next_view_it_leads():
    """What came while others led was not told: the host had work already."""
    header, proposal = build(3)
    host = Host(IDS[3]).do("start").do("work_available")
    host.hear(nullification(1), nullification(2), proposal, notarization(header))
    (asked,) = host.asked(RequestProposal)
    host.do("nothing_to_propose", asked).hear(*(nullification(view) for view in range(4, 13)))
    assert host.asked(RequestProposal) == [asked, RequestProposal(View(13), header, may_be_empty=False)]


def test_second_proposal_of_a_leader_gets_no_vote_and_becomes_evidence():
    host = follower()
    first, second = build(1), build(1, leaf=b"b")
    host.hear(first[1], second[1], second[1])
    assert host.cast() == [(NOTARIZE, 1, first[0].digest)]
    assert len(host.asked(PublishEvidence)) == 1


def test_voter_that_nullified_does_not_finalize_and_the_other_way_round():
    host = follower()
    header, proposal = build(1)
    host.hear(proposal).wait(100)
    assert host.cast()[-1] == (NULLIFY, 1, ZERO_DIGEST)
    host.hear(*votes(NOTARIZE, 1, header.digest))
    assert host.engine.view == 2
    assert FINALIZE not in [kind for kind, _, _ in host.cast()]


def test_proposal_over_a_gap_waits_for_the_nullification():
    host = follower().hear(nullification(2), build(3)[1])
    assert host.engine.view == 3
    assert host.cast() == []
    host.hear(nullification(1))
    assert [(kind, view) for kind, view, _ in host.cast()] == [(NOTARIZE, 3)]


def test_proposal_that_skips_a_notarized_view_gets_no_vote():
    header, proposal = build(1)
    host = follower().hear(proposal, notarization(header), build(2)[1])
    assert [view for kind, view, _ in host.cast() if kind == NOTARIZE] == [1]


def test_invalid_proposal_is_nullified_at_once_and_halts_when_certified():
    host = follower(verdict=Verdict.INVALID)
    header, proposal = build(1)
    host.hear(proposal)
    assert host.cast() == [(NULLIFY, 1, ZERO_DIGEST)]
    host.hear(notarization(header))
    assert "certified but invalid" in host.asked(Halt)[0].reason
    assert host.engine.receive(nullification(1), IDS[1], 0) == []


def test_proposal_at_the_wrong_height_is_nullified():
    assert follower().hear(build(1, height=2)[1]).cast() == [(NULLIFY, 1, ZERO_DIGEST)]


def test_censoring_proposal_gets_no_vote_until_the_timer_nullifies_but_is_followed_once_notarized():
    host = follower(verdict=Verdict.REFUSED)
    header, proposal = build(1)
    host.hear(proposal)
    assert host.cast() == []
    host.hear(notarization(header), build(2, parent=header)[1])
    assert host.cast() == [(FINALIZE, 1, header.digest)]


def test_missing_events_are_fetched_and_the_vote_follows():
    host = follower(verdict=Verdict.MISSING)
    header, proposal = build(1)
    host.hear(proposal)
    assert host.asked(FetchBlock) == [FetchBlock(header.digest, (LEADER,))]
    host.do("block_verified", header.digest, Verdict.VALID)
    assert host.cast() == [(NOTARIZE, 1, header.digest)]


def test_notarized_block_that_never_came_is_fetched_from_those_who_voted():
    header, proposal = build(1)
    host = follower().hear(notarization(header))
    (fetch,) = host.asked(FetchBlock)
    assert set(fetch.sources) == set(OTHERS)
    host.hear(proposal)
    assert host.cast() == [(FINALIZE, 1, header.digest)]


def test_finalization_far_ahead_leads_to_catch_up_and_the_view_after_it():
    parent, _ = build(8)
    header, _ = build(9, parent=parent)
    host = follower().hear(certificate(header))
    assert host.asked(NeedBlocks) == [NeedBlocks(1, certificate(header))]
    assert host.engine.view == 10
    host.do("caught_up", header, certificate(header))
    assert host.engine.finalized == header


def test_ancestors_are_finalized_with_the_block():
    first, one = build(1)
    second, two = build(2, parent=first)
    host = follower().hear(one, notarization(first), two, notarization(second), certificate(second))
    assert [effect.headers for effect in host.asked(Finalized)] == [(first, second)]


def test_nullified_and_finalized_view_halts():
    header, proposal = build(1)
    host = follower().hear(nullification(1), proposal, certificate(header))
    assert "nullified and finalized" in host.engine.halted
    assert host.asked(Finalized) == []
    other = follower().hear(nullification(1)).do("caught_up", header, certificate(header))
    assert "nullified and finalized" in other.engine.halted


def test_two_notarizations_or_finalizations_of_a_view_halt():
    header, other = build(1)[0], build(1, leaf=b"b")[0]
    assert "notarized" in follower().hear(notarization(header), notarization(other)).engine.halted
    host = follower().do("caught_up", header, certificate(header)).hear(certificate(other))
    assert "finalized" in host.engine.halted


def test_own_vote_that_the_journal_lacks_halts():
    host = follower().hear(vote(NOTARIZE, 1, build(1)[0].digest, FOLLOWER))
    assert "our journal lacks" in host.engine.halted


def test_bad_share_is_excluded_and_the_rest_combined_again():
    header, proposal = build(1)
    host = follower().hear(proposal, notarization(header), *votes(FINALIZE, 1, header.digest))
    first = host.asked(CombineFinalization)[0]
    bad = first.votes[0].voter
    host.do("combine_failed", View(1), [bad])
    host.hear(*votes(FINALIZE, 1, header.digest, IDS[:1] + IDS[3:4]))
    second = host.asked(CombineFinalization)[-1]
    assert second is not first
    assert bad not in [one.voter for one in second.votes]


def test_restored_votes_are_repeated_and_never_contradicted():
    header, _ = build(1)
    host = Host(FOLLOWER)
    host.engine.restore([vote(NOTARIZE, 1, header.digest, FOLLOWER)], [], View(0))
    host.do("start").hear(build(1, leaf=b"b")[1])
    assert vote(NOTARIZE, 1, header.digest, FOLLOWER) in [effect.message for effect in host.asked(Broadcast)]
    assert host.cast() == []


def test_journal_that_contradicts_itself_or_is_anothers_stops_the_start():
    for journal in (
        [vote(NULLIFY, 1, voter=FOLLOWER), vote(FINALIZE, 1, b"a" * 32, FOLLOWER)],
        [vote(FINALIZE, 1, b"a" * 32, FOLLOWER), vote(NULLIFY, 1, voter=FOLLOWER)],
        [vote(NOTARIZE, 1, b"a" * 32, FOLLOWER), vote(NOTARIZE, 1, b"b" * 32, FOLLOWER)],
        [vote(NULLIFY, 1, voter=IDS[1])],
    ):
        with pytest.raises(InvariantBroken):
            Host(FOLLOWER).engine.restore(journal, [], View(0))


def test_voter_votes_in_no_view_that_its_journal_has_forgotten():
    host = Host(IDS[3])
    host.engine.restore([], [], View(5))
    host.do("start").do("work_available")
    header, proposal = build(1)
    host.hear(proposal, notarization(header), nullification(2), nullification(3)).wait(100).wait(100).wait(200)
    assert VOTERS.leader(host.engine.view).id == IDS[3]
    assert host.asked(RequestProposal) == host.cast() == []
    fifth, proposal = build(5, header)
    host.hear(nullification(4), proposal)
    assert host.cast() == [(NOTARIZE, 5, fifth.digest)]


def test_votes_of_views_that_the_journal_has_forgotten_halt_nobody_who_hears_its_own() -> None:
    """Any peer may keep one, and certificates carry them."""
    host = Host(FOLLOWER)
    host.engine.restore([], [], View(50))
    host.do("start")
    host.hear(Nullification(view=7, votes=votes(NULLIFY, 7, ids={*OTHERS, FOLLOWER})), vote(NULLIFY, 9, voter=FOLLOWER))
    assert host.engine.halted is None
    assert host.engine.view == 8
    host.hear(vote(NULLIFY, 50, voter=FOLLOWER))
    assert host.engine.halted is not None


def test_leader_sends_along_what_its_proposal_rests_on_for_others_may_never_have_seen_it():
    host = Host(IDS[3]).do("start").do("work_available")
    header, proposal = build(1)
    host.hear(proposal, nullification(1), notarization(header), nullification(2), nullification(3))
    assert [asked.parent for asked in host.asked(RequestProposal)] == [header]
    sent = [effect.message for effect in host.asked(Broadcast)]
    assert notarization(header) not in sent, "it came when view 1 was left already"
    host.effects.clear()
    _, own = build(4, header)
    host.do("own_proposal", own)
    assert [effect.message for effect in host.asked(Broadcast)] == [nullification(2), notarization(header)]
    assert host.cast() == [(NOTARIZE, 4, own.digest)]


def test_leader_sends_the_finalization_of_its_parent_along_where_a_view_lies_between() -> None:
    host = Host(IDS[3]).do("start").do("work_available")
    header, proposal = build(1)
    own_header, own = build(4, header)
    between = [nullification(2), nullification(3)]
    host.hear(proposal, *between, certificate(header))
    assert [asked.parent for asked in host.asked(RequestProposal)] == [header]
    host.effects.clear()
    host.do("own_proposal", own)
    sent = [effect.message for effect in host.asked(Broadcast)]
    assert sent == [between[0], certificate(header)], "the nullification of view 3 has been forwarded"
    assert (NOTARIZE, 4, own_header.digest) in follower().hear(proposal, between[1], *sent, own).cast()


def test_finalization_that_leads_on_by_itself_is_forwarded_like_any_certificate() -> None:
    header, proposal = build(1)
    host = follower().hear(proposal)
    host.effects.clear()
    host.hear(certificate(header))
    assert host.engine.view == 2
    assert [effect.message for effect in host.asked(Broadcast)] == [certificate(header)]


def test_certificates_sent_at_once_are_as_many_as_a_peer_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest it asked for first: what does not fit would be dropped where it waits for the peer."""
    host = follower().hear(*(nullification(view) for view in range(1, 9)))
    stalled = Stalled(version=1, chain_id=VOTERS.chain_id, epoch=0, view=1, finalized_view=0, missing_view=2)
    monkeypatch.setattr("consensus.engine.MAX_ANSWER_BYTES", 3 * len(encode(nullification(1))))
    host.effects.clear()
    host.do("receive", stalled, IDS[1])
    assert [effect.message.view for effect in host.asked(Send)] == [2, 3, 4]
    monkeypatch.setattr("consensus.engine.MAX_ANSWER_BYTES", 1)
    host.effects.clear()
    host.do("receive", stalled, IDS[2])
    assert [effect.message.view for effect in host.asked(Send)] == [2]


def test_leader_of_the_view_after_its_parent_sends_nothing_twice():
    host = Host(IDS[3]).do("start").do("work_available")
    parent = notarized_run(host, 3)[-1]
    host.effects.clear()
    host.do("own_proposal", build(4, parent)[1])
    assert host.asked(Broadcast) == []


def test_vote_nobody_asked_for_is_not_counted():
    with pytest.raises(InvariantBroken):
        follower().do("own_vote", vote(NULLIFY, 1, voter=FOLLOWER))


def test_timeouts_grow_with_views_that_timed_out_up_to_the_cap_and_fall_slowly_on_finality():
    host = follower().do("work_available")
    for view, timeout_ms in ((1, 150), (2, 225), (3, 300), (4, 300)):
        host.wait(host.engine._timeout_ms).hear(nullification(view))
        assert host.engine._timeout_ms == timeout_ms
    for view, timeout_ms in ((5, 250), (6, 212), (7, 184)):
        header, _ = build(view)
        host.do("caught_up", header, certificate(header))
        assert host.engine._timeout_ms == timeout_ms


def test_timeouts_grow_with_views_that_are_notarized_after_the_timer_fired_too():
    host, parent = follower().do("work_available"), GENESIS
    for view, timeout_ms in ((1, 150), (2, 225), (3, 300)):
        host.wait(host.engine._timeout_ms)
        assert host.cast()[-1] == (NULLIFY, view, ZERO_DIGEST)
        parent, proposal = build(view, parent)
        host.hear(proposal, notarization(parent))
        assert host.engine.view == view + 1
        assert host.engine._timeout_ms == timeout_ms
    assert FINALIZE not in [kind for kind, _, _ in host.cast()]
    parent, proposal = build(4, parent)
    host.hear(proposal, notarization(parent))
    assert host.cast()[-1] == (FINALIZE, 4, parent.digest)
    assert host.engine._timeout_ms == 300


def test_one_bad_leader_in_three_does_not_drive_timeouts_to_the_cap():
    timing = Timing(timeout_ms=400, max_timeout_ms=30_000, heartbeat_ms=60_000)
    host = follower(engine=Engine(VOTERS, FOLLOWER, timing, GENESIS, None)).do("work_available")
    for cycle in range(20):
        first = 1 + len(IDS) * cycle
        for view in range(first, first + 3):
            host.wait(host.engine._timeout_ms).hear(nullification(view))
        for view in range(first + 3, first + len(IDS)):
            header, _ = build(view)
            host.do("caught_up", header, certificate(header))
        assert host.engine._timeout_ms < 1_500


def test_view_of_a_leader_out_of_reach_is_nullified_at_once_but_only_while_there_is_work():
    host = follower().do("peers_lost", [LEADER])
    assert host.cast() == []
    host.do("work_available")
    assert host.cast() == [(NULLIFY, 1, ZERO_DIGEST)]
    assert host.do("peers_lost", []).hear(nullification(1)).cast() == [(NULLIFY, 1, ZERO_DIGEST)]
    assert host.engine._timeout_ms == TIMING.timeout_ms


def test_leader_that_led_in_vain_is_not_waited_for_until_it_is_heard_again():
    rounds = len(IDS)
    host = follower().do("work_available").hear(*(nullification(view) for view in range(1, rounds + 1)))
    assert VOTERS.leader(View(rounds + 1)).id == LEADER
    # FOLLOWER led view 7 itself; the voters in the nullifications were heard, the first of each role was not.
    assert host.cast() == [(NULLIFY, rounds + 1, ZERO_DIGEST)]
    again = follower().do("work_available").hear(*(nullification(view) for view in range(1, rounds)))
    again.hear(vote(NULLIFY, rounds, voter=LEADER), nullification(rounds))
    assert (NULLIFY, rounds + 1, ZERO_DIGEST) not in again.cast()


def test_proposal_of_a_leader_thought_absent_is_notarized_all_the_same():
    header, proposal = build(1)
    host = follower().do("peers_lost", [LEADER]).hear(proposal)
    assert host.cast() == [(NOTARIZE, 1, header.digest)]


def test_view_that_too_few_are_left_to_notarize_is_nullified_without_waiting():
    host = follower().do("work_available").hear(vote(NULLIFY, 1, voter=IDS[1]))
    assert host.cast() == []
    host.hear(vote(NULLIFY, 1, voter=IDS[2]))
    assert host.cast() == [(NULLIFY, 1, ZERO_DIGEST)]


def test_idle_leader_waits_for_the_heartbeat_and_idle_followers_nullify_a_dead_one_after_it():
    leader, host = Host(LEADER).do("start"), follower()
    assert leader.asked(SetTimer) == host.asked(SetTimer) == [SetTimer(1_000)]
    assert leader.wait(999).asked(RequestProposal) == []
    assert leader.wait(1).asked(RequestProposal) == [RequestProposal(View(1), GENESIS, may_be_empty=True)]
    assert host.wait(1_000).cast() == []
    assert host.wait(100).cast() == [(NULLIFY, 1, ZERO_DIGEST)]


def test_leader_on_a_tip_that_is_not_final_proposes_after_half_a_timeout():
    header, proposal = build(1)
    host = Host(IDS[1]).do("start").hear(proposal, notarization(header))
    assert host.asked(RequestProposal) == []
    assert host.wait(50).asked(RequestProposal) == [RequestProposal(View(2), header, may_be_empty=True)]


def test_standstill_asks_and_the_asked_answer_once_with_what_is_missing():
    host = follower().do("work_available").wait(100).wait(100)
    (asked,) = [effect.message for effect in host.asked(Broadcast) if isinstance(effect.message, Stalled)]
    header, proposal = build(1)
    other = Host(LEADER).do("start").hear(proposal, notarization(header), certificate(header), nullification(2))
    other.hear(asked, asked)
    assert other.asked(Send) == [Send(IDS[1], certificate(header)), Send(IDS[1], nullification(2))]


def test_votes_too_far_ahead_or_below_finality_change_nothing():
    host = follower()
    far = vote(NULLIFY, 2 + LOOKAHEAD_VIEWS)
    assert not host.engine.wants(far)
    host.hear(far)
    assert host.engine._rounds == {}
    header, _ = build(3)
    host.do("caught_up", header, certificate(header))
    for old in (vote(NULLIFY, 3), nullification(3), notarization(build(2)[0]), certificate(build(2)[0])):
        assert not host.engine.wants(old)
        host.hear(old)
    assert host.engine._rounds == {}


def test_observer_follows_and_never_votes():
    header, proposal = build(1)
    host = Host(None).do("start").hear(proposal, notarization(header), certificate(header)).wait(5_000).wait(5_000)
    assert host.engine.finalized == header
    assert host.cast() == []


def notarized_run(host, length):
    """A run of notarized ledger blocks none of which is final."""
    parent, run = GENESIS, []
    for view in range(1, length + 1):
        parent, proposal = build(view, parent)
        host.hear(proposal, notarization(parent))
        run.append(parent)
    return run


def test_notarized_ledger_blocks_run_no_farther_ahead_of_the_final_one_than_one_certificate_may_reach(monkeypatch):
    monkeypatch.setattr("consensus.engine.MAX_UNFINAL_BLOCKS", 3)
    host = follower()
    run = notarized_run(host, 3)
    header, proposal = build(4, run[-1])
    host.hear(proposal)
    assert (NOTARIZE, 4, header.digest) not in host.cast()
    host.hear(certificate(run[0]))
    assert host.engine.finalized == run[0]
    assert (NOTARIZE, 4, header.digest) in host.cast()


def test_leader_of_a_view_too_far_ahead_waits_for_finality_and_proposes_then(monkeypatch):
    monkeypatch.setattr("consensus.engine.MAX_UNFINAL_BLOCKS", 3)
    host = Host(IDS[3]).do("start").do("work_available")
    run = notarized_run(host, 3)
    assert host.engine.view == 4
    assert host.asked(RequestProposal) == []
    host.hear(certificate(run[0]))
    assert [asked.parent for asked in host.asked(RequestProposal)] == [run[-1]]


def test_votes_of_one_voter_for_views_to_come_make_no_idle_node_more_patient():
    """It nullifies with the others, or a view that they are in would last; it waits no longer for the next for that."""
    host = follower()
    for view in range(1, 9):
        host.hear(vote(NULLIFY, view + 40)).wait(101).hear(nullification(view))
        assert host.engine.view == view + 1
    host.do("work_available").wait(100)
    assert host.cast()[-1] == (NULLIFY, 9, ZERO_DIGEST)


def test_vote_far_ahead_is_no_sign_of_life_for_more_than_one_turn_of_leaders():
    turn = len(IDS)
    host = follower().do("work_available").hear(vote(NULLIFY, 60, voter=LEADER))
    host.hear(*(nullification(view) for view in range(1, 3 * turn + 1)))
    assert VOTERS.leader(View(3 * turn + 1)).id == LEADER
    assert host.cast()[-1] == (NULLIFY, 3 * turn + 1, ZERO_DIGEST)
