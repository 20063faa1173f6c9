"""The golden vectors of events and ledger blocks as members judge them, of the log that ``shown.py`` makes.

Each refused case has one fault. What events do to the state is told by ``transitions``.
"""

from collections.abc import Iterator
from functools import partial

from agreement import Case, octets, refusal
from ledger_fixtures import LIBRARIAN
from msgspec.structs import replace
from shown import portions_of, shared, shown

from consensus import portions as p
from consensus.block import Body, Header
from consensus.codec import decode, encode
from consensus.event import CheckedEvent, Entry, check_event, pack, pack_parts, sign_entry
from consensus.identifiers import View
from consensus.transition import apply


def signed_events() -> list[Case]:
    """Events as they are sent, of the first epoch."""
    told = shown()
    accepted = []
    for what, index in (("a policy", 1), ("a change of members", 3), ("a source", 0)):
        encoded = pack_parts(told.ledger.entry(index), told.ledger.portions(index))
        found = check_event(encoded, told.before)
        accepted.append(
            {"what": what, "event": encoded.hex(), "id": found.id.hex(), "leaf_hash": found.leaf_hash.hex()}
        )
    refused = [refusal(what, partial(check_event, bad, told.before), event=bad.hex()) for what, bad in _bad_events()]
    return [{**shared(), "refused": refused, "accepted": accepted}]


def _bad_events() -> Iterator[tuple[str, bytes]]:
    told = shown()
    entry, portions = told.ledger.events[0].entry, portions_of(0)
    good = pack_parts(told.ledger.entry(0), told.ledger.portions(0))
    yield "a trailing byte", good + b"\x00"
    yield "portions that are not canonical", pack_parts(told.ledger.entry(0), told.ledger.portions(0) + b"\x00")
    yield "an entry of 65,536 bytes", pack_parts(bytes(65_536), told.ledger.portions(0))
    yield "portions of another event", pack_parts(told.ledger.entry(0), told.ledger.portions(2))
    data, salted = portions.data, portions_of(1).governance
    assert data is not None
    assert salted is not None
    (item,) = data.items
    for what, made in (
        ("a source without its portion", p.Portions(None, None, None)),
        ("a source with a governance portion", p.Portions(data, salted, None)),
        ("a source of no items", p.Portions(replace(data, items=()), None, None)),
        ("a source of two items", p.Portions(replace(data, items=(item, item)), None, None)),
        ("a source that lists examples", p.Portions(replace(data, items=(replace(item, examples=(1,)),)), None, None)),
        ("a source with a byte after its content", _with_content(data, item.content + b"\x00")),
        ("a source of no examples", _with_content(data, encode(_claim(item.content, example_count=0)))),
        ("a source with no purposes", _with_content(data, encode(_claim(item.content, purposes=())))),
    ):
        yield what, _signed_anew(entry, made)
    for what, changes in (
        ("of another chain", {"chain_id": octets("another chain")}),
        ("in a campaign, where its kind is in none", {"campaign": octets("campaign")}),
        ("numbered, where its kind is not", {"sequence": 1}),
        ("of a second attempt, where its kind has one", {"attempt": 1}),
        ("by nobody", {"author": octets("stranger")}),
        ("by a member of another role", {"author": told.ledger.events[1].entry.author}),
    ):
        yield f"a source {what}", _signed_anew(replace(entry, **changes), portions)
    yield "a source that nobody signed", pack(replace(entry, signatures=()), portions)
    (signature,) = entry.signatures
    wrong = replace(signature, signature=bytes(64))
    yield "a source with a wrong signature", pack(replace(entry, signatures=(wrong,)), portions)


def _with_content(data: p.DataPortion, content: bytes) -> p.Portions:
    return p.Portions(replace(data, items=(replace(data.items[0], content=content),)), None, None)


def _claim(content: bytes, **changes: object) -> p.SourceClaim:
    return replace(decode(content, p.SourceClaim, 1 << 20), **changes)


def _signed_anew(entry: Entry, portions: p.Portions) -> bytes:
    """What the author of the first source could have sent."""
    told = shown()
    bare = replace(entry, signatures=())
    data, governance, operation = p.commitments(entry.kind, portions)
    bare = replace(bare, data=data, governance=governance, operation=operation)
    librarian = told.ledger.secrets[LIBRARIAN].identity
    return pack(sign_entry(bare, told.ledger.ids[LIBRARIAN], "data-source", librarian), portions)


def ledger_blocks() -> list[Case]:
    """Ledger blocks on their parents. Events are named by leaf hash: what they do is told by ``transitions``."""
    told = shown()
    accepted = []
    for what, place in (("of the next epoch", 3), ("terminal", 2), ("the second", 1)):
        judged = _block(place)
        _apply(*judged)
        accepted.append({"what": what, **_applied(*judged)})
    refused = [refusal(what, partial(_apply, *bad), **_applied(*bad)) for what, bad in _bad_blocks()]
    links = [encode(told.link).hex()]
    return [{**shared(), "links": links, "refused": refused, "accepted": accepted}]


Judged = tuple[int, Header, Body, list[CheckedEvent]]


def _block(place: int) -> Judged:
    told = shown()
    header = told.header(place)
    first = header.log_size - header.event_count
    events = told.ledger.events[first : header.log_size]
    return place, header, Body(tuple(event.leaf_hash for event in events)), events


def _apply(place: int, header: Header, body: Body, events: list[CheckedEvent]) -> None:
    told = shown()
    apply(told.after[place], header, body, events, told.ledger.committee if place == 3 else told.before)


def _applied(place: int, header: Header, body: Body, events: list[CheckedEvent]) -> Case:
    told = shown()
    parent = told.after[place]
    return {
        "epoch": 1 if place == 3 else 0,
        "parent_is_terminal": place == 3,
        "parent": encode(parent.header).hex(),
        "log": [event.leaf_hash.hex() for event in told.ledger.events[: parent.header.log_size]],
        "events": [event.leaf_hash.hex() for event in events],
        "state_root": told.header(place).state_root.hex(),
        "body": encode(body).hex(),
        "header": encode(header).hex(),
    }


def _bad_blocks() -> Iterator[tuple[str, Judged]]:
    place, header, body, events = _block(1)
    other = shown().before.leader(View(header.view + 1)).id
    for what, changes in (
        ("of another chain", {"chain_id": octets("another chain")}),
        ("of another epoch", {"epoch": 1}),
        ("of another parent", {"parent": octets("another parent")}),
        ("of a parent of another view", {"parent_view": header.parent_view - 1}),
        ("two heights above its parent", {"height": header.height + 1}),
        ("of its parent's view", {"view": header.parent_view}),
        ("by another leader", {"leader": other}),
        ("earlier than its parent", {"timestamp_ms": shown().after[1].header.timestamp_ms - 1}),
        ("with another number of events", {"event_count": 2}),
        ("with another body root", {"body_root": octets("another body")}),
        ("with another log root", {"log_root": octets("another log")}),
        ("with another log size", {"log_size": header.log_size + 1}),
        ("with another state root", {"state_root": octets("another state")}),
    ):
        yield f"a ledger block {what}", (place, replace(header, **changes), body, events)
    yield "a ledger block whose events are not its body's", (place, header, body, [])
    twice = Body(body.leaf_hashes * 2)
    yield (
        "a ledger block with an event twice",
        (
            place,
            replace(header, body_root=twice.root, event_count=2),
            twice,
            events * 2,
        ),
    )
    place, header, body, events = _block(3)
    yield "the first of an epoch, of its parent's view", (place, replace(header, parent_view=3, view=4), body, events)
