"""The data that a log returns: records of a partition as columns, descriptions of topics, and known leader epochs.

Every record has the epoch of the leader that wrote it. If a truncated log grows again, the epoch of the record before
our position ends before that position. The known epochs of a partition are a tuple of (first offset, epoch), ascending
(`Known`). Part of `state.log`. No side effects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class PartitionBatch:
    """The result of `Reader.poll` in one partition: the positions [first, next) and the records there.

    Attributes:
        topic_id: 32 hexadecimal digits.
        first: First position covered; earlier batches covered the preceding position.
        next: Position after the last one covered.
        offsets: `[n]` int64, ascending; positions without a record are absent (transaction markers, aborted or
            compacted records).
        timestamps_ms: `[n]` int64, Kafka's timestamps.
        corrupt: (first, next, reason) of ranges that cannot be read; they contain no records.
    """

    topic_id: str
    partition: int
    first: int
    next: int
    offsets: I64
    timestamps_ms: I64
    keys: list[bytes | None]
    values: list[bytes | None]
    corrupt: tuple[tuple[int, int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def __bool__(self) -> bool:
        """Always True, because a range without records still advances positions."""
        return True

    def one_by_one(self) -> Iterator[PartitionBatch]:
        """Splits the batch into one batch per record, which cover the same positions; one batch without records."""
        begin = self.first
        for end in [*(self.offsets[:-1] + 1).tolist(), self.next]:
            yield self.between(begin, end)
            begin = end

    def between(self, first: int, after: int) -> PartitionBatch:
        """The part of the batch in the positions `[first, after)`, which must be within its range."""
        rows = slice(*np.searchsorted(self.offsets, (first, after)).tolist())
        return replace(
            self, first=first, next=after, offsets=self.offsets[rows], timestamps_ms=self.timestamps_ms[rows],
            keys=self.keys[rows], values=self.values[rows],
            corrupt=tuple(
                (max(begin, first), min(end, after), why)
                for begin, end, why in self.corrupt
                if begin < after and end > first
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class TopicInfo:
    """A topic as the cluster describes it.

    `topic_id` has 32 hexadecimal digits; a topic that was deleted and created again has another id.
    """

    topic_id: str
    partitions: int


@dataclass(frozen=True)
class Copies:
    """The replication of a topic.

    Attributes:
        replicas: The number of replicas of the partition that has the fewest.
        min_insync: The number of replicas that must have a record before it is acknowledged.

    >>> Copies(3, 2, 3).weakness(), Copies(1, 1, 1).weakness()
    ('', '')
    >>> Copies(3, 3, 3).weakness()
    'all 3 replicas must have a record: while one broker is unreachable nothing can be written; set min.insync.replicas to 2'
    """

    replicas: int
    min_insync: int
    brokers: int

    def weakness(self) -> str:
        """Describes the effect of the loss of one broker; empty if it has none, or if there is only one broker."""
        if self.brokers < 2:
            return ""
        if self.replicas < 2:
            return (
                "there is one copy of each record: while its broker is unreachable nothing can be read or "
                "written, and a lost disk loses it; recreate the topic with kafka.replication 3, or reassign its partitions"
            )
        if self.min_insync >= self.replicas:
            return (
                f"all {self.replicas} replicas must have a record: while one broker is unreachable nothing can be written; "
                f"set min.insync.replicas to {self.replicas - 1}"
            )
        if self.min_insync < 2:
            return (
                "one copy is enough to acknowledge a record: if that broker is lost at that moment, so is the record; "
                "set min.insync.replicas to 2"
            )
        return ""


_NOTHING: I64 = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One record batch: the positions `[first, next)`, and columns like those of `PartitionBatch`.

    `corrupt` is the reason why the batch cannot be read; empty if it can.
    """

    first: int
    next: int
    offsets: I64 = field(default_factory=lambda: _NOTHING)
    timestamps_ms: I64 = field(default_factory=lambda: _NOTHING)
    keys: Sequence[bytes | None] = ()
    values: Sequence[bytes | None] = ()
    corrupt: str = ""
    leader_epoch: int = -1


def _part(chunk: Chunk, first: int, after: int, rows: slice) -> Chunk:
    columns = (chunk.offsets[rows], chunk.timestamps_ms[rows], chunk.keys[rows], chunk.values[rows])
    return Chunk(first, after, *columns, leader_epoch=chunk.leader_epoch)


def take(chunks: deque[Chunk], max_records: int) -> list[Chunk]:
    """Takes chunks of at most `max_records` records from the left; the last one may be split."""
    chunks_taken: list[Chunk] = []
    while chunks and max_records > 0:
        chunk = chunks.popleft()
        if len(chunk.values) > max_records:
            at, head, tail = int(chunk.offsets[max_records]), slice(None, max_records), slice(max_records, None)
            chunks.appendleft(_part(chunk, at, chunk.next, tail))
            chunk = _part(chunk, chunk.first, at, head)
        max_records -= len(chunk.values)
        chunks_taken.append(chunk)
    return chunks_taken


def as_batch(topic_id: str, partition: int, first: int, chunks: Sequence[Chunk]) -> PartitionBatch:
    """Joins contiguous chunks, at least one, into one batch that begins at `first`, the position of the reader."""
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


Known = tuple[tuple[int, int], ...]

UNKNOWN = -1
MOST = 64


def epoch_before(known: Known, offset: int) -> int:
    """The epoch of the newest record before `offset`; -1 if it is unknown.

    >>> known = ((0, 3), (40, 5))
    >>> epoch_before(known, 40), epoch_before(known, 41), epoch_before(known, 0)
    (3, 5, -1)
    """
    return next((epoch for first, epoch in reversed(known) if first < offset), UNKNOWN)


def noted(known: Known, first: int, epoch: int) -> Known:
    """Adds to `known` that the record at `first` has `epoch`; if that is new, later entries are dropped.

    >>> noted(((0, 3),), 40, 5), noted(((0, 3), (40, 5)), 41, 5)
    (((0, 3), (40, 5)), ((0, 3), (40, 5)))
    >>> noted(((0, 3), (40, 5)), 30, 6)
    ((0, 3), (30, 6))
    """
    if epoch < 0 or epoch_before(known, first + 1) == epoch:
        return known
    return (*(entry for entry in known if entry[0] < first), (first, epoch))[-MOST:]
