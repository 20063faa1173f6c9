"""The forward question: what did these sources, or one example, move?

Of the committed accumulators, per parameter block and window of steps: the norm of what the chosen sources added to
the gradients (times learning rate), and their *part* of all that was added, ``<A_chosen, A_all> / <A_all, A_all>``.
Parts of all sources add up to one; a negative one pulled against the sum. A parameter block that others moved and these
sources have no sum in was *closed* to them: they gave it no direct update. An account of gradients, not of the weights
they became: AdamW scales both alike. One example is asked about by its sketches: then the norm is that of their rank's
part of what it added, and closed is a block of which they hold nothing but zeros (what was let through to it at any
depth leaves its largest direction in a sketch).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attribution.sketches import SketchStore, open_sketches
from attribution.weights import WindowFile, accumulators_of, total_of
from consensus.predicates.accumulators import Provenance, UsedSource
from consensus.rejection import Reason, Rejected


@dataclass(frozen=True, slots=True)
class Motion:
    """What was added to the gradients, by the chosen sources: norm, and part of what all added.

    ``part`` is None, and the norm says nothing, where no sums are kept: of embeddings, norms, convolutions.
    """

    norm: float
    part: float | None


@dataclass(frozen=True, slots=True)
class ExampleUse:
    """Which example of the source, by sketches of which rank, the steps it was admitted to; and what is not known.

    ``left_out`` says which windows' sketches are missing or not those committed to, and why.
    """

    example: int
    rank: int
    steps: tuple[int, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Footprint:
    """``blocks`` by name in the campaign's order, ``windows`` by first and last step; ``whole`` over both.

    ``closed`` are blocks that others moved in these windows, and none of the sources, or the example, directly; not
    told of an example whose sketches are in part left out, nor of a block in which nothing but biases moved: they
    have no sketches.
    ``of_example``: it is one example's, not the sources'.
    """

    sources: tuple[UsedSource, ...]
    blocks: dict[str, Motion]
    windows: dict[tuple[int, int], Motion]
    whole: Motion
    closed: tuple[str, ...] = ()
    of_example: ExampleUse | None = None

    @property
    def admitted(self) -> int:
        """Examples admitted in steps that stand; of one example, in how many it was."""
        if self.of_example is not None:
            return len(self.of_example.steps)
        return sum(source.admitted for source in self.sources)


@dataclass(slots=True)
class _Products:
    """Sums of squares and products over tensors."""

    own: float = 0.0
    cross: float = 0.0
    all: float = 0.0

    def add(self, chosen: Tensor | None, everything: Tensor) -> None:
        self.all += float((everything * everything).sum())
        if chosen is not None:
            self.own += float((chosen * chosen).sum())
            self.cross += float((chosen * everything).sum())

    @property
    def motion(self) -> Motion:
        return Motion(self.own**0.5, self.cross / self.all if self.all > 0 else None)


def chosen_sources(
    provenance: Provenance, names: Collection[str], owners: Collection[str], classes: Collection[str], revoked: bool
) -> tuple[UsedSource, ...]:
    """The campaign's sources that any of the criteria names: event id or name, owner, content class, revocation.

    Raises:
        Rejected: ``UNKNOWN_SOURCE`` for a criterion that none meets.
    """
    found: dict[bytes, UsedSource] = {}

    def choose(what: str, meets: Callable[[UsedSource], bool]) -> None:
        met = {source.id: source for source in provenance.sources if meets(source)}
        if not met:
            raise Rejected(Reason.UNKNOWN_SOURCE, f"no source of the campaign {what}")
        found.update(met)

    for name in names:
        choose(
            f"has the name or id {name!a:.80}",
            lambda source, name=name: name in (source.id.hex(), source.record.claim.name),  # type: ignore[misc]
        )
    for owner in owners:
        choose(f"is owned by {owner!a:.80}", lambda source, owner=owner: source.owner == owner)  # type: ignore[misc]
    for content_class in classes:
        choose(
            f"is of class {content_class!a:.80}",
            lambda source, wanted=content_class: source.record.claim.content_class == wanted,  # type: ignore[misc]
        )
    if revoked:
        choose("is revoked", lambda source: bool(source.record.revocation))
    return tuple(sorted(found.values(), key=lambda source: source.event.index))


def footprint(provenance: Provenance, files: Sequence[WindowFile], sources: tuple[UsedSource, ...]) -> Footprint:
    """What ``sources`` moved, over the windows that are here.

    Raises:
        Rejected: ``BAD_FIELD`` for accumulators of a tensor in no parameter block; as ``accumulators_of``.
    """
    ids = {source.id for source in sources}
    account = _Account(provenance)
    for file in files:
        chosen_here: dict[str, Tensor] = {}
        all_here: dict[str, Tensor] = {}
        for entry, sums in accumulators_of(file):
            for name, part in sums.items():
                _add(all_here, name, part)
                if entry.source in ids:
                    _add(chosen_here, name, part)
        account.add(file, chosen_here, all_here)
    return account.footprint(sources)


def example_footprint(
    provenance: Provenance, files: Sequence[WindowFile], source: UsedSource, example: int, store: SketchStore
) -> Footprint:
    """What one example of ``source`` moved, by its sketches, over the windows that are here.

    Raises:
        Rejected: ``BAD_FIELD`` for accumulators of a tensor in no parameter block, or an example that the source does
            not have; ``NOT_FOUND`` for a campaign that keeps no sketches; as ``read_blob``.
    """
    claim = source.record.claim
    if example >= claim.example_count:
        raise Rejected(
            Reason.BAD_FIELD,
            f"{claim.name!a:.80} has {claim.example_count} examples, from 0: there is no example {example}",
        )
    if not provenance.campaign.sketch_rank:
        raise Rejected(Reason.NOT_FOUND, "the campaign keeps no sketches: what single examples moved is not on the log")
    tensors = [tensor for block in provenance.campaign.parameter_blocks for tensor in block.tensors]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    account = _Account(provenance)
    steps: list[int] = []
    left_out: list[str] = []
    rank = 0
    for file in files:
        added: dict[str, Tensor] = {}
        for entry in file.listed.of_sources:
            if entry.source != source.id:
                continue
            try:
                held = open_sketches(store, file, entry).check(file, entry, shapes)
                gradients = {name: one_1PQ[0] for name, one_1PQ in held.gradients_of([example])}
            except Rejected as error:
                left_out.append(f"steps {file.window.first} to {file.window.last}: {error}")
                continue
            rank = max(rank, held.rank)
            steps += [step for step, of in held.visits.tolist() if of == example]
            for name, part in gradients.items():
                if name not in shapes:
                    raise Rejected(Reason.BAD_FIELD, f"sketches of {name!a} are in no parameter block")
                rows, columns = shapes[name]
                _add(added, name, part[:rows, :columns])
        account.add(file, added, total_of(file))
    return account.footprint((source,), ExampleUse(example, rank, tuple(sorted(steps)), tuple(left_out)))


class _Account:
    """Sums over windows: of what is asked about, and of everything."""

    def __init__(self, provenance: Provenance) -> None:
        self._blocks = provenance.campaign.parameter_blocks
        self._block_of = {tensor.name: block.name for block in self._blocks for tensor in block.tensors}
        self._chosen: dict[str, Tensor] = {}
        self._everything: dict[str, Tensor] = {}
        self._windows: dict[tuple[int, int], Motion] = {}

    def add(self, file: WindowFile, chosen: Mapping[str, Tensor], everything: Mapping[str, Tensor]) -> None:
        """One window."""
        products = _Products()
        for name, part in everything.items():
            if name not in self._block_of:
                raise Rejected(Reason.BAD_FIELD, f"accumulators of {name!a} are in no parameter block")
            products.add(chosen.get(name), part)
            _add(self._everything, name, part)
            if name in chosen:
                _add(self._chosen, name, chosen[name])
        self._windows[file.window.first, file.window.last] = products.motion

    def footprint(self, sources: tuple[UsedSource, ...], of_example: ExampleUse | None = None) -> Footprint:
        """Over all windows."""
        blocks = {block.name: _Products() for block in self._blocks}
        whole = _Products()
        for name, part in self._everything.items():
            blocks[self._block_of[name]].add(self._chosen.get(name), part)
            whole.add(self._chosen.get(name), part)
        motions = {name: held.motion for name, held in blocks.items()}
        # Of a bias, which has no sketch, an example's silence says nothing.
        moved = {
            self._block_of[name] for name, part in self._everything.items() if of_example is None or part.dim() > 1
        }
        own = {self._block_of[name] for name, part in self._chosen.items() if of_example is None or bool(part.any())}
        is_told = of_example is None or not of_example.left_out
        closed = tuple(name for name in blocks if name in moved - own) if is_told else ()
        return Footprint(sources, motions, self._windows, whole.motion, closed, of_example)


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name] + part if name in sums else part
