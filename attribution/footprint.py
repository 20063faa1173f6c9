"""The forward question: what did these sources move?

Of the committed accumulators, per parameter block and window of steps: the norm of what the chosen sources added to
the gradients (times learning rate), and their *part* of all that was added, ``<A_chosen, A_all> / <A_all, A_all>``.
Parts of all sources add up to one; a negative one pulled against the sum. An account of gradients, not of the weights
they became: AdamW scales both alike.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from attribution.weights import WindowFile, accumulators_of
from consensus.predicates.accumulators import Provenance, UsedSource
from consensus.rejection import Reason, Rejected


@dataclass(frozen=True, slots=True)
class Motion:
    """What was added to the gradients, by the chosen sources: norm, and part of what all added (None where nothing)."""

    norm: float
    part: float | None


@dataclass(frozen=True, slots=True)
class Footprint:
    """``blocks`` by name in the campaign's order, ``windows`` by first and last step; ``whole`` over both."""

    sources: tuple[UsedSource, ...]
    blocks: dict[str, Motion]
    windows: dict[tuple[int, int], Motion]
    whole: Motion

    @property
    def admitted(self) -> int:
        """Examples admitted in steps that stand."""
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
    block_of = {tensor.name: block.name for block in provenance.campaign.parameter_blocks for tensor in block.tensors}
    ids = {source.id for source in sources}
    chosen: dict[str, Tensor] = {}
    everything: dict[str, Tensor] = {}
    windows: dict[tuple[int, int], Motion] = {}
    for file in files:
        chosen_here: dict[str, Tensor] = {}
        all_here: dict[str, Tensor] = {}
        for entry, sums in accumulators_of(file):
            for name, part in sums.items():
                if name not in block_of:
                    raise Rejected(Reason.BAD_FIELD, f"accumulators of {name!a} are in no parameter block")
                _add(all_here, name, part)
                if entry.source in ids:
                    _add(chosen_here, name, part)
        window = _Products()
        for name, part in all_here.items():
            window.add(chosen_here.get(name), part)
            _add(everything, name, part)
            if name in chosen_here:
                _add(chosen, name, chosen_here[name])
        windows[file.window.first, file.window.last] = window.motion
    blocks = {block.name: _Products() for block in provenance.campaign.parameter_blocks}
    whole = _Products()
    for name, part in everything.items():
        blocks[block_of[name]].add(chosen.get(name), part)
        whole.add(chosen.get(name), part)
    return Footprint(sources, {name: held.motion for name, held in blocks.items()}, windows, whole.motion)


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    sums[name] = sums[name] + part if name in sums else part
