"""The content of a worker's /metrics: its own metrics if it is the only worker, else those of all workers combined."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from state.metrics import OF_ANY_PROCESS


def told(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Renders metrics in a format that the client accepts: OpenMetrics with exemplars, or Prometheus text.

    Returns:
        The rendered metrics and their media type.

    >>> told(CollectorRegistry(), "application/openmetrics-text; version=1.0.0")[0].decode().strip()
    '# EOF'
    >>> told(CollectorRegistry(), "*/*")[1]
    'text/plain; version=0.0.4; charset=utf-8'
    """
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def of_all_workers(own: CollectorRegistry) -> CollectorRegistry:
    """Returns the combined metrics of all workers with the same parent process.

    Args:
        own: This worker's metrics. Exemplars come only from these, because they are not written to files.
    """
    registry = CollectorRegistry()
    registry.register(Summed(own))
    registry.register(Processes())
    return registry


class Summed(Collector):
    """Collects the sums over all workers, from their metric files.

    Args:
        own: This worker's metrics.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own

    def collect(self) -> Iterator[Metric]:
        """Yields each metric family, with this worker's exemplars."""
        exemplars = {
            (one.name, frozenset(one.labels.items())): one.exemplar
            for family in self._own.collect()
            for one in family.samples
            if one.exemplar is not None
        }
        for family in MultiProcessCollector(None).collect():
            family.samples = [
                one._replace(exemplar=exemplars.get((one.name, frozenset(one.labels.items()))))
                for one in family.samples
            ]
            yield family


class Processes(Collector):
    """Collects total CPU time, memory and files of the workers and their parent; CPU time includes ended workers."""

    def collect(self) -> Iterator[Metric]:
        """Yields the families of `OF_ANY_PROCESS`."""
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
        found = {
            "process_cpu_seconds_total": cpu_s,
            "process_resident_memory_bytes": memory,
            "process_virtual_memory_bytes": mapped,
            "process_start_time_seconds": parent.create_time(),
            "process_open_fds": files,
            "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        }
        for name, value in found.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(name, OF_ANY_PROCESS[name], value=value)
