"""A log in memory, of one process: it behaves as Kafka does, without a broker.

For tests and for trying things out: partitions, positions, transactions whose
markers take positions, writers that fence one another, retention, compaction,
and a log that is away for a while. `tests/conformance/test_logs.py` holds it
and Kafka to the same promises.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence

from state.config.sections import Kafka
from state.log.contract import Log
from state.log.memory_clients import MemoryReader, MemoryWriter
from state.log.memory_state import MemoryRecord, MemoryState
from state.log.memory_topics import MemoryTopics
from state.process.wall_clock import wall_ms


def _new_id() -> str:
    return uuid.uuid4().hex


class MemoryLog(Log):
    """A log without a broker. Any thread may use it; each reader and writer belongs to one.

    >>> log = MemoryLog()
    >>> _ = log.topics().ensure("clicks", 1)
    >>> with log.writer("me") as writer, writer.transaction():
    ...     writer.send("clicks", 0, b"ada", b"shoes")
    >>> [(batch.first, batch.next, batch.values) for batch in log.reader("clicks").poll(0.0)]
    [(0, 2, [b'shoes'])]

    Args:
        settings: The section `[kafka]`: its group is shown to lag tools.
        clock_ms: Wall clock: timestamps of records, and what retention goes by.
        ids: Gives each topic made its id, 32 hexadecimal digits.
    """

    def __init__(
        self,
        settings: Kafka | None = None,
        clock_ms: Callable[[], int] = wall_ms,
        ids: Callable[[], str] = _new_id,
    ) -> None:
        self._state = MemoryState(settings or Kafka(), clock_ms, ids)

    def topics(self) -> MemoryTopics:
        """What topics there are."""
        return MemoryTopics(self._state)

    def reader(
        self,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        from_end: bool = False,
        leaders: Mapping[int, int] | None = None,
    ) -> MemoryReader:
        """Follows partitions of a topic from given positions."""
        return MemoryReader(self._state, topic, partitions, positions, committed_only, from_end, leaders)

    def writer(self, transactional_id: str | None = None) -> MemoryWriter:
        """Sends records; with a transactional id also ends what a predecessor left open."""
        return MemoryWriter(self._state, transactional_id)

    def records(self, topic: str) -> list[MemoryRecord]:
        """All that a reader of committed records would find, headers included, partition by partition.

        Raises:
            UnknownTopic: There is no such topic.
        """
        with self._state.changed:
            found = self._state.topic(topic, f"read topic {topic}").partitions
            return [
                record for each in found for record in each.read(each.begin, len(each.records), committed_only=True)[0]
            ]

    def cut_back(self, topic: str, positions: Mapping[int, int]) -> None:
        """Loses what lies from a position on, per partition, as an unclean election does; it grows again under another leader.

        Raises:
            UnknownTopic: There is no such topic.
        """
        with self._state.changed:
            found = self._state.topic(topic, f"cut back topic {topic}").partitions
            for number, offset in positions.items():
                found[number].cut_back(offset)
            self._state.changed.notify_all()

    def go_away(self) -> None:
        """Until `come_back` nobody answers: a poll finds nothing, everything else raises UnreachableBroker."""
        with self._state.changed:
            self._state.away = True

    def come_back(self) -> None:
        """Answers again; what was written before is still there."""
        with self._state.changed:
            self._state.away = False
            self._state.changed.notify_all()

    def clean(self) -> None:
        """Does what Kafka does now and then: compacts, and deletes what is older than `retention.ms`."""
        with self._state.changed:
            for topic in self._state.topics.values():
                keep_ms = int(topic.config.get("retention.ms", -1))
                for partition in topic.partitions:
                    if topic.compacted:
                        partition.compact()
                    elif keep_ms >= 0:
                        partition.delete_older(self._state.clock_ms() - keep_ms)
            self._state.changed.notify_all()
