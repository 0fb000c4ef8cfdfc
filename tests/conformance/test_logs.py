"""Kafka and the log in memory keep the same promises, and the client reads whole batches as they are."""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import KafkaError
from kafka.producer import transaction_manager

from state.config.sections import Kafka
from state.errors import GapError, LogError, TruncatedLog, UnknownTopic, UnreachableBroker
from state.log import Log, Reader, Topics, Writer, client_options, partition_of
from state.log.client import translated
from state.log.reader import FETCH_BYTES, BatchRecords
from state.positions import Gap, Source
from tests.conftest import KafkaFactory
from tests.memory_log import MemoryLog
from tests.reading import all_ends, eventually, joined, next_batches, read_until, values, write


@pytest.fixture
def settings(kafka_settings: KafkaFactory) -> Kafka:
    return kafka_settings()


@pytest.fixture(params=[Log, MemoryLog], ids=lambda one: one.__name__)
def log(request: pytest.FixtureRequest, settings: Kafka) -> Log:
    made: Log = request.param(settings)
    return made


@pytest.fixture
def topics(log: Log) -> Iterator[Topics]:
    with log.topics() as topics:
        yield topics


@pytest.fixture
def clicks(topics: Topics, settings: Kafka) -> str:
    topics.ensure(settings.clicks_topic, 2)
    return settings.clicks_topic


# Topics


def test_a_topic_is_made_once_and_keeps_its_id(topics: Topics, settings: Kafka) -> None:
    made = topics.ensure(settings.clicks_topic, 3, {"retention.ms": "3600000"})
    assert made.partitions == 3
    assert len(made.topic_id) == 32
    assert int(made.topic_id, 16)
    assert topics.ensure(settings.clicks_topic, 5) == made == topics.describe(settings.clicks_topic)
    assert settings.clicks_topic in topics.names()


def test_an_unknown_topic_is_said_at_once_and_never_made(log: Log, topics: Topics) -> None:
    with log.writer() as writer:
        for use in (
            lambda: topics.describe("typo"),
            lambda: topics.ends("typo"),
            lambda: topics.delete("typo"),
            lambda: topics.offset_before("typo", 0),
            lambda: log.reader("typo"),
            lambda: writer.send("typo", 0, None, b"x"),
        ):
            start = time.monotonic()
            with pytest.raises(UnknownTopic, match="typo"):
                use()
            assert time.monotonic() - start < 30, "nobody waits until a request is given up"
    assert "typo" not in topics.names()


def test_a_topic_made_again_has_another_id_and_none_of_the_records(log: Log, topics: Topics, clicks: str) -> None:
    before = topics.describe(clicks).topic_id
    write(log, clicks, [b"old"])
    topics.delete(clicks)
    with pytest.raises(UnknownTopic):
        topics.describe(clicks)
    assert topics.ensure(clicks, 2).topic_id != before
    assert topics.ends(clicks) == {0: (0, 0), 1: (0, 0)}


def test_ends_and_the_offset_before_a_time(log: Log, topics: Topics, clicks: str) -> None:
    write(log, clicks, [b"a", b"b", b"c"])
    assert topics.ends(clicks) == {0: (0, 3), 1: (0, 0)}
    assert topics.offset_before(clicks, 1001) == {0: 1, 1: 0}
    assert topics.offset_before(clicks, 10_000) == {0: 3, 1: 0}
    topics.delete_before(clicks, {0: 2})
    assert topics.ends(clicks)[0] == (2, 3)
    with pytest.raises(LogError):
        topics.delete_before(clicks, {0: 4})


def test_group_positions_need_no_member(log: Log, topics: Topics, clicks: str, settings: Kafka) -> None:
    write(log, clicks, [b"a", b"b"])
    with log.reader(clicks) as reader:
        read_until(reader, {0: 2})
        reader.commit_group({0: 2, 1: 0})
    assert topics.committed(settings.group, clicks) == {0: 2, 1: 0}
    assert topics.committed("nobody", clicks) == {}


# Reading


def test_records_come_with_their_positions(log: Log, topics: Topics, clicks: str) -> None:
    write(log, clicks, [b"a", b"b", b"c"])
    write(log, clicks, [b"z"], partition=1)
    with log.reader(clicks) as reader:
        batches = read_until(reader, {0: 3, 1: 1})
        assert (reader.topic, reader.topic_id) == (clicks, topics.describe(clicks).topic_id)
        assert all(batch.topic_id == reader.topic_id for batch in batches)
    first = [batch for batch in batches if batch.partition == 0]
    assert values(first) == [b"a", b"b", b"c"]
    assert np.concatenate([batch.offsets for batch in first]).tolist() == [0, 1, 2]
    assert np.concatenate([batch.timestamps_ms for batch in first]).tolist() == [1000, 1001, 1002]
    assert [key for batch in first for key in batch.keys] == [b"k0", b"k1", b"k2"]
    assert values(batches, 1) == [b"z"]
    assert joined(batches) == (0, 3)


def test_shares_say_how_much_comes_of_which_partition_and_nothing_is_lost(log: Log, clicks: str) -> None:
    for number in (0, 1):
        write(log, clicks, [b"%d-%d" % (number, one) for one in range(5)], partition=number)
    with log.reader(clicks) as reader:
        found = next_batches(reader, 10, {1: 2})
        assert (values(found, 1), values(found, 0), reader.position(0)) == ([b"1-0", b"1-1"], [], 0)
        assert reader.unread(1) == 3
        found = next_batches(reader, 4, {0: 3, 1: 3})
        assert (values(found, 0), values(found, 1)) == ([b"0-0", b"0-1", b"0-2"], [b"1-2"])
        assert reader.poll(0.0, 10, {0: 0}) == []
        left = [*next_batches(reader, 10, {1: 9}), *reader.poll(0.0, 10)]
        assert (values(left, 1), values(left, 0)) == ([b"1-3", b"1-4"], [b"0-3", b"0-4"])
        assert (reader.unread(0), reader.unread(1)) == (0, 0)


def test_a_partition_that_waits_keeps_nobody_else_from_their_news(log: Log, clicks: str) -> None:
    write(log, clicks, [b"waits"], partition=0)
    with log.reader(clicks) as reader:
        assert reader.poll(0.1, 10, {1: 9}) == []
        write(log, clicks, [b"news"], partition=1)
        assert values(next_batches(reader, 10, {1: 9}), 1) == [b"news"]
        assert values(next_batches(reader)) == [b"waits"]


def test_keys_and_values_may_be_missing(log: Log, clicks: str) -> None:
    with log.writer() as writer:
        writer.send(clicks, 0, None, b"no key", [("reason", b"why")])
        writer.send(clicks, 0, b"no value", None)
        writer.flush()
    with log.reader(clicks) as reader:
        batches = read_until(reader, {0: 2})
    assert [key for batch in batches for key in batch.keys] == [None, b"no value"]
    assert values(batches) == [b"no key", None]


def test_a_key_has_one_partition(log: Log, clicks: str) -> None:
    keys = [b"user-%d" % number for number in range(20)]
    with log.writer() as writer:
        for key in keys:
            writer.send(clicks, None, key, key)
        writer.flush()
    with log.reader(clicks) as reader:
        batches = read_until(reader, all_ends(log, clicks))
    for partition in (0, 1):
        assert values(batches, partition) == [key for key in keys if partition_of(key, 2) == partition]


def test_poll_gives_no_more_than_asked_and_joins_without_a_hole(log: Log, clicks: str) -> None:
    write(log, clicks, [b"%d" % number for number in range(500)])
    with log.reader(clicks) as reader:
        batches = read_until(reader, {0: 500}, most=7)
    assert max(len(batch) for batch in batches) == 7
    assert values(batches) == [b"%d" % number for number in range(500)]
    assert joined(batches) == (0, 500)


def test_reading_begins_where_it_is_told(log: Log, clicks: str) -> None:
    write(log, clicks, [b"a", b"b", b"c", b"d"])
    with log.reader(clicks, positions={0: 2}) as reader:
        assert values(read_until(reader, {0: 4})) == [b"c", b"d"]
        reader.seek(0, 1)
        assert values(read_until(reader, {0: 4})) == [b"b", b"c", b"d"]
    with log.reader(clicks, partitions=[0], positions={0: 4}) as reader:
        assert reader.partitions == [0]
        assert reader.position(0) == 4
    with pytest.raises(UnknownTopic, match="no partition 9"):
        log.reader(clicks, partitions=[9])


def test_an_idle_poll_returns_nothing_and_soon(log: Log, clicks: str) -> None:
    with log.reader(clicks) as reader:
        reader.poll(0.5)
        start = time.monotonic()
        assert reader.poll(0.02) == []
        assert time.monotonic() - start < 9
        assert reader.lag() == {0: 0, 1: 0}


def test_a_waiting_poll_hears_of_a_record_at_once(log: Log, clicks: str) -> None:
    with log.reader(clicks) as reader:
        writing = threading.Timer(0.1, write, (log, clicks, [b"news"]))
        writing.start()
        start, found = time.monotonic(), reader.poll(15.0)
        assert values(found) == [b"news"]
        assert time.monotonic() - start < 14
        writing.join()


def test_lag_counts_what_is_not_delivered(log: Log, clicks: str) -> None:
    write(log, clicks, [b"x"] * 10)
    with log.reader(clicks) as reader:
        assert reader.lag() == {0: 10, 1: 0}
        deadline = time.monotonic() + 60
        while reader.position(0) == 0 and time.monotonic() < deadline:
            reader.poll(0.2, 4)
        assert reader.lag() == {0: 6, 1: 0}


def test_new_partitions_are_taken_up(log: Log, topics: Topics, clicks: str) -> None:
    with log.reader(clicks) as reader, log.reader(clicks, partitions=[0]) as narrow:
        assert reader.refresh() == []
        topics.grow(clicks, 3)
        write(log, clicks, [b"first"], partition=2)
        assert reader.refresh() == [2]
        assert values(read_until(reader, {2: 1}), 2) == [b"first"]
        assert narrow.refresh() == []


# Transactions


def test_a_transaction_is_seen_whole_and_its_marker_is_an_absent_position(log: Log, clicks: str) -> None:
    with log.reader(clicks) as reader, log.writer(f"tx-{clicks}") as writer:
        with writer.transaction():
            writer.send(clicks, 0, b"k", b"one")
            writer.send(clicks, 0, b"k", b"two")
            writer.send(clicks, 1, b"k", b"beside")
            writer.flush()
            assert reader.poll(0.3) == []
        batches = read_until(reader, {0: 3, 1: 2})
    assert values(batches) == [b"one", b"two"]
    assert values(batches, 1) == [b"beside"]
    assert joined(batches) == (0, 3)


def test_an_aborted_transaction_is_a_range_without_records(log: Log, clicks: str) -> None:
    with log.writer(f"tx-{clicks}") as writer:
        with pytest.raises(RuntimeError, match="changed my mind"), writer.transaction():
            writer.send(clicks, 0, b"k", b"never")
            writer.flush()
            raise RuntimeError("changed my mind")
        with log.reader(clicks) as reader:
            batches = read_until(reader, {0: 2})
            assert values(batches) == []
            assert joined(batches) == (0, 2)
            with writer.transaction():
                writer.send(clicks, 0, b"k", b"after")
            assert values(read_until(reader, {0: 4})) == [b"after"]
    with log.reader(clicks, committed_only=False) as reader:
        assert values(read_until(reader, {0: 4})) == [b"never", b"after"]


def test_an_open_transaction_holds_back_what_follows_it(log: Log, clicks: str) -> None:
    with (
        log.reader(clicks) as reader,
        log.reader(clicks, committed_only=False) as everything,
        log.writer(f"one-{clicks}") as one,
        log.writer(f"two-{clicks}") as two,
    ):
        with one.transaction():
            one.send(clicks, 0, None, b"first")
            one.flush()
            with two.transaction():
                two.send(clicks, 0, None, b"second")
            assert values(read_until(everything, {0: 3})) == [b"first", b"second"]
            assert reader.poll(0.3) == []
            with log.topics() as topics:
                assert (topics.ends(clicks)[0], topics.ends(clicks, committed_only=True)[0]) == ((0, 3), (0, 0))
        assert values(read_until(reader, {0: 4})) == [b"first", b"second"]


def test_a_writer_with_a_transactional_id_writes_in_transactions_only(log: Log, clicks: str) -> None:
    with log.writer(f"tx-{clicks}") as writer, pytest.raises(LogError):
        writer.send(clicks, 0, None, b"outside")
        writer.flush()
    with log.writer() as plain, pytest.raises(LogError), plain.transaction():
        plain.send(clicks, 0, None, b"inside")
    assert all_ends(log, clicks) == {0: 0, 1: 0}


def test_a_second_writer_fences_the_first(log: Log, clicks: str) -> None:
    first = log.writer(f"tx-{clicks}")
    with first.transaction():
        first.send(clicks, 0, b"k", b"mine")
    second = log.writer(f"tx-{clicks}")
    with pytest.raises(LogError, match="stop one of the two"), first.transaction():
        first.send(clicks, 0, b"k", b"zombie")
    with second.transaction():
        second.send(clicks, 0, b"k", b"theirs")
    first.close()
    second.close()
    with log.reader(clicks) as reader:
        assert values(read_until(reader, all_ends(log, clicks))) == [b"mine", b"theirs"]


def test_what_a_dead_writer_left_open_never_becomes_visible(log: Log, clicks: str) -> None:
    with log.writer(f"tx-{clicks}") as dead, pytest.raises(LogError, match="another writer"), dead.transaction():
        dead.send(clicks, 0, b"k", b"half")
        dead.flush()
        with log.writer(f"tx-{clicks}") as successor, log.reader(clicks) as reader:
            with successor.transaction():
                successor.send(clicks, 0, b"k", b"whole")
            assert values(read_until(reader, {0: 4})) == [b"whole"]
    assert all_ends(log, clicks)[0] == 4, "nothing of the dead one came later"


@pytest.mark.parametrize("seed", range(3))
def test_positions_and_records_follow_from_what_was_written(log: Log, clicks: str, seed: int) -> None:
    """A record takes one position, the end of a transaction one in each partition that it touched."""
    chance = random.Random(seed)
    expected: dict[int, list[tuple[int, bytes]]] = {0: [], 1: []}
    ends = {0: 0, 1: 0}
    with log.writer(f"tx-{clicks}") as writer:
        for number in range(25):
            sent = [(chance.randrange(2), b"%d-%d" % (number, part)) for part in range(chance.randrange(4))]
            aborted = chance.random() < 0.3
            with contextlib.suppress(ZeroDivisionError), writer.transaction():
                for partition, value in sent:
                    writer.send(clicks, partition, None, value)
                writer.flush()
                if aborted:
                    raise ZeroDivisionError
            for partition, value in sent:
                if not aborted:
                    expected[partition].append((ends[partition], value))
                ends[partition] += 1
            for partition in {partition for partition, _ in sent}:
                ends[partition] += 1
    assert eventually(lambda: all_ends(log, clicks) == ends), "the last marker comes a little later"
    with log.reader(clicks) as reader:
        batches = read_until(reader, ends, most=5)
    for partition, wanted in expected.items():
        mine = [batch for batch in batches if batch.partition == partition]
        found = [pair for batch in mine for pair in zip(batch.offsets.tolist(), batch.values, strict=True)]
        assert found == wanted
        assert joined(batches, partition) == (0, ends[partition])


# What is refused, and what is gone


def test_a_record_beyond_the_topics_limit_is_refused_in_one_line(log: Log, topics: Topics, settings: Kafka) -> None:
    topics.ensure(settings.clicks_topic, 1, {"max.message.bytes": "1000"})
    with log.writer() as writer:
        writer.send(settings.clicks_topic, 0, b"k", b"x" * 5000)
        with pytest.raises(LogError) as raised:
            writer.flush()
    assert "\n" not in str(raised.value)
    with log.writer() as writer:
        writer.send(settings.clicks_topic, 0, b"k", b"x" * 500)
        writer.flush()
    assert topics.ends(settings.clicks_topic) == {0: (0, 1)}


def test_a_compacted_topic_takes_no_record_without_a_key(log: Log, topics: Topics, settings: Kafka) -> None:
    topics.ensure(settings.clicks_topic, 1, {"cleanup.policy": "compact"})
    with log.writer() as writer:
        writer.send(settings.clicks_topic, 0, None, b"whose?")
        with pytest.raises(LogError):
            writer.flush()
    write(log, settings.clicks_topic, [b"mine"])
    assert topics.ends(settings.clicks_topic) == {0: (0, 1)}


def test_a_reader_tells_the_leaders_epoch_and_goes_on_from_it(log: Log, clicks: str) -> None:
    write(log, clicks, [b"a", b"b"])
    with log.reader(clicks) as reader:
        assert reader.leader_epoch(0, 0) == -1
        read_until(reader, {0: 2})
        epoch = reader.leader_epoch(0, 2)
        assert epoch >= 0
    write(log, clicks, [b"c"])
    with log.reader(clicks, positions={0: 2}, leaders={0: epoch}) as reader:
        assert reader.leader_epoch(0, 2) == epoch
        assert values(read_until(reader, {0: 3})) == [b"c"]


def test_records_deleted_before_they_were_read_are_a_gap(log: Log, topics: Topics, clicks: str) -> None:
    write(log, clicks, [b"x"] * 10)
    with log.reader(clicks) as reader:
        topics.delete_before(clicks, {0: 6})
        with pytest.raises(
            GapError, match=r"partition 0: the stored position is 0, but the log now begins at 6"
        ) as caught:
            read_until(reader, {0: 10})
        assert caught.value.gaps == (Gap(Source(reader.topic_id, 0), 0, 6),)
    with pytest.raises(GapError, match=r"4 positions"):
        log.reader(clicks, positions={0: 2})
    with pytest.raises(TruncatedLog, match="ends at 10") as caught:
        log.reader(clicks, positions={0: 11})
    assert caught.value.gaps == (Gap(Source(topics.describe(clicks).topic_id, 0), 10, 11),)
    with log.reader(clicks, positions={0: 6}) as reader:
        assert len(values(read_until(reader, {0: 10}))) == 4


def test_a_topic_that_is_gone_or_another_one_stops_the_reader(log: Log, topics: Topics, clicks: str) -> None:
    with log.reader(clicks) as reader:
        reader.poll(0.1)
        topics.delete(clicks)
        deadline = time.monotonic() + 20
        with pytest.raises(UnknownTopic, match="does not exist"):
            while time.monotonic() < deadline:
                reader.poll(0.2)
        topics.ensure(clicks, 2)
        with pytest.raises(UnknownTopic, match="created again"):
            reader.refresh()


Row = tuple[int, int, int, bytes | None, bytes | None]


@pytest.fixture
def clicks_of_kafka_client(settings: Kafka) -> str:
    with Topics(settings) as topics:
        topics.ensure(settings.clicks_topic, 2)
    return settings.clicks_topic


def read_by_the_client(settings: Kafka, topic: str, ends: dict[int, int], isolation: str) -> list[Row]:
    consumer = KafkaConsumer(
        **client_options(settings), auto_offset_reset="earliest", enable_auto_commit=False, isolation_level=isolation
    )
    partitions = [TopicPartition(topic, number) for number in ends]
    consumer.assign(partitions)
    rows: list[Row] = []
    while any(consumer.position(each) < ends[each.partition] for each in partitions):
        for found in consumer.poll(200).values():
            rows += [(one.partition, one.offset, one.timestamp, one.key, one.value) for one in found]
    consumer.close()
    return sorted(rows)


@pytest.mark.parametrize("isolation", ["read_committed", "read_uncommitted"])
def test_whole_batches_hold_the_records_that_the_client_reads(
    clicks_of_kafka_client: str, settings: Kafka, isolation: str
) -> None:
    with Writer(settings) as writer, Writer(settings, f"tx-{clicks}") as transactional:
        for number in range(400):
            key = None if number % 7 == 0 else b"key-%d" % number
            value = None if number % 11 == 0 and key else b"v" * (number % 300)
            headers = [("reason", b"x" * (number % 5))] if number % 3 == 0 else []
            writer.send(clicks_of_kafka_client, number % 2, key, value, headers, timestamp_ms=10_000 + number)
            if number % 50 == 0:
                writer.flush()
                with contextlib.suppress(ZeroDivisionError), transactional.transaction():
                    transactional.send(clicks_of_kafka_client, 0, b"t", b"transaction %d" % number)
                    transactional.flush()
                    assert number % 100 or 1 / 0, "aborted"
        writer.flush()
    ends = all_ends(Log(settings), clicks_of_kafka_client)
    with Reader(settings, clicks_of_kafka_client, committed_only=isolation == "read_committed") as reader:
        batches = read_until(reader, ends)
    rows = sorted(
        (batch.partition, offset, time_ms, key, value)
        for batch in batches
        for offset, time_ms, key, value in zip(
            batch.offsets.tolist(), batch.timestamps_ms.tolist(), batch.keys, batch.values, strict=True
        )
    )
    assert len(rows) == (404 if isolation == "read_committed" else 408)
    assert rows == read_by_the_client(settings, clicks_of_kafka_client, ends, isolation)


def test_the_fetcher_is_given_no_less_than_it_asks_of_its_own_class() -> None:
    asked = {name for name, _ in inspect.getmembers(Fetcher.PartitionRecords, inspect.isfunction) if name[0] != "_"}
    assert asked <= {*dir(BatchRecords)}


def test_of_a_partition_that_waits_two_fetches_are_held(clicks_of_kafka_client: str, settings: Kafka) -> None:
    record, count = bytes(64 * 1024), 8 * FETCH_BYTES // (64 * 1024)
    write(Log(settings), clicks_of_kafka_client, [record] * count, partition=0)
    with Reader(settings, clicks_of_kafka_client) as reader, Writer(settings) as writer:
        for number in range(40):
            writer.send(clicks_of_kafka_client, 1, None, b"%d" % number)
            writer.flush()
            assert next_batches(reader, 10, {1: 10})[0].values == [b"%d" % number]
        held = reader._consumer._consumer.position(TopicPartition(clicks_of_kafka_client, 0))
        assert 0 < held * len(record) <= 2 * FETCH_BYTES + 2 * len(record)
        assert joined(read_until(reader, {0: count}, most=7)) == (0, count)


def test_a_transactional_request_without_an_answer_means_an_unreachable_broker(settings: Kafka) -> None:
    words = "Could not execute transactional request for unknown reasons"
    assert words in inspect.getsource(transaction_manager), "the client says it otherwise now"
    with pytest.raises(UnreachableBroker, match="RequestTimedOutError"), translated(settings, "write records"):
        raise KafkaError(f"{words}: [Error 7] RequestTimedOutError: Request timed out after 9999 ms")
