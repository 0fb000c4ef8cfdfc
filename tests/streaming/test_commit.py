"""The commit sequence: Kafka first, then the store, in order; the group and the metrics say what was committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.accounts import StreamAccount, check_accounts
from state.config.sections import Kafka
from state.errors import FencedWriter, PositionConflict
from state.events.dead_letters import DeadLetter
from state.history.appends import Appends
from state.microbatch.codec import decode
from state.positions import Range, Source
from streaming.cut import Cut
from tests.streaming.committing import sink, with_history
from tests.streaming.pieces import ZERO, piece


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
    assert (dead.key, dead.value) == (b"ab" * 16 + b":0:3", b"")
    assert dead.headers == (
        ("reason", b"undecodable"), ("topic_id", b"ab" * 16), ("partition", b"0"), ("offset", b"3"),
    )  # fmt: skip


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


def test_rows_that_kafka_did_not_take_move_no_position(tmp_path: Path) -> None:
    with sink(tmp_path) as shard:
        shard.log.writer("shard-0")
        shard.commits.put(Cut((with_history(piece((ZERO, 0, 1))),), 0))
        with pytest.raises(FencedWriter):
            shard.commits.flush()
        assert len(shard.store.read(0)) == 0
        assert shard.told == []


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
