"""Maps keys to partitions. Part of `state.log`."""

from __future__ import annotations

from kafka.partitioner.default import murmur2


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's clients choose for a key.

    >>> partition_of(b"shopper-1", 4) in range(4)
    True
    """
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)
