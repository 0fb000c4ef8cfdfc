"""The result of an evaluation, as a JSON document and as text tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from deploy.formats import iso
from evaluation.measures import OURS, Estimate, Figure, Score, Table, area_under_curve, mean, ratio, table
from evaluation.progressive import INTERESTS, SHOWN, Asked, Judged, Lists, ProgressiveValidation

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Flags = NDArray[np.bool_]
Estimates = Callable[..., dict[str, Estimate]]

PERIODS = 40
"""Maximum of periods, of equal length, with figures."""
FEWEST_IN_PERIOD = 20
HISTORIES = ((0, 0), (1, 4), (5, 19), (20, 1 << 62))
BY_HISTORY = {
    "users without earlier clicks": "none",
    "users with 1 to 4 earlier clicks": "1 to 4",
    "users with 5 to 19 earlier clicks": "5 to 19",
    "users with 20 or more earlier clicks": "20 or more",
}
"""The tables by the number of a user's earlier clicks, and their columns in the text."""
IN_PERCENT = {"top1", "top5", "auc", "recall@10", "recall@20", "mrr", "ndcg@20", "coverage"}
NAMES = {"top1": "top-1", "top5": "top-5", "log_loss": "log loss", "auc": "AUC", "mrr": "MRR", "ndcg@20": "NDCG@20"}


class Source(msgspec.Struct, frozen=True):
    """The contribution of one candidate source to Springtide's lists.

    Attributes:
        candidates: Items that it proposed to the ranking; each item counts for one source.
        found: Clicked items among the candidates.
        listed: Recommended items of this source.
        hits: Clicked items among the recommended ones.
    """

    candidates: int
    found: int
    listed: int
    hits: int


class Period(msgspec.Struct, frozen=True):
    """Figures of a part of the evaluated time, by measure and predictor, without intervals."""

    begin_ms: int
    end_ms: int
    interests: dict[str, dict[str, float]]
    engagement: dict[str, dict[str, float]]
    recommendation: dict[str, dict[str, float]]


class Evaluation(msgspec.Struct, frozen=True):
    """The result of one run; the first table of each kind covers all evaluated rows.

    `sources` has the contribution of each source to the first table of recommendations. `unseen_sources` is the same
    for lists without items that the user has seen.
    """

    recording: dict[str, Any]
    evaluated: dict[str, Any]
    options: dict[str, Any]
    interests: list[Table]
    engagement: list[Table]
    recommendation: list[Table]
    sources: dict[str, Source]
    unseen_sources: dict[str, Source]
    periods: list[Period]
    took_s: float


def joined(parts: Sequence[Judged]) -> Judged:
    """The rows of one or more parts as one."""
    users, at_ms, evaluated, flags, scores = zip(*parts, strict=True)
    return Judged(
        np.concatenate(users),
        np.concatenate(at_ms),
        np.concatenate(evaluated),
        np.concatenate(flags),
        {name: np.concatenate([part[name] for part in scores]) for name in scores[0]},
    )


def interests_tables(parts: Sequence[Judged]) -> list[Table]:
    """Tables of the next category: evaluated rows, users with earlier clicks, all rows if some were only learned."""
    if not parts:
        return []
    judged = joined(parts)
    groups = {"all clicks": judged.evaluated, "users with earlier clicks": judged.evaluated & judged.flag}
    return _judged_tables(judged, groups, "all clicks of the recording", interest_estimates)


def engagement_tables(parts: Sequence[Judged]) -> list[Table]:
    """Tables of labelled rows: the evaluated ones, and all if some were only learned."""
    if not parts:
        return []
    judged = joined(parts)
    groups = {"all impressions": judged.evaluated}
    return _judged_tables(judged, groups, "all impressions of the recording", engagement_estimates)


def _judged_tables(judged: Judged, groups: dict[str, Flags], every: str, estimates: Estimates) -> list[Table]:
    if not judged.evaluated.all():
        groups[f"{every}, with those that only trained"] = np.ones_like(judged.evaluated)
    return [
        table(
            title,
            judged.users[rows],
            {name: estimates(scores[rows], judged.flag[rows]) for name, scores in judged.scores.items()},
        )
        for title, rows in groups.items()
        if rows.any()
    ]


def interest_estimates(scores: F64, known: Flags) -> dict[str, Estimate]:
    """The means of INTERESTS."""
    return {measure: mean(scores[:, column]) for column, measure in enumerate(INTERESTS)}


def engagement_estimates(predicted: F64, clicked: Flags) -> dict[str, Estimate]:
    """AUC, log loss, and calibration: predicted over observed clicks."""
    sure = np.clip(np.where(clicked, predicted, 1.0 - predicted), 1e-15, 1.0)
    return {
        "auc": area_under_curve(predicted, clicked),
        "log_loss": mean(-np.log(sure)),
        "calibration": ratio(predicted, clicked),
    }


def recall_estimates(ranks: I64) -> dict[str, Estimate]:
    """The recall of `rank_estimates`."""
    return {f"recall@{most}": mean((ranks >= 0) & (ranks < most)) for most in (10, 20)}


def rank_estimates(ranks: I64) -> dict[str, Estimate]:
    """Recall, MRR and NDCG for `[n]` ranks of the clicked item, from 0; negative where it is not in the list.

    >>> {name: round(one.value, 3) for name, one in rank_estimates(np.array([0, 2, -1, 15])).items()}
    {'recall@10': 0.5, 'recall@20': 0.75, 'mrr': 0.349, 'ndcg@20': 0.436}
    """
    hit, positions = ranks >= 0, np.maximum(ranks, 0)
    return recall_estimates(ranks) | {
        "mrr": mean(np.where(hit, 1.0 / (1.0 + positions), 0.0)),
        "ndcg@20": mean(np.where(hit, 1.0 / np.log2(2.0 + positions), 0.0)),
    }


def recommendation_tables(requests: Sequence[Asked]) -> list[Table]:
    """Tables of the next item: all requests, items new to the user, and by the length of the user's history."""
    new = [request for request in requests if not request.seen]
    groups: list[tuple[str, Sequence[Asked], Callable[[Asked], dict[str, int]]]] = [
        ("all clicks", requests, lambda request: request.ranks),
        ("clicks on items that are new to the user", new, lambda request: request.ranks),
        (
            "clicks on items that are new to the user, with exclude=clicked,shown",
            new,
            lambda request: request.unseen_ranks,
        ),
    ]
    scored = [request for request in requests if request.without]
    about = "all clicks, without one source of candidates and with the same weights"
    groups.append((about, scored, lambda request: request.without))
    for (least, most), title in zip(HISTORIES, BY_HISTORY, strict=True):
        within = [request for request in requests if least <= request.history <= most]
        groups.append((title, within, lambda request: request.ranks))
    return [
        _rank_table(title, requests_of_group, ranks) for title, requests_of_group, ranks in groups if requests_of_group
    ]


def _rank_table(title: str, requests: Sequence[Asked], ranks: Callable[[Asked], dict[str, int]]) -> Table:
    users = np.array([request.user for request in requests], np.uint64)
    estimates = {
        name: rank_estimates(np.array([ranks(request)[name] for request in requests], np.int64))
        for name in ranks(requests[0])
    }
    return table(title, users, estimates)


def with_coverage(shown: Table, lists: Lists, items: int) -> Table:
    """Adds the share of the recording's items that each predictor recommended at least once."""
    scores = [
        msgspec.structs.replace(
            score, figures={**score.figures, "coverage": Figure(len(lists.items.get(score.name, ())) / items, None)}
        )
        for score in shown.scores
    ]
    return msgspec.structs.replace(shown, scores=scores)


def sources_of(lists: Lists, proposers: Sequence[str], hits: Sequence[str]) -> dict[str, Source]:
    """Returns the contribution of each source, the one with most hits first.

    `proposers` has, by request, the source that proposed the clicked item, and `hits` the item's source in the list. Both
    are empty for a request without such a source.
    """
    names = {**lists.listed, **lists.candidates}
    sources = {
        name: Source(lists.candidates[name], proposers.count(name), lists.listed[name], hits.count(name))
        for name in names
    }
    return dict(sorted(sources.items(), key=lambda entry: -entry[1].hits))


def periods(validation: ProgressiveValidation) -> list[Period]:
    """Returns the figures of parts of equal length of the evaluated time."""
    requests = validation.asked
    requests_ms = np.array([request.at_ms for request in requests], np.int64)
    kinds: list[tuple[str, Estimates, Judged]] = []
    if validation.interests:
        kinds.append(("interests", interest_estimates, joined(validation.interests)))
    if validation.engagements:
        kinds.append(("engagement", engagement_estimates, joined(validation.engagements)))
    every = np.concatenate([*(judged.at_ms[judged.evaluated] for *_, judged in kinds), requests_ms])
    if not every.size:
        return []
    fewest = max(requests_ms.size if requests_ms.size else every.size, 1)
    count = int(np.clip(fewest // FEWEST_IN_PERIOD, 1, PERIODS))
    edges = np.linspace(every.min(), every.max() + 1, count + 1)
    found = [Period(int(edges[n]), int(edges[n + 1]), {}, {}, {}) for n in range(count)]

    def add(kind: str, predictor: str, estimates: Estimates, at_ms: NDArray[Any], *columns: NDArray[Any]) -> None:
        part = np.clip(np.searchsorted(edges, at_ms, "right") - 1, 0, count - 1)
        for number in np.unique(part).tolist():
            figures: dict[str, dict[str, float]] = getattr(found[number], kind)
            for measure, estimate in estimates(*(column[part == number] for column in columns)).items():
                if np.isfinite(estimate.value):
                    figures.setdefault(measure, {})[predictor] = estimate.value

    for kind, estimates, judged in kinds:
        rows = judged.evaluated
        for name, scores in judged.scores.items():
            add(kind, name, estimates, judged.at_ms[rows], scores[rows], judged.flag[rows])
    for name in requests[0].ranks if requests else ():
        ranks = np.array([request.ranks[name] for request in requests], np.int64)
        add("recommendation", name, recall_estimates, requests_ms, ranks)
    return found


def as_text(evaluation: Evaluation) -> str:
    """The tables as text."""
    recording, evaluated, options = evaluation.recording, evaluation.evaluated, evaluation.options
    lines = [
        f"{recording['source']}: {recording['events']:,} events of {recording['users']:,} users, "
        f"{recording['items']:,} items in {recording['categories']:,} categories, "
        f"{recording['begin']} to {recording['end']}{recording['refused']}",
        f"evaluated: {evaluated['events']:,} events, {evaluated['begin']} to {evaluated['end']}; "
        "each is predicted before it is learned",
        "± is a 95 % confidence interval over users; (+a ±b) is springtide minus the baseline, for the same clicks",
    ]
    for title, tables in (
        ("Interests: the category of the next click", evaluation.interests),
        ("Engagement: whether an impression is clicked", evaluation.engagement),
        (
            f"Recommendation: the next item among {SHOWN}, asked before about one click in {options['every']} "
            f"(seed {options['seed']})",
            evaluation.recommendation,
        ),
    ):
        if tables:
            lines += ["", title]
        for shown in tables:
            if shown.about not in BY_HISTORY:
                lines += ["", *_table_lines(shown)]
    if by_history := [shown for shown in evaluation.recommendation if shown.about in BY_HISTORY]:
        lines += ["", *_history_lines(by_history)]
    for title, number_of_table, sources in (
        ("What each source of candidates of springtide contributed", 0, evaluation.sources),
        ("The same with exclude=clicked,shown, for items that are new to the user", 2, evaluation.unseen_sources),
    ):
        if sources:
            lines += ["", title, *_source_lines(sources, evaluation.recommendation[number_of_table].rows)]
    return "\n".join(lines)


def _table_lines(shown: Table) -> Iterator[str]:
    measures = list(shown.scores[0].figures)
    yield f"  {shown.about}: {shown.rows:,} of {shown.users:,} users"
    cells = [["", *(NAMES.get(measure, measure) for measure in measures)]]
    cells += [[score.name, *(_cell(score, measure) for measure in measures)] for score in shown.scores]
    yield from _aligned(cells)


def _history_lines(tables: Sequence[Table]) -> Iterator[str]:
    yield "  recall@20 by the number of earlier clicks of the user"
    cells = [["", *(BY_HISTORY[shown.about] for shown in tables)]]
    cells.append(["clicks", *(f"{shown.rows:,}" for shown in tables)])
    for scores in zip(*(shown.scores for shown in tables), strict=True):
        cells.append([scores[0].name, *(_cell(score, "recall@20") for score in scores)])
    yield from _aligned(cells)


def _cell(score: Score, measure: str) -> str:
    scale = 100.0 if measure in IN_PERCENT else 1.0
    text = _shown(score.figures[measure], scale)
    if measure not in score.difference:
        return text
    return f"{text} ({_shown(score.difference[measure], scale, signed=True)})"


def _shown(figure: Figure, scale: float, signed: bool = False) -> str:
    """A figure with its interval.

    >>> _shown(Figure(0.128, 0.0151), 100.0), _shown(Figure(0.5, None), 1.0, signed=True), _shown(Figure(None, None), 1.0)
    ('12.8 ±1.5', '+0.500', '-')
    """
    if figure.value is None:
        return "-"
    digits = 1 if scale > 1 else 3
    text = f"{figure.value * scale:{'+' if signed else ''}.{digits}f}"
    return text if figure.interval is None else f"{text} ±{figure.interval * scale:.{digits}f}"


def _source_lines(sources: Mapping[str, Source], requests: int) -> Iterator[str]:
    candidates, listed = (
        sum(getattr(source, name) for source in sources.values()) for name in ("candidates", "listed")
    )
    cells = [["", "candidates", "clicked item among them", "listed items", "clicked item among them"]]
    for name, source in sources.items():
        cells.append([name])
        for part, total, hits in ((source.candidates, candidates, source.found), (source.listed, listed, source.hits)):
            cells[-1] += [_share(part, total), f"{hits:,} = {_share(hits, requests)}"] if total else ["-", "-"]
    yield from _aligned(cells)


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else "-"


def _aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for first, *others in cells:
        yield "    " + "  ".join(
            [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        )


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
