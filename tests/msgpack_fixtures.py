"""MessagePack as attackers may write it: every form the format has for a value, not only the shortest."""

from collections.abc import Callable

import msgspec

Choose = Callable[[int], int]
"""A number below the one given: which form the next value takes; 0 is the shortest."""


def in_other_forms(encoded: bytes, choose: Choose) -> bytes:
    """The same value, each part in a form that ``choose`` picks."""
    return _written(msgspec.msgpack.decode(encoded), choose)


def _written(value: object, choose: Choose) -> bytes:
    match value:
        case bool() | None | float():
            return msgspec.msgpack.encode(value)
        case int():
            return _picked(_integer_forms(value), choose)
        case bytes():
            return _picked(_headed(len(value), None, 0, (0xC4, 0xC5, 0xC6)), choose) + value
        case str():
            text = value.encode()
            return _picked(_headed(len(text), 0xA0, 32, (0xD9, 0xDA, 0xDB)), choose) + text
        case list():
            items = b"".join(_written(item, choose) for item in value)
            return _picked(_headed(len(value), 0x90, 16, (None, 0xDC, 0xDD)), choose) + items
    raise AssertionError(f"no wire type holds a {type(value).__name__}")


def _integer_forms(value: int) -> list[bytes]:
    forms = [bytes([value])] if 0 <= value < 128 else []
    for code, size in ((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8)):
        if 0 <= value < 1 << 8 * size:
            forms.append(bytes([code]) + value.to_bytes(size, "big"))
    for code, size in ((0xD0, 1), (0xD1, 2), (0xD2, 4), (0xD3, 8)):
        if -(1 << 8 * size - 1) <= value < 1 << 8 * size - 1:
            forms.append(bytes([code]) + value.to_bytes(size, "big", signed=True))
    return forms


def _headed(length: int, short: int | None, short_below: int, codes: tuple[int | None, ...]) -> list[bytes]:
    forms = [bytes([short | length])] if short is not None and length < short_below else []
    for code, size in zip(codes, (1, 2, 4), strict=True):
        if code is not None and length < 1 << 8 * size:
            forms.append(bytes([code]) + length.to_bytes(size, "big"))
    return forms


def _picked(forms: list[bytes], choose: Choose) -> bytes:
    return forms[choose(len(forms))]
