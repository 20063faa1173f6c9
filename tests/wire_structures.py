"""Writes docs/structures.md: every structure of the protocol with the types and bounds of its fields, from the code.

    python tests/wire_structures.py > docs/structures.md

The specification says what fields mean; what a decoder takes as one stands in the types themselves, which this reads.
"""

import importlib
import sys
from collections.abc import Iterator
from enum import Enum

import msgspec
from msgspec import inspect

ROOMS = {
    "Members and epochs": ("consensus.membership", "consensus.membership_change", "consensus.epochs"),
    "Ceremony": ("consensus.ceremony", "consensus.key_generation"),
    "Events": ("consensus.event",),
    "Portions": ("consensus.portions", "consensus.review", "consensus.evidence"),
    "Ledger blocks and votes": ("consensus.block", "consensus.vote"),
    "Certificates": ("consensus.certificate", "consensus.bls_certificates", "consensus.listed_certificates"),
    "State": ("consensus.state", "consensus.state_map"),
    "Receipts and bundles": ("consensus.receipt", "consensus.bundle"),
    "Between nodes": ("node.messages",),
    "Files": ("consensus.accumulators", "consensus.overlap"),
}
"""Modules whose structures travel, or stand in files that others check, by heading."""

HEAD = """# Structures

Every structure of [the protocol](protocol.md), version 1, with its fields in wire order. Made from the code by
`python tests/wire_structures.py`; a test holds them together.

A structure is a MessagePack array: its tag first, where one is given in quotes, then its fields. `bytes n` is a byte
string of n bytes, `bytes a–b` of a to b; `text` likewise, in Unicode code points; `int` is an integer within the bounds
given; `[T]` an array of T, with how many it may hold; `T?` is T or nil; a name in italics is a structure of this page;
words in `code` are the only values an enumeration takes. No bound: that of the whole (the protocol gives it) is all
there is.
Bounds that one field alone cannot tell (an optional digest has 0 or 32 bytes, names rise …) are rules, and stand in the
protocol.
"""


def structures(module: str) -> Iterator[type[msgspec.Struct]]:
    """The structures that a module defines and that travel, in the order of its text; bases have no field or tag."""
    for held in vars(importlib.import_module(module)).values():
        if not (isinstance(held, type) and issubclass(held, msgspec.Struct) and held.__module__ == module):
            continue
        if held.__struct_config__.array_like and (held.__struct_fields__ or held.__struct_config__.tag):
            yield held


def rendered() -> str:
    """The page."""
    lines = [HEAD]
    for heading, modules in ROOMS.items():
        lines.append(f"## {heading}\n")
        for module in modules:
            lines += [_structure(kind) for kind in structures(module)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _structure(kind: type[msgspec.Struct]) -> str:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    tag = f' `"{info.tag}"`' if info.tag else ""
    fields = (f"  - {field.name}: {_type(field.type)}" for field in info.fields)
    return "\n".join([f"- **{kind.__name__}**{tag}", *fields])


def _type(held: inspect.Type) -> str:
    match held:
        case inspect.IntType():
            return f"int{_span(held.ge, held.le)}"
        case inspect.BytesType():
            return f"bytes{_span(held.min_length, held.max_length)}"
        case inspect.StrType():
            # The two patterns there are, of names, stand in the protocol in words.
            return f"text{_span(held.min_length, held.max_length)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.VarTupleType() | inspect.ListType():
            return f"[{_type(held.item_type)}]{_span(held.min_length, held.max_length)}"
        case inspect.TupleType():
            return f"({', '.join(_type(item) for item in held.item_types)})"
        case inspect.UnionType():
            kinds = [kind for kind in held.types if not isinstance(kind, inspect.NoneType)]
            return " or ".join(_type(kind) for kind in kinds) + ("?" if len(kinds) < len(held.types) else "")
        case inspect.StructType():
            return f"_{held.cls.__name__}_"
        case inspect.EnumType():
            return ", ".join(f"`{_value(member)}`" for member in held.cls)
        case inspect.Metadata():
            return _type(held.type)
    raise TypeError(f"no words for {held!r}")


def _value(member: Enum) -> str:
    return f"{member.value} ({member.name.lower()})" if isinstance(member.value, int) else str(member.value)


def _span(least: int | None, most: int | None) -> str:
    if most is None:
        return f" from {_number(least)}" if least else ""
    if least == most:
        return f" {_number(most)}"
    return f" {_number(least or 0)}–{_number(most)}"


def _number(value: int) -> str:
    return {2**53 - 1: "2⁵³ − 1", -(2**53 - 1): "−(2⁵³ − 1)", 2**63 - 1: "2⁶³ − 1"}.get(value, f"{value:,}")


if __name__ == "__main__":
    sys.stdout.write(rendered())
