"""``included`` and ``consistent``: what the log itself shows, whatever its events say."""

from consensus.bundle import OpenBundle
from consensus.event import SHAPES
from consensus.predicates.history import member_name, same_member
from consensus.predicates.verdict import Steps
from consensus.rejection import Reason, Rejected
from consensus.state import DELEGATION_TABLE, DelegationRecord


def included(bundle: OpenBundle, steps: Steps) -> None:
    """The event asked about is on the log, and these signed it.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    event = bundle.event_of(bundle.event, "event")
    author = member_name(bundle, event.entry.author)
    steps.checked(f"event {event.id.hex()} is entry {event.index} of {bundle.header.log_size}, a {event.kind.value}")
    if SHAPES[event.kind].signed_by_job:
        job_key = event.entry.signatures[0].signer
        delegation = bundle.record(DELEGATION_TABLE + job_key, DelegationRecord)
        place = f"campaign {event.entry.campaign.hex()}"
        problems = []
        same = same_member(bundle, delegation.operator, event.entry.author)
        if not same or delegation.campaign != event.entry.campaign:
            problems.append("the key was delegated for something else")
        steps.check(f"signed by job key {job_key.hex()}, which {author} delegated for {place}", problems)
    else:
        names = ", ".join(member_name(bundle, held.signer) for held in event.entry.signatures)
        steps.checked(f"authored by {author}, signed by {names}")
    steps.attested("it kept every rule of admission when it was appended: the members that certified the log")
    steps.not_covered("what the event says: its portions are not part of this predicate")


def consistent(bundle: OpenBundle, steps: Steps) -> None:
    """The older log is the beginning of the newer one.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``.
    """
    if bundle.earlier is None:
        raise Rejected(Reason.BUNDLE_INCOMPLETE, "no earlier ledger block in the bundle")
    older, newer = bundle.earlier, bundle.header
    steps.checked(
        f"ledger block {older.height} ({older.digest.hex()}) is certified too, at log size {older.log_size}: "
        "compare it with the one you saw"
    )
    problems = []
    if older.height > newer.height or older.timestamp_ms > newer.timestamp_ms:
        problems.append("the one with the smaller log is not the older one")
    if older.height == newer.height and older.digest != newer.digest:
        problems.append("two certified ledger blocks of one height: the log has forked")
    steps.check(
        f"the first {older.log_size} of {newer.log_size} entries are the older log, none changed or removed", problems
    )
