"""How fast a serving host that has nothing reads the training log into its histories: rows a second of processor time.

    python -m tests.bench.new_host [--users 100000] [--records 200]

Records are as large as the stream cuts them under load. The log is in memory,
so that Kafka's client is left out, which reads a record of these in a fraction
of what follows; the store is the real one, in memory as the applier has it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from prometheus_client import CollectorRegistry

from deploy.serving.following.clicks import HistoryFollower
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.history.store import HistoryStore
from state.layout import DATA
from state.metrics import ApplierMetrics
from state.microbatch.batch import Header
from state.microbatch.codec import encode
from state.positions import Range, Source
from tests.bench.report import Figure, Stages, report
from tests.memory_log import MemoryLog

SPEC, SETTINGS = FeatureSpec(), Settings()
ROWS = SETTINGS.stream.cut_rows
SOURCE, TOPIC, START_MS = Source("ab" * 16, 0), SETTINGS.kafka.microbatches_topic, 1_790_000_040_000
MAP_BYTES = 8 << 30


def record(number: int, users: int, rng: np.random.Generator) -> bytes:
    """One of the log's records: rows of users who are drawn alike, their clicks spread over a week."""
    at_ms = START_MS + 1500 * number
    places = (ROWS, SPEC.recent_categories)
    columns = {
        "user": rng.integers(1, users + 1, ROWS).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
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


def main() -> None:
    """Takes the figures."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--users", type=int, default=100_000)
    flags.add_argument("--records", type=int, default=200)
    asked, progress, rng = flags.parse_args(), Stages("new_host"), np.random.default_rng(7)
    log = MemoryLog(ids=lambda: "cd" * 16)
    log.topics().ensure(TOPIC, 1)
    progress.say("writing the log")
    with log.writer() as writer:
        for number in range(asked.records):
            writer.send(TOPIC, 0, None, record(number, asked.users, rng))
    now_ms = START_MS + 1500 * asked.records
    with tempfile.TemporaryDirectory(prefix="springtide-bench-", dir=SETTINGS.storage.memory_dir) as folder:
        store = HistoryStore(Path(folder) / "histories", SPEC.history, MAP_BYTES)
        metrics = ApplierMetrics(CollectorRegistry())
        host = HistoryFollower(store, SPEC, SPEC.reach_ms(SETTINGS.events), metrics, lambda: now_ms)
        with log.topics() as topics:
            info, ends = topics.describe(TOPIC), topics.ends(TOPIC)
        progress.say("reading it")
        host.connect(info.topic_id, ends, lambda positions, _: log.reader(TOPIC, None, positions))
        took, read, begun = [], 0, psutil.Process().memory_info().rss
        while read < asked.records:
            before = time.process_time()
            read += host.step(0.0)
            took.append(time.process_time() - before)
        # The first steps compile.
        steady = took[len(took) // 4 :]
        rows = ROWS * asked.records * len(steady) / len(took)
        size, events = (store.path / DATA).stat().st_size, min(SPEC.history * asked.users, ROWS * asked.records)
        grown = psutil.Process().memory_info().rss - begun
        host.disconnect()
        store.close()
    report(
        "new_host",
        {
            "rows into the histories": Figure(rows / sum(steady), "rows/cpu-s"),
            "a row": Figure(1e6 * sum(steady) / rows, "us"),
            "an event in the store": Figure(size / events, "bytes"),
            "memory, pages of the store among it": Figure(grown / 2**20, "MiB"),
        },
        {"users": asked.users, "records": asked.records, "rows": ROWS},
    )


if __name__ == "__main__":
    main()
