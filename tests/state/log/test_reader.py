"""Reading a real broker: whatever the codec, and what becomes of a reader when things go away."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from deploy.kafka.broker import Broker
from state.config.sections import Kafka
from state.errors import UnknownTopic, UnreachableBroker
from state.log import Log, Reader, Topics, Writer, client_options
from state.log.bulk import BulkWriter
from tests.reading import append_encoded, eventually, joined, read_until, values, write

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
        with pytest.raises(UnknownTopic, match="made again"):
            while time.monotonic() < deadline:
                assert values(reader.poll(0.2)) == []
        with pytest.raises(UnknownTopic, match="made again"):
            reader.refresh()


@LEFT_SOCKETS
@pytest.mark.usefixtures("refused")
def test_a_broker_killed_and_back_costs_nothing_but_time(own: Broker) -> None:
    settings = Kafka(bootstrap_servers=own.bootstrap_servers, request_timeout_s=60.0)
    with Topics(settings) as topics:
        topics.ensure("killed-clicks", 1)
    with (
        Reader(settings, "killed-clicks") as reader,
        Writer(settings) as writer,
        Writer(settings, "tx") as transactional,
    ):
        writer.send("killed-clicks", 0, None, b"before")
        writer.flush()
        seen = read_until(reader, {0: 1})
        assert reader.reachable()
        own.kill()
        for _ in range(20):
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
        assert reader.reachable()
    assert values(seen) == [b"before", b"while away", b"in a transaction"]
    assert joined(seen) == (0, 4)

    hasty = Writer(replace(settings, request_timeout_s=20.0), "tx2")
    with hasty.transaction():
        hasty.send("killed-clicks", 0, None, b"the last")
    own.kill()
    start = time.monotonic()
    with pytest.raises(UnreachableBroker), hasty.transaction():
        hasty.send("killed-clicks", 0, None, b"lost")
    hasty.close(0.5)
    assert time.monotonic() - start < 60


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
