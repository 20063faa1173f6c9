"""An answer as people read it and as programs do. Every row carries what proves it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attribution.examples import JUDGED_EXAMPLES, SourceExamples
from attribution.factors import FactorsOrigin, FactorsUsed
from attribution.log import CampaignLog
from attribution.receipts import receipt_fields, shown
from attribution.trace import SourceScore, Trace
from attribution.weights import Search
from consensus.predicates.accumulators import Provenance, UsedSource
from consensus.predicates.reviews import replayed_steps

ROWS_SHOWN = 10
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
    ``read`` is how text was made tokens.
    ``of_base`` is there where the base model's own campaign was asked besides.
    """

    asked: str
    prompt: str
    says: Mapping[str, str]
    log_chances: Mapping[str, float]
    trace: Trace
    search: Search
    untraced: tuple[str, ...]
    factors: FactorsUsed
    index: Path | None = None
    read: str = "as bytes"
    of_base: "BaseAnswer | None" = None

    @property
    def is_shaped(self) -> bool:
        """Whether the campaign shaped the output, or the one before it that was asked as well."""
        return self.trace.shaped_here or (self.of_base is not None and self.of_base.answer.is_shaped)


@dataclass(frozen=True, slots=True)
class BaseAnswer:
    """The same tokens asked of the campaign that released the base model; and what each of the two did for them.

    Log-odds are means per token: of the model that the base model was tuned from, the base model, the tuned one.
    """

    log: CampaignLog
    answer: Answer
    log_odds_before: float
    log_odds_base: float
    log_odds_tuned: float

    @property
    def lift_of_base(self) -> float:
        """What the base model's own campaign added."""
        return self.log_odds_base - self.log_odds_before

    @property
    def lift_here(self) -> float:
        """What the campaign after it added."""
        return self.log_odds_tuned - self.log_odds_base

    @property
    def share_of_base(self) -> float | None:
        """The part of both lifts that is the base model's campaign's; None where one of them lowered the output."""
        both = self.lift_of_base + self.lift_here
        return self.lift_of_base / both if min(self.lift_of_base, self.lift_here) >= 0 < both else None


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
    lines.append(verdict_of(answer))
    lines += ["", f"{'z':>7}  {'score':>11}  {'source':28}  {'owner':14}  {'admitted':>8}  entry"]
    for row in trace.ranked[:ROWS_SHOWN]:
        source = row.source
        revoked = "  revoked" if source.record.revocation else ""
        lines.append(
            f"{row.z:>7.1f}  {row.score:>11.4g}  {shown(source.record.claim.name)[:28]:28}  {source.owner[:14]:14}  "
            f"{source.admitted:>8}  {source.event.index}{revoked}"
        )
    if len(trace.ranked) > ROWS_SHOWN:
        lines.append(f"{'':>7}  {'':>11}  and {len(trace.ranked) - ROWS_SHOWN} sources more (--json has all)")
    if trace.ranked and trace.shaped_here:
        lines += ["", *_receipt(trace.ranked[0])]
    for found in trace.examples:
        lines += ["", *_examples(log, found)]
    lines += ["", "what this rests on", *assurance(log, answer)]
    if answer.of_base is not None:
        lines += ["", "", "what shaped the base model", *(f"log-odds {line}" for line in lifts(answer.of_base)), ""]
        lines.append(trace_text(answer.of_base.log, answer.of_base.answer))
    return "\n".join(lines)


def lifts(of_base: BaseAnswer) -> list[str]:
    """What each of two campaigns did for an output, a line each."""
    share = of_base.share_of_base
    of_both = ("", "") if share is None else (f", {100 * share:.0f} % of both", f", {100 * (1 - share):.0f} % of both")
    return [
        f"{of_base.log_odds_before:+.2f} a token in the model that the base model was tuned from",
        f"{of_base.log_odds_base:+.2f} in the base model: {of_base.lift_of_base:+.2f} by its own campaign{of_both[0]}",
        f"{of_base.log_odds_tuned:+.2f} in the tuned model: {of_base.lift_here:+.2f} by this campaign{of_both[1]}",
    ]


def verdict_of(answer: Answer) -> str:
    """The answer in a sentence."""
    trace = answer.trace
    if trace.shaped_here:
        return "shaped here: the sources below made this output likelier, the leading one first"
    if trace.made_likelier:
        return "not told: this fine-tune made the output likelier, but no source stands out from the controls"
    asked = "" if answer.of_base is None else "; what the base model's own log says stands below"
    return f"not shaped here: this fine-tune did not make the output likelier{asked}"


def trace_json(log: CampaignLog, answer: Answer, indent: int | None) -> str:
    """One JSON document; on one line without ``indent``."""
    return json.dumps(_fields(log, answer), indent=indent)


def _fields(log: CampaignLog, answer: Answer) -> dict[str, object]:
    trace, search = answer.trace, answer.search
    return {
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
        "factors": answer.factors.origin,
        "factors_root": answer.factors.root.hex() or None,
        "read": answer.read,
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
        "of_base": None if answer.of_base is None else _base_fields(answer.of_base),
    }


def _base_fields(of_base: BaseAnswer) -> dict[str, object]:
    return {
        "log_odds": {
            "before": of_base.log_odds_before,
            "base": of_base.log_odds_base,
            "tuned": of_base.log_odds_tuned,
        },
        "lift_of_base": of_base.lift_of_base,
        "lift_here": of_base.lift_here,
        "share_of_base": of_base.share_of_base,
        "answer": _fields(of_base.log, of_base.answer),
    }


def receipt_lines(source: UsedSource) -> list[str]:
    """What proves a source's part, a line each."""
    return [f"  {name:9} {shown(value)}" for name, value in receipt_fields(source)]


def _receipt(row: SourceScore) -> list[str]:
    blocks = sorted(row.by_block.items(), key=lambda pair: -abs(pair[1]))
    moved = ", ".join(f"{shown(block)} {part:+.3g}" for block, part in blocks[:BLOCKS_SHOWN])
    more = len(blocks) - BLOCKS_SHOWN
    return [
        shown(row.source.record.claim.name),
        *receipt_lines(row.source),
        f"  moved     {moved}" + (f" and {more} more" if more > 0 else ""),
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
        f"{'z':>7}  {'score':>11}  {'example':>8}  steps",
    ]
    for row in found.ranked[:JUDGED_EXAMPLES]:
        steps = ", ".join(str(step) for step in row.steps)
        z = "–" if row.z is None else f"{row.z:.1f}"
        lines.append(f"{z:>7}  {row.score:>11.4g}  {row.example:>8}  {steps}")
    if found.examples > JUDGED_EXAMPLES:
        lines.append(f"{'':>7}  {'':>11}  {'':>8}  and {found.examples - JUDGED_EXAMPLES} examples more")
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
                "z": row.z,
                "by_window": {str(last): part for last, part in sorted(row.by_window.items())},
                "steps": list(row.steps),
            }
            for row in found.ranked
        ],
    }


def gaps(log: CampaignLog, search: Search) -> list[str]:
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
    root = f" of root {answer.factors.root.hex()}" if answer.factors.root else ""
    lines = [
        f"  trusted   chain {log.bundle.trusted.chain_id.hex()}, by its genesis",
        f"  checked   sources, grants, policies and counts, in the log of ledger block {as_of.height} "
        f"({as_of.log_size} entries)",
        f"  checked   {len(trace.windows)} of {len(provenance.windows)} windows of accumulators have the root that is "
        "on the log",
        "  checked   in each of them the sources' sums add up to the whole gradient that is committed beside them",
        f"  claimed   by {provenance.operator}: that these are the gradients",
        *replays(provenance),
        f"  read      {shown(answer.read)}: the asker's choice, which is not held to the log",
        f"  measured  against {trace.controls} control outputs; z counts their deviations",
        f"  weighed   by Kronecker factors{root}: {FACTORS_SHOWN[answer.factors.origin]}",
    ]
    if "without" in answer.says:
        lines.append("  replayed  what came out without a source, by whoever made that file: it is not on the log")
    lines += _origin(provenance, answer.of_base)
    lines += gaps(log, search)
    if answer.index is not None and trace.examples:
        lines.append(
            f"  checked   sketches, opened from the index {shown(str(answer.index))}: their SHA-256 are on the log"
        )
    if not provenance.campaign.sketch_rank:
        lines.append("  not asked single examples: this campaign keeps no sketches of their gradients")
    if untraced:
        lines.append(
            f"  not asked {len(untraced)} tensors ({shown(untraced[0])} first): no answer speaks of embeddings, norms, "
            "convolutions and biases"
        )
    lines.append("  a parameter block that a policy closes gets no direct update; that is not the same as no influence")
    return lines


def _origin(provenance: Provenance, of_base: BaseAnswer | None) -> list[str]:
    """What is known of where the base model came from."""
    origin = provenance.campaign.base_provenance
    if not origin:
        return []
    if of_base is None:
        return [
            "  not asked what shaped the base model before: it has a log of its own, "
            f"where event {origin.hex()} released it; ask of this campaign with --base-ledger to follow it"
        ]
    return [
        f"  checked   the base model is what event {origin.hex()} released on chain "
        f"{of_base.log.bundle.trusted.chain_id.hex()}: root {provenance.campaign.base_root.hex()}"
    ]


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
            "momentum": "" if source.usage is None else source.usage.momentum,
        },
    }


def percent(log_chance: float) -> str:
    """A chance in percent."""
    return f"{100 * math.exp(log_chance):.2f} %"
