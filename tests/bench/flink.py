"""The stream on a local Flink cluster: latency, processor time, and what must not grow in a job that runs for long.

    python -m tests.bench.flink [--rate EVENTS] [--seconds S] [--users N]

The job is handed in by its command. Latency is that of `tests.bench.stream`;
processor time is the TaskManager's and its Python worker's. Histories grow until
each user's is full; the state of all other steps must not, nor the heap then.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil

from deploy.flink.command import end_jobs
from deploy.local_kafka import Broker
from state.config.sections import Kafka, Paths, Stream
from state.config.settings import Settings
from state.errors import FlinkFailed
from state.events.identity import load_salt
from state.flink import JobManager, url
from state.log import Topics
from state.process.network import free_port
from tests.bench.report import Figure, Stages, report
from tests.bench.stream import PARTITIONS, Clicks, latency_ms
from tests.e2e.flink.cluster import UP_S, LocalFlink
from tests.e2e.flink.test_flink import handed_in
from tests.e2e.running import until

EVERY_S = 2.0
MINUTE = 30  # looks
WARM_S = 10.0
HISTORIES = "Update buckets"


class Look(NamedTuple):
    """The job at a moment.

    Attributes:
        cpu_s: Of the TaskManager and its worker so far.
        heap_bytes: Used of the TaskManager's.
        checkpoint_bytes: Of the newest one.
        other_bytes: Of it, of all steps but that of the histories.
        manager_bytes: Resident memory of the TaskManager.
        worker_bytes: Of its Python worker, which has the histories.
    """

    cpu_s: float
    heap_bytes: float
    checkpoint_bytes: int
    other_bytes: int
    manager_bytes: int
    worker_bytes: int


class Looking(threading.Thread):
    """Looks at a running job now and then.

    Args:
        flink: Its cluster.
    """

    def __init__(self, flink: LocalFlink) -> None:
        super().__init__(daemon=True)
        self._url, self.looks = url(flink.settings), list[Look]()
        self._processes = [psutil.Process(flink.pids(name)[0]) for name in ("task-manager", "worker")]
        self._job = JobManager(self._url).running()[0]
        (self._manager,) = (one["id"] for one in self._ask("/taskmanagers")["taskmanagers"])
        steps = self._ask(f"/jobs/{self._job}")["vertices"]
        self._others = [one["id"] for one in steps if HISTORIES not in one["name"]]
        self._stages = Stages("flink", 30.0)
        self.ended = threading.Event()

    def run(self) -> None:
        """Looks, until it has ended."""
        while not self.ended.wait(EVERY_S):
            with suppress(httpx.HTTPError):
                self.looks.append(self.look())
                self._stages.say("running", str(self.looks[-1]))

    def look(self) -> Look:
        """The job now."""
        times = [one.cpu_times() for one in self._processes]
        (heap,) = self._ask(f"/taskmanagers/{self._manager}/metrics?get=Status.JVM.Memory.Heap.Used")
        newest = self._ask(f"/jobs/{self._job}/checkpoints")["latest"]["completed"]
        details = self._ask(f"/jobs/{self._job}/checkpoints/details/{newest['id']}")
        return Look(
            sum(one.user + one.system for one in times),
            float(heap["value"]),
            newest["state_size"],
            sum(details["tasks"][one]["state_size"] for one in self._others),
            *(process.memory_info().rss for process in self._processes),
        )

    def _ask(self, path: str) -> Any:
        return httpx.get(self._url + path, timeout=30).raise_for_status().json()


def has_checkpoint(jobs: JobManager) -> bool:
    """Whether a job has one; a JobManager that is busy with beginning it may not answer."""
    with suppress(FlinkFailed):
        return any(job.checkpoint for job in jobs.overview().jobs)
    return False


def measured(flink: LocalFlink, settings: Settings, rate: int, seconds: float, users: int) -> dict[str, Figure]:
    """The figures of a job on a cluster that runs."""
    clicks = Clicks(users)
    with handed_in(flink, settings, flink.output.with_name("job.log")):
        jobs = JobManager(url(flink.settings))
        until(lambda: has_checkpoint(jobs), "the job has no checkpoint", UP_S)
        latency_ms(settings.kafka, clicks, rate, WARM_S)
        looking = Looking(flink)
        looking.start()
        before, begun_s = looking.look(), time.perf_counter()
        waits = latency_ms(settings.kafka, clicks, rate, seconds)
        after, took_s = looking.look(), time.perf_counter() - begun_s
        looking.ended.set()
        looking.join()
        end_jobs(jobs, print)
    looks = looking.looks
    first, last = looks[:MINUTE], looks[-MINUTE:]
    mb = 2**20
    return {
        "acknowledged to readable, p50": Figure(float(np.percentile(waits, 50)), "ms"),
        "acknowledged to readable, p99": Figure(float(np.percentile(waits, 99)), "ms"),
        "TaskManager and worker": Figure(len(waits) / (after.cpu_s - before.cpu_s), "events/cpu-s"),
        "of a core": Figure((after.cpu_s - before.cpu_s) / took_s, "ratio"),
        "memory of the TaskManager": Figure(after.manager_bytes / mb, "MiB"),
        "memory of the worker": Figure(after.worker_bytes / mb, "MiB"),
        "state beside the histories, at first": Figure(first[0].other_bytes / 1000, "kB"),
        "state beside the histories, at last": Figure(last[-1].other_bytes / 1000, "kB"),
        "checkpoint, least of the first minute": Figure(min(one.checkpoint_bytes for one in first) / mb, "MiB"),
        "checkpoint, least of the last minute": Figure(min(one.checkpoint_bytes for one in last) / mb, "MiB"),
        "heap, least of the first minute": Figure(min(one.heap_bytes for one in first) / mb, "MiB"),
        "heap, least of the last minute": Figure(min(one.heap_bytes for one in last) / mb, "MiB"),
    }


def main() -> None:
    """Runs the benchmark."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--rate", type=int, default=5000)
    flags.add_argument("--seconds", type=float, default=60.0)
    flags.add_argument("--users", type=int, default=20_000)
    wanted = flags.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="springtide-bench-"))
    broker = Broker(folder / "kafka", free_port(), heap_mb=512)
    flink = LocalFlink(folder)
    broker.start()
    try:
        kafka = Kafka(bootstrap_servers=broker.bootstrap_servers, clicks_partitions=PARTITIONS)
        settings = Settings(kafka=kafka, paths=Paths(state=str(folder / "state")), stream=Stream(metrics_port=0))
        load_salt(settings.salt_path)
        with Topics(kafka) as topics:
            topics.ensure(kafka.clicks_topic, PARTITIONS)
        flink.start()
        figures = measured(flink, settings, wanted.rate, wanted.seconds, wanted.users)
        report("flink", figures, vars(wanted) | {"partitions": PARTITIONS, "buckets": settings.stream.buckets})
    finally:
        flink.close()
        broker.stop()


if __name__ == "__main__":
    main()
