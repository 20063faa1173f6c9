"""Typed verification: a predicate, a bundle, a verdict with numbered steps.

``verify(bundle, weights)`` answers the predicate the bundle was made for:

=======================  ===========================================================================
``included``             this event is on the log, by whom it was authored and signed
``consistent``           the log only grew between two certified ledger blocks
``policy-in-force``      every step ran under a grant of the policy then in force, within its depths
``source-honored``       every use of a source was granted by its owner, and these are all uses
``source-unused``        no example of a source was trained on
``revocation-exposure``  a campaign depends on a source that was revoked: by which steps, released when
``delta-exact``          the released file is what the recorded steps, one after the other, ended in
``refusals-complete``    every presented example was admitted, or refused for the true reason
``evidence``             a member signed two messages that contradict each other
``metadata-complete``    a campaign recorded every fact that its policy requires of one
``accumulators``         per-source accumulators of all steps are committed, and these sources took part
``evaluated``            a campaign's weights were evaluated, and no finding about them stands open
=======================  ===========================================================================

A bundle that is malformed, of another chain, or lacks an event or record the predicate needs raises
``Rejected``. Pure, like everything in ``consensus``: the caller reads files and hashes weights.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from consensus.bundle import OpenBundle
from consensus.identifiers import DIGEST_BYTES, VOTING_ROLES
from consensus.predicates.accumulators import accumulators
from consensus.predicates.delta_exact import ReleasedFile, delta_exact
from consensus.predicates.evidence import evidence
from consensus.predicates.log import consistent, included
from consensus.predicates.metadata_complete import metadata_complete
from consensus.predicates.policy_in_force import policy_in_force
from consensus.predicates.refusals_complete import refusals_complete
from consensus.predicates.reviews import evaluated
from consensus.predicates.revocation_exposure import revocation_exposure
from consensus.predicates.source_honored import source_honored
from consensus.predicates.source_unused import source_unused
from consensus.predicates.verdict import Answer, AsOf, CheckedStep, Status, Steps, Verdict
from consensus.rejection import Reason, Rejected


class Predicate(StrEnum):
    """What can be asked of a bundle."""

    INCLUDED = "included"
    CONSISTENT = "consistent"
    POLICY_IN_FORCE = "policy-in-force"
    SOURCE_HONORED = "source-honored"
    SOURCE_UNUSED = "source-unused"
    REVOCATION_EXPOSURE = "revocation-exposure"
    DELTA_EXACT = "delta-exact"
    REFUSALS_COMPLETE = "refusals-complete"
    EVIDENCE = "evidence"
    ACCUMULATORS = "accumulators"
    METADATA_COMPLETE = "metadata-complete"
    EVALUATED = "evaluated"


SUBJECTS: Mapping[Predicate, tuple[str, ...]] = {
    Predicate.INCLUDED: ("event",),
    Predicate.CONSISTENT: (),
    Predicate.POLICY_IN_FORCE: ("campaign",),
    Predicate.SOURCE_HONORED: ("campaign", "source"),
    Predicate.SOURCE_UNUSED: ("campaign", "source"),
    Predicate.REVOCATION_EXPOSURE: ("campaign", "source"),
    Predicate.DELTA_EXACT: ("campaign",),
    Predicate.REFUSALS_COMPLETE: ("campaign",),
    Predicate.EVIDENCE: ("event",),
    Predicate.ACCUMULATORS: ("campaign",),
    Predicate.METADATA_COMPLETE: ("campaign",),
    Predicate.EVALUATED: ("campaign",),
}
"""What each predicate is about, and nothing else: a subject that nothing checks would be read as checked."""

_PREDICATES: dict[Predicate, Callable[[OpenBundle, Steps], None]] = {
    Predicate.INCLUDED: included,
    Predicate.CONSISTENT: consistent,
    Predicate.POLICY_IN_FORCE: policy_in_force,
    Predicate.SOURCE_HONORED: source_honored,
    Predicate.SOURCE_UNUSED: source_unused,
    Predicate.REVOCATION_EXPOSURE: revocation_exposure,
    Predicate.REFUSALS_COMPLETE: refusals_complete,
    Predicate.EVIDENCE: evidence,
    Predicate.ACCUMULATORS: accumulators,
    Predicate.METADATA_COMPLETE: metadata_complete,
    Predicate.EVALUATED: evaluated,
}


def predicate_named(name: str) -> Predicate:
    """The predicate of that name.

    Raises:
        Rejected: ``UNKNOWN_PREDICATE``.
    """
    try:
        return Predicate(name)
    except ValueError as error:
        known = ", ".join(predicate.value for predicate in Predicate)
        raise Rejected(Reason.UNKNOWN_PREDICATE, f"no predicate is called {name!a}; known are {known}") from error


def verify(bundle: OpenBundle, predicate: Predicate, files: Sequence[ReleasedFile] = ()) -> Verdict:
    """The answer to ``predicate``, which must be the one the bundle was made for.

    ``files`` are the weights that ``delta-exact`` compares with the release; other predicates use none.

    Raises:
        Rejected: ``UNKNOWN_PREDICATE`` for a bundle of another predicate; ``BAD_FIELD`` for one that names
            other subjects than the predicate's; ``BUNDLE_INCOMPLETE``; ``NOT_FOUND`` when what it
            is about is not on the log.
    """
    if bundle.predicate != predicate.value:
        raise Rejected(
            Reason.UNKNOWN_PREDICATE, f"the bundle was made for {bundle.predicate!a}, not for '{predicate.value}'"
        )
    for name, subject in (("campaign", bundle.campaign), ("source", bundle.source), ("event", bundle.event)):
        if len(subject) != (DIGEST_BYTES if name in SUBJECTS[predicate] else 0):
            raise Rejected(
                Reason.BAD_FIELD,
                f"'{predicate.value}' is about {' and '.join(SUBJECTS[predicate]) or 'the log alone'}, "
                f"the {name} in the bundle has {len(subject)} bytes",
            )
    steps = Steps()
    _opened(bundle, steps)
    if predicate is Predicate.DELTA_EXACT:
        delta_exact(bundle, steps, files)
    else:
        _PREDICATES[predicate](bundle, steps)
    return steps.verdict(predicate.value, bundle.header)


def _opened(bundle: OpenBundle, steps: Steps) -> None:
    """What ``open_bundle`` has checked already."""
    trusted = bundle.trusted
    members = trusted.of(bundle.header.epoch).committee
    quorums = ", ".join(f"{members.threshold(role)} {role.value}" for role in VOTING_ROLES)
    steps.checked(f"the genesis is that of the pinned chain {trusted.chain_id.hex()}")
    if members.epoch:
        changes = "one change" if members.epoch == 1 else f"{members.epoch} changes"
        steps.checked(f"from it to epoch {members.epoch}: {changes} of members, each certified by the members before")
    steps.checked(
        f"ledger block {bundle.header.height} ({bundle.header.digest.hex()}) is certified by a quorum of every role "
        f"({quorums})"
    )
    if bundle.pin is not None:
        steps.checked(f"its log begins with the one you pinned: size {bundle.pin.log_size}")
    elif members.epoch:
        steps.not_covered("whether retired keys wrote another history than the one others see: no checkpoint was given")
    if bundle.events:
        steps.checked(
            f"{len(bundle.events)} events stand in that log, with valid signatures of the author or its job key, "
            "and of governance where a policy or grant needs them"
        )
    proved = len(bundle.records) + sum(len(entries) for entries in bundle.ranges.values())
    if proved:
        steps.checked(f"{proved} records are proved in that ledger block's state")


__all__ = [
    "SUBJECTS",
    "Answer",
    "AsOf",
    "CheckedStep",
    "Predicate",
    "ReleasedFile",
    "Status",
    "Steps",
    "Verdict",
    "predicate_named",
    "verify",
]
