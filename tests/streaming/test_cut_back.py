"""Clicks that were cut back behind the stream and grew again are noticed; where somebody accepts it, nothing is taken for what it is not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from state.config.sections import Kafka
from state.errors import TruncatedLog
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Reader
from state.log.accepted_gaps import Consent, parse_allowance
from state.log.follow import Position
from state.positions import Range, Source
from streaming import accounts
from streaming.accounts import FILLER, Leaders, accept_truncation, open_clicks
from tests.memory_log import MemoryLog
from tests.streaming.pieces import ZERO

KAFKA = Kafka()
TOPIC = KAFKA.clicks_topic


class Shard:
    """A store that has read ten clicks of a log in memory, which then lost the last four."""

    def __init__(self, path: Path) -> None:
        self.log = MemoryLog(ids=lambda: ZERO.topic_id)
        self.log.topics().ensure(TOPIC, 1)
        self.write(b"old", 10)
        self.store = HistoryStore(path / HISTORIES, map_bytes=1 << 26)
        self.leaders = Leaders(path)
        reader = self.log.reader(TOPIC)
        reader.poll(0.0)
        ranges = [Range(ZERO, 0, 10, rows=10)]
        self.leaders.note(ranges, reader)
        self.store.commit(Appends.none(), ranges)
        self.log.cut_back(TOPIC, {0: 6})
        self.leaders = Leaders(path)

    def write(self, value: bytes, times: int) -> None:
        with self.log.writer() as writer:
            for _ in range(times):
                writer.send(TOPIC, 0, b"user", value)

    def opened(self, consent: Consent = Consent()) -> Reader:  # noqa: B008 - it is frozen
        position = Position(ZERO.topic_id, {0: 10}, self.leaders.at(ZERO.topic_id, {0: 10}))
        return open_clicks(self.log, KAFKA, None, position, partial(accept_truncation, self.store, consent, 7))


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    made = Shard(tmp_path)
    yield made
    made.store.close()


def test_nobody_reads_on_unasked(shard: Shard) -> None:
    with pytest.raises(TruncatedLog, match="ends at 6: the log was truncated, so that offsets 6 to 9 are used twice"):
        shard.opened()
    shard.write(b"new", 9)
    for consent in (Consent(), Consent((parse_allowance(f"{ZERO.topic_id}:0:7-9"),), "ann", "an election")):
        with pytest.raises(TruncatedLog, match="has grown again to 15") as raised:
            shard.opened(consent)
        assert "never read: send them again" in raised.value.do
    assert accounts.accepted(shard.store) == []


def test_where_it_ends_before_us_it_is_filled_up_and_what_comes_is_read(shard: Shard) -> None:
    with shard.opened(Consent(actor="ann", reason="the power went", cut_back=True)) as reader:
        assert reader.poll(0.0) == []
        shard.write(b"new", 3)
        (batch,) = reader.poll(0.0)
        assert (batch.first, batch.values) == (10, [b"new"] * 3)
    filled = [record for record in shard.log.records(TOPIC) if record.key == FILLER]
    assert [(record.offset, record.value) for record in filled] == [(offset, None) for offset in range(6, 10)]
    (one,) = accounts.accepted(shard.store)
    assert (one.gap.first, one.gap.next, one.actor, one.reason) == (6, 10, "ann", "the power went")


def test_what_was_accepted_once_needs_no_words_again(shard: Shard) -> None:
    shard.write(b"new", 9)
    consent = Consent((parse_allowance(f"{ZERO.topic_id[:8]}:0:6-9"),), "ann", "an election")
    for given in (consent, Consent()):
        with shard.opened(given) as reader:
            (batch,) = reader.poll(0.0)
            assert (batch.first, batch.next) == (10, 15)
    assert len(accounts.accepted(shard.store)) == 1


def test_epochs_are_kept_once_for_each_leader(tmp_path: Path) -> None:
    log, leaders = MemoryLog(ids=lambda: ZERO.topic_id), Leaders(tmp_path)
    log.topics().ensure(TOPIC, 1)
    reader = log.reader(TOPIC)
    written: list[bytes] = []
    for _ in range(3):
        with log.writer() as writer:
            writer.send(TOPIC, 0, None, b"x")
        (batch,) = reader.poll(0.0)
        leaders.note([Range(ZERO, batch.first, batch.next, rows=1)], reader)
        written.append((tmp_path / "leaders.json").read_bytes())
    assert len(set(written)) == 1
    again = Leaders(tmp_path)
    assert again.at(ZERO.topic_id, {0: 3, 1: 9}) == {0: 0}
    assert again.at(Source("ef" * 16, 0).topic_id, {0: 3}) == {}


def test_a_rollback_into_a_commit_with_two_leaders_takes_it_for_no_cut(tmp_path: Path) -> None:
    log, leaders = MemoryLog(ids=lambda: ZERO.topic_id), Leaders(tmp_path)
    log.topics().ensure(TOPIC, 1)
    reader = log.reader(TOPIC)

    def write(records: int) -> None:
        with log.writer() as writer:
            for _ in range(records):
                writer.send(TOPIC, 0, None, b"x")

    write(2)
    leaders.note([Range(ZERO, 0, reader.poll(0.0)[0].next, rows=2)], reader)
    write(1)
    log.cut_back(TOPIC, {0: 3})
    write(5)
    while reader.position(0) < 8:
        reader.poll(0.0)
    leaders.note([Range(ZERO, 2, 8, rows=6)], reader)
    for position in range(9):
        told = Leaders(tmp_path).at(ZERO.topic_id, {0: position})
        with log.reader(TOPIC, None, {0: position}, leaders=told) as again:
            assert again.poll(0.0) or position == 8
