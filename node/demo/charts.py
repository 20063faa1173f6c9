"""The report's drawings, as SVG text without scripts or outside references.

Colours are the page's CSS variables, so that the drawings follow light and dark. Every drawing has a title and a
description for those who do not see it; texts are escaped here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 46, 846, 64, 300
CURVE_HEIGHT = 344
LANE_TOP = 14
MARK_WIDTH = 17


@dataclass(frozen=True, slots=True)
class Mark:
    """A happening at a step: a letter in a coloured circle on the curve's upper edge, told in full on hover."""

    step: int
    kind: str
    letter: str
    text: str


def loss_curve(
    points: Sequence[tuple[int, float]],
    discarded: Sequence[tuple[int, float]],
    marks: Sequence[Mark],
    outages: Sequence[tuple[int, int]],
    last_step: int,
) -> str:
    """Loss by step; steps that were undone as crosses; marks above; outages of the operator's node shaded."""
    values = [loss for _, loss in (*points, *discarded)]
    if not values:
        return ""
    low, high = min(values), max(values)
    pad = 0.06 * ((high - low) or 1.0)
    low, high = low - pad, high + pad

    def x(step: float) -> float:
        return PLOT_LEFT + (PLOT_RIGHT - PLOT_LEFT) * (step - 1) / max(1, last_step - 1)

    def y(loss: float) -> float:
        return PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * (loss - low) / (high - low)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {CURVE_HEIGHT}" role="img" aria-labelledby="loss-title">',
        f'<title id="loss-title">Loss over {last_step} steps, from {points[0][1]:.2f} to {points[-1][1]:.2f} '
        "nats per byte</title>"
        if points
        else '<title id="loss-title">Loss</title>',
    ]
    for first, last in outages:
        parts.append(
            f'<rect class="outage" x="{x(first):.1f}" y="{PLOT_TOP}" '
            f'width="{max(3.0, x(last) - x(first)):.1f}" height="{PLOT_BOTTOM - PLOT_TOP}">'
            f"<title>The operator's node was down from step {first} to step {last}; the job trained on</title></rect>"
        )
    for value in _ticks(low, high, 4):
        parts.append(
            f'<line class="grid" x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text class="tick" x="{PLOT_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        )
    for value in _ticks(1, last_step, 8):
        if value >= 1 and value == int(value):
            parts.append(
                f'<text class="tick" x="{x(value):.1f}" y="{PLOT_BOTTOM + 20}" text-anchor="middle">{int(value)}</text>'
            )
    parts.append(
        f'<text class="tick" x="{PLOT_RIGHT}" y="{PLOT_BOTTOM + 38}" text-anchor="end">step</text>'
        f'<text class="tick" x="{PLOT_LEFT}" y="{PLOT_BOTTOM + 38}">loss in nats per byte</text>'
    )
    placed = _placed([(mark, x(mark.step)) for mark in marks])
    for mark, _, lane in placed:
        top = LANE_TOP + lane * (MARK_WIDTH + 2)
        parts.append(
            f'<line class="stem {mark.kind}" x1="{x(mark.step):.1f}" x2="{x(mark.step):.1f}" '
            f'y1="{top + 8}" y2="{PLOT_BOTTOM}"/>'
        )
    path = " ".join(
        f"{'M' if number == 0 else 'L'}{x(step):.1f} {y(loss):.1f}" for number, (step, loss) in enumerate(points)
    )
    if points:
        area = f"{path} L{x(points[-1][0]):.1f} {PLOT_BOTTOM} L{x(points[0][0]):.1f} {PLOT_BOTTOM} Z"
        parts.append(f'<path class="area" d="{area}"/><path class="faint" d="{path}"/>')
        smooth = _smoothed(points)
        trend = " ".join(
            f"{'M' if number == 0 else 'L'}{x(step):.1f} {y(loss):.1f}" for number, (step, loss) in enumerate(smooth)
        )
        parts.append(f'<path class="line" d="{trend}"/>')
    for step, loss in discarded:
        cx, cy = x(step), y(loss)
        parts.append(
            f'<g class="undone"><title>Step {step} was undone by the rollback</title>'
            f'<path d="M{cx - 4:.1f} {cy - 4:.1f} l8 8 M{cx - 4:.1f} {cy + 4:.1f} l8 -8"/></g>'
        )
    for mark, at, lane in placed:
        top = LANE_TOP + lane * (MARK_WIDTH + 2)
        parts.append(
            f'<g class="mark {mark.kind}"><title>{escape(mark.text)}</title>'
            f'<circle cx="{at:.1f}" cy="{top}" r="8.5"/>'
            f'<text x="{at:.1f}" y="{top + 4}" text-anchor="middle">{escape(mark.letter)}</text></g>'
        )
    parts.append("</svg>")
    return "".join(parts)


def heat_map(blocks: Sequence[str], rows: Sequence[tuple[str, str, Mapping[str, int]]]) -> str:
    """Sources (name, note, permille by block) against parameter blocks; darker is more."""
    label_width, cell_height, head = 196, 34, 30
    cell_width = (WIDTH - label_width - 10) / max(1, len(blocks))
    height = head + cell_height * len(rows) + 6
    most = max((share for _, _, shares in rows for share in shares.values()), default=0) or 1
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="heat-title">',
        '<title id="heat-title">Share of each source in what moved each parameter block</title>',
    ]
    for column, block in enumerate(blocks):
        middle = label_width + (column + 0.5) * cell_width
        parts.append(f'<text class="label" x="{middle:.1f}" y="18" text-anchor="middle">{escape(block)}</text>')
    for row, (name, note, shares) in enumerate(rows):
        top = head + row * cell_height
        parts.append(
            f'<text class="label" x="{label_width - 12}" y="{top + 15}" text-anchor="end">{escape(name)}</text>'
            f'<text class="note" x="{label_width - 12}" y="{top + 27}" text-anchor="end">{escape(note)}</text>'
        )
        for column, block in enumerate(blocks):
            share = shares.get(block, 0)
            left = label_width + column * cell_width
            opacity = 0.0 if share == 0 else 0.12 + 0.88 * share / most
            strong = " strong" if opacity > 0.58 else ""
            parts.append(
                f'<g class="cell{strong}"><title>{escape(name)} → {escape(block)}: {share / 10:.1f} %</title>'
                f'<rect class="frame" x="{left + 2:.1f}" y="{top + 2}" width="{cell_width - 4:.1f}" '
                f'height="{cell_height - 4}" rx="5"/>'
                f'<rect class="heat" x="{left + 2:.1f}" y="{top + 2}" width="{cell_width - 4:.1f}" '
                f'height="{cell_height - 4}" rx="5" fill-opacity="{opacity:.3f}"/>'
                f'<text x="{left + cell_width / 2:.1f}" y="{top + 21}" text-anchor="middle">'
                f"{'·' if share == 0 else f'{share / 10:.0f} %'}</text></g>"
            )
    parts.append("</svg>")
    return "".join(parts)


def _placed(marks: Sequence[tuple[Mark, float]]) -> list[tuple[Mark, float, int]]:
    """Each mark with its place and one of two lanes, so that neighbours do not cover each other."""
    ends = [float("-inf")] * 3
    placed = []
    for mark, wished in sorted(marks, key=lambda each: each[1]):
        at = min(max(wished, PLOT_LEFT), PLOT_RIGHT)
        free = [lane for lane, end in enumerate(ends) if at - end >= MARK_WIDTH]
        lane = free[0] if free else min(range(len(ends)), key=lambda each: ends[each])
        ends[lane] = at
        placed.append((mark, at, lane))
    return placed


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Mean over a window of about a fifteenth of the curve on either side."""
    reach = max(1, len(points) // 30)
    smooth = []
    for number, (step, _) in enumerate(points):
        window = [loss for _, loss in points[max(0, number - reach) : number + reach + 1]]
        smooth.append((step, sum(window) / len(window)))
    return smooth


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between ``low`` and ``high``, about as many as wished."""
    span = (high - low) or 1.0
    power = 1.0
    while power > span / about:
        power /= 10
    while power * 10 <= span / about:
        power *= 10
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor * about >= span)
    first = int(low // distance) + (low % distance > 0)
    return [round(number * distance, 6) for number in range(first, int(high // distance) + 1)]
