"""Collects the data that the console shows: an hour of figures for its curves and a day of problems, in memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy import sections, status
from deploy.watch.figures import Figures, Spread
from deploy.watch.snapshot import Poller, Problem, Snapshot
from state.config.settings import Settings
from state.process.log_lines import SaidOnce

EVERY_S = 5.0
KEEP_S = 3600.0

CURVES = (
    "events_per_s",
    "microbatches_per_s",
    "rows_per_s",
    "steps_per_s",
    "answers_per_s",
    "failed_per_s",
    "dead_per_s",
    "lag_events",
    "trainer_lag",
    "serving_lag",
    "features_s",
    "weights_s",
    "log_loss",
    "auc",
    "top1",
    "version",
    "newest_version",
)
"""The figures with a curve; each is a field of `Figures`."""
QUANTILES: Mapping[str, tuple[str, str]] = {
    "answer_p50_s": ("answer", "p50"),
    "answer_p99_s": ("answer", "p99"),
    "step_p50_s": ("step", "p50"),
}
"""Curve -> the histogram and its quantile."""
LIFT = "lift_top1"
"""Curve of the model's top-1 hit rate compared with the best simple baseline."""
DAY_MS, MOST_PROBLEMS = 86_400_000, 200
ENDED_MS = 60_000
"""A problem that was not seen for this long has ended; if it returns, it is another one."""
STARTS = "a-process-starts"
"""Section of the runbook for processes that start: no problem of the past."""
WATCHED_S = 20.0
"""How long after a request the console counts as open."""
POLL_S = 1.0
SECTIONS_S = 15.0
AWAY_S = 5.0
"""Interval of reads while Kafka is unreachable."""
_log = logging.getLogger(__name__)


class Curves:
    """The newest points, at least `every_s` apart. One thread adds, others read."""

    def __init__(self, every_s: float = EVERY_S, keep_s: float = KEEP_S) -> None:
        self._every_ms = round(every_s * 1000)
        self._points: deque[tuple[int, tuple[float | None, ...]]] = deque(maxlen=int(keep_s / every_s))

    def add(self, at_ms: int, figures: Figures, lift: float | None = None) -> bool:
        """Adds a point if one is due, and returns whether it did. `lift` is the model's, about 0 to 1."""
        if self._points and 0 <= at_ms - self._points[-1][0] < self._every_ms:
            return False
        values = [_rounded(getattr(figures, name)) for name in CURVES]
        for spread, quantile in QUANTILES.values():
            values.append(_rounded(getattr(figures.spreads.get(spread, Spread()), quantile)))
        self._points.append((at_ms, (*values, _rounded(lift))))
        return True

    def document(self, after_ms: int = 0) -> dict[str, Any]:
        """Returns the points after a moment as JSON values: `at_ms`, and as many values of each curve.

        >>> kept = Curves(1.0)
        >>> kept.add(1000, Figures(lag_events=7.0)), kept.add(1200, Figures()), kept.add(2000, Figures())
        (True, False, True)
        >>> kept.document(1500)["at_ms"], kept.document()["curves"]["lag_events"]
        ([2000], [7.0, None])
        """
        points = [point for point in list(self._points) if point[0] > after_ms]
        names = (*CURVES, *QUANTILES, LIFT)
        return {
            "at_ms": [at_ms for at_ms, _ in points],
            "curves": {name: [values[place] for _, values in points] for place, name in enumerate(names)},
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


@dataclass
class PastProblem:
    """A problem from when it was first seen until it was last seen, ms since 1970, with its newest text."""

    problem: Problem
    first_ms: int
    last_ms: int


class PastProblems:
    """The problems of the last day, at most `MOST_PROBLEMS`. One thread adds, others read."""

    def __init__(self, since_ms: int) -> None:
        self._since_ms = since_ms
        self._problems: list[PastProblem] = []

    def add(self, at_ms: int, problems: Sequence[Problem]) -> None:
        """Adds what is wrong at a moment; the same section and stage is the same problem, whatever its figures."""
        kept = [past for past in self._problems if past.last_ms >= at_ms - DAY_MS]
        open_ones = {
            (past.problem.section, past.problem.stage): past for past in kept if past.last_ms >= at_ms - ENDED_MS
        }
        for problem in problems:
            past = open_ones.get((problem.section, problem.stage))
            if past is None:
                past = open_ones[problem.section, problem.stage] = PastProblem(problem, at_ms, at_ms)
                kept.append(past)
            past.problem, past.last_ms = problem, at_ms
        self._problems = kept[-MOST_PROBLEMS:]

    def document(self, now_ms: int) -> dict[str, Any]:
        """Returns the problems as JSON values, the oldest first; `open` is whether one has not ended.

        >>> past = PastProblems(0)
        >>> past.add(1000, [Problem("warning", "7% dead letters", "dead-letters", "clicks")])
        >>> past.add(9000, [Problem("warning", "9% dead letters", "dead-letters", "clicks")])
        >>> (found,) = past.document(10_000)["problems"]
        >>> found["text"], found["first_ms"], found["last_ms"], found["open"], past.document(99_000)["problems"][0]["open"]
        ('9% dead letters', 1000, 9000, True, False)
        """
        return {
            "since_ms": max(self._since_ms, now_ms - DAY_MS),
            "problems": [
                past.problem.to_json()
                | {"first_ms": past.first_ms, "last_ms": past.last_ms, "open": past.last_ms >= now_ms - ENDED_MS}
                for past in list(self._problems)
            ],
        }


class LoopWatch:
    """Polls the loop in its own threads; `stores` is held while a store is open."""

    def __init__(self, settings: Settings, stores: threading.Lock, now_ms: Callable[[], int]) -> None:
        self._settings, self._stores, self._now_ms = settings, stores, now_ms
        self._poller, self.curves = Poller(settings, now_ms=now_ms), Curves()
        self._past = PastProblems(now_ms())
        self._requested_s = self._sections_s = float("-inf")
        self._sections: dict[str, Any] | None = None
        self._snapshot: Snapshot | None = None
        self._wanted, self._stopping = threading.Event(), threading.Event()
        self._log_once = SaidOnce(_log.error)
        self._polling, self._reading = threading.Lock(), threading.Lock()

    def start(self) -> None:
        """Starts polling."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        threading.Thread(target=self._run_sections, name="sections", daemon=True).start()

    def stop(self) -> None:
        """Stops polling."""
        self._stopping.set()
        self._wanted.set()

    def poll(self) -> Snapshot:
        """Polls the processes' metrics once."""
        with self._polling:
            snapshot = self._poller.poll()
            compared = sections.quality(snapshot.scrapes["trainer"])
            self.curves.add(snapshot.at_ms, snapshot.figures, None if compared is None else compared["lift"]["top1"])
            self._snapshot = snapshot
            is_fresh = self._sections is not None and time.monotonic() - self._sections_s < 2 * SECTIONS_S
            whole = snapshot.having(self._sections or {}) if is_fresh else snapshot
            self._past.add(snapshot.at_ms, [problem for problem in whole.faults if problem.section != STARTS])
            return snapshot

    def past_problems(self) -> dict[str, Any]:
        """Returns the problems of the last day, or since the start if that is later."""
        return self._past.document(self._now_ms())

    def changed(self) -> None:
        """Makes the sections be read again soon, after a change by an operator."""
        self._sections_s = float("-inf")

    def read_sections(self) -> dict[str, Any]:
        """Reads the sections once."""
        with self._reading:
            with self._stores:
                self._sections = sections.read(self._settings, self._now_ms())
            self._sections_s = time.monotonic()
            return self._sections

    def state(self) -> dict[str, Any]:
        """Returns the document of `springtide status -o json`, with the time of the poll and the age of the sections."""
        self._requested_s = time.monotonic()
        self._wanted.set()
        snapshot = self._snapshot or self.poll()
        snapshot = snapshot.having(self._sections or self.read_sections())
        return status.document(self._settings, snapshot) | {
            "at_ms": snapshot.at_ms,
            "sections_age_s": round(time.monotonic() - self._sections_s, 1),
        }

    def _is_open(self) -> bool:
        return time.monotonic() - self._requested_s < WATCHED_S

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._attempt(self.poll)
            if self._is_open():
                self._stopping.wait(POLL_S)
            else:
                self._wanted.clear()
                self._wanted.wait(EVERY_S)

    def _run_sections(self) -> None:
        while not self._stopping.wait(POLL_S):
            every_s = SECTIONS_S if self._sections is None or self._sections["kafka"]["answers"] else AWAY_S
            if self._is_open() and time.monotonic() - self._sections_s >= every_s:
                self._attempt(self.read_sections)

    def _attempt(self, work: Callable[[], object]) -> None:
        """Runs `work`; a failure is logged once, the last figures stay, and the next call tries again."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the edge of the thread
            self._log_once(f"the loop could not be polled: {type(error).__name__}: {error}")
