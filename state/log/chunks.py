"""The content of a record batch as a reader sees it: the positions it covers and its records. No side effects.

Part of `state.log`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from state.log.records import I64, PartitionBatch

_NOTHING: I64 = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One record batch as a reader sees it: the positions [first, next) and the records there.

    Attributes:
        first: First position; `next` is the position after the last.
        offsets: `[n]` int64 of the records; positions without a record are absent
            (markers, aborted or compacted records).
        timestamps_ms: `[n]` int64, Kafka's timestamps.
        keys: n keys; `values`: n values.
        corrupt: Why the batch cannot be read; empty if it can.
        leader_epoch: Epoch of the leader that wrote it.
    """

    first: int
    next: int
    offsets: I64 = field(default_factory=lambda: _NOTHING)
    timestamps_ms: I64 = field(default_factory=lambda: _NOTHING)
    keys: Sequence[bytes | None] = ()
    values: Sequence[bytes | None] = ()
    corrupt: str = ""
    leader_epoch: int = -1


def split(chunk: Chunk, records: int) -> tuple[Chunk, Chunk]:
    """Splits a chunk into its first `records` records and the rest.

    >>> whole = Chunk(5, 9, np.array([6, 8]), np.array([0, 0]), [b"a", b"b"], [b"", b""])
    >>> [(part.first, part.next, part.keys) for part in split(whole, 1)]
    [(5, 8, [b'a']), (8, 9, [b'b'])]
    """
    at = int(chunk.offsets[records])
    parts = (slice(None, records), slice(records, None))
    head, tail = (
        Chunk(
            *(first, after, chunk.offsets[part], chunk.timestamps_ms[part], chunk.keys[part], chunk.values[part]),
            leader_epoch=chunk.leader_epoch,
        )
        for (first, after), part in zip(((chunk.first, at), (at, chunk.next)), parts, strict=True)
    )
    return head, tail


def of_records(first: int, after: int, records: Sequence[Any]) -> Chunk:
    """Builds the chunk of the positions `[first, after)` from the client's own records."""
    return Chunk(
        first,
        after,
        np.array([record.offset for record in records], np.int64),
        np.array([record.timestamp for record in records], np.int64),
        [record.key for record in records],
        [record.value for record in records],
        leader_epoch=records[-1].leader_epoch if records else -1,
    )


def take(chunks: deque[Chunk], max_records: int) -> list[Chunk]:
    """Takes chunks of at most `max_records` records from the left; the last one may be split.

    >>> waiting = deque([Chunk(5, 9, np.array([6, 8]), np.array([0, 0]), [b"a", b"b"], [b"", b""])])
    >>> [part.next for part in take(waiting, 1)], [part.first for part in waiting]
    ([8], [8])
    """
    taken: list[Chunk] = []
    while chunks and max_records > 0:
        chunk = chunks.popleft()
        if len(chunk.values) > max_records:
            chunk, rest = split(chunk, max_records)
            chunks.appendleft(rest)
        max_records -= len(chunk.values)
        taken.append(chunk)
    return taken


def as_batch(topic_id: str, partition: int, first: int, chunks: Sequence[Chunk]) -> PartitionBatch:
    """Joins contiguous chunks into one batch.

    Args:
        topic_id: 32 hexadecimal digits.
        partition: Number of the partition.
        first: The position at which reading resumed.
        chunks: At least one.
    """
    return PartitionBatch(
        topic_id=topic_id,
        partition=partition,
        first=first,
        next=chunks[-1].next,
        offsets=np.concatenate([chunk.offsets for chunk in chunks]),
        timestamps_ms=np.concatenate([chunk.timestamps_ms for chunk in chunks]),
        keys=[key for chunk in chunks for key in chunk.keys],
        values=[value for chunk in chunks for value in chunk.values],
        corrupt=tuple((chunk.first, chunk.next, chunk.corrupt) for chunk in chunks if chunk.corrupt),
    )
