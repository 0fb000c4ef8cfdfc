"""The source: it reads while the broker is unreachable for a while, and measures the lag."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from state.config.sections import Stream
from state.config.settings import Settings
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.metrics import StreamMetrics
from state.positions import Range
from streaming import steps
from streaming.context import StreamContext
from streaming.rows import Cutter
from streaming.steps import ClickReader, ReadClicks, opened
from tests.memory_log import MemoryLog
from tests.streaming.pieces import ZERO, context_of

CLICKS = "clicks"


def clicked(clicks: int) -> MemoryLog:
    """A topic of clicks of one partition; Kafka took one a second."""
    log = MemoryLog(ids=lambda: ZERO.topic_id)
    log.topics().ensure(CLICKS, 1)
    with log.writer() as writer:
        for number in range(clicks):
            writer.send(CLICKS, 0, None, None, timestamp_ms=number * 1000)
    return log


def reading(store: HistoryStore, log: MemoryLog) -> StreamContext:
    return context_of(
        settings=Settings(stream=Stream(cut_rows=4)),
        store=store,
        reader=log.reader(CLICKS),
        topic_id=ZERO.topic_id,
        metrics=StreamMetrics(CollectorRegistry()),
        cutter=Cutter(4, cut_ms=80),
        stopping=threading.Event(),
    )


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore(tmp_path / "histories", map_bytes=1 << 24)


def test_lag_counts_what_is_unread_and_what_is_uncommitted(store: HistoryStore) -> None:
    store.commit(Appends.none(), [Range(ZERO, 0, 1, dead=1)])
    context = reading(store, clicked(9))
    ClickReader(context).poll(0.0)
    assert context.metrics.lag_events._value.get() == 5 + 3
    store.close()


def test_a_broker_that_is_unreachable_for_a_while_stops_nothing_and_is_logged_once(
    store: HistoryStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "UPKEEP_S", 0.0)
    log = clicked(0)
    clicks = ClickReader(reading(store, log))
    with caplog.at_level(logging.WARNING):
        log.go_away()
        for _ in range(2):
            clicks.poll(0.0)
    (record,) = caplog.records
    expected = "new partitions and lag are unknown for now: cannot describe topic clicks: no broker"
    assert record.message.startswith(expected)
    store.close()


def test_without_clicks_it_polls_twice_a_second_and_reads_the_click_that_comes(store: HistoryStore) -> None:
    log = clicked(0)
    context = reading(store, log)

    def click() -> None:
        with log.writer() as writer:
            writer.send(CLICKS, 0, None, None)

    with opened(context) as handle:
        polls = ReadClicks(handle).process(b"", steps._UntilStopped())
        begun_s = time.monotonic()
        assert [next(polls) for _ in range(3)] == [[], [], []]
        assert time.monotonic() - begun_s >= 1.4
        timer = threading.Timer(0.05, click)
        timer.start()
        came = next(batches for batches in polls if batches)
        assert [len(batch) for batch in came] == [1]
        timer.join()
        context.stopping.set()
        assert list(polls) == []
    store.close()
