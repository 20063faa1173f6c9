"""Canonical bytes: one value, one encoding; decode refuses every other.

Wire types are ``msgspec`` Structs declared with ``frozen=True, array_like=True,
forbid_unknown_fields=True`` (``tag`` for members of a union) and encoded as MessagePack. MessagePack
admits several encodings of one value (non-minimal integers, repeated keys, longer length prefixes),
so ``decode`` parses, re-encodes and compares bytes. The received bytes are what is signed, logged and
served; nothing is ever re-serialised on the way.

Wire types hold ints, bytes, strings, bools, tuples and Structs; never floats, sets or dicts, whose
encodings are not unique or not portable.
"""

from typing import TypeVar

import msgspec

from consensus.rejection import Reason, Rejected

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {}


def encode(value: msgspec.Struct) -> bytes:
    """Canonical bytes of a wire Struct."""
    return _encoder.encode(value)


def decode(encoded: bytes, kind: type[T], max_bytes: int) -> T:
    """The value whose canonical encoding is ``encoded``.

    Raises:
        Rejected: ``OVERSIZED`` above ``max_bytes``; ``MALFORMED`` when it does not parse as ``kind``
            or breaks a declared bound; ``NON_CANONICAL`` when it re-encodes to other bytes.
    """
    if len(encoded) > max_bytes:
        raise Rejected(Reason.OVERSIZED, f"{len(encoded)} bytes, at most {max_bytes} allowed")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value = decoder.decode(encoded)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise Rejected(Reason.MALFORMED, f"not a {getattr(kind, '__name__', kind)}: {error}") from error
    if _encoder.encode(value) != encoded:
        raise Rejected(Reason.NON_CANONICAL, f"a {type(value).__name__} in another than its canonical encoding")
    return value  # type: ignore[return-value]
