"""The golden vectors of what nodes say to each other: messages of the round, requests and answers, and their frames.

Each refused case has one fault.
"""

from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import trio
from agreement import SMALL, Case, founded, octets, refusal
from msgspec.structs import replace
from shown import shown

from consensus.block import Body, Header
from consensus.codec import decode, encode
from consensus.event import EventSignature
from consensus.identifiers import ZERO_DIGEST, MemberId, View
from consensus.membership import ED25519_LIST, committee
from consensus.merkle import Frontier
from consensus.state import SOURCE_TABLE
from consensus.vote import (
    Notarization,
    Nullification,
    Proposal,
    Stalled,
    Vote,
    VoteKind,
    check_notarization,
    check_nullification,
    check_proposal,
    check_stalled,
    check_vote,
    proposal_message,
    sign_proposal,
    vote_message,
)
from node import messages as m
from node.lanes import Inbox, Lane, Outbox
from node.link import (
    FRAME_HEADER,
    REQUEST_NUMBER,
    FrameKind,
    Link,
    LinkKind,
    Misbehaved,
    NetworkCounters,
    NetworkLimits,
)

NOTARIZE, NULLIFY, FINALIZE = VoteKind
GENESIS, SECRETS = founded(ED25519_LIST, *SMALL)
COMMITTEE = committee(GENESIS)
IDS = {member.name: member.id for member in GENESIS.members}
VOTERS = [voter.name for voter in COMMITTEE.voters]
QUORUM = ("data-source-1", "data-source-3", "governance-1", "operator-1")
VIEW = View(2)
LEADER = COMMITTEE.leader(VIEW).name
BODY = Body((octets("leaf 1"), octets("leaf 2")))
HEADER = Header(
    version=1, chain_id=GENESIS.chain_id, epoch=0, height=1, view=VIEW, leader=IDS[LEADER], parent=octets("parent"),
    parent_view=0, timestamp_ms=GENESIS.created_ms, body_root=BODY.root, event_count=2, log_size=2,
    log_root=octets("log"), state_root=octets("state"),
)  # fmt: skip

RoundMessage = Vote | Proposal | Notarization | Nullification | Stalled
CHECKS: dict[type, Callable[..., object]] = {
    Vote: check_vote,
    Proposal: check_proposal,
    Notarization: check_notarization,
    Nullification: check_nullification,
    Stalled: check_stalled,
}


# Messages of the round


def vote(kind: VoteKind, name: str, signer: str = "", **changes: object) -> Vote:
    """A vote of a member, or what another might sign in its place."""
    block = ZERO_DIGEST if kind is NULLIFY else HEADER.digest
    share = octets("share") * 2 if kind is FINALIZE else b""
    made = replace(Vote(1, GENESIS.chain_id, 0, kind, VIEW, block, IDS[name], share, b""), **changes)
    return replace(made, signature=SECRETS[signer or name].identity.sign(vote_message(made)))


def votes(kind: VoteKind, *names: str, **changes: object) -> tuple[Vote, ...]:
    """In the order of their voters."""
    return tuple(sorted((vote(kind, name, **changes) for name in names), key=lambda one: one.voter))


def proposal(signer: str = LEADER, body: Body = BODY, **changes: object) -> Proposal:
    """The leader's, or what somebody might sign in its place."""
    return sign_proposal(replace(HEADER, **changes), body, SECRETS[signer].identity.sign)


def round_messages() -> list[Case]:
    """Votes, proposals, notarizations, nullifications and questions of who stalls, under one genesis."""
    digest = HEADER.digest
    accepted: dict[str, RoundMessage] = {
        "stalled": Stalled(1, GENESIS.chain_id, 0, 9, 0, 3),
        "a vote to nullify": vote(NULLIFY, "operator-1"),
        "a vote to finalize, with a share of the certificate": vote(FINALIZE, "governance-1"),
        "a proposal": proposal(),
        "a proposal of no events": proposal(body=Body(()), body_root=Body(()).root, event_count=0),
        "a notarization": Notarization(VIEW, digest, votes(NOTARIZE, *QUORUM)),
        "a notarization by all": Notarization(VIEW, digest, votes(NOTARIZE, *VOTERS)),
        "a nullification": Nullification(VIEW, votes(NULLIFY, *QUORUM)),
        "a vote to notarize": vote(NOTARIZE, "data-source-2"),
    }
    for what, message in accepted.items():
        try:
            _judge(encode(message), type(message))
        except Exception as error:
            raise AssertionError(what) from error
    return [
        {
            "genesis": encode(GENESIS).hex(),
            "chain_id": GENESIS.chain_id.hex(),
            "refused": [
                refusal(what, partial(_judge, bad, kind), message=bad.hex()) for what, kind, bad in _bad_messages()
            ],
            "accepted": [_accepted(what, message) for what, message in accepted.items()],
        }
    ]


def _accepted(what: str, message: RoundMessage) -> Case:
    signed = {}
    if isinstance(message, Vote):
        signed["signed"] = vote_message(message).hex()
    if isinstance(message, Proposal):
        signed["signed"] = proposal_message(message.header).hex()
    return {"what": what, **signed, "message": encode(message).hex()}


def _judge(encoded: bytes, kind: type[RoundMessage]) -> None:
    CHECKS[kind](decode(encoded, kind, 1 << 20), COMMITTEE)


def _bad_messages() -> Iterator[tuple[str, type[RoundMessage], bytes]]:
    """What it is, of what kind, and its bytes."""
    for what, kind, bad in _bad_structures():
        yield what, kind, encode(bad)
    good = encode(vote(NOTARIZE, "data-source-2"))
    yield "a vote and a byte", Vote, good + b"\x00"
    yield "a vote a byte short", Vote, good[:-1]
    yield "a vote whose version is in two bytes", Vote, good.replace(b"\xa4vote\x01", b"\xa4vote\xcc\x01", 1)
    raw = msgspec.msgpack.decode(good)
    yield "a vote of view 0", Vote, msgspec.msgpack.encode([*raw[:5], 0, *raw[6:]])
    yield "a vote of a fourth kind", Vote, msgspec.msgpack.encode([*raw[:4], 4, *raw[5:]])
    yield "a vote with a field more", Vote, msgspec.msgpack.encode([*raw, b""])
    yield "a vote with a field less", Vote, msgspec.msgpack.encode(raw[:-1])
    yield "a notarization without votes", Notarization, encode(Notarization(VIEW, HEADER.digest, ()))
    yield "stalled in view 0", Stalled, encode(Stalled(1, GENESIS.chain_id, 0, 0, 0, 1))


def _bad_structures() -> Iterator[tuple[str, type[RoundMessage], RoundMessage]]:
    elsewhere, stranger = octets("another chain"), MemberId(octets("stranger"))
    other, verifier = "governance-1", "verifier-1"
    yield "a vote of another chain", Vote, vote(NOTARIZE, other, chain_id=elsewhere)
    yield "a vote of another epoch", Vote, vote(NOTARIZE, other, epoch=1)
    yield "a vote to nullify with a digest", Vote, vote(NULLIFY, other, block=HEADER.digest)
    yield "a vote to notarize nothing", Vote, vote(NOTARIZE, other, block=ZERO_DIGEST)
    yield "a vote to notarize with a share", Vote, vote(NOTARIZE, other, share=octets("share"))
    yield "a vote of a stranger", Vote, vote(NOTARIZE, other, voter=stranger)
    yield "a vote of a verifier", Vote, vote(NOTARIZE, verifier)
    yield "a vote that another signed", Vote, vote(NOTARIZE, other, signer="operator-1")
    shared = vote(FINALIZE, other)
    yield "a share put in after signing", Vote, replace(shared, share=octets("another share") * 2)
    for what, bad in (
        ("of another chain", proposal(chain_id=elsewhere)),
        ("of another epoch", proposal(epoch=1)),
        ("of height 0", proposal(height=0)),
        ("whose parent is of its view", proposal(parent_view=VIEW)),
        ("of who does not lead", proposal(other, leader=IDS[other])),
        ("that another signed", proposal(other)),
        ("with another body", proposal(body=Body(BODY.leaf_hashes[::-1]))),
        ("with another number of events", proposal(event_count=1)),
        ("with an event twice", _twice()),
        ("whose header is not canonical", _wide(proposal())),
    ):
        yield f"a proposal {what}", Proposal, bad
    digest, quorum = HEADER.digest, votes(NOTARIZE, *QUORUM)
    for what, listed in (
        ("with a voter twice", (quorum[0], *quorum)),
        ("with votes in another order", quorum[::-1]),
        ("with a vote for another ledger block", _with(quorum, 1, block=octets("another"))),
        ("with a vote of another view", _with(quorum, 1, view=VIEW + 1)),
        ("with a vote to finalize", _with(quorum, 1, kind=FINALIZE)),
        ("without a quorum of one role", votes(NOTARIZE, *QUORUM[1:])),
        ("with a wrong signature", (replace(quorum[0], signature=bytes(64)), *quorum[1:])),
        ("of another epoch", votes(NOTARIZE, *QUORUM, epoch=1)),
    ):
        yield f"a notarization {what}", Notarization, Notarization(VIEW, digest, listed)
    yield "a notarization of another view", Notarization, Notarization(View(VIEW + 1), digest, quorum)
    nulls = votes(NULLIFY, *QUORUM)
    yield "a nullification of another view", Nullification, Nullification(View(VIEW + 1), nulls)
    yield "a nullification of votes to notarize", Nullification, Nullification(VIEW, quorum)
    yield (
        "a nullification without a quorum of one role",
        Nullification,
        Nullification(VIEW, votes(NULLIFY, *QUORUM[1:])),
    )
    yield "stalled on another chain", Stalled, Stalled(1, elsewhere, 0, 9, 0, 3)
    yield "stalled in another epoch", Stalled, Stalled(1, GENESIS.chain_id, 1, 9, 0, 3)


def _with(held: tuple[Vote, ...], place: int, **changes: object) -> tuple[Vote, ...]:
    """With one of them changed and signed anew."""
    name = next(name for name in VOTERS if IDS[name] == held[place].voter)
    turned = replace(held[place], signature=b"", **changes)
    turned = replace(turned, signature=SECRETS[name].identity.sign(vote_message(turned)))
    return (*held[:place], turned, *held[place + 1 :])


def _twice() -> Proposal:
    body = Body((BODY.leaf_hashes[0],) * 2)
    return proposal(body=body, body_root=body.root)


def _wide(good: Proposal) -> Proposal:
    header = good.header.replace(b"\xa5block\x01", b"\xa5block\xcc\x01", 1)
    turned = replace(good, header=header, signature=b"")
    return replace(turned, signature=SECRETS[LEADER].identity.sign(proposal_message(header)))


# Requests, answers, gossip, frames


def node_messages() -> list[Case]:
    """Requests and answers with the frame each travels in, and frames of the other kinds."""
    cases: list[Case] = []
    for what, bad in _bad_requests():
        cases.append(refusal(what, partial(m.decode_request, bad), content="request", payload=bad.hex()))
    for what, bad in _bad_gossip():
        cases.append(refusal(what, partial(m.unpack_gossip, bad), content="events", payload=bad.hex()))
    cases += _faults()
    for number, (content, structure) in enumerate(_conversations(), 1):
        payload = encode(structure)
        assert decode(payload, type(structure), m.MAX_ANSWER_BYTES) == structure
        kind = FrameKind.REQUEST if content == "request" else FrameKind.RESPONSE
        cases.append(_framed(structure.__struct_config__.tag, content, kind, payload, number))
    gossip = m.pack_gossip([events_bytes(index) for index in range(2)])
    assert m.unpack_gossip(gossip) == [events_bytes(index) for index in range(2)]
    cases.append(_framed("a refusal", "refusal", FrameKind.REFUSAL, b"overloaded", 3))
    cases.append(_framed("a heartbeat", "heartbeat", FrameKind.HEARTBEAT, b""))
    cases.append(_framed("a vote", "vote", FrameKind.VOTES, encode(vote(NULLIFY, "operator-1"))))
    cases.append(_framed("two events", "events", FrameKind.EVENTS, gossip))
    return cases


def events_bytes(index: int) -> bytes:
    """An event of the small log, as it is sent."""
    held = shown().ledger
    return msgspec.msgpack.encode([held.entry(index), held.portions(index)])


class Fed:
    """A connection on which some bytes come, and then no more."""

    sent_bytes = received_bytes = 0

    def __init__(self, received: bytes) -> None:
        self._left = [received]

    async def receive(self) -> bytes:
        """What comes, once."""
        await trio.lowlevel.checkpoint()
        if not self._left:
            raise trio.EndOfChannel
        return self._left.pop()

    async def send(self, frames: bytes) -> None:
        """Nobody reads it."""
        await trio.sleep_forever()

    def abort(self) -> None:
        """There is nothing to close."""


async def _receive(stream: LinkKind, frame: bytes) -> None:
    member, limits = MemberId(octets("member")), NetworkLimits()
    inbox = Inbox([member], {Lane.VOTES: limits.votes_inbox_bytes, Lane.EVENTS: limits.events_inbox_bytes})
    link = Link(
        member=member,
        kind=stream,
        connection=Fed(frame),  # type: ignore[arg-type]
        outbox=Outbox(stream.lane, limits.votes_outbox_bytes),
        inbox=inbox,
        serve=lambda _link, _number, _payload: None,
        limits=limits,
        counters=NetworkCounters(),
    )
    await link.run()


def _receives(stream: LinkKind, frame: bytes) -> None:
    """What a node makes of a frame on a stream.

    Raises:
        Misbehaved: a fault of the member that sent it.
    """
    trio.run(_receive, stream, frame)


def _faults() -> Iterator[Case]:
    """Frames that end both connections of a member."""
    number = REQUEST_NUMBER.pack(1)
    for what, stream, kind, content in (
        ("a frame of an unknown kind", LinkKind.BULK, 6, number),
        ("votes on the other stream", LinkKind.BULK, FrameKind.VOTES, b"a vote"),
        ("events on the other stream", LinkKind.URGENT, FrameKind.EVENTS, b""),
        ("a request on the other stream", LinkKind.URGENT, FrameKind.REQUEST, number + b"a request"),
        ("a heartbeat with a payload", LinkKind.URGENT, FrameKind.HEARTBEAT, b"a"),
        ("a long heartbeat", LinkKind.BULK, FrameKind.HEARTBEAT, number),
        ("a request without a whole number", LinkKind.BULK, FrameKind.REQUEST, number[1:]),
        ("a response without a whole number", LinkKind.BULK, FrameKind.RESPONSE, number[1:]),
        ("a refusal of 65 bytes", LinkKind.BULK, FrameKind.REFUSAL, number + b"a" * 65),
    ):
        yield _fault(what, stream, FRAME_HEADER.pack(kind, len(content)) + content)
    most = NetworkLimits().max_frame_bytes
    header = FRAME_HEADER.pack(FrameKind.RESPONSE, most + REQUEST_NUMBER.size + 1)
    yield _fault("the header of a response that is too long", LinkKind.BULK, header)


def _fault(what: str, stream: LinkKind, frame: bytes) -> Case:
    try:
        _receives(stream, frame)
    except Misbehaved:
        return {"what": what, "stream": stream.value, "frame": frame.hex(), "reason": "fault"}
    raise AssertionError(f"{what}: no fault")


def _framed(what: str, content: str, kind: FrameKind, payload: bytes, number: int = 0) -> Case:
    numbered = REQUEST_NUMBER.pack(number) + payload if number else payload
    frame = FRAME_HEADER.pack(kind, len(numbered)) + numbered
    stream = LinkKind.URGENT if content in ("vote", "heartbeat") else LinkKind.BULK
    _receives(stream, frame)
    counted = {"number": number} if number else {}
    told = {"what": what, "content": content, **counted, "payload": payload.hex()}
    return {**told, "stream": stream.value, "frame": frame.hex()}


def _conversations() -> Iterator[tuple[str, msgspec.Struct]]:
    told = shown()
    ledger = told.ledger
    header, certificate = ledger.certified[2]
    body = encode(Body((ledger.events[3].leaf_hash,)))
    signature = EventSignature(octets("signer"), octets("signature") * 2)
    state = ledger.states[1]
    frontier = Frontier().append([event.leaf_hash for event in ledger.events[:4]])
    assert frontier.root == told.header(2).log_root
    for request, answers in (
        (
            m.GetBlocks(3),
            (
                m.Blocks((m.BlockRecord(header, body, (events_bytes(3),)),), (), certificate, 4),
                m.Blocks((m.BlockRecord(*_first_block()),), (ledger.certified[1][0],), ledger.certified[1][1], 4),
                m.Blocks((), (), b"", 4),
            ),
        ),
        (
            m.GetSnapshot(0),
            (
                m.Snapshot((), header, certificate, frontier.to_bytes()),
                m.Snapshot((told.link,), b"", b"", b""),
                m.Snapshot((), b"", b"", b""),
            ),
        ),
        (
            m.GetState(state.root, SOURCE_TABLE + bytes(32)),
            (m.StatePart(((SOURCE_TABLE, state.prove_prefix(SOURCE_TABLE)),)),),
        ),
        (m.GetEvents((ledger.events[0].leaf_hash,)), (m.Events((events_bytes(0),)), m.Events(()))),
        (m.GetProposal(HEADER.digest), (m.FoundProposal(encode(proposal())), m.FoundProposal(b""))),
        (m.GetLastVote(IDS["operator-1"]), (m.LastVote(vote(NULLIFY, "operator-1")), m.LastVote(None))),
        (
            m.AskCountersign(b"an unsigned grant"),
            (m.Countersigned(signature, "", ""), m.Countersigned(None, "waiting", "for one by hand")),
        ),
        (m.DeliverSignature(octets("event"), signature), (m.Done(),)),
        (
            m.GetBeaconShare(octets("campaign"), octets("challenge")),
            (m.BeaconShare(IDS["operator-1"], octets("share") * 3),),
        ),
    ):
        yield "request", request
        for answer in answers:
            yield "answer", answer


def _first_block() -> tuple[bytes, bytes, tuple[bytes, ...]]:
    ledger = shown().ledger
    body = Body(tuple(event.leaf_hash for event in ledger.events[:2]))
    return ledger.certified[0][0], encode(body), (events_bytes(0), events_bytes(1))


def _bad_requests() -> Iterator[tuple[str, bytes]]:
    good = encode(m.GetEvents((octets("leaf"),)))
    yield "a request and a byte", good + b"\x00"
    yield "a request a byte short", good[:-1]
    yield "no bytes", b""
    yield "a tag that no request has", msgspec.msgpack.encode(["get-everything"])
    yield "an answer for a request", encode(m.Done())
    yield "a field more", msgspec.msgpack.encode(["get-last-vote", octets("voter"), 0])
    yield "a field less", msgspec.msgpack.encode(["get-beacon-share", octets("campaign")])
    yield "blocks from height 0", msgspec.msgpack.encode(["get-blocks", 0])
    yield "blocks from height -1", msgspec.msgpack.encode(["get-blocks", -1])
    yield "blocks from height 2⁵³", msgspec.msgpack.encode(["get-blocks", 2**53])
    yield "blocks from a height that is no integer", msgspec.msgpack.encode(["get-blocks", 1.5])
    yield "events of no leaf hash", msgspec.msgpack.encode(["get-events", []])
    yield "events of a hash of 31 bytes", msgspec.msgpack.encode(["get-events", [bytes(31)]])
    yield "a state from a key of 32 bytes", msgspec.msgpack.encode(["get-state", bytes(32), bytes(32)])
    yield "a map", msgspec.msgpack.encode({"get-blocks": 1})
    yield "a height in two bytes that takes one", b"\x92\xaaget-blocks\xcc\x01"
    yield "a digest as text", b"\x92\xacget-proposal\xd9\x20" + b"a" * 32
    yield "a digest whose length is in two bytes", b"\x92\xacget-proposal\xc5\x00\x20" + octets("block")


def _bad_gossip() -> Iterator[tuple[str, bytes]]:
    good = m.pack_gossip([b"an event"])
    yield "events that end inside one", good[:-1]
    yield "events that end inside a length", good + b"\x00\x00\x00"
    yield "33 events", m.pack_gossip([b""] * 33)


__all__ = ["node_messages", "round_messages"]
