"""Anything may arrive: every decoder answers with a value or with ``Rejected``, and takes little memory for it."""

import functools
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import Story, story

from consensus.accumulators import AccumulatorWindow, decode_window
from consensus.block import Header, decode_header
from consensus.bundle import Bundle, open_bundle
from consensus.ceremony import Invitation, Invited, Transcript, decode_invitation
from consensus.certificate import Certificate, decode_certificate
from consensus.codec import decode, encode
from consensus.epochs import anchor
from consensus.event import MAX_EVENT_BYTES, Entry, check_event, check_parts, unpack
from consensus.evidence import EvidenceReport, check_evidence
from consensus.genesis import genesis_from_json, genesis_to_json
from consensus.identifiers import VOTING_ROLES
from consensus.membership import ED25519_LIST, Parameters, RoleThreshold, check_genesis
from consensus.portions import (
    Campaign,
    Delegation,
    GrantTerms,
    Policy,
    Portions,
    SourceClaim,
    SourceUse,
    StepGovernance,
    StepOperation,
    decode_portions,
)
from consensus.receipt import verify_receipt, verify_state_receipt
from consensus.rejection import Rejected
from consensus.state_map import MapProof, PrefixProof, verify_map_proof, verify_prefix_proof
from consensus.vote import (
    Notarization,
    Nullification,
    Proposal,
    Stalled,
    Vote,
    check_notarization,
    check_nullification,
    check_proposal,
    check_stalled,
    check_vote,
)
from node import messages

PEAK_BYTES_PER_BYTE = 64
PEAK_BYTES = 1 << 18


@functools.cache
def told() -> Story:
    return story(certificate_scheme=ED25519_LIST)


def typed(kind: object) -> Callable[[bytes], object]:
    return lambda encoded: decode(encoded, kind, MAX_EVENT_BYTES)  # type: ignore[arg-type]


def checked(kind: type[msgspec.Struct], check: Callable[..., object]) -> Callable[[bytes], object]:
    """Decode, then check against the committee as the engine does."""
    return lambda encoded: check(decode(encoded, kind, MAX_EVENT_BYTES), told().ledger.committee)


@functools.cache
def invitation() -> Invitation:
    """One member of each role, under the scheme without joint keys."""
    return Invitation(
        1,
        "fuzz.example/log",
        bytes(32),
        0,
        ED25519_LIST,
        tuple(Invited(role.value, role) for role in VOTING_ROLES),
        tuple(RoleThreshold(role, 1) for role in VOTING_ROLES),
        Parameters(),
        epoch=0,
        refreshes=None,
    )


def trusted() -> object:
    genesis = told().ledger.genesis
    return anchor(genesis, genesis.chain_id)


DECODERS: dict[str, Callable[[bytes], object]] = {
    "event": lambda encoded: check_event(encoded, told().ledger.committee),
    "entry": lambda encoded: check_parts(encoded, told().ledger.events[0].portions_bytes, told().ledger.committee),
    "portions of an entry": lambda encoded: check_parts(
        told().ledger.events[-1].entry_bytes, encoded, told().ledger.committee
    ),
    "wire": unpack,
    "portions": decode_portions,
    "header": lambda encoded: decode_header(encoded, told().ledger.chain_id),
    "certificate": decode_certificate,
    "genesis": genesis_from_json,
    "bundle": lambda encoded: open_bundle(functools.cache(trusted)(), encoded),  # type: ignore[arg-type]
    "bundle's body": lambda encoded: open_bundle(  # type: ignore[arg-type]
        functools.cache(trusted)(), b"countersign-bundle" + encoded
    ),
    "receipt": lambda encoded: verify_receipt(functools.cache(trusted)(), encoded),  # type: ignore[arg-type]
    "state receipt": lambda encoded: verify_state_receipt(  # type: ignore[arg-type]
        functools.cache(trusted)(), encoded, bytes(33)
    ),
    "request": messages.decode_request,
    "gossip": messages.unpack_gossip,
    "vote": checked(Vote, check_vote),
    "proposal": checked(Proposal, check_proposal),
    "notarization": checked(Notarization, check_notarization),
    "nullification": checked(Nullification, check_nullification),
    "stalled": checked(Stalled, check_stalled),
    "accumulator window": lambda encoded: decode_window(encoded, bytes(32)),
    "invitation": decode_invitation,
    "ceremony message": lambda encoded: Transcript(invitation(), [encoded]),
    "evidence": checked(EvidenceReport, check_evidence),
    "map proof": lambda encoded: verify_map_proof(bytes(32), bytes(33), decode(encoded, MapProof, MAX_EVENT_BYTES)),
    "prefix proof": lambda encoded: verify_prefix_proof(
        bytes(32), b"\x01", decode(encoded, PrefixProof, MAX_EVENT_BYTES)
    ),
    **{
        kind.__name__: typed(kind)
        for kind in (
            AccumulatorWindow,
            Bundle,
            Campaign,
            Certificate,
            Delegation,
            Entry,
            GrantTerms,
            Header,
            Policy,
            Portions,
            SourceClaim,
            SourceUse,
            StepGovernance,
            StepOperation,
            *(
                kind
                for kind in vars(messages).values()
                if isinstance(kind, type) and kind.__module__ == "node.messages"
            ),
        )
    },
}


def attempt(name: str, encoded: bytes) -> None:
    """The decoder takes or rejects the bytes; any other exception fails the test."""
    try:
        DECODERS[name](encoded)
    except Rejected:
        return


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=12)
    | st.binary(max_size=40)
    | st.sampled_from([bytes(32), "event", "vote", "block", "body", "proposal", "get-blocks", 1, 2**53, 2**63])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=40,
)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=25, deadline=None)
@given(encoded=st.binary(max_size=200))
def test_random_bytes_are_taken_or_rejected(name: str, encoded: bytes) -> None:
    attempt(name, encoded)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=25, deadline=None)
@given(tree=TREES)
def test_structured_garbage_is_taken_or_rejected(name: str, tree: object) -> None:
    attempt(name, msgspec.msgpack.encode(tree))


def honest(name: str) -> bytes | None:
    """A true message of that decoder, where the story has one."""
    ledger = told().ledger
    last = ledger.events[-1]
    return {
        "event": encode_event(),
        "entry": ledger.events[0].entry_bytes,
        "portions of an entry": last.portions_bytes,
        "wire": encode_event(),
        "portions": last.portions_bytes,
        "header": ledger.header,
        "certificate": ledger.certificate,
        "genesis": genesis_to_json(ledger.genesis),
        "request": encode(messages.GetEvents((bytes(32),))),
        "gossip": messages.pack_gossip([b"one", b"two"]),
    }.get(name)


def encode_event() -> bytes:
    event = told().ledger.events[0]
    return msgspec.msgpack.encode([event.entry_bytes, event.portions_bytes])


@pytest.mark.parametrize(
    "name", ["event", "entry", "wire", "portions", "header", "certificate", "genesis", "request", "gossip"]
)
@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(min_value=0), st.binary(max_size=6), st.integers(0, 4)), min_size=1, max_size=4)
)
def test_true_message_with_pieces_replaced_is_taken_or_rejected(name: str, cuts: list[tuple[int, bytes, int]]) -> None:
    encoded = honest(name)
    assert encoded is not None
    DECODERS[name](encoded)
    for at, piece, removed in cuts:
        start = at % (len(encoded) + 1)
        encoded = encoded[:start] + piece + encoded[start + removed :]
    attempt(name, encoded)


BOMBS = {
    "arrays in arrays": b"\x91" * 200_000,
    "maps in maps": b"\x81\xa1a" * 100_000,
    "long arrays in long arrays": b"\xdd\xff\xff\xff\xff" * 1_000,
    "an array of four thousand million": b"\xdd\xff\xff\xff\xff",
    "a map of four thousand million": b"\xdf\xff\xff\xff\xff",
    "a string of four gigabytes": b"\x92\xdb\xff\xff\xff\xff",
    "bytes of four gigabytes": b"\x92\xc6\xff\xff\xff\xff",
    "an extension of four gigabytes": b"\x92\xc9\xff\xff\xff\xff\x01",
    "a body that claims the most leaves": b"\x92\xa4body\xdc\x10\x00",
    "portions that claim the most items": b"\x93\x92\xc4\x20" + bytes(32) + b"\xdc\x10\x00",
    "an item that claims the most examples": b"\x93\x92\xc4\x20" + bytes(32) + b"\x91\x92\xc4\x00\xdd\x00\x01\x00\x00",
    "many items that claim the most examples": b"\x93\x92\xc4\x20"
    + bytes(32)
    + b"\xdc\x10\x00\x92\xc4\x00\xdd\x00\x01\x00\x00",
    "not a number": b"\x92\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    "invalid text": b"\x92\xa2\xc3\x28",
    "a surrogate": b"\x92\xa3\xed\xa0\x80",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "never used": b"\xc1",
    "an integer above all": b"\xcf" + b"\xff" * 8,
    "nested lists in JSON": b"[" * 200_000,
    "nested objects in JSON": b'{"a":' * 100_000,
    "a number of many digits in JSON": b'{"version": ' + b"9" * 100_000 + b"}",
    "an exponent in JSON": b'{"version": 1e999999999}',
    "infinity in JSON": b'{"version": Infinity}',
    "a null byte in JSON": b'{"name": "\\u0000"}',
    "a surrogate in JSON": b'{"name": "\\ud800"}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_is_rejected_by_every_decoder_in_little_memory(bomb: str) -> None:
    encoded = BOMBS[bomb]
    for name in DECODERS:
        attempt(name, b"")
    tracemalloc.start()
    try:
        for name, decoder in DECODERS.items():
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            with pytest.raises(Rejected):
                decoder(encoded)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < PEAK_BYTES + PEAK_BYTES_PER_BYTE * len(encoded), f"{name}: {peak} bytes"
    finally:
        tracemalloc.stop()


def test_genesis_from_garbage_is_rejected_at_the_latest_when_checked() -> None:
    genesis = told().ledger.genesis
    text = genesis_to_json(genesis)
    check_genesis(genesis_from_json(text))
    rejected = 0
    for at in range(0, len(text), 37):
        forged = text[:at] + (b"7" if text[at : at + 1] != b"7" else b"8") + text[at + 1 :]
        try:
            found = genesis_from_json(forged)
        except Rejected:
            rejected += 1
            continue
        assert found.chain_id != genesis.chain_id or found == genesis
    assert rejected
