"""The commit thread: Kafka first, then the store, in order; a failure surfaces and leaves a consistent cut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from state.accounts import StreamAccount, check_accounts
from state.config.sections import Kafka
from state.config.settings import Settings
from state.errors import FencedWriter, PositionConflict, UnreachableBroker
from state.events.dead_letters import DeadLetter
from state.features.spec import EVENT
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.log import LogWriter, MemoryLog, plan
from state.log.memory_clients import MemoryWriter
from state.metrics import StreamMetrics
from state.microbatch.codec import decode
from state.positions import Range, Source
from state.process import killpoints
from streaming.commit import Committer
from streaming.cut import Cut
from streaming.letters import letter_headers
from streaming.rows import Rows
from streaming.sink import QUEUED_CUTS, CommitThread
from streaming.writer import ShardWriter, transactional_id
from tests.streaming.pieces import ZERO, context_of, piece

DEADLINE_S = 20.0


class Gate:
    """In place of `killpoints.reach`: holds a commit inside its transaction until it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)

    def __call__(self, name: str) -> None:
        if name == "stream.sent":
            self.entered.release()
            assert self.opened.wait(DEADLINE_S)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr(killpoints, "reach", made)
    return made


@contextmanager
def sink(path: Path, refused: int = 0) -> Iterator[Any]:
    """The commit thread with a real store and a log in memory, which comes back after `refused` attempts to connect."""
    store, stopping, told = HistoryStore(path / "histories", map_bytes=1 << 26), threading.Event(), list[Rows]()
    log, settings, attempts = MemoryLog(ids=lambda: ZERO.topic_id), Settings(), count()
    for planned in (plan.clicks(settings), plan.dead_letters(settings), plan.microbatches(settings)):
        log.topics().ensure(*planned)

    def opens(_: Settings) -> LogWriter:
        if next(attempts) > refused:
            log.come_back()
        return log.writer(transactional_id(0))

    owned: dict[str, Any] = {
        "settings": settings,
        "spec": SimpleNamespace(names=("views", "truncated", "other", "more")),
        "store": store,
        "topic_id": ZERO.topic_id,
        "reader": log.reader(settings.kafka.clicks_topic),
        "profiler": SimpleNamespace(committed=told.append),
        "metrics": StreamMetrics(CollectorRegistry()),
    }
    writer = ShardWriter(settings, "spec", "salt", stopping, opens)
    commits = CommitThread(Committer(context_of(**owned, writer=writer, stopping=stopping)))
    yield SimpleNamespace(**owned, commits=commits, log=log, stopping=stopping, told=told)
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


def test_micro_batches_and_dead_letters_are_one_transaction(tmp_path: Path) -> None:
    rows = piece((ZERO, 0, 3), dead=1)
    letter = DeadLetter(ZERO, 3, "undecodable", b"user-7", b"{")
    object.__setattr__(rows.batch, "dead", (letter,))
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((rows,), 5))
        shard.commits.flush()
    (batch,), (dead,) = shard.log.records("springtide.microbatches.v1"), shard.log.records("springtide.clicks.v1.dlq")
    assert batch.transaction is dead.transaction
    assert decode(batch.value).offset.tolist() == [0, 1, 2]
    assert (dead.key, dead.value) == (None, b"")
    assert dead.headers == (
        ("reason", b"undecodable"), ("topic_id", b"ab" * 16), ("partition", b"0"), ("offset", b"3"),
    )  # fmt: skip


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


def test_what_waited_while_one_was_written_goes_into_one_transaction(tmp_path: Path, gate: Gate) -> None:
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        assert gate.entered.acquire(timeout=DEADLINE_S)
        for offset in (1, 2):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
        gate.opened.set()
        shard.commits.flush()
        assert transactions(shard.log) == [1, 2]


def test_a_full_queue_holds_the_reader_back(tmp_path: Path, gate: Gate) -> None:
    with sink(tmp_path) as shard:
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        assert gate.entered.acquire(timeout=DEADLINE_S)
        for offset in range(1, 1 + QUEUED_CUTS):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
        put = threading.Thread(target=shard.commits.put, args=(Cut((piece((ZERO, 1 + QUEUED_CUTS, 1)),), 0),))
        put.start()
        put.join(0.1)
        assert put.is_alive()
        assert transactions(shard.log) == []
        gate.opened.set()
        put.join(DEADLINE_S)
        shard.commits.flush()
        assert not put.is_alive()
        assert shard.store.positions() == {ZERO: 2 + QUEUED_CUTS}


@pytest.mark.parametrize("call", [CommitThread.check, CommitThread.flush, lambda commits: commits.put(Cut((), 0))])
def test_a_failure_surfaces_in_the_next_call(tmp_path: Path, call: Callable[[CommitThread], None]) -> None:
    with sink(tmp_path) as shard:
        shard.log.writer("springtide-stream-0")
        shard.commits.put(Cut((piece((ZERO, 0, 1)),), 0))
        with pytest.raises(FencedWriter):
            shard.commits.flush()
        with pytest.raises(FencedWriter, match="another writer took over"):
            call(shard.commits)
        assert shard.store.positions() == {}


def test_rows_that_kafka_did_not_take_move_no_position(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.log.writer("springtide-stream-0")
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 1))),), 0))
        with pytest.raises(FencedWriter):
            shard.commits.flush()
        assert len(shard.store.read(0)) == 0
        assert shard.told == []


def test_an_outage_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(MemoryWriter, "close", lambda writer, timeout_s: closed.append(writer))
    with sink(tmp_path, refused=2) as shard:
        shard.log.go_away()
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 2))),), 0))
        shard.commits.flush()
        assert (len(closed), transactions(shard.log)) == (1, [1])
        assert shard.store.positions() == {ZERO: 2}
        shard.commits.put(Cut((with_history(piece((ZERO, 2, 1))),), 0))
        shard.commits.flush()
        assert (transactions(shard.log), shard.store.positions()) == ([1, 1], {ZERO: 3})


def test_a_stream_asked_to_stop_waits_for_no_broker(tmp_path: Path) -> None:
    with sink(tmp_path, refused=9) as shard:
        shard.stopping.set()
        shard.log.go_away()
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
        assert shard.log.topics().committed(Kafka().group, Kafka().clicks_topic) == {0: 2}


def test_a_group_that_cannot_be_told_is_logged_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sink(tmp_path) as shard:
        shard.log.topics().delete(Kafka().clicks_topic)
        for offset in (0, 1):
            shard.commits.put(Cut((piece((ZERO, offset, 1)),), 0))
            shard.commits.flush()
        assert shard.store.positions() == {ZERO: 2}
    (record,) = caplog.records
    assert record.message.startswith("offsets of group springtide-stream are not up to date: cannot commit positions")


def test_the_metrics_count_what_was_committed(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        rows = piece((ZERO, 0, 3), dead=1)
        rows.vectors.features[:, 1] = [0, 1, 1]
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
