"""What a scrape costs: its share of a core where each process is asked every 15 seconds, and every 5 as `deploy/prometheus` does.

A process with as many series as one may have (300, which tests hold each real
process to), half of them buckets with exemplars, is asked over HTTP, in text
and in OpenMetrics; and so are the sums of four workers. Measured is the
processor time of the process that answers, so that the load of the machine
counts for little.

    python -m tests.bench.scrape [--scrapes 300]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest, start_http_server

from deploy.kafka.configuration import free_port
from deploy.serving.requests.worker_metrics import of_all_workers, rendered
from deploy.serving.requests.workers import COUNTERS, count_as, make_counters
from state.metrics import ANSWER_SECONDS, ANSWERING_ROUTES, WorkerMetrics, add_process
from tests.bench.report import Figure, Stages, report

SERIES = 300
WORKERS = 4
TEXT = "text/plain; version=0.0.4"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
EVERY_S = 15.0
OURS_S = 5.0

progress = Stages("scrape")


def fill(registry: CollectorRegistry) -> int:
    """Adds series until there are `SERIES`; returns how many there are."""
    add_process(registry)
    times = Histogram("bench_seconds", "Half of them.", ["route"], buckets=ANSWER_SECONDS, registry=registry)
    for number in range(SERIES // 2 // (len(ANSWER_SECONDS) + 3)):
        for took_s in (*ANSWER_SECONDS, 60.0):
            times.labels(f"route-{number}").observe(took_s, {"version": "12345"})
    left = SERIES - count(generate_latest(registry))
    gauge = Gauge("bench_value", "The rest.", ["kind"], registry=registry)
    for number in range(left):
        gauge.labels(f"kind-{number}").set(number / 7)
    return count(generate_latest(registry))


def count(text: bytes) -> int:
    """The series of a text."""
    return sum(not line.startswith(b"#") for line in text.splitlines())


def answer(port: int, folder: str) -> None:
    """Is a process that is asked, until it is ended: a single one, or with a folder of counters the first of four workers."""
    registry = CollectorRegistry()
    if folder:
        os.environ[COUNTERS] = folder
        for number in range(WORKERS):
            count_as(number)
            own = CollectorRegistry()
            metrics = WorkerMetrics(own)
            for route in ANSWERING_ROUTES:
                metrics.requests.labels(route, "200").inc()
                metrics.request_seconds.labels(route).observe(0.004, {"version": "12345"})
        registry = of_all_workers(own)
    else:
        fill(registry)
    start_http_server(port, addr="127.0.0.1", registry=registry)
    print("ready", flush=True)
    sys.stdin.read()


@contextmanager
def asked(folder: str = "") -> Iterator[tuple[int, psutil.Process]]:
    """Such a process and its port."""
    port = free_port()
    line = [sys.executable, "-m", "tests.bench.scrape", "--answer", str(port), "--counters", folder]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    yield port, psutil.Process(process.pid)
    process.stdin.close()
    process.wait()


def cost_s(port: int, process: psutil.Process, accept: str, scrapes: int) -> float:
    """Processor time of one scrape."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"accept": accept})
    before = process.cpu_times()
    for _ in range(scrapes):
        with urllib.request.urlopen(request) as answered:
            body = answered.read()
    after = process.cpu_times()
    assert (b'version="12345"} ' in body) == (accept == OPENMETRICS)
    return (after.user + after.system - before.user - before.system) / scrapes


def main(scrapes: int) -> None:
    """Measures and reports."""
    registry = CollectorRegistry()
    figures = {"series": Figure(fill(registry), "series")}
    with tempfile.TemporaryDirectory(prefix="springtide-bench-") as folder:
        make_counters(Path(folder, "counters"), WORKERS)
        cases = {"one process": "", f"sums of {WORKERS} workers": str(Path(folder, "counters"))}
        for name, counters in cases.items():
            with asked(counters) as (port, process):
                for kind, accept in (("text", TEXT), ("OpenMetrics", OPENMETRICS)):
                    progress.say(f"{name}, {kind}")
                    took_s = cost_s(port, process, accept, scrapes)
                    figures[f"{name}, {kind}"] = Figure(1000 * took_s, "ms of cpu")
                    for every_s in (EVERY_S, OURS_S):
                        figures[f"{name}, {kind}, every {every_s:.0f} s"] = Figure(
                            100 * took_s / every_s, "% of a core", "<= 2"
                        )
    assert rendered(registry, OPENMETRICS)[0].count(b"12345") > 0
    report("scrape", figures, {"scrapes": scrapes})


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--scrapes", type=int, default=300)
    flags.add_argument("--answer", type=int, default=0, help="be the process that is asked, on this port")
    flags.add_argument("--counters", default="", help="of several workers")
    given = flags.parse_args()
    if given.answer:
        answer(given.answer, given.counters)
    else:
        main(given.scrapes)
