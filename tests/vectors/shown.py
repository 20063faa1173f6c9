"""The golden vectors of what a log shows outsiders: receipts, links between epochs, bundles, all of one small log.

Each refused case has one fault. What honest members would not certify is certified by all of them together: a verifier
has to tell.
"""

from collections.abc import Iterator
from functools import cache, partial

from agreement import Case, octets, refusal
from epoch_fixtures import change_event, next_membership
from ledger_fixtures import HOSPITAL, LIBRARIAN, OPERATOR, MemoryLedger
from msgspec.structs import replace

from consensus import merkle
from consensus import portions as p
from consensus.block import Header, decode_header
from consensus.bundle import (
    MAGIC,
    Bundle,
    BundleEvent,
    DisclosedItem,
    DisclosedItems,
    EarlierHeader,
    PinnedSize,
    RangeProof,
    StateProof,
    open_bundle,
)
from consensus.codec import encode
from consensus.epochs import Anchor, EpochLink, Pin, anchor, verify_header
from consensus.event import CheckedEvent, sign_entry
from consensus.identifiers import Role
from consensus.membership import ED25519_LIST, Membership
from consensus.membership_change import membership_digest
from consensus.merkle import leaf_hash
from consensus.receipt import Receipt, StateReceipt, verify_receipt, verify_state_receipt
from consensus.state import EPOCH_HEAD_KEY, RETIRED_TABLE, SOURCE_TABLE, EpochHead

COUNTS = {"data-source": 2, "governance": 3, "operator": 1}


class Shown:
    """A log of two epochs: a source and a policy, a source, the change of members, a source of one that joined.

    ``certified`` of the ledger holds these four headers, ``after`` what is before the first and after each of them.
    """

    def __init__(self, seed: int = 0) -> None:
        ledger = self.ledger = MemoryLedger(COUNTS, seed, certificate_scheme=ED25519_LIST)
        self.after = [ledger.ledger]
        self.books = ledger.source(LIBRARIAN, "books")
        self._seal(self.books, ledger.policy())
        self._seal(ledger.source(HOSPITAL, "records"))
        self.before = ledger.committee
        membership, secrets = next_membership(
            ledger.genesis, ledger.committee, ledger.secrets, add={"archive": "data-source"}, rotate=[OPERATOR]
        )
        self.membership = membership
        self._seal(change_event(ledger, membership))
        self._old = ledger.scheme, ledger.committee, dict(ledger.secrets)
        ledger.enter_epoch(membership, secrets)
        self._seal(ledger.source("archive", "letters"))
        self.trusted: Anchor = anchor(ledger.genesis, ledger.chain_id)
        self.link = ledger.all_links[0]

    def _seal(self, *events: CheckedEvent) -> None:
        self.ledger.seal(*events)
        self.after.append(self.ledger.ledger)

    def receipt(self, index: int, block: int, links: tuple[EpochLink, ...] = ()) -> Receipt:
        """Of an event, under one of the certified headers."""
        header, certificate = self.ledger.certified[block]
        size = decode_header(header, self.ledger.chain_id).log_size
        proof = merkle.inclusion_proof(index, size, self.ledger.node)
        return Receipt(1, self.ledger.entry(index), index, proof, header, certificate, links)

    def state_receipt(self, key: bytes, block: int, links: tuple[EpochLink, ...] = ()) -> StateReceipt:
        """Of a record, or its absence."""
        header, certificate = self.ledger.certified[block]
        return StateReceipt(1, key, self.ledger.states[block].prove(key), header, certificate, links)

    def certified_anew(self, header: Header) -> tuple[bytes, bytes]:
        """A header that all members of its epoch certify, whatever it says."""
        ledger = self.ledger
        if header.epoch == 1:
            return encode(header), ledger.certify(header)
        now = ledger.scheme, ledger.committee, ledger.secrets
        ledger.scheme, ledger.committee, ledger.secrets = self._old
        try:
            return encode(header), ledger.certify(header)
        finally:
            ledger.scheme, ledger.committee, ledger.secrets = now

    def header(self, block: int) -> Header:
        """One of the certified headers."""
        return decode_header(self.ledger.certified[block][0], self.ledger.chain_id)


@cache
def shown(seed: int = 0) -> Shown:
    """The log, or another that its founders might have begun."""
    return Shown(seed)


def shared() -> Case:
    ledger = shown().ledger
    return {"genesis": encode(ledger.genesis).hex(), "chain_id": ledger.chain_id.hex()}


# Receipts


def receipts() -> list[Case]:
    """Receipts of events of both epochs, and of records that are there and that are not."""
    told, link = shown(), shown().link
    accepted: list[Case] = []
    for what, index, block, links in (
        ("the first event", 0, 0, ()),
        ("a policy, signed by a quorum", 1, 0, ()),
        ("an event of an earlier ledger block", 2, 1, ()),
        ("an event under the terminal header", 1, 2, ()),
        ("a change of members, signed by a quorum of every role", 3, 2, ()),
        ("an event of the next epoch", 4, 3, (link,)),
        ("an event of an epoch that has ended", 0, 3, (link,)),
        ("links beyond the header's epoch", 2, 1, (link,)),
    ):
        encoded = encode(told.receipt(index, block, links))
        found = verify_receipt(told.trusted, encoded)
        accepted.append({"what": what, "receipt": encoded.hex(), "index": found.index, "event_id": found.id.hex()})
    for what, key, block, links in (
        ("a record that is absent", SOURCE_TABLE + octets("no source"), 3, (link,)),
        ("who succeeds the operator, under the terminal header", RETIRED_TABLE + _old_operator(), 2, (link,)),
        ("a source", SOURCE_TABLE + told.books.id, 1, ()),
    ):
        encoded = encode(told.state_receipt(key, block, links))
        value = verify_state_receipt(told.trusted, encoded, key).value
        accepted.append(
            {
                "what": what,
                "key": key.hex(),
                "state_receipt": encoded.hex(),
                "value": None if value is None else value.hex(),
            }
        )
    refused = [
        refusal(what, partial(verify_receipt, told.trusted, bad), receipt=bad.hex()) for what, bad in _bad_receipts()
    ]
    refused += [
        refusal(what, partial(verify_state_receipt, told.trusted, bad, key), key=key.hex(), state_receipt=bad.hex())
        for what, key, bad in _bad_state_receipts()
    ]
    return [{**shared(), "refused": refused, "accepted": accepted}]


def _old_operator() -> bytes:
    return next(member.id for member in shown().ledger.genesis.members if member.name == OPERATOR)


def _bad_receipts() -> Iterator[tuple[str, bytes]]:
    told, link = shown(), shown().link
    good, of_next = told.receipt(1, 1), told.receipt(4, 3, (link,))
    encoded = encode(good)
    yield "a trailing byte", encoded + b"\x00"
    yield "a byte short", encoded[:-1]
    at = 1 + 1 + len("receipt")
    assert encoded[at] == 1
    yield "another version", encoded[:at] + b"\x02" + encoded[at + 1 :]
    yield "the version in two bytes", encoded[:at] + b"\xcc\x01" + encoded[at + 1 :]
    yield "a state receipt", encode(told.state_receipt(EPOCH_HEAD_KEY, 1))
    yield "of another log of the same name", encode(shown(1).receipt(0, 0))
    yield "the next ledger block's certificate", encode(replace(good, certificate=told.ledger.certified[2][1]))
    yield "another index", encode(replace(good, index=good.index + 1))
    yield "an index beyond the log", encode(replace(good, index=told.header(1).log_size))
    yield "a hash of the proof left out", encode(replace(good, proof=good.proof[:-1]))
    yield "another event's entry", encode(replace(good, entry=told.ledger.entry(0)))
    yield "no link to the next epoch", encode(replace(of_next, epochs=()))
    yield "the same link twice", encode(replace(of_next, epochs=(link, link)))
    newer = told.header(2)
    forged = told.certified_anew(replace(newer, epoch=1, view=1, parent_view=0))
    yield (
        "certified by the next members, with no link to them",
        encode(replace(told.receipt(1, 2), header=forged[0], certificate=forged[1])),
    )
    for what, entry in _bad_entries():
        yield what, encode(_on_a_log_of(entry))


def _bad_entries() -> Iterator[tuple[str, bytes]]:
    """Entries that a quorum of traitors has put on the log."""
    told = shown()
    source, policy, change = (told.ledger.events[index].entry for index in (0, 1, 3))
    yield "an entry of another log", shown(1).ledger.entry(0)
    yield "an entry that nobody signed", encode(replace(source, signatures=()))
    yield "a policy that fewer than a quorum signed", encode(replace(policy, signatures=_with_author(policy, 1)))
    yield "a source that its author did not sign", encode(replace(source, signatures=policy.signatures[:1]))
    both = tuple(sorted((*source.signatures, *policy.signatures[:1]), key=lambda held: held.signer))
    yield "a source that somebody else signed, too", encode(replace(source, signatures=both))
    hospital = told.ledger.secrets[HOSPITAL].identity
    beside = sign_entry(source, told.ledger.ids[HOSPITAL], "data-source", hospital)
    yield "a source that another of its author's role signed, too", encode(beside)
    yield "signatures out of order", encode(replace(policy, signatures=policy.signatures[::-1]))
    yield (
        "a signature of another event",
        encode(replace(source, signatures=(replace(source.signatures[0], signature=policy.signatures[0].signature),))),
    )
    operator = _old_operator()
    kept = tuple(held for held in change.signatures if held.signer != operator)
    yield "a change of members that no operator signed", encode(replace(change, signatures=kept))
    yield "a source outside campaigns that names one", encode(replace(source, campaign=octets("campaign")))
    yield "a source by a governance member", encode(replace(source, author=policy.author))
    yield "a source by nobody", encode(replace(source, author=octets("stranger")))


def _with_author(entry: object, others: int) -> tuple[object, ...]:
    signatures = entry.signatures  # type: ignore[attr-defined]
    mine = [held for held in signatures if held.signer == entry.author]  # type: ignore[attr-defined]
    rest = [held for held in signatures if held.signer != entry.author]  # type: ignore[attr-defined]
    return tuple(sorted((*mine, *rest[: others - 1]), key=lambda held: held.signer))


def _on_a_log_of(entry: bytes) -> Receipt:
    """A receipt of an entry that stands alone on a certified log."""
    told = shown()
    leaf = leaf_hash(entry)
    header = replace(told.header(0), log_size=1, log_root=leaf, event_count=1)
    encoded, certificate = told.certified_anew(header)
    return Receipt(1, entry, 0, (), encoded, certificate)


def _bad_state_receipts() -> Iterator[tuple[str, bytes, bytes]]:
    told = shown()
    key = SOURCE_TABLE + told.books.id
    good = told.state_receipt(key, 1)
    other = SOURCE_TABLE + told.ledger.events[2].id
    yield "of another record than asked for", other, encode(good)
    yield "another record's proof", key, encode(replace(good, proof=told.ledger.states[1].prove(other)))
    yield "another value", key, encode(replace(good, proof=replace(good.proof, leaf_value=b"\xc0")))
    absent = SOURCE_TABLE + octets("no source")
    yield (
        "a record said to be absent by a proof of another",
        key,
        encode(replace(good, proof=told.ledger.states[1].prove(absent))),
    )
    header, certificate = told.ledger.certified[0]
    yield (
        "an older header",
        other,
        encode(replace(told.state_receipt(other, 1), header=header, certificate=certificate)),
    )
    yield "a key of 32 bytes", key, encode(good).replace(b"\xc4\x21" + key, b"\xc4\x20" + key[:-1], 1)


# Links


def epoch_links() -> list[Case]:
    """Links, and headers under the epochs that they lead to."""
    accepted: list[Case] = []
    told = shown()
    for what, links, block in (
        ("no link, and a header of the first epoch", (), 1),
        ("a link, and a header of the epoch it leads to", (told.link,), 3),
        ("a link, and the header at which the epoch before ended", (told.link,), 2),
        ("a link, and a header of the epoch before", (told.link,), 0),
    ):
        header, certificate = told.ledger.certified[block]
        verify_header(told.trusted.follow(links), header, certificate)
        accepted.append({"what": what, **_linked(links, header, certificate)})

    def judge(links: tuple[EpochLink, ...], header: bytes, certificate: bytes) -> None:
        verify_header(told.trusted.follow(links), header, certificate)

    refused = [refusal(what, partial(judge, *bad), **_linked(*bad)) for what, bad in _bad_links()]
    return [{**shared(), "refused": refused, "accepted": accepted}]


def _linked(links: tuple[EpochLink, ...], header: bytes, certificate: bytes) -> Case:
    return {
        "links": [encode(link).hex() for link in links],
        "header": header.hex(),
        "certificate": certificate.hex(),
    }


Linked = tuple[tuple[EpochLink, ...], bytes, bytes]


def _bad_links() -> Iterator[tuple[str, Linked]]:
    told, link = shown(), shown().link
    first, newest = told.ledger.certified[0], told.ledger.certified[3]
    members = told.membership
    renamed = replace(members, members=(replace(members.members[0], name="another-name"), *members.members[1:]))
    yield "other members than those certified", ((replace(link, membership=encode(renamed)),), *newest)
    yield "members of another epoch", ((replace(link, membership=encode(replace(members, epoch=2))),), *newest)
    yield "members that are no canonical bytes", ((replace(link, membership=link.membership + b"\x00"),), *newest)
    yield "the same link again", ((link, link), *newest)
    yield "no link to the header's epoch", ((), *newest)
    early = replace(link, header=first[0], certificate=first[1], proof=told.ledger.states[0].prove(EPOCH_HEAD_KEY))
    yield "a header before the end of the epoch", ((early,), *newest)
    yield "a proof of another state", ((replace(link, proof=told.ledger.states[3].prove(EPOCH_HEAD_KEY)),), *newest)
    other = told.ledger.states[2].prove(SOURCE_TABLE + told.books.id)
    yield "a proof of another record", ((replace(link, proof=other),), *newest)
    by_new = told.ledger.certify(told.header(2))
    yield "a link that the next members certified", ((replace(link, certificate=by_new),), *newest)
    yield "another header's certificate", ((replace(link, certificate=first[1]),), *newest)
    foreign = shown(1).link
    yield "a link of another log", ((foreign,), *newest)
    for what, membership in _members_that_may_not_follow():
        yield what, ((_certified_link(membership),), *newest)
    ended = told.header(2)
    beyond = told.certified_anew(replace(ended, height=9, view=9, log_size=ended.log_size + 1))
    yield "a header of the first epoch, larger than that was at its end", ((link,), *beyond)
    fork = told.certified_anew(replace(ended, height=9, view=9, log_root=octets("another log")))
    yield "another log of the size at which the first epoch ended", ((link,), *fork)
    begun = told.certified_anew(replace(told.header(3), log_size=ended.log_size, log_root=octets("another log")))
    yield "another log of the size at which the epoch began", ((link,), *begun)
    smaller = told.certified_anew(replace(told.header(3), log_size=ended.log_size - 1))
    yield "a header of an epoch, smaller than that was when it began", ((link,), *smaller)
    of_none = told.certified_anew(replace(told.header(0), log_root=octets("another log"), log_size=0))
    yield "a log of nothing with another root", ((), *of_none)


def _members_that_may_not_follow() -> Iterator[tuple[str, Membership]]:
    held = shown().membership
    operator = next(member for member in held.members if member.name == LIBRARIAN)
    changed = replace(operator, role=Role.OPERATOR)
    yield (
        "certified members of whom one changes its role",
        replace(held, members=tuple(changed if member.name == LIBRARIAN else member for member in held.members)),
    )
    yield "certified members of the epoch after the next", replace(held, epoch=2)


def _certified_link(membership: Membership) -> EpochLink:
    """A link to members that the ending epoch has certified and might not."""
    told = shown()
    digest = membership_digest(told.ledger.chain_id, membership)
    head = EpochHead(membership.epoch, digest, octets("event"), 1)
    state = told.ledger.states[2].set_many({EPOCH_HEAD_KEY: encode(head)})
    header, certificate = told.certified_anew(replace(told.header(2), state_root=state.root))
    return EpochLink(encode(membership), header, certificate, state.prove(EPOCH_HEAD_KEY))


# Bundles


def bundles() -> list[Case]:
    """Bundles opened, whatever predicate they are for: all proofs of one, and portions whole and in part."""
    told = shown()
    accepted: list[Case] = []
    for what, bundle, pin in _bundles():
        encoded = MAGIC + encode(bundle)
        found = open_bundle(told.trusted, encoded, pin)
        accepted.append(
            {
                "what": what,
                "pin": _pinned(pin),
                "bundle": encoded.hex(),
                "events": [event.id.hex() for event in found.events],
                "header": found.header.digest.hex(),
            }
        )
    refused = [
        refusal(what, partial(open_bundle, told.trusted, bad, pin), pin=_pinned(pin), bundle=bad.hex())
        for what, bad, pin in _bad_bundles()
    ]
    return [{**shared(), "refused": refused, "accepted": accepted}]


def _pinned(pin: Pin | None) -> list[object] | None:
    return None if pin is None else [pin.log_size, pin.log_root.hex()]


def _bundle(block: int, **fields: object) -> Bundle:
    told = shown()
    header, certificate = told.ledger.certified[block]
    empty = Bundle(
        version=1, chain_id=told.ledger.chain_id, predicate="included", campaign=b"", source=b"", event=b"",
        header=header, certificate=certificate, epochs=(told.link,) if block == 3 else (), pinned=None, earlier=None,
        events=(), records=(), ranges=(),
    )  # fmt: skip
    return replace(empty, **fields)


def _event(index: int, block: int, **fields: object) -> BundleEvent:
    told = shown()
    proof = merkle.inclusion_proof(index, told.header(block).log_size, told.ledger.node)
    return replace(BundleEvent(told.ledger.entry(index), index, proof, None, None, None, None), **fields)


def portions_of(index: int) -> p.Portions:
    return p.decode_portions(shown().ledger.portions(index))


def _items(index: int) -> DisclosedItems:
    """The only item of a source, disclosed by itself."""
    portion = portions_of(index).data
    assert portion is not None
    item = DisclosedItem(0, p.item_salt(portion.salt, 0), portion.items[0].content, (), None)
    return DisclosedItems(p.data_items_root(portion), 1, (item,))


def _consistent(first: int, second: int) -> tuple[bytes, ...]:
    return merkle.consistency_proof(first, second, shown().ledger.node)


def _bundles() -> Iterator[tuple[str, Bundle, Pin | None]]:
    told = shown()
    first = told.header(0)
    yield "an event, nothing disclosed of it", _bundle(0, event=told.books.id, events=(_event(0, 0),)), None
    grown = _consistent(first.log_size, told.header(3).log_size)
    earlier = EarlierHeader(*told.ledger.certified[0], grown)
    yield "two headers", _bundle(3, predicate="consistent", earlier=earlier), None
    pin = Pin(first.log_size, first.log_root)
    yield "a log that continues a pinned one", _bundle(3, pinned=PinnedSize(first.log_size, grown)), pin
    yield "a log that is the pinned one", _bundle(0), pin
    yield _full()


def _full() -> tuple[str, Bundle, Pin | None]:
    told = shown()
    state = told.ledger.states[3]
    keys = sorted([SOURCE_TABLE + told.books.id, SOURCE_TABLE + octets("no source")])
    bundle = _bundle(
        3,
        events=(
            _event(0, 3, data=portions_of(0).data),
            _event(1, 3, governance=portions_of(1).governance),
            _event(2, 3, items=_items(2)),
        ),
        records=tuple(StateProof(key, state.prove(key)) for key in keys),
        ranges=(RangeProof(SOURCE_TABLE, state.prove_prefix(SOURCE_TABLE)),),
    )
    return "events with portions whole and in part, records and a range", bundle, None


def _bad_bundles() -> Iterator[tuple[str, bytes, Pin | None]]:
    told = shown()
    _, full, _ = _full()
    encoded = encode(full)

    def changed(**fields: object) -> bytes:
        return MAGIC + encode(replace(full, **fields))

    def disclosing(place: int, **fields: object) -> bytes:
        events = list(full.events)
        events[place] = replace(events[place], **fields)
        return changed(events=tuple(events))

    yield "no magic", encoded, None
    yield "line ends changed on the way", MAGIC.replace(b"\r\n", b"\n") + encoded, None
    yield "a trailing byte", MAGIC + encoded + b"\x00", None
    yield "of another chain", changed(chain_id=octets("chain")), None
    yield "another header's certificate", changed(certificate=told.ledger.certified[1][1]), None
    yield "no link to the header's epoch", changed(epochs=()), None
    yield "events in another order", changed(events=full.events[::-1]), None
    yield "an event twice", changed(events=(full.events[0], *full.events)), None
    yield "records in another order", changed(records=full.records[::-1]), None
    yield "a range twice", changed(ranges=full.ranges * 2), None
    yield "a proof of inclusion in another log", disclosing(0, proof=_event(0, 1).proof), None
    data, governance = portions_of(0).data, portions_of(1).governance
    assert data is not None
    assert governance is not None
    yield "a data portion with another salt", disclosing(0, data=replace(data, salt=octets("salt"))), None
    yield (
        "a governance portion with another salt",
        disclosing(1, governance=replace(governance, salt=octets("salt"))),
        None,
    )
    yield "a governance portion where the kind has none", disclosing(0, governance=governance), None
    yield "a data portion whole and in part", disclosing(0, items=_items(0)), None
    item = _items(2)
    yield (
        "an item with another salt",
        disclosing(2, items=replace(item, items=(replace(item.items[0], salt=octets("salt")),))),
        None,
    )
    yield "another number of items", disclosing(2, items=replace(item, item_count=2)), None
    yield (
        "a record's proof for another",
        changed(records=(full.records[0], replace(full.records[1], proof=full.records[0].proof))),
        None,
    )
    whole = full.ranges[0].proof
    yield (
        "an entry of a range left out",
        changed(ranges=(replace(full.ranges[0], proof=replace(whole, entries=whole.entries[1:])),)),
        None,
    )
    first = told.header(0)
    grown = _consistent(first.log_size, told.header(3).log_size)
    pin = Pin(first.log_size, first.log_root)
    yield "nothing that shows it to continue the pinned log", MAGIC + encode(full), pin
    yield (
        "another log than the pinned one of its size",
        MAGIC + encode(_bundle(0)),
        Pin(first.log_size, octets("another log")),
    )
    yield (
        "a log that continues another than the pinned one",
        MAGIC + encode(_bundle(3, pinned=PinnedSize(first.log_size, grown))),
        Pin(first.log_size, octets("another log")),
    )
    yield "a log that is smaller than the pinned one", MAGIC + encode(_bundle(0)), Pin(99, octets("newer"))
    yield (
        "two headers that are not of one log",
        MAGIC
        + encode(_bundle(3, predicate="consistent", earlier=EarlierHeader(*told.ledger.certified[0], grown[:-1]))),
        None,
    )


__all__ = ["bundles", "epoch_links", "receipts"]
