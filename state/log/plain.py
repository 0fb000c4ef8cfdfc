"""A poll without the hook: the client's own records, one by one. Part of `state.log`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from kafka.structs import TopicPartition

from state.errors import LogError
from state.log.chunks import Chunk, of_records


def chunks_of(
    consumer: Any, topic: str, positions: Mapping[int, int], found: Mapping[TopicPartition, Sequence[Any]]
) -> dict[int, deque[Chunk]]:
    """Chunks out of the client's own records; its position tells of those without any.

    Args:
        consumer: The client.
        topic: The topic's name.
        positions: Where we are.
        found: What its poll gave.
    """
    buffer = {}
    for partition, ours in positions.items():
        each = TopicPartition(topic, partition)
        records = found.get(each, ())
        after = consumer.position(each)
        if records or after > ours:
            buffer[partition] = deque([of_records(ours, after, records)])
    return buffer


def skip_corrupt(consumer: Any, topic: str, positions: Mapping[int, int], problem: Exception) -> tuple[int, Chunk]:
    """Goes past a corrupt batch, which without the hook shows only as an error of one of the partitions.

    Returns:
        The partition, and what is corrupt there.

    Raises:
        LogError: The error names none of the partitions.
    """
    for partition, ours in positions.items():
        each = TopicPartition(topic, partition)
        if f"{each}" in str(problem):
            at = consumer.position(each)
            consumer.seek(each, at + 1)
            return partition, Chunk(ours, at + 1, corrupt=str(problem))
    raise LogError(f"cannot read topic {topic}: {problem}") from problem
