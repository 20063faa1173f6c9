"""An answer as people read it and as programs do. Every row carries what proves it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attribution.examples import SourceExamples
from attribution.factors import FactorsOrigin
from attribution.footprint import Footprint, Motion
from attribution.log import CampaignLog
from attribution.receipts import receipt_fields, shown
from attribution.trace import SourceScore, Trace
from attribution.weights import Search
from consensus.predicates.accumulators import Provenance, UsedSource
from consensus.predicates.reviews import replayed_steps

ROWS_SHOWN = 10
EXAMPLES_SHOWN = 5
BLOCKS_SHOWN = 6
FACTORS_SHOWN = {
    FactorsOrigin.COMMITTED: "the campaign's own",
    FactorsOrigin.GIVEN: "the asker's choice, since the campaign commits to none",
    FactorsOrigin.FITTED: "fitted now on the released weights, since the campaign commits to none",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, what models say to its prompt and how likely they find the output, and the trace.

    Models are ``base``, ``tuned`` and, where a replay left a source out, ``without``; ``log_chances`` are means per
    token. ``untraced`` are tensors that the trace does not speak of; ``index`` is the one that sketches came from.
    """

    asked: str
    prompt: str
    says: Mapping[str, str]
    log_chances: Mapping[str, float]
    trace: Trace
    search: Search
    untraced: tuple[str, ...]
    factors: FactorsOrigin
    index: Path | None = None


def trace_text(log: CampaignLog, answer: Answer) -> str:
    """Lines for a terminal; names from the log are shown with control characters spelled out."""
    campaign, trace = log.provenance.campaign, answer.trace
    lines = [
        f"campaign {log.bundle.campaign.hex()} of {log.provenance.operator}: {shown(campaign.name)}",
        f"asked    {shown(answer.asked)}",
        *(f"{name:8} says {shown(said)}" for name, said in answer.says.items()),
        f"chance   {percent(trace.base_log_chance)} a token in the base model, "
        f"{percent(trace.tuned_log_chance)} in the tuned one"
        + (f", {percent(answer.log_chances['without'])} without" if "without" in answer.says else ""),
        "",
    ]
    lines.append(verdict_of(trace))
    lines += ["", f"{'z':>7}  {'score':>11}  {'source':28}  {'owner':14}  {'admitted':>8}  entry"]
    for row in trace.ranked[:ROWS_SHOWN]:
        source = row.source
        revoked = "  revoked" if source.record.revocation else ""
        lines.append(
            f"{row.z:>7.1f}  {row.score:>11.4g}  {shown(source.record.claim.name)[:28]:28}  {source.owner[:14]:14}  "
            f"{source.admitted:>8}  {source.event.index}{revoked}"
        )
    if trace.ranked and trace.shaped_here:
        lines += ["", *_receipt(trace.ranked[0])]
    for found in trace.examples:
        lines += ["", *_examples(log, found)]
    lines += ["", "what this rests on", *assurance(log, answer)]
    return "\n".join(lines)


def verdict_of(trace: Trace) -> str:
    """The answer in a sentence."""
    if trace.shaped_here:
        return "shaped here: the sources below made this output likelier, the leading one first"
    if trace.made_likelier:
        return "not told: this fine-tune made the output likelier, but no source stands out from the controls"
    return "not shaped here: this fine-tune did not make the output likelier"


def trace_json(log: CampaignLog, answer: Answer, indent: int | None) -> str:
    """One JSON document; on one line without ``indent``."""
    trace, search = answer.trace, answer.search
    document = {
        "chain_id": log.bundle.trusted.chain_id.hex(),
        "campaign": log.bundle.campaign.hex(),
        "operator": log.provenance.operator,
        "asked": answer.asked,
        "prompt": answer.prompt,
        "says": dict(answer.says),
        "made_likelier": trace.made_likelier,
        "shaped_here": trace.shaped_here,
        "log_chance": dict(answer.log_chances),
        "controls": trace.controls,
        "factors": answer.factors,
        "index": None if answer.index is None else str(answer.index),
        "sources": [_row(row) for row in trace.ranked],
        "examples": [_examples_fields(found) for found in trace.examples],
        "windows": {
            "used": list(trace.windows),
            "missing": [{"last_step": held.window.last, "why": held.why} for held in search.missing],
            "uncovered_steps": log.provenance.uncovered,
        },
        "base_provenance": log.provenance.campaign.base_provenance.hex(),
        "assurance": "replay-checked" if replayed_steps(log.provenance.audits) else "conservation-checked",
        "replays": {
            "steps": log.provenance.steps,
            "replayed": replayed_steps(log.provenance.audits),
            "by": sorted({audit.auditor for audit in log.provenance.audits if audit.record.matched}),
            "differing": [
                {"by": audit.auditor, "step": audit.differing_step}
                for audit in log.provenance.audits
                if audit.differing_step is not None
            ],
        },
        "untraced_tensors": list(answer.untraced),
        "as_of": {
            "height": log.verdict.as_of.height,
            "log_size": log.verdict.as_of.log_size,
            "timestamp_ms": log.verdict.as_of.timestamp_ms,
        },
    }
    return json.dumps(document, indent=indent)


def footprint_text(log: CampaignLog, found: Footprint, search: Search) -> str:
    """Lines for a terminal."""
    provenance, as_of = log.provenance, log.verdict.as_of
    lines = [f"campaign {log.bundle.campaign.hex()} of {provenance.operator}: {shown(provenance.campaign.name)}"]
    for source in found.sources:
        lines += ["", f"{shown(source.record.claim.name)} of {source.owner}", *_receipt_lines(source)]
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
        "  part      of the gradient of all sources together, along it; embeddings and norms are not in it",
    ]
    lines += _gaps(log, search)
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


def _receipt_lines(source: UsedSource) -> list[str]:
    return [f"  {name:9} {shown(value)}" for name, value in receipt_fields(source)]


def _receipt(row: SourceScore) -> list[str]:
    blocks = sorted(row.by_block.items(), key=lambda pair: -abs(pair[1]))
    return [
        shown(row.source.record.claim.name),
        *_receipt_lines(row.source),
        f"  moved     {', '.join(f'{shown(block)} {part:+.3g}' for block, part in blocks[:BLOCKS_SHOWN])}",
        *_closed(row),
    ]


def _closed(row: SourceScore) -> list[str]:
    if not row.closed:
        return []
    more = len(row.closed) - BLOCKS_SHOWN
    names = ", ".join(shown(block) for block in row.closed[:BLOCKS_SHOWN])
    return [f"  closed    no direct update of {names}" + (f" and {more} more" if more > 0 else "")]


def _examples(log: CampaignLog, found: SourceExamples) -> list[str]:
    """The leading examples of a source."""
    (source,) = (each for each in log.provenance.sources if each.id == found.source)
    lines = [
        f"examples of {shown(source.record.claim.name)}, by {found.opened} sketches of rank {found.rank}; "
        f"together they make {100 * found.covered:.0f} % of the source's score",
        f"{'score':>11}  {'example':>8}  steps",
    ]
    for row in found.ranked[:EXAMPLES_SHOWN]:
        steps = ", ".join(str(step) for step in row.steps)
        lines.append(f"{row.score:>11.4g}  {row.example:>8}  {steps}")
    if found.examples > EXAMPLES_SHOWN:
        lines.append(f"{'':>11}  {'':>8}  and {found.examples - EXAMPLES_SHOWN} examples more")
    lines += [f"  left out  {shown(why)}" for why in found.left_out]
    if found.unopened:
        lines.append(f"  not opened  {unopened(found)}")
    return lines


def unopened(found: SourceExamples) -> str:
    """What the allowance did not reach."""
    windows = len(found.unopened)
    return (
        f"{windows} {'window' if windows == 1 else 'windows'} with {found.unopened_visits} of "
        f"{found.visits + found.unopened_visits} visits, where its score is lowest: an answer may open no more "
        "(--open-at-most)"
    )


def _examples_fields(found: SourceExamples) -> dict[str, object]:
    return {
        "source": found.source.hex(),
        "rank": found.rank,
        "opened": found.opened,
        "visits": found.visits,
        "examples": found.examples,
        "covered": found.covered,
        "left_out": list(found.left_out),
        "unopened": {
            "visits": found.unopened_visits,
            "windows": [{"first_step": first, "last_step": last} for first, last in found.unopened],
        },
        "ranked": [
            {
                "example": row.example,
                "score": row.score,
                "by_window": {str(last): part for last, part in sorted(row.by_window.items())},
                "steps": list(row.steps),
            }
            for row in found.ranked
        ],
    }


def _gaps(log: CampaignLog, search: Search) -> list[str]:
    """Steps that an answer does not rest on."""
    lines = [
        f"  left out  steps {held.window.first} to {held.window.last}: {shown(held.why)}" for held in search.missing
    ]
    if log.provenance.uncovered:
        lines.append(f"  missing   the last {log.provenance.uncovered} steps: no window holds them")
    return lines


def assurance(log: CampaignLog, answer: Answer) -> list[str]:
    """What an answer rests on, a line each."""
    provenance, as_of = log.provenance, log.verdict.as_of
    trace, search, untraced = answer.trace, answer.search, answer.untraced
    lines = [
        f"  checked   sources, grants, policies and counts, in the log of ledger block {as_of.height} "
        f"({as_of.log_size} entries)",
        f"  checked   {len(trace.windows)} of {len(provenance.windows)} windows of accumulators have the root that is "
        "on the log",
        "  checked   in each of them the sources' sums add up to the whole gradient that is committed beside them",
        f"  claimed   by {provenance.operator}: that these are the gradients",
        *replays(provenance),
        f"  measured  against {trace.controls} control outputs; z counts their deviations",
        f"  weighed   by Kronecker factors: {FACTORS_SHOWN[answer.factors]}",
    ]
    if "without" in answer.says:
        lines.append("  replayed  what came out without a source, by whoever made that file: it is not on the log")
    origin = provenance.campaign.base_provenance
    if origin:
        lines.append(
            "  not asked what shaped the base model before: it has a log of its own, "
            f"where event {origin.hex()} released it; ask there, with this base as the tuned model"
        )
    lines += _gaps(log, search)
    if answer.index is not None and trace.examples:
        lines.append(
            f"  checked   sketches, opened from the index {shown(str(answer.index))}: their SHA-256 are on the log"
        )
    if not provenance.campaign.sketch_rank:
        lines.append("  not asked single examples: this campaign keeps no sketches of their gradients")
    if untraced:
        lines.append(
            f"  not asked {len(untraced)} tensors ({shown(untraced[0])} first): no answer speaks of embeddings, norms "
            "and biases"
        )
    lines.append("  a parameter block that a policy closes gets no direct update; that is not the same as no influence")
    return lines


def replays(provenance: Provenance) -> list[str]:
    """Who took how many of the steps again."""
    matching = [audit for audit in provenance.audits if audit.record.matched]
    if not provenance.audits:
        return [f"  replayed  0 of {provenance.steps} steps by anybody else"]
    names = ", ".join(sorted({audit.auditor for audit in matching}))
    lines = []
    if matching:
        lines.append(
            f"  replayed  {replayed_steps(matching)} of {provenance.steps} steps by {names}, who say that parameters, "
            "gradients' sums and optimizer came out as recorded"
        )
    lines += [
        f"  replayed  by {audit.auditor}: step {audit.differing_step} did NOT come out as recorded"
        for audit in provenance.audits
        if audit.differing_step is not None
    ]
    return lines


def _row(row: SourceScore) -> dict[str, object]:
    source = row.source
    return {
        "source": source.id.hex(),
        "name": source.record.claim.name,
        "owner": source.owner,
        "z": row.z,
        "score": row.score,
        "admitted": source.admitted,
        "by_block": dict(row.by_block),
        "no_direct_update": list(row.closed),
        "by_window": {str(step): part for step, part in row.by_window.items()},
        "by_policy": {policy.hex(): part for policy, part in row.by_policy.items()},
        "receipt": {
            "entry": source.event.index,
            "grants": [grant.hex() for grant in source.grants],
            "policies": list(source.policies),
            "revocation": source.record.revocation.hex(),
        },
    }


def _motion(what: str, motion: Motion, width: int) -> str:
    part = "–" if motion.part is None else f"{100 * motion.part:.1f} %"
    return f"{what:{width}}  {motion.norm:>10.4g}  {part:>8}"


def _motion_fields(motion: Motion) -> dict[str, float | None]:
    return {"norm": motion.norm, "part": motion.part}


def percent(log_chance: float) -> str:
    """A chance in percent."""
    return f"{100 * math.exp(log_chance):.2f} %"
