"""What a log gives: the records of a partition as columns, and a topic as it is known.

Part of `state.log`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
