"""The golden vectors of evidence: pairs of signed messages that convict, and pairs that must not.

Each refused pair has one fault: it could have been signed by an honest member, or not by the one it accuses.
"""

from functools import partial

from agreement import SMALL, Case, founded, octets, refusal
from msgspec import msgpack
from msgspec.structs import replace

from consensus.block import Body, Header
from consensus.codec import decode, encode
from consensus.evidence import EvidenceReport, check_evidence
from consensus.identifiers import ZERO_DIGEST, MemberId, View
from consensus.membership import ED25519_LIST, committee
from consensus.vote import (
    ProposalEvidence,
    SignedHeader,
    Vote,
    VoteEvidence,
    VoteKind,
    proposal_message,
    vote_message,
)

NOTARIZE, NULLIFY, FINALIZE = VoteKind
A, B = octets("ledger block a"), octets("ledger block b")
GENESIS, SECRETS = founded(ED25519_LIST, *SMALL)
COMMITTEE = committee(GENESIS)
IDS = {member.name: member.id for member in GENESIS.members}
ACCUSED = "data-source-2"
VIEW = View(2)
"""The view that the accused leads."""


def vote(kind: VoteKind, block: bytes, signer: str = ACCUSED, **changes: object) -> Vote:
    """A vote of the accused, or what else somebody might sign in its place."""
    made = Vote(1, GENESIS.chain_id, 0, kind, VIEW, block, IDS[ACCUSED], b"", b"")
    made = replace(made, **changes)
    return replace(made, signature=SECRETS[signer].identity.sign(vote_message(made)))


def header(leaf: bytes, signer: str = ACCUSED, **changes: object) -> SignedHeader:
    """A proposal of the accused without its body, or what else somebody might sign in its place."""
    made = Header(
        version=1, chain_id=GENESIS.chain_id, epoch=0, height=1, view=VIEW, leader=IDS[ACCUSED], parent=bytes(32),
        parent_view=0, timestamp_ms=GENESIS.created_ms, body_root=Body((leaf,)).root, event_count=1, log_size=1,
        log_root=leaf, state_root=leaf,
    )  # fmt: skip
    encoded = encode(replace(made, **changes))
    return SignedHeader(encoded, SECRETS[signer].identity.sign(proposal_message(encoded)))


def votes(first: Vote, second: Vote) -> bytes:
    """The governance portion of an event that accuses by two votes."""
    return encode(EvidenceReport(VoteEvidence(first, second)))


def headers(first: SignedHeader, second: SignedHeader) -> bytes:
    """The governance portion of an event that accuses by two proposals."""
    return encode(EvidenceReport(ProposalEvidence(first, second)))


def judge(report: bytes) -> Case:
    """Whom the report convicts, and the digest that the state files it under."""
    found = check_evidence(decode(report, EvidenceReport, 65_536), COMMITTEE)
    return {
        "convicts": [MemberId(found.member).hex(), found.offence.value, found.epoch, found.view],
        "digest": found.digest.hex(),
    }


def evidence() -> list[Case]:
    """All offences, and pairs that convict nobody."""
    accepted = {
        "notarize votes for two ledger blocks": votes(vote(NOTARIZE, A), vote(NOTARIZE, B)),
        "finalize votes for two ledger blocks": votes(vote(FINALIZE, A), vote(FINALIZE, B, share=bytes(64))),
        "finalized, and nullified": votes(vote(FINALIZE, A), vote(NULLIFY, ZERO_DIGEST)),
        "nullified, and finalized": votes(vote(NULLIFY, ZERO_DIGEST), vote(FINALIZE, A)),
        "two proposals": headers(header(A), header(B)),
    }
    elsewhere, stranger = octets("another chain"), octets("stranger")
    other, verifier = "operator-1", "verifier-1"
    refused = {
        "the same vote twice": votes(vote(NOTARIZE, A), vote(NOTARIZE, A)),
        "votes that differ in their share alone": votes(vote(FINALIZE, A), vote(FINALIZE, A, share=bytes(64))),
        "notarized, and nullified": votes(vote(NOTARIZE, A), vote(NULLIFY, ZERO_DIGEST)),
        "one notarized, another finalized": votes(vote(NOTARIZE, A), vote(FINALIZE, B)),
        "votes of two epochs": votes(vote(NOTARIZE, A), vote(NOTARIZE, B, epoch=1)),
        "votes of two views": votes(vote(NOTARIZE, A), vote(NOTARIZE, B, view=VIEW + 1)),
        "votes of two members": votes(vote(NOTARIZE, A), vote(NOTARIZE, B, other, voter=IDS[other])),
        "votes of an epoch that has not begun": votes(vote(NOTARIZE, A, epoch=1), vote(NOTARIZE, B, epoch=1)),
        "votes of another chain": votes(vote(NOTARIZE, A, chain_id=elsewhere), vote(NOTARIZE, B, chain_id=elsewhere)),
        "nullify votes, one with a digest": votes(vote(NULLIFY, ZERO_DIGEST), vote(NULLIFY, A)),
        "nullified with a digest, and finalized": votes(vote(NULLIFY, A), vote(FINALIZE, A)),
        "finalize votes, one for no ledger block": votes(vote(FINALIZE, A), vote(FINALIZE, ZERO_DIGEST)),
        "a share on a notarize vote": votes(vote(NOTARIZE, A), vote(NOTARIZE, B, share=bytes(64))),
        "votes of a stranger": votes(vote(NOTARIZE, A, voter=stranger), vote(NOTARIZE, B, voter=stranger)),
        "votes of a verifier": votes(
            vote(NOTARIZE, A, verifier, voter=IDS[verifier]), vote(NOTARIZE, B, verifier, voter=IDS[verifier])
        ),
        "a vote that another signed": votes(vote(NOTARIZE, A), vote(NOTARIZE, B, other)),
        "a share put in after signing": votes(vote(FINALIZE, A), replace(vote(FINALIZE, B), share=bytes(64))),
        "the same proposal twice": headers(header(A), header(A)),
        "proposals of two views": headers(header(A), header(B, view=VIEW + 1)),
        "proposals of two epochs": headers(header(A), header(B, epoch=1)),
        "proposals of height 0": headers(header(A, height=0), header(B, height=0)),
        "proposals of view 0": headers(header(A, view=0), header(B, view=0)),
        "proposals whose parent is of their view": headers(header(A, parent_view=VIEW), header(B)),
        "proposals of who does not lead": headers(header(A, leader=IDS[other]), header(B, leader=IDS[other])),
        "proposals of another chain": headers(header(A, chain_id=elsewhere), header(B, chain_id=elsewhere)),
        "a proposal that another signed": headers(header(A), header(B, other)),
        "a trailing byte": votes(vote(NOTARIZE, A), vote(NOTARIZE, B)) + b"\x00",
        "one message": msgpack.encode([["vote-evidence", vote(NOTARIZE, A)]]),
    }
    return [
        {
            "genesis": encode(GENESIS).hex(),
            "chain_id": GENESIS.chain_id.hex(),
            "refused": [refusal(what, partial(judge, bad), report=bad.hex()) for what, bad in refused.items()],
            "accepted": [{"what": what, "report": good.hex(), **judge(good)} for what, good in accepted.items()],
        }
    ]
