"""The stream alone, Kafka to micro-batches: events/s against a floor that only reads, and latency at 5k events/s.

    python -m tests.bench.stream [--events N] [--users N] [--seconds S] [--quixstreams PYTHON]

The topic is preloaded; the real process drains it. Rate and CPU are taken over
the middle of the run, so that start and end do not count. Latency is from the
acknowledgement of a click to the poll that could read its micro-batch. The
first 4 seconds do not count: `/metrics` answers before the stream reads, and
this process loads its own reader and writer. A second of waiting for them, as
5 % of a run of 20 seconds, was the 99th percentile. With `--quixstreams`, an
interpreter that has quixstreams, that peer reads the same topic.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

from deploy.local_kafka import Broker
from state.config.sections import Kafka, Paths, Stream
from state.config.settings import Settings
from state.log import Reader, Topics, partition_of
from state.log.bulk import BulkWriter
from state.microbatch.codec import decode
from state.process.environment import wall_ms
from state.process.network import free_port
from tests.bench.report import Figure, report
from tests.reading import append_encoded

PARTITIONS = 4
CHUNK = 20_000
PACE_S = 0.01
WARM_UP_S = 4.0


class Clicks:
    """Encoded clicks of shoppers, whose activity follows a Zipf law.

    Args:
        users: How many shoppers.
        seed: Of their choices.
    """

    def __init__(self, users: int, seed: int = 7) -> None:
        self._rng = np.random.default_rng(seed)
        weights = 1.0 / np.arange(1, users + 1) ** 0.7
        self._cumulative = np.cumsum(weights / weights.sum())
        self._partition_of = [partition_of(f"user-{user}".encode(), PARTITIONS) for user in range(users)]

    def take(self, count: int, now_ms: int) -> tuple[list[bytes], list[bytes], np.ndarray, list[int]]:
        """`count` clicks at `now_ms`: keys, values, timestamps, partitions."""
        users = np.searchsorted(self._cumulative, self._rng.random(count)).tolist()
        items = self._rng.integers(0, 4000, count).tolist()
        actions = self._rng.choice(["view", "favorite", "cart", "purchase"], count, p=[0.8, 0.08, 0.08, 0.04]).tolist()
        values = [
            b'{"user":"user-%d","item":"item-%d","category":"category-%d","action":"%s","time":%d}'
            % (user, item, item % 64, action.encode(), now_ms)
            for user, item, action in zip(users, items, actions, strict=True)
        ]
        keys = [b"user-%d" % user for user in users]
        return keys, values, np.full(count, now_ms, np.int64), [self._partition_of[user] for user in users]


def passed(settings: Settings) -> float:
    """Positions that the stream has committed, from its /metrics."""
    text = httpx.get(f"http://127.0.0.1:{settings.stream.metrics_port}/metrics").text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("springtide_stream_events_total{")
    )


def start(settings: Settings) -> subprocess.Popen[bytes]:
    """The stream's process, once it answers on /metrics."""
    env = {**os.environ, **settings.environment()}
    process = subprocess.Popen([sys.executable, "-m", "streaming.pipeline"], env=env)
    end_s = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end_s:
        try:
            passed(settings)
            return process
        except httpx.TransportError:
            threading.Event().wait(0.05)
    raise SystemExit("the stream did not start")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the stream cleanly."""
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def floor(kafka: Kafka, events: int) -> tuple[float, float]:
    """Reading only: events per second of wall time and of CPU."""
    with Reader(kafka, kafka.clicks_topic) as reader:
        wall_s, cpu_s, seen = time.perf_counter(), time.process_time(), 0
        while seen < events:
            seen += sum(len(batch) for batch in reader.poll(0.1, 1000))
        return events / (time.perf_counter() - wall_s), events / (time.process_time() - cpu_s)


def drain(settings: Settings, events: int) -> dict[str, float]:
    """The real process drains the topic; events/s and events/cpu-s between 15 % and 95 %."""
    process = start(settings)
    seen: list[tuple[float, float, float]] = []
    target = psutil.Process(process.pid)
    while process.poll() is None:
        done = passed(settings)
        times = target.cpu_times()
        seen.append((time.perf_counter(), done, times.user + times.system))
        if done >= events:
            break
        threading.Event().wait(0.1)
    memory = target.memory_info().rss
    stop(process)
    middle = [one for one in seen if 0.15 * events <= one[1] <= 0.97 * events]
    (from_s, from_n, from_cpu), (to_s, to_n, to_cpu) = middle[0], middle[-1]
    return {
        "rate": (to_n - from_n) / (to_s - from_s),
        "cpu_rate": (to_n - from_n) / (to_cpu - from_cpu),
        "memory": memory / 2**20,
    }


def peer(python: str, kafka: Kafka, events: int) -> float:
    """Events per cpu-second of quixstreams on the same topic, see `tests.bench.peers.windows_quixstreams`."""
    words = ("-m", "tests.bench.peers.windows_quixstreams", kafka.bootstrap_servers, kafka.clicks_topic, str(events))
    done = subprocess.run([python, *words], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def latency_ms(kafka: Kafka, clicks: Clicks, rate: int, seconds: float) -> np.ndarray:
    """Acknowledged to readable, ms, of the clicks sent at `rate` for `seconds` after `WARM_UP_S` of warming up."""
    acknowledged: dict[int, list[tuple[int, float]]] = {number: [] for number in range(PARTITIONS)}
    readable: dict[int, list[tuple[int, float]]] = {number: [] for number in range(PARTITIONS)}
    with Topics(kafka) as topics:
        ends = {partition: end for partition, (_, end) in topics.ends(kafka.clicks_topic).items()}
    goal = dict(ends)
    finished = threading.Event()

    with Topics(kafka) as topics:
        written = {partition: end for partition, (_, end) in topics.ends(kafka.microbatches_topic).items()}

    def follow() -> None:
        with Reader(kafka, kafka.microbatches_topic, positions=written) as reader:
            while not (finished.is_set() and all(readable[one] and readable[one][-1][0] >= goal[one] for one in goal)):
                for batch in reader.poll(0.1):
                    arrived_s = time.perf_counter()
                    for value in batch.values:
                        for part in decode(value or b"").header.ranges:
                            readable[part.source.partition].append((part.next, arrived_s))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    with BulkWriter(kafka, kafka.clicks_topic) as writer:
        begun_s, sent = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - begun_s) < WARM_UP_S + seconds:
            count = int(elapsed_s * rate) - sent
            if count > 0:
                batch = clicks.take(count, wall_ms())
                append_encoded(writer, *batch)
                done_s = time.perf_counter()
                sent += count
                for partition, gained in zip(*np.unique(batch[3], return_counts=True), strict=True):
                    goal[int(partition)] += int(gained)
                    acknowledged[int(partition)].append((goal[int(partition)], done_s))
            threading.Event().wait(PACE_S)
    finished.set()
    follower.join(30)
    waits = []
    for partition, marks in acknowledged.items():
        nexts = np.array([mark for mark, _ in readable[partition]])
        times = np.array([at_s for _, at_s in readable[partition]])
        before = ends[partition]
        for mark, acknowledged_s in marks:
            # Every click of this append is readable with the first range that passes its last one at the latest.
            index = int(np.searchsorted(nexts, mark))
            if acknowledged_s >= begun_s + WARM_UP_S:
                waits.extend([times[index] - acknowledged_s] * (mark - before))
            before = mark
    return np.array(waits) * 1000


def main() -> None:
    """Runs the benchmark."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--events", type=int, default=1_000_000)
    flags.add_argument("--users", type=int, default=20_000)
    flags.add_argument("--seconds", type=float, default=20.0)
    flags.add_argument("--quixstreams", metavar="PYTHON", help="an interpreter that has quixstreams, to compare with")
    wanted = flags.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="springtide-bench-"))
    broker = Broker(folder / "kafka", free_port(), heap_mb=512)
    broker.start()
    try:
        kafka = Kafka(bootstrap_servers=broker.bootstrap_servers, clicks_partitions=PARTITIONS)
        settings = Settings(
            kafka=kafka, paths=Paths(state=str(folder / "state")), stream=Stream(metrics_port=free_port())
        )
        with Topics(kafka) as topics:
            topics.ensure(kafka.clicks_topic, PARTITIONS)
        clicks = Clicks(wanted.users)
        with BulkWriter(kafka, kafka.clicks_topic) as writer:
            for _ in range(0, wanted.events, CHUNK):
                append_encoded(writer, *clicks.take(CHUNK, wall_ms()))
        reading, reading_cpu = floor(kafka, wanted.events)
        drained = drain(settings, wanted.events)
        beside = {}
        if wanted.quixstreams:
            theirs = peer(wanted.quixstreams, kafka, wanted.events)
            beside = {
                "quixstreams, CPU": Figure(theirs, "events/cpu-s"),
                "ratio to quixstreams": Figure(drained["cpu_rate"] / theirs, "ratio", ">= 4"),
            }
        process = start(settings)
        waits = latency_ms(kafka, clicks, 5000, wanted.seconds)
        stop(process)
        report(
            "stream",
            {
                "clicks to micro-batches": Figure(drained["rate"], "events/s", ">= 60000"),
                "clicks to micro-batches, CPU of the stream": Figure(drained["cpu_rate"], "events/cpu-s"),
                "floor: reading only": Figure(reading, "events/s"),
                "floor: reading only, CPU": Figure(reading_cpu, "events/cpu-s"),
                "share of the floor": Figure(drained["rate"] / reading, "ratio"),
                "acknowledged to readable at 5k events/s, p50": Figure(float(np.percentile(waits, 50)), "ms", "<= 130"),
                "acknowledged to readable at 5k events/s, p99": Figure(float(np.percentile(waits, 99)), "ms"),
                "memory of the stream": Figure(drained["memory"], "MiB"),
                **beside,
            },
            {
                "users": wanted.users,
                "events": wanted.events,
                "partitions": PARTITIONS,
                "cut_ms": settings.stream.cut_ms,
            },
        )
    finally:
        broker.stop()


if __name__ == "__main__":
    main()
