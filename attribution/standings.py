"""In which of the outputs asked about chosen sources stand out: what a revocation reaches of what a model says.

A source stands out where the fine-tune made the output likelier and the source is as far above its controls as one that
leads an answer must be. Of a source that does not, nothing is claimed: an influence too weak to tell is no absence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from attribution.receipts import shown
from attribution.report import Answer
from attribution.trace import SHAPED_Z
from consensus.predicates.accumulators import UsedSource


@dataclass(frozen=True, slots=True)
class Standing:
    """A source in an answer: ``number`` and ``place`` count from 1, the highest ``z`` first."""

    number: int
    asked: str
    source: UsedSource
    place: int
    z: float
    stands_out: bool


def standings(answers: Sequence[Answer], chosen: Sequence[UsedSource]) -> tuple[Standing, ...]:
    """Every chosen source in every answer, where it stands highest first."""
    wanted = {source.id for source in chosen}
    found = [
        Standing(
            number,
            answer.asked,
            row.source,
            place,
            row.z,
            answer.trace.made_likelier and row.z >= SHAPED_Z,
        )
        for number, answer in enumerate(answers, start=1)
        for place, row in enumerate(answer.trace.ranked, start=1)
        if row.source.id in wanted
    ]
    return tuple(sorted(found, key=lambda standing: (not standing.stands_out, -standing.z)))


def standings_text(found: Sequence[Standing], outputs: int) -> str:
    """Lines for a terminal: only where a source stands out."""
    high = [standing for standing in found if standing.stands_out]
    lines = [standings_line(found, outputs)]
    if high:
        lines += ["", f"{'output':>6}  {'place':>5}  {'z':>7}  {'source':28}  asked"]
    lines += [
        f"{standing.number:>6}  {standing.place:>5}  {standing.z:>7.1f}  "
        f"{shown(standing.source.record.claim.name)[:28]:28}  {shown(standing.asked)}"
        + ("  revoked" if standing.source.record.revocation else "")
        for standing in high
    ]
    return "\n".join(lines)


def standings_line(found: Sequence[Standing], outputs: int) -> str:
    """In how many outputs any of them stands out."""
    return (
        f"they stand out in {len({standing.number for standing in found if standing.stands_out})} of {outputs} outputs"
    )


def standings_fields(found: Sequence[Standing], outputs: int) -> dict[str, object]:
    """As JSON values: every source in every output."""
    return {
        "outputs": outputs,
        "standings": [
            {
                "output": standing.number,
                "asked": standing.asked,
                "source": standing.source.id.hex(),
                "name": standing.source.record.claim.name,
                "revoked": bool(standing.source.record.revocation),
                "place": standing.place,
                "z": round(standing.z, 3),
                "stands_out": standing.stands_out,
            }
            for standing in found
        ],
    }
