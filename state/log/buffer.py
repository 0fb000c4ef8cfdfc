"""What was fetched and not delivered yet: of each partition what is being delivered, and one fetch ahead of it.

Part of `state.log`. Where some partitions wait for others, what was fetched of
them stays here, and no more is fetched: memory is bounded by two fetches of
each partition, and one that the client holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kafka.structs import TopicPartition

from state.log.chunks import Chunk, take


class Buffer:
    """Chunks by partition, in order.

    >>> buffer = Buffer()
    >>> for first in (0, 4): buffer.add(1, [Chunk(first, first + 4)])
    >>> 1 in buffer, buffer.full, buffer.ends({0: 3, 1: 0})
    (True, {1}, {0: 3, 1: 8})
    >>> [chunk.next for chunk in buffer.take(1, 10)], list(buffer)
    ([4, 8], [])
    """

    def __init__(self) -> None:
        self._now: dict[int, deque[Chunk]] = {}
        self._ahead: dict[int, deque[Chunk]] = {}

    def __contains__(self, partition: object) -> bool:
        return partition in self._now

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._now))

    def __bool__(self) -> bool:
        return bool(self._now)

    @property
    def full(self) -> set[int]:
        """The partitions that have a fetch ahead."""
        return set(self._ahead)

    def ends(self, positions: Mapping[int, int]) -> dict[int, int]:
        """By partition the position after what is here, else that of `positions`."""
        last = {one: chunks[-1].next for held in (self._now, self._ahead) for one, chunks in held.items()}
        return {**positions, **last}

    def add(self, partition: int, chunks: Iterable[Chunk]) -> None:
        """Takes what one fetch found, at least one chunk, behind what is here."""
        place = self._ahead if partition in self._now else self._now
        place.setdefault(partition, deque()).extend(chunks)

    def take(self, partition: int, max_records: int) -> list[Chunk]:
        """At most so many records of a partition that has some, from the left."""
        taken = take(self._now[partition], max_records)
        while not self._now[partition]:
            del self._now[partition]
            if partition not in self._ahead:
                break
            self._now[partition] = self._ahead.pop(partition)
            taken += take(self._now[partition], max_records - sum(len(chunk.values) for chunk in taken))
        return taken

    def drop(self, partition: int) -> None:
        """Forgets what is here of a partition: it is fetched again."""
        self._now.pop(partition, None)
        self._ahead.pop(partition, None)


def rest(consumer: Any, topic: str, full: Iterable[int]) -> None:
    """Lets the client fetch of all partitions but those of `full`; what is on its way it keeps."""
    wanted = {TopicPartition(topic, one) for one in full}
    resting = consumer.paused()
    consumer.pause(*(wanted - resting))
    consumer.resume(*(resting - wanted))
