"""The operator's terminal: the loop's figures as one screen of text, or one line, that is redrawn.

Problems come first, then throughput, then latencies. Columns keep their positions while the numbers change. If the
terminal is small, the view is one line. If the output is not a terminal, that line is written from time to time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from deploy.formats import decimal, duration, far, rate, seconds, shown
from deploy.watch.figures import SPREADS, ClocksOff, Figures, Spread
from deploy.watch.snapshot import Snapshot

EVERY_S = 1.0
EVERY_QUIET_S = 10.0
LEAST_COLUMNS = 80
LINES_AROUND = 2

# Widths of columns; with 80 columns the last cell has room for 26 characters, or for 33.
HAPPENINGS = (16, 12, 26)
DISTRIBUTIONS = (16, 10, 10, 10)
MOST_REASONS = 4
RESTARTED_S = 60.0

MEANINGS = {
    "features": "age of the newest click known",
    "weights": "age of the newest click learned",
    "commit": "to commit a micro-batch",
    "step": "to train on a micro-batch",
    "publication": "until a version can be followed",
    "answer": "to answer a request",
}


def _happenings(snapshot: Snapshot, workers: int) -> list[Sequence[str]]:
    figures = snapshot.figures
    budget = figures.budget
    top1 = "-" if figures.top1 is None else f"{figures.top1:.1%}"
    return [
        ("state", snapshot.texts, "", uptime(figures.up_s)),
        (
            "clicks",
            rate(figures.events_per_s),
            f"lag {shown(figures.lag_events)} events, {seconds(figures.lag_s)}",
            f"{shown(figures.events)} read",
        ),
        ("dead letters", rate(figures.dead_per_s), "-" if figures.events is None else reasons(figures.dead)),
        *(
            (
                f"clocks {name}",
                shown(clock.clicks),
                f"partition {clock.partition} offset {clock.offset}: {_off(name, clock)}",
            )
            for name, clock in figures.clocks_off.items()
        ),
        (
            "micro-batches",
            rate(figures.microbatches_per_s),
            f"{decimal(figures.microbatch_rows, 1)} examples each",
            f"trainer {shown(figures.trainer_lag)} behind",
        ),
        (
            "training",
            rate(figures.rows_per_s),
            f"log loss {decimal(figures.log_loss)}, AUC {decimal(figures.auc)}",
            f"{rate(figures.steps_per_s, 'steps')}, top 1 {top1}",
        ),
        *([("workers", f"{len(figures.trainer_workers)}", _slowest(figures))] if figures.trainer_workers else []),
        *([("privacy", f"{budget.left:.2f} left", f"of epsilon {budget.epsilon:.2f}")] if budget else []),
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


def _distributions(figures: Figures) -> list[Sequence[str]]:
    now = {"features": duration(figures.features_s), "weights": duration(figures.weights_s)}
    means = MEANINGS | ({"features": "age of the newest, an old click"} if figures.has_old_clicks else {})
    return [
        ("", "now", "p50", "p99", span(figures.spread_s)),
        *((name, now.get(name, ""), *bounded(figures.spreads.get(name, Spread())), means[name]) for name in SPREADS),
    ]


def _slowest(figures: Figures) -> str:
    workers, steps_per_s = figures.trainer_workers, figures.steps_per_s
    if not steps_per_s:
        return "-" if steps_per_s is None else "no steps"
    fastest = min(workers, key=lambda worker: workers[worker])
    slowest, _ = figures.slow_worker
    times = {worker: duration(share / steps_per_s) for worker, share in workers.items()}
    return f"slowest {slowest}: {times[slowest]} a step, fastest {fastest}: {times[fastest]}"


def _off(direction: str, clock: ClocksOff) -> str:
    words = "behind, or it came late" if direction == "behind" else direction
    return f"{far(clock.by_s)} {words}" if clock.by_s else words


def uptime(up_s: Mapping[str, float]) -> str:
    """Formats how long the loop has been up, and which processes have restarted since.

    >>> uptime({"stream": 720.0, "trainer": 718.0}), uptime({"stream": 720.0, "trainer": 8.0})
    ('up 12 min', 'up 12 min, trainer 8.0 s')
    """
    longest_s = max(up_s.values(), default=None)
    younger = [
        f"{name} {seconds(part_s)}" for name, part_s in up_s.items() if part_s < (longest_s or 0.0) - RESTARTED_S
    ]
    return ", ".join([f"up {seconds(longest_s)}", *younger])


def bounded(spread: Spread) -> tuple[str, str]:
    """Formats median and 99th percentile, with `>` if they exceed the highest bucket.

    >>> bounded(Spread(100, 0.004, 5.0, most=5.0)), bounded(Spread())
    (('4.0 ms', '> 5.0 s'), ('-', '-'))
    """
    p50, p99 = (
        ("> " if value is not None and value >= spread.most else "") + duration(value)
        for value in (spread.p50, spread.p99)
    )
    return p50, p99


def reasons(dead: Mapping[str, float]) -> str:
    """Formats dead letters since the start by reason, the most frequent first.

    >>> reasons({"implausible_time": 10.0, "missing_field": 2.0}), reasons({})
    ('12: 10 implausible_time, 2 missing_field', 'none since the start')
    """
    if not any(dead.values()):
        return "none since the start"
    reasons = [f"{shown(count)} {reason}" for reason, count in dead.items() if count]
    more = [f"{len(reasons) - MOST_REASONS} more"] if len(reasons) > MOST_REASONS else []
    return f"{shown(sum(dead.values()))}: {', '.join([*reasons[:MOST_REASONS], *more])}"


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
    for column, cell in enumerate(cells):
        if cell:
            start = sum(columns[:column])
            line = (line.ljust(start) if len(line) < start or not line else f"{line}  ") + cell
    return line


def panel(snapshot: Snapshot, hints: Sequence[tuple[str, str]] = (), workers: int = 1) -> list[str]:
    """Returns the lines of the screen; `hints` are labels, each with what to type or to open."""
    return [
        *lines(_happenings(snapshot, workers)),
        "",
        *lines(_distributions(snapshot.figures), DISTRIBUTIONS),
        *(["", *lines(hints)] if hints else []),
    ]


def lines(cells: Sequence[Sequence[str]], columns: Sequence[int] = HAPPENINGS) -> list[str]:
    """Formats lines with their cells in columns."""
    return [aligned(row, columns) for row in cells]


def live_line(snapshot: Snapshot) -> str:
    """Formats a snapshot as one line.

    >>> figures = Figures({"stream": 9.0}, events_per_s=200.0, lag_events=3.0, version=17.0, epoch=1.0, features_s=0.21)
    >>> live_line(Snapshot(figures))
    '200 events/s, lag 3 | version 17, epoch 1 | features 0.2 s, weights - old | log loss -'
    """
    figures = snapshot.figures
    # A terminal cuts off the end, so problems come first.
    parts = [
        *(problem.text for problem in snapshot.problems),
        f"{rate(figures.events_per_s, 'events')}, lag {shown(figures.lag_events)}",
        f"version {shown(figures.version, '')}, epoch {shown(figures.epoch)}",
        f"features {seconds(figures.features_s)}, weights {seconds(figures.weights_s)} old"
        + " (old clicks)" * figures.has_old_clicks,
        f"log loss {decimal(figures.log_loss, 2)}",
    ]
    return " | ".join(parts)


class Screen:
    """Writes permanent lines and, on a terminal, redraws the view below them."""

    def __init__(
        self, out: TextIO | None = None, size: Callable[[], os.terminal_size] = shutil.get_terminal_size
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._size = size
        self._open = 0
        self.terminal = self._out.isatty()

    @property
    def every_s(self) -> float:
        """Time between views; longer without a terminal, because each view is then a permanent line."""
        return EVERY_S if self.terminal else EVERY_QUIET_S

    def say(self, text: str) -> None:
        """Writes a permanent line."""
        self._write(self._erase() + text + "\n")
        self._open = 0

    def live(self, line: str, panel: Sequence[str] = ()) -> None:
        """Redraws the view: the panel if it fits, otherwise the line; without a terminal, writes the line."""
        if not self.terminal:
            self.say(line)
            return
        columns, lines = self._size()
        fits = bool(panel) and columns >= LEAST_COLUMNS and lines >= len(panel) + LINES_AROUND
        wanted = ["", *panel] if fits else [line]
        # A line as wide as the terminal would wrap, and the next view would start at the wrong line.
        text = "\n".join(part[: max(1, columns - 1)] for part in wanted)
        self._write(self._erase() + text)
        self._open = len(wanted)

    def _erase(self) -> str:
        if not self._open:
            return ""
        up = f"\x1b[{self._open - 1}A" if self._open > 1 else ""
        return f"\r{up}\x1b[J"

    def _write(self, text: str) -> None:
        # A closed terminal must not prevent the loop from stopping in order.
        with contextlib.suppress(OSError):
            self._out.write(text)
            self._out.flush()
