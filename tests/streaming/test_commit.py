"""The commit sequence: Kafka first, then the store, in order; an outage or a full disk costs time and no row."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from state.accounts import StreamAccount, check_accounts
from state.config.sections import Kafka
from state.errors import LogError, PositionConflict, StoreFull, UnreachableBroker
from state.events.decoding import DeadLetter, Reason
from state.history.appends import Appends
from state.log import topic_plan
from state.microbatch.codec import decode
from state.positions import Range, Source
from state.process import killpoints
from state.storage import RETRY_S
from streaming.accounts import Leaders
from streaming.pipeline import QUEUED_CUTS, CommitThread
from streaming.rows import Cut
from tests.disks import small_disk
from tests.memory_log import MemoryWriter
from tests.streaming.committing import sink, transactions, with_history
from tests.streaming.pieces import ZERO, piece
from tests.streaming.streams import DEADLINE_S, until


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Any]:
    with sink(tmp_path) as made:
        yield made


def test_micro_batches_and_dead_letters_are_one_transaction(shard: Any) -> None:
    rows = piece((ZERO, 0, 3), dead=1)
    letter = DeadLetter(ZERO, 3, Reason.UNDECODABLE)
    object.__setattr__(rows.batch, "dead", (letter,))
    shard.take(rows)
    (batch,), (dead,) = shard.log.records("springtide.microbatches.v1"), shard.log.records("springtide.clicks.v1.dlq")
    assert batch.transaction is dead.transaction
    assert decode(batch.value).offset.tolist() == [0, 1, 2]
    assert (dead.key, dead.value) == (b"ab" * 16 + b":0:3", b"")
    assert dead.headers == (
        ("reason", b"undecodable"), ("topic_id", b"ab" * 16), ("partition", b"0"), ("offset", b"3"),
    )  # fmt: skip


def test_histories_and_positions_follow_the_acknowledged_rows(shard: Any) -> None:
    first, second = with_history(piece((ZERO, 0, 3), dead=2)), with_history(piece((ZERO, 5, 2)))
    shard.put(first)
    shard.take(second)
    assert shard.store.positions() == {ZERO: 7}
    assert check_accounts(StreamAccount(**shard.store.totals)) == ()
    assert shard.store.read(6)["offset"].tolist() == [6]
    assert shard.told == [first, second]


def test_a_second_writer_in_the_store_is_noticed(shard: Any) -> None:
    shard.take(piece((ZERO, 0, 2)))
    shard.put(piece((ZERO, 5, 1)))
    with pytest.raises(PositionConflict):
        shard.commits.flush()


def test_the_group_gets_the_committed_offsets_of_this_topic_only(shard: Any) -> None:
    shard.store.commit(Appends.none(), [Range(Source("cd" * 16, 0), 0, 99, dead=99)])
    shard.take(piece((ZERO, 0, 2)))
    assert shard.log.topics().committed(Kafka().group, Kafka().clicks_topic) == {0: 2}


def test_a_group_that_cannot_be_told_is_logged_once_and_stops_nothing(
    shard: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shard.log.topics().delete(Kafka().clicks_topic)
    for offset in (0, 1):
        shard.take(piece((ZERO, offset, 1)))
    assert shard.store.positions() == {ZERO: 2}
    (record,) = caplog.records
    assert record.message.startswith("offsets of group springtide-stream are not up to date: cannot commit positions")


def test_the_metrics_count_what_was_committed(shard: Any) -> None:
    rows = piece((ZERO, 0, 3), dead=1)
    rows.vectors.features[:, 1] = [0, 1, 1]
    object.__setattr__(rows.batch, "dead", (DeadLetter(ZERO, 3, Reason.UNDECODABLE),))
    shard.take(rows)
    metrics = shard.metrics
    assert metrics.events.labels("rows")._value.get() == 3
    assert metrics.events.labels("dead")._value.get() == 1
    assert metrics.dead_letters.labels("undecodable")._value.get() == 1
    assert metrics.microbatches._value.get() == 1
    assert metrics.truncated_histories._value.get() == 2


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


def test_what_waited_while_one_was_written_goes_into_one_transaction(shard: Any, gate: Gate) -> None:
    shard.put(piece((ZERO, 0, 1)))
    assert gate.entered.acquire(timeout=DEADLINE_S)
    for offset in (1, 2):
        shard.put(piece((ZERO, offset, 1)))
    assert shard.commits.busy
    gate.opened.set()
    shard.commits.flush()
    assert not shard.commits.busy
    assert transactions(shard.log) == [1, 2]


def test_a_full_queue_holds_the_reader_back(shard: Any, gate: Gate) -> None:
    shard.put(piece((ZERO, 0, 1)))
    assert gate.entered.acquire(timeout=DEADLINE_S)
    for offset in range(1, 1 + QUEUED_CUTS):
        shard.put(piece((ZERO, offset, 1)))
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


def test_at_rest_the_group_and_the_account_say_what_is_committed_and_then_nothing_is_due(shard: Any) -> None:
    def group() -> dict[int, int]:
        return dict(shard.log.topics().committed(Kafka().group, Kafka().clicks_topic))

    shard.put(piece((ZERO, 0, 1)))
    until(lambda: group() == {0: 1}, "the first cut is shown")
    # Within the second in which nothing more is shown; no third cut comes.
    shard.put(piece((ZERO, 1, 2)))
    until(lambda: group() == {0: 3}, "the second cut is shown")
    assert shard.metrics.accounting_positions.labels("positions")._value.get() == 3
    until(lambda: shard.committer.due_s is None, "nothing is due")


def test_a_group_that_could_not_be_told_is_told_at_rest(shard: Any) -> None:
    topics, planned = shard.log.topics(), topic_plan.clicks(shard.settings)
    topics.delete(Kafka().clicks_topic)
    shard.put(piece((ZERO, 0, 1)))
    until(lambda: shard.store.positions() == {ZERO: 1}, "the cut is committed")
    topics.ensure(*planned)
    until(lambda: topics.committed(Kafka().group, Kafka().clicks_topic) == {0: 1}, "the group")


@pytest.mark.parametrize("call", [CommitThread.check, CommitThread.flush, lambda commits: commits.put(Cut((), 0))])
def test_a_failure_surfaces_in_the_next_call(shard: Any, call: Callable[[CommitThread], None]) -> None:
    shard.log.writer("shard-0")
    shard.put(piece((ZERO, 0, 1)))
    with pytest.raises(LogError, match="another writer took over"):
        shard.commits.flush()
    with pytest.raises(LogError, match="another writer took over"):
        call(shard.commits)
    assert shard.store.positions() == {}


def test_an_outage_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr(MemoryWriter, "close", lambda writer, timeout_s: closed.append(writer))
    with sink(tmp_path, refused=2) as shard:
        shard.log.go_away()
        shard.take(with_history(piece((ZERO, 0, 2))))
        assert (len(closed), transactions(shard.log)) == (1, [1])
        assert shard.store.positions() == {ZERO: 2}
        shard.take(with_history(piece((ZERO, 2, 1))))
        assert (transactions(shard.log), shard.store.positions()) == ([1, 1], {ZERO: 3})


def test_a_stream_asked_to_stop_waits_for_no_broker(tmp_path: Path) -> None:
    with sink(tmp_path, refused=9) as shard:
        shard.stopping.set()
        shard.log.go_away()
        shard.put(with_history(piece((ZERO, 0, 2))))
        with pytest.raises(UnreachableBroker):
            shard.commits.flush()
        assert shard.store.positions() == {}


ROWS = 400


def gauge(shard: Any, name: str) -> float:
    return float(getattr(shard.storage, name).labels("stream")._value.get())


def test_a_commit_waits_for_room_says_so_once_and_writes_its_micro_batches_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk, sink(disk.path) as shard, caplog.at_level(logging.WARNING):
        shard.take(with_history(piece((ZERO, 0, 1))))
        full = disk.fill()
        shard.put(with_history(piece((ZERO, 1, ROWS))))
        until(lambda: gauge(shard, "waiting") == 1, "it waits")
        # Tried again, and refused again.
        refused = len(transactions(shard.log))
        assert not shard.stopping.wait(3 * RETRY_S)
        shard.commits.check()
        assert shard.store.positions() == {ZERO: 1}
        assert (refused, len(transactions(shard.log)), gauge(shard, "waits")) == (2, 2, 1)
        assert [one for one in caplog.messages if "the stream waits for space" in one] == caplog.messages
        full.unlink()
        shard.commits.flush()
        assert shard.store.positions() == {ZERO: 1 + ROWS}
        assert (transactions(shard.log), gauge(shard, "waiting")) == ([1, 1], 0)
        assert caplog.messages[-1] == "the stream continues: there is space again"
        assert len(caplog.messages) == 2


def test_a_stream_that_is_asked_to_stop_waits_for_no_room_and_reads_the_clicks_again_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk, sink(disk.path) as shard:
        shard.take(with_history(piece((ZERO, 0, 1))))
        full = disk.fill()
        shard.put(with_history(piece((ZERO, 1, ROWS))))
        until(lambda: gauge(shard, "waiting") == 1, "it waits")
        shard.stopping.set()
        with pytest.raises(StoreFull, match="free space"):
            shard.commits.flush()
        assert shard.store.positions() == {ZERO: 1}
        full.unlink()


def test_the_leaders_that_a_full_disk_refused_are_written_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        leaders = Leaders(disk.path)
        reader: Any = SimpleNamespace(leader_epoch=lambda *_: 7)
        full = disk.fill()
        part = Range(ZERO, 0, 5, rows=5)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                leaders.note([part], reader)
        full.unlink()
        leaders.note([part], reader)
        assert Leaders(disk.path).at(ZERO.topic_id, {0: 5}) == {0: 7}
