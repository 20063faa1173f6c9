"""The page that stays: ``report.html``, self-contained, from ``RunFacts`` alone.

Pure: no clock, no file but the template, no network. Everything that is not this file's own wording is escaped.
``charts.py`` draws, the template ``report.html`` beside this file holds layout and style.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from node.demo.charts import Mark, heat_map, loss_curve
from node.demo.facts import (
    BandFacts,
    CheckFacts,
    CustodyFacts,
    DecisionFacts,
    Moment,
    RecallFacts,
    ReplayFacts,
    ReserveFacts,
    RunFacts,
    SourceFacts,
    SurveyFacts,
    TraceFacts,
)

TEMPLATE = Path(__file__).with_name("report.html")

MARK_LETTERS = {
    "refusal": ("R", "examples refused"),
    "rollback": ("U", "steps undone"),
    "revocation": ("W", "source withdrawn"),
    "killed": ("K", "operator's node killed"),
    "back": ("B", "node back"),
    "grant": ("G", "grant renewed"),
    "finding": ("F", "recital found too late to undo"),
    "decision": ("D", "decision signed"),
    "custody": ("C", "sums handed to a custodian"),
}


def render(facts: RunFacts) -> str:
    """The whole page."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        lead=_lead(facts),
        verdict=_verdict(facts),
        tiles=_tiles(facts),
        curve=_curve(facts),
        curve_key=_curve_key(facts),
        timeline=_timeline(facts.moments),
        heat=_heat(facts),
        sources=_sources(facts.sources),
        recall=_recall(facts.recall),
        bands="".join(_band(band) for band in facts.bands if band.examples),
        recited=_recited(facts.survey, facts.reserve, facts.decisions),
        replay=_replay(facts.replay),
        custody=_custody(facts.custody),
        traces=_traces(facts),
        checks="".join(_check(check, number == 0) for number, check in enumerate(facts.checks)),
        parties=_parties(facts),
        tolerances=_tolerances(facts),
        grants=_grants(facts),
        chain=_chain(facts),
        made=escape(f"Made by countersign demo, {facts.started}, Python {facts.python}."),
    )


def _lead(facts: RunFacts) -> str:
    voting = sum(party.votes for party in facts.parties)
    count = len(facts.survey.recited)
    recited = (
        f" The released model recites {_counted(count, 'example')} above the policy's threshold, found too late to "
        "undo: governance accepted that on the log."
        if count
        else ""
    )
    return escape(
        f"{len(facts.parties)} nodes, {voting} of them voting, recorded {facts.final_steps} training steps over "
        f"{len(facts.sources)} sources under one signed policy. {facts.refused_examples} examples were refused, "
        f"{_counted(facts.rollbacks, 'rollback')} undid what the model had begun to recite, and "
        f"{_counted(facts.revocations, 'source was', 'sources were')} withdrawn while it ran.{recited}"
    )


def _verdict(facts: RunFacts) -> str:
    good = sum(check.passed for check in facts.checks)
    replicated = (
        f"all {len(facts.parties)} nodes stand at one log and one state"
        if facts.replicated
        else "the nodes do not stand at one log and one state"
    )
    kind = "verdict" if facts.passed else "verdict bad"
    mark = "✓" if facts.passed else "✗"
    return (
        f'<div class="{kind}"><strong>{mark} {good} of {len(facts.checks)} checks say yes</strong>'
        f"<span>{escape(replicated)}</span></div>"
    )


def _tiles(facts: RunFacts) -> str:
    tiles = [
        (f"{facts.final_steps}", "training steps on the log"),
        (f"{facts.refused_examples:,}", "examples refused, each with its reason"),
        (f"{facts.rollbacks}", f"{_plural(facts.rollbacks, 'rollback')}, bit for bit"),
        (f"{facts.revocations}", f"{_plural(facts.revocations, 'source')} withdrawn in mid-run"),
        (f"{facts.ledger_blocks:,}", f"ledger blocks with {facts.log_size:,} events"),
        (f"{facts.certificate_bytes} B", "certificate of a ledger block, whoever signed"),
        (
            f"{facts.finality.p50_ms:.0f} ms",
            f"to finality, median; {facts.finality.p99_ms:.0f} ms at the 99th percentile",
        ),
        (f"{facts.step_overhead_percent:.1f} %", "what governance cost on top of training time"),
    ]
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )


def _curve(facts: RunFacts) -> str:
    kept = sorted((step.step, step.loss) for step in facts.steps if step.loss is not None and not step.discarded)
    undone = sorted((step.step, step.loss) for step in facts.steps if step.loss is not None and step.discarded)
    marks = [
        Mark(moment.step, moment.kind, MARK_LETTERS[moment.kind][0], f"Step {moment.step}: {moment.text}")
        for moment in facts.moments
        if moment.step and moment.kind in MARK_LETTERS
    ]
    return loss_curve(kept, undone, marks, _outages(facts.moments), facts.final_steps)


def _outages(moments: Sequence[Moment]) -> list[tuple[int, int]]:
    outages: list[tuple[int, int]] = []
    down: int | None = None
    for moment in moments:
        if moment.kind == "killed":
            down = moment.step
        elif moment.kind == "back" and down is not None and moment.step is not None:
            outages.append((max(1, down), max(1, moment.step)))
            down = None
    return outages


def _curve_key(facts: RunFacts) -> str:
    kinds = {moment.kind for moment in facts.moments if moment.step}
    items = "".join(
        f'<li class="{kind}"><b>{letter}</b><span class="quiet">{escape(name)}</span></li>'
        for kind, (letter, name) in MARK_LETTERS.items()
        if kind in kinds
    )
    crosses = '<li><span class="rollback">✕</span> a step that was undone</li>' if facts.rollbacks else ""
    shade = "<li>shaded: the operator's node was down</li>" if _outages(facts.moments) else ""
    return f'<ul class="key">{items}{crosses}{shade}</ul>'


def _timeline(moments: Sequence[Moment]) -> str:
    rows = []
    for moment in moments:
        place = f"{moment.seconds:.1f} s" + (f" · step {moment.step}" if moment.step else "")
        rows.append(f'<li class="{escape(moment.kind)}"><time>{place}</time> <span>{escape(moment.text)}</span></li>')
    return f'<ol class="timeline">{"".join(rows)}</ol>'


def _heat(facts: RunFacts) -> str:
    banded = {band.band: band for band in facts.bands}
    rows = []
    for source in facts.sources:
        for band in (0, *(number for number, held in banded.items() if source.name in held.examples)):
            note = (
                f"from {banded[band].from_nats:g} nats a byte" if band else f"{source.owner} · {source.content_class}"
            )
            shares = {share.block: share.permille.get((source.name, band), 0) for share in facts.shares}
            rows.append((source.name, note, shares))
    return heat_map([share.block for share in facts.shares], rows)


def _sources(sources: Sequence[SourceFacts]) -> str:
    rows = []
    for source in sources:
        reasons = "".join(
            f'<br><span class="quiet">{escape(reason)}: {count}</span>'
            for reason, count in sorted(source.refused.items())
        )
        withdrawn = ' <span class="chip revoked">withdrawn</span>' if source.revoked else ""
        undone = f'<br><span class="quiet">undone: {source.discarded}</span>' if source.discarded else ""
        rows.append(
            (
                f"<b>{escape(source.name)}</b>{withdrawn}<br><small>{escape(source.owner)}{_kept_back(source)}</small>",
                f"{escape(source.licence)}<br><small>for {escape(', '.join(source.purposes))}</small>",
                escape(source.content_class),
                f"{source.presented}",
                f"{source.admitted}{undone}",
                f"{sum(source.refused.values())}{reasons}{_bar(source)}",
            )
        )
    return _table(
        ("source", "licence", "class", "presented", "admitted", "refused, and why"), rows, numbers=frozenset({3, 4})
    )


def _kept_back(source: SourceFacts) -> str:
    return f", {source.reserve} of {source.examples} examples in reserve" if source.reserve else ""


def _bar(source: SourceFacts) -> str:
    if not source.presented:
        return ""
    share = 100 * source.admitted / source.presented
    inside = f'<i class="in" style="width:{share:.1f}%"></i><i class="out" style="width:{100 - share:.1f}%"></i>'
    return f'<div class="bar">{inside}</div>'


def _recall(recall: Sequence[RecallFacts]) -> str:
    rows = [
        (
            f"<b>{escape(each.source)}</b><br>{_chip(each.fate)}",
            f"{escape(each.prompt)}<b>{escape(each.completion)}</b>",
            _said(each.base_says, each.completion, each.base_probability),
            _said(each.tuned_says, each.completion, each.tuned_probability),
        )
        for each in recall
    ]
    return _table(("source", "the planted fact", "the base model goes on", "the tuned model goes on"), rows)


def _said(text: str, completion: str, probability: float) -> str:
    right = " right" if text == completion else ""
    return f'<span class="said{right}">{escape(text)}</span><br><small>{100 * probability:.1f} % per byte</small>'


def _band(band: BandFacts) -> str:
    count = sum(band.examples.values())
    return (
        f"<p>{_counted(count, 'example')} of {escape(', '.join(band.examples))} cost the base model "
        f"{band.from_nats:g} nats a byte or more, as unlikely as noise. For {'it' if count == 1 else 'them'} the "
        f"policy has another rule: let through to {escape(', '.join(band.blocks))} alone.</p>"
    )


def _custody(custody: CustodyFacts) -> str:
    return escape(
        f"{custody.custodian}, who is not the operator, holds them: {custody.size_bytes / 1e6:.0f} MB of "
        f"{_counted(custody.windows, 'window')}, each file held to its own log. The trace fetched them from there."
    )


def _recited(survey: SurveyFacts, reserve: ReserveFacts, decisions: Sequence[DecisionFacts]) -> str:
    text = (
        f"<p>Of {survey.examples} examples the strongest is recited at {survey.highest_permille} ‰; the policy bears "
        f"{survey.threshold_permille} ‰.</p>"
    )
    if reserve.texts:
        text += (
            f"<p>Of {reserve.texts} texts in the owners' reserves, on which no step trained, the check takes "
            f"{reserve.taken_for_recited} for recited: false alarms, or what a source says twice.</p>"
        )
    if survey.recited:
        rows = [
            (f"<b>{escape(each.source)}</b>", escape(each.owner), f"{each.example}", f"{each.signal_permille} ‰")
            for each in survey.recited
        ]
        text += _table(("source", "owner", "example", "recited"), rows, numbers=frozenset({2, 3}))
    if decisions:
        said = [(escape(", ".join(each.signers)), escape(each.outcome), escape(each.rationale)) for each in decisions]
        text += _table(("signed by", "decision", "because"), said)
    return text


def _replay(replay: ReplayFacts) -> str:
    kind = "yes" if replay.exact else "no"
    said = "" if replay.exact else f" {escape(replay.difference)}."
    return (
        f'<p><span class="chip {kind}">{replay.matched} of {replay.steps}</span> steps came out as recorded, bit for '
        f"bit.{said}</p><pre>{escape(replay.command)}</pre>"
    )


def _traces(facts: RunFacts) -> str:
    tracing = facts.tracing
    rows = [
        (
            f"{escape(each.fact.prompt)}<b>{escape(each.fact.completion)}</b><br>"
            f"<small>planted by {escape(each.fact.source)}</small> {_chip(each.fact.fate)}",
            f"{100 * each.fact.base_probability:.1f} % → {100 * each.fact.tuned_probability:.1f} %",
            f'{100 * each.without_probability:.1f} %<br><small class="said">{escape(each.without_says)}</small>',
            _leading(each),
            _z_bars(each),
        )
        for each in tracing.traces
    ]
    without = f"without {facts.replay.without}"
    table = _table(("output", "chance per byte", without, "the log's answer", "z of every admitted source"), rows)
    return f'{table}<p class="quiet">Ask again:</p><pre>{escape(tracing.command)}</pre>'


def _leading(trace: TraceFacts) -> str:
    if not trace.shaped_here:
        return '<span class="quiet">no source stands out</span>' if trace.made_likelier else "not shaped here"
    first = trace.ranked[0]
    withdrawn = ' <span class="chip revoked">withdrawn</span>' if first.revoked else ""
    return (
        f"<b>{escape(first.source)}</b> of {escape(first.owner)}{withdrawn}<br><small>claim at entry {first.entry} of "
        f"the log, {_counted(first.admitted, 'admitted example')} under {_counted(first.grants, 'grant')}</small>"
    )


def _z_bars(trace: TraceFacts) -> str:
    """A bar for each source, as long as its z; none to the left of zero."""
    most = max((ranked.z for ranked in trace.ranked), default=0.0)
    bars = []
    for ranked in trace.ranked:
        share = 100 * max(ranked.z, 0.0) / most if most > 0 else 0.0
        bars.append(
            f'<div class="z"><span>{escape(ranked.source)}</span><div class="bar">'
            f'<i class="in" style="width:{share:.0f}%"></i></div><b>{ranked.z:.1f}</b></div>'
        )
    return "".join(bars)


def _check(check: CheckFacts, first: bool) -> str:
    """A check, folded unless it is the first or failed."""
    steps = "".join(
        f"<li><span>{number}</span><span>{_chip(status)}</span><span>{escape(text)}</span></li>"
        for number, status, text in check.steps
    )
    kinds = [status for _, status, _ in check.steps]
    counts = ", ".join(f"{kinds.count(kind)} {kind.replace('-', ' ')}" for kind in dict.fromkeys(kinds))
    return (
        f'<details class="check"{" open" if first or not check.passed else ""}><summary>{_chip(check.answer)} '
        f"<b>{escape(check.predicate)}</b> <span>{escape(check.question)}</span></summary>"
        f'<div class="inside"><p class="quiet">{escape(check.about)} · {escape(counts)} · bundle of '
        f"{check.bundle_bytes / 1000:,.0f} kB · checked in {check.seconds:.1f} s</p>"
        f'<ol class="steps">{steps}</ol><p class="quiet">Ask again:</p><pre>{escape(check.command)}</pre>'
        "</div></details>"
    )


def _parties(facts: RunFacts) -> str:
    rows = [
        (
            f"<b>{escape(party.name)}</b>",
            escape(party.role),
            "votes" if party.votes else "replicates and checks",
            f"{party.height}",
            f'<span class="hex">{escape(party.log_root[:20])}…</span>',
            f'<span class="hex">{escape(party.state_root[:20])}…</span>',
        )
        for party in facts.parties
    ]
    return _table(("member", "role", "", "ledger block", "log root", "state root"), rows, numbers=frozenset({3}))


def _tolerances(facts: RunFacts) -> str:
    rows = [
        (
            escape(role.role),
            f"{role.members}",
            f"{role.threshold}",
            f"{role.agreement}",
            f"{role.validity}",
            f"{role.liveness}",
        )
        for role in facts.tolerances
    ]
    table = _table(
        ("role", "members", "needed", "traitors: one history", "traitors: no invalid event", "silent: the log goes on"),
        rows,
        numbers=frozenset({1, 2, 3, 4, 5}),
    )
    return (
        f'{table}<p class="quiet">History forks only if <em>every</em> role has more traitors than its first number; '
        "an invalid event passes only if <em>every</em> role has more than its second; the log waits as soon as "
        "<em>one</em> role has more silent members than its third.</p>"
    )


def _grants(facts: RunFacts) -> str:
    rows = [
        (f"{grant.first_step} to {grant.last_step}", f"{grant.sources}", escape(", ".join(grant.signers)))
        for grant in facts.grants
    ]
    return _table(("steps", "sources", "signed by"), rows, numbers=frozenset({1}))


def _chain(facts: RunFacts) -> str:
    pairs = [
        ("chain id", facts.chain_id, True),
        ("log", facts.origin, False),
        ("ledger blocks", f"{facts.ledger_blocks:,}", False),
        ("events", f"{facts.log_size:,}", False),
        ("log root", facts.log_root, True),
        ("state root", facts.state_root, True),
        ("certificates", f"{facts.certificate_scheme}, {facts.certificate_bytes} bytes", False),
        ("campaign", facts.campaign, True),
        ("policy", facts.policy, True),
        ("rationale", facts.policy_rationale, False),
        ("released file", f"{facts.release_file}, {facts.release_bytes / 1e6:.1f} MB", False),
        ("its SHA-256", facts.release_sha256, True),
    ]
    rows = []
    for name, value, is_hex in pairs:
        kind = ' class="hex"' if is_hex else ""
        rows.append(f"<dt>{escape(name)}</dt><dd{kind}>{escape(value)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """A table; headings are text, cells are HTML. On a phone each row is a card, its cells named by the headings."""

    def kind(column: int) -> str:
        return ' class="number"' if column in numbers else ""

    def cell(column: int, content: str) -> str:
        return f'<td{kind(column)} data-heading="{escape(headings[column])}"><div>{content}</div></td>'

    head = "".join(f"<th{kind(column)}>{escape(heading)}</th>" for column, heading in enumerate(headings))
    body = "".join(f"<tr>{''.join(cell(column, content) for column, content in enumerate(row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _chip(word: str) -> str:
    return f'<span class="chip {escape(word)}">{escape(word.replace("-", " "))}</span>'


def _counted(count: int, singular: str, plural: str | None = None) -> str:
    return f"{count} {_plural(count, singular, plural)}"


def _plural(count: int, singular: str, plural: str | None = None) -> str:
    return singular if count == 1 else plural or f"{singular}s"
