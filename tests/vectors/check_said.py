"""Checks the golden vectors of what nodes say to each other: messages of the round, requests, answers and frames.

    python tests/vectors/check_said.py [FOLDER]

As ``check_vectors.py``, from which it has the encoding, the hashes and what a case is.
"""

import struct
import sys
from collections.abc import Callable

from check_vectors import (
    FINALIZE,
    HEADER,
    NULLIFY,
    VOTE,
    VOTING_ROLES,
    check,
    check_all,
    decoded,
    expect,
    fields,
    member_id,
    message,
    name,
    natural,
    octets,
    refuse_if,
    require_quorum,
    tagged,
    text,
    unpack,
    verify_identity,
    voters_of,
)
from check_vectors import pack as packed

Fit = Callable[[object], bool]
NOTARIZE = 1
LINK, CERTIFICATE, HEADER_BYTES = "epoch-link", octets(0, 849_184), octets(0, 1_024)


def array(least: int, most: int, fit: Fit) -> Fit:
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(fit(item) for item in value)


def structure(*fits: Fit | str) -> Fit:
    """An array of these fields, the tag first where it has one."""

    def fit(value: object) -> bool:
        if not isinstance(value, list) or len(value) != len(fits):
            return False
        return all(
            field == held if isinstance(held, str) else held(field) for held, field in zip(fits, value, strict=True)
        )

    return fit


def optional(fit: Fit) -> Fit:
    return lambda value: value is None or fit(value)


# Messages of the round (section 16).


def check_place(chain: bytes, epoch: int, chain_id: bytes) -> None:
    refuse_if(chain != chain_id, "wrong-chain")
    refuse_if(epoch != 0, "wrong-epoch")


def check_vote(vote: list, genesis: list, chain_id: bytes) -> bytes:
    """A vote's fields behind its tag; what it signs."""
    _, chain, epoch, kind, _, block, voter, share, signature = vote
    check_place(chain, epoch, chain_id)
    refuse_if((kind == NULLIFY) != (block == bytes(32)), "bad-vote")
    refuse_if(share != b"" and kind != FINALIZE, "bad-vote")
    members = {member_id(member): member for member in genesis[6]}
    refuse_if(voter not in members, "unknown-member")
    refuse_if(members[voter][1] not in VOTING_ROLES, "wrong-role")
    signed = message(name("vote"), packed(["vote", *vote[:-1], b""]))
    verify_identity(members[voter][2], members[voter][3], signed, signature, "bad-signature")
    return signed


def check_quorum(votes: list, kind: int, view: int, block: bytes, genesis: list, chain_id: bytes) -> None:
    held = [fields(vote, "vote", *VOTE) for vote in votes]
    voters = [vote[6] for vote in held]
    refuse_if(voters != sorted(set(voters)), "bad-certificate")
    refuse_if(any((vote[3], vote[4], vote[5]) != (kind, view, block) for vote in held), "bad-certificate")
    members = {member_id(member): member for member in genesis[6]}
    require_quorum(genesis, [members[voter] for voter in voters if voter in members])
    for vote in held:
        check_vote(vote, genesis, chain_id)


def check_proposal(proposal: list, genesis: list, chain_id: bytes) -> bytes:
    """A proposal's fields behind its tag; what it signs."""
    _, encoded, body, signature = proposal
    header = fields(decoded(encoded), "block", *HEADER)
    _, chain, epoch, height, view, leader, _, parent_view, _, body_root, count, *_ = header
    refuse_if(chain != chain_id, "wrong-chain")
    leaves = body[1]
    refuse_if(count != len(leaves) or tagged(name("block-body"), *leaves) != body_root, "bad-block")
    refuse_if(len(set(leaves)) != len(leaves), "duplicate")
    check_place(chain, epoch, chain_id)
    refuse_if(height == 0 or view == 0 or parent_view >= view, "bad-block")
    voters = voters_of(genesis)
    leading = voters[(view - 1) % len(voters)]
    refuse_if(leader != member_id(leading), "wrong-author")
    signed = message(name("proposal"), tagged(name("block"), encoded))
    verify_identity(leading[2], leading[3], signed, signature, "bad-signature")
    return signed


BODY = structure("body", array(0, 4_096, octets(32)))
VOTES = array(1, 256, structure("vote", *VOTE))
ROUND = {
    "vote": VOTE,
    "proposal": (natural(1, 1), HEADER_BYTES, BODY, octets(0, 8_192)),
    "notarization": (natural(1), octets(32), VOTES),
    "nullification": (natural(1), VOTES),
    "stalled": (natural(1, 1), octets(32), natural(), natural(1), natural(), natural(1)),
}


def check_round(case: dict) -> None:
    """Messages of the round under one genesis, each by itself."""
    genesis, chain_id = unpack(bytes.fromhex(case["genesis"])), tagged(name("genesis"), bytes.fromhex(case["genesis"]))
    check(chain_id.hex(), case["chain_id"], "chain id")

    def judge(trial: dict) -> None:
        value = decoded(bytes.fromhex(trial["message"]))
        refuse_if(not isinstance(value, list) or not value or value[0] not in ROUND, "malformed")
        held, signed = fields(value, value[0], *ROUND[value[0]]), b""
        if value[0] == "vote":
            signed = check_vote(held, genesis, chain_id)
        elif value[0] == "proposal":
            signed = check_proposal(held, genesis, chain_id)
        elif value[0] == "stalled":
            check_place(held[1], held[2], chain_id)
        else:
            block = held[1] if value[0] == "notarization" else bytes(32)
            kind = NOTARIZE if value[0] == "notarization" else NULLIFY
            check_quorum(held[-1], kind, held[0], block, genesis, chain_id)
        check(signed.hex(), trial.get("signed", signed.hex()), "signed message")

    for trial in (*case["accepted"], *case["refused"]):
        expect(judge, trial)


# Requests, answers and frames (section 21).

DIGEST, ANY_BYTES, EVENTS = octets(32), octets(0, 4 << 20), array(0, 4_096, octets(0, 4 << 20))
PATH = array(0, 264, structure(natural(0, 263), DIGEST))
ENTRY = structure(octets(33), octets(0, 4 << 20))
MAP_PROOF = structure(octets(0, 33), octets(0, 4 << 20), PATH)
LINKS = array(0, 256, structure(LINK, octets(0, 1 << 20), HEADER_BYTES, CERTIFICATE, MAP_PROOF))
SIGNATURE = structure(DIGEST, octets(64, 5_789))
REQUESTS = {
    "get-blocks": (natural(1),),
    "get-snapshot": (natural(),),
    "get-state": (DIGEST, octets(33)),
    "get-events": (array(1, 4_096, DIGEST),),
    "get-proposal": (DIGEST,),
    "get-last-vote": (DIGEST,),
    "ask-countersign": (octets(0, 261_120),),
    "deliver-signature": (DIGEST, SIGNATURE),
    "get-beacon-share": (DIGEST, DIGEST),
}
ANSWERS = {
    "blocks": (
        array(0, 4_096, structure(HEADER_BYTES, ANY_BYTES, EVENTS)),
        array(0, 1_024, HEADER_BYTES),
        ANY_BYTES,
        natural(),
    ),
    "snapshot": (LINKS, HEADER_BYTES, ANY_BYTES, octets(0, 2_056)),
    "state-part": (array(1, 4_096, structure(octets(0, 33), structure(array(0, 1 << 20, ENTRY), PATH))),),
    "events": (EVENTS,),
    "proposal-found": (ANY_BYTES,),
    "last-vote": (optional(structure("vote", *VOTE)),),
    "countersigned": (optional(SIGNATURE), text(0, 8_192), text(0, 8_192)),
    "done": (),
    "beacon-share": (DIGEST, octets(96)),
}
KINDS = {"heartbeat": 0, "vote": 1, "events": 2, "request": 3, "answer": 4, "refusal": 5}


def check_gossip(payload: bytes) -> None:
    at, count = 0, 0
    while at < len(payload):
        refuse_if(count == 32, "oversized")
        refuse_if(len(payload) < at + 4, "malformed")
        at += 4 + struct.unpack_from(">I", payload, at)[0]
        refuse_if(at > len(payload), "malformed")
        count += 1


def check_content(content: str, payload: bytes) -> None:
    if content == "events":
        check_gossip(payload)
    if content in ("request", "answer", "vote"):
        known = {"request": REQUESTS, "answer": ANSWERS, "vote": ROUND}[content]
        value = decoded(payload)
        refuse_if(not isinstance(value, list) or not value or value[0] not in known, "malformed")
        fields(value, value[0], *known[value[0]])


def check_frame(stream: str, frame: bytes) -> None:
    """Whether a member may send it on this stream."""
    kind, length = struct.unpack_from(">BI", frame)
    refuse_if(kind > 5 or (kind == 0 and length > 0), "fault")
    refuse_if((stream == "votes" and kind > 1) or (stream == "bulk" and kind == 1), "fault")
    refuse_if(length > (4 << 20) + (8 if kind > 2 else 0), "fault")
    refuse_if(kind > 2 and length < 8, "fault")
    refuse_if((kind == 3 and length > 8 + (256 << 10)) or (kind == 5 and length > 8 + 64), "fault")
    check(len(frame), 5 + length, "length of a frame")


def check_node_message(case: dict) -> None:
    def judge(trial: dict) -> None:
        if "content" in trial:
            payload = bytes.fromhex(trial["payload"])
            check_content(trial["content"], payload)
            number = struct.pack(">Q", trial["number"]) if "number" in trial else b""
            expected = struct.pack(">BI", KINDS[trial["content"]], len(number) + len(payload)) + number + payload
            check(trial["frame"], expected.hex(), "frame")
        check_frame(trial["stream"], bytes.fromhex(trial["frame"]))

    expect(judge, case)


CHECKS = {"round_messages": check_round, "node_messages": check_node_message}


if __name__ == "__main__":
    check_all(CHECKS, *sys.argv[1:])
