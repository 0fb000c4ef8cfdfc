"""Polls the partitions of a log in approximate event-time order, as `streaming.alignment` decides, on every runner."""

from __future__ import annotations

import time
from collections.abc import Callable

from state.log import PartitionBatch, Reader
from streaming.alignment import Alignment, Reached, ReadingPlace


class AlignedReader:
    """Reads batches whose event times are close to each other. Not thread-safe.

    Args:
        reader: Reads the partitions.
        reached: Event time at the position of a partition. It is called once everything read so far is included in it.
        max_skew_s: How far a partition may be read ahead of others.
        clock_s: Monotonic clock in seconds.
    """

    def __init__(
        self,
        reader: Reader,
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
        """Decides what the next polls read together: at most `most` records over all partitions.

        By now `reached` must include everything read before.
        """
        reader, partitions = self._reader, self._reader.partitions
        self._left, self._most = None, most
        if len(partitions) < 2:
            return
        for partition in partitions:
            # At first, the time that an earlier process had reached.
            if partition in self._read or not self._alignment.knows(partition):
                self._alignment.follow(partition, self._read.get(partition, 0), self._reached(partition))
        self._read = {}
        places = {one: ReadingPlace(reader.position(one), reader.unread(one)) for one in partitions}
        self._left = self._alignment.shares(places, most)

    def poll(self, timeout_s: float) -> list[PartitionBatch]:
        """Returns the next batches of those decided, in order within a partition.

        The list is empty after `timeout_s` without records.

        Raises:
            LogError: See `Reader.poll`.
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
        """Whether everything decided by `begin` was read."""
        return self._most <= 0 or (self._left is not None and max(self._left.values(), default=0) <= 0)
