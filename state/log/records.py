"""What a log gives: the records of a partition as columns, and a topic as it is known.

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
    """What `Reader.poll` found in one partition: the positions [first, next) and the records there.

    Attributes:
        topic_id: 32 hexadecimal digits.
        partition: Number of the partition.
        first: First position covered; the one before it was covered earlier.
        next: Position after the last one covered.
        offsets: `[n]` int64, ascending; positions without a record are absent
            (transaction markers, aborted or compacted records).
        timestamps_ms: `[n]` int64, Kafka's timestamps.
        keys: n keys.
        values: n values.
        corrupt: (first, next, reason) of ranges that cannot be read; no record
            lies in them.
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
        """A range without records is news too."""
        return True

    def one_by_one(self) -> Iterator[PartitionBatch]:
        """The same positions in as many batches as there are records, or one where there are none.

        >>> found = PartitionBatch("ab" * 16, 0, 3, 9, np.array([4, 6]), np.array([1, 1]), [None] * 2, [b"x", b"y"], ((3, 4, "cut"),))
        >>> [(one.first, one.next, one.values, one.corrupt) for one in found.one_by_one()]
        [(3, 5, [b'x'], ((3, 4, 'cut'),)), (5, 9, [b'y'], ())]
        """
        begin = self.first
        for end in [*(self.offsets[:-1] + 1).tolist(), self.next]:
            yield self.between(begin, end)
            begin = end

    def between(self, first: int, after: int) -> PartitionBatch:
        """What it has of the positions `[first, after)`, which lie within its own."""
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
    """A topic as the cluster knows it.

    Attributes:
        topic_id: 32 hexadecimal digits; a topic that was deleted and made
            again has another one.
        partitions: How many it has.
    """

    topic_id: str
    partitions: int


@dataclass(frozen=True)
class Copies:
    """How many copies of a topic's records there are.

    Attributes:
        replicas: Of the partition that has the fewest.
        min_insync: How many of them must have a record before it is acknowledged.
        brokers: How many the cluster has.

    >>> Copies(3, 2, 3).weakness(), Copies(1, 1, 1).weakness()
    ('', '')
    >>> Copies(3, 3, 3).weakness()
    'all 3 replicas must have a record: with one broker away nothing can be written; set min.insync.replicas to 2'
    """

    replicas: int
    min_insync: int
    brokers: int

    def weakness(self) -> str:
        """What the loss of one broker would cost, in words; empty where it costs nothing, or there is but one."""
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
