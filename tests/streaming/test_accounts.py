"""Gaps in the clicks: named, accepted by somebody for a reason, counted; and the store's account balances with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import lmdb
import pytest
from prometheus_client import CollectorRegistry

from state.accounts import StreamAccount, check_accounts
from state.config.sections import Kafka
from state.errors import GapError, TruncatedLog
from state.history.appends import Appends
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Reader, Topics
from state.log.accepted_gaps import Consent, parse_allowance
from state.log.follow import Position
from state.metrics import StreamMetrics
from state.microbatch.batch import gaps
from state.microbatch.codec import decode
from state.positions import Gap, Range, Source
from streaming import accounts
from streaming.accounts import FILLER, Leaders, accept_truncation, open_clicks
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.streaming.pieces import ZERO
from tests.streaming.streams import (
    FOREVER,
    click,
    following,
    histories_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)

CLICKS = Source("ab" * 16, 0)
ANN = Consent((parse_allowance("0:4-9"),), "ann", "old clicks")


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    made = HistoryStore(tmp_path / "histories", map_bytes=1 << 26)
    made.commit(Appends.none(), [Range(CLICKS, 0, 4, rows=3, dead=1)])
    return made


def test_a_gap_that_nobody_accepts_changes_nothing(store: HistoryStore) -> None:
    found = accounts.missing(CLICKS.topic_id, store.positions(), {0: (11, 20)})
    with pytest.raises(GapError, match=r"partition 0, positions 4 to 10 \(7\)") as caught:
        accounts.pass_gaps(store, found, ANN, "clicks", 5, lambda *_: pytest.fail("nothing is written"))
    assert caught.value.gaps == tuple(found)
    assert store.positions() == {CLICKS: 4}
    store.close()


def test_an_accepted_gap_is_written_first_then_counted_with_who_and_why(store: HistoryStore) -> None:
    found = accounts.missing(CLICKS.topic_id, store.positions(), {0: (9, 20)})
    seen: list[object] = []

    def write(gaps: Sequence[Gap], now_ms: int) -> None:
        seen.append((gaps, now_ms, store.positions()[CLICKS]))

    accounts.pass_gaps(store, found, ANN, "clicks", 5, write)
    assert seen == [(found, 5, 4)], "the training log knows before the store moves"
    assert store.positions() == {CLICKS: 9}
    assert store.totals == {"positions": 9, "rows": 3, "dead": 1, "filtered": 0, "absent": 0, "gap": 5}
    assert check_accounts(StreamAccount(**store.totals)) == ()
    (one,) = accounts.accepted(store)
    assert (one.gap.positions, one.actor, one.reason, one.at_ms) == (5, "ann", "old clicks", 5)
    assert accounts.missing(CLICKS.topic_id, store.positions(), {0: (9, 20)}) == []
    accounts.pass_gaps(store, [], ANN, "clicks", 6, write)
    assert len(seen) == len(accounts.accepted(store)) == 1, "where nothing is missing nothing is done"
    store.close()


def test_a_wrong_counter_in_the_store_is_found_and_said(store: HistoryStore, caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    metrics = StreamMetrics(registry)
    assert accounts.show(store, metrics) == ()
    store.close()
    # Somebody's bug: a row counted twice.
    environment = lmdb.open(str(store.path), map_size=1 << 26, max_dbs=2)
    meta = environment.open_db(b"meta")
    with environment.begin(write=True) as transaction:
        key = b"p:" + str(CLICKS).encode()
        stored = transaction.get(key, db=meta)
        assert stored is not None
        counts = json.loads(stored)
        transaction.put(key, json.dumps(counts | {"rows": 4}).encode(), db=meta)
    environment.close()
    spoiled = HistoryStore(store.path, map_bytes=1 << 26)
    (fault,) = accounts.show(spoiled, metrics)
    assert "4 positions, but 4 rows + 1 dead" in fault
    assert "does not balance" in caplog.text
    assert registry.get_sample_value("springtide_accounting_stream_faults") == 1
    spoiled.close()


def test_deleted_clicks_stop_the_stream_until_somebody_accepts_them(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topic_id = topics.ensure(kafka.clicks_topic, 2, FOREVER).topic_id
        send(kafka, [click(number) for number in range(20)])
        with running(settings, tmp_path / "log") as stream:
            until(lambda: next_offsets(log.poll()) == {0: 10, 1: 10}, "first clicks")
            assert stream.stop() == 0, stream.lines
        # 1. Retention passes both positions.
        send(kafka, [click(number) for number in range(20, 60)], 20)
        topics.delete_before(kafka.clicks_topic, {0: 15, 1: 12})
        with running(settings, tmp_path / "log") as stream:
            assert stream.wait() == 1
            last = stream.lines[-1]
        assert "GapError" in last
        assert "partition 0, positions 10 to 14 (5); partition 1, positions 10 to 11 (2)" in last
        topic = topics.describe(kafka.clicks_topic).topic_id[:8]
        flag = f"--accept-gap {topic}"
        assert f"springtide stream (or up) {flag}:0:10-14 {flag}:1:10-11 --reason TEXT" in last
        # 2. Killed between the two steps, it does the same again.
        flags = ("--accept-gap", f"{topic}:0:10-14", "--accept-gap", "1:10-99", "--reason", "old clicks")
        with running(settings, tmp_path / "log", "gaps.written:1", arguments=flags) as stream:
            assert stream.wait() == -9, stream.lines
        with running(settings, tmp_path / "log", arguments=flags) as stream:
            until(lambda: next_offsets(log.poll()) == {0: 30, 1: 30}, "clicks behind the gap")
            assert stream.stop() == 0, stream.lines
        assert any("gap accepted by" in line and "old clicks" in line for line in stream.lines)
        # 3. The account balances, and so do the ranges of the log.
        with histories_of(settings) as store:
            assert store.totals == {"positions": 60, "rows": 53, "dead": 0, "filtered": 0, "absent": 0, "gap": 7}
            assert accounts.faults(store) == ()
            assert [one.gap.positions for one in accounts.accepted(store)] == [5, 2]
        marks: dict[Source, int] = {}
        for value in log.poll():
            header = decode(value).header
            assert gaps(header, marks) == [], "readers of the log see no gap of their own"
            marks |= {part.source: part.next for part in header.ranges}
        assert marks == {Source(topic_id, 0): 30, Source(topic_id, 1): 30}


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
