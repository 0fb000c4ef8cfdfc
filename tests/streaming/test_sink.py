"""The commit thread: Kafka first, then the store, in order; a failure surfaces and leaves a consistent cut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.accounts import StreamAccount, check_accounts
from state.config.settings import Settings
from state.errors import FencedWriter, PositionConflict, UnreachableBroker
from state.events.dead_letters import DeadLetter
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.metrics import StreamMetrics
from state.microbatch.codec import decode
from state.positions import Range, Source
from state.process import killpoints
from streaming.commit import Committer
from streaming.cut import Cut
from streaming.letters import letter_headers
from streaming.rows import Rows
from streaming.sink import QUEUED_CUTS, CommitThread
from streaming.writer import ShardWriter
from tests.streaming.pieces import ZERO, context_of, piece

DEADLINE_S = 20.0


class RecordingWriter:
    """Keeps what a transaction sent when it commits; can fail, or wait inside of one."""

    def __init__(self) -> None:
        self.committed: list[list[tuple[str, bytes, list[tuple[str, bytes]]]]] = []
        self.open: list[tuple[str, bytes, list[tuple[str, bytes]]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.error: Exception | None = None
        self.closed = False

    def close(self, timeout_s: float = 5.0) -> None:
        self.closed = True

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.open = []
        self.entered.release()
        yield
        assert self.gate.wait(DEADLINE_S)
        if self.error:
            raise self.error
        self.committed.append(self.open)

    def send(self, topic: str, partition: int, key: None, value: bytes, headers: Any, timestamp_ms: int) -> None:
        self.open.append((topic, value, headers))


class Group:
    """Keeps the offsets that the consumer group was told."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}
        self.error: Exception | None = None

    def commit_group(self, positions: dict[int, int]) -> None:
        if self.error:
            raise self.error
        self.positions = positions


@contextmanager
def sink(path: Path, *later: RecordingWriter | Exception) -> Iterator[Any]:
    """The commit thread with a real store; its writer, and what comes of opening another one, are in place of Kafka's."""
    store, stopping, told = HistoryStore(path / "histories", map_bytes=1 << 26), threading.Event(), list[Rows]()
    first = RecordingWriter()
    opened = iter([first, *later])

    def opens(settings: Settings) -> Any:
        writer = next(opened)
        if isinstance(writer, Exception):
            raise writer
        return writer

    owned: dict[str, Any] = {
        "settings": Settings(),
        "spec": SimpleNamespace(names=("views", "truncated", "other", "more")),
        "store": store,
        "topic_id": ZERO.topic_id,
        "reader": Group(),
        "profiler": SimpleNamespace(committed=told.append),
        "metrics": StreamMetrics(CollectorRegistry()),
    }
    writer = ShardWriter(owned["settings"], "spec", "salt", stopping, opens)
    commits = CommitThread(Committer(context_of(**owned, writer=writer, stopping=stopping)))
    yield SimpleNamespace(**owned, commits=commits, writer=first, stopping=stopping, told=told)
    commits.close()
    store.close()


def with_history(rows: Rows) -> Rows:
    """The same batch, whose rows are also appended to the histories of their users."""
    events = np.zeros(len(rows.batch.offset), EVENT)
    events["offset"] = rows.batch.offset
    return Rows(
        rows.batch, rows.features, rows.recent_categories, rows.category_windows, Appends.of(rows.batch.user, events)
    )


def test_micro_batches_and_dead_letters_are_one_transaction(tmp_path: Path) -> None:
    rows = piece((ZERO, 0, 3), dead=1)
    letter = DeadLetter(ZERO, 3, "undecodable", b"user-7", b"{")
    object.__setattr__(rows.batch, "dead", (letter,))
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((rows,), 5))
        shard.commits.flush()
        ((batch, dead),) = shard.writer.committed
    assert batch[0] == "springtide.microbatches.v1"
    assert decode(batch[1]).offset.tolist() == [0, 1, 2]
    assert dead == (
        "springtide.clicks.v1.dlq",
        b"",
        [("reason", b"undecodable"), ("topic_id", b"ab" * 16), ("partition", b"0"), ("offset", b"3")],
    )


def test_a_dead_letter_never_carries_the_key() -> None:
    letter = DeadLetter(ZERO, 3, "undecodable", b"user-7", b"user-7")
    assert b"user-7" not in b"".join(value for _, value in letter_headers(letter))


def test_histories_and_positions_follow_the_acknowledged_rows(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        first, second = with_history(piece((ZERO, 0, 3), dead=2)), with_history(piece((ZERO, 5, 2)))
        shard.commits.put(Cut((first,), 0))
        shard.commits.put(Cut((second,), 0))
        shard.commits.flush()
        assert shard.store.positions() == {ZERO: 7}
        assert check_accounts(StreamAccount(**shard.store.totals)) == ()
        assert shard.store.read(6)["offset"].tolist() == [6]
        assert shard.told == [first, second]


def test_what_waited_while_one_was_written_goes_into_one_transaction(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.writer.gate.clear()
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        assert shard.writer.entered.acquire(timeout=DEADLINE_S)
        for offset in (1, 2):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
        shard.writer.gate.set()
        shard.commits.flush()
        assert [len(sent) for sent in shard.writer.committed] == [1, 2]


def test_a_full_queue_holds_the_reader_back(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.writer.gate.clear()
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        assert shard.writer.entered.acquire(timeout=DEADLINE_S)
        for offset in range(1, 1 + QUEUED_CUTS):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
        put = threading.Thread(target=shard.commits.put, args=(Cut((piece((ZERO, 1 + QUEUED_CUTS, 1)),), 0),))
        put.start()
        put.join(0.1)
        assert put.is_alive()
        assert shard.writer.committed == []
        shard.writer.gate.set()
        put.join(DEADLINE_S)
        shard.commits.flush()
        assert not put.is_alive()
        assert shard.store.positions() == {ZERO: 2 + QUEUED_CUTS}


@pytest.mark.parametrize("call", [CommitThread.check, CommitThread.flush, lambda commits: commits.put(Cut((), 0))])
def test_a_failure_surfaces_in_the_next_call(tmp_path: Path, call: Callable[[CommitThread], None]) -> None:
    with sink(tmp_path) as shard:
        shard.writer.error = FencedWriter("another stream writes as springtide-stream-0")
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        with pytest.raises(FencedWriter):
            shard.commits.flush()
        with pytest.raises(FencedWriter, match="another stream"):
            call(shard.commits)
        assert shard.store.positions() == {}


def test_rows_that_kafka_did_not_take_move_no_position(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.writer.error = FencedWriter("fenced")
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 1))),), 0))
        with pytest.raises(FencedWriter):
            shard.commits.flush()
        assert len(shard.store.read(0)) == 0
        assert shard.told == []


def test_an_outage_costs_only_time(tmp_path: Path) -> None:
    new = RecordingWriter()
    with sink(tmp_path, UnreachableBroker("away"), UnreachableBroker("away"), new) as shard:
        old = shard.writer
        old.error = UnreachableBroker("away")
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 2))),), 0))
        shard.commits.flush()
        assert (old.closed, old.committed, len(new.committed)) == (True, [], 1)
        assert shard.store.positions() == {ZERO: 2}
        shard.commits.put(Cut((with_history(piece((ZERO, 2, 1))),), 0))
        shard.commits.flush()
        assert (len(new.committed), shard.store.positions()) == (2, {ZERO: 3})


def test_a_stream_asked_to_stop_waits_for_no_broker(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.stopping.set()
        shard.writer.error = UnreachableBroker("away")
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 2))),), 0))
        with pytest.raises(UnreachableBroker):
            shard.commits.flush()
        assert shard.store.positions() == {}


def test_a_second_writer_in_the_store_is_noticed(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 2)),), 0))
        shard.commits.flush()
        shard.commits.put(Cut((piece((ZERO, 5, 1)),), 0))
        with pytest.raises(PositionConflict):
            shard.commits.flush()


def test_the_group_gets_the_committed_offsets_of_this_topic_only(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.store.commit(Appends.none(), [Range(Source("cd" * 16, 0), 0, 99, dead=99)])
        shard.commits.put(Cut((piece((ZERO, 0, 2)),), 0))
        shard.commits.flush()
        assert shard.reader.positions == {0: 2}


def test_a_group_that_cannot_be_told_is_logged_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sink(tmp_path) as shard:
        shard.reader.error = UnreachableBroker("no broker at kafka:9092")
        for offset in (0, 1):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
            shard.commits.flush()
        assert shard.store.positions() == {ZERO: 2}
    assert [record.message for record in caplog.records] == [
        "offsets of group springtide-stream are not up to date: no broker at kafka:9092"
    ]


def test_the_metrics_count_what_was_committed(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        rows = piece((ZERO, 0, 3), dead=1)
        rows.features[:, 1] = [0, 1, 1]
        object.__setattr__(rows.batch, "dead", (DeadLetter(ZERO, 3, "undecodable", None, None),))
        shard.commits.put(Cut((rows,), 0))
        shard.commits.flush()
        metrics = shard.metrics
        assert metrics.events.labels("rows")._value.get() == 3
        assert metrics.events.labels("dead")._value.get() == 1
        assert metrics.dead_letters.labels("undecodable")._value.get() == 1
        assert metrics.microbatches._value.get() == 1
        assert metrics.truncated_histories._value.get() == 2


def test_the_steps_of_a_commit_pass_their_kill_points_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    monkeypatch.setattr(killpoints, "reach", passed.append)
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        shard.commits.flush()
    assert passed == ["stream.taken", "stream.sent", "stream.acknowledged", "stream.committed", "stream.grouped"]
