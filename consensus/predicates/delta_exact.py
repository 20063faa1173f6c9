"""``delta-exact``: the released file is what the recorded steps, one after the other, ended in.

From the base model's parameter root, every step starts where the last one ended, every rollback restores
the root before the step it discards, and the release names the last root. The parameter root of the file at
hand is recomputed from its tensors, and its SHA-256 compared. That a step's change *follows* from its data
is the operator's word until somebody replays it: audit results on the log say who did, and how many steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from consensus import portions as p
from consensus.bundle import OpenBundle, OpenEvent
from consensus.event import Kind
from consensus.parameters import TensorDescriptor, parameter_root
from consensus.pieces import whole_tensors
from consensus.predicates.history import complete_job_events, member_name
from consensus.predicates.reviews import audits_of, challenges_of, tell_replays
from consensus.predicates.verdict import Steps
from consensus.rejection import Rejected


@dataclass(frozen=True, slots=True)
class ReleasedFile:
    """A safetensors file as its reader found it: SHA-256 of the file, BLAKE3 of each tensor."""

    name: str
    sha256: bytes
    tensors: tuple[TensorDescriptor, ...]


@dataclass(slots=True)
class _Walk:
    """Where a walk over the campaign's parameter roots stands."""

    root: bytes
    last: bytes
    undo: bytes = b""
    steps: int = 0
    recorded: int = 0
    discarded: int = 0
    undisclosed: int = 0


def delta_exact(bundle: OpenBundle, steps: Steps, files: Sequence[ReleasedFile]) -> None:
    """Roots continuous from base to release, and the file at hand is the released one.

    Raises:
        Rejected: ``BUNDLE_INCOMPLETE``; ``BAD_FIELD`` for a parameter table whose pieces make up no tensors.
    """
    events, head = complete_job_events(bundle)
    operator = member_name(bundle, events[0].entry.author)
    steps.checked(f"the campaign of {operator} has {len(events)} events, all in the bundle")
    campaign = events[0].operation
    if not isinstance(campaign, p.Campaign):
        steps.unknown("what the campaign starts from: its operation portion is not disclosed")
        return
    walk = _Walk(campaign.base_root, events[0].id)
    problems: list[str] = []
    for event in events[1:]:
        _follow(walk, event, problems)
    if not walk.undisclosed and (walk.root, walk.steps) != (head.root, head.steps):
        problems.append(f"the campaign's head stands at {head.root.hex()} after {head.steps} steps")
    steps.check(
        f"parameter roots are continuous from {campaign.base_root.hex()} (base model {campaign.base_model!r}) over "
        f"{walk.recorded} recorded steps, {walk.discarded} of them discarded, to {walk.root.hex()}",
        problems,
        walk.undisclosed,
    )
    release = _check_release(steps, events[-1], walk, head.closed, head.release)
    if release is not None:
        _check_file(steps, campaign, release, files)
    steps.attested(f"that each step's change of the parameters follows from its examples: {operator}")
    steps.attested(f"that the base model has the parameter root the campaign names: {operator}")
    tell_replays(steps, audits_of(bundle), walk.steps, challenges_of(bundle))


def _follow(walk: _Walk, event: OpenEvent, problems: list[str]) -> None:
    where = f"event {event.entry.sequence}"
    if event.kind is Kind.STEP:
        walk.recorded += 1
        step = event.operation
        if not isinstance(step, p.StepOperation):
            walk.undisclosed += 1
            return
        if not walk.undisclosed:
            if step.root_before != walk.root:
                problems.append(f"{where} starts from {step.root_before.hex()}, expected {walk.root.hex()}")
            if (step.previous, step.index) != (walk.last, walk.steps + 1):
                problems.append(f"{where} is step {step.index} after {step.previous.hex()}, expected {walk.steps + 1}")
        walk.undo, walk.root, walk.last, walk.steps = step.root_before, step.root_after, event.id, step.index
    elif event.kind is Kind.ROLLBACK:
        rollback = event.operation
        if not isinstance(rollback, p.Rollback):
            walk.undisclosed += 1
            return
        undoes = walk.last in rollback.discarded and bool(walk.undo)
        restored, left = (walk.undo, walk.steps - 1) if undoes else (walk.root, walk.steps)
        if not walk.undisclosed and (rollback.restored_root, rollback.next_index) != (restored, left + 1):
            problems.append(f"{where} restores {rollback.restored_root.hex()}, expected {restored.hex()}")
        walk.discarded += undoes
        walk.root, walk.last, walk.undo, walk.steps = rollback.restored_root, event.id, b"", rollback.next_index - 1


def _check_release(steps: Steps, last: OpenEvent, walk: _Walk, closed: str, recorded: bytes) -> p.Release | None:
    problems = []
    if closed != "released" or last.kind is not Kind.RELEASE or last.id != recorded:
        problems.append(f"the campaign is {closed or 'open'}, nothing is released")
        steps.check("the campaign ends in a release", problems)
        return None
    release = last.operation
    if not isinstance(release, p.Release):
        steps.unknown("what was released: the release's operation portion is not disclosed")
        return None
    if not walk.undisclosed and (release.parameter_root, release.steps) != (walk.root, walk.steps):
        problems.append(f"it names {release.parameter_root.hex()} after {release.steps} steps")
    steps.check(f"the release names the root after the last of {walk.steps} steps", problems, walk.undisclosed)
    return release


def _check_file(steps: Steps, campaign: p.Campaign, release: p.Release, files: Sequence[ReleasedFile]) -> None:
    if not files:
        steps.unknown(f"whether a file is the released one: no weights given to compare with {release.file_name!r}")
        return
    # Every file given must be the released one: a good file beside another vouches for nothing but itself.
    names = ", ".join(file.name for file in files)
    steps.check(
        f"{names}: SHA-256 is {release.file_sha256.hex()}, that of the released file {release.file_name!r}",
        [f"{file.name} has {file.sha256.hex()}" for file in files if file.sha256 != release.file_sha256],
    )
    problems = []
    for file in files:
        try:
            found = parameter_root(file.tensors)
        except Rejected as error:
            problems.append(f"{file.name}: {error.detail}")
        else:
            if found != release.parameter_root:
                problems.append(f"{file.name} has {found.hex()}")
    checked = files[0]
    steps.check(
        f"parameter root recomputed from {len(checked.tensors)} tensors is the released {release.parameter_root.hex()}",
        problems,
    )
    listed = whole_tensors(tensor for block in campaign.parameter_blocks for tensor in block.tensors)
    table = {(tensor.name, tensor.dtype, tensor.shape) for tensor in listed}
    given = {(tensor.name, tensor.dtype, tensor.shape) for tensor in checked.tensors}
    problems = [f"{name!r} of the campaign's table is another in the file" for name, _, _ in sorted(table - given)]
    steps.check(f"the file holds the {len(table)} tensors of the campaign's parameter table", problems)
    unlisted = sorted({tensor.name for tensor in checked.tensors} - {tensor.name for tensor in listed})
    if unlisted:
        steps.not_covered(
            f"{len(unlisted)} more tensors of the file ({unlisted[0]!r} first) are in no parameter block of that "
            "table: no depth profile speaks of them"
        )
