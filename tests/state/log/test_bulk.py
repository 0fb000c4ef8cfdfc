"""Whole record batches: in order, each in the partition of its key."""

from __future__ import annotations

import numpy as np
import pytest

from state.config.sections import Kafka
from state.errors import UnknownTopic
from state.log import BulkWriter, KafkaLog, Reader, Writer, append_encoded, partition_of
from tests.reading import all_ends, read_until, values


def test_encoded_batches_arrive_in_order_in_the_partition_of_their_key(clicks: str, settings: Kafka) -> None:
    keys = [b"user-%d" % (number % 9) for number in range(600)]
    partitions = [partition_of(key, 2) for key in keys]
    with BulkWriter(settings, clicks) as bulk:
        append_encoded(bulk, keys, [b"%d" % number for number in range(600)], np.arange(600) + 5000, partitions)
        append_encoded(bulk, [keys[0]], [b"last"], np.array([9000]), partitions[:1])
    with Writer(settings) as writer:
        writer.send(clicks, None, keys[0], b"by the client")
        writer.flush()
    ends = all_ends(KafkaLog(settings), clicks)
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
