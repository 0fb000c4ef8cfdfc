"""Polls a log's partitions as `streaming.alignment` says: the thin use of a reader, the same on every runner."""

from __future__ import annotations

import time
from collections.abc import Callable

from state.log import LogReader, PartitionBatch
from streaming.alignment import Alignment, Reached, ReadingPlace


class AlignedReader:
    """Reads batches of about one event time. One thread.

    Args:
        reader: Of the partitions.
        reached: What time it is where a partition was read to; it is asked once all that was read is known to it.
        max_skew_s: How far a partition may be read ahead of others.
        clock_s: Seconds that never go back.
    """

    def __init__(
        self,
        reader: LogReader,
        reached: Callable[[int], Reached],
        max_skew_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader, self._reached, self._clock_s = reader, reached, clock_s
        self._alignment = Alignment(max_skew_ms=round(max_skew_s * 1000))
        self._read: dict[int, int] = {}

    def poll(self, timeout_s: float, most: int) -> list[PartitionBatch]:
        """The next batches, in order within a partition; empty after `timeout_s` without records.

        Args:
            timeout_s: Seconds.
            most: At most so many records over all partitions.

        Raises:
            LogError: See `LogReader.poll`.
        """
        reader, partitions = self._reader, self._reader.partitions
        if len(partitions) < 2:
            return reader.poll(timeout_s, most)
        for partition in partitions:
            # At first the time up to which an earlier process had read.
            if partition in self._read or not self._alignment.knows(partition):
                self._alignment.follow(partition, self._read.get(partition, 0), self._reached(partition))
        places = {one: ReadingPlace(reader.position(one), reader.unread(one)) for one in partitions}
        shares, begun_s = self._alignment.shares(places, most), self._clock_s()
        batches = reader.poll(timeout_s, most, shares)
        self._read = {batch.partition: len(batch) for batch in batches}
        self._alignment.asked(shares, self._read, self._clock_s() - begun_s)
        return batches
