"""Headers and bodies: one encoding, this chain, the body the header names."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixtures import digest

from consensus.block import (
    MAX_BLOCK_EVENTS,
    MAX_HEADER_BYTES,
    Body,
    Header,
    check_body,
    decode_header,
    genesis_header,
    header_digest,
)
from consensus.codec import encode
from consensus.identifiers import ChainId, Digest
from consensus.rejection import Reason, Rejected

CHAIN = ChainId(digest("chain"))
BODY = Body((digest("one"), digest("two")))
HEADER = msgspec.structs.replace(
    genesis_header(CHAIN, 1_700_000_000_000, Digest(digest("log")), Digest(digest("state"))),
    height=7,
    view=9,
    body_root=BODY.root,
    event_count=2,
)


def refusal_of(encoded: bytes) -> Reason:
    with pytest.raises(Rejected) as caught:
        decode_header(encoded, CHAIN)
    return caught.value.reason


def test_header_comes_back_from_its_encoding() -> None:
    assert decode_header(encode(HEADER), CHAIN) == HEADER
    assert header_digest(encode(HEADER)) == HEADER.digest


def test_header_with_the_largest_numbers_is_within_its_size() -> None:
    largest = msgspec.structs.replace(
        HEADER,
        **dict.fromkeys(("epoch", "height", "view", "parent_view", "timestamp_ms", "log_size"), 2**53 - 1),
        event_count=MAX_BLOCK_EVENTS,
    )
    assert len(encode(largest)) <= MAX_HEADER_BYTES
    assert decode_header(encode(largest), CHAIN) == largest


def test_header_of_another_chain_is_refused() -> None:
    assert refusal_of(encode(msgspec.structs.replace(HEADER, chain_id=digest("elsewhere")))) == Reason.WRONG_CHAIN


@pytest.mark.parametrize("field", ["epoch", "height", "view", "parent_view", "timestamp_ms", "log_size"])
@pytest.mark.parametrize("value", [2**53, 2**63, 2**64 - 1, -1])
def test_header_with_a_number_out_of_range_is_malformed(field: str, value: int) -> None:
    assert refusal_of(encode(msgspec.structs.replace(HEADER, **{field: value}))) == Reason.MALFORMED


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("event_count", MAX_BLOCK_EVENTS + 1), ("leader", b"")])
def test_header_out_of_its_bounds_is_malformed(field: str, value: object) -> None:
    assert refusal_of(encode(msgspec.structs.replace(HEADER, **{field: value}))) == Reason.MALFORMED


def test_header_above_its_size_is_refused() -> None:
    assert refusal_of(bytes(MAX_HEADER_BYTES + 1)) == Reason.OVERSIZED


def test_every_field_enters_the_digest() -> None:
    others: dict[str, object] = {}
    for field in Header.__struct_fields__:
        value = getattr(HEADER, field)
        others[field] = value + 1 if isinstance(value, int) else digest("other", field)
    digests = {msgspec.structs.replace(HEADER, **{field: value}).digest for field, value in others.items()}
    assert len(digests | {HEADER.digest}) == len(Header.__struct_fields__) + 1


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0), st.integers(1, 255))
def test_header_with_a_changed_byte_is_refused_or_has_another_digest(position: int, difference: int) -> None:
    encoded = bytearray(encode(HEADER))
    encoded[position % len(encoded)] ^= difference
    try:
        found = decode_header(bytes(encoded), CHAIN)
    except Rejected:
        return
    assert found.digest != HEADER.digest


def test_body_the_header_names_passes() -> None:
    check_body(HEADER, BODY)


@pytest.mark.parametrize(
    "leaves", [(), BODY.leaf_hashes[:1], BODY.leaf_hashes[::-1], (*BODY.leaf_hashes, digest("three"))]
)
def test_body_the_header_does_not_name_is_refused(leaves: tuple[bytes, ...]) -> None:
    with pytest.raises(Rejected, match="bad-block"):
        check_body(HEADER, Body(leaves))


def test_body_counted_wrongly_by_its_header_is_refused() -> None:
    with pytest.raises(Rejected, match="bad-block"):
        check_body(msgspec.structs.replace(HEADER, event_count=1), BODY)


def test_body_that_lists_an_event_twice_is_refused() -> None:
    twice = Body((digest("one"), digest("one")))
    with pytest.raises(Rejected, match="duplicate"):
        check_body(msgspec.structs.replace(HEADER, body_root=twice.root), twice)
