"""A worker's metrics: counts and times requests, and renders /metrics, for one worker or all of a port combined."""

from __future__ import annotations

import os
import resource
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from state.metrics import ANSWER_SECONDS, ANSWERING_ROUTES, OF_ANY_PROCESS, OTHER_ROUTES, WorkerMetrics

EXEMPLAR_S = 1.0


class RequestCounts:
    """Counts and times the requests of one protocol, with exemplars that name the version. Used by one event loop.

    Only routes that a version answers have their own latency series. In OpenMetrics, each bucket shows a recent
    request as an exemplar, recorded at most once a second.

    `version` returns the version that the worker last answered with, if any.
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
        """Counts a request that has just been answered; `began_s` is its arrival by `clock_s`."""
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


def rendered(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Renders metrics in a format that the client accepts, and returns them and their media type.

    The formats are OpenMetrics with exemplars, and Prometheus text.

    >>> rendered(CollectorRegistry(), "application/openmetrics-text; version=1.0.0")[0].decode().strip()
    '# EOF'
    >>> rendered(CollectorRegistry(), "*/*")[1]
    'text/plain; version=0.0.4; charset=utf-8'
    """
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def of_all_workers(own: CollectorRegistry) -> CollectorRegistry:
    """Returns the combined metrics of all workers with the same parent process.

    Exemplars are only those of this worker, because they are not written to files.
    """
    registry = CollectorRegistry()
    registry.register(_Summed(own))
    registry.register(_Processes())
    return registry


class _Summed(Collector):
    """Sums the metric files of all workers, with the exemplars of `own`."""

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own

    def collect(self) -> Iterator[Metric]:
        exemplars = {
            (sample.name, frozenset(sample.labels.items())): sample.exemplar
            for family in self._own.collect()
            for sample in family.samples
            if sample.exemplar is not None
        }
        for family in MultiProcessCollector(None).collect():
            family.samples = [
                sample._replace(exemplar=exemplars.get((sample.name, frozenset(sample.labels.items()))))
                for sample in family.samples
            ]
            yield family


class _Processes(Collector):
    """Collects total CPU time, memory and files of the workers and their parent; CPU time includes ended workers."""

    def collect(self) -> Iterator[Metric]:
        parent = psutil.Process(os.getppid())
        cpu_s, memory, mapped, files = 0.0, 0, 0, 0
        for process in (parent, *parent.children()):
            try:
                with process.oneshot():
                    cpu, used, open_files = process.cpu_times(), process.memory_info(), process.num_fds()
            except psutil.NoSuchProcess:
                # Its CPU time is now part of its parent's.
                continue
            cpu_s += cpu.user + cpu.system + cpu.children_user + cpu.children_system
            memory, mapped, files = memory + used.rss, mapped + used.vms, files + open_files
        values = {
            "process_cpu_seconds_total": cpu_s,
            "process_resident_memory_bytes": memory,
            "process_virtual_memory_bytes": mapped,
            "process_start_time_seconds": parent.create_time(),
            "process_open_fds": files,
            "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        }
        for name, value in values.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name, OF_ANY_PROCESS[name], value=value)
