"""What /metrics of a worker says: where it is the only one its own metrics, else those of all workers together."""

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
    """The metrics in the form that a client accepts, and its media type: OpenMetrics with exemplars, or Prometheus's text.

    >>> told(CollectorRegistry(), "application/openmetrics-text; version=1.0.0")[0].decode().strip()
    '# EOF'
    >>> told(CollectorRegistry(), "*/*")[1]
    'text/plain; version=0.0.4; charset=utf-8'
    """
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def of_all_workers(own: CollectorRegistry) -> CollectorRegistry:
    """The metrics of all workers of this one's parent.

    Args:
        own: Those of this one, whose exemplars are told: they are in no file.
    """
    registry = CollectorRegistry()
    registry.register(Summed(own))
    registry.register(Processes())
    return registry


class Summed(Collector):
    """The sums of what all workers counted, in their files.

    Args:
        own: The metrics of this one.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own

    def collect(self) -> Iterator[Metric]:
        """Each family, with this worker's exemplars."""
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
    """Processor time, memory and files of the workers and their parent together; workers that ended still count."""

    def collect(self) -> Iterator[Metric]:
        """The families of `OF_ANY_PROCESS`."""
        parent = psutil.Process(os.getppid())
        cpu_s, memory, mapped, files = 0.0, 0, 0, 0
        for process in (parent, *parent.children()):
            try:
                with process.oneshot():
                    cpu, used, open_files = process.cpu_times(), process.memory_info(), process.num_fds()
            except psutil.NoSuchProcess:
                # Its time is its parent's from now on.
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
