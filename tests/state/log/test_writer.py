"""What a writer of the log refuses, and how it writes many records at once."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.record.default_records import DefaultRecordBatch

from state.config.sections import Kafka
from state.errors import LogError, UnknownTopic
from state.log import Log, Reader, Writer, partition_of
from state.log.bulk import BulkWriter, encode_batch
from tests.reading import all_ends, append_encoded, read_until, values


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
