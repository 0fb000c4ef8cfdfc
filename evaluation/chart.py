"""A chart of figures over time as SVG: one panel for each measure, one line for each predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from deploy.operate.times import iso
from evaluation.measures import OURS
from evaluation.report import IN_PERCENT, NAMES, Period

WIDTH, HEIGHT, LEFT, TOP, LEGEND, GAP = 760, 180, 60, 34, 240, 56
PANELS = (
    ("recommendation", "recall@20", "next item"),
    ("interests", "top5", "next category"),
    ("interests", "log_loss", "next category"),
    ("engagement", "auc", "engagement"),
    ("engagement", "log_loss", "engagement"),
)
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
TICKS = 4


def svg(periods: Sequence[Period]) -> str:
    """Draws the chart; panels without figures are left out."""
    panels = [
        (f"{task}: {NAMES.get(measure, measure)}", measure, lines)
        for kind, measure, task in PANELS
        if (lines := _lines(periods, kind, measure))
    ]
    height = TOP + len(panels) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + LEGEND}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{LEFT + WIDTH + LEGEND}" height="{height}" fill="white"/>',
    ]
    for number, (title, measure, lines) in enumerate(panels):
        parts += _panel(title, measure, lines, periods, TOP + number * (HEIGHT + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _lines(periods: Sequence[Period], kind: str, measure: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for number, period in enumerate(periods):
        figures: Mapping[str, Mapping[str, float]] = getattr(period, kind)
        for name, value in figures.get(measure, {}).items():
            lines.setdefault(name, []).append((number, value * (100.0 if measure in IN_PERCENT else 1.0)))
    return lines


def _panel(
    title: str, measure: str, lines: Mapping[str, Sequence[tuple[int, float]]], periods: Sequence[Period], top: int
) -> Iterator[str]:
    values = [value for line in lines.values() for _, value in line]
    low, high = min(values), max(values)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    unit = " (%)" if measure in IN_PERCENT else ""
    yield f'<text x="{LEFT}" y="{top - 12}" font-weight="bold">{escape(title)}{unit}</text>'
    yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    for tick in range(TICKS + 1):
        value = low + (high - low) * tick / TICKS
        y = top + HEIGHT - HEIGHT * tick / TICKS
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#eee"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    ends = (periods[0].begin_ms, "start", LEFT), (periods[-1].end_ms, "end", LEFT + WIDTH)
    for at_ms, anchor, x in ends:
        yield f'<text x="{x}" y="{top + HEIGHT + 16}" text-anchor="{anchor}">{iso(at_ms)}</text>'
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{LEFT + WIDTH * (number + 0.5) / len(periods):.1f},{top + HEIGHT * (high - value) / (high - low):.1f}"
            for number, value in line
        )
        width = 2.5 if name == OURS else 1.2
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        y = top + 12 + 18 * number
        yield f'<line x1="{LEFT + WIDTH + 12}" y1="{y}" x2="{LEFT + WIDTH + 32}" y2="{y}" stroke="{colour}" stroke-width="3"/>'
        yield f'<text x="{LEFT + WIDTH + 38}" y="{y + 4}">{escape(name)}</text>'
