"""What the tests of the rules share: a campaign at hand, events told wrongly, and the proof of a refusal.

``remake`` takes an event apart, changes what an attacker would change, commits to it again and signs it
again, so that an event is refused for the one rule it breaks and not for a broken commitment.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec
import pytest
from ledger_fixtures import OPERATOR, CampaignRun, MemoryLedger, Story, begin

from consensus import portions as p
from consensus.admission import admit
from consensus.codec import encode
from consensus.event import (
    SHAPES,
    CheckedEvent,
    Entry,
    check_event,
    pack,
    sign_entries_as_job,
    sign_entry,
)
from consensus.keys import Signer
from consensus.membership import ED25519_LIST
from consensus.rejection import Reason, Rejected
from consensus.state import (
    CAMPAIGN_HEAD_TABLE,
    CampaignHead,
    StateView,
    Usage,
    read_record,
    usage_key,
)

SEVERAL = {"data-source": 3, "governance": 4, "operator": 2, "verifier": 1}
"""Three of four governance members are a quorum of their role."""

Listed = tuple[p.Wire, tuple[int, ...]]
"""An item's content and the examples it lists."""


def opened(counts: dict[str, int] | None = None) -> Story:
    """An open campaign over three sources; nothing granted yet."""
    return begin(counts=counts, certificate_scheme=ED25519_LIST)


def granted(counts: dict[str, int] | None = None, steps: int = 100) -> Story:
    """An open campaign with ``books`` and ``records`` granted for its first steps; ``archive`` is not."""
    told = opened(counts)
    told.ledger.seal(told.run.grant([told.books, told.records], 1, steps))
    return told


def listed(event: CheckedEvent) -> list[Listed]:
    """The items of an event with the examples they list."""
    assert event.portions.data is not None
    return [(item, held.examples) for item, held in zip(event.items, event.portions.data.items, strict=True)]


def items_of(salt: bytes, items: Iterable[Listed], recommit: bool = True) -> tuple[p.DataItem, ...]:
    """Data items whose ``examples_root`` is that of the examples they list."""
    made = []
    for number, (content, examples) in enumerate(items):
        if recommit and isinstance(content, p.SourceUse | p.SourceRefusal):
            root = p.examples_root(p.examples_key(salt, number), examples)
            made.append(p.DataItem(encode(msgspec.structs.replace(content, examples_root=root)), examples))
            continue
        made.append(p.DataItem(encode(content), examples))
    return tuple(made)


def remake(
    run: CampaignRun,
    event: CheckedEvent,
    *,
    items: Sequence[Listed] | None = None,
    governance: p.Wire | None = None,
    operation: p.Wire | None = None,
    job: Signer | None = None,
    signers: Sequence[str] | None = None,
    **place: object,
) -> CheckedEvent:
    """The event with other content, committed to and signed anew; ``place`` replaces fields of its entry.

    Raises:
        Rejected: by ``check_event``.
    """
    return check_event(
        remade(run, event, items=items, governance=governance, operation=operation, job=job, signers=signers, **place),
        run.ledger.committee,
    )


def remade(
    run: CampaignRun,
    event: CheckedEvent,
    *,
    items: Sequence[Listed] | None = None,
    governance: p.Wire | None = None,
    operation: p.Wire | None = None,
    job: Signer | None = None,
    signers: Sequence[str] | None = None,
    recommit: bool = True,
    **place: object,
) -> bytes:
    """The bytes ``remake`` checks."""
    ledger = run.ledger
    held = event.portions
    data = held.data
    if items is not None:
        assert data is not None
        data = p.DataPortion(data.salt, items_of(data.salt, items, recommit))
    portions = p.Portions(
        data,
        held.governance if governance is None else ledger.salted(governance),
        held.operation if operation is None else ledger.salted(operation),
    )
    entry = event.entry
    commitments = p.commitments(str(place.get("kind", entry.kind)), portions)
    fields = dict(zip(("data", "governance", "operation"), commitments, strict=True)) | place
    fields.setdefault("signatures", ())
    entry = msgspec.structs.replace(entry, **fields)
    if "signatures" in place:
        return pack(entry, portions)
    if SHAPES[entry.kind].signed_by_job:
        job = job or run.job
        (signed,) = sign_entries_as_job([entry], job)
        return pack(signed, portions)
    if signers is None:
        signers = [name for name, member in ledger.ids.items() if member in event.signers]
    return pack(signed_by(ledger, entry, signers), portions)


def signed_by(ledger: MemoryLedger, entry: Entry, names: Iterable[str]) -> Entry:
    """The entry with the signatures of these members."""
    for name in names:
        role = ledger.committee.member(ledger.ids[name]).role.value
        entry = sign_entry(entry, ledger.ids[name], role, ledger.secrets[name].identity)
    return entry


def tell(content: p.Wire | None, **fields: object) -> p.Wire:
    """A portion's content with some fields replaced."""
    assert content is not None
    return msgspec.structs.replace(content, **fields)


def assert_refused(
    ledger: MemoryLedger, event: CheckedEvent, reason: Reason, *, before: Sequence[CheckedEvent] = (), at_ms: int = 0
) -> str:
    """The event is refused for ``reason`` after ``before``, and leaves no trace. The detail is returned."""
    view = StateView(ledger.state)
    at_ms = at_ms or ledger.now_ms
    for earlier in before:
        admit(view, earlier, at_ms, ledger.committee)
    changes = view.changes()
    with pytest.raises(Rejected) as caught:
        admit(view, event, at_ms, ledger.committee)
    assert caught.value.reason == reason, str(caught.value)
    assert view.changes() == changes
    assert ledger.state.set_many(view.changes()).root == ledger.state.set_many(changes).root
    return caught.value.detail


def assert_admitted(
    ledger: MemoryLedger, event: CheckedEvent, *, before: Sequence[CheckedEvent] = (), at_ms: int = 0
) -> None:
    """The event is admitted after ``before``, and changes the state."""
    view = StateView(ledger.state)
    at_ms = at_ms or ledger.now_ms
    for earlier in before:
        admit(view, earlier, at_ms, ledger.committee)
    root = ledger.state.set_many(view.changes()).root
    admit(view, event, at_ms, ledger.committee)
    assert ledger.state.set_many(view.changes()).root != root


def assert_malformed(make: Callable[[], object], reason: Reason) -> None:
    """Making (and so checking) the event is refused for ``reason``."""
    with pytest.raises(Rejected) as caught:
        make()
    assert caught.value.reason == reason, str(caught.value)


def head_of(run: CampaignRun) -> CampaignHead:
    value = run.ledger.state.get(CAMPAIGN_HEAD_TABLE + run.id)
    assert value is not None
    return read_record(value, CampaignHead)


def usage_of(run: CampaignRun, source: bytes) -> Usage | None:
    value = run.ledger.state.get(usage_key(run.id, source))
    return None if value is None else read_record(value, Usage)


__all__ = [
    "OPERATOR",
    "SEVERAL",
    "assert_admitted",
    "assert_malformed",
    "assert_refused",
    "granted",
    "head_of",
    "items_of",
    "listed",
    "opened",
    "remade",
    "remake",
    "signed_by",
    "tell",
    "usage_of",
]
