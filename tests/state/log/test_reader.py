"""The client of Kafka: what a reader does where a broker hangs or a batch is damaged, and what a writer refuses."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.record.default_records import DefaultRecordBatch

from deploy.local_kafka import Broker
from state.config.sections import Kafka
from state.errors import LogError, TruncatedLog, UnknownTopic, UnreachableBroker
from state.log import Log, Reader, Topics, Writer, client_options, partition_of
from state.log.bulk import BulkWriter, encode_batch
from state.log.reader import BatchConsumer
from state.positions import Gap, Source
from tests.reading import all_ends, append_encoded, eventually, joined, read_until, values, write
from tests.segments import cut_back

LEFT_SOCKETS = pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")


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


@pytest.mark.parametrize(("behind", "written"), [(0, 20), (5, 20), (5, 2)])
def test_a_topic_made_again_stops_the_reader(
    topics: Topics, clicks: str, settings: Kafka, behind: int, written: int
) -> None:
    write(Log(settings), clicks, [b"old"] * behind)
    with Reader(settings, clicks) as reader:
        read_until(reader, {0: behind})
        reader.poll(0.1)
        topics.delete(clicks)
        # A fetch that waits at the broker would be answered from the new topic.
        assert eventually(lambda: not reader._consumer._fetcher.in_flight_fetches())
        topics.ensure(clicks, 2)
        write(Log(settings), clicks, [b"new"] * written)
        deadline = time.monotonic() + 20
        with pytest.raises(UnknownTopic, match="created again"):
            while time.monotonic() < deadline:
                assert values(reader.poll(0.2)) == []
        with pytest.raises(UnknownTopic, match="created again"):
            reader.refresh()


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_a_broker_that_hangs_or_is_killed_and_is_back_costs_nothing_but_time(
    own: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("state.log.reader.HANGS_S", 2.0)
    settings = Kafka(bootstrap_servers=own.bootstrap_servers, request_timeout_s=60.0)
    with Topics(settings) as topics:
        topics.ensure("killed-clicks", 1)
    with (
        Reader(settings, "killed-clicks") as reader,
        Writer(settings) as writer,
        Writer(settings, "tx") as transactional,
    ):

        def reachable() -> bool:
            assert reader.poll(0.1) == []
            return reader.reachable()

        writer.send("killed-clicks", 0, None, b"before")
        writer.flush()
        seen = read_until(reader, {0: 1})
        assert eventually(reachable)
        # Its connections stay open.
        os.kill(own.pid or 0, signal.SIGSTOP)
        assert eventually(lambda: not reachable())
        os.kill(own.pid or 0, signal.SIGCONT)
        assert eventually(reachable)
        # It dies just before a reader that opens asks whether the log was truncated.
        validate = BatchConsumer.validate

        def validate_late(consumer: BatchConsumer, timeout_s: float) -> None:
            own.kill()
            validate(consumer, timeout_s)

        with (
            monkeypatch.context() as opening,
            pytest.raises(UnreachableBroker, match="cannot read topic killed-clicks"),
        ):
            opening.setattr(BatchConsumer, "validate", validate_late)
            Reader(settings, "killed-clicks", positions={0: 1}, leaders={0: reader.leader_epoch(0, 1)})
        for _ in range(10):
            assert reader.poll(0.05) == []
        assert eventually(lambda: not reader.reachable())
        with pytest.raises(UnreachableBroker):
            Topics(replace(settings, request_timeout_s=0.5))
        writer.send("killed-clicks", 0, None, b"while away")
        own.start()
        writer.flush()
        with transactional.transaction():
            transactional.send("killed-clicks", 0, None, b"in a transaction")
        seen += read_until(reader, {0: 4})
        assert eventually(reachable)
    assert values(seen) == [b"before", b"while away", b"in a transaction"]
    assert joined(seen) == (0, 4)

    hasty = Writer(replace(settings, request_timeout_s=10.0), "tx2")
    with hasty.transaction():
        hasty.send("killed-clicks", 0, None, b"the last")
    own.kill()
    with pytest.raises(UnreachableBroker), hasty.transaction():
        hasty.send("killed-clicks", 0, None, b"lost")
    hasty.close(0.5)


@pytest.mark.nightly
@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_a_batch_damaged_on_disk_is_a_corrupt_range_between_good_ones(own: Broker) -> None:
    settings = Kafka(bootstrap_servers=own.bootstrap_servers, request_timeout_s=20.0)
    with Topics(settings) as topics:
        topics.ensure("damaged-clicks", 1)
    with BulkWriter(settings, "damaged-clicks") as bulk:
        for word in (b"good", b"damaged", b"fine"):
            append_encoded(bulk, [b"k"] * 3, [word + b"-%d" % n for n in range(3)], np.arange(3), [0] * 3)
    own.stop()
    (segment,) = (own.directory / "data" / "damaged-clicks-0").glob("*.log")
    content = segment.read_bytes()
    segment.write_bytes(content.replace(b"damaged-1", b"dAmaged-1"))
    own.start()
    with Reader(settings, "damaged-clicks") as reader:
        batches = read_until(reader, {0: 9})
    assert values(batches) == [b"good-%d" % n for n in range(3)] + [b"fine-%d" % n for n in range(3)]
    assert joined(batches) == (0, 9)
    corrupt = [each for batch in batches for each in batch.corrupt]
    assert corrupt == [(3, 6, "checksum of the batch at offset 3")]


TOPIC = "truncated-clicks"


def write_of_truncation(log: Log, sent: list[bytes]) -> None:
    """One record batch each."""
    with log.writer() as writer:
        for value in sent:
            writer.send(TOPIC, 0, None, value)
            writer.flush()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_a_partition_of_kafka_cut_back_and_grown_again(own: Broker) -> None:
    log = Log(Kafka(bootstrap_servers=own.bootstrap_servers))
    with log.topics() as topics:
        topic_id = topics.ensure(TOPIC, 1).topic_id
    write_of_truncation(log, [b"old %d" % number for number in range(10)])
    with log.reader(TOPIC) as running:
        read_until(running, {0: 10})
        epoch = running.leader_epoch(0, 10)
        assert epoch >= 0
        # The leader that is elected lacks the last four records; then others take their offsets, and more.
        own.kill()
        cut_back(own.directory / "data", TOPIC, 0, 6)
        own.start()
        # 1. It has not grown yet: the end says it, whoever comes.
        with pytest.raises(
            TruncatedLog,
            match=r"the stored position is 10, but the log that was read ends at 6: the log was truncated, so",
        ):
            log.reader(TOPIC, positions={0: 10})
        write_of_truncation(log, [b"new %d" % number for number in range(9)])
        deadline = time.monotonic() + 60
        # 2. A reader that was there before.
        with pytest.raises(TruncatedLog) as raised:
            while time.monotonic() < deadline:
                assert running.poll(0.2) == []
        assert (
            "ends at 6: the log was truncated and has grown again to 15, so that offsets 6 to 9 are used twice"
            in str(raised.value)
        )
        assert raised.value.kept == 6
        assert raised.value.gaps == (Gap(Source(topic_id, 0), 6, 10),)
    # 3. One that begins and knows the epoch of the record before its position.
    with pytest.raises(TruncatedLog, match="ends at 6"):
        log.reader(TOPIC, positions={0: 10}, leaders={0: epoch})
    # 4. What is not cut off is read on, and the next epoch is told from there.
    with log.reader(TOPIC, positions={0: 6}, leaders={0: epoch}) as again:
        assert values(read_until(again, {0: 15})) == [b"new %d" % number for number in range(9)]
        assert again.leader_epoch(0, 6) == epoch < again.leader_epoch(0, 7) == again.leader_epoch(0, 15)


def test_a_fenced_writer_is_told_so_also_by_its_next_send(clicks: str, settings: Kafka) -> None:
    """The client hears of it in its own thread, and wraps that error when it refuses what is sent later."""
    with (
        Writer(settings, f"tx-{clicks}") as first,
        Writer(settings, f"tx-{clicks}"),
        pytest.raises(LogError, match="cannot write to topic"),
        first.transaction(),
    ):
        first.send(clicks, 0, b"k", b"zombie")
        with contextlib.suppress(LogError):
            first.flush()
        first.send(clicks, 0, b"k", b"later")


def test_a_record_beyond_what_the_client_takes_is_refused_too(clicks: str, settings: Kafka) -> None:
    with Writer(settings) as writer, pytest.raises(LogError):
        writer.send(clicks, 0, b"k", b"x" * 20_000_000)
        writer.flush()


def test_encoded_batches_arrive_in_order_in_the_partition_of_their_key(clicks: str, settings: Kafka) -> None:
    keys = [b"user-%d" % (number % 9) for number in range(600)]
    partitions = [partition_of(key, 2) for key in keys]
    with BulkWriter(settings, clicks) as bulk:
        append_encoded(bulk, keys, [b"%d" % number for number in range(600)], np.arange(600) + 5000, partitions)
        append_encoded(bulk, [keys[0]], [b"last"], np.array([9000]), partitions[:1])
    with Writer(settings) as writer:
        writer.send(clicks, None, keys[0], b"by the client")
        writer.flush()
    ends = all_ends(Log(settings), clicks)
    with Reader(settings, clicks) as reader:
        batches = read_until(reader, ends)
    for partition in (0, 1):
        expected = [b"%d" % number for number in range(600) if partitions[number] == partition]
        mine = values(batches, partition)
        assert mine[: len(expected)] == expected
        assert mine[len(expected) :] == ([b"last", b"by the client"] if partitions[0] == partition else [])


def test_an_unknown_topic_is_said_and_never_made(settings: Kafka) -> None:
    with pytest.raises(UnknownTopic, match="typo"):
        BulkWriter(settings, "typo")


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=400), st.integers(0, 2**42)), min_size=1))
def test_an_encoded_batch_is_read_by_the_client(made: list[tuple[bytes, bytes, int]]) -> None:
    keys, values, times = (list(column) for column in zip(*made, strict=True))
    batch = DefaultRecordBatch(encode_batch(keys, values, times))
    assert batch.validate_crc()
    assert [(r.key, r.value, r.timestamp) for r in batch] == made
    assert batch.max_timestamp == max(times)
