"""An answer as a page: ranked sources, where in the model and when in the run, and the receipt behind each row.

Self-contained: no script, nothing fetched. Everything that is not this file's own wording is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from attribution.examples import JUDGED_EXAMPLES, SourceExamples
from attribution.log import CampaignLog
from attribution.receipts import receipt_fields, shown
from attribution.report import Answer, BaseAnswer, assurance, lifts, percent, unopened, verdict_of
from attribution.standings import Standing, standings_line
from attribution.trace import SourceScore
from consensus.predicates.accumulators import UsedSource

TEMPLATE = Path(__file__).with_name("page.html")
STRONGEST_PERCENT = 70
"""How much colour the strongest cell has."""


def page(log: CampaignLog, answers: Sequence[Answer], standing: Sequence[Standing] = ()) -> str:
    """The whole page: where chosen sources stand, if any were chosen, and an answer after the other."""
    as_of = log.verdict.as_of
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        campaign=log.bundle.campaign.hex(),
        operator=_text(log.provenance.operator),
        name=_text(log.provenance.campaign.name),
        height=as_of.height,
        log_size=as_of.log_size,
        chain_id=log.bundle.trusted.chain_id.hex(),
        standings=_standings(standing, len(answers)) if standing else "",
        answers="".join(_answer(log, answer) for answer in answers),
    )


def _standings(found: Sequence[Standing], outputs: int) -> str:
    """The outputs in which chosen sources stand out."""
    high = [standing for standing in found if standing.stands_out]
    rows = "".join(
        f"<tr><td class='number'>{standing.number}</td><td class='number'>{standing.place}</td>"
        f"<td class='number'><b>{standing.z:.1f}</b></td><td><b>{_text(standing.source.record.claim.name)}</b>"
        f"{_revoked(standing.source)}</td><td class='said'>{_text(standing.asked)}</td></tr>"
        for standing in high
    )
    head = (
        "<tr><th class='number'>output</th><th class='number'>place</th><th class='number'>z</th><th>source</th>"
        "<th>asked</th></tr>"
    )
    table = f"<div class='card'><table>{head}{rows}</table></div>" if high else ""
    return f"<h2>The sources asked about</h2><p class='verdict'>{escape(standings_line(found, outputs))}</p>{table}"


def _answer(log: CampaignLog, answer: Answer) -> str:
    trace = answer.trace
    windows = {window.last: f"{window.first}–{window.last}" for window in log.provenance.windows}
    blocks = [block.name for block in log.provenance.campaign.parameter_blocks]
    said = "".join(
        f"<tr><td>{escape(name)}</td><td class='said'>{_text(text)}</td>"
        f"<td class='number'>{percent(answer.log_chances[name])}</td></tr>"
        for name, text in answer.says.items()
    )
    kind = "verdict shaped" if trace.shaped_here else "verdict"
    parts = [
        f"<h2 class='said'>{_text(answer.asked)}</h2>",
        f"<p class='{kind}'>{escape(verdict_of(answer))}</p>",
        "<div class='card'><table><tr><th>model</th><th>says</th><th class='number'>chance of a token</th></tr>"
        f"{said}</table></div>",
        f"<h3>Sources, the leading one first</h3><div class='card'>{_ranking(trace.ranked)}</div>",
        *(_examples(log, found) for found in trace.examples),
        "<h3>In which part of the model</h3>",
        _heat(trace.ranked, {block: block for block in blocks if _moved(trace.ranked, block)}, "by_block"),
        "<h3>In which steps</h3>",
        _heat(trace.ranked, {last: windows[last] for last in trace.windows}, "by_window"),
        f"<h3>Receipts</h3><div class='card'>{''.join(_receipt(row) for row in trace.ranked)}</div>",
        "<h3>What this rests on</h3>",
        f"<ul>{''.join(f'<li>{escape(line.strip())}</li>' for line in assurance(log, answer))}</ul>",
    ]
    if answer.of_base is not None:
        parts.append(_of_base(answer.of_base))
    return "\n".join(parts)


def _of_base(of_base: BaseAnswer) -> str:
    """What the base model's own campaign answers, as an answer of its own."""
    as_of, provenance = of_base.log.verdict.as_of, of_base.log.provenance
    rows = "".join(f"<li>{escape(line)}</li>" for line in lifts(of_base))
    return (
        "<h2>What shaped the base model</h2>"
        f"<p class='quiet'>Campaign <span class='hex'>{of_base.log.bundle.campaign.hex()}</span> of "
        f"{_text(provenance.operator)}: {_text(provenance.campaign.name)}. Asked of the log of ledger block "
        f"{as_of.height}, {as_of.log_size} entries, chain "
        f"<span class='hex'>{of_base.log.bundle.trusted.chain_id.hex()}</span>.</p>"
        f"<h3>Log-odds of the output</h3><ul>{rows}</ul>{_answer(of_base.log, of_base.answer)}"
    )


def _moved(ranked: Sequence[SourceScore], block: str) -> bool:
    return any(block in row.by_block for row in ranked)


def _ranking(ranked: Sequence[SourceScore]) -> str:
    most = max((row.z for row in ranked), default=0.0)
    rows = []
    for row in ranked:
        width = _percent_of(row.z, most)
        source = row.source
        rows.append(
            f"<tr><td class='number'><b>{row.z:.1f}</b></td>"
            f"<td><span class='bar'><i style='width:{width:.0f}%'></i></span></td>"
            f"<td><b>{_text(source.record.claim.name)}</b>{_revoked(source)}<br><small>{_text(source.owner)}</small></td>"
            f"<td class='number'>{row.score:.4g}</td><td class='number'>{source.admitted}</td>"
            f"<td class='number'>{source.event.index}</td></tr>"
        )
    return (
        "<table><tr><th class='number'>z</th><th></th><th>source</th><th class='number'>score</th>"
        f"<th class='number'>admitted</th><th class='number'>entry</th></tr>{''.join(rows)}</table>"
    )


def _revoked(source: UsedSource) -> str:
    return " <span class='chip'>revoked</span>" if source.record.revocation else ""


def _examples(log: CampaignLog, found: SourceExamples) -> str:
    (source,) = (each for each in log.provenance.sources if each.id == found.source)
    most = max((row.score for row in found.ranked), default=0.0)
    rows = "".join(
        f"<tr><td class='number'><b>{row.example}</b></td>"
        f"<td><span class='bar'><i style='width:{_percent_of(row.score, most):.0f}%'></i></span></td>"
        f"<td class='number'>{'–' if row.z is None else f'{row.z:.1f}'}</td>"
        f"<td class='number'>{row.score:.4g}</td><td>{', '.join(map(str, row.steps))}</td></tr>"
        for row in found.ranked[:JUDGED_EXAMPLES]
    )
    notes = "".join(f"<p>left out: {_text(why)}</p>" for why in found.left_out)
    if found.unopened:
        notes += f"<p>not opened: {_text(unopened(found))}</p>"
    return (
        f"<h3>Examples of {_text(source.record.claim.name)}</h3><div class='card'>"
        "<table><tr><th class='number'>example</th><th></th><th class='number'>z</th><th class='number'>score</th>"
        "<th>steps</th></tr>"
        f"{rows}</table>"
        f"<p>{found.opened} sketches of rank {found.rank}, of {found.examples} examples; together they make "
        f"{100 * found.covered:.0f} % of the source's score.</p>{notes}</div>"
    )


def _percent_of(part: float, most: float) -> float:
    return 100 * max(part, 0.0) / most if 0 < most < float("inf") else 0.0


def _heat(ranked: Sequence[SourceScore], columns: Mapping[str, str] | Mapping[int, str], which: str) -> str:
    """Parts of the score, coloured by their size beside the largest of the table."""
    table: list[tuple[SourceScore, list[float | None]]] = []
    for row in ranked:
        held: Mapping[object, float] = getattr(row, which)
        table.append((row, [held.get(column) for column in columns]))
    most = max((abs(part) for _, parts in table for part in parts if part is not None), default=0.0)
    head = "".join(f"<th>{_text(name)}</th>" for name in columns.values())
    rows = []
    for row, parts in table:
        cells = "".join(_cell(part, most) for part in parts)
        rows.append(f"<tr><td>{_text(row.source.record.claim.name)}</td>{cells}</tr>")
    return f"<div class='card'><table class='heat'><tr><th>source</th>{head}</tr>{''.join(rows)}</table></div>"


def _cell(part: float | None, most: float) -> str:
    if part is None:
        return "<td class='cell' title='no direct update'>–</td>"
    return f"<td class='cell' style='{_colour(part, most)}'>{part:+.2g}</td>"


def _colour(part: float, most: float) -> str:
    share = STRONGEST_PERCENT * abs(part) / most if most > 0 else 0.0
    hue = "--accent" if part >= 0 else "--against"
    return f"background:color-mix(in srgb, var({hue}) {share:.0f}%, transparent)"


def _receipt(row: SourceScore) -> str:
    fields = "".join(f"<dt>{escape(name)}</dt><dd>{_text(value)}</dd>" for name, value in receipt_fields(row.source))
    name = _text(row.source.record.claim.name)
    return f"<details><summary>{name} <small>z {row.z:.1f}</small></summary><dl>{fields}</dl></details>"


def _text(text: str) -> str:
    return escape(shown(text))
