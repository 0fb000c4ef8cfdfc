"""Counts and times a worker's requests over any protocol, with exemplars that name the version that answered.

Only routes that a version answers have their own latency series, so a worker has
few series. In OpenMetrics, each bucket shows a recent request as an exemplar. An
exemplar is recorded at most once a second, so it costs other requests nothing.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from state.metrics import ANSWER_SECONDS, ANSWERING_ROUTES, OTHER_ROUTES, WorkerMetrics

EXEMPLAR_S = 1.0


class RequestCounts:
    """Counts and times the requests of one protocol. Used by one event loop.

    Args:
        metrics: The worker's metrics.
        version: The version that the worker last answered with; None before its first answer.
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
        """Counts a request that has just been answered with `code`.

        Args:
            route: The endpoint or method.
            code: The HTTP or gRPC status code.
            began_s: The arrival time, by `clock_s`.
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
