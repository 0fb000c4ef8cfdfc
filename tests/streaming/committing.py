"""The commit thread with a real store and a log in memory, for the tests of this folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from state.config.sections import Kafka
from state.config.settings import Settings
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.log import Writer, topic_plan
from state.metrics import StorageMetrics, StreamMetrics
from state.storage import Room
from streaming.commit import Committer
from streaming.pipeline import CommitThread
from streaming.rows import Cut, Encoding, Rows
from streaming.writer import StreamWriter
from tests.memory_log import MemoryLog
from tests.streaming.pieces import ZERO, context_of


@contextmanager
def sink(path: Path, refused: int = 0) -> Iterator[Any]:
    """The commit thread with a real store and a log in memory, which comes back after `refused` attempts to connect."""
    store, stopping, told = HistoryStore(path / "histories", map_bytes=1 << 26), threading.Event(), list[Rows]()
    storage = StorageMetrics(CollectorRegistry())
    log, attempts = MemoryLog(ids=lambda: ZERO.topic_id), count()
    settings = Settings()
    for planned in (topic_plan.clicks(settings), topic_plan.dead_letters(settings), topic_plan.microbatches(settings)):
        log.topics().ensure(*planned)

    def opens(_: Settings) -> Writer:
        if next(attempts) > refused:
            log.come_back()
        return log.writer("shard-0")

    owned: dict[str, Any] = {
        "settings": settings,
        "spec": SimpleNamespace(names=("views", "truncated", "other", "more"), reach_ms=lambda _: 10**9),
        "store": store,
        "topic_id": ZERO.topic_id,
        "reader": log.reader(settings.kafka.clicks_topic),
        "profiler": SimpleNamespace(committed=told.append, forget=lambda _: None),
        "metrics": StreamMetrics(CollectorRegistry()),
        "room": Room("stream", storage, stopping.wait),
    }
    writer = StreamWriter(settings, Encoding.of(settings.stream, "spec", "salt"), stopping, opens)
    committer = Committer(context_of(**owned, writer=writer, stopping=stopping))
    commits = CommitThread(committer)

    def put(rows: Rows) -> None:
        commits.put(Cut((rows,), 0))

    def take(rows: Rows) -> None:
        put(rows)
        commits.flush()

    yield SimpleNamespace(
        put=put,
        take=take,
        **owned,
        commits=commits,
        committer=committer,
        log=log,
        stopping=stopping,
        told=told,
        storage=storage,
    )
    commits.close()
    store.close()


def transactions(log: MemoryLog) -> list[int]:
    """How many micro-batches each transaction wrote."""
    found = log.records(Kafka().microbatches_topic)
    return [len(list(together)) for _, together in groupby(found, key=lambda record: id(record.transaction))]


def with_history(rows: Rows) -> Rows:
    """The same batch, whose rows are also appended to the histories of their users."""
    events = np.zeros(len(rows.batch.offset), EVENT)
    events["offset"] = rows.batch.offset
    return Rows(rows.batch, rows.vectors, Appends.of(rows.batch.user, events))
