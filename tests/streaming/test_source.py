"""The source: one endless element that ends when asked to, and looks after group offsets, partitions and lag."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.config.sections import Stream
from state.config.settings import Settings
from state.errors import GapError, UnreachableBroker
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.log import PartitionBatch
from state.metrics import StreamMetrics
from state.positions import Range, Source
from streaming import pipeline
from streaming.context import Handle, Step, StreamContext, opened
from streaming.source import ClickReader, Lag, UntilStopped
from tests.streaming.pieces import context_of

TOPIC = "ab" * 16
ZERO = Source(TOPIC, 0)


def batch(first: int, after: int) -> PartitionBatch:
    """A batch of partition 0 without contents."""
    count = after - first
    return PartitionBatch(
        topic_id=TOPIC,
        partition=0,
        first=first,
        next=after,
        offsets=np.arange(first, after),
        timestamps_ms=np.arange(first, after) * 1000,
        keys=[None] * count,
        values=[None] * count,
        corrupt=(),
    )


class ScriptedReader:
    """Gives the batches of a script, raises its exceptions, then asks the shard to stop."""

    def __init__(self, script: list[list[PartitionBatch] | Exception], stopping: threading.Event) -> None:
        self.script, self.stopping = script, stopping
        self.away: Exception | None = None

    def poll(self, timeout_s: float, max_records: int) -> list[PartitionBatch]:
        if not self.script:
            self.stopping.set()
            return []
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def refresh(self) -> list[int]:
        if self.away:
            raise self.away
        return [3]

    def lag(self) -> dict[int, int]:
        return {0: 5}


class Pass(Step[StreamContext]):
    """Passes each element on."""

    def process(self, element: Any) -> Iterator[Any]:
        yield element


class Keep(Step[StreamContext]):
    """Keeps each element and passes it on."""

    seen: ClassVar[list[Any]] = []

    def process(self, element: Any) -> Iterator[Any]:
        Keep.seen.append(element)
        yield element


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    made = HistoryStore(tmp_path / "histories", map_bytes=1 << 24)
    yield made
    made.close()


@contextmanager
def scripted(store: HistoryStore, script: list[list[PartitionBatch] | Exception]) -> Iterator[Handle[StreamContext]]:
    """A process whose reader follows `script` and whose parser passes everything on."""
    stopping = threading.Event()
    context = context_of(
        settings=replace(Settings(), stream=replace(Stream(), poll_ms=20)),
        store=store,
        reader=ScriptedReader(script, stopping),
        parser=SimpleNamespace(parse=lambda batches: batches),
        topic_id=TOPIC,
        metrics=StreamMetrics(CollectorRegistry()),
        stopping=stopping,
    )
    with opened(context) as handle:
        yield handle


@contextmanager
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The elements that leave the steps before the profiles when the real runner runs the job."""
    seen: list[Any] = []
    monkeypatch.setattr(pipeline, "UpdateProfiles", Pass)
    monkeypatch.setattr(pipeline, "WriteMicroBatches", Keep)
    monkeypatch.setattr(Keep, "seen", seen)
    yield seen


def test_the_job_ends_when_asked_to_and_loses_no_batch(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(store, [[batch(0, 2)], [], [batch(2, 5)]]) as shard, collected(monkeypatch) as seen:
        pipeline.run(shard)
    assert [(one.first, one.next) for batches in seen for one in batches] == [(0, 2), (2, 5)]
    assert [] in seen


def test_an_exception_of_a_step_comes_out_as_it_was_raised(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        scripted(store, [[batch(0, 2)], GapError("positions 2 to 9 are gone")]) as shard,
        collected(monkeypatch),
        pytest.raises(GapError, match="positions 2 to 9 are gone"),
    ):
        pipeline.run(shard)


def test_a_restriction_that_ends_unasked_is_an_error() -> None:
    tracker = UntilStopped()
    assert tracker.try_claim(False)
    with pytest.raises(ValueError, match="without a request to stop"):
        tracker.check_done()
    assert not tracker.try_claim(True)
    tracker.check_done()
    assert tracker.try_split(0.5) is None


def test_lag_counts_what_is_unread_and_what_is_uncommitted(store: HistoryStore) -> None:
    store.commit(Appends.none(), [Range(ZERO, 0, 1, dead=1)])
    with scripted(store, [[batch(0, 4)]]) as shard:
        ClickReader(shard.context).poll()
        assert shard.context.metrics.lag_events._value.get() == 5 + 3


def test_a_broker_that_is_away_for_a_while_stops_nothing(store: HistoryStore, caplog: pytest.LogCaptureFixture) -> None:
    with scripted(store, [[], []]) as shard, caplog.at_level(logging.WARNING):
        shard.context.reader.away = UnreachableBroker("no broker at kafka:9092")
        clicks = ClickReader(shard.context)
        clicks.poll()
        clicks._due_s = 0.0
        clicks.poll()
    assert [record.message for record in caplog.records] == [
        "new partitions and lag are unknown for now: no broker at kafka:9092"
    ]


def test_lag_in_seconds_is_that_of_the_newest_committed_click() -> None:
    lag = Lag()
    lag.read(batch(0, 4))
    assert lag.seconds(now_s=100.0) == 0.0
    assert lag.uncommitted({ZERO: 3}) == 1
    lag.read(batch(4, 9))
    assert lag.uncommitted({ZERO: 4}) == 5
    assert lag.seconds(now_s=100.0) == 97.0
    assert lag.uncommitted({ZERO: 9}) == 0
    assert lag.seconds(now_s=100.0) == 92.0
