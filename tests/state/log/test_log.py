"""The log against a real broker: positions, transactions, and everything that can go away."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from kafka.errors import KafkaError
from kafka.producer import transaction_manager

from deploy.kafka.broker import Broker, free_port
from state.config.sections import Kafka
from state.errors import FencedWriter, GapError, LogError, UnknownTopic, UnreachableBroker
from state.log import (
    BulkWriter,
    PartitionBatch,
    Reader,
    Topics,
    Writer,
    append_encoded,
    client_options,
    partition_of,
)
from state.log.client import translated
from state.positions import Gap, Source

KafkaFactory = Callable[..., Kafka]


@pytest.fixture
def settings(kafka_settings: KafkaFactory) -> Kafka:
    return kafka_settings()


@pytest.fixture
def topics(settings: Kafka) -> Iterator[Topics]:
    with Topics(settings) as topics:
        yield topics


@pytest.fixture
def clicks(topics: Topics, settings: Kafka) -> str:
    topics.ensure(settings.clicks_topic, 2)
    return settings.clicks_topic


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        os.sched_yield()
    return condition()


@pytest.fixture
def refused() -> Iterator[None]:
    """For tests in which connections fail: kafka-python leaves such sockets to the garbage collector."""
    yield
    gc.collect()


LEFT_SOCKETS = pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")


def write(settings: Kafka, topic: str, values: list[bytes], partition: int = 0) -> None:
    with Writer(settings) as writer:
        for number, value in enumerate(values):
            writer.send(topic, partition, b"k%d" % number, value, timestamp_ms=1000 + number)
        writer.flush()


def read_until(
    reader: Reader, wanted: dict[int, int], within_s: float = 20.0, most: int = 10_000
) -> list[PartitionBatch]:
    """Polls until the positions are reached."""
    batches = []
    deadline = time.monotonic() + within_s
    while any(reader.position(partition) < position for partition, position in wanted.items()):
        assert time.monotonic() < deadline, {p: reader.position(p) for p in wanted}
        batches += reader.poll(0.2, most)
    return batches


def all_ends(settings: Kafka, topic: str) -> dict[int, int]:
    with Topics(settings) as topics:
        return {partition: end for partition, (_, end) in topics.ends(topic).items()}


def values(batches: list[PartitionBatch], partition: int = 0) -> list[bytes | None]:
    return [value for batch in batches if batch.partition == partition for value in batch.values]


def joined(batches: list[PartitionBatch], partition: int = 0) -> tuple[int, int]:
    mine = [batch for batch in batches if batch.partition == partition]
    for before, after in pairwise(mine):
        assert before.next == after.first
    return mine[0].first, mine[-1].next


# Topics


def test_a_topic_is_made_once_and_keeps_its_id(topics: Topics, settings: Kafka) -> None:
    made = topics.ensure(settings.clicks_topic, 3, {"retention.ms": "3600000"})
    assert made.partitions == 3
    assert len(made.topic_id) == 32
    assert int(made.topic_id, 16)
    assert topics.ensure(settings.clicks_topic, 5) == made
    assert settings.clicks_topic in topics.names()


def test_an_unknown_topic_is_said_at_once_and_never_made(topics: Topics, settings: Kafka) -> None:
    writer = Writer(settings)
    for use in (
        lambda: topics.describe("typo"),
        lambda: topics.ends("typo"),
        lambda: topics.delete("typo"),
        lambda: Reader(settings, "typo"),
        lambda: writer.send("typo", 0, None, b"x"),
        lambda: BulkWriter(settings, "typo"),
    ):
        start = time.monotonic()
        with pytest.raises(UnknownTopic, match="typo"):
            use()
        assert time.monotonic() - start < 3
    writer.close()
    assert "typo" not in topics.names()


def test_a_topic_made_again_has_another_id(topics: Topics, clicks: str) -> None:
    before = topics.describe(clicks).topic_id
    topics.delete(clicks)
    with pytest.raises(UnknownTopic):
        topics.describe(clicks)
    assert topics.ensure(clicks, 2).topic_id != before


def test_ends_and_the_offset_before_a_time(topics: Topics, clicks: str, settings: Kafka) -> None:
    write(settings, clicks, [b"a", b"b", b"c"])
    assert topics.ends(clicks) == {0: (0, 3), 1: (0, 0)}
    assert topics.offset_before(clicks, 1001) == {0: 1, 1: 0}
    assert topics.offset_before(clicks, 10_000) == {0: 3, 1: 0}
    topics.delete_before(clicks, {0: 2})
    assert topics.ends(clicks)[0] == (2, 3)


def test_group_positions_need_no_member(topics: Topics, clicks: str, settings: Kafka) -> None:
    write(settings, clicks, [b"a", b"b"])
    with Reader(settings, clicks) as reader:
        read_until(reader, {0: 2})
        reader.commit_group({0: 2, 1: 0})
    assert topics.committed(settings.group, clicks) == {0: 2, 1: 0}
    assert topics.committed("nobody", clicks) == {}


# Reading


@pytest.mark.parametrize("batched", [True, False])
def test_records_come_with_their_positions(clicks: str, settings: Kafka, topics: Topics, batched: bool) -> None:
    write(settings, clicks, [b"a", b"b", b"c"])
    write(settings, clicks, [b"z"], partition=1)
    with Reader(settings, clicks, batched=batched) as reader:
        batches = read_until(reader, {0: 3, 1: 1})
        assert reader.topic_id == topics.describe(clicks).topic_id
    first = [batch for batch in batches if batch.partition == 0]
    assert values(first) == [b"a", b"b", b"c"]
    assert np.concatenate([batch.offsets for batch in first]).tolist() == [0, 1, 2]
    assert np.concatenate([batch.timestamps_ms for batch in first]).tolist() == [1000, 1001, 1002]
    assert [key for batch in first for key in batch.keys] == [b"k0", b"k1", b"k2"]
    assert values(batches, 1) == [b"z"]
    assert joined(batches) == (0, 3)
    assert all(batch.topic_id == reader.topic_id for batch in batches)


def test_both_ways_of_reading_give_the_same_records(clicks: str, settings: Kafka) -> None:
    with Writer(settings) as writer, Writer(settings, f"tx-{clicks}") as transactional:
        for number in range(400):
            key = None if number % 7 == 0 else b"key-%d" % number
            value = None if number % 11 == 0 and key else b"v" * (number % 300)
            headers = [("reason", b"x" * (number % 5))] if number % 3 == 0 else []
            writer.send(clicks, number % 2, key, value, headers, timestamp_ms=10_000 + number)
            if number % 50 == 0:
                writer.flush()
                with transactional.transaction():
                    transactional.send(clicks, 0, b"t", b"committed-%d" % number)
        writer.flush()
    ends = all_ends(settings, clicks)
    rows = []
    for batched in (True, False):
        with Reader(settings, clicks, batched=batched) as reader:
            batches = read_until(reader, ends)
            rows.append(
                sorted(
                    (b.partition, offset, time_ms, key, value)
                    for b in batches
                    for offset, time_ms, key, value in zip(
                        b.offsets.tolist(), b.timestamps_ms.tolist(), b.keys, b.values, strict=True
                    )
                ),
            )
    assert len(rows[0]) == 408
    assert rows[0] == rows[1]


def test_poll_gives_no_more_than_asked_and_joins_without_a_hole(clicks: str, settings: Kafka) -> None:
    write(settings, clicks, [b"%d" % number for number in range(500)])
    with Reader(settings, clicks) as reader:
        batches = read_until(reader, {0: 500}, most=7)
    assert max(len(batch) for batch in batches) == 7
    assert values(batches) == [b"%d" % number for number in range(500)]
    assert joined(batches) == (0, 500)


def test_reading_begins_where_it_is_told(clicks: str, settings: Kafka) -> None:
    write(settings, clicks, [b"a", b"b", b"c", b"d"])
    with Reader(settings, clicks, positions={0: 2}) as reader:
        assert values(read_until(reader, {0: 4})) == [b"c", b"d"]
        reader.seek(0, 1)
        assert values(read_until(reader, {0: 4})) == [b"b", b"c", b"d"]
    with Reader(settings, clicks, partitions=[0], from_end=True) as reader:
        assert reader.partitions == [0]
        assert reader.position(0) == 4
        write(settings, clicks, [b"new"])
        assert values(read_until(reader, {0: 5})) == [b"new"]
    with pytest.raises(UnknownTopic, match="no partition 9"):
        Reader(settings, clicks, partitions=[9])


def test_an_idle_poll_returns_nothing_and_soon(clicks: str, settings: Kafka) -> None:
    with Reader(settings, clicks) as reader:
        reader.poll(0.5)
        start = time.monotonic()
        assert reader.poll(0.02) == []
        assert time.monotonic() - start < 2
        assert reader.lag() == {0: 0, 1: 0}


def test_an_acknowledged_record_does_not_wait_for_the_poll_to_end(clicks: str, settings: Kafka) -> None:
    waits = []
    with Reader(settings, clicks, from_end=True) as reader, Writer(settings) as writer:
        for number in range(60):
            writer.send(clicks, number % 2, b"k", b"v")
            writer.flush()
            acknowledged = time.perf_counter()
            found: list[PartitionBatch] = []
            while not found:
                found = reader.poll(1.0)
            waits.append(time.perf_counter() - acknowledged)
    assert sorted(waits)[len(waits) // 2] < 0.5


def test_lag_counts_what_is_not_delivered(clicks: str, settings: Kafka) -> None:
    write(settings, clicks, [b"x"] * 10)
    with Reader(settings, clicks) as reader:
        assert reader.lag() == {0: 10, 1: 0}
        deadline = time.monotonic() + 10
        while reader.position(0) == 0 and time.monotonic() < deadline:
            reader.poll(0.2, 4)
        assert reader.lag() == {0: 6, 1: 0}


def test_compressed_records_are_read(clicks: str, settings: Kafka) -> None:
    from kafka import KafkaProducer

    codecs = ("gzip", "zstd", "lz4", "snappy")
    for codec in codecs:
        producer = KafkaProducer(**client_options(settings), compression_type=codec)
        for _ in range(50):
            producer.send(clicks, b"a lot of the same " * 20, partition=0)
        producer.flush()
        producer.close()
    with Reader(settings, clicks) as reader:
        everything = values(read_until(reader, {0: 50 * len(codecs)}))
    assert everything == [b"a lot of the same " * 20] * 50 * len(codecs)


def test_new_partitions_are_taken_up(topics: Topics, clicks: str, settings: Kafka) -> None:
    with Reader(settings, clicks) as reader, Reader(settings, clicks, partitions=[0]) as narrow:
        assert reader.refresh() == []
        topics.grow(clicks, 3)
        write(settings, clicks, [b"first"], partition=2)
        assert reader.refresh() == [2]
        assert values(read_until(reader, {2: 1}), 2) == [b"first"]
        assert narrow.refresh() == []


# Transactions


def test_a_transaction_is_seen_whole_and_its_marker_is_an_absent_position(clicks: str, settings: Kafka) -> None:
    with Reader(settings, clicks) as reader, Writer(settings, f"tx-{clicks}") as writer:
        with writer.transaction():
            writer.send(clicks, 0, b"k", b"one")
            writer.send(clicks, 0, b"k", b"two")
            writer._producer.flush()
            assert values(reader.poll(0.3)) == []
        batches = read_until(reader, {0: 3})
    assert values(batches) == [b"one", b"two"]
    assert joined(batches) == (0, 3)


@pytest.mark.parametrize("batched", [True, False])
def test_an_aborted_transaction_is_a_range_without_records(clicks: str, settings: Kafka, batched: bool) -> None:
    with Writer(settings, f"tx-{clicks}") as writer:
        with pytest.raises(RuntimeError, match="changed my mind"), writer.transaction():
            writer.send(clicks, 0, b"k", b"never")
            writer._producer.flush()
            raise RuntimeError("changed my mind")
        with Reader(settings, clicks, batched=batched) as reader:
            batches = read_until(reader, {0: 2})
            assert values(batches) == []
            assert joined(batches) == (0, 2)
            with writer.transaction():
                writer.send(clicks, 0, b"k", b"after")
            assert values(read_until(reader, {0: 4})) == [b"after"]
    with Reader(settings, clicks, committed_only=False, batched=batched) as reader:
        assert values(read_until(reader, {0: 4})) == [b"never", b"after"]


def test_a_second_writer_fences_the_first(clicks: str, settings: Kafka) -> None:
    first = Writer(settings, f"tx-{clicks}")
    with first.transaction():
        first.send(clicks, 0, b"k", b"mine")
    second = Writer(settings, f"tx-{clicks}")
    with pytest.raises(FencedWriter, match=r"stream\.shard"), first.transaction():
        first.send(clicks, 0, b"k", b"zombie")
    with second.transaction():
        second.send(clicks, 0, b"k", b"theirs")
    first.close()
    second.close()
    with Reader(settings, clicks) as reader:
        assert values(read_until(reader, all_ends(settings, clicks))) == [b"mine", b"theirs"]


def test_a_transactional_request_without_an_answer_means_an_unreachable_broker(settings: Kafka) -> None:
    words = "Could not execute transactional request for unknown reasons"
    assert words in inspect.getsource(transaction_manager), "the client says it otherwise now"
    with pytest.raises(UnreachableBroker, match="RequestTimedOutError"), translated(settings, "write records"):
        raise KafkaError(f"{words}: [Error 7] RequestTimedOutError: Request timed out after 9999 ms")


def test_a_fenced_writer_is_told_so_also_by_its_next_send(clicks: str, settings: Kafka) -> None:
    """The client hears of it in its own thread, and wraps that error when it refuses what is sent later."""
    with (
        Writer(settings, f"tx-{clicks}") as first,
        Writer(settings, f"tx-{clicks}"),
        pytest.raises(FencedWriter, match="cannot write to topic"),
        first.transaction(),
    ):
        first.send(clicks, 0, b"k", b"zombie")
        with contextlib.suppress(FencedWriter):
            first.flush()
        first.send(clicks, 0, b"k", b"later")


def test_a_writer_that_died_in_a_transaction_leaves_nothing_visible(clicks: str, settings: Kafka) -> None:
    dead = Writer(settings, f"tx-{clicks}")
    dead._producer.begin_transaction()
    dead.send(clicks, 0, b"k", b"half")
    dead._producer.flush()
    with Writer(settings, f"tx-{clicks}") as successor:
        with successor.transaction():
            successor.send(clicks, 0, b"k", b"whole")
        with Reader(settings, clicks) as reader:
            assert values(read_until(reader, {0: 4})) == [b"whole"]
    dead.close(0)


def test_a_record_beyond_the_brokers_limit_is_refused_in_one_line(topics: Topics, settings: Kafka) -> None:
    topics.ensure(settings.clicks_topic, 1, {"max.message.bytes": "1000"})
    with Writer(settings) as writer:
        writer.send(settings.clicks_topic, 0, b"k", b"x" * 5000)
        with pytest.raises(LogError) as raised:
            writer.flush()
    assert "\n" not in str(raised.value)
    with Writer(settings) as writer, pytest.raises(LogError):
        writer.send(settings.clicks_topic, 0, b"k", b"x" * 20_000_000)
        writer.flush()


# What goes away


def test_records_deleted_before_they_were_read_are_a_gap(topics: Topics, clicks: str, settings: Kafka) -> None:
    write(settings, clicks, [b"x"] * 10)
    with Reader(settings, clicks) as reader:
        topics.delete_before(clicks, {0: 6})
        with pytest.raises(GapError, match=r"partition 0: we were at 0, but the log now begins at 6") as caught:
            read_until(reader, {0: 10})
        assert caught.value.gaps == (Gap(Source(reader.topic_id, 0), 0, 6),)
    with pytest.raises(GapError, match=r"6 positions|4 positions"):
        Reader(settings, clicks, positions={0: 2})
    with pytest.raises(GapError, match="ends at 10") as caught:
        Reader(settings, clicks, positions={0: 11})
    assert caught.value.gaps == (), "there is nothing to accept"
    with Reader(settings, clicks, positions={0: 6}) as reader:
        assert len(values(read_until(reader, {0: 10}))) == 4


@pytest.mark.parametrize(("behind", "written"), [(0, 20), (5, 20), (5, 2)])
def test_a_topic_made_again_stops_the_reader(
    topics: Topics, clicks: str, settings: Kafka, behind: int, written: int
) -> None:
    write(settings, clicks, [b"old"] * behind)
    with Reader(settings, clicks) as reader:
        read_until(reader, {0: behind})
        reader.poll(0.1)
        topics.delete(clicks)
        # A fetch that waits at the broker would be answered from the new topic.
        assert eventually(lambda: not reader._consumer._fetcher.in_flight_fetches())
        topics.ensure(clicks, 2)
        write(settings, clicks, [b"new"] * written)
        deadline = time.monotonic() + 20
        with pytest.raises(UnknownTopic, match="made again"):
            while time.monotonic() < deadline:
                assert values(reader.poll(0.2)) == []
        with pytest.raises(UnknownTopic, match="made again"):
            reader.refresh()


def test_a_deleted_topic_stops_the_reader(topics: Topics, clicks: str, settings: Kafka) -> None:
    with Reader(settings, clicks) as reader:
        reader.poll(0.1)
        topics.delete(clicks)
        deadline = time.monotonic() + 20
        with pytest.raises(UnknownTopic, match="does not exist"):
            while time.monotonic() < deadline:
                reader.poll(0.2)


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_an_unreachable_broker_is_one_clear_line_in_time(settings: Kafka) -> None:
    lost = replace(settings, bootstrap_servers=f"127.0.0.1:{free_port()}", request_timeout_s=1.0)
    for use in (lambda: Topics(lost), lambda: Reader(lost, "clicks"), lambda: Writer(lost), lambda: Writer(lost, "t")):
        start = time.monotonic()
        with pytest.raises(UnreachableBroker, match=r"127.0.0.1:\d+.*kafka.bootstrap_servers") as raised:
            use()
        assert time.monotonic() - start < 4
        assert "\n" not in str(raised.value)


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_a_server_that_is_no_broker_is_unreachable_too(settings: Kafka) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        lost = replace(settings, bootstrap_servers=f"127.0.0.1:{deaf.getsockname()[1]}", request_timeout_s=1.0)
        start = time.monotonic()
        with pytest.raises(UnreachableBroker):
            Topics(lost)
        assert time.monotonic() - start < 6


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_security_settings_reach_the_client(settings: Kafka, tmp_path: Path) -> None:
    secure = replace(
        settings,
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="ada",
        sasl_password="secret",
        ssl_cafile="ca.pem",
        ssl_certfile="me.pem",
        ssl_keyfile="me.key",
        ssl_key_password="pass",
    )
    options = client_options(secure)
    assert {name: options[name] for name in options if name.startswith(("sasl", "ssl", "security"))} == {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "ada",
        "sasl_plain_password": "secret",
        "ssl_cafile": "ca.pem",
        "ssl_certfile": "me.pem",
        "ssl_keyfile": "me.key",
        "ssl_password": "pass",
    }
    absent = replace(settings, request_timeout_s=1.0, security_protocol="SSL", ssl_cafile=str(tmp_path / "absent.pem"))
    with pytest.raises(LogError, match=r"kafka\.ssl_") as raised:
        Topics(absent)
    assert "secret" not in str(raised.value)


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_the_wrong_protocol_is_told_in_one_line(settings: Kafka) -> None:
    # The local broker speaks no TLS and no SASL.
    for changes in (
        {"security_protocol": "SSL"},
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "a", "sasl_password": "b"},
    ):
        with pytest.raises(LogError, match=r"kafka\.security_protocol") as raised:
            Topics(replace(settings, request_timeout_s=1.0, **changes))  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)


# Loading


def test_encoded_batches_arrive_in_order_in_the_partition_of_their_key(clicks: str, settings: Kafka) -> None:
    keys = [b"user-%d" % (number % 9) for number in range(600)]
    partitions = [partition_of(key, 2) for key in keys]
    with BulkWriter(settings, clicks) as bulk:
        append_encoded(bulk, keys, [b"%d" % number for number in range(600)], np.arange(600) + 5000, partitions)
        append_encoded(bulk, [keys[0]], [b"last"], np.array([9000]), partitions[:1])
    with Writer(settings) as writer:
        writer.send(clicks, None, keys[0], b"by the client")
        writer.flush()
    ends = all_ends(settings, clicks)
    with Reader(settings, clicks) as reader:
        batches = read_until(reader, ends)
    for partition in (0, 1):
        expected = [b"%d" % number for number in range(600) if partitions[number] == partition]
        mine = values(batches, partition)
        assert mine[: len(expected)] == expected
        assert mine[len(expected) :] == ([b"last", b"by the client"] if partitions[0] == partition else [])


# A broker of one's own


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "kafka", free_port(), heap_mb=256)
    broker.start()
    yield broker
    broker.stop()


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_a_broker_killed_and_back_costs_nothing_but_time(own: Broker) -> None:
    settings = Kafka(bootstrap_servers=own.bootstrap_servers, request_timeout_s=20.0)
    with Topics(settings) as topics:
        topics.ensure("clicks", 1)
    with Reader(settings, "clicks") as reader, Writer(settings) as writer, Writer(settings, "tx") as transactional:
        writer.send("clicks", 0, None, b"before")
        writer.flush()
        seen = read_until(reader, {0: 1})
        own.kill()
        for _ in range(20):
            assert reader.poll(0.05) == []
        with pytest.raises(UnreachableBroker):
            Topics(replace(settings, request_timeout_s=0.5))
        writer.send("clicks", 0, None, b"while away")
        own.start()
        writer.flush()
        with transactional.transaction():
            transactional.send("clicks", 0, None, b"in a transaction")
        seen += read_until(reader, {0: 4})
    assert values(seen) == [b"before", b"while away", b"in a transaction"]
    assert joined(seen) == (0, 4)

    hasty = Writer(replace(settings, request_timeout_s=1.0), "tx2")
    with hasty.transaction():
        hasty.send("clicks", 0, None, b"the last")
    own.kill()
    start = time.monotonic()
    with pytest.raises(UnreachableBroker), hasty.transaction():
        hasty.send("clicks", 0, None, b"lost")
    hasty.close(0.5)
    assert time.monotonic() - start < 15


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_a_batch_damaged_on_disk_is_a_corrupt_range_between_good_ones(own: Broker) -> None:
    settings = Kafka(bootstrap_servers=own.bootstrap_servers, request_timeout_s=20.0)
    with Topics(settings) as topics:
        topics.ensure("clicks", 1)
    with BulkWriter(settings, "clicks") as bulk:
        for word in (b"good", b"damaged", b"fine"):
            append_encoded(bulk, [b"k"] * 3, [word + b"-%d" % n for n in range(3)], np.arange(3), [0] * 3)
    own.stop()
    (segment,) = (own.directory / "data" / "clicks-0").glob("*.log")
    content = segment.read_bytes()
    segment.write_bytes(content.replace(b"damaged-1", b"dAmaged-1"))
    own.start()
    for batched in (True, False):
        with Reader(settings, "clicks", batched=batched) as reader:
            batches = read_until(reader, {0: 9})
        assert values(batches) == [b"good-%d" % n for n in range(3)] + [b"fine-%d" % n for n in range(3)]
        assert joined(batches) == (0, 9)
        corrupt = [each for batch in batches for each in batch.corrupt]
        assert (corrupt[0][0], corrupt[-1][1]) == (3, 6)
        if batched:
            assert corrupt == [(3, 6, "checksum of the batch at offset 3")]
