"""The source: one endless element that ends when asked to, and looks after group offsets, partitions and lag."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from state.config.sections import Stream
from state.config.settings import Settings
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.log import PartitionBatch
from state.metrics import StreamMetrics
from state.positions import Range, Source
from streaming.context import StreamContext
from streaming.steps import ClickReader, Handle, Lag, opened
from tests.memory_log import MemoryLog, MemoryReader
from tests.streaming.pieces import context_of

TOPIC = "ab" * 16
CLICKS = "clicks"
ZERO = Source(TOPIC, 0)


def clicked(clicks: int) -> MemoryLog:
    """A topic of clicks of one partition; Kafka took one a second."""
    log = MemoryLog(ids=lambda: TOPIC)
    log.topics().ensure(CLICKS, 1)
    with log.writer() as writer:
        for number in range(clicks):
            writer.send(CLICKS, 0, None, None, timestamp_ms=number * 1000)
    return log


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    made = HistoryStore(tmp_path / "histories", map_bytes=1 << 24)
    yield made
    made.close()


@contextmanager
def reading(store: HistoryStore, log: MemoryLog, batch_events: int = 1000) -> Iterator[Handle[StreamContext]]:
    """A process that reads `log` and is asked to stop at its end; its parser passes everything on."""
    stopping, reader = threading.Event(), log.reader(CLICKS)

    def poll(timeout_s: float, max_records: int, shares: Mapping[int, int] | None = None) -> list[PartitionBatch]:
        found = MemoryReader.poll(reader, timeout_s, max_records, shares)
        if not found:
            stopping.set()
        return found

    reader.poll = poll  # type: ignore[method-assign,assignment]
    context = context_of(
        settings=replace(Settings(), stream=replace(Stream(), poll_ms=20, batch_events=batch_events)),
        store=store,
        reader=reader,
        parser=SimpleNamespace(parse=lambda batches: batches),
        topic_id=TOPIC,
        metrics=StreamMetrics(CollectorRegistry()),
        stopping=stopping,
    )
    with opened(context) as handle:
        yield handle


def test_lag_counts_what_is_unread_and_what_is_uncommitted(store: HistoryStore) -> None:
    store.commit(Appends.none(), [Range(ZERO, 0, 1, dead=1)])
    with reading(store, clicked(9), batch_events=4) as shard:
        ClickReader(shard.context).poll()
        assert shard.context.metrics.lag_events._value.get() == 5 + 3


def test_a_broker_that_is_away_for_a_while_stops_nothing(store: HistoryStore, caplog: pytest.LogCaptureFixture) -> None:
    log = clicked(0)
    with reading(store, log) as shard, caplog.at_level(logging.WARNING):
        log.go_away()
        clicks = ClickReader(shard.context)
        clicks.poll()
        clicks._due_s = 0.0
        clicks.poll()
    (record,) = caplog.records
    assert record.message.startswith(
        "new partitions and lag are unknown for now: cannot describe topic clicks: no broker"
    )


def test_lag_in_seconds_is_that_of_the_newest_committed_click() -> None:
    lag, reader = Lag(), clicked(9).reader(CLICKS)
    lag.read(*reader.poll(0.0, 4), now_ms=100_000)
    assert lag.seconds(now_s=100.0) == 0.0
    assert lag.uncommitted({ZERO: 3}) == 1
    lag.read(*reader.poll(0.0, 5), now_ms=100_000)
    assert lag.uncommitted({ZERO: 4}) == 5
    assert lag.seconds(now_s=100.0) == 97.0
    assert lag.uncommitted({ZERO: 9}) == 0
    assert lag.seconds(now_s=100.0) == 92.0
