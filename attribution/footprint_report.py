"""A footprint as people read it and as programs do."""

import dataclasses
import json

from attribution.footprint import Footprint, Motion
from attribution.log import CampaignLog
from attribution.receipts import shown
from attribution.report import gaps, receipt_lines
from attribution.weights import Search


def footprint_text(log: CampaignLog, found: Footprint, search: Search) -> str:
    """Lines for a terminal."""
    provenance, as_of = log.provenance, log.verdict.as_of
    lines = [f"campaign {log.bundle.campaign.hex()} of {provenance.operator}: {shown(provenance.campaign.name)}"]
    for source in found.sources:
        lines += ["", f"{shown(source.record.claim.name)} of {source.owner}", *receipt_lines(source)]
    use = found.of_example
    if use is not None:
        steps = ", ".join(str(step) for step in use.steps) or "none"
        lines += ["", f"example {use.example} of it, admitted to steps {steps}"]
    width, closed = max([32, *(len(shown(block)) for block in found.blocks)]), set(found.closed)
    lines += ["", f"{'what it moved':{width}}  {'norm':>10}  {'part':>8}"]
    lines += [_motion(f"steps {first} to {last}", motion, width) for (first, last), motion in found.windows.items()]
    lines += [
        f"{shown(block):{width}}  no direct update" if block in closed else _motion(shown(block), motion, width)
        for block, motion in found.blocks.items()
    ]
    lines += [_motion("everything", found.whole, width), ""]
    release = provenance.release
    if release is None:
        lines.append("released  nothing")
    else:
        lines.append(
            f"released  {shown(release.file_name)}, root {release.parameter_root.hex()}, after {release.steps} steps"
        )
    lines += [
        "",
        "what this rests on",
        f"  checked   sources, grants and counts, in the log of ledger block {as_of.height} ({as_of.log_size} entries)",
        f"  checked   {len(found.windows)} of {len(provenance.windows)} windows of accumulators have the root that is "
        "on the log",
        f"  claimed   by {provenance.operator}: that these are the gradients",
        *_sketched(found),
        "  part      of the gradient of all sources together, along it; not in it: embeddings, norms, convolutions",
    ]
    lines += gaps(log, search)
    return "\n".join(lines)


def _sketched(found: Footprint) -> list[str]:
    use = found.of_example
    if use is None:
        return []
    return [
        f"  by        sketches of rank {use.rank}: of what the example added, the directions that are largest",
        *(f"  left out  {shown(why)}" for why in use.left_out),
    ]


def footprint_json(log: CampaignLog, found: Footprint, search: Search) -> str:
    """One JSON document."""
    provenance, release = log.provenance, log.provenance.release
    document = {
        "chain_id": log.bundle.trusted.chain_id.hex(),
        "campaign": log.bundle.campaign.hex(),
        "operator": provenance.operator,
        "sources": [
            {
                "source": source.id.hex(),
                "name": source.record.claim.name,
                "owner": source.owner,
                "class": source.record.claim.content_class,
                "admitted": source.admitted,
                "entry": source.event.index,
                "grants": [grant.hex() for grant in source.grants],
                "policies": list(source.policies),
                "revocation": source.record.revocation.hex(),
                "momentum": "" if source.usage is None else source.usage.momentum,
            }
            for source in found.sources
        ],
        "example": None if found.of_example is None else dataclasses.asdict(found.of_example),
        "whole": _motion_fields(found.whole),
        "blocks": {block: _motion_fields(motion) for block, motion in found.blocks.items()},
        "no_direct_update": list(found.closed),
        "windows": [
            {"first_step": first, "last_step": last, **_motion_fields(motion)}
            for (first, last), motion in found.windows.items()
        ],
        "missing": [{"last_step": held.window.last, "why": held.why} for held in search.missing],
        "uncovered_steps": provenance.uncovered,
        "release": None if release is None else {"file": release.file_name, "root": release.parameter_root.hex()},
    }
    return json.dumps(document, indent=2)


def _motion(what: str, motion: Motion, width: int) -> str:
    if motion.part is None:
        return f"{what:{width}}  {'–':>10}  {'–':>8}"
    return f"{what:{width}}  {motion.norm:>10.4g}  {f'{100 * motion.part:.1f} %':>8}"


def _motion_fields(motion: Motion) -> dict[str, float | None]:
    return {"norm": None if motion.part is None else motion.norm, "part": motion.part}
