"""One value, one encoding: round trips, and every other encoding of the same value refused."""

from typing import Annotated

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from consensus.codec import decode, encode
from consensus.portions import Name, Natural, Wire
from consensus.rejection import Reason, Rejected


class Inner(Wire, frozen=True):
    name: Name
    flag: bool


class Sample(Wire, frozen=True):
    number: Natural
    octets: Annotated[bytes, Meta(max_length=300)]
    inners: Annotated[tuple[Inner, ...], Meta(max_length=40)]
    maybe: Inner | None = None


INNERS = st.builds(Inner, st.text(min_size=1, max_size=128), st.booleans())
SAMPLES = st.builds(
    Sample,
    st.integers(0, 2**53 - 1),
    st.binary(max_size=300),
    st.lists(INNERS, max_size=40).map(tuple),
    st.none() | INNERS,
)
LIMIT = 1 << 20
ONE = Sample(5, b"ab", (Inner("x", True),))
assert encode(ONE) == b"\x94\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0"


def refusal_of(encoded: bytes, limit: int = LIMIT) -> Reason:
    with pytest.raises(Rejected) as caught:
        decode(encoded, Sample, limit)
    return caught.value.reason


@settings(max_examples=200, deadline=None)
@given(SAMPLES)
def test_every_value_comes_back_from_its_encoding(sample: Sample) -> None:
    assert decode(encode(sample), Sample, LIMIT) == sample


@settings(max_examples=200, deadline=None)
@given(SAMPLES, SAMPLES)
def test_different_values_have_different_encodings(one: Sample, other: Sample) -> None:
    assert (one == other) == (encode(one) == encode(other))


@pytest.mark.parametrize(
    "encoded",
    [
        b"\x94\xcc\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcd\x00\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xce\x00\x00\x00\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcf\x00\x00\x00\x00\x00\x00\x00\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xd0\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xd3\x00\x00\x00\x00\x00\x00\x00\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc5\x00\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc6\x00\x00\x00\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\xdc\x00\x01\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\xdd\x00\x00\x00\x01\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xd9\x01x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xda\x00\x01x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xdb\x00\x00\x00\x01x\xc3\xc0",
        b"\xdc\x00\x04\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\xdd\x00\x00\x00\x04\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x93\x05\xc4\x02ab\x91\x92\xa1x\xc3",
    ],
)
def test_longer_or_shorter_encoding_of_the_same_value_is_refused(encoded: bytes) -> None:
    assert msgspec.msgpack.decode(encoded, type=Sample) == ONE
    assert refusal_of(encoded) == Reason.NON_CANONICAL


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xc0",
        encode(ONE) + b"\x00",
        encode(ONE)[:-1],
        b"\x95" + encode(ONE)[1:] + b"\xc0",
        b"\x94\x05\xa2ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xc4\x01x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xa1x\x01\xc0",
        b"\x94\xcb\x40\x14\x00\x00\x00\x00\x00\x00\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xca\x7f\xc0\x00\x00\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xff\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcf\x00\x20\x00\x00\x00\x00\x00\x00\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcf\x7f\xff\xff\xff\xff\xff\xff\xff\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcf\x80\x00\x00\x00\x00\x00\x00\x00\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xcf\xff\xff\xff\xff\xff\xff\xff\xff\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xd3\x80\x00\x00\x00\x00\x00\x00\x00\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xa2\xc3\x28\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xa3\xed\xa0\x80\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xa2\xc0\x80\xc3\xc0",
        b"\x94\x05\xc4\x02ab\x91\x92\xa0\xc3\xc0",
        b"\x94\xd4\x01\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\x94\xd6\xff\x00\x00\x00\x05\xc4\x02ab\x91\x92\xa1x\xc3\xc0",
        b"\xc7\x00\x05",
        b"\xc1",
        b"\x84\xa6number\x05\xa6octets\xc4\x02ab\xa6inners\x90\xa5maybe\xc0",
    ],
)
def test_what_is_not_such_a_value_is_malformed(encoded: bytes) -> None:
    assert refusal_of(encoded) == Reason.MALFORMED


def test_encoding_above_its_limit_is_refused_before_it_is_parsed() -> None:
    assert refusal_of(b"\xc1" * 11, limit=10) == Reason.OVERSIZED
    assert decode(encode(ONE), Sample, len(encode(ONE))) == ONE


@settings(max_examples=300, deadline=None)
@given(SAMPLES, st.integers(min_value=0), st.integers(1, 255))
def test_encoding_with_a_changed_byte_is_refused_or_is_another_value(
    sample: Sample, position: int, difference: int
) -> None:
    encoded = bytearray(encode(sample))
    encoded[position % len(encoded)] ^= difference
    try:
        found = decode(bytes(encoded), Sample, LIMIT)
    except Rejected:
        return
    assert found != sample
    assert encode(found) == encoded
