"""Asks the broker whether the log still is the one that was read up to a position (Kafka's KIP-320).

Part of `state.log`. The client asks by itself when a partition gets another
leader while it is read, if it knows the epoch of the record before its
position. A reader that begins at a stored position is told that epoch, and
asks at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kafka.errors as kafka_errors
from kafka.structs import OffsetAndMetadata, TopicPartition

from state.errors import TruncatedLog
from state.log.failures import truncated


def seek(consumer: Any, partition: TopicPartition, offset: int, epoch: int) -> None:
    """As the client's own `seek`, which forgets the epoch of the record before the position."""
    consumer._subscription.seek(partition, OffsetAndMetadata(offset, "", epoch))


def validate(consumer: Any, topic: str, timeout_s: float) -> None:
    """Asks for each partition whose position has an epoch; what is not answered in time is asked again while it is read.

    Raises:
        LogTruncationError: The client's: the log was cut back behind a position.
    """
    assigned = consumer._subscription.assignment
    asked = [one for one in assigned if assigned[one].position.leader_epoch >= 0]
    if not asked:
        return
    for one in asked:
        assigned[one].request_position_validation()
    fetcher = consumer._fetcher
    fetcher._manager.run(fetcher._validate_offsets_async, timeout_s * 1000)
    fetcher.validate_offsets_if_needed()


def as_error(
    problem: kafka_errors.LogTruncationError,
    topic: str,
    topic_id: str,
    positions: Mapping[int, int],
    ends: Mapping[int, tuple[int, int]],
) -> TruncatedLog:
    """What the client found as an error of ours, of the first partition that it names.

    Args:
        problem: The client's.
        topic: The topic's name.
        topic_id: Its id.
        positions: Where we are.
        ends: First and next position of each partition.
    """
    partition = min(each.partition for each in problem.divergent_offsets)
    found = problem.divergent_offsets[TopicPartition(topic, partition)]
    begin, end = ends[partition]
    # The broker may know nothing of that epoch any more: then nothing is known to be what we read.
    kept = begin if found is None else max(begin, found.offset)
    return truncated(topic, topic_id, partition, positions[partition], kept, end)
