"""What only a log in memory does on demand: retention, compaction, being away, and telling what was written."""

from __future__ import annotations

import pytest

from state.config.sections import Kafka
from state.errors import GapError, UnreachableBroker
from state.log import MemoryLog
from tests.reading import read_until, values

HOUR_MS = 3_600_000


class Clock:
    now_ms = 10 * HOUR_MS

    def __call__(self) -> int:
        return self.now_ms


def test_retention_moves_the_beginning_past_what_is_older() -> None:
    clock = Clock()
    log = MemoryLog(clock_ms=clock)
    topics = log.topics()
    topics.ensure("clicks", 1, {"retention.ms": str(HOUR_MS)})
    topics.ensure("kept", 1)
    with log.writer() as writer:
        for name in ("clicks", "kept"):
            for age_h in (3, 2, 0):
                writer.send(name, 0, None, b"%d" % age_h, timestamp_ms=clock.now_ms - age_h * HOUR_MS)
    behind = log.reader("clicks")
    log.clean()
    assert topics.ends("clicks") == {0: (2, 3)}
    assert topics.ends("kept") == {0: (0, 3)}
    with pytest.raises(GapError, match="begins at 2"):
        behind.poll(0.0)
    clock.now_ms += 2 * HOUR_MS
    log.clean()
    assert topics.ends("clicks") == {0: (3, 3)}


def test_retention_waits_for_an_open_transaction() -> None:
    clock = Clock()
    log = MemoryLog(clock_ms=clock)
    log.topics().ensure("clicks", 1, {"retention.ms": "1000"})
    with log.writer("tx") as writer, writer.transaction():
        writer.send("clicks", 0, None, b"old")
        writer.flush()
        clock.now_ms += 5000
        log.clean()
        assert log.topics().ends("clicks") == {0: (0, 1)}


def test_compaction_keeps_the_newest_record_of_each_key_where_it_is() -> None:
    log = MemoryLog()
    log.topics().ensure("items", 1, {"cleanup.policy": "compact"})
    with log.writer("tx") as writer:
        for key, value in ((b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"b", None)):
            with writer.transaction():
                writer.send("items", 0, key, value)
        with pytest.raises(ZeroDivisionError), writer.transaction():
            writer.send("items", 0, b"a", b"aborted")
            writer.flush()
            raise ZeroDivisionError
        log.clean()
        with log.reader("items") as reader:
            batches = read_until(reader, {0: 10})
    assert [
        (offset, key) for batch in batches for offset, key in zip(batch.offsets.tolist(), batch.keys, strict=True)
    ] == [
        (4, b"a"),
        (6, b"b"),
    ]
    assert values(batches) == [b"3", None]
    assert batches[0].first == 0, "no gap: what compaction took is absent"


def test_while_it_is_away_a_poll_finds_nothing_and_everything_else_says_so() -> None:
    log = MemoryLog()
    topics, writer = log.topics(), log.writer("tx")
    topics.ensure("clicks", 1)
    reader = log.reader("clicks")
    with writer.transaction():
        writer.send("clicks", 0, None, b"before")
    assert reader.reachable()
    log.go_away()
    assert not reader.reachable()
    assert reader.poll(0.0) == []
    for use in (
        lambda: topics.ends("clicks"),
        lambda: topics.names(),
        lambda: log.topics(),
        lambda: log.reader("clicks"),
        lambda: log.writer(),
        lambda: reader.refresh(),
        lambda: reader.commit_group({0: 1}),
    ):
        with pytest.raises(UnreachableBroker, match=Kafka().bootstrap_servers):
            use()
    with pytest.raises(UnreachableBroker), writer.transaction():
        writer.send("clicks", 0, None, b"unknown")
    log.come_back()
    assert values(read_until(reader, {0: 2})) == [b"before"]


def test_an_outage_within_a_transaction_leaves_it_to_the_next_writer_of_the_id() -> None:
    log = MemoryLog()
    log.topics().ensure("clicks", 1)
    reader, lost = log.reader("clicks"), log.writer("tx")
    with pytest.raises(UnreachableBroker), lost.transaction():
        lost.send("clicks", 0, None, b"half")
        lost.flush()
        log.go_away()
    log.come_back()
    assert reader.poll(0.0) == []
    with log.writer("tx") as next_one, next_one.transaction():
        next_one.send("clicks", 0, None, b"whole")
    assert values(read_until(reader, {0: 4})) == [b"whole"]


def test_what_was_written_can_be_looked_at_with_headers_and_transactions() -> None:
    log = MemoryLog()
    log.topics().ensure("letters", 2)
    with log.writer("tx") as writer:
        with writer.transaction():
            writer.send("letters", 1, None, b"", [("reason", b"undecodable")])
            writer.send("letters", 0, None, b"")
        with pytest.raises(ZeroDivisionError), writer.transaction():
            writer.send("letters", 0, None, b"never")
            raise ZeroDivisionError
    first, second = log.records("letters")
    assert second.headers == (("reason", b"undecodable"),)
    assert first.transaction is second.transaction
