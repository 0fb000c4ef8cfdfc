"""kafka-python as we use it: by private names, whose meaning a new release may change. Run it before raising the pin."""

from __future__ import annotations

import contextlib
import inspect

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import Fetcher
from kafka.errors import KafkaError
from kafka.producer import transaction_manager

from state.config.sections import Kafka
from state.errors import UnreachableBroker
from state.log import Log, Reader, Topics, Writer, client_options
from state.log.client import translated
from state.log.reader import FETCH_BYTES, BatchRecords
from tests.conftest import KafkaFactory
from tests.reading import all_ends, joined, next_batches, read_until, write

Row = tuple[int, int, int, bytes | None, bytes | None]


@pytest.fixture
def settings(kafka_settings: KafkaFactory) -> Kafka:
    return kafka_settings()


@pytest.fixture
def clicks(settings: Kafka) -> str:
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
def test_whole_batches_hold_the_records_that_the_client_reads(clicks: str, settings: Kafka, isolation: str) -> None:
    with Writer(settings) as writer, Writer(settings, f"tx-{clicks}") as transactional:
        for number in range(400):
            key = None if number % 7 == 0 else b"key-%d" % number
            value = None if number % 11 == 0 and key else b"v" * (number % 300)
            headers = [("reason", b"x" * (number % 5))] if number % 3 == 0 else []
            writer.send(clicks, number % 2, key, value, headers, timestamp_ms=10_000 + number)
            if number % 50 == 0:
                writer.flush()
                with contextlib.suppress(ZeroDivisionError), transactional.transaction():
                    transactional.send(clicks, 0, b"t", b"transaction %d" % number)
                    transactional.flush()
                    assert number % 100 or 1 / 0, "aborted"
        writer.flush()
    ends = all_ends(Log(settings), clicks)
    with Reader(settings, clicks, committed_only=isolation == "read_committed") as reader:
        batches = read_until(reader, ends)
    rows = sorted(
        (batch.partition, offset, time_ms, key, value)
        for batch in batches
        for offset, time_ms, key, value in zip(
            batch.offsets.tolist(), batch.timestamps_ms.tolist(), batch.keys, batch.values, strict=True
        )
    )
    assert len(rows) == (404 if isolation == "read_committed" else 408)
    assert rows == read_by_the_client(settings, clicks, ends, isolation)


def test_the_fetcher_is_given_no_less_than_it_asks_of_its_own_class() -> None:
    asked = {name for name, _ in inspect.getmembers(Fetcher.PartitionRecords, inspect.isfunction) if name[0] != "_"}
    assert asked <= {*dir(BatchRecords)}


def test_of_a_partition_that_waits_two_fetches_are_held(clicks: str, settings: Kafka) -> None:
    record, count = bytes(64 * 1024), 8 * FETCH_BYTES // (64 * 1024)
    write(Log(settings), clicks, [record] * count, partition=0)
    with Reader(settings, clicks) as reader, Writer(settings) as writer:
        for number in range(40):
            writer.send(clicks, 1, None, b"%d" % number)
            writer.flush()
            assert next_batches(reader, 10, {1: 10})[0].values == [b"%d" % number]
        held = reader._consumer._consumer.position(TopicPartition(clicks, 0))
        assert 0 < held * len(record) <= 2 * FETCH_BYTES + 2 * len(record)
        assert joined(read_until(reader, {0: count}, most=7)) == (0, count)


def test_a_transactional_request_without_an_answer_means_an_unreachable_broker(settings: Kafka) -> None:
    words = "Could not execute transactional request for unknown reasons"
    assert words in inspect.getsource(transaction_manager), "the client says it otherwise now"
    with pytest.raises(UnreachableBroker, match="RequestTimedOutError"), translated(settings, "write records"):
        raise KafkaError(f"{words}: [Error 7] RequestTimedOutError: Request timed out after 9999 ms")
