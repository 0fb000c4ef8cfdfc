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
        self._left: dict[int, int] | None = None
        self._most = 0

    def begin(self, most: int) -> None:
        """Decides what the next polls take together: at most so many records over all partitions.

        All that was read before is known to `reached` by now.
        """
        reader, partitions = self._reader, self._reader.partitions
        self._left, self._most = None, most
        if len(partitions) < 2:
            return
        for partition in partitions:
            # At first the time up to which an earlier process had read.
            if partition in self._read or not self._alignment.knows(partition):
                self._alignment.follow(partition, self._read.get(partition, 0), self._reached(partition))
        self._read = {}
        places = {one: ReadingPlace(reader.position(one), reader.unread(one)) for one in partitions}
        self._left = self._alignment.shares(places, most)

    def poll(self, timeout_s: float) -> list[PartitionBatch]:
        """The next batches of what was decided, in order within a partition; empty after `timeout_s` without records.

        Raises:
            LogError: See `LogReader.poll`.
        """
        if self._left is None:
            batches = self._reader.poll(timeout_s, self._most)
            self._most -= sum(map(len, batches))
            return batches
        shares, begun_s = {one: left for one, left in self._left.items() if left > 0}, self._clock_s()
        batches = self._reader.poll(timeout_s, self._most, shares)
        self._alignment.asked(shares, [batch.partition for batch in batches], self._clock_s() - begun_s)
        for batch in batches:
            self._read[batch.partition] = self._read.get(batch.partition, 0) + len(batch)
            self._left[batch.partition] -= len(batch)
            self._most -= len(batch)
        return batches

    @property
    def is_done(self) -> bool:
        """Whether all that was decided was read."""
        return self._most <= 0 or (self._left is not None and max(self._left.values(), default=0) <= 0)
