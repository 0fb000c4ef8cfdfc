"""How fast a serving host without histories reads the training log and a snapshot, and what a snapshot costs its writer.

    python -m tests.bench.new_host [--users 100000] [--records 400] [--snapshot-users 1000000] [--events 64]

Records are half as large as the stream cuts them under load. The log is in memory, so that Kafka's client is left out. It
reads such a record in a fraction of the time of what follows. The stores are real and in memory, as the applier has
them; the snapshot is in a directory on the disk.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower
from state.config.settings import Settings
from state.features.spec import EVENT, Events, FeatureSpec
from state.file_store import DirectoryStore
from state.history import snapshots
from state.history.appends import Appends
from state.history.chunks import CHUNK, key_of, prefix_of
from state.history.snapshots import REBASED, Cut, Gained, SnapshotWriter
from state.history.store import HistoryStore
from state.layout import DATA
from state.log import topic_plan
from state.log.follow import Position
from state.metrics import ApplierMetrics
from state.microbatch.batch import Header
from state.microbatch.codec import encode
from state.positions import Range, Source
from state.user_shares import SHARES, UserShares
from tests.bench.report import Figure, Stages, report
from tests.memory_log import MemoryLog

SPEC, SETTINGS = FeatureSpec(), Settings()
# Numbers drawn alike compress less than those of clicks: a record of `stream.cut_rows` of them would be split.
ROWS = SETTINGS.stream.cut_rows // 2
SOURCE, TOPIC, START_MS = Source("ab" * 16, 0), SETTINGS.kafka.microbatches_topic, 1_790_000_040_000
MAP_BYTES = 16 << 30
PRIME = np.uint64(0x9E3779B97F4A7C15)
RECORD_MS = 750
"""Log time between two records."""
RATE, EVERY_S, TICK_S = 10_000, SETTINGS.history.snapshot_every_s, 5e-4


def record(number: int, known: NDArray[np.uint64], rng: np.random.Generator) -> bytes:
    """One of the log's records: rows of users who are drawn alike, `RECORD_MS` after the record before."""
    at_ms = START_MS + RECORD_MS * number
    places = (ROWS, SPEC.recent_categories)
    columns: dict[str, NDArray[Any]] = {
        "user": known[rng.integers(0, len(known), ROWS)],
        "item": rng.integers(1, 100_000, ROWS).astype(np.uint64),
        "category": rng.integers(1, 65, ROWS).astype(np.uint64),
        "action": rng.integers(0, 4, ROWS).astype(np.uint8),
        "at_ms": np.full(ROWS, at_ms),
        "label": np.full(ROWS, np.nan, np.float32),
        "weight": np.ones(ROWS, np.float32),
        "source": np.zeros(ROWS, np.uint16),
        "offset": np.arange(number * ROWS, (number + 1) * ROWS),
        "context": np.zeros((ROWS, 0), np.uint64),
        "features": rng.poisson(5, (ROWS, len(SPEC.names))).astype(np.uint16),
        "recent_categories": rng.integers(1, 65, places).astype(np.uint64),
        "category_windows": rng.poisson(2, (*places, len(SPEC.window_names))).astype(np.uint16),
    }
    source = Range(SOURCE, number * ROWS, (number + 1) * ROWS, rows=ROWS)
    return encode(Header(SPEC.digest, "0" * 16, (source,), at_ms, clocks=((at_ms - 1, at_ms),)), columns)


def read_log(users: int, records: int, folder: Path, progress: Stages) -> dict[str, Figure]:
    """Figures of a host that reads the whole training log, and of one that holds a sixteenth of the users."""
    rng, log = np.random.default_rng(7), MemoryLog(ids=lambda: "cd" * 16)
    known = np.arange(1, users + 1, dtype=np.uint64) * PRIME
    log.topics().ensure(*topic_plan.microbatches(SETTINGS))
    progress.say("writing the log")
    with log.writer() as writer:
        for number in range(records):
            writer.send(TOPIC, 0, None, record(number, known, rng))
    found = read_with(UserShares.of(range(SHARES)), log, users, records, folder / "all", progress)
    some = read_with(UserShares.of(range(SHARES // 16)), log, users, records, folder / "some", progress)
    return {**found, "a row, with a sixteenth of the users": some["a row"]}


def read_with(
    shares: UserShares, log: MemoryLog, users: int, records: int, path: Path, progress: Stages
) -> dict[str, Figure]:
    """Figures of a host that holds these shares of the users."""
    now_ms = START_MS + RECORD_MS * records
    store = HistoryStore(path, SPEC.history, MAP_BYTES, shares=shares)
    metrics = ApplierMetrics(CollectorRegistry())
    host = HistoryFollower(store, SETTINGS, metrics, lambda: now_ms)
    progress.say("reading it")
    host.connect(log, TOPIC)
    took, read, begun = [], 0, psutil.Process().memory_info().rss
    while read < records:
        before = time.process_time()
        read += host.step(0.0)
        took.append(time.process_time() - before)
    # The first steps compile.
    steady = took[len(took) // 4 :]
    rows = ROWS * records * len(steady) / len(took)
    size, events = (store.path / DATA).stat().st_size, min(SPEC.history * users, ROWS * records)
    grown = psutil.Process().memory_info().rss - begun
    host.disconnect()
    store.close()
    return {
        "rows into the histories": Figure(rows / sum(steady), "rows/cpu-s"),
        "a row": Figure(1e6 * sum(steady) / rows, "us"),
        "an event in the store": Figure(size / events, "bytes"),
        "memory, pages of the store among it": Figure(grown / 2**20, "MiB"),
    }


def clicks(count: int, first: int, rng: np.random.Generator) -> Events:
    """Events at the offsets from `first` on; items as a shop has them, few of them popular."""
    events = np.zeros(count, EVENT)
    item = np.minimum(rng.zipf(1.2, count), 100_000).astype(np.uint64)
    events["offset"] = np.arange(first, first + count)
    events["at_ms"], events["topic"] = START_MS + 9 * events["offset"], SOURCE.topic
    events["item"], events["category"] = item * PRIME, item % np.uint64(64) * PRIME
    events["action"] = rng.integers(0, 4, count)
    return events


def fill(store: HistoryStore, users: int, each: int, progress: Stages) -> NDArray[np.uint64]:
    """Gives each user so many events, spread over the whole log; returns the users, ascending."""
    rng, at_once = np.random.default_rng(7), 4096
    known = np.sort(rng.integers(1, 1 << 63, users).astype(np.uint64) * np.uint64(2))
    store.clear()
    for first in range(0, users, at_once):
        some = known[first : first + at_once]
        events = clicks(len(some) * each, 0, rng)
        events["offset"] = np.sort(rng.integers(0, users * each, (len(some), each)), axis=1).ravel()
        events["at_ms"] = START_MS + 9 * events["offset"]
        data, width = events.tobytes(), CHUNK * EVENT.itemsize
        entries = [
            (key_of(prefix_of(user), number), data[place : place + width])
            for at, user in enumerate(some.tolist())
            for number in reversed(range(each // CHUNK))
            for place in [(at * each + number * CHUNK) * EVENT.itemsize]
        ]
        store.load(entries, Appends.none())
        progress.say("filling a store", f"{first:,} of {users:,} users")
    store.finish_loading([], users)
    part = Range(SOURCE, 0, users * each, rows=users * each)
    items = {f"item:{item:016x}": bytes(12) for item in (np.arange(100_000, dtype=np.uint64) * PRIME).tolist()}
    store.commit(Appends.none(), [part], items)
    return known


class Ticker(threading.Thread):
    """Measures by how much other work of this process delays a thread that only sleeps: `longest_s`.

    Time in which the thread could run and had no processor does not count, nor time in which this process used none. So
    other processes of a busy machine do not count.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s, self.cpu_s, self._ends = 0.0, 0.0, threading.Event()

    def run(self) -> None:
        with Path("/proc/thread-self/schedstat").open("rb", buffering=0) as statistics:

            def queued_s() -> float:
                statistics.seek(0)
                return int(statistics.read().split()[1]) / 1e9

            while not self._ends.is_set():
                before_s, used_s, waited_s = time.perf_counter() + TICK_S, time.process_time(), queued_s()
                time.sleep(TICK_S)
                delay_s = time.perf_counter() - before_s - (queued_s() - waited_s)
                self.longest_s = max(self.longest_s, min(delay_s, time.process_time() - used_s))

    def __enter__(self) -> Ticker:
        self.start()
        self.cpu_s = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = time.process_time() - self.cpu_s
        self._ends.set()
        self.join()


def snapshot(users: int, each: int, memory: Path, disk: Path, progress: Stages) -> dict[str, Figure]:
    """Figures of snapshots: for their writer, and for a host that has nothing."""
    store = HistoryStore(memory / "writer", SPEC.history, MAP_BYTES)
    known, rng, at = fill(store, users, each, progress), np.random.default_rng(9), users * each
    location, position = DirectoryStore(disk), Position("cd" * 16, {0: 1})
    writer = SnapshotWriter(location, "host", SPEC.history)
    with Ticker() as idle:
        time.sleep(10.0)
    progress.say("a snapshot of all users")
    with Ticker() as whole:
        made = writer.write(Cut(store.view(), position, "salt", (), None), START_MS)
    assert made is not None
    costs, longest_s, cuts = [], [whole.longest_s], []
    for number in range(3):
        gained = list[Gained]()
        while sum(len(part.users) for part in gained) < RATE * EVERY_S:
            events, chosen = clicks(ROWS, at, rng), known[rng.integers(0, users, ROWS)]
            store.commit(Appends.of(chosen, events), [Range(SOURCE, at, at + ROWS, rows=ROWS)])
            gained.append(Gained(chosen, events))
            at += ROWS
        progress.say("a snapshot of the clicks since")
        before_s = time.thread_time()
        cut = Cut(store.view(), position, "salt", gained, made)
        cuts.append(time.thread_time() - before_s)
        with Ticker() as some:
            made = writer.write(cut, START_MS + 1000 * (number + 1))
        assert made is not None
        costs.append(some.cpu_s)
        longest_s.append(some.longest_s)
    progress.say("the store's digest")
    digest = store.digest()
    store.close()
    shutil.rmtree(memory / "writer")
    progress.say("loading it")
    other = HistoryStore(memory / "reader", SPEC.history, MAP_BYTES)
    before, before_s = time.process_time(), time.monotonic()
    snapshots.load(location, made, other)
    cpu_s, wall_s = time.process_time() - before, time.monotonic() - before_s
    assert other.digest() == digest, "the loaded histories differ"
    size = (other.path / DATA).stat().st_size
    other.close()
    total, delta_us = users * each, 1e6 * min(costs) / (RATE * EVERY_S)
    base_us = 1e6 * whole.cpu_s / total
    return {
        "snapshot of all users": Figure(whole.cpu_s, "cpu-s"),
        "snapshot of all users, an event": Figure(base_us, "us"),
        "size of a snapshot": Figure(made.bytes / 1e6, "MB"),
        "an event in a snapshot": Figure(made.bytes / total, "bytes"),
        "snapshot of the clicks since, a click": Figure(delta_us, "us"),
        "share of a core at 10,000 clicks/s": Figure(RATE * (delta_us + REBASED * base_us) / 1e6, "ratio", "<= 0.05"),
        "a cut, processor": Figure(1e3 * max(cuts), "cpu-ms", "<= 10"),
        "longest pause of another thread": Figure(1e3 * max(longest_s), "ms", "<= 10"),
        "the same without a snapshot": Figure(1e3 * idle.longest_s, "ms"),
        "loading a snapshot": Figure(wall_s, "s", "<= 60"),
        "loading a snapshot, processor": Figure(cpu_s, "cpu-s"),
        "loading a snapshot, an event": Figure(1e6 * cpu_s / total, "us"),
        "an event in a loaded store": Figure(size / total, "bytes"),
    }


def main() -> None:
    """Takes the figures."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--users", type=int, default=100_000)
    flags.add_argument("--records", type=int, default=400)
    flags.add_argument("--snapshot-users", type=int, default=1_000_000)
    flags.add_argument("--events", type=int, default=64)
    asked, progress = flags.parse_args(), Stages("new_host")
    with (
        tempfile.TemporaryDirectory(prefix="springtide-bench-", dir=SETTINGS.storage.memory_dir) as memory,
        tempfile.TemporaryDirectory(prefix="springtide-bench-") as disk,
    ):
        figures = read_log(asked.users, asked.records, Path(memory), progress)
        figures |= snapshot(asked.snapshot_users, asked.events, Path(memory), Path(disk), progress)
    about = {"users": asked.users, "records": asked.records, "rows": ROWS}
    report("new_host", figures, about | {"snapshot users": asked.snapshot_users, "events each": asked.events})


if __name__ == "__main__":
    main()
