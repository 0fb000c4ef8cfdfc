"""Measures parsing, windows, the profiler and the history store, each alone and per second of process CPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from state.config.sections import Events as EventSettings
from state.events.identity import Salt
from state.events.parser import EventBatch, Parser
from state.features.arrays import WORDS, Rings, words
from state.features.kernel import update_rows
from state.features.spec import EVENT, Events, FeatureSpec, Mask, vectorise_many
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.log import PartitionBatch
from state.positions import Range, Source
from streaming.profile import Profiler
from tests.bench.report import Figure, report

BASE_MS = 1_700_000_000_000
SOURCE = Source("ab" * 16, 0)
SPEC = FeatureSpec()
USERS = 4000


def best_cpu_s(run: Callable[[], object], rounds: int = 5) -> float:
    """The least process CPU time of several rounds, for the machine is shared."""
    taken = []
    for _ in range(rounds):
        begun = time.process_time()
        run()
        taken.append(time.process_time() - begun)
    return min(taken)


def some_history(rng: np.random.Generator, count: int) -> Events:
    events = np.zeros(count, EVENT)
    events["at_ms"] = np.sort(BASE_MS - rng.integers(0, 6 * 86_400_000, count))
    events["category"] = rng.integers(1, 40, count).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    events["item"] = rng.integers(1, 1 << 62, count)
    events["offset"] = np.arange(count)
    events["action"] = rng.integers(0, 4, count)
    return events


def batch_of(rng: np.random.Generator, rows: int, first: int) -> EventBatch:
    events = some_history(rng, rows)
    return EventBatch(
        user=rng.integers(1, USERS + 1, rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        item=events["item"].copy(),
        category=events["category"].copy(),
        action=events["action"].copy(),
        at_ms=BASE_MS + first + np.arange(rows),
        label=np.full(rows, np.nan, np.float32),
        weight=np.ones(rows, np.float32),
        context=np.empty((rows, 0), np.uint64),
        source=np.zeros(rows, np.uint16),
        offset=np.arange(first, first + rows),
        ranges=(Range(SOURCE, first, first + rows, rows=rows),),
        dead=(),
        names={},
    )


def parser_events_per_s(rng: np.random.Generator) -> float:
    values: list[bytes | None] = [
        json.dumps(
            {
                "user": f"u{rng.integers(5000)}",
                "item": int(rng.integers(4000)),
                "category": f"c{rng.integers(64)}",
                "action": "view",
                "time": BASE_MS + place,
            }
        ).encode()
        for place in range(10_000)
    ]
    batches = [
        PartitionBatch(
            SOURCE.topic_id,
            0,
            first,
            first + 1000,
            np.arange(first, first + 1000),
            np.full(1000, BASE_MS),
            [None] * 1000,
            values[first : first + 1000],
        )
        for first in range(0, 10_000, 1000)
    ]
    parser = Parser(EventSettings(), Salt(b"a salt for the bench"))
    return 10_000 / best_cpu_s(lambda: [parser.parse([batch]) for batch in batches])


def kernel_us(rng: np.random.Generator, length: int, rows: int = 2000) -> float:
    rings = np.zeros((rows, SPEC.history, WORDS), np.int64)
    for ring in rings:
        ring[:length] = words(some_history(rng, length))
    events = np.repeat(some_history(rng, 1), rows)
    events["at_ms"] = BASE_MS + 1000
    made, slots = SPEC.empty(rows), rng.permutation(rows)

    def run() -> None:
        ends, counts = np.full(rows, length % SPEC.history), np.full(rows, length)
        update_rows(Rings(rings, ends, counts), slots, words(events), SPEC.tables, Mask.NONE.hidden, made)

    run()
    return best_cpu_s(run) / rows * 1e6


def vectorise_us(rng: np.random.Generator, users: int) -> float:
    """CPU microseconds of a row, as serving computes the rows of so many users in one call."""
    histories = [some_history(rng, SPEC.history) for _ in range(users)]
    for history in histories:
        history.flags.writeable = False  # as a store returns it
    times, calls = [BASE_MS] * users, 1000 // users

    def run() -> None:
        for _ in range(calls):
            vectorise_many(histories, times, Mask.NONE, SPEC, range(users))

    run()
    return best_cpu_s(run) / (calls * users) * 1e6


def profiler_rows_per_s(rng: np.random.Generator, folder: Path, length: int, batch_rows: int) -> float:
    store = HistoryStore(folder, SPEC.history, 1 << 30)
    users = np.arange(1, USERS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    store.commit(Appends.of(np.repeat(users, length), np.concatenate([some_history(rng, length) for _ in users])))
    profiler = Profiler(store, SPEC, 2 * USERS)
    rounds = max(2, 8000 // batch_rows)
    batches = [batch_of(rng, batch_rows, place * batch_rows) for place in range(rounds)]
    # Everybody is in memory before the clock starts.
    for place in range(0, USERS, 1000):
        warm = batch_of(rng, 1000, 0)
        warm.user[:] = users[place : place + 1000]
        profiler.committed(profiler.update(warm))

    def run() -> None:
        for batch in batches:
            profiler.committed(profiler.update(batch))

    taken_s = best_cpu_s(run, rounds=3)
    store.close()
    return rounds * batch_rows / taken_s


def store_ms(rng: np.random.Generator, folder: Path) -> tuple[float, float]:
    """CPU milliseconds of a commit for 2,000 users, and microseconds of reading one full history."""
    store = HistoryStore(folder, SPEC.history, 2 << 30)
    users = rng.integers(1, 1 << 62, 20_000).astype(np.uint64)
    for _ in range(20):
        store.commit(Appends.of(np.repeat(users, 13), np.zeros(13 * len(users), EVENT)))
    place = 0

    def commit() -> None:
        nonlocal place
        some = users[place : place + 2000]
        store.commit(Appends.of(some, np.zeros(2000, EVENT)), [Range(SOURCE, place, place + 2000, rows=2000)])
        place += 2000

    commit_s = best_cpu_s(commit)
    some = rng.choice(users, 2000, replace=False).tolist()
    read_s = best_cpu_s(lambda: [store.read(user) for user in some])
    store.close()
    return commit_s * 1e3, read_s / 2000 * 1e6


def main() -> None:
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as folder:
        commit_ms, read_us = store_ms(rng, Path(folder, "store"))
        figures = {
            "parser, events per cpu-s": Figure(parser_events_per_s(rng), "events/s", ">= 400000"),
            "kernel, a row at 256 events": Figure(kernel_us(rng, 256), "us", "<= 4"),
            "kernel, a row at 50 events": Figure(kernel_us(rng, 50), "us"),
            # In 0.1.0, "vectorise, 256 events" is the same: its serving computed each row by a call.
            "vectorise, 256 events": Figure(vectorise_us(rng, 1), "us", "<= 30"),
            "vectorise, a row of 50 at 256 events": Figure(vectorise_us(rng, 50), "us"),
            "profiler, 2,000-row batches, 50 events": Figure(
                profiler_rows_per_s(rng, Path(folder, "a"), 50, 2000), "rows/s", ">= 150000"
            ),
            "profiler, 1,000-row batches, 50 events": Figure(
                profiler_rows_per_s(rng, Path(folder, "b"), 50, 1000), "rows/s", ">= 150000"
            ),
            "profiler, 2,000-row batches, full": Figure(
                profiler_rows_per_s(rng, Path(folder, "c"), 256, 2000), "rows/s", ">= 80000"
            ),
            "store, commit of 2,000 users": Figure(commit_ms, "ms", "<= 10"),
            "store, read of a full history": Figure(read_us, "us"),
        }
    report("windows", figures)


if __name__ == "__main__":
    main()
