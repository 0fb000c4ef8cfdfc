"""The data that a log returns: records of a partition as columns, and descriptions of topics.

Part of `state.log`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class PartitionBatch:
    """The result of `Reader.poll` in one partition: the positions [first, next) and the records there.

    Attributes:
        topic_id: 32 hexadecimal digits.
        partition: Number of the partition.
        first: First position covered; earlier batches covered the one before it.
        next: Position after the last one covered.
        offsets: `[n]` int64, ascending; positions without a record are absent
            (transaction markers, aborted or compacted records).
        timestamps_ms: `[n]` int64, Kafka's timestamps.
        keys: n keys.
        values: n values.
        corrupt: (first, next, reason) of ranges that cannot be read; they contain no
            records.
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
        """Always true: a range without records still moves positions."""
        return True

    def one_by_one(self) -> Iterator[PartitionBatch]:
        """Splits the batch into one batch per record, covering the same positions; one batch if there are no records.

        >>> found = PartitionBatch("ab" * 16, 0, 3, 9, np.array([4, 6]), np.array([1, 1]), [None] * 2, [b"x", b"y"], ((3, 4, "cut"),))
        >>> [(one.first, one.next, one.values, one.corrupt) for one in found.one_by_one()]
        [(3, 5, [b'x'], ((3, 4, 'cut'),)), (5, 9, [b'y'], ())]
        """
        begin = self.first
        for end in [*(self.offsets[:-1] + 1).tolist(), self.next]:
            yield self.between(begin, end)
            begin = end

    def between(self, first: int, after: int) -> PartitionBatch:
        """The part of the batch in the positions `[first, after)`, which must be within its range."""
        here = slice(*np.searchsorted(self.offsets, (first, after)).tolist())
        return replace(
            self, first=first, next=after, offsets=self.offsets[here], timestamps_ms=self.timestamps_ms[here],
            keys=self.keys[here], values=self.values[here],
            corrupt=tuple(
                (max(begin, first), min(end, after), why)
                for begin, end, why in self.corrupt
                if begin < after and end > first
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class TopicInfo:
    """A topic as the cluster describes it.

    Attributes:
        topic_id: 32 hexadecimal digits; a topic that was deleted and created
            again has another id.
        partitions: The number of partitions.
    """

    topic_id: str
    partitions: int


@dataclass(frozen=True)
class Copies:
    """The replication of a topic.

    Attributes:
        replicas: The replicas of the partition that has the fewest.
        min_insync: How many of them must have a record before it is acknowledged.
        brokers: The number of the cluster's brokers.

    >>> Copies(3, 2, 3).weakness(), Copies(1, 1, 1).weakness()
    ('', '')
    >>> Copies(3, 3, 3).weakness()
    'all 3 replicas must have a record: with one broker away nothing can be written; set min.insync.replicas to 2'
    """

    replicas: int
    min_insync: int
    brokers: int

    def weakness(self) -> str:
        """What the loss of one broker would cost, as text; empty if nothing, or if there is only one broker."""
        if self.brokers < 2:
            return ""
        if self.replicas < 2:
            return (
                "there is one copy of each record: with its broker away nothing can be read or written, and a lost "
                "disk loses it; make the topic anew with kafka.replication 3, or reassign its partitions"
            )
        if self.min_insync >= self.replicas:
            return (
                f"all {self.replicas} replicas must have a record: with one broker away nothing can be written; "
                f"set min.insync.replicas to {self.replicas - 1}"
            )
        if self.min_insync < 2:
            return (
                "one copy is enough to acknowledge a record: a broker that is lost just then takes it along; "
                "set min.insync.replicas to 2"
            )
        return ""
