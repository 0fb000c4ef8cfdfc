"""The loop's figures as one screen of text: problems first, then throughput, then latencies.

    state           nothing is wrong                      up 12 min
    clicks          226/s       lag 0 events, 0.0 s       1,234,567 taken up
    ...
                    now       p50       p99       over the last 60 s
    weights         0.35 s    0.30 s    0.62 s    age of the newest click learned
    ...
    try             curl -s http://127.0.0.1:8501/v1/profiles/shopper-1

Columns keep their positions while the numbers change. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deploy.watch.budget import lines_of_budget
from deploy.watch.clocks_off import lines_of, troubles_of
from deploy.watch.figures import SPREADS, Figures
from deploy.watch.messages import decimal, duration, rate, seconds, shown
from deploy.watch.progress import FEW_RECORDS, QUEUED_S
from deploy.watch.quantiles import Spread

STALE_S = 20.0
# The alerts of deploy/prometheus/rules use the same bounds, with a delay.
MANY_LAG = 10_000
DEAD_SHARE = 0.01
SKIPPED_SHARE = 0.01

# Widths of columns; with 80 columns the last cell has room for 26 characters, or for 33.
HAPPENINGS = (16, 12, 26)
DISTRIBUTIONS = (16, 10, 10, 10)
MOST_REASONS = 4
ANEW_S = 60.0

MEANINGS = {
    "features": "age of the newest click known",
    "weights": "age of the newest click learned",
    "commit": "to commit a micro-batch",
    "step": "to train on a micro-batch",
    "publication": "until a version can be followed",
    "answer": "to answer a request",
}


def troubles(figures: Figures) -> list[str]:
    """Returns all problems and operator holds, the worst first.

    >>> troubles(Figures(held=True, paused=True))
    ['training is held by the guard', 'training is paused by an operator']
    """
    return [*wrong(figures), *wanted(figures)]


def wanted(figures: Figures) -> list[str]:
    """Returns what an operator holds; a hold is not a fault.

    >>> wanted(Figures(paused=True))
    ['training is paused by an operator']
    """
    held = {
        "training is paused by an operator": figures.paused,
        "publishing is held by an operator": figures.publishing_held,
        # A hold of the guard also pins, so the pin is not reported separately.
        "pinned by an operator": figures.pinned and not figures.held,
    }
    return [said for said, holds in held.items() if holds]


def wrong(figures: Figures) -> list[str]:
    """Returns what is wrong, the worst first."""
    return list(_wrong(figures))


def _wrong(figures: Figures) -> Iterator[str]:
    # Without Kafka other processes wait or do not answer, so Kafka comes first.
    nothing_runs = bool(figures.away) and not figures.up_s and not figures.up
    if figures.kafka_away and not nothing_runs:
        yield "Kafka away"
    if nothing_runs:
        yield "nothing answers"
    elif figures.up == "starting":
        yield from (f"{name} not started yet" for name in figures.away)
    else:
        yield from (f"{name} away" for name in figures.away)
    yield from (f"{name} {what}" for name, what in figures.starting.items())
    yield from (f"{part} cannot run, {shown(count)} deaths in a row" for part, count in figures.dying.items())
    yield from figures.full
    if figures.faults:
        yield "accounts do not balance"
    if figures.differing:
        yield f"rows trained with other features: {shown(figures.differing)}"
    if figures.held:
        yield "training is held by the guard"
    elif figures.rows_per_s and (figures.skipped_per_s or 0.0) / figures.rows_per_s > SKIPPED_SHARE:
        yield f"the guard skips {(figures.skipped_per_s or 0.0) / figures.rows_per_s:.0%} of the rows"
    if figures.budget and figures.budget.spent:
        yield "training holds: the privacy budget is spent"
    yield from (f"{name}: {what}" for name, what in figures.behind.items())
    clicks, old = bool(figures.events_per_s), old_clicks(figures)
    learned = old and figures.trainer_lag is not None and figures.trainer_lag <= FEW_RECORDS
    if clicks and not wanted(figures) and not learned and (figures.weights_s or 0.0) > STALE_S:
        yield f"weights {seconds(figures.weights_s)} old"
    if clicks and not old and (figures.features_s or 0.0) > STALE_S:
        yield f"features {seconds(figures.features_s)} old"
    if (figures.lag_events or 0.0) > MANY_LAG and "stream" not in figures.behind:
        yield f"{shown(figures.lag_events)} clicks wait"
    if figures.events_per_s and (figures.dead_per_s or 0.0) / figures.events_per_s > DEAD_SHARE:
        yield f"{(figures.dead_per_s or 0.0) / figures.events_per_s:.0%} dead letters"
    yield from troubles_of(figures.clocks_off)
    if figures.failed_per_s:
        yield f"{rate(figures.failed_per_s)} answers fail"
    if figures.corrupt:
        yield f"corrupt versions: {shown(figures.corrupt)}"
    if figures.refused:
        yield f"version {figures.refused:.0f} is refused"


def old_clicks(figures: Figures) -> bool:
    """Returns whether incoming clicks are old themselves, as in a replay: none waits, and the newest is old.

    >>> old_clicks(Figures(lag_s=0.1, serving_lag=2.0, features_s=1_933_200.0))
    True
    """
    if figures.lag_s is None or figures.serving_lag is None or figures.kafka_away or "stream" in figures.behind:
        return False
    waits = figures.lag_s > QUEUED_S or figures.serving_lag > FEW_RECORDS
    return not waits and (figures.features_s or 0.0) > STALE_S


def happenings(figures: Figures, workers: int = 1) -> list[Sequence[str]]:
    """Returns the cells of the throughput lines: a label, the rate, and details.

    Args:
        figures: Figures of one poll.
        workers: Worker processes of this host, whose figures are summed.
    """
    top1 = "-" if figures.top1 is None else f"{figures.top1:.1%}"
    return [
        ("state", ", ".join(troubles(figures)) or "nothing is wrong", "", uptime(figures.up_s)),
        (
            "clicks",
            rate(figures.events_per_s),
            f"lag {shown(figures.lag_events)} events, {seconds(figures.lag_s)}",
            f"{shown(figures.events)} taken up",
        ),
        ("dead letters", rate(figures.dead_per_s), "-" if figures.events is None else reasons(figures.dead)),
        *lines_of(figures.clocks_off),
        (
            "micro-batches",
            rate(figures.microbatches_per_s),
            f"{decimal(figures.microbatch_rows, 1)} rows each",
            f"trainer {shown(figures.trainer_lag)} behind",
        ),
        (
            "training",
            rate(figures.rows_per_s, "rows"),
            f"log loss {decimal(figures.log_loss)}, AUC {decimal(figures.auc)}",
            f"{rate(figures.steps_per_s, 'steps')}, top 1 {top1}",
        ),
        *lines_of_budget(figures.budget),
        (
            "served version",
            shown(figures.version, ""),
            f"epoch {shown(figures.epoch)}, {'-' if figures.epoch is None else 'pinned' if figures.pinned else 'follows'}",
            f"newest {shown(figures.newest_version, '')}, serving {shown(figures.serving_lag)} behind",
        ),
        (
            f"answers, {workers} workers" if workers > 1 else "answers",
            rate(figures.answers_per_s),
            f"{shown(figures.answers)} given, {shown(figures.failed)} failed",
            f"{shown(figures.cold_starts)} cold starts",
        ),
    ]


def distributions(figures: Figures) -> list[Sequence[str]]:
    """Returns the cells of the latency lines: a label, the current value, median, 99th percentile, and the meaning."""
    now = {"features": duration(figures.features_s), "weights": duration(figures.weights_s)}
    means = MEANINGS | ({"features": "age of the newest, an old click"} if old_clicks(figures) else {})
    return [
        ("", "now", "p50", "p99", span(figures.spread_s)),
        *((name, now.get(name, ""), *bounded(figures.spreads.get(name, Spread())), means[name]) for name in SPREADS),
    ]


def uptime(up_s: Mapping[str, float]) -> str:
    """Formats how long the loop has been up, and which processes have restarted since.

    >>> uptime({"stream": 720.0, "trainer": 718.0}), uptime({"stream": 720.0, "trainer": 8.0})
    ('up 12 min', 'up 12 min, trainer 8.0 s')
    """
    longest_s = max(up_s.values(), default=None)
    younger = [f"{name} {seconds(one)}" for name, one in up_s.items() if one < (longest_s or 0.0) - ANEW_S]
    return ", ".join([f"up {seconds(longest_s)}", *younger])


def bounded(one: Spread) -> tuple[str, str]:
    """Formats median and 99th percentile, with `>` if they exceed the highest bucket.

    >>> bounded(Spread(100, 0.004, 5.0, most=5.0)), bounded(Spread())
    (('4.0 ms', '> 5.0 s'), ('-', '-'))
    """
    p50, p99 = (
        ("> " if value is not None and value >= one.most else "") + duration(value) for value in (one.p50, one.p99)
    )
    return p50, p99


def reasons(dead: Mapping[str, float]) -> str:
    """Formats dead letters since the start by reason, the most frequent first.

    >>> reasons({"implausible_time": 10.0, "missing_field": 2.0}), reasons({})
    ('12: 10 implausible_time, 2 missing_field', 'none since the start')
    """
    if not any(dead.values()):
        return "none since the start"
    listed = [f"{shown(count)} {reason}" for reason, count in dead.items() if count]
    more = [f"{len(listed) - MOST_REASONS} more"] if len(listed) > MOST_REASONS else []
    return f"{shown(sum(dead.values()))}: {', '.join([*listed[:MOST_REASONS], *more])}"


def span(spread_s: float | None) -> str:
    """Describes the period that the quantiles cover.

    >>> span(60.0), span(None)
    ('over the last 60 s', 'since each process started')
    """
    return "since each process started" if spread_s is None else f"over the last {spread_s:.0f} s"


def aligned(cells: Sequence[str], columns: Sequence[int]) -> str:
    """Formats one line with each cell in its column; a long cell extends over empty ones after it.

    >>> aligned(("clicks", "", "lag 0"), (10, 10))
    'clicks              lag 0'
    """
    line = ""
    for place, cell in enumerate(cells):
        if cell:
            start = sum(columns[:place])
            line = (line.ljust(start) if len(line) < start or not line else f"{line}  ") + cell
    return line


def panel(figures: Figures, hints: Sequence[tuple[str, str]] = (), workers: int = 1) -> list[str]:
    """Returns the lines of the screen.

    Args:
        figures: Figures of one poll.
        hints: What to try: a label, and what to type or to open.
        workers: Worker processes of this host.
    """
    return [
        *lines(happenings(figures, workers)),
        "",
        *lines(distributions(figures), DISTRIBUTIONS),
        *(["", *lines(hints)] if hints else []),
    ]


def lines(cells: Sequence[Sequence[str]], columns: Sequence[int] = HAPPENINGS) -> list[str]:
    """Formats lines with their cells in columns."""
    return [aligned(one, columns) for one in cells]
