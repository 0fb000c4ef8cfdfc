"""Counts a worker's requests over any protocol and times them; some of them name the version that answered.

Only routes that a version answers are timed apart, so that a worker has few
series. In OpenMetrics a bucket shows one request of its own as an exemplar:
the newest that was noted, at most one a second, so that it costs other
requests nothing.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from state.metrics import ANSWER_SECONDS, ANSWERING_ROUTES, OTHER_ROUTES, WorkerMetrics

EXEMPLAR_S = 1.0


class RequestCounts:
    """The requests of one protocol; use it in one event loop.

    Args:
        metrics: Of the worker.
        version: The version that it answered with last; None before its first answer.
        clock_s: A monotonic clock.
    """

    def __init__(
        self,
        metrics: WorkerMetrics,
        version: Callable[[], int | None],
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._metrics, self._version, self.clock_s = metrics, version, clock_s
        self._series: dict[tuple[str, str | int], tuple[Any, Any]] = {}
        self._due_s: dict[tuple[Any, int], float] = {}

    def count(self, route: str, code: str | int, began_s: float) -> None:
        """Counts a request that was answered with `code` just now.

        Args:
            route: Its endpoint or method.
            code: Of HTTP or gRPC.
            began_s: When it came, by the clock.
        """
        series = self._series.get((route, code))
        if series is None:
            timed = route if route in ANSWERING_ROUTES else OTHER_ROUTES
            series = (self._metrics.requests.labels(route, str(code)), self._metrics.request_seconds.labels(timed))
            self._series[route, code] = series
        now_s = self.clock_s()
        series[0].inc()
        series[1].observe(now_s - began_s, self._exemplar(series[1], now_s - began_s, now_s))

    def _exemplar(self, series: Any, took_s: float, now_s: float) -> dict[str, str] | None:
        bucket = (series, bisect_left(ANSWER_SECONDS, took_s))
        if now_s < self._due_s.get(bucket, now_s):
            return None
        self._due_s[bucket] = now_s + EXEMPLAR_S
        version = self._version()
        return None if version is None else {"version": str(version)}
