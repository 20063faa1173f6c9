"""Digests, ids, roles and domain tags.

Every hash and every signature of the project starts with a tag from ``Tag``, so that bytes meant for
one purpose can never be taken for another (domain separation). ``tagged_hash`` prefixes each part
with its length, so that no two part lists share an encoding.
"""

import hashlib
from enum import StrEnum
from typing import NewType

Digest = NewType("Digest", bytes)
"""A SHA-256 digest: 32 bytes."""

ChainId = NewType("ChainId", bytes)
"""Digest of a genesis: 32 bytes. The trust anchor of every verifier."""

MemberId = NewType("MemberId", bytes)
"""A member's identity: ``tagged_hash`` of its scheme and public identity key, 32 bytes."""

JobKey = NewType("JobKey", bytes)
"""What the log calls a delegated job's key, as in ``job_key.py``: 32 bytes."""

View = NewType("View", int)
"""A leader's turn in the BFT round, from 1; 0 is genesis."""

Height = NewType("Height", int)
"""A ledger block's number, from 1; 0 is genesis."""

DIGEST_BYTES = 32
ZERO_DIGEST = Digest(bytes(DIGEST_BYTES))


class Role(StrEnum):
    """What a member answers for. ``VERIFIER`` replicates and checks but never votes."""

    DATA_SOURCE = "data-source"
    GOVERNANCE = "governance"
    OPERATOR = "operator"
    VERIFIER = "verifier"


VOTING_ROLES: tuple[Role, ...] = (Role.DATA_SOURCE, Role.GOVERNANCE, Role.OPERATOR)


class Tag(StrEnum):
    """Domain tags. The value is hashed and signed; changing one is a wire change."""

    GENESIS = "countersign/v1/genesis"
    MEMBER = "countersign/v1/member"
    MEMBERSHIP = "countersign/v1/membership"
    JOB_KEY = "countersign/v1/job-key"
    EVENT = "countersign/v1/event"
    EVENT_SIGNATURE = "countersign/v1/event-signature"
    EVENT_BATCH = "countersign/v1/event-batch"
    PORTION = "countersign/v1/portion"
    SOURCE_ENTRY = "countersign/v1/source-entry"
    EXAMPLE = "countersign/v1/example"
    SALT = "countersign/v1/salt"
    RESERVE = "countersign/v1/reserve"
    BODY = "countersign/v1/block-body"
    BLOCK = "countersign/v1/block"
    VOTE = "countersign/v1/vote"
    CERTIFICATE = "countersign/v1/certificate"
    PROPOSAL = "countersign/v1/proposal"
    STATE_LEAF = "countersign/v1/state-leaf"
    STATE_NODE = "countersign/v1/state-node"
    STATE_EMPTY = "countersign/v1/state-empty"
    CONTENT = "countersign/v1/content"
    TENSOR = "countersign/v1/tensor"
    PARAMETERS = "countersign/v1/parameters"
    OPTIMIZER = "countersign/v1/optimizer"
    MANIFEST = "countersign/v1/manifest"
    SAMPLER = "countersign/v1/sampler"
    ENVIRONMENT = "countersign/v1/environment"
    RANDOM_STATE = "countersign/v1/random-state"
    CAMPAIGN = "countersign/v1/campaign"
    ACCUMULATOR = "countersign/v1/accumulator"
    CEREMONY = "countersign/v1/ceremony"
    DKG_CEREMONY = "countersign/v1/dkg-ceremony"
    DKG_POLYNOMIAL = "countersign/v1/dkg-polynomial"
    DKG_COMMITMENT = "countersign/v1/dkg-commitment"
    DKG_KNOWLEDGE = "countersign/v1/dkg-proof-of-knowledge"
    POSSESSION = "countersign/v1/proof-of-possession"
    KEY_DERIVATION = "countersign/v1/key-derivation"
    EVIDENCE = "countersign/v1/evidence"
    EVALUATION = "countersign/v1/evaluation"
    OVERLAP_KEY = "countersign/v1/overlap-key"
    OVERLAP_KEY_CHECK = "countersign/v1/overlap-key-check"
    BEACON = "countersign/v1/beacon"
    PICKED_STEPS = "countersign/v1/picked-steps"
    BATCH_COEFFICIENT = "countersign/v1/batch-coefficient"


def tagged_hash(tag: Tag, *parts: bytes) -> Digest:
    """SHA-256 over the tag and each part, each prefixed by its length as 8 bytes big-endian."""
    framed = [_TAG_PREFIXES[tag]]
    for part in parts:
        framed += (len(part).to_bytes(8, "big"), part)
    return Digest(hashlib.sha256(b"".join(framed)).digest())


def tagged_prefix(tag: Tag, *parts: bytes) -> bytes:
    """What ``tagged_hash`` hashes for these parts: to be gone on with, where many hashes begin alike."""
    return b"".join((_TAG_PREFIXES[tag], *(len(part).to_bytes(8, "big") + part for part in parts)))


def tagged_message(tag: Tag, *parts: bytes) -> bytes:
    """The bytes to sign for ``parts`` under ``tag``: the tag, a zero byte, then their tagged hash."""
    return _TAG_MESSAGES[tag] + tagged_hash(tag, *parts)


_TAG_MESSAGES = {tag: tag.value.encode() + b"\x00" for tag in Tag}
_TAG_PREFIXES = {tag: len(tag.value.encode()).to_bytes(8, "big") + tag.value.encode() for tag in Tag}
